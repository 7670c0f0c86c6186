"""Batched generation: order, budget, stop predicate and context."""

from __future__ import annotations

import pytest

from common import InputError, PromptEncoder
from distil.generation import generate
from distil.testing import load_named


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
