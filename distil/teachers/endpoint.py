"""A teacher behind an OpenAI-compatible URL, which may be busy, break off, refuse prompts or end at any moment."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import signal
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Event, Thread, current_thread, main_thread
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from common import SYSTEM_PROMPT, InputError
from distil.teachers.answers import CUT, TeacherOptions, shown_url

REFUSED = (400, 413, 422)  # statuses that may be about one prompt
BUSY = (408, 409, 425, 429)  # statuses below 500 that are worth another try
ALL_REFUSED = 8  # prompts without one answer: the request is wrong, not these prompts
TOP_LOGPROBS = {20: 5, 5: 0}  # probabilities requested, and how many where an endpoint refuses that
LONGEST_PAUSE = 600.0  # seconds; where an endpoint asks for a longer pause it is not waited for


@contextlib.contextmanager
def deferred_interrupt(notify: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call `notify`, and raise KeyboardInterrupt only at the end of the block.
    Raised where it came, it would lose what the block holds at that moment. A second one acts as before. notify: must
    be safe in the middle of itself, as SimpleQueue.put is."""
    before, interrupted = signal.getsignal(signal.SIGINT), False

    def first(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)
        notify()

    if current_thread() is not main_thread() or not callable(before):  # Ctrl-C does not come here, or is ignored
        yield
        return
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


class HttpTeacher:
    """A model behind an OpenAI-compatible endpoint.
    What fails for a while (429, 5xx, timeouts, closed connections, half replies) is retried with growing pauses; a
    prompt that is refused for good is left out. answered: whether the endpoint has answered a prompt of this run."""

    def __init__(self, options: TeacherOptions, answered: bool = False):
        from openai import OpenAI

        self.options, self.url, self.answered = options, shown_url(options.teacher_url), answered
        self._reported: set[str] = set()
        self._top = max(TOP_LOGPROBS) if options.labels else 0
        self._stopped = Event()
        # Retries are ours: the client's own do not cover a reply that is half a JSON text.
        key = os.environ.get(options.api_key_env) or "none"
        # A password goes into a header and a query behind the path: the address in an exception or log has neither.
        parts, url = urlsplit(options.teacher_url), self.url.partition("?")[0]
        for name in ("openai", "httpx", "httpx2") if parts.query else ():
            logging.getLogger(name).setLevel(logging.WARNING)  # they would log the query
        user = unquote(parts.netloc.rpartition("@")[0])
        self._secrets = [user, user.partition(":")[2], parts.query, *(value for _, value in parse_qsl(parts.query))]
        headers = {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else None
        how = {"default_headers": headers, "default_query": dict(parse_qsl(parts.query, True))}
        self.client = OpenAI(base_url=url, api_key=key, timeout=options.timeout, max_retries=0, **how)

    def answers(self, prompts: dict[int, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, answer) of each numbered user turn, as they come; one that got none in all tries is missing.
        Raises InputError where the endpoint refuses key, model or every request, or answers none of the first, and
        KeyboardInterrupt after Ctrl-C, each after the answers to requests under way have come: they are paid for."""
        problem: BaseException | None = None
        given_up = 0
        refused: list[tuple[int, dict[str, Any]]] = []  # yielded once another prompt got an answer
        waiting = iter(list(prompts.items()))  # shared by the threads: a list's iterator gives each item once
        results: SimpleQueue[tuple[int, dict[str, Any] | None] | BaseException | None] = SimpleQueue()

        def work() -> None:
            for number, prompt in waiting:
                if self._stopped.is_set():
                    break
                try:
                    results.put((number, self._try(prompt)))
                except BaseException as error:
                    results.put(error)
            results.put(None)

        # Not an executor's threads: Python would wait for those at its end, also after a second Ctrl-C.
        threads = [Thread(target=work, daemon=True) for _ in range(min(self.options.concurrency, len(prompts)))]
        with deferred_interrupt(lambda: results.put(KeyboardInterrupt())):
            try:
                for thread in threads:
                    thread.start()
                working = len(threads)
                while working:
                    result = results.get()
                    if result is None:
                        working -= 1
                    elif isinstance(result, BaseException):
                        problem = problem or result
                    else:
                        number, answer = result
                        if answer and answer["teacher_output"]:
                            self.answered = True
                            yield number, answer
                        elif answer:
                            refused.append((number, answer))
                        if self.answered:
                            yield from refused
                            refused.clear()
                        given_up += answer is None
                        problem = problem or self._all_failed(refused, given_up, len(prompts))
                    if problem:
                        self._stopped.set()  # nothing more is sent
                    if isinstance(result, KeyboardInterrupt):
                        self._report("interrupted: waiting for the answers under way; Ctrl-C again ends at once")
            finally:
                self._stopped.set()
        if problem:
            raise problem

    def _all_failed(self, refused: list[tuple[int, dict[str, Any]]], given_up: int, total: int) -> InputError | None:
        """Return the error of an endpoint that has answered no prompt yet and failed for as many as are tried."""
        if not self.answered and len(refused) == min(ALL_REFUSED, total):
            return InputError(f"{self.url} {refused[0][1]['left_out']}")
        if not self.answered and given_up == ALL_REFUSED:
            return InputError(f"{self.url}: {given_up} prompts got no answer in all tries")
        return None

    def _pause(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _try(self, prompt: str) -> dict[str, Any] | None:
        """Return the answer, None where all tries failed. Raises InputError for a refusal of key or model."""
        import openai

        reason = None
        for attempt in range(self.options.retries + 1):
            pause, top = min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5), self._top
            try:
                return self._answer(self._request(prompt, top))
            except openai.APIStatusError as error:
                status, text = error.status_code, f"answers {error.status_code}: {self._line(error)}"
                if status in REFUSED and top and "logprob" in str(error):
                    self._top = min(self._top, TOP_LOGPROBS[top])
                    if not self._top:
                        self._report(f"{self.url} {text}: continuing without probabilities, there are no label_probs")
                    return self._try(prompt)
                if status in REFUSED:
                    return {"teacher_output": "", "left_out": text}
                if status not in BUSY and status < 500:
                    raise InputError(f"{self.url} {text}") from None
                pause = max(pause, min(LONGEST_PAUSE, seconds_of(error.response.headers.get("retry-after", ""))))
                if pause > 60:
                    self._report(f"{self.url} answers {status} and asks for a pause of {pause:.0f} s")
                reason = error
            # Half a reply, or one of another form, raises what reading it raises.
            except (openai.APIError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
                reason = error.__cause__ or error
            if self._stopped.is_set():
                return None
            if attempt < self.options.retries:
                self._pause(pause)
        self._report(f"{self.url}: a prompt is given up: {self._line(reason)}")
        return None

    def _line(self, error: BaseException | None) -> str:
        """Return an error's text in one line of at most 200 characters, without what --teacher_url keeps secret: an
        endpoint may repeat it."""
        text = " ".join(str(error).split())
        for secret in sorted(filter(None, self._secrets), key=len, reverse=True):
            text = text.replace(secret, "...")
        return text[:200]

    def _report(self, text: str) -> None:
        """Print a line once, however many prompts it is about."""
        from tqdm import tqdm

        if text not in self._reported:
            self._reported.add(text)
            tqdm.write(text, file=sys.stderr)

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


def seconds_of(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for: a number or a date (RFC 9110, 10.2.3); else 0."""
    with contextlib.suppress(ValueError):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError):  # TypeError: a date without a time zone
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    return 0.0
