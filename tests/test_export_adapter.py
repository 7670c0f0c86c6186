"""export_adapter.py: the merged folder answers as the adapter on its unquantised base does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import export_adapter
from common import InputError, PromptEncoder
from distil.scoring import FastLabelScorer
from distil.splits import provenance
from distil.testing import load_named, run_cli, save_adapter

ROWS = [{"input": f"Debt: {37 * n}, Age: {20 + n}", "output": ("Good", "Standard", "Bad")[n % 3]} for n in range(9)]


@pytest.fixture
def adapter(tmp_path, model_dir) -> str:
    return save_adapter(tmp_path / "adapter", model_dir)


@pytest.fixture
def sample(tmp_path) -> str:
    path = tmp_path / "sample.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def scores(model_dir: str, dtype: str = "float32"):
    model, tokenizer = load_named(model_dir, "none", dtype)
    forms = {label: [label] for label in ("Bad", "Good", "Standard")}
    return FastLabelScorer(model, PromptEncoder(tokenizer), forms).raw_scores([row["input"] for row in ROWS])


def test_the_merged_folder_is_a_plain_model_with_the_adapters_answers(adapter, model_dir, sample, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert export_adapter.main(["--model_dir", adapter, "--save_dir", str(merged), "--sample", sample]) == 0
    assert not (merged / "adapter_config.json").exists()
    assert (merged / "config.json").is_file() and (merged / "tokenizer.json").is_file()
    model, _ = load_named(str(merged), "none", "bfloat16")
    assert model.dtype == torch.bfloat16
    before, after = scores(adapter, "bfloat16"), scores(str(merged), "bfloat16")
    assert abs(before - scores(model_dir, "bfloat16")).max() > 5 * abs(after - before).max()  # the adapter is in it
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((merged / "export.json").read_text()) and report["rows"] == len(ROWS)
    change = report["change from adapter on bf16 base"]
    assert change["largest"] == pytest.approx(abs(after - before).max(), abs=1e-4)
    assert set(report["change from adapter on NF4 base"]) == {"largest", "mean", "same_label"}


@pytest.mark.parametrize("count", ["200", "4"])
def test_answers_that_are_no_labels_are_compared_by_their_likelihood(count, adapter, tmp_path, capsys):
    rows = [row | {"output": f"Debt {n}"} for n, row in enumerate(ROWS + ROWS)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model_dir", adapter, "--save_dir", str(tmp_path / "m"), "--sample", str(tmp_path / "own.jsonl")]
    assert export_adapter.main([*argv, "--rows", count]) == 0
    assert set(json.loads(capsys.readouterr().out)["change from adapter on bf16 base"]) == {"largest", "mean"}


@pytest.mark.parametrize(("prompt", "answer"), [("input", "teacher_output"), ("prompt", "chosen")])
def test_the_rows_that_it_was_trained_on_are_the_sample(prompt, answer, adapter, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({prompt: row["input"], answer: row["output"]}) for row in ROWS))
    (Path(adapter) / "run.json").write_text(json.dumps({"data": {"file": str(data)}}))
    assert export_adapter.main(["--model_dir", adapter, "--save_dir", str(tmp_path / "m"), "--rows", "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 5 and "same_label" in report["change from adapter on bf16 base"]


def test_only_an_earlier_export_is_replaced(adapter, model_dir, sample, tmp_path):
    """Never other files, the base, the adapter or a folder that they are in; and nothing is left next to it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "full", tmp_path, model_dir, adapter):
        with pytest.raises(InputError, match=r"is not an earlier export|is the base itself|is the adapter itself"):
            export_adapter.main(["--model_dir", adapter, "--save_dir", str(folder), "--rows", "0", "--overwrite"])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    argv = ["--model_dir", adapter, "--save_dir", str(tmp_path / "merged"), "--sample", sample]
    assert export_adapter.main([*argv[:4], "--rows", "0"]) == 0
    with pytest.raises(InputError, match="an export is here; replace it with --overwrite"):
        export_adapter.main(argv)
    assert "rows" not in json.loads((tmp_path / "merged" / "export.json").read_text())
    assert export_adapter.main([*argv, "--overwrite"]) == 0
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["rows"] == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "full", "merged", "sample.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_dir", "runs/none", "--save_dir", "out"], "runs/none"),
        (["--model_dir", "MODEL", "--save_dir", "out"], "not an adapter folder"),
        (["--model_dir", "ADAPTER", "--save_dir", "ADAPTER"], "is the adapter itself"),
        (["--model_dir", "ADAPTER", "--save_dir", "out"], "give rows with --sample"),
        (["--model_dir", "ADAPTER", "--save_dir", "out", "--sample", "no.jsonl"], "no.jsonl"),
        (["--model_dir", "ADAPTER", "--save_dir", "out", "--rows", "-1"], "--rows"),
        (
            ["--model_dir", "ADAPTER", "--save_dir", "out", "--rows", "0", "--batch_size", "8"],
            "--batch_size: --rows",
        ),
    ],
)
def test_bad_input_ends_with_one_line(flags, message, adapter, model_dir, tmp_path):
    flags = [{"ADAPTER": adapter, "MODEL": model_dir}.get(flag, flag) for flag in flags]
    done = run_cli("export_adapter.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


RECORD = {"split_seed": 7, "sources": [{"file": "raw.json", "sha256": "abc"}], "gold_share": 0.2}


def export(adapter: str, folder: Path) -> str:
    assert export_adapter.main(["--model_dir", adapter, "--save_dir", str(folder), "--rows", "0"]) == 0
    return str(folder)


def test_an_export_keeps_the_provenance_of_its_adapter_at_any_depth(adapter, tmp_path):
    """Also of the base below, an export itself, and where a copy lacks export.json."""
    (Path(adapter) / "run.json").write_text(json.dumps(RECORD))
    first = export(adapter, tmp_path / "first")
    stored = json.loads((tmp_path / "first" / "export.json").read_text())
    assert {name: stored[name] for name in RECORD} == RECORD
    second = save_adapter(tmp_path / "second", first)
    other = {"file": "other.json", "sha256": "def"}
    (Path(second) / "run.json").write_text(json.dumps({"split_seed": 7, "sources": [other], "gold_share": 0.1}))
    merged = export(second, tmp_path / "merged")
    wanted = {"split_seed": 7, "sources": [other, *RECORD["sources"]], "gold_share": 0.2}
    assert provenance(merged).record == wanted
    (tmp_path / "merged" / "export.json").unlink()
    assert provenance(merged).record == wanted


def test_an_adapter_of_another_split_than_its_base_is_not_exported(adapter, tmp_path):
    (Path(adapter) / "run.json").write_text(json.dumps(RECORD))
    second = save_adapter(tmp_path / "second", export(adapter, tmp_path / "first"))  # with split seed 0
    with pytest.raises(InputError, match=r"first was trained with --split_seed 7, .*second has 0"):
        export(second, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
