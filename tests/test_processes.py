"""Two processes, as torchrun and `accelerate launch` start them, give what one gives, in the same order."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from conftest import in_two_processes, read_lines
from safetensors.numpy import load_file

from common import InputError
from distil import batch
from distil.processes import own_share
from distil.testing import ROOT, Endpoint, run_cli, save_adapter, with_token_probs

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
    for name in ("two.jsonl.part", "two.jsonl.part.json"):  # of a run with one process, killed
        (tmp_path / name).touch()
    done = in_two_processes("infer_creditmix.py", *flags, "--output", "two.jsonl", cwd=tmp_path)
    assert not list(tmp_path.glob("*.part*"))
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
    done = in_two_processes("eval_creditmix.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    done = in_two_processes("kd_prepare.py", *flags, "--output", "two.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (read_lines(tmp_path / name) for name in ("one.jsonl", "two.jsonl"))
    assert [row["input"] for row in two] == [row["input"] for row in rows]
    for a, b in zip(one, two, strict=True):
        assert a["label_probs"] == pytest.approx(b["label_probs"], abs=1e-4)
    assert not list(tmp_path.glob("*.part*"))


def test_an_endpoint_is_asked_each_prompt_once(tmp_path):
    rows = [{"input": f"Debt: {n * 37}", "output": ("Good", "Standard", "Bad")[n % 3]} for n in range(21)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = []
    for start in (run_cli, in_two_processes):
        server, output = Endpoint(), tmp_path / f"{start.__name__}.jsonl"
        flags = ("--teacher_url", server.url, "--teacher_model", "m", "--input", "in.jsonl", "--output", output)
        done = start("kd_prepare.py", *flags, cwd=tmp_path)
        server.close()
        assert done.returncode == 0, done.stderr
        assert server.answered == {row["input"]: 1 for row in rows}
        written.append(output.read_bytes())
    assert written[0] == written[1]


# Rows of each trainer; answers of different length, so that a mean over the tokens of one process shows.
PAIRS = [("Standard, after a long and careful look", "Bad"), ("Good", "Bad"), ("Bad", "Good"), ("Good", "Bad")] * 4
LABEL_PROBS = {"Standard, after a long and careful look": 0.1, "Good": 0.7, "Bad": 0.2}
ROWS = {
    "sft": lambda turn, answer, other: {"input": turn, "output": answer},
    "kd": lambda turn, answer, other: {"input": turn, "teacher_output": answer, "label_probs": LABEL_PROBS},
    "kd_tokens": lambda turn, answer, other: {"input": turn, "teacher_output": answer},
    "dpo": lambda turn, answer, other: {"prompt": turn, "chosen": answer, "rejected": other},
}
# Trainings one after the other, so that the libraries are loaded once.
TRAININGS = """
import importlib, json, sys
for script, argv in json.loads(sys.argv[1]):
    importlib.import_module(script).main(argv)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, tokenizer) -> Path:
    """Train in one process and in two, which take half as many micro-batches a step; return the folder.

    SGD, since Adam hides a gradient of the wrong scale. In the way of the two lies a checkpoint that a kill left half
    written: the first process alone removes it."""
    folder = tmp_path_factory.mktemp("trained")
    commands = {"one": [], "two": []}
    for method, row in ROWS.items():
        rows = [row(f"Debt: {n * 37}, Age: {20 + n}", *pair) for n, pair in enumerate(PAIRS)]
        rows = with_token_probs(rows, folder, tokenizer) if method == "kd_tokens" else rows
        (folder / f"{method}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        half = folder / f"{method}_two" / "checkpoints" / "checkpoint-3"
        half.mkdir(parents=True)
        (half / "adapter_model.safetensors").write_bytes(b"half")
        flags = ["--student", model_dir, "--data", f"{folder / method}.jsonl", *EXACT[:4], "--lora_dropout", "0"]
        flags += ["--epochs", "2", "--batch_size", "2", "--warmup_steps", "0", "--save_steps", "3"]
        flags += ["--optimizer", "sgd", "--learning_rate", "0.5"]
        for name, more in (("one", ["--grad_accum", "2"]), ("two", ["--grad_accum", "1", "--resume"])):
            commands[name].append(
                (f"{method.split('_')[0]}_train", [*flags, "--save_dir", f"{folder / method}_{name}", *more])
            )
    for script, argv in commands["one"]:
        assert importlib.import_module(script).main(argv) == 0
    (folder / "trainings.py").write_text(TRAININGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        done = in_two_processes(folder / "trainings.py", json.dumps(commands["two"]), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", ROWS)
def test_two_processes_train_as_one_with_twice_the_accumulation(method, trained):
    one, two = (trained / f"{method}_{name}" for name in ("one", "two"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    metrics = [json.loads((run / "run.json").read_text())["metrics"] for run in (one, two)]
    assert [values["steps"] for values in metrics] == [8, 8]
    for name in ("train_loss",) if method == "dpo" else ("train_loss", "mean_token_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    first = [json.loads((run / "training_curve.json").read_text())[0] for run in (one, two)]
    for name in ("loss", "grad_norm"):  # before clipping, which hides a wrong scale too
        assert first[1][name] == pytest.approx(first[0][name], rel=1e-4)
    weights, others = (load_file(run / "adapter_model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys()
    assert max(float(abs(weight).max()) for name, weight in weights.items() if "lora_B" in name) > 1e-3  # from 0
    for name, weight in weights.items():
        assert float(abs(weight - others[name]).max()) < 2e-5, name


MEMORY = """
import os
import psutil
from distil.training import memory

class Free:
    available = 8e9 if os.environ["RANK"] == "0" else 6e9

psutil.virtual_memory = Free
line = f"free {memory.available_memory(None)} {memory.available_memory(5.0)}\\n"
os.write(1, line.encode())  # in one piece: both processes write to the same pipe
"""


def test_processes_choose_by_the_same_memory(tmp_path, monkeypatch):
    """Different micro-batches would leave one process waiting for the other's sums; each has half of the machine."""
    (tmp_path / "memory.py").write_text(MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = in_two_processes(tmp_path / "memory.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "free" in line] == ["free 3.0 5.0"] * 2


def test_an_interrupted_process_goes_on_in_its_own_stretch(tmp_path, monkeypatch):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"n": n}) for n in range(11)) + "\n")
    monkeypatch.setattr(batch, "gather", lambda value: [value])
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
        batch.run_file(source, output, {}, 2, work)
    assert [row["n"] for row in read_lines(tmp_path / "out.jsonl.1of2.part")] == [
        5,
        6,
        7,
        8,
    ]
    batch.run_file(source, output, {}, 2, work)
    assert not output.exists()
    monkeypatch.setenv("RANK", "0")
    batch.run_file(source, output, {}, 2, work)
    assert [row["n"] for row in read_lines(output)] == list(range(11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("file", sorted((ROOT / "docs/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_accepts_each_configuration(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(file))  # refuses unknown keys
    parser = launch_command_parser()
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "sft_train.py"]))
    assert args.num_processes == config.num_processes and args.mixed_precision == "bf16"
    assert not args.use_fsdp and not args.use_deepspeed


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
