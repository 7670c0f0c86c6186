"""Rows of a label task: read labelled files of any kind, and draw samples of their rows."""

from __future__ import annotations

import json
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
from distil.tables import is_missing, json_rows, match_labels, name_key, read_table
from distil.tasks import Task

PAIR = ("question", "answer")  # of JSON rows that have their feature string
_NUMBER_ID = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class CreditRow:
    """One labelled row: canonical feature string or text, one of the task's labels, and the key that the split hashes:
    the customer, or another group."""

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
    short = re.fullmatch(r"[+-]?[0-9](?:[.,]([0-9]*))?[eE]\+([0-9]+)", text)  # 1.23457E+11
    if short and len(short[1] or "") < int(short[2]):
        raise ValueError(f"the customer id {text} has lost digits in a spreadsheet; store the ids as text there")
    if not _NUMBER_ID.fullmatch(text):
        return text
    if re.fullmatch("[+-]?[0-9]+", text):
        return str(int(text)) if len(text) < 400 else text
    if abs(number := float(text)) < 2**53:
        return str(int(number)) if number.is_integer() else repr(number)
    if "." in text or "e+" in text.casefold():  # not the likes of '12e45', which may be hexadecimal
        raise ValueError(f"the customer id {text[:40]} has lost digits as a number with a point; write whole numbers")
    return text


def _raw_table(path: Path, task: Task, objects: list | None, decimal: str | None, notes: Counter) -> Iterator[tuple]:
    """Yield (place, customer id as it is, feature string, label) of each row of a table."""
    columns = list(task.feature_columns)
    names = [task.by_column.get(column, column) for column in columns]
    table = read_table(path, task.columns, decimal, notes, objects)
    ids = table[task.group_column] if task.group_column else [None] * len(table)
    cells = zip(table.index, ids, table[task.label_column], *(table[column] for column in columns), strict=True)
    for row, customer, label, *values in cells:
        yield f"row {row}", customer, task.features(dict(zip(names, values, strict=True))), label


def _raw_json(path: Path, objects: list) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (place, customer id as it is, feature string, label) of each question with its answer."""
    for number, row in enumerate(objects):
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("question", "answer")):
            found = json.dumps(row)[:80]
            raise InputError(f'{path}: item {number} needs "question" and "answer" as strings, found {found}')
        yield f"item {number}", row.get("customer_id"), row["question"], row["answer"]


def read_rows(path: str | Path, task: Task, decimal: str | None = None) -> tuple[list[CreditRow], Counter]:
    """Return cleaned, labelled rows of a raw file, and counts of what was cleaned or assumed.
    The file is a table with the task's columns as `read_table` takes it, or JSON of PAIR where these are not its
    columns. decimal: "," or ".", the mark of decimals that a column of a table leaves open. An unknown label (`_`)
    is filled from the customer's other rows where they agree, else the row is dropped. A row without a customer id
    counts as one customer, keyed by its canonical text. Raises InputError (file, row)."""
    path, notes, raw, rows = Path(path), Counter(), [], []
    labels_of: dict[str, set[str]] = defaultdict(set)
    own = {name_key(column) for column in task.columns} & set(PAIR)
    objects = json_rows(path, () if own else PAIR)
    as_table = objects is None or own
    as_table = as_table or (objects and all(isinstance(o, dict) and not set(PAIR) & set(o) for o in objects))
    source = _raw_table(path, task, objects, decimal, notes) if as_table else _raw_json(path, objects)
    for place, name, question, answer in source:
        try:
            name = "" if name in task.missing else customer_id(name)
            raw.append((name, task.canonical(question, notes), answer))
        except (ValueError, InputError) as error:
            raise InputError(f"{path}: {place}: {error}") from None
    known = {label: label for label in task.labels} | dict(task.label_map)
    labels = match_labels(path, (answer for *_, answer in raw), known, notes, task.missing)
    raw = [(customer or features, features, label) for (customer, features, _), label in zip(raw, labels, strict=True)]
    for customer, _, label in raw:
        labels_of[customer] |= {label} - {None}
    for customer, features, label in raw:
        if not features:
            notes["empty text: row dropped"] += 1
            continue
        if label is None:
            filled = task.group_column is not None and len(labels_of[customer]) == 1
            notes["label _: filled from the customer's other rows" if filled else "label _: row dropped"] += 1
            if not filled:
                continue
            (label,) = labels_of[customer]
        rows.append(CreditRow(customer, features, label))
    if not rows:
        raise InputError(f"{path}: no labelled rows")
    return rows, notes


def note_anonymous(rows: Sequence[CreditRow], task: Task) -> None:
    """Print a note where rows have no customer id: the split cannot keep one person's rows together."""
    anonymous = sum(row.customer == row.features for row in rows) if task.group_column else 0
    if anonymous:
        risk = "rows of one person may be on both sides of the split, and all figures too good"
        print(f"note: {anonymous} rows have no customer id, each text counts as a customer: {risk}", file=sys.stderr)


def balanced_sample(rows: Sequence[CreditRow], labels: Sequence[str], per_class: int, seed: int) -> list[CreditRow]:
    """Return `per_class` rows of each label, shuffled. Raises InputError where a class has fewer."""
    rng = random.Random(seed)
    sample = []
    for label in labels:
        members = [row for row in rows if row.label == label]
        if len(members) < per_class:
            raise InputError(f"{per_class} rows a class requested, but only {len(members)} are {label}")
        sample += rng.sample(members, per_class)
    rng.shuffle(sample)
    return sample


def sample_rows(rows: Sequence[CreditRow], task: Task, per_class: int | None, seed: int) -> list[CreditRow]:
    """Return a shuffled sample for training or evaluation: equally many rows of each label where the task is balanced
    (per_class 0 or None: as many as the rarest has), else all rows, or at most `per_class` of each label.
    Raises InputError where there are too few."""
    counts = Counter(row.label for row in rows)
    if task.balanced:
        fewest = min(counts[label] for label in task.labels)
        return balanced_sample(rows, task.labels, per_class or max(1, fewest), seed)
    if not rows:
        raise InputError("no row is in this part of the split; give more rows, or another --split_seed")
    sample, taken, kept = list(rows), Counter(), []
    random.Random(seed).shuffle(sample)
    for row in sample:
        taken[row.label] += 1
        if not per_class or taken[row.label] <= per_class:
            kept.append(row)
    return kept
