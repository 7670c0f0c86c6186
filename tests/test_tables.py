"""Tables of any form and notation: the right cells, or one line that says what is wrong."""

from __future__ import annotations

import gzip
import io
import sys
from collections import Counter

import pandas as pd
import pytest

from common import InputError
from distil.tables import json_rows, match_labels, nearest, read_cells, read_table, readings

COLUMNS = {"Amount Due": "number", "Word": "text", "Key": "id"}
CSV = "Key,Word,Amount_Due,Other\n007,Bäcker,1234.5,x\n8,,12,y\n"
CELLS = [("1234.5", "Bäcker", "007"), ("12", "", "8")]


def cells(table: pd.DataFrame) -> list[tuple]:
    return list(table.itertuples(index=False, name=None))


def amounts(path, *values: str, decimal: str | None = None) -> list[str]:
    """Return a column of numbers as it is read from a CSV."""
    path.write_text("key;word;amount_due\n" + "".join(f"1;x;{value}\n" for value in values))
    return list(read_table(path, COLUMNS, decimal)["Amount Due"])


# --------------------------------------------------------------------------------------------------------------- files


def excel(frame: pd.DataFrame, sheets: int = 1) -> bytes:
    out = io.BytesIO()
    with pd.ExcelWriter(out, engine="openpyxl") as book:
        for number in range(sheets):
            frame.to_excel(book, index=False, sheet_name=f"s{number}")
    return out.getvalue()


FRAME = pd.DataFrame({"key": ["007", 8], "word": ["Bäcker", None], "AMOUNT DUE": [1234.5, 12]}, dtype=object)
TYPED = pd.DataFrame({"key": ["007", "8"], "word": ["Bäcker", None], "AMOUNT DUE": [1234.5, 12]})
OBJECTS = '{"Key": "007", "Word": "Bäcker", "amount_due": 1234.5}\n{"Key": 8, "Word": null, "amount_due": 12.0}\n'
FORMS = {
    "a.csv": CSV.encode(),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "utf16.txt": CSV.replace(",", "\t").encode("utf-16"),
    "be.tsv": CSV.replace(",", "\t").encode("utf-16-be"),
    "windows.csv": CSV.encode("cp1252"),
    "line_ends.csv": CSV.replace("\n", "\r\n").encode(),
    "old_mac.csv": CSV.replace("\n", "\r").encode(),
    "semicolons.csv": CSV.replace(",", ";").replace(".", ",").encode(),
    "pipes.csv": CSV.replace(",", "|").encode(),
    "quoted.csv": CSV.replace("1234.5", '"1,234.5"').encode(),
    "sep.csv": b"sep=;\r\n" + CSV.replace(",", ";").encode(),
    "sep_quoted.csv": b'\xef\xbb\xbf"sep=|"\n' + CSV.replace(",", "|").encode(),
    "blank_lines.csv": ("\n" + CSV.replace("\n", "\n\n") + ",,,\n").encode(),
    "a.csv.gz": gzip.compress(CSV.encode()),
    "a.xlsx": lambda: excel(FRAME),
    "excel.csv": lambda: excel(FRAME),  # by content, not by name
    "a.parquet": TYPED.to_parquet(),
    "bytes.parquet": TYPED.assign(word=TYPED["word"].str.encode("utf-8")).to_parquet(),  # of older writers
    "a.jsonl": OBJECTS.encode(),
    "a.json": ("[" + OBJECTS.strip().replace("\n", ",") + "]").encode(),
    "json.txt": OBJECTS.encode(),
    "json_bom.txt": b"\xef\xbb\xbf" + OBJECTS.encode(),
    "quoted_header.csv": b'"Key";"Word";"Amount_Due"\n"007";"B\xc3\xa4cker";"1234.5"\n"8";"";"12"\n',
    "trailing.csv": CSV.replace("\n", ",\n").encode(),
    "blank_header.csv": CSV.replace("Amount_Due", " AMOUNT due ").encode(),
    "windows.csv.gz": gzip.compress(CSV.encode("cp1252")),
    "sep_utf16.csv": ("sep=;\r\n" + CSV.replace(",", ";")).encode("utf-16"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_cells(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name]() if callable(FORMS[name]) else FORMS[name])
    table = read_table(tmp_path / name, COLUMNS, notes=(notes := Counter()))
    assert list(table) == list(COLUMNS) and [(a, b, str(c)) for a, b, c in cells(table)] == CELLS
    noted = {"semicolons.csv": ["column Amount Due: numbers with a decimal comma"]}
    windows = ["file: not UTF-8, read as cp1252 (Windows), which makes words such as Bäcker"]
    noted |= {"windows.csv": windows, "windows.csv.gz": windows}
    assert list(notes) == noted.get(name, [])


def test_rows_are_counted_as_a_spreadsheet_does(tmp_path):
    (tmp_path / "a.csv").write_text("sep=,\nKey,Word,Amount Due\n\n1,a,2\n\n2,b,3\n")
    assert list(read_table(tmp_path / "a.csv", COLUMNS).index) == [4, 6]
    (tmp_path / "a.xlsx").write_bytes(excel(FRAME, sheets=2))
    assert list(read_table(tmp_path / "a.xlsx", COLUMNS, notes=(notes := Counter())).index) == [2, 3]
    assert list(notes) == ["file: sheet s0 read, 1 more ignored"]


def test_excel_ids_beyond_15_digits_show_that_digits_are_lost(tmp_path):
    frame = pd.DataFrame({"key": [1234567890123456, 17, 123456789012345], "word": "x", "amount due": 1})
    (tmp_path / "a.xlsx").write_bytes(excel(frame))
    assert list(read_table(tmp_path / "a.xlsx", COLUMNS)["Key"]) == ["1.23456789012346E+15", 17, 123456789012345]


def test_all_cells_of_any_file_under_its_header(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nKey;a,b;c,d\n007;1,5;\n;;\n8;x;y\n")
    table = read_cells(tmp_path / "a.csv", Counter())
    assert list(table) == ["Key", "a,b", "c,d"] and cells(table) == [("007", "1,5", ""), ("8", "x", "y")]
    (tmp_path / "a.xlsx").write_bytes(excel(FRAME))
    assert cells(read_cells(tmp_path / "a.xlsx", Counter())) == [("007", "Bäcker", "1234.5"), ("8", "", "12")]
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(InputError, match="column a occurs twice; keep one"):
        read_cells(tmp_path / "a.csv", Counter())


def test_equal_rows_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text(CSV + "8,,12,y\n8,,12,z\n")
    assert len(read_table(tmp_path / "a.csv", COLUMNS, notes=(notes := Counter()))) == 4
    assert notes == {"row equal to an earlier one in all columns: kept": 1}


BAD = {
    "a.csv": (b"", "empty; a header with Amount Due, Word, Key is needed"),
    "blank.csv": (b"\n\n", "empty; a header"),
    "short.csv": (b"Key,Word,Amount Due\n1,2,3\n\n1,2\n", "row 4 has another number of cells than the header"),
    "long.csv": (b"Key,Word,Amount Due\n1,2,3,4\n", "row 2 has another number of cells than the header"),
    "open.csv": (b'Key,Word,Amount Due\n1,2,3\n1,"2,3\n4,5,6\n', "row 3: unexpected end of data; is a quotation mark"),
    "inside.csv": (b'Key,Word,Amount Due\n1,"2"x,3\n', "row 2: ',' expected after '\"'; is a quotation mark"),
    "twice.csv": (b"Key,Word,Amount Due,amount_due\n1,2,3,4\n", "column Amount Due occurs twice; keep one"),
    "other.csv": (b"Key~Word~Amount Due\n1~2~3\n", "column Amount Due, Word, Key missing; found Key~Word~Amount Due"),
    "cp437.csv": (b"Key,Word,Amount Due\n1,B\x81cker,3\n", "not text in UTF-8, UTF-16 or cp1252; save it as CSV"),
    "a.xlsx": (b"PK\x03\x04 damaged", "damaged, or not what its first bytes say it is ("),
    "a.xls": (b"\xd0\xcf\x11\xe0", "an Excel file of the old form, or locked by a password; save it as .xlsx or CSV"),
    "a.parquet": (b"PAR1 damaged", "damaged, or not what its first bytes say it is ("),
    "a.csv.gz": (gzip.compress(CSV.encode())[:-9], "damaged, or not what its first bytes say it is ("),
    "empty.xlsx": (lambda: excel(pd.DataFrame()), "empty; a header"),
    "a.json": (b'[{"Key": 1}, 5]', "row 2 is not an object with Amount Due, Word, Key"),
    "b.json": (
        b'[{"Key": 1, "Word": ["a"], "Amount_Due": 3}]',
        "row 1, column Word: not one value but a list or object",
    ),
    "c.json": (b'[{"Key": 1, "key": 2, "Word": "a", "Amount_Due": 3}]', "column Key occurs twice; keep one"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / name, COLUMNS)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}") and "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(InputError, match=r"a\.xlsx: openpyxl is needed to read it: pip install -r requirements.txt"):
        read_table(tmp_path / "a.xlsx", COLUMNS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.csv: no such file"):
        read_table(tmp_path / "nothing.csv", COLUMNS)


def test_json_rows_are_for_json_alone(tmp_path):
    (tmp_path / "a.csv").write_text("[1]")
    (tmp_path / "a.txt").write_text("\n [1]")
    assert json_rows(tmp_path / "a.csv") is None and json_rows(tmp_path / "a.txt") == [1]


# ------------------------------------------------------------------------------------------------------------- numbers


NUMBERS = {
    "19114": {"": "19114"},
    "-5": {"": "-5"},
    "+5": {"": "5"},
    "$19_": {"": "$19_"},
    "19114.12": {".": "19114.12"},
    "19114,12": {",": "19114.12"},
    "19,114.12": {".": "19114.12"},
    "1.234,5 €": {",": "1234.5 €"},
    "1,234,567": {".": "1234567"},
    "1.234.567": {",": "1234567"},
    "12,53,000": {".": "1253000"},  # grouped as in India
    "12.53.000": {},
    "19.114": {".": "19.114", ",": "19114"},
    "809,981": {".": "809981", ",": "809.981"},
    "0,350": {",": "0.350"},
    "0.350": {".": "0.350"},
    "1234,567": {",": "1234.567"},
    "1,2345": {",": "1.2345"},
    ".5": {".": "0.5"},
    "19 114,12": {",": "19114.12"},
    "19\u202f114": {"": "19114"},
    "19'114.50": {".": "19114.50"},
    "1.911412e4": {".": "1.911412e4"},
    "1,234e5": {",": "1.234e5"},
    "1,23,456,7": {},
    "1 2": {},
    "12-3": {},
    "twenty": {},
    "": {},
    "1" * 70: {},
}


@pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
def test_the_readings_of_a_number(text, expected):
    assert readings(text) == expected


def test_the_column_decides_what_one_value_leaves_open(tmp_path):
    path = tmp_path / "a.csv"
    assert amounts(path, "19.114", "5", "1.234,5") == ["19114", "5", "1234.5"]
    assert amounts(path, "19.114", "5,25", "809,981") == ["19114", "5.25", "809.981"]
    assert amounts(path, "19.114", "26.82", "809,981") == ["19.114", "26.82", "809981"]
    assert amounts(path, "1234.5", "1234,5", "unknown", "12,53,000") == ["1234.5", "1234.5", "unknown", "1253000"]
    read_table(path, COLUMNS, notes=(notes := Counter()))
    assert "column Amount Due: numbers with a decimal comma, others with a point" in notes
    assert amounts(path, "19.114", "809,981", decimal=",") == ["19114", "809.981"]
    assert amounts(path, "19.114", "1234,5", decimal=".") == ["19.114", "1234.5"]  # what has one reading keeps it
    read_table(path, COLUMNS, ".", notes := Counter())
    against = 'column Amount Due: --decimal reads "19.114" as 19.114, though only , marks decimals in other values'
    assert list(notes) == [against, "column Amount Due: numbers with a decimal comma"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (("5", "19.114"), "no other value of the column decides"),
        (("5", "19.114", "1.5", "1,5"), "the column has numbers of both kinds"),
    ],
)
def test_what_stays_open_is_refused_with_both_readings(tmp_path, values, why):
    both = r"--decimal \. reads 19\.114, --decimal , reads 19114$"
    with pytest.raises(InputError, match=rf'row 3, column Amount Due: "19\.114" has two readings and {why}: {both}'):
        amounts(tmp_path / "a.csv", *values)


def test_a_number_that_the_file_has_as_a_number_is_not_read_again(tmp_path):
    frame = pd.DataFrame({"key": "1", "word": "x", "amount due": [19.114, 809981]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert list(read_table(tmp_path / "a.parquet", COLUMNS)["Amount Due"]) == ["19.114", "809981"]


# ---------------------------------------------------------------------------------------------------- names and labels


FIELDS = ("Annual Income", "Payment Behaviour", "pay_amount_1", "pay_amount_2", "Age")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (" age ", "Age"),
        ("AGE", "Age"),
        ("annual_income", "Annual Income"),
        ("AnnualIncome", "Annual Income"),
        ("Anual Income", "Annual Income"),
        ("Payment Behavior", "Payment Behaviour"),
        ("PAY AMOUNT 1", "pay_amount_1"),
        ("pay_amount_3", None),
        ("Annual Income 2", None),
        ("Income", None),
        ("Ages", None),
        ("___", None),
    ],
)
def test_a_near_name_is_one_of_the_names_or_none(written, name):
    assert nearest(written, FIELDS) == name


def test_a_near_column_is_taken_with_a_note_and_an_equal_one_goes_first(tmp_path):
    (tmp_path / "a.csv").write_text("Key,Word,Amount_Dues,AmountDuee\n1,x,3,4\n")
    with pytest.raises(InputError, match="column Amount Due missing; found Key, Word, Amount_Dues, AmountDuee"):
        read_table(tmp_path / "a.csv", COLUMNS)
    (tmp_path / "a.csv").write_text("Key,Word,Amount_Dues,Amount_Due\n1,x,3,4\n")
    assert (
        cells(read_table(tmp_path / "a.csv", COLUMNS, notes=(notes := Counter()))) == [("4", "x", "1")] and not notes
    )
    (tmp_path / "a.csv").write_text("Key,Word,Amount_Dues\n1,x,3\n")
    assert cells(read_table(tmp_path / "a.csv", COLUMNS, notes=notes)) == [("3", "x", "1")]
    assert list(notes) == ["column Amount_Dues: taken as Amount Due"]


def test_labels_in_any_case_by_a_map_or_missing():
    labels, notes = {"Good": "Good", "Poor": "Bad", "0": "Bad", "none": "None"}, Counter()
    texts = ("good", " Good ", "POOR", "0", "none", "_", "", "nan", "__", "N/A")
    assert match_labels("x", texts, labels, notes) == ["Good", "Good", "Bad", "Bad", "None", *[None] * 5]
    assert notes == {"label good: read as Good": 1, "label POOR: read as Bad": 1}
    with pytest.raises(InputError, match=r"x: unknown label 'a' \(2\), 'b' \(1\); expected Good, Poor, 0, none or _"):
        match_labels("x", ("a", "b", "a", "Good"), labels, notes)
