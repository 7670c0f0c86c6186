"""The engine behind serve_creditmix.py: one base model in memory, adapters on top, requests gathered into batches.

Apart from the HTTP side so that each can be tested without the other. All model work happens in one worker thread
(PEFT's mixed batches are per-call hooks, so two threads would meet in one layer) and all tokenisation in another (a
batch request has 256 texts); the event loop only moves rows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from creditmix import LABELS, CreditModel, check_scoring_flags, creditmix_prompt, fitted_calibration, unfitted_note
from files import InputError
from models import adapter_config, base_of, check_model_name, model_fingerprint, same_base

VARIANTS = ("base", "sft", "kd", "dpo")
LOG = logging.getLogger("serve_creditmix")


class Refusal(Exception):
    """A request that gets an error: HTTP status, a code for programs, a message and a hint for people."""

    def __init__(self, status: int, code: str, message: str, hint: str = "", retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.hint, self.retry_after = status, code, message, hint, retry_after


@dataclass
class Row:
    """One prompt (token ids) on its way through the engine. `enqueued`: time.monotonic()."""

    variant: str
    prompt: list[int]
    future: asyncio.Future
    enqueued: float = field(default_factory=time.monotonic)


def adapter_folders(args: argparse.Namespace) -> dict[str, str]:
    """{variant: folder} of the adapters that are there ('none': not wanted).

    Raises InputError for one that belongs to another base, and for a folder other than the default without one."""
    folders = {}
    for variant in VARIANTS[1:]:
        folder = getattr(args, variant)
        if folder == "none":
            continue
        if not adapter_config(folder):
            if folder != default_folder(variant):
                if (Path(folder) / "checkpoints").is_dir():
                    check_model_name(folder)  # says that the run did not finish
                raise InputError(f"--{variant} {folder}: no adapter there; 'none' leaves this endpoint without one")
            continue
        check_model_name(folder)
        if not same_base(base_of(folder), args.base):
            raise InputError(f"--{variant} {folder}: belongs to {base_of(folder)}, not to --base {args.base}")
        folders[variant] = folder
    return folders


def default_folder(variant: str) -> str:
    return f"runs/creditmix_{variant}"


class Engine:
    """Scores rows of several variants of one base in mixed batches.

    `start` loads in the background; `score` waits for a place in a batch. Source of scores: `CreditModel`, as infer.
    """

    def __init__(self, args: argparse.Namespace, metrics: Any = None):
        check_scoring_flags(args)
        check_model_name(args.base)
        self.args, self.metrics = args, metrics
        self.folders = adapter_folders(args)
        names = {"base": args.base} | self.folders
        self._fitted = {variant: fitted_calibration(name, args) for variant, name in names.items()}
        for variant, name in names.items():
            if note := unfitted_note(name, self._fitted[variant], args):
                LOG.warning("not calibrated", extra={"fields": {"variant": variant, "hint": note}})
        self._missing = self._training_commands()
        self.models: dict[str, CreditModel] = {}
        self.description: dict[str, dict] = {}
        self.failure: str | None = None
        self._single: deque[Row] = deque()
        self._bulk: deque[Row] = deque()
        self._arrived = asyncio.Event()
        self._stopping = False
        self._accepted = 0  # rows of requests without an answer yet
        self._bulk_share = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._tasks: list[asyncio.Task] = []

    @property
    def ready(self) -> bool:
        return bool(self.models) and not self.failure

    def missing(self) -> dict[str, str]:
        """The command that trains each adapter that is not there."""
        return self._missing

    def _training_commands(self) -> dict[str, str]:
        base = "BASE" if Path(self.args.base).exists() else self.args.base  # no paths in answers
        sft, kd, dpo = map(default_folder, VARIANTS[1:])
        commands = {
            "sft": f"python sft_train.py --student {base} --save_dir {sft}",
            "kd": f"python kd_train.py --student {base} --save_dir {kd}",
            "dpo": f"python dpo_train.py --adapter {sft} --save_dir {dpo} --max_steps 60",
        }
        return {variant: command for variant, command in commands.items() if variant not in self.folders}

    async def start(self) -> None:
        """Begin to load, and to answer once that is done; returns at once."""
        self._tasks = [asyncio.create_task(self._run())]

    async def stop(self) -> None:
        """Stop after the batch that is running, whose rows are answered; rows still waiting are refused. A load is not
        waited for."""
        self._stopping = True
        self._arrived.set()
        for task in self._tasks if not self.models else []:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._refuse_waiting(Refusal(503, "shutting_down", "the server is shutting down"))
        self._thread.shutdown(wait=bool(self.models))
        self._encoding.shutdown()

    def _refuse_waiting(self, refusal: Refusal) -> None:
        for row in (*self._single, *self._bulk):
            if not row.future.done():
                row.future.set_exception(refusal)

    # ------------------------------------------------------------------------------------------- in the event loop

    async def score(self, variant: str, features: Sequence[str]) -> list[dict]:
        """The response of each feature string, in order. Raises Refusal for the whole request."""
        if self.failure:
            raise Refusal(503, self.failure, "no model is at work", "the server's log says why")
        if command := self.missing().get(variant):
            hint = f"train it: {command}; then restart the server"
            if getattr(self.args, variant) == "none":
                hint = f"the server was started with --{variant} none"
            raise Refusal(503, "adapter_missing", f"no adapter is loaded for {variant}", hint)
        if not self.ready:
            raise Refusal(503, "loading", "the model is being loaded", "ask /readyz", retry_after=5)
        if self._accepted + len(features) > self.args.queue_rows:
            raise Refusal(503, "busy", "too many rows are waiting", "try again, or ask for less", retry_after=1)
        loop = asyncio.get_running_loop()
        rows: list[Row] = []
        self._accepted += len(features)
        try:
            async with asyncio.timeout(self.args.timeout):
                prompts = await loop.run_in_executor(self._encoding, self._encode, variant, features)
                if self.failure or self._stopping:  # nobody takes rows any more
                    raise Refusal(503, self.failure or "shutting_down", "no model is at work")
                rows = [Row(variant, prompt, loop.create_future()) for prompt in prompts]
                (self._single if len(rows) == 1 else self._bulk).extend(rows)
                self._arrived.set()
                return list(await asyncio.gather(*(row.future for row in rows)))
        except TimeoutError:
            text = f"no answer within {self.args.timeout:g} s"
            raise Refusal(504, "timeout", text, "try again later, or ask for less") from None
        finally:
            self._accepted -= len(features)
            for row in rows:  # nobody waits for the others of a request that failed or was given up
                row.future.cancel()

    def _take(self) -> list[Row]:
        """The next batch: single requests first, a quarter kept for rows of batch requests, so that neither starves.
        Of each the row that waited longest, then others of its variant, then the next variant: fewer adapters in a
        batch cost less, and rows of one variant may share a beginning. Rows that nobody waits for are dropped."""
        size, batch = self.args.batch_size, []
        self._bulk_share += size / 4  # of batches below four rows: one row in every few batches
        reserved = min(len(self._bulk), int(self._bulk_share))
        self._bulk_share -= int(self._bulk_share)
        for queue, limit in ((self._single, size - reserved), (self._bulk, size)):
            by_variant: dict[str, list[Row]] = {}
            for row in queue:
                if not row.future.done():
                    by_variant.setdefault(row.variant, []).append(row)
            waiting = list(itertools.chain(*by_variant.values()))
            places = max(0, limit - len(batch))
            batch += waiting[:places]
            queue.clear()
            queue.extend(sorted(waiting[places:], key=lambda row: row.enqueued))
        return batch

    async def _run(self) -> None:
        """Load, then serve; what fails is said to those who wait and to all who ask later."""
        stage = "load_failed"
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
            stage = "stopped"
            await self._serve()
        except Exception:
            self.failure = stage
            LOG.exception(stage)
            self._refuse_waiting(Refusal(503, stage, "no model is at work", "the server's log says why"))

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._stopping:
                return
            if len(self._single) + len(self._bulk) < self.args.batch_size:
                await asyncio.sleep(self.args.gather_ms / 1000)
            batch = self._take()
            if not (self._single or self._bulk):
                self._arrived.clear()
            if not batch:
                continue
            if self.metrics:
                self.metrics.batch(len(batch), [time.monotonic() - row.enqueued for row in batch])
            results = await loop.run_in_executor(self._thread, self._score, batch)
            for row, result in zip(batch, results, strict=True):
                if row.future.done():
                    continue
                if isinstance(result, Exception):
                    row.future.set_exception(result)
                else:
                    row.future.set_result(result)

    # -------------------------------------------------------------------------------------- in the tokenizer's thread

    def _encode(self, variant: str, features: Sequence[str]) -> list[list[int]]:
        """Token ids of each feature string's prompt. Raises Refusal for one that is too long."""
        model = self.models[variant]
        prompts = [model.prompt(text) for text in features]
        for number, prompt in enumerate(prompts):
            if not model.scorer.fits(prompt):
                where = f"features[{number}]" if len(features) > 1 else "features"
                raise Refusal(422, "too_long", f"{where} has more tokens than the model's context", "shorten it")
        return prompts

    # ------------------------------------------------------------------------------------------ in the worker thread

    def _load(self) -> None:
        """Base, adapters, priors (from disk where they are there) and a first forward of each kind."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        models = CreditModel.load_variants(self.args.base, self.folders, self._fitted, self.args)
        scorer = models["base"].scorer
        turns = [creditmix_prompt("Age: 1")] * len(models)
        scorer.raw_scores(turns, adapters=[model.adapter for model in models.values()])
        scorer.raw_scores(turns[:1], adapters=[models["base"].adapter])
        for variant, model in models.items():
            name = self.folders.get(variant, self.args.base)
            used = model.calibration
            self.description[variant] = {
                "model_name": model.name,
                "base": self.args.base,
                "fingerprint": model_fingerprint(name),
                "calibration": {
                    "method": used.method,
                    "bias": dict(zip(LABELS, used.bias.tolist(), strict=True)),
                    "temperature": used.temperature,
                },
                "since": since,
            }
        self.models = models
        if self.metrics:
            self.metrics.loaded(self.description)
        LOG.info("ready", extra={"fields": {"variants": list(models)}})

    def _score(self, rows: list[Row]) -> list[dict | Exception]:
        """A response or an exception for each row. A batch that fails is halved, so that only the row to blame does,
        and one that does not fit the memory runs in parts."""
        try:
            scorer = self.models["base"].scorer
            adapters = [self.models[row.variant].adapter for row in rows]
            raw = scorer.score([row.prompt for row in rows], adapters=adapters)
            return [self.models[row.variant].responses(raw[i : i + 1])[0] for i, row in enumerate(rows)]
        except Exception as error:
            memory = is_out_of_memory(error)
            LOG.warning("batch failed", extra={"fields": {"rows": len(rows), "error": type(error).__name__}})
            if len(rows) == 1:
                if memory:
                    return [Refusal(503, "out_of_memory", "the model ran out of memory", "try again", retry_after=1)]
                LOG.error("row failed", exc_info=error)
                return [Refusal(500, "failed", "the row could not be scored", "the server's log says why")]
        if memory:
            release_memory()
        half = len(rows) // 2
        return self._score(rows[:half]) + self._score(rows[half:])


def is_out_of_memory(error: Exception) -> bool:
    """CUDA says it by type, the CPU allocator by text."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
