"""The extractor: a loaded model that answers documents with JSON of one schema, and its options and flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from common import InputError, PromptEncoder
from distil.cli import add_engine_flags, add_loading_flags, loading_options, seed_number
from distil.engine import ServedModel
from distil.files import file_sha256, parse_json, read_json
from distil.generation import load_to_write
from distil.idp import confidence
from distil.idp.copying import CopyGrammar, Vocabulary, check_copied
from distil.idp.decoder import Closer, Draft, JsonDecoder
from distil.idp.documents import DocumentPrompt, DocumentTask, add_prompt_flags, joined, pages_of, task_of_model
from distil.idp.evidence import evidence_rows, gathered
from distil.idp.schema import SchemaGrammar, closed, compile_schema, grammar_tokenizer, noted_validator
from distil.idp.validation import broken_rule, some
from distil.idp.values import choices_of
from distil.models import LoadOptions, ModelRef
from distil.processes import print_note
from distil.support import context_length
from distil.tasks import document_record

SCHEMA = "data/idp_schema.json"
RETRY_TEMPERATURE = 0.7
LEAST_PAGE = 64  # tokens; with less room --chunk would read a document word by word


@dataclass(frozen=True)
class ExtractOptions:
    """How documents are turned into JSON. schema: its value; schema_name and schema_sha256: of the file it is from;
    validator: of the checked schema; prompt: of `for_model`; the others are those of `add_extraction_flags`."""

    schema: Any
    schema_name: str = "schema"
    schema_sha256: str = ""
    copy: tuple[str, ...] = ()
    chunk: bool = False
    max_new_tokens: int = 512
    retries: int = 3
    seed: int = 0
    batch_size: int = 8
    evidence: bool = False
    show_schema: str = "auto"
    instruction: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    validator: Any = None
    prompt: DocumentPrompt = field(default_factory=DocumentPrompt)

    def for_model(self, ref: ModelRef) -> Self:
        """Return the options with the prompt of a model: as it was trained, but for what the flags say."""
        task = task_of_model(ref)
        shown = task.show_schema if self.show_schema == "auto" else self.show_schema == "on"
        return replace(self, prompt=DocumentTask(self.instruction or task.instruction, shown).prompt(self.schema))

    def with_schema(self, schema: Any, name: str) -> Self:
        """Return the options for another schema, checked. Raises InputError. name: of the schema, in messages."""
        validator = noted_validator(schema, name)
        check_copied(self.copy, validator.schema, name)
        return replace(self, schema=validator.schema, schema_name=name, validator=validator)


def add_extraction_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that turns documents into JSON; `extract_options` reads them."""
    add = parser.add_argument_group("schema and decoding").add_argument
    add("--schema", help=f"JSON Schema of the answer ({SCHEMA})")
    add_prompt_flags(add, "auto: as the model was trained, on for a base model")
    paths = "vendor or line_items[].description"
    add("--copy", nargs="+", metavar="FIELD", default=[], help=f"strings made of words of the document: {paths}")
    add("--chunk", action="store_true", help="read documents longer than the context page by page")
    add("--max_new_tokens", type=int, default=512, help="budget of an answer; it is closed within it (%(default)s)")
    add("--retries", type=int, default=3, help="further tries where only jsonschema can check a rule (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of the retries, which sample (%(default)s)")
    add("--batch_size", type=int, default=8, help="documents decoded together (%(default)s)")
    add("--evidence", action="store_true", help="also the confidence of each value and its place in the document")
    add_loading_flags(parser)
    add_engine_flags(parser)


def extract_options(flags: Mapping[str, Any]) -> ExtractOptions:
    """Return the checked options of `add_extraction_flags`, with the schema read and checked. Raises InputError."""
    values = {name: flags[name] for name in ("chunk", "max_new_tokens", "retries", "seed", "batch_size", "evidence")}
    values |= {"copy": tuple(flags["copy"])} | {name: flags[name] for name in ("show_schema", "instruction")}
    if min(values["max_new_tokens"], values["batch_size"]) < 1 or values["retries"] < 0:
        raise InputError("--max_new_tokens and --batch_size are at least 1, --retries 0 or more")
    path = flags["schema"] or SCHEMA
    schema, sha256 = read_json(path), file_sha256(path)
    if flags["copy"] and flags["url"]:
        raise InputError("--copy is for a model that runs here, and --url names an engine")
    return ExtractOptions(None, "", sha256, **values, load=loading_options(flags)).with_schema(schema, path)


def compile_for(ref: ModelRef, options: ExtractOptions) -> SchemaGrammar:
    """Compile the schema for a model, whose weights are not loaded; print notes on its prompt. Raises InputError where
    it cannot be enforced, or where the context has no room for a document."""
    from transformers import AutoConfig, AutoTokenizer

    options = options.for_model(ref)
    config, tokenizer = AutoConfig.from_pretrained(ref.path), AutoTokenizer.from_pretrained(ref.path)
    encoder = PromptEncoder(tokenizer)
    tokenizer.eos_token = encoder.end_of_turn  # as loading sets it: the token that ends a document
    tokens = grammar_tokenizer(tokenizer, config.get_text_config().vocab_size)
    grammar = compile_schema(closed(options.schema)[0], tokens, options.schema_name, options.validator)
    if grammar.left_out:
        print_note(f"{options.schema_name}: checked after decoding only: {some(grammar.left_out)}")
    _room_for_document(encoder, context_length(config.get_text_config()), options)
    usual = replace(options, show_schema="auto", instruction=None).for_model(ref).prompt
    if options.prompt != usual and (ref.adapter or document_record(ref)):
        print_note(f"{ref.name} was trained with other prompts than --show_schema or --instruction give")
    if options.prompt.shown:
        shown, hidden = (len(encoder.text(head)) for head in options.prompt.heads)
        print_note(f"{options.schema_name} takes {shown - hidden} tokens of each prompt (--show_schema)")
    return grammar


class ServedDecoder:
    """Writes documents by an engine that is given the schema; `Extractor` checks whether it kept to it."""

    def __init__(self, engine: ServedModel, schema: Any):
        self.engine, self.tokenizer, self.context = engine, engine.tokenizer, engine.context
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        # Completions of llama.cpp have the schema under its own name; vLLM ignores that.
        self.how = {"response_format": form, "json_schema": schema}
        self.closer: Closer | None = None

    def generate(
        self, ids: list[list[int]], grammars: list[SchemaGrammar], budget: int, temperature: float = 0, seed: int = 0
    ) -> list[Draft]:
        """Return a draft for each prompt, as `JsonDecoder.generate`."""
        written = self.engine.write(ids, budget, temperature, seed, **self.how)
        texts = [
            one.text if one.ended else self._closed(one.text, grammar, budget)
            for one, grammar in zip(written, grammars, strict=True)
        ]
        pairs = zip(written, texts, strict=True)
        return [Draft(None, [], text=text, truncated=not one.ended) for one, text in pairs]

    def _closed(self, text: str, grammar: SchemaGrammar, budget: int) -> str | None:
        """Return a document that was cut with an ending of at most `budget` tokens, None where there is none; a text
        that is not the beginning of a document stays as it is."""
        self.closer = self.closer or Closer(grammar.tokenizer)
        tokens = self.engine.encoder.text(re.sub(r'("(?:[^"\\]|\\.)*"?)|\s+', r"\1", text))  # in the grammar's layout
        matcher = grammar.matcher()
        accepted = tokens[: matcher.validate_tokens(tokens)]
        if len(accepted) < len(tokens) - 1:  # the last one may be half of another
            return text
        matcher.consume_tokens(accepted)
        ending = self.closer.close(matcher, budget)
        return None if ending is None else self.tokenizer.decode(accepted + ending, clean_up_tokenization_spaces=False)


class Extractor:
    """A model with the grammar of one schema. Raises InputError where the context has no room for a document."""

    def __init__(self, decoder: JsonDecoder | ServedDecoder, grammar: SchemaGrammar, options: ExtractOptions):
        self.decoder, self.grammar, self.options = decoder, grammar, options
        self.encoder = PromptEncoder(decoder.tokenizer)
        self.vocabulary = Vocabulary(grammar.tokenizer) if options.copy else None
        self.room = _room_for_document(self.encoder, decoder.context, options)
        self.weights: list[float] | None = None  # of the confidence; without them it is the raw probability
        self.listed = frozenset(choices_of(options.schema))

    @classmethod
    def load(
        cls, ref: ModelRef, options: ExtractOptions, grammar: SchemaGrammar | None = None, calibrated: bool = True
    ) -> Self:
        """Compile the schema, unless `grammar` is of `compile_for`, then load the model and, where `calibrated`, the
        calibration of its confidence. Raises InputError."""
        grammar, options = grammar or compile_for(ref, options), options.for_model(ref)
        server, weights = options.load.server, None
        if options.evidence and server:
            print_note("--url gives no log-probabilities: confidence is null")
        elif options.evidence and calibrated and not (weights := confidence.stored_weights(ref)):
            raw = "the raw probability of tokens; eval_idp.py --fit_confidence fits it"
            print_note(f"confidence is not calibrated: {raw}")
        if server:
            options = replace(options, batch_size=4 * server.concurrency)  # that wait for one another
            return cls(ServedDecoder(ServedModel(server, ref.path), grammar.schema), grammar, options)
        extractor = cls(JsonDecoder(*load_to_write(ref, options.load), grammar.tokenizer), grammar, options)
        extractor.weights = weights
        return extractor

    def for_schema(self, options: ExtractOptions, grammar: SchemaGrammar) -> Extractor:
        """Return an extractor of the same model for other options. grammar: of `compile_for` with these."""
        served = isinstance(self.decoder, ServedDecoder)
        decoder = ServedDecoder(self.decoder.engine, grammar.schema) if served else self.decoder
        other = Extractor(decoder, grammar, replace(options, batch_size=self.options.batch_size))
        other.weights = self.weights
        return other

    def extract(self, documents: Sequence[str]) -> list[dict[str, Any]]:
        """Return {"json", "truncated"} or {"error": {"code", "message"}} for each document; with `chunk` by pages.
        With `evidence` an answer also has the rows of `evidence_rows`."""
        results = self._answers(documents)
        for result, document in zip(results, documents, strict=True):
            if "evidence" in result:
                result["evidence"] = evidence_rows(result["evidence"], document)
                if self.weights:
                    confidence.apply(self.weights, result, self.listed)
        return results

    def _answers(self, documents: Sequence[str], starts: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Return what `extract` does, with evidence of `gathered`. starts: of these pages in their document."""
        options = self.options
        prompts = [self.encoder.prompt(options.prompt.turn(document)) for document in documents]
        results: list[dict[str, Any]] = [{} for _ in documents]
        for i, prompt in enumerate(prompts):
            if len(prompt) > self.room and options.chunk:
                pages = self.pages(documents[i])
                results[i] = self.merged(self._answers([*pages.values()], [*pages]), pages)
            elif len(prompt) > self.room:
                budget = options.max_new_tokens
                numbers = f"{len(prompt)} tokens and {budget} for the answer, context {self.room + budget}"
                results[i] = _failed("too_long", f"the document does not fit: {numbers}; --chunk reads pages")
        waiting = sorted((i for i, result in enumerate(results) if not result), key=lambda i: len(prompts[i]))
        for attempt in range(options.retries + 1):
            how = (options.max_new_tokens, RETRY_TEMPERATURE if attempt else 0.0, options.seed + attempt)
            for start in range(0, len(waiting), options.batch_size):
                batch = waiting[start : start + options.batch_size]
                grammars = [self.grammar_for(documents[i]) for i in batch]
                drafts = self.decoder.generate([prompts[i] for i in batch], grammars, *how)
                for i, draft in zip(batch, drafts, strict=True):
                    results[i] = self.checked(draft.text, draft.truncated)
                    if options.evidence and "json" in results[i]:
                        pieces = [self.grammar.tokenizer.decode_bytes([token]) for token in draft.tokens]
                        results[i]["evidence"] = gathered(draft, pieces, documents[i], *starts[i : i + 1])
            waiting = [i for i in waiting if results[i].get("error", {}).get("code") == "invalid"]
        return results

    def grammar_for(self, document: str) -> SchemaGrammar | CopyGrammar:
        """Return the grammar of the answer to a document."""
        if self.vocabulary is None:
            return self.grammar
        return CopyGrammar(self.grammar, self.vocabulary, document, self.options.copy)

    def checked(self, text: str | None, truncated: bool) -> dict[str, Any]:
        """Return the answer where the text parses, validates and can be written as JSON, else an error."""
        if text is None:
            return _failed("no_close", "no valid ending fits the token budget; raise --max_new_tokens")
        try:
            value = parse_json(text, unique=True)
        except ValueError as error:
            return _failed("invalid", f"the answer is not JSON: {error}")
        if problem := broken_rule(self.grammar.validator, value):
            return _failed("invalid", f"the answer {problem}; raise --retries")
        return {"json": value, "truncated": truncated}

    def pages(self, document: str) -> dict[int, str]:
        """Return the pages of a document that fit the context one by one, as `pages_of`."""
        return pages_of(document, lambda text: len(self.encoder.prompt(self.options.prompt.turn(text))) <= self.room)

    def merged(self, answers: Sequence[dict[str, Any]], pages: Mapping[int, str]) -> dict[str, Any]:
        """Return one answer of those to the pages, or the error of a page or of the joined answer."""
        for number, answer in enumerate(answers, 1):
            if error := answer.get("error"):
                return _failed(error["code"], f"page {number} of {len(answers)}: {error['message']}")
        value = joined([answer["json"] for answer in answers], [*pages.values()])
        if problem := broken_rule(self.grammar.validator, value):
            return _failed("pages", f"the joined answers of {len(pages)} pages: the result {problem}")
        result = {"json": value, "truncated": any(answer["truncated"] for answer in answers)}
        if self.options.evidence:
            result["evidence"] = joined([answer["evidence"] for answer in answers], [*pages.values()])
        return result


def _failed(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _room_for_document(encoder: PromptEncoder, context: int, options: ExtractOptions) -> int:
    """Return how many tokens a prompt may have. Raises InputError where that leaves no room for a document."""
    budget = options.max_new_tokens
    left = context - budget - len(encoder.prompt(options.prompt.turn("")))
    if left < (LEAST_PAGE if options.chunk else 1):
        left_of = f"leave {max(left, 0)} tokens of the context of {context}"
        shown = f", or leave out {options.schema_name} (--show_schema off)" if options.prompt.shown else ""
        raise InputError(f"--max_new_tokens {budget} {left_of} for a document; lower it{shown}")
    return context - budget
