"""Measure models on Python tasks: pass@k, share that parses and tokens written, directly and with a plan first.

Reads HumanEval and MBPP as they are published, and {"prompt", "tests"}. Every answer is run with its tests in a
sandbox (distil/codegen/sandbox.py). pass@k is the unbiased estimator of Chen et al. 2021, section 2.1.

    python eval_codegen.py --model_dir smollm2-135m runs/codegen_sft --data data/codegen_validation.jsonl
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil import cli
from distil.cli import InputError, with_interval
from distil.codegen.coder import Coder, add_codegen_flags, codegen_options
from distil.codegen.judge import pass_at_k
from distil.codegen.sandbox import SECONDS, isolation, run_programs
from distil.codegen.tasks import Task, read_tasks
from distil.files import hashed, write_jsonl
from distil.models import resolve
from distil.processes import only_one
from distil.splits import check_split


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("models and tasks").add_argument
    add("--model_dir", nargs="+", default=[], help="one or more of: base model, model folder, adapter folder")
    add("--references", action="store_true", help="run the tasks' own solutions, which must all pass, and stop")
    add("--data", default="data/codegen_validation.jsonl", help="JSONL of tasks with tests (%(default)s)")
    add("--limit", type=int, help="only this many first tasks")
    add("--mode", choices=("direct", "plan", "both"), default="both", help="of writing an answer (%(default)s)")
    add("--n", type=int, default=1, help="answers to each task (%(default)s)")
    add("--k", type=int, nargs="+", default=[1], help="of pass@k, each at most --n (%(default)s)")
    add("--seconds", type=float, default=SECONDS, help="an answer and its tests may run (%(default)s)")
    cli.add_report_flags(parser, "tasks", 2000)
    add_codegen_flags(parser)
    return parser


def measure(lines: list[dict], n: int, ks: Sequence[int], resamples: int) -> dict[str, Any]:
    """Return metrics of `n` answers to each task, in order; intervals: 95 % percentile bootstrap over tasks."""
    import numpy as np

    outcomes = np.array([line["passed"] for line in lines]).reshape(-1, n)
    tasks = len(outcomes)
    weights = np.random.default_rng(0).multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples) / tasks
    result: dict[str, Any] = {"tasks": tasks, "n": n}
    for k in ks:
        each = np.array([pass_at_k(n, int(right), k) for right in outcomes.sum(axis=1)])
        result[f"pass@{k}"] = float(each.mean())
        result[f"pass@{k}_interval_95"] = np.percentile(weights @ each, [2.5, 97.5]).tolist()
    parse_rate, tokens = (float(np.mean([line[key] for line in lines])) for key in ("parses", "tokens"))
    return result | {"parse_rate": parse_rate, "tokens": tokens}


def answer_all(coder: Coder, tasks: list[Task], mode: str, seconds: float, title: str) -> tuple[list[dict], float]:
    """Return a line for each answer and its tests' outcome, and the mean writing time. seconds: to run one's tests."""
    samples, start = [task for task in tasks for _ in range(coder.options.n)], time.perf_counter()
    answers = coder.answers([task.prompt for task in samples], mode == "plan", title)
    spent = (time.perf_counter() - start) / len(samples)
    jobs = [(task.program(answer["code"]), task.tests) for task, answer in zip(samples, answers, strict=True)]
    lines = [
        {"task_id": task.name} | answer | {"passed": outcome.passed, "problem": outcome.problem}
        for task, answer, outcome in zip(samples, answers, run_programs(jobs, seconds), strict=True)
    ]
    return lines, round(spent, 3)


def check_references(tasks: list[Task], source: str, seconds: float) -> int:
    """Run the tasks' own solutions; return 0 where all pass, else 1. Raises InputError where there are none."""
    solved = [task for task in tasks if task.reference]
    if not solved:
        raise InputError(f"{source}: no task has a solution (reference, solution, code or canonical_solution)")
    outcomes = run_programs([(task.program(task.reference), task.tests) for task in solved], seconds)
    problems = [f"{t.name}: {o.problem}" for t, o in zip(solved, outcomes, strict=True) if not o.passed]
    print(*problems, f"{len(solved) - len(problems)} of {len(solved)} solutions pass their tests", sep="\n")
    return 1 if problems else 0


def print_table(results: list[dict], ks: Sequence[int], out: Any) -> None:
    """Print pass@k with intervals, one line per model and mode."""
    table = [["model", "mode", *(f"pass@{k}" for k in ks), "parses", "tokens", "seconds an answer"]]
    for r in results:
        cells = [with_interval(r[f"pass@{k}"], r[f"pass@{k}_interval_95"]) for k in ks]
        cells += [f"{r['parse_rate']:.3f}", f"{r['tokens']:.1f}", f"{r['seconds_per_answer']:.2f}"]
        table.append([r["model"], r["mode"], *cells])
    tasks, n = results[0]["tasks"], results[0]["n"]
    print(f"{tasks} tasks, {n} answers each; 95 % intervals by bootstrap of tasks", file=out)
    cli.print_columns(table, out)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    only_one("evaluation of code")
    codegen = codegen_options(vars(args))
    if not all(1 <= k <= args.n for k in args.k):
        raise InputError(f"--k {args.k}: each from 1 to --n {args.n}")
    cli.check_at_least_one(vars(args), "limit", "bootstrap")
    if bool(args.model_dir) == args.references:
        raise InputError("give either --model_dir or --references")
    used = ("data", "limit", "seconds", "references", "debug")
    answers = [name for name in vars(args) if name not in used] if args.references else []
    greedy = ["seed"] if not codegen.temperature else []
    unused = {"only for answers of models, not with --references": answers, "only with --temperature above 0": greedy}
    cli.refuse_unused(parser, argv, unused | cli.unused_engine(vars(args)))
    with cli.report_folder(args.report_dir):
        tasks, sha256 = hashed(args.data, lambda: read_tasks(args.data)[: args.limit])
        if args.references:
            return check_references(tasks, args.data, args.seconds)
        refs = [resolve(name) for name in args.model_dir]
        check_split(args.model_dir, args.data, sha256)
        closed = "own namespaces, no network" if isolation() else "no unshare here: an audit hook and limits alone"
        print(f"sandbox: {closed}", file=sys.stderr)
        measured = []
        for ref in refs:
            coder = Coder.load(ref, codegen)
            for mode in ("direct", "plan") if args.mode == "both" else (args.mode,):
                if too_long := [task.name for task in tasks if not coder.fits(task.prompt, mode == "plan")]:
                    number = f"{len(too_long)} tasks ({too_long[0]} ...) exceed the context of {ref.name}"
                    raise InputError(f"{args.data}: {number}; lower --max_new_tokens, or --mode direct")
                lines, spent = answer_all(coder, tasks, mode, args.seconds, f"{ref.name} {mode}")
                result = {"model": ref.name, "mode": mode} | measure(lines, args.n, args.k, args.bootstrap)
                measured.append((result | {"seconds_per_answer": spent}, lines))
        results = [result for result, _ in measured]
        data = {"file": args.data, "sha256": sha256, "tasks": len(tasks)}
        summary = {"data": data, "temperature": codegen.temperature, "models": results}
        print_table(results, args.k, sys.stderr if args.json else sys.stdout)
        for number, (result, lines) in enumerate(measured) if args.report_dir else ():
            name = f"{number}_{Path(result['model']).resolve().name}_{result['mode']}.jsonl"
            write_jsonl(Path(args.report_dir) / name, lines)
        cli.finish_report(summary, vars(args), [*(f"pass@{k}" for k in args.k), "parse_rate"])
        return 0


if __name__ == "__main__":
    cli.run_script(main)
