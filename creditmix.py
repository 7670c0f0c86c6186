"""CreditMix: raw rows to canonical feature strings, prompts and labels; used by prepare, eval, infer and the server.

Apart from common.py because it knows one task. Everything that turns a feature string into what the model sees is
here once, so that a request meets what was trained.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import BASE, Calibration, LabelScorer, PromptEncoder, label_prior, read_verbalizers, with_shares
from files import InputError, hash_share, number_or_auto, parse_json, read_jsonl, read_text
from models import (
    adapter_config,
    add_adapters,
    add_loading_flags,
    calibration_path,
    check_model_name,
    dtype_name,
    load_model,
    model_fingerprint,
    read_fitted,
)
from processes import gather, own_share, rank_and_world

LABELS = ("Good", "Standard", "Bad")
CALIBRATIONS = ("none", "contextual", "batch", "fitted", "auto")
UNKNOWN = "Unknown"
CSV_COLUMNS = {
    "Age": "Age",
    "Occupation": "Occupation",
    "Annual_Income": "Annual Income",
    "Outstanding_Debt": "Outstanding Debt",
    "Credit_Utilization_Ratio": "Credit Utilization Ratio",
    "Payment_Behaviour": "Payment Behaviour",
}
CREDIT_FIELDS = tuple(CSV_COLUMNS.values())
# Outside these ranges a value is an entry error of the published data (ages of -500 and 8000, incomes of 24 million).
PLAUSIBLE = {
    "Age": (1, 110),
    "Annual Income": (0, 1_000_000),
    "Outstanding Debt": (0, 1_000_000),
    "Credit Utilization Ratio": (0, 100),
}
# Digits that go on after a comma or point in a way that is no number ("12,53,000") are left alone.
_NUMBER = re.compile(r"(?<![\d.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![.,]?\d)")


def canonical_number(value: float) -> str:
    """Three significant digits, no exponent, whole from 10 up: 19114.12 -> 19100, 35.27 -> 35, 0.3503 -> 0.35."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 10:
        rounded = float(round(rounded))
    return str(int(rounded)) if rounded.is_integer() else f"{rounded:.12f}".rstrip("0").rstrip(".")


def _short(digits: str) -> str:
    """A number written in a text in canonical form; as it is where it is too large for a float."""
    number = float(digits.replace(",", ""))
    return canonical_number(number) if math.isfinite(number) else digits


def clean_field(field: str, value: str, notes: Counter | None = None) -> str:
    """One value in canonical form; `Unknown` where the published data's marks stand for a missing value.

    `notes`, if given, counts what was changed (beyond rounding), by a description for people.
    """
    note = (lambda text: notes.update([text])) if notes is not None else (lambda text: None)
    text = value.strip()
    bare = text.strip("_ $€£%" if field in PLAUSIBLE else "_ ")
    if bare in ("", "!@9#%8", "NM", "nan", "NaN", UNKNOWN):
        if bare != UNKNOWN:
            note(f"{field}: missing ({text or 'empty'}) -> {UNKNOWN}")
        return UNKNOWN
    if not _NUMBER.fullmatch(bare):
        if field in PLAUSIBLE:
            note(f"{field}: not a number -> {UNKNOWN}")
            return UNKNOWN
        return text
    number = float(bare.replace(",", ""))
    low, high = PLAUSIBLE.get(field, (-math.inf, math.inf))
    if not low <= number <= high or not math.isfinite(number):
        note(f"{field}: outside {low:g}..{high:g} -> {UNKNOWN}")
        return UNKNOWN
    if bare != text:
        note(f"{field}: stray {text[0] if text[0] in '_$€£' else text[-1]} removed")
    return canonical_number(number)


def parse_features(text: str) -> dict[str, str] | None:
    """'Age: 23, Occupation: Lawyer' -> {'Age': '23', 'Occupation': 'Lawyer'}; None where it is not such a list.
    A comma may belong to the value of a field of words: 'Occupation: Doctor, retired'."""
    pairs: dict[str, str] = {}
    field = ""
    for part in re.split(r",\s+|,(?=[A-Za-z][\w ]*:)|[;\n][;\s]*", text.strip().rstrip(".,;")):
        key, colon, value = part.partition(":")
        if not colon and part and field in CREDIT_FIELDS and field not in PLAUSIBLE:
            pairs[field] += f", {part.strip()}"
            continue
        if not colon or not key.strip() or len(key) > 60:
            return None
        field = key.strip()
        known = field.replace("_", " ").title()
        field = known if known in CREDIT_FIELDS else field
        pairs[field] = value.strip()
    return pairs


def canonical_features(text: str, notes: Counter | None = None) -> str:
    """The feature string as the models see it in training, evaluation and serving: known fields first, in one order
    and complete (missing: Unknown), numbers in one short form. Text that is no field list keeps its words."""
    pairs = parse_features(text)
    if pairs is None:
        return _NUMBER.sub(lambda match: _short(match[0]), text.strip())
    if any(field in pairs for field in CREDIT_FIELDS):
        pairs = {field: pairs.get(field, UNKNOWN) for field in CREDIT_FIELDS} | pairs
    return ", ".join(f"{field}: {clean_field(field, value, notes)}" for field, value in pairs.items())


def known_fields(text: str) -> list[str]:
    """Those of the six features that a text names."""
    return [field for field in parse_features(text) or {} if field in CREDIT_FIELDS]


def creditmix_prompt(features: str, notes: Counter | None = None) -> str:
    """The user turn for a feature string (made canonical here, so no caller can forget it)."""
    return f"Rate the credit mix of this customer as Good, Standard or Bad.\n{canonical_features(features, notes)}"


# Content-free inputs after Zhao et al. 2021 (Calibrate Before Use): what the template alone makes the model say.
NULL_FEATURES = (
    ", ".join(f"{field}: {UNKNOWN}" for field in CREDIT_FIELDS),
    "N/A",
    "[MASK]",
    UNKNOWN,
    "-",
    ", ".join(f"{field}: -" for field in CREDIT_FIELDS),
    "...",
)


def null_prompts(count: int = len(NULL_FEATURES)) -> list[str]:
    """User turns without content, for the prior. They go past the clean-up that would make some of them equal."""
    if not 1 <= count <= len(NULL_FEATURES):
        raise InputError(f"--null_prompts {count}: 1 to {len(NULL_FEATURES)} are available")
    head = creditmix_prompt("x").removesuffix("x")
    return [head + text for text in NULL_FEATURES[:count]]


@dataclass(frozen=True)
class CreditRow:
    """One labelled customer-month: canonical feature string, label in LABELS, and the key that the split hashes."""

    customer: str
    features: str
    label: str


def _customer_id(value: Any) -> str:
    """One spelling of a customer, who would else stand on two sides of the split: ' 17', 17 and 17.0 are '17'."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _cell(field: str, value: str) -> str:
    """A CSV cell without what would begin another field of a feature string."""
    value = re.sub(r"[:;\r\n]+", " ", value)
    return re.sub(r",\s+", ",", value) if field in PLAUSIBLE else value


def _raw_creditmix(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(where, customer or '', feature string, label) of each row of a CSV, JSON list or JSONL file."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        missing = [
            name for name in (*CSV_COLUMNS, "Credit_Mix", "Customer_ID") if name not in (reader.fieldnames or [])
        ]
        if missing:
            raise InputError(
                f"{path}: column {', '.join(missing)} missing; found {', '.join(reader.fieldnames or [])}"
            )
        twice = [name for name, times in Counter(reader.fieldnames).items() if times > 1 and name in CSV_COLUMNS]
        if twice:
            raise InputError(f"{path}: column {', '.join(twice)} stands there twice; keep one")
        while True:
            where = f"{path}: line {reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{where}: {error}; is a quotation mark not closed?") from None
            if None in row or None in row.values():
                raise InputError(f"{where} has another number of cells than the header")
            features = ", ".join(f"{field}: {_cell(field, row[column])}" for column, field in CSV_COLUMNS.items())
            yield where, _customer_id(row["Customer_ID"]), features, row["Credit_Mix"]
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except ValueError as error:
            raise InputError(f"{path}: not a JSON list ({error})") from None
        named = [(f"{path}: item {number}", row) for number, row in enumerate(rows)]
    else:
        rows = read_jsonl(path, ("question", "answer"))
        named = [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]
    for where, row in named:
        for field in ("question", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(f'{where} needs "question" and "answer" as strings, found {json.dumps(row)[:80]}')
        yield where, _customer_id(row.get("customer_id")), row["question"], row["answer"]


def read_creditmix(path: str | Path) -> tuple[list[CreditRow], Counter]:
    """Cleaned, labelled rows of a raw CreditMix file (Kaggle CSV, JSON list or JSONL) and counts of what was cleaned.

    An unknown label (`_`) is filled from the customer's other rows where they agree, else the row is dropped. A row
    without a customer id is its own customer, keyed by its canonical text. Raises InputError (file, line, found).
    """
    notes: Counter = Counter()
    raw = []
    for where, customer, question, answer in _raw_creditmix(Path(path)):
        features = canonical_features(question, notes)
        label = answer.strip()
        if label not in LABELS and label.strip("_"):
            raise InputError(f"{where}: unknown label {label!r}; expected {', '.join(LABELS)} or _")
        raw.append((customer or features, features, label if label in LABELS else None))
    known: dict[str, set[str]] = defaultdict(set)
    for customer, _, label in raw:
        if label:
            known[customer].add(label)
    rows = []
    for customer, features, label in raw:
        if label is None:
            filled = len(known[customer]) == 1
            notes["label _: filled from the customer's other rows" if filled else "label _: row dropped"] += 1
            if not filled:
                continue
            label = next(iter(known[customer]))
        rows.append(CreditRow(customer, features, label))
    if not rows:
        raise InputError(f"{path}: no labelled rows")
    return rows, notes


def gold_share(text: str) -> float:
    """argparse type of --gold_share."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share above 0 and at most 1")
    return float(text)


def gold_known(row: CreditRow, args: Any) -> bool:
    """Whether --gold_share lets the row's label be used: it picks the same customers in every script, and a larger
    share has all those of a smaller one."""
    return args.gold_share == 1 or hash_share(f"gold {row.customer}", args.split_seed) < args.gold_share


def balanced_sample(rows: Sequence[CreditRow], per_class: int, seed: int) -> list[CreditRow]:
    """`per_class` rows of each label, shuffled. Raises InputError where a class has fewer."""
    rng = random.Random(seed)
    chosen = []
    for label in LABELS:
        members = [row for row in rows if row.label == label]
        if len(members) < per_class:
            raise InputError(f"{per_class} rows a class asked for, but only {len(members)} are {label}")
        chosen += rng.sample(members, per_class)
    rng.shuffle(chosen)
    return chosen


def tabular_features(features: Sequence[str]) -> Any:
    """Feature strings [N] as a DataFrame for tabular models: numbers as float (Unknown: NaN), words as category."""
    import pandas as pd

    frame = pd.DataFrame([parse_features(text) or {"text": text} for text in features])
    for column in frame:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        is_number = column in PLAUSIBLE or numbers.notna().mean() > 0.5
        words = frame[column].fillna(UNKNOWN)
        rare = ~words.isin(words.value_counts().index[:200])  # gradient boosting takes 255 categories at most
        frame[column] = numbers.astype(float) if is_number else words.mask(rare, "other").astype("category")
    return frame.dropna(axis="columns", how="all")  # gradient boosting cannot bin a column without a value


# The published ceiling's settings, then two that give way to the data less. The first overfits where few labels are
# known: with 1,508 of the embedded rows its cross-fitted negative log-likelihood is 1.16, that of the last 0.64.
BOOSTING_SETTINGS = (
    {"learning_rate": 0.05, "max_iter": 150, "max_leaf_nodes": 15},
    {"learning_rate": 0.05, "max_iter": 80, "max_leaf_nodes": 7, "min_samples_leaf": 60, "l2_regularization": 10},
    {"learning_rate": 0.03, "max_iter": 100, "max_leaf_nodes": 5, "min_samples_leaf": 80, "l2_regularization": 50},
)


def gradient_boosting(seed: int = 0, settings: dict[str, Any] = BOOSTING_SETTINGS[0]) -> Any:
    """The tabular ceiling: scikit-learn's gradient boosting, by default with the settings of the published one."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=seed, **settings)


def chosen_boosting(
    frame: Any, answers: np.ndarray, groups: Sequence[str], weights: np.ndarray, seed: int
) -> tuple[Any, np.ndarray]:
    """The tabular teacher: (model not yet fitted, its cross-fitted probabilities [rows, labels]) of those of
    BOOSTING_SETTINGS that make the answers [rows] of other `groups` (customers) likeliest, in five folds. Raises
    InputError where there are too few customers for these."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    for k, label in enumerate(LABELS):
        customers = len({group for group, answer in zip(groups, answers, strict=True) if answer == k})
        if customers < 5:
            raise InputError(
                f"{customers} training customers are {label}; at least 5 of each label are needed for cross-fitting "
                "(of all customers six in ten are for training)"
            )
    tried = []
    for settings in BOOSTING_SETTINGS:
        model = gradient_boosting(seed, settings)
        with threadpool_limits(1):  # threads that wait for each other take minutes beside other work
            probabilities = cross_val_predict(
                model,
                frame,
                answers,
                groups=groups,
                cv=StratifiedGroupKFold(5, shuffle=True, random_state=seed),
                method="predict_proba",
                params={"sample_weight": weights},
            )
        tried.append((log_loss(answers, probabilities, sample_weight=weights), model, probabilities))
    return min(tried, key=lambda one: one[0])[1:]


def logistic_regression() -> Any:
    """The simple baseline, on a DataFrame of `tabular_features`."""
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


def tabular_teacher(rows: Sequence[CreditRow], known: Sequence[bool], seed: int) -> np.ndarray:
    """Class probabilities [rows, labels] by gradient boosting under equal class weights, each row's by a model that
    never saw its customer: cross-fitted over the `known` rows, and by a model of all of these for the others, whose
    labels are not used. Raises InputError where there are too few customers for five folds."""
    from sklearn.utils.class_weight import compute_sample_weight
    from threadpoolctl import threadpool_limits

    seen = np.flatnonzero(known)
    if not len(seen):
        raise InputError("no training row has a label that may be used; raise --gold_share, or give more rows")
    groups = [rows[i].customer for i in seen]
    answers = np.array([LABELS.index(rows[i].label) for i in seen])
    frame = tabular_features([row.features for row in rows])
    weights = compute_sample_weight("balanced", answers)
    probabilities = np.empty((len(rows), len(LABELS)))
    model, probabilities[seen] = chosen_boosting(frame.iloc[seen], answers, groups, weights, seed)
    others = np.flatnonzero(~np.asarray(known, dtype=bool))
    if len(others):
        with threadpool_limits(1):
            model.fit(frame.iloc[seen], answers, sample_weight=weights)
        probabilities[others] = model.predict_proba(frame.iloc[others])
    return probabilities


def simple_baselines(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy of the most frequent answer, and of a cross-validated logistic regression where the prompts are
    CreditMix prompts: what a teacher has to beat. Rows of one occupation and income, which are mostly one customer's,
    stay in one fold, as prompts name no customer."""
    from sklearn.metrics import accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    counts = Counter(answers)
    result = {"majority": max(counts.values()) / len(answers)}
    features = [prompt.rpartition("\n")[2] for prompt in prompts]
    if all(known_fields(text) for text in features) and min(counts.values()) >= 5 and len(counts) > 1:
        fields = [parse_features(text) for text in features]
        same = ("Occupation", "Annual Income")
        customers = [" ".join(row.get(name, "") for name in same).strip() or str(row) for row in fields]
        if len(set(customers)) >= 5:
            frame, folds = tabular_features(features), StratifiedGroupKFold(5, shuffle=True, random_state=0)
            parts = list(folds.split(frame, answers, customers))
            if all(len({answers[i] for i in train}) > 1 for train, _ in parts):  # of one label nothing is learnt
                predicted = cross_val_predict(logistic_regression(), frame, list(answers), cv=parts)
                result["logistic regression"] = accuracy_score(answers, predicted)
    return result


# ---------------------------------------------------------------------------------------------------- using a model


def add_scoring_flags(parser: Any) -> None:
    """Flags of every script that scores CreditMix rows."""
    add = parser.add_argument_group("scoring").add_argument
    add(
        "--calibration",
        choices=CALIBRATIONS,
        default="auto",
        help="of the scores; auto, the default: what eval_creditmix.py --fit stored, else contextual",
    )
    add("--class_shares", metavar="LABEL=P,...", help="shares in the field, such as Good=0.25,Standard=0.45,Bad=0.30")
    add("--abstain_below", type=float, metavar="P", help="refer rows to a human whose label has a lower probability")
    add("--bias", metavar="LABEL=B,...", help="add to calibrated scores, such as Standard=0.3 (default: none)")
    add(
        "--null_prompts", type=int, default=len(NULL_FEATURES), help="content-free prompts for the prior (%(default)s)"
    )
    add("--verbalizers", metavar="FILE", help='JSON {"Standard": ["Standard", "Average"]}: surface forms of labels')
    add("--aggregate", choices=("max", "mean", "logsumexp"), default="max", help="of surface forms (%(default)s)")
    batch = "rows a forward, or auto: the fastest is found on the rows themselves, from 256 on (%(default)s)"
    add("--batch_size", type=number_or_auto, default=32, help=batch)
    add_loading_flags(parser)


def parse_label_numbers(text: str | None, flag: str = "--bias") -> dict[str, float]:
    """'Standard=0.3,Bad=-0.1' -> {'Standard': 0.3, 'Bad': -0.1}. Raises InputError."""
    pairs = {}
    for part in (text or "").split(",") if text else []:
        label, _, number = part.partition("=")
        try:
            pairs[label.strip()] = float(number)
        except ValueError:
            raise InputError(f"{flag} {text}: {part!r} is not LABEL=NUMBER") from None
        if label.strip() not in LABELS or not math.isfinite(pairs[label.strip()]):
            raise InputError(f"{flag} {text}: labels are {', '.join(LABELS)}, numbers finite")
    return pairs


def class_shares(args: Any) -> np.ndarray | None:
    """Shares [labels] in the field that the flags give, None where they give none. Raises InputError."""
    if not args.class_shares:
        return None
    given = parse_label_numbers(args.class_shares, "--class_shares")
    shares = np.array([given.get(label, 0.0) for label in LABELS])
    if (shares <= 0).any() or abs(shares.sum() - 1) > 0.01:
        raise InputError(f"--class_shares {args.class_shares}: a share above 0 for each label, 1 together")
    return shares / shares.sum()


def check_scoring_flags(args: Any) -> tuple[dict[str, list[str]], np.ndarray, list[str]]:
    """(surface forms of labels, bias [labels], content-free user turns) of the scoring flags. Raises InputError."""
    forms = read_verbalizers(args.verbalizers, LABELS)
    given = parse_label_numbers(args.bias)
    if args.batch_size != "auto" and args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: at least 1")
    if args.abstain_below is not None and not 0 < args.abstain_below <= 1:
        raise InputError(f"--abstain_below {args.abstain_below}: a probability above 0")
    class_shares(args)
    return forms, np.array([given.get(label, 0.0) for label in LABELS]), null_prompts(args.null_prompts)


def scoring_settings(args: Any) -> dict[str, Any]:
    """What decides raw scores and priors beside the model: a calibration fits no other settings."""
    return {
        "forms": check_scoring_flags(args)[0],
        "aggregate": args.aggregate,
        "null_prompts": args.null_prompts,
        "quantization": args.quantization,
        "compute_dtype": dtype_name(args.compute_dtype),
    }


def fitted_calibration(model_dir: str, args: Any) -> dict | None:
    """The stored calibration that `args.calibration` asks for, None where another is to be used. Raises InputError."""
    if args.calibration in ("none", "contextual"):
        return None
    stored = read_fitted(model_dir, scoring_settings(args))
    if args.calibration != "auto" and (stored or {}).get("calibration") != args.calibration:
        raise InputError(
            f"{calibration_path(model_dir)}: no {args.calibration} one there; "
            f"eval_creditmix.py --fit --calibration {args.calibration} makes it"
        )
    return stored


def unfitted_note(model_dir: str, fitted: dict | None, args: Any) -> str | None:
    """What to tell whoever uses an adapter without a stored calibration and chose none: training moves the scores away
    from what the prior of content-free prompts corrects (docs/results/creditmix/README.md)."""
    if args.calibration != "auto" or fitted or not adapter_config(model_dir):
        return None
    return (
        f"{model_dir} has no stored calibration: the prior of content-free prompts is subtracted, which fits trained "
        "models badly; store the likeliest with eval_creditmix.py --fit --calibration auto, or give --calibration none"
    )


def adjusted(calibration: Calibration, args: Any) -> Calibration:
    """With what --bias and --class_shares add."""
    calibration = replace(calibration, bias=calibration.bias + check_scoring_flags(args)[1])
    shares = class_shares(args)
    return calibration if shares is None else with_shares(calibration, shares)


def credit_scorer(model: Any, tokenizer: Any, args: Any, adapters: Sequence[str] = ()) -> LabelScorer:
    """The scorer of CreditMix prompts, with the beginning that all of them share run once."""
    forms, _, _ = check_scoring_flags(args)
    shared = [creditmix_prompt("Age: 1"), creditmix_prompt("-")]
    return LabelScorer(model, PromptEncoder(tokenizer), forms, args.aggregate, args.batch_size, shared, adapters)


def check_unchanged(model_dir: str, fingerprint: str) -> None:
    """Raises InputError where a model was replaced while it was loaded: its prior would be stored as the new one's."""
    if model_fingerprint(model_dir) != fingerprint:
        raise InputError(f"{model_dir}: changed while it was loaded; start again when its training has ended")


@dataclass
class CreditModel:
    """A loaded model with its scorer and calibration: the same object in infer, eval and the server."""

    name: str
    scorer: LabelScorer
    calibration: Calibration
    adapter: str | None = None
    abstain_below: float | None = None

    @classmethod
    def load(cls, model_dir: str, args: Any) -> CreditModel:
        """Load a base, folder or adapter with the flags of `add_scoring_flags`. Raises InputError."""
        check_scoring_flags(args)
        check_model_name(model_dir)
        fitted = fitted_calibration(model_dir, args)
        if (note := unfitted_note(model_dir, fitted, args)) and rank_and_world()[0] == 0:
            print(f"note: {note}", file=sys.stderr)
        before = model_fingerprint(model_dir)
        model, tokenizer = load_model(model_dir, args.quantization, args.compute_dtype, args.offload_folder)
        check_unchanged(model_dir, before)
        return cls._calibrated(model_dir, before, credit_scorer(model, tokenizer, args), fitted, args)

    @classmethod
    def load_variants(
        cls, base: str, folders: dict[str, str], fitted: dict[str, dict | None], args: Any
    ) -> dict[str, CreditModel]:
        """{'base': ..., variant: ...}: one loaded base and scorer, the adapters in `folders` on top of it.

        fitted: `fitted_calibration` of each, read before anything is loaded."""
        names = {"base": base} | folders
        before = {variant: model_fingerprint(name) for variant, name in names.items()}
        model, tokenizer = load_model(base, args.quantization, args.compute_dtype, args.offload_folder)
        adapters: dict[str, str | None] = {"base": BASE if folders else None}
        adapters |= {variant: variant for variant in folders}
        model = add_adapters(model, folders) if folders else model
        scorer = credit_scorer(model, tokenizer, args, list(adapters.values()) if folders else [])
        for variant, name in names.items():
            check_unchanged(name, before[variant])
        return {
            variant: cls._calibrated(names[variant], before[variant], scorer, fitted[variant], args, adapter)
            for variant, adapter in adapters.items()
        }

    @classmethod
    def _calibrated(
        cls,
        name: str,
        fingerprint: str,
        scorer: LabelScorer,
        fitted: dict | None,
        args: Any,
        adapter: str | None = None,
    ) -> CreditModel:
        zero = np.zeros(len(LABELS))
        if fitted:
            prior, bias = (np.array([fitted[key][label] for label in LABELS]) for key in ("prior", "bias"))
            used = Calibration(fitted["calibration"], prior, bias, fitted["temperature"])
        elif args.calibration == "none":
            used = Calibration("none", zero, zero)
        else:
            key = f"{fingerprint} {args.quantization} {dtype_name(args.compute_dtype)}"
            turns = check_scoring_flags(args)[2]
            used = Calibration("contextual", label_prior(scorer, key, turns, adapter), zero)
        return cls(name, scorer, adjusted(used, args), adapter, args.abstain_below)

    def settings(self) -> dict[str, Any]:
        """What decides its answers beyond flags and weights: contents of files that flags or folders name."""
        used = self.calibration
        return {
            "forms": self.scorer.forms,
            "calibration_used": [used.method, used.bias.tolist(), used.temperature],
        }

    def prompt(self, features: str, notes: Counter | None = None) -> list[int]:
        """Token ids of a feature string's prompt; `notes` counts what `canonical_features` repaired in it."""
        return self.scorer.encoder.prompt(creditmix_prompt(features, notes))

    def raw_scores(self, features: Sequence[str], progress: str | None = None) -> np.ndarray:
        """Raw scores [N, labels] of feature strings; of several processes each scores its share."""
        share = own_share(len(features))
        prompts = [self.prompt(text) for text in features[share.start : share.stop]]
        return np.concatenate(gather(self.scorer.score(prompts, progress, [self.adapter] * len(prompts))))

    def responses(self, raw: np.ndarray) -> list[dict]:
        """The whitepaper's response (section 7) for each row of raw scores [N, labels]; where --abstain_below is given
        with {"extra": {"refer": whether a human should decide}}."""
        scores, probabilities = self.calibration.scores(raw), self.calibration.probabilities(raw)
        prior = _by_label(self.calibration.prior)
        results = []
        for row_scores, row_raw, row_probabilities in zip(scores, raw, probabilities, strict=True):
            second, best = np.sort(row_scores)[-2:]
            results.append(
                {
                    "model_name": self.name,
                    "prediction": LABELS[int(row_scores.argmax())],
                    "scores": _by_label(row_scores),
                    "raw_scores": _by_label(row_raw),
                    "prior": prior,
                    "probabilities": _by_label(row_probabilities),
                    "top2_margin": round(float(best - second), 6),
                }
            )
            if self.abstain_below is not None:
                results[-1]["extra"] = {"refer": bool(row_probabilities.max() < self.abstain_below)}
        return results


def _by_label(values: np.ndarray) -> dict[str, float]:
    return {label: round(float(value), 6) for label, value in zip(LABELS, values, strict=True)}
