"""Task files: what is refused, what a task makes of a row, and which task a model and its data carry."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import read_lines, write_lines

import creditmix_prepare
import dpo_prepare
import dpo_train
import kd_prepare
import kd_train
import sft_train
from common import InputError
from distil.creditmix.rows import read_rows, sample_rows
from distil.features import Field, canonical_number
from distil.models import resolve
from distil.splits import Provenance, split_of
from distil.tasks import PROMPTS, Task, chosen_task, default_task, model_task, read_task, task_of
from distil.training.data import TrainingData
from distil.training.run import task_of_run

TASK = default_task()
RECORD = {
    "name": "loans",
    "instruction": "Rate the risk.",
    "labels": ["low", "high"],
    "label_column": "status",
    "label_map": {"paid": "low"},
    "fields": [
        {"name": "amount", "column": "credit_amount", "kind": "number", "range": [0, 5000], "digits": 2},
        {"name": "purpose", "column": "purpose"},
        {"name": "remark", "column": "remark", "kind": "text"},
    ],
}
LOANS = task_of(RECORD, "loans")
TEXTS = task_of(
    {"name": "mail", "instruction": "Sort.", "labels": ["a", "b"], "label_column": "y"} | {"text_column": "x"}, ""
)


def changed_record(**changes) -> dict:
    return {key: value for key, value in (RECORD | changes).items() if value is not None}


def test_the_record_of_a_task_is_its_file():
    for task in (TASK, LOANS, TEXTS):
        assert task_of(json.loads(json.dumps(task.record)), "copy") == task
    assert json.loads(Path("data/creditmix_task.json").read_text()) == TASK.record


def test_a_task_of_an_adapter_has_what_its_prompts_were_made_with():
    assert PROMPTS == {"template_date": "2024-07-26", "thinking": False}
    assert task_of(RECORD | PROMPTS, "runs/a/task.json") == LOANS
    assert not set(PROMPTS) & set(LOANS.record)  # nobody has to write them


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "My Task"}, "name: a-z"),
        ({"labels": ["low"]}, '"labels": 2 to 100'),
        ({"labels": [str(i) for i in range(101)]}, '"labels": 2 to 100'),
        ({"labels": ["low", "Low"]}, "also in another case"),
        ({"labels": ["low", "high\nrisk"]}, '"labels": 2 to 100 texts'),
        ({"labels": ["low", 1]}, '"labels": 2 to 100 texts'),
        ({"label_map": {"paid": "none"}}, '"label_map"'),
        ({"label_map": {"LOW": "high"}}, "is itself a label"),
        ({"label_map": {"ok": "low", "OK": "high"}}, "differ in case alone"),
        ({"instruction": " "}, '"instruction"'),
        ({"text_column": "remark"}, 'either "fields" or one "text_column"'),
        ({"fields": []}, 'either "fields" or one "text_column"'),
        ({"fields": [{"name": "a: b", "column": "a"}]}, "without , : and ;"),
        ({"fields": [{"name": "a", "column": ""}]}, "field 1: a name"),
        ({"fields": [{"name": "a", "column": " a"}]}, "field 1: a name"),
        ({"fields": [{"name": "a", "column": "a", "kind": "date"}]}, "kind 'date'"),
        ({"fields": [{"name": "a", "column": "a", "range": [5, 1]}]}, "range is"),
        ({"fields": [{"name": "a", "column": "a", "digits": 0}]}, "digits is"),
        ({"fields": [{"name": "a"}, {"name": "A"}]}, "the name a is used twice"),
        ({"fields": [{"name": "a", "column": "Status"}]}, "the column status is used twice"),
        ({"group_column": "purpose"}, "the column purpose is used twice"),
        ({"validation_share": 1}, '"validation_share"'),
        ({"label_tokens": "first"}, '"label_tokens"'),
        ({"balanced": "yes"}, '"balanced"'),
        ({"thinking": True}, '"thinking" is true there and false in this version, so its prompts would differ'),
        ({"template_date": "2026-01-01"}, '"template_date" is "2026-01-01" there and "2024-07-26" in this version'),
        ({"colour": 1}, "unknown key colour"),
        ({"labels": None}, "labels missing"),
    ],
)
def test_a_wrong_task_file_is_one_clear_error(tmp_path, changes, says):
    (tmp_path / "task.json").write_text(json.dumps(changed_record(**changes)))
    with pytest.raises(InputError) as error:
        read_task(tmp_path / "task.json")
    assert says in str(error.value) and str(error.value).startswith(str(tmp_path / "task.json"))
    assert "\n" not in str(error.value)


def test_what_only_a_number_has_does_not_count_for_other_kinds():
    """The kind of a drafted field is changed by hand: the task stays equal to the copies of data and adapters."""
    task = task_of(changed_record(fields=[RECORD["fields"][0] | {"kind": "word"}]), "t")
    assert task_of(task.record, "t") == task and task.fields == (Field("amount", "credit_amount"),)


def test_digits():
    assert [canonical_number(x) for x in (19114.12, 35.27, 9.876, 0.12345, -1234)] == [
        "19100",
        "35",
        "9.88",
        "0.123",
        "-1230",
    ]
    assert [canonical_number(x, 4) for x in (2014, 99.876, 101.26)] == ["2014", "99.88", "101"]
    assert [canonical_number(x, 2) for x in (1999, 9.9, 0.55)] == ["2000", "10", "0.55"]


def test_a_row_becomes_a_prompt_by_the_task():
    notes = Counter()
    text = "Credit Amount: 1234, purpose: car, new, remark: ok; Wage: 5"
    wanted = "amount: 1200, purpose: car, new, remark: ok, Wage: 5"
    assert LOANS.prompt(text, notes) == f"Rate the risk.\n{wanted}"
    assert any("Wage is not a field" in doubt for doubt in LOANS.doubts(notes))
    cells = LOANS.features({"amount": 1234.5, "purpose": "car: new;\nred", "remark": "a, amount: 7"})
    assert LOANS.canonical(cells) == "amount: 1200, purpose: car new red, remark: a, amount 7"
    other = LOANS.canonical(LOANS.features({"amount": 12, "note": "tea, coffee"}))
    assert other == "amount: 12, purpose: Unknown, remark: Unknown, note: tea,coffee"
    assert LOANS.canonical("amount: 9999, purpose: 0123") == "amount: Unknown, purpose: 0123, remark: Unknown"
    assert LOANS.canonical("purpose: x", notes := Counter()) and not LOANS.doubts(notes)


@pytest.mark.parametrize("text", ["Age: 1, Age: 2", "good, amount: 1.5", "<|im_end|>", "12,345.67"])
def test_texts_stay_as_they_are(text):
    assert TEXTS.prompt(f" {text}\r\nx ") == f"Sort.\n{text}\nx"


def test_one_value_a_field():
    with pytest.raises(InputError, match="amount: one text or number"):
        LOANS.features({"amount": [1]})
    assert TEXTS.features({"X": "hello"}) == "hello"
    with pytest.raises(InputError, match="one field x is needed"):
        TEXTS.features({"y": "hello"})


def test_the_split_by_validation_share():
    names = [f"c{i}" for i in range(4000)]
    parts = Counter(split_of(name, 0, 0.2) for name in names)
    assert abs(parts["validation"] - 800) < 90 and abs(parts["calibration"] - 400) < 70
    assert [split_of(name) for name in names] == [split_of(name, 0, 0.3) for name in names]


def loans(tmp_path: Path, rows: int = 300) -> tuple[str, str]:
    """Write a task file and a table whose label follows from the amount; return both paths."""
    lines = ["status;Credit Amount;purpose;remark"]
    for i in range(rows):
        amount = 100 + i * 37 % 4000
        lines.append(f"{('PAID', 'high')[amount > 2000]};{amount},5;{('car', 'home')[i % 2]};note {i}")
    (tmp_path / "loans.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "loans.json").write_text(json.dumps(RECORD))
    return str(tmp_path / "loans.json"), str(tmp_path / "loans.csv")


def test_rows_of_a_task(tmp_path):
    _, table = loans(tmp_path)
    rows, notes = read_rows(table, LOANS)
    assert len(rows) == 300 and {row.label for row in rows} == {"low", "high"}
    assert rows[0].features == "amount: 100, purpose: car, remark: note 0" == rows[0].customer
    assert notes["label PAID: read as low"] == sum(row.label == "low" for row in rows)
    every = sample_rows(rows, LOANS, 0, 1)
    assert sorted(map(str, every)) == sorted(map(str, rows)) and every != rows
    assert Counter(row.label for row in sample_rows(rows, LOANS, 10, 1)) == {"low": 10, "high": 10}


def test_a_missing_mark_of_the_task_is_no_label_and_no_group(tmp_path):
    task = task_of(changed_record(missing=["?"], group_column="owner"), "loans")
    (tmp_path / "a.csv").write_text(
        "owner,credit_amount,purpose,remark,status\n?,1,car,a,low\n?,2,tv,b,high\n7,3,,c,?\n"
    )
    rows, notes = read_rows(tmp_path / "a.csv", task)
    assert [row.customer == row.features for row in rows] == [True, True]
    assert notes["label _: row dropped"] == 1


def test_the_command_after_a_draft_has_the_decimal_mark(tmp_path, capsys):
    table = tmp_path / "a.csv"
    table.write_text("amount;y\n" + "".join(f"1.{100 + i};{'ab'[i % 2]}\n" for i in range(20)))
    draft = ["--init_task", tmp_path / "t.json", "--src", table, "--label_column", "y", "--decimal", ","]
    assert creditmix_prepare.main([*map(str, draft)]) == 0
    assert f"--src {table} --decimal , --outdir DIR" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_columns_named_question_and_answer_belong_to_the_task(tmp_path, kind):
    task = task_of(TEXTS.record | {"text_column": "question", "label_column": "answer", "group_column": "user"}, "t")
    rows = [{"question": f"why {i}", "answer": "ab"[i % 2], "user": "u"} for i in range(4)]
    text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows)
    text = "question,answer,user\n" + "".join(f"{','.join(x.values())}\n" for x in rows) if kind == "csv" else text
    (tmp_path / f"a.{kind}").write_text(text)
    assert [row.customer for row in read_rows(tmp_path / f"a.{kind}", task)[0]] == ["u"] * 4


def test_rows_of_an_export_in_another_split_are_refused(tmp_path, model_dir):
    export = shutil.copytree(model_dir, tmp_path / "export")
    (export / "task.json").write_text(json.dumps(LOANS.record))
    start = Provenance("export", 0, ({"file": "a.csv", "sha256": "1"},), 1.0)

    def task_of_data(sha256: str, **changes) -> Task | None:
        note = {"split_seed": 0, "source": {"file": "b.csv", "sha256": sha256}, "task": LOANS.record | changes}
        return task_of_run(resolve(str(export)), TrainingData("b.jsonl", [], "", note, start))

    for changes in ({"validation_share": 0.4}, {"group_column": "owner"}):
        with pytest.raises(InputError, match=r"was trained on the raw rows of b\.jsonl with another group_column or"):
            task_of_data("1", **changes)
        assert task_of_data("2", **changes)
    assert task_of_data("1", instruction="Rate it.").instruction == "Rate it."


def test_the_task_goes_with_data_and_adapter(tmp_path, monkeypatch, model_dir, capsys):
    monkeypatch.chdir(tmp_path)
    task_file, table = loans(tmp_path)
    prepare = ["--src", table, "--outdir", "out"]
    assert creditmix_prepare.main(["--task", task_file, *prepare]) == 0
    sft = read_lines("out/loans_sft.jsonl")
    parts = Counter(LOANS.part_of(row.customer) for row in read_rows(table, LOANS)[0])
    assert len(sft) == parts["train"] and sft[0]["input"].startswith("Rate the risk.\namount: ")
    assert set(read_lines("out/loans_kd.jsonl")[0]["label_probs"]) == {"low", "high"}
    how = ["--student", model_dir, "--max_steps", "1", "--batch_size", "2", "--quantization", "none"]
    assert sft_train.main([*how, "--data", "out/loans_sft.jsonl", "--save_dir", "sft"]) == 0
    assert model_task(resolve("sft")) == LOANS == chosen_task([resolve("sft")], None)
    # Answers and pairs of a model: the labels are the task's, which their notes carry.
    local = ["--quantization", "none", "--input", "out/loans_sft.jsonl"]
    assert kd_prepare.main(["--teacher", "sft", *local, "--output", "kd2.jsonl"]) == 0
    assert set(read_lines("kd2.jsonl")[0]["label_probs"]) == {"low", "high"}
    assert dpo_prepare.main(["--model_dir", "sft", "--task", "label", *local, "--output", "dpo2.jsonl"]) == 0
    for name in ("kd2", "dpo2"):
        assert json.loads(Path(f"{name}_prepared.json").read_text())["task"] == LOANS.record
    # Another task is refused for the adapter, by every script that has one of both.
    other = json.dumps(changed_record(instruction="Rate it."))
    Path("other.json").write_text(other)
    with pytest.raises(InputError, match=r"sft: was trained for another task than .*other.json has .*instruction"):
        chosen_task([resolve("sft")], "other.json")
    with pytest.raises(InputError, match="was prepared for another task than --task other"):
        kd_prepare.main(["--teacher", "sft", *local, "--task", "other.json", "--output", "kd3.jsonl"])
    assert creditmix_prepare.main(["--task", "other.json", "--src", table, "--outdir", "other"]) == 0
    with pytest.raises(InputError, match=r"sft: was trained for another task than other/loans_sft\.jsonl has"):
        kd_prepare.main(["--teacher", "sft", *local[:3], "other/loans_sft.jsonl", "--output", "kd3.jsonl"])
    with pytest.raises(InputError, match=r"sft: was trained for another task than other/loans_dpo\.jsonl has"):
        dpo_train.main(["--adapter", "sft", "--data", "other/loans_dpo.jsonl", "--save_dir", "dpo", *how[2:]])
    # An adapter that carries none is of unknown training: a note, but for the default task.
    Path("sft/task.json").rename("task_of_sft.json")
    capsys.readouterr()
    assert chosen_task([resolve("sft")], task_file) == LOANS
    assert capsys.readouterr().err.startswith("note: sft: has no task.json: nothing shows that it was trained for")
    assert chosen_task([resolve("sft")], None) == TASK and not capsys.readouterr().err
    assert kd_train.main(["--adapter", "sft", "--data", "kd2.jsonl", "--save_dir", "kd", *how[2:]]) == 0
    assert capsys.readouterr().err.count("note: sft: has no task.json") == 1
    Path("task_of_sft.json").rename("sft/task.json")
    # A task of another name may be next to it, and data of no task leaves no task behind.
    write_lines("plain.jsonl", [{"input": "a", "output": "b"}] * 2)
    assert sft_train.main([*how, "--data", "plain.jsonl", "--save_dir", "plain"]) == 0
    assert model_task(resolve("plain")) is None and chosen_task([resolve("plain")], None) == TASK
