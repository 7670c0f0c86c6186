"""Files of rows to score, JSONL or a table, and the same rows with their scores as JSONL or as a table.

Unfinished work is JSONL in any case. A table of it is written at the end, row by row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from common import InputError
from distil.batch import Lines, failed_line, named_text, parse_object
from distil.processes import print_note
from distil.sheets import TABLE_SUFFIXES, cell_text, is_json, json_rows
from distil.tables import Table, nearest
from distil.tasks import Task

FIELDS = ("features", "question")  # the first of them that an object has is scored
EXCEL_ROWS, EXCEL_LETTERS = 1_048_576, 32_767  # that a sheet and a cell can hold
ROW_GROUP = 10_000  # rows of a Parquet file that are written together


class RowsToScore(Lines):
    """The rows of --input, and --output in the form of its suffix. `open` finds out what they are."""

    def __init__(self, source: Path, output: Path, task: Task, decimal: str | None, refer: bool):
        """decimal: of `tables.Table`; refer: whether responses say if a human should decide."""
        super().__init__(source)
        self.task, self.decimal = task, decimal
        self.table: Table | None = None
        self.notes: Counter[str] = Counter()  # what was assumed of a table
        self.write = next((write for end, write in WRITERS.items() if output.name.lower().endswith(end)), None)
        self.suffix = output.suffix.lower()
        self.probabilities = {label: f"p_{label}" for label in task.labels}
        self.added = ["prediction", *self.probabilities.values(), "top2_margin", *["refer"] * refer]
        self.objects: list | None = None  # of a JSON list
        self.header: list[str] = []
        self._complete = False  # whether the rows of a table have a feature string

    def open(self) -> None:
        """Read what decides how rows are read: columns, notation of numbers. Raises InputError."""
        as_json = is_json(self.path)
        named = {*self._fields, "fields"}
        if as_json and self._is_table(named):
            self.objects = json_rows(self.path)
        lines = as_json and self.objects is None
        lines = lines or any(isinstance(one, dict) and named & one.keys() for one in self.objects or [])
        if lines:
            self._open_lines()
        else:
            # With the task's columns, as far as it has them, or else with a column of feature strings.
            wanted = self.task.feature_columns
            self.table = Table(self.path, wanted, self.decimal, self.notes, self.objects, instead=FIELDS[0])
            self.header, self._complete = self.table.header, not self.table.columns.keys() & wanted
            for note in self.notes:
                print_note(f"{self.path}: {note}")
            if not self.table.count:
                raise InputError(f"{self.path}: no rows below the header")
        if not self.write and self.suffix != ".jsonl" and (self.table or self.suffix in TABLE_SUFFIXES):
            raise InputError(f"--output: a name with {', '.join(['.jsonl', *WRITERS])} is needed, for its form")
        if self.write is _write_excel and self.count >= EXCEL_ROWS:
            raise InputError(f"{self.path}: an Excel sheet holds {EXCEL_ROWS - 1} rows; write .csv or .parquet")
        if not lines or self.write:
            self._check_names()

    def _is_table(self, named: set[str]) -> bool:
        """Return whether JSON is a list, or JSONL whose first object has columns of the task and none of `named`."""
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape") as text:
            first = next((line.strip() for line in text if line.strip()), "")
        if first.startswith("["):
            return self.path.suffix.lower() != ".jsonl"
        own, (row, _) = tuple(self.task.feature_columns), parse_object(first)
        return not named & row.keys() and any(nearest(name, own) for name in row)

    def _open_lines(self) -> None:
        if self.decimal:
            raise InputError("--decimal: only for tables; leave out what has no effect")
        if self.objects is None:
            super().open()
        if self.write:
            names = (name for line in self for name in parse_object(line)[0])
            self.header = [name for name in dict.fromkeys(names) if name != "error"]

    def _check_names(self) -> None:
        """Raise InputError for columns that the output would have twice."""
        added = [*self.added, "notes", "error"]
        if not self.write:
            added += ["model_name", "scores", "raw_scores", "prior", "probabilities", "extra"]
        there = {name.strip().casefold() for name in self.header}
        if clash := [name for name in added if name.casefold() in there]:
            fix = "rename or remove it (a file that was scored before has such columns)"
            raise InputError(f"{self.path}: column {', '.join(clash)} would be there twice in the output; {fix}")
        twice = [name for name, count in Counter(self.header).items() if count > 1]
        if twice and self.write in (None, _write_parquet):
            name = twice[0] or "without a name"
            raise InputError(f"{self.path}: column {name} occurs twice; keep one, or write .csv")

    @property
    def _fields(self) -> tuple[str, ...]:
        """Return the names under which an object may have its text."""
        return (self.task.text_column, FIELDS[0]) if self.task.text_column else FIELDS

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return self.table.count if self.table else sum(1 for _ in self)

    @property
    def noted(self) -> bool:
        """Return whether `doubts` of a row are written next to it."""
        return self.table is not None or self.write is not None

    def __iter__(self) -> Iterator[Any]:
        if self.table:
            return iter(self.table)
        if self.objects is not None:
            return (json.dumps(one, ensure_ascii=False) for one in self.objects)
        return super().__iter__()

    def parsed(self, row: Any) -> tuple[dict, str | None]:
        """Return (object of the .part file as far as the input decides it, text to score), or (object with the error
        that the row has, None)."""
        if self.table:
            number, cells, values = row
            result = self._with_cells(cells, number)
            values = {self.task.by_column.get(column, column): value for column, value in values.items()}
        else:
            found, good = parse_object(row)
            values = found.get("fields")
            if good and (any(name in found for name in self._fields) or not isinstance(values, dict)):
                found, text = named_text(found, self._fields)
                if text is not None:
                    return self._with_names(found), text
            if "error" in found:
                return self._with_names(found) | {"error": found["error"]}, None
            result = self._with_names(found)
        try:
            text = cell_text(values[FIELDS[0]]) if self._complete else self.task.features(values)
        except InputError as error:
            return failed_line(result, "bad_fields", str(error)), None
        return (result, text) if text.strip() else (failed_line(result, "no_features", "the row is empty"), None)

    def _with_names(self, found: dict) -> dict:
        """Return a line's object, as cells where the output is a table."""
        return {"cells": [_plain(found.get(name)) for name in self.header]} if self.write else found

    def _with_cells(self, cells: Sequence[Any], number: int) -> dict:
        """Return a table's row as an object."""
        if self.write:
            return {"cells": [_plain(cell) for cell in cells]}
        if self.objects is not None:
            return dict(self.objects[number - 1])
        return dict(zip(self.header, map(_plain, cells), strict=True))

    def columns(self, response: dict) -> dict[str, Any]:
        """Return what of a response is written next to its row."""
        if not self.write:
            return response
        values = {"prediction": response["prediction"], "top2_margin": response["top2_margin"]}
        values |= {name: response["probabilities"][label] for label, name in self.probabilities.items()}
        return values | ({"refer": response["extra"]["refer"]} if "extra" in response else {})

    def finish(self, part: Path, output: Path) -> None:
        """Write the output from the .part file, which has all rows."""
        if not self.write:
            return super().finish(part, output)

        def rows() -> Iterator[dict]:
            return (json.loads(line) for line in Lines(part))

        seen = {name for row in rows() for name in row}
        added = [*self.added, *(name for name in ("notes", "error") if name in seen)]
        scratch = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            self.write(scratch, [*self.header, *added], len(self.header), map(_cells_with(added), rows()))
            scratch.replace(output)
        finally:
            scratch.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Return a cell as JSON has it: text, a finite number, or lists and objects as their JSON."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    finite = isinstance(value, str | int) or (isinstance(value, float) and abs(value) < float("inf"))
    return value if finite else cell_text(value)


def _cells_with(added: Sequence[str]) -> Callable[[dict], list]:
    """Return the function that makes a line of the output of a .part file's object."""

    def cells(row: dict) -> list:
        if "error" in row:
            row["error"] = "{code}: {message}".format(**row["error"])
        return row["cells"] + [row.get(name) for name in added]

    return cells


def _write_csv(path: Path, header: Sequence[str], own: int, rows: Iterator[list], zipped: bool = False) -> None:
    """Write lines as CSV (UTF-8, comma). own: how many of the columns are the input's."""
    with open(path, "wb") as raw:
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if zipped else raw  # without a time: equal bytes
        with io.TextIOWrapper(packed, encoding="utf-8", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(map(cell_text, row) for row in chain([header], rows))


def _write_gzip(path: Path, header: Sequence[str], own: int, rows: Iterator[list]) -> None:
    _write_csv(path, header, own, rows, zipped=True)


def _write_excel(path: Path, header: Sequence[str], own: int, rows: Iterator[list]) -> None:
    """Write lines as an Excel sheet, texts as texts: not one that begins with = as a formula."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell

    book, cut = Workbook(write_only=True), 0
    sheet = book.create_sheet()
    for row in chain([header], rows):
        cells = []
        for value in row:
            if isinstance(value, str):
                cut += len(value) > EXCEL_LETTERS
                cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("\ufffd", value))
                cell.data_type = "s"
            cells.append(cell if isinstance(value, str) else value)
        sheet.append(cells)
    book.save(path)
    if cut:
        print_note(f"{cut} cells were cut: an Excel cell holds {EXCEL_LETTERS} letters")


def _write_parquet(path: Path, header: Sequence[str], own: int, rows: Iterator[list]) -> None:
    """Write lines as Parquet: the input's columns and what is said as text, probabilities and margins as numbers."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"top2_margin": pa.float64(), "refer": pa.bool_()}
    kinds |= {name: pa.float64() for name in header[own:] if name.startswith("p_")}
    schema = pa.schema([(n, kinds.get(n, pa.string()) if i >= own else pa.string()) for i, n in enumerate(header)])
    with parquet.ParquetWriter(path, schema) as out:
        while group := list(islice(rows, ROW_GROUP)):
            columns = zip(*([*map(cell_text, row[:own]), *row[own:]] for row in group), strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            out.write_table(pa.Table.from_arrays(arrays, schema=schema))


WRITERS = {".csv": _write_csv, ".csv.gz": _write_gzip, ".xlsx": _write_excel, ".parquet": _write_parquet}
