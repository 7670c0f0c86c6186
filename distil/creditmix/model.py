"""A loaded model that scores rows of a label task: the same object in inference, evaluation and the server."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from common import Calibration, InputError, PromptEncoder, add_adapters, dtype_name
from distil.calibration import adjusted, fitted_calibration, uncalibrated, unfitted_note
from distil.cli import add_scoring_flags, add_task_flag, scoring_options
from distil.engine import ServedModel, ServedScorer
from distil.models import ModelRef, check_shareable, check_unchanged, load, model_fingerprint
from distil.processes import gather, own_share, print_note
from distil.runs import package_versions
from distil.scoring import BASE, FastLabelScorer, ScoringOptions, label_prior
from distil.support import check_used
from distil.tasks import Task, default_task

if TYPE_CHECKING:
    import numpy as np


PROMPT_KEYS = ("instruction", "missing", "fields", "text_column")  # of a task, which decide its prompts


@dataclass(frozen=True)
class CreditOptions(ScoringOptions):
    """How rows of a task are scored and calibrated."""

    task: Task = field(default_factory=default_task)

    def raw_settings(self) -> dict[str, Any]:
        """Return what decides raw scores besides the model: what decides prompts as well (None: that of CreditMix)."""
        own, default = ([task.record[key] for key in PROMPT_KEYS] for task in (self.task, default_task()))
        return super().raw_settings() | {"task": None if own == default else dict(zip(PROMPT_KEYS, own, strict=True))}


def add_credit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that scores rows of a label task; `credit_options` reads them."""
    add_task_flag(parser.add_argument_group("task").add_argument)
    add_scoring_flags(parser, len(default_task().null_texts))


def credit_options(flags: Mapping[str, Any], task: Task) -> CreditOptions:
    """Return the checked options of `add_credit_flags` for a task. Raises InputError."""
    options = scoring_options(flags, task.labels, len(task.null_texts))
    if options.class_shares is not None and not task.balanced:
        why = f"the rows of task {task.name} have their natural class proportions, and so have the probabilities"
        raise InputError(f"--class_shares: {why}; leave it out")
    same = {one.name: getattr(options, one.name) for one in fields(ScoringOptions)}
    return CreditOptions(**same | {"label_tokens": task.label_tokens}, task=task)


def credit_scorer(model: Any, tokenizer: Any, options: CreditOptions, adapters: Sequence = ()) -> FastLabelScorer:
    """Return the scorer of a task's prompts, whose common beginning runs once."""
    how = options.forms, options.aggregate, options.batch_size, options.task.shared_turns, adapters
    return FastLabelScorer(model, PromptEncoder(tokenizer), *how, label_tokens=options.label_tokens)


@dataclass
class CreditModel:
    """A loaded model with its scorer and calibration. adapter: its name in the scorer, None for the only model."""

    name: str
    task: Task
    scorer: FastLabelScorer | ServedScorer
    calibration: Calibration
    adapter: str | None = None
    abstain_below: float | None = None
    fingerprint: str = ""  # distil.models.model_fingerprint of what is loaded

    @classmethod
    def load(cls, ref: ModelRef, options: CreditOptions) -> CreditModel:
        """Load a base or adapter with its calibration. Raises InputError."""
        fitted = fitted_calibration(ref, options)
        print_note(unfitted_note(ref, fitted, options))
        if server := options.load.server:
            how = options.forms, options.aggregate, options.label_tokens
            return cls._calibrated(ref, ServedScorer(ServedModel(server, ref.path), *how), fitted, options)
        return cls._calibrated(ref, credit_scorer(*load(ref, options.load), options), fitted, options)

    @classmethod
    def load_variants(cls, refs: dict[str, ModelRef], options: CreditOptions) -> dict[str, CreditModel]:
        """Load one base and scorer for all of {variant: model}, the adapters on top of it.
        refs: one without an adapter, all others adapters of it. Raises InputError."""
        base = next(ref for ref in refs.values() if not ref.adapter)
        fitted = {variant: fitted_calibration(ref, options) for variant, ref in refs.items()}
        model, tokenizer = load(base, options.load)
        if folders := {variant: ref.adapter for variant, ref in refs.items() if ref.adapter}:
            for folder in folders.values():
                check_shareable(folder)
            check_used(model := add_adapters(model, folders), folders)
        names = {variant: variant if ref.adapter else BASE if folders else None for variant, ref in refs.items()}
        scorer = credit_scorer(model, tokenizer, options, list(names.values()) if folders else [])
        return {
            variant: cls._calibrated(ref, scorer, fitted[variant], options, names[variant])
            for variant, ref in refs.items()
        }

    @classmethod
    def _calibrated(
        cls, ref: ModelRef, scorer: Any, fitted: Any, options: CreditOptions, adapter: str | None = None
    ) -> CreditModel:
        """Return the model with its calibration, a loaded and unchanged one."""
        fingerprint = model_fingerprint(ref)
        check_unchanged(ref)  # else the prior of one model would be stored as another's
        calibration = fitted or uncalibrated(len(options.labels))
        if not fitted and options.calibration != "none":
            how = options.load.quantization, dtype_name(options.load.compute_dtype), bool(options.load.offload_folder)
            key = f"{fingerprint} {how} {package_versions()}" + (f" served as {ref.served}" if ref.served else "")
            turns = options.task.null_prompts(options.null_prompts)
            prior = label_prior(scorer, key, turns, adapter, verify=bool(ref.served))
            calibration = replace(calibration, method="contextual", prior=prior)
        used = adjusted(calibration, options)
        return cls(ref.name, options.task, scorer, used, adapter, options.abstain_below, fingerprint)

    def prompt(self, features: str, notes: Counter | None = None) -> list[int]:
        """Return token ids of a feature string's prompt; `notes` counts what `Task.canonical` fixed in it."""
        return self.scorer.encoder.prompt(self.task.prompt(features, notes))

    def raw_scores(self, features: Sequence[str], progress: str | None = None) -> np.ndarray:
        """Return raw scores [N, labels] of feature strings; of several processes each scores its share."""
        import numpy as np

        share = own_share(len(features))
        prompts = [self.prompt(text) for text in features[share.start : share.stop]]
        return np.concatenate(gather(self.scorer.score(prompts, progress, [self.adapter] * len(prompts))))

    def responses(self, raw: np.ndarray) -> list[dict]:
        """Return the whitepaper's response (section 7) for each row of raw scores [N, labels].
        With `abstain_below` it has {"extra": {"refer": whether a human should decide}} as well."""
        import numpy as np

        scores, probabilities = self.calibration.scores(raw), self.calibration.probabilities(raw)
        labels, prior = self.task.labels, self._by_label(self.calibration.prior)
        results = []
        for row_scores, row_raw, row_probabilities in zip(scores, raw, probabilities, strict=True):
            second, best = np.sort(row_scores)[-2:]
            result = {"model_name": self.name, "prediction": labels[int(row_scores.argmax())]}
            result |= {"scores": self._by_label(row_scores), "raw_scores": self._by_label(row_raw), "prior": prior}
            result |= {
                "probabilities": self._by_label(row_probabilities),
                "top2_margin": round(float(best - second), 6),
            }
            if self.abstain_below is not None:
                result["extra"] = {"refer": bool(row_probabilities.max() < self.abstain_below)}
            results.append(result)
        return results

    def _by_label(self, values: np.ndarray) -> dict[str, float]:
        return {label: round(float(value), 6) for label, value in zip(self.task.labels, values, strict=True)}
