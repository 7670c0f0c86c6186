"""Teachers that answer prompts for distillation: a model through transformers, or one behind an OpenAI-compatible URL.

Apart from kd_prepare.py, which checks and writes what they say. A teacher yields (number, answer) as answers come, in
any order; an answer is {"teacher_output"} and, where the teacher's likelihoods can be read, "label_probs". With
"left_out" it says why it is none to learn from: the prompt was refused, or the text stops in the middle.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

import numpy as np
from tqdm import tqdm

from common import SYSTEM_PROMPT, Calibration, LabelScorer, PromptEncoder, likeliest, row_losses
from files import InputError
from models import adapter_config, check_model_name, load_model, pack_for_decoding

RATIONALE = "Answer with the label first, then give the reason in one short sentence."
PROMPT_VERSION = 1  # of RATIONALE and SYSTEM_PROMPT; kept with every answer
CUT = "cut off at --max_new_tokens"
REFUSED = (400, 413, 422)  # statuses that may be about one prompt
ALL_REFUSED = 8  # prompts without one answer: the request is wrong, not these
PRIOR_PROMPTS = 128  # from which a model teacher's shift is estimated
FEW_PROMPTS = 32  # their mean says more about them than about the model
MIN_SHARE = 1e-4  # of a label that is not among an endpoint's likeliest tokens
TOP_LOGPROBS = {20: 5, 5: 0}  # likeliest tokens asked for, and how many where an endpoint refuses that
LONGEST_PAUSE = 600.0  # seconds; an endpoint that asks for a longer one is asked sooner


def user_turn(prompt: str, rationale: bool) -> str:
    """What a teacher is asked: the student's own prompt, with the wish for a reason after it."""
    return f"{prompt}\n{RATIONALE}" if rationale else prompt


def label_of(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer begins with, or else the only one that it names; None where there is no such one, where
    the answer repeats the choice ("Good, Standard or Bad") or denies it ("not good")."""
    text = answer.rpartition("</think>")[2].lstrip("*\"'`#-_ \n").casefold()
    word = {label: rf"(?<!\w){re.escape(label.casefold())}(?!\w)" for label in labels}
    any_label = "|".join(word.values())
    first = [label for label in labels if re.match(word[label], text)]
    found = first or [label for label in labels if re.search(word[label], text)]
    longest = max(found, key=len, default="")
    if not found or not all(label in longest for label in found):
        return None
    denied = r"not|no|never|\w+n't|cannot|below|above|than"
    if first:
        rest = text[len(longest) :]
        unsure = rf"[\s,/|]*(or\b|and\b)?\s*({any_label})|\s*\?|\s+(\w+\s+)?({denied})\b"
        return None if re.match(unsure, rest) else longest
    return None if re.search(rf"\b({denied})\s+(\w+\s+){{0,5}}{word[longest]}", text) else longest


def label_first(answer: str, label: str, rationale: bool) -> str:
    """The answer with its label at the beginning, where the student's are scored; without a reason it is all."""
    if not rationale:
        return label
    text = answer.rpartition("</think>")[2].lstrip("*\"'`#-_ \n")
    return text if text.startswith(label) else f"{label}. {text}"


def teacher_calibration(
    method: str, raw: np.ndarray, prompts: Sequence[str], gold: Sequence[str | None], labels: Sequence[str], least: str
) -> Calibration:
    """The calibration that --calibration names, of raw label scores [prompts, labels]: batch subtracts their mean
    (Zhou et al. 2023); auto takes what makes the gold answers likelier, or `least` where too few are known."""
    zero = np.zeros(len(labels))
    choices = {"none": Calibration("none", zero, zero), "batch": Calibration("batch", raw.mean(axis=0), zero)}
    if method != "auto":
        return choices[method]
    rows = [i for i, answer in enumerate(gold) if answer in labels]
    chosen = least
    if len(rows) >= FEW_PROMPTS:
        answers = np.array([labels.index(gold[i]) for i in rows])
        losses = {name: row_losses(c.probabilities(raw[rows]), answers) for name, c in choices.items()}
        chosen = likeliest(losses, [prompts[i] for i in rows])
    tqdm.write(f"calibration of the teacher: {chosen}", file=sys.stderr)  # above the bar of the answers
    return choices[chosen]


def calibrate_answers(
    answers: list[dict[str, Any]],
    prompts: Sequence[str],
    gold: Sequence[str | None],
    labels: Sequence[str],
    method: str,
) -> list[dict[str, Any]]:
    """An endpoint's answers, those with label_probs calibrated (see `teacher_calibration`): their label is then the
    likeliest. As they are for `none`, which auto takes without gold answers: such models were mostly trained on."""
    read = [i for i, answer in enumerate(answers) if "label_probs" in answer]
    if not read or method == "none":
        return answers
    raw = np.log(np.maximum([[answers[i]["label_probs"][label] for label in labels] for i in read], MIN_SHARE))
    known = [gold[i] for i in read]
    calibration = teacher_calibration(method, raw, [prompts[i] for i in read], known, labels, least="none")
    if calibration.method == "none":
        return answers
    result = list(answers)
    for i, row in zip(read, calibration.probabilities(raw), strict=True):
        result[i] = answers[i] | answer_of_probabilities(dict(zip(labels, row.tolist(), strict=True)))
    return result


class ModelTeacher:
    """A base, folder or adapter through transformers. Label tasks are answered by label likelihood, as the student
    will be; their calibration (see `teacher_calibration`) is the mean over prompts, since a teacher has no prompts
    without content for an unknown task: what a base model needs, and what an adapter that was trained on balanced rows
    is harmed by. So without gold answers auto goes by the kind of teacher.

    turns: all user turns of the run, also those that have an answer or are another process's: the shift is theirs.
    gold: their right answers, as far as they are known."""

    def __init__(
        self,
        model_dir: str,
        args: argparse.Namespace,
        turns: Sequence[str] = (),
        gold: Sequence[str | None] = (),
    ):
        check_model_name(model_dir)
        self.model_dir, self.args = model_dir, args
        known = list(zip(turns, gold, strict=True))
        self.sample = random.Random(0).sample(known, min(PRIOR_PROMPTS, len(known)))
        self.model, self.tokenizer = load_model(model_dir, args.quantization, args.compute_dtype, args.offload_folder)
        self.encoder = PromptEncoder(self.tokenizer)

    def _calibration(self, scorer: LabelScorer, labels: Sequence[str]) -> Calibration:
        if self.args.calibration == "none":
            return Calibration("none", np.zeros(len(labels)), np.zeros(len(labels)))
        turns, gold = [turn for turn, _ in self.sample], [answer for _, answer in self.sample]
        least = "none" if adapter_config(self.model_dir) or len(turns) < FEW_PROMPTS else "batch"
        raw = scorer.raw_scores(turns)
        return teacher_calibration(self.args.calibration, raw, turns, gold, labels, least)

    def answers(self, prompts: dict[int, str], labels: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, answer) of each numbered prompt. Raises InputError for a prompt that does not fit the context."""
        import torch

        if labels:
            forms = {label: [label] for label in labels}
            scorer = LabelScorer(self.model, self.encoder, forms, batch_size=self.args.batch_size)
            calibration = self._calibration(scorer, labels)
        writes = not labels or self.args.rationale
        if writes:
            pack_for_decoding(self.model)
        numbers = sorted(prompts, key=lambda number: len(prompts[number]), reverse=True)
        for first in range(0, len(numbers), self.args.batch_size):
            chosen = numbers[first : first + self.args.batch_size]
            turns = [prompts[number] for number in chosen]
            torch.manual_seed(self.args.seed + (chosen[0] << 32))  # the same samples also where a killed run goes on
            answers: list[dict[str, Any]] = [{} for _ in chosen]
            starts = [self.encoder.prompt(turn) for turn in turns]
            if labels:
                for i, row in enumerate(calibration.probabilities(scorer.raw_scores(turns))):
                    answers[i] = answer_of_probabilities(dict(zip(labels, row.tolist(), strict=True)))
                    starts[i] += self.encoder.text(answers[i]["teacher_output"])
            if writes:
                for answer, (text, ended) in zip(answers, self._written(starts), strict=True):
                    answer["teacher_output"] = answer.get("teacher_output", "") + text
                    if not ended:
                        answer["left_out"] = CUT
            yield from zip(chosen, answers, strict=True)

    def _written(self, starts: list[list[int]]) -> list[tuple[str, bool]]:
        """What the model writes after each start (token ids), and whether it came to the end of its turn."""
        import torch
        from transformers import GenerationConfig

        width = max(map(len, starts))
        context = self.model.config.get_text_config().max_position_embeddings
        if width + self.args.max_new_tokens > context:
            raise InputError(
                f"a prompt of {width} tokens and --max_new_tokens {self.args.max_new_tokens} exceed the teacher's "
                f"context of {context}; lower --max_new_tokens or shorten the prompts"
            )
        sampling = {"do_sample": True, "temperature": self.args.temperature}
        config = GenerationConfig(
            max_new_tokens=self.args.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if self.args.temperature else {"do_sample": False}),
        )
        pads = [width - len(start) for start in starts]
        filler = self.tokenizer.pad_token_id
        ids = torch.tensor([[filler] * pad + start for pad, start in zip(pads, starts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        device = self.model.device
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return list(zip(texts, (made[:, width:] == self.tokenizer.eos_token_id).any(dim=1).tolist(), strict=True))


def seconds_of(retry_after: str) -> float:
    """Seconds from now that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); 0 for neither."""
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # TypeError: a date without a time zone
        return 0.0


class HttpTeacher:
    """A model behind an OpenAI-compatible endpoint. What fails for a while (429, 5xx, timeouts, closed connections,
    half answers) is asked again with growing pauses; a prompt that is refused for good is left out. answered: whether
    the endpoint has answered a prompt of this run before, and so does not refuse all."""

    def __init__(self, args: argparse.Namespace, answered: bool = False):
        from openai import OpenAI

        self.args, self.answered = args, answered
        self._said: set[str] = set()
        self._top = max(TOP_LOGPROBS)
        self._stopped = Event()
        # Retries are ours: the client's own do not cover an answer that came as half a JSON text.
        self.client = OpenAI(
            base_url=args.teacher_url,
            api_key=os.environ.get(args.api_key_env) or "none",
            timeout=args.timeout,
            max_retries=0,
        )

    def answers(self, prompts: dict[int, str], labels: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, answer) of each numbered prompt, as they come; a prompt that got none in all tries is left out.
        Raises InputError where the endpoint refuses key, model or every request, or answers none of the first, after
        what is under way has come."""
        problem: BaseException | None = None
        given_up = 0
        refused: list[tuple[int, dict[str, Any]]] = []  # told once another got an answer
        with ThreadPoolExecutor(self.args.concurrency) as pool:
            asked = {pool.submit(self._ask, prompt, labels): number for number, prompt in prompts.items()}
            finished = as_completed(list(asked))
            try:
                while asked:
                    try:
                        done = next(finished)
                        answer = None if done.cancelled() else done.result()
                    except InputError as error:
                        answer, problem = None, problem or error
                    except KeyboardInterrupt as stop:  # what is under way was paid for; a second one ends at once
                        if isinstance(problem, KeyboardInterrupt):
                            raise
                        problem, finished = stop, as_completed(list(asked))
                        self._give_up(asked)
                        continue
                    number = asked.pop(done)
                    if answer and answer["teacher_output"]:
                        self.answered = True
                        yield number, answer
                    elif answer:
                        refused.append((number, answer))
                    if self.answered:
                        yield from refused
                        refused.clear()
                    elif len(refused) == min(ALL_REFUSED, len(prompts)) and not problem:
                        problem = InputError(f"{self.args.teacher_url} {refused[0][1]['left_out']}")
                    given_up += answer is None
                    if not (self.answered or problem) and given_up == ALL_REFUSED:
                        problem = InputError(f"{self.args.teacher_url}: {given_up} prompts got no answer in all tries")
                    if problem and not self._stopped.is_set():
                        self._give_up(asked)
            finally:
                self._give_up(asked)
                pool.shutdown(cancel_futures=True)
        if problem:
            raise problem

    def _give_up(self, asked: Iterable[Future]) -> None:
        """Ask nothing more; what is under way still comes."""
        self._stopped.set()
        for future in asked:
            future.cancel()

    def _pause(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _ask(self, prompt: str, labels: Sequence[str]) -> dict[str, Any] | None:
        import openai

        why: BaseException | None = None
        for attempt in range(self.args.retries + 1):
            pause = min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5)
            top = self._top if labels else 0
            try:
                return self._answer(self._request(prompt, top), labels)
            except openai.APIStatusError as error:
                text = f"answers {error.status_code}: {' '.join(str(error).split())[:200]}"
                if error.status_code in REFUSED and top and "logprob" in str(error):
                    self._top = min(self._top, TOP_LOGPROBS[top])
                    if not self._top:
                        self._say(
                            f"{self.args.teacher_url} {text}: asked without likelihoods, there are no label_probs"
                        )
                    return self._ask(prompt, labels)
                if error.status_code in REFUSED:
                    return {"teacher_output": "", "left_out": text}
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    raise InputError(f"{self.args.teacher_url} {text}") from None
                pause = max(pause, min(LONGEST_PAUSE, seconds_of(error.response.headers.get("retry-after", ""))))
                if pause > 60:
                    self._say(
                        f"{self.args.teacher_url} answers {error.status_code} and wants a pause of {pause:.0f} s"
                    )
                why = error
            # Half an answer, or one in another form, raises what reading it raises.
            except (openai.APIError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
                why = error.__cause__ or error
            if self._stopped.is_set():
                return None
            if attempt < self.args.retries:
                self._pause(pause)
        self._say(f"{self.args.teacher_url}: a prompt is given up: {' '.join(str(why).split())[:200]}")
        return None

    def _say(self, text: str) -> None:
        """Once, however many prompts it happens to."""
        if text not in self._said:
            self._said.add(text)
            tqdm.write(text, file=sys.stderr)

    def _request(self, prompt: str, top_logprobs: int) -> Any:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        wanted = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        return self.client.chat.completions.create(
            model=self.args.teacher_model,
            messages=messages,
            temperature=self.args.temperature,
            max_tokens=self.args.max_new_tokens,
            **wanted,
        )

    def _answer(self, reply: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Raises ValueError for half a reply. A whole one without text, or that was cut or filtered, is an answer to
        leave out: it would be the same again. Label probabilities only where the endpoint sent likelihoods: some take
        the wish for them and send none."""
        choice = reply.choices[0] if getattr(reply, "choices", None) else None
        if choice is None or not (choice.finish_reason or choice.message.content):
            raise ValueError("no text")
        text = (choice.message.content or "").strip().encode("utf-8", "replace").decode()  # half a surrogate pair
        answer: dict[str, Any] = {"teacher_output": text}
        if choice.finish_reason == "length" and (not labels or self.args.rationale or not text):
            return answer | {"left_out": CUT}
        if not text or choice.finish_reason == "content_filter":
            return answer | {
                "left_out": f"ends with finish_reason {choice.finish_reason}" + (", no text" * (not text))
            }
        first = (getattr(choice.logprobs, "content", None) or [None])[0]
        mass = dict.fromkeys(labels, 0.0)
        for token in (first.top_logprobs or []) if labels and first else []:
            text = token.token.strip().casefold()
            starts = [label for label in labels if text and label.casefold().startswith(text)]
            if len(starts) == 1:  # a token that begins two labels says nothing
                mass[starts[0]] += math.exp(token.logprob)
        total = sum(mass.values())
        return answer | ({"label_probs": {label: p / total for label, p in mass.items()}} if total >= 0.5 else {})


def answer_of_probabilities(probabilities: dict[str, float]) -> dict[str, Any]:
    """The most probable label as the answer, with the probabilities."""
    return {
        "teacher_output": max(probabilities, key=probabilities.__getitem__),
        "label_probs": {label: round(p, 4) for label, p in probabilities.items()},
    }
