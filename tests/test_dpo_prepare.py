"""Preference pairs from a student itself: labels by likelihood, JSON by schema and fields, code by its tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import FLOAT32, HOLD, gold_rows, other_process, read_lines, write_lines

import dpo_prepare
from common import InputError, PromptEncoder
from distil.files import file_sha256
from distil.scoring import FastLabelScorer
from distil.tasks import default_task
from distil.teachers import preferences
from distil.testing import ROOT, load_named

TASK = default_task()

INVOICE = json.loads(json.loads((ROOT / "data/idp_validation.jsonl").read_text().split("\n")[0])["expected"])


def prepare(model_dir: str, task: str, *flags) -> int:
    argv = ["--model_dir", model_dir, "--task", task, "--input", "in.jsonl", "--output", "dpo.jsonl", *FLOAT32, *flags]
    return dpo_prepare.main([str(flag) for flag in argv])


@pytest.fixture
def answer_by(monkeypatch):
    """Let the student answer by rule(prompt, sample), two samples a prompt; the requested samples are recorded."""
    requested = []

    def set_rule(rule) -> list[int]:
        class Student:
            def __init__(self, ref, options):
                pass

            def answers(self, prompts):
                for number in prompts:
                    requested.append(number)
                    text = rule(*divmod(number, 2))
                    if text is None:
                        return
                    yield number, {"teacher_output": text}

        monkeypatch.setattr(preferences, "ModelTeacher", Student)
        return requested

    return set_rule


def test_the_rejected_label_is_the_most_likely_wrong_one(here, model_dir):
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    assert prepare(model_dir, "label") == 0
    model, tokenizer = load_named(model_dir, "none", "float32")
    scorer = FastLabelScorer(model, PromptEncoder(tokenizer), {label: [label] for label in TASK.labels})
    raw = scorer.raw_scores([row["input"] for row in rows])
    for pair, row, scores in zip(read_lines("dpo.jsonl"), rows, raw, strict=True):
        wrong = max(
            (label for label in TASK.labels if label != row["output"]), key=lambda x: scores[TASK.labels.index(x)]
        )
        assert pair == {"prompt": row["input"], "chosen": row["output"], "rejected": wrong}


def test_what_the_student_was_trained_on_goes_into_the_note_of_its_pairs(here, model_dir):
    rows = gold_rows(6)
    raw, other = ({"file": f"{name}.json", "sha256": name} for name in ("raw", "other"))
    write_lines("in.jsonl", rows)
    student = shutil.copytree(model_dir, here / "student")
    record = {"split_seed": 7, "sources": [other], "gold_share": 0.5}
    (student / "export.json").write_text(json.dumps(record))
    for split_seed in (7, 0):
        note = {"split_seed": split_seed, "source": raw, "gold_share": 0.2}
        Path("in_prepared.json").write_text(json.dumps(note | {"files": {"in.jsonl": file_sha256("in.jsonl")}}))
        if split_seed:
            assert prepare(str(student), "label") == 0
            written = json.loads(Path("dpo_prepared.json").read_text())
            assert written["sources"] == [raw, other]
            assert (written["split_seed"], written["gold_share"]) == (7, 0.5)
        else:
            with pytest.raises(InputError, match=r"student was trained with --split_seed 7, in\.jsonl has 0"):
                prepare(str(student), "label", "--overwrite")
    Path("in_prepared.json").unlink()
    assert prepare(str(student), "label", "--overwrite") == 0
    written = json.loads(Path("dpo_prepared.json").read_text())
    assert (written["split_seed"], written["sources"], written["gold_share"]) == (7, [None, other], None)


def test_two_runs_do_not_write_one_file(here, model_dir):
    write_lines("in.jsonl", gold_rows(6))
    with other_process(HOLD, here / "dpo.jsonl"), pytest.raises(InputError, match=r"another run \(process \d+\) is"):
        prepare(model_dir, "label")
    assert not Path("dpo.jsonl").exists() and prepare(model_dir, "label") == 0


def test_pairs_of_code_and_what_is_dropped(here, answer_by, model_dir, capsys):
    tasks = [{"prompt": f"f{i}(x) doubles x", "tests": [f"assert f{i}(2) == 4"]} for i in range(3)]
    write_lines("in.jsonl", tasks)
    right, wrong = "def f{}(x):\n    return 2 * x", "def f{}(x):\n    return x"
    texts = [[right, wrong], [wrong, wrong], [wrong, right]]
    answer_by(lambda i, k: texts[i][k].format(i))
    assert prepare(model_dir, "code", "--n", 2) == 0
    assert [(p["chosen"], p["rejected"]) for p in read_lines("dpo.jsonl")] == [
        (right.format(i), wrong.format(i)) for i in (0, 2)
    ]
    assert "1 of 3 prompts dropped" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["dpo.jsonl", "in.jsonl"]


def test_the_gold_answer_may_be_chosen(here, answer_by, model_dir):
    write_lines("in.jsonl", [{"input": "Read this", "output": json.dumps(INVOICE)}])
    answer_by(lambda i, k: "nonsense")
    flags = ("--schema", ROOT / "data/idp_schema.json", "--n", 1)
    assert prepare(model_dir, "json", *flags, "--gold") == 0
    assert read_lines("dpo.jsonl") == [{"prompt": "Read this", "chosen": json.dumps(INVOICE), "rejected": "nonsense"}]


def test_without_contrast_there_is_no_file(here, answer_by, model_dir):
    write_lines("in.jsonl", [{"prompt": "f(x)", "tests": ["assert f(1)"]}])
    answer_by(lambda i, k: "f = 0")
    with pytest.raises(InputError, match="no pair has contrast; raise --n or --temperature, or add --gold"):
        prepare(model_dir, "code", "--n", 2)
    assert not Path("dpo.jsonl").exists()


def test_interrupted_and_resumed(here, answer_by, model_dir):
    write_lines("in.jsonl", [{"prompt": f"f{i}(x)", "tests": [f"assert f{i}(1)"]} for i in range(4)])
    texts = ["def f{}(x):\n    return 1", "def f{}(x):\n    return 0"]
    with pytest.raises(KeyError):  # the student stopped: its answers are kept
        answer_by(lambda i, k: None if i == 2 else texts[k].format(i))
        prepare(model_dir, "code", "--n", 2, "--batch_size", 2)
    requested = answer_by(lambda i, k: texts[k].format(i))
    requested.clear()
    assert prepare(model_dir, "code", "--n", 2, "--batch_size", 2) == 0
    assert requested == [4, 5, 6, 7] and len(read_lines("dpo.jsonl")) == 4


def test_a_real_student_samples_different_answers(here, model_dir):
    """A random model writes no code, so only the gold answer has contrast with its answers."""
    task = {"prompt": "f(x)", "tests": ["assert f(1)"], "solution": "def f(x):\n    return 1"}
    write_lines("in.jsonl", [task])
    assert prepare(model_dir, "code", "--n", 2, "--gold", "--max_new_tokens", 8) == 0
    (pair,) = read_lines("dpo.jsonl")
    assert pair["chosen"] == task["solution"] and pair["rejected"] != pair["chosen"]


def test_flags_of_the_samples(here, model_dir, monkeypatch):
    """Another seed or temperature draws other answers, equal ones the same; --seconds limits the tests."""
    drawn, limits = [], []

    def scores(tasks, answers, seconds):
        drawn.append(answers)
        limits.append(seconds)
        return [[float(i) for i in range(len(texts))] for texts in answers]

    monkeypatch.setattr(preferences, "code_scores", scores)
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
        ("code", ["--temperature", 0], "--temperature, --seconds: finite and above 0"),
        ("code", ["--seconds", "nan"], "--temperature, --seconds: finite and above 0"),
        ("json", ["--schema", ROOT / "data/idp_schema.json"], r'in\.jsonl: row 1.*"output" is not JSON'),
        ("label", ["--input", "missing.jsonl"], r"missing\.jsonl: no such file"),
        ("label", ["--input", "one.jsonl"], r"one\.jsonl: 1 different outputs; label tasks have 2 to 100"),
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
