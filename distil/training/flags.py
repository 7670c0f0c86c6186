"""The flags that all trainers share, the options they become, and the defaults that depend on the student's size.
A trainer has its own flags in a subclass of TrainOptions. Nothing heavy is imported here, as `--help` needs it."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from common import InputError
from distil.cli import new_parser, number_or_auto, seed_number
from distil.files import file_sha256, read_json, read_text
from distil.models import DEFAULT_STUDENT, LoadOptions, ModelRef, adapter_config, parameter_count
from distil.processes import print_note
from distil.training.data import TrainingData

Limit = tuple[str, Callable[[float], bool]]
SMALL_STUDENT = 1e9  # parameters; smaller ones learn well with larger steps
FEW_STEPS, MOST_EPOCHS = 150, 5  # a small student repeats few rows: one pass of 50 steps teaches next to nothing
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_targets": "auto"}  # the whitepaper's section 3
# Limits of flags: what an error says is allowed, and the check.
AT_LEAST_0: Limit = ("at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1: Limit = ("at least 1", lambda value: 1 <= value < math.inf)
ABOVE_0: Limit = ("above 0", lambda value: 0 < value < math.inf)
SHARE: Limit = ("from 0 to 1", lambda value: 0 <= value <= 1)
_LORA_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_targets": "target_modules",
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Every flag of a trainer under its own name, as run.json records them. Fields without a default depend on the
    student's size. `fit_to_memory` replaces 'auto' by a number. A subclass adds its flags and their LIMITS."""

    REPEATS: ClassVar[bool] = False  # few rows; measured for a teacher's probabilities alone
    LIMITS: ClassVar[dict[str, Limit]] = {
        **dict.fromkeys(("epochs", "max_steps", "learning_rate", "warmup_steps"), AT_LEAST_0),
        **dict.fromkeys(("batch_size", "grad_accum", "max_length", "lora_r", "lora_alpha", "save_steps"), AT_LEAST_1),
        "eval_steps": AT_LEAST_1,
        "early_stopping": AT_LEAST_0,
        "lora_dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
        "max_memory_gb": ("above 0", lambda value: value > 0),
    }
    data: str
    save_dir: str
    student: str | None = None
    quantization: str = "nf4"
    compute_dtype: str = "auto"
    epochs: float
    max_steps: int = 0
    learning_rate: float
    warmup_steps: int = 30
    batch_size: int | str
    grad_accum: int
    max_length: int = 1024
    optimizer: str = "adamw_torch"
    gradient_checkpointing: str = "auto"
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_targets: str | list[str]
    seed: int = 0
    split_seed: int | None = None
    val_data: str = "auto"
    eval_steps: int
    early_stopping: int = 0
    save_steps: int = 100
    resume: bool = False
    overwrite: bool = False
    report_to: str = "none"
    max_memory_gb: float | None = None
    dry_run: bool = False
    debug: bool = False
    push_to_hub: str | None = None

    @property
    def load(self) -> LoadOptions:
        """Return how the student is loaded."""
        return LoadOptions(self.quantization, self.compute_dtype)


Options = TypeVar("Options", bound=TrainOptions)
# Flags that say what to do with a run folder and not how to train: --config leaves them out of a run.json.
_OF_THE_FOLDER = ("save_dir", "resume", "overwrite", "dry_run", "debug", "push_to_hub")


class TrainParser(argparse.ArgumentParser):
    """A parser of flags of which a file may hold some, `--config FILE`; those of the command line win."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the flags. Raises InputError where the file cannot be read or has a name that is no flag."""
        args = sys.argv[1:] if args is None else list(args)
        given = super().parse_args(args, namespace)
        if file := getattr(given, "config", None):
            given = super().parse_args(self.from_file(file, args) + args, namespace)
        return given

    def from_file(self, file: str, args: Sequence[str]) -> list[str]:
        """Return the flags of a file as a command line has them, so that they are checked alike. A run.json has them
        under "flags". Null and false stand for a flag that is not given. args: the command line."""
        values, actions = read_config(file), {action.dest: action for action in self._actions}
        if "base_model" in values and isinstance(values.get("flags"), dict):
            sha256 = (values.get("data") or {}).get("sha256")
            values = {name: value for name, value in values["flags"].items() if name not in _OF_THE_FOLDER}
            if not any(arg.partition("=")[0] == "--save_dir" for arg in args):
                raise InputError(f"--config {file}: a run that repeats another has its own folder; give --save_dir")
            data = values.get("data")
            if sha256 and data and Path(data).is_file() and file_sha256(data) != sha256:
                print_note(f"{data}: other content than in the run of {file}, so the result will be another")
        argv = []
        for name, value in values.items():
            if name not in actions or name in ("help", "config"):
                near = difflib.get_close_matches(str(name), actions, n=1)
                raise InputError(f"{file}: {name!r} is no flag of this script{f'; {near[0]!r} is' if near else ''}")
            if name == "lora_targets" and isinstance(value, list):  # of a run that continued an adapter
                value = ",".join(map(str, value))
            switch = actions[name].nargs == 0
            if isinstance(value, list | dict) or (value is not None and isinstance(value, bool) != switch):
                raise InputError(f"{file}: {name}: {value!r} is no value of --{name}; quote texts such as on and off")
            argv += [] if value is None or value is False else [f"--{name}" if switch else f"--{name}={value}"]
        return argv


def read_config(file: str) -> dict[str, Any]:
    """Return the object in a JSON or (.yaml, .yml) YAML file. Raises InputError."""
    import yaml

    try:
        values = yaml.safe_load(read_text(file)) if Path(file).suffix in (".yaml", ".yml") else read_json(file)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: flags by name are expected, such as epochs: 2, not {type(values).__name__}")
    return values


def training_parser(
    doc: str | None,
    small: dict,
    large: dict,
    task: str,
    rows: str,
    adapter: bool = True,
    kind: type[TrainOptions] = TrainOptions,
) -> TrainParser:
    """Return a parser with the flags that trainers share; `train_options` reads them. doc: the script's docstring.
    small, large: recipes by flag, below SMALL_STUDENT parameters and above. task: default name of data and run folder.
    rows: fields of the data. adapter: add --adapter. kind: the trainer's options."""
    parser = new_parser(doc, TrainParser)

    def recipe(name: str) -> str:
        same = small[name] == large[name]
        return f"({small[name]:g})" if same else f"({small[name]:g} below 1 B parameters, else {large[name]:g})"

    add = parser.add_argument_group("model and data").add_argument
    student = "base model: hub id, local folder or smollm2-135m"
    if adapter:
        add("--student", help=f"{student} (default: the adapter's, or the 3B student)")
        add("--adapter", help="adapter folder to continue from, such as runs/creditmix_sft (default: a new adapter)")
    else:
        add("--student", default=DEFAULT_STUDENT, help=f"{student} (%(default)s)")
    add("--data", default=f"data/{task}.jsonl", help=f"JSONL of {rows} (%(default)s)")
    add("--save_dir", default=f"runs/{task}", help="adapter folder to write (%(default)s)")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the frozen base (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    add = parser.add_argument_group("optimisation").add_argument
    few = f"; more for few rows: {FEW_STEPS} steps, at most {MOST_EPOCHS} passes" if kind.REPEATS else ""
    add("--epochs", type=float, help=f"passes over the data {recipe('epochs')}{few}")
    add("--max_steps", type=int, default=0, help="optimiser steps; 0: by --epochs (%(default)s)")
    add("--learning_rate", type=float, help=f"peak {recipe('learning_rate')}")
    add("--warmup_steps", type=int, default=30, help="steps of rising rate, before linear decay (%(default)s)")
    batch = f"rows a forward {recipe('batch_size')}; auto: the most that fit the memory, for the same rows a step"
    add("--batch_size", type=number_or_auto, help=batch)
    add("--grad_accum", type=int, help=f"forwards a step {recipe('grad_accum')}; with --batch_size auto: rows a step")
    add("--max_length", type=int, default=1024, help="tokens; longer rows are refused, not cut (%(default)s)")
    add("--optimizer", choices=("adamw_torch", "adamw_8bit", "sgd"), default="adamw_torch", help="(%(default)s)")
    checkpointing = "recompute activations to save memory; auto: where it does not fit without (%(default)s)"
    add("--gradient_checkpointing", choices=("auto", "on", "off"), default="auto", help=checkpointing)
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_r", type=int, help=f"rank {recipe('lora_r')}")
    add("--lora_alpha", type=int, help=f"scale is alpha / r {recipe('lora_alpha')}")
    add("--lora_dropout", type=float, help=recipe("lora_dropout"))
    targets = "layers it goes to, NAME,... or all-linear; auto: the usual seven where all layers have them, else all"
    add("--lora_targets", help=f"{targets} (auto)")
    add = parser.add_argument_group("validation").add_argument
    rows = 'JSONL of {"input", "output"} to measure training on; auto: the <task>_val.jsonl of a prepare script next '
    rows += "to --data, in runs of --eval_steps or more (%(default)s)"
    add("--val_data", metavar="FILE|auto|none", default="auto", help=rows)
    add("--eval_steps", type=int, help="steps between two measures (default: as --save_steps)")
    stop = "stop after this number of measures without a better one and keep the best adapter; 0: never (%(default)s)"
    add("--early_stopping", metavar="N", type=int, default=0, help=stop)
    add = parser.add_argument_group("run").add_argument
    files = "JSON or YAML file of flags by name, or the run.json of an earlier run to repeat it; the command line wins"
    add("--config", metavar="FILE", help=files)
    add("--seed", type=seed_number, default=0, help="of adapter initialisation, row order and dropout (%(default)s)")
    add("--split_seed", type=int, help="the split the data was prepared with (default: as noted next to it)")
    add("--save_steps", type=int, default=100, help="steps between checkpoints (%(default)s)")
    add("--resume", action="store_true", help="continue from the last checkpoint of a killed run")
    add("--overwrite", action="store_true", help="replace a run that is in --save_dir")
    add("--report_to", default="none", help="none, tensorboard, wandb ... as transformers takes it (%(default)s)")
    add("--max_memory_gb", type=float, help="memory a run may need by estimate (default: what is free)")
    hub = "then upload the run folder, with the paths in run.json, to this hub repository; a new one is private"
    add("--push_to_hub", metavar="REPO", help=hub)
    add("--dry_run", action="store_true", help="print rows, tokens, steps, parameters and memory, then stop")
    return parser


def unused(flags: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the flags of all trainers that have no effect next to the others, for `distil.cli.refuse_unused`."""
    measures = ["eval_steps"] if flags["val_data"] == "none" else []
    return {"only without --max_steps": ["epochs"] if flags["max_steps"] else [], "only with --val_data": measures}


def train_options(
    flags: Mapping[str, Any], small: dict, large: dict, ref: ModelRef, data: TrainingData, kind: type[Options]
) -> Options:
    """Return the checked options of `training_parser` as `kind`: TrainOptions or the trainer's subclass. Flags that
    are None come from the recipe for the student's size, LoRA's from the adapter to continue from, the split from the
    note next to the data. Raises InputError with all problems at once."""
    from transformers.integrations import get_available_reporting_integrations

    values, problems = {field.name: flags[field.name] for field in fields(kind)}, []
    config = adapter_config(ref.adapter) if ref.adapter else None
    for flag, key in _LORA_KEYS.items() if config else ():
        given, own = values[flag], config.get(key)
        if isinstance(given, str) and isinstance(own, list):  # names of layers, in any order
            given = own if {*map(str.strip, given.split(","))} == {*own} else given
        if given not in (None, own):
            problems.append(f"--{flag} {given}: {ref.adapter} has {own}; leave it out")
        values[flag] = own
    recipe = small if parameter_count(ref.path) < SMALL_STUDENT else large
    if values["batch_size"] == "auto" and values["grad_accum"] is None:
        values["grad_accum"] = recipe["batch_size"] * recipe["grad_accum"]
    values |= {name: value for name, value in recipe.items() if values[name] is None}
    if flags["epochs"] is None and recipe is small and kind.REPEATS and data.rows:
        rows_a_step = values["grad_accum"] * (1 if values["batch_size"] == "auto" else values["batch_size"])
        values["epochs"] = max(values["epochs"], min(math.ceil(FEW_STEPS * rows_a_step / len(data.rows)), MOST_EPOCHS))
    if ref.adapter and Path(ref.adapter).resolve() == Path(values["save_dir"]).resolve():
        problem = f"--save_dir {values['save_dir']} is the --adapter to continue from"
        problems.append(f"{problem}; choose another --save_dir")
    values["split_seed"] = data.split_seed(values["split_seed"], ref.adapter)
    numbers = {name: values[name] for name in kind.LIMITS if values[name] not in (None, "auto")}
    wrong = [f"--{n} {value} ({kind.LIMITS[n][0]})" for n, value in numbers.items() if not kind.LIMITS[n][1](value)]
    if values["epochs"] == 0 and not values["max_steps"]:
        wrong.append("--epochs 0 without --max_steps")
    problems += [f"out of range: {', '.join(wrong)}"] if wrong else []
    trackers = ("none", *get_available_reporting_integrations())
    if values["report_to"] not in trackers:
        problems.append(f"--report_to {values['report_to']}: not installed here; possible are: {', '.join(trackers)}")
    if problems:
        raise InputError("; ".join(problems))
    values["eval_steps"] = values["save_steps"] if values["eval_steps"] is None else values["eval_steps"]
    return kind(**values)
