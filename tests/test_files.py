"""Files: JSONL is read as it was written."""

from __future__ import annotations

from distil.files import read_jsonl, write_jsonl


def test_jsonl_keeps_every_character(tmp_path):
    """Some Unicode marks count as line ends in Python's splitlines, but not in JSONL."""
    rows = [{"input": "a\u2028b\u0085c\u2029d\x0ce\rf\ng", "output": "\U0001f600"}] * 2
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl", ("input", "output")) == rows
