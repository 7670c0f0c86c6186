"""JSON Schemas: checked before a model loads, compiled to a grammar for decoding, validated against at the end.

llguidance enforces what a grammar can express; what it cannot is left to jsonschema after decoding.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import product
from typing import Any

from common import InputError

# One layout for training text, grammar and prompts: no white space outside strings.
LAYOUT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "coerce_one_of": True}
# Keywords that no grammar can enforce and jsonschema can check: left out of the grammar, enforced by retries.
CHECKED_AFTER = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_BY_NAME = {"dependentSchemas", "dependencies"}
_IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else"}  # they apply to the same part of a document
# Numbers without a limit get this one in the grammar, which also rules out exponents: 1e999 is read as infinity.
LARGEST = 1e15


def subschemas(schema: Any, pointer: str = "") -> Iterator[tuple[str, dict]]:
    """Yield (JSON pointer, schema) of a schema and of all schemas inside it; a property name is not a keyword."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for key, value in schema.items():
        inner = {key: value} if key in _ONE else {}
        if key in _MAPS and isinstance(value, dict):
            inner = {f"{key}/{name.replace('~', '~0').replace('/', '~1')}": part for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            inner = {f"{key}/{number}": part for number, part in enumerate(value)}
        for name, part in inner.items():
            yield from subschemas(part, f"{pointer}/{name}")


def same_place(part: Any, resolver: Any) -> Iterator[dict]:
    """Yield a schema and, each once, those that apply to the same value: through $ref, allOf, anyOf and oneOf.
    resolver: of `resolver_of` the complete schema."""
    todo, seen = [part], set()
    while todo:
        part = todo.pop(0)
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        todo[:0] = [
            target(part, resolver),
            *(inner for key in ("allOf", "anyOf", "oneOf") for inner in part.get(key, ())),
        ]


def resolver_of(schema: Any) -> Any:
    """Return what looks up references in this schema; nothing is fetched."""
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import DRAFT202012, specification_with

    draft = specification_with(schema.get("$schema", "") if isinstance(schema, dict) else "", DRAFT202012)
    return REGISTRY.resolver_with_root(draft.create_resource(schema))


def target(part: dict, resolver: Any) -> Any:
    """Return the schema that the part's $ref leads to, None where it has none."""
    return resolver.lookup(part["$ref"]).contents if "$ref" in part else None


@dataclass(frozen=True)
class Field:
    """A place in the documents of a schema. path: "line_items[].qty", as `leaves` has it, "" for the document; parts:
    all schemas that apply there, alternatives too; required: whether the object around it must have it."""

    path: str
    parts: tuple[dict, ...]
    required: bool = True

    @property
    def types(self) -> tuple[str, ...]:
        """Names of types that a value may have, "null" among them; none where the schema names none."""
        named = [name for part in self.parts for name in _list(part.get("type", ()))]
        named += ["null"] * any(part.get("nullable") is True for part in self.parts)
        return tuple(dict.fromkeys(named))

    @property
    def choices(self) -> tuple:
        """The values that the schema lists, none where it lists none."""
        return tuple(v for p in self.parts for v in [*p.get("enum", ()), *([p["const"]] if "const" in p else ())])

    @property
    def description(self) -> str:
        """The description nearest to the field, else the title, '' without."""
        texts = (part[key] for key in ("description", "title") for part in self.parts if part.get(key))
        return str(next(texts, ""))


def field_schemas(schema: Any) -> Iterator[Field]:
    """Yield every place that a checked schema names, in the order of its documents: objects and lists before what is
    in them, the document first. A schema inside itself is yielded once and not entered again."""
    resolver = resolver_of(schema)

    def walk(inner: list, path: str, required: bool, above: frozenset[int]) -> Iterator[Field]:
        parts = tuple({id(part): part for one in inner for part in same_place(one, resolver)}.values())
        yield Field(path, parts, required)
        parts = tuple(part for part in parts if id(part) not in above)
        above |= {id(part) for part in parts}
        needed = {name for part in parts for name in part.get("required", ())}
        names: dict[str, list] = {}
        for part in parts:
            for name, value in part.get("properties", {}).items():
                names.setdefault(name, []).append(value)
        for name, values in names.items():
            yield from walk(values, f"{path}.{name}".lstrip("."), name in needed, above)
        items = [one for part in parts for key in ("prefixItems", "items") for one in _list(part.get(key, []))]
        if items:
            yield from walk(items, f"{path}[]", True, above)

    yield from walk([schema], "", True, frozenset())


def _list(value: Any) -> list:
    return [*value] if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True)
class SchemaGrammar:
    """A checked schema. grammar: for llguidance; validator: for the final check; tokenizer: of `grammar_tokenizer`."""

    grammar: str
    validator: Any
    tokenizer: Any

    def matcher(self) -> Any:
        """Return llguidance's matcher at the beginning of a document."""
        from llguidance import LLMatcher

        return LLMatcher(self.tokenizer, self.grammar)


def pointer_of(error: Any) -> str:
    """Return the JSON pointer to the place that an error of jsonschema is about."""
    return "/" + "/".join(str(part) for part in error.absolute_path)


def broken_rule(validator: Any, value: Any) -> str:
    """Return how a model's value breaks the schema or cannot be written as JSON, '' where it is valid."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        problem = next(iter(validator.iter_errors(value)), None)
    except Exception as error:  # nested too deep, a number too large, ...: one answer must not end a run over many
        return f"cannot be checked ({type(error).__name__})"
    return f"breaks {problem.validator} at {pointer_of(problem)}" if problem else ""


def checked_validator(schema: Any, name: str) -> Any:
    """Return a jsonschema validator of the schema's draft that checks formats too and never fetches anything.
    Raises InputError with the schema's name where it is invalid, or a reference in it leads nowhere or in a circle."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, dict | bool):
        raise InputError(f"{name}: not a JSON Schema: an object is expected, found {json.dumps(schema)[:40]}")
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise InputError(f"{name}: invalid at /$schema: string expected, found {json.dumps(schema['$schema'])[:40]}")
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
    """Raise InputError for a reference that leads to no schema in this file or of the drafts, and for one that comes
    back to itself without a step into the document, where validation would never end."""
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    draft = specification_with(kind.ID_OF(kind.META_SCHEMA))
    todo = [("", schema, REGISTRY.resolver_with_root(draft.create_resource(schema)))]
    places: dict[int, str] = {}
    same_part: dict[int, list[int]] = {}  # schemas by identity, and those that apply to the same part of a document
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
            values = [part[key] for key in _IN_PLACE & part.keys()]
            values += [[*part[key].values()] for key in _BY_NAME & part.keys() if isinstance(part[key], dict)]
            inner = [item for value in values for item in (value if isinstance(value, list) else [value])]
            for key in _REFERENCES & part.keys():
                try:
                    resolved = resolvers[pointer].lookup(part[key])
                except (Unresolvable, ValueError, TypeError, AttributeError):
                    resolved = None
                if resolved is None or not isinstance(resolved.contents, dict | bool):
                    where, shown = f"{name}: {pointer}/{key}", json.dumps(part[key])[:100]
                    raise InputError(f"{where}: {shown} is not a schema in this file; nothing is fetched")
                inner.append(resolved.contents)
                target = part[key][1:] if part[key].startswith("#/") else f"{pointer}/{key}"
                todo.append((target, resolved.contents, resolved.resolver))
            same_part[id(part)] = [id(item) for item in inner if isinstance(item, dict)]
    try:
        TopologicalSorter(same_part).prepare()
    except CycleError as error:
        circle = " -> ".join(places[number] or "/" for number in reversed(error.args[1]))
        raise InputError(f"{name}: $ref in a circle: {circle}") from None


def compile_schema(schema: Any, tokenizer: Any, name: str = "schema", validator: Any = None) -> SchemaGrammar:
    """Check a schema and compile it to a grammar. tokenizer: of `grammar_tokenizer`; name: of the schema, in errors;
    validator: of `checked_validator`, if it was checked. Raises InputError with the JSON pointer of what is wrong."""
    validator = validator or checked_validator(schema, name)
    for left_out, limited in product(((), CHECKED_AFTER), (True, False)):
        enforced = _enforced(schema, left_out, limited)
        grammar, problem = _grammar(enforced, tokenizer)
        if not problem:
            return SchemaGrammar(grammar, validator, tokenizer)
    raise InputError(f"{name}: cannot be enforced: {_blame(enforced, problem, tokenizer)}")


def _enforced(schema: Any, left_out: Sequence[str], limited: bool) -> Any:
    """Return a copy of the schema without these keywords, and with limits of its numbers."""
    schema = copy.deepcopy(schema)
    for _, part in list(subschemas(schema)):
        for keyword in left_out:
            part.pop(keyword, None)
        for side, limit in (("Minimum", -LARGEST), ("Maximum", LARGEST)) if limited else ():
            if "number" in part.get("type", ()) and f"exclusive{side}" not in part:  # type: a name or a list of names
                part.setdefault(side.lower(), limit)
    return schema


def _grammar(schema: Any, tokenizer: Any) -> tuple[str, str]:
    """Return (grammar, error message or '')."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), defaults=LAYOUT)
    except ValueError as error:
        return "", str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    return grammar, messages[0] if failed else ""


def _blame(schema: Any, problem: str, tokenizer: Any) -> str:
    """Return the JSON pointers of the keywords that llguidance's message is about, and the message.
    The message gives no place, so: keywords whose part of the schema alone has the same problem, else the one without
    which the grammar can be built, else those that the message mentions."""
    reason = " ".join(problem.split())[:160]
    places = [(pointer, keyword, part[keyword]) for pointer, part in subschemas(schema) for keyword in part]
    places.sort(key=lambda place: -place[0].count("/"))  # the innermost first: removing an outer one removes it too
    patterns = [p for p in places if p[1] == "pattern"]
    patterns += [(f"{p}/{k}", regex, regex) for p, k, v in places if k == "patternProperties" for regex in v]
    formats = [p for p in places if p[1] == "format"]
    alone = [p for p in formats if _grammar({"type": "string", "format": p[2]}, tokenizer)[1] == problem]
    if "regex" in problem:
        alone += [p for p in patterns if "regex" in _grammar({"type": "string", "pattern": p[2]}, tokenizer)[1]]
    about = {"circular": ("$ref",), "min/maxProperties": ("minProperties", "maxProperties")}
    expected = [keyword for text, keywords in about.items() if text in problem for keyword in keywords]
    named = [p for p in places if p[1] in expected or re.search(rf"\b{re.escape(p[1])}\b", problem)]
    blamed = alone
    for pointer, keyword, value in [*named, *places][:200] if not alone else []:
        trial = copy.deepcopy(schema)
        next(part for p, part in subschemas(trial) if p == pointer).pop(keyword)
        if not _grammar(trial, tokenizer)[1]:
            blamed = [(pointer, keyword, value)]
            break
    if not alone and expected and (not blamed or blamed[0][1] not in expected):
        blamed = named
    shown = ", ".join(dict.fromkeys(f"{pointer}/{keyword}" for pointer, keyword, _ in (blamed or named)[:3]))
    return f"{shown} ({reason})" if shown else reason


def grammar_tokenizer(tokenizer: Any, vocabulary: int | None = None) -> Any:
    """Return a tokenizer as llguidance reads it. vocabulary: columns of the model's logits, often more than it has."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocabulary)
