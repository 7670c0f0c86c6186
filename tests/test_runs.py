"""Run folders: claiming, settings of a resumed run, checkpoints."""

from __future__ import annotations

import pytest

from common import InputError
from distil import runs


def test_checkpoints_sort_by_number(tmp_path):
    for step in (900, 1000, 1100):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in (
            "trainer_state.json",
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        ):
            if step < 1100 or name != "optimizer.pt":
                (folder / name).write_text("{}")
    assert runs.last_checkpoint(str(tmp_path)).endswith("checkpoint-1000")
    assert runs.last_checkpoint(str(tmp_path / "none")) is None


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="has files that are not a trainer's run"):
        runs.claim_run_dir(tmp_path, overwrite=True, resume=False)
    runs.claim_run_dir(tmp_path / "new", overwrite=False, resume=False)


def test_settings_of_a_resumed_run_are_compared(tmp_path):
    runs.check_settings(tmp_path, {"seed": 1})  # none are stored
    runs.write_settings(tmp_path, {"seed": 1, "epochs": 2})
    runs.check_settings(tmp_path, {"seed": 1, "epochs": 2})
    with pytest.raises(InputError, match=r"seed \(was 1, now 3\)"):
        runs.check_settings(tmp_path, {"seed": 3, "epochs": 2})


@pytest.mark.parametrize("text", ["[]", '{"sources": 1}', '{"sources": [1]}'])
def test_a_damaged_record_is_refused(text, tmp_path):
    assert runs.run_record(None) == runs.run_record(tmp_path) == {}
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match="not a record of a run"):
        runs.run_record(tmp_path)
