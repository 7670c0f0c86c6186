"""Prometheus metrics and JSON log lines of the server."""

from __future__ import annotations

import functools
import json
import logging
import sys
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector


class Metrics:
    """Prometheus metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # resident memory, CPU seconds, open files
        counter, histogram = (functools.partial(kind, registry=registry) for kind in (Counter, Histogram))
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        sizes, margins = (1, 2, 4, 8, 16, 32, 64, 128), (0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 8)
        variant, model = ["variant"], ["variant", "model_name", "base", "fingerprint", "calibration"]
        self.requests = counter("creditmix_requests", "HTTP requests", ["variant", "status"])
        self.seconds = histogram("creditmix_request_seconds", "time to answer", variant, buckets=seconds)
        self.waits = histogram("creditmix_queue_wait_seconds", "time a row waits for its batch", buckets=seconds)
        self.batches = histogram("creditmix_batch_rows", "rows of a batch", buckets=sizes)
        self.margins = histogram("creditmix_top2_margin", "best score less second", variant, buckets=margins)
        self.predictions = counter("creditmix_predictions", "answers by label", ["variant", "label"])
        self.models = Gauge("creditmix_model_info", "1 for each model in use", model, registry=registry)

    def loaded(self, models: dict[str, dict]) -> None:
        """Report the models in use. models: {variant: description}, as GET /models has it."""
        for variant, model in models.items():
            values = (model["model_name"], model["base"], model["fingerprint"], model["calibration"]["method"])
            self.models.labels(variant, *values).set(1)

    def batch(self, rows: int, waits: list[float]) -> None:
        """Count a batch. waits: seconds that each of its rows waited."""
        self.batches.observe(rows)
        for wait in waits:
            self.waits.observe(wait)

    def answer(self, variant: str, response: dict) -> None:
        """Count a response by its label and margin."""
        self.margins.labels(variant).observe(response["top2_margin"])
        self.predictions.labels(variant, response["prediction"]).inc()

    def request(self, variant: str, status: int, seconds: float) -> None:
        """Count an HTTP request and the seconds that it took."""
        self.requests.labels(variant, status).inc()
        self.seconds.labels(variant).observe(seconds)


class JsonLines(logging.Formatter):
    """Format each log record as one JSON object."""

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


def log_json_lines() -> None:
    """Log one JSON object a line, also for uvicorn's messages; its access log would repeat ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("serve_creditmix", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
    logging.getLogger("uvicorn.access").handlers = []
