"""infer_idp.py: one document or a file of them."""

from __future__ import annotations

import json

import jsonschema
import pytest
from conftest import INVOICE_SCHEMA, read_lines, write_lines

import infer_idp
from common import InputError
from distil.idp import extractor
from distil.testing import run_cli


def test_a_missing_file_is_not_taken_as_a_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "invoices").mkdir()
    (tmp_path / "may 2024").write_text("INVOICE 5")
    for text in (
        *("march invoices/may 2024.txt", "docs.jsonl", "scan 7.PDF", "invoices/may 2024", "a/b", "/no/such file"),
        *("~/x", "./x y", "invoice.txt", "C:\\docs\\may.txt"),
    ):
        with pytest.raises(InputError, match=r"no such file .*give --document - and pipe it"):
            infer_idp.read_document(text)
    with pytest.raises(InputError, match="is a folder"):
        infer_idp.read_document("invoices")
    assert infer_idp.read_document("may 2024") == "INVOICE 5"
    with pytest.raises(InputError, match="not UTF-8"):
        infer_idp.read_document("Total \udcff 5")
    for text in ("Total:5.00", "12/05/2024", "N/A 5", "Net / Gross 5.00", "x" * 5000, "see a.txt\nTotal 5"):
        assert infer_idp.read_document(text) == text


def test_one_document_prints_json_that_validates(model_dir, schema_file, tmp_path, capsys):
    document = tmp_path / "doc.txt"
    document.write_text("INVOICE 7\nTotal 3.50 EUR")
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--document", document, "--max_new_tokens", "200"]
    assert infer_idp.main([*map(str, argv)]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), INVOICE_SCHEMA)


def test_nothing_is_printed_where_no_valid_close_fits(model_dir, schema_file, capsys):
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--document", "x", "--max_new_tokens", "3"]
    assert infer_idp.main([*map(str, argv)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "no valid ending" in shown.err


def test_a_file_keeps_order_and_marks_lines_that_cannot_be_done(model_dir, schema_file, tmp_path):
    output = tmp_path / "out.jsonl"
    before = {"json": {"number": "old"}, "truncated": False, "evidence": 5}  # of an earlier run
    rows = [{"document": "A 1", "id": 1} | before, {"id": 2}, {"input": "B 2"}]
    rows += [{"document": "word " * 3000} | before, "[1]"]
    source = write_lines(tmp_path / "in.jsonl", rows)
    argv = ["--model_dir", model_dir, "--schema", schema_file, "--input", source, "--output", output]
    assert infer_idp.main([*map(str, argv), "--max_new_tokens", "200"]) == 1
    out = read_lines(output)
    codes = [row.get("error", {}).get("code") for row in out]
    assert codes == [None, "no_document", None, "too_long", "not_an_object"]
    assert set(out[0]) == {"document", "id", "json", "truncated"} and set(out[3]) == {"document", "error"}


def test_a_budget_as_long_as_the_context_stops_before_the_model_loads(model_dir, schema_file, monkeypatch):
    monkeypatch.setattr(extractor, "load_to_write", lambda *_: pytest.fail("the model was loaded"))
    argv = ["--model_dir", model_dir, "--schema", str(schema_file), "--document", "x", "--max_new_tokens", "600"]
    with pytest.raises(InputError, match="--max_new_tokens 600 leave 0 tokens"):
        infer_idp.main(argv)


def test_the_review_page_replaces_no_document_and_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_lines(tmp_path / "in.jsonl", [{"document": "x"}])
    for flags, page in ((["--document", "in.jsonl"], "in.jsonl"), (["--input", "in.jsonl"], f"{tmp_path}/out.jsonl")):
        files = ["--output", "out.jsonl"] if "--input" in flags else []
        with pytest.raises(InputError, match=r"--review_page .*: is the --(document|output); choose another name"):
            infer_idp.main(["--model_dir", "x", *flags, *files, "--review_page", page])
    assert read_lines(source) == [{"document": "x"}] and len([*tmp_path.iterdir()]) == 1


def test_fields_to_copy_are_checked_before_the_model_loads(model_dir, schema_file):
    engine = ["--url", "http://127.0.0.1:9/v1"]
    for flags, message in ((["--copy", "total"], "not a free text"), (["--copy", "number", *engine], "runs here")):
        with pytest.raises(InputError, match=f"--copy .*{message}"):
            infer_idp.main(["--model_dir", model_dir, "--schema", str(schema_file), "--document", "x", *flags])


def test_a_schema_file_without_a_schema_is_wrong_input(model_dir, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("null")
    with pytest.raises(InputError, match="an object is expected, found null"):
        infer_idp.main(["--model_dir", model_dir, "--schema", str(path), "--document", "x"])


def test_what_only_validation_can_check_and_what_is_closed_is_reported_before_the_model_loads(
    model_dir, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "schema.json"
    date = {"type": "string", "format": "phone"}
    path.write_text(
        json.dumps({"properties": {"a": date, "b": date | {"pattern": "(?!0)"}}, "not": {"required": ["c"]}})
    )
    monkeypatch.setattr(extractor, "load_to_write", lambda *_: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception):
        infer_idp.main(["--model_dir", model_dir, "--schema", str(path), "--document", "x", "--max_new_tokens", "99"])
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"note: {path}: no further keys at / (without additionalProperties)",
        f"note: {path}: checked after decoding only: /not, /properties/a/format, /properties/b/format, 1 more",
    ]


def test_a_schema_that_cannot_be_enforced_stops_before_the_model_loads(model_dir, tmp_path, monkeypatch):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "integer", "minimum": 3, "maximum": 2}))
    monkeypatch.setattr(extractor, "load_to_write", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="/minimum"):
        infer_idp.main(["--model_dir", model_dir, "--schema", str(path), "--document", "x"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model_dir", "x"], "give either --document"),
        (["--model_dir", "x", "--document", " "], "empty"),
        (["--model_dir", "x", "--document", "x", "--schema", "no.json"], "no.json"),
        (["--model_dir", "x", "--document", "x", "--max_new_tokens", "0"], "--max_new_tokens"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(argv, message, tmp_path):
    done = run_cli("infer_idp.py", *argv, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--overwrite"], ["--retries", "0", "--seed", "1"]])
def test_flags_without_effect_are_refused(flags, model_dir, schema_file):
    with pytest.raises(InputError, match=f"{flags[0] if len(flags) == 1 else '--seed'}: only"):
        infer_idp.main(["--model_dir", model_dir, "--schema", str(schema_file), "--document", "x", *flags])
