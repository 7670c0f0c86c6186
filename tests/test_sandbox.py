"""Generated code cannot pretend to pass, harm the machine or outlive its run: one attack a test."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest

import sandbox
from sandbox import run_program, run_programs

TESTS = ("assert f(2) == 4",)
RIGHT = "def f(x):\n    return x * x\n"


def test_a_right_program_passes_and_a_wrong_one_says_which_test_fails():
    assert run_program(RIGHT, TESTS).passed
    wrong = run_program("def f(x):\n    return 0", ("assert True", *TESTS))
    assert not wrong.passed and "test 2" in wrong.problem
    assert "does not parse" in run_program("def f(x) return", TESTS).problem


def test_the_standard_library_and_files_in_the_own_folder_work():
    program = "import collections, datetime, heapq, json, math, random, re, typing, zoneinfo\n" + RIGHT
    assert run_program(program + "open('note', 'w').write('x')\nassert open('note').read() == 'x'", TESTS).passed


FAKES = {
    "prints that it passed": "print('passed')\nimport sys\nsys.stdout.flush()\n",
    "leaves at once": "import os\nos._exit(0)",
    "leaves politely": "import sys\nsys.exit(0)",
    "leaves in the function": "import os\ndef f(x):\n    os._exit(0)",
    "writes to every descriptor": "import os\nfor d in range(3, 64):\n    try:\n        os.write(d, b'[\"\", null]')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "changes what an assertion raises": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
    "catches everything and goes on": "def f(x):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "raises at exit": "import atexit\natexit.register(print, 'passed')\ndef f(x): return 0",
}


@pytest.mark.parametrize("program", FAKES.values(), ids=FAKES.keys())
def test_a_program_that_only_pretends_does_not_pass(program):
    assert not run_program(program, TESTS, seconds=2).passed


def test_an_endless_loop_ends_at_its_time():
    start = time.monotonic()
    assert "not done after 1" in run_program("while True: pass", TESTS, seconds=1).problem
    assert time.monotonic() - start < 10


def test_a_ten_gigabyte_list_does_not_fit():
    assert not run_program("x = [0] * (10**10 // 8)\n" + RIGHT, TESTS).passed


def test_a_huge_file_does_not_fit():
    program = "with open('big', 'wb') as out:\n    for _ in range(100):\n        out.write(b'x' * 10**6)\n"
    assert not run_program(program + RIGHT, TESTS).passed


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "do-not-tell")
    assert run_program("import os\nassert 'SECRET_KEY' not in os.environ\n" + RIGHT, TESTS).passed
    reads = f"text = open('/proc/{os.getpid()}/environ').read()\n"
    assert not run_program(reads + RIGHT, TESTS).passed


@pytest.fixture(params=["all layers", "without the audit hook"])
def layers(request, monkeypatch):
    """The kernel's layers must hold where Python's own is got around."""
    if request.param == "without the audit hook":
        if not sandbox.isolation():
            pytest.skip("no namespaces here")
        monkeypatch.setattr(sandbox, "CHILD", sandbox.CHILD.replace("sys.addaudithook(guard)", ""))


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


def test_nothing_outlives_the_run():
    program = "import threading, time\nfor _ in range(3):\n    threading.Thread(target=time.sleep, args=(60,)).start()"
    run_program(program, TESTS, seconds=1)
    marker = f"MARK{time.time_ns()}"
    run_program(f"{marker!r}\nwhile True: pass", TESTS, seconds=1)
    time.sleep(0.3)
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as line:
                found += ["RLIMIT_NPROC" in line.read()]
        except OSError:
            continue
    assert not any(found)


def test_many_programs_keep_their_order():
    jobs = [(f"def f(x): return {i % 2 * 4}", TESTS) for i in range(12)]
    assert [outcome.passed for outcome in run_programs(jobs)] == [i % 2 == 1 for i in range(12)]


def test_descriptors_do_not_pile_up():
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        run_program(RIGHT, TESTS)
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= threads
    assert json.dumps(run_program(RIGHT, TESTS).problem) == '""'
