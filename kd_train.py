"""Knowledge distillation (KD): imitate a teacher's answers and, where rows carry them, its label probabilities.

Rows are {"input", "teacher_output"}, optionally with "label_probs": {label: p}. Departures from the textbook: the KL
term compares teacher and student over the labels' first tokens alone, at the assistant start: no teacher is in memory.
It is summed over rows and divided by the step's supervised tokens, so it obeys gradient accumulation.

    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from typing import TYPE_CHECKING

from common import PromptEncoder
from files import InputError, number_or_auto, read_jsonl, run_script, seed_number
from models import (
    check_model_name,
    claim_run_dir,
    load_model,
    local_or_hub,
    parameter_count,
    quiet_libraries,
    student_of,
)

if TYPE_CHECKING:
    import torch

LORA = {"lora_r": 16, "lora_alpha": 32}
# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (README, "The recipe").
LARGE = {"epochs": 1.0, "learning_rate": 2e-4, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
SMALL = {"epochs": 1.0, "learning_rate": 2e-3, "batch_size": 16, "grad_accum": 1, "lora_dropout": 0.0} | LORA


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add(
        "--student",
        help="base model: hub id, local folder or smollm2-135m (default: the adapter's, or the 3B student)",
    )
    add("--adapter", help="adapter folder to go on from, such as runs/creditmix_sft (default: a new adapter)")
    add(
        "--data",
        default="data/creditmix_kd.jsonl",
        help='JSONL of {"input", "teacher_output"}, optional "label_probs" (%(default)s)',
    )
    add("--save_dir", default="runs/creditmix_kd", help="adapter folder to write (%(default)s)")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the frozen base (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type=float,
        help=f"passes over the data ({SMALL['epochs']:g})",
    )
    add("--max_steps", type=int, default=0, help="stop after so many optimiser steps; 0: after --epochs (%(default)s)")
    add(
        "--learning_rate",
        type=float,
        help=f"peak; {SMALL['learning_rate']:g} below 1 B parameters, else {LARGE['learning_rate']:g}",
    )
    add(
        "--warmup_steps",
        type=int,
        default=30,
        help="steps of rising learning rate before its linear decay (%(default)s)",
    )
    add(
        "--batch_size",
        type=number_or_auto,
        help=f"rows a forward; {SMALL['batch_size']} below 1 B parameters, else {LARGE['batch_size']}; auto: "
        "the most that fit the memory, for the same rows a step",
    )
    add(
        "--grad_accum",
        type=int,
        help=f"forwards a step; {SMALL['grad_accum']} below 1 B parameters, else {LARGE['grad_accum']}; with "
        "--batch_size auto: rows a step",
    )
    add("--max_length", type=int, default=1024, help="tokens; longer rows are refused, not cut (%(default)s)")
    add("--optimizer", choices=("adamw_torch", "adamw_8bit", "sgd"), default="adamw_torch", help="(%(default)s)")
    add(
        "--gradient_checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="recompute activations to save memory; auto: where it does not fit without (%(default)s)",
    )
    add = parser.add_argument_group("distillation").add_argument
    add("--kd_alpha", type=float, default=0.9, help="share of KL(teacher || student) in the loss, 0..1 (%(default)s)")
    add(
        "--kd_temperature",
        type=float,
        default=1.0,
        help="softens both distributions; KL times its square (%(default)s)",
    )
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_r", type=int, help=f"rank ({SMALL['lora_r']})")
    add("--lora_alpha", type=int, help=f"scale is alpha / r ({SMALL['lora_alpha']})")
    add(
        "--lora_dropout",
        type=float,
        help=f"{SMALL['lora_dropout']:g} below 1 B parameters, else {LARGE['lora_dropout']:g}",
    )
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed_number, default=0, help="of adapter initialisation, row order and dropout (%(default)s)")
    add("--split_seed", type=int, help="the split the data was prepared with (default: as noted beside it)")
    add("--save_steps", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint of a killed run")
    add("--overwrite", action="store_true", help="replace a run that is in --save_dir")
    add("--report_to", default="none", help="none, tensorboard, wandb ... as transformers takes it (%(default)s)")
    add("--max_memory_gb", type=float, help="memory a run may need by estimate (default: what is free)")
    add("--dry_run", action="store_true", help="print rows, tokens, steps, parameters and memory, then stop")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def check_label_probs(rows: list[dict], source: str) -> list[str]:
    """The labels of the rows' `label_probs`, in one order; each row's is replaced by a list of probabilities.

    Raises InputError where some rows have them and some not, labels differ, or they are no probabilities."""
    if not any("label_probs" in row for row in rows):
        return []
    labels = list(rows[0].get("label_probs") or {})
    for number, row in enumerate(rows, 1):
        probs = row.get("label_probs")
        if not isinstance(probs, dict) or len(labels) < 2 or set(probs) != set(labels):
            raise InputError(
                f'{source}: row {number}: "label_probs" with labels {labels} needed in every row or in none'
            )
        values = [probs[label] for label in labels]
        if any(type(p) not in (int, float) or not 0 <= p <= 1 for p in values) or abs(sum(values) - 1) > 0.01:
            raise InputError(f'{source}: row {number}: "label_probs" are no probabilities that add up to 1: {probs}')
        row["label_probs"] = [float(p) for p in values]
    return labels


def distillation_loss_sum(
    logits: torch.Tensor, batch: dict[str, torch.Tensor], label_ids: list[int], alpha: float, temperature: float
) -> torch.Tensor:
    """(1 - a) CE + a T^2 KL(teacher || student), summed over the batch (Hinton et al. 2015).

    logits: [tokens, vocabulary], float32, and batch["labels"]: [tokens], of the supervised tokens row after row;
    batch["starts"]: [batch], where among them each row's answer starts: there the KL is taken, once a row;
    batch["label_probs"]: teacher probabilities [batch, labels].
    """
    import torch

    import training

    cross_entropy = training.cross_entropy_sum(logits, batch)
    at_start = logits[batch["starts"]][:, label_ids]
    student = torch.log_softmax(at_start / temperature, dim=-1)
    teacher = torch.log_softmax(batch["label_probs"].clamp(min=1e-6).log() / temperature, dim=-1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence


def first_tokens(encoder: PromptEncoder, labels: list[str]) -> list[int]:
    """First token id of each label. Raises InputError where two labels start alike: the KL cannot tell them apart."""
    ids = [encoder.label(label)[0] for label in labels]
    if len(set(ids)) < len(ids):
        raise InputError(f"labels {labels} do not differ in their first token; leave label_probs out of the data")
    return ids


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 <= args.kd_alpha <= 1 or not 0 < args.kd_temperature < math.inf:
        raise InputError("--kd_alpha is a share from 0 to 1, --kd_temperature above 0")
    rows = read_jsonl(args.data, ("input", "teacher_output"))
    labels = check_label_probs(rows, args.data)
    if not args.dry_run:
        claim_run_dir(args.save_dir, args.overwrite, args.resume)
    student = student_of(args.student, args.adapter)
    check_model_name(student)
    path = local_or_hub(student)
    quiet_libraries()

    import training

    training.fill_defaults(args, SMALL, LARGE, parameter_count(path))
    training.check_flags(args)
    encoder = PromptEncoder(training.load_tokenizer(path))
    dataset = training.completion_dataset(rows, "teacher_output", encoder, args.max_length, args.data)
    if labels:
        dataset = dataset.add_column("label_probs", [row["label_probs"] for row in rows])
    lengths = [len(ids) for ids in dataset["input_ids"]]
    sizes = training.row_sizes(dataset)
    estimate = training.fit_to_memory(path, args, **sizes, label_probs=bool(labels))
    if args.dry_run:
        return training.print_plan(args, lengths, estimate)
    training.check_memory(estimate, args)
    loss = None
    if not labels:
        print(f"{args.data}: no label_probs, so --kd_alpha has no effect: teacher_output is imitated", file=sys.stderr)
    else:
        ids = first_tokens(encoder, labels)
        loss = functools.partial(
            distillation_loss_sum, label_ids=ids, alpha=args.kd_alpha, temperature=args.kd_temperature
        )
    model, tokenizer = load_model(args.adapter or student, args.quantization, args.compute_dtype, trainable=True)
    trainer = training.completion_trainer(args, model, tokenizer, dataset, lengths, sizes["answer"], loss)
    training.train_and_save(trainer, args, "kd", student, len(rows), estimate)
    return 0


if __name__ == "__main__":
    run_script(main)
