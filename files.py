"""What every script must do alike with its surroundings: errors and exit status, JSON and JSONL files, splits."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Wrong input (flag, file, data, model). `run_script` turns it into one line and exit status 2."""


def number_or_auto(text: str) -> int | str:
    """Type of a flag that is a whole number or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def run_script(main: Callable[[list[str] | None], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed while running, 2 wrong input; tracebacks only with --debug."""
    name = Path(sys.argv[0]).name
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        print(f"{name}: stopped: nobody reads the output on (`| head`)", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again at its end
        status = 1
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"{name}: error: the package {error.name} is missing: activate the environment that `make demo` makes "
            "(source .venv/bin/activate), or pip install -r requirements.txt",
            file=sys.stderr,
        )
        status = 2
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"{name}: error: {error.filename or ''}: {error.strerror}; check the path and its rights", file=sys.stderr
        )
        status = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split())
        if any(words in text for words in ("No space left", "unexpected pos", "PytorchStreamWriter")):  # torch's words
            text = "the disk is full; make room, then go on: a trainer with --resume, others with the same command"
        print(f"{name}: failed: {type(error).__name__}: {text} (--debug shows the traceback)", file=sys.stderr)
        status = 1
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        # A process that ends with its group alive may abort (SIGABRT).
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.exit(status)


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
    with atomic_writer(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False, allow_nan=False)
        out.write("\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with atomic_writer(path) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """The file's text (UTF-8, with or without a byte order mark). Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def check_folder(path: str | Path) -> None:
    """Raises InputError where a folder to write in can neither be used nor made."""
    path = Path(path)
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is a file, a folder is needed")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest}: nothing can be written there; choose another folder")


def seed_number(text: str) -> int:
    """argparse type of a seed: what all random number generators in use take."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return int(text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none or could not be written back: NaN, infinity, what
    is read as infinity (1e999), half a surrogate pair, nesting too deep for Python."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises InputError if it cannot be read or is not JSON."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: str | Path, required: Sequence[str]) -> list[dict]:
    """Objects of a JSONL file, each with the `required` fields as non-empty strings; "a|b" is a, or b in its place.

    Raises InputError naming file, line number, what is missing and what was found, for the first bad line and with
    a count of the others. Blank lines are skipped.
    """
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({error})")
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number} is {type(row).__name__}, not an object")
            continue
        for fields in required:
            names = fields.split("|")
            field = next((name for name in names if name in row), names[0])
            if not isinstance(row.get(field), str) or not row[field].strip():
                found = json.dumps(row[field])[:40] if field in row else f"fields {sorted(row)}"
                wanted = " or ".join(f'"{name}"' for name in names)
                problems.append(f"line {number} needs {wanted} as a non-empty string, found {found}")
        rows.append(row)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {problems[0]}{more}")
    if not rows:
        raise InputError(f"{path}: no rows; one JSON object a line with {', '.join(required)} is expected")
    return rows


def preparation(data: str) -> dict[str, Any]:
    """What a prepare script noted beside a data file (split seed, source), empty for data of another origin; with
    "changed" where the note is of other content of that file."""
    changed = {}
    for path in sorted(Path(data).parent.glob("*_prepared.json")):
        note = read_json(path)
        if not isinstance(note, dict) or not isinstance(note.get("files", {}), dict):
            raise InputError(f"{path}: no note of prepared data (an object with files is expected); prepare it again")
        if noted := note.get("files", {}).get(Path(data).name):
            if noted == file_sha256(data):
                return note
            changed = {"changed": str(path)}  # by another script, which left a note of its own, or by hand
    return changed


def unchanged_preparation(data: str) -> dict[str, Any]:
    """`preparation` for a script that makes other data of it: without a note these would pass for data of another
    origin, and nobody could tell which customers they have. Raises InputError for a file that was changed since."""
    note = preparation(data)
    if "changed" in note:
        raise InputError(
            f"{data}: changed since {note['changed']} was written; prepare it again, or give what was changed "
            "a folder of its own"
        )
    return note


def note_preparation(output: str, note: dict[str, Any], **more: Any) -> None:
    """Leave beside a data file made from another what was noted of that one, if its split is known."""
    path = Path(output)
    if "split_seed" in note:
        note = note | {"files": {path.name: file_sha256(path)}, **more}
        write_json(path.with_name(f"{path.stem}_prepared.json"), note)


def write_parts(outdir: str, task: str, parts: dict[str, list[dict]], src: str, note: dict[str, Any]) -> None:
    """Write `task`_<part>.jsonl of each part, then beside them `note` (split_seed ...) with the source's hash, from
    where trainers take the split. Raises InputError, before it writes, for an empty part."""
    check_folder(outdir)
    for part, rows in parts.items():
        if not rows:
            raise InputError(f"nothing falls into the {part} part; change --val_share or --split_seed")
    note_path, files = Path(outdir) / f"{task}_prepared.json", {}
    for path in (note_path, *(Path(outdir) / f"{task}_{part}.jsonl" for part in parts)):
        if path.is_dir():
            raise InputError(f"{path}: a folder is in the way; move it, or choose another --outdir")
    note_path.unlink(missing_ok=True)  # an old one must not speak for new files
    for part, rows in parts.items():
        path = Path(outdir) / f"{task}_{part}.jsonl"
        write_jsonl(path, rows)
        files[path.name] = file_sha256(path)
        print(f"wrote {len(rows)} rows to {path}")
    write_json(note_path, note | {"source": {"file": src, "sha256": file_sha256(src)}, "files": files})


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_dir() -> Path:
    """Folder of what can be made again (converted model, priors): $DISTIL_SLM_CACHE or ~/.cache/distil-slm."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distil-slm"
    return Path(os.environ.get("DISTIL_SLM_CACHE") or default)


def hash_share(name: str, seed: int) -> float:
    """A number from 0 to 1 that depends on name and seed alone and is spread evenly over many names."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(customer: str, split_seed: int = 0) -> str:
    """'train' (60 %), 'calibration' (10 %) or 'validation' (30 %), by a hash of the customer and the split seed."""
    share = hash_share(customer, split_seed)
    return "train" if share < 0.6 else "calibration" if share < 0.7 else "validation"
