"""Serve CreditMix over HTTP: one base model in memory, the SFT, KD and DPO adapters on top, four endpoints.

Departures from a plain FastAPI wrapper: requests of all variants are gathered into mixed batches for one worker
thread, so the event loop never waits for the model; priors come from disk; every error has one JSON shape. Every flag
has an environment variable (in its help), which is also how `uvicorn serve_creditmix:app` is configured.

    python serve_creditmix.py --base smollm2-135m
"""

# No `from __future__ import annotations` here: FastAPI reads the annotations of functions inside create_app.
import argparse
import asyncio
import contextlib
import functools
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

from files import InputError, run_script
from models import DEFAULT_STUDENT
from processes import only_one

API_KEY = "CREDITMIX_API_KEY"
MAX_BODY = 1_000_000  # bytes; a full batch of the longest feature strings has 512,000 where all letters are ASCII
BODY_SECONDS = 10  # for a client to send its body
MAX_FEATURES, MAX_BATCH = 2000, 256  # characters of a feature string, rows of a batch request
OPEN_PATHS = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico")  # no key needed
OPEN_FOLDER = "/static-offline-docs/"  # what /docs is made of
LOG = logging.getLogger("serve_creditmix")
EXAMPLE = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
    "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
)


def build_parser() -> argparse.ArgumentParser:
    """Flags; the default of each comes from CREDITMIX_<FLAG> in the environment."""
    from creditmix import add_scoring_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add("--base", default=DEFAULT_STUDENT, help="base model: hub id, local folder or smollm2-135m (%(default)s)")
    for variant in ("sft", "kd", "dpo"):
        folder = f"runs/creditmix_{variant}"
        add(f"--{variant}", metavar="DIR", default=folder, help=f"adapter of /infer/{variant}, or none (%(default)s)")
    add = parser.add_argument_group("server").add_argument
    add(
        "--host",
        default="127.0.0.1",
        help=f"address to bind; others than this machine's need ${API_KEY} (%(default)s)",
    )
    add("--port", type=int, default=8000, help="(%(default)s)")
    add("--gather_ms", type=float, default=3.0, help="wait so long for more rows of a batch, ms (%(default)s)")
    add("--queue_rows", type=int, default=1024, help="rows without an answer yet; more get status 503 (%(default)s)")
    add("--timeout", type=float, default=30.0, help="requests that wait longer get status 504, seconds (%(default)s)")
    add("--log_features", action="store_true", help="write feature strings to the log, which are personal data")
    add_scoring_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    for action in parser._actions:
        variable = f"CREDITMIX_{action.dest.upper()}"
        if variable in os.environ and action.dest != "help":
            given = os.environ[variable]
            if action.choices and given not in action.choices:
                raise InputError(f"${variable} is {given!r}; possible are {', '.join(action.choices)}")
            parser.set_defaults(
                **{action.dest: given.lower() not in ("", "0", "false", "no", "off") if action.nargs == 0 else given}
            )
    parser.epilog = "Each flag's default can be set by CREDITMIX_<FLAG> in the environment, such as CREDITMIX_BASE."
    return parser


def check_server_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags out of range, and for binding to other machines without a key."""
    in_range = 0 <= args.gather_ms < math.inf and 0 < args.timeout < math.inf and 0 <= args.port < 65536
    if not in_range or args.queue_rows < MAX_BATCH:
        raise InputError(
            f"--gather_ms is 0 or more, --timeout above 0, --queue_rows at least {MAX_BATCH}, --port 0 to 65535"
        )
    if args.batch_size == "auto":
        raise InputError("--batch_size auto is found on the rows of a file; give the server a number")
    if not is_loopback(args.host) and not os.environ.get(API_KEY):
        raise InputError(
            f"--host {args.host} can be reached from other machines: set a key in ${API_KEY}, "
            "which clients send as 'Authorization: Bearer KEY'"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)  # resident memory, CPU seconds, open files
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        margins = (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 8)
        self.requests = prometheus.Counter(
            "creditmix_requests", "HTTP requests", ["variant", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "creditmix_request_seconds", "time to answer", ["variant"], buckets=seconds, registry=registry
        )
        self.waits = prometheus.Histogram(
            "creditmix_queue_wait_seconds", "time a row waits for its batch", buckets=seconds, registry=registry
        )
        self.batches = prometheus.Histogram(
            "creditmix_batch_rows", "rows of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.margins = prometheus.Histogram(
            "creditmix_top2_margin", "best score less second", ["variant"], buckets=margins, registry=registry
        )
        self.predictions = prometheus.Counter(
            "creditmix_predictions", "answers by label", ["variant", "label"], registry=registry
        )
        self.models = prometheus.Gauge(
            "creditmix_model_info",
            "1 for each model in use",
            ["variant", "model_name", "base", "fingerprint", "calibration"],
            registry=registry,
        )

    def loaded(self, models: dict[str, dict]) -> None:
        for variant, model in models.items():
            values = (model["model_name"], model["base"], model["fingerprint"], model["calibration"]["method"])
            self.models.labels(variant, *values).set(1)

    def batch(self, rows: int, waits: list[float]) -> None:
        self.batches.observe(rows)
        for wait in waits:
            self.waits.observe(wait)

    def answer(self, variant: str, response: dict) -> None:
        self.margins.labels(variant).observe(response["top2_margin"])
        self.predictions.labels(variant, response["prediction"]).inc()

    def request(self, variant: str, status: int, seconds: float) -> None:
        self.requests.labels(variant, status).inc()
        self.seconds.labels(variant).observe(seconds)


class JsonLines(logging.Formatter):
    """One JSON object a log line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def error_body(code: str, message: str, hint: str = "") -> dict:
    """The one shape of every error."""
    return {"error": {"code": code, "message": message, "hint": hint}}


class Guard:
    """ASGI middleware around everything: request id, API key, limits of the body, log line, metrics, last resort.

    The body is read here, before anything else runs, so that a slow or huge one costs only its own connection.
    """

    def __init__(self, app: Any, api_key: str | None, metrics: Metrics):
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def reply(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = self._refuse(scope, headers)
            if not refusal:
                body = await self._body(headers, receive)
                refusal = body if isinstance(body, tuple) else None
            if refusal:
                await send_error(reply, *refusal)
            elif body is not None:
                await self._until_gone(scope, body, receive, reply)
        except Exception as error:
            LOG.error("unexpected", exc_info=error, extra={"fields": {"request_id": request_id}})
            if not status:
                await send_error(reply, 500, "internal", "something went wrong", "the server's log says what")
        finally:
            seconds, path = time.monotonic() - started, scope["path"]
            match = re.fullmatch(r"/infer/(base|sft|kd|dpo)(?:/batch)?", path)
            variant = match[1] if match else "other"
            self.metrics.request(variant, status or 499, seconds)
            fields = {"request_id": request_id, "method": scope["method"], "path": path[:200], "status": status or 499}
            LOG.info(
                "request", extra={"fields": fields | {"ms": round(1000 * seconds, 1)} | scope["state"].get("log", {})}
            )

    def _refuse(self, scope: dict, headers: dict[bytes, bytes]) -> tuple | None:
        """Status, code, message and hint where the caller may not ask, else None."""
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return None
        if not self.api_key:
            server = scope.get("server") or ("127.0.0.1", 0)
            if server[0] == "testserver" or is_loopback(server[0]):
                return None
            return (
                403,
                "key_needed",
                "this server can be reached from other machines but has no key",
                f"set ${API_KEY}",
            )
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.api_key.encode()):
            return None
        return 401, "unauthorized", "a valid key is needed", "send it as 'Authorization: Bearer KEY'"

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> bytes | tuple | None:
        """The whole body; an error where it is too large or too slow; None where the client has gone."""
        too_large = 413, "too_large", f"the body has more than {MAX_BODY} bytes", "send fewer rows at once"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            return too_large
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY:
                        return too_large
                    if not message.get("more_body"):
                        return body
        except TimeoutError:
            return 408, "too_slow", f"the body did not arrive within {BODY_SECONDS} s", "send it at once"

    async def _until_gone(self, scope: dict, body: bytes, receive: Any, reply: Any) -> None:
        """Run the application on a body that was read; cancel it when the client goes: its rows are dropped then."""

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        first = [{"type": "http.request", "body": body, "more_body": False}]
        leaving = asyncio.create_task(gone())

        async def replayed() -> dict:
            if not first:
                await asyncio.shield(leaving)
            return first.pop() if first else {"type": "http.disconnect"}

        answering = asyncio.create_task(self.app(scope, replayed, reply))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()


async def send_error(send: Any, status: int, code: str, message: str, hint: str = "") -> None:
    body = json.dumps(error_body(code, message, hint)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def add_error_handlers(app: Any) -> None:
    """Give every refusal, of the engine or of FastAPI, the shape of `error_body`."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from serving import Refusal

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after else None
        return JSONResponse(error_body(refusal.code, refusal.message, refusal.hint), refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
        if kind != "application/json":
            message, hint = f"the content type is {kind[:100]}", "send the header Content-Type: application/json"
            return JSONResponse(error_body("not_json", message, hint), 415)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        if first["type"] == "json_invalid":
            return JSONResponse(error_body("not_json", "the body is not JSON", "see /docs for an example"), 400)
        message = f"{place}: {first['msg']}"[:300]
        return JSONResponse(error_body("invalid", message, "see /docs for an example"), 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "not_json", 404: "not_found", 405: "method_not_allowed"}
        body = error_body(codes.get(error.status_code, "http_error"), str(error.detail), "see /docs")
        return JSONResponse(body, error.status_code, getattr(error, "headers", None))


def create_app(engine: Any, metrics: Metrics, log_features: bool = False, api_key: str | None = None) -> Any:
    """The FastAPI application around an engine (`serving.Engine`, or one of the tests with the same methods)."""
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import HTMLResponse, PlainTextResponse
    from fastapi.security import HTTPBearer
    from fastapi_offline import FastAPIOffline
    from prometheus_client import generate_latest
    from pydantic import BaseModel, ConfigDict, Field

    from serving import VARIANTS, Refusal

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

    FeaturesText = Annotated[str, Field(min_length=1, max_length=MAX_FEATURES, pattern=r"\S")]

    class FeaturesRequest(Strict):
        features: FeaturesText = Field(examples=[EXAMPLE])

    class BatchRequest(Strict):
        features: list[FeaturesText] = Field(min_length=1, max_length=MAX_BATCH, examples=[[EXAMPLE, "Age: 40"]])

    class Classification(Strict):
        """The whitepaper's response (section 7): log-likelihoods are natural logarithms."""

        model_name: str
        prediction: str
        scores: dict[str, float] = Field(description="calibrated: raw - prior + bias")
        raw_scores: dict[str, float] = Field(description="mean log-probability of each label's tokens")
        prior: dict[str, float] = Field(description="raw scores of content-free prompts")
        probabilities: dict[str, float]
        top2_margin: float = Field(description="best calibrated score less the second")
        extra: dict[str, bool] | None = Field(None, description="with --abstain_below: whether to refer to a human")

    class BatchResponse(Strict):
        results: list[Classification]

    class Problem(BaseModel):
        code: str
        message: str
        hint: str

    class ErrorResponse(BaseModel):
        error: Problem

    keyed = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # a place for the key in /docs
    texts = {400: "not JSON", 401: "key missing or wrong", 403: "server needs a key", 408: "body too slow"}
    texts |= {413: "body too large", 415: "no JSON content type", 422: "fields wrong or too long", 500: "failed"}
    texts |= {503: "loading, adapter missing, too busy or out of memory", 504: "waited too long"}
    errors: dict[int | str, dict] = {code: {"model": ErrorResponse, "description": t} for code, t in texts.items()}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPIOffline(  # its /docs takes nothing from other hosts
        title="CreditMix",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
        description="Credit risk as Good, Standard or Bad by calibrated label likelihood. A human decides.",
    )
    app.add_middleware(Guard, api_key=api_key, metrics=metrics)
    html = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")

    add_error_handlers(app)

    async def answer(request: Request, variant: str, features: list[str]) -> list[dict]:
        if log_features:
            request.state.log = {"features": features}
        results = await engine.score(variant, features)
        for result in results:
            metrics.answer(variant, result)
        return results

    post = functools.partial(app.post, responses=errors, dependencies=keyed, response_model_exclude_unset=True)

    def add_routes(variant: str) -> None:
        @post(f"/infer/{variant}", response_model=Classification, name=f"infer_{variant}")
        async def infer(request: Request, body: FeaturesRequest) -> dict:
            return (await answer(request, variant, [body.features]))[0]

        @post(f"/infer/{variant}/batch", response_model=BatchResponse, name=f"batch_{variant}")
        async def batch(request: Request, body: BatchRequest) -> dict:
            return {"results": await answer(request, variant, body.features)}

    for variant in VARIANTS:
        add_routes(variant)

    @app.get("/models", dependencies=keyed, responses={401: errors[401], 403: errors[403]})
    async def models() -> dict[str, Any]:
        """What is loaded: base, adapter fingerprint, calibration, since when; and what is missing."""
        return {"ready": engine.ready, "models": engine.description, "missing": engine.missing()}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive; answers while the model works or loads."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: errors[503]})
    async def readyz() -> dict[str, str]:
        """Whether requests are answered."""
        if not engine.ready:
            hint = "the server's log says more"
            raise Refusal(503, engine.failure or "loading", "no model is ready", hint, retry_after=5)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        dependencies=keyed,
        responses={401: errors[401], 403: errors[403]},
    )
    async def exposition() -> PlainTextResponse:
        """Prometheus text format."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": policy}
        return HTMLResponse(html, headers=headers)

    return app


def app_of(args: argparse.Namespace) -> Any:
    """The application with a real engine. Raises InputError for wrong flags before anything is loaded."""
    from serving import Engine

    metrics = Metrics()
    engine = Engine(args, metrics)
    # Imports hold the interpreter for tenths of a second: in the loading thread they would stop the health check.
    import transformers  # noqa: F401

    app = create_app(engine, metrics, args.log_features, os.environ.get(API_KEY))
    app.state.engine = engine
    return app


def log_json_lines() -> None:
    """One JSON object a line, for uvicorn's own messages too; its access log would repeat ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for log, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
    logging.getLogger("uvicorn.access").handlers = []


def __getattr__(name: str) -> Any:
    """`uvicorn serve_creditmix:app`: built when uvicorn asks for it, so that importing this module does nothing."""
    if name != "app":
        raise AttributeError(name)
    try:
        args = build_parser().parse_args([])
        check_server_flags(args)
        log_json_lines()
        return app_of(args)
    except InputError as error:
        print(f"serve_creditmix: error: {error}", file=sys.stderr)
        sys.exit(2)


def impatient_protocol() -> Any:
    """uvicorn's HTTP protocol, closing connections that send no whole request head in time: it waits for ever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(BODY_SECONDS, self._close_without_request)

        def _close_without_request(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return ImpatientProtocol


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening address, before anything is loaded. Raises InputError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio leaves Nagle's algorithm on for what it accepts, and each answer waits 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another --port") from None
    return bound


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    only_one("the server")
    check_server_flags(args)
    import uvicorn

    log_json_lines()
    app = app_of(args)
    with bound_socket(args.host, args.port) as bound:
        print(f"http://{args.host}:{bound.getsockname()[1]}/ (page), /docs (endpoints)", file=sys.stderr)
        http = impatient_protocol()
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=15, http=http)
        uvicorn.Server(config).run([bound])
    if not app.state.engine.models:
        os._exit(0)  # stopped while loading, which cannot be interrupted and need not be waited for
    return 0


if __name__ == "__main__":
    run_script(main)
