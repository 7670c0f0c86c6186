"""Measure the peak memory of SFT, KD and DPO steps and of scoring next to the estimate that trainers refuse by.

The models have the shapes of Qwen2.5-3B-Instruct and SmolLM2-135M-Instruct and random weights in NF4, so nothing is
downloaded. Each point runs the trainer's own script, from its flags to an optimiser step of two micro-batches, a short
one and the one that is measured; only the loading of weights and the saving are replaced, and the optimiser's moments
exist beforehand, so that the step has everything in memory that one of a long run has. On CUDA the peak is that of
PyTorch's allocator, on a CPU that of live tensor storage (StorageTracker); the split by kind is the tracker's.
"with_allowance" adds what libraries or a CUDA context take in addition to tensors.

--unfilled, which --quick implies, leaves the arithmetic out: the script, TRL and autograd run as always and tensors
are allocated and freed as always, but large ones hold no values. The peak stays within half a percent
(tests/test_training_memory.py).

    python -m bench.memory_8gb --points 3b
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import logging
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401 (registers the operators that StorageTracker looks for)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import dpo_train
import kd_train
import sft_train
from common import SCORING_TILE, InputError, PromptEncoder
from distil.cli import new_parser, run_script
from distil.files import write_jsonl
from distil.models import EMBEDDED_MODEL, local_or_hub
from distil.scoring import FastLabelScorer
from distil.testing import with_token_probs
from distil.training import memory, run

# Values of the models' config.json files.
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    },
}
# Shape, task, batch, tokens a row, of which answer: a label in a small model's rows, a quarter in a large one's.
POINTS = [("3b", task, 1, tokens, tokens // 4) for tokens in (512, 1024) for task in ("sft", "kd", "token_kd", "dpo")]
POINTS += [("3b", "score", batch, 105, 2) for batch in (8, 16, 32, 64)]
POINTS += [("135m", task, batch, 98, 2) for task, batch in (("sft", 16), ("kd", 16), ("dpo", 8), ("score", 32))]
SCRIPTS = {"sft": sft_train, "kd": kd_train, "token_kd": kd_train, "dpo": dpo_train}
KINDS = ("weights", "adapter", "gradients", "optimiser", "activations", "logits")
# Columns of the tiles in which TRL's fused head and FastLabelScorer go through the vocabulary.
TILES = (memory.FUSED_TILE, SCORING_TILE)

# Elements of a tensor from which on its values may be left out.
SMALL = 1024


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--points", default="", help='those whose name contains this, such as "3b dpo" (all)')
    parser.add_argument("--layers", type=int, help="number of layers in place of the model's own")
    parser.add_argument(
        "--unfilled", action="store_true", help="allocate and free as the step does, but leave out its arithmetic"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the 3B shape at 1024 tokens and scoring at batch 32, all layers, --unfilled: minutes on one core",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storage by kind, while it is on, and those at the peak.

    Each storage counts once, whatever tensors view it, from the operation that returns it until it is freed. `mark`
    sets kinds; without a mark a storage is "logits" where one of its sides is in `widths`, else
    "activations".

    filled=False: operations that return new floating-point tensors of some size allocate them and leave them
    unfilled. Allocations, their order and their life are those of the real step, for a fraction of its time.
    """

    def __init__(self, widths: Iterable[int] = (), filled: bool = True):
        super().__init__()
        self._widths, self._filled = set(widths), filled
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.mark("logits" if self._widths & set(tensor.shape) else "activations", [tensor])
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            # Straight to the kernel with the tracker on: it sees the weights that are unpacked inside.
            key = torch._C._dispatch_key_parse(device.type.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        if not self._filled and not any(v.alias_info for v in (*func._schema.returns, *func._schema.arguments)):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # where the shape depends on values
                shapes = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
                outputs = [t for t in tree_leaves(shapes) if isinstance(t, torch.Tensor)]
                real = [t for t in outputs if t.is_meta and t.is_floating_point()]
                if outputs and len(outputs) == len(real) and max(t.numel() for t in outputs) > SMALL:
                    return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device=device), shapes)
        return func(*args, **kwargs)

    def mark(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count the tensors' storages as `kind`, whatever they counted as before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if tensor.is_meta or not size:
                continue
            self._forget(key)
            self._storages[key] = (kind, size, weakref.ref(storage, lambda _, key=key: self._forget(key)))
            self.live[kind] += size
        if self.live.total() > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _forget(self, key: int) -> None:
        if key in self._storages:
            kind, size, _ = self._storages.pop(key)
            self.live[kind] -= size


def to_meta(value: Any) -> Any:
    """Return an operation's argument as its shape alone."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def weights_of(model: Any) -> Iterator[torch.Tensor]:
    """Yield all that a frozen base holds: parameters, buffers and the scales of 4-bit weights."""
    yield from (p for n, p in model.named_parameters() if "lora_" not in n)
    yield from model.buffers()
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    for state in [*states, *(state.state2 for state in states if state.nested)]:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))


def random_model(config: Any, tokenizer: Any) -> Any:
    """Return a model of this configuration as `common.load_model` returns one to train in NF4, on the process's
    device. Each layer is a copy of one random layer, so no more than one is ever unquantised."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    body = model.base_model
    layer = type(body.layers[0])(model.config, 0).to(dtype)
    for module in list(layer.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                packed = Linear4bit(linear.in_features, linear.out_features, compute_dtype=dtype, device="meta")
                packed.bias = linear.bias
                packed.support_avx512bf16_for_cpu = False  # as common.load_model sets it
                packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=packed)
                setattr(module, name, packed)
    layer.to(device)  # quantises
    for number in range(config.num_hidden_layers):
        body.layers[number] = copy.deepcopy(layer, {id(model.config): model.config})
        body.layers[number].self_attn.layer_idx = number
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    body.norm.weight = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=device))
    embeddings = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device).uniform_(-0.05, 0.05)
    body.embed_tokens.weight = torch.nn.Parameter(embeddings)
    model.tie_weights()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model.config.update({"quantization_config": quantization, "pad_token_id": tokenizer.pad_token_id})
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.requires_grad_(False).train()


def make_rows(encoder: PromptEncoder, count: int, tokens: int, answer: int) -> list[tuple[str, str, str]]:
    """Return (user turn, answer, worse answer) of rows of at least `tokens` tokens, `answer` of them the answer with
    its end-of-turn. They are filled with digits, one token each; as in CreditMix data the beginning is common to all
    rows. Where there is room the worse answer is the shorter, so that pairs need padding and a mask."""
    turns = [f"Say of each customer whether the credit is good. Customer {number:03}: " for number in range(count)]
    spare = tokens - answer - len(encoder.prompt(turns[0]))
    return [(turn + "7" * spare, "1" * (answer - 1), "2" * max(1, answer - 2)) for turn in turns]


def save_rows(path: Path, task: str, rows: list[tuple[str, str, str]]) -> None:
    """Write the rows as the trainer's data file has them, token probabilities for the folder's tokenizer."""
    from transformers import AutoTokenizer

    probabilities = {"Good": 0.5, "Standard": 0.3, "Bad": 0.2}
    fields = {
        "sft": lambda turn, good, bad: {"input": turn, "output": good},
        "kd": lambda turn, good, bad: {"input": turn, "teacher_output": good, "label_probs": probabilities},
        "token_kd": lambda turn, good, bad: {"input": turn, "teacher_output": good},
        "dpo": lambda turn, good, bad: {"prompt": turn, "chosen": good, "rejected": bad},
    }
    written = [fields[task](*row) for row in rows]
    if task == "token_kd":
        written = with_token_probs(written, path.parent, AutoTokenizer.from_pretrained(path.parent), k=32)
    write_jsonl(path, written)


def tracked(model: Any, filled: bool) -> StorageTracker:
    """Return a tracker in which the model's weights, adapter and gradients are marked."""
    vocabulary = model.config.get_text_config().vocab_size
    tracker = StorageTracker({vocabulary, *TILES, *(vocabulary % tile for tile in TILES)}, filled)
    tracker.mark("weights", weights_of(model))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            tracker.mark("adapter", [parameter])
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark("gradients", [p.grad]))
    return tracker


def run_step(trainer: Any, filled: bool) -> dict[str, int]:
    """Return the peak bytes by kind of the trainer's last optimiser step, as in the middle of a long run: with
    moments, and with gradients of an earlier micro-batch."""
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    trainer.create_optimizer().step()
    tracker = tracked(trainer.model, filled)
    tracker.mark("optimiser", tree_leaves(list(trainer.optimizer.state.values())))
    trainer._get_train_sampler = torch.utils.data.SequentialSampler  # the short rows first
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tracker:
        trainer.train()
    return tracker.peak


def training_point(
    task: str,
    config: Any,
    tokenizer: Any,
    batch: int,
    tokens: int,
    answer: int,
    flags: Iterable[Any] = (),
    filled: bool = True,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return (peak bytes by kind, the estimate in GB) of one optimiser step of a trainer's script."""
    from safetensors.torch import save_file

    script, result = SCRIPTS[task], {}
    encoder = PromptEncoder(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({}, folder / "model.safetensors")
        rows = make_rows(encoder, batch, 0, 2) + make_rows(encoder, batch, tokens, answer)
        save_rows(folder / "rows.jsonl", task, rows)
        argv = ["--student", folder, "--data", folder / "rows.jsonl", "--save_dir", folder / "run", "--max_steps", 1]
        argv += ["--batch_size", batch, "--grad_accum", 2, "--compute_dtype", "bfloat16", "--max_memory_gb", 1000]

        def load(*args, **kwargs):
            return random_model(copy.deepcopy(config), tokenizer), tokenizer

        def steps(trainer, method, options, ref, data, estimate, task):
            result.update(peak=run_step(trainer, filled), estimate=estimate)

        with mock.patch.object(run, "load", load), mock.patch.object(run, "train_and_save", steps):
            script.main([str(flag) for flag in [*argv, *flags]])
    return result["peak"], result["estimate"]


def scoring_point(
    config: Any, tokenizer: Any, batch: int, tokens: int, filled: bool = True
) -> tuple[dict[str, int], dict[str, float]]:
    """Return (peak bytes by kind, estimate in GB) of scoring one batch of rows."""
    encoder = PromptEncoder(tokenizer)
    turns = [turn for turn, _, _ in make_rows(encoder, batch, tokens, 2)]
    model = random_model(copy.deepcopy(config), tokenizer).eval()
    forms = {label: [label] for label in ("Good", "Standard", "Bad")}
    tracker = tracked(model, filled)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tracker, contextlib.suppress(FloatingPointError):  # unfilled memory may hold no numbers
        scorer = FastLabelScorer(model, encoder, forms, batch_size=batch, shared_by=[turns[0], turns[-1]])
        scorer.raw_scores(turns)
    longest = max(len(encoder.prompt(turn)) for turn in turns) - len(scorer.prefix)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return tracker.peak, estimate_scoring_memory(folder, batch, longest, len(scorer.prefix))


def estimate_scoring_memory(path: str, batch_size: int, longest: int, shared: int = 0) -> dict[str, float]:
    """Return the expected peak in GB by kind of label scoring in NF4 and bfloat16.

    longest: tokens of a row after the `shared` ones, whose keys and values all rows reuse.
    """
    size, tokens = memory.Sizes.of(path), batch_size * longest
    cache = 4 * size.layers * size.keys * (shared + (shared > 0) * (shared * batch_size + tokens))
    forward = size.forward("nf4", 2, tokens) + cache
    head = 4 * SCORING_TILE * (size.hidden + 2 * batch_size)
    gb = {
        "weights": size.weights("nf4", 2),
        "activations": forward if forward > head else 0,
        "logits": 0 if forward > head else head,
    }
    gb = {kind: value / 1e9 for kind, value in gb.items()} | {"libraries": memory.LIBRARIES_GB}
    return {**gb, "total": sum(gb.values())}


def measure(
    shape: str, task: str, batch: int, tokens: int, answer: int, layers: int | None = None, filled: bool = True
) -> dict[str, Any]:
    """Return GB by kind at a point's peak, their sum with the allowance, the estimate and its ratio to the peak."""
    from transformers import AutoConfig, AutoTokenizer

    started = time.monotonic()
    config = AutoConfig.for_model(**SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}))
    tokenizer = AutoTokenizer.from_pretrained(local_or_hub(EMBEDDED_MODEL))  # both vocabularies have its ids
    tokenizer.pad_token = "<|endoftext|>"
    if task == "score":
        kinds, estimate = scoring_point(config, tokenizer, batch, tokens, filled)
    else:
        # A student with fewer layers would otherwise count as a small one.
        flags = ["--gradient_checkpointing", "on", "--lora_dropout", 0.05] if shape == "3b" else []
        kinds, estimate = training_point(task, config, tokenizer, batch, tokens, answer, flags, filled)
    peak = sum(kinds.values()) / 1e9
    result = {"point": f"{shape} {task} {batch} x {tokens}", "device": "cpu"}
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        result |= {"device": "cuda", "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3)}
    allowance = estimate["libraries"]
    result |= {
        "peak_gb": round(peak, 3),
        "with_allowance_gb": round(peak + allowance, 3),
        "estimate_gb": round(estimate["total"] - allowance, 3),
        "ratio": round((estimate["total"] - allowance) / peak, 3),
        "kinds_gb": {kind: round(kinds.get(kind, 0) / 1e9, 3) for kind in KINDS},
        "estimated_kinds_gb": {kind: round(estimate[kind], 3) for kind in KINDS if kind in estimate},
        "seconds": round(time.monotonic() - started, 1),
    }
    gc.collect()
    return result


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    filled, name = not (args.unfilled or args.quick), args.points or ("3b" if args.quick else "")
    points = [point for point in POINTS if name in "{} {} {} x {}".format(*point)]
    if args.quick:
        points = [point for point in points if point[3] == 1024 or point[1:3] == ("score", 32)]
    if not points:
        raise InputError(f"--points {name}: no point's name has this in it")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = []
    for point in points:
        with contextlib.redirect_stdout(sys.stderr):  # where the trainers log their steps
            results.append(measure(*point, args.layers, filled))
        line = "{point:<18} peak {peak_gb:.2f} GB, with allowance {with_allowance_gb:.2f}, estimate / peak {ratio:.3f}"
        parts = ", ".join(f"{kind} {value:.2f}" for kind, value in results[-1]["kinds_gb"].items() if value)
        print(f"{line.format(**results[-1])} ({parts})", file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        worst = max(results, key=lambda result: abs(result["ratio"] - 1))["ratio"]
        print(json.dumps({"filled": filled, "worst_ratio": worst, "points": results}))
    return 0


if __name__ == "__main__":
    run_script(main)
