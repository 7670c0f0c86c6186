"""Check a teacher's answers before a training on them, and make training rows of those that pass --filter."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distil.codegen.judge import code_scores
from distil.creditmix.tabular import simple_baselines
from distil.files import parse_json
from distil.tasks import Task
from distil.teachers.answers import PROMPT_VERSION, Prompts, bare_text, label_first, label_of

TEST_SECONDS = 5.0  # for an answer's code and the row's tests
MOST_SHOWN = 20  # labels up to which each has a line in the gate's report
FEW_WITHOUT = 0.1  # share of the answers that may lack label_probs before those of all others are dropped


def gate(
    predictions: Sequence[str | None],
    gold: Sequence[str | None],
    labels: Sequence[str],
    prompts: Sequence[str],
    task: Task | None = None,
) -> dict[str, Any]:
    """Print and return how often the teacher's labels are right, and warn of a teacher that is worse than a baseline:
    the majority and, for prompts of a table task, a logistic regression on the same rows. gold: at least one is known;
    task: of the prompts, None where it is not known."""
    from sklearn.metrics import accuracy_score, classification_report

    checked = [i for i, answer in enumerate(gold) if answer is not None]
    truth = [gold[i] for i in checked]
    predicted = [predictions[i] or "(none)" for i in checked]
    simple = simple_baselines([prompts[i] for i in checked], truth, task)
    scores = {"teacher": accuracy_score(truth, predicted)} | simple
    if len(labels) <= MOST_SHOWN:
        print(classification_report(truth, predicted, labels=list(labels), digits=4, zero_division=0))
    for name, accuracy in scores.items():
        print(f"{name:<20} accuracy {accuracy:.4f} on {len(checked)} rows with a gold answer")
    if better := [name for name, accuracy in scores.items() if accuracy > scores["teacher"]]:
        warning = f"WARNING: the teacher is weaker than {' and '.join(better)}; its student will learn its mistakes. "
        print(warning + "Use more rows, kd_prepare.py's --filter agree, another teacher, or SFT", file=sys.stderr)
    return {"rows": len(checked), **scores}


def same_answer(one: str, other: str) -> bool:
    """Return whether two texts are equal, or JSON of equal value."""
    try:
        return parse_json(one) == parse_json(other)
    except ValueError:
        return one.strip() == other.strip()


def right_answers(predictions: Sequence[str | None], prompts: Prompts) -> list[bool | None]:
    """Return whether each answer passes the row's tests, or else equals the gold answer; None without either."""
    pairs = zip(predictions, prompts.gold, strict=True)
    right = [None if expected is None else same_answer(text or "", expected) for text, expected in pairs]
    coded = {i: task for i, task in enumerate(prompts.tasks) if task}
    scores = code_scores(list(coded.values()), [[predictions[i] or ""] for i in coded], TEST_SECONDS)
    for i, (score,) in zip(coded, scores, strict=True):
        right[i] = score == 1
    return right


def checked_rows(
    prompts: Prompts,
    answers: Sequence[dict[str, Any]],
    name: str,
    rationale: bool,
    keep: str,
    min_confidence: float,
    task: Task | None = None,
    keep_gold: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return (training rows, report of the gate) of a teacher's answers, and print what is left out and why.
    name: of the teacher; keep: --filter; task: of the prompts, None where it is not known; keep_gold: the rows get the
    gold answers, of which an answer has the "token_probs"."""
    labels, answers = prompts.labels, [_bare(answer) for answer in answers]
    texts = [answer["teacher_output"] for answer in answers]
    predictions = [label_of(text, labels) if labels else text.strip() for text in texts]
    for reason, count in Counter(a["left_out"] for a in answers if "left_out" in a).most_common(5):
        print(f"{count} prompts are left out, their answer: {reason}", file=sys.stderr)
    if without := sum(p is None and "left_out" not in a for p, a in zip(predictions, answers, strict=True)):
        print(f"{without} answers have no label of {', '.join(labels)}, or several, and are left out", file=sys.stderr)
    right = right_answers(predictions, prompts)
    if keep == "agree" and None in right:
        print(f"{right.count(None)} rows without a gold answer are left out (--filter agree)", file=sys.stderr)
    report: dict[str, Any] = {}
    checked = [one for one in (prompts.gold if labels else right) if one is not None]
    if keep_gold and not labels:
        print("right answers get the teacher's probabilities; it wrote none that could be checked")
    elif not checked:
        print("no gold answers: the teacher cannot be checked before training", file=sys.stderr)
    elif labels:
        report = gate(predictions, prompts.gold, labels, prompts.texts, task)
    else:
        what = "passes its tests" if any(prompts.tasks) else "is the gold answer"
        print(f"the teacher's answer {what} in {sum(checked)} of {len(checked)} rows")
        report = {"rows": len(checked), "teacher": sum(checked) / len(checked)}
    if labels:
        texts = [label_first(text, p or "", rationale) for text, p in zip(texts, predictions, strict=True)]
    if keep_gold:
        texts = prompts.gold
    version, rows = f"{PROMPT_VERSION}, for a reason" if rationale else str(PROMPT_VERSION), []
    columns = zip(prompts.texts, answers, texts, predictions, right, strict=True)
    for prompt, answer, text, prediction, is_right in columns:
        probability = answer.get("label_probs", {}).get(prediction, 0.0)
        passes = {"agree": is_right is True, "confident": probability >= min_confidence, "none": True}[keep]
        if passes and prediction is not None and "left_out" not in answer:
            teacher = {"name": name, "prompt": version}
            teacher |= {"probability": probability} if answer.get("label_probs") else {}
            if not keep_gold and text != answer["teacher_output"]:
                answer.pop("token_probs", None)  # they are of the other text
            rows.append({"input": prompt, **answer, "teacher_output": text, "teacher": teacher})
    return probabilities_or_none(rows), report


def _bare(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer without its thoughts and its account of tokens; one that has no text then is left out."""
    text = bare_text(answer["teacher_output"])
    reason = "is empty" if text is not None else "has a thought without an end, or in its middle"
    rest = {name: value for name, value in answer.items() if name != "usage"} | {"teacher_output": text or ""}
    return rest if (text or "").strip() else {"left_out": reason} | rest  # the trainer would refuse an empty answer


def probabilities_or_none(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that all have label_probs, or none of them, as the trainer needs.
    A few rows without them are left out; where more lack them, all rows lose theirs."""
    without = sum("label_probs" not in row for row in rows)
    if without in (0, len(rows)):
        return rows
    problem = f"{without} of {len(rows)} answers came without probabilities"
    if without <= FEW_WITHOUT * len(rows):
        print(f"{problem} and are left out", file=sys.stderr)
        return [row for row in rows if "label_probs" in row]
    print(f"{problem}: label_probs are left out", file=sys.stderr)
    for row in rows:
        row.pop("label_probs", None)
        row["teacher"].pop("probability", None)
    return rows
