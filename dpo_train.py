"""Direct preference optimisation (DPO): QLoRA on {"prompt", "chosen", "rejected"} through TRL's DPOTrainer.

Departures from TRL's own script: prompts are tokenised exactly as label scoring does it (TRL has no pre-tokenised
path), a long prompt is run once for both answers of its pair, adapters train in float32, and training can continue
from an SFT adapter (--adapter), whose frozen copy is then the reference. Without one the base model is the reference,
and an SFT term teaches the answers themselves (--sft_weight). Dropout is off, as TRL has it: policy and reference must
be the same network at the start.

    python dpo_train.py --adapter runs/creditmix_sft --data data/creditmix_dpo.jsonl --save_dir runs/creditmix_dpo
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, replace

from common import InputError, PromptEncoder
from distil.cli import refuse_unused, run_script
from distil.models import resolve_student
from distil.runs import claimed
from distil.training.data import RowSizes, TrainingData, load_tokenizer, read_data
from distil.training.flags import ABOVE_0, AT_LEAST_0, LORA, TrainOptions, train_options, training_parser, unused

# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (docs/recipes.md).
LARGE = {"epochs": 1.0, "learning_rate": 5e-6, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
SMALL = {"epochs": 1.0, "learning_rate": 1e-4, "batch_size": 8, "grad_accum": 1, "lora_dropout": 0.0} | LORA
# From a base, DPO alone falls to one label: the answers are still to be learnt, by an SFT term at SFT's rates.
BASE_WEIGHT, LARGE_BASE, SMALL_BASE = 1.0, LARGE | {"learning_rate": 2e-4}, SMALL | {"learning_rate": 1e-3}


@dataclass(frozen=True, kw_only=True)
class DpoOptions(TrainOptions):
    """What all trainers have, and the flags of DPO."""

    LIMITS = TrainOptions.LIMITS | {"beta": ABOVE_0, "sft_weight": AT_LEAST_0}
    adapter: str | None = None
    beta: float = 0.1
    sft_weight: float


def build_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, SMALL, LARGE, "creditmix_dpo", '{"prompt", "chosen", "rejected"}')
    add = parser.add_argument_group("preference").add_argument
    add("--beta", type=float, default=0.1, help="strength of the pull to the reference, into DPOConfig (%(default)s)")
    weight = "weight of an SFT term on the chosen answers (0 with --adapter; without, 1 and --learning_rate "
    weight += f"{SMALL_BASE['learning_rate']:g} below 1 B parameters, else {LARGE_BASE['learning_rate']:g})"
    add("--sft_weight", type=float, help=weight)
    return parser


def preference_examples(data: TrainingData, encoder: PromptEncoder, max_length: int) -> tuple[list[dict], RowSizes]:
    """Return token ids of prompt, chosen and rejected answer of each row, tokenised as scoring does, and their sizes.
    Raises InputError for rows without contrast or longer than `max_length` (cutting them would cut the answers)."""
    examples, lengths, answer = [], [], 0
    for number, row in enumerate(data.rows, 1):
        if row["chosen"] == row["rejected"]:
            raise InputError(f"{data.file}: row {number}: chosen and rejected are the same ({row['chosen'][:40]!r})")
        prompt, chosen = encoder.prompt(row["prompt"]), encoder.completion(row["chosen"])
        rejected = encoder.completion(row["rejected"])
        longer = max(len(chosen), len(rejected))
        if (length := len(prompt) + longer) > max_length:
            raise InputError(f"{data.file}: row {number} has {length} tokens, --max_length is {max_length}; raise it")
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        lengths.append(length)
        answer = max(answer, longer)
    return examples, RowSizes(tuple(lengths), answer, pairs=True)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    data = read_data(args.data, ("prompt", "chosen", "rejected"))
    with claimed(vars(args)):
        ref = resolve_student(args.student, args.adapter)
        data = data.for_model(ref.name)
        flags = vars(args)
        if args.sft_weight is None:
            flags = flags | {"sft_weight": 0.0 if ref.adapter else BASE_WEIGHT}
        recipes = (SMALL_BASE, LARGE_BASE) if flags["sft_weight"] and not ref.adapter else (SMALL, LARGE)
        options = train_options(flags, *recipes, ref, data, DpoOptions)
        no_dropout = {"DPO trains without dropout": ["lora_dropout"] if args.lora_dropout else []}
        refuse_unused(parser, argv, no_dropout | unused(vars(args)))

        from distil.training import pairs, run

        encoder = PromptEncoder(load_tokenizer(ref.path))
        examples, sizes = preference_examples(data, encoder, options.max_length)
        sizes = replace(sizes, prompt_once=pairs.prompts_pay(ref.path, examples))
        losses = {"loss_type": ["sigmoid"], "beta": options.beta}
        if options.sft_weight:
            losses |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, options.sft_weight]}
        build = functools.partial(pairs.pair_trainer, examples=examples, sizes=sizes, losses=losses)
        return run.plan_and_train("dpo", options, ref, data, sizes, encoder, build)


if __name__ == "__main__":
    run_script(main)
