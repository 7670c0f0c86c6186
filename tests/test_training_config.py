"""--config: flags from a JSON or YAML file, and the replay of a run from its run.json."""

from __future__ import annotations

import json

import pytest
from conftest import METHODS, adapter_tensors, assert_same_tensors, run_json, trainer

import kd_train
from common import InputError
from distil.files import file_sha256


def flags_of(*argv: str):
    return kd_train.build_parser().parse_args(list(argv))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"epochs": 3, "learning_rate": 1e-3, "report_to": null, "dry_run": true, "optimizer": "sgd"}'),
        ("c.yaml", "epochs: 3\nlearning_rate: 1e-3\nreport_to:\ndry_run: true\noptimizer: sgd\n"),
    ],
)
def test_flags_come_from_a_file_and_the_command_line_wins(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    flags = flags_of("--config", str(tmp_path / name), "--optimizer", "adamw_torch")
    assert (flags.epochs, flags.learning_rate, flags.dry_run) == (3.0, 1e-3, True)
    assert (flags.optimizer, flags.report_to, flags.batch_size) == ("adamw_torch", "none", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "'epoch' is no flag of this script; 'epochs' is"),
        ("beta: 1", "'beta' is no flag of this script"),
        ("config: c.yaml", "'config' is no flag"),
        ("gradient_checkpointing: off", "False is no value of --gradient_checkpointing; quote"),
        ("dry_run: yes please", "'yes please' is no value of --dry_run"),
        ("epochs: [1, 2]", "is no value of --epochs"),
        ("- epochs", "flags by name are expected, such as epochs: 2, not list"),
        ("epochs: {", "not YAML"),
        ("", "not NoneType"),
    ],
)
def test_a_file_with_anything_else_is_refused(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        flags_of("--config", str(tmp_path / "c.yaml"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_of_a_file_are_checked_as_those_of_the_command_line(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"epochs": "many"}')
    with pytest.raises(SystemExit) as ended:
        flags_of("--config", str(tmp_path / "c.json"))
    assert ended.value.code == 2 and "argument --epochs: invalid float value: 'many'" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        flags_of("--config", str(tmp_path / "none.json"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_repeated_from_its_record(method, train, tmp_path):
    first = train(method, "first", "--lora_r", 4, "--seed", 3)
    again = tmp_path / "again"
    assert trainer(method).main(["--config", str(first / "run.json"), "--save_dir", str(again)]) == 0
    assert_same_tensors(adapter_tensors(first), adapter_tensors(again), atol=0)
    one, other = run_json(first), run_json(again)
    assert one["flags"] | {"save_dir": ""} == other["flags"] | {"save_dir": ""}
    record = json.loads((first / "run.json").read_text())
    assert record["flags"]["lora_r"] == 4 and record["flags"]["seed"] == 3


def test_a_run_is_not_repeated_into_the_default_folder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"base_model": "m", "flags": {"save_dir": "runs/x", "seed": 1}}))
    with pytest.raises(InputError, match="give --save_dir"):
        trainer("sft").build_parser().parse_args(["--config", str(tmp_path / "run.json")])


def test_data_that_changed_since_a_run_is_reported(tmp_path, capsys):
    (data := tmp_path / "a.jsonl").write_text("{}\n")
    for sha256, said in ((file_sha256(data), False), ("0" * 64, True)):
        record = {"base_model": "m", "flags": {"data": str(data)}, "data": {"sha256": sha256}}
        (tmp_path / "run.json").write_text(json.dumps(record))
        trainer("sft").build_parser().parse_args(["--config", str(tmp_path / "run.json"), "--save_dir", "again"])
        assert ("other content" in capsys.readouterr().err) == said
