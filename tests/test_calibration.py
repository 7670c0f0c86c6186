"""Calibrations: what they do to scores, how they are fitted and compared."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import PLAIN, evaluate, evaluate_json, infer_one
from scipy.special import softmax

import infer_creditmix
from common import Calibration, InputError
from distil import calibration
from distil.calibration import (
    calibration_path,
    candidates,
    choose_method,
    cross_fitted_probabilities,
    fit_calibration,
    fit_shares,
    row_losses,
    uncalibrated,
    with_shares,
)
from distil.creditmix.evaluation import EvalOptions, draw
from distil.creditmix.model import CreditModel, credit_options
from distil.creditmix.rows import read_rows
from distil.files import cache_dir
from distil.models import ModelRef, model_fingerprint, resolve
from distil.splits import split_of
from distil.tasks import default_task
from distil.testing import save_adapter

LABELS = default_task().labels


@pytest.fixture
def raw() -> np.ndarray:
    return np.random.default_rng(0).normal(-2, 1, (50, 3))


def test_a_uniform_prior_changes_nothing(raw):
    plain = Calibration("none", np.zeros(3), np.zeros(3))
    uniform = Calibration("contextual", np.full(3, np.log(1 / 3)), np.zeros(3))
    np.testing.assert_array_equal(uniform.scores(raw).argmax(axis=1), raw.argmax(axis=1))
    np.testing.assert_allclose(uniform.probabilities(raw), plain.probabilities(raw), atol=1e-12)
    np.testing.assert_allclose(plain.probabilities(raw), softmax(raw, axis=1), atol=1e-12)


def test_the_prior_is_subtracted_and_the_bias_added(raw):
    prior, bias = np.array([-2.44, -1.49, -0.62]), np.array([0.0, 0.3, -0.1])
    used = Calibration("contextual", prior, bias)
    np.testing.assert_allclose(used.scores(raw), raw - prior + bias)
    # The whitepaper's example response: raw - prior = scores.
    example = Calibration("contextual", prior, np.zeros(3)).scores(np.array([[-3.78, -0.28, -1.52]]))
    np.testing.assert_allclose(example, [[-1.34, 1.21, -0.90]], atol=1e-9)


def test_a_bias_moves_decisions_towards_its_label(raw):
    counts = []
    for shift in (-10, -1, 0, 1, 10):
        used = Calibration("contextual", np.zeros(3), np.array([0, shift, 0]))
        counts.append(int((used.scores(raw).argmax(axis=1) == 1).sum()))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(raw)


def test_the_temperature_keeps_the_argmax_and_moves_the_confidence(raw):
    answers = raw.argmax(axis=1)
    confidence = []
    for temperature in (0.5, 1.0, 3.0):
        probabilities = Calibration("fitted", np.zeros(3), np.zeros(3), temperature).probabilities(raw)
        np.testing.assert_array_equal(probabilities.argmax(axis=1), answers)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        confidence.append(probabilities.max(axis=1).mean())
    assert confidence[0] > confidence[1] > confidence[2]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_fitting_recovers_a_known_bias_and_temperature(temperature):
    """Answers drawn from softmax((raw - prior + bias) / T) lead back to bias and T, and to a lower NLL."""
    rng = np.random.default_rng(0)
    prior, bias = np.array([-1.0, -3.0, 0.5]), np.array([0.6, -0.9, 0.3])
    raw = rng.normal(0, 1.5, (20_000, 3)) + prior
    truth = softmax((raw - prior + bias) / temperature, axis=1)
    answers = (truth.cumsum(axis=1) < rng.random((len(raw), 1))).sum(axis=1)
    fitted = fit_calibration(raw, prior, answers)
    np.testing.assert_allclose(fitted.temperature, temperature, rtol=0.05)
    np.testing.assert_allclose(fitted.bias, bias, atol=0.1)  # the true ones are centred too
    assert fitted.method == "fitted" and abs(fitted.bias.sum()) < 1e-9

    def nll(probabilities):
        return -np.log(probabilities[np.arange(len(raw)), answers]).mean()

    unfitted = Calibration("contextual", prior, np.zeros(3))
    assert nll(fitted.probabilities(raw)) < nll(unfitted.probabilities(raw))
    assert nll(fitted.probabilities(raw)) <= nll(truth) + 1e-6


def test_matched_shares_predict_each_label_as_often_as_it_is_right():
    """A label that is often second best: the fit with the lowest NLL predicts it too rarely."""
    rng = np.random.default_rng(0)
    answers = np.repeat([0, 1, 2], 300)
    place = np.array([-1.0, 0.0, 1.0])[answers] + rng.normal(0, 1.2, 900)
    raw = np.stack([-place, np.zeros(900), place], axis=1)
    likely, matched = (fit(raw, np.zeros(3), answers) for fit in (fit_calibration, fit_shares))
    counts = [np.bincount(c.scores(raw).argmax(1), minlength=3) for c in (likely, matched)]
    assert counts[0][1] < 250
    assert np.abs(counts[1] - 300).max() <= 3
    assert matched.temperature == likely.temperature and abs(matched.bias.mean()) < 1e-9


def test_a_fit_is_judged_on_customers_that_it_did_not_see():
    """Scores that are noise: fitted on all rows they look better than a third each, cross-fitted they cannot."""
    rng = np.random.default_rng(3)
    raw, answers = rng.normal(size=(30, 3)), np.arange(30) % 3
    seen = fit_calibration(raw, np.zeros(3), answers).probabilities(raw)[np.arange(30), answers]
    assert -np.log(seen).mean() < np.log(3)
    groups = [str(number // 3) for number in range(30)]
    unseen = cross_fitted_probabilities(raw, np.zeros(3), answers, groups)[np.arange(30), answers]
    assert -np.log(unseen).mean() > np.log(3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_multiply_the_probabilities(raw, temperature):
    even = Calibration("fitted", np.array([0.3, -0.2, 0.0]), np.array([0.0, 0.4, -0.4]), temperature)
    shares = np.array([0.2, 0.5, 0.3])
    expected = even.probabilities(raw) * shares
    expected /= expected.sum(axis=1, keepdims=True)
    assert with_shares(even, shares).probabilities(raw) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("answers", [[0, 1, 2] * 20, [1] * 60])
def test_rows_that_are_all_right_or_all_alike_give_a_finite_calibration(answers):
    """Without limits the temperature would go to 0, and a bias to infinity."""
    answers = np.array(answers)
    fitted = fit_calibration(np.where(np.eye(3)[answers], -0.1, -3.0), np.zeros(3), answers)
    assert 1 / 20.01 <= fitted.temperature <= 20.01 and np.abs(fitted.bias).max() < 1001
    assert np.isfinite(fitted.probabilities(np.array([[-800.0, -0.1, -800.0]]))).all()


@pytest.mark.parametrize("fit_bias", ["likelihood", "shares"])
def test_a_fit_that_gets_all_rows_right_is_not_chosen(capsys, fit_bias):
    """Its temperature has no best value: the limit that it ends at would pass for certainty."""
    answers = np.array([0, 1, 2] * 3)
    raw = np.where(np.eye(3)[answers], -0.5, -2.0)
    methods, losses = candidates(raw, np.zeros(3), answers, [str(i) for i in range(9)], fit_bias)
    assert set(losses) == {"none", "contextual", "batch"} and set(methods) == {*losses, "fitted"}
    assert choose_method(losses, [str(i) for i in range(9)]) == "none"
    assert "note: a fit gets all 9 rows right: its temperature is arbitrary" in capsys.readouterr().err
    answers[0] = 1  # one wrong row determines it
    assert "fitted" in candidates(raw, np.zeros(3), answers, [str(i) for i in range(9)], fit_bias)[1]
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- choose, write and read


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ([0.02, 0.02, 0.02, -0.02], "none"),  # three customers of four gain: one standard error is as much as they do
        ([0.02, 0.02, 0.02, 0.02], "fitted"),
        ([0.021, 0.02, 0.019, 0.01], "fitted"),
        ([-0.02, -0.02, -0.02, -0.02], "none"),
    ],
)
def test_auto_takes_the_simplest_within_a_standard_error(gains, wanted):
    """Rows of one customer are one observation: with twice as many rows of each nothing else is chosen."""
    for months in (1, 2):
        customers = [name for name in "abcd" for _ in range(months)]
        gained = np.repeat(gains, months)
        losses = {"none": np.full(len(gained), 0.6), "contextual": np.full(len(gained), 0.9), "fitted": 0.6 - gained}
        assert choose_method(losses, customers) == wanted


def many_labels(rows: int, bias: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (raw scores [rows, labels], answers) of a calibrated model, shifted by a bias [labels]."""
    rng = np.random.default_rng(seed)
    true = 3 * rng.normal(size=(rows, len(bias)))
    answers = np.array([rng.choice(len(bias), p=p) for p in softmax(true, axis=1)])
    return true + bias, answers


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_biases_of_many_labels_are_shrunk(size):
    """Ten rows a label: what is needed is fitted, and where nothing is, little is made worse."""
    bias = size * np.random.default_rng(5).normal(size=60)
    (raw, answers), (others, truth) = many_labels(600, bias, 0), many_labels(4000, bias, 1)
    fitted = fit_calibration(raw, np.zeros(60), answers)
    before, after = (row_losses(c.probabilities(others), truth).mean() for c in (uncalibrated(60), fitted))
    assert after < before + (0.03 if size == 0 else -0.25)  # with free biases 0.047 above
    assert fitted.bias.mean() == pytest.approx(0, abs=1e-9) and 0.8 < fitted.temperature < 1.25
    if size:
        assert np.corrcoef(fitted.bias, -bias)[0, 1] > 0.8


def test_auto_takes_a_fit_of_many_labels_only_where_it_helps():
    """The contextual prior is wrong here by more than shrunk biases can take back: the fit starts from no prior."""
    contextual, groups = 8 * np.random.default_rng(6).normal(size=60), [str(i) for i in range(600)]
    chosen = {}
    for size in (0.0, 1.0):
        raw, answers = many_labels(600, size * np.random.default_rng(5).normal(size=60), 0)
        _, losses = candidates(raw, contextual, answers, groups, "likelihood")
        chosen[size] = choose_method(losses, groups)
        assert losses["fitted"].mean() < losses["contextual"].mean() - 0.5
    assert chosen[0.0] == "none" and chosen[1.0] in ("batch", "fitted")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, credit_adapter, credit_file) -> str:
    """Return an adapter with its calibration."""
    own = str(shutil.copytree(credit_adapter, tmp_path_factory.mktemp("fitted") / "own"))
    assert evaluate(own, credit_file, "--fit", "--calibration", "fitted") == 0
    return own


def test_fit_writes_a_calibration_that_eval_and_infer_then_use(here, capsys, credit_adapter, credit_file):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    before = infer_one(capsys, own)
    assert before["prior"] != dict.fromkeys(LABELS, 0.0)
    fitted = evaluate_json(capsys, own, credit_file, "--fit")["models"][0]
    assert fitted["calibration"] == "fitted"
    assert set(fitted["calibrations"]) == {"none", "contextual", "batch", "fitted"}
    stored = json.loads((here / "own/calibration.json").read_text())
    assert {"calibration", "bias", "temperature", "labels", "model", "fitted_on"} <= set(stored)
    assert stored["calibration"] == "fitted" and stored["labels"] == list(LABELS)
    assert stored["model"] == model_fingerprint(resolve(own)) and stored["temperature"] > 0
    assert sum(stored["bias"].values()) == pytest.approx(0, abs=1e-9)
    assert stored["fitted_on"]["split_seed"] == 0 and len(stored["fitted_on"]["sha256"]) == 64
    rows, _ = read_rows(credit_file, default_task())
    pool = Counter(row.label for row in rows if split_of(row.customer) == "calibration")
    assert stored["fitted_on"]["rows"] == 3 * min(pool.values())
    assert stored["fitted_on"]["split"] == default_task().split

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


def test_a_calibration_of_another_split_of_the_rows_is_refused(tmp_path, monkeypatch):
    """A base model has no task: two tasks with other parts of the same rows would share its calibration."""
    monkeypatch.setattr(calibration, "calibration_path", lambda ref: tmp_path / "calibration.json")
    fitted_on = {"split_seed": 0, "data_sha256": "x", "split": [None, 0.2]}
    (tmp_path / "calibration.json").write_text(json.dumps({"fitted_on": fitted_on}))
    calibration.check_fitted(None, 0, "x", 1.0, [None, 0.2])
    for split in ([None, 0.3], ["owner", 0.2]):
        with pytest.raises(InputError, match="its rows may be validation rows; fit again"):
            calibration.check_fitted(None, 0, "x", 1.0, split)


def test_the_calibration_with_the_lowest_nll_is_stored_and_used(here, capsys, credit_adapter, credit_file):
    """By the NLL on calibration rows; what is fitted is judged on customers that it did not see."""
    own = str(shutil.copytree(credit_adapter, here / "own"))
    result = evaluate_json(capsys, own, credit_file, "--fit", "--calibration", "auto")["models"][0]
    stored = json.loads((here / "own/calibration.json").read_text())
    assert set(stored["nll"]) == {"none", "contextual", "batch", "fitted"}
    assert stored["calibration"] == result["calibration"]
    response = infer_one(capsys, own)
    assert response["prior"] == pytest.approx(stored["prior"], abs=1e-6)
    again = evaluate_json(capsys, own, credit_file)["models"][0]
    assert (again["calibration"], again["nll"]) == (result["calibration"], pytest.approx(result["nll"], abs=1e-6))


@pytest.mark.parametrize("method", ["none", "contextual", "batch", "fitted"])
def test_a_calibration_that_is_named_is_stored_whatever_its_nll(here, capsys, credit_adapter, credit_file, method):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    assert evaluate(own, credit_file, "--fit", "--calibration", method) == 0
    stored = json.loads((here / "own/calibration.json").read_text())
    assert stored["calibration"] == method
    response = infer_one(capsys, own)
    if method == "none":
        assert response["scores"] == response["raw_scores"]
    if method == "batch":  # the mean raw score of the calibration rows, whatever their labels
        rows, _ = read_rows(credit_file, default_task())
        flags = vars(infer_creditmix.build_parser().parse_args(["--model_dir", own, *PLAIN]))
        scoring = credit_options(flags, default_task())
        drawn = draw(rows, "calibration", None, EvalOptions("x", "", scoring))
        model = CreditModel.load(resolve(own), scoring)
        mean = model.raw_scores([row.features for row in drawn]).mean(axis=0)
        np.testing.assert_allclose(list(stored["prior"].values()), mean, atol=1e-4)


def test_fit_bias_shares_moves_the_biases(here, capsys, credit_adapter, credit_file):
    own, biases = str(shutil.copytree(credit_adapter, here / "own")), []
    for way in ("likelihood", "shares"):
        evaluate_json(capsys, own, credit_file, "--fit", "--fit_bias", way)
        biases.append(list(json.loads((here / "own/calibration.json").read_text())["bias"].values()))
    assert np.abs(np.subtract(*biases)).max() > 1e-3


def test_a_base_keeps_its_calibration_in_its_folder(here, capsys, model_dir, credit_file, monkeypatch):
    """So it is found from any working directory, and under any name of the folder."""
    own = shutil.copytree(model_dir, here / "own")
    before = model_fingerprint(resolve("own"))
    evaluate("own", credit_file, "--fit")
    assert model_fingerprint(resolve("own")) == before
    stored = json.loads((own / "calibration.json").read_text())
    (here / "elsewhere").mkdir()
    for folder, name in (("..", "own"), (".", "../own"), ("/", str(own))):
        monkeypatch.chdir(here / "elsewhere" / folder)
        response = infer_one(capsys, name)
        moved = response["scores"]["Bad"] - (response["raw_scores"]["Bad"] - response["prior"]["Bad"])
        assert moved == pytest.approx(stored["bias"]["Bad"], abs=3e-6) and abs(moved) > 1e-3
    shutil.copy(own / "calibration.json", save_other_base(model_dir, here / "other"))
    with pytest.raises(InputError, match=r"other/calibration\.json: fitted with another model "):
        infer_one(capsys, str(here / "other"))


def save_other_base(model_dir: str, folder: Path) -> Path:
    """Copy a model, with another template."""
    with open(shutil.copytree(model_dir, folder) / "chat_template.jinja", "a") as out:
        out.write(" ")
    return folder


def test_a_base_without_a_folder_of_the_users_keeps_its_calibration_by_content(here, model_dir):
    other = str(save_other_base(model_dir, here / "other"))
    embedded, changed = (ModelRef("smollm2-135m", "smollm2-135m", path) for path in (model_dir, other))
    assert calibration_path(embedded) == cache_dir() / "calibrations" / f"{model_fingerprint(embedded)}.json"
    assert calibration_path(changed).parent == calibration_path(embedded).parent
    assert calibration_path(changed) != calibration_path(embedded)


def test_a_calibration_that_cannot_be_stored_is_refused_before_any_scoring(
    here, model_dir, credit_adapter, credit_file, monkeypatch
):
    def scores(*rest):
        raise RuntimeError("scored")

    allowed, own = (
        os.access,
        [shutil.copytree(folder, here / Path(folder).name) for folder in (credit_adapter, model_dir)],
    )
    monkeypatch.setattr(CreditModel, "load", scores)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in own and allowed(path, mode))
    for folder in own:
        with pytest.raises(InputError, match=f"{folder.name}: is not writable"):
            evaluate(str(folder), credit_file, "--fit")
        with pytest.raises(RuntimeError, match="scored"):
            evaluate(str(folder), credit_file)
    with pytest.raises(RuntimeError, match="scored"):
        evaluate(str(own[1]), credit_file, "--fit", "--keep_base")


def test_a_calibration_belongs_to_the_weights_that_were_scored(here, capsys, credit_adapter, credit_file, monkeypatch):
    """The adapter is trained again while the rows are scored: the new one has no calibration."""
    own, scored = shutil.copytree(credit_adapter, here / "own"), CreditModel.raw_scores

    def replaced(self, *rest):
        result = scored(self, *rest)
        save_adapter(own, json.loads((own / "run.json").read_text())["base_model"], seed=9)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(CreditModel, "raw_scores", replaced)
        evaluate(str(own), credit_file, "--fit")
    with pytest.raises(InputError, match="fitted with another model"):
        infer_one(capsys, str(own))


def test_keep_base_stores_calibrations_of_adapters_alone(here, capsys, credit_adapter, model_dir, credit_file):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    report = evaluate_json(capsys, model_dir, credit_file, "--model_dir", model_dir, own, "--fit", "--keep_base")
    assert [model["calibration"] for model in report["models"]] == ["fitted", "fitted"]
    assert (here / "own/calibration.json").exists() and not Path(model_dir, "calibration.json").exists()


def test_a_calibration_of_another_model_or_forms_is_refused(here, capsys, credit_adapter, model_dir, credit_file):
    own = str(shutil.copytree(credit_adapter, here / "own"))
    evaluate(own, credit_file, "--fit")
    other = save_adapter(here / "other", model_dir, seed=5)
    shutil.copy(here / "own/calibration.json", here / "other")
    with pytest.raises(
        InputError, match=r"calibration\.json: fitted with another model .* fit again with eval_credit"
    ):
        infer_one(capsys, other)
    words, same = here / "words.json", here / "same.json"
    words.write_text(json.dumps({"Standard": ["Standard", "Typical"]}))
    same.write_text(json.dumps({"Standard": ["Standard"]}))
    for flags, name in (
        (["--verbalizers", str(words)], "forms"),
        (["--verbalizers", str(same), "--aggregate", "mean"], "aggregate"),
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
def test_a_damaged_calibration_is_refused(here, capsys, credit_adapter, fitted, damage):
    path = shutil.copytree(fitted, here / "own") / "calibration.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=r"own/calibration\.json: "):
        infer_one(capsys, str(here / "own"))


@pytest.mark.parametrize("flags", [["--quantization", "nf4"], ["--compute_dtype", "bfloat16"]])
def test_a_calibration_of_another_way_of_loading_is_refused(here, capsys, fitted, flags):
    with pytest.raises(InputError, match=f"fitted with another {flags[0][2:]} "):
        infer_one(capsys, fitted, *flags)
