"""Memory: the tracker of bench/memory_8gb.py by hand, the estimate against tracked steps of small models, and what
trainers choose or refuse by it."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from conftest import METHODS, trainer
from safetensors.torch import save_file
from transformers import AutoConfig

import sft_train
from bench import memory_8gb
from bench.memory_8gb import StorageTracker
from distil import heads
from distil.cli import run_script
from distil.models import resolve
from distil.training import memory
from distil.training.data import RowSizes, TrainingData
from distil.training.flags import TrainOptions, train_options

GPU = torch.cuda.is_available()


def shape(kind: str, **other):
    """Return a configuration wide enough that activations and logits outweigh what the estimate leaves out."""
    sizes = {
        "vocab_size": 4480,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model(kind, **sizes | other)


@pytest.fixture
def small():
    return shape("qwen2")


def test_a_storage_counts_once_until_it_is_freed():
    known = torch.ones(50)
    with StorageTracker() as tracker:
        tracker.mark("weights", [known])  # 200 bytes
        one = torch.ones(100, 10)  # 4000
        views = one.T, one[:5], one.view(-1)
        assert tracker.live == {"weights": 200, "activations": 4000}
        two = one * 2  # 4000 more: the peak
        del one
        assert tracker.live["activations"] == 8000  # the views still hold it
        del views
        assert tracker.live["activations"] == 4000
        two.add_(1)
        half = two.half()  # 2000
        assert tracker.live["activations"] == 6000
        tracker.mark("optimiser", [half])
        assert tracker.live == {"weights": 200, "activations": 4000, "optimiser": 2000}
    assert tracker.peak == {"weights": 200, "activations": 8000}


def test_peak_of_a_backward_pass():
    """By hand: x -> x w -> exp -> sum, x [8, 16] and w [16, 32] in float32."""
    weight = torch.ones(16, 32, requires_grad=True)
    with StorageTracker(widths=[32]) as tracker:
        tracker.mark("weights", [weight])  # 2048 bytes
        weight.register_post_accumulate_grad_hook(lambda p: tracker.mark("gradients", [p.grad]))
        x = torch.ones(8, 16)  # 512
        loss = (x @ weight).exp().sum()  # [8, 32], 1024, then its exp, which autograd keeps, and a number
        assert tracker.live == {"weights": 2048, "activations": 512 + 4, "logits": 1024}
        assert tracker.peak == {"weights": 2048, "activations": 512, "logits": 2048}
        loss.backward()
        # gradient of the product (1024) and of the weight (2048), which replaced the product's exp
        assert tracker.live == {"weights": 2048, "gradients": 2048, "activations": 512 + 4, "logits": 0}
    assert weight.grad.shape == weight.shape


def test_weights_unpacked_inside_a_4bit_layer_count():
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda" if GPU else "cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.ones(3, 64, dtype=torch.bfloat16, device=layer.weight.device)
    with StorageTracker() as tracker:
        tracker.mark("weights", memory_8gb.weights_of(layer))
        out = layer(x)
    assert out.shape == (3, 32)
    # Packed weight, scales of its 32 blocks in 8 bits, theirs and two tables of values in float32.
    assert tracker.peak["weights"] == pytest.approx(64 * 32 / 2 + 32 + 4 * (1 + 16 + 256), abs=8)
    # The weight and the output in bfloat16, and the scales in float32.
    assert GPU or tracker.peak["activations"] == pytest.approx(2 * 32 * 64 + 2 * 3 * 32 + 4 * 32, abs=4 * 32)


def test_model_in_nf4_takes_what_the_estimate_says(small, tokenizer, tmp_path):
    small.save_pretrained(tmp_path)
    model = memory_8gb.random_model(small, tokenizer)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in memory_8gb.weights_of(model)}
    size = memory.Sizes.of(str(tmp_path))
    assert sum(held.values()) == pytest.approx(size.weights("nf4", 2), rel=0.05)
    assert (size.total, size.linear) == (4480 * 64 + size.linear + 3 * (128 + 64 + 2 * 32) + 64, 3 * 49152)
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.data_ptr() != layers[1].mlp.up_proj.weight.data_ptr()
    assert not any(parameter.is_meta for parameter in model.parameters())


POINTS = {
    "sft": ("sft", []),
    "sft, attention kept": ("sft", ["--max_length", 200]),
    "sft, checkpoints and dropout": ("sft", ["--gradient_checkpointing", "on", "--lora_dropout", 0.1]),
    "sft, SGD": ("sft", ["--optimizer", "sgd", "--lora_r", 64]),
    "sft, two layers": ("sft", ["--lora_targets", "q_proj,v_proj"]),
    "sft, two layers and dropout": ("sft", ["--lora_targets", "q_proj,v_proj", "--lora_dropout", 0.1]),
    "kd": ("kd", []),
    "token_kd": ("token_kd", []),
    "token_kd, chunks": ("token_kd", ["--gradient_checkpointing", "on"]),
    "dpo": ("dpo", []),
    "dpo, checkpoints": ("dpo", ["--gradient_checkpointing", "on"]),
}


@pytest.mark.skipif(GPU, reason="tracks the CPU's kernels")
@pytest.mark.parametrize("name", POINTS)
def test_estimate_of_a_step(name, small, tokenizer, monkeypatch):
    """Within 10 % of the tracked peak of the trainer's own step."""
    task, flags = POINTS[name]
    if "chunks" in name:
        monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * small.vocab_size * 200)
    tokens = 200 if "--max_length" in flags else 300
    peak, estimate = memory_8gb.training_point(task, small, tokenizer, 4, tokens, 90 if "chunks" in name else 9, flags)
    assert 1e9 * (estimate["total"] - estimate["libraries"]) == pytest.approx(sum(peak.values()), rel=0.1)
    for kind in ("adapter", "gradients", "optimiser"):
        assert 1e9 * estimate[kind] == pytest.approx(peak.get(kind, 0), rel=0.01)


@pytest.mark.skipif(GPU, reason="tracks the CPU's kernels")
@pytest.mark.parametrize("flags", [[], ["--lora_dropout", 0.1]], ids=["plain", "dropout"])
def test_estimate_of_a_student_that_norms_queries_and_keys(flags, tokenizer):
    config = shape("qwen3", head_dim=64, num_hidden_layers=6)
    peak, estimate = memory_8gb.training_point("sft", config, tokenizer, 4, 300, 9, flags, False)
    assert 1e9 * (estimate["total"] - estimate["libraries"]) == pytest.approx(sum(peak.values()), rel=0.1)


@pytest.mark.skipif(GPU, reason="tracks the CPU's kernels")
def test_estimate_of_scoring(small, tokenizer):
    small.vocab_size = 448  # else the head outweighs the batch
    peak, estimate = memory_8gb.scoring_point(small, tokenizer, 16, 300)
    assert 1e9 * (estimate["total"] - estimate["libraries"]) == pytest.approx(sum(peak.values()), rel=0.1)


@pytest.mark.skipif(GPU, reason="tracks the CPU's kernels")
@pytest.mark.parametrize("task", ["kd", "dpo", "score"])
def test_arithmetic_left_out_changes_no_peak(task, small, tokenizer):
    flags = ["--gradient_checkpointing", "on", *(["--lora_dropout", 0.1] if task == "kd" else [])]
    if task == "score":
        peaks = [memory_8gb.scoring_point(small, tokenizer, 2, 80, filled)[0] for filled in (True, False)]
    else:
        peaks = [
            memory_8gb.training_point(task, small, tokenizer, 2, 80, 5, flags, filled)[0] for filled in (True, False)
        ]
    assert peaks[1] == {kind: pytest.approx(size, rel=0.005) for kind, size in peaks[0].items()}


# ------------------------------------------------------------------------------------------- what trainers do by it


def test_auto_takes_what_fits_and_keeps_the_rows_of_a_step(model_dir, tmp_path, capsys):
    ref, sizes = resolve(model_dir), RowSizes((500,), answer=5)

    def fitted(gigabytes, *flags):
        argv = ["--save_dir", str(tmp_path), "--max_memory_gb", str(gigabytes), "--compute_dtype", "float32"]
        args = sft_train.build_parser().parse_args([*argv, *flags])
        options = train_options(
            vars(args), sft_train.SMALL, sft_train.LARGE, ref, TrainingData("rows", [], "", {}), TrainOptions
        )
        options, estimate = memory.fit_to_memory(ref, options, sizes)
        return (options.batch_size, options.grad_accum, options.gradient_checkpointing), estimate["total"]

    auto = ("--batch_size", "auto")
    assert fitted(1000, *auto)[0] == (16, 1, "off")  # a step as without the flag
    assert fitted(1000, *auto, "--grad_accum", "6")[0] == (6, 1, "off")
    most, least = (fitted(gigabytes, *auto)[1] for gigabytes in (1000, 1e-9))
    for share in (0.3, 0.6, 0.9):
        limit = (least + share * (most - least)) / 0.8
        (batch, accumulation, checkpointing), total = fitted(limit, *auto)
        assert batch * accumulation == 16 and 1 <= batch < 16 and total <= 0.8 * limit and checkpointing == "off"
    assert fitted(1e-9, *auto)[0] == (1, 16, "on")  # check_memory refuses it then
    assert fitted(1e-9)[0] == (16, 1, "on") and fitted(1000)[0] == (16, 1, "off")
    # A killed run is resumed with the same batches, whatever memory is free now.
    settings = {"batch_size": 4, "grad_accum": 4, "gradient_checkpointing": "on"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "settings.json").write_text(json.dumps(settings))
    assert fitted(1000, *auto, "--resume")[0] == (4, 4, "on")
    assert "--batch_size auto: 4 x 4 rows a step" in capsys.readouterr().err
    assert fitted(1000, "--batch_size", "8", "--resume")[0] == (8, 1, "on")


@pytest.mark.parametrize("method", METHODS)
def test_too_little_memory_is_refused(method, training_files, model_dir, sft_adapter, here, monkeypatch, capsys):
    """With advice on what still helps."""
    argv = ["--student", model_dir, "--data", training_files[method], "--save_dir", "never"]
    monkeypatch.setattr(sys, "argv", [f"{method}_train.py"])
    always = {"--optimizer adamw_8bit", "--student", "--max_memory_gb"}
    if method == "dpo":  # whose student is that of its adapter
        argv = [*argv[2:], "--adapter", sft_adapter]
        always -= {"--student"}
    for flags, advice in (  # only what still helps
        (["--batch_size", "2"], {"--batch_size", "--grad_accum"}),
        (["--batch_size", "1", "--gradient_checkpointing", "off"], {"--gradient_checkpointing on"}),
        (["--batch_size", "1", "--quantization", "none"], {"--quantization nf4"}),
    ):
        with pytest.raises(SystemExit) as status:
            run_script(lambda _, flags=flags: trainer(method).main([*argv, *flags, "--max_memory_gb", "0.0001"]))
        assert status.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"{method}_train.py: error: about")
        assert set(re.findall("--[a-z_]+(?: on| nf4| adamw_8bit)?", message)) == always | advice
    assert not (here / "never").exists()


def test_plan_of_the_default_student(tmp_path, tokenizer, training_files, capsys):
    """The shape of Qwen2.5-3B, with no weights: the recipe for large students, its size measured and by arithmetic."""
    from transformers import Qwen2Config

    folder = tmp_path / "qwen2.5-3b"
    Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    argv = [
        "--student",
        str(folder),
        "--data",
        training_files["sft"],
        "--save_dir",
        str(tmp_path / "never"),
        "--dry_run",
    ]
    assert sft_train.main([*argv, "--compute_dtype", "bfloat16"]) == 0
    plan = capsys.readouterr().out
    assert "of 1 x 8 rows" in plan and "learning rate        0.0002" in plan
    assert "trainable parameters 29,933,568" in plan
    total, weights = (float(plan.split(mark)[1].split()[0].rstrip(",")) for mark in ("estimated memory", "(weights"))
    assert weights == pytest.approx(2.01, abs=0.1)  # measured for this shape in NF4
    assert weights < total < 8


@pytest.mark.parametrize(("key", "value"), [(16, 16), (64, 16), (128, 128)])
def test_what_gated_delta_layers_save_is_in_the_estimate(key, value, tmp_path):
    """Measured at the kernel, which keeps more than the rest of the layer does."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    heads |= {"linear_key_head_dim": key, "linear_value_head_dim": value}
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    shape("qwen3_5_text", num_hidden_layers=4, layer_types=kinds, head_dim=16, **heads).save_pretrained(tmp_path)
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    query, keys, values = (torch.randn(1, 256, 2, width, dtype=torch.bfloat16) for width in (key, key, value))
    inputs = [tensor.requires_grad_() for tensor in (query, keys, values)]
    decay, beta = -torch.rand(1, 256, 2, requires_grad=True), torch.rand(1, 256, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch_chunk_gated_delta_rule(*inputs, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert memory.Sizes.of(str(tmp_path)).state == pytest.approx(0.75 * saved / 256, rel=0.05)
