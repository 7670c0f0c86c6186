"""The loss of knowledge distillation: by hand, at its ends, and what it teaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import EXACT, adapter_tensors, assert_same_tensors, first_step, write_lines

import kd_train
from common import PromptEncoder
from distil.scoring import FastLabelScorer
from distil.testing import load_named
from distil.training import data, loss, memory

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
    # The first row's answer has two tokens, the second's three; three labels differ in their first token.
    batch = {"labels": torch.tensor([4, 9, 7, 2, 9]), "nodes": torch.tensor([0, 2])}
    batch["child_ids"] = torch.tensor([[4, 7, 1], [4, 7, 1]])
    return logits, {**batch, "child_probs": torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8]])}


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


ALPHAS = [(0.5, 1.0), (0.3, 2.0), (1.0, 0.5)]


@pytest.mark.parametrize(("alpha", "temperature"), ALPHAS)
def test_kd_loss_by_hand(alpha, temperature):
    """With a third node, of two children: at the end of the first row."""
    logits, batch = kd_batch()
    batch["nodes"] = torch.tensor([0, 1, 2])
    batch["child_ids"] = torch.tensor([[4, 7, 1], [9, 3, -1], [4, 7, 1]])
    batch["child_probs"] = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.4, 0.0], [0.05, 0.15, 0.8]])
    result = kd_train.distillation_loss_sum(logits, batch, alpha, temperature)
    expected, scores = 0.0, logits.double().numpy()
    for position, label in enumerate((4, 9, 7, 2, 9)):
        expected -= (1 - alpha) * np.log(softmax(scores[position])[label])
    nodes = [(0, [4, 7, 1], [0.7, 0.2, 0.1]), (1, [9, 3], [0.6, 0.4]), (2, [4, 7, 1], [0.05, 0.15, 0.8])]
    for position, ids, probabilities in nodes:
        student = softmax(scores[position, ids] / temperature)
        teacher = np.array(probabilities) ** (1 / temperature)
        teacher /= teacher.sum()
        expected += alpha * temperature**2 * (teacher * np.log(teacher / student)).sum()
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_kd_loss_at_its_ends():
    logits, batch = kd_batch()
    ids = [4, 7, 1]
    cross_entropy = loss.cross_entropy_sum(logits, batch)
    assert kd_train.distillation_loss_sum(logits, batch, 0.0, 2.0) == cross_entropy
    logits[0, ids] = batch["child_probs"][0].log() + 3.0  # student = teacher, whatever the other tokens have
    logits[2, ids] = batch["child_probs"][1].log() - 1.0
    for temperature in (0.5, 1.0, 3.0):
        value = kd_train.distillation_loss_sum(logits, batch, 1.0, temperature).item()
        assert value == pytest.approx(0, abs=1e-5)
    batch["child_probs"] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # one-hot: finite all the same
    batch["child_ids"][0, 2] = -1
    logits.requires_grad_()
    value = kd_train.distillation_loss_sum(logits, batch, 1.0, 1.0)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 4] != 0 and logits.grad[:, 1].count_nonzero() == 1  # the padding got nothing


def collated(encoder: PromptEncoder, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the batch of rows with label_probs, with the labels of its supervised tokens alone."""
    rows = data.TrainingData("rows", rows, "", {})
    dataset, _ = data.completion_dataset(rows, "teacher_output", encoder, 512)
    dataset = data.with_label_nodes(dataset, encoder, *data.label_probabilities(rows))
    batch = data.completion_collator(encoder.tokenizer.pad_token_id)(list(dataset))
    return {**batch, "labels": batch["labels"][batch["labels"] != -100]}


@pytest.mark.parametrize(("alpha", "temperature"), ALPHAS)
def test_labels_of_different_first_tokens_have_one_kl_bit_for_bit(alpha, temperature, tokenizer, training_files):
    """The formula for these alone: one KL a row, over the labels' first tokens at the assistant start."""
    encoder = PromptEncoder(tokenizer)
    rows = data.read_data(training_files["kd"], ()).rows
    batch = collated(encoder, rows)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(batch["labels"]), len(tokenizer), generator=generator).requires_grad_()
    value = kd_train.distillation_loss_sum(logits, batch, alpha, temperature)
    (gradient,) = torch.autograd.grad(value, logits)

    counts = torch.tensor([len(encoder.completion(row["teacher_output"])) for row in rows])
    starts, ids = counts.cumsum(dim=0) - counts, [encoder.label(label)[0] for label in LABELS]
    probabilities = torch.tensor([[row["label_probs"][label] for label in LABELS] for row in rows])
    student = torch.log_softmax(logits[starts][:, ids] / temperature, dim=-1)
    teacher = torch.log_softmax(probabilities.clamp(min=1e-6).log() / temperature, dim=-1)
    divergence = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    plain = (1 - alpha) * loss.cross_entropy_sum(logits, batch) + alpha * temperature**2 * divergence
    assert len(batch["nodes"]) == len(rows) and value == plain
    assert torch.equal(gradient, torch.autograd.grad(plain, logits)[0])


# Two labels share the first token, "Good" begins another one, and "Bad Bad" begins another one past its first token.
MANY = {"Good": 0.4, "Good enough": 0.25, "Bad Bad": 0.15, "Bad Bad Bad": 0.12, "Standard": 0.08}


def test_kl_along_answers_adds_up_to_the_kl_of_the_labels(tokenizer):
    """Chain rule: its mean over answers drawn from the teacher is the KL of the labels' own probabilities."""
    encoder, teacher = PromptEncoder(tokenizer), np.array(list(MANY.values()))
    batch = collated(encoder, [{"input": "-", "teacher_output": label, "label_probs": MANY} for label in MANY])
    answers = [encoder.completion(label) for label in MANY]
    prefixes = [tuple(ids[:length]) for ids in answers for length in range(len(ids))]
    children = {prefix: set() for prefix in prefixes}
    for ids in answers:
        for length, token in enumerate(ids):
            children[tuple(ids[:length])].add(token)
    assert sum(len(tokens) > 1 for tokens in children.values()) == 3
    generator, of_prefix = torch.Generator().manual_seed(3), {}
    for prefix in children:
        of_prefix[prefix] = torch.randn(len(tokenizer), generator=generator) * 2
    logits = torch.stack([of_prefix[prefix] for prefix in prefixes])

    student = np.ones(len(answers))  # over the labels alone: of each prefix those tokens that a label continues with
    for number, ids in enumerate(answers):
        for length, token in enumerate(ids):
            tokens = sorted(children[prefix := tuple(ids[:length])])
            student[number] *= softmax(of_prefix[prefix][tokens].double().numpy())[tokens.index(token)]
    assert student.sum() == pytest.approx(1)

    rows = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(ids) for ids in answers]))
    mean = 0.0
    for number, share in enumerate(teacher):
        chosen = rows[batch["nodes"]] == number
        one = batch | {name: batch[name][chosen] for name in ("nodes", "child_ids", "child_probs")}
        mean += share * kd_train.distillation_loss_sum(logits, one, 1.0, 1.0).item()
    assert mean == pytest.approx((teacher * np.log(teacher / student)).sum(), rel=1e-5)


def many_label_rows(count: int = 8) -> list[dict]:
    """Return rows of MANY labels, some with a reason, one with an answer that is no label."""
    rows = []
    for number in range(count):
        label = list(MANY)[number % len(MANY)]
        text = label if number % 3 else f"{label}. Because of the debt"
        probs = dict(zip(MANY, list(MANY.values())[number % 2 :] + list(MANY.values())[: number % 2], strict=True))
        rows.append({"input": f"Debt: {37 * number}", "teacher_output": text, "label_probs": probs})
    return [*rows[:-1], rows[-1] | {"teacher_output": "none"}]


def test_batch_of_four_equals_four_accumulated_with_labels_of_many_tokens(train, tmp_path):
    flags = (*EXACT, "--data", write_lines(tmp_path / "many.jsonl", many_label_rows()), "--kd_temperature", 2)
    whole = train("kd", "whole", *flags, "--batch_size", 4, "--grad_accum", 1)
    parts = train("kd", "parts", *flags, "--batch_size", 1, "--grad_accum", 4)
    assert_same_tensors(adapter_tensors(whole), adapter_tensors(parts), atol=2e-5)
    for name in ("loss", "grad_norm"):  # of the first step, before clipping
        assert first_step(parts)[name] == pytest.approx(first_step(whole)[name], rel=1e-4)


def test_labels_of_one_first_token_are_learnt_from_probabilities(train, model_dir, tmp_path):
    """alpha = 1, and both labels as answers to each prompt: the probabilities decide at the second token."""
    labels, turns = ["Bad Bad", "Bad Good"], [f"Debt: {number}" for number in range(8)]
    rows = [
        {"input": turn, "teacher_output": answer, "label_probs": dict(zip(labels, probs, strict=True))}
        for number, turn in enumerate(turns)
        for probs in ([(0.9, 0.1), (0.1, 0.9)][number % 2],)
        for answer in labels
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    flags = ("--data", path, "--kd_alpha", 1, "--learning_rate", "3e-3", "--max_steps", 60)
    model, tokenizer = load_named(str(train("kd", "pairs", *flags)))
    scores = FastLabelScorer(model, PromptEncoder(tokenizer), {x: [x] for x in labels}).raw_scores(turns)
    assert (scores.argmax(axis=1) == [number % 2 for number in range(8)]).all()


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
def test_kd_without_probabilities_reports_that_alpha_has_no_effect(rows, train, capsys):
    train("kd", "run", rows=rows)
    assert ("--kd_alpha has no effect" in capsys.readouterr().err) == (rows == "kd_hard")
