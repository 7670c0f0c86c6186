"""CreditMix data for the three trainers: cleaned, split by customer, balanced, written from training rows only.

Departures from a plain conversion: numbers are rounded to one short form that inference applies too; the rejected
label of a preference pair is the most probable wrong one, and KD rows carry class probabilities, both by gradient
boosting that never saw the row's customer.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from distil.cli import InputError, add_decimal_flag, gold_share, new_parser, run_script, seed_number
from distil.creditmix.rows import LABELS, CreditRow, balanced_sample, creditmix_prompt, note_anonymous, read_creditmix
from distil.creditmix.tabular import tabular_teacher
from distil.files import check_folder
from distil.splits import is_gold, split_of, write_parts
from distil.teachers.gate import gate
from distil.teachers.tabular import TABULAR


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    raw = (
        'JSON list or JSONL of {"question", "answer", "customer_id"}, or a table (CSV, Excel, Parquet, JSON) with the '
    )
    raw += 'columns of Kaggle\'s "Credit score classification"'
    add("--src", default="data/creditmix_dataset.json", help=f"raw rows: {raw} (%(default)s)")
    add_decimal_flag(add)
    add("--outdir", default="data", help="where creditmix_{sft,kd,dpo}.jsonl are written (%(default)s)")
    add = parser.add_argument_group("sampling").add_argument
    add("--per_class", type=int, default=0, help="training rows a class; 0: as many as the rarest has (%(default)s)")
    near = "share 0..1 of the Standard rows that are near misses (%(default)s)"
    add("--hard_standard", type=float, default=0.0, help=near)
    add("--gold_share", type=gold_share, default=1.0, help="share of customers whose label may be used (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of sampling and order (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the same in every script (%(default)s)")
    return parser


def enrich_standard(
    sample: list[CreditRow], pool: Sequence[CreditRow], probabilities: dict[CreditRow, Any], share: float, seed: int
) -> list[CreditRow]:
    """Return the sample with `share` of its Standard rows replaced by near misses, the narrowest first.
    Near misses are Standard rows of the pool for which another label is more probable. Class sizes do not change."""
    standard = LABELS.index("Standard")
    others = [i for i in range(len(LABELS)) if i != standard]
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


def show_counts(title: str, rows: Sequence[CreditRow]) -> None:
    """Print the number of rows, in total and of each label."""
    counts = Counter(row.label for row in rows)
    print(f"{title:<34}{len(rows):>7}  " + "  ".join(f"{label} {counts[label]}" for label in LABELS))


def training_files(sample: Sequence[CreditRow], by_row: dict[CreditRow, Any]) -> dict[str, list[dict]]:
    """Return {"sft", "kd", "dpo"} rows of a sample; by_row: class probabilities [labels] by the tabular teacher."""
    sft, kd, dpo = [], [], []
    for row in sample:
        prompt, probabilities = creditmix_prompt(row.features), by_row[row]
        wrong = max((label for label in LABELS if label != row.label), key=lambda x: probabilities[LABELS.index(x)])
        soft = {label: round(float(p), 4) for label, p in zip(LABELS, probabilities, strict=True)}
        sft.append({"input": prompt, "output": row.label})
        kd.append({"input": prompt, "teacher_output": row.label, "label_probs": soft})
        dpo.append({"prompt": prompt, "chosen": row.label, "rejected": wrong})
    return {"sft": sft, "kd": kd, "dpo": dpo}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 <= args.hard_standard <= 1 or args.per_class < 0:
        raise InputError("--hard_standard is a share from 0 to 1, --per_class 0 or more")
    check_folder(args.outdir)
    rows, notes = read_creditmix(args.src, args.decimal)
    for text, count in notes.most_common():
        print(f"found {count:>8} x {text}")
    note_anonymous(rows)
    show_counts("rows with a label", rows)
    seed = args.split_seed
    for split in ("train", "calibration", "validation"):
        show_counts(f"  {split}", [row for row in rows if split_of(row.customer, seed) == split])
    train = [row for row in rows if split_of(row.customer, seed) == "train"]
    pool = [row for row in train if is_gold(row.customer, args.gold_share, seed)]
    if args.gold_share < 1:
        show_counts("  train, with a usable label", pool)
    counts = Counter(row.label for row in pool)
    sample = balanced_sample(pool, args.per_class or min(counts[label] for label in LABELS), args.seed)
    print(f"gradient boosting on {len(pool)} training rows, cross-fitted by customer ...", file=sys.stderr)
    by_row = dict(zip(pool, tabular_teacher(pool, [True] * len(pool), args.seed), strict=True))
    if args.hard_standard:
        sample = enrich_standard(sample, pool, by_row, args.hard_standard, args.seed)
    show_counts("balanced training rows written", sample)
    files = training_files(sample, by_row)
    note = {name: getattr(args, name) for name in ("split_seed", "seed", "per_class", "hard_standard", "gold_share")}
    predicted = [max(row["label_probs"], key=row["label_probs"].get) for row in files["kd"]]
    prompts = [row["input"] for row in files["kd"]]
    note["teacher"] = {"name": TABULAR, **gate(predicted, [row.label for row in sample], LABELS, prompts)}
    write_parts(args.outdir, "creditmix", files, args.src, note)
    return 0


if __name__ == "__main__":
    run_script(main)
