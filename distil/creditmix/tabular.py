"""Tabular models of CreditMix rows: gradient boosting (ceiling and teacher), logistic regression, baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.creditmix.rows import CREDIT_FIELDS, LABELS, PLAUSIBLE, UNKNOWN, CreditRow, parse_features

if TYPE_CHECKING:
    import numpy as np

BASELINES = ["majority", "logistic regression", "tabular teacher", "gradient boosting"]  # `metrics.baselines`
# The settings of the published ceiling, then two with more regularisation. The first overfits where few labels are
# known: with 1,508 of the embedded rows its cross-fitted NLL is 1.16, that of the last 0.64.
BOOSTING_SETTINGS = (
    {"learning_rate": 0.05, "max_iter": 150, "max_leaf_nodes": 15},
    {"learning_rate": 0.05, "max_iter": 80, "max_leaf_nodes": 7, "min_samples_leaf": 60, "l2_regularization": 10},
    {"learning_rate": 0.03, "max_iter": 100, "max_leaf_nodes": 5, "min_samples_leaf": 80, "l2_regularization": 50},
)


def tabular_features(features: Sequence[str]) -> Any:
    """Return feature strings [N] as a DataFrame: numbers as float (Unknown: NaN), words as category."""
    import pandas as pd

    frame = pd.DataFrame([parse_features(text) or {"text": text} for text in features])
    for column in frame:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        is_number = column in PLAUSIBLE or numbers.notna().mean() > 0.5
        words = frame[column].fillna(UNKNOWN)
        rare = ~words.isin(words.value_counts().index[:200])  # gradient boosting takes 255 categories at most
        frame[column] = numbers.astype(float) if is_number else words.mask(rare, "other").astype("category")
    return frame.dropna(axis="columns", how="all")  # gradient boosting cannot bin a column without a value


def gradient_boosting(seed: int = 0, settings: dict[str, Any] = BOOSTING_SETTINGS[0]) -> Any:
    """Return scikit-learn's gradient boosting, not yet fitted; by default with the published ceiling's settings."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=seed, **settings)


def logistic_regression() -> Any:
    """Return the simple baseline, not yet fitted, for a DataFrame of `tabular_features`."""
    import pandas as pd
    from sklearn.compose import make_column_selector, make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    columns = make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (OneHotEncoder(handle_unknown="ignore"), make_column_selector(dtype_include=pd.CategoricalDtype)),
    )
    return make_pipeline(columns, LogisticRegression(max_iter=2000))


def chosen_boosting(
    frame: Any, answers: np.ndarray, groups: Sequence[str], weights: np.ndarray, seed: int
) -> tuple[Any, np.ndarray]:
    """Return (model, not yet fitted, and its cross-fitted probabilities [rows, labels]) of the BOOSTING_SETTINGS with
    the lowest NLL of the answers [rows] of other `groups` (customers), in 5 folds. Raises InputError for too few."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    for k, label in enumerate(LABELS):
        customers = len({group for group, answer in zip(groups, answers, strict=True) if answer == k})
        if customers < 5:
            need = "at least 5 of each label are needed for cross-fitting (six in ten customers are for training)"
            raise InputError(f"{customers} training customers are {label}; {need}")
    tried = []
    how = {"groups": groups, "method": "predict_proba", "params": {"sample_weight": weights}}
    for settings in BOOSTING_SETTINGS:
        model, folds = gradient_boosting(seed, settings), StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        with threadpool_limits(1):  # threads that wait for each other take minutes next to other work
            probabilities = cross_val_predict(model, frame, answers, cv=folds, **how)
        tried.append((log_loss(answers, probabilities, sample_weight=weights), model, probabilities))
    return min(tried, key=lambda one: one[0])[1:]


def tabular_teacher(rows: Sequence[CreditRow], labelled: Sequence[bool], seed: int) -> np.ndarray:
    """Return class probabilities [rows, labels] by gradient boosting under equal class weights.
    Each row's model never saw its customer: cross-fitted over the `labelled` rows, and one model of all of these for
    the others, whose labels are not used. Raises InputError where there are too few customers for five folds."""
    import numpy as np
    from sklearn.utils.class_weight import compute_sample_weight
    from threadpoolctl import threadpool_limits

    seen = np.flatnonzero(labelled)
    if not len(seen):
        raise InputError("no training row has a label that may be used; raise --gold_share, or give more rows")
    groups = [rows[i].customer for i in seen]
    answers = np.array([LABELS.index(rows[i].label) for i in seen])
    frame = tabular_features([row.features for row in rows])
    weights = compute_sample_weight("balanced", answers)
    probabilities = np.empty((len(rows), len(LABELS)))
    model, probabilities[seen] = chosen_boosting(frame.iloc[seen], answers, groups, weights, seed)
    if len(others := np.flatnonzero(~np.asarray(labelled, dtype=bool))):
        with threadpool_limits(1):
            model.fit(frame.iloc[seen], answers, sample_weight=weights)
        probabilities[others] = model.predict_proba(frame.iloc[others])
    return probabilities


def simple_baselines(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracies that a teacher has to exceed: of the most frequent answer and, for CreditMix prompts, of
    cross-validated logistic regression, with rows of one occupation and income, mostly one customer's, in one fold."""
    from sklearn.metrics import accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    counts = Counter(answers)
    result = {"majority": max(counts.values()) / len(answers)}
    features = [prompt.rpartition("\n")[2] for prompt in prompts]
    fields = [parse_features(text) or {} for text in features]
    if all(row.keys() & CREDIT_FIELDS for row in fields) and min(counts.values()) >= 5 and len(counts) > 1:
        same = ("Occupation", "Annual Income")
        customers = [" ".join(row.get(name, "") for name in same).strip() or str(row) for row in fields]
        if len(set(customers)) >= 5:
            frame, folds = tabular_features(features), StratifiedGroupKFold(5, shuffle=True, random_state=0)
            parts = list(folds.split(frame, answers, customers))
            if all(len({answers[i] for i in train}) > 1 for train, _ in parts):  # one label alone teaches nothing
                predicted = cross_val_predict(logistic_regression(), frame, list(answers), cv=parts)
                result["logistic regression"] = accuracy_score(answers, predicted)
    return result
