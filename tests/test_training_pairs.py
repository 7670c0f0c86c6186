"""DPO: the reference at the start, beta, the SFT term, and prompts that both answers of a pair share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import EXACT, adapter_tensors, assert_same_tensors, first_step, write_lines

import dpo_train
import sft_train
from distil.training import pairs


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_dpo_starts_at_its_reference(start, train, sft_adapter, monkeypatch):
    """Policy and reference agree at first: the loss is ln 2 whatever the dropout, which TRL switches off for both."""
    folders = []
    for dropout in (0.0, 0.5) if start == "base" else (0.0,):
        monkeypatch.setitem(dpo_train.SMALL, "lora_dropout", dropout)
        flags = ["--adapter", sft_adapter] if start == "adapter" else ["--sft_weight", 0]
        folders.append(train("dpo", f"run{dropout}", *flags, base=start == "base"))
    for folder in folders:
        assert first_step(folder)["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first_step(folder)["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert_same_tensors(adapter_tensors(folders[0]), adapter_tensors(folders[-1]), atol=0)


def test_from_a_base_the_answers_are_taught_too(train, sft_adapter):
    """An SFT term at SFT's rate, which DPO from an adapter and DPO that refuses the term do not have."""
    given = {"base": [], "alone": ["--sft_weight", 0], "adapter": ["--adapter", sft_adapter]}
    folders = {name: train("dpo", name, *flags, base=name != "adapter") for name, flags in given.items()}
    flags = {name: json.loads((folder / "run.json").read_text())["flags"] for name, folder in folders.items()}
    small = dpo_train.SMALL["learning_rate"]
    assert {name: (one["sft_weight"], one["learning_rate"]) for name, one in flags.items()} == {
        "base": (1, sft_train.SMALL["learning_rate"]),
        "alone": (0, small),
        "adapter": (0, small),
    }
    assert first_step(folders["base"])["loss"] > 2 * math.log(2) > first_step(folders["alone"])["loss"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_a_prompt_is_run_once_with_the_same_gradients(folder, attention, built, tmp_path, monkeypatch, request):
    answers = [("Good", "Bad Bad Standard"), ("Bad Good", "Good"), ("Standard", "Bad"), ("Bad", "Good Bad")]
    rows = [
        {"prompt": "Age: " + "4 " * length, "chosen": chosen, "rejected": rejected}
        for length, (chosen, rejected) in zip((0, 9, 4, 1), answers, strict=True)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--sft_weight", 0.5)
    start = ("--student", request.getfixturevalue(folder), "--data", path, "--save_dir", "never")
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "share_prompts", lambda model: None)
        trainer = built("dpo", *start, *flags)
    trainer.model.set_attn_implementation(attention)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start: policy and reference would be one
            torch.nn.init.normal_(parameter.data, std=0.1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    base, shapes, logged = trainer.model.get_base_model(), [], []
    base.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )

    def step() -> torch.Tensor:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        logged.append({name: values.pop() for name, values in trainer._metrics["train"].items() if values})
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        return torch.cat([loss.detach()[None], *gradients])

    twice = step()
    pairs.share_prompts(base)
    once = step()
    (sequences, width), reference, (paired, columns), _ = shapes
    assert reference == (sequences, width) == (8, width) and paired == 4 and columns < 1.2 * width
    assert twice[1:].abs().max() > 1e-2
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
    assert {"rewards/chosen", "logits/rejected", "mean_token_accuracy", "entropy"} <= logged[0].keys()
    assert logged[1].pop("num_tokens") == 2 * logged[0].pop("num_tokens")  # it is cumulative
    assert logged[1] == pytest.approx(logged[0], rel=1e-4, abs=1e-5)


def test_prompts_are_run_once_only_where_it_is_right_and_pays(model_dir, llama_dir, training_files, tmp_path, built):
    def pays(folder, prompt=40, answer=3, **changes) -> bool:
        config = json.loads((Path(folder) / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return pairs.prompts_pay(
            str(tmp_path), [{"prompt_ids": [1] * prompt, "chosen_ids": [1] * answer, "rejected_ids": [1] * answer}]
        )

    assert pays(model_dir) and pays(llama_dir)
    assert not pays(model_dir, prompt=40, answer=20)  # attention over the longer row would cost more than it saves
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    assert not pays(model_dir, **window, layer_types=["sliding_attention"] * 2)
    assert not pays(llama_dir, model_type="mistral", sliding_window=8)
    assert not pays(llama_dir, model_type="gemma3_text")
    rows = [{"prompt": "Age: 3", "chosen": "Good " * 30, "rejected": "Bad " * 30}] * 2
    flags = ("--student", model_dir, "--save_dir", "never")
    for file, own in ((training_files["dpo"], True), (write_lines(tmp_path / "long.jsonl", rows), False)):
        forward = built("dpo", *flags, "--data", file).model.get_base_model().forward
        assert (forward.__name__ == "paired") == own


def test_beta_reaches_the_loss(built, train, model_dir, training_files):
    flags = ("--student", model_dir, "--data", training_files["dpo"], "--save_dir", "never")
    trainer = built("dpo", *flags, "--beta", 0.37, "--sft_weight", 0)
    assert trainer.args.beta == trainer.beta == 0.37
    assert trainer.args.loss_type == ["sigmoid"]
    trainer = built("dpo", *flags, "--sft_weight", 0.5)
    assert (trainer.args.loss_type, trainer.args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert trainer.args.beta == 0.1


def test_beta_scales_the_first_gradient(train):
    flags = (*EXACT, "--batch_size", 4, "--sft_weight", 0)
    small, large = (train("dpo", f"beta{beta}", *flags, "--beta", beta) for beta in (0.1, 0.2))
    assert first_step(large)["grad_norm"] == pytest.approx(2 * first_step(small)["grad_norm"], rel=1e-4)


def test_the_sft_term_of_dpo_is_the_loss_of_sft(train):
    """At the start the preference loss is ln 2, and the term is what SFT loses on the chosen answers."""
    flags = ("--compute_dtype", "float32", "--quantization", "none", "--batch_size", 10, "--max_steps", 1)
    losses = [first_step(train("dpo", f"w{w}", *flags, "--sft_weight", w))["loss"] for w in (0, 1, 2)]
    sft_loss = first_step(train("sft", "sft", *flags))["loss"]
    assert losses == pytest.approx([math.log(2) + weight * sft_loss for weight in (0, 1, 2)], rel=1e-4)
