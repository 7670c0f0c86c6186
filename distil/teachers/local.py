"""A teacher that runs here: a base model, model folder or adapter through transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from common import Calibration, PromptEncoder
from distil.calibration import uncalibrated
from distil.generation import generate
from distil.models import ModelRef, load
from distil.scoring import FastLabelScorer
from distil.teachers.answers import CUT, FEW_PROMPTS, TeacherOptions, answer_of_probabilities, teacher_calibration
from distil.workarounds import pack_for_decoding

PRIOR_PROMPTS = 128  # from which the shift of a model's label scores is estimated


class ModelTeacher:
    """A model that answers label tasks by the labels' log-probabilities, as its student will, and writes others.

    Label scores are calibrated by their mean over prompts (`teacher_calibration`), since an unknown task has no
    content-free prompts. A base model needs it, an adapter that was trained on balanced rows is harmed by it: without
    gold answers 'auto' goes by the kind of teacher.
    turns: all user turns of the run, also those that are answered or another process's, since the mean is over them.
    gold: [turns] their right answers, None where unknown."""

    def __init__(
        self, ref: ModelRef, options: TeacherOptions, turns: Sequence[str] = (), gold: Sequence[str | None] = ()
    ):
        self.ref, self.options = ref, options
        pairs = list(zip(turns, gold, strict=True))
        self.sample = random.Random(0).sample(pairs, min(PRIOR_PROMPTS, len(pairs)))
        self.model, self.tokenizer = load(ref, options.load)
        self.encoder = PromptEncoder(self.tokenizer)

    def scorer(self, labels: Sequence[str]) -> FastLabelScorer:
        """Return the scorer of a task with these labels."""
        forms = {label: [label] for label in labels}
        how = {"batch_size": self.options.batch_size, "label_tokens": self.options.label_tokens}
        return FastLabelScorer(self.model, self.encoder, forms, **how)

    def answers(self, prompts: dict[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, answer) of each user turn, the longest first. Raises InputError for one that is too long."""
        import torch

        labels, size = self.options.labels, self.options.batch_size
        if labels:
            scorer = self.scorer(labels)
            calibration = self._calibration(scorer)
        writes = not labels or self.options.rationale
        if writes:
            pack_for_decoding(self.model)
        # sort: the order decides which sample a seed draws for which row
        how = {"temperature": self.options.temperature, "sort": False, "skip_special_tokens": True}
        how |= {"goes_on": bool(labels)}
        how |= {"ends": [self.tokenizer.eos_token_id], "batch_size": size}
        numbers = sorted(prompts, key=lambda number: len(prompts[number]), reverse=True)
        for first in range(0, len(numbers), size):
            chosen = numbers[first : first + size]
            turns = [prompts[number] for number in chosen]
            torch.manual_seed(self.options.seed + (chosen[0] << 32))  # the same samples when a killed run is resumed
            answers: list[dict[str, Any]] = [{} for _ in chosen]
            starts = [self.encoder.prompt(turn) for turn in turns]
            if labels:
                rows = calibration.probabilities(scorer.raw_scores(turns))
                answers = [answer_of_probabilities(labels, row) for row in rows]
                starts = [s + self.encoder.text(a["teacher_output"]) for s, a in zip(starts, answers, strict=True)]
            if writes:
                texts = generate(self.model, self.tokenizer, starts, self.options.max_new_tokens, **how)
                for answer, written in zip(answers, texts, strict=True):
                    answer["teacher_output"] = answer.get("teacher_output", "") + written.text
                    if not written.ended:
                        answer["left_out"] = CUT
            yield from zip(chosen, answers, strict=True)

    def _calibration(self, scorer: FastLabelScorer) -> Calibration:
        labels, method = self.options.labels, self.options.calibration
        if method == "none":
            return uncalibrated(len(labels))
        turns, gold = [turn for turn, _ in self.sample], [answer for _, answer in self.sample]
        least = "none" if self.ref.adapter or len(turns) < FEW_PROMPTS else "batch"
        return teacher_calibration(method, scorer.raw_scores(turns), turns, gold, labels, least)
