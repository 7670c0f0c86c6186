"""An endpoint's tokens as ids of the student's tokenizer: token probabilities of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import PromptEncoder
from distil.idp.schema import grammar_tokenizer
from distil.quirks import is_log_prob
from distil.token_probs import TokenRow
from distil.training.data import load_tokenizer

HALF_A_SIGN = "\ufffd".encode()  # some servers write it for each token that is part of a character


class TokenReader:
    """Reads the log-probabilities of an answer's tokens, of which it keeps the k most probable.
    path: of the student's base model, whose tokenizer the teacher must have."""

    def __init__(self, path: str, k: int):
        tokenizer = load_tokenizer(path)
        self.encoder, self.k, read = PromptEncoder(tokenizer), k, grammar_tokenizer(tokenizer)
        self._words = [read.decode_bytes([number]) for number in range(len(tokenizer))]
        self._ids = {word: number for number, word in enumerate(self._words) if word}

    def row(self, text: str, content: Sequence[dict[str, Any]]) -> TokenRow:
        """Return the token probabilities of an answer. content: `logprobs.content` of its chat completion, which may
        have thoughts before the answer, and after it what ends the turn. Raises ValueError with the reason where its
        tokens are not those that the student has for this text."""
        import numpy as np

        *answer, end = self.encoder.completion(text)
        if not content:
            raise ValueError("there are no log-probabilities of its tokens")
        # Bytes that are no text by themselves count as equal. What ends the turn may come after the answer.
        theirs = [_word(token).decode(errors="replace") for token in content]
        ours = [self._words[number].decode(errors="replace") for number in answer]
        last = len(theirs) - len(ours)
        first = next((n for n in range(last, max(last - 3, -1), -1) if theirs[n : n + len(ours)] == ours), None)
        if first is None:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            raise ValueError(f"it has {theirs[at : at + 3]} where --tokenizer has {ours[at : at + 3]}")
        found = [self._kept(number, token) for number, token in zip(answer, content[first:], strict=False)]
        after = content[first + len(answer) :][:1]
        stops = after and self._ids.get(_word(after[0])) == end
        found.append(self._kept(end, after[0]) if stops else [(0.0, end)])  # not sent: it ended there
        ids = np.full((len(found), self.k), -1, "i4")
        log_probs = np.full(ids.shape, -np.inf)
        for i, pairs in enumerate(found):
            log_probs[i, : len(pairs)], ids[i, : len(pairs)] = zip(*pairs, strict=True)
        with np.errstate(divide="ignore"):
            rest = np.log1p(-np.minimum(np.exp(log_probs).sum(axis=1), 1))
        return TokenRow(np.array([*answer, end], "i4"), ids, log_probs.astype("f2"), rest.astype("f2"))

    def _kept(self, number: int, token: dict[str, Any]) -> list[tuple[float, int]]:
        """Return (log-probability, id), sorted, of a token that is `number` and of its most probable alternatives, but
        for those that are no tokens of the student's: they belong to the rest."""
        if not is_log_prob(token["logprob"]):
            raise ValueError("a token has no log-probability")
        found = {number: token["logprob"]}
        for other in token.get("top_logprobs") or []:
            word = _word(other)
            if word in self._ids and HALF_A_SIGN not in word and is_log_prob(other["logprob"]):
                found.setdefault(self._ids[word], other["logprob"])
        return sorted(((min(float(value), 0.0), other) for other, value in found.items()), reverse=True)[: self.k]


def _word(token: dict[str, Any]) -> bytes:
    """Return the bytes of an endpoint's token."""
    return bytes(token.get("bytes") or token["token"].encode(errors="replace"))
