"""Label data for the three trainers: cleaned, split by customer, balanced, written from training rows only; and rows
of calibration customers to measure trainings by.

CreditMix is the default; a task file describes any other labels and columns, and --init_task drafts one from a table.

Departures from a plain conversion: numbers are rounded to one short form that inference applies too; the rejected
label of a preference pair is the most probable wrong one, and KD rows carry class probabilities, both by gradient
boosting that never saw the row's customer.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --init_task runs/loans/task.json --src loans.csv --label_column status
    python creditmix_prepare.py --task runs/loans/task.json --src loans.csv --outdir runs/loans
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distil import cli
from distil.cli import InputError
from distil.creditmix.draft import draft_task, task_lines, write_draft
from distil.creditmix.rows import CreditRow, balanced_sample, note_anonymous, read_rows, sample_rows
from distil.creditmix.tabular import tabular_teacher
from distil.files import check_folder
from distil.splits import is_gold, write_parts
from distil.tasks import Task, chosen_task
from distil.teachers.gate import gate
from distil.teachers.tabular import teacher_name

VAL_ROWS = 200  # enough to see a training turn; a measure takes about as long as training on 140 rows


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    raw = 'raw rows: JSON list or JSONL of {"question", "answer", "customer_id"}, or a table (CSV, Excel, Parquet, '
    add("--src", default="data/creditmix_dataset.json", help=f"{raw}JSON) with the task's columns (%(default)s)")
    cli.add_decimal_flag(add)
    cli.add_task_flag(add)
    add("--outdir", default="data", help="where <task>_{sft,kd,dpo,val}.jsonl are written (%(default)s)")
    add = parser.add_argument_group("draft of a task").add_argument
    add("--init_task", metavar="FILE", help="write a task file for the table --src to look at, and nothing else")
    add("--label_column", metavar="NAME", help="with --init_task: the column to predict")
    group = "with --init_task: the column whose rows stay together in the split, such as a customer's number"
    add("--group_column", metavar="NAME", help=group)
    add = parser.add_argument_group("sampling").add_argument
    rows = "training rows a class; 0: as many as the rarest has, or all where the task is not balanced (%(default)s)"
    add("--per_class", type=int, default=0, help=rows)
    near = "share 0..1 of the Standard rows that are near misses (%(default)s)"
    add("--hard_standard", type=float, default=0.0, help=near)
    share = "share of customers whose label may be used (%(default)s)"
    add("--gold_share", type=cli.gold_share, default=1.0, help=share)
    add("--seed", type=cli.seed_number, default=0, help="of sampling and order (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the same in every script (%(default)s)")
    return parser


def enrich_standard(
    sample: list[CreditRow],
    pool: Sequence[CreditRow],
    probabilities: dict[CreditRow, Any],
    labels: Sequence[str],
    share: float,
    seed: int,
) -> list[CreditRow]:
    """Return the sample with `share` of its Standard rows replaced by near misses, the narrowest first.
    Near misses are Standard rows of the pool for which another label is more probable. Class sizes do not change."""
    standard = labels.index("Standard")
    others = [i for i in range(len(labels)) if i != standard]
    margin = {row: probabilities[row][others].max() - probabilities[row][standard] for row in pool}
    # Each once and in the pool's order: the order of a set would differ from process to process where margins tie.
    near = sorted(dict.fromkeys(row for row in pool if row.label == "Standard" and margin[row] > 0), key=margin.get)
    rows = [row for row in sample if row.label == "Standard"]
    wanted = round(share * len(rows))
    if wanted > len(near):
        raise InputError(f"--hard_standard {share}: {wanted} near misses requested, {len(near)} exist; lower it")
    hard, rng = near[:wanted], random.Random(seed)
    ordinary = [row for row in rows if row not in set(hard)]
    chosen = hard + rng.sample(ordinary, min(len(ordinary), len(rows) - wanted))
    chosen += rng.choices(ordinary, k=len(rows) - len(chosen)) if len(chosen) < len(rows) else []
    result = [row for row in sample if row.label != "Standard"] + chosen
    rng.shuffle(result)
    return result


def validation_rows(rows: Sequence[CreditRow], task: Task, seed: int) -> list[dict]:
    """Return at most VAL_ROWS rows with right answers to measure trainings by, as many of each label where the task is
    balanced and there are any. rows: of calibration customers, with usable labels."""
    counts = Counter(row.label for row in rows)
    fewest = min(counts[label] for label in task.labels)
    if task.balanced and fewest:
        rows = balanced_sample(rows, task.labels, min(fewest, max(1, VAL_ROWS // len(task.labels))), seed)
    chosen = random.Random(seed).sample(rows, min(len(rows), VAL_ROWS))
    return [{"input": task.prompt(row.features), "output": row.label} for row in chosen]


def show_counts(title: str, rows: Sequence[CreditRow], labels: Sequence[str]) -> None:
    """Print the number of rows, in total and of each label, or of the rarest and the most frequent of many."""
    counts = Counter(row.label for row in rows)
    shown = labels
    if len(labels) > 10:
        order = sorted(labels, key=lambda label: counts[label])
        shown = [*order[:2], "...", *order[-2:]]
    print(f"{title:<34}{len(rows):>7}  " + "  ".join(f"{label} {counts.get(label, '')}" for label in shown))


def training_files(sample: Sequence[CreditRow], by_row: dict[CreditRow, Any], task: Task) -> dict[str, list[dict]]:
    """Return {"sft", "kd", "dpo"} rows of a sample; by_row: class probabilities [labels] by the tabular teacher."""
    sft, kd, dpo, labels = [], [], [], task.labels
    for row in sample:
        prompt, probabilities = task.prompt(row.features), by_row[row]
        wrong = max((label for label in labels if label != row.label), key=lambda x: probabilities[labels.index(x)])
        soft = {label: round(float(p), 4) for label, p in zip(labels, probabilities, strict=True)}
        sft.append({"input": prompt, "output": row.label})
        kd.append({"input": prompt, "teacher_output": row.label, "label_probs": soft})
        dpo.append({"prompt": prompt, "chosen": row.label, "rejected": wrong})
    return {"sft": sft, "kd": kd, "dpo": dpo}


def write_task(args: argparse.Namespace) -> int:
    """Write the draft of a task file and print what it guesses; return the exit status."""
    name = re.sub(r"[^a-z0-9]+", "_", Path(args.src).name.partition(".")[0].lower()).strip("_")[:40] or "task"
    task, guesses = draft_task(args.src, name, args.label_column, args.group_column, args.decimal)
    write_draft(args.init_task, task)
    print(*task_lines(task), sep="\n")
    print("guessed, look at these:")
    for guess in guesses:
        print(f"- {guess}")
    decimal = f" --decimal {args.decimal}" if args.decimal else ""
    then = f"python creditmix_prepare.py --task {args.init_task} --src {args.src}{decimal} --outdir DIR"
    print(f"wrote {args.init_task}; then: {then}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    if args.init_task:
        if not args.label_column:
            raise InputError("--init_task needs --label_column, the column to predict")
        sampling = ["per_class", "hard_standard", "gold_share", "seed", "split_seed"]
        cli.refuse_unused(parser, argv, {"not with --init_task, which writes no rows": ["task", "outdir", *sampling]})
        return write_task(args)
    cli.refuse_unused(parser, argv, {"only with --init_task": ["label_column", "group_column"]})
    if not 0 <= args.hard_standard <= 1 or args.per_class < 0:
        raise InputError("--hard_standard is a share from 0 to 1, --per_class 0 or more")
    task = chosen_task([], args.task)
    if args.hard_standard and not (task.balanced and "Standard" in task.labels):
        raise InputError("--hard_standard is for balanced tasks with a label Standard; leave it out")
    check_folder(args.outdir)
    rows, notes = read_rows(args.src, task, args.decimal)
    for text, count in notes.most_common():
        print(f"found {count:>8} x {text}")
    note_anonymous(rows, task)
    if protected := ", ".join(field.name for field in task.fields if field.protected):
        print(f"note: prompts have what the law may protect: {protected}", file=sys.stderr)
    show_counts("rows with a label", rows, task.labels)
    seed = args.split_seed
    for split in ("train", "calibration", "validation"):
        show_counts(f"  {split}", [row for row in rows if task.part_of(row.customer, seed) == split], task.labels)
    train = [row for row in rows if task.part_of(row.customer, seed) == "train"]
    pool = [row for row in train if is_gold(row.customer, args.gold_share, seed)]
    if args.gold_share < 1:
        show_counts("  train, with a usable label", pool, task.labels)
    sample = sample_rows(pool, task, args.per_class, args.seed)
    teacher = "TF-IDF with logistic regression" if task.text_column else "gradient boosting"
    print(f"{teacher} on {len(pool)} training rows, cross-fitted by customer ...", file=sys.stderr)
    by_row = dict(zip(pool, tabular_teacher(pool, [True] * len(pool), args.seed, task), strict=True))
    if args.hard_standard:
        sample = enrich_standard(sample, pool, by_row, task.labels, args.hard_standard, args.seed)
    show_counts(f"{'balanced ' * task.balanced}training rows written", sample, task.labels)
    files = training_files(sample, by_row, task)
    val = [row for row in rows if task.part_of(row.customer, seed) == "calibration"]
    val = validation_rows([row for row in val if is_gold(row.customer, args.gold_share, seed)], task, args.seed)
    note = {name: getattr(args, name) for name in ("split_seed", "seed", "per_class", "hard_standard", "gold_share")}
    predicted = [max(row["label_probs"], key=row["label_probs"].get) for row in files["kd"]]
    prompts = [row["input"] for row in files["kd"]]
    report = gate(predicted, [row.label for row in sample], task.labels, prompts, task)
    note["teacher"] = {"name": teacher_name(task), **report}
    note["task"] = task.record
    write_parts(args.outdir, task.name, files | ({"val": val} if val else {}), args.src, note)
    return 0


if __name__ == "__main__":
    cli.run_script(main)
