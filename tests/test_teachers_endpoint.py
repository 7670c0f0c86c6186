"""A teacher behind a URL that fails in every way: what is retried, left out, requested and kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from conftest import answer_in_turn, ask_endpoint, change_replies, gold_rows, read_lines, write_lines

from common import InputError
from distil.endpoint import seconds_of
from distil.tasks import default_task
from distil.teachers.answers import PROMPT_VERSION, RATIONALE, label_of
from distil.teachers.endpoint import HttpTeacher
from distil.testing import ROOT, completion

TASK = default_task()

FAULTS = ("429", "500", "503", "drop", "half json", "half body", "empty")


def test_an_unreliable_endpoint_answers_every_prompt_once(here, endpoint):
    rows = gold_rows(30)
    write_lines("in.jsonl", rows)
    server = endpoint(FAULTS * 2)
    assert ask_endpoint(server.url) == 0
    assert server.faults == [] and len(server.requests) == 30 + 2 * len(FAULTS)
    assert server.answered == {row["input"]: 1 for row in rows}  # nothing lost, nothing sent twice
    written = read_lines("kd.jsonl")
    assert [row["input"] for row in written] == [row["input"] for row in rows]  # in order, whatever came first
    for row in written:
        assert row["teacher_output"] == TASK.labels[len(row["input"]) % 3] and "label_probs" not in row
        assert row["teacher"] == {"name": "m", "prompt": str(PROMPT_VERSION)}
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "kd.jsonl", "kd_prepared.json"]


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_refusals_for_good_end_at_once(here, endpoint, status):
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint((status,) * 50)
    with pytest.raises(InputError, match=f"/v1 answers {status}: .*not now"):
        ask_endpoint(server.url, "--concurrency", 1)
    assert len(server.requests) <= 2


def test_a_request_refused_for_every_prompt_ends_soon(here, endpoint):
    """And no prompt counts as refused for it: with a fixed endpoint all are sent."""
    write_lines("in.jsonl", gold_rows(30))
    with pytest.raises(InputError, match=r"/v1 answers 400: .*not now"):
        ask_endpoint(endpoint(("400",) * 50).url, "--concurrency", 1)
    assert Path("kd.jsonl.part").read_text() == ""


def test_a_refused_prompt_is_left_out(here, endpoint, capsys):
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    server = endpoint(("400", "413"))
    assert ask_endpoint(server.url, "--concurrency", 1) == 0
    output = capsys.readouterr().err
    assert "1 prompts are left out, their answer: answers 400" in output and "their answer: answers 413" in output
    assert [row["input"] for row in read_lines("kd.jsonl")] == [row["input"] for row in rows[2:]]
    assert len(server.requests) == 12


def test_answers_under_way_are_kept_after_a_refusal(here, endpoint):
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(("",) * 3 + ("401",) * 50, seconds=0.05)
    with pytest.raises(InputError, match="answers 401"):
        ask_endpoint(server.url, "--concurrency", 4)
    assert len(Path("kd.jsonl.part").read_text().splitlines()) == sum(server.answered.values()) == 3


@pytest.mark.parametrize("together", [1, 4])
def test_refused_log_probs_are_not_requested_again(together, here, endpoint, monkeypatch, capsys):
    """Also for the prompts that were under way when the first was refused, and without a further try."""
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(("400",) * together * 2, seconds=0.2)
    monkeypatch.setattr(server, "refusal", b'{"error": {"message": "' + b"x" * 300 + b'logprobs are not supported"}}')
    assert ask_endpoint(server.url, "--concurrency", together, "--retries", 0) == 0
    assert [body.get("top_logprobs") for body in server.requests] == [20] * together + [5] * together + [None] * 6
    assert len(read_lines("kd.jsonl")) == 6
    assert capsys.readouterr().err.count("continuing without probabilities, there are no label_probs") == 1


def test_fewer_log_probs_are_requested_where_limited(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(("400",), logprobs=True)
    monkeypatch.setattr(server, "refusal", b'{"error": {"message": "top_logprobs must be at most 5"}}')
    assert ask_endpoint(server.url, "--concurrency", 1, "--retries", 0) == 0
    assert [body["top_logprobs"] for body in server.requests] == [20] + [5] * 6
    assert all("label_probs" in row for row in read_lines("kd.jsonl"))


def test_a_lower_top_k_is_reported(here, endpoint, model_dir, monkeypatch, capsys):
    write_lines("in.jsonl", [{"input": "Say 1"}, {"input": "Say 2"}])
    server = endpoint(("400",))
    monkeypatch.setattr(server, "refusal", b'{"error": {"message": "top_logprobs must be at most 20"}}')
    server.reply_to = lambda prompt: completion("Good", {"Good": 0.5, "Bad": 0.2}, {"<|im_end|>": 0.9})
    flags = ("--top_k", 32, "--tokenizer", model_dir, "--concurrency", 1, "--retries", 0)
    assert ask_endpoint(server.url, *flags) == 0
    assert "must be at most 20: continuing with --top_k 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason", "why"),
    [
        (None, "content_filter", "ends with finish_reason content_filter, no text"),
        ("", "stop", "ends with finish_reason stop, no text"),
        ("", "length", "cut off at --max_new_tokens"),
        ("The first half of", "content_filter", "ends with finish_reason content_filter"),
    ],
)
def test_useless_answers_are_left_out_without_a_retry(here, endpoint, capsys, text, reason, why):
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    server, useless = endpoint(), {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    change_replies(server, lambda prompt, choice: choice.update(useless if prompt == rows[1]["input"] else {}))
    assert ask_endpoint(server.url) == 0
    assert len(server.requests) == 6 and len(read_lines("kd.jsonl")) == 5
    assert f"1 prompts are left out, their answer: {why}" in capsys.readouterr().err


def test_an_answer_with_half_a_character_is_kept(here, endpoint):
    write_lines("in.jsonl", [{"prompt": f"write {i}"} for i in range(3)])
    server = endpoint()
    answer_in_turn(server, ["fine \ud83d"] * 3)
    assert ask_endpoint(server.url) == 0
    assert [row["teacher_output"] for row in read_lines("kd.jsonl")] == ["fine ?"] * 3


@pytest.fixture
def ctrl_c():
    """Accept Ctrl-C here and in processes started here, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", ["waiting", "writing"])
def test_answers_under_way_are_kept_at_ctrl_c(moment, here, endpoint, monkeypatch, ctrl_c):
    """The endpoint holds its answers until the interrupt was noticed, so nothing depends on the machine's pace."""
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    server, noticed = endpoint(), threading.Event()
    reply_to, answers = server.reply_to, HttpTeacher.answers
    free = [rows[0]["input"]] * (moment == "writing")

    def reply(prompt):
        assert prompt in free or noticed.wait(10)
        return reply_to(prompt)

    def interrupt_waiting():
        while len(server.requests) < 4:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def interrupted_between(self, *rest):
        for count, answer in enumerate(answers(self, *rest)):
            if not count:
                signal.raise_signal(signal.SIGINT)
            yield answer

    server.reply_to = reply
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HttpTeacher, "report", lambda self, text: noticed.set())
        if moment == "waiting":
            threading.Thread(target=interrupt_waiting, daemon=True).start()
        else:
            patch.setattr(HttpTeacher, "answers", interrupted_between)
        ask_endpoint(server.url, "--concurrency", 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(read_lines("kd.jsonl.part")) == len(server.requests) <= 4 + len(free)
    assert ask_endpoint(server.url, "--concurrency", 8) == 0 and len(server.requests) == 12


def test_a_second_ctrl_c_ends_at_once(here, endpoint, ctrl_c):
    """Even where the endpoint has not answered."""
    write_lines("in.jsonl", gold_rows(6))
    server, ended = endpoint(), threading.Event()
    server.reply_to = lambda prompt: ended.wait(60) and {}
    command = [sys.executable, str(ROOT / "kd_prepare.py"), "--teacher_url", server.url, "--teacher_model", "m"]
    command += ["--input", "in.jsonl", "--output", "kd.jsonl", "--concurrency", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while len(server.requests) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert any("Ctrl-C again ends at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        output = process.stderr.read()
        status = process.wait()
    assert not any(server.answered.values())
    ended.set()
    assert status == 130 and "kd_prepare.py: interrupted" in output and len(server.requests) == 2


@pytest.mark.parametrize("part", ["top_logprobs", "logprobs"])
def test_replies_without_log_probabilities(part, here, endpoint):
    """The answers count, without label_probs."""
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(logprobs=True)

    def change(prompt, choice):
        (choice["logprobs"]["content"][0] if part == "top_logprobs" else choice)[part] = None

    change_replies(server, change)
    assert ask_endpoint(server.url, "--retries", 1) == 0
    assert all("label_probs" not in row for row in read_lines("kd.jsonl"))


def test_half_texts_are_left_out(here, endpoint, capsys):
    """What stops at --max_new_tokens would teach to stop there; a label with more text is still a label."""
    write_lines("free.jsonl", [{"prompt": "write " + "x" * i} for i in range(6)])
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint()

    def change(prompt, choice):
        choice["finish_reason"] = "length" if prompt.endswith("xx") or "\n" in prompt else "stop"

    change_replies(server, change)
    assert ask_endpoint(server.url, source="free.jsonl") == 0
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["write ", "write x"]
    assert "4 prompts are left out, their answer: cut off at --max_new_tokens" in capsys.readouterr().err
    assert ask_endpoint(server.url, "--overwrite") == 0 and len(read_lines("kd.jsonl")) == 6


def test_pauses_grow_and_are_as_long_as_the_endpoint_asks(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(2))
    pauses = []
    monkeypatch.setattr(HttpTeacher, "_pause", lambda self, seconds: pauses.append(seconds))
    assert ask_endpoint(endpoint(("429", *["drop"] * 5)).url, "--concurrency", 1, "--retries", 6) == 0
    assert pauses[0] >= 1  # retry-after
    for number, pause in enumerate(pauses[1:], 1):
        assert 0.25 * 2**number <= pause <= 0.75 * 2**number


def test_the_pause_that_a_header_asks_for():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < seconds_of(soon) <= 30
    assert [seconds_of(text) for text in ("7", "1.5", "", "soon", "Thu, 26 Nov 2026")] == [7, 1.5, 0, 0, 0]


def test_an_endpoint_without_an_answer_in_time(here, endpoint, capsys):
    write_lines("in.jsonl", gold_rows(2))
    assert ask_endpoint(endpoint(seconds=1).url, "--timeout", 0.2, "--retries", 0) == 1
    assert "a prompt is given up: " in capsys.readouterr().err


def test_an_unreachable_endpoint(here, capsys):
    write_lines("in.jsonl", gold_rows(6))
    assert ask_endpoint("http://127.0.0.1:9/v1", "--retries", 1) == 1
    output = capsys.readouterr().err
    assert "6 of 6 prompts got no answer" in output
    assert output.count("a prompt is given up: [Errno 111] Connection refused") == 1


def test_an_unreachable_endpoint_is_not_tried_for_every_prompt(here, monkeypatch):
    write_lines("in.jsonl", gold_rows(60))
    pauses = []

    def pause(self, seconds):
        pauses.append(seconds)
        time.sleep(0.1)  # so that the answers are counted meanwhile, also on a busy machine

    monkeypatch.setattr(HttpTeacher, "_pause", pause)
    with pytest.raises(InputError, match="/v1: 8 prompts got no answer in all tries"):
        ask_endpoint("http://127.0.0.1:9/v1", "--retries", 1, "--concurrency", 4)
    assert len(pauses) < 30  # of 60 prompts


def test_log_probs_of_an_endpoint_become_label_probs(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    assert ask_endpoint(endpoint(logprobs=True).url) == 0
    for row in read_lines("kd.jsonl"):
        assert row["label_probs"] == pytest.approx({"Good": 0.6 / 0.9, "Standard": 0.2 / 0.9, "Bad": 0.1 / 0.9})
        assert row["teacher"]["probability"] == row["label_probs"][row["teacher_output"]]  # not the highest


def test_flags_of_the_answer_reach_the_endpoint(here, endpoint):
    write_lines("in.jsonl", gold_rows(3))
    server = endpoint()
    assert ask_endpoint(server.url, "--temperature", 0.5, "--max_new_tokens", 17) == 0
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in server.requests} == {(0.5, 17, "m")}


def test_the_key_is_sent_and_written_nowhere(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = endpoint(("500",))
    assert ask_endpoint(server.url, "--api_key_env", "MY_KEY", "--retries", 0) == 1
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in Path("kd.jsonl.part.json").read_text() + Path("kd.jsonl.part").read_text()


def test_a_reason_is_requested_from_the_teacher_alone(here, endpoint):
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    server = endpoint()
    assert ask_endpoint(server.url, "--rationale") == 0
    assert all(body["messages"][-1]["content"].endswith(RATIONALE) for body in server.requests)
    for row, sent in zip(read_lines("kd.jsonl"), rows, strict=True):
        assert row["input"] == sent["input"]
        assert label_of(row["teacher_output"], TASK.labels) and "because of the debt" in row["teacher_output"]
        assert row["teacher"]["prompt"] == "1, for a reason"
