"""Values and measures: dates, numbers and equality by meaning; counts, intervals and inventions by hand."""

from __future__ import annotations

from collections import Counter
from datetime import date
from decimal import Decimal

import pytest

from distil.idp.values import choices_of, count_fields, days, measure, numbers, occurs_in, places, same


def test_numbers_and_days_of_a_text():
    def values(text):
        return {value for value, *_ in numbers(text)}

    assert {Decimal("1234.5"), Decimal("3"), Decimal("1007.50")} <= values("1.234,50 and 3 of RM1,007.50")
    assert values("3 2 169,75   1\xa0200.50 2 125 250,00 1'000") >= {
        Decimal(text) for text in ("3", "2169.75", "1200.50", "125250", "1000")
    }
    assert Decimal(53) not in values("5 3") and Decimal(11234) not in values("1 1 234")
    assert [*days("on 03/04/2024 ")] == [((date(2024, 4, 3), date(2024, 3, 4)), 3, 13)]
    for text in ("25 Dec 2018", "25-DEC-18", "December 25, 2018", "2018-12-25", "25.12.18", "25/12/2018 8:13"):
        assert [day for day, *_ in days(text)] == [(date(2018, 12, 25),)], text
    assert [day for day, *_ in days("Rechnung 2026/29 vom 23.02.2026")] == [(date(2026, 2, 23),)]
    for text in ("13. März 2023", "13 mars 2023", "13. Mrz. 2023", "13.Ma\u0308rz 2023"):
        assert [*days(text)] == [((date(2023, 3, 13),), 0, len(text))], text
    for text, month in {"1 oktober": 10, "4. Mai": 5, "1er août": 8, "16 juillet": 7, "2 juin": 6, "9 maj": 5}.items():
        assert [day[0].month for day, *_ in days(f"{text} 2022")] == [month], text
    assert not list(days("99/99/2018 and 12.50")) and not list(days("12 Market 2018"))


@pytest.mark.parametrize(
    ("name", "a", "b", "equal"),
    [
        ("total", 9, 9.0, True),
        ("total", 0.1, 0.10000001, False),
        ("date", "25/12/2018", "2018-12-25", True),
        ("date", "03/04/2018", "2018-04-03", True),
        ("date", "03/04/2018", "03-04-2018", True),
        ("date", "03/04/2018", "04/03/2018", False),
        ("invoice_date", "25/12/2018", "2018-12-25", True),
        ("a.dateOfIssue", "25/12/2018", "2018-12-25", True),
        ("due-date", "25/12/2018", "2018-12-25", True),
        ("candidate", "12/03/2019 Bob", "12/03/2019 Eve", False),
        ("updated_note", "3 May 2020 first", "3 May 2020 second", False),
        ("currency", "$", "€", False),
        ("currency", " € ", "€", True),
        ("delta", "-5", "5", False),
        ("delta", "\u22125", "-5", True),
        ("language", "C++", "C", False),
        ("language", "c#", "C#", True),
        ("number", "INV-1-2", "INV 1 2", True),
        ("name", "café", "cafe\u0301", True),
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
    predicted = {"total": 6, "items": [{"n": "Ink", "q": 2}, {"n": "pen", "q": 7}, {"n": "cap", "q": 1}]}
    counts: Counter = Counter()
    assert count_fields(predicted, expected, counts) == 3
    assert counts["total", "right"] == 0 and counts["total", "predicted"] == counts["total", "expected"] == 1
    assert [counts["items[].n", kind] for kind in ("right", "predicted", "expected")] == [2, 3, 2]
    assert [counts["items[].q", kind] for kind in ("right", "predicted", "expected")] == [1, 3, 2]


def test_a_missing_answer_counts_against_recall_alone():
    rows = [{"document": "Total 5", "expected": {"total": 5, "note": None}}] * 2
    result = measure(rows, [{"json": {"total": 5, "note": None}}, {"error": {}}], {}, 100)
    assert result["fields"]["total"]["precision"] == 1 and result["fields"]["total"]["recall"] == 0.5
    assert result["valid"] == result["exact"] == 0.5 and result["invention_rate"] == 0


def test_missing_items_count_against_recall():
    """Items that are missing: p and q expected, p predicted; then nothing predicted at all."""
    counts: Counter = Counter()
    count_fields({"items": [{"n": "p"}]}, {"items": [{"n": "p"}, {"n": "q"}]}, counts)
    count_fields({"items": []}, {"items": [{"n": "r"}, {"n": "s"}]}, counts)
    count_fields({}, {"items": [{"n": "t"}]}, counts)
    assert [counts["items[].n", kind] for kind in ("right", "predicted", "expected")] == [1, 1, 5]
    counts = Counter()
    assert count_fields({"a": {}, "b": []}, {"a": "x", "b": {"c": 1}}, counts) == 0  # another kind of value
    assert counts["a", "expected"] == counts["b.c", "expected"] == 1


def test_measures_by_hand():
    rows = [
        {"document": "x: p, q", "expected": {"a": "x", "b": None, "items": [{"n": "p"}, {"n": "q"}]}},
        {"document": "y: r", "expected": {"a": "y", "b": None, "items": [{"n": "r"}]}},
        {"document": "w", "expected": {"a": "w", "b": None, "items": []}},
    ]
    answers = [
        {"json": {"a": "x", "b": None, "items": [{"n": "p"}]}, "truncated": True},
        {"json": {"a": "z", "b": None, "items": [{"n": "r"}]}, "truncated": False},
        {"json": {"a": "w", "b": None, "items": []}, "truncated": False},
    ]
    result = measure(rows, answers, {}, 100)
    assert set(result["fields"]) == {"a", "items[].n"}  # b has no value anywhere
    a, n = result["fields"]["a"], result["fields"]["items[].n"]
    assert (a["precision"], a["recall"], a["f1"], a["expected"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
    assert (n["precision"], n["recall"], n["f1"], n["expected"]) == pytest.approx((1, 2 / 3, 4 / 5, 3))
    assert result["f1"] == pytest.approx(8 / 11)  # 4 right, 5 predicted, 6 expected
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result["exact"] == pytest.approx(1 / 3) and result["truncated"] == pytest.approx(1 / 3)
    assert result["invention_rate"] == pytest.approx(1 / 5)  # of x, p, z, r, w the z


def test_intervals_are_those_of_the_binomial_distribution():
    """8 of 16 documents right, one value each: of 16 draws with p = 1/2 at most 3 are right in 1.1 % of cases and at
    most 4 in 3.8 %, so the 2.5 % percentile is 4/16."""
    rows = [{"document": "1", "expected": {"a": 1}}] * 16
    result = measure(rows, [{"json": {"a": 1 + i % 2}} for i in range(16)], {}, 4000)
    assert result["f1"] == 0.5 and result["f1_interval_95"] == [0.25, 0.75]
    assert result["fields"]["a"]["interval_95"] == [0.25, 0.75]
    assert measure(rows, [{"json": {"a": 1}}] * 16, {}, 100)["f1_interval_95"] == [1, 1]


def test_exact_needs_an_answer_with_all_values_and_no_others():
    def exact(answer, **expected):
        return measure([{"document": "x", "expected": expected}], [answer], {}, 5)["exact"]

    assert exact({"error": {}}, note=None) == exact({"error": {}}, items=[]) == 0
    assert exact({"json": {}}, note=None) == exact({"json": {"note": None, "l": []}}) == 1
    assert exact({"json": {"note": "a", "more": "b"}}, note="a") == exact({"json": {"a": {}}}, a="x") == 0
    assert measure([{"document": "x", "expected": {}}], [{"json": {}}], {}, 5)["macro_f1"] == 0  # nothing to measure


@pytest.mark.parametrize(
    ("name", "value", "document", "read"),
    [
        ("total", 1007.5, "RM1,007.50 or 1 007,50", ["1,007.50", "1 007,50"]),
        ("qty", 2, "2 2 469,00 x 12", ["2", "2"]),
        ("date", "2018-12-25", "25. De\u0301c 18; 12/25/2018 8:13", ["25. De\u0301c 18", "12/25/2018"]),
        ("date", "2023-03-13", "am 13.Ma\u0308rz 2023.", ["13.Ma\u0308rz 2023"]),
        ("name", "Müller & Sohn", "Mu\u0308ller\n  SOHN", ["Mu\u0308ller\n  SOHN"]),
        ("name", "cafe", "café, cafe", ["cafe"]),
        ("name", "strasse", "Große Straße 5", ["Straße"]),
        ("currency", "€", "€ 5 €", ["€", "€"]),
        ("number", "A-17", "x A 17, a17", ["A 17", "a17"]),
        *(("note", value, "all of it 0", []) for value in ("", " ", None, True, "none")),
    ],
)
def test_places_of_values_in_a_document(name, value, document, read):
    assert [document[start:end] for start, end in places(name, value, document)] == read


def test_inventions_are_values_that_are_not_in_the_document():
    document = "ACME  Sdn. Bhd\nDate: 25/12/2018\nTotal RM 1,007.50"
    assert occurs_in("company", "Acme Sdn Bhd", document) and not occurs_in("company", "Acme Inc", document)
    assert occurs_in("total", 1007.5, document) and not occurs_in("total", 1007.6, document)
    assert occurs_in("date", "2018-12-25", document) and not occurs_in("date", "2018-12-26", document)
    assert occurs_in("currency", "€", "5 €") and not occurs_in("currency", "$", "5 €")
    assert occurs_in("delta", "-5", "total -5") and occurs_in("name", "café", "CAFE\u0301 5")
    assert not occurs_in("paid", True, document) and not occurs_in("paid", None, document)
    schema = {"properties": {"currency": {"enum": ["MYR"]}}}
    rows = [{"document": document, "expected": {"currency": "MYR"}}]
    assert measure(rows, [{"json": {"currency": "MYR"}}], schema, 10)["invention_rate"] == 0


def test_fields_with_listed_values_are_found_through_references():
    kind = {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]}
    properties = {
        "kind": kind,
        "name": {"type": "string"},
        "lines": {"items": {"properties": {"unit": {"const": "kg"}}}},
    }
    schema = {"properties": properties, "$defs": {"Kind": {"enum": ["a", "b"]}}}
    assert [*choices_of(schema)] == ["kind", "lines[].unit"]
