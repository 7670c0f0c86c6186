"""Measure the server under load next to the offline scorer: throughput, latency, health checks, memory, restart.

64 clients ask for rows of all four variants; the same rows are scored offline by the same model, variant by variant.
The clients run in this process, on the same cores as the server. Ratios come from one run, on one machine.

    python -m bench.serve --requests 2000
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.report import report
from common import lora_config
from distil.cli import run_script
from distil.creditmix.model import CreditModel, CreditOptions
from distil.creditmix.rows import read_rows
from distil.models import LoadOptions, resolve
from distil.serving.engine import VARIANTS
from distil.tasks import default_task
from distil.testing import load_named

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="smollm2-135m", help="base model (%(default)s)")
    add("--adapters", help="folder with creditmix_sft, _kd and _dpo (default: random adapters, as large)")
    add("--data", default=str(ROOT / "data/creditmix_dataset.json"), help="raw rows (%(default)s)")
    add("--requests", type=int, default=2000, help="of all clients together (%(default)s)")
    add("--clients", type=int, default=64, help="(%(default)s)")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="(%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    add("--calibration", choices=("none", "contextual", "auto"), default="auto", help="(%(default)s)")
    add("--quick", action="store_true", help="320 requests: below 3 minutes on two cores")
    add("--json", action="store_true", help="print one JSON object on standard output")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def random_adapters(base: str, folder: Path) -> None:
    """Save adapters of the size and form of trained ones."""
    import torch
    from peft import get_peft_model

    model, _ = load_named(base, "nf4", "auto")
    model = get_peft_model(model, lora_config(dropout=0.0))
    for seed, variant in enumerate(VARIANTS[1:]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.01
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(folder / f"creditmix_{variant}", save_embedding_layers=False)


class Server:
    """A serve_creditmix.py process that answers requests. variants: those with an adapter in `folder`."""

    def __init__(self, base: str, load: LoadOptions, calibration: str, folder: Path, variants: tuple[str, ...]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        flags = ["--base", base, "--port", str(self.port), "--quantization", load.quantization]
        for variant in VARIANTS[1:]:
            flags += [f"--{variant}", str(folder / f"creditmix_{variant}") if variant in variants else "none"]
        flags += ["--calibration", calibration, "--compute_dtype", load.compute_dtype]
        command = [sys.executable, str(ROOT / "serve_creditmix.py"), *flags]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, stderr=self.log)
        asyncio.run(self._until_ready())

    async def _until_ready(self) -> None:
        for _ in range(1200):
            await asyncio.sleep(0.1)
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"the server ended: {self.log.read().decode()[-500:]}")
            try:
                client = await Client.connect(self.port)
                status, _ = await client.request("GET", "/readyz")
                client.close()
                if status == 200:
                    return
            except OSError:
                continue
        raise RuntimeError("the server was not ready within two minutes")

    def memory_mb(self) -> float:
        """Return the resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> None:
        """End the process and wait for it."""
        self.process.terminate()
        self.process.wait(60)


class Client:
    """One kept-alive HTTP/1.1 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        """Open a connection to this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def request(self, method: str, path: str, body: object = None) -> tuple[int, dict]:
        """Send a request and return (status, object in the answer)."""
        content = json.dumps(body).encode() if body is not None else b""
        lines = (f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json")
        head = "\r\n".join([*lines, f"Content-Length: {len(content)}"])
        self.writer.write(head.encode() + b"\r\n\r\n" + content)
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split(" ")[1]), json.loads(await self.reader.readexactly(length))

    def close(self) -> None:
        """Close the connection."""
        self.writer.close()


async def load(port: int, jobs: list[tuple[str, str]], clients: int) -> dict:
    """Send all jobs (variant, features) by this number of clients, with health checks at the same time."""
    answers: list[dict | None] = [None] * len(jobs)
    waiting, done = iter(range(len(jobs))), asyncio.Event()
    statuses: list[int] = []
    health: list[float] = []
    latency: list[float] = []

    async def client() -> None:
        connection = await Client.connect(port)
        for i in waiting:
            sent = time.perf_counter()
            status, answers[i] = await connection.request("POST", f"/infer/{jobs[i][0]}", {"features": jobs[i][1]})
            latency.append(1000 * (time.perf_counter() - sent))
            statuses.append(status)
        connection.close()

    async def probe() -> None:
        connection = await Client.connect(port)
        while not done.is_set():
            start = time.perf_counter()
            await connection.request("GET", "/healthz")
            health.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0.05)
        connection.close()

    probing = asyncio.create_task(probe())
    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    done.set()
    await probing
    errors = sum(status != 200 for status in statuses)
    return {"answers": answers, "seconds": seconds, "errors": errors, "health": health, "latency": latency}


async def one_by_one(port: int, jobs: list[tuple[str, str]]) -> list[float]:
    """Return the seconds of each request of one client."""
    connection, seconds = await Client.connect(port), []
    for variant, text in jobs:
        start = time.perf_counter()
        await connection.request("POST", f"/infer/{variant}", {"features": text})
        seconds.append(time.perf_counter() - start)
    connection.close()
    return seconds


def bare_forwards(model: CreditModel, texts: list[str]) -> list[float]:
    """Return the seconds of one forward over each complete prompt, with nothing else."""
    import torch

    network, encoder, seconds = model.scorer.model, model.scorer.encoder, []
    for text in texts:
        ids = torch.tensor([encoder.prompt(model.task.prompt(text))], device=network.device)
        start = time.perf_counter()
        with torch.inference_mode():
            network(input_ids=ids, logits_to_keep=1, use_cache=False).logits.cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return seconds


def offline_answers(models: dict[str, CreditModel], jobs: list[tuple[str, str]]) -> list[dict]:
    """Return the responses of the offline scorer, in the jobs' order, scored variant by variant."""
    responses = {}
    for variant, model in models.items():
        raw = model.raw_scores([text for v, text in jobs if v == variant])
        responses[variant] = iter(model.responses(raw))
    return [next(responses[variant]) for variant, _ in jobs]


def compare_answers(answers: list[dict], expected: list[dict]) -> dict[str, float]:
    """Return how far the server's answers agree with those of the offline scorer."""
    pairs = list(zip(answers, expected, strict=True))
    same = np.array([answer["prediction"] == offline["prediction"] for answer, offline in pairs])
    clear = np.array([offline["top2_margin"] > 0.1 for offline in expected])
    gaps = [abs(a["raw_scores"][label] - raw) for a, e in pairs for label, raw in e["raw_scores"].items()]
    return {
        "label_agreement": round(float(same.mean()), 4),
        "label_agreement_margin_above_0.1": round(float(same[clear].mean()), 4),
        "largest_raw_score_difference": round(max(gaps), 6),
    }


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    requests = min(args.requests, 320) if args.quick else args.requests
    import torch

    task = default_task()
    rows, _ = read_rows(args.data, task)
    texts = [row.features for row in rows[: (requests + 3) // 4]]
    jobs = [(VARIANTS[i % 4], texts[i // 4]) for i in range(requests)]
    load_options = LoadOptions(args.quantization, args.compute_dtype)
    result: dict[str, object] = {"requests": len(jobs), "clients": args.clients, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.adapters or scratch)
        if not args.adapters:
            random_adapters(args.base, folder)
        start_server = functools.partial(Server, args.base, load_options, args.calibration, folder)
        alone = start_server(())
        asyncio.run(load(alone.port, [("base", text) for text in texts[:64]], args.clients))
        result["memory_mb_one_variant"] = round(alone.memory_mb())
        alone.stop()
        server = start_server(VARIANTS)
        asyncio.run(load(server.port, jobs[:64], args.clients))
        result["memory_mb_four_variants"] = round(server.memory_mb())
        server.stop()

        server = start_server(VARIANTS)  # now with priors on disk
        times = asyncio.run(one_by_one(server.port, [("sft", text) for text in texts[:10]]))
        result["first_vs_tenth_request"] = round(times[0] / times[9], 3)
        options = CreditOptions(
            forms={label: [label] for label in task.labels},
            bias=(0.0,) * len(task.labels),
            calibration=args.calibration,
            load=load_options,
        )
        names = {v: str(folder / f"creditmix_{v}") for v in VARIANTS[1:]} | {"base": args.base}
        models = {variant: CreditModel.load(resolve(names[variant]), options) for variant in VARIANTS}
        bare_forwards(models["sft"], texts[:4])
        ratios = []
        for start in range(0, 30, 10):  # in turns
            ten = texts[start : start + 10]
            ours = asyncio.run(one_by_one(server.port, [("sft", text) for text in ten]))
            ratios.append(statistics.median(ours) / statistics.median(bare_forwards(models["sft"], ten)))
        result["one_client_vs_bare_forward"] = round(statistics.median(ratios), 3)
        result["one_client_vs_bare_forward_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]

        blocks = [jobs[start : start + (len(jobs) + 4) // 5] for start in range(0, len(jobs), (len(jobs) + 4) // 5)]
        ratios, measured, expected = [], [], []
        for block in blocks:  # in turns, since two cores are not equally fast all the time
            start = time.perf_counter()
            expected += offline_answers(models, block)
            offline_seconds = time.perf_counter() - start
            measured.append(asyncio.run(load(server.port, block, args.clients)))
            ratios.append(offline_seconds / measured[-1]["seconds"])
        server.stop()
    result["rows_per_second"] = round(len(jobs) / sum(part["seconds"] for part in measured), 2)
    result["vs_offline_scorer"] = round(statistics.median(ratios), 3)
    result["vs_offline_scorer_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["errors"] = sum(part["errors"] for part in measured)
    health = [ms for part in measured for ms in part["health"]]
    result["healthz_ms_p50_p99"] = [round(float(np.percentile(health, p)), 1) for p in (50, 99)]
    result["memory_four_vs_one"] = round(result["memory_mb_four_variants"] / result["memory_mb_one_variant"], 3)
    result |= compare_answers([answer for part in measured for answer in part["answers"]], expected)
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
