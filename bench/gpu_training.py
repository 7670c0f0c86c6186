"""Measure training of the 3B shape on a GPU of 8 GB: peak memory next to the trainers' own estimate.

The model is a folder of random weights (`save_model`), so each point is a user's command from its flags to run.json:
`common.load_model` quantises, TRL trains. PyTorch may take no more than `--memory_gb` of the GPU
(set_per_process_memory_fraction), so a point that needs more ends with an out-of-memory error, as it would there.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dpo_train
import kd_train
import sft_train
from bench.memory_8gb import SHAPES, make_rows, save_rows
from common import PromptEncoder
from distil.files import read_json
from distil.training import run

SCRIPTS = {"sft": sft_train, "kd": kd_train, "dpo": dpo_train}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = 4  # optimiser steps of a point, two forwards each


def shape(tiny: bool) -> dict[str, Any]:
    """Return the configuration of the 3B shape, or one of two narrow layers for a rehearsal on a CPU."""
    return SHAPES["3b"] | (TINY | {"vocab_size": 49152} if tiny else {})


def save_model(folder: Path, tokenizer_dir: str, tiny: bool) -> dict[str, Any]:
    """Save a model of this shape with random weights in bfloat16, made on the GPU where there is one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    started, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(**shape(tiny))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    seconds = round(time.monotonic() - started, 1)
    return {"parameters": model.num_parameters(), "gb": round(size, 3), "seconds": seconds}


def gpu_memory() -> dict[str, float]:
    """Return the peaks since the last reset in GB, and what the whole GPU has in use now, CUDA contexts included."""
    if not torch.cuda.is_available():
        return {"allocated_gb": 0.0, "reserved_gb": 0.0, "in_use_gb": 0.0}
    free, total = torch.cuda.mem_get_info()
    gb = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {f"{name}_gb": round(value / 1e9, 3) for name, value in (gb | {"in_use": total - free}).items()}


def reset_memory() -> None:
    """Free what earlier points left and begin new peaks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def limit_memory(gb: float) -> None:
    """Let PyTorch take no more than this of the GPU."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 1e9 / total))


def training_point(model: Path, folder: Path, task: str, tokens: int, flags: list[str]) -> dict[str, Any]:
    """Return peaks, estimate and speed of a few steps of one trainer's script, at 1 x `tokens` tokens, a quarter of
    which are the answer. "loaded" has the peaks of loading, the others are of training."""
    from transformers import AutoTokenizer

    target, result = folder / f"{task}_{tokens}", {}
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(model))
    save_rows(folder / f"{task}_{tokens}.jsonl", task, make_rows(encoder, 2 * STEPS, tokens, tokens // 4))
    argv = ["--student", model, "--data", folder / f"{task}_{tokens}.jsonl", "--save_dir", target, "--overwrite"]
    argv += ["--max_steps", STEPS, "--warmup_steps", 1, "--max_length", 2 * tokens, *flags]
    load = run.load

    def timed_load(*args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        loaded = load(*args, **kwargs)
        result["load_seconds"] = round(time.monotonic() - started, 1)
        result["loaded"] = gpu_memory()
        reset_memory()
        return loaded

    reset_memory()
    with mock.patch.object(run, "load", timed_load):
        status = SCRIPTS[task].main([str(flag) for flag in argv])
    record = read_json(target / "run.json")
    peak, estimate = gpu_memory(), record["memory"]["estimated_gb"]
    result |= peak | {"status": status, "estimate_gb": estimate}
    if peak["reserved_gb"]:
        result["estimate_vs_in_use"] = round(estimate / peak["in_use_gb"], 3)
        result["context_gb"] = round(peak["in_use_gb"] - torch.cuda.memory_reserved() / 1e9, 3)
    seconds = record["metrics"]["train_runtime"]
    flags_used = {key: record["flags"][key] for key in ("batch_size", "grad_accum", "gradient_checkpointing")}
    examples = STEPS * flags_used["batch_size"] * flags_used["grad_accum"]
    result |= {"flags": flags_used, "examples_per_second": round(examples / seconds, 2)}
    result |= {"seconds": round(seconds, 1), "loss": record["metrics"]["train_loss"]}
    shutil.rmtree(target)
    return result


def training_memory(
    model: Path, folder: Path, lengths: list[int], memory_gb: float, save: Callable[[dict], None], extra: list[str]
) -> dict[str, Any]:
    """Return {"sft 1024": figures, ...} of all points in the order of value; `save` gets them after each point."""
    result: dict[str, Any] = {"memory_gb": memory_gb, "in_use_before": gpu_memory()}
    limit_memory(memory_gb)
    fixed = ["--batch_size", "1", "--grad_accum", "2", "--gradient_checkpointing", "on"]
    ways = {"on": fixed, "auto": ["--batch_size", "auto"]}  # auto: the most that fits, in the recipe's steps
    points = [(task, tokens, "on") for tokens in lengths for task in SCRIPTS]
    points.insert(len(SCRIPTS), ("kd", lengths[0], "auto"))
    for task, tokens, way in points:
        name, started = f"{task} {tokens}" + (" auto" if way == "auto" else ""), time.monotonic()
        flags = [*ways[way], "--max_memory_gb", str(memory_gb), "--compute_dtype", "bfloat16", *extra]
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where the trainers log their steps
                result[name] = training_point(model, folder, task, tokens, flags)
        except Exception as error:
            result[name] = {"error": traceback.format_exc()[-3000:], **gpu_memory()}
            traceback.clear_frames(error.__traceback__)  # they hold the model
        result[name]["wall_seconds"] = round(time.monotonic() - started, 1)
        save(result)
    return result
