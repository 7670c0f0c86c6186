"""CreditMix rows: clean raw values, build feature strings and prompts, read labelled files.

Everything that turns a feature string into what a model sees is here once, so a request is encoded as in training.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import InputError
from distil.files import parse_json, read_jsonl, read_text

LABELS = ("Good", "Standard", "Bad")
UNKNOWN = "Unknown"
AMOUNTS = ("Annual Income", "Outstanding Debt")
CREDIT_FIELDS = ("Age", "Occupation", *AMOUNTS, "Credit Utilization Ratio", "Payment Behaviour")
CSV_COLUMNS = {field.replace(" ", "_"): field for field in CREDIT_FIELDS}
# Outside these ranges a value is an entry error of the published data (ages of -500 and 8000, incomes of 24 million).
PLAUSIBLE = {"Age": (1, 110), "Credit Utilization Ratio": (0, 100)} | dict.fromkeys(AMOUNTS, (0, 1_000_000))
NO_FIELD = f"the text has no field of {', '.join(CREDIT_FIELDS)}"  # a note of `canonical_features`
# Digits that continue after a comma or point without being a number ("12,53,000") stay as they are.
_NUMBER = re.compile(r"(?<![\d.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![.,]?\d)")


def canonical_number(value: float) -> str:
    """Return three significant digits, no exponent, whole from 10 up: 19114.12 -> 19100, 35.27 -> 35."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 10:
        rounded = float(round(rounded))
    return str(int(rounded)) if rounded.is_integer() else f"{rounded:.12f}".rstrip("0").rstrip(".")


def _short(match: re.Match) -> str:
    """Return a number found in a text in canonical form; unchanged where it is too large for a float."""
    number = float(match[0].replace(",", ""))
    return canonical_number(number) if math.isfinite(number) else match[0]


def clean_field(field: str, value: str, notes: Counter | None = None) -> str:
    """Return one value in canonical form; `Unknown` where the published data marks it as missing.
    notes: counts what was changed (beyond rounding), by a description for people."""
    note = (lambda text: notes.update([text])) if notes is not None else (lambda text: None)
    text = value.strip()
    bare = text.strip("_ $€£%" if field in PLAUSIBLE else "_ ")
    if bare in ("", "!@9#%8", "NM", "nan", "NaN", UNKNOWN):
        if bare != UNKNOWN:
            note(f"{field}: missing ({text or 'empty'}) -> {UNKNOWN}")
        return UNKNOWN
    if not _NUMBER.fullmatch(bare):
        if field in PLAUSIBLE:
            note(f"{field}: not a number -> {UNKNOWN}")
            return UNKNOWN
        return text
    number = float(bare.replace(",", ""))
    low, high = PLAUSIBLE.get(field, (-math.inf, math.inf))
    if not low <= number <= high or not math.isfinite(number):
        note(f"{field}: outside {low:g}..{high:g} -> {UNKNOWN}")
        return UNKNOWN
    if bare != text:
        note(f"{field}: stray {text[0] if text[0] in '_$€£' else text[-1]} removed")
    return canonical_number(number)


def parse_features(text: str) -> dict[str, str] | None:
    """Parse 'Age: 23, Occupation: Lawyer' to {'Age': '23', 'Occupation': 'Lawyer'}; None where it is not such a list.
    A comma may belong to the value of a field of words: 'Occupation: Doctor, retired'."""
    pairs: dict[str, str] = {}
    field = ""
    for part in re.split(r",\s+|,(?=[A-Za-z][\w ]*:)|[;\n][;\s]*", text.strip().rstrip(".,;")):
        key, colon, value = part.partition(":")
        if not colon and part and field in CREDIT_FIELDS and field not in PLAUSIBLE:
            pairs[field] += f", {part.strip()}"
            continue
        if not colon or not key.strip() or len(key) > 60:
            return None
        field = key.strip()
        credit_field = field.replace("_", " ").title()
        field = credit_field if credit_field in CREDIT_FIELDS else field
        pairs[field] = value.strip()
    return pairs


def canonical_features(text: str, notes: Counter | None = None) -> str:
    """Return the feature string as models see it in training, evaluation and serving.
    The six fields come first, complete and in one order (missing: Unknown), numbers in one short form. Text that is
    not a list of fields keeps its words. notes: see `clean_field`."""
    pairs = parse_features(text)
    if any(field in (pairs or {}) for field in CREDIT_FIELDS):
        pairs = {field: pairs.get(field, UNKNOWN) for field in CREDIT_FIELDS} | pairs
    elif notes is not None:
        notes[NO_FIELD] += 1
    if pairs is None:
        return _NUMBER.sub(_short, text.strip())
    return ", ".join(f"{field}: {clean_field(field, value, notes)}" for field, value in pairs.items())


def creditmix_prompt(features: str, notes: Counter | None = None) -> str:
    """Return the user turn for a feature string, made canonical here so that no caller can forget it."""
    return f"Rate the credit mix of this customer as Good, Standard or Bad.\n{canonical_features(features, notes)}"


# Content-free inputs after Zhao et al. 2021 (Calibrate Before Use): what the template alone makes the model predict.
NULL_FEATURES = (
    ", ".join(f"{field}: {UNKNOWN}" for field in CREDIT_FIELDS),
    *("N/A", "[MASK]", UNKNOWN, "-"),
    ", ".join(f"{field}: -" for field in CREDIT_FIELDS),
    "...",
)


def null_prompts(count: int = len(NULL_FEATURES)) -> list[str]:
    """Return `count` user turns without content, for the prior; not cleaned, which would make some of them equal."""
    head = creditmix_prompt("x").removesuffix("x")
    return [head + text for text in NULL_FEATURES[:count]]


NO_CUSTOMER = ("", "nan", "none", "null", "n/a", "na", "<na>", "nat", "-", "_", UNKNOWN.casefold())
_NUMBER_ID = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class CreditRow:
    """One labelled customer-month: canonical feature string, label in LABELS, and the key that the split hashes."""

    customer: str
    features: str
    label: str


def customer_id(value: Any) -> str:
    """Return one spelling of a customer (' 17', '1.7e1', 17 and 17.0 are '17'), who would else be in two parts of the
    split; '' where there is none. '017' is another customer than 17: zeros in front are part of a text id, and what
    reads ids as numbers loses them in all rows. Raises ValueError for values that cannot be an id."""
    if value is not None and type(value) not in (str, int, float):
        raise ValueError(f"a customer id is a text or a number, found {json.dumps(value)[:40]}")
    text = "" if value is None else repr(value) if type(value) is float else str(value).replace("\ufeff", "").strip()
    if text.casefold() in NO_CUSTOMER:
        return ""
    if not _NUMBER_ID.fullmatch(text):
        return text
    if re.fullmatch("[+-]?[0-9]+", text):
        return str(int(text)) if len(text) < 400 else text
    if abs(number := float(text)) < 2**53:
        return str(int(number)) if number.is_integer() else repr(number)
    if "." in text or "e+" in text.casefold():  # not the likes of '12e45', which may be hexadecimal
        raise ValueError(f"the customer id {text[:40]} has lost digits as a number with a point; write whole numbers")
    return text


def _cell(field: str, value: str) -> str:
    """Return a CSV cell without what would begin another field of a feature string."""
    value = re.sub(r"[:;\r\n]+", " ", value)
    return re.sub(r",\s+", ",", value) if field in PLAUSIBLE else value


def _raw_csv(path: Path, text: str) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (place, customer id as it is, feature string, label) of each row of the Kaggle CSV."""
    reader = csv.DictReader(io.StringIO(text))
    reader.fieldnames = columns = [name.strip("\ufeff \t") for name in reader.fieldnames or []]
    if len(columns) < 2:
        raise InputError(
            f"{path}: empty, or not separated by commas; a header with {', '.join(CSV_COLUMNS)} is needed"
        )
    needed, folded = (*CSV_COLUMNS, "Credit_Mix", "Customer_ID"), [name.casefold() for name in columns]
    if missing := [name for name in needed if name not in columns]:
        raise InputError(f"{path}: column {', '.join(missing)} missing; found {', '.join(columns)}")
    if twice := [name for name in needed if folded.count(name.casefold()) > 1]:
        raise InputError(f"{path}: column {', '.join(twice)} occurs twice; keep one")
    while True:
        place = f"{path}: line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{place}: {error}; is a quotation mark not closed?") from None
        if row is None:
            return
        if None in row or None in row.values():
            raise InputError(f"{place} has another number of cells than the header")
        features = ", ".join(f"{field}: {_cell(field, row[column])}" for column, field in CSV_COLUMNS.items())
        yield place, row["Customer_ID"], features, row["Credit_Mix"]


def _raw_json(path: Path, text: str) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (place, customer id as it is, feature string, label) of each row of a JSON list or JSONL file."""
    if text.lstrip().startswith("["):
        try:
            rows, first, unit = parse_json(text, unique=True), 0, "item"
        except ValueError as error:
            raise InputError(f"{path}: not a JSON list ({error})") from None
    else:
        rows, first, unit = read_jsonl(path, ("question", "answer")), 1, "row"
    for number, row in enumerate(rows, first):
        place = f"{path}: {unit} {number}"
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("question", "answer")):
            raise InputError(f'{place} needs "question" and "answer" as strings, found {json.dumps(row)[:80]}')
        yield place, row.get("customer_id"), row["question"], row["answer"]


def read_creditmix(path: str | Path) -> tuple[list[CreditRow], Counter]:
    """Return cleaned, labelled rows of a raw file (Kaggle CSV, JSON list or JSONL) and counts of what was cleaned.
    An unknown label (`_`) is filled from the customer's other rows where they agree, else the row is dropped. A row
    without a customer id counts as one customer, keyed by its canonical text. Raises InputError (file, line)."""
    path, notes, raw, rows = Path(path), Counter(), [], []
    labels_of: dict[str, set[str]] = defaultdict(set)
    read = _raw_csv if path.suffix.lower() == ".csv" else _raw_json
    for place, name, question, answer in read(path, read_text(path)):
        features, label = canonical_features(question, notes), answer.strip()
        try:
            customer = customer_id(name)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        if label in LABELS:
            labels_of[customer or features].add(label)
        elif label.strip("_"):
            raise InputError(f"{place}: unknown label {label!r}; expected {', '.join(LABELS)} or _")
        raw.append((customer or features, features, label))
    for customer, features, label in raw:
        if label not in LABELS:
            filled = len(labels_of[customer]) == 1
            notes["label _: filled from the customer's other rows" if filled else "label _: row dropped"] += 1
            if not filled:
                continue
            (label,) = labels_of[customer]
        rows.append(CreditRow(customer, features, label))
    if not rows:
        raise InputError(f"{path}: no labelled rows")
    return rows, notes


def note_anonymous(rows: Sequence[CreditRow]) -> None:
    """Print a note where rows have no customer id: the split cannot keep one person's rows together."""
    if anonymous := sum(row.customer == row.features for row in rows):
        risk = "rows of one person may be on both sides of the split, and all figures too good"
        print(f"note: {anonymous} rows have no customer id, each text counts as a customer: {risk}", file=sys.stderr)


def balanced_sample(rows: Sequence[CreditRow], per_class: int, seed: int) -> list[CreditRow]:
    """Return `per_class` rows of each label, shuffled. Raises InputError where a class has fewer."""
    rng = random.Random(seed)
    sample = []
    for label in LABELS:
        members = [row for row in rows if row.label == label]
        if len(members) < per_class:
            raise InputError(f"{per_class} rows a class requested, but only {len(members)} are {label}")
        sample += rng.sample(members, per_class)
    rng.shuffle(sample)
    return sample
