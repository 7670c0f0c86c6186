"""Prepare Python tasks with solutions for training and evaluation: SFT rows and a validation file, split by task.

Reads MBPP and HumanEval as they are published, and {"prompt", "tests", "solution"}. A solution that fails its own
tests in the sandbox is left out and counted, so that no wrong solution is taught.

    python codegen_prepare.py --src mbpp.jsonl --outdir data/mbpp
"""

from __future__ import annotations

import argparse
import sys

from distil.cli import InputError, new_parser, run_script
from distil.codegen.sandbox import run_programs
from distil.codegen.tasks import codegen_prompt, parses, read_tasks
from distil.splits import part_of, write_parts


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--src", required=True, help="JSONL of tasks with tests and solutions")
    add("--val_share", type=float, default=0.4, help="share of tasks for validation (%(default)s)")
    dev = "share of tasks for codegen_val.jsonl, to measure trainings by, not trained on (default: none)"
    add("--dev_share", type=float, default=0.0, help=dev)
    add("--split_seed", type=int, default=0, help="decides which tasks these are (%(default)s)")
    add("--outdir", required=True, help="folder of codegen_{sft,val,validation}.jsonl; they are replaced")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.val_share < 1 or not 0 <= args.dev_share < 1 - args.val_share:
        raise InputError("--val_share and --dev_share are shares with a sum below 1")
    tasks = [task for task in read_tasks(args.src) if task.reference and parses(task.reference)]
    if not tasks:
        raise InputError(f"{args.src}: no task has a solution (reference, solution, code or canonical_solution)")
    outcomes = run_programs([(task.program(task.reference), task.tests) for task in tasks])
    good = [task for task, outcome in zip(tasks, outcomes, strict=True) if outcome.passed]
    print(f"{len(good)} of {len(tasks)} solutions pass their tests and are used", file=sys.stderr)
    names = ("sft", *(["val"] if args.dev_share else []), "validation")
    parts: dict[str, list[dict]] = {name: [] for name in names}
    for task in good:
        if (part := part_of(task.name, args.split_seed, args.val_share, args.dev_share)) == "validation":
            row = {"task_id": task.name, "prompt": task.prompt, "tests": task.tests, "solution": task.reference}
            parts["validation"].append(row | ({"test_setup_code": task.setup} if task.setup else {}))
        else:
            code = task.reference.strip("\n").replace("\r\n", "\n").rstrip()
            parts[part].append({"input": codegen_prompt(task.prompt), "output": code})
    note = {name: getattr(args, name) for name in ("split_seed", "val_share", "dev_share")}
    write_parts(args.outdir, "codegen", parts, args.src, note)
    return 0


if __name__ == "__main__":
    run_script(main)
