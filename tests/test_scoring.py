"""The label scorer against a plain computation, the prior and its cache, and the calibration.

Nothing here knows how the scorer works: the reference runs each prompt with each label through the whole model.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import stored_priors
from scipy.special import logsumexp

from common import InputError, LabelScorer, PromptEncoder, distinct_beginnings, token_log_probs
from distil import scoring, trie
from distil.scoring import FastLabelScorer, ScoringOptions, label_prior, read_verbalizers
from distil.tasks import default_task
from distil.testing import load_named
from distil.trie import trie_of

TASK = default_task()
LABELS = TASK.labels
ONE_TOKEN = {"Good": ["Good"], "Standard": ["Standard"], "Bad": ["Bad"]}
SEVERAL_FORMS = {"Good": ["Good"], "Standard": ["Standard", "Average", "Typical"], "Bad": ["Bad", "Poor"]}
TURNS = [TASK.prompt(f"Age: {20 + i}, Annual Income: {9000 + 977 * i}") for i in range(12)]
# Lengths from 1 token to some 260, short and long ones mixed.
UNEVEN = [TASK.prompt("x"), "-", "long " * 50, TASK.prompt("Age: 3" + ", word" * 30), "ab", "Good " * 9]
TEXTS = UNEVEN + TURNS


@pytest.fixture(scope="module")
def loaded(model_dir):
    model, tokenizer = load_named(model_dir, "none", "float32")
    return model, PromptEncoder(tokenizer)


@torch.no_grad()
def plain_scores(model, encoder, turns, forms, aggregate) -> np.ndarray:
    """Return reference scores: one forward for each prompt with each surface form, no batch, no cache."""
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
@pytest.mark.parametrize("driver", ["plain", "fast", "fast with a prefix cache"])
def test_scores_equal_one_forward_per_prompt_and_form(loaded, forms, aggregate, driver):
    model, encoder = loaded
    if driver == "plain":
        scorer = LabelScorer(model, encoder, forms, aggregate, 4)
    else:
        scorer = FastLabelScorer(model, encoder, forms, aggregate, 4, TURNS if "cache" in driver else ())
    wanted = plain_scores(model, encoder, TEXTS, forms, aggregate)
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
    assert np.ptp(wanted, axis=0).min() > 0.05  # rows differ, so a wrong order of rows would show


def test_batch_size_prefix_cache_and_order_of_rows_change_nothing(loaded):
    model, encoder = loaded
    wanted = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=1).raw_scores(TEXTS)
    for size in (3, 32):
        for shared in ((), TURNS):
            scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=size, shared_by=shared)
            np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
            np.testing.assert_allclose(scorer.raw_scores(TEXTS[::-1]), wanted[::-1], atol=1e-4)


def test_the_batch_size_is_found_on_the_rows(loaded, monkeypatch):
    """Rows a forward that cost least, until memory ends; scores are those of any size."""
    model, encoder = loaded
    texts = TEXTS * 15
    wanted = FastLabelScorer(model, encoder, ONE_TOKEN).raw_scores(TEXTS)
    for costs, memory, best in (({8: 8, 16: 10, 32: 15, 64: 40}, 999, 32), ({8: 8, 16: 10, 32: 15}, 31, 16)):
        scorer, clock = FastLabelScorer(model, encoder, ONE_TOKEN, batch_size="auto"), [0.0]
        score = scorer._score_batch

        def costly(rows, adapters, score=score, clock=clock, costs=costs, memory=memory):
            if len(rows) > memory:
                raise torch.OutOfMemoryError
            clock[0] += costs.get(len(rows), 0)
            return score(rows, adapters)

        monkeypatch.setattr(scorer, "_score_batch", costly)
        monkeypatch.setattr(scoring.time, "perf_counter", lambda clock=clock: clock[0])
        scorer.raw_scores(TEXTS[:8])
        assert scorer.batch_size == "auto"  # one batch at any size
        np.testing.assert_allclose(scorer.raw_scores(texts), np.tile(wanted, (15, 1)), atol=1e-4)
        assert scorer.batch_size == best


def test_the_prefix_cache_serves_again_and_again(loaded):
    model, encoder = loaded
    scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=4, shared_by=TURNS)
    first = scorer.raw_scores(TURNS)
    scorer.raw_scores(UNEVEN)
    np.testing.assert_array_equal(scorer.raw_scores(TURNS), first)


@pytest.mark.parametrize("shared", [(), TURNS], ids=["no cache", "prefix cached"])
def test_what_rows_of_a_customer_share_is_run_once(loaded, shared, monkeypatch):
    model, encoder = loaded
    monkeypatch.setattr(scoring, "STEM_TOKENS", 0)
    texts = [f"Age: {20 + n}, Outstanding Debt: {n * 371}, Ratio: {month * 7}" for month in range(4) for n in range(8)]
    scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=16, shared_by=shared)
    tokens, forward = [], scorer._forward

    def counting(rows, start, *rest):
        tokens.append(len(rows) * (max(map(len, rows)) - start))
        return forward(rows, start, *rest)

    monkeypatch.setattr(scorer, "_forward", counting)
    fast, run = scorer.raw_scores(texts), sum(tokens)
    np.testing.assert_allclose(fast, plain_scores(model, encoder, texts, SEVERAL_FORMS, "max"), atol=1e-4)
    tokens.clear()
    monkeypatch.setattr(scoring, "STEM_TOKENS", 10**9)
    scorer.raw_scores(texts)
    assert run < 0.7 * sum(tokens)


def test_a_prompt_that_is_the_shared_part_itself_is_scored(loaded):
    model, encoder = loaded
    scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=4, shared_by=[TURNS[0]])
    wanted = plain_scores(model, encoder, TURNS[:2], SEVERAL_FORMS, "max")
    np.testing.assert_allclose(scorer.raw_scores(TURNS[:2]), wanted, atol=1e-4)


@pytest.mark.parametrize("label_tokens", ["all", "distinct"])
def test_no_rows_give_no_scores(loaded, label_tokens):
    model, encoder = loaded
    for forms in (ONE_TOKEN, SEVERAL_FORMS):
        scorer = FastLabelScorer(model, encoder, forms, label_tokens=label_tokens)
        assert scorer.raw_scores([]).shape == (0, 3)


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
    scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=5, shared_by=TURNS)
    wanted = plain_scores(model, encoder, TEXTS, SEVERAL_FORMS, "max")
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)


def test_scores_are_not_rounded_to_bfloat16(model_dir):
    """Logits in bfloat16 come in steps of 1/64 and more at these sizes: scores near each other would be equal."""
    model, tokenizer = load_named(model_dir, "none", "bfloat16")
    raw = FastLabelScorer(model, PromptEncoder(tokenizer), ONE_TOKEN).raw_scores(TURNS)
    gaps = raw[:, 0] - raw[:, 1]  # the common log-sum cancels, differences of logits stay
    assert (np.abs(gaps * 1024 - np.round(gaps * 1024)) > 1e-3).mean() > 0.9


def test_a_prompt_longer_than_the_context_is_refused(loaded):
    model, encoder = loaded
    scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS)
    assert scorer.fits(encoder.prompt("x")) and not scorer.fits(encoder.prompt("x " * 400))
    with pytest.raises(InputError, match=r"tokens; the model's context is 512: shorten it"):
        scorer.raw_scores(["x", "x " * 400])


def test_scores_that_are_no_numbers_are_refused(loaded):
    """A weight or an activation that overflowed must not turn into some label."""
    model, encoder = loaded
    scorer = FastLabelScorer(model, encoder, ONE_TOKEN)
    layer = model.model.layers[-1].mlp.down_proj
    handle = layer.register_forward_hook(lambda *args: args[-1] * float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="are NaN"):
            scorer.raw_scores(TURNS)
    finally:
        handle.remove()


def test_the_longest_label_counts_into_the_context(loaded):
    model, encoder = loaded
    room = 512 - len(encoder.prompt(""))
    fitting, longer = encoder.prompt("1" * (room - 1)), encoder.prompt("1" * room)
    assert FastLabelScorer(model, encoder, ONE_TOKEN).fits(fitting)
    assert not FastLabelScorer(model, encoder, ONE_TOKEN).fits(longer)
    assert not FastLabelScorer(model, encoder, SEVERAL_FORMS).fits(fitting)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_fast_way_is_wrong_the_models_own_logits_are_used(model_dir, dtype, capsys):
    """Here something stands between the body and the head, as in ModernBERT's decoder."""
    model, tokenizer = load_named(model_dir, "none", dtype)
    encoder = PromptEncoder(tokenizer)
    assert not FastLabelScorer(model, encoder, ONE_TOKEN, shared_by=TURNS).plain
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, dims=-1),))
    scoring._print_once.cache_clear()
    capsys.readouterr()
    for shared in ((), TURNS):
        scorer = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=5, shared_by=shared)
        wanted = plain_scores(model, encoder, TEXTS, SEVERAL_FORMS, "max")
        np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4 if dtype == "float32" else 0.3)
    assert capsys.readouterr().err.count("note: this qwen2 model is scored by its own logits") == 1


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_nf4_on_the_cpu_agrees_across_batch_sizes(model_dir, dtype):
    model, tokenizer = load_named(model_dir, "nf4", dtype)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    encoder = PromptEncoder(tokenizer)
    one, many = (
        FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=size, shared_by=TURNS).raw_scores(TURNS)
        for size in (1, 32)
    )
    agreement = (one.argmax(axis=1) == many.argmax(axis=1)).mean()
    largest = np.abs(one - many).max()
    print(f"NF4, {dtype}, batch 1 and 32: labels agree {agreement:.1%}, largest difference {largest:.2g}")
    assert agreement >= 0.9
    assert largest < 0.2


# ----------------------------------------------------------------------------------------- labels of several tokens


def test_distinct_beginnings_are_the_hand_written_ones():
    end = 9
    forms, wanted = zip(
        ([1, 2, 3, 4], [1, 2, 3]),  # shares 1 2 with the next one
        ([1, 2, 5], [1, 2, 5]),
        ([6], [6, end]),  # begins the next one
        ([6, 7, 8], [6, 7]),
        ([5, 1, 2], [5]),  # the first token tells it from all others
        ([4], [4]),
        strict=True,
    )
    assert distinct_beginnings(list(forms), end) == list(wanted)
    assert distinct_beginnings([[1, 2]], end) == [[1]]
    assert distinct_beginnings([[1], [1]], end) == [[1, end], [1, end]]  # equal forms


@pytest.mark.parametrize("label_tokens", ["all", "distinct"])
def test_labels_that_the_tokenizer_makes_equal_are_refused(loaded, model_dir, label_tokens):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    forms = {label: [label] for label in ("Good", "\uff22ad", "Bad")}
    with pytest.raises(InputError, match="labels '\uff22ad' and 'Bad' have the same tokens; rename one"):
        FastLabelScorer(loaded[0], PromptEncoder(tokenizer), forms, label_tokens=label_tokens)


def test_a_tree_has_each_beginning_once():
    tree = trie_of(((1, 2, 3), (1, 2, 4), (5,), (5, 2)))
    assert (tree.tokens, tree.depths) == ([1, 2, 5], [0, 1, 0])
    assert tree.sees.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    edges = list(zip(tree.parents, tree.targets, strict=True))
    assert [[edges[i] for i in path] for path in tree.paths] == [
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1), (1, 2), (2, 4)],
        [(0, 5)],
        [(0, 5), (3, 2)],
    ]
    assert len(edges) == 6


@pytest.mark.parametrize("shared", [(), TURNS], ids=["no cache", "prefix cached"])
@pytest.mark.parametrize("label_tokens", ["all", "distinct"])
def test_labels_of_one_token_have_the_scores_of_one_forward_to_the_last_bit(loaded, shared, label_tokens):
    """Golden scores of CreditMix hang on it: no mask, no positions and no other order of computation."""
    model, encoder = loaded
    scorer = FastLabelScorer(model, encoder, ONE_TOKEN, batch_size=32, shared_by=shared, label_tokens=label_tokens)
    rows = sorted(map(encoder.prompt, TURNS), key=len, reverse=True)
    with torch.inference_mode():
        hidden = scorer.hidden(rows, 1, [None] * len(rows))
        targets = [[[encoder.label(word)[0] for word in ONE_TOKEN]]] * len(rows)
        wanted = token_log_probs(hidden, scorer.head, targets)[:, 0]
    np.testing.assert_array_equal(scorer.score(rows), wanted)
    plain = LabelScorer(model, encoder, ONE_TOKEN, label_tokens=label_tokens)
    with torch.inference_mode():
        wanted = plain.log_probs(rows, targets)[:, 0]
    np.testing.assert_array_equal(plain.score(rows), wanted)


def test_one_forward_runs_all_labels(loaded, monkeypatch):
    """However many; in parts where the positions that go through the head are too many for one."""
    model, encoder = loaded
    scorer, forwards = FastLabelScorer(model, encoder, SEVERAL_FORMS, batch_size=16, shared_by=TURNS), []
    forward = scorer.body.forward
    monkeypatch.setattr(scorer.body, "forward", lambda *args, **more: forwards.append(1) or forward(*args, **more))
    scores = scorer.raw_scores(TURNS)
    assert len(forwards) == 1
    monkeypatch.setattr(trie, "POSITIONS", 40)
    np.testing.assert_allclose(scorer.raw_scores(TURNS), scores, atol=1e-5)
    assert len(forwards) > 3


def test_distinct_scores_are_probabilities_of_the_labels_beginnings(loaded):
    """No label's beginning begins another's, so that their probabilities add up to at most 1."""
    model, encoder = loaded
    forms = {text: [text] for text in ("Good", "Good one", "Typical", "Typically", "Standard", "Stand", "Bad")}
    scores = FastLabelScorer(model, encoder, forms, label_tokens="distinct").raw_scores(TURNS)
    assert (np.exp(scores).sum(axis=1) < 1).all()


def test_other_label_tokens_are_another_calibration_and_prior(loaded):
    model, encoder = loaded
    options = ScoringOptions(SEVERAL_FORMS, (0.0,) * 3)
    assert options.raw_settings()["label_tokens"] is None  # as in calibrations that were fitted before it
    assert replace(options, label_tokens="distinct").raw_settings()["label_tokens"] == "distinct"
    priors = [
        label_prior(FastLabelScorer(model, encoder, SEVERAL_FORMS, label_tokens=which), "model", TASK.null_prompts(2))
        for which in ("all", "distinct")
    ]
    assert len(stored_priors()) == 2 and np.abs(priors[0] - priors[1]).max() > 0.1


# ------------------------------------------------------------------------------------------------- prior and its cache


def test_the_prior_is_the_mean_raw_score_of_the_null_prompts(loaded):
    model, encoder = loaded
    turns = TASK.null_prompts(4)
    prior = label_prior(FastLabelScorer(model, encoder, SEVERAL_FORMS), "model", turns)
    wanted = plain_scores(model, encoder, turns, SEVERAL_FORMS, "max").mean(axis=0)
    np.testing.assert_allclose(prior, wanted, atol=1e-4)


def test_a_stored_prior_is_used_and_a_damaged_one_is_computed_again(loaded):
    model, encoder = loaded
    scorer, turns = FastLabelScorer(model, encoder, ONE_TOKEN), TASK.null_prompts(2)
    true = label_prior(scorer, "model", turns)
    (path,) = stored_priors()
    path.write_text(json.dumps({"prior": {"Good": 1.0, "Standard": 2.0, "Bad": 3.0}}))
    np.testing.assert_array_equal(label_prior(scorer, "model", turns), [1.0, 2.0, 3.0])
    for damage in ("", '{"prior": {"Good": 1', "[]", '{"prior": {"Good": 1.0}}', '{"prior": {"Good": null}}', "\x00"):
        path.write_text(damage)
        np.testing.assert_allclose(label_prior(scorer, "model", turns), true, atol=1e-9)
        assert json.loads(path.read_text())["prior"]["Good"] == pytest.approx(true[0])  # and stored again
    assert stored_priors() == [path]  # no scratch file stays


# -------------------------------------------------------------------------------------------------------- verbalizers


def test_verbalizers_default_to_the_label_itself(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"Standard": ["Standard", "Average"]}))
    forms = read_verbalizers(path, LABELS)
    assert forms == {"Good": ["Good"], "Standard": ["Standard", "Average"], "Bad": ["Bad"]}
    assert list(forms) == list(LABELS)


def test_a_word_of_two_labels_is_refused(tmp_path):
    path = tmp_path / "words.json"
    for forms in ({"Good": ["Good", "Bad"]}, {"Standard": ["Fair", "Fair"]}, {"Good": ["OK"], "Standard": ["OK"]}):
        path.write_text(json.dumps(forms))
        with pytest.raises(InputError, match=r"words\.json: (Bad|Fair|OK) occurs twice"):
            read_verbalizers(path, LABELS)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"Fair": ["x"]}', '{"Good": []}', '{"Good": "x"}', '{"Good": [" "]}', '{"Good": [5]}']
)
def test_bad_verbalizers_are_refused(tmp_path, text):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"words\.json: (not JSON|expected an object of label: \[words\])"):
        read_verbalizers(path, LABELS)


@pytest.mark.parametrize(("rows", "size"), [(9, 32), (8, "auto")])
def test_rows_that_follow_are_scored_as_the_first_ones(loaded, rows, size):
    """An evaluation scores calibration rows, then validation rows: `auto` is one number for both."""
    scorer = FastLabelScorer(*loaded, ONE_TOKEN, batch_size="auto")
    scorer.raw_scores((TEXTS * 2)[:rows])
    assert scorer.batch_size == size
