"""Metrics of class probabilities with intervals from resampled customers, and the baselines to compare models with.

Values in, values out: no models and no files. NLL is in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score, roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits

from distil.calibration import row_losses
from distil.creditmix import tabular
from distil.creditmix.rows import CreditRow
from distil.tasks import Task

MOST_RANKED = 10  # labels up to which AUC has an interval: its time grows with them
ROW_BY_ROW = ("predicted", "responses", "probabilities", "samples", "weights")  # of a result; summaries omit these


@dataclass(frozen=True)
class MeasureOptions:
    """How models are measured. resamples, seed: of the bootstrap, 0 for none; class_shares [labels]: class proportions
    in use that rows are weighted to (None: each row counts the same); abstain_below: see --abstain_below."""

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
    answers: np.ndarray, probabilities: np.ndarray, labels: Sequence[str], weights: np.ndarray | None = None
) -> dict[str, float]:
    """Return accuracy, macro-F1, recall per label, NLL, Brier score (sum over labels), ECE (15 equal-width bins), AURC
    (mean error rate over all coverages, Geifman and El-Yaniv 2017), MCC, and `ranking_metrics`. answers: label indices
    [N]; probabilities [N, labels]. Each row counts by its weight, default 1. Labels without a row have no recall."""
    weights, size = np.ones(len(answers)) if weights is None else weights, len(labels)
    predicted = probabilities.argmax(axis=1)
    right = predicted == answers
    confidence = probabilities[np.arange(len(answers)), predicted]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((weights * (right - confidence))[bins == b].sum()) for b in range(15)]
    squares = ((probabilities - np.eye(size)[answers]) ** 2).sum(axis=1)
    coverage, accuracy = coverage_curve(right, confidence, weights)
    table = {"labels": range(size), "sample_weight": weights, "zero_division": 0}
    recalls, found = recall_score(answers, predicted, average=None, **table), set(answers.tolist())
    return {
        "accuracy": float(accuracy_score(answers, predicted, sample_weight=weights)),
        "macro_f1": float(f1_score(answers, predicted, average="macro", **table)),
        **{f"recall_{label}": float(recalls[k]) for k, label in enumerate(labels) if k in found},
        "nll": float(np.average(row_losses(probabilities, answers), weights=weights)),
        "brier": float(np.average(squares, weights=weights)),
        "ece": float(sum(gaps) / weights.sum()),
        "aurc": float(np.average(1 - accuracy, weights=np.diff(coverage, prepend=0))),
        "mcc": float(matthews_corrcoef(answers, predicted, sample_weight=weights)),
        **ranking_metrics(answers, probabilities, weights),
    }


def ranked_labels(answers: np.ndarray, size: int) -> list[int]:
    """Return the labels whose AUC is taken: those with rows, where not all rows have them; of two labels the last, to
    which the first is the mirror image."""
    return [k for k in (range(size) if size > 2 else [1]) if 0 < (answers == k).sum() < len(answers)]


def ranking_metrics(answers: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return the area under the ROC curve (one label against the rest, mean of the labels), Gini (2 AUC - 1) and, for
    two labels, KS: the largest difference of the two labels' cumulative distributions of the probability. None of them
    where all rows have one label."""
    if not (ranked := ranked_labels(answers, probabilities.shape[1])):
        return {}
    areas = [roc_auc_score(answers == k, probabilities[:, k], sample_weight=weights) for k in ranked]
    result = {"auc": float(np.mean(areas)), "gini": float(2 * np.mean(areas) - 1)}
    if probabilities.shape[1] == 2:
        false, true, _ = roc_curve(answers, probabilities[:, 1], sample_weight=weights)
        result["ks"] = float(np.abs(true - false).max())
    return result


def bootstrap(
    answers: np.ndarray,
    probabilities: np.ndarray,
    customers: Sequence[str],
    labels: Sequence[str],
    resamples: int,
    seed: int,
    weights: np.ndarray | float = 1.0,
) -> dict[str, np.ndarray]:
    """Return accuracy, macro-F1, recalls, NLL, MCC, AUC and Gini, each [resamples]; not KS, which resampling
    raises, and AUC and Gini of at most MOST_RANKED labels.
    Customers are resampled with all their rows. In each resample every label counts as much as it does in the rows,
    which were drawn for that: how many of its customers came up is not an uncertainty of the model. One seed draws
    the same customers for every model of the same rows, so differences of two models are paired. A label that a
    resample lacks is left out of its means, and its recall there is NaN."""
    index = {customer: i for i, customer in enumerate(dict.fromkeys(customers))}
    customer_index, size = np.array([index[customer] for customer in customers]), len(labels)
    weights = np.broadcast_to(np.asarray(weights, dtype=float), answers.shape)
    cells = answers * size + probabilities.argmax(axis=1)
    tables = csr_array((weights, (customer_index, cells)), shape=(len(index), size * size))
    tables = tables.toarray() if size <= 10 else tables  # nearly all of a customer's 77 x 77 cells are empty
    loss_sums = np.zeros((len(index), size))
    np.add.at(loss_sums, (customer_index, answers), row_losses(probabilities, answers) * weights)
    shares = tables.sum(axis=0).reshape(size, size).sum(axis=1) / tables.sum()
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples).astype(float)
    confusion = (times @ tables).reshape(resamples, size, size)
    counts = confusion.sum(axis=2)  # [resamples, size]
    lacking = (counts == 0) & (shares > 0)
    covered = 1 - (lacking * shares).sum(axis=1)
    scale = shares / np.maximum(counts, 1e-9)
    confusion *= scale[:, :, None]
    hits, claimed = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=1)
    f1 = 2 * hits / np.maximum(shares + claimed, 1e-9)
    samples = {"accuracy": hits.sum(axis=1) / covered, "macro_f1": f1.sum(axis=1) / (size - lacking.sum(axis=1))}
    samples["nll"] = (times @ loss_sums * scale).sum(axis=1) / covered
    for k in np.flatnonzero(shares):
        samples[f"recall_{labels[k]}"] = np.where(lacking[:, k], np.nan, hits[:, k] / shares[k])
    actual, squared = confusion.sum(axis=2), covered**2
    above = hits.sum(axis=1) * covered - (actual * claimed).sum(axis=1)  # Gorodkin 2004, as scikit-learn has it
    spread = (squared - (claimed**2).sum(axis=1)) * (squared - (actual**2).sum(axis=1))
    samples["mcc"] = np.where(spread > 1e-12, above / np.sqrt(np.maximum(spread, 1e-12)), 0.0)
    if (ranked := ranked_labels(answers, size)) and size <= MOST_RANKED:
        samples["auc"] = auc_samples(answers, probabilities, ranked, times, customer_index, weights, scale)
        samples["gini"] = 2 * samples["auc"] - 1
    return {name: values for name, values in samples.items() if not np.isnan(values).all()}


def auc_samples(
    answers: np.ndarray,
    probabilities: np.ndarray,
    ranked: Sequence[int],
    times: np.ndarray,
    customer_index: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
) -> np.ndarray:
    """Return the mean AUC of the `ranked` labels in each resample [resamples]: rows are sorted once a label, and
    weighted by how often a resample has them. times [resamples, customers]; customer_index, weights [N]; scale
    [resamples, labels]: of a label's rows, so that it counts as much as in the rows."""
    areas = np.full((len(ranked), len(times)), np.nan)
    step, times, scale = max(1, 1_000_000 // len(answers)), times.T, scale.T  # few resamples at once stay in the cache
    for (column, k), start in itertools.product(enumerate(ranked), range(0, times.shape[1], step)):
        part, order = slice(start, start + step), np.argsort(probabilities[:, k], kind="stable")
        owners, own = answers[order], answers[order] == k
        mass = times[:, part][customer_index[order]] * weights[order, None] * scale[:, part][owners]  # [N, step]
        ties = np.flatnonzero(np.diff(probabilities[order, k], prepend=-1.0))  # where rows of the next score begin
        every, mine = np.add.reduceat(mass, ties), np.add.reduceat(mass * own[:, None], ties)
        rest = every - mine
        area, pairs = (mine * (rest.cumsum(axis=0) - rest / 2)).sum(axis=0), mine.sum(axis=0) * rest.sum(axis=0)
        areas[column, part] = np.divide(area, pairs, out=areas[column, part], where=pairs > 0)
    counted, total = (~np.isnan(areas)).sum(axis=0), np.nansum(areas, axis=0)
    return np.divide(total, counted, out=np.full(len(total), np.nan), where=counted > 0)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap samples [resamples], of those that have a value."""
    return tuple(np.percentile(samples[~np.isnan(samples)], [2.5, 97.5]).tolist())


def add_differences(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Add to each result how much it is above the reference on the same rows, with paired intervals."""
    for result in results:
        if result is not reference:
            result["difference"] = {"to": reference["model"]} | {
                name: [result[name] - reference[name], *interval(samples - reference["samples"][name])]
                for name, samples in result["samples"].items()
            }


def measure(
    rows: Sequence[CreditRow], probabilities: np.ndarray, labels: Sequence[str], options: MeasureOptions
) -> dict[str, Any]:
    """Return metrics and intervals of one model's probabilities [N, labels] on validation rows.
    With class shares balanced rows are weighted to these, and the probabilities must be for them."""
    answers = np.array([labels.index(row.label) for row in rows])
    predicted = probabilities.argmax(axis=1)
    weights = np.ones(len(rows))
    if options.class_shares is not None:
        weights = len(labels) * np.array(options.class_shares)[answers]
    result: dict[str, Any] = point_metrics(answers, probabilities, labels, weights)
    if options.resamples:
        customers = [row.customer for row in rows]
        how = options.resamples, options.seed, weights
        result["samples"] = bootstrap(answers, probabilities, customers, labels, *how)
        result["interval_95"] = {name: interval(samples) for name, samples in result["samples"].items()}
    result |= {"predicted": [labels[i] for i in predicted], "weights": weights}
    if options.abstain_below is not None:
        sure, right = probabilities.max(axis=1) >= options.abstain_below, predicted == answers
        result["abstain"] = {"below": options.abstain_below, "coverage": float(np.average(sure, weights=weights))}
        accuracy = float(np.average(right[sure], weights=weights[sure])) if sure.any() else None
        result["abstain"]["accuracy"] = accuracy
    return result


def baselines(
    train: list[CreditRow], pool: list[CreditRow], rows: list[CreditRow], task: Task, options: MeasureOptions
) -> list[dict[str, Any]]:
    """Return the results of `tabular.baseline_names` on `rows`. They are trained on the rows `train` that a trainer
    would draw, the tabular teacher and TF-IDF on the `pool` that these were drawn from, as KD rows are labelled.
    Raises InputError for too few customers."""
    labelled = [True] * len(pool) + [False] * len(rows)
    taught = tabular.tabular_teacher([*pool, *rows], labelled, options.seed, task)[len(pool) :]
    answers = np.array([task.labels.index(row.label) for row in train])
    every: list[Any] = [DummyClassifier(strategy="prior").fit(answers, answers).predict_proba(np.zeros(len(rows)))]
    if task.text_column:
        every.append(taught)
    else:
        frame = tabular.tabular_features([row.features for row in train + rows], task)
        models = tabular.logistic_regression(), tabular.gradient_boosting(options.seed)
        with threadpool_limits(1):  # as in `tabular_teacher`
            fitted = [model.fit(frame[: len(train)], answers) for model in models]
        linear, boosted = (model.predict_proba(frame[len(train) :]) for model in fitted)
        every += [linear, taught, boosted]
    results = []
    for name, probabilities in zip(tabular.baseline_names(task), every, strict=True):
        if options.class_shares is not None:
            probabilities = probabilities * np.array(options.class_shares)
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        measured = measure(rows, probabilities, task.labels, options)
        results.append(measured | {"model": name, "probabilities": probabilities})
    return results
