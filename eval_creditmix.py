"""Measure CreditMix models on balanced validation rows of customers that no training saw.

Departures from a plain accuracy script: intervals come from resampling customers (a customer's months are alike),
probabilities are measured as well as labels, and `--fit` finds bias and temperature on calibration customers only.

    python eval_creditmix.py --model_dir runs/creditmix_sft --val_per_class 1500 --fit --baselines
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import (
    Calibration,
    cross_fitted_probabilities,
    fit_calibration,
    fit_shares,
    likeliest,
    row_losses,
)
from creditmix import (
    LABELS,
    CreditModel,
    CreditRow,
    add_scoring_flags,
    adjusted,
    balanced_sample,
    class_shares,
    gold_known,
    gold_share,
    gradient_boosting,
    logistic_regression,
    read_creditmix,
    scoring_settings,
    tabular_features,
    tabular_teacher,
)
from files import (
    InputError,
    check_folder,
    file_sha256,
    read_json,
    run_script,
    seed_number,
    split_of,
    write_json,
    write_jsonl,
)
from models import (
    adapter_config,
    base_of,
    calibration_path,
    check_model_name,
    local_or_hub,
    model_fingerprint,
    run_record,
)
from processes import rank_and_world

BASELINES = ["majority", "logistic regression", "tabular teacher", "gradient boosting"]
TABLE = ("accuracy", "macro_f1", "recall_Standard")  # what stands in the table with intervals
# What a result holds for each row or resample, and no summary.
ROW_BY_ROW = ("predicted", "responses", "probabilities", "samples", "weights")
FIT_BIAS = {"likelihood": fit_calibration, "halfway": partial(fit_shares, way=0.5), "shares": fit_shares}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models and data").add_argument
    add("--model_dir", nargs="+", required=True, help="base ids, model folders or adapter folders, side by side")
    add(
        "--data",
        default="data/creditmix_dataset.json",
        help="raw rows, as creditmix_prepare.py reads them (%(default)s)",
    )
    add("--val_per_class", type=int, help="validation rows a class (default: as many as the rarest class has)")
    add(
        "--val_frac",
        type=float,
        help="or: share of all rows to validate on, balanced; at most 0.3, the validation part",
    )
    add("--seed", type=seed_number, default=0, help="of the sample and the bootstrap (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the training's own (%(default)s)")
    add = parser.add_argument_group("calibration").add_argument
    add(
        "--fit",
        action="store_true",
        help="fit bias and temperature on calibration rows and write calibration.json; with --calibration another "
        "one, with auto the simplest that is within a standard error of the likeliest",
    )
    add(
        "--fit_bias",
        choices=tuple(FIT_BIAS),
        default="likelihood",
        help="fitted biases: the likeliest, or moved on (all the way or half of it) until each label is predicted as "
        "often as it is right, which finds more of a label that is often second best (%(default)s)",
    )
    add("--fit_per_class", type=int, default=300, help="calibration rows a class at most (%(default)s)")
    add(
        "--gold_share",
        type=gold_share,
        default=1.0,
        help="share of customers whose label --fit and --baselines may use (%(default)s)",
    )
    add = parser.add_argument_group("report").add_argument
    add(
        "--baselines",
        action="store_true",
        help="add majority, logistic regression, the tabular teacher and gradient boosting",
    )
    add("--reference", help="whom the others are compared with, row by row (default: gradient boosting or the first)")
    add("--report_dir", help="write metrics.json, predictions.jsonl and plots there")
    add("--bootstrap", type=int, default=1000, help="resamples for the 95 %% intervals (%(default)s)")
    add("--json", action="store_true", help="print one JSON object on standard output, all else on standard error")
    add_scoring_flags(parser)
    parser.set_defaults(calibration=None)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def check_training(model_dir: str, args: argparse.Namespace, data_sha256: str) -> None:
    """Refuse an adapter that was trained under another split: its training rows would be in the validation set.
    Say so where it was trained on other rows (whether those have these customers among them cannot be seen), or with
    labels that --gold_share would not let it know."""
    if not adapter_config(model_dir):
        return
    run = run_record(model_dir)
    trained = run.get("split_seed")
    if trained not in (None, args.split_seed):
        raise InputError(
            f"{model_dir}: trained with --split_seed {trained}, evaluated with {args.split_seed}: rows would leak"
        )
    sources = run.get("sources") or [None]
    others = [source["file"] for source in sources if source and source["sha256"] != data_sha256]
    if others or None in sources or trained is None:
        where = f"on rows of {', '.join(others)}, not of --data" if others else "on rows whose source is not recorded"
        print(f"note: {model_dir} was trained {where}; they may be among the validation rows", file=sys.stderr)
    share = run.get("gold_share")
    if args.gold_share < 1 and (share is None or share > args.gold_share):
        known = "a --gold_share that is not recorded" if share is None else f"--gold_share {share:g}"
        print(f"note: {model_dir} was trained with {known}, not {args.gold_share:g}", file=sys.stderr)


def check_fitted(model_dir: str, args: argparse.Namespace, data_sha256: str) -> None:
    """Refuse a stored calibration that was fitted under another split, and say so where it was on other rows or with
    labels that --gold_share would not let it know."""
    path = calibration_path(model_dir)
    stored = read_json(path) if path.is_file() else None
    fitted_on = stored.get("fitted_on") if isinstance(stored, dict) else None
    if not isinstance(fitted_on, dict):
        return
    if fitted_on.get("split_seed") != args.split_seed:
        raise InputError(
            f"{path}: fitted with --split_seed {fitted_on.get('split_seed')}, evaluated with {args.split_seed}: its "
            "rows may be validation rows; fit again with --fit, or use --calibration contextual"
        )
    if fitted_on.get("data_sha256") != data_sha256:
        print(f"note: {path} was fitted on rows of {fitted_on.get('data')}, not of --data", file=sys.stderr)
    if (share := fitted_on.get("gold_share", 1.0)) > args.gold_share:
        print(f"note: {path} was fitted with --gold_share {share:g}, not {args.gold_share:g}", file=sys.stderr)


def usable(rows: Sequence[CreditRow], split: str, args: argparse.Namespace) -> list[CreditRow]:
    """The rows of one split whose labels may be used."""
    part = [row for row in rows if split_of(row.customer, args.split_seed) == split]
    return part if split == "validation" else [row for row in part if gold_known(row, args)]


def draw(rows: Sequence[CreditRow], split: str, per_class: int | None, args: argparse.Namespace) -> list[CreditRow]:
    """A balanced sample of one split; `per_class` None: as many as the rarest class has."""
    pool = usable(rows, split, args)
    counts = Counter(row.label for row in pool)
    try:
        return balanced_sample(pool, per_class or max(1, min(counts[label] for label in LABELS)), args.seed)
    except InputError as error:
        raise InputError(f"{args.data}: {split} rows: {error}") from None


def draw_samples(rows: Sequence[CreditRow], args: argparse.Namespace) -> tuple[list[CreditRow], ...]:
    """(validation, calibration, training) rows, balanced, of customers of that split alone; the last two are empty
    where --fit or --baselines does not ask for them."""
    per_class = max(1, round(args.val_frac * len(rows) / len(LABELS))) if args.val_frac else args.val_per_class
    validation = draw(rows, "validation", per_class, args)
    calibration = draw(rows, "calibration", None, args) if args.fit else []
    if args.fit and len({row.customer for row in calibration}) < 5:
        raise InputError(
            f"{args.data}: --fit needs calibration rows of at least 5 customers; leave it out, or give more"
        )
    if len(calibration) > args.fit_per_class * len(LABELS):
        calibration = draw(rows, "calibration", args.fit_per_class, args)
    return validation, calibration, draw(rows, "train", None, args) if args.baselines else []


def coverage_curve(right: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, accuracy) [N each] where the rows are answered from the surest on and the others referred; of rows
    that are equally sure none comes first, each counts as their mean."""
    _, tied = np.unique(confidence, return_inverse=True)
    right = (np.bincount(tied, right * weights) / np.bincount(tied, weights))[tied]
    order = np.argsort(-confidence, kind="stable")
    answered = weights[order].cumsum()
    return answered / answered[-1], (right * weights)[order].cumsum() / answered


def point_metrics(
    answers: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, float]:
    """Accuracy, macro-F1, recall per label; NLL (natural log), Brier (sum over labels), ECE (15 equal-width bins),
    AURC (mean error rate over all coverages, Geifman and El-Yaniv 2017). Each row counts by its weight, default 1."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

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
    """Accuracy, macro-F1, recalls and mean of the losses (negative log-likelihoods [N]), each [resamples], resampling
    customers with all their rows. In each resample every label counts as much as it does in the rows, which were drawn
    for that: how many of its customers came up is no uncertainty of the model. One seed draws the same customers for
    every model of the same rows, so that differences of two models are paired."""
    index = {customer: i for i, customer in enumerate(dict.fromkeys(customers))}
    size = len(LABELS)
    tables = np.zeros((len(index), size * size))
    lost = np.zeros((len(index), size))
    whose = [index[c] for c in customers]
    np.add.at(tables, (whose, answers * size + predicted), weights)
    np.add.at(lost, (whose, answers), losses * weights)
    shares = tables.sum(axis=0).reshape(size, size).sum(axis=1) / tables.sum()
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=resamples)
    confusion = (times @ tables).reshape(resamples, size, size)
    scale = shares / np.maximum(confusion.sum(axis=2), 1e-9)  # [resamples, size]
    confusion *= scale[:, :, None]
    hits, claimed = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=1)
    f1 = 2 * hits / np.maximum(shares + claimed, 1e-9)
    samples = {"accuracy": hits.sum(axis=1), "macro_f1": f1.mean(axis=1), "nll": (times @ lost * scale).sum(axis=1)}
    return samples | {f"recall_{label}": hits[:, i] / max(shares[i], 1e-9) for i, label in enumerate(LABELS)}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap samples [resamples]."""
    low, high = np.percentile(samples, [2.5, 97.5]).tolist()
    return low, high


def add_differences(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Add to each model how much it is above the reference on the same rows, with paired intervals."""
    for result in results:
        if result is not reference:
            result["difference"] = {"to": reference["model"]} | {
                name: [result[name] - reference[name], *interval(samples - reference["samples"][name])]
                for name, samples in result["samples"].items()
            }


def measure(rows: Sequence[CreditRow], probabilities: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics and intervals of one model's probabilities [N, labels]. With --class_shares the balanced rows are
    weighted so that each label has its share; the probabilities must be for these shares."""
    answers = np.array([LABELS.index(row.label) for row in rows])
    predicted = probabilities.argmax(axis=1)
    shares = class_shares(args)
    weights = np.ones(len(rows)) if shares is None else len(LABELS) * shares[answers]
    customers = [row.customer for row in rows]
    result: dict[str, Any] = point_metrics(answers, predicted, probabilities, weights)
    losses = row_losses(probabilities, answers)
    result["samples"] = bootstrap(answers, predicted, losses, customers, args.bootstrap, args.seed, weights)
    result["interval_95"] = {name: interval(samples) for name, samples in result["samples"].items()}
    result |= {"predicted": [LABELS[i] for i in predicted], "weights": weights}
    if args.abstain_below is not None:
        sure = probabilities.max(axis=1) >= args.abstain_below
        result["abstain"] = {
            "below": args.abstain_below,
            "coverage": float(np.average(sure, weights=weights)),
            "accuracy": float(np.average((predicted == answers)[sure], weights=weights[sure])) if sure.any() else None,
        }
    return result


def calibrators(
    raw: np.ndarray, contextual: np.ndarray, answers: np.ndarray, customers: Sequence[str], fit_bias: str
) -> tuple[dict[str, Calibration], dict[str, np.ndarray]]:
    """({method: calibration}, {method: negative log-likelihoods [N]}) of calibration rows, the simplest first; raw:
    [N, labels]. The fitted one's likelihoods are those of fits that did not see the customer. Batch calibration: the
    shift is the mean raw score of the rows, whatever their labels (Zhou et al. 2023)."""
    zero = np.zeros(len(LABELS))
    found = {
        "none": Calibration("none", zero, zero),
        "contextual": Calibration("contextual", contextual, zero),
        "batch": Calibration("batch", raw.mean(axis=0), zero),
    }
    losses = {name: row_losses(c.probabilities(raw), answers) for name, c in found.items()}
    method = FIT_BIAS[fit_bias]
    found["fitted"] = method(raw, contextual, answers)
    losses["fitted"] = row_losses(cross_fitted_probabilities(raw, contextual, answers, customers, method), answers)
    return found, losses


def fit(
    model: CreditModel, model_dir: str, rows: list[CreditRow], args: argparse.Namespace
) -> tuple[Calibration, dict[str, Calibration]]:
    """Find the calibration on calibration rows and store it; returns it and all that were compared. model: with the
    contextual calibration and no bias."""
    raw = model.raw_scores([row.features for row in rows], "calibration rows")
    answers = np.array([LABELS.index(row.label) for row in rows])
    customers = [row.customer for row in rows]
    found, losses = calibrators(raw, model.calibration.prior, answers, customers, args.fit_bias)
    chosen = found[likeliest(losses, customers) if args.calibration == "auto" else args.calibration]
    nll = {name: float(loss.mean()) for name, loss in losses.items()}
    if rank_and_world()[0]:
        return chosen, found
    shown = ", ".join(f"{name} {value:.4f}" for name, value in nll.items())
    print(f"{model_dir}: likelihood on calibration rows: {shown} -> {chosen.method}", file=sys.stderr)
    digest = hashlib.sha256(json.dumps([[row.features, row.label] for row in rows]).encode()).hexdigest()
    path = calibration_path(model_dir)
    write_json(
        path,
        {
            "calibration": chosen.method,
            "prior": dict(zip(LABELS, chosen.prior.tolist(), strict=True)),
            "bias": dict(zip(LABELS, chosen.bias.tolist(), strict=True)),
            "temperature": chosen.temperature,
            "nll": nll,
            "labels": list(LABELS),
            "model": model_fingerprint(model_dir),
            **scoring_settings(args),
            "fitted_on": {
                "rows": len(rows),
                "sha256": digest,
                "data": args.data,
                "data_sha256": file_sha256(args.data),
                "split_seed": args.split_seed,
                "bias": args.fit_bias,
                "gold_share": args.gold_share,
            },
        },
    )
    print(f"wrote {path}", file=sys.stderr)
    return chosen, found


def evaluate_model(
    model_dir: str, rows: list[CreditRow], calibration_rows: list[CreditRow], args: argparse.Namespace
) -> dict[str, Any]:
    """Score one model once and measure it under each calibration that it has."""
    if args.fit:
        plain = {"calibration": "contextual", "bias": None, "class_shares": None}
        model = CreditModel.load(model_dir, argparse.Namespace(**vars(args) | plain))
        chosen, choices = fit(model, model_dir, calibration_rows, args)
        model = replace(model, calibration=adjusted(chosen, args))
    else:
        model = CreditModel.load(model_dir, args)
        zero = np.zeros(len(LABELS))
        choices = {"none": Calibration("none", zero, zero)}
    raw = model.raw_scores([row.features for row in rows], model_dir)
    used = model.calibration
    choices = {name: adjusted(choice, args) for name, choice in choices.items()} | {used.method: used}
    compared = {name: measure(rows, choice.probabilities(raw), args) for name, choice in choices.items()}
    result = compared[used.method] | {
        "model": model_dir,
        "calibration": used.method,
        "responses": model.responses(raw),
    }
    result["calibrations"] = {
        name: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for name, metrics in compared.items()
    }
    result["probabilities"] = used.probabilities(raw)
    return result


def baselines(
    train: list[CreditRow], pool: list[CreditRow], rows: list[CreditRow], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Majority, logistic regression and gradient boosting (the ceiling), trained on the balanced training rows; the
    tabular teacher on the `pool` that these were drawn from, as it labels KD rows."""
    from sklearn.dummy import DummyClassifier
    from threadpoolctl import threadpool_limits

    frame = tabular_features([row.features for row in train + rows])
    answers = np.array([LABELS.index(row.label) for row in train])
    models = {
        "majority": DummyClassifier(strategy="prior"),
        "logistic regression": logistic_regression(),
        "gradient boosting": gradient_boosting(args.seed),
    }
    results = []
    for name in BASELINES:
        if name == "tabular teacher":
            known = [True] * len(pool) + [False] * len(rows)
            probabilities = tabular_teacher([*pool, *rows], known, args.seed)[len(pool) :]
        else:
            with threadpool_limits(1):  # as in `tabular_teacher`
                models[name].fit(frame[: len(train)], answers)
            probabilities = models[name].predict_proba(frame[len(train) :])
        if (shares := class_shares(args)) is not None:
            probabilities = probabilities * shares
            probabilities /= probabilities.sum(axis=1, keepdims=True)
        results.append(measure(rows, probabilities, args) | {"model": name, "probabilities": probabilities})
    return results


def print_tables(results: list[dict[str, Any]], rows: list[CreditRow], out: Any) -> None:
    """Side-by-side table with intervals, calibrators, and scikit-learn's report and confusion matrix per model; the
    matrix counts rows whatever they weigh."""
    from sklearn.metrics import classification_report, confusion_matrix

    answers = [row.label for row in rows]
    for result in results:
        print(f"\n{result['model']} ({result.get('calibration', 'baseline')})", file=out)
        table = {"labels": LABELS, "sample_weight": result["weights"], "digits": 4, "zero_division": 0}
        report = classification_report(answers, result["predicted"], **table)
        # The support is a sum of weights, which scikit-learn prints with all its digits.
        print(re.sub(r"(?m) +(\d+\.\d+)$", lambda found: f"{float(found[1]):>10.0f}", report), file=out)
        print(f"confusion matrix (rows: truth, columns: prediction; {', '.join(LABELS)})", file=out)
        print(confusion_matrix(answers, result["predicted"], labels=LABELS), file=out)
        for name, metrics in result.get("calibrations", {}).items():
            shown = ", ".join(f"{key} {metrics[key]:.4f}" for key in (*TABLE, "nll", "brier", "ece", "aurc"))
            print(f"  calibration {name:<11}{shown}", file=out)
    width = max(len(result["model"]) for result in results)
    print(
        f"\n{len(rows)} validation rows, {len(rows) // len(LABELS)} a class; 95 % intervals by customer bootstrap",
        file=out,
    )
    print(f"{'model':<{width}}  {'accuracy':<24}{'macro-F1':<24}{'Standard recall':<24}NLL     ECE", file=out)
    for result in results:
        cells = []
        for name in TABLE:
            low, high = result["interval_95"][name]
            cells.append(f"{result[name]:.4f} [{low:.4f}, {high:.4f}]  ")
        cells += [f"{result[name]:.4f}  " for name in ("nll", "ece")]
        print(f"{result['model']:<{width}}  {''.join(cells).rstrip()}", file=out)
        if abstain := result.get("abstain"):
            print(
                f"{'':<{width}}  answered where the probability is at least {abstain['below']:g}: "
                f"{abstain['coverage']:.3f} of the rows"
                + (f", {abstain['accuracy']:.4f} of these right" if abstain["coverage"] else ""),
                file=out,
            )
    compared = [result for result in results if "difference" in result]
    if compared:
        print(f"\nabove {compared[0]['difference']['to']} on the same rows, paired intervals", file=out)
        print(f"{'model':<{width}}  {'accuracy':<27}{'macro-F1':<27}{'Standard recall':<27}NLL", file=out)
    for result in compared:
        cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*result["difference"][name]) for name in (*TABLE, "nll")]
        print(f"{result['model']:<{width}}  {'  '.join(cells)}", file=out)


def plots(result: dict[str, Any], rows: list[CreditRow], folder: Path) -> None:
    """confusion_matrix.png (counts of rows), reliability.png and coverage.png (rows by weight) of one model."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    answers = [row.label for row in rows]
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        answers, result["predicted"], labels=LABELS, ax=axis, colorbar=False, cmap="Blues"
    )
    axis.set_title(result["model"])
    figure.savefig(folder / "confusion_matrix.png", dpi=120)
    probabilities = result["probabilities"]
    confidence = probabilities.max(axis=1)
    right = np.array([a == p for a, p in zip(answers, result["predicted"], strict=True)])
    bins = np.minimum((confidence * 15).astype(int), 14)
    used = [b for b in range(15) if (bins == b).any()]
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="tab:gray", linestyle=":")
    weights = result["weights"]
    means = [
        [np.average(values[bins == b], weights=weights[bins == b]) for b in used] for values in (confidence, right)
    ]
    axis.plot(*means, marker="o")
    axis.set(
        xlabel="probability of the predicted label",
        ylabel="share right",
        title=f"{result['model']}, ECE {result['ece']:.3f}",
    )
    figure.savefig(folder / "reliability.png", dpi=120)
    coverage, accuracy = coverage_curve(right, confidence, weights)
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(coverage, accuracy)
    axis.set(
        xlabel="share of rows answered, the surest first",
        ylabel="share right of these",
        title=f"{result['model']}, AURC {result['aurc']:.3f}",
    )
    figure.savefig(folder / "coverage.png", dpi=120)


def write_report(results: list[dict[str, Any]], rows: list[CreditRow], summary: dict, report_dir: Path) -> None:
    taken: Counter[str] = Counter()
    for result in results:
        name = Path(result["model"].replace(" ", "_")).resolve().name
        taken[name] += 1
        folder = report_dir / (name if taken[name] == 1 else f"{name}_{taken[name]}")  # runs/a/sft and runs/b/sft
        folder.mkdir(parents=True, exist_ok=True)
        plots(result, rows, folder)
        responses = result.get("responses") or [{"prediction": label} for label in result["predicted"]]
        lines = ({"features": r.features, "answer": r.label} | a for r, a in zip(rows, responses, strict=True))
        write_jsonl(folder / "predictions.jsonl", lines)
    write_json(report_dir / "metrics.json", summary)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.val_per_class and args.val_frac:
        raise InputError("give --val_per_class or --val_frac, not both")
    if (args.val_per_class is not None and args.val_per_class < 1) or args.bootstrap < 1 or args.fit_per_class < 1:
        raise InputError("--val_per_class, --fit_per_class and --bootstrap are at least 1")
    if args.val_frac is not None and not 0 < args.val_frac <= 0.3:
        raise InputError("--val_frac is a share above 0 and at most 0.3, the validation part")
    if args.report_dir:
        check_folder(args.report_dir)
    args.calibration = args.calibration or ("fitted" if args.fit else "auto")
    names = args.model_dir + (BASELINES if args.baselines else [])
    reference = args.reference or (BASELINES[-1] if args.baselines else names[0])
    if reference not in names:
        raise InputError(f"--reference {reference} is none of {', '.join(names)}")
    for model_dir in args.model_dir:
        check_model_name(model_dir)
    rows, _ = read_creditmix(args.data)
    data_hash = file_sha256(args.data)
    for model_dir in args.model_dir:
        check_training(model_dir, args, data_hash)
        if not args.fit and args.calibration not in ("none", "contextual"):
            check_fitted(model_dir, args, data_hash)
    validation, calibration, train = draw_samples(rows, args)
    for model_dir in args.model_dir:  # before the first is scored, which takes minutes
        local_or_hub(base_of(model_dir))
    customers = len({row.customer for row in calibration})
    if args.fit and args.calibration != "auto" and customers < 100:
        print(
            f"note: fitting on the rows of {customers} customers may do harm; --calibration auto fits only where the "
            "gain is more than chance",
            file=sys.stderr,
        )
    simple = baselines(train, usable(rows, "train", args), validation, args) if args.baselines else []
    results = [evaluate_model(model_dir, validation, calibration, args) for model_dir in args.model_dir]
    if rank_and_world()[0]:  # of several processes the first reports
        return 0
    results += simple
    if len(results) > 1:
        add_differences(results, next(result for result in results if result["model"] == reference))
    summary = {
        "data": {"file": args.data, "sha256": data_hash, "validation_rows": len(validation)},
        "split_seed": args.split_seed,
        "seed": args.seed,
        "models": [{key: value for key, value in result.items() if key not in ROW_BY_ROW} for result in results],
    }
    print_tables(results, validation, sys.stderr if args.json else sys.stdout)
    if args.report_dir:
        write_report(results, validation, summary, Path(args.report_dir))
        print(f"report written to {args.report_dir}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    run_script(main)
