"""JSONL in, JSONL out: lines that cannot be done, and what is never written."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from common import InputError
from distil.batch import _resume_point, check_output, parse_line, run_file
from distil.files import write_json


def test_a_number_read_as_infinity_is_refused_and_never_written(tmp_path):
    row, text = parse_line('{"document": "x", "id": 1e999}', ("document",))
    assert text is None and "1e999 is too large" in row["error"]["message"]
    assert parse_line('{"document": "x", "id": 1e308}', ("document",))[1] == "x"
    row, text = parse_line('{"document": "x", "fields": {"Age": 23, "Age": 50}}', ("document",))
    assert text is None and '"Age" occurs twice' in row["error"]["message"]
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        work = [{"score": float("inf")}]
        run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", {}, 1, lambda lines: work)
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


def test_an_input_that_changes_meanwhile_is_refused(here):
    """Lines of two versions would be mixed, or lines be missing."""
    source = here / "in.jsonl"
    source.write_text('{"n": 0}\n' * 4)

    def work(lines):
        source.write_text('{"n": 1}\n' * 3)
        return [json.loads(line) for line in lines]

    with pytest.raises(InputError, match=r"in\.jsonl: changed while it was read; --overwrite starts again"):
        run_file(source, here / "out.jsonl", {}, 2, work)
    assert not (here / "out.jsonl").exists() and not (here / "out.jsonl.part").read_text()
    run_file(source, here / "out.jsonl", {}, 2, lambda lines: [json.loads(line) for line in lines])
    assert (here / "out.jsonl").read_text() == '{"n": 1}\n' * 3  # nothing was kept


def test_an_input_of_another_content_is_no_resume(here):
    source, part = here / "in.jsonl", here / "out.jsonl.part"
    source.write_text('{"n": 0}\n' * 4)

    def work(lines):
        if part.read_text():
            raise KeyboardInterrupt
        return [json.loads(line) for line in lines]

    with pytest.raises(KeyboardInterrupt):
        run_file(source, here / "out.jsonl", {}, 2, work)
    source.write_text('{"n": 1}\n' * 4)
    with pytest.raises(InputError, match=r"left by a run with another .* \(input_sha256\)"):
        run_file(source, here / "out.jsonl", {}, 2, work)


def test_an_output_named_like_an_unfinished_file_is_refused(here):
    """It could be the one that another run is about to rename."""
    with pytest.raises(InputError, match="such names are for unfinished files; choose another --output"):
        check_output(here / "out.jsonl.part", overwrite=True)


def test_a_part_file_that_was_removed_or_is_anothers_ends_the_run(here):
    """Also where someone removed the lock next to the output."""
    Path("in.jsonl").write_text('{"x": 1}\n' * 4)
    source, output = Path("in.jsonl"), Path("out.jsonl")

    def remove(lines):
        Path("out.jsonl.part").unlink(missing_ok=True)
        return [{} for _ in lines]

    with pytest.raises(InputError, match="was removed or replaced meanwhile; run the same command again"):
        run_file(source, output, {}, 2, remove)
    assert not output.exists()
    with open("out.jsonl.part", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing it"):
            run_file(source, output, {}, 2, lambda lines: [{} for _ in lines])
