"""The completion loss: equivalences with TRL's, with accumulation, padding, checkpointing and shared beginnings.

Equivalences are tested with SGD, since Adam hides a gradient of the wrong scale, and on the gradient norm of the first
step, since clipping hides it too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import EXACT, METHODS, adapter_tensors, assert_same_tensors, first_step, run_json, write_lines

from distil.training import loss, memory


@pytest.mark.parametrize("method", ["sft", "kd", "kd_hard", "dpo"])
def test_batch_of_four_equals_four_accumulated(method, train):
    """Not so TRL's SFT term of DPO: it is a mean over the answer tokens of each forward."""
    script, flags = method.split("_")[0], [*EXACT, *(("--sft_weight", 0) if method == "dpo" else ())]
    whole = train(script, "whole", *flags, "--batch_size", 4, "--grad_accum", 1, rows=method)
    parts = train(script, "parts", *flags, "--batch_size", 1, "--grad_accum", 4, rows=method)
    pairs = train(script, "pairs", *flags, "--batch_size", 2, "--grad_accum", 2, rows=method)
    assert run_json(whole)["metrics"]["steps"] == 6
    start = adapter_tensors(train(script, "start", *flags, "--learning_rate", 0, rows=method))
    moved = max((start[name] - tensor).abs().max() for name, tensor in adapter_tensors(whole).items())
    assert moved > 1e-3  # the tolerance below is small against the way the weights went
    for other in (parts, pairs):
        assert_same_tensors(adapter_tensors(whole), adapter_tensors(other), atol=2e-5)
        for name in ("loss", "grad_norm"):  # of the first step, before clipping
            assert first_step(other)[name] == pytest.approx(first_step(whole)[name], rel=1e-4)


def test_own_loss_trains_as_the_fused_head_does(train, monkeypatch):
    """Long answers go through TRL's fused head, short ones through ours: the weights must be the same."""
    own = train("sft", "own", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    monkeypatch.setattr(memory, "MAX_LOGITS_BYTES", 0)
    fused = train("sft", "fused", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    assert_same_tensors(adapter_tensors(own), adapter_tensors(fused), atol=2e-5)
    assert first_step(own)["grad_norm"] == pytest.approx(first_step(fused)["grad_norm"], rel=1e-4)


def test_all_batches_take_one_head(train, monkeypatch, tmp_path):
    """One long answer sends short ones through the fused head too: of several processes those with short answers
    would otherwise wait for sums that the others never form, and the estimate knows the longest alone."""
    rows = [{"input": f"Debt: {n}", "output": "Good Bad " * (9 if n == 7 else 1)} for n in range(8)]
    mixed = ("--data", write_lines(tmp_path / "mixed.jsonl", rows), "--batch_size", 1)
    own = []
    states = loss.supervised_states
    monkeypatch.setattr(loss, "supervised_states", lambda *args: own.append(1) or states(*args))
    train("sft", "below", *mixed)
    assert own
    own.clear()
    monkeypatch.setattr(loss, "logits_fit", lambda vocabulary, supervised: supervised < 15)
    train("sft", "above", *mixed)
    assert not own


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method, train):
    flags = ("--compute_dtype", "float32", "--optimizer", "sgd", "--learning_rate", "0.5", "--batch_size", 4)
    on, off = (train(method, value, *flags, "--gradient_checkpointing", value) for value in ("on", "off"))
    assert_same_tensors(adapter_tensors(on), adapter_tensors(off), atol=1e-5)


def test_loss_equals_that_of_trl(built, model_dir, training_files):
    from trl import SFTTrainer

    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0, "--batch_size", 4)
    trainer = built("sft", "--student", model_dir, "--data", training_files["sft"], "--save_dir", "never", *flags)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len({int((row != -100).sum()) for row in batch["labels"]}) > 1
    for items in (None, torch.tensor(40)):
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    right = trainer._metrics["train"]["mean_token_accuracy"]
    assert right[0] == pytest.approx(right[1])


@pytest.mark.parametrize("folder", ["model_dir", "llama_dir"])
def test_a_shared_beginning_is_run_once_with_the_same_gradients(folder, built, training_files, monkeypatch, request):
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0)
    start = ("--student", request.getfixturevalue(folder), "--data", training_files["kd"], "--save_dir", "never")
    trainer = built("kd", *start, *flags)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start: lora_A would have no gradient
            torch.nn.init.normal_(parameter.data, std=0.1)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    widths = []

    def gradients() -> torch.Tensor:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])

    embeddings = trainer.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: widths.append(tuple(inputs[0].shape)))
    once = gradients()
    monkeypatch.setattr(loss, "shared_columns", lambda ids, most: 0)
    plain = gradients()
    (first, shared), (rows, rest), whole = widths
    assert (first, rows) == (1, 4) and shared >= 16 and (4, shared + rest) == whole
    assert plain.abs().max() > 1e-2
    torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-5)


def test_how_much_of_its_beginning_a_batch_shares():
    ids = torch.tensor([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 3, 4, 8]])
    assert loss.shared_columns(ids, 5, 2) == 3
    assert loss.shared_columns(ids, 2, 2) == 2  # no further than the token before the first answer
    assert loss.shared_columns(ids[[0, 0]], 4, 2) == 4
    assert loss.shared_columns(ids[:1], 5, 2) == 0  # one row: nothing to save
    assert loss.shared_columns(ids, 1, 2) == 0


def test_only_supervised_positions_go_through_the_head(built, model_dir, training_files):
    start = ("--student", model_dir, "--data", training_files["sft"], "--save_dir", "never")
    trainer = built("sft", *start, "--quantization", "none", "--compute_dtype", "float32")
    batch = next(iter(trainer.get_train_dataloader()))
    positions = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: positions.append(output.shape[:-1].numel()))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    *others, selected = positions
    assert selected == int((batch["labels"] != -100).sum())
    assert others in ([1], [1, 1])  # the last position of what goes before it, and of a common beginning


def test_padding_does_not_change_the_loss(built, model_dir, training_files):
    """Rows one by one and all in one batch have the same summed loss."""
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0)
    trainer = built("kd", "--student", model_dir, "--data", training_files["kd"], "--save_dir", "never", *flags)
    rows, one = list(trainer.train_dataset), torch.tensor(1)
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model, trainer.data_collator(rows), num_items_in_batch=one)
        alone = [trainer.compute_loss(trainer.model, trainer.data_collator([r]), num_items_in_batch=one) for r in rows]
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)


def test_label_probs_in_sft_rows_are_not_used(train, training_files, tmp_path):
    rows = [
        json.loads(line) | {"label_probs": {"Good": 0.5, "Bad": 0.5}}
        for line in Path(training_files["sft"]).read_text().splitlines()
    ]
    with_probs = train("sft", "with", "--data", write_lines(tmp_path / "rows.jsonl", rows))
    assert_same_tensors(adapter_tensors(with_probs), adapter_tensors(train("sft", "without")), atol=0)
