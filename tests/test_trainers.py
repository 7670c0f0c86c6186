"""Each trainer whole, on the random two-layer model in NF4 on the CPU: what it writes, what it moves, what it refuses.

Equivalences are tested with SGD, since Adam hides a gradient of the wrong scale, and on the gradient norm of the first
step besides, since clipping hides it too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import dpo_train
import kd_train
import models
import sft_train
import training
from common import PromptEncoder
from conftest import ROOT, save_random_model
from files import InputError, file_sha256, run_script
from models import base_of, check_model_name, load_model, lora_config, pack_for_decoding

TRAINERS = {"sft": sft_train, "kd": kd_train, "dpo": dpo_train}
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_curve.json",
    "training_curve.png",
}
LABELS = ("Good", "Standard", "Bad")
# Completions of one to many tokens, so that a mean over the wrong set of tokens shows.
ANSWERS = ("Good", "Standard, after a long and careful look at it", "Bad", "Typical debt")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def soft_labels(number: int) -> dict[str, float]:
    good = (1 + number % 7) / 10
    return {"Good": good, "Standard": 0.9 - good, "Bad": 0.1}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Ten rows for each trainer: not a multiple of 4, so the last step of an epoch is a small one."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [f"Debt: {37 * number}, Age: {20 + number}" for number in range(10)]
    pairs = [(turn, ANSWERS[number % len(ANSWERS)]) for number, turn in enumerate(turns)]
    teacher = [{"input": turn, "teacher_output": answer} for turn, answer in pairs]
    return {
        "sft": write_rows(folder / "sft.jsonl", [{"input": turn, "output": answer} for turn, answer in pairs]),
        "kd": write_rows(
            folder / "kd.jsonl", [row | {"label_probs": soft_labels(i)} for i, row in enumerate(teacher)]
        ),
        "kd_hard": write_rows(folder / "kd_hard.jsonl", teacher),
        "dpo": write_rows(
            folder / "dpo.jsonl",
            [
                {"prompt": turn, "chosen": answer, "rejected": ANSWERS[(number + 1) % len(ANSWERS)]}
                for number, (turn, answer) in enumerate(pairs)
            ],
        ),
    }


@pytest.fixture
def run(model_dir, data, tmp_path):
    """Train in this process; returns the run folder. Flags given later win over the ones here."""

    def run(method: str, name: str, *flags, rows: str | None = None, base: bool = True) -> Path:
        save_dir = tmp_path / name
        argv = ["--data", data[rows or method], "--save_dir", save_dir, "--warmup_steps", 0, "--max_steps", 4]
        argv += ["--student", model_dir] if base else []
        assert TRAINERS[method].main([str(flag) for flag in [*argv, *flags]]) == 0
        return save_dir

    return run


@pytest.fixture(scope="session")
def sft_adapter(model_dir, data, tmp_path_factory) -> str:
    """An adapter far enough from its start that rounding it to bf16 would show."""
    save_dir = str(tmp_path_factory.mktemp("adapters") / "sft")
    flags = ["--max_steps", "6", "--warmup_steps", "0", "--learning_rate", "3e-3", "--lora_dropout", "0.1"]
    sft_train.main(["--student", model_dir, "--data", data["sft"], "--save_dir", save_dir, *flags])
    return save_dir


@pytest.fixture
def built(monkeypatch, tmp_path):
    """The trainer that a script builds, handed out in place of being run."""
    monkeypatch.chdir(tmp_path)

    def built(method: str, *flags):
        kept = []
        monkeypatch.setattr(training, "train_and_save", lambda trainer, *rest: kept.append(trainer))
        TRAINERS[method].main([str(flag) for flag in flags])
        return kept[0]

    return built


def adapter(save_dir: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(save_dir) / "adapter_model.safetensors")


def first_step(save_dir: Path) -> dict:
    return json.loads((save_dir / "training_curve.json").read_text())[0]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def base_weights(model) -> dict[str, torch.Tensor]:
    """Copies of all that is frozen: embeddings and norms as they are, 4-bit layers dequantised."""
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


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["sft", "kd", "kd_hard", "dpo", "dpo_from_adapter"])
def test_run_folder(method, run, model_dir, data, sft_adapter, monkeypatch):
    """Exact files, run.json, float32 adapters named `default`; LoRA weights moved and nothing else did."""
    kept = {}
    original = training.train_and_save

    def watched(trainer, *rest):
        kept["names"] = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        kept["before"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
        kept["base"] = base_weights(trainer.model)
        original(trainer, *rest)
        kept["model"] = trainer.model

    monkeypatch.setattr(training, "train_and_save", watched)
    script = method.split("_")[0]
    rows = method if method in data else script
    flags = ["--adapter", sft_adapter] if "adapter" in method else []
    save_dir = run(script, "run", *flags, rows=rows, base=not flags)

    assert {path.name for path in save_dir.iterdir()} == FILES
    tensors = adapter(save_dir)
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert len(tensors) == 2 * 7 * 2  # A and B of seven projections in two layers; no second adapter
    assert not any("ref" in name for name in tensors)
    config = json.loads((save_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_of(save_dir) == model_dir

    after = dict(kept["model"].named_parameters())
    assert kept["names"] == {name for name in kept["before"] if ".default." in name}
    for name, before in kept["before"].items():
        moved = not torch.equal(before, after[name])
        assert moved == (".default." in name), name
        if ".default." in name:  # what is saved is what was trained
            assert torch.equal(tensors[name.replace(".default", "")], after[name])
    base = base_weights(kept["model"])
    assert kept["base"].keys() == base.keys() and any("embed_tokens" in name for name in base)
    assert all(torch.equal(kept["base"][name], base[name]) for name in base)

    result = json.loads((save_dir / "run.json").read_text())
    assert result["method"] == script
    assert result["base_model"] == model_dir
    dests = {action.dest for action in TRAINERS[script].build_parser()._actions} - {"help"}
    assert set(result["flags"]) == dests and None not in (
        result["flags"][name] for name in ("learning_rate", "batch_size", "grad_accum", "lora_dropout")
    )
    assert result["data"] == {"file": data[rows], "sha256": file_sha256(data[rows]), "rows": 10}
    assert result["sources"] and set(result["sources"]) == {None}  # nothing noted beside the data
    assert (result["split_seed"], result["seed"], result["resumed_from"]) == (None, 0, None)
    assert {"python", "torch", "transformers", "peft", "trl", "bitsandbytes"} <= set(result["packages"])
    assert result["machine"]["cpu"] and result["machine"]["cores"] > 0  # times mean nothing without it
    assert result["metrics"]["steps"] == 4 and result["metrics"]["train_loss"] > 0
    assert result["wall_seconds"] > 0 and result["memory"]["peak_gb"] > 0 and result["memory"]["device"]
    curve = json.loads((save_dir / "training_curve.json").read_text())
    assert curve[0]["step"] == 1 and curve[0]["loss"] > 0
    check_model_name(str(save_dir))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapter_loads_as_it_was_trained(dtype, run):
    """In the type of computation: for inference in bfloat16 rounded to it."""
    save_dir = run("sft", "run")
    model, tokenizer = load_model(str(save_dir), dtype=dtype)
    loaded = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert_same({name: p.to(getattr(torch, dtype)) for name, p in adapter(save_dir).items()}, loaded, atol=0)
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token


def test_seed_decides_the_run(run):
    one, again, other = (run("sft", f"run{i}", "--seed", seed) for i, seed in enumerate((3, 3, 4)))
    assert_same(adapter(one), adapter(again), atol=0)
    assert any(not torch.equal(tensor, adapter(other)[name]) for name, tensor in adapter(one).items())


def test_more_steps_bring_the_loss_down(run, data):
    for method in ("sft", "dpo"):
        save_dir = run(method, method, "--max_steps", 60, "--learning_rate", "3e-3", "--batch_size", 4)
        curve = json.loads((save_dir / "training_curve.json").read_text())
        assert curve[-1]["loss"] < 0.5 * curve[0]["loss"], (method, curve)
        rates = {entry["step"]: entry["learning_rate"] for entry in curve}
        assert rates[30] == pytest.approx(3e-3 * (1 - 29 / 60))  # linear, no warm-up


@pytest.mark.parametrize("shape", [(3, 2, 1.5), (4, 1, 2.0), (1, 4, 1.0), (8, 2, 0.5)])
def test_planned_steps_are_the_steps_taken(shape, run, capsys):
    batch, accumulation, epochs = shape
    flags = ("--batch_size", batch, "--grad_accum", accumulation, "--epochs", epochs, "--max_steps", 0)
    run("sft", "run", *flags, "--dry_run")
    planned = int(capsys.readouterr().out.split("steps")[1].split()[0])
    assert json.loads((run("sft", "run", *flags) / "run.json").read_text())["metrics"]["steps"] == planned


# ----------------------------------------------------------------------------------------------------- equivalences

SGD = ("--optimizer", "sgd", "--learning_rate", "0.5", "--lora_dropout", 0, "--quantization", "none")
EXACT = (*SGD, "--compute_dtype", "float32", "--epochs", 2, "--max_steps", 0)


@pytest.mark.parametrize("method", ["sft", "kd", "kd_hard", "dpo"])
def test_batch_of_four_equals_four_accumulated(method, run):
    script = method.split("_")[0]
    whole = run(script, "whole", *EXACT, "--batch_size", 4, "--grad_accum", 1, rows=method)
    parts = run(script, "parts", *EXACT, "--batch_size", 1, "--grad_accum", 4, rows=method)
    pairs = run(script, "pairs", *EXACT, "--batch_size", 2, "--grad_accum", 2, rows=method)
    assert json.loads((whole / "run.json").read_text())["metrics"]["steps"] == 6
    start = adapter(run(script, "start", *EXACT, "--learning_rate", 0, rows=method))
    moved = max((start[name] - tensor).abs().max() for name, tensor in adapter(whole).items())
    assert moved > 1e-3  # the tolerance below is small against the way the weights went
    for other in (parts, pairs):
        assert_same(adapter(whole), adapter(other), atol=2e-5)
        for name in ("loss", "grad_norm"):  # of the first step, before clipping
            assert first_step(other)[name] == pytest.approx(first_step(whole)[name], rel=1e-4)


def test_own_loss_trains_as_the_fused_head_does(run, monkeypatch):
    """Long answers go through TRL's fused head, short ones through ours: the weights must not tell which."""
    own = run("sft", "own", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    monkeypatch.setattr(training, "MAX_LOGITS_BYTES", 0)
    fused = run("sft", "fused", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    assert_same(adapter(own), adapter(fused), atol=2e-5)
    assert first_step(own)["grad_norm"] == pytest.approx(first_step(fused)["grad_norm"], rel=1e-4)


def test_all_batches_take_one_head(run, monkeypatch, data, tmp_path):
    """One long answer sends short ones through the fused head too: of several processes those with short answers
    would otherwise wait for sums that the others never form, and the estimate knows the longest alone."""
    rows = [{"input": f"Debt: {n}", "output": "Good Bad " * (9 if n == 7 else 1)} for n in range(8)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = []
    logits = training.supervised_logits
    monkeypatch.setattr(training, "supervised_logits", lambda *args: own.append(1) or logits(*args))
    monkeypatch.setitem(data, "mixed", str(tmp_path / "mixed.jsonl"))
    run("sft", "below", "--batch_size", 1, rows="mixed")
    assert own
    own.clear()
    monkeypatch.setattr(training, "logits_fit", lambda vocabulary, supervised: supervised < 15)
    run("sft", "above", "--batch_size", 1, rows="mixed")
    assert not own


def test_the_sft_term_of_dpo_is_the_loss_of_sft(run):
    """At the start the preference loss is ln 2, and the term is what SFT loses on the chosen answers."""
    flags = ("--compute_dtype", "float32", "--quantization", "none", "--batch_size", 10, "--max_steps", 1)
    losses = [first_step(run("dpo", f"w{w}", *flags, "--sft_weight", w))["loss"] for w in (0, 1, 2)]
    lost = first_step(run("sft", "sft", *flags))["loss"]
    assert losses == pytest.approx([math.log(2) + weight * lost for weight in (0, 1, 2)], rel=1e-4)


def test_distillation_keeps_its_loss_however_long_the_answers(run, monkeypatch):
    """TRL's fused head knows no teacher: what would send SFT through it must not take KD's term away."""
    short = run("kd", "short", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    monkeypatch.setattr(training, "MAX_LOGITS_BYTES", 0)
    long = run("kd", "long", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    assert_same(adapter(short), adapter(long), atol=0)


@pytest.mark.parametrize("method", TRAINERS)
def test_a_student_without_the_projections_is_refused(method, data, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"a gpt2 model has no q_proj, .* to train; take a student"):
        flags = ["--student", str(tmp_path / "gpt2"), "--data", data[method], "--save_dir", str(tmp_path / "out")]
        TRAINERS[method].main([*flags, "--quantization", "none"])
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("method", ["sft", "kd", "dpo"])
def test_gradient_checkpointing_changes_nothing(method, run):
    flags = ("--compute_dtype", "float32", "--optimizer", "sgd", "--learning_rate", "0.5", "--batch_size", 4)
    on, off = (run(method, value, *flags, "--gradient_checkpointing", value) for value in ("on", "off"))
    assert_same(adapter(on), adapter(off), atol=1e-5)


def test_kd_with_alpha_zero_is_sft(run):
    sft = run("sft", "sft", *EXACT, "--batch_size", 4)
    kd = run("kd", "kd", *EXACT, "--batch_size", 4, "--kd_alpha", 0)
    assert_same(adapter(sft), adapter(kd), atol=1e-6)
    hard = run("kd", "hard", *EXACT, "--batch_size", 4, rows="kd_hard")  # no label_probs: alpha has nothing to weigh
    assert_same(adapter(sft), adapter(hard), atol=1e-6)


def test_adapters_train_in_float32_and_without_rounding(built, model_dir, data, sft_adapter):
    """TRL casts a 4-bit model's adapters to bf16; here they start where the given adapter is, to the last bit."""
    saved = adapter(sft_adapter)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())
    for method in ("kd", "dpo"):
        model = built(method, "--adapter", sft_adapter, "--data", data[method], "--save_dir", "never").model
        start = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if ".default." in n}
        assert_same(saved, start, atol=0)
        if method == "dpo":  # the reference is the adapter itself
            reference = {
                n.replace(".ref", ""): p.detach().float() for n, p in model.named_parameters() if ".ref." in n
            }
            assert_same(saved, reference, atol=0)
    model = built("sft", "--student", model_dir, "--data", data["sft"], "--save_dir", "never").model
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}


# -------------------------------------------------------------------------------------------------- killed and resumed

# Trains as the script does and kills its own process, with no chance to tidy up, when the given step is done.
KILLED = """
import importlib, os, signal, sys
import training
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

original = training.train_and_save

def train_and_save(trainer, *rest):
    trainer.add_callback(Kill())
    original(trainer, *rest)

training.train_and_save = train_and_save
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


@pytest.mark.parametrize("method", ["sft", "kd", "dpo", "dpo_from_adapter"])
def test_killed_and_resumed_equals_uninterrupted(method, model_dir, data, sft_adapter, tmp_path, monkeypatch):
    script = method.split("_")[0]
    base = ["--adapter", sft_adapter] if "adapter" in method else ["--student", model_dir]
    flags = [*base, "--data", data[script], "--max_steps", "10", "--batch_size", "4", "--save_steps", "3"]
    flags += ["--warmup_steps", "2", "--learning_rate", "3e-3"]
    flags += [] if "adapter" in method else ["--lora_dropout", "0.2"]
    whole, killed = str(tmp_path / "whole"), tmp_path / "killed"
    assert TRAINERS[script].main([*flags, "--save_dir", whole]) == 0

    flags += ["--save_dir", str(killed)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED, f"{script}_train", *flags], env=env, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert not (killed / "run.json").exists() and not (killed / "adapter_model.safetensors").exists()
    assert {path.name for path in (killed / "checkpoints").glob("*-*")} == {"checkpoint-3", "checkpoint-6"}
    with pytest.raises(InputError, match="did not finish"):
        check_model_name(str(killed))
    with pytest.raises(InputError, match=r"unfinished run is here; --resume goes on with it, --overwrite"):
        TRAINERS[script].main(flags)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"processes \(was 1, now 2\)"):
        patch.setattr(training, "rank_and_world", lambda: (1, 2))
        training.note_settings(TRAINERS[script].build_parser().parse_args([*flags, "--resume"]))
    with pytest.raises(InputError, match=r"--resume with other settings: learning_rate \(was 0.003, now 0.001\)"):
        TRAINERS[script].main([*flags, "--resume", "--learning_rate", "1e-3"])

    # The newest checkpoint was being written when the next kill came.
    half = killed / "checkpoints" / "checkpoint-9"
    shutil.copytree(killed / "checkpoints" / "checkpoint-6", half)
    (half / "trainer_state.json").unlink()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert training.last_checkpoint(str(killed)).endswith("checkpoint-6") and not half.exists()

    assert TRAINERS[script].main([*flags, "--resume"]) == 0
    assert {path.name for path in killed.iterdir()} == FILES
    result = json.loads((killed / "run.json").read_text())
    assert result["resumed_from"] == "checkpoint-6" and result["metrics"]["steps"] == 10
    assert_same(adapter(whole), adapter(killed), atol=1e-6)


def test_a_full_disk_is_named_in_the_last_line(run, monkeypatch, capsys):
    """Not in torch's words, which are of file positions, and not with the progress bar drawn below it once more."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 32704 vs 32596")

    monkeypatch.setattr(training.CompletionTrainer, "_save_checkpoint", full)
    monkeypatch.setattr(sys, "argv", ["sft_train.py"])
    with pytest.raises(SystemExit) as status:
        run_script(lambda _: run("sft", "run", "--save_steps", 2))
    assert status.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "sft_train.py: failed: RuntimeError: the disk is full; make room, then go on: a trainer with"
    )


def test_checkpoints_sort_by_number(tmp_path):
    for step in (900, 1000, 1100):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if step < 1100:
            (folder / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(str(tmp_path)).endswith("checkpoint-1000")
    assert training.last_checkpoint(str(tmp_path / "none")) is None


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_what_overwrite_replaces_stays_whole_until_the_new_run_is_written(moment, run, monkeypatch):
    """Killed or out of disk before that, the old run is still there to use, and the new one is gone on with."""
    save_dir, flags = run("sft", "run"), ("--seed", 5, "--save_steps", 2)
    (save_dir / "calibration.json").write_text("{}")
    old = files_of(save_dir)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        place = {"training": (training.CompletionTrainer, "_save_checkpoint"), "saving": (training, "plot_curve")}
        patch.setattr(*place[moment], stop)
        with pytest.raises(KeyboardInterrupt):
            run("sft", "run", *flags, "--overwrite")
    assert files_of(save_dir) == old
    check_model_name(str(save_dir))
    with pytest.raises(InputError, match="an unfinished run is here; --resume goes on with it"):
        run("sft", "run", *flags)
    assert_same(adapter(run("sft", "run", *flags, "--resume")), adapter(run("sft", "other", *flags)), atol=0)
    assert json.loads((save_dir / "run.json").read_text())["seed"] == 5
    assert not (save_dir / "calibration.json").exists() and not (save_dir / "checkpoints").exists()


# ------------------------------------------------------------------------------------- gradients after an evaluation


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer) -> str:
    """Folder of a random Llama: its projections have no bias, as the embedded model's."""
    return save_random_model(tmp_path_factory.mktemp("model") / "tiny-llama", tokenizer, "llama")


def gradients_around_an_evaluation(model_dir) -> tuple[torch.Tensor, torch.Tensor]:
    """All LoRA gradients of one batch, before and after a forward as an evaluation makes it."""
    from peft import get_peft_model

    model, tokenizer = load_model(model_dir, "nf4", "bfloat16", trainable=True)
    model = get_peft_model(model, lora_config(dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    ids = torch.tensor([PromptEncoder(tokenizer).prompt("Debt: 12, Age: 30")])

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return before, gradients()


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_gradients_are_the_same_after_an_evaluation(folder, request):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        before, after = gradients_around_an_evaluation(request.getfixturevalue(folder))
    assert before.abs().max() > 1e-3
    assert torch.equal(before, after)


def test_a_kernel_without_gradients_ends_the_training(run, monkeypatch):
    """torch only warns, and what is trained is wrong (TRL and the Trainer show no warning but in the log)."""
    real = training.CompletionTrainer.compute_loss

    def warning(self, *args, **kwargs):
        warnings.warn("gemv_4bit: an autograd kernel was not registered to the Autograd key", stacklevel=1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.CompletionTrainer, "compute_loss", warning)
    with pytest.raises(UserWarning, match="autograd kernel"):
        run("sft", "warned")


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered.*")
def test_without_the_kernel_switch_the_gradients_would_be_wrong(model_dir, llama_dir, monkeypatch):
    """Shows that the test above tests something: the trap is there on this processor."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the packed 4-bit CPU kernel needs AVX512-BF16, which this processor does not have")
    monkeypatch.setattr(models, "keep_autograd_kernels", lambda model: None)
    before, after = gradients_around_an_evaluation(llama_dir)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) < 0.99
    with pytest.raises(RuntimeError, match="in-place operation"):  # projections with a bias fail loudly
        gradients_around_an_evaluation(model_dir)


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_packed_weights_are_for_a_few_tokens_alone(folder, request):
    """Decoding takes the packed kernel, whose scales are rounded to bf16; prompts keep the weights as they are."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the packed 4-bit CPU kernel needs AVX512-BF16, which this processor does not have")
    model, _ = load_model(request.getfixturevalue(folder), "nf4", "bfloat16")
    few, many = torch.tensor([[5, 6, 7]]), torch.arange(5, 45)[None]

    def logits(ids):
        with torch.inference_mode():
            return model(input_ids=ids).logits.float()

    before = logits(few), logits(many)
    pack_for_decoding(model)
    after = logits(few), logits(many)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[0], after[0], rtol=0.1, atol=0.1)


def test_an_evaluation_inside_training_changes_nothing(run, monkeypatch):
    """The same through a whole run: an eval-mode forward after each step leaves the weights as they would be."""
    from transformers import TrainerCallback

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))
            model.train()

    flags = ("--max_steps", 6, "--learning_rate", "3e-3", "--compute_dtype", "bfloat16")
    plain = run("sft", "plain", *flags)
    original = training.train_and_save

    def watched(trainer, *rest):
        trainer.add_callback(Evaluate())
        original(trainer, *rest)

    monkeypatch.setattr(training, "train_and_save", watched)
    assert_same(adapter(plain), adapter(run("sft", "evaluated", *flags)), atol=0)


# ------------------------------------------------------------------------------------------------ the completion loss


def test_labels_by_hand(tokenizer):
    encoder = PromptEncoder(tokenizer)
    rows = [{"input": "-", "output": "Good"}, {"input": "Age", "output": "Bad Bad"}]
    dataset = training.completion_dataset(rows, "output", encoder, 512, "rows")
    batch = training.completion_collator(tokenizer.pad_token_id)(list(dataset))
    shown = [[tokenizer.decode([i]) if i != -100 else None for i in row] for row in batch["labels"].tolist()]
    first, second = ([token for token in row if token is not None] for row in shown)
    # The answer's one token and the end of turn; the prompt has no label.
    assert first == ["Good", "<|im_end|>"]
    # All tokens of a longer answer, and the end of turn.
    assert "".join(second) == "Bad Bad<|im_end|>" and second[0] == "Bad"
    for row, ids, text in zip(shown, batch["input_ids"].tolist(), ("-", "Age"), strict=True):
        # All before an answer is the prompt, its last token the assistant start; after it comes only padding.
        start = next(i for i, token in enumerate(row) if token is not None)
        end = next((i for i in range(start, len(row)) if row[i] is None), len(row))
        assert set(row[end:]) <= {None} and set(ids[end:]) <= {tokenizer.pad_token_id}
        turns = f"<|im_start|>system\n{common.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
        assert tokenizer.decode(ids[:start]) == f"{turns}<|im_start|>assistant\n"
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        assert mask == [int(token != tokenizer.pad_token_id) for token in ids]
    assert batch["attention_mask"].min() == 0


def test_loss_equals_that_of_trl(built, model_dir, data):
    from trl import SFTTrainer

    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0, "--batch_size", 4)
    trainer = built("sft", "--student", model_dir, "--data", data["sft"], "--save_dir", "never", *flags)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len({int((row != -100).sum()) for row in batch["labels"]}) > 1
    for items in (None, torch.tensor(40)):
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    right = trainer._metrics["train"]["mean_token_accuracy"]
    assert right[0] == pytest.approx(right[1])


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_the_start_that_prompts_share_is_run_once_with_the_same_gradients(folder, built, data, monkeypatch, request):
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0)
    start = ("--student", request.getfixturevalue(folder), "--data", data["kd"], "--save_dir", "never")
    trainer = built("kd", *start, *flags)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start: lora_A would have no gradient
            torch.nn.init.normal_(parameter.data, std=0.1)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    widths = []

    def gradients() -> torch.Tensor:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])

    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    once = gradients()
    monkeypatch.setattr(training, "MIN_SHARED_TOKENS", 10**6)
    plain = gradients()
    (first, shared), (rows, rest), whole = widths
    assert (first, rows) == (1, 4) and shared >= 16 and (4, shared + rest) == whole
    assert plain.abs().max() > 1e-2
    torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-5)


def test_how_much_of_its_start_a_batch_shares(monkeypatch):
    monkeypatch.setattr(training, "MIN_SHARED_TOKENS", 2)
    ids = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 3, 4, 8]])
    assert training.shared_columns(ids, 5) == 3
    assert training.shared_columns(ids, 2) == 2  # no further than the token before the first answer
    assert training.shared_columns(ids[[0, 0]], 4) == 4
    assert training.shared_columns(ids[:1], 5) == 0  # one row: nothing to save
    assert training.shared_columns(ids, 1) == 0


def test_only_supervised_positions_go_through_the_head(built, model_dir, data):
    start = ("--student", model_dir, "--data", data["sft"], "--save_dir", "never")
    trainer = built("sft", *start, "--quantization", "none", "--compute_dtype", "float32")
    batch = next(iter(trainer.get_train_dataloader()))
    seen = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:-1].numel()))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    prefix = len(seen) - 1  # the prompts' common start, where there is one, ends in one position of its own
    assert sum(seen) == int((batch["labels"] != -100).sum()) + prefix and prefix <= 1


def test_rows_of_like_length_go_together_only_where_lengths_differ():
    assert training.batch_order([92, 98, 95]) == "random"
    assert training.batch_order([100, 120, 500]) == "group_by_length"


def test_padding_does_not_change_the_loss(built, model_dir, data):
    """Rows one by one and all in one batch have the same summed loss."""
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0)
    trainer = built("kd", "--student", model_dir, "--data", data["kd"], "--save_dir", "never", *flags)
    rows, one = list(trainer.train_dataset), torch.tensor(1)
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model, trainer.data_collator(rows), num_items_in_batch=one)
        alone = [trainer.compute_loss(trainer.model, trainer.data_collator([r]), num_items_in_batch=one) for r in rows]
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)


def kd_batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(1)) * 2
    # The first row's answer has two tokens, the second's three.
    batch = {"labels": torch.tensor([4, 9, 7, 2, 9]), "starts": torch.tensor([0, 2])}
    return logits, {**batch, "label_probs": torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8]])}


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_kd_loss_by_hand(alpha, temperature):
    logits, batch = kd_batch()
    ids = [4, 7, 1]
    found = kd_train.distillation_loss_sum(logits, batch, ids, alpha, temperature)

    def softmax(values):
        powers = np.exp(values - values.max())
        return powers / powers.sum()

    expected, scores = 0.0, logits.double().numpy()
    for position, label in enumerate((4, 9, 7, 2, 9)):
        expected -= (1 - alpha) * np.log(softmax(scores[position])[label])
    for row, position in enumerate((0, 2)):
        student = softmax(scores[position, ids] / temperature)
        teacher = batch["label_probs"][row].double().numpy() ** (1 / temperature)
        teacher /= teacher.sum()
        expected += alpha * temperature**2 * (teacher * np.log(teacher / student)).sum()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_kd_loss_at_its_ends():
    logits, batch = kd_batch()
    ids = [4, 7, 1]
    cross_entropy = training.cross_entropy_sum(logits, batch)
    assert kd_train.distillation_loss_sum(logits, batch, ids, 0.0, 2.0) == cross_entropy
    logits[0, ids] = batch["label_probs"][0].log() + 3.0  # student = teacher, whatever the other tokens have
    logits[2, ids] = batch["label_probs"][1].log() - 1.0
    for temperature in (0.5, 1.0, 3.0):
        assert kd_train.distillation_loss_sum(logits, batch, ids, 1.0, temperature).item() == pytest.approx(
            0, abs=1e-5
        )
    batch["label_probs"] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # one-hot: finite all the same
    logits.requires_grad_()
    loss = kd_train.distillation_loss_sum(logits, batch, ids, 1.0, 1.0)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logits.grad).all()


def test_a_sure_teacher_decides_the_label(run, data, model_dir, tmp_path):
    """alpha = 1: label_probs teach the label, against the answers' text; labels may come in any order in a row."""
    turns = [f"Debt: {number}" for number in range(8)]
    rows = []
    for number, turn in enumerate(turns):
        probs = {label: float(label == "Bad") for label in (LABELS if number % 2 else LABELS[::-1])}
        rows.append({"input": turn, "teacher_output": "Good", "label_probs": probs})
    path = write_rows(tmp_path / "sure.jsonl", rows)
    flags = ("--data", path, "--kd_alpha", 1, "--learning_rate", "3e-3", "--max_steps", 40)
    model, tokenizer = load_model(str(run("kd", "sure", *flags)))
    scorer = common.LabelScorer(model, PromptEncoder(tokenizer), {label: [label] for label in LABELS})
    scores = scorer.raw_scores(turns)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert (probabilities[:, LABELS.index("Bad")] > 0.8).all()


# ---------------------------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_dpo_starts_at_its_reference(start, run, sft_adapter):
    """Policy and reference agree at first: the loss is ln 2 whatever the dropout, which TRL switches off for both."""
    choices = [["--adapter", sft_adapter]] if start == "adapter" else [["--lora_dropout", p] for p in (0, 0.5)]
    folders = [run("dpo", f"run{i}", *flags, base=start == "base") for i, flags in enumerate(choices)]
    for folder in folders:
        assert first_step(folder)["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first_step(folder)["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert_same(adapter(folders[0]), adapter(folders[-1]), atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_the_prompt_of_a_pair_is_run_once_with_the_same_gradients(
    folder, attention, built, tmp_path, monkeypatch, request
):
    answers = [("Good", "Bad Bad Standard"), ("Bad Good", "Good"), ("Standard", "Bad"), ("Bad", "Good Bad")]
    pairs = [
        {"prompt": "Age: " + "4 " * length, "chosen": chosen, "rejected": rejected}
        for length, (chosen, rejected) in zip((0, 9, 4, 1), answers, strict=True)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--sft_weight", 0.5)
    start = ("--student", request.getfixturevalue(folder), "--data", data, "--save_dir", "never")
    with monkeypatch.context() as patch:
        patch.setattr(training, "share_prompts", lambda model: None)
        trainer = built("dpo", *start, *flags)
    trainer.model.set_attn_implementation(attention)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start: policy and reference would be one
            torch.nn.init.normal_(parameter.data, std=0.1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    base, shapes, seen = trainer.model.get_base_model(), [], []
    base.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )

    def step() -> torch.Tensor:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        seen.append({name: values.pop() for name, values in trainer._metrics["train"].items() if values})
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        return torch.cat([loss.detach()[None], *gradients])

    twice = step()
    training.share_prompts(base)
    once = step()
    (rows, width), reference, (paired, columns), _ = shapes
    assert reference == (rows, width) == (8, width) and paired == 4 and columns < 1.2 * width
    assert twice[1:].abs().max() > 1e-2
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
    assert {"rewards/chosen", "logits/rejected", "mean_token_accuracy", "entropy"} <= seen[0].keys()
    assert seen[1].pop("num_tokens") == 2 * seen[0].pop("num_tokens")  # it counts on
    assert seen[1] == pytest.approx(seen[0], rel=1e-4, abs=1e-5)


def test_prompts_are_run_once_only_where_that_is_right_and_pays(model_dir, llama_dir, data, tmp_path, built):
    def pays(folder, prompt=40, answer=3, **changes) -> bool:
        config = json.loads((Path(folder) / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return training.prompts_pay(
            str(tmp_path), [{"prompt_ids": [1] * prompt, "chosen_ids": [1] * answer, "rejected_ids": [1] * answer}]
        )

    assert pays(model_dir) and pays(llama_dir)
    assert not pays(model_dir, prompt=40, answer=20)  # attention over the longer row would cost more than it saves
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    assert not pays(model_dir, **window, layer_types=["sliding_attention"] * 2)
    assert not pays(llama_dir, model_type="mistral", sliding_window=8)
    assert not pays(llama_dir, model_type="gemma3_text")
    pairs = [{"prompt": "Age: 3", "chosen": "Good " * 30, "rejected": "Bad " * 30}] * 2
    flags = ("--student", model_dir, "--save_dir", "never")
    for file, own in ((data["dpo"], True), (write_rows(tmp_path / "long.jsonl", pairs), False)):
        forward = built("dpo", *flags, "--data", file).model.get_base_model().forward
        assert (forward.__name__ == "paired") == own


def test_beta_reaches_the_loss(built, run, model_dir, data):
    flags = ("--student", model_dir, "--data", data["dpo"], "--save_dir", "never")
    trainer = built("dpo", *flags, "--beta", 0.37)
    assert trainer.args.beta == trainer.beta == 0.37
    assert trainer.args.loss_type == ["sigmoid"]
    trainer = built("dpo", *flags, "--sft_weight", 0.5)
    assert (trainer.args.loss_type, trainer.args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert trainer.args.beta == 0.1


def test_beta_scales_the_first_gradient(run):
    small, large = (run("dpo", f"beta{beta}", *EXACT, "--batch_size", 4, "--beta", beta) for beta in (0.1, 0.2))
    assert first_step(large)["grad_norm"] == pytest.approx(2 * first_step(small)["grad_norm"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------- prompts alike


@pytest.mark.parametrize("method", ["sft", "kd", "dpo"])
def test_training_prompts_are_the_scoring_prompts(method, built, model_dir, tmp_path):
    """Token for token, in the batches that reach the model, control tokens in user text included."""
    turns = ["Debt: 12", "text with <|im_end|>\n<|im_start|>system\nin it", " spaces  and\nlines ", "Schulden: 5 €"]
    names = {"sft": ("input", "output"), "kd": ("input", "teacher_output"), "dpo": ("prompt", "chosen")}[method]
    rows = [dict(zip(names, (turn, "Good"), strict=True)) | {"rejected": "Bad"} for turn in turns]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trainer = built(method, "--student", model_dir, "--data", path, "--save_dir", "never", "--batch_size", 4)
    encoder = PromptEncoder(trainer.processing_class)
    batch = next(iter(trainer.get_train_dataloader()))
    found = set()
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        completion = batch["completion_mask"] == 1 if method == "dpo" else batch["labels"] != -100
        answer = completion[number]
        text = "Bad" if number >= len(turns) else "Good"  # TRL puts the rejected ones below the chosen ones
        assert ids[answer].tolist() == encoder.completion(text)
        found.add(tuple(ids[mask.bool() & ~answer].tolist()))
    assert found == {tuple(encoder.prompt(turn)) for turn in turns}


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(method: str, rows: list[dict], tmp_path: Path, model_dir: str, *flags) -> str:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    save_dir = tmp_path / "never"
    argv = ["--student", model_dir, "--data", path, "--save_dir", save_dir, *flags]
    with pytest.raises(InputError) as error:
        TRAINERS[method].main([str(flag) for flag in argv])
    assert not save_dir.exists()
    return str(error.value)


def rows_of(method: str, turn: str = "Debt: 1") -> dict:
    return {
        "sft": {"input": turn, "output": "Good"},
        "kd": {"input": turn, "teacher_output": "Good"},
        "dpo": {"prompt": turn, "chosen": "Good", "rejected": "Bad"},
    }[method]


@pytest.mark.parametrize("method", TRAINERS)
def test_rows_too_long_are_refused_by_number(method, tmp_path, model_dir):
    rows = [rows_of(method), rows_of(method), rows_of(method, "Debt: 1" * 300), rows_of(method)]
    message = refused(method, rows, tmp_path, model_dir)
    assert "row 3" in message and "--max_length" in message and "1024" in message


@pytest.mark.parametrize("method", TRAINERS)
def test_rows_without_a_field_are_refused_by_line(method, tmp_path, model_dir):
    row = rows_of(method)
    missing = list(row)[-1]
    message = refused(method, [row, {k: v for k, v in row.items() if k != missing}], tmp_path, model_dir)
    assert "line 2" in message and missing in message


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([{"Good": 0.5, "Bad": 0.5}, None], "row 2.*in every row or in none"),
        ([None, {"Good": 0.5, "Bad": 0.5}], "row 1.*in every row or in none"),
        ([{"Good": 0.5, "Bad": 0.5}, {"Good": 0.5, "Standard": 0.5}], "row 2"),
        ([{"Good": 0.5, "Bad": 0.5}, {"Good": 0.5, "Bad": 0.3}], "row 2.*add up to 1"),
        ([{"Good": 1.5, "Bad": -0.5}], "row 1.*no probabilities"),
        ([{"Good": float("nan"), "Bad": 0.5}], "line 1 is not JSON"),
        ([{"Good": "0.5", "Bad": 0.5}], "row 1.*no probabilities"),
        ([{"Good": 1.0}], "row 1"),
        ([[0.5, 0.5]], "row 1"),
        ([{"Good": 0.5, "Good enough": 0.5}], "first token"),
    ],
)
def test_label_probs_that_cannot_be_used_are_refused(probs, expected, tmp_path, model_dir):
    rows = [rows_of("kd") | ({} if p is None else {"label_probs": p}) for p in probs]
    message = refused("kd", rows, tmp_path, model_dir)
    assert re.search(expected, message), message


def test_a_pair_without_contrast_is_refused(tmp_path, model_dir):
    rows = [rows_of("dpo"), rows_of("dpo") | {"rejected": "Good"}]
    assert "row 2: chosen and rejected are the same" in refused("dpo", rows, tmp_path, model_dir)


@pytest.mark.parametrize("method", TRAINERS)
def test_flags_out_of_range_are_refused_all_at_once(method, tmp_path, model_dir):
    flags = ("--batch_size", 0, "--grad_accum", -1, "--lora_r", 0, "--lora_dropout", 1, "--learning_rate", "nan")
    flags += ("--save_steps", 0, "--epochs", 0, "--max_memory_gb", 0)
    message = refused(method, [rows_of(method)], tmp_path, model_dir, *flags)
    names = ("batch_size 0", "grad_accum -1", "lora_r 0", "lora_dropout 1", "learning_rate nan", "epochs 0")
    for name in (*names, "max_memory_gb 0.0"):
        assert f"--{name}" in message


def test_a_run_that_is_all_warm_up_says_so(run, capsys):
    run("sft", "short", "--warmup_steps", 4)
    assert "note: all 4 steps are warm-up (--warmup_steps 4)" in capsys.readouterr().err
    run("sft", "long", "--warmup_steps", 3)
    assert "warm-up" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_the_adapter_to_go_on_from_is_not_overwritten(method, data, sft_adapter):
    flags = ["--adapter", sft_adapter, "--data", data[method], "--save_dir", sft_adapter, "--overwrite"]
    before = adapter(sft_adapter)
    with pytest.raises(InputError, match="choose another --save_dir"):
        TRAINERS[method].main(flags)
    assert_same(before, adapter(sft_adapter), atol=0)


@pytest.fixture
def prepared(tmp_path, data) -> Path:
    """Data whose preparation was noted, with split seed 7."""
    for method in TRAINERS:
        shutil.copy(data[method], tmp_path / f"{method}.jsonl")
    files = {f"{method}.jsonl": file_sha256(data[method]) for method in TRAINERS}
    note = {"split_seed": 7, "gold_share": 0.2, "source": {"file": "raw.csv", "sha256": "abc"}, "files": files}
    (tmp_path / "creditmix_prepared.json").write_text(json.dumps(note))
    return tmp_path


def test_the_adapters_shape_is_that_of_the_flags(run):
    config = json.loads((run("sft", "run", "--lora_r", 4, "--lora_alpha", 12) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


@pytest.mark.parametrize("method", TRAINERS)
def test_the_split_of_the_data_is_recorded(method, run, prepared):
    """Evaluation refuses an adapter of another split, so a wrong record would let training rows into validation."""
    recorded = json.loads((run(method, "run", "--data", prepared / f"{method}.jsonl") / "run.json").read_text())
    assert recorded["split_seed"] == recorded["flags"]["split_seed"] == 7
    assert recorded["sources"] == [{"file": "raw.csv", "sha256": "abc"}]
    assert recorded["gold_share"] == 0.2
    with pytest.raises(InputError, match=r"--split_seed 0: .* was prepared with 7; leave the flag out"):
        run(method, "other", "--data", prepared / f"{method}.jsonl", "--split_seed", 0)


def test_the_sources_of_the_adapter_to_go_on_from_are_recorded(run, prepared):
    """A student that was made in two steps has seen the rows of both."""
    first = run("sft", "first", "--data", prepared / "sft.jsonl")
    note = json.loads((prepared / "creditmix_prepared.json").read_text())
    note |= {"source": {"file": "other.csv", "sha256": "def"}, "gold_share": 0.1}
    (prepared / "creditmix_prepared.json").write_text(json.dumps(note))
    flags = ("--adapter", first, "--data", prepared / "dpo.jsonl")
    recorded = json.loads((run("dpo", "second", *flags, base=False) / "run.json").read_text())
    assert [source["file"] for source in recorded["sources"]] == ["other.csv", "raw.csv"]
    assert recorded["gold_share"] == 0.2  # the larger: the first step saw these labels


def test_the_note_of_other_data_is_not_believed(run, prepared):
    with open(prepared / "sft.jsonl", "a") as out:
        out.write('{"input": "Debt: 1", "output": "Good"}\n')
    with pytest.raises(InputError, match=r"sft\.jsonl: changed since .*creditmix_prepared\.json was written"):
        run("sft", "run", "--data", prepared / "sft.jsonl")
    saved = run("sft", "run", "--data", prepared / "sft.jsonl", "--split_seed", 3)
    recorded = json.loads((saved / "run.json").read_text())
    assert (recorded["split_seed"], recorded["sources"], recorded["gold_share"]) == (3, [None], None)


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_an_adapter_of_another_split_is_not_gone_on_from(method, run, prepared, sft_adapter, tmp_path):
    sft_adapter = shutil.copytree(sft_adapter, tmp_path / "sft")
    record = json.loads((sft_adapter / "run.json").read_text())
    (sft_adapter / "run.json").write_text(json.dumps(record | {"split_seed": 0}))
    with pytest.raises(InputError, match=r"--adapter .* was trained with --split_seed 0, .* has 7"):
        run(method, "run", "--adapter", sft_adapter, "--data", prepared / f"{method}.jsonl", base=False)


@pytest.mark.parametrize("changed", ["data", "adapter"])
def test_a_killed_run_is_not_gone_on_with_other_data_or_another_start(changed, data, sft_adapter, tmp_path):
    """DPO's frozen reference would be another network than before the kill."""
    start = Path(shutil.copytree(sft_adapter, tmp_path / "start"))
    rows = Path(shutil.copy(data["dpo"], tmp_path / "dpo.jsonl"))
    args = (
        TRAINERS["dpo"]
        .build_parser()
        .parse_args(
            ["--adapter", str(start), "--data", str(rows), "--save_dir", str(tmp_path / "run"), "--split_seed", "0"]
        )
    )
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    training.note_settings(args)
    args.resume = True
    training.note_settings(args)
    if changed == "data":
        rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    else:
        weights = load_file(start / "adapter_model.safetensors")
        save_file({name: 2 * weight for name, weight in weights.items()}, start / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"--resume with other settings: (data_sha256|adapter_fingerprint) "):
        training.note_settings(args)


@pytest.mark.parametrize(("prompt", "answer"), [([1, 2], []), ([1, 2], [7]), ([], [5, 7])])
def test_rows_with_nothing_or_everything_to_learn_are_refused(prompt, answer, model_dir):
    """An encoder that forgets the answer, its text or the prompt must not train on."""

    class Encoder:
        tokenizer = training.load_tokenizer(model_dir)
        end_of_turn = "<|im_end|>"

        def prompt(self, turn):
            return prompt

        def completion(self, text):
            return answer

    with pytest.raises(InputError, match=r"rows: row 1: . of . tokens supervised"):
        training.completion_dataset([{"input": "a", "output": "b"}], "output", Encoder(), 10, "rows")


def test_run_json_is_written_last(run, monkeypatch, tmp_path):
    """It is the mark of completeness: a run that dies while saving must not have it."""
    moved, replace = [], Path.replace

    def note(path, target):
        if Path(target).parent == tmp_path / "run":
            if len(moved) == 2:
                raise ZeroDivisionError
            moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    with pytest.raises(ZeroDivisionError):
        run("sft", "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*moved, "checkpoints"}
    assert "run.json" not in moved  # and checkpoints are there, else the folder would pass for one from elsewhere
    monkeypatch.undo()
    assert "run.json" in {path.name for path in run("sft", "run", "--resume").iterdir()}


def test_label_probs_in_sft_rows_are_not_used(run, data, tmp_path):
    rows = [
        json.loads(line) | {"label_probs": {"Good": 0.5, "Bad": 0.5}}
        for line in Path(data["sft"]).read_text().splitlines()
    ]
    with_probs = run("sft", "with", "--data", write_rows(tmp_path / "rows.jsonl", rows))
    assert_same(adapter(with_probs), adapter(run("sft", "without")), atol=0)


@pytest.mark.parametrize("method", TRAINERS)
def test_a_tracker_that_is_not_installed_is_refused(method, tmp_path, model_dir):
    assert "--report_to nonsense: not installed here; possible are: none" in refused(
        method, [rows_of(method)], tmp_path, model_dir, "--report_to", "nonsense"
    )


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("method", "flag"),
    [("kd", "kd_temperature"), ("kd", "kd_alpha"), ("dpo", "beta"), ("dpo", "sft_weight")]
    + [(method, flag) for method in TRAINERS for flag in ("learning_rate", "epochs", "lora_dropout")],
)
def test_numbers_that_are_none_are_refused(method, flag, value, tmp_path, model_dir):
    assert f"--{flag}" in refused(method, [rows_of(method)], tmp_path, model_dir, f"--{flag}", value)


@pytest.mark.parametrize("flags", [("--kd_alpha", 1.5), ("--kd_alpha", -1), ("--kd_temperature", 0)])
def test_kd_flags_out_of_range_are_refused(flags, tmp_path, model_dir):
    assert "--kd_alpha" in refused("kd", [rows_of("kd")], tmp_path, model_dir, *flags)


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_an_adapter_of_another_base_is_refused(method, tmp_path, model_dir, sft_adapter):
    argv = (method, [rows_of(method)], tmp_path, "some/other-model", "--adapter", sft_adapter)
    assert f"belongs to {model_dir}, not to --student some/other-model" in refused(*argv)
    message = refused(method, [rows_of(method)], tmp_path, model_dir, "--adapter", model_dir)
    assert "no adapter folder" in message


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_lora_settings_are_those_of_the_adapter_to_go_on_from(method, run, sft_adapter):
    with pytest.raises(InputError, match=r"--lora_r 8: .*sft has 16; leave it out"):
        run(method, "other", "--adapter", sft_adapter, "--lora_r", 8, base=False)
    recorded = json.loads((run(method, "same", "--adapter", sft_adapter, base=False) / "run.json").read_text())
    assert (recorded["flags"]["lora_r"], recorded["flags"]["lora_dropout"]) == (16, 0.1)


@pytest.mark.parametrize("rows", ["kd", "kd_hard"])
def test_kd_without_label_probs_says_that_alpha_has_no_effect(rows, run, capsys):
    run("kd", "run", rows=rows)
    assert ("no label_probs" in capsys.readouterr().err) == (rows == "kd_hard")


@pytest.mark.parametrize("method", TRAINERS)
def test_a_finished_run_is_kept(method, run, data, model_dir):
    save_dir = run(method, "run")
    before = (save_dir / "adapter_model.safetensors").read_bytes()
    for flags in ((), ("--resume",)):
        with pytest.raises(InputError, match="a finished run is here; --overwrite replaces it"):
            run(method, "run", "--seed", 5, *flags)
    assert (save_dir / "adapter_model.safetensors").read_bytes() == before
    run(method, "run", "--seed", 5, "--overwrite")
    assert json.loads((save_dir / "run.json").read_text())["seed"] == 5
    assert (save_dir / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("method", TRAINERS)
def test_dry_run_prints_the_plan_and_writes_nothing(method, run, capsys, data):
    save_dir = run(method, "plan", "--dry_run", "--batch_size", 2, "--grad_accum", 2)
    plan = capsys.readouterr().out
    assert not save_dir.exists()
    assert f"rows                 10 from {data[method]}" in plan
    assert "steps                4 of 2 x 2 rows" in plan
    # r x (in + out) of q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64, in two layers
    assert f"trainable parameters {16 * 2 * (128 + 2 * 96 + 128 + 2 * 192 + 192):,} " in plan
    assert "estimated memory" in plan and f"would write          {save_dir}" in plan


def test_a_dry_run_says_that_the_run_would_be_refused(run, capsys, model_dir, data, tmp_path):
    run("sft", "run")
    for flags, line in (
        ([], "would be refused     .*run: a finished run is here"),
        (["--overwrite", "--max_memory_gb", 0.01], "would be refused     about .* GB needed, 0.0 GB to be had"),
    ):
        capsys.readouterr()
        argv = ["--student", model_dir, "--data", data["sft"], "--save_dir", tmp_path / "run", "--dry_run", *flags]
        assert sft_train.main(list(map(str, argv))) == 2  # as without --dry_run
        assert re.search(line, capsys.readouterr().out)
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "settings.json").write_text(json.dumps({"learning_rate": 1.0}))
    assert sft_train.main([*map(str, argv[:-3]), "--resume", "--gradient_checkpointing", "off"]) == 2
    assert "would be refused     --resume with other settings: " in capsys.readouterr().out


def test_resume_without_a_checkpoint_says_that_it_starts_again(run, capsys):
    run("sft", "run", "--resume")
    assert "no checkpoint yet, training starts at the beginning" in capsys.readouterr().err


def test_plan_of_the_default_student(tmp_path, tokenizer, data, capsys):
    """The shape of Qwen2.5-3B, with no weights: the recipe for large students, its size measured and by arithmetic."""
    from transformers import Qwen2Config

    folder = tmp_path / "qwen2.5-3b"
    Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    argv = ["--student", str(folder), "--data", data["sft"], "--save_dir", str(tmp_path / "never"), "--dry_run"]
    assert sft_train.main([*argv, "--compute_dtype", "bfloat16"]) == 0
    plan = capsys.readouterr().out
    assert "of 1 x 8 rows" in plan and "learning rate        0.0002" in plan
    assert "trainable parameters 29,933,568" in plan
    total, weights = (float(plan.split(mark)[1].split()[0].rstrip(",")) for mark in ("estimated memory", "(weights"))
    assert weights == pytest.approx(2.01, abs=0.1)  # measured for this shape in NF4
    assert weights < total < 8


def test_defaults_follow_the_size_and_yield_to_flags():
    for parameters, recipe in ((135e6, sft_train.SMALL), (3e9, sft_train.LARGE)):
        args = sft_train.build_parser().parse_args(["--batch_size", "5"])
        training.fill_defaults(args, sft_train.SMALL, sft_train.LARGE, parameters)
        found = {name: getattr(args, name) for name in recipe}
        assert found == recipe | {"batch_size": 5}


def test_auto_takes_what_fits_and_keeps_the_rows_of_a_step(model_dir, tmp_path, capsys):
    def found(gigabytes, *flags):
        argv = ["--save_dir", str(tmp_path), "--max_memory_gb", str(gigabytes), "--compute_dtype", "float32"]
        args = sft_train.build_parser().parse_args([*argv, *flags])
        training.fill_defaults(args, sft_train.SMALL, sft_train.LARGE, 135e6)
        training.check_flags(args)
        estimate = training.fit_to_memory(model_dir, args, longest=500, answer=5)
        return (args.batch_size, args.grad_accum, args.gradient_checkpointing), estimate["total"]

    auto = ("--batch_size", "auto")
    assert found(1000, *auto)[0] == (16, 1, "off")  # a step as without the flag
    assert found(1000, *auto, "--grad_accum", "6")[0] == (6, 1, "off")
    most, least = (found(gigabytes, *auto)[1] for gigabytes in (1000, 1e-9))
    for share in (0.3, 0.6, 0.9):
        limit = (least + share * (most - least)) / 0.8
        (batch, accumulation, checkpointing), total = found(limit, *auto)
        assert batch * accumulation == 16 and 1 <= batch < 16 and total <= 0.8 * limit and checkpointing == "off"
    assert found(1e-9, *auto)[0] == (1, 16, "on")  # check_memory refuses it then
    assert found(1e-9)[0] == (16, 1, "on") and found(1000)[0] == (16, 1, "off")
    # A run that was killed goes on as it began, whatever memory is free now.
    settings = {"batch_size": 4, "grad_accum": 4, "gradient_checkpointing": "on"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "settings.json").write_text(json.dumps(settings))
    assert found(1000, *auto, "--resume")[0] == (4, 4, "on")
    assert "--batch_size auto: 4 x 4 rows a step" in capsys.readouterr().err
    assert found(1000, "--batch_size", "8", "--resume")[0] == (8, 1, "on")


@pytest.mark.parametrize("method", TRAINERS)
def test_too_little_memory_is_refused_with_advice(method, data, model_dir, sft_adapter, tmp_path, monkeypatch, capsys):
    argv = ["--student", model_dir, "--data", data[method], "--save_dir", str(tmp_path / "never")]
    monkeypatch.setattr(sys, "argv", [f"{method}_train.py"])
    always = {"--optimizer adamw_8bit", "--student", "--max_memory_gb"}
    if method == "dpo":  # whose student is that of its adapter
        argv = [*argv[2:], "--adapter", sft_adapter]
        always -= {"--student"}
    for flags, advice in (  # only what still helps
        (["--batch_size", "2"], {"--batch_size", "--grad_accum"}),
        (["--batch_size", "1", "--gradient_checkpointing", "off"], {"--gradient_checkpointing on"}),
        (["--batch_size", "1", "--quantization", "none"], {"--quantization nf4"}),
    ):
        with pytest.raises(SystemExit) as status:
            run_script(lambda _, flags=flags: TRAINERS[method].main([*argv, *flags, "--max_memory_gb", "0.0001"]))
        assert status.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"{method}_train.py: error: about")
        assert set(re.findall("--[a-z_]+(?: on| nf4| adamw_8bit)?", message)) == always | advice
    assert not (tmp_path / "never").exists()


# --------------------------------------------------------------------------------------------------------------- flags

# Flags that one trainer alone has, and those that two share.
OWN = {"sft": set(), "kd": {"kd_alpha", "kd_temperature", "adapter"}, "dpo": {"beta", "sft_weight", "adapter"}}
# What differs on purpose: the data and where it goes; the student, which kd and dpo can take from their adapter; the
# learning rate that a help text names, since DPO needs smaller steps.
DIFFERENT = {"student": {"default", "help"}, "data": {"default", "help"}, "save_dir": {"default"}}
DIFFERENT |= {"learning_rate": {"help"}, "epochs": {"help"}, "batch_size": {"help"}}


def parts(action) -> dict:
    names = ("option_strings", "dest", "nargs", "const", "default", "type", "choices", "help", "required")
    return {name: getattr(action, name) for name in names} | {"kind": type(action)}


def test_trainers_share_their_flags():
    actions = {name: script.build_parser()._actions for name, script in TRAINERS.items()}
    shared = {
        name: [parts(action) for action in found if action.dest not in OWN[name]] for name, found in actions.items()
    }
    for name in ("kd", "dpo"):
        assert [flag["dest"] for flag in shared[name]] == [flag["dest"] for flag in shared["sft"]]
        for ours, theirs in zip(shared["sft"], shared[name], strict=True):
            unlike = {key for key in ours if ours[key] != theirs[key]}
            assert unlike <= DIFFERENT.get(ours["dest"], set()), (name, ours["dest"], unlike)
    unlike = {
        action["dest"]: {key for key in action if action[key] != other[key]}
        for action, other in zip(shared["kd"], shared["dpo"], strict=True)
    }
    assert {name for name, keys in unlike.items() if keys} == {"data", "save_dir", "learning_rate", "batch_size"}
    for name, own in OWN.items():
        assert own <= {action.dest for action in actions[name]}


def test_trainers_share_their_recipes():
    """Defaults that depend on the student's size: KD needs one pass, and may step farther, where SFT needs two; DPO
    steps less far, and a pair of it is two sequences."""
    assert sft_train.SMALL | {"epochs": 1.0, "learning_rate": 2e-3} == kd_train.SMALL
    assert sft_train.LARGE == kd_train.LARGE
    for size in ("SMALL", "LARGE"):
        sft, dpo = getattr(sft_train, size), getattr(dpo_train, size)
        assert sft.keys() == dpo.keys()
        assert {name for name in sft if sft[name] != dpo[name]} <= {"epochs", "learning_rate", "batch_size"}
        assert dpo["learning_rate"] < sft["learning_rate"]


def test_defaults_are_those_of_the_whitepaper():
    assert sft_train.build_parser().parse_args([]).quantization == "nf4"
    assert (sft_train.LARGE["lora_r"], sft_train.LARGE["lora_alpha"], sft_train.LARGE["lora_dropout"]) == (
        16,
        32,
        0.05,
    )
    assert sft_train.LARGE["batch_size"] == 1
    config = lora_config()
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config.target_modules) == projections
