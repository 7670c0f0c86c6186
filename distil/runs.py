"""Run folders: run.json, claiming a folder, settings that a resumed run must share, facts about the machine.

run.json is written last, as the mark of a complete run; `distil.training.run.train_and_save` fills it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import InputError, dtype_name
from distil.files import check_folder, hold, read_json, write_json
from distil.processes import rank_and_world


def run_record(folder: str | Path | None) -> dict:
    """Return run.json of an adapter folder, empty where there is none. Raises InputError where it is damaged."""
    path = Path(folder or "") / "run.json"
    record = read_json(path) if folder and path.is_file() else {}
    sources = record.get("sources") or [] if isinstance(record, dict) else None
    if not isinstance(sources, list) or not all(source is None or isinstance(source, dict) for source in sources):
        raise InputError(f"{path}: not a record of a run (an object with sources is expected, as trainers write it)")
    return record


@contextlib.contextmanager
def claimed(flags: Mapping[str, Any]) -> Iterator[None]:
    """Keep other trainings out of --save_dir, and check that this one may write there; with --dry_run neither.
    Raises InputError."""
    if flags["dry_run"]:
        yield
        return
    with hold(flags["save_dir"]):
        claim_run_dir(flags["save_dir"], flags["overwrite"], flags["resume"])
        yield


def claim_run_dir(save_dir: str | Path, overwrite: bool, resume: bool) -> None:
    """Raise InputError where a run that writes into `save_dir` would destroy another run."""
    path = Path(save_dir)
    if overwrite and resume:
        raise InputError("--overwrite starts again and --resume continues: give one of them")
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in ("run.json", "checkpoints")):
        raise InputError(f"{path}: has files that are not a trainer's run; choose another --save_dir")
    started = (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir())
    if started and not (resume or overwrite):
        raise InputError(f"{path}: an unfinished run is here; --resume continues it, --overwrite starts again")
    # Next to checkpoints, a finished run is one that --overwrite was about to replace.
    if (path / "run.json").is_file() and not overwrite and not started:
        raise InputError(f"{path}: a finished run is here; --overwrite replaces it, or choose another --save_dir")
    check_folder(path)


def settings_path(save_dir: str | Path) -> Path:
    """Return where a run keeps its settings while it trains."""
    return Path(save_dir) / "checkpoints" / "settings.json"


def check_settings(save_dir: str | Path, settings: dict[str, Any]) -> None:
    """Raise InputError where a resumed run would continue with other settings than the killed run's."""
    note = settings_path(save_dir)
    if not note.is_file():
        if last_checkpoint(save_dir):
            raise InputError(f"{note}: missing, so the killed run's settings are not known; --overwrite starts again")
        return
    before = read_json(note)
    if changed := [f"{k} (was {before.get(k)}, now {v})" for k, v in settings.items() if before.get(k) != v]:
        raise InputError(f"--resume with other settings: {', '.join(changed)}; continue with the old ones")


def write_settings(save_dir: str | Path, settings: dict[str, Any]) -> None:
    """Store the settings of a run that starts, next to its checkpoints."""
    write_json(settings_path(save_dir), settings)


def last_checkpoint(save_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of an unfinished run; remove those that a kill left incomplete."""
    newest, world = None, rank_and_world()[1]
    for folder in sorted(Path(save_dir, "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:
            read_json(folder / "trainer_state.json")  # written last, but other processes may not have ended by then
            states = [f"rng_state_{i}.pth" for i in range(world)] if world > 1 else ["rng_state.pth"]
            for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", *states):
                (folder / name).stat()
            newest = str(folder)
        except (InputError, FileNotFoundError):
            shutil.rmtree(folder, ignore_errors=True)  # another process of the run may be faster
    return newest


def conditions(dtype: str) -> dict[str, str | None]:
    """Return what decides a result's last digits besides flags, data and model, for a run that is resumed: the type of
    computation that --compute_dtype `dtype` is here, the GPU, versions of packages."""
    versions = {f"{name} version": number for name, number in package_versions().items()}
    facts = machine(dtype)
    return {"dtype": facts["compute_dtype"], "gpu": facts["gpu"], **versions}


def machine(dtype: str = "auto") -> dict[str, Any]:
    """Return what measured times and memory depend on: processor, usable cores, threads, GPU, type of computation."""
    import torch

    facts = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", facts.read_text() if facts.exists() else "")
    cpu = model[1] if model else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    cores = {"cpu": cpu, "cores": usable, "threads": torch.get_num_threads()}
    return cores | {"gpu": gpu, "compute_dtype": dtype_name(dtype)}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "scikit-learn")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def peak_memory() -> dict[str, float]:
    """Return the peak in GB: of CUDA tensors, or of the process's resident memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda", "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"device": "cpu", "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
