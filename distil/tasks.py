"""What a label task is, as a JSON file: instruction, labels, columns, split.

data/creditmix_task.json is the default. The note of prepared data and the folder of each adapter carry a copy, so that
whoever uses an adapter asks it as it was trained.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common import TEMPLATE_DATE, InputError
from distil.features import Field, RowFormat
from distil.files import read_json
from distil.models import ModelRef
from distil.processes import print_note
from distil.splits import preparation, split_of
from distil.tables import name_key

DEFAULT_TASK = Path(__file__).parent.parent / "data" / "creditmix_task.json"
TASK_FILE = "task.json"  # in the folder of an adapter or export
KEYS = ("name", "instruction", "labels", "label_column", "label_map", "missing", "fields")  # of a file, in order
KEYS += ("text_column", "group_column", "balanced", "validation_share", "label_tokens")
# What `PromptEncoder` sets in chat templates, in the file of an adapter or export besides its task.
PROMPTS = {"template_date": TEMPLATE_DATE.isoformat(), "thinking": False}
KINDS = ("number", "word", "text")
LABEL_TOKENS = ("all", "distinct")
MOST_LABELS = 100


@dataclass(frozen=True, kw_only=True)
class Task(RowFormat):
    """A label task; the attributes are the keys of its file, with those of `RowFormat`.

    label_map: {label in raw data: label}; group_column: rows of one value stay in one part of the split (None: each
    row by its own text); balanced: train and evaluate on equally many rows of each label; label_tokens: a label's
    score is the mean over 'all' its tokens (whitepaper, 4.3) or the sum over those that make it 'distinct'."""

    name: str
    labels: tuple[str, ...]
    label_column: str
    label_map: Mapping[str, str] = field(default_factory=dict)
    group_column: str | None = None
    balanced: bool = False
    validation_share: float = 0.2
    label_tokens: str = "distinct"

    @property
    def record(self) -> dict[str, Any]:
        """Return the task as its file has it, complete: `task_of` of it is equal to the task."""
        listed = []
        for one in self.fields:
            own = {"name": one.name, "column": one.column, "kind": one.kind}
            if one.kind == "number":
                own |= {"range": list(one.range)} if math.isfinite(one.range[0]) else {}
                own["digits"] = one.digits
            listed.append(own | {"protected": one.protected})
        own = {"labels": list(self.labels), "missing": list(self.missing), "fields": listed}
        return {key: getattr(self, key) for key in KEYS} | {"label_map": dict(self.label_map)} | own

    @property
    def columns(self) -> dict[str, str]:
        """Return {column: kind} of a table of labelled rows: those of a prompt, the label's and the group's."""
        return (
            self.feature_columns
            | {self.label_column: "text"}
            | ({self.group_column: "id"} if self.group_column else {})
        )

    @property
    def split(self) -> list:
        """Return what decides the part of the split that a row is in, besides the split seed."""
        return [self.group_column, self.validation_share]

    def part_of(self, group: str, split_seed: int = 0) -> str:
        """Return the part of the split that rows of this group are in, as `split_of`."""
        return split_of(group, split_seed, self.validation_share)

    def differences(self, other: Task) -> str:
        """Return the names of the keys in which two tasks differ."""
        return ", ".join(
            field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)
        )


def read_task(path: str | Path) -> Task:
    """Return the task of a JSON file. Raises InputError that says what is wrong in it."""
    return task_of(read_json(path), str(path))


@functools.cache
def default_task() -> Task:
    """Return the task of data/creditmix_task.json."""
    return read_task(DEFAULT_TASK)


def is_text(value: Any) -> bool:
    """Return whether a value is a text that is not empty, without blanks around it."""
    return isinstance(value, str) and bool(value) and value == value.strip()


def task_of(record: Any, place: str) -> Task:
    """Return the task of a file's content, checked. place: where it is, for messages. Raises InputError."""

    def need(right: Any, what: str) -> None:
        if not right:
            raise InputError(f"{place}: {what}")

    need(isinstance(record, dict), "not a task: a JSON object is needed")
    for name, value in PROMPTS.items():
        differs = f'"{name}" is {json.dumps(record.get(name))} there and {json.dumps(value)} in this version'
        need(record.get(name, value) == value, f"{differs}, so its prompts would differ; train it again")
    record = {name: value for name, value in record.items() if name not in PROMPTS}
    known = [field.name for field in fields(Task)]
    need(not (odd := sorted(set(record) - set(known))), f"unknown key {', '.join(odd)}; a task has {', '.join(known)}")
    needed = [name for name in ("name", "instruction", "labels", "label_column") if name not in record]
    need(not needed, f"{', '.join(needed)} missing; creditmix_prepare.py --init_task drafts a task from a table")
    record = {"label_map": {}, "missing": [], "fields": []} | record
    need(is_text(record["name"]) and re.fullmatch(r"[a-z0-9_]{1,40}", record["name"]), "name: a-z, 0-9 and _ alone")
    need(is_text(record["instruction"]), '"instruction" is a text')
    labels, own_map = record["labels"], record["label_map"]
    right = isinstance(labels, list) and all(is_text(x) and len(x) <= 80 and x.isprintable() for x in labels)
    need(right and 2 <= len(labels) <= MOST_LABELS, f'"labels": 2 to {MOST_LABELS} texts of at most 80 letters')
    need(len({x.casefold() for x in labels}) == len(labels), '"labels": each once, also in another case')
    need(isinstance(own_map, dict) and all(x in labels for x in own_map.values()), '"label_map": {text: label}')
    clash = [x for x in own_map if any(x.casefold() == y.casefold() and own_map[x] != y for y in labels)]
    need(not clash, f'"label_map": {clash[:1]} is itself a label')
    twice = [x for x in own_map for y in own_map if x.casefold() == y.casefold() and own_map[x] != own_map[y]]
    need(not twice, f'"label_map": {twice[:2]} differ in case alone, but not in their label')
    missing = record["missing"]
    need(isinstance(missing, list) and all(isinstance(x, str) for x in missing), '"missing": a list of texts')
    listed = record["fields"]
    need(isinstance(listed, list), '"fields": a list of objects')
    text_column = record.get("text_column")
    need(bool(listed) != bool(text_column), 'either "fields" or one "text_column" is needed')
    columns = [record["label_column"], *[x for x in (text_column, record.get("group_column")) if x is not None]]
    need(all(map(is_text, columns)), '"label_column", "text_column", "group_column": names of columns')
    parsed = tuple(_field(one, f"{place}: field {number}", missing) for number, one in enumerate(listed, 1))
    for what, names in (("name", [f.name for f in parsed]), ("column", [*columns, *(f.column for f in parsed)])):
        twice = [name for name, count in Counter(map(name_key, names)).items() if count > 1]
        need(not twice, f"the {what} {', '.join(twice)} is used twice; rename one")
    share = record.get("validation_share", 0.2)
    need(type(share) in (int, float) and 0.05 <= share <= 0.5, '"validation_share": 0.05 to 0.5')
    need(type(record.get("balanced", False)) is bool, '"balanced": true or false')
    need(record.get("label_tokens", "distinct") in LABEL_TOKENS, f'"label_tokens": {" or ".join(LABEL_TOKENS)}')
    return Task(**record | {"labels": tuple(labels), "missing": tuple(missing), "fields": parsed})


def _field(record: Any, place: str, missing: Sequence[str]) -> Field:
    """Return a field of a task, checked. Raises InputError."""
    known = [field.name for field in fields(Field)]
    if not isinstance(record, dict) or not set(record) <= set(known) or not isinstance(record.get("name"), str):
        raise InputError(f"{place}: an object with {', '.join(known)} is needed, found {json.dumps(record)[:80]}")
    record = {"column": record["name"]} | record
    name, column, kind, ends = (record.get(key) for key in ("name", "column", "kind", "range"))
    if not re.fullmatch(r"[^:;,\n\s]([^:;,\n]{0,58}[^:;,\n\s])?", name) or not is_text(column):
        raise InputError(f"{place}: a name of at most 60 letters without , : and ; is needed, and a column")
    if record.get("kind", "word") not in KINDS:
        raise InputError(f"{place} ({name}): kind {kind!r}; it is {', '.join(KINDS)}")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    if ends is not None and not (numbers and ends[0] < ends[1]):
        raise InputError(f"{place} ({name}): range is [lowest, highest] of plausible numbers")
    if type(record.get("digits", 3)) is not int or not 1 <= record.get("digits", 3) <= 12:
        raise InputError(f"{place} ({name}): digits is a whole number from 1 to 12")
    if type(record.get("protected", False)) is not bool:
        raise InputError(f"{place} ({name}): protected is true or false")
    if record.get("kind") != "number":  # the kind was changed in a draft, whose other keys mean nothing then
        return Field(**{key: value for key, value in record.items() if key not in ("range", "digits")})
    return Field(**record | ({"range": tuple(ends)} if ends is not None else {}))


def _task_file(ref: ModelRef, documents: bool) -> tuple[dict, str] | None:
    """Return (content, path) of the task file in a model's folder, of the adapter, or else of its base; None where it
    has none for labels, or `documents`."""
    paths = (Path(folder) / TASK_FILE for folder in (ref.adapter, ref.path) if folder)
    content, path = next(((read_json(path), str(path)) for path in paths if path.is_file()), (None, ""))
    return (content, path) if path and (isinstance(content, dict) and "show_schema" in content) == documents else None


def model_task(ref: ModelRef) -> Task | None:
    """Return the label task that a model carries; None without one."""
    return task_of(*file) if (file := _task_file(ref, documents=False)) else None


def document_record(ref: ModelRef) -> dict[str, Any] | None:
    """Return the content of the task file of a model for documents; None without one."""
    return file[0] if (file := _task_file(ref, documents=True)) else None


def data_task(path: str, flag: str | None) -> Task | None:
    """Return the task of prepared data, which its note carries, else that of --task, else None.
    Raises InputError where they differ."""
    noted, given = preparation(path).get("task"), read_task(flag) if flag else None
    task = task_of(noted, f"the note of {path}") if noted else given
    if given and task != given:
        differ = f"was prepared for another task than --task {flag} (they differ in {given.differences(task)})"
        raise InputError(f"{path}: {differ}; leave --task out")
    return task


def shared_task(refs: Sequence[ModelRef], task: Task | None, source: str) -> Task | None:
    """Return the task of models that are used together, which they carry, or else `task`, which `source` has.
    Prints a note where an adapter carries none: only those of the default task may be older than task files. Raises
    InputError where two of these differ."""
    for ref in refs:
        carried = model_task(ref)
        if carried and task and carried != task:
            differ = f"was trained for another task than {source} has (they differ in {carried.differences(task)})"
            raise InputError(f"{ref.name}: {differ}; use models of one task together, and no other --task")
        if ref.adapter and not carried and task not in (None, default_task()):
            print_note(f"{ref.name}: has no {TASK_FILE}: nothing shows that it was trained for the task of {source}")
        task, source = (carried, ref.name) if carried and not task else (task, source)
    return task


def chosen_task(refs: Sequence[ModelRef], flag: str | None) -> Task:
    """Return `shared_task` of the models and --task, or else the default. Raises InputError."""
    return shared_task(refs, read_task(flag) if flag else None, f"--task {flag}") or default_task()
