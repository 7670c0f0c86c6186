"""A teacher's probabilities for each token of its answers, in a file next to the JSONL whose rows refer to it.

A row has "token_probs": {"file": name of a safetensors file in the JSONL's folder, "row": number in it}; rows may be
shuffled, left out or joined with others. The file has, for tokens of `PromptEncoder.completion`, row after row,

    starts      int64 [rows + 1]     row i has the tokens from starts[i] to starts[i + 1]
    answer_ids  int32 [tokens]       the answer
    ids         int32 [tokens, K]    the K most probable tokens in its place, sorted
    log_probs   float16 [tokens, K]  their log-probabilities
    rest        float16 [tokens]     log of the probability of all others together, -inf for none

A teacher that gave fewer than K has id -1 and log-probability -inf in the last places. At K = 32 a token takes 198
bytes, a row 8 more. The file's name has a hash of its content: a JSONL refers to one file, and its own hash says what
is in that.
"""

from __future__ import annotations

import shutil
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import InputError
from distil.files import file_sha256

if TYPE_CHECKING:
    import numpy as np

FORMAT = "1"
DTYPES = {"starts": "<i8", "answer_ids": "<i4", "ids": "<i4", "log_probs": "<f2", "rest": "<f2"}


class TokenRow(NamedTuple):
    """An answer's token probabilities. answer_ids, rest: [tokens]; ids, log_probs: [tokens, K]."""

    answer_ids: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    rest: np.ndarray

    def packed(self) -> dict[str, Any]:
        """Return the row as values that JSON can have, with its numbers of "tokens" and "k"."""
        from safetensors.numpy import save

        tokens, k = self.ids.shape
        return {"tokens": tokens, "k": k, "arrays": b64encode(save(self._asdict())).decode()}


def unpacked(packed: dict[str, Any]) -> TokenRow:
    """Return the row that `TokenRow.packed` packed."""
    from safetensors.numpy import load

    return TokenRow(**load(b64decode(packed["arrays"])))


def write_token_probs(output: Path, rows: Iterable[TokenRow], counts: Sequence[int], k: int) -> str:
    """Write rows of `counts` tokens and K = k, one at a time in memory, to a file next to `output`, a JSONL; return
    its name. The file is complete before it has its name. The caller holds the output."""
    import numpy as np
    from safetensors.numpy import save_file

    starts = [0, *accumulate(counts)]
    shapes = {"starts": (len(starts),), "ids": (starts[-1], k), "log_probs": (starts[-1], k)}
    scratch = output.with_name(f".{output.name}.arrays")  # one name: the next run removes what a killed one left
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        tensors = {}
        for name, dtype in DTYPES.items():
            tensors[name] = np.memmap(scratch / name, dtype, "w+", shape=shapes.get(name, (starts[-1],)))
        tensors["starts"][:] = starts
        for start, row in zip(starts, rows, strict=False):
            for name, array in row._asdict().items():
                tensors[name][start : start + len(array)] = array
        save_file(tensors, whole := scratch / "whole", {"format": FORMAT})
        shutil.copymode(scratch / "ids", whole)  # safetensors lets nobody else read it
        name = f"{output.stem}.{file_sha256(whole)[:12]}.safetensors"
        whole.replace(output.with_name(name))
    finally:
        shutil.rmtree(scratch)
    return name


class TokenProbs:
    """Reads the files that the rows of a JSONL in `folder` refer to; what is read is memory-mapped."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}  # starts, the other tensors on disk

    def row(self, reference: Any, completion_ids: Sequence[int]) -> TokenRow:
        """Return the arrays of a row's "token_probs", whose answer has these ids for the student; rest in float32.
        Raises InputError where the file is missing or damaged, and where the answer has other tokens in it."""
        name, number = (reference.get(key) for key in ("file", "row")) if isinstance(reference, dict) else (None, None)
        if not isinstance(name, str) or Path(name).name != name or type(number) is not int:
            raise InputError(f'"token_probs" {str(reference)[:80]}: {{"file": name, "row": number}} is needed')
        path = self.folder / name
        starts, tensors = self._files[name] = self._files.get(name) or self._open(path)
        if not 0 <= number < len(starts) - 1:
            raise InputError(f"{path}: has no row {number}; prepare it again")
        first, last = int(starts[number]), int(starts[number + 1])
        row = TokenRow(*(tensors[field][first:last] for field in TokenRow._fields))
        if row.answer_ids.tolist() != list(completion_ids):
            why = "the teacher has another tokenizer, or the answer was changed"
            raise InputError(f"{path}: row {number} has other tokens than the student's answer: {why}")
        return row._replace(rest=row.rest.astype("f4"))

    def _open(self, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise InputError(f"{path}: no such file; copy it with the JSONL, or run kd_prepare.py --top_k again")
        try:
            file = safe_open(path, framework="numpy")
            if (file.metadata() or {}).get("format") != FORMAT:
                raise InputError(f"{path}: not of this version's token probabilities; run kd_prepare.py --top_k again")
            if file_sha256(path)[:12] != path.stem.rpartition(".")[2]:
                raise OSError("its content is not that which its name has the hash of")
            return file.get_tensor("starts"), {name: file.get_slice(name) for name in DTYPES}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged ({error}); copy it, or run kd_prepare.py --top_k, again") from None
