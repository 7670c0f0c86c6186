"""Compare a merged model as llama.cpp serves it, from one or more GGUF files, with the same folder scored here.

Calibration rows and validation rows are scored in parts in which the ways take turns, so that a busy machine is as
busy for each. Measured: the share of validation rows with the same label, before and after a fit on the calibration
rows of each way; NLL after the fit; rows a second, and CPU seconds a row of the process that computes.

    python -m bench.engine --model_dir runs/creditmix_merged --gguf runs/creditmix_merged/*.gguf \\
        --server "llama-server -m {file} --port {port} -c 8192 -np 4 -t 2"
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.report import report
from common import InputError, PromptEncoder
from distil.calibration import fit_calibration
from distil.cli import new_parser, run_script
from distil.creditmix.evaluation import EvalOptions, draw_samples
from distil.creditmix.model import CreditOptions
from distil.creditmix.rows import read_rows
from distil.endpoint import Server
from distil.engine import ServedModel, ServedScorer
from distil.models import LoadOptions, load, resolve
from distil.scoring import FastLabelScorer
from distil.tasks import chosen_task

OWN = "here"


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="merged folder of a student of a label task")
    add("--gguf", nargs="+", required=True, help="GGUF files of it")
    server = "llama-server -m {file} --port {port} -c 8192 -np 4"
    add("--server", default=server, help="command that serves {file} at {port} (%(default)s)")
    add("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    add("--rows", type=int, default=1000, help="validation rows at most (%(default)s)")
    add("--fit_per_class", type=int, default=100, help="calibration rows a class at most (%(default)s)")
    add("--part", type=int, default=50, help="rows of a turn (%(default)s)")
    add("--together", action="store_true", help="all ways at once, on a busy machine: CPU seconds count then")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the scorer here")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return parser


@contextlib.contextmanager
def served(command: str, file: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server of a GGUF file; yield its address and process when it answers. Raises InputError."""
    import httpx2

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(file=file, port=port) for word in shlex.split(command)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise InputError(f"--server ended with status {process.returncode}: {' '.join(words)}")
                with contextlib.suppress(httpx2.HTTPError):
                    if httpx2.get(f"{url}/health").status_code == 200:
                        break
                time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds that a process has used."""
    times = process.cpu_times()
    return times.user + times.system


def figures(raw: dict[str, np.ndarray], fit_answers: np.ndarray, answers: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {way: agreement and NLL} from raw scores of the calibration rows with the validation rows behind them.
    answers: numbers of the labels of both."""
    zero, found, best = np.zeros(raw[OWN].shape[1]), {}, {}
    for way, scores in raw.items():
        first, rest = scores[: len(fit_answers)], scores[len(fit_answers) :]
        fitted = fit_calibration(first, zero, fit_answers)
        probabilities = fitted.probabilities(rest)
        best[way] = rest.argmax(axis=1), probabilities.argmax(axis=1)
        nll = -np.log(probabilities[np.arange(len(rest)), answers[: len(rest)]].clip(1e-12)).mean()
        found[way] = {
            "same_label": float((best[way][0] == best[OWN][0]).mean()),
            "same_label_fitted": float((best[way][1] == best[OWN][1]).mean()),
            "nll_fitted": float(nll),
            "accuracy_fitted": float((best[way][1] == answers[: len(rest)]).mean()),
            "largest_change": float(abs(rest - raw[OWN][len(fit_answers) :]).max()),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    task = chosen_task([ref := resolve(args.model_dir)], None)
    forms = {label: [label] for label in task.labels}
    scoring = CreditOptions(forms, (0.0,) * len(forms), task=task)
    each = -(-args.rows // len(forms)) if task.balanced else None
    options = EvalOptions(args.data, "", scoring, val_per_class=each, fit=True, fit_per_class=args.fit_per_class)
    validation, calibration, _ = draw_samples(read_rows(args.data, task)[0], options)
    np.random.default_rng(0).shuffle(validation)
    rows = [*calibration, *validation[: args.rows]]
    answers = np.array([task.labels.index(row.label) for row in rows])
    fit_answers, answers = answers[: len(calibration)], answers[len(calibration) :]
    model, tokenizer = load(ref, LoadOptions("none", args.compute_dtype))
    encoder, how = PromptEncoder(tokenizer), {"label_tokens": task.label_tokens}
    scorer: Any = FastLabelScorer(model, encoder, forms, shared_by=task.shared_turns, **how)
    ways = {OWN: (scorer, psutil.Process())}
    with contextlib.ExitStack() as stack:
        for file in args.gguf:
            url, process = stack.enter_context(served(args.server, file))
            import httpx2

            name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
            engine = ServedModel(Server(f"{url}/v1", name, concurrency=4), args.model_dir)
            ways[Path(file).name] = (ServedScorer(engine, forms, **how), process)
        raw: dict[str, Any] = {way: np.empty((0, len(forms))) for way in ways}
        wall, used = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        for start in range(0, len(rows), args.part):
            prompts = [encoder.prompt(task.prompt(row.features)) for row in rows[start : start + args.part]]

            def turn(way: str, prompts: list[list[int]] = prompts) -> None:
                one, process = ways[way]
                began, cpu = time.perf_counter(), cpu_seconds(process)
                raw[way] = np.concatenate([raw[way], one.score(prompts)])
                wall[way] += time.perf_counter() - began
                used[way] += cpu_seconds(process) - cpu

            with ThreadPoolExecutor(len(ways) if args.together else 1) as pool:
                list(pool.map(turn, ways))
            done = len(raw[OWN])
            print(f"{done} of {len(rows)} rows", file=sys.stderr)
            if done <= len(calibration):
                continue
            results = figures(raw, fit_answers, answers)
            for way, result in results.items():
                result |= {"rows_a_second": done / wall[way], "cpu_seconds_a_row": used[way] / done}
                shown = {key: round(value, 4) for key, value in result.items()}
                print(f"  {way}: {shown}", file=sys.stderr)
    table = {way: {key: round(value, 4) for key, value in result.items()} for way, result in results.items()}
    report({"model_dir": args.model_dir, "rows": len(answers), "fit_rows": len(calibration)} | table, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
