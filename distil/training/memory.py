"""Memory of a training step by arithmetic (bench/memory_8gb.py measures it); batch size and checkpointing that fit."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import sys
from dataclasses import dataclass, replace
from typing import Self

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from common import InputError, compute_dtype, lora_config
from distil.files import read_json
from distil.heads import positions_at_once
from distil.models import ModelRef
from distil.processes import rank_and_world
from distil.runs import settings_path
from distil.support import empty_model, linear_layers, lora_targets
from distil.training.data import RowSizes
from distil.training.flags import Options, TrainOptions

MAX_LOGITS_BYTES = 2**29  # own loss where any batch's supervised logits stay below this, else TRL's head, in tiles
MAX_EAGER_TOKENS = 256  # up to this length attention that keeps its weights trains a fifth faster on a CPU
MIN_SHARED_TOKENS = 16  # a shorter common start of a batch's prompts is not worth a separate forward
FUSED_TOKENS, FUSED_TILE = 4096, 32768  # the tiles of TRL's fused head: tokens, columns of the vocabulary
LIBRARIES_GB = 0.7  # what libraries take in addition to tensors, measured on a CPU
CUDA_GB = 1.1  # on a GPU: its context (0.8) and what PyTorch reserves and does not use (docs/results/gpu.md)


def logits_fit(vocabulary: int, supervised: int) -> bool:
    """Return whether the logits of this number of supervised tokens can all be in memory at once, in float32."""
    return 4 * supervised * vocabulary <= MAX_LOGITS_BYTES


def eager_attention(longest: int) -> bool:
    """Return whether attention without a fused kernel trains faster: short sequences (tokens) on a CPU."""
    return longest <= MAX_EAGER_TOKENS and not torch.cuda.is_available()


@dataclass(frozen=True)
class Sizes:
    """What memory depends on in a model: parameters, layers and, in elements, the width of each part of a layer."""

    total: int
    linear: int  # parameters of the linear layers, which are quantised
    adapter: int
    branches: int  # LoRA's in a layer
    inputs: int  # of all of them
    layers: int
    hidden: int
    mlp: int
    heads: int
    queries: int
    keys: int
    normed: int  # queries and keys where they have separate norms, as in Qwen3
    vocabulary: int
    state: int  # bytes a token, in the mean of all layers, that gated delta layers save (Qwen3.5)

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, path: str, lora_r: int = 16, targets: str | tuple[str, ...] = ()) -> Self:
        """Return the sizes of a base model and LoRA of this rank, from its configuration alone (nothing is loaded).
        targets: `lora_targets`, by default those of 'auto'. Raises InputError where PEFT cannot train them."""
        model = copy.deepcopy(empty_model(path))  # LoRA changes it
        text, total = model.config.get_text_config(), model.num_parameters()
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        linear = sum(module.weight.numel() for module in linear_layers(model, everywhere=True).values())
        try:
            with torch.device("meta"):
                peft = get_peft_model(model, lora_config(lora_r, targets=targets or lora_targets(model)))
        except ValueError as error:
            reason = f"PEFT cannot train {model.config.model_type} models ({' '.join(str(error).split())[:120]})"
            raise InputError(f"{path}: {reason}; name other layers with --lora_targets") from None
        adapter, lora = peft.get_nb_trainable_parameters()[0], [m for m in peft.modules() if isinstance(m, LoraLayer)]
        layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
        branches, inputs = len(lora) // layers, sum(module.in_features for module in lora) // layers
        kinds = getattr(text, "per_layer_config", None) or [text]  # Gemma 4 has heads of two sizes
        sizes = [getattr(one, "head_dim", None) or hidden // heads for one in kinds]
        shared = [getattr(one, "num_key_value_heads", None) or heads for one in kinds]
        queries, keys = heads * max(sizes), max(a * b for a, b in zip(sizes, shared, strict=True))
        normed = queries + keys if "q_norm" in modules else 0
        mlp = getattr(text, "intermediate_size", None) or getattr(text, "ffn_hidden_size", None) or 4 * hidden
        state = 0
        if parts := getattr(text, "linear_num_value_heads", 0):
            # Counted in the float32 kernel that transformers has without flash-linear-attention: chunks of 64 tokens.
            key, value = text.linear_key_head_dim, text.linear_value_head_dim
            state = parts * (1312 + 32 * key + 12 * value + key * value // 16)
            state = state * text.layer_types.count("linear_attention") // layers
        widths = hidden, mlp, heads, queries, keys, normed, text.vocab_size
        return cls(total, linear, adapter, branches, inputs, layers, *widths, state)

    def weights(self, quantization: str, width: int) -> float:
        """Return the bytes of the frozen base; NF4 with double quantisation takes 4.13 bits. width: of others."""
        return self.linear * (0.516 if quantization == "nf4" else width) + (self.total - self.linear) * width

    def forward(self, quantization: str, width: int, tokens: int, weights: int = 0) -> float:
        """Return the bytes at the peak of one layer's forward without gradients, hidden states not counted: in the
        MLP, with gate, up and their product or the last of them while its 4-bit weight is unpacked, or in attention
        that computes this number of `weights`, in float32 and before that in the type of computation."""
        unpacked = self.hidden * self.mlp if quantization == "nf4" else 0
        mlp = width * (2 * tokens * self.mlp + max(tokens * self.mlp, unpacked))
        return 4 * width * tokens * self.hidden + max(mlp, 10 * weights)


@dataclass(frozen=True)
class _Batch:
    """A forward's batch in tokens: `rows` of `longest`, whose first `shared` are run once for all of them; in all
    `tokens`, `supervised` of which reach the loss. weights: attention weights of a layer where they are saved."""

    rows: int
    longest: int
    shared: int
    tokens: int
    supervised: int
    weights: int

    @classmethod
    def of(cls, size: Sizes, options: TrainOptions, sizes: RowSizes) -> Self:
        rows, longest, shared = options.batch_size * (1 + sizes.pairs), max(sizes.lengths), sizes.shared
        supervised = rows * sizes.answer
        if sizes.prompt_once:  # as `pair_layout` has them
            rows, longest = options.batch_size, longest + sizes.answer + 1
        if options.gradient_checkpointing == "on" or sizes.pairs or rows == 1 or shared < MIN_SHARED_TOKENS:
            shared = 0
        eager = eager_attention(longest) and not sizes.pairs
        weights = size.heads * (longest * (longest - shared) * rows + shared**2) if eager else 0
        return cls(rows, longest, shared, shared + rows * (longest - shared), supervised, weights)


def targets_of(ref: ModelRef, options: TrainOptions) -> str | tuple[str, ...]:
    """Return the layers that a run's adapter has: those of --lora_targets, or of the adapter to continue from."""
    if ref.adapter and not isinstance(options.lora_targets, str):
        return tuple(options.lora_targets)
    return options.lora_targets if ref.adapter else lora_targets(empty_model(ref.path), options.lora_targets)


def estimate_memory(ref: ModelRef, options: TrainOptions, sizes: RowSizes) -> dict[str, float]:
    """Return the expected peak in GB by kind, by arithmetic over what PyTorch keeps: at the output head or in the MLP
    of the last layer, where all activations are still in memory. options.batch_size is a number here."""
    size = Sizes.of(ref.path, options.lora_r, targets_of(ref, options))
    width = 2 if compute_dtype(options.compute_dtype) == torch.bfloat16 else 4
    batch, checkpointing = _Batch.of(size, options, sizes), options.gradient_checkpointing == "on"
    layer = _saved_by_layer(size, batch, options, sizes.pairs, width)
    saved = batch.tokens * size.hidden * width * size.layers if checkpointing else layer * size.layers
    saved += batch.tokens * size.hidden * (4 + width)  # embeddings, and the last norm's input
    unpacked = width * size.hidden * size.mlp if options.quantization == "nf4" else 0
    backward = (layer if checkpointing else 0) + width * batch.tokens * (size.mlp + 2 * size.hidden) + unpacked
    forward = size.forward(options.quantization, width, batch.tokens, batch.weights)
    work = max(backward, forward if sizes.pairs else 0)  # the reference runs while the policy's activations are saved
    logits = _logits(size, batch.supervised, sizes, width)
    gb = {
        "weights": size.weights(options.quantization, width),
        "adapter": 4 * size.adapter * (2 if sizes.pairs and ref.adapter else 1),  # in float32; the reference's copy
        "gradients": 4 * size.adapter,
        "optimiser": {"adamw_torch": 8, "adamw_8bit": 2, "sgd": 0}[options.optimizer] * size.adapter,
        "activations": saved + (work if work > logits else 0),
        "logits": 0 if work > logits else logits,
    }
    gb = {kind: value / 1e9 for kind, value in gb.items()}
    gb |= {"libraries": CUDA_GB if torch.cuda.is_available() else LIBRARIES_GB}
    return {**gb, "total": sum(gb.values()), "trainable_parameters": size.adapter}


def _saved_by_layer(size: Sizes, batch: _Batch, options: TrainOptions, pairs: bool, width: int) -> int:
    """Return the bytes that autograd keeps of a layer: the inputs of its norms in float32, and of attention, MLP and
    LoRA branches in the type of computation. Dropout keeps a copy and a mask of what goes into each branch: the mask
    is a byte an element on CUDA, on a CPU it has the element's type."""
    tokens, attended = batch.tokens, batch.rows * batch.longest  # attended: keys and values
    branches, mask = min(size.inputs, 2 * size.hidden + size.mlp) * width, 1 if torch.cuda.is_available() else width
    if options.lora_dropout and not pairs:
        branches = size.inputs * (width + mask)
    saved = tokens * (8 * size.hidden + 4 * size.normed + branches + size.state)
    saved += tokens * (3 * size.mlp + 2 * size.queries + size.branches * options.lora_r) * width
    if width == 2:  # autocast's copies of the adapter, one for each of the forwards
        saved += width * size.adapter // size.layers * (2 if batch.shared else 1)
    if batch.weights:  # in float32 and in the type of computation
        return saved + batch.weights * (6 if width == 2 else 4) + 2 * attended * size.queries * width
    # With a mask, as TRL's pairs and rows after a shared beginning have, keys and values are repeated for each query
    # head, and each layer has its own mask.
    masked = pairs or batch.shared > 0
    saved += 2 * attended * (size.queries if masked else size.keys) * width
    return saved + masked * batch.rows * (batch.longest - batch.shared) * batch.longest * width


def _logits(size: Sizes, supervised: int, sizes: RowSizes, width: int) -> int:
    """Return the bytes at the output head for this number of supervised tokens."""
    if sizes.token_probs:  # of a chunk in float32: what is left of the K, its exponentials, gradients by both
        return 4 * min(supervised, positions_at_once(size.vocabulary)) * size.vocabulary * 5
    if not sizes.pairs and (sizes.label_probs or logits_fit(size.vocabulary, supervised)):
        # Copies in float32: log-probabilities, the loss's gradient by them and by the logits; the KL term's own.
        return 4 * supervised * size.vocabulary * (4 if sizes.label_probs else 3)
    # TRL's fused head: tiles of the vocabulary, on CUDA in place, in PyTorch with seven copies in float32 and one of
    # booleans, and then the weights of the tile in float32.
    columns, high = min(FUSED_TILE, size.vocabulary), min(FUSED_TOKENS, supervised)
    logits = width * high * FUSED_TILE + 4 * supervised * size.hidden
    return logits + (0 if torch.cuda.is_available() else columns * max(29 * high, 4 * (high + size.hidden)))


def fit_to_memory(ref: ModelRef, options: Options, sizes: RowSizes) -> tuple[Options, dict[str, float]]:
    """Return the options with numbers for 'auto', and their `estimate_memory`: no gradient checkpointing if that fits
    four fifths of the memory, and a step's largest micro-batch that fits; with --resume those of the killed run."""
    ways, batches = [options.gradient_checkpointing], [(options.batch_size, options.grad_accum)]
    if options.gradient_checkpointing == "auto":
        ways = ["off", "on"]
    if options.batch_size == "auto":
        step = options.grad_accum
        batches = [(size, step // size) for size in range(step, 0, -1) if step % size == 0]
    note = settings_path(options.save_dir)
    if options.resume and note.is_file():
        before = read_json(note)
        ways = [before["gradient_checkpointing"]] if len(ways) > 1 else ways
        batches = [(before["batch_size"], before["grad_accum"])] if len(batches) > 1 else batches
    limit = 0.8 * available_memory(options.max_memory_gb)
    for way, (batch_size, grad_accum) in itertools.product(ways, batches):
        fitted = replace(options, gradient_checkpointing=way, batch_size=batch_size, grad_accum=grad_accum)
        estimate = estimate_memory(ref, fitted, sizes)
        if estimate["total"] <= limit:
            break
    if len(batches) > 1 and rank_and_world()[0] == 0:
        print(f"--batch_size auto: {fitted.batch_size} x {fitted.grad_accum} rows a step", file=sys.stderr)
    return fitted, estimate


def available_memory(max_memory_gb: float | None) -> float:
    """Return the GB that a process may need: max_memory_gb, else what is free on its GPU, or its share of what is free
    in the machine. All processes of a launcher get the same number, the least, to choose the same batches by it."""
    if max_memory_gb is not None:
        return max_memory_gb
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0] / 1e9
    else:
        free = psutil.virtual_memory().available / 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank_and_world()[1] > 1:
        PartialState(cpu=not torch.cuda.is_available())  # joins the processes as the trainer will
        free = min(gather_object([free]))
    return free


def check_memory(ref: ModelRef, options: TrainOptions, estimate: dict[str, float]) -> None:
    """Refuse a run that cannot fit. Raises InputError with what can still be changed."""
    if estimate["total"] <= (available := available_memory(options.max_memory_gb)):
        return
    ways = {
        "lower --batch_size and raise --grad_accum": options.batch_size > 1,
        "use --gradient_checkpointing on": options.gradient_checkpointing != "on",
        "use --quantization nf4": options.quantization != "nf4",
        "use --optimizer adamw_8bit": options.optimizer == "adamw_torch",
        "leave the longest rows out": True,
        "take a smaller --student": not ref.adapter,
    }
    # A resumed run keeps the settings that it has.
    advice = "end other programs" if options.resume else ", ".join(way for way, helps in ways.items() if helps)
    memory = f"about {estimate['total']:.1f} GB needed, {available:.1f} GB available"
    raise InputError(f"{memory}: {advice}, or set another limit with --max_memory_gb")
