"""What every script does alike on the command line: exit statuses, argument types, and the flags that scripts share.

A flag that several scripts have is defined here once, with the function that turns it into options.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from common import InputError
from distil.cards import add_results
from distil.endpoint import Server, is_http, shown_url
from distil.files import check_folder, hold, write_json
from distil.models import LoadOptions
from distil.scoring import METHODS, ScoringOptions, read_verbalizers


def run_script(main: Callable[[list[str] | None], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 1 failed while running, 2 wrong input; tracebacks only with --debug."""
    message = None
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, f"error: {error}"
    except BrokenPipeError:
        status, message = 1, "stopped: stdout was closed (`| head`)"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again at its end
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        status, message = _failure(error)
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # a process that ends with its group alive may abort (SIGABRT)
    sys.stdout.flush()
    sys.exit(status)


def _failure(error: Exception) -> tuple[int, str]:
    """Return exit status and message of an exception that no script raises on purpose."""
    if isinstance(error, ModuleNotFoundError):
        fix = "source .venv/bin/activate (`make demo` makes it), or pip install -r requirements.txt"
        return 2, f"error: the package {error.name} is missing: {fix}"
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return 2, f"error: {error.filename or ''}: {error.strerror}; check the path and its rights"
    text = " ".join(str(error).split())
    if any(words in text for words in ("No space left", "unexpected pos", "PytorchStreamWriter")):  # torch's words
        text = "the disk is full; free some space, then resume (trainers: --resume, others: the same command)"
    return 1, f"failed: {type(error).__name__}: {text} (--debug shows the traceback)"


def number_or_auto(text: str) -> int | str:
    """Parse a flag that is a whole number or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def seed_number(text: str) -> int:
    """Parse a seed that all random number generators in use accept."""
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def gold_share(text: str) -> float:
    """Parse a share above 0 and at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share above 0 and at most 1")
    return float(text)


def new_parser(doc: str | None, kind: type = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser whose description is a script's module docstring, as it is written, with --debug."""
    parser = kind(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")  # `run_script` looks for it
    return parser


def refuse_unused(
    parser: argparse.ArgumentParser, argv: list[str] | None, unused: Mapping[str, Iterable[str]]
) -> None:
    """Raise InputError where flags of the command line have no effect, also with the value of their default.
    parser: of `argv`, used for nothing else after. unused: {what the flags belong to: their names without `--`}."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    given = vars(argparse.ArgumentParser.parse_args(parser, argv))  # not those of a file, which may be a run's record
    flags = {reason: [f"--{name}" for name in names if name in given] for reason, names in unused.items()}
    if problems := [f"{', '.join(names)}: {reason}" for reason, names in flags.items() if names]:
        raise InputError(f"{'; '.join(problems)}; leave out what has no effect")


def add_decimal_flag(add: Callable) -> None:
    """Add --decimal, for scripts that read raw tables."""
    text = "mark of decimals where a column of a table leaves it open: 809,981 is 809981 (.) or 809.981 (,)"
    add("--decimal", choices=(".", ","), help=text)


def add_task_flag(add: Callable) -> None:
    """Add --task, for scripts that read raw rows or score them."""
    text = "JSON file that describes the label task (default: the model's own, else data/creditmix_task.json)"
    add("--task", metavar="FILE", help=text)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that loads a model to use it; `loading_options` reads them."""
    add = parser.add_argument_group("model loading").add_argument
    add("--quantization", choices=("nf4", "none"), default="nf4", help="of the base model (%(default)s)")
    add("--compute_dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="(%(default)s)")
    offload = os.environ.get("OFFLOAD_FOLDER")
    add("--offload_folder", default=offload, help="for what does not fit the GPU ($OFFLOAD_FOLDER)")


def loading_options(flags: Mapping[str, Any]) -> LoadOptions:
    """Return the options of `add_loading_flags`."""
    how = flags["quantization"], flags["compute_dtype"], flags["offload_folder"]
    return LoadOptions(*how, server_of(flags) if flags.get("url") else None)


def add_connection_flags(add: Callable) -> None:
    """Add the flags of every script that can use an OpenAI-compatible server."""
    add("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the server's key (%(default)s)")
    add("--concurrency", type=int, default=8, help="requests under way at the server (%(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds without a sign of the server (%(default)s)")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that can leave the model to an engine; `loading_options` reads them."""
    add = parser.add_argument_group("engine that runs the model instead").add_argument
    url = "OpenAI-compatible server, such as http://127.0.0.1:8080/v1; --model_dir has tokenizer and task"
    add("--url", help=url)
    add("--served_model", help="name of the model there")
    add_connection_flags(add)


def server_of(flags: Mapping[str, Any], url: str = "url", model: str = "served_model", retries: int = 6) -> Server:
    """Return the server of `add_connection_flags` and of the flags named `url` and `model`. Raises InputError."""
    problems = []
    if not is_http(flags[url]):
        problems.append(f"--{url} {shown_url(flags[url])}: an address such as http://127.0.0.1:8080/v1 is needed")
    if not flags[model]:
        problems.append(f"--{url} needs --{model}")
    if isinstance(flags.get("model_dir"), list) and len(flags["model_dir"]) > 1:
        problems.append(f"--{url}: one --model_dir is needed, that of --{model}")
    if flags["concurrency"] < 1 or not 0 < flags["timeout"] <= 86400 or retries < 0:
        problems.append("--concurrency is at least 1, --retries at least 0, --timeout above 0 and at most 86400")
    if problems:
        raise InputError("; ".join(problems))
    return Server(flags[url], flags[model], flags["api_key_env"], flags["concurrency"], retries, flags["timeout"])


def unused_engine(flags: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the flags of loading and of `add_engine_flags` that have no effect, for `refuse_unused`."""
    if flags["url"]:
        names = ["quantization", "compute_dtype", "offload_folder", "batch_size"]
        return {"only for a model that runs here": names}
    return {"only with --url": ["served_model", "api_key_env", "concurrency", "timeout"]}


def add_scoring_flags(parser: argparse.ArgumentParser, null_prompts: int) -> None:
    """Add the flags of every script that scores label rows; null_prompts: how many the task has, the default."""
    add = parser.add_argument_group("scoring").add_argument
    stored = "of the scores; auto, the default: what eval_creditmix.py --fit stored, else contextual"
    add("--calibration", choices=METHODS, default="auto", help=stored)
    shares = "class proportions in use, such as Good=0.25,Standard=0.45,Bad=0.30"
    add("--class_shares", metavar="LABEL=P,...", help=shares)
    review = "flag rows for human review whose label has a lower probability"
    add("--abstain_below", type=float, metavar="P", help=review)
    add("--bias", metavar="LABEL=B,...", help="add to calibrated scores, such as Standard=0.3 (default: none)")
    add("--null_prompts", type=int, default=null_prompts, help="content-free prompts for the prior (%(default)s)")
    add("--verbalizers", metavar="FILE", help='JSON {"Standard": ["Standard", "Average"]}: surface forms of labels')
    add("--aggregate", choices=("max", "mean", "logsumexp"), default="max", help="of surface forms (%(default)s)")
    batch = "rows a forward, or auto: the fastest is found on the rows themselves, from 256 on (%(default)s)"
    add("--batch_size", type=number_or_auto, default=32, help=batch)
    add_loading_flags(parser)


def scoring_options(flags: Mapping[str, Any], labels: Sequence[str], null_prompts: int) -> ScoringOptions:
    """Return the checked options of `add_scoring_flags` for a task with these labels. Raises InputError."""
    same = {n: flags[n] for n in ("calibration", "abstain_below", "null_prompts", "aggregate", "batch_size")}
    if same["batch_size"] != "auto" and same["batch_size"] < 1:
        raise InputError(f"--batch_size {same['batch_size']}: at least 1")
    if same["abstain_below"] is not None and not 0 < same["abstain_below"] <= 1:
        raise InputError(f"--abstain_below {same['abstain_below']}: a probability above 0, at most 1")
    if not 1 <= same["null_prompts"] <= null_prompts:
        raise InputError(f"--null_prompts {same['null_prompts']}: 1 to {null_prompts} are available")
    forms = read_verbalizers(flags["verbalizers"], labels)
    by_label = label_numbers(flags["bias"], "--bias", labels)
    bias = tuple(by_label.get(label, 0.0) for label in labels)
    by_label = label_numbers(flags["class_shares"], "--class_shares", labels)
    shares = [by_label.get(label, 0.0) for label in labels]
    if by_label and (min(shares) <= 0 or abs(sum(shares) - 1) > 0.01):
        raise InputError(f"--class_shares {flags['class_shares']}: a share above 0 for each label, 1 together")
    class_shares = tuple(share / sum(shares) for share in shares) if by_label else None
    return ScoringOptions(forms, bias, class_shares=class_shares, load=loading_options(flags), **same)


def unused_scoring(flags: Mapping[str, Any], fit: bool = False) -> dict[str, list[str]]:
    """Return the flags of `add_scoring_flags` that have no effect next to the others, for `refuse_unused`.
    fit: the prior is used even with --calibration none, to be compared."""
    without_prior = flags["calibration"] == "none" and not fit
    unused = {"--calibration none uses no prior": ["null_prompts"] if without_prior else []}
    return unused | {"only with --verbalizers": [] if flags["verbalizers"] else ["aggregate"]}


def label_numbers(text: str | None, flag: str, labels: Sequence[str]) -> dict[str, float]:
    """Parse 'Standard=0.3,Bad=-0.1' to {'Standard': 0.3, 'Bad': -0.1}. Raises InputError."""
    pairs = {}
    for part in text.split(",") if text else []:
        label, _, number = part.rpartition("=")  # a label may be <=50K
        label = label.strip()
        try:
            pairs[label] = float(number)
        except ValueError:
            raise InputError(f"{flag} {text}: {part!r} is not LABEL=NUMBER") from None
        if label not in labels or not math.isfinite(pairs[label]):
            raise InputError(f"{flag} {text}: labels are {', '.join(labels)}, numbers finite")
    return pairs


def add_report_flags(parser: argparse.ArgumentParser, units: str, resamples: int) -> Callable:
    """Add the flags of every evaluation, whose intervals come from resampled `units`; return `add` of their group."""
    add = parser.add_argument_group("report").add_argument
    add("--bootstrap", type=int, default=resamples, help=f"resamples of {units} for the 95 %% intervals (%(default)s)")
    add("--report_dir", help="write metrics.json, and for each model its answers to the rows, into this folder")
    add("--json", action="store_true", help="print metrics.json on standard output, all else on standard error")
    return add


def report_folder(report_dir: str | None) -> contextlib.AbstractContextManager[None]:
    """Keep other runs out of --report_dir, if it is given. Raises InputError for one in use or not writable."""
    if not report_dir:
        return contextlib.nullcontext()
    check_folder(report_dir)
    return hold(report_dir)


def check_at_least_one(flags: Mapping[str, Any], *names: str) -> None:
    """Raise InputError where one of these flags has a number below 1."""
    if any(flags[name] is not None and flags[name] < 1 for name in names):
        raise InputError(f"{', '.join(f'--{name}' for name in names)} are at least 1")


def finish_report(summary: dict[str, Any], flags: Mapping[str, Any], headline: Sequence[str]) -> None:
    """Write an evaluation's summary to <report_dir>/metrics.json and print it, as far as the flags ask for it; write
    the figures `headline` of each model into its card."""
    report_dir = flags["report_dir"]
    if report_dir:
        write_json(Path(report_dir) / "metrics.json", summary)
        print(f"report written to {report_dir}", file=sys.stderr)
    if flags["json"]:
        print(json.dumps(summary))
    add_results(summary, headline, flags)


def with_interval(value: float, ends: Sequence[float], form: str = ".4f") -> str:
    """Return a table's cell such as `0.6916 [0.6700, 0.7100]`."""
    return f"{value:{form}} [{ends[0]:{form}}, {ends[1]:{form}}]"


def print_columns(rows: Iterable[Sequence[str]], out: TextIO) -> None:
    """Print rows of cells as a table whose columns are as wide as their widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip(), file=out)
