"""Copied fields: strings whose letters and digits the document has one after the other.

Departure from a grammar of substrings: blanks and ASCII signs between words are the model's, since receipts break
lines within a value and print "27,JALAN" for "27, JALAN". Of 626 expected addresses of SROIE 94 % can be written so,
and 78 % as exact substrings: from the others a model does not come to the end that it was trained for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

from common import InputError
from distil.idp.schema import SchemaGrammar, field_schemas

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# Letters, digits, or one sign beyond ASCII, which is copied too, or one letter of a script without blanks (Thai, CJK).
WORD = re.compile(rf"[^\W\d_{UNSPACED}]+|\d+|[^\x00-\x7f\s]")
NO_LETTER = re.compile(rb"[ -/:-@\[-`{-~]")  # a sign of ASCII or a blank
NOT_COPIED = re.compile(rb"[\x00-\x1f\x7f\\]")  # so nothing is escaped in a copied string
PART = re.compile(rb'"((?:[^"\\]|\\.)*)("|\\?$)|[{}\[\],]', re.DOTALL)  # of JSON: a string, or what begins or ends one
MOST_SIGNS = 3  # in a row
Places = tuple[int, ...] | None  # where in the row of letters a copied string may have arrived, None before a word


def check_copied(fields: Iterable[str], schema: Any, name: str) -> None:
    """Raise InputError for a field that --copy cannot have: all but the schema's strings without a fixed form."""
    free = []
    for field in field_schemas(schema):
        fixed = field.choices or any(key in part for part in field.parts for key in ("pattern", "format"))
        free += [field.path] * (not fixed and {*field.types} in ({"string"}, {"string", "null"}))
    if other := [path for path in fields if path not in free]:
        fix = f"its strings without choices, pattern or format are {', '.join(free) or '(none)'}"
        raise InputError(f"--copy {other[0]}: not a free text of {name}; {fix}")


class Words:
    """The letters and digits of a document in one row of bytes, and where words start and end in it."""

    def __init__(self, document: str):
        self.row, last = b"", 0
        self.starts: dict[bytes, list[int]] = {}  # by the first byte
        self.ends: set[int] = set()
        self.apart: set[int] = set()  # places before which a sign or a blank stands
        for match in WORD.finditer(document):
            word = match.group().encode(errors="replace")
            self.starts.setdefault(word[:1], []).append(len(self.row))
            self.apart |= {len(self.row)} if match.start() > last else set()
            self.row, last = self.row + word, match.end()
            self.ends.add(len(self.row))
        self.masks: dict[Any, Any] = {}  # of `Vocabulary.mask`

    def follow(self, text: bytes, places: Places = None, signs: int = 0) -> tuple[Places, int] | None:
        """Return where a copied string is after more text, None where it leaves the document. signs: written since its
        last word."""
        for letter in (bytes([byte]) for byte in text):
            if NO_LETTER.match(letter):
                places = places and tuple(place for place in places if place in self.ends)
                signs += 1
            else:
                before = self.starts.get(letter, ()) if places is None else places
                apart = self.apart if places is not None and not signs else ()
                places = tuple(p + 1 for p in before if self.row[p : p + 1] == letter and p not in apart)
                signs = 0
            if places == () or signs > MOST_SIGNS:
                return None
        return places, signs

    def may_end(self, places: Places, signs: int) -> bool:
        """Return whether a copied string may end here: empty, or at the end of a word."""
        return not signs if places is None else not self.ends.isdisjoint(places)


def follows(text: bytes, words: Words, places: Places = None, signs: int = 0) -> bool:
    """Return whether a copied string may have this text next, which may end it."""
    head, quote, _ = text.partition(b'"')
    after = words.follow(head, places, signs)
    return after is not None and (not quote or words.may_end(*after)) and not NOT_COPIED.search(head)


class Vocabulary:
    """The tokens that copied strings can have, by their letters. tokenizer: llguidance's."""

    def __init__(self, tokenizer: Any):
        self.texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self.by_letters: dict[bytes, list[int]] = {}
        for token, text in enumerate(self.texts):
            head = text.partition(b'"')[0]
            if text and not tokenizer.is_special_token(token) and not NOT_COPIED.search(head):
                self.by_letters.setdefault(NO_LETTER.sub(b"", head), []).append(token)
        self.longest = max(map(len, self.by_letters))
        self.openers = [token for token, text in enumerate(self.texts) if b'"' in text[:-1]]  # or closing, or both
        self.signs: dict[tuple[bool, int], list[int]] = {}

    def mask(self, words: Words, places: Places, signs: int) -> Any:
        """Return the bits of the tokens that may follow in a copied string, as llguidance's masks have them."""
        import numpy as np

        if (places, signs) not in words.masks:
            found = set()
            for place in chain(*words.starts.values()) if places is None else places:
                for size in range(1, self.longest + 1):
                    found.update(self.by_letters.get(words.row[place : place + size], ()))
            bits = np.zeros(len(self.texts) // 32 * 32 + 64, bool)  # masks have a word more than they need
            bits[[token for token in found if follows(self.texts[token], words, places, signs)]] = True
            if places is None or not words.ends.isdisjoint(places):  # tokens of signs alone: the same after any word
                kind = places is None, signs
                if kind not in self.signs:
                    free = self.by_letters.get(b"", ())
                    self.signs[kind] = [t for t in free if follows(self.texts[t], words, places, signs)]
                bits[self.signs[kind]] = True
            words.masks[places, signs] = np.packbits(bits, bitorder="little")
        return words.masks[places, signs]


def open_string(text: bytes) -> tuple[str, bytes] | None:
    """Return (path, content so far) of the string value in which a JSON text ends, None where it ends elsewhere."""
    stack, before = [""], b""  # ".name" for each object and "[]" for each list around
    for part in PART.finditer(text):
        is_key = stack[-1][:1] == "." and before in (b"{", b",")
        if part[2] is not None and is_key:
            stack[-1] = "." + json.loads(part[0]) if part[2] == b'"' else "."
        elif part[2] is not None:
            if part[2] != b'"':
                return "".join(stack).lstrip("."), part[1]
        elif part[0] in b"{[":
            stack.append("." if part[0] == b"{" else "[]")
        elif part[0] in b"}]":
            stack.pop()
        before = part[0]
    return None


class CopyMatcher:
    """llguidance's matcher of one document, which in copied strings allows only what the document has next. Where the
    grammar allows nothing of that, such as after maxLength within a word, it alone decides."""

    def __init__(self, grammar: CopyGrammar, matcher: Any, words: Words, tokens: Sequence[int] = ()):
        self.grammar, self.matcher, self.words, self.tokens = grammar, matcher, words, [*tokens]
        for name in ("compute_ff_tokens", "is_accepting", "is_stopped", "validate_tokens"):
            setattr(self, name, getattr(matcher, name))

    def deep_copy(self) -> CopyMatcher:
        return CopyMatcher(self.grammar, self.matcher.deep_copy(), self.words, self.tokens)

    def consume_token(self, token: int) -> bool:
        return self.consume_tokens([token])

    def consume_tokens(self, tokens: Sequence[int]) -> bool:
        self.tokens += tokens
        return self.matcher.consume_tokens(tokens)

    def rollback(self, count: int) -> bool:
        self.tokens = self.tokens[: len(self.tokens) - count]
        return self.matcher.rollback(count)

    def compute_bitmask(self) -> bytes:
        import numpy as np

        mask, vocabulary = self.matcher.compute_bitmask(), self.grammar.vocabulary
        text = b"".join(vocabulary.texts[token] for token in self.tokens)
        place = open_string(text)
        at = self.words.follow(place[1]) if place and place[0] in self.grammar.fields else None
        bits = np.frombuffer(mask, np.uint8)
        both = bits.copy() if at is None else bits & vocabulary.mask(self.words, *at)[: len(bits)]
        opened = cache(lambda start: open_string(text + start))
        for token in vocabulary.openers:
            if mask[token >> 3] >> (token & 7) & 1 and self._invents(vocabulary.texts[token], opened):
                both[token >> 3] &= 255 - (1 << (token & 7))
        return both.tobytes() if both.any() else mask

    def _invents(self, token: bytes, opened: Callable) -> bool:
        """Return whether a token begins a copied string with what the document has not. opened(start): `open_string`
        after this start of the token."""
        for i in (quote.end() for quote in re.finditer(b'"', token)):
            place = opened(token[:i])
            if place and not place[1] and place[0] in self.grammar.fields and not follows(token[i:], self.words):
                return True
        return False


@dataclass(frozen=True)
class CopyGrammar:
    """The grammar of a schema for one document, from which `fields` are copied."""

    grammar: SchemaGrammar
    vocabulary: Vocabulary
    document: str
    fields: tuple[str, ...]

    def matcher(self) -> CopyMatcher:
        return CopyMatcher(self, self.grammar.matcher(), Words(self.document))
