"""Decode JSON that a schema allows, in batches, and close documents before their budget ends.

llguidance determines which tokens the schema allows next; the model chooses among them. Departures from `generate`
with a logits processor: tokens that the schema forces are appended without a forward each, a value that was begun is
guessed from the document and checked in one forward (prompt lookup decoding, Saxena 2023; the answers stay the same),
and a document is closed by a search before its budget ends, never cut.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from distil.generation import left_padded
from distil.idp.schema import grammar_tokenizer
from distil.support import context_length, recurrent
from distil.workarounds import pack_for_decoding

TOGETHER = {"cpu": 32}  # tokens of all rows of a forward that cost little more than one each
GUESSED = 7  # tokens of a row at most
EXPANSIONS = 800  # states that a best-first search for an ending may look at


class Closer:
    """Finds short valid endings of half-written documents; llguidance has no such call. tokenizer: its LLTokenizer."""

    def __init__(self, tokenizer: Any):
        texts = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        plain = [token for token, text in enumerate(texts) if text and not tokenizer.is_special_token(token)]
        # Candidates, best first: tokens that end something (the longest first), words, single characters.
        ends = sorted((t for t in plain if not texts[t].strip(b'"]}')), key=lambda t: -len(texts[t]))
        words = [t for t in plain if texts[t] in (b"null", b"true", b"false")]
        order = b'0123456789-":,./@_ aAbcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ[{+()'
        single = [t for t in plain if len(texts[t]) == 1 and 32 <= texts[t][0] < 127]
        single.sort(key=lambda t: order.find(texts[t]) % 1000)
        quotes = [t for t in ends if texts[t].startswith(b'"')]
        # Long words first: a string with a minimum length is full after few tokens. One of each length.
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
        """Return at most `limit` tokens after which the document is complete, or None. The matcher is not changed.
        First comes the best candidate at every step, which is mostly short; where that is too long, a best-first
        search in which second choices cost, and so does text, which could continue for ever."""
        ways = ((self._one, ()), (None, ()), (self._one, self._signs))
        dives = (self._dive(matcher.deep_copy(), limit, *way) for way in ways)
        return next((tokens for tokens in dives if tokens is not None), None) or self._search(matcher, limit)

    def _dive(self, state: Any, limit: int, digit: int | None, signs: Sequence[int]) -> list[int] | None:
        """Return the tokens of the best candidate at every step, or None.
        digit: a token to prefer among digits; 1111-11-11 is a date, 0000-00-00 is not. signs: tokens to try once in
        each string before words, for formats that need them: an e-mail address ends only after @ and a dot."""
        tokens, left = [], list(signs)
        while True:
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
                choices = [t for t in preferred if _allows(mask, t)] or choices
                if choices[0] in left:  # signs later in the list may be needed again after it: the dot after an @
                    behind = signs.index(choices[0]) + 1
                    left = [*(t for t in left if t in signs[: behind - 1]), *signs[behind:]]
            if not choices or not state.consume_token(choices[0]):
                return None
            tokens.append(choices[0])

    def _search(self, matcher: Any, limit: int) -> list[int] | None:
        ticket = count()
        heap: list[tuple[float, int, list[int], Any]] = [(0.0, next(ticket), [], matcher.deep_copy())]
        for _ in range(EXPANSIONS):
            if not heap:
                break
            cost, _, tokens, state = heapq.heappop(heap)
            forced = state.compute_ff_tokens()
            if len(tokens) + len(forced) > limit or (forced and not state.consume_tokens(forced)):
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
        """Return whether the state is inside a string, and the first allowed candidate of each of `width` kinds."""
        mask = state.compute_bitmask()
        letters = sum(_allows(mask, token) for token in self._letters)
        few = letters < 8  # not free text: first letters of names or of fixed values, which lead to different ends
        chosen: dict[str | int, int] = {}
        for token in self._in_string if letters else self._outside:
            if _allows(mask, token):
                chosen.setdefault(token if few and self.kinds[token] == "letter" else self.kinds[token], token)
                if len(chosen) == width:
                    break
        # Where no candidate is allowed: the first token that is.
        others = () if chosen else (token for token in range(len(mask) * 8) if _allows(mask, token))
        return letters > 0, list(chosen.values()) or list(islice(others, 1))


def _allows(mask: bytes, token: int) -> int:
    return mask[token >> 3] >> (token & 7) & 1


@dataclass
class Draft:
    """One document that is being written.
    source: the text of the prompt for guesses, with one line for each piece between wide blanks;
    pending: tokens the model has not seen; safe: tokens of a complete document, found when the draft had `looked`
    tokens; look_at: length at which to search again; text: None where no valid ending fits the budget;
    logprobs: of each token in nats, among the tokens that the grammar allowed there (temperature 1); 0 for those that
    it forced and those of a closing."""

    matcher: Any
    pending: list[int]
    source: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    safe: list[int] = field(default_factory=list)
    looked: int = 0
    look_at: int = 0
    done: bool = False
    truncated: bool = False
    text: str | None = None


class JsonDecoder:
    """Decodes batches of prompts into JSON texts, each row under its own schema; greedy at temperature 0.
    model, tokenizer: as `distil.models.load` returns them. tokens: `grammar_tokenizer` of this tokenizer and the
    model's vocabulary, where it was built before the model was loaded."""

    def __init__(self, model: Any, tokenizer: Any, tokens: Any = None):
        pack_for_decoding(model)
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = model.config.get_text_config().vocab_size  # logits are often wider than the tokenizer
        self.grammar_tokenizer = tokens or grammar_tokenizer(tokenizer, self.vocabulary)
        self.closer = Closer(self.grammar_tokenizer)
        text = model.config.get_text_config()
        self.context, self.recurrent = context_length(text), recurrent(text)
        # Tokens that a mask hides, such as wrong guesses, change a recurrent state and the width of a window.
        self.masks_hide = not self.recurrent and not getattr(text, "sliding_window", None)

    def generate(
        self, ids: list[list[int]], grammars: Sequence[Any], budget: int, temperature: float = 0, seed: int = 0
    ) -> list[Draft]:
        """Return a finished draft for each prompt (its token ids) and grammar (SchemaGrammar, CopyGrammar), in order.
        budget: tokens of a draft."""
        import torch
        from transformers import DynamicCache

        drafts = [
            Draft(grammar.matcher(), list(prompt), re.sub(r"\s*(?:\n|\s\s)\s*", "\n", self.tokenizer.decode(prompt)))
            for prompt, grammar in zip(ids, grammars, strict=True)
        ]
        for draft in drafts:
            self._look(draft, budget)
            self._force(draft, budget)
        # Window layers keep all keys, which are few; recurrent layers need what the configuration says of their state.
        text, device = self.model.config.get_text_config(), self.model.device
        cache = DynamicCache(config=text) if self.recurrent else DynamicCache()
        how = budget, temperature, torch.Generator(device="cpu").manual_seed(seed)
        mask = torch.zeros(len(drafts), 0, dtype=torch.long, device=device)
        lengths = torch.zeros(len(drafts), dtype=torch.long, device=device)
        live = drafts
        with torch.inference_mode():
            while True:
                going = [row for row, draft in enumerate(live) if not draft.done]
                if not going:
                    break
                if len(going) < len(live):
                    live, rest = [live[row] for row in going], torch.tensor(going, device=device)
                    mask, lengths = mask[rest], lengths[rest]
                    if mask.shape[1]:
                        cache.reorder_cache(rest)  # layers of every kind can be selected so
                rows, guesses = self._next_columns(live, not mask.shape[1], 0 if temperature else budget)
                inputs = left_padded(rows, self.tokenizer.pad_token_id, device)
                new = inputs["attention_mask"]
                inputs["position_ids"] += lengths[:, None] * new  # 0 for padding
                lengths += new.sum(dim=1)
                inputs["attention_mask"] = mask = torch.cat([mask, new], dim=1)
                kept = 1 + max(map(len, guesses))
                output = self.model(**inputs, cache=cache, use_cache=True, logits_to_keep=kept)
                for row, scores in enumerate(output.logits.float().cpu()):
                    if not live[row].pending:
                        right = self._advance(live[row], scores[-1 - len(guesses[row]) :], guesses[row], *how)
                        if wrong := len(guesses[row]) - right:
                            mask[row, -wrong:] = 0
                            lengths[row] -= wrong
        for draft in drafts:
            if draft.text is not None:
                draft.text = self.tokenizer.decode(draft.tokens, clean_up_tokenization_spaces=False)
        return drafts

    def _next_columns(self, live: list[Draft], prompts: bool, budget: int) -> tuple[list[list[int]], list[list[int]]]:
        """Take tokens from the drafts for the next forward; return them for each row, and the guesses at their ends.
        Where masks hide no padding, each row takes as many as all have, after the prompts. budget: tokens of a draft,
        which guesses keep, since positions behind it may not exist; 0 for no guesses."""
        waiting = [len(draft.pending) for draft in live]
        room = TOGETHER.get(self.model.device.type, 256) // len(live) if self.masks_hide else 0
        width = max(waiting) if prompts else max(min(waiting), min(max(waiting), room))
        rows, guesses = [], []
        for draft in live:
            row, draft.pending = draft.pending[:width], draft.pending[width:]
            most = 0 if draft.pending else min(GUESSED, room - len(row), budget - len(draft.tokens))
            guesses.append(self._guess(draft, most) if most > 0 else [])
            rows.append(row + guesses[-1])
        return rows, guesses

    def _guess(self, draft: Draft, most: int) -> list[int]:
        """Return tokens that may come next: those behind the first place of the value so far in the source."""
        value = re.search(r'[^":\[]*$', self.tokenizer.decode(draft.tokens[-16:]))[0]
        pattern = rf"(?<!\w){re.escape(value)}(.*)".replace("\\ ", "\\s")
        place = re.search(pattern, draft.source) if value.strip() else None
        tokens = self.grammar_tokenizer.tokenize_str(place[1][: 8 * most])[:most] if place else []
        return tokens[: draft.matcher.validate_tokens(tokens)]

    def _look(self, draft: Draft, budget: int) -> None:
        """Search for an ending from here; where none fits any more, close the document where one last did.
        A search costs as much as several forwards: the next comes when half of the tokens to spare are used."""
        length = len(draft.tokens)
        ending = self.closer.close(draft.matcher, budget - length)
        if ending is not None:
            draft.safe, draft.looked = draft.tokens + ending, length
            draft.look_at = length + max(1, (budget - len(draft.safe)) // 2)
        elif draft.safe:
            self._close(draft, budget)
        else:  # no ending was found, but the model may still write one
            draft.look_at = length + max(8, (budget - length) // 2)

    def _close(self, draft: Draft, budget: int) -> None:
        """End the document, keeping as much of it as can be closed: bisection back to the last search."""
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
        draft.done = True
        if draft.safe:
            draft.logprobs = draft.logprobs[:written] + [0.0] * (len(draft.safe) - written)
            draft.tokens, draft.text, draft.truncated = draft.safe, "", True

    def _force(self, draft: Draft, budget: int) -> None:
        """Append the tokens that the schema forces."""
        forced = draft.matcher.compute_ff_tokens()
        if len(draft.tokens) + len(forced) > budget:
            return self._close(draft, budget)
        draft.matcher.consume_tokens(forced)
        draft.tokens += forced
        draft.logprobs += [0.0] * len(forced)
        draft.pending += forced
        if draft.matcher.is_stopped():
            draft.done, draft.text = True, ""
        elif len(draft.tokens) >= draft.look_at:
            self._look(draft, budget)

    def _advance(
        self, draft: Draft, scores: Any, guess: list[int], budget: int, temperature: float, random: Any
    ) -> int:
        """Choose the next token, and those after it as long as the model has seen them: where they are those of the
        guess. Return how many of these. scores: a tensor of logits (1 + guessed tokens, vocabulary)."""
        right = 0
        while not draft.done and not draft.pending:
            self._choose(draft, scores[right], budget, temperature, random)
            while draft.pending and guess[right : right + 1] == draft.pending[:1]:
                del draft.pending[0]
                right += 1
        return right

    def _choose(self, draft: Draft, scores: Any, budget: int, temperature: float, random: Any) -> None:
        """Choose the next token among those allowed. scores: a tensor of logits (vocabulary,)."""
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
            draft.logprobs.append(float(scores[token] - scores.logsumexp(dim=-1)))
            draft.pending.append(token)
            self._force(draft, budget)
