"""The completion loss: cross-entropy of the supervised tokens alone, divided by the tokens of the complete step.
Departure from TRL: its fused head projects every position on a CPU; for short answers that costs more than the rest
of the model, so their logits are computed here. The beginning that a batch's prompts share is run once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import DynamicCache
from trl import SFTConfig, SFTTrainer

from distil.support import recurrent
from distil.training.data import RowSizes, batch_order, completion_collator
from distil.training.flags import TrainOptions
from distil.training.memory import MIN_SHARED_TOKENS, eager_attention, logits_fit
from distil.training.run import adapter_trainer, trainer_arguments


def cross_entropy_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed NLL of a batch's supervised tokens, row after row.
    logits: [tokens, vocabulary], float32; batch["labels"]: [tokens], what each of them must predict."""
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")


def shared_columns(input_ids: torch.Tensor, most: int, least: int = MIN_SHARED_TOKENS) -> int:
    """Return how many first columns of input_ids [batch, tokens] all rows share, up to `most`; 0 below `least`."""
    differ = (input_ids[:, :most] != input_ids[:1, :most]).any(dim=0).nonzero()
    shared = int(differ[0, 0]) if len(differ) else most
    return shared if len(input_ids) > 1 and shared >= least else 0


def supervised_logits(model: Any, inner: Any, ids: torch.Tensor, keep: torch.Tensor, shared: int) -> torch.Tensor:
    """Return logits [selected, vocabulary] of the positions `keep` of `ids`, both [batch, tokens], row after row.
    No other position goes through the output head. The first `shared` columns, none of them in `keep`, are run once
    for all rows, gradients included; under dropout the rows share the prefix's masks. inner: the unwrapped model."""
    prefix: dict[str, Any] = {"use_cache": False}
    if shared:
        cache = DynamicCache(config=inner.config.get_text_config())
        model(input_ids=ids[:1, :shared], cache=cache, use_cache=True, logits_to_keep=1)
        for layer in (layer for layer in cache.layers if layer.keys is not None):  # Gemma 4's last ones share keys
            layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
            layer.values = layer.values.expand(len(ids), -1, -1, -1)
        prefix = {"cache": cache, "use_cache": True}
    head = inner.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][keep[:, shared:]][None],))
    try:
        # Without a mask attention takes its fast causal path: a fifth less time on a CPU.
        return model(input_ids=ids[:, shared:], **prefix).logits[0]
    finally:
        hook.remove()


class CompletionTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss on supervised positions alone and divided by the tokens of the complete step.
    loss_sum(logits, batch) returns a sum over the batch. It is divided by `num_items_in_batch`, the supervised tokens
    of all micro-batches of the step: a mean per micro-batch would step too far under gradient accumulation.
    own_loss=False leaves the loss of all batches to TRL's fused head: processes that chose differently would hang."""

    def __init__(self, *args: Any, loss_sum: Callable = cross_entropy_sum, own_loss: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._loss_sum, self._own = loss_sum, own_loss
        # Neither gradient checkpointing nor recurrent layers take a cache whose beginning the rows share.
        text = self.model.config.get_text_config()
        self._shares = not (self.args.gradient_checkpointing or recurrent(text))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the step's share of the loss; `inputs` as `completion_collator` makes them."""
        if return_outputs or not self._own:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The position before each supervised token predicts it.
        labels, keep = inputs["labels"], torch.zeros_like(inputs["labels"], dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != -100
        counts = keep.sum(dim=1)
        most = int(keep.int().argmax(dim=1).min()) if self._shares else 0
        shared = shared_columns(inputs["input_ids"], most)
        inner = self.accelerator.unwrap_model(model)
        logits = supervised_logits(model, inner, inputs["input_ids"], keep, shared).float()
        batch = {**inputs, "labels": labels[:, 1:][keep[:, :-1]]}
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        loss = self._loss_sum(logits, batch) / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # items count every process, gradients are averaged
        right = (logits.detach().argmax(dim=-1) == batch["labels"]).float().mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(self.accelerator.gather(right).mean().item())
        return loss


def completion_trainer(
    options: TrainOptions, model: Any, tokenizer: Any, dataset: Dataset, sizes: RowSizes, loss_sum=cross_entropy_sum
) -> CompletionTrainer:
    """Return the trainer of a `completion_dataset` of these sizes; loss_sum: as CompletionTrainer takes it."""
    if eager_attention(max(sizes.lengths)):
        model.set_attn_implementation("eager")
    fits = logits_fit(model.config.get_text_config().vocab_size, options.batch_size * sizes.answer)
    config = SFTConfig(**trainer_arguments(options), train_sampling_strategy=batch_order(sizes.lengths))
    loss = {"loss_sum": loss_sum, "own_loss": fits or loss_sum is not cross_entropy_sum}
    build = functools.partial(CompletionTrainer, data_collator=completion_collator(tokenizer.pad_token_id), **loss)
    return adapter_trainer(build, config, options, model, tokenizer, dataset)
