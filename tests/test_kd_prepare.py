"""kd_prepare.py: killed and resumed runs, incomplete answers, notes of its input, wrong flags and files."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    FLOAT32,
    HOLD,
    all_files,
    ask_endpoint,
    gold_rows,
    in_two_processes,
    other_process,
    read_lines,
    write_lines,
)

import kd_prepare
from common import InputError, PromptEncoder
from distil.endpoint import shown_url
from distil.files import write_json
from distil.tasks import TASK_FILE, default_task
from distil.teachers import answers, local
from distil.testing import ROOT, credit_rows, save_adapter
from distil.token_probs import TokenProbs

TASK = default_task()


def test_a_teacher_of_another_task_is_refused(here, credit_adapter):
    """Its own task is that of prompts without one: with its labels, also where the prompts have no answers."""
    teacher, other = shutil.copytree(credit_adapter, here / "teacher"), here / "other.json"
    write_json(other, TASK.record | {"label_tokens": "distinct"})
    write_json(teacher / TASK_FILE, TASK.record)
    write_lines("in.jsonl", [{"input": row["input"]} for row in gold_rows(3)])
    flags = ["--teacher", str(teacher), *FLOAT32, "--input", "in.jsonl", "--output", "kd.jsonl"]
    with pytest.raises(InputError, match=r"teacher: was trained for another task .* differ in label_tokens"):
        kd_prepare.main([*flags, "--task", str(other)])
    assert kd_prepare.main(flags) == 0
    assert [tuple(row["label_probs"]) for row in read_lines("kd.jsonl")] == [TASK.labels] * 3


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


GOLD = ["--top_k", "4", "--answers", "gold", "--batch_size", "2", *FLOAT32]


def token_files() -> dict[str, bytes]:
    """Return the content of the token probabilities in the working directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path().glob("*.safetensors"))}


def test_token_probabilities_are_resumed_after_a_kill(here, model_dir, capsys):
    """kill -9 in the middle: at most the batch under way is lost, and the end is that of a run without it."""
    rows = [{"input": f"Copy {i}", "output": f"{i} and so on " * 10} for i in range(200)]
    write_lines("in.jsonl", rows)
    flags = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *GOLD]
    process = subprocess.Popen([sys.executable, str(ROOT / "kd_prepare.py"), *flags], stderr=subprocess.DEVNULL)
    part = Path("kd.jsonl.part")
    deadline = time.monotonic() + 100
    while not part.exists() or part.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = part.read_bytes().count(b"\n")
    assert lines < 200 and not token_files() and not Path("kd.jsonl").exists()
    assert "token_probs" in json.loads(part.read_text().splitlines()[0])
    assert kd_prepare.main(flags) == 0
    assert f"resuming after {lines - lines % 2} answers" in capsys.readouterr().err
    killed = token_files(), Path("kd.jsonl").read_bytes()
    assert kd_prepare.main([*flags, "--overwrite"]) == 0
    assert (token_files(), Path("kd.jsonl").read_bytes()) == killed
    assert not list(here.glob(".kd*")) and not part.exists()


def test_an_output_never_refers_to_another_runs_token_probabilities(here, model_dir, monkeypatch):
    """A run that ends between the two files leaves the old pair; rows copied from it keep theirs."""
    flags = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *GOLD]
    write_lines("in.jsonl", [{"input": f"Copy {i}", "output": f"{i} and"} for i in range(6)])
    assert kd_prepare.main(flags) == 0
    before, old = token_files(), Path("kd.jsonl").read_bytes()
    write_lines("in.jsonl", [{"input": f"Copy {i}", "output": f"{i} or"} for i in range(6)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kd_prepare, "write_jsonl", lambda *rest: signal.raise_signal(signal.SIGINT))
        kd_prepare.main([*flags, "--overwrite"])
    assert Path("kd.jsonl").read_bytes() == old and token_files().items() > before.items()
    monkeypatch.setattr(local, "token_rows", None)  # all answers are there
    assert kd_prepare.main(flags) == 0
    assert {row["token_probs"]["file"] for row in read_lines("kd.jsonl")} == token_files().keys() - before.keys()


def test_token_probabilities_of_the_rows_that_are_written(here, model_dir, tokenizer):
    write_lines("in.jsonl", gold_rows(30))
    flags = ["--teacher", model_dir, "--input", "in.jsonl", "--top_k", "4", *FLOAT32]
    assert kd_prepare.main([*flags, "--output", "all.jsonl"]) == 0
    assert kd_prepare.main([*flags, "--output", "kd.jsonl", "--filter", "agree"]) == 0
    every, kept = ({row["input"]: row for row in read_lines(f"{name}.jsonl")} for name in ("all", "kd"))
    assert 0 < len(kept) < len(every)
    reader, encoder = TokenProbs("."), PromptEncoder(tokenizer)
    for number, (prompt, row) in enumerate(kept.items()):
        ids = encoder.completion(row["teacher_output"])
        assert row["token_probs"]["row"] == number
        one, other = (reader.row(rows[prompt]["token_probs"], ids) for rows in (kept, every))
        assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_token_probabilities_from_several_processes(here, model_dir, tokenizer):
    write_lines("in.jsonl", [{"input": f"Copy {i}", "output": f"{i} and so on " * (i % 5) + "."} for i in range(11)])
    flags = ["--teacher", model_dir, "--input", "in.jsonl", *GOLD]
    result = in_two_processes("kd_prepare.py", *flags, "--output", "two.jsonl", cwd=here)
    assert result.returncode == 0, result.stderr
    assert kd_prepare.main([*flags, "--output", "kd.jsonl"]) == 0
    reader, encoder = TokenProbs("."), PromptEncoder(tokenizer)
    for one, two in zip(read_lines("kd.jsonl"), read_lines("two.jsonl"), strict=True):
        ids = encoder.completion(one["teacher_output"])
        pair = [reader.row(row["token_probs"], ids).log_probs for row in (one, two)]
        np.testing.assert_allclose(*pair, atol=2e-3, rtol=1e-3)
    assert not [name for name in all_files(here) if "part" in name]


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
    with other_process(HOLD, "kd.jsonl") as process:
        server = endpoint()
        with pytest.raises(InputError, match=rf"another run \(process {process.pid}\) is writing it"):
            ask_endpoint(server.url)
        assert not server.requests
    assert ask_endpoint(server.url) == 0 and not [
        name for name in all_files(here) if "lock" in name or ".part" in name
    ]


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
        assert row["teacher_output"] == TASK.labels[len(row["input"]) % 3] and set(row["label_probs"]) == set(
            TASK.labels
        )


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


URL = ["--teacher_url", "http://a", "--teacher_model", "m", "--input", "in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --teacher or --teacher_url"),
        (["--teacher", "m", "--teacher_url", "u"], "give either --teacher or --teacher_url"),
        (["--teacher_url", "u"], "--teacher_url needs --teacher_model"),
        (["--teacher", "m"], "--input is needed"),
        (["--teacher", "tabular", "--min_confidence", "2"], "--min_confidence is from 0 to 1"),
        (
            ["--teacher_url", "http://a", "--teacher_model", "m", "--input", "in.jsonl", "--concurrency", "0"],
            "--concurrency is at least 1",
        ),
        (["--teacher", "m", "--input", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--teacher", "m", "--input", "bad.jsonl"], 'bad.jsonl: line 1 needs "input" or "prompt"'),
        (["--teacher", "runs/none", "--input", "in.jsonl"], "runs/none: no such model folder"),
        (["--teacher", "m", "--input", "in.jsonl", "--labels", "Good"], "at least two labels are needed, each once"),
        (["--teacher", "m", "--input", "in.jsonl", "--labels", "Good,Bad,Good"], "at least two labels are needed"),
        (["--teacher", "", "--input", "in.jsonl"], "give either --teacher or --teacher_url"),
        (["--teacher_url", "foo", "--teacher_model", "m"], "--teacher_url foo: an address such as http://127"),
        (["--teacher_url", "http://a:99999", "--teacher_model", "m"], "--teacher_url http://a:99999: an address"),
        (
            ["--teacher", "m", "--input", "in.jsonl", "--temperature", "inf"],
            "--temperature, --price_in and --price_out are finite numbers",
        ),
        (["--teacher", "m", "--input", "in.jsonl", "--temperature", "nan"], "--temperature is at least 0"),
        ([*URL, "--timeout", "nan"], "--timeout above 0 and at most 86400"),
        ([*URL, "--timeout", "inf"], "--timeout above 0 and at most 86400"),
        (["--teacher", "tabular", "--input", "in.jsonl"], "--input: not for the tabular teacher"),
        (["--teacher", "tabular", "--rationale"], "--rationale: not for the tabular teacher"),
        (["--teacher", "tabular", "--top_k", "4"], "--top_k: not for the tabular teacher"),
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


def note(path: str, **record: object) -> None:
    """Write the note of a data file."""
    record |= {"files": {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}}
    Path(path.replace(".jsonl", "_prepared.json")).write_text(json.dumps(record))


def teacher(folder: Path, model_dir: str, kind: str, **record: object) -> str:
    """Write an adapter, or an export, with this record of its training."""
    if kind == "adapter":
        saved = save_adapter(folder / "teacher", model_dir)
        (Path(saved) / "run.json").write_text(json.dumps(record))
        return saved
    saved = shutil.copytree(model_dir, folder / "teacher")
    (saved / "export.json").write_text(json.dumps(record))
    return str(saved)


RAW = {"file": "raw.json", "sha256": "abc"}
OTHER = {"file": "other.json", "sha256": "def"}


def answers_of(teacher: str, *flags: str) -> dict:
    """Let a model answer in.jsonl and return the note of its answers, {} without one."""
    Path("kd_prepared.json").unlink(missing_ok=True)
    argv = ["--teacher", teacher, "--input", "in.jsonl", "--output", "kd.jsonl", "--overwrite", *FLOAT32, *flags]
    assert kd_prepare.main(argv) == 0
    return json.loads(Path("kd_prepared.json").read_text()) if Path("kd_prepared.json").exists() else {}


@pytest.mark.parametrize("kind", ["adapter", "export"])
def test_what_the_teacher_was_trained_on_goes_into_the_note_of_its_answers(here, model_dir, kind):
    """Its answers carry the labels that it saw, so they are rows of its split, its sources and its gold share."""
    write_lines("in.jsonl", gold_rows(6))
    note("in.jsonl", split_seed=7, source=RAW, gold_share=0.2)
    model = teacher(here, model_dir, kind, split_seed=7, sources=[OTHER], gold_share=0.5)
    written = answers_of(model)
    assert (written["split_seed"], written["sources"], written["gold_share"]) == (7, [RAW, OTHER], 0.5)
    note("in.jsonl", split_seed=0, source=RAW, gold_share=0.2)
    Path("kd.jsonl").unlink()
    with pytest.raises(InputError, match=r"teacher was trained with --split_seed 7, in\.jsonl has 0"):
        answers_of(model)
    assert not Path("kd.jsonl").exists()


@pytest.mark.parametrize("kind", ["adapter", "export"])
def test_answers_to_rows_of_unknown_origin_are_of_the_teachers_split(here, model_dir, kind):
    write_lines("in.jsonl", gold_rows(6))
    written = answers_of(teacher(here, model_dir, kind, split_seed=7, sources=[OTHER], gold_share=0.5))
    assert (written["split_seed"], written["sources"], written["gold_share"]) == (7, [None, OTHER], None)
    assert answers_of(model_dir) == {}  # nothing is known


def test_a_base_model_adds_nothing_to_the_note(here, model_dir):
    write_lines("in.jsonl", gold_rows(6))
    note("in.jsonl", split_seed=7, source=RAW, gold_share=0.2)
    written = answers_of(model_dir)
    assert (written["split_seed"], written["sources"], written["gold_share"]) == (7, [RAW], 0.2)


def test_what_an_endpoints_model_was_trained_on_is_noted_as_unseen(here, endpoint):
    write_lines("in.jsonl", gold_rows(6))
    note("in.jsonl", split_seed=7, source=RAW, gold_share=0.2)
    server = endpoint()
    assert ask_endpoint(server.url) == 0
    written = json.loads(Path("kd_prepared.json").read_text())
    assert written["sources"] == [RAW, {"file": f"the teacher m at {server.url}"}]
    assert (written["split_seed"], written["gold_share"]) == (7, None)


def test_a_password_reaches_the_endpoint_and_nothing_else(here, endpoint, capsys, caplog):
    caplog.set_level("DEBUG")
    write_lines("in.jsonl", gold_rows(6))
    server = endpoint(("500", "400", "401"))
    url = server.url.replace("http://", "http://me:s3cret@") + "?key=t0ken&x=1"
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+/v1 answers 401") as refused:
        ask_endpoint(url, "--retries", 0, "--concurrency", 1)
    assert Path("kd.jsonl.part.json").exists()
    left = [path.read_text() for path in here.iterdir()]
    assert ask_endpoint(url) == 0
    assert server.keys == {f"Basic {b64encode(b'me:s3cret').decode()}"}
    assert server.paths == {"/v1/chat/completions?key=t0ken&x=1"}
    with pytest.raises(InputError) as wrong:
        ask_endpoint("http://me:s3cret/t0ken@:99999", "--overwrite")
    written = [path.read_text() for path in here.iterdir()]
    shown = [*left, *written, str(refused.value), str(wrong.value), *capsys.readouterr()]
    shown += [record.getMessage() for record in caplog.records]
    assert any('"url"' in text for text in shown)
    assert not [text for text in shown if "s3cret" in text or "t0ken" in text]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("https://me:pw@host/v1?a=1&a=2&b#c", "https://host/v1"),
        ("http://host/v1?bare", "http://host/v1"),
        ("http://host/v1;key=k", "http://host/v1"),
        ("http://key@host", "http://host"),
        ("me:pw@host/v1", "host/v1"),
        ("http://me:p/w@host/v1?k=pw", "http://host/v1"),
        ("http://me:1?pw@host/v1", "http://host/v1"),
        ("ftp://me:pw@host/v1#pw", "ftp://host/v1"),
    ],
)
def test_a_url_is_shown_without_password_and_query(url, shown):
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--gold_share 0.2 --per_class 3 --split_seed 0 --src x",
            "--src, --per_class, --gold_share, --split_seed: only",
        ),
        ("--timeout 5", "--timeout: only with --teacher_url"),
        ("--partial", "--partial: only with --teacher_url"),
        ("--max_new_tokens 9", "--max_new_tokens: only where the teacher writes text"),
        ("--temperature 0.5", "--temperature: only where the teacher writes text"),
        ("--rationale --seed 3", "--seed: only for the tabular teacher and samples"),
        ("--input text.jsonl --calibration auto", "--calibration: only where a teacher's label probabilities"),
        ("--min_confidence 0.6", "--min_confidence: only with --filter confident"),
        ("--answers gold", "--answers: only with --top_k"),
        ("--top_k 4 --tokenizer m", "--tokenizer: only with --teacher_url"),
        ("--top_k 4 --answers gold --rationale", "--rationale: only with --answers teacher"),
        ("--top_k 4 --answers gold --max_new_tokens 9", "--max_new_tokens: only where the teacher writes text"),
        ("--input gold.jsonl --top_k 4 --answers gold --filter agree", "--filter: only for labels and with"),
        ("--input text.jsonl --top_k 4 --answers gold", "text.jsonl: 1 rows have no right answer"),
    ],
)
def test_flags_without_effect_are_refused(here, model_dir, flags, message):
    write_lines("in.jsonl", gold_rows(6))
    write_lines("text.jsonl", [{"input": "a"}])
    write_lines("gold.jsonl", [{"input": "a", "output": "b"}])
    argv = ["--teacher", model_dir, "--input", "in.jsonl", "--output", "kd.jsonl", *flags.split()]
    with pytest.raises(InputError, match=message):
        kd_prepare.main(argv)
    assert not Path("kd.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 3", "--seed: only for"),
        ("--batch_size 16", "--batch_size: only for a model that runs here"),
        ("--quantization none --compute_dtype float32", "--quantization, --compute_dtype: only for a model that runs"),
        ("--rationale --calibration batch", "--calibration: only where"),
        ("--split_seed 0", "--split_seed: only for the tabular teacher"),
    ],
)
def test_flags_without_effect_on_an_endpoint_are_refused(here, flags, message):
    write_lines("in.jsonl", gold_rows(6))
    with pytest.raises(InputError, match=message):
        ask_endpoint("http://127.0.0.1:9/v1", *flags.split())


@pytest.mark.parametrize("flag", ["--calibration", "--max_new_tokens", "--temperature", "--batch_size", "--retries"])
def test_flags_without_effect_on_the_tabular_teacher_are_refused(here, flag):
    value = "none" if flag == "--calibration" else "16"
    with pytest.raises(InputError, match=f"{flag}: "):
        kd_prepare.main(["--teacher", "tabular", "--output", "kd.jsonl", flag, value])
