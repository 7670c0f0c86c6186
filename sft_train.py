"""Supervised fine-tuning (SFT): QLoRA on {"input", "output"} pairs, the loss on the output and its end-of-turn token.

Departures from TRL's own script: prompts are tokenised exactly as label scoring does it (control tokens in user text
stay text), adapters train in float32, and on short answers only the supervised positions go through the output head
(distil/training/loss.py).

    python sft_train.py --student smollm2-135m --data data/creditmix_sft.jsonl --save_dir runs/creditmix_sft
"""

from __future__ import annotations

import argparse
import functools

from common import PromptEncoder
from distil.cli import refuse_unused, run_script
from distil.models import resolve
from distil.runs import claimed
from distil.training.data import completion_dataset, load_tokenizer, read_data
from distil.training.flags import LORA, TrainOptions, train_options, training_parser, unused

# The whitepaper's section 3 for large students; measured on smollm2-135m for small ones (docs/recipes.md).
LARGE = {"epochs": 1.0, "learning_rate": 2e-4, "batch_size": 1, "grad_accum": 8, "lora_dropout": 0.05} | LORA
SMALL = {"epochs": 2.0, "learning_rate": 1e-3, "batch_size": 16, "grad_accum": 1, "lora_dropout": 0.0} | LORA


def build_parser() -> argparse.ArgumentParser:
    return training_parser(__doc__, SMALL, LARGE, "creditmix_sft", '{"input", "output"}', adapter=False)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    data = read_data(args.data, ("input", "output"))
    with claimed(vars(args)):
        ref = resolve(args.student)
        data = data.for_model(ref.name)
        options = train_options(vars(args), SMALL, LARGE, ref, data, TrainOptions)
        refuse_unused(parser, argv, unused(vars(args)))

        from distil.training import loss, run

        encoder = PromptEncoder(load_tokenizer(ref.path))
        dataset, sizes = completion_dataset(data, "output", encoder, options.max_length)
        build = functools.partial(loss.completion_trainer, dataset=dataset, sizes=sizes)
        return run.plan_and_train("sft", options, ref, data, sizes, encoder, build)


if __name__ == "__main__":
    run_script(main)
