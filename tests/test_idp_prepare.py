"""idp_prepare.py: answers in the form of the schema, groups that stay together, broken copies."""

from __future__ import annotations

import json
import random

import pytest
from conftest import read_lines, write_lines
from llguidance import LLMatcher

import idp_prepare
from common import InputError
from distil.idp.documents import compact_json, idp_prompt
from distil.idp.schema import compile_schema, grammar_tokenizer
from distil.splits import preparation
from distil.testing import run_cli


def test_answers_take_the_form_of_the_schema_and_groups_stay_together(tmp_path):
    properties = {"company": {"type": "string"}, "total": {"type": ["number", "null"]}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    totals = ["RM 1,007.50", "9.00", "", "$8.20", "-1.73"]
    rows = [{"document": f"d{i}", "expected": {"total": totals[i % 5], "company": f"C{i % 12}"}} for i in range(60)]
    source = write_lines(tmp_path / "src.jsonl", rows)
    argv = ["--src", source, "--schema", tmp_path / "s.json", "--group", "company", "--outdir", tmp_path]
    assert idp_prepare.main([*map(str, argv)]) == 0
    sft, validation = read_lines(tmp_path / "idp_sft.jsonl"), read_lines(tmp_path / "idp_validation.jsonl")
    assert len(sft) + len(validation) == 60
    assert {json.loads(r["output"])["total"] for r in sft} <= {1007.5, 9, None, 8.2, -1.73}
    assert all(list(json.loads(r["output"])) == ["company", "total"] for r in sft)
    assert not {json.loads(r["output"])["company"] for r in sft} & {r["expected"]["company"] for r in validation}
    assert sft[0]["input"].startswith(idp_prompt("d")[:10])
    noted = preparation(str(tmp_path / "idp_sft.jsonl"))  # where the trainers take the split from
    assert noted["split_seed"] == 0 and noted["source"]["file"] == source


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
    value = idp_prepare.in_schema_form(text, {"type": "number"})
    assert value == (text if number is None else number) and type(value) is not bool


def test_an_answer_that_cannot_be_read_as_a_number_is_refused_with_its_row(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"total": {"type": "number"}}}')
    rows = [{"document": "a", "expected": {"total": text}} for text in ("1,50", "INV5")]
    argv = [
        "--src",
        write_lines(tmp_path / "src.jsonl", rows),
        "--schema",
        tmp_path / "s.json",
        "--outdir",
        tmp_path / "out",
    ]
    with pytest.raises(InputError, match=r'row 2: "expected" breaks the schema at /total: .INV5. is not'):
        idp_prepare.main([*map(str, argv)])


ITEM = {"type": "object", "properties": {"qty": {"type": "integer"}, "price": {"type": ["number", "null"]}}}


@pytest.mark.parametrize(
    ("schema", "answer", "text"),
    [
        ({"items": {"$ref": "#/$defs/Item"}}, [{"price": "1,007.50", "qty": "2"}], '[{"qty":2,"price":1007.5}]'),
        ({"items": {"anyOf": [{"$ref": "#/$defs/Item"}, {"type": "null"}]}}, [{"price": "", "qty": 2}, None], None),
        ({"prefixItems": [{"type": "number"}], "items": {"type": "string"}}, ["1,50", "1,50"], '[1.5,"1,50"]'),
        ({"allOf": [{"$ref": "#/$defs/Item"}], "properties": {"a": {}}}, {"a": 1, "qty": "2"}, '{"qty":2,"a":1}'),
        ({"properties": {"a": {}}, "allOf": [{"$ref": "#/$defs/Item"}]}, {"qty": "2", "a": 1}, '{"a":1,"qty":2}'),
        ({"properties": {"a": {}}, "required": ["c", "b"]}, {"b": 1, "a": 2, "c": 3}, '{"a":2,"c":3,"b":1}'),
        (
            {"additionalProperties": {"$ref": "#/$defs/Item"}},
            {"x": {"price": 1, "qty": 2}},
            '{"x":{"qty":2,"price":1}}',
        ),
        ({"patternProperties": {"^x": {"type": "number"}}}, {"xy": "5 EUR", "z": "5"}, '{"xy":5,"z":"5"}'),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "", "null"),
        ({"anyOf": [{"type": "number"}, {"type": "string"}]}, "5", '"5"'),
        ({"type": "number", "nullable": True}, " ", "null"),
        (
            {
                "oneOf": [
                    {"properties": {"k": {"const": 1}, "b": {}, "a": {}}},
                    {"properties": {"k": {"const": 2}, "a": {}}},
                ]
            },
            {"a": 1, "b": 2, "k": 1},
            '{"k":1,"b":2,"a":1}',
        ),
    ],
)
def test_answers_take_the_order_and_types_of_what_a_schema_refers_to(schema, answer, text, tokenizer):
    text = text or '[{"qty":2,"price":null},null]'
    grammar = compile_schema(schema | {"$defs": {"Item": ITEM}}, grammar_tokenizer(tokenizer))
    assert compact_json(idp_prepare.in_schema_form(answer, grammar.validator.schema)) == text
    matcher = LLMatcher(grammar.tokenizer, grammar.grammar)
    assert matcher.consume_tokens(grammar.tokenizer.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "answer", "message"),
    [
        (
            {"properties": {"total": {"multipleOf": 0.01}}},
            {"total": 0.005},
            "at /total: 0.005 is not a multiple of 0.01",
        ),
        ({"properties": {"total": {"type": "number"}}}, {"total": 5, "vat": 1}, "at /: Additional properties .*'vat'"),
        ({"type": "array"}, ["a list"], "no 'vendor' in the line or its answer"),
        ({"properties": {"total": {"type": "number"}}}, {"total": 1e-7}, r'cannot be written .*: {"total":1e-07}'),
        ({"properties": {"total": {"type": "number"}}}, {"total": 10**17}, "at most 15 digits"),
    ],
)
def test_answers_that_decoding_could_not_produce_are_refused(schema, answer, message, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(schema))
    source = write_lines(tmp_path / "src.jsonl", [{"document": "d", "expected": answer}])
    argv = ["--src", source, "--schema", tmp_path / "s.json", "--group", "vendor", "--outdir", tmp_path / "out"]
    with pytest.raises(InputError, match=f"row 1.*{message}"):
        idp_prepare.main([*map(str, argv)])
    assert not (tmp_path / "out").exists()


def test_amounts_with_a_step_are_accepted_and_a_list_can_have_a_group(tmp_path):
    schema = {"type": "array", "items": {"type": "number", "multipleOf": 0.01}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    rows = [{"document": f"d{i}", "vendor": i, "expected": ["19.99", 0.07, 1.15]} for i in range(9)]
    source = write_lines(tmp_path / "src.jsonl", rows)
    argv = ["--src", source, "--schema", tmp_path / "s.json", "--group", "vendor", "--outdir", tmp_path]
    assert idp_prepare.main([*map(str, argv)]) == 0
    assert {row["output"] for row in read_lines(tmp_path / "idp_sft.jsonl")} == {"[19.99,0.07,1.15]"}
    assert compact_json(idp_prepare.in_schema_form([5.0], {"items": {"type": "integer"}})) == "[5]"


def test_broken_copies_break_values_and_nothing_else():
    document = "INVOICE\nAIK HUAT, HARDWARE (M) SDN BHD\nTotal: 12.50\nEND OF PAGE"
    answer = {"company": "Aik Huat Hardware (M) SDN BHD", "total": 12.5, "items": [{"name": "not there at all"}]}
    copies = {idp_prepare.broken_copy(document, answer, random.Random(seed)) for seed in range(60)}
    assert document in copies and len(copies) == 6  # each of the five gaps, and the document itself
    for copy in copies - {document}:
        assert copy.count("\n") == document.count("\n") + 1 and copy.split() == document.split()
        first, second = copy.split("\n")[1:3]
        assert document.split("\n")[1] == f"{first} {second}"


def test_lines_may_have_their_own_schemas_and_variants_are_of_training_alone(tmp_path):
    total = {"type": "object", "properties": {"total": {"type": "number"}, "name": {"type": "string"}}}
    age = {"title": "CV", "type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    answers = [
        {"expected": {"age": i}, "schema": age} if i % 2 else {"expected": {"name": "N", "total": i}}
        for i in range(60)
    ]
    source = write_lines(tmp_path / "src.jsonl", [row | {"document": f"doc {i}"} for i, row in enumerate(answers)])
    (tmp_path / "s.json").write_text(json.dumps(total))
    argv = ["--src", source, "--schema", str(tmp_path / "s.json"), "--val_share", "0.2", "--dev_share", "0.2"]
    assert idp_prepare.main([*argv, "--schema_variants", "3", "--outdir", str(tmp_path / "a")]) == 0
    sft, val, validation = (read_lines(tmp_path / f"a/idp_{part}.jsonl") for part in ("sft", "val", "validation"))
    assert len(sft) == 4 * (60 - len(val) - len(validation))
    for row in sft:
        _, schema, _, document = row["input"].split("\n")
        shown = [field.partition(":")[0].strip('"?') for field in schema.removeprefix("Schema: {").split(",")]
        assert list(json.loads(row["output"])) == shown
        assert document.startswith("doc ")
    forms = {tuple(json.loads(row["output"])) for row in sft}
    assert forms == {("age",), ("total",), ("name",), ("total", "name"), ("name", "total")}
    assert all(row["input"].startswith("Extract the CV") == ("age" in row["output"]) for row in sft)
    assert {tuple(json.loads(row["output"])) for row in val} == {("age",), ("total", "name")}
    assert all(row["schema"] == (age if "age" in row["expected"] else total) for row in validation)
    note = preparation(str(tmp_path / "a/idp_sft.jsonl"))
    assert note["documents"] == {"instruction": None, "show_schema": True} and note["schema_variants"] == 3
    assert idp_prepare.main([*argv, "--schema_variants", "3", "--outdir", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/idp_sft.jsonl").read_bytes() == (tmp_path / "b/idp_sft.jsonl").read_bytes()
    with pytest.raises(InputError, match=r'row 1 has no "schema"; give --schema'):
        idp_prepare.main(["--src", source, "--outdir", str(tmp_path / "c")])
    with pytest.raises(InputError, match="only 0 with --show_schema off"):
        idp_prepare.main([*argv, "--schema_variants", "1", "--show_schema", "off", "--outdir", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()


def test_variants_whose_references_lead_nowhere_are_left_out():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}}}
    variants = idp_prepare.variants_of(schema, {"a": 1, "b": 2}, 30, random.Random(0))
    assert {tuple(part) for _, part in variants} == {("a", "b"), ("b", "a"), ("a",)}


def test_wrong_input_ends_with_status_2_and_one_line(tmp_path):
    done = run_cli("idp_prepare.py", "--src", "no.jsonl", "--schema", "no.json", "--outdir", "x", cwd=tmp_path)
    assert done.returncode == 2 and "no.json" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
