"""Values of answers: dates and numbers in a text, whether two values are equal, and the measures built on that."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from distil.idp.schema import field_schemas

MONTHS = (  # in English, German, French and Swedish, without accents; three letters of one are enough
    "january januar janner janvier januari|february februar fevrier februari|march marz maerz mrz mars|april avril|"
    "may mai maj|june juni juin|july juli juillet|august aout augusti|september septembre|october oktober octobre|"
    "november novembre|december dezember decembre"
)
DAY = re.compile(  # year month day; day month year or month day year; day name year; name day year
    r"(\d{4})[-/. ](\d{1,2})[-/. ](\d{1,2})(?!\d)"
    r"|(?<!\d)(\d{1,2})[-/. ]+(\d{1,2})[-/. ]+(\d{4}|\d{2})(?!\d)"
    r"|(?<!\d)(\d{1,2})(?:st|nd|rd|th|er)?[-/., ]*([^\W\d_]{3,9})[-/., ]*(\d{4}|\d{2})(?!\d)"
    r"|([^\W\d_]{3,9})\.? *(\d{1,2})(?:st|nd|rd|th)?,? +(\d{4})",
    re.IGNORECASE,
)
NUMBER = re.compile(r"\d(?:[\d.,']*\d)?(?: \d(?:[\d.,']*\d)?)*")  # with what follows it after single spaces
GROUPS = re.compile(r"\d{1,3}(?: \d{3})+(?:[.,]\d+)?")  # one number with spaces as the mark of thousands
SPACES = str.maketrans({"\xa0": " ", "\u202f": " ", "\u2009": " ", "\u2019": "'"})
KINDS = ("right", "predicted", "expected")  # of counted values


def plain(text: str) -> tuple[str, list[int]]:
    """Return a text in lower case without accents, and the place of each of its letters in the given one."""
    pairs = ((sign, i) for i, letter in enumerate(text) for sign in unicodedata.normalize("NFD", letter.casefold()))
    pairs = [(sign, i) for sign, i in pairs if not unicodedata.combining(sign)]
    return "".join(sign for sign, _ in pairs), [i for _, i in pairs]


def days(text: str) -> Iterator[tuple[tuple[date, ...], int, int]]:
    """Yield the days that each date in a text can mean, of 03/04/2024 first 3 April, then 4 March, and its place."""
    (letters, places), at = plain(text), 0
    while match := DAY.search(letters, at):
        y, m, d, a, b, c, d2, m2, y2, m3, d3, y3 = match.groups()
        named = [(y2, m2 and _month(m2), d2), (y3, m3 and _month(m3), d3)]
        valid = []
        for year, month, day in [(y, m, d), (c, b, a), (c, a, b), *named]:
            with suppress(ValueError, TypeError):  # no such day; parts that this date does not have are None
                valid.append(date(int(year) + (2000 if len(year) == 2 else 0), int(month), int(day)))
        at = match.end() if valid else match.start() + 1  # of `29 vom 23.02.2026` the end is a date
        if valid:
            yield tuple(dict.fromkeys(valid)), places[match.start()], places[match.end() - 1] + 1


def _month(word: str) -> int | None:
    return next((i for i, names in enumerate(MONTHS.split("|"), 1) if f" {word}" in f" {names}"), None)


def numbers(text: str) -> Iterator[tuple[Decimal, int, int]]:
    """Yield the values that the numbers in a text can have, and their places: 1.234,50 and 1,234.50 and 1 234,50 are
    all 1234.5; 1.234 has two values. Where columns are one space apart, 2 469,00 is 2, 469 and 2469."""
    for row in NUMBER.finditer(text.translate(SPACES)):
        pieces = [*re.finditer("[^ ]+", row[0])]
        for i, first in enumerate(pieces):
            for last in pieces[i:]:
                number = row[0][first.start() : last.end()]
                if last is not first and not GROUPS.fullmatch(number):
                    break
                for decimal, thousands in (".,", ",."):
                    with suppress(InvalidOperation):
                        value = Decimal(re.sub(f"[ '{thousands}]", "", number).replace(decimal, "."))
                        yield value, row.start() + first.start(), row.start() + last.end()


def normalised(text: str) -> str:
    """Return the form that strings are compared in: words in lower case with one space between, a leading minus, the
    signs of C++ and C#; a text of signs alone stays as it is."""
    text = unicodedata.normalize("NFC", text.strip()).casefold().replace("\u2212", "-")
    words = re.findall(r"^-(?=\d)|\w+(?:[+#]+(?!\w))?", text)
    return " ".join(words) if words else "".join(text.split())


def leaf_key(name: str, value: Any) -> Any:
    """Return the key that two values of a field are compared by.
    A field is a date where a word of its name is "date" and its text has one: invoice_date, dateOfIssue, due-date."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return Decimal(str(value)).normalize()
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    dated = {"date", "dates"} & {word.lower() for word in words}
    return (dated and next(days(value), [None])[0]) or normalised(value)


def occurs_in(name: str, value: Any, document: str) -> bool:
    """Return whether a value can be read in the document. A value that is implied but not written, such as a quantity
    of 1, cannot."""
    return value == "" or bool(places(name, value, document))


def places(name: str, value: Any, document: str) -> list[tuple[int, int]]:
    """Return where a value can be read in the document, [start, end) in its characters: a number by value, a date by
    day, a text by its letters and digits, also over line breaks, signs alone as they are."""
    iso = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)
    key, (text, at, dates, values) = leaf_key("date" if iso else name, value), _readings(document)
    if isinstance(key, Decimal):
        return [*dict.fromkeys((start, end) for number, start, end in values if number == abs(key))]
    if isinstance(key, tuple) and (found := [place for read, *place in dates if set(key) & set(read)]):
        return [*map(tuple, found)]
    if not isinstance(value, str) or not (letters := _letters(plain(value)[0])):
        return []
    gap = r"\W*" if re.match(r"\w", letters) else r"\s*"
    found = []
    for match in re.finditer(gap.join(map(re.escape, letters)), text):
        start, end = at[match.start()], at[match.end() - 1] + 1
        while end < len(document) and unicodedata.combining(document[end]):
            end += 1
        if _letters(document[start:end]) == _letters(value):  # also the accents
            found.append((start, end))
    return found


@lru_cache(maxsize=16)
def _readings(document: str) -> tuple[str, list[int], list, list]:
    """Return `plain`, `days` and `numbers` of a document, which are computed once for all of its values."""
    return *plain(document), [*days(document)], [*numbers(document)]


def _letters(text: str) -> str:
    """Return the letters and digits of a text, or its signs where it has no others."""
    text = unicodedata.normalize("NFC", text).casefold()
    return "".join(re.findall(r"\w+", text) or text.split())


def same(name: str, a: Any, b: Any) -> bool:
    """Return whether two values of a field are equal. Dates are compared by day: 2018-04-03 equals 03/04/2018, which
    can be read that way, but 03/04/2018 does not equal 04/03/2018."""
    a, b = leaf_key(name, a), leaf_key(name, b)
    if isinstance(a, tuple) and isinstance(b, tuple) and 1 in (len(a), len(b)):
        return bool(set(a) & set(b))
    return type(a) is type(b) and a == b


def count_fields(
    predicted: Any, expected: Any, counts: Counter, path: str = "", pointer: str = "", judged: dict | None = None
) -> int:
    """Add to counts[path, kind] for every leaf, each kind of KINDS; return the number of right leaves.
    Items of lists are matched so that most leaves are right (Hungarian method), in any order.
    judged: gets whether each leaf of `predicted` is right, by its JSON pointer; a null where none is expected."""
    kinds = {dict if isinstance(v, dict) else list if isinstance(v, list) else str for v in (predicted, expected)}
    if len(kinds) > 1 and None not in (predicted, expected):  # an object for a text: all of both is wrong
        wrong = count_fields(predicted, None, counts, path, pointer, judged)
        return wrong + count_fields(None, expected, counts, path)
    if isinstance(predicted, dict) or isinstance(expected, dict):
        predicted, expected = (value if isinstance(value, dict) else {} for value in (predicted, expected))
        names = dict.fromkeys([*expected, *predicted])
        places = [(n, f"{path}.{n}".lstrip("."), below(pointer, n)) for n in names]
        return sum(count_fields(predicted.get(n), expected.get(n), counts, *place, judged) for n, *place in places)
    if isinstance(predicted, list) or isinstance(expected, list):
        import numpy as np
        from scipy.optimize import linear_sum_assignment

        predicted, expected = (value if isinstance(value, list) else [] for value in (predicted, expected))
        right = np.array([[count_fields(p, e, Counter(), path) for e in expected] for p in predicted])
        pairs = dict(zip(*linear_sum_assignment(-right), strict=True)) if right.size else {}
        matched = [(item, expected[pairs[i]] if i in pairs else None) for i, item in enumerate(predicted)]
        matched += [(None, expected[j]) for j in set(range(len(expected))) - {int(j) for j in pairs.values()}]
        where = [(f"{path}[]", below(pointer, i)) for i in range(len(matched))]
        return sum(count_fields(*pair, counts, *place, judged) for pair, place in zip(matched, where, strict=True))
    counts[path, "predicted"] += predicted is not None
    counts[path, "expected"] += expected is not None
    right = predicted is not None and expected is not None and same(path, predicted, expected)
    counts[path, "right"] += right
    if judged is not None:
        judged[pointer] = right or (predicted is None and expected is None)
    return int(right)


def pointers(value: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (JSON pointer, value) of what `leaves` yields, in the same order."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield pointer, value
    for key, part in inner or ():
        yield from pointers(part, below(pointer, key))


def below(pointer: str, key: str | int) -> str:
    """Return the JSON pointer to a name or list position in what another leads to (RFC 6901)."""
    return f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each number, string, boolean or null."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, f"{path}[]")
    else:
        yield path, value


def choices_of(schema: Any) -> Iterator[str]:
    """Yield the paths of fields whose values the schema lists: these are chosen, not read, so never inventions."""
    yield from (field.path for field in field_schemas(schema) if field.choices)


def f1_of(counts: Counter | dict, path: str) -> dict[str, float]:
    """Return precision, recall, F1 and the number of expected values of a field."""
    right, predicted, expected = (counts[path, kind] for kind in KINDS)
    precision, recall = right / predicted if predicted else 0.0, right / expected if expected else 0.0
    f1 = 2 * right / (predicted + expected) if predicted + expected else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "expected": expected}


def f1_of_all(counts: Counter) -> float:
    """Return the F1 of all fields together."""
    totals = {("", kind): sum(n for (_, one), n in counts.items() if one == kind) for kind in KINDS}
    return f1_of(totals, "")["f1"]


def measure(rows: Sequence[dict], answers: Sequence[dict], schema: Any, resamples: int) -> dict[str, Any]:
    """Return the metrics of the answers ({"json"} or {"error"}) to the rows ({"document", "expected"},
    with their own "schema" in place of the one that is given).
    `f1` counts all fields together, `macro_f1` is the mean over fields that have a value anywhere; intervals are 95 %
    percentile bootstrap over documents. `exact`: an answer with all values and no others. `invention_rate`: of the
    values that the schema does not list, those that are not in the document; an implied quantity of 1 counts as one,
    so right answers may have a few."""
    import numpy as np

    n = len(rows)
    each: list[Counter] = [Counter() for _ in rows]
    readable = []  # of each value: whether it is in the document
    for row, answer, counts in zip(rows, answers, each, strict=True):
        count_fields(answer.get("json"), row["expected"], counts)
        listed = {*choices_of(row.get("schema", schema))}
        for path, value in leaves(answer.get("json")):
            if value is not None and not isinstance(value, bool) and path not in listed:
                readable.append(occurs_in(path, value, row["document"]))
    paths = sorted({path for counts in each for (path, _), number in counts.items() if number})
    table = np.array([c[path, kind] for c in each for path in paths for kind in KINDS], float)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = np.tensordot(weights, table.reshape(n, len(paths), 3), axes=1)
    drawn = np.concatenate([drawn, drawn.sum(1, keepdims=True)], axis=1)  # all fields together come last
    f1 = 2 * drawn[..., 0] / np.maximum(drawn[..., 1] + drawn[..., 2], 1)
    *intervals, interval_of_all = np.percentile(f1, [2.5, 97.5], axis=0).T.tolist()
    total = sum(each, Counter())
    fields = {path: f1_of(total, path) | {"interval_95": i} for path, i in zip(paths, intervals, strict=True)}
    valid = ["json" in answer for answer in answers]
    exact = [all(c[p, "right"] == c[p, "predicted"] == c[p, "expected"] for p, _ in c) for c in each]
    return {
        "documents": n,
        "valid": sum(valid) / n,
        "truncated": sum(bool(answer.get("truncated")) for answer in answers) / n,
        "exact": float(np.logical_and(valid, exact).mean()),
        "f1": f1_of_all(total),
        "f1_interval_95": interval_of_all,
        "macro_f1": float(np.mean([field["f1"] for field in fields.values()])) if fields else 0.0,
        "invention_rate": readable.count(False) / len(readable) if readable else 0.0,
        "fields": fields,
    }
