"""Run generated Python with its tests where it can do little harm: one short-lived process per program.

Layers, each used where the system has it: limits on time, memory and written bytes; an audit hook and a seccomp filter
against processes, threads, signals, sockets and shared memory; Landlock against reading anything but Python's own
libraries and against writing outside an empty folder; own user, process, network and mount namespaces (`unshare`), in
which that folder is a small file system in memory and all else is read-only; no capabilities.

A program counts as passed only if a secret comes back that is sent after the last test, so printing "passed" or
leaving early does not count; while it runs, no object that it can get at holds the secret. Not covered: code that
searches the interpreter's memory by address, answers that claim to equal whatever they are compared with, that replace
the builtins a test uses or look up what the test that calls them expects, and, without Landlock (kernels before 5.13),
reading files.
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

SECONDS, MEMORY_MB, FILE_MB, TOTAL_MB = 5.0, 1024, 16, 64
# Runs in the child, before the program: reads the job, locks itself in, runs the program and then each test.
CHILD = r"""
import builtins, collections, ctypes, functools, json, operator, os, resource, struct, sys, types
libc = ctypes.CDLL(None, use_errno=True)

def own_files(folder, megabytes):
    "In own namespaces: the folder is a small file system in memory, all else cannot be changed."
    options = b"mode=700,nr_inodes=8192,size=%dm" % megabytes
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 6, options) == 0:  # no devices, no setuid
        read_only, writable = struct.pack("4Q", 1, 0, 0, 0), struct.pack("4Q", 0, 1, 0, 0)
        libc.syscall(442, 0, b"/", 0x8000, read_only, 32)  # and all beneath
        libc.syscall(442, 0, os.fsencode(folder), 0, writable, 32)
        os.chdir(folder)

def landlock(folder):
    "Reading the libraries and the folder, writing the folder; no signals to others. Kernels from 5.13."
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return
    everything = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
    asked = struct.pack("3Q", everything, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = libc.syscall(444, asked, len(asked), 0)
    paths = {folder: everything & ~1, os.devnull: everything & (1 << 1 | 1 << 2 | 1 << 14)}
    libraries = [os.path.dirname(os.__file__)]
    libraries += [top + lib for top in (sys.base_prefix, "", "/usr", "/usr/local") for lib in ("/lib", "/lib64")]
    paths |= dict.fromkeys([*libraries, "/usr/share/zoneinfo"], 1 << 2 | 1 << 3)
    paths |= dict.fromkeys(["/dev/urandom", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"], 1 << 2)
    for path, rights in paths.items():
        if os.path.exists(path):
            rule = rights.to_bytes(8, sys.byteorder) + os.open(path, os.O_PATH).to_bytes(4, sys.byteorder)
            libc.syscall(445, rules, 1, rule, 0)
    libc.syscall(446, rules, 0)
    os.closerange(4, 64)

# Numbers on x86_64 and aarch64; 424 and above are the same on all, and newer than what Python needs.
CALLS = '''clone 56 220, fork 57, vfork 58, execve 59 221, execveat 322 281, unshare 272 97, setns 308 268,
kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
setsid 112 157, setpgid 109 154, prctl 157 167, prlimit64 302 261, setrlimit 160 164,
setpriority 141 140, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122,
sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, perf_event_open 298 241,
bpf 321 280, userfaultfd 323 282, socket 41 198,
shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180, memfd_create 319 279,
add_key 248 217, request_key 249 218, keyctl 250 219,
fchmod 91 52, fchown 93 55, fsetxattr 190 7, fremovexattr 199 16, mknod 133, mknodat 259 33,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_by_handle_at 304 265'''
FCNTL = {"x86_64": (0xC000003E, 72), "aarch64": (0xC00000B7, 25)}

def seccomp():
    "System calls that fail from now on: those above, newer ones, and fcntl where it names who gets signals."
    machine = os.uname().machine
    if machine not in FCNTL:
        return
    arch, fcntl = FCNTL[machine]
    table = [call.split()[1:] for call in CALLS.split(",")]
    calls = [int(numbers[0 if machine == "x86_64" else -1]) for numbers in table if machine == "x86_64" or numbers[1:]]
    n = len(calls)
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (6, 0, 0, 0x80000000), (0x20, 0, 0, 0), (0x35, n + 7, 0, 424)]
    lines += [(0x15, n - i + 5, 0, call) for i, call in enumerate(calls)]
    lines += [(0x15, 0, 4, fcntl), (0x20, 0, 0, 24)]  # the command: F_SETOWN, F_SETSIG, F_SETOWN_EX
    lines += [(0x15, 3, 0, 8), (0x15, 2, 0, 10), (0x15, 1, 0, 15)]
    lines += [(6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x00050001), (6, 0, 0, 0x00050026)]  # allow, EPERM, ENOSYS
    kept = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    libc.prctl(22, 2, struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(kept)), 0, 0)

CHANGES = ("remove", "rename", "rmdir", "mkdir", "chmod", "chown", "link", "symlink", "truncate", "utime", "chflags",
           "setxattr", "removexattr")
FORBIDDEN = ("socket", "ctypes", "subprocess", "pty", "urllib", "ftplib", "smtplib", "poplib", "imaplib", "telnetlib")
PROCESSES = ("fork", "forkpty", "exec", "posix_spawn", "spawn", "system", "kill", "killpg", "startfile", "chroot")
# What shows the frames of the runner or the objects in them, lets a traced test skip lines, or makes another
# interpreter, which would have no hook.
INSIGHT = ("gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames", "sys._current_exceptions",
           "sys.settrace", "sys.setprofile", "sys.monitoring.register_callback",
           "cpython.PyInterpreterState_New")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def guarding(folder):
    "The audit hook. Bound to what it needs: a program can replace functions of modules, and builtins."
    # By defaults: each refusal brings a frame, from which variables of closures can be written (Python 3.13).

    def real(path, *, getcwd=os.getcwd, readlink=os.readlink, refused=PermissionError, failed=OSError):
        "As os.path.realpath."
        parts, done, links = path.split("/")[::-1], [], 0
        if path[:1] != "/":
            parts += getcwd().split("/")[::-1]
        while parts:
            part = parts.pop()
            if part == "..":
                del done[-1:]
            elif part and part != ".":
                try:
                    target = readlink("/".join(["", *done, part]))
                except failed:
                    done.append(part)
                    continue
                links += 1
                if links > 40:
                    raise refused("a loop of links")
                done = done if target[:1] != "/" else []
                parts += target.split("/")[::-1]
        return "/" + "/".join(done)

    def plain(path, *, kind=type, raw=bytes, text=str, refused=PermissionError):
        "A subclass of str could say one thing here and another to the system."
        if kind(path) is raw:
            path = path.decode("utf-8", "surrogateescape")
        if kind(path) is not text:
            raise refused("a path that is no plain text")
        return path

    def inside(where, *, folder=folder, devnull=os.devnull):
        return where == folder or where == devnull or where.startswith(folder + "/")

    def relative_inside(path, *, plain=plain, inside=inside, real=real):
        "Events do not tell what folder's descriptor a path is relative to: none is open of a folder outside."
        path = plain(path)
        return inside(real(path)) and (path[:1] == "/" or ".." not in path.split("/"))

    def guard(
        event, details, *, kind=type, number=int, real=real, plain=plain, inside=inside, refused=PermissionError,
        relative_inside=relative_inside, writing=WRITING, forbidden=FORBIDDEN, processes=PROCESSES, insight=INSIGHT,
        changes=CHANGES,
    ):
        area, _, name = event.partition(".")
        if event == "open":
            path, mode, flags = details
            if kind(path) is number:
                return
            where = real(plain(path))
            if flags & writing and not inside(where):
                raise refused(f"writing outside the folder: {where}")
            if (where + "/").startswith("/proc/"):
                raise refused("reading about processes")
            if mode is None and not relative_inside(path):  # os.open
                raise refused(f"a descriptor of what is outside the folder: {where}")
        elif area in forbidden or area == "os" and name in processes or event == "signal.pthread_kill":
            raise refused(event)
        elif event in insight or event == "fcntl.fcntl" and details[1] in (8, 10, 15):
            raise refused(event)
        elif area == "os" and name in changes and not (name == "truncate" and kind(details[0]) is number):
            for path in details[: 2 if name in ("rename", "link", "symlink") else 1]:
                if not relative_inside(path):
                    raise refused(f"changing what is outside the folder: {event}")

    return guard

def prepare():
    "Locks the process in. Returns the steps, the last of which send the secret: in no variable while the others run."
    with open(0, closefd=False) as lines:
        job = json.load(lines)
    os.dup2(2, 3)  # where the answer goes
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.closerange(4, 64)
    folder = os.path.realpath(os.getcwd())
    if job["namespaces"]:
        own_files(folder, job["total_mb"])
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: what both filters ask for
    libc.prctl(4, 0, 0, 0, 0)  # no other process may look into this one
    landlock(folder)
    seconds, megabyte = int(job["seconds"] + 1), 1 << 20
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, job["memory_mb"] * megabyte), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, job["file_mb"] * megabyte), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    seccomp()
    space = types.ModuleType("__main__")
    space.__builtins__ = builtins
    sources = {"<program>": job["program"]}
    sources |= {f"<test {number}>": test for number, test in enumerate(job["tests"], 1)}
    codes = [compile(source, name, "exec") for name, source in sources.items()]
    steps = [functools.partial(exec, code, vars(space)) for code in codes]
    steps += [functools.partial(os.write, 3, job["secret"].encode()), functools.partial(os._exit, 0)]
    sys.modules["__main__"] = space
    globals().pop("libc")  # frames show it to the program
    sys.addaudithook(guarding(folder))
    return steps

try:
    # All in C: no frame is left whose variables hold the steps to come. A StopIteration ends the map, too.
    collections.deque(map(operator.methodcaller("__call__"), prepare()), 0)
except BaseException as error:
    trace = error.__traceback__.tb_next
    name = trace.tb_frame.f_code.co_filename if trace else ""
    text = type(error).__name__
    if isinstance(error, SyntaxError):
        text = "does not parse"
    elif isinstance(error, AssertionError) and name.startswith("<test"):
        text = f"{name[1:-1]} fails"
    try:
        text = f"{text}: {error}"
    except BaseException:
        pass  # its __str__ raises
    os.write(3, text[:300].encode("utf-8", "backslashreplace"))
finally:
    os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed all its tests, and if not, why (text that can be encoded)."""

    passed: bool
    problem: str = ""


@functools.cache
def isolation() -> tuple[str, ...]:
    """The `unshare` command that works here: user, process, network and mount namespaces, or nothing."""
    return _working("unshare", "-r", "-n", "-p", "-m", "-f", "--kill-child", "--")


@functools.cache
def tied() -> tuple[str, ...]:
    """The `setpriv` command that works here: a killed harness takes what it started with it. Or nothing."""
    return _working("setpriv", "--pdeathsig", "KILL", "--")


def _working(*command: str) -> tuple[str, ...]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    works = shutil.which(command[0]) and subprocess.run([*command, "true"], **quiet).returncode == 0
    return command if works else ()


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    """A folder for one run, removed with all in it. Nested folders are first moved up: what a program nests can be too
    deep for a recursion and for a path."""
    top = tempfile.mkdtemp()
    work = os.path.join(top, "work")
    os.mkdir(work)
    try:
        yield work
    finally:
        folders = [top]
        with contextlib.suppress(OSError):
            for folder in folders:  # grows
                for entry in list(os.scandir(folder)):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(os.path.join(top, str(len(folders))))
                        os.chmod(entry.path, 0o700)
                        os.rename(entry.path, folders[-1])
                    else:
                        os.unlink(entry.path)
            for folder in reversed(folders):
                os.rmdir(folder)


def _exceeds(folder: str, limit: int) -> bool:
    """Whether what is in a folder takes more bytes than that, an entry at least a block."""
    waiting = [folder]
    while waiting and limit >= 0:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                limit -= max(4096, entry.stat(follow_symlinks=False).st_size)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return limit < 0


def run_program(program: str, tests: Sequence[str], seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> Outcome:
    """Run a program and then its tests (statements that raise where they fail) in a process of their own.

    seconds: wall time of all; memory_mb: address space. Never raises for what the program does."""
    secret = secrets.token_hex(16)
    reading, writing = os.pipe()
    problem, deadline = "", time.monotonic() + seconds
    with _empty_folder() as folder:
        job = {"program": program, "tests": list(tests), "seconds": seconds, "memory_mb": memory_mb}
        job |= {"file_mb": FILE_MB, "total_mb": TOTAL_MB, "namespaces": bool(isolation()), "secret": secret}
        child = subprocess.Popen(
            [*tied(), *isolation(), os.path.realpath(sys.executable), "-I", "-S", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=writing,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        os.close(writing)
        given: bytes | None = json.dumps(job).encode()
        try:
            while not problem:
                try:
                    child.communicate(given, timeout=min(0.25, max(0.0, deadline - time.monotonic())))
                    break
                except subprocess.TimeoutExpired:
                    given = None  # what it did not read yet is kept
                    if time.monotonic() >= deadline:
                        problem = f"not done after {seconds:g} s"
                    elif _exceeds(folder, TOTAL_MB << 20):
                        problem = f"wrote more than {TOTAL_MB} MB"
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
    if not problem and secret.encode() in answer:
        return Outcome(True)
    text = answer.decode("utf-8", "replace")[:300]
    return Outcome(False, problem or text or "ended before its tests did, or exceeded a limit")


def run_programs(jobs: Sequence[tuple[str, Sequence[str]]], seconds: float = SECONDS) -> list[Outcome]:
    """Outcomes of (program, tests) in order; as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: run_program(*job, seconds=seconds), jobs))
