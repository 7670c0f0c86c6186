"""Compare the seconds a row of scoring 77 labels of several tokens with three labels of one token on the same prompts.

- three: Good, Standard and Bad, one token each.
- distinct, all: the labels as a tree of tokens in one forward (distil/trie.py), by the tokens that tell a label from
  all others, or by all tokens.
- each: one forward for each label of several tokens, "distinct"; on a sixteenth of the rows, as it is so slow.

The ways take turns in one process. --cpu_time measures this process's CPU seconds, for a machine that others use too.

    python -m bench.labels --rows 64 --repeats 3
    python -m bench.labels --labels names.txt --cpu_time
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.report import report
from common import InputError, PromptEncoder, dtype_name
from distil.cli import run_script
from distil.scoring import FastLabelScorer
from distil.testing import load_named

INSTRUCTION = "Give the category of this text.\n"
# 77 names of 2 to 9 words, many of which begin alike, as those of BANKING77.
THINGS = ("parcel", "parcel_tracking", "invoice", "gift_voucher", "return", "return_label", "size", "order_number")
THINGS += ("password", "loyalty_points", "delivery_address")
ACTIONS = ("cancel", "change", "pending", "failed")
ISSUES = ("limits", "not_arrived_yet", "charged_twice_in_another_country")
NAMES = [f"{action}_{thing}" for action in ACTIONS for thing in THINGS]
NAMES += [f"{thing}_{issue}" for thing in THINGS for issue in ISSUES]
WORDS = ("my", "card", "has", "not", "arrived", "yet", "why", "was", "I", "charged", "for", "this", "top", "up")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default="smollm2-135m", help="base, folder or adapter (%(default)s)")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="nf4", help="of the base (%(default)s)")
    parser.add_argument("--labels", help="file with a label on each line (77 names of this file)")
    parser.add_argument("--texts", help="file with a text on each line (random words)")
    parser.add_argument("--rows", type=int, default=64, help="rows scored by each way (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which the ways take turns (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows a forward (%(default)s)")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds in place of seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def lines_of(path: str) -> list[str]:
    """Return the different lines of a text file that are not blank. Raises InputError."""
    try:
        return list(dict.fromkeys(line.strip() for line in Path(path).read_text().splitlines() if line.strip()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None


def random_texts(count: int) -> list[str]:
    """Return texts of 6 to 14 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) for _ in range(count)]


def ways_of(args: argparse.Namespace, turns: list[str], names: list[str]) -> tuple[dict[str, tuple], dict]:
    """Return {way: (scorer, user turns)} and the sizes of what is scored."""
    model, tokenizer = load_named(args.model_dir, args.quantization)
    encoder, shared = PromptEncoder(tokenizer), [INSTRUCTION + "x", INSTRUCTION + "-"]

    def scorer(words: list[str], label_tokens: str = "all") -> FastLabelScorer:
        forms = {word: [word] for word in words}
        return FastLabelScorer(model, encoder, forms, "max", args.batch_size, shared, label_tokens=label_tokens)

    ways = {"three": scorer(["Good", "Standard", "Bad"]), "distinct": scorer(names, "distinct"), "all": scorer(names)}
    each = scorer(names, "distinct")
    each.trees = False
    few = turns[: max(1, len(turns) // 16)]
    own = statistics.mean(len(encoder.prompt(turn)) - len(each.prefix) for turn in turns)
    sizes = {"labels": len(names), "own_tokens": own, "shared_tokens": len(each.prefix)}
    sizes |= {f"tokens_a_label_{name}": statistics.mean(map(len, ways[name].form_ids)) for name in ("distinct", "all")}
    return {name: (way, turns) for name, way in ways.items()} | {"each": (each, few)}, sizes


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    names = lines_of(args.labels) if args.labels else NAMES
    texts = lines_of(args.texts)[: args.rows] if args.texts else random_texts(args.rows)
    ways, sizes = ways_of(args, [INSTRUCTION + text for text in texts], names)
    clock: Callable[[], float] = time.process_time if args.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}  # a row
    scores: dict[str, np.ndarray] = {}
    for scorer, _ in ways.values():
        scorer.raw_scores([INSTRUCTION + texts[0]])  # warm-up
    for _ in range(args.repeats):
        for name, (scorer, rows) in ways.items():
            start = clock()
            scores[name] = scorer.raw_scores(rows)
            seconds[name].append((clock() - start) / len(rows))
    result = {"model_dir": args.model_dir, "quantization": args.quantization, "compute_dtype": dtype_name()}
    result |= {"rows": len(texts), "batch_size": args.batch_size, "repeats": args.repeats, **sizes}
    result |= {f"seconds_a_row_{name}": round(statistics.median(taken), 4) for name, taken in seconds.items()}
    for name, other in (("distinct", "three"), ("all", "three"), ("each", "distinct")):
        ratios = [one / two for one, two in zip(seconds[name], seconds[other], strict=True)]
        result[f"{name}_to_{other}"] = [
            round(number, 2) for number in (min(ratios), statistics.median(ratios), max(ratios))
        ]
    result["largest_difference_to_each"] = float(
        np.abs(scores["distinct"][: len(scores["each"])] - scores["each"]).max()
    )
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
