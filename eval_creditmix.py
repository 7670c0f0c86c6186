"""Measure CreditMix models on balanced validation rows of customers that no training saw.

Departures from a plain accuracy script: intervals come from resampling customers (a customer's months are alike),
probabilities are measured as well as labels, and `--fit` finds bias and temperature on calibration customers only.

    python eval_creditmix.py --model_dir runs/creditmix_sft --val_per_class 1500 --fit --baselines
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from distil import cli
from distil.calibration import FIT_BIAS, calibration_path, check_fitted
from distil.cli import InputError
from distil.creditmix.model import add_credit_flags, credit_options
from distil.creditmix.rows import note_anonymous, read_creditmix
from distil.creditmix.tabular import BASELINES
from distil.files import check_writable, hashed
from distil.models import resolve
from distil.processes import print_note, rank_and_world


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("models and data").add_argument
    add("--model_dir", nargs="+", required=True, help="base ids, model folders or adapter folders, side by side")
    add("--data", default="data/creditmix_dataset.json", help="raw rows, as for creditmix_prepare.py (%(default)s)")
    cli.add_decimal_flag(add)
    add("--val_per_class", type=int, help="validation rows a class (default: as many as the rarest class has)")
    add("--val_frac", type=float, help="or: share of all rows to validate on, balanced; at most 0.3 (validation part)")
    add("--seed", type=cli.seed_number, default=0, help="of the sample and the bootstrap (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the training's own (%(default)s)")
    add = parser.add_argument_group("calibration").add_argument
    fit = "fit bias and temperature on calibration rows, write calibration.json; auto: the simplest near the best"
    add("--fit", action="store_true", help=fit)
    bias = "fitted biases: of the lowest NLL, or so that each label is predicted as often as it occurs (%(default)s)"
    add("--fit_bias", choices=tuple(FIT_BIAS), default="likelihood", help=bias)
    add("--fit_per_class", type=int, default=300, help="calibration rows a class at most (%(default)s)")
    add("--keep_base", action="store_true", help="with --fit: store calibrations of adapters only, as a demo should")
    share = "share of customers whose label --fit and --baselines may use (%(default)s)"
    add("--gold_share", type=cli.gold_share, default=1.0, help=share)
    add = cli.add_report_flags(parser, "customers", 1000)
    add("--baselines", action="store_true", help=f"add {', '.join(BASELINES)}")
    add("--reference", help="compare the others with this model, row by row (default: gradient boosting or the first)")
    add("--verbose", action="store_true", help="print differences and each model's report and confusion matrix too")
    add_credit_flags(parser)
    parser.set_defaults(calibration=None)
    return parser


def check_flags(args: argparse.Namespace, names: list[str]) -> None:
    """Raise InputError for values that do not fit together. names: of all models, with baselines."""
    if args.val_per_class and args.val_frac:
        raise InputError("give --val_per_class or --val_frac, not both")
    cli.check_at_least_one(vars(args), "val_per_class", "fit_per_class", "bootstrap")
    if args.val_frac is not None and not 0 < args.val_frac <= 0.3:
        raise InputError("--val_frac is a share above 0 and at most 0.3, the validation part")
    if args.reference and args.reference not in names:
        raise InputError(f"--reference {args.reference} is not one of {', '.join(names)}")


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    names = args.model_dir + (BASELINES if args.baselines else [])
    check_flags(args, names)
    unused = {"only with --fit": [] if args.fit else ["fit_bias", "fit_per_class", "keep_base"]}
    unused |= {"only with several models or --baselines": [] if len(names) > 1 else ["reference"]}
    cli.refuse_unused(parser, argv, unused | cli.unused_scoring(vars(args), args.fit))

    from distil.creditmix import metrics, report
    from distil.creditmix.evaluation import EvalOptions, check_training, draw_samples, evaluate_model, usable

    with cli.report_folder(args.report_dir):
        method = args.calibration or ("fitted" if args.fit else "auto")
        scoring = replace(credit_options(vars(args)), calibration=method)
        refs = [resolve(name) for name in args.model_dir]
        (rows, _), sha256 = hashed(args.data, lambda: read_creditmix(args.data, args.decimal))
        if not rank_and_world()[0]:
            note_anonymous(rows)
        same = {field.name: getattr(args, field.name) for field in fields(EvalOptions) if field.name in args}
        options = EvalOptions(**same, scoring=scoring, data_sha256=sha256)
        for ref in refs:
            check_training(ref, options)
            if options.fit and (ref.adapter or not options.keep_base):
                check_writable(calibration_path(ref))
            if not options.fit and options.scoring.calibration not in ("none", "contextual"):
                check_fitted(ref, options.split_seed, options.data_sha256, options.gold_share)
        validation, calibration, train = draw_samples(rows, options)
        customers = len({row.customer for row in calibration})
        auto = options.scoring.calibration == "auto"
        if options.fit and customers < (50 if auto else 100):
            fix = "give more rows, or leave --fit out" if auto else "--calibration auto fits only beyond chance"
            print_note(f"a fit on {customers} calibration customers may do harm; {fix}")
        simple = []
        if options.baselines:
            simple = metrics.baselines(train, usable(rows, "train", options), validation, options.measurement)
        results = [evaluate_model(ref, validation, calibration, options) for ref in refs]
        if rank_and_world()[0]:  # of several processes the first reports
            return 0
        results += simple
        if len(results) > 1:
            reference = args.reference or (BASELINES[-1] if options.baselines else names[0])
            metrics.add_differences(results, next(result for result in results if result["model"] == reference))
        data = {"file": options.data, "sha256": options.data_sha256, "validation_rows": len(validation)}
        models = [{key: value for key, value in result.items() if key not in metrics.ROW_BY_ROW} for result in results]
        summary = {"data": data, "split_seed": options.split_seed, "seed": options.seed, "models": models}
        compare = args.verbose or args.reference is not None
        report.print_tables(results, validation, sys.stderr if args.json else sys.stdout, args.verbose, compare)
        if args.report_dir:
            report.write_predictions(results, validation, Path(args.report_dir))
        cli.finish_report(summary, args.report_dir, args.json)
        return 0


if __name__ == "__main__":
    cli.run_script(main)
