"""Measure scoring, decoding and the server on a GPU, with the random 3B model of bench.gpu_training.

Scoring: rows a second of ours by batch size, next to a bare forward of the unshared tokens and to six forwards a row;
decoding: bench.decoding's three ways; serving: serve_creditmix.py with three adapters and its base under 64 clients.
"""

from __future__ import annotations

import asyncio
import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.decoding import compare
from bench.gpu_training import gpu_memory, reset_memory
from bench.scoring import bare_forward, six_forwards
from bench.serve import Server, load, one_by_one, random_adapters
from common import PromptEncoder
from distil.creditmix.rows import read_rows
from distil.files import read_json, read_jsonl
from distil.idp.decoder import JsonDecoder
from distil.idp.documents import idp_prompt
from distil.idp.schema import compile_schema
from distil.models import LoadOptions
from distil.scoring import FastLabelScorer
from distil.serving.engine import VARIANTS
from distil.tasks import default_task
from distil.testing import ROOT, load_named

TASK = default_task()

Save = Callable[[dict], None]


def clock(work: Callable[[], Any]) -> float:
    """Return the seconds of work(), the GPU's included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def scoring(model_dir: str, rows: int, sizes: list[int], repeats: int, save: Save) -> dict[str, Any]:
    """Return rows a second of rows of different customers, by the base's precision and by batch size."""
    data, _ = read_rows(ROOT / "data/creditmix_dataset.json", TASK)
    random.Random(0).shuffle(data)
    one_each = list({row.customer: row for row in data}.values())[:rows]
    prompts = [TASK.prompt(row.features) for row in one_each]
    result: dict[str, Any] = {"rows": len(prompts)}
    for quantization in ("nf4", "none"):
        result[quantization] = figures = {}
        score_in(figures, load_named(model_dir, quantization, "bfloat16"), prompts, sizes, repeats)
        save(result)
        reset_memory()
    return result


def score_in(figures: dict[str, Any], loaded: tuple, prompts: list[str], sizes: list[int], repeats: int) -> None:
    """Fill in the figures of one loaded model."""
    model, encoder = loaded[0], PromptEncoder(loaded[1])
    shared, forms = [TASK.prompt("Age: 1"), TASK.prompt("-")], {label: [label] for label in TASK.labels}
    ids, few = [encoder.prompt(prompt) for prompt in prompts], prompts[:8]
    figures["mean_tokens"] = round(statistics.mean(map(len, ids)), 1)
    six_forwards(model, encoder, few[:1])  # warm-up
    plain = len(few) / clock(lambda: six_forwards(model, encoder, few))
    figures["six_forwards_rows_per_second"] = round(plain, 2)
    speed = {}
    for size in sizes:
        scorer = FastLabelScorer(model, encoder, forms, "max", size, shared)
        unshared = [row[len(scorer.prefix) :] for row in ids]
        reset_memory()
        scorer.score(ids[: 2 * size])  # warm-up
        bare_forward(model, unshared[: 2 * size], size)
        ours, bare = [], []
        for _ in range(repeats):  # in turns
            ours.append(clock(functools.partial(scorer.score, ids)))
            bare.append(clock(functools.partial(bare_forward, model, unshared, size)))
        speed[size] = len(ids) / min(ours)
        figures[f"batch_{size}"] = {
            "rows_per_second": round(speed[size], 1),
            "bare_rows_per_second": round(len(ids) / min(bare), 1),
            "vs_bare": round(min(bare) / min(ours), 3),
            **gpu_memory(),
        }
    best = max(sizes, key=lambda size: speed[size])
    figures |= {"best_batch": best, "best_vs_six_forwards": round(speed[best] / plain, 2)}
    auto = FastLabelScorer(model, encoder, forms, "max", "auto", shared)
    auto.score(ids[:256])
    figures["auto_batch"] = auto.batch_size


def decoding(model_dir: str, max_new_tokens: int, save: Save) -> dict[str, Any]:
    """Return bench.decoding's figures for one document at a time and for eight, and the peak memory."""
    decoder = JsonDecoder(*load_named(model_dir, "nf4"))
    encoder = PromptEncoder(decoder.tokenizer)
    grammar = compile_schema(read_json(ROOT / "data/idp_schema.json"), decoder.grammar_tokenizer)
    rows = read_jsonl(ROOT / "data/idp_validation.jsonl", ("document",))[:8]
    prompts = sorted((encoder.prompt(idp_prompt(row["document"])) for row in rows), key=len)
    result: dict[str, Any] = {"mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1)}
    reset_memory()
    decoder.generate(prompts[:1], [grammar], 32)  # first calls build tables
    for size, documents in ((8, prompts), (1, prompts[:2])):
        result |= compare(decoder, grammar, documents, size, max_new_tokens)
        result["memory"] = gpu_memory()
        save(result)
    return result


def serving(model_dir: str, folder: Path, requests: int, clients: int, save: Save) -> dict[str, Any]:
    """Return throughput, latency and memory of the server with its base and three adapters."""
    started = time.monotonic()
    random_adapters(model_dir, folder)
    reset_memory()
    before = gpu_memory()["in_use_gb"]
    result: dict[str, Any] = {"adapters_seconds": round(time.monotonic() - started, 1), "clients": clients}
    rows, _ = read_rows(ROOT / "data/creditmix_dataset.json", TASK)
    jobs = [(VARIANTS[i % 4], rows[i].features) for i in range(requests)]
    started = time.monotonic()
    server = Server(model_dir, LoadOptions("nf4", "auto"), "auto", folder, VARIANTS)
    try:
        result["ready_seconds"] = round(time.monotonic() - started, 1)
        asyncio.run(load(server.port, jobs[: 2 * clients], clients))  # warm-up
        alone = asyncio.run(one_by_one(server.port, [("sft", row.features) for row in rows[-20:]]))
        result["one_client_ms_p50"] = round(1000 * statistics.median(alone), 1)
        measured = asyncio.run(load(server.port, jobs, clients))
        result["rows_per_second"] = round(len(jobs) / measured["seconds"], 1)
        for name in ("latency", "health"):
            p50, p99 = (round(float(np.percentile(measured[name], p)), 1) for p in (50, 99))
            result[f"{name}_ms_p50_p99"] = [p50, p99]
        result |= {"requests": len(jobs), "errors": measured["errors"], "resident_mb": round(server.memory_mb())}
        result["gpu_gb"] = round(gpu_memory()["in_use_gb"] - before, 3)
        save(result)
    finally:
        server.stop()
        server.log.seek(0)
        result["log_tail"] = server.log.read().decode(errors="replace")[-1500:]
    return result
