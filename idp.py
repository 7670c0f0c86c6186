"""Documents to JSON (IDP): the user turn for a document, the one layout of its JSON, and the loaded extractor.

Apart from common.py because it knows one task. What turns a document into what the model sees is here once, so that
a request meets what was trained, and infer and eval meet the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common import (
    InputError,
    PromptEncoder,
    add_loading_flags,
    base_of,
    check_model_name,
    load_model,
    local_or_hub,
    read_json,
    seed_number,
)

if TYPE_CHECKING:
    import argparse

    from decoding import JsonDecoder, SchemaGrammar

RETRY_TEMPERATURE = 0.7
INSTRUCTION = "Extract the invoice as JSON."


def idp_prompt(document: str) -> str:
    """The user turn for a document: one instruction line, then the text without blank ends of lines and page."""
    lines = [line.rstrip() for line in document.splitlines()]
    return f"{INSTRUCTION}\n" + "\n".join(lines).strip("\n")


def compact_json(value: Any) -> str:
    """JSON text in the one layout of outputs: separators `,` and `:`, letters as they are, keys in the given order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def expected_of(row: dict, where: str) -> Any:
    """The known answer of a line, a value or JSON text of one. Raises InputError."""
    if "expected" not in row:
        raise InputError(f'{where} has no "expected"')
    if not isinstance(row["expected"], str):
        return row["expected"]
    try:
        return json.loads(row["expected"])
    except ValueError as error:
        raise InputError(f'{where}: "expected" is no JSON: {error}') from None


def pages_of(document: str, fits: Callable[[str], bool]) -> list[str]:
    """The document in parts of whole lines, as few as `fits` allows; form feeds end a page where there are any.

    A single line that does not fit is cut between words."""
    lines = [piece for line in document.replace("\f", "\n\f").split("\n") for piece in _line_parts(line, fits)]
    pages, page = [], ""
    for line in lines:
        longer = f"{page}\n{line}" if page else line
        if page and (line.startswith("\f") or not fits(longer)):
            pages.append(page)
            longer = line
        page = longer
    return [*pages, page]


def _line_parts(line: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(line) or len(line) < 2:
        return [line]
    middle = line.find(" ", len(line) // 2)
    middle = middle if middle > 0 else len(line) // 2
    return [*_line_parts(line[:middle], fits), *_line_parts(line[middle:], fits)]


# ---------------------------------------------------------------------------------------------------- using a model


def add_extraction_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that turns documents into JSON."""
    add = parser.add_argument_group("schema and decoding").add_argument
    add("--schema", default="data/idp_schema.json", help="JSON Schema of the answer (%(default)s)")
    add("--chunk", action="store_true", help="read documents longer than the context page by page")
    add("--max_new_tokens", type=int, default=512, help="budget of an answer; it is closed within it (%(default)s)")
    add("--retries", type=int, default=3, help="further tries where only jsonschema can check a rule (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of the retries, which sample (%(default)s)")
    add("--batch_size", type=int, default=8, help="documents decoded together (%(default)s)")
    add_loading_flags(parser)


def check_extraction_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags out of range."""
    if args.max_new_tokens < 1 or args.retries < 0 or args.batch_size < 1:
        raise InputError("--max_new_tokens and --batch_size are at least 1, --retries 0 or more")


def _failed(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


class Extractor:
    """A loaded model that answers documents with JSON of one schema."""

    def __init__(self, decoder: JsonDecoder, grammar: SchemaGrammar, args: argparse.Namespace):
        self.decoder, self.grammar, self.args = decoder, grammar, args
        self.encoder = PromptEncoder(decoder.tokenizer)
        self.context = decoder.model.config.get_text_config().max_position_embeddings

    @classmethod
    def load(cls, model_dir: str, args: argparse.Namespace) -> Extractor:
        """Check the schema with the model's tokenizer, then load the model with the flags of `add_extraction_flags`.
        Raises InputError."""
        from transformers import AutoTokenizer

        from decoding import JsonDecoder, compile_schema, grammar_tokenizer

        schema = read_json(args.schema)
        check_model_name(model_dir)
        path = local_or_hub(base_of(model_dir))
        compile_schema(schema, grammar_tokenizer(AutoTokenizer.from_pretrained(path)), args.schema)
        model, tokenizer = load_model(model_dir, args.quantization, args.compute_dtype, args.offload_folder)
        decoder = JsonDecoder(model, tokenizer)
        return cls(decoder, compile_schema(schema, decoder.grammar_tokenizer, args.schema), args)

    def extract(self, documents: Sequence[str]) -> list[dict[str, Any]]:
        """{"json", "truncated"} or {"error": {"code", "message"}} for each document, in order.

        With `--chunk` a document longer than the context is read page by page."""
        prompts = [self.encoder.prompt(idp_prompt(document)) for document in documents]
        room = self.context - self.args.max_new_tokens
        results: list[dict[str, Any]] = [{} for _ in documents]
        for i, prompt in enumerate(prompts):
            if len(prompt) <= room:
                continue
            if self.args.chunk and len(pages := self._pages(documents[i])) > 1:
                results[i] = self._merged(self.extract(pages))
            else:
                numbers = f"{len(prompt)} tokens and {self.args.max_new_tokens} for the answer, context {self.context}"
                results[i] = _failed("too_long", f"the document does not fit: {numbers}; --chunk reads pages")
        waiting = sorted((i for i, result in enumerate(results) if not result), key=lambda i: len(prompts[i]))
        for attempt in range(self.args.retries + 1):
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            seed, still = self.args.seed + attempt, []
            for start in range(0, len(waiting), self.args.batch_size):
                chosen = waiting[start : start + self.args.batch_size]
                turns, grammars = [prompts[i] for i in chosen], [self.grammar] * len(chosen)
                drafts = self.decoder.generate(turns, grammars, self.args.max_new_tokens, temperature, seed)
                for i, draft in zip(chosen, drafts, strict=True):
                    results[i] = self.checked(draft.text, draft.truncated)
                    if results[i].get("error", {}).get("code") == "invalid":
                        still.append(i)
            waiting = still
        return results

    def checked(self, text: str | None, truncated: bool) -> dict[str, Any]:
        """The last word: the text parses, validates and can be written, or it is an error."""
        from decoding import pointer_of

        if text is None:
            return _failed("no_close", "no valid ending fits the token budget; raise --max_new_tokens")
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # 1e999 is read as infinity
        except ValueError as error:
            return _failed("invalid", f"the answer is no JSON: {error}")
        problem = next(iter(self.grammar.validator.iter_errors(value)), None)
        if problem is not None:
            place = pointer_of(problem)
            return _failed("invalid", f"the answer breaks {problem.validator} at {place}; raise --retries")
        return {"json": value, "truncated": truncated}

    def _pages(self, document: str) -> list[str]:
        room = self.context - self.args.max_new_tokens
        return pages_of(document, lambda text: len(self.encoder.prompt(idp_prompt(text))) <= room)

    def _merged(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """One answer of a document's pages: the first page's, with the items of the other pages' lists added."""
        for answer in answers:
            if "error" in answer:
                return answer
        merged = answers[0]["json"]
        for answer in answers[1:]:
            for key, value in answer["json"].items() if isinstance(merged, dict) else []:
                if isinstance(value, list) and isinstance(merged.get(key), list):
                    merged[key] += [item for item in value if item not in merged[key]]
        return self.checked(compact_json(merged), any(answer["truncated"] for answer in answers))
