"""Documents to JSON: whatever leaves infer_idp.py validates; what cannot be enforced is named; measures by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from llguidance import LLMatcher

import eval_idp
import idp
import idp_prepare
import infer_idp
from batch_files import parse_line, run_file
from conftest import run_cli
from decoding import JsonDecoder, checked_validator, compile_schema, grammar_tokenizer, subschemas
from eval_idp import count_fields, measure, same
from files import InputError, preparation
from idp import Extractor, compact_json, days, idp_prompt, joined, numbers, pages_of, stands_in
from models import load_model

INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "minLength": 1, "maxLength": 12},
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "total": {"type": "number", "minimum": 0},
        "paid": {"type": ["boolean", "null"]},
        "currency": {"enum": ["EUR", "USD"]},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 8}, "qty": {"type": "integer"}},
                "required": ["name", "qty"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["number", "date", "total", "paid", "currency", "items"],
    "additionalProperties": False,
}
SCHEMAS = {
    "invoice": INVOICE,
    "a string": {"type": "string"},
    "anything": True,
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2},
    "either": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
    "referred": {"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"type": "boolean"}}}},
    "recursive": {"$defs": {"n": {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    "a choice": {"enum": ["straße", 3, None, {"a": [1]}]},
}


@pytest.fixture(scope="module")
def decoder(model_dir):
    return JsonDecoder(*load_model(model_dir, "none", "float32"))


def flags(**given):
    args = infer_idp.build_parser().parse_args(["--model_dir", "x", "--document", "x"])
    for name, value in ({"max_new_tokens": 200, "quantization": "none", "compute_dtype": "float32"} | given).items():
        setattr(args, name, value)
    return args


def extractor(decoder, schema, **given) -> Extractor:
    return Extractor(decoder, compile_schema(schema, decoder.grammar_tokenizer), flags(**given))


# ------------------------------------------------------------------------------------------------------- always valid


@pytest.mark.parametrize("budget", [8, 16, 64, 250])
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_what_comes_out_of_a_random_model_validates_or_is_an_error(decoder, schema, budget):
    answers = extractor(decoder, schema, max_new_tokens=budget).extract(["INVOICE 7", "x", "Total 3.50 EUR"])
    for answer in answers:
        if "error" in answer:
            assert answer["error"]["code"] == "no_close" and budget < 250
        else:
            jsonschema.validate(json.loads(compact_json(answer["json"])), schema)


def test_a_budget_that_ends_closes_the_document_and_says_so(decoder):
    (answer,) = extractor(decoder, {"type": "array", "items": {"type": "string"}}, max_new_tokens=24).extract(["x"])
    assert answer["truncated"] is True and isinstance(answer["json"], list)


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


def test_what_cannot_be_closed_is_cut_back_no_further_than_it_must(decoder):
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
        if draft.truncated and "notes" not in value:
            cut += 1
            assert value["name"]
    assert cut


def test_where_the_likeliest_ending_is_too_long_others_are_searched(decoder):
    """Of two members the first to be tried needs 60 signs, the other one word."""
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


def test_a_longer_ending_than_was_seen_falls_back_to_the_last_that_fits(decoder, monkeypatch):
    """Between two looks the document may open what cannot be closed in time."""
    grammar = compile_schema({"type": "array", "items": INVOICE}, decoder.grammar_tokenizer)
    cramped, close = [], decoder.closer.close

    def watched(matcher, limit):
        ending = close(matcher, limit)
        cramped.append(ending is None)
        return ending

    monkeypatch.setattr(decoder.closer, "close", watched)
    for budget in range(100, 240, 7):
        (draft,) = decoder.generate([[5, 6, 7, 8]], [grammar], budget, temperature=1.0, seed=budget)
        assert len(draft.tokens) <= budget
        jsonschema.validate(json.loads(draft.text), {"type": "array", "items": INVOICE})
    assert any(cramped)


def test_a_batch_gives_the_answers_of_single_documents(decoder):
    documents = [f"INVOICE {i}\n" + "Line 1.00\n" * (i % 4) for i in range(7)]
    one = extractor(decoder, INVOICE, batch_size=1).extract(documents)
    assert one == extractor(decoder, INVOICE, batch_size=8).extract(documents)


def test_greedy_choices_are_those_of_plain_forwards(decoder):
    """Each token that was not forced is the likeliest of those allowed, computed from the whole prefix."""
    import torch
    from llguidance import LLMatcher

    grammar = compile_schema(INVOICE, decoder.grammar_tokenizer)
    prompt = [5, 6, 7, 8]
    (draft,) = decoder.generate([prompt], [grammar], 400)
    matcher = LLMatcher(decoder.grammar_tokenizer, grammar.grammar)
    tokens: list[int] = []
    chosen = 0
    while len(tokens) < len(draft.tokens):
        forced = matcher.compute_ff_tokens()
        if forced:
            assert draft.tokens[len(tokens) : len(tokens) + len(forced)] == forced
        else:
            mask = matcher.compute_bitmask()
            with torch.inference_mode():
                logits = decoder.model(torch.tensor([prompt + tokens])).logits[0, -1]
            allowed = [t for t in range(len(logits)) if mask[t >> 3] >> (t & 7) & 1]
            if len(tokens) < 200:  # before the budget has a say
                forced = [max(allowed, key=lambda t: logits[t])]
                assert draft.tokens[len(tokens)] == forced[0]
                chosen += 1
            else:
                forced = [draft.tokens[len(tokens)]]
                assert forced[0] in allowed
        matcher.consume_tokens(forced)
        tokens += forced
    assert chosen > 5


def test_rules_that_only_validation_can_check_are_kept_by_retries(decoder):
    schema = {"type": "array", "items": {"enum": [1, 2, 3, 4]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    assert compile_schema(schema, decoder.grammar_tokenizer).checked_after == ("/uniqueItems",)
    answers = extractor(decoder, schema, retries=30).extract([f"d{i}" for i in range(6)])
    assert all(len(set(answer["json"])) == 2 for answer in answers)
    hopeless = {"type": "integer", "minimum": 1, "maximum": 3, "not": {"type": "integer"}}
    (answer,) = extractor(decoder, hopeless, retries=2).extract(["x"])
    assert answer["error"]["code"] == "invalid" and "not" in answer["error"]["message"]


def test_a_retry_does_not_repeat_the_likeliest_answer(decoder):
    choices = {"enum": [1, 2, 3, 4]}
    (first,) = extractor(decoder, choices).extract(["x"])
    (other,) = extractor(decoder, choices | {"not": {"const": first["json"]}}, retries=30).extract(["x"])
    assert other["json"] in {1, 2, 3, 4} - {first["json"]}


# -------------------------------------------------------------------------------------------------------- preflight


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "objekt"}, "/type"),
        ({"properties": {"a": {"minimum": "x"}}}, "/properties/a/minimum"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}}, "/properties/a/pattern"),
        ({"type": "object", "properties": {"a/b": {"type": "string", "format": "url"}}}, "/properties/a~1b/format"),
    ],
)
def test_what_is_invalid_or_cannot_be_enforced_is_named_by_its_pointer(decoder, schema, pointer):
    with pytest.raises(InputError, match=pointer.replace("~", "~")):
        compile_schema(schema, decoder.grammar_tokenizer)


CIRCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, "an object is needed, found 5"),
        (None, "found null"),
        ([], "found []"),
        ({"$schema": 5}, "/$schema"),
        ({"$schema": []}, "/$schema"),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}}, '/properties/a/$ref: "#/$defs/no" is no schema in this file'),
        ({"$ref": "https://example.com/x.json"}, '/$ref: "https://example.com/x.json" is no schema in this file'),
        ({"type": "integer", "not": {"$ref": "http://127.0.0.1:9/x"}}, "/not/$ref"),
        ({"if": {"$ref": "#/$defs/no"}, "then": {}}, "/if/$ref"),
        ({"$ref": "#/other/a", "other": {"a": {"items": {"$ref": "#/other/b"}}}}, "/other/a/items/$ref"),
        ({"$ref": "#/enum/0", "enum": [5]}, "/$ref"),
        ({"$ref": "http://["}, "/$ref"),
        ({"$ref": "#"}, "$ref in a circle: / -> /"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "$ref in a circle: / -> /anyOf/1 -> /"),
        ({"dependentSchemas": {"a": {"$ref": "#"}}}, "$ref in a circle: / -> /dependentSchemas/a -> /"),
        ({"dependencies": {"a": {"$ref": "#/no"}, "b": ["c"]}}, "/dependencies/a/$ref"),
        ({"$defs": CIRCLE}, "$ref in a circle: /$defs/a -> /$defs/b -> /$defs/b/allOf/0 -> /$defs/a"),
        ({"type": "array", "items": {"$defs": CIRCLE, "$ref": "#/items/$defs/a"}}, "/$defs/b is no schema"),
    ],
)
def test_references_that_lead_nowhere_or_in_a_circle_are_refused_without_a_look_at_the_network(
    schema, message, monkeypatch
):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("something was fetched"))
    with pytest.raises(InputError) as caught:
        checked_validator(schema, "s.json")
    assert message.replace("/$defs/b is no schema", '"#/$defs/b" is no schema') in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"items": {"$ref": "#"}, "type": "array"}, [[]], [5]),
        ({"$ref": "#/$defs/a%25~1b", "$defs": {"a%/b": {"type": "null"}}}, None, 5),
        ({"$ref": "#x", "$defs": {"q": {"$anchor": "x", "type": "null"}}}, None, 5),
        ({"$id": "http://x/a", "$ref": "b", "$defs": {"q": {"$id": "b", "$ref": "#/n", "n": {"const": 1}}}}, 1, 2),
        ({"$ref": "http://json-schema.org/draft-07/schema#"}, {"type": "null"}, {"type": 5}),
    ],
)
def test_references_that_lead_somewhere_are_followed(schema, right, wrong):
    validator = checked_validator(schema, "s.json")
    assert validator.is_valid(right) and not validator.is_valid(wrong)


def test_an_answer_that_cannot_be_checked_is_an_error_of_its_own(decoder):
    answers = extractor(decoder, SCHEMAS["recursive"])
    assert "json" in answers.checked('{"k":' * 20 + "{}" + "}" * 20, False)
    for depth in (400, 100_000):
        answer = answers.checked('{"k":' * depth + "{}" + "}" * depth, False)
        assert answer["error"]["code"] == "invalid"
    answers = extractor(decoder, {"type": "number", "multipleOf": 0.5})
    for text in ("1e999", "-1e999", "1" + "0" * 400, "NaN"):
        assert answers.checked(text, False)["error"]["code"] == "invalid"


def test_a_schema_file_that_is_no_schema_is_wrong_input(model_dir, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("null")
    with pytest.raises(InputError, match="an object is needed, found null"):
        infer_idp.main(["--model_dir", model_dir, "--schema", str(path), "--document", "x"])


def test_a_property_named_like_a_keyword_is_no_keyword():
    schema = {"properties": {"not": {"type": "string"}, "if": {"items": {"enum": ["not"]}}}}
    assert [pointer for pointer, _ in subschemas(schema)] == [
        "",
        "/properties/not",
        "/properties/if",
        "/properties/if/items",
    ]


def test_the_tokenizer_may_have_fewer_tokens_than_the_model_has_logits(tokenizer):
    assert grammar_tokenizer(tokenizer, len(tokenizer) + 100).vocab_size == len(tokenizer) + 100


# ------------------------------------------------------------------------------------------------------ long documents


def test_a_document_longer_than_the_context_is_refused_with_the_numbers(decoder):
    (answer,) = extractor(decoder, INVOICE).extract(["word " * 3000])
    assert answer["error"]["code"] == "too_long" and "context 512" in answer["error"]["message"]


def test_chunk_reads_pages_and_joins_their_lists(decoder):
    schema = {
        "type": "object",
        "properties": {"items": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1}},
        "required": ["items"],
        "additionalProperties": False,
    }
    document = "\n".join(f"line {i} of a long document" for i in range(60))
    pages = extractor(decoder, schema)._pages(document)
    assert len(pages) > 1 and "\n".join(pages) == document
    single = [answer["json"]["items"] for answer in extractor(decoder, schema).extract(pages)]
    (answer,) = extractor(decoder, schema, chunk=True).extract([document])
    assert answer["json"]["items"] == [item for items in single for item in items]


def test_values_come_from_the_page_where_they_stand_and_lists_are_joined_at_any_depth():
    pages = ["ACME Ltd, No. 7\nPen 2.00\n1.1", "\fInk 3.00\nPen 2.00", "\fTotal due: 7.00 EUR of 4 March 2024"]
    item = [{"n": "Pen", "p": 2}, {"n": "Ink", "p": 3}]
    answers = [
        {"vendor": "ACME Ltd", "total": 2.5, "sums": {"due": 5, "lines": [item[0]]}, "paid": None, "note": None},
        {"vendor": "Pen Ltd", "total": 5, "sums": {"due": 5, "lines": [item[1], item[0]]}, "paid": True, "note": "x"},
        {
            "vendor": "ACME",
            "total": 7,
            "sums": {"due": 7, "lines": []},
            "date": "2024-03-04",
            "paid": None,
            "note": "",
        },
    ]
    assert joined(answers, pages) == {
        "vendor": "ACME Ltd",
        "total": 7,  # 2.5 and 5 stand on no page
        "sums": {"due": 7, "lines": [item[0], item[1], item[0]]},
        "paid": None,  # nothing to read in the text: the first page's
        "note": None,
        "date": "2024-03-04",
    }
    assert joined([[1, 2], [2]], ["", ""]) == [1, 2, 2]
    assert joined([None, [1], None], ["", "", ""]) == [1] and joined([None, 8], ["7", "8"]) == 8
    assert joined([4, 5], ["", "x"]) == 4


def test_what_is_not_valid_as_a_whole_says_so_and_a_page_that_failed_is_named(decoder):
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    reader = extractor(decoder, schema, chunk=True)
    answers = [{"json": [1], "truncated": False}, {"json": [1], "truncated": True}]
    assert reader._merged(answers, ["1", "1"]) == {"json": [1, 1], "truncated": True}
    error = reader._merged([*answers, answers[0]], ["1"] * 3)["error"]
    assert error["message"] == "the answers of 3 pages, joined: the whole breaks maxItems at /"
    error = reader._merged([answers[0], {"error": {"code": "no_close", "message": "m"}}], ["1", "1"])["error"]
    assert error == {"code": "no_close", "message": "page 2 of 2: m"}


def test_an_answer_as_long_as_the_context_is_refused_before_any_page_is_cut(decoder, model_dir, schema_file):
    for budget, chunk in ((512, True), (512, False), (460, True), (9999, True)):
        with pytest.raises(InputError, match=f"--max_new_tokens {budget} leave .* tokens of the context of 512"):
            extractor(decoder, INVOICE, chunk=chunk, max_new_tokens=budget)
    argv = ["--model_dir", model_dir, "--schema", str(schema_file), "--document", "x", "--max_new_tokens", "600"]
    with pytest.raises(InputError, match="--max_new_tokens 600 leave 0 tokens"):
        infer_idp.main(argv)


def test_pages_end_at_form_feeds_and_a_line_without_end_is_cut():
    assert pages_of("a\fb", lambda text: True) == ["a", "\fb"]
    assert pages_of("one\n\f\n \n\ftwo\n\f", lambda text: True) == ["one\n", "\ftwo\n"]
    assert all(len(page) <= 10 for page in pages_of("word " * 9, lambda text: len(text) <= 10))


# --------------------------------------------------------------------------------------------------------- measures


def test_numbers_and_days_of_a_text():
    from datetime import date
    from decimal import Decimal

    assert {Decimal("1234.5"), Decimal("3"), Decimal("1007.50")} <= numbers("1.234,50 and 3 of RM1,007.50")
    assert numbers("3 2 169,75   1\xa0200.50 2 125 250,00 1'000") >= {
        Decimal(text) for text in ("3", "2169.75", "1200.50", "125250", "1000")
    }
    assert Decimal(53) not in numbers("5 3") and Decimal(11234) not in numbers("1 1 234")
    (meant,) = days("on 03/04/2024")
    assert meant == (date(2024, 4, 3), date(2024, 3, 4))
    for text in ("25 Dec 2018", "25-DEC-18", "December 25, 2018", "2018-12-25", "25.12.18", "25/12/2018 8:13"):
        assert list(days(text)) == [(date(2018, 12, 25),)], text
    for text in ("13. März 2023", "13 mars 2023", "13. Mrz. 2023", "13.Ma\u0308rz 2023"):
        assert list(days(text)) == [(date(2023, 3, 13),)], text
    for text, month in {"1 oktober": 10, "4. Mai": 5, "1er août": 8, "16 juillet": 7, "2 juin": 6, "9 maj": 5}.items():
        assert [day[0].month for day in days(f"{text} 2022")] == [month], text
    assert not list(days("99/99/2018 and 12.50")) and not list(days("12 Market 2018"))


@pytest.mark.parametrize(
    ("name", "a", "b", "equal"),
    [
        ("total", 9, 9.0, True),
        ("total", 0.1, 0.10000001, False),
        ("date", "25/12/2018", "2018-12-25", True),
        ("date", "03/04/2018", "2018-04-03", True),
        ("date", "03/04/2018", "03-04-2018", True),
        ("date", "03/04/2018", "04/03/2018", False),
        ("invoice_date", "25/12/2018", "2018-12-25", True),
        ("a.dateOfIssue", "25/12/2018", "2018-12-25", True),
        ("due-date", "25/12/2018", "2018-12-25", True),
        ("candidate", "12/03/2019 Bob", "12/03/2019 Eve", False),
        ("updated_note", "3 May 2020 first", "3 May 2020 second", False),
        ("currency", "$", "€", False),
        ("currency", " € ", "€", True),
        ("delta", "-5", "5", False),
        ("delta", "\u22125", "-5", True),
        ("language", "C++", "C", False),
        ("language", "c#", "C#", True),
        ("number", "INV-1-2", "INV 1 2", True),
        ("name", "café", "cafe\u0301", True),
        ("date", "13/04/2018", "14/04/2018", False),
        ("company", "ABC  Sdn. Bhd", "abc sdn bhd.", True),
        ("company", "ABC", "ABD", False),
        ("paid", True, 1, False),
    ],
)
def test_values_are_compared_by_what_they_mean(name, a, b, equal):
    assert same(name, a, b) is equal


def test_fields_are_counted_by_hand():
    expected = {"total": 5, "items": [{"n": "pen", "q": 1}, {"n": "ink", "q": 2}]}
    found = {"total": 6, "items": [{"n": "Ink", "q": 2}, {"n": "pen", "q": 7}, {"n": "cap", "q": 1}]}
    counts: Counter = Counter()
    assert count_fields(found, expected, counts) == 3
    assert counts["total", "right"] == 0 and counts["total", "found"] == counts["total", "expected"] == 1
    assert [counts["items[].n", kind] for kind in ("right", "found", "expected")] == [2, 3, 2]
    assert [counts["items[].q", kind] for kind in ("right", "found", "expected")] == [1, 3, 2]


def test_a_missing_answer_counts_against_recall_alone():
    rows = [{"document": "Total 5", "expected": {"total": 5, "note": None}}] * 2
    result = eval_idp.measure(rows, [{"json": {"total": 5, "note": None}}, {"error": {}}], {}, 100)
    assert result["fields"]["total"]["precision"] == 1 and result["fields"]["total"]["recall"] == 0.5
    assert result["valid"] == result["exact"] == 0.5 and result["invention_rate"] == 0


def test_items_that_were_not_found_count_against_recall():
    """Items found and expected, one apart: p and q expected, p found, then nothing found at all."""
    counts: Counter = Counter()
    count_fields({"items": [{"n": "p"}]}, {"items": [{"n": "p"}, {"n": "q"}]}, counts)
    count_fields({"items": []}, {"items": [{"n": "r"}, {"n": "s"}]}, counts)
    count_fields({}, {"items": [{"n": "t"}]}, counts)
    assert [counts["items[].n", kind] for kind in ("right", "found", "expected")] == [1, 1, 5]
    counts = Counter()
    assert count_fields({"a": {}, "b": []}, {"a": "x", "b": {"c": 1}}, counts) == 0  # another kind of value
    assert counts["a", "expected"] == counts["b.c", "expected"] == 1


def test_measures_by_hand():
    rows = [
        {"document": "x: p, q", "expected": {"a": "x", "b": None, "items": [{"n": "p"}, {"n": "q"}]}},
        {"document": "y: r", "expected": {"a": "y", "b": None, "items": [{"n": "r"}]}},
        {"document": "w", "expected": {"a": "w", "b": None, "items": []}},
    ]
    answers = [
        {"json": {"a": "x", "b": None, "items": [{"n": "p"}]}, "truncated": True},
        {"json": {"a": "z", "b": None, "items": [{"n": "r"}]}, "truncated": False},
        {"json": {"a": "w", "b": None, "items": []}, "truncated": False},
    ]
    found = measure(rows, answers, {}, 100)
    assert set(found["fields"]) == {"a", "items[].n"}  # b has no value anywhere
    a, n = found["fields"]["a"], found["fields"]["items[].n"]
    assert (a["precision"], a["recall"], a["f1"], a["expected"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
    assert (n["precision"], n["recall"], n["f1"], n["expected"]) == pytest.approx((1, 2 / 3, 4 / 5, 3))
    assert found["f1"] == pytest.approx(8 / 11)  # 4 right, 5 found, 6 expected
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["exact"] == pytest.approx(1 / 3) and found["truncated"] == pytest.approx(1 / 3)
    assert found["invention_rate"] == pytest.approx(1 / 5)  # of x, p, z, r, w the z


def test_intervals_are_those_of_the_binomial_distribution():
    """8 of 16 documents right, one value each: of 16 draws with p = 1/2 at most 3 are right in 1.1 % of cases and at
    most 4 in 3.8 %, so the 2.5 % percentile is 4/16."""
    rows = [{"document": "1", "expected": {"a": 1}}] * 16
    found = measure(rows, [{"json": {"a": 1 + i % 2}} for i in range(16)], {}, 4000)
    assert found["f1"] == 0.5 and found["f1_interval_95"] == [0.25, 0.75]
    assert found["fields"]["a"]["interval_95"] == [0.25, 0.75]
    assert measure(rows, [{"json": {"a": 1}}] * 16, {}, 100)["f1_interval_95"] == [1, 1]


def test_exact_needs_an_answer_with_all_values_and_no_others():
    def exact(answer, **expected):
        return measure([{"document": "x", "expected": expected}], [answer], {}, 5)["exact"]

    assert exact({"error": {}}, note=None) == exact({"error": {}}, items=[]) == 0
    assert exact({"json": {}}, note=None) == exact({"json": {"note": None, "l": []}}) == 1
    assert exact({"json": {"note": "a", "more": "b"}}, note="a") == exact({"json": {"a": {}}}, a="x") == 0
    assert measure([{"document": "x", "expected": {}}], [{"json": {}}], {}, 5)["macro_f1"] == 0  # nothing to measure


def test_the_right_answers_of_the_example_data_are_no_inventions():
    rows = eval_idp.read_documents("data/idp_validation.jsonl", None)
    schema = json.loads(Path("data/idp_schema.json").read_text())
    found = measure(rows, [{"json": row["expected"]} for row in rows], schema, 2)
    assert found["exact"] == found["macro_f1"] == 1
    assert found["invention_rate"] < 0.003  # quantities of 1 that are not written


def test_inventions_are_values_that_do_not_stand_in_the_document():
    document = "ACME  Sdn. Bhd\nDate: 25/12/2018\nTotal RM 1,007.50"
    assert stands_in("company", "Acme Sdn Bhd", document) and not stands_in("company", "Acme Inc", document)
    assert stands_in("total", 1007.5, document) and not stands_in("total", 1007.6, document)
    assert stands_in("date", "2018-12-25", document) and not stands_in("date", "2018-12-26", document)
    assert stands_in("currency", "€", "5 €") and not stands_in("currency", "$", "5 €")
    assert stands_in("delta", "-5", "total -5") and stands_in("name", "café", "CAFE\u0301 5")
    assert not stands_in("paid", True, document) and not stands_in("paid", None, document)
    schema = {"properties": {"currency": {"enum": ["MYR"]}}}
    rows = [{"document": document, "expected": {"currency": "MYR"}}]
    assert eval_idp.measure(rows, [{"json": {"currency": "MYR"}}], schema, 10)["invention_rate"] == 0


# ---------------------------------------------------------------------------------------------------------- scripts


def test_what_looks_like_a_file_that_is_not_there_is_no_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "invoices").mkdir()
    (tmp_path / "may 2024").write_text("INVOICE 5")
    for given in (
        *("march invoices/may 2024.txt", "docs.jsonl", "scan 7.PDF", "invoices/may 2024", "a/b", "/no/such file"),
        *("~/x", "./x y", "invoice.txt", "C:\\docs\\may.txt"),
    ):
        with pytest.raises(InputError, match=r"no such file .*give --document - and pipe it"):
            infer_idp.read_document(given)
    with pytest.raises(InputError, match="is a folder"):
        infer_idp.read_document("invoices")
    assert infer_idp.read_document("may 2024") == "INVOICE 5"
    for given in ("Total:5.00", "12/05/2024", "N/A 5", "Net / Gross 5.00", "x" * 5000, "see a.txt\nTotal 5"):
        assert infer_idp.read_document(given) == given


def test_a_number_that_is_read_as_infinity_is_refused_in_rows_and_never_written(tmp_path):
    row, text = parse_line('{"document": "x", "id": 1e999}', ("document",))
    assert text is None and "1e999 is too large" in row["error"]["message"]
    assert parse_line('{"document": "x", "id": 1e308}', ("document",))[1] == "x"
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        work = [{"score": float("inf")}]
        run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", 1, {}, 1, lambda lines: work)
    assert not (tmp_path / "out.jsonl").exists()


def test_training_rows_can_be_evaluated_and_the_instruction_comes_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    turn = idp_prompt("INVOICE 7\n  Total 5")
    lines = [{"input": turn, "output": '{"total":5}'}, {"document": "A", "input": "B", "expected": {}, "output": 5}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = eval_idp.read_documents(str(path), None)
    assert first["document"] == "INVOICE 7\n  Total 5" and first["expected"] == {"total": 5}
    assert idp_prompt(first["document"]) == turn
    assert second["document"] == "A" and second["expected"] == {}
    path.write_text('{"text": "x", "expected": 1}')
    with pytest.raises(InputError, match='line 1 needs "document" or "input" as a non-empty string'):
        eval_idp.read_documents(str(path), None)
    path.write_text('{"input": "x"}')
    with pytest.raises(InputError, match='row 1 has no "expected" \\(or "output"\\)'):
        eval_idp.read_documents(str(path), None)

    class Echo:
        def extract(self, documents):
            return [{"json": document} for document in documents]

    (row,) = infer_idp.work_lines(Echo(), [json.dumps({"input": turn})])
    assert row["json"] == "INVOICE 7\n  Total 5" and row["input"] == turn


@pytest.fixture
def schema_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(INVOICE))
    return path


def test_one_document_prints_json_that_validates(model_dir, schema_file, tmp_path, capsys):
    document = tmp_path / "doc.txt"
    document.write_text("INVOICE 7\nTotal 3.50 EUR")
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--document", document, "--max_new_tokens", "200"]
    assert infer_idp.main([*map(str, argv)]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), INVOICE)


def test_nothing_is_printed_where_no_valid_close_fits(model_dir, schema_file, capsys):
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--document", "x", "--max_new_tokens", "3"]
    assert infer_idp.main([*map(str, argv)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "no valid ending" in shown.err


def test_a_file_keeps_order_and_marks_lines_that_cannot_be_done(model_dir, schema_file, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"document": "A 1", "id": 1}, {"id": 2}, {"input": "B 2"}, {"document": "word " * 3000}]
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n[1]\n")
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--input", source, "--output", output]
    assert infer_idp.main([*map(str, argv), "--max_new_tokens", "200"]) == 1
    out = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("error", {}).get("code") for row in out] == [
        None,
        "no_document",
        None,
        "too_long",
        "not_an_object",
    ]
    assert set(out[0]) == {"document", "id", "json", "truncated"}


def test_evaluation_side_by_side_and_by_group(model_dir, schema_file, tmp_path, capsys):
    expected = {
        "number": "7",
        "date": "2024-01-02",
        "total": 1,
        "paid": None,
        "currency": "EUR",
        "items": [{"name": "a", "qty": 1}],
    }
    data = tmp_path / "val.jsonl"
    lines = [
        {"document": f"INVOICE {i}", "expected": e, "kind": "ab"[i % 2]}
        for i, e in enumerate([expected, json.dumps(expected)] * 2)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    argv = ["--model_dir", model_dir, model_dir, "--schema", schema_file, "--data", data, "--by", "kind"]
    argv += ["--max_new_tokens", "200", "--bootstrap", "50", "--report_dir", tmp_path / "report", "--json"]
    assert eval_idp.main([*map(str, argv)]) == 0
    shown = capsys.readouterr()
    first, second = json.loads(shown.out)["models"]
    assert first["valid"] == 1 and first["fields"] == second["fields"] and set(first["by"]) == {"a", "b"}
    assert "items[].qty" in shown.err and "invention rate" in shown.err
    assert len((tmp_path / "report" / "1_tiny-qwen2" / "predictions.jsonl").read_text().splitlines()) == 4


def test_prepare_brings_answers_into_the_schema_and_keeps_groups_together(tmp_path):
    schema = {
        "type": "object",
        "properties": {"company": {"type": "string"}, "total": {"type": ["number", "null"]}},
        "additionalProperties": False,
    }
    (tmp_path / "s.json").write_text(json.dumps(schema))
    totals = ["RM 1,007.50", "9.00", "", "$8.20", "-1.73"]
    rows = [{"document": f"d{i}", "expected": {"total": totals[i % 5], "company": f"C{i % 12}"}} for i in range(60)]
    (tmp_path / "src.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [
        "--src",
        tmp_path / "src.jsonl",
        "--schema",
        tmp_path / "s.json",
        "--group",
        "company",
        "--outdir",
        tmp_path,
    ]
    assert idp_prepare.main([*map(str, argv)]) == 0
    sft = [json.loads(line) for line in (tmp_path / "idp_sft.jsonl").read_text().splitlines()]
    validation = [json.loads(line) for line in (tmp_path / "idp_validation.jsonl").read_text().splitlines()]
    assert len(sft) + len(validation) == 60
    assert {json.loads(r["output"])["total"] for r in sft} <= {1007.5, 9, None, 8.2, -1.73}
    assert all(list(json.loads(r["output"])) == ["company", "total"] for r in sft)
    assert not {json.loads(r["output"])["company"] for r in sft} & {r["expected"]["company"] for r in validation}
    assert sft[0]["input"].startswith(idp_prompt("d")[:10])
    noted = preparation(str(tmp_path / "idp_sft.jsonl"))  # where the trainers take the split from
    assert noted["split_seed"] == 0 and noted["source"]["file"] == str(tmp_path / "src.jsonl")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("RM 1,007.50", 1007.5), ("RM1007.50", 1007.5), ("$8.20", 8.2), ("-1.73", -1.73), ("9.00", 9), (".50", 0.5)],
        *[("1,50", 1.5), ("12,50 EUR", 12.5), ("1.234,50", 1234.5), ("0,125", 0.125), ("1 234,50", 1234.5)],
        *[("1,234", 1234), ("1,234,567.8", 1234567.8), ("1'234.50", 1234.5), ("1.234", 1.234)],
        *[("(5.00)", -5), ("(RM 5.00)", -5), ("5.00-", -5), ("-$5", -5), ("$-5", -5), ("\u22125", -5)],
        *[(text, None) for text in ("INV5", "1,2,3", "1e5", "0.5.1", "12,34,567", "1234,567", "(5", "-(5)", "5.-")],
        *[(text, None) for text in ("5 or 6", "Total 5", "-", "", "12/05/2024", "1,50,5")],
    ],
)
def test_texts_are_numbers_only_where_they_can_be_read_in_one_way(text, number):
    found = idp_prepare.in_schema_form(text, {"type": "number"})
    assert found == (text if number is None else number) and type(found) is not bool


def test_an_answer_that_cannot_be_read_as_a_number_is_refused_with_its_row(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"total": {"type": "number"}}}')
    rows = [{"document": "a", "expected": {"total": text}} for text in ("1,50", "INV5")]
    (tmp_path / "src.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--src", tmp_path / "src.jsonl", "--schema", tmp_path / "s.json", "--outdir", tmp_path / "out"]
    with pytest.raises(InputError, match=r'row 2: "expected" breaks the schema at /total: .INV5. is not'):
        idp_prepare.main([*map(str, argv)])


def test_broken_copies_break_values_and_nothing_else():
    document = "INVOICE\nAIK HUAT, HARDWARE (M) SDN BHD\nTotal: 12.50\nEND OF PAGE"
    answer = {"company": "Aik Huat Hardware (M) SDN BHD", "total": 12.5, "items": [{"name": "not there at all"}]}
    copies = {idp_prepare.broken_copy(document, answer, random.Random(seed)) for seed in range(60)}
    assert document in copies and len(copies) == 6  # each of the five gaps, and whole
    for copy in copies - {document}:
        assert copy.count("\n") == document.count("\n") + 1 and copy.split() == document.split()
        first, second = copy.split("\n")[1:3]
        assert document.split("\n")[1] == f"{first} {second}"


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("infer_idp.py", ["--model_dir", "x"], "give either --document"),
        ("infer_idp.py", ["--model_dir", "x", "--document", " "], "empty"),
        ("infer_idp.py", ["--model_dir", "x", "--document", "x", "--schema", "no.json"], "no.json"),
        ("infer_idp.py", ["--model_dir", "x", "--document", "x", "--max_new_tokens", "0"], "--max_new_tokens"),
        ("eval_idp.py", ["--model_dir", "x", "--data", "no.jsonl"], "no.jsonl"),
        ("idp_prepare.py", ["--src", "no.jsonl", "--schema", "no.json", "--outdir", "x"], "no.json"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(script, argv, message, tmp_path):
    done = run_cli(script, *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_schema_that_cannot_be_enforced_stops_before_the_model_loads(model_dir, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "string", "pattern": "(?=x)y"}))
    done = run_cli("infer_idp.py", "--model_dir", model_dir, "--schema", str(path), "--document", "x")
    assert done.returncode == 2 and "/pattern" in done.stderr
    assert not done.stdout and idp.RETRY_TEMPERATURE > 0
