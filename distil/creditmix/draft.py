"""Draft a task file from a table: kinds, ranges, labels and marks of missing values, with a list of what to check."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import InputError
from distil.files import atomic_writer, check_folder
from distil.tables import Notation, is_missing, name_key, nearest, read_cells, readings
from distil.tasks import MOST_LABELS, Task, task_of

MARKS = ("?", "NA", "N/A", "n/a", "nan", "NaN", "null", "NULL", "-", "--", "#N/A", "NM")  # of a missing value
BINARY = {0.0: "no", 1.0: "yes"}  # numbers mean nothing to a language model
ID_WORDS = "id uid uuid guid key index row number nr no"  # last word of a column of identifiers
OWNERS = "customer client person user applicant borrower patient account order case loan row"  # customerid
PROTECTED = (
    "age sex gender race ethnic ethnicity religion nationality foreign birth marital marriage disability pregnant"
)
LISTED_LABELS = 10  # with more the instruction does not list them: each prompt would be many times longer
TEXT_LETTERS = 40  # mean length from which words are free text


def draft_task(
    path: str, name: str, label_column: str, group_column: str | None, decimal: str | None
) -> tuple[Task, list[str]]:
    """Return a task for a table of labelled rows, and the guesses in it that people should check.
    name: of the task. decimal: mark of decimals where a column leaves it open. Raises InputError."""
    notes: Counter[str] = Counter()
    table = read_cells(path, notes)
    named = {flag: column for flag, column in (("label", label_column), ("group", group_column)) if column is not None}
    for flag, column in named.items():
        found = nearest(column, tuple(table))
        if found is None:
            raise InputError(f"{path}: --{flag}_column {column}: no such column; found {', '.join(table)[:900]}")
        named[flag] = found
    guesses = [f"{text} ({count} x)" for text, count in notes.items()]
    missing = sorted({cell.strip() for column in table for cell in table[column].unique()} & set(MARKS))
    labels, label_map, instruction_labels = _labels(path, table[named["label"]], missing, guesses)
    fields = []
    for column in table:
        if column not in named.values() and (field := _field(path, column, table[column], missing, decimal, guesses)):
            fields.append(field)
    if not fields:
        raise InputError(f"{path}: no column besides {' and '.join(named.values())} can be used")
    texts = [field for field in fields if field["kind"] != "number"]
    is_text = len(fields) == 1 and len(texts) == 1
    guesses = [guess for guess in guesses if not is_text or "different words" not in guess]  # of a text all are
    what = "text" if is_text else "row"
    wanted = " ".join(re.split(r"[\W_]+", named["label"])).strip().lower() or "label"
    record: dict[str, Any] = {"name": name, "instruction": f"Give the {wanted} of this {what}{instruction_labels}."}
    record |= {"labels": labels, "label_column": named["label"], "label_map": label_map, "missing": missing}
    record |= {"fields": [] if is_text else fields, "text_column": fields[0]["column"] if is_text else None}
    guesses.insert(0, f'instruction: "{record["instruction"]}"; say what a row is and what the labels mean')
    if not group_column:
        guesses.append("no --group_column: rows of one person or company may be on both sides of the split")
    return task_of(record | {"group_column": named.get("group")}, path), guesses


def _labels(path: str, column: Any, missing: Sequence[str], guesses: list[str]) -> tuple[list[str], dict, str]:
    """Return (labels, label_map, what the instruction says of them). Raises InputError for too many or too few."""
    counts = Counter(cell.strip() for cell in column if cell.strip())
    for text in [text for text in counts if text in missing or is_missing(text)]:
        read = f"{text} ({counts.pop(text)} rows), read as missing"
        guesses.append(f"left out of the labels: {read}; if it is a label, add it there")
    spelt: dict[str, str] = {}
    for text, _ in counts.most_common():  # the most frequent spelling of each
        spelt.setdefault(text.casefold(), text)
    labels = sorted(spelt.values(), key=lambda text: (_number(text), text.casefold()))
    if not 2 <= len(labels) <= MOST_LABELS:
        found = f"{len(labels)} different labels ({', '.join(labels[:5])} ...)"
        raise InputError(f"{path}: column {column.name} has {found}; 2 to 100 work")
    label_map = {}
    if len(labels) == 2 and {_number(label) for label in labels} == set(BINARY):  # also 0.0 and 1.0
        label_map, labels = {label: BINARY[_number(label)] for label in labels}, list(BINARY.values())
        guesses.append(f"label_map: {json.dumps(label_map)}, since numbers mean nothing to a model; take better words")
    elif all(math.isfinite(_number(label)) for label in labels):
        guesses.append("labels: numbers; words in label_map teach a model what they mean")
    of = Counter()
    for text, count in counts.items():
        of[label_map.get(text, spelt[text.casefold()])] += count
    rare = [f"{label} ({of[label]})" for label in labels if of[label] < 50]
    if rare:
        shown = ", ".join(rare[:8]) + " ..." * (len(rare) > 8)
        guesses.append(f"labels with few rows, of which 5 or more are needed for training: {shown}")
    shown = f": {', '.join(labels[:-1])} or {labels[-1]}" if len(labels) <= LISTED_LABELS else ""
    return labels, label_map, shown


def _number(text: str) -> float:
    """Return a label that is a number as one, infinity for a word."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def _field(
    path: str, column: str, cells: Any, missing: Sequence[str], decimal: str | None, guesses: list[str]
) -> dict[str, Any] | None:
    """Return a field of the task file, None for a column that says nothing of a row. Raises InputError."""
    texts = [text for text in (cell.strip() for cell in cells) if text and text not in missing]
    why = _useless(column, texts)
    if why:
        guesses.append(f"left out: {column or 'a column without a name'} ({why})")
        return None
    name = " ".join(re.sub(r"[:;,_\s]+", " ", column).split())[:60].strip()
    field: dict[str, Any] = {"name": name, "column": column, "kind": "word"}
    distinct = set(texts)
    if found := _numbers(path, column, cells, missing, decimal):
        numbers, others = found
        field |= {"kind": "number", "range": _range(numbers), "digits": _digits(numbers)}
        low, high = field["range"]
        if outside := sum(not low <= number <= high for number in numbers):
            guesses.append(f"{name}: {outside} values outside {low:,} to {high:,} will be Unknown")
        if others:
            shown = ", ".join(text[:40] for text, _ in others.most_common(3))
            guesses.append(f"{name}: {others.total()} values that are not numbers will be Unknown ({shown})")
    elif sum(map(len, texts)) > TEXT_LETTERS * len(texts) and len(distinct) > 0.5 * len(texts):
        field["kind"] = "text"
    elif len(distinct) > 200:
        guesses.append(f"{name}: {len(distinct)} different words; leave it out if it names persons")
    field["protected"] = bool(set(_words(column)) & set(PROTECTED.split()))
    if field["protected"]:
        guesses.append(f"{name}: protected, going by its name; leave it out where the law forbids its use")
    return field


def _words(column: str) -> list[str]:
    """Return the words of a column's name: 'CustomerID' -> ['customer', 'id']."""
    return re.findall("[^\\W\\d_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower())


def _useless(column: str, texts: Sequence[str]) -> str:
    """Return why a column says nothing of a row, '' for one that may. texts: its values that are not missing."""
    distinct, words = set(texts), _words(column)
    if not name_key(column):
        return "its rows could not be found by it"
    if len(distinct) < 2:
        return "one value in all rows" if distinct else "empty"
    owner = name_key(column).removesuffix("id")  # "paid" ends with "id" too
    names_rows = words[-1:] and words[-1] in ID_WORDS.split()
    names_rows = names_rows or (owner != name_key(column) and owner in OWNERS.split())
    if len(distinct) > 0.9 * len(texts) and names_rows:
        return "another value in each row"
    if names_rows and len(distinct) > max(20, 0.05 * len(texts)):
        return f"an id with {len(distinct)} values; --group_column {column} keeps rows of one value together"
    return ""


def _numbers(
    path: str, column: str, cells: Any, missing: Sequence[str], decimal: str | None
) -> tuple[list[float], Counter[str]] | None:
    """Return (numbers of a column, sorted; what else is in it, counted), None where it has words.
    It may have one or two other texts in many cells, which mark a missing number, or a few typing errors. Raises
    InputError for a number with two readings."""
    notation, found, others = Notation(decimal), [], Counter()
    for row, text in enumerate((cell.strip() for cell in cells), 2):  # the header is row 1
        if not text or text in missing or is_missing(text):
            continue
        if not readings(text):
            others[text] += 1
        elif re.fullmatch(r"0\d+", text):  # a code of a place or product, whose zeros count
            return None
        else:
            notation.see(row, text)
            found.append(text)
    marks = len(others) <= 2 and others.total() <= len(found) and len(set(found)) > 10
    if not found or not (marks or others.total() <= 0.05 * len(found)):
        return None
    notation.settle(path, column, Counter())
    return sorted(float(notation.plain(text).strip("_ $€£%")) for text in found), others


def _range(numbers: Sequence[float]) -> list[float]:
    """Return a wide range of plausible values: ten times the spread of the middle 98 % beyond it, in round numbers."""
    below = {number for number in numbers if number < 0}
    if len(below) == 1 and below <= {-99.0, -999.0, -9999.0, -99999.0}:  # marks a missing value
        numbers = [number for number in numbers if number >= 0] or numbers
    low, high = numbers[len(numbers) // 100], numbers[-1 - len(numbers) // 100]
    spread = 10 * (high - low) or max(abs(high), 1.0)
    return [0 if numbers[0] >= 0 else -_round_up(spread - low), _round_up(high + spread)]


def _round_up(value: float) -> float:
    """Return the value rounded up to one significant digit, 0 for one below 0."""
    if value <= 0:
        return 0
    step = 10.0 ** math.floor(math.log10(value))
    rounded = math.ceil(value / step) * step
    return int(rounded) if rounded >= 1 else round(rounded, 12)


def _digits(numbers: Sequence[float]) -> int:
    """Return how many digits to keep of sorted numbers: 3, or up to 6 where that would make different ones equal and
    change them by more than 1 % of the spread of the middle 98 %, as with years."""
    low, high = numbers[len(numbers) // 100], numbers[-1 - len(numbers) // 100]
    distinct, largest = set(numbers), max(abs(low), abs(high)) or 1.0
    for digits in (3, 4, 5):
        error = 10.0 ** (math.floor(math.log10(largest)) - digits + 1) / 2
        if error <= 0.01 * (high - low) or len({float(f"{x:.{digits}g}") for x in distinct}) == len(distinct):
            return digits
    return 6


def task_lines(task: Task) -> list[str]:
    """Return the fields of a task for people: name, kind, range of numbers, and what it predicts."""
    lines = []
    for field in task.fields:
        limits = f"{field.range[0]:,} to {field.range[1]:,}, {field.digits} digits" if field.kind == "number" else ""
        lines.append(f"{field.name:<30} {field.kind:<8} {limits}".rstrip())
    lines += [f"text in column {task.text_column}"] if task.text_column else []
    shown = ", ".join(task.labels[:LISTED_LABELS]) + " ..." * (len(task.labels) > LISTED_LABELS)
    return [*lines, f"{len(task.labels)} labels: {shown}"]


def task_text(task: Task) -> str:
    """Return the task file's content, each field on one line."""
    record = task.record
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    if record["fields"]:
        listed = ",\n".join(f"    {json.dumps(one, ensure_ascii=False)}" for one in record["fields"])
        lines[list(record).index("fields")] = f'  "fields": [\n{listed}\n  ]'
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_draft(target: str, task: Task) -> None:
    """Write a task file. Raises InputError where there is one: people may have edited it."""
    path = Path(target)
    if path.exists():
        raise InputError(f"{path}: exists; remove it, or give --init_task another name")
    check_folder(path.parent)
    with atomic_writer(path) as out:
        out.write(task_text(task))
