"""The two stages of writing code, and where an answer ends."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from common import InputError, PromptEncoder
from distil.codegen.coder import CodegenOptions, Coder
from distil.codegen.tasks import code_ended, codegen_plan_prompt, codegen_prompt
from distil.generation import Written
from distil.models import LoadOptions, resolve

OPTIONS = CodegenOptions(max_new_tokens=24, load=LoadOptions("none", "float32"))


@pytest.fixture(scope="module")
def coder(model_dir):
    return Coder.load(resolve(model_dir), OPTIONS)


def test_a_fence_after_the_prompt_ends_nothing(coder, monkeypatch):
    """What is written is looked at alone: the prompt's last line break and an opening fence are no closing fence."""
    from transformers import StoppingCriteriaList

    seen = []
    call = StoppingCriteriaList.__call__

    def watched(self, input_ids, scores, **kwargs):
        text = torch.tensor([coder.encoder.prompt("x") + coder.encoder.text("```\n")])
        ends = [criterion for criterion in self if type(criterion).__name__ == "Stop"]
        seen.append(ends[0](text, scores).item())
        return call(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(StoppingCriteriaList, "__call__", watched)
    coder.write([coder.encoder.prompt("x")], code_ended)
    assert seen and not any(seen)


def test_the_second_stage_continues_after_the_plan(coder, monkeypatch):
    calls = []
    write = Coder.write

    def watched(self, starts, stop, progress=None):
        calls.append((starts, stop))
        return write(self, starts, stop, progress)

    monkeypatch.setattr(Coder, "write", watched)
    (answer,) = coder.answers(["Add two numbers."], plan=True)
    (first, first_ended), (second, second_ended) = calls
    decode = coder.tokenizer.decode
    turn = coder.encoder.prompt(codegen_plan_prompt("Add two numbers."))
    assert first[0][: len(turn)] == second[0][: len(turn)] == turn
    assert decode(first[0][len(turn) :]) == "<PLAN>\n" and first_ended("add\n</PLAN>")
    assert decode(second[0][len(turn) :]) == f"<PLAN>\n{answer['plan']}\n</PLAN>\n<CODE>\n"
    assert second_ended("x = 1\n</CODE>") and not second_ended("x = 1\n")


def test_the_direct_prompt_is_that_of_training(coder, monkeypatch):
    calls = []

    def write(self, starts, stop, progress=None):
        calls.extend(starts)
        return [Written("x", 1, True)]

    monkeypatch.setattr(Coder, "write", write)
    coder.answers(["Add."], plan=False)
    assert calls == [coder.encoder.prompt(codegen_prompt("Add."))]


def test_a_model_without_a_chat_template_gets_an_open_code_block(coder, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    base = Coder(coder.model, plain, OPTIONS)
    starts = []
    base.write = lambda s, stop, progress=None: starts.extend(s) or [Written("x = 1\n```", 3, False)]
    assert base.answers(["Add."], plan=False)[0]["code"] == "x = 1"
    assert plain.decode(starts[0]).endswith("Add.\n```python\n")


def test_every_end_token_of_chat_and_base_models_ends_an_answer(coder, tokenizer):
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert ends <= set(coder.ends)


def test_batches_do_not_change_greedy_answers(coder):
    prompts = [f"Write f{i}. " + "It is long. " * (i % 3) for i in range(5)]
    together = coder.answers(prompts, plan=False)
    alone = Coder(coder.model, coder.tokenizer, replace(OPTIONS, batch_size=1))
    assert alone.answers(prompts, plan=False) == together


def test_samples_differ_and_come_back_with_the_same_seed(coder):
    sampling = Coder(coder.model, coder.tokenizer, replace(OPTIONS, temperature=1.0))
    first = sampling.answers(["Add."] * 4, plan=False)
    assert len({answer["code"] for answer in first}) > 1
    assert sampling.answers(["Add."] * 4, plan=False) == first


def test_control_tokens_in_a_task_stay_text(coder, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = PromptEncoder(tokenizer).prompt(codegen_prompt("say <|im_end|>"))
    assert prompt.count(end) == PromptEncoder(tokenizer).prompt(codegen_prompt("say")).count(end)
    with pytest.raises(InputError, match="exceed the model's context"):
        coder.answers(["word " * 2000], plan=False)
