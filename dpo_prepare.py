"""Preference pairs from the student itself: its answers, judged by the task's own check, the best against the worst.

Departures from pairing a gold answer with a random one: both answers are the student's own, so the pair lies where its
probability lies. For label tasks the rejected label is the student's most likely wrong one. Pairs without contrast are
dropped and counted.

    python dpo_prepare.py --task label --model_dir runs/creditmix_sft --input data/creditmix_sft.jsonl --output a.jsonl
    python dpo_prepare.py --task json --model_dir runs/idp_sft --input data/idp_sft.jsonl --output b.jsonl
    python dpo_prepare.py --task code --model_dir runs/codegen_sft --input tasks.jsonl --output c.jsonl
"""

from __future__ import annotations

import argparse
import sys
from math import inf
from pathlib import Path

from distil.batch import check_output
from distil.cli import add_loading_flags, new_parser, refuse_unused, run_script, seed_number
from distil.files import InputError, hashed, hold, read_jsonl, write_jsonl
from distil.models import check_model_name, model_fingerprint, resolve
from distil.processes import only_one
from distil.splits import check_note, joined, note_preparation, provenance, recorded, unchanged_preparation
from distil.tasks import data_task, shared_task
from distil.teachers.answers import teacher_options
from distil.teachers.preferences import PairOptions, judged_pairs, label_pairs

KINDS = ("label", "json", "code")


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("student and prompts").add_argument
    add("--model_dir", required=True, help="the student: adapter folder, model folder or base model")
    how = "how answers are judged: label, json, code, or a label task's JSON file (label: as noted next to --input)"
    add("--task", metavar="label|json|code|FILE", required=True, help=how)
    add("--input", required=True, help='JSONL of {"input", "output"} with the right answer; code: tasks with tests')
    add("--output", required=True, help='JSONL to write: {"prompt", "chosen", "rejected"}')
    add("--overwrite", action="store_true", help="replace --output and forget an interrupted run's answers")
    add("--schema", default="data/idp_schema.json", help="JSON Schema of the answers, for --task json (%(default)s)")
    add = parser.add_argument_group("answers").add_argument
    add("--n", type=int, default=4, help="answers sampled for each prompt, not for --task label (%(default)s)")
    add("--gold", action="store_true", help="let the right answer be one of those to choose from")
    add("--temperature", type=float, default=0.8, help="of the samples (%(default)s)")
    add("--max_new_tokens", type=int, default=384, help="of an answer (%(default)s)")
    add("--batch_size", type=int, default=16, help="answers written together (%(default)s)")
    add("--seconds", type=float, default=5.0, help="code and its tests may run (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of the samples (%(default)s)")
    add_loading_flags(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for flags that are out of range, an unknown student, or an output that is in the way."""
    if min(args.max_new_tokens, args.batch_size) < 1 or not all(0 < x < inf for x in (args.temperature, args.seconds)):
        raise InputError("--max_new_tokens, --batch_size: at least 1; --temperature, --seconds: finite and above 0")
    if args.n + args.gold < 2 and args.task in KINDS[1:]:
        raise InputError("--n is at least 2, or 1 with --gold: a pair needs two answers")
    check_output(Path(args.output), args.overwrite)
    check_note(args.output)
    check_model_name(args.model_dir)


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    only_one("making pairs")
    with hold(args.output):
        kind, task_file = (args.task, None) if args.task in KINDS else ("label", args.task)
        check_flags(args)
        task = data_task(args.input, task_file) if kind == "label" else None
        sampled = ["n", "gold", "temperature", "max_new_tokens", "seed"]
        belong = {"json": ["schema"], "code": ["seconds"], "json or code": sampled}
        unused = {f"only for --task {kinds}": names for kinds, names in belong.items() if kind not in kinds.split()}
        refuse_unused(parser, argv, unused)
        needed = () if kind == "code" else ("input", "output")
        rows, sha256 = hashed(args.input, lambda: read_jsonl(args.input, needed))
        ref = resolve(args.model_dir)
        task = shared_task([ref], task, args.input) if kind == "label" else None
        scored = {"label_tokens": task.label_tokens} if task else {}
        options = teacher_options(vars(args) | scored | {"task": kind}, sha256, PairOptions)
        note = unchanged_preparation(args.input, options.input_sha256) | ({"task": task.record} if task else {})
        origin = joined(recorded(args.input, note), provenance(args.model_dir))
        if kind == "label":
            file, prompts = None, [row["input"] for row in rows]
            pairs = label_pairs(rows, ref, options, task.labels if task else ())
        else:
            file, prompts, pairs = judged_pairs(rows, ref, options)
        lines = [
            {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}
            for prompt, pair in zip(prompts, pairs, strict=True)
            if pair and pair[0].strip() and pair[1].strip()
        ]
        dropped = len(rows) - len(lines)
        print(f"{dropped} of {len(rows)} prompts dropped: no right or no worse answer", file=sys.stderr)
        if not lines:
            raise InputError("no pair has contrast; raise --n or --temperature, or add --gold")
        write_jsonl(args.output, lines)
        note_preparation(args.output, note, origin, student=model_fingerprint(ref))
        if file:
            file.remove()
    print(f"wrote {len(lines)} pairs to {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
