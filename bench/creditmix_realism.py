"""Show how close the embedded synthetic CreditMix rows are to the real ones: train on one, test on the other.

Gradient boosting is trained on balanced classes of training customers and tested on balanced classes of validation
customers, as the project's own split defines them, so the model has seen no row of a customer it is tested on:

  embedded -> real       do the synthetic rows teach what holds for real ones?
  real -> real           the ceiling of the six features on real rows
  embedded -> embedded   the ceiling of the project's own evaluation

The first two are tested on the same rows. The four rows of a customer are nearly alike, so 1,500 rows a class are some
400 customers and one split tells little: figures are means over several split seeds, with their standard deviation.
The real rows are not part of the project: get the test part of the Kaggle data set "Credit score classification" and
give its path.

Example:
  python -m bench.creditmix_realism --real test.csv --embedded data/creditmix_dataset.json
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from common import InputError
from distil.cli import run_script
from distil.creditmix.rows import CreditRow, balanced_sample, read_rows
from distil.creditmix.tabular import tabular_features
from distil.features import UNKNOWN
from distil.tasks import default_task

TASK = default_task()
LABELS = TASK.labels
METRICS = ("accuracy", "macro_f1", "standard_recall", "nll")
TRIALS = (("embedded", "real"), ("real", "real"), ("embedded", "embedded"))  # trained on, tested on


def log(text: str) -> None:
    """Print one line on standard error; standard output has the result alone."""
    print(text, file=sys.stderr, flush=True)


def balanced(rows: Sequence[CreditRow], part: str, split_seed: int, most: int | None = None) -> list[CreditRow]:
    """Return equally many rows of each label from one part of the split, at most `most` a label."""
    mine = [row for row in rows if TASK.part_of(row.customer, split_seed) == part]
    counts = Counter(row.label for row in mine)
    fewest = min(counts[label] for label in LABELS)
    if not fewest:
        raise InputError(f"split seed {split_seed}: a class has no {part} rows: {dict(counts)}")
    return balanced_sample(mine, LABELS, min(fewest, most or fewest), split_seed)


def fit(rows: Sequence[CreditRow]) -> Any:
    """Fit gradient boosting of the labels on the six features. Settings are plain and the same for every trial."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=120,
        learning_rate=0.06,
        max_leaf_nodes=15,
        min_samples_leaf=40,  # rows of ten customers: with fewer the trees learn single customers by heart
        l2_regularization=1.0,
        categorical_features="from_dtype",
        early_stopping=False,  # its inner split is by row and would leak customers
        random_state=0,
    )
    return model.fit(tabular_features([row.features for row in rows], TASK), [row.label for row in rows])


def measure(model: Any, rows: Sequence[CreditRow]) -> dict[str, float]:
    """Return accuracy, macro-F1, recall of Standard and mean NLL (in nats) on the rows."""
    from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

    truth = [row.label for row in rows]
    frame = tabular_features([row.features for row in rows], TASK)
    probabilities = model.predict_proba(frame)  # [N, 3], in classes_ order
    predicted = model.classes_[probabilities.argmax(axis=1)]
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "standard_recall": float(recall_score(truth, predicted, labels=["Standard"], average="macro")),
        "nll": float(log_loss(truth, probabilities, labels=model.classes_)),
    }


def run_trials(sources: dict[str, list[CreditRow]], split_seeds: list[int], val_per_class: int) -> list[dict]:
    """Run every trial over all split seeds; return the figures of each split, their mean and standard deviation."""
    splits: dict[tuple[str, str], list[dict]] = {trial: [] for trial in TRIALS}
    for seed in split_seeds:
        started = time.monotonic()
        train = {name: balanced(rows, "train", seed) for name, rows in sources.items()}
        test = {name: balanced(rows, "validation", seed, val_per_class) for name, rows in sources.items()}
        models = {name: fit(rows) for name, rows in train.items()}
        for trained, tested in TRIALS:
            sizes = {"train_per_class": len(train[trained]) // 3, "val_per_class": len(test[tested]) // 3}
            figures = measure(models[trained], test[tested])
            splits[trained, tested].append({"split_seed": seed, **sizes, **figures})
        log(f"split seed {seed}: {time.monotonic() - started:.1f} s")
    return [
        {
            "trained_on": trained,
            "tested_on": tested,
            "mean": {name: mean(split[name] for split in done) for name in METRICS},
            "stdev": {name: stdev(split[name] for split in done) if len(done) > 1 else 0.0 for name in METRICS},
            "splits": done,
        }
        for (trained, tested), done in splits.items()
    ]


def marginals(rows: Sequence[CreditRow]) -> dict[str, dict[str, float]]:
    """Return for each label its share of the rows and the medians of the numbers, from the cleaned rows."""
    result = {}
    for label in LABELS:
        fields = [TASK.parse(row.features) or {} for row in rows if row.label == label]
        result[label] = {"share": len(fields) / len(rows)}
        for name in (name for name, field in TASK.by_name.items() if field.kind == "number"):
            values = [float(field[name]) for field in fields if field.get(name, UNKNOWN) != UNKNOWN]
            result[label][f"median {name}"] = median(values) if values else float("nan")
    return result


def text_tables(result: dict) -> str:
    """Return the result as text: the trials, the marginals of each label, the corrections of cleaning."""
    lines = [f"{'trained on -> tested on':<24}{'train':>7}{'val':>7}" + "".join(f"{name:>17}" for name in METRICS)]
    for trial in result["trials"]:
        sizes = (min(split[key] for split in trial["splits"]) for key in ("train_per_class", "val_per_class"))
        cells = "".join(f"{trial['mean'][name]:>10.3f} ±{trial['stdev'][name]:.3f}" for name in METRICS)
        name = f"{trial['trained_on']} -> {trial['tested_on']}"
        lines.append(f"{name:<24}" + "".join(f"{size:>7}" for size in sizes) + cells)
    lines += ["train, val: rows a class, the fewest of all splits", ""]
    sources = result["sources"]
    width = 40 + max(len(key) for source in sources.values() for key in source["cleaning_per_1000_rows"])
    lines.append(f"{'marginals':<{width}}" + "".join(f"{name:>12}" for name in sources))
    for label in LABELS:
        for key in sources["real"]["marginals"][label]:
            values = "".join(f"{source['marginals'][label][key]:>12.3f}" for source in sources.values())
            lines.append(f"{label + ': ' + key:<{width}}{values}")
    lines += ["", "cleaning, per 1,000 rows"]
    for key in sorted({key for source in sources.values() for key in source["cleaning_per_1000_rows"]}):
        values = "".join(f"{source['cleaning_per_1000_rows'].get(key, 0.0):>12.2f}" for source in sources.values())
        lines.append(f"{key:<{width}}{values}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--real", required=True, metavar="CSV", help="test part of the published file")
    data.add_argument(
        "--embedded",
        default="data/creditmix_dataset.json",
        help="embedded rows (default: data/creditmix_dataset.json)",
    )
    trial = parser.add_argument_group("trial")
    trial.add_argument("--split_seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    trial.add_argument("--val_per_class", type=int, default=1500, help="validation rows a class (default: 1500)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object on standard output, no tables")
    output.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.val_per_class < 1:
        parser.error(f"--val_per_class must be at least 1, got {args.val_per_class}")
    sources, described = {}, {}
    for name, path in (("real", args.real), ("embedded", args.embedded)):
        rows, notes = read_rows(path, TASK)
        read = len(rows) + sum(count for note, count in notes.items() if "dropped" in note)
        rates = {note: 1000 * count / read for note, count in notes.items()}
        sources[name] = rows
        described[name] = {"rows": read, "marginals": marginals(rows), "cleaning_per_1000_rows": rates}
        log(f"{name}: {read} rows in {path}, {len(rows)} with a label")
    result = {"trials": run_trials(sources, args.split_seeds, args.val_per_class), "sources": described}
    print(json.dumps(result) if args.json else text_tables(result))
    return 0


if __name__ == "__main__":
    run_script(main)
