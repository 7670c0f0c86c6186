"""Each trainer complete, on the random two-layer model in NF4 on the CPU: run folder, resume, overwrite, dry run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    METHODS,
    adapter_tensors,
    assert_same_tensors,
    other_process,
    row_of,
    run_json,
    trainer,
    write_lines,
)
from datasets import Dataset
from safetensors.torch import load_file, save_file

import sft_train
from common import InputError
from distil import runs
from distil.cli import run_script
from distil.files import file_sha256
from distil.models import check_model_name, model_fingerprint, resolve
from distil.testing import ROOT, load_named
from distil.training import loss, pairs, run

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_curve.json",
    "training_curve.png",
}
# Trains as the script does and kills its own process, without any cleaning up, after step 9.
KILLED = """
import importlib, os, signal, sys
from distil.training import run
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

original = run.train_and_save

def train_and_save(trainer, *rest):
    trainer.add_callback(Kill())
    original(trainer, *rest)

run.train_and_save = train_and_save
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


def base_weights(model) -> dict[str, torch.Tensor]:
    """Return copies of all that is frozen: embeddings and norms as they are, 4-bit layers dequantised."""
    import bitsandbytes

    weights = {}
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if ".default" in name or "lora_" in name:
                continue
            value = parameter.detach()
            if isinstance(module, bitsandbytes.nn.Linear4bit) and part == "weight":
                value = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            weights[f"{name}.{part}"] = value.clone()
    return weights


@pytest.mark.parametrize("method", ["sft", "kd", "kd_hard", "dpo", "dpo_from_adapter"])
def test_run_folder(method, train, model_dir, training_files, sft_adapter, monkeypatch):
    """Exact files, run.json, float32 adapters named `default`; LoRA weights moved and nothing else did."""
    watched_run = {}
    original = run.train_and_save

    def watched(trainer, *rest):
        watched_run["names"] = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        watched_run["before"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
        watched_run["base"] = base_weights(trainer.model)
        original(trainer, *rest)
        watched_run["model"] = trainer.model

    monkeypatch.setattr(run, "train_and_save", watched)
    script = method.split("_")[0]
    rows = method if method in training_files else script
    flags = ["--adapter", sft_adapter] if "adapter" in method else []
    save_dir = train(script, "run", *flags, rows=rows, base=not flags)

    assert {path.name for path in save_dir.iterdir()} == FILES
    tensors = adapter_tensors(save_dir)
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert len(tensors) == 2 * 7 * 2  # A and B of seven projections in two layers; no second adapter
    assert not any("ref" in name for name in tensors)
    config = json.loads((save_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolve(str(save_dir)).base == model_dir

    after = dict(watched_run["model"].named_parameters())
    assert watched_run["names"] == {name for name in watched_run["before"] if ".default." in name}
    for name, before in watched_run["before"].items():
        moved = not torch.equal(before, after[name])
        assert moved == (".default." in name), name
        if ".default." in name:  # what is saved is what was trained
            assert torch.equal(tensors[name.replace(".default", "")], after[name])
    base = base_weights(watched_run["model"])
    assert watched_run["base"].keys() == base.keys() and any("embed_tokens" in name for name in base)
    assert all(torch.equal(watched_run["base"][name], base[name]) for name in base)

    result = run_json(save_dir)
    assert result["method"] == script
    assert result["base_model"] == model_dir
    dests = {action.dest for action in trainer(script).build_parser()._actions} - {"help", "config"}
    assert set(result["flags"]) == dests and None not in (
        result["flags"][name] for name in ("learning_rate", "batch_size", "grad_accum", "lora_dropout")
    )
    assert result["data"] == {"file": training_files[rows], "sha256": file_sha256(training_files[rows]), "rows": 10}
    assert result["sources"] and set(result["sources"]) == {None}  # no note next to the data
    assert (result["split_seed"], result["seed"], result["resumed_from"]) == (None, 0, None)
    assert {"python", "torch", "transformers", "peft", "trl", "bitsandbytes"} <= set(result["packages"])
    assert result["machine"]["cpu"] and result["machine"]["cores"] > 0  # times mean nothing without it
    assert result["metrics"]["steps"] == 4 and result["metrics"]["train_loss"] > 0
    assert result["wall_seconds"] > 0 and result["memory"]["peak_gb"] > 0 and result["memory"]["device"]
    curve = json.loads((save_dir / "training_curve.json").read_text())
    assert curve[0]["step"] == 1 and curve[0]["loss"] > 0
    check_model_name(str(save_dir))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapter_loads_as_it_was_trained(dtype, train):
    """In the type of computation: for inference in bfloat16 rounded to it."""
    save_dir = train("sft", "run")
    model, tokenizer = load_named(str(save_dir), dtype=dtype)
    loaded = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert_same_tensors(
        {name: p.to(getattr(torch, dtype)) for name, p in adapter_tensors(save_dir).items()}, loaded, atol=0
    )
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token


def test_seed_decides_the_run(train):
    one, again, other = (train("sft", f"run{i}", "--seed", seed) for i, seed in enumerate((3, 3, 4)))
    assert_same_tensors(adapter_tensors(one), adapter_tensors(again), atol=0)
    assert any(not torch.equal(tensor, adapter_tensors(other)[name]) for name, tensor in adapter_tensors(one).items())


def test_more_steps_bring_the_loss_down(train, training_files):
    for method in ("sft", "dpo"):
        save_dir = train(method, method, "--max_steps", 60, "--learning_rate", "3e-3", "--batch_size", 4)
        curve = json.loads((save_dir / "training_curve.json").read_text())
        assert curve[-1]["loss"] < 0.5 * curve[0]["loss"], (method, curve)
        rates = {entry["step"]: entry["learning_rate"] for entry in curve}
        assert rates[30] == pytest.approx(3e-3 * (1 - 29 / 60))  # linear, no warm-up


@pytest.mark.parametrize("shape", [(3, 2, 1.5), (4, 1, 2.0), (1, 4, 1.0), (8, 2, 0.5)])
def test_planned_steps_are_the_steps_taken(shape, train, capsys):
    batch, accumulation, epochs = shape
    flags = ("--batch_size", batch, "--grad_accum", accumulation, "--epochs", epochs, "--max_steps", 0)
    train("sft", "run", *flags, "--dry_run")
    planned = int(capsys.readouterr().out.split("steps")[1].split()[0])
    assert json.loads((train("sft", "run", *flags) / "run.json").read_text())["metrics"]["steps"] == planned


def uneven_rows(method: str, folder: Path) -> str:
    """Write 37 rows of very different lengths, which SFT and KD group by length, for steps of 2 x 3 rows."""
    rows = []
    for number in range(37):
        row = row_of(method, f"Debt: {number}" + " 1" * (60 if number % 9 == 0 else number % 9))
        rows.append(row | ({"label_probs": {"Good": 0.5, "Standard": 0.3, "Bad": 0.2}} if method == "kd" else {}))
    return write_lines(folder / "uneven.jsonl", rows)


@pytest.fixture
def one_thread(monkeypatch):
    """Compute in one thread here and in other processes, as several add numbers in no fixed order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["sft", "kd", "dpo", "dpo_from_adapter"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, model_dir, sft_adapter, tmp_path):
    """In the middle of the second epoch, with an incomplete last step in each, under dropout: bit by bit."""
    script = method.split("_")[0]
    base = ["--adapter", sft_adapter] if "adapter" in method else ["--student", model_dir]
    flags = [*base, "--data", uneven_rows(script, tmp_path), "--epochs", "2", "--batch_size", "2", "--grad_accum", "3"]
    flags += ["--save_steps", "4", "--warmup_steps", "2", "--learning_rate", "3e-3"]
    flags += [] if script == "dpo" else ["--lora_dropout", "0.2"]
    flags += [] if method == "sft" else ["--quantization", "none", "--compute_dtype", "float32"]
    whole, killed = str(tmp_path / "whole"), tmp_path / "killed"
    assert trainer(script).main([*flags, "--save_dir", whole]) == 0

    flags += ["--save_dir", str(killed)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED, f"{script}_train", *flags], env=env, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert not (killed / "run.json").exists() and not (killed / "adapter_model.safetensors").exists()
    assert {path.name for path in (killed / "checkpoints").glob("*-*")} == {"checkpoint-4", "checkpoint-8"}
    with pytest.raises(InputError, match="did not finish"):
        check_model_name(str(killed))
    with pytest.raises(InputError, match=r"unfinished run is here; --resume continues it, --overwrite"):
        trainer(script).main(flags)

    with pytest.raises(InputError, match=r"--resume with other settings: learning_rate \(was 0.003, now 0.001\)"):
        trainer(script).main([*flags, "--resume", "--learning_rate", "1e-3"])

    # The newest checkpoint was being written when the next kill came.
    for missing in ("trainer_state.json", "optimizer.pt", "rng_state.pth"):
        half = killed / "checkpoints" / "checkpoint-9"
        shutil.copytree(killed / "checkpoints" / "checkpoint-8", half)
        (half / missing).unlink()
        assert runs.last_checkpoint(str(killed)).endswith("checkpoint-8") and not half.exists()

    assert trainer(script).main([*flags, "--resume"]) == 0
    assert {path.name for path in killed.iterdir()} == FILES
    result = run_json(killed)
    assert result["resumed_from"] == "checkpoint-8" and result["metrics"]["steps"] == 14
    assert_same_tensors(adapter_tensors(whole), adapter_tensors(killed), atol=0)
    curves = [json.loads((Path(folder) / "training_curve.json").read_text()) for folder in (whole, killed)]
    seconds = [[entry.pop("seconds") for entry in curve] for curve in curves]
    assert curves[0] == curves[1] and [entry["step"] for entry in curves[1]] == [1, 4, 8, 10, 12, 14]
    assert seconds[1] == sorted(seconds[1]) and result["wall_seconds"] >= seconds[1][-1]
    for name in ("train_loss", "last_loss"):
        assert result["metrics"][name] == run_json(Path(whole))["metrics"][name]


@pytest.mark.parametrize("lengths", [None, [3 + number % 12 for number in range(37)]])
def test_seed_and_epoch_alone_decide_the_order_of_rows(lengths):
    """Whatever was drawn before, and wherever in the epoch a run is resumed: each row once."""
    strategy = "group_by_length" if lengths else "random"
    trainer = SimpleNamespace(args=SimpleNamespace(train_sampling_strategy=strategy), state=SimpleNamespace())
    options = SimpleNamespace(seed=3, batch_size=2, grad_accum=3)
    dataset = Dataset.from_list([{"input_ids": [0] * length} for length in lengths or [3] * 37])
    order, orders = run.RowOrder(trainer, options, dataset), []
    for step in (0, 6, 7, 13):  # the first and the last of the 7 steps of two epochs
        torch.rand(step + 1)
        trainer.state.global_step = step
        orders.append(list(order))
        assert sorted(orders[-1]) == list(range(37))
    assert orders[0] == orders[1] != orders[2] == orders[3]


def test_a_loss_that_is_not_a_number_ends_the_training(train, tmp_path):
    """The Trainer would show the mean of earlier losses instead, and the adapter would be saved."""
    with pytest.raises(InputError, match=r"the loss is not a number at step .: lower --learning_rate"):
        train("sft", "run", "--learning_rate", "1e30", "--optimizer", "sgd", "--save_steps", 1)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


# Trains as the script does, and stops in the first step.
SLOW = """
import sys, time
import torch, transformers
import sft_train
from distil.training import loss

def step(*args, **kwargs):
    print("training", flush=True)
    time.sleep(100)

loss.CompletionTrainer.training_step = step
sft_train.main(sys.argv[1:])
"""


def test_two_trainings_do_not_write_one_folder(train, model_dir, training_files, tmp_path):
    """Neither with --resume nor with --overwrite; what a killed one leaves can be replaced."""
    folder = tmp_path / "run"
    with other_process(SLOW, "--student", model_dir, "--data", training_files["sft"], "--save_dir", folder) as process:
        for flags in ([], ["--resume"], ["--overwrite"]):
            with pytest.raises(InputError, match=rf"run: another run \(process {process.pid}\) is writing it"):
                train("sft", "run", *flags)
            assert (folder / "checkpoints" / "settings.json").is_file()
    with pytest.raises(InputError, match="an unfinished run is here"):
        train("sft", "run")
    train("sft", "run", "--seed", 2, "--overwrite")
    assert run_json(folder)["seed"] == 2 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_named_in_the_last_line(train, monkeypatch, capsys):
    """Not in torch's words, which are of file positions, and without the progress bar drawn again below it."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 32704 vs 32596")

    monkeypatch.setattr(loss.CompletionTrainer, "_save_checkpoint", full)
    monkeypatch.setattr(sys, "argv", ["sft_train.py"])
    with pytest.raises(SystemExit) as status:
        run_script(lambda _: train("sft", "run", "--save_steps", 2))
    assert status.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sft_train.py: failed: RuntimeError: the disk is full; free some space, then resume")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_what_overwrite_replaces_is_complete_until_the_new_run_is(moment, train, monkeypatch):
    """Killed or out of disk before that, the old run can still be used, and the new one resumed."""
    save_dir, flags = train("sft", "run"), ("--seed", 5, "--save_steps", 2)
    (save_dir / "calibration.json").write_text("{}")
    old = files_of(save_dir)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = {"training": (loss.CompletionTrainer, "_save_checkpoint"), "saving": (run, "plot_curve")}
        patch.setattr(*place[moment], stop)
        with pytest.raises(KeyboardInterrupt):
            train("sft", "run", *flags, "--overwrite")
    assert files_of(save_dir) == old
    check_model_name(str(save_dir))
    with pytest.raises(InputError, match="an unfinished run is here; --resume continues it"):
        train("sft", "run", *flags)
    assert_same_tensors(
        adapter_tensors(train("sft", "run", *flags, "--resume")),
        adapter_tensors(train("sft", "other", *flags)),
        atol=0,
    )
    assert run_json(save_dir)["seed"] == 5
    assert not (save_dir / "calibration.json").exists() and not (save_dir / "checkpoints").exists()


@pytest.mark.parametrize("changed", ["data_sha256", "model", "processes", "dtype", "torch version"])
def test_resume_refuses_other_data_or_start(changed, train, training_files, sft_adapter, tmp_path, monkeypatch):
    """DPO's frozen reference would be another network than before the kill."""
    start = Path(shutil.copytree(sft_adapter, tmp_path / "start"))
    rows = Path(shutil.copy(training_files["dpo"], tmp_path / "dpo.jsonl"))
    flags = ("--adapter", start, "--data", rows, "--split_seed", 0)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pairs.PairTrainer, "train", stop)
        train("dpo", "run", *flags, base=False)
    train("dpo", "run", *flags, "--resume", "--dry_run", base=False)
    if changed == "processes":
        monkeypatch.setattr(run, "rank_and_world", lambda: (0, 2))
    elif changed == "dtype":
        monkeypatch.setattr(runs, "dtype_name", lambda name: "another")
    elif changed == "torch version":
        monkeypatch.setattr(runs, "package_versions", lambda: {"torch": "1.0"})
    elif changed == "data_sha256":
        rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    else:
        weights = load_file(start / "adapter_model.safetensors")
        save_file({name: 2 * weight for name, weight in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"--resume with other settings: {changed} "):
        train("dpo", "run", *flags, "--resume", base=False)


def test_run_json_is_written_last(train, monkeypatch, tmp_path):
    """It is the mark of completeness: a run that dies while saving must not have it."""
    moved, replace = [], Path.replace

    def counted(path, target):
        if Path(target).parent == tmp_path / "run":
            if len(moved) == 2:
                raise ZeroDivisionError
            moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    with pytest.raises(ZeroDivisionError):
        train("sft", "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*moved, "checkpoints"}
    assert "run.json" not in moved  # checkpoints remain, else the folder would not pass for a run
    monkeypatch.undo()
    assert "run.json" in {path.name for path in train("sft", "run", "--resume").iterdir()}


def test_a_run_that_is_all_warm_up_is_reported(train, capsys):
    train("sft", "short", "--warmup_steps", 4)
    assert "note: all 4 steps are warm-up (--warmup_steps 4)" in capsys.readouterr().err
    train("sft", "long", "--warmup_steps", 3)
    assert "warm-up" not in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_kept(method, train, training_files, model_dir):
    save_dir = train(method, "run")
    before = (save_dir / "adapter_model.safetensors").read_bytes()
    for flags in ((), ("--resume",)):
        with pytest.raises(InputError, match="a finished run is here; --overwrite replaces it"):
            train(method, "run", "--seed", 5, *flags)
    assert (save_dir / "adapter_model.safetensors").read_bytes() == before
    train(method, "run", "--seed", 5, "--overwrite")
    assert run_json(save_dir)["seed"] == 5
    assert (save_dir / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_prints_the_plan_and_writes_nothing(method, train, capsys, training_files):
    save_dir = train(method, "plan", "--dry_run", "--batch_size", 2, "--grad_accum", 2)
    plan = capsys.readouterr().out
    assert not save_dir.exists()
    assert f"rows                 10 from {training_files[method]}" in plan
    assert "steps                4 of 2 x 2 rows" in plan
    # r x (in + out) of q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64, in two layers
    assert f"trainable parameters {16 * 2 * (128 + 2 * 96 + 128 + 2 * 192 + 192):,} " in plan
    assert "estimated memory" in plan and f"would write          {save_dir}" in plan


def test_a_dry_run_reports_that_the_run_would_be_refused(train, capsys, model_dir, training_files, tmp_path):
    train("sft", "run")
    for flags, line in (
        ([], "would be refused     .*run: a finished run is here"),
        (["--overwrite", "--max_memory_gb", 0.01], "would be refused     about .* GB needed, 0.0 GB available"),
    ):
        capsys.readouterr()
        argv = [
            "--student",
            model_dir,
            "--data",
            training_files["sft"],
            "--save_dir",
            tmp_path / "run",
            "--dry_run",
            *flags,
        ]
        assert sft_train.main(list(map(str, argv))) == 2  # as without --dry_run
        assert re.search(line, capsys.readouterr().out)
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "settings.json").write_text(json.dumps({"learning_rate": 1.0}))
    assert sft_train.main([*map(str, argv[:-3]), "--resume", "--gradient_checkpointing", "off"]) == 2
    assert "would be refused     --resume with other settings: " in capsys.readouterr().out


def test_resume_without_a_checkpoint_reports_that_it_starts_again(train, capsys):
    train("sft", "run", "--resume")
    assert "no checkpoint yet, training starts at the beginning" in capsys.readouterr().err


def test_a_run_records_the_base_that_it_was_trained_on(train, model_dir, tmp_path, monkeypatch):
    """Not what lies in its folder when the training ends."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    before, peak_memory = model_fingerprint(resolve(str(base))), runs.peak_memory

    def changed() -> dict:
        (base / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
        return peak_memory()

    monkeypatch.setattr(runs, "peak_memory", changed)  # after the last step
    folder = train("sft", "run", "--student", base, "--max_steps", 1)
    assert json.loads((folder / "run.json").read_text())["base_fingerprint"] == before
    assert model_fingerprint(resolve(str(base))) != before
