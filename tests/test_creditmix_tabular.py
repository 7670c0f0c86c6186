"""Tabular models: the teacher sees no customer it labels, the ceiling is that of the real rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from common import InputError
from distil.creditmix import text
from distil.creditmix.rows import CreditRow, balanced_sample, read_rows
from distil.creditmix.tabular import (
    chosen_boosting,
    gradient_boosting,
    simple_baselines,
    tabular_features,
    tabular_teacher,
)
from distil.creditmix.text import group_folds
from distil.tasks import default_task, task_of
from distil.testing import ROOT

TASK = default_task()
LABELS = TASK.labels
LOANS = task_of(
    {
        "name": "loans",
        "instruction": "Will this loan be repaid?",
        "labels": ["no", "yes"],
        "label_column": "repaid",
        "fields": [{"name": "Sum", "kind": "number"}, {"name": "Grade"}, {"name": "Purpose", "kind": "text"}],
    },
    "test",
)
TOPICS = task_of(
    {
        "name": "topics",
        "instruction": "Topic?",
        "labels": ["cards", "loans"],
        "label_column": "y",
        "text_column": "text",
    },
    "test",
)
WORDS = {"cards": ["card", "chip", "pin", "atm"], "loans": ["loan", "rate", "term", "mortgage"]}


def topic_rows(count: int, seed: int = 0) -> list[CreditRow]:
    """Return texts of four words, three of them of the label's topic, one group each."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        label = TOPICS.labels[n % 2]
        other = TOPICS.labels[1 - n % 2]
        words = [*rng.choice(WORDS[label], 3), rng.choice(WORDS[other]), f"customer{n}"]
        rows.append(CreditRow(str(n), " ".join(rng.permutation(words)), label))
    return rows


def test_more_words_than_gradient_boosting_takes():
    features = [TASK.canonical(f"Age: 30, Occupation: job{i % 400}") for i in range(900)]
    assert len(tabular_features(features, TASK)["Occupation"].cat.categories) == 201


def test_probabilities_come_from_models_that_never_saw_the_customer():
    """Features carry no information on the label here, so only a model that saw the customer could know it."""
    rng = np.random.default_rng(0)
    rows = [
        CreditRow(f"C{number}", f"Age: {18 + number % 80}, Annual Income: {1000 * (number + 1)}", label)
        for number, label in enumerate(rng.choice(LABELS, 300))
        for _ in range(2)
    ]
    probabilities = tabular_teacher(rows, [True] * len(rows), 0, TASK)
    right = np.mean([LABELS[p.argmax()] == row.label for p, row in zip(probabilities, rows, strict=True)])
    assert probabilities.shape == (600, 3)
    assert right < 0.45


def test_the_teacher_weighs_each_label_the_same():
    """Features carry no information here, so a row gets the weights of the labels, and not their shares."""
    rng = np.random.default_rng(0)
    labels = rng.choice(LABELS, 400, p=[0.15, 0.7, 0.15])
    rows = [CreditRow(f"C{n}", f"Age: {18 + n % 7}", label) for n, label in enumerate(labels)]
    known = np.arange(len(rows)) % 4 > 0  # the others get the model of all known rows
    means = [tabular_teacher(rows, known, 0, TASK)[part].mean(axis=0) for part in (known, ~known)]
    assert np.abs(np.array(means) - 1 / 3).max() < 0.08


def test_few_labels_get_a_teacher_with_more_regularisation():
    """The settings with the lowest cross-fitted NLL are chosen: with few noisy labels not the published ones."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 400)
    features = [f"Age: {rng.integers(18, 80)}, Outstanding Debt: {500 * a + rng.integers(0, 3000)}" for a in answers]
    frame, groups, weights = tabular_features(features, TASK), [str(n // 2) for n in range(400)], np.ones(400)
    model, probabilities = chosen_boosting(frame, answers, group_folds(answers, groups, 0, True), weights, 0)
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

    rows, _ = read_rows(str(ROOT / "data" / "creditmix_dataset.json"), TASK)
    parts = {
        name: [r for r in rows if TASK.part_of(r.customer, split_seed) == name] for name in ("train", "validation")
    }
    counts = Counter(row.label for row in parts["train"])
    train = balanced_sample(parts["train"], LABELS, min(counts.values()), 0)
    validation = balanced_sample(parts["validation"], LABELS, 1500, 0)
    frames = [tabular_features([row.features for row in part], TASK) for part in (train, validation)]
    model = gradient_boosting(0).fit(frames[0], [row.label for row in train])
    predicted, truth = model.predict(frames[1]), [row.label for row in validation]
    assert np.mean(predicted == truth) == pytest.approx(0.682, abs=0.02)
    assert f1_score(truth, predicted, average="macro") == pytest.approx(0.677, abs=0.02)


# ------------------------------------------------------------------------------------------------------- other tasks


def test_fields_are_read_by_their_kind():
    """Grades are numbers, but the task calls them words; a text of a list of fields may have commas."""
    features = [f"Sum: {1000 + i}, Grade: {i % 3}, Purpose: roof, windows {i % 300}" for i in range(900)]
    frame = tabular_features([*features, "Sum: Unknown, Grade: Unknown, Purpose: Unknown"], LOANS)
    assert [str(kind) for kind in frame.dtypes] == ["float64", "category", "category"]
    assert set(frame["Grade"].cat.categories) == {"0", "1", "2", "Unknown"}
    assert len(frame["Purpose"].cat.categories) == 201 and np.isnan(frame["Sum"].iloc[-1])


def test_a_field_may_have_no_value_in_the_rows_of_a_fold():
    """Row 3 has the only sum that the teacher may see: in one fold no row has any."""
    sums = [7 if n in (3, 50) else "Unknown" for n in range(60)]
    rows = [CreditRow(str(n), f"Sum: {one}, Grade: {n % 3}", LOANS.labels[n % 2]) for n, one in enumerate(sums)]
    assert tabular_teacher(rows, np.arange(60) != 50, 0, LOANS).sum(axis=1) == pytest.approx(1)


def test_the_teacher_of_an_unbalanced_task_has_its_class_proportions():
    rng = np.random.default_rng(0)
    rows = [CreditRow(str(n), f"Sum: {n % 7}", "yes" if rng.random() < 0.8 else "no") for n in range(400)]
    known = np.arange(len(rows)) % 4 > 0
    share = np.mean([row.label == "yes" for row, k in zip(rows, known, strict=True) if k])
    probabilities = tabular_teacher(rows, known, 0, LOANS)
    for part in (known, ~known):
        assert probabilities[part].mean(axis=0) == pytest.approx([1 - share, share], abs=0.03)


def test_a_text_teacher_reads_words_and_never_saw_the_text():
    """The label is in the words of the topic; what is random cannot be known of a text that was not seen."""
    rows, known = topic_rows(200), np.arange(200) % 3 > 0
    probabilities = tabular_teacher(rows, known, 0, TOPICS)
    right = np.array([TOPICS.labels[p.argmax()] == row.label for p, row in zip(probabilities, rows, strict=True)])
    assert right[known].mean() > 0.95 and right[~known].mean() > 0.95
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    wrong = [row if k else CreditRow(row.customer, row.features, "cards") for row, k in zip(rows, known, strict=True)]
    np.testing.assert_array_equal(probabilities, tabular_teacher(wrong, known, 0, TOPICS))  # other labels are not used

    rng = np.random.default_rng(0)
    chance = [
        CreditRow(str(n // 2), f"text {n // 2}", label)
        for n, label in enumerate(rng.choice(["cards", "loans"], 150).repeat(2))
    ]
    guessed = tabular_teacher(chance, [True] * 300, 0, TOPICS).argmax(axis=1)
    assert np.mean([TOPICS.labels[g] == row.label for g, row in zip(guessed, chance, strict=True)]) < 0.6


def test_texts_that_tell_little_get_more_regularisation():
    """With labels by chance the probabilities stay near the shares; weak regularisation would be sure of itself."""
    rng = np.random.default_rng(0)
    rows = [CreditRow(row.customer, row.features, str(rng.choice(TOPICS.labels))) for row in topic_rows(200)]
    probabilities = tabular_teacher(rows, [True] * 200, 0, TOPICS)
    assert np.abs(probabilities - 0.5).mean() < 0.15


def test_a_text_model_is_fitted_on_a_bounded_number_of_rows(monkeypatch):
    """Also where a label is not among the sample's rows, and in batches."""
    rows = topic_rows(300)
    for name, size in (("MOST_ROWS", 60), ("BATCH", 7)):
        monkeypatch.setattr(text, name, size)
    sizes, real = [], text.fitted_regression

    def counted(*arguments):
        model = real(*arguments)
        sizes.append(model[-1].coef_.shape[1])
        return model

    monkeypatch.setattr(text, "fitted_regression", counted)
    probabilities = tabular_teacher(rows, np.arange(300) < 280, 0, TOPICS)
    right = [TOPICS.labels[p.argmax()] == row.label for p, row in zip(probabilities, rows, strict=True)]
    assert np.mean(right) > 0.9 and len(sizes) == 8  # three strengths in one fold, four folds, one model of all
    model = real(["a b", "a c"] * 5, np.array([0, 2] * 5), np.ones(10), 1.0, 0)
    assert text.text_probabilities(model, ["a b"] * 20, 3)[:, 1].tolist() == [0.0] * 20


@pytest.mark.parametrize("task", [LOANS, TOPICS], ids=["table", "text"])
def test_a_label_with_few_groups_is_refused(task):
    rows = [CreditRow(str(n), f"Sum: {n}", task.labels[n < 4]) for n in range(50)]
    with pytest.raises(
        InputError, match=rf"4 training customers are {task.labels[1]}; at least 5 of each label are needed"
    ):
        tabular_teacher(rows, [True] * 50, 0, task)


def test_texts_without_words_are_reported():
    rows = [CreditRow(str(n), "...", TOPICS.labels[n % 2]) for n in range(50)]
    with pytest.raises(InputError, match=r"TF-IDF finds no words in the texts .*text_column"):
        tabular_teacher(rows, [True] * 50, 0, TOPICS)


def test_the_gates_baselines_follow_the_task():
    """A table task: regression on the last line of its prompts; texts and free prompts: the majority alone."""
    rows = [(LOANS.prompt(f"Sum: {1000 + n + 900 * (n % 2)}, Grade: {n}"), LOANS.labels[n % 2]) for n in range(60)]
    result = simple_baselines(*zip(*rows, strict=True), LOANS)
    assert result["majority"] == 0.5 and result["logistic regression"] > 0.9
    assert set(simple_baselines(*zip(*rows, strict=True))) == {"majority"}  # not CreditMix prompts
    texts = [(TOPICS.prompt(row.features), row.label) for row in topic_rows(60)]
    assert set(simple_baselines(*zip(*texts, strict=True), TOPICS)) == {"majority"}
    twice = [f"Who is right? Ann: {n}, Bob: 2, Ann: 3" for n in range(60)]  # a dialogue, not a list of fields
    assert set(simple_baselines(twice, ["a", "b"] * 30)) == {"majority"}
