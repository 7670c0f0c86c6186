"""JSONL in, JSONL out: lines that cannot be done, and what is never written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distil.batch import _resume_point, parse_line, run_file
from distil.files import write_json


def test_a_number_read_as_infinity_is_refused_and_never_written(tmp_path):
    row, text = parse_line('{"document": "x", "id": 1e999}', ("document",))
    assert text is None and "1e999 is too large" in row["error"]["message"]
    assert parse_line('{"document": "x", "id": 1e308}', ("document",))[1] == "x"
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        work = [{"score": float("inf")}]
        run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", 1, {}, 1, lambda lines: work)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "line", ['{"features": "Age: 3", "note": "\\ud800"}', "[" * 100_000, '{"features": "Age: 3", "x": NaN}']
)
def test_a_line_that_could_not_be_written_back_carries_an_error(line):
    """Half a surrogate pair, nesting that Python cannot follow, NaN."""
    row, text = parse_line(line, ("features",))
    assert text is None and row["error"]["code"] == "not_json"
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def test_finished_lines_survive_a_kill(here, monkeypatch):
    """The .part file is cut in place: rewritten, it would be empty for a moment."""
    part = here / "out.jsonl.part"
    part.write_text("1\n2\n3\n4")
    write_json(here / "out.jsonl.part.json", {})
    monkeypatch.setattr(Path, "write_bytes", lambda *args: 1 / 0)
    assert _resume_point(part, {}, together=2) == 2
    assert part.read_text() == "1\n2\n"
