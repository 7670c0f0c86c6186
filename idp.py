"""Documents to JSON (IDP): the user turn for a document, the one layout of its JSON, and the loaded extractor.

Apart from common.py because it knows one task. What turns a document into what the model sees is here once, so that
a request meets what was trained, and infer and eval meet the same answers; so is what values are compared by, which
joins the answers of a document's pages and measures answers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from common import PromptEncoder
from files import InputError, parse_json, read_json, seed_number
from models import add_loading_flags, base_of, check_model_name, load_model, local_or_hub

if TYPE_CHECKING:
    import argparse

    from decoding import JsonDecoder, SchemaGrammar

RETRY_TEMPERATURE = 0.7
INSTRUCTION = "Extract the invoice as JSON."
LEAST_PAGE = 64  # tokens; with less room --chunk would read a document word by word

# In English, German, French and Swedish, without accents; three letters of one are enough.
MONTHS = (
    "january januar janner janvier januari",
    "february februar fevrier februari",
    "march marz maerz mrz mars",
    "april avril",
    "may mai maj",
    "june juni juin",
    "july juli juillet",
    "august aout augusti",
    "september septembre",
    "october oktober octobre",
    "november novembre",
    "december dezember decembre",
)
DAY = re.compile(
    r"(?P<y>\d{4})[-/. ](?P<m>\d{1,2})[-/. ](?P<d>\d{1,2})(?!\d)"
    r"|(?<!\d)(?P<a>\d{1,2})[-/. ]+(?P<b>\d{1,2})[-/. ]+(?P<c>\d{4}|\d{2})(?!\d)"
    r"|(?<!\d)(?P<d2>\d{1,2})(?:st|nd|rd|th|er)?[-/., ]*(?P<m2>[^\W\d_]{3,9})[-/., ]*(?P<y2>\d{4}|\d{2})(?!\d)"
    r"|(?P<m3>[^\W\d_]{3,9})\.? *(?P<d3>\d{1,2})(?:st|nd|rd|th)?,? +(?P<y3>\d{4})",
    re.IGNORECASE,
)
NUMBER = re.compile(r"\d(?:[\d.,']*\d)?(?: \d(?:[\d.,']*\d)?)*")  # with what follows it after single spaces
SPACES = str.maketrans({"\xa0": " ", "\u202f": " ", "\u2009": " ", "\u2019": "'"})


def idp_prompt(document: str) -> str:
    """The user turn for a document: one instruction line, then the text without blank ends of lines and page."""
    lines = [line.rstrip() for line in document.splitlines()]
    return f"{INSTRUCTION}\n" + "\n".join(lines).strip("\n")


def compact_json(value: Any) -> str:
    """JSON text in the one layout of outputs: separators `,` and `:`, letters as they are, keys in the given order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def document_of(turn: str) -> str:
    """The document in a user turn of `idp_prompt`, as training rows have it; any other text as it is."""
    return turn.removeprefix(f"{INSTRUCTION}\n")


def expected_of(row: dict, where: str) -> Any:
    """The known answer of a line, "expected" or "output": a value or JSON text of one. Raises InputError."""
    name = "expected" if "expected" in row else "output"
    if name not in row:
        raise InputError(f'{where} has no "expected" (or "output")')
    if not isinstance(row[name], str):
        return row[name]
    try:
        return parse_json(row[name])
    except ValueError as error:
        raise InputError(f'{where}: "{name}" is no JSON: {error}') from None


# ------------------------------------------------------------------------------------------------- comparing values


def _month(word: str) -> int | None:
    letters = unicodedata.normalize("NFD", word.casefold())
    letters = "".join(sign for sign in letters if not unicodedata.combining(sign))
    return next((i for i, names in enumerate(MONTHS, 1) if f" {letters}" in f" {names}"), None)


def days(text: str) -> Iterator[tuple[date, ...]]:
    """The days that each date in a text can mean: of 03/04/2024 first 3 April, then 4 March."""
    for found in DAY.finditer(unicodedata.normalize("NFC", text)):
        part = {name: value for name, value in found.groupdict().items() if value}
        if "y" in part:
            readings = [(part["y"], part["m"], part["d"])]
        elif "a" in part:
            readings = [(part["c"], part["b"], part["a"]), (part["c"], part["a"], part["b"])]
        else:
            year, month, day = (part.get(name + "2") or part.get(name + "3") for name in "ymd")
            readings = [(year, _month(month) or 0, day)]
        meant = []
        for year, month, day in readings:
            try:
                meant.append(date(int(year) + (2000 if len(year) == 2 else 0), int(month), int(day)))
            except ValueError:
                continue
        if meant:
            yield tuple(dict.fromkeys(meant))


def numbers(text: str) -> set[Decimal]:
    """The values that the numbers in a text can have: 1.234,50 and 1,234.50 and 1 234,50 are all 1234.5, 1.234 is two
    values. Where columns stand one space apart, 2 469,00 is 2, 469 and 2469."""
    values = set()
    for row in NUMBER.findall(text.translate(SPACES)):
        pieces = row.split(" ")
        for start, piece in enumerate(pieces):
            written = {piece}
            for next_piece in pieces[start + 1 :] if re.fullmatch(r"\d{1,3}", piece) else ():
                if not re.fullmatch(r"\d{3}(?:[.,]\d+)?", next_piece):
                    break
                piece += next_piece
                written.add(piece)
                if not next_piece.isdigit():
                    break
            for digits in (number.replace("'", "") for number in written):
                for decimal, thousands in ((".", ","), (",", ".")):
                    try:
                        values.add(abs(Decimal(digits.replace(thousands, "").replace(decimal, "."))))
                    except InvalidOperation:
                        continue
    return values


def normalised(text: str) -> str:
    """What strings are compared by: words in lower case with one space between, a leading minus, the signs of C++ and
    C#; a text of signs alone as it is."""
    text = unicodedata.normalize("NFC", text.strip()).casefold().replace("\u2212", "-")
    words = re.findall(r"^-(?=\d)|\w+(?:[+#]+(?!\w))?", text)
    return " ".join(words) if words else "".join(text.split())


def leaf_key(name: str, value: Any) -> Any:
    """What two values of a field are compared by. A field is a date where a word of its name is that and its text has
    one: invoice_date, dateOfIssue, due-date, but not candidate."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return Decimal(str(value)).normalize()
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    if {"date", "dates"} & {word.lower() for word in words}:
        meant = next(days(value), None)
        if meant:
            return meant
    return normalised(value)


def stands_in(name: str, value: Any, document: str) -> bool:
    """Whether a value can be read in the document: a number by value, a date by day, a text by its letters and digits,
    signs alone as they are. What is meant but not written, such as a quantity of 1, does not stand in it."""
    key = leaf_key(name, value)
    if isinstance(key, Decimal):
        return abs(key) in numbers(document)
    if isinstance(key, tuple) and any(set(key) & set(meant) for meant in days(document)):
        return True
    if not isinstance(value, str):
        return False
    letters, read = (
        "".join(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold())) for text in (value, document)
    )
    return letters in read if letters else normalised(value) in "".join(document.split())


# ---------------------------------------------------------------------------------------------------- long documents


def pages_of(document: str, fits: Callable[[str], bool]) -> list[str]:
    """The document in parts of whole lines, as few as `fits` allows; form feeds end a page where there are any.

    A single line that does not fit is cut between words; blank pages are left out."""
    lines = [piece for line in document.replace("\f", "\n\f").split("\n") for piece in _line_parts(line, fits)]
    pages, page = [], ""
    for line in lines:
        longer = f"{page}\n{line}" if page else line
        if page and (line.startswith("\f") or not fits(longer)):
            pages.append(page)
            longer = line
        page = longer
    return [page for page in [*pages, page] if page.strip()]


def _line_parts(line: str, fits: Callable[[str], bool]) -> list[str]:
    if fits(line) or len(line) < 2:
        return [line]
    middle = line.find(" ", len(line) // 2)
    middle = middle if middle > 0 else len(line) // 2
    return [*_line_parts(line[:middle], fits), *_line_parts(line[middle:], fits)]


def joined(answers: Sequence[Any], pages: Sequence[str], name: str = "") -> Any:
    """One value of the answers to a document's pages, at least one: objects field by field, lists one after the other.

    Any other value is that of the first page where it stands in the text: a total is on the last page, and what the
    model says of pages without it counts for nothing. Where it stands on none, the first page's."""
    kind = next((type(answer) for answer in answers if isinstance(answer, dict | list)), None)
    if kind is list:
        return [item for answer in answers if isinstance(answer, list) for item in answer]
    pairs = list(zip(answers, pages, strict=True))
    if kind is dict:
        pairs = [(answer, page) for answer, page in pairs if isinstance(answer, dict)]
        whole = {}
        for field in dict.fromkeys(field for answer, _ in pairs for field in answer):
            having = [(answer[field], page) for answer, page in pairs if field in answer]
            whole[field] = joined(*zip(*having, strict=True), f"{name}.{field}")
        return whole
    standing = (answer for answer, page in pairs if answer != "" and stands_in(name, answer, page))
    return next(standing, answers[0])


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


def _check_room(tokenizer: Any, config: Any, args: argparse.Namespace) -> None:
    """Raises InputError where the context has no room for a document beside its answer."""
    context = config.get_text_config().max_position_embeddings
    room = context - args.max_new_tokens - len(PromptEncoder(tokenizer).prompt(idp_prompt("")))
    if room < (LEAST_PAGE if args.chunk else 1):
        left = f"--max_new_tokens {args.max_new_tokens} leave {max(room, 0)} tokens of the context of {context}"
        raise InputError(f"{left} for a document; give fewer")


class Extractor:
    """A loaded model that answers documents with JSON of one schema."""

    def __init__(self, decoder: JsonDecoder, grammar: SchemaGrammar, args: argparse.Namespace):
        self.decoder, self.grammar, self.args = decoder, grammar, args
        self.encoder = PromptEncoder(decoder.tokenizer)
        self.context = decoder.model.config.get_text_config().max_position_embeddings
        _check_room(decoder.tokenizer, decoder.model.config, args)

    @classmethod
    def load(cls, model_dir: str, args: argparse.Namespace) -> Extractor:
        """Check the schema with the model's tokenizer, then load the model with the flags of `add_extraction_flags`.
        Raises InputError."""
        from transformers import AutoConfig, AutoTokenizer

        from decoding import JsonDecoder, compile_schema, grammar_tokenizer

        schema = read_json(args.schema)
        check_model_name(model_dir)
        path = local_or_hub(base_of(model_dir))
        tokenizer = AutoTokenizer.from_pretrained(path)
        compile_schema(schema, grammar_tokenizer(tokenizer), args.schema)
        _check_room(tokenizer, AutoConfig.from_pretrained(path), args)
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
            if self.args.chunk:
                pages = self._pages(documents[i])
                results[i] = self._merged(self.extract(pages), pages)
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
        from decoding import broken_rule

        if text is None:
            return _failed("no_close", "no valid ending fits the token budget; raise --max_new_tokens")
        try:
            value = parse_json(text)
        except ValueError as error:
            return _failed("invalid", f"the answer is no JSON: {error}")
        problem = broken_rule(self.grammar.validator, value)
        if problem:
            return _failed("invalid", f"the answer {problem}; raise --retries")
        return {"json": value, "truncated": truncated}

    def _pages(self, document: str) -> list[str]:
        room = self.context - self.args.max_new_tokens
        return pages_of(document, lambda text: len(self.encoder.prompt(idp_prompt(text))) <= room)

    def _merged(self, answers: list[dict[str, Any]], pages: list[str]) -> dict[str, Any]:
        """One answer of those to the pages, or an error: a page's, or that the whole is not valid."""
        from decoding import broken_rule

        for number, answer in enumerate(answers, 1):
            if "error" in answer:
                where = f"page {number} of {len(answers)}"
                return _failed(answer["error"]["code"], f"{where}: {answer['error']['message']}")
        value = joined([answer["json"] for answer in answers], pages)
        problem = broken_rule(self.grammar.validator, value)
        if problem:
            return _failed("pages", f"the answers of {len(pages)} pages, joined: the whole {problem}")
        return {"json": value, "truncated": any(answer["truncated"] for answer in answers)}
