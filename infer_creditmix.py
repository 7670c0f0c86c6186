"""Classify rows by calibrated label probabilities: one feature string or text, a table, or a JSONL file.

Departures from generating an answer: each label's log-probability at the assistant start is compared, after the prior
that content-free prompts give it is subtracted (or with the bias and temperature that eval_creditmix.py --fit stored).

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, ..."
    python infer_creditmix.py --model_dir runs/creditmix_sft --input rows.csv --output scored.csv
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from distil import batch, cli
from distil.batch import failed_line
from distil.cli import InputError
from distil.creditmix.model import CreditModel, CreditOptions, add_credit_flags, credit_options
from distil.creditmix.scored import RowsToScore
from distil.models import ModelRef, resolve
from distil.processes import gather, print_note, rank_and_world
from distil.tasks import chosen_task


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("rows").add_argument
    add("--features", help='one feature string, "Age: 23.0, Occupation: Scientist, ..."; of a text task: the text')
    source = 'table (CSV, .csv.gz, .xlsx, .parquet, JSON list), or JSONL of {"features"} (or {"question"}, {"fields"})'
    output = "to write, all of the input with the results added: .jsonl, .csv, .csv.gz, .xlsx or .parquet"
    batch.add_file_flags(add, source, output)
    cli.add_decimal_flag(add)
    add_credit_flags(parser)
    cli.add_engine_flags(parser)
    return parser


def chunk_of(batch_size: int) -> int:
    """Return the rows scored between two writes to the .part file, which a kill costs."""
    return max(128, batch_size)


def prompts_of(model: CreditModel, source: RowsToScore, items: Iterable[Any]) -> tuple[list[dict], dict, int]:
    """Return the objects of input rows, so far with the error of those that cannot be scored, {index: token ids} of
    the others' prompts, and how many of these have doubts."""
    rows, prompts, doubtful = [], {}, 0
    for number, item in enumerate(items):
        row, features = source.parsed(item)
        rows.append(row)
        if features is None:
            continue
        try:
            prompt = model.prompt(features, notes := Counter())
        except InputError as error:
            row |= failed_line({}, "repeated_field", str(error))
            continue
        if not model.scorer.fits(prompt):
            row |= failed_line({}, "too_long", "the features do not fit the model's context")
            continue
        prompts[number] = prompt
        if doubts := model.task.doubts(notes):
            doubtful += 1
            row |= {"notes": "; ".join(doubts)} if source.noted else {}
    return rows, prompts, doubtful


def score_lines(model: CreditModel, source: RowsToScore, doubtful: Counter[str], items: list) -> list[dict]:
    """Return the object with the scores of each input row, in order; count those with `doubts`."""
    rows, prompts, count = prompts_of(model, source, items)
    doubtful["rows"] += count
    for number, response in zip(prompts, model.responses(model.scorer.score([*prompts.values()])), strict=True):
        rows[number].update(source.columns(response))
    return rows


def rows_a_forward(model: CreditModel, source: RowsToScore, flags: Mapping[str, Any]) -> int:
    """Return the number that --batch_size auto is: the interrupted run's, or else the first process's for the first
    rows of --input. It decides which rows are in one batch, and so the last digits of scores in bfloat16."""
    if flags["batch_size"] != "auto":
        return flags["batch_size"]
    size = batch.interrupted(Path(flags["output"])).get("rows_a_forward")
    if not size and rank_and_world()[0] == 0:
        _, prompts, _ = prompts_of(model, source, islice(source, 512))
        size = model.scorer.settled_batch_size(list(prompts.values()))
    return gather(size)[0]


def start(
    flags: Mapping[str, Any], options: CreditOptions, source: RowsToScore, doubtful: Counter[str], ref: ModelRef
) -> tuple:
    """Return what `batch.answer_file` needs of a model: rows between two writes, work, contents behind the flags."""
    model = CreditModel.load(ref, options)
    model.scorer.batch_size = size = rows_a_forward(model, source, flags)
    used, forms = model.calibration, model.scorer.forms
    numbers = {"prior": used.prior.tolist(), "bias": used.bias.tolist(), "temperature": used.temperature}
    contents = {"calibration_used": numbers | {"method": used.method}, "forms": forms, "rows_a_forward": size}
    contents |= {"task": options.task.record}
    return chunk_of(size), functools.partial(score_lines, model, source, doubtful), contents


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    batch.check_one_or_file(flags := vars(args), "features")
    one = {"only with --input": [] if args.features is None else ["batch_size", "decimal"]}
    cli.refuse_unused(parser, argv, one | cli.unused_scoring(flags) | cli.unused_engine(flags))
    if args.features is None:
        batch.check_files(Path(args.input), Path(args.output), args.overwrite)
    elif not args.features.strip() or any("\ud800" <= sign <= "\udfff" for sign in args.features):
        raise InputError("--features is empty or not UTF-8 text")
    ref = resolve(args.model_dir, args.served_model)
    task = chosen_task([ref], args.task)
    options = credit_options(flags, task)
    if args.features is not None:
        model = CreditModel.load(ref, options)
        prompt = model.prompt(args.features, notes := Counter())
        for doubt in task.doubts(notes):
            print_note(doubt)
        print(json.dumps(model.responses(model.scorer.score([prompt]))[0], indent=2))
        return 0
    doubtful: Counter[str] = Counter()
    source = RowsToScore(Path(args.input), Path(args.output), task, args.decimal, args.abstain_below is not None)
    status = batch.answer_file(flags, functools.partial(start, flags, options, source, doubtful), source)
    if count := sum(gather(doubtful["rows"])):
        what = "name no feature, have one of another name or a value in doubt"
        where = "the column notes" if source.noted else "--features"
        print_note(f"{count} of the rows scored now {what}; {where} reports which")
    return status


if __name__ == "__main__":
    cli.run_script(main)
