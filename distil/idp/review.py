"""The review page: documents with the values of their answers marked, those to look at first on top.

One file without scripts that loads nothing: it opens from a disk or a mail, and whatever a document has is text in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from distil.files import atomic_writer
from distil.idp.values import leaves


def marked(answer: dict[str, Any], below: float | None) -> dict[str, Any]:
    """Return the answer; rows of its evidence with less confidence than `below` get "review": true."""
    for row in answer.get("evidence", ()):
        if below is not None and row["confidence"] is not None and row["confidence"] < below:
            row["review"] = True
    return answer


def write_page(path: str, answers: Mapping[int, tuple[str, dict[str, Any]]]) -> None:
    """Write the page of numbered documents with their answers; the one with the least sure value comes first."""
    from jinja2 import Environment

    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    documents = [_document(number, *answers[number]) for number in answers]
    documents.sort(key=lambda one: one["rows"][0]["sure"] if one["rows"] else 2)
    with atomic_writer(path) as out:
        out.writelines(Environment(autoescape=True).from_string(template).generate(documents=documents))


def _document(number: int, text: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return {"number", "rows", "parts"}: values, the least sure first, and the text cut where marks begin or end."""
    rows = [dict(row, mark=f"d{number}v{i}") for i, row in enumerate(answer["evidence"])]
    for row, (_, value) in zip(rows, leaves(answer["json"]), strict=True):
        row["value"] = value if isinstance(value, str) else json.dumps(value)
        row["sure"] = -1 if row["confidence"] is None else row["confidence"]
    placed = [row for row in rows if row["span"]]
    cuts = sorted({0, len(text), *(end for row in placed for end in row["span"])})
    within = {cut: [row for row in placed if row["span"][0] <= cut < row["span"][1]] for cut in cuts}
    parts = [{"start": a, "text": text[a:b], "rows": within[a]} for a, b in pairwise(cuts)]
    return {"number": number, "rows": sorted(rows, key=lambda row: row["sure"]), "parts": parts}
