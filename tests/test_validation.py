"""Validation while training: one measure for all methods, trainings that it does not change, early stopping."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    METHODS,
    SGD,
    adapter_tensors,
    assert_same_tensors,
    gold_rows,
    in_two_processes,
    read_lines,
    row_of,
    run_json,
    trainer,
    write_lines,
)
from scipy.special import log_softmax

import creditmix_prepare
import idp_prepare
from common import InputError, LabelScorer, PromptEncoder
from distil import heads
from distil.files import file_sha256
from distil.splits import preparation, split_of
from distil.tasks import default_task
from distil.testing import credit_rows, load_named
from distil.training import curve, run, validation
from distil.training.data import read_data

TASK = default_task()
FLOAT32 = ("--quantization", "none", "--compute_dtype", "float32")


def prepare(folder: Path, *, rows: int = 24) -> Path:
    """Write training files of each method and creditmix_val.jsonl as creditmix_prepare.py names and notes them."""
    gold = gold_rows(rows + 9)
    train, val = gold[:rows], gold[rows:]
    wrong = {"Good": "Standard", "Standard": "Bad", "Bad": "Good"}
    soft = {"Good": 0.5, "Standard": 0.3, "Bad": 0.2}
    files = {
        "creditmix_sft.jsonl": train,
        "creditmix_kd.jsonl": [
            {"input": r["input"], "teacher_output": r["output"], "label_probs": soft} for r in train
        ],
        "creditmix_dpo.jsonl": [
            {"prompt": r["input"], "chosen": r["output"], "rejected": wrong[r["output"]]} for r in train
        ],
        "creditmix_val.jsonl": val,
    }
    hashes = {name: file_sha256(write_lines(folder / name, lines)) for name, lines in files.items()}
    note = {"split_seed": 0, "gold_share": 1.0, "source": {"file": "raw", "sha256": "a"}, "task": TASK.record}
    (folder / "creditmix_prepared.json").write_text(json.dumps(note | {"files": hashes}))
    return folder


@pytest.fixture
def prepared(tmp_path) -> Path:
    return prepare(tmp_path)


@pytest.fixture
def fit(prepared, model_dir):
    """Train on the prepared rows of a method and return the run folder."""

    def fit(method: str, name: str, *flags) -> Path:
        argv = ["--student", model_dir, "--data", prepared / f"creditmix_{method}.jsonl", "--warmup_steps", 0]
        argv += ["--save_dir", prepared / name, "--batch_size", 4, "--grad_accum", 1, "--max_steps", 6, *flags]
        assert trainer(method).main([str(flag) for flag in argv]) == 0
        return prepared / name

    return fit


def curve_of(save_dir: Path) -> list[dict]:
    return json.loads((save_dir / "training_curve.json").read_text())


def values(save_dir: Path, name: str) -> dict[int, float]:
    """Return the values of a run's curve by step."""
    return {entry["step"]: entry[name] for entry in curve_of(save_dir) if name in entry}


# ------------------------------------------------------------------------------------------------------- the measure


def test_the_measure_is_that_of_the_models_own_logits(fit, prepared, model_dir, monkeypatch):
    """Written out: the NLL of each token of each answer, and the labels' softmax by common.LabelScorer."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", 448 * 4 * 3)  # three tokens of an answer at a time
    save_dir = fit("sft", "run", *FLOAT32, "--learning_rate", "3e-3", "--eval_steps", 6)
    model, tokenizer = load_named(str(save_dir), "none", "float32")
    encoder, rows = PromptEncoder(tokenizer), read_lines(prepared / "creditmix_val.jsonl")
    losses = []
    for row in rows:
        prompt, answer = encoder.prompt(row["input"]), encoder.completion(row["output"])
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        losses += [-float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    forms = {label: [label] for label in TASK.labels}
    scorer = LabelScorer(model, encoder, forms, label_tokens=TASK.label_tokens)
    scores = log_softmax(scorer.raw_scores([row["input"] for row in rows]), axis=1)
    gold = [TASK.labels.index(row["output"]) for row in rows]
    last = curve_of(save_dir)[-1]
    assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert last["val_nll"] == pytest.approx(-scores[np.arange(len(rows)), gold].mean(), abs=1e-4)
    assert last["val_accuracy"] == pytest.approx((scores.argmax(axis=1) == gold).mean())
    assert run_json(save_dir)["metrics"]["val_nll"] == last["val_nll"]


def test_all_methods_have_the_same_measure(fit):
    """Nothing is learnt at rate 0, so each curve has the base model's values."""
    entries = [curve_of(fit(method, method, "--learning_rate", 0, "--eval_steps", 6))[-1] for method in METHODS]
    for name in ("val_loss", "val_nll", "val_accuracy"):
        assert entries[1][name] == pytest.approx(entries[0][name], abs=1e-5)
        assert entries[2][name] == pytest.approx(entries[0][name], abs=1e-5)


def test_answers_that_are_no_labels_have_a_loss_alone(train, training_files, tmp_path):
    rows = [{"input": f"Debt: {n}", "output": "a longer answer, without any label"} for n in range(5)]
    val = write_lines(tmp_path / "other.jsonl", rows)
    save_dir = train("sft", "run", "--val_data", val, "--eval_steps", 3)
    assert sorted(values(save_dir, "val_loss")) == [3, 4] and not values(save_dir, "val_nll")
    assert run_json(save_dir)["validation"] == {"file": val, "sha256": file_sha256(val), "rows": 5}
    assert "best_step" not in run_json(save_dir)["metrics"]


def test_the_curve_shows_both_losses(fit, monkeypatch):
    lines, plot = [], curve.plot_curve

    def watched(path, history, title):
        from matplotlib.axes import Axes

        with monkeypatch.context() as patch:
            original = Axes.plot
            patch.setattr(Axes, "plot", lambda self, *a, **k: lines.append((list(a[1]), k)) or original(self, *a, **k))
            plot(path, history, title)

    monkeypatch.setattr(run, "plot_curve", watched)
    save_dir = fit("sft", "run", "--eval_steps", 2)
    assert [shape.get("label") for _, shape in lines] == [
        "training (loss of the method)",
        "validation (NLL of an answer token)",
        None,
    ]
    assert lines[1][0] == list(values(save_dir, "val_loss").values()) and len(lines[1][0]) == 3
    assert lines[1][1]["linestyle"] != lines[0][1].get("linestyle")  # distinct without colours


# --------------------------------------------------------------------------- trainings are as if it was not measured


def gradients(one) -> torch.Tensor:
    """Return the LoRA gradients of a trainer's first batch."""
    one.model.train().zero_grad()
    batch = next(iter(one.get_train_dataloader()))
    one.compute_loss(one.model, one._prepare_inputs(batch)).backward()
    return torch.cat([p.grad.flatten() for p in one.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_gradients_are_the_same_after_an_evaluation(checkpointing, built, prepared, model_dir):
    """In NF4 and bfloat16, where bitsandbytes' packed kernel and adapters that stay rounded would show."""
    flags = ("--student", model_dir, "--data", prepared / "creditmix_sft.jsonl", "--save_dir", prepared / "run")
    flags += ("--compute_dtype", "bfloat16", "--gradient_checkpointing", checkpointing, "--lora_dropout", 0)
    flags += ("--eval_steps", 1)
    one = built("sft", *flags)
    one.model_wrapped = one.accelerator.prepare_model(one.model)
    for name, parameter in one.model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave A without a gradient
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    before, state = gradients(one), torch.random.get_rng_state()
    for _ in range(2):
        assert one.evaluate()["eval_val_loss"] > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert before.abs().max() > 1e-3 and torch.equal(before, gradients(one))


@pytest.mark.parametrize("method", METHODS)
def test_a_measured_training_gives_the_same_adapter(method, fit):
    """Under dropout, in NF4, over more than an epoch: neither masks nor the order of rows are touched."""
    flags = ["--max_steps", 8, "--learning_rate", "3e-3", *([] if method == "dpo" else ["--lora_dropout", "0.2"])]
    plain = fit(method, "plain", *flags, "--val_data", "none")
    measured = fit(method, "measured", *flags, "--eval_steps", 3)
    assert_same_tensors(adapter_tensors(plain), adapter_tensors(measured), atol=0)
    assert sorted(values(measured, "val_nll")) == [3, 6, 8] and not values(plain, "val_loss")
    assert "validation" not in run_json(plain)


# ----------------------------------------------------------------------------------------------------- early stopping


def worse_from(monkeypatch, step: int) -> dict[int, dict]:
    """Let val_nll fall up to a step and rise from there, and return the adapters at each evaluation."""
    seen, measure = {}, validation.measure

    def measured(one, rows):
        now = one.state.global_step
        seen[now] = {n.replace(".default", ""): p.detach().clone() for n, p in one.model.named_parameters()}
        return measure(one, rows) | {"val_nll": float(abs(now - step))}

    monkeypatch.setattr(validation, "measure", measured)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_early_stopping_keeps_the_best_adapter(method, fit, monkeypatch, capsys):
    seen = worse_from(monkeypatch, 4)
    flags = ("--max_steps", 40, "--eval_steps", 2, "--early_stopping", 3, "--learning_rate", "3e-3")
    save_dir = fit(method, "run", *flags)
    assert sorted(seen) == [2, 4, 6, 8, 10]  # three without a better one
    metrics = run_json(save_dir)["metrics"]
    assert (metrics["steps"], metrics["best_step"], metrics["best_val_nll"], metrics["val_nll"]) == (10, 4, 0.0, 6.0)
    tensors = adapter_tensors(save_dir)
    assert_same_tensors(tensors, {name: seen[4][name] for name in tensors}, atol=0)
    assert any(not torch.equal(tensors[name], seen[10][name]) for name in tensors)
    assert "10 steps (kept: the adapter of step 4, the best)" in capsys.readouterr().err
    assert not (save_dir / "checkpoints").exists()


def test_a_training_that_gets_better_runs_to_its_end(fit, monkeypatch):
    seen = worse_from(monkeypatch, 9)
    save_dir = fit("sft", "run", "--max_steps", 7, "--eval_steps", 3, "--early_stopping", 1)
    assert sorted(seen) == [3, 6, 7] and run_json(save_dir)["metrics"]["best_step"] == 7
    tensors = adapter_tensors(save_dir)
    assert_same_tensors(tensors, {name: seen[7][name] for name in tensors}, atol=0)


@pytest.mark.parametrize(("steps", "said"), [(6, True), (7, False)])
def test_patience_that_a_run_is_too_short_for_is_said(steps, said, fit, capsys):
    fit("sft", "run", "--max_steps", steps, "--eval_steps", 3, "--early_stopping", 1, "--dry_run")
    assert (f"--early_stopping 1 cannot stop a run of {steps} steps" in capsys.readouterr().err) == said


@pytest.mark.parametrize("killed_at", [5, 9, "saving"])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(killed_at, fit, monkeypatch):
    """Before the best checkpoint, with half of the patience used up, and after the decision to stop."""
    worse_from(monkeypatch, 4)
    flags = ("--max_steps", 40, "--eval_steps", 2, "--early_stopping", 3, "--learning_rate", "3e-3")
    flags += ("--lora_dropout", "0.2", *FLOAT32)
    whole, step = fit("sft", "whole", *flags), curve.Records.on_step_end

    def stop(*args, **kwargs):
        if killed_at == "saving" or args[2].global_step == killed_at:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        place = (run, "plot_curve") if killed_at == "saving" else (curve.Records, "on_step_end")
        patch.setattr(*place, stop)
        fit("sft", "killed", *flags)
    folder = whole.parent / "killed"
    checkpoints = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert checkpoints == {5: {"checkpoint-2", "checkpoint-4"}}.get(killed_at, {"checkpoint-4", "checkpoint-8"})
    folder.rename(whole.parent / "moved")
    resumed = fit("sft", "moved", *flags, "--resume")
    assert_same_tensors(adapter_tensors(whole), adapter_tensors(resumed), atol=0)
    curves = [[{**entry, "seconds": 0} for entry in curve_of(folder)] for folder in (whole, resumed)]
    assert curves[0] == curves[1]
    metrics = [run_json(folder)["metrics"] for folder in (whole, resumed)]
    for name in ("steps", "best_step", "best_val_nll", "val_loss"):
        assert metrics[0][name] == metrics[1][name]


def test_resume_refuses_another_measure(fit, prepared, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curve.Records, "on_step_end", stop)
        fit("sft", "run", "--eval_steps", 2, "--early_stopping", 3)
    fit("sft", "run", "--eval_steps", 2, "--early_stopping", 3, "--resume", "--dry_run")
    other = write_lines(prepared / "other.jsonl", read_lines(prepared / "creditmix_val.jsonl")[1:])
    for flags in (("--eval_steps", 3), ("--early_stopping", 2), ("--val_data", other), ("--val_data", "none")):
        known = {"--eval_steps": 2, "--early_stopping": 3} | ({"--early_stopping": 0} if "none" in flags else {})
        known |= dict([flags])
        if "none" in flags:
            del known["--eval_steps"]
        with pytest.raises(InputError, match="--resume with other settings: validation "):
            fit("sft", "run", *(part for pair in known.items() for part in pair), "--resume")


def test_two_processes_measure_and_stop_as_one(prepared, model_dir):
    flags = ["--student", model_dir, "--data", prepared / "creditmix_sft.jsonl", *SGD, *FLOAT32[2:]]
    flags += ["--max_steps", 12, "--eval_steps", 2, "--early_stopping", 1, "--warmup_steps", 0]
    flags += ["--learning_rate", 5, "--batch_size", 2]
    one = [*flags, "--grad_accum", 2, "--save_dir", prepared / "one"]
    assert trainer("sft").main([str(flag) for flag in one]) == 0
    done = in_two_processes("sft_train.py", *flags, "--grad_accum", 1, "--save_dir", prepared / "two", cwd=prepared)
    assert done.returncode == 0, done.stderr
    metrics = [run_json(prepared / name)["metrics"] for name in ("one", "two")]
    assert metrics[0]["steps"] == metrics[1]["steps"] and metrics[0]["best_step"] == metrics[1]["best_step"]
    for name in ("val_loss", "val_nll", "val_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3)
    assert done.stdout.count("'val_loss'") == len(values(prepared / "two", "val_loss"))  # one process prints


# ------------------------------------------------------------------------------------------------- files and refusals


def test_auto_finds_the_file_of_the_datas_own_preparation(prepared, tmp_path):
    data, val = str(prepared / "creditmix_sft.jsonl"), str(prepared / "creditmix_val.jsonl")
    note = preparation(data)
    for name in ("creditmix_sft.jsonl", "creditmix_dpo.jsonl", "creditmix_llm_kd.jsonl"):
        assert validation.val_file("auto", str(prepared / name), note) == val
    assert validation.val_file("none", data, note) is None
    assert validation.val_file("other.jsonl", data, note) == "other.jsonl"
    assert validation.val_file("auto", str(prepared / "idp_sft.jsonl"), note) is None
    other_task = TASK.record | {"validation_share": 0.2}
    for other in (
        note | {"split_seed": 1},
        note | {"source": {"file": "raw", "sha256": "b"}},
        note | {"task": other_task},
        note | {"gold_share": 0.1},
        note | {"group": "company"},
        {},
    ):
        assert validation.val_file("auto", data, other) is None, other
    plain = tmp_path / "plain"
    plain.mkdir()
    write_lines(plain / "invoices_val.jsonl", [row_of("sft")])  # of the user's own, without notes
    assert validation.val_file("auto", str(plain / "invoices_sft.jsonl"), {}) == str(plain / "invoices_val.jsonl")
    assert validation.val_file("auto", str(plain / "invoices.jsonl"), note) is None


def test_dry_run_prints_what_would_be_measured(fit, prepared, capsys):
    fit("kd", "run", "--eval_steps", 4, "--early_stopping", 2, "--dry_run")
    line = f"validation           9 rows of {prepared}/creditmix_val.jsonl, 2 times, every 4 steps and at the end"
    assert f"{line}, until 2 have no better val_nll\n" in capsys.readouterr().out
    fit("kd", "run", "--val_data", "none", "--dry_run")
    assert "validation" not in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(train, training_files, prepared, fit, tmp_path, capsys):
    with pytest.raises(
        InputError, match="--early_stopping: no rows to measure training on were found; give --val_data"
    ):
        train("sft", "run", "--early_stopping", 2)
    with pytest.raises(InputError, match="--eval_steps: only with --val_data; leave out"):
        train("sft", "run", "--val_data", "none", "--eval_steps", 2)
    with pytest.raises(InputError, match=r"--eval_steps 0 \(at least 1\)"):
        train("sft", "run", "--eval_steps", 0)
    with pytest.raises(InputError, match=r"row 1 has \d+ tokens, --max_length is 100; raise it"):
        long = write_lines(tmp_path / "long.jsonl", [{"input": "Debt" * 50, "output": "Good"}])
        train("sft", "run", "--val_data", long, "--max_length", 100)
    with pytest.raises(InputError, match=r'no.jsonl: line 1 needs "output"'):
        train("sft", "run", "--val_data", write_lines(tmp_path / "no.jsonl", [{"input": "a"}]))
    with pytest.raises(InputError, match="is the validation part of prepared data; take the calibration part"):
        train("sft", "run", "--val_data", write_lines(tmp_path / "x_validation.jsonl", [row_of("sft")]))
    with pytest.raises(InputError, match="is the calibration part of prepared data; take the training part"):
        read_data(str(prepared / "creditmix_val.jsonl"), ("input", "output"))
    assert not (tmp_path / "run").exists()
    (other := tmp_path / "other").mkdir()
    note = json.loads((prepare(other) / "creditmix_prepared.json").read_text())
    (other / "creditmix_prepared.json").write_text(json.dumps(note | {"split_seed": 1}))
    with pytest.raises(InputError, match=r"val.jsonl: is of another split than .*creditmix_sft.jsonl: rows"):
        fit("sft", "run", "--val_data", other / "creditmix_val.jsonl", "--dry_run")
    fit("sft", "run", "--val_data", prepared / "creditmix_sft.jsonl", "--dry_run")
    assert "24 of 24 rows of" in capsys.readouterr().err  # they are the training rows
    mixed = write_lines(tmp_path / "mixed.jsonl", [*gold_rows(3), {"input": "Age: 1", "output": "good"}])
    fit("sft", "run", "--val_data", mixed, "--dry_run")
    assert "note: 1 of 4 rows of" in (err := capsys.readouterr().err) and "val_loss alone is measured" in err


@pytest.mark.parametrize("balanced", [True, False])
def test_creditmix_prepare_writes_calibration_customers(balanced, tmp_path):
    raw, task = tmp_path / "raw.json", tmp_path / "task.json"
    rows = credit_rows(customers=600, months=1)
    rows = [row for i, row in enumerate(rows) if balanced or row["answer"] != "Bad" or i % 2]
    raw.write_text(json.dumps(rows))
    task.write_text(json.dumps(TASK.record | {"balanced": balanced}))
    argv = ["--src", raw, "--task", task, "--outdir", tmp_path]
    assert creditmix_prepare.main([str(flag) for flag in argv]) == 0
    part = {TASK.prompt(row["question"]): split_of(row["customer_id"], 0, TASK.validation_share) for row in rows}
    val = read_lines(tmp_path / "creditmix_val.jsonl")
    assert {part[row["input"]] for row in val} == {"calibration"} and len(val) > 20
    counts = [sum(row["output"] == label for row in val) for label in TASK.labels]
    assert (len(set(counts)) == 1) == balanced
    assert preparation(str(tmp_path / "creditmix_val.jsonl"))["part"] == "calibration"
    for method in METHODS:
        data = str(tmp_path / f"creditmix_{method}.jsonl")
        assert validation.val_file("auto", data, preparation(data)) == str(tmp_path / "creditmix_val.jsonl")


def test_labels_that_may_not_be_used_measure_nothing(tmp_path):
    (tmp_path / "raw.json").write_text(json.dumps(credit_rows(customers=600, months=1)))
    argv = ["--src", tmp_path / "raw.json", "--gold_share", 0.3, "--outdir"]
    assert creditmix_prepare.main([str(flag) for flag in [*argv, tmp_path / "few"]]) == 0
    assert 0 < len(read_lines(tmp_path / "few" / "creditmix_val.jsonl")) < 40  # of some 60


def test_idp_prepare_holds_out_groups_on_request(tmp_path):
    schema = {"type": "object", "properties": {"total": {"type": "number"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    rows = [{"document": f"d{i}", "company": f"C{i % 40}", "expected": {"total": i}} for i in range(120)]
    source = write_lines(tmp_path / "src.jsonl", rows)
    argv = ["--src", source, "--schema", tmp_path / "s.json", "--group", "company", "--outdir"]
    for name, flags in (("plain", []), ("dev", ["--dev_share", 0.2])):
        assert idp_prepare.main([str(flag) for flag in [*argv, tmp_path / name, *flags]]) == 0
    assert not (tmp_path / "plain" / "idp_val.jsonl").exists()
    names = ("sft", "val", "validation")
    sft, val, held = (
        {row["input" if "input" in row else "document"] for row in read_lines(tmp_path / "dev" / f"idp_{n}.jsonl")}
        for n in names
    )
    before = {row["input"] for row in read_lines(tmp_path / "plain" / "idp_sft.jsonl")}
    assert (
        val
        and sft | val == before
        and not sft & val
        and held == {row["document"] for row in read_lines(tmp_path / "plain" / "idp_validation.jsonl")}
    )
    data = str(tmp_path / "dev" / "idp_sft.jsonl")
    assert validation.val_file("auto", data, preparation(data)) == str(tmp_path / "dev" / "idp_val.jsonl")
    with pytest.raises(InputError, match="--val_share and --dev_share are shares with a sum below 1"):
        idp_prepare.main([str(flag) for flag in [*argv, tmp_path / "no", "--dev_share", 0.8]])


def test_a_short_training_is_not_measured_unasked(fit):
    """Its measure could take longer than it does."""
    assert not values(fit("sft", "short"), "val_loss")
