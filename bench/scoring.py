"""Rows per second of label scoring beside what a plain script does: six full forwards a row at batch 1.

The plain way scores each of the three labels with and without a leading space, each by its own forward over the whole
prompt with logits at every position. Same model, rows and threads, in one run, taking turns; ratios with their spread.
Also reported: the limit, a bare batched forward of just the tokens that rows do not share, and label agreement.

    python bench/scoring.py --rows 96 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import LabelScorer, PromptEncoder, load_model, run_script
from creditmix import LABELS, creditmix_prompt, read_creditmix


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="smollm2-135m", help="base, folder or adapter (%(default)s)")
    parser.add_argument("--data", default="data/creditmix_dataset.json", help="raw rows (%(default)s)")
    parser.add_argument("--rows", type=int, default=96, help="rows scored by each way (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which the ways take turns (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of our scorer and of the limit (%(default)s)")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4", help="(%(default)s)")
    parser.add_argument(
        "--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows: below 3 minutes on two cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def six_forwards(model, encoder: PromptEncoder, prompts: list[str]) -> np.ndarray:
    """[rows, labels]: the better of a label with and without a leading space, each from a forward of its own."""
    import torch

    scores = np.empty((len(prompts), len(LABELS)))
    for i, prompt in enumerate(prompts):
        ids = encoder.prompt(prompt)
        for j, label in enumerate(LABELS):
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
    """The limit: batched forwards of the unshared tokens alone, without a cache, a mask or an output head."""
    import torch

    body = model.base_model if not hasattr(model, "get_base_model") else model.get_base_model().base_model
    width = max(map(len, rows))
    ids = torch.tensor([(row * width)[:width] for row in rows], device=model.device)
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            body(input_ids=ids[start : start + batch_size], use_cache=False)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.quick:
        args.rows, args.repeats = min(args.rows, 64), min(args.repeats, 3)
    import torch

    rows, _ = read_creditmix(args.data)
    prompts = [creditmix_prompt(row.features) for row in rows[: args.rows]]
    model, tokenizer = load_model(args.model_dir, args.quantization, args.compute_dtype)
    encoder = PromptEncoder(tokenizer)
    shared = [creditmix_prompt("Age: 1"), creditmix_prompt("-")]
    scorer = LabelScorer(model, encoder, {label: [label] for label in LABELS}, "max", args.batch_size, shared)
    unshared = [encoder.prompt(prompt)[len(scorer.prefix) :] for prompt in prompts]
    ways = {
        "six_forwards": lambda: six_forwards(model, encoder, prompts),
        "ours": lambda: scorer.raw_scores(prompts),
        "limit": lambda: bare_forward(model, unshared, args.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    six_forwards(model, encoder, prompts[:2])  # warm-up, and the 4-bit CPU repacking
    scorer.raw_scores(prompts[: args.batch_size])
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            outputs[name] = way()
            seconds[name].append(time.perf_counter() - start)
    agreement = float((outputs["ours"].argmax(1) == outputs["six_forwards"].argmax(1)).mean())
    result = {"rows": len(prompts), "threads": torch.get_num_threads(), "label_agreement_six_forwards": agreement}
    for name in ("six_forwards", "limit"):
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
        result[f"vs_{name}"] = round(statistics.median(ratios), 3)
        result[f"vs_{name}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["rows_per_second"] = round(len(prompts) / statistics.median(seconds["ours"]), 2)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<30}{value}")
    return 0


if __name__ == "__main__":
    run_script(main)
