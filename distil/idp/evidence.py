"""Evidence of an answer: where each value is in the document, and the log-probability of its tokens."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from distil.idp.decoder import Draft
from distil.idp.values import leaves, places, pointers

Place = tuple[int, int]  # [start, end) in characters
OVERLAP, DISORDER, LABEL = 10.0, 10.0, 3.0  # costs of a place, in units of log(1 + characters from its neighbours)
LEAF = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[^\s\[\]{},:"]+')  # of a JSON text: a name with its colon, or a value
WORD = re.compile(r"(?<=[^\W_])(?=[^\W_])")  # a place within a word


@dataclass(frozen=True)
class Evidence:
    """What is known of a value. logprob: of its tokens together, in nats, None where they are not known."""

    value: Any
    logprob: float | None
    span: Place | None


def gathered(draft: Draft, pieces: Sequence[bytes], document: str, start: int = 0) -> Any:
    """Return an answer with an Evidence in place of each value. draft: of the answer; pieces: bytes of its tokens;
    start: of this document within the one that spans refer to."""
    text, logprobs = draft.text, draft.logprobs
    if draft.truncated:  # what the closing wrote is not the model's: nothing is known of it
        last = max((i for i, logprob in enumerate(logprobs) if logprob), default=-1)
        logprobs = [*logprobs[: last + 1], *[-math.inf] * len(logprobs[last + 1 :])]
    answer = json.loads(text)
    values, spans = [value for _, value in leaves(answer)], locate(answer, document)
    sums = token_logprobs(text, pieces, logprobs)
    sums = sums if len(sums) == len(values) else [None] * len(values)
    spans = [span and (span[0] + start, span[1] + start) for span in spans]
    return _filled(answer, map(Evidence, values, sums, spans))


def _filled(value: Any, rows: Iterator[Evidence]) -> Any:
    if isinstance(value, dict):
        return {name: _filled(part, rows) for name, part in value.items()}
    return [_filled(part, rows) for part in value] if isinstance(value, list) else next(rows)


def evidence_rows(tree: Any, document: str) -> list[dict[str, Any]]:
    """Return {"path", "confidence", "span"} of each value: JSON pointer, probability of its tokens, [start, end) in
    the document; in one with form feeds also "page"."""
    rows = []
    for pointer, one in pointers(tree):
        confidence = None if one.logprob is None else math.exp(one.logprob)
        rows.append({"path": pointer, "confidence": confidence, "span": one.span and [*one.span]})
        if one.span and "\f" in document:
            rows[-1]["page"] = 1 + document.count("\f", 0, one.span[0])
    return rows


def token_logprobs(text: str, pieces: Sequence[bytes], logprobs: Sequence[float]) -> list[float]:
    """Return for each value of a JSON text the log-probability of its tokens together with the one that ends it:
    whether 58 continues as 584 is decided there. Empty where the tokens are not known or not those of the text."""
    if not logprobs or b"".join(pieces) != text.encode():
        return []
    at = [*accumulate((len(letter.encode()) for letter in text), initial=0)]  # byte of each character
    ends = [*accumulate(map(len, pieces))]
    starts = [0, *ends[:-1]]
    spans = [(at[match.start()], at[match.end()] + 1) for match in LEAF.finditer(text) if not match[1]]
    return [sum(logprobs[bisect_right(ends, start) : bisect_left(starts, end)]) for start, end in spans]


def locate(answer: Any, document: str) -> list[Place | None]:
    """Return where each value is in the document, None where it does not. Of several places the one is chosen that
    - no other value has,
    - is in the order of the same field in other items of a list,
    - is near the other values of the same object (mean of log(1 + characters between)),
    - for values outside lists: has a word of the field's name before it in its line,
    and that neither begins nor ends within a word if there is such. Values in list items choose before those above
    them, which sums often repeat. The choice is made twice, the second time with all others known."""
    fields = [path for path, _ in leaves(answer)]
    objects = [pointer.rpartition("/")[0] for pointer, _ in pointers(answer)]
    found, near, columns = [], defaultdict(list), defaultdict(list)
    for i, (path, value) in enumerate(leaves(answer)):
        all_of_it = places(path, value, document)
        words = [place for place in all_of_it if not any(WORD.match(document, end) for end in place)]
        found.append(words or all_of_it)
        near[objects[i]].append(i)
        columns[path].append(i)
    before = {b: a for column in columns.values() for a, b in pairwise(column)}
    after = {a: b for b, a in before.items()}
    chosen: list[Place | None] = [None] * len(fields)
    taken: Counter = Counter()  # characters

    def cost(i: int, place: Place) -> float:
        start, end = place
        line = document[document.rfind("\n", 0, start) + 1 : start].lower()
        names = () if "[]" in fields[i] else re.findall(r"[^\W\d_]{3,}", fields[i].lower())
        earlier, later = (chosen[side[i]] if i in side else None for side in (before, after))
        disorder = bool(earlier and earlier[1] > start) + bool(later and end > later[0])
        others = [other for j in near[objects[i]] if j != i and (other := chosen[j])]
        gaps = [math.log1p(max(start - other[1], other[0] - end, 0)) for other in others]
        total = OVERLAP * (taken[start] > 0 or taken[end - 1] > 0) + DISORDER * disorder
        return total + sum(gaps) / max(len(gaps), 1) - LABEL * any(name in line for name in names)

    for i in sorted(range(len(fields)), key=lambda i: -objects[i].count("/")) * 2:
        taken.subtract(range(*(chosen[i] or (0, 0))))
        chosen[i] = min(found[i], key=lambda place: cost(i, place), default=None)
        taken.update(range(*(chosen[i] or (0, 0))))
    return chosen
