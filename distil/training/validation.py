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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import InputError, PromptEncoder
from distil.files import hashed, read_jsonl
from distil.heads import answer_logits
from distil.processes import print_note, rank_and_world
from distil.scoring import FastLabelScorer
from distil.splits import check_no_validation, check_one_split, preparation, same_split
from distil.tasks import Task


@dataclass(frozen=True)
class Validation:
    """What a training is measured on: a file with its hash, its rows, the token ids of their prompts and answers.
    task: the one whose labels the answers are, or None. encoder: of the model in training, which `watch` adds.
    metric: what early stopping goes by."""

    file: str
    sha256: str
    rows: list[dict]
    tokens: list[tuple[list[int], list[int]]]
    task: Task | None
    encoder: PromptEncoder | None = None

    @property
    def metric(self) -> str:
        return "val_nll" if self.task else "val_loss"


def val_file(flag: str, data: str, note: Mapping[str, Any]) -> str | None:
    """Return the file of --val_data, None for none. 'auto' looks next to the data: of creditmix_llm_kd.jsonl for
    creditmix_llm_kd_val, creditmix_llm_val and creditmix_val.jsonl, and takes the first whose note is of the same
    split. note: of the data's preparation."""
    if flag != "auto":
        return None if flag == "none" else flag
    words = Path(data).stem.split("_")
    paths = (Path(data).with_name(f"{'_'.join(words[:count])}_val.jsonl") for count in range(len(words), 0, -1))
    return next((str(path) for path in paths if path.is_file() and same_split(preparation(str(path)), note)), None)


def read_validation(
    options: Any, encoder: PromptEncoder, data: str, note: Mapping[str, Any], task: Task | None, trained: set[str]
) -> Validation | None:
    """Return what to measure a training on by its options, None where `val_file` finds nothing. task, trained: its
    task and prompts, of which a note says how many are here too. Raises InputError for the validation part of prepared
    data, which evaluations are for, as `check_one_split`, for rows that are too long, and for --early_stopping without
    any."""
    if (file := val_file(options.val_data, data, note)) is None:
        if options.early_stopping:
            raise InputError("--early_stopping: no rows to measure training on were found; give --val_data FILE")
        return None
    rows, sha256 = hashed(file, lambda: read_jsonl(file, ("input", "output")))
    check_no_validation(file, own := preparation(file, sha256), calibration=True)
    check_one_split(file, own, data, note)
    tokens = [(encoder.prompt(row["input"]), encoder.completion(row["output"])) for row in rows]
    longest, number = max((len(prompt) + len(answer), i) for i, (prompt, answer) in enumerate(tokens, 1))
    if longest > options.max_length:
        limit = f"--max_length is {options.max_length}; raise it"
        raise InputError(f"{file}: row {number} has {longest} tokens, {limit}")
    if known := sum(row["input"] in trained for row in rows):
        print_note(f"{known} of {len(rows)} rows of {file} are training rows too: val_loss is too good by these")
    others = sum(row["output"] not in task.labels for row in rows) if task else len(rows)
    if 0 < others < len(rows):
        print_note(f"{others} of {len(rows)} rows of {file} have no label of {task.name}: val_loss alone is measured")
    return Validation(file, sha256, rows, tokens, None if others else task)


def watch(trainer: Any, validation: Validation, eval_steps: int, early_stopping: int) -> None:
    """Let a trainer measure itself every `eval_steps` and at the end. early_stopping: evaluations without a better one
    after which it stops (0: never); then `Records` saves each one's checkpoint, and the best adapter is kept."""
    validation = replace(validation, encoder=PromptEncoder(trainer.processing_class))
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", eval_steps
    if early_stopping:
        trainer.args.load_best_model_at_end = True
        trainer.args.metric_for_best_model, trainer.args.greater_is_better = validation.metric, False
    trainer.evaluate = functools.partial(evaluate, trainer, validation, early_stopping)


def evaluate(trainer: Any, validation: Validation, early_stopping: int, **unused: Any) -> dict[str, float]:
    """Return the measure, log it, and stop the training where `early_stopping` evaluations had none better.
    The count comes from the log, which checkpoints have: a resumed run stops where an uninterrupted one does. Then no
    checkpoint is saved, so that a run that is killed from here on stops here again."""
    with as_in_inference(trainer.model):
        values = measure(trainer, validation)
        trainer.log(dict(values))  # TRL adds the means of what training logged where the model is in training mode
    metrics, state = {f"eval_{name}": value for name, value in values.items()}, trainer.state
    control = trainer.callback_handler.on_evaluate(trainer.args, state, trainer.control, metrics)
    losses = [entry[validation.metric] for entry in state.log_history if validation.metric in entry]
    if early_stopping and len(losses) - 1 - losses.index(min(losses)) >= early_stopping:
        control.should_training_stop, control.should_save = True, False
    trainer.control = control
    return metrics


@contextlib.contextmanager
def as_in_inference(model: Any) -> Iterator[None]:
    """Switch dropout off and give adapters the base's type of computation, as `common.add_adapters` does; after the
    block they are exact again."""
    exact = {parameter: parameter.data for name, parameter in model.named_parameters() if "lora_" in name}
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
    """Return val_loss and, for labels, val_nll and val_accuracy: the same in all processes, which share the rows."""
    import torch

    (rank, world), tokens = rank_and_world(), validation.tokens
    rows = sorted(range(len(tokens)), key=lambda i: sum(map(len, tokens[i])))[rank::world]
    size, pad = trainer.args.per_device_train_batch_size, trainer.processing_class.pad_token_id
    batches = [[tokens[i] for i in rows[start : start + size]] for start in range(0, len(rows), size)]
    nll = 0.0
    for batch in batches:
        targets = torch.tensor([token for _, answer in batch for token in answer], device=trainer.model.device)
        with torch.no_grad():
            for logits in answer_logits(trainer.model, batch, pad):
                target, targets = targets.tensor_split([len(logits)])
                losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
                nll += losses.double().sum().item()
    sums = [nll, sum(len(tokens[i][1]) for i in rows)]
    sums += label_sums(trainer, validation, rows) if validation.task and rows else [0.0, 0.0]
    sums = torch.tensor(sums, dtype=torch.float64, device=trainer.args.device)
    nll, count, label_nll, right = trainer.accelerator.reduce(sums, "sum").tolist()
    labels = {"val_nll": label_nll / len(tokens), "val_accuracy": right / len(tokens)} if validation.task else {}
    return {"val_loss": nll / count, **labels}


def label_sums(trainer: Any, validation: Validation, rows: list[int]) -> list[float]:
    """Return the summed NLL of the right labels among the task's, and how many of them have the best score."""
    from scipy.special import log_softmax

    labels, chosen = validation.task.labels, [validation.rows[i] for i in rows]
    how = {"batch_size": trainer.args.per_device_train_batch_size, "label_tokens": validation.task.label_tokens}
    how["shared_by"] = [row["input"] for row in chosen]
    scorer = FastLabelScorer(trainer.model, validation.encoder, {label: [label] for label in labels}, **how)
    scores = log_softmax(scorer.score([validation.tokens[i][0] for i in rows]), axis=1)
    gold = [labels.index(row["output"]) for row in chosen]
    return [-float(scores[range(len(rows)), gold].sum()), float((scores.argmax(axis=1) == gold).sum())]
