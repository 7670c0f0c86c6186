"""Measure models on documents to JSON: validity, exact matches, precision, recall and F1 of each field, inventions.

Departures from comparing strings: numbers are compared by value, dates by day, list items after the assignment that
fits best; an invention is a value that is not in the document. Works for any schema.

    python eval_idp.py --model_dir smollm2-135m runs/idp_sft --data data/idp_validation.jsonl --by layout
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil.cli import InputError, add_debug_flag, new_parser, run_script
from distil.files import check_folder, file_sha256, read_jsonl, write_json, write_jsonl
from distil.idp.documents import document_of, expected_of
from distil.idp.extractor import ExtractOptions, Extractor, add_extraction_flags, extract_options
from distil.idp.values import measure
from distil.models import ModelRef, resolve
from distil.processes import only_one


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("models and documents").add_argument
    add("--model_dir", nargs="+", required=True, help="one or more of: base model, model folder, adapter folder")
    fields = 'JSONL of {"document"|"input", "expected"|"output"} (%(default)s)'
    add("--data", default="data/idp_validation.jsonl", help=fields)
    add("--limit", type=int, help="only the first LIMIT documents")
    add("--by", metavar="FIELD", help="also measure groups by this field of the lines, such as layout")
    add = parser.add_argument_group("report").add_argument
    add("--bootstrap", type=int, default=2000, help="resamples of documents for the intervals (%(default)s)")
    add("--report_dir", help="write metrics.json and each model's predictions.jsonl")
    add("--json", action="store_true", help="print metrics.json instead of tables")
    add_extraction_flags(parser)
    add_debug_flag(parser)
    return parser


def read_documents(path: str, limit: int | None) -> list[dict]:
    """Return rows with "document" and, as a value, "expected". Raises InputError.
    In the file these may be "input", a complete user turn, and "output", and the answer JSON text."""
    rows = read_jsonl(path, ("document|input",))[:limit]
    for number, row in enumerate(rows, 1):
        row["document"] = row["document"] if "document" in row else document_of(row["input"])
        row["expected"] = expected_of(row, f"{path}: row {number}")
    return rows


def evaluate_model(
    model: ModelRef, rows: Sequence[dict], options: ExtractOptions, by: str | None, resamples: int
) -> tuple[dict, list[dict]]:
    """Return (metrics, answers) of one model."""
    from tqdm import tqdm

    extractor, answers = Extractor.load(model, options), []
    start, size = time.perf_counter(), 4 * options.batch_size
    for first in tqdm(range(0, len(rows), size), desc=model.name, unit="batch", file=sys.stderr):
        answers += extractor.extract([row["document"] for row in rows[first : first + size]])
    seconds = (time.perf_counter() - start) / len(rows)
    result = {"model": model.name, "seconds_per_document": round(seconds, 3)}
    result |= measure(rows, answers, options.schema, resamples)
    if by:
        groups = defaultdict(list)
        for row, answer in zip(rows, answers, strict=True):
            groups[str(row.get(by))].append((row, answer))
        parts = {name: zip(*pairs, strict=True) for name, pairs in sorted(groups.items())}
        result["by"] = {name: measure(*part, options.schema, resamples) for name, part in parts.items()}
    return result, answers


def print_tables(results: list[dict], by: str | None, out: Any) -> None:
    """Print F1 of each field and the totals, models side by side."""
    names = [result["model"] for result in results]
    paths = list(dict.fromkeys(path for result in results for path in result["fields"]))
    widths = [max(len(path) for path in [*paths, "seconds a document"]), *(max(len(name), 21) for name in names)]

    def line(title: str, cells: list[str]) -> None:
        row = zip([title, *cells], widths, strict=True)
        print("  ".join(f"{cell:<{width}}" for cell, width in row).rstrip(), file=out)

    def interval(value: float, low_high: Sequence[float]) -> str:
        return f"{value:.3f} [{low_high[0]:.3f}, {low_high[1]:.3f}]"

    print(f"{results[0]['documents']} documents; F1 with 95 % intervals by bootstrap of documents", file=out)
    line("field", names)
    for path in paths:
        cells = [r["fields"].get(path) for r in results]
        line(path, [interval(c["f1"], c["interval_95"]) if c else "-" for c in cells])
    line("all fields", [interval(r["f1"], r["f1_interval_95"]) for r in results])
    line("mean of fields", [f"{r['macro_f1']:.3f}" for r in results])
    for key in ("valid", "truncated", "exact", "invention_rate"):
        line(key.replace("_", " "), [f"{r[key]:.3f}" for r in results])
    line("seconds a document", [f"{r['seconds_per_document']:.2f}" for r in results])
    if by:
        line(f"all fields, by {by}", [""] * len(results))
        for group, part in results[0]["by"].items():
            cells = [r["by"][group] for r in results]
            line(f"  {group} ({part['documents']})", [interval(c["f1"], c["f1_interval_95"]) for c in cells])


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    only_one("evaluation of documents")
    if args.bootstrap < 1 or (args.limit is not None and args.limit < 1):
        raise InputError("--bootstrap and --limit are at least 1")
    if args.report_dir:
        check_folder(args.report_dir)
    rows = read_documents(args.data, args.limit)
    if args.by and not any(args.by in row for row in rows):
        raise InputError(f"--by {args.by}: no line of {args.data} has it")
    options = extract_options(args)
    models = [resolve(name) for name in args.model_dir]
    measured = [evaluate_model(model, rows, options, args.by, args.bootstrap) for model in models]
    results = [result for result, _ in measured]
    data = {"file": args.data, "sha256": file_sha256(args.data), "documents": len(rows)}
    schema = {"file": options.schema_name, "sha256": options.schema_sha256}
    summary = {"data": data, "schema": schema, "models": results}
    print_tables(results, args.by, sys.stderr if args.json else sys.stdout)
    if args.report_dir:
        for number, (result, answers) in enumerate(measured):
            folder = Path(args.report_dir) / f"{number}_{Path(result['model']).resolve().name}"
            write_jsonl(folder / "predictions.jsonl", (r | a for r, a in zip(rows, answers, strict=True)))
        write_json(Path(args.report_dir) / "metrics.json", summary)
        print(f"report written to {args.report_dir}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    run_script(main)
