"""Write Python code for a task, or for a JSONL file of tasks: in one stage, or a plan first and then the code.

Prints the code and nothing else. With tests it writes several answers, runs each in a sandbox and keeps the first that
passes all; code that passed no test run is not printed as if it had.

    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write a function add(a, b) that adds two numbers."
"""

from __future__ import annotations

import argparse
import functools
import sys

from distil import batch
from distil.cli import InputError, new_parser, refuse_unused, run_script, unused_engine
from distil.codegen.coder import Coder, add_codegen_flags, codegen_options
from distil.codegen.judge import first_passing
from distil.codegen.sandbox import SECONDS
from distil.codegen.tasks import flaw_of_tests
from distil.files import read_text
from distil.models import ModelRef, resolve


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("model and task").add_argument
    add("--model_dir", required=True, help="base model id, model folder or adapter folder")
    add("--prompt", help="the task, or - for standard input")
    output = 'JSONL to write: each input object with "code" and "parses" added, in the same order'
    batch.add_file_flags(add, 'JSONL of {"prompt"} (or {"input"}), with "tests" where there are any', output)
    add = parser.add_argument_group("stages and tests").add_argument
    add("--plan_then_code", action="store_true", help="a first stage writes a plan, a second one the code")
    add("--n", type=int, default=1, help="answers to write for each task (%(default)s)")
    tests = "Python that raises where an answer is wrong; the first that passes is printed; functions must be called"
    add("--tests", metavar="FILE", help=tests)
    add("--seconds", type=float, default=SECONDS, help="an answer and its tests may run, each time (%(default)s)")
    add_codegen_flags(parser)
    return parser


def solve(coder: Coder, tasks: list[tuple[str, list[str]]], plan: bool, seconds: float) -> list[dict]:
    """Return the answer to each (prompt, tests), in order. plan: write one first; seconds: of each run of tests."""
    n, results = coder.options.n, []
    answers = coder.answers([prompt for prompt, _ in tasks for _ in range(n)], plan)
    for i, (_, tests) in enumerate(tasks):
        samples = answers[i * n : (i + 1) * n]
        best = max(samples, key=lambda answer: answer["parses"])  # an answer that is Python at all is the better one
        results.append(first_passing(samples, tests, seconds) if tests else best)
    return results


def work_lines(coder: Coder, plan: bool, default: list[str], seconds: float, lines: list[str]) -> list[dict]:
    """Return the output object of each input line, in order. default: tests of lines without their own."""
    rows, tasks = [], {}
    for i, (row, prompt) in enumerate(batch.parse_line(line, ("prompt", "input")) for line in lines):
        tests = row.get("tests", default)
        tests = [tests] if isinstance(tests, str) else tests
        if prompt is None:
            pass  # its error is in the row
        elif not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            row = batch.failed_line(row, "bad_tests", '"tests" is a list of strings or one string')
        elif tests and (problem := flaw_of_tests(tests)):
            row = batch.failed_line(row, "bad_tests", problem)
        elif not coder.fits(prompt, plan):
            row = batch.failed_line(row, "too_long", "the prompt does not fit the model's context")
        else:
            tasks[i] = (prompt, tests)
        rows.append(row)
    for i, answer in zip(tasks, solve(coder, list(tasks.values()), plan, seconds) if tasks else [], strict=True):
        answer.pop("tokens")
        rows[i] |= answer
        if answer.get("problems"):
            rows[i] = batch.failed_line(rows[i], "no_pass", f"none of {coder.options.n} answers passed")
    return rows


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    batch.check_one_or_file(vars(args), "prompt")
    codegen = codegen_options(vars(args))
    unused = {"only with --temperature above 0": [] if codegen.temperature else ["seed"]}
    unused |= {"only with --tests": ["seconds"] if args.prompt is not None and not args.tests else []}
    refuse_unused(parser, argv, unused | unused_engine(vars(args)))
    tests = [read_text(args.tests)] if args.tests else []
    if tests and (problem := flaw_of_tests(tests)):
        raise InputError(f"{args.tests}: {problem}")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt is empty")
    if prompt is None:

        def start(ref: ModelRef) -> tuple:
            coder, chunk = Coder.load(ref, codegen), max(1, 4 * args.batch_size // args.n)
            work = functools.partial(work_lines, coder, args.plan_then_code, tests, args.seconds)
            return chunk, work, {"temperature": codegen.temperature, "tests_used": tests}

        return batch.answer_file(vars(args), start)
    coder = Coder.load(resolve(args.model_dir), codegen)
    (answer,) = solve(coder, [(prompt, tests)], args.plan_then_code, args.seconds)
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
