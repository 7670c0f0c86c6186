"""Rows to score from tables and JSONL, and files of scored rows: every cell of the input, and what was found out."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from conftest import read_lines

from common import InputError
from distil import batch
from distil.creditmix import scored
from distil.creditmix.scored import RowsToScore
from distil.tables import Table
from distil.tasks import default_task, task_of

LABELS = {"Good": 0.5, "Standard": 0.3, "Bad": 0.2}
RESPONSE = {"model_name": "m", "prediction": "Good", "scores": {}, "raw_scores": {}, "prior": {}}
RESPONSE |= {"probabilities": LABELS, "top2_margin": 0.25}
CSV = (
    'Customer_ID;AGE;occupation;Annual_Income;Outstanding Debt;CreditUtilizationRatio;Payment Behavior;"my ; own";N\n'
    '007;23;Lawyer, Age: 50;19114,12;809,98;35,5;Low_spent;"=1+1";\n'
    '8;many;;1.234,5;5;30;x;"a\n""b""";z\n'
)
ROWS = list(csv.reader(CSV.splitlines(True), delimiter=";"))
FEATURES = [
    "Age: 23, Occupation: Lawyer, Age 50, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.5, Payment Behaviour: Low_spent",
    "Age: many, Occupation: , Annual Income: 1234.5, Outstanding Debt: 5, Credit Utilization Ratio: 30, "
    "Payment Behaviour: x",
]
ADDED = ["prediction", "p_Good", "p_Standard", "p_Bad", "top2_margin"]
TEXT_TASK = task_of(
    {"name": "mood", "instruction": "Mood?", "labels": ["Good", "Bad"], "label_column": "mood", "text_column": "text"},
    "test",
)


def rows_of(source, output="out.csv", task=None, decimal=None, refer=False) -> RowsToScore:
    rows = RowsToScore(Path(source), Path(output), task or default_task(), decimal, refer)
    rows.open()
    return rows


def texts_of(source, **options) -> list[str | None]:
    rows = rows_of(source, **options)
    return [rows.parsed(item)[1] for item in rows]


def score(rows: RowsToScore, output: str, chunk: int = 1, stop: int = -1) -> int:
    """Write the output as the script does, but with one response for all; stop: the chunk that is interrupted."""
    response, chunks = RESPONSE | {"extra": {"refer": True}} if "refer" in rows.added else RESPONSE, []

    def work(items: list) -> list[dict]:
        chunks.append(1)
        if len(chunks) == stop:
            raise KeyboardInterrupt
        parsed = [rows.parsed(item) for item in items]
        return [row if text is None else row | rows.columns(response) for row, text in parsed]

    return batch.run_file(rows.path, Path(output), {}, chunk, work, rows)


def written(path: str) -> list[list[str]]:
    with (gzip.open if path.endswith("gz") else open)(path, "rt", newline="") as text:
        return list(csv.reader(text))


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_table_gives_the_feature_string_that_training_reads(here):
    Path("in.csv").write_text(CSV)
    assert texts_of("in.csv") == FEATURES
    frame = pd.DataFrame(ROWS[1:], columns=ROWS[0]).replace(",", ".", regex=True)
    frame.to_parquet("in.parquet")
    frame.to_excel("in.xlsx", index=False)
    frame.to_json("in.json", orient="records")
    for name in ("in.parquet", "in.xlsx", "in.json"):
        assert texts_of(name)[0].startswith("Age: 23, Occupation: Lawyer. Age 50, Annual Income: 19114.12, "), name


def test_a_csv_keeps_its_cells_and_gets_the_scores(here, capsys):
    Path("in.csv").write_text(CSV)
    assert score(rows_of("in.csv"), "out.csv") == 0
    header, *lines = written("out.csv")
    assert header == ROWS[0] + ADDED
    assert lines == [[*row, "Good", "0.5", "0.3", "0.2", "0.25"] for row in ROWS[1:]]
    assert sorted(path.name for path in here.iterdir()) == ["in.csv", "out.csv"]
    assert "column Annual_Income: numbers with a decimal comma" in capsys.readouterr().err
    assert score(rows_of("in.csv", "out.csv.gz", refer=True), "out.csv.gz") == 0
    assert written("out.csv.gz")[1] == [*ROWS[1], "Good", "0.5", "0.3", "0.2", "0.25", "True"]


@pytest.mark.parametrize("kind", ["xlsx", "parquet"])
def test_other_tables_keep_their_cells(here, kind):
    """Also what Excel would take for a formula, and a sign that its files cannot hold."""
    Path("in.csv").write_text(CSV.replace("Low_spent", "Low\x07spent"))
    score(rows_of("in.csv", f"out.{kind}"), f"out.{kind}")
    excel = kind == "xlsx"
    read = pd.read_excel("out.xlsx", dtype=object, na_filter=False) if excel else pd.read_parquet("out.parquet")
    assert list(read) == ROWS[0] + ADDED
    wanted = [[cell.replace("Low_spent", "Low\ufffdspent" if excel else "Low\x07spent") for cell in ROWS[1]]]
    assert read.iloc[:, : len(ROWS[0])].to_numpy().tolist() == [*wanted, ROWS[2]]
    assert read["p_Good"].tolist() == [0.5, 0.5] and read["top2_margin"].tolist() == [0.25, 0.25]


def test_excel_numbers_stay_numbers_and_long_cells_are_cut_with_a_note(here, capsys):
    Path("in.json").write_text(json.dumps([{"Age": 23, "x": 1.5}, {"Age": 24, "x": "y" * 40_000}, {"Age": True}]))
    score(rows_of("in.json", "out.xlsx"), "out.xlsx")
    read = pd.read_excel("out.xlsx", dtype=object, na_filter=False)
    assert read["Age"].tolist() == [23, 24, True] and read["x"].tolist() == [1.5, "y" * 32_767, ""]
    assert "1 cells were cut: an Excel cell holds 32767 letters" in capsys.readouterr().err


def test_a_table_as_jsonl_has_its_cells_and_the_response(here):
    Path("in.csv").write_text(CSV)
    score(rows_of("in.csv", "out.jsonl"), "out.jsonl")
    first = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert first == dict(zip(ROWS[0], ROWS[1], strict=True)) | RESPONSE
    Path("in.json").write_text(json.dumps([{"Age": 23, "more": [1, {"a": None}]}, {"Age": None, "x": 1.0}]))
    score(rows_of("in.json", "list.jsonl"), "list.jsonl")
    lines = [json.loads(line) for line in Path("list.jsonl").read_text().splitlines()]
    assert lines == [{"Age": 23, "more": [1, {"a": None}]} | RESPONSE, {"Age": None, "x": 1.0} | RESPONSE]


def test_columns_that_are_missing_are_unknown_with_a_note_and_none_is_refused(here, capsys):
    Path("in.csv").write_text("id,Age\n1,23\n")
    assert texts_of("in.csv") == ["Age: 23"]
    assert "in.csv: column Annual_Income missing: Unknown in all rows" in capsys.readouterr().err
    Path("in.csv").write_text('id,features\n1,"Age: 23, Wage: 5"\n2,\n')
    assert texts_of("in.csv") == ["Age: 23, Wage: 5", None]
    Path("in.csv").write_text("Age;a, b;c, d\n23;1;2\n")  # the separator is that of the task's columns
    assert texts_of("in.csv") == ["Age: 23"]
    Path("in.csv").write_text("Age,Annual_Incomes,Annual_Incomee\n23,1,2\n")
    with pytest.raises(InputError, match=r"column Annual_Income missing; found Age, Annual_Incomes, Annual_Incomee"):
        rows_of("in.csv")
    Path("in.csv").write_text("id,x\n1,2\n")
    with pytest.raises(InputError, match=r"column Age, Occupation, .* missing; found id, x"):
        rows_of("in.csv")


def test_rows_that_cannot_be_scored_have_an_error_cell(here, capsys):
    Path("in.json").write_text(json.dumps([{"Age": 23}, {"Age": [1]}, {"Age": 5}]))
    assert score(rows_of("in.json"), "out.csv") == 1
    header, *lines = written("out.csv")
    assert header == ["Age", *ADDED, "error"]
    message = "bad_fields: Age: one text or number is needed, found a list or an object"
    assert [line[-1] for line in lines] == ["", message, ""] and lines[1] == ["[1]", *[""] * 5, message]
    assert "out.csv: 1 of 3 lines carry an error" in capsys.readouterr().err


def test_a_text_task_reads_its_column(here):
    Path("in.csv").write_text('id,Text\n1,"so, fine: a b"\n2," "\n')
    assert texts_of("in.csv", task=TEXT_TASK) == ["so, fine: a b", None]
    lines = [{"text": "a"}, {"features": "b"}, {"fields": {"Text": "c"}}, {"question": "d"}]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert texts_of("in.jsonl", task=TEXT_TASK) == ["a", "b", "c", None]
    assert score(rows_of("in.csv", task=TEXT_TASK), "out.csv") == 1


def test_what_the_output_cannot_hold_is_refused_before_a_model_loads(here, monkeypatch):
    def refused(text: str, output: str, match: str, **options) -> None:
        Path("in.csv").write_text(text)
        with pytest.raises(InputError, match=match):
            rows_of("in.csv", output, **options)

    twice = "column prediction, p_Good would be there twice in the output; rename or remove it"
    refused("Age,Prediction,p_good\n1,2,3\n", "o.csv", twice)
    refused("Age,error\n1,2\n", "o.jsonl", "column error would be there twice")
    refused("Age,Scores\n1,2\n", "o.jsonl", "column scores would be there twice")
    assert texts_of("in.csv", output="o.csv") == ["Age: 1"]
    refused("Age,x,x\n1,2,3\n", "o.parquet", "column x occurs twice; keep one, or write .csv")
    refused("Age,,\n1,2,3\n", "o.jsonl", "column without a name occurs twice")
    score(rows_of("in.csv", "o.csv"), "o.csv")
    assert written("o.csv")[1][:3] == ["1", "2", "3"]
    refused("Age\n1\n", "o.tsv", "--output: a name with .jsonl, .csv, .csv.gz, .xlsx, .parquet is needed")
    refused("Age\n", "o.csv", "in.csv: no rows below the header")
    refused("Age,Outstanding_Debt\n1,809.981\n", "o.csv", 'column Outstanding_Debt: "809.981" has two readings')
    assert texts_of("in.csv", decimal=",") == ["Age: 1, Outstanding Debt: 809981"]
    monkeypatch.setattr(scored, "EXCEL_ROWS", 2)
    refused("Age\n1\n2\n", "o.xlsx", "an Excel sheet holds 1 rows; write .csv or .parquet")


# --------------------------------------------------------------------------------------------------------------- JSONL


LINES = [
    {"id": 1, "fields": {"Age": 23, "Annual_Income": 19114.12}},
    {"id": 2, "features": "Age: 5", "extra": {"a": [1]}},
    {"id": 3},
    {"id": 4, "fields": {"Age": [1]}},
    {"id": 5, "fields": "Age: 5"},
    {"question": "Age: 7", "error": {"code": "x", "message": "of an earlier run"}},
]


def test_fields_are_as_good_as_a_feature_string(here):
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert texts_of("in.jsonl") == ["Age: 23, Annual_Income: 19114.12", "Age: 5", None, None, None, "Age: 7"]
    Path("in.json").write_text(json.dumps(LINES))
    assert texts_of("in.json") == texts_of("in.jsonl")
    rows = rows_of("in.jsonl", "out.jsonl")
    assert [rows.parsed(line)[0].get("error", {}).get("code") for line in rows] == [
        *[None, None, "no_features", "bad_fields", "no_features", None]
    ]


def test_jsonl_of_columns_is_a_table(here, capsys):
    Path("in.jsonl").write_text('{"AGE": 23, "Occupation": "Lawyer", "Annual_Income": "19,5"}\n\n{"x": 1, "AGE": 5}\n')
    assert [text.split(", Out")[0] for text in texts_of("in.jsonl", output="out.jsonl")] == [
        "Age: 23, Occupation: Lawyer, Annual Income: 19.5",
        "Age: 5, Occupation: , Annual Income: ",
    ]
    assert score(rows_of("in.jsonl", "out.jsonl"), "out.jsonl") == 0
    assert read_lines("out.jsonl")[1] == {"x": 1, "AGE": 5} | RESPONSE
    assert "Annual_Income: numbers with a decimal comma" in capsys.readouterr().err


def test_jsonl_becomes_a_table(here):
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:3]) + "{broken\n")
    assert score(rows_of("in.jsonl"), "out.csv") == 2
    header, *lines = written("out.csv")
    assert header == ["id", "fields", "features", "extra", *ADDED, "error"]
    assert lines[0][:5] == ["1", '{"Age": 23, "Annual_Income": 19114.12}', "", "", "Good"]
    assert lines[1][:5] == ["2", "", "Age: 5", '{"a": [1]}', "Good"]
    assert lines[3][:5] == [""] * 5 and lines[3][-1].startswith("not_json: the line is not JSON")
    for name in ("out.tsv", "out.jsonl.gz"):
        with pytest.raises(InputError, match=r"--output: a name with \.jsonl, \.csv"):
            rows_of("in.jsonl", name)
    with pytest.raises(InputError, match="--decimal: only for tables"):
        rows_of("in.jsonl", decimal=",")


# ----------------------------------------------------------------------------------------------------- long and broken


def test_a_resumed_table_is_byte_identical(here, capsys):
    Path("in.csv").write_text("Age,x\n" + "".join(f"{n},é{n}\n" for n in range(11)))
    for name in ("full.csv", "out.csv", "full.csv.gz", "out.csv.gz", "full.parquet", "out.parquet"):
        if name.startswith("out"):
            with pytest.raises(KeyboardInterrupt):
                score(rows_of("in.csv", name), name, chunk=2, stop=3)
            part = Path(f"{name}.part")
            assert len(part.read_text().splitlines()) == 4 and not Path(name).exists()
            part.write_text(part.read_text() + '{"cells": ["4')  # a kill in the middle of a line
            capsys.readouterr()
        score(rows_of("in.csv", name), name, chunk=2)
        assert ("resuming after 4 rows" in capsys.readouterr().err) == name.startswith("out")
        assert Path(name).read_bytes() == Path(name.replace("out", "full")).read_bytes()
    assert not list(here.glob("*.part*")) and not list(here.glob(".*"))


def test_processes_write_one_table(here, monkeypatch):
    Path("in.csv").write_text("Age\n" + "".join(f"{n}\n" for n in range(11)))
    monkeypatch.setattr(batch, "gather", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        score(rows_of("in.csv"), "out.csv", chunk=2)
    assert [line[0] for line in written("out.csv")] == ["Age", *map(str, range(11))]
    assert sorted(path.name for path in here.iterdir()) == ["in.csv", "out.csv"]


def test_a_csv_of_any_length_needs_little_memory(here):
    with open("in.csv", "w") as out:
        out.write("Age,Outstanding Debt,x\n")
        out.writelines(f"{n % 90},{n * 1.37:.2f},{'word ' * 400}{n}\n" for n in range(2000))
    rows_of("in.csv")  # what is loaded only once
    tracemalloc.start()
    try:
        score(rows_of("in.csv"), "out.csv", chunk=64)
        assert tracemalloc.get_traced_memory()[1] < Path("in.csv").stat().st_size / 3
    finally:
        tracemalloc.stop()
    assert len(written("out.csv")) == 2001


def test_a_table_counts_its_rows_as_it_gives_them(here):
    Path("in.csv").write_text("\nAge;x\n1;a\n\n;\n2;b\n")
    table = Table("in.csv", {"Age": "number"}, None, Counter())
    assert table.count == 2 and [(row, values["Age"]) for row, _, values in table] == [(3, "1"), (6, "2")]
