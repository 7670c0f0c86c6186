"""Compare a GPU's numbers with the CPU's on tiny random models: scores, training steps, constrained decoding.

`figures` computes everything on the device that torch sees. `compare` calls it here and in a process that sees no GPU,
on the same weights and rows. In float32 the two differ by the order of additions alone; NF4 adds the rounding of the
scales, and bfloat16 its own, so these have wider limits (LIMITS).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import dpo_train
import kd_train
import sft_train
from common import LabelScorer, PromptEncoder
from distil.files import read_json, write_json, write_jsonl
from distil.idp.decoder import JsonDecoder
from distil.idp.schema import compile_schema
from distil.scoring import FastLabelScorer
from distil.tasks import default_task
from distil.testing import ROOT, build_tokenizer, load_named, save_adapter, save_random_model

TASK = default_task()

# Largest difference between GPU and CPU: of raw scores (natural log), losses, and LoRA weights relative to the largest
# change of one. The CPU computes in float32; _bfloat16 is the GPU's default against that.
LIMITS = {
    "scores_none_float32": 1e-3,
    "scores_nf4_float32": 1e-2,
    "scores_nf4_bfloat16": 1.5,
    "adapter_scores_nf4_float32": 1e-2,
    "fast_scores_none_float32": 1e-3,
    "loss_none_float32": 1e-3,
    "loss_nf4_float32": 1e-2,
    "loss_nf4_bfloat16": 0.3,
    "weights_none_float32": 1e-2,
    "weights_nf4_float32": 5e-2,
}
PRECISIONS = (("none", "float32"), ("nf4", "float32"), ("nf4", "bfloat16"))
TRAINERS = {"sft": sft_train, "kd": kd_train, "dpo": dpo_train}
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "string", "maxLength": 6}, "total": {"type": "integer", "maximum": 99}},
    "required": ["number", "total"],
    "additionalProperties": False,
}


def prepare(folder: Path) -> None:
    """Write a tiny model, an adapter and training rows that both devices read."""
    tokenizer = build_tokenizer()
    save_random_model(folder / "model", tokenizer, "qwen2")
    save_adapter(folder / "adapter", str(folder / "model"))
    turns = [TASK.prompt(f"Age: {20 + i}.0, Outstanding Debt: {100 * i * i}.5") for i in range(8)]
    answers, worse = [TASK.labels[i % 3] for i in range(8)], [TASK.labels[(i + 1) % 3] for i in range(8)]
    shares = {"Good": 0.5, "Standard": 0.3, "Bad": 0.2}
    rows = list(zip(turns, answers, worse, strict=True))
    write_jsonl(folder / "sft.jsonl", [{"input": turn, "output": good} for turn, good, _ in rows])
    teacher = [{"input": turn, "teacher_output": good, "label_probs": shares} for turn, good, _ in rows]
    write_jsonl(folder / "kd.jsonl", teacher)
    pairs = [{"prompt": turn, "chosen": good, "rejected": bad} for turn, good, bad in rows]
    write_jsonl(folder / "dpo.jsonl", pairs)
    write_json(folder / "turns.json", turns)


def scores(folder: Path, name: str, quantization: str, dtype: str, fast: bool = False) -> list:
    """Return raw scores [rows, labels] of a model in `folder`."""
    model, tokenizer = load_named(str(folder / name), quantization, dtype)
    turns, forms = read_json(folder / "turns.json"), {label: [label] for label in TASK.labels}
    encoder = PromptEncoder(tokenizer)
    if fast:
        return FastLabelScorer(model, encoder, forms, batch_size=4, shared_by=turns).raw_scores(turns).tolist()
    return LabelScorer(model, encoder, forms, batch_size=4).raw_scores(turns).tolist()


def steps(folder: Path, method: str, quantization: str, dtype: str, checkpointing: str) -> dict[str, list]:
    """Return the losses of four steps of a trainer's script, run with SGD (Adam hides a wrong scale) from the fixed
    adapter where the script can continue from one, and the adapter's weights after them, in one row."""
    from safetensors.numpy import load_file

    device = "gpu" if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"
    target = folder / f"{device}_{method}_{quantization}_{dtype}_{checkpointing}"
    start = ["--adapter", folder / "adapter"] if method == "dpo" else ["--student", folder / "model"]
    argv = [*start, "--data", folder / f"{method}.jsonl", "--save_dir", target, "--quantization", quantization]
    argv += ["--compute_dtype", dtype, "--max_steps", 4, "--warmup_steps", 0, "--batch_size", 4, "--grad_accum", 1]
    argv += ["--optimizer", "sgd", "--learning_rate", 0.05, "--gradient_checkpointing", checkpointing, "--overwrite"]
    if method != "dpo":
        argv += ["--lora_dropout", 0]
    argv += ["--max_memory_gb", 8]
    if status := TRAINERS[method].main([str(flag) for flag in argv]):
        raise RuntimeError(f"{method}_train.py ended with status {status}")
    losses = [entry["loss"] for entry in read_json(target / "training_curve.json")]
    weights = load_file(target / "adapter_model.safetensors")
    return {"loss": losses, "weights": np.concatenate([weights[name].ravel() for name in sorted(weights)]).tolist()}


def decode(folder: Path, dtype: str) -> list[str]:
    """Return the documents that the tiny model writes under a schema."""
    decoder = JsonDecoder(*load_named(str(folder / "model"), "nf4", dtype))
    grammar = compile_schema(SCHEMA, decoder.grammar_tokenizer)
    encoder = PromptEncoder(decoder.tokenizer)
    prompts = [encoder.prompt(text) for text in ("Invoice 7, total 12", "Invoice 8, a longer text, total 5")]
    return [draft.text or "" for draft in decoder.generate(prompts, [grammar] * 2, 48)]


def figures(folder: Path) -> dict[str, Any]:
    """Return all results of this process's device by name; a part that fails has its traceback in "errors"."""
    import torch

    result: dict[str, Any] = {"device": "cuda" if torch.cuda.is_available() else "cpu", "errors": {}}

    def run(name: str, work: Any, *arguments: Any) -> None:
        try:
            result[name] = work(folder, *arguments)
        except Exception:
            result["errors"][name] = traceback.format_exc()[-3000:]

    for precision in PRECISIONS:
        run(f"scores_{'_'.join(precision)}", scores, "model", *precision)
    run("fast_scores_none_float32", scores, "model", "none", "float32", True)
    run("adapter_scores_nf4_float32", scores, "adapter", "nf4", "float32")
    run("decode_nf4_float32", decode, "float32")
    run("decode_nf4_bfloat16", decode, "bfloat16")
    for method in TRAINERS:
        for precision in PRECISIONS:
            run(f"{method}_{'_'.join(precision)}", steps, method, *precision, "off")
        run(f"{method}_checkpointed_nf4_float32", steps, method, "nf4", "float32", "on")
    return result


def compare(folder: Path) -> dict[str, Any]:
    """Return {"differences": {name: number}, "failed": names above their limit, "errors": tracebacks by device}."""
    prepare(folder)
    command = [sys.executable, "-m", "bench.gpu_equality", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(folder / "cpu.log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        with contextlib.redirect_stdout(sys.stderr):  # where the trainers log their steps
            here = figures(folder)
        if process.wait():
            log.seek(0)
            return {"here": here, "errors": {"cpu": {"process": log.read()[-3000:]}, "here": here["errors"]}}
    cpu = json.loads((folder / "cpu.json").read_text())
    result: dict[str, Any] = {"here": here["device"], "reference": cpu["device"], "differences": {}, "failed": []}
    result["errors"] = {"cpu": cpu.pop("errors"), "here": here.pop("errors")}
    for name in sorted(set(here) & set(cpu) - {"device"}):
        # The CPU's float32 is the reference of the GPU's bfloat16 too.
        other, precision = cpu.get(name.replace("bfloat16", "float32"), cpu[name]), "_".join(name.split("_")[-2:])
        if name.startswith("decode"):
            result["differences"][name] = sum(a != b for a, b in zip(here[name], other, strict=True))
            result[name] = here[name]
            allowed = 0 if "float32" in name else len(other)
            result["failed"] += [name] if result["differences"][name] > allowed else []
            continue
        one, two = (value if isinstance(value, dict) else {"": value} for value in (here[name], other))
        for part in one:
            a, b = np.array(one[part]), np.array(two[part])
            scale = np.abs(b).max() if part == "weights" else 1.0
            key = f"{name}_{part}".rstrip("_")
            difference = result["differences"][key] = float(np.abs(a - b).max() / scale)
            limit = LIMITS.get(f"{part}_{precision}" if part else name)
            result["failed"] += [key] if limit is not None and not difference <= limit else []
    losses = {name: value["loss"] for name, value in here.items() if isinstance(value, dict)}
    result["losses"] = {name: {"here": loss, "cpu": cpu.get(name, {}).get("loss")} for name, loss in losses.items()}
    return result


if __name__ == "__main__":
    Path(sys.argv[1], "cpu.json").write_text(json.dumps(figures(Path(sys.argv[1]))))
