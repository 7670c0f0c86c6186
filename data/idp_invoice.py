"""The invoices that make_idp.py draws: vendor, goods, prices and tax, and values as a country writes them."""

from __future__ import annotations

import datetime
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from data import idp_catalogue as words
from distil.splits import split_of

FIRST_DAY, DAYS = datetime.date(2021, 1, 1), 7 * 365


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
        f"R{date.year % 100}{count:05d}", f"{date.year}/{count % 1000:03d}", f"{prefix}{count:05d}",
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


def date_text(date: datetime.date, style: str, language: str) -> str:
    """Return a date in a style such as dd.mm.Y or d Month Y; two-digit years are of this century."""
    month = words.MONTHS[language][date.month - 1]
    parts = {
        "Month": month, "Mon": month[:3], "MON": month[:3].upper(), "dd": f"{date.day:02d}", "d": str(date.day),
        "mm": f"{date.month:02d}", "m": str(date.month), "Y": str(date.year), "y": f"{date.year % 100:02d}",
    }  # fmt: skip
    return re.sub(r"Month|Mon|MON|dd|mm|d|m|Y|y", lambda match: parts[match[0]], style)


def decimal_text(hundredths: int, sample: str) -> str:
    """Return a number with the marks of the sample: of thousands, if it has one, and of decimals, as '1.234,50'."""
    thousands, point = sample[1:-6], sample[-3]
    return f"{hundredths // 100:,}".replace(",", thousands) + f"{point}{hundredths % 100:02d}"
