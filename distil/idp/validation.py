"""JSON Schemas as people write them: read, brought into one form, checked before a model loads, validated against."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Container, Iterator
from decimal import Context, Decimal
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

from common import InputError

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "schemas", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_ONE += ("components",)  # OpenAPI has definitions under /components/schemas
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_BY_NAME = {"dependentSchemas", "dependencies"}
_IN_PLACE = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else"}  # they apply to the same part of a document
_WRAPPER = {"name", "description", "strict", "schema"}  # what OpenAI's API has around a schema


def subschemas(schema: Any, pointer: str = "", skipped: Container[str] = ()) -> Iterator[tuple[str, dict]]:
    """Yield (JSON pointer, schema) of a schema and of all schemas inside it, except those inside skipped keywords; a
    property name is not a keyword."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for key, value in schema.items():
        inner = {key: value} if key in _ONE else {}
        if key in _MAPS and isinstance(value, dict):
            inner = {f"{key}/{name.replace('~', '~0').replace('/', '~1')}": part for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            inner = {f"{key}/{number}": part for number, part in enumerate(value)}
        for name, part in inner.items() if key not in skipped else ():
            yield from subschemas(part, f"{pointer}/{name}", skipped)


def some(pointers: list[str]) -> str:
    """Return pointers to schemas for a message, at most three of them."""
    return ", ".join([p or "/" for p in pointers[:3]] + [f"{len(pointers) - 3} more"] * (len(pointers) > 3))


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


def checked_validator(schema: Any, name: str, note: Callable[[str], Any] = str) -> Any:
    """Return a jsonschema validator of the schema's draft that checks formats too and never fetches anything.
    Its `schema` is a copy of this one in the form that all else works on: without a wrapper around it, and with null
    where `nullable` allows it. note: called with each such change. Raises InputError with the schema's name where
    it is invalid or constrains nothing, or a reference in it leads nowhere or in a circle."""
    from jsonschema import Draft3Validator, Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, dict | bool):
        raise InputError(f"{name}: not a JSON Schema: an object is expected, found {json.dumps(schema)[:40]}")
    schema = _unwrapped(schema, name, note)
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise InputError(f"{name}: invalid at /$schema: string expected, found {json.dumps(schema['$schema'])[:40]}")
    kind = validator_for(schema, default=Draft202012Validator)
    if kind is Draft3Validator:
        raise InputError(f"{name}: /$schema: draft 3 has other rules; write draft 4 or later (`required` is a list)")
    kind = _exact(kind)
    try:
        kind.check_schema(schema, kind.FORMAT_CHECKER)
        schema = copy.deepcopy(schema)
    except SchemaError as error:
        raise InputError(f"{name}: invalid at {pointer_of(error)}: {error.message[:200]}") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deep") from None
    if nulled := [pointer for pointer, part in [*subschemas(schema)] if _allow_null(part)]:
        note(f"null is allowed at {some(nulled)} (nullable)")
    for pointer, part in subschemas(schema):
        if "$ref" in part and "/draft-0" in kind.ID_OF(kind.META_SCHEMA):  # what stands next to it does not count
            for key in part.keys() & kind.VALIDATORS.keys() - {"$ref"}:
                del part[key]
        for pattern in part.get("patternProperties", ()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{name}: {pointer}/patternProperties: {pattern!r} cannot be read: {error}") from None
    _check_references(schema, kind, name)
    lost = [key for key, value in schema.items() if isinstance(value, dict | list)] if isinstance(schema, dict) else []
    if lost and not schema.keys() & kind.VALIDATORS.keys():
        keys = ", ".join(lost[:5])
        raise InputError(f'{name}: allows any value: {keys} constrain nothing here; are they for its "properties"?')
    return kind(schema, format_checker=kind.FORMAT_CHECKER, registry=Registry())  # by default it fetches addresses


def _unwrapped(schema: Any, name: str, note: Callable[[str], Any]) -> Any:
    """Return the schema inside the wrapper of one of OpenAI's APIs. Raises InputError where that is not clear."""
    wrapper = schema
    if isinstance(schema, dict) and schema.get("type") == "json_schema":
        wrapper = schema.get("json_schema", {key: value for key, value in schema.items() if key != "type"})
    if not isinstance(wrapper, dict) or not isinstance(wrapper.get("schema"), dict | bool):
        return schema
    if others := sorted(wrapper.keys() - _WRAPPER):
        raise InputError(
            f'{name}: "schema" next to {", ".join(others[:5])}: keep either, the schema or what is around'
        )
    note('the schema is what stands under "schema"')
    return wrapper["schema"]


def _allow_null(part: dict) -> bool:
    """Write OpenAPI's `nullable` as JSON Schema, in place; return whether it was there."""
    if part.get("nullable") is not True:
        return False
    outer = ("$schema", "$id", "id", "$defs", "definitions", "title", "description", "nullable")
    inner = {key: part.pop(key) for key in [*part] if key not in outer}
    del part["nullable"]
    part["anyOf"] = [inner, {"type": "null"}]
    return True


@cache
def _exact(kind: type) -> type:
    """Return a draft's validator that also reads JavaScript's patterns and computes multipleOf with decimals."""
    import attrs
    import regex
    from jsonschema import ValidationError
    from jsonschema.validators import extend

    @cache
    def compiled(text: str) -> Any:
        try:
            return re.compile(text)
        except re.error:
            return regex.compile(text)  # \p{L}, (?<name>...)

    def pattern(validator: Any, text: str, value: Any, _: Any) -> Iterator[ValidationError]:
        if validator.is_type(value, "string") and not compiled(text).search(value):
            yield ValidationError(f"{value!r} does not match {text!r}")

    def multiple_of(validator: Any, step: Any, value: Any, _: Any) -> Iterator[ValidationError]:
        numbers = (Decimal(str(number)) for number in (value, step))  # as floats 0.07 / 0.01 is 7.000000000000001
        if validator.is_type(value, "number") and Context(prec=400).remainder(*numbers):
            yield ValidationError(f"{value!r} is not a multiple of {step}")

    checker = copy.copy(kind.FORMAT_CHECKER)
    checked = (lambda value: not isinstance(value, str) or compiled(value), (re.error, regex.error))
    checker.checkers = checker.checkers | {"regex": checked}
    kind = extend(kind, {"pattern": pattern, "multipleOf": multiple_of}, format_checker=checker)
    kind.evolve = attrs.evolve  # of this class also where an inner schema has a $schema
    return kind


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
