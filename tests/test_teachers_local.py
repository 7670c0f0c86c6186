"""A model as a teacher: label log-probabilities, their calibration, reasons and free text, resuming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FLOAT32, gold_rows, read_lines, write_lines

import kd_prepare
from common import InputError, PromptEncoder
from distil import heads
from distil.generation import Written
from distil.models import LoadOptions, resolve
from distil.scoring import FastLabelScorer
from distil.tasks import default_task
from distil.teachers import local
from distil.teachers.answers import RATIONALE, TeacherOptions
from distil.teachers.local import ModelTeacher
from distil.testing import load_named, save_adapter
from distil.token_probs import TokenProbs, TokenRow

TASK = default_task()


def ask(teacher: str, *flags: object, output: str = "kd.jsonl") -> list[dict]:
    """Return the rows that kd_prepare.py writes with a model as teacher of in.jsonl."""
    argv = ["--teacher", teacher, "--input", "in.jsonl", "--output", output, *FLOAT32, *flags]
    assert kd_prepare.main([str(flag) for flag in argv]) == 0
    return read_lines(output)


def label_scorer(model_dir: str, quantization: str = "none") -> FastLabelScorer:
    """Return a scorer of the CreditMix labels in alphabetical order."""
    model, tokenizer = load_named(model_dir, quantization, "float32")
    forms = {name: [name] for name in sorted(TASK.labels)}
    return FastLabelScorer(model, PromptEncoder(tokenizer), forms, batch_size=16)


def test_a_model_answers_label_tasks_by_calibrated_likelihood(here, model_dir):
    rows = gold_rows(9)
    write_lines("in.jsonl", rows)
    answers = ask(model_dir, "--batch_size", 4, "--calibration", "batch")
    names = sorted(TASK.labels)
    raw = label_scorer(model_dir).raw_scores([row["input"] for row in rows])
    logits = raw - raw.mean(axis=0)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, probabilities in zip(answers, wanted, strict=True):
        np.testing.assert_allclose([row["label_probs"][n] for n in names], probabilities, atol=1e-3)
        assert row["teacher_output"] == names[int(np.argmax([row["label_probs"][n] for n in names]))]
        assert row["teacher"]["name"] == model_dir


def test_a_calibration_that_token_probabilities_do_not_have_is_reported(here, model_dir, capsys):
    write_lines("in.jsonl", gold_rows(9))
    for method, reported in (("batch", True), ("none", False)):
        ask(model_dir, "--top_k", 3, "--calibration", method, output=f"{method}.jsonl")
        assert ("note: token probabilities are the teacher's own, without" in capsys.readouterr().err) == reported


def test_auto_takes_the_calibration_with_the_lower_nll(here, model_dir, tmp_path, capsys):
    """Without gold answers a base is, an adapter is not, and nothing is by the mean of a few prompts."""
    rows, names = gold_rows(40), sorted(TASK.labels)
    raw = label_scorer(model_dir).raw_scores([row["input"] for row in rows])
    adapter = save_adapter(tmp_path / "adapter", model_dir)

    def chosen(teacher: str, count: int, logits: np.ndarray | None = None, *flags: str) -> str:
        gold = [] if logits is None else [{"output": names[i]} for i in logits.argmax(axis=1)]
        prompts = [{"input": row["input"]} | (gold[i] if gold else {}) for i, row in enumerate(rows[:count])]
        write_lines("in.jsonl", prompts)
        capsys.readouterr()
        ask(teacher, "--overwrite", "--labels", "Good,Standard,Bad", *flags)
        return capsys.readouterr().err

    for logits, wanted in ((raw, "none"), (raw - raw.mean(axis=0), "batch")):
        assert f"calibration of the teacher: {wanted}" in chosen(model_dir, 40, logits)
    assert "calibration of the teacher: batch" in chosen(model_dir, 40)
    assert "calibration of the teacher: none" in chosen(adapter, 40)
    assert "calibration of the teacher: none" in chosen(model_dir, 5)
    chosen(model_dir, 40, None, "--calibration", "none")
    wanted = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    for row, probabilities in zip(read_lines("kd.jsonl"), wanted, strict=True):
        np.testing.assert_allclose([row["label_probs"][n] for n in names], probabilities, atol=1e-3)


def test_a_model_in_nf4_is_a_teacher(here, model_dir):
    rows, names = gold_rows(6), sorted(TASK.labels)
    write_lines("in.jsonl", rows)
    probabilities = {}
    for quantization in ("nf4", "none"):
        answers = ask(
            model_dir, "--calibration", "none", "--quantization", quantization, output=f"{quantization}.jsonl"
        )
        probabilities[quantization] = np.array([[row["label_probs"][name] for name in names] for row in answers])
        scorer = label_scorer(model_dir, quantization)
        wanted = np.exp(scorer.raw_scores([row["input"] for row in rows]))
        np.testing.assert_allclose(probabilities[quantization], wanted / wanted.sum(axis=1, keepdims=True), atol=1e-3)
    assert np.abs(probabilities["nf4"] - probabilities["none"]).max() > 0.01


def test_a_model_writes_reasons_and_free_text(here, model_dir, monkeypatch, capsys):
    write_lines("in.jsonl", gold_rows(6))
    short = ("--max_new_tokens", 8, "--overwrite")
    left_out = 6 - len(ask(model_dir, *short, "--rationale"))  # a random model comes to an end by chance
    assert f"{left_out} prompts are left out, their answer: cut off at --max_new_tokens" in capsys.readouterr().err
    write = local.generate
    monkeypatch.setattr(local, "generate", lambda *args, **how: [replace(w, ended=True) for w in write(*args, **how)])
    for row in ask(model_dir, *short, "--rationale"):
        assert row["teacher_output"].startswith(max(row["label_probs"], key=row["label_probs"].get))
    write_lines("in.jsonl", [{"prompt": f"Write {i}"} for i in range(5)])
    assert all(set(row) == {"input", "teacher_output", "teacher"} for row in ask(model_dir, *short))


def test_a_resumed_run_draws_the_same_samples(here, model_dir):
    """One seed, one answer to each prompt, whatever was answered before; another seed, others."""
    load = LoadOptions("none", "float32")
    prompts = {number: f"Write {number}" for number in range(12)}

    def answers(seed: int, waiting: dict[int, str]) -> dict[int, dict]:
        options = TeacherOptions(max_new_tokens=6, temperature=1.0, seed=seed, batch_size=4, load=load)
        return dict(ModelTeacher(resolve(model_dir), options).answers(waiting))

    whole = answers(5, prompts)
    first = list(whole)[:4]  # a batch
    rest = {number: prompt for number, prompt in prompts.items() if number not in first}
    assert answers(5, rest) == {number: whole[number] for number in rest}
    assert answers(6, prompts) != whole
    assert len({answer["teacher_output"] for answer in whole.values()}) > 9


def test_a_resumed_run_gives_the_same_probabilities(here, model_dir, monkeypatch):
    write_lines("in.jsonl", gold_rows(20))
    whole = ask(model_dir, output="whole.jsonl")
    answers = ModelTeacher.answers

    def interrupted(self, *rest):
        for count, answer in enumerate(answers(self, *rest)):
            if count == 7:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelTeacher, "answers", interrupted)
        ask(model_dir)
    for row, resumed in zip(whole, ask(model_dir), strict=True):
        assert resumed["label_probs"] == pytest.approx(row["label_probs"], abs=1e-4)


def test_a_prompt_beyond_the_teachers_context_is_refused(here, model_dir):
    write_lines("in.jsonl", [{"input": "x y " * 400}])
    with pytest.raises(InputError, match="exceed the model's context of 512"):
        ask(model_dir)


def assert_token_probs(rows: list[dict], model_dir: str, k: int, turns: list[str] | None = None) -> None:
    """Compare the token probabilities of kd_prepare.py's rows with one plain forward of each; turns: other prompts."""
    model, tokenizer = load_named(model_dir, "none", "float32")
    encoder = PromptEncoder(tokenizer)
    for row, turn in zip(rows, turns or [row["input"] for row in rows], strict=True):
        prompt, completion = encoder.prompt(turn), encoder.completion(row["teacher_output"])
        stored = TokenProbs(".").row(row["token_probs"], completion)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.double().log_softmax(dim=-1).numpy()
        best = -np.sort(-wanted, axis=1)[:, :k]
        np.testing.assert_allclose(stored.log_probs, best, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(np.take_along_axis(wanted, stored.ids, axis=1), best, atol=1e-4)
        np.testing.assert_allclose(np.exp(stored.rest), 1 - np.exp(best).sum(axis=1), atol=2e-3)


def test_token_probabilities_of_labels_reasons_and_free_text(here, model_dir, monkeypatch):
    rows = gold_rows(9)
    write_lines("in.jsonl", rows)
    plain = ask(model_dir, output="plain.jsonl")
    answers = ask(model_dir, "--top_k", 6)
    assert [{name: value for name, value in row.items() if name != "token_probs"} for row in answers] == plain
    assert_token_probs(answers, model_dir, 6)
    write = local.generate
    monkeypatch.setattr(local, "generate", lambda *args, **how: [replace(w, ended=True) for w in write(*args, **how)])
    monkeypatch.setattr(heads, "CHUNK_BYTES", 5 * 4 * 448)
    how = ("--max_new_tokens", 12, "--top_k", 6, "--overwrite")
    answers = ask(model_dir, *how, "--rationale")
    assert_token_probs(answers, model_dir, 6, [f"{row['input']}\n{RATIONALE}" for row in answers])
    write_lines("in.jsonl", [{"prompt": f"Write {i}"} for i in range(5)])
    assert_token_probs(ask(model_dir, *how), model_dir, 6)


@pytest.mark.parametrize("size, tokens", [(1, 2048), (16, 2048), (16, 300)])
def test_token_probabilities_of_gold_answers(here, model_dir, monkeypatch, capsys, size, tokens):
    """Nothing is written; an answer that does not fit the context with its prompt is left out."""
    monkeypatch.setattr(local, "generate", None)
    monkeypatch.setattr(local, "TOKENS", tokens)
    rows = [{"input": f"Copy {i}", "output": f"{i} and " * (1 + 5 * i)} for i in range(12)]
    write_lines("in.jsonl", [*rows, {"input": "long", "output": "x y " * 300}])
    answers = ask(model_dir, "--top_k", 6, "--answers", "gold", "--batch_size", size)
    assert [row["teacher_output"] for row in answers] == [row["output"] for row in rows]
    assert "1 prompts are left out, their answer: longer with its prompt than" in capsys.readouterr().err
    assert_token_probs(answers, model_dir, 6)


def test_gold_labels_keep_the_teachers_probabilities(here, model_dir, capsys):
    """The gate is about its own labels, whichever label a row gets."""
    rows = gold_rows(9)
    write_lines("in.jsonl", rows)
    own = ask(model_dir, output="own.jsonl")
    gate = capsys.readouterr().out.splitlines()[:-1]
    answers = ask(model_dir, "--top_k", 6, "--answers", "gold")
    assert capsys.readouterr().out.splitlines()[:-1] == gate
    assert [row["teacher_output"] for row in answers] == [row["output"] for row in rows]
    assert [row["label_probs"] for row in answers] == [row["label_probs"] for row in own]
    assert_token_probs(answers, model_dir, 6)


def test_token_probabilities_of_an_answer_after_thoughts(here, model_dir, monkeypatch):
    """They are those of the text that the student gets, after its own prompt."""
    thought = [Written("<think>So</think>\n\nGood, I think", 9, True)] * 3
    monkeypatch.setattr(local, "generate", lambda *args, **how: thought)
    write_lines("in.jsonl", [{"prompt": f"Write {i}"} for i in range(3)])
    answers = ask(model_dir, "--top_k", 6)
    assert {row["teacher_output"] for row in answers} == {"Good, I think"}
    assert_token_probs(answers, model_dir, 6)


def test_the_body_of_a_model_runs_once(model_dir):
    model, _ = load_named(model_dir, "none", "float32")
    calls: list[tuple] = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    (row,) = local.token_rows(model, [([1, 2, 3], list(range(200)))], 4, 0)
    assert isinstance(row, TokenRow) and row.ids.shape == (200, 4)
    assert calls == [(1, 202, 64)]


def test_the_vocabulary_is_all_there_is(here, model_dir):
    write_lines("in.jsonl", gold_rows(3))
    for row in ask(model_dir, "--top_k", 10**6):
        stored = TokenProbs(".")._open(here / row["token_probs"]["file"])[1]
        assert stored["ids"].get_shape()[1] == 386
        assert (stored["rest"][:] == -np.inf).all()
        np.testing.assert_allclose(np.exp(stored["log_probs"][:].astype("f8")).sum(axis=1), 1, atol=2e-3)
