"""CodeGen tasks as they are published, and what counts as code in an answer."""

from __future__ import annotations

import pytest
from conftest import HUMANEVAL, MBPP, OURS

from common import InputError
from distil.codegen.sandbox import run_program
from distil.codegen.tasks import code_ended, extract_code, flaw_of_tests, parses, task_of


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, OURS], ids=["humaneval", "mbpp", "ours"])
def test_a_published_solution_passes_its_own_tests(row):
    task = task_of(row, "row 1")
    assert run_program(task.program(task.reference), task.tests).passed


def test_humaneval_takes_a_body_or_a_complete_function():
    task = task_of(HUMANEVAL, "row 1")
    complete = "def double(xs: List[int]):\n    return [2 * x for x in xs]"  # the import is the head's
    for code in ("    return [2 * x for x in xs]", complete):
        assert run_program(task.program(code), task.tests).passed
    assert not run_program(task.program("    return xs"), task.tests).passed


def test_the_tests_are_shown_where_the_prompt_does_not_name_the_function():
    assert "assert add_up(-1, 1) == 0" in task_of(MBPP, "").prompt
    assert "assert" not in task_of(OURS, "").prompt
    word = {"prompt": "Write a function to split a list.", "tests": ["assert split([1], 1) == [[1], []]"]}
    assert "assert split" in task_of(word, "").prompt  # a word of the sentence is not a name
    assert "assert" not in task_of(word | {"prompt": "Write a function `split(a, n)`."}, "").prompt


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x"},
        {"tests": ["assert 1"]},
        {"prompt": "x", "tests": [1]},
        {"prompt": "x", "tests": []},
        {"entry_point": "f", "test": "x"},
        MBPP | {"test_imports": "import math"},
        MBPP | {"test_setup_code": 5},
        {"prompt": "x", "tests": "def test_x(): assert x()"},
    ],
)
def test_a_line_without_task_or_tests_is_reported(row):
    with pytest.raises(InputError, match="row 7"):
        task_of(row, "file: row 7")


FENCED = "def f():\n    '''\n    ```\n    ex\n    ```\n    '''"  # in a string of the code


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("Here:\n\n```python\nx = 1\n\ny = 2\n```\nIt works.", "x = 1\n\ny = 2"),
        ("```\nx = 1", "x = 1"),
        ("<PLAN>\nadd\n</PLAN>\n<CODE>\nx = 1\n</CODE>", "x = 1"),
        ("<CODE>\n```python\nx = 1\n```\n</CODE>", "x = 1"),
        ("x = 1\n```\ntext", "x = 1"),
        ("    return x\n```\ntext", "    return x"),
        ("Answer\n```python\ndef f(): return 1\n```", "def f(): return 1"),
        (FENCED, FENCED),
        ("```py3\r\nx = 1\r\n```", "x = 1"),
        ("First:\n```sh\npip install x y\n```\nThen:\n```\nx = 1\n```", "x = 1"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(answer, code):
    assert extract_code(answer) == code


@pytest.mark.parametrize(
    ("written", "ended"),
    [
        ("```\n", False),  # an opening fence
        ("Here:\n```python\nx = 1\n", False),
        ("Answer\n```python\n", False),  # a heading is Python too
        ("```\nx = 1\n```", True),
        ("x = 1\n```", True),
        ("    return 1\n```", True),  # the body of a function
        ("x = '```'\n", False),
        ("x = 1\n</CODE>", True),
    ],
)
def test_where_code_ends(written, ended):
    assert code_ended(written) is ended


def test_what_parses():
    assert parses("x = 1") and not parses("x = ") and not parses("") and not parses("# only a note")
    assert not parses("x\0") and not parses("(" * 5000)


@pytest.mark.parametrize(
    ("tests", "problem"),
    [
        ("assert f(1)", None),
        ("def check(g):\n    assert g(1)\ncheck(f)", None),
        ("for i in range(3):\n    if f(i) != i:\n        raise ValueError(i)", None),
        ("", "can fail"),
        ("# later\n", "can fail"),
        ("assert True", "can fail"),
        ("import math\ndef test_f():\n    assert f(1) == 2", "can fail"),
        ("@mark.each([1])\ndef test_f(x=one()):\n    assert f(1) == 2", "can fail"),
        ("class TestF(Case):\n    def test_f(self):\n        assert f(1)", "can fail"),
        ("assert f(1", "not Python"),
    ],
)
def test_tests_that_cannot_fail_are_refused(tests, problem):
    flaw = flaw_of_tests([tests])
    assert flaw is None if problem is None else problem in flaw
    assert flaw_of_tests(["import math", tests]) == flaw
