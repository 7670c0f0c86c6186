"""What each remedy that only changes inference does to a model: scored once, measured under all of them.

Alone and together: calibrators (contextual, batch, a fitted temperature, fitted biases, both, both with biases that
match predicted shares), several surface forms of Standard joined in three ways, and shares of the field. Calibrations
are fitted on calibration customers, all is measured on validation customers; differences to the first are paired.

    python bench/remedies.py --model_dir runs/creditmix_sft --output runs/remedies.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import eval_creditmix
from common import Calibration, LabelScorer, PromptEncoder, fit_calibration, fit_shares
from creditmix import LABELS, creditmix_prompt, null_prompts, read_creditmix
from files import InputError, run_script, write_json
from models import load_model

# Words that a model may mean Standard by, each of which starts with a token of its own.
FORMS = {"Good": ["Good"], "Standard": ["Standard", "Average", "Typical"], "Bad": ["Bad"]}
FIELD = "Good=0.30,Standard=0.46,Bad=0.24"  # shares of the embedded data's labelled rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", nargs="+", required=True, help="adapters or base models")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--val_per_class", type=int, default=1500, help="validation rows a class (%(default)s)")
    parser.add_argument("--fit_per_class", type=int, default=300, help="calibration rows a class (%(default)s)")
    parser.add_argument("--output", help="write all metrics there as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def form_scores(model_dir: str, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """{name: [rows, forms]} mean log-probability of every surface form after each prompt."""
    model, tokenizer = load_model(model_dir)
    words = {word: [word] for forms in FORMS.values() for word in forms}
    shared = [creditmix_prompt("Age: 1"), creditmix_prompt("-")]
    scorer = LabelScorer(model, PromptEncoder(tokenizer), words, shared_by=shared)
    return {name: scorer.raw_scores(turns, f"{model_dir} {name}") for name, turns in texts.items()}


def joined(scores: np.ndarray, aggregate: str) -> np.ndarray:
    """[rows, forms] -> [rows, labels]; `alone` takes each label's own word."""
    if aggregate == "alone":
        return scores[:, [0, 1, 4]]
    join = {"max": np.max, "mean": np.mean, "logsumexp": np.logaddexp.reduce}[aggregate]
    return np.stack([scores[:, 0], join(scores[:, 1:4], axis=1), scores[:, 4]], axis=1)


def fitted_parts(raw: np.ndarray, answers: np.ndarray) -> dict[str, Calibration]:
    """A temperature alone, biases alone, and both, by negative log-likelihood; and both with biases moved further."""
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
        "the same, halfway to matched shares": fit_shares(raw, zero, answers, 0.5),
        "the same, predicted shares matched": fit_shares(raw, zero, answers),
    }


def remedies(scores: dict[str, np.ndarray], answers: np.ndarray) -> dict[str, np.ndarray]:
    """{remedy: validation probabilities [rows, labels]}; answers: of the calibration rows."""
    zero, found = np.zeros(len(LABELS)), {}
    for aggregate in ("alone", "max", "mean", "logsumexp"):
        raw, validation = joined(scores["calibration"], aggregate), joined(scores["validation"], aggregate)
        calibrations = {"": Calibration("none", zero, zero)}
        if aggregate == "alone":
            prior = joined(scores["null prompts"], aggregate).mean(axis=0)
            calibrations["contextual prior"] = Calibration("contextual", prior, zero)
            calibrations["batch calibration"] = Calibration("batch", raw.mean(axis=0), zero)
            calibrations |= fitted_parts(raw, answers)
        else:
            calibrations["bias and temperature"] = fit_calibration(raw, zero, answers)
        for name, calibration in calibrations.items():
            words = "" if aggregate == "alone" else f"three words, {aggregate}"
            found[" + ".join(filter(None, (words, name))) or "none"] = calibration.probabilities(validation)
    return found


def measured(name: str, rows: list, probabilities: np.ndarray, settings: argparse.Namespace) -> dict[str, Any]:
    return eval_creditmix.measure(rows, probabilities, settings) | {"model": name}


def print_table(results: list[dict[str, Any]]) -> None:
    """The first result is what the others are compared with."""
    eval_creditmix.add_differences(results, results[0])
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
    flags = ["--fit", "--data", args.data, "--val_per_class", str(args.val_per_class)]
    flags += ["--fit_per_class", str(args.fit_per_class), "--model_dir", *args.model_dir]
    settings = eval_creditmix.build_parser().parse_args(flags)
    field = eval_creditmix.build_parser().parse_args([*flags, "--class_shares", FIELD])
    rows, calibration_rows, _ = eval_creditmix.draw_samples(read_creditmix(args.data)[0], settings)
    answers = np.array([LABELS.index(row.label) for row in calibration_rows])
    texts = {
        "calibration": [creditmix_prompt(row.features) for row in calibration_rows],
        "validation": [creditmix_prompt(row.features) for row in rows],
        "null prompts": null_prompts(),
    }
    output: dict[str, Any] = {}
    for model_dir in args.model_dir:
        found = remedies(form_scores(model_dir, texts), answers)
        results = [measured(name, rows, p, settings) for name, p in found.items()]
        fitted = found["bias and temperature"]
        shares = fitted * eval_creditmix.class_shares(field)
        shares /= shares.sum(axis=1, keepdims=True)  # as common.with_shares, on probabilities
        in_field = [measured("fitted, shares unknown", rows, fitted, field)]
        in_field.append(measured("fitted, --class_shares", rows, shares, field))
        print(f"\n{model_dir}, {len(rows)} validation rows, fitted on {len(answers)}; above: paired, 95 % intervals")
        print_table(results)
        print(f"in a field of {FIELD}")
        print_table(in_field)
        results += in_field
        output[model_dir] = [
            {key: value for key, value in r.items() if key not in eval_creditmix.ROW_BY_ROW} for r in results
        ]
    if args.output:
        write_json(args.output, output)
    return 0


if __name__ == "__main__":
    run_script(main)
