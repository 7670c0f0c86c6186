"""Judging code answers: the first that passes, pass@k."""

from __future__ import annotations

import pytest

from distil.codegen.judge import code_scores, first_passing, pass_at_k
from distil.codegen.tasks import task_of


def test_pass_at_k_is_the_unbiased_estimator():
    assert pass_at_k(10, 0, 1) == 0 and pass_at_k(10, 10, 3) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of 6 pairs one has no right answer


def test_the_first_answer_that_passes_is_kept():
    answers = [{"code": f"def f(): return {i}", "parses": True} for i in range(4)]
    assert first_passing(answers, ["assert f() == 2"], 5)["passed"] == 3
    none = first_passing(answers, ["assert f() == 9"], 5)
    assert none["passed"] is None and len(none["problems"]) == 4


def test_code_is_judged_by_its_tests():
    task = task_of({"prompt": "add(a, b)", "tests": ["assert add(1, 2) == 3"]}, "row 1")
    answers = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b", "def add(", "exit()"]
    assert code_scores([task], [answers], 5.0) == [[1.0, 0.0, -1.0, 0.0]]
