"""Check this machine as the other scripts will use it, and print a fix for each problem.

python doctor.py --student smollm2-135m
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common import InputError, PromptEncoder, dtype_name
from distil.cli import add_task_flag, new_parser, run_script
from distil.files import cache_dir
from distil.models import DEFAULT_STUDENT, resolve
from distil.tasks import chosen_task
from distil.workarounds import quiet_libraries

NEEDED_DISK_GB, NEEDED_MEMORY_GB, NEEDED_GPU_GB = 10, 8, 7.5
INSTALL = "source .venv/bin/activate (make demo makes it), or install requirements.txt"
OTHER_STUDENT = "use smollm2-135m or a local folder; for the hub: check the network, hf auth login (gated)"


class Finding(Exception):
    """A problem; its arguments: what is wrong, and the fix."""


def check_packages(student: str) -> str:
    """Compare the installed packages with requirements.txt."""
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)", Path(__file__).with_name("requirements.txt").read_text())
    versions = [(name, version(name).split("+")[0], pin) for name, pin in pins]
    if wrong := ", ".join(f"{name} {number} (tested: {pin})" for name, number, pin in versions if number != pin):
        raise Finding(wrong, INSTALL)
    return f"as in requirements.txt, Python {platform.python_version()}"


def check_gpu(student: str) -> str:
    """Return the GPU. Raise Finding where PyTorch does not use the GPU that the driver shows."""
    import torch

    installed = shutil.which("nvidia-smi")
    failed, shown = subprocess.getstatusoutput("timeout 30 nvidia-smi -L") if installed else (0, "")
    if failed:
        raise Finding(f"nvidia-smi: {shown[:120]}", "update the driver on Windows, then run wsl --shutdown there")
    if shown and not torch.cuda.is_available():
        fix = "update the driver on Windows, and install a CUDA build: pip install --force-reinstall torch==2.13.0"
        raise Finding(f"{shown.splitlines()[0]} is installed, but PyTorch {torch.__version__} does not use it", fix)
    if not torch.cuda.is_available():
        return "none; smollm2-135m is the student for a CPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    if memory < NEEDED_GPU_GB:
        raise Finding(f"{memory:.1f} GB of memory", "train a student of at most 1.5 B parameters")
    return f"{torch.cuda.get_device_name(0)}, {memory:.1f} GB, CUDA {torch.version.cuda}"


def check_4bit(student: str) -> str:
    """Pack a matrix into NF4 with bitsandbytes and unpack it."""
    import torch

    quiet_libraries()  # before bitsandbytes, which reports an absent optional kernel at import
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    try:
        error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().mean().item()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as failure:
        raise Finding(f"no NF4 on {device}: {failure}", "reinstall bitsandbytes, or use --quantization none") from None
    if not error < 0.2:
        raise Finding(f"NF4 on {device} is off by {error:.2f} on average", "reinstall bitsandbytes for this CUDA")
    return f"NF4 works on {device}; computes in {dtype_name()}"


def check_memory(student: str) -> str:
    """Return the main memory. Raise Finding where it is too small to train."""
    import psutil

    total, wsl = psutil.virtual_memory().total / 1e9, "microsoft" in platform.release().lower()
    if total < NEEDED_MEMORY_GB * 0.95:
        fix = "set memory=12GB under [wsl2] in %UserProfile%\\.wslconfig, then run wsl --shutdown in Windows"
        raise Finding(f"{total:.1f} GB, {NEEDED_MEMORY_GB} are needed", fix if wsl else "use smollm2-135m")
    return f"{total:.1f} GB{' for WSL2' if wsl else ''}"


def check_disk(student: str) -> str:
    """Return the free space for models and checkpoints. Raise Finding where it is small or the cache read-only."""
    folders = (cache_dir(), Path(os.environ.get("HF_HOME", Path.home())), Path.cwd())
    places = [next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders]
    if not os.access(places[0], os.W_OK):
        raise Finding(f"{places[0]} cannot be written", "set DISTIL_SLM_CACHE to a folder that you may write")
    free, path = min((shutil.disk_usage(path).free / 1e9, path) for path in places)
    if free < NEEDED_DISK_GB:
        raise Finding(f"{free:.1f} GB free in {path}", f"free {NEEDED_DISK_GB} GB or set DISTIL_SLM_CACHE and HF_HOME")
    return f"{free:.0f} GB free"


def check_model(student: str) -> str:
    """Check that the student exists. Raises InputError."""
    from distil.training.memory import Sizes

    Sizes.of(resolve(student).path)  # refuses a student without the layers that LoRA goes to
    return student


def check_labels(student: str, task_file: str | None = None) -> str:
    """Check that the text before a label of --task, or else of the student's own task, does not change its tokens, and
    count them. Raises InputError."""
    from distil.training.data import load_tokenizer

    task = chosen_task([ref := resolve(student)], task_file)
    encoder = PromptEncoder(load_tokenizer(ref.path))
    tokens = [len(encoder.label(label)) for label in task.labels]
    shown = ", ".join(task.labels[:10]) + ", ..." * (len(task.labels) > 10)
    return f"{shown}: {'one stable token each' if max(tokens) == 1 else f'stable, 1 to {max(tokens)} tokens'}"


CHECKS = (check_packages, check_gpu, check_4bit, check_memory, check_disk, check_model, check_labels)


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--student", default=DEFAULT_STUDENT, help="model to train or use (%(default)s)")
    add_task_flag(parser.add_argument)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    ran = problems = 0
    chosen_task([], args.task)  # a wrong file is no problem of the machine
    more = {check_labels: {"task_file": args.task}}
    for check in CHECKS:
        ran, name = ran + 1, check.__name__.removeprefix("check_")
        try:
            print(f"ok       {name:<9}{check(args.student, **more.get(check, {}))}")
        except (Finding, InputError, ImportError, OSError) as problem:  # ImportError: a package does not load
            problems += 1
            what, fix = problem, OTHER_STUDENT if isinstance(problem, InputError) else INSTALL
            if isinstance(problem, Finding):
                what, fix = problem.args
            print(f"PROBLEM  {name:<9}{what}\n         {'fix:':<9}{fix}")
            if check is check_model:  # the labels need its tokenizer
                break
    print(f"{problems} of {ran} checks found a problem", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
