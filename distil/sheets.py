"""Files of tables to rows of cells: CSV in any separator and encoding, Excel, Parquet, JSON objects.

A CSV is read from the file each time that its rows are asked for, so its size does not matter; the others are held.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from common import InputError
from distil.files import parse_json, read_jsonl, read_text

Rows = Callable[[], Iterator[tuple[int, Sequence[Any]]]]  # (number as a spreadsheet counts, cells) of each row
Fit = Callable[[list[str]], tuple]  # how well the cells of a header fit what is wanted
TABLE_SUFFIXES = (".csv", ".tsv", ".gz", ".xlsx", ".parquet")
SEPARATORS = (",", ";", "\t", "|")
BLOCK = 1 << 16  # letters that are read at once
_KINDS = {b"PK\x03\x04": "Excel", b"PAR1": "Parquet", b"\xd0\xcf\x11\xe0": "old Excel"}  # by a file's first bytes
_SEP_LINE = re.compile(r'\s*"?sep=(.)"?[^\S\r\n]*(\r\n|\r|\n)')


def cell_text(value: Any) -> str:
    """Return a cell as text: '' for a missing one, whole numbers without .0."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _in_15_digits(value: Any) -> Any:
    """Return a number beyond the 15 digits that Excel keeps in the form that shows it, '1.23456789012345E+17'."""
    return f"{value:.14E}" if isinstance(value, int | float) and abs(value) >= 1e15 else value


def _start(path: Path) -> bytes:
    """Return a file's first bytes. Raises InputError."""
    try:
        with open(path, "rb") as handle:
            return handle.read(200)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------------------------- JSON


def is_json(path: Path) -> bool:
    """Return whether a file is JSON or JSONL by its name, or else by its first sign. Raises InputError."""
    kind = path.suffix.lower()
    start = _start(path).removeprefix(b"\xef\xbb\xbf").lstrip() if kind not in TABLE_SUFFIXES else b""
    return kind in (".json", ".jsonl") or start[:1] in (b"{", b"[")


def json_rows(path: str | Path, required: Sequence[str] = ()) -> list | None:
    """Return the values of a JSON list, or the objects of a JSONL file; None for a file of another kind. required:
    non-empty fields of JSONL that has at least one of them. Raises InputError."""
    path = Path(path)
    if not is_json(path):
        return None
    text = read_text(path)
    if not text.lstrip().startswith("["):
        named = not text.strip() or any(f'"{field}"' in text for field in required)
        return read_jsonl(path, required if named else ())
    try:
        return parse_json(text, unique=True)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON list ({error})") from None


def object_rows(objects: Sequence[dict]) -> Rows:
    """Return the rows of objects, from 1 on; row 0 is the header, with the names of all."""
    header = list(dict.fromkeys(name for row in objects for name in row))

    def rows() -> Iterator[tuple[int, Sequence[Any]]]:
        yield 0, header
        yield from ((number, [row.get(name) for name in header]) for number, row in enumerate(objects, 1))

    return rows


# ----------------------------------------------------------------------------------------------------------------- CSV


def _encoding(path: Path, opened: Callable, notes: Counter) -> str:
    """Return the encoding of all of a file: UTF-8 or UTF-16 with or without a byte order mark, or else cp1252, with a
    note. Raises InputError."""
    with opened() as handle:
        start = handle.read(100)
    wide = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    unmarked = ["utf-16-le" if start[1:2] == b"\0" else "utf-16-be"] if b"\0" in start else []
    for name in ["utf-16"] if wide else unmarked or ["utf-8-sig", "cp1252"]:
        word = None
        try:
            with io.TextIOWrapper(opened(), encoding=name) as text:
                while block := text.read(BLOCK):
                    if name == "cp1252" and not word:
                        word = re.search(r"\w*[^\0-\x7f]\w*", block)
        except UnicodeDecodeError:
            continue
        if word:
            notes[f"file: not UTF-8, read as cp1252 (Windows), which makes words such as {word[0][:40]}"] += 1
        return name
    raise InputError(f"{path}: not text in UTF-8, UTF-16 or cp1252; save it as CSV in UTF-8")


def _csv_rows(path: Path, zipped: bool, fit: Fit, notes: Counter) -> Rows:
    """Return the rows of a CSV, cells as text, without blank lines. The separator is that of a `sep=` line, or the one
    whose header fits best. Raises InputError for another encoding, and in its rows for what is wrong there."""
    opened = functools.partial(gzip.open if zipped else open, path, "rb")
    encoding = _encoding(path, opened, notes)

    def text(skip: int) -> TextIO:
        handle = io.TextIOWrapper(opened(), encoding=encoding, newline="")
        handle.read(skip)
        return handle

    with text(0) as handle:
        head = handle.read(BLOCK)
    given = _SEP_LINE.match(head)
    skip = given.end() if given else len(head) - len(head.lstrip("\r\n"))
    before = len(head[:skip].splitlines())

    def header_fit(separator: str) -> tuple:
        try:
            with text(skip) as handle:
                return 1, *fit(next(csv.reader(handle, delimiter=separator, strict=True), []))
        except csv.Error:  # quotation marks around cells that another separator splits
            return (0,)

    separator = given[1] if given else max(SEPARATORS, key=header_fit)

    def rows() -> Iterator[tuple[int, Sequence[Any]]]:
        number, width = before, None
        with text(skip) as handle:
            try:
                for number, cells in enumerate(csv.reader(handle, delimiter=separator, strict=True), before + 1):
                    if not cells:
                        continue
                    width = width or len(cells)
                    if len(cells) != width:
                        raise InputError(f"{path}: row {number} has another number of cells than the header")
                    yield number, cells
            except csv.Error as error:
                fix = "is a quotation mark not closed, or inside a cell?"
                raise InputError(f"{path}: row {number + 1}: {error}; {fix}") from None

    return rows


# ----------------------------------------------------------------------------------------------------------- all kinds


def all_rows(path: Path, fit: Fit, notes: Counter) -> Rows:
    """Return the rows of a table file by its content, the header among them. fit: how well a CSV's header fits; the
    separator is the one with the best. notes: counts what was assumed. Raises InputError."""
    start = _start(path)
    kind = _KINDS.get(start[:4])
    if kind == "old Excel":
        raise InputError(f"{path}: an Excel file of the old form, or locked by a password; save it as .xlsx or CSV")
    try:
        if kind == "Excel":
            import pandas as pd

            with pd.ExcelFile(path, engine="openpyxl") as book:
                if others := len(book.sheet_names) - 1:
                    notes[f"file: sheet {book.sheet_names[0]} read, {others} more ignored"] += 1
                cells = book.parse(header=None, dtype=object, na_filter=False).map(_in_15_digits)
            return functools.partial(enumerate, cells.to_numpy(dtype=object).tolist(), 1)
        if kind == "Parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(path).read()
            columns = (column.to_pylist() for column in table.columns)
            return functools.partial(enumerate, [table.column_names, *zip(*columns, strict=True)], 1)
        return _csv_rows(path, start[:2] == b"\x1f\x8b", fit, notes)
    except ImportError:
        package = "openpyxl" if kind == "Excel" else "pyarrow"
        raise InputError(f"{path}: {package} is needed to read it: pip install -r requirements.txt") from None
    except InputError:
        raise
    except Exception as error:  # of libraries that meet a damaged file: of many types
        if not kind and not isinstance(error, OSError | EOFError | zlib.error):
            raise
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: damaged, or not what its first bytes say it is ({reason})") from None
