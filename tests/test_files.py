"""Files: JSONL is read as it was written; one process at a time writes a path."""

from __future__ import annotations

import fcntl
import os

import pytest
from conftest import HOLD, all_files, other_process

from common import InputError
from distil.files import hold, read_jsonl, write_jsonl


def test_jsonl_keeps_every_character(tmp_path):
    """Some Unicode marks count as line ends in Python's splitlines, but not in JSONL."""
    rows = [{"input": "a\u2028b\u0085c\u2029d\x0ce\rf\ng", "output": "\U0001f600"}] * 2
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl", ("input", "output")) == rows


def test_one_process_at_a_time_holds_a_path(here):
    """By whatever spelling; a killed process holds nothing, and nothing is left."""
    (here / "alias").symlink_to(here)
    with other_process(HOLD, "out.jsonl") as process:
        for name in ("out.jsonl", "alias/out.jsonl", str(here / "sub" / ".." / "out.jsonl")):
            with pytest.raises(InputError, match=rf"out.jsonl: another run \(process {process.pid}\) is writing it"):
                hold(name).__enter__()
        with hold("other.jsonl"):
            pass
    assert all_files(here) == [".out.jsonl.lock", "alias"]
    with hold("out.jsonl"), hold("alias/out.jsonl"):  # a part of the block around it
        assert (here / ".out.jsonl.lock").read_text().split() == [str(os.getpid())]
    with pytest.raises(ZeroDivisionError), hold("new/folder/run"):
        assert all_files(here / "new") == ["folder", "folder/.run.lock"]
        raise ZeroDivisionError
    assert all_files(here) == ["alias"]


def test_a_lock_file_that_its_run_removed_does_not_count(here, monkeypatch):
    """Between opening and locking it: two runs would have locks on two files."""
    lock, flock, calls = here / ".out.lock", fcntl.flock, []

    def remove_first(handle, operation):
        if not calls:
            lock.unlink()
        calls.append(operation)
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with hold("out"):
        assert len(calls) == 2 and lock.exists()


def test_without_locks_of_the_file_system_work_goes_on(here, monkeypatch):
    def no_locks(*args):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with hold("out"):
        (here / "out").write_text("x")
    assert all_files(here) == ["out"]
