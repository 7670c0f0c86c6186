"""Gradient boosting as a teacher: which rows it labels, and which labels it may use."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import read_lines

import kd_prepare
from distil.creditmix.rows import CreditRow, read_rows
from distil.creditmix.tabular import tabular_teacher
from distil.splits import is_gold, split_of
from distil.tasks import default_task, task_of
from distil.teachers.tabular import tabular_rows, teacher_name

TASK = default_task()
LABELS = TASK.labels


def test_tabular_labels_training_customers_that_it_never_saw(here, credit_file, capsys):
    assert kd_prepare.main(["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl"]) == 0
    written = read_lines("kd.jsonl")
    owners = {TASK.prompt(row.features): row.customer for row in read_rows(credit_file, TASK)[0]}
    assert {split_of(owners[row["input"]]) for row in written} == {"train"}
    for row in written:
        assert row["teacher_output"] == max(row["label_probs"], key=row["label_probs"].get)
        assert row["teacher"]["name"] == "tabular"
    note = json.loads(Path("kd_prepared.json").read_text())
    assert note["split_seed"] == 0 and note["teacher"]["teacher"] > 0.8
    assert "logistic regression  accuracy" in capsys.readouterr().out


def test_rows_of_the_tabular_teacher_are_drawn_by_its_flags(here, credit_file):
    def drawn(*flags: str) -> list[str]:
        argv = ["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl", "--overwrite", *flags]
        assert kd_prepare.main(argv) == 0
        return [row["input"] for row in read_lines("kd.jsonl")]

    rows = drawn("--per_class", "4")
    assert len(rows) == 12 and rows == drawn("--per_class", "4")
    assert set(rows) != set(drawn("--per_class", "4", "--seed", "1"))
    owners = {TASK.prompt(row.features): row.customer for row in read_rows(credit_file, TASK)[0]}
    assert {split_of(owners[row], 3) for row in drawn("--per_class", "4", "--split_seed", "3")} == {"train"}


def test_labels_outside_the_gold_share_are_not_used():
    """With all other labels wrong the probabilities are bit-identical."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = LABELS[number % 3]
        debt = 500 + 900 * (number % 3) + int(rng.integers(0, 600))
        rows.append(CreditRow(f"C{number}", f"Age: {20 + number % 50}, Outstanding Debt: {debt}", label))
    has_gold = [number % 4 == 0 for number in range(300)]
    wrong = [
        row if k else CreditRow(row.customer, row.features, LABELS[(LABELS.index(row.label) + 1) % 3])
        for row, k in zip(rows, has_gold, strict=True)
    ]
    first = tabular_teacher(rows, has_gold, 0, TASK)
    np.testing.assert_array_equal(first, tabular_teacher(wrong, has_gold, 0, TASK))
    others = [i for i, k in enumerate(has_gold) if not k]
    assert np.mean([LABELS[first[i].argmax()] == rows[i].label for i in others]) > 0.7


def test_rows_with_a_part_of_the_gold_labels(here, credit_file):
    argv = ["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl", "--gold_share", "0.4"]
    assert kd_prepare.main(argv) == 0
    counts = Counter(row["teacher_output"] for row in read_lines("kd.jsonl"))
    assert len(set(counts.values())) == 1 and set(counts) == set(LABELS)  # balanced by the teacher's labels
    assert json.loads(Path("kd_prepared.json").read_text())["gold_share"] == 0.4
    rows = json.loads(Path(credit_file).read_text())
    for row in rows:
        if not is_gold(row["customer_id"], 0.4, 0) and row["answer"] in LABELS:
            row["answer"] = LABELS[(LABELS.index(row["answer"]) + 1) % 3]
    Path("wrong.json").write_text(json.dumps(rows))
    argv[3], argv[5] = "wrong.json", "wrong.jsonl"
    assert kd_prepare.main(argv) == 0
    assert Path("wrong.jsonl").read_bytes() == Path("kd.jsonl").read_bytes()  # the other labels are not used


def test_rows_of_a_text_task_keep_their_class_proportions(tmp_path):
    """No fields, no groups, three times as many texts of one label: all training texts, each answered by TF-IDF."""
    rng, path = np.random.default_rng(0), tmp_path / "texts.csv"
    words = {"cards": ["card", "chip", "pin", "atm"], "loans": ["loan", "rate", "term", "mortgage"]}
    labels = ["loans" if n % 4 == 0 else "cards" for n in range(240)]
    lines = [f"{' '.join(rng.choice(words[label], 3))} {n},{label}" for n, label in enumerate(labels)]
    path.write_text("text,topic\n" + "\n".join(lines) + "\n")
    record = {"name": "topics", "instruction": "Topic?", "labels": ["cards", "loans"], "label_column": "topic"}
    task = task_of(record | {"text_column": "text"}, "test")
    prompts, answers = tabular_rows(str(path), task, 0, 1.0, 0, 0)
    rows, _ = read_rows(path, task)
    train = {task.prompt(row.features): row.label for row in rows if task.part_of(row.customer) == "train"}
    assert dict(zip(prompts.texts, prompts.gold, strict=True)) == train and len(prompts.texts) == len(train)
    assert prompts.labels == ["cards", "loans"] and teacher_name(task) == "tf-idf"
    right = [answer["teacher_output"] == gold for answer, gold in zip(answers, prompts.gold, strict=True)]
    assert np.mean(right) > 0.95 and set(answers[0]["label_probs"]) == set(task.labels)
    capped, _ = tabular_rows(str(path), task, 10, 1.0, 0, 0)
    assert Counter(capped.gold) == {"cards": 10, "loans": 10}
