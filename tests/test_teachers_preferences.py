"""Preference pairs: how JSON is judged, and which answers become a pair."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common import InputError
from distil.idp.validation import checked_validator
from distil.teachers import preferences
from distil.teachers.preferences import PairOptions, best_and_worst, json_judge, label_pairs
from distil.testing import ROOT

INVOICE = json.loads(json.loads((ROOT / "data/idp_validation.jsonl").read_text().split("\n")[0])["expected"])


def test_json_is_judged_by_schema_and_fields():
    schema = json.loads((ROOT / "data/idp_schema.json").read_text())
    judge = json_judge([{"output": json.dumps(INVOICE)}], "in.jsonl", checked_validator(schema, "schema"))
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


@pytest.fixture
def scored(monkeypatch):
    """Let the student's scores fall from label to label; the labels it was asked for are recorded."""
    requested = []

    class Student:
        def __init__(self, ref, options):
            pass

        def scorer(self, labels):
            requested.append(labels)
            return self

        def raw_scores(self, turns, progress):
            return np.tile(-np.arange(len(requested[-1]), dtype=float), (len(turns), 1))

    class Ref:
        name = "student"

    monkeypatch.setattr(preferences, "ModelTeacher", Student)

    def pairs(outputs, labels=()):
        rows = [{"input": "-", "output": output} for output in outputs]
        return label_pairs(rows, Ref(), PairOptions(input="in.jsonl"), labels)

    return pairs, requested


def test_pairs_of_many_labels(scored):
    pairs, requested = scored
    topics = [f"topic {number}" for number in range(77, 0, -1)]
    # The task's labels are all candidates, in its order, also those that no row has.
    assert pairs(["topic 3", "topic 77"], topics) == [("topic 3", "topic 77"), ("topic 77", "topic 76")]
    assert pairs(["b", "a", "b"]) == [("b", "a"), ("a", "b"), ("b", "a")]
    assert len(pairs(topics)) == 77
    assert requested == [topics, ["a", "b"], sorted(topics)]
    for outputs in (["a"], [str(number) for number in range(101)]):
        with pytest.raises(
            InputError, match=rf"in\.jsonl: {len(outputs)} different outputs; label tasks have 2 to 100"
        ):
            pairs(outputs)
    with pytest.raises(InputError, match=r"in\.jsonl: output 'c' is not a label of its task: a, b"):
        pairs(["a", "c"], ["a", "b"])
