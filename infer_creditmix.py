"""Classify credit risk by calibrated label likelihood: one feature string, or a JSONL file.

Departures from generating an answer: each label's log-likelihood at the assistant start is compared, after the prior
that content-free prompts give it is subtracted (or with the bias and temperature that eval_creditmix.py --fit found).

    python infer_creditmix.py --model_dir runs/creditmix_sft --features "Age: 23.0, Occupation: Scientist, ..."
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from common import InputError, model_fingerprint, read_json, run_script, write_json
from creditmix import CreditModel, add_scoring_flags

CHUNK = 512  # rows scored between two writes to the .part file


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


def read_line(line: str) -> tuple[dict, str | None]:
    """(object to write, features or None): a line that cannot be done carries its error instead."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return {"error": {"code": "not_json", "message": f"the line is not JSON: {error}"}}, None
    if not isinstance(row, dict):
        return {
            "error": {"code": "not_an_object", "message": f"an object is needed, found {type(row).__name__}"}
        }, None
    row.pop("error", None)  # of an earlier run, whose error lines were put right
    features = row.get("features", row.get("question"))
    if not isinstance(features, str) or not features.strip():
        message = 'a non-empty string "features" (or "question") is needed'
        return {**row, "error": {"code": "no_features", "message": message}}, None
    return row, features


def score_lines(model: CreditModel, lines: list[str]) -> list[dict]:
    """The output object of each input line, in order."""
    results = [read_line(line) for line in lines]
    for row, features in results:
        if features is not None and not model.fits(features):
            row["error"] = {"code": "too_long", "message": "the features do not fit the model's context"}
    good = [i for i, (row, features) in enumerate(results) if features is not None and "error" not in row]
    responses = model.responses(model.raw_scores([results[i][1] for i in good])) if good else []
    for i, response in zip(good, responses, strict=True):
        results[i][0].update(response)
    return [row for row, _ in results]


def resume_point(part: Path, settings: dict) -> int:
    """Lines already done in an interrupted run's .part file; a half-written last line is cut off.

    Raises InputError where that run had other settings: its lines must not be mixed with ours."""
    note = part.with_name(part.name + ".json")
    if not part.exists():
        write_json(note, settings)
        return 0
    if not note.exists() or read_json(note) != settings:
        raise InputError(f"{part}: left by a run with another model, input or flags; --overwrite starts again")
    whole = part.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    part.write_bytes(whole)
    return whole.count(b"\n")


def input_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        yield from lines


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.features is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise InputError("give either --features, or --input and --output")
    if args.features is not None:
        if not args.features.strip():
            raise InputError("--features is empty")
        model = CreditModel.load(args.model_dir, args)
        print(json.dumps(model.responses(model.raw_scores([args.features]))[0], indent=2))
        return 0

    source, output = Path(args.input), Path(args.output)
    part = output.with_name(output.name + ".part")
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if output.is_dir():
        raise InputError(f"{output}: is a folder, a file is needed")
    if output.exists() and not args.overwrite:
        raise InputError(f"{output}: exists; --overwrite replaces it")
    if args.overwrite:
        part.unlink(missing_ok=True)
    total = sum(1 for _ in input_lines(source))
    if not total:
        raise InputError(f"{source}: empty")
    model = CreditModel.load(args.model_dir, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("overwrite", "debug")}
    stat = source.stat()
    settings |= {
        "model": model_fingerprint(args.model_dir),
        "input_size": stat.st_size,
        "input_time": stat.st_mtime_ns,
        **model.settings(),
    }
    done = resume_point(part, settings)
    if done:
        print(f"{part}: going on after {done} rows", file=sys.stderr)
    from tqdm import tqdm

    failed = sum('"error"' in line and "error" in json.loads(line) for line in input_lines(part)) if done else 0
    with open(part, "a", encoding="utf-8") as out, tqdm(total=total, initial=done, unit="row", file=sys.stderr) as bar:
        rest = islice(input_lines(source), done, None)
        while lines := list(islice(rest, CHUNK)):
            for row in score_lines(model, lines):
                failed += "error" in row
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(lines))
    part.replace(output)
    part.with_name(part.name + ".json").unlink()
    if failed:
        print(f"{output}: {failed} of {total} lines carry an error", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
