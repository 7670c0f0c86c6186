"""Compare examples per second and peak memory of sft_train.py and dpo_train.py with TRL's command line.

Each run is a separate process (`sft_train.py` or `trl sft`, `dpo_train.py` or `trl dpo`), and they take turns. Both
have the same base in the same precision, LoRA, rows in the same order, tokens, batch, optimiser, learning rate and
seed. TRL gets the finished prompt as plain text, which it tokenises to the ids that our prompts have. The clock runs
from the log line of the first step to that of the last, so that loading, tokenising and the first step are left out;
memory is the largest resident set of the process, loading included (not that of a GPU). "loss_difference" is the
largest between the logged losses, and "loss_fell" how much ours fell.

    python -m bench.train --quick
    python -m bench.train --steps 60 --repeats 3 --json > train.json
"""

from __future__ import annotations

import argparse
import ast
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.report import report
from common import InputError, PromptEncoder, dtype_name, lora_config
from distil.cli import new_parser, run_script
from distil.creditmix.rows import read_rows
from distil.files import write_jsonl
from distil.models import local_or_hub
from distil.tasks import default_task

TASK = default_task()
ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = {"sft": 1e-3, "dpo": 1e-4}  # the recipe for small students
LOG_EVERY = 10  # steps; our trainers log the first step and then as often as this


@dataclass(frozen=True)
class Setup:
    """What both trainings of a round share."""

    student: str
    quantization: str
    compute_dtype: str
    steps: int
    batch_size: int
    grad_accum: int
    seed: int


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--student", default="smollm2-135m", help="base model (%(default)s)")
    add("--data", default=str(ROOT / "data/creditmix_dataset.json"), help="raw rows (%(default)s)")
    add("--methods", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"], help="(sft dpo)")
    add("--steps", type=int, default=40, help=f"optimiser steps of a run, a multiple of {LOG_EVERY} (%(default)s)")
    add("--repeats", type=int, default=3, help="rounds, in which the two take turns (%(default)s)")
    add("--batch_size", type=int, default=16, help="rows a forward; pairs for DPO are half as many (%(default)s)")
    add("--grad_accum", type=int, default=1, help="forwards a step (%(default)s)")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the frozen base, in both (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="in both (%(default)s)")
    add("--seed", type=int, default=0, help="of adapter and row order (%(default)s)")
    add("--plot", default="runs/bench/train.png", help="where the loss curves are drawn (%(default)s)")
    add("--quick", action="store_true", help=f"{LOG_EVERY} steps, two rounds")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def write_data(rows: list, encoder: PromptEncoder, folder: Path) -> None:
    """Write our rows to <folder>/<method>.jsonl and the same rows for TRL to <folder>/<method>/train.jsonl.

    Raises InputError where TRL would make other tokens of a prompt than we do."""
    ours: dict[str, list[dict]] = {"sft": [], "dpo": []}
    theirs: dict[str, list[dict]] = {"sft": [], "dpo": []}
    for row in rows:
        prompt = TASK.prompt(row.features)
        text = encoder._render(prompt)
        wrong = TASK.labels[(TASK.labels.index(row.label) + 1) % len(TASK.labels)]
        joint = encoder.tokenizer(text + row.label + encoder.end_of_turn, add_special_tokens=False)["input_ids"]
        if joint != encoder.prompt(prompt) + encoder.completion(row.label):
            raise InputError(f"TRL's tokens are not ours for {prompt[:60]!r}; compare with another model")
        ours["sft"].append({"input": prompt, "output": row.label})
        ours["dpo"].append({"prompt": prompt, "chosen": row.label, "rejected": wrong})
        theirs["sft"].append({"prompt": text, "completion": row.label + encoder.end_of_turn})
        answers = {"chosen": row.label + encoder.end_of_turn, "rejected": wrong + encoder.end_of_turn}
        theirs["dpo"].append({"prompt": text, **answers})
    for method in ours:
        write_jsonl(folder / f"{method}.jsonl", ours[method])
        write_jsonl(folder / method / "train.jsonl", theirs[method])


def our_command(setup: Setup, method: str, folder: Path, output: Path) -> list[str]:
    """Return the command of this project's trainer."""
    return [
        *(sys.executable, str(ROOT / f"{method}_train.py"), "--student", setup.student, "--save_dir", str(output)),
        *("--data", str(folder / f"{method}.jsonl"), "--quantization", setup.quantization, "--lora_dropout", "0"),
        *("--compute_dtype", setup.compute_dtype, "--gradient_checkpointing", "off", *shared_flags(setup, method)),
        *("--batch_size", str(batch_of(setup, method)), "--grad_accum", str(setup.grad_accum)),
        *(("--sft_weight", "0") if method == "dpo" else ()),  # TRL's has none
    ]


def trl_command(setup: Setup, method: str, folder: Path, output: Path) -> list[str]:
    """Return the command of TRL's trainer."""
    import torch

    config = lora_config(dropout=0.0)
    flags = {
        **{"model_name_or_path": local_or_hub(setup.student), "dataset_name": folder / method, "output_dir": output},
        **{"dtype": setup.compute_dtype, "bf16": setup.compute_dtype == "bfloat16"},
        **{"use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": False},
        **{"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout},
        **{"per_device_train_batch_size": batch_of(setup, method), "gradient_accumulation_steps": setup.grad_accum},
        **{"gradient_checkpointing": False, "optim": "adamw_torch", "lr_scheduler_type": "linear"},
        **{"logging_steps": LOG_EVERY, "logging_first_step": True, "save_strategy": "no", "report_to": "none"},
    }
    start = [sys.executable, "-c", "from trl.cli import main; main()"]  # what the command `trl` does
    command = [*start, method, "--use_peft", *shared_flags(setup, method)]
    if setup.quantization == "nf4":
        command += ["--load_in_4bit", "--use_bnb_nested_quant"]
    command += ["--lora_target_modules", *sorted(config.target_modules)]
    return command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def shared_flags(setup: Setup, method: str) -> list[str]:
    """Return the flags that both have under one name."""
    values = {"learning_rate": LEARNING_RATE[method], "warmup_steps": min(5, setup.steps // 2)}
    values |= {"max_steps": setup.steps, "seed": setup.seed} | ({"beta": 0.1} if method == "dpo" else {})
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def batch_of(setup: Setup, method: str) -> int:
    """Return the rows a forward; a pair counts as two."""
    return setup.batch_size if method == "sft" else max(1, setup.batch_size // 2)


def train(command: list[str], threads: int) -> dict:
    """Return {"seconds": first to last log line, "peak_gb", "loss": [of each log line]} of a training process."""
    # `trl` goes through `accelerate launch`, which would take one thread by default.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    times, losses = [], []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=ROOT)
        for line in process.stdout:
            if line.strip().startswith("{") and "'loss'" in line:
                times.append(time.perf_counter())
                losses.append(float(ast.literal_eval(line.strip())["loss"]))
        _, status, usage = os.wait4(process.pid, 0)  # the largest of it and of the processes that it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or len(times) < 2:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:3])} ... failed: {log.read()[-1500:]}")
    return {"seconds": times[-1] - times[0], "peak_gb": usage.ru_maxrss * 1024 / 1e9, "loss": losses}


def plot_losses(path: Path, curves: dict[str, dict]) -> None:
    """Draw the losses of both trainers, a panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    for axis, (method, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axis.plot(curve["steps"], curve["ours"], marker="o", label=f"{method}_train.py")
        axis.plot(curve["steps"], curve["trl"], marker="x", linestyle="--", label=f"trl {method}")
        axis.set(xlabel="optimiser step", ylabel="training loss", title=method.upper())
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    steps, repeats = (LOG_EVERY, 2) if args.quick else (args.steps, args.repeats)
    if steps < LOG_EVERY or steps % LOG_EVERY:
        raise InputError(f"--steps {steps}: a multiple of {LOG_EVERY}, the steps between log lines")
    import torch
    from transformers import AutoTokenizer

    batch, dtype = (args.batch_size, args.grad_accum), dtype_name(args.compute_dtype)
    setup = Setup(args.student, args.quantization, dtype, steps, *batch, args.seed)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(local_or_hub(args.student)))
    rows = read_rows(args.data, TASK)[0][: steps * args.batch_size * args.grad_accum]
    result = asdict(setup) | {"repeats": repeats, "threads": torch.get_num_threads()}
    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_data(rows, encoder, Path(scratch))
        for method in args.methods:
            runs: dict[str, list[dict]] = {"ours": [], "trl": []}
            for turn in range(repeats):
                for name, command in (("ours", our_command), ("trl", trl_command)):
                    print(f"{method}: {name}, round {turn + 1} of {repeats}", file=sys.stderr)
                    words = command(setup, method, Path(scratch), Path(scratch) / f"{method}_{name}_{turn}")
                    runs[name].append(train(words, torch.get_num_threads()))
            examples = (steps - 1) * batch_of(setup, method) * args.grad_accum
            ratios = [t["seconds"] / o["seconds"] for o, t in zip(runs["ours"], runs["trl"], strict=True)]
            result[f"{method}_vs_trl"] = round(statistics.median(ratios), 3)
            result[f"{method}_vs_trl_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
            peak = {name: max(run["peak_gb"] for run in runs[name]) for name in runs}
            result[f"{method}_memory_vs_trl"] = round(peak["ours"] / peak["trl"], 3)
            for name, key in (("ours", method), ("trl", f"{method}_trl")):
                seconds = statistics.median(run["seconds"] for run in runs[name])
                result[f"{key}_examples_per_second"] = round(examples / seconds, 2)
                result[f"{key}_peak_gb"] = round(peak[name], 3)
                result[f"{key}_final_loss"] = runs[name][0]["loss"][-1]
            logged = [1, *range(LOG_EVERY, steps + 1, LOG_EVERY)]
            curves[method] = {"steps": logged, **{name: runs[name][0]["loss"] for name in runs}}
            ours, theirs = curves[method]["ours"], curves[method]["trl"]
            difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
            result[f"{method}_loss_difference"] = round(difference, 4)
            result[f"{method}_loss_fell"] = round(ours[0] - min(ours), 4)
            result[f"{method}_loss"] = curves[method]
    plot_losses(Path(args.plot), curves)
    result["plot"] = args.plot
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
