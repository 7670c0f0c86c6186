"""Check what kill -9, a full disk and a read-only folder do to the trainers, kd_prepare.py and infer_creditmix.py.

Each script runs once undisturbed. Then it is killed at random moments (printed, from --seed) and started again with
--resume, or with the same command: the results must be byte-identical, and only prompts in flight at the kill may be
sent to a teacher twice. On a full disk and in a read-only folder a script must end with one line and leave all files
unchanged, also those of an older run that --overwrite would replace. Without --base the model is a random two-layer
one, and all of it takes a few minutes. Processes are forked from one that has the libraries loaded, so that
the kills fall into the work, not into imports.

    python -m bench.chaos
    python -m bench.chaos --base smollm2-135m --only sft dpo --json
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import InputError
from distil.cli import run_script
from distil.files import write_jsonl

LIBRARIES = ("sft_train", "kd_train", "dpo_train", "kd_prepare", "infer_creditmix", "distil.training.run")
LIBRARIES += ("distil.training.loss", "distil.teachers.local", "distil.teachers.endpoint", "distil.creditmix.model")
LIBRARIES += ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "bitsandbytes", "peft", "openai", "scipy.special")
LIBRARIES += ("matplotlib.figure", "sklearn.metrics", "sklearn.compose", "sklearn.pipeline", "sklearn.model_selection")
LIBRARIES += ("pandas", "sklearn.linear_model")
JOBS = ("sft", "kd", "dpo", "teacher_url", "teacher", "infer")
IN_FLIGHT = 4  # --concurrency


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", help="base model (default: a random two-layer model)")
    add("--only", nargs="+", choices=JOBS, default=JOBS, help="jobs to disturb (all)")
    add("--kills", type=int, default=8, help="moments of each job (%(default)s)")
    add("--seed", type=int, default=0, help="of the moments (%(default)s)")
    add("--json", action="store_true", help="print one JSON object on standard output, the table on standard error")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


# ------------------------------------------------------------------------------------------------------------- running


def run_child(script: str, argv: list[str], log: str, file_limit: int | None) -> None:
    """Run a script as from the command line, its output in `log`. file_limit: bytes a file may have."""
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"{script}.py", *argv]
    run_script(lambda _: importlib.import_module(script).main(argv))


def save_base(folder: str) -> None:
    """Save a random two-layer model."""
    from distil.testing import build_tokenizer, save_random_model

    save_random_model(Path(folder), build_tokenizer(), "qwen2")


@dataclass
class Runner:
    """Starts scripts in separate processes; `log` is the last one's output."""

    folder: Path

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", *LIBRARIES])  # main first: it sets the path
        self.log = self.folder / "log"

    def start(self, script: str, argv: list[str], file_limit: int | None = None) -> Any:
        """Return the process of a script, started."""
        process = self.context.Process(target=run_child, args=(script, argv, str(self.log), file_limit))
        process.start()
        return process

    def run(self, script: str, argv: list[str], file_limit: int | None = None) -> int:
        """Return the exit status of a script."""
        process = self.start(script, argv, file_limit)
        process.join()
        return process.exitcode

    def one_line(self, script: str) -> str | None:
        """Return the last line of the log if the script printed it and there is no traceback."""
        text = self.log.read_text(errors="replace")
        last = text.strip().splitlines()[-1] if text.strip() else ""
        return last if last.startswith(f"{script}.py: ") and "Traceback" not in text else None


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """A script with its flags but for where it writes."""

    name: str
    script: str
    flags: list[str]
    target: str  # the flag that takes what it writes

    @property
    def trains(self) -> bool:
        """Report whether the script is a trainer."""
        return self.target == "--save_dir"

    def argv(self, folder: Path, *more: str) -> list[str]:
        """Return the flags of a run in a folder."""
        return [*self.flags, self.target, str(self.path(folder)), *more]

    def path(self, folder: Path) -> Path:
        """Return what a run writes."""
        return folder / "runs" / ("run" if self.trains else "out.jsonl")

    def resume_argv(self, folder: Path) -> list[str]:
        """Return the flags that resume a killed run."""
        return self.argv(folder, *(["--resume"] if self.trains else []))

    def result(self, folder: Path) -> dict[str, str]:
        """Return {file: hash} of a run's results; '' for files that need not be equal."""
        same = ("adapter_model.safetensors", "tokenizer.json", "out.jsonl")
        return {name: digest if name.endswith(same) else "" for name, digest in tree(folder / "runs").items()}

    def done(self, folder: Path) -> str:
        """Return how far a killed run was."""
        path = self.path(folder)
        if self.trains:
            steps = [int(p.parent.name.split("-")[1]) for p in path.glob("checkpoints/*/trainer_state.json")]
            return f"step {max(steps, default=0)}" + ("+adapter" if (path / "adapter_config.json").exists() else "")
        if path.exists():
            return "written"
        part = path.with_name("out.jsonl.part")
        return f"row {part.read_bytes().count(10) if part.exists() else 0}"


def tree(folder: Path) -> dict[str, str]:
    """Return {relative name: hash} of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_jobs(base: str, folder: Path, url: str) -> dict[str, Job]:
    """Write the input files and return the jobs by name. url: of the teacher's endpoint."""
    from distil.tasks import default_task
    from distil.testing import credit_rows

    task = default_task()

    raw = [row["question"] for row in credit_rows(customers=600, months=1)]
    prompts = [task.prompt(question) for question in raw]
    gold = [task.labels[number % 3] for number in range(len(raw))]
    rows = list(zip(prompts, gold, strict=True))
    shares = [{label: 0.8 if label == right else 0.1 for label in task.labels} for right in gold]
    write_jsonl(folder / "features.jsonl", ({"features": question} for question in raw))
    write_jsonl(folder / "sft.jsonl", ({"input": prompt, "output": right} for prompt, right in rows[:60]))
    kd = ({"input": p, "teacher_output": r, "label_probs": s} for (p, r), s in zip(rows[:60], shares, strict=False))
    write_jsonl(folder / "kd.jsonl", kd)
    pairs = ({"prompt": p, "chosen": r, "rejected": "Bad" if r != "Bad" else "Good"} for p, r in rows[:60])
    write_jsonl(folder / "dpo.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", ({"input": prompt, "output": right} for prompt, right in rows[:150]))
    # Dropout and Adam, so that a random state or a moment that a checkpoint loses shows.
    # Steps enough that most kills fall between them: loading takes seconds.
    train = ["--student", base, "--max_steps", "60", "--save_steps", "7", "--batch_size", "2", "--grad_accum", "1"]
    train += ["--warmup_steps", "4", "--learning_rate", "1e-3", "--lora_dropout", "0.1", "--split_seed", "0"]
    jobs = [Job(m, f"{m}_train", [*train, "--data", str(folder / f"{m}.jsonl")], "--save_dir") for m in JOBS[:3]]
    prompts_file = ["--input", str(folder / "prompts.jsonl")]
    endpoint = ["--teacher_url", url, "--teacher_model", "m", "--concurrency", str(IN_FLIGHT)]
    jobs.append(Job("teacher_url", "kd_prepare", [*prompts_file, *endpoint], "--output"))
    jobs.append(Job("teacher", "kd_prepare", [*prompts_file, "--teacher", base, "--batch_size", "8"], "--output"))
    rows_flags = ["--model_dir", base, "--input", str(folder / "features.jsonl")]
    jobs.append(Job("infer", "infer_creditmix", rows_flags, "--output"))
    return {job.name: job for job in jobs}


# --------------------------------------------------------------------------------------------------------------- kills


def undisturbed(job: Job, runner: Runner, folder: Path) -> tuple[dict[str, str], float]:
    """Return (result, seconds) of a complete run, the second of two, as the first fills caches. Raises InputError if
    it fails."""
    for name in ("first", "complete"):
        start = time.monotonic()
        if runner.run(job.script, job.argv(folder / name)):
            raise InputError(f"{job.name}: the undisturbed run fails: {runner.log.read_text()[-1000:]}")
    return job.result(folder / "complete"), time.monotonic() - start


def killed(job: Job, runner: Runner, folder: Path, moment: float) -> bool:
    """Kill a run after some seconds; return False where it had ended by then."""
    process = runner.start(job.script, job.argv(folder))
    process.join(moment)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_and_resume(
    job: Job,
    runner: Runner,
    folder: Path,
    undisturbed: tuple[dict[str, str], float],
    kills: int,
    seed: int,
    server: Any,
) -> list[dict[str, Any]]:
    """Return the outcome of each kill: the moment as a share of the complete run, how far the run was, whether its
    results are the same after resuming. undisturbed: its results and seconds; server: the teacher's endpoint."""
    expected, seconds = undisturbed
    rng = random.Random(f"{job.name} {seed}")
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < kills:
        here, moment = folder / f"kill{len(outcomes)}", rng.random()
        server.answered.clear()
        if not killed(job, runner, here, moment * seconds):
            shutil.rmtree(here, ignore_errors=True)
            continue
        time.sleep(2 * server.seconds)  # the endpoint finishes its requests
        row = {"moment": round(moment, 3), "done": job.done(here)}
        status = runner.run(job.script, job.resume_argv(here))
        output = runner.log.read_text()
        finished = status == 2 and ("a finished run is here" in output or "jsonl: exists" in output)
        if finished:  # killed after its last line: nothing is left to do
            shutil.rmtree(job.path(here) / "checkpoints", ignore_errors=True)
            row["done"] = "finished"
        row["same"] = (status == 0 or finished) and job.result(here) == expected
        if job.name == "teacher_url":
            twice = sum(count - 1 for count in server.answered.values())
            row |= {"asked_twice": twice, "same": row["same"] and twice <= 2 * IN_FLIGHT}
        if not row["same"]:
            row["log"] = output[-500:]
            row["differ"] = sorted(n for n, _ in job.result(here).items() ^ expected.items())
        outcomes.append(row)
    return outcomes


# --------------------------------------------------------------------------------------------------------------- disks


def mounted(folder: Path, options: str) -> bool:
    """Mount memory as a disk, or change its options; return False where only root may."""
    kind = ["-t", "tmpfs", "tmpfs"] if not folder.is_mount() else []
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(["mount", *kind, "-o", options, str(folder)], capture_output=True).returncode == 0


@contextlib.contextmanager
def unmounted(folder: Path) -> Iterator[None]:
    """Unmount a folder at the end, if it is mounted then."""
    try:
        yield
    finally:
        if folder.is_mount():
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(job: Job, runner: Runner, folder: Path, complete: Path, expected: dict[str, str]) -> dict[str, Any]:
    """Return the outcome on a disk that ends in the middle of the run: it must be one line, the run to replace must be
    unchanged, and with more room the results must be the same. complete: folder of the undisturbed run."""
    sizes = {path.name: path.stat().st_size for path in (complete / "runs").rglob("*") if path.is_file()}
    adapter = sizes.get("adapter_model.safetensors", 0)
    # An old run, and of a checkpoint, which is the adapter, two moments and the small files, room for one and a half.
    checkpoints = int(1.5 * (sum(sizes.values()) + 2 * adapter))
    room = sum(sizes.values()) + checkpoints if job.trains else sizes["out.jsonl"] // 6
    with unmounted(folder):
        real = mounted(folder, f"size={max(room, 2**13)}")
        old: dict[str, str] = {}
        if job.trains:
            shutil.copytree(complete, folder, dirs_exist_ok=True)
            (job.path(folder) / "adapter_model.safetensors").write_bytes(b"old" * (adapter // 3))
            old = tree(folder)
        limit = None if real else int(1.5 * adapter) if job.trains else room
        status = runner.run(job.script, job.argv(folder, *(["--overwrite"] if job.trains else [])), limit)
        row = {"disk": "tmpfs" if real else "RLIMIT_FSIZE", "status": status, "message": runner.one_line(job.script)}
        row["done"], row["log"] = job.done(folder), runner.log.read_text()[-1500:]
        row["old_is_whole"] = old.items() <= tree(folder).items()
        if real:
            mounted(folder, "remount,size=4g")
        row["resumed"] = runner.run(job.script, job.resume_argv(folder))
        row["same"] = status in (1, 2) and bool(row["message"]) and row["old_is_whole"]
        row["same"] &= job.result(folder) == expected
    return row


def read_only(job: Job, runner: Runner, folder: Path, complete: Path) -> dict[str, Any]:
    """Return the outcome in a read-only folder: it must be one line, and the run there must be unchanged."""
    with unmounted(folder):
        real = mounted(folder, "size=4g")
        shutil.copytree(complete, folder, dirs_exist_ok=True)
        before = tree(folder)
        if real:
            real = mounted(folder, "remount,ro")
        else:
            subprocess.run(["chmod", "-R", "a-w", str(folder)], check=True)
        row: dict[str, Any] = {"how": "mounted" if real else "chmod", "same": real or os.getuid() != 0}
        for argv in (job.argv(folder, "--overwrite"), [*job.flags, job.target, str(folder / "runs" / "new")]):
            row["status"] = runner.run(job.script, argv)
            row["message"] = runner.one_line(job.script)
            row["same"] &= row["status"] in (1, 2) and bool(row["message"]) and tree(folder) == before
        if not real:
            subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    return row


def print_table(outcomes: dict[str, dict[str, Any]], out: Any) -> None:
    """Print a line for each kill and fault."""
    for name, job in outcomes.items():
        print(f"{name}: undisturbed {job['seconds']:.1f} s", file=out)
        for kill in job["kills"]:
            twice = f", {kill['asked_twice']} answers twice" if "asked_twice" in kill else ""
            end = "same end" if kill["same"] else f"DIFFERENT END: {kill['differ']} {kill['log']}"
            print(f"  killed at {kill['moment']:.3f} of it, after {kill['done']:<17} {end}{twice}", file=out)
        for fault in ("full_disk", "read_only"):
            row = job[fault]
            verdict = "unchanged" if row["same"] else "CHANGED"
            after = f" after {row['done']}" if "done" in row else ""
            print(f"  {fault}{after}: status {row['status']}, {verdict}: {row['message'] or row.get('log')}", file=out)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from distil.testing import Endpoint

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without taking its disks away
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["HF_HUB_OFFLINE"] = "1"
        base = args.base or str(folder / "base")
        if not args.base:
            os.environ["DISTIL_SLM_CACHE"] = str(folder / "cache")  # before the fork server starts
        runner = Runner(folder)
        if not args.base:
            maker = runner.context.Process(target=save_base, args=(base,))
            maker.start()
            maker.join()
        server = Endpoint(seconds=0.05)
        server.server.handle_error = lambda *request: None  # of clients that were killed
        jobs, outcomes = make_jobs(base, folder, server.url), {}
        for name in args.only:
            job, here = jobs[name], folder / name
            print(f"{name} ...", file=sys.stderr)
            expected, seconds = undisturbed(job, runner, here)
            kills = kill_and_resume(job, runner, here, (expected, seconds), args.kills, args.seed, server)
            disk = full_disk(job, runner, here / "disk", here / "complete", expected)
            closed = read_only(job, runner, here / "closed", here / "complete")
            outcomes[name] = {"seconds": round(seconds, 2), "kills": kills, "full_disk": disk, "read_only": closed}
            print_table({name: outcomes[name]}, sys.stderr if args.json else sys.stdout)
    checks = [row["same"] for job in outcomes.values() for row in (*job["kills"], job["full_disk"], job["read_only"])]
    if args.json:
        print(json.dumps({"seed": args.seed, "checks": len(checks), "failed": checks.count(False), "jobs": outcomes}))
    else:
        print(f"{len(checks)} checks, {checks.count(False)} failed (seed {args.seed})")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    run_script(main)
