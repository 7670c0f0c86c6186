"""Model cards of runs and exports: what is in them, the figures of evaluations, the upload to a hub on loopback."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import HUMANEVAL, evaluate_json, run_json, trainer, write_lines
from huggingface_hub import ModelCard, constants

import eval_codegen
import eval_idp
import export_adapter
from common import InputError
from distil import cards
from distil.files import file_sha256
from distil.tasks import TASK_FILE, default_task
from distil.testing import LoopbackServer, save_adapter

FLAGS = {"url": None, "quantization": "nf4"}


def read(folder) -> ModelCard:
    return ModelCard.load(Path(folder) / "README.md")


def summary(folder, value: float = 0.5, rows: int = 100, **result) -> dict:
    """Return what an evaluation of one model reports."""
    model = {"model": str(folder), "f1": value, "f1_interval_95": [value - 0.1, value + 0.1]} | result
    return {"data": {"file": "data/x.jsonl", "sha256": "a" * 64, "documents": rows}, "models": [model]}


@pytest.fixture
def card(tmp_path) -> Path:
    """Return the folder of a run with a card and without weights."""
    cards.write_card(tmp_path, tmp_path.name, {"base_model": "smollm2-135m", "method": "sft"}, None)
    return tmp_path


def metrics_of(folder) -> dict:
    """Return {(settings, metric): value} of a card."""
    return {(one.dataset_config, one.metric_type): one.metric_value for one in read(folder).data.eval_results}


def test_a_run_has_a_card_without_paths(train, model_dir, tmp_path, training_files):
    rows = [{"input": default_task().prompt("Age: 31"), "output": "Good"}]
    data = Path(write_lines(tmp_path / "credit_sft.jsonl", rows * 4))
    note = {"split_seed": 5, "gold_share": 0.5, "files": {data.name: file_sha256(data)}, "task": default_task().record}
    note["sources"] = [{"file": str(tmp_path / "raw.json"), "sha256": "b" * 64}]
    note["sources"].append({"file": "the teacher big-model at http://10.0.0.1/v1"})
    (tmp_path / "credit_prepared.json").write_text(json.dumps(note))
    folder = train("sft", "run", "--data", data, "--lora_targets", "q_proj,v_proj")
    found, text = read(folder), (folder / "README.md").read_text()
    assert found.data.to_dict() | {"tags": 0} == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": 0}
    assert str(tmp_path) not in text and model_dir not in text and str(Path.home()) not in text
    assert f"4 of credit_sft.jsonl |\n| SHA-256 | {file_sha256(data)}" in text
    assert "| answers of the teacher big-model |\n" in text and "10.0.0.1" not in text
    assert f"raw.json, SHA-256 {'b' * 64}" in text and "| split seed | 5 |" in text and "| gold share | 0.5 |" in text
    assert (
        "Good, Standard, Bad" in text
        and "Its input has Age" in text
        and "without human review" in " ".join(text.split())
    )
    assert "`learning_rate 0.001`" in text and "`lora_targets q_proj,v_proj`" in text and "`seed 0`" in text
    assert f"| last loss | {run_json(folder)['metrics']['last_loss']:.4g} |" in text
    assert "without a statement of its licence" in text and "{" not in found.text.split("## Data")[1]
    again = shlex.split(text.split("python sft_train.py")[1].splitlines()[0])
    again[1:] = [str(folder / again[1]), *again[2:]]
    flags = trainer("sft").build_parser().parse_args(again)
    assert (flags.learning_rate, flags.max_steps, flags.save_dir) == (1e-3, 4, "runs/again")


def test_a_card_says_what_answers_are_and_where_the_licence_comes_from(tmp_path):
    kinds = [cards.answer_kind(text) for text in ('{"a": 1}', "import re\n\ndef f():\n  pass", "from 5 to 7", "12")]
    assert kinds == ["JSON", "code", "text", "text"]
    base = tmp_path / "base"
    base.mkdir()
    wanted = {"license": "other", "license_name": "own", "license_link": "https://x/LICENSE"}
    lines = "\n".join(f"{key}: {value}" for key, value in wanted.items())
    (base / "README.md").write_text(f"---\n{lines}\nbase_model: /home/me/x\n---\nText.\n")
    cards.write_card(tmp_path, "mine", {"base_model": str(base), "method": "dpo", "answers": "code"}, None)
    found, text = read(tmp_path), (tmp_path / "README.md").read_text()
    assert found.data.to_dict().items() >= wanted.items() and "other own https://x/LICENSE" in text
    assert (
        "adapter for `base`," in text
        and "/home/me" not in text
        and "in a sandbox" in text
        and "infer_codegen.py" in text
    )
    for broken in ("---\n- 1\n---\n", "no metadata"):
        (base / "README.md").write_text(broken)
        assert cards.base_metadata(str(base)) == {}


def test_an_export_has_the_card_of_its_adapter(tmp_path, model_dir):
    adapter = Path(save_adapter(tmp_path / "adapter", model_dir))
    (adapter / TASK_FILE).write_text(json.dumps(default_task().record))
    argv = ["--model_dir", str(adapter), "--save_dir", str(tmp_path / "merged"), "--rows", "0"]
    assert export_adapter.main(argv) == 0
    found, text = read(tmp_path / "merged"), (tmp_path / "merged" / "README.md").read_text()
    assert found.data.library_name == "transformers" and found.data.tags == ["distil-slm", "sft"]
    assert "the adapter adapter, merged in bf16" in text and str(tmp_path) not in text
    assert (
        "infer_creditmix.py --model_dir merged" in text
        and "without human review" in " ".join(text.split())
        and "vllm serve merged" in text
    )


def test_an_evaluation_writes_its_figures_into_the_card(tmp_path, model_dir, credit_file, capsys):
    folder = Path(save_adapter(tmp_path / "adapter", model_dir))
    cards.write_card(folder, "adapter", {"base_model": model_dir, "method": "sft"}, default_task().record)
    card = folder / "README.md"
    mine = card.read_text().replace("---\n\n# adapter", "language: de\n---\n\n# adapter\n\nMy own words.")
    card.write_text(mine)
    (model,) = evaluate_json(capsys, str(folder), credit_file, "--calibration", "contextual")["models"]
    found, text = read(folder), card.read_text()
    first = found.data.eval_results[0]
    assert (first.metric_type, first.metric_value) == ("accuracy", round(model["accuracy"], 4))
    assert first.metric_args["interval_95"] == [round(end, 4) for end in model["interval_95"]["accuracy"]]
    assert (first.dataset_name, first.dataset_config) == ("credit.json", "60 rows, none, contextual")
    low, high = first.metric_args["interval_95"]
    assert f"| 60 rows, none, contextual | accuracy | {first.metric_value} | {low} to {high} |" in text
    assert {one.metric_type for one in found.data.eval_results} == {
        "accuracy",
        "macro_f1",
        "recall_Standard",
        "nll",
        "ece",
    }
    assert found.data.to_dict()["language"] == "de"
    outside = [part.split(cards.START)[0] + part.split(cards.END)[1] for part in (mine, text)]
    assert outside[0].partition("# adapter")[2] == outside[1].partition("# adapter")[2]


def test_figures_of_documents_and_code_are_written_too(tmp_path, schema_file, model_dir):
    folder = shutil.copytree(model_dir, tmp_path / "merged")
    cards.write_card(folder, "merged", {"base_model": model_dir}, None)
    rows = write_lines(tmp_path / "val.jsonl", [{"document": "INVOICE 1", "expected": {"total": 1}}])
    flags = ["--schema", str(schema_file), "--data", rows, "--max_new_tokens", "200"]
    assert eval_idp.main(["--model_dir", str(folder), *flags]) == 0
    assert {name for _, name in metrics_of(folder)} == {"f1", "macro_f1", "exact", "valid", "invention_rate"}
    tasks = write_lines(tmp_path / "tasks.jsonl", [HUMANEVAL])
    assert eval_codegen.main(["--model_dir", str(folder), "--data", tasks, "--max_new_tokens", "4"]) == 0
    written = {key for key in metrics_of(folder) if key[0] != "1 rows, nf4"}
    assert written == {
        (f"1 rows, nf4, {mode}", name) for mode in ("direct", "plan") for name in ("pass@1", "parse_rate")
    }


def test_other_rows_and_settings_are_added(card):
    cards.add_results(summary(card, 0.5, 100), ["f1", "absent"], FLAGS)
    cards.add_results(summary(card, 0.9, 20), ["f1"], FLAGS)
    cards.add_results(summary(card, 0.6, 100), ["f1"], FLAGS)
    cards.add_results(
        summary(card, 0.7, 100, mode="plan"), ["f1"], FLAGS | {"url": "http://x", "served_model": "a/m-q8.gguf"}
    )
    wanted = {"100 rows, nf4": 0.6, "20 rows, nf4": 0.9, "100 rows, engine m-q8.gguf, plan": 0.7}
    assert metrics_of(card) == {(settings, "f1"): value for settings, value in wanted.items()}
    assert "| x.jsonl | 100 rows, nf4 | f1 | 0.6 | 0.5 to 0.7 |" in (card / "README.md").read_text()


@pytest.mark.parametrize("change", ["no section", "not ours", "damaged", "none"])
def test_a_card_that_cannot_be_written_fails_no_evaluation(card, change, capsys):
    path = card / "README.md"
    text = {
        "no section": path.read_text().replace(cards.END, ""),
        "not ours": "# Mine\n",
        "damaged": f"---\n- 1\n---\n{cards.START}{cards.END}",
    }
    path.write_text(text[change]) if change in text else path.unlink()
    cards.add_results(summary(card), ["f1"], FLAGS)
    assert path.read_text() == text[change] if change in text else not path.exists()
    assert ("could not be written" in capsys.readouterr().err) == (change == "damaged")


# -------------------------------------------------------------------------------------------------------------- hub


class Hub(LoopbackServer):
    """A model hub with one user, who has the token 'right'. role: of the token; status: of an upload."""

    def __init__(self, role: str = "write", status: int = 200):
        self.role, self.status = role, status
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        super().__init__()

    def post(self, request, body: bytes) -> None:
        place, path = f"{self.root}/me/run", request.path
        if path == "/api/repos/create" and (request.headers["authorization"], self.role) == ("Bearer right", "write"):
            self.created.append(json.loads(body))
            request.reply(200, {"url": place})
        elif path == "/api/repos/create":
            request.reply(403, {"error": "may not write"})
        elif "/preupload/" in path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            request.reply(200, {"files": [{"path": file["path"]} | how for file in json.loads(body)["files"]]})
        elif "/commit/" in path and self.status == 200:
            for value in (line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"):
                self.files[value["path"]] = base64.b64decode(value["content"])
            request.reply(200, {"commitUrl": f"{place}/commit/1", "commitOid": "1"})
        else:
            request.reply(200 if "validate" in path else self.status, {"errors": [], "error": "quota"})


@pytest.fixture
def hub(monkeypatch, request):
    server = Hub(**getattr(request, "param", {}))
    monkeypatch.setattr(constants, "ENDPOINT", server.root)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield server
    server.close()


def test_a_finished_run_is_uploaded(hub, train):
    folder = train("sft", "run", "--push_to_hub", "me/run")
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()} and "README.md" in hub.files
    assert hub.created[0]["name"] == "run" and hub.created[0]["visibility"] == "private"
    assert (
        trainer("sft")
        .build_parser()
        .parse_args(["--config", str(folder / "run.json"), "--save_dir", "again"])
        .push_to_hub
        is None
    )


@pytest.mark.parametrize("hub", [{"status": 403}], indirect=True)
def test_a_failed_upload_leaves_the_run_complete(hub, model_dir, training_files, tmp_path, capsys):
    argv = ["--student", model_dir, "--data", training_files["sft"], "--save_dir", str(tmp_path / "my run")]
    assert trainer("sft").main([*argv, "--max_steps", "1", "--warmup_steps", "0", "--push_to_hub", "me/run"]) == 1
    assert run_json(tmp_path / "my run")["metrics"]["steps"] == 1 and not hub.files
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not uploaded" in line]
    assert line.endswith(f"try again: hf upload --private me/run '{tmp_path / 'my run'}' .")


@pytest.mark.parametrize(
    ("hub", "repo", "token", "reason"),
    [
        ({}, "me/run", "wrong", "may not write"),
        ({}, "a/b/c", "right", "Repo id must be"),
        ({"role": "read"}, "me/run", "right", "may not write"),
    ],
    indirect=["hub"],
)
def test_what_an_upload_needs_is_checked_before_the_training(hub, repo, token, reason, train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=reason) as error:
        train("sft", "run", "--push_to_hub", repo)
    assert "\n" not in str(error.value) and "HF_TOKEN" in str(error.value) and not hub.created


def test_without_a_hub_nothing_is_trained_for_it(train):
    with pytest.raises(InputError, match="offline mode is enabled"):
        train("sft", "run", "--push_to_hub", "me/run")
