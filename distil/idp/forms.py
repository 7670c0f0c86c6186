"""Views of a JSON Schema: its compact form for prompts, variants with other key orders, answers cut to its fields."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

from distil.idp.schema import field_of, resolver_of
from distil.idp.validation import subschemas

KEPT = 2 / 3  # share of the fields that a variant with fewer fields has, on average


def schema_form(schema: Any) -> str:
    """Return a checked schema as one line in the layout of an answer: its keys in order, types in place of values.
    `"key"?` is optional, `A|B` is either, brackets have a description, `...` is a part that contains itself."""
    return _form([schema], resolver_of(schema), frozenset())


def _form(inner: list, resolver: Any, above: frozenset[int]) -> str:
    field = field_of(inner, resolver)
    if above & (own := {id(part) for part in field.parts}):
        return "..."
    properties, items = field.inside()
    required = {name for part in field.parts for name in part.get("required", ())}

    def described(inner: list) -> str:
        about = next((part["description"] for part in field_of(inner, resolver).parts if part.get("description")), "")
        return _form(inner, resolver, above | own) + (f" ({' '.join(about.split())})" if about else "")

    names = ((json.dumps(name, ensure_ascii=False) + "?" * (name not in required), name) for name in properties)
    texts = [f"string /{part['pattern']}/" for part in field.parts if "pattern" in part]
    texts = texts or [part["format"] for part in field.parts if isinstance(part.get("format"), str)]
    forms = {"object": "{" + ",".join(f"{key}:{described(properties[name])}" for key, name in names) + "}"}
    forms = forms if properties else {}
    forms |= {"array": f"[{described(items)}]"} if items else {}
    forms |= {"string": "|".join(texts)} if texts and not {"number", "integer"} & set(field.types) else {}
    types = [*(kind for kind in forms if kind not in field.types), *field.types] or ["any"]
    types = [kind for kind in types if kind == "null"] if field.choices else types
    shown = [*(json.dumps(value, ensure_ascii=False) for value in field.choices), *(forms.get(t, t) for t in types)]
    return "|".join(dict.fromkeys(shown))


def variant_of(schema: Any, draw: random.Random, fewer: bool) -> Any:
    """Return a copy of the schema with the keys of each object in a random order, `fewer`: a random part of them, and
    no others where some are left out."""
    variant = copy.deepcopy(schema)
    for _, part in list(subschemas(variant)):
        names = sorted(part.get("properties", ()), key=lambda _: draw.random())
        names = [name for name in names if not fewer or draw.random() < KEPT] or names[:1]
        lost = part.get("properties", {}).keys() - names
        if names:
            part["properties"] = {name: part["properties"][name] for name in names}
        if lost:
            required = [name for name in part.pop("required", ()) if name in names]
            part |= {"required": required} if required else {}  # draft 4 has no empty list
            for key in ("additionalProperties", "patternProperties"):  # a key that was left out would be a further one
                if part.get(key):
                    del part[key]
    return variant


def cut_to(schema: Any, value: Any, dropped: Counter) -> Any:
    """Return the part of a value that the schema has fields for, in its key order; dropped: counts the other fields'
    paths. Where the schema expressly allows further fields, all are kept."""
    resolver = resolver_of(schema)

    def cut(inner: list, value: Any, path: str) -> Any:
        field = field_of(inner, resolver)
        properties, items = field.inside()
        if isinstance(value, list):
            return [cut(items, item, f"{path}[]") for item in value]
        if not isinstance(value, dict) or not properties:
            return value
        others = {name: value[name] for name in value if name not in properties}
        if not any(part.get("additionalProperties") or part.get("patternProperties") for part in field.parts):
            dropped.update(f"{path}.{name}".lstrip(".") for name in others)
            others = {}
        kept = {name: inner for name, inner in properties.items() if name in value}
        return {name: cut(inner, value[name], f"{path}.{name}".lstrip(".")) for name, inner in kept.items()} | others

    return cut([schema], value, "")
