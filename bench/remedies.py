"""Measure what each remedy that only changes inference does to a model: scored once, measured under all of them.

Alone and together: calibrators (contextual, batch, a fitted temperature, fitted biases, both, both with biases that
match predicted shares), several surface forms of Standard joined in three ways, and shares of the field. Calibrations
are fitted on calibration customers, all is measured on validation customers; differences to the first are paired.

    python -m bench.remedies --model_dir runs/creditmix_sft --output runs/remedies.json
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from common import Calibration, InputError, PromptEncoder, join_forms
from distil.calibration import fit_calibration, fit_shares, uncalibrated
from distil.cli import new_parser, run_script
from distil.creditmix.evaluation import EvalOptions, draw_samples
from distil.creditmix.metrics import ROW_BY_ROW, MeasureOptions, add_differences, measure
from distil.creditmix.model import CreditOptions
from distil.creditmix.rows import read_rows
from distil.files import write_json
from distil.scoring import FastLabelScorer
from distil.tasks import default_task
from distil.testing import load_named

TASK = default_task()
LABELS = TASK.labels

# Words that a model may mean Standard by, each of which starts with another token.
FORMS = {"Good": ["Good"], "Standard": ["Standard", "Average", "Typical"], "Bad": ["Bad"]}
FIELD = (0.30, 0.46, 0.24)  # shares of LABELS in the embedded data's labelled rows


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--model_dir", nargs="+", required=True, help="adapters or base models")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--val_per_class", type=int, default=1500, help="validation rows a class (%(default)s)")
    parser.add_argument("--fit_per_class", type=int, default=300, help="calibration rows a class (%(default)s)")
    parser.add_argument("--output", help="write all metrics there as JSON")
    return parser


def form_scores(model_dir: str, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Return {name: mean log-probabilities [rows, forms] of every surface form after each prompt}."""
    model, tokenizer = load_named(model_dir)
    words = {word: [word] for forms in FORMS.values() for word in forms}
    scorer = FastLabelScorer(model, PromptEncoder(tokenizer), words, shared_by=TASK.shared_turns)
    return {name: scorer.raw_scores(turns, f"{model_dir} {name}") for name, turns in texts.items()}


def joined(scores: np.ndarray, aggregate: str) -> np.ndarray:
    """Return scores [rows, labels] of scores [rows, forms]; `alone` takes each label's own word."""
    return scores[:, [0, 1, 4]] if aggregate == "alone" else join_forms(scores, [1, 3, 1], aggregate)


def fitted_parts(raw: np.ndarray, answers: np.ndarray) -> dict[str, Calibration]:
    """Return a temperature alone, biases alone, and both, of the lowest NLL; and both with matched shares."""
    from scipy.optimize import minimize, minimize_scalar

    zero, rows = np.zeros(len(LABELS)), np.arange(len(answers))

    def nll(calibration: Calibration) -> float:
        return float(-np.log(calibration.probabilities(raw)[rows, answers].clip(1e-12)).mean())

    temperature = minimize_scalar(lambda log: nll(Calibration("", zero, zero, float(np.exp(log)))), bounds=(-3, 3))
    bias = minimize(lambda pair: nll(Calibration("", zero, np.append(pair, 0.0))), np.zeros(2)).x
    both = fit_calibration(raw, zero, answers)
    return {
        "temperature": Calibration("", zero, zero, float(np.exp(temperature.x))),
        "bias": Calibration("", zero, np.append(bias, 0.0)),
        "bias and temperature": both,
        "the same, predicted shares matched": fit_shares(raw, zero, answers),
    }


def remedies(scores: dict[str, np.ndarray], answers: np.ndarray) -> dict[str, np.ndarray]:
    """Return {remedy: validation probabilities [rows, labels]}; answers: of the calibration rows."""
    zero, result = np.zeros(len(LABELS)), {}
    for aggregate in ("alone", "max", "mean", "logsumexp"):
        raw, validation = joined(scores["calibration"], aggregate), joined(scores["validation"], aggregate)
        calibrations = {"": uncalibrated(len(LABELS))}
        if aggregate == "alone":
            prior = joined(scores["null prompts"], aggregate).mean(axis=0)
            calibrations["contextual prior"] = Calibration("contextual", prior, zero)
            calibrations["batch calibration"] = Calibration("batch", raw.mean(axis=0), zero)
            calibrations |= fitted_parts(raw, answers)
        else:
            calibrations["bias and temperature"] = fit_calibration(raw, zero, answers)
        for name, calibration in calibrations.items():
            words = "" if aggregate == "alone" else f"three words, {aggregate}"
            result[" + ".join(filter(None, (words, name))) or "none"] = calibration.probabilities(validation)
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the results and their differences to the first."""
    add_differences(results, results[0])
    print(f"{'remedy':<48}accuracy macro-F1 Standard NLL    ECE    AURC   macro-F1 above the first")
    for result in results:
        names = ("accuracy", "macro_f1", "recall_Standard", "nll", "ece", "aurc")
        numbers = "{:<9.4f}{:<9.4f}{:<9.4f}{:<7.4f}{:<7.4f}{:<7.4f}".format(*(result[name] for name in names))
        difference = result.get("difference")
        above = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference["macro_f1"]) if difference else ""
        print(f"{result['model']:<48}{numbers}{above}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.val_per_class < 1 or args.fit_per_class < 1:
        raise InputError("--val_per_class and --fit_per_class are at least 1")
    scoring = CreditOptions({label: [label] for label in LABELS}, (0.0,) * len(LABELS))
    counts = {"val_per_class": args.val_per_class, "fit_per_class": args.fit_per_class}
    options = EvalOptions(args.data, "", scoring, fit=True, **counts)
    rows, calibration_rows, _ = draw_samples(read_rows(args.data, TASK)[0], options)
    answers = np.array([LABELS.index(row.label) for row in calibration_rows])
    texts = {
        "calibration": [TASK.prompt(row.features) for row in calibration_rows],
        "validation": [TASK.prompt(row.features) for row in rows],
        "null prompts": TASK.null_prompts(),
    }
    output: dict[str, Any] = {}
    for model_dir in args.model_dir:
        probabilities = remedies(form_scores(model_dir, texts), answers)
        results = [measure(rows, p, LABELS, MeasureOptions()) | {"model": name} for name, p in probabilities.items()]
        fitted = probabilities["bias and temperature"]
        shares = fitted * np.array(FIELD)
        shares /= shares.sum(axis=1, keepdims=True)  # as distil.calibration.with_shares, on probabilities
        field = MeasureOptions(class_shares=FIELD)
        in_field = [measure(rows, fitted, LABELS, field) | {"model": "fitted, shares unknown"}]
        in_field.append(measure(rows, shares, LABELS, field) | {"model": "fitted, --class_shares"})
        print(f"\n{model_dir}, {len(rows)} validation rows, fitted on {len(answers)}; above: paired, 95 % intervals")
        print_table(results)
        print(f"with class proportions {dict(zip(LABELS, FIELD, strict=True))}")
        print_table(in_field)
        results += in_field
        output[model_dir] = [{key: value for key, value in r.items() if key not in ROW_BY_ROW} for r in results]
    if args.output:
        write_json(args.output, output)
    return 0


if __name__ == "__main__":
    run_script(main)
