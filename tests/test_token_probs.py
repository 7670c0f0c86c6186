"""Token probabilities on disk: what is written is read, and what does not fit the student is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import InputError
from distil.token_probs import DTYPES, TokenProbs, TokenRow, unpacked, write_token_probs


def random_rows(counts: list[int], k: int, seed: int = 0) -> list[TokenRow]:
    """Return rows of random probabilities over 1,000 tokens, the K most probable of each."""
    rng = np.random.default_rng(seed)
    rows = []
    for tokens in counts:
        probabilities = rng.dirichlet(np.full(1000, 0.05), tokens)
        ids = np.argsort(-probabilities)[:, :k]
        kept = np.take_along_axis(probabilities, ids, axis=1)
        with np.errstate(divide="ignore"):
            arrays = np.log(kept).astype("f2"), np.log(1 - kept.sum(axis=1)).astype("f2")
        rows.append(TokenRow(rng.integers(0, 1000, tokens).astype("i4"), ids.astype("i4"), *arrays))
    return rows


def written(folder: Path, counts: list[int], k: int = 32, seed: int = 0) -> tuple[list[TokenRow], Path]:
    rows = random_rows(counts, k, seed)
    return rows, folder / write_token_probs(folder / "kd.jsonl", iter(rows), counts, k)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows, path = written(tmp_path, [5, 1, 300])
    reader = TokenProbs(tmp_path)
    for number in (2, 0, 1):
        row = reader.row({"file": path.name, "row": number}, rows[number].answer_ids.tolist())
        for name, array in row._asdict().items():
            assert np.array_equal(array, getattr(rows[number], name)), name
        assert np.allclose(np.exp(row.log_probs.astype("f8")).sum(axis=1) + np.exp(row.rest), 1, atol=2e-3)
    assert load_file(path)["log_probs"].shape == (306, 32)  # by the library alone
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_token_takes_at_most_200_bytes(tmp_path):
    _, path = written(tmp_path, [200] * 20)
    assert path.stat().st_size <= 200 * 4000


def test_another_content_has_another_name(tmp_path):
    paths = [written(tmp_path, [3, 4], seed=seed)[1] for seed in (0, 1, 0)]
    assert paths[0] == paths[2] != paths[1]
    assert paths[1].is_file()


def test_packed_rows_are_json(tmp_path):
    (row,) = random_rows([7], 3)
    again = unpacked(json.loads(json.dumps(row.packed())))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(row, again, strict=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another_version(path: Path) -> None:
    save_file(load_file(path), path, {"format": "2"})


def without_rest(path: Path) -> None:
    tensors = load_file(path)
    del tensors["rest"]
    save_file(tensors, path, {"format": "1"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (without_rest, "damaged"),
        (another_version, "not of this version"),
        (lambda path: save_file({"weight": np.zeros(3)}, path, {"format": "pt"}), "not of this version"),
        (Path.unlink, "no such file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    rows, path = written(tmp_path, [3, 4])
    damage(path)
    with pytest.raises(InputError, match=message):
        TokenProbs(tmp_path).row({"file": path.name, "row": 0}, rows[0].answer_ids.tolist())


@pytest.mark.parametrize("reference", [None, 3, {}, {"file": "kd.safetensors"}, {"file": "../a", "row": 0}])
def test_a_reference_that_is_none_is_refused(tmp_path, reference):
    with pytest.raises(InputError, match="is needed"):
        TokenProbs(tmp_path).row(reference, [1])


def test_rows_that_are_not_there_and_other_tokens_are_refused(tmp_path):
    rows, path = written(tmp_path, [3, 4])
    ids = rows[0].answer_ids.tolist()
    for number in (-1, 2):
        with pytest.raises(InputError, match=f"has no row {number}"):
            TokenProbs(tmp_path).row({"file": path.name, "row": number}, ids)
    for other in (ids[:-1], [*ids[:-1], ids[-1] + 1]):
        with pytest.raises(InputError, match="another tokenizer, or the answer was changed"):
            TokenProbs(tmp_path).row({"file": path.name, "row": 0}, other)


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    if not (child := os.fork()):
        killed = (os.kill(os.getpid(), signal.SIGKILL) if i else row for i, row in enumerate(random_rows([3, 4], 32)))
        write_token_probs(tmp_path / "kd.jsonl", killed, [3, 4], 32)
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir())
    _, path = written(tmp_path, [3, 4])
    assert list(tmp_path.iterdir()) == [path]


def test_a_type_of_each_tensor(tmp_path):
    _, path = written(tmp_path, [3])
    assert {name: array.dtype.str for name, array in load_file(path).items()} == DTYPES
