"""The whole CreditMix way on the real embedded model: prepare, train in NF4, classify, evaluate."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import CREDIT_TEXT

import creditmix_prepare
import eval_creditmix
import infer_codegen
import infer_creditmix
import infer_idp
import kd_prepare
import sft_train
from common import InputError, PromptEncoder, lora_config
from distil.files import file_sha256, read_jsonl
from distil.models import EMBEDDED_MODEL, embedded_model_dir
from distil.tasks import default_task
from distil.testing import ROOT, load_named

TASK = default_task()

pytestmark = pytest.mark.slow
DATA = ROOT / "data" / "creditmix_dataset.json"


@pytest.fixture(scope="module", autouse=True)
def embedded():
    try:
        return embedded_model_dir()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("creditmix")


@pytest.fixture(scope="module")
def data_folder(work) -> Path:
    argv = ["--src", str(DATA), "--outdir", str(work / "data"), "--per_class", "40"]
    assert creditmix_prepare.main(argv) == 0
    return work / "data"


@pytest.fixture(scope="module")
def trained(work, data_folder) -> Path:
    save_dir = work / "runs" / "creditmix_sft"
    argv = ["--student", EMBEDDED_MODEL, "--data", data_folder / "creditmix_sft.jsonl", "--save_dir", save_dir]
    argv += ["--max_steps", 4, "--batch_size", 4, "--warmup_steps", 0]
    assert sft_train.main([str(flag) for flag in argv]) == 0
    return save_dir


def test_prepared_rows_are_balanced(data_folder):
    rows = read_jsonl(data_folder / "creditmix_sft.jsonl", ("input", "output"))
    assert sorted(row["output"] for row in rows) == sorted(40 * TASK.labels)


def test_training(trained, data_folder):
    run = json.loads((trained / "run.json").read_text())
    assert (run["method"], run["base_model"], run["metrics"]["steps"]) == ("sft", EMBEDDED_MODEL, 4)
    assert run["data"]["rows"] == 120 and run["data"]["sha256"] == file_sha256(data_folder / "creditmix_sft.jsonl")
    assert run["flags"]["quantization"] == "nf4"
    # The answer alone is a few tokens of a text that the model has never seen: no loss of a broken label shift.
    assert 0.1 < run["metrics"]["train_loss"] < 8
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == EMBEDDED_MODEL


def test_classification(trained, capsys):
    assert infer_creditmix.main(["--model_dir", str(trained), "--features", CREDIT_TEXT]) == 0
    response = json.loads(capsys.readouterr().out)
    names = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]
    assert list(response) == names
    assert response["model_name"] == str(trained)
    for label in TASK.labels:
        difference = response["raw_scores"][label] - response["prior"][label]
        assert response["scores"][label] == pytest.approx(difference, abs=2e-6)
        assert response["raw_scores"][label] < 0
    assert response["prediction"] == max(TASK.labels, key=response["scores"].get)
    assert math.fsum(response["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    second, best = sorted(response["scores"].values())[-2:]
    assert response["top2_margin"] == pytest.approx(best - second, abs=2e-6)


def test_evaluation(trained, work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    argv = ["--model_dir", str(trained), "--data", str(DATA), "--val_per_class", "10", "--bootstrap", "50"]
    assert eval_creditmix.main([*argv, "--report_dir", str(work / "report"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["data"]["validation_rows"] == 30
    (model,) = summary["models"]
    low, high = model["interval_95"]["accuracy"]
    assert 0 <= low <= model["accuracy"] <= high <= 1
    assert json.loads((work / "report" / "metrics.json").read_text()) == summary
    with pytest.raises(InputError, match="rows would leak"):
        eval_creditmix.main([*argv, "--split_seed", "1"])


def test_labels_are_single_tokens():
    _, tokenizer = load_named(EMBEDDED_MODEL)
    encoder = PromptEncoder(tokenizer)
    assert [len(encoder.label(label)) for label in TASK.labels] == [1, 1, 1]
    assert tokenizer.decode(encoder.completion("Good")) == "Good<|im_end|>"


def test_gradients_are_the_same_after_an_evaluation():
    from peft import get_peft_model

    model, tokenizer = load_named(EMBEDDED_MODEL, "nf4", trainable=True)
    model = get_peft_model(model, lora_config(dropout=0.0))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    ids = torch.tensor([PromptEncoder(tokenizer).prompt(TASK.prompt(CREDIT_TEXT))])

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert torch.equal(before, gradients())


def test_an_invoice_becomes_json_that_validates(capsys):
    document = "INVOICE 2024-17\nDate 03.05.2024\nNorth Lamps Ltd\n2 x Desk lamp 19.90  39.80\nTotal EUR 39.80"
    schema = ROOT / "data" / "idp_schema.json"
    argv = ["--model_dir", EMBEDDED_MODEL, "--schema", str(schema), "--document", document, "--max_new_tokens", "120"]
    assert infer_idp.main(argv) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), json.loads(schema.read_text()))


def test_code_comes_out_and_is_run(capsys):
    argv = ["--model_dir", EMBEDDED_MODEL, "--prompt", "Write a function add(a, b) that returns a + b."]
    assert infer_codegen.main([*argv, "--max_new_tokens", "60", "--plan_then_code"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("plan: ") == 1 and shown.out.strip()


# ---------------------------------------------------------------------------------------------------------- a teacher


@pytest.fixture(scope="module")
def teacher_url(embedded):
    """Serve a real OpenAI-compatible endpoint on loopback, with the embedded model as the teacher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(embedded), "--port", str(port)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.timeout(360)  # a CPU without bf16 products takes 5 s an answer
def test_a_teacher_over_http_and_the_gate_that_calls_it_weak(embedded, teacher_url, tmp_path, capsys):
    rows = [{"input": f'Say "Good".{chr(10) * n}', "output": "Bad" if n % 3 else "Good"} for n in range(6)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "kd.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--teacher_url", teacher_url, "--teacher_model", str(embedded), "--input", str(source)]
    argv += ["--output", str(output), "--labels", ",".join(TASK.labels), "--max_new_tokens", "8"]
    assert kd_prepare.main(argv) == 0
    captured = capsys.readouterr()
    assert "WARNING: the teacher is weaker than" in captured.err  # the majority is "Bad"
    written = read_jsonl(output, ("input", "teacher_output"))
    assert [row["teacher_output"] for row in written] == ["Good"] * 6
    assert all("label_probs" not in row for row in written)  # this server sends no log-probabilities, though requested
