"""Read and write JSON and JSONL, atomically and with errors that name file and line; locks, hashes, cache folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import InputError
from distil.processes import rank_and_world

_held: set[Path] = set()  # lock files of this process


@contextlib.contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Keep other runs from writing `path`, a file or a folder, until the block ends; a block inside one is part of it.
    Of a launcher's processes the first decides; another waits until its like in a run that was refused has ended.
    A killed run's lock is free. Where the file system has no locks, nothing is locked.
    Raises InputError with the id of the process that holds it."""
    target, rank = Path(path).resolve(), rank_and_world()[0]
    lock = target.with_name(f".{target.name}.{rank}.lock" if rank else f".{target.name}.lock")
    if lock in _held:
        yield
        return
    created = [folder for folder in lock.parents if not folder.exists()]
    handle = _locked(lock, path, wait=rank > 0)
    _held.add(lock)
    try:
        yield
    finally:
        _held.remove(lock)
        if handle is not None:
            lock.unlink(missing_ok=True)  # first: who opened it meanwhile sees that it is gone, and tries again
            os.close(handle)
        for folder in created:
            with contextlib.suppress(OSError):  # it has files now
                folder.rmdir()


def _locked(lock: Path, path: str | Path, wait: bool) -> int | None:
    """Return the open and locked file `lock` with this process's id in it, None where locks do not work."""
    while True:
        handle = None
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):  # the run that had it removed it
                if os.path.samestat(os.fstat(handle), lock.stat()):
                    os.pwrite(handle, f"{os.getpid():<12}".encode(), 0)
                    return handle
            os.close(handle)
        except BlockingIOError:
            holder = os.pread(handle, 12, 0).decode().strip() or "unknown"
            os.close(handle)
            fix = "wait until it ends, or stop it"
            raise InputError(f"{path}: another run (process {holder}) is writing it; {fix}") from None
        except OSError:
            return handle


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[Any]:
    """Open `path` for writing text under a temporary name in the same folder; rename it into place at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as handle:
            yield handle
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_writer(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False, allow_nan=False)
        out.write("\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one object a line, atomically."""
    with atomic_writer(path) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """Return a file's text (UTF-8, with or without a byte order mark). Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def check_folder(path: str | Path) -> None:
    """Raise InputError where a folder can neither be written nor created."""
    nearest = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is a file, a folder is needed")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest}: is not writable; choose another folder")


def parse_json(text: str, unique: bool = False) -> Any:
    """Return the value of a JSON text. Raises ValueError for anything else, and for what could not be written back:
    NaN, infinity, numbers read as infinity (1e999), half a surrogate pair, nesting too deep for Python. unique: also
    for a name that an object has twice, of which the last value would be taken."""
    try:
        pairs = _unique if unique else None
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=pairs)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{max(names, key=names.count)}" occurs twice in one object; keep one')
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises InputError if it cannot be read or is not JSON."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: str | Path, required: Sequence[str]) -> list[dict]:
    """Return the objects of a JSONL file, each with the `required` fields as non-empty strings; "a|b" is a or else b.
    Blank lines are skipped. Raises InputError with file, line, what is missing and found, and a count of bad lines."""
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, unique=True)
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({error})")
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number} is {type(row).__name__}, not an object")
            continue
        for names in (fields.split("|") for fields in required):
            field = next((name for name in names if name in row), names[0])
            if not isinstance(row.get(field), str) or not row[field].strip():
                value = json.dumps(row[field])[:40] if field in row else f"fields {sorted(row)}"
                wanted = " or ".join(f'"{name}"' for name in names)
                problems.append(f"line {number} needs {wanted} as a non-empty string, found {value}")
        rows.append(row)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {problems[0]}{more}")
    if not rows:
        raise InputError(f"{path}: no rows; one JSON object a line with {', '.join(required)} is expected")
    return rows


def check_writable(path: str | Path) -> None:
    """Raise InputError where a file can neither be written nor replaced."""
    check_folder(Path(path).parent)
    if Path(path).is_dir() or (Path(path).exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{path}: cannot be written; remove it, or change its rights")


def hashed(path: str | Path, read: Callable[[], Any]) -> tuple[Any, str]:
    """Return (read(), SHA-256 of the file that it read). Raises InputError where the file changed meanwhile."""
    before = file_state(path)
    value, digest = read(), file_sha256(path)
    if file_state(path) != before:
        raise InputError(f"{path}: changed while it was read; start again when what writes it has ended")
    return value, digest


def file_state(path: str | Path) -> tuple[int, ...]:
    """Return inode, size and times of a file, empty where there is none: another state is another content."""
    if not Path(path).is_file():
        return ()
    stat = Path(path).stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_dir() -> Path:
    """Return the folder of what can be recreated (models, priors): $DISTIL_SLM_CACHE or ~/.cache/distil-slm."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DISTIL_SLM_CACHE") or caches / "distil-slm")
