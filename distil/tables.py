"""Tables as people have them: CSV in any separator and encoding, Excel, Parquet or JSON objects, read with pandas.

Columns are found by name, whatever its case, blanks and underscores. Numbers are read in the notation of their column.
What has two readings is refused with both of them, and what was assumed is noted.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.sheets import all_rows, cell_text, json_rows, object_rows

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "nan", "none", "null", "n/a", "na", "<na>", "nat", "-", "unknown")  # of ids and labels; also "_"
NEAR = 0.94  # similarity from which a name is taken as another: one letter in nine may be missing
_NUMBER = re.compile(r"([_\s$€£%]*-?)\+?(\d[\d.,'\u2019\s]*?|[.,]\d+)([eE][+-]?\d+)?([_\s$€£%]*)")
_GROUPS = {",": r"[1-9]\d{0,2}(,\d{3})+|[1-9]\d?(,\d{2})+,\d{3}", ".": r"[1-9]\d{0,2}(\.\d{3})+"}  # 12,53,000 in India

# --------------------------------------------------------------------------------------------------------------- names


@functools.lru_cache(4096)
def name_key(name: str) -> str:
    """Return what the spellings of one name share: ' annual_income', 'AnnualIncome' -> 'annualincome'."""
    return "".join(sign for sign in name.casefold() if sign.isalnum())


@functools.lru_cache(4096)
def nearest(name: str, names: tuple[str, ...]) -> str | None:
    """Return the one of `names` that `name` spells, or nearly spells ('Payment Behavior'); None where none or several
    are as near. Numbers must be equal: 'pay_amount_1' is not 'pay_amount_2'."""
    keys = {name_key(other): other for other in names}
    key = name_key(name)
    close = [key] if key in keys else difflib.get_close_matches(key, keys, cutoff=NEAR)
    same = len(close) == 1 and re.findall(r"\d+", close[0]) == re.findall(r"\d+", key)
    return keys[close[0]] if same else None


def is_missing(text: str) -> bool:
    """Return whether a label or an id is one of the marks of a missing value: empty, nan, `_` ..."""
    return text.strip().strip("_").casefold() in MISSING


def match_labels(
    path: str | Path, texts: Iterable[str], labels: Mapping[str, str], notes: Counter, missing: Sequence[str] = ()
) -> list[str | None]:
    """Return the label of each text, None where it is missing. labels: {text: label}, matched in any case; those taken
    in another case are counted in notes. missing: further marks of a missing label. Raises InputError that lists all
    unknown labels with their counts."""
    by_key, known, unknown = {text.casefold(): label for text, label in labels.items()}, [], Counter()
    for text in (text.strip() for text in texts):
        label = by_key.get(text.casefold())
        known.append(label)
        if label is None and text not in missing and not is_missing(text):
            unknown[text] += 1
        elif label is not None and text not in labels:
            notes[f"label {text}: read as {label}"] += 1
    if unknown:
        counts = ", ".join(f"{text[:40]!r} ({count})" for text, count in unknown.most_common(20))
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        raise InputError(f"{path}: unknown label {counts}{more}; expected {', '.join(labels)} or _")
    return known


# ------------------------------------------------------------------------------------------------------------- numbers


def readings(text: str) -> dict[str, str]:
    """Return {mark of decimals: the text with its number in plain form} for each way to read a number.
    '1.234,5 €' -> {',': '1234.5 €'}; '19.114' -> {'.': '19.114', ',': '19114'}; '$19' -> {'': '$19'}, which needs no
    mark; {} where it is not a number."""
    whole, point, fraction = text.partition(".")
    if text.isascii() and whole.isdecimal() and len(text) < 60:  # first what nearly all cells of a large table are
        if not point:
            return {"": text}
        if fraction.isdecimal() and (len(fraction) != 3 or len(whole) > 3 or whole[0] == "0"):
            return {".": text}
    match = _NUMBER.fullmatch(text) if len(text) < 60 and "\n" not in text else None
    if not match:
        return {}
    before, number, exponent, after = match.groups(default="")
    number, found = re.sub(r"(?<=\d)['\u2019\s](?=\d{3}(?!\d))", "", number), {}  # 19 114,12 and 19'114.12
    for decimal, thousands in ((".", ","), (",", ".")):
        whole, _, fraction = number.partition(decimal)
        grouped = thousands in whole and not exponent and re.fullmatch(_GROUPS[thousands], whole)
        if (grouped or not whole or whole.isdecimal()) and (not fraction or fraction.isdecimal()):
            plain = (whole.replace(thousands, "") or "0") + ("." + fraction if fraction else "")
            found[decimal] = before + plain + exponent + after
    return {"": found["."]} if len(set(found.values())) < len(found) else found


class Notation:
    """How the numbers of a column are written, from all of its values."""

    def __init__(self, decimal: str | None):
        """decimal: "," or ".", how to read what the column leaves open."""
        self.decimal, self.marks, self.first_open = decimal, set(), None

    def see(self, row: int, text: str) -> None:
        """Take note of a value."""
        found = readings(text)
        if len(found) == 1:
            self.marks.update(found)
        elif found and self.first_open is None:
            self.first_open = row, text, found

    def settle(self, path: str | Path, name: str, notes: Counter) -> None:
        """Decide for what was seen of the column `name`. Raises InputError for a value with two readings that neither
        the column nor `decimal` settles."""
        marks = sorted(self.marks - {""})
        if not self.decimal and len(marks) == 1:
            (self.decimal,) = marks
        if self.first_open and not self.decimal:
            row, text, found = self.first_open
            why = "the column has numbers of both kinds" if marks else "no other value of the column decides"
            fix = f"--decimal . reads {found['.'].strip()}, --decimal , reads {found[','].strip()}"
            raise InputError(f'{path}: row {row}, column {name}: "{text}" has two readings and {why}: {fix}')
        if self.first_open and marks and self.decimal not in marks:
            _, text, found = self.first_open
            against = f"though only {marks[0]} marks decimals in other values"
            notes[f'column {name}: --decimal reads "{text}" as {found[self.decimal].strip()}, {against}'] += 1
        if "," in marks:
            notes[f"column {name}: numbers with a decimal comma{', others with a point' * ('.' in marks)}"] += 1

    def plain(self, text: str) -> str:
        """Return a value with its number in plain form."""
        found = readings(text)
        return found.get(self.decimal) or next(iter(found.values()), text)


# -------------------------------------------------------------------------------------------------------------- tables


class Table:
    """A table file whose columns are found by name and whose numbers' notation is decided by one pass over its rows.

    Iterated over, it gives (row, cells, {column: value}) of each row that has a filled cell, a CSV's from the file
    each time. row: as a spreadsheet counts, the header is row 1; objects count from 1. Values are as `read_table` has
    them, lists and objects as they are. header: its cells as text; count: of the rows; columns: {name: kind} of those
    that it has."""

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, str],
        decimal: str | None,
        notes: Counter,
        objects: Any = None,
        instead: str | None = None,
    ):
        """See `read_table`. instead: a column of text that is taken where none of `columns` is there; with it, one of
        them is enough, and notes say which are missing. Raises InputError."""
        self.path, self.count = Path(path), 0
        objects = json_rows(path) if objects is None else objects
        if objects is None:
            keys = {name_key(name) for name in columns}
            fit = lambda cells: (len(keys & {name_key(cell) for cell in cells}), len(cells))  # noqa: E731
            self._rows = all_rows(self.path, fit, notes)
        else:
            if odd := next((i for i, row in enumerate(objects, 1) if not isinstance(row, dict)), None):
                raise InputError(f"{path}: row {odd} is not an object with {', '.join(columns)}")
            self._rows = object_rows(objects)
        header = next((cells for _, cells in self._rows() if any(map(cell_text, cells))), None)
        if header is None:
            wanted = f"a header with {', '.join(columns)}" if columns else "a header and rows"
            raise InputError(f"{path}: empty; {wanted} is needed")
        self.header = [cell_text(cell) for cell in header]
        if instead and name_key(instead) in map(name_key, self.header):
            known = any(nearest(cell, (name,)) for name in columns for cell in self.header)
            columns = columns if known else {instead: "text"}
        self._places = _cells_of(self.path, self.header, columns, notes, instead is not None)
        self.columns = {name: kind for name, kind in columns.items() if name in self._places}
        self._notations = {name: Notation(decimal) for name, kind in self.columns.items() if kind == "number"}
        numbers = [(self._places[name], notation) for name, notation in self._notations.items()]
        for row, cells in self._filled():
            self.count += 1
            for place, notation in numbers:
                if isinstance(cells[place], str):
                    notation.see(row, cells[place])
        for name, notation in self._notations.items():
            notation.settle(path, name, notes)
        notes.update(f"column {name} missing: Unknown in all rows" for name in columns if name not in self._places)

    def _filled(self) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (row, cells) of each row below the header that has a filled cell."""
        filled = ((row, cells) for row, cells in self._rows() if any(map(cell_text, cells)))
        next(filled)
        return filled

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any], dict[str, Any]]]:
        for row, cells in self._filled():
            yield row, cells, {name: self._value(name, kind, cells) for name, kind in self.columns.items()}

    def _value(self, name: str, kind: str, cells: Sequence[Any]) -> Any:
        value = cells[self._places[name]]
        if isinstance(value, str):
            return self._notations[name].plain(value) if kind == "number" else value
        same = isinstance(value, dict | list) or (kind == "id" and isinstance(value, int | float))
        return value if same else cell_text(value)


def _cells_of(path: Path, header: Sequence[str], names: Iterable[str], notes: Counter, some: bool) -> dict[str, int]:
    """Return {column: its place in the header}. some: not all are needed. Raises InputError for one that is there
    twice, or is missing where it is needed or several are as near."""
    keys, found, missing = [name_key(cell) for cell in header], {}, []
    for name in names:
        if keys.count(name_key(name)) > 1:
            raise InputError(f"{path}: column {name} occurs twice; keep one")
        if name_key(name) in keys:
            found[name] = keys.index(name_key(name))
    for name in (name for name in names if name not in found):
        near = [i for i, cell in enumerate(header) if i not in found.values() and nearest(cell, (name,))]
        if len(near) == 1:
            found[name] = near[0]
            notes[f"column {header[near[0]]}: taken as {name}"] += 1
        elif near or not some:
            missing.append(name)
    if missing or (names and not found):
        there = ", ".join(" ".join(cell.split()) for cell in header)
        raise InputError(f"{path}: column {', '.join(missing or names)} missing; found {there[:900]}")
    return found


def read_table(
    path: str | Path,
    columns: Mapping[str, str],
    decimal: str | None = None,
    notes: Counter | None = None,
    objects: Sequence | None = None,
) -> pd.DataFrame:
    """Return the wanted columns of a table, named and ordered as asked for, its index the row as a spreadsheet counts
    (the header is row 1; objects count from 1).
    columns: {name: kind}. "number": text with the number in plain form, '1.234,5 €' as '1234.5 €'; "text": text; "id":
    text, int or float as the file has it. Missing cells are ''. decimal: "," or ".", for numbers that a column leaves
    open. notes: counts what was assumed. objects: the rows of `json_rows`, which is called by default. Raises
    InputError (file, row, column)."""
    import pandas as pd

    notes, seen = Counter() if notes is None else notes, set()
    table = Table(path, columns, decimal, notes, objects)
    index, values = [], {name: [] for name in columns}
    for row, cells, by_name in table:
        index.append(row)
        seen.add(hash(tuple(map(cell_text, cells))))
        for name, value in by_name.items():
            if isinstance(value, dict | list):
                raise InputError(f"{path}: row {row}, column {name}: not one value but a list or object")
            values[name].append(value)
    if twice := len(index) - len(seen):
        notes["row equal to an earlier one in all columns: kept"] += twice
    return pd.DataFrame(values, index=index, dtype=object)


def read_cells(path: str | Path, notes: Counter) -> pd.DataFrame:
    """Return all cells of a table as text under its header. notes: counts what was assumed. Raises InputError."""
    import pandas as pd

    table = Table(path, {}, None, notes)
    rows = [[cell_text(cell) for cell in cells] for _, cells, _ in table]
    if odd := next((name for name, count in Counter(table.header).items() if count > 1 and name), None):
        raise InputError(f"{path}: column {odd} occurs twice; keep one")
    return pd.DataFrame(rows, columns=table.header, dtype=object)
