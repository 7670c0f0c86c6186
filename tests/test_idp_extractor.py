"""The extractor: every answer of a random model validates or is an error."""

from __future__ import annotations

import copy
import json
import shutil

import jsonschema
import pytest
from conftest import INVOICE_SCHEMA

from common import InputError
from distil.idp import extractor
from distil.idp.documents import INSTRUCTION, compact_json
from distil.idp.extractor import ExtractOptions, Extractor
from distil.idp.schema import compile_schema
from distil.models import LoadOptions, resolve

SCHEMAS = {
    "invoice": INVOICE_SCHEMA,
    "a string": {"type": "string"},
    "anything": True,
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2},
    "either": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
    "referred": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"type": "boolean"}}}},
    "recursive": {"$defs": {"n": {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    "a choice": {"enum": ["straße", 3, None, {"a": [1]}]},
}


def make_extractor(decoder, schema, **options) -> Extractor:
    grammar = compile_schema(schema, decoder.grammar_tokenizer)
    return Extractor(decoder, grammar, ExtractOptions(schema, **{"max_new_tokens": 200} | options))


@pytest.mark.parametrize("budget", [8, 16, 64, 250])
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_answers_of_a_random_model_validate_or_are_errors(decoder, schema, budget):
    answers = make_extractor(decoder, schema, max_new_tokens=budget).extract(["INVOICE 7", "x", "Total 3.50 EUR"])
    for answer in answers:
        if "error" in answer:
            assert answer["error"]["code"] == "no_close" and budget < 250
        else:
            jsonschema.validate(json.loads(compact_json(answer["json"])), schema)


def test_a_budget_that_ends_closes_the_document_and_reports_it(decoder):
    schema = {"type": "array", "items": {"type": "string"}}
    (answer,) = make_extractor(decoder, schema, max_new_tokens=24).extract(["x"])
    assert answer["truncated"] is True and isinstance(answer["json"], list)


def test_a_batch_gives_the_answers_of_single_documents(decoder):
    documents = [f"INVOICE {i}\n" + "Line 1.00\n" * (i % 4) for i in range(7)]
    one = make_extractor(decoder, INVOICE_SCHEMA, batch_size=1).extract(documents)
    assert one == make_extractor(decoder, INVOICE_SCHEMA, batch_size=8).extract(documents)


def test_rules_that_only_validation_can_check_hold_after_retries(decoder):
    schema = {"type": "array", "items": {"enum": [1, 2, 3, 4]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    assert "uniqueItems" not in compile_schema(schema, decoder.grammar_tokenizer).grammar
    answers = make_extractor(decoder, schema, retries=30).extract([f"d{i}" for i in range(6)])
    assert all(len(set(answer["json"])) == 2 for answer in answers)
    hopeless = {"type": "integer", "minimum": 1, "maximum": 3, "not": {"type": "integer"}}
    (answer,) = make_extractor(decoder, hopeless, retries=2).extract(["x"])
    assert answer["error"]["code"] == "invalid" and "not" in answer["error"]["message"]


def test_a_retry_does_not_repeat_the_first_answer(decoder):
    choices = {"enum": [1, 2, 3, 4]}
    (first,) = make_extractor(decoder, choices).extract(["x"])
    (other,) = make_extractor(decoder, choices | {"not": {"const": first["json"]}}, retries=30).extract(["x"])
    assert other["json"] in {1, 2, 3, 4} - {first["json"]}


def test_an_answer_that_cannot_be_checked_is_an_error(decoder):
    answers = make_extractor(decoder, SCHEMAS["recursive"])
    assert "json" in answers.checked('{"k":' * 20 + "{}" + "}" * 20, False)
    for depth in (400, 100_000):
        answer = answers.checked('{"k":' * depth + "{}" + "}" * depth, False)
        assert answer["error"]["code"] == "invalid"
    answers = make_extractor(decoder, {"type": "number", "multipleOf": 0.5})
    for text in ("1e999", "-1e999", "1" + "0" * 400, "NaN"):
        assert answers.checked(text, False)["error"]["code"] == "invalid"


def test_a_key_that_stands_twice_is_an_error(decoder):
    answer = make_extractor(decoder, {"type": "object"}).checked('{"a":1,"a":2}', False)
    assert answer["error"]["code"] == "invalid" and '"a" occurs twice' in answer["error"]["message"]


def test_a_document_longer_than_the_context_is_refused_with_the_numbers(decoder):
    (answer,) = make_extractor(decoder, INVOICE_SCHEMA).extract(["word " * 3000])
    assert answer["error"]["code"] == "too_long" and "context 512" in answer["error"]["message"]


def test_chunk_reads_pages_and_joins_their_lists(decoder):
    properties = {"items": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1}}
    schema = {"type": "object", "properties": properties, "required": ["items"], "additionalProperties": False}
    document = "\n".join(f"line {i} of a long document" for i in range(60))
    pages = make_extractor(decoder, schema).pages(document)
    assert len(pages) > 1 and "".join(pages.values()) == document
    single = [answer["json"]["items"] for answer in make_extractor(decoder, schema).extract([*pages.values()])]
    (answer,) = make_extractor(decoder, schema, chunk=True).extract([document])
    assert answer["json"]["items"] == [item for items in single for item in items]


def test_joined_answers_are_validated_and_failed_pages_reported(decoder):
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    reader = make_extractor(decoder, schema, chunk=True)
    answers = [{"json": [1], "truncated": False}, {"json": [1], "truncated": True}]
    assert reader.merged(answers, {0: "1", 1: "1"}) == {"json": [1, 1], "truncated": True}
    error = reader.merged([*answers, answers[0]], {0: "1", 1: "1", 2: "1"})["error"]
    assert error["message"] == "the joined answers of 3 pages: the result breaks maxItems at /"
    error = reader.merged([answers[0], {"error": {"code": "no_close", "message": "m"}}], {0: "1", 1: "1"})["error"]
    assert error == {"code": "no_close", "message": "page 2 of 2: m"}


def test_a_budget_as_long_as_the_context_is_refused(decoder):
    for budget, chunk in ((512, True), (512, False), (460, True), (9999, True)):
        with pytest.raises(InputError, match=f"--max_new_tokens {budget} leave .* tokens of the context of 512"):
            make_extractor(decoder, INVOICE_SCHEMA, chunk=chunk, max_new_tokens=budget)


def test_loading_compiles_once(decoder, tokenizer, model_dir, tmp_path, monkeypatch):
    """The tokenizer's file has another end token than the template's, which ends answers."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    calls = []
    monkeypatch.setattr(extractor, "compile_schema", lambda *a: calls.append(a) or compile_schema(*a))
    how = {"show_schema": "off", "instruction": INSTRUCTION, "load": LoadOptions("none", "float32")}
    options = ExtractOptions(INVOICE_SCHEMA, max_new_tokens=200, **how)
    loaded = Extractor.load(resolve(str(folder)), options)
    assert len(calls) == 1 and loaded.decoder.grammar_tokenizer.eos_tokens == decoder.grammar_tokenizer.eos_tokens
    documents = ["INVOICE 7", "Total 3.50 EUR"]
    assert loaded.extract(documents) == make_extractor(decoder, INVOICE_SCHEMA).extract(documents)
