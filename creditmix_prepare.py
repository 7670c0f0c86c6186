"""CreditMix data for the three trainers: cleaned, split by customer, balanced, written from training rows only.

Departures from a plain conversion: numbers are rounded to one short form that inference applies too; the rejected
label of a preference pair is the most plausible wrong one, and KD rows carry class probabilities, both by gradient
boosting that never saw the row's customer.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from creditmix import (
    LABELS,
    CreditRow,
    balanced_sample,
    creditmix_prompt,
    gold_known,
    gold_share,
    read_creditmix,
    tabular_teacher,
)
from files import InputError, check_folder, run_script, seed_number, split_of, write_parts
from kd_prepare import TABULAR, gate


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add(
        "--src",
        default="data/creditmix_dataset.json",
        help='raw rows: JSON list or JSONL of {"question", "answer", "customer_id"}, or the Kaggle "Credit score '
        'classification" CSV (%(default)s)',
    )
    add("--outdir", default="data", help="where creditmix_{sft,kd,dpo}.jsonl are written (%(default)s)")
    add = parser.add_argument_group("sampling").add_argument
    add("--per_class", type=int, default=0, help="training rows a class; 0: as many as the rarest has (%(default)s)")
    add(
        "--hard_standard",
        type=float,
        default=0.0,
        help="share 0..1 of the Standard rows that are near misses (%(default)s)",
    )
    add("--gold_share", type=gold_share, default=1.0, help="share of customers whose label may be used (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of sampling and order (%(default)s)")
    add("--split_seed", type=int, default=0, help="of the split by customer; the same in every script (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def enrich_standard(
    sample: list[CreditRow],
    pool: Sequence[CreditRow],
    probabilities: dict[CreditRow, np.ndarray],
    share: float,
    seed: int,
) -> list[CreditRow]:
    """Replace `share` of the sample's Standard rows by near misses: Standard rows of the pool for which another label
    is more plausible, the narrowest first. The class sizes stay as they are."""
    standard = LABELS.index("Standard")
    margin = {row: np.delete(probabilities[row], standard).max() - probabilities[row][standard] for row in pool}
    # Each once and in the pool's order: the order of a set would differ from process to process where margins tie.
    near = dict.fromkeys(row for row in pool if row.label == "Standard" and margin[row] > 0)
    near = sorted(near, key=lambda row: margin[row])
    rng = random.Random(seed)
    rows = [row for row in sample if row.label == "Standard"]
    wanted = round(share * len(rows))
    if wanted > len(near):
        raise InputError(f"--hard_standard {share}: {wanted} near misses wanted, {len(near)} found; lower it")
    hard = near[:wanted]
    ordinary = [row for row in rows if row not in set(hard)]
    chosen = hard + rng.sample(ordinary, min(len(ordinary), len(rows) - wanted))
    chosen += rng.choices(ordinary, k=len(rows) - len(chosen)) if len(chosen) < len(rows) else []
    result = [row for row in sample if row.label != "Standard"] + chosen
    rng.shuffle(result)
    return result


def show_counts(title: str, rows: Sequence[CreditRow]) -> None:
    counts = Counter(row.label for row in rows)
    print(f"{title:<34}{len(rows):>7}  " + "  ".join(f"{label} {counts[label]}" for label in LABELS))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 <= args.hard_standard <= 1 or args.per_class < 0:
        raise InputError("--hard_standard is a share from 0 to 1, --per_class 0 or more")
    check_folder(args.outdir)
    rows, notes = read_creditmix(args.src)
    for text, count in notes.most_common():
        print(f"cleaned {count:>6} x {text}")
    if anonymous := sum(row.customer == row.features for row in rows):
        print(
            f"note: {anonymous} rows name no customer, each text counts as one: rows of one person may be on both "
            "sides of the split, and all figures too good",
            file=sys.stderr,
        )
    show_counts("rows with a label", rows)
    for split in ("train", "calibration", "validation"):
        show_counts(f"  {split}", [row for row in rows if split_of(row.customer, args.split_seed) == split])
    pool = [row for row in rows if split_of(row.customer, args.split_seed) == "train" and gold_known(row, args)]
    if args.gold_share < 1:
        show_counts("  train, with a usable label", pool)
    per_class = args.per_class or min(
        Counter({label: 0 for label in LABELS} | Counter(r.label for r in pool)).values()
    )
    sample = balanced_sample(pool, per_class, args.seed)
    if pool:
        print(f"gradient boosting on {len(pool)} training rows, cross-fitted by customer ...", file=sys.stderr)
    by_row = dict(zip(pool, tabular_teacher(pool, [True] * len(pool), args.seed), strict=True))
    if args.hard_standard:
        sample = enrich_standard(sample, pool, by_row, args.hard_standard, args.seed)
    show_counts("balanced training rows written", sample)

    sft, kd, dpo = [], [], []
    for row in sample:
        prompt, probabilities = creditmix_prompt(row.features), by_row[row]
        wrong = max((label for label in LABELS if label != row.label), key=lambda x: probabilities[LABELS.index(x)])
        soft = {label: round(float(p), 4) for label, p in zip(LABELS, probabilities, strict=True)}
        sft.append({"input": prompt, "output": row.label})
        kd.append({"input": prompt, "teacher_output": row.label, "label_probs": soft})
        dpo.append({"prompt": prompt, "chosen": row.label, "rejected": wrong})
    note = {name: getattr(args, name) for name in ("split_seed", "seed", "per_class", "hard_standard", "gold_share")}
    said = [max(row["label_probs"], key=row["label_probs"].__getitem__) for row in kd]
    note["teacher"] = {"name": TABULAR, **gate(said, [row.label for row in sample], LABELS, [r["input"] for r in kd])}
    write_parts(args.outdir, "creditmix", {"sft": sft, "kd": kd, "dpo": dpo}, args.src, note)
    return 0


if __name__ == "__main__":
    run_script(main)
