"""The engine behind the server: one base model in memory, adapters on top, requests gathered into batches.
It knows nothing of HTTP. All model work happens in one worker thread (PEFT's mixed batches are per-call hooks, so two
threads would meet in one layer), tokenisation in another (a batch request has 256 texts), none in the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import InputError
from distil.calibration import fitted_calibration, unfitted_note
from distil.creditmix.model import CreditModel, CreditOptions
from distil.models import ModelRef, adapter_config, check_model_name, check_shareable, resolve, same_base, use_note
from distil.tasks import Task, default_task

VARIANTS = ("base", "sft", "kd", "dpo")
LOG = logging.getLogger("serve_creditmix")


class Refusal(Exception):
    """A request that gets an error: HTTP status, a code for programs, a message and a hint for people."""

    def __init__(self, status: int, code: str, message: str, hint: str = "", retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.hint, self.retry_after = status, code, message, hint, retry_after


@dataclass(frozen=True)
class EngineOptions:
    """refs: {variant: model}, the base among them; disabled: variants that the flags switch off; scoring: with the
    task and a fixed batch size; gather_ms: wait for more rows of a batch; queue_rows: rows without an answer yet;
    timeout: seconds."""

    refs: dict[str, ModelRef]
    scoring: CreditOptions
    disabled: tuple[str, ...] = ()
    gather_ms: float = 3.0
    queue_rows: int = 1024
    timeout: float = 30.0


@dataclass
class Row:
    """One prompt (token ids) on its way through the engine. enqueued: time.monotonic()."""

    variant: str
    prompt: list[int]
    future: asyncio.Future
    enqueued: float = field(default_factory=time.monotonic)


def default_folder(variant: str, task: str) -> str:
    """Return where the trainers of this project save a variant of a task, by the task's name."""
    return f"runs/{task}_{variant}"


def resolve_variants(base: str, folders: dict[str, str | None], task: str) -> dict[str, ModelRef]:
    """Return {variant: model} of the base and of the adapters that exist. folders: {variant: folder, 'none', or None
    for the default of the task}. Raises InputError for an adapter of another base, and for a folder without one that
    is not the default."""
    refs = {"base": resolve(base)}
    for variant in folders:
        folder = folders[variant] or default_folder(variant, task)
        config = adapter_config(folder) if folder != "none" else None
        if config and not same_base(owner := config["base_model_name_or_path"], base):
            raise InputError(f"--{variant} {folder}: belongs to {owner}, not to --base {base}")
        if config:
            refs[variant] = resolve(folder)
            check_shareable(folder)
        elif folder not in ("none", default_folder(variant, task)):
            if (Path(folder) / "checkpoints").is_dir():
                check_model_name(folder)  # reports that the run did not finish
            raise InputError(f"--{variant} {folder}: no adapter there; 'none' leaves this endpoint without one")
    return refs


def training_commands(base: str, variants: Sequence[str], task: Task) -> dict[str, str]:
    """Return the command that trains each of these variants."""
    base = "BASE" if Path(base).exists() else base  # answers must not hold paths
    sft, kd, dpo = (default_folder(variant, task.name) for variant in VARIANTS[1:])
    data = {v: "" if task == default_task() else f" --data data/{task.name}_{v}.jsonl" for v in VARIANTS[1:]}
    new = f"--student {base} --save_dir"
    commands = {"sft": f"python sft_train.py {new} {sft}", "kd": f"python kd_train.py {new} {kd}"}
    commands["dpo"] = f"python dpo_train.py --adapter {sft} --save_dir {dpo} --max_steps 60"
    return {variant: commands[variant] + data[variant] for variant in variants}


def with_notes(response: dict, notes: list[str]) -> dict:
    """Return a response with notes on its features under "extra"; as it is where there are none."""
    return response | {"extra": response.get("extra", {}) | {"notes": notes}} if notes else response


class Engine:
    """Scores rows of several variants of one base in mixed batches, by CreditModel, as infer_creditmix.py does.
    `start` loads in the background; `score` waits for a place in a batch."""

    def __init__(self, options: EngineOptions, metrics: Any = None):
        self.options, self.metrics = options, metrics
        self.base = options.refs["base"].name
        for variant, ref in options.refs.items():  # what does not fit is refused before anything is loaded
            unfitted = unfitted_note(ref, fitted_calibration(ref, options.scoring), options.scoring)
            other = use_note(ref, options.scoring.load)
            for event, note in (("not calibrated", unfitted), ("other quantization", other)):
                if note:
                    LOG.warning(event, extra={"fields": {"variant": variant, "hint": note}})
        self.task = options.scoring.task
        absent = [name for name in VARIANTS if name not in options.refs]
        self._missing = training_commands(self.base, absent, self.task)
        self.models: dict[str, CreditModel] = {}
        self.description: dict[str, dict] = {}
        self.failure: str | None = None
        self._single: list[Row] = []
        self._bulk: list[Row] = []
        self._arrived, self._stopping = asyncio.Event(), False
        self._accepted = 0  # rows of requests without an answer yet
        self._bulk_share = 0.0  # places of the next batch that are due to batch requests
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._tasks: list[asyncio.Task] = []

    @property
    def ready(self) -> bool:
        """Report whether requests are answered."""
        return bool(self.models) and not self.failure

    def missing(self) -> dict[str, str]:
        """Return the command that trains each adapter that is not loaded."""
        return self._missing

    async def start(self) -> None:
        """Begin to load, and to answer once that is done; return at once."""
        self._tasks = [asyncio.create_task(self._run())]

    async def stop(self) -> None:
        """Stop after the running batch, whose rows are answered; refuse waiting rows. A load is not waited for."""
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

    async def score(self, variant: str, features: Sequence[str | Mapping[str, Any]]) -> list[dict]:
        """Return the response of each row, in order: a feature string, or {field: value}.
        Raises Refusal for the complete request."""
        if self.failure:
            raise Refusal(503, self.failure, "no model is running", "the server's log has the reason")
        if command := self.missing().get(variant):
            hint = f"train it: {command}; then restart the server"
            hint = f"the server was started with --{variant} none" if variant in self.options.disabled else hint
            raise Refusal(503, "adapter_missing", f"no adapter is loaded for {variant}", hint)
        if not self.ready:
            raise Refusal(503, "loading", "the model is being loaded", "try GET /readyz", retry_after=5)
        if self._accepted + len(features) > self.options.queue_rows:
            raise Refusal(503, "busy", "too many rows are waiting", "try again, or send fewer rows", retry_after=1)
        loop = asyncio.get_running_loop()
        rows: list[Row] = []
        self._accepted += len(features)
        try:
            async with asyncio.timeout(self.options.timeout):
                prompts, notes = await loop.run_in_executor(self._encoding, self._encode, variant, features)
                if self.failure or self._stopping:  # no task takes rows any more
                    raise Refusal(503, self.failure or "shutting_down", "no model is running")
                rows = [Row(variant, prompt, loop.create_future()) for prompt in prompts]
                (self._single if len(rows) == 1 else self._bulk).extend(rows)
                self._arrived.set()
                results = await asyncio.gather(*(row.future for row in rows))
                return [with_notes(result, each) for result, each in zip(results, notes, strict=True)]
        except TimeoutError:
            text = f"no answer within {self.options.timeout:g} s"
            raise Refusal(504, "timeout", text, "try again later, or send fewer rows") from None
        finally:
            self._accepted -= len(features)
            for row in rows:  # the others of a request that failed or was cancelled
                row.future.cancel()

    def _take(self) -> list[Row]:
        """Return the next batch: single requests first, a quarter reserved for batch requests, so none starves.
        Of each the row that waited longest, then others of its variant, then the next variant: fewer adapters in a
        batch cost less, and rows of one variant may share a beginning. Cancelled rows are dropped."""
        size, batch = self.options.scoring.batch_size, []
        self._bulk_share += size / 4  # of batches below four rows: one row in every few batches
        reserved = min(len(self._bulk), int(self._bulk_share))
        self._bulk_share -= int(self._bulk_share)
        for queue, limit in ((self._single, size - reserved), (self._bulk, size)):
            waiting = [row for row in queue if not row.future.done()]
            variants = list(dict.fromkeys(row.variant for row in waiting))
            waiting.sort(key=lambda row: variants.index(row.variant))
            places = max(0, limit - len(batch))
            batch += waiting[:places]
            queue[:] = sorted(waiting[places:], key=lambda row: row.enqueued)
        return batch

    async def _run(self) -> None:
        """Load, then serve; a failure is reported to waiting requests and to all later ones."""
        stage = "load_failed"
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
            stage = "stopped"
            await self._serve()
        except Exception:
            self.failure = stage
            LOG.exception(stage)
            self._refuse_waiting(Refusal(503, stage, "no model is running", "the server's log has the reason"))

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._stopping:
                return
            if len(self._single) + len(self._bulk) < self.options.scoring.batch_size:
                await asyncio.sleep(self.options.gather_ms / 1000)
            batch = self._take()
            if not (self._single or self._bulk):
                self._arrived.clear()
            if not batch:
                continue
            if self.metrics:
                self.metrics.batch(len(batch), [time.monotonic() - row.enqueued for row in batch])
            results = await loop.run_in_executor(self._thread, self._score, batch)
            for row, result in zip(batch, results, strict=True):
                if not row.future.done():
                    failed = isinstance(result, Exception)
                    (row.future.set_exception if failed else row.future.set_result)(result)

    # -------------------------------------------------------------------------------------- in the tokenizer's thread

    def _encode(
        self, variant: str, rows: Sequence[str | Mapping[str, Any]]
    ) -> tuple[list[list[int]], list[list[str]]]:
        """Return the token ids of each row's prompt, and what of it is doubtful. Raises Refusal for a row that is
        empty, too long, or has a field twice."""
        model, prompts, notes = self.models[variant], [], []
        for number, row in enumerate(rows):
            where = "features" if isinstance(row, str) else "fields"
            where += f"[{number}]" if len(rows) > 1 else ""
            try:
                text = row if isinstance(row, str) else self.task.features(row)
            except InputError as error:
                raise Refusal(422, "invalid", f"{where}: {error}", "see GET /task for the fields") from None
            if not text.strip():
                raise Refusal(422, "invalid", f"{where}: empty")
            try:
                prompts.append(model.prompt(text, found := Counter()))
            except InputError as error:
                raise Refusal(422, "repeated_field", f"{where}: {error}", "give each field once") from None
            if not model.scorer.fits(prompts[-1]):
                raise Refusal(422, "too_long", f"{where} has more tokens than the model's context", "shorten it")
            notes.append(self.task.doubts(found))
        return prompts, notes

    # ------------------------------------------------------------------------------------------ in the worker thread

    def _load(self) -> None:
        """Load base, adapters and priors (from disk if cached), and run a first forward of each kind."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        models = CreditModel.load_variants(self.options.refs, self.options.scoring)
        scorer = models["base"].scorer
        turns = self.task.shared_turns[:1] * len(models)
        scorer.raw_scores(turns, adapters=[model.adapter for model in models.values()])
        scorer.raw_scores(turns[:1], adapters=[models["base"].adapter])
        for variant, model in models.items():
            used = model.calibration
            bias = dict(zip(self.options.scoring.labels, used.bias.tolist(), strict=True))
            calibration = {"method": used.method, "bias": bias, "temperature": used.temperature}
            described = {"model_name": model.name, "base": self.base, "fingerprint": model.fingerprint}
            self.description[variant] = described | {"calibration": calibration, "since": since}
        self.models = models
        if self.metrics:
            self.metrics.loaded(self.description)
        LOG.info("ready", extra={"fields": {"variants": list(models)}})

    def _score(self, rows: list[Row]) -> list[dict | Exception]:
        """Return a response or an exception for each row. A batch that fails or does not fit the memory is halved."""
        import torch

        try:
            scorer = self.models["base"].scorer
            adapters = [self.models[row.variant].adapter for row in rows]
            raw = scorer.score([row.prompt for row in rows], adapters=adapters)
            return [self.models[row.variant].responses(raw[i : i + 1])[0] for i, row in enumerate(rows)]
        except Exception as error:
            # CUDA reports it by type, the CPU's allocator by text.
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
            LOG.warning("batch failed", extra={"fields": {"rows": len(rows), "error": type(error).__name__}})
            if len(rows) == 1:
                if memory:
                    return [Refusal(503, "out_of_memory", "the model ran out of memory", "try again", retry_after=1)]
                LOG.error("row failed", exc_info=error)
                return [Refusal(500, "failed", "the row could not be scored", "the server's log has the reason")]
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return self._score(rows[:half]) + self._score(rows[half:])
