"""The one client of OpenAI-compatible servers, which may be busy, break off, refuse requests or end at any moment."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Event, Thread, current_thread, main_thread
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from common import InputError
from distil.quirks import Failed, changed, quirk_of, reply_of

REFUSED = (400, 413, 422)  # statuses that may be about one request
BUSY = (408, 409, 425, 429)  # statuses below 500 that are worth another try
LONGEST_PAUSE = 600.0  # seconds; where a server asks for a longer pause it is not waited for
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Server:
    """A model at an OpenAI-compatible server. url: its user, password and query are secrets; model: its name there;
    concurrency: requests under way; retries: further tries; timeout: seconds without a sign of the server."""

    url: str = field(repr=False)
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 6
    timeout: float = 120.0


class Refused(Exception):
    """A request that the server refuses for good. Its text is one line; `words`: all that the server says."""

    def __init__(self, text: str, words: str):
        super().__init__(text)
        self.words = words


class NoAnswer(ConnectionError):
    """A request without an answer in all tries; `reason`: of the last failure, in one line."""

    def __init__(self, url: str, reason: str):
        super().__init__(f"{url} gives no answer in all tries: {reason}")
        self.reason = reason


def shown_url(url: str) -> str:
    """Return a URL without user, password, query and parameters, as notes, messages and logs may have it."""
    if not is_http(url):
        return re.split("[?#]", re.sub(r"^(\w+://)?.*@", r"\1", url))[0]
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.partition(";")[0], "", ""))


def is_http(url: str) -> bool:
    """Return whether a URL is the address of a server."""
    try:
        parts = urlsplit(url)
        # An @ further right is one of a password with a sign that ends the address, such as / or ?.
        rest = parts.path + parts.query + parts.fragment
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in rest
    except ValueError:  # not a port
        return False


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


class Client:
    """A connection to a server. What fails for a while (429, 5xx, timeouts, closed connections, half replies) is
    retried with growing pauses. problem: what ends `results`, set by it or by who takes them."""

    def __init__(self, server: Server):
        from openai import OpenAI

        self.server, self.url = server, shown_url(server.url)
        self._heard = False  # from the server
        self.problem: BaseException | None = None
        self._reported: set[str] = set()
        self._quirks: dict[str, None] = {}  # of this server, in the order in which they were found
        self._stopped = Event()
        # Retries are ours: the client's own do not cover a reply that is half a JSON text.
        key = os.environ.get(server.api_key_env) or "none"
        # A password goes into a header and a query behind the path: the address in an exception or log has neither.
        parts, url = urlsplit(server.url), self.url.partition("?")[0]
        for name in ("openai", "httpx", "httpx2") if parts.query else ():
            logging.getLogger(name).setLevel(logging.WARNING)  # they would log the query
        user = unquote(parts.netloc.rpartition("@")[0])
        self._secrets = [user, user.partition(":")[2], parts.query, *(value for _, value in parse_qsl(parts.query))]
        self._secrets += [key] if len(key) > 7 else []  # a shorter one, such as "none", is no secret
        headers = {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else None
        how = {"default_headers": headers, "default_query": dict(parse_qsl(parts.query, True))}
        self.client = OpenAI(base_url=url, api_key=key, timeout=server.timeout, max_retries=0, **how)

    def results(self, items: Mapping[int, Item], work: Callable[[Item], Result]) -> Iterator[tuple[int, Result]]:
        """Yield (number, work(item)) of numbered items as they come, several at a time. Raises `problem`, at first
        what `work` raises, or KeyboardInterrupt after Ctrl-C; each after the answers to requests under way have come:
        they are paid for."""
        self.problem = None
        self._stopped.clear()
        waiting = iter(list(items.items()))  # shared by the threads: a list's iterator gives each item once
        results: SimpleQueue[tuple[int, Result] | BaseException | None] = SimpleQueue()

        def run() -> None:
            for number, item in waiting:
                if self._stopped.is_set():
                    break
                try:
                    results.put((number, work(item)))
                except BaseException as error:
                    results.put(error)
            results.put(None)

        # Not an executor's threads: Python would wait for those at its end, also after a second Ctrl-C.
        threads = [Thread(target=run, daemon=True) for _ in range(min(self.server.concurrency, len(items)))]
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
                        self.problem = self.problem or result
                    else:
                        yield result
                    if self.problem:
                        self._stopped.set()  # nothing more is sent
                    if isinstance(result, KeyboardInterrupt):
                        self.report("interrupted: waiting for the answers under way; Ctrl-C again ends at once")
            except BaseException:
                self._stopped.set()
                raise
        if self.problem:
            raise self.problem

    def all(self, items: Sequence[Item], work: Callable[[Item], Result], progress: str | None = None) -> list[Result]:
        """Return work(item) of each item, in order, as `results`. progress: title of a progress bar on stderr."""
        from tqdm import tqdm

        bar = tqdm(total=len(items), desc=progress, unit="row", disable=progress is None, file=sys.stderr)
        found = {}
        with bar:
            for number, result in self.results(dict(enumerate(items)), work):
                found[number] = result
                bar.update()
        return [found[number] for number in range(len(items))]

    def sent(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the reply to a request, which is changed as the server turns out to need it (`quirks.QUIRKS`); a
        change that helped is made to all later ones. body: None for GET. Raises what `tried` understands."""
        found: list[str] = []
        while True:
            request = changed(body or {}, [*self._quirks, *found])
            try:
                reply = self._reply(path, request)
                break
            except Failed as failure:
                quirk = quirk_of(request, str(failure)) if failure.status in (*REFUSED, 500, 501) else None
                if not quirk:
                    raise
                found.append(quirk)
        if found:
            self._quirks |= dict.fromkeys(found)
            self.report(f"note: {self.url} refuses parts of the requests: they go {', '.join(self._quirks)}")
        return reply

    def _reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        how: dict[str, Any] = {"cast_to": openai.HttpxBinaryResponseContent}
        try:
            reply = self.client.post(path, body=body, **how) if body else self.client.get(path, **how)
        except openai.APIStatusError as error:
            raise Failed(str(error), error.status_code, error.response.headers.get("retry-after", "")) from None
        return reply_of(reply.content.decode("utf-8-sig", "replace"))

    def tried(self, send: Callable[[], Result]) -> Result:
        """Return send(), tried again as the class says. Raises Refused, InputError for a refusal of key, model or
        address, NoAnswer."""
        import openai

        reason: BaseException | None = None
        for attempt in range(self.server.retries + 1):
            pause = min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5)
            try:
                result = send()
                self._heard = True
                return result
            except Failed as error:
                status, text = error.status, f"answers {error.status}: {self.line(error)}"
                moderated = status == 403 and re.search("flagged|moderat|content.(policy|filter)", str(error), re.I)
                if status in REFUSED or moderated:
                    raise Refused(text, str(error)) from None
                if status not in BUSY and status < 500:
                    raise InputError(f"{self.url} {text}") from None
                pause = max(pause, min(LONGEST_PAUSE, seconds_of(error.retry_after)))
                if pause > 60:
                    self.report(f"{self.url} answers {status} and asks for a pause of {pause:.0f} s")
                reason = error
            # Half a reply, or one of another form, raises what reading it raises.
            except (openai.APIError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
                reason = error.__cause__ or error
            if self._stopped.is_set():
                break
            if attempt < self.server.retries:
                if not self._heard:
                    self.report(f"{self.url} gives no answer yet: {self.line(reason)}; it is tried again")
                self._pause(pause)
        raise NoAnswer(self.url, self.line(reason))

    def _pause(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def line(self, error: BaseException | None) -> str:
        """Return an error's text in one line of at most 200 characters, without the key and what the URL keeps secret:
        a server may repeat them."""
        text = " ".join(str(error).split())
        for secret in sorted(filter(None, self._secrets), key=len, reverse=True):
            text = text.replace(secret, "...")
        return text[:200]

    def report(self, text: str) -> None:
        """Print a line once, however many requests it is about."""
        from tqdm import tqdm

        if text not in self._reported:
            self._reported.add(text)
            tqdm.write(text, file=sys.stderr)


def seconds_of(retry_after: str) -> float:
    """Return the seconds that a Retry-After header asks for: a number or a date (RFC 9110, 10.2.3); else 0."""
    with contextlib.suppress(ValueError):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError):  # TypeError: a date without a time zone
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    return 0.0
