"""All of calibration.json: fit a calibration, choose one, write it, read it, apply it.

A calibration (common.Calibration) turns raw label scores into calibrated scores and probabilities. Four methods:
none; contextual (the prior of content-free prompts is subtracted, Zhao et al. 2021); batch (the mean raw score of the
rows is subtracted, Zhou et al. 2023); fitted (bias per label and temperature, Guo et al. 2017). NLL is the mean
negative log-likelihood of the right labels, in nats; lower is better.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import Calibration, InputError
from distil.files import cache_dir, read_json, write_json
from distil.models import ModelRef, model_fingerprint
from distil.processes import print_note
from distil.scoring import ScoringOptions

if TYPE_CHECKING:
    import numpy as np


FEW_LABELS = 3  # up to which biases are fitted freely
BIAS_PENALTY = 1.0  # of squared biases, in nats: as if they were drawn from a normal distribution of variance 1/2


def uncalibrated(labels: int) -> Calibration:
    """Return the calibration 'none' for this number of labels."""
    import numpy as np

    return Calibration("none", np.zeros(labels), np.zeros(labels))


def fit_calibration(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray) -> Calibration:
    """Return bias per label and temperature with the lowest NLL of the right answers.
    raw: [N, labels]; prior: [labels]; answers: [N] label indices. Convex in (bias / T, 1 / T), so the start does not
    matter; the biases are centred, since a common shift changes nothing. Temperatures stay within 1/20 to 20 and
    biases within 50, for rows that a model answers all right or all alike. Source: Guo et al. 2017, with biases.
    Of more than FEW_LABELS the biases are shrunk by BIAS_PENALTY. Free ones learn the noise: 77 of them on 971 rows
    raised the NLL of other rows from 0.415 to 0.464 where none were needed, shrunk ones lowered it to 0.413, and still
    took most of what systematic biases cost."""
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    rows, labels = raw.shape
    centred, truth = raw - prior, np.eye(labels)[answers]
    penalty = BIAS_PENALTY if labels > FEW_LABELS else 0.0

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = np.exp(parameters[0]), parameters[1:]
        log_probs = log_softmax(centred * slope + bias, axis=1)
        excess = np.exp(log_probs) - truth
        total = -log_probs[np.arange(rows), answers].sum() + penalty * (bias**2).sum()
        gradient = np.append((excess * centred).sum() * slope, excess.sum(axis=0) + 2 * penalty * bias)
        return total / rows, gradient / rows

    last = (-50, 50) if penalty else (0, 0)  # only distances from the last one matter where biases are free
    bounds = [(-np.log(20), np.log(20)), *[(-50, 50)] * (labels - 1), last]
    how = {"jac": True, "method": "L-BFGS-B", "bounds": bounds, "options": {"ftol": 1e-12, "maxiter": 1000}}
    best = minimize(loss, np.zeros(labels + 1), **how).x
    temperature, bias = float(np.exp(-best[0])), best[1:] - best[1:].mean()
    return Calibration("fitted", prior, bias * temperature, temperature)


def fit_shares(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray) -> Calibration:
    """Return `fit_calibration` with biases moved until each label is predicted as often as it occurs on these rows.
    The lowest NLL alone lets a label that is often second best be predicted too rarely: its recall falls below its
    precision. Matching the shares has one answer and less noise than a search for the best F1 on few rows."""
    import numpy as np

    fitted = fit_calibration(raw, prior, answers)
    actual = np.bincount(answers, minlength=raw.shape[1])
    best = bias = fitted.bias
    least = np.inf
    for _ in range(300):
        predicted = np.bincount((raw - prior + bias).argmax(axis=1), minlength=raw.shape[1])
        if (gap := np.abs(actual - predicted).sum()) < least:
            best, least = bias, gap
        bias = bias + 0.05 * fitted.temperature * np.log((actual + 1) / (predicted + 1))
    return replace(fitted, bias=best - best.mean())


FIT_BIAS = {"likelihood": fit_calibration, "shares": fit_shares}  # --fit_bias


def cross_fitted_probabilities(
    raw: np.ndarray, prior: np.ndarray, answers: np.ndarray, groups: Sequence[str], fit: Callable = fit_calibration
) -> np.ndarray:
    """Return probabilities [N, labels] by fitted calibrations that did not see the row's group, in five folds."""
    import numpy as np
    from sklearn.model_selection import GroupKFold

    probabilities = np.empty_like(raw)
    for train, test in GroupKFold(5).split(raw, answers, groups):
        probabilities[test] = fit(raw[train], prior, answers[train]).probabilities(raw[test])
    return probabilities


def row_losses(probabilities: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return the NLL of each row, [N]."""
    import numpy as np

    return -np.log(probabilities[np.arange(len(answers)), answers].clip(1e-12))


def choose_method(losses: dict[str, np.ndarray], groups: Sequence[str]) -> str:
    """Return the simplest method whose NLL is within one standard error of the lowest.
    losses: {method: NLL of each row [N]}, the simplest first; groups: [N] customer of each row, at least two
    different. The standard error is that of the difference over groups: what few rows seem to gain is mostly noise
    (the one-standard-error rule, Breiman et al. 1984)."""
    import numpy as np

    best = min(losses.values(), key=np.mean)
    _, group_index = np.unique(groups, return_inverse=True)

    def close_to_best(loss: np.ndarray) -> bool:
        excess = np.bincount(group_index, loss - best)
        return excess.sum() <= excess.std(ddof=1) * np.sqrt(len(excess))

    return next(name for name, loss in losses.items() if close_to_best(loss))


def candidates(
    raw: np.ndarray, contextual: np.ndarray, answers: np.ndarray, customers: Sequence[str], fit_bias: str
) -> tuple[dict[str, Calibration], dict[str, np.ndarray]]:
    """Return ({method: calibration}, {method: NLL of each row [N]}) on calibration rows, the simplest first.
    raw: [N, labels]; contextual: prior [labels] of content-free prompts. The losses of 'fitted' are those of fits
    that did not see the row's customer; where the fit gets all rows right, it has none: its best temperature is 0."""
    none, fit = uncalibrated(raw.shape[1]), FIT_BIAS[fit_bias]
    priors = {"contextual": contextual, "batch": raw.mean(axis=0)}
    methods = {"none": none} | {name: replace(none, method=name, prior=prior) for name, prior in priors.items()}
    losses = {name: row_losses(c.probabilities(raw), answers) for name, c in methods.items()}
    # Shrunk biases stay near what they start from: for a trained model the contextual prior may be far off.
    start = contextual if len(contextual) <= FEW_LABELS else methods[min(losses, key=lambda x: losses[x].mean())].prior
    methods["fitted"] = fit(raw, start, answers)
    if (methods["fitted"].scores(raw).argmax(axis=1) == answers).all():
        fix = "--calibration auto takes another method"
        print_note(f"a fit gets all {len(raw)} rows right: its temperature is arbitrary; {fix}")
        return methods, losses
    losses["fitted"] = row_losses(cross_fitted_probabilities(raw, start, answers, customers, fit), answers)
    return methods, losses


def calibration_path(ref: ModelRef) -> Path:
    """Return where a model's calibration is stored: in the folder of the adapter, or of a base that has one of the
    user's; for other bases (hub, embedded) in the cache folder, by content. Each engine's is in a separate file."""
    served = ""
    if ref.served:
        digest = hashlib.sha256(ref.served.encode()).hexdigest()[:6]  # names may differ in what no file name can have
        served = f"_served_{re.sub(r'[^A-Za-z0-9.-]+', '_', ref.served)[-60:]}_{digest}"
    if folder := ref.adapter or (ref.path == ref.base and Path(ref.path).is_dir() and ref.path):
        return Path(folder) / f"calibration{served}.json"
    return cache_dir() / "calibrations" / f"{model_fingerprint(ref)}{served}.json"


def write_fitted(
    ref: ModelRef, model: str, chosen: Calibration, nll: dict[str, float], options: ScoringOptions, fitted_on: dict
) -> Path:
    """Store a calibration and return its path. model: fingerprint; nll: by method; fitted_on: rows, data and split."""
    prior, bias = (dict(zip(options.labels, x.tolist(), strict=True)) for x in (chosen.prior, chosen.bias))
    record = {"calibration": chosen.method, "prior": prior, "bias": bias, "temperature": chosen.temperature}
    record |= {"nll": nll, "labels": options.labels, "model": model, **options.raw_settings()}
    write_json(path := calibration_path(ref), record | {"fitted_on": fitted_on})
    return path


def read_fitted(ref: ModelRef, options: ScoringOptions) -> Calibration | None:
    """Return the stored calibration of a model, None where there is none.
    Raises InputError where it was fitted for another model or other scoring settings, or is damaged."""
    import numpy as np

    path, again = calibration_path(ref), "fit again with eval_creditmix.py --fit"
    if not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise InputError(f"{path}: not a calibration (an object is expected); {again}")
    for name, value in {"model": model_fingerprint(ref), **options.raw_settings()}.items():
        if (old := stored.get(name)) != value:
            other = f"fitted with another {name} ({old}, now {value})"
            raise InputError(f"{path}: {other}; {again}, or use --calibration contextual")
    temperature, tables = stored.get("temperature"), [stored.get("prior"), stored.get("bias")]
    numbers = [temperature]
    for table in tables:
        numbers += table.values() if isinstance(table, dict) and set(table) == set(options.labels) else [None]
    named = type(stored.get("calibration")) is str
    if not named or not all(type(x) in (int, float) for x in numbers) or temperature <= 0:
        raise InputError(f"{path}: prior, bias or temperature is damaged; {again}")
    prior, bias = (np.array([table[label] for label in options.labels]) for table in tables)
    return Calibration(stored["calibration"], prior, bias, temperature)


def check_fitted(
    ref: ModelRef, split_seed: int, data_sha256: str, gold_share: float, split: list, notes: bool = True
) -> None:
    """Raise InputError for a stored calibration fitted under another split; print a note where it was fitted on other
    rows or with labels that --gold_share excludes. data_sha256: of the rows that the model is measured on; split: of
    their task; notes: whether to print these."""
    path = calibration_path(ref)
    stored = read_json(path) if path.is_file() else None
    if stored is None:
        return
    fitted_on = stored.get("fitted_on") if isinstance(stored, dict) else None
    if not isinstance(fitted_on, dict):
        raise InputError(f"{path}: says not on which rows it was fitted; fit again with eval_creditmix.py --fit")
    if (fitted := fitted_on.get("split_seed")) != split_seed:
        other = f"fitted with --split_seed {fitted}, evaluated with {split_seed}: its rows may be validation rows"
        raise InputError(f"{path}: {other}; fit again with --fit, or use --calibration contextual")
    if (fitted := fitted_on.get("split", split)) != split:  # of a base, which has no task
        other = f"fitted with group_column and validation_share {fitted}, not {split}: its rows may be validation rows"
        raise InputError(f"{path}: {other}; fit again with --fit, or use --calibration contextual")
    if notes and fitted_on.get("data_sha256") != data_sha256:
        print_note(f"{path} was fitted on rows of {fitted_on.get('data')}, not of --data")
    if notes and (share := fitted_on.get("gold_share", 1.0)) > gold_share:
        print_note(f"{path} was fitted with --gold_share {share:g}, not {gold_share:g}")


def fitted_calibration(ref: ModelRef, options: ScoringOptions) -> Calibration | None:
    """Return the stored calibration that --calibration selects, or None. Raises InputError where it is not stored."""
    method = options.calibration
    if method in ("none", "contextual"):
        return None
    stored = read_fitted(ref, options)
    if method != "auto" and (stored is None or stored.method != method):
        fix = f"eval_creditmix.py --fit --calibration {method} writes it"
        raise InputError(f"{calibration_path(ref)}: does not hold a {method} one; {fix}")
    return stored


def unfitted_note(ref: ModelRef, fitted: Calibration | None, options: ScoringOptions) -> str | None:
    """Return a note for users of an adapter without a stored calibration who chose none.
    Training moves the scores away from what the prior of content-free prompts corrects (docs/calibration.md)."""
    if options.calibration != "auto" or fitted or not (ref.adapter or ref.served):
        return None
    where = f" for {ref.served} at an engine" if ref.served else ""
    note = (
        f"{ref.name} has no stored calibration{where}: the prior of content-free prompts fits trained models badly; "
    )
    return note + "store the best with eval_creditmix.py --fit --calibration auto, or give --calibration none"


def with_shares(calibration: Calibration, shares: np.ndarray) -> Calibration:
    """Return the calibration for class proportions `shares` [labels] in place of equal ones.
    The odds of each label change by its share (Saerens et al. 2002), in scores and probabilities alike."""
    import numpy as np

    return replace(calibration, bias=calibration.bias + calibration.temperature * np.log(shares * len(shares)))


def adjusted(calibration: Calibration, options: ScoringOptions) -> Calibration:
    """Return the calibration with what --bias and --class_shares add."""
    import numpy as np

    calibration = replace(calibration, bias=calibration.bias + np.array(options.bias))
    return calibration if options.class_shares is None else with_shares(calibration, np.array(options.class_shares))
