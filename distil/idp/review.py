"""The review page: documents with the values of their answers marked, those to look at first on top.

One file without scripts that loads nothing: it opens from a disk or a mail, and whatever a document has is text in it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from distil.files import atomic_writer
from distil.idp.values import leaves


def marked(answer: dict[str, Any], below: float | None) -> dict[str, Any]:
    """Return the answer; rows of its evidence with less confidence than `below` get "review": true."""
    for row in answer.get("evidence", ()) if below is not None else ():
        if row["confidence"] is not None and row["confidence"] < below:
            row["review"] = True
    return answer


def write_page(path: str, answers: Mapping[int, tuple[str, dict[str, Any]]]) -> None:
    """Write the page of numbered documents with their answers; the one with the least sure value comes first."""
    head, foot = Path(__file__).with_name("review.html").read_text(encoding="utf-8").split("<!-- documents -->")
    least = {n: min(map(_sureness, answer["evidence"]), default=2.0) for n, (_, answer) in answers.items()}
    with atomic_writer(path) as out:
        out.write(head)
        for number in sorted(answers, key=lambda number: least[number]):
            out.write(_section(number, *answers[number]))
        out.write(foot)


def _sureness(row: dict[str, Any]) -> float:
    return -1.0 if row["confidence"] is None else row["confidence"]


def _section(number: int, document: str, answer: dict[str, Any]) -> str:
    """Return a document and the list of its values, which lead to their marks. number: of its line in the file."""
    rows = list(zip(answer["evidence"], (value for _, value in leaves(answer["json"])), strict=True))
    lines, places = [], {}
    for i, (row, value) in sorted(enumerate(rows), key=lambda pair: _sureness(pair[1][0])):
        mark, shown = f"d{number}v{i}", html.escape("null" if value is None else str(value) or '""')
        if row["span"]:
            places[mark] = (row["span"], "review" in row, html.escape(row["path"]))
            shown = f'<a href="#{mark}">{shown}</a>'
        percent = "?" if row["confidence"] is None else f"{row['confidence']:.0%}"
        where = f"page {row['page']}" if "page" in row else "" if row["span"] else "not in the document"
        cells = (percent, html.escape(row["path"]), shown, where)
        kind = ' class="review"' if "review" in row else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    table = f"<table>\n<tr><th>sure</th><th>field</th><th>value</th><th></th></tr>\n{''.join(lines)}</table>"
    return f"<section>\n<h2>Document {number}</h2>\n{table}\n<pre>{_marked_text(document, places)}</pre>\n</section>\n"


def _marked_text(document: str, places: dict[str, tuple[Sequence[int], bool, str]]) -> str:
    """Return the document as HTML with a mark around each place: {id: (span, whether to review it, title)}. Marks that
    overlap are cut where one begins or ends."""
    cuts = sorted({0, len(document), *(end for span, *_ in places.values() for end in span)})
    parts = []
    for start, end in pairwise(cuts):
        text = html.escape(document[start:end])
        for mark, (span, check, title) in places.items():
            if span[0] <= start and end <= span[1]:
                named = f' id="{mark}"' if span[0] == start else ""
                text = f'<mark{named}{" class=review" if check else ""} title="{title}">{text}</mark>'
        parts.append(text)
    return "".join(parts)
