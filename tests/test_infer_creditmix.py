"""infer_creditmix runs whole on the tiny model: one response, files, interrupted runs, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    CREDIT_TEXT,
    PLAIN,
    RESPONSE_FIELDS,
    evaluate,
    infer_one,
    other_process,
    plain,
    read_lines,
    write_lines,
)

import infer_creditmix
from common import InputError
from distil.scoring import FastLabelScorer
from distil.testing import credit_rows

LABELS = ("Good", "Standard", "Bad")

# -------------------------------------------------------------------------------------------------------- one response


def test_the_response_has_the_whitepapers_fields_and_adds_up(here, capsys, model_dir):
    response = infer_one(capsys, model_dir)
    assert list(response) == RESPONSE_FIELDS
    assert response["model_name"] == model_dir and response["prediction"] in LABELS
    for field in ("scores", "raw_scores", "prior", "probabilities"):
        assert list(response[field]) == list(LABELS), field
    for label in LABELS:
        wanted = response["raw_scores"][label] - response["prior"][label]
        assert response["scores"][label] == pytest.approx(wanted, abs=2e-6)
        assert response["raw_scores"][label] < 0 and response["prior"][label] < 0
    scores = np.array([response["scores"][label] for label in LABELS])
    probabilities = np.array([response["probabilities"][label] for label in LABELS])
    np.testing.assert_allclose(probabilities, np.exp(scores) / np.exp(scores).sum(), atol=1e-5)
    assert probabilities.sum() == pytest.approx(1, abs=2e-6)
    assert response["prediction"] == LABELS[scores.argmax()]
    best, second = sorted(scores, reverse=True)[:2]
    assert response["top2_margin"] == pytest.approx(best - second, abs=2e-6)


def test_a_bias_is_added_and_decides(here, capsys, model_dir):
    plain, pushed = infer_one(capsys, model_dir), infer_one(capsys, model_dir, "--bias", "Standard=0.3,Bad=50")
    added = [pushed["scores"][label] - plain["scores"][label] for label in LABELS]
    np.testing.assert_allclose(added, [0, 0.3, 50], atol=3e-6)
    assert pushed["prediction"] == "Bad"
    assert pushed["raw_scores"] == plain["raw_scores"] and pushed["prior"] == plain["prior"]


def test_calibration_none_leaves_the_raw_scores(here, capsys, model_dir):
    response = infer_one(capsys, model_dir, "--calibration", "none")
    assert response["scores"] == response["raw_scores"]
    assert response["prior"] == dict.fromkeys(LABELS, 0.0)


def test_an_adapter_answers_under_its_own_name(here, capsys, credit_adapter, model_dir):
    response = infer_one(capsys, credit_adapter)
    assert response["model_name"] == credit_adapter
    assert response["raw_scores"] != infer_one(capsys, model_dir)["raw_scores"]


def test_class_shares_change_the_odds(here, capsys, model_dir):
    plain = infer_one(capsys, model_dir)
    field = infer_one(capsys, model_dir, "--class_shares", "Good=0.25,Standard=0.45,Bad=0.3")
    for a, b, odds in (("Standard", "Good", 0.45 / 0.25), ("Bad", "Good", 0.3 / 0.25)):
        before, after = (r["probabilities"][a] / r["probabilities"][b] for r in (plain, field))
        assert after == pytest.approx(odds * before, rel=1e-3)
    assert field["prediction"] == max(field["probabilities"], key=field["probabilities"].get)
    even = infer_one(capsys, model_dir, "--class_shares", "Good=0.3333,Standard=0.3334,Bad=0.3333")
    assert even["scores"] == pytest.approx(plain["scores"], abs=1e-3)


def test_an_uncertain_row_is_flagged_for_review(here, capsys, model_dir):
    response = infer_one(capsys, model_dir, "--abstain_below", "0.999")
    assert list(response) == [*RESPONSE_FIELDS, "extra"] and response["extra"] == {"refer": True}
    assert infer_one(capsys, model_dir, "--abstain_below", "0.0001")["extra"] == {"refer": False}


def test_an_adapter_without_a_calibration_gets_a_note(here, capsys, credit_adapter, credit_file, model_dir):
    """Its default, the prior of content-free prompts, fits trained models badly."""
    fitted = str(shutil.copytree(credit_adapter, here / "fitted"))
    assert evaluate(fitted, credit_file, "--fit") == 0
    noted = []
    for name, flags in (
        (credit_adapter, ()),
        (credit_adapter, ("--calibration", "none")),
        (fitted, ()),
        (model_dir, ()),
    ):
        capsys.readouterr()
        assert infer_creditmix.main(["--model_dir", name, "--features", "Age: 30", *plain(flags), *flags]) == 0
        noted.append("no stored calibration" in capsys.readouterr().err)
    assert noted == [True, False, False, False]


NAMED = "Age: 23, Payment Behavior: Low_spent, AnnualIncome: 19,114, Wage: 3"


def test_names_that_are_not_ours_are_taken_as_ours_or_noted(here, capsys, model_dir):
    assert infer_creditmix.main(["--model_dir", model_dir, *PLAIN, "--features", NAMED]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes[0].startswith("note: Annual Income: a comma before three digits is read as mark of thousands (write")
    assert notes[1] == "note: Payment Behavior: taken as Payment Behaviour"
    assert notes[2].startswith("note: Wage is not a field (Age, ") and len(notes) == 3


def test_a_field_that_is_there_twice_is_refused(here, model_dir):
    text = "Age: 23, Occupation: Lawyer, Age: 50"
    with pytest.raises(InputError, match="Age occurs twice in one feature string; keep one"):
        infer_creditmix.main(["--model_dir", model_dir, *PLAIN, "--features", text])
    write_lines(here / "in.jsonl", [json.dumps({"features": each}) for each in (text, "Age: 23")])
    assert infer_file(model_dir, "in.jsonl", "out.jsonl", "--batch_size", "auto") == 1
    refused, scored = read_lines(here / "out.jsonl")
    assert refused["error"]["code"] == "repeated_field" and "prediction" in scored


def test_a_text_without_a_known_feature_gets_a_note(here, capsys, model_dir):
    for text, noted in (("Age: 30", False), ("outstanding_debt: 30", False), ("hello", True), ("Height: 3", True)):
        assert infer_creditmix.main(["--model_dir", model_dir, *PLAIN, "--features", text]) == 0
        assert ("has no field of Age, Occupation" in capsys.readouterr().err) == noted
    lines = [json.dumps({"features": text}) for text in ("Age: 30", "hello", "Age: many", "Outstanding Debt: 3")]
    write_lines(here / "in.jsonl", lines)
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    assert "note: 2 of the rows scored now name no feature" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- files


def infer_file(model: str, source: str, output: str, *flags: str) -> int:
    return infer_creditmix.main(["--model_dir", model, *plain(flags), "--input", source, "--output", output, *flags])


def good_lines(count: int) -> list[str]:
    texts = [row["question"] for row in credit_rows(customers=count, months=1)]
    return [json.dumps({"id": i, "features": text + " x" * (i % 5)}) for i, text in enumerate(texts)]


def watch_batches(monkeypatch, chosen: int) -> tuple[list[int], list[int]]:
    """Let `auto` choose a size; return lists that get an item with each search, and the rows of each batch."""
    searches, batches = [], []
    batch = FastLabelScorer._score_batch
    monkeypatch.setattr(FastLabelScorer, "_fastest_batch_size", lambda *args: searches.append(1) or chosen)
    monkeypatch.setattr(FastLabelScorer, "_score_batch", lambda *args: batches.append(len(args[1])) or batch(*args))
    return searches, batches


def test_batch_size_auto_scores_as_the_size_that_it_chose(here, monkeypatch, model_dir):
    """Byte for byte: which rows are in one batch decides the last digits. The first lines have no row to try."""
    searches, batches = watch_batches(monkeypatch, 64)
    lines = ["{oops"] * 40 + [json.dumps({"features": f"Age: {20 + n % 50}" + " x" * (n % 9)}) for n in range(600)]
    write_lines(Path("rows.jsonl"), lines)
    results, flags = {}, ("--calibration", "none", "--overwrite")
    for flag in ("auto", "64", "200"):
        batches.clear()
        assert infer_file(model_dir, "rows.jsonl", "out.jsonl", *flags, "--batch_size", flag) == 1
        results[flag] = batches[:], Path("out.jsonl").read_bytes()
    assert results["auto"] == results["64"] and len(searches) == 1
    assert max(results["200"][0]) == 200 and len(read_lines("out.jsonl")) == 640


def test_a_resumed_run_with_auto_has_the_size_of_the_interrupted_one(here, monkeypatch, model_dir):
    write_lines(Path("rows.jsonl"), good_lines(300))
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda size: 4)
    for size in (3, 2):  # what another search might find
        searches, batches = watch_batches(monkeypatch, size)
        if size == 3:
            interrupt(monkeypatch, "rows.jsonl", "out.jsonl", model_dir, 2, "--batch_size", "auto")
    assert infer_file(model_dir, "rows.jsonl", "out.jsonl", "--batch_size", "auto") == 0
    assert not searches and max(batches) == 3 and len(read_lines("out.jsonl")) == 300


def test_a_file_keeps_order_and_objects_and_adds_the_response(here, capsys, model_dir):
    lines = good_lines(9)
    lines[4] = json.dumps({"question": CREDIT_TEXT, "note": "Grüße \u2028", "customer_id": 7}, ensure_ascii=False)
    write_lines(here / "in.jsonl", lines)
    assert infer_file(model_dir, "in.jsonl", "new/out.jsonl", "--batch_size", "4") == 0
    results = [json.loads(line) for line in (here / "new/out.jsonl").read_text().split("\n")[:-1]]
    for line, result in zip(lines, results, strict=True):
        sent = json.loads(line)
        assert {name: result[name] for name in sent} == sent
        assert list(result) == [*sent, *RESPONSE_FIELDS]
    alone = infer_one(capsys, model_dir)
    for label in LABELS:
        assert results[4]["scores"][label] == pytest.approx(alone["scores"][label], abs=1e-4)
    assert sorted(path.name for path in (here / "new").iterdir()) == ["out.jsonl"]


BAD_LINES = {
    "not_json": "{oops",
    "not_an_object": "[1, 2]",
    "no_features": '{"id": 5, "text": "x"}',
    "too_long": json.dumps({"id": 6, "features": "word " * 400}),
}


def test_lines_that_cannot_be_done_carry_their_error(here, capsys, model_dir):
    lines = good_lines(3)
    mixed = [lines[0], BAD_LINES["not_json"], BAD_LINES["not_an_object"], lines[1], BAD_LINES["no_features"]]
    mixed += ["", BAD_LINES["too_long"], '{"features": "  "}', lines[2]]
    write_lines(here / "in.jsonl", mixed)
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 1
    assert "out.jsonl: 6 of 9 lines carry an error" in capsys.readouterr().err
    results = read_lines(here / "out.jsonl")
    codes = [result.get("error", {}).get("code") for result in results]
    long, blank = "too_long", "no_features"
    assert codes == [None, "not_json", "not_an_object", None, "no_features", "not_json", long, blank, None]
    assert [results[i]["id"] for i in (0, 3, 8)] == [0, 1, 2]
    for result in results:
        assert ("error" in result) != ("prediction" in result)
        if "error" in result:
            assert set(result["error"]) == {"code", "message"} and result["error"]["message"]
    assert results[4]["id"] == 5 and results[6]["id"] == 6  # what could be read is still there


def test_an_error_of_an_earlier_run_does_not_stick(here, model_dir):
    """Error lines of one output, their features put right, are a good input."""
    row = {"features": CREDIT_TEXT, "error": {"code": "no_features", "message": "x"}}
    write_lines(here / "in.jsonl", [json.dumps(row)])
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    (result,) = read_lines(here / "out.jsonl")
    assert "error" not in result and result["prediction"] in LABELS


def test_a_line_that_is_not_utf8_carries_an_error(here, model_dir):
    (here / "in.jsonl").write_bytes(b'{"features": "Age: 3"}\n{"features": "caf\xe9"}\n{"features": "caf\xc3\xa9"}\n')
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 1
    first, second, third = read_lines(here / "out.jsonl")
    assert second == {"error": {"code": "not_utf8", "message": "the line is not UTF-8 text"}}
    assert first["prediction"] in LABELS and third["features"] == "café"


# Scores with a pause in the middle of the file, in chunks of 4 lines.
SLOW = """
import sys, time
import infer_creditmix
score, chunks = infer_creditmix.score_lines, []

def slowly(*args):
    chunks.append(1)
    if len(chunks) == 3:
        print("half", flush=True)
        time.sleep(100)
    return score(*args)

infer_creditmix.score_lines, infer_creditmix.chunk_of = slowly, lambda size: 4
infer_creditmix.main(sys.argv[1:])
"""


def test_two_runs_do_not_write_one_output(here, monkeypatch, capsys, model_dir):
    """The second is refused whatever its flags are; after a kill it resumes."""
    write_lines(here / "in.jsonl", good_lines(14))
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda size: 4)
    assert infer_file(model_dir, "in.jsonl", "full.jsonl") == 0
    argv = ["--model_dir", model_dir, *PLAIN, "--input", "in.jsonl", "--output", "out.jsonl"]
    with other_process(SLOW, *argv) as process:
        for flags in ([], ["--overwrite"], ["--bias", "Bad=1"]):
            with pytest.raises(InputError, match=rf"out.jsonl: another run \(process {process.pid}\) is writing it"):
                infer_file(model_dir, "in.jsonl", "out.jsonl", *flags)
    capsys.readouterr()
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    assert "after 8 rows" in capsys.readouterr().err
    assert (here / "out.jsonl").read_bytes() == (here / "full.jsonl").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["full.jsonl", "in.jsonl", "out.jsonl"]


def test_a_finished_output_needs_overwrite(here, model_dir):
    write_lines(here / "in.jsonl", good_lines(2))
    (here / "out.jsonl").write_text("old\n")
    with pytest.raises(InputError, match=r"out\.jsonl: exists; --overwrite replaces it"):
        infer_file(model_dir, "in.jsonl", "out.jsonl")
    assert (here / "out.jsonl").read_text() == "old\n"
    assert infer_file(model_dir, "in.jsonl", "out.jsonl", "--overwrite") == 0
    assert len(read_lines(here / "out.jsonl")) == 2


def interrupt(monkeypatch, source: str, output: str, model: str, chunks: int, *flags: str) -> None:
    """Run in chunks of four rows and stop, as Ctrl-C does, in the middle of a chunk."""
    real, left = infer_creditmix.score_lines, [chunks]

    def stop_later(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(infer_creditmix, "chunk_of", lambda batch_size: 4)
        patch.setattr(infer_creditmix, "score_lines", stop_later)
        with pytest.raises(KeyboardInterrupt):
            infer_file(model, source, output, *flags)


def test_a_resumed_run_equals_an_uninterrupted_one(here, monkeypatch, capsys, model_dir):
    lines = good_lines(14)
    lines[2] = BAD_LINES["not_json"]
    write_lines(here / "in.jsonl", lines)
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda batch_size: 4)
    assert infer_file(model_dir, "in.jsonl", "full.jsonl") == 1
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", model_dir, 2)
    part = here / "out.jsonl.part"
    assert not (here / "out.jsonl").exists()
    assert len(part.read_text().splitlines()) == 8
    # The process died while writing a chunk: its rows are scored again together, for the same digits.
    done = part.read_text() + '{"id": 8, "features": "Age: 28"}\n{"id": 9, "features": "Age: 2'
    # The first lines are taken over, not scored again: a mark in one of them survives.
    part.write_text(done.replace('"id": 1,', '"id": 1, "mark": "kept",'))
    capsys.readouterr()
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 1  # the error of the first part counts
    shown = capsys.readouterr().err
    assert "after 8 rows" in shown and "1 of 14 lines carry an error" in shown
    results, full = read_lines(here / "out.jsonl"), read_lines(here / "full.jsonl")
    assert results[1].pop("mark") == "kept"
    assert [list(row) for row in results] == [list(row) for row in full] and results == full
    assert sorted(path.name for path in here.iterdir()) == ["full.jsonl", "in.jsonl", "out.jsonl"]


def test_a_run_that_may_replace_its_output_is_resumed(here, monkeypatch, capsys, model_dir):
    """With --overwrite again it would start over, so the same command without it resumes."""
    write_lines(here / "in.jsonl", good_lines(9))
    (here / "out.jsonl").write_text("old\n")
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda batch_size: 4)
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", model_dir, 1, "--overwrite")
    assert (here / "out.jsonl").read_text() == "old\n"
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    assert "after 4 rows" in capsys.readouterr().err
    assert len(read_lines(here / "out.jsonl")) == 9


@pytest.mark.parametrize("change", ["flag", "input", "no note"])
def test_an_interrupted_run_is_not_mixed_with_another(here, monkeypatch, model_dir, change):
    write_lines(here / "in.jsonl", good_lines(9))
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", model_dir, 1)
    before = (here / "out.jsonl.part").read_text()
    flags = ["--bias", "Bad=1"] if change == "flag" else []
    if change == "input":
        write_lines(here / "in.jsonl", good_lines(10))
    if change == "no note":
        (here / "out.jsonl.part.json").unlink()
    why = {"flag": "(.*bias.*)", "input": "(chunk, input_sha256)", "no note": "(.*)"}[change]
    with pytest.raises(InputError, match=rf"\.part: left by a run with another model, input or flags \({why}\)"):
        infer_file(model_dir, "in.jsonl", "out.jsonl", *flags)
    assert (here / "out.jsonl.part").read_text() == before
    assert infer_file(model_dir, "in.jsonl", "out.jsonl", *flags, "--overwrite") == 0
    assert len(read_lines(here / "out.jsonl")) == (10 if change == "input" else 9)


def test_an_interrupted_run_is_not_mixed_with_another_calibration(here, monkeypatch, credit_adapter, credit_file):
    """The flags are the same, but calibration.json was written between the two runs."""
    own = str(shutil.copytree(credit_adapter, here / "own"))
    write_lines(here / "in.jsonl", good_lines(9))
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", own, 1)
    evaluate(own, credit_file, "--fit")
    with pytest.raises(InputError, match=r"left by a run with another model.*calibration_used"):
        infer_file(own, "in.jsonl", "out.jsonl")
    assert infer_file(own, "in.jsonl", "out.jsonl", "--overwrite") == 0
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", own, 1, "--overwrite")
    file = Path(own, "calibration.json")
    stored = json.loads(file.read_text())  # as a fit to other rows may leave it: only the prior is another
    file.write_text(json.dumps(stored | {"prior": {label: value + 0.1 for label, value in stored["prior"].items()}}))
    with pytest.raises(InputError, match=r"left by a run with another model.*calibration_used"):
        infer_file(own, "in.jsonl", "out.jsonl")


# -------------------------------------------------------------------------------------------------------------- tables


def write_table(path: Path, ages: range) -> str:
    """Write a CSV with other columns, decimal commas, an Age that is no number and an Occupation that is too long."""
    head = "id;Age;Occupation;Annual_Income;Outstanding_Debt;Credit_Utilization_Ratio;Payment_Behaviour;note\n"
    rows = [f"{n};{n};Lawyer;{n * 100},25;{n};{n % 50};Low_spent;é{n}\n" for n in ages]
    rows[1] = rows[1].replace(f";{ages[1]};Lawyer", ";many;Lawyer")
    rows[4] = rows[4].replace("Lawyer", "word " * 400)
    path.write_text(head + "".join(rows))
    return path.name


def read_csv(path: str) -> list[dict]:
    with open(path, newline="") as text:
        return list(csv.DictReader(text))


def test_a_table_is_scored_as_the_same_rows_in_jsonl(here, capsys, model_dir):
    source = write_table(here / "in.csv", range(20, 29))
    assert infer_file(model_dir, source, "out.csv", "--abstain_below", "0.999") == 1
    shown = capsys.readouterr().err
    assert "out.csv: 1 of 9 lines carry an error" in shown and "the column notes reports which" in shown
    rows = [
        {"fields": {name: cell.replace(",", ".") for name, cell in list(row.items())[1:-1]}}
        for row in csv.DictReader((here / source).read_text().splitlines(), delimiter=";")
    ]
    write_lines(here / "in.jsonl", [json.dumps(row) for row in rows])
    assert infer_file(model_dir, "in.jsonl", "out.jsonl", "--abstain_below", "0.999") == 1
    names = ["prediction", *(f"p_{label}" for label in LABELS), "top2_margin", "refer", "notes", "error"]
    for number, (row, response) in enumerate(zip(read_csv("out.csv"), read_lines("out.jsonl"), strict=True)):
        assert list(row)[-8:] == names and row["note"] == f"é{20 + number}"
        if number == 4:
            assert row["error"] == "too_long: the features do not fit the model's context" and not row["prediction"]
            continue
        assert row["prediction"] == response["prediction"] and row["refer"] == "True" and not row["error"]
        assert [float(row[f"p_{label}"]) for label in LABELS] == list(response["probabilities"].values())
        assert bool(row["notes"]) == (number == 1)
    assert read_csv("out.csv")[1]["notes"].startswith("Age: not a number -> Unknown")


def test_an_interrupted_table_is_resumed_with_the_same_bytes(here, monkeypatch, capsys, model_dir):
    source = write_table(here / "in.csv", range(20, 31))
    with monkeypatch.context() as patch:
        patch.setattr(infer_creditmix, "chunk_of", lambda size: 4)
        assert infer_file(model_dir, source, "full.csv") == 1
    interrupt(monkeypatch, source, "out.csv", model_dir, 2)
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda size: 4)
    with pytest.raises(InputError, match=r"left by a run with another .* \(decimal\)"):
        infer_file(model_dir, source, "out.csv", "--decimal", ",")
    capsys.readouterr()
    assert infer_file(model_dir, source, "out.csv") == 1
    assert "resuming after 8 rows" in capsys.readouterr().err
    assert (here / "out.csv").read_bytes() == (here / "full.csv").read_bytes()
    assert sorted(path.name for path in here.iterdir()) == ["full.csv", "in.csv", "out.csv"]
    with pytest.raises(InputError, match=r"column prediction, p_Good, .* would be there twice in the output"):
        infer_file(model_dir, "full.csv", "again.csv")


def test_a_task_file_says_what_is_scored(here, capsys, model_dir):
    """A text task; `auto` tries rows of the table itself."""
    task = {"name": "mood", "instruction": "Mood?", "labels": ["Good", "Bad"], "label_column": "mood"}
    (here / "task.json").write_text(json.dumps(task | {"text_column": "text"}))
    argv = ["--model_dir", model_dir, *PLAIN, "--task", "task.json"]
    assert infer_creditmix.main([*argv, "--features", "so, Age: 5 it is"]) == 0
    response = json.loads(capsys.readouterr().out)
    assert list(response["probabilities"]) == ["Good", "Bad"]
    (here / "in.csv").write_text('id,text\n1,"so, Age: 5 it is"\n2,\n')
    argv += ["--batch_size", "auto", "--input", "in.csv", "--output", "out.csv"]
    assert infer_creditmix.main(argv) == 1
    first, second = read_csv("out.csv")
    assert list(first) == ["id", "text", "prediction", "p_Good", "p_Bad", "top2_margin", "error"]
    assert float(first["p_Bad"]) == pytest.approx(response["probabilities"]["Bad"], abs=2e-6)
    assert second["error"] == "no_features: the row is empty"


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --features, or --input and --output"),
        (["--features", "x", "--input", "in.jsonl", "--output", "o"], "give either --features"),
        (["--input", "in.jsonl"], "give either --features"),
        (["--features", "  "], "--features is empty"),
        (["--input", "missing.jsonl", "--output", "o"], r"missing\.jsonl: no such file"),
        (["--input", "in.jsonl", "--output", "o.csv", "--decimal", ","], "--decimal: only for tables; leave out"),
        (["--features", "x", "--decimal", ","], "--decimal: only with --input"),
        (["--features", "x", "--task", "missing.json"], r"missing\.json: no such file"),
        (["--input", "empty.jsonl", "--output", "o"], r"empty\.jsonl: empty"),
        (["--input", "in.jsonl", "--output", "folder"], "folder: "),
        (["--input", "in.jsonl", "--output", "folder", "--overwrite"], "folder: "),
        (["--features", "x", "--bias", "Standard"], "--bias Standard: 'Standard' is not LABEL=NUMBER"),
        (["--features", "x", "--bias", "Fair=1"], "--bias Fair=1: labels are Good, Standard, Bad"),
        (["--features", "x", "--bias", "Bad=nan"], "--bias Bad=nan: labels are .* numbers finite"),
        (["--features", "x", "--null_prompts", "0"], "--null_prompts 0: 1 to 7 are available"),
        (["--features", "x", "--null_prompts", "8"], "--null_prompts 8: 1 to 7 are available"),
        (["--features", "x", "--overwrite"], "--overwrite: only with --output"),
        (["--features", "x", "--aggregate", "mean"], "--aggregate: only with --verbalizers"),
        (["--features", "x", "--batch_size", "0"], "--batch_size: only with --input"),
        (["--features", "x", "--verbalizers", "missing.json"], r"missing\.json: no such file"),
        (["--features", "word " * 400], "a text has [0-9]+ tokens; the model's context is 512: shorten it"),
        (
            ["--features", "x", "--calibration", "fitted"],
            r"calibration\.json: does not hold a fitted one; eval_creditmix\.py --fit --calibration fitted writes it",
        ),
    ],
)
def test_infer_refuses_wrong_input_and_leaves_nothing(here, model_dir, flags, message):
    write_lines(here / "in.jsonl", good_lines(1))
    (here / "empty.jsonl").touch()
    (here / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        infer_creditmix.main(["--model_dir", model_dir, "--quantization", "none", *flags])
    assert sorted(path.name for path in here.iterdir()) == ["empty.jsonl", "folder", "in.jsonl"]
    assert not list((here / "folder").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class_shares", "Good=0.5"], "--class_shares Good=0.5: a share above 0 for each label, 1 together"),
        (["--class_shares", "Good=0.5,Standard=0.5,Bad=0.5"], "1 together"),
        (["--class_shares", "Good=0.5,Fair=0.5"], "--class_shares .*: labels are Good, Standard, Bad"),
        (["--abstain_below", "0"], "--abstain_below 0.0: a probability above 0"),
        (["--abstain_below", "nan"], "--abstain_below nan: a probability above 0"),
    ],
)
def test_trust_flags_out_of_range(here, model_dir, flags, message):
    with pytest.raises(InputError, match=message):
        infer_creditmix.main(["--model_dir", model_dir, "--features", "Age: 3", *flags])
