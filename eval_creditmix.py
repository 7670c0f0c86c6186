"""Measure models of CreditMix, or of another label task, on validation rows of customers that no training saw.

Departures from a plain accuracy script: intervals come from resampling customers (a customer's months are alike),
probabilities are measured as well as labels, and `--fit` finds bias and temperature on calibration customers only.

    python eval_creditmix.py --model_dir runs/creditmix_sft --val_per_class 1500 --fit --baselines
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from distil import cli
from distil.calibration import FIT_BIAS, calibration_path, check_fitted
from distil.cli import InputError
from distil.creditmix.model import add_credit_flags, credit_options
from distil.creditmix.rows import CreditRow, note_anonymous, read_rows
from distil.creditmix.tabular import TABLE_BASELINES, TEXT_BASELINES, baseline_names
from distil.files import check_writable, hashed
from distil.models import resolve
from distil.processes import print_note, rank_and_world
from distil.tasks import Task, chosen_task

PER_CLASS = ("--val_per_class", "--fit_per_class")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("models and data").add_argument
    add("--model_dir", nargs="+", required=True, help="base ids, model folders or adapter folders, side by side")
    add("--data", default="data/creditmix_dataset.json", help="raw rows, as for creditmix_prepare.py (%(default)s)")
    cli.add_decimal_flag(add)
    rows = "validation rows a class (default: as many as the rarest class has; of a task that is not balanced, all)"
    add("--val_per_class", type=int, help=rows)
    add("--val_frac", type=float, help="or: share of all rows to validate on, balanced; at most the validation part")
    add("--seed", type=cli.seed_number, default=0, help="of the sample and the bootstrap (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the training's own (%(default)s)")
    add = parser.add_argument_group("calibration").add_argument
    fit = "fit bias and temperature on calibration rows, write calibration.json; auto: the simplest near the best"
    add("--fit", action="store_true", help=fit)
    bias = "fitted biases: of the lowest NLL, or so that each label is predicted as often as it occurs (%(default)s)"
    add("--fit_bias", choices=tuple(FIT_BIAS), default="likelihood", help=bias)
    add("--fit_per_class", type=int, help="calibration rows a class at most (default: 300, or all as above)")
    add("--keep_base", action="store_true", help="with --fit: store calibrations of adapters only, as a demo should")
    share = "share of customers whose label --fit and --baselines may use (%(default)s)"
    add("--gold_share", type=cli.gold_share, default=1.0, help=share)
    add = cli.add_report_flags(parser, "customers", 1000)
    names = f"add {', '.join(TABLE_BASELINES)}; for texts {', '.join(TEXT_BASELINES)}"
    add("--baselines", action="store_true", help=names)
    add("--reference", help="compare the others with this model, row by row (default: the last baseline or the first)")
    add("--verbose", action="store_true", help="print differences and each model's report and confusion matrix too")
    add_credit_flags(parser)
    cli.add_engine_flags(parser)
    parser.set_defaults(calibration=None)
    return parser


def check_flags(args: argparse.Namespace, names: list[str], task: Task) -> None:
    """Raise InputError for values that do not fit together. names: of all models, with baselines."""
    if args.val_per_class and args.val_frac:
        raise InputError("give --val_per_class or --val_frac, not both")
    if args.val_frac is not None and not task.balanced:
        raise InputError(f"--val_frac: only for balanced tasks; all validation rows of {task.name} are taken")
    if args.val_frac is not None and not 0 < args.val_frac <= task.validation_share:
        most = f"{task.validation_share:g}, the validation part"
        raise InputError(f"--val_frac is a share above 0 and at most {most}")
    if args.reference and args.reference not in names:
        raise InputError(f"--reference {args.reference} is not one of {', '.join(names)}")


def note_rows(args: argparse.Namespace, task: Task, rows: Sequence[CreditRow]) -> None:
    """Print notes where validation rows lack a label, or flags change the class proportions of a task that has its
    natural ones."""
    found = {row.label for row in rows}
    if missing := [label for label in task.labels if label not in found]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        print_note(f"no validation row is {', '.join(missing[:5])}{more}: no recall; macro-F1 counts 0 for each")
    if not task.balanced and (flags := [name for name in PER_CLASS if getattr(args, name[2:])]):
        print_note(f"{' and '.join(flags)}: rows have other class proportions than the data, as figures and biases do")


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    several = len(args.model_dir) > 1 or args.baselines
    unused = {"only with --fit": [] if args.fit else ["fit_bias", "fit_per_class", "keep_base"]}
    unused |= {"only with several models or --baselines": [] if several else ["reference"]}
    cli.check_at_least_one(vars(args), "val_per_class", "fit_per_class", "bootstrap")
    cli.refuse_unused(parser, argv, unused | cli.unused_scoring(vars(args), args.fit) | cli.unused_engine(vars(args)))

    from distil.creditmix import metrics, report
    from distil.creditmix.evaluation import EvalOptions, check_training, draw_samples, evaluate_model, usable

    with cli.report_folder(args.report_dir):
        task = chosen_task(refs := [resolve(name, args.served_model) for name in args.model_dir], args.task)
        names = args.model_dir + (baseline_names(task) if args.baselines else [])
        check_flags(args, names, task)
        method = args.calibration or ("fitted" if args.fit else "auto")
        scoring = replace(credit_options(vars(args), task), calibration=method)
        (rows, _), sha256 = hashed(args.data, lambda: read_rows(args.data, task, args.decimal))
        if not rank_and_world()[0]:
            note_anonymous(rows, task)
        same = {field.name: getattr(args, field.name) for field in fields(EvalOptions) if field.name in args}
        options = EvalOptions(**same, scoring=scoring, data_sha256=sha256)
        for ref in refs:
            check_training(ref, options)
            if options.fit and (ref.adapter or not options.keep_base):
                check_writable(calibration_path(ref))
            if not options.fit and options.scoring.calibration not in ("none", "contextual"):
                check_fitted(ref, options.split_seed, options.data_sha256, options.gold_share, task.split)
        validation, calibration, train = draw_samples(rows, options)
        note_rows(args, task, validation)
        customers = len({row.customer for row in calibration})
        auto = options.scoring.calibration == "auto"
        if options.fit and customers < (50 if auto else 100):
            fix = "give more rows, or leave --fit out" if auto else "--calibration auto fits only beyond chance"
            print_note(f"a fit on {customers} calibration customers may do harm; {fix}")
        simple = []
        if options.baselines:
            simple = metrics.baselines(train, usable(rows, "train", options), validation, task, options.measurement)
        results = [evaluate_model(ref, validation, calibration, options) for ref in refs]
        if rank_and_world()[0]:  # of several processes the first reports
            return 0
        results += simple
        if len(results) > 1:
            reference = args.reference or names[-1 if options.baselines else 0]
            metrics.add_differences(results, next(result for result in results if result["model"] == reference))
        data = {"file": options.data, "sha256": options.data_sha256, "validation_rows": len(validation)}
        models = [{key: value for key, value in result.items() if key not in metrics.ROW_BY_ROW} for result in results]
        summary = {
            "data": data,
            "task": task.name,
            "split_seed": options.split_seed,
            "seed": options.seed,
            "models": models,
        }
        compare = args.verbose or args.reference is not None
        report.print_tables(results, validation, task, sys.stderr if args.json else sys.stdout, args.verbose, compare)
        if args.report_dir:
            report.write_predictions(results, validation, task, Path(args.report_dir))
        cli.finish_report(summary, vars(args), (*report.table_columns(task.labels), "nll", "ece"))
        return 0


if __name__ == "__main__":
    cli.run_script(main)
