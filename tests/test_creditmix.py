"""CreditMix data: canonical text, reading of the three raw formats, splits by customer, prepared training files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import creditmix
import creditmix_prepare
from conftest import ROOT, credit_rows
from creditmix import (
    CREDIT_FIELDS,
    LABELS,
    UNKNOWN,
    CreditRow,
    balanced_sample,
    canonical_features,
    canonical_number,
    clean_field,
    creditmix_prompt,
    gold_known,
    null_prompts,
    read_creditmix,
    tabular_features,
    tabular_teacher,
)
from eval_creditmix import baselines, draw, draw_samples, usable
from files import InputError, read_jsonl, split_of, write_jsonl

# ---------------------------------------------------------------------------------------------------- canonical text


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
    assert clean_field(field, value) == expected
    assert clean_field(field, expected) == expected


WHITEPAPER = (
    "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98, Credit Utilization Ratio: "
    "35.03, Payment Behaviour: Low_spent_Small_value_payments"
)
CANONICAL = (
    "Age: 23, Occupation: Scientist, Annual Income: 19100, Outstanding Debt: 810, Credit Utilization Ratio: 35, "
    "Payment Behaviour: Low_spent_Small_value_payments"
)
ONLY_AGE = (
    "Age: 30, Occupation: Unknown, Annual Income: Unknown, Outstanding Debt: Unknown, "
    "Credit Utilization Ratio: Unknown, Payment Behaviour: Unknown"
)
FEATURES = {
    "the whitepaper's example": (WHITEPAPER, CANONICAL),
    "canonical already": (CANONICAL, CANONICAL),
    "another order": (", ".join(reversed(WHITEPAPER.split(", "))), CANONICAL),
    "lines instead of commas": (WHITEPAPER.replace(", ", "\n"), CANONICAL),
    "semicolons": (WHITEPAPER.replace(", ", "; "), CANONICAL),
    "no space after commas": (WHITEPAPER.replace(", ", ","), CANONICAL),
    "a full stop at the end": (WHITEPAPER + ".", CANONICAL),
    "names of the CSV": (WHITEPAPER.replace("Annual Income", "Annual_Income"), CANONICAL),
    "small letters in names": (WHITEPAPER.replace("Credit Utilization Ratio", "credit utilization ratio"), CANONICAL),
    "thousands commas": (WHITEPAPER.replace("19114.12", "19,114.12"), CANONICAL),
    "stray underscores": (WHITEPAPER.replace("809.98", "809.98_").replace("23.0", "23_"), CANONICAL),
    "missing fields": ("Age: 30", ONLY_AGE),
    "empty cells": ("Age: 30, Occupation: , Annual Income: ", ONLY_AGE),
    "marks for missing": ("Age: 30, Occupation: _______, Payment Behaviour: !@9#%8, Outstanding Debt: _", ONLY_AGE),
    "impossible values": ("Age: 30, Credit Utilization Ratio: -500, Annual Income: 8000000", ONLY_AGE),
    "further fields stay behind": ("Month: May, Age: 30.0, Cards: 4.0", ONLY_AGE + ", Month: May, Cards: 4"),
    "other fields alone": ("Income: 19114.12, Town: Rome", "Income: 19100, Town: Rome"),
    "free text": ("earns 19,114.12 a year, owes 809.98", "earns 19100 a year, owes 810"),
    "free text without numbers": ("a careful customer", "a careful customer"),
    "free text with an endless number": ("owes 1e999 and 12.34", "owes 1e999 and 12"),
    "free text with digits that are no number": ("owes 12,53,000 or 2.5.1", "owes 12,53,000 or 2.5.1"),
    "a mark alone": ("...", "..."),
    "a comma in a field of words": (
        WHITEPAPER.replace("Scientist", "Scientist, retired"),
        CANONICAL.replace("Scientist", "Scientist, retired"),
    ),
    "words behind a number": ("Age: 23.0, a careful customer", "Age: 23, a careful customer"),
}


@pytest.mark.parametrize(("text", "expected"), FEATURES.values(), ids=FEATURES)
def test_canonical_features(text, expected):
    assert canonical_features(text) == expected
    assert canonical_features(expected) == expected


def test_canonical_features_are_idempotent_on_damaged_rows():
    for row in credit_rows(customers=150, months=2, seed=7):
        once = canonical_features(row["question"])
        assert canonical_features(once) == once
        assert [part.split(":")[0] for part in once.split(", ")] == list(CREDIT_FIELDS)


def test_prompts_say_the_canonical_text_whatever_the_caller_gave():
    assert creditmix_prompt(WHITEPAPER) == creditmix_prompt(CANONICAL)
    assert creditmix_prompt(WHITEPAPER).endswith("\n" + CANONICAL)


def test_null_prompts_differ_and_their_number_is_checked():
    assert len(null_prompts()) == len(set(null_prompts())) == 7
    assert null_prompts()[5].endswith("\n" + ", ".join(f"{field}: -" for field in CREDIT_FIELDS))  # as they stand
    assert null_prompts(2) == null_prompts()[:2]
    for count in (0, -1, 8):
        with pytest.raises(InputError, match="--null_prompts"):
            null_prompts(count)


# ------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_shares_of_the_split(seed):
    counts = Counter(split_of(f"CUS_{number}", seed) for number in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.6, abs=0.015)
    assert counts["calibration"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.3, abs=0.015)


def test_the_split_depends_on_customer_and_split_seed_alone():
    names = [f"CUS_{number}" for number in range(500)]
    first = [split_of(name, 0) for name in names]
    assert first == [split_of(name) for name in names]
    assert sum(a != b for a, b in zip(first, (split_of(name, 1) for name in names), strict=True)) > 100


def labelled(customers: int = 400) -> list[CreditRow]:
    """Rows of customers with one to three months each."""
    return [
        CreditRow(f"C{number}", f"Age: {18 + number % 60}, Month: {month}", LABELS[number % 3])
        for number in range(customers)
        for month in range(1 + number % 3)
    ]


@pytest.mark.parametrize("split_seed", range(5))
@pytest.mark.parametrize("seed", [0, 3])
def test_validation_fit_and_training_rows_share_no_customer(split_seed, seed):
    args = Namespace(split_seed=split_seed, seed=seed, data="x", gold_share=1)
    rows = labelled()
    customers = {}
    for split in ("train", "calibration", "validation"):
        drawn = draw(rows, split, None, args)
        assert len({Counter(row.label for row in drawn)[label] for label in LABELS}) == 1
        customers[split] = {row.customer for row in drawn}
        assert all(split_of(name, split_seed) == split for name in customers[split])
    training = {row.customer for row in rows if split_of(row.customer, split_seed) == "train"}  # drawn or not
    assert not training & (customers["calibration"] | customers["validation"])
    assert not customers["calibration"] & customers["validation"]


@pytest.mark.parametrize("fit_per_class", [5, 300])
@pytest.mark.parametrize("how", [{"val_per_class": 10}, {"val_frac": 0.1}, {}])
def test_what_eval_draws_comes_from_the_split_it_is_for(fit_per_class, how):
    """The capped calibration rows and the baselines' training rows too."""
    flags = {"val_per_class": None, "val_frac": None, "fit": True, "baselines": True} | how
    args = Namespace(split_seed=0, seed=0, data="x", gold_share=1, fit_per_class=fit_per_class, **flags)
    drawn = dict(zip(("validation", "calibration", "train"), draw_samples(labelled(), args), strict=True))
    for split, rows in drawn.items():
        assert rows and {split_of(row.customer) for row in rows} == {split}
    assert len(drawn["calibration"]) <= 3 * fit_per_class
    flags |= {"fit": False, "baselines": False}
    args = Namespace(split_seed=0, seed=0, data="x", gold_share=1, fit_per_class=5, **flags)
    _, *unasked = draw_samples(labelled(), args)
    assert unasked == [[], []]


def test_a_share_of_the_gold_labels_binds_all_but_validation():
    """A larger share has the customers of a smaller one, so that scripts and runs can be compared."""
    flags = {"val_per_class": None, "val_frac": None, "fit": True, "baselines": True, "fit_per_class": 300}
    seen = {}
    for share in (0.2, 0.5, 1.0):
        args = Namespace(split_seed=0, seed=0, data="x", gold_share=share, **flags)
        validation, *others = draw_samples(labelled(), args)
        assert validation == draw(labelled(), "validation", None, Namespace(**vars(args) | {"gold_share": 1.0}))
        assert all(gold_known(row, args) for rows in others for row in rows)
        seen[share] = {row.customer for row in labelled() if gold_known(row, args)}
    assert seen[0.2] < seen[0.5] < seen[1.0] and 40 < len(seen[0.2]) < 120


def test_a_split_without_rows_of_a_label_is_refused():
    rows = [row for row in labelled() if row.label != "Bad"]
    for per_class in (None, 5):
        with pytest.raises(InputError, match=r"x: validation rows: .* only 0 are Bad"):
            draw(rows, "validation", per_class, Namespace(split_seed=0, seed=0, data="x", gold_share=1))


def test_balanced_sample_is_balanced_without_repeats_and_follows_the_seed():
    rows = labelled()
    sample = balanced_sample(rows, 20, 0)
    assert Counter(row.label for row in sample) == dict.fromkeys(LABELS, 20)
    assert len(set(sample)) == 60 and set(sample) <= set(rows)
    assert sample == balanced_sample(rows, 20, 0) != balanced_sample(rows, 20, 1)
    with pytest.raises(InputError, match="100000 rows a class asked for, but only"):
        balanced_sample(rows, 100_000, 0)


# ----------------------------------------------------------------------------------------------------------- raw files

RAW = [
    {"question": WHITEPAPER, "answer": "Good", "customer_id": "A"},
    {"question": WHITEPAPER.replace("23.0", "-500"), "answer": "_", "customer_id": "A"},  # filled: A is Good
    {"question": WHITEPAPER, "answer": "Standard", "customer_id": "B"},
    {"question": WHITEPAPER, "answer": "Bad", "customer_id": "B"},
    {"question": WHITEPAPER, "answer": "_", "customer_id": "B"},  # dropped: B is Standard and Bad
    {"question": WHITEPAPER, "answer": "_", "customer_id": "D"},  # dropped: nothing known of D
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
    rows, notes = read_creditmix(tmp_path / name)
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
    rows, notes = read_creditmix(path)
    assert [(row.customer, row.label, row.features) for row in rows] == CSV_READ
    assert notes["Annual Income: stray _ removed"] == notes["Outstanding Debt: stray _ removed"] == 1


def test_csv_cells_with_commas_and_line_ends(tmp_path):
    """A comma in a quoted cell belongs to the value; so does a line end, whatever the value is then good for."""
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        writer.writerow(["1", "CUS_1", "May", "40", "Lawyer", "50,000.7", "Good", "1", "2", "High\u2028spent"])
        writer.writerow(["2", "CUS_2", "May", "41", "Lawyer", "60000", "Bad", "1", "2", "x"])
    rows, _ = read_creditmix(path)
    assert [row.label for row in rows] == ["Good", "Bad"]
    assert "Age: 40, Occupation: Lawyer, Annual Income: 50000, " in rows[0].features
    assert rows[0].features.endswith("Payment Behaviour: High\u2028spent")


def test_csv_cells_cannot_become_other_fields(tmp_path):
    path = tmp_path / "train.csv"
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER.split(","))
        writer.writerow(["1", "CUS_1", "May", "40", "A: b, Age: 99", "50000", "Good", "1", "2", "x; Age: 98\nAge: 97"])
    (row,), _ = read_creditmix(path)
    assert "Age: 40, Occupation: A b, Age 99, Annual Income: 50000, " in row.features.replace("  ", " ")


def test_one_customer_is_spelt_one_way(tmp_path):
    """Else months of one customer would be on two sides of the split."""
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
        assert {row.customer for row in read_creditmix(path)[0]} == {"17"}


def test_more_words_than_gradient_boosting_takes():
    features = [canonical_features(f"Age: 30, Occupation: job{i % 400}") for i in range(900)]
    assert len(tabular_features(features)["Occupation"].cat.categories) == 201


def test_csv_with_an_odd_row_keeps_the_fields_apart(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\n".join([CSV_LINES[0], CSV_LINES[3]]) + "\n")
    rows, notes = read_creditmix(path)
    assert rows[0].features == (
        "Age: Unknown, Occupation: Doctor, retired, Annual Income: Unknown, Outstanding Debt: Unknown, "
        "Credit Utilization Ratio: Unknown, Payment Behaviour: Low_spent_Small_value_payments"
    )
    assert notes["Annual Income: outside 0..1e+06 -> Unknown"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", HEADER.replace(",Credit_Mix", "") + "\n1,2\n", r"x\.csv: column Credit_Mix missing; found ID, Cust"),
        ("x.csv", "\n".join([HEADER, "1,2,3"]), r"x\.csv: line 2 has another number of cells than the header"),
        ("x.csv", "", r"x\.csv: column Age, .* missing"),
        ("x.csv", HEADER + "\n", r"x\.csv: no labelled rows"),
        ("x.json", "[{", r"x\.json: not a JSON list"),
        ("x.json", "[]", r"x\.json: no labelled rows"),
        ("x.json", '[{"question": "a"}]', r'x\.json: item 0 needs "question" and "answer" as strings, found'),
        ("x.json", "[5]", r"x\.json: item 0 needs"),
        ("x.jsonl", jsonl(RAW[:2]) + "{oops\n", r"x\.jsonl: line 3 is not JSON"),
        ("x.jsonl", jsonl(RAW[:1]) + "[1]\n", r"x\.jsonl: line 2 is list, not an object"),
        ("x.jsonl", jsonl(RAW[:1]) + '\n{"question": "a"}\n', r'x\.jsonl: line 3 needs "answer" .*found'),
        ("x.jsonl", "", r"x\.jsonl: no rows; one JSON object a line with question, answer is expected"),
        ("x.jsonl", jsonl([RAW[0] | {"answer": "Fair"}]), r"unknown label 'Fair'; expected Good, Standard, Bad or _"),
    ],
)
def test_bad_raw_files_are_refused_by_name_and_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_creditmix(tmp_path / name)


def test_a_raw_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("\n".join(CSV_LINES).replace("Lawyer", "Bäcker").encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.csv: cannot be read as UTF-8 text"):
        read_creditmix(path)


def test_jsonl_keeps_every_character(tmp_path):
    """Some Unicode marks count as line ends in Python's splitlines, but not in JSONL."""
    rows = [{"input": "a\u2028b\u0085c\u2029d\x0ce\rf\ng", "output": "\U0001f600"}] * 2
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl", ("input", "output")) == rows


# ------------------------------------------------------------------------------------------------------------- prepare


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"creditmix_{name}.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, credit_file) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(folder)]) == 0
    return folder


def test_prepare_writes_three_files_in_the_trainers_formats(prepared):
    names = [f"creditmix_{name}" for name in ("dpo.jsonl", "kd.jsonl", "prepared.json", "sft.jsonl")]
    assert sorted(digests(prepared)) == names
    sft, kd, dpo = (read(prepared, name) for name in ("sft", "kd", "dpo"))
    assert len(sft) == len(kd) == len(dpo) > 60
    for a, b, c in zip(sft, kd, dpo, strict=True):
        assert list(a) == ["input", "output"] and a["output"] in LABELS
        assert b == {"input": a["input"], "teacher_output": a["output"], "label_probs": b["label_probs"]}
        assert list(b["label_probs"]) == list(LABELS)
        assert sum(b["label_probs"].values()) == pytest.approx(1, abs=2e-4)
        assert min(b["label_probs"].values()) >= 0
        assert c == {"prompt": a["input"], "chosen": a["output"], "rejected": c["rejected"]}
        assert creditmix_prompt(a["input"].partition("\n")[2]) == a["input"]  # canonical already


def test_the_teacher_is_held_against_the_gold_labels_before_a_training(prepared):
    rows, note = read(prepared, "kd"), json.loads((prepared / "creditmix_prepared.json").read_text())
    right = [max(row["label_probs"], key=row["label_probs"].get) == row["teacher_output"] for row in rows]
    assert note["teacher"]["teacher"] == pytest.approx(np.mean(right)) and note["teacher"]["rows"] == len(rows)
    assert note["teacher"]["majority"] == pytest.approx(1 / 3) and 0 < note["teacher"]["logistic regression"] < 1


def test_prepared_rows_are_balanced(prepared):
    counts = Counter(row["output"] for row in read(prepared, "sft"))
    assert set(counts) == set(LABELS) and len(set(counts.values())) == 1


def test_prepare_writes_training_customers_only(prepared, credit_file):
    """Customers are traced through the raw file: every text that was written is one of a training customer."""
    owners: dict[str, set[str]] = {}
    for row in json.loads(Path(credit_file).read_text()):
        owners.setdefault(creditmix_prompt(row["question"]), set()).add(row["customer_id"])
    written = {row["input"] for row in read(prepared, "sft")}
    assert written <= set(owners)
    assert all(len(names) == 1 for names in owners.values())  # the texts identify customers in this file
    customers = {name for text in written for name in owners[text]}
    assert {split_of(name) for name in customers} == {"train"}
    rows, _ = read_creditmix(credit_file)
    for split in ("validation", "calibration"):
        held_out = draw(rows, split, None, Namespace(split_seed=0, seed=0, data=credit_file, gold_share=1))
        assert not customers & {row.customer for row in held_out}
        assert not written & {creditmix_prompt(row.features) for row in held_out}


def test_another_split_seed_writes_other_customers(tmp_path, prepared, credit_file):
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--split_seed", "1"]) == 0
    mine, other = ({row["input"] for row in read(folder, "sft")} for folder in (prepared, tmp_path))
    assert mine - other and other - mine


def test_rejected_is_the_more_plausible_wrong_label(prepared):
    """Under the KD row's own probabilities, which cross-fitting made without the row's customer."""
    seen = set()
    for pair, row in zip(read(prepared, "dpo"), read(prepared, "kd"), strict=True):
        assert pair["rejected"] in LABELS and pair["rejected"] != pair["chosen"]
        (other,) = set(LABELS) - {pair["chosen"], pair["rejected"]}
        assert row["label_probs"][pair["rejected"]] >= row["label_probs"][other]
        seen.add((pair["chosen"], pair["rejected"]))
    assert {("Good", "Standard"), ("Bad", "Standard")} <= seen


def test_probabilities_come_from_models_that_never_saw_the_customer():
    """Features say nothing of the answer here, so only a model that saw the customer could know it."""
    rng = np.random.default_rng(0)
    rows = [
        CreditRow(f"C{number}", f"Age: {18 + number % 80}, Annual Income: {1000 * (number + 1)}", label)
        for number, label in enumerate(rng.choice(LABELS, 300))
        for _ in range(2)
    ]
    probabilities = tabular_teacher(rows, [True] * len(rows), 0)
    right = np.mean([LABELS[p.argmax()] == row.label for p, row in zip(probabilities, rows, strict=True)])
    assert probabilities.shape == (600, 3)
    assert right < 0.45


def test_the_teacher_weighs_each_label_the_same():
    """Features say nothing here, so what a row is given are the weights of the labels, and not their shares."""
    rng = np.random.default_rng(0)
    labels = rng.choice(LABELS, 400, p=[0.15, 0.7, 0.15])
    rows = [CreditRow(f"C{n}", f"Age: {18 + n % 7}", label) for n, label in enumerate(labels)]
    known = np.arange(len(rows)) % 4 > 0  # the others are answered by the model of all known rows
    means = [tabular_teacher(rows, known, 0)[part].mean(axis=0) for part in (known, ~known)]
    assert np.abs(np.array(means) - 1 / 3).max() < 0.08


def test_few_labels_take_a_teacher_that_gives_way_less():
    """Of the settings the one whose cross-fitted likelihood is best: with few noisy labels not the published one."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 400)
    features = [f"Age: {rng.integers(18, 80)}, Outstanding Debt: {500 * a + rng.integers(0, 3000)}" for a in answers]
    frame, groups, weights = creditmix.tabular_features(features), [str(n // 2) for n in range(400)], np.ones(400)
    model, probabilities = creditmix.chosen_boosting(frame, answers, groups, weights, 0)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    with threadpool_limits(1):
        published = cross_val_predict(
            creditmix.gradient_boosting(0), frame, answers, groups=groups, cv=folds, method="predict_proba"
        )
    assert model.max_leaf_nodes < 15
    assert log_loss(answers, probabilities) < log_loss(answers, published) - 0.1


def test_the_evaluations_teacher_is_the_one_that_labels_kd_rows(credit_file):
    """Of all training rows whose labels may be used, not only of the balanced ones that the other baselines have."""
    args = Namespace(split_seed=0, seed=0, data=credit_file, gold_share=0.5, bootstrap=10)
    args.class_shares = args.abstain_below = None
    rows, _ = read_creditmix(credit_file)
    train, validation = draw(rows, "train", None, args), draw(rows, "validation", None, args)
    pool = [row for row in rows if split_of(row.customer) == "train" and gold_known(row, args)]
    assert len(pool) > len(train)
    found = {result["model"]: result for result in baselines(train, usable(rows, "train", args), validation, args)}
    labelled_by = tabular_teacher([*validation, *pool], [False] * len(validation) + [True] * len(pool), 0)
    assert found["tabular teacher"]["probabilities"] == pytest.approx(labelled_by[: len(validation)], abs=1e-6)


def test_the_gates_regression_never_sees_the_customer():
    """Each customer has an occupation of its own and random labels, the same in all its rows."""
    labels = np.random.default_rng(0).choice(LABELS, 90)
    rows = [(f"Age: 30, Occupation: Job {n}, Annual Income: 5{n}0", label) for n, label in enumerate(labels)] * 4
    found = creditmix.simple_baselines([f"Classify\n{text}" for text, _ in rows], [label for _, label in rows])
    assert found["logistic regression"] < 0.5


@pytest.mark.parametrize("split_seed", [0, 1])
def test_the_embedded_rows_are_as_hard_as_the_real_ones(split_seed):
    """Gradient boosting, balanced classes, other customers: 0.682 / 0.677 on the real rows (data/README.md)."""
    from sklearn.metrics import f1_score

    rows, _ = read_creditmix(str(ROOT / "data" / "creditmix_dataset.json"))
    parts = {name: [r for r in rows if split_of(r.customer, split_seed) == name] for name in ("train", "validation")}
    counts = Counter(row.label for row in parts["train"])
    train = creditmix.balanced_sample(parts["train"], min(counts.values()), 0)
    validation = creditmix.balanced_sample(parts["validation"], 1500, 0)
    frames = [creditmix.tabular_features([row.features for row in part]) for part in (train, validation)]
    model = creditmix.gradient_boosting(0).fit(frames[0], [row.label for row in train])
    predicted, truth = model.predict(frames[1]), [row.label for row in validation]
    assert np.mean(predicted == truth) == pytest.approx(0.682, abs=0.02)
    assert f1_score(truth, predicted, average="macro") == pytest.approx(0.677, abs=0.02)


def test_the_generator_makes_the_embedded_file(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "make_creditmix.py"), "--out", str(tmp_path / "made.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "made.json").read_bytes() == (ROOT / "data" / "creditmix_dataset.json").read_bytes()


def test_prepare_refuses_too_few_customers(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(credit_rows(customers=12)))
    with pytest.raises(InputError, match=r". training customers are \w+; at least 5 of each label are needed"):
        creditmix_prepare.main(["--src", str(path), "--outdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_per_class_is_kept_or_refused(tmp_path, credit_file):
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--per_class", "7"]) == 0
    assert Counter(row["output"] for row in read(tmp_path, "sft")) == dict.fromkeys(LABELS, 7)
    with pytest.raises(InputError, match="9999 rows a class asked for"):
        creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--per_class", "9999"])
    assert len(read(tmp_path, "sft")) == 21  # the files of the run before are whole


@pytest.fixture(scope="module")
def noisy_file(tmp_path_factory) -> str:
    """Customers whose debt says little, so that many Standard rows are near misses, often with equal margins."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = LABELS[number % 3]
        debt = {"Good": 1000, "Standard": 1100, "Bad": 1200}[label] + 100 * int(rng.integers(-3, 4))
        age, income = 20 + int(rng.integers(3)), 10_000 + 1000 * int(rng.integers(5))
        text = f"Age: {age}, Annual Income: {income}, Outstanding Debt: {debt}"
        rows.append({"question": text, "answer": label, "customer_id": f"C{number}"})
    path = tmp_path_factory.mktemp("noisy") / "noisy.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_near_misses_are_the_narrowest():
    rows = [CreditRow(f"C{i}", f"Age: {20 + i}", "Standard") for i in range(10)]
    # Row i is Standard with 0.5 - 0.04 i, and Good with the rest: from row 1 on a near miss, ever less near.
    probabilities = {row: np.array([0.5 + 0.04 * i, 0.5 - 0.04 * i, 0.0]) for i, row in enumerate(rows)}
    chosen = creditmix_prepare.enrich_standard(rows[:4], rows, probabilities, 0.5, 0)
    assert {row.customer for row in chosen} >= {"C1", "C2"} and len(chosen) == 4


def test_hard_standard_changes_standard_rows_only(tmp_path, noisy_file):
    common = ["--src", noisy_file, "--per_class", "30"]
    assert creditmix_prepare.main([*common, "--outdir", str(tmp_path / "plain")]) == 0
    assert creditmix_prepare.main([*common, "--outdir", str(tmp_path / "hard"), "--hard_standard", "0.5"]) == 0
    plain, hard = (read(tmp_path / name, "kd") for name in ("plain", "hard"))
    assert Counter(row["teacher_output"] for row in hard) == dict.fromkeys(LABELS, 30)

    def texts(rows, wanted):
        return sorted(row["input"] for row in rows if (row["teacher_output"] == "Standard") == wanted)

    assert texts(plain, False) == texts(hard, False)
    assert texts(plain, True) != texts(hard, True)

    def near_misses(rows):
        return sum(
            row["teacher_output"] == "Standard" and max(row["label_probs"], key=row["label_probs"].get) != "Standard"
            for row in rows
        )

    assert near_misses(hard) >= 15
    with pytest.raises(InputError, match=r"--hard_standard is a share"):
        creditmix_prepare.main([*common, "--outdir", str(tmp_path / "x"), "--hard_standard", "1.5"])


def test_a_share_of_the_gold_labels_is_all_that_is_written(tmp_path, noisy_file, capsys):
    for share in ("1", "0.5"):
        assert (
            creditmix_prepare.main(["--src", noisy_file, "--outdir", str(tmp_path / share), "--gold_share", share])
            == 0
        )
    args = Namespace(split_seed=0, gold_share=0.5)
    rows, _ = read_creditmix(noisy_file)
    allowed = {creditmix_prompt(row.features) for row in rows if gold_known(row, args)}
    whole, half = ({row["input"] for row in read(tmp_path / share, "sft")} for share in ("1", "0.5"))
    assert half <= allowed and whole - allowed and len(half) < 0.8 * len(whole)
    assert "train, with a usable label" in capsys.readouterr().out
    assert json.loads((tmp_path / "0.5" / "creditmix_prepared.json").read_text())["gold_share"] == 0.5


def test_the_same_seed_writes_the_same_bytes(tmp_path, noisy_file):
    """In processes whose string hashes differ, as those of any two runs do."""
    for name, seed, hash_seed in (("one", "0", "1"), ("two", "0", "2"), ("three", "5", "1")):
        flags = ["--src", noisy_file, "--outdir", str(tmp_path / name), "--hard_standard", "0.3", "--seed", seed]
        command = [sys.executable, str(ROOT / "creditmix_prepare.py"), *flags]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "three")


def test_a_long_run_of_blanks_costs_no_more_than_other_text():
    text = "Age: 3" + " " * 200_000 + "b"
    start = time.process_time()
    creditmix.parse_features(text)
    assert time.process_time() - start < 2  # it took minutes where the separator could begin with blanks


def test_rows_that_name_no_customer_are_said(tmp_path, credit_file, capsys):
    """One person's rows are then on both sides of the split."""
    rows = json.loads(Path(credit_file).read_text())
    for name, said in (("with", False), ("without", True)):
        src = tmp_path / f"{name}.json"
        src.write_text(json.dumps([row | ({"customer_id": None} if said else {}) for row in rows]))
        assert creditmix_prepare.main(["--src", str(src), "--outdir", str(tmp_path / name)]) == 0
        assert ("rows name no customer, each text counts as one" in capsys.readouterr().err) == said


def test_customer_zero_is_a_customer_and_ids_have_no_blanks(tmp_path):
    rows = [
        {"question": f"Age: {i + 20}", "answer": "Good", "customer_id": name}
        for i, name in enumerate([0, " C1", "C1 "])
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert [row.customer for row in read_creditmix(path)[0]] == ["0", "C1", "C1"]
