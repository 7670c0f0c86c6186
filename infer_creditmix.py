"""Classify credit risk by calibrated label probabilities: one feature string, or a JSONL file.

Departures from generating an answer: each label's log-probability at the assistant start is compared, after the prior
that content-free prompts give it is subtracted (or with the bias and temperature that eval_creditmix.py --fit stored).

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, ..."
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from distil import batch
from distil.batch import failed_line, parse_line
from distil.cli import InputError, add_debug_flag, new_parser, run_script
from distil.creditmix.model import CreditModel, add_credit_flags, credit_options
from distil.creditmix.rows import NO_FIELD
from distil.models import resolve
from distil.processes import gather, rank_and_world


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("rows").add_argument
    add("--features", help='one feature string, "Age: 23.0, Occupation: Scientist, ..."')
    output = "JSONL to write: each input object with the result's fields added, in the same order"
    batch.add_file_flags(add, 'JSONL of {"features"} (or {"question"})', output)
    add_credit_flags(parser)
    add_debug_flag(parser)
    return parser


def chunk_of(batch_size: int | str) -> int:
    """Return the rows scored between two writes to the .part file, which a kill costs; for `auto` enough to try."""
    return 512 if batch_size == "auto" else max(128, int(batch_size))


def doubts(notes: Counter[str]) -> list[str]:
    """Return what of a feature string could not be read. notes: those of `CreditModel.prompt` on it."""
    unread = [note for note in notes if "not a number" in note or "outside" in note]
    result = [f"{'; '.join(unread)} (write plain numbers: Age: 23, Annual Income: 19114)"] if unread else []
    return result + [f"{NO_FIELD}; the answer means little"] * (NO_FIELD in notes)


def score_lines(model: CreditModel, lines: list[str], doubtful: Counter[str]) -> list[dict]:
    """Return the output object of each input line, in order; count those with `doubts`."""
    rows, prompts = [], {}
    for number, line in enumerate(lines):
        row, features = parse_line(line, ("features", "question"))
        rows.append(row)
        if features is None:
            continue
        prompt = model.prompt(features, notes := Counter())
        if model.scorer.fits(prompt):
            prompts[number] = prompt
            doubtful["rows"] += bool(doubts(notes))
        else:
            row |= failed_line({}, "too_long", "the features do not fit the model's context")
    responses = model.responses(model.scorer.score(list(prompts.values())))
    for number, response in zip(prompts, responses, strict=True):
        rows[number].update(response)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    batch.check_one_or_file(flags := vars(args), "features")
    options = credit_options(flags)
    if args.features is not None:
        if not args.features.strip() or any("\ud800" <= sign <= "\udfff" for sign in args.features):
            raise InputError("--features is empty or not UTF-8 text")
        model = CreditModel.load(resolve(args.model_dir), options)
        prompt = model.prompt(args.features, notes := Counter())
        for note in doubts(notes):
            print(f"note: {note}", file=sys.stderr)
        print(json.dumps(model.responses(model.scorer.score([prompt]))[0], indent=2))
        return 0
    source, output = Path(args.input), Path(args.output)
    total = batch.check_files(source, output, args.overwrite)
    ref = resolve(args.model_dir)
    model = CreditModel.load(ref, options)
    used = model.calibration  # the contents of files that flags or folders name decide the answers too
    contents = {"calibration_used": [used.method, used.bias.tolist(), used.temperature], "forms": model.scorer.forms}
    settings = batch.file_settings(flags, ref) | contents
    doubtful: Counter[str] = Counter()
    chunk = chunk_of(args.batch_size)
    failed = batch.run_file(source, output, total, settings, chunk, lambda lines: score_lines(model, lines, doubtful))
    count = sum(gather(doubtful["rows"]))
    if count and rank_and_world()[0] == 0:
        what = "name no feature or have a value that could not be read; --features with such a row reports which"
        print(f"note: {count} of the rows scored now {what}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
