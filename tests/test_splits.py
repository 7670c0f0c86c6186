"""The split by customer: shares, what it depends on, and who was trained under which."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import HOLD, other_process

import eval_codegen
import eval_idp
from common import InputError
from distil import splits
from distil.files import file_sha256
from distil.splits import provenance, split_of
from distil.testing import save_adapter
from distil.training.data import read_data


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_shares_of_the_split(seed):
    counts = Counter(split_of(f"CUS_{number}", seed) for number in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.6, abs=0.015)
    assert counts["calibration"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.3, abs=0.015)


def test_the_split_depends_on_customer_and_split_seed_alone():
    names = [f"CUS_{number}" for number in range(500)]
    first = [split_of(name, 0) for name in names]
    assert first == [split_of(name) for name in names]
    assert sum(a != b for a, b in zip(first, (split_of(name, 1) for name in names), strict=True)) > 100


RAW = {"file": "raw.csv", "sha256": "abc"}
OTHER = {"file": "other.csv", "sha256": "def"}


@pytest.fixture
def chain(tmp_path, model_dir):
    """Write an adapter on an export, each with a record as scripts write it; return (adapter, export)."""

    def write(of_adapter: dict, of_export: dict | None) -> tuple[str, str]:
        export = shutil.copytree(model_dir, tmp_path / "export", dirs_exist_ok=True)
        (export / "export.json").unlink(missing_ok=True)
        if of_export is not None:
            (export / "export.json").write_text(json.dumps(of_export))
        adapter = save_adapter(tmp_path / "adapter", str(export))
        (Path(adapter) / "run.json").write_text(json.dumps(of_adapter))
        return adapter, str(export)

    return write


def test_an_adapter_has_the_provenance_of_its_base(chain):
    record = {"split_seed": 7, "sources": [RAW], "gold_share": 0.2}
    adapter, export = chain(record, record | {"sources": [OTHER, RAW], "gold_share": 0.5})
    found = provenance(adapter)
    assert found.record == {"split_seed": 7, "sources": [RAW, OTHER], "gold_share": 0.5}
    assert provenance(export).record == {"split_seed": 7, "sources": [OTHER, RAW], "gold_share": 0.5}


def test_a_base_model_was_trained_on_nothing_of_ours(chain, model_dir):
    for name in (model_dir, "smollm2-135m"):
        assert provenance(name) == splits.Provenance(name, None, (), 0.0)
    adapter, _ = chain({"split_seed": 7, "sources": [RAW], "gold_share": 0.2}, None)
    assert provenance(adapter).record == {"split_seed": 7, "sources": [RAW], "gold_share": 0.2}


@pytest.mark.parametrize("record", [{}, {"adapter": "runs/a", "fingerprint": "1"}, {"sources": [None]}])
def test_what_is_not_recorded_is_unknown(chain, record):
    """An export without these fields, an adapter without run.json: trained on unknown rows."""
    adapter, export = chain({"split_seed": 7, "sources": [RAW], "gold_share": 0.2}, record)
    assert provenance(export).record == {"split_seed": None, "sources": [None], "gold_share": None}
    assert provenance(adapter).record == {"split_seed": 7, "sources": [RAW, None], "gold_share": None}
    adapter, _ = chain(record, {"split_seed": 7, "sources": [RAW], "gold_share": 0.2})
    assert provenance(adapter).record == {"split_seed": 7, "sources": [None, RAW], "gold_share": None}


def test_a_model_on_the_hub_has_the_provenance_in_its_configuration(chain, monkeypatch):
    from transformers import AutoConfig

    record = {"split_seed": 7, "sources": [RAW], "gold_share": 0.2}
    adapter, export = chain({"split_seed": 7, "sources": [OTHER], "gold_share": 0.1}, None)
    config = AutoConfig.from_pretrained(export)
    config.update({splits.EXPORTED: record})
    monkeypatch.setattr(splits, "local_or_hub", str)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: {"me/merged": config}[name])
    assert provenance("me/merged").record == record
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "me/merged"}))
    assert provenance(adapter).record == {"split_seed": 7, "sources": [OTHER, RAW], "gold_share": 0.2}


def test_nothing_is_trained_on_a_validation_part(here, model_dir):
    """Nor are teachers asked about it, or pairs made of it: an evaluation on it would measure memory."""
    rows = {part: [{"input": f"{part} {i}", "output": "x"} for i in range(3)] for part in ("sft", "validation")}
    Path("raw.jsonl").write_text("x")
    splits.write_parts("d", "code", rows, "raw.jsonl", {"split_seed": 0})
    shutil.copy("d/code_validation.jsonl", "d/renamed.jsonl")
    for name in ("code_validation", "renamed"):
        with pytest.raises(InputError, match="is the validation part of prepared data; take the training part"):
            read_data(f"d/{name}.jsonl", ("input", "output"))
        with pytest.raises(InputError, match="is the validation part"):
            splits.unchanged_preparation(f"d/{name}.jsonl", file_sha256(f"d/{name}.jsonl"))
    assert len(read_data("d/code_sft.jsonl", ("input", "output")).rows) == 3
    Path("d/code_prepared.json").unlink()  # as in a clone, where the name alone tells
    with pytest.raises(InputError, match="is the validation part"):
        read_data("d/code_validation.jsonl", ("input", "output"))


def test_a_note_of_other_files_is_not_replaced(here):
    rows = {"sft": [{"input": "a", "output": "b"}]}
    Path("raw.jsonl").write_text("x")
    splits.write_parts("d", "credit", rows, "raw.jsonl", {"split_seed": 7})
    with pytest.raises(InputError, match=r"its note credit_prepared.json would replace that of credit_sft.jsonl"):
        splits.check_note("d/credit.jsonl")
    splits.check_note("d/other.jsonl")
    splits.write_parts("d", "credit", rows, "raw.jsonl", {"split_seed": 0})  # the same files: replaced with their note
    with pytest.raises(InputError, match=r"is the note of credit_sft.jsonl too; choose another --outdir"):
        splits.write_parts("d", "credit", {"kd": rows["sft"]}, "raw.jsonl", {"split_seed": 0})


def test_prepared_files_are_held_while_they_are_written(here):
    Path("raw.jsonl").write_text("x")
    Path("d").mkdir()
    with other_process(HOLD, "d/credit_sft.jsonl"), pytest.raises(InputError, match="another run"):
        splits.write_parts("d", "credit", {"sft": [{"input": "a"}]}, "raw.jsonl", {"split_seed": 7})
    assert not Path("d/credit_sft.jsonl").exists()


def test_parts_of_different_splits_are_refused(chain):
    adapter, _ = chain({"split_seed": 0, "sources": [RAW]}, {"split_seed": 7, "sources": [RAW]})
    with pytest.raises(InputError, match=r"export was trained with --split_seed 7, .*adapter has 0"):
        provenance(adapter)


@pytest.mark.parametrize(
    "record",
    [{"sources": 1}, {"sources": [{}]}, {"split_seed": "7"}, {"gold_share": "all"}, ["x"], {"sources": ["x"]}],
)
def test_a_damaged_record_is_refused(chain, record):
    _, export = chain({}, {})
    (Path(export) / "export.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"export: its record .* is damaged"):
        provenance(export)


@pytest.mark.parametrize("main", [eval_idp.main, eval_codegen.main], ids=["idp", "codegen"])
def test_documents_and_tasks_of_another_split_are_refused(here, model_dir, main):
    """Their validation file is one split's; a model of another split of the same raw file may have seen its rows."""
    row = {"document": "a", "expected": "{}", "prompt": "f(x)", "tests": ["assert f(1)"]}
    Path("validation.jsonl").write_text(json.dumps(row) + "\n")
    note = {"split_seed": 0, "source": RAW, "files": {"validation.jsonl": file_sha256("validation.jsonl")}}
    Path("idp_prepared.json").write_text(json.dumps(note))
    own = shutil.copytree(model_dir, here / "own")
    (own / "export.json").write_text(json.dumps({"split_seed": 7, "sources": [RAW], "gold_share": None}))
    argv = ["--model_dir", str(own), "--data", "validation.jsonl"]
    with pytest.raises(InputError, match=r"own: trained with --split_seed 7, validation\.jsonl was prepared with 0"):
        main(argv)
    for record in ({"split_seed": 0, "sources": [RAW]}, {"split_seed": 7, "sources": [OTHER]}):
        (own / "export.json").write_text(json.dumps(record))
        splits.check_split([str(own), model_dir], "validation.jsonl", file_sha256("validation.jsonl"))
