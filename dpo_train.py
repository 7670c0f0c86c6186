"""Direct preference optimisation (DPO): QLoRA on {"prompt", "chosen", "rejected"} through TRL's DPOTrainer.

Departures from TRL's own script: prompts are tokenised exactly as label scoring does it (TRL has no pre-tokenised
path), a long prompt is run once for both answers of its pair, adapters train in float32, and training can go on from
an SFT adapter (--adapter), whose frozen copy is then the reference; without one the base model itself is. Dropout is
off whatever --lora_dropout says, as TRL has it: policy and reference must be the same network at the start.

    python dpo_train.py --adapter runs/creditmix_sft --data data/creditmix_dpo.jsonl --save_dir runs/creditmix_dpo
"""

from __future__ import annotations

import argparse
import math

from common import PromptEncoder
from files import InputError, number_or_auto, read_jsonl, run_script, seed_number
from models import (
    check_model_name,
    claim_run_dir,
    load_model,
    local_or_hub,
    lora_config,
    parameter_count,
    quiet_libraries,
    student_of,
)

LORA = {"lora_r": 16, "lora_alpha": 32}
# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (README, "The recipe").
LARGE = {"epochs": 1.0, "learning_rate": 5e-6, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
SMALL = {"epochs": 1.0, "learning_rate": 1e-4, "batch_size": 8, "grad_accum": 1, "lora_dropout": 0.0} | LORA


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add(
        "--student",
        help="base model: hub id, local folder or smollm2-135m (default: the adapter's, or the 3B student)",
    )
    add("--adapter", help="adapter folder to go on from, such as runs/creditmix_sft (default: a new adapter)")
    add("--data", default="data/creditmix_dpo.jsonl", help='JSONL of {"prompt", "chosen", "rejected"} (%(default)s)')
    add("--save_dir", default="runs/creditmix_dpo", help="adapter folder to write (%(default)s)")
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
    add = parser.add_argument_group("preference").add_argument
    add("--beta", type=float, default=0.1, help="strength of the pull to the reference, into DPOConfig (%(default)s)")
    add(
        "--sft_weight",
        type=float,
        default=0.0,
        help="weight of an SFT term on the chosen answers, against likelihood displacement (%(default)s)",
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


def preference_examples(rows: list[dict], encoder: PromptEncoder, max_length: int, source: str) -> list[dict]:
    """Token ids of prompt, chosen and rejected answer of each row, prompts exactly as scoring has them.

    Raises InputError for rows without contrast or longer than `max_length` (cutting them would cut the answers)."""
    examples = []
    for number, row in enumerate(rows, 1):
        if row["chosen"] == row["rejected"]:
            raise InputError(f"{source}: row {number}: chosen and rejected are the same ({row['chosen'][:40]!r})")
        example = {
            "prompt_ids": encoder.prompt(row["prompt"]),
            "chosen_ids": encoder.completion(row["chosen"]),
            "rejected_ids": encoder.completion(row["rejected"]),
        }
        length = sequence_length(example)
        if length > max_length:
            raise InputError(f"{source}: row {number} has {length} tokens, --max_length is {max_length}; raise it")
        examples.append(example)
    return examples


def sequence_length(example: dict) -> int:
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.beta < math.inf or not 0 <= args.sft_weight < math.inf:
        raise InputError("--beta is above 0, --sft_weight 0 or more")
    rows = read_jsonl(args.data, ("prompt", "chosen", "rejected"))
    if not args.dry_run:
        claim_run_dir(args.save_dir, args.overwrite, args.resume)
    student = student_of(args.student, args.adapter)
    check_model_name(student)
    path = local_or_hub(student)
    quiet_libraries()

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import training

    class PairTrainer(DPOTrainer):
        """TRL's DPOTrainer on token ids of ours: it would tokenise text with control tokens switched on."""

        def _prepare_dataset(self, dataset, *args):
            return dataset

    training.fill_defaults(args, SMALL, LARGE, parameter_count(path))
    training.check_flags(args)
    examples = preference_examples(rows, PromptEncoder(training.load_tokenizer(path)), args.max_length, args.data)
    lengths = [sequence_length(example) for example in examples]
    answer = max(len(example[ids]) for example in examples for ids in ("chosen_ids", "rejected_ids"))
    prompt_once = training.prompts_pay(path, examples)
    estimate = training.fit_to_memory(path, args, max(lengths), answer, pairs=True, prompt_once=prompt_once)
    if args.dry_run:
        return training.print_plan(args, lengths, estimate)
    training.check_memory(estimate, args)
    losses = {"loss_type": ["sigmoid"]}
    if args.sft_weight:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, args.sft_weight]}
    model, tokenizer = load_model(args.adapter or student, args.quantization, args.compute_dtype, trainable=True)
    weights = training.adapter_weights(model)
    trainer = PairTrainer(
        model,
        args=DPOConfig(**training.trainer_arguments(args), beta=args.beta, **losses),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=None if args.adapter else lora_config(args.lora_r, args.lora_alpha, args.lora_dropout),
    )
    training.adapters_to_float32(trainer.model, weights)
    if prompt_once:
        training.share_prompts(trainer.model.get_base_model())
    training.train_and_save(trainer, args, "dpo", student, len(rows), estimate)
    return 0


if __name__ == "__main__":
    run_script(main)
