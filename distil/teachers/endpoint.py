"""A teacher behind an OpenAI-compatible URL: what it is asked, and how its replies become answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from common import SYSTEM_PROMPT, InputError
from distil.endpoint import Client, NoAnswer, Refused
from distil.files import parse_json
from distil.quirks import Reply, first_tokens, read_reply
from distil.teachers.answers import CUT, MARKS, TeacherOptions, bare_text
from distil.teachers.tokens import TokenReader
from distil.thoughts import after_thoughts

ALL_REFUSED = 8  # prompts without one answer: the request is wrong, not these prompts
TOP_LOGPROBS = (20, 5, 0)  # probabilities requested; the next where an endpoint refuses that many
OWN = ("model", "messages", "temperature", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "stream")
CUT_PROMPT = "the endpoint read far fewer tokens than the prompt has; give its model a larger context"


def extra_fields(text: str) -> dict[str, Any]:
    """Return the fields of --extra_body. Raises InputError where it is no JSON object or a flag sets one of them."""
    try:
        fields = parse_json(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f'--extra_body {text}: a JSON object such as {{"reasoning_effort": "low"}} is needed')
    if own := [name for name in (*OWN, "n") if name in fields]:
        raise InputError(f"--extra_body: the script and its flags set {', '.join(own)}; leave it out")
    return fields


class HttpTeacher(Client):
    """A model behind an OpenAI-compatible endpoint.
    A prompt that is refused for good, or gets no answer in all tries, is left out. answered: whether the endpoint has
    given an answer to a prompt of this run that is not left out; student: path of the base model whose tokens answers
    must have, with options.top_k."""

    def __init__(self, options: TeacherOptions, answered: bool = False, student: str | None = None):
        super().__init__(options.server)
        self.options, self.answered = options, answered
        self._top = max(options.top_k, TOP_LOGPROBS[0] if options.labels else 0)
        self._tokens = TokenReader(student, options.top_k) if student else None

    def answers(self, prompts: dict[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, answer) of each numbered user turn, as they come; one that got none in all tries is missing.
        Raises InputError where the endpoint refuses key, model or every request, or answers none of the first, and
        KeyboardInterrupt after Ctrl-C; see `Client.results`."""
        given_up, failures = 0, []
        refused: list[tuple[int, dict[str, Any]]] = []  # yielded once another prompt got an answer
        for number, answer in self.results(prompts, self._try):
            if answer and "left_out" in answer:
                failures.append(answer["left_out"])
            elif answer:
                self.answered = True
            if answer and "usage" in answer:  # a reply, which is paid for whatever it is
                yield number, answer
            elif answer:
                refused.append((number, answer))
            if self.answered:
                yield from refused
                refused.clear()
            given_up += answer is None
            self.problem = self.problem or self._all_failed(failures, given_up, len(prompts))

    def _all_failed(self, failures: list[str], given_up: int, total: int) -> InputError | None:
        """Return the error of an endpoint that has answered no prompt yet and failed for as many as are tried."""
        if not self.answered and len(failures) == min(ALL_REFUSED, total):
            return InputError(f"{self.url} {failures[0]}")
        if not self.answered and given_up == ALL_REFUSED:
            return InputError(f"{self.url}: {given_up} prompts got no answer in all tries")
        return None

    def _try(self, prompt: str) -> dict[str, Any] | None:
        """Return the answer, None where all tries failed. Raises InputError for a refusal of key or model."""
        top = self._top
        try:
            return self.tried(lambda: self._answer(read_reply(self._request(prompt, top)), prompt))
        except Refused as refusal:
            if not top or "logprob" not in refusal.words:
                return {"teacher_output": "", "left_out": str(refusal)}
            self._top = min(self._top, next(fewer for fewer in TOP_LOGPROBS if fewer < top))
            if self._top and self._tokens:
                self.report(f"{self.url} {refusal}: continuing with --top_k {self._top}")
            if not self._top and self._tokens:
                raise InputError(f"{self.url} {refusal}: --top_k needs log-probabilities") from None
            if not self._top:
                self.report(f"{self.url} {refusal}: continuing without probabilities, there are no label_probs")
            return self._try(prompt)
        except NoAnswer as error:
            if not self._stopped.is_set():
                self.report(f"{self.url}: a prompt is given up: {error.reason}")
            return None

    def _request(self, prompt: str, top_logprobs: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        how = {"temperature": self.options.temperature, "max_tokens": self.options.max_new_tokens}
        how |= {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        body = {"model": self.server.model, "messages": messages} | how
        return self.sent("/chat/completions", body | dict(self.options.extra_body))

    def _answer(self, reply: Reply, prompt: str) -> dict[str, Any]:
        """Return the answer in a reply. One that is complete but without text, or that was cut or filtered, is left
        out: a retry would get it again."""
        labels = self.options.labels
        text = reply.text.strip().encode("utf-8", "replace").decode()  # half a surrogate pair
        usage = [reply.read or 0, reply.written or 0] if reply.read or reply.written else None
        answer: dict[str, Any] = {"teacher_output": text, "usage": usage}
        starts = tuple(label.casefold() for label in labels)
        begins = any(one.casefold().startswith(starts) for one in (text, text.lstrip(MARKS)) if starts)
        if reply.cut and (self.options.rationale or not begins):
            return answer | {"left_out": CUT}
        if reply.refused:
            return answer | {"left_out": "is a refusal"}
        if not text or not (reply.complete or reply.cut):
            reason = f"ends with finish_reason {reply.finish or 'none'}"
            return answer | {"left_out": reason if text else f"{reason}, no text"}
        if reply.read and reply.read < least_tokens(f"{SYSTEM_PROMPT}\n\n{prompt}"):
            return answer | {"left_out": CUT_PROMPT}
        thought = reply.thought or after_thoughts(text) != text  # the first token is one of the thought
        probabilities = {} if thought else label_probabilities(reply, labels)
        answer |= {"label_probs": probabilities} if probabilities else {}
        if not self._tokens:
            return answer
        try:
            row = self._tokens.row(bare_text(text) or "", reply.logprobs.get("content") or [])
            return answer | {"token_probs": row.packed()}
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            reason = f"does not have the tokens of {self.options.tokenizer} (--tokenizer): {self.line(error)}"
            return answer | {"left_out": reason}


def least_tokens(text: str) -> int:
    """Return a number of tokens that no tokenizer goes below for a text: half its words between blanks. A token has no
    more than one in nearly all tokenizers; SuperBPE's go beyond words, and English has 0.9 of them for a word."""
    return len(re.findall(r"\w\S*", text)) // 2


def label_probabilities(reply: Reply, labels: Sequence[str]) -> dict[str, float]:
    """Return {label: probability} from a reply's log-probabilities of its first token.
    Empty where there are none (some endpoints accept the request and send none), labels have less than half, or a
    token that several labels begin with has more than a few percent: it does not distinguish them."""
    mass, shared = dict.fromkeys(labels, 0.0), 0.0
    for token in first_tokens(reply.logprobs) if labels else []:
        text = token["token"].strip().casefold()
        starts = [label for label in labels if text and label.casefold().startswith(text)]
        if len(starts) == 1:
            mass[starts[0]] += math.exp(token["logprob"])
        elif starts:
            shared += math.exp(token["logprob"])
    total = sum(mass.values())
    return {label: p / total for label, p in mass.items()} if total >= 0.5 and shared < 0.05 else {}
