"""Schemas: what is invalid or cannot be enforced is refused with its JSON pointer; references are resolved offline."""

from __future__ import annotations

import pytest

from common import InputError
from distil.idp.schema import checked_validator, compile_schema, field_schemas, grammar_tokenizer, subschemas


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return grammar_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "objekt"}, "/type"),
        ({"properties": {"a": {"minimum": "x"}}}, "/properties/a/minimum"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}}, "/properties/a/pattern"),
        ({"type": "object", "properties": {"a/b": {"type": "string", "format": "url"}}}, "/properties/a~1b/format"),
    ],
)
def test_invalid_or_unenforceable_keywords_are_reported_by_pointer(tokens, schema, pointer):
    with pytest.raises(InputError, match=pointer):
        compile_schema(schema, tokens)


CIRCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, "an object is expected, found 5"),
        (None, "found null"),
        ([], "found []"),
        ({"$schema": 5}, "/$schema"),
        ({"$schema": []}, "/$schema"),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}}, '/properties/a/$ref: "#/$defs/no" is not a schema in this'),
        ({"$ref": "https://example.com/x.json"}, '/$ref: "https://example.com/x.json" is not a schema in this file'),
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
        ({"type": "array", "items": {"$defs": CIRCLE, "$ref": "#/items/$defs/a"}}, "/$defs/b is not a schema"),
    ],
)
def test_wrong_references_are_refused_without_network(schema, message, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("something was fetched"))
    with pytest.raises(InputError) as caught:
        checked_validator(schema, "s.json")
    assert message.replace("/$defs/b is not a schema", '"#/$defs/b" is not a schema') in str(caught.value)


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
def test_right_references_are_followed(schema, right, wrong):
    validator = checked_validator(schema, "s.json")
    assert validator.is_valid(right) and not validator.is_valid(wrong)


def test_a_property_named_like_a_keyword_is_not_a_keyword():
    schema = {"properties": {"not": {"type": "string"}, "if": {"items": {"enum": ["not"]}}}}
    pointers = ["", "/properties/not", "/properties/if", "/properties/if/items"]
    assert [pointer for pointer, _ in subschemas(schema)] == pointers


def test_the_tokenizer_may_have_fewer_tokens_than_the_model_has_logits(tokenizer):
    assert grammar_tokenizer(tokenizer, len(tokenizer) + 100).vocab_size == len(tokenizer) + 100


def test_fields_are_found_through_references_alternatives_and_lists():
    item = {"type": "object", "properties": {"qty": {"type": "integer", "description": "pieces"}}, "required": ["qty"]}
    parts = {"type": "array", "items": {"$ref": "#/$defs/Item"}}  # an item inside an item is not entered again
    item["properties"]["parts"] = parts
    properties = {
        "vendor": {"type": "string", "nullable": True},
        "kind": {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]},
        "items": {"type": ["array", "null"], "items": {"anyOf": [{"$ref": "#/$defs/Item"}, {"type": "null"}]}},
    }
    more = {"properties": {"total": {"title": "Sum", "const": 5}}}
    schema = {"$defs": {"Item": item}, "allOf": [{"properties": properties, "required": ["items"]}, more]}
    fields = [(f.path, f.types, f.required, f.choices, f.description) for f in field_schemas(schema)]
    assert fields == [
        ("", (), True, (), ""),
        ("vendor", ("string", "null"), False, (), ""),
        ("kind", ("null",), False, ("a", "b"), ""),
        ("items", ("array", "null"), True, (), ""),
        ("items[]", ("object", "null"), True, (), ""),
        ("items[].qty", ("integer",), True, (), "pieces"),
        ("items[].parts", ("array",), False, (), ""),
        ("items[].parts[]", ("object",), True, (), ""),
        ("total", (), False, (5,), "Sum"),
    ]
    assert [
        f.path for f in field_schemas({"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}})
    ] == ["", "[]"]
    assert len([*field_schemas(True)]) == 1
