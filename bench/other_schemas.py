"""Measure a student under other key orders and with fewer fields than the schema of each document has.

F1 under each variant is compared with that of the answers to the documents' own schemas, cut to the same fields.

    python -m bench.other_schemas --model_dir runs/kinds_sft --data runs/kinds/validation.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections import Counter

import eval_idp
from bench.report import report
from common import InputError
from distil import cli
from distil.idp import extractor
from distil.idp.forms import cut_to, variant_of
from distil.idp.values import measure
from distil.models import resolve


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="base model or adapter")
    add("--data", required=True, help="documents with answers, as eval_idp.py reads them")
    add("--limit", type=int, help="only the first LIMIT documents")
    add("--orders", type=int, default=3, help="variants with all fields in another order (%(default)s)")
    add("--subsets", type=int, default=2, help="variants with about two thirds of the fields (%(default)s)")
    add("--bootstrap", type=int, default=2000, help="(%(default)s)")
    add("--json", action="store_true", help="print one JSON object on standard output")
    extractor.add_extraction_flags(parser)
    return parser


def varied(rows: list[dict], name: str) -> list[dict]:
    """Return the rows with a variant of each schema, one for all rows of a schema. name: "order 1", "subset 2"."""
    rows, variants = copy.deepcopy(rows), {}
    for row in rows:
        if (text := json.dumps(row["schema"])) not in variants:
            draw = random.Random(f"{name} {text}")
            variants[text] = variant_of(row["schema"], draw, fewer=name.startswith("subset"))
        row["schema"] = variants[text]
    return rows


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.orders + args.subsets < 1:
        raise InputError("--orders or --subsets is at least 1")
    ref, options = resolve(args.model_dir), extractor.extract_options(vars(args))
    rows = eval_idp.read_documents(args.data, args.limit)

    def compiled(rows: list[dict], own: bool = True) -> list[eval_idp.Part]:
        return eval_idp.compiled(ref, eval_idp.by_schema(rows, [ref], options, own))  # cuts the expected answers

    parts = compiled(rows, own=not args.schema)
    model = extractor.Extractor.load(ref, *parts[0][:2])
    metrics, own = eval_idp.evaluate_model(model, ref.name, rows, parts, None, args.bootstrap)
    figures = {"own schemas": cli.with_interval(metrics["f1"], metrics["f1_interval_95"], ".3f")}
    names = [f"order {i + 1}" for i in range(args.orders)] + [f"subset {i + 1}" for i in range(args.subsets)]
    for name in names:
        parts = compiled(others := varied(rows, name))
        result, _ = eval_idp.evaluate_model(model, ref.name, others, parts, None, args.bootstrap)
        cut = [{"json": cut_to(row["schema"], a.get("json"), Counter())} for row, a in zip(others, own, strict=True)]
        before = measure(others, cut, options.schema, args.bootstrap)["f1"]
        interval = cli.with_interval(result["f1"], result["f1_interval_95"], ".3f")
        figures[name] = f"{interval}, own schemas {before:.3f}, difference {result['f1'] - before:+.3f}"
    report({"model": args.model_dir, "documents": len(rows)} | figures, args.json)
    return 0


if __name__ == "__main__":
    cli.run_script(main)
