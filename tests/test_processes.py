"""Two processes, as torchrun and `accelerate launch` start them, give what one gives, in the same order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import batch_files
from common import InputError
from conftest import ROOT, run_cli, save_adapter
from processes import own_share


def in_two(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, env=environment)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


EXACT = ("--quantization", "none", "--compute_dtype", "float32", "--calibration", "contextual")


def test_shares_are_stretches_that_leave_nothing_out(monkeypatch):
    for count in (0, 1, 7, 100):
        for world in (1, 2, 3, 8):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            rows = []
            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                rows += own_share(count)
            assert rows == list(range(count))


def test_inference_writes_the_same_file(tmp_path, model_dir):
    lines = [json.dumps({"features": f"Age: {20 + n}, Outstanding Debt: {n * 37}", "n": n}) for n in range(301)]
    lines[5] = "broken"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    flags = ("--model_dir", model_dir, "--input", "in.jsonl", *EXACT)
    assert run_cli("infer_creditmix.py", *flags, "--output", "one.jsonl", cwd=tmp_path).returncode == 1
    done = in_two("infer_creditmix.py", *flags, "--output", "two.jsonl", cwd=tmp_path)
    assert "1 of 301 lines carry an error" in done.stderr, done.stderr[-2000:]
    one, two = (read_lines(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert len(one) == len(two) == 301
    for a, b in zip(one, two, strict=True):
        assert a.get("n") == b.get("n") and a.get("error") == b.get("error")
        if "error" not in a:
            assert a["prediction"] == b["prediction"]
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob("*.joined"))


def test_evaluation_reports_the_same_metrics_once(tmp_path, model_dir, credit_file):
    adapter = save_adapter(tmp_path / "adapter", model_dir)
    flags = ("--model_dir", adapter, "--data", credit_file, "--val_per_class", "15", "--fit", "--bootstrap", "20")
    flags += (*EXACT[:4], "--json")
    one = json.loads(run_cli("eval_creditmix.py", *flags, cwd=tmp_path).stdout)
    fitted = json.loads((tmp_path / "adapter" / "calibration.json").read_text())
    done = in_two("eval_creditmix.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(done.stdout)  # one object: the second process prints nothing
    for name in ("accuracy", "macro_f1", "nll", "ece"):
        assert one["models"][0][name] == pytest.approx(two["models"][0][name], abs=1e-3)
    again = json.loads((tmp_path / "adapter" / "calibration.json").read_text())
    assert again["bias"] == pytest.approx(fitted["bias"], abs=1e-2)


def test_a_teacher_is_asked_each_prompt_once(tmp_path, model_dir):
    rows = [{"input": f"Debt: {n * 37}", "output": ("Good", "Standard", "Bad")[n % 3]} for n in range(21)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--teacher", model_dir, "--input", "in.jsonl", "--quantization", "none", "--compute_dtype", "float32")
    assert run_cli("kd_prepare.py", *flags, "--output", "one.jsonl", cwd=tmp_path).returncode == 0
    done = in_two("kd_prepare.py", *flags, "--output", "two.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_lines(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [row["input"] for row in two] == [row["input"] for row in rows]
    for a, b in zip(one, two, strict=True):
        assert a["label_probs"] == pytest.approx(b["label_probs"], abs=1e-4)
    assert not list(tmp_path.glob("*.part*"))


def test_an_interrupted_process_goes_on_in_its_own_stretch(tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"n": n}) for n in range(11)) + "\n")
    monkeypatch.setattr(batch_files, "gather", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []

    def work(lines: list[str]) -> list[dict]:
        rows = [json.loads(line) for line in lines]
        if rows[0]["n"] == 9 and not done:
            done.append("stopped")
            raise KeyboardInterrupt
        return rows

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(KeyboardInterrupt):
        batch_files.run_file(source, output, 11, {}, 2, work)
    assert [row["n"] for row in read_lines(tmp_path / "out.jsonl.1of2.part")] == [
        5,
        6,
        7,
        8,
    ]
    batch_files.run_file(source, output, 11, {}, 2, work)
    assert not output.exists()
    monkeypatch.setenv("RANK", "0")
    batch_files.run_file(source, output, 11, {}, 2, work)
    assert [row["n"] for row in read_lines(output)] == list(range(11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_runs_in_one_process_says_so(monkeypatch):
    import eval_idp
    import infer_creditmix
    import serve_creditmix

    monkeypatch.setenv("WORLD_SIZE", "2")
    for main, flags in (
        (infer_creditmix.main, ["--model_dir", "x", "--features", "Age: 30"]),
        (eval_idp.main, ["--model_dir", "x"]),
        (serve_creditmix.main, []),
    ):
        with pytest.raises(InputError, match="runs in one process; start the script without a launcher"):
            main(flags)
