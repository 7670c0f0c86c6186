"""TF-IDF with logistic regression: the baseline of text tasks, and their teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.calibration import row_losses

if TYPE_CHECKING:
    import numpy as np

# Inverse strengths of regularisation, in scikit-learn's unit. On 7,060 rows of banking77 the last has the lowest NLL
# (0.42; at 10: 0.47, at 100: 0.45); where texts say little about their label, a lower one has it.
STRENGTHS = (1.0, 6.0, 30.0)
MOST_ROWS = 20_000  # that a model is fitted on
MOST_WORDS, MOST_PIECES = 20_000, 30_000  # features kept; L-BFGS takes 200 bytes for each and each label
BATCH = 5_000  # texts whose features are in memory at once


def fitted_regression(
    texts: Sequence[str], answers: np.ndarray, weights: np.ndarray, strength: float, seed: int
) -> Any:
    """Return TF-IDF of words, pairs of words and pieces of words (2 to 5 letters) with logistic regression, fitted on
    texts [N] with label indices and weights [N], or on a sample of MOST_ROWS of them. Raises InputError for texts
    without words."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from threadpoolctl import threadpool_limits

    rows = np.arange(len(texts))
    if len(texts) > MOST_ROWS:
        rows = np.random.default_rng(seed).choice(len(texts), MOST_ROWS, replace=False)
    how = {"sublinear_tf": True, "min_df": 2 if len(rows) >= 1000 else 1, "dtype": np.float32}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b", max_features=MOST_WORDS, **how)
    pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), max_features=MOST_PIECES, **how)
    features, regression = make_union(words, pieces), LogisticRegression(C=strength, tol=1e-3, max_iter=200)
    try:
        found = features.fit_transform([texts[i] for i in rows])
    except ValueError as error:
        raise InputError(f"TF-IDF finds no words in the texts ({error}); look at the task's text_column") from None
    with threadpool_limits(1):  # threads that wait for each other take minutes next to other work
        regression.fit(found, answers[rows], weights[rows])
    return make_pipeline(features, regression)


def text_probabilities(model: Any, texts: Sequence[str], labels: int) -> np.ndarray:
    """Return class probabilities [N, labels]; 0 for a label that the model's sample did not have."""
    import numpy as np

    probabilities = np.zeros((len(texts), labels))
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        probabilities[part, model.classes_] = model.predict_proba(texts[part])
    return probabilities


def group_folds(
    answers: np.ndarray, groups: Sequence[str], seed: int, grouped: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return five folds (row numbers of train, of test) with the labels' proportions; groups are kept whole.
    grouped: search for groups that fit together even where each row is one, which takes minutes for many."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = not grouped and len(set(groups)) == len(groups)
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    return list(kind(5, shuffle=True, random_state=seed).split(answers, answers, None if alone else groups))


def text_teacher(
    texts: Sequence[str],
    answers: np.ndarray,
    groups: Sequence[str],
    weights: np.ndarray,
    others: Sequence[str],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return class probabilities ([texts, labels], [others, labels]).
    answers: label index of each text, every label occurs. The first are cross-fitted over the groups of the texts in 5
    folds; those of the others come from one model of all texts. Of STRENGTHS the one with the lowest NLL in the first
    fold is taken for all: a fifth of the rows tells them apart, and all folds would take three times as long."""
    import numpy as np

    labels, chosen = int(answers.max()) + 1, None
    probabilities = np.empty((len(texts), labels))
    for train, test in group_folds(answers, groups, seed):
        tried = {}
        for strength in STRENGTHS if chosen is None else (chosen,):
            model = fitted_regression([texts[i] for i in train], answers[train], weights[train], strength, seed)
            found = text_probabilities(model, [texts[i] for i in test], labels)
            tried[strength] = np.average(row_losses(found, answers[test]), weights=weights[test]), found
        chosen = min(tried, key=lambda strength: tried[strength][0])
        probabilities[test] = tried[chosen][1]
    if not len(others):
        return probabilities, np.empty((0, labels))
    model = fitted_regression(texts, answers, weights, chosen, seed)
    return probabilities, text_probabilities(model, others, labels)
