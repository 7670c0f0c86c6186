"""The flags that trainers share: defaults by the student's size, recipes, ranges, what an adapter decides."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, fields

import pytest
from conftest import METHODS, adapter_tensors, assert_same_tensors, refused, row_of, run_json, trainer
from torch.nn import DataParallel
from trl import SFTConfig

import dpo_train
import kd_train
import sft_train
from common import LORA_TARGETS, InputError, lora_config
from distil import runs
from distil.models import ModelRef
from distil.training import flags, loss
from distil.training.data import TrainingData
from distil.training.flags import TrainOptions, train_options

# Flags that one trainer alone has, and those that two share.
OWN = {"sft": set(), "kd": {"kd_alpha", "kd_temperature", "adapter"}, "dpo": {"beta", "sft_weight", "adapter"}}
# What differs on purpose: the data and where it goes; the student, which kd and dpo can take from their adapter; the
# learning rate that a help text names, since DPO needs smaller steps.
DIFFERENT = {"student": {"default", "help"}, "data": {"default", "help"}, "save_dir": {"default"}}
DIFFERENT |= {"learning_rate": {"help"}, "epochs": {"help"}, "batch_size": {"help"}}


def parts(action) -> dict:
    names = ("option_strings", "dest", "nargs", "const", "default", "type", "choices", "help", "required")
    return {name: getattr(action, name) for name in names} | {"kind": type(action)}


def test_trainers_share_their_flags():
    actions = {name: trainer(name).build_parser()._actions for name in METHODS}
    shared = {
        name: [parts(action) for action in flags if action.dest not in OWN[name]] for name, flags in actions.items()
    }
    for name in ("kd", "dpo"):
        assert [flag["dest"] for flag in shared[name]] == [flag["dest"] for flag in shared["sft"]]
        for ours, theirs in zip(shared["sft"], shared[name], strict=True):
            unlike = {key for key in ours if ours[key] != theirs[key]}
            assert unlike <= DIFFERENT.get(ours["dest"], set()), (name, ours["dest"], unlike)
    unlike = {
        action["dest"]: {key for key in action if action[key] != other[key]}
        for action, other in zip(shared["kd"], shared["dpo"], strict=True)
    }
    only = {"data", "save_dir", "learning_rate", "batch_size", "epochs"}
    assert {name for name, keys in unlike.items() if keys} == only
    for name, own in OWN.items():
        assert own <= {action.dest for action in actions[name]}


def test_trainers_share_their_recipes():
    """Defaults that depend on the student's size: KD needs one pass with larger steps, SFT two; DPO takes smaller
    steps, and a pair of it is two sequences."""
    assert sft_train.SMALL | {"epochs": 1.0, "learning_rate": 2e-3} == kd_train.SMALL
    assert sft_train.LARGE == kd_train.LARGE
    for size in ("SMALL", "LARGE"):
        sft, dpo = getattr(sft_train, size), getattr(dpo_train, size)
        assert sft.keys() == dpo.keys()
        assert {name for name in sft if sft[name] != dpo[name]} <= {"epochs", "learning_rate", "batch_size"}
        assert dpo["learning_rate"] < sft["learning_rate"]


def test_defaults_are_those_of_the_whitepaper():
    assert sft_train.build_parser().parse_args([]).quantization == "nf4"
    large = sft_train.LARGE
    assert (large["lora_r"], large["lora_alpha"], large["lora_dropout"]) == (16, 32, 0.05)
    assert sft_train.LARGE["batch_size"] == 1
    config = lora_config()
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config.target_modules) == projections


def options_of(method: str, *flags: str, rows: int = 0) -> TrainOptions:
    """Return the options that a trainer makes of flags, for data without a note."""
    script = trainer(method)
    args = script.build_parser().parse_args(list(flags))
    data = TrainingData(args.data, [{}] * rows, "", {})
    kind = {"sft": TrainOptions, "kd": kd_train.KdOptions, "dpo": dpo_train.DpoOptions}[method]
    return train_options(vars(args), script.SMALL, script.LARGE, ModelRef("m", "m", "m"), data, kind)


def test_defaults_follow_the_size_and_yield_to_flags(monkeypatch):
    for parameters, recipe in ((135e6, sft_train.SMALL), (3e9, sft_train.LARGE)):
        monkeypatch.setattr(flags, "parameter_count", lambda path, parameters=parameters: parameters)
        options = options_of("sft", "--batch_size", "5")
        assert {name: getattr(options, name) for name in recipe} == recipe | {"batch_size": 5}


def test_a_small_student_repeats_few_rows(monkeypatch):
    """KD: 150 steps, in at most 5 passes, unless a flag says otherwise."""
    monkeypatch.setattr(flags, "parameter_count", lambda path: 135e6)
    assert [options_of("kd", rows=rows).epochs for rows in (10_000, 2400, 1000, 40)] == [1, 1, 3, 5]
    assert [options_of(method, rows=40).epochs for method in ("sft", "dpo")] == [2, 1]
    assert options_of("kd", "--epochs", "1", rows=40).epochs == 1
    assert options_of("kd", "--batch_size", "auto", rows=1000).epochs == 3
    monkeypatch.setattr(flags, "parameter_count", lambda path: 3e9)
    assert options_of("kd", rows=40).epochs == 1


@pytest.mark.parametrize("method", METHODS)
def test_options_have_every_flag_and_its_default(method, monkeypatch):
    monkeypatch.setattr(flags, "parameter_count", lambda path: 135e6)
    options, parser = options_of(method), trainer(method).build_parser()
    flags_of_a_run = {action.dest for action in parser._actions} - {"help", "config"}
    assert {field.name for field in fields(options)} == flags_of_a_run
    for field in fields(options):
        if field.default is not MISSING and field.name != "student":
            assert field.default == parser.get_default(field.name), field.name


@pytest.mark.parametrize("method", METHODS)
def test_flags_out_of_range_are_refused_all_at_once(method, tmp_path, model_dir):
    flags = ("--batch_size", 0, "--grad_accum", -1, "--lora_r", 0, "--lora_dropout", 1, "--learning_rate", "nan")
    flags += ("--save_steps", 0, "--epochs", 0, "--max_memory_gb", 0)
    message = refused(method, [row_of(method)], tmp_path, model_dir, *flags)
    names = ("batch_size 0", "grad_accum -1", "lora_r 0", "lora_dropout 1", "learning_rate nan", "epochs 0")
    for name in (*names, "max_memory_gb 0.0"):
        assert f"--{name}" in message


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("method", "flag"),
    [("kd", "kd_temperature"), ("kd", "kd_alpha"), ("dpo", "beta"), ("dpo", "sft_weight")]
    + [(method, flag) for method in METHODS for flag in ("learning_rate", "epochs", "lora_dropout")],
)
def test_flags_that_are_not_finite_numbers_are_refused(method, flag, value, tmp_path, model_dir):
    assert f"--{flag}" in refused(method, [row_of(method)], tmp_path, model_dir, f"--{flag}", value)


@pytest.mark.parametrize("flags", [("--kd_alpha", 1.5), ("--kd_alpha", -1), ("--kd_temperature", 0)])
def test_kd_flags_out_of_range_are_refused(flags, tmp_path, model_dir):
    assert f"{flags[0]} {float(flags[1])}" in refused("kd", [row_of("kd")], tmp_path, model_dir, *flags)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("sft", ("--max_steps", 2, "--epochs", 1), "--epochs: only without --max_steps"),
        ("kd", ("--kd_alpha", 0.9), "--kd_alpha: only for token_probs or label_probs, and --data has neither"),
        ("dpo", ("--lora_dropout", 0.1), "--lora_dropout: DPO trains without dropout"),
    ],
)
def test_flags_without_effect_are_refused(method, flags, message, tmp_path, model_dir):
    assert message in refused(method, [row_of(method)], tmp_path, model_dir, *flags)


@pytest.mark.parametrize("method", METHODS)
def test_a_tracker_that_is_not_installed_is_refused(method, tmp_path, model_dir):
    assert "--report_to nonsense: not installed here; possible are: none" in refused(
        method, [row_of(method)], tmp_path, model_dir, "--report_to", "nonsense"
    )


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_the_adapter_to_continue_from_is_not_overwritten(method, training_files, sft_adapter):
    flags = ["--adapter", sft_adapter, "--data", training_files[method], "--save_dir", sft_adapter, "--overwrite"]
    before = adapter_tensors(sft_adapter)
    with pytest.raises(InputError, match="choose another --save_dir"):
        trainer(method).main(flags)
    assert_same_tensors(before, adapter_tensors(sft_adapter), atol=0)


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_an_adapter_of_another_base_is_refused(method, tmp_path, model_dir, sft_adapter):
    argv = (method, [row_of(method)], tmp_path, "some/other-model", "--adapter", sft_adapter)
    assert f"belongs to {model_dir}, not to --student some/other-model" in refused(*argv)
    message = refused(method, [row_of(method)], tmp_path, model_dir, "--adapter", model_dir)
    assert "not an adapter folder" in message


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_lora_settings_are_those_of_the_adapter_to_continue_from(method, train, sft_adapter):
    with pytest.raises(InputError, match=r"--lora_r 8: .*sft has 16; leave it out"):
        train(method, "other", "--adapter", sft_adapter, "--lora_r", 8, base=False)
    recorded = json.loads((train(method, "same", "--adapter", sft_adapter, base=False) / "run.json").read_text())
    assert (recorded["flags"]["lora_r"], recorded["flags"]["lora_dropout"]) == (16, 0.1)


def test_the_adapters_shape_is_that_of_the_flags(train):
    config = json.loads((train("sft", "run", "--lora_r", 4, "--lora_alpha", 12) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def trained_layers(save_dir) -> set[str]:
    """Return the names of the layers that a saved adapter changes."""
    return {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_tensors(save_dir)}


def test_lora_goes_to_the_layers_of_the_flag(train, capsys):
    train("sft", "plan", "--lora_targets", "q_proj, down_proj", "--dry_run")
    plan = capsys.readouterr().out
    save_dir = train("sft", "run", "--lora_targets", "q_proj, down_proj")
    weights = adapter_tensors(save_dir)
    assert trained_layers(save_dir) == {"q_proj", "down_proj"}
    size = sum(weight.numel() for weight in weights.values())
    assert f"trainable parameters {size:,} (LoRA r=16 on q_proj, down_proj, float32)" in plan
    run = run_json(save_dir)
    assert (run["flags"]["lora_targets"], run["lora_targets"]) == ("q_proj, down_proj", ["q_proj", "down_proj"])

    with pytest.raises(InputError, match=r"--lora_targets v_proj: .*run has .*; leave it out"):
        train("kd", "other", "--adapter", save_dir, "--lora_targets", "v_proj", base=False)
    same = train("kd", "same", "--adapter", save_dir, base=False)
    assert trained_layers(same) == {"q_proj", "down_proj"} == set(run_json(same)["lora_targets"])
    again = train("kd", "again", "--config", f"{same}/run.json", base=False)
    assert set(run_json(again)["flags"]["lora_targets"]) == {"q_proj", "down_proj"}
    assert trained_layers(train("sft", "all", "--lora_targets", "all-linear")) == set(LORA_TARGETS)


def test_unknown_layers_are_refused_with_those_that_exist(model_dir, tmp_path):
    message = refused("sft", [row_of("sft")], tmp_path, model_dir, "--lora_targets", "q_proj,qkv,lm_head", "--dry_run")
    exist = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    what = "a qwen2 model has no qkv, lm_head; the layers that can be trained are"
    assert message == f"--lora_targets: {what} {exist}"


def test_one_of_several_gpus_is_used(built, model_dir, training_files, tmp_path, monkeypatch, capsys):
    """Without a launcher: the Trainer would wrap the model, which fails in 4 bits, and double the batch."""

    def seen(**arguments) -> SFTConfig:
        config = SFTConfig(**arguments)
        config._n_gpu = 2  # as it is where two are visible
        return config

    monkeypatch.setattr(loss, "SFTConfig", seen)
    flags = ("--student", model_dir, "--data", training_files["sft"], "--save_dir", tmp_path / "run")
    trainer = built("sft", *flags, "--batch_size", 2)
    assert trainer._train_batch_size == 2
    assert not isinstance(trainer._wrap_model(trainer.model), DataParallel)
    assert "note: one of 2 visible GPUs is used; docs/distributed.md has the launcher" in capsys.readouterr().err


def test_cores_are_counted_where_a_system_knows_no_affinity(monkeypatch):
    """As macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runs.machine()["cores"] == os.cpu_count()
