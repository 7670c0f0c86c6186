"""Metrics of class probabilities with intervals from resampled customers, and the baselines to compare models with.

Values in, values out: no models and no files. NLL is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score, recall_score
from threadpoolctl import threadpool_limits

from distil.calibration import row_losses
from distil.creditmix import tabular
from distil.creditmix.rows import LABELS, CreditRow

ROW_BY_ROW = ("predicted", "responses", "probabilities", "samples", "weights")  # of a result; summaries omit these


@dataclass(frozen=True)
class MeasureOptions:
    """How models are measured. resamples, seed: of the bootstrap; class_shares [labels]: class proportions in use that
    rows are weighted to (None: each row counts the same); abstain_below: see --abstain_below."""

    resamples: int = 1000
    seed: int = 0
    class_shares: tuple[float, ...] | None = None
    abstain_below: float | None = None


def coverage_curve(right: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (coverage, accuracy) [N each] where rows are answered in order of confidence and the others flagged for
    review; rows of equal confidence have no order, each counts as their mean."""
    _, tied = np.unique(confidence, return_inverse=True)
    right = (np.bincount(tied, right * weights) / np.bincount(tied, weights))[tied]
    order = np.argsort(-confidence, kind="stable")
    answered = weights[order].cumsum()
    return answered / answered[-1], (right * weights)[order].cumsum() / answered


def point_metrics(
    answers: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Return accuracy, macro-F1, recall per label, NLL, Brier score (sum over labels), ECE (15 equal-width bins) and
    AURC (mean error rate over all coverages, Geifman and El-Yaniv 2017). Each row counts by its weight, default 1."""
    weights = np.ones(len(answers)) if weights is None else weights
    right = predicted == answers
    confidence = probabilities[np.arange(len(answers)), predicted]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((weights * (right - confidence))[bins == b].sum()) for b in range(15)]
    squares = ((probabilities - np.eye(len(LABELS))[answers]) ** 2).sum(axis=1)
    coverage, accuracy = coverage_curve(right, confidence, weights)
    table = {"labels": range(len(LABELS)), "sample_weight": weights, "zero_division": 0}
    recalls = recall_score(answers, predicted, average=None, **table)
    return {
        "accuracy": float(accuracy_score(answers, predicted, sample_weight=weights)),
        "macro_f1": float(f1_score(answers, predicted, average="macro", **table)),
        **{f"recall_{label}": float(recall) for label, recall in zip(LABELS, recalls, strict=True)},
        "nll": float(np.average(row_losses(probabilities, answers), weights=weights)),
        "brier": float(np.average(squares, weights=weights)),
        "ece": float(sum(gaps) / weights.sum()),
        "aurc": float(np.average(1 - accuracy, weights=np.diff(coverage, prepend=0))),
    }


def bootstrap(
    answers: np.ndarray,
    predicted: np.ndarray,
    losses: np.ndarray,
    customers: Sequence[str],
    resamples: int,
    seed: int,
    weights: np.ndarray | float = 1.0,
) -> dict[str, np.ndarray]:
    """Return accuracy, macro-F1, recalls and NLL (mean of the losses [N]), each [resamples].
    Customers are resampled with all their rows. In each resample every label counts as much as it does in the rows,
    which were drawn for that: how many of its customers came up is not an uncertainty of the model. One seed draws
    the same customers for every model of the same rows, so differences of two models are paired."""
    index = {customer: i for i, customer in enumerate(dict.fromkeys(customers))}
    customer_index, size = [index[customer] for customer in customers], len(LABELS)
    tables, loss_sums = np.zeros((len(index), size * size)), np.zeros((len(index), size))
    np.add.at(tables, (customer_index, answers * size + predicted), weights)
    np.add.at(loss_sums, (customer_index, answers), losses * weights)
    shares = tables.sum(axis=0).reshape(size, size).sum(axis=1) / tables.sum()
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples)
    confusion = (times @ tables).reshape(resamples, size, size)
    scale = shares / np.maximum(confusion.sum(axis=2), 1e-9)  # [resamples, size]
    confusion *= scale[:, :, None]
    hits, claimed = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=1)
    f1 = 2 * hits / np.maximum(shares + claimed, 1e-9)
    nll = (times @ loss_sums * scale).sum(axis=1)
    samples = {"accuracy": hits.sum(axis=1), "macro_f1": f1.mean(axis=1), "nll": nll}
    return samples | {f"recall_{label}": hits[:, i] / max(shares[i], 1e-9) for i, label in enumerate(LABELS)}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap samples [resamples]."""
    return tuple(np.percentile(samples, [2.5, 97.5]).tolist())


def add_differences(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Add to each result how much it is above the reference on the same rows, with paired intervals."""
    for result in results:
        if result is not reference:
            result["difference"] = {"to": reference["model"]} | {
                name: [result[name] - reference[name], *interval(samples - reference["samples"][name])]
                for name, samples in result["samples"].items()
            }


def measure(rows: Sequence[CreditRow], probabilities: np.ndarray, options: MeasureOptions) -> dict[str, Any]:
    """Return metrics and intervals of one model's probabilities [N, labels] on balanced rows.
    With class shares the rows are weighted so that each label has its share; the probabilities must be for these."""
    answers = np.array([LABELS.index(row.label) for row in rows])
    predicted = probabilities.argmax(axis=1)
    weights = np.ones(len(rows))
    if options.class_shares is not None:
        weights = len(LABELS) * np.array(options.class_shares)[answers]
    customers = [row.customer for row in rows]
    result: dict[str, Any] = point_metrics(answers, predicted, probabilities, weights)
    losses = row_losses(probabilities, answers)
    result["samples"] = bootstrap(answers, predicted, losses, customers, options.resamples, options.seed, weights)
    result["interval_95"] = {name: interval(samples) for name, samples in result["samples"].items()}
    result |= {"predicted": [LABELS[i] for i in predicted], "weights": weights}
    if options.abstain_below is not None:
        sure, right = probabilities.max(axis=1) >= options.abstain_below, predicted == answers
        result["abstain"] = {"below": options.abstain_below, "coverage": float(np.average(sure, weights=weights))}
        accuracy = float(np.average(right[sure], weights=weights[sure])) if sure.any() else None
        result["abstain"]["accuracy"] = accuracy
    return result


def baselines(
    train: list[CreditRow], pool: list[CreditRow], rows: list[CreditRow], options: MeasureOptions
) -> list[dict[str, Any]]:
    """Return the results of BASELINES on `rows`. They are trained on the balanced rows `train`, the tabular teacher on
    the `pool` that these were drawn from, as it labels KD rows. Raises InputError for too few customers."""
    frame = tabular.tabular_features([row.features for row in train + rows])
    answers = np.array([LABELS.index(row.label) for row in train])
    labelled = [True] * len(pool) + [False] * len(rows)
    boosting = tabular.gradient_boosting(options.seed)
    models = [DummyClassifier(strategy="prior"), tabular.logistic_regression(), None, boosting]
    results = []
    for name, model in zip(tabular.BASELINES, models, strict=True):
        if model is None:
            probabilities = tabular.tabular_teacher([*pool, *rows], labelled, options.seed)[len(pool) :]
        else:
            with threadpool_limits(1):  # as in `tabular_teacher`
                model.fit(frame[: len(train)], answers)
            probabilities = model.predict_proba(frame[len(train) :])
        if options.class_shares is not None:
            probabilities = probabilities * np.array(options.class_shares)
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        results.append(measure(rows, probabilities, options) | {"model": name, "probabilities": probabilities})
    return results
