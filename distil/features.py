"""How a row of a label task becomes the text of a prompt: values in canonical form, feature strings, null prompts.

Everything that turns a row into what a model sees is here once, so a request is encoded as in training.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import InputError
from distil.tables import cell_text, name_key, nearest, readings

UNKNOWN = "Unknown"
NULL_TEXTS = ("N/A", "[MASK]", UNKNOWN, "-")
NEAR_FIELD = "taken as"  # in notes of `RowFormat.canonical`
THOUSANDS = "a comma before three digits is read as mark of thousands"  # 809,981
# Digits that continue after a comma or point without being a number ("12,53,000") stay as they are.
_NUMBER = re.compile(r"(?<![\d.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![.,]?\d)")


def canonical_number(value: float, digits: int = 3) -> str:
    """Return `digits` significant digits, no exponent, whole from 10 up (of 3 digits): 19114.12 -> 19100, 35.27 -> 35.
    The point from which numbers are whole moves with the digits: from 100 up for 4."""
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 10.0 ** (digits - 2):
        rounded = float(round(rounded))
    return str(int(rounded)) if rounded.is_integer() else f"{rounded:.12f}".rstrip("0").rstrip(".")


def _short(match: re.Match) -> str:
    """Return a number found in a text in canonical form; unchanged where it is too large for a float."""
    number = float(match[0].replace(",", ""))
    return canonical_number(number) if math.isfinite(number) else match[0]


@dataclass(frozen=True)
class Field:
    """A field of a table task. column: in raw tables; range: plausible values of a number, others are entry errors and
    count as missing; digits: significant ones that a number keeps; protected: whether the law protects it."""

    name: str
    column: str
    kind: str = "word"
    range: tuple[float, float] = (-math.inf, math.inf)
    digits: int = 3
    protected: bool = False


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """The part of a task that decides its prompts.

    missing: marks of a missing value besides empty cells; fields: of a table task, empty for a text task, which has a
    text_column."""

    instruction: str
    missing: tuple[str, ...] = ()
    fields: tuple[Field, ...] = ()
    text_column: str | None = None

    @functools.cached_property
    def by_name(self) -> dict[str, Field]:
        """Return {name: field}."""
        return {field.name: field for field in self.fields}

    @functools.cached_property
    def by_column(self) -> dict[str, str]:
        """Return {column: name} of the fields."""
        return {field.column: field.name for field in self.fields}

    @property
    def feature_columns(self) -> dict[str, str]:
        """Return {column: kind} of what a prompt is made from, as `tables.read_table` takes it."""
        if self.text_column:
            return {self.text_column: "text"}
        return {field.column: "number" if field.kind == "number" else "text" for field in self.fields}

    def clean_value(self, name: str, value: str, notes: Counter | None = None) -> str:
        """Return one value in canonical form; `Unknown` where it is marked as missing or not plausible.
        notes: counts what was changed (beyond rounding), by a description for people."""
        note = (lambda text: notes.update([text])) if notes is not None else (lambda text: None)
        field, text = self.by_name.get(name), value.strip()
        number_expected = field is not None and field.kind == "number"
        bare = text.strip("_ $€£%" if number_expected else "_ ")
        if bare in ("", UNKNOWN, *self.missing):
            if bare != UNKNOWN:
                note(f"{name}: missing ({text or 'empty'}) -> {UNKNOWN}")
            return UNKNOWN
        if field is not None and not number_expected:
            return re.sub(r"\s*[:;]\s*", " ", text).strip()
        found = readings(bare) if number_expected and "," in bare else {".": bare}
        if not _NUMBER.fullmatch(bare) or "." not in found:  # 0,5 and 1234,567 have a decimal comma alone
            if number_expected:
                note(f"{name}: not a number -> {UNKNOWN}")
                return UNKNOWN
            return text
        if len(found) > 1:
            note(f"{name}: {THOUSANDS}")
        number = float(bare.replace(",", ""))
        if number_expected and number in self._missing_numbers:  # -1 as -1.0
            note(f"{name}: missing ({text}) -> {UNKNOWN}")
            return UNKNOWN
        low, high = field.range if field else (-math.inf, math.inf)
        if not low <= number <= high or not math.isfinite(number):
            note(f"{name}: outside {low:,.10g}..{high:,.10g} -> {UNKNOWN}")
            return UNKNOWN
        if bare != text:
            note(f"{name}: stray {text[0] if text[0] in '_$€£' else text[-1]} removed")
        return canonical_number(number, field.digits if field else 3)

    @functools.cached_property
    def _missing_numbers(self) -> set[float]:
        return {float(mark.replace(",", "")) for mark in self.missing if _NUMBER.fullmatch(mark)}

    def field_named(self, written: str, others: Sequence[str] = ()) -> str | None:
        """Return the name of the field that a text spells, or nearly spells, by name or column; None for no field.
        others: names next to it; a field that one of them spells is not taken for one that is nearly it."""
        if written in self.by_name:
            return written
        near = nearest(written, tuple(self.by_name)) or nearest(written, tuple(self.by_column))
        name, key = self.by_column.get(near, near), name_key(written)
        spelt = name and {name_key(name), name_key(self.by_name[name].column)}
        return None if name and key not in spelt and spelt & {name_key(other) for other in others} else name

    def parse(self, text: str, notes: Counter | None = None) -> dict[str, str] | None:
        """Parse 'Age: 23, Occupation: Lawyer' to {'Age': '23', 'Occupation': 'Lawyer'}; None where it is no such list.
        A comma may belong to the value of a field of words: 'Occupation: Doctor, retired'. A name that is nearly that
        of a field is taken as it, which notes count. Raises InputError for a field that is there twice."""
        pairs: dict[str, str] = {}
        name, twice = "", ""
        parts = re.split(r",\s+|,(?=[A-Za-z][\w ]*:)|[;\n][;\s]*", text.strip().rstrip(".,;"))
        names = [part.partition(":")[0] for part in parts if ":" in part]
        for part in filter(str.strip, parts):  # nothing is between the commas of 'Smith, , Jr'
            key, colon, value = part.partition(":")
            if not colon and name in self.by_name and self.by_name[name].kind != "number":
                pairs[name] += f", {part.strip()}"
                continue
            if not colon or not key.strip() or len(key) > 60:
                return None
            written = key.strip()
            name = self.field_named(written, names) or written
            if notes is not None and name_key(name) != name_key(written):
                notes[f"{written}: {NEAR_FIELD} {name}"] += 1
            twice = name if name in pairs else twice
            pairs[name] = value.strip()
        if twice:
            raise InputError(f"{twice} occurs twice in one feature string; keep one")
        return pairs or None

    def canonical(self, text: str, notes: Counter | None = None) -> str:
        """Return the feature string as models see it in training, evaluation and serving.
        The task's fields come first, complete and in one order (missing: Unknown), numbers in one short form. Text
        that is not a list of fields keeps its words. notes: see `clean_value`; `doubts` finds what matters most in
        them. Raises InputError for a field that is there twice."""
        if self.text_column:
            return text.replace("\r\n", "\n").strip()
        pairs = self.parse(text, notes)
        if any(name in (pairs or {}) for name in self.by_name):
            if notes is not None:
                notes.update(f"{name} {self._other_field}" for name in pairs if name not in self.by_name)
            pairs = {name: pairs.get(name, UNKNOWN) for name in self.by_name} | pairs
        values = {name: self.clean_value(name, value, notes) for name, value in (pairs or {}).items()}
        if notes is not None and all(values.get(name, UNKNOWN) == UNKNOWN for name in self.by_name):
            notes[self._no_field] += 1
        if pairs is None:
            return _NUMBER.sub(_short, text.strip())
        return ", ".join(f"{name}: {value}" for name, value in values.items())

    def features(self, values: Mapping[str, Any]) -> str:
        """Return the feature string, not yet canonical, of {field name or column: text or number}: a row of a table.
        Raises InputError for values that are lists or objects."""
        if odd := [name for name, value in values.items() if isinstance(value, dict | list)]:
            raise InputError(f"{odd[0]}: one text or number is needed, found a list or an object")
        if self.text_column:
            texts = [cell_text(value) for name, value in values.items() if nearest(name, (self.text_column,))]
            if len(texts) != 1:
                raise InputError(f"one field {self.text_column} is needed, found {', '.join(values) or 'none'}")
            return texts[0]
        if odd := [name for name in values if re.search("[:;,\\n]", name)]:
            raise InputError(f"{odd[0]}: a field's name has no comma, colon or semicolon")
        return ", ".join(f"{name}: {self._cell(name, cell_text(value))}" for name, value in values.items())

    def _cell(self, name: str, value: str) -> str:
        """Return a cell without what would begin another field of a feature string."""
        value = re.sub(r"\s*[:;\r\n]\s*", " ", value)
        words = (found := self.field_named(name)) and self.by_name[found].kind != "number"
        return value if words else re.sub(r",\s+", ",", value)

    def prompt(self, text: str, notes: Counter | None = None) -> str:
        """Return the user turn for a feature string or text, made canonical here so that no caller can forget it."""
        return f"{self.instruction}\n{self.canonical(text, notes)}"

    @property
    def null_texts(self) -> tuple[str, ...]:
        """Return content-free inputs, after Zhao et al. 2021 (Calibrate Before Use)."""
        if self.text_column:
            return (*NULL_TEXTS, "...", "?", "none")
        unknown, empty = (", ".join(f"{name}: {mark}" for name in self.by_name) for mark in (UNKNOWN, "-"))
        return (unknown, *NULL_TEXTS, empty, "...")

    def null_prompts(self, count: int = 7) -> list[str]:
        """Return `count` user turns without content, for the prior; not cleaned: some of them would become equal."""
        return [f"{self.instruction}\n{text}" for text in self.null_texts[:count]]

    @property
    def shared_turns(self) -> list[str]:
        """Return two user turns that have in common what the turns of all rows have."""
        return [self.prompt(f"{next(iter(self.by_name))}: 1" if self.fields else "a"), self.prompt("-")]

    # ---------------------------------------------------------------------------------------------------------- notes

    @functools.cached_property
    def _names(self) -> str:
        names = list(self.by_name)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @property
    def _no_field(self) -> str:
        return f"the text has no field of {self._names} with a value"

    @property
    def _other_field(self) -> str:
        return f"is not a field ({self._names} are)"

    def doubts(self, notes: Counter[str]) -> list[str]:
        """Return what of a feature string could not be read, or only by a guess; notes: of `canonical` on it."""
        unread = [note for note in notes if any(why in note for why in ("not a number", "outside", THOUSANDS))]
        example = ", ".join(f"{field.name}: 23" for field in self.fields if field.kind == "number")[:80]
        result = [f"{'; '.join(unread)} (write plain numbers: {example.split(', ')[0]})"] if unread else []
        result += [note for note in notes if self._other_field in note or f": {NEAR_FIELD} " in note]
        return result + [f"{self._no_field}; the answer means little"] * (self._no_field in notes)
