"""Write Python code for a task, or for a JSONL file of tasks: in one stage, or a plan first and then the code.

Prints the code and nothing else. With tests it writes several answers, runs each in a sandbox and keeps the first that
passes all; code that passed no test run is not printed as if it had.

    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write a function add(a, b) that adds two numbers."
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from batch_files import check_files, failed_line, parse_line, run_file
from codegen import Coder, Task, add_codegen_flags, check_codegen_flags, flaw_of_tests
from files import InputError, file_sha256, read_text, run_script
from models import model_fingerprint
from processes import only_one
from sandbox import SECONDS, run_programs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and task").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add("--prompt", help="the task, or - for standard input")
    add("--input", help='JSONL of {"prompt"} (or {"input"}), with "tests" where there are any')
    add("--output", help='JSONL to write: each input object with "code" and "parses" added, in the same order')
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's .part file")
    add = parser.add_argument_group("stages and tests").add_argument
    add("--plan_then_code", action="store_true", help="a first stage writes a plan, a second one the code")
    add("--n", type=int, default=1, help="answers to write for each task (%(default)s)")
    tests = (
        "Python that raises where an answer is wrong; the first that passes is kept; test_ functions must be called"
    )
    add("--tests", metavar="FILE", help=tests)
    add("--seconds", type=float, default=SECONDS, help="an answer and its tests may run, each time (%(default)s)")
    add_codegen_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def choose(answers: list[dict], tests: list[str], seconds: float) -> dict:
    """The first answer that passes the tests, with "passed": its number; else the first, with each one's problem."""
    task = Task("", "", tuple(tests))
    outcomes = run_programs([(task.program(answer["code"]), tests) for answer in answers], seconds)
    for number, (answer, outcome) in enumerate(zip(answers, outcomes, strict=True), 1):
        if outcome.passed:
            return answer | {"passed": number}
    return answers[0] | {"passed": None, "problems": [outcome.problem for outcome in outcomes]}


def solve(coder: Coder, tasks: list[tuple[str, list[str]]], args: argparse.Namespace) -> list[dict]:
    """The answer to each (prompt, tests), in order."""
    prompts = [prompt for prompt, _ in tasks for _ in range(args.n)]
    answers = coder.answers(prompts, args.plan_then_code)
    results = []
    for i, (_, tests) in enumerate(tasks):
        mine = answers[i * args.n : (i + 1) * args.n]
        # Without tests an answer that is Python at all is the better one.
        results.append(choose(mine, tests, args.seconds) if tests else max(mine, key=lambda a: a["parses"]))
    return results


def work_lines(coder: Coder, lines: list[str], given_tests: list[str], args: argparse.Namespace) -> list[dict]:
    """The output object of each input line, in order."""
    parsed = [parse_line(line, ("prompt", "input")) for line in lines]
    tasks = {}
    for i, (row, prompt) in enumerate(parsed):
        tests = row.get("tests", given_tests)
        tests = [tests] if isinstance(tests, str) else tests
        if prompt is not None and not (isinstance(tests, list) and all(isinstance(test, str) for test in tests)):
            parsed[i] = (failed_line(row, "bad_tests", '"tests" is a list of strings or one string'), None)
        elif prompt is not None and tests and (problem := flaw_of_tests(tests)):
            parsed[i] = (failed_line(row, "bad_tests", problem), None)
        elif prompt is not None and not coder.fits(prompt, args.plan_then_code):
            parsed[i] = (failed_line(row, "too_long", "the prompt does not fit the model's context"), None)
        elif prompt is not None:
            tasks[i] = (prompt, tests)
    for i, answer in zip(tasks, solve(coder, list(tasks.values()), args) if tasks else [], strict=True):
        answer.pop("tokens")
        parsed[i][0].update(answer)
        if answer.get("problems"):
            parsed[i] = (failed_line(parsed[i][0], "no_pass", f"none of {args.n} answers passed"), None)
    return [row for row, _ in parsed]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.prompt is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise InputError("give either --prompt, or --input and --output")
    check_codegen_flags(args)
    if args.prompt is not None:
        only_one("--prompt")
    if args.seconds <= 0:
        raise InputError("--seconds is above 0")
    tests = [read_text(args.tests)] if args.tests else []
    if tests and (problem := flaw_of_tests(tests)):
        raise InputError(f"{args.tests}: {problem}")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty")
    source, output = Path(args.input or ""), Path(args.output or "")
    total = check_files(source, output, args.overwrite) if args.input else 0
    coder = Coder.load(args.model_dir, args)
    if prompt is None:
        settings = {name: value for name, value in vars(args).items() if name not in ("overwrite", "debug")}
        settings |= {"model": model_fingerprint(args.model_dir)}
        settings |= {"tests_sha256": file_sha256(args.tests)} if args.tests else {}
        chunk = max(1, 4 * args.batch_size // args.n)
        failed = run_file(source, output, total, settings, chunk, lambda x: work_lines(coder, x, tests, args))
        return 1 if failed else 0
    (answer,) = solve(coder, [(prompt, tests)], args)
    if tests and answer["passed"] is None:
        problems = "; ".join(dict.fromkeys(answer["problems"]))
        print(f"infer_codegen.py: error: none of {args.n} answers passed the tests: {problems}", file=sys.stderr)
        return 1
    if "plan" in answer:
        print(f"plan: {answer['plan']}", file=sys.stderr)
    if not answer["parses"]:
        print("warning: this does not parse as Python", file=sys.stderr)
    print(answer["code"])
    return 0


if __name__ == "__main__":
    run_script(main)
