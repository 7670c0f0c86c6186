"""creditmix_prepare: training files of training customers alone, balanced, in the trainers' formats."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import read_lines

import creditmix_prepare
from common import InputError
from distil.creditmix.rows import CreditRow, read_rows
from distil.splits import is_gold, split_of
from distil.tasks import default_task
from distil.testing import ROOT, credit_rows

TASK = default_task()


def read_prepared(folder: Path, name: str) -> list[dict]:
    return read_lines(folder / f"creditmix_{name}.jsonl")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, credit_file) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(folder)]) == 0
    return folder


def test_prepare_writes_three_files_in_the_trainers_formats(prepared):
    """And a fourth to measure trainings by (tests/test_validation.py)."""
    names = [f"creditmix_{name}" for name in ("dpo.jsonl", "kd.jsonl", "prepared.json", "sft.jsonl", "val.jsonl")]
    assert sorted(digests(prepared)) == names
    sft, kd, dpo = (read_prepared(prepared, name) for name in ("sft", "kd", "dpo"))
    assert len(sft) == len(kd) == len(dpo) > 60
    for a, b, c in zip(sft, kd, dpo, strict=True):
        assert list(a) == ["input", "output"] and a["output"] in TASK.labels
        assert b == {"input": a["input"], "teacher_output": a["output"], "label_probs": b["label_probs"]}
        assert list(b["label_probs"]) == list(TASK.labels)
        assert sum(b["label_probs"].values()) == pytest.approx(1, abs=2e-4)
        assert min(b["label_probs"].values()) >= 0
        assert c == {"prompt": a["input"], "chosen": a["output"], "rejected": c["rejected"]}
        assert TASK.prompt(a["input"].partition("\n")[2]) == a["input"]  # canonical already


def test_the_teacher_is_compared_with_the_gold_labels(prepared):
    rows, note = read_prepared(prepared, "kd"), json.loads((prepared / "creditmix_prepared.json").read_text())
    right = [max(row["label_probs"], key=row["label_probs"].get) == row["teacher_output"] for row in rows]
    assert note["teacher"]["teacher"] == pytest.approx(np.mean(right)) and note["teacher"]["rows"] == len(rows)
    assert note["teacher"]["majority"] == pytest.approx(1 / 3) and 0 < note["teacher"]["logistic regression"] < 1


def test_prepared_rows_are_balanced(prepared):
    counts = Counter(row["output"] for row in read_prepared(prepared, "sft"))
    assert set(counts) == set(TASK.labels) and len(set(counts.values())) == 1


def test_prepare_writes_training_customers_only(prepared, credit_file):
    """Customers are traced through the raw file: every text that was written is one of a training customer."""
    owners: dict[str, set[str]] = {}
    for row in json.loads(Path(credit_file).read_text()):
        owners.setdefault(TASK.prompt(row["question"]), set()).add(row["customer_id"])
    written = {row["input"] for row in read_prepared(prepared, "sft")}
    assert written <= set(owners)
    assert all(len(names) == 1 for names in owners.values())  # the texts identify customers in this file
    customers = {name for text in written for name in owners[text]}
    assert {split_of(name) for name in customers} == {"train"}
    rows, _ = read_rows(credit_file, TASK)
    for split in ("validation", "calibration"):
        held_out = [row for row in rows if split_of(row.customer) == split]
        assert not customers & {row.customer for row in held_out}
        assert not written & {TASK.prompt(row.features) for row in held_out}


def test_another_split_seed_writes_other_customers(tmp_path, prepared, credit_file):
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--split_seed", "1"]) == 0
    mine, other = ({row["input"] for row in read_prepared(folder, "sft")} for folder in (prepared, tmp_path))
    assert mine - other and other - mine


def test_rejected_is_the_more_plausible_wrong_label(prepared):
    """Under the KD row's own probabilities, which cross-fitting made without the row's customer."""
    seen = set()
    for pair, row in zip(read_prepared(prepared, "dpo"), read_prepared(prepared, "kd"), strict=True):
        assert pair["rejected"] in TASK.labels and pair["rejected"] != pair["chosen"]
        (other,) = set(TASK.labels) - {pair["chosen"], pair["rejected"]}
        assert row["label_probs"][pair["rejected"]] >= row["label_probs"][other]
        seen.add((pair["chosen"], pair["rejected"]))
    assert {("Good", "Standard"), ("Bad", "Standard")} <= seen


def test_prepare_refuses_too_few_customers(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(credit_rows(customers=12)))
    with pytest.raises(InputError, match=r". training customers are \w+; at least 5 of each label are needed"):
        creditmix_prepare.main(["--src", str(path), "--outdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_per_class_is_followed_or_refused(tmp_path, credit_file):
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--per_class", "7"]) == 0
    assert Counter(row["output"] for row in read_prepared(tmp_path, "sft")) == dict.fromkeys(TASK.labels, 7)
    with pytest.raises(InputError, match="9999 rows a class requested"):
        creditmix_prepare.main(["--src", credit_file, "--outdir", str(tmp_path), "--per_class", "9999"])
    assert len(read_prepared(tmp_path, "sft")) == 21  # the files of the run before are complete


@pytest.fixture(scope="module")
def noisy_file(tmp_path_factory) -> str:
    """Write customers with uninformative debt: many Standard rows are near misses, often with equal margins."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        label = TASK.labels[number % 3]
        debt = {"Good": 1000, "Standard": 1100, "Bad": 1200}[label] + 100 * int(rng.integers(-3, 4))
        age, income = 20 + int(rng.integers(3)), 10_000 + 1000 * int(rng.integers(5))
        text = f"Age: {age}, Annual Income: {income}, Outstanding Debt: {debt}"
        rows.append({"question": text, "answer": label, "customer_id": f"C{number}"})
    path = tmp_path_factory.mktemp("noisy") / "noisy.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_near_misses_are_the_narrowest():
    rows = [CreditRow(f"C{i}", f"Age: {20 + i}", "Standard") for i in range(10)]
    # Row i is Standard with 0.5 - 0.04 i, and Good with the rest: from row 1 on a near miss, with growing margin.
    probabilities = {row: np.array([0.5 + 0.04 * i, 0.5 - 0.04 * i, 0.0]) for i, row in enumerate(rows)}
    chosen = creditmix_prepare.enrich_standard(rows[:4], rows, probabilities, TASK.labels, 0.5, 0)
    assert {row.customer for row in chosen} >= {"C1", "C2"} and len(chosen) == 4


def test_hard_standard_changes_standard_rows_only(tmp_path, noisy_file):
    common = ["--src", noisy_file, "--per_class", "30"]
    assert creditmix_prepare.main([*common, "--outdir", str(tmp_path / "plain")]) == 0
    assert creditmix_prepare.main([*common, "--outdir", str(tmp_path / "hard"), "--hard_standard", "0.5"]) == 0
    plain, hard = (read_prepared(tmp_path / name, "kd") for name in ("plain", "hard"))
    assert Counter(row["teacher_output"] for row in hard) == dict.fromkeys(TASK.labels, 30)

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


def test_only_rows_of_the_gold_share_are_written(tmp_path, noisy_file, capsys):
    for share in ("1", "0.5"):
        assert (
            creditmix_prepare.main(["--src", noisy_file, "--outdir", str(tmp_path / share), "--gold_share", share])
            == 0
        )
    rows, _ = read_rows(noisy_file, TASK)
    allowed = {TASK.prompt(row.features) for row in rows if is_gold(row.customer, 0.5, 0)}
    full, half = ({row["input"] for row in read_prepared(tmp_path / share, "sft")} for share in ("1", "0.5"))
    assert half <= allowed and full - allowed and len(half) < 0.8 * len(full)
    assert "train, with a usable label" in capsys.readouterr().out
    assert json.loads((tmp_path / "0.5" / "creditmix_prepared.json").read_text())["gold_share"] == 0.5


def test_the_same_seed_writes_the_same_bytes(tmp_path, noisy_file):
    """In processes whose string hashes differ, as those of any two runs do."""
    for name, seed, hash_seed in (("one", "0", "1"), ("two", "0", "2"), ("three", "5", "1")):
        flags = ["--src", noisy_file, "--outdir", str(tmp_path / name), "--hard_standard", "0.3", "--seed", seed]
        command = [sys.executable, str(ROOT / "creditmix_prepare.py"), *flags]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "three")


def test_rows_that_name_no_customer_are_noted(tmp_path, credit_file, capsys):
    """One person's rows are then in both parts of the split."""
    rows = json.loads(Path(credit_file).read_text())
    for name, noted in (("with", False), ("without", True)):
        src = tmp_path / f"{name}.json"
        src.write_text(json.dumps([row | ({"customer_id": None} if noted else {}) for row in rows]))
        assert creditmix_prepare.main(["--src", str(src), "--outdir", str(tmp_path / name)]) == 0
        assert ("rows have no customer id, each text counts as a customer" in capsys.readouterr().err) == noted


def test_a_table_in_another_notation_gives_the_same_training_files(tmp_path):
    """The same rows as CSV with points and as one with semicolons, decimal commas and small letters."""
    fields = [TASK.parse(row["question"]) | row for row in credit_rows(customers=150, months=2)]
    names = ["customer_id", *tuple(TASK.by_name), "answer"]
    header = ["Customer_ID", *(name.replace(" ", "_") for name in tuple(TASK.by_name)), "Credit_Mix"]
    rows = [[str(row.get(name, "")).replace(",", " ").replace(";", " ") for name in names] for row in fields]
    points = "".join(",".join(row) + "\n" for row in [header, *rows])
    (tmp_path / "points.csv").write_text(points)
    commas = "".join(";".join(row).replace(".", ",") + "\n" for row in rows)
    (tmp_path / "commas.csv").write_text(";".join(header).lower() + "\n" + commas, encoding="utf-16")
    written = []
    for name in ("points", "commas"):
        assert creditmix_prepare.main(["--src", str(tmp_path / f"{name}.csv"), "--outdir", str(tmp_path / name)]) == 0
        written.append(digests(tmp_path / name))
        del written[-1]["creditmix_prepared.json"]
    assert written[0] == written[1]


def test_the_generator_makes_the_embedded_file(tmp_path):
    command = [sys.executable, "-m", "data.make_creditmix", "--out", str(tmp_path / "made.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert (tmp_path / "made.json").read_bytes() == (ROOT / "data" / "creditmix_dataset.json").read_bytes()
