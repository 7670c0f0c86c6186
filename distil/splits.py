"""Split rows by customer, and record it: in notes next to prepared data, and in the folders of what was trained on it.

All scripts draw the same split from a hash, so nothing has to be passed around for them to agree.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import InputError
from distil.files import check_folder, file_sha256, hold, read_json, write_json, write_jsonl
from distil.models import EMBEDDED_MODEL, adapter_config, local_or_hub
from distil.processes import print_note
from distil.runs import run_record

_PARTS = {"validation": "validation", "val": "calibration"}  # of the split, by how a file of it is called
SPLIT = ("split_seed", "val_share", "group")  # of a note: what decides which rows are for evaluations
EXPORTED = "distil_slm"  # in an export's config.json, so that a copy without export.json keeps its provenance


def hash_share(name: str, seed: int) -> float:
    """Return a number from 0 to 1 that depends on name and seed alone and is spread evenly over many names."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def split_of(customer: str, split_seed: int = 0, validation_share: float = 0.3) -> str:
    """Return 'train', 'calibration' (10 %) or 'validation' (30 % by default), by a hash of customer and split seed."""
    share, fitting = hash_share(customer, split_seed), round(1 - validation_share, 6)
    return "train" if share < round(fitting - 0.1, 6) else "calibration" if share < fitting else "validation"


def part_of(group: str, split_seed: int, val_share: float, dev_share: float) -> str:
    """Return the file that a group's documents or tasks go into: 'validation', which is the same whatever `dev_share`
    is, 'val' or 'sft'."""
    share = hash_share(group, split_seed)
    return "validation" if share < val_share else "val" if share < val_share + dev_share else "sft"


def is_gold(customer: str, gold_share: float, split_seed: int) -> bool:
    """Return whether --gold_share lets a customer's labels be used; a larger share includes those of a smaller one."""
    return gold_share == 1 or hash_share(f"gold {customer}", split_seed) < gold_share


def preparation(data: str, sha256: str | None = None) -> dict[str, Any]:
    """Return the note of a prepare script next to a data file (split seed, source), empty for data of another origin.
    It has "changed" where the note is of other content of that file. Raises InputError for a damaged note."""
    changed = {}
    for path in sorted(Path(data).parent.glob("*_prepared.json")):
        note = read_json(path)
        if not isinstance(note, dict) or not isinstance(note.get("files", {}), dict):
            raise InputError(f"{path}: not a note of prepared data (an object with files); prepare it again")
        files, sha256 = note.get("files", {}), sha256 or file_sha256(data)
        if sha256 in files.values():  # under this name or, renamed since, another
            name = next(Path(name).stem for name, digest in files.items() if digest == sha256)
            part = _PARTS.get(name.rpartition("_")[2])
            return note | {"part": part} if part else note
        if Path(data).name in files:
            changed = {"changed": str(path)}  # by another script, which left another note, or by hand
    return changed


def unchanged_preparation(data: str, sha256: str) -> dict[str, Any]:
    """Return `preparation` for a script that makes other data of the file. Raises InputError for a changed file:
    without a note the new data would pass for data of another origin, with unknown customers."""
    note = preparation(data, sha256)
    if "changed" in note:
        fix = "prepare it again, or move the changed file to a separate folder"
        raise InputError(f"{data}: changed since {note['changed']} was written; {fix}")
    check_no_validation(data, note)
    return note


@dataclass(frozen=True)
class Provenance:
    """What data or a model comes from. split_seed: of the training rows, None where unknown; sources: the raw files
    {"file", "sha256"}, None for an unknown one, empty where nothing was trained; gold_share: the largest share of
    customers whose labels were used, None where unknown."""

    name: str
    split_seed: int | None = None
    sources: tuple[dict[str, Any] | None, ...] = ()
    gold_share: float | None = 0.0

    @property
    def record(self) -> dict[str, Any]:
        """Return the fields as run.json, export.json and notes have them."""
        return {"split_seed": self.split_seed, "sources": list(self.sources), "gold_share": self.gold_share}


def recorded(name: str, record: dict[str, Any]) -> Provenance:
    """Return the provenance in a record: run.json, export.json or a note of prepared data; of an empty one, unknown.
    name: for messages. Raises InputError for a damaged record."""
    record = record if isinstance(record, dict) else {"sources": record}
    split_seed, gold_share = record.get("split_seed"), record.get("gold_share")
    sources = record.get("sources") or [record.get("source")]
    sources = [*sources, None] if split_seed is None and isinstance(sources, list) else sources
    right = isinstance(sources, list) and all(s is None or (isinstance(s, dict) and "file" in s) for s in sources)
    if not right or type(split_seed) not in (int, type(None)) or type(gold_share) not in (int, float, type(None)):
        raise InputError(f"{name}: its record of split_seed, sources and gold_share is damaged; make it again")
    return Provenance(name, split_seed, _each_once(sources), gold_share)


def joined(*parts: Provenance) -> Provenance:
    """Return the provenance of what all parts went into, with the first one's name.
    Raises InputError where two have different splits: rows of one are validation rows of the other."""
    first, *others = [part for part in parts if part.split_seed is not None] or [parts[0]]
    for part in others:
        if part.split_seed != first.split_seed:
            seeds = f"{part.name} was trained with --split_seed {part.split_seed}, {first.name} has {first.split_seed}"
            raise InputError(f"{seeds}: its rows are validation rows of the other; use the same split for both")
    shares = [part.gold_share for part in parts]
    sources = _each_once([source for part in parts for source in part.sources])
    return Provenance(parts[0].name, first.split_seed, sources, None if None in shares else max(shares))


def _each_once(sources: list) -> tuple[dict[str, Any] | None, ...]:
    return tuple(source for i, source in enumerate(sources) if source not in sources[:i])


def provenance(name: str) -> Provenance:
    """Return what a model was trained on, with the base below an adapter and all that an export was merged from.
    A base of other origin has no sources. Raises InputError where parts have different splits, or are damaged."""
    config = adapter_config(name)
    base = config["base_model_name_or_path"] if config else name
    record, export, plain = None, Path(base, "export.json"), Path(base, "config.json")
    if export.is_file():
        record = read_json(export)
    elif plain.is_file():
        record = dict(read_json(plain)).get(EXPORTED)
    elif base != EMBEDDED_MODEL:
        from transformers import AutoConfig

        record = getattr(AutoConfig.from_pretrained(local_or_hub(base)), EXPORTED, None)
    origin = Provenance(base) if record is None else recorded(base, record)
    return joined(recorded(name, run_record(name)), origin) if config else origin


def check_split(models: Iterable[str], data: str, sha256: str) -> None:
    """Raise InputError where a model was trained on another split of the raw file that validation rows come from: they
    may be among its training rows. data: their file, with the note of its preparation; sha256: its hash."""
    note = preparation(data, sha256)
    source = next(iter(recorded(data, note).sources), None)
    for origin in map(provenance, models) if source else ():
        same = source.get("sha256") in [source.get("sha256") for source in origin.sources if source]
        if same and origin.split_seed not in (None, note.get("split_seed")):
            seeds = f"trained with --split_seed {origin.split_seed}, {data} was prepared with {note.get('split_seed')}"
            raise InputError(f"{origin.name}: {seeds}: its rows may have been trained on; use one split for both")
        note_sources(origin, source.get("sha256"))


def note_sources(origin: Provenance, sha256: str | None) -> None:
    """Print a note where a model was trained on other raw files than the one with this hash, or on unknown ones."""
    others = [source["file"] for source in origin.sources if source and source.get("sha256") != sha256]
    places = [f"on rows of {', '.join(others)}, not of --data"] if others else []
    places += ["on rows whose source is not recorded"] if None in origin.sources else []
    if places:
        print_note(f"{origin.name} was trained {', and '.join(places)}; they may be among the validation rows")


def check_no_validation(data: str, note: dict[str, Any], calibration: bool = False) -> None:
    """Raise InputError for the validation part of prepared data: what is trained on it cannot be evaluated on it.
    calibration: allow the calibration part, which measures trainings and fits calibrations; no training has it."""
    part = note.get("part") or ("validation" if not note and Path(data).stem.endswith("_validation") else None)
    if part == "validation" or (part and not calibration):
        right = "the calibration part, *_val.jsonl" if calibration else "the training part"
        raise InputError(f"{data}: is the {part} part of prepared data; take {right}")


def same_split(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two notes of prepared data are of one split of a raw file, so that parts of them do not meet, and
    `one` has no labels that --gold_share keeps from `other`; also where neither has a note."""
    if not one and not other:
        return True
    gold = [1.0 if note.get("gold_share") is None else note["gold_share"] for note in (one, other)]
    same = all(one.get(key) == other.get(key) for key in (*SPLIT, "task", "documents", "dev_share"))
    return same and _same_raw_file(one, other) and gold[0] <= gold[1]


def check_one_split(file: str, one: Mapping[str, Any], data: str, other: Mapping[str, Any]) -> None:
    """Raise InputError where the notes of two files are of different splits of one raw file: rows of the first may be
    evaluation rows of the second's split."""
    differ = any(one[key] != other[key] for key in SPLIT if key in one and key in other)
    if differ and _same_raw_file(one, other):
        raise InputError(f"{file}: is of another split than {data}: rows for evaluations may be in it; use one split")


def _same_raw_file(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    raw = [{(source or {}).get("sha256") for source in recorded("", note).sources} for note in (one, other)]
    return bool(raw[0] & raw[1] - {None})


def _other_files(note: Path, names: Iterable[str]) -> list[str]:
    """Return the files that a note is of besides these names, which a new note in its place would forget."""
    before = read_json(note) if note.is_file() else {}
    return sorted(set(before.get("files", {})) - set(names)) if isinstance(before, dict) else []


def check_note(output: str) -> None:
    """Raise InputError where the note next to an output would replace a note of other files."""
    path = Path(output).with_name(f"{Path(output).stem}_prepared.json")
    if others := _other_files(path, [Path(output).name]):
        taken = f"its note {path.name} would replace that of {', '.join(others)}"
        raise InputError(f"{output}: {taken}; take another name")


def note_preparation(output: str, note: dict[str, Any], origin: Provenance, **more: Any) -> None:
    """Write the note of a data file that was made from another: that one's note, with the provenance of all that went
    into the new file. Without a note of the first and a known origin there is none."""
    path = Path(output)
    if note or origin.split_seed is not None or any(origin.sources):
        note = note | origin.record | {"files": {path.name: file_sha256(path)}, **more}
        write_json(path.with_name(f"{path.stem}_prepared.json"), note)


def write_parts(outdir: str, task: str, parts: dict[str, list[dict]], src: str, note: dict[str, Any]) -> None:
    """Write `task`_<part>.jsonl of each part, then next to them `note` (split_seed ...) with the source's hash.
    Trainers read the split from the note. Raises InputError, before anything is written, for an empty part."""
    check_folder(outdir)
    for part, rows in parts.items():
        if not rows:
            raise InputError(f"nothing falls into the {part} part; change --val_share or --split_seed")
    note_path, files = Path(outdir) / f"{task}_prepared.json", {}
    paths = {part: Path(outdir) / f"{task}_{part}.jsonl" for part in parts}
    for path in (note_path, *paths.values()):
        if path.is_dir():
            raise InputError(f"{path}: a folder is in the way; move it, or choose another --outdir")
    if others := _other_files(note_path, [path.name for path in paths.values()]):
        raise InputError(f"{note_path}: is the note of {', '.join(others)} too; choose another --outdir")
    with contextlib.ExitStack() as held:
        for path in (note_path, *paths.values()):
            held.enter_context(hold(path))
        note_path.unlink(missing_ok=True)  # an old note must not describe new files
        for part, path in paths.items():
            write_jsonl(path, parts[part])
            files[path.name] = file_sha256(path)
            print(f"wrote {len(parts[part])} rows to {path}")
        write_json(note_path, note | {"source": {"file": src, "sha256": file_sha256(src)}, "files": files})
