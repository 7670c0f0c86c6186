"""A teacher that runs here: a base model, model folder or adapter through transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from common import Calibration, PromptEncoder
from distil.calibration import uncalibrated
from distil.generation import generate
from distil.heads import answer_logits
from distil.models import ModelRef, load
from distil.processes import print_note
from distil.scoring import FastLabelScorer
from distil.support import context_length
from distil.teachers.answers import (
    CUT,
    FEW_PROMPTS,
    UNCALIBRATED,
    TeacherOptions,
    answer_of_probabilities,
    bare_text,
    teacher_calibration,
)
from distil.token_probs import TokenRow
from distil.workarounds import pack_for_decoding

if TYPE_CHECKING:
    import torch

PRIOR_PROMPTS = 128  # from which the shift of a model's label scores is estimated
TOKENS = 2048  # that several rows may have together in a forward for token probabilities; a longer row has its own


class ModelTeacher:
    """A model that answers label tasks by the labels' log-probabilities, as its student will, and writes others.

    Label scores are calibrated by their mean over prompts (`teacher_calibration`), since an unknown task has no
    content-free prompts. A base model needs it, an adapter that was trained on balanced rows is harmed by it: without
    gold answers 'auto' goes by the kind of teacher.
    With options.top_k an answer gets "token_probs", also a gold one (options.answers), which is then not written anew.
    turns: all user turns of the run, also those that are answered or another process's, since the mean is over them.
    gold: [turns] their right answers, None where unknown."""

    def __init__(
        self, ref: ModelRef, options: TeacherOptions, turns: Sequence[str] = (), gold: Sequence[str | None] = ()
    ):
        self.ref, self.options, self.gold = ref, options, gold
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

        labels, size, gold = self.options.labels, self.options.batch_size, self.options.answers == "gold"
        if labels:
            scorer = self.scorer(labels)
            calibration = self._calibration(scorer)
            if self.options.top_k and calibration.method != "none":
                print_note(UNCALIBRATED)
        writes = self.options.rationale or not (labels or gold)
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
            answers = [{"teacher_output": self.gold[number]} if gold else {} for number in chosen]
            starts = prompts_ids = [self.encoder.prompt(turn) for turn in turns]
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
            if self.options.top_k:
                written = [bare_text(answer["teacher_output"]) or "" for answer in answers]
                texts = [self.gold[number] for number in chosen] if gold else written
                self._add_token_probs(answers, prompts_ids, texts)
            yield from zip(chosen, answers, strict=True)

    def _add_token_probs(self, answers: list[dict[str, Any]], prompts: list[list[int]], texts: Sequence[str]) -> None:
        """Add "token_probs" of the texts [answers] after the prompts, but to answers that are left out."""
        context = context_length(self.model.config.get_text_config())
        rows = [(prompt, self.encoder.completion(text)) for prompt, text in zip(prompts, texts, strict=True)]
        for answer, (prompt, completion) in zip(answers, rows, strict=True):
            if len(prompt) + len(completion) > context:
                answer.setdefault("left_out", f"longer with its prompt than the teacher's context of {context}")
        kept = [i for i, answer in enumerate(answers) if "left_out" not in answer]
        found = token_rows(self.model, [rows[i] for i in kept], self.options.top_k, self.tokenizer.pad_token_id)
        for i, row in zip(kept, found, strict=True):
            answers[i]["token_probs"] = row.packed()

    def _calibration(self, scorer: FastLabelScorer) -> Calibration:
        labels, method = self.options.labels, self.options.calibration
        if method == "none":
            return uncalibrated(len(labels))
        turns, gold = [turn for turn, _ in self.sample], [answer for _, answer in self.sample]
        least = "none" if self.ref.adapter or len(turns) < FEW_PROMPTS else "batch"
        return teacher_calibration(method, scorer.raw_scores(turns), turns, gold, labels, least)


def token_rows(model: Any, rows: Sequence[tuple[list[int], list[int]]], k: int, filler: int) -> Iterator[TokenRow]:
    """Yield the token probabilities of each row's completion, as the model predicts it; rows: (prompt, completion) as
    token ids. k: at most the vocabulary. Raises FloatingPointError where the model returns NaN."""
    import torch

    while rows:
        size = max(1, TOKENS // max(len(prompt) + len(completion) for prompt, completion in rows))
        batch, rows = rows[:size], rows[size:]
        counts = [len(completion) for _, completion in batch]
        with torch.inference_mode():
            parts = [most_probable(logits, k) for logits in answer_logits(model, batch, filler)]
            arrays = [torch.cat(part).cpu().split(counts) for part in zip(*parts, strict=True)]
        for (_, completion), *row in zip(batch, *arrays, strict=True):
            if row[-1].isnan().any():
                raise FloatingPointError("the model's scores are NaN; try --compute_dtype float32")
            yield TokenRow(torch.tensor(completion, dtype=torch.int32).numpy(), *(array.numpy() for array in row))


def most_probable(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the k most probable tokens [positions, k], sorted, their log-probabilities and, [positions], the
    log of what all others have together, of logits [positions, vocabulary] in float32, which are overwritten."""
    total = logits.logsumexp(dim=-1)
    best, ids = logits.topk(min(k, logits.shape[-1]))
    rest = logits.scatter_(1, ids, -float("inf")).logsumexp(dim=-1)  # 1 - their sum would be rounded away
    return ids.int(), (best - total[:, None]).half(), (rest - total).half()
