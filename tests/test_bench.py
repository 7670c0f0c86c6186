"""The benches that only read scores run on a tiny model: hours of scoring must not end in a crash."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import calibrators, remedies, train
from common import InputError, PromptEncoder


def test_remedies_are_measured_from_one_scoring(tmp_path, monkeypatch, credit_file, capsys):
    rng = np.random.default_rng(0)
    words = sum(map(len, remedies.FORMS.values()))
    monkeypatch.setattr(
        remedies, "form_scores", lambda _, texts: {name: rng.normal(size=(len(t), words)) for name, t in texts.items()}
    )
    output = tmp_path / "remedies.json"
    flags = ["--model_dir", "x", "--data", credit_file, "--val_per_class", "20", "--output", str(output)]
    assert remedies.main(flags) == 0
    (results,) = json.loads(output.read_text()).values()
    names = [result["model"] for result in results]
    assert names[0] == "none" and "three words, mean + bias and temperature" in names and len(names) == 15
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert results[1]["difference"]["to"] == "none" and 0 <= results[-1]["accuracy"] <= 1


def test_calibrators_are_compared_on_other_customers(model_dir, credit_file, capsys):
    flags = ["--model_dir", model_dir, "--data", credit_file, "--val_per_class", "20", "--repeats", "2"]
    assert calibrators.main([*flags, "--customers", "10", "20", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out).values()
    assert list(table) == ["10", "20"] and list(table["10"]) == list(calibrators.WAYS)
    assert all(ways[way]["best"] <= ways[way]["mean"] <= ways[way]["worst"] for ways in table.values() for way in ways)
    with pytest.raises(InputError, match=r"less than the \d+ drawn"):
        calibrators.main([*flags, "--customers", "9999"])


def test_the_training_bench_gives_both_sides_the_same_tokens(tmp_path, tokenizer):
    rows = [SimpleNamespace(features="Age: 31", label="Good"), SimpleNamespace(features="Age: 50", label="Bad")]
    train.write_data(rows, encoder := PromptEncoder(tokenizer), tmp_path)
    theirs = [json.loads(line) for line in (tmp_path / "dpo" / "train.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    for own, other in zip(ours, theirs, strict=True):
        text = other["prompt"] + other["chosen"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encoder.prompt(own["prompt"]) + encoder.completion(own["chosen"])
