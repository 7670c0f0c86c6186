"""doctor.py: each fault that is put in is found, and its fix is printed."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import doctor
from distil.tasks import default_task
from distil.testing import ROOT


@pytest.fixture
def lines(model_dir, capsys):
    """Return the doctor's exit status and its lines by the name of the check."""

    def lines(student: str = model_dir, *flags: str) -> tuple[int, dict[str, str]]:
        status = doctor.main(["--student", student, *flags])
        checks, name = {}, ""
        for line in capsys.readouterr().out.splitlines():
            name = line[9:18].strip() if line[0] != " " else name
            checks[name] = checks.get(name, "") + line
        return status, checks

    return lines


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """Make a machine with room, so that only the fault of the test is reported."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=80e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9))
    monkeypatch.setattr(doctor, "version", dict(doctor_pins()).__getitem__)


def doctor_pins() -> list[tuple[str, str]]:
    rows = (line.strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def test_a_sound_machine_has_no_problem(lines):
    status, checks = lines()
    assert status == 0 and not [line for line in checks.values() if "PROBLEM" in line]
    assert set(checks) == {"packages", "gpu", "4bit", "memory", "disk", "model", "labels"}


def test_a_package_of_another_version(lines, monkeypatch):
    pins = dict(doctor_pins()) | {"peft": "0.9.0"}
    monkeypatch.setattr(doctor, "version", pins.__getitem__)
    status, checks = lines()
    assert status == 1 and "PROBLEM" in checks["packages"] and "peft 0.9.0 (tested: " in checks["packages"]
    assert "requirements.txt" in checks["packages"].split("fix:")[1]


def test_little_memory_under_wsl2(lines, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4e9))
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    status, checks = lines()
    assert status == 1 and "4.0 GB" in checks["memory"] and ".wslconfig" in checks["memory"].split("fix:")[1]


def test_a_package_that_does_not_load(lines, monkeypatch):
    """The other checks run nevertheless."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    status, checks = lines()
    assert status == 1 and "PROBLEM" in checks["4bit"] and "requirements.txt" in checks["4bit"].split("fix:")[1]
    assert checks["labels"].startswith("ok")


def test_a_full_disk(lines, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    status, checks = lines()
    assert status == 1 and "2.0 GB free" in checks["disk"] and "HF_HOME" in checks["disk"].split("fix:")[1]


@pytest.mark.parametrize(
    ("shown", "status", "found_words", "fix"),
    [
        ("GPU 0: NVIDIA GeForce RTX 3070 (UUID: GPU-1)", 0, "RTX 3070", "CUDA build"),
        ("NVIDIA-SMI has failed: no communication with the driver", 9, "has failed", "update the driver"),
    ],
    ids=["unused", "broken"],
)
def test_a_gpu_that_pytorch_does_not_use(lines, monkeypatch, tmp_path, shown, status, found_words, fix):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{shown}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found_status, checks = lines()
    assert found_status == 1 and found_words in checks["gpu"] and fix in checks["gpu"].split("fix:")[1]


def test_4bit_that_packs_wrongly(lines, monkeypatch):
    import bitsandbytes.functional

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    status, checks = lines()
    assert status == 1 and "off by" in checks["4bit"] and "bitsandbytes" in checks["4bit"].split("fix:")[1]


def test_a_model_that_is_not_there(lines, tmp_path):
    status, checks = lines(str(tmp_path / "none"))
    assert status == 1 and "none" in checks["model"]
    assert "labels" not in checks  # no second problem, whose fix would not help


def test_labels_of_another_task(lines, tmp_path, model_dir):
    record = default_task().record | {"labels": ["Good", "Qqqzzz 77x", "Bad"]}
    (tmp_path / "task.json").write_text(json.dumps(record))
    status, checks = lines(model_dir, "--task", str(tmp_path / "task.json"))
    assert status == 0 and re.search("Good, Qqqzzz 77x, Bad: stable, 1 to [0-9]+ tokens", checks["labels"])
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copy(tmp_path / "task.json", tmp_path / "model")
    assert "Qqqzzz 77x" in lines(str(tmp_path / "model"))[1]["labels"]  # the student's own


def test_a_model_that_is_not_supported(lines, tmp_path, model_dir):
    """Found from its configuration; no weights are read."""
    from transformers import AutoConfig

    folder = shutil.copytree(model_dir, tmp_path / "model")
    AutoConfig.for_model("deepseek_v32").save_pretrained(folder)
    status, checks = lines(str(folder))
    assert status == 1 and "deepseek_v32 models are not supported (layers with a sparse index" in checks["model"]
    assert "take a causal language model such as Llama" in checks["model"]


def test_a_chat_template_that_cannot_be_used(lines, tmp_path, model_dir, tokenizer):
    import copy

    folder, other = shutil.copytree(model_dir, tmp_path / "model"), copy.deepcopy(tokenizer)
    other.chat_template += "{{ messages[-1]['content'] }}"
    other.save_pretrained(folder)
    status, checks = lines(str(folder))
    assert status == 1 and "its chat template has not the user's text once" in checks["labels"]
