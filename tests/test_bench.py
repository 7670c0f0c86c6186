"""The benches that only read scores run on a tiny model: hours of scoring must not end in a crash."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM

from bench import calibrators, cut_student, remedies, train
from common import InputError, PromptEncoder
from distil.testing import ROOT, load_named


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


WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def deep_model(folder, tokenizer, architecture: str, **fields) -> str:
    """Save a random model of six layers, of which each does much, with its tokenizer; return its folder."""
    torch.manual_seed(0)
    size = {"num_hidden_layers": 6, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = AutoConfig.for_model(architecture, **WIDTHS, **size, initializer_range=0.3, **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def cut_to(layers: int, student: str, folder) -> int:
    return cut_student.main(["--student", student, "--layers", str(layers), "--save_dir", str(folder)])


def test_a_cut_student_is_the_base_without_the_layers_between(tmp_path, tokenizer):
    base = deep_model(tmp_path / "base", tokenizer, "llama", tie_word_embeddings=True)
    assert cut_to(3, base, tmp_path / "runs" / "cut") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cut"]
    student, own = load_named(str(tmp_path / "runs" / "cut"), "none", "float32")
    model, _ = load_named(base, "none", "float32")
    assert len(student.model.layers) == 3 and student.config.num_hidden_layers == 3
    ids = {"input_ids": torch.tensor([PromptEncoder(own).prompt("Age: 31")])}
    model.model.layers = ModuleList(model.model.layers[number] for number in (0, 2, 5))
    torch.testing.assert_close(student(**ids).logits, model(**ids, use_cache=False).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "runs" / "cut" / "generation_config.json").is_file()
    packed, _ = load_named(str(tmp_path / "runs" / "cut"), "nf4", "float32")
    assert packed.model.layers[2].mlp.up_proj.weight.dtype == torch.uint8 and packed(**ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "name", "values"),
    [("gemma3_text", "layer_types", ["sliding_attention", "full_attention"]), ("smollm3", "no_rope_layers", [1, 0])],
)
def test_settings_of_each_layer_are_cut_with_it(tmp_path, tokenizer, architecture, name, values):
    values = [values[number] for number in (0, 0, 1, 1, 0, 0)]
    base = deep_model(tmp_path / "base", tokenizer, architecture, pad_token_id=0, **{name: values})
    assert cut_to(3, base, tmp_path / "cut") == 0
    assert getattr(AutoConfig.from_pretrained(tmp_path / "cut"), name) == [values[number] for number in (0, 2, 5)]


def test_students_that_cannot_be_cut_are_refused(tmp_path, tokenizer):
    base = deep_model(tmp_path / "base", tokenizer, "llama")
    for layers in (-1, 1, 6, 7):
        with pytest.raises(InputError, match=rf"--layers {layers}: from 2 to 5, as the model has 6"):
            cut_to(layers, base, tmp_path / "cut")
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    shared["layer_types"] = ["sliding_attention", "full_attention"] * 3
    shares = deep_model(tmp_path / "shares", tokenizer, "gemma4_text", **shared)
    with pytest.raises(InputError, match="its layers share keys and values"):
        cut_to(3, shares, tmp_path / "cut")
    placed = deep_model(tmp_path / "placed", tokenizer, "diffllama")  # a constant of a layer follows from its place
    with pytest.raises(InputError, match="a layer is not the same in another place"):
        cut_to(3, placed, tmp_path / "cut")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        cut_to(3, base, tmp_path / "full")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_every_bench_can_be_imported(path):
    importlib.import_module(f"bench.{path.stem}")
