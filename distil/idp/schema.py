"""JSON Schemas for decoding: the fields they name, the form that a grammar can enforce, and the grammar.

llguidance enforces what a grammar can express; what it cannot is left to jsonschema after decoding.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

from common import InputError
from distil.idp.validation import checked_validator, some, subschemas
from distil.processes import print_note

# One layout for training text, grammar and prompts: no white space outside strings.
LAYOUT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "coerce_one_of": True}
# Keywords that no grammar can enforce and jsonschema can check: left out of the grammar, enforced by retries.
CHECKED_AFTER = {
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
}
# Rules for one number or text. Which of them llguidance can enforce depends on their values.
_RULES = ("format", "pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_RULES += ("minLength", "maxLength")
# Numbers without a limit get this one in the grammar, which also rules out exponents: 1e999 is read as infinity.
LARGEST = 1e15
FINEST = 1e-10  # numbers without a step get this one: models write 0.000... until the budget ends
MOST_FIELDS = 10_000  # of a schema, counted at each place where they occur


def same_place(part: Any, resolver: Any, choose: Callable[[list], list] = list) -> Iterator[dict]:
    """Yield a schema and those that apply to the same value: through $ref, allOf, and what `choose` returns of the
    lists of anyOf and oneOf. Names of `properties` come in the order in which llguidance writes them.
    resolver: of `resolver_of` the complete schema."""
    from referencing.exceptions import Unresolvable

    if not isinstance(part, dict):
        return
    if "properties" not in part:
        yield part
    for key, value in part.items():
        if key == "properties":
            yield part
        if key == "$ref":
            with suppress(Unresolvable):  # relative to an inner $id that is not on the way here
                resolved = resolver.lookup(value)
                yield from same_place(resolved.contents, resolved.resolver, choose)
        elif key in ("allOf", "anyOf", "oneOf"):
            for one in value if key == "allOf" else choose(value):
                yield from same_place(one, resolver, choose)


def resolver_of(schema: Any) -> Any:
    """Return what looks up references in this schema; nothing is fetched."""
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import DRAFT202012, specification_with

    draft = specification_with(schema.get("$schema", "") if isinstance(schema, dict) else "", DRAFT202012)
    return REGISTRY.resolver_with_root(draft.create_resource(schema))


@dataclass(frozen=True)
class Field:
    """A place in the documents of a schema. parts: all schemas that apply there, alternatives too; path:
    "line_items[].qty", as `leaves` has it, "" for the document."""

    parts: tuple[dict, ...]
    path: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """Names of types that a value may have, "null" among them; none where the schema names none."""
        return tuple(dict.fromkeys(name for part in self.parts for name in as_list(part.get("type", ()))))

    @property
    def choices(self) -> tuple:
        """The values that the schema lists, none where it lists none."""
        return tuple(v for p in self.parts for v in [*p.get("enum", ()), *([p["const"]] if "const" in p else ())])

    def inside(self) -> tuple[dict[str, list], list]:
        """Return ({key: schemas of its value}, schemas of list items)."""
        properties: dict[str, list] = {}
        for part in self.parts:
            for name, value in part.get("properties", {}).items():
                properties.setdefault(name, []).append(value)
        values = [part[key] for part in self.parts for key in ("prefixItems", "items") if key in part]
        return properties, [one for value in values for one in as_list(value)]


def field_of(schemas: list, resolver: Any, path: str = "") -> Field:
    """Return the field to whose value all of these schemas apply. resolver: of `resolver_of` the complete schema."""
    return Field(tuple({id(part): part for one in schemas for part in same_place(one, resolver)}.values()), path)


def field_schemas(schema: Any) -> Iterator[Field]:
    """Yield every place that a checked schema names, in the order of its documents: objects and lists before what is
    in them, the document first. A schema inside itself is yielded once and not entered again."""
    resolver = resolver_of(schema)

    def walk(schemas: list, path: str, above: frozenset[int]) -> Iterator[Field]:
        yield (field := field_of(schemas, resolver, path))
        properties, items = Field(tuple(part for part in field.parts if id(part) not in above)).inside()
        above |= {id(part) for part in field.parts}
        for name, values in properties.items():
            yield from walk(values, f"{path}.{name}".lstrip("."), above)
        if items:
            yield from walk(items, f"{path}[]", above)

    yield from walk([schema], "", frozenset())


def as_list(value: Any) -> list:
    """Return a value that may be one or a list of them, as `type` and `items`, as a list."""
    return [*value] if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True)
class SchemaGrammar:
    """A checked schema. grammar: for llguidance; validator: for the final check; tokenizer: of `grammar_tokenizer`;
    schema: what the grammar enforces of it; left_out: JSON pointers of what it does not."""

    grammar: str
    validator: Any
    tokenizer: Any
    schema: Any = True
    left_out: list[str] = field(default_factory=list)

    def matcher(self) -> Any:
        """Return llguidance's matcher at the beginning of a document."""
        from llguidance import LLMatcher

        return LLMatcher(self.tokenizer, self.grammar)

    def writes(self, text: str) -> bool:
        """Return whether a text is a document of the grammar."""
        matcher, ids = self.matcher(), self.tokenizer.tokenize_str(text)
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def noted_validator(schema: Any, name: str) -> Any:
    """Return the validator of a schema, as `checked_validator`, with a note on how the schema is read. Raises
    InputError also for more than MOST_FIELDS fields: ten types that contain one another have ten million."""
    notes: list[str] = []
    validator = checked_validator(schema, name, notes.append)
    if any(True for _ in islice(field_schemas(validator.schema), MOST_FIELDS, None)):
        raise InputError(f"{name}: more than {MOST_FIELDS} fields: its types contain one another; leave some out")
    if pointers := closed(validator.schema)[1]:
        notes.append(f"no further keys at {some(pointers)} (without additionalProperties)")
    print_note(f"{name}: {'; '.join(notes)}" if notes else None)
    return validator


def closed(schema: Any) -> tuple[Any, list[str]]:
    """Return a copy in which objects have no keys but those that the schema names, and the JSON pointers of objects
    that this closed. Objects that say which further keys they take (additionalProperties, patternProperties) and
    those that name no key stay as they are. schema: of `checked_validator`."""
    schema = copy.deepcopy(schema)
    resolver = resolver_of(schema)
    inner: set[int] = set()  # what is part of a larger object is closed with it
    found = []
    for pointer, part in [*subschemas(schema, skipped=CHECKED_AFTER)]:
        group = [*same_place(part, resolver)]
        ways = [one for key in ("$ref", "allOf", "anyOf", "oneOf") for one in as_list(part.get(key, []))]
        alone = len(ways) == 1 or ("allOf" not in part and len(ways) == len(part.get("anyOf", part.get("oneOf", ()))))
        link = bool(ways) and alone and "properties" not in part
        if not any("properties" in p for p in group) or (link and "$ref" not in part):
            continue  # no object, or alternatives, which are closed one by one
        target = id(resolver.lookup(part["$ref"]).contents) if link else None
        together = [*_together(part, resolver)]
        inner |= {id(p) for p in together if p is not part and not link}
        further = any(p.keys() & {"additionalProperties", "patternProperties"} for p in group)
        if not further and not any(p.get("unevaluatedProperties") for p in group):
            found.append((pointer, part, together, target))
    # A reference is closed where it stands if the object that it leads to is also part of a larger one.
    found = [one for one in found if id(one[1]) not in inner and (one[3] is None or one[3] in inner)]
    for _, part, together, _ in found:
        names = [name for p in together for key in ("properties", "required") for name in p.get(key, ())]
        names += [name for p in together for value in _dependent(p) if isinstance(value, list) for name in value]
        own = part.get("properties", {})
        part["properties"] = own | {name: {} for name in names if name not in own}
        part["additionalProperties"] = False
    return schema, [pointer for pointer, *_ in found]


def _together(part: Any, resolver: Any) -> Iterator[dict]:
    """Yield what `same_place` does, and with each schema those that apply to the value under a condition."""
    for one in same_place(part, resolver):
        yield one
        for then in (one.get("then"), one.get("else"), *_dependent(one)):
            yield from _together(then, resolver)


def _dependent(part: dict) -> list:
    """Return what the keys of an object demand of it: schemas or lists of keys."""
    keys = ("dependentSchemas", "dependentRequired", "dependencies")
    return [value for key in keys for value in part.get(key, {}).values()]


def compile_schema(schema: Any, tokenizer: Any, name: str = "schema", validator: Any = None) -> SchemaGrammar:
    """Check a schema and compile it to a grammar. tokenizer: of `grammar_tokenizer`; name: of the schema, in errors;
    validator: of `checked_validator` if the schema is this validator's, or that one `closed`. Raises InputError with
    the JSON pointer of what is wrong."""
    if validator is None:
        validator = checked_validator(schema, name)
        schema = validator.schema
    schema, left_out = _enforceable(copy.deepcopy(schema))
    grammar, problem, warning = _grammar(_limited(schema), tokenizer)
    if "min/maxProperties" in problem:
        left_out += _without(schema, {"minProperties", "maxProperties"})
        grammar, problem, warning = _grammar(_limited(schema), tokenizer)
    if problem:
        raise InputError(f"{name}: cannot be enforced: {_blame(schema, problem)}")
    if "oneOf" in warning:  # of alternatives that do not exclude one another; the grammar takes them as anyOf
        left_out += [f"{pointer}/oneOf" for pointer, part in subschemas(schema) if "oneOf" in part]
    return SchemaGrammar(grammar, validator, tokenizer, schema, left_out)


def _enforceable(schema: Any) -> tuple[Any, list[str]]:
    """Remove what llguidance cannot enforce, in place; return the schema and the JSON pointers of what was removed."""
    left_out = _without(schema, CHECKED_AFTER)
    for pointer, part in subschemas(schema):
        for rule in _impossible(part):
            del part[rule]
            left_out.append(f"{pointer}/{rule}")
        patterns = part.get("patternProperties", {})
        if lost := [pattern for pattern in patterns if _impossible({"pattern": pattern})]:
            further = part.get("additionalProperties", True)
            values = [patterns.pop(pattern) for pattern in lost] + ([further] if further else [])
            part["additionalProperties"] = {} if further in (True, {}) else {"anyOf": values}
            left_out.append(f"{pointer}/patternProperties")
    return schema, left_out


def _without(schema: Any, keywords: Set[str]) -> list[str]:
    """Remove keywords, in place; return the JSON pointers of those that demanded something."""
    found = []
    for pointer, part in [*subschemas(schema, skipped=keywords)]:
        for key in sorted(keywords & part.keys()):
            idle = ["false"] if key == "uniqueItems" else ["true", "{}", "[]"]
            found += [f"{pointer}/{key}"] if json.dumps(part.pop(key)) not in idle else []
    return found


def _impossible(part: dict) -> list[str]:
    """Return which rules for a number or text llguidance cannot enforce."""
    kind = {"type": part["type"]} if "type" in part else {}
    return [rule for rule in _RULES if rule in part and _problem(json.dumps(kind | {rule: part[rule]}))]


@cache
def _problem(schema: str) -> str:
    return _grammar(json.loads(schema), byte_tokenizer())[1]


@cache
def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes: what a grammar can enforce and write does not depend on tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _limited(schema: Any) -> Any:
    """Return a copy with limits of its numbers, where they have none and llguidance can enforce them."""
    schema = copy.deepcopy(schema)
    for _, part in subschemas(schema):
        limits = {"minimum": -LARGEST, "maximum": LARGEST, "multipleOf": FINEST}
        limits = {key: limit for key, limit in limits.items() if f"exclusive{key.capitalize()}" not in part} | part
        rules = {key: limits[key] for key in ("type", "enum", "const", *_RULES) if key in limits}
        if "number" in part.get("type", ()) and not _problem(json.dumps(rules)):  # type: a name or a list of names
            part.update(limits)
    return schema


def _grammar(schema: Any, tokenizer: Any) -> tuple[str, str, str]:
    """Return (grammar, error message or '', warning or '')."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), defaults=LAYOUT)
    except ValueError as error:
        return "", str(error), ""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    return grammar, messages[0] if failed else "", "" if failed else " ".join(messages)


def _blame(schema: Any, problem: str) -> str:
    """Return JSON pointers of keywords that llguidance's message mentions, innermost first, and the message."""
    reason = " ".join(problem.split())[:160]
    if circular := re.search(r"circular .*#(/\S+)", problem):
        return f"{circular[1]} ({reason})"
    parts = dict(sorted(subschemas(schema), key=lambda place: -place[0].count("/")))
    named = [f"{p}/{k}" for p in parts for k in parts[p] if re.search(rf"(?<!\w){re.escape(k)}(?!\w)", problem)]
    return f"{some(named)} ({reason})" if named else reason


def grammar_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> Any:
    """Return a tokenizer as llguidance reads it. vocabulary: columns of the model's logits, often more than it has."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary)
