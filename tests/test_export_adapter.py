"""export_adapter.py: the merged folder answers as the adapter on its unquantised base does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import export_adapter
from common import InputError, PromptEncoder
from distil.exports import config_for_readers, tokenizer_for_readers
from distil.files import write_json
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
    """Also one that begins with a line end, and one of a third of the context."""
    rows = [row | {"output": f"Debt {n}"} for n, row in enumerate(ROWS + ROWS)]
    rows[0]["output"], rows[1]["output"] = "\nDebt", "Debt" * 160
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


# ------------------------------------------------------------------------------------------- readers of other programs


def test_an_export_has_the_fields_that_readers_of_transformers_4_look_for(adapter, model_dir, tmp_path):
    """Without `rope_theta` they take 10,000 and say nothing; a class that they do not know ends them."""
    from transformers import AutoConfig

    own = json.loads((Path(model_dir) / "config.json").read_text())
    assert "rope_theta" not in own and own["rope_parameters"]["rope_theta"]
    merged = Path(export(adapter, tmp_path / "merged"))
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == own["rope_parameters"]["rope_theta"] and config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(merged).rope_parameters == own["rope_parameters"]
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in tokenizer
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["do_sample"] is False and generation["eos_token_id"] == config["eos_token_id"] == 2
    assert (merged / "chat_template.jinja").read_text() == (Path(model_dir) / "chat_template.jinja").read_text()


LINEAR = {"rope_type": "linear", "factor": 8.0}
LONG = {"short_factor": [1.0], "long_factor": [2.0]}
ROPES = [  # rope_parameters of transformers 5; fields of transformers 4
    ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    ("llama", LINEAR | {"rope_theta": 9e3}, {"rope_theta": 9e3, "rope_scaling": LINEAR}),
    ("gpt_neox", {"rope_theta": 7.0, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 7.0, "rotary_pct": 0.5}),
    (
        "phi3",
        {"rope_type": "longrope", "type": "longrope", "rope_theta": 2e4, "original_max_position_embeddings": 4} | LONG,
        {"rope_theta": 2e4, "rope_scaling": {"type": "longrope"} | LONG},
    ),
    (
        "gemma3_text",
        {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 77.0}},
        {"rope_theta": 1e6, "rope_local_base_freq": 77.0, "rope_scaling": LINEAR},
    ),
]


@pytest.mark.parametrize(("name", "rope", "wanted"), ROPES)
def test_rotary_parameters_have_their_earlier_names_too(name, rope, wanted):
    saved = {"model_type": name, "rope_parameters": rope}
    assert config_for_readers(saved, {}) == saved | wanted
    shell = {"model_type": "shell", "text_config": saved}
    assert config_for_readers(shell, {})["text_config"] == saved | wanted


NAMES = (
    "cohere2 gemma2 gemma3_text gemma4_text gpt_neox granite lfm2 llama mistral olmo2 olmo3 phi3 qwen3 qwen3_5_text"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_earlier_names_change_nothing_for_transformers_5(name, tmp_path):
    """A top-level `rope_scaling` takes the place of `rope_parameters` there, also of those for each type of layer."""
    from transformers import AutoConfig

    rope = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}} if name == "llama" else {}
    AutoConfig.for_model(name, **rope).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", changed := config_for_readers(saved, {}))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == before.rope_parameters
    assert changed != saved and ("rope_scaling" in changed) == bool(rope)


def test_fields_of_the_base_are_kept_but_not_those_that_the_export_changes():
    own = {"model_type": "llama", "rope_theta": 3.0, "rope_scaling": None, "torch_dtype": "float16", "eos_token_id": 7}
    own |= {"quantization_config": {}, "auto_map": {"AutoModel": "code.py"}}
    saved = {"model_type": "llama", "dtype": "bfloat16", "eos_token_id": 2, "rope_parameters": {"rope_theta": 3.0}}
    kept = {"rope_theta": 3.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert config_for_readers(saved, own) == config_for_readers(saved, {"text_config": own}) == saved | kept
    own = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "chat_template": "x", "pad_token": "a"}
    saved = {
        "tokenizer_class": "TokenizersBackend",
        "pad_token": "b",
        "extra_special_tokens": ["<x>"],
        "is_local": True,
    }
    wanted = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "pad_token": "b"}
    assert tokenizer_for_readers(saved, own) == wanted | {"additional_special_tokens": ["<x>"]}


# ------------------------------------------------------------------------------------------------- quantised bases


def test_a_base_in_4_bits_is_dequantised_before_the_merge(model_dir, tmp_path):
    base = tmp_path / "base-bnb-4bit"
    model, tokenizer = load_named(model_dir, "nf4", "float32")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", str(base))
    merged = export(adapter, tmp_path / "merged")
    model, _ = load_named(merged, "none", "float32")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((Path(merged) / "config.json").read_text())
    before, after = scores(adapter), scores(merged)
    assert abs(before - scores(str(base))).max() > 5 * abs(after - before).max()  # the adapter is in it


def test_a_base_that_another_program_quantised_is_refused_before_it_is_loaded(adapter, model_dir, tmp_path):
    import shutil

    base = shutil.copytree(model_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    stored = json.loads((Path(adapter) / "adapter_config.json").read_text())
    write_json(Path(adapter) / "adapter_config.json", stored | {"base_model_name_or_path": str(base)})
    with pytest.raises(InputError, match="quantised by gptq; a merge would round the adapter away: train on the unq"):
        export(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------------- GGUF

CONVERTER = """
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf

flags = dict(zip(sys.argv[-4::2], sys.argv[-3::2]))
config = SimpleNamespace(**json.loads((Path(sys.argv[1]) / "config.json").read_text()))
writer = gguf.GGUFWriter(flags["--outfile"], "qwen2")
names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk"}
writer.add_block_count(config.num_hidden_layers)
writer.add_context_length(config.max_position_embeddings)
writer.add_embedding_length(config.hidden_size)
writer.add_feed_forward_length(config.intermediate_size)
writer.add_head_count(config.num_attention_heads)
writer.add_head_count_kv(config.num_key_value_heads)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
writer.add_vocab_size(config.vocab_size)
if "--vocab-only" not in sys.argv:
    from safetensors.torch import load_file

    for name, tensor in load_file(Path(sys.argv[1]) / "model.safetensors").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType[flags["--outtype"].upper() if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
elif config.architectures != ["Qwen2ForCausalLM"]:
    sys.exit("Model x is not supported")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
"""


@pytest.fixture
def llama_cpp(tmp_path) -> str:
    """Return a folder like llama.cpp's, with a converter for Qwen2 alone and a quantiser that copies."""
    folder = tmp_path / "llama.cpp"
    programs = {
        "convert_hf_to_gguf.py": CONVERTER,
        "build/bin/llama-quantize": "#!/bin/sh\ntest $3 = Q4_K_M; cp $1 $2\n",
    }
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(("kind", "largest"), [("bf16", 0.0), ("q8_0", 1.0), ("q4_k_m", 0.0)])
def test_a_gguf_file_is_written_and_read_back(kind, largest, adapter, sample, llama_cpp, tmp_path, capsys):
    """Its difference is that of its type: none from bf16, which the copying quantiser keeps."""
    merged, flags = tmp_path / "merged", ["--gguf", kind, "--llama_cpp", llama_cpp]
    assert export_adapter.main(["--model_dir", adapter, "--save_dir", str(merged), "--sample", sample, *flags]) == 0
    change = json.loads(capsys.readouterr().out)["change by GGUF"]
    assert change["largest"] <= largest and (change["largest"] > 0) == (largest > 0) and change["same_label"] > 0.5
    assert [path.name for path in merged.glob("*.gguf")] == [f"merged-{kind}.gguf"]
    written = (merged / "Modelfile").read_text()
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert f'{before}{{{{ .Prompt }}}}{after}"""' in written and 'PARAMETER stop "<|im_end|>"' in written
    assert f"FROM ./merged-{kind}.gguf" in written and "PARAMETER num_ctx 512" in written
    readme = (merged / "README.md").read_text()
    assert (
        "vllm serve merged" in readme and f"llama-server -m merged/merged-{kind}.gguf --alias merged -c 512" in readme
    )


def test_an_ollama_prompt_has_the_beginning_of_text_once(adapter, model_dir, tmp_path):
    """The engine adds it where the tokenizer does; braces of a template stay text there."""
    from tokenizers import processors

    from distil.exports import write_notes
    from distil.testing import CHATML, build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("'\\n'", "' {{x}}\\n'", 1)
    folder = Path(export(adapter, tmp_path / "merged"))
    for start in ("", "<|endoftext|>"):
        if not start:
            single = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
            tokenizer.backend_tokenizer.post_processor = single
        else:
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
        tokenizer.save_pretrained(folder)
        write_notes(folder, "name", "adapter", "base", "x.gguf")
        assert f'TEMPLATE """{start}<|im_start|>system' in (folder / "Modelfile").read_text()


def test_quotes_and_braces_of_a_template_are_text_in_a_modelfile(adapter, tmp_path):
    from distil.exports import write_notes
    from distil.testing import CHATML, build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML.replace("'<|im_end|>", '\'"""{{<|im_end|>')
    folder = Path(export(adapter, tmp_path / "merged"))
    tokenizer.save_pretrained(folder)
    write_notes(folder, "name", "adapter", "base", "x.gguf")
    _, template, rest = (folder / "Modelfile").read_text().split('"""')
    assert rest.startswith("\nPARAMETER stop")
    quotes = '{{ "\\"" }}' * 3
    assert template.partition("{{ .Prompt }}")[2].startswith(quotes + '{{ "{{" }}<|im_end|>')


def test_the_calibration_of_the_adapter_is_not_taken_along(adapter, tmp_path):
    (Path(adapter) / "calibration.json").write_text("{}")
    merged = Path(export(adapter, tmp_path / "merged"))
    assert not (merged / "calibration.json").exists() and not (merged / "Modelfile").exists()
    readme = (merged / "README.md").read_text()
    assert "calibrated = raw - prior + bias" in readme and "softmax(calibrated / temperature)" in readme
    assert "eval_creditmix.py --model_dir merged --quantization none --fit" in readme


def test_what_a_gguf_file_needs_is_checked_before_weights_are_loaded(adapter, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr(export_adapter, "load", None)
    argv = ["--model_dir", adapter, "--save_dir", str(tmp_path / "out"), "--rows", "0", "--llama_cpp", llama_cpp]
    with pytest.raises(InputError, match="--llama_cpp: only with --gguf"):
        export_adapter.main(argv)
    monkeypatch.setenv("PATH", os.defpath)
    (Path(llama_cpp) / "build/bin/llama-quantize").unlink()
    with pytest.raises(InputError, match=r"needs llama-quantize, on the PATH or built: cmake -S .*q8_0 needs none"):
        export_adapter.main([*argv, "--gguf", "q4_k_m"])
    script = Path(llama_cpp) / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.replace("Qwen2ForCausalLM", "Other"))
    with pytest.raises(InputError, match=r"convert_hf_to_gguf.py fails: Model x is not supported"):
        export_adapter.main([*argv, "--gguf", "q8_0"])
    script.write_text("import module_that_is_not_here")
    with pytest.raises(InputError, match=r"No module named 'module_that_is_not_here'; install it with pip"):
        export_adapter.main([*argv, "--gguf", "q8_0"])
    script.unlink()
    with pytest.raises(InputError, match=r"convert_hf_to_gguf.py is missing; get it with git clone"):
        export_adapter.main([*argv, "--gguf", "bf16"])
    assert not (tmp_path / "out").exists()
