"""A teacher behind an OpenAI-compatible URL: what it is asked, and how its replies become answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from common import SYSTEM_PROMPT, InputError
from distil.endpoint import Client, NoAnswer, Refused, Server
from distil.teachers.answers import CUT, TeacherOptions

ALL_REFUSED = 8  # prompts without one answer: the request is wrong, not these prompts
TOP_LOGPROBS = {20: 5, 5: 0}  # probabilities requested, and how many where an endpoint refuses that


class HttpTeacher(Client):
    """A model behind an OpenAI-compatible endpoint.
    A prompt that is refused for good, or gets no answer in all tries, is left out. answered: whether the endpoint has
    answered a prompt of this run."""

    def __init__(self, options: TeacherOptions, answered: bool = False):
        how = options.api_key_env, options.concurrency, options.retries, options.timeout
        super().__init__(Server(options.teacher_url, options.teacher_model, *how))
        self.options, self.answered = options, answered
        self._top = max(TOP_LOGPROBS) if options.labels else 0

    def answers(self, prompts: dict[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, answer) of each numbered user turn, as they come; one that got none in all tries is missing.
        Raises InputError where the endpoint refuses key, model or every request, or answers none of the first, and
        KeyboardInterrupt after Ctrl-C; see `Client.results`."""
        given_up = 0
        refused: list[tuple[int, dict[str, Any]]] = []  # yielded once another prompt got an answer
        for number, answer in self.results(prompts, self._try):
            if answer and answer["teacher_output"]:
                self.answered = True
                yield number, answer
            elif answer:
                refused.append((number, answer))
            if self.answered:
                yield from refused
                refused.clear()
            given_up += answer is None
            self.problem = self.problem or self._all_failed(refused, given_up, len(prompts))

    def _all_failed(self, refused: list[tuple[int, dict[str, Any]]], given_up: int, total: int) -> InputError | None:
        """Return the error of an endpoint that has answered no prompt yet and failed for as many as are tried."""
        if not self.answered and len(refused) == min(ALL_REFUSED, total):
            return InputError(f"{self.url} {refused[0][1]['left_out']}")
        if not self.answered and given_up == ALL_REFUSED:
            return InputError(f"{self.url}: {given_up} prompts got no answer in all tries")
        return None

    def _try(self, prompt: str) -> dict[str, Any] | None:
        """Return the answer, None where all tries failed. Raises InputError for a refusal of key or model."""
        top = self._top
        try:
            return self.tried(lambda: self._answer(self._request(prompt, top)))
        except Refused as refusal:
            if not top or "logprob" not in refusal.words:
                return {"teacher_output": "", "left_out": str(refusal)}
            self._top = min(self._top, TOP_LOGPROBS[top])
            if not self._top:
                self.report(f"{self.url} {refusal}: continuing without probabilities, there are no label_probs")
            return self._try(prompt)
        except NoAnswer as error:
            if not self._stopped.is_set():
                self.report(f"{self.url}: a prompt is given up: {error.reason}")
            return None

    def _request(self, prompt: str, top_logprobs: int) -> Any:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        how = {"temperature": self.options.temperature, "max_tokens": self.options.max_new_tokens}
        how |= {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        return self.client.chat.completions.create(model=self.options.teacher_model, messages=messages, **how)

    def _answer(self, reply: Any) -> dict[str, Any]:
        """Return the answer in a reply. Raises ValueError for half a reply.
        A complete one without text, or that was cut or filtered, is left out: a retry would get it again."""
        labels = self.options.labels
        choice = reply.choices[0] if getattr(reply, "choices", None) else None
        if choice is None or not (choice.finish_reason or choice.message.content):
            raise ValueError("no text")
        text = (choice.message.content or "").strip().encode("utf-8", "replace").decode()  # half a surrogate pair
        answer: dict[str, Any] = {"teacher_output": text}
        if choice.finish_reason == "length" and (not labels or self.options.rationale or not text):
            return answer | {"left_out": CUT}
        if not text or choice.finish_reason == "content_filter":
            reason = f"ends with finish_reason {choice.finish_reason}"
            return answer | {"left_out": reason if text else f"{reason}, no text"}
        probabilities = label_probabilities(choice, labels)
        return answer | ({"label_probs": probabilities} if probabilities else {})


def label_probabilities(choice: Any, labels: Sequence[str]) -> dict[str, float]:
    """Return {label: probability} from a choice's log-probabilities of its first token.
    Empty where there are none (some endpoints accept the request and send none), labels have less than half, or a
    token that several labels begin with has more than a few percent: it does not distinguish them."""
    first = (getattr(choice.logprobs, "content", None) or [None])[0]
    mass, shared = dict.fromkeys(labels, 0.0), 0.0
    for token in (first.top_logprobs or []) if labels and first else []:
        text = token.token.strip().casefold()
        starts = [label for label in labels if text and label.casefold().startswith(text)]
        if len(starts) == 1:
            mass[starts[0]] += math.exp(token.logprob)
        elif starts:
            shared += math.exp(token.logprob)
    total = sum(mass.values())
    return {label: p / total for label, p in mass.items()} if total >= 0.5 and shared < 0.05 else {}
