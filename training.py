"""What the three trainers share beyond their flags: datasets, the completion loss, memory, checkpoints, run folder.

Apart from models.py and common.py because inference never needs it, and because it imports torch and TRL at once:
trainers import it inside `main`, after their flags and files are checked.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from common import SCORING_TILE, PromptEncoder
from files import InputError, file_sha256, preparation, read_json, write_json
from models import (
    LORA_TARGETS,
    adapter_config,
    claim_run_dir,
    compute_dtype,
    lora_config,
    machine,
    model_fingerprint,
    parameter_count,
    run_record,
)
from processes import rank_and_world

# Students below this size learn well with larger steps and need no gradient checkpointing.
SMALL_STUDENT = 1e9
# Own loss only where the supervised logits of any batch stay below this; else TRL's fused head computes them in tiles.
MAX_LOGITS_BYTES = 2**29
# PyTorch's fused attention is slow backwards on a CPU: up to this length attention that keeps its weights saves a
# fifth of the training time and costs little memory.
MAX_EAGER_TOKENS = 256
# Architectures (config.model_type) whose layers a 4-D mask serves as it is.
FULL_ATTENTION = ("llama", "qwen2", "qwen3", "mistral")
# The tiles, tokens by columns of the vocabulary, that TRL's fused head goes through.
FUSED_TOKENS, FUSED_TILE = 4096, 32768
# What libraries take beside tensors, measured on a CPU; a CUDA context is as large.
LIBRARIES_GB = 0.7
# A shorter common start of a batch's prompts is not worth a forward of its own.
MIN_SHARED_TOKENS = 16
# TRL's fused head leaves prompts out where Triton runs. Elsewhere it projects every position, lest accelerators that
# compile see a new shape with every batch; a CPU compiles nothing.
trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")


def fill_split_seed(args: argparse.Namespace) -> None:
    """Set --split_seed, if not given, from the note beside the data; it stays None where nobody knows it.

    Raises InputError where note, flag and adapter do not have the same: rows that one of them was trained on would be
    in the validation set."""
    note = preparation(args.data)
    if args.split_seed is None and "changed" in note:
        raise InputError(
            f"{args.data}: changed since {note['changed']} was written; prepare it again, or say with --split_seed "
            "how its rows were split"
        )
    noted = note.get("split_seed")
    if args.split_seed is None:
        args.split_seed = noted
    elif noted not in (None, args.split_seed):
        raise InputError(f"--split_seed {args.split_seed}: {args.data} was prepared with {noted}; leave the flag out")
    before = run_record(args.adapter).get("split_seed") if getattr(args, "adapter", None) else None
    if None not in (before, args.split_seed) and before != args.split_seed:
        raise InputError(
            f"--adapter {args.adapter} was trained with --split_seed {before}, {args.data} has {args.split_seed}; "
            "prepare the data with the adapter's"
        )


def sources(args: argparse.Namespace) -> list[dict | None]:
    """Raw files behind the training: that of the data, then those of the adapter that it started from; None where a
    file is not known."""
    start = getattr(args, "adapter", None)
    return [preparation(args.data).get("source"), *(run_record(start).get("sources", [None]) if start else [])]


def gold_share_of(args: argparse.Namespace) -> float | None:
    """The --gold_share that data and the adapter to go on from were made with, the larger; None where one is not
    known."""
    start = getattr(args, "adapter", None)
    shares = [preparation(args.data).get("gold_share"), *([run_record(start).get("gold_share")] if start else [])]
    return None if None in shares else max(shares)


def fill_defaults(args: argparse.Namespace, small: dict[str, Any], large: dict[str, Any], parameters: int) -> None:
    """Set each flag left at None: from the recipe for the student's size, LoRA's from the adapter to go on from, the
    split from the data. Raises InputError for a flag that contradicts adapter or data."""
    fill_split_seed(args)
    if getattr(args, "adapter", None):
        config = adapter_config(args.adapter)
        for flag, key in {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}.items():
            if getattr(args, flag) not in (None, config.get(key)):
                raise InputError(f"--{flag} {getattr(args, flag)}: {args.adapter} has {config.get(key)}; leave it out")
            setattr(args, flag, config.get(key))
    recipe = small if parameters < SMALL_STUDENT else large
    if args.batch_size == "auto" and args.grad_accum is None:
        args.grad_accum = recipe["batch_size"] * recipe["grad_accum"]
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse shared flags out of range, all at once. Raises InputError."""
    least = {"epochs": 0, "max_steps": 0, "learning_rate": 0, "warmup_steps": 0, "lora_dropout": 0, "batch_size": 1}
    least |= dict.fromkeys(("grad_accum", "max_length", "lora_r", "lora_alpha", "save_steps"), 1)
    problems = [
        f"--{name} {getattr(args, name)} (at least {low})"
        for name, low in least.items()
        if getattr(args, name) != "auto" and not low <= getattr(args, name) < math.inf
    ]
    if args.epochs == 0 and not args.max_steps:
        problems.append("--epochs 0 without --max_steps")
    if args.lora_dropout >= 1:
        problems.append(f"--lora_dropout {args.lora_dropout} (below 1)")
    if args.max_memory_gb is not None and not args.max_memory_gb > 0:
        problems.append(f"--max_memory_gb {args.max_memory_gb} (above 0)")
    if problems:
        raise InputError(f"out of range: {', '.join(problems)}")
    there = ("none", *get_available_reporting_integrations())
    if args.report_to not in there:
        raise InputError(f"--report_to {args.report_to}: not installed here; possible are: {', '.join(there)}")
    if getattr(args, "adapter", None) and Path(args.adapter).resolve() == Path(args.save_dir).resolve():
        raise InputError(f"--save_dir {args.save_dir} is the --adapter to go on from; choose another --save_dir")


def completion_dataset(
    rows: Sequence[dict], answer: str, encoder: PromptEncoder, max_length: int, source: str
) -> Dataset:
    """Token ids and labels (-100 on the prompt) of rows with `input` and `answer`; prompts just as scoring has them.

    Raises InputError for rows longer than `max_length` (cutting them would cut the answer) and for an answer whose
    tokens are not supervised, all of them and its end-of-turn token included.
    """
    examples, too_long = [], []
    end = encoder.tokenizer.convert_tokens_to_ids(encoder.end_of_turn)
    for number, row in enumerate(rows, 1):
        prompt, completion = encoder.prompt(row["input"]), encoder.completion(row[answer])
        if len(prompt) + len(completion) > max_length:
            too_long.append((number, len(prompt) + len(completion)))
            continue
        labels = [-100] * len(prompt) + completion
        supervised = sum(label != -100 for label in labels)
        if not 1 < supervised < len(labels) or labels[-1] != end:
            raise InputError(f"{source}: row {number}: {supervised} of {len(labels)} tokens supervised")
        examples.append({"input_ids": prompt + completion, "labels": labels})
    if too_long:
        number, length = max(too_long, key=lambda pair: pair[1])
        raise InputError(
            f"{source}: {len(too_long)} rows are longer than --max_length {max_length} tokens "
            f"(row {number}: {length}); raise --max_length or shorten them"
        )
    return Dataset.from_list(examples)


def row_sizes(dataset: Dataset) -> dict[str, int]:
    """What `estimate_memory` asks of a completion dataset, in tokens: the longest row, the longest answer and the
    beginning that all rows share."""
    ids, labels = list(dataset["input_ids"]), list(dataset["labels"])
    longest, answer = max(map(len, ids)), max(sum(label != -100 for label in row) for row in labels)
    first, last = min(ids), max(ids)  # what these share in the beginning, all do
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return {"longest": longest, "answer": answer, "shared": min(shared, longest - answer - 1)}


def completion_collator(pad_token_id: int) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """Right-padded batches: under causal attention no real token sees the padding, so no mask is needed."""

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        pads = [width - len(example["input_ids"]) for example in examples]
        pairs = list(zip(pads, examples, strict=True))
        batch = {
            "input_ids": torch.tensor([example["input_ids"] + [pad_token_id] * pad for pad, example in pairs]),
            "labels": torch.tensor([example["labels"] + [-100] * pad for pad, example in pairs]),
            "attention_mask": torch.tensor([[1] * (width - pad) + [0] * pad for pad in pads]),
        }
        if "label_probs" in examples[0]:
            batch["label_probs"] = torch.tensor([example["label_probs"] for example in examples])
        return batch

    return collate


def cross_entropy_sum(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed negative log-likelihood of a batch's supervised tokens, row after row. logits: [tokens, vocabulary],
    float32; batch["labels"]: [tokens], what each of them must predict."""
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")


def shared_columns(input_ids: torch.Tensor, most: int) -> int:
    """How many first columns of input_ids [batch, tokens] all rows share, up to `most`; 0 where that saves nothing."""
    differ = (input_ids[:, :most] != input_ids[:1, :most]).any(dim=0).nonzero()
    shared = int(differ[0, 0]) if len(differ) else most
    return shared if len(input_ids) > 1 and shared >= MIN_SHARED_TOKENS else 0


def supervised_logits(
    model: Any, inner: Any, input_ids: torch.Tensor, keep: torch.Tensor, shared: int
) -> torch.Tensor:
    """Logits [kept, vocabulary] of the positions `keep` [batch, tokens], row after row; no other position goes through
    the output head. The first `shared` columns, none of them kept, are run once for all rows, gradients included.

    inner: the model inside what shares it among processes. Under dropout the rows share the prefix's masks.
    """
    prefix: dict[str, Any] = {"use_cache": False}
    if shared:
        cache = DynamicCache(config=inner.config.get_text_config())
        model(input_ids=input_ids[:1, :shared], cache=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(input_ids), -1, -1, -1)
            layer.values = layer.values.expand(len(input_ids), -1, -1, -1)
        prefix = {"cache": cache, "use_cache": True}
    head = inner.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][keep[:, shared:]][None],))
    try:
        # Without a mask attention takes its fast causal path: a fifth less time on a CPU.
        return model(input_ids=input_ids[:, shared:], **prefix).logits[0]
    finally:
        hook.remove()


class CompletionTrainer(SFTTrainer):
    """TRL's SFTTrainer with the loss on supervised positions alone and divided by the tokens of the whole step.

    TRL's fused head projects every position on a CPU; for short answers that costs more than the rest of the model.
    loss_sum(logits, batch) returns a sum over the batch. It is divided by `num_items_in_batch`, the supervised tokens
    of all micro-batches of the step: a mean per micro-batch would step too far under gradient accumulation.
    own_loss=False leaves the loss to TRL's fused head; for all batches, as processes that chose differently would wait
    for each other's sums forever.
    """

    def __init__(self, *args: Any, loss_sum: Callable = cross_entropy_sum, own_loss: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._loss_sum, self._own = loss_sum, own_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The position before each supervised token predicts it.
        labels, keep = inputs["labels"], torch.zeros_like(inputs["labels"], dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != -100
        counts = keep.sum(dim=1)
        if return_outputs or not self._own:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        most = 0 if self.args.gradient_checkpointing else int(keep.int().argmax(dim=1).min())  # it takes no cache
        shared = shared_columns(inputs["input_ids"], most)
        inner = self.accelerator.unwrap_model(model)
        logits = supervised_logits(model, inner, inputs["input_ids"], keep, shared).float()
        batch = {"labels": labels[:, 1:][keep[:, :-1]], "starts": counts.cumsum(dim=0) - counts}
        batch["label_probs"] = inputs.get("label_probs")
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        loss = self._loss_sum(logits, batch) / items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # items count every process, gradients are averaged
        right = (logits.detach().argmax(dim=-1) == batch["labels"]).float().mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(self.accelerator.gather(right).mean().item())
        return loss


def completion_trainer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    lengths: Sequence[int],
    answer: int,
    loss_sum: Callable | None = None,
) -> CompletionTrainer:
    """The trainer of a `completion_dataset` for a base model, which gets an adapter, or one that has its adapter.
    lengths: tokens of each row; answer: of the longest answer."""
    if eager_attention(max(lengths)):
        model.set_attn_implementation("eager")
    weights = adapter_weights(model)
    supervised = args.batch_size * answer
    trainer = CompletionTrainer(
        model,
        SFTConfig(**trainer_arguments(args), train_sampling_strategy=batch_order(lengths)),
        completion_collator(tokenizer.pad_token_id),
        dataset,
        processing_class=tokenizer,
        peft_config=None if weights else lora_config(args.lora_r, args.lora_alpha, args.lora_dropout),
        loss_sum=loss_sum or cross_entropy_sum,
        own_loss=bool(loss_sum) or logits_fit(model.config.get_text_config().vocab_size, supervised),
    )
    adapters_to_float32(trainer.model, weights)
    return trainer


def prompts_pay(path: str, examples: Sequence[dict[str, list[int]]]) -> bool:
    """Whether `share_prompts` is right for a student and saves anything: plain causal attention in every layer, as a
    4-D mask would undo windows and is not seen by recurrent layers, and prompts longer than both answers together."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type not in FULL_ATTENTION or not full or getattr(config, "sliding_window", None):
        return False
    prompts = sum(len(example["prompt_ids"]) for example in examples)
    return prompts > sum(len(example["chosen_ids"]) + len(example["rejected_ids"]) for example in examples)


def share_prompts(model: Any) -> None:
    """Let TRL's fused forward run each pair as one row, so that the prompt is run once: where `prompts_pay`.

    model: has been given `trl.trainer.utils.add_fused_lm_head`. It is called with rows [2 * pairs, tokens], padded on
    the right, the chosen ones first; a row of `pair_layout` goes through the layers, and what comes out per token is
    put back where TRL looks for it. The sums are those of two rows to the last bit but for the order of additions.
    """
    forward = model.forward

    def paired(input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **more):
        if not fused_lm_head:
            return forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)
        pairs, width = len(input_ids) // 2, input_ids.shape[1]
        supervised = labels != -100
        source, second, real, mask, offset = pair_layout(attention_mask.sum(dim=1), supervised.int().argmax(dim=1))
        source = source.clamp(max=width - 1)
        ids, targets = (
            torch.where(second, rows[pairs:].gather(1, source), rows[:pairs].gather(1, source))
            for rows in (input_ids, labels)
        )
        targets = targets.masked_fill(~real, -100)
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
    """How a pair is laid out in one row: prompt, chosen answer, the prompt's last token again, rejected answer.

    The repeated token predicts the rejected answer's first one; it and that answer have the positions that they have
    behind the prompt, and do not see the chosen answer. lengths, prompts: tokens of the rows and of their prompts,
    [2 * pairs], the chosen rows first. Returns, for the [pairs, columns] of the layout, the column in TRL's row,
    whether that is the rejected one, whether the column holds a token; the mask [pairs, 1, columns, columns], True
    where attention is allowed; and how many columns right of TRL's the rejected answer stands, [pairs, 1].
    """
    chosen, rejected = lengths[:, None].chunk(2)
    shared = prompts[: len(chosen), None] - 1
    total = chosen + rejected - shared
    column = torch.arange(int(total.max()), device=lengths.device)[None]
    second, offset = column >= chosen, chosen - shared
    hidden = second[:, :, None] & (~second & (column >= shared))[:, None]
    mask = (column[:, :, None] >= column[:, None]) & ~hidden
    return column - second * offset, second, column < total, mask[:, None], offset


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of a loaded adapter's trainable weights by name; empty for a base model."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}


def adapters_to_float32(model: Any, exact: dict[str, torch.Tensor]) -> None:
    """Undo TRL's cast of a 4-bit model's adapters to bf16, where the updates of small learning rates vanish.

    exact: `adapter_weights` of before the trainer was built, so that going on from an adapter starts at its values.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = exact.get(name, parameter.data).float()
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Autocast casts the small adapter weights. On a CPU PEFT does not see it and casts each input to float32
            # first, which autocast undoes: two copies of every activation for the same numbers.
            module.cast_input_dtype_enabled = False


def logits_fit(vocabulary: int, supervised: int) -> bool:
    """Whether the logits of so many supervised tokens are few enough to be had all at once, in float32."""
    return 4 * supervised * vocabulary <= MAX_LOGITS_BYTES


def batch_order(lengths: Sequence[int]) -> str:
    """How the Trainer's sampler orders rows of these lengths (tokens): at random, or like lengths together where
    random batches would be padding for a good part. Rows of nearly one length stay at random: to sort them could sort
    them by what they say."""
    return "group_by_length" if max(lengths) > 1.5 * sum(lengths) / len(lengths) else "random"


def trainer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that SFTConfig and DPOConfig share."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(Path(args.save_dir) / "checkpoints"),
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps if args.max_steps else -1,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": args.warmup_steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.grad_accum,
        "gradient_checkpointing": args.gradient_checkpointing == "on",
        "optim": args.optimizer,
        "seed": args.seed,
        "logging_steps": min(10, args.max_steps or 10),  # the last step of a short run too
        "logging_first_step": True,
        "save_steps": args.save_steps,
        "save_total_limit": 2,
        "report_to": args.report_to,
        "use_cpu": not cuda,
        "ddp_find_unused_parameters": False,  # every adapter takes part in every forward
        "bf16": compute_dtype(args.compute_dtype) == torch.bfloat16,
        "dataloader_pin_memory": False,  # pinned memory is scarce under WSL2
        "remove_unused_columns": False,
        "max_length": None,  # rows that are too long were refused: cutting would cut the answer
    }


def step_count(args: argparse.Namespace, rows: int) -> int:
    """Optimiser steps of the run; the processes of a launcher share the rows out."""
    per_epoch = math.ceil(math.ceil(rows / (args.batch_size * rank_and_world()[1])) / args.grad_accum)
    return args.max_steps or math.ceil(per_epoch * args.epochs)


@dataclass(frozen=True)
class Sizes:
    """What memory depends on in a model: parameters, layers and, in elements, the width of each part of a layer."""

    total: int
    linear: int  # parameters of the projections, which are quantised
    adapter: int
    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    heads: int
    vocabulary: int
    normed: int  # queries and keys where they have norms of their own, as in Qwen3

    @classmethod
    @functools.lru_cache(maxsize=8)
    def of(cls, path: str, lora_r: int = 16) -> Sizes:
        """Of a base model and LoRA of this rank, from its configuration alone (nothing is loaded). Raises InputError
        where the model lacks projections that LoRA goes to."""
        from peft import get_peft_model

        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            if lacking := [target for target in LORA_TARGETS if target not in there]:
                raise InputError(
                    f"{path}: a {config.model_type} model has no {', '.join(lacking)} to train; take a student built "
                    "like Llama, Qwen2 or Qwen3"
                )
            linear = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
            adapter = get_peft_model(model, lora_config(lora_r)).get_nb_trainable_parameters()[0]
        text = config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries = text.num_attention_heads * head
        keys = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head
        return cls(
            total=parameter_count(path),
            linear=linear,
            adapter=adapter,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries=queries,
            keys=keys,
            mlp=text.intermediate_size,
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            normed=queries + keys if "q_norm" in there else 0,
        )

    def weights(self, quantization: str, width: int) -> float:
        """Bytes of the frozen base; NF4 with double quantisation takes 4.13 bits. width: bytes of other elements."""
        return self.linear * (0.516 if quantization == "nf4" else width) + (self.total - self.linear) * width

    def forward(self, quantization: str, width: int, tokens: int, weights: int = 0) -> float:
        """Bytes at the peak of one layer's forward without gradients beside the hidden states: in its MLP, with gate,
        up and their product or the last of them while its 4-bit weight is unpacked, or in attention that computes so
        many `weights`, in float32 and before that in the type of computation."""
        unpacked = self.hidden * self.mlp if quantization == "nf4" else 0
        mlp = width * (2 * tokens * self.mlp + max(tokens * self.mlp, unpacked))
        return 4 * width * tokens * self.hidden + max(mlp, 10 * weights)


def estimate_memory(
    path: str,
    args: argparse.Namespace,
    longest: int,
    answer: int,
    shared: int = 0,
    pairs: bool = False,
    prompt_once: bool = False,
    label_probs: bool = False,
) -> dict[str, float]:
    """Expected peak in GB by kind, by arithmetic over what PyTorch has to keep (bench/memory_8gb.py measures it).

    A batch is batch_size rows of `longest` tokens, of which `answer` are supervised and the first `shared` common to
    all rows; `pairs`: twice as many rows, or, with prompt_once, two such answers in each; label_probs: the loss has a
    KL term. Each kind is what it has at the peak: at the output head or in the MLP of the last layer, where all
    activations are there still."""
    size = Sizes.of(path, args.lora_r)
    width = 2 if compute_dtype(args.compute_dtype) == torch.bfloat16 else 4
    rows = args.batch_size * (2 if pairs else 1)
    supervised = rows * answer
    if prompt_once:  # as `pair_layout` has them
        rows, longest = args.batch_size, longest + answer + 1
    checkpointing, dropout = args.gradient_checkpointing == "on", bool(args.lora_dropout) and not pairs
    if checkpointing or pairs or rows == 1 or shared < MIN_SHARED_TOKENS:
        shared = 0
    tokens = shared + rows * (longest - shared)
    attended = rows * longest  # keys and values

    # What autograd keeps of a layer: the inputs of its norms in float32, and of attention, MLP and LoRA branches in
    # the type of computation. Dropout keeps a copy and a mask of what goes into each branch: the mask is a byte an
    # element on CUDA, on a CPU it has the element's type.
    inputs = 5 * size.hidden + size.queries + size.mlp
    mask = 1 if torch.cuda.is_available() else width
    branches = inputs * (width + mask) if dropout else (2 * size.hidden + size.mlp) * width
    kept = tokens * (8 * size.hidden + 4 * size.normed + branches)
    kept += tokens * (3 * size.mlp + 2 * size.queries + 7 * args.lora_r) * width
    if width == 2:  # autocast's copies of the adapter, one for each of the forwards
        kept += width * size.adapter // size.layers * (2 if shared else 1)
    eager = eager_attention(longest) and not pairs
    weights = size.heads * (longest * (longest - shared) * rows + shared**2) if eager else 0
    if weights:  # in float32 and in the type of computation
        kept += weights * (6 if width == 2 else 4) + 2 * attended * size.queries * width
    else:
        # With a mask, as TRL's pairs and rows after a shared beginning have, keys and values are repeated for each
        # query head, and each layer has its own mask.
        masked = pairs or shared > 0
        kept += 2 * attended * (size.queries if masked else size.keys) * width
        kept += masked * rows * (longest - shared) * longest * width
    saved = tokens * size.hidden * width * size.layers if checkpointing else kept * size.layers
    saved += tokens * size.hidden * (4 + width)  # embeddings, and the last norm's input

    forward = size.forward(args.quantization, width, tokens, weights)
    unpacked = width * size.hidden * size.mlp if args.quantization == "nf4" else 0
    backward = (kept if checkpointing else 0) + width * tokens * (size.mlp + 2 * size.hidden) + unpacked

    # Copies of the supervised logits in float32: log-probabilities, the loss's gradient by them and by the logits.
    logits = 4 * supervised * size.vocabulary * (4 if label_probs else 3)
    if pairs or not (label_probs or logits_fit(size.vocabulary, supervised)):
        # TRL's fused head: tiles of the vocabulary, on CUDA in place, in PyTorch with seven copies in float32 and one
        # of booleans, and then the weights of the tile in float32.
        columns, high = min(FUSED_TILE, size.vocabulary), min(FUSED_TOKENS, supervised)
        logits = width * high * FUSED_TILE + 4 * supervised * size.hidden
        if not torch.cuda.is_available():
            logits += columns * max(29 * high, 4 * (high + size.hidden))
    work = max(backward, forward if pairs else 0)  # the reference runs while the policy's activations are kept
    gb = {
        "weights": size.weights(args.quantization, width),
        "adapter": 4 * size.adapter * (2 if pairs and args.adapter else 1),  # in float32; the reference's copy
        "gradients": 4 * size.adapter,
        "optimiser": {"adamw_torch": 8, "adamw_8bit": 2, "sgd": 0}[args.optimizer] * size.adapter,
        "activations": saved + (work if work > logits else 0),
        "logits": 0 if work > logits else logits,
    }
    gb = {kind: value / 1e9 for kind, value in gb.items()} | {"libraries": LIBRARIES_GB}
    return {**gb, "total": sum(gb.values()), "trainable_parameters": size.adapter}


def fit_to_memory(path: str, args: argparse.Namespace, *sizes: int, **more: Any) -> dict[str, float]:
    """Put numbers for `auto` into args and return their `estimate_memory`: no gradient checkpointing if that fits four
    fifths of the memory, and of the micro-batches that divide a step's rows the largest that does; those of the killed
    run with --resume."""
    ways, batches = [args.gradient_checkpointing], [(args.batch_size, args.grad_accum)]
    if args.gradient_checkpointing == "auto":
        ways = ["off", "on"]
    if args.batch_size == "auto":
        step = args.grad_accum
        batches = [(size, step // size) for size in range(step, 0, -1) if step % size == 0]
    note = settings_path(args)
    if args.resume and note.is_file():
        before = read_json(note)
        ways = [before["gradient_checkpointing"]] if len(ways) > 1 else ways
        batches = [(before["batch_size"], before["grad_accum"])] if len(batches) > 1 else batches
    limit = 0.8 * memory_to_be_had(args.max_memory_gb)
    for way, (batch_size, grad_accum) in itertools.product(ways, batches):
        args.gradient_checkpointing, args.batch_size, args.grad_accum = way, batch_size, grad_accum
        estimate = estimate_memory(path, args, *sizes, **more)
        if estimate["total"] <= limit:
            break
    if len(batches) > 1 and rank_and_world()[0] == 0:
        print(f"--batch_size auto: {args.batch_size} x {args.grad_accum} rows a step", file=sys.stderr)
    return estimate


def estimate_scoring_memory(path: str, batch_size: int, longest: int, shared: int = 0) -> dict[str, float]:
    """Expected peak in GB by kind of label scoring in NF4 and bfloat16: `longest` tokens a row after the `shared`
    ones, whose keys and values all rows reuse."""
    size, tokens = Sizes.of(path), batch_size * longest
    cache = 4 * size.layers * size.keys * (shared + (shared > 0) * (shared * batch_size + tokens))
    mask = tokens * (shared + longest)
    forward = size.forward("nf4", 2, tokens) + cache + mask
    head = 4 * SCORING_TILE * (size.hidden + 2 * batch_size)
    gb = {
        "weights": size.weights("nf4", 2),
        "activations": forward if forward > head else 0,
        "logits": 0 if forward > head else head,
    }
    gb = {kind: value / 1e9 for kind, value in gb.items()} | {"libraries": LIBRARIES_GB}
    return {**gb, "total": sum(gb.values())}


def eager_attention(longest: int) -> bool:
    """Whether attention without a fused kernel trains faster: short sequences (tokens) on a CPU."""
    return longest <= MAX_EAGER_TOKENS and not torch.cuda.is_available()


def memory_to_be_had(max_memory_gb: float | None) -> float:
    """GB that a process may need: as given, else what is free on its GPU, or its share of what is free in the machine;
    the same number, the least, in all processes of a launcher, which must choose the same batches by it."""
    if max_memory_gb is not None:
        return max_memory_gb
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0] / 1e9
    else:
        import psutil

        free = psutil.virtual_memory().available / 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if rank_and_world()[1] == 1:
        return free
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # joins the processes as the trainer will
    return min(gather_object([free]))


def check_memory(estimate: dict[str, float], args: argparse.Namespace) -> None:
    """Refuse a run that cannot fit. Raises InputError with what can still be changed."""
    there = memory_to_be_had(args.max_memory_gb)
    if estimate["total"] <= there:
        return
    ways = {
        "lower --batch_size and raise --grad_accum": args.batch_size > 1,
        "use --gradient_checkpointing on": args.gradient_checkpointing != "on",
        "use --quantization nf4": args.quantization != "nf4",
        "use --optimizer adamw_8bit": args.optimizer == "adamw_torch",
        "leave the longest rows out": True,
        "take a smaller --student": not getattr(args, "adapter", None),
    }
    if args.resume:  # with the settings that it has
        ways = {"end other programs": True}
    raise InputError(
        f"about {estimate['total']:.1f} GB needed, {there:.1f} GB to be had: "
        f"{', '.join(way for way, helps in ways.items() if helps)}, or say otherwise with --max_memory_gb"
    )


def load_tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def package_versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "scikit-learn")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def last_checkpoint(save_dir: str) -> str | None:
    """The newest complete checkpoint of an unfinished run; incomplete ones (killed while writing) are removed."""
    folders = sorted(Path(save_dir, "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for folder in list(folders):
        try:
            read_json(folder / "trainer_state.json")  # the Trainer writes it last
        except InputError:
            shutil.rmtree(folder)
            folders.remove(folder)
    return str(folders[-1]) if folders else None


def peak_memory() -> dict[str, float]:
    """Peak in GB: of CUDA tensors, or of the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return {"device": "cuda", "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    import resource

    return {"device": "cpu", "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def plot_curve(path: Path, history: list[dict], title: str) -> None:
    """Loss over steps, and the learning rate on a second axis."""
    from matplotlib.figure import Figure

    points = [entry for entry in history if "loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([p["step"] for p in points], [p["loss"] for p in points], color="tab:blue")
    axis.set(xlabel="optimiser step", ylabel="training loss per supervised token", title=title)
    rate = axis.twinx()
    rate.plot([p["step"] for p in points], [p["learning_rate"] for p in points], color="tab:gray", linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    figure.savefig(path, dpi=120)


def settings_path(args: argparse.Namespace) -> Path:
    """Where a run leaves its settings while it trains."""
    return Path(args.save_dir) / "checkpoints" / "settings.json"


def checked_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Flags and data hash (SHA-256), which decide a run's result.

    Raises InputError where --resume would go on with others than the killed run's."""
    note = settings_path(args)
    ignored = ("resume", "overwrite", "dry_run", "debug", "report_to", "max_memory_gb", "save_dir", "save_steps")
    settings = {name: value for name, value in vars(args).items() if name not in ignored}
    settings["data_sha256"] = file_sha256(args.data)
    settings["processes"] = rank_and_world()[1]  # they share the rows out
    if getattr(args, "adapter", None):
        settings["adapter_fingerprint"] = model_fingerprint(args.adapter)
    if args.resume and note.is_file():
        before = read_json(note)
        changed = [
            f"{k} (was {before.get(k)}, now {settings.get(k)})" for k in settings if before.get(k) != settings[k]
        ]
        if changed:
            raise InputError(f"--resume with other settings: {', '.join(changed)}; go on with the old ones")
    return settings


def note_settings(args: argparse.Namespace) -> str:
    """Leave the `checked_settings` beside the checkpoints; returns the hash of the data."""
    settings = checked_settings(args)
    if rank_and_world()[0] == 0:
        write_json(settings_path(args), settings)
    return settings["data_sha256"]


def train_and_save(
    trainer: Any, args: argparse.Namespace, method: str, student: str, rows: int, estimate: dict[str, float]
) -> None:
    """Train (from the last complete checkpoint with --resume), then write the adapter folder, run.json last. What
    --overwrite replaces stays whole until then."""
    save_dir = Path(args.save_dir)
    main, wait = trainer.accelerator.is_main_process, trainer.accelerator.wait_for_everyone
    if args.overwrite and main:
        shutil.rmtree(save_dir / "checkpoints", ignore_errors=True)
    # The one sign that a 4-bit CPU kernel without gradients is in use (see models.keep_autograd_kernels).
    warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
    if main and args.warmup_steps >= (steps := step_count(args, rows)):
        print(
            f"note: all {steps} steps are warm-up (--warmup_steps {args.warmup_steps}): the learning rate never gets "
            f"to {args.learning_rate:g}",
            file=sys.stderr,
        )
    started = time.monotonic()
    wait()  # of several processes the first removes what is old or half written; the others look when it has
    data_hash = note_settings(args)
    with trainer.accelerator.main_process_first():
        checkpoint = last_checkpoint(args.save_dir) if args.resume else None
    if args.resume and not checkpoint and main:
        print(f"{save_dir}: no checkpoint yet, training starts at the beginning", file=sys.stderr)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if bar := getattr(callback, "training_bar", None):
                bar.close()  # it would be drawn once more, below the message
        raise
    # What was not logged yet is each process's own share of the loss.
    loss = torch.tensor(result.metrics["train_loss"], device=trainer.accelerator.device)
    result.metrics["train_loss"] = trainer.accelerator.reduce(loss, "mean").item()
    # Where FSDP or ZeRO-3 has the weights in shards, all processes take part in putting them together.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.peft_config["default"].base_model_name_or_path = student  # as the user named it, not this machine's path
    done = save_dir / "checkpoints" / "done"
    model.save_pretrained(done, state_dict=weights, selected_adapters=["default"], save_embedding_layers=False)
    trainer.processing_class.save_pretrained(done)
    (done / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with this machine's paths
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    write_json(done / "training_curve.json", history)
    plot_curve(done / "training_curve.png", history, f"{save_dir.name} ({method})")
    run = {
        "method": method,
        "base_model": student,
        "flags": vars(args),
        "data": {"file": args.data, "sha256": data_hash, "rows": rows},
        "sources": sources(args),
        "split_seed": args.split_seed,
        "gold_share": gold_share_of(args),
        "seed": args.seed,
        "packages": package_versions(),
        "machine": machine(),
        "metrics": {**result.metrics, "steps": trainer.state.global_step, "last_loss": history[-1]["loss"]},
        "processes": rank_and_world()[1],
        "wall_seconds": round(time.monotonic() - started, 1),
        "resumed_from": checkpoint and Path(checkpoint).name,
        "memory": {**peak_memory(), "estimated_gb": round(estimate["total"], 2)},
    }
    write_json(done / "run.json", run)
    for name in ("run.json", "calibration.json"):  # of the run that this one replaces
        (save_dir / name).unlink(missing_ok=True)
    for path in sorted(done.iterdir(), key=lambda path: path.name == "run.json"):
        path.replace(save_dir / path.name)  # needs no room on a full disk
    shutil.rmtree(save_dir / "checkpoints", ignore_errors=True)
    memory = run["memory"]
    print(
        f"{save_dir}: adapter, tokenizer, run.json and training_curve.png written; {run['metrics']['steps']} steps in "
        f"{run['wall_seconds'] / 60:.1f} min, peak memory {memory['peak_gb']:.2f} GB ({memory['device']})",
        file=sys.stderr,
    )


def print_plan(args: argparse.Namespace, tokens: Sequence[int], estimate: dict[str, float]) -> int:
    """Print what --dry_run says and return its exit status: 2 where the run would be refused. tokens: length of each
    row's training sequence."""
    rows = len(tokens)
    print(f"rows                 {rows} from {args.data}")
    mean = sum(tokens) / len(tokens)
    print(f"tokens               {sum(tokens)} in an epoch; {mean:.0f} a sequence, longest {max(tokens)}")
    print(f"steps                {step_count(args, rows)} of {args.batch_size} x {args.grad_accum} rows")
    print(f"gradient checkpoints {args.gradient_checkpointing}")
    print(f"learning rate        {args.learning_rate:g}, linear decay after {args.warmup_steps} warm-up steps")
    print(f"trainable parameters {int(estimate['trainable_parameters']):,} (LoRA r={args.lora_r}, float32)")
    kinds = ("weights", "adapter", "gradients", "optimiser", "activations", "logits", "libraries")
    parts = ", ".join(f"{name} {estimate[name]:.2f}" for name in kinds)
    print(f"estimated memory     {estimate['total']:.2f} GB ({parts})")
    print(f"would write          {args.save_dir}")
    status = 0
    for check in (
        lambda: claim_run_dir(args.save_dir, args.overwrite, args.resume),
        lambda: check_memory(estimate, args),
        lambda: checked_settings(args),
    ):
        try:
            check()
        except InputError as error:
            print(f"would be refused     {error}")
            status = 2
    return status
