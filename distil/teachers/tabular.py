"""The tabular teacher: gradient boosting that labels CreditMix training rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from distil.creditmix.rows import LABELS, balanced_sample, creditmix_prompt, note_anonymous, read_creditmix
from distil.creditmix.tabular import tabular_teacher
from distil.splits import is_gold, split_of
from distil.teachers.answers import Prompts, answer_of_probabilities

TABULAR = "tabular"  # its name, in --teacher and in each row


def tabular_rows(
    src: str, per_class: int, gold_share: float, seed: int, split_seed: int, decimal: str | None = None
) -> tuple[Prompts, list[dict]]:
    """Return (prompts, answers) of CreditMix training rows, each row's answer by a model that never saw its customer.
    per_class: rows of each label, 0 for as many as the rarest has. gold_share: share of customers whose labels may be
    used; those of the others are not used at all. decimal: see `read_creditmix`. Raises InputError."""
    rows, _ = read_creditmix(src, decimal)
    note_anonymous(rows)
    pool = [row for row in rows if split_of(row.customer, split_seed) == "train"]
    with_gold = [is_gold(row.customer, gold_share, split_seed) for row in pool]
    answers = [answer_of_probabilities(LABELS, row) for row in tabular_teacher(pool, with_gold, seed)]
    # Classes are balanced by gold where all of it may be used, else by the teacher's labels.
    names = [row.label if gold_share == 1 else a["teacher_output"] for row, a in zip(pool, answers, strict=True)]
    labelled = [replace(row, label=name) for row, name in zip(pool, names, strict=True)]
    index = {id(row): i for i, row in enumerate(labelled)}
    chosen = [index[id(row)] for row in balanced_sample(labelled, per_class or min(Counter(names).values()), seed)]
    gold = [pool[i].label if with_gold[i] else None for i in chosen]
    prompts = Prompts([creditmix_prompt(pool[i].features) for i in chosen], gold, [None] * len(chosen), list(LABELS))
    return prompts, [answers[i] for i in chosen]
