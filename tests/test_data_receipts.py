"""Synthetic receipts: every value can be read, the total is what the sums say, and idp_prepare.py takes the file."""

from __future__ import annotations

import json
import re

import pytest
from jsonschema import Draft202012Validator

import idp_prepare
from common import InputError
from data import make_receipts
from distil.files import read_json
from distil.idp.values import occurs_in
from distil.testing import ROOT

SCHEMA = ROOT / "data" / "receipt_schema.json"


@pytest.fixture(scope="module")
def receipts(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("receipts")
    assert make_receipts.main(["--outdir", str(folder), "--receipts", "600"]) == 0
    return [json.loads(line) for line in (folder / "receipts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_fit_the_schema_and_stand_in_their_documents(receipts):
    validator = Draft202012Validator(read_json(SCHEMA))
    for row in receipts:
        document, answer = row["document"], row["expected"]
        assert validator.is_valid(answer), answer
        assert all(occurs_in(name, value, document) for name, value in answer.items()), row
        assert f"{answer['total']:.2f}" in document and answer["date"] in document
        assert answer["address"] in document.replace("\n", " ") and answer["company"] in document.replace("\n", " ")
    assert len({row["expected"]["company"] for row in receipts}) >= 480


def test_the_total_is_hidden_among_sums_and_values_run_over_lines(receipts):
    """As in real receipts: another sum is the largest in many, addresses have two lines or more, dates many forms."""
    larger, lines, forms = 0, 0, set()
    for row in receipts:
        sums = [float(text) for text in re.findall(r"(?m)(?<![\d.])\d+\.\d\d$", row["document"])]
        larger += max(sums) > row["expected"]["total"]
        lines += row["expected"]["address"] not in row["document"]
        forms.add(re.sub(r"\d", "9", re.sub(r"[A-Z]+", "MON", row["expected"]["date"])))
    assert larger >= 150 and lines >= 570 and len(forms) >= 11


def test_prepared_rows_keep_companies_apart(receipts, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    make_receipts.main(["--outdir", str(folder), "--receipts", "60"])
    flags = ["--src", str(folder / "receipts.jsonl"), "--schema", str(SCHEMA), "--group", "company"]
    idp_prepare.main([*flags, "--outdir", str(tmp_path / "out")])
    rows = {p.name: [json.loads(line) for line in p.open(encoding="utf-8")] for p in tmp_path.glob("out/*.jsonl")}
    train = {json.loads(row["output"])["company"] for row in rows["idp_sft.jsonl"]}
    assert train and not train & {row["expected"]["company"] for row in rows["idp_validation.jsonl"]}


def test_same_seed_same_bytes(tmp_path):
    def written(name: str, seed: str) -> bytes:
        (tmp_path / name).mkdir()
        make_receipts.main(["--outdir", str(tmp_path / name), "--receipts", "20", "--seed", seed])
        return (tmp_path / name / "receipts.jsonl").read_bytes()

    assert written("a", "0") == written("b", "0") != written("c", "1")


@pytest.mark.parametrize("flags", [["--receipts", "0", "--outdir", "."], ["--outdir", "no/such/folder"]])
def test_bad_flags(flags):
    with pytest.raises(InputError, match=re.escape(" ".join(flags[:2]))):
        make_receipts.main(flags)
