"""Prepare documents with known answers for training and evaluation: SFT rows and a validation file, split by a group.

Answers are brought into the schema's form first: keys in its order, numbers as numbers ("RM 1,007.50" -> 1007.5), an
empty text as null where the schema allows null. Documents of one group (a vendor, a company) stay on one side.
`--broken_copies` adds training documents whose values run over two lines, as on narrow paper: where few groups have
such values, a small model learns to read one line only.

    python idp_prepare.py --src receipts.jsonl --schema data/receipt_schema.json --group company --outdir data/receipts
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from decoding import checked_validator, pointer_of
from files import InputError, hash_share, read_json, read_jsonl, run_script, write_parts
from idp import compact_json, expected_of, idp_prompt

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", required=True, help='JSONL of {"document", "expected"}; expected: an object, or JSON text of one')
    add("--schema", required=True, help="JSON Schema of the answers")
    add("--group", help="field of the line or of its answer whose documents stay together (default: the document)")
    add("--val_share", type=float, default=0.3, help="share of groups for validation (%(default)s)")
    add("--split_seed", type=int, default=0, help="which groups those are (%(default)s)")
    add(
        "--broken_copies",
        type=int,
        default=0,
        help="further copies of a training document, values broken (%(default)s)",
    )
    add("--outdir", required=True, help="folder of idp_sft.jsonl and idp_validation.jsonl; they are replaced")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def number_in(text: str) -> Decimal | None:
    """The number that a text is, a currency beside it or not; None where it is none, or could be several.

    A comma stands before groups of three digits (1,007.50) or, where these it cannot be, before decimals (1,50;
    1.007,50; 0,125). Brackets, or a minus on either side, make it negative."""
    found = AMOUNT.fullmatch(text.replace("\xa0", " ").replace("\u2212", "-").strip())
    minus = [found[name] for name in ("bracket", "before", "inside", "after") if found[name]] if found else []
    if not found or len(minus) > 1 or bool(found["bracket"]) != bool(found["closing"]):
        return None
    digits = re.sub("[ ']", "", found["digits"])
    if re.fullmatch(r"(\d*\.)?\d+|[1-9]\d{0,2}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    elif re.fullmatch(r"0,\d+|\d+,(\d{1,2}|\d{4,})|[1-9]\d{0,2}(\.\d{3})+,\d+|[1-9]\d{0,2}(\.\d{3}){2,}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    else:
        return None
    return -Decimal(digits) if minus else Decimal(digits)


def in_schema_form(value: Any, schema: Any) -> Any:
    """The answer with the schema's order of keys and types of numbers; what cannot be converted stays as it is."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        names = [*(n for n in properties if n in value), *(n for n in value if n not in properties)]
        return {name: in_schema_form(value[name], properties.get(name)) for name in names}
    if isinstance(value, list):
        return [in_schema_form(item, schema.get("items")) for item in value]
    types = schema.get("type", ())
    types = [types] if isinstance(types, str) else types
    if not isinstance(value, str) or "string" in types:
        return value
    if not value.strip() and "null" in types:
        return None
    number = number_in(value) if {"number", "integer"} & set(types) else None
    if number is None:
        return value
    return int(number) if number == int(number) else float(number)


def texts_of(value: Any) -> Iterator[str]:
    """The strings in an answer."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts_of(item)


def broken_copy(document: str, answer: Any, choose: random.Random) -> str:
    """The document with the values of several words that stand on one line broken there, each with a chance of 1/2."""
    for text in texts_of(answer):
        words = [re.escape(word) for word in re.findall(r"\w+", text)]
        found = re.search(r"([^\w\n]+)".join(words), document, re.IGNORECASE) if len(words) > 1 else None
        if found and choose.random() < 0.5:
            gap = choose.randrange(1, len(words))
            between = re.sub(r"\s+", "\n", found[gap], count=1)
            document = document[: found.start(gap)] + between + document[found.end(gap) :]
    return document


def prepared_row(row: dict, where: str, schema: Any, validator: Any) -> tuple[str, Any]:
    """(document, answer in the schema's form). Raises InputError that names the line and what is wrong with it."""
    answer = in_schema_form(expected_of(row, where), schema)
    problem = next(iter(validator.iter_errors(answer)), None)
    if problem is not None:
        raise InputError(f'{where}: "expected" breaks the schema at {pointer_of(problem)}: {problem.message[:150]}')
    return row["document"], answer


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.val_share < 1 or args.broken_copies < 0:
        raise InputError("--val_share is a share between 0 and 1, --broken_copies at least 0")
    schema = read_json(args.schema)
    validator = checked_validator(schema, args.schema)
    parts: dict[str, list[dict]] = {"sft": [], "validation": []}
    groups: dict[str, set[str]] = {"sft": set(), "validation": set()}
    choose = random.Random(args.split_seed)
    for number, row in enumerate(read_jsonl(args.src, ("document",)), 1):
        document, answer = prepared_row(row, f"{args.src}: row {number}", schema, validator)
        name = row.get(args.group, answer.get(args.group)) if args.group else document
        if name is None:
            raise InputError(f"{args.src}: row {number}: no {args.group!r} in the line or its answer")
        group = " ".join(re.findall(r"\w+", str(name).casefold()))
        copies = {broken_copy(document, answer, choose) for _ in range(args.broken_copies)} - {document}
        part = "validation" if hash_share(group, args.split_seed) < args.val_share else "sft"
        groups[part].add(group)
        if part == "sft":
            for text in (document, *sorted(copies)):
                parts[part].append({"input": idp_prompt(text), "output": compact_json(answer)})
        else:
            parts[part].append({"document": document, "expected": answer})
    note = {name: getattr(args, name) for name in ("split_seed", "val_share", "broken_copies")}
    write_parts(args.outdir, "idp", parts, args.src, note)
    print("groups: " + ", ".join(f"{len(names)} in {part}" for part, names in groups.items()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
