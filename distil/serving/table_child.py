"""Turn an uploaded table into rows for the page; runs as a short-lived process that `uploads` starts.

What strangers send may be built to fill the memory (a small .xlsx, .gz or .parquet can expand a thousandfold) or to
crash a parser written in C. So this process limits its own memory and time, and it holds no model and no key.
"""

from __future__ import annotations

import json
import resource
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from common import InputError
from distil.creditmix.scored import RowsToScore
from distil.sheets import cell_text
from distil.tasks import Task, task_of

MAX_ROWS = 1000
MAX_EXPANDED = 64_000_000  # bytes of a compressed file after decompression
MAX_CELLS = 8_000_000  # characters of all cells, which go back to the page
MEMORY = 2 << 30  # bytes of address space, of which libraries take a quarter
LARGER = "infer_creditmix.py --input reads larger files"


def check_expanded(path: Path) -> None:
    """Check what a file says of its size after decompression, before a library reads it. Raises InputError."""
    data, size, rows = path.read_bytes(), 0, 0
    try:
        if data[:2] == b"\x1f\x8b":
            size = len(zlib.decompressobj(31).decompress(data, MAX_EXPANDED + 1))
        elif data[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as parts:  # reads no part beyond the size stated here
                size = sum(part.file_size for part in parts.infolist())
        elif data[:4] == b"PAR1":
            from pyarrow import parquet

            about = parquet.read_metadata(path)
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
            size, rows = sum(group.total_byte_size for group in groups), about.num_rows
    except Exception as error:  # of many types, by libraries that meet a damaged file
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path}: damaged, or not what its first bytes say it is ({reason})") from None
    if size > MAX_EXPANDED:
        raise InputError(f"{path}: has more than {MAX_EXPANDED / 1e6:g} MB when decompressed; {LARGER}")
    check_rows(path, rows)


def check_rows(path: Path, rows: int) -> None:
    """Raise InputError where a table has more rows than the page takes."""
    if rows > MAX_ROWS:
        raise InputError(f"{path}: has {rows:,} rows; the page takes {MAX_ROWS:,}. {LARGER}")


def table_rows(path: Path, task: Task, decimal: str | None, most: int) -> dict[str, Any]:
    """Return what the page needs of a table: "header" and "cells" as they are, the "lines" and "features" of rows,
    "problems" (why a row cannot be scored, by its number) and "notes" on what was assumed. most: characters of a
    feature string. Raises InputError."""
    check_expanded(path)
    rows = RowsToScore(path, path.with_name("page.csv"), task, decimal, refer=True)
    rows.open()
    check_rows(path, rows.count)
    answer: dict[str, Any] = {"header": rows.header, "cells": [], "lines": [], "features": []}
    problems, letters = {}, 0
    for number, row in enumerate(rows):
        found, text = rows.parsed(row)
        try:
            error = found.get("error") or ({} if task.canonical(text) else {"code": "no_features"})
            problem = "no features" if error.get("code") == "no_features" else error.get("message", "")
        except InputError as error:
            problem = str(error)
        if problem := f"longer than {most} characters" if len(text or "") > most else problem:
            problems[number] = problem
        cells = [cell_text(cell) for cell in found["cells"]]
        if (letters := letters + sum(map(len, cells))) > MAX_CELLS:
            raise InputError(f"{path}: its cells have more than {MAX_CELLS / 1e6:g} million characters; {LARGER}")
        line = int(row[0]) if rows.table else number + 1
        for name, value in (("cells", cells), ("lines", line), ("features", "" if problem else text)):
            answer[name].append(value)
    said = [note if count == 1 else f"{note} ({count})" for note, count in rows.notes.items()]
    return answer | {"problems": problems, "notes": said}


def limit_itself(seconds: float) -> None:
    """Limit memory, time and written bytes of this process."""
    whole = max(1, round(seconds))
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_CPU": whole, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": MAX_EXPANDED}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def main() -> int:
    """Answer the job on standard input with one JSON object: that of `table_rows`, or {"code", "message"}."""
    job = json.load(sys.stdin)
    limit_itself(job["seconds"])
    path = Path(job["path"])
    try:
        answer = table_rows(path, task_of(job["task"], "task"), job["decimal"], job["most"])
        text = json.dumps(answer)
    except (InputError, MemoryError) as error:
        large = isinstance(error, MemoryError) or "MemoryError" in str(error) or "malloc" in str(error)
        message = f"needs too much memory; {LARGER}" if large else str(error)
        message = message.removeprefix(f"{path}: ").replace(str(path), job["name"])
        message = message.replace("--decimal", "decimal mark")  # a choice on the page
        code = "two_readings" if "two readings" in message else "not_read"
        print(json.dumps({"code": code, "message": f"{job['name']}: {message}"}))
        return 3
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
