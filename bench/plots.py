"""Draw the figures of docs/results/performance.md from the --json output of the benches.

Memory and scoring; bench/train.py draws its loss curves.

    python -m bench.memory_8gb --unfilled --json > docs/results/performance/memory.json
    python -m bench.scoring --json > docs/results/performance/scoring.json
    python -m bench.plots
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from distil.cli import run_script
from distil.files import read_json

ROOT = Path(__file__).resolve().parents[1]
ALTERNATIVES = {"six_forwards": "six forwards\na row", "lm_eval": "lm-evaluation-\nharness", "limit": "bare forward"}


def draw_memory(figures: dict, path: Path) -> None:
    """Draw the peak by kind of each point, the allowance, and the estimate."""
    points = figures["points"][::-1]
    names = [point["point"] for point in points]
    figure = Figure(figsize=(9, 0.42 * len(points) + 1.3), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(points)
    kinds = {kind: [point["kinds_gb"][kind] for point in points] for kind in points[0]["kinds_gb"]}
    kinds["libraries or CUDA context"] = [point["with_allowance_gb"] - point["peak_gb"] for point in points]
    for kind, sizes in kinds.items():
        axis.barh(names, sizes, left=left, label=kind, color="lightgrey" if kind.startswith("lib") else None)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    estimates = [point["estimate_gb"] + point["with_allowance_gb"] - point["peak_gb"] for point in points]
    axis.plot(estimates, names, "k|", markersize=14, label="estimate")
    axis.axvline(8, color="tab:red", linestyle="--", label="8 GB card")
    axis.set(xlabel="GB at the peak", xlim=(0, 8.3))
    axis.legend(loc="center right", bbox_to_anchor=(0.94, 0.4), fontsize="small")
    figure.savefig(path, dpi=120)


def draw_scoring(figures: dict, path: Path) -> None:
    """Draw rows a second relative to each alternative, with the range over the rounds."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    names = {"none": f"{figures['compute_dtype']}, not quantised", "nf4": "NF4"}
    for number, quantization in enumerate(figures["quantization"]):
        prefix = f"{quantization}_" if number else ""
        ratios = [figures[f"{prefix}vs_{name}"] for name in ALTERNATIVES]
        ranges = [figures[f"{prefix}vs_{name}_spread"] for name in ALTERNATIVES]
        errors = [[r - low for r, (low, _) in zip(ratios, ranges, strict=True)]]
        errors += [[high - r for r, (_, high) in zip(ratios, ranges, strict=True)]]
        places = [place + 0.4 * number - 0.2 for place in range(len(ratios))]
        bars = axis.bar(places, ratios, 0.38, yerr=errors, capsize=3, label=names[quantization])
        axis.bar_label(bars, fmt="%.2f")
    axis.set(yscale="log", ylabel="rows/s, ours / theirs", xticks=range(len(ALTERNATIVES)))
    axis.set_xticklabels(ALTERNATIVES.values())
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.margins(y=0.15)
    axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "docs/results/performance"
    parser.add_argument("--results", default=str(results), help="folder with the JSON files (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    folder = Path(parser.parse_args(argv).results)
    for name, draw in {"memory": draw_memory, "scoring": draw_scoring}.items():
        draw(read_json(folder / f"{name}.json"), folder / f"{name}.png")
        print(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    run_script(main)
