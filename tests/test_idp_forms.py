"""The compact form of a schema, its variants, and answers cut to its fields."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from distil.idp.forms import cut_to, schema_form, variant_of
from distil.idp.validation import checked_validator

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "boss": {"$ref": "#/$defs/p"}}}
SCHEMA = {
    "$defs": {"p": PERSON | {"description": "a person", "required": ["name"]}, "day": {"format": "date"}},
    "type": "object",
    "description": "belongs into the instruction",
    "properties": {
        "who": {"$ref": "#/$defs/p", "description": "the  author"},
        "due_date": {"anyOf": [{"$ref": "#/$defs/day"}, {"type": "null"}]},
        "team": {"type": "array", "items": {"$ref": "#/$defs/p"}},
        "sizes": {"items": {"type": ["integer", "null"]}},
        "code": {"type": "string", "pattern": "^[A-Z]+$", "nullable": True},
        "kind": {"enum": ["ä b", 2, None], "type": ["string", "integer", "null"]},
    },
    "required": ["who", "kind"],
}


@pytest.mark.parametrize(
    ("schema", "form"),
    [
        (
            SCHEMA,
            '{"who":{"name":string,"boss"?:... (a person)} (the author),"due_date"?:date|null,'
            '"team"?:[{"name":string,"boss"?:... (a person)} (a person)],"sizes"?:[integer|null],'
            '"code"?:string /^[A-Z]+$/|null,"kind":"ä b"|2|null}',
        ),
        (True, "any"),
        ({"type": "array", "items": {"const": 1}}, "[1]"),
        ({"oneOf": [{"type": "number"}, {"properties": {"a": True}}]}, '{"a"?:any}|number'),
        ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {"type": "boolean"}}}]}, '{"a"?:any,"b"?:boolean}'),
        ({"type": "object"}, "object"),
        ({"type": "number", "format": "float"}, "number"),
    ],
)
def test_the_form_has_names_types_choices_and_descriptions(schema, form):
    assert schema_form(checked_validator(schema, "s").schema) == form


def test_variants_have_other_orders_and_fewer_fields_and_answers_fit_them():
    answer = {"who": {"name": "A", "boss": {"name": "B"}}, "due_date": "2024-01-02", "sizes": [1], "kind": 2}
    variants = [variant_of(SCHEMA, random.Random(seed), seed % 2 == 0) for seed in range(40)]
    assert variants[3] == variant_of(SCHEMA, random.Random(3), False)
    names = [tuple(variant["properties"]) for variant in variants]
    assert len({*names}) > 30 and all(len(one) == 6 for one in names[1::2]) and sum(map(len, names[::2])) < 100
    assert {tuple(variant["$defs"]["p"]["properties"]) for variant in variants} >= {("name", "boss"), ("boss", "name")}
    for variant in variants:
        part = cut_to(variant, answer, Counter())
        assert checked_validator(variant, "v").is_valid(part)
        assert list(part) == [name for name in variant["properties"] if name in answer]
        assert all(part[name] == answer[name] for name in {"due_date", "sizes", "kind"} & part.keys())


@pytest.mark.parametrize(
    "further",
    [
        {"additionalProperties": True},
        {"patternProperties": {"": {}}},
        {"$schema": "http://json-schema.org/draft-04/schema#"},
    ],
)
def test_answers_have_no_fields_that_a_variant_left_out(further):
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in "abc"},
        "required": ["b"],
    } | further
    for seed in range(20):
        variant = variant_of(schema, random.Random(seed), fewer=True)
        checked_validator(variant, "v")
        assert list(cut_to(variant, {"a": 1, "b": 2, "c": 3}, Counter())) == list(variant["properties"])


def test_fields_that_a_schema_does_not_have_are_cut_and_counted():
    value = {"kind": 2, "x": 1, "team": [{"boss": {"y": 1, "name": "B"}, "name": "A"}, {"name": "C", "y": 2}]}
    cut = cut_to(SCHEMA, value, dropped := Counter())
    assert json.dumps(cut) == '{"team": [{"name": "A", "boss": {"name": "B"}}, {"name": "C"}], "kind": 2}'
    assert dropped == {"x": 1, "team[].boss.y": 1, "team[].y": 1}
    for free in ({"additionalProperties": {"type": "integer"}}, {"patternProperties": {"x": {}}}, {"properties": {}}):
        assert cut_to(SCHEMA | free, value, Counter())["x"] == 1
    assert cut_to(SCHEMA, "text", Counter()) == "text" and cut_to(True, value, Counter()) == value
