"""eval_creditmix: rows of the right customers, leaks refused, metrics, reports and tables on the tiny model."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    FLOAT32,
    HOLD,
    PLAIN,
    evaluate,
    evaluate_json,
    infer_one,
    labelled_rows,
    other_process,
    read_lines,
    write_lines,
)

import creditmix_prepare
import eval_creditmix
import export_adapter
import infer_creditmix
import kd_prepare
import kd_train
import sft_train
from common import InputError
from distil.creditmix import evaluation
from distil.creditmix.evaluation import EvalOptions, draw, draw_samples, usable
from distil.creditmix.metrics import baselines
from distil.creditmix.model import CreditOptions
from distil.creditmix.rows import CreditRow, read_rows
from distil.creditmix.tabular import tabular_teacher
from distil.files import file_sha256
from distil.splits import is_gold, split_of
from distil.tasks import Task, default_task, task_of
from distil.testing import credit_rows, save_adapter

LABELS = default_task().labels


def eval_options(task: Task | None = None, **changes) -> EvalOptions:
    task = task or default_task()
    scoring = CreditOptions({label: [label] for label in task.labels}, (0.0,) * len(task.labels), task=task)
    return EvalOptions("x", "", scoring, **changes)


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("split_seed", range(5))
@pytest.mark.parametrize("seed", [0, 3])
def test_validation_fit_and_training_rows_share_no_customer(split_seed, seed):
    rows, args = labelled_rows(), eval_options(split_seed=split_seed, seed=seed)
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
    args = eval_options(fit=True, baselines=True, fit_per_class=fit_per_class, **how)
    drawn = dict(zip(("validation", "calibration", "train"), draw_samples(labelled_rows(), args), strict=True))
    for split, rows in drawn.items():
        assert rows and {split_of(row.customer) for row in rows} == {split}
    assert len(drawn["calibration"]) <= 3 * fit_per_class
    assert draw_samples(labelled_rows(), eval_options(**how))[1:] == ([], [])


def test_a_share_of_the_gold_labels_limits_all_but_validation():
    """A larger share has the customers of a smaller one, so that scripts and runs can be compared."""
    rows, customers = labelled_rows(), {}
    for share in (0.2, 0.5, 1.0):
        validation, *others = draw_samples(rows, eval_options(gold_share=share, fit=True, baselines=True))
        assert validation == draw(rows, "validation", None, eval_options())
        assert all(is_gold(row.customer, share, 0) for part in others for row in part)
        customers[share] = {row.customer for row in rows if is_gold(row.customer, share, 0)}
    assert customers[0.2] < customers[0.5] < customers[1.0] and 40 < len(customers[0.2]) < 120


def test_a_split_without_rows_of_a_label_is_refused():
    rows = [row for row in labelled_rows() if row.label != "Bad"]
    for per_class in (None, 5):
        with pytest.raises(InputError, match=r"x: validation rows: .* only 0 are Bad"):
            draw(rows, "validation", per_class, eval_options())


def test_the_evaluations_teacher_is_the_one_that_labels_kd_rows(credit_file):
    """Of all training rows whose labels may be used, not only of the balanced ones that the other baselines have."""
    args = eval_options(gold_share=0.5, bootstrap=10)
    rows, _ = read_rows(credit_file, default_task())
    train, validation = draw(rows, "train", None, args), draw(rows, "validation", None, args)
    pool = [row for row in rows if split_of(row.customer) == "train" and is_gold(row.customer, 0.5, 0)]
    assert len(pool) > len(train) and pool == usable(rows, "train", args)
    results = {result["model"]: result for result in baselines(train, pool, validation, args.task, args.measurement)}
    labelled_by = tabular_teacher([*validation, *pool], [False] * len(validation) + [True] * len(pool), 0, args.task)
    assert results["tabular teacher"]["probabilities"] == pytest.approx(labelled_by[: len(validation)], abs=1e-6)


def test_rows_to_fit_on_are_limited_by_their_flag(here, model_dir, credit_file):
    own = shutil.copytree(model_dir, here / "own")
    for count in (7, 4):
        assert evaluate(str(own), credit_file, "--fit", "--fit_per_class", str(count)) == 0
        stored = json.loads((own / "calibration.json").read_text())
        assert stored["fitted_on"]["rows"] == 3 * count


def test_val_frac_is_a_share_of_all_rows(here, capsys, model_dir, credit_file):
    rows, _ = read_rows(credit_file, default_task())
    for share in (0.1, 0.0001):
        capsys.readouterr()
        flags = ["--model_dir", model_dir, "--data", credit_file, *PLAIN, "--bootstrap", "5", "--json"]
        assert eval_creditmix.main([*flags, "--val_frac", str(share)]) == 0
        wanted = 3 * max(1, round(share * len(rows) / 3))
        assert json.loads(capsys.readouterr().out)["data"]["validation_rows"] == wanted


def test_baselines_learn_nothing_from_validation_customers(here, capsys, model_dir):
    """Labels by chance and rows that tell customers apart: only a model that saw a customer knows its label."""
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
    measured = evaluate_json(capsys, model_dir, "chance.json", *flags, "--val_per_class", "150")["models"]
    assert measured[-1]["model"] == "gradient boosting"
    assert measured[-1]["accuracy"] < 0.5


def test_fitting_lowers_the_nll_of_the_rows_it_was_fitted_on(here, capsys, credit_adapter, credit_file, monkeypatch):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    real = evaluation.draw
    with monkeypatch.context() as patch:  # measure on the very rows of the fit
        patch.setattr(evaluation, "draw", lambda rows, _, n, args: real(rows, "calibration", None, args))
        result = evaluate_json(capsys, own, credit_file, "--fit", "--calibration", "fitted")["models"][0]
    assert result["nll"] < min(result["calibrations"]["none"]["nll"], result["calibrations"]["contextual"]["nll"])
    assert result["nll"] <= np.log(3) + 1e-6  # zero weight on the scores is among what was fitted


# ------------------------------------------------------------------------------------------------------------- results


def test_eval_json_holds_the_metrics_with_intervals_around_them(here, capsys, model_dir, credit_file):
    summary = evaluate_json(capsys, model_dir, credit_file)
    assert summary["data"]["validation_rows"] == 60 and summary["split_seed"] == 0
    (result,) = summary["models"]
    assert result["model"] == model_dir and result["calibration"] == "contextual"
    assert {"accuracy", "macro_f1", "nll", "brier", "ece", "interval_95", "recall_Good"} <= set(result)
    for name, (low, high) in result["interval_95"].items():
        lowest = -1 if name in ("mcc", "gini") else 0
        assert lowest <= low <= result[name] <= high and (high <= 1 or name == "nll"), name
    recalls = {f"recall_{label}" for label in LABELS}
    assert set(result["interval_95"]) == {"accuracy", "macro_f1", "nll", "mcc", "auc", "gini"} | recalls
    assert set(result["calibrations"]) == {"none", "contextual"}
    assert result["calibrations"]["contextual"]["nll"] == result["nll"]
    assert result["calibrations"]["none"]["nll"] != result["nll"]


def test_eval_agrees_with_infer_on_rows_of_validation_customers(here, capsys, credit_adapter, credit_file):
    assert evaluate(credit_adapter, credit_file, "--report_dir", "report", "--baselines", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    metrics = json.loads((here / "report/metrics.json").read_text())
    assert metrics == summary
    names = [result["model"] for result in summary["models"]]
    assert names == [credit_adapter, "majority", "logistic regression", "tabular teacher", "gradient boosting"]
    for folder in ("creditmix_sft", "majority", "logistic_regression", "tabular_teacher", "gradient_boosting"):
        files = sorted(path.name for path in (here / "report" / folder).iterdir())
        assert files == ["confusion_matrix.png", "coverage.png", "predictions.jsonl", "reliability.png"]
        assert (here / "report" / folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    lines = read_lines(here / "report/creditmix_sft/predictions.jsonl")
    assert Counter(line["answer"] for line in lines) == dict.fromkeys(LABELS, 20)
    right = np.mean([line["prediction"] == line["answer"] for line in lines])
    assert right == pytest.approx(summary["models"][0]["accuracy"])
    rows, _ = read_rows(credit_file, default_task())
    owner = {row.features: row.customer for row in rows}
    assert {split_of(owner[line["features"]]) for line in lines} == {"validation"}

    write_lines(here / "in.jsonl", [json.dumps({"features": line["features"]}) for line in lines])
    files = ["--input", "in.jsonl", "--output", "out.jsonl"]
    assert infer_creditmix.main(["--model_dir", credit_adapter, *PLAIN, *files]) == 0
    for line, result in zip(lines, read_lines(here / "out.jsonl"), strict=True):
        assert result["scores"] == pytest.approx(line["scores"], abs=1e-4)

    majority, linear, teacher, boosted = summary["models"][1:]
    assert majority["accuracy"] == pytest.approx(1 / 3) and majority["nll"] == pytest.approx(np.log(3))
    assert linear["accuracy"] > 0.5 and min(teacher["accuracy"], boosted["accuracy"]) > 0.8  # debt decides


def test_any_model_is_the_reference(here, capsys, credit_adapter, model_dir, credit_file):
    flags = ("--model_dir", model_dir, credit_adapter, "--baselines", "--calibration", "none")
    for name in ("tabular teacher", credit_adapter):
        measured = evaluate_json(capsys, model_dir, credit_file, *flags, "--reference", name)["models"]
        assert {m["difference"]["to"] for m in measured if "difference" in m} == {name}
        assert [m["model"] for m in measured if "difference" not in m] == [name]
        of = {m["model"]: m for m in measured}
        point, low, high = of[model_dir]["difference"]["nll"]
        assert point == pytest.approx(of[model_dir]["nll"] - of[name]["nll"]) and low <= point <= high
    with pytest.raises(InputError, match="--reference: only with several models"):
        eval_creditmix.main(["--model_dir", model_dir, "--data", credit_file, "--reference", "majority"])


def test_models_side_by_side_keep_their_reports_apart(here, capsys, credit_adapter, credit_file):
    other = str(shutil.copytree(credit_adapter, here / "other/creditmix_sft"))
    assert evaluate(credit_adapter, credit_file, "--model_dir", credit_adapter, other, "--report_dir", "report") == 0
    out = capsys.readouterr().out
    assert f"{credit_adapter} " in out and f"{other} " in out
    assert len(list((here / "report").glob("*/predictions.jsonl"))) == 2


def test_the_table_comes_first_and_details_need_verbose(here, capsys, model_dir, credit_file):
    shown = {}
    for flags in ((), ("--verbose",), ("--reference", "majority")):
        assert evaluate(model_dir, credit_file, "--baselines", *flags) == 0
        shown[flags] = capsys.readouterr().out
        assert shown[flags].startswith("60 validation rows, 20 a class")
    assert f"{model_dir}  calibration contextual; NLL: none " in shown[()]
    details = shown["--verbose",]
    assert "\nabove gradient boosting on the same rows" in details and "above" not in shown[()]
    assert "\nabove majority on the same rows" in shown["--reference", "majority"]
    assert "confusion matrix" in details and "precision" in details and "  calibration none" in details
    assert "confusion matrix" not in shown[()] and "precision" not in shown[()]


def test_a_fit_is_evaluated_for_the_shares_of_the_field(here, capsys, credit_adapter, credit_file):
    """With the calibration just fitted the evaluation has the probabilities that inference has later."""
    own, shares = (
        str(shutil.copytree(credit_adapter, here / "own")),
        ("--class_shares", "Good=0.2,Standard=0.7,Bad=0.1"),
    )
    assert evaluate(own, credit_file, "--fit", *shares, "--report_dir", "report") == 0
    line = json.loads(next((here / "report").glob("*/predictions.jsonl")).read_text().splitlines()[0])
    flags = ["--model_dir", own, *PLAIN, "--features", line["features"], *shares]
    capsys.readouterr()
    assert infer_creditmix.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(line["probabilities"], abs=1e-4)


def test_class_shares_weigh_the_evaluation(here, capsys, credit_adapter, credit_file):
    flags = ("--class_shares", "Good=0.2,Standard=0.7,Bad=0.1", "--baselines")
    model, *others = evaluate_json(capsys, credit_adapter, credit_file, *flags)["models"]
    wanted = sum(share * model[f"recall_{label}"] for label, share in (("Good", 0.2), ("Standard", 0.7), ("Bad", 0.1)))
    assert model["accuracy"] == pytest.approx(wanted)
    for name, (low, high) in model["interval_95"].items():
        assert low <= model[name] <= high, name
    majority = next(other for other in others if other["model"] == "majority")
    assert majority["accuracy"] == pytest.approx(0.7)  # in this field the majority is Standard
    assert evaluate(credit_adapter, credit_file, *flags, "--verbose") == 0
    report = capsys.readouterr().out
    shown = [float(line.split()[1]) for line in report.splitlines() if line.split()[:1] == ["accuracy"]]
    assert shown[0] == pytest.approx(wanted, abs=1e-4)  # scikit-learn's report is of the field as well


def test_uncertain_rows_are_measured_as_flagged_for_review(here, capsys, model_dir, credit_file):
    middle = max(infer_one(capsys, model_dir)["probabilities"].values())
    measured = evaluate_json(capsys, model_dir, credit_file, "--abstain_below", str(middle), "--report_dir", "report")
    abstain = measured["models"][0]["abstain"]
    lines = read_lines(next((here / "report").glob("*/predictions.jsonl")))
    sure = [line for line in lines if not line["extra"]["refer"]]
    assert 0 < abstain["coverage"] < 1 and abstain["coverage"] == pytest.approx(len(sure) / len(lines))
    assert abstain["accuracy"] == pytest.approx(np.mean([line["prediction"] == line["answer"] for line in sure]))
    assert next((here / "report").glob("*/coverage.png")).stat().st_size > 1000


# --------------------------------------------------------------------------------------------------------- other tasks

LOANS = {
    "name": "loans",
    "instruction": "Will this loan be repaid?",
    "labels": ["no", "yes"],
    "label_column": "repaid",
    "label_map": {"0": "no", "1": "yes"},
    "fields": [{"name": "Sum", "kind": "number"}, {"name": "Grade"}],
}
TOPICS = {
    "name": "topics",
    "instruction": "Which of the topics is this about?",
    "labels": [f"topic {n}" for n in range(25)],
    "label_column": "topic",
    "text_column": "text",
}


def write_loans(path: Path, count: int = 300) -> str:
    """Write loans of which one in four is not repaid, mostly large ones, and the task; return the file's name."""
    rng = random.Random(0)
    lines = ["Sum,Grade,repaid"]
    for n in range(count):
        repaid = n % 4 > 0
        lines.append(f"{rng.randint(100, 300) + 100 * (not repaid)},{rng.choice('AB')},{int(repaid)}")
    path.write_text("\n".join(lines) + "\n")
    path.with_name("task.json").write_text(json.dumps(LOANS))
    return str(path)


def write_topics(path: Path) -> str:
    """Write texts of 25 topics, the last of which has a single one, and the task; return the file's name."""
    rng = random.Random(0)
    lines = ["text,topic"] + [f"word{n % 24} again {rng.random()},topic {n % 24}" for n in range(24 * 24)]
    path.write_text("\n".join([*lines, "the only one,topic 24"]) + "\n")
    record = TOPICS | {"labels": TOPICS["labels"][:24]}
    path.with_name("task.json").write_text(json.dumps(record))
    return str(path)


def evaluate_task(model: str, data: str, *flags: str) -> int:
    """Return the exit status of an evaluation of the task next to the data on all validation rows."""
    task = str(Path(data).with_name("task.json"))
    prior = FLOAT32 if "none" in flags and "--fit" not in flags else PLAIN
    return eval_creditmix.main(
        ["--model_dir", model, "--data", data, "--task", task, *prior, "--bootstrap", "50", *flags]
    )


def test_rows_of_an_unbalanced_task_are_all_of_their_part():
    """And of a limited number of each label the first of the same order; no row is in two parts."""
    task = task_of(LOANS, "test")
    rows = [CreditRow(str(n), f"Sum: {n}", task.labels[n % 4 > 0]) for n in range(400)]
    parts = dict(
        zip(
            ("validation", "calibration", "train"),
            draw_samples(rows, eval_options(task, fit=True, baselines=True)),
            strict=True,
        )
    )
    for part, drawn in parts.items():
        assert {row.customer for row in drawn} == {row.customer for row in rows if task.part_of(row.customer) == part}
    assert len(parts["validation"]) < 0.25 * len(rows) < 0.65 * len(rows) < len(parts["train"])
    few = draw_samples(rows, eval_options(task, fit=True, val_per_class=9, fit_per_class=4))
    assert [Counter(row.label for row in drawn) for drawn in few[:2]] == [{"no": 9, "yes": 9}, {"no": 4, "yes": 4}]
    assert not few[2] and set(few[0]) < set(parts["validation"])


def test_a_task_of_two_labels_is_evaluated_in_its_class_proportions(here, capsys, model_dir):
    own, data = str(shutil.copytree(model_dir, here / "own")), write_loans(here / "loans.csv")
    rows, _ = read_rows(data, task := task_of(LOANS, "test"))
    part = [row for row in rows if task.part_of(row.customer) == "validation"]
    capsys.readouterr()
    assert evaluate_task(own, data, "--fit", "--calibration", "auto", "--baselines", "--json") == 0
    output = capsys.readouterr()
    table = output.err[output.err.index(f"{len(part)} validation rows, 2 labels as they occur; ") :].splitlines()
    assert table[0].endswith("95 % intervals by row bootstrap") and "AUC" in table[1] and "recall" not in table[1]
    summary = json.loads(output.out)
    assert summary["task"] == "loans" and summary["data"]["validation_rows"] == len(part)
    model, majority, linear, teacher, boosted = summary["models"]
    share = np.mean([row.label == "yes" for row in part])
    assert majority["accuracy"] == pytest.approx(share) and majority["auc"] == 0.5 and majority["mcc"] == 0
    assert min(result["auc"] for result in (linear, teacher, boosted)) > 0.8
    assert model["gini"] == pytest.approx(2 * model["auc"] - 1) and 0 <= model["ks"] <= 1
    for name in ("auc", "nll"):  # paired, to gradient boosting
        point, low, high = model["difference"][name]
        assert point == pytest.approx(model[name] - boosted[name]) and low <= point <= high
    stored = json.loads((here / "own/calibration.json").read_text())
    calibration = [row for row in rows if task.part_of(row.customer) == "calibration"]
    assert stored["fitted_on"]["rows"] == len(calibration) and list(stored["bias"]) == ["no", "yes"]


def test_a_text_task_of_many_labels_has_tf_idf_beside_it(here, capsys, model_dir):
    data = write_topics(here / "topics.csv")
    with pytest.raises(InputError, match="topic 24"):  # in the data, not in the task
        evaluate_task(model_dir, data, "--calibration", "none")
    write_topics(here / "topics.csv")
    record = json.loads((here / "task.json").read_text())
    (here / "task.json").write_text(json.dumps(record | {"label_map": {"topic 24": "topic 0"}}))
    flags = ("--calibration", "none", "--baselines", "--reference", "tf-idf", "--report_dir", "report", "--verbose")
    assert evaluate_task(model_dir, data, *flags) == 0
    model, majority, tfidf = json.loads((here / "report/metrics.json").read_text())["models"]
    assert (majority["model"], tfidf["model"]) == ("majority", "tf-idf")
    assert tfidf["accuracy"] > 0.9 and tfidf["nll"] < 1.5 and tfidf["auc"] > 0.99
    assert model["difference"]["to"] == "tf-idf" and "auc" not in model["interval_95"]
    shown = capsys.readouterr().out
    assert "confusion matrix" not in shown and "precision" in shown
    assert (here / "report/tf-idf/confusion_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_labels_without_validation_rows_and_changed_proportions_are_noted(here, capsys, model_dir):
    data = write_loans(here / "loans.csv")
    (here / "task.json").write_text(json.dumps(LOANS | {"labels": ["no", "yes", "later", "never"]}))
    assert evaluate_task(model_dir, data, "--calibration", "none", "--val_per_class", "5", "--json") == 0
    output = capsys.readouterr()
    assert "no validation row is later, never: no recall" in output.err
    assert "--val_per_class: rows have other class proportions than the data" in output.err
    (model,) = json.loads(output.out)["models"]
    assert {name for name in model if name.startswith("recall_")} == {"recall_no", "recall_yes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--val_frac", "0.1"), "--val_frac: only for balanced tasks; all validation rows of loans are taken"),
        (("--class_shares", "no=0.5,yes=0.5"), "--class_shares: "),
        (("--baselines", "--reference", "tf-idf"), "--reference tf-idf is not one of .*gradient boosting"),
    ],
)
def test_flags_that_a_task_does_not_have_are_refused(here, model_dir, flags, message):
    with pytest.raises(InputError, match=message):
        evaluate_task(model_dir, write_loans(here / "loans.csv"), *flags, "--report_dir", "report")
    assert not (here / "report").exists()


# -------------------------------------------------------------------------------------------------- notes and refusals


def test_a_fit_on_few_customers_gets_a_note(here, capsys, credit_adapter, credit_file):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    evaluate(own, credit_file, "--fit")
    assert "customers may do harm" in capsys.readouterr().err
    evaluate(own, credit_file, "--fit", "--calibration", "auto")  # which needs 50
    assert "customers may do harm" in capsys.readouterr().err
    evaluate(own, credit_file)
    assert "customers may do harm" not in capsys.readouterr().err


def test_data_other_than_the_trainings_is_noted(here, capsys, credit_adapter, credit_file):
    own = Path(shutil.copytree(credit_adapter, here / "own"))
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
def test_a_training_on_more_labels_than_the_comparison_is_noted(
    here, capsys, credit_adapter, credit_file, trained, noted
):
    own = Path(shutil.copytree(credit_adapter, here / "own"))
    run = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps(run | {"gold_share": trained}))
    assert evaluate(str(own), credit_file, "--gold_share", "0.5") == 0
    shown = capsys.readouterr().err
    assert f"own was trained with {noted}" in shown if noted else "was trained with" not in shown


def test_a_calibration_of_another_split_is_refused(here, capsys, model_dir, credit_file, tmp_path):
    """Its calibration customers may be validation customers now; a base has no run.json to tell from."""
    model_dir = str(shutil.copytree(model_dir, here / "own"))
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


def test_an_adapter_of_another_split_is_refused(here, credit_adapter, credit_file, model_dir):
    other = save_adapter(here / "other", model_dir, split_seed=3)
    with pytest.raises(InputError, match="trained with --split_seed 3, evaluated with 0: rows would leak"):
        evaluate(other, credit_file)
    with pytest.raises(InputError, match="trained with --split_seed 0, evaluated with 3: rows would leak"):
        evaluate(credit_adapter, credit_file, "--split_seed", "3")
    assert not (here / "runs").exists()


@pytest.fixture
def trained(here, credit_file, llama_dir):
    """Return a function that trains two steps on data of split seed 7, or as the flags say, and returns the folder."""

    def train(name: str, *flags: str) -> str:
        if not Path("data").exists():
            assert creditmix_prepare.main(["--src", credit_file, "--outdir", "data", "--split_seed", "7"]) == 0
        argv = ["--student", llama_dir, "--data", "data/creditmix_sft.jsonl", "--save_dir", name, *FLOAT32]
        assert sft_train.main([*argv, "--max_steps", "2", "--warmup_steps", "0", *flags]) == 0
        return name

    return train


def exported(adapter: str) -> str:
    assert export_adapter.main(["--model_dir", adapter, "--save_dir", f"{adapter}_merged", "--rows", "0"]) == 0
    return f"{adapter}_merged"


LEAK = "trained with --split_seed 7, evaluated with 0: rows would leak"


def test_an_export_of_another_split_is_refused_and_so_is_what_was_trained_on_it(here, capsys, trained, credit_file):
    """An adapter, its export, an adapter on that, and that one's export; under 7 nothing is noted."""
    first = trained("first")
    merged = exported(first)
    second = trained("second", "--student", merged)
    for model in (first, merged, second, exported(second)):
        with pytest.raises(InputError, match=LEAK):
            evaluate(model, credit_file)
        capsys.readouterr()
        assert evaluate(model, credit_file, "--split_seed", "7", "--calibration", "none") == 0
        assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["adapter", "export"])
def test_a_student_of_a_teacher_of_another_split_is_refused(here, capsys, trained, credit_file, form):
    """Rows of the evaluation's split are not answered by it; on rows of unknown origin the teacher's split counts."""
    teacher = trained("teacher") if form == "adapter" else exported(trained("teacher"))
    assert creditmix_prepare.main(["--src", credit_file, "--outdir", "zero"]) == 0
    write_lines("plain.jsonl", [{"input": row["input"]} for row in read_lines("zero/creditmix_sft.jsonl")])
    ask = ["--teacher", teacher, "--labels", "Good,Standard,Bad", *FLOAT32]
    with pytest.raises(InputError, match=r"teacher.* was trained with --split_seed 7, zero/creditmix_sft.jsonl has 0"):
        kd_prepare.main([*ask, "--input", "zero/creditmix_sft.jsonl", "--output", "kd.jsonl"])
    assert kd_prepare.main([*ask, "--input", "plain.jsonl", "--output", "kd.jsonl"]) == 0
    student = ["--data", "kd.jsonl", "--save_dir", "student", "--max_steps", "2", "--warmup_steps", "0", *FLOAT32]
    assert kd_train.main(["--student", json.loads(Path("teacher/run.json").read_text())["base_model"], *student]) == 0
    for model in ("student", exported("student")):
        with pytest.raises(InputError, match=LEAK):
            evaluate(model, credit_file)
        capsys.readouterr()
        assert evaluate(model, credit_file, "--split_seed", "7", "--calibration", "none") == 0
        assert "on rows whose source is not recorded; they may be among" in capsys.readouterr().err


@pytest.mark.parametrize(("record", "noted"), [({"adapter": "a"}, True), (None, False)])
def test_an_export_without_a_record_of_its_rows_is_noted(here, capsys, model_dir, credit_file, record, noted):
    own = shutil.copytree(model_dir, here / "own")
    if record:
        (own / "export.json").write_text(json.dumps(record))
    assert evaluate(str(own), credit_file) == 0
    assert ("own was trained on rows whose source is not recorded" in capsys.readouterr().err) == noted


def test_the_gold_share_of_an_export_is_compared(here, capsys, model_dir, credit_file):
    own = shutil.copytree(model_dir, here / "own")
    record = {"split_seed": 0, "sources": [{"file": credit_file, "sha256": file_sha256(credit_file)}]}
    for share, noted in ((0.5, False), (1.0, True)):
        (own / "export.json").write_text(json.dumps(record | {"gold_share": share}))
        assert evaluate(str(own), credit_file, "--gold_share", "0.5") == 0
        assert ("own was trained with --gold_share 1, not 0.5" in capsys.readouterr().err) == noted


def test_rows_that_name_no_customer_are_noted(here, capsys, model_dir, credit_file):
    rows = [row | {"customer_id": "nan"} for row in json.loads(Path(credit_file).read_text())]
    Path("nan.json").write_text(json.dumps(rows))
    assert evaluate(model_dir, "nan.json") == 0
    assert "rows have no customer id, each text counts as a customer" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["report", "own/calibration.json"])
def test_two_evaluations_do_not_write_to_one_place(here, model_dir, credit_file, place):
    own = shutil.copytree(model_dir, here / "own")
    with other_process(HOLD, here / place), pytest.raises(InputError, match=r"another run \(process \d+\) is writing"):
        evaluate(str(own), credit_file, "--report_dir", "report", "--fit", "--calibration", "none")
    assert not list(here.glob("report/*")) and not (own / "calibration.json").exists()


def test_every_model_is_looked_up_before_the_first_is_scored(here, credit_adapter, credit_file, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_model", lambda *args: pytest.fail("scored"))
    with pytest.raises(InputError, match="nobody/no-such-model: neither in the local cache"):
        evaluate(credit_adapter, credit_file, "--model_dir", credit_adapter, "nobody/no-such-model")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_per_class", "9999"], "credit.json: validation rows: 9999 rows a class requested, but only"),
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
