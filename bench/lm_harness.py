"""Score labels by lm-evaluation-harness: a child of bench/scoring.py, run by an environment that has lm-eval.

Reads rows, makes a multiple_choice task of them, loads the model and prints "ready"; then it evaluates once for every
line on standard input and prints {"seconds", "scores"}. The clock runs around the harness's log-likelihood requests
alone, without its start and the building of the task. It is run as a file, not with -m, since its environment lacks
this project's packages; `python -m bench.scoring` makes that environment, whose folder its first run prints.

    <that folder>/bin/python bench/lm_harness.py rows.jsonl /path/to/model --labels Good Standard Bad
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help='JSONL of {"prompt"}: the text up to the assistant start')
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("--labels", nargs="+", required=True, help="the choices")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="none", help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    return parser


def write_task(folder: Path, rows: str, labels: list[str]) -> None:
    """Write a task file; JSON is YAML too. The delimiter is empty: a chat template ends where the answer begins."""
    task = {
        "task": "labels",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": labels,
        "doc_to_target": 0,  # agreement is compared row by row, not with an answer
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "labels.yaml").write_text(json.dumps(task))


def main() -> None:
    args = build_parser().parse_args()
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model: Any = args.model
    if args.quantization == "nf4":  # the harness itself passes a quantization on only where the model's config has one
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(model, tokenizer=args.model, dtype=args.dtype, batch_size=args.batch_size, device=device)
    plain, seconds = model.loglikelihood, []

    def timed(requests, **kwargs):
        start = time.perf_counter()
        answers = plain(requests, **kwargs)
        seconds.append(time.perf_counter() - start)
        return answers

    model.loglikelihood = timed
    out, sys.stdout = sys.stdout, sys.stderr  # the harness prints
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), args.rows, args.labels)
        manager = TaskManager(include_path=folder, include_defaults=False)
        print("ready", file=out, flush=True)
        for _ in sys.stdin:
            results = simple_evaluate(model, tasks=["labels"], task_manager=manager, bootstrap_iters=0)
            samples = sorted(results["samples"]["labels"], key=lambda sample: sample["doc_id"])
            scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
            print(json.dumps({"seconds": seconds[-1], "scores": scores}), file=out, flush=True)


if __name__ == "__main__":
    main()
