"""Files answered row by row, resumable: one output line per input line for the infer scripts (JSONL, or what
`answer_file` is given rows of), answers as they come for the scripts that ask a model for training data.

Results go to <output>.part, which is renamed at the end; an interrupted run resumes from it if input, model and flags
are the same. Of several processes each writes one stretch of the lines into its own .part file; the first joins them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from common import InputError
from distil.files import check_folder, file_sha256, file_state, hold, parse_json, read_json, write_json
from distil.models import ModelRef, check_unchanged, model_fingerprint, resolve
from distil.processes import gather, only_one, own_share, rank_and_world
from distil.runs import conditions

# Flags that decide no answer; an address may hold a password.
NO_SETTINGS = ("overwrite", "debug", "review_page", "url", "api_key_env", "concurrency", "timeout")
Work = Callable[[list[Any]], list[dict]]  # the output object of each row, in order; JSONL: of each line


def add_file_flags(add: Callable, source: str, output: str) -> None:
    """Add the flags of every script that answers a file's lines. source, output: what the lines are."""
    add("--input", help=source)
    add("--output", help=output)
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's .part file")


def check_one_or_file(flags: Mapping[str, Any], one: str) -> None:
    """Raise InputError unless either the flag `one`, in a single process, or --input and --output are given."""
    if (flags[one] is None) == (flags["input"] is None) or (flags["input"] is None) != (flags["output"] is None):
        raise InputError(f"give either --{one}, or --input and --output")
    if flags[one] is not None and flags["overwrite"]:
        raise InputError(f"--overwrite: only with --output, --{one} writes no file")
    if flags[one] is not None:
        only_one(f"--{one}")


class Lines:
    """The lines of a JSONL file as `answer_file` takes rows, answered by JSONL."""

    def __init__(self, path: Path):
        self.path = path

    def open(self) -> None:
        """Raise InputError where the file has no lines to answer."""
        if self.path.suffix.lower() == ".csv":
            raise InputError(f"{self.path}: JSONL is needed, one object a line")
        if next(_lines(self.path), None) is None:
            raise InputError(f"{self.path}: empty")

    def __iter__(self) -> Iterator[Any]:
        return _lines(self.path)

    def finish(self, part: Path, output: Path) -> None:
        """Make the output of the .part file, which has the answers of all rows."""
        part.replace(output)


def answer_file(
    flags: Mapping[str, Any], start: Callable[[ModelRef], tuple[int, Work, dict[str, Any]]], rows: Lines | None = None
) -> int:
    """Answer the rows of --input (default: its lines) into --output, which no other run can write meanwhile; return
    the exit status. start(model): loads it and returns rows between two writes, the work on them, and contents that
    decide answers and that flags only refer to, such as a schema's. Raises InputError."""
    source, output = Path(flags["input"]), Path(flags["output"])
    rows = rows or Lines(source)
    with hold(output):
        check_files(source, output, flags["overwrite"])
        if flags["overwrite"]:
            _part(output).unlink(missing_ok=True)
        state = file_state(source)
        rows.open()
        ref = resolve(flags["model_dir"], flags.get("served_model"))
        chunk, work, contents = start(ref)
        settings = {name: value for name, value in flags.items() if name not in NO_SETTINGS}
        settings |= {"model": model_fingerprint(ref)} | contents | conditions(flags["compute_dtype"])
        check_unchanged(ref)
        _check_same(source, state)
        return 1 if run_file(source, output, settings, chunk, work, rows) else 0


def interrupted(output: Path) -> dict[str, Any]:
    """Return the settings of the interrupted run that a run would resume, {} without one."""
    note = _part(output).with_name(_part(output).name + ".json")
    return read_json(note) if _part(output).exists() and note.exists() else {}


def failed_line(row: dict, code: str, message: str) -> dict:
    """Return the output object of a line that cannot be processed."""
    return {**row, "error": {"code": code, "message": message}}


def parse_object(line: str) -> tuple[dict, bool]:
    """Return (object, whether the line is one), without an "error" of before; else the error of this line is in it."""
    if not line.strip():
        return failed_line({}, "not_json", "the line is empty"), False
    if any("\ud800" <= sign <= "\udfff" for sign in line):  # what `_lines` makes of bytes that are not UTF-8
        return failed_line({}, "not_utf8", "the line is not UTF-8 text"), False
    try:
        row = parse_json(line, unique=True)
    except ValueError as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        return failed_line({}, "not_json", f"the line is not JSON: {reason}"[:300]), False
    if not isinstance(row, dict):
        return failed_line({}, "not_an_object", f"an object is needed, found {type(row).__name__}"), False
    row.pop("error", None)  # of an earlier run, whose error lines were corrected
    return row, True


def parse_line(line: str, fields: Sequence[str]) -> tuple[dict, str | None]:
    """Return (object, text of the first of `fields` that it has), or (object with its error, None)."""
    row, good = parse_object(line)
    return named_text(row, fields) if good else (row, None)


def named_text(row: dict, fields: Sequence[str]) -> tuple[dict, str | None]:
    """Return (row, text of the first of `fields` that it has), or (row with its error, None)."""
    text = next((row[field] for field in fields if field in row), None)
    if not isinstance(text, str) or not text.strip():
        wanted = f'"{fields[0]}"' + "".join(f' (or "{other}")' for other in fields[1:])
        return failed_line(row, f"no_{fields[0]}", f"a non-empty string {wanted} is needed"), None
    return row, text


def check_files(source: Path, output: Path, overwrite: bool) -> None:
    """Raise InputError for a missing input, or an existing output without `overwrite`."""
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if output.exists() and output.samefile(source):
        raise InputError(f"{output}: is the --input; choose another --output")
    check_output(output, overwrite)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError where the output is not writable, or exists without an interrupted run that may replace it."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder, a file is needed")
    if re.search(r"\.(part(\.json)?|joined|lock)$", output.name):
        raise InputError(f"{output}: such names are for unfinished files; choose another --output")
    check_folder(output.parent)
    if output.exists() and not overwrite and not _part(output).exists():
        raise InputError(f"{output}: exists; --overwrite replaces it")


def run_file(
    source: Path, output: Path, settings: dict[str, Any], chunk: int, work: Work, rows: Lines | None = None
) -> int:
    """Write work(rows) of each `chunk` rows; return how many carry an "error" (in the first process: of all rows).
    settings: all that decides the results but the input. rows: of the source, by default its lines. Raises InputError
    where settings or input have changed."""
    from tqdm import tqdm

    part, state, rows = _part(output), file_state(source), rows or Lines(source)
    total = sum(1 for _ in rows)
    mine = own_share(total)
    settings = settings | {"chunk": chunk, "input_sha256": file_sha256(source)}
    with _alone(part) as out:
        if done := _resume_point(part, settings, together=chunk):
            print(f"{part}: resuming after {done} rows", file=sys.stderr)
        failed = sum('"error"' in line and "error" in json.loads(line) for line in _lines(part)) if done else 0
        rest = islice(rows, mine.start + done, mine.stop)
        with tqdm(total=len(mine), initial=done, unit="row", file=sys.stderr) as bar:
            while asked := list(islice(rest, chunk)):
                answers = work(asked)
                _check_same(source, state)
                failed += sum("error" in answer for answer in answers)
                _append(out, answers)
                bar.update(len(asked))
    failed = sum(gather(failed))
    rank, world = rank_and_world()
    if rank == 0:
        if world > 1:
            part = output.with_name(output.name + ".joined")  # a .part file that grew could not be resumed
            with open(part, "wb") as out:
                for i in range(world):
                    with open(_part(output, i, world), "rb") as lines:
                        shutil.copyfileobj(lines, out)
        rows.finish(part, output)
        part.unlink(missing_ok=True)
        _remove_parts(output)
        if failed:
            print(f"{output}: {failed} of {total} lines carry an error", file=sys.stderr)
    return failed


def _check_same(source: Path, state: tuple[int, ...]) -> None:
    """Raise InputError where the source has another `file_state` than before."""
    if file_state(source) != state:
        raise InputError(f"{source}: changed while it was read; --overwrite starts again")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[TextIO]:
    """Open a .part file for appending, locked: the lock next to the output can be removed by hand. Raises InputError
    where another process has it, and at the end where it is not the file at this path any more."""
    with open(part, "a", encoding="utf-8") as out:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{part}: another run is writing it; wait until it ends, or stop it") from None
        yield out
        if not part.exists() or not os.path.samestat(os.fstat(out.fileno()), part.stat()):
            raise InputError(f"{part}: was removed or replaced meanwhile; run the same command again")


def _append(out: TextIO, rows: list[dict]) -> None:
    """Write rows at once, so that a kill costs at most half a line."""
    out.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    out.flush()


def _remove_parts(output: Path) -> None:
    """Remove the .part files of any number of processes: a later run would take the output for an interrupted one."""
    for path in output.parent.iterdir():
        if re.fullmatch(re.escape(output.name) + r"(\.\d+of\d+)?\.part(\.json)?", path.name):
            path.unlink(missing_ok=True)


def _part(output: Path, rank: int | None = None, world: int = 1) -> Path:
    """Return the .part file of a process, of this one by default."""
    if rank is None:
        rank, world = rank_and_world()
    return output.with_name(f"{output.name}.part" if world == 1 else f"{output.name}.{rank}of{world}.part")


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from lines


def _resume_point(part: Path, settings: dict, answering: str = "model", together: int = 1) -> int:
    """Return the lines already complete in an interrupted run's .part file, and truncate it there.
    Half-written lines go, and incomplete groups of `together` lines, which must be in one batch again to get the same
    digits. Raises InputError where that run had other settings: its lines must not be mixed with these."""
    note = part.with_name(part.name + ".json")
    if not part.exists() or not part.stat().st_size:
        write_json(note, settings)
        return 0
    before = read_json(note) if note.exists() else {}
    if before != settings:
        changed = sorted(k for k in before | settings if before.get(k, ...) != settings.get(k, ...))
        other = ", ".join(changed) if before else f"{note.name} is missing"
        what = f"another {answering}, input or flags ({other})"
        raise InputError(f"{part}: left by a run with {what}; --overwrite starts again")
    done = size = end = 0
    with open(part, "r+b") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            if line.endswith(b"\n") and number % together == 0:
                done, size = number, end
        lines.truncate(size)  # in place: a kill here must not cost complete lines
    return done


class AnswerFile:
    """Answers as they come, in <output>.part; a killed run's are read back, but for a last group under `together`.
    Their "token_probs" (`TokenRow.packed`) stay there, since they may not fit memory: see `stored_token_probs`.
    The caller holds the output: a second run would send the same prompts."""

    def __init__(self, output: str, settings: dict[str, Any], overwrite: bool, together: int = 1):
        self.output, self.settings = Path(output), settings
        self.path = _part(self.output)
        self.answers: dict[int, dict[str, Any]] = {}
        if overwrite:
            self.path.unlink(missing_ok=True)
        with _alone(self.path):
            _resume_point(self.path, settings, "teacher", together)
            with open(self.path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        answer = parse_json(line.decode())
                        self._keep(answer.pop("row"), answer, lines.tell() - len(line))
                    except (ValueError, KeyError, AttributeError, TypeError):
                        fix = "remove it, and its prompt is sent again"
                        raise InputError(f"{self.path}: line {number} is damaged; {fix}") from None
        if self.answers:
            print(f"{self.path}: resuming after {len(self.answers)} answers", file=sys.stderr)

    def collect(self, answers: Iterator[tuple[int, dict[str, Any]]], total: int, name: str) -> None:
        """Write each answer at once, with a progress bar."""
        from tqdm import tqdm

        bar = tqdm(total=total, initial=len(self.answers), desc=name, unit="row", file=sys.stderr)
        with _alone(self.path) as out, bar:
            for number, answer in answers:
                at = out.tell()
                _append(out, [{"row": number} | answer])
                self._keep(number, answer, at)
                bar.update()

    def _keep(self, number: int, answer: dict[str, Any], at: int) -> None:
        """Keep an answer, whose line begins at byte `at` of the file."""
        if packed := answer.get("token_probs"):
            place = {"part": str(self.path), "at": at}
            answer = answer | {"token_probs": place | {name: packed[name] for name in ("tokens", "k")}}
        self.answers[number] = answer

    def remove(self) -> None:
        """Remove the .part files, once the output is written."""
        _remove_parts(self.output)


def stored_token_probs(place: Mapping[str, Any]) -> dict[str, Any]:
    """Return the "token_probs" of an answer in a .part file, `place` being what AnswerFile.answers has of them."""
    with open(place["part"], "rb") as lines:
        lines.seek(place["at"])
        return json.loads(lines.readline())["token_probs"]
