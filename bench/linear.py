"""Measure whether scoring a file costs as much a row, and as much memory, at 1,000 rows as at 20,000.

infer_creditmix.py runs as a separate process on files of one row, of --few and of --many (rows of --data, repeated);
the time of one row, which is that of loading, is subtracted from the others. --layers cuts the model: what is not the
model, and could grow with the file, then has a larger share.

    python -m bench.linear --few 1000 --many 20000
    python -m bench.linear --layers 4 --json
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.cut_student import cut
from bench.report import report
from common import InputError
from distil.cli import new_parser, run_script
from distil.creditmix.rows import read_rows
from distil.files import write_jsonl
from distil.models import resolve
from distil.tasks import chosen_task

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", default="smollm2-135m", help="base, folder or adapter (%(default)s)")
    add("--data", default=str(ROOT / "data/creditmix_dataset.json"), help="raw rows (%(default)s)")
    add("--few", type=int, default=1000, help="rows of the small file (%(default)s)")
    add("--many", type=int, default=20000, help="rows of the large file (%(default)s)")
    add("--layers", type=int, help="the model's first layers alone (default: all)")
    add("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def run(model_dir: str, features: list[str], rows: int, folder: Path) -> tuple[float, float]:
    """Return (seconds, peak resident memory in MB) of infer_creditmix.py on this number of rows."""
    source, output = folder / f"{rows}.jsonl", folder / f"{rows}.scored.jsonl"
    write_jsonl(source, [{"features": text} for text in itertools.islice(itertools.cycle(features), rows)])
    command = [sys.executable, str(ROOT / "infer_creditmix.py"), "--model_dir", model_dir, "--calibration", "none"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--input", str(source), "--output", str(output)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"infer_creditmix.py ended with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 1 < args.few < args.many:
        raise InputError("--few is above 1 and below --many")
    task = chosen_task([resolve(args.model_dir)], None)
    features = [row.features for row in read_rows(args.data, task)[0]]
    if args.layers is not None and args.layers < 1:
        raise InputError(f"--layers {args.layers}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            cut(args.model_dir, range(args.layers), Path(folder) / "cut")
        model = str(Path(folder) / "cut") if args.layers else args.model_dir
        (load, _), (few, few_mb), (many, many_mb) = (
            run(model, features, rows, Path(folder)) for rows in (1, args.few, args.many)
        )
    rates = [(args.few - 1) / (few - load), (args.many - 1) / (many - load)]
    result = {
        "layers": args.layers or "all",
        "rows": [args.few, args.many],
        "rows_per_second": [round(rate, 2) for rate in rates],
        "speed_many_vs_few": round(rates[1] / rates[0], 3),
        "peak_memory_mb": [round(few_mb), round(many_mb)],
        "memory_many_vs_few": round(many_mb / few_mb, 3),
    }
    report(result, args.json)
    return 0


if __name__ == "__main__":
    run_script(main)
