"""Invoices (IDP): the user turn for a document and the one layout of its JSON; used by data, infer and eval.

Apart from common.py because it knows one task. What turns a document into what the model sees is here once, so that
a request meets what was trained.
"""

from __future__ import annotations

import json
from typing import Any

INSTRUCTION = "Extract the invoice as JSON."


def idp_prompt(document: str) -> str:
    """The user turn for a document: one instruction line, then the text without blank ends of lines and page."""
    lines = [line.rstrip() for line in document.splitlines()]
    return f"{INSTRUCTION}\n" + "\n".join(lines).strip("\n")


def compact_json(value: Any) -> str:
    """JSON text in the one layout of outputs: separators `,` and `:`, letters as they are, keys in the given order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
