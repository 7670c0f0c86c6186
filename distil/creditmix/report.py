"""Show results of an evaluation: tables on the terminal, and a folder with metrics, predictions and plots."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from distil.cli import print_columns, with_interval
from distil.creditmix.metrics import coverage_curve
from distil.creditmix.rows import CreditRow
from distil.files import write_jsonl
from distil.tasks import Task

MANY_LABELS = 20  # a confusion matrix of more is too large to read, or to have numbers in its plot


def table_columns(labels: Sequence[str]) -> dict[str, str]:
    """Return {metric: head} of the table's columns with intervals: of three labels the recall of the one between the
    others, which is the hardest; else AUC."""
    last = {f"recall_{labels[1]}": f"{labels[1]} recall"} if len(labels) == 3 else {"auc": "AUC"}
    return {"accuracy": "accuracy", "macro_f1": "macro-F1"} | last


def cell(values: dict[str, Any], ends: dict[str, Any], name: str, form: str = ".4f") -> str:
    """Return a metric with its interval where it has one; '-' where the rows do not define it (no row of a label)."""
    if name not in values:
        return "-"
    return with_interval(values[name], ends[name], form) if name in ends else f"{values[name]:{form}}"


def print_tables(
    results: list[dict], rows: list[CreditRow], task: Task, out: TextIO, verbose: bool, compare: bool
) -> None:
    """Print the table and each model's calibration; with `compare` differences to the reference, `verbose` details."""
    columns, labels = table_columns(task.labels), task.labels
    heads = ["model", *columns.values(), "NLL"]
    drawn = f"{len(rows) // len(labels)} a class" if task.balanced else f"{len(labels)} labels as they occur"
    unit = "customer" if task.group_column else "row"
    print(f"{len(rows)} validation rows, {drawn}; 95 % intervals by {unit} bootstrap", file=out)
    table = [[*heads, "ECE"]]
    for result in results:
        cells = [cell(result, result["interval_95"], name) for name in columns]
        table.append([result["model"], *cells, f"{result['nll']:.4f}", f"{result['ece']:.4f}"])
    print_columns(table, out)
    if compared := [(r["model"], r["difference"]) for r in results if compare and "difference" in r]:
        print(f"\nabove {compared[0][1]['to']} on the same rows, paired intervals", file=out)
        table = [heads]
        for name, one in compared:
            ends = {key: values[1:] for key, values in one.items()}
            points = {key: values[0] for key, values in one.items()}
            table.append([name, *(cell(points, ends, key, "+.4f") for key in (*columns, "nll"))])
        print_columns(table, out)
    print("", file=out)
    for result in results:
        if abstain := result.get("abstain"):
            where = f"answered where the probability is at least {abstain['below']:g}"
            right = f", {abstain['accuracy']:.4f} of these right" if abstain["coverage"] else ""
            print(f"{result['model']}  {where}: {abstain['coverage']:.3f} of the rows{right}", file=out)
        if "calibration" in result:
            nll = ", ".join(f"{name} {metrics['nll']:.4f}" for name, metrics in result["calibrations"].items())
            print(f"{result['model']}  calibration {result['calibration']}; NLL: {nll}", file=out)
    for result in results if verbose else []:
        print_details(result, [row.label for row in rows], labels, out)


def print_details(result: dict[str, Any], answers: list[str], labels: Sequence[str], out: TextIO) -> None:
    """Print one model's scikit-learn report, confusion matrix (counts of rows) and a line for each calibration."""
    from sklearn.metrics import classification_report, confusion_matrix

    print(f"\n{result['model']} ({result.get('calibration', 'baseline')})", file=out)
    table = {"labels": list(labels), "sample_weight": result["weights"], "digits": 4, "zero_division": 0}
    report = classification_report(answers, result["predicted"], **table)
    # The support is a sum of weights, which scikit-learn prints with all its digits.
    print(re.sub(r"(?m) +(\d+\.\d+)$", lambda match: f"{float(match[1]):>10.0f}", report), file=out)
    if len(labels) <= MANY_LABELS:
        print(f"confusion matrix (rows: truth, columns: prediction; {', '.join(labels)})", file=out)
        print(confusion_matrix(answers, result["predicted"], labels=labels), file=out)
    for name, metrics in result.get("calibrations", {}).items():
        wanted = [key for key in (*table_columns(labels), "nll", "brier", "ece", "aurc") if key in metrics]
        shown = ", ".join(f"{key} {metrics[key]:.4f}" for key in wanted)
        print(f"  calibration {name:<11}{shown}", file=out)


def plots(result: dict[str, Any], answers: list[str], labels: Sequence[str], folder: Path) -> None:
    """Write confusion_matrix.png (counts of rows), reliability.png and coverage.png (rows by weight) of one model."""
    import numpy as np
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    predicted, weights = result["predicted"], result["weights"]
    confidence = result["probabilities"].max(axis=1)
    right = np.array([a == p for a, p in zip(answers, predicted, strict=True)])
    bins = np.minimum((confidence * 15).astype(int), 14)
    used = [bins == b for b in range(15) if (bins == b).any()]
    names = ("confusion_matrix", "reliability", "coverage")
    figures = {name: Figure(figsize=(4.5, 4), layout="constrained") for name in names}
    confusion, reliability, coverage = (figure.subplots() for figure in figures.values())
    style = {"labels": labels, "colorbar": False, "cmap": "Blues", "include_values": len(labels) <= MANY_LABELS}
    ConfusionMatrixDisplay.from_predictions(answers, predicted, ax=confusion, **style)
    confusion.set(title=result["model"], **({} if len(labels) <= MANY_LABELS else {"xticks": [], "yticks": []}))
    reliability.plot([0, 1], [0, 1], color="tab:gray", linestyle=":")
    reliability.plot(*([np.average(x[b], weights=weights[b]) for b in used] for x in (confidence, right)), marker="o")
    reliability.set(title=f"{result['model']}, ECE {result['ece']:.3f}", ylabel="share right")
    reliability.set(xlabel="probability of the predicted label")
    coverage.plot(*coverage_curve(right, confidence, weights))
    coverage.set(title=f"{result['model']}, AURC {result['aurc']:.3f}", ylabel="share right of these")
    coverage.set(xlabel="share of rows answered, most confident first")
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def write_predictions(results: list[dict[str, Any]], rows: list[CreditRow], task: Task, report_dir: Path) -> None:
    """Write predictions.jsonl and plots of each model into a folder of its name."""
    taken: Counter[str] = Counter()
    answers = [row.label for row in rows]
    for result in results:
        name = Path(result["model"].replace(" ", "_")).resolve().name
        taken[name] += 1
        folder = report_dir / (name if taken[name] == 1 else f"{name}_{taken[name]}")  # runs/a/sft and runs/b/sft
        folder.mkdir(parents=True, exist_ok=True)
        plots(result, answers, task.labels, folder)
        responses = result.get("responses") or [{"prediction": label} for label in result["predicted"]]
        lines = ({"features": r.features, "answer": r.label} | a for r, a in zip(rows, responses, strict=True))
        write_jsonl(folder / "predictions.jsonl", lines)
