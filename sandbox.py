"""Run generated Python with its tests where it can do little harm: one short-lived process per program.

Layers, each used where the system has it: limits on time, memory and files; an audit hook and a seccomp filter against
processes, threads, signals and sockets; the hook and Landlock against writing outside an empty folder; own user,
process and network namespaces (`unshare`). A program counts as passed only if a secret comes back that the harness
sends after the last test, so printing "passed" or leaving early does not count. Not covered: code that searches the
interpreter's own memory for that secret; a model under training does not, an attacker could.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SECONDS, MEMORY_MB, FILE_MB = 5.0, 1024, 16
# Runs in the child, before the program: reads the job, locks itself in, runs the program and then each test.
CHILD = r"""
import json, os, resource, struct, sys
job = json.load(sys.stdin)
folder = os.path.realpath(os.getcwd())
os.dup2(os.open(os.devnull, os.O_RDWR), 0)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what both filters ask for

def landlock():
    "Writing beneath the folder alone; kernels from 5.13."
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return
    writing = sum(1 << bit for bit in (1, *range(4, 13), *range(13, min(abi, 3) + 12)))
    rules = libc.syscall(444, ctypes.byref(ctypes.c_uint64(writing)), 8, 0)
    for path, rights in ((folder, writing), (os.devnull, writing & (1 << 1 | 1 << 14))):
        rule = rights.to_bytes(8, sys.byteorder) + os.open(path, os.O_PATH).to_bytes(4, sys.byteorder)
        libc.syscall(445, rules, 1, rule, 0)
    libc.syscall(446, rules, 0)

# clone, fork, vfork, clone3, execve, execveat, kill, tkill, tgkill, rt_sigqueueinfo, pidfd_send_signal, socket,
# ptrace, process_vm_readv and _writev, prlimit64, setrlimit, unshare, setns, io_uring_setup: numbers by machine.
CALLS = {
    "x86_64": (0xC000003E, (56, 57, 58, 435, 59, 322, 62, 200, 234, 129, 424, 41, 101,
                            310, 311, 302, 160, 272, 308, 425)),
    "aarch64": (0xC00000B7, (220, 435, 221, 281, 129, 130, 131, 138, 424, 198, 117,
                             270, 271, 261, 164, 97, 268, 425)),
}

def seccomp():
    "System calls that fail with EPERM from now on."
    machine = os.uname().machine
    if machine not in CALLS:
        return
    arch, calls = CALLS[machine]
    checks = [(0x35, len(calls) + 1, 0, 0x40000000)] + [(0x15, len(calls) - i, 0, c) for i, c in enumerate(calls)]
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (6, 0, 0, 0x80000000), (0x20, 0, 0, 0), *checks]
    lines += [(6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x00050001)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    kept = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(kept))
    libc.prctl(22, 2, program, 0, 0)

def inside(path):
    if isinstance(path, int):
        return True
    path = os.path.realpath(os.fsdecode(path))
    return path in (folder, os.devnull) or path.startswith(folder + os.sep)

CHANGES = ("remove", "rename", "rmdir", "mkdir", "chmod", "chown", "link", "symlink", "truncate", "utime", "chflags")
FORBIDDEN = ("socket", "ctypes", "subprocess", "pty", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "telnetlib")
PROCESSES = ("fork", "forkpty", "exec", "posix_spawn", "spawn", "system", "kill", "killpg", "startfile", "chroot")

def guard(event, details):
    area, _, name = event.partition(".")
    if event == "open":
        path, _, flags = details
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) and not inside(path):
            raise PermissionError(f"writing outside the folder: {path}")
        if not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith("/proc/"):
            raise PermissionError("reading about processes")
    elif area in FORBIDDEN or area == "os" and name in PROCESSES or event == "signal.pthread_kill":
        raise PermissionError(event)
    elif area == "os" and name in CHANGES and not all(inside(d) for d in details if isinstance(d, (str, bytes))):
        raise PermissionError(f"changing what is outside the folder: {event}")

landlock()
seconds, megabyte = int(job["seconds"] + 1), 1 << 20
for kind, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, job["memory_mb"] * megabyte), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_FSIZE, job["file_mb"] * megabyte), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(kind, (limit, limit))
seccomp()
report, secret = job["report"], job["secret"]

def run():
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    problem = None
    try:
        exec(compile(job["program"], "<program>", "exec"), space)
        for number, test in enumerate(job["tests"], 1):
            try:
                exec(compile(test, f"<test {number}>", "exec"), space)
            except AssertionError as error:
                return f"test {number} fails: {error}"[:300]
    except SyntaxError as error:
        problem = f"does not parse: {error}"
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
    return problem and problem[:300]

sys.addaudithook(guard)
problem = run()
os.write(report, json.dumps([secret, problem]).encode())
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed all its tests, and if not, why."""

    passed: bool
    problem: str = ""


@functools.cache
def isolation() -> tuple[str, ...]:
    """The `unshare` command that works here: user, process and network namespaces, or nothing."""
    command = ("unshare", "-r", "-n", "-p", "-f", "--kill-child", "--")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    works = shutil.which("unshare") and subprocess.run([*command, "true"], **quiet).returncode == 0
    return command if works else ()


def run_program(program: str, tests: Sequence[str], seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> Outcome:
    """Run a program and then its tests (statements that raise where they fail) in a process of their own.

    seconds: wall time of all; memory_mb: address space. Never raises for what the program does."""
    secret = secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job = {"program": program, "tests": list(tests), "seconds": seconds, "memory_mb": memory_mb}
        job |= {"file_mb": FILE_MB, "report": writing, "secret": secret}
        command = [*isolation(), os.path.realpath(sys.executable), "-I", "-S", "-c", CHILD]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            pass_fds=(writing,),
        )
        os.close(writing)
        timed_out = False
        try:
            child.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    os.set_blocking(reading, False)
    try:
        answer = os.read(reading, 65536)
    except BlockingIOError:
        answer = b""
    finally:
        os.close(reading)
    try:
        token, problem = json.loads(answer)
    except (ValueError, TypeError):
        token, problem = "", ""
    if timed_out:
        return Outcome(False, f"not done after {seconds:g} s")
    if token != secret:
        return Outcome(False, "ended before its tests did, or exceeded a limit")
    return Outcome(problem is None, problem or "")


def run_programs(jobs: Sequence[tuple[str, Sequence[str]]], seconds: float = SECONDS) -> list[Outcome]:
    """Outcomes of (program, tests) in order; as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: run_program(*job, seconds=seconds), jobs))
