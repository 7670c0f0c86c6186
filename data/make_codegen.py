"""Check the Python tasks under data/codegen_tasks/ and write the CodeGen training and validation files from them.

A task file holds blocks of plain text, so that answers which are meant to be wrong need not pass the project's lint:

  === name_of_the_function
  the task in one to three sentences
  --- plan
  one to four lines
  --- code
  the reference solution
  --- tests
  one statement with an assert a line, at least four
  --- fails: what is wrong            or  --- slow: why it is slow  or  --- syntax: why it does not parse
  the rejected answer

A slow answer is preceded by `--- big`: one assert of a size at which it needs at least 20 times the CPU time of the
reference. Only that ratio counts: both are repeated until the clock of the machine can tell their time.

Before anything is written every reference must pass its tests, every `fails` answer must fail one, every `slow` answer
must be right and slow, and no `syntax` answer may parse. Answers run in separate processes without the caller's
environment, in an empty folder, with limits on CPU time, memory and file size; that keeps mistakes harmless, but
does not hold hostile code.

A tenth of the tasks is held out for validation, see `is_held_out`.

Example:
  python -m data.make_codegen --outdir data
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from distil.cli import run_script
from distil.codegen.tasks import codegen_plan_prompt, codegen_prompt, plan_answer
from distil.files import read_text, write_jsonl
from distil.splits import hash_share

KINDS = ("fails", "slow", "syntax")
MIN_TESTS = 4
SLOWER = 20  # times the reference's CPU time
HELD_OUT = 0.1  # share of the tasks kept for validation
JOBS_PER_PROCESS = 20
SECONDS_PER_JOB = 5  # CPU seconds of one answer with its tests
MEMORY = 1 << 30  # bytes of address space of a process

# Runs in the child. Answers a line for each job at once, so that the parent knows which job ended the process.
WORKER = r"""
import json, os, signal, sys, time

out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the code under test prints


# The greatest of a few steps of the CPU clock, in seconds; it may go in steps of 10 ms.
def clock_step():
    steps = []
    for _ in range(5):
        before = now = time.process_time()
        while now == before:
            now = time.process_time()
        steps.append(now - before)
    return max(steps)


# Mean CPU time of the big test. It is repeated for 10 steps of the clock and 0.05 s at least, each time with fresh
# definitions, so that what an answer remembers between calls does not help it.
def seconds_of(code, big):
    code, big = compile(code, "answer", "exec"), compile(big, "test", "exec")
    long_enough = max(10 * clock_step(), 0.05)
    runs, started = 0, time.process_time()
    while True:
        space = {"__name__": "answer"}
        exec(code, space)
        exec(big, space)
        runs += 1
        spent = time.process_time() - started
        if spent >= long_enough:
            return spent / runs


class TooLong(BaseException):  # not an Exception, which the code under test could catch
    pass


def stop(*_):
    raise TooLong


def run(job):
    space = {"__name__": "answer"}
    exec(compile(job["code"], "answer", "exec"), space)
    for test in job["tests"]:
        try:
            exec(test, space)
        except BaseException as error:
            error.test = test
            raise
    return seconds_of(job["code"], job["big"]) if job["big"] else None


signal.signal(signal.SIGPROF, stop)
for job in json.load(sys.stdin):
    result = {"problem": None, "seconds": None}
    signal.setitimer(signal.ITIMER_PROF, job["limit"])
    try:
        result["seconds"] = run(job)
    except BaseException as error:
        where = getattr(error, "test", None)
        what = f"{type(error).__name__} {error}".strip()
        result["problem"] = f"{what} in {where}" if where else what
    signal.setitimer(signal.ITIMER_PROF, 0)
    out.write(json.dumps(result) + "\n")
    out.flush()
"""


@dataclass(frozen=True)
class Task:
    """One block of a task file; task_id is topic/name."""

    topic: str
    name: str
    prompt: str
    plan: str
    code: str
    tests: tuple[str, ...]
    kind: str  # of the rejected answer, one of KINDS
    why: str
    rejected: str
    big: str  # test of a size that shows a slow answer; empty for the other kinds

    @property
    def task_id(self) -> str:
        """Return topic/name."""
        return f"{self.topic}/{self.name}"


# ------------------------------------------------------------------------------------------------------ task files


def parse_block(topic: str, name: str, lines: list[str]) -> Task:
    """Return the task in the lines after its `===` line. Raises ValueError with what is missing."""
    parts: dict[str, list[str]] = {"prompt": []}
    current, kind, why = "prompt", "", ""
    for line in lines:
        if line.startswith("--- "):
            current, colon, rest = line[4:].partition(":")
            if colon:
                kind, why, current = current, rest.strip(), "rejected"
            if current in parts:
                raise ValueError(f"two parts {line[4:]!r}")
            parts[current] = []
        else:
            parts[current].append(line)
    wanted = {"prompt", "plan", "code", "tests", "rejected"} | ({"big"} if kind == "slow" else set())
    if set(parts) != wanted:
        raise ValueError(f"parts {sorted(parts)}, expected {sorted(wanted)}")
    text = {part: "\n".join(its_lines).strip("\n").rstrip() for part, its_lines in parts.items()}
    if kind not in KINDS or not why or not all(text.values()):
        raise ValueError("an empty part, or a rejected answer of another kind than " + ", ".join(KINDS))
    return Task(
        topic=topic,
        name=name,
        prompt=" ".join(map(str.strip, text["prompt"].split("\n"))),
        plan=text["plan"],
        code=text["code"],
        tests=tuple(text["tests"].split("\n")),
        kind=kind,
        why=f"{kind}: {why}",
        rejected=text["rejected"],
        big=text.get("big", ""),
    )


def parses(code: str) -> bool:
    """Return whether the code is Python, without warnings about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(code)
        except (SyntaxError, ValueError):
            return False
    return True


def problem_of_form(task: Task) -> str | None:
    """Return what is wrong with a task, as far as it shows without running it, or None."""
    if not parses(task.code):
        return "the reference does not parse"
    defined = [node.name for node in ast.parse(task.code).body if hasattr(node, "name")]
    if task.name not in defined:
        return f"the reference defines {defined}, not {task.name}"
    if not re.search(rf"`{re.escape(task.name)}\b", task.prompt):
        return "the prompt does not name the function"
    if len(task.tests) < MIN_TESTS or len(set(task.tests)) < len(task.tests):
        return f"{len(task.tests)} tests, at least {MIN_TESTS} different ones are needed"
    for test in (*task.tests, *filter(None, [task.big])):
        if "\n" in test or "assert " not in test or not parses(test) or not re.search(rf"\b{task.name}\b", test):
            return f"a test must be one line with an assert that uses {task.name}: {test}"
    if not 1 <= len(task.plan.split("\n")) <= 4:
        return "a plan has one to four lines"
    if re.search(r"</?(PLAN|CODE)>", task.plan + task.code):
        return "a tag inside plan or code"
    if parses(task.rejected) == (task.kind == "syntax"):
        return "the syntax answer parses" if task.kind == "syntax" else f"the {task.kind} answer does not parse"
    return None


def read_tasks(folder: str | Path) -> list[Task]:
    """Return all tasks of the *.txt files of a folder, in order of file and place.
    Raises InputError with file and task for the first block that is incomplete, inconsistent or there twice."""
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for path in sorted(Path(folder).glob("*.txt")):
        head, *blocks = re.split(r"^=== ", read_text(path), flags=re.MULTILINE)
        if head.strip():
            raise InputError(f"{path}: text before the first === line")
        for block in blocks:
            name, *lines = block.split("\n")
            try:
                task = parse_block(path.stem, name.strip(), lines)
            except ValueError as error:
                raise InputError(f"{path}: task {name}: {error}") from None
            problem = problem_of_form(task)
            for key in (task.name, task.prompt, task.code):
                if key in seen:
                    problem = problem or f"name, prompt or code is that of {seen[key]}"
                seen[key] = task.task_id
            if problem:
                raise InputError(f"{path}: task {task.name}: {problem}")
            tasks.append(task)
    if not tasks:
        raise InputError(f"{folder}: no *.txt files with tasks")
    return tasks


# --------------------------------------------------------------------------------------------------------- running


def limit_process() -> None:
    """Limit the child process; called before Python starts in it."""
    cpu = JOBS_PER_PROCESS * SECONDS_PER_JOB
    for what, value in {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(what, (value, value))


def job(code: str, tests: Sequence[str], big: str = "") -> dict:
    """Return one answer to run; with `big` that test is timed after the others."""
    return {"code": code, "tests": list(tests), "big": big, "limit": SECONDS_PER_JOB}


def run_jobs(jobs: Sequence[dict]) -> list[dict]:
    """Return {"problem": None or what went wrong, "seconds": CPU time of the big test or None} of each job."""
    results: list[dict] = []
    while len(results) < len(jobs):
        chosen = jobs[len(results) : len(results) + JOBS_PER_PROCESS]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                answered = subprocess.run(
                    [sys.executable, "-I", "-c", WORKER],
                    input=json.dumps(chosen),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=scratch,
                    env={},
                    timeout=10 * JOBS_PER_PROCESS * SECONDS_PER_JOB,
                    preexec_fn=limit_process,
                ).stdout
            except subprocess.TimeoutExpired as error:
                answered = (error.stdout or b"").decode()
        # A line without its end was cut off when the process was ended.
        complete = [json.loads(line) for line in answered.split("\n")[:-1]]
        results += complete
        if len(complete) < len(chosen):
            results.append({"problem": "it ended the process or exceeded its limits", "seconds": None})
    return results


def check_tasks(tasks: Sequence[Task]) -> None:
    """Run references and rejected answers. Raises InputError for the first task that is not as it claims to be."""
    # Reference and rejected answer run one after the other, so that what they are compared by was measured alike.
    answers = [(task, code) for task in tasks for code in (task.code, task.rejected)]
    results = run_jobs([job(code, task.tests, task.big) for task, code in answers])
    for task, reference, rejected in zip(tasks, results[::2], results[1::2], strict=True):
        if reference["problem"]:
            raise InputError(f"task {task.task_id}: the reference fails: {reference['problem']}")
        if task.kind == "syntax" and parses(task.rejected):
            raise InputError(f"task {task.task_id}: the syntax answer parses")
        if task.kind == "fails" and not rejected["problem"]:
            raise InputError(f"task {task.task_id}: the fails answer passes all tests")
        if task.kind == "slow":
            if rejected["problem"]:
                raise InputError(f"task {task.task_id}: the slow answer is wrong: {rejected['problem']}")
            if rejected["seconds"] < SLOWER * reference["seconds"]:
                raise InputError(
                    f"task {task.task_id}: the slow answer needs {rejected['seconds']:.2e} s, "
                    f"the reference {reference['seconds']:.2e} s: not {SLOWER} times as long"
                )


# ------------------------------------------------------------------------------------------------------------ rows


def is_held_out(task_id: str, split_seed: int = 0) -> bool:
    """Return whether a task is for validation: its share, by a hash of task_id and split seed, is below HELD_OUT."""
    return hash_share(task_id, split_seed) < HELD_OUT


def build_files(tasks: Sequence[Task], split_seed: int = 0) -> dict[str, list[dict]]:
    """Return {file name: rows}. Nothing is run; held-out tasks are in the validation file alone."""
    files: dict[str, list[dict]] = {f"codegen_{name}.jsonl": [] for name in ("sft", "kd", "dpo", "validation")}
    for task in tasks:
        plain, with_plan = codegen_prompt(task.prompt), codegen_plan_prompt(task.prompt)
        more = {"task_id": task.task_id, "tests": list(task.tests)}
        if is_held_out(task.task_id, split_seed):
            row = {"prompt": task.prompt, "solution": task.code, **more}
            files["codegen_validation.jsonl"].append(row)
            continue
        planned = plan_answer(task.plan, task.code)
        files["codegen_sft.jsonl"] += [
            {"input": plain, "output": task.code, **more},
            {"input": with_plan, "output": planned, **more},
        ]
        files["codegen_kd.jsonl"].append({"input": with_plan, "teacher_output": planned, **more})
        files["codegen_dpo.jsonl"].append(
            {"prompt": plain, "chosen": task.code, "rejected": task.rejected, "why": task.why, **more}
        )
    return files


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--tasks",
        type=Path,
        default=here / "codegen_tasks",
        help="folder of the task files (default: codegen_tasks next to this script)",
    )
    parser.add_argument(
        "--outdir",
        type=Path,
        default=Path("data"),
        help="folder for codegen_{sft,kd,dpo,validation}.jsonl; files there are replaced (default: data)",
    )
    parser.add_argument(
        "--split_seed",
        type=int,
        default=0,
        help="decides which tasks are held out for validation, by a hash (default: 0)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.outdir.is_dir():
        parser.error(f"--outdir: folder {args.outdir} does not exist; create it or give another path")
    tasks = read_tasks(args.tasks)
    check_tasks(tasks)
    files = build_files(tasks, args.split_seed)
    for name, rows in files.items():
        write_jsonl(args.outdir / name, rows)
        print(f"wrote {len(rows)} rows to {args.outdir / name}", file=sys.stderr)
    kinds = Counter(task.kind for task in tasks)
    print(f"{len(tasks)} tasks; rejected answers: {dict(sorted(kinds.items()))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
