"""Tables as people have them: CSV in any separator and encoding, Excel, Parquet or JSON objects, read with pandas.

Columns are found by name, whatever its case, blanks and underscores. Numbers are read in the notation of their column.
What has two readings is refused with both of them, and what was assumed is noted.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import functools
import gzip
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.files import parse_json, read_jsonl, read_text

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("", "nan", "none", "null", "n/a", "na", "<na>", "nat", "-", "unknown")  # of ids and labels; also "_"
TABLE_SUFFIXES = (".csv", ".tsv", ".gz", ".xlsx", ".parquet")
SEPARATORS = (",", ";", "\t")
NEAR = 0.94  # similarity from which a name is taken as another: one letter in nine may be missing
CELLS = "has another number of cells than the header"
_KINDS = {b"PK\x03\x04": "Excel", b"PAR1": "Parquet", b"\xd0\xcf\x11\xe0": "old Excel"}  # by a file's first bytes
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
    path: str | Path, texts: Iterable[str], labels: Mapping[str, str], notes: Counter
) -> list[str | None]:
    """Return the label of each text, None where it is missing. labels: {text: label}, matched in any case; those taken
    in another case are counted in notes. Raises InputError that lists all unknown labels with their counts."""
    by_key, known, unknown = {text.casefold(): label for text, label in labels.items()}, [], Counter()
    for text in (text.strip() for text in texts):
        label = by_key.get(text.casefold())
        known.append(label)
        if label is None and not is_missing(text):
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


def _plain_numbers(place: str, column: pd.Series, decimal: str | None, notes: Counter) -> pd.Series:
    """Return a column with its numbers in plain form. decimal: how to read what the column leaves open.
    Raises InputError for a value with two readings that neither settles."""
    found = {text: readings(text) for text in dict.fromkeys(column) if isinstance(text, str)}
    marks = sorted({mark for each in found.values() if len(each) == 1 for mark in each} - {""})
    if not decimal and len(marks) == 1:
        (decimal,) = marks
    two = next((text for text, each in found.items() if len(each) == 2), None)
    if two is not None and not decimal:
        why = "the column has numbers of both kinds" if marks else "no other value of the column decides"
        row, each = column[column == two].index[0], found[two]
        fix = f"--decimal . reads {each['.'].strip()}, --decimal , reads {each[','].strip()}"
        raise InputError(f'{place}: row {row}, column {column.name}: "{two}" has two readings and {why}: {fix}')
    if "," in marks:
        notes[f"column {column.name}: numbers with a decimal comma{', others with a point' * ('.' in marks)}"] += 1
    plain = {text: each.get(decimal) or next(iter(each.values()), text) for text, each in found.items()}
    return column.map(lambda value: plain[value] if isinstance(value, str) else cell_text(value))


# --------------------------------------------------------------------------------------------------------------- cells


def cell_text(value: Any) -> str:
    """Return a cell as text: '' for a missing one, whole numbers without .0."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value)


def _in_15_digits(value: Any) -> Any:
    """Return a number beyond the 15 digits that Excel keeps in the form that shows it, '1.23456789012345E+17'."""
    return f"{value:.14E}" if isinstance(value, int | float) and abs(value) >= 1e15 else value


def _decoded(path: Path, data: bytes, notes: Counter) -> str:
    """Return a file's text, in UTF-8 or UTF-16 with or without a byte order mark, or else in cp1252, with a note."""
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    names = ["utf-16"] if wide else ["utf-16-le" if data[1:2] == b"\0" else "utf-16-be"] if b"\0" in data[:100] else []
    for name in names or ["utf-8-sig", "cp1252"]:
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if name == "cp1252":
            word = re.search(r"\w*[^\0-\x7f]\w*", text)[0]
            notes[f"file: not UTF-8, read as cp1252 (Windows), which makes words such as {word[:40]}"] += 1
        return text
    raise InputError(f"{path}: not text in UTF-8, UTF-16 or cp1252; save it as CSV in UTF-8")


def _csv_rows(path: Path, text: str, names: Iterable[str]) -> pd.DataFrame:
    """Return all rows of a CSV, cells as text, the index their row as a spreadsheet counts. The separator is that of a
    `sep=` line, or the one that splits the header into most of the columns `names`, then into most cells."""
    import pandas as pd

    given = re.match(r'(\s*)"?sep=(.)"?\s*?\n', text)
    body = text[given.end() :] if given else text.lstrip("\r\n")
    if not body.strip():
        return pd.DataFrame()

    skipped, good = text[: len(text) - len(body)].count("\n"), 0

    def reader(separator: str) -> Iterator[list[str]]:
        return csv.reader(io.StringIO(body, newline=None), delimiter=separator, strict=True)

    def fit(separator: str) -> tuple[int, int]:
        keys = [name_key(cell) for cell in next(reader(separator))]
        return len({name_key(name) for name in names} & set(keys)), len(keys)

    separator = given[2] if given else ","
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            separator = separator if given else max(SEPARATORS, key=fit)
            _cells_of(path, next(reader(separator)), names, Counter())  # first what is wrong with all rows
            flags = {"header": None, "dtype": object, "na_filter": False, "skip_blank_lines": False}
            rows = pd.read_csv(io.StringIO(body, newline=None), sep=separator, engine="python", **flags)
    except (ValueError, pd.errors.ParserWarning, csv.Error) as error:
        if match := re.search(r"Expected \d+ fields in line (\d+), saw", str(error)):
            raise InputError(f"{path}: row {skipped + int(match[1])} {CELLS}") from None
        with contextlib.suppress(csv.Error):
            for good, _ in enumerate(reader(separator), 1):  # noqa: B007
                pass
        fix = "is a quotation mark not closed, or inside a cell?"
        raise InputError(f"{path}: row {skipped + good + 1}: {error}; {fix}") from None
    rows.index += 1 + skipped
    rows = rows[rows.notna().any(axis=1)]  # without blank lines
    if (short := rows.index[rows.isna().any(axis=1)]).size:
        raise InputError(f"{path}: row {short[0]} {CELLS}")
    return rows


def json_rows(path: str | Path, required: Sequence[str] = ()) -> list | None:
    """Return the values of a JSON list, or the objects of a JSONL file; None for a file of another kind. required:
    non-empty fields of JSONL that has at least one of them. Raises InputError."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".json", ".jsonl") and (kind in TABLE_SUFFIXES or _start(path).lstrip()[:1] not in (b"{", b"[")):
        return None
    text = read_text(path)
    if not text.lstrip().startswith("["):
        named = not text.strip() or any(f'"{field}"' in text for field in required)
        return read_jsonl(path, required if named else ())
    try:
        return parse_json(text, unique=True)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON list ({error})") from None


def _start(path: Path) -> bytes:
    """Return a file's first bytes. Raises InputError."""
    try:
        with open(path, "rb") as handle:
            return handle.read(200)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _all_rows(path: Path, names: Iterable[str], notes: Counter) -> pd.DataFrame:
    """Return all rows of a table file, the header as the first, the index as a spreadsheet counts them."""
    import pandas as pd

    kind = _KINDS.get(_start(path)[:4])
    try:
        if kind == "Excel":
            with pd.ExcelFile(path, engine="openpyxl") as book:
                if others := len(book.sheet_names) - 1:
                    notes[f"file: sheet {book.sheet_names[0]} read, {others} more ignored"] += 1
                rows = book.parse(header=None, dtype=object, na_filter=False).map(_in_15_digits)
        elif kind == "Parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(path).read()
            columns = zip(table.column_names, table.columns, strict=True)
            rows = pd.DataFrame([[name, *column.to_pylist()] for name, column in columns], dtype=object).T
        else:
            data = path.read_bytes()
            data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except ImportError:
        package = "openpyxl" if kind == "Excel" else "pyarrow"
        raise InputError(f"{path}: {package} is needed to read it: pip install -r requirements.txt") from None
    except Exception as error:  # of libraries that meet a damaged file: of many types
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise InputError(f"{path}: damaged, or not what its first bytes say it is ({reason})") from None
    if kind == "old Excel":
        raise InputError(f"{path}: an Excel file of the old form, or locked by a password; save it as .xlsx or CSV")
    if not kind:
        return _csv_rows(path, _decoded(path, data, notes), names)
    rows.index += 1
    return rows


def _cells_of(path: Path, header: Sequence[str], names: Iterable[str], notes: Counter) -> dict[str, int]:
    """Return {column: its place in the header}. Raises InputError for one that is missing, or there twice."""
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
        else:
            missing.append(name)
    if missing:
        names = ", ".join(" ".join(cell.split()) for cell in header)
        raise InputError(f"{path}: column {', '.join(missing)} missing; found {names[:900]}")
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

    path, notes = Path(path), Counter() if notes is None else notes
    objects = json_rows(path) if objects is None else objects
    if objects is not None:
        if odd := next((i for i, row in enumerate(objects, 1) if not isinstance(row, dict)), None):
            raise InputError(f"{path}: row {odd} is not an object with {', '.join(columns)}")
        header = list(dict.fromkeys(name for row in objects for name in row))
        rows = pd.DataFrame([header, *([row.get(name) for name in header] for row in objects)], dtype=object)
    else:
        rows = _all_rows(path, columns, notes)
    texts = rows.map(cell_text)
    filled = (texts != "").any(axis=1)
    if not filled.any():
        raise InputError(f"{path}: empty; a header with {', '.join(columns)} is needed")
    header, rows, texts = list(texts[filled].iloc[0]), rows[filled].iloc[1:], texts[filled].iloc[1:]
    places = _cells_of(path, header, columns, notes)
    if twice := int(texts.duplicated().sum()):
        notes["row equal to an earlier one in all columns: kept"] += twice
    table = {}
    for name, kind in columns.items():
        values = rows.iloc[:, places[name]].rename(name)
        if (odd := values.map(lambda value: isinstance(value, dict | list))).any():
            raise InputError(f"{path}: row {values.index[odd][0]}, column {name}: not one value but a list or object")
        if kind == "number":
            table[name] = _plain_numbers(str(path), values, decimal, notes)
        elif kind == "id":
            table[name] = values.map(lambda value: value if isinstance(value, int | float) else cell_text(value))
        else:
            table[name] = texts.iloc[:, places[name]]
    return pd.DataFrame(table)
