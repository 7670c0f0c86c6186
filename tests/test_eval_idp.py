"""eval_idp.py: rows of several forms, models side by side, groups."""

from __future__ import annotations

import copy
import json

import pytest
from conftest import read_lines, write_lines

import eval_idp
import infer_idp
from common import InputError
from distil.files import read_json
from distil.idp.documents import idp_prompt
from distil.idp.extractor import ExtractOptions
from distil.idp.values import measure
from distil.models import resolve
from distil.testing import ROOT, run_cli


def test_training_rows_can_be_evaluated_and_the_instruction_comes_once(tmp_path, model_dir):
    turn = idp_prompt("INVOICE 7\n  Total 5")
    lines = [{"input": turn, "output": '{"total":5}'}, {"document": "A", "input": "B", "expected": {}, "output": 5}]
    path = write_lines(tmp_path / "rows.jsonl", lines)
    first, second = rows = eval_idp.read_documents(path, None)
    assert first["document"] == turn
    eval_idp.by_schema(rows, [resolve(model_dir)], ExtractOptions({}), own=True)
    assert first["document"] == "INVOICE 7\n  Total 5" and first["expected"] == {"total": 5}
    assert idp_prompt(first["document"]) == turn
    assert second["document"] == "A" and second["expected"] == {}
    write_lines(path, [{"text": "x", "expected": 1}])
    with pytest.raises(InputError, match='line 1 needs "document" or "input" as a non-empty string'):
        eval_idp.read_documents(path, None)
    write_lines(path, [{"input": "x"}])
    with pytest.raises(InputError, match='row 1 has no "expected" \\(or "output"\\)'):
        eval_idp.read_documents(path, None)

    class Echo:
        options = ExtractOptions({})

        def extract(self, documents):
            return [{"json": document} for document in documents]

    (row,) = infer_idp.work_lines(Echo(), [json.dumps({"input": turn})])
    assert row["json"] == "INVOICE 7\n  Total 5" and row["input"] == turn


def test_right_answers_of_the_example_data_are_not_inventions():
    rows = eval_idp.read_documents(str(ROOT / "data/idp_validation.jsonl"), None)
    schema = read_json(ROOT / "data/idp_schema.json")
    result = measure(rows, [{"json": row["expected"]} for row in rows], schema, 2)
    assert result["exact"] == result["macro_f1"] == 1
    assert result["invention_rate"] < 0.003  # quantities of 1 that are not written


def test_expected_answers_are_cut_to_the_schema_and_lines_may_have_their_own(capsys, model_dir):
    base = resolve(model_dir)
    a, b = ({"type": "object", "properties": {name: {"type": "number"}}} for name in "ab")
    lines = [{"document": "x", "expected": {"b": 2, "a": 1}, **own} for own in ({}, {"schema": b}, {"schema": a}, {})]
    rows = copy.deepcopy(lines)
    (first, of_first), (second, of_second) = eval_idp.by_schema(rows, [base], ExtractOptions(a, "a.json"), own=True)
    assert (first.schema_name, of_first) == ("a.json", [0, 2, 3]) and second.schema == b and of_second == [1]
    assert [row["expected"] for row in rows] == [{"a": 1}, {"b": 2}, {"a": 1}, {"a": 1}]
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "note: the schema of row 2: no further keys at / (without additionalProperties)"
    assert notes[1:] == ["note: not in the schema and not measured: b, a (4 values)"]
    assert measure(rows, [{"json": row["expected"]} for row in rows], a, 2)["exact"] == 1
    ((options, numbers),) = eval_idp.by_schema(lines, [base], ExtractOptions(a, "a.json"), own=False)
    assert options.schema == a and numbers == [0, 1, 2, 3] and all(row["schema"] == a for row in lines)
    with pytest.raises(InputError, match="the schema of row 1: invalid at /type"):
        eval_idp.by_schema([{"expected": 1, "schema": {"type": 5}}], [base], ExtractOptions(a), own=True)


def test_lines_are_measured_by_their_schemas_as_these_were_checked(model_dir):
    base, given = resolve(model_dir), {"type": "object", "properties": {"a": {"enum": ["x"]}}}
    own = {"name": "inv", "schema": {"type": "object", "properties": {"b": {"enum": ["y"], "nullable": True}}}}
    rows = [{"document": "-", "expected": {"a": "x", "b": "y"}} for _ in range(2)]
    rows[0]["schema"] = own
    parts = eval_idp.by_schema(rows, [base], ExtractOptions(given), own=True)
    assert [numbers for _, numbers in parts] == [[0], [1]] and [row["schema"] for row in rows] == [
        p.schema for p, _ in parts
    ]
    assert [row["expected"] for row in rows] == [{"b": "y"}, {"a": "x"}]
    answers = [{"json": row["expected"]} for row in rows]
    assert measure(rows, answers, parts[0][0].schema, 2)["invention_rate"] == 0  # y and x are listed
    for wrong in ({"$ref": "#"}, {"properties": 5}, 5):
        with pytest.raises(InputError, match="the schema of row 1"):
            eval_idp.by_schema([{"expected": {}, "schema": wrong}], [base], ExtractOptions(given), own=True)


def test_evaluation_side_by_side_and_by_group(model_dir, schema_file, tmp_path, capsys):
    items = [{"name": "a", "qty": 1}]
    value = {"number": "7", "date": "2024-01-02", "total": 1, "paid": None, "currency": "EUR", "items": items}
    forms = [value, json.dumps(value)] * 2
    lines = [{"document": f"INVOICE {i}", "expected": e, "kind": "ab"[i % 2]} for i, e in enumerate(forms)]
    data = write_lines(tmp_path / "val.jsonl", lines)
    argv = ["--model_dir", model_dir, model_dir, "--schema", schema_file, "--data", data, "--by", "kind"]
    argv += ["--max_new_tokens", "200", "--bootstrap", "50", "--report_dir", tmp_path / "report", "--json"]
    assert eval_idp.main([*map(str, argv)]) == 0
    shown = capsys.readouterr()
    first, second = json.loads(shown.out)["models"]
    assert first["valid"] == 1 and first["fields"] == second["fields"] and set(first["by"]) == {"a", "b"}
    assert "items[].qty" in shown.err and "invention rate" in shown.err
    assert len(read_lines(tmp_path / "report" / "1_tiny-qwen2" / "predictions.jsonl")) == 4


def test_wrong_input_ends_with_status_2_and_one_line(tmp_path):
    done = run_cli("eval_idp.py", "--model_dir", "x", "--data", "no.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "no.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
