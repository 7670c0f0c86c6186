"""Judge code answers by running them with their tests in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from distil.codegen.sandbox import run_programs
from distil.codegen.tasks import Task, extract_code, parses


def code_scores(tasks: Sequence[Task], answers: Sequence[Sequence[str]], seconds: float) -> list[list[float]]:
    """Return for each answer 1 where it passes its tests, 0 where it fails them, -1 where it does not parse.
    answers: texts of a model for each task. seconds: wall time of a program with its tests."""
    jobs, scores = [], [[-1.0] * len(texts) for texts in answers]
    for i, (task, texts) in enumerate(zip(tasks, answers, strict=True)):
        for j, text in enumerate(texts):
            if parses(code := extract_code(text)):
                jobs.append((i, j, (task.program(code), task.tests)))
    for (i, j, _), outcome in zip(jobs, run_programs([job for *_, job in jobs], seconds), strict=True):
        scores[i][j] = float(outcome.passed)
    return scores


def first_passing(answers: list[dict], tests: list[str], seconds: float) -> dict[str, Any]:
    """Return the first answer that passes the tests, with "passed": its number from 1.
    Where none passes: the first answer, with "passed": None and each one's "problems"."""
    task = Task("", "", tuple(tests))
    outcomes = run_programs([(task.program(answer["code"]), tests) for answer in answers], seconds)
    for number, (answer, outcome) in enumerate(zip(answers, outcomes, strict=True), 1):
        if outcome.passed:
            return answer | {"passed": number}
    return answers[0] | {"passed": None, "problems": [outcome.problem for outcome in outcomes]}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that one of k answers drawn from n is right. Source: Chen et al. 2021, section 2.1."""
    return 1.0 - comb(n - right, k) / comb(n, k)
