"""Generate the synthetic invoices and receipts that the project embeds, and the schema of their JSON.

A document is an invoice drawn from idp_catalogue.py (vendor, goods, prices, tax), written in a layout that is drawn
from the grammar in idp_layouts.py, with the labels, the date style and the number format of the vendor's country;
about half then get OCR damage. The JSON is made from the drawn invoice, never read back from the text.

What makes it learnable: no value is damaged, only labels, spaces, line ends and margins; every value can be read
from the document by one set of rules (data/README.md, "Invoices"). What makes it worth measuring: vendors of
validation do not occur in training and sell some goods that no training vendor sells, and complete families of
layouts occur in validation alone. Both go into idp_validation.jsonl; the field "layouts" distinguishes them.

Vendors are split by distil.splits.split_of(name); those of calibration are in idp_val.jsonl, which measures trainings.
The same seed gives the same bytes on every machine: only random.Random.random() is used, whose sequence Python keeps.

    python -m data.make_idp --seed 0 --outdir data
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from pathlib import Path

from common import InputError
from data import idp_catalogue as words
from data.idp_invoice import Draw, Invoice, draw_invoice
from data.idp_layouts import GRAMMAR, RECEIPTS, UNSEEN, Page, Rule
from distil.cli import new_parser, run_script
from distil.files import write_json, write_jsonl
from distil.idp.documents import compact_json, idp_prompt
from distil.splits import split_of

NOISY = 0.5  # share of documents with OCR damage
CURRENCIES = list(words.MARKS)
ALIKE = (("USD", "CAD", "AUD"), ("SEK", "DKK", "NOK"), ("EUR", "GBP", "CHF", "PLN", "USD"))  # mistaken for each other
MONEY = {"type": "number", "minimum": 0}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Invoice",
    "type": "object",
    "properties": {
        "number": {"type": "string", "minLength": 1, "maxLength": 40},
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "vendor": {"type": "string", "minLength": 1, "maxLength": 80},
        "currency": {"type": "string", "enum": CURRENCIES},
        "total": MONEY,
        "line_items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 12,
            "items": {
                "type": "object",
                "properties": {
                    "description": {"type": "string", "minLength": 1, "maxLength": 100},
                    "qty": MONEY,
                    "unit_price": MONEY,
                    "amount": MONEY,
                },
                "required": ["description", "qty", "unit_price", "amount"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["number", "date", "vendor", "currency", "total", "line_items"],
    "additionalProperties": False,
}


def json_number(hundredths: int) -> int | float:
    """Return hundredths as a number with as few decimals as it needs: 2800 -> 28, 2850 -> 28.5."""
    return hundredths // 100 if hundredths % 100 == 0 else hundredths / 100


def expected_fields(invoice: Invoice) -> dict:
    """Return the JSON of an invoice, keys in the schema's order."""
    return {
        "number": invoice.number,
        "date": invoice.date.isoformat(),
        "vendor": invoice.vendor.name,
        "currency": words.COUNTRIES[invoice.vendor.country].currency,
        "total": json_number(invoice.total),
        "line_items": [
            {
                "description": line.text,
                "qty": json_number(line.qty),
                "unit_price": json_number(line.price),
                "amount": json_number(line.amount),
            }
            for line in invoice.lines
        ],
    }


def swapped_digits(text: str, draw: Draw) -> str | None:
    """Return the text with two different neighbouring digits swapped, without a new leading zero."""
    spots = [
        i
        for i in range(len(text) - 1)
        if text[i : i + 2].isdigit() and text[i] != text[i + 1] and (i or text[i + 1] != "0")
    ]
    if not spots:
        return None
    i = draw.pick(spots)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def wrong_answer(fields: dict, shown: dict, draw: Draw) -> dict:
    """Return a schema-valid answer with one or two mistakes that a model could make on this document."""
    wrong = dict(fields) | {"line_items": [dict(item) for item in fields["line_items"]]}
    items = wrong["line_items"]
    item = draw.pick(items)
    day = datetime.date.fromisoformat(fields["date"])

    def put(name: str, value: object) -> list[Callable[[], None]]:
        return [lambda: wrong.update({name: value})] if value not in (None, fields[name]) else []

    def put_item(when: bool, change: Callable[[dict], object]) -> list[Callable[[], None]]:
        return [lambda: change(item)] if when else []

    total, swapped = fields["total"], swapped_digits(str(fields["total"]), draw)
    family = next(codes for codes in ALIKE if fields["currency"] in codes)
    by_field = [
        put("date", day.replace(month=day.day, day=day.month).isoformat() if day.day <= 12 else None)
        + put("date", shown.get("due")),
        put("total", json_number(shown["net"]) if "net" in shown else None)
        + put("total", json_number(shown["cash"]) if "cash" in shown else None)
        + put("total", json_number(round(100 * float(swapped))) if swapped else None)
        + put("total", round(100 * total) if total % 1 else None),  # without the decimal mark
        put("vendor", shown.get("customer")),
        put("number", shown.get("order")) + put("number", swapped_digits(fields["number"], draw)),
        put("currency", draw.pick([code for code in family if code != fields["currency"]])),
        put_item(len(items) > 1, items.remove),
        put_item(item["unit_price"] != item["amount"], lambda it: it.update(unit_price=it["amount"]))
        + put_item(item["unit_price"] != item["qty"], lambda it: it.update(qty=it["unit_price"], unit_price=it["qty"]))
        + put_item(item["qty"] != 1, lambda it: it.update(qty=1)),
        put_item(" " in item["description"], lambda it: it.update(description=it["description"].split(" ")[0])),
    ]
    groups = draw.shuffled([group for group in by_field if group])
    for group in groups[: 2 if draw.chance(0.25) else 1]:
        draw.pick(group)()
    return wrong


# -------------------------------------------------------------------------------------------------------------- files


def documents(draw: Draw, vendors: list[words.Vendor], rules: tuple[Rule, ...], count: int) -> list[dict]:
    """Return `count` documents in random order, with vendors, and layouts by share, as evenly spread as possible."""
    order: list[words.Vendor] = []
    while len(order) < count:
        order += draw.shuffled(vendors)
    shares = [rule for rule in rules for _ in range(rule.share)]
    rows, seen = [], set()
    for i, rule in enumerate(draw.shuffled([shares[i % len(shares)] for i in range(count)])):
        while True:
            invoice, layout = draw_invoice(draw, order[i], rule.page in RECEIPTS), rule.layout(draw)
            page = Page(invoice, layout, draw, draw.chance(NOISY))
            text = page.write()
            if text not in seen:
                break
        seen.add(text)
        fields = expected_fields(invoice)
        rejected = compact_json(wrong_answer(fields, page.shown, draw))
        rows.append(
            {"document": text, "answer": compact_json(fields), "rejected": rejected, "vendor": invoice.vendor.name,
             "family": layout.family, "layout": layout.name}
        )  # fmt: skip
    return rows


def generate(seed: int, count: int) -> dict[str, list[dict]]:
    """Return rows by file name. KD and DPO have 3/8 of the training documents, the first and the last ones."""
    splits = ("train", "calibration", "validation")
    parts = {split: [v for v in words.vendors() if split_of(v.name) == split] for split in splits}
    train = documents(Draw(f"train {seed}"), parts["train"], GRAMMAR, count)
    val = documents(Draw(f"val {seed}"), parts["calibration"], GRAMMAR, max(1, count // 16))
    known = documents(Draw(f"known {seed}"), parts["validation"], GRAMMAR, max(1, count * 3 // 16))
    unseen = documents(Draw(f"unseen {seed}"), parts["validation"], UNSEEN, max(1, count // 16))
    part = max(1, count * 3 // 8)

    def row(source: dict, **fields: str) -> dict:
        return fields | {"vendor": source["vendor"], "layout": source["layout"]}

    return {
        "idp_sft.jsonl": [row(r, input=idp_prompt(r["document"]), output=r["answer"]) for r in train],
        "idp_kd.jsonl": [row(r, input=idp_prompt(r["document"]), teacher_output=r["answer"]) for r in train[:part]],
        "idp_dpo.jsonl": [
            row(r, prompt=idp_prompt(r["document"]), chosen=r["answer"], rejected=r["rejected"]) for r in train[-part:]
        ],
        "idp_val.jsonl": [row(r, input=idp_prompt(r["document"]), output=r["answer"]) for r in val],
        "idp_validation.jsonl": [
            row(r, document=r["document"], expected=r["answer"]) | {"layouts": layouts, "family": r["family"]}
            for layouts, rows in (("known", known), ("unseen", unseen))
            for r in rows
        ],
    }


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(
        "--outdir", type=Path, default=Path("data"), help="folder of the files; they are replaced (default: data)"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=1600,
        help="training documents; a quarter of that number is written for validation (default: 1600)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.documents < 1:
        raise InputError(f"--documents {args.documents}: at least 1")
    if not args.outdir.is_dir():
        raise InputError(f"--outdir {args.outdir}: no such folder; create it or give another")
    files = generate(args.seed, args.documents)
    write_json(args.outdir / "idp_schema.json", SCHEMA)
    for name, rows in files.items():
        write_jsonl(args.outdir / name, rows)
        print(f"wrote {len(rows)} rows to {args.outdir / name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
