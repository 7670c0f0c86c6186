"""The training curve: what is logged of a run, the same for a resumed one, and its picture."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from common import InputError


class Records(TrainerCallback):
    """Makes the training curve of a resumed run that of an uninterrupted one: at each checkpoint the mean loss since
    the last entry is logged, and entries have the seconds of training until then, those of killed runs included.
    An evaluation's values are in the entry of its step. Ends a training whose loss is not a number, before that is
    saved."""

    def on_train_begin(self, config: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_global_step:  # the folder of a resumed run may have moved
            state.best_model_checkpoint = str(Path(config.output_dir) / f"checkpoint-{state.best_global_step}")
        self.started = time.monotonic() - (state.log_history[-1]["seconds"] if state.log_history else 0)

    def on_step_end(self, config: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= control.should_evaluate and config.load_best_model_at_end
        control.should_log |= control.should_save | control.should_evaluate

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "val_loss" in state.log_history[-1]:
            values = state.log_history.pop()  # not in one line: [-1] would be evaluated first
            state.log_history[-1] |= values
        entry = state.log_history[-1]
        entry["seconds"] = round(time.monotonic() - self.started, 1)
        entry.pop("num_tokens", None)  # TRL counts those since a resume
        if not all(math.isfinite(entry.get(name, 0)) for name in ("loss", "val_loss", "val_nll")):
            fix = "lower --learning_rate, or give --compute_dtype float32"
            raise InputError(f"the loss is not a number at step {state.global_step}: {fix}")


def plot_curve(path: Path, history: list[dict], title: str) -> None:
    """Draw the losses over steps, training and validation, and the learning rate on a second axis."""
    from matplotlib.figure import Figure

    steps, losses, rates = ([entry[name] for entry in history] for name in ("step", "loss", "learning_rate"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, losses, color="tab:blue", label="training (loss of the method)")
    if measured := [(entry["step"], entry["val_loss"]) for entry in history if "val_loss" in entry]:
        axis.plot(
            *zip(*measured, strict=True),
            color="black",
            linestyle="--",
            marker="o",
            label="validation (NLL of an answer token)",
        )
        axis.legend()
    axis.set(xlabel="optimiser step", ylabel="per supervised token", title=title)
    rate = axis.twinx()
    rate.plot(steps, rates, color="tab:gray", linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    figure.savefig(path, dpi=120)
