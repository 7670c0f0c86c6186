"""Preference pairs from a student itself: labels by likelihood, JSON by schema and fields, code by its tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dpo_prepare
import teachers
from common import LabelScorer, PromptEncoder
from conftest import ROOT, credit_rows
from creditmix import LABELS, creditmix_prompt
from dpo_prepare import best_and_worst, code_scores, json_judge
from files import InputError
from models import load_model

PLAIN = ["--quantization", "none", "--compute_dtype", "float32"]
INVOICE = json.loads(json.loads((ROOT / "data/idp_validation.jsonl").read_text().split("\n")[0])["expected"])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def prepare(model_dir: str, task: str, *flags) -> int:
    argv = ["--model_dir", model_dir, "--task", task, "--input", "in.jsonl", "--output", "dpo.jsonl", *PLAIN, *flags]
    return dpo_prepare.main([str(flag) for flag in argv])


@pytest.fixture
def says(monkeypatch):
    """Let the student answer each prompt by rule; what it was asked is recorded."""
    asked = []

    def set_rule(rule) -> list[int]:
        class Student:
            def __init__(self, model_dir, args):
                self.n = args.n

            def answers(self, prompts, labels):
                for number in prompts:
                    asked.append(number)
                    text = rule(number // self.n, number % self.n)
                    if text is None:
                        return
                    yield number, {"teacher_output": text}

        monkeypatch.setattr(teachers, "ModelTeacher", Student)
        return asked

    return set_rule


def test_the_rejected_label_is_the_students_most_likely_wrong_one(here, model_dir):
    questions = [row["question"] for row in credit_rows(customers=12, months=1)]
    rows = [{"input": creditmix_prompt(text), "output": LABELS[i % 3]} for i, text in enumerate(questions)]
    write_lines("in.jsonl", rows)
    assert prepare(model_dir, "label") == 0
    model, tokenizer = load_model(model_dir, "none", "float32")
    scorer = LabelScorer(model, PromptEncoder(tokenizer), {label: [label] for label in LABELS})
    raw = scorer.raw_scores([row["input"] for row in rows])
    for pair, row, scores in zip(read_lines("dpo.jsonl"), rows, raw, strict=True):
        wrong = max((label for label in LABELS if label != row["output"]), key=lambda x: scores[LABELS.index(x)])
        assert pair == {"prompt": row["input"], "chosen": row["output"], "rejected": wrong}


def test_json_is_judged_by_schema_and_fields():
    schema = json.loads((ROOT / "data/idp_schema.json").read_text())
    expected = INVOICE
    judge = json_judge([{"output": json.dumps(expected)}], "in.jsonl", schema, "schema")
    right = judge(0, json.dumps(expected))
    wrong_total = judge(0, json.dumps(expected | {"total": expected["total"] + 1}))
    assert right == 1.0 and 0 < wrong_total < 1
    for broken in ("{", "[]", json.dumps(expected | {"more": 1}), json.dumps({"total": 5}), "NaN"):
        assert judge(0, broken) == -1.0


def test_code_is_judged_by_its_tests():
    from codegen import task_of

    task = task_of({"prompt": "add(a, b)", "tests": ["assert add(1, 2) == 3"]}, "row 1")
    answers = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b", "def add(", "exit()"]
    assert code_scores([task], [answers], 5.0) == [[1.0, 0.0, -1.0, 0.0]]


def test_best_and_worst():
    texts = ["aa", "b", "ccc", "d"]
    assert best_and_worst(texts, [1.0, 1.0, 0.0, 0.0]) == ("aa", "ccc")  # the first, whatever their length
    assert best_and_worst(texts, [0.0, 0.5, 0.0, 1.0]) == ("d", "aa")
    assert best_and_worst(["a", "b"], [0.5, 0.5]) is None
    assert best_and_worst(["a", "b"], [0.0, -1.0]) is None  # the better one is wrong too


def test_pairs_of_code_and_what_is_dropped(here, says, model_dir, capsys):
    tasks = [{"prompt": f"f{i}(x) doubles x", "tests": [f"assert f{i}(2) == 4"]} for i in range(3)]
    write_lines("in.jsonl", tasks)
    right, wrong = "def f{}(x):\n    return 2 * x", "def f{}(x):\n    return x"
    said = [[right, wrong], [wrong, wrong], [wrong, right]]
    says(lambda i, k: said[i][k].format(i))
    assert prepare(model_dir, "code", "--n", 2) == 0
    assert [(p["chosen"], p["rejected"]) for p in read_lines("dpo.jsonl")] == [
        (right.format(i), wrong.format(i)) for i in (0, 2)
    ]
    assert "1 of 3 prompts dropped" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["dpo.jsonl", "in.jsonl"]


def test_the_right_answer_may_stand_in(here, says, model_dir):
    write_lines("in.jsonl", [{"input": "Read this", "output": json.dumps(INVOICE)}])
    says(lambda i, k: "nonsense")
    flags = ("--schema", ROOT / "data/idp_schema.json", "--n", 1)
    assert prepare(model_dir, "json", *flags, "--gold") == 0
    assert read_lines("dpo.jsonl") == [{"prompt": "Read this", "chosen": json.dumps(INVOICE), "rejected": "nonsense"}]


def test_without_contrast_there_is_no_file(here, says, model_dir):
    write_lines("in.jsonl", [{"prompt": "f(x)", "tests": ["assert f(1)"]}])
    says(lambda i, k: "f = 0")
    with pytest.raises(InputError, match="no pair has contrast; raise --n or --temperature, or add --gold"):
        prepare(model_dir, "code", "--n", 2)
    assert not Path("dpo.jsonl").exists()


def test_interrupted_and_run_again(here, says, model_dir):
    write_lines("in.jsonl", [{"prompt": f"f{i}(x)", "tests": [f"assert f{i}(1)"]} for i in range(4)])
    said = ["def f{}(x):\n    return 1", "def f{}(x):\n    return 0"]
    with pytest.raises(KeyError):  # the student stopped: what it had said is kept
        says(lambda i, k: None if i == 2 else said[k].format(i))
        prepare(model_dir, "code", "--n", 2, "--batch_size", 2)
    asked = says(lambda i, k: said[k].format(i))
    asked.clear()
    assert prepare(model_dir, "code", "--n", 2, "--batch_size", 2) == 0
    assert asked == [4, 5, 6, 7] and len(read_lines("dpo.jsonl")) == 4


def test_a_real_student_samples_different_answers(here, model_dir):
    """Whole, with a random model: its answers are no code, so none has contrast with another but the right one."""
    task = {"prompt": "f(x)", "tests": ["assert f(1)"], "solution": "def f(x):\n    return 1"}
    write_lines("in.jsonl", [task])
    assert prepare(model_dir, "code", "--n", 2, "--gold", "--max_new_tokens", 8) == 0
    (pair,) = read_lines("dpo.jsonl")
    assert pair["chosen"] == task["solution"] and pair["rejected"] != pair["chosen"]


def test_flags_of_the_samples(here, model_dir, monkeypatch):
    """Another seed or temperature draws other answers, the same the same; the tests' time is what --seconds says."""
    drawn, limits = [], []

    def scores(tasks, answers, seconds):
        drawn.append(answers)
        limits.append(seconds)
        return [[float(i) for i in range(len(texts))] for texts in answers]

    monkeypatch.setattr(dpo_prepare, "code_scores", scores)
    write_lines("in.jsonl", [{"prompt": f"f{i}(x)", "tests": [f"assert f{i}(1)"]} for i in range(3)])
    for flags in ([], [], ["--seed", 1], ["--temperature", 0.01], ["--seconds", 3]):
        argv = ["--n", 2, "--max_new_tokens", 8, *flags]
        assert prepare(model_dir, "code", *argv, *(["--overwrite"] if drawn else [])) == 0
    assert drawn[0] == drawn[1] == drawn[4] and limits == [5, 5, 5, 5, 3]
    assert drawn[2] != drawn[0] != drawn[3]
    assert all(first == second for first, second in drawn[3])  # nearly greedy
    with pytest.raises(InputError, match="exists; --overwrite replaces it"):
        prepare(model_dir, "code", "--n", 2)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("json", ["--n", 1], "--n is at least 2, or 1 with --gold"),
        ("code", ["--temperature", 0], "--temperature and --seconds finite and above 0"),
        ("code", ["--seconds", "nan"], "--temperature and --seconds finite and above 0"),
        ("json", ["--schema", ROOT / "data/idp_schema.json"], r'in\.jsonl: row 1: "output" is not JSON'),
        ("label", ["--input", "missing.jsonl"], r"missing\.jsonl: no such file"),
        ("label", ["--input", "one.jsonl"], r"one\.jsonl: 1 different outputs; label tasks have 2 to 10"),
        ("json", ["--schema", "none.json"], r"none\.json: no such file"),
        ("label", ["--model_dir", "runs/none"], "runs/none: no such model folder"),
    ],
)
def test_wrong_flags_and_files(here, model_dir, task, flags, message):
    write_lines("in.jsonl", [{"input": "a", "output": "Good", "prompt": "f", "tests": ["f()"]}])
    write_lines("one.jsonl", [{"input": "a", "output": "Good"}])
    with pytest.raises(InputError, match=message):
        prepare(model_dir, task, *flags)
    assert not Path("dpo.jsonl").exists()
