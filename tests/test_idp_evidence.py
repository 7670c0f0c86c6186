"""Evidence: places of values in documents of several layouts, log-probabilities by token, pages, calibration."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import INVOICE_SCHEMA, read_lines, write_lines
from test_idp_extractor import make_extractor

import eval_idp
from common import InputError
from distil.files import read_json
from distil.idp.confidence import apply, features, fit, measure_evidence
from distil.idp.evidence import locate, token_logprobs
from distil.idp.values import leaves
from distil.testing import save_adapter

TABLE = """Total 9.00 net
Qty  Article  Price  Amount
2    Pen 2 mm  3.00   6.00
2    Pen 3 mm  1.50   3.00
Total due: 9.00"""
COLUMNS = "Pen\nInk\nCap\n3\n2\n2\n2.50\n4.00\n2.50\n7.50\n8.00\n5.00\nPay 20.50"


def found(document: str, answer: object) -> list[tuple[str, int] | None]:
    """Return the text and the line of each value's place, None without one."""
    places = locate(answer, document)
    return [place and (document[slice(*place)], document.count("\n", 0, place[0])) for place in places]


def test_values_are_located_near_their_neighbours_in_order():
    items = [
        {"name": "Pen 2 mm", "qty": 2, "price": 3, "sum": 6},
        {"name": "Pen 3 mm", "qty": 2, "price": 1.5, "sum": 3},
    ]
    first = [("Pen 2 mm", 2), ("2", 2), ("3.00", 2), ("6.00", 2)]
    second = [("Pen 3 mm", 3), ("2", 3), ("1.50", 3), ("3.00", 3)]
    assert found(TABLE, {"items": items, "due": 9, "paid": None}) == [*first, *second, ("9.00", 4), None]
    rows = [("Pen", 3, 2.5, 7.5), ("Ink", 2, 4, 8), ("Cap", 2, 2.5, 5)]
    answer = [dict(zip("nqps", row, strict=True)) for row in rows]
    where = [place[1] for place in found(COLUMNS, answer)]
    assert where == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_a_number_in_a_word_is_taken_only_where_no_other_is():
    assert found("INV-A17\nqty 17", {"qty": 17}) == [("17", 1)] and found("INV-A17", {"qty": 17}) == [("17", 0)]


def test_a_value_has_the_log_probabilities_of_its_tokens_and_of_the_one_that_ends_it():
    text = '{"é":"né","q":58}'
    pieces = [b'{"', "é".encode()[:1], "é".encode()[1:], b'":"n', "é".encode(), b'","', b"q", b'":', b"5", b"8", b"}"]
    logprobs = [-(2.0**i) for i in range(len(pieces))]
    assert token_logprobs(text, pieces, logprobs) == [-(8 + 16 + 32), -(256 + 512 + 1024)]
    assert token_logprobs(text, pieces[1:], logprobs) == token_logprobs(text, [], []) == []


def test_values_of_a_json_text_are_distinguished_from_names():
    text = '{"a/b": [1.50, {"c":"x\\"]: ", "d":[]}], "e" :null,"f": {"g" :true}}'
    logprobs = [-(2.0**i) for i in range(len(text))]
    sums = token_logprobs(text, [letter.encode() for letter in text], logprobs)
    places = [(text.index(value), len(value)) for value in ("1.50", '"x\\"]: "', "null", "true")]
    assert sums == [sum(logprobs[start : start + size + 1]) for start, size in places]


def test_an_answer_has_evidence_for_each_value_and_is_the_same_without(decoder):
    documents = ["INVOICE 7\nTotal 3.50 EUR", "x"]
    answers = make_extractor(decoder, INVOICE_SCHEMA, evidence=True).extract(documents)
    for answer, document in zip(answers, documents, strict=True):
        values = [value for _, value in leaves(answer["json"])]
        assert [row["path"] for row in answer["evidence"]][:6] == [
            "/number",
            "/date",
            "/total",
            "/paid",
            "/currency",
            "/items/0/name",
        ]
        assert len(answer["evidence"]) == len(values)
        for row, value in zip(answer["evidence"], values, strict=True):
            assert 0 < row["confidence"] <= 1 and row.keys() == {"path", "confidence", "span"}
            assert row["span"] is None or str(value) in document
    plain = make_extractor(decoder, INVOICE_SCHEMA).extract(documents)
    assert plain == [{name: answer[name] for name in ("json", "truncated")} for answer in answers]


def test_the_confidence_of_a_choice_is_its_probability_among_the_choices(decoder):
    """Two values, the first decided by one token, the second forced."""
    properties = {"a": {"enum": [1, 2]}, "b": {"const": 7}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    reader = make_extractor(decoder, schema, evidence=True)
    (answer,) = reader.extract(["A 2 7"])
    a, b = answer["evidence"]
    assert 0.5 <= a["confidence"] < 1 and b == {"path": "/b", "confidence": 1.0, "span": [4, 5]}


def test_what_a_closing_wrote_has_no_confidence(decoder):
    schema = {"type": "array", "items": {"type": "string"}}
    (answer,) = make_extractor(decoder, schema, max_new_tokens=24, evidence=True).extract(["x"])
    assert answer["truncated"] and answer["evidence"][-1]["confidence"] == 0


def test_pages_keep_places_of_the_document_and_page_numbers(decoder):
    properties = {"items": {"type": "array", "items": {"enum": [11, 12, 13]}, "minItems": 1}}
    schema = {"type": "object", "properties": properties, "required": ["items"], "additionalProperties": False}
    document = "\f".join(f"page {n}: 11, 12, 13" + f"\nline {n} of a long document" * 25 for n in range(3))
    reader = make_extractor(decoder, schema, chunk=True, evidence=True)
    pages = reader.pages(document)
    (answer,) = reader.extract([document])
    assert len(pages) >= 3 and len(answer["evidence"]) == len(answer["json"]["items"])
    seen = set()
    for number, row in enumerate(answer["evidence"]):
        assert row["path"] == f"/items/{number}"
        if row["span"]:
            assert document[slice(*row["span"])] == str(answer["json"]["items"][number])
            assert row["page"] == 1 + document[: row["span"][0]].count("\f")
            seen.add(row["page"])
    assert seen == {1, 2, 3}


def answer_of(*rows: tuple[object, float, bool]) -> dict:
    """Return an answer with these values, raw probabilities and whether each was found."""
    evidence = [
        {"path": f"/{i}", "confidence": p, "span": [0, 1] if seen else None} for i, (_, p, seen) in enumerate(rows)
    ]
    return {"json": [value for value, *_ in rows], "evidence": evidence}


def test_the_fit_learns_how_often_such_values_are_right():
    """Values of probability 0.9 are right in 60 % of cases where they are found, else never; those of 0.99 always."""
    random = np.random.default_rng(0)
    rows, answers = [], []
    for _ in range(300):
        values = [(i, 0.99 if i < 4 else 0.9, i != 7) for i in range(8)]
        right = [True] * 4 + [*(random.random(3) < 0.6), False]
        answers.append(answer_of(*values))
        rows.append({"expected": [value if good else 100 for (value, *_), good in zip(values, right, strict=True)]})
    weights = fit(rows, answers, {})
    before = measure_evidence(rows, answers, {})
    for answer in answers:
        apply(weights, answer, frozenset())
    shown = [row["confidence"] for row in answers[0]["evidence"]]
    assert shown[:4] == pytest.approx([0.99] * 4, abs=0.02) and shown[7] < 0.05
    assert shown[4:7] == pytest.approx([0.6] * 3, abs=0.05)
    after = measure_evidence(rows, answers, {})
    assert before["ece"] > 0.2 and after["ece"] < 0.03 and after["located"] == 1
    with pytest.raises(InputError, match="--fit_confidence: 8 values with probabilities, of which 8 are right"):
        fit([{"expected": [*range(8)]}], answers[:1], {})


def test_measures_by_hand():
    """Of five values four are right; the least sure is wrong. Bins: 0.9 with 3 of 3 right, 0.5 with 1 of 2."""
    answer = answer_of((1, 0.9, True), (2, 0.9, True), (3, 0.9, False), (4, 0.5, True), (5, 0.5, True))
    result = measure_evidence([{"expected": [1, 2, 3, 4, 9]}], [answer], {})
    assert result == {"ece": pytest.approx(0.1 * 3 / 5), "confident": 1.0, "located": 0.75}
    unknown = answer_of((1, None, True))
    assert measure_evidence([{"expected": [1]}], [unknown], {}) == {"ece": None, "confident": None, "located": 1.0}
    apply([0.0, 1.0, 0.0, 0.0], unknown, frozenset())
    assert unknown["evidence"][0]["confidence"] is None


def test_features_of_values_that_nobody_reads():
    """A value that the schema lists, a null and a boolean are not missing from a document."""
    rows = features(answer_of(("EUR", 0.5, False), (None, 0.5, False), (True, 0.5, False), (7, 0.5, False)), {"[]"})
    assert rows[:, 1].tolist() == [0, 0, 0, 0]
    rows = features(answer_of(("EUR", 0.5, False), (None, 0.5, False), (True, 0.5, False), (7, 0.5, True)), set())
    assert rows[:, 1].tolist() == [1, 0, 0, 0] and rows[0, 0] == 0 and not math.isinf(rows.max())


def test_a_fit_is_stored_with_the_adapter_and_used(model_dir, schema_file, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "idp", model_dir)
    items = [{"name": "a", "qty": 1}]
    value = {"number": "7", "date": "2024-01-02", "total": 1, "paid": None, "currency": "EUR", "items": items}
    lines = [{"document": f"INVOICE {i}", "expected": value | {"paid": [None, True, False][i % 3]}} for i in range(9)]
    known = write_lines(tmp_path / "known.jsonl", lines[:5])
    data = write_lines(tmp_path / "val.jsonl", lines[5:])
    argv = ["--model_dir", adapter, "--schema", schema_file, "--data", data, "--max_new_tokens", "200"]
    argv += ["--bootstrap", "20", "--json", "--report_dir", tmp_path / "report"]
    assert eval_idp.main([*map(str, argv), "--fit_confidence", str(known)]) == 0
    shown = capsys.readouterr()
    (result,) = json.loads(shown.out)["models"]
    assert 0 <= result["ece"] <= 1 and "calibration error" in shown.err and "not calibrated" not in shown.err
    stored = read_json(tmp_path / "idp" / "confidence.json")
    assert len(stored["weights"]) == 4 and stored["fitted_on"]["documents"] == 5
    (folder,) = (tmp_path / "report").glob("0_*")
    again = read_lines(folder / "predictions.jsonl")
    assert eval_idp.main([*map(str, argv), "--evidence"]) == 0
    assert read_lines(folder / "predictions.jsonl") == again and "not calibrated" not in capsys.readouterr().err
    with pytest.raises(InputError, match="other documents than --data"):
        eval_idp.main([*map(str, argv), "--fit_confidence", str(data)])
    (tmp_path / "idp" / "confidence.json").write_text(json.dumps(stored | {"model": "0"}))
    with pytest.raises(InputError, match="of another model; fit again"):
        eval_idp.main([*map(str, argv), "--evidence"])
