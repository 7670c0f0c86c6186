"""Evaluate models on customers that no training saw: draw the rows, refuse leaks, fit calibrations, measure."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common import Calibration, InputError
from distil import calibration as calibrations
from distil.creditmix.metrics import MeasureOptions, measure
from distil.creditmix.model import CreditModel, CreditOptions
from distil.creditmix.rows import CreditRow, sample_rows
from distil.files import hold
from distil.models import ModelRef
from distil.processes import print_note, rank_and_world
from distil.splits import is_gold, note_sources, provenance
from distil.tasks import Task


@dataclass(frozen=True)
class EvalOptions:
    """How models are evaluated; the fields are eval_creditmix.py's flags. data_sha256: of the file `data`;
    fit_per_class None: 300 where the task is balanced, else all."""

    data: str
    data_sha256: str
    scoring: CreditOptions
    val_per_class: int | None = None
    val_frac: float | None = None
    fit: bool = False
    fit_bias: str = "likelihood"
    fit_per_class: int | None = None
    keep_base: bool = False
    gold_share: float = 1.0
    baselines: bool = False
    bootstrap: int = 1000
    seed: int = 0
    split_seed: int = 0

    @property
    def task(self) -> Task:
        """Return the task whose rows are evaluated."""
        return self.scoring.task

    @property
    def measurement(self) -> MeasureOptions:
        """Return how models are measured."""
        return MeasureOptions(self.bootstrap, self.seed, self.scoring.class_shares, self.scoring.abstain_below)


def check_training(ref: ModelRef, options: EvalOptions) -> None:
    """Raise InputError for a model trained under another split: its training rows would be validation rows.
    Print a note where it was trained on other rows (whether those include these customers cannot be seen), or with
    labels that --gold_share excludes. Adapters, exports and what they were made from count alike (`provenance`)."""
    origin = provenance(ref.name)
    trained, seed = origin.split_seed, options.split_seed
    if trained not in (None, seed):
        raise InputError(f"{ref.name}: trained with --split_seed {trained}, evaluated with {seed}: rows would leak")
    note_sources(origin, options.data_sha256)
    share = origin.gold_share
    if options.gold_share < 1 and (share is None or share > options.gold_share):
        used = "a --gold_share that is not recorded" if share is None else f"--gold_share {share:g}"
        print_note(f"{ref.name} was trained with {used}, not {options.gold_share:g}")


def usable(rows: Sequence[CreditRow], split: str, options: EvalOptions) -> list[CreditRow]:
    """Return the rows of one split whose labels may be used; --gold_share limits all but validation."""
    part_of, seed = options.task.part_of, options.split_seed
    share = 1.0 if split == "validation" else options.gold_share
    return [row for row in rows if part_of(row.customer, seed) == split and is_gold(row.customer, share, seed)]


def draw(rows: Sequence[CreditRow], split: str, per_class: int | None, options: EvalOptions) -> list[CreditRow]:
    """Return a sample of one split, as `sample_rows` draws it. Raises InputError."""
    try:
        return sample_rows(usable(rows, split, options), options.task, per_class, options.seed)
    except InputError as error:
        raise InputError(f"{options.data}: {split} rows: {error}") from None


def draw_samples(rows: Sequence[CreditRow], options: EvalOptions) -> tuple[list[CreditRow], ...]:
    """Return (validation, calibration, training) rows, balanced where the task is, each of customers of that split
    alone. The last two are empty without --fit or --baselines. Raises InputError."""
    per_class = options.val_per_class
    if options.val_frac:
        per_class = max(1, round(options.val_frac * len(rows) / len(options.task.labels)))
    validation = draw(rows, "validation", per_class, options)
    calibration = draw(rows, "calibration", None, options) if options.fit else []
    most = options.fit_per_class or (300 if options.task.balanced else len(rows))
    if options.fit and max(Counter(row.label for row in calibration).values()) > most:
        calibration = draw(rows, "calibration", most, options)
    if options.fit and len({row.customer for row in calibration}) < 5:
        fix = "raise --fit_per_class, or leave it out"
        raise InputError(f"{options.data}: --fit needs calibration rows of at least 5 customers; {fix}")
    return validation, calibration, draw(rows, "train", None, options) if options.baselines else []


def fit(model: CreditModel, ref: ModelRef, rows: list[CreditRow], options: EvalOptions) -> tuple[Calibration, dict]:
    """Find the calibration on calibration rows and store it; return it and all that were compared.
    model: with the contextual calibration and no bias. A base's is not stored with `keep_base`."""
    raw = model.raw_scores([row.features for row in rows], "calibration rows")
    answers = np.array([options.task.labels.index(row.label) for row in rows])
    customers = [row.customer for row in rows]
    methods, losses = calibrations.candidates(raw, model.calibration.prior, answers, customers, options.fit_bias)
    method = options.scoring.calibration
    chosen = methods[calibrations.choose_method(losses, customers) if method == "auto" else method]
    if rank_and_world()[0]:
        return chosen, methods
    nll = {name: float(loss.mean()) for name, loss in losses.items()}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in nll.items())
    print(f"{ref.name}: NLL on calibration rows: {shown} -> {chosen.method}", file=sys.stderr)
    if ref.adapter or not options.keep_base:
        digest = hashlib.sha256(json.dumps([[row.features, row.label] for row in rows]).encode()).hexdigest()
        fitted_on = {"rows": len(rows), "sha256": digest, "data": options.data, "data_sha256": options.data_sha256}
        fitted_on |= {"split": options.task.split}
        fitted_on |= {"split_seed": options.split_seed, "bias": options.fit_bias, "gold_share": options.gold_share}
        path = calibrations.write_fitted(ref, model.fingerprint, chosen, nll, options.scoring, fitted_on)
        print(f"wrote {path}", file=sys.stderr)
    return chosen, methods


def evaluate_model(ref: ModelRef, rows: list[CreditRow], fit_rows: list[CreditRow], options: EvalOptions) -> dict:
    """Score one model once and return its result (`measure`) with each calibration that it has. Raises InputError."""
    if options.fit:
        plain = replace(
            options.scoring, calibration="contextual", bias=(0.0,) * len(options.task.labels), class_shares=None
        )
        model = CreditModel.load(ref, plain)
        with hold(calibrations.calibration_path(ref)):
            chosen, methods = fit(model, ref, fit_rows, options)
        model = replace(model, calibration=calibrations.adjusted(chosen, options.scoring))
    else:
        model = CreditModel.load(ref, options.scoring)
        if model.calibration.method not in ("none", "contextual"):  # another run may have written it since the start
            split = options.split_seed, options.data_sha256, options.gold_share, options.task.split
            calibrations.check_fitted(ref, *split, notes=False)
        methods = {"none": calibrations.uncalibrated(len(options.task.labels))}
    raw = model.raw_scores([row.features for row in rows], ref.name)
    used = model.calibration
    methods = {name: calibrations.adjusted(method, options.scoring) for name, method in methods.items()}
    methods[used.method] = used
    labels, points = options.task.labels, replace(options.measurement, resamples=0)
    compared = {name: measure(rows, one.probabilities(raw), labels, points) for name, one in methods.items()}
    numbers = {name: {k: v for k, v in one.items() if isinstance(v, float)} for name, one in compared.items()}
    result = measure(rows, used.probabilities(raw), labels, options.measurement)
    result |= {"model": ref.name, "calibration": used.method, "responses": model.responses(raw)}
    return result | {"calibrations": numbers, "probabilities": used.probabilities(raw)}
