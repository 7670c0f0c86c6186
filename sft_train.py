"""Supervised fine-tuning (SFT): QLoRA on {"input", "output"} pairs, the loss on the output and its end-of-turn token.

Departures from TRL's own script: prompts are tokenised exactly as label scoring does it (control tokens in user text
stay text), adapters train in float32, and on short answers only the supervised positions go through the output head.

    python sft_train.py --student smollm2-135m --data data/creditmix_sft.jsonl --save_dir runs/creditmix_sft
"""

from __future__ import annotations

import argparse

from common import PromptEncoder
from files import number_or_auto, read_jsonl, run_script, seed_number
from models import (
    DEFAULT_STUDENT,
    check_model_name,
    claim_run_dir,
    load_model,
    local_or_hub,
    parameter_count,
    quiet_libraries,
)

LORA = {"lora_r": 16, "lora_alpha": 32}
# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (README, "The recipe").
LARGE = {"epochs": 1.0, "learning_rate": 2e-4, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
SMALL = {"epochs": 2.0, "learning_rate": 1e-3, "batch_size": 16, "grad_accum": 1, "lora_dropout": 0.0} | LORA


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--student", default=DEFAULT_STUDENT, help="base model: hub id, local folder or smollm2-135m (%(default)s)")
    add("--data", default="data/creditmix_sft.jsonl", help='JSONL of {"input", "output"} (%(default)s)')
    add("--save_dir", default="runs/creditmix_sft", help="adapter folder to write (%(default)s)")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the frozen base (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    add(
        "--epochs",
        type=float,
        help=f"passes over the data; {SMALL['epochs']:g} below 1 B parameters, else {LARGE['epochs']:g}",
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


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows = read_jsonl(args.data, ("input", "output"))
    if not args.dry_run:
        claim_run_dir(args.save_dir, args.overwrite, args.resume)
    check_model_name(args.student)
    path = local_or_hub(args.student)
    quiet_libraries()

    import training

    training.fill_defaults(args, SMALL, LARGE, parameter_count(path))
    training.check_flags(args)
    encoder = PromptEncoder(training.load_tokenizer(path))
    dataset = training.completion_dataset(rows, "output", encoder, args.max_length, args.data)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    sizes = training.row_sizes(dataset)
    estimate = training.fit_to_memory(path, args, **sizes)
    if args.dry_run:
        return training.print_plan(args, lengths, estimate)
    training.check_memory(estimate, args)
    model, tokenizer = load_model(args.student, args.quantization, args.compute_dtype, trainable=True)
    trainer = training.completion_trainer(args, model, tokenizer, dataset, lengths, sizes["answer"])
    training.train_and_save(trainer, args, "sft", args.student, len(rows), estimate)
    return 0


if __name__ == "__main__":
    run_script(main)
