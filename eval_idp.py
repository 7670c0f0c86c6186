"""Measure models on documents to JSON: validity, exact matches, precision, recall and F1 of each field, inventions.

Departures from comparing strings: numbers are compared by value, dates by day, list items after the matching that
fits best; an invention is a value that does not stand in the document. Works for any schema.

    python eval_idp.py --model_dir smollm2-135m runs/idp_sft --data data/idp_validation.jsonl --by layout
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from files import InputError, check_folder, file_sha256, read_jsonl, run_script, write_json, write_jsonl
from idp import (
    Extractor,
    add_extraction_flags,
    check_extraction_flags,
    document_of,
    expected_of,
    leaf_key,
    stands_in,
)
from processes import only_one


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models and documents").add_argument
    add("--model_dir", nargs="+", required=True, help="one or more of: base model, model folder, adapter folder")
    add(
        "--data",
        default="data/idp_validation.jsonl",
        help='JSONL of {"document"|"input", "expected"|"output"} (%(default)s)',
    )
    add("--limit", type=int, help="only the first so many documents")
    add("--by", metavar="FIELD", help="also measure apart by this field of the lines, such as layout")
    add = parser.add_argument_group("report").add_argument
    add("--bootstrap", type=int, default=2000, help="resamples of documents for the intervals (%(default)s)")
    add("--report_dir", help="write metrics.json and each model's predictions.jsonl")
    add("--json", action="store_true", help="print metrics.json instead of tables")
    add_extraction_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


# ------------------------------------------------------------------------------------------------- comparing values


def same(name: str, a: Any, b: Any) -> bool:
    """Whether two values of a field are the same. Dates by day: 2018-04-03 is 03/04/2018, which can be read so, but
    03/04/2018 is not 04/03/2018."""
    a, b = leaf_key(name, a), leaf_key(name, b)
    if isinstance(a, tuple) and isinstance(b, tuple) and 1 in (len(a), len(b)):
        return bool(set(a) & set(b))
    return type(a) is type(b) and a == b


def count_fields(found: Any, expected: Any, counts: Counter, path: str = "") -> int:
    """Add to counts[(path, 'right'|'found'|'expected')] of every leaf; returns the right ones.

    Items of lists are matched so that most leaves are right (Hungarian method), whatever their order."""
    kinds = {dict if isinstance(v, dict) else list if isinstance(v, list) else str for v in (found, expected)}
    if len(kinds) > 1 and None not in (found, expected):  # an object for a text: all of both is wrong
        return count_fields(found, None, counts, path) + count_fields(None, expected, counts, path)
    if isinstance(found, dict) or isinstance(expected, dict):
        found, expected = (value if isinstance(value, dict) else {} for value in (found, expected))
        names = dict.fromkeys([*expected, *found])
        return sum(count_fields(found.get(n), expected.get(n), counts, f"{path}.{n}".lstrip(".")) for n in names)
    if isinstance(found, list) or isinstance(expected, list):
        from scipy.optimize import linear_sum_assignment

        found, expected = (value if isinstance(value, list) else [] for value in (found, expected))
        right = np.array([[count_fields(f, e, Counter(), path) for e in expected] for f in found])
        pairs = dict(zip(*linear_sum_assignment(-right), strict=True)) if right.size else {}
        total = sum(
            count_fields(f, expected[pairs[i]] if i in pairs else None, counts, f"{path}[]")
            for i, f in enumerate(found)
        )
        for j in set(range(len(expected))) - {int(j) for j in pairs.values()}:
            count_fields(None, expected[j], counts, f"{path}[]")
        return total
    counts[path, "found"] += found is not None
    counts[path, "expected"] += expected is not None
    right = found is not None and expected is not None and same(path, found, expected)
    counts[path, "right"] += right
    return int(right)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of each number, string, boolean or null."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, f"{path}[]")
    else:
        yield path, value


def choices_of(schema: Any, path: str = "") -> Iterator[str]:
    """Paths of fields whose values the schema itself lists: these are chosen, not read, so they are no inventions."""
    if not isinstance(schema, dict):
        return
    if "enum" in schema or "const" in schema:
        yield path
    for name, part in schema.get("properties", {}).items():
        yield from choices_of(part, f"{path}.{name}".lstrip("."))
    if isinstance(schema.get("items"), dict):
        yield from choices_of(schema["items"], f"{path}[]")


# -------------------------------------------------------------------------------------------------------- measuring


def f1_of(counts: Counter | dict, path: str) -> dict[str, float]:
    right, found, expected = (counts[path, kind] for kind in ("right", "found", "expected"))
    return {
        "precision": right / found if found else 0.0,
        "recall": right / expected if expected else 0.0,
        "f1": 2 * right / (found + expected) if found + expected else 0.0,
        "expected": expected,
    }


def f1_of_all(counts: Counter) -> float:
    """F1 of all fields together."""
    overall: Counter = Counter()
    for (_, kind), number in counts.items():
        overall["", kind] += number
    return f1_of(overall, "")["f1"]


def measure(
    rows: Sequence[dict], answers: Sequence[dict], schema: Any, resamples: int, seed: int = 0
) -> dict[str, Any]:
    """Metrics of the answers ({"json"} or {"error"}) to the rows ({"document", "expected"}).

    `f1` counts all fields together, `macro_f1` is the mean over fields that have a value anywhere; intervals are 95 %
    percentile bootstrap over documents. `exact`: an answer with all values and no others. `invention_rate`: of the
    values that the schema does not list, those that do not stand in the document; a quantity of 1 that is meant and
    not written is one too, so right answers may have a few."""
    each = []
    invented, read = 0, 0
    listed = set(choices_of(schema))
    for row, answer in zip(rows, answers, strict=True):
        counts: Counter = Counter()
        count_fields(answer.get("json"), row["expected"], counts)
        each.append(counts)
        for path, value in leaves(answer.get("json")):
            if value is not None and not isinstance(value, bool) and path not in listed:
                read += 1
                invented += not stands_in(path, value, row["document"])
    paths = sorted({path for counts in each for (path, _), number in counts.items() if number})
    table = np.array([[[c[path, k] for k in ("right", "found", "expected")] for path in paths] for c in each], float)
    table = table.reshape(len(each), len(paths), 3)
    weights = np.random.default_rng(seed).multinomial(len(each), np.full(len(each), 1 / len(each)), size=resamples)
    drawn = np.tensordot(weights, table, axes=1)
    fields_f1 = 2 * drawn[..., 0] / np.maximum(drawn[..., 1] + drawn[..., 2], 1)
    all_f1 = 2 * drawn[..., 0].sum(1) / np.maximum(drawn[..., 1].sum(1) + drawn[..., 2].sum(1), 1)
    total = sum(each, Counter())
    fields = {path: f1_of(total, path) for path in paths}
    for i, path in enumerate(paths):
        fields[path]["interval_95"] = np.percentile(fields_f1[:, i], [2.5, 97.5]).tolist()
    exact = [
        "json" in answer and all(c[p, "right"] == c[p, "found"] == c[p, "expected"] for p, _ in c)
        for c, answer in zip(each, answers, strict=True)
    ]
    return {
        "documents": len(rows),
        "valid": sum("json" in answer for answer in answers) / len(rows),
        "truncated": sum(bool(answer.get("truncated")) for answer in answers) / len(rows),
        "exact": float(np.mean(exact)),
        "f1": f1_of_all(total),
        "f1_interval_95": np.percentile(all_f1, [2.5, 97.5]).tolist(),
        "macro_f1": float(np.mean([field["f1"] for field in fields.values()])) if fields else 0.0,
        "invention_rate": invented / read if read else 0.0,
        "fields": fields,
    }


def read_documents(path: str, limit: int | None) -> list[dict]:
    """Rows with "document" and, as a value, "expected"; in the file these may be "input", a whole user turn, and
    "output", and the answer JSON text. Raises InputError."""
    rows = read_jsonl(path, ("document|input",))[:limit]
    for number, row in enumerate(rows, 1):
        row["document"] = row["document"] if "document" in row else document_of(row["input"])
        row["expected"] = expected_of(row, f"{path}: row {number}")
    return rows


def evaluate_model(model_dir: str, rows: list[dict], args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """(metrics, answers) of one model."""
    from tqdm import tqdm

    extractor = Extractor.load(model_dir, args)
    answers: list[dict] = []
    start, size = time.perf_counter(), 4 * args.batch_size
    for first in tqdm(range(0, len(rows), size), desc=model_dir, unit="batch", file=sys.stderr):
        answers += extractor.extract([row["document"] for row in rows[first : first + size]])
    seconds = (time.perf_counter() - start) / len(rows)
    schema = extractor.grammar.validator.schema
    result = {"model": model_dir, "seconds_per_document": round(seconds, 3)}
    result |= measure(rows, answers, schema, args.bootstrap)
    if args.by:
        groups = defaultdict(list)
        for row, answer in zip(rows, answers, strict=True):
            groups[str(row.get(args.by))].append((row, answer))
        result["by"] = {
            name: measure(*zip(*pairs, strict=True), schema, args.bootstrap) for name, pairs in sorted(groups.items())
        }
    return result, answers


def print_tables(results: list[dict], by: str | None, out: Any) -> None:
    """F1 of each field and the totals, models side by side."""
    names = [result["model"] for result in results]
    wide = [max(len(name), 21) for name in names]
    paths = list(dict.fromkeys(path for result in results for path in result["fields"]))
    first = max(len(path) for path in [*paths, "seconds a document"])

    def line(title: str, cells: list[str]) -> None:
        print(
            f"{title:<{first}}  " + "  ".join(f"{c:<{w}}" for c, w in zip(cells, wide, strict=True)).rstrip(), file=out
        )

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
    check_extraction_flags(args)
    if args.bootstrap < 1 or (args.limit is not None and args.limit < 1):
        raise InputError("--bootstrap and --limit are at least 1")
    if args.report_dir:
        check_folder(args.report_dir)
    rows = read_documents(args.data, args.limit)
    if args.by and not any(args.by in row for row in rows):
        raise InputError(f"--by {args.by}: no line of {args.data} has it")
    measured = [evaluate_model(model_dir, rows, args) for model_dir in args.model_dir]
    results = [result for result, _ in measured]
    summary = {
        "data": {"file": args.data, "sha256": file_sha256(args.data), "documents": len(rows)},
        "schema": {"file": args.schema, "sha256": file_sha256(args.schema)},
        "models": results,
    }
    print_tables(results, args.by, sys.stderr if args.json else sys.stdout)
    if args.report_dir:
        for number, (result, answers) in enumerate(measured):
            folder = Path(args.report_dir) / f"{number}_{Path(result['model']).resolve().name}"
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "predictions.jsonl", (r | a for r, a in zip(rows, answers, strict=True)))
        write_json(Path(args.report_dir) / "metrics.json", summary)
        print(f"report written to {args.report_dir}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    run_script(main)
