"""Long documents: pages, and one answer of theirs."""

from __future__ import annotations

from distil.idp.documents import joined, pages_of


def test_pages_end_at_form_feeds_and_long_lines_are_cut():
    assert pages_of("a\fb", lambda text: True) == ["a", "\fb"]
    assert pages_of("one\n\f\n \n\ftwo\n\f", lambda text: True) == ["one\n", "\ftwo\n"]
    assert all(len(page) <= 10 for page in pages_of("word " * 9, lambda text: len(text) <= 10))


def test_values_come_from_the_page_that_has_them_and_lists_are_joined():
    pages = ["ACME Ltd, No. 7\nPen 2.00\n1.1", "\fInk 3.00\nPen 2.00", "\fTotal due: 7.00 EUR of 4 March 2024"]
    item = [{"n": "Pen", "p": 2}, {"n": "Ink", "p": 3}]
    answers = [
        {"vendor": "ACME Ltd", "total": 2.5, "sums": {"due": 5, "lines": [item[0]]}, "paid": None, "note": None},
        {"vendor": "Pen Ltd", "total": 5, "sums": {"due": 5, "lines": [item[1], item[0]]}, "paid": True, "note": "x"},
        {"vendor": "ACME", "total": 7, "sums": {"due": 7, "lines": []}, "date": "2024-03-04"}
        | {"paid": None, "note": ""},
    ]
    assert joined(answers, pages) == {
        "vendor": "ACME Ltd",
        "total": 7,  # 2.5 and 5 are on no page
        "sums": {"due": 7, "lines": [item[0], item[1], item[0]]},
        "paid": None,  # nothing to read in the text: the first page's
        "note": None,
        "date": "2024-03-04",
    }
    assert joined([[1, 2], [2]], ["", ""]) == [1, 2, 2]
    assert joined([None, [1], None], ["", "", ""]) == [1] and joined([None, 8], ["7", "8"]) == 8
    assert joined([4, 5], ["", "x"]) == 4
