"""The FastAPI application: request and response schema, routes, and one shape for every error.
Imported only when a server starts, since FastAPI and Pydantic take a second to import."""

# No `from __future__ import annotations` here: FastAPI reads the annotations of functions inside create_app.
import contextlib
import functools
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline  # its /docs loads nothing from other hosts
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from distil.serving.engine import VARIANTS, Refusal
from distil.serving.guard import MAX_BATCH, MAX_FEATURES, Guard, error_body
from distil.serving.metrics import Metrics

EXAMPLE = "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, "
EXAMPLE += "Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments"
FeaturesText = Annotated[str, Field(min_length=1, max_length=MAX_FEATURES, pattern=r"\S")]
EXTRA = "notes: what of the features could not be read; with --abstain_below refer: whether a human should review it"
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FeaturesRequest(Strict):
    features: FeaturesText = Field(examples=[EXAMPLE])


class BatchRequest(Strict):
    features: list[FeaturesText] = Field(min_length=1, max_length=MAX_BATCH, examples=[[EXAMPLE, "Age: 40"]])


class Classification(Strict):
    """The whitepaper's response (section 7): log-probabilities are natural logarithms."""

    model_name: str
    prediction: str
    scores: dict[str, float] = Field(description="calibrated: raw - prior + bias")
    raw_scores: dict[str, float] = Field(description="mean log-probability of each label's tokens")
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


TEXTS = {400: "not JSON", 401: "key missing or wrong", 403: "server needs a key", 408: "body too slow"}
TEXTS |= {413: "body too large", 415: "no JSON content type", 422: "fields wrong or too long", 500: "failed"}
TEXTS |= {503: "loading, adapter missing, too busy or out of memory", 504: "waited too long"}
ERRORS: dict[int | str, dict] = {s: {"model": ErrorResponse, "description": text} for s, text in TEXTS.items()}
KEY_ERRORS = {status: ERRORS[status] for status in (401, 403)}


def add_error_handlers(app: Any) -> None:
    """Give every refusal, of the engine or of FastAPI, the shape of `error_body`."""

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


def add_status_routes(app: Any, engine: Any, metrics: Metrics, keyed: list) -> None:
    """Add the routes that describe the server: models, health, readiness, metrics and the page."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

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
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})


def create_app(engine: Any, metrics: Metrics, log_features: bool = False, api_key: str | None = None) -> Any:
    """Return the FastAPI application around an engine (`Engine`, or another object with the same methods)."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        await engine.start()
        yield
        await engine.stop()

    text = "Credit risk as Good, Standard or Bad by calibrated label log-probabilities. A human decides."
    app = FastAPIOffline(title="CreditMix", version="1", lifespan=lifespan, redoc_url=None, description=text)
    app.state.engine = engine
    app.add_middleware(Guard, api_key=api_key, metrics=metrics)
    add_error_handlers(app)
    keyed = [Depends(HTTPBearer(auto_error=False))] if api_key else []  # an input for the key in /docs
    post = functools.partial(app.post, responses=ERRORS, dependencies=keyed, response_model_exclude_unset=True)

    async def answer(request: Request, variant: str, features: list[str]) -> list[dict]:
        if log_features:
            request.state.log = {"features": features}
        results = await engine.score(variant, features)
        for result in results:
            metrics.answer(variant, result)
        return results

    def add_routes(variant: str) -> None:
        @post(f"/infer/{variant}", response_model=Classification, name=f"infer_{variant}")
        async def infer(request: Request, body: FeaturesRequest) -> dict:
            return (await answer(request, variant, [body.features]))[0]

        @post(f"/infer/{variant}/batch", response_model=BatchResponse, name=f"batch_{variant}")
        async def batch(request: Request, body: BatchRequest) -> dict:
            return {"results": await answer(request, variant, body.features)}

    for variant in VARIANTS:
        add_routes(variant)
    add_status_routes(app, engine, metrics, keyed)
    return app
