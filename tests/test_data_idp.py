"""Invoice data: schema, layouts, splits, and that every expected value can be read from its document."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from datetime import date

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from common import InputError
from data import idp_catalogue as words
from data import make_idp
from data.idp_invoice import Draw, date_text, decimal_text, draw_invoice
from data.idp_layouts import GRAMMAR, UNSEEN, Page
from distil.files import file_sha256, read_json
from distil.idp.documents import compact_json, idp_prompt
from distil.idp.values import leaves, occurs_in
from distil.models import embedded_model_dir
from distil.splits import split_of
from distil.testing import ROOT

DATA = ROOT / "data"
FILES = ("idp_sft.jsonl", "idp_kd.jsonl", "idp_dpo.jsonl", "idp_validation.jsonl", "idp_val.jsonl")
ANSWERS = {"output", "teacher_output", "chosen", "rejected", "expected"}


def data_rows(name: str) -> list[dict]:
    # Not splitlines(): it would also split at characters that JSON leaves inside strings.
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: data_rows(name) for name in FILES}


@pytest.fixture(scope="module")
def pairs(rows) -> list[tuple[str, dict, str]]:
    """Return (document, expected fields, layout) of all training and validation documents."""
    head = idp_prompt("")
    train = [(r["input"].removeprefix(head), json.loads(r["output"]), r["layout"]) for r in rows["idp_sft.jsonl"]]
    return train + [(r["document"], json.loads(r["expected"]), r["layout"]) for r in rows["idp_validation.jsonl"]]


# -------------------------------------------------------------------------------------------------- formats and schema


def test_schema_is_a_strict_draft_2020_12_schema():
    schema = read_json(DATA / "idp_schema.json")
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    item = schema["properties"]["line_items"]["items"]
    for level in (schema, item):
        assert level["required"] == list(level["properties"]) and level["additionalProperties"] is False
    assert list(item["properties"]) == ["description", "qty", "unit_price", "amount"]


GOOD = {
    "number": "1",
    "date": "2026-03-04",
    "vendor": "V",
    "currency": "EUR",
    "total": 2.5,
    "line_items": [{"description": "a", "qty": 1, "unit_price": 2.5, "amount": 2.5}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"number": ""},
        {"number": 12},
        {"date": "4.3.2026"},
        {"currency": "€"},
        {"total": -1},
        {"total": "2.50"},
        {"vendor": "x" * 81},
        {"line_items": []},
        {"line_items": GOOD["line_items"] * 13},
        {"line_items": [{"description": "a", "qty": 1, "unit_price": 2.5}]},
        {"due": "2026-04-04"},
    ],
)
def test_schema_refuses(change):
    validator = Draft202012Validator(make_idp.SCHEMA)
    assert validator.is_valid(GOOD)
    assert not validator.is_valid(GOOD | change)


def test_files_have_their_fields_and_counts(rows):
    fields = {
        "idp_sft.jsonl": (1600, {"input", "output"}),
        "idp_kd.jsonl": (600, {"input", "teacher_output"}),
        "idp_dpo.jsonl": (600, {"prompt", "chosen", "rejected"}),
        "idp_validation.jsonl": (400, {"document", "expected", "layouts", "family"}),
        "idp_val.jsonl": (100, {"input", "output"}),
    }
    for name, (count, names) in fields.items():
        assert len(rows[name]) == count
        assert all(set(row) == names | {"vendor", "layout"} for row in rows[name])
    assert sum((DATA / name).stat().st_size for name in FILES) < 4_000_000


def test_every_answer_validates_in_the_one_layout(rows):
    validator = Draft202012Validator(read_json(DATA / "idp_schema.json"))
    order = list(make_idp.SCHEMA["properties"])
    for name in FILES:
        for row in rows[name]:
            for text in (row[key] for key in ANSWERS & set(row)):
                value = json.loads(text)
                assert validator.is_valid(value), text
                assert compact_json(value) == text
                assert list(value) == order
                for number in re.findall(r"(?<=:)\d[^,}]*", text):
                    assert re.fullmatch(r"\d+(\.\d|\.\d[1-9])?", number), text  # no exponent, no third decimal


def test_prompts_are_made_by_idp_prompt(rows):
    head = idp_prompt("")
    assert idp_prompt("\n  a \r\n\n b\t\n\n") == head + "  a\n\n b"
    for name, key in (("idp_sft.jsonl", "input"), ("idp_kd.jsonl", "input"), ("idp_dpo.jsonl", "prompt")):
        for row in rows[name]:
            assert row[key].startswith(head)
            assert idp_prompt(row[key].removeprefix(head)) == row[key]
    assert all(idp_prompt(row["document"]) == head + row["document"] for row in rows["idp_validation.jsonl"])


def test_kd_and_dpo_repeat_training_documents(rows):
    sft = {row["input"]: row["output"] for row in rows["idp_sft.jsonl"]}
    assert len(sft) == 1600  # no document twice
    assert all(sft[row["input"]] == row["teacher_output"] for row in rows["idp_kd.jsonl"])
    assert all(sft[row["prompt"]] == row["chosen"] for row in rows["idp_dpo.jsonl"])


@pytest.mark.slow
def test_prompt_and_answer_are_short(rows):
    """In tokens of the embedded model; a longer mean makes every training slower."""
    encode = Tokenizer.from_file(str(embedded_model_dir() / "tokenizer.json")).encode
    lengths = [len(encode(row["input"] + row["output"]).ids) for row in rows["idp_sft.jsonl"]]
    assert sum(lengths) / len(lengths) <= 320 and max(lengths) < 1024


def test_rejected_answers_are_wrong_in_one_or_two_fields(rows):
    kinds = Counter()
    for row in rows["idp_dpo.jsonl"]:
        chosen, rejected = json.loads(row["chosen"]), json.loads(row["rejected"])
        wrong = [field for field in chosen if chosen[field] != rejected[field]]
        assert 1 <= len(wrong) <= 2
        kinds.update(wrong)
    assert set(kinds) == set(GOOD) and min(kinds.values()) >= 40, kinds


# -------------------------------------------------------------------------------------------------- splits and layouts


def test_vendors_are_split_and_never_meet(rows):
    train = {row["vendor"] for name in FILES[:3] for row in rows[name]}
    validation = {row["vendor"] for row in rows["idp_validation.jsonl"]}
    assert {split_of(row["vendor"]) for row in rows["idp_val.jsonl"]} == {"calibration"}
    assert {split_of(name) for name in train} == {"train"}
    assert {split_of(name) for name in validation} == {"validation"}
    assert not train & validation
    assert len(train) >= 80 and len(validation) >= 40
    for layouts in ("known", "unseen"):
        assert len({r["vendor"] for r in rows["idp_validation.jsonl"] if r["layouts"] == layouts}) >= 40


def family(row: dict) -> tuple[str, ...]:
    """Return page, kind of facts and kind of items of a row."""
    return tuple(row["layout"].split("/")[:3])


def test_hundreds_of_layouts_train(rows):
    counts = Counter(row["layout"] for row in rows["idp_sft.jsonl"])
    assert len(counts) >= 300 and max(counts.values()) <= 48, counts.most_common(3)
    assert len({family(row) for row in rows["idp_sft.jsonl"]}) >= 100
    assert len({skeleton(row["input"]) for row in rows["idp_sft.jsonl"]}) >= 1200


def test_unseen_families_have_a_page_or_a_kind_of_facts_or_items_that_no_training_document_has(rows):
    validation = rows["idp_validation.jsonl"]
    parts = [set(column) for column in zip(*(family(r) for n in FILES if n != FILES[3] for r in rows[n]), strict=True)]
    assert all(row["family"] == "/".join(family(row)) for row in validation)
    new = Counter(tuple(sorted(set(family(row)) - set().union(*parts))) for row in validation)
    assert set(new) == {
        (), ("codes", "stacked", "stacked_header"), ("slash_slip", "slashes", "stars"), ("run_on",), ("total_first",),
        ("under",), ("ledger",), ("cellwise",), ("transposed",),
    }  # fmt: skip
    assert new.pop(()) == 300 and sum(new.values()) == 100 and min(new.values()) >= 12
    assert all((row["layouts"] == "known") == (set(family(row)) <= set().union(*parts)) for row in validation)


def test_validation_documents_are_no_training_documents(rows):
    train, val = ({row["input"] for row in rows[name]} for name in ("idp_sft.jsonl", "idp_val.jsonl"))
    assert not (train | val) & {idp_prompt(row["document"]) for row in rows["idp_validation.jsonl"]}
    assert not train & val


def test_some_validation_goods_are_new(rows):
    def goods(name: str, field: str) -> list[set[str]]:
        return [{item["description"] for item in json.loads(row[field])["line_items"]} for row in rows[name]]

    known = set().union(*goods("idp_sft.jsonl", "output"))
    assert sum(not texts <= known for texts in goods("idp_validation.jsonl", "expected")) >= 80


def skeleton(text: str) -> str:
    """Return a document with w for words, 9 for numbers, and runs of spaces and of rules as one."""
    text = re.sub(r"[^\W\d_]+", "w", text)
    text = re.sub(r"\d+", "9", text)
    return re.sub(r"([-=._* w9\t])[-=._* w9\t]*\1", r"\1", text)


def test_unseen_layouts_look_like_no_training_document(rows):
    """Clean pages of the same invoices: an unseen one has no skeleton that a page of the grammar has."""

    def skeletons(rules: tuple, often: int) -> set[str]:
        drawn = set()
        for number, vendor in enumerate([v for v in words.vendors() if split_of(v.name) == "train"][::16]):
            invoice, draw = draw_invoice(Draw(f"page {number}"), vendor, False), Draw(f"style {number}")
            drawn |= {
                skeleton(Page(invoice, r.layout(draw), draw, False).write()) for r in rules for _ in range(often)
            }
        return drawn

    unseen = skeletons(UNSEEN, 10)
    assert len(unseen) >= 400
    assert not unseen & (skeletons(GRAMMAR, 20) | {skeleton(row["input"]) for row in rows["idp_sft.jsonl"]})


# ------------------------------------------------------------------------------------------- values in the documents


def money_forms(value: float) -> set[str]:
    """Return a value as any of the countries writes it, with and without decimals where they are zero."""
    cents = round(value * 100)
    grouped, plain, rest = f"{cents // 100:,}", str(cents // 100), f"{cents % 100:02d}"
    wholes = {plain, grouped, grouped.replace(",", "."), grouped.replace(",", " "), grouped.replace(",", "'")}
    forms = {f"{whole}{point}{rest}" for whole in wholes for point in ".,"}
    if cents % 10 == 0:
        forms |= {form[:-1] for form in forms}
    return forms | ({plain} if cents % 100 == 0 else set())


def holds(document: str, forms: set[str]) -> bool:
    return any(
        re.search(r"(?<![\d])" + re.escape(form) + r"(?![\d]|[.,']\d)", document) for form in forms if form in document
    )


MONTHS = {  # full and three-letter names of all languages
    name[:length].lower(): number
    for names in words.MONTHS.values()
    for number, name in enumerate(names, 1)
    for length in (3, len(name))
}


def dates_in(document: str, month_first: bool) -> set[str]:
    """Return ISO dates in a document, read by the rules of data/README.md, not by the generator's code."""
    dates = set()

    def note(year: str, month: str | int, day: str) -> None:
        dates.add(date(int(year) + (2000 if len(year) == 2 else 0), int(month), int(day)).isoformat())

    for a, mark, b, year in re.findall(r"(?<!\d)(\d{1,2})([./-])(\d{1,2})\2(\d{4}|\d{2})(?!\d)", document):
        note(year, *((a, b) if mark == "/" and month_first else (b, a)))
    for year, month, day in re.findall(r"(?<!\d)(\d{4})-(\d\d)-(\d\d)(?!\d)", document):
        note(year, month, day)
    for day, name, year in re.findall(r"(?<!\d)(\d{1,2})\.?[ -]([^\W\d]+)[ -](\d{4})(?!\d)", document):
        if name.lower() in MONTHS:
            note(year, MONTHS[name.lower()], day)
    for name, day, year in re.findall(r"([^\W\d]+) (\d{1,2}), (\d{4})(?!\d)", document):
        if name.lower() in MONTHS:
            note(year, MONTHS[name.lower()], day)
    return dates


CODES = {"$": "USD", "US$": "USD", "C$": "CAD", "CA$": "CAD", "A$": "AUD", "AU$": "AUD", "£": "GBP", "€": "EUR"}
CODES |= {"kr": "SEK", "zł": "PLN", "Fr.": "CHF"} | {code: code for code in make_idp.CURRENCIES}


def currencies_in(document: str) -> set[str]:
    marks = "|".join(sorted(map(re.escape, CODES), key=len, reverse=True))
    return {CODES[mark] for mark in re.findall(rf"(?<![^\W\d])(?:{marks})(?![^\W\d])", document)}


def test_every_value_can_be_read_from_the_document(pairs):
    for document, fields, _ in pairs:
        assert re.search(rf"(?<!\w){re.escape(fields['number'])}(?!\w)", document)
        assert fields["vendor"] in document
        assert currencies_in(document) == {fields["currency"]}, document
        assert fields["date"] in dates_in(document, fields["currency"] == "USD"), document
        assert holds(document, money_forms(fields["total"])), document
        for item in fields["line_items"]:
            assert item["description"] in document
            for key in ("unit_price", "amount"):
                assert holds(document, money_forms(item[key])), (item, document)
            assert item["qty"] == 1 or holds(document, money_forms(item["qty"])), (item, document)


def test_values_are_found_where_they_are_read(pairs):
    """The check of inventions finds every value of an answer, except a quantity of one and the code of a mark."""
    for document, fields, _ in pairs:
        for path, value in leaves(fields):
            assert path == "currency" or (path, value) == ("line_items[].qty", 1) or occurs_in(path, value, document)


def test_a_quantity_is_left_out_for_single_pieces_only(pairs):
    """In two kinds of items one piece has no quantity; elsewhere every quantity is printed."""
    for document, fields, layout in pairs:
        if layout.split("/")[2] not in ("till", "web"):
            assert all(holds(document, money_forms(item["qty"])) for item in fields["line_items"]), document


def test_arithmetic_is_right(pairs):
    added = 0
    for _, fields, _ in pairs:
        cents = [round(100 * item["amount"]) for item in fields["line_items"]]
        for item, amount in zip(fields["line_items"], cents, strict=True):
            assert round(100 * item["qty"]) * round(100 * item["unit_price"]) == 100 * amount
        tax = round(100 * fields["total"]) - sum(cents)
        assert 0 <= tax <= 0.26 * sum(cents) + 1
        added += tax > 0
    assert 0.3 < added / len(pairs) < 0.7


def test_marks_of_currencies_are_unambiguous():
    owners = defaultdict(set)
    for code, marks in words.MARKS.items():
        for mark in marks:
            owners[mark].add(code)
    assert all(len(codes) == 1 for codes in owners.values())


def test_slash_dates_are_month_first_in_dollars_only():
    for country in words.COUNTRIES.values():
        slashed = [style for style in country.dates if "/" in style]
        assert all(style.startswith("m") == (country.currency == "USD") for style in slashed)
        assert all(style.startswith("d") for style in country.dates if "." in style)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("m/d/Y", "3/4/2026"),
        ("dd.mm.y", "04.03.26"),
        ("d. Month Y", "4. März 2026"),
        ("d-Mon-Y", "4-Mär-2026"),
        ("dd MON Y", "04 MÄR 2026"),
        ("Month d, Y", "März 4, 2026"),
        ("Y-mm-dd", "2026-03-04"),
    ],
)
def test_date_text(style, text):
    assert date_text(date(2026, 3, 4), style, "de") == text


@pytest.mark.parametrize(
    ("cents", "sample", "text"),
    [
        (123450, "1,234.50", "1,234.50"),
        (123450, "1.234,50", "1.234,50"),
        (123450, "1 234,50", "1 234,50"),
        (123450, "1'234.50", "1'234.50"),
        (123450, "1234.50", "1234.50"),
        (5, "1.234,50", "0,05"),
    ],
)
def test_decimal_text(cents, sample, text):
    assert decimal_text(cents, sample) == text


# ------------------------------------------------------------------------------------------------------- the generator


def written(folder, *flags: str) -> dict[str, bytes]:
    folder.mkdir()
    assert make_idp.main(["--outdir", str(folder), *flags]) == 0
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_generator_repeats_itself_and_heeds_the_seed(tmp_path):
    first = written(tmp_path / "a", "--documents", "32")
    assert first == written(tmp_path / "b", "--documents", "32")
    assert set(first) == {*FILES, "idp_schema.json"}
    other = written(tmp_path / "c", "--documents", "32", "--seed", "1")
    assert all(first[name] != other[name] for name in FILES)
    assert [first[name].count(b"\n") for name in FILES] == [32, 12, 12, 8, 2]


def test_committed_files_are_what_the_default_command_writes(tmp_path):
    for name, content in written(tmp_path / "all").items():
        assert content == (DATA / name).read_bytes(), f"{name}: python -m data.make_idp --seed 0 --outdir data"


def test_readme_names_the_files_by_hash():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name in (*FILES, "idp_schema.json"):
        link = re.escape(f"| [{name}]({name}) |")
        assert re.search(rf"{link}.*`{file_sha256(DATA / name)}`", text), name


@pytest.mark.parametrize("flags", [["--documents", "0"], ["--outdir", "no/such/folder"]])
def test_bad_flags(flags):
    with pytest.raises(InputError, match=re.escape(" ".join(flags))):
        make_idp.main(flags)
