"""Decide from a model's configuration alone whether this project can score and train it; no weights are loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from common import InputError, PromptEncoder, padding_token

TAKE = "take a causal language model with attention in every layer, such as Llama, Qwen2, Qwen3 or Gemma 3"


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
    language model, its layers keep no keys that prompts could share, or its context has no stated length."""
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
    if layers - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        return "layers without attention or with a sparse index, whose state prompts cannot share"
    return None


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
