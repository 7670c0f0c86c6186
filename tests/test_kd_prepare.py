"""kd_prepare.py: killed and resumed runs, incomplete answers, notes of its input, wrong flags and files."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FLOAT32, ask_endpoint, gold_rows, read_lines, write_lines

import kd_prepare
from common import InputError
from distil.creditmix.rows import LABELS
from distil.teachers import answers, local
from distil.testing import ROOT, credit_rows


def test_answered_prompts_are_not_sent_again(here, endpoint, capsys):
    rows = gold_rows(12)
    write_lines("in.jsonl", rows)
    server = endpoint(("500",) * 5)
    assert ask_endpoint(server.url, "--retries", 0, "--concurrency", 1) == 1
    output = capsys.readouterr().err
    assert "5 of 12 prompts got no answer; kd.jsonl.part has the others" in output
    assert not Path("kd.jsonl").exists() and len(server.requests) == 12
    with open("kd.jsonl.part", "a") as out:
        out.write('{"row": 11, "teacher_out')  # killed while writing
    assert ask_endpoint(server.url) == 0
    assert len(server.requests) == 17 and server.answered == {row["input"]: 1 for row in rows}
    assert len(read_lines("kd.jsonl")) == 12


def test_answers_of_other_teachers_are_not_mixed_in(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    assert ask_endpoint(endpoint(("500",)).url, "--retries", 0) == 1
    with pytest.raises(InputError, match=r"kd\.jsonl\.part: left by a run with another teacher, input or flags"):
        ask_endpoint(endpoint().url)
    fresh = endpoint()
    assert ask_endpoint(fresh.url, "--overwrite") == 0
    assert len(fresh.requests) == 6


def test_killed_and_resumed(here, endpoint):
    """kill -9 in the middle, twice: only prompts whose answer was not yet written are sent again."""
    rows = gold_rows(40)
    write_lines("in.jsonl", rows)
    server = endpoint(seconds=0.1)
    command = [sys.executable, str(ROOT / "kd_prepare.py"), "--teacher_url", server.url, "--teacher_model", "m"]
    command += ["--input", "in.jsonl", "--output", "kd.jsonl", "--concurrency", "2"]
    lines = 0
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not Path("kd.jsonl.part").exists() or len(Path("kd.jsonl.part").read_bytes().splitlines()) < lines + 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = Path("kd.jsonl.part").read_bytes().count(b"\n")
        time.sleep(0.3)  # the endpoint finishes the requests under way
    written = {rows[json.loads(line)["row"]]["input"] for line in Path("kd.jsonl.part").read_text().splitlines()}
    before = server.answered.copy()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert all(server.answered[prompt] == before[prompt] for prompt in written)
    assert [row["input"] for row in read_lines("kd.jsonl")] == [row["input"] for row in rows]
    # At each kill at most two were under way and two on their way to the file.
    assert sum(server.answered.values()) <= 40 + 2 * 4


@pytest.fixture
def one_fails(here, endpoint):
    """Return an endpoint that has answered 11 of 12 prompts and failed for one."""
    write_lines("in.jsonl", gold_rows(12))
    server = endpoint(("500",))
    assert ask_endpoint(server.url, "--concurrency", 1, "--retries", 0) == 1
    return server


def test_a_resumed_run_ends_where_the_last_prompt_is_refused(one_fails, capsys):
    one_fails.faults = ["400"]
    assert ask_endpoint(one_fails.url) == 0
    assert len(read_lines("kd.jsonl")) == 11 and "their answer: answers 400" in capsys.readouterr().err


def test_partial_writes_the_rows_there_are(capsys, one_fails):
    assert "or with --partial to do without" in capsys.readouterr().err
    one_fails.faults = ["500"]
    assert ask_endpoint(one_fails.url, "--retries", 0, "--partial") == 0
    assert len(read_lines("kd.jsonl")) == 11 and "1 of 12 prompts got no answer" in capsys.readouterr().err


def test_a_damaged_line_of_an_interrupted_run_is_reported(one_fails):
    part = Path("kd.jsonl.part")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([lines[0], "{\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"kd\.jsonl\.part: line 2 is damaged; remove it"):
        ask_endpoint(one_fails.url)
    part.write_text("".join([lines[0], *lines[2:]]))
    assert ask_endpoint(one_fails.url) == 0 and len(read_lines("kd.jsonl")) == 12


def test_two_runs_at_once_are_refused(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    code = (
        "import fcntl; f = open('kd.jsonl.part.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    other = [sys.executable, "-c", code]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        server = endpoint()
        with pytest.raises(InputError, match="another run is writing it"):
            ask_endpoint(server.url)
        assert not server.requests
        process.communicate(b"\n")
    assert ask_endpoint(server.url) == 0 and not Path("kd.jsonl.part.lock").exists()


def test_a_teacher_trained_since_does_not_resume(here, model_dir, monkeypatch):
    write_lines("in.jsonl", gold_rows(6))
    argv = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *FLOAT32]

    def interrupted(self, *rest):
        yield 0, {"teacher_output": "Good"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local.ModelTeacher, "answers", interrupted)
        kd_prepare.main(argv)
    monkeypatch.setattr(answers, "model_fingerprint", lambda ref: "trained again since")
    with pytest.raises(InputError, match="left by a run with another teacher"):
        kd_prepare.main(argv)


def test_labels_without_gold_answers(here, endpoint, capsys):
    rows = [{"prompt": row["input"]} for row in gold_rows(6)]
    write_lines("in.jsonl", rows)
    assert ask_endpoint(endpoint(logprobs=True).url, "--labels", "Good, Standard,Bad") == 0
    assert "no gold answers: the teacher cannot be checked" in capsys.readouterr().err
    for row in read_lines("kd.jsonl"):
        assert row["teacher_output"] == LABELS[len(row["input"]) % 3] and set(row["label_probs"]) == set(LABELS)


def test_a_changed_input_is_refused(here, endpoint):
    """Its note has a split that its rows need not have; output without one would pass for data of another origin."""
    rows = gold_rows(6)
    write_lines("in.jsonl", rows)
    note = {"split_seed": 3, "files": {"in.jsonl": hashlib.sha256(Path("in.jsonl").read_bytes()).hexdigest()}}
    Path("in_prepared.json").write_text(json.dumps(note))
    server = endpoint()
    assert ask_endpoint(server.url) == 0
    written = json.loads(Path("kd_prepared.json").read_text())
    assert written["split_seed"] == 3 and written["teacher"]["url"] == server.url
    write_lines("in.jsonl", rows[:5])
    with pytest.raises(InputError, match=r"in\.jsonl: changed since .*in_prepared\.json was written"):
        ask_endpoint(server.url, "--overwrite")
    assert len(server.requests) == 6


def test_an_existing_output_is_kept(here):
    Path("kd.jsonl").write_text("precious")
    write_lines("in.jsonl", gold_rows(6))
    with pytest.raises(InputError, match=r"kd\.jsonl: exists; --overwrite replaces it"):
        ask_endpoint("http://127.0.0.1:9/v1")
    assert Path("kd.jsonl").read_text() == "precious"


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
        (["--teacher", "m", "--input", "bad.jsonl"], 'bad.jsonl: line 1 needs "input" or "prompt"'),
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
        (["--teacher", "tabular", "--src", "rows.json", "--gold_share", "1e-9"], "no training row has a label"),
    ],
)
def test_wrong_flags_and_files(here, flags, message):
    write_lines("in.jsonl", gold_rows(6))
    Path("rows.json").write_text(json.dumps(credit_rows()))
    write_lines("bad.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=message):
        kd_prepare.main([*flags, "--output", "kd.jsonl"])
    assert not Path("kd.jsonl").exists()
