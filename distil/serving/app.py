"""The FastAPI application: request and response schema, routes, and one shape for every error.
Imported only when a server starts, since FastAPI and Pydantic take a second to import."""

# No `from __future__ import annotations` here: FastAPI reads the annotations of functions inside create_app.
import contextlib
import functools
import json
import math
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline  # its /docs loads nothing from other hosts
from prometheus_client import generate_latest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, model_validator
from starlette.exceptions import HTTPException

from distil.features import UNKNOWN, canonical_number
from distil.files import parse_json
from distil.serving.engine import VARIANTS, Refusal
from distil.serving.guard import MAX_BATCH, MAX_BODY, Guard, error_body, max_features, own_path
from distil.serving.metrics import Metrics
from distil.serving.table_child import MAX_ROWS
from distil.serving.uploads import TableReader
from distil.tasks import Task, default_task

MAX_FIELDS = 256  # of a row
EXTRA = "notes: what of the features could not be read; with --abstain_below refer: whether a human should review it"
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^:;,\r\n]+$")]
Value = str | StrictInt | FiniteFloat | StrictBool | None


def example_row(task: Task) -> dict[str, str | float]:
    """Return {field: value} of a row as it could be, also of a text task."""
    if task.text_column:
        return {task.text_column: "A text to label."}

    def number(low: float, high: float) -> float:
        return float(canonical_number(low + 0.2 * (high - low), 2)) if math.isfinite(high - low) else 1

    return {field.name: number(*field.range) if field.kind == "number" else UNKNOWN for field in task.fields}


def request_models(task: Task) -> tuple[Any, Any]:
    """Return the body of POST /infer/X and of its batch form for a task: "features", or "fields" by name."""
    most = max_features(task)

    def short(values: dict) -> dict:
        text = "".join(f"{name}: {value}, " for name, value in values.items())
        if len(text) > most or any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ValueError(f"names and values have more than {most} characters, or are not UTF-8 text")
        return values

    Text = Annotated[str, Field(min_length=1, max_length=most, pattern=r"\S")]
    Fields = Annotated[dict[Name, Value], Field(min_length=1, max_length=MAX_FIELDS), AfterValidator(short)]
    either = ConfigDict(json_schema_extra={"oneOf": [{"required": ["features"]}, {"required": ["fields"]}]})
    example = example_row(task)

    class OneOf(Strict):
        model_config = either

        @model_validator(mode="after")
        def one_of_them(self) -> Any:
            if len(self.model_fields_set) != 1:
                raise ValueError("exactly one of features and fields is needed")
            return self

        @property
        def rows(self) -> Any:
            return getattr(self, next(iter(self.model_fields_set)))

    class OneRow(OneOf):
        features: Text = None
        fields: Fields = None

    class Rows(OneOf):
        features: Annotated[list[Text], Field(min_length=1, max_length=MAX_BATCH)] = None
        fields: Annotated[list[Fields], Field(min_length=1, max_length=MAX_BATCH)] = None

    def examples(features: Any, fields: Any) -> Any:
        return Body(openapi_examples={"features": {"value": features}, "fields": {"value": fields}})

    text = task.features(example)
    one = examples({"features": text}, {"fields": example})
    return Annotated[OneRow, one], Annotated[Rows, examples({"features": [text, text]}, {"fields": [example]})]


class Classification(Strict):
    """The whitepaper's response (section 7): log-probabilities are natural logarithms."""

    model_name: str
    prediction: str
    scores: dict[str, float] = Field(description="calibrated: raw - prior + bias")
    raw_scores: dict[str, float] = Field(description="log-probability of each label: mean or sum over tokens")
    prior: dict[str, float] = Field(description="raw scores of content-free prompts")
    probabilities: dict[str, float]
    top2_margin: float = Field(description="best calibrated score less the second")
    extra: dict[str, bool | list[str]] | None = Field(None, description=EXTRA)


class BatchResponse(Strict):
    results: list[Classification]


class Problem(BaseModel):
    code: str
    message: str
    hint: str


class ErrorResponse(BaseModel):
    error: Problem


class Table(BaseModel):
    header: list[str]
    cells: list[list[str]] = Field(description="as the file has them")
    lines: list[int] = Field(description="of each row, as a spreadsheet counts")
    features: list[str] = Field(description="the feature string of each row, for /infer/X/batch")
    problems: dict[int, str] = Field(description="why a row cannot be scored, by its number from 0")
    notes: list[str] = Field(description="what was assumed")


TEXTS = {400: "not JSON", 401: "key missing or wrong", 403: "server needs a key", 408: "body too slow"}
TEXTS |= {413: "body too large", 415: "no JSON content type", 422: "fields wrong or too long", 500: "failed"}
TEXTS |= {503: "loading, adapter missing, too busy or out of memory", 504: "waited too long"}
ERRORS: dict[int | str, dict] = {s: {"model": ErrorResponse, "description": text} for s, text in TEXTS.items()}
KEY_ERRORS = {status: ERRORS[status] for status in (401, 403)}


def task_view(task: Task) -> dict[str, Any]:
    """Return what a client needs to know of a task: labels, fields, limits."""
    fields = [{"name": field.name, "kind": field.kind} for field in task.fields]
    for one, field in zip(fields, task.fields, strict=True):
        one |= {"range": list(field.range)} if math.isfinite(field.range[1] - field.range[0]) else {}
    view = {"name": task.name, "instruction": task.instruction, "labels": list(task.labels), "fields": fields}
    view |= {"text_column": task.text_column, "columns": list(task.feature_columns), "example": example_row(task)}
    return view | {"max_features": max_features(task), "max_rows": MAX_ROWS, "max_bytes": MAX_BODY}


def page_text() -> str:
    """Return the page with its style and script inside."""
    page, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    return page.replace("/* page.css */", style).replace("/* page.js */", script)


def add_error_handlers(app: Any) -> None:
    """Give every refusal, of the engine or of FastAPI, the shape of `error_body`."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after else None
        return JSONResponse(error_body(refusal.code, refusal.message, refusal.hint), refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
        if kind != "application/json" and own_path(request.scope) != "/table":
            message, hint = f"the content type is {kind[:100]}", "send the header Content-Type: application/json"
            return JSONResponse(error_body("not_json", message, hint), 415)
        first, hint = error.errors()[0], "see /docs for an example"
        if first["type"] == "json_invalid":
            return JSONResponse(error_body("not_json", "the body is not JSON", hint), 400)
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse(error_body("invalid", f"{place}: {first['msg']}"[:300], hint), 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "not_json", 404: "not_found", 405: "method_not_allowed"}
        body = error_body(codes.get(error.status_code, "http_error"), str(error.detail), "see /docs")
        return JSONResponse(body, error.status_code, getattr(error, "headers", None))


def add_table_route(post: Any, task: Task, timeout: float) -> None:
    """Add the route that reads a table for the page."""
    reader, kind = TableReader(task, timeout), "application/octet-stream"
    content = {kind: {"schema": {"type": "string", "format": "binary"}}}
    name = Annotated[str, Query(max_length=255, description="of the file, with its suffix")]
    mark = Annotated[Literal["", ".", ","], Query(description="mark of decimals where a column leaves it open")]

    @post("/table", response_model=Table, openapi_extra={"requestBody": {"content": content, "required": True}})
    async def table(request: Request, name: name = "table.csv", decimal: mark = "") -> Response:
        """Read the bytes of a table (CSV, .csv.gz, .xlsx, .parquet, JSON, JSONL) into rows; nothing is stored."""
        found = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
        if found != kind:  # so that no form of another site can send one
            hint = f"send the header Content-Type: {kind}"
            raise Refusal(415, "not_a_table", f"the content type is {found[:100]}", hint)
        return Response(await reader.read(await request.body(), name, decimal or None), media_type="application/json")


def add_status_routes(app: Any, engine: Any, metrics: Metrics, task: Task, keyed: list) -> None:
    """Add the routes that describe the server: task, models, health, readiness, metrics and the page."""
    html, view = page_text(), task_view(task)

    @app.get("/task", dependencies=keyed, responses=KEY_ERRORS)
    async def served_task() -> dict[str, Any]:
        """What is asked of the models: instruction, labels, fields, limits of requests, an example."""
        return view

    @app.get("/models", dependencies=keyed, responses=KEY_ERRORS)
    async def models() -> dict[str, Any]:
        """What is loaded: base, adapter fingerprint, calibration, since when; and what is missing."""
        return {"ready": engine.ready, "models": engine.description, "missing": engine.missing()}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive; answers while the model works or loads."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        """Whether requests are answered."""
        if not engine.ready:
            raise Refusal(503, engine.failure or "loading", "no model is ready", "see the server's log", retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=keyed, responses=KEY_ERRORS)
    async def exposition() -> PlainTextResponse:
        """Prometheus text format."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> HTMLResponse:
        # The page's addresses are relative: without this, /prefix would lead to others than /prefix/.
        prefix = request.scope.get("root_path")
        base = f'<base href="{escape(prefix)}/">' if prefix else ""
        text = html.replace("<head>", f"<head>{base}", 1)
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})


def create_app(
    engine: Any,
    metrics: Metrics,
    log_features: bool = False,
    api_key: str | None = None,
    task: Task | None = None,
    timeout: float = 30.0,
) -> Any:
    """Return the FastAPI application around an engine (`Engine`, or another object with the same methods).
    task: that of the engine, None for the default; timeout: seconds that reading a table may take."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        await engine.start()
        yield
        await engine.stop()

    task = task or default_task()
    one_row, rows = request_models(task)
    text = f"{task.instruction} By calibrated log-probabilities of the labels. A human decides."
    app = FastAPIOffline(title=task.name, version="1", lifespan=lifespan, redoc_url=None, description=text)
    app.state.engine = engine
    app.add_middleware(Guard, api_key=api_key, metrics=metrics)
    add_error_handlers(app)
    keyed = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # an input for the key in /docs
    post = functools.partial(app.post, responses=ERRORS, dependencies=keyed, response_model_exclude_unset=True)

    async def answer(request: Request, variant: str, rows: list) -> list[dict]:
        body = await request.body()
        try:
            parse_json(body.decode(json.detect_encoding(body)), unique=True)
        except ValueError as error:  # the last value would be taken
            raise Refusal(422, "repeated_field", str(error), "give each field once") from None
        if log_features:
            request.state.log = {"features": rows}
        results = await engine.score(variant, rows)
        for result in results:
            metrics.answer(variant, result)
        return results

    def add_routes(variant: str) -> None:
        @post(f"/infer/{variant}", response_model=Classification, name=f"infer_{variant}")
        async def infer(request: Request, body: one_row) -> dict:
            return (await answer(request, variant, [body.rows]))[0]

        @post(f"/infer/{variant}/batch", response_model=BatchResponse, name=f"batch_{variant}")
        async def batch(request: Request, body: rows) -> dict:
            return {"results": await answer(request, variant, body.rows)}

    for variant in VARIANTS:
        add_routes(variant)
    add_table_route(post, task, timeout)
    add_status_routes(app, engine, metrics, task, keyed)
    return app
