"""Preference pairs from a student's own answers: judged by the task's check, the best against the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import InputError
from distil.batch import AnswerFile
from distil.codegen.judge import code_scores
from distil.codegen.tasks import codegen_prompt, task_of
from distil.files import parse_json, read_json
from distil.idp.documents import expected_of
from distil.idp.schema import noted_validator
from distil.idp.validation import broken_rule
from distil.idp.values import count_fields, f1_of_all
from distil.models import ModelRef
from distil.tasks import MOST_LABELS
from distil.teachers.answers import TeacherOptions, answer_file, collect_answers
from distil.teachers.local import ModelTeacher


@dataclass(frozen=True)
class PairOptions(TeacherOptions):
    """How pairs are made. n: answers to each prompt; gold: add the right one; schema: path; seconds: of tests."""

    task: str = "label"
    n: int = 4
    gold: bool = False
    schema: str = "data/idp_schema.json"
    seconds: float = 5.0


def label_pairs(
    rows: Sequence[dict], ref: ModelRef, options: PairOptions, labels: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return (right label, the student's most likely wrong one) of each row. labels: of the task; none: the rows'
    outputs. Raises InputError for outputs that are no labels and for other than 2 to MOST_LABELS of them."""
    labels, outputs = list(labels), sorted({row["output"] for row in rows})
    if labels and (other := [output for output in outputs if output not in labels]):
        raise InputError(f"{options.input}: output {other[0]!r} is not a label of its task: {', '.join(labels)}")
    labels = labels or outputs
    if not 2 <= len(labels) <= MOST_LABELS:
        raise InputError(f"{options.input}: {len(labels)} different outputs; label tasks have 2 to {MOST_LABELS}")
    scores = ModelTeacher(ref, options).scorer(labels).raw_scores([row["input"] for row in rows], ref.name)
    for row, row_scores in zip(rows, scores, strict=True):
        row_scores[labels.index(row["output"])] = -float("inf")
    return [(row["output"], labels[best]) for row, best in zip(rows, scores.argmax(axis=1), strict=True)]


def json_judge(rows: Sequence[dict], source: str, validator: Any) -> Callable[[int, str], float]:
    """Return judge(row index, answer): the F1 of the answer's fields, -1 where it is not JSON or breaks the schema.
    source: file of the rows; validator: of the schema. Raises InputError where a row's "output" is not JSON."""
    expected = [expected_of({"output": row["output"]}, f"{source}: row {i}") for i, row in enumerate(rows, 1)]

    def judge(index: int, answer: str) -> float:
        try:
            value = parse_json(answer)
        except ValueError:
            return -1.0
        if broken_rule(validator, value):
            return -1.0
        counts: Counter = Counter()
        count_fields(value, expected[index], counts)
        return f1_of_all(counts)

    return judge


def best_and_worst(texts: Sequence[str], scores: list[float]) -> tuple[str, str] | None:
    """Return the pair; of equal scores the first answer, since a choice by length would be learnt as a preference.
    None where no answer has anything right (a score above 0) or none is better than another."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return (texts[best], texts[worst]) if scores[best] > max(scores[worst], 0) else None


def judged_pairs(
    rows: Sequence[dict], ref: ModelRef, options: PairOptions
) -> tuple[AnswerFile, list[str], list[tuple[str, str] | None]]:
    """Return (file to resume from, prompts, pair or None of each row) of --task json and code. Raises InputError."""
    n = options.n
    if options.task == "code":
        tasks = [task_of(row, f"{options.input}: row {number}") for number, row in enumerate(rows, 1)]
        prompts, gold = [codegen_prompt(task.prompt) for task in tasks], [task.reference for task in tasks]
    else:
        validator = noted_validator(read_json(options.schema), options.schema)
        judge = json_judge(rows, options.input, validator)
        prompts, gold = [row["input"] for row in rows], [row["output"] for row in rows]
    file = answer_file(ref, options, task=options.task, n=n)
    turns = [prompt for prompt in prompts for _ in range(n)]
    collect_answers(file, turns, ref.name, lambda: ModelTeacher(ref, options))
    texts = [file.answers[number]["teacher_output"] for number in range(len(turns))]
    answers = [texts[first : first + n] for first in range(0, len(texts), n)]
    if options.gold:
        answers = [texts + ([right] if right else []) for texts, right in zip(answers, gold, strict=True)]
    if options.task == "code":
        scores = code_scores(tasks, answers, options.seconds)
    else:
        scores = [[judge(i, text) for text in texts] for i, texts in enumerate(answers)]
    return file, prompts, [best_and_worst(t, s) for t, s in zip(answers, scores, strict=True)]
