"""Compare the rows per second of label scoring with the alternatives, in turns in one run, with the spread of ratios.

- six_forwards: what a plain script does, six full forwards a row at batch 1: each of the three labels with and without
  a leading space, with logits at every position. A quarter of the rows, as it is so slow.
- lm_eval: lm-evaluation-harness, a multiple_choice task over the same prompts at the same batch size. It has a
  separate environment, made once (some minutes), that sees this one's torch and transformers.
- limit: a bare batched forward of just the tokens that rows do not share, in batches of like length, without a cache,
  a mask or an output head.

The rows are of different customers, in random order, so they share the template alone. "file_order" is what our scorer
gains on as many rows in the order of the file, where several of one customer begin alike, which is run once.

Label agreement with the harness leaves ties out. The harness adds up the log-probabilities of a label's tokens
(its `acc`); here labels are one token each, so that sum and mean are the same.

    python -m bench.scoring --quick
    python -m bench.scoring --rows 96 --repeats 3 --quantization none
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.report import report
from common import InputError, PromptEncoder, dtype_name
from distil.cli import run_script
from distil.creditmix.rows import read_rows
from distil.files import cache_dir, write_jsonl
from distil.models import adapter_config, local_or_hub
from distil.scoring import FastLabelScorer
from distil.tasks import default_task
from distil.testing import load_named

TASK = default_task()

ROOT = Path(__file__).resolve().parents[1]
LM_EVAL = "0.4.13"
# Closer than this, labels are a tie: in bf16 the harness rounds logits to steps of 1/8 from 16 to 32.
TIE = {"bfloat16": 0.25, "float32": 0.001}


@dataclass(frozen=True)
class Setup:
    """What all ways of scoring share. lm_eval: with the harness."""

    model_dir: str
    compute_dtype: str
    batch_size: int
    repeats: int
    lm_eval: bool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="smollm2-135m", help="base, folder or adapter (%(default)s)")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--rows", type=int, default=96, help="rows scored by each way (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which the ways take turns (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of all ways but six_forwards (%(default)s)")
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=("none", "nf4"),
        default=["none", "nf4"],
        help='those after the first are added, as "nf4_vs_limit" (none nf4)',
    )
    parser.add_argument(
        "--compute_dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of all ways; auto: bfloat16, but float32 on a CPU that only emulates it (%(default)s)",
    )
    parser.add_argument("--no_lm_eval", action="store_true", help="leave the harness and its environment out")
    parser.add_argument(
        "--quick", action="store_true", help="32 rows, two rounds, not NF4 as well: below 3 minutes on two cores"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def six_forwards(model, encoder: PromptEncoder, prompts: list[str]) -> np.ndarray:
    """Return scores [rows, labels]: the better of a label with and without a leading space, one forward each."""
    import torch

    scores = np.empty((len(prompts), len(TASK.labels)))
    for i, prompt in enumerate(prompts):
        ids = encoder.prompt(prompt)
        for j, label in enumerate(TASK.labels):
            variants = []
            for word in (label, f" {label}"):
                tokens = encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
                with torch.inference_mode():
                    logits = model(torch.tensor([ids + tokens], device=model.device)).logits
                    chosen = torch.log_softmax(logits[0, len(ids) - 1 : -1].float(), dim=-1)
                variants.append(chosen[range(len(tokens)), tokens].mean().item())
            scores[i, j] = max(variants)
    return scores


def bare_forward(model, rows: list[list[int]], batch_size: int) -> None:
    """Run the limit: batched forwards of the unshared tokens alone, without a cache, a mask or an output head."""
    import torch

    body = model.base_model if not hasattr(model, "get_base_model") else model.get_base_model().base_model
    rows = sorted(rows, key=len)
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids = torch.tensor([(row * 2)[: len(batch[-1])] for row in batch], device=model.device)
            body(input_ids=ids, use_cache=False)


def lm_eval_python() -> str:
    """Return the interpreter of the harness's environment, which is made in the cache folder the first time.
    It sees the packages of the running interpreter through a .pth file, so both compute with the same torch and
    transformers; what the harness needs beyond them is installed into it, under this project's pins."""
    folder = cache_dir() / f"lm-eval-{LM_EVAL}-py{sys.version_info.major}.{sys.version_info.minor}"
    python, done = folder / "bin/python", folder / "complete"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not done.is_file():
        print(f"installing lm-eval {LM_EVAL} once into {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not done.is_file():
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", str(ROOT / "requirements.txt"), f"lm-eval=={LM_EVAL}"], check=True)
        done.touch()
    return str(python)


@contextlib.contextmanager
def harness(setup: Setup, texts: list[str], quantization: str, threads: int) -> Iterator[Callable]:
    """Yield a function that lets the harness score the texts once and returns {"seconds", "scores"} [rows, labels]."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        rows = Path(folder) / "rows.jsonl"
        write_jsonl(rows, [{"prompt": text} for text in texts])
        command = [lm_eval_python(), str(ROOT / "bench/lm_harness.py"), str(rows), local_or_hub(setup.model_dir)]
        command += ["--labels", *TASK.labels, "--dtype", setup.compute_dtype, "--quantization", quantization]
        command += ["--batch_size", str(setup.batch_size), "--threads", str(threads)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )

        def answer() -> str:
            if line := process.stdout.readline():
                return line
            log.seek(0)
            raise RuntimeError(f"the harness ended: {log.read()[-1500:]}")

        def once() -> dict:
            process.stdin.write("go\n")
            return json.loads(answer())

        try:
            answer()  # it is ready
            yield once
        finally:
            process.stdin.close()
            process.wait()


def agreement(ours: np.ndarray, theirs: np.ndarray, tie: float) -> dict[str, float]:
    """Return the share of rows with the same best label outside ties, the number of ties, and the share over all rows.
    Scores are [rows, labels]; the best two of a tie are no further apart than `tie`."""
    gaps = [np.diff(np.sort(scores, axis=1)[:, -2:], axis=1)[:, 0] for scores in (ours, theirs)]
    clear = np.minimum(*gaps) > tie
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    outside = {"label_agreement": float(same[clear].mean())} if clear.any() else {}
    return outside | {"ties": int((~clear).sum()), "label_agreement_with_ties": float(same.mean())}


def measure(setup: Setup, prompts: list[str], in_file: list[str], quantization: str) -> dict[str, object]:
    """Return the figures of one quantization. in_file: prompts in the order of the file."""
    import torch

    model, tokenizer = load_named(setup.model_dir, quantization, setup.compute_dtype)
    encoder = PromptEncoder(tokenizer)
    shared = [TASK.prompt("Age: 1"), TASK.prompt("-")]
    scorer = FastLabelScorer(
        model, encoder, {label: [label] for label in TASK.labels}, "max", setup.batch_size, shared
    )
    ids = [encoder.prompt(prompt) for prompt in prompts]
    unshared = [row[len(scorer.prefix) :] for row in ids]
    few = prompts[:: 4 if len(prompts) >= 16 else 1]
    outputs: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {"ours": [], "six_forwards": [], "limit": [], "file_order": []}  # a row

    def clock(name: str, way: Callable, rows: int) -> None:
        start = time.perf_counter()
        outputs[name] = way()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name].append((time.perf_counter() - start) / rows)

    threads = torch.get_num_threads()
    texts = [tokenizer.decode(row) for row in ids]
    if setup.lm_eval and [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] != ids:
        raise InputError(f"{setup.model_dir}: prompts as text have other tokens than ours; use --no_lm_eval")
    opened = harness(setup, texts, quantization, threads) if setup.lm_eval else contextlib.nullcontext()
    with opened as lm_eval:
        six_forwards(model, encoder, prompts[:2])  # warm-up
        scorer.raw_scores(prompts[: setup.batch_size])
        if lm_eval:
            lm_eval()
            seconds["lm_eval"] = []
        for _ in range(setup.repeats):
            clock("six_forwards", lambda: six_forwards(model, encoder, few), len(few))
            clock("ours", lambda: scorer.raw_scores(prompts), len(prompts))
            clock("file_order", lambda: scorer.raw_scores(in_file), len(in_file))
            clock("limit", lambda: bare_forward(model, unshared, setup.batch_size), len(prompts))
            if lm_eval:
                scored = lm_eval()
                outputs["lm_eval"] = np.array(scored["scores"])
                seconds["lm_eval"].append(scored["seconds"] / len(prompts))
    result: dict[str, object] = {}
    for name in ("six_forwards", "lm_eval", "limit"):
        ratios = [theirs / ours for theirs, ours in zip(seconds.get(name, []), seconds["ours"], strict=False)]
        if ratios:
            result[f"vs_{name}"] = round(statistics.median(ratios), 3)
            result[f"vs_{name}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["file_order"] = round(statistics.median(seconds["ours"]) / statistics.median(seconds["file_order"]), 3)
    if lm_eval:
        result |= agreement(outputs["ours"], outputs["lm_eval"], TIE[setup.compute_dtype])
    result["rows_per_second"] = round(1 / statistics.median(seconds["ours"]), 2)
    return result


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows, repeats, quantizations = args.rows, args.repeats, args.quantization
    if args.quick:
        rows, repeats, quantizations = min(rows, 32), min(repeats, 2), quantizations[:1]
    if adapter_config(args.model_dir) and not args.no_lm_eval:
        raise InputError(f"--model_dir {args.model_dir} is an adapter: the harness takes a base here, or --no_lm_eval")
    import torch

    setup = Setup(args.model_dir, dtype_name(args.compute_dtype), args.batch_size, repeats, not args.no_lm_eval)
    data, _ = read_rows(args.data, TASK)
    in_file = [TASK.prompt(row.features) for row in data[:rows]]
    random.Random(0).shuffle(data)
    one_each = list({row.customer: row for row in data}.values())
    prompts = [TASK.prompt(row.features) for row in one_each[:rows]]
    result = {"model_dir": setup.model_dir, "quantization": quantizations, "compute_dtype": setup.compute_dtype}
    result |= {"repeats": repeats, "rows": len(prompts), "threads": torch.get_num_threads()}
    for quantization in dict.fromkeys(quantizations):
        prefix = "" if quantization == quantizations[0] else f"{quantization}_"
        figures = measure(setup, prompts, in_file, quantization)
        result |= {f"{prefix}{key}": value for key, value in figures.items()}
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
