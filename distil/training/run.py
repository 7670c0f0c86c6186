"""A training from its plan to its run folder: arguments for the Trainer, checkpoints and resume, run.json last."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from common import InputError, PromptEncoder, compute_dtype, lora_config
from distil import runs, workarounds
from distil.cards import answer_kind, write_card
from distil.files import write_json
from distil.models import ModelRef, load, model_fingerprint
from distil.processes import print_note, rank_and_world
from distil.splits import recorded
from distil.support import lora_targets
from distil.tasks import PROMPTS, TASK_FILE, Task, document_record, model_task, shared_task, task_of
from distil.training.curve import Records, plot_curve
from distil.training.data import RowSizes, TrainingData
from distil.training.flags import TrainOptions
from distil.training.hub import create_repository, push
from distil.training.memory import check_memory, fit_to_memory, targets_of
from distil.training.validation import read_validation, watch

# Flags that do not decide a run's result: a resumed run may have others.
_FREE_FLAGS = {"resume", "overwrite", "dry_run", "debug", "report_to", "max_memory_gb", "save_dir", "save_steps"}
# With validation `run_settings` has its own.
_FREE_FLAGS |= {"push_to_hub", "val_data", "eval_steps", "early_stopping"}


def plan_and_train(
    method: str,
    options: TrainOptions,
    ref: ModelRef,
    data: TrainingData,
    sizes: RowSizes,
    encoder: PromptEncoder,
    build: Callable[..., Any],
) -> int:
    """Fit the options to the memory, then train and save the adapter, or print the plan (--dry_run); return the exit
    status. encoder: of the student; build(options, model, tokenizer): returns the trainer. Raises InputError where the
    run cannot fit."""
    task = task_of_run(ref, data)
    options, estimate = fit_to_memory(ref, options, sizes)
    short = (steps := step_count(options, len(data.rows))) < options.eval_steps
    if options.early_stopping and steps <= (options.early_stopping + 1) * options.eval_steps:
        print_note(f"--early_stopping {options.early_stopping} cannot stop a run of {steps} steps: lower --eval_steps")
    if not short or options.val_data != "auto" or options.early_stopping:
        trained = {row.get("input") or row.get("prompt") for row in data.rows}
        found = read_validation(options, encoder, data.file, data.note, task, trained)
        data = replace(data, validation=found)
    if options.dry_run:
        return print_plan(options, ref, data, sizes, estimate)
    check_memory(ref, options, estimate)
    repository = create_repository(options.push_to_hub) if options.push_to_hub else None
    trainer = build(options, *load(ref, options.load, trainable=True))
    if data.validation:
        watch(trainer, data.validation, options.eval_steps, options.early_stopping)
    train_and_save(trainer, method, options, ref, data, estimate, task)
    return push(options.save_dir, repository) if repository and not rank_and_world()[0] else 0


def trainer_arguments(options: TrainOptions) -> dict[str, Any]:
    """Return the keyword arguments that SFTConfig and DPOConfig share."""
    same = ("learning_rate", "warmup_steps", "seed", "save_steps", "report_to")
    return {name: getattr(options, name) for name in same} | {
        "output_dir": str(Path(options.save_dir) / "checkpoints"),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.grad_accum,
        "gradient_checkpointing": options.gradient_checkpointing == "on",
        "optim": options.optimizer,
        "logging_steps": min(10, options.max_steps or 10),  # the last step of a short run too
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would show the mean of earlier losses in place of a loss that is NaN
        "save_total_limit": 2,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every adapter takes part in every forward
        "bf16": compute_dtype(options.compute_dtype) == torch.bfloat16,
        "dataloader_pin_memory": False,  # pinned memory is scarce under WSL2
        "remove_unused_columns": False,
        "max_length": None,  # rows that are too long were refused: cutting would cut the answer
    }


def adapter_trainer(
    build: Callable[..., Any], config: Any, options: TrainOptions, model: Any, tokenizer: Any, dataset: Dataset
) -> Any:
    """Return the trainer that `build`, a class of TRL's, makes for a model. Adapters, or a new one, are float32."""
    workarounds.compute_fused_head_where_supervised()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
    scale, lora = (options.lora_r, options.lora_alpha, options.lora_dropout), None
    if not weights:
        lora = lora_config(*scale, lora_targets(model, options.lora_targets))
    if config.n_gpu > 1:  # without a launcher; the Trainer would copy a 4-bit model to all of them, and fail
        print_note(f"one of {config.n_gpu} visible GPUs is used; docs/distributed.md has the launcher for all")
        config._n_gpu = 1
    trainer = build(model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    trainer._get_train_sampler = lambda *_: RowOrder(trainer, options, dataset)
    workarounds.adapters_to_float32(trainer.model, weights)
    return trainer


class RowOrder(torch.utils.data.Sampler):
    """Row numbers in an order that seed and epoch alone decide, so that a resumed run sees the rows that are left.
    The Trainer's own order of grouped rows follows from all that was drawn before, and in several processes its
    sampler does not hear of the epoch that a run is resumed in."""

    def __init__(self, trainer: Any, options: TrainOptions, dataset: Dataset):
        self.trainer, self.options, self.rows = trainer, options, len(dataset)
        grouped = trainer.args.train_sampling_strategy == "group_by_length"
        self.lengths = [len(ids) for ids in dataset["input_ids"]] if grouped else None

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        options = self.options
        epoch = self.trainer.state.global_step // steps_per_epoch(options, self.rows)
        drawn = torch.Generator().manual_seed(options.seed + epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=drawn).tolist())
        return iter(get_length_grouped_indices(self.lengths, options.batch_size * options.grad_accum, generator=drawn))


def steps_per_epoch(options: TrainOptions, rows: int) -> int:
    """Return the optimiser steps of an epoch; the processes of a launcher share the rows."""
    return math.ceil(math.ceil(rows / (options.batch_size * rank_and_world()[1])) / options.grad_accum)


def step_count(options: TrainOptions, rows: int) -> int:
    """Return the optimiser steps of the run."""
    return options.max_steps or math.ceil(steps_per_epoch(options, rows) * options.epochs)


def run_settings(options: TrainOptions, ref: ModelRef, data: TrainingData) -> dict[str, Any]:
    """Return what decides a run's result: flags, content of data and model, processes (they share rows), machine."""
    settings = {name: value for name, value in asdict(options).items() if name not in _FREE_FLAGS}
    own = {"eval_steps": options.eval_steps, "early_stopping": options.early_stopping}
    settings["validation"] = data.validation and own | {"sha256": data.validation.sha256}
    settings |= {"data_sha256": data.sha256, "processes": rank_and_world()[1], "model": model_fingerprint(ref)}
    return settings | runs.conditions(options.compute_dtype)


def train_and_save(
    trainer: Any,
    method: str,
    options: TrainOptions,
    ref: ModelRef,
    data: TrainingData,
    estimate: dict[str, float],
    task: Task | None,
) -> None:
    """Train (from the last complete checkpoint with --resume), then write the adapter folder, run.json last.
    What --overwrite replaces is complete until then. Raises InputError where --resume would change settings."""
    save_dir = Path(options.save_dir)
    main, wait = trainer.accelerator.is_main_process, trainer.accelerator.wait_for_everyone
    if options.overwrite and main:
        shutil.rmtree(save_dir / "checkpoints", ignore_errors=True)
    workarounds.refuse_kernels_without_gradient()
    if options.warmup_steps >= (steps := step_count(options, len(data.rows))):
        all_steps = f"all {steps} steps are warm-up (--warmup_steps {options.warmup_steps})"
        print_note(f"{all_steps}: the learning rate never reaches {options.learning_rate:g}")
    wait()  # of several processes the first removes what is old or half written; the others look when it has
    settings = run_settings(options, ref, data)
    facts = run_facts(method, options, ref, data)  # of the model that was loaded: its files may change meanwhile
    if options.resume:
        runs.check_settings(save_dir, settings)
    if main:
        runs.write_settings(save_dir, settings)
    with trainer.accelerator.main_process_first():
        checkpoint = runs.last_checkpoint(save_dir) if options.resume else None
    if options.resume and not checkpoint and main:
        print(f"{save_dir}: no checkpoint yet, training starts at the beginning", file=sys.stderr)
    trainer.add_callback(records := Records())
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if bar := getattr(callback, "training_bar", None):
                bar.close()  # it would be drawn once more, below the message
        raise
    wait()  # the others may still read the best checkpoint, which the first removes
    if not main:
        return
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = dict(history[-1])
    ends = {"steps": last.pop("step"), "last_loss": last.pop("loss")}
    metrics = result.metrics | last | ends
    spans = pairwise([{"step": 0}, *history])
    total = sum(entry["loss"] * (entry["step"] - before["step"]) for before, entry in spans)
    metrics["train_loss"] = total / metrics["steps"]  # the Trainer's is of the steps since a resume
    if best := trainer.state.best_global_step:
        metrics |= {"best_step": best, f"best_{data.validation.metric}": trainer.state.best_metric}
    seconds, memory = round(time.monotonic() - records.started, 1), runs.peak_memory()
    run = facts | {"metrics": metrics, "wall_seconds": seconds}
    run["resumed_from"] = checkpoint and Path(checkpoint).name
    run["memory"] = memory | {"estimated_gb": round(estimate["total"], 2)}
    write_run(trainer, save_dir, run, history, task)
    files = f"{save_dir}: adapter, tokenizer, run.json and training_curve.png written"
    peak = f"peak memory {memory['peak_gb']:.2f} GB ({memory['device']})"
    kept = f" (kept: the adapter of step {best}, the best)" if best else ""
    print(f"{files}; {metrics['steps']} steps{kept} in {seconds / 60:.1f} min, {peak}", file=sys.stderr)


def run_facts(method: str, options: TrainOptions, ref: ModelRef, data: TrainingData) -> dict[str, Any]:
    """Return what run.json records apart from results: where the adapter comes from, with which flags and versions."""
    facts = {"method": method, "base_model": ref.base, "flags": asdict(options), "prompts": PROMPTS}
    facts["base_fingerprint"] = model_fingerprint(ModelRef(ref.base, ref.base, ref.path))
    facts["data"] = {"file": data.file, "sha256": data.sha256, "rows": len(data.rows)}
    if val := data.validation:
        facts["validation"] = {"file": val.file, "sha256": val.sha256, "rows": len(val.rows)}
    answer = next(data.rows[0][name] for name in ("output", "teacher_output", "chosen") if name in data.rows[0])
    facts["documents"] = data.note.get("documents", document_record(ref) if ref.adapter else None)
    facts |= {"answers": answer_kind(answer), "lora_targets": targets_of(ref, options)}
    facts |= data.origin().record | {"split_seed": options.split_seed, "seed": options.seed}
    facts |= {"packages": runs.package_versions(), "machine": runs.machine()}
    return facts | {"processes": rank_and_world()[1]}


def task_of_run(ref: ModelRef, data: TrainingData) -> Task | None:
    """Return the label task that the adapter is trained for, from the note of its data, or else from the model that
    training starts from; None for another task. Raises InputError where an adapter to continue from has another, or
    an export the same rows in another split."""
    noted = data.note.get("task")
    task = task_of(noted, f"the note of {data.file}") if noted else None
    if task and data.start and not ref.adapter and (before := model_task(ref)) and before.split != task.split:
        parts = recorded(data.file, data.note).sources, data.start.sources
        if set.intersection(*({source.get("sha256") for source in part if source} for part in parts)):
            other = "another group_column or validation_share: its training rows may be validation rows now"
            raise InputError(f"{ref.name}: was trained on the raw rows of {data.file} with {other}; use one split")
    return shared_task([ref], task, data.file) if ref.adapter or not task else task


def write_run(trainer: Any, save_dir: Path, run: dict[str, Any], history: list[dict], task: Task | None) -> None:
    """Write the run's files next to its checkpoints, move them into place, run.json last, remove the checkpoints."""
    done = save_dir / "checkpoints" / "done"
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = run["base_model"]  # the user's name, not a path
    model.save_pretrained(done, selected_adapters=["default"], save_embedding_layers=False)
    trainer.processing_class.save_pretrained(done)
    shutil.copymode(done / "adapter_config.json", done / "adapter_model.safetensors")  # nobody else could read it
    write_json(done / "training_curve.json", history)
    plot_curve(done / "training_curve.png", history, f"{save_dir.name} ({run['method']})")
    write_card(done, save_dir.name, run, task and task.record)  # in place of PEFT's, with this machine's paths
    write_json(done / "run.json", run)
    if record := task.record if task else run["documents"]:
        write_json(done / TASK_FILE, record | PROMPTS)
    for name in ("run.json", "calibration.json", "confidence.json", TASK_FILE):  # of the run that this one replaces
        (save_dir / name).unlink(missing_ok=True)
    for path in sorted(done.iterdir(), key=lambda path: path.name == "run.json"):
        path.replace(save_dir / path.name)  # needs no room on a full disk
    shutil.rmtree(save_dir / "checkpoints", ignore_errors=True)


def print_plan(
    options: TrainOptions, ref: ModelRef, data: TrainingData, sizes: RowSizes, estimate: dict[str, float]
) -> int:
    """Print what --dry_run reports and return its exit status: 2 where the run would be refused."""
    tokens, rows, gb = sum(sizes.lengths), len(sizes.lengths), {k: f"{v:.2f}" for k, v in estimate.items()}
    kinds = ("weights", "adapter", "gradients", "optimiser", "activations", "logits", "libraries")
    print(f"rows                 {rows} from {options.data}")
    print(f"tokens               {tokens} in an epoch; {tokens / rows:.0f} a sequence, longest {max(sizes.lengths)}")
    print(f"steps                {step_count(options, rows)} of {options.batch_size} x {options.grad_accum} rows")
    if val := data.validation:
        times = f"{math.ceil(step_count(options, rows) / options.eval_steps)} times, every {options.eval_steps} steps"
        stop = f", until {options.early_stopping} have no better {val.metric}" if options.early_stopping else ""
        print(f"validation           {len(val.rows)} rows of {val.file}, {times} and at the end{stop}")
    print(f"gradient checkpoints {options.gradient_checkpointing}")
    print(f"learning rate        {options.learning_rate:g}, linear decay after {options.warmup_steps} warm-up steps")
    targets = targets_of(ref, options)
    places = targets if isinstance(targets, str) else ", ".join(targets)
    lora = f"LoRA r={options.lora_r} on {places}, float32"
    print(f"trainable parameters {int(estimate['trainable_parameters']):,} ({lora})")
    print(f"estimated memory     {gb['total']} GB ({', '.join(f'{kind} {gb[kind]}' for kind in kinds)})")
    print(f"would write          {options.save_dir}")
    checks: list[tuple] = [(runs.claim_run_dir, options.save_dir, options.overwrite, options.resume)]
    checks += [(check_memory, ref, options, estimate)]
    if options.resume:
        checks += [(runs.check_settings, options.save_dir, run_settings(options, ref, data))]
    status = 0
    for check, *arguments in checks:
        try:
            check(*arguments)
        except InputError as error:
            print(f"would be refused     {error}")
            status = 2
    return status
