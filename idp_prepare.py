"""Prepare documents with answers for training and evaluation: SFT rows and a validation file, split by a group.

Answers are brought into the schema's form first: keys in its order, numbers as numbers ("RM 1,007.50" -> 1007.5), an
empty text as null where the schema allows null and no text. Documents of one group (a vendor, a company) stay on one
side. `--broken_copies` adds training documents whose values run over two lines, as on narrow paper: where few groups
have such values, a small model learns to read one line only.

    python idp_prepare.py --src receipts.jsonl --schema data/receipt_schema.json --group company --outdir data/receipts
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from decimal import Decimal
from itertools import chain
from typing import Any

from distil.cli import InputError, new_parser, run_script
from distil.files import read_json, read_jsonl
from distil.idp.documents import DocumentTask, add_prompt_flags, compact_json, expected_of, instruction_of
from distil.idp.forms import cut_to, variant_of
from distil.idp.schema import (
    SchemaGrammar,
    as_list,
    byte_tokenizer,
    closed,
    compile_schema,
    noted_validator,
    resolver_of,
    same_place,
)
from distil.idp.validation import checked_validator, pointer_of
from distil.idp.values import leaves
from distil.splits import part_of, write_parts

CURRENCY = (
    r"(?:[A-Z]{0,2}[$€£¥₹₩₺₽₫฿₱₪]|RM|kr\.?|zł|Kč|Ft|Fr\.?|SFr\.?|Rs\.?|Rp\.?|AED|ARS|AUD|BGN|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|"
    r"EUR|GBP|HKD|HUF|IDR|ILS|INR|ISK|JPY|KRW|MXN|MYR|NOK|NZD|PHP|PLN|RON|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR)"
)
AMOUNT = re.compile(
    rf"(?P<bracket>\()? *(?P<before>-)? *(?:{CURRENCY})? *(?P<inside>-)? *"
    r"(?P<digits>[0-9]{1,3}(?:[ '][0-9]{3})+(?:[.,][0-9]+)?|[0-9.,]*[0-9])"
    rf" *(?P<after>-)? *(?:{CURRENCY})? *(?P<closing>\))?",
    re.IGNORECASE,
)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    fields = '{"document", "expected"} and, where it is not --schema, "schema"'
    add("--src", required=True, help=f"JSONL of {fields}; expected: an object, or JSON text of one")
    add("--schema", help="JSON Schema of the answers of lines without their own")
    add_prompt_flags(add, "auto: with several schemas or --schema_variants")
    variants = "more rows of a training document, with the schema's keys in another order, every second with fewer"
    add("--schema_variants", metavar="N", type=int, default=0, help=f"{variants} (%(default)s)")
    add("--group", help="field of the line or of its answer whose documents stay together (default: the document)")
    add("--val_share", type=float, default=0.3, help="share of groups for validation (%(default)s)")
    dev = "share of groups for idp_val.jsonl, to measure trainings by, not trained on (default: none)"
    add("--dev_share", type=float, default=0.0, help=dev)
    add("--split_seed", type=int, default=0, help="which groups those are (%(default)s)")
    add("--broken_copies", type=int, default=0, help="of a training document, values broken (%(default)s)")
    add("--outdir", required=True, help="folder of idp_{sft,val,validation}.jsonl; they are replaced")
    return parser


def number_in(text: str) -> Decimal | None:
    """Return the number that a text is, with or without a currency; None where it is not a number or could be several.
    A comma is read as the mark of thousands (1,007.50) or, where it cannot be that, of decimals (1,50; 1.007,50;
    0,125). Brackets, or a minus on either side, make the number negative."""
    amount = AMOUNT.fullmatch(text.replace("\xa0", " ").replace("\u2212", "-").strip())
    minus = [amount[name] for name in ("bracket", "before", "inside", "after") if amount[name]] if amount else []
    if not amount or len(minus) > 1 or bool(amount["bracket"]) != bool(amount["closing"]):
        return None
    digits = re.sub("[ ']", "", amount["digits"])
    if re.fullmatch(r"(\d*\.)?\d+|[1-9]\d{0,2}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    elif re.fullmatch(r"0,\d+|\d+,(\d{1,2}|\d{4,})|[1-9]\d{0,2}(\.\d{3})+,\d+|[1-9]\d{0,2}(\.\d{3}){2,}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    else:
        return None
    return -Decimal(digits) if minus else Decimal(digits)


def in_schema_form(value: Any, schema: Any, validator: Any = None) -> Any:
    """Return the answer with the schema's key order and number types; what cannot be converted stays as it is.
    Of anyOf and oneOf that schema counts which allows the answer as it is, else in its form, else all of them do.
    validator: of the complete schema, where `schema` is a part of it."""
    validator = validator or checked_validator(schema, "schema")

    def choose(options: list) -> list:
        for form in (lambda _: value, lambda one: in_schema_form(value, one, validator)):
            for one in options:
                if validator.evolve(schema=one).is_valid(form(one)):
                    return [one]
        return options

    parts = [*same_place(schema, resolver_of(validator.schema), choose)]
    if isinstance(value, dict):
        names = dict.fromkeys(n for key in ("properties", "required") for part in parts for n in part.get(key, ()))
        names = [name for name in {**names, **value} if name in value]
        return {n: _formed(value[n], [one for p in parts for one in _of_name(p, n)], validator) for n in names}
    if isinstance(value, list):
        return [_formed(v, [one for p in parts for one in _of_item(p, i)], validator) for i, v in enumerate(value)]
    types = {name for part in parts for name in as_list(part.get("type", ()))}
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return int(value)
    if not isinstance(value, str) or "string" in types:
        return value
    if not value.strip() and "null" in types:
        return None
    number = number_in(value) if {"number", "integer"} & types else None
    if number is None:
        return value
    return int(number) if number == int(number) else float(number)


def _formed(value: Any, schemas: list, validator: Any) -> Any:
    return functools.reduce(lambda value, one: in_schema_form(value, one, validator), schemas, value)


def _of_name(part: dict, name: str) -> list:
    """Return the schemas that a part of a schema has for the value of a key."""
    found = [part["properties"][name]] if name in part.get("properties", ()) else []
    found += [one for pattern, one in part.get("patternProperties", {}).items() if re.search(pattern, name)]
    return found or [part.get("additionalProperties", True)]


def _of_item(part: dict, number: int) -> list:
    """Return the schemas that a part of a schema has for an item of a list."""
    first, rest = part.get("prefixItems", []), part.get("items", True)
    if isinstance(rest, list):  # of older drafts
        first, rest = rest, part.get("additionalItems", True)
    return [first[number] if number < len(first) else rest]


def broken_copy(document: str, answer: Any, choose: random.Random) -> str:
    """Return the document with values of several words on one line broken over two, each with a chance of 1/2."""
    for text in (value for _, value in leaves(answer) if isinstance(value, str)):
        words = [re.escape(word) for word in re.findall(r"\w+", text)]
        match = re.search(r"([^\w\n]+)".join(words), document, re.IGNORECASE) if len(words) > 1 else None
        if match and choose.random() < 0.5:
            gap = choose.randrange(1, len(words))
            between = re.sub(r"\s+", "\n", match[gap], count=1)
            document = document[: match.start(gap)] + between + document[match.end(gap) :]
    return document


def validators_of(schema: Any, name: str) -> tuple[Any, Any, SchemaGrammar]:
    """Return validators of a schema and of it with its objects closed, and the grammar of what decoding can write."""
    validator = noted_validator(schema, name)
    writable = type(validator)(closed(validator.schema)[0], format_checker=validator.format_checker)
    return validator, writable, compile_schema(writable.schema, byte_tokenizer(), name, validator)


def checked_rows(src: str, default: str | None) -> Iterator[tuple[dict, Any, Any]]:
    """Yield (line, schema, answer in its form) of each line. default: file of the schema of lines without their own.
    Raises InputError for a line without a schema, and an answer that breaks it."""
    validators = {"": validators_of(read_json(default), default)} if default else {}
    for number, row in enumerate(read_jsonl(src, ("document",)), 1):
        where = f"{src}: row {number}"
        key = json.dumps(row["schema"]) if "schema" in row else ""
        if not (key or default):
            raise InputError(f'{where} has no "schema"; give --schema')
        if key not in validators:
            validators[key] = validators_of(row["schema"], f"{where}: its schema")
        validator, writable, grammar = validators[key]
        answer = in_schema_form(expected_of(row, where), writable.schema, writable)
        if flaw := next(chain(validator.iter_errors(answer), writable.iter_errors(answer)), None):
            raise InputError(f'{where}: "expected" breaks the schema at {pointer_of(flaw)}: {flaw.message[:150]}')
        if not grammar.writes(text := compact_json(answer)):
            limits = "numbers have no exponent and at most 15 digits before the point, texts no sign U+007F"
            raise InputError(f'{where}: "expected" cannot be written by decoding ({limits}): {text[:150]}')
        yield row, validator.schema, answer


def variants_of(schema: Any, answer: Any, count: int, choose: random.Random) -> Iterator[tuple[Any, Any]]:
    """Yield variants of a schema with their part of the answer, without those whose other rules or references that
    would break."""
    for _ in range(count):
        variant = variant_of(schema, choose, fewer=choose.random() < 0.5)
        with suppress(InputError):
            validator = checked_validator(variant, "a variant")
            if validator.is_valid(part := cut_to(variant, answer, Counter())):
                yield variant, part


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.val_share < 1 or args.broken_copies < 0 or not 0 <= args.dev_share < 1 - args.val_share:
        raise InputError("--val_share and --dev_share are shares with a sum below 1, --broken_copies is at least 0")
    if args.schema_variants < 0 or (args.schema_variants and args.show_schema == "off"):
        raise InputError("--schema_variants is at least 0, and only 0 with --show_schema off")
    rows = list(checked_rows(args.src, args.schema))
    mixed = len({json.dumps(schema) for _, schema, _ in rows}) > 1
    several = args.schema_variants > 0 or mixed
    task = DocumentTask(args.instruction, several if args.show_schema == "auto" else args.show_schema == "on")
    names = ("sft", *(["val"] if args.dev_share else []), "validation")
    parts: dict[str, list[dict]] = {name: [] for name in names}
    groups: dict[str, set[str]] = {name: set() for name in names}
    choose = random.Random(args.split_seed)
    for number, (row, schema, answer) in enumerate(rows, 1):
        document, own = row["document"], answer.get(args.group) if isinstance(answer, dict) else None
        name = row.get(args.group, own) if args.group else document
        if name is None:
            raise InputError(f"{args.src}: row {number}: no {args.group!r} in the line or its answer")
        group = " ".join(re.findall(r"\w+", str(name).casefold()))
        copies = {broken_copy(document, answer, choose) for _ in range(args.broken_copies)} - {document}
        part = part_of(group, args.split_seed, args.val_share, args.dev_share)
        groups[part].add(group)
        if part == "validation":
            parts[part].append(row | {"expected": answer} | ({"schema": schema} if mixed else {}))
            continue
        pairs = [(text, schema, answer) for text in (document, *(sorted(copies) if part == "sft" else ()))]
        variants = variants_of(schema, answer, args.schema_variants if part == "sft" else 0, choose)
        for text, form, value in [*pairs, *((document, *variant) for variant in variants)]:
            parts[part].append({"input": task.prompt(form).turn(text), "output": compact_json(value)})
    note = {name: vars(args)[name] for name in ("split_seed", "group", "val_share", "dev_share", "broken_copies")}
    own = args.instruction or (None if several or task.show_schema else instruction_of(rows[0][1]))
    note |= {"schema_variants": args.schema_variants, "documents": asdict(replace(task, instruction=own))}
    write_parts(args.outdir, "idp", parts, args.src, note)
    print("groups: " + ", ".join(f"{len(names)} in {part}" for part, names in groups.items()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
