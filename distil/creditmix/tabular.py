"""Tabular models of a task's rows: gradient boosting (ceiling and teacher), logistic regression, baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import InputError
from distil.creditmix.rows import CreditRow
from distil.creditmix.text import group_folds, text_teacher
from distil.features import UNKNOWN
from distil.tasks import Task, default_task

if TYPE_CHECKING:
    import numpy as np

TABLE_BASELINES = ["majority", "logistic regression", "tabular teacher", "gradient boosting"]  # `metrics.baselines`
TEXT_BASELINES = ["majority", "tf-idf"]
SAME_CUSTOMER = ("Occupation", "Annual Income")  # rows with the same are mostly one customer's
# The settings of the published ceiling, then two with more regularisation. The first overfits where few labels are
# known: with 1,508 of the embedded rows its cross-fitted NLL is 1.16, that of the last 0.64.
BOOSTING_SETTINGS = (
    {"learning_rate": 0.05, "max_iter": 150, "max_leaf_nodes": 15},
    {"learning_rate": 0.05, "max_iter": 80, "max_leaf_nodes": 7, "min_samples_leaf": 60, "l2_regularization": 10},
    {"learning_rate": 0.03, "max_iter": 100, "max_leaf_nodes": 5, "min_samples_leaf": 80, "l2_regularization": 50},
)


def baseline_names(task: Task) -> list[str]:
    """Return the names of a task's baselines; the last is the strongest of them."""
    return TEXT_BASELINES if task.text_column else TABLE_BASELINES


def tabular_features(features: Sequence[str], task: Task) -> Any:
    """Return feature strings [N] of a table task as a DataFrame: numbers as float (Unknown: NaN), words as category.
    What is no field of the task is a number where most of its values are."""
    import pandas as pd

    frame = pd.DataFrame([task.parse(text) or {"text": text} for text in features])
    for column in frame:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        field = task.by_name.get(column)
        is_number = field.kind == "number" if field else numbers.notna().mean() > 0.5
        words = frame[column].fillna(UNKNOWN)
        rare = ~words.isin(words.value_counts().index[:200])  # gradient boosting takes 255 categories at most
        frame[column] = numbers.astype(float) if is_number else words.mask(rare, "other").astype("category")
    return frame.dropna(axis="columns", how="all")


def gradient_boosting(seed: int = 0, settings: dict[str, Any] = BOOSTING_SETTINGS[0]) -> Any:
    """Return scikit-learn's gradient boosting, not yet fitted; by default with the published ceiling's settings."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    class Boosting(HistGradientBoostingClassifier):
        def fit(self, frame: Any, answers: Any, sample_weight: Any = None) -> Any:
            # It cannot bin a column without a value, such as a rare field in one fold; zeros alone split nothing.
            empty = dict.fromkeys(frame.columns[frame.isna().all()], 0.0)
            return super().fit(frame.fillna(empty), answers, sample_weight)

    return Boosting(categorical_features="from_dtype", random_state=seed, **settings)


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
    frame: Any, answers: np.ndarray, folds: Sequence[tuple], weights: np.ndarray, seed: int
) -> tuple[Any, np.ndarray]:
    """Return (model, not yet fitted, and its cross-fitted probabilities [rows, labels]) of the BOOSTING_SETTINGS with
    the lowest NLL of the answers [rows] in the `folds` of `group_folds`."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict
    from threadpoolctl import threadpool_limits

    tried = []
    how = {"cv": folds, "method": "predict_proba", "params": {"sample_weight": weights}}
    for settings in BOOSTING_SETTINGS:
        model = gradient_boosting(seed, settings)
        with threadpool_limits(1):  # threads that wait for each other take minutes next to other work
            probabilities = cross_val_predict(model, frame, answers, **how)
        tried.append((log_loss(answers, probabilities, sample_weight=weights), model, probabilities))
    return min(tried, key=lambda one: one[0])[1:]


def check_groups(groups: Sequence[str], answers: np.ndarray, task: Task) -> None:
    """Raise InputError where a label has too few groups (customers) for five folds. answers: label indices [rows]."""
    owned: dict[str, set[str]] = {label: set() for label in task.labels}
    for group, answer in zip(groups, answers, strict=True):
        owned[task.labels[answer]].add(group)
    rarest = min(owned, key=lambda label: len(owned[label]))
    if (fewest := len(owned[rarest])) < 5:
        need = "at least 5 of each label are needed for cross-fitting"
        fix = "give more rows, or take the label out of the task"
        raise InputError(f"{fewest} training customers are {rarest}; {need}; {fix}")


def tabular_teacher(rows: Sequence[CreditRow], labelled: Sequence[bool], seed: int, task: Task) -> np.ndarray:
    """Return class probabilities [rows, labels] by gradient boosting, or for texts TF-IDF with logistic regression;
    under equal class weights where the task is balanced.
    Each row's model never saw its customer: cross-fitted over the `labelled` rows, and one model of all of these for
    the others, whose labels are not used. Raises InputError where there are too few customers for five folds."""
    import numpy as np
    from sklearn.utils.class_weight import compute_sample_weight
    from threadpoolctl import threadpool_limits

    seen, others = (np.flatnonzero(np.asarray(labelled, dtype=bool) == known) for known in (True, False))
    if not len(seen):
        raise InputError("no training row has a label that may be used; raise --gold_share, or give more rows")
    groups = [rows[i].customer for i in seen]
    answers = np.array([task.labels.index(rows[i].label) for i in seen])
    check_groups(groups, answers, task)
    weights = compute_sample_weight("balanced" if task.balanced else None, answers)
    probabilities = np.empty((len(rows), len(task.labels)))
    if task.text_column:
        texts = [[rows[i].features for i in part] for part in (seen, others)]
        probabilities[seen], probabilities[others] = text_teacher(texts[0], answers, groups, weights, texts[1], seed)
        return probabilities
    frame = tabular_features([row.features for row in rows], task)
    folds = group_folds(answers, groups, seed, grouped=task.group_column is not None)
    model, probabilities[seen] = chosen_boosting(frame.iloc[seen], answers, folds, weights, seed)
    if len(others):
        with threadpool_limits(1):
            model.fit(frame.iloc[seen], answers, sample_weight=weights)
        probabilities[others] = model.predict_proba(frame.iloc[others])
    return probabilities


def simple_baselines(prompts: Sequence[str], answers: Sequence[str], task: Task | None = None) -> dict[str, float]:
    """Return the accuracies that a teacher has to exceed: of the most frequent answer and, for prompts of a table task
    (None: CreditMix), of cross-validated logistic regression on the feature string, their last line. Rows of one
    occupation and income, mostly one customer's, are in one fold; of tasks without these fields, equal rows."""
    import numpy as np
    from sklearn.metrics import accuracy_score
    from sklearn.model_selection import cross_val_predict

    task, counts = task or default_task(), Counter(answers)
    result = {"majority": max(counts.values()) / len(answers)}
    features = [prompt.rpartition("\n")[2] for prompt in prompts]
    fields = [_fields(text, task) for text in features]
    if all(row.keys() & task.by_name for row in fields) and min(counts.values()) >= 5 and len(counts) > 1:
        customers = [" ".join(row.get(name, "") for name in SAME_CUSTOMER).strip() or str(row) for row in fields]
        if len(set(customers)) >= 5:
            frame, grouped = tabular_features(features, task), task.group_column is not None
            parts = group_folds(np.array(answers), customers, 0, grouped)
            if all(len({answers[i] for i in train}) > 1 for train, _ in parts):  # one label alone teaches nothing
                predicted = cross_val_predict(logistic_regression(), frame, list(answers), cv=parts)
                result["logistic regression"] = accuracy_score(answers, predicted)
    return result


def _fields(text: str, task: Task) -> dict[str, str]:
    """Return the fields of a feature string; none of other text."""
    try:
        return task.parse(text) or {}
    except InputError:  # a name that occurs twice, as in a dialogue
        return {}
