"""Generate the synthetic CreditMix rows that the project embeds.

Every customer is drawn from the class-conditional tables below; no row and no identity of the real data is copied.
The tables were counted on the test part of the published Kaggle "Credit score classification" data (29,844 rows,
7,461 customers): shares of wide cells, rounded to a thousandth, between which values are drawn evenly. Only those
dependences are kept that carry information about the label or are plain in the data:

  class -> kind (Standard is a mixture of two kinds) -> debt, income, age
  income -> payment behaviour and credit utilisation, drawn again each month; occupation is independent of everything

What makes the task hard: every Standard customer has the debt range of the Good ones or overlaps that of the Bad
ones. Afterwards the rows are damaged as the real ones are: trailing underscores, impossible ages and incomes,
placeholders, unknown labels. The same seed gives the same bytes on every machine: only random.Random.random() is
used, whose sequence Python keeps.

Example:
  python -m data.make_creditmix --seed 0 --out data/creditmix_dataset.json
"""

import argparse
import json
import os
import random
import sys
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

MONTHS = 4  # rows of one customer

# ---- shares of customers, in thousandths. Exact quotas are drawn, so every seed has the same number of each kind.
# "Standard, low" shares its debt range with Good, "Standard, high" with Bad.
KINDS = {
    "Good": ("Good", 302),
    "Standard, low": ("Standard", 342),
    "Standard, high": ("Standard", 118),
    "Bad": ("Bad", 238),
}

# ---- debt: edges of cells and weights of the cells between them
DEBT = {
    "Good": ([0, 1500], [1]),
    "Standard, low": ([0, 1500], [1]),
    "Standard, high": ([1250, 2700], [1]),
    "Bad": ([1250, 2500, 2700, 5000], [362, 99, 539]),
}

# ---- income: one list of edges, placed where the real density steps; thousandths for every cell
INCOME_EDGES = [
    7000, 8750, 9750, 10500, 12250, 14000, 15750, 17500, 18500, 19750, 21000, 22500, 24000, 26000,
    28000, 30500, 33000, 35000, 37000, 39500, 42000, 45000, 48500, 52500, 56500, 60000, 65000, 70000,
    77000, 84000, 90000, 97500, 105000, 112500, 120000, 127500, 135000, 142500, 150000, 165000, 180000,
]  # fmt: skip
INCOME = {
    "Good": [
        0, 1, 3, 4, 4, 27, 33, 17, 22, 26, 39, 1, 6, 4, 43, 54, 37, 40, 45, 35,
        54, 1, 2, 8, 20, 27, 25, 33, 38, 48, 28, 28, 28, 40, 41, 41, 15, 15, 29, 39,
    ],
    "Standard, low": [
        5, 6, 15, 33, 27, 33, 37, 15, 19, 22, 25, 24, 39, 38, 44, 49, 40, 39, 9, 15,
        16, 20, 18, 15, 21, 31, 38, 54, 39, 35, 33, 36, 38, 15, 16, 16, 16, 9, 0, 0,
    ],
    "Standard, high": [
        75, 54, 36, 0, 0, 83, 78, 71, 62, 58, 0, 0, 0, 0, 26, 31, 29, 29, 31, 24,
        24, 33, 29, 33, 37, 58, 28, 44, 26, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
    "Bad": [
        86, 54, 37, 0, 0, 92, 77, 42, 58, 62, 0, 0, 0, 0, 29, 37, 25, 20, 26, 23,
        16, 28, 31, 41, 41, 51, 31, 47, 46, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
}  # fmt: skip

# ---- age in whole years in the first month; a cell [14, 16) holds 14 and 15
AGE_EDGES = [14, 16, 18, 19, 22, 26, 30, 34, 38, 42, 46, 47, 50, 53, 56, 57]
AGE = {
    "Good": [0, 0, 9, 86, 112, 101, 106, 104, 96, 99, 27, 81, 81, 82, 16],
    "Standard, low": [16, 28, 15, 78, 115, 113, 113, 117, 118, 107, 25, 46, 46, 48, 15],
    "Standard, high": [60, 67, 26, 98, 118, 133, 117, 126, 114, 128, 14, 0, 0, 0, 0],
    "Bad": [46, 62, 35, 93, 118, 132, 129, 120, 126, 117, 21, 0, 0, 0, 0],
}

OCCUPATIONS = [
    "Accountant", "Architect", "Developer", "Doctor", "Engineer", "Entrepreneur", "Journalist", "Lawyer",
    "Manager", "Mechanic", "Media_Manager", "Musician", "Scientist", "Teacher", "Writer",
]  # fmt: skip

# ---- payment behaviour: thousandths by income below the bound
BEHAVIOURS = [
    "High_spent_Large_value_payments", "High_spent_Medium_value_payments", "High_spent_Small_value_payments",
    "Low_spent_Large_value_payments", "Low_spent_Medium_value_payments", "Low_spent_Small_value_payments",
]  # fmt: skip
BEHAVIOUR = [
    (14000, [36, 72, 101, 104, 200, 487]),
    (21000, [58, 98, 109, 117, 177, 441]),
    (28000, [87, 191, 144, 136, 108, 333]),
    (45000, [122, 238, 143, 134, 96, 266]),
    (84000, [188, 277, 131, 94, 133, 176]),
    (180001, [303, 206, 97, 100, 195, 98]),
]

# ---- credit utilisation in per cent: its deciles by income below the bound, drawn evenly between two deciles
UTILISATION = [
    (28000, [22.3, 24.9, 26.6, 28.4, 30.0, 31.8, 33.4, 35.1, 36.7, 38.4, 41.0]),
    (45000, [22.6, 25.2, 26.9, 28.5, 30.2, 31.8, 33.5, 35.2, 36.8, 38.6, 41.2]),
    (84000, [22.3, 25.5, 27.2, 28.9, 30.5, 32.2, 33.9, 35.6, 37.2, 38.9, 42.3]),
    (110000, [22.7, 26.5, 28.3, 30.0, 31.5, 33.2, 34.9, 36.6, 38.4, 40.2, 43.7]),
    (145000, [22.8, 27.0, 29.2, 31.0, 32.7, 34.4, 36.2, 38.0, 39.6, 41.3, 45.4]),
    (180001, [22.8, 28.2, 30.2, 32.1, 33.8, 35.5, 37.5, 39.2, 40.7, 43.0, 46.9]),
]

# ---- damage: shares of rows, drawn independently: in the real data none depends on another or on the class
UNKNOWN_LABEL = 0.197  # "_"
UNKNOWN_OCCUPATION = 0.068  # "_______"
UNKNOWN_BEHAVIOUR = 0.0753  # "!@9#%8"
AGE_MINUS_500 = 0.0094  # never with an underscore
AGE_TOO_HIGH = 0.0193  # whole years from 133 to 8,700
INCOME_TOO_HIGH = 0.0104  # from 250,000 to 24,150,000
AGE_UNDERSCORE = 0.0495
INCOME_UNDERSCORE = 0.0703
DEBT_UNDERSCORE = 0.0102


class Draw:
    """Draws from tables with one seeded generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, p: float) -> bool:
        """Draw True with probability p."""
        return self._random() < p

    def between(self, low: float, high: float) -> float:
        """Draw a number from low to below high."""
        return low + (high - low) * self._random()

    def index(self, weights: list[int]) -> int:
        """Draw an index by weight."""
        totals = list(accumulate(weights))
        return bisect_right(totals, self._random() * totals[-1])

    def cell(self, edges: list[int], weights: list[int]) -> float:
        """Draw a value evenly within a cell that is drawn by weight; below the last edge."""
        i = self.index(weights)
        return self.between(edges[i], edges[i + 1])

    def shuffle(self, items: list) -> None:
        """Shuffle the items in place."""
        # Not random.shuffle: its use of the sequence is not promised to stay the same between Python versions.
        for i in range(len(items) - 1, 0, -1):
            j = int(self._random() * (i + 1))
            items[i], items[j] = items[j], items[i]


def by_income(table: list[tuple[int, list]], income: float) -> list:
    """Return the entry of a table keyed by upper bounds of income."""
    return next(values for bound, values in table if income < bound)


def customer_kinds(n: int, draw: Draw) -> list[str]:
    """Return n kinds in random order, by exact quota."""
    names = list(KINDS)
    ends = [round(n * total / 1000) for total in accumulate(share for _, share in KINDS.values())]
    kinds = [names[bisect_right(ends, i)] for i in range(n)]
    draw.shuffle(kinds)
    return kinds


def customer_rows(number: int, kind: str, draw: Draw) -> list[dict[str, str]]:
    """Return the months of one customer, damaged; only age, utilisation and payment behaviour change by month."""
    debt = draw.cell(*DEBT[kind])
    income = draw.cell(INCOME_EDGES, INCOME[kind])
    age = int(draw.cell(AGE_EDGES, AGE[kind]))
    occupation = OCCUPATIONS[draw.index([1] * len(OCCUPATIONS))]
    deciles = by_income(UTILISATION, income)
    birthday = int(draw.between(0, 12))  # month of the year in which a year is added; only 1, 2 and 3 show
    rows = []
    for month in range(MONTHS):
        utilisation = draw.cell(deciles, [1] * (len(deciles) - 1))
        behaviour = BEHAVIOURS[draw.index(by_income(BEHAVIOUR, income))]

        shown_age, luck = age + (0 < birthday <= month), draw.between(0, 1)
        if luck < AGE_MINUS_500:
            shown_age = -500
        elif luck < AGE_MINUS_500 + AGE_TOO_HIGH:
            shown_age = int(draw.between(133, 8701))
        too_high = draw.chance(INCOME_TOO_HIGH)
        shown_income = float(int(draw.between(250_000, 24_150_000))) if too_high else round(income, 2)
        age_end = "_" if draw.chance(AGE_UNDERSCORE) and shown_age != -500 else ""
        income_end = "_" if draw.chance(INCOME_UNDERSCORE) else ""
        debt_end = "_" if draw.chance(DEBT_UNDERSCORE) else ""
        shown_occupation = "_______" if draw.chance(UNKNOWN_OCCUPATION) else occupation
        shown_behaviour = "!@9#%8" if draw.chance(UNKNOWN_BEHAVIOUR) else behaviour
        question = (
            f"Age: {float(shown_age)}{age_end}, Occupation: {shown_occupation}, "
            f"Annual Income: {shown_income}{income_end}, Outstanding Debt: {round(debt, 2)}{debt_end}, "
            f"Credit Utilization Ratio: {round(utilisation, 2)}, Payment Behaviour: {shown_behaviour}"
        )
        answer = "_" if draw.chance(UNKNOWN_LABEL) else KINDS[kind][0]
        rows.append({"question": question, "answer": answer, "customer_id": f"C{number:05d}"})
    return rows


def generate(customers: int, seed: int) -> list[dict[str, str]]:
    """Return all rows, MONTHS for each customer, in order of customer."""
    draw = Draw(seed)
    rows: list[dict[str, str]] = []
    for number, kind in enumerate(customer_kinds(customers, draw), start=1):
        rows += customer_rows(number, kind, draw)
    return rows


def write_json(rows: list[dict[str, str]], path: Path) -> None:
    """Write one JSON list with a row a line, through a temporary name so that a killed run leaves no half file."""
    text = "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode("utf-8"))  # bytes: no line-end translation on any system
    os.replace(part, path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--customers", type=int, default=6000, help="customers, 4 rows each (default: 6000)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/creditmix_dataset.json"),
        help="file to write; replaced if it exists (default: data/creditmix_dataset.json)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.customers < 1:
        parser.error(f"--customers must be at least 1, got {args.customers}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: folder {args.out.parent} does not exist; create it or give another path")
    rows = generate(args.customers, args.seed)
    write_json(rows, args.out)
    print(f"wrote {len(rows)} rows of {args.customers} customers to {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
