"""The gate: how a teacher compares with baselines, and which of its answers --filter keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import answer_in_turn, ask_endpoint, change_replies, gold_rows, read_lines, write_lines

from common import InputError
from distil.tasks import default_task
from distil.teachers.answers import Prompts
from distil.teachers.gate import checked_rows

LABELS = default_task().labels


def test_only_a_weak_teacher_gets_a_warning(here, endpoint, capsys):
    rows = gold_rows(30)
    for agree, warned in ((False, True), (True, False)):
        with_gold = [row | {"output": LABELS[(len(row["input"]) + (not agree)) % 3]} for row in rows]
        write_lines("in.jsonl", with_gold)
        assert ask_endpoint(endpoint().url, "--overwrite") == 0
        output = capsys.readouterr()
        assert ("WARNING: the teacher is weaker than majority" in output.err) == warned
        assert f"teacher              accuracy {float(agree):.4f} on 30 rows" in output.out
        assert "Standard" in output.out and "recall" in output.out  # for each class


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], lambda label, gold: True),
        (["--filter", "agree"], lambda label, gold: label == gold),
        (["--filter", "confident"], lambda label, gold: label == "Good"),  # 0.67; of the others 0.22 and 0.11
        (["--filter", "confident", "--min_confidence", "0.2"], lambda label, gold: label != "Bad"),
    ],
)
def test_filters(here, endpoint, flags, wanted):
    rows = [{"input": "x" * i, "output": LABELS[0] if i > 3 else LABELS[i % 3]} for i in range(1, 10)]
    write_lines("in.jsonl", rows)
    assert ask_endpoint(endpoint(logprobs=True).url, *flags) == 0
    labels = [LABELS[len(row["input"]) % 3] for row in rows]
    expected = [row["input"] for row, label in zip(rows, labels, strict=True) if wanted(label, row["output"])]
    assert [row["input"] for row in read_lines("kd.jsonl")] == expected and expected


def test_a_filter_that_leaves_nothing_is_reported(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    with pytest.raises(InputError, match=r"no row is left \(--filter confident\)"):
        ask_endpoint(endpoint(logprobs=True).url, "--filter", "confident", "--min_confidence", 0.99)
    assert not Path("kd.jsonl").exists() and Path("kd.jsonl.part").exists()  # the answers are not lost


def test_free_answers_are_compared_with_gold_by_value(here, endpoint, capsys):
    answers = ['{"a": 1, "b": 2}', "text", '{"a": 2}', "{"]
    write_lines("in.jsonl", [{"input": f"read {i}", "output": text} for i, text in enumerate(answers)])
    server = endpoint()
    answer_in_turn(server, ['{"b": 2, "a": 1.0}', " text", '{"a": 3}', "{"])
    assert ask_endpoint(server.url, "--filter", "agree") == 0
    assert "the teacher's answer is the gold answer in 3 of 4 rows" in capsys.readouterr().out
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["read 0", "read 1", "read 3"]


def test_code_is_checked_by_the_tests_of_its_row(here, endpoint, capsys):
    """An answer that differs from the gold answer may be as right."""
    row = {"output": "def f(x):\n    return x + x", "tests": ["assert f(2) == 4", "assert f(3) == 6"]}
    write_lines("in.jsonl", [row | {"input": f"Write f. {i}"} for i in range(3)])
    server = endpoint()
    answer_in_turn(server, ["```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return x * x", "f("])
    assert ask_endpoint(server.url, "--filter", "agree") == 0
    assert "the teacher's answer passes its tests in 1 of 3 rows" in capsys.readouterr().out
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["Write f. 0"]


@pytest.mark.parametrize("without", [1, 4])
def test_a_few_answers_without_log_probs_are_left_out(without, here, endpoint, capsys):
    write_lines("in.jsonl", gold_rows(12))
    server, bare = endpoint(logprobs=True), [row["input"] for row in gold_rows(12)[:without]]
    change_replies(server, lambda prompt, choice: choice.update({"logprobs": None} if prompt in bare else {}))
    assert ask_endpoint(server.url) == 0
    rows = read_lines("kd.jsonl")
    assert f"{without} of 12 answers came without probabilities" in capsys.readouterr().err
    assert len(rows) == (11 if without == 1 else 12)
    assert all(("label_probs" in row) == ("probability" in row["teacher"]) == (without == 1) for row in rows)


def test_empty_answers_are_left_out(capsys):
    """The trainer would refuse the file for them."""
    prompts = Prompts(["a", "b", "c"], [None] * 3, [None] * 3, [])
    answers = [{"teacher_output": text} for text in ("yes", "", " \n")]
    rows, _ = checked_rows(prompts, answers, "T", rationale=False, keep="none", min_confidence=0.6)
    assert [row["teacher_output"] for row in rows] == ["yes"]
    assert "2 prompts are left out, their answer: is empty" in capsys.readouterr().err
