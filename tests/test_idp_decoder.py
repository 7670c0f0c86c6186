"""Constrained decoding: documents are closed within the budget, and choices are those of plain forwards."""

from __future__ import annotations

import json

import jsonschema
import pytest
from conftest import INVOICE_SCHEMA
from llguidance import LLMatcher

from distil.idp.decoder import Draft
from distil.idp.schema import compile_schema


def test_a_closed_document_keeps_what_was_written(decoder):
    """A list of texts can be closed at any time: no more than the last tokens may be lost."""
    grammar = compile_schema({"type": "array", "items": {"type": "string"}}, decoder.grammar_tokenizer)
    for seed in range(6):
        (draft,) = decoder.generate([[5, 6, 7, 8]], [grammar], 100, temperature=1.0, seed=seed)
        assert not draft.truncated or len(draft.tokens) >= 98


@pytest.mark.parametrize(
    "text",
    [{"format": "email"}, {"pattern": "@"}, {"pattern": "^[^@]+@[^@]+[.][a-z]{2,}$"}, {"format": "uri"}],
    ids=lambda text: next(iter(text.values())),
)
def test_a_text_that_needs_certain_signs_can_be_closed(decoder, text):
    properties = {"name": {"type": "string"}, "where": {"type": "string"} | text}
    schema = {"type": "object", "properties": properties, "required": ["name", "where"], "additionalProperties": False}
    grammar = compile_schema(schema, decoder.grammar_tokenizer)
    for draft in decoder.generate([[5, 6, 7, 8]] * 2, [grammar] * 2, 48):
        jsonschema.validate(json.loads(draft.text), schema, format_checker=jsonschema.FormatChecker())


def test_a_document_is_cut_back_no_further_than_needed(decoder):
    """The optional member needs more tokens than are left: what came before it stays."""
    notes = {"type": "string", "minLength": 60, "maxLength": 90, "pattern": "^[0-9]*$"}
    properties = {"name": {"type": "string", "maxLength": 300}, "notes": notes}
    schema = {"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False}
    grammar = compile_schema(schema, decoder.grammar_tokenizer)
    cut = 0
    for seed in range(40):
        (draft,) = decoder.generate([[5, 6, 7, 8]], [grammar], 64, temperature=1.0, seed=seed)
        value = json.loads(draft.text)
        jsonschema.validate(value, schema)
        assert len(draft.logprobs) == len(draft.tokens)
        if draft.truncated and "notes" not in value:
            cut += 1
            assert value["name"]
    assert cut


def test_other_endings_are_searched_where_the_first_is_too_long(decoder):
    """Of two members the first to be tried needs 60 digits, the other one word."""
    long = {"properties": {"alpha": {"type": "string", "pattern": "^[0-9]{60}$"}}, "required": ["alpha"]}
    short = {"properties": {"beta": {"type": "null"}}, "required": ["beta"]}
    schema = {"anyOf": [{"type": "object", "additionalProperties": False} | one for one in (long, short)]}
    matcher = LLMatcher(decoder.grammar_tokenizer, compile_schema(schema, decoder.grammar_tokenizer).grammar)
    assert matcher.consume_tokens(decoder.grammar_tokenizer.tokenize_str("{"))
    for digit in (decoder.closer._one, None):
        assert decoder.closer._dive(matcher.deep_copy(), 24, digit, ()) is None
    tokens = decoder.closer.close(matcher, 24)
    assert decoder.grammar_tokenizer.decode_str(tokens) == '"beta":null}'


def test_a_long_text_is_filled_with_words(decoder):
    long = compile_schema({"type": "string", "minLength": 200}, decoder.grammar_tokenizer)
    (draft,) = decoder.generate([[5, 6, 7, 8]], [long], 128)
    assert len(json.loads(draft.text)) >= 200 and len(draft.tokens) <= 128


def test_too_long_an_ending_falls_back_to_the_last_that_fits(decoder, monkeypatch):
    """Between two searches the document may open what cannot be closed in time."""
    grammar = compile_schema({"type": "array", "items": INVOICE_SCHEMA}, decoder.grammar_tokenizer)
    cramped, close = [], decoder.closer.close

    def watched(matcher, limit):
        ending = close(matcher, limit)
        cramped.append(ending is None)
        return ending

    monkeypatch.setattr(decoder.closer, "close", watched)
    for budget in range(100, 240, 7):
        (draft,) = decoder.generate([[5, 6, 7, 8]], [grammar], budget, temperature=1.0, seed=budget)
        assert len(draft.tokens) <= budget
        jsonschema.validate(json.loads(draft.text), {"type": "array", "items": INVOICE_SCHEMA})
    assert any(cramped)


def test_greedy_choices_are_those_of_plain_forwards(decoder):
    """Each token that was not forced is the most probable of those allowed, computed from the complete prefix."""
    import torch

    grammar = compile_schema(INVOICE_SCHEMA, decoder.grammar_tokenizer)
    prompt = [5, 6, 7, 8]
    (draft,) = decoder.generate([prompt], [grammar], 400)
    matcher = LLMatcher(decoder.grammar_tokenizer, grammar.grammar)
    tokens: list[int] = []
    chosen = 0
    while len(tokens) < len(draft.tokens):
        forced = matcher.compute_ff_tokens()
        if forced:
            assert draft.tokens[len(tokens) : len(tokens) + len(forced)] == forced
            assert not any(draft.logprobs[len(tokens) : len(tokens) + len(forced)])
        else:
            mask = matcher.compute_bitmask()
            with torch.inference_mode():
                logits = decoder.model(torch.tensor([prompt + tokens])).logits[0, -1]
            allowed = [t for t in range(len(logits)) if mask[t >> 3] >> (t & 7) & 1]
            if len(tokens) < 200:  # before the budget has a say
                forced = [max(allowed, key=lambda t: logits[t])]
                assert draft.tokens[len(tokens)] == forced[0]
                logprob = logits[forced[0]] - logits[allowed].logsumexp(dim=-1)
                assert draft.logprobs[len(tokens)] == pytest.approx(float(logprob), abs=1e-4)
                chosen += 1
            else:
                forced = [draft.tokens[len(tokens)]]
                assert forced[0] in allowed
        matcher.consume_tokens(forced)
        tokens += forced
    assert chosen > 5


def test_guesses_save_forwards_and_change_nothing(decoder, monkeypatch):
    """Guesses that are right, wrong in the end, and wrong at once, in batches of one and of four."""
    grammar = compile_schema(INVOICE_SCHEMA, decoder.grammar_tokenizer)
    prompts = [[5, 6, 7, 8][:size] for size in (4, 1, 3, 2)]
    forwards, forward = [], decoder.model.forward
    monkeypatch.setattr(decoder.model, "forward", lambda **inputs: forwards.append(1) or forward(**inputs))

    def written(prompts: list[list[int]], guess) -> tuple[list, int]:
        forwards.clear()
        monkeypatch.setattr(decoder, "_guess", guess)
        drafts = decoder.generate(prompts, [grammar] * len(prompts), 150)
        return drafts, len(forwards)

    plain, count = written(prompts, lambda draft, most: [])
    known = [draft.tokens for draft in plain]

    def partly_right(draft, most):
        size = len(draft.tokens)
        assert 0 < most <= 150 - size
        if size % 3 == 0:
            return [9] * most
        tokens = next(tokens for tokens in known if tokens[:size] == draft.tokens)
        return [*tokens[size : size + most - 1], 9]

    together, fewer = written(prompts, partly_right)
    assert [draft.tokens for draft in together] == known and fewer < 0.8 * count
    for one, other in zip(plain, together, strict=True):
        assert one.text == other.text and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [written([prompt], partly_right)[0][0].tokens for prompt in prompts] == known


def test_a_value_is_guessed_from_the_document(decoder):
    tokenizer = decoder.grammar_tokenizer
    source = "Pen 1\nOpen Bay Tools Ltd\nBay 12 Main Street"

    def guess(text: str, most: int = 7) -> str:
        grammar = compile_schema(INVOICE_SCHEMA, tokenizer)
        draft = Draft(grammar.matcher(), [], source, tokenizer.tokenize_str(text))
        draft.matcher.consume_tokens(draft.tokens)
        return tokenizer.decode_str(decoder._guess(draft, most))

    start = next(iter(INVOICE_SCHEMA["properties"]))
    assert " Main Street".startswith(guess(f'{{"{start}":"Bay 12')) and guess(f'{{"{start}":"Bay 12')
    assert guess(f'{{"{start}":"Ltd Bay').startswith(" 12")  # over the end of a line
    assert guess(f'{{"{start}":"') == guess(f'{{"{start}":"ay') == ""
