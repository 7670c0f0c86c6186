"""DPO on our token ids; a long prompt goes through the layers once, with both answers in one row behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig
from trl import DPOConfig, DPOTrainer

from distil.training.data import RowSizes
from distil.training.flags import TrainOptions
from distil.training.run import adapter_trainer, trainer_arguments

FULL_ATTENTION = ("llama", "qwen2", "qwen3", "mistral")  # model types whose layers a 4-D mask serves as it is


def prompts_pay(path: str, examples: Sequence[dict[str, list[int]]]) -> bool:
    """Return whether `share_prompts` is right for a student and saves anything: it needs plain causal attention in
    every layer (a 4-D mask undoes windows, recurrent layers do not see it), and prompts longer than both answers."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type not in FULL_ATTENTION or not full or getattr(config, "sliding_window", None):
        return False
    prompts = sum(len(example["prompt_ids"]) for example in examples)
    return prompts > sum(len(example["chosen_ids"]) + len(example["rejected_ids"]) for example in examples)


def share_prompts(model: Any) -> None:
    """Let TRL's fused forward run each pair as one row, so that the prompt is run once: where `prompts_pay`.
    model: with `trl.trainer.utils.add_fused_lm_head` applied. It is called with rows [2 * pairs, tokens], padded on
    the right, the chosen ones first; a row of `pair_layout` goes through the layers, and what comes out per token is
    put back where TRL looks for it. The sums are those of two rows but for the order of additions."""
    forward = model.forward

    def paired(input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **more):
        if not fused_lm_head:
            return forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
        pairs, width = len(input_ids) // 2, input_ids.shape[1]
        supervised = labels != -100
        source, second, real, mask, offset = pair_layout(attention_mask.sum(dim=1), supervised.int().argmax(dim=1))
        source = source.clamp(max=width - 1)
        row = torch.arange(pairs, device=input_ids.device)[:, None] + pairs * second
        ids, targets = input_ids[row, source], labels[row, source].masked_fill(~real, -100)
        if model.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": source, "labels": targets}
        output = forward(**inputs, fused_lm_head=True, **more)
        # Fields [pairs, columns - 1] hold what the next token has; back to [2 * pairs, width - 1].
        column = torch.arange(width - 1, device=input_ids.device) + torch.cat([torch.zeros_like(offset), offset])
        column = column.clamp(max=ids.shape[1] - 2)
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.shape == (pairs, ids.shape[1] - 1):
                output[name] = torch.cat([value, value]).gather(1, column) * supervised[:, 1:]
        return output

    model.forward = paired


def pair_layout(lengths: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return how a pair is laid out in one row: prompt, chosen answer, the prompt's last token again, rejected answer.
    The repeated token predicts the rejected answer's first one; it and that answer have the positions that they have
    behind the prompt, and do not see the chosen answer. lengths, prompts: tokens of the rows and of their prompts,
    [2 * pairs], the chosen rows first. Returns, for the [pairs, columns] of the layout, the column in TRL's row,
    whether that is the rejected one, whether the column holds a token; the mask [pairs, 1, columns, columns], True
    where attention is allowed; and how many columns right of TRL's the rejected answer begins, [pairs, 1]."""
    chosen, rejected = lengths[:, None].chunk(2)
    shared = prompts[: len(chosen), None] - 1
    total = chosen + rejected - shared
    column = torch.arange(int(total.max()), device=lengths.device)[None]
    second, offset = column >= chosen, chosen - shared
    hidden = second[:, :, None] & (~second & (column >= shared))[:, None]
    mask = (column[:, :, None] >= column[:, None]) & ~hidden
    return column - second * offset, second, column < total, mask[:, None], offset


class PairTrainer(DPOTrainer):
    """TRL's DPOTrainer on token ids of ours: it would tokenise text with control tokens switched on."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def pair_trainer(
    options: TrainOptions, model: Any, tokenizer: Any, examples: list[dict], sizes: RowSizes, losses: dict[str, Any]
) -> PairTrainer:
    """Return the DPO trainer of pairs of these sizes. examples: token ids `prompt_ids`, `chosen_ids` and
    `rejected_ids` of each pair. losses: arguments of DPOConfig."""
    config, dataset = DPOConfig(**trainer_arguments(options), **losses), Dataset.from_list(examples)
    trainer = adapter_trainer(PairTrainer, config, options, model, tokenizer, dataset)
    if sizes.prompt_once:
        share_prompts(trainer.model.get_base_model())
    return trainer
