"""Merge an adapter into its base and save a plain model folder, which any program that reads such folders can load.

Departures from merging in place: the base is loaded in bf16, never in NF4 (a merge into 4-bit weights rounds the
adapter away), and one that bitsandbytes has quantised is dequantised first; the folder, and a GGUF file of it, is
loaded again and scores a sample, as the adapter does, to measure what the export changed.
Where the base does not fit the GPU, CUDA_VISIBLE_DEVICES= exports on the CPU.

    python export_adapter.py --model_dir runs/creditmix_sft --save_dir runs/creditmix_sft_merged
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import InputError, PromptEncoder, add_adapters
from distil import exports
from distil.cli import new_parser, refuse_unused, run_script
from distil.files import check_folder, hold, read_jsonl, write_json
from distil.models import LoadOptions, ModelRef, check_unchanged, load, model_fingerprint, resolve
from distil.processes import only_one
from distil.runs import run_record
from distil.scoring import FastLabelScorer
from distil.splits import EXPORTED, provenance
from distil.tasks import PROMPTS, TASK_FILE, document_record, model_task

if TYPE_CHECKING:
    import numpy as np

FIELDS = ("input|prompt", "output|teacher_output|chosen")  # of the data of any of the trainers
MOST_LABELS = 10  # a sample with at most this many different answers is a label task; others are compared by NLL


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", required=True, help="adapter folder")
    add("--save_dir", required=True, help="model folder to write")
    rows = 'JSONL of {"input", "output"}, or other training rows, to compare on (default: those of its training)'
    add("--sample", help=rows)
    add("--rows", type=int, default=200, help="first rows of it to compare; 0: none (%(default)s)")
    add("--batch_size", type=int, default=32, help="rows scored in one forward (%(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier export in --save_dir")
    add("--gguf", choices=exports.GGUF_TYPES, help="write a GGUF file for llama.cpp and Ollama too")
    add("--llama_cpp", default="llama.cpp", help="folder of llama.cpp with its converter (%(default)s)")
    return parser


def read_sample(ref: ModelRef, sample: str | None, count: int) -> list[tuple[str, str]]:
    """Return (input, answer) of the first `count` rows of a file, by default the adapter's data. Raises InputError."""
    if not count:
        return []
    source = sample or run_record(ref.adapter).get("data", {}).get("file", "")
    if not sample and not Path(source).is_file():
        raise InputError(f"{ref.name}: its training data are not here; give rows with --sample, or --rows 0")
    rows = read_jsonl(source, FIELDS)[:count]
    first, second = ([next(row[n] for n in names.split("|") if n in row) for row in rows] for names in FIELDS)
    return list(zip(first, second, strict=True))


def sample_scores(
    ref: ModelRef, quantization: str, rows: list[tuple[str, str]], batch_size: int, gguf: str | None = None
) -> np.ndarray:
    """Return the mean log-probability per token of the sample's labels [N, labels], or of each own answer [N, 1].
    gguf: the file in the model's folder to take the weights from."""
    import numpy as np

    gc.collect()  # of the model before, which may be in a circle
    options = LoadOptions(quantization, "bfloat16")
    model, tokenizer = exports.load_gguf(Path(ref.path), gguf) if gguf else load(ref, options, notes=False)
    encoder, answers = PromptEncoder(tokenizer), sorted({answer for _, answer in rows})
    task = model_task(ref)
    few = len(answers) <= MOST_LABELS and len(answers) < len(rows)  # if all differ they are texts, not labels
    if (task and set(answers) <= set(task.labels)) or few:
        forms, how = {a: [a] for a in answers}, {"label_tokens": task.label_tokens} if task else {}
        scorer = FastLabelScorer(model, encoder, forms, batch_size=batch_size, **how)
        return scorer.raw_scores([prompt for prompt, _ in rows], Path(ref.name).name)
    scorer, scores = FastLabelScorer(model, encoder, {"answer": ["x"]}), []
    for prompt, answer in rows:
        scorer.form_ids = [encoder.text(answer)]  # a new scorer would check the model for each
        scores.append(scorer.raw_scores([prompt]))
    return np.concatenate(scores)


def merge(ref: ModelRef, folder: Path) -> None:
    """Write the merged model, computed in bf16, and its tokenizer into a folder. A base that
    bitsandbytes has quantised is dequantised first."""
    options = LoadOptions("none", "bfloat16")
    if exports.quantised_by(ref.path):
        base, tokenizer = load(resolve(ref.base), options, notes=False)
        model = add_adapters(base.dequantize(), {"default": str(ref.adapter)}, trainable=True)
    else:
        model, tokenizer = load(ref, options, trainable=True, notes=False)
    merged: Any = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.config.update({EXPORTED: provenance(ref.name).record})
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exports.rewrite_for_readers(folder, ref.path)


def check_target(ref: ModelRef, save_dir: Path, overwrite: bool) -> None:
    """Raise InputError where the export would replace anything but an earlier export."""
    for name, folder in (("adapter", ref.name), ("base", ref.base)):
        if save_dir.resolve() == Path(folder).resolve():
            raise InputError(f"--save_dir {save_dir} is the {name} itself; choose another folder")
    if not save_dir.exists() or (save_dir.is_dir() and not any(save_dir.iterdir())):
        check_folder(save_dir.parent)
    elif not (save_dir / "export.json").is_file():
        raise InputError(f"{save_dir}: is not an earlier export; choose another folder")
    elif not overwrite:
        raise InputError(f"{save_dir}: an export is here; replace it with --overwrite or choose another folder")


def compare(
    ref: ModelRef, merged: ModelRef, rows: list[tuple[str, str]], batch_size: int, gguf: str | None
) -> dict[str, Any]:
    """Return how the merged model's scores of the rows differ from the adapter's on either base, and those of its GGUF
    file from its own: largest and mean difference, and the share of rows with the same best label."""
    report: dict[str, Any] = {"adapter": ref.name, "fingerprint": model_fingerprint(ref)}
    report |= provenance(ref.name).record
    if not rows:
        return report
    after = sample_scores(merged, "none", rows, batch_size)
    report["rows"] = len(rows)
    bases = {"NF4": "none"} if exports.quantised_by(ref.path) else {"bf16": "none", "NF4": "nf4"}
    for name, quantization in bases.items():
        before = sample_scores(ref, quantization, rows, batch_size)
        report[f"change from adapter on {name} base"] = change(before, after)
    if gguf:
        try:
            report["change by GGUF"] = change(after, sample_scores(merged, "none", rows, batch_size, gguf))
        except Exception as error:  # transformers reads GGUF files of some architectures alone
            report["change by GGUF"] = f"not measured: {' '.join(str(error).split())[:120]}"
    return report


def change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Return how far two score tables [N, labels] are apart, rounded."""
    gap = abs(after - before)
    found = {"largest": float(gap.max()), "mean": float(gap.mean())}
    if after.shape[1] > 1:
        found["same_label"] = float((before.argmax(axis=1) == after.argmax(axis=1)).mean())
    return {key: round(value, 4) for key, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    only_one("the export")
    unused = {"--rows 0 compares none": [] if args.rows else ["sample", "batch_size"]}
    refuse_unused(parser, argv, unused | {"only with --gguf": [] if args.gguf else ["llama_cpp"]})
    ref = resolve(args.model_dir)
    if not ref.adapter:
        raise InputError(f"{args.model_dir}: not an adapter folder; there is nothing to merge")
    if args.rows < 0 or args.batch_size < 1:
        raise InputError("--rows is at least 0, --batch_size at least 1")
    save_dir = Path(args.save_dir)
    with hold(save_dir):
        check_target(ref, save_dir, args.overwrite)
        rows = read_sample(ref, args.sample, args.rows)
        exports.check_export(ref.path, args.gguf, args.llama_cpp)
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_dir.parent, prefix=save_dir.name + ".") as folder:
            new = Path(folder) / "new"
            merge(ref, new)
            file = f"{save_dir.name}-{args.gguf}.gguf" if args.gguf else None
            if file:
                exports.write_gguf(new, file, args.gguf, args.llama_cpp)
            report = compare(ref, resolve(str(new)), rows, args.batch_size, file)
            check_unchanged(ref)
            task = model_task(ref)
            exports.write_notes(new, save_dir.name, ref.name, ref.base, file, task and task.record)
            if record := task.record if task else document_record(ref):
                write_json(new / TASK_FILE, record | PROMPTS)
            write_json(new / "export.json", report)
            if save_dir.exists():
                save_dir.rename(Path(folder) / "old")
            new.rename(save_dir)
    print(json.dumps(report, indent=2))
    note = "written; calibrate it again (--quantization none) before its probabilities are used"
    print(f"{save_dir}: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
