"""Measure how many calibration customers each calibrator needs before it does more good than harm.

A model scores validation rows once. A calibrator is chosen and fitted on some of their customers, drawn repeatedly;
its NLL is measured on all others, as the difference to no calibration. `lowest` takes the calibrator with the lowest
NLL on the rows to fit, `auto` the simplest one within a standard error of it, as `eval_creditmix.py --fit
--calibration auto` does.

    python -m bench.calibrators --model_dir runs/creditmix_sft runs/creditmix_kd
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from tqdm import tqdm

from common import InputError
from distil.calibration import candidates, choose_method, row_losses
from distil.cli import new_parser, run_script
from distil.creditmix.evaluation import EvalOptions, draw_samples
from distil.creditmix.model import CreditModel, CreditOptions
from distil.creditmix.rows import read_rows
from distil.models import resolve
from distil.tasks import chosen_task

WAYS = ("contextual", "fitted", "lowest", "auto")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--model_dir", nargs="+", required=True, help="adapters or base models")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--val_per_class", type=int, default=1500, help="validation rows a class (%(default)s)")
    parser.add_argument(
        "--customers", nargs="+", type=int, default=[25, 50, 100, 200, 500], help="to calibrate on (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=40, help="draws of each number of customers (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def changes(
    raw: np.ndarray, contextual: np.ndarray, answers: np.ndarray, customers: np.ndarray, own: np.ndarray
) -> dict[str, float]:
    """Return {way: NLL on the other rows less that of no calibration}, calibrated on the `own` rows (boolean, [N])."""
    methods, losses = candidates(raw[own], contextual, answers[own], customers[own], "likelihood")
    measured = {n: float(row_losses(c.probabilities(raw[~own]), answers[~own]).mean()) for n, c in methods.items()}
    means = {name: loss.mean() for name, loss in losses.items()}
    chosen = {"lowest": min(means, key=means.__getitem__), "auto": choose_method(losses, customers[own])}
    return {way: measured[chosen.get(way, way)] - measured["none"] for way in WAYS}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    refs = [resolve(name) for name in args.model_dir]
    task = chosen_task(refs, None)
    forms, no_bias = {label: [label] for label in task.labels}, (0.0,) * len(task.labels)
    scoring = CreditOptions(forms, no_bias, "contextual", label_tokens=task.label_tokens, task=task)
    options = EvalOptions(args.data, "", scoring, val_per_class=args.val_per_class)
    rows, _, _ = draw_samples(read_rows(args.data, task)[0], options)
    answers = np.array([task.labels.index(row.label) for row in rows])
    customers = np.array([row.customer for row in rows])
    names = np.unique(customers)
    if not 5 <= min(args.customers) <= max(args.customers) < len(names) or args.repeats < 1:
        raise InputError(f"--customers are at least 5 and less than the {len(names)} drawn; --repeats at least 1")
    output: dict[str, Any] = {}
    for ref in refs:
        model = CreditModel.load(ref, scoring)
        raw = model.raw_scores([row.features for row in rows], ref.name)
        rng = np.random.default_rng(0)
        output[ref.name] = {}
        for count in tqdm(args.customers, desc="calibrators", leave=False):
            drawn = []
            for _ in range(args.repeats):
                own = np.isin(customers, rng.choice(names, count, replace=False))
                drawn.append(changes(raw, model.calibration.prior, answers, customers, own))
            values = {way: [one[way] for one in drawn] for way in WAYS}
            output[ref.name][count] = {
                way: {"mean": float(np.mean(v)), "worst": max(v), "best": min(v)} for way, v in values.items()
            }
    if args.json:
        print(json.dumps(output))
        return 0
    print(f"NLL above no calibration: mean (worst) of {args.repeats} draws of customers")
    for model_dir, table in output.items():
        print(f"\n{model_dir}\ncustomers  " + "".join(f"{way:<18}" for way in WAYS).rstrip())
        for count, ways in table.items():
            cells = "".join("{:<18}".format("{mean:+.4f} ({worst:+.4f})".format(**v)) for v in ways.values())
            print(f"{count:<11}{cells.rstrip()}")
    return 0


if __name__ == "__main__":
    run_script(main)
