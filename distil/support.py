"""Decide from a model's configuration alone whether this project can score and train it; no weights are loaded."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

from common import LORA_TARGETS, InputError, PromptEncoder, padding_token

TAKE = "take a causal language model such as Llama, Qwen2, Qwen3 or Gemma 3"

EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # layers of a mixture's MLPs and router


@functools.lru_cache(maxsize=8)
def empty_model(path: str) -> Any:
    """Return a model with the modules and shapes of a local folder or hub id, and without weights. Raises InputError
    where transformers has no causal language model for its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    try:
        if config.is_encoder_decoder:
            raise ValueError("an encoder-decoder")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a configuration can break
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{path}: {config.model_type} models are not supported ({reason}); {TAKE}") from None


@functools.lru_cache(maxsize=8)
def check_supported(path: str) -> None:
    """Raise InputError where a base model (local folder or hub id) cannot be used, with the reason: it is no causal
    language model, its layers keep a state that is not known here, or its context has no stated length."""
    model = empty_model(path)
    if lacks := missing_part(model):
        raise InputError(f"{path}: {model.config.model_type} models are not supported ({lacks}); {TAKE}")


@functools.lru_cache(maxsize=8)
def check_tokens(path: str) -> None:
    """Raise InputError where a base model's chat template fails or changes text, or where its tokenizer has words, or
    its prompts and answers tokens, that the model has no embedding of."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        encoder = PromptEncoder(tokenizer)
    except InputError:
        raise
    except Exception as error:  # whatever damaged files can break
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: its tokenizer cannot be read ({reason}); copy it again") from None
    size, end = empty_model(path).config.get_text_config().vocab_size, encoder.end_of_turn
    padding_token(tokenizer, end, size)
    used = {*tokenizer.get_vocab().values()} - {*tokenizer.added_tokens_decoder}  # words that any text can have
    used |= {*encoder.prompt("-"), *(encoder.completion("-") if end else [])}
    if (number := max(used)) >= size:
        token = tokenizer.convert_ids_to_tokens(number)
        raise InputError(f"{path}: its token {token} has number {number}, the model has {size}: they differ")


def missing_part(model: Any) -> str | None:
    """Return what scoring and training need and this model does not have, None for a supported model."""
    from transformers import DynamicCache
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    text = model.config.get_text_config(decoder=True)
    if {module.is_causal for module in model.modules() if hasattr(module, "is_causal")} == {False}:
        return "attention that is not causal"
    if not (getattr(text, "max_position_embeddings", None) or 0) > 0:
        return "no max_position_embeddings, the length of the context, in config.json"
    if not hasattr(model, model.base_model_prefix or "-") or model.get_output_embeddings() is None:
        return "no separate body and output head"
    try:
        layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    except (ValueError, KeyError, AttributeError, TypeError):
        layers = {None}
    known = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    if not all(layer in known or layer in _recurrent_layers() for layer in layers):
        return "layers with a sparse index or a state of a kind that is not known here"
    return None


def _recurrent_layers() -> tuple[type, ...]:
    """Return the types of the cache's layers that keep a state of all tokens so far, and no keys of each."""
    from transformers import cache_utils as kinds

    mixed = kinds.LinearAttentionAndFullAttentionLayer, kinds.LinearAttentionAndSlidingWindowAttentionLayer
    return kinds.LinearAttentionLayer, *mixed


def recurrent(config: Any) -> bool:
    """Return whether a model of this configuration has recurrent layers (linear attention, state space, short
    convolution): what rows share cannot be cut out of their state, and a mask does not hide tokens from them."""
    from transformers import DynamicCache

    return any(isinstance(layer, _recurrent_layers()) for layer in DynamicCache(config=config).layers)


def linear_layers(model: Any, everywhere: bool = False) -> dict[str, Any]:
    """Return the linear layers of a model by full name, without the output head: those of its text decoder to which
    LoRA can go, or of vision and audio towers too. This is PEFT's rule for 'all-linear' but for the towers, which no
    text trains, and the MLPs of mixtures of experts, in whose place PEFT would wrap the weights of all experts."""
    from torch.nn import Conv1d, Linear
    from transformers.pytorch_utils import Conv1D

    inside = list((model if everywhere else model.get_decoder()).modules())
    held = [weight for m in inside if not isinstance(m, Conv1d) for weight in m.parameters(recurse=False)]
    left_out = EXPERTS if not everywhere and any(weight.ndim == 3 for weight in held) else ()
    kept = {id(m) for m in inside if isinstance(m, (Linear, Conv1D)) and m is not model.get_output_embeddings()}
    layers = {name: module for name, module in model.named_modules() if id(module) in kept}
    return {name: module for name, module in layers.items() if name.rpartition(".")[2] not in left_out}


def lora_targets(model: Any, flag: str = "auto") -> str | tuple[str, ...]:
    """Return the layers of a base model that LoRA goes to: their names, or a pattern where others have them too.

    flag: names of layers; 'all-linear'; or 'auto' for the whitepaper's seven where each layer has them, else all.
    Raises InputError for a name that no layer has, with those that exist."""
    count = Counter(name.rpartition(".")[2] for name in linear_layers(model))
    text = model.config.get_text_config()
    seven = all(count[name] == text.num_hidden_layers for name in LORA_TARGETS)
    names = LORA_TARGETS if flag == "auto" and seven else tuple(count)
    if flag not in ("auto", "all-linear"):
        names = tuple(dict.fromkeys(name.strip() for name in flag.split(",")))
    if unknown := [name for name in names if name not in count]:
        exist = f"the layers that can be trained are {', '.join(sorted(count))}"
        raise InputError(f"--lora_targets: a {text.model_type} model has no {', '.join(unknown)}; {exist}")
    every = Counter(name.rpartition(".")[2] for name, _ in model.named_modules())
    if all(every[name] == count[name] for name in names):
        return names
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return rf"{re.escape(decoder)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def context_length(config: Any) -> int:
    """Return the tokens that a row may have. config: of the text model.
    LongRoPE (Phi-3.5) has other angles for a forward whose longest row, or padding, is beyond the original context:
    rows of a batch and a cached beginning would change each other, so rows stay below it."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in (rope, *rope.values()) if isinstance(one, dict)]  # one, or one for each type of layer
    long = [one for one in kinds if one.get("rope_type") == "longrope"]
    own = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return min([config.max_position_embeddings, *(one.get("original_max_position_embeddings", own) for one in long)])


def check_used(model: Any, adapters: dict[str, str]) -> None:
    """Raise InputError where a loaded model does not use all LoRA weights of its adapters {name: folder}: other layers
    or targets in their configuration, or a base with fewer layers."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    for name, folder in adapters.items():
        used = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="numpy") as weights:
            if surplus := sorted(key for key in {*weights.keys()} - {*used} if "lora_" in key):
                lost = f"{len(surplus)} of its weights have no place in it, such as {surplus[0]}"
                raise InputError(f"{folder}: not an adapter for this base ({lost}); train or copy it again")
