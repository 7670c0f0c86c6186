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
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil import cli
from distil.cli import InputError, with_interval
from distil.files import hashed, read_jsonl, write_jsonl
from distil.idp import confidence, extractor
from distil.idp.documents import expected_of
from distil.idp.extractor import ExtractOptions, Extractor
from distil.idp.forms import cut_to
from distil.idp.schema import SchemaGrammar
from distil.idp.values import measure
from distil.models import ModelRef, resolve
from distil.processes import only_one, print_note
from distil.splits import check_split

Part = tuple[ExtractOptions, SchemaGrammar, list[int]]  # of one schema: options of the model, grammar, numbers of rows


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("models and documents").add_argument
    add("--model_dir", nargs="+", required=True, help="one or more of: base model, model folder, adapter folder")
    fields = 'JSONL of {"document"|"input", "expected"|"output"}; "schema": of a line, unless --schema is given'
    add("--data", default="data/idp_validation.jsonl", help=f"{fields} (%(default)s)")
    add("--limit", type=int, help="only the first LIMIT documents")
    text = "first fit the confidence of --evidence on this JSONL and store it with the model as confidence.json"
    add("--fit_confidence", metavar="FILE", help=text)
    add("--by", metavar="FIELD", help="also measure groups by this field of the lines, such as layout")
    cli.add_report_flags(parser, "documents", 2000)
    extractor.add_extraction_flags(parser)
    return parser


def read_documents(path: str, limit: int | None) -> list[dict]:
    """Return rows with "document" and, as a value, "expected". Raises InputError.
    In the file these may be "input", a complete user turn, and "output", and the answer JSON text."""
    rows = read_jsonl(path, ("document|input",))[:limit]
    for number, row in enumerate(rows, 1):
        row["document"] = row["document"] if "document" in row else row["input"]
        row["expected"] = expected_of(row, f"{path}: row {number}")
    return rows


def by_schema(
    rows: list[dict], refs: Sequence[ModelRef], options: ExtractOptions, own: bool
) -> list[tuple[ExtractOptions, list[int]]]:
    """Return (options, numbers of rows) for each schema, that of the row if `own`; rows get it as it was checked. User
    turns of the models are cut to their documents and, with a note, expected answers to the fields of the schema: a
    model cannot write others. Raises InputError for an invalid schema."""
    numbers, dropped, result = defaultdict(list), Counter(), []
    for number, row in enumerate(rows):
        numbers[json.dumps(row.get("schema", options.schema) if own else options.schema)].append(number)
    for text, found in numbers.items():
        usual = text == json.dumps(options.schema)
        part = options if usual else options.with_schema(json.loads(text), f"the schema of row {found[0] + 1}")
        prompts = [part.for_model(ref).prompt for ref in refs]
        result.append((part, found))
        for row in (rows[number] for number in found):
            row["schema"] = part.schema
            row["expected"] = cut_to(part.schema, row["expected"], dropped)
            row["document"] = min((prompt.document_of(row["document"]) for prompt in prompts), key=len)
    if dropped:
        print_note(f"not in the schema and not measured: {', '.join(dropped)} ({dropped.total()} values)")
    return result


def compiled(ref: ModelRef, parts: list[tuple[ExtractOptions, list[int]]]) -> list[Part]:
    """Return parts of `by_schema` for a model, with the grammars of their schemas. Raises InputError."""
    return [(options.for_model(ref), extractor.compile_for(ref, options), found) for options, found in parts]


def answer_all(model: Extractor, rows: list[dict], parts: list[Part], name: str) -> list[dict]:
    """Return the answers to rows, with a progress bar of this name."""
    from tqdm import tqdm

    size, answers = 4 * model.options.batch_size, [{}] * len(rows)
    for options, grammar, numbers in parts:
        asked = model.for_schema(options, grammar)
        for first in tqdm(range(0, len(numbers), size), desc=name, unit="batch", file=sys.stderr):
            batch = numbers[first : first + size]
            for i, answer in zip(batch, asked.extract([rows[i]["document"] for i in batch]), strict=True):
                answers[i] = answer
    return answers


def load_fitted(ref: ModelRef, parts: list[Part], known: list[dict], known_parts: list[Part], note: dict) -> Extractor:
    """Return a loaded model. known: rows to fit its confidence on first, if there are some; note: what to store about
    them."""
    model = Extractor.load(ref, *parts[0][:2], calibrated=not known)
    if known:
        answers = answer_all(model, known, known_parts, f"{ref.name}: fit")
        model.weights = confidence.fit(known, answers, parts[0][0].schema)
        confidence.store_weights(ref, model.weights, note)
    return model


def evaluate_model(
    model: Extractor, name: str, rows: list[dict], parts: list[Part], by: str | None, resamples: int
) -> tuple[dict, list[dict]]:
    """Return (metrics, answers) of one model. by: a field to group rows by."""
    start, schema = time.perf_counter(), model.options.schema
    answers = answer_all(model, rows, parts, name)
    result = {"model": name, "seconds_per_document": round((time.perf_counter() - start) / len(rows), 3)}
    result |= measure(rows, answers, schema, resamples)
    result |= confidence.measure_evidence(rows, answers, schema) if model.options.evidence else {}
    if by:
        groups = defaultdict(list)
        for row, answer in zip(rows, answers, strict=True):
            groups[str(row.get(by))].append((row, answer))
        named = {name: zip(*pairs, strict=True) for name, pairs in sorted(groups.items())}
        result["by"] = {name: measure(*part, schema, resamples) for name, part in named.items()}
    return result, answers


def print_tables(results: list[dict], by: str | None, out: Any) -> None:
    """Print F1 of each field and the totals, models side by side."""
    table = [["field", *(result["model"] for result in results)]]
    for path in dict.fromkeys(path for result in results for path in result["fields"]):
        cells = [r["fields"].get(path) for r in results]
        table.append([path, *(with_interval(c["f1"], c["interval_95"], ".3f") if c else "-" for c in cells)])
    table.append(["all fields", *(with_interval(r["f1"], r["f1_interval_95"], ".3f") for r in results)])
    table.append(["mean of fields", *(f"{r['macro_f1']:.3f}" for r in results)])
    rows = {key: key.replace("_", " ") for key in ("valid", "truncated", "exact", "invention_rate")}
    rows |= confidence.MEASURES if "ece" in results[0] else {}
    for key, name in rows.items():
        table.append([name, *("-" if r[key] is None else f"{r[key]:.3f}" for r in results)])
    table.append(["seconds a document", *(f"{r['seconds_per_document']:.2f}" for r in results)])
    table += [[f"all fields, by {by}"]] if by else []
    for group, part in results[0]["by"].items() if by else ():
        cells = [with_interval(r["by"][group]["f1"], r["by"][group]["f1_interval_95"], ".3f") for r in results]
        table.append([f"  {group} ({part['documents']})", *cells])
    print(f"{results[0]['documents']} documents; F1 with 95 % intervals by bootstrap of documents", file=out)
    cli.print_columns(table, out)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    only_one("evaluation of documents")
    unused = {"only for retries, and --retries is 0": [] if args.retries else ["seed"]}
    unused |= {"--url gives no log-probabilities": ["fit_confidence"] if args.url else []}
    cli.refuse_unused(parser, argv, unused | cli.unused_engine(vars(args)))
    cli.check_at_least_one(vars(args), "limit", "bootstrap")
    with cli.report_folder(args.report_dir):
        evidence = {"evidence": args.evidence or bool(args.fit_confidence)}
        rows, sha256 = hashed(args.data, lambda: read_documents(args.data, args.limit))
        refs = [resolve(name) for name in args.model_dir]
        check_split(args.model_dir, args.data, sha256)
        options = extractor.extract_options(vars(args) | evidence)
        known, note = [], {}
        if args.fit_confidence:
            known, digest = hashed(args.fit_confidence, lambda: read_documents(args.fit_confidence, None))
            check_split(args.model_dir, args.fit_confidence, digest)
            note = {"data": args.fit_confidence, "data_sha256": digest, "documents": len(known)}
            note["schema_sha256"] = options.schema_sha256
            if digest == sha256 or not all(ref.adapter for ref in refs):
                raise InputError("--fit_confidence: needs adapters, and other documents than --data")
        if args.by and not any(args.by in row for row in rows):
            raise InputError(f"--by {args.by}: no line of {args.data} has it")
        parts, known_parts = (by_schema(some, refs, options, own=not args.schema) for some in (rows, known))
        # All schemas are compiled before the first model is loaded.
        asked = [(ref, compiled(ref, parts), compiled(ref, known_parts)) for ref in refs]
        measured = []
        for ref, mine, fitted in asked:
            fit = (ref, mine, known, fitted, note)  # loaded in the call: one model at a time
            measured.append(evaluate_model(load_fitted(*fit), ref.name, rows, mine, args.by, args.bootstrap))
        results = [result for result, _ in measured]
        data = {"file": args.data, "sha256": sha256, "documents": len(rows)}
        schema = {"file": options.schema_name, "sha256": options.schema_sha256}
        print_tables(results, args.by, sys.stderr if args.json else sys.stdout)
        for number, (result, answers) in enumerate(measured) if args.report_dir else ():
            folder = Path(args.report_dir) / f"{number}_{Path(result['model']).resolve().name}"
            write_jsonl(folder / "predictions.jsonl", (r | a for r, a in zip(rows, answers, strict=True)))
        summary = {"data": data, "schema": schema, "models": results}
        cli.finish_report(summary, vars(args), ("f1", "macro_f1", "exact", "valid", "invention_rate"))
    return 0


if __name__ == "__main__":
    cli.run_script(main)
