"""Write a base model with fewer layers, evenly spaced from its first to its last, as a student that is faster and
starts worse: what half the layers cost is then measured, and what a teacher gives back.

    python -m bench.cut_student --student smollm2-135m --layers 15 --save_dir runs/cut15
    python sft_train.py --student runs/cut15 --data data/idp_sft.jsonl --save_dir runs/idp_sft15
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import InputError
from distil.cards import base_metadata
from distil.cli import new_parser, run_script
from distil.exports import quantised_by
from distil.files import check_folder, hold
from distil.models import check_unchanged, resolve
from distil.support import empty_model


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--student", default="smollm2-135m", help="base model: hub id or local folder (%(default)s)")
    add("--layers", type=int, required=True, help="layers to keep")
    add("--save_dir", required=True, help="model folder to write")
    return parser


def evenly_spaced(count: int, layers: int) -> list[int]:
    """Return the numbers of `count` of a model's layers, the first and the last among them. Raises InputError."""
    if not 2 <= count < layers:
        raise InputError(f"--layers {count}: from 2 to {layers - 1}, as the model has {layers}")
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def cut(name: str, numbers: Sequence[int], folder: Path) -> None:
    """Save a base with these of its layers, with its embeddings, head, tokenizer and generation configuration.
    Raises InputError where its layers do not work without the others or the place that they have."""
    from huggingface_hub import ModelCard, ModelCardData
    from torch.nn import ModuleList
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ref = resolve(name)
    if ref.adapter or quantised_by(ref.path):
        raise InputError(f"{name}: {'an adapter' if ref.adapter else 'quantised'}; give the plain base model")
    model = AutoModelForCausalLM.from_pretrained(ref.path, dtype="auto", use_safetensors=True)
    text, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
    count = text.num_hidden_layers
    lists = [n for n, m in decoder.named_children() if isinstance(m, ModuleList) and len(m) == count]
    if len(lists) != 1 or getattr(text, "num_kv_shared_layers", None):
        reason = "its layers share keys and values" if lists else "it has no list of layers"
        raise InputError(f"{name}: cannot be cut ({reason}); take another model")
    if max(numbers) >= count:
        raise InputError(f"--layers: {name} has {count}")
    kept = ModuleList(getattr(decoder, lists[0])[number] for number in numbers)
    setattr(decoder, lists[0], kept)
    per_layer = [n for n, v in vars(text).items() if isinstance(v, list) and len(v) == count and "token_id" not in n]
    for field in per_layer:  # layer_types and the like
        setattr(text, field, [getattr(text, field)[number] for number in numbers])
    text.num_hidden_layers = len(numbers)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ref.path).save_pretrained(folder)
    text = f"# Cut base model\n\nThe layers {', '.join(map(str, numbers))} of {count} of its base, not trained since."
    ModelCard(f"---\n{ModelCardData(**base_metadata(name)).to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")
    check_unchanged(ref)
    try:
        new = empty_model(str(folder))
    except InputError:
        new = None
    if not new or structure(new) != structure(model):
        raise InputError(f"{name}: cannot be cut (a layer is not the same in another place); take another model")


def structure(model: Any) -> dict[str, Any]:
    """Return what its configuration makes of a model: shapes of weights, and the settings of modules by full name."""
    found: dict[str, Any] = {name: weight.shape for name, weight in model.state_dict().items()}
    for name, module in model.eval().named_modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, (int, float, str, type(None)))}
        found[f"{name}:"] = {n: v for n, v in plain.items() if n[0] != "_" and n not in ("layer_idx", "name_or_path")}
    return found


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    layers = empty_model(resolve(args.student).path).config.get_text_config(decoder=True).num_hidden_layers
    numbers, save_dir = evenly_spaced(args.layers, layers), Path(args.save_dir)
    with hold(save_dir):
        if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
            raise InputError(f"--save_dir {save_dir}: is not empty; choose another folder")
        check_folder(save_dir.parent)
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_dir.parent, prefix=save_dir.name + ".") as folder:
            cut(args.student, numbers, Path(folder) / "new")
            (Path(folder) / "new").rename(save_dir)
    print(f"{save_dir}: layers {', '.join(map(str, numbers))} of {layers} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
