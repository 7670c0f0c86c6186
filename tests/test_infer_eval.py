"""infer_creditmix and eval_creditmix run whole on the tiny model, as a user runs them."""

from __future__ import annotations

import json
import random
import shutil
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

import batch_files
import eval_creditmix
import infer_creditmix
from common import likeliest
from conftest import credit_rows, save_adapter
from creditmix import LABELS, CreditModel, CreditRow, read_creditmix
from files import InputError, file_sha256, split_of
from models import model_fingerprint

PLAIN = ["--quantization", "none", "--compute_dtype", "float32", "--null_prompts", "2"]
FIELDS = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]
TEXT = "Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_dir) -> str:
    """Copied before anything is written beside it."""
    return save_adapter(tmp_path_factory.mktemp("adapter") / "creditmix_sft", model_dir)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, so that runs/ is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, adapter, credit_file) -> str:
    """An adapter with its calibration."""
    own = str(shutil.copytree(adapter, tmp_path_factory.mktemp("fitted") / "own"))
    assert evaluate(own, credit_file, "--fit", "--calibration", "fitted") == 0
    return own


def infer_one(capsys, model: str, *flags: str) -> dict:
    capsys.readouterr()
    assert infer_creditmix.main(["--model_dir", model, *PLAIN, "--features", TEXT, *flags]) == 0
    return json.loads(capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------------- one response


def test_the_response_has_the_whitepapers_fields_and_adds_up(here, capsys, model_dir):
    response = infer_one(capsys, model_dir)
    assert list(response) == FIELDS
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


def test_an_adapter_answers_under_its_own_name_and_differs_from_its_base(here, capsys, adapter, model_dir):
    response = infer_one(capsys, adapter)
    assert response["model_name"] == adapter
    assert response["raw_scores"] != infer_one(capsys, model_dir)["raw_scores"]


# -------------------------------------------------------------------------------------------------------- batch files


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def infer_file(model: str, source: str, output: str, *flags: str) -> int:
    return infer_creditmix.main(["--model_dir", model, *PLAIN, "--input", source, "--output", output, *flags])


def good_lines(count: int) -> list[str]:
    texts = [row["question"] for row in credit_rows(customers=count, months=1)]
    return [json.dumps({"id": i, "features": text + " x" * (i % 5)}) for i, text in enumerate(texts)]


@pytest.mark.parametrize(("flag", "tried"), [("auto", 1), ("200", 0)])
def test_a_file_is_scored_in_the_batches_that_were_asked_for(here, monkeypatch, model_dir, flag, tried):
    """--batch_size auto has rows enough to try some, and more than a stretch between two writes fits one batch."""
    from common import LabelScorer

    searches, batches = [], []
    batch = LabelScorer._score_batch
    monkeypatch.setattr(LabelScorer, "_fastest_batch_size", lambda *args: searches.append(1) or 64)
    monkeypatch.setattr(LabelScorer, "_score_batch", lambda *args: batches.append(len(args[1])) or batch(*args))
    write_lines(Path("rows.jsonl"), [json.dumps({"features": f"Age: {20 + n % 50}"}) for n in range(300)])
    assert infer_file(model_dir, "rows.jsonl", "out.jsonl", "--calibration", "none", "--batch_size", flag) == 0
    assert (
        len(searches) == tried and max(batches) == (64 if tried else 200) and len(read_lines(Path("out.jsonl"))) == 300
    )


def test_a_file_keeps_order_and_objects_and_adds_the_response(here, capsys, model_dir):
    lines = good_lines(9)
    lines[4] = json.dumps({"question": TEXT, "note": "Grüße \u2028", "customer_id": 7}, ensure_ascii=False)
    write_lines(here / "in.jsonl", lines)
    assert infer_file(model_dir, "in.jsonl", "new/out.jsonl", "--batch_size", "4") == 0
    results = [json.loads(line) for line in (here / "new/out.jsonl").read_text().split("\n")[:-1]]
    for line, result in zip(lines, results, strict=True):
        given = json.loads(line)
        assert {name: result[name] for name in given} == given
        assert list(result) == [*given, *FIELDS]
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
    assert results[4]["id"] == 5 and results[6]["id"] == 6  # what could be read stays


def test_an_error_of_an_earlier_run_does_not_stick(here, model_dir):
    """Error lines of one output, their features put right, are a good input."""
    row = {"features": TEXT, "error": {"code": "no_features", "message": "x"}}
    write_lines(here / "in.jsonl", [json.dumps(row)])
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    (result,) = read_lines(here / "out.jsonl")
    assert "error" not in result and result["prediction"] in LABELS


def test_a_finished_output_needs_overwrite(here, model_dir):
    write_lines(here / "in.jsonl", good_lines(2))
    (here / "out.jsonl").write_text("precious\n")
    with pytest.raises(InputError, match=r"out\.jsonl: exists; --overwrite replaces it"):
        infer_file(model_dir, "in.jsonl", "out.jsonl")
    assert (here / "out.jsonl").read_text() == "precious\n"
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


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(here, monkeypatch, capsys, model_dir):
    lines = good_lines(14)
    lines[2] = BAD_LINES["not_json"]
    write_lines(here / "in.jsonl", lines)
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda batch_size: 4)
    assert infer_file(model_dir, "in.jsonl", "whole.jsonl") == 1
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
    assert "going on after 8 rows" in shown and "1 of 14 lines carry an error" in shown
    results, whole = read_lines(here / "out.jsonl"), read_lines(here / "whole.jsonl")
    assert results[1].pop("mark") == "kept"
    assert [list(row) for row in results] == [list(row) for row in whole] and results == whole
    assert sorted(path.name for path in here.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_an_interrupted_run_that_may_replace_its_output_goes_on(here, monkeypatch, capsys, model_dir):
    """With --overwrite once more it would start again, so the same command without it goes on."""
    write_lines(here / "in.jsonl", good_lines(9))
    (here / "out.jsonl").write_text("old\n")
    monkeypatch.setattr(infer_creditmix, "chunk_of", lambda batch_size: 4)
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", model_dir, 1, "--overwrite")
    assert (here / "out.jsonl").read_text() == "old\n"
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    assert "going on after 4 rows" in capsys.readouterr().err
    assert len(read_lines(here / "out.jsonl")) == 9


def test_what_is_done_survives_a_kill_while_the_half_line_is_cut_off(here, monkeypatch):
    """The .part file is cut in place: written anew, it would be empty for a moment."""
    part = here / "out.jsonl.part"
    part.write_text("1\n2\n3\n4")
    batch_files.write_json(here / "out.jsonl.part.json", {})
    monkeypatch.setattr(Path, "write_bytes", lambda *args: 1 / 0)
    assert batch_files._resume_point(part, {}, together=2) == 2
    assert part.read_text() == "1\n2\n"


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
    why = {"flag": "(.*bias.*)", "input": "(input_size, input_time)", "no note": "(.*)"}[change]
    with pytest.raises(InputError, match=rf"\.part: left by a run with another model, input or flags \({why}\)"):
        infer_file(model_dir, "in.jsonl", "out.jsonl", *flags)
    assert (here / "out.jsonl.part").read_text() == before
    assert infer_file(model_dir, "in.jsonl", "out.jsonl", *flags, "--overwrite") == 0
    assert len(read_lines(here / "out.jsonl")) == (10 if change == "input" else 9)


def test_an_interrupted_run_is_not_mixed_with_another_calibration(here, monkeypatch, adapter, credit_file):
    """The flags are the same, but calibration.json came to be between the two runs."""
    own = str(shutil.copytree(adapter, here / "own"))
    write_lines(here / "in.jsonl", good_lines(9))
    interrupt(monkeypatch, "in.jsonl", "out.jsonl", own, 1)
    evaluate(own, credit_file, "--fit")
    with pytest.raises(InputError, match="left by a run with another model"):
        infer_file(own, "in.jsonl", "out.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --features, or --input and --output"),
        (["--features", "x", "--input", "in.jsonl", "--output", "o"], "give either --features"),
        (["--input", "in.jsonl"], "give either --features"),
        (["--features", "  "], "--features is empty"),
        (["--input", "missing.jsonl", "--output", "o"], r"missing\.jsonl: no such file"),
        (["--input", "empty.jsonl", "--output", "o"], r"empty\.jsonl: empty"),
        (["--input", "in.jsonl", "--output", "folder"], "folder: "),
        (["--input", "in.jsonl", "--output", "folder", "--overwrite"], "folder: "),
        (["--features", "x", "--bias", "Standard"], "--bias Standard: 'Standard' is not LABEL=NUMBER"),
        (["--features", "x", "--bias", "Fair=1"], "--bias Fair=1: labels are Good, Standard, Bad"),
        (["--features", "x", "--bias", "Bad=nan"], "--bias Bad=nan: labels are .* numbers finite"),
        (["--features", "x", "--null_prompts", "0"], "--null_prompts 0: 1 to 7 are available"),
        (["--features", "x", "--batch_size", "0"], "--batch_size 0: at least 1"),
        (["--features", "x", "--verbalizers", "missing.json"], r"missing\.json: no such file"),
        (["--features", "word " * 400], "a text has [0-9]+ tokens; the model's context is 512: shorten it"),
        (
            ["--features", "x", "--calibration", "fitted"],
            r"calibration\.json: no fitted one there; eval_creditmix\.py --fit --calibration fitted makes it",
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


# ------------------------------------------------------------------------------------------------------------ evaluate


def evaluate(model: str, data: str, *flags: str) -> int:
    small = [] if "--val_per_class" in flags else ["--val_per_class", "20"]
    return eval_creditmix.main(["--model_dir", model, "--data", data, *PLAIN, "--bootstrap", "50", *small, *flags])


def test_rows_to_fit_on_are_limited_by_their_flag(here, model_dir, credit_file):
    for count in (7, 4):
        assert evaluate(model_dir, credit_file, "--fit", "--fit_per_class", str(count)) == 0
        stored = json.loads(Path("runs/creditmix_base/calibration.json").read_text())
        assert stored["fitted_on"]["rows"] == 3 * count


def evaluate_json(capsys, model: str, data: str, *flags: str) -> dict:
    capsys.readouterr()
    assert evaluate(model, data, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)  # standard output holds the object alone


def test_eval_json_holds_the_metrics_with_intervals_around_them(here, capsys, model_dir, credit_file):
    summary = evaluate_json(capsys, model_dir, credit_file)
    assert summary["data"]["validation_rows"] == 60 and summary["split_seed"] == 0
    (result,) = summary["models"]
    assert result["model"] == model_dir and result["calibration"] == "contextual"
    assert {"accuracy", "macro_f1", "nll", "brier", "ece", "interval_95", "recall_Good"} <= set(result)
    for name, (low, high) in result["interval_95"].items():
        assert 0 <= low <= result[name] <= high and (high <= 1 or name == "nll"), name
    assert set(result["interval_95"]) == {"accuracy", "macro_f1", "nll", *(f"recall_{label}" for label in LABELS)}
    assert set(result["calibrations"]) == {"none", "contextual"}
    assert result["calibrations"]["contextual"]["nll"] == result["nll"]
    assert result["calibrations"]["none"]["nll"] != result["nll"]


def test_eval_agrees_with_infer_on_rows_of_validation_customers(here, capsys, adapter, credit_file):
    assert evaluate(adapter, credit_file, "--report_dir", "report", "--baselines", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    metrics = json.loads((here / "report/metrics.json").read_text())
    assert metrics == summary
    names = [result["model"] for result in summary["models"]]
    assert names == [adapter, "majority", "logistic regression", "tabular teacher", "gradient boosting"]
    for folder in ("creditmix_sft", "majority", "logistic_regression", "tabular_teacher", "gradient_boosting"):
        files = sorted(path.name for path in (here / "report" / folder).iterdir())
        assert files == ["confusion_matrix.png", "coverage.png", "predictions.jsonl", "reliability.png"]
        assert (here / "report" / folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    lines = read_lines(here / "report/creditmix_sft/predictions.jsonl")
    assert Counter(line["answer"] for line in lines) == dict.fromkeys(LABELS, 20)
    right = np.mean([line["prediction"] == line["answer"] for line in lines])
    assert right == pytest.approx(summary["models"][0]["accuracy"])
    rows, _ = read_creditmix(credit_file)
    owner = {row.features: row.customer for row in rows}
    assert {split_of(owner[line["features"]]) for line in lines} == {"validation"}

    write_lines(here / "in.jsonl", [json.dumps({"features": line["features"]}) for line in lines])
    assert infer_file(adapter, "in.jsonl", "out.jsonl") == 0
    for line, result in zip(lines, read_lines(here / "out.jsonl"), strict=True):
        assert result["scores"] == pytest.approx(line["scores"], abs=1e-4)

    majority, linear, teacher, boosted = summary["models"][1:]
    assert majority["accuracy"] == pytest.approx(1 / 3) and majority["nll"] == pytest.approx(np.log(3))
    assert linear["accuracy"] > 0.5 and min(teacher["accuracy"], boosted["accuracy"]) > 0.8  # debt decides


def test_any_model_is_the_reference(here, capsys, adapter, model_dir, credit_file):
    flags = ("--model_dir", model_dir, adapter, "--baselines", "--calibration", "none")
    for name in ("tabular teacher", adapter):
        found = evaluate_json(capsys, model_dir, credit_file, *flags, "--reference", name)["models"]
        assert {m["difference"]["to"] for m in found if "difference" in m} == {name}
        assert [m["model"] for m in found if "difference" not in m] == [name]
        of = {m["model"]: m for m in found}
        point, low, high = of[model_dir]["difference"]["nll"]
        assert point == pytest.approx(of[model_dir]["nll"] - of[name]["nll"]) and low <= point <= high
    with pytest.raises(InputError, match="--reference majority is none of "):
        eval_creditmix.main(["--model_dir", model_dir, "--data", credit_file, "--reference", "majority"])


def test_models_side_by_side_keep_their_reports_apart(here, capsys, adapter, credit_file):
    other = str(shutil.copytree(adapter, here / "other/creditmix_sft"))
    assert evaluate(adapter, credit_file, "--model_dir", adapter, other, "--report_dir", "report") == 0
    out = capsys.readouterr().out
    assert f"{adapter} (contextual)" in out and f"{other} (contextual)" in out
    assert len(list((here / "report").glob("*/predictions.jsonl"))) == 2


def test_fit_writes_a_calibration_that_eval_and_infer_then_use(here, capsys, adapter, credit_file):
    own = str(shutil.copytree(adapter, here / "own"))
    before = infer_one(capsys, own)
    assert before["prior"] != dict.fromkeys(LABELS, 0.0)
    fitted = evaluate_json(capsys, own, credit_file, "--fit")["models"][0]
    assert fitted["calibration"] == "fitted" and set(fitted["calibrations"]) == {
        "none",
        "contextual",
        "batch",
        "fitted",
    }
    stored = json.loads((here / "own/calibration.json").read_text())
    assert {"calibration", "bias", "temperature", "labels", "model", "fitted_on"} <= set(stored)
    assert stored["calibration"] == "fitted" and stored["labels"] == list(LABELS)
    assert stored["model"] == model_fingerprint(own) and stored["temperature"] > 0
    assert sum(stored["bias"].values()) == pytest.approx(0, abs=1e-9)
    assert stored["fitted_on"]["split_seed"] == 0 and len(stored["fitted_on"]["sha256"]) == 64
    rows, _ = read_creditmix(credit_file)
    pool = Counter(row.label for row in rows if split_of(row.customer) == "calibration")
    assert stored["fitted_on"]["rows"] == 3 * min(pool.values())

    after = infer_one(capsys, own)
    scores = np.array([after["scores"][label] for label in LABELS])
    for label in LABELS:
        moved = after["scores"][label] - before["scores"][label]
        assert moved == pytest.approx(stored["bias"][label], abs=3e-6)
    logits = scores / stored["temperature"]
    wanted = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([after["probabilities"][label] for label in LABELS], wanted, atol=1e-5)
    assert infer_one(capsys, own, "--calibration", "contextual") == before
    again = evaluate_json(capsys, own, credit_file)["models"][0]
    assert again["calibration"] == "fitted" and again["nll"] == pytest.approx(fitted["nll"], abs=1e-6)


def test_fit_bias_moves_the_biases_all_the_way_or_half(here, capsys, adapter, credit_file):
    own, found = str(shutil.copytree(adapter, here / "own")), {}
    for way in ("likelihood", "halfway", "shares"):
        evaluate_json(capsys, own, credit_file, "--fit", "--fit_bias", way)
        found[way] = np.array(list(json.loads((here / "own/calibration.json").read_text())["bias"].values()))
    assert np.abs(found["shares"] - found["likelihood"]).max() > 1e-3
    np.testing.assert_allclose(found["halfway"], (found["likelihood"] + found["shares"]) / 2, atol=1e-6)


def test_a_fit_on_few_customers_is_said_to_be_a_risk(here, capsys, adapter, credit_file):
    own = str(shutil.copytree(adapter, here / "own"))
    evaluate(own, credit_file, "--fit")
    assert "customers may do harm" in capsys.readouterr().err
    evaluate(own, credit_file)
    assert "customers may do harm" not in capsys.readouterr().err


def test_fitting_lowers_the_nll_of_the_rows_it_was_fitted_on(here, capsys, adapter, credit_file, monkeypatch):
    own = str(shutil.copytree(adapter, here / "own"))
    real = eval_creditmix.draw
    with monkeypatch.context() as patch:  # measure on the very rows of the fit
        patch.setattr(eval_creditmix, "draw", lambda rows, _, n, args: real(rows, "calibration", None, args))
        result = evaluate_json(capsys, own, credit_file, "--fit", "--calibration", "fitted")["models"][0]
    assert result["nll"] < min(result["calibrations"]["none"]["nll"], result["calibrations"]["contextual"]["nll"])
    assert result["nll"] <= np.log(3) + 1e-6  # zero weight on the scores is among what was fitted


def test_every_model_is_looked_up_before_the_first_is_scored(here, adapter, credit_file, monkeypatch):
    monkeypatch.setattr(eval_creditmix, "evaluate_model", lambda *args: pytest.fail("scored"))
    with pytest.raises(InputError, match="nobody/no-such-model: neither in the local cache"):
        evaluate(adapter, credit_file, "--model_dir", adapter, "nobody/no-such-model")


def test_baselines_learn_nothing_from_the_customers_they_are_measured_on(here, capsys, model_dir):
    """Labels by chance and rows that tell customers apart: only who saw these customers knows their labels."""
    rng = random.Random(0)
    rows = [
        {
            "question": f"Age: {20 + n % 60}, Annual Income: {20000 + 10 * n}, Outstanding Debt: {500 + n}",
            "answer": label,
            "customer_id": f"C{n}",
        }
        for n, label in enumerate(rng.choices(LABELS, k=400))
        for _ in range(8)
    ]
    Path("chance.json").write_text(json.dumps(rows))
    flags = ("--calibration", "none", "--baselines", "--bootstrap", "10")
    found = evaluate_json(capsys, model_dir, "chance.json", *flags, "--val_per_class", "150")["models"]
    assert found[-1]["model"] == "gradient boosting"
    assert found[-1]["accuracy"] < 0.5


def test_an_adapter_without_a_calibration_says_how_to_get_one(here, capsys, adapter, fitted, model_dir):
    """Its default, the prior of content-free prompts, fits trained models badly."""
    said = {}
    for name, flags in ((adapter, ()), (adapter, ("--calibration", "none")), (fitted, ()), (model_dir, ())):
        assert infer_creditmix.main(["--model_dir", name, "--features", "Age: 30", *PLAIN, *flags]) == 0
        said[name, *flags] = "no stored calibration" in capsys.readouterr().err
    assert said == {(adapter,): True, (adapter, "--calibration", "none"): False, (fitted,): False, (model_dir,): False}


def test_a_base_keeps_its_calibration_in_its_own_run_folder(here, capsys, model_dir, credit_file):
    evaluate(model_dir, credit_file, "--fit")
    stored = json.loads((here / "runs/creditmix_base/calibration.json").read_text())
    response = infer_one(capsys, model_dir)
    moved = response["scores"]["Bad"] - (response["raw_scores"]["Bad"] - response["prior"]["Bad"])
    assert moved == pytest.approx(stored["bias"]["Bad"], abs=3e-6)


def test_a_calibration_of_another_model_or_other_forms_is_refused(here, capsys, adapter, model_dir, credit_file):
    own = str(shutil.copytree(adapter, here / "own"))
    evaluate(own, credit_file, "--fit")
    other = save_adapter(here / "other", model_dir, seed=5)
    shutil.copy(here / "own/calibration.json", here / "other")
    with pytest.raises(
        InputError, match=r"calibration\.json: fitted with another model .* fit again with eval_credit"
    ):
        infer_one(capsys, other)
    words = here / "words.json"
    words.write_text(json.dumps({"Standard": ["Standard", "Typical"]}))
    for flags, name in (
        (["--verbalizers", str(words)], "forms"),
        (["--aggregate", "mean"], "aggregate"),
        (["--null_prompts", "3"], "null_prompts"),
    ):
        with pytest.raises(InputError, match=f"fitted with another {name} "):
            infer_one(capsys, own, *flags)
        infer_one(capsys, own, *flags, "--calibration", "contextual")  # the way out that the message names


DAMAGE = {
    "a list": lambda stored: [],
    "no bias": lambda stored: stored | {"bias": None},
    "no prior": lambda stored: stored | {"prior": None},
    "a label missing": lambda stored: stored | {"bias": {"Good": 0.0, "Bad": 0.0}},
    "bias as text": lambda stored: stored | {"bias": stored["bias"] | {"Good": "0.1"}},
    "temperature 0": lambda stored: stored | {"temperature": 0},
    "no temperature": lambda stored: {k: v for k, v in stored.items() if k != "temperature"},
    "NaN": lambda stored: stored | {"temperature": float("nan")},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_calibration_is_refused(here, capsys, adapter, fitted, damage):
    path = shutil.copytree(fitted, here / "own") / "calibration.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=r"own/calibration\.json: "):
        infer_one(capsys, str(here / "own"))


@pytest.mark.parametrize("flags", [["--quantization", "nf4"], ["--compute_dtype", "bfloat16"]])
def test_a_calibration_is_refused_where_the_model_is_loaded_otherwise(here, capsys, fitted, flags):
    with pytest.raises(InputError, match=f"fitted with another {flags[0][2:]} "):
        infer_one(capsys, fitted, *flags)


def test_data_other_than_the_trainings_is_noted(here, capsys, adapter, credit_file):
    own = Path(shutil.copytree(adapter, here / "own"))
    run = json.loads((own / "run.json").read_text())
    for source, noted in ((credit_file, False), (here / "own/run.json", True)):
        record = {"file": "raw.csv", "sha256": file_sha256(source)}
        (own / "run.json").write_text(json.dumps(run | {"sources": [record]}))
        capsys.readouterr()
        assert evaluate(str(own), credit_file) == 0
        assert ("own was trained on rows of raw.csv, not of --data" in capsys.readouterr().err) == noted
    for unknown in ({"sources": [None]}, {"sources": [{"file": "a", "sha256": "b"}], "split_seed": None}, {}):
        (own / "run.json").write_text(json.dumps(run | unknown))
        assert evaluate(str(own), credit_file) == 0
        assert "they may be among the validation rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "noted"),
    [(0.5, None), (0.2, None), (1.0, "--gold_share 1, not 0.5"), (None, "a --gold_share that is not recorded, not")],
)
def test_a_training_on_more_labels_than_the_comparison_is_noted(here, capsys, adapter, credit_file, trained, noted):
    own = Path(shutil.copytree(adapter, here / "own"))
    run = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(run | {"gold_share": trained}))
    assert evaluate(str(own), credit_file, "--gold_share", "0.5") == 0
    said = capsys.readouterr().err
    assert f"own was trained with {noted}" in said if noted else "was trained with" not in said


def test_a_calibration_of_another_split_is_refused(here, capsys, model_dir, credit_file, tmp_path):
    """Its calibration customers may be validation customers now; a base has no run.json that would tell."""
    evaluate(model_dir, credit_file, "--fit", "--split_seed", "1")
    with pytest.raises(InputError, match="fitted with --split_seed 1, evaluated with 0: its rows may be validation"):
        evaluate(model_dir, credit_file)
    assert evaluate(model_dir, credit_file, "--calibration", "contextual") == 0  # the way out that is named
    assert evaluate(model_dir, credit_file, "--fit") == 0
    other = tmp_path / "other.json"
    other.write_text(json.dumps(credit_rows(seed=3)))
    capsys.readouterr()
    assert evaluate(model_dir, str(other)) == 0
    assert "was fitted on rows of" in capsys.readouterr().err
    assert evaluate(model_dir, credit_file, "--gold_share", "0.5") == 0
    assert "was fitted with --gold_share 1, not 0.5" in capsys.readouterr().err


def test_a_text_without_a_known_feature_gets_a_note(here, capsys, model_dir):
    for text, noted in (("Age: 30", False), ("outstanding_debt: 30", False), ("hello", True), ("Height: 3", True)):
        assert infer_creditmix.main(["--model_dir", model_dir, *PLAIN, "--features", text]) == 0
        assert ("names none of Age, Occupation" in capsys.readouterr().err) == noted
    lines = [json.dumps({"features": text}) for text in ("Age: 30", "hello", "Age: many", "Outstanding Debt: 3")]
    write_lines(here / "in.jsonl", lines)
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 0
    assert "note: 2 of the rows scored now name no feature" in capsys.readouterr().err


def test_an_adapter_of_another_split_is_refused(here, adapter, credit_file, model_dir):
    other = save_adapter(here / "other", model_dir, split_seed=3)
    with pytest.raises(InputError, match="trained with --split_seed 3, evaluated with 0: rows would leak"):
        evaluate(other, credit_file)
    with pytest.raises(InputError, match="trained with --split_seed 0, evaluated with 3: rows would leak"):
        evaluate(adapter, credit_file, "--split_seed", "3")
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_per_class", "9999"], "credit.json: validation rows: 9999 rows a class asked for, but only"),
        (["--val_per_class", "0"], "at least 1"),
        (["--val_per_class", "5", "--val_frac", "0.1"], "--val_per_class or --val_frac, not both"),
        (["--bootstrap", "0"], "--bootstrap are at least 1"),
        (["--model_dir", "runs/nothing"], "runs/nothing: no such model folder; under runs/ there is no adapter yet"),
        (["--data", "missing.json"], r"missing\.json: no such file"),
    ],
)
def test_eval_refuses_wrong_input_and_leaves_nothing(here, model_dir, credit_file, flags, message):
    with pytest.raises(InputError, match=message):
        evaluate(model_dir, credit_file, *flags, "--report_dir", "report")
    with pytest.raises(InputError, match=r"at most 0\.3"):
        eval_creditmix.main(["--model_dir", model_dir, "--data", credit_file, "--val_frac", "0.5"])
    assert not list(here.iterdir())


def test_val_frac_is_a_share_of_all_rows(here, capsys, model_dir, credit_file):
    rows, _ = read_creditmix(credit_file)
    for share in (0.1, 0.0001):
        capsys.readouterr()
        flags = ["--model_dir", model_dir, "--data", credit_file, *PLAIN, "--bootstrap", "5", "--json"]
        assert eval_creditmix.main([*flags, "--val_frac", str(share)]) == 0
        wanted = 3 * max(1, round(share * len(rows) / 3))
        assert json.loads(capsys.readouterr().out)["data"]["validation_rows"] == wanted


# ------------------------------------------------------------------------------------------------------------- metrics


def test_point_metrics_by_hand():
    """Four rows: Good and Bad right, Standard once right and once taken for Good."""
    answers, predicted = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 2])
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.51, 0.4, 0.09], [0.05, 0.05, 0.9]])
    found = eval_creditmix.point_metrics(answers, predicted, probabilities)
    assert found["accuracy"] == 0.75
    # F1: Good 2*1/(1+2), Standard 2*1/(2+1), Bad 1
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert [found[f"recall_{label}"] for label in LABELS] == [1.0, 0.5, 1.0]
    assert found["nll"] == pytest.approx(-(np.log(0.5) + np.log(0.6) + np.log(0.4) + np.log(0.9)) / 4)
    squares = (0.25 + 0.09 + 0.04) + (0.04 + 0.16 + 0.04) + (0.2601 + 0.36 + 0.0081) + (0.0025 + 0.0025 + 0.01)
    assert found["brier"] == pytest.approx(squares / 4)
    # Bins of 1/15: 0.5 and 0.51 in [7/15, 8/15), one of two right; 0.6 in [9/15, 10/15); 0.9 in [13/15, 14/15)
    assert found["ece"] == pytest.approx((abs(1 - 1.01) + abs(1 - 0.6) + abs(1 - 0.9)) / 4)


def test_point_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 300)
    answers, predicted = rng.integers(0, 3, 300), probabilities.argmax(axis=1)
    found = eval_creditmix.point_metrics(answers, predicted, probabilities)
    assert found["accuracy"] == pytest.approx(accuracy_score(answers, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(answers, predicted, average="macro"))
    assert found["nll"] == pytest.approx(log_loss(answers, probabilities))


def test_certain_and_right_has_no_loss_and_certain_and_wrong_stays_finite():
    certain = np.eye(3)
    right = eval_creditmix.point_metrics(np.arange(3), np.arange(3), certain)
    assert (right["accuracy"], right["nll"], right["brier"], right["ece"]) == (1, 0, 0, 0)
    wrong = eval_creditmix.point_metrics(np.array([1, 2, 0]), np.arange(3), certain)
    assert wrong["accuracy"] == 0 and wrong["ece"] == 1 and wrong["brier"] == 2 and np.isfinite(wrong["nll"])


def test_weights_count_rows_as_often():
    """A row of weight 3 is three rows."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 50)
    answers, predicted, times = rng.integers(0, 3, 50), probabilities.argmax(axis=1), rng.integers(1, 4, 50)
    weighted = eval_creditmix.point_metrics(answers, predicted, probabilities, times.astype(float))
    repeated = eval_creditmix.point_metrics(
        answers.repeat(times), predicted.repeat(times), probabilities.repeat(times, axis=0)
    )
    for name in set(weighted) - {"aurc"}:
        assert weighted[name] == pytest.approx(repeated[name]), name
    # Three rows of one confidence are three steps of the curve, a row of weight 3 is a long one.
    assert weighted["aurc"] == pytest.approx(repeated["aurc"], abs=0.02)


def test_aurc_by_hand():
    """Surest first: right, right, wrong, right -> error rates 0, 0, 1/3, 1/4."""
    probabilities = np.array([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]])
    found = eval_creditmix.point_metrics(np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2]), probabilities)
    assert found["aurc"] == pytest.approx((1 / 3 + 1 / 4) / 4)
    weights = np.array([1.0, 1.0, 2.0, 1.0])  # error rates 0, 0, 2/4, 2/5 at coverages 1/5, 2/5, 4/5, 1
    found = eval_creditmix.point_metrics(np.array([0, 0, 0, 2]), np.array([0, 0, 1, 2]), probabilities, weights)
    assert found["aurc"] == pytest.approx(2 / 5 * 2 / 4 + 1 / 5 * 2 / 5)


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ([0.02, 0.02, 0.02, -0.02], "none"),  # three customers of four gain: one standard error is as much as they do
        ([0.02, 0.02, 0.02, 0.02], "fitted"),
        ([0.021, 0.02, 0.019, 0.01], "fitted"),
        ([-0.02, -0.02, -0.02, -0.02], "none"),
    ],
)
def test_auto_takes_the_simplest_calibrator_that_chance_could_make_the_likeliest(gains, wanted):
    """Rows of one customer are one observation: with twice as many rows of each nothing else is chosen."""
    for months in (1, 2):
        customers = [name for name in "abcd" for _ in range(months)]
        gained = np.repeat(gains, months)
        losses = {"none": np.full(len(gained), 0.6), "contextual": np.full(len(gained), 0.9), "fitted": 0.6 - gained}
        assert likeliest(losses, customers) == wanted


def test_rows_that_are_equally_sure_have_no_order():
    """Else the area under the risk-coverage curve would depend on how the file is sorted."""
    confidence, weights = np.array([0.9, 0.5, 0.5, 0.5]), np.ones(4)
    for right in ([1, 1, 1, 0], [1, 0, 1, 1]):
        coverage, accuracy = eval_creditmix.coverage_curve(np.array(right), confidence, weights)
        np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(accuracy, [1, 5 / 6, 7 / 9, 3 / 4])


def test_the_likeliest_calibrator_is_stored_and_used(here, capsys, adapter, credit_file):
    """By the likelihood of calibration rows; what is fitted is judged on customers that it did not see."""
    own = str(shutil.copytree(adapter, here / "own"))
    result = evaluate_json(capsys, own, credit_file, "--fit", "--calibration", "auto")["models"][0]
    stored = json.loads((here / "own/calibration.json").read_text())
    assert set(stored["nll"]) == {"none", "contextual", "batch", "fitted"}
    assert stored["calibration"] == result["calibration"]
    response = infer_one(capsys, own)
    assert response["prior"] == pytest.approx(stored["prior"], abs=1e-6)
    again = evaluate_json(capsys, own, credit_file)["models"][0]
    assert (again["calibration"], again["nll"]) == (result["calibration"], pytest.approx(result["nll"], abs=1e-6))


@pytest.mark.parametrize("method", ["none", "contextual", "batch", "fitted"])
def test_a_calibrator_that_is_named_is_stored_whatever_its_likelihood(here, capsys, adapter, credit_file, method):
    own = str(shutil.copytree(adapter, here / "own"))
    assert evaluate(own, credit_file, "--fit", "--calibration", method) == 0
    stored = json.loads((here / "own/calibration.json").read_text())
    assert stored["calibration"] == method
    response = infer_one(capsys, own)
    if method == "none":
        assert response["scores"] == response["raw_scores"]
    if method == "batch":  # the mean raw score of the calibration rows, whatever their labels
        rows, _ = read_creditmix(credit_file)
        flags = Namespace(split_seed=0, seed=0, data="x", gold_share=1)
        model = CreditModel.load(own, infer_creditmix.build_parser().parse_args(["--model_dir", own, *PLAIN]))
        drawn = eval_creditmix.draw(rows, "calibration", None, flags)
        mean = model.raw_scores([row.features for row in drawn]).mean(axis=0)
        np.testing.assert_allclose(list(stored["prior"].values()), mean, atol=1e-4)


def test_class_shares_change_the_odds(here, capsys, model_dir):
    plain = infer_one(capsys, model_dir)
    field = infer_one(capsys, model_dir, "--class_shares", "Good=0.25,Standard=0.45,Bad=0.3")
    for a, b, odds in (("Standard", "Good", 0.45 / 0.25), ("Bad", "Good", 0.3 / 0.25)):
        before, after = (r["probabilities"][a] / r["probabilities"][b] for r in (plain, field))
        assert after == pytest.approx(odds * before, rel=1e-3)
    assert field["prediction"] == max(field["probabilities"], key=field["probabilities"].get)
    even = infer_one(capsys, model_dir, "--class_shares", "Good=0.3333,Standard=0.3334,Bad=0.3333")
    assert even["scores"] == pytest.approx(plain["scores"], abs=1e-3)


def test_a_fit_is_evaluated_for_the_shares_of_the_field(here, capsys, adapter, credit_file):
    """With the calibration just fitted the evaluation says what inference says with it later."""
    own, shares = str(shutil.copytree(adapter, here / "own")), ("--class_shares", "Good=0.2,Standard=0.7,Bad=0.1")
    assert evaluate(own, credit_file, "--fit", *shares, "--report_dir", "report") == 0
    line = json.loads(next((here / "report").glob("*/predictions.jsonl")).read_text().splitlines()[0])
    flags = ["--model_dir", own, *PLAIN, "--features", line["features"], *shares]
    capsys.readouterr()
    assert infer_creditmix.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(line["probabilities"], abs=1e-4)


def test_class_shares_weigh_the_evaluation(here, capsys, adapter, credit_file):
    flags = ("--class_shares", "Good=0.2,Standard=0.7,Bad=0.1", "--baselines")
    model, *others = evaluate_json(capsys, adapter, credit_file, *flags)["models"]
    wanted = sum(share * model[f"recall_{label}"] for label, share in (("Good", 0.2), ("Standard", 0.7), ("Bad", 0.1)))
    assert model["accuracy"] == pytest.approx(wanted)
    for name, (low, high) in model["interval_95"].items():
        assert low <= model[name] <= high, name
    majority = next(other for other in others if other["model"] == "majority")
    assert majority["accuracy"] == pytest.approx(0.7)  # in this field the majority is Standard
    assert evaluate(adapter, credit_file, *flags) == 0
    report = capsys.readouterr().out
    shown = [float(line.split()[1]) for line in report.splitlines() if line.split()[:1] == ["accuracy"]]
    assert shown[0] == pytest.approx(wanted, abs=1e-4)  # scikit-learn's report is of the field as well


def test_unsure_rows_are_referred(here, capsys, model_dir, credit_file):
    response = infer_one(capsys, model_dir, "--abstain_below", "0.999")
    assert list(response) == [*FIELDS, "extra"] and response["extra"] == {"refer": True}
    assert infer_one(capsys, model_dir, "--abstain_below", "0.0001")["extra"] == {"refer": False}
    middle = sorted(response["probabilities"].values())[-1]
    found = evaluate_json(capsys, model_dir, credit_file, "--abstain_below", str(middle), "--report_dir", "report")
    abstain = found["models"][0]["abstain"]
    lines = [json.loads(line) for line in next((here / "report").glob("*/predictions.jsonl")).read_text().splitlines()]
    sure = [line for line in lines if not line["extra"]["refer"]]
    assert 0 < abstain["coverage"] < 1 and abstain["coverage"] == pytest.approx(len(sure) / len(lines))
    assert abstain["accuracy"] == pytest.approx(np.mean([line["prediction"] == line["answer"] for line in sure]))
    assert next((here / "report").glob("*/coverage.png")).stat().st_size > 1000


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


def test_intervals_resample_customers():
    """Ten equal rows of each customer say no more than one row: the interval must not get narrower."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 120)
    predicted = np.where(rng.random(120) < 0.7, answers, (answers + 1) % 3)
    names = [f"C{i}" for i in range(120)]
    truth, guess = answers.repeat(10), predicted.repeat(10)

    def accuracy(*arguments):
        truth, guess, names = arguments
        samples = eval_creditmix.bootstrap(truth, guess, 1.0 - (truth == guess), names, 2000, 0)
        np.testing.assert_allclose(samples["nll"], 1 - samples["accuracy"])  # these losses are the errors
        return eval_creditmix.interval(samples["accuracy"])

    low, high = accuracy(answers, predicted, names)
    assert accuracy(truth, guess, [n for n in names for _ in range(10)]) == (low, high)
    assert low < (answers == predicted).mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 120), rel=0.2)  # the binomial width
    alone = accuracy(truth, guess, [str(i) for i in range(1200)])
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_what_the_design_fixes_is_no_uncertainty():
    """The rows are drawn balanced: which of their customers a resample has must not move the shares of the labels."""
    answers, names = np.arange(300) % 3, [f"C{i}" for i in range(300)]
    one = eval_creditmix.bootstrap(answers, np.zeros(300, int), np.ones(300), names, 500, 0)
    assert eval_creditmix.interval(one["accuracy"]) == pytest.approx((1 / 3, 1 / 3))
    # Of one label every second row is right, of the others all are or none is: only the former varies.
    right = (answers == 0) | ((answers == 1) & (np.arange(300) % 2 == 0))
    predicted = np.where(right, answers, (answers + 1) % 3)
    for weights, share in ((1.0, 1 / 3), (3 * np.array([0.2, 0.7, 0.1])[answers], 0.7)):
        samples = eval_creditmix.bootstrap(answers, predicted, 1.0 - right, names, 4000, 0, weights)
        low, high = eval_creditmix.interval(samples["accuracy"])
        assert high - low == pytest.approx(2 * 1.96 * share * np.sqrt(0.25 / 100), rel=0.1)
        assert (low + high) / 2 == pytest.approx(np.average(right, weights=weights * np.ones(300)), abs=0.01)
        np.testing.assert_allclose(samples["nll"], 1 - samples["accuracy"])


def test_a_model_is_measured_by_customer():
    """Ten equal months of each customer: the intervals are those of one month."""
    rng = np.random.default_rng(0)
    once = [CreditRow(f"C{i}", f"Age: {20 + i}", LABELS[i % 3]) for i in range(90)]
    probabilities = rng.dirichlet(np.ones(3), 90)
    args = eval_creditmix.build_parser().parse_args(["--model_dir", "x"])
    one = eval_creditmix.measure(once, probabilities, args)
    ten = eval_creditmix.measure([row for row in once for _ in range(10)], probabilities.repeat(10, axis=0), args)
    for name, ends in one["interval_95"].items():
        assert ten["interval_95"][name] == pytest.approx(ends)


def test_differences_are_paired():
    """Two models that differ on 6 of 120 rows: the difference is known far better than either accuracy."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 120)
    worse = np.where(rng.random(120) < 0.7, answers, (answers + 1) % 3)
    better = worse.copy()
    better[np.flatnonzero(worse != answers)[:6]] = answers[np.flatnonzero(worse != answers)[:6]]
    names = [f"C{i}" for i in range(120)]
    models = [
        {"model": name, "accuracy": (predicted == answers).mean(), "macro_f1": 0.0, "nll": 0.0}
        | {f"recall_{label}": 0.0 for label in LABELS}
        | {"samples": eval_creditmix.bootstrap(answers, predicted, np.ones(120), names, 2000, 0)}
        for name, predicted in (("better", better), ("worse", worse))
    ]
    eval_creditmix.add_differences(models, models[1])
    point, low, high = models[0]["difference"]["accuracy"]
    assert point == pytest.approx(6 / 120) and 0 < low < point < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.05 * 0.95 / 120), rel=0.2)
    assert models[0]["difference"]["to"] == "worse" and "difference" not in models[1]


@pytest.mark.parametrize(
    "line", ['{"features": "Age: 3", "note": "\\ud800"}', "[" * 100_000, '{"features": "Age: 3", "x": NaN}']
)
def test_a_line_that_could_not_be_written_back_carries_an_error(line):
    """Half a surrogate pair, nesting that Python cannot follow, NaN."""
    row, text = batch_files.parse_line(line, ("features",))
    assert text is None and row["error"]["code"] == "not_json"
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def test_a_line_that_is_not_utf8_carries_an_error_and_the_others_are_done(here, model_dir):
    (here / "in.jsonl").write_bytes(b'{"features": "Age: 3"}\n{"features": "caf\xe9"}\n{"features": "caf\xc3\xa9"}\n')
    assert infer_file(model_dir, "in.jsonl", "out.jsonl") == 1
    first, second, third = read_lines(here / "out.jsonl")
    assert second == {"error": {"code": "not_utf8", "message": "the line is not UTF-8 text"}}
    assert first["prediction"] in LABELS and third["features"] == "café"
