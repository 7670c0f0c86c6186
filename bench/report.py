"""Print the figures of a bench."""

from __future__ import annotations

import json
from typing import Any

from distil.runs import machine


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print the figures and the machine that they were taken on: as one JSON object, or a line for each."""
    result = result | {"machine": machine()}
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result)) + 2
    for key, value in result.items():
        print(f"{key:<{width}}{value}")
