"""Calibrated confidence of values: fitted on documents with reference answers, stored with the adapter, measured.

A logistic regression (Platt 1999) on the log-odds of a value's tokens, on whether it was not found in the document,
and on how sure the model is of the document as a whole: layouts that it does not know lower all of their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.files import read_json, write_json
from distil.idp.values import choices_of, count_fields, leaves
from distil.models import ModelRef, model_fingerprint

if TYPE_CHECKING:
    import numpy as np

FEATURES = ["log_odds", "not_found", "document"]
BINS = 15  # of equal width, of the expected calibration error (Guo et al. 2017)
MEASURES = {"ece": "calibration error", "confident": "right, surest 80 %", "located": "right values located"}


def features(answer: dict[str, Any], listed: Set[str]) -> np.ndarray:
    """Return FEATURES of the values of an answer with raw probabilities, an array [values, features]; none where the
    probabilities are not known. listed: paths of `choices_of` the schema, whose values need not be found."""
    import numpy as np

    rows = answer.get("evidence", [])
    if not rows or any(row["confidence"] is None for row in rows):
        return np.zeros((0, len(FEATURES)))
    p = np.clip([row["confidence"] for row in rows], 1e-6, 1 - 1e-6)
    absent = [
        row["span"] is None and path not in listed and type(value) in (int, float, str)
        for (path, value), row in zip(leaves(answer["json"]), rows, strict=True)
    ]
    return np.column_stack([np.log(p / (1 - p)), absent, np.full(len(p), np.log(p).mean())])


def apply(weights: Sequence[float], answer: dict[str, Any], listed: Set[str]) -> None:
    """Replace the raw probabilities in an answer's evidence. weights: of `fit`."""
    import numpy as np

    odds = weights[0] + features(answer, listed) @ np.array(weights[1:])
    for row, confidence in zip(answer["evidence"], 1 / (1 + np.exp(-odds)), strict=False):  # none if not known
        row["confidence"] = float(confidence)


def fit(rows: Sequence[dict], answers: Sequence[dict], schema: Any) -> list[float]:
    """Return intercept and weights of FEATURES, fitted on the answers to rows, as `values.measure` takes them. Raises
    InputError where all values are right, or all wrong."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    table = [features(answer, _listed(row, schema)) for row, answer in zip(rows, answers, strict=True)]
    right = [mark for row, one, x in zip(rows, answers, table, strict=True) if len(x) for mark in judged(row, one)]
    if len({*right}) < 2:
        problem = f"{len(right)} values with probabilities, of which {sum(right)} are right"
        raise InputError(f"--fit_confidence: {problem}; right and wrong ones are needed, so more documents")
    model = LogisticRegression(max_iter=1000).fit(np.concatenate(table), right)
    return [float(model.intercept_[0]), *model.coef_[0].tolist()]


def _listed(row: dict, schema: Any) -> set[str]:
    return {*choices_of(row.get("schema", schema))}


def judged(row: dict, answer: dict) -> list[bool]:
    """Return whether each value of an answer with evidence is right."""
    right: dict[str, bool] = {}
    count_fields(answer["json"], row["expected"], Counter(), judged=right)
    return [right.get(one["path"], False) for one in answer["evidence"]]


def confidence_path(ref: ModelRef) -> Path:
    """Return where the weights of a model in a folder are stored."""
    return Path(ref.adapter or ref.path) / "confidence.json"


def store_weights(ref: ModelRef, weights: Sequence[float], fitted_on: dict[str, Any]) -> None:
    """Store the result of `fit` with the model. fitted_on: data, schema and counts."""
    record = {"features": FEATURES, "weights": weights, "model": model_fingerprint(ref), "fitted_on": fitted_on}
    write_json(confidence_path(ref), record)


def stored_weights(ref: ModelRef) -> list[float] | None:
    """Return the stored weights of a model, None without. Raises InputError for those of another model."""
    if not (path := confidence_path(ref)).is_file():
        return None
    stored = read_json(path)
    wanted = {"features": FEATURES, "model": model_fingerprint(ref)}
    if not isinstance(stored, dict) or {name: stored.get(name) for name in wanted} != wanted:
        raise InputError(f"{path}: of another model; fit again with eval_idp.py --fit_confidence, or remove it")
    return stored["weights"]


def measure_evidence(rows: Sequence[dict], answers: Sequence[dict], schema: Any) -> dict[str, float | None]:
    """Return over all values of the answers to rows, as `values.measure` takes them: `ece` (expected calibration
    error), `confident` (accuracy of the 80 % with the highest confidence), `located`: of the right values that the
    schema does not list, the share with a place; one that is implied but not written has none. None without values."""
    import numpy as np

    sure, placed = [], []
    for row, answer in zip(rows, answers, strict=True):
        listed, marks = _listed(row, schema), judged(row, answer) if "evidence" in answer else []
        rest = zip(answer.get("evidence", []), marks, strict=True)
        for (path, value), (one, mark) in zip(leaves(answer.get("json")), rest, strict=False):
            sure += [(one["confidence"], mark)] if one["confidence"] is not None else []
            if mark and type(value) in (int, float, str) and path not in listed:
                placed.append(one["span"] is not None)
    result: dict[str, float | None] = dict.fromkeys(MEASURES)
    if sure:
        confidence, marks = np.array(sure, float).T
        gaps = np.bincount((confidence * BINS).astype(int).clip(max=BINS - 1), marks - confidence)
        first = marks[np.argsort(-confidence, kind="stable")][: max(1, round(0.8 * len(marks)))]
        result |= {"ece": float(np.abs(gaps).sum() / len(marks)), "confident": float(first.mean())}
    return result | ({"located": sum(placed) / len(placed)} if placed else {})
