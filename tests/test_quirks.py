"""Made-up servers and answers: each ends as a row, as left out with a reason, or as one error; none is paid twice."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ask_endpoint, read_lines, write_lines

import kd_prepare
from common import SYSTEM_PROMPT, InputError
from distil.codegen.tasks import code_ended, extract_code
from distil.teachers.endpoint import least_tokens
from distil.testing import completion
from distil.thoughts import after_thoughts

JSON = {"content-type": "application/json"}
HTML = {"content-type": "text/html"}


def said(content: object, finish: str | None = "stop", usage: dict | None = None, **message: object) -> dict:
    """Return a chat completion with this content, as servers may send it."""
    message = {"role": "assistant", "content": content} | message
    reply = {"id": "1", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return reply | ({"usage": usage} if usage else {})


def choosing(**fields: object) -> dict:
    reply = said("Bad")
    reply["choices"][0] |= fields
    return reply


def top(*pairs: tuple) -> dict:
    entries = [{"token": token, "logprob": value} for token, value in pairs]
    return choosing(logprobs={"content": [{"token": "Bad", "logprob": -0.1, "top_logprobs": entries}]})


def raw(content: dict) -> bytes:
    return json.dumps(content).encode()


BAD, DATA = raw(said("Bad")), '{"total":5}'
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Good?"}]}, {"type": "text", "text": "Bad"}]
ENDLESS = "has a thought without an end"
HARMONY = "<|channel|>analysis<|message|>Good?<|end|><|start|>assistant<|channel|>final<|message|>Bad<|return|>"
FEW, ENOUGH = {"prompt_tokens": 9, "completion_tokens": 1}, {"prompt_tokens": 40, "completion_tokens": 1}
COUNTED = {"prompt_tokens": 40, "completion_tokens": 9}

# The first prompt's answers, for a label task or free text: (content of the reply, what its row teaches).
ROWS = {
    "parts": (said([{"type": "text", "text": "Ba"}, {"type": "text", "text": "d"}]), "Bad"),
    "parts without a type": (said([{"text": "Bad"}]), "Bad"),
    "parts of thoughts": (said(PARTS), "Bad"),
    "the form of completions": ({"choices": [{"text": "Bad", "finish_reason": "stop"}]}, "Bad"),
    "thoughts in a field": (said("Bad", reasoning_content="Good?"), "Bad"),
    "thoughts in another field": (said("Bad", reasoning="Good?"), "Bad"),
    "several choices": ({"choices": [said("Bad")["choices"][0], said("Good")["choices"][0]]}, "Bad"),
    "another model's name": (said("Bad") | {"model": "m-2026-01-01", "object": None}, "Bad"),
    "no finish_reason": (said("Bad", None), "Bad"),
    "an upper-case finish_reason": (said("Bad", "STOP"), "Bad"),
    "usage null": (said("Bad") | {"usage": None}, "Bad"),
    "error null": (said("Bad") | {"error": None}, "Bad"),
    "a byte order mark": (b"\xef\xbb\xbf" + BAD, "Bad"),
    "empty lines before": (b"\n\n \r\n" + BAD, "Bad"),
    "bytes that are not UTF-8": (BAD.replace(b'"m"', b'"\xff"'), "Bad"),
    "JSON called text": ((BAD, {"content-type": "text/plain"}), "Bad"),
    "gzip": ((gzip.compress(BAD), JSON | {"content-encoding": "gzip"}), "Bad"),
    "a thought before JSON": (said(f"<think>\nThe total is 5.\n</think>\n\n{DATA}"), DATA),
    "a thought before a label": (said("<thinking>Good or Standard?</thinking>Bad"), "Bad"),
    "a thought that the prompt began": (said("It could be Good.\n</think>\n\nBad"), "Bad"),
    "Magistral": (said("[THINK]Good?[/THINK]Bad"), "Bad"),
    "Kimi": (said("◁think▷Good?◁/think▷Bad"), "Bad"),
    "gpt-oss": (said(HARMONY), "Bad"),
    "gpt-oss without control tokens": (said("analysisGood?assistantfinalBad"), "Bad"),
    "Seed-OSS": (said("<seed:think>Good?</seed:think>Bad"), "Bad"),
    "Command A": (said("<|START_THINKING|>Good?<|END_THINKING|><|START_RESPONSE|>Bad<|END_RESPONSE|>"), "Bad"),
    "Gemma": (said("<|channel>thought\nGood?<channel|>Bad"), "Bad"),
    "Granite": (said("Here is my thought process: Good?\n\nHere is my response: Bad"), "Bad"),
    "an answer in tags": (said("<think>Good?</think>\n<answer>\nBad\n</answer>"), "Bad"),
    "JSON about thoughts": (said('{"text": "it ends </think> here"}'), '{"text": "it ends </think> here"}'),
    "a log-probability null": (top(("Bad", None), ("Good", -3.0)), "Bad"),
    "no token": (top((None, -0.1)), "Bad"),
    "top_logprobs empty": (
        choosing(logprobs={"content": [{"token": "Bad", "logprob": -1, "top_logprobs": []}]}),
        "Bad",
    ),
    "top_logprobs null": (choosing(logprobs={"content": [{"token": "Bad", "logprob": -1}]}), "Bad"),
    "no tokens": (choosing(logprobs={"content": []}), "Bad"),
    "log-probabilities of another form": (choosing(logprobs={"content": [None, 3]}), "Bad"),
    "log-probabilities as a list": (choosing(logprobs=[1]), "Bad"),
    "enough prompt tokens": (said("Bad", usage=ENOUGH), "Bad"),
    "prompt tokens null": (said("Bad", usage={"prompt_tokens": None}), "Bad"),
}
LEFT_OUT = {
    "a thought without an end": (said("<think>it could be Good"), ENDLESS),
    "a thought of Magistral without an end": (said("[THINK]it could be Good"), ENDLESS),
    "a thought of gpt-oss without an end": (said(HARMONY.partition("<|end|>")[0]), ENDLESS),
    "a thought after the answer": (said("Good\n<think>or is it Bad"), ENDLESS),
    "a thought that was cut": (said("<think>it could be Good", "length"), "cut off at --max_new_tokens"),
    "a thought of the prompt's that was cut": (said("So it could be Good", "length"), "cut off at --max_new_tokens"),
    "a thought alone": (said("<think>Good</think>"), "is empty"),
    "a thought in a field alone": (said(None, reasoning_content="Good"), "finish_reason stop, no text"),
    "a thought in a field that was cut": (said(None, "max_tokens", reasoning="Good"), "cut off at --max_new_tokens"),
    "parts without a text": (said(PARTS[:1], usage=COUNTED), "finish_reason stop, no text"),
    "no content": ({"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}, "stop, no text"),
    "nothing that was paid for": (said(None, None, usage=COUNTED), "finish_reason none, no text"),
    "no choices that were paid for": ({"choices": [], "usage": COUNTED}, "finish_reason none, no text"),
    "a refusal": (said(None, refusal="I can't say Good."), "is a refusal"),
    "a refusal in parts": (said([{"type": "refusal", "refusal": "Good?"}]), "is a refusal"),
    "a call of a tool": (said(None, "tool_calls", tool_calls=[{"id": "1"}]), "finish_reason tool_calls, no text"),
    "a call of a tool with a text": (said("Good, let me see", "tool_calls"), "finish_reason tool_calls"),
    "a filter": (said("Good", "SAFETY"), "finish_reason safety"),
    "a prompt that was cut": (said("Good", usage=FEW), "read far fewer tokens than the prompt has"),
    "an error with status 200": ({"error": {"code": 400, "message": "too long"}}, "answers 400: .*too long"),
    "an error that is a text": ({"error": "the prompt is too long"}, "answers 400: the prompt is too long"),
    "an error as an object": ({"object": "error", "message": "too long", "code": 40303}, "answers 400: .*too long"),
    "a message without choices": ({"detail": "too long"}, "answers 400: .*too long"),
}
RETRIED = {  # then the usual answer comes
    "no choices": {"choices": []},
    "choices null": {"choices": None},
    "busy with status 200": {"error": {"code": 429, "message": "slow down"}},
    "overloaded with status 200": {"error": {"type": "overloaded_error", "message": "Overloaded"}},
    "a number as a text": {"error": {"code": "503", "message": "x"}},
    "an error in the choice": {"choices": [{"error": {"code": 502, "message": "x"}, "finish_reason": "error"}]},
    "a stream": (b'data: {"choices": []}', {"content-type": "text/event-stream"}),
    "a page": (b"<!DOCTYPE html><html>", HTML),
    "nothing": (b"", JSON),
    "a number": b"5",
    "nested without end": b"[" * 100000,
}


def turn_of(name: str) -> str:
    return f"{name}: what is the credit rating of this customer, who has a debt of 500?"


def name_in(body: dict) -> str:
    """Return which of the prompts a request is about."""
    return body["messages"][-1]["content"].removeprefix(f"{SYSTEM_PROMPT}\n\n").partition(": what is")[0]


@pytest.fixture
def ask(here, endpoint, capsys):
    """Let a server answer a prompt of each name, by `replies` at first and then "Standard"; return (texts of the rows
    by name, requests by name, what was printed)."""

    def run(replies: dict[str, list], kind: str = "label", *flags: object):
        write_lines("in.jsonl", [{"input": turn_of(name)} for name in replies])
        server, waiting = endpoint(), {name: list(several) for name, several in replies.items()}
        server.reply_to = lambda prompt: completion("Standard", {})

        def rule(body):
            if not waiting[name_in(body)]:
                return None
            reply = waiting[name_in(body)].pop(0)
            content, headers = reply if isinstance(reply, tuple) else (reply, JSON)
            return 200, raw(content) if isinstance(content, dict) else content, headers

        server.rule = rule
        labels = ["--labels", "Good,Standard,Bad"] if kind == "label" else []
        assert ask_endpoint(server.url, *labels, *flags) == 0
        rows = read_lines("kd.jsonl")
        assert all(set(row) == {"input", "teacher_output", "teacher"} for row in rows)
        printed = capsys.readouterr()
        texts = {row["input"].partition(": what is")[0]: row["teacher_output"] for row in rows}
        return texts, Counter(map(name_in, server.requests)), printed.out + printed.err

    return run


@pytest.mark.parametrize("kind", ["label", "text"])
def test_answers_that_become_rows(kind, ask):
    wanted = {name: text for name, (_, text) in ROWS.items() if kind == "text" or text == "Bad"}
    texts, requests, _ = ask({name: [ROWS[name][0]] for name in wanted}, kind)
    assert texts == wanted and set(requests.values()) == {1}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_answer_is_left_out_with_the_reason(name, ask):
    reply, reason = LEFT_OUT[name]
    texts, requests, printed = ask({name: [reply], "other": []})
    assert texts == {"other": "Standard"} and requests == {name: 1, "other": 1}
    assert re.search(f"^1 prompts are left out, their answer: .*{reason}", printed, re.MULTILINE), printed


def test_answers_that_are_asked_for_again(ask):
    texts, requests, _ = ask({name: [reply] * 2 for name, reply in RETRIED.items()})
    assert texts == dict.fromkeys(RETRIED, "Standard") and set(requests.values()) == {3}


def refusing(*rules: tuple):
    """Return a rule that refuses requests: (what is wrong with them, the words, the status)."""

    def rule(body):
        for wrong, words, status in rules:
            if wrong(body):
                return status, raw({"error": {"message": words}}), JSON
        return None

    return rule


MAX = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
ONE = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
LIMIT = (lambda body: "max_tokens" in body, MAX, 400)
WARM = (lambda body: "temperature" in body, ONE, 400)
POSITIVE = (lambda body: body.get("temperature") == 0, "`temperature` must be strictly positive", 422)
SYSTEM = (
    "System role not supported",
    'messages[0].role does not support "system"',
    "developer instruction not enabled",
)
ROLES = [(lambda body: body["messages"][0]["role"] == "system", words, 400) for words in SYSTEM]
ALTERNATE = (ROLES[0][0], "Conversation roles must alternate user/assistant/user/assistant/...", 500)
FIELDS = (lambda body: "max_tokens" in body, '[{"loc": ["body", "max_tokens"], "msg": "Extra inputs"}]', 422)
IN_REPLY = (LIMIT[0], MAX, 200)
NO_PROBABILITIES = (lambda body: "logprobs" in body, "logprobs are not supported", 400)
USUAL = {"model": "m", "temperature": 0.0, "max_tokens": 256}
COMPLETION = {"model": "m", "temperature": 0.0, "max_completion_tokens": 256}


@pytest.mark.parametrize(
    ("rules", "wanted", "refused"),
    [
        ([LIMIT], COMPLETION, 1),
        ([FIELDS], COMPLETION, 1),
        ([IN_REPLY], COMPLETION, 1),
        ([WARM], {"model": "m", "max_tokens": 256}, 2),
        ([POSITIVE], USUAL | {"temperature": 0.01}, 1),
        *(([role], USUAL | {"folded": True}, 1) for role in [*ROLES, ALTERNATE]),
        ([LIMIT, WARM, ROLES[0]], {"model": "m", "max_completion_tokens": 256, "folded": True}, 4),
        ([NO_PROBABILITIES, LIMIT], COMPLETION, 3),
    ],
)
def test_a_request_is_changed_once_for_all(rules, wanted, refused, here, endpoint, capsys):
    write_lines("in.jsonl", [{"input": turn_of(name)} for name in "abcd"])
    server = endpoint()
    server.rule, server.reply_to = refusing(*rules), lambda prompt: completion("Standard", {})
    labels = ["--labels", "Good,Standard,Bad"] if NO_PROBABILITIES in rules else []
    assert ask_endpoint(server.url, "--concurrency", 1, "--retries", 0, *labels) == 0
    assert len(read_lines("kd.jsonl")) == 4 and len(server.requests) == 4 + refused
    for name, body in zip("abcd", server.requests[refused:], strict=True):
        system, user = {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": turn_of(name)}
        folded = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{turn_of(name)}"}
        assert body.pop("messages") == ([folded] if wanted.get("folded") else [system, user])
        assert body == {field: value for field, value in wanted.items() if field != "folded"}
    assert capsys.readouterr().err.count("refuses parts of the requests: they go with") == 1


def test_a_change_that_does_not_help_is_not_kept(here, endpoint, capsys):
    """The refusal names a field, but is about one prompt."""
    write_lines("in.jsonl", [{"input": turn_of(name)} for name in "abc"])
    server = endpoint()
    words = "max_tokens=256 and the prompt exceed the context; temperature is 0"
    server.rule = refusing((lambda body: name_in(body) == "a", words, 400))
    server.reply_to = lambda prompt: completion("Standard", {})
    assert ask_endpoint(server.url, "--concurrency", 1) == 0
    assert len(read_lines("kd.jsonl")) == 2 and "their answer: answers 400" in capsys.readouterr().err
    assert all(USUAL.items() <= body.items() for body in server.requests[-2:]) and len(server.requests) == 2 + 4


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((b"<!DOCTYPE html><html>", HTML), r"/v1: 8 prompts got no answer in all tries"),
        (raw(said(None, "length", usage=COUNTED)), r"/v1 cut off at --max_new_tokens"),
        (raw(said(None, reasoning_content="Good")), r"/v1 ends with finish_reason stop, no text"),
        (raw(said("Good", usage=FEW)), r"/v1 the endpoint read far fewer tokens than the prompt has"),
        (raw({"error": {"code": 401, "message": "no such key"}}), r"/v1 answers 401: .*no such key"),
        (raw({"error": {"code": 402, "message": "no credit"}}), r"/v1 answers 402: .*no credit"),
        (raw({"error": "model not found"}), r"/v1 answers 400: model not found"),
    ],
)
def test_what_no_prompt_gets_past_is_one_error(reply, message, here, endpoint, capsys):
    write_lines("in.jsonl", [{"input": turn_of(str(number))} for number in range(12)])
    server = endpoint()
    content, headers = reply if isinstance(reply, tuple) else (reply, JSON)
    server.rule = lambda body: (200, content, headers)
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            ask_endpoint(server.url, "--concurrency", 1, "--retries", 0)
    if headers == HTML:
        assert "a reply that is not a JSON object: '<!DOCTYPE html><html>'" in capsys.readouterr().err
    if b"choices" in content:  # paid for, so kept
        assert set(Counter(map(name_in, server.requests)).values()) == {1}


def test_more_fields_of_a_request(here, endpoint):
    """They decide the answers: a run with others does not resume."""
    write_lines("in.jsonl", [{"input": turn_of(name)} for name in "ab"])
    server, body = endpoint(("500",)), {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask_endpoint(server.url, "--retries", 0, "--extra_body", json.dumps(body)) == 1
    with pytest.raises(InputError, match=r"another teacher, input or flags \(extra_body\)"):
        ask_endpoint(server.url)
    assert ask_endpoint(server.url, "--extra_body", json.dumps(body, indent=1)) == 0
    assert len(server.requests) == 3 and all(body.items() <= sent.items() for sent in server.requests)
    assert json.loads(Path("kd_prepared.json").read_text())["teacher"]["extra_body"] == body


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extra_body", '{"model": "x"}'], "--extra_body: the script and its flags set model;"),
        (["--extra_body", '{"max_completion_tokens": 5, "n": 2}'], "set max_completion_tokens, n; leave it out"),
        (["--extra_body", "[1]"], r"--extra_body \[1\]: a JSON object such as"),
        (["--extra_body", "{"], "--extra_body {: a JSON object such as"),
        (["--price_in", "-1"], "--price_in is at least 0"),
        (["--price_out", "nan"], "--price_out is at least 0"),
        (["--price_out", "inf"], "--price_in and --price_out are finite"),
    ],
)
def test_wrong_flags(flags, message, here):
    write_lines("in.jsonl", [{"input": "a"}])
    with pytest.raises(InputError, match=message):
        ask_endpoint("http://127.0.0.1:9/v1", *flags)
    with pytest.raises(InputError, match=r"--extra_body, --price_in: only with --teacher_url"):
        more = ["--extra_body", "{}", "--price_in", "1"]
        kd_prepare.main(["--teacher", "tabular", "--output", "kd.jsonl", *more])


def test_what_the_answers_cost(here, endpoint, capsys):
    """Of a resumed run too, and of answers that are left out."""
    write_lines("in.jsonl", [{"input": turn_of(name)} for name in "abcd"])
    server, usage = endpoint(("500",)), {"prompt_tokens": 1000, "completion_tokens": 200}
    replies = {name: said("Standard", usage=usage) for name in "ab"}
    replies |= {"c": said("Standard", "length", usage=usage), "d": said("Standard")}
    server.rule = lambda body: (200, raw(replies[name_in(body)]), JSON)
    paid = ["--price_in", 0.5, "--price_out", 10]
    assert ask_endpoint(server.url, "--concurrency", 1, "--retries", 0, *paid) == 1
    assert "tokens: 2000 in, 400 out, reported with 2 answers; cost 0.0050" in capsys.readouterr().out
    assert ask_endpoint(server.url, *paid) == 0
    assert "tokens: 3000 in, 600 out, reported with 3 answers; cost 0.0075" in capsys.readouterr().out
    note = json.loads(Path("kd_prepared.json").read_text())["teacher"]
    counts = {name: note[name] for name in ("tokens_in", "tokens_out", "answers_with_tokens", "cost")}
    assert counts == {"tokens_in": 3000, "tokens_out": 600, "answers_with_tokens": 3, "cost": 0.0075}
    assert "usage" not in Path("kd.jsonl").read_text() and len(server.requests) == 5


def test_thoughts_of_code():
    thought = "<think>\nMaybe:\n```python\ndef f(x): return 0\n```\nNo."
    code = "def f(x):\n    return 1"
    assert not code_ended(thought) and extract_code(thought) == ""
    answer = f"{thought}\n</think>\n\n```python\n{code}\n```"
    assert code_ended(answer) and extract_code(answer) == code
    about = 'def f(s):\n    return s.split("</think>")[1]'
    assert extract_code(about) == about and extract_code(f"```\n{about}\n```") == about
    assert extract_code("    return x") == "    return x"


@pytest.mark.parametrize(
    "text", ["Bad", "  Bad\n", '{"a": "<think>"}', "use <think>", "analysis of it", "Bad<|end|>", "<answer>x</answer>"]
)
def test_a_text_without_thoughts_stays(text):
    assert after_thoughts(text) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A list of 23 things, each déjà-vu.", 3),  # seven words
        ("|  ---- | ...... |\n" * 9, 0),  # a run of signs may be one token
        ("株式会社サンプルの請求書", 0),  # without blanks
        ("नई दिल्ली भारत की राजधानी है", 3),  # its vowels are signs on letters
    ],
)
def test_the_least_tokens_of_a_prompt(text, tokens):
    """Tokenizers of Qwen, DeepSeek, Mistral and SmolLM2 have twice as many for prose and more for tables and code."""
    assert least_tokens(text) == tokens
