"""Batched generation: order, budget, stop predicate and context."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common import InputError, PromptEncoder
from distil.generation import generate, load_to_write
from distil.models import LoadOptions, load, resolve
from distil.testing import load_named, save_adapter, save_random_model, sentencepiece_tokenizer


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


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_model_that_only_writes_has_plain_layers(model_dir, tmp_path, monkeypatch, quantization):
    """Dequantised once and with the adapter added, where memory is free; the scores are those of the loaded model."""
    ref, options = resolve(save_adapter(tmp_path / "adapter", model_dir)), LoadOptions(quantization, "float32")
    ids = torch.arange(5, 25)[None]

    def scores_and_layers(load_it, ref):
        model, _ = load_it(ref, options)
        with torch.inference_mode():
            return model(input_ids=ids).logits, {type(module).__name__ for module in model.modules()}

    loaded, _ = scores_and_layers(load, ref)
    plain, layers = scores_and_layers(load_to_write, ref)
    base, _ = scores_and_layers(load_to_write, resolve(model_dir))
    assert not {"Linear4bit", "LoraModel", "ParameterDict"} & layers
    torch.testing.assert_close(plain, loaded, atol=1e-4, rtol=1e-4)
    assert (base - plain).abs().max() > 0.01  # the adapter says something
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1e5))
    full, layers = scores_and_layers(load_to_write, ref)
    assert torch.equal(full, loaded) and "LoraModel" in layers
