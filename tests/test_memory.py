"""The tracker of bench/memory_8gb.py against cases worked out by hand, and the estimate that trainers refuse by
against tracked steps of small models."""

from __future__ import annotations

import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig

import training
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import memory_8gb
from memory_8gb import StorageTracker

GPU = torch.cuda.is_available()


def shape(kind: str, **other):
    """A configuration wide enough that activations and logits outweigh what the estimate leaves out."""
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


def test_row_sizes_by_hand():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
        {"input_ids": [1, 2, 9, 4, 5, 6], "labels": [-100, -100, -100, 4, 5, 6]},
        {"input_ids": [1, 2, 3, 7], "labels": [-100, -100, 3, 7]},
    ]
    assert training.row_sizes(Dataset.from_list(rows)) == {"longest": 6, "answer": 3, "shared": 2}
    # A row alone shares all with itself; what its answer needs is not run apart.
    assert training.row_sizes(Dataset.from_list(rows[:1])) == {"longest": 5, "answer": 2, "shared": 2}


def test_model_in_nf4_takes_what_the_estimate_says(small, tokenizer, tmp_path):
    small.save_pretrained(tmp_path)
    model = memory_8gb.random_model(small, tokenizer)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in memory_8gb.weights_of(model)}
    size = training.Sizes.of(str(tmp_path))
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
    "kd": ("kd", []),
    "dpo": ("dpo", []),
    "dpo, checkpoints": ("dpo", ["--gradient_checkpointing", "on"]),
}


@pytest.mark.skipif(GPU, reason="tracks the CPU's kernels")
@pytest.mark.parametrize("name", POINTS)
def test_estimate_of_a_step(name, small, tokenizer):
    """Within 10 % of the tracked peak of the trainer's own step."""
    task, flags = POINTS[name]
    tokens = 200 if "--max_length" in flags else 300
    peak, estimate = memory_8gb.training_point(task, small, tokenizer, 4, tokens, 9, flags)
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
    flags = ["--gradient_checkpointing", "on", "--lora_dropout", 0.1]
    if task == "score":
        peaks = [memory_8gb.scoring_point(small, tokenizer, 2, 80, filled)[0] for filled in (True, False)]
    else:
        peaks = [
            memory_8gb.training_point(task, small, tokenizer, 2, 80, 5, flags, filled)[0] for filled in (True, False)
        ]
    assert peaks[1] == {kind: pytest.approx(size, rel=0.005) for kind, size in peaks[0].items()}


def test_the_fused_head_scores_answers_alone(small, tokenizer, monkeypatch):
    """As TRL has it on a CPU every position goes through the head: the same loss and gradients, more memory."""
    import trl.trainer.utils
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small)
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(0, 448, (3, 40))
    labels = ids.masked_fill(torch.arange(40) < torch.tensor([[30], [35], [20]]), -100)
    results = []
    for every in (False, True):
        if every:
            monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: device.type == "cuda")
        model.zero_grad()
        with StorageTracker(widths=[small.vocab_size]) as tracker:
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        results.append((out.log_probs, out.mean_logits, out.is_top1, out.loss, grads, tracker.peak["logits"]))
    for one, other in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(results[0][4], results[1][4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert GPU or results[0][5] < results[1][5]
