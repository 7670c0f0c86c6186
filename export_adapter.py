"""Merge an adapter into its base and save a plain model folder, which any program that reads such folders can load.

Departures from merging in place: the base is loaded in bf16, never in NF4 (a merge into 4-bit weights rounds the
adapter away); the folder is loaded again and scores a sample beside the adapter it came from, so that what the export
changed is known. Without a GPU of its size set CUDA_VISIBLE_DEVICES= to do it on the CPU.

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

from common import LabelScorer, PromptEncoder
from files import InputError, check_folder, read_jsonl, run_script, write_json
from models import adapter_config, base_of, check_model_name, load_model, model_fingerprint, run_record

if TYPE_CHECKING:
    import numpy as np

from processes import only_one

FIELDS = ("input|prompt", "output|teacher_output|chosen")  # of the data of any of the trainers
MOST_LABELS = 10  # answers of a sample that differ less are labels; the others are compared by their likelihood


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_dir", required=True, help="adapter folder")
    add("--save_dir", required=True, help="model folder to write")
    add(
        "--sample",
        help='JSONL of {"input", "output"}, or other training rows, to compare on (default: those of its training)',
    )
    add("--rows", type=int, default=200, help="first rows of it to compare; 0: none (%(default)s)")
    add("--batch_size", type=int, default=32, help="rows scored in one forward (%(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier export in --save_dir")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def read_sample(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(input, answer) of each row. Raises InputError where there are none."""
    if not args.rows:
        return []
    source = args.sample or run_record(args.model_dir).get("data", {}).get("file", "")
    if not args.sample and not Path(source).is_file():
        raise InputError(f"{args.model_dir}: its training data are not here; name rows with --sample, or --rows 0")
    rows = read_jsonl(source, FIELDS)[: args.rows]
    first, second = ([next(row[n] for n in names.split("|") if n in row) for row in rows] for names in FIELDS)
    return list(zip(first, second, strict=True))


def sample_scores(model_dir: str, quantization: str, rows: list[tuple[str, str]], batch_size: int) -> np.ndarray:
    """Mean log-probability per token [N, labels] of the sample's labels, or [N, 1] of each row's own answer."""
    import numpy as np

    model, tokenizer = load_model(model_dir, quantization, "bfloat16")
    encoder, answers = PromptEncoder(tokenizer), sorted({answer for _, answer in rows})
    if len(answers) <= MOST_LABELS and len(answers) < len(rows):  # all different: texts, not labels
        scorer = LabelScorer(model, encoder, {a: [a] for a in answers}, batch_size=batch_size)
        scores = scorer.raw_scores([prompt for prompt, _ in rows], Path(model_dir).name)
    else:
        own = ((LabelScorer(model, encoder, {"answer": [answer]}), prompt) for prompt, answer in rows)
        scores = np.concatenate([scorer.raw_scores([prompt]) for scorer, prompt in own])
    del model
    gc.collect()
    return scores


def difference(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Of scores [N, labels]: the largest and the mean difference, and the share of rows with the same best label."""
    import numpy as np

    report = {"largest": float(np.abs(after - before).max()), "mean": float(np.abs(after - before).mean())}
    if before.shape[1] > 1:
        report["same_label"] = float((before.argmax(axis=1) == after.argmax(axis=1)).mean())
    return {name: round(value, 4) for name, value in report.items()}


def merge(model_dir: str, folder: Path) -> None:
    """Write the merged model and its tokenizer into a folder; all of it is computed in bf16."""
    model, tokenizer = load_model(model_dir, "none", "bfloat16", trainable=True)
    merged: Any = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_target(save_dir: Path, args: argparse.Namespace) -> None:
    """Raises InputError where the export would take the place of anything but an earlier export."""
    for name, folder in (("adapter", args.model_dir), ("base", base_of(args.model_dir))):
        if save_dir.resolve() == Path(folder).resolve():
            raise InputError(f"--save_dir {save_dir} is the {name} itself; choose another folder")
    if not save_dir.exists() or (save_dir.is_dir() and not any(save_dir.iterdir())):
        check_folder(save_dir.parent)
    elif not (save_dir / "export.json").is_file():
        raise InputError(f"{save_dir}: is no earlier export; choose another folder")
    elif not args.overwrite:
        raise InputError(f"{save_dir}: an export is here; replace it with --overwrite or choose another folder")


def compare(args: argparse.Namespace, merged: str, rows: list[tuple[str, str]]) -> dict[str, Any]:
    """Differences between the merged model's scores of the rows and those of the adapter on either base."""
    report: dict[str, Any] = {"adapter": args.model_dir, "fingerprint": model_fingerprint(args.model_dir)}
    if rows:
        after = sample_scores(merged, "none", rows, args.batch_size)
        report["rows"] = len(rows)
        for name, quantization in (("adapter on bf16 base", "none"), ("adapter on NF4 base", "nf4")):
            before = sample_scores(args.model_dir, quantization, rows, args.batch_size)
            report[f"change from {name}"] = difference(before, after)
    return report


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    only_one("the export")
    check_model_name(args.model_dir)
    if not adapter_config(args.model_dir):
        raise InputError(f"{args.model_dir}: not an adapter folder; there is nothing to merge")
    if args.rows < 0 or args.batch_size < 1:
        raise InputError("--rows is at least 0, --batch_size at least 1")
    save_dir = Path(args.save_dir)
    check_target(save_dir, args)
    rows = read_sample(args)

    save_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_dir.parent, prefix=save_dir.name + ".") as folder:
        new = Path(folder) / "new"
        merge(args.model_dir, new)
        report = compare(args, str(new), rows)
        write_json(new / "export.json", report)
        if save_dir.exists():
            save_dir.rename(Path(folder) / "old")
        new.rename(save_dir)
    print(json.dumps(report, indent=2))
    print(
        f"{save_dir}: written; calibrate it anew (--quantization none) before its probabilities are used",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    run_script(main)
