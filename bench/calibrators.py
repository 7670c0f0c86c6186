"""How many calibration customers each calibrator needs before it does more good than harm.

A model scores validation rows once. Some of their customers, drawn again and again, are what a calibrator is chosen
and fitted on; all others are what its negative log-likelihood is measured on, as the difference to no calibration.
`likeliest` takes the calibrator with the best likelihood of calibration rows, `auto` the simplest one within a
standard error of it, as `eval_creditmix.py --fit --calibration auto` does.

    python bench/calibrators.py --model_dir runs/creditmix_sft runs/creditmix_kd
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

import eval_creditmix
from common import likeliest, row_losses
from creditmix import LABELS, CreditModel, read_creditmix
from files import InputError, run_script

WAYS = ("contextual", "fitted", "likeliest", "auto")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", nargs="+", required=True, help="adapters or base models")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--val_per_class", type=int, default=1500, help="validation rows a class (%(default)s)")
    parser.add_argument(
        "--customers", nargs="+", type=int, default=[25, 50, 100, 200, 500], help="to calibrate on (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=40, help="draws of each number of customers (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def changes(
    raw: np.ndarray, contextual: np.ndarray, answers: np.ndarray, customers: np.ndarray, own: np.ndarray
) -> dict[str, float]:
    """{way: negative log-likelihood on the other rows less that of no calibration}, calibrated on the `own` rows
    (boolean, [N])."""
    found, losses = eval_creditmix.calibrators(raw[own], contextual, answers[own], customers[own], "likelihood")
    measured = {name: float(row_losses(c.probabilities(raw[~own]), answers[~own]).mean()) for name, c in found.items()}
    means = {name: loss.mean() for name, loss in losses.items()}
    chosen = {
        "likeliest": min(means, key=means.__getitem__),
        "auto": likeliest(losses, customers[own]),
    }
    return {way: measured[chosen.get(way, way)] - measured["none"] for way in WAYS}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    flags = ["--data", args.data, "--val_per_class", str(args.val_per_class), "--model_dir", *args.model_dir]
    settings = eval_creditmix.build_parser().parse_args([*flags, "--calibration", "contextual"])
    rows, _, _ = eval_creditmix.draw_samples(read_creditmix(args.data)[0], settings)
    answers = np.array([LABELS.index(row.label) for row in rows])
    customers = np.array([row.customer for row in rows])
    names = np.unique(customers)
    if not 5 <= min(args.customers) <= max(args.customers) < len(names) or args.repeats < 1:
        raise InputError(f"--customers are at least 5 and less than the {len(names)} drawn; --repeats at least 1")
    output: dict[str, Any] = {}
    for model_dir in args.model_dir:
        model = CreditModel.load(model_dir, settings)
        raw = model.raw_scores([row.features for row in rows], model_dir)
        rng = np.random.default_rng(0)
        output[model_dir] = {}
        for count in tqdm(args.customers, desc="calibrators", leave=False):
            drawn = []
            for _ in range(args.repeats):
                own = np.isin(customers, rng.choice(names, count, replace=False))
                drawn.append(changes(raw, model.calibration.prior, answers, customers, own))
            values = {way: [one[way] for one in drawn] for way in WAYS}
            output[model_dir][count] = {
                way: {"mean": float(np.mean(v)), "worst": max(v), "best": min(v)} for way, v in values.items()
            }
    if args.json:
        print(json.dumps(output))
        return 0
    print(f"negative log-likelihood above no calibration: mean (worst) of {args.repeats} draws of customers")
    for model_dir, table in output.items():
        print(f"\n{model_dir}\ncustomers  " + "".join(f"{way:<18}" for way in WAYS).rstrip())
        for count, ways in table.items():
            cells = "".join("{:<18}".format("{mean:+.4f} ({worst:+.4f})".format(**v)) for v in ways.values())
            print(f"{count:<11}{cells.rstrip()}")
    return 0


if __name__ == "__main__":
    run_script(main)
