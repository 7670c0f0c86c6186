"""CodeGen: the two forms in which a Python task is put to a model, and the answer with a plan.

Apart from common.py because it knows one task. Everything that turns a task into what the model sees is here once, so
that inference and evaluation ask as training did.
"""

from __future__ import annotations


def codegen_prompt(task: str) -> str:
    """The user turn of the plain form; the answer is Python text and nothing else, without a Markdown fence."""
    return f"Write Python code for this task. Answer with the code only.\n{task.strip()}"


def codegen_plan_prompt(task: str) -> str:
    """The user turn of the plan form; the answer is that of `plan_answer`."""
    return (
        "Write Python code for this task. First give a short plan between <PLAN> and </PLAN>, "
        f"then the code between <CODE> and </CODE>.\n{task.strip()}"
    )


def plan_answer(plan: str, code: str) -> str:
    """The answer of the plan form: each tag on a line of its own."""
    return f"<PLAN>\n{plan.strip()}\n</PLAN>\n<CODE>\n{code.strip()}\n</CODE>"
