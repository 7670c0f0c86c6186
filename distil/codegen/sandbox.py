"""Run generated Python with its tests where it can do little harm: one short-lived process per program.

This file is the harness: it starts the process, limits its time and reads its answer. `sandbox_child.py` runs in that
process: it locks itself in and then runs the generated code.

Layers, each used where the system has it: limits on time, memory and written bytes; an audit hook and a seccomp filter
against processes, threads, signals, sockets and shared memory; Landlock against reading anything but Python's own
libraries and against writing outside an empty folder; own user, process, network and mount namespaces (`unshare`), in
which that folder is a small file system in memory and all else is read-only; no capabilities.

A program passes only if a secret comes back that is sent after the last test, so printing "passed" or exiting early
does not count; while the program runs, no object that it can reach holds the secret. Not covered: code that searches
the interpreter's memory by address, answers that claim to equal whatever they are compared with, that replace the
builtins a test uses or look up what the test that calls them expects; without Landlock (kernels before 5.13), reading
files; from Python 3.13 on, signal handlers and collector callbacks that write variables of the hook's running frame.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SECONDS, MEMORY_MB, FILE_MB, TOTAL_MB = 5.0, 1024, 16, 64


@dataclass(frozen=True)
class Outcome:
    """Report whether a program passed all its tests, and if not, why (text that can be encoded)."""

    passed: bool
    problem: str = ""


@functools.cache
def child_source() -> str:
    """Read the inner program once per process; it is passed as text (`python -I -S -c`), not by its path.
    So the child needs no access to the project's folder, which Landlock hides, has no `__file__` and no entry of that
    folder in `sys.path`, and a file that changes meanwhile does not mix two versions in one run of the harness."""
    return Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")


def isolation() -> tuple[str, ...]:
    """Find the `unshare` command that works here: user, process, network and mount namespaces, or nothing."""
    return _working("unshare", "-r", "-n", "-p", "-m", "-f", "--kill-child", "--")


def tied() -> tuple[str, ...]:
    """Find the `setpriv` command that works here: the child is killed when the harness dies. Or nothing."""
    return _working("setpriv", "--pdeathsig", "KILL", "--")


@functools.cache
def _working(*command: str) -> tuple[str, ...]:
    """Return the command if it can start a program here, or nothing."""
    works = shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode
    return command if works else ()


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    """Make a folder for one run, and remove it with all in it.
    Nested folders are first moved up: what a program nests can be too deep for a recursion and for a path."""
    folders = [tempfile.mkdtemp()]
    work = os.path.join(folders[0], "work")
    os.mkdir(work)
    try:
        yield work
    finally:
        with contextlib.suppress(OSError):
            for folder in folders:  # grows
                for entry in list(os.scandir(folder)):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(os.path.join(folders[0], str(len(folders))))
                        os.chmod(entry.path, 0o700)
                        os.rename(entry.path, folders[-1])
                    else:
                        os.unlink(entry.path)
            for folder in reversed(folders):
                os.rmdir(folder)


def _exceeds(folder: str, limit: int) -> bool:
    """Check whether a folder holds more bytes than the limit; each entry counts as one block at least."""
    waiting = [folder]
    while waiting and limit >= 0:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                limit -= max(4096, entry.stat(follow_symlinks=False).st_size)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return limit < 0


def run_program(program: str, tests: Sequence[str], seconds: float = SECONDS) -> Outcome:
    """Run a program and then its tests (statements that raise where they fail) in a separate process.
    seconds: wall time of all. Never raises for what the program does."""
    secret, (reading, writing) = secrets.token_hex(16), os.pipe()
    problem, deadline = "", time.monotonic() + seconds
    with _empty_folder() as folder:
        job = {"program": program, "tests": list(tests), "seconds": seconds, "memory_mb": MEMORY_MB}
        job |= {"file_mb": FILE_MB, "total_mb": TOTAL_MB, "namespaces": bool(isolation()), "secret": secret}
        command = [*tied(), *isolation(), os.path.realpath(sys.executable), "-I", "-S", "-c", child_source()]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": writing}
        child = subprocess.Popen(command, **streams, cwd=folder, env={}, start_new_session=True)
        os.close(writing)
        unsent: bytes | None = json.dumps(job).encode()
        try:
            while not problem:
                try:
                    child.communicate(unsent, timeout=min(0.25, max(0.0, deadline - time.monotonic())))
                    break
                except subprocess.TimeoutExpired:
                    unsent = None  # communicate still has what the child did not read yet
                    if time.monotonic() >= deadline:
                        problem = f"not done after {seconds:g} s"
                    elif _exceeds(folder, TOTAL_MB << 20):
                        problem = f"wrote more than {TOTAL_MB} MB"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as answers:
        answer = answers.read(65536) or b""  # None where nothing was written
    if not problem and secret.encode() in answer:
        return Outcome(True)
    text = answer.decode("utf-8", "replace")[:300]
    return Outcome(False, problem or text or "ended before its tests did, or exceeded a limit")


def run_programs(jobs: Sequence[tuple[str, Sequence[str]]], seconds: float = SECONDS) -> list[Outcome]:
    """Run (program, tests) jobs, as many at a time as there are cores, and return the outcomes in order."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: run_program(*job, seconds=seconds), jobs))
