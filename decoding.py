"""JSON that a schema allows: preflight of a schema, constrained decoding of a batch, closing under a token budget.

Apart from infer_idp.py because eval_idp.py decodes too. llguidance says which tokens the schema allows next; the model
chooses among them. Departures from `generate` with a logits processor: tokens that the schema forces are appended
without a forward each, and a document is closed by a search before its budget ends, never cut.
"""

from __future__ import annotations

import copy
import heapq
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import count, product
from typing import TYPE_CHECKING, Any

from files import InputError
from models import pack_for_decoding

if TYPE_CHECKING:
    import torch

# One layout for training text, grammar and prompts: no white space outside strings.
LAYOUT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "coerce_one_of": True}
# What no grammar can enforce and jsonschema can check: left out of the grammar, enforced after decoding by retries.
CHECKED_AFTER = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
)
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else"}  # they look at the same part of a document
# Numbers without a limit get this one in the grammar, which also rules out exponents: 1e999 is read as infinity.
LARGEST = 1e15


def subschemas(schema: Any, pointer: str = "") -> Iterator[tuple[str, dict]]:
    """(JSON pointer, schema) of a schema and of all schemas inside it; a property named like a keyword is none."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for key, value in schema.items():
        inner: list[tuple[str, Any]] = []
        if key in _MAPS and isinstance(value, dict):
            inner = [(f"{key}/{name.replace('~', '~0').replace('/', '~1')}", part) for name, part in value.items()]
        elif key in _LISTS and isinstance(value, list):
            inner = [(f"{key}/{number}", part) for number, part in enumerate(value)]
        elif key in _SINGLE:
            inner = [(key, value)]
        for name, part in inner:
            yield from subschemas(part, f"{pointer}/{name}")


@dataclass(frozen=True)
class SchemaGrammar:
    """A checked schema: `grammar` for llguidance, `validator` for the last word, `checked_after` for JSON pointers of
    keywords that only the validator enforces."""

    grammar: str
    validator: Any
    checked_after: tuple[str, ...]


def pointer_of(error: Any) -> str:
    """JSON pointer to the place that an error of jsonschema is about."""
    return "/" + "/".join(str(part) for part in error.absolute_path)


def broken_rule(validator: Any, value: Any) -> str:
    """How a value of a model breaks the schema or cannot be written as JSON, '' where it does neither."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        problem = next(iter(validator.iter_errors(value)), None)
    except Exception as error:  # nested too deep, a number too large, ...: one answer must not end a run over many
        return f"cannot be checked ({type(error).__name__})"
    return f"breaks {problem.validator} at {pointer_of(problem)}" if problem else ""


def checked_validator(schema: Any, name: str) -> Any:
    """A jsonschema validator of the schema's draft that looks at formats too and never fetches anything.

    Raises InputError where the schema is invalid, or a reference in it leads nowhere or in a circle."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, dict | bool):
        raise InputError(f"{name}: no JSON Schema: an object is needed, found {json.dumps(schema)[:40]}")
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise InputError(f"{name}: invalid at /$schema: a text is needed, found {json.dumps(schema['$schema'])[:40]}")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"{name}: invalid at {pointer_of(error)}: {error.message[:200]}") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deep") from None
    _check_references(schema, kind, name)
    return kind(schema, format_checker=kind.FORMAT_CHECKER, registry=Registry())  # by default it fetches addresses


def _check_references(schema: Any, kind: type, name: str) -> None:
    """Raises InputError for a reference that leads to no schema in this file or among the drafts' own, and for one
    that comes back to itself without a step into the document, where validation would never end."""
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    draft = specification_with(kind.ID_OF(kind.META_SCHEMA))
    todo = [("", schema, REGISTRY.resolver_with_root(draft.create_resource(schema)))]
    places: dict[int, str] = {}
    same_part: dict[int, list[int]] = {}  # schemas by identity, and those that look at the same part of a document
    while todo:
        start, tree, resolver = todo.pop()
        resolvers = {start: resolver}  # an inner $id changes what references are relative to
        for pointer, part in subschemas(tree, start):
            if pointer != start:
                above = next(r for n in (1, 2) if (r := resolvers.get(pointer.rsplit("/", n)[0])))
                resolvers[pointer] = above.in_subresource(draft.create_resource(part))
            if id(part) in places:
                continue
            places[id(part)] = pointer
            inner = []
            for key in _IN_PLACE & part.keys():
                inner += part[key] if isinstance(part[key], list) else [part[key]]
            for key in ("dependentSchemas", "dependencies"):
                inner += part[key].values() if isinstance(part.get(key), dict) else ()
            for key in _REFERENCES & part.keys():
                try:
                    found = resolvers[pointer].lookup(part[key])
                except (Unresolvable, ValueError, TypeError, AttributeError):
                    found = None
                if found is None or not isinstance(found.contents, dict | bool):
                    shown = json.dumps(part[key])[:100]
                    raise InputError(f"{name}: {pointer}/{key}: {shown} is no schema in this file; nothing is fetched")
                inner.append(found.contents)
                target = part[key][1:] if part[key].startswith("#/") else f"{pointer}/{key}"
                todo.append((target, found.contents, found.resolver))
            same_part[id(part)] = [id(item) for item in inner if isinstance(item, dict)]
    try:
        TopologicalSorter(same_part).prepare()
    except CycleError as error:
        circle = " -> ".join(places[number] or "/" for number in reversed(error.args[1]))
        raise InputError(f"{name}: $ref in a circle: {circle}") from None


def compile_schema(schema: Any, tokenizer: Any, name: str = "schema") -> SchemaGrammar:
    """Check a schema and turn it into a grammar. tokenizer: `llguidance.LLTokenizer`.

    Raises InputError with the JSON pointer of what is invalid or cannot be enforced.
    """
    validator = checked_validator(schema, name)
    removed = [f"{p}/{k}" for p, part in subschemas(schema) for k in part if k in CHECKED_AFTER]
    problem = ""
    for leave_out, limited in product(((), CHECKED_AFTER) if removed else ((),), (True, False)):
        enforced = _without(schema, leave_out)
        grammar, problem = _grammar(_with_limits(enforced) if limited else enforced, tokenizer)
        if not problem:
            return SchemaGrammar(grammar, validator, tuple(removed if leave_out else ()))
    raise InputError(f"{name}: cannot be enforced: {_blame(_without(schema, CHECKED_AFTER), problem, tokenizer)}")


def _without(schema: Any, keywords: Sequence[str]) -> Any:
    schema = copy.deepcopy(schema)
    for _, part in list(subschemas(schema)) if keywords else []:
        for keyword in keywords:
            part.pop(keyword, None)
    return schema


def _with_limits(schema: Any) -> Any:
    schema = copy.deepcopy(schema)
    for _, part in subschemas(schema):
        if part.get("type") == "number" or (isinstance(part.get("type"), list) and "number" in part["type"]):
            if "exclusiveMinimum" not in part:
                part.setdefault("minimum", -LARGEST)
            if "exclusiveMaximum" not in part:
                part.setdefault("maximum", LARGEST)
    return schema


def _grammar(schema: Any, tokenizer: Any) -> tuple[str, str]:
    """(grammar, error message or '')."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), defaults=LAYOUT)
    except ValueError as error:
        return "", str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    return grammar, messages[0] if failed else ""


def _blame(schema: Any, problem: str, tokenizer: Any) -> str:
    """The keywords that llguidance's message is about, by JSON pointers, and the message.

    It names no place, so: keywords whose part of the schema alone has the same problem, else those without which the
    grammar could be built, else those that the message names."""
    reason = " ".join(problem.split())[:160]
    places = [(pointer, keyword, part[keyword]) for pointer, part in subschemas(schema) for keyword in part]
    places.sort(key=lambda place: -place[0].count("/"))  # the innermost first: an outer one takes it along
    patterns = [p for p in places if p[1] == "pattern"]
    patterns += [
        (f"{p}/{k}", expression, expression) for p, k, v in places if k == "patternProperties" for expression in v
    ]
    formats = [place for place in places if place[1] == "format"]
    alone = [p for p in formats if _grammar({"type": "string", "format": p[2]}, tokenizer)[1] == problem]
    if "regex" in problem:
        alone += [p for p in patterns if "regex" in _grammar({"type": "string", "pattern": p[2]}, tokenizer)[1]]
    about = {"circular": ("$ref",), "min/maxProperties": ("minProperties", "maxProperties")}
    meant = [keyword for text, keywords in about.items() if text in problem for keyword in keywords]
    named = [p for p in places if p[1] in meant or re.search(rf"\b{re.escape(p[1])}\b", problem)]
    found = alone
    for pointer, keyword, value in [*named, *places][:200] if not alone else []:
        trial = copy.deepcopy(schema)
        next(part for p, part in subschemas(trial) if p == pointer).pop(keyword)
        if not _grammar(trial, tokenizer)[1]:
            found = [(pointer, keyword, value)]
            break
    if not alone and meant and (not found or found[0][1] not in meant):
        found = named
    shown = ", ".join(dict.fromkeys(f"{pointer}/{keyword}" for pointer, keyword, _ in (found or named)[:3]))
    return f"{shown} ({reason})" if shown else reason


def grammar_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> Any:
    """llguidance's view of a tokenizer. vocabulary: columns of the model's logits, often more than the tokenizer's."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary)


class Closer:
    """Finds a short valid ending of a half-written document, by best-first search over allowed tokens."""

    def __init__(self, tokenizer: Any, expansions: int = 800):
        self.expansions = expansions
        texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        special = [tokenizer.is_special_token(token) for token in range(tokenizer.vocab_size)]
        plain = [token for token, text in enumerate(texts) if text and not special[token]]
        # Tokens worth a try, best first: the ones that end something (the longest first), words, single characters.
        ends = sorted((t for t in plain if not texts[t].strip(b'"]}')), key=lambda t: -len(texts[t]))
        words = [t for t in plain if texts[t] in (b"null", b"true", b"false")]
        order = b'0123456789-":,./@_ aAbcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ[{+()'
        single = [t for t in plain if len(texts[t]) == 1 and 32 <= texts[t][0] < 127]
        single.sort(key=lambda t: order.find(texts[t]) % 1000)
        quotes = [t for t in ends if texts[t].startswith(b'"')]
        # Long words first: a string with a least length is full after few tokens. One of each length.
        lengths = {len(texts[t]): t for t in plain if re.fullmatch(rb"[a-z]{2,}", texts[t])}
        long = [lengths[length] for length in sorted(lengths, reverse=True)]
        self._in_string = [*quotes, *long, *(t for t in single if texts[t] not in b'"')]
        opening = [t for t in quotes if not texts[t].strip(b'"')]  # more would be the string's content
        self._outside = [*(t for t in ends if t not in quotes), *words, *opening, *single]
        self._letters = [t for t in single if texts[t].isalpha() and texts[t] not in b"tfneE"]
        self._signs = [t for sign in b"@/:-_." for t in single if texts[t][0] == sign]
        self._one = next((t for t in single if texts[t] == b"1"), None)
        self.kinds = {t: self._kind(texts[t]) for t in {*self._in_string, *self._outside}}

    @staticmethod
    def _kind(text: bytes) -> str:
        if not text.strip(b'"]}'):
            return "quote" if text.startswith(b'"') else "brace"
        return "digit" if text.isdigit() else "letter" if text.isalpha() else text.decode("latin-1")

    def close(self, matcher: Any, limit: int) -> list[int] | None:
        """Tokens [at most `limit`] after which the document is complete; None where the search finds none.

        The matcher is left as it was. First the likeliest ending at every step, which is mostly short; where that is
        too long, a best-first search in which second choices cost, and so does what can go on for ever: text.
        """
        ways = ((self._one, ()), (None, ()), (self._one, self._signs))
        dives = (self._dive(matcher.deep_copy(), limit, *way) for way in ways)
        return next((tokens for tokens in dives if tokens is not None), None) or self._search(matcher, limit)

    def _dive(self, state: Any, limit: int, digit: int | None, signs: Sequence[int]) -> list[int] | None:
        """digit: a token to prefer among digits; 1111-11-11 is a date, 0000-00-00 is none. signs: tokens to try once
        in each string before words, for formats that need them: an e-mail address ends only after @ and a dot."""
        tokens: list[int] = []
        left = list(signs)
        while len(tokens) <= limit:
            forced = state.compute_ff_tokens()
            if len(tokens) + len(forced) > limit or (forced and not state.consume_tokens(forced)):
                return None
            tokens += forced
            if state.is_accepting():
                return tokens
            in_string, choices = self._choices(state, 1)
            kind = self.kinds.get(choices[0]) if choices else None
            left = left if in_string else list(signs)
            preferred = [digit] if kind == "digit" and digit is not None else []
            preferred += left if in_string and kind != "quote" else []
            if preferred:
                mask = state.compute_bitmask()
                choices = [t for t in preferred if mask[t >> 3] >> (t & 7) & 1] or choices
                if choices[0] in left:  # what stands behind it may be needed again after it: the dot after an @
                    behind = signs.index(choices[0]) + 1
                    left = [*(t for t in left if t in signs[: behind - 1]), *signs[behind:]]
            if not choices or not state.consume_token(choices[0]):
                return None
            tokens.append(choices[0])
        return None

    def _search(self, matcher: Any, limit: int) -> list[int] | None:
        ticket = count()
        heap: list[tuple[float, int, list[int], Any]] = [(0.0, next(ticket), [], matcher.deep_copy())]
        for _ in range(self.expansions):
            if not heap:
                return None
            cost, _, tokens, state = heapq.heappop(heap)
            forced = state.compute_ff_tokens()
            if forced:
                if len(tokens) + len(forced) > limit or not state.consume_tokens(forced):
                    continue
                tokens = [*tokens, *forced]
            if state.is_accepting():
                return tokens
            if len(tokens) >= limit:
                continue
            in_string, choices = self._choices(state)
            for extra, token in enumerate(choices):
                following = state.deep_copy()
                if following.consume_token(token):
                    step = (0.1 if in_string else 0.01) + 0.5 * extra
                    heapq.heappush(heap, (cost + step, next(ticket), [*tokens, token], following))
        return None

    def _choices(self, state: Any, width: int = 4) -> tuple[bool, list[int]]:
        """Whether the state is inside a string, and the first allowed candidate of each of the first few kinds, so
        that a loop in a pattern is left too."""
        mask = state.compute_bitmask()
        letters = sum(mask[token >> 3] >> (token & 7) & 1 for token in self._letters)
        in_string = letters > 0
        few = letters < 8  # not free text: the first letters of names or of fixed values, which are not alike
        chosen: dict[str | int, int] = {}
        for token in self._in_string if in_string else self._outside:
            if mask[token >> 3] >> (token & 7) & 1:
                chosen.setdefault(token if few and self.kinds[token] == "letter" else self.kinds[token], token)
                if len(chosen) == width:
                    break
        if not chosen:  # none of the candidates: whatever is allowed
            for token in range(len(mask) * 8):
                if mask[token >> 3] >> (token & 7) & 1:
                    return in_string, [token]
        return in_string, list(chosen.values())


@dataclass
class Draft:
    """One document that is being written. pending: tokens the model has not seen; safe: tokens of the complete
    document that the draft could be closed to when it had `looked` tokens, empty where none was found yet; look_at:
    length at which to look again; text: None where no valid close fits the budget."""

    matcher: Any
    pending: list[int]
    tokens: list[int] = field(default_factory=list)
    safe: list[int] = field(default_factory=list)
    looked: int = 0
    look_at: int = 0
    done: bool = False
    truncated: bool = False
    text: str | None = None


class JsonDecoder:
    """Decodes batches of prompts into JSON texts, each row under a schema of its own.

    model, tokenizer: as `models.load_model` gives them. Greedy at temperature 0.
    """

    def __init__(self, model: Any, tokenizer: Any):
        pack_for_decoding(model)
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = model.config.get_text_config().vocab_size  # logits are often wider than the tokenizer
        self.grammar_tokenizer = grammar_tokenizer(tokenizer, self.vocabulary)
        self.closer = Closer(self.grammar_tokenizer)

    def generate(
        self,
        prompts: Sequence[list[int]],
        grammars: Sequence[SchemaGrammar],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Draft]:
        """A finished draft for each prompt (token ids) and its grammar, in order."""
        import torch
        from llguidance import LLMatcher
        from transformers import DynamicCache

        drafts = [
            Draft(LLMatcher(self.grammar_tokenizer, grammar.grammar), list(ids))
            for ids, grammar in zip(prompts, grammars, strict=True)
        ]
        for draft in drafts:
            self._look(draft, max_new_tokens)
            if not draft.done:
                self._force(draft, max_new_tokens)
        device = self.model.device
        random = torch.Generator(device="cpu").manual_seed(seed)
        cache, lengths = DynamicCache(), [0] * len(drafts)
        mask = torch.zeros(len(drafts), 0, dtype=torch.long, device=device)
        filler = self.tokenizer.pad_token_id
        with torch.inference_mode():
            while not all(draft.done for draft in drafts):
                # After the prompts no row is padded for another's forced tokens: each takes as many as all have.
                waiting = [len(draft.pending) for draft in drafts if not draft.done]
                width = min(waiting) if any(lengths) else max(waiting)
                rows, new, places = [], [], []
                for i, draft in enumerate(drafts):
                    now, draft.pending = draft.pending[:width], draft.pending[width:]
                    pad = width - len(now)
                    rows.append([filler] * pad + now)
                    new.append([0] * pad + [1] * len(now))
                    places.append([0] * pad + list(range(lengths[i], lengths[i] + len(now))))
                    lengths[i] += len(now)
                mask = torch.cat([mask, torch.tensor(new, device=device)], dim=1)
                logits = self.model(
                    input_ids=torch.tensor(rows, device=device),
                    attention_mask=mask,
                    position_ids=torch.tensor(places, device=device),
                    cache=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                for draft, scores in zip(drafts, logits.float().cpu(), strict=True):
                    if not draft.done and not draft.pending:
                        self._advance(draft, scores, max_new_tokens, temperature, random)
        for draft in drafts:
            if draft.text is not None:
                draft.text = self.tokenizer.decode(draft.tokens, clean_up_tokenization_spaces=False)
        return drafts

    def _look(self, draft: Draft, budget: int) -> None:
        """See how the document could be closed here; where that no longer fits, close it where it last did.

        Looking costs as much as several forwards, so it is done when half of the tokens to spare are used up: the
        closer the end, the more often."""
        length = len(draft.tokens)
        ending = self.closer.close(draft.matcher, budget - length)
        if ending is not None:
            draft.safe, draft.looked = draft.tokens + ending, length
            draft.look_at = length + max(1, (budget - len(draft.safe)) // 2)
        elif draft.safe:
            self._close(draft, budget)
        else:  # the search found none, but the model may still end it
            draft.look_at = length + max(8, (budget - length) // 2)

    def _close(self, draft: Draft, budget: int) -> None:
        """End the document with as much of it as can be closed, found by bisection back to the last look."""
        written, beyond = draft.looked, len(draft.tokens)
        while draft.safe and beyond - written > 1:
            middle = (written + beyond) // 2
            trial = draft.matcher.deep_copy()
            trial.rollback(len(draft.tokens) - middle)
            ending = self.closer.close(trial, budget - middle)
            if ending is None:
                beyond = middle
            else:
                draft.safe, written = draft.tokens[:middle] + ending, middle
        draft.done, draft.truncated = True, bool(draft.safe)
        if draft.safe:
            draft.tokens, draft.text = draft.safe, ""

    def _force(self, draft: Draft, budget: int) -> None:
        """Append what the schema forces."""
        forced = draft.matcher.compute_ff_tokens()
        if len(draft.tokens) + len(forced) > budget:
            self._close(draft, budget)
            return
        if forced:
            draft.matcher.consume_tokens(forced)
            draft.tokens += forced
            draft.pending += forced
        if draft.matcher.is_stopped():
            draft.done, draft.text = True, ""
        elif len(draft.tokens) >= draft.look_at:
            self._look(draft, budget)

    def _advance(
        self, draft: Draft, scores: torch.Tensor, budget: int, temperature: float, random: torch.Generator
    ) -> None:
        """Choose the next token among the allowed ones."""
        import numpy as np
        import torch

        bits = np.unpackbits(np.frombuffer(draft.matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: self.vocabulary].astype(bool))
        scores = scores[: self.vocabulary].masked_fill(~allowed, -torch.inf)
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(scores / temperature, dim=-1), 1, generator=random))
        else:
            token = int(scores.argmax())
        if token in self.grammar_tokenizer.eos_tokens:
            draft.done, draft.text = True, ""
        elif len(draft.tokens) == budget:
            self._close(draft, budget)
        else:
            draft.matcher.consume_token(token)
            draft.tokens.append(token)
            draft.pending = [token]
            self._force(draft, budget)
