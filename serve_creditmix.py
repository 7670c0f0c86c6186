"""Serve a label task over HTTP: one base model in memory, the SFT, KD and DPO adapters on top, four endpoints.

Departures from a plain FastAPI wrapper: requests of all variants are gathered into mixed batches for one worker
thread, so the event loop never waits for the model; priors come from disk; every error has one JSON shape. Every flag
has an environment variable (in its help), which is also how `uvicorn serve_creditmix:app` is configured.

    python serve_creditmix.py --base smollm2-135m
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

from distil.cli import InputError, new_parser, refuse_unused, run_script, unused_scoring
from distil.creditmix.model import add_credit_flags, credit_options
from distil.models import DEFAULT_STUDENT
from distil.processes import only_one
from distil.serving.engine import VARIANTS, Engine, EngineOptions, default_folder, resolve_variants
from distil.serving.guard import API_KEY, BODY_SECONDS, MAX_BATCH, is_loopback
from distil.tasks import TASK_FILE, chosen_task, default_task, read_task
from distil.workarounds import impatient_protocol


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each flag's default comes from CREDITMIX_<FLAG> in the environment."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--base", default=DEFAULT_STUDENT, help="base model: hub id, local folder or smollm2-135m (%(default)s)")
    for variant in VARIANTS[1:]:
        folder = f"{default_folder(variant, default_task().name)}, or of the task's name"
        add(f"--{variant}", metavar="DIR", help=f"adapter of /infer/{variant}, or none ({folder})")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help=f"address to bind; one that others reach needs ${API_KEY} (%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s)")
    add("--gather_ms", type=float, default=3.0, help="wait this long for more rows of a batch, ms (%(default)s)")
    add("--queue_rows", type=int, default=1024, help="rows without an answer yet; more get status 503 (%(default)s)")
    add("--timeout", type=float, default=30.0, help="requests that wait longer get status 504, seconds (%(default)s)")
    add("--log_features", action="store_true", help="write feature strings to the log, which are personal data")
    add_credit_flags(parser)
    for action in parser._actions:
        variable = f"CREDITMIX_{action.dest.upper()}"
        if variable in os.environ and action.dest != "help":
            value = os.environ[variable]
            if action.choices and value not in action.choices:
                raise InputError(f"${variable} is {value!r}; possible are {', '.join(action.choices)}")
            action.default = value.lower() not in ("", "0", "false", "no", "off") if action.nargs == 0 else value
    parser.epilog = "Each flag's default can be set by CREDITMIX_<FLAG> in the environment, such as CREDITMIX_BASE."
    return parser


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """Return the checked options of the server. Raises InputError, also for binding to others without a key."""
    in_range = 0 <= args.gather_ms < math.inf and 0 < args.timeout < math.inf and 0 <= args.port < 65536
    if not in_range or args.queue_rows < MAX_BATCH:
        raise InputError(f"--gather_ms is 0 or more, --timeout above 0, --queue_rows {MAX_BATCH}+, --port to 65535")
    if args.batch_size == "auto":
        raise InputError("--batch_size auto is found on the rows of a file; give the server a number")
    if not is_loopback(args.host) and not os.environ.get(API_KEY):
        key = f"set a key in ${API_KEY}, which clients send as 'Authorization: Bearer KEY'"
        raise InputError(f"--host {args.host} can be reached from other machines: {key}")
    folders = {variant: vars(args)[variant] for variant in VARIANTS[1:]}
    disabled = tuple(variant for variant, folder in folders.items() if folder == "none")
    places = [Path(folder, TASK_FILE) for folder in (*folders.values(), args.base) if folder]
    tasks = [read_task(path) for path in ([args.task] if args.task else filter(Path.is_file, places))]
    refs = resolve_variants(args.base, folders, (tasks or [default_task()])[0].name)
    scoring = credit_options(vars(args), chosen_task(list(refs.values()), args.task))
    return EngineOptions(refs, scoring, disabled, args.gather_ms, args.queue_rows, args.timeout)


def build_app(options: EngineOptions, log_features: bool) -> Any:
    """Return the application with a real engine, which logs JSON lines. Raises InputError before anything loads."""
    # Imports hold the interpreter for tenths of a second: in the loading thread they would stop the health check.
    import transformers  # noqa: F401

    from distil.serving.app import create_app
    from distil.serving.metrics import Metrics, log_json_lines

    log_json_lines()
    metrics = Metrics()
    how = {"task": options.scoring.task, "timeout": options.timeout}
    return create_app(Engine(options, metrics), metrics, log_features, os.environ.get(API_KEY), **how)


def __getattr__(name: str) -> Any:
    """`uvicorn serve_creditmix:app`: built when uvicorn asks for it, so that importing this module does nothing."""
    if name != "app":
        raise AttributeError(name)
    try:
        args = build_parser().parse_args([])
        return build_app(engine_options(args), args.log_features)
    except InputError as error:
        print(f"serve_creditmix: error: {error}", file=sys.stderr)
        sys.exit(2)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket, before anything is loaded. Raises InputError where the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio leaves Nagle's algorithm on for accepted connections, and each answer waits 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another --port") from None
    return bound


def main(argv: list[str] | None = None) -> int:
    args = (parser := build_parser()).parse_args(argv)
    refuse_unused(parser, argv, unused_scoring(vars(args)))
    only_one("the server")
    options = engine_options(args)
    import uvicorn

    app = build_app(options, args.log_features)
    with bound_socket(args.host, args.port) as bound:
        print(f"http://{args.host}:{bound.getsockname()[1]}/ (page), /docs (endpoints)", file=sys.stderr)
        http = impatient_protocol(BODY_SECONDS)
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=15, http=http)
        uvicorn.Server(config).run([bound])
    if not app.state.engine.models:
        os._exit(0)  # stopped while loading, which cannot be interrupted and need not be waited for
    return 0


if __name__ == "__main__":
    run_script(main)
