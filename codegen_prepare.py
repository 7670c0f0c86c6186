"""Prepare Python tasks with solutions for training and evaluation: SFT rows and a validation file, split by task.

Reads MBPP and HumanEval as they are published, and {"prompt", "tests", "solution"}. A solution that fails its own
tests in the sandbox is left out and counted: nothing is taught that is known to be wrong.

    python codegen_prepare.py --src mbpp.jsonl --outdir data/mbpp
"""

from __future__ import annotations

import argparse
import sys

from codegen import codegen_prompt, parses, read_tasks
from files import InputError, hash_share, run_script, write_parts
from sandbox import run_programs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--src", required=True, help="JSONL of tasks with tests and solutions")
    add("--val_share", type=float, default=0.4, help="share of tasks for validation (%(default)s)")
    add("--split_seed", type=int, default=0, help="which tasks those are (%(default)s)")
    add("--outdir", required=True, help="folder of codegen_sft.jsonl and codegen_validation.jsonl; they are replaced")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.val_share < 1:
        raise InputError("--val_share is a share between 0 and 1")
    tasks = [task for task in read_tasks(args.src) if task.reference and parses(task.reference)]
    if not tasks:
        raise InputError(f"{args.src}: no task has a solution (reference, solution, code or canonical_solution)")
    outcomes = run_programs([(task.program(task.reference), task.tests) for task in tasks])
    good = [task for task, outcome in zip(tasks, outcomes, strict=True) if outcome.passed]
    print(f"{len(good)} of {len(tasks)} solutions pass their tests and are used", file=sys.stderr)
    held_out = {task.name for task in good if hash_share(task.name, args.split_seed) < args.val_share}
    parts = {
        "sft": [
            {"input": codegen_prompt(task.prompt), "output": task.reference.strip("\n").replace("\r\n", "\n").rstrip()}
            for task in good
            if task.name not in held_out
        ],
        "validation": [
            {"task_id": task.name, "prompt": task.prompt, "tests": list(task.tests), "solution": task.reference}
            | ({"test_setup_code": task.setup} if task.setup else {})
            for task in good
            if task.name in held_out
        ],
    }
    write_parts(args.outdir, "codegen", parts, args.src, {"split_seed": args.split_seed, "val_share": args.val_share})
    return 0


if __name__ == "__main__":
    run_script(main)
