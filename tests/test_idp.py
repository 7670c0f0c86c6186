"""Documents to JSON: whatever leaves infer_idp.py validates; what cannot be enforced is named; measures by hand."""

from __future__ import annotations

import json
import random
from collections import Counter

import jsonschema
import pytest

import eval_idp
import idp
import idp_prepare
import infer_idp
from common import InputError, load_model, preparation
from conftest import run_cli
from decoding import JsonDecoder, compile_schema, grammar_tokenizer, subschemas
from eval_idp import count_fields, days, numbers, same, stands_in
from idp import Extractor, compact_json, idp_prompt, pages_of

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
        "properties": {"items": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 2}},
        "required": ["items"],
        "additionalProperties": False,
    }
    document = "\n".join(f"line {i} of a long document" for i in range(60))
    pages = extractor(decoder, schema)._pages(document)
    assert len(pages) > 1 and "\n".join(pages) == document
    single = [answer["json"]["items"] for answer in extractor(decoder, schema).extract(pages)]
    (answer,) = extractor(decoder, schema, chunk=True).extract([document])
    assert answer["json"]["items"][: len(single[0])] == single[0]
    assert set(answer["json"]["items"]) == {item for items in single for item in items}


def test_pages_end_at_form_feeds_and_a_line_without_end_is_cut():
    assert pages_of("a\fb", lambda text: True) == ["a", "\fb"]
    assert all(len(page) <= 10 for page in pages_of("word " * 9, lambda text: len(text) <= 10))


# --------------------------------------------------------------------------------------------------------- measures


def test_numbers_and_days_of_a_text():
    from datetime import date
    from decimal import Decimal

    assert {Decimal("1234.5"), Decimal("3"), Decimal("1007.50")} <= numbers("1.234,50 and 3 of RM1,007.50")
    (meant,) = days("on 03/04/2024")
    assert meant == {date(2024, 3, 4), date(2024, 4, 3)}
    for text in ("25 Dec 2018", "25-DEC-18", "December 25, 2018", "2018-12-25", "25.12.18", "25/12/2018 8:13"):
        assert list(days(text)) == [{date(2018, 12, 25)}], text
    assert not list(days("99/99/2018 and 12.50"))


@pytest.mark.parametrize(
    ("name", "a", "b", "equal"),
    [
        ("total", 9, 9.0, True),
        ("total", 0.1, 0.10000001, False),
        ("date", "25/12/2018", "2018-12-25", True),
        ("date", "03/04/2018", "2018-04-03", True),
        ("date", "03/04/2018", "04/03/2018", True),
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


def test_inventions_are_values_that_do_not_stand_in_the_document():
    document = "ACME  Sdn. Bhd\nDate: 25/12/2018\nTotal RM 1,007.50"
    assert stands_in("company", "Acme Sdn Bhd", document) and not stands_in("company", "Acme Inc", document)
    assert stands_in("total", 1007.5, document) and not stands_in("total", 1007.6, document)
    assert stands_in("date", "2018-12-25", document) and not stands_in("date", "2018-12-26", document)
    schema = {"properties": {"currency": {"enum": ["MYR"]}}}
    rows = [{"document": document, "expected": {"currency": "MYR"}}]
    assert eval_idp.measure(rows, [{"json": {"currency": "MYR"}}], schema, 10)["invention_rate"] == 0


# ---------------------------------------------------------------------------------------------------------- scripts


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
