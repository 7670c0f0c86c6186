"""Drafts of task files, and tasks of 2, 3 and 77 labels from a raw table to scored rows."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import FLOAT32, PLAIN, read_lines

import creditmix_prepare
import eval_creditmix
import infer_creditmix
import kd_train
import sft_train
from common import InputError
from data import make_examples
from distil.creditmix.draft import draft_task, task_lines, task_text
from distil.tasks import PROMPTS, Task, task_of

ROWS = 120


def write_table(path: Path, header: list[str], rows: list[list[Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])
    return str(path)


def draft(path: str, label: str, group: str | None = None, decimal: str | None = None) -> tuple[Task, str]:
    """Return a drafted task, after writing and reading it, and its guesses, a line each."""
    task, guesses = draft_task(path, "table", label, group, decimal)
    assert task_of(json.loads(task_text(task)), "draft") == task
    return task, "\n".join(guesses)


def column(folder: Path, values: list[Any], name: str = "x", decimal: str | None = None) -> tuple[Any, str]:
    """Return the field that is drafted for a column of these values, repeated to ROWS rows, and the guesses.
    None where it is left out."""
    rows = [[values[i % len(values)], i % 7, "ab"[i % 2]] for i in range(ROWS)]
    task, guesses = draft(write_table(folder / "t.csv", [name, "other", "y"], rows), "y", decimal=decimal)
    return next((field for field in task.fields if field.column == name), None), guesses


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    assert make_examples.main([str(folder)]) == 0
    return folder


def test_the_examples_are_what_their_docstring_says(examples, tmp_path):
    assert make_examples.main([str(tmp_path)]) == 0 and make_examples.main([str(tmp_path / "b"), "--seed", "1"]) == 0
    for name in ("loans.csv", "messages.csv"):
        assert (tmp_path / name).read_bytes() == (examples / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() != (examples / name).read_bytes()
    loans = (examples / "loans.csv").read_bytes()
    assert "Café owner".encode("cp1252") in loans and b"?" in loans and b";2.067,16;" in loans
    texts = list(csv.DictReader((examples / "messages.csv").open(encoding="utf-8")))
    assert {row["label"] for row in texts} == set(make_examples.INTENTS) and len(texts) == make_examples.MESSAGES


def test_the_draft_of_the_table(examples):
    task, guesses = draft(str(examples / "loans.csv"), "outcome", "Applicant_ID")
    assert (task.labels, task.group_column, task.text_column, task.missing) == (
        ("bad", "good"),
        "Applicant_ID",
        None,
        ("?",),
    )
    kinds = {field.name: field.kind for field in task.fields}
    assert kinds.pop("Occupation") == kinds.pop("Purpose") == "word"
    assert set(kinds) == {"Age", "Monthly Income", "Savings", "Open Loans", "Amount", "Months"}
    assert set(kinds.values()) == {"number"}
    assert [field.name for field in task.fields if field.protected] == ["Age"]
    assert task.by_name["Savings"].range[1] >= 30000 and task.by_name["Months"].range[1] < 1000
    assert "cp1252" in guesses and "bad or good" in guesses and "group_column" not in guesses
    assert any("0 to 70,000, 3 digits" in line for line in task_lines(task))
    without, guesses = draft(str(examples / "loans.csv"), "Outcome")
    assert "Applicant_ID" not in without.feature_columns
    assert "Applicant_ID (an id with 600 values; --group_column Applicant_ID keeps" in guesses


def test_the_draft_of_the_texts(examples):
    task, guesses = draft(str(examples / "messages.csv"), "label")
    assert (task.text_column, task.fields, task.group_column) == ("text", (), None)
    assert task.labels == tuple(sorted(make_examples.INTENTS)) and "address_change, card_lost" in task.instruction
    assert "no --group_column" in guesses and task_lines(task)[0] == "text in column text"


@pytest.mark.parametrize(
    ("values", "kind", "digits"),
    [
        (list(range(18, 80)), "number", 3),
        (list(range(1950, 2021)), "number", 4),  # years: 3 digits would make decades of them
        ([f"{1.7e9 + 1000 * i:.0f}" for i in range(90)], "number", 6),
        ([random.Random(i).randint(10**6, 6 * 10**6) for i in range(110)], "number", 3),
        ([f"{i / 7000:.6f}" for i in range(90)], "number", 3),
        ([f"$ {i}.50" for i in range(50)], "number", 3),
        (["1.234,5", "12,75", "7,5"], "number", 3),
        (["01067", "80331", "04109"], "word", 3),
        (["low", "high"], "word", 3),
        (["1-2", "3-4", "5"], "word", 3),
        ([f"a customer wrote a long remark that has the number {i}" for i in range(90)], "text", 3),
    ],
)
def test_kinds_and_digits(tmp_path, values, kind, digits):
    field, _ = column(tmp_path, values)
    assert (field.kind, field.digits) == (kind, digits)


def test_ranges_are_wide_and_round(tmp_path):
    assert column(tmp_path, list(range(1, 40)))[0].range == (0, 500)
    assert column(tmp_path, [-5, 0, 5])[0].range == (-200, 200)
    field, guesses = column(tmp_path, [*range(1, 118), 9_000_000])
    assert field.range == (0, 2000) and "x: 1 values outside 0 to 2,000 will be Unknown" in guesses
    field, guesses = column(tmp_path, [*range(1, 40), -999])
    assert field.range == (0, 500) and "x: 3 values outside" in guesses


def test_marks_of_missing_values_do_not_make_words_of_numbers(tmp_path):
    for mark in ("?", " ?", "NA", "", "none"):
        assert column(tmp_path, [*range(20), mark])[0].kind == "number"
    field, guesses = column(tmp_path, [*range(20), "k.A.", "k.A.", "k.A."])
    assert field.kind == "number" and "that are not numbers will be Unknown (k.A.)" in guesses
    assert column(tmp_path, ["own", "rent", "none"])[0].kind == "word"
    path = write_table(tmp_path / "m.csv", ["x", "y"], [[" ?", "a"], ["3", "b"], ["-", "a"], ["4", "NA"]] * 5)
    task, guesses = draft(path, "y")
    assert task.missing == ("-", "?", "NA") and task.labels == ("a", "b") and "NA (5 rows), read as missing" in guesses


def test_columns_that_say_nothing_are_left_out(tmp_path):
    rows = [[i, f"C{i // 2}", 7, "", i, 100 + i * 0.37, "ab"[i % 2]] for i in range(ROWS)]
    header = ["id", "CustomerID", "constant", "empty", "", "amount_paid", "y"]
    task, guesses = draft(write_table(tmp_path / "t.csv", header, rows), "y")
    assert [field.name for field in task.fields] == ["amount paid"]
    for text in ("id (another value", "constant (one value", "empty (empty)", "a column without a name"):
        assert f"left out: {text}" in guesses
    assert "CustomerID (an id with 60 values" in guesses
    task, _ = draft(str(tmp_path / "t.csv"), "y", "customer id")
    assert task.group_column == "CustomerID"


@pytest.mark.parametrize(
    ("labels", "wanted", "own_map"),
    [
        (["0", "1"], ("no", "yes"), {"0": "no", "1": "yes"}),
        (["1.0", "0.0"], ("no", "yes"), {"1.0": "yes", "0.0": "no"}),
        (["1", "2", "10"], ("1", "2", "10"), {}),
        (["Yes", "yes", "Yes", "NO"], ("NO", "Yes"), {}),
        (["b", "a", "_", "nan"], ("a", "b"), {}),
    ],
)
def test_labels(tmp_path, labels, wanted, own_map):
    rows = [[i % 13, labels[i % len(labels)]] for i in range(ROWS)]
    task, guesses = draft(write_table(tmp_path / "t.csv", ["x", "y"], rows), "y")
    assert (task.labels, dict(task.label_map)) == (wanted, own_map)
    assert ("mean nothing to a model" in guesses) == bool(own_map)


@pytest.mark.parametrize(
    ("header", "rows", "flags", "says"),
    [
        (["x", "y"], [[i, f"l{i % 101}"] for i in range(202)], [], "column y has 101 different labels"),
        (["x", "y"], [[i, "a"] for i in range(9)], [], "column y has 1 different labels"),
        (["x", "z"], [[1, "a"]], [], "--label_column y: no such column; found x, z"),
        (["x", "y"], [[1, "a"], [2, "b"]], ["--group_column", "q"], "--group_column q: no such column"),
        (["x", "y"], [[1, "a"], [1, "b"]], [], "no column besides y can be used"),
        (["x", "y"], [["1.234", "a"], ["2.345", "b"]], [], 'column x: "1.234" has two readings'),
    ],
)
def test_what_cannot_be_drafted_is_refused(here, header, rows, flags, says):
    path = write_table(here / "t.csv", header, rows)
    with pytest.raises(InputError) as error:
        creditmix_prepare.main(["--init_task", "task.json", "--src", path, "--label_column", "y", *flags])
    assert says in str(error.value) and "\n" not in str(error.value) and not Path("task.json").exists()


def test_a_task_file_is_not_overwritten(here):
    path = write_table(here / "t.csv", ["x", "y"], [[i, "ab"[i % 2]] for i in range(20)])
    flags = ["--init_task", "own/task.json", "--src", path, "--label_column", "y"]
    assert creditmix_prepare.main(flags) == 0
    Path("own/task.json").write_text("edited")
    with pytest.raises(InputError, match=r"own/task.json: exists; remove it"):
        creditmix_prepare.main(flags)
    assert Path("own/task.json").read_text() == "edited"


# --------------------------------------------------------------------------------- from a raw table to scored rows

QUICK = [*FLOAT32, "--max_steps", "2", "--batch_size", "4", "--grad_accum", "1", "--warmup_steps", "0"]


def run_through(
    data: str, label: str, trainer: Any, model_dir: str, group: tuple = (), edits: dict | None = None
) -> tuple[Task, list[dict[str, str]]]:
    """Draft a task, prepare, train two steps, evaluate with --fit and score five rows of the table; check what each
    writes, and return the task and the scored rows. edits: of the task file."""
    assert creditmix_prepare.main(["--init_task", "task.json", "--src", data, "--label_column", label, *group]) == 0
    record = json.loads(Path("task.json").read_text()) | (edits or {})
    Path("task.json").write_text(json.dumps(record))
    task = task_of(record, "task.json")
    assert creditmix_prepare.main(["--task", "task.json", "--src", data, "--outdir", "made"]) == 0
    part = trainer.__name__.removesuffix("_train")
    rows = read_lines(f"made/{task.name}_{part}.jsonl")
    assert {row.get("output", row.get("teacher_output")) for row in rows} == set(task.labels)
    flags = ["--student", model_dir, "--data", f"made/{task.name}_{part}.jsonl", "--save_dir", "run", *QUICK]
    assert trainer.main(flags) == 0
    assert json.loads(Path("run/task.json").read_text()) == task.record | PROMPTS
    few = ["--fit_per_class", "5", "--val_per_class", "5", "--bootstrap", "20", "--report_dir", "report"]
    few += ["--fit", "--calibration", "auto", *PLAIN]
    assert eval_creditmix.main(["--model_dir", "run", "--data", data, *few]) == 0
    (model,) = json.loads(Path("report/metrics.json").read_text())["models"]
    assert 0 <= model["accuracy"] <= 1 and model["nll"] > 0
    assert list(json.loads(Path("run/calibration.json").read_text())["bias"]) == list(task.labels)
    Path("few.csv").write_bytes(b"".join(Path(data).read_bytes().splitlines(keepends=True)[:6]))
    assert infer_creditmix.main(["--model_dir", "run", "--input", "few.csv", "--output", "scored.csv", *PLAIN]) == 0
    with open("scored.csv", encoding="utf-8") as file:
        scored = list(csv.DictReader(file))
    assert len(scored) == 5
    for row in scored:
        assert sum(float(row[f"p_{name}"]) for name in task.labels) == pytest.approx(1, abs=1e-3)
        assert row["prediction"] in task.labels
    return task, scored


def test_two_labels_of_the_example_table_by_kd(here, examples, model_dir):
    """The table is scored as it is in the file: cp1252, semicolons, decimal commas."""
    data = here / "loans.csv"
    data.write_bytes(b"".join((examples / "loans.csv").read_bytes().splitlines(keepends=True)[:401]))
    group = ("--group_column", "Applicant_ID")
    task, (first, *_) = run_through(str(data), "Outcome", kd_train, model_dir, group)
    assert task.labels == ("bad", "good")
    assert (first["Applicant_ID"], first["Monthly_Income"], first["Occupation"]) == ("A0001", "2.067,16", "Driver")


def test_three_mapped_labels_by_sft(here, model_dir):
    rng = random.Random(0)
    rows = [[rng.randint(1, 900), rng.choice(["red", "blue"]), i % 3] for i in range(240)]
    data = write_table(here / "three.csv", ["amount", "colour", "grade"], rows)
    edits = {"labels": ["low", "middle", "high"], "label_map": {"0": "low", "1": "middle", "2": "high"}}
    run_through(data, "grade", sft_train, model_dir, edits=edits | {"balanced": True})
    assert len(set(Counter(row["output"] for row in read_lines("made/three_sft.jsonl")).values())) == 1


def test_77_labels_of_texts_by_sft(here, model_dir):
    rows = [[f"topic {i % 77} row {i}", f"about_topic_{i % 77}"] for i in range(77 * 16)]
    data = write_table(here / "topics.csv", ["text", "topic"], rows)
    task, _ = run_through(data, "topic", sft_train, model_dir)
    assert len(task.labels) == 77 and task.instruction == "Give the topic of this text."
