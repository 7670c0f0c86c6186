"""Logits of the tokens of answers alone, some at a time: the layers run once, and no logits of prompts are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from common import right_padded

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 2**26  # logits in float32 that are in memory at once, but for a training on labels or texts alone


def positions_at_once(vocabulary: int) -> int:
    """Return how many positions have their logits in memory at once."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def supervised_states(
    model: Any, inner: Any, ids: torch.Tensor, keep: torch.Tensor, shared: int = 0
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return what goes into the output head at the positions `keep` of `ids`, both [batch, tokens]: states [selected,
    hidden], row after row; and the function that makes logits [tokens, vocabulary] of some of them as the model does,
    scaled or capped where it does that. The first `shared` columns, none of them in `keep`, are run once for all rows,
    gradients included; under dropout the rows share the prefix's masks. inner: the model without wrappers."""
    prefix: dict[str, Any] = {"use_cache": False}
    if shared:
        from transformers import DynamicCache

        cache = DynamicCache(config=inner.config.get_text_config())
        model(input_ids=ids[:1, :shared], cache=cache, use_cache=True, logits_to_keep=1)
        for layer in (layer for layer in cache.layers if layer.keys is not None):  # Gemma 4's last ones share keys
            layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
            layer.values = layer.values.expand(len(ids), -1, -1, -1)
        prefix = {"cache": cache, "use_cache": True}
    head, body, seen = inner.get_output_embeddings(), inner.base_model, {}

    def select(module: Any, inputs: tuple) -> tuple:
        seen["states"] = inputs[0][keep[:, shared:].to(inputs[0].device)]
        return (inputs[0][:1, :1],)  # these logits nobody needs

    hooks = [head.register_forward_pre_hook(select)]
    hooks += [body.register_forward_hook(lambda module, inputs, output: seen.update(output=output))]
    try:
        # Without a mask attention takes its fast causal path: a fifth less time on a CPU.
        model(input_ids=ids[:, shared:], **prefix)
    finally:
        for hook in hooks:
            hook.remove()

    def logits(states: torch.Tensor) -> torch.Tensor:
        hook, forward = head.register_forward_pre_hook(lambda module, inputs: (states[None],)), body.forward
        body.forward = lambda *args, **kwargs: seen["output"]
        try:
            return inner(input_ids=ids, use_cache=False).logits[0]
        finally:
            hook.remove()
            body.forward = forward

    return seen["states"], logits


def answer_logits(model: Any, rows: Sequence[tuple[list[int], list[int]]], filler: int) -> Iterator[torch.Tensor]:
    """Yield the logits [`positions_at_once` or fewer, vocabulary] in float32 that predict the answers' tokens, row
    after row. rows: (prompt, answer) as token ids; filler: a token to pad with."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, _ = right_padded([prompt + answer[:-1] for prompt, answer in rows], 1, filler, model.device)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        keep[i, len(prompt) - 1 :][: len(answer)] = True
    states, logits = supervised_states(inner, inner, ids, keep)
    for part in states.split(positions_at_once(inner.config.get_text_config().vocab_size)):
        yield logits(part).float()
