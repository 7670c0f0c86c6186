"""Tabular models: the teacher sees no customer it labels, the ceiling is that of the real rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distil.creditmix.rows import LABELS, CreditRow, balanced_sample, canonical_features, read_creditmix
from distil.creditmix.tabular import (
    chosen_boosting,
    gradient_boosting,
    simple_baselines,
    tabular_features,
    tabular_teacher,
)
from distil.splits import split_of
from distil.testing import ROOT


def test_more_words_than_gradient_boosting_takes():
    features = [canonical_features(f"Age: 30, Occupation: job{i % 400}") for i in range(900)]
    assert len(tabular_features(features)["Occupation"].cat.categories) == 201


def test_probabilities_come_from_models_that_never_saw_the_customer():
    """Features carry no information on the label here, so only a model that saw the customer could know it."""
    rng = np.random.default_rng(0)
    rows = [
        CreditRow(f"C{number}", f"Age: {18 + number % 80}, Annual Income: {1000 * (number + 1)}", label)
        for number, label in enumerate(rng.choice(LABELS, 300))
        for _ in range(2)
    ]
    probabilities = tabular_teacher(rows, [True] * len(rows), 0)
    right = np.mean([LABELS[p.argmax()] == row.label for p, row in zip(probabilities, rows, strict=True)])
    assert probabilities.shape == (600, 3)
    assert right < 0.45


def test_the_teacher_weighs_each_label_the_same():
    """Features carry no information here, so a row gets the weights of the labels, and not their shares."""
    rng = np.random.default_rng(0)
    labels = rng.choice(LABELS, 400, p=[0.15, 0.7, 0.15])
    rows = [CreditRow(f"C{n}", f"Age: {18 + n % 7}", label) for n, label in enumerate(labels)]
    known = np.arange(len(rows)) % 4 > 0  # the others get the model of all known rows
    means = [tabular_teacher(rows, known, 0)[part].mean(axis=0) for part in (known, ~known)]
    assert np.abs(np.array(means) - 1 / 3).max() < 0.08


def test_few_labels_get_a_teacher_with_more_regularisation():
    """The settings with the lowest cross-fitted NLL are chosen: with few noisy labels not the published ones."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 400)
    features = [f"Age: {rng.integers(18, 80)}, Outstanding Debt: {500 * a + rng.integers(0, 3000)}" for a in answers]
    frame, groups, weights = tabular_features(features), [str(n // 2) for n in range(400)], np.ones(400)
    model, probabilities = chosen_boosting(frame, answers, groups, weights, 0)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    with threadpool_limits(1):
        published = cross_val_predict(
            gradient_boosting(0), frame, answers, groups=groups, cv=folds, method="predict_proba"
        )
    assert model.max_leaf_nodes < 15
    assert log_loss(answers, probabilities) < log_loss(answers, published) - 0.1


def test_the_gates_regression_never_sees_the_customer():
    """Each customer has a separate occupation and random labels, the same in all its rows."""
    labels = np.random.default_rng(0).choice(LABELS, 90)
    rows = [(f"Age: 30, Occupation: Job {n}, Annual Income: 5{n}0", label) for n, label in enumerate(labels)] * 4
    result = simple_baselines([f"Classify\n{text}" for text, _ in rows], [label for _, label in rows])
    assert result["logistic regression"] < 0.5


@pytest.mark.parametrize("split_seed", [0, 1])
def test_the_embedded_rows_are_as_hard_as_the_real_ones(split_seed):
    """Gradient boosting, balanced classes, other customers: 0.682 / 0.677 on the real rows (data/README.md)."""
    from sklearn.metrics import f1_score

    rows, _ = read_creditmix(str(ROOT / "data" / "creditmix_dataset.json"))
    parts = {name: [r for r in rows if split_of(r.customer, split_seed) == name] for name in ("train", "validation")}
    counts = Counter(row.label for row in parts["train"])
    train = balanced_sample(parts["train"], min(counts.values()), 0)
    validation = balanced_sample(parts["validation"], 1500, 0)
    frames = [tabular_features([row.features for row in part]) for part in (train, validation)]
    model = gradient_boosting(0).fit(frames[0], [row.label for row in train])
    predicted, truth = model.predict(frames[1]), [row.label for row in validation]
    assert np.mean(predicted == truth) == pytest.approx(0.682, abs=0.02)
    assert f1_score(truth, predicted, average="macro") == pytest.approx(0.677, abs=0.02)
