"""Split rows by customer, and keep notes of the split next to prepared data, for trainers and evaluation.

All scripts draw the same split from a hash, so nothing has to be passed around for them to agree.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from common import InputError
from distil.files import check_folder, file_sha256, read_json, write_json, write_jsonl


def hash_share(name: str, seed: int) -> float:
    """Return a number from 0 to 1 that depends on name and seed alone and is spread evenly over many names."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def split_of(customer: str, split_seed: int = 0) -> str:
    """Return 'train' (60 %), 'calibration' (10 %) or 'validation' (30 %), by a hash of customer and split seed."""
    share = hash_share(customer, split_seed)
    return "train" if share < 0.6 else "calibration" if share < 0.7 else "validation"


def is_gold(customer: str, gold_share: float, split_seed: int) -> bool:
    """Return whether --gold_share lets a customer's labels be used: the same customers in every script, and a larger
    share includes those of a smaller one."""
    return gold_share == 1 or hash_share(f"gold {customer}", split_seed) < gold_share


def preparation(data: str, sha256: str | None = None) -> dict[str, Any]:
    """Return the note of a prepare script next to a data file (split seed, source), empty for data of another origin.
    It has "changed" where the note is of other content of that file. sha256: the file's, computed here by
    default. Raises InputError for a damaged note."""
    changed = {}
    for path in sorted(Path(data).parent.glob("*_prepared.json")):
        note = read_json(path)
        if not isinstance(note, dict) or not isinstance(note.get("files", {}), dict):
            raise InputError(f"{path}: not a note of prepared data (an object with files); prepare it again")
        if noted := note.get("files", {}).get(Path(data).name):
            if noted == (sha256 := sha256 or file_sha256(data)):
                return note
            changed = {"changed": str(path)}  # by another script, which left another note, or by hand
    return changed


def unchanged_preparation(data: str, sha256: str) -> dict[str, Any]:
    """Return `preparation` for a script that makes other data of the file. Raises InputError for a changed file:
    without a note the new data would pass for data of another origin, with unknown customers."""
    note = preparation(data, sha256)
    if "changed" in note:
        fix = "prepare it again, or move the changed file to a separate folder"
        raise InputError(f"{data}: changed since {note['changed']} was written; {fix}")
    return note


def note_preparation(output: str, note: dict[str, Any], **more: Any) -> None:
    """Write the note of a data file that was made from another, from that one's note, if its split is known."""
    path = Path(output)
    if "split_seed" in note:
        note = note | {"files": {path.name: file_sha256(path)}, **more}
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
    note_path.unlink(missing_ok=True)  # an old note must not describe new files
    for part, path in paths.items():
        write_jsonl(path, parts[part])
        files[path.name] = file_sha256(path)
        print(f"wrote {len(parts[part])} rows to {path}")
    write_json(note_path, note | {"source": {"file": src, "sha256": file_sha256(src)}, "files": files})
