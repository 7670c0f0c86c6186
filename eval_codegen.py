"""Measure models on Python tasks: pass@k, share that parses and tokens written, directly and with a plan first.

Reads HumanEval and MBPP as they are published, and {"prompt", "tests"}. Every answer is run with its tests in a
sandbox (sandbox.py says how it is closed off). pass@k is the unbiased estimator of Chen et al. 2021, section 2.1.

    python eval_codegen.py --model_dir smollm2-135m runs/codegen_sft --data data/codegen_validation.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from codegen import Coder, Task, add_codegen_flags, check_codegen_flags, read_tasks
from files import InputError, check_folder, file_sha256, run_script, write_json, write_jsonl
from processes import only_one
from sandbox import SECONDS, isolation, run_programs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models and tasks").add_argument
    add("--model_dir", nargs="+", default=[], help="one or more of: base model, model folder, adapter folder")
    add("--references", action="store_true", help="run the tasks' own solutions, which must all pass, and stop")
    add("--data", default="data/codegen_validation.jsonl", help="JSONL of tasks with tests (%(default)s)")
    add("--limit", type=int, help="only the first so many tasks")
    add("--mode", choices=("direct", "plan", "both"), default="both", help="of writing an answer (%(default)s)")
    add("--n", type=int, default=1, help="answers to each task (%(default)s)")
    add("--k", type=int, nargs="+", default=[1], help="of pass@k, each at most --n (%(default)s)")
    add("--seconds", type=float, default=SECONDS, help="an answer and its tests may run (%(default)s)")
    add = parser.add_argument_group("report").add_argument
    add("--bootstrap", type=int, default=2000, help="resamples of tasks for the intervals (%(default)s)")
    add("--report_dir", help="write metrics.json and every answer with what became of it")
    add("--json", action="store_true", help="print metrics.json instead of the table")
    add_codegen_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k answers drawn from n is right. Source: Chen et al. 2021, section 2.1."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def measure(outcomes: np.ndarray, parsed: np.ndarray, tokens: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics of [tasks, n] arrays; intervals: 95 % percentile bootstrap over tasks."""
    tasks, n = outcomes.shape
    weights = np.random.default_rng(0).multinomial(tasks, np.full(tasks, 1 / tasks), size=args.bootstrap) / tasks
    result: dict[str, Any] = {"tasks": tasks, "n": n}
    for k in args.k:
        each = np.array([pass_at_k(n, int(right), k) for right in outcomes.sum(axis=1)])
        result[f"pass@{k}"] = float(each.mean())
        result[f"pass@{k}_interval_95"] = np.percentile(weights @ each, [2.5, 97.5]).tolist()
    return result | {"parse_rate": float(parsed.mean()), "tokens": float(tokens.mean())}


def evaluate(
    coder: Coder, name: str, mode: str, tasks: list[Task], args: argparse.Namespace
) -> tuple[dict, list[dict]]:
    """(metrics, one line per answer) of one model in one mode."""
    start = time.perf_counter()
    prompts = [task.prompt for task in tasks for _ in range(args.n)]
    answers = coder.answers(prompts, mode == "plan", f"{name} {mode}")
    seconds = time.perf_counter() - start
    asked = [task for task in tasks for _ in range(args.n)]
    jobs = [(task.program(answer["code"]), task.tests) for task, answer in zip(asked, answers, strict=True)]
    outcomes = run_programs(jobs, args.seconds)
    lines = [
        {"task_id": task.name} | answer | {"passed": outcome.passed, "problem": outcome.problem}
        for task, answer, outcome in zip(asked, answers, outcomes, strict=True)
    ]
    table = {
        key: np.array([line[key] for line in lines]).reshape(-1, args.n) for key in ("passed", "parses", "tokens")
    }
    result = {"model": name, "mode": mode} | measure(table["passed"], table["parses"], table["tokens"], args)
    return result | {"seconds_per_answer": round(seconds / len(prompts), 3)}, lines


def check_references(tasks: list[Task], args: argparse.Namespace) -> int:
    """Run the tasks' own solutions; exit status 0 where all pass."""
    known = [task for task in tasks if task.reference]
    if not known:
        raise InputError(f"{args.data}: no task has a solution (reference, solution, code or canonical_solution)")
    outcomes = run_programs([(task.program(task.reference), task.tests) for task in known], args.seconds)
    for task, outcome in zip(known, outcomes, strict=True):
        if not outcome.passed:
            print(f"{task.name}: {outcome.problem}")
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed} of {len(known)} solutions pass their tests")
    return 0 if passed == len(known) else 1


def print_table(results: list[dict], args: argparse.Namespace, out: Any) -> None:
    width = max(len(result["model"]) for result in results)
    heads = "".join(f"{f'pass@{k}':<24}" for k in args.k)
    print(f"{results[0]['tasks']} tasks, {args.n} answers each; 95 % intervals by bootstrap of tasks", file=out)
    print(f"{'model':<{width}}  {'mode':<8}{heads}parses  tokens  seconds an answer", file=out)
    for r in results:
        cells = ""
        for k in args.k:
            low, high = r[f"pass@{k}_interval_95"]
            cells += f"{r[f'pass@{k}']:.4f} [{low:.4f}, {high:.4f}] "
        last = f"{r['parse_rate']:.3f}   {r['tokens']:<8.1f}{r['seconds_per_answer']:.2f}"
        print(f"{r['model']:<{width}}  {r['mode']:<8}{cells}{last}", file=out)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    only_one("evaluation of code")
    check_codegen_flags(args)
    if not all(1 <= k <= args.n for k in args.k):
        raise InputError(f"--k {args.k}: each from 1 to --n {args.n}")
    if args.bootstrap < 1 or args.seconds <= 0 or (args.limit is not None and args.limit < 1):
        raise InputError("--bootstrap and --limit are at least 1, --seconds above 0")
    if bool(args.model_dir) == args.references:
        raise InputError("give either --model_dir or --references")
    if args.report_dir:
        check_folder(args.report_dir)
    tasks = read_tasks(args.data)[: args.limit]
    if args.references:
        return check_references(tasks, args)
    closed = "own namespaces, no network" if isolation() else "no unshare here: an audit hook and limits alone"
    print(f"sandbox: {closed}", file=sys.stderr)
    results, written = [], []
    for name in args.model_dir:
        coder = Coder.load(name, args)
        for mode in ("direct", "plan") if args.mode == "both" else (args.mode,):
            if too_long := [task.name for task in tasks if not coder.fits(task.prompt, mode == "plan")]:
                raise InputError(
                    f"{args.data}: {len(too_long)} tasks do not fit the context of {name} ({too_long[0]} ...); lower "
                    "--max_new_tokens, or --mode direct"
                )
            result, lines = evaluate(coder, name, mode, tasks, args)
            results.append(result)
            written.append(lines)
    summary = {
        "data": {"file": args.data, "sha256": file_sha256(args.data), "tasks": len(tasks)},
        "temperature": args.temperature,
        "models": results,
    }
    print_table(results, args, sys.stderr if args.json else sys.stdout)
    if args.report_dir:
        folder = Path(args.report_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (result, lines) in enumerate(zip(results, written, strict=True)):
            name = f"{number}_{Path(result['model']).resolve().name}_{result['mode']}.jsonl"
            write_jsonl(folder / name, lines)
        write_json(folder / "metrics.json", summary)
        print(f"report written to {folder}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    run_script(main)
