"""Distillation from cached token probabilities: the loss by hand, in chunks, in training, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    EXACT,
    adapter_tensors,
    assert_same_tensors,
    first_step,
    read_lines,
    refused,
    write_lines,
)

import kd_train
from distil import heads
from distil.testing import with_token_probs
from distil.token_probs import TokenProbs

VOCABULARY, TOKENS = 50, 6
WAYS = [(1.0, 1.0), (0.9, 2.0), (0.3, 0.5)]


def random_batch(k: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits [tokens, vocabulary], the teacher's log-probabilities and the batch with the K most probable."""
    generator = torch.Generator().manual_seed(k)
    logits, scores = (3 * torch.randn(TOKENS, VOCABULARY, generator=generator) for _ in range(2))
    teacher = torch.log_softmax(scores, dim=-1)
    kept, ids = teacher.topk(k)
    batch = {"labels": torch.arange(TOKENS) * 7 % VOCABULARY, "token_ids": ids, "token_log_probs": kept}
    left = teacher.scatter(1, ids, -math.inf).logsumexp(dim=-1)
    return logits.requires_grad_(), teacher, batch | {"token_rest": left}


def value_and_gradient(logits, batch, alpha, temperature) -> tuple[float, torch.Tensor]:
    value = kd_train.token_distillation_loss_sum(logits, batch, alpha, temperature)
    return value.item(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize(("alpha", "temperature"), WAYS)
def test_with_the_complete_vocabulary_it_is_the_full_kl(alpha, temperature):
    logits, teacher, batch = random_batch(VOCABULARY)
    assert batch["token_rest"].isinf().all()
    value, gradient = value_and_gradient(logits, batch, alpha, temperature)
    student, soft = (torch.log_softmax(x / temperature, dim=-1) for x in (logits, teacher))
    divergence = torch.nn.functional.kl_div(student, soft, reduction="sum", log_target=True)
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    full = (1 - alpha) * nll + alpha * temperature**2 * divergence
    assert value == pytest.approx(full.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(full, logits)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("alpha", "temperature"), WAYS)
def test_four_tokens_and_the_rest_by_hand(alpha, temperature):
    """In float64, token by token; one token has two of the four alone, as an endpoint may give them."""
    logits, _, batch = random_batch(4)
    batch["token_ids"][2, 2:], batch["token_log_probs"][2, 2:] = -1, -math.inf
    batch["token_rest"][2] = math.log(1 - batch["token_log_probs"][2, :2].exp().sum())
    expected = 0.0
    for position in range(TOKENS):
        q = torch.softmax(logits[position].detach().double(), dim=-1)
        ids = [i for i in batch["token_ids"][position].tolist() if i >= 0]
        p = batch["token_log_probs"][position, : len(ids)].double().exp()
        teacher = torch.cat([p, batch["token_rest"][position].double().exp()[None]]) ** (1 / temperature)
        student = torch.cat([q[ids], 1 - q[ids].sum(dim=0, keepdim=True)]) ** (1 / temperature)
        teacher, student = teacher / teacher.sum(), student / student.sum()
        expected -= (1 - alpha) * math.log(q[batch["labels"][position]])
        expected += alpha * temperature**2 * (teacher * (teacher / student).log()).sum().item()
    value, gradient = value_and_gradient(logits, batch, alpha, temperature)
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient[2].count_nonzero() == VOCABULARY  # what is not among the two is in the rest


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_are_numbers_at_the_ends(temperature):
    """A teacher that is sure of one token; a student that gives the rest next to nothing; ids past the vocabulary."""
    logits, _, batch = random_batch(4)
    with torch.no_grad():
        logits.scatter_(1, batch["token_ids"], 200.0)
    batch["token_ids"][0], batch["token_log_probs"][0] = (
        torch.tensor([3, -1, -1, -1]),
        torch.tensor([0, *[-math.inf] * 3]),
    )
    batch["token_rest"][0] = -math.inf
    batch["token_ids"][1, 3] = VOCABULARY
    batch["token_ids"][2], batch["token_log_probs"][2], batch["token_rest"][2] = -1, -math.inf, 0.0
    value, gradient = value_and_gradient(logits, batch, 0.5, temperature)
    assert math.isfinite(value) and gradient.isfinite().all()
    assert gradient[0, 3] < 0  # the sure token is taught: what the student gives to others counts
    logits, teacher, batch = random_batch(4)
    same = teacher.requires_grad_()  # a student that is the teacher
    value, gradient = value_and_gradient(same, batch, 1.0, temperature)
    assert value == pytest.approx(0, abs=1e-5) and gradient.abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def rows(training_files, tokenizer, tmp_path) -> list[dict]:
    """Return rows with answers of many lengths and a random teacher's four most probable tokens."""
    return with_token_probs(read_lines(training_files["kd_hard"]), tmp_path, tokenizer)


@pytest.fixture
def cached(rows, tmp_path) -> str:
    return write_lines(tmp_path / "tokens.jsonl", rows)


def small_chunks(monkeypatch, tokens: int, vocabulary: int) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * vocabulary * tokens)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_chunks_change_neither_loss_nor_gradients(checkpointing, built, model_dir, cached, monkeypatch):
    flags = ("--quantization", "none", "--compute_dtype", "float32", "--lora_dropout", 0)
    flags += ("--gradient_checkpointing", checkpointing, "--kd_temperature", 2)
    trainer = built("kd", "--student", model_dir, "--data", cached, "--save_dir", "never", *flags)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start: lora_A would have no gradient
            torch.nn.init.normal_(parameter.data, std=0.1)
    head, widths = trainer.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, inputs, output: widths.append(output.shape[1]))
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokens = len(batch["token_ids"])
    assert tokens == (batch["labels"] != -100).sum()

    def result(at_once: int) -> tuple[float, float, torch.Tensor, int]:
        trainer._at_once = at_once
        trainer.model.zero_grad()
        widths.clear()
        value = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        value.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        return value.item(), trainer._metrics["train"]["mean_token_accuracy"][-1], torch.cat(gradients), max(widths)

    whole, parts = result(tokens), result(7)
    assert (whole[3], parts[3]) == (tokens, 7) and sum(widths) >= 2 * tokens  # forward and backward
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-5) and whole[2].abs().max() > 1e-2
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-4, atol=1e-5)


def test_accumulation_and_checkpointing_change_nothing(train, cached, tokenizer, monkeypatch):
    small_chunks(monkeypatch, 5, len(tokenizer))
    flags = (*EXACT, "--data", cached)
    whole = train("kd", "whole", *flags, "--batch_size", 4, "--grad_accum", 1)
    parts = train("kd", "parts", *flags, "--batch_size", 1, "--grad_accum", 4)
    saving = train("kd", "saving", *flags, "--batch_size", 4, "--grad_accum", 1, "--gradient_checkpointing", "on")
    for other in (parts, saving):
        assert_same_tensors(adapter_tensors(whole), adapter_tensors(other), atol=2e-5)
        for name in ("loss", "grad_norm"):  # of the first step, before clipping
            assert first_step(other)[name] == pytest.approx(first_step(whole)[name], rel=1e-4)


def test_the_student_comes_near_the_teacher(train, cached, capsys):
    """By KL alone, against the text of the answers."""
    flags = ("--data", cached, "--kd_alpha", 1, "--learning_rate", "3e-3", "--max_steps", 60)
    curve = json.loads((train("kd", "run", *flags) / "training_curve.json").read_text())
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert "no effect" not in capsys.readouterr().err


def test_files_of_several_k_train_together(training_files, built, model_dir, tokenizer, tmp_path):
    rows = read_lines(training_files["kd_hard"])
    both = with_token_probs(rows[:3], tmp_path, tokenizer, k=4) + with_token_probs(rows[3:], tmp_path, tokenizer, k=9)
    path = write_lines(tmp_path / "both.jsonl", both[::-1])
    trainer = built("kd", "--student", model_dir, "--data", path, "--save_dir", "never")
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["token_ids"].shape[1] == 9
    few = (batch["token_ids"] == -1).sum(dim=1)
    assert few.unique().tolist() == [0, 5] and batch["token_log_probs"][few == 5, 4:].isinf().all()
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_another_file_of_the_same_name_is_refused(rows, tokenizer, tmp_path, model_dir):
    (folder := tmp_path / "other").mkdir()
    other = with_token_probs(rows, folder, tokenizer, seed=1)
    shutil.copy(folder / other[0]["token_probs"]["file"], tmp_path / rows[0]["token_probs"]["file"])
    assert "its content is not that which its name has the hash of" in refused("kd", rows, tmp_path, model_dir)


def test_rows_without_probabilities_are_refused(rows, tmp_path, model_dir):
    few = [*rows[:7], *({name: value for name, value in row.items() if name != "token_probs"} for row in rows[7:])]
    error = refused("kd", few, tmp_path, model_dir)
    assert '3 of 10 rows have no "token_probs"' in error and "kd_prepare.py --top_k" in error


def test_another_tokenizer_or_a_changed_answer_is_refused(rows, tmp_path, model_dir):
    rows[3]["teacher_output"] += " and more"
    error = refused("kd", rows, tmp_path, model_dir)
    assert error.startswith(f"{tmp_path / 'rows.jsonl'}: row 4: ") and "another tokenizer" in error
    rows[3]["token_probs"]["file"] = "gone.safetensors"
    assert "row 4: " in (error := refused("kd", rows, tmp_path, model_dir)) and "no such file" in error


def test_label_probs_next_to_them_are_not_used(rows, train, cached, tmp_path, capsys):
    both = [row | {"label_probs": {"Good": 0.5, "Bad": 0.5}} for row in rows]
    one = train("kd", "both", "--data", write_lines(tmp_path / "both.jsonl", both))
    assert capsys.readouterr().err.count("label_probs are not used") == 1
    assert_same_tensors(adapter_tensors(one), adapter_tensors(train("kd", "tokens", "--data", cached)), atol=0)


def test_arrays_stay_on_disk(rows, built, model_dir, cached):
    """The trainer's rows have references alone, and batches read what they refer to."""
    trainer = built("kd", "--student", model_dir, "--data", cached, "--save_dir", "never")
    assert trainer.train_dataset[2]["token_probs"] == rows[2]["token_probs"]
    batch = trainer.data_collator([trainer.train_dataset[2]])
    answer = [label for label in trainer.train_dataset[2]["labels"] if label != -100]
    row = TokenProbs(Path(cached).parent).row(rows[2]["token_probs"], answer)
    assert batch["token_ids"].tolist() == row.ids.tolist() and batch["token_rest"].tolist() == row.rest.tolist()
