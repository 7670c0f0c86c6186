"""Validation while training: one measure for SFT, KD and DPO, so that their curves can be compared.

Rows are {"input", "output"} with right answers. val_loss is the NLL of an answer token; where the answers are labels
of a task, val_nll and val_accuracy are those of the label among the task's labels, by raw scores without calibration.
Departures from the Trainer's evaluation: no logits are kept, adapters compute as in inference, and nothing is drawn
from the generators that decide dropout and row order, so that a training with evaluations equals one without.
Nothing heavy is imported at the top: trainers read their data before they import PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError, PromptEncoder
from distil.files import hashed, read_jsonl
from distil.processes import print_note, rank_and_world
from distil.scoring import FastLabelScorer
from distil.splits import check_no_validation, preparation, same_split

if TYPE_CHECKING:
    from distil.tasks import Task

MOST_LOGITS = 2**24  # float32 logits that are in memory at a time


@dataclass(frozen=True)
class Validation:
    """What a training is measured on: a file with its hash, user turns, answers, and the token ids of both.
    task: the one whose labels the answers are, or None. metric: what early stopping goes by."""

    file: str
    sha256: str
    turns: list[str]
    outputs: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]
    task: Task | None

    @property
    def metric(self) -> str:
        return "val_nll" if self.task else "val_loss"

    @property
    def record(self) -> dict[str, Any]:
        """Return what run.json has of it."""
        return {"file": self.file, "sha256": self.sha256, "rows": len(self.turns)}

    def plan(self, steps: int, eval_steps: int, early_stopping: int) -> str:
        """Return what --dry_run prints of it for a training of this number of steps."""
        stop = f", until {early_stopping} in a row have no better {self.metric}" if early_stopping else ""
        times = f"{math.ceil(steps / eval_steps)} times: every {eval_steps} steps and at the end"
        return f"{len(self.turns)} rows of {self.file}, {times}{stop}"


def val_file(flag: str, data: str, note: Mapping[str, Any]) -> str | None:
    """Return the file of --val_data, None for none. 'auto' looks next to the data: of creditmix_llm_kd.jsonl for
    creditmix_llm_kd_val, creditmix_llm_val and creditmix_val.jsonl, and takes the first whose note is of the same
    split. note: of the data's preparation."""
    if flag != "auto":
        return None if flag == "none" else flag
    words = Path(data).stem.split("_")
    for count in range(len(words), 0, -1):
        path = Path(data).with_name(f"{'_'.join(words[:count])}_val.jsonl")
        if path.is_file() and same_split(preparation(str(path)), note):
            return str(path)
    return None


def read_validation(
    file: str, encoder: PromptEncoder, max_length: int, task: Task | None, trained: set[str]
) -> Validation:
    """Return the rows of a file to measure a training on. task: the training's; trained: its prompts, of which a note
    says how many are here too. Raises InputError for the validation part of prepared data, which evaluations are for,
    and for rows longer than `max_length` tokens."""
    rows, sha256 = hashed(file, lambda: read_jsonl(file, ("input", "output")))
    check_no_validation(file, preparation(file, sha256), calibration=True)
    turns, outputs = [row["input"] for row in rows], [row["output"] for row in rows]
    prompts, answers = list(map(encoder.prompt, turns)), list(map(encoder.completion, outputs))
    longest, number = max((len(a) + len(b), i) for i, (a, b) in enumerate(zip(prompts, answers, strict=True), 1))
    if longest > max_length:
        raise InputError(f"{file}: row {number} has {longest} tokens, --max_length is {max_length}; raise it")
    if known := sum(turn in trained for turn in turns):
        print_note(f"{known} of {len(rows)} rows of {file} are training rows too: val_loss is too good by these")
    task = task if task and set(outputs) <= set(task.labels) else None
    return Validation(file, sha256, turns, outputs, prompts, answers, task)


def watch(trainer: Any, validation: Validation, eval_steps: int, early_stopping: int) -> None:
    """Let a trainer measure itself every `eval_steps` and at the end. early_stopping: evaluations without a better one
    after which it stops (0: never); then `Records` saves each one's checkpoint, and the best adapter is kept."""
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", eval_steps
    if early_stopping:
        trainer.args.load_best_model_at_end = True
        trainer.args.metric_for_best_model, trainer.args.greater_is_better = validation.metric, False
    trainer.evaluate = functools.partial(evaluate, trainer, validation, early_stopping)


def evaluate(trainer: Any, validation: Validation, early_stopping: int, **unused: Any) -> dict[str, float]:
    """Return the measure, log it, and stop the training where `early_stopping` evaluations had none better.
    The count comes from the log, which checkpoints have: a resumed run stops where an uninterrupted one does. Then no
    checkpoint is saved, so that a run that is killed from here on stops here again. Raises InputError for NaN."""
    state = trainer.state
    with as_in_inference(trainer.model):
        values = measure(trainer, validation)
        trainer.log(dict(values))  # TRL adds the means of what training logged where the model is in training mode
    metrics = {f"eval_{name}": value for name, value in values.items()}
    control = trainer.callback_handler.on_evaluate(trainer.args, state, trainer.control, metrics)
    losses = [entry[validation.metric] for entry in state.log_history if validation.metric in entry]
    if early_stopping and len(losses) - 1 - losses.index(min(losses)) >= early_stopping:
        control.should_training_stop, control.should_save = True, False
    trainer.control = control
    return metrics


@contextlib.contextmanager
def as_in_inference(model: Any) -> Iterator[None]:
    """Give adapters the base's type of computation, as `common.add_adapters` does, and switch dropout off; after the
    block they are exact again."""
    exact = {p: p.data for name, p in model.named_parameters() if "lora_" in name}
    try:
        for parameter in exact:
            parameter.data = parameter.data.to(model.dtype)
        model.eval()
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data
        model.train()


def measure(trainer: Any, validation: Validation) -> dict[str, float]:
    """Return val_loss and, for labels, val_nll and val_accuracy: the same in all processes, which share the rows.
    Raises InputError where they are not numbers."""
    import torch

    lengths = [len(a) + len(b) for a, b in zip(validation.prompts, validation.answers, strict=True)]
    rank, world = rank_and_world()
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world]
    size, pad = trainer.args.per_device_train_batch_size, trainer.processing_class.pad_token_id
    nll = tokens = label_nll = right = 0.0
    with torch.no_grad():
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            prompts, answers = ([ids[i] for i in part] for ids in (validation.prompts, validation.answers))
            nll += answer_nll(trainer.model.get_base_model(), prompts, answers, pad)
            tokens += sum(map(len, answers))
    if validation.task and rows:
        label_nll, right = label_losses(trainer, validation, rows, size)
    sums = torch.tensor([nll, tokens, label_nll, right], dtype=torch.float64, device=trainer.args.device)
    nll, tokens, label_nll, right = trainer.accelerator.reduce(sums, "sum").tolist()
    values = {"val_loss": nll / tokens}
    if validation.task:
        values |= {"val_nll": label_nll / len(lengths), "val_accuracy": right / len(lengths)}
    if not all(map(math.isfinite, values.values())):
        fix = "lower --learning_rate, or give --compute_dtype float32"
        raise InputError(f"the validation loss is not a number at step {trainer.state.global_step}: {fix}")
    return values


def answer_nll(model: Any, prompts: list[list[int]], answers: list[list[int]], pad: int) -> float:
    """Return the summed NLL of the tokens of answers after prompts, by the model's own logits of these tokens alone.
    The layers run once. What comes out is kept for the tokens that predict an answer's and goes through the output
    head in parts of MOST_LOGITS, each in a forward whose layers see one token."""
    import torch

    sequences, device = [a + b for a, b in zip(prompts, answers, strict=True)], model.device
    width = max(map(len, sequences))
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences], device=device)
    pairs = zip(prompts, answers, strict=True)
    places = [(i, len(a) - 1 + j) for i, (a, b) in enumerate(pairs) for j in range(len(b))]
    row, column = torch.tensor(places, device=device).T
    size = max(1, MOST_LOGITS // model.config.get_text_config().vocab_size)
    targets, waiting = ids[row, column + 1].split(size), []

    def part(module: Any, inputs: tuple) -> tuple:
        if not waiting:
            waiting.extend(inputs[0][row, column].split(size))
        return (waiting.pop(0)[None],)

    hook, total = model.get_output_embeddings().register_forward_pre_hook(part), 0.0
    try:
        for target in targets:
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, target, reduction="none").double().sum().item()
            ids = ids[:1, :1]
    finally:
        hook.remove()
    return total


def label_losses(trainer: Any, validation: Validation, rows: list[int], size: int) -> tuple[float, float]:
    """Return the summed NLL of the right labels among the task's, and how many of them have the best score."""
    import numpy as np
    from scipy.special import log_softmax

    task, encoder = validation.task, PromptEncoder(trainer.processing_class)
    forms = {label: [label] for label in task.labels}
    how = {"batch_size": size, "shared_by": validation.turns, "label_tokens": task.label_tokens}
    scorer = FastLabelScorer(trainer.model, encoder, forms, **how)
    scores = log_softmax(scorer.score([validation.prompts[i] for i in rows]), axis=1)
    gold = np.array([task.labels.index(validation.outputs[i]) for i in rows])
    return -float(scores[np.arange(len(rows)), gold].sum()), float((scores.argmax(axis=1) == gold).sum())
