"""Metrics by hand and against scikit-learn; intervals that resample customers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from distil.creditmix.metrics import (
    MeasureOptions,
    add_differences,
    bootstrap,
    coverage_curve,
    interval,
    measure,
    point_metrics,
)
from distil.creditmix.rows import LABELS, CreditRow


def test_point_metrics_by_hand():
    """Four rows: Good and Bad right, Standard once right and once taken for Good."""
    answers, predicted = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 2])
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.51, 0.4, 0.09], [0.05, 0.05, 0.9]])
    result = point_metrics(answers, predicted, probabilities)
    assert result["accuracy"] == 0.75
    # F1: Good 2*1/(1+2), Standard 2*1/(2+1), Bad 1
    assert result["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert [result[f"recall_{label}"] for label in LABELS] == [1.0, 0.5, 1.0]
    assert result["nll"] == pytest.approx(-(np.log(0.5) + np.log(0.6) + np.log(0.4) + np.log(0.9)) / 4)
    squares = (0.25 + 0.09 + 0.04) + (0.04 + 0.16 + 0.04) + (0.2601 + 0.36 + 0.0081) + (0.0025 + 0.0025 + 0.01)
    assert result["brier"] == pytest.approx(squares / 4)
    # Bins of 1/15: 0.5 and 0.51 in [7/15, 8/15), one of two right; 0.6 in [9/15, 10/15); 0.9 in [13/15, 14/15)
    assert result["ece"] == pytest.approx((abs(1 - 1.01) + abs(1 - 0.6) + abs(1 - 0.9)) / 4)


def test_point_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 300)
    answers, predicted = rng.integers(0, 3, 300), probabilities.argmax(axis=1)
    result = point_metrics(answers, predicted, probabilities)
    assert result["accuracy"] == pytest.approx(accuracy_score(answers, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(answers, predicted, average="macro"))
    assert result["nll"] == pytest.approx(log_loss(answers, probabilities))


def test_certain_rows_have_no_loss_or_a_finite_one():
    certain = np.eye(3)
    right = point_metrics(np.arange(3), np.arange(3), certain)
    assert (right["accuracy"], right["nll"], right["brier"], right["ece"]) == (1, 0, 0, 0)
    wrong = point_metrics(np.array([1, 2, 0]), np.arange(3), certain)
    assert wrong["accuracy"] == 0 and wrong["ece"] == 1 and wrong["brier"] == 2 and np.isfinite(wrong["nll"])


def test_weights_count_rows_as_often():
    """A row of weight 3 is three rows."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 50)
    answers, predicted, times = rng.integers(0, 3, 50), probabilities.argmax(axis=1), rng.integers(1, 4, 50)
    weighted = point_metrics(answers, predicted, probabilities, times.astype(float))
    repeated = point_metrics(answers.repeat(times), predicted.repeat(times), probabilities.repeat(times, axis=0))
    for name in set(weighted) - {"aurc"}:
        assert weighted[name] == pytest.approx(repeated[name]), name
    # Three rows of one confidence are three steps of the curve, a row of weight 3 is a long one.
    assert weighted["aurc"] == pytest.approx(repeated["aurc"], abs=0.02)


def test_aurc_by_hand():
    """Most confident first: right, right, wrong, right -> error rates 0, 0, 1/3, 1/4."""
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]])
    result = point_metrics(np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2]), probabilities)
    assert result["aurc"] == pytest.approx((1 / 3 + 1 / 4) / 4)
    weights = np.array([1.0, 1.0, 2.0, 1.0])  # error rates 0, 0, 2/4, 2/5 at coverages 1/5, 2/5, 4/5, 1
    result = point_metrics(np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2]), probabilities, weights)
    assert result["aurc"] == pytest.approx(2 / 5 * 2 / 4 + 1 / 5 * 2 / 5)


def test_rows_of_equal_confidence_have_no_order():
    """Otherwise the area under the risk-coverage curve would depend on how the file is sorted."""
    confidence, weights = np.array([0.9, 0.5, 0.5, 0.5]), np.ones(4)
    for right in ([1, 1, 1, 0], [1, 0, 1, 1]):
        coverage, accuracy = coverage_curve(np.array(right), confidence, weights)
        np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(accuracy, [1, 5 / 6, 7 / 9, 3 / 4])


def test_intervals_resample_customers():
    """Ten equal rows of each customer tell no more than one row: the interval must not get narrower."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 120)
    predicted = np.where(rng.random(120) < 0.7, answers, (answers + 1) % 3)
    names = [f"C{i}" for i in range(120)]
    truth, guess = answers.repeat(10), predicted.repeat(10)

    def accuracy(*arguments):
        truth, guess, names = arguments
        samples = bootstrap(truth, guess, 1.0 - (truth == guess), names, 2000, 0)
        np.testing.assert_allclose(samples["nll"], 1 - samples["accuracy"])  # these losses are the errors
        return interval(samples["accuracy"])

    low, high = accuracy(answers, predicted, names)
    assert accuracy(truth, guess, [n for n in names for _ in range(10)]) == (low, high)
    assert low < (answers == predicted).mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 120), rel=0.2)  # the binomial width
    alone = accuracy(truth, guess, [str(i) for i in range(1200)])
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_what_the_design_fixes_is_not_an_uncertainty():
    """The rows are drawn balanced: which of their customers a resample has must not move the shares of the labels."""
    answers, names = np.arange(300) % 3, [f"C{i}" for i in range(300)]
    one = bootstrap(answers, np.zeros(300, int), np.ones(300), names, 500, 0)
    assert interval(one["accuracy"]) == pytest.approx((1 / 3, 1 / 3))
    # Of one label every second row is right, of the others all or none: only the former varies.
    right = (answers == 0) | ((answers == 1) & (np.arange(300) % 2 == 0))
    predicted = np.where(right, answers, (answers + 1) % 3)
    for weights, share in ((1.0, 1 / 3), (3 * np.array([0.2, 0.7, 0.1])[answers], 0.7)):
        samples = bootstrap(answers, predicted, 1.0 - right, names, 4000, 0, weights)
        low, high = interval(samples["accuracy"])
        assert high - low == pytest.approx(2 * 1.96 * share * np.sqrt(0.25 / 100), rel=0.1)
        assert (low + high) / 2 == pytest.approx(np.average(right, weights=weights * np.ones(300)), abs=0.01)
        np.testing.assert_allclose(samples["nll"], 1 - samples["accuracy"])


def test_a_model_is_measured_by_customer():
    """Ten equal months of each customer: the intervals are those of one month."""
    rng = np.random.default_rng(0)
    once = [CreditRow(f"C{i}", f"Age: {20 + i}", LABELS[i % 3]) for i in range(90)]
    probabilities = rng.dirichlet(np.ones(3), 90)
    one = measure(once, probabilities, MeasureOptions())
    ten = measure([row for row in once for _ in range(10)], probabilities.repeat(10, axis=0), MeasureOptions())
    for name, ends in one["interval_95"].items():
        assert ten["interval_95"][name] == pytest.approx(ends)


def test_differences_are_paired():
    """Two models that differ on 6 of 120 rows: the difference is known far better than either accuracy."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 120)
    worse = np.where(rng.random(120) < 0.7, answers, (answers + 1) % 3)
    better = worse.copy()
    better[np.flatnonzero(worse != answers)[:6]] = answers[np.flatnonzero(worse != answers)[:6]]
    names = [f"C{i}" for i in range(120)]
    models = [
        {"model": name, "accuracy": (predicted == answers).mean(), "macro_f1": 0.0, "nll": 0.0}
        | {f"recall_{label}": 0.0 for label in LABELS}
        | {"samples": bootstrap(answers, predicted, np.ones(120), names, 2000, 0)}
        for name, predicted in (("better", better), ("worse", worse))
    ]
    add_differences(models, models[1])
    point, low, high = models[0]["difference"]["accuracy"]
    assert point == pytest.approx(6 / 120) and 0 < low < point < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.05 * 0.95 / 120), rel=0.2)
    assert models[0]["difference"]["to"] == "worse" and "difference" not in models[1]
