"""What a merged folder needs in other programs: configuration that readers of transformers 4 and 5 agree on, a GGUF
file, an Ollama Modelfile, and notes on serving and calibration."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SYSTEM_PROMPT, InputError, PromptEncoder
from distil.cards import write_card
from distil.files import read_json, write_json
from distil.runs import run_record
from distil.support import context_length

CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = ("q8_0", "q4_k_m", "bf16")
NOT_KEPT = ("quantization_config", "auto_map", "_name_or_path", "chat_template", "extra_special_tokens")
MODELFILE = '''FROM ./{file}
TEMPLATE """{before}{{{{ .Prompt }}}}{after}"""
PARAMETER stop "{stop}"
PARAMETER temperature 0
PARAMETER num_ctx {context}
'''


def base_config(path: str) -> dict[str, Any]:
    """Return config.json of a base model (local folder or hub id) as its publisher wrote it."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(path)[0]


def quantised_by(path: str) -> str | None:
    """Return the method that a base model's weights are quantised by, None for plain weights."""
    config = base_config(path)
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return found.get("quant_method", "bitsandbytes") if found else None


def config_for_readers(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return config.json as transformers 5 saved it, with what readers of transformers 4 look for: fields of the
    base's own file that are gone, and the rotary base where only `rope_parameters` has it (else they take 10,000)."""
    parts = (own, own.get("text_config") or {})
    own = next((part for part in parts if part.get("model_type") == saved.get("model_type")), {})
    config = {key: value for key, value in own.items() if key not in NOT_KEPT} | saved
    for key, value in saved.items():
        if isinstance(value, dict) and "model_type" in value:
            config[key] = config_for_readers(value, own.get(key) or {})
    if "dtype" in saved:
        config["torch_dtype"] = saved["dtype"]
    rope = saved.get("rope_parameters") or {}
    full, local = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    names = ("rotary_emb_base", "rotary_pct") if saved.get("model_type") == "gpt_neox" else ()
    base, share = names or ("rope_theta", "partial_rotary_factor")
    found = {base: full.get("rope_theta"), share: rope.get("partial_rotary_factor")}
    found["rope_local_base_freq"] = local.get("rope_theta")
    if (kind := full.get("rope_type", "default")) == "longrope":  # transformers 4 takes these three fields alone
        found["rope_scaling"] = {"type": kind} | {key: full[key] for key in ("short_factor", "long_factor")}
    elif kind in ("linear", "dynamic", "yarn", "llama3") and (full is rope or "gemma3" in saved["model_type"]):
        found["rope_scaling"] = {key: value for key, value in full.items() if key not in (*found, "type")}
    return {key: value for key, value in found.items() if value is not None} | config


def tokenizer_for_readers(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json as transformers 5 saved it, with the base's own class and fields."""
    config = {key: value for key, value in own.items() if key not in NOT_KEPT} | saved
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if isinstance(extra := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra  # a list under the other name ends transformers 4
    config["tokenizer_class"] = own.get("tokenizer_class") or "TokenizersBackend"
    if config["tokenizer_class"] == "TokenizersBackend":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    return config


def rewrite_for_readers(folder: Path, base: str) -> None:
    """Rewrite the configuration files of a saved model by the functions above. base: path of its base."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    own = base_config(base)
    write_json(folder / "config.json", config_for_readers(read_json(folder / "config.json"), own))
    file = folder / "tokenizer_config.json"
    write_json(file, tokenizer_for_readers(read_json(file), get_tokenizer_config(base)))


# ------------------------------------------------------------------------------------------------------------- GGUF


def quantiser(llama_cpp: str) -> str | None:
    """Return the program llama-quantize of a llama.cpp folder, else of the PATH, else None."""
    return shutil.which("llama-quantize", path=f"{llama_cpp}/build/bin") or shutil.which("llama-quantize")


def run_tool(*command: str | Path) -> None:
    """Run a program of llama.cpp quietly, a script by this Python. Raises InputError with its last line."""
    python = [sys.executable] if str(command[0]).endswith(".py") else []
    done = subprocess.run([*python, *map(str, command)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = ["no reason is given", *(line.strip() for line in done.stderr.splitlines() if line.strip())][-1][:200]
        fix = "; install it with pip" if "No module named" in last else ""
        raise InputError(f"{Path(command[0]).name} fails: {last}{fix}")


def check_export(path: str, kind: str | None, llama_cpp: str) -> None:
    """Raise InputError, before weights are loaded, where a base (local folder or hub id) cannot be merged into or a
    GGUF file cannot be written: it is quantised by another program than bitsandbytes, a program is missing, or the
    converter, which gets configuration and tokenizer without weights, does not know them."""
    from transformers import AutoConfig, AutoTokenizer

    if (method := quantised_by(path)) not in (None, "bitsandbytes"):
        fix = "train on the unquantised base, and export with it"
        raise InputError(f"{path}: quantised by {method}; a merge would round the adapter away: {fix}")
    if not kind:
        return
    converter = Path(llama_cpp) / CONVERTER
    if not converter.is_file():
        get = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
        raise InputError(f"--llama_cpp {llama_cpp}: {CONVERTER} is missing; get it with {get}")
    if kind == "q4_k_m" and not quantiser(llama_cpp):
        build = f"cmake -S {llama_cpp} -B {llama_cpp}/build && cmake --build {llama_cpp}/build --target llama-quantize"
        raise InputError(f"--gguf q4_k_m needs llama-quantize, on the PATH or built: {build}; q8_0 needs none")
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.from_pretrained(path).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
        run_tool(converter, folder, "--vocab-only", "--outfile", f"{folder}/x.gguf")


def write_gguf(folder: Path, file: str, kind: str, llama_cpp: str) -> None:
    """Write a GGUF file into a model folder: bf16 and q8_0 by the converter, q4_k_m by the quantiser from bf16."""
    direct = kind != "q4_k_m"
    plain = folder / (file if direct else "bf16.gguf")
    run_tool(Path(llama_cpp) / CONVERTER, folder, "--outfile", plain, "--outtype", kind if direct else "bf16")
    if not direct:
        run_tool(str(quantiser(llama_cpp)), plain, folder / file, kind.upper())
        plain.unlink()


def load_gguf(folder: Path, file: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a folder with the weights of its GGUF file, dequantised to bf16. Raises what
    transformers does where it cannot read it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **how).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def write_notes(
    folder: Path, name: str, adapter: str, base: str, file: str | None, task: dict[str, Any] | None = None
) -> None:
    """Write README.md and, where there is a GGUF file, an Ollama Modelfile with the prompt that training used; without
    the beginning-of-text token where the tokenizer, and so the engine, puts it before every text. task: of labels, as
    its file has it."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder, slot = PromptEncoder(tokenizer), "THE-TEXT-OF-THE-USER"  # also for tokenizers without rare characters
    context = min(context_length(AutoConfig.from_pretrained(folder).get_text_config()), 8192)
    same = {"file": file, "context": context, "stop": encoder.end_of_turn}
    if file:
        prompt = tokenizer.decode(encoder.prompt(slot), clean_up_tokenization_spaces=False)
        if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            prompt = prompt.removeprefix(tokenizer.bos_token)
        parts = prompt.partition(slot)  # signs that mean something in a Modelfile are written as values
        before, _, after = (re.sub('{{|"', lambda sign: f"{{{{ {json.dumps(sign[0])} }}}}", part) for part in parts)
        (folder / "Modelfile").write_text(MODELFILE.format(before=before, after=after, **same), encoding="utf-8")
    serve = same | {"adapter": Path(adapter).name, "system": SYSTEM_PROMPT}
    write_card(folder, name, run_record(adapter) | {"base_model": base}, task, serve)
