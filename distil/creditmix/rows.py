"""CreditMix rows: clean raw values, build feature strings and prompts, read labelled files.

Everything that turns a feature string into what a model sees is here once, so a request is encoded as in training.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import InputError
from distil.tables import is_missing, json_rows, match_labels, name_key, nearest, read_table

LABELS = ("Good", "Standard", "Bad")
UNKNOWN = "Unknown"
AMOUNTS = ("Annual Income", "Outstanding Debt")
CREDIT_FIELDS = ("Age", "Occupation", *AMOUNTS, "Credit Utilization Ratio", "Payment Behaviour")
# Outside these ranges a value is an entry error of the published data (ages of -500 and 8000, incomes of 24 million).
PLAUSIBLE = {"Age": (1, 110), "Credit Utilization Ratio": (0, 100)} | dict.fromkeys(AMOUNTS, (0, 1_000_000))
COLUMNS = {field: "number" if field in PLAUSIBLE else "text" for field in CREDIT_FIELDS}
COLUMNS |= {"Credit_Mix": "text", "Customer_ID": "id"}  # of a table of raw rows
# Notes of `canonical_features`: without a field, with one of another name, with one of nearly this name.
NO_FIELD = f"the text has no field of {', '.join(CREDIT_FIELDS)}"
OTHER_FIELD, NEAR_FIELD = f"is not a field ({', '.join(CREDIT_FIELDS)} are)", "taken as"
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


def parse_features(text: str, notes: Counter | None = None) -> dict[str, str] | None:
    """Parse 'Age: 23, Occupation: Lawyer' to {'Age': '23', 'Occupation': 'Lawyer'}; None where it is not such a list.
    A comma may belong to the value of a field of words: 'Occupation: Doctor, retired'. A name that is nearly one of
    CREDIT_FIELDS is taken as it, which notes count. Raises InputError for a field that is there twice."""
    pairs: dict[str, str] = {}
    field, twice = "", ""
    for part in re.split(r",\s+|,(?=[A-Za-z][\w ]*:)|[;\n][;\s]*", text.strip().rstrip(".,;")):
        key, colon, value = part.partition(":")
        if not colon and part and field in CREDIT_FIELDS and field not in PLAUSIBLE:
            pairs[field] += f", {part.strip()}"
            continue
        if not colon or not key.strip() or len(key) > 60:
            return None
        written = key.strip()
        field = nearest(written, CREDIT_FIELDS) or written
        if notes is not None and name_key(field) != name_key(written):
            notes[f"{written}: {NEAR_FIELD} {field}"] += 1
        twice = field if field in pairs else twice
        pairs[field] = value.strip()
    if twice:
        raise InputError(f"{twice} occurs twice in one feature string; keep one")
    return pairs


def canonical_features(text: str, notes: Counter | None = None) -> str:
    """Return the feature string as models see it in training, evaluation and serving.
    The six fields come first, complete and in one order (missing: Unknown), numbers in one short form. Text that is
    not a list of fields keeps its words. notes: see `clean_field`; `doubts` finds what matters most in them. Raises
    InputError for a field that is there twice."""
    pairs = parse_features(text, notes)
    if any(field in (pairs or {}) for field in CREDIT_FIELDS):
        if notes is not None:
            notes.update(f"{field} {OTHER_FIELD}" for field in pairs if field not in CREDIT_FIELDS)
        pairs = {field: pairs.get(field, UNKNOWN) for field in CREDIT_FIELDS} | pairs
    elif notes is not None:
        notes[NO_FIELD] += 1
    if pairs is None:
        return _NUMBER.sub(_short, text.strip())
    return ", ".join(f"{field}: {clean_field(field, value, notes)}" for field, value in pairs.items())


def doubts(notes: Counter[str]) -> list[str]:
    """Return what of a feature string could not be read, or only by a guess. notes: of `canonical_features` on it."""
    unread = [note for note in notes if "not a number" in note or "outside" in note]
    result = [f"{'; '.join(unread)} (write plain numbers: Age: 23, Annual Income: 19114)"] if unread else []
    result += [note for note in notes if OTHER_FIELD in note or f": {NEAR_FIELD} " in note]
    return result + [f"{NO_FIELD}; the answer means little"] * (NO_FIELD in notes)


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
    text = "" if value is None else repr(value) if type(value) is float else str(value)
    text = unicodedata.normalize("NFKC", text)  # wide digits, composed letters, unbreakable blanks
    text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf").strip()  # without marks of no width
    if is_missing(text):
        return ""
    if not _NUMBER_ID.fullmatch(text):
        return text
    if re.fullmatch("[+-]?[0-9]+", text):
        return str(int(text)) if len(text) < 400 else text
    short = re.fullmatch(r"[+-]?[0-9](?:\.([0-9]*))?[eE]\+([0-9]+)", text)  # 1.23457E+11
    if short and len(short[1] or "") < int(short[2]):
        raise ValueError(f"the customer id {text} has lost digits in a spreadsheet; store the ids as text there")
    if abs(number := float(text)) < 2**53:
        return str(int(number)) if number.is_integer() else repr(number)
    if "." in text or "e+" in text.casefold():  # not the likes of '12e45', which may be hexadecimal
        raise ValueError(f"the customer id {text[:40]} has lost digits as a number with a point; write whole numbers")
    return text


def _cell(field: str, value: str) -> str:
    """Return a CSV cell without what would begin another field of a feature string."""
    value = re.sub(r"[:;\r\n]+", " ", value)
    return re.sub(r",\s+", ",", value) if field in PLAUSIBLE else value


def _raw_table(path: Path, objects: list | None, decimal: str | None, notes: Counter) -> Iterator[tuple]:
    """Yield (place, customer id as it is, feature string, label) of each row of a table."""
    for row, *cells, label, customer in read_table(path, COLUMNS, decimal, notes, objects).itertuples(name=None):
        pairs = zip(CREDIT_FIELDS, cells, strict=True)
        yield f"row {row}", customer, ", ".join(f"{field}: {_cell(field, cell)}" for field, cell in pairs), label


def _raw_json(path: Path, objects: list) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (place, customer id as it is, feature string, label) of each question with its answer."""
    for number, row in enumerate(objects):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("question", "answer")):
            found = json.dumps(row)[:80]
            raise InputError(f'{path}: item {number} needs "question" and "answer" as strings, found {found}')
        yield f"item {number}", row.get("customer_id"), row["question"], row["answer"]


def read_creditmix(path: str | Path, decimal: str | None = None) -> tuple[list[CreditRow], Counter]:
    """Return cleaned, labelled rows of a raw file, and counts of what was cleaned or assumed.
    The file is a table with COLUMNS as `read_table` takes it, or JSON of {"question", "answer"}. decimal: "," or ".",
    the mark of decimals where a column of a table leaves it open. An unknown label (`_`) is filled from the customer's
    other rows where they agree, else the row is dropped. A row without a customer id counts as one customer, keyed by
    its canonical text. Raises InputError (file, row)."""
    path, notes, raw, rows = Path(path), Counter(), [], []
    labels_of: dict[str, set[str]] = defaultdict(set)
    objects = json_rows(path, ("question", "answer"))
    as_table = objects is None or (
        objects and all(isinstance(o, dict) and not {"question", "answer"} & set(o) for o in objects)
    )
    source = _raw_table(path, objects, decimal, notes) if as_table else _raw_json(path, objects)
    for place, name, question, answer in source:
        try:
            raw.append((customer_id(name), canonical_features(question, notes), answer))
        except (ValueError, InputError) as error:
            raise InputError(f"{path}: {place}: {error}") from None
    labels = match_labels(path, (answer for *_, answer in raw), {label: label for label in LABELS}, notes)
    raw = [(customer or features, features, label) for (customer, features, _), label in zip(raw, labels, strict=True)]
    for customer, _, label in raw:
        labels_of[customer] |= {label} - {None}
    for customer, features, label in raw:
        if label is None:
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
