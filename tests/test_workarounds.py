"""Patches of libraries that training needs (distil/workarounds.py): each test fails without its patch."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from conftest import adapter_tensors, assert_same_tensors

from common import PromptEncoder, lora_config
from distil import workarounds
from distil.testing import ROOT, load_named
from distil.training import loss, run
from distil.workarounds import compute_fused_head_where_supervised, pack_for_decoding


def gradients_around_an_evaluation(model_dir, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all LoRA gradients of one batch, before and after a forward as an evaluation makes it.

    packed: let bitsandbytes pack its weights, as it does by default."""
    from peft import get_peft_model

    model, tokenizer = load_named(model_dir, "nf4", "bfloat16", trainable=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            assert not module.support_avx512bf16_for_cpu
            module.support_avx512bf16_for_cpu = packed
    model = get_peft_model(model, lora_config(dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    ids = torch.tensor([PromptEncoder(tokenizer).prompt("Debt: 12, Age: 30")])

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return before, gradients()


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_gradients_are_the_same_after_an_evaluation(folder, request):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        before, after = gradients_around_an_evaluation(request.getfixturevalue(folder))
    assert before.abs().max() > 1e-3
    assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered.*")
def test_with_packed_weights_the_gradients_would_be_wrong(model_dir, llama_dir):
    """Show that the test above tests something on this processor."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the packed 4-bit CPU kernel needs AVX512-BF16, which this processor does not have")
    before, after = gradients_around_an_evaluation(llama_dir, packed=True)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) < 0.99
    with pytest.raises(RuntimeError, match="in-place operation"):  # projections with a bias fail loudly
        gradients_around_an_evaluation(model_dir, packed=True)


def test_an_evaluation_inside_training_changes_nothing(train, monkeypatch):
    """The same through a complete run: an eval-mode forward after each step leaves the weights as they would be."""
    from transformers import TrainerCallback

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]))
            model.train()

    flags = ("--max_steps", 6, "--learning_rate", "3e-3", "--compute_dtype", "bfloat16")
    plain = train("sft", "plain", *flags)
    original = run.train_and_save

    def watched(trainer, *rest):
        trainer.add_callback(Evaluate())
        original(trainer, *rest)

    monkeypatch.setattr(run, "train_and_save", watched)
    assert_same_tensors(adapter_tensors(plain), adapter_tensors(train("sft", "evaluated", *flags)), atol=0)


def test_a_kernel_without_gradients_ends_the_training(train, monkeypatch):
    """torch only warns, and what is trained is wrong (TRL and the Trainer show no warning but in the log)."""
    real = loss.CompletionTrainer.compute_loss

    def warning(self, *args, **kwargs):
        warnings.warn("gemv_4bit: an autograd kernel was not registered to the Autograd key", stacklevel=1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss.CompletionTrainer, "compute_loss", warning)
    with pytest.raises(UserWarning, match="autograd kernel"):
        train("sft", "warned")


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_packed_weights_serve_forwards_of_few_tokens_alone(folder, request):
    """Decoding takes the packed kernel, whose scales are rounded to bf16; prompts keep the weights as they are."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("the packed 4-bit CPU kernel needs AVX512-BF16, which this processor does not have")
    model, _ = load_named(request.getfixturevalue(folder), "nf4", "bfloat16")
    few, many = torch.tensor([[5, 6, 7]]), torch.arange(5, 45)[None]

    def logits(ids):
        with torch.inference_mode():
            return model(input_ids=ids).logits.float()

    before = logits(few), logits(many)
    pack_for_decoding(model)
    after = logits(few), logits(many)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[0], after[0], rtol=0.1, atol=0.1)


def test_adapters_train_in_float32_and_without_rounding(built, model_dir, training_files, sft_adapter):
    """TRL casts a 4-bit model's adapters to bf16; here they start at the adapter's values, bit-identical."""
    saved = adapter_tensors(sft_adapter)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())
    for method in ("kd", "dpo"):
        model = built(method, "--adapter", sft_adapter, "--data", training_files[method], "--save_dir", "never").model
        start = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if ".default." in n}
        assert_same_tensors(saved, start, atol=0)
        if method == "dpo":  # the reference is the adapter itself
            reference = {
                n.replace(".ref", ""): p.detach().float() for n, p in model.named_parameters() if ".ref." in n
            }
            assert_same_tensors(saved, reference, atol=0)
    model = built("sft", "--student", model_dir, "--data", training_files["sft"], "--save_dir", "never").model
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}


def test_the_fused_head_scores_answers_alone(monkeypatch):
    """As TRL has it on a CPU every position goes through the head: the same loss and gradients, more memory."""
    import trl.trainer.utils
    from transformers import AutoConfig, AutoModelForCausalLM

    from bench.memory_8gb import StorageTracker

    small = AutoConfig.for_model(
        "qwen2",
        vocab_size=4480,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # restored at the end
    compute_fused_head_where_supervised()
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
    assert torch.cuda.is_available() or results[0][5] < results[1][5]


def test_every_patch_names_a_test_that_exists():
    named = re.findall(r"(?m)^ *test +(tests/\w+\.py): (\w+)", inspect.getsource(workarounds))
    assert len(named) >= 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
