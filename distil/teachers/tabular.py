"""The tabular teacher: gradient boosting, or for texts TF-IDF with logistic regression, labels training rows."""

from __future__ import annotations

from dataclasses import replace

from distil.creditmix.rows import note_anonymous, read_rows, sample_rows
from distil.creditmix.tabular import tabular_teacher
from distil.splits import is_gold
from distil.tasks import Task
from distil.teachers.answers import Prompts, answer_of_probabilities

TABULAR = "tabular"  # its name, in --teacher and in each row


def teacher_name(task: Task) -> str:
    """Return the teacher's name in notes and rows of a task."""
    return "tf-idf" if task.text_column else TABULAR


def tabular_rows(
    src: str, task: Task, per_class: int, gold_share: float, seed: int, split_seed: int, decimal: str | None = None
) -> tuple[Prompts, list[dict]]:
    """Return (prompts, answers) of a task's training rows, each row's answer by a model that never saw its customer.
    per_class: as `sample_rows` takes it. gold_share: share of customers whose labels may be used; those of the others
    are not used at all. decimal: see `read_rows`. Raises InputError."""
    rows, _ = read_rows(src, task, decimal)
    note_anonymous(rows, task)
    pool = [row for row in rows if task.part_of(row.customer, split_seed) == "train"]
    with_gold = [is_gold(row.customer, gold_share, split_seed) for row in pool]
    answers = [answer_of_probabilities(task.labels, row) for row in tabular_teacher(pool, with_gold, seed, task)]
    # Classes are balanced by gold where all of it may be used, else by the teacher's labels.
    names = [row.label if gold_share == 1 else a["teacher_output"] for row, a in zip(pool, answers, strict=True)]
    labelled = [replace(row, label=name) for row, name in zip(pool, names, strict=True)]
    index = {id(row): i for i, row in enumerate(labelled)}
    chosen = [index[id(row)] for row in sample_rows(labelled, task, per_class, seed)]
    gold = [pool[i].label if with_gold[i] else None for i in chosen]
    prompts = [task.prompt(pool[i].features) for i in chosen]
    return Prompts(prompts, gold, [None] * len(chosen), list(task.labels)), [answers[i] for i in chosen]
