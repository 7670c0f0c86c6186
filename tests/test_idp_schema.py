"""Schemas: what is invalid or cannot be enforced is refused with its JSON pointer; references are resolved offline."""

from __future__ import annotations

import pytest

from common import InputError
from distil.idp.documents import compact_json
from distil.idp.schema import closed, compile_schema, field_schemas, grammar_tokenizer, noted_validator
from distil.idp.validation import checked_validator, subschemas


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return grammar_tokenizer(tokenizer)


CIRCULAR = {  # key "ab" is under both rules, which llguidance cannot join
    "$ref": "#/$defs/n",
    "$defs": {"n": {"properties": {"ab": {"$ref": "#/$defs/n"}}, "patternProperties": {"^a": {"$ref": "#/$defs/n"}}}},
}


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "objekt"}, "/type"),
        ({"properties": {"a": {"minimum": "x"}}}, "/properties/a/minimum"),
        ({"properties": {"a": {"type": "string", "pattern": "["}}}, "/properties/a/pattern"),
        ({"properties": {"a": {"patternProperties": {r"^\p{L}": {}}}}}, "/properties/a/patternProperties"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "/minimum"),
        ({"$schema": "http://json-schema.org/draft-03/schema#", "properties": {"a": {"required": True}}}, "draft 3"),
        ({"properties": {"a": {"$dynamicRef": "#/$defs/b"}}, "$defs": {"b": {}}}, r"/properties/a/\$dynamicRef"),
        (CIRCULAR, r"/\$defs/n \(circular"),
    ],
)
def test_invalid_or_unenforceable_keywords_are_reported_by_pointer(tokens, schema, pointer):
    with pytest.raises(InputError, match=pointer):
        compile_schema(schema, tokens)


def field(**rules) -> dict:
    return {"type": "object", "properties": {"a": rules}, "required": ["a"]}


def referred(**rules) -> dict:
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"} | rules}, "$defs": {"x": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (field(type="number", multipleOf=0.01), [19.99, 0.07, 1.15, 5, -0.29], [0.005, "x"]),
        (field(type="string", nullable=True), ["x", None], [5]),
        (field(type="string", enum=["x"], nullable=True), ["x", None], ["y"]),
        (field(type=["string", "null"], enum=["x"], nullable=True), ["x", None], ["y"]),
        (field(anyOf=[{"type": "string"}, {"type": "integer"}], nullable=True), ["x", 5, None], [0.5]),
        (field(type="string", const="x", nullable=True), ["x", None], ["y"]),
        (field(type="string", nullable=False), ["x"], [None]),
        (referred(nullable=True), ["x", None], [5]),
        (
            {
                "type": "object",
                "properties": {"a": {"$ref": "#/components/schemas/x"}},
                "components": {"schemas": {"x": {"type": "string", "format": "phone", "nullable": True}}},
            },
            ["x", None],
            [5],
        ),
        *[(field(type="string", format=f), ["x"], [5]) for f in ("password", "binary", "currency", "phone", "url")],
        (field(type="integer", format="int64"), [5], ["5"]),
        (field(type="string", pattern=r"^\p{L}+$"), ["Ünal"], ["a1", ""]),
        (field(type="string", pattern=r"^(?!0)\d{3}$"), ["123"], ["012", "12"]),
        (field(type="string", pattern=r"(?<y>\d{4})"), ["in 2024"], ["in 24"]),
        (field(type="string", pattern=r"(?<=x)y"), ["xy"], ["y"]),
        (field(type="integer", minimum=-(2**63), maximum=2**63 - 1), [5, 2**63 - 1], [2**63]),
        (field(type="number", maximum=1.7976931348623157e308), [5], ["5"]),
    ],
)
def test_what_is_valid_can_be_written_and_what_is_not_is_found(tokens, schema, right, wrong):
    grammar = compile_schema(schema, tokens)
    for value in right:
        assert grammar.validator.is_valid({"a": value}) and grammar.writes(compact_json({"a": value})), value
    for value in wrong:
        assert not grammar.validator.is_valid({"a": value}), value


def test_a_number_ends(tokens):
    """A model that writes one zero after the other would use up the budget."""
    for rules in ({}, {"minimum": 0}, {"exclusiveMinimum": 0, "maximum": 1e6}, {"type": ["number", "null"]}):
        grammar = compile_schema(field(**{"type": "number"} | rules), tokens)
        for number in ("5", "0.07", "1.10", "99999.99", "48.8583701", "0.0000000001", "1." + "0" * 10):
            assert grammar.writes(f'{{"a":{number}}}'), number
        assert not grammar.writes('{"a":1.' + "0" * 11 + "}")
    for rules in ({"enum": [0.123456789012]}, {"minimum": 0.123456789011, "maximum": 0.123456789013}):
        assert compile_schema(field(type="number", **rules), tokens).writes('{"a":0.123456789012}')


@pytest.mark.parametrize(
    ("schema", "left_out"),
    [
        (field(type="string", format="phone", pattern="(?!x)", maxLength=5), ["format", "pattern"]),
        (field(type="string", format="date", pattern=r"^\d"), []),
        (field(type="integer", minimum=-(2**63), maximum=9), ["minimum"]),
        (field(uniqueItems=True), ["uniqueItems"]),
        (field(uniqueItems=False), []),
        (field(type="object", properties={"b": {}, "c": {}}, minProperties=1), ["minProperties"]),
        (field(type="object", patternProperties={"^(?!x)": {}}), ["patternProperties"]),
        (field(oneOf=[{"type": "integer"}, {"type": "number"}]), ["oneOf"]),
        (field(oneOf=[{"type": "integer"}, {"type": "null"}]), []),
        (field(**{"not": {"properties": {"b": {"not": {}}}}}), ["not"]),
    ],
)
def test_what_only_validation_can_check_is_listed_by_pointer(tokens, schema, left_out):
    grammar = compile_schema(schema, tokens)
    assert sorted(grammar.left_out) == [f"/properties/a/{keyword}" for keyword in left_out]


def test_keys_under_a_pattern_that_no_grammar_takes_can_still_be_written(tokens):
    schema = {"type": "object", "patternProperties": {"^(?!x)": {"type": "integer"}}, "additionalProperties": False}
    grammar = compile_schema(schema, tokens)
    assert grammar.writes('{"a":1}') and not grammar.writes('{"a":"b"}')
    assert not grammar.validator.is_valid({"x": 1})


def test_a_wrapper_is_taken_off_and_reported(capsys):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "nullable": True}, "b": {"properties": {"c": {}}}},
    }
    wrapped = {"name": "inv", "strict": True, "schema": schema}
    kind = {"type": "json_schema"}
    for number, value in enumerate([wrapped, kind | {"json_schema": wrapped}, kind | wrapped]):
        path = f"{number}.json"
        validator = noted_validator(value, path)
        assert validator.schema["properties"]["a"] == {
            "anyOf": [{"type": "string"}, {"type": "null"}]
        } and not validator.is_valid("free text")
        expected = [
            f'note: {path}: the schema is what stands under "schema"',
            "null is allowed at /properties/a (nullable)",
            "no further keys at /, /properties/b (without additionalProperties)\n",
        ]
        assert capsys.readouterr().err == "; ".join(expected)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"name": "inv", "schema": {"type": "object"}, "type": "string"}, '"schema" next to type'),
        ({"total": {"type": "number"}}, "allows any value: total"),
        ({"components": {"schemas": {}}}, "allows any value: components"),
        ({"$defs": {"a": {"type": "string"}}}, "allows any value: \\$defs"),
    ],
)
def test_schemas_that_constrain_nothing_are_refused(schema, message):
    with pytest.raises(InputError, match=message):
        checked_validator(schema, "s.json")


BASE = {"type": "object", "properties": {"a": {"type": "integer"}}}
MORE = {"properties": {"b": {"type": "integer"}}, "required": ["c"]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (BASE, '{"a":1}', '{"a":1,"x":1}'),
        (BASE | {"unevaluatedProperties": False}, '{"a":1}', '{"a":1,"x":1}'),
        (BASE | {"required": ["b"]}, '{"a":1,"b":"any"}', '{"b":1,"x":1}'),
        ({"allOf": [{"$ref": "#/$defs/b"}, MORE], "$defs": {"b": BASE}}, '{"a":1,"b":1,"c":1}', '{"c":1,"x":1}'),
        (BASE | {"allOf": [MORE]}, '{"a":1,"b":1,"c":1}', '{"a":1,"c":1,"x":1}'),
        (BASE | {"anyOf": [MORE, {"required": ["a"]}]}, '{"a":1,"b":1,"c":1}', '{"a":1,"c":1,"x":1}'),
        ({"anyOf": [BASE, {"type": "null"}]}, "null", '{"x":1}'),
        ({"type": "array", "items": {"$ref": "#/$defs/b"}, "$defs": {"b": BASE}}, '[{"a":1}]', '[{"x":1}]'),
        (BASE | {"if": {"required": ["a"]}, "then": MORE}, '{"a":1,"b":1,"c":1}', '{"x":1}'),
        (BASE | {"if": {}, "then": {"$ref": "#/$defs/m"}, "$defs": {"m": MORE}}, '{"a":1,"b":1,"c":1}', '{"x":1}'),
        (BASE | {"dependentRequired": {"a": ["b"]}}, '{"a":1,"b":1}', '{"x":1}'),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#"} | BASE | {"required": ["b"]},
            '{"b":1}',
            '{"b":1,"x":1}',
        ),
    ],
)
def test_closed_objects_have_the_keys_that_the_schema_names(tokens, schema, right, wrong):
    validator = checked_validator(schema, "s.json")
    as_it_is, inside = (compile_schema(s, tokens, validator=validator) for s in (validator.schema, closed(schema)[0]))
    assert inside.writes(right) and not inside.writes(wrong) and closed(schema)[1]
    assert as_it_is.writes(wrong)


def test_an_object_that_is_also_part_of_a_larger_one_is_closed_where_it_stands_alone(tokens):
    properties = {"more": {"allOf": [{"$ref": "#/$defs/b"}, MORE]}, "alone": {"$ref": "#/$defs/b"}}
    schema, pointers = closed({"type": "object", "properties": properties, "$defs": {"b": BASE}})
    assert pointers == ["", "/properties/more", "/properties/alone"]
    grammar = compile_schema(schema, tokens)
    assert grammar.writes('{"more":{"a":1,"b":1,"c":1},"alone":{"a":1}}')
    assert not grammar.writes('{"alone":{"a":1,"x":1}}') and not grammar.writes('{"more":{"c":1,"x":1}}')
    assert grammar.validator.is_valid({"more": {"a": 1, "b": 1, "c": 1}, "alone": {"a": 1}})


@pytest.mark.parametrize(
    "schema",
    [
        BASE | {"additionalProperties": True},
        BASE | {"additionalProperties": {"type": "integer"}},
        BASE | {"patternProperties": {"^x": {}}},
        BASE | {"allOf": [{"additionalProperties": True}]},
        {"type": "object"},
        {"not": BASE},
    ],
)
def test_objects_that_say_what_else_they_take_stay_open(schema):
    assert closed(schema) == (schema, [])


def test_drafts_that_ignore_what_stands_next_to_a_reference_are_enforced_so(tokens):
    place = {"$ref": "#/definitions/x", "type": "string"}
    schema = {"properties": {"a": place}, "required": ["a"], "definitions": {"x": {"type": "integer"}}}
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    grammar = compile_schema(schema, tokens)
    assert grammar.writes('{"a":1}') and grammar.validator.is_valid({"a": 1})
    del schema["$schema"]
    assert not compile_schema(schema, tokens).writes('{"a":1}')


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


def test_types_that_contain_one_another_without_end_are_refused():
    names = [f"t{i}" for i in range(12)]
    types = {one: {"properties": {name: {"$ref": f"#/$defs/{name}"} for name in names}} for one in names}
    with pytest.raises(InputError, match="more than 10000 fields"):
        noted_validator({"$ref": "#/$defs/t0", "$defs": types}, "s.json")


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
    validator = checked_validator(schema, "s.json")
    fields = [(f.path, f.types, f.choices) for f in field_schemas(validator.schema)]
    assert fields == [
        ("", (), ()),
        ("vendor", ("string", "null"), ()),
        ("kind", ("null",), ("a", "b")),
        ("items", ("array", "null"), ()),
        ("items[]", ("object", "null"), ()),
        ("items[].qty", ("integer",), ()),
        ("items[].parts", ("array",), ()),
        ("items[].parts[]", ("object",), ()),
        ("total", (), (5,)),
    ]
    assert [
        f.path for f in field_schemas({"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}})
    ] == ["", "[]"]
    assert len([*field_schemas(True)]) == 1
