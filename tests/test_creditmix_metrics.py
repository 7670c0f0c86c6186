"""Metrics by hand and against scikit-learn; intervals that resample customers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef, roc_auc_score

from distil.creditmix.metrics import (
    MeasureOptions,
    add_differences,
    bootstrap,
    coverage_curve,
    interval,
    measure,
    point_metrics,
)
from distil.creditmix.rows import CreditRow

LABELS = ("Good", "Standard", "Bad")


def predicting(labels: np.ndarray, size: int = 3) -> np.ndarray:
    """Return probabilities [N, size] with the given labels as predictions: 0.6, the others share the rest."""
    return np.full((len(labels), size), 0.4 / (size - 1)) + (0.6 - 0.4 / (size - 1)) * np.eye(size)[labels]


def test_point_metrics_by_hand():
    """Four rows: Good and Bad right, Standard once right and once taken for Good."""
    answers = np.array([0, 1, 1, 2])
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.51, 0.4, 0.09], [0.05, 0.05, 0.9]])
    result = point_metrics(answers, probabilities, LABELS)
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
    result = point_metrics(answers, probabilities, LABELS)
    assert result["accuracy"] == pytest.approx(accuracy_score(answers, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(answers, predicted, average="macro"))
    assert result["nll"] == pytest.approx(log_loss(answers, probabilities))


def test_certain_rows_have_no_loss_or_a_finite_one():
    certain = np.eye(3)
    right = point_metrics(np.arange(3), certain, LABELS)
    assert (right["accuracy"], right["nll"], right["brier"], right["ece"]) == (1, 0, 0, 0)
    wrong = point_metrics(np.array([1, 2, 0]), certain, LABELS)
    assert wrong["accuracy"] == 0 and wrong["ece"] == 1 and wrong["brier"] == 2 and np.isfinite(wrong["nll"])


def test_weights_count_rows_as_often():
    """A row of weight 3 is three rows."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 50)
    answers, times = rng.integers(0, 3, 50), rng.integers(1, 4, 50)
    weighted = point_metrics(answers, probabilities, LABELS, times.astype(float))
    repeated = point_metrics(answers.repeat(times), probabilities.repeat(times, axis=0), LABELS)
    for name in set(weighted) - {"aurc"}:
        assert weighted[name] == pytest.approx(repeated[name]), name
    # Three rows of one confidence are three steps of the curve, a row of weight 3 is a long one.
    assert weighted["aurc"] == pytest.approx(repeated["aurc"], abs=0.02)


def test_aurc_by_hand():
    """Most confident first: right, right, wrong, right -> error rates 0, 0, 1/3, 1/4."""
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]])
    result = point_metrics(np.array([0, 0, 0, 2]), probabilities, LABELS)
    assert result["aurc"] == pytest.approx((1 / 3 + 1 / 4) / 4)
    weights = np.array([1.0, 1.0, 2.0, 1.0])  # error rates 0, 0, 2/4, 2/5 at coverages 1/5, 2/5, 4/5, 1
    result = point_metrics(np.array([0, 0, 0, 2]), probabilities, LABELS, weights)
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
        samples = bootstrap(truth, predicting(guess), names, LABELS, 2000, 0)
        losses = -samples["accuracy"] * np.log(0.6) - (1 - samples["accuracy"]) * np.log(0.2)
        np.testing.assert_allclose(samples["nll"], losses)
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
    one = bootstrap(answers, predicting(np.zeros(300, int)), names, LABELS, 500, 0)
    assert interval(one["accuracy"]) == pytest.approx((1 / 3, 1 / 3))
    # Of one label every second row is right, of the others all or none: only the former varies.
    right = (answers == 0) | ((answers == 1) & (np.arange(300) % 2 == 0))
    predicted = np.where(right, answers, (answers + 1) % 3)
    for weights, share in ((1.0, 1 / 3), (3 * np.array([0.2, 0.7, 0.1])[answers], 0.7)):
        samples = bootstrap(answers, predicting(predicted), names, LABELS, 4000, 0, weights)
        low, high = interval(samples["accuracy"])
        assert high - low == pytest.approx(2 * 1.96 * share * np.sqrt(0.25 / 100), rel=0.1)
        assert (low + high) / 2 == pytest.approx(np.average(right, weights=weights * np.ones(300)), abs=0.01)
        losses = -samples["accuracy"] * np.log(0.6) - (1 - samples["accuracy"]) * np.log(0.2)
        np.testing.assert_allclose(samples["nll"], losses)


def test_a_model_is_measured_by_customer():
    """Ten equal months of each customer: the intervals are those of one month."""
    rng = np.random.default_rng(0)
    once = [CreditRow(f"C{i}", f"Age: {20 + i}", LABELS[i % 3]) for i in range(90)]
    probabilities = rng.dirichlet(np.ones(3), 90)
    one = measure(once, probabilities, LABELS, MeasureOptions())
    ten = measure([row for row in once for _ in range(10)], probabilities.repeat(10, axis=0), LABELS, MeasureOptions())
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
    rows = [CreditRow(name, "", LABELS[k]) for name, k in zip(names, answers, strict=True)]
    models = [
        measure(rows, predicting(predicted), LABELS, MeasureOptions(2000)) | {"model": name}
        for name, predicted in (("better", better), ("worse", worse))
    ]
    add_differences(models, models[1])
    point, low, high = models[0]["difference"]["accuracy"]
    assert point == pytest.approx(6 / 120) and 0 < low < point < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.05 * 0.95 / 120), rel=0.2)
    assert models[0]["difference"]["to"] == "worse" and "difference" not in models[1]


# ------------------------------------------------------------------------------------------------------- other tasks


def resampled_by_hand(answers, probabilities, names, metric, seed):
    """Return the metric in one resample, each row repeated as often as its customer is drawn."""
    customers = list(dict.fromkeys(names))
    times = np.random.default_rng(seed).multinomial(len(customers), np.full(len(customers), 1 / len(customers)))
    repeats = times[[customers.index(name) for name in names]]
    return metric(answers.repeat(repeats), probabilities.repeat(repeats, axis=0))


def test_two_labels_have_auc_gini_ks_and_mcc_as_libraries_give_them():
    """With ties, as rounded probabilities have them; also in a resample, drawn by hand."""
    rng = np.random.default_rng(0)
    answers = (rng.random(300) < 0.2).astype(int)
    positive = np.round(np.clip(0.3 + 0.2 * answers + 0.2 * rng.normal(size=300), 0.01, 0.99), 1)
    probabilities = np.stack([1 - positive, positive], axis=1)
    result = point_metrics(answers, probabilities, ("no", "yes"))
    area = roc_auc_score(answers, positive)
    assert result["auc"] == pytest.approx(area) and result["gini"] == pytest.approx(2 * area - 1)
    assert result["ks"] == pytest.approx(ks_2samp(positive[answers == 1], positive[answers == 0]).statistic)
    mirrored = point_metrics(1 - answers, probabilities[:, ::-1], ("yes", "no"))
    for name in ("auc", "gini", "ks", "nll"):
        assert mirrored[name] == pytest.approx(result[name]), name

    names = [f"C{i // 3}" for i in range(300)]
    samples = bootstrap(answers, probabilities, names, ("no", "yes"), 1, 7)
    by_hand = resampled_by_hand(answers, probabilities, names, lambda y, p: roc_auc_score(y, p[:, 1]), 7)
    assert samples["auc"][0] == pytest.approx(by_hand) and by_hand != pytest.approx(area, abs=1e-4)
    assert "ks" not in samples
    samples = bootstrap(answers, probabilities, names, ("no", "yes"), 500, 0)
    assert interval(samples["auc"])[0] < area < interval(samples["auc"])[1]
    assert interval(samples["mcc"])[0] < result["mcc"] < interval(samples["mcc"])[1]


def test_auc_of_three_labels_is_the_mean_of_one_against_the_rest():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 200)
    probabilities = rng.dirichlet([1, 1, 1], 200) + 0.4 * np.eye(3)[answers]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    result = point_metrics(answers, probabilities, LABELS)
    assert result["auc"] == pytest.approx(roc_auc_score(answers, probabilities, multi_class="ovr"))
    assert result["mcc"] == pytest.approx(matthews_corrcoef(answers, probabilities.argmax(axis=1)))
    assert "ks" not in result
    names = [str(i) for i in range(200)]
    samples = bootstrap(answers, probabilities, names, LABELS, 300, 0)
    low, high = interval(samples["auc"])
    assert low < result["auc"] < high and high - low < 0.15


def test_one_row_of_each_group_and_equal_shares_give_plain_resamples():
    """Where a resample happens to have as many rows of each label as the rows, every metric is scikit-learn's."""
    answers, names = np.arange(12) % 2, [str(i // 2) for i in range(12)]  # each group has a row of each label
    positive = np.random.default_rng(0).random(12)
    probabilities = np.stack([1 - positive, positive], axis=1)
    samples = bootstrap(answers, probabilities, names, ("no", "yes"), 1, 3)

    def metrics(y, p):
        guess = p.argmax(axis=1)
        return (
            accuracy_score(y, guess),
            f1_score(y, guess, average="macro"),
            log_loss(y, p),
            matthews_corrcoef(y, guess),
        )

    wanted = resampled_by_hand(answers, probabilities, names, metrics, 3)
    assert [samples[name][0] for name in ("accuracy", "macro_f1", "nll", "mcc")] == pytest.approx(wanted)


def test_labels_without_rows_have_no_recall_and_no_area():
    """Of four labels one has no row at all and one a single row, which most resamples lack."""
    answers = np.array([0, 1] * 20 + [2])
    labels, probabilities = ("a", "b", "rare", "none"), predicting(answers, 4)
    result = point_metrics(answers, probabilities, labels)
    assert "recall_none" not in result and result["recall_rare"] == 1
    assert result["macro_f1"] == pytest.approx(3 / 4)  # scikit-learn's over all labels
    assert result["auc"] == 1
    samples = bootstrap(answers, probabilities, [str(i) for i in range(41)], labels, 200, 0)
    assert np.isnan(samples["recall_rare"]).any() and interval(samples["recall_rare"]) == (1, 1)
    for name in ("accuracy", "auc", "mcc"):  # what a resample lacks is no error of the model
        assert interval(samples[name]) == pytest.approx((1, 1)), name
    assert interval(samples["nll"]) == pytest.approx((-np.log(0.6),) * 2)
    rows = [CreditRow(str(i), "", labels[k]) for i, k in enumerate(answers)]
    result = measure(rows, probabilities, labels, MeasureOptions(1, 5))
    assert all(np.isfinite(ends).all() for ends in result["interval_95"].values())


def test_rows_of_one_label_alone_have_no_area():
    answers = np.zeros(10, int)
    result = measure(
        [CreditRow(str(i), "", "no") for i in range(10)], predicting(answers, 2), ("no", "yes"), MeasureOptions(5)
    )
    assert result["accuracy"] == 1 and not {"auc", "ks", "gini", "recall_yes"} & set(result)


def test_many_labels_are_resampled_without_a_full_table():
    """As a dense table 10,000 groups of 77 labels take half a gigabyte; each label's recall is a mean of its rows."""
    import tracemalloc

    rng = np.random.default_rng(0)
    answers = rng.integers(0, 77, 10000)
    guess = np.where(rng.random(10000) < 0.8, answers, rng.integers(0, 77, 10000))
    labels = [f"l{k}" for k in range(77)]
    tracemalloc.start()
    samples = bootstrap(answers, predicting(guess, 77), [str(i) for i in range(10000)], labels, 20, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert samples["accuracy"].mean() == pytest.approx((answers == guess).mean(), abs=0.01)
    assert samples["recall_l7"].mean() == pytest.approx((guess == 7)[answers == 7].mean(), abs=0.06)
    assert "auc" not in samples
