"""Tables that are sent to the server: read in separate processes, within limits of memory, time and size."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile

import pandas as pd
import pyarrow as pa
import pytest
from conftest import assert_error
from fastapi.testclient import TestClient
from pyarrow import parquet

from distil.creditmix.scored import RowsToScore
from distil.serving import table_child, uploads
from distil.serving.app import create_app
from distil.serving.engine import Refusal
from distil.serving.metrics import Metrics
from distil.serving.table_child import MAX_ROWS, table_rows
from distil.serving.uploads import MAX_WAITING, TableReader
from distil.tasks import default_task, task_of
from distil.testing import TinyEngine

pytestmark = pytest.mark.usefixtures("own_server_log")
HEADERS = {"content-type": "application/octet-stream"}
LOAN = {
    "name": "loans",
    "instruction": "Is this loan good or bad?",
    "labels": ["good", "bad"],
    "label_column": "status",
    "fields": [
        {"name": "Amount", "column": "amount_eur", "kind": "number", "range": [0, 100000], "digits": 4},
        {"name": "Purpose", "column": "purpose"},
    ],
}
LOAN = task_of(LOAN, "test")
TOPIC = {"name": "topics", "instruction": "Give the topic.", "labels": ["sport", "arts"], "label_column": "topic"}
TOPIC = task_of(TOPIC | {"text_column": "text"}, "test")
CSV = b'Name,Amount EUR,Purpose\r\nann,1500,"car, Amount: 9"\r\n=SUM(1),nine,\xc3\xa9tude\r\n'


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(TinyEngine(), Metrics(), task=LOAN)) as client:
        yield client


def sent(client, body: bytes, name: str = "rows.csv", decimal: str = ""):
    return client.post("/table", params={"name": name, "decimal": decimal}, content=body, headers=HEADERS)


def rows_of(folder, body: bytes, name: str = "rows.csv", task=LOAN, decimal: str | None = None) -> dict:
    """Return what the child makes of a file, in this process."""
    path = folder / name
    path.write_bytes(body)
    return table_rows(path, task, decimal, 2000)


def as_file(frame: pd.DataFrame, kind: str) -> bytes:
    out = io.BytesIO()
    (frame.to_excel if kind == "xlsx" else frame.to_parquet)(out, index=False)
    return out.getvalue()


def test_a_table_becomes_rows(client):
    """A cell does not become another field, and the cells are there as they were."""
    answer = sent(client, CSV).json()
    assert answer["header"] == ["Name", "Amount EUR", "Purpose"] and answer["lines"] == [2, 3]
    assert answer["cells"] == [["ann", "1500", "car, Amount: 9"], ["=SUM(1)", "nine", "étude"]]
    assert answer["features"] == ["Amount: 1500, Purpose: car, Amount 9", "Amount: nine, Purpose: étude"]
    assert answer["problems"] == {} and answer["notes"] == []
    read = [LOAN.canonical(text) for text in answer["features"]]
    assert read == ["Amount: 1500, Purpose: car, Amount 9", "Amount: Unknown, Purpose: étude"]


FRAME = pd.DataFrame({"amount_eur": [1500, 20.5], "purpose": ["car", "trip"]})
TEXT = "amount_eur;purpose\n1500;car\n20,5;trip\n"
KINDS = {
    "rows.csv": TEXT.encode("utf-8-sig"),
    "rows.txt": TEXT.encode("utf-16"),
    "rows.tsv": TEXT.replace(";", "\t").encode("cp1252"),
    "rows.csv.gz": gzip.compress(TEXT.encode()),
    "rows.xlsx": as_file(FRAME, "xlsx"),
    "rows.parquet": as_file(FRAME, "parquet"),
    "rows.json": FRAME.to_json(orient="records").encode(),
    "rows.jsonl": FRAME.to_json(orient="records", lines=True).encode(),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_is_read(name, tmp_path):
    answer = rows_of(tmp_path, KINDS[name], name)
    assert answer["features"] == ["Amount: 1500, Purpose: car", "Amount: 20.5, Purpose: trip"]
    assert answer["header"] == ["amount_eur", "purpose"] and not answer["problems"]


@pytest.mark.parametrize(
    ("body", "name", "features"),
    [
        (b"features,x\nAmount: 3,y\n", "a.csv", ["Amount: 3"]),
        (b"features,amount_eur\nAmount: 3,7\n", "a.csv", ["Amount: 7"]),
        (b'{"features": "Amount: 3", "amount_eur": 7}', "a.jsonl", ["Amount: 3"]),
        (b'{"features": "Amount: 3"}\n{"question": "Amount: 4"}\n', "a.jsonl", ["Amount: 3", "Amount: 4"]),
        (b'[{"fields": {"Amount": 3, "Purpose": "a, Amount: 7"}}]', "a.json", ["Amount: 3, Purpose: a, Amount 7"]),
    ],
)
def test_complete_feature_strings_are_taken_as_they_are(body, name, features, tmp_path):
    """The same of several texts is taken as by infer_creditmix.py."""
    assert rows_of(tmp_path, body, name)["features"] == features
    source = RowsToScore(tmp_path / name, tmp_path / "out.csv", LOAN, None, False)
    source.open()
    assert [source.parsed(row)[1] for row in source] == features


def test_nested_values_of_a_parquet_file_are_cells_as_json(tmp_path):
    when = pd.Timestamp("2024-05-01")
    frame = pd.DataFrame({"purpose": ["car"], "nested": [{"a": [1], "when": when}], "day": [when]})
    cells = rows_of(tmp_path, as_file(frame, "parquet"), "rows.parquet")["cells"][0]
    assert cells[0] == "car" and json.loads(cells[1])["when"].startswith("2024-05-01") and cells[2].startswith("2024")


def test_a_text_task_takes_its_column(tmp_path):
    answer = rows_of(tmp_path, b'id,Text\n1,"two\nlines, a: b"\n2,\n', task=TOPIC)
    assert answer["features"] == ["two\nlines, a: b", ""] and answer["problems"] == {1: "no features"}


def test_rows_that_cannot_be_scored_do_not_stop_the_others(tmp_path):
    body = b'{"features": "Amount: 3, Amount: 4"}\n{"fields": {"Amount": [1]}}\n{"features": "Amount: 5"}\n{"x": 1}\n'
    body += b'{"features": "' + b"x" * 2001 + b'"}\n'
    answer = rows_of(tmp_path, body, "a.jsonl")
    assert answer["features"] == ["", "", "Amount: 5", "", ""] and answer["lines"] == [1, 2, 3, 4, 5]
    assert answer["problems"][0].startswith("Amount occurs twice") and answer["problems"][1].startswith("Amount: one")
    assert answer["problems"][3] == "no features"
    assert answer["problems"][4] == "longer than 2000 characters"
    assert json.loads(answer["cells"][1][1]) == {"Amount": [1]}


def test_what_is_assumed_is_noted(tmp_path):
    notes = rows_of(tmp_path, b"amount_eurs;x\n1.234,5;\n20;\n20;\n")["notes"]
    assert notes == [
        "column amount_eurs: taken as amount_eur",
        "column amount_eur: numbers with a decimal comma",
        "column purpose missing: Unknown in all rows",
    ]


def test_a_column_with_two_readings_is_the_callers_choice(client):
    body = b"amount_eur,purpose\n19.114,car\n"
    error = assert_error(sent(client, body), 422, "two_readings")
    assert error["message"].startswith('rows.csv: row 2, column amount_eur: "19.114" has two readings')
    assert error["message"].endswith("decimal mark . reads 19.114, decimal mark , reads 19114")
    for mark, number in ((".", "19.114"), (",", "19114")):
        assert sent(client, body, decimal=mark).json()["features"] == [f"Amount: {number}, Purpose: car"]
    assert_error(sent(client, body, decimal="x"), 422, "invalid")


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        (b"", "rows.csv", "rows.csv: empty"),
        (b"amount_eur,purpose\n", "rows.csv", "rows.csv: no rows below the header"),
        (b"a,b\n1,2\n", "rows.csv", "rows.csv: column amount_eur, purpose missing; found a, b"),
        (b"purpose\n" + b"x\n" * (MAX_ROWS + 1), "rows.csv", "rows.csv: has 1,001 rows; the page takes 1,000"),
        (b"purpose,P_good\nx,1\n", "rows.csv", "rows.csv: column p_good would be there twice in the output"),
        (b"PK\x03\x04 no archive", "rows.xlsx", "rows.xlsx: damaged"),
        (b"\x1f\x8b no archive", "rows.csv.gz", "rows.csv.gz: damaged"),
        (b"PAR1 no table", "rows.parquet", "rows.parquet: damaged"),
        (b"[{", "../../etc/x.json", "x.json: not a JSON list"),
        (b"\x80\x04\x95\x00cposix\nsystem\n(S'true'\ntR.", "rows.pkl", "rows.pkl: "),
    ],
)
def test_files_that_cannot_be_read_are_explained(client, body, name, message):
    error = assert_error(sent(client, body, name), 422, "not_read")
    assert message in error["message"] and "/tmp" not in error["message"] and "Traceback" not in error["message"]


def test_only_a_body_that_no_form_sends_is_read(client):
    """A page of another site can send forms and plain text to this machine, but not this content type."""
    for kind in ("text/plain", "multipart/form-data", "application/json"):
        error = assert_error(client.post("/table", content=CSV, headers={"content-type": kind}), 415, "not_a_table")
        assert error["hint"] == "send the header Content-Type: application/octet-stream"
    assert_error(sent(client, b"x" * 1_000_001), 413, "too_large")


# --------------------------------------------------------------------------------------------------------------- bombs


def gzip_bomb() -> bytes:
    return gzip.compress(b"purpose\n" + b"x" * 65_000_000)


def parts_of_xlsx(sheet: bytes) -> bytes:
    """Return a workbook whose sheet is this XML."""
    source, out = zipfile.ZipFile(io.BytesIO(as_file(FRAME, "xlsx"))), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, sheet if name == "xl/worksheets/sheet1.xml" else source.read(name))
    return out.getvalue()


SHEET = b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>%s</sheetData></worksheet>'
CELL = b'<row r="%d"><c r="%s%d" t="inlineStr"><is><t>x</t></is></c></row>'


def large_xlsx() -> bytes:
    return parts_of_xlsx(SHEET % (CELL % (1, b"A", 1) + b" " * 65_000_000))


def sparse_xlsx() -> bytes:
    """Two cells, at the corners of a sheet of 17 billion."""
    return parts_of_xlsx(SHEET % (CELL % (1, b"A", 1) + CELL % (1_048_576, b"XFD", 1_048_576)))


def wide_parquet() -> bytes:
    """A column of 900 rows that are one text of 30 million letters, which the file has once."""
    out = io.BytesIO()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 900, pa.int32()), pa.array(["x" * 30_000_000]))
    parquet.write_table(pa.table({"purpose": texts}), out, compression="gzip")
    return out.getvalue()


def long_parquet() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"purpose": pa.array(["x"] * 3_000_000)}), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("bomb", "name", "message"),
    [
        (gzip_bomb, "rows.csv.gz", "rows.csv.gz: has more than 64 MB when decompressed"),
        (large_xlsx, "rows.xlsx", "rows.xlsx: has more than 64 MB when decompressed"),
        (long_parquet, "rows.parquet", "rows.parquet: has 3,000,000 rows"),
        (wide_parquet, "rows.parquet", "rows.parquet: needs too much memory"),
        (sparse_xlsx, "rows.xlsx", "the file was not read within 4 s"),
    ],
)
def test_what_expands_is_refused_within_its_limits(bomb, name, message):
    body = bomb()
    assert len(body) < 1_000_000

    async def ask() -> str:
        with pytest.raises(Refusal) as refusal:
            await TableReader(LOAN, 4 if bomb is sparse_xlsx else 60).read(body, name, None)
        return refusal.value.message

    assert asyncio.run(ask()).startswith(message)


def child_that(monkeypatch, tmp_path, commands: str) -> None:
    """Let another program take the place of the child."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{commands}\n")
    program.chmod(0o755)
    monkeypatch.setattr(uploads.sys, "executable", str(program))


def test_a_child_has_no_key_and_little_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CREDITMIX_API_KEY", "s3cret")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    child_that(monkeypatch, tmp_path, "env")
    output = asyncio.run(TableReader(LOAN, 20).read(CSV, "rows.csv", None)).decode()
    assert "PATH=" in output and "s3cret" not in output


def test_a_child_that_crashes_or_hangs_is_told_and_ended(monkeypatch, tmp_path):
    child_that(monkeypatch, tmp_path, "kill -SEGV $$")
    with pytest.raises(Refusal) as refusal:
        asyncio.run(TableReader(LOAN, 20).read(CSV, "rows.csv", None))
    assert (refusal.value.status, refusal.value.code) == (422, "not_read")
    assert "ended with status -11" in refusal.value.message
    child_that(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100")
    with pytest.raises(Refusal) as refusal:
        asyncio.run(TableReader(LOAN, 0.5).read(CSV, "rows.csv", None))
    assert (refusal.value.status, refusal.value.code) == (504, "timeout")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_one_file_at_a_time_and_few_wait(monkeypatch, tmp_path):
    child_that(monkeypatch, tmp_path, f"mkdir {tmp_path}/only || exit 9; sleep 0.1; rmdir {tmp_path}/only; echo {{}}")

    async def ask() -> list:
        reader = TableReader(LOAN, 20)
        jobs = (reader.read(CSV, "rows.csv", None) for _ in range(MAX_WAITING + 2))
        return await asyncio.gather(*jobs, return_exceptions=True)

    answers = asyncio.run(ask())
    assert answers[:MAX_WAITING] == [b"{}\n"] * MAX_WAITING
    assert [(refusal.status, refusal.code) for refusal in answers[MAX_WAITING:]] == [(503, "busy")] * 2


def test_nothing_of_a_file_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(uploads.tempfile, "tempdir", str(tmp_path))
    assert asyncio.run(TableReader(default_task(), 20).read(b"Age\n23\n", "rows.csv", None))
    assert list(tmp_path.iterdir()) == []


def test_the_limits_of_a_child_are_set():
    """In another process: they cannot be raised again."""
    code = "import resource as r; from distil.serving.table_child import limit_itself; limit_itself(2.4)\n"
    code += "print([r.getrlimit(x)[0] for x in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_CORE)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=uploads.ROOT)
    assert json.loads(done.stdout) == [table_child.MEMORY, 2, table_child.MAX_EXPANDED, 0]
