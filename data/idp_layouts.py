"""Layouts of the synthetic invoices: a grammar that draws them, and the page that writes one. Used by make_idp.py.

A layout is an order of blocks (seller, title, facts such as number and date, customer, items, sums, ending) and a kind
of writing for facts, items and sums. Page, facts and items together are its family. Families of UNSEEN occur in
validation alone: each has a page, a kind of facts or a kind of items that no family of GRAMMAR has.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

from data import idp_catalogue as words
from data.idp_invoice import Draw, Invoice, Line, date_text, decimal_text

LABEL_DAMAGE = 0.15  # share of labels with a wrong or missing character, in noisy documents
LOST_COLON = 0.12  # share of labels without their colon, in noisy documents
TABLE_DECIMALS = 0.12  # share of documents that print quantities as 2.00
STUCK = "\x00"  # a space inside a value: line damage leaves it alone
TABLES = ("table", "wrapped", "pipes", "cells", "columns", "cellwise", "transposed")  # items in drawn columns
RECEIPTS = ("till", "web", "slash_slip")  # pages titled and numbered as receipts


@dataclass(frozen=True)
class Layout:
    """One way to write invoices: the page, the kinds of facts, items and sums, the order of blocks (letters of BLOCKS)
    and of a table's columns: d(escription), q(uantity), p(rice), a(mount), n(umber of the line)."""

    page: str
    facts: str
    items: str
    sums: str
    order: str
    columns: str

    @property
    def family(self) -> str:
        return f"{self.page}/{self.facts}/{self.items}"

    @property
    def name(self) -> str:
        return f"{self.family}/{self.sums}/{self.order}/{self.columns}"


@dataclass(frozen=True)
class Rule:
    """A rule of the grammar: layouts of a page, with the kinds and orders that fit it; `share` is relative."""

    share: int
    page: str
    facts: str
    items: str
    sums: str
    orders: str

    def layout(self, draw: Draw) -> Layout:
        """Return a layout that the rule allows."""
        parts = [draw.pick(kinds.split()) for kinds in (self.facts, self.items, self.sums, self.orders)]
        columns = draw.pick(("dqpa", "dqpa", "qdpa", "ndqpa", "nqdpa", "dpqa", "qdpa"))
        return Layout(self.page, *parts, columns if parts[1] in TABLES else "-")


PLAIN = "vtfcise vtcfise tvfcise vftcise vfcise tFcise Ftcise Fcise tcFise tfcisev ftcisev"
GRAMMAR = (
    Rule(11, "plain", "colon column dots above inline block", "table wrapped pipes groups pieces at dots list columns",
         "right colon column dots line apart above", PLAIN),
    Rule(3, "sides", "colon column inline", "table wrapped pipes pieces dots at", "right column dots", "vtfcise"),
    Rule(4, "box", "colon column dots inline", "table wrapped at dots pieces", "right colon dots column",
         "vfcis tvfcis tFcis Fcis"),
    Rule(4, "till", "colon inline bare column", "till at pieces wrapped", "edges dots column",
         "vfise vtfise vfcise vfisec"),
    Rule(2, "letter", "inline", "list table pieces groups at", "line colon right", "kafwisz vkafwisz kafwisez"),
    Rule(1, "letter", "prose", "prose", "prose", "kapz vkapz"),
    Rule(2, "mail", "colon inline column", "list table groups at pieces", "colon line column", "hgfwisz hgfisez"),
    Rule(1, "mail", "prose", "prose", "prose", "hgpz"),
    Rule(2, "rows", "pipes", "pipes", "pipes", "Fcis vfcis tFcis"),
    Rule(2, "cells", "heads pairs", "cells", "cells", "His Fis Fcis"),
    Rule(1, "note", "bare", "at dots list", "terse", "vfis vfisc"),
    Rule(2, "web", "inline colon", "web at till list", "colon column", "obfis obfcis"),
)  # fmt: skip
UNSEEN = (
    Rule(1, "stacked_header", "stacked", "codes", "stacked", "fcisv"),  # seller at the foot
    Rule(1, "slash_slip", "stars", "slashes", "stars", "fisy"),
    Rule(1, "run_on", "colon inline", "at list dots", "colon line", "vtfcise tFcise"),  # a page read as one line
    Rule(1, "total_first", "colon column dots", "table at pieces list", "colon column", "stFci svtfci tsvfci"),
    Rule(1, "plain", "under", "table at dots wrapped", "right colon column", "vtfcise vfcise Ftcise tFcise"),
    Rule(1, "plain", "colon above column", "ledger", "colon column right", PLAIN),  # amounts lead the lines
    Rule(1, "plain", "colon above block", "cellwise", "above apart colon", PLAIN),  # a cell a line, row by row
    Rule(1, "plain", "colon column dots", "transposed", "colon column dots", PLAIN),  # a column an item
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- a page


class Page:
    """An invoice being written in a layout, with the ways this document writes labels and values.

    Values go through `keep`, which guards their spaces; labels through `label`, which damages some where the document
    is a noisy one. `shown` notes the misleading values that were printed: a wrong answer can have only those.
    """

    def __init__(self, invoice: Invoice, layout: Layout, draw: Draw, noisy: bool) -> None:
        self.invoice, self.layout, self.draw, self.noisy = invoice, layout, draw, noisy
        self.receipt = layout.page in RECEIPTS
        self.country = words.COUNTRIES[invoice.vendor.country]
        self.language = self.country.language if draw.chance(0.88) else "en"
        self.bilingual = self.language != "en" and draw.chance(0.08)
        self.case = draw.pick((str, str, str, str, str, str, str.upper, str.lower))  # of labels
        styles = self.country.dates
        self.date_style = draw.pick((styles[0], *styles))
        number = self.country.number
        self.number_sample = number[0] + number[2:] if draw.chance(0.1) else number  # without the mark of thousands
        self.mark = draw.pick(words.MARKS[self.country.currency])
        letters = self.mark.isalpha() or self.mark == "Fr."
        self.mark_last = self.country.language in ("de", "fr", "sv") or self.country.currency == "PLN"
        if self.country.currency == "CHF" or (letters and self.mark not in ("kr", "zł") and draw.chance(0.5)):
            self.mark_last = False
        self.gap = " " if letters or self.mark_last else ""
        self.marked_heads = draw.chance(0.12)  # the currency in the heads of a table
        self.full_qty = draw.chance(TABLE_DECIMALS)
        self.colon = " :" if self.language == "fr" and draw.chance(0.6) else ":"
        self.cell_mark = draw.pick((";", ";", "\t", " ; "))
        self.edge = draw.pick(("| ", ""))
        self.leader_mark = draw.pick("..._")
        self.stars = "*" * draw.whole(2, 4)
        self.width = max(draw.whole(30, 40), len(invoice.vendor.name) + 2)  # of a till roll; of a table once written
        seed = sum(invoice.vendor.name.encode())  # address and phone are the same on all of a vendor's documents
        streets, places = self.country.streets, self.country.places
        self.places = (streets[seed % len(streets)], places[seed // 7 % len(places)])
        self.customer_places = (draw.pick(streets), draw.pick(places))
        self.phone_number = f"{200 + seed % 700} {100 + seed % 890} {1000 + 7 * seed % 8999}"
        self.tax_id = f"{invoice.vendor.country[:2]}{10**8 + seed * 7919 % (9 * 10**8)}"
        self.chosen: dict[str, str] = {}  # the words of its labels
        self.shown: dict[str, str | int] = {}

    # values

    def keep(self, text: str) -> str:
        return text.replace(" ", STUCK)

    def value(self, key: str) -> str:
        """Return what stands for a fact: number, date, vendor, customer, order, account, due, delivered, ..."""
        invoice = self.invoice
        if key in ("customer", "order"):
            self.shown[key] = getattr(invoice, key)
        elif key == "due":
            self.shown["due"] = invoice.due.isoformat()
        if key in ("date", "due"):
            clock = f" {self.draw.whole(7, 20):02d}:{self.draw.whole(0, 59):02d}"
            with_clock = key == "date" and self.layout.page == "till" and self.draw.chance(0.5)
            return self.day(getattr(invoice, key)) + (clock if with_clock else "")
        if key == "delivered":
            return self.day(invoice.date - datetime.timedelta(days=self.draw.whole(1, 6)))
        return self.keep(
            {
                "number": invoice.number, "vendor": invoice.vendor.name, "customer": invoice.customer,
                "order": invoice.order, "account": str(self.draw.whole(1000, 9999)), "phone": self.phone_number,
                "currency": self.country.currency, "total": self.money(invoice.total),
            }[key]
        )  # fmt: skip

    def day(self, date: datetime.date) -> str:
        return self.keep(date_text(date, self.date_style, self.language))

    def money(self, cents: int) -> str:
        return self.keep(decimal_text(cents, self.number_sample))

    def priced(self, cents: int, text: str | None = None) -> str:
        """Return money with the currency: in every document at least the total has it."""
        text = text or self.money(cents)
        gap = self.keep(self.gap)
        return f"{text}{gap}{self.mark}" if self.mark_last else f"{self.mark}{gap}{text}"

    def qty(self, line: Line, table: bool = False) -> str:
        if line.qty % 100 == 0 and not (table and self.full_qty):
            return str(line.qty // 100)
        text = decimal_text(line.qty, self.number_sample)
        return text if table and self.full_qty else text.rstrip("0")

    def text(self, line: Line) -> str:
        return self.keep(line.text)

    def address(self, places: tuple[str, str]) -> list[str]:
        return [", ".join(places)] if self.draw.chance(0.4) else list(places)

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
            text, english = (self.draw.pick(words.LABELS[language][key]) for language in (self.language, "en"))
            double = self.bilingual and text != english and key not in ("thanks", "terms", "page")
            self.chosen[key] = self.case(f"{text} / {english}" if double else text)
        return self.damaged(self.chosen[key])

    def with_colon(self, label: str) -> str:
        bare = label.endswith(("#", ".")) and self.draw.chance(0.5)
        bare = bare or label.endswith("#") or (self.noisy and self.draw.chance(LOST_COLON))
        return label if bare else label + self.colon

    def pair(self, key: str) -> str:
        return f"{self.with_colon(self.label(key))} {self.value(key)}"

    def say(self, table: dict) -> str:
        return self.draw.pick(table[self.language])

    def leader(self, left: str, right: str) -> str:
        return f"{left} {self.leader_mark * max(4, 44 - len(left) - len(right))} {right}"

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

    def row(self, *cells: str) -> str:
        """Return cells between pipes."""
        inner = " | ".join(cells)
        return f"| {inner} |" if self.edge else inner

    def tax_name(self) -> str:
        gap = "" if self.language == "en" else " "
        return f"{self.damaged(self.country.tax[0])} {self.invoice.tax_rate}{gap}%"

    def total_rows(self) -> list[tuple[str, str]]:
        """Return (label, money) of the sums: net and tax, the total to pay, cash on a till roll, the tax within."""
        invoice, rows = self.invoice, []
        if invoice.tax_rate and not invoice.tax_included:
            self.shown["net"] = invoice.net
            rows += [(self.label("net"), self.money(invoice.net)), (self.tax_name(), self.money(invoice.tax))]
        elif len(invoice.lines) > 1 and self.draw.chance(0.15):
            rows += [(self.label("subtotal"), self.money(invoice.total))]
        if "H" not in self.layout.order:
            rows.append((self.label("total"), self.priced(invoice.total)))
        if self.layout.page == "till" and self.draw.chance(0.35):
            cash = (invoice.total // 1000 + self.draw.whole(1, 3)) * 1000
            self.shown["cash"] = cash
            rows += [(self.label("cash"), self.money(cash)), (self.label("change"), self.money(cash - invoice.total))]
        if invoice.tax_included and self.draw.chance(0.7):
            rows.append((f"{self.label('incl')} {self.tax_name()}", self.money(invoice.tax)))
        return rows

    def table(self, order: str) -> list[list[str]]:
        """Return heads and items as cells; `order` as Layout.columns."""
        heads = {"d": "desc", "q": "qty", "p": "price", "a": "amount", "n": "pos"}
        rows = [[self.label(heads[key]) + (f" ({self.mark})" * (self.marked_heads and key in "pa")) for key in order]]
        for i, line in enumerate(self.invoice.lines, 1):
            cells = {
                "d": self.text(line), "q": self.qty(line, True), "p": self.money(line.price),
                "a": self.money(line.amount), "n": str(i),
            }  # fmt: skip
            rows.append([cells[key] for key in order])
        return rows

    # the whole

    def write(self) -> str:
        """Return the document."""
        blocks = [(letter, BLOCKS[letter](self)) for letter in self.layout.order]
        lines = PAGES.get(self.layout.page, spaced)(self, [block for block in blocks if block[1]])
        if self.noisy:
            lines = self.worn(lines)
        return "\n".join(line.rstrip() for line in lines).replace(STUCK, " ").strip("\n")

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


# ----------------------------------------------------------------------------------------------------- kinds of facts


def inline_facts(p: Page, keys: list[str]) -> list[str]:
    """Write number and date in one line, the number after its label or the title."""
    name = p.label("number") if p.draw.chance(0.5) else p.label("invoice")
    dated = p.draw.pick((", ", "  ", " / ", " - ", " · ", f" {p.say(words.DATED)} "))
    head = f"{name} {p.value('number')}" + (f"{dated}{p.value('date')}" if "date" in keys else "")
    return [head, *(p.pair(key) for key in keys if key not in ("number", "date"))]


def bare_facts(p: Page, keys: list[str]) -> list[str]:
    """Write number and date without their labels."""
    number, date = f"{p.draw.pick((words.TERSE[p.language][0] + ' ', '#'))}{p.value('number')}", p.value("date")
    return ([f"{number}  {date}"] if p.draw.chance(0.6) else [number, date]) + [p.pair(key) for key in keys[2:]]


def colon_facts(p: Page, keys: list[str]) -> list[str]:
    lines = [p.pair(key) for key in keys]
    return ["    ".join(lines[:2]), *lines[2:]] if p.draw.chance(0.3) else lines


def column_facts(p: Page, keys: list[str]) -> list[str]:
    colon = p.draw.chance(0.5)
    rows = [[p.with_colon(p.label(key)) if colon else p.label(key), p.value(key)] for key in keys]
    return p.aligned(rows, (0, 1), p.draw.pick((2, 3, 6)))


def piped_facts(p: Page, keys: list[str]) -> list[str]:
    pairs = [(p.label(key), p.value(key)) for key in keys]
    return [p.row(*pairs[0], *pairs[1]), *(p.row(*pair) for pair in pairs[2:])]


def head_facts(p: Page, keys: list[str]) -> list[str]:
    return [p.cell_mark.join(p.label(key) for key in keys), p.cell_mark.join(p.value(key) for key in keys)]


def stacked_facts(p: Page, keys: list[str]) -> list[str]:
    cells = [[p.label(key), p.value(key)] for key in keys]
    return p.aligned([list(row) for row in zip(*cells, strict=True)], tuple(range(len(keys))), 3)


def starred_facts(p: Page, keys: list[str]) -> list[str]:
    return [f"{p.stars} {p.label('invoice')} {p.value('number')} {p.stars} {p.value('date')} {p.stars}"]


FACTS: dict[str, Callable[[Page, list[str]], list[str]]] = {
    "inline": inline_facts,
    "bare": bare_facts,
    "colon": colon_facts,
    "column": column_facts,
    "dots": lambda p, keys: [p.leader(p.label(key), p.value(key)) for key in keys],
    "above": lambda p, keys: [line for key in keys for line in (p.label(key), p.value(key))],
    "block": lambda p, keys: [*map(p.label, keys), *map(p.value, keys)],
    "pipes": piped_facts,
    "heads": head_facts,
    "pairs": lambda p, keys: [f"{p.label(key)}{p.cell_mark}{p.value(key)}" for key in keys],
    "stacked": stacked_facts,
    "under": lambda p, keys: [line for key in keys for line in (p.value(key), f"({p.label(key)})")],
    "stars": starred_facts,
}


# ----------------------------------------------------------------------------------------------------- kinds of items


def table_items(p: Page) -> list[str]:
    """Write an aligned table, some without heads where quantity and price are in their usual order."""
    order = p.layout.columns
    lines = p.aligned(p.table(order), tuple(order.find(key) for key in "dn"), p.draw.pick((2, 2, 3, 4)))
    p.width = len(lines[0])
    if order in ("dqpa", "qdpa") and not p.full_qty and p.draw.chance(0.2):
        return lines[1:]
    rule = p.draw.pick(("", "", "-", "=", "_")) * p.width
    rows = [lines[0], *([rule] if rule else []), *lines[1:]]
    return [*rows, p.draw.pick("-=") * p.width] if p.draw.chance(0.25) else rows


def wrapped_items(p: Page) -> list[str]:
    """Write an item's text in one line and its numbers in the next."""
    rows = p.table(p.layout.columns.replace("d", "").replace("n", ""))
    numbers = p.aligned(rows, (), p.draw.pick((2, 4)))
    pad = " " * p.draw.pick((0, 2, 6))
    names = [p.label("desc"), *map(p.text, p.invoice.lines)]
    lines = [line for name, row in zip(names, numbers, strict=True) for line in (name, pad + row)]
    p.width = max(p.width, len(pad + numbers[0]))
    return lines


def piped_items(p: Page) -> list[str]:
    rows = p.table(p.layout.columns)
    rule = [p.row(*["---"] * len(rows[0]))] if p.draw.chance(0.5) else []
    return [p.row(*rows[0]), *rule, *(p.row(*cells) for cells in rows[1:])]


def grouped_items(p: Page) -> list[str]:
    """Write each number of an item with its label."""
    lines, short = [], p.draw.chance(0.5)
    for i, line in enumerate(p.invoice.lines, 1):
        values = (("qty", p.qty(line)), ("price", p.money(line.price)), ("amount", p.money(line.amount)))
        parts = [f"{p.with_colon(p.label(key))} {value}" for key, value in values]
        lines.append(f"{p.label('desc')} {i}{p.colon} {p.text(line)}")
        lines += ["  " + "; ".join(parts)] if short else ["  " + part for part in parts]
    return lines


def pieces_items(p: Page) -> list[str]:
    """Write numbered positions, with pieces and price of each and an arrow to the amount in the next line."""
    lines, unit, arrow = [], p.label("pcs"), p.draw.pick(("->", "=>", "..", "="))
    for i, line in enumerate(p.invoice.lines, 1):
        one = unit.rstrip("s") if p.language in ("en", "fr") else unit
        pieces = p.qty(line) if line.qty % 100 else f"{p.qty(line)} {one if line.qty == 100 else unit}"
        lines += [f"{i}. {p.text(line)}", f"   {pieces} / {p.money(line.price)} {arrow} {p.money(line.amount)}"]
    return lines


def at_items(p: Page) -> list[str]:
    """Write an item as a sum in one line."""
    forms = ("{q} x {d} @ {p} = {a}", "{d} ({q} x {p}) {a}", "{d}, {q} x {p} = {a}", "{d}: {q} @ {p}  {a}")
    form, short = p.draw.pick(forms), p.layout.sums == "terse"  # a note has round sums without decimals

    def money(cents: int) -> str:
        return str(cents // 100) if short and cents % 100 == 0 and cents < 100_000 else p.money(cents)

    return [
        form.format(q=p.qty(line), d=p.text(line), p=money(line.price), a=money(line.amount))
        for line in p.invoice.lines
    ]


def listed_items(p: Page) -> list[str]:
    bullet = p.draw.pick(("- ", "- ", "* ", "• ", "+ "))
    return [
        f"{bullet}{p.text(line)}: {p.qty(line)} x {p.priced(line.price)} = {p.priced(line.amount)}"
        for line in p.invoice.lines
    ]


def till_items(p: Page) -> list[str]:
    """Write goods and amount in a line; `2 x 14.00` is below, and left out for one piece."""
    lines, tail = [], p.draw.pick(("", "", " A"))
    for line in p.invoice.lines:
        if line.qty == 100:
            lines += edges(p, p.text(line), p.money(line.amount) + tail)
        else:
            times = f"  {p.qty(line)}{p.draw.pick((' x ', ' x ', ' @ '))}{p.money(line.price)}"
            lines += [p.text(line), *edges(p, times, p.money(line.amount) + tail)]
    return lines


def web_items(p: Page) -> list[str]:
    """Write goods with a times sign, and the price of each in brackets; one piece has neither."""
    lines = []
    for line in p.invoice.lines:
        if line.qty == 100:
            lines += [f"* {p.text(line)}", f"  {p.priced(line.amount)}"]
        else:
            each = f"({p.priced(line.price)} {words.EACH[p.language]})"
            lines += [f"* {p.text(line)} \u00d7 {p.qty(line)}", f"  {p.priced(line.amount)} {each}"]
    return lines


def coded_items(p: Page) -> list[str]:
    """Write a table with an article code, the price before the quantity."""
    codes = ["Art."] + [f"{p.draw.pick('ABKT')}{p.draw.whole(100, 999)}" for _ in p.invoice.lines]
    return p.aligned([[code, *cells] for code, cells in zip(codes, p.table("dpqa"), strict=True)], (0, 1))


def ledger_items(p: Page) -> list[str]:
    """Write the amount first, then quantity and price, the text last."""
    rows = [[p.money(i.amount), p.qty(i), f"x {p.money(i.price)}", p.text(i)] for i in p.invoice.lines]
    return p.aligned(rows, (3,))


def prose(p: Page) -> list[str]:
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
    body = p.say(words.PROSE).format(
        no=p.value("number"), date=p.value("date"), items=listed, tax=tax, total=p.priced(p.invoice.total)
    )
    lines, line = [], ""
    for word in body.split(" "):
        if line and len(line) + len(word) > 78:
            lines, line = [*lines, line], ""
        line = f"{line} {word}" if line else word
    return [*lines, line, *([p.pair("due") + "."] if p.draw.chance(0.3) else [])]


def slashed(p: Page, line: Line) -> str:
    return f"{p.text(line)} / {p.qty(line)} / {p.money(line.price)} / {p.money(line.amount)}"


def dotted(p: Page, line: Line) -> str:
    return p.leader(f"{p.text(line)}, {p.qty(line)} x {p.money(line.price)}", p.money(line.amount))


ITEMS: dict[str, Callable[[Page], list[str]]] = {
    "table": table_items,
    "wrapped": wrapped_items,
    "pipes": piped_items,
    "cells": lambda p: [p.cell_mark.join(cells) for cells in p.table(p.layout.columns)],
    "groups": grouped_items,
    "pieces": pieces_items,
    "at": at_items,
    "dots": lambda p: [dotted(p, line) for line in p.invoice.lines],
    "list": listed_items,
    "columns": lambda p: [cell for column in zip(*p.table(p.layout.columns), strict=True) for cell in column],
    "till": till_items,
    "web": web_items,
    "codes": coded_items,
    "slashes": lambda p: [slashed(p, line) for line in p.invoice.lines],
    "ledger": ledger_items,
    "cellwise": lambda p: [cell for row in p.table(p.layout.columns) for cell in row],
    "transposed": lambda p: p.aligned([list(c) for c in zip(*p.table(p.layout.columns), strict=True)], (0,), 3),
}


# ------------------------------------------------------------------------------------------------------ kinds of sums

Sums = list[tuple[str, str]]


def edges(p: Page, left: str, right: str) -> list[str]:
    """Return left and right at the edges of a till roll, in two lines where one is too narrow."""
    if len(left) + len(right) >= p.width:
        return [left, right.rjust(p.width)]
    return [left + right.rjust(p.width - len(left))]


def terse_sums(p: Page, sums: Sums) -> list[str]:
    """Write the sums of a note as by hand, in short words."""
    _, total, included = words.TERSE[p.language]
    taxed, within = bool(p.invoice.tax_rate) and not p.invoice.tax_included, p.invoice.tax_included
    lines = [f"+ {p.country.tax[0].lower()} {p.invoice.tax_rate}% {p.money(p.invoice.tax)}"] if taxed else []
    end = f" {included}" if within and p.draw.chance(0.6) else ""
    return [*lines, f"{p.draw.pick((total, total, '='))} {p.priced(p.invoice.total)}{end}"]


SUMS: dict[str, Callable[[Page, Sums], list[str]]] = {
    "right": lambda p, sums: [f"{label + ' ' + money:>{p.width}}" for label, money in sums],
    "colon": lambda p, sums: [f"{label}{p.colon} {money}" for label, money in sums],
    "column": lambda p, sums: p.aligned([list(row) for row in sums], (0,), 3),
    "dots": lambda p, sums: [p.leader(label, money) for label, money in sums],
    "line": lambda p, sums: [p.draw.pick(("   ", ", ", " | ")).join(f"{label} {money}" for label, money in sums)],
    "pipes": lambda p, sums: [p.row(label, money) for label, money in sums],
    "cells": lambda p, sums: [f"{label}{p.cell_mark}{money}" for label, money in sums],
    "edges": lambda p, sums: [line for label, money in sums for line in edges(p, label, money)],
    "terse": terse_sums,
    "apart": lambda p, sums: [*(label for label, _ in sums), *(money for _, money in sums)],
    "above": lambda p, sums: [text for pair in sums for text in pair],
    "stacked": lambda p, sums: p.aligned([list(row) for row in zip(*sums, strict=True)], (), 3),
    "stars": lambda p, sums: [f"{label} {p.stars}{money}{p.stars}" for label, money in sums],
}


# ------------------------------------------------------------------------------------------------------------- blocks


def facts(p: Page, *keys: str) -> list[str]:
    """Write number, date and others, with up to two dates and numbers among them that are not in the schema."""
    names = [*keys] if "k" not in p.layout.order else ["number"]  # a letter has its date at the top
    if p.draw.chance(0.4) and p.layout.facts not in ("bare", "stars"):
        names = p.draw.shuffled(names)
    if p.draw.chance(0.3) and "c" not in p.layout.order and "H" in p.layout.order:
        names.append("customer")
    extras = p.draw.shuffled(["order", "account", "due", "delivered"])[: p.draw.pick((0, 0, 0, 1, 1, 2))]
    return FACTS[p.layout.facts](p, names if p.layout.facts in ("bare", "stars", "heads") else names + extras)


def seller(p: Page) -> list[str]:
    """Write the seller: name, mostly address, sometimes telephone. At the foot it may be one line."""
    name, phone = p.value("vendor"), [f"{p.label('phone')} {p.value('phone')}"]
    if p.layout.order.endswith("v") and p.draw.chance(0.5):
        return [f"{name} · {', '.join(p.places)}"]
    if not p.draw.chance(0.7):
        return [name]
    return [name, *p.address(p.places), *(phone if p.draw.chance(0.3) else [])]


def title(p: Page) -> list[str]:
    if p.draw.chance(0.06):
        return [p.damaged(words.DELIVERY_NOTE[p.language])]
    text = p.label("invoice")
    return [text.upper() if p.draw.chance(0.6) else text]


def customer(p: Page) -> list[str]:
    if p.draw.chance(0.45):
        return []
    address = p.address(p.customer_places) if p.draw.chance(0.35) else []
    if p.layout.page == "rows":
        return [p.row(p.label("customer"), p.value("customer"))]
    if p.layout.page == "cells":
        return [f"{p.label('customer')}{p.cell_mark}{p.value('customer')}"]
    if address or p.draw.chance(0.3):
        return [p.with_colon(p.label("customer")), p.value("customer"), *address]
    return [p.pair("customer")]


def ending(p: Page) -> list[str]:
    """Write terms, thanks or the seller's tax number, or nothing."""
    tax_id = f"{p.country.tax[0]} {p.draw.pick(('ID', 'no.', 'Id-Nr.'))} {p.tax_id}"
    return p.draw.pick(([], [], [], [], [p.label("terms")], [p.label("thanks")], [tax_id]))


def mail_head(p: Page) -> list[str]:
    sender = [f"{p.damaged(words.FROM[p.language])}: {p.value('vendor')}"] if p.draw.chance(0.5) else []
    return [*sender, f"{words.SUBJECT[p.language]}: {p.label('invoice')} {p.value('number')}"]


def addressee(p: Page) -> list[str]:
    return [p.value("customer"), *(p.address(p.customer_places) if p.draw.chance(0.4) else [])]


def place_and_day(p: Page) -> list[str]:
    town = " ".join(part for part in p.places[1].split(",")[0].split() if part.isalpha() and not part.isupper())
    return [f"{town}, {p.value('date')}"]


BLOCKS: dict[str, Callable[[Page], list[str]]] = {
    "v": seller,
    "t": title,
    "f": lambda p: facts(p, "number", "date"),
    "F": lambda p: facts(p, "number", "date", "vendor"),
    "H": lambda p: facts(p, "number", "date", "vendor", "currency", "total"),
    "c": customer,
    "i": lambda p: ITEMS[p.layout.items](p),
    "s": lambda p: SUMS[p.layout.sums](p, p.total_rows()),
    "e": ending,
    "k": place_and_day,
    "a": addressee,
    "h": mail_head,
    "g": lambda p: [p.say(words.GREETING).format(who=p.value("customer"))],
    "w": lambda p: [p.say(words.WE_CHARGE)],
    "p": prose,
    "z": lambda p: [p.say(words.CLOSING) + p.draw.pick((",", "")), p.value("vendor")],
    "o": lambda p: [p.say(words.WEB_THANKS)],
    "b": lambda p: [f"{p.damaged(words.SOLD_BY[p.language])} {p.value('vendor')}"],
    "y": lambda p: [f"{p.label('thanks')} / {p.value('vendor')}"],
}


# -------------------------------------------------------------------------------------------------------------- pages

Blocks = list[tuple[str, list[str]]]


def spaced(p: Page, blocks: Blocks) -> list[str]:
    """Return the blocks with blank lines between some."""
    often = p.draw.pick((1, 0.8, 0.5, 0)) if p.layout.page not in ("rows", "cells", "slash_slip") else 0
    lines: list[str] = []
    for _, block in blocks:
        lines += ["", *block] if lines and p.draw.chance(often) else block
    return lines


def side_by_side(p: Page, blocks: Blocks) -> list[str]:
    """Return a page with the seller at the left of title and facts."""
    parts = dict(blocks)
    left, right = parts.pop("v"), parts.pop("t") + parts.pop("f")
    width = max(map(len, left)) + p.draw.whole(3, 8)
    head = [f"{a:{width}}{b}" for a, b in zip_longest(left, right, fillvalue="")]
    return spaced(p, [("v", head), *parts.items()])


def boxed(p: Page, blocks: Blocks) -> list[str]:
    """Return a page drawn with +, - and |: head, items, sums at the right edge."""
    parts = {"head": [line for letter, block in blocks if letter not in "is" for line in block], **dict(blocks)}
    right = p.draw.chance(0.7)
    width = max(len(line) for name in ("head", "i", "s") for line in parts[name])
    rule = "+" + p.draw.pick("-=") * (width + 2) + "+"
    lines = [rule]
    for name in ("head", "i", "s"):
        side = ">" if name == "s" and right else "<"
        lines += [*(f"| {line:{side}{width}} |" for line in parts[name]), rule]
    return lines


def rolled(p: Page, blocks: Blocks) -> list[str]:
    """Return a till roll: seller, title and thanks in the middle, rules between blocks."""
    lines: list[str] = []
    rule = p.draw.pick("-=*") * p.width
    for letter, block in blocks:
        lines += [rule] if letter in "is" or (letter == "f" and p.draw.chance(0.5)) else []
        lines += [line.center(p.width) for line in block] if letter in "vte" else block
    return lines


def run_on(p: Page, blocks: Blocks) -> list[str]:
    """Return the page as one line, as text without its line ends."""
    mark = p.draw.pick((" · ", " | ", " // ", "   "))
    return [mark.join(re.sub(" {2,}", "  ", line.strip()) for _, block in blocks for line in block)]


PAGES = {"sides": side_by_side, "box": boxed, "till": rolled, "run_on": run_on}
