"""CreditMix rows: canonical text, prompts, reading of the three raw formats, samples."""

from __future__ import annotations

import csv
import json
import time
from collections import Counter

import pytest
from conftest import CREDIT_TEXT, labelled_rows

from common import InputError
from distil.creditmix.rows import CreditRow, balanced_sample, customer_id, read_rows
from distil.features import UNKNOWN, canonical_number
from distil.tables import cell_text
from distil.tasks import default_task, task_of
from distil.testing import credit_rows

TASK = default_task()

# ------------------------------------------------------------------------------------------------------ canonical text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (809.98, "810"),
        (19114.12, "19100"),
        (35.03, "35"),
        (35.27, "35"),
        (0.3503, "0.35"),
        (0.0, "0"),
        (-0.0, "0"),
        (7, "7"),
        (9.994, "9.99"),
        (9.996, "10"),
        (99.96, "100"),
        (999.6, "1000"),
        (123456789, "123000000"),
        (-3.14159, "-3.14"),
        (0.000123456, "0.000123"),
        (1e-20, "0"),
    ],
)
def test_canonical_number(value, expected):
    assert canonical_number(value) == expected
    assert canonical_number(float(expected)) == expected


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("Age", "23.0", "23"),
        ("Age", "23_", "23"),
        ("Age", " 23 ", "23"),
        ("Age", "-500", UNKNOWN),
        ("Age", "8000", UNKNOWN),
        ("Age", "8000_", UNKNOWN),
        ("Age", "0", UNKNOWN),
        ("Age", "110", "110"),
        ("Age", "twenty", UNKNOWN),
        ("Age", "1e999", UNKNOWN),
        ("Occupation", "_______", UNKNOWN),
        ("Occupation", "Media_Manager", "Media_Manager"),
        ("Occupation", "", UNKNOWN),
        ("Annual Income", "19114.12", "19100"),
        ("Annual Income", "19114.12_", "19100"),
        ("Annual Income", "19,114.12", "19100"),
        ("Annual Income", "1.911412e4", "19100"),
        ("Annual Income", "24198062.0", UNKNOWN),
        ("Outstanding Debt", "809.98", "810"),
        ("Annual Income", "$19,114.12", "19100"),
        ("Outstanding Debt", "810 €", "810"),
        ("Outstanding Debt", "$", UNKNOWN),
        ("Credit Utilization Ratio", "35%", "35"),
        ("Outstanding Debt", "_", UNKNOWN),
        ("Outstanding Debt", "   ", UNKNOWN),
        ("Credit Utilization Ratio", "35.03", "35"),
        ("Credit Utilization Ratio", "0.3503", "0.35"),
        ("Credit Utilization Ratio", "135", UNKNOWN),
        ("Payment Behaviour", "!@9#%8", UNKNOWN),
        ("Payment Behaviour", "Low_spent_Small_value_payments", "Low_spent_Small_value_payments"),
        ("Payment Behaviour", "NM", UNKNOWN),
        ("Payment Behaviour", "nan", UNKNOWN),
        ("Month", "12", "12"),
        ("Month", "August", "August"),
    ],
)
def test_clean_field(field, value, expected):
    assert TASK.clean_value(field, value) == expected
    assert TASK.clean_value(field, expected) == expected


CANONICAL = (
    "Age: 23, Occupation: Scientist, Annual Income: 19100, Outstanding Debt: 810, Credit Utilization Ratio: 35, "
    "Payment Behaviour: Low_spent_Small_value_payments"
)


ONLY_AGE = (
    "Age: 30, Occupation: Unknown, Annual Income: Unknown, Outstanding Debt: Unknown, "
    "Credit Utilization Ratio: Unknown, Payment Behaviour: Unknown"
)


FEATURES = {
    "the whitepaper's example": (CREDIT_TEXT, CANONICAL),
    "canonical already": (CANONICAL, CANONICAL),
    "another order": (", ".join(reversed(CREDIT_TEXT.split(", "))), CANONICAL),
    "lines instead of commas": (CREDIT_TEXT.replace(", ", "\n"), CANONICAL),
    "semicolons": (CREDIT_TEXT.replace(", ", "; "), CANONICAL),
    "no space after commas": (CREDIT_TEXT.replace(", ", ","), CANONICAL),
    "a full stop at the end": (CREDIT_TEXT + ".", CANONICAL),
    "names of the CSV": (CREDIT_TEXT.replace("Annual Income", "Annual_Income"), CANONICAL),
    "small letters in names": (CREDIT_TEXT.replace("Credit Utilization Ratio", "credit utilization ratio"), CANONICAL),
    "thousands commas": (CREDIT_TEXT.replace("19114.12", "19,114.12"), CANONICAL),
    "stray underscores": (CREDIT_TEXT.replace("809.98", "809.98_").replace("23.0", "23_"), CANONICAL),
    "missing fields": ("Age: 30", ONLY_AGE),
    "empty cells": ("Age: 30, Occupation: , Annual Income: ", ONLY_AGE),
    "marks for missing": ("Age: 30, Occupation: _______, Payment Behaviour: !@9#%8, Outstanding Debt: _", ONLY_AGE),
    "impossible values": ("Age: 30, Credit Utilization Ratio: -500, Annual Income: 8000000", ONLY_AGE),
    "further fields come last": ("Month: May, Age: 30.0, Cards: 4.0", ONLY_AGE + ", Month: May, Cards: 4"),
    "other fields alone": ("Income: 19114.12, Town: Rome", "Income: 19100, Town: Rome"),
    "free text": ("earns 19,114.12 a year, owes 809.98", "earns 19100 a year, owes 810"),
    "free text without numbers": ("a careful customer", "a careful customer"),
    "free text with an endless number": ("owes 1e999 and 12.34", "owes 1e999 and 12"),
    "free text with digits that are not a number": ("owes 12,53,000 or 2.5.1", "owes 12,53,000 or 2.5.1"),
    "a mark alone": ("...", "..."),
    "a comma in a field of words": (
        CREDIT_TEXT.replace("Scientist", "Scientist, retired"),
        CANONICAL.replace("Scientist", "Scientist, retired"),
    ),
    "words behind a number": ("Age: 23.0, a careful customer", "Age: 23, a careful customer"),
}


@pytest.mark.parametrize(("text", "expected"), FEATURES.values(), ids=FEATURES)
def test_canonical_features(text, expected):
    assert TASK.canonical(text) == expected
    assert TASK.canonical(expected) == expected


def test_canonical_features_are_idempotent_on_damaged_rows():
    for row in credit_rows(customers=150, months=2, seed=7):
        once = TASK.canonical(row["question"])
        assert TASK.canonical(once) == once
        assert [part.split(":")[0] for part in once.split(", ")] == list(tuple(TASK.by_name))


def test_a_long_run_of_blanks_costs_no_more_than_other_text():
    text = "Age: 3" + " " * 200_000 + "b"
    start = time.process_time()
    TASK.parse(text)
    assert time.process_time() - start < 2  # it took minutes where the separator could begin with blanks


@pytest.mark.parametrize(
    ("text", "named"),
    [("Age: 30", True), ("hello", False), ("Height: 3", False), ("", False), ("Age: , Occupation: _", False)],
)
def test_a_text_without_a_known_field_is_noted(text, named):
    notes = Counter()
    TASK.canonical(text, notes)
    assert (TASK._no_field not in notes) == named


def test_prompts_have_the_canonical_text_of_any_spelling():
    assert TASK.prompt(CREDIT_TEXT) == TASK.prompt(CANONICAL)
    assert TASK.prompt(CREDIT_TEXT).endswith("\n" + CANONICAL)


def test_null_prompts_differ():
    assert len(TASK.null_prompts()) == len(set(TASK.null_prompts())) == 7
    assert TASK.null_prompts()[5].endswith(
        "\n" + ", ".join(f"{field}: -" for field in tuple(TASK.by_name))
    )  # not cleaned
    assert TASK.null_prompts(2) == TASK.null_prompts()[:2]


# ----------------------------------------------------------------------------------------------------------- raw files


RAW = [
    {"question": CREDIT_TEXT, "answer": "Good", "customer_id": "A"},
    {"question": CREDIT_TEXT.replace("23.0", "-500"), "answer": "_", "customer_id": "A"},  # filled: A is Good
    {"question": CREDIT_TEXT, "answer": "Standard", "customer_id": "B"},
    {"question": CREDIT_TEXT, "answer": "Bad", "customer_id": "B"},
    {"question": CREDIT_TEXT, "answer": "_", "customer_id": "B"},  # dropped: B is Standard and Bad
    {"question": CREDIT_TEXT, "answer": "_", "customer_id": "D"},  # dropped: D has no label
    {"question": "Age: 30", "answer": " Bad "},  # no customer id: its own customer
]


READ = [
    CreditRow("A", CANONICAL, "Good"),
    CreditRow("A", CANONICAL.replace("Age: 23", "Age: Unknown"), "Good"),
    CreditRow("B", CANONICAL, "Standard"),
    CreditRow("B", CANONICAL, "Bad"),
    CreditRow(ONLY_AGE, ONLY_AGE, "Bad"),
]


def jsonl(rows: list[dict], end: str = "\n") -> str:
    return "".join(json.dumps(row) + end for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps(RAW)),
        ("indented.json", "\n " + json.dumps(RAW, indent=2)),
        ("rows.jsonl", jsonl(RAW)),
        ("rows.json", jsonl(RAW)),
        ("windows.jsonl", jsonl(RAW, "\r\n")),
        ("bom.jsonl", "\ufeff" + jsonl(RAW)),
        ("bom.json", "\ufeff" + json.dumps(RAW)),
        ("blank_lines.jsonl", "\n" + jsonl(RAW, "\n\n")),
    ],
)
def test_read_creditmix_json(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    rows, notes = read_rows(tmp_path / name, TASK)
    assert rows == READ
    assert notes["label _: filled from the customer's other rows"] == 1
    assert notes["label _: row dropped"] == 2
    assert notes["Age: outside 1..110 -> Unknown"] == 1


HEADER = (
    "ID,Customer_ID,Month,Age,Occupation,Annual_Income,Credit_Mix,Outstanding_Debt,Credit_Utilization_Ratio,"
    "Payment_Behaviour"
)


CSV_LINES = [
    HEADER,
    "0x1,CUS_1,January,23,Scientist,19114.12,_,809.98,26.822619623699016,High_spent_Small_value_payments",
    "0x2,CUS_1,February,-500,_______,19114.12_,Good,809.98_,31.94,!@9#%8",
    '0x3,CUS_2,January,8000,"Doctor, retired","24,198,062.0",Bad,_,,Low_spent_Small_value_payments',
    "0x4,CUS_3,January,40,Lawyer,50000,_,100,30,High_spent_Small_value_payments",
]


CSV_READ = [
    (
        "CUS_1",
        "Good",
        "Age: 23, Occupation: Scientist, Annual Income: 19100, Outstanding Debt: 810, Credit Utilization Ratio: 27, "
        "Payment Behaviour: High_spent_Small_value_payments",
    ),
    (
        "CUS_1",
        "Good",
        "Age: Unknown, Occupation: Unknown, Annual Income: 19100, Outstanding Debt: 810, "
        "Credit Utilization Ratio: 32, Payment Behaviour: Unknown",
    ),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_read_creditmix_kaggle_csv(tmp_path, end, mark):
    path = tmp_path / "train.CSV"
    path.write_bytes((mark + end.join(CSV_LINES[:3]) + end).encode())
    rows, notes = read_rows(path, TASK)
    assert [(row.customer, row.label, row.features) for row in rows] == CSV_READ
    assert notes["Annual Income: stray _ removed"] == notes["Outstanding Debt: stray _ removed"] == 1


def test_csv_cells_with_commas_and_line_ends(tmp_path):
    """A comma in a quoted cell belongs to the value; so does a line end, even where it makes the value useless."""
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        writer.writerow(["1", "CUS_1", "May", "40", "Lawyer", "50,000.7", "Good", "1", "2", "High\u2028spent"])
        writer.writerow(["2", "CUS_2", "May", "41", "Lawyer", "60000", "Bad", "1", "2", "x"])
    rows, _ = read_rows(path, TASK)
    assert [row.label for row in rows] == ["Good", "Bad"]
    assert "Age: 40, Occupation: Lawyer, Annual Income: 50000, " in rows[0].features
    assert rows[0].features.endswith("Payment Behaviour: High\u2028spent")


def test_csv_cells_cannot_become_other_fields(tmp_path):
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        writer.writerow(["1", "CUS_1", "May", "40", "A: b, Age: 99", "50000", "Good", "1", "2", "x; Age: 98\nAge: 97"])
    (row,), _ = read_rows(path, TASK)
    assert "Age: 40, Occupation: A b, Age 99, Annual Income: 50000, " in row.features.replace("  ", " ")


def test_one_customer_is_spelt_one_way(tmp_path):
    """Otherwise months of one customer would be in two parts of the split."""
    table, listed = tmp_path / "a.csv", tmp_path / "b.json"
    with open(table, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        for name in ("17", " 17", "17 "):
            writer.writerow(["1", name, "May", "40", "Lawyer", "50000", "Good", "1", "2", "x"])
    listed.write_text(
        json.dumps([{"question": "Age: 40", "answer": "Good", "customer_id": i} for i in (17, 17.0, "17", " 17")])
    )
    for path in (table, listed):
        assert {row.customer for row in read_rows(path, TASK)[0]} == {"17"}


def test_customer_zero_is_a_customer_and_ids_have_no_blanks(tmp_path):
    rows = [
        {"question": f"Age: {i + 20}", "answer": "Good", "customer_id": name}
        for i, name in enumerate([0, " C1", "C1 "])
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert [row.customer for row in read_rows(path, TASK)[0]] == ["0", "C1", "C1"]


IDS = {
    "17": (
        "17",
        "17.0",
        " 17 ",
        "1.7e1",
        "+17",
        "17.",
        "\ufeff17",
        "17\u200b",
        "\uff11\uff17",
        "\u00a017",
        17,
        17.0,
        1.7e1,
    ),
    "017": ("017",),  # zeros in front belong to a text id
    "17.5": ("17.5", "17.50", "1.75e1", 17.5),
    "0": ("0", "0.0", "-0", 0, -0.0),
    "9007199254740993": ("9007199254740993", 9007199254740993),  # more digits than a float has
    "9007199254740992": ("9007199254740992", 9007199254740992),
    "12e45": ("12e45",),
    "CUS_0xd40": ("CUS_0xd40", " CUS_0xd40"),
    "": ("", " ", "nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "_", None),
}


@pytest.mark.parametrize(("spelling", "values"), IDS.items(), ids=[name or "none" for name in IDS])
def test_one_spelling_of_a_customer(spelling, values):
    assert {customer_id(value) for value in values} == {spelling}


@pytest.mark.parametrize("value", [True, [1], {"id": 1}, "9007199254740993.0", 9007199254740992.0, "1e+16", 1e300])
def test_values_that_identify_no_customer_are_refused(value, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "Age: 40", "answer": "Good", "customer_id": value}]))
    with pytest.raises(InputError, match=r"rows\.json: item 0: .*(is a text or a number, found|has lost digits)"):
        read_rows(path, TASK)


def test_a_csv_and_json_of_the_same_data_have_the_same_customers(tmp_path):
    """As pandas writes whole numbers next to missing ones: with .0, and the missing ones empty."""
    ids = [*range(1000, 1040), None]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        for name in ids:
            cell = "" if name is None else f"{float(name)}"
            writer.writerow(["1", cell, "May", "40", "Lawyer", "50000", "Good", "1", "2", "x"])
    question = CREDIT_TEXT.replace("23.0", "40")
    listed = [{"question": question, "answer": "Good", "customer_id": name} for name in ids]
    (tmp_path / "b.json").write_text(json.dumps(listed))
    of_csv, of_json = ([row.customer for row in read_rows(tmp_path / name, TASK)[0]] for name in ("a.csv", "b.json"))
    assert of_csv[:-1] == of_json[:-1] == [str(name) for name in ids[:-1]]


@pytest.mark.parametrize(
    "name", ["Credit_Mix", "Customer_ID", " Customer_ID", "customer_id", "\ufeffCredit_Mix", "Age"]
)
def test_a_column_that_occurs_twice_is_refused(tmp_path, name):
    path = tmp_path / "rows.csv"
    path.write_text("".join(f"{line},{extra}\n" for line, extra in zip(CSV_LINES, (name, *"abcd"), strict=True)))
    with pytest.raises(InputError, match=r"rows\.csv: column (Credit_Mix|Customer_ID|Age) occurs twice"):
        read_rows(path, TASK)


@pytest.mark.parametrize("name", ["list.json", "rows.jsonl"])
def test_a_name_that_an_object_has_twice_is_refused(tmp_path, name):
    row = '{"question": "Age: 40", "answer": "Good", "customer_id": "1", "customer_id": "2"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "list.json" else row)
    with pytest.raises(InputError, match=r'"customer_id" occurs twice in one object'):
        read_rows(tmp_path / name, TASK)


def test_csv_with_an_odd_row_keeps_the_fields_apart(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\n".join([CSV_LINES[0], CSV_LINES[3]]) + "\n")
    rows, notes = read_rows(path, TASK)
    assert rows[0].features == (
        "Age: Unknown, Occupation: Doctor, retired, Annual Income: Unknown, Outstanding Debt: Unknown, "
        "Credit Utilization Ratio: Unknown, Payment Behaviour: Low_spent_Small_value_payments"
    )
    assert notes["Annual Income: outside 0..1,000,000 -> Unknown"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", HEADER.replace(",Credit_Mix", "") + "\n1,2\n", r"x\.csv: column Credit_Mix missing; found ID, Cust"),
        ("x.csv", "\n".join([HEADER, "1,2,3"]), r"x\.csv: row 2 has another number of cells than the header"),
        ("x.csv", "", r"x\.csv: empty; a header with Age, .*Customer_ID is needed"),
        ("x.csv", HEADER + "\n", r"x\.csv: no labelled rows"),
        ("x.json", "[{", r"x\.json: not a JSON list"),
        ("x.json", "[]", r"x\.json: no labelled rows"),
        ("x.json", '[{"question": "a"}]', r'x\.json: item 0 needs "question" and "answer" as strings, found'),
        ("x.json", "[5]", r"x\.json: item 0 needs"),
        ("x.jsonl", jsonl(RAW[:2]) + "{oops\n", r"x\.jsonl: line 3 is not JSON"),
        ("x.jsonl", jsonl(RAW[:1]) + "[1]\n", r"x\.jsonl: line 2 is list, not an object"),
        ("x.jsonl", jsonl(RAW[:1]) + '\n{"question": "a"}\n', r'x\.jsonl: line 3 needs "answer" .*found'),
        ("x.jsonl", "", r"x\.jsonl: no rows; one JSON object a line with question, answer is expected"),
        (
            "x.jsonl",
            jsonl([RAW[0] | {"answer": "Fair"}]),
            r"unknown label 'Fair' \(1\); expected Good, Standard, Bad or _",
        ),
        ("x.json", '[{"Age": 3}, 5]', r'x\.json: item 0 needs "question" and "answer" as strings, found'),
        (
            "x.json",
            '[{"Age": 3, "Credit_Mix": "Good"}]',
            r"x\.json: column Occupation, .* missing; found Age, Credit_Mix",
        ),
    ],
)
def test_bad_raw_files_are_refused_by_name_and_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name, TASK)


def test_balanced_sample_has_no_repeats_and_follows_the_seed():
    rows = labelled_rows()
    sample = balanced_sample(rows, TASK.labels, 20, 0)
    assert Counter(row.label for row in sample) == dict.fromkeys(TASK.labels, 20)
    assert len(set(sample)) == 60 and set(sample) <= set(rows)
    assert sample == balanced_sample(rows, TASK.labels, 20, 0) != balanced_sample(rows, TASK.labels, 20, 1)
    with pytest.raises(InputError, match="100000 rows a class requested, but only"):
        balanced_sample(rows, TASK.labels, 100_000, 0)


# ------------------------------------------------------------------------------------------ tables as people have them


def changed(lines: list[str], **cells: str) -> str:
    """Return a CSV's text with other cells in its second line."""
    header, first, *rest = (line.split(",") for line in lines)
    first = [cells.get(name, cell) for name, cell in zip(header, first, strict=True)]
    return "".join(",".join(cells) + "\n" for cells in (header, first, *rest))


SPELLINGS = {
    "semicolons and decimal commas": lambda text: text.replace(",", ";").replace(".", ","),
    "tabs": lambda text: text.replace(",", "\t"),
    "a sep= line": lambda text: "sep=|\r\n" + text.replace(",", "|"),
    "a header in capitals": lambda text: text.upper().split("\n")[0] + text[text.index("\n") :],
    "a header with blanks": lambda text: text.split("\n")[0].replace("_", " ") + text[text.index("\n") :],
    "blanks around names": lambda text: text.replace(",Age,", ", age ,", 1),
    "a name nearly as ours": lambda text: text.replace("Payment_Behaviour", "PaymentBehavior"),
    "labels in small letters": lambda text: text.replace("Good", "good"),
    "nan for an unknown label": lambda text: text.replace(",_,", ",NaN,"),
    "no unknown label": lambda text: text.replace(",_,", ",,"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_csv_as_people_have_it_gives_the_same_rows(tmp_path, kind, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes(SPELLINGS[kind]("\n".join(CSV_LINES[:3]) + "\n").encode(encoding))
    assert [(row.customer, row.label, row.features) for row in read_rows(path, TASK)[0]] == CSV_READ


def test_flat_objects_give_the_same_rows(tmp_path):
    names, *rows = (line.split(",") for line in CSV_LINES[:3])
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    objects[0] |= {"Age": 23, "Annual_Income": 19114.12, "Outstanding_Debt": 809.98, "Credit_Mix": None}
    (tmp_path / "rows.json").write_text(json.dumps(objects))
    (tmp_path / "rows.jsonl").write_text(jsonl(objects))
    for name in ("rows.json", "rows.jsonl"):
        rows, _ = read_rows(tmp_path / name, TASK)
        assert [(row.customer, row.label, row.features) for row in rows] == CSV_READ


def test_decimal_settles_what_a_column_leaves_open(tmp_path):
    (tmp_path / "x.csv").write_text(changed(CSV_LINES[:2], Annual_Income="19.114", Credit_Mix="Good"))
    with pytest.raises(InputError, match=r'x\.csv: row 2, column Annual_Income: "19.114" has two readings'):
        read_rows(tmp_path / "x.csv", TASK)
    for decimal, value in ((",", "19100"), (".", "19")):
        assert f"Annual Income: {value}, " in read_rows(tmp_path / "x.csv", TASK, decimal)[0][0].features


def test_unknown_labels_are_listed_with_their_counts(tmp_path):
    lines = [HEADER, *(CSV_LINES[1].replace(",_,", f",{label},") for label in ("Poor", "good", "Fair", "Poor"))]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    with pytest.raises(
        InputError, match=r"unknown label 'Poor' \(2\), 'Fair' \(1\); expected Good, Standard, Bad or _"
    ):
        read_rows(tmp_path / "x.csv", TASK)


@pytest.mark.parametrize("name", ["1.23457E+11", "1.2e+11", "1E+12", '"1,23457E+11"'])
def test_ids_that_a_spreadsheet_shortened_are_refused(tmp_path, name):
    (tmp_path / "x.csv").write_text(changed(CSV_LINES, Customer_ID=name))
    with pytest.raises(InputError, match=r"x\.csv: row 2: the customer id .* has lost digits in a spreadsheet"):
        read_rows(tmp_path / "x.csv", TASK)


def test_equal_rows_are_counted(tmp_path):
    (tmp_path / "x.csv").write_text("\n".join([*CSV_LINES[:3], CSV_LINES[2], CSV_LINES[2]]))
    rows, notes = read_rows(tmp_path / "x.csv", TASK)
    assert len(rows) == 4 and notes["row equal to an earlier one in all columns: kept"] == 2


NAMES = {
    "Payment Behavior": "Payment Behaviour",
    "AnnualIncome": "Annual Income",
    "credit utilisation ratio": "Credit Utilization Ratio",
    "Annual_Income": "Annual Income",
    "OUTSTANDING-DEBT": "Outstanding Debt",
}


@pytest.mark.parametrize(("written", "field"), NAMES.items(), ids=NAMES)
def test_a_name_that_is_nearly_a_field_is_taken_as_it(written, field):
    value = "35" if field in TASK.by_name else "Low_spent"
    text = TASK.canonical(f"{written}: {value}", notes := Counter())
    assert f"{field}: {value}" in text and text.count(":") == 6
    letters_differ = field in ("Payment Behaviour", "Credit Utilization Ratio")
    assert list(notes) == [f"{written}: taken as {field}"] * letters_differ == TASK.doubts(notes)


def test_a_name_that_is_nearly_a_field_is_another_next_to_that_field():
    text = TASK.canonical("Payment Behavior: Low, Payment Behaviour: High, Age: 23", notes := Counter())
    assert "Payment Behaviour: High" in text and text.endswith(", Payment Behavior: Low")
    assert [note.split(" is not a field")[0] for note in TASK.doubts(notes)] == ["Payment Behavior"]


@pytest.mark.parametrize(
    ("written", "read", "doubt"),
    [
        ("809,981", "810000", "a comma before three digits is read as mark of thousands"),
        ("$1,234", "1230", "a comma before three digits is read as mark of thousands"),
        ("1,234.50", "1230", None),
        ("0,123", "Unknown", "not a number"),
        ("123,45", "Unknown", "not a number"),
        ("1234,567", "Unknown", "not a number"),
    ],
)
def test_a_comma_in_a_number_of_one_request_is_noted_where_it_has_two_readings(written, read, doubt):
    text = TASK.canonical(TASK.features({"Age": 23, "Annual Income": written}), notes := Counter())
    assert f"Annual Income: {read}," in text
    assert [one.startswith(f"Annual Income: {doubt}") for one in TASK.doubts(notes)] == [True] * bool(doubt)


@pytest.mark.parametrize("cell", ["Acme, ", "Acme, , Inc", "Acme,\n, Inc", ", Acme", "Acme; "])
def test_commas_in_a_cell_of_words_leave_its_row_a_row(cell):
    text = TASK.canonical(TASK.features({"Occupation": cell, "Age": 23}))
    assert text.startswith("Age: 23, Occupation:") and "Acme" in text and text.count(": Unknown") == 4


def test_a_number_marked_as_missing_is_found_in_other_spellings():
    task = task_of(TASK.record | {"missing": ["-1", "999"]}, "t")
    for value in (-1, "-1", "-1.0", "999", 999.0, "$999"):
        assert task.clean_value("Outstanding Debt", cell_text(value)) == "Unknown"
    assert task.clean_value("Occupation", "999") == "Unknown" and task.clean_value("Occupation", "999.0") == "999.0"


def test_a_name_that_would_begin_another_field_is_refused():
    with pytest.raises(InputError, match=r"^Income \(EUR, net\): a field's name has no comma"):
        TASK.features({"Occupation": "Lawyer", "Income (EUR, net)": 5})


def test_a_name_that_is_no_field_is_noted():
    text = TASK.canonical("Age: 23, Wage: 19114, Town: Rome", notes := Counter())
    assert text.endswith("Payment Behaviour: Unknown, Wage: 19100, Town: Rome")
    assert [note.split(" is not a field (Age, ")[0] for note in TASK.doubts(notes)] == ["Wage", "Town"]


@pytest.mark.parametrize(
    "text", ["Age: 23, Occupation: Lawyer, Age: 50", "AnnualIncome: 1, Annual Income: 2", "a: 1; a: 2"]
)
def test_a_field_that_is_there_twice_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"^(Age|Annual Income|a) occurs twice in one feature string"):
        TASK.canonical(text)
    (tmp_path / "x.json").write_text(json.dumps([{"question": text, "answer": "Good"}]))
    with pytest.raises(InputError, match=r"x\.json: item 0: .* occurs twice in one feature string"):
        read_rows(tmp_path / "x.json", TASK)
