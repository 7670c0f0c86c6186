"""JSONL in, JSONL out, resumable: for the infer scripts one line for each line read, in the same order; for scripts
that ask a model for training data answers as they come.

Apart from common.py because training never needs it. Results go to <output>.part and are renamed at the end; a run
that was interrupted goes on from there, if it is the same run. Of several processes each takes one stretch of the
lines into a .part file of its own; the first joins them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from files import InputError, check_folder, parse_json, read_json, write_json
from processes import gather, own_share, rank_and_world


def failed_line(row: dict, code: str, message: str) -> dict:
    """The object of a line that cannot be done."""
    return {**row, "error": {"code": code, "message": message}}


def parse_line(line: str, fields: Sequence[str]) -> tuple[dict, str | None]:
    """(object, text of the first of `fields` that is there), or (object with its error, None)."""
    if not line.strip():
        return failed_line({}, "not_json", "the line is empty"), None
    if any("\ud800" <= sign <= "\udfff" for sign in line):  # what `_lines` makes of bytes that are no UTF-8
        return failed_line({}, "not_utf8", "the line is not UTF-8 text"), None
    try:
        row = parse_json(line)
    except ValueError as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        return failed_line({}, "not_json", f"the line is not JSON: {reason}"[:300]), None
    if not isinstance(row, dict):
        return failed_line({}, "not_an_object", f"an object is needed, found {type(row).__name__}"), None
    row.pop("error", None)  # of an earlier run, whose error lines were put right
    text = next((row[field] for field in fields if field in row), None)
    if not isinstance(text, str) or not text.strip():
        wanted = f'"{fields[0]}"' + "".join(f' (or "{other}")' for other in fields[1:])
        return failed_line(row, f"no_{fields[0]}", f"a non-empty string {wanted} is needed"), None
    return row, text


def check_files(source: Path, output: Path, overwrite: bool) -> int:
    """Lines of the input. Raises InputError where it is missing or empty, or the output is there already."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if source.suffix.lower() == ".csv":
        raise InputError(f"{source}: JSONL is needed, one object a line (the server's page takes CSV files)")
    if output.exists() and output.samefile(source):
        raise InputError(f"{output}: is the --input; choose another --output")
    check_output(output, overwrite)
    if overwrite:
        _part(output).unlink(missing_ok=True)
    total = sum(1 for _ in _lines(source))
    if not total:
        raise InputError(f"{source}: empty")
    return total


def check_output(output: Path, overwrite: bool) -> None:
    """Raises InputError where the output cannot be written, or is there already and no run that may replace it was
    interrupted."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder, a file is needed")
    check_folder(output.parent)
    if output.exists() and not overwrite and not _part(output).exists():
        raise InputError(f"{output}: exists; --overwrite replaces it")


def run_file(
    source: Path, output: Path, total: int, settings: dict[str, Any], chunk: int, work: Callable[[list[str]], list]
) -> int:
    """Write work(lines) of each `chunk` lines; returns how many carry an "error", in the first process of all lines.

    settings: all that decides the results, compared before an interrupted run is gone on with (InputError)."""
    from tqdm import tqdm

    part, stat, mine = _part(output), source.stat(), own_share(total)
    settings = settings | {"input_size": stat.st_size, "input_time": stat.st_mtime_ns}
    done = _resume_point(part, settings, together=chunk)
    if done:
        print(f"{part}: going on after {done} rows", file=sys.stderr)
    failed = sum('"error"' in line and "error" in json.loads(line) for line in _lines(part)) if done else 0
    bar = tqdm(total=len(mine), initial=done, unit="row", file=sys.stderr)
    with open(part, "a", encoding="utf-8") as out, bar:
        rest = islice(_lines(source), mine.start + done, mine.stop)
        while lines := list(islice(rest, chunk)):
            for row in work(lines):
                failed += "error" in row
                out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            out.flush()
            bar.update(len(lines))
    failed = sum(gather(failed))
    rank, world = rank_and_world()
    if rank == 0:
        _join([_part(output, i, world) for i in range(world)], output)
        if failed:
            print(f"{output}: {failed} of {total} lines carry an error", file=sys.stderr)
    return failed


def _join(parts: list[Path], output: Path) -> None:
    if len(parts) > 1:
        whole = output.with_name(output.name + ".joined")  # a .part file that grew would no longer be gone on with
        with open(whole, "wb") as out:
            for part in parts:
                with open(part, "rb") as lines:
                    shutil.copyfileobj(lines, out)
        whole.replace(output)
    else:
        parts[0].replace(output)
    _remove_parts(output)


def _remove_parts(output: Path) -> None:
    """Of any number of processes: what an interrupted run left would let a later one replace the output unasked."""
    for path in output.parent.iterdir():
        if re.fullmatch(re.escape(output.name) + r"(\.\d+of\d+)?\.part(\.json|\.lock)?", path.name):
            path.unlink(missing_ok=True)


def _part(output: Path, rank: int | None = None, world: int = 1) -> Path:
    """The .part file of a process, of this one by default."""
    if rank is None:
        rank, world = rank_and_world()
    return output.with_name(f"{output.name}.part" if world == 1 else f"{output.name}.{rank}of{world}.part")


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from lines


def _resume_point(part: Path, settings: dict, answering: str = "model", together: int = 1) -> int:
    """Lines already done in an interrupted run's .part file. What is half written is cut off: of a last line, and of
    the last `together` lines, which the model must see together again for the same digits.

    Raises InputError where that run had other settings: its lines must not be mixed with ours."""
    note = part.with_name(part.name + ".json")
    if not part.exists():
        write_json(note, settings)
        return 0
    before = read_json(note) if note.exists() else None
    if before != settings:
        other = f"{note.name} is missing"
        if before is not None:
            other = ", ".join(sorted(k for k in before | settings if before.get(k, ...) != settings.get(k, ...)))
        raise InputError(
            f"{part}: left by a run with another {answering}, input or flags ({other}); --overwrite starts again"
        )
    done = size = end = 0
    with open(part, "r+b") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            if line.endswith(b"\n") and number % together == 0:
                done, size = number, end
        lines.truncate(size)  # in place: a kill here must not cost the lines that are done
    return done


class AnswerFile:
    """Answers as they come, in <output>.part: a killed run's are read again, but for those of the last `together`
    that were not all written."""

    def __init__(self, output: str, settings: dict[str, Any], overwrite: bool, together: int = 1):
        self.output, self.settings = Path(output), settings
        self.path = _part(self.output)
        self.answers: dict[int, dict[str, Any]] = {}
        self._lock = self._locked()
        if overwrite:
            self.path.unlink(missing_ok=True)
        if _resume_point(self.path, settings, "teacher", together):
            for number, line in enumerate(_lines(self.path), 1):
                try:
                    answer = parse_json(line)
                    self.answers[answer.pop("row")] = answer
                except (ValueError, KeyError, AttributeError, TypeError):
                    raise InputError(
                        f"{self.path}: line {number} is damaged; take it out, and its prompt is asked again"
                    ) from None
            print(f"{self.path}: going on after {len(self.answers)} answers", file=sys.stderr)

    def _locked(self) -> int:
        """Held until the process ends: a second run would ask for the same answers. Raises InputError there."""
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT | os.O_WRONLY)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{self.path}: another run is writing it; wait for its end, or stop it") from None
        except OSError:
            pass  # a file system without locks
        return lock

    def collect(self, answers: Iterator[tuple[int, dict[str, Any]]], total: int, name: str) -> None:
        """Write each answer at once, with a progress bar."""
        from tqdm import tqdm

        with (
            open(self.path, "a", encoding="utf-8") as out,
            tqdm(total=total, initial=len(self.answers), desc=name, unit="row", file=sys.stderr) as bar,
        ):
            for number, answer in answers:
                out.write(json.dumps({"row": number} | answer, ensure_ascii=False, allow_nan=False) + "\n")
                out.flush()
                self.answers[number] = answer
                bar.update()

    def remove(self) -> None:
        _remove_parts(self.output)
