"""Teachers: a tiny model, an endpoint that fails in every way, and gradient boosting; the gate; resuming."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import kd_prepare
import teachers
from common import LabelScorer, PromptEncoder
from conftest import ROOT, credit_rows, save_adapter
from creditmix import LABELS, CreditRow, creditmix_prompt, gold_known, read_creditmix, tabular_teacher
from files import InputError, split_of
from models import load_model
from teachers import RATIONALE, HttpTeacher, label_of

PLAIN = ["--quantization", "none", "--compute_dtype", "float32"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def gold_rows(count: int) -> list[dict]:
    rows = credit_rows(customers=count, months=1)
    return [{"input": creditmix_prompt(row["question"]), "output": LABELS[i % 3]} for i, row in enumerate(rows)]


# ----------------------------------------------------------------------------------------------------------- endpoint


class Endpoint:
    """An OpenAI-compatible server that answers by rule; `faults` are played before the answers."""

    def __init__(self, faults: tuple[str, ...] = (), logprobs: bool = False, seconds: float = 0.0):
        self.faults, self.logprobs, self.seconds = list(faults), logprobs, seconds
        self.answered: Counter[str] = Counter()
        self.asked: list[dict] = []
        self.keys: set[str] = set()
        self.refusal = b'{"error": {"message": "not now"}}'
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    endpoint.asked.append(body)
                    endpoint.keys.add(self.headers["authorization"])
                    fault = endpoint.faults.pop(0) if endpoint.faults else None
                time.sleep(endpoint.seconds)
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault and fault.isdigit():
                    self.reply(int(fault), endpoint.refusal, {"retry-after": "1"})
                    return
                prompt = body["messages"][-1]["content"]
                content = json.dumps(endpoint.reply_to(prompt)).encode()
                if fault == "half json":
                    self.reply(200, content[: len(content) // 2])
                    return
                if fault == "half body":
                    self.reply(200, content[: len(content) // 2], length=len(content))
                    self.close_connection = True
                    return
                if fault == "empty":
                    content = json.dumps(endpoint.reply_to(prompt) | {"choices": []}).encode()
                else:
                    endpoint.answered[prompt] += 1
                self.reply(200, content)

            def reply(self, status, content, headers=None, length=None):
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | (headers or {})).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply_to(self, prompt: str) -> dict:
        """Right for two rows of three; a reason where one is asked for."""
        text = LABELS[len(prompt) % 3] + (" because of the debt." if RATIONALE in prompt else "")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if self.logprobs:
            shares = {"Good": 0.5, " Good": 0.1, "Stand": 0.2, "Bad": 0.1, "x": 0.05}
            top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in shares.items()]
            choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def answer_in_turn(server: Endpoint, texts: list[str]) -> None:
    """The n-th text to the prompt that ends with the digit n."""
    whole = server.reply_to

    def reply(prompt):
        made = whole(prompt)
        made["choices"][0]["message"]["content"] = texts[int(prompt[-1])]
        return made

    server.reply_to = reply


@pytest.fixture
def endpoint():
    made = []

    def make(*args, **kwargs) -> Endpoint:
        made.append(Endpoint(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(HttpTeacher, "_pause", lambda self, seconds: self._stopped.wait(min(seconds, 0.02)))


def ask(url: str, *flags, source: str = "in.jsonl") -> int:
    argv = ["--teacher_url", url, "--teacher_model", "m", "--input", source, "--output", "kd.jsonl", *flags]
    return kd_prepare.main([str(flag) for flag in argv])


FAULTS = ("429", "500", "503", "drop", "half json", "half body", "empty")


def test_an_unreliable_endpoint_answers_every_prompt_once(here, endpoint):
    rows = gold_rows(30)
    write_lines("in.jsonl", rows)
    server = endpoint(FAULTS * 2)
    assert ask(server.url) == 0
    assert server.faults == [] and len(server.asked) == 30 + 2 * len(FAULTS)
    assert server.answered == {row["input"]: 1 for row in rows}  # nothing lost, nothing asked twice
    written = read_lines("kd.jsonl")
    assert [row["input"] for row in written] == [row["input"] for row in rows]  # in order, whatever came first
    for row in written:
        assert row["teacher_output"] == LABELS[len(row["input"]) % 3] and "label_probs" not in row
        assert row["teacher"] == {"name": "m", "prompt": str(teachers.PROMPT_VERSION)}
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "kd.jsonl"]


def test_what_was_answered_is_not_asked_again(here, endpoint, capsys):
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    server = endpoint(("500",) * 5)
    assert ask(server.url, "--retries", 0, "--concurrency", 1) == 1
    assert "5 of 12 prompts got no answer; what others got is kept in kd.jsonl.part" in capsys.readouterr().err
    assert not Path("kd.jsonl").exists() and len(server.asked) == 12
    with open("kd.jsonl.part", "a") as out:
        out.write('{"row": 11, "teacher_out')  # killed while writing
    assert ask(server.url) == 0
    assert len(server.asked) == 17 and server.answered == {row["input"]: 1 for row in rows}
    assert len(read_lines("kd.jsonl")) == 12


def test_other_answers_are_not_mixed_in(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    assert ask(endpoint(("500",)).url, "--retries", 0) == 1
    with pytest.raises(InputError, match=r"kd\.jsonl\.part: left by a run with another teacher, input or flags"):
        ask(endpoint().url)
    fresh = endpoint()
    assert ask(fresh.url, "--overwrite") == 0
    assert len(fresh.asked) == 6


def test_killed_and_run_again(here, endpoint):
    """kill -9 in the middle, twice: only what was not yet written is asked again."""
    rows = gold_rows(40)
    write_lines("in.jsonl", rows)
    server = endpoint(seconds=0.1)
    command = [sys.executable, str(ROOT / "kd_prepare.py"), "--teacher_url", server.url, "--teacher_model", "m"]
    command += ["--input", "in.jsonl", "--output", "kd.jsonl", "--concurrency", "2"]
    kept = 0
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not Path("kd.jsonl.part").exists() or len(Path("kd.jsonl.part").read_bytes().splitlines()) < kept + 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = Path("kd.jsonl.part").read_bytes().count(b"\n")
        time.sleep(0.3)  # the endpoint finishes what it was asked
    written = {rows[json.loads(line)["row"]]["input"] for line in Path("kd.jsonl.part").read_text().splitlines()}
    before = server.answered.copy()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert all(server.answered[prompt] == before[prompt] for prompt in written)
    assert [row["input"] for row in read_lines("kd.jsonl")] == [row["input"] for row in rows]
    assert (
        sum(server.answered.values()) <= 40 + 2 * 4
    )  # at most two under way and two on their way to the file, at each


def test_a_model_that_goes_on_says_what_it_would_have_said(here, model_dir, monkeypatch):
    write_lines("in.jsonl", gold_rows(20))
    flags = ["--teacher", model_dir, "--input", "in.jsonl", "--quantization", "none", "--compute_dtype", "float32"]
    assert kd_prepare.main([*flags, "--output", "whole.jsonl"]) == 0
    answers = teachers.ModelTeacher.answers

    def interrupted(self, *rest):
        for count, answer in enumerate(answers(self, *rest)):
            if count == 7:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teachers.ModelTeacher, "answers", interrupted)
        kd_prepare.main([*flags, "--output", "kd.jsonl"])
    assert kd_prepare.main([*flags, "--output", "kd.jsonl"]) == 0
    for whole, resumed in zip(read_lines("whole.jsonl"), read_lines("kd.jsonl"), strict=True):
        assert resumed["label_probs"] == pytest.approx(whole["label_probs"], abs=1e-4)


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_is_refused_for_good_ends_at_once(here, endpoint, status):
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint((status,) * 50)
    with pytest.raises(InputError, match=f"/v1 answers {status}: .*not now"):
        ask(server.url, "--concurrency", 1)
    assert len(server.asked) <= 2


def test_a_request_that_is_refused_for_every_prompt_ends_soon(here, endpoint):
    """And no prompt counts as refused for it: with the endpoint put right all are asked."""
    write_lines("in.jsonl", gold_rows(30))
    with pytest.raises(InputError, match=r"/v1 answers 400: .*not now"):
        ask(endpoint(("400",) * 50).url, "--concurrency", 1)
    assert Path("kd.jsonl.part").read_text() == ""


def test_a_prompt_that_is_refused_is_left_out(here, endpoint, capsys):
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    server = endpoint(("400", "413"))
    assert ask(server.url, "--concurrency", 1) == 0
    said = capsys.readouterr().err
    assert "1 prompts are left out, their answer: answers 400" in said and "their answer: answers 413" in said
    assert [row["input"] for row in read_lines("kd.jsonl")] == [row["input"] for row in rows[2:]]
    assert len(server.asked) == 12


def test_what_is_under_way_is_kept_when_the_endpoint_refuses(here, endpoint):
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(("",) * 3 + ("401",) * 50, seconds=0.05)
    with pytest.raises(InputError, match="answers 401"):
        ask(server.url, "--concurrency", 4)
    assert len(Path("kd.jsonl.part").read_text().splitlines()) == sum(server.answered.values()) == 3


@pytest.mark.parametrize("together", [1, 4])
def test_an_endpoint_that_refuses_likelihoods_is_asked_without(together, here, endpoint, monkeypatch, capsys):
    """Also for the prompts that were under way when the first was refused, and without a further try."""
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(("400",) * together * 2, seconds=0.2)
    monkeypatch.setattr(server, "refusal", b'{"error": {"message": "' + b"x" * 300 + b'logprobs are not supported"}}')
    assert ask(server.url, "--concurrency", together, "--retries", 0) == 0
    assert [body.get("top_logprobs") for body in server.asked] == [20] * together + [5] * together + [None] * 6
    assert len(read_lines("kd.jsonl")) == 6
    assert capsys.readouterr().err.count("asked without likelihoods, there are no label_probs") == 1


def test_an_endpoint_that_sends_fewer_likelihoods_is_asked_for_fewer(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(("400",), logprobs=True)
    monkeypatch.setattr(server, "refusal", b'{"error": {"message": "top_logprobs must be at most 5"}}')
    assert ask(server.url, "--concurrency", 1, "--retries", 0) == 0
    assert [body["top_logprobs"] for body in server.asked] == [20] + [5] * 6
    assert all("label_probs" in row for row in read_lines("kd.jsonl"))


@pytest.mark.parametrize(
    ("text", "reason", "why"),
    [
        (None, "content_filter", "ends with finish_reason content_filter, no text"),
        ("", "stop", "ends with finish_reason stop, no text"),
        ("", "length", "cut off at --max_new_tokens"),
        ("The first half of", "content_filter", "ends with finish_reason content_filter"),
    ],
)
def test_an_answer_that_would_be_the_same_again_is_left_out(here, endpoint, capsys, text, reason, why):
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    server = endpoint()
    whole = server.reply_to

    def reply(prompt):
        made = whole(prompt)
        if prompt == rows[1]["input"]:
            made["choices"][0] |= {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return made

    server.reply_to = reply
    assert ask(server.url) == 0
    assert len(server.asked) == 6 and len(read_lines("kd.jsonl")) == 5
    assert f"1 prompts are left out, their answer: {why}" in capsys.readouterr().err


def test_an_answer_with_half_a_character_is_kept(here, endpoint):
    write_lines("in.jsonl", [{"prompt": f"write {i}"} for i in range(3)])
    server = endpoint()
    answer_in_turn(server, ["fine \ud83d"] * 3)
    assert ask(server.url) == 0
    assert [row["teacher_output"] for row in read_lines("kd.jsonl")] == ["fine ?"] * 3


@pytest.fixture
def one_fails(here, endpoint):
    """An endpoint that has answered 11 of 12 prompts and failed for one."""
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(("500",))
    assert ask(server.url, "--concurrency", 1, "--retries", 0) == 1
    return server


def test_a_run_goes_on_to_its_end_where_the_last_prompts_are_refused(one_fails, capsys):
    one_fails.faults = ["400"]
    assert ask(one_fails.url) == 0
    assert len(read_lines("kd.jsonl")) == 11 and "their answer: answers 400" in capsys.readouterr().err


def test_what_there_is_may_be_written(capsys, one_fails):
    assert "or with --partial to do without" in capsys.readouterr().err
    one_fails.faults = ["500"]
    assert ask(one_fails.url, "--retries", 0, "--partial") == 0
    assert len(read_lines("kd.jsonl")) == 11 and "1 of 12 prompts got no answer" in capsys.readouterr().err


def test_what_is_under_way_is_kept_at_ctrl_c(here, endpoint):
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(seconds=1)

    def interrupt():
        while len(server.asked) < 4:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ask(server.url, "--concurrency", 4)
    assert len(Path("kd.jsonl.part").read_text().splitlines()) == len(server.asked) == 4
    assert ask(server.url, "--concurrency", 8) == 0 and len(server.asked) == 12


def test_two_runs_at_once_are_refused(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = [sys.executable, "-c", code, "kd.jsonl.part.lock"]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        server = endpoint()
        with pytest.raises(InputError, match="another run is writing it"):
            ask(server.url)
        assert not server.asked
        process.communicate(b"\n")
    assert ask(server.url) == 0 and not Path("kd.jsonl.part.lock").exists()


@pytest.mark.parametrize("part", ["message", "top_logprobs", "logprobs"])
def test_replies_of_another_form(part, here, endpoint, capsys):
    """An answer without likelihoods is one; without a text it is asked for again, and given up in the end."""
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(logprobs=True)
    whole = server.reply_to

    def reply(prompt):
        made = whole(prompt)
        choice = made["choices"][0]
        (choice["logprobs"]["content"][0] if part == "top_logprobs" else choice)[part] = None
        return made

    server.reply_to = reply
    assert ask(server.url, "--retries", 1) == (part == "message")
    if part == "message":
        assert "6 of 6 prompts got no answer" in capsys.readouterr().err and len(server.asked) == 12
    else:
        assert all("label_probs" not in row for row in read_lines("kd.jsonl"))


def test_half_texts_are_left_out(here, endpoint, capsys):
    """What stops at --max_new_tokens would teach to stop there; a label that goes on is a label."""
    write_lines("free.jsonl", [{"prompt": "write " + "x" * i} for i in range(6)])
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint()
    whole = server.reply_to

    def reply(prompt):
        made = whole(prompt)
        made["choices"][0]["finish_reason"] = "length" if prompt.endswith("xx") or "\n" in prompt else "stop"
        return made

    server.reply_to = reply
    assert ask(server.url, source="free.jsonl") == 0
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["write ", "write x"]
    assert "4 prompts are left out, their answer: cut off at --max_new_tokens" in capsys.readouterr().err
    assert ask(server.url, "--overwrite") == 0 and len(read_lines("kd.jsonl")) == 6


def test_pauses_grow_and_are_as_long_as_the_endpoint_asks(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(2))
    pauses = []
    monkeypatch.setattr(HttpTeacher, "_pause", lambda self, seconds: pauses.append(seconds))
    assert ask(endpoint(("429", *["drop"] * 5)).url, "--concurrency", 1, "--retries", 6) == 0
    assert pauses[0] >= 1  # retry-after
    for number, pause in enumerate(pauses[1:], 1):
        assert 0.25 * 2**number <= pause <= 0.75 * 2**number


def test_the_pause_that_a_header_asks_for():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < teachers.seconds_of(soon) <= 30
    assert [teachers.seconds_of(text) for text in ("7", "1.5", "", "soon", "Thu, 26 Nov 2026")] == [7, 1.5, 0, 0, 0]


def test_an_endpoint_that_does_not_answer_in_time(here, endpoint, capsys):
    write_lines("in.jsonl", gold_rows(2))
    assert ask(endpoint(seconds=1).url, "--timeout", 0.2, "--retries", 0) == 1
    assert "a prompt is given up: " in capsys.readouterr().err


def test_an_endpoint_that_is_not_there(here, capsys):
    write_lines("in.jsonl", gold_rows(6))
    assert ask("http://127.0.0.1:9/v1", "--retries", 1) == 1
    said = capsys.readouterr().err
    assert "6 of 6 prompts got no answer" in said
    assert said.count("a prompt is given up: [Errno 111] Connection refused") == 1


def test_an_endpoint_that_is_not_there_is_not_asked_for_every_prompt(here, monkeypatch):
    write_lines("in.jsonl", gold_rows(60))
    pauses = []
    monkeypatch.setattr(HttpTeacher, "_pause", lambda self, seconds: pauses.append(seconds))
    with pytest.raises(InputError, match="/v1: 8 prompts got no answer in all tries"):
        ask("http://127.0.0.1:9/v1", "--retries", 1, "--concurrency", 4)
    assert len(pauses) <= 16


def test_likelihoods_of_an_endpoint_become_label_probs(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    assert ask(endpoint(logprobs=True).url) == 0
    for row in read_lines("kd.jsonl"):
        assert row["label_probs"] == pytest.approx({"Good": 0.6 / 0.9, "Standard": 0.2 / 0.9, "Bad": 0.1 / 0.9})
        assert row["teacher"]["probability"] == row["label_probs"][row["teacher_output"]]  # not the highest


@pytest.mark.parametrize(("method", "right"), [("none", 14), ("batch", 40), ("auto", 40)])
def test_likelihoods_of_an_endpoint_are_calibrated(here, endpoint, method, right):
    """A model that says Good to all, though its likelihoods tell the labels apart."""
    questions = [row["question"] for row in credit_rows(customers=40, months=1)]
    rows = [{"input": creditmix_prompt(q), "output": LABELS[i % 3]} for i, q in enumerate(questions)]
    write_lines("in.jsonl", rows)
    gold = {row["input"]: row["output"] for row in rows}
    server = endpoint()

    def reply(prompt):
        good, standard, bad = {"Good": (0.9, 0.06, 0.01), "Standard": (0.6, 0.3, 0.01)}.get(
            gold[prompt], (0.6, 0.06, 0.2)
        )
        shares = {"Good": good, "Stand": standard, "Bad": bad}
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in shares.items()]
        choice = {"index": 0, "message": {"role": "assistant", "content": "Good"}, "finish_reason": "stop"}
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}

    server.reply_to = reply
    assert ask(server.url, "--calibration", method, "--labels", "Good,Standard,Bad") == 0
    written = read_lines("kd.jsonl")
    assert sum(row["teacher_output"] == gold[row["input"]] for row in written) == right
    assert all(row["teacher"]["probability"] == max(row["label_probs"].values()) for row in written)


@pytest.mark.parametrize("without", [1, 4])
def test_a_few_answers_without_likelihoods_do_not_cost_those_of_the_others(without, here, endpoint, capsys):
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(logprobs=True)
    whole, bare = server.reply_to, [row["input"] for row in gold_rows(12)[:without]]

    def reply(prompt):
        made = whole(prompt)
        if prompt in bare:
            made["choices"][0]["logprobs"] = None
        return made

    server.reply_to = reply
    assert ask(server.url) == 0
    rows = read_lines("kd.jsonl")
    assert f"{without} of 12 answers came without likelihoods" in capsys.readouterr().err
    assert len(rows) == (11 if without == 1 else 12)
    assert all(("label_probs" in row) == ("probability" in row["teacher"]) == (without == 1) for row in rows)


def test_flags_of_the_answer_reach_the_endpoint(here, endpoint):
    write_lines("in.jsonl", gold_rows(3))
    server = endpoint()
    assert ask(server.url, "--temperature", 0.5, "--max_new_tokens", 17) == 0
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in server.asked} == {(0.5, 17, "m")}


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(here, endpoint, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    monkeypatch.setenv("MY_KEY", "s3cret")
    server = endpoint(("500",))
    assert ask(server.url, "--api_key_env", "MY_KEY", "--retries", 0) == 1
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in Path("kd.jsonl.part.json").read_text() + Path("kd.jsonl.part").read_text()


def test_a_reason_is_asked_for_and_the_student_is_asked_as_ever(here, endpoint):
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    server = endpoint()
    assert ask(server.url, "--rationale") == 0
    assert all(body["messages"][-1]["content"].endswith(RATIONALE) for body in server.asked)
    for row, given in zip(read_lines("kd.jsonl"), rows, strict=True):
        assert row["input"] == given["input"]
        assert label_of(row["teacher_output"], LABELS) and "because of the debt" in row["teacher_output"]
        assert row["teacher"]["prompt"] == "1, for a reason"


def test_labels_may_be_named_where_no_gold_is(here, endpoint, capsys):
    rows = [{"prompt": row["input"]} for row in gold_rows(6)]
    write_lines("in.jsonl", rows)
    assert ask(endpoint(logprobs=True).url, "--labels", "Good, Standard,Bad") == 0
    assert "no gold answers: the teacher cannot be checked" in capsys.readouterr().err
    for row in read_lines("kd.jsonl"):
        assert row["teacher_output"] == LABELS[len(row["input"]) % 3] and set(row["label_probs"]) == set(LABELS)


def test_another_prompt_needs_another_version():
    """Rows keep the version alone: this digest and the version change together."""
    text = json.dumps([teachers.SYSTEM_PROMPT, RATIONALE, teachers.user_turn("x", True)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (teachers.PROMPT_VERSION, digest) == (1, "09b18133ef1386de")


# ----------------------------------------------------------------------------------------------------------- the gate


def test_a_weak_teacher_gets_a_warning_and_a_good_one_none(here, endpoint, capsys):
    rows = gold_rows(30)
    for agree, warned in ((False, True), (True, False)):
        given = [row | {"output": LABELS[(len(row["input"]) + (not agree)) % 3]} for row in rows]
        write_lines("in.jsonl", given)
        assert ask(endpoint().url, "--overwrite") == 0
        said = capsys.readouterr()
        assert ("WARNING: the teacher is weaker than majority" in said.err) == warned
        assert f"teacher              accuracy {float(agree):.4f} on 30 rows" in said.out
        assert "Standard" in said.out and "recall" in said.out  # for each class


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], lambda said, gold: True),
        (["--filter", "agree"], lambda said, gold: said == gold),
        (["--filter", "confident"], lambda said, gold: said == "Good"),  # 0.67; of the others 0.22 and 0.11
        (["--filter", "confident", "--min_confidence", "0.2"], lambda said, gold: said != "Bad"),
    ],
)
def test_filters(here, endpoint, flags, wanted):
    rows = [{"input": "x" * i, "output": LABELS[0] if i > 3 else LABELS[i % 3]} for i in range(1, 10)]
    write_lines("in.jsonl", rows)
    assert ask(endpoint(logprobs=True).url, *flags) == 0
    said = [LABELS[len(row["input"]) % 3] for row in rows]
    expected = [row["input"] for row, label in zip(rows, said, strict=True) if wanted(label, row["output"])]
    assert [row["input"] for row in read_lines("kd.jsonl")] == expected and expected


def test_free_answers_are_compared_with_gold_by_value(here, endpoint, capsys):
    answers = ['{"a": 1, "b": 2}', "text", '{"a": 2}', "{"]
    write_lines("in.jsonl", [{"input": f"read {i}", "output": text} for i, text in enumerate(answers)])
    server = endpoint()
    answer_in_turn(server, ['{"b": 2, "a": 1.0}', " text", '{"a": 3}', "{"])
    assert ask(server.url, "--filter", "agree") == 0
    assert "the teacher's answer is the gold answer in 3 of 4 rows" in capsys.readouterr().out
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["read 0", "read 1", "read 3"]


def test_code_is_held_against_the_tests_of_its_row(here, endpoint, capsys):
    """An answer that is written otherwise than the known one may be as right."""
    row = {"output": "def f(x):\n    return x + x", "tests": ["assert f(2) == 4", "assert f(3) == 6"]}
    write_lines("in.jsonl", [row | {"input": f"Write f. {i}"} for i in range(3)])
    server = endpoint()
    answer_in_turn(server, ["```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return x * x", "f("])
    assert ask(server.url, "--filter", "agree") == 0
    assert "the teacher's answer passes its tests in 1 of 3 rows" in capsys.readouterr().out
    assert [row["input"] for row in read_lines("kd.jsonl")] == ["Write f. 0"]


def test_a_changed_input_is_refused(here, endpoint):
    """Its note has a split that its rows need not have; output without one would pass for data of another origin."""
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    note = {"split_seed": 3, "files": {"in.jsonl": hashlib.sha256(Path("in.jsonl").read_bytes()).hexdigest()}}
    Path("in_prepared.json").write_text(json.dumps(note))
    server = endpoint()
    assert ask(server.url) == 0
    written = json.loads(Path("kd_prepared.json").read_text())
    assert written["split_seed"] == 3 and written["teacher"]["url"] == server.url
    write_lines("in.jsonl", rows[:5])
    with pytest.raises(InputError, match=r"in\.jsonl: changed since .*in_prepared\.json was written"):
        ask(server.url, "--overwrite")
    assert len(server.asked) == 6


def test_a_filter_that_leaves_nothing_is_said(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    with pytest.raises(InputError, match=r"no row is left \(--filter confident\)"):
        ask(endpoint(logprobs=True).url, "--filter", "confident", "--min_confidence", 0.99)
    assert not Path("kd.jsonl").exists() and Path("kd.jsonl.part").exists()  # the answers are not lost


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Bad", "Bad"),
        ("**Bad** because", "Bad"),
        ('"good".', "Good"),
        ("The label is Bad", "Bad"),
        ("Badly", None),
        ("Good. Unlike bad customers this one pays.", "Good"),
        ("Good, standard or Bad?", None),
        ("Good/Bad", None),
        ("Not good", None),
        ("Good? No, Bad.", None),
        ("Good isn't right", None),
        ("The mix is below standard", None),
        ("It cannot be rated as anything good", None),
        ("<think>Good or Bad? The debt is high.</think>\nBad", "Bad"),
        ("It is not at all bad", None),
        ("The customer isn't a Bad one", None),
        ("Not bad but good", None),
        ("none", None),
        ("", None),
    ],
)
def test_label_of(answer, label):
    assert label_of(answer, LABELS) == label
    assert label_of("Good enough", ["Good", "Good enough"]) == "Good enough"
    assert label_of("None of these, notably", ["Yes", "No"]) is None


# ------------------------------------------------------------------------------------------------------------- models


def test_a_model_answers_label_tasks_by_calibrated_likelihood(here, model_dir):
    rows = gold_rows(9)
    write_lines("in.jsonl", rows)
    argv = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", "--batch_size", "4", *PLAIN]
    assert kd_prepare.main([*argv, "--calibration", "batch"]) == 0
    model, tokenizer = load_model(model_dir, "none", "float32")
    names = sorted(LABELS)
    raw = LabelScorer(model, PromptEncoder(tokenizer), {n: [n] for n in names}).raw_scores([r["input"] for r in rows])
    logits = raw - raw.mean(axis=0)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, probabilities in zip(read_lines("kd.jsonl"), wanted, strict=True):
        np.testing.assert_allclose([row["label_probs"][n] for n in names], probabilities, atol=1e-3)
        assert row["teacher_output"] == names[int(np.argmax([row["label_probs"][n] for n in names]))]
        assert row["teacher"]["name"] == model_dir


def test_a_model_is_calibrated_where_that_makes_the_gold_answers_likelier(here, model_dir, tmp_path, capsys):
    """Without gold answers a base is, an adapter is not, and nothing is by the mean of a few prompts."""
    rows, names = gold_rows(40), sorted(LABELS)
    model, tokenizer = load_model(model_dir, "none", "float32")
    raw = LabelScorer(model, PromptEncoder(tokenizer), {n: [n] for n in names}).raw_scores([r["input"] for r in rows])
    adapter = save_adapter(tmp_path / "adapter", model_dir)

    def chosen(teacher: str, count: int, logits: np.ndarray | None = None, *flags: str) -> str:
        gold = [] if logits is None else [{"output": names[i]} for i in logits.argmax(axis=1)]
        asked = [{"input": row["input"]} | (gold[i] if gold else {}) for i, row in enumerate(rows[:count])]
        argv = ["--teacher", teacher, "--input", write_lines("in.jsonl", asked), "--output", "kd.jsonl", "--overwrite"]
        capsys.readouterr()
        assert kd_prepare.main([*argv, "--labels", "Good,Standard,Bad", *PLAIN, *flags]) == 0
        return capsys.readouterr().err

    for logits, wanted in ((raw, "none"), (raw - raw.mean(axis=0), "batch")):
        assert f"calibration of the teacher: {wanted}" in chosen(model_dir, 40, logits)
    assert "calibration of the teacher: batch" in chosen(model_dir, 40)
    assert "calibration of the teacher: none" in chosen(adapter, 40)
    assert "calibration of the teacher: none" in chosen(model_dir, 5)
    chosen(model_dir, 40, None, "--calibration", "none")
    wanted = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    for row, probabilities in zip(read_lines("kd.jsonl"), wanted, strict=True):
        np.testing.assert_allclose([row["label_probs"][n] for n in names], probabilities, atol=1e-3)


def test_a_model_in_nf4_is_a_teacher(here, model_dir):
    rows, names = gold_rows(6), sorted(LABELS)
    write_lines("in.jsonl", rows)
    argv = ["--teacher", model_dir, "--input", "in.jsonl", "--calibration", "none", "--compute_dtype", "float32"]
    found = {}
    for quantization in ("nf4", "none"):
        assert kd_prepare.main([*argv, "--output", f"{quantization}.jsonl", "--quantization", quantization]) == 0
        answers = read_lines(f"{quantization}.jsonl")
        found[quantization] = np.array([[row["label_probs"][name] for name in names] for row in answers])
        model, tokenizer = load_model(model_dir, quantization, "float32")
        scorer = LabelScorer(model, PromptEncoder(tokenizer), {n: [n] for n in names}, batch_size=16)
        wanted = np.exp(scorer.raw_scores([row["input"] for row in rows]))
        np.testing.assert_allclose(found[quantization], wanted / wanted.sum(axis=1, keepdims=True), atol=1e-3)
    assert np.abs(found["nf4"] - found["none"]).max() > 0.01


def test_a_model_writes_reasons_and_free_text(here, model_dir, monkeypatch, capsys):
    write_lines("in.jsonl", gold_rows(6))
    argv = ["--teacher", model_dir, "--output", "kd.jsonl", "--max_new_tokens", "8", "--overwrite", *PLAIN]
    assert kd_prepare.main([*argv, "--input", "in.jsonl", "--rationale"]) == 0
    left_out = 6 - len(read_lines("kd.jsonl"))  # a random model comes to an end by chance
    assert f"{left_out} prompts are left out, their answer: cut off at --max_new_tokens" in capsys.readouterr().err
    written = teachers.ModelTeacher._written
    monkeypatch.setattr(teachers.ModelTeacher, "_written", lambda *args: [(t, True) for t, _ in written(*args)])
    assert kd_prepare.main([*argv, "--input", "in.jsonl", "--rationale"]) == 0
    for row in read_lines("kd.jsonl"):
        assert row["teacher_output"].startswith(max(row["label_probs"], key=row["label_probs"].get))
    write_lines("free.jsonl", [{"prompt": f"Write {i}"} for i in range(5)])
    assert kd_prepare.main([*argv, "--input", "free.jsonl"]) == 0
    assert all(set(row) == {"input", "teacher_output", "teacher"} for row in read_lines("kd.jsonl"))


def test_samples_are_drawn_again_where_a_killed_run_goes_on(here, model_dir):
    """One seed, one answer to each prompt, whatever was answered before; another seed, others."""
    flags = [
        "--teacher",
        model_dir,
        "--input",
        "i",
        "--output",
        "o",
        "--temperature",
        "1",
        "--batch_size",
        "4",
        *PLAIN,
    ]
    prompts = {number: f"Write {number}" for number in range(12)}

    def answers(seed: str, waiting: dict[int, str]) -> dict[int, dict]:
        args = kd_prepare.build_parser().parse_args([*flags, "--max_new_tokens", "6", "--seed", seed])
        return dict(teachers.ModelTeacher(model_dir, args, ()).answers(waiting, []))

    whole = answers("5", prompts)
    first = list(whole)[:4]  # a batch
    rest = {number: prompt for number, prompt in prompts.items() if number not in first}
    assert answers("5", rest) == {number: whole[number] for number in rest}
    assert answers("6", prompts) != whole
    assert len({answer["teacher_output"] for answer in whole.values()}) > 9


def test_another_teacher_does_not_go_on(here, model_dir, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    argv = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *PLAIN]

    def interrupted(self, *rest):
        yield 0, {"teacher_output": "Good"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teachers.ModelTeacher, "answers", interrupted)
        kd_prepare.main(argv)
    monkeypatch.setattr(kd_prepare, "model_fingerprint", lambda folder: "trained again since")
    with pytest.raises(InputError, match="left by a run with another teacher"):
        kd_prepare.main(argv)


def test_a_prompt_beyond_the_teachers_context_is_refused(here, model_dir):
    write_lines("in.jsonl", [{"input": "x y " * 400}])
    with pytest.raises(InputError, match="exceed the teacher's context of 512"):
        kd_prepare.main(["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *PLAIN])


# ------------------------------------------------------------------------------------------------------------ tabular


def test_tabular_labels_training_customers_that_it_never_saw(here, credit_file, capsys):
    assert kd_prepare.main(["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl"]) == 0
    written = read_lines("kd.jsonl")
    owners = {creditmix_prompt(row.features): row.customer for row in read_creditmix(credit_file)[0]}
    assert {split_of(owners[row["input"]]) for row in written} == {"train"}
    for row in written:
        assert row["teacher_output"] == max(row["label_probs"], key=row["label_probs"].get)
        assert row["teacher"]["name"] == "tabular"
    note = json.loads(Path("kd_prepared.json").read_text())
    assert note["split_seed"] == 0 and note["teacher"]["teacher"] > 0.8
    assert "logistic regression  accuracy" in capsys.readouterr().out


def test_rows_of_the_tabular_teacher_are_drawn_by_its_flags(here, credit_file):
    def drawn(*flags: str) -> list[str]:
        argv = ["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl", "--overwrite", *flags]
        assert kd_prepare.main(argv) == 0
        return [row["input"] for row in read_lines("kd.jsonl")]

    rows = drawn("--per_class", "4")
    assert len(rows) == 12 and rows == drawn("--per_class", "4")
    assert set(rows) != set(drawn("--per_class", "4", "--seed", "1"))
    owners = {creditmix_prompt(row.features): row.customer for row in read_creditmix(credit_file)[0]}
    assert {split_of(owners[row], 3) for row in drawn("--per_class", "4", "--split_seed", "3")} == {"train"}


def test_labels_that_may_not_be_known_are_not_used():
    """With the others' labels all wrong, the probabilities are the same to the last bit."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = LABELS[number % 3]
        debt = 500 + 900 * (number % 3) + int(rng.integers(0, 600))
        rows.append(CreditRow(f"C{number}", f"Age: {20 + number % 50}, Outstanding Debt: {debt}", label))
    known = [number % 4 == 0 for number in range(300)]
    wrong = [
        row if k else CreditRow(row.customer, row.features, LABELS[(LABELS.index(row.label) + 1) % 3])
        for row, k in zip(rows, known, strict=True)
    ]
    first = tabular_teacher(rows, known, 0)
    np.testing.assert_array_equal(first, tabular_teacher(wrong, known, 0))
    others = [i for i, k in enumerate(known) if not k]
    assert np.mean([LABELS[first[i].argmax()] == rows[i].label for i in others]) > 0.7


def test_a_tenth_of_the_gold_labels(here, credit_file):
    argv = ["--teacher", "tabular", "--src", credit_file, "--output", "kd.jsonl", "--gold_share", "0.4"]
    assert kd_prepare.main(argv) == 0
    counts = Counter(row["teacher_output"] for row in read_lines("kd.jsonl"))
    assert len(set(counts.values())) == 1 and set(counts) == set(LABELS)  # balanced by what the teacher says
    assert json.loads(Path("kd_prepared.json").read_text())["gold_share"] == 0.4
    rows = json.loads(Path(credit_file).read_text())
    flags = kd_prepare.build_parser().parse_args(argv)
    for row in rows:
        if not gold_known(CreditRow(row["customer_id"], "", ""), flags) and row["answer"] in LABELS:
            row["answer"] = LABELS[(LABELS.index(row["answer"]) + 1) % 3]
    Path("wrong.json").write_text(json.dumps(rows))
    argv[3], argv[5] = "wrong.json", "wrong.jsonl"
    assert kd_prepare.main(argv) == 0
    assert Path("wrong.jsonl").read_bytes() == Path("kd.jsonl").read_bytes()  # the other labels are not used


# -------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --teacher or --teacher_url"),
        (["--teacher", "m", "--teacher_url", "u"], "give either --teacher or --teacher_url"),
        (["--teacher_url", "u"], "--teacher_url needs --teacher_model"),
        (["--teacher", "m"], "--input is needed"),
        (["--teacher", "tabular", "--min_confidence", "2"], "--min_confidence is from 0 to 1"),
        (["--teacher", "tabular", "--concurrency", "0"], "--concurrency is at least 1"),
        (["--teacher", "m", "--input", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--teacher", "m", "--input", "bad.jsonl"], 'bad.jsonl: row 1 needs "input" or "prompt"'),
        (["--teacher", "runs/none", "--input", "in.jsonl"], "runs/none: no such model folder"),
        (["--teacher", "m", "--input", "in.jsonl", "--labels", "Good"], "at least two labels are needed, each once"),
        (["--teacher", "m", "--input", "in.jsonl", "--labels", "Good,Bad,Good"], "at least two labels are needed"),
        (["--teacher", "", "--input", "in.jsonl"], "give either --teacher or --teacher_url"),
        (["--teacher_url", "foo", "--teacher_model", "m"], "--teacher_url foo: an address such as http://127"),
        (["--teacher_url", "http://a:99999", "--teacher_model", "m"], "--teacher_url http://a:99999: an address"),
        (["--teacher", "m", "--input", "in.jsonl", "--temperature", "inf"], "--temperature is a finite number"),
        (["--teacher", "m", "--input", "in.jsonl", "--temperature", "nan"], "--temperature is at least 0"),
        (["--teacher", "m", "--input", "in.jsonl", "--timeout", "nan"], "--timeout is above 0 and at most 86400"),
        (["--teacher", "m", "--input", "in.jsonl", "--timeout", "inf"], "--timeout is above 0 and at most 86400"),
        (["--teacher", "tabular", "--input", "in.jsonl"], "--input is not for the tabular teacher"),
        (["--teacher", "tabular", "--rationale"], "--rationale is not for the tabular teacher"),
        (
            ["--teacher", "tabular", "--src", "rows.json", "--gold_share", "1e-9"],
            "no training row has a label that may",
        ),
    ],
)
def test_wrong_flags_and_files(here, flags, message):
    write_lines("in.jsonl", gold_rows(6))
    Path("rows.json").write_text(json.dumps(credit_rows()))
    write_lines("bad.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=message):
        kd_prepare.main([*flags, "--output", "kd.jsonl"])
    assert not Path("kd.jsonl").exists()


def test_a_damaged_line_of_an_interrupted_run_is_named(one_fails):
    part = Path("kd.jsonl.part")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([lines[0], "{\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"kd\.jsonl\.part: line 2 is damaged; take it out"):
        ask(one_fails.url)
    part.write_text("".join([lines[0], *lines[2:]]))
    assert ask(one_fails.url) == 0 and len(read_lines("kd.jsonl")) == 12


def test_an_output_that_exists_is_kept(here):
    Path("kd.jsonl").write_text("precious")
    write_lines("in.jsonl", gold_rows(6))
    with pytest.raises(InputError, match=r"kd\.jsonl: exists; --overwrite replaces it"):
        ask("http://127.0.0.1:9/v1")
    assert Path("kd.jsonl").read_text() == "precious"
