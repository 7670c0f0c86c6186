"""Generated code cannot pretend to pass, harm the machine or outlive its run: one attack a test."""

from __future__ import annotations

import contextlib
import ctypes
import dis
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from conftest import wait_for

from distil.codegen import sandbox, sandbox_child
from distil.codegen.sandbox import run_program, run_programs
from distil.testing import ROOT

TESTS = ("assert f(2) == 4",)
RIGHT = "def f(x):\n    return x * x\n"
LAYERS = {
    "hook": "    guard_events(folder)\n",
    "landlock": "    restrict_paths(libc, folder)\n",
    "seccomp": "    filter_calls(libc)\n",
}


def without(monkeypatch, *layers):
    """Take layers away, to see that others hold alone."""
    for layer in layers:
        if layer == "namespaces":
            monkeypatch.setattr(sandbox, "isolation", lambda: ())
        else:
            source = sandbox.child_source()
            assert LAYERS[layer] in source
            left = source.replace(LAYERS[layer], "")
            monkeypatch.setattr(sandbox, "child_source", lambda left=left: left)


def test_a_right_program_passes_and_a_wrong_one_says_which_test_fails():
    assert run_program(RIGHT, TESTS).passed
    wrong = run_program("def f(x):\n    return 0", ("assert True", *TESTS))
    assert not wrong.passed and "test 2" in wrong.problem
    assert "does not parse" in run_program("def f(x) return", TESTS).problem


def test_the_standard_library_and_files_in_the_own_folder_work():
    program = "import collections, datetime, heapq, json, math, random, re, typing, zoneinfo\n" + RIGHT
    assert run_program(program + "open('note', 'w').write('x')\nassert open('note').read() == 'x'", TESTS).passed


# Sends to every descriptor what looks like a secret among the given objects.
SEND = """
import functools, os, re
def send(values):
    for value in values:
        found = re.findall("[0-9a-f]{32}", repr(value)) if type(value) in (str, bytes, functools.partial, dict) else ()
        for secret in found:
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, f'["{secret}", null]'.encode())
                except OSError:
                    pass
        if found:
            os._exit(0)
def f(x): return 0
"""
FAKES = {
    "replaces exec": "import builtins\nbuiltins.exec = lambda *a: None",
    "replaces enumerate": "import builtins\nbuiltins.enumerate = lambda *a: ()",
    "replaces compile": "import builtins\nc = compile\nbuiltins.compile = lambda s, *a: c('0', *a)",
    "replaces json.dumps": "import json\nd = json.dumps\njson.dumps = lambda x: d([x[0], None])\ndef f(x): return 0",
    "looks in the main module": SEND + "import __main__\nsend(list(vars(__main__).values()))",
    "looks in the frames": SEND + "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    send([*frame.f_globals.values(), *frame.f_locals.values()])\n    frame = frame.f_back",
    "looks in the frames of a test": SEND + "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        send([*frame.f_globals.values(), *frame.f_locals.values()])\n        frame = frame.f_back",
    "looks at what the collector knows": SEND + "import gc\nsend(gc.get_objects())",
    "rewrites what the hook is bound to": SEND + "import gc\ntry: gc.get_objects()\nexcept PermissionError as error:\n"
    "    trace = error.__traceback__\n    while trace:\n        for name in ('areas', 'events', 'helpers'):\n"
    "            trace.tb_frame.f_locals[name] = ()\n        trace = trace.tb_next\nsend(gc.get_objects())",
    "makes an interpreter without the hook": "try: import _interpreters as other\n"
    "except ImportError: import _xxsubinterpreters as other\nother.create()\ndef f(x): return 4",
    "looks from an object's end": SEND + "import sys, weakref\nframe = sys._getframe()\nclass A: pass\n"
    "def f(x):\n    global a\n    a = A()\n    weakref.finalize(a, lambda: send(frame.f_back.f_globals.values()))\n"
    "    del a\n    return 0",
    "ends as an iterator does": "raise StopIteration",
    "ends as an iterator does, in the function": "def f(x): raise StopIteration",
    "lets a traced test skip lines": "import sys\ndef f(x):\n    sys.settrace(lambda *a: None)\n    return 4",
    "prints that it passed": "print('passed')\nimport sys\nsys.stdout.flush()\n",
    "leaves at once": "import os\nos._exit(0)",
    "leaves politely": "import sys\nsys.exit(0)",
    "leaves in the function": "import os\ndef f(x):\n    os._exit(0)",
    "writes to every descriptor": "import os\nfor d in range(3, 64):\n    try:\n        os.write(d, b'[\"\", null]')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "changes what an assertion raises": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "catches everything and continues": "def f(x):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "raises at exit": "import atexit\natexit.register(print, 'passed')\ndef f(x): return 0",
}


@pytest.mark.parametrize("program", FAKES.values(), ids=FAKES.keys())
def test_a_program_that_only_pretends_does_not_pass(program):
    assert not run_program(program, TESTS, seconds=2).passed


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"], ids=["busy", "asleep"])
def test_what_does_not_end_is_ended_at_its_time(program):
    start = time.monotonic()
    assert "not done after 1" in run_program(program, TESTS, seconds=1).problem
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("program", ["x = [0] * (10**10 // 8)\n", "x = bytearray(1500 << 20)\n"])
def test_more_memory_than_allowed_does_not_fit(program):
    outcome = run_program(program + RIGHT, TESTS)
    assert not outcome.passed and "MemoryError" in outcome.problem


def test_a_huge_file_does_not_fit():
    program = "with open('big', 'wb') as out:\n    for _ in range(100):\n        out.write(b'x' * 10**6)\n"
    assert not run_program(program + RIGHT, TESTS).passed


@pytest.mark.parametrize("namespaces", [True, False])
def test_many_files_do_not_fit(monkeypatch, namespaces):
    monkeypatch.setattr(sandbox, "TOTAL_MB", 4)
    if not namespaces:
        without(monkeypatch, "namespaces")
    elif not sandbox.isolation():
        pytest.skip("no namespaces here")
    program = "for i in range(12):\n    with open(f'f{i}', 'wb') as out:\n        out.write(b'x' * 2**20)\n"
    outcome = run_program(program + "import time\ntime.sleep(2)\n" + RIGHT, TESTS)
    assert not outcome.passed and ("No space" if namespaces else "more than 4 MB") in outcome.problem


def test_a_program_that_nests_folders_leaves_nothing(monkeypatch, tmp_path):
    without(monkeypatch, "namespaces", "hook")  # the hook would be slow here, a separate file system hide it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    nests = "import os\nfor i in range(1500):\n    os.mkdir('d'); open('x', 'w').close(); os.chdir('d')\n"
    assert run_program(nests + "os.chmod('../../d', 0)\n" + RIGHT, TESTS, seconds=60).passed
    assert not list(tmp_path.iterdir())


def test_whatever_is_sent_as_an_answer_is_read(monkeypatch):
    for sent in (b"[" * 60000, b"\xff\xfe", b"[1", b"{}"):
        program = (
            f"import os\nfor d in range(3, 64):\n    try:\n        os.write(d, {sent!r})\n    except OSError: pass"
        )
        assert not run_program(program + "\nos._exit(0)", TESTS).passed


def test_problems_can_be_written_to_a_file():
    assert "d800" in run_program("raise ValueError(chr(0xd800))", TESTS).problem.encode().decode()
    unprintable = "class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd"
    assert "Odd" in run_program(unprintable, TESTS).problem


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "do-not-tell")
    assert run_program("import os\nassert 'SECRET_KEY' not in os.environ\n" + RIGHT, TESTS).passed
    reads = f"text = open('/proc/{os.getpid()}/environ').read()\n"
    assert not run_program(reads + RIGHT, TESTS).passed


ENVIRON = {
    "by its path": "open('/proc/{pid}/environ').read()",
    "by a path with two slashes": "open('//proc/{pid}/environ').read()",
    "by a path with dots": "open('/usr/../proc/{pid}/environ').read()",
    "from the folder above": "os.chdir('/proc/{pid}')\nopen('environ').read()",
    "by a folder's descriptor": "os.open('{pid}/environ', os.O_RDONLY, dir_fd=os.open('/proc', os.O_RDONLY))",
    "by its own folder's descriptor": "here = os.open('.', os.O_RDONLY)\nos.makedirs('a/b/c/d/e')\n"
    "os.chdir('a/b/c/d/e')\nos.open('../' * 5 + 'proc/{pid}/environ', os.O_RDONLY, dir_fd=here)",
    "by a link": "os.mkdir('a')\nos.symlink('../' * 9 + 'proc', 'a/l')\nopen('a/l/{pid}/environ').read()",
    "with another realpath": "os.path.realpath = os.path.abspath = lambda p: ''\nopen('/proc/{pid}/environ').read()",
    "with other builtins": "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.type = lambda x: int\n"
    "open('/proc/{pid}/environ').read()",
    "by a path that says one thing and another": "class P(str):\n    startswith = split = partition = lambda *a: ''\n"
    "    __getitem__ = lambda *a: ''\nopen(P('/proc/{pid}/environ')).read()",
}


@pytest.mark.parametrize("program", ENVIRON.values(), ids=ENVIRON.keys())
def test_the_hook_alone_keeps_the_harness_environment(monkeypatch, program):
    without(monkeypatch, "namespaces", "landlock")
    outcome = run_program("import os\n" + program.format(pid=os.getpid()) + "\n" + RIGHT, TESTS)
    assert not outcome.passed and "Errno" not in outcome.problem, outcome  # the hook's own, not the system's
    assert any(reason in outcome.problem for reason in ("processes", "outside", "not plain text")), outcome


REWRITES = {
    "defaults": "helper.__kwdefaults__.update(dict.fromkeys(helper.__kwdefaults__, str))",
    "all defaults": "helper.__kwdefaults__ = None",
    "code": "helper.__code__ = (lambda *a, **k: '').__code__",
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES.keys())
def test_the_functions_of_the_hook_cannot_be_rewritten(monkeypatch, tmp_path, rewrite):
    """By way of the frames that a refusal brings, in which they are variables."""
    without(monkeypatch, "namespaces", "landlock")
    target = str(tmp_path / "outside")
    program = (
        f"import types\ntry: open({target!r}, 'w')\n"
        "except PermissionError as error: trace = error.__traceback__.tb_next\n"
        "found, refusals = trace.tb_frame.f_locals.values(), 0\n"
        "helpers = [value for value in found if type(value) is types.FunctionType]\n"
        f"for helper in helpers:\n    try: {rewrite}\n    except PermissionError: refusals += 1\n"
        f"assert refusals == len(helpers) == 4, refusals\nopen({target!r}, 'w').write('x')\n"
    )
    assert "writing outside the folder" in run_program(program + RIGHT, TESTS).problem


def test_the_functions_of_the_hook_read_nothing_that_a_program_can_replace():
    """Neither globals and builtins nor variables of closures."""
    maker = next(code for code in compile(sandbox.child_source(), "", "exec").co_consts if named(code, "guard_events"))
    codes = [sandbox_child.resolve.__code__, sandbox_child.check_plain.__code__]
    codes += [code for code in maker.co_consts if isinstance(code, types.CodeType)]
    names = {code.co_name for code in codes}
    assert names == {"resolve", "check_plain", "is_inside", "stays_inside", "guard"}
    for code in codes:
        assert not code.co_freevars and not code.co_cellvars, code.co_name
        assert not [step for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]


def named(code, name) -> bool:
    return isinstance(code, types.CodeType) and code.co_name == name


def test_the_inner_program_does_nothing_on_import_and_names_no_file_of_ours():
    code = "import distil.codegen.sandbox_child as child, sys; print(child.ANSWER, 'json' in vars(child))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 True\n", "")
    program = (
        "import sys\nframe = sys._getframe(1)\nshown = [frame.f_code.co_filename, *map(frame.f_globals.get, "
        "('__file__', '__spec__', '__cached__', 'libc')), frame.f_back, sys.argv, "
        "[name for name in sys.modules if 'distil' in name or 'sandbox' in name]]\n"
        f"assert shown == ['<string>', None, None, None, None, None, ['-c'], []], shown\n"
        f"assert not any(path in {str(ROOT)!r} for path in sys.path), sys.path\n"
    )
    assert run_program(program + RIGHT, TESTS).problem == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the header is that of x86_64")
def test_the_blocked_calls_have_the_numbers_of_the_header():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert {name: str(number) for name, (number, _) in sandbox_child.BLOCKED_CALLS.items()}.items() <= numbers.items()


@pytest.fixture(params=["all layers", "without the audit hook", "without namespaces"])
def layers(request, monkeypatch):
    """Check that the kernel's layers hold where Python's own is got around."""
    if request.param == "without the audit hook":
        if not sandbox.isolation():
            pytest.skip("no namespaces here")
        without(monkeypatch, "hook")
    elif request.param == "without namespaces":
        without(monkeypatch, "namespaces")


def test_the_own_folder_can_be_worked_in(layers):
    program = (
        "import os, shutil, tempfile\nos.makedirs('a/b')\nopen('a/b/x', 'w').write('x')\nshutil.copy('a/b/x', 'y')\n"
        "os.symlink('y', 'z')\nos.rename('y', 'w')\nos.chmod('w', 0o600)\nos.truncate('w', 0)\nshutil.rmtree('a')\n"
        "with tempfile.TemporaryDirectory() as t, open(t + '/x', 'w') as out:\n    out.write('x')\n"
        "assert sorted(os.listdir()) == ['w', 'z'], os.listdir()\n"
    )
    assert run_program(program + RIGHT, TESTS).problem == ""


def test_files_of_others_are_not_read(layers, tmp_path):
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        pytest.skip("no Landlock here")
    (tmp_path / "solutions").write_text("x")
    for path in ("/etc/passwd", tmp_path / "solutions", __file__):
        assert "PermissionError" in run_program(f"open({str(path)!r}).read()\n" + RIGHT, TESTS).problem
    zones = (
        "import zoneinfo, mimetypes, sqlite3, ssl\nzoneinfo.ZoneInfo('Europe/Berlin')\nmimetypes.guess_type('a.b')\n"
    )
    outcome = run_program(zones + RIGHT, TESTS)
    assert outcome.passed or "No time zone" in outcome.problem, outcome


CHANGING = {
    "mode": "os.chmod({path!r}, 0)",
    "time": "os.utime({path!r}, (1, 1))",
    "mode of a descriptor": "os.fchmod(os.open({path!r}, os.O_RDONLY), 0)",
    "mode of an open file": "os.fchmod(open({path!r}).fileno(), 0)",
    "owner of an open file": "os.fchown(open({path!r}).fileno(), 0, 0)",
    "name": "os.rename({path!r}, 'x')",
}


@pytest.mark.parametrize("change", CHANGING.values(), ids=CHANGING.keys())
@pytest.mark.parametrize("left", ["namespaces", "seccomp", "hook"])
def test_what_is_outside_is_not_changed(monkeypatch, tmp_path, left, change):
    """By each layer alone; the system call filter sees no paths, so that it knows descriptors only."""
    if left == "seccomp" and "open file" not in change and "fch" not in change:
        pytest.skip("not this layer's")
    if left == "namespaces" and not sandbox.isolation():
        pytest.skip("no namespaces here")
    without(monkeypatch, "landlock", *({"namespaces", "seccomp", "hook"} - {left}))
    target = tmp_path / "outside"
    target.write_text("x")
    before = target.stat()
    outcome = run_program("import os\n" + change.format(path=str(target)) + "\n" + RIGHT, TESTS)
    assert not outcome.passed and "Error" in outcome.problem
    after = target.stat()
    assert (before.st_mode, before.st_mtime, before.st_uid) == (after.st_mode, after.st_mtime, after.st_uid)


HARNESS = """
import sys
from distil.codegen import sandbox
sandbox.isolation = lambda: ()
source = sandbox.child_source()
for line in sys.argv[2:]:
    assert line in source
    source = source.replace(line, "")
sandbox.child_source = lambda: source
print(sandbox.run_program(sys.argv[1].replace("HARNESS", str(__import__("os").getpid())), ("assert 1",)))
"""


@pytest.mark.parametrize("left", ["hook", "seccomp", "landlock"])
def test_no_signal_comes_by_way_of_a_descriptor(left):
    """To a separate harness, which would be killed; by each layer alone."""
    if left == "landlock" and ctypes.CDLL(None).syscall(444, None, 0, 1) < 6:
        pytest.skip("Landlock keeps signals from its 6th version")
    program = (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, HARNESS)\nfcntl.fcntl(r, 10, 9)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | 0x2000)\nos.write(w, b'x')\n"
    )
    off = [line for layer, line in LAYERS.items() if layer != left]
    command = [sys.executable, "-c", HARNESS, program, *off]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert left == "landlock" or "PermissionError" in done.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_system_calls_that_reach_others_or_outlive_the_run_are_denied(monkeypatch):
    """rt_tgsigqueueinfo, shmget, semget, msgget, memfd_create, prctl, setsid, fchmod; pidfd_open as no such call."""
    without(monkeypatch, "hook", "namespaces")
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nme, note = os.getpid(), bytes(128)\n"
        "calls = [(297, me, me, 0, note), (29, 0, 4096, 0), (64, 0, 1, 0), (68, 0, 0), (319, b'x', 0),\n"
        "         (157, 4, 1), (112,), (91, -1, 0), (434, me, 0)]\n"
        "raise ValueError([(libc.syscall(*call), ctypes.get_errno()) for call in calls])\n"
    )
    expected = [(-1, 1)] * 8 + [(-1, 38)]
    assert run_program(program, TESTS).problem == f"ValueError: {expected}"


def test_nothing_is_written_outside_the_folder(layers, tmp_path):
    target = tmp_path / "outside"
    assert not run_program(f"open({str(target)!r}, 'w').write('x')\n" + RIGHT, TESTS).passed
    assert not run_program(f"import os\nos.mkdir({str(target)!r})\n" + RIGHT, TESTS).passed
    assert not target.exists()


def test_no_processes_and_no_fork_bomb(layers):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    before = len(os.listdir("/proc"))
    assert not run_program(bomb, TESTS, seconds=2).passed
    assert len(os.listdir("/proc")) < before + 50
    for program in (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['x'])",
    ):
        assert not run_program(program + "\n" + RIGHT, TESTS).passed


def test_no_network(layers):
    for call in ("socket.create_connection(('127.0.0.1', 80))", "socket.socket().bind(('127.0.0.1', 0))"):
        outcome = run_program(f"import socket\n{call}\n" + RIGHT, TESTS)
        assert not outcome.passed and "ermi" in outcome.problem, outcome  # PermissionError, not a refused connection


def test_the_harness_cannot_be_killed(layers):
    for target in (os.getpid(), "os.getppid()", -1, 1):
        program = f"import os, signal\ntry:\n    os.kill({target}, signal.SIGKILL)\nexcept OSError:\n    pass\n"
        assert run_program(program + RIGHT, TESTS).passed


def sandbox_children() -> set[str]:
    """Return the process numbers of all sandbox children on this machine; their command line is the inner program."""
    children = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as line:
            if "RLIMIT_NPROC" in line.read():
                children.add(pid)
    return children


def test_nothing_outlives_the_run():
    program = "import threading, time\nfor _ in range(3):\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    run_program(program, TESTS, seconds=1)
    run_program("while True: pass", TESTS, seconds=1)
    survivors = sandbox_children()  # and those of tests that run at the same time, which end within seconds
    deadline = time.monotonic() + 20
    while survivors & sandbox_children():
        assert time.monotonic() < deadline, survivors
        time.sleep(0.1)


def working_under(folder) -> list[str]:
    """Return the processes with a working folder under this one."""
    matches = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            matches += [pid] if os.readlink(f"/proc/{pid}/cwd").startswith(f"{folder}/") else []
    return matches


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_does_not_outlive_a_killed_harness(stop, tmp_path):
    if not sandbox.tied():
        pytest.skip("no setpriv here")
    sleeps = "run_program('import time\\ntime.sleep(600)', ['assert True'], seconds=600)"
    code = f"from distil.codegen.sandbox import run_program; {sleeps}"
    harness = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        assert wait_for(lambda: len(working_under(tmp_path)) > bool(sandbox.isolation()))
    finally:
        harness.send_signal(stop)
        harness.wait()
    assert wait_for(lambda: not working_under(tmp_path))


def test_many_programs_keep_their_order():
    jobs = [(f"def f(x): return {i % 2 * 4}", TESTS) for i in range(12)]
    assert [outcome.passed for outcome in run_programs(jobs)] == [i % 2 == 1 for i in range(12)]


def test_descriptors_do_not_pile_up():
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        run_program(RIGHT, TESTS)
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= threads
    assert run_program(RIGHT, TESTS).problem == ""
