"""The loss of knowledge distillation: by hand, at its ends, and what it teaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import EXACT, adapter_tensors, assert_same_tensors, write_lines

import kd_train
from common import PromptEncoder
from distil.scoring import FastLabelScorer
from distil.testing import load_named
from distil.training import loss, memory

LABELS = ("Good", "Standard", "Bad")


def test_kd_keeps_its_loss_for_answers_of_any_length(train, monkeypatch):
    """TRL's fused head knows no teacher: what would send SFT through it must not take KD's term away."""
    short = train("kd", "short", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    monkeypatch.setattr(memory, "MAX_LOGITS_BYTES", 0)
    long = train("kd", "long", *EXACT, "--batch_size", 2, "--grad_accum", 2)
    assert_same_tensors(adapter_tensors(short), adapter_tensors(long), atol=0)


def test_kd_with_alpha_zero_is_sft(train):
    sft = train("sft", "sft", *EXACT, "--batch_size", 4)
    kd = train("kd", "kd", *EXACT, "--batch_size", 4, "--kd_alpha", 0)
    assert_same_tensors(adapter_tensors(sft), adapter_tensors(kd), atol=1e-6)
    hard = train("kd", "hard", *EXACT, "--batch_size", 4, rows="kd_hard")  # no label_probs: alpha has nothing to weigh
    assert_same_tensors(adapter_tensors(sft), adapter_tensors(hard), atol=1e-6)


def kd_batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(1)) * 2
    # The first row's answer has two tokens, the second's three.
    batch = {"labels": torch.tensor([4, 9, 7, 2, 9]), "starts": torch.tensor([0, 2])}
    return logits, {**batch, "label_probs": torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8]])}


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_kd_loss_by_hand(alpha, temperature):
    logits, batch = kd_batch()
    ids = [4, 7, 1]
    result = kd_train.distillation_loss_sum(logits, batch, ids, alpha, temperature)

    def softmax(values):
        powers = np.exp(values - values.max())
        return powers / powers.sum()

    expected, scores = 0.0, logits.double().numpy()
    for position, label in enumerate((4, 9, 7, 2, 9)):
        expected -= (1 - alpha) * np.log(softmax(scores[position])[label])
    for row, position in enumerate((0, 2)):
        student = softmax(scores[position, ids] / temperature)
        teacher = batch["label_probs"][row].double().numpy() ** (1 / temperature)
        teacher /= teacher.sum()
        expected += alpha * temperature**2 * (teacher * np.log(teacher / student)).sum()
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_kd_loss_at_its_ends():
    logits, batch = kd_batch()
    ids = [4, 7, 1]
    cross_entropy = loss.cross_entropy_sum(logits, batch)
    assert kd_train.distillation_loss_sum(logits, batch, ids, 0.0, 2.0) == cross_entropy
    logits[0, ids] = batch["label_probs"][0].log() + 3.0  # student = teacher, whatever the other tokens have
    logits[2, ids] = batch["label_probs"][1].log() - 1.0
    for temperature in (0.5, 1.0, 3.0):
        value = kd_train.distillation_loss_sum(logits, batch, ids, 1.0, temperature).item()
        assert value == pytest.approx(0, abs=1e-5)
    batch["label_probs"] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # one-hot: finite all the same
    logits.requires_grad_()
    value = kd_train.distillation_loss_sum(logits, batch, ids, 1.0, 1.0)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(logits.grad).all()


def test_a_sure_teacher_decides_the_label(train, training_files, model_dir, tmp_path):
    """alpha = 1: label_probs teach the label, against the answers' text; labels may come in any order in a row."""
    turns = [f"Debt: {number}" for number in range(8)]
    rows = []
    for number, turn in enumerate(turns):
        probs = {label: float(label == "Bad") for label in (LABELS if number % 2 else LABELS[::-1])}
        rows.append({"input": turn, "teacher_output": "Good", "label_probs": probs})
    path = write_lines(tmp_path / "sure.jsonl", rows)
    flags = ("--data", path, "--kd_alpha", 1, "--learning_rate", "3e-3", "--max_steps", 40)
    model, tokenizer = load_named(str(train("kd", "sure", *flags)))
    scorer = FastLabelScorer(model, PromptEncoder(tokenizer), {label: [label] for label in LABELS})
    scores = scorer.raw_scores(turns)
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert (probabilities[:, LABELS.index("Bad")] > 0.8).all()


@pytest.mark.parametrize("rows", ["kd", "kd_hard"])
def test_kd_without_label_probs_reports_that_alpha_has_no_effect(rows, train, capsys):
    train("kd", "run", rows=rows)
    assert ("no label_probs" in capsys.readouterr().err) == (rows == "kd_hard")
