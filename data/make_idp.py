"""Generate the synthetic invoices and receipts that the project embeds, and the schema of their JSON.

A document is an invoice drawn from idp_catalogue.py (vendor, goods, prices, tax) and written in one of 16 layouts
with the labels, the date style and the number format of the vendor's country; about half then get OCR damage. The
JSON is made from the drawn invoice, never read back from the text.

What makes it learnable: no value is damaged, only labels, spaces, line ends and margins; every value can be read
from the document by one set of rules (data/README.md, "Invoices"). What makes it worth measuring: vendors of
validation do not occur in training and sell some goods that no training vendor sells, and the layouts in HELD_OUT
occur in validation alone. Both go into idp_validation.jsonl; the field "layouts" distinguishes them.

Vendors are split by distil.splits.split_of(name); those of calibration are in idp_val.jsonl, which measures trainings.
The same seed gives the same bytes on every machine: only random.Random.random() is used, whose sequence Python keeps.

    python -m data.make_idp --seed 0 --outdir data
"""

from __future__ import annotations

import argparse
import datetime
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

from common import InputError
from data import idp_catalogue as words
from distil.cli import new_parser, run_script
from distil.files import write_json, write_jsonl
from distil.idp.documents import compact_json, idp_prompt
from distil.splits import split_of

HELD_OUT = ("stacked_header", "slash_slip")  # layouts of validation alone
RECEIPTS = ("thermal_receipt", "web_receipt", "slash_slip")  # titled and numbered as receipts
FIRST_DAY, DAYS = datetime.date(2021, 1, 1), 7 * 365
NOISY = 0.5  # share of documents with OCR damage
LABEL_DAMAGE = 0.15  # share of labels with a wrong or missing character, in noisy documents
LOST_COLON = 0.12  # share of labels without their colon, in noisy documents
TABLE_DECIMALS = 0.12  # share of documents that print quantities as 2.00
STUCK = "\x00"  # a space inside a value: line damage leaves it alone

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


class Draw:
    """Draws with one seeded generator."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def chance(self, p: float) -> bool:
        """Draw True with probability p."""
        return self._random() < p

    def whole(self, low: int, high: int) -> int:
        """Draw a whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items):
        """Draw one of the items."""
        return items[int(self._random() * len(items))]

    def shuffled(self, items) -> list:
        """Return the items in random order."""
        # Not random.shuffle: its use of the sequence is not promised to stay the same between Python versions.
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.whole(0, i)
            items[i], items[j] = items[j], items[i]
        return items


# ------------------------------------------------------------------------------------------------------ the invoice


@dataclass
class Line:
    """One item; qty in hundredths, money in cents, so that all arithmetic is exact."""

    text: str
    qty: int
    price: int
    amount: int


@dataclass
class Invoice:
    """What a document states; money in cents."""

    vendor: words.Vendor
    number: str
    date: datetime.date
    due: datetime.date
    order: str
    customer: str
    lines: list[Line]
    tax_rate: str  # as printed without the sign, "" for no tax
    tax_included: bool
    tax: int
    total: int  # what is to be paid

    @property
    def net(self) -> int:
        """Return the total without tax."""
        return self.total - self.tax


def number_text(draw: Draw, vendor: words.Vendor, date: datetime.date) -> str:
    """Return an invoice number in the vendor's style."""
    letters = re.sub(r"[^A-Z]", "", vendor.name.upper())
    prefix, count = letters[:2], draw.whole(1, 9999)
    styles = (
        f"{draw.whole(10000, 99999)}", f"INV-{count:04d}", f"{date.year}-{count:04d}", f"{prefix}-{count + 1000}",
        f"R{date.year % 100}{count:05d}", f"{date.year}/{count % 1000}", f"{prefix}{count:05d}",
        f"{count:04d}-{letters[-1]}", f"F-{date.year}-{count % 1000:03d}",
    )  # fmt: skip
    return styles[sum(vendor.name.encode()) % len(styles)]


def draw_line(draw: Draw, good: tuple, country: words.Country) -> Line:
    """Return a priced line of a good of the catalogue."""
    text, low, high, kind = good
    sizes = {
        "cm": 10 * draw.whole(4, 24), "mm": draw.pick((6, 9, 12, 15, 18, 22, 25)), "kg": draw.whole(1, 5),
        "n": draw.pick((6, 8, 10, 12, 16, 20, 24, 50)),
    }  # fmt: skip
    text = re.sub("<(.*?)>", lambda match: draw.pick(match[1].split("|")), text).format(
        c=draw.pick(words.COLOURS[country.language]), m=draw.pick(words.MONTHS[country.language]), **sizes
    )
    if kind in "hk":  # quarters: a price that four divides keeps the amount exact
        qty = draw.pick((50, 75, 100, 150, 200, 225, 250, 300, 350, 450, 600, 800))
    elif kind == "b":
        qty = 100 * draw.pick((2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 25, 30, 40, 50, 100))
    else:
        qty = 100 * (draw.whole(1, 9) if kind == "n" else 1 + (draw.chance(0.1)))
    factor = words.PRICE_FACTOR.get(country.currency, 1)
    whole = draw.whole(low * factor, high * factor)
    if kind in "hk":
        price = 100 * whole + draw.pick((0, 0, 20, 40, 60, 80))
    elif country.currency == "CHF":
        price = 100 * whole + 5 * draw.whole(0, 19)
    else:
        price = 100 * whole + draw.pick((0, 0, 0, 50, 90, 95, 99, 25, draw.whole(1, 99)))
    return Line(text, qty, price, qty * price // 100)


def half_up(value: Fraction) -> int:
    return int(value + Fraction(1, 2))


def draw_invoice(draw: Draw, vendor: words.Vendor, receipt: bool) -> Invoice:
    country = words.COUNTRIES[vendor.country]
    goods = words.TRADES[country.language][vendor.trade][1]
    if split_of(vendor.name) == "train":
        goods = goods[:-1]
    count = draw.pick((1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4))
    lines = [draw_line(draw, good, country) for good in draw.shuffled(goods)[:count]]
    date = FIRST_DAY + datetime.timedelta(days=draw.whole(0, DAYS - 1))
    total = sum(line.amount for line in lines)
    rate, included, tax = draw.pick(country.tax[1]), False, 0
    luck = draw.whole(0, 99)
    if vendor.country == "US":
        luck = 99 - luck if luck >= 45 else luck  # sales tax is never included: added or none
    if luck < (30 if receipt else 55):
        tax = half_up(Fraction(rate.replace(",", ".")) * total / 100)
        total += tax
    elif luck < (85 if receipt else 75) and vendor.country != "US":
        included, percent = True, Fraction(rate.replace(",", "."))
        tax = half_up(total * percent / (100 + percent))
    else:
        rate = ""
    return Invoice(
        vendor,
        number_text(draw, vendor, date),
        date,
        date + datetime.timedelta(days=draw.pick((7, 10, 14, 21, 30, 30, 45))),
        f"{draw.pick(('PO-', 'A', '', '45'))}{draw.whole(1000, 99999)}",
        draw.pick(words.CUSTOMERS[country.language].split("|")),
        lines,
        rate,
        included,
        tax,
        total,
    )


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


# --------------------------------------------------------------------------------------- values as a country writes


def date_text(date: datetime.date, style: str, language: str) -> str:
    """Return a date in a style such as dd.mm.Y or d Month Y; two-digit years are of this century."""
    month = words.MONTHS[language][date.month - 1]
    parts = {
        "Month": month, "Mon": month[:3], "dd": f"{date.day:02d}", "mm": f"{date.month:02d}", "d": str(date.day),
        "m": str(date.month), "Y": str(date.year), "y": f"{date.year % 100:02d}",
    }  # fmt: skip
    return re.sub(r"Month|Mon|dd|mm|d|m|Y|y", lambda match: parts[match[0]], style)


def decimal_text(hundredths: int, sample: str, decimals: bool = True) -> str:
    """Return a number with the thousands separator and the decimal mark of the sample, such as '1.234,50'."""
    thousands, point = sample[1], sample[5]
    whole = f"{hundredths // 100:,}".replace(",", thousands)
    return f"{whole}{point}{hundredths % 100:02d}" if decimals else whole


# ------------------------------------------------------------------------------------------------------- a document


class Page:
    """An invoice being written: lines so far, and the ways this document writes labels and values.

    Values go through `keep`, which guards their spaces; labels through `label`, which damages some where the document
    is a noisy one. `shown` notes the misleading values that were printed: a wrong answer can have only those.
    """

    def __init__(self, invoice: Invoice, draw: Draw, noisy: bool, receipt: bool = False) -> None:
        self.invoice, self.draw, self.noisy, self.receipt = invoice, draw, noisy, receipt
        self.country = words.COUNTRIES[invoice.vendor.country]
        self.language = self.country.language
        styles = self.country.dates
        self.date_style = draw.pick((styles[0], *styles))
        self.mark = draw.pick(words.MARKS[self.country.currency])
        letters = self.mark.isalpha() or self.mark == "Fr."
        self.mark_last = self.language in ("de", "fr", "sv") or self.country.currency == "PLN"
        if self.country.currency == "CHF" or (letters and self.mark not in ("kr", "zł") and draw.chance(0.5)):
            self.mark_last = False
        self.gap = " " if letters or self.mark_last else ""
        self.full_qty = draw.chance(TABLE_DECIMALS)
        self.colon = " :" if self.language == "fr" and draw.chance(0.6) else ":"
        streets, places, choice = self.country.streets, self.country.places, sum(invoice.vendor.name.encode())
        self.places = (streets[choice % len(streets)], places[choice // 7 % len(places)])
        self.chosen: dict[str, str] = {}  # the words of its labels
        self.lines: list[str] = []
        self.shown: dict[str, str | int] = {}

    def add(self, *lines: str) -> None:
        self.lines += lines

    # values

    def keep(self, text: str) -> str:
        return text.replace(" ", STUCK)

    @property
    def vendor(self) -> str:
        return self.keep(self.invoice.vendor.name)

    @property
    def number(self) -> str:
        return self.keep(self.invoice.number)

    @property
    def date(self) -> str:
        return self.day(self.invoice.date)

    @property
    def customer(self) -> str:
        self.shown["customer"] = self.invoice.customer
        return self.keep(self.invoice.customer)

    @property
    def order(self) -> str:
        self.shown["order"] = self.invoice.order
        return self.invoice.order

    @property
    def due(self) -> str:
        self.shown["due"] = self.invoice.due.isoformat()
        return self.day(self.invoice.due)

    def day(self, date: datetime.date) -> str:
        return self.keep(date_text(date, self.date_style, self.language))

    def money(self, cents: int) -> str:
        return self.keep(decimal_text(cents, self.country.number))

    def priced(self, cents: int, text: str | None = None) -> str:
        """Return money with the currency: in every document at least the total has it."""
        text = text or self.money(cents)
        gap = self.keep(self.gap)
        return f"{text}{gap}{self.mark}" if self.mark_last else f"{self.mark}{gap}{text}"

    def qty(self, line: Line, table: bool = False) -> str:
        if line.qty % 100 == 0 and not (table and self.full_qty):
            return str(line.qty // 100)
        text = decimal_text(line.qty, self.country.number)
        return text if table and self.full_qty else text.rstrip("0")

    def text(self, line: Line) -> str:
        return self.keep(line.text)

    # labels

    def damaged(self, text: str) -> str:
        """Return a label as OCR reads it: here and there a letter is missing or wrong."""
        spots = [i for i, letter in enumerate(text) if letter.isalpha() and i]
        if not self.noisy or len(spots) < 4 or not self.draw.chance(LABEL_DAMAGE):
            return text
        alike = {"o": "0", "O": "0", "l": "1", "i": "1", "I": "l", "e": "c", "u": "v", "m": "rn", "a": "o", "t": "f"}
        at = self.draw.pick(spots)
        return text[:at] + ("" if self.draw.chance(0.4) else alike.get(text[at], "")) + text[at + 1 :]

    def label(self, key: str) -> str:
        if self.receipt and key in ("invoice", "number"):
            key = {"invoice": "receipt", "number": "receipt_number"}[key]
        if key not in self.chosen:  # one document does not change its words
            self.chosen[key] = self.draw.pick(words.LABELS[self.language][key])
        return self.damaged(self.chosen[key])

    def pair(self, key: str, value: str, width: int = 0) -> str:
        label = self.label(key)
        bare = label.endswith("#") or (self.noisy and self.draw.chance(LOST_COLON))
        return f"{label + ('' if bare else self.colon):{width}} {value}"

    def say(self, table: dict) -> str:
        return self.draw.pick(table[self.language])

    # parts that several layouts share

    def tax_name(self) -> str:
        gap = "" if self.language == "en" else " "
        return f"{self.damaged(self.country.tax[0])} {self.invoice.tax_rate}{gap}%"

    def sums(self) -> list[tuple[str, str]]:
        """Return (label, money) of the sums below the items; the last is the total to pay."""
        invoice, rows = self.invoice, []
        if invoice.tax_rate and not invoice.tax_included:
            self.shown["net"] = invoice.net
            rows += [(self.label("net"), self.money(invoice.net)), (self.tax_name(), self.money(invoice.tax))]
        elif len(invoice.lines) > 1 and self.draw.chance(0.15):
            rows += [(self.label("subtotal"), self.money(invoice.total))]
        rows.append((self.label("total"), self.priced(invoice.total)))
        return rows

    def included(self) -> list[tuple[str, str]]:
        """Return (label, money) of the tax within the total, which comes after it: true but not in the schema."""
        invoice = self.invoice
        if invoice.tax_included and self.draw.chance(0.7):
            return [(f"{self.label('incl')} {self.tax_name()}", self.money(invoice.tax))]
        return []

    def address(self) -> str:
        return ", ".join(self.places)

    def phone(self) -> str:
        seed = sum(self.invoice.vendor.name.encode())  # as the address, the same on all of a vendor's documents
        return f"{self.label('phone')} {200 + seed % 700} {100 + seed % 890} {1000 + 7 * seed % 8999}"

    def extras(self, most: int) -> list[str]:
        """Return up to `most` further labelled lines, among them dates and numbers that are not in the schema."""
        rows = [
            lambda: self.pair("order", self.order),
            lambda: self.pair("account", str(self.draw.whole(1000, 9999))),
            lambda: self.pair("due", self.due),
            lambda: self.pair(
                "delivered", self.day(self.invoice.date - datetime.timedelta(days=self.draw.whole(1, 6)))
            ),
            lambda: self.label("terms"),
        ]
        return [row() for row in self.draw.shuffled(rows)[: self.draw.whole(0, most)]]

    def closing(self) -> list[str]:
        luck = self.draw.whole(0, 9)
        return [self.label("terms")] if luck < 2 else [self.label("thanks")] if luck < 4 else []

    def columns(self, order: str) -> list[list[str]]:
        """Return head and items as cells; `order` of d(escription), q(uantity), p(rice), a(mount), n(umber)."""
        heads = {"d": "desc", "q": "qty", "p": "price", "a": "amount", "n": "pos"}
        rows = [[self.label(heads[key]) for key in order]]
        for i, line in enumerate(self.invoice.lines, 1):
            cells = {
                "d": self.text(line), "q": self.qty(line, True), "p": self.money(line.price),
                "a": self.money(line.amount), "n": str(i),
            }  # fmt: skip
            rows.append([cells[key] for key in order])
        return rows

    def aligned(self, rows: list[list[str]], left: tuple[int, ...], gap: int = 2) -> list[str]:
        """Return rows of cells as aligned lines, numbers to the right; `left` are the columns of words."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            (" " * gap).join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]

    # the whole

    def finish(self) -> str:
        lines = self.lines
        if self.noisy:
            lines = self.worn(lines)
        return "\n".join(line.rstrip() for line in lines).replace(STUCK, " ")

    def worn(self, lines: list[str]) -> list[str]:
        """Damage lines: doubled spaces, one broken line, stray marks, running heads and feet. Values stay intact."""
        draw, single = self.draw, re.compile(r"(?<=[^ ]) (?=[^ ])")
        lines = [single.sub(lambda _: "  " if draw.chance(0.08) else " ", line) for line in lines]
        if draw.chance(0.3):
            long = [i for i, line in enumerate(lines) if single.search(line) and len(line) > 24]
            if long:
                at = draw.pick(long)
                spots = [match.start() for match in single.finditer(lines[at])]
                spot = draw.pick(spots)
                lines[at : at + 1] = [lines[at][:spot], lines[at][spot + 1 :]]
        if draw.chance(0.35):
            for _ in range(draw.whole(1, 2)):
                at = draw.whole(0, len(lines) - 1)
                mark = draw.pick(("~", "'", "*", "|", "_", "^", "«"))
                if draw.chance(0.5) and lines[at]:
                    lines[at] = f"{lines[at]} {mark}"
                else:
                    lines.insert(at, mark)
        if draw.chance(0.2):
            lines = [line for line in lines if line.strip()]
        if draw.chance(0.2):
            lines = [self.label("page"), *lines] if draw.chance(0.5) else [*lines, self.label("page")]
        return lines


# ---------------------------------------------------------------------------------------------------------- layouts
# Each writes the whole of a page, and differs from the others in structure, not in wording alone.


def letterhead_table(p: Page) -> None:
    """Write a letterhead, then an aligned table under a rule, sums under the last column."""
    p.add(p.vendor)
    if p.draw.chance(0.7):
        p.add(p.address())
    p.add("", p.label("invoice").upper())
    p.add(p.pair("number", p.number) + "    " + p.pair("date", p.date))
    if p.draw.chance(0.6):
        p.add(p.pair("customer", p.customer))
    p.add(*p.extras(2), "")
    order = p.draw.pick(("dqpa", "dqpa", "qdpa", "ndqpa"))
    rows = p.aligned(p.columns(order), (order.index("d"),))
    width = len(rows[0])
    p.add(rows[0], p.draw.pick("-=") * width, *rows[1:])
    if p.draw.chance(0.5):
        p.add("-" * width)
    for label, money in p.sums() + p.included():
        p.add(f"{label + ' ' + money:>{width}}")
    p.add(*p.closing())


def key_value(p: Page) -> None:
    """Write one `label: value` a line, items as numbered groups."""
    head = [p.pair("number", p.number), p.pair("date", p.date), p.pair("vendor", p.vendor)]
    p.add(*(p.draw.shuffled(head) if p.draw.chance(0.5) else head))
    if p.draw.chance(0.6):
        p.add(p.pair("customer", p.customer))
    p.add(*p.extras(2))
    short = p.draw.chance(0.5)
    for i, line in enumerate(p.invoice.lines, 1):
        item = [
            p.pair("qty", p.qty(line)),
            p.pair("price", p.money(line.price)),
            p.pair("amount", p.money(line.amount)),
        ]
        p.add(f"{p.label('desc')} {i}{p.colon} {p.text(line)}")
        p.add("  " + "; ".join(item)) if short else p.add(*("  " + part for part in item))
    for label, money in p.sums() + p.included():
        p.add(f"{label}{p.colon} {money}")


def pipe_table(p: Page) -> None:
    """Write everything in rows between pipes."""
    edge = p.draw.chance(0.6)

    def row(*cells: str) -> str:
        inner = " | ".join(cells)
        return f"| {inner} |" if edge else inner

    p.add(row(p.label("vendor"), p.vendor))
    p.add(row(p.label("number"), p.number, p.label("date"), p.date))
    if p.draw.chance(0.5):
        p.add(row(p.label("customer"), p.customer))
    if p.draw.chance(0.3):
        p.add(row(p.label("due"), p.due))
    rows = p.columns(p.draw.pick(("dqpa", "qdpa", "ndqpa")))
    p.add(row(*rows[0]))
    if p.draw.chance(0.5):
        p.add(row(*["---"] * len(rows[0])))
    p.add(*(row(*cells) for cells in rows[1:]))
    p.add(*(row(label, money) for label, money in p.sums() + p.included()))


def csv_export(p: Page) -> None:
    """Write the lines of a spreadsheet: head row and value row, then items, split by semicolons or tabs."""
    mark = p.draw.pick((";", ";", "\t"))
    names = ["number", "date", "vendor"] + (["customer"] if p.draw.chance(0.5) else []) + ["currency", "total"]
    values = {
        "number": p.number, "date": p.date, "vendor": p.vendor, "currency": p.country.currency,
        "total": p.money(p.invoice.total),
    }  # fmt: skip
    if "customer" in names:
        values["customer"] = p.customer
    if p.draw.chance(0.4):
        names = p.draw.shuffled(names)
    p.add(mark.join(p.label(name) for name in names), mark.join(values[name] for name in names))
    p.add(*(mark.join(cells) for cells in p.columns(p.draw.pick(("dqpa", "ndqpa", "qdpa")))))
    for label, money in p.sums()[:-1] + p.included():
        p.add(f"{label}{mark}{money}")


def prose_body(p: Page) -> list[str]:
    """Write sentences with everything in them, broken into lines of about 80 characters."""
    items = [
        p.say(words.PROSE_ITEM).format(
            qty=p.qty(line), desc=p.text(line), price=p.priced(line.price), amount=p.priced(line.amount)
        )
        for line in p.invoice.lines
    ]
    listed = "; ".join(items[:-1]) + words.AND[p.language] + items[-1] if len(items) > 1 else items[0]
    tax = ""
    if p.invoice.tax_rate and not p.invoice.tax_included:
        p.shown["net"] = p.invoice.net
        name, rate = p.country.tax[0], p.invoice.tax_rate + ("%" if p.language == "en" else f"{STUCK}%")
        tax = words.PROSE_TAX[p.language].format(
            net=p.priced(p.invoice.net), rate=rate, name=name, tax=p.priced(p.invoice.tax)
        )
    body = p.say(words.PROSE).format(no=p.number, date=p.date, items=listed, tax=tax, total=p.priced(p.invoice.total))
    lines, line = [], ""
    for word in body.split(" "):
        if line and len(line) + len(word) > 78:
            lines, line = [*lines, line], ""
        line = f"{line} {word}" if line else word
    return [*lines, line]


def email_prose(p: Page) -> None:
    """Write an e-mail whose sentences have items and sums; no table."""
    subject = f"{words.SUBJECT[p.language]}: {p.label('invoice')} {p.number}"
    if p.draw.chance(0.5):
        p.add(f"{p.damaged(words.FROM[p.language])}: {p.vendor}")
    p.add(subject)
    p.add("", p.say(words.GREETING).format(who=p.customer), "", *prose_body(p))
    if p.draw.chance(0.4):
        p.add(p.pair("due", p.due) + ".")
    p.add("", p.say(words.CLOSING) + ",", p.vendor)


def thermal_receipt(p: Page) -> None:
    """Write a narrow till roll: centred head, `2 x 14.00` under the goods, cash, change. One piece has no quantity."""
    width = max(30, len(p.vendor))
    p.add(p.vendor.center(width))
    if p.draw.chance(0.8):
        p.add(*(place.center(width) for place in p.places))
    if p.draw.chance(0.4):
        p.add(p.phone().center(width))
    p.add("-" * width)
    clock = f"{p.draw.whole(7, 20):02d}:{p.draw.whole(0, 59):02d}"
    ends = (p.pair("number", p.number), f"{p.date} {clock}" if p.draw.chance(0.7) else p.date)
    p.add(*(ends if sum(map(len, ends)) > width - 2 else [ends[0] + ends[1].rjust(width - len(ends[0]))]))
    p.add(p.draw.pick("-=*") * width)
    tail = p.draw.pick(("", "", " A"))

    def row(left: str, right: str) -> list[str]:
        right += tail
        if len(left) + len(right) >= width:
            return [left, right.rjust(width)]
        return [left + right.rjust(width - len(left))]

    for line in p.invoice.lines:
        if line.qty == 100:
            p.add(*row(p.text(line), p.money(line.amount)))
        else:
            times = p.draw.pick((" x ", " x ", " @ "))
            p.add(p.text(line), *row(f"  {p.qty(line)}{times}{p.money(line.price)}", p.money(line.amount)))
    tail = ""
    p.add("-" * width)
    for label, money in p.sums():
        p.add(*row(label.upper() if p.draw.chance(0.4) else label, money))
    if p.draw.chance(0.35):
        cash = (p.invoice.total // 1000 + p.draw.whole(1, 3)) * 1000
        p.shown["cash"] = cash
        p.add(*row(p.label("cash"), p.money(cash)), *row(p.label("change"), p.money(cash - p.invoice.total)))
    for label, money in p.included():
        p.add(*row(label, money))
    if p.draw.chance(0.6):
        p.add(p.label("thanks").center(width))


def two_column_header(p: Page) -> None:
    """Write seller at the left, invoice data at the right in the same lines; items without a rule, quantity first."""
    left = [p.vendor, *p.places]
    if p.draw.chance(0.4):
        left.append(p.phone())
    right = [p.label("invoice").upper(), p.pair("number", p.number), p.pair("date", p.date)]
    right += (
        p.draw.shuffled([lambda: p.pair("order", p.order), lambda: p.pair("due", p.due)])[0:1]
        if p.draw.chance(0.5)
        else []
    )
    right = [line if isinstance(line, str) else line() for line in right]
    width = max(map(len, left)) + 4
    p.add(*(f"{a:{width}}{b}" for a, b in zip_longest(left, right, fillvalue="")), "")
    if p.draw.chance(0.6):
        p.add(p.pair("customer", p.customer), "")
    rows = p.columns("qdpa")
    p.add(*p.aligned(rows if p.draw.chance(0.5) else rows[1:], (0, 1), 3), "")
    sums = [list(row) for row in p.sums() + p.included()]
    p.add(*p.aligned(sums, (0,), 3), *p.closing())


def delivery_note(p: Page) -> None:
    """Write a delivery note that is the bill too: numbered positions, pieces and price of each, arrow to amount."""
    p.add(f"{p.damaged(words.DELIVERY_NOTE[p.language])} {p.number}")
    p.add(p.pair("vendor", p.vendor))
    p.add(p.pair("customer", p.customer))
    delivered = p.day(p.invoice.date - datetime.timedelta(days=p.draw.whole(1, 6)))
    dates = [p.pair("date", p.date)] + ([p.pair("delivered", delivered)] if p.draw.chance(0.5) else [])
    p.add(*dates, "")
    unit, arrow = p.label("pcs"), p.draw.pick(("->", "=>", "..", "="))
    for i, line in enumerate(p.invoice.lines, 1):
        one = unit.rstrip("s") if p.language in ("en", "fr") else unit
        pieces = p.qty(line) if line.qty % 100 else f"{p.qty(line)} {one if line.qty == 100 else unit}"
        p.add(f"{i}. {p.text(line)}", f"   {pieces} / {p.money(line.price)} {arrow} {p.money(line.amount)}")
    p.add("", "   ".join(f"{label} {money}" for label, money in p.sums() + p.included()))
    if p.draw.chance(0.4):
        p.add(p.damaged(words.RECEIVED[p.language]))


def terse_note(p: Page) -> None:
    """Write a note as by hand: hardly a label, round sums without decimals."""
    bill, total, included = words.TERSE[p.language]

    def short(cents: int) -> str:
        return str(cents // 100) if cents % 100 == 0 and cents < 100_000 else p.money(cents)

    def short_priced(cents: int) -> str:
        return p.priced(cents, short(cents))

    head = [p.vendor, f"{bill} {p.number}", p.date]
    p.add(*(head if p.draw.chance(0.4) else [f"{head[0]}, {head[1]}, {head[2]}"]))
    times = p.draw.pick(("x ", " x ", " "))
    for line in p.invoice.lines:
        times = " x " if line.text[0].isdigit() else times
        p.add(f"{p.qty(line)}{times}{p.text(line)} @ {short(line.price)} = {short(line.amount)}")
    invoice = p.invoice
    if invoice.tax_rate and not invoice.tax_included:
        p.shown["net"] = invoice.net
        p.add(f"+ {p.country.tax[0].lower()} {invoice.tax_rate}% {short(invoice.tax)}")
    end = f" {included}" if invoice.tax_included and p.draw.chance(0.6) else ""
    p.add(f"{p.draw.pick((total, total, '='))} {short_priced(invoice.total)}{end}")
    if p.draw.chance(0.3):
        p.add(f"-> {p.customer}")


def dot_leader(p: Page) -> None:
    """Write a form whose values follow dots."""
    width = 44
    mark = p.draw.pick("..._")

    def row(left: str, right: str) -> str:
        return f"{left} {mark * max(4, width - len(left) - len(right))} {right}"

    p.add(f"{p.label('invoice').upper()}  ({p.draw.pick(('1', '2', 'A', 'B'))})")
    p.add(row(p.label("vendor"), p.vendor), row(p.label("number"), p.number), row(p.label("date"), p.date))
    if p.draw.chance(0.5):
        p.add(row(p.label("customer"), p.customer))
    if p.draw.chance(0.3):
        p.add(row(p.label("order"), p.order))
    for line in p.invoice.lines:
        p.add(row(f"{p.text(line)}, {p.qty(line)} x {p.money(line.price)}", p.money(line.amount)))
    p.add(*(row(label, money) for label, money in p.sums() + p.included()), *p.closing())


def letter_list(p: Page) -> None:
    """Write a business letter: place and day at the top, services as a list with hyphens, signed by the vendor."""
    town = " ".join(part for part in p.places[1].split(",")[0].split() if part.isalpha() and not part.isupper())
    p.add(f"{town}, {p.date}", "")
    p.add(p.customer, "", f"{p.label('number')} {p.number}", "")
    p.add(p.say(words.WE_CHARGE))
    for line in p.invoice.lines:
        p.add(f"- {p.text(line)}: {p.qty(line)} x {p.priced(line.price)} = {p.priced(line.amount)}")
    p.add("", ", ".join(f"{label} {money}" for label, money in p.sums() + p.included()) + ".")
    p.add(*([p.label("terms") + "."] if p.draw.chance(0.4) else []), "", p.say(words.CLOSING), p.vendor)


def boxed_form(p: Page) -> None:
    """Write a form drawn with +, - and |."""
    rows = p.columns("dqpa")
    inner = p.aligned(rows, (0,), 3)
    head = [p.vendor, f"{p.pair('number', p.number)}  {p.pair('date', p.date)}"]
    if p.draw.chance(0.5):
        head.append(p.pair("customer", p.customer))
    sums = [f"{label}{p.colon} {money}" for label, money in p.sums() + p.included()]
    width = max(map(len, [*inner, *head, *sums]))
    rule = "+" + "-" * (width + 2) + "+"
    p.add(rule, *(f"| {line:{width}} |" for line in head), rule, *(f"| {line:{width}} |" for line in inner))
    p.add(rule, *(f"| {line:>{width}} |" for line in sums), rule)


def web_receipt(p: Page) -> None:
    """Write a web shop's confirmation: goods with a times sign, price of each in brackets unless it is one piece."""
    p.add(p.say(words.WEB_THANKS), "")
    p.add(f"{p.damaged(words.SOLD_BY[p.language])} {p.vendor}")
    p.add(f"{p.label('number')} {p.number} · {p.date}")
    if p.draw.chance(0.35):
        p.add(p.pair("order", p.order))
    p.add("")
    for line in p.invoice.lines:
        if line.qty == 100:
            p.add(f"* {p.text(line)}", f"  {p.priced(line.amount)}")
        else:
            each = f"({p.priced(line.price)} {words.EACH[p.language]})"
            p.add(f"* {p.text(line)} \u00d7 {p.qty(line)}", f"  {p.priced(line.amount)} {each}")
    p.add("", *(f"{label}: {money}" for label, money in p.sums() + p.included()))
    if p.draw.chance(0.4):
        p.add(f"{p.label('customer')}: {p.customer}")


def column_ocr(p: Page) -> None:
    """Write a table read column by column: all descriptions, then all quantities, prices and amounts."""
    p.add(p.label("invoice"), p.vendor)
    names = [p.label("number"), p.label("date")]
    p.add(*names, p.number, p.date)
    rows = p.columns("dqpa")
    for column in zip(*rows, strict=True):
        p.add("", *column)
    sums = p.sums()
    p.add("", *(label for label, _ in sums), *(money for _, money in sums))


def stacked_header(p: Page) -> None:
    """Write labels over a row of values, items with an article code, the seller at the foot. Held out."""
    names = [
        (p.label("number"), p.number),
        (p.label("account"), str(p.draw.whole(1000, 9999))),
        (p.label("date"), p.date),
    ]
    if p.draw.chance(0.4):
        names.append((p.label("due"), p.due))
    p.add(*p.aligned([list(row) for row in zip(*names, strict=True)], tuple(range(len(names))), 3), "")
    if p.draw.chance(0.5):
        p.add(p.label("customer"), p.customer, "")
    codes = ["Art."] + [f"{p.draw.pick('ABKT')}{p.draw.whole(100, 999)}" for _ in p.invoice.lines]
    rows = [[code, *cells] for code, cells in zip(codes, p.columns("dpqa"), strict=True)]
    p.add(*p.aligned(rows, (0, 1)), "")
    sums = p.sums() + p.included()
    p.add(*p.aligned([list(row) for row in zip(*sums, strict=True)], (), 3))
    p.add("", f"{p.vendor} · {p.address()}")


def slash_slip(p: Page) -> None:
    """Write a slip with asterisks and slashes, seller in the last line. Held out."""
    stars = "*" * p.draw.whole(2, 4)
    p.add(f"{stars} {p.label('invoice')} {p.number} {stars} {p.date} {stars}")
    for line in p.invoice.lines:
        p.add(f"{p.text(line)} / {p.qty(line)} / {p.money(line.price)} / {p.money(line.amount)}")
    p.add(*(f"{label} {stars}{money}{stars}" for label, money in p.sums()))
    p.add(f"{p.label('thanks')} / {p.vendor}")


LAYOUTS: dict[str, Callable[[Page], None]] = {
    layout.__name__: layout
    for layout in (
        letterhead_table, key_value, pipe_table, csv_export, email_prose, thermal_receipt, two_column_header,
        delivery_note, terse_note, dot_leader, letter_list, boxed_form, web_receipt, column_ocr,
        stacked_header, slash_slip,
    )
}  # fmt: skip
KNOWN = tuple(name for name in LAYOUTS if name not in HELD_OUT)


# ------------------------------------------------------------------------------------------------------ wrong answers


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


def documents(draw: Draw, vendors: list[words.Vendor], layouts: tuple[str, ...], count: int) -> list[dict]:
    """Return `count` documents in random order, with vendors and layouts as evenly spread as possible."""
    order: list[words.Vendor] = []
    while len(order) < count:
        order += draw.shuffled(vendors)
    rows, seen = [], set()
    for i, name in enumerate(draw.shuffled([layouts[i % len(layouts)] for i in range(count)])):
        while True:
            invoice = draw_invoice(draw, order[i], name in RECEIPTS)
            page = Page(invoice, draw, draw.chance(NOISY), name in RECEIPTS)
            LAYOUTS[name](page)
            text = page.finish()
            if text not in seen:
                break
        seen.add(text)
        fields = expected_fields(invoice)
        rejected = compact_json(wrong_answer(fields, page.shown, draw))
        rows.append(
            {"document": text, "answer": compact_json(fields), "rejected": rejected, "vendor": invoice.vendor.name,
             "layout": name}
        )  # fmt: skip
    return rows


def generate(seed: int, count: int) -> dict[str, list[dict]]:
    """Return rows by file name. KD and DPO have 3/8 of the training documents, the first and the last ones."""
    splits = ("train", "calibration", "validation")
    parts = {split: [v for v in words.vendors() if split_of(v.name) == split] for split in splits}
    train = documents(Draw(f"train {seed}"), parts["train"], KNOWN, count)
    val = documents(Draw(f"val {seed}"), parts["calibration"], KNOWN, max(1, count // 16))
    known = documents(Draw(f"known {seed}"), parts["validation"], KNOWN, max(1, count * 3 // 16))
    held_out = documents(Draw(f"held out {seed}"), parts["validation"], HELD_OUT, max(1, count // 16))
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
            row(r, document=r["document"], expected=r["answer"]) | {"layouts": layouts}
            for layouts, rows in (("known", known), ("held out", held_out))
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
