"""Copied fields: the document has their words, and nothing else of an answer changes."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from conftest import build_tokenizer
from test_idp_extractor import make_extractor

from common import InputError
from distil.idp.copying import CopyGrammar, Vocabulary, check_copied
from distil.idp.schema import compile_schema, grammar_tokenizer

ITEM = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 30}, "n": {"type": "integer"}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "vendor": {"type": "string", "minLength": 1, "maxLength": 60},
        "note": {"type": "string", "maxLength": 20},
        "items": {"type": "array", "items": ITEM | {"required": ["name", "n"]}, "maxItems": 3},
        "place": {"type": ["string", "null"], "maxLength": 40},
    },
    "required": ["vendor", "note", "items", "place"],
}
SCHEMA["additionalProperties"] = ITEM["additionalProperties"] = False
DOCUMENT = 'Müller & Söhne "Ltd"\n27,JALAN DEDAP 13\nTAMAN\n\n81100 JOHOR … BAHRU  A-1'
FIELDS = ("vendor", "items[].name", "place")


def letters(text: str) -> str:
    return "".join(re.findall(r"[^\W_]", text))


@pytest.fixture(scope="module")
def vocabulary(decoder):
    return Vocabulary(decoder.grammar_tokenizer)


def grammar(decoder, vocabulary, document=DOCUMENT, schema=SCHEMA):
    return CopyGrammar(compile_schema(schema, decoder.grammar_tokenizer), vocabulary, document, FIELDS)


@pytest.mark.parametrize("document", [DOCUMENT, "12 34 56", "…", " ", "naïve"])
def test_copied_strings_are_made_of_words_of_the_document(decoder, vocabulary, document):
    """A random model, also where the budget ends: nothing is in a copied field but words one after the other."""
    copying, free, cut = grammar(decoder, vocabulary, document), "", 0
    for seed in range(4):
        drafts = decoder.generate([[5, 6, 7, 8]] * 3, [copying] * 3, (90, 160, 300)[seed % 3], 1.0, seed)
        for draft in drafts:
            value = json.loads(draft.text)
            jsonschema.validate(value, SCHEMA)
            copied = [value["vendor"], *(item["name"] for item in value["items"]), value["place"] or ""]
            if letters(document):  # a vendor is required
                assert all(letters(text) in letters(document) for text in copied)
            free += value["note"]
            cut += draft.truncated
    assert letters(free) not in letters(document) and cut


def accepts(matcher, tokenizer, text: str) -> bool:
    """Return whether each token of a text is allowed after those before it."""
    for token in tokenizer.tokenize_str(text):
        mask = matcher.compute_bitmask()
        if not mask[token >> 3] >> (token & 7) & 1:
            return False
        matcher.consume_token(token)
    return True


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("27,JALAN DEDAP 13", True),
        ("27, JALAN DEDAP 13, TAMAN, 81100 JOHOR", True),  # lines joined, signs put in
        ("JALAN DEDAP 13 TAMAN 81100 JOHOR … BAHRU", True),
        ("Müller & Söhne", True),
        ("Müller, Söhne Ltd.", True),
        ("A1", False),  # a sign stands between
        ("27JALAN", False),
        ("27 DEDAP", False),  # not one after the other
        ("JALA", False),
        ("ALAN", False),
        ("jalan", False),
        ("27 JALAN DEDAP 14", False),
        ("JALAN ---- DEDAP", False),
        ("", False),  # minLength
    ],
)
def test_blanks_and_signs_are_free_and_words_are_not(decoder, vocabulary, value, allowed):
    text = '{"vendor":' + json.dumps(value, ensure_ascii=False) + ',"note":"anything'
    matcher = grammar(decoder, vocabulary).matcher()
    assert accepts(matcher.deep_copy(), decoder.grammar_tokenizer, text) is allowed
    assert accepts(matcher, decoder.grammar_tokenizer, '{"vendor":"TAMAN","note":"TAM"')  # the copy changed nothing


def test_a_part_of_a_text_without_blanks_can_be_copied(decoder, vocabulary):
    for value, allowed in (("株式会社", True), ("東京", True), ("京都", False)):
        matcher = grammar(decoder, vocabulary, "東京株式会社 5").matcher()
        text = '{"vendor":"' + value + '","note'
        assert accepts(matcher, decoder.grammar_tokenizer, text) is allowed


def test_vocabularies_of_every_size_are_masked(tokenizer):
    """Logits are often wider than the tokenizer, and masks have words of 32 bits."""
    for size in range(len(tokenizer), len(tokenizer) + 33):
        tokens = grammar_tokenizer(tokenizer, size)
        matcher = CopyGrammar(compile_schema(SCHEMA, tokens), Vocabulary(tokens), DOCUMENT, FIELDS).matcher()
        assert accepts(matcher, tokens, '{"vendor":"TAMAN","note":"TAM"')


def test_a_token_that_begins_a_string_and_a_word_is_masked_too():
    """Vocabularies such as those of Qwen and Llama 3 have a quote and the letters behind it as one token."""
    texts = ['"TAM', '"Pen', '"Pen"', '","TAM', '","Pen']
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(texts)
    tokens, schema = grammar_tokenizer(tokenizer), {"type": "array", "items": {"type": "string"}}
    fields = {"vendor": {"type": ["string", "null"]}, "note": {"type": "string"}, "place": {"type": "null"}}
    copying = CopyGrammar(compile_schema(schema, tokens), Vocabulary(tokens), DOCUMENT, ("[]",))
    record = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    other = CopyGrammar(compile_schema(record, tokens), copying.vocabulary, DOCUMENT, FIELDS)
    cases = [(copying, "[", ['"TAM']), (copying, '["TAMAN', ['","TAM']), (other, '{"vendor":', ['"TAM'])]
    cases += [(other, '{"vendor":"TAMAN","note":', ['"TAM', '"Pen', '"Pen"'])]  # not copied
    for grammar, start, allowed in cases:
        matcher = grammar.matcher()
        assert accepts(matcher, tokens, start)
        mask = matcher.compute_bitmask()
        ids = tokenizer.convert_tokens_to_ids(texts)
        assert [text for text, t in zip(texts, ids, strict=True) if mask[t >> 3] >> (t & 7) & 1] == allowed, start


def test_a_string_may_end_within_a_word_where_the_schema_ends_it(decoder, vocabulary):
    short = {"type": "object", "properties": {"vendor": {"type": "string", "maxLength": 3}}, "required": ["vendor"]}
    short["additionalProperties"] = False
    copying = [grammar(decoder, vocabulary, "JALAN", short)] * 12
    values = [json.loads(d.text).get("vendor", "") for d in decoder.generate([[5, 6]] * 12, copying, 40, 1.0)]
    assert all(letters(value) in "JALAN" for value in values)
    assert any(len(value) == 3 and letters(value) for value in values)


def test_the_extractor_copies_in_batches_as_alone(decoder):
    documents = [DOCUMENT, "ACME Pen 3", "Ink & Paper Ltd\nTotal 3.50"]
    answers = make_extractor(decoder, SCHEMA, copy=FIELDS, batch_size=3).extract(documents)
    assert answers == make_extractor(decoder, SCHEMA, copy=FIELDS, batch_size=1).extract(documents)
    for answer, document in zip(answers, documents, strict=True):
        assert letters(answer["json"]["vendor"]) in letters(document)


@pytest.mark.parametrize("field", ["items[].n", "items", "total", "kind", "date", "code"])
def test_only_free_texts_can_be_copied(field):
    fixed = {"kind": {"enum": ["a"]}, "date": {"format": "date"}, "code": {"pattern": "^a$"}}
    schema = {**SCHEMA, "properties": SCHEMA["properties"] | {n: {"type": "string"} | f for n, f in fixed.items()}}
    check_copied(["vendor", "note", "items[].name", "place"], schema, "s.json")
    with pytest.raises(InputError, match=re.escape(f"--copy {field}: not a free text of s.json; its strings")) as info:
        check_copied(["vendor", field], schema, "s.json")
    assert "vendor, note, items[].name, place" in str(info.value)
