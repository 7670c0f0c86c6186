"""How a Python task is put to a model, in one stage or as plan and then code, and how its code is read.

Everything that turns a task into what the model sees is here once: inference and evaluation use training's prompts.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from distil.files import read_jsonl
from distil.thoughts import after_thoughts

NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises


def codegen_prompt(task: str) -> str:
    """Return the user turn of the plain form; the answer is Python text only, without a Markdown fence."""
    return f"Write Python code for this task. Answer with the code only.\n{task.strip()}"


def codegen_plan_prompt(task: str) -> str:
    """Return the user turn of the plan form; the answer is that of `plan_answer`."""
    form = "First give a short plan between <PLAN> and </PLAN>, then the code between <CODE> and </CODE>."
    return f"Write Python code for this task. {form}\n{task.strip()}"


def plan_answer(plan: str, code: str) -> str:
    """Return the answer of the plan form: each tag on a separate line."""
    return f"<PLAN>\n{plan.strip()}\n</PLAN>\n<CODE>\n{code.strip()}\n</CODE>"


def extract_code(answer: str) -> str:
    """Return the code in an answer: between its <CODE> tags, and there in the first Markdown fence, if it has any.
    Code in the thoughts before an answer is none of it."""
    answer = after_thoughts(answer) or ""
    inside = re.search(r"<CODE>\n?(.*?)(?:</CODE>|\Z)", answer, re.DOTALL)
    answer = inside[1] if inside else answer.split("</CODE>")[0]
    before, fence, _ = answer.partition("```")
    if fence and not parses(answer):  # a fence inside a string of the code does not count
        blocks = re.findall(r"```[^\S\n]*[\w+.-]*[^\S\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
        blocks = [before] if _bare_code(before) or not blocks else blocks
        answer = next(filter(parses, blocks), blocks[0])
    return answer.strip("\r\n").rstrip()


def _bare_code(before: str) -> bool:
    """Return whether the text before a fence is the answer's code, complete or as the body of a function.
    A bare word, which is Python too, is a heading."""
    heading = re.fullmatch(r"\s*\w+[:.]?\s*", before)
    return not heading and (parses(before) or parses(f"if True:\n{before}"))


def plan_ended(written: str) -> bool:
    """Return whether a plan is complete, from the text that a model writes after <PLAN>."""
    return "</PLAN>" in written or "<CODE>" in written


def code_ended(written: str) -> bool:
    """Return whether an answer's code is complete: its tag or fence is closed, or a fence follows bare code.
    An opening fence, whatever is before it, ends nothing, nor does code in a thought."""
    written = after_thoughts(written) or ""
    before, *fences = re.split(r"^```", written, flags=re.MULTILINE)
    return "</CODE>" in written or len(fences) > 1 or (bool(fences) and _bare_code(before))


def parses(code: str) -> bool:
    """Return whether the code is Python with at least one statement."""
    try:
        return bool(ast.parse(code).body)
    except NOT_PYTHON:
        return False


def flaw_of_tests(tests: Sequence[str]) -> str | None:
    """Return why tests could not fail any answer, or None: not Python, or no assert, raise or call at top level."""
    try:
        nodes: list[ast.AST] = [ast.parse(test) for test in tests]
    except NOT_PYTHON as error:
        return f"the tests are not Python: {error}"
    for node in nodes:  # grows
        asserts = isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant)
        if asserts or isinstance(node, ast.Raise | ast.Call):
            return None
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return "nothing in the tests can fail (functions such as test_x must be called)"


@dataclass(frozen=True)
class Task:
    """A task with what checks an answer. tests: statements that raise where they fail; setup: code before them;
    prefix: code that an answer may leave out, as HumanEval's function head."""

    name: str
    prompt: str
    tests: tuple[str, ...]
    setup: str = ""
    prefix: str = ""
    reference: str | None = None

    def program(self, code: str) -> str:
        """Return the program that the tests follow."""
        head = re.search(r"^(?:async )?def \w+", self.prefix, re.MULTILINE)
        if head:  # a completion of the body follows all of it, a complete function its imports and helpers
            complete = re.search(rf"^{re.escape(head[0])}\b", code, re.MULTILINE)
            code = self.prefix[: head.start() if complete else None] + code
        return f"{code}\n{self.setup}\n"


def _names(prompt: str, name: str) -> bool:
    """Return whether a prompt names a function or class; a plain word ("split") counts only as split( or `split`."""
    as_name = rf"(?:`|\b(?:function|class|generator|named|called) ){name}\b|\b{name}\("
    return bool(re.search(as_name if name.isalpha() and name.islower() else rf"\b{name}\b", prompt))


def task_of(row: dict, where: str) -> Task:
    """Return a task from a line of HumanEval or MBPP as published, or of this project: {"prompt", "tests"}.
    Where a prompt names no function that the tests call, as in MBPP, it shows the tests too. Raises InputError."""
    name = str(row.get("task_id", where))
    if "entry_point" in row and "test" in row:
        if not all(isinstance(row.get(field), str) for field in ("entry_point", "test", "prompt")):
            raise InputError(f'{where}: "entry_point", "test" and "prompt" are strings in HumanEval\'s form')
        text = f"Complete this function.\n{row['prompt']}"
        tests = (f"{row['test']}\ncheck({row['entry_point']})",)
        reference = row["prompt"] + row["canonical_solution"] if "canonical_solution" in row else None
        return Task(name, text, tests, "", row["prompt"], reference)
    prompt, tests = row.get("prompt", row.get("text")), row.get("tests", row.get("test_list"))
    tests = [tests] if isinstance(tests, str) else tests
    texts = isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests)
    if not isinstance(prompt, str) or not prompt.strip() or not texts:
        raise InputError(f'{where}: strings "prompt"/"text" and "tests"/"test_list" are needed, or HumanEval fields')
    if problem := flaw_of_tests(tests):
        raise InputError(f"{where}: {problem}")
    imports, code = row.get("test_imports") or [], row.get("test_setup_code") or ""
    if not isinstance(imports, list) or not all(isinstance(text, str) for text in (*imports, code)):
        raise InputError(f'{where}: "test_imports" is a list of strings, "test_setup_code" a string')
    setup = "\n".join([*imports, code]).strip()
    reference = next((row[key] for key in ("reference", "solution", "code") if isinstance(row.get(key), str)), None)
    called = set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(tests))) - set(dir(builtins)) - {"assert"}
    if not any(_names(prompt, one) for one in called):
        prompt = "\n".join([prompt.strip(), "It must pass these tests:", *tests])
    return Task(name, prompt, tuple(tests), setup, "", reference)


def read_tasks(path: str | Path) -> list[Task]:
    """Return the tasks of a JSONL file. Raises InputError with the line and what is wrong."""
    return [task_of(row, f"{path}: row {number}") for number, row in enumerate(read_jsonl(path, ()), 1)]
