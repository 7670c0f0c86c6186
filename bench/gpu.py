"""Check the project on a GPU, a part at a time; bench/gpu.sh runs all parts, each with its own time limit.

    environment   versions, the GPU, its memory, bitsandbytes' library
    equality      the GPU's numbers next to the CPU's float32 on tiny models (bench.gpu_equality)
    model         a folder with random weights of the 3B shape, which the following parts load
    memory        peak memory of SFT, KD and DPO on it with 8 GB, next to the estimate (bench.gpu_training)
    scoring, decoding, serving   speed of inference (bench.gpu_inference)

Examples a second next to TRL's own command come from bench.train. Each part writes its JSON as it goes, so that a part
that is stopped leaves what it had. --tiny takes a model of two narrow layers: a rehearsal on a CPU.

    python -m bench.gpu equality --out runs/gpu
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from distil.cli import new_parser, run_script

PARTS = ("environment", "equality", "model", "memory", "scoring", "decoding", "serving")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--out", default="runs/gpu", help="folder of <part>.json (%(default)s)")
    add("--model", default="runs/gpu/model", help="folder of the random model (%(default)s)")
    add("--tokenizer", help="folder whose tokenizer the random model gets (default: the embedded model's)")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 512], help="of memory's rows, in tokens (%(default)s)")
    add("--memory_gb", type=float, default=8.0, help="what memory may take of the GPU (%(default)s)")
    add("--rows", type=int, default=512, help="rows that scoring scores (%(default)s)")
    add("--requests", type=int, default=1280, help="of serving (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="of decoding (%(default)s)")
    add("--tiny", action="store_true", help="a narrow model and few rows")
    return parser


def environment() -> dict[str, Any]:
    """Return versions and facts about the GPU, and whether a 4-bit weight survives packing and unpacking on it."""
    import torch

    from distil.runs import machine, package_versions

    result: dict[str, Any] = {"versions": package_versions(), "machine": machine(), "system": platform.platform()}
    result["cuda"] = torch.version.cuda
    result["variables"] = {name: os.environ[name] for name in os.environ if name.startswith(("CUDA", "BNB", "HF_"))}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result["gpu"] = {"name": torch.cuda.get_device_name(), "free_gb": free / 1e9, "total_gb": total / 1e9}
        result["gpu"]["capability"] = torch.cuda.get_device_capability()
    try:
        from bitsandbytes import cextension, functional

        result["bitsandbytes_library"] = str(getattr(cextension.lib, "_lib", cextension.lib))
        weight = torch.randn(256, 256, device="cuda" if torch.cuda.is_available() else "cpu")
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = (functional.dequantize_4bit(packed, state) - weight).abs().mean().item()
        result["nf4_mean_error"] = round(error, 4)  # about 0.07 for a normal distribution
    except Exception:
        result["bitsandbytes_error"] = traceback.format_exc()[-3000:]
    return result


def run_part(args: argparse.Namespace, scratch: Path, save: Any) -> dict[str, Any]:
    """Return the figures of one part."""
    if args.part == "environment":
        return environment()
    if args.part == "equality":
        from bench.gpu_equality import compare

        return compare(scratch)
    from bench import gpu_inference, gpu_training

    if args.part == "model":
        from distil.models import EMBEDDED_MODEL, local_or_hub

        tokenizer = args.tokenizer or local_or_hub(EMBEDDED_MODEL)
        return gpu_training.save_model(Path(args.model), tokenizer, args.tiny)
    if args.part == "memory":
        lengths, extra = ([256, 128], ["--quantization", "nf4"]) if args.tiny else (args.lengths, [])
        return gpu_training.training_memory(Path(args.model), scratch, lengths, args.memory_gb, save, extra)
    if args.part == "scoring":
        rows, sizes, repeats = (24, [8, 16], 1) if args.tiny else (args.rows, [8, 16, 32, 64, 128, 256], 2)
        return gpu_inference.scoring(args.model, rows, sizes, repeats, save)
    if args.part == "decoding":
        return gpu_inference.decoding(args.model, 24 if args.tiny else args.max_new_tokens, save)
    requests, clients = (64, 8) if args.tiny else (args.requests, 64)
    return gpu_inference.serving(args.model, scratch, requests, clients, save)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path, started = Path(args.out) / f"{args.part}.json", time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        done.update(result)
        seconds = round(time.monotonic() - started, 1)
        path.write_text(json.dumps({"part": args.part, "seconds": seconds, **done}, indent=1))

    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            save(run_part(args, Path(scratch), save) | {"complete": True})
        except Exception:
            status = 1
            save({"error": traceback.format_exc()[-4000:]})
    print(path.read_text())
    return status


if __name__ == "__main__":
    run_script(main)
