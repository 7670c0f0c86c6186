"""Preference pairs: how JSON is judged, and which answers become a pair."""

from __future__ import annotations

import json

from distil.teachers.preferences import best_and_worst, json_judge
from distil.testing import ROOT

INVOICE = json.loads(json.loads((ROOT / "data/idp_validation.jsonl").read_text().split("\n")[0])["expected"])


def test_json_is_judged_by_schema_and_fields():
    schema = json.loads((ROOT / "data/idp_schema.json").read_text())
    judge = json_judge([{"output": json.dumps(INVOICE)}], "in.jsonl", schema, "schema")
    right = judge(0, json.dumps(INVOICE))
    wrong_total = judge(0, json.dumps(INVOICE | {"total": INVOICE["total"] + 1}))
    assert right == 1.0 and 0 < wrong_total < 1
    for broken in ("{", "[]", json.dumps(INVOICE | {"more": 1}), json.dumps({"total": 5}), "NaN"):
        assert judge(0, broken) == -1.0


def test_best_and_worst():
    texts = ["aa", "b", "ccc", "d"]
    assert best_and_worst(texts, [1.0, 1.0, 0.0, 0.0]) == ("aa", "ccc")  # the first, of any length
    assert best_and_worst(texts, [0.0, 0.5, 0.0, 1.0]) == ("d", "aa")
    assert best_and_worst(["a", "b"], [0.5, 0.5]) is None
    assert best_and_worst(["a", "b"], [0.0, -1.0]) is None  # the better one is wrong too
