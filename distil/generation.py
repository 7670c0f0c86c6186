"""Let a model write text for a batch of prompts: the one `generate` of teachers and code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common import InputError, add_adapters, compute_dtype
from distil.models import LoadOptions, ModelRef, check_unchanged, load, parameter_count, use_note
from distil.processes import print_note
from distil.support import check_used, context_length


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt. text: without the end token; tokens: how many were written, an end token
    included; ended: whether an end token came within the budget."""

    text: str
    tokens: int
    ended: bool


def load_to_write(ref: ModelRef, options: LoadOptions) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a model that only writes, as `load`. A CPU that computes in float32 would
    dequantise all weights for every token: where the matrices fit half of the free memory, they are dequantised once
    and the adapter is added to them, which changes scores by rounding alone. Raises InputError."""
    import psutil
    import torch

    plain = not torch.cuda.is_available() and compute_dtype(options.compute_dtype) == torch.float32
    if not plain or 8 * parameter_count(ref.path) > psutil.virtual_memory().available:
        return load(ref, options)
    print_note(use_note(ref, options))
    model, tokenizer = load(ModelRef(ref.base, ref.base, ref.path), options, notes=False)
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize(torch.float32)
    if ref.adapter:
        model = add_adapters(model, {"default": ref.adapter})
        check_used(model, {"default": ref.adapter})
        model = model.merge_and_unload()
    check_unchanged(ref)
    return model.eval(), tokenizer


def left_padded(rows: Sequence[list[int]], filler: int, device: Any) -> dict[str, Any]:
    """Return input_ids, attention_mask and position_ids [rows, tokens] of rows of token ids that end in one column."""
    import torch

    width = max(map(len, rows))
    inputs = {
        "input_ids": [[filler] * (width - len(row)) + row for row in rows],
        "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
        "position_ids": [[0] * (width - len(row)) + list(range(len(row))) for row in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in inputs.items()}


def generate(
    model: Any,
    tokenizer: Any,
    starts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    batch_size: int,
    temperature: float = 0.0,
    stop: Callable[[str], bool] | None = None,
    progress: str | None = None,
    sort: bool = True,
    skip_special_tokens: bool = False,
    goes_on: bool = False,
    **sampling: Any,
) -> list[Written]:
    """Return what follows each start (token ids), in order.

    Writing of a row stops at an end token (`ends`), at the token with which stop(text) becomes true, or at the
    budget. temperature 0 is greedy; `sampling` (top_k, top_p) goes to transformers otherwise. Seed torch before.
    progress: title of a progress bar on stderr. sort: batch prompts of like length, which changes what a seed draws.
    goes_on: the starts end in a text, and what follows keeps a blank that SentencePiece's decoder cuts off beginnings.
    Raises InputError for a start that does not fit the context."""
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    context, longest = context_length(model.config.get_text_config()), max(map(len, starts), default=0)
    if longest + max_new_tokens > context:
        size = f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens}"
        raise InputError(f"{size} exceed the model's context of {context}; lower the flag or shorten the prompts")
    how = {"do_sample": True, "temperature": temperature, **sampling} if temperature else {"do_sample": False}
    how |= {"max_new_tokens": max_new_tokens, "eos_token_id": list(ends), "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(repetition_penalty=1.0, **how)

    class Stop(StoppingCriteria):
        """Looks at the written text alone: transformers' stop strings may begin in the prompt."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            texts = tokenizer.batch_decode(input_ids[:, width:], clean_up_tokenization_spaces=False)
            return torch.tensor([stop(text) for text in texts], device=input_ids.device)

    criteria = StoppingCriteriaList([Stop()] if stop else [])
    kept = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    decode = functools.partial(tokenizer.decode, **kept)
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]) if sort else 0)
    results = [Written("", 0, False)] * len(starts)
    bar = functools.partial(tqdm, desc=progress, unit="batch", disable=progress is None, file=sys.stderr)
    for first in bar(range(0, len(order), batch_size)):
        chosen = order[first : first + batch_size]
        batch = left_padded([starts[i] for i in chosen], tokenizer.pad_token_id, model.device)
        del batch["position_ids"]  # transformers derives them from the mask
        width = batch["input_ids"].shape[1]
        with torch.inference_mode():
            output = model.generate(**batch, generation_config=config, stopping_criteria=criteria)
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in ends), len(row))
            text = decode(starts[i][-1:] + row[:end])[len(decode(starts[i][-1:])) :] if goes_on else decode(row[:end])
            results[i] = Written(text, min(end + 1, len(row)), end < len(row))
    return results
