"""The completion loss: cross-entropy of the supervised tokens alone, divided by the tokens of the complete step.
Departure from TRL: its fused head projects every position on a CPU; for short answers that costs more than the rest
of the model, so their logits are computed here. The beginning that a batch's prompts share is run once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from trl import SFTConfig, SFTTrainer

from distil.heads import positions_at_once, supervised_states
from distil.support import recurrent
from distil.token_probs import TokenProbs
from distil.training.data import RowSizes, batch_order, completion_collator
from distil.training.flags import TrainOptions
from distil.training.memory import MIN_SHARED_TOKENS, eager_attention, logits_fit
from distil.training.run import adapter_trainer, trainer_arguments

# Columns of a batch that have a row for each supervised token.
TOKEN_COLUMNS = ("labels", "token_ids", "token_log_probs", "token_rest")


def cross_entropy_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed NLL of a batch's supervised tokens, row after row.
    logits: [tokens, vocabulary], float32; batch["labels"]: [tokens], what each of them must predict."""
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")


def shared_columns(input_ids: torch.Tensor, most: int, least: int = MIN_SHARED_TOKENS) -> int:
    """Return how many first columns of input_ids [batch, tokens] all rows share, up to `most`; 0 below `least`."""
    differ = (input_ids[:, :most] != input_ids[:1, :most]).any(dim=0).nonzero()
    shared = int(differ[0, 0]) if len(differ) else most
    return shared if len(input_ids) > 1 and shared >= least else 0


class CompletionTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss on supervised positions alone and divided by the tokens of the complete step.
    loss_sum(logits, batch) returns a sum over the batch. It is divided by `num_items_in_batch`, the supervised tokens
    of all micro-batches of the step: a mean per micro-batch would step too far under gradient accumulation.
    own_loss=False leaves the loss of all batches to TRL's fused head: processes that chose differently would hang.
    at_once: the most positions whose logits may be in memory; with more of them loss_sum gets chunks of a batch, of
    the columns in TOKEN_COLUMNS alone, and their logits are computed again in the backward pass."""

    def __init__(
        self,
        *args: Any,
        loss_sum: Callable = cross_entropy_sum,
        own_loss: bool = True,
        at_once: int = sys.maxsize,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._loss_sum, self._own, self._at_once = loss_sum, own_loss, at_once
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
        inner = self.accelerator.unwrap_model(model).get_base_model()
        states, logits_of = supervised_states(model, inner, inputs["input_ids"], keep, shared)
        batch = {**inputs, "labels": labels[:, 1:][keep[:, :-1]]}
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch

        def sums(states: torch.Tensor, chunk: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            with self.accelerator.autocast():
                logits = logits_of(states).float()
            return self._loss_sum(logits, chunk), (logits.detach().argmax(dim=-1) == chunk["labels"]).sum()

        if len(states) <= self._at_once:
            loss, right = sums(states, batch)
        else:
            again = functools.partial(checkpoint, sums, use_reentrant=False, preserve_rng_state=False)
            stretches = [slice(i, i + self._at_once) for i in range(0, len(states), self._at_once)]
            names = [name for name in TOKEN_COLUMNS if name in batch]
            parts = [again(states[part], {name: batch[name][part] for name in names}) for part in stretches]
            loss, right = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        loss = loss / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # items count every process, gradients are averaged
        right = right / counts.sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(self.accelerator.gather(right).mean().item())
        return loss


def completion_trainer(
    options: TrainOptions,
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    sizes: RowSizes,
    loss_sum=cross_entropy_sum,
    token_probs: TokenProbs | None = None,
) -> CompletionTrainer:
    """Return the trainer of a `completion_dataset` of these sizes; loss_sum: as CompletionTrainer takes it;
    token_probs: as `completion_collator` takes it."""
    if eager_attention(max(sizes.lengths)):
        model.set_attn_implementation("eager")
    vocabulary = model.config.get_text_config().vocab_size
    fits = logits_fit(vocabulary, options.batch_size * sizes.answer)
    config = SFTConfig(**trainer_arguments(options), train_sampling_strategy=batch_order(sizes.lengths))
    loss = {"loss_sum": loss_sum, "own_loss": fits or loss_sum is not cross_entropy_sum}
    if token_probs:
        loss["at_once"] = positions_at_once(vocabulary)
    collator = completion_collator(tokenizer.pad_token_id, token_probs)
    build = functools.partial(CompletionTrainer, data_collator=collator, **loss)
    return adapter_trainer(build, config, options, model, tokenizer, dataset)
