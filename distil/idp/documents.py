"""Documents to JSON: the user turn for a document, the layout of its JSON, and pages of long documents.

Training data, requests and evaluation use these functions, so that a model always sees what it was trained on: the
file task.json of an adapter has its `DocumentTask`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import InputError
from distil.files import parse_json
from distil.idp.forms import schema_form
from distil.idp.values import occurs_in
from distil.models import ModelRef
from distil.tasks import TASK_FILE, document_record

INSTRUCTION = "Extract the invoice as JSON."  # of models without a task file, whatever their schema was


@dataclass(frozen=True)
class DocumentTask:
    """How a model is asked for JSON, as notes of prepared data and task files of adapters have it. instruction: None
    where it is that of each schema (`instruction_of`); show_schema: whether prompts have the schema."""

    instruction: str | None = None
    show_schema: bool = True

    def prompt(self, schema: Any) -> DocumentPrompt:
        """Return the prompt of documents of a checked schema."""
        first = f"{self.instruction or instruction_of(schema)}\n"
        return DocumentPrompt((f"{first}Schema: {schema_form(schema)}\n\n", first), self.show_schema)


def task_of_model(ref: ModelRef) -> DocumentTask:
    """Return how a model was trained to be asked; a base model is shown the schema, a model without a task file was
    trained before there were such prompts. Raises InputError for a damaged task file."""
    if (record := document_record(ref)) is None:
        trained = ref.adapter or Path(ref.path, "export.json").is_file()
        return DocumentTask(INSTRUCTION, False) if trained else DocumentTask()
    if not isinstance(text := record.get("instruction"), str | None) or type(record["show_schema"]) is not bool:
        raise InputError(f'{ref.name}: {TASK_FILE}: "instruction" is a text or null, "show_schema" true or false')
    return DocumentTask(text, record["show_schema"])


@dataclass(frozen=True)
class DocumentPrompt:
    """The user turn of documents. heads: the instruction line with the schema and without; `shown`: the first is used.
    What all documents share comes first, so that it can be cached."""

    heads: tuple[str, ...] = (f"{INSTRUCTION}\n",)
    shown: bool = False

    @property
    def head(self) -> str:
        """What comes before the document."""
        return self.heads[0 if self.shown else -1]

    def turn(self, document: str) -> str:
        """Return the user turn for a document, whose text has no blank ends of lines and page there."""
        return self.head + "\n".join(line.rstrip() for line in document.splitlines()).strip("\n")

    def document_of(self, turn: str) -> str:
        """Return the document in a user turn, as training rows have it; any other text as it is."""
        heads = (*self.heads, f"{INSTRUCTION}\n")
        return next((turn.removeprefix(head) for head in heads if turn.startswith(head)), turn)


idp_prompt = DocumentPrompt().turn  # of the example data and of models without a task file


def instruction_of(schema: Any) -> str:
    """Return the instruction of a schema: its title in lower case but for abbreviations, then its description."""
    schema = schema if isinstance(schema, dict) else {}
    words = schema.get("title", "").split() or ["data"]
    title = " ".join(word.lower() if word[1:].islower() or len(word) == 1 else word for word in words)
    return " ".join([f"Extract the {title} as JSON.", *schema.get("description", "").split()])


def add_prompt_flags(add: Callable, auto: str) -> None:
    """Add the flags of all scripts that write prompts for documents. auto: what it means for --show_schema."""
    add("--show_schema", choices=("auto", "on", "off"), default="auto", help=f"put it into prompts; {auto}")
    add("--instruction", metavar="TEXT", help="first line of prompts (default: from the schema's title)")


def compact_json(value: Any) -> str:
    """Return JSON text in the layout of all outputs: separators `,` and `:`, letters unescaped, keys in order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def expected_of(row: dict, where: str) -> Any:
    """Return the reference answer of a line, "expected" or "output": a value or its JSON text. Raises InputError."""
    name = "expected" if "expected" in row else "output"
    if name not in row:
        raise InputError(f'{where} has no "expected" (or "output")')
    try:
        return parse_json(row[name]) if isinstance(row[name], str) else row[name]
    except ValueError as error:
        raise InputError(f'{where}: "{name}" is not JSON: {error}') from None


def pages_of(document: str, fits: Callable[[str], bool]) -> dict[int, str]:
    """Return the document in parts of complete lines, as few as `fits` allows, by the place of their first character.
    A form feed always begins a page, a line that does not fit is cut between words, blank pages are left out."""
    pages: dict[int, str] = {}
    at = first = 0
    for line in re.findall(r"\f?[^\n\f]*\n?", document):
        for piece in _line_parts(line, fits):
            longer = pages.get(first, "") + piece
            first = at if piece.startswith("\f") or not fits(longer) else first
            pages[first] = longer if first < at else piece
            at += len(piece)
    return {start: page for start, page in pages.items() if page.strip()}


def _line_parts(line: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(line) or len(line) < 2:
        return [line]
    middle = line.find(" ", len(line) // 2)
    middle = middle if middle > 0 else len(line) // 2
    return [*_line_parts(line[:middle], fits), *_line_parts(line[middle:], fits)]


def joined(answers: Sequence[Any], pages: Sequence[str], name: str = "") -> Any:
    """Return one value of the answers to a document's pages, at least one: objects field by field, lists concatenated.
    Any other value is that of the first page whose text has it: a total is on the last page, and answers of pages
    without it do not count. Where no page has it, it is the first page's. A leaf may be an object with a `value`."""
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
    values = [(answer, getattr(answer, "value", answer), page) for answer, page in pairs]
    readable = (answer for answer, value, page in values if value != "" and occurs_in(name, value, page))
    return next(readable, answers[0])
