"""Batched generation: order, budget, stop predicate and context."""

from __future__ import annotations

import pytest

from common import InputError, PromptEncoder
from distil.generation import generate
from distil.testing import load_named, save_random_model, sentencepiece_tokenizer


@pytest.fixture(scope="module")
def loaded(model_dir):
    return load_named(model_dir, "none", "float32")


@pytest.fixture(scope="module")
def starts(loaded) -> list[list[int]]:
    encoder = PromptEncoder(loaded[1])
    return [encoder.prompt("Debt " * count) for count in (3, 1, 9, 2)]


def test_neither_batches_nor_sorting_change_greedy_answers(loaded, starts):
    alone = [generate(*loaded, [start], 8, [], 1)[0] for start in starts]
    assert generate(*loaded, starts, 8, [], 4) == generate(*loaded, starts, 8, [], 3, sort=False) == alone
    assert all(written.tokens == 8 and not written.ended for written in alone)


def test_an_end_token_or_the_stop_predicate_ends_an_answer(loaded, starts):
    first = loaded[1].encode(generate(*loaded, starts[:1], 1, [], 1)[0].text)[0]
    (ended,) = generate(*loaded, starts[:1], 8, [first], 1)
    assert ended.ended and ended.tokens == 1 and ended.text == ""
    (stopped,) = generate(*loaded, starts[:1], 8, [], 1, stop=lambda text: len(text) > 2)
    assert stopped.tokens < 8 and len(stopped.text) > 2


def test_a_prompt_that_leaves_no_room_is_refused(loaded, starts):
    with pytest.raises(InputError, match="exceed the model's context of 512"):
        generate(*loaded, starts, 600, [], 4)


def test_what_goes_on_after_a_text_keeps_its_blank(tmp_path, monkeypatch):
    """SentencePiece's decoder cuts it off the beginning of a text: "Good" and "debt" would be "Gooddebt"."""
    import torch

    folder = save_random_model(tmp_path, sentencepiece_tokenizer("prepend", eos_token="</s>"), "llama")
    model, tokenizer = load_named(folder, "none", "float32")
    start, more = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Good", "instruction debt"))

    def written(input_ids, **how):
        return torch.cat([input_ids, torch.tensor([more])], dim=1)

    monkeypatch.setattr(model, "generate", written)
    assert generate(model, tokenizer, [start], 8, [], 1)[0].text == "instruction debt"
    assert generate(model, tokenizer, [start], 8, [], 1, goes_on=True)[0].text == " instruction debt"
