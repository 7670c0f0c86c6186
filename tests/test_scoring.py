"""The label scorer against a plain computation, the prior and its cache, and the calibration.

Nothing here knows how the scorer works: the reference runs each prompt with each label through the whole model.
"""

from __future__ import annotations

import copy
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax

import common
from common import (
    Calibration,
    LabelScorer,
    PromptEncoder,
    cross_fitted_probabilities,
    fit_calibration,
    fit_shares,
    label_prior,
    read_verbalizers,
    with_shares,
)
from conftest import CHATML, build_tokenizer, save_adapter
from creditmix import LABELS, CreditModel, creditmix_prompt, null_prompts
from files import InputError, cache_dir
from models import load_model, model_fingerprint

ONE_TOKEN = {"Good": ["Good"], "Standard": ["Standard"], "Bad": ["Bad"]}
SEVERAL_FORMS = {"Good": ["Good"], "Standard": ["Standard", "Average", "Typical"], "Bad": ["Bad", "Poor"]}
TURNS = [creditmix_prompt(f"Age: {20 + i}, Annual Income: {9000 + 977 * i}") for i in range(12)]
# Lengths from 1 token to some 260, short and long ones mixed.
UNEVEN = [creditmix_prompt("x"), "-", "long " * 50, creditmix_prompt("Age: 3" + ", word" * 30), "ab", "Good " * 9]
TEXTS = UNEVEN + TURNS


@pytest.fixture(scope="module")
def loaded(model_dir):
    model, tokenizer = load_model(model_dir, "none", "float32")
    return model, PromptEncoder(tokenizer)


@torch.no_grad()
def plain_scores(model, encoder, turns, forms, aggregate) -> np.ndarray:
    """Reference: one forward of the whole model for each prompt with each surface form, no batch, no cache."""
    join = {"max": max, "mean": lambda values: sum(values) / len(values), "logsumexp": logsumexp}[aggregate]
    table = []
    for turn in turns:
        prompt = encoder.prompt(turn)
        row = []
        for words in forms.values():
            scores = []
            for word in words:
                label = encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
                logits = model(input_ids=torch.tensor([prompt + label])).logits[0].float()
                log_probs = torch.log_softmax(logits, dim=-1)
                steps = [log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(label)]
                scores.append(sum(steps) / len(steps))
            row.append(join(scores))
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize("aggregate", ["max", "mean", "logsumexp"])
@pytest.mark.parametrize("forms", [ONE_TOKEN, SEVERAL_FORMS], ids=["one token", "several forms and tokens"])
@pytest.mark.parametrize("cached", [True, False], ids=["prefix cached", "no cache"])
def test_scores_equal_the_plain_computation(loaded, forms, aggregate, cached):
    model, encoder = loaded
    scorer = LabelScorer(model, encoder, forms, aggregate, 4, TURNS if cached else ())
    wanted = plain_scores(model, encoder, TEXTS, forms, aggregate)
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
    assert np.ptp(wanted, axis=0).min() > 0.05  # rows differ, so a wrong order of rows would show


def test_batch_size_prefix_cache_and_order_of_rows_change_nothing(loaded):
    model, encoder = loaded
    wanted = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=1).raw_scores(TEXTS)
    for size in (3, 32):
        for shared in ((), TURNS):
            scorer = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=size, shared_by=shared)
            np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
            np.testing.assert_allclose(scorer.raw_scores(TEXTS[::-1]), wanted[::-1], atol=1e-4)


def test_the_batch_size_is_found_on_the_rows(loaded, monkeypatch):
    """Rows a forward that cost least, until memory ends; scores are those of any size."""
    model, encoder = loaded
    texts = TEXTS * 15
    wanted = LabelScorer(model, encoder, ONE_TOKEN).raw_scores(TEXTS)
    for costs, memory, best in (({8: 8, 16: 10, 32: 15, 64: 40}, 999, 32), ({8: 8, 16: 10, 32: 15}, 31, 16)):
        scorer, clock = LabelScorer(model, encoder, ONE_TOKEN, batch_size="auto"), [0.0]
        score = scorer._score_batch

        def costly(rows, adapters, score=score, clock=clock, costs=costs, memory=memory):
            if len(rows) > memory:
                raise torch.OutOfMemoryError
            clock[0] += costs.get(len(rows), 0)
            return score(rows, adapters)

        monkeypatch.setattr(scorer, "_score_batch", costly)
        monkeypatch.setattr(common.time, "perf_counter", lambda clock=clock: clock[0])
        scorer.raw_scores(TEXTS)
        assert scorer.batch_size == "auto"  # too few rows to try
        np.testing.assert_allclose(scorer.raw_scores(texts), np.tile(wanted, (15, 1)), atol=1e-4)
        assert scorer.batch_size == best


def test_the_prefix_cache_serves_again_and_again(loaded):
    model, encoder = loaded
    scorer = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=4, shared_by=TURNS)
    first = scorer.raw_scores(TURNS)
    scorer.raw_scores(UNEVEN)
    np.testing.assert_array_equal(scorer.raw_scores(TURNS), first)


@pytest.mark.parametrize("shared", [(), TURNS], ids=["no cache", "prefix cached"])
def test_what_rows_of_a_customer_share_is_run_once(loaded, shared, monkeypatch):
    model, encoder = loaded
    monkeypatch.setattr(common, "STEM_TOKENS", 0)
    texts = [f"Age: {20 + n}, Outstanding Debt: {n * 371}, Ratio: {month * 7}" for month in range(4) for n in range(8)]
    scorer = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=16, shared_by=shared)
    tokens, forward = [], scorer._forward

    def counting(rows, start, *rest):
        tokens.append(len(rows) * (max(map(len, rows)) - start))
        return forward(rows, start, *rest)

    monkeypatch.setattr(scorer, "_forward", counting)
    found, run = scorer.raw_scores(texts), sum(tokens)
    np.testing.assert_allclose(found, plain_scores(model, encoder, texts, SEVERAL_FORMS, "max"), atol=1e-4)
    tokens.clear()
    monkeypatch.setattr(common, "STEM_TOKENS", 10**9)
    scorer.raw_scores(texts)
    assert run < 0.7 * sum(tokens)


def test_a_prompt_that_is_the_shared_part_itself_is_scored(loaded):
    model, encoder = loaded
    scorer = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=4, shared_by=[TURNS[0]])
    wanted = plain_scores(model, encoder, TURNS[:2], SEVERAL_FORMS, "max")
    np.testing.assert_allclose(scorer.raw_scores(TURNS[:2]), wanted, atol=1e-4)


def test_no_rows_give_no_scores(loaded):
    model, encoder = loaded
    assert LabelScorer(model, encoder, ONE_TOKEN).raw_scores([]).shape == (0, 3)


def phi(vocabulary: int):
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    return model


def gpt2(vocabulary: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("build", [phi, gpt2])
def test_other_architectures_and_a_vocabulary_of_several_slices(loaded, build):
    """An output head with a bias (Phi), learned absolute positions (GPT-2), 40,000 tokens."""
    torch.manual_seed(1)
    model, encoder = build(40_000).eval(), loaded[1]
    scorer = LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=5, shared_by=TURNS)
    wanted = plain_scores(model, encoder, TEXTS, SEVERAL_FORMS, "max")
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)


def test_scores_are_not_rounded_to_bfloat16(model_dir):
    """Logits in bfloat16 come in steps of 1/64 and more at these sizes: scores near each other would be equal."""
    model, tokenizer = load_model(model_dir, "none", "bfloat16")
    raw = LabelScorer(model, PromptEncoder(tokenizer), ONE_TOKEN).raw_scores(TURNS)
    gaps = raw[:, 0] - raw[:, 1]  # the common log-sum cancels, differences of logits stay
    assert (np.abs(gaps * 1024 - np.round(gaps * 1024)) > 1e-3).mean() > 0.9


def test_a_prompt_longer_than_the_context_is_refused(loaded):
    model, encoder = loaded
    scorer = LabelScorer(model, encoder, SEVERAL_FORMS)
    assert scorer.fits(encoder.prompt("x")) and not scorer.fits(encoder.prompt("x " * 400))
    with pytest.raises(InputError, match=r"tokens; the model's context is 512: shorten it"):
        scorer.raw_scores(["x", "x " * 400])


def test_scores_that_are_no_numbers_are_refused(loaded):
    """A weight or an activation that overflowed must not turn into some label."""
    model, encoder = loaded
    scorer = LabelScorer(model, encoder, ONE_TOKEN)
    layer = model.model.layers[-1].mlp.down_proj
    handle = layer.register_forward_hook(lambda *args: args[-1] * float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="no numbers"):
            scorer.raw_scores(TURNS)
    finally:
        handle.remove()


def test_the_longest_label_counts_into_the_context(loaded):
    model, encoder = loaded
    room = 512 - len(encoder.prompt(""))
    fitting, longer = encoder.prompt("1" * (room - 1)), encoder.prompt("1" * room)
    assert LabelScorer(model, encoder, ONE_TOKEN).fits(fitting)
    assert not LabelScorer(model, encoder, ONE_TOKEN).fits(longer)
    assert not LabelScorer(model, encoder, SEVERAL_FORMS).fits(fitting)


def test_a_model_that_rescales_its_logits_is_refused(loaded):
    model, encoder = loaded
    other = copy.deepcopy(model)
    other.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="rescale their logits"):
        LabelScorer(other, encoder, ONE_TOKEN)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_nf4_on_the_cpu_agrees_across_batch_sizes(model_dir, dtype):
    model, tokenizer = load_model(model_dir, "nf4", dtype)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    encoder = PromptEncoder(tokenizer)
    one, many = (
        LabelScorer(model, encoder, SEVERAL_FORMS, batch_size=size, shared_by=TURNS).raw_scores(TURNS)
        for size in (1, 32)
    )
    agreement = (one.argmax(axis=1) == many.argmax(axis=1)).mean()
    largest = np.abs(one - many).max()
    print(f"NF4, {dtype}, batch 1 and 32: labels agree {agreement:.1%}, largest difference {largest:.2g}")
    assert agreement >= 0.9
    assert largest < 0.2


# ------------------------------------------------------------------------------------------------------ calibration


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
    found = fit_calibration(raw, prior, answers)
    np.testing.assert_allclose(found.temperature, temperature, rtol=0.05)
    np.testing.assert_allclose(found.bias, bias, atol=0.1)  # the true ones are centred too
    assert found.method == "fitted" and abs(found.bias.sum()) < 1e-9

    def nll(probabilities):
        return -np.log(probabilities[np.arange(len(raw)), answers]).mean()

    unfitted = Calibration("contextual", prior, np.zeros(3))
    assert nll(found.probabilities(raw)) < nll(unfitted.probabilities(raw))
    assert nll(found.probabilities(raw)) <= nll(truth) + 1e-6


def test_matched_shares_predict_each_label_as_often_as_it_is_right():
    """A label that is often second best: the likeliest fit predicts it too rarely."""
    rng = np.random.default_rng(0)
    answers = np.repeat([0, 1, 2], 300)
    place = np.array([-1.0, 0.0, 1.0])[answers] + rng.normal(0, 1.2, 900)
    raw = np.stack([-place, np.zeros(900), place], axis=1)
    likely, matched = (fit(raw, np.zeros(3), answers) for fit in (fit_calibration, fit_shares))
    counts = [np.bincount(c.scores(raw).argmax(1), minlength=3) for c in (likely, matched)]
    assert counts[0][1] < 250
    assert np.abs(counts[1] - 300).max() <= 3
    assert matched.temperature == likely.temperature and abs(matched.bias.mean()) < 1e-9
    halfway = fit_shares(raw, np.zeros(3), answers, 0.5).bias
    np.testing.assert_allclose(np.diff(halfway), np.diff((likely.bias + matched.bias) / 2), atol=1e-9)


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
    found = fit_calibration(np.where(np.eye(3)[answers], -0.1, -3.0), np.zeros(3), answers)
    assert 1 / 20.01 <= found.temperature <= 20.01 and np.abs(found.bias).max() < 1001
    assert np.isfinite(found.probabilities(np.array([[-800.0, -0.1, -800.0]]))).all()


# ------------------------------------------------------------------------------------------------- prior and its cache


def stored_priors() -> list[Path]:
    return sorted((cache_dir() / "priors").glob("*"))


def test_the_prior_is_the_mean_raw_score_of_the_null_prompts(loaded):
    model, encoder = loaded
    turns = null_prompts(4)
    prior = label_prior(LabelScorer(model, encoder, SEVERAL_FORMS), "model", turns)
    wanted = plain_scores(model, encoder, turns, SEVERAL_FORMS, "max").mean(axis=0)
    np.testing.assert_allclose(prior, wanted, atol=1e-4)


def test_a_stored_prior_is_used_and_a_damaged_one_is_computed_again(loaded):
    model, encoder = loaded
    scorer, turns = LabelScorer(model, encoder, ONE_TOKEN), null_prompts(2)
    true = label_prior(scorer, "model", turns)
    (path,) = stored_priors()
    path.write_text(json.dumps({"prior": {"Good": 1.0, "Standard": 2.0, "Bad": 3.0}}))
    np.testing.assert_array_equal(label_prior(scorer, "model", turns), [1.0, 2.0, 3.0])
    for damage in ("", '{"prior": {"Good": 1', "[]", '{"prior": {"Good": 1.0}}', '{"prior": {"Good": null}}', "\x00"):
        path.write_text(damage)
        np.testing.assert_allclose(label_prior(scorer, "model", turns), true, atol=1e-9)
        assert json.loads(path.read_text())["prior"]["Good"] == pytest.approx(true[0])  # and stored again
    assert stored_priors() == [path]  # no scratch file stays


def flags(**changes) -> Namespace:
    given = {
        "verbalizers": None,
        "bias": None,
        "null_prompts": 2,
        "calibration": "contextual",
        "aggregate": "max",
        "quantization": "none",
        "compute_dtype": "float32",
        "batch_size": 8,
        "offload_folder": None,
        "class_shares": None,
        "abstain_below": None,
    }
    return Namespace(**given | changes)


def spoil_priors() -> None:
    """Make every stored prior unmistakable, so that meeting an old one shows."""
    for path in stored_priors():
        path.write_text(json.dumps({"prior": {label: 777.0 for label in LABELS}}))


def test_an_old_prior_never_meets_a_changed_model_template_label_or_null_prompt(tmp_path, model_dir):
    adapter = save_adapter(tmp_path / "adapter", model_dir, seed=1)
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"Standard": ["Standard", "Typical"]}))
    first = CreditModel.load(adapter, flags()).calibration.prior
    spoil_priors()
    np.testing.assert_array_equal(
        CreditModel.load(adapter, flags()).calibration.prior, [777.0] * 3
    )  # the file is in use

    def prior(model=adapter, **changes):
        found = CreditModel.load(model, flags(**changes)).calibration.prior
        assert found.max() < 0, (model, changes)
        spoil_priors()
        return found

    assert not np.allclose(prior(null_prompts=3), first)
    prior(verbalizers=str(words))
    assert not np.allclose(prior(verbalizers=str(words), aggregate="mean"), first)
    assert not np.allclose(prior(verbalizers=str(words), aggregate="logsumexp"), first)
    prior(quantization="nf4")
    prior(compute_dtype="bfloat16")
    assert not np.allclose(prior(model=model_dir), first)

    template = shutil.copytree(model_dir, tmp_path / "template")
    other = build_tokenizer()
    other.chat_template = CHATML.replace("assistant\\n", "user\\n")
    other.save_pretrained(template)
    assert not np.allclose(prior(model=str(template)), first)

    save_adapter(tmp_path / "adapter", model_dir, seed=2)  # trained again into the same folder
    assert not np.allclose(prior(), first)


def test_the_fingerprint_follows_the_content(tmp_path, model_dir):
    adapter = Path(save_adapter(tmp_path / "one", model_dir, seed=1))
    first = model_fingerprint(str(adapter))
    assert model_fingerprint(str(shutil.copytree(adapter, tmp_path / "copy"))) == first  # it survives copying
    assert model_fingerprint(save_adapter(tmp_path / "two", model_dir, seed=2)) != first
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert model_fingerprint(str(adapter)) != first
    assert model_fingerprint(model_dir) != first


def test_the_fingerprint_of_a_base_follows_its_weights(tmp_path, model_dir):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "base")
    before = model_fingerprint(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(str(folder)) != before


def test_the_fingerprint_follows_the_chat_template(tmp_path, model_dir):
    """A calibration that was fitted under another template is not used."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "base"))
    before = model_fingerprint(str(copy))
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert model_fingerprint(str(copy)) != before


def test_a_model_that_is_replaced_while_it_loads_is_refused(tmp_path, model_dir, monkeypatch):
    """Or the old adapter's prior would be stored as the new one's, for good."""
    import creditmix

    adapter = save_adapter(tmp_path / "adapter", model_dir, seed=1)

    def replaced(*args):
        loaded = load_model(*args)
        save_adapter(tmp_path / "adapter", model_dir, seed=2)
        return loaded

    monkeypatch.setattr(creditmix, "load_model", replaced)
    with pytest.raises(InputError, match="changed while it was loaded"):
        CreditModel.load(adapter, flags())
    assert not stored_priors()


def test_the_fingerprint_of_a_base_reaches_its_last_layer(tmp_path, model_dir):
    """An adapter merged into the same folder again changes the projections and leaves the embeddings."""
    from safetensors.torch import save_file

    folder = shutil.copytree(model_dir, tmp_path / "merged")
    embeddings = torch.ones(2**20)
    prints = set()
    for value in (0.0, 1.0):
        layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.full([2**18], value) for i in range(8)}
        save_file({"model.embed_tokens.weight": embeddings} | layers, folder / "model.safetensors")
        prints.add(model_fingerprint(str(folder)))
    assert len(prints) == 2


def test_calibration_none_has_no_prior(model_dir):
    model = CreditModel.load(model_dir, flags(calibration="none"))
    assert not model.calibration.prior.any() and not stored_priors()
    raw = model.raw_scores(["Age: 30", "Age: 60, Occupation: Lawyer"])
    np.testing.assert_allclose(model.calibration.probabilities(raw), np.exp(log_softmax(raw, axis=1)))


# -------------------------------------------------------------------------------------------------------- verbalizers


def test_verbalizers_default_to_the_label_itself(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"Standard": ["Standard", "Average"]}))
    forms = read_verbalizers(path, LABELS)
    assert forms == {"Good": ["Good"], "Standard": ["Standard", "Average"], "Bad": ["Bad"]}
    assert list(forms) == list(LABELS)


def test_a_word_of_two_labels_is_refused(tmp_path):
    path = tmp_path / "words.json"
    for given in ({"Good": ["Good", "Bad"]}, {"Standard": ["Fair", "Fair"]}, {"Good": ["OK"], "Standard": ["OK"]}):
        path.write_text(json.dumps(given))
        with pytest.raises(InputError, match=r"words\.json: (Bad|Fair|OK) stands there twice"):
            read_verbalizers(path, LABELS)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"Fair": ["x"]}', '{"Good": []}', '{"Good": "x"}', '{"Good": [" "]}', '{"Good": [5]}']
)
def test_bad_verbalizers_are_refused(tmp_path, text):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"words\.json: (not JSON|expected an object of label: \[words\])"):
        read_verbalizers(path, LABELS)


def test_a_model_is_loaded_as_qlora_says_and_answers_greedily(model_dir):
    """NF4 with double quantisation (QLoRA, section 3); nothing of a base model's own sampling settings is left."""
    model, _ = load_model(model_dir, "nf4")
    layers = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]
    states = [layer.weight.quant_state for layer in layers]
    assert states and all(state.quant_type == "nf4" and state.nested for state in states)
    settings = model.generation_config
    assert not settings.do_sample and settings.repetition_penalty in (None, 1.0)


def test_offloading_is_for_inference_on_a_gpu(model_dir, monkeypatch, tmp_path):
    """The GPU is pretended: what reaches transformers is all that can be seen here."""
    import transformers

    class Stop(Exception):
        pass

    asked = []

    def load(*args, **kwargs):
        asked.append(kwargs)
        raise Stop

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    for gpu, trainable in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(Stop):
            load_model(model_dir, "nf4", "float32", str(tmp_path), trainable)
    there = [kwargs.get("offload_folder") == str(tmp_path) for kwargs in asked]
    assert there == [kwargs["quantization_config"].llm_int8_enable_fp32_cpu_offload for kwargs in asked]
    assert there == [kwargs["device_map"] == "auto" for kwargs in asked] == [True, False, False]
