"""Classify credit risk by calibrated label likelihood: one feature string, or a JSONL file.

Departures from generating an answer: each label's log-likelihood at the assistant start is compared, after the prior
that content-free prompts give it is subtracted (or with the bias and temperature that eval_creditmix.py --fit found).

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, ..."
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from batch_files import check_files, failed_line, parse_line, run_file
from creditmix import CREDIT_FIELDS, CreditModel, add_scoring_flags, canonical_features, known_fields
from files import InputError, run_script
from models import model_fingerprint
from processes import gather, only_one, rank_and_world


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add = parser.add_argument_group("rows").add_argument
    add("--features", help='one feature string, "Age: 23.0, Occupation: Scientist, ..."')
    add("--input", help='JSONL of {"features"} (or {"question"})')
    add("--output", help="JSONL to write: each input object with the result's fields added, in the same order")
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's .part file")
    add_scoring_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def chunk_of(batch_size: int | str) -> int:
    """Rows scored between two writes to the .part file, which is what an interruption can cost: at least a batch, and
    for `auto` enough to try some."""
    return 512 if batch_size == "auto" else max(128, int(batch_size))


def doubts(features: str, notes: Counter[str]) -> list[str]:
    """What of a feature string could not be read. notes: those of `canonical_features` on it."""
    unread = [note for note in notes if "not a number" in note or "outside" in note]
    found = [f"{'; '.join(unread)} (write plain numbers: Age: 23, Annual Income: 19114)"] if unread else []
    if not known_fields(features):
        found.append(f"the text names none of {', '.join(CREDIT_FIELDS)}; the answer says little")
    return found


def score_lines(model: CreditModel, lines: list[str], doubtful: Counter[str]) -> list[dict]:
    """The output object of each input line, in order; counts those with `doubts`."""
    rows, prompts = [], {}
    for number, line in enumerate(lines):
        row, features = parse_line(line, ("features", "question"))
        rows.append(row)
        if features is None:
            continue
        notes: Counter[str] = Counter()
        prompt = model.prompt(features, notes)
        if model.scorer.fits(prompt):
            prompts[number] = prompt
            doubtful["rows"] += bool(doubts(features, notes))
        else:
            row |= failed_line({}, "too_long", "the features do not fit the model's context")
    responses = model.responses(model.scorer.score(list(prompts.values())))
    for number, response in zip(prompts, responses, strict=True):
        rows[number].update(response)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.features is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise InputError("give either --features, or --input and --output")
    if args.features is not None:
        only_one("--features")
        if not args.features.strip():
            raise InputError("--features is empty")
        try:
            args.features.encode()
        except UnicodeEncodeError:
            raise InputError("--features is not UTF-8 text") from None
        notes: Counter[str] = Counter()
        canonical_features(args.features, notes)
        for note in doubts(args.features, notes):
            print(f"note: {note}", file=sys.stderr)
        model = CreditModel.load(args.model_dir, args)
        print(json.dumps(model.responses(model.raw_scores([args.features]))[0], indent=2))
        return 0

    source, output = Path(args.input), Path(args.output)
    total = check_files(source, output, args.overwrite)
    model = CreditModel.load(args.model_dir, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("overwrite", "debug")}
    settings |= {"model": model_fingerprint(args.model_dir), **model.settings()}
    doubtful: Counter[str] = Counter()
    failed = run_file(
        source, output, total, settings, chunk_of(args.batch_size), lambda lines: score_lines(model, lines, doubtful)
    )
    count = sum(gather(doubtful["rows"]))
    if count and rank_and_world()[0] == 0:
        print(
            f"note: {count} of the rows scored now name no feature or have a value that could not be read; "
            "--features with such a row says which",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
