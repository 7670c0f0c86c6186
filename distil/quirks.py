"""Where OpenAI-compatible servers differ: parameters that they refuse, and the forms of their replies."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

LEAST = -1000.0  # log-probabilities below it stand for 0, as -9999 of vLLM and the least float of llama.cpp do
BUSY_WORDS = "rate.?limit|too many|overload|busy|capacity|unavailable|try again|timed?.?out|internal|server.?error"
OPTIONAL = ("temperature", "top_p", "seed", "stop_token_ids", "n_probs", "return_tokens_as_token_ids")
OPTIONAL += ("chat_template_kwargs",)  # what a request can do without


class Failed(Exception):
    """What a server says in place of an answer. status: of HTTP, or what a reply with status 200 says; retry_after:
    the header."""

    def __init__(self, words: str, status: int, retry_after: str = ""):
        super().__init__(words)
        self.status, self.retry_after = status, retry_after


def _folded(body: dict[str, Any]) -> dict[str, Any]:
    """Return a request with the system turn in the user's, as `common.PromptEncoder` does it for such templates."""
    first, *rest = body.get("messages") or [{}]
    if first.get("role") != "system" or not rest:
        return body
    return body | {"messages": [rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]}


def _without(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in body.items() if field != name}


def _renamed(body: dict[str, Any]) -> dict[str, Any]:
    new = {"max_completion_tokens": body["max_tokens"]} if "max_tokens" in body else {}
    return _without("max_tokens", body) | new


# Words of a refusal, and the request that may do then, in the order of trying.
QUIRKS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "with the system turn in the user's": (
        r"system.{0,30}(role|message|prompt|instruction)|role.{0,80}system|developer instr|roles must alt|only user",
        _folded,
    ),
    "with max_completion_tokens in place of max_tokens": (r"\bmax_(completion_)?tokens\b", _renamed),
    "with temperature 0.01 in place of 0": (
        r"\btemperature\b",
        lambda body: body | ({"temperature": 0.01} if body.get("temperature") == 0 else {}),
    ),
    **{f"without {name}": (rf"\b{name}\b", functools.partial(_without, name)) for name in OPTIONAL},
}


def changed(body: dict[str, Any], quirks: Iterable[str]) -> dict[str, Any]:
    """Return a request as a server with these quirks takes it."""
    return functools.reduce(lambda so_far, name: QUIRKS[name][1](so_far), quirks, body)


def quirk_of(body: dict[str, Any], refusal: str) -> str | None:
    """Return the first quirk that a refusal speaks of and that would change this request."""
    fits = (
        n for n, (words, change) in QUIRKS.items() if re.search(words, refusal, re.I | re.S) and change(body) != body
    )
    return next(fits, None)


def reply_of(text: str) -> dict[str, Any]:
    """Return the object in the body of a reply with status 200. Raises Failed for an error in it, ValueError where it
    is half a reply or something else."""
    try:
        reply = json.loads(text)
        choices = reply.get("choices") or [{}]
    except (ValueError, AttributeError) as error:
        why = f"a reply that is not a JSON object: {text[:80]!r} ({error}); is the address right?"
        raise ValueError(why) from None
    problem = reply.get("error") or choices[0].get("error")
    if not problem and not reply.keys() & {"choices", "data", "tokens"}:
        problem = reply
    if problem:
        words = problem if isinstance(problem, str) else json.dumps(problem, ensure_ascii=False)
        code = str(problem.get("code")) if isinstance(problem, dict) else ""
        status = 429 if re.search(BUSY_WORDS, words, re.IGNORECASE) else 400
        raise Failed(words, int(code) if re.fullmatch("[45][0-9][0-9]", code) else status)
    return reply


def text_of(content: Any) -> str:
    """Return the text of a reply's content: a text, or parts, of which thoughts and refusals are left out."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") in (None, "text", "output_text"))
    return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Reply:
    """A model's answer. finish: why it ended, in the server's words; cut: at the limit of its tokens; complete: ended
    by the model; read, written: tokens; thought: there are thoughts in a field apart; refused: the model declined."""

    text: str
    finish: str
    cut: bool
    complete: bool
    logprobs: dict[str, Any]
    read: int | None
    written: int | None
    thought: bool
    refused: bool


def read_reply(reply: dict[str, Any]) -> Reply:
    """Return the first answer of a reply, of chats or completions. Raises ValueError for half a reply."""
    usage, choice = reply.get("usage") or {}, (reply.get("choices") or [{}])[0]
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    fields = choice.get("message") or {"content": choice.get("text")}
    text, finish = text_of(fields.get("content")), str(choice.get("finish_reason") or "").lower()
    # A reply without a text is paid for where the model wrote something, else it is asked again.
    if not text and not written and not finish:
        raise ValueError("a reply without a text")
    cut = "length" in finish or "max" in finish
    complete = not finish or bool(re.search("stop|end|eos|complete|done", finish))
    thought = any(fields.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    refused = not text and bool(fields.get("refusal") or "refusal" in str(fields.get("content")))
    logprobs = found if isinstance(found := choice.get("logprobs"), dict) else {}
    return Reply(text, finish, cut, complete, logprobs, read, written, thought, refused)


def is_log_prob(value: Any) -> bool:
    """Return whether a value that a server sends is the log-probability of a token that can come."""
    return isinstance(value, int | float) and LEAST < value < 0.01


def first_tokens(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return {"token", "logprob", "id" if known} of the most probable first tokens that a server sends."""
    try:
        if content := logprobs.get("content"):
            found = content[0].get("top_logprobs") or []
        else:  # the form of completions, which some use in chats too
            top = (logprobs.get("top_logprobs") or [None])[0] or {}
            found = [{"token": token, "logprob": value} for token, value in top.items()]
        return [one for one in found if isinstance(one.get("token"), str) and is_log_prob(one.get("logprob"))]
    except (AttributeError, LookupError, TypeError):  # the answer counts without them
        return []
