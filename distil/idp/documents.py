"""Documents to JSON: the user turn for a document, the layout of its JSON, and pages of long documents.

Training data, requests and evaluation use these functions, so that a model always sees what it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from common import InputError
from distil.files import parse_json
from distil.idp.values import occurs_in

INSTRUCTION = "Extract the invoice as JSON."


def idp_prompt(document: str) -> str:
    """Return the user turn for a document: an instruction line, then the text without blank ends of lines and page."""
    lines = [line.rstrip() for line in document.splitlines()]
    return f"{INSTRUCTION}\n" + "\n".join(lines).strip("\n")


def compact_json(value: Any) -> str:
    """Return JSON text in the layout of all outputs: separators `,` and `:`, letters unescaped, keys in order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def document_of(turn: str) -> str:
    """Return the document in a user turn of `idp_prompt`, as training rows have it; any other text as it is."""
    return turn.removeprefix(f"{INSTRUCTION}\n")


def expected_of(row: dict, where: str) -> Any:
    """Return the reference answer of a line, "expected" or "output": a value or its JSON text. Raises InputError."""
    name = "expected" if "expected" in row else "output"
    if name not in row:
        raise InputError(f'{where} has no "expected" (or "output")')
    try:
        return parse_json(row[name]) if isinstance(row[name], str) else row[name]
    except ValueError as error:
        raise InputError(f'{where}: "{name}" is not JSON: {error}') from None


def pages_of(document: str, fits: Callable[[str], bool]) -> list[str]:
    """Return the document in parts of complete lines, as few as `fits` allows; a form feed always ends a page.
    A single line that does not fit is cut between words; blank pages are left out."""
    pages = [""]
    for line in document.replace("\f", "\n\f").split("\n"):
        for piece in _line_parts(line, fits):
            longer = f"{pages[-1]}\n{piece}" if pages[-1] else piece
            if pages[-1] and (piece.startswith("\f") or not fits(longer)):
                pages.append(piece)
            else:
                pages[-1] = longer
    return [page for page in pages if page.strip()]


def _line_parts(line: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(line) or len(line) < 2:
        return [line]
    middle = line.find(" ", len(line) // 2)
    middle = middle if middle > 0 else len(line) // 2
    return [*_line_parts(line[:middle], fits), *_line_parts(line[middle:], fits)]


def joined(answers: Sequence[Any], pages: Sequence[str], name: str = "") -> Any:
    """Return one value of the answers to a document's pages, at least one: objects field by field, lists concatenated.
    Any other value is that of the first page whose text has it: a total is on the last page, and answers of pages
    without it do not count. Where no page has it, it is the first page's."""
    kind = next((type(answer) for answer in answers if isinstance(answer, dict | list)), None)
    if kind is list:
        return [item for answer in answers if isinstance(answer, list) for item in answer]
    pairs = list(zip(answers, pages, strict=True))
    if kind is dict:
        fields: dict[str, list] = {}
        for answer, page in pairs:
            for field in answer if isinstance(answer, dict) else ():
                fields.setdefault(field, []).append((answer[field], page))
        return {field: joined(*zip(*parts, strict=True), f"{name}.{field}") for field, parts in fields.items()}
    readable = (answer for answer, page in pairs if answer != "" and occurs_in(name, answer, page))
    return next(readable, answers[0])
