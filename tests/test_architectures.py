"""Label scores of tiny random models of many architectures against one plain forward for each prompt and label.

The shared beginning is longer than a window of 16 tokens and shorter than one of 64; rows have some 10 to 400 tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import INVOICE_SCHEMA, METHODS, adapter_tensors, refused, row_of, run_json, trainer, write_lines
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from scipy.special import softmax
from transformers import AutoModelForCausalLM

import export_adapter
from common import InputError, LabelScorer, PromptEncoder
from distil import scoring
from distil.generation import generate
from distil.idp.decoder import JsonDecoder
from distil.idp.schema import compile_schema
from distil.models import LoadOptions, load, resolve
from distil.scoring import BASE, FastLabelScorer
from distil.support import check_supported
from distil.tasks import default_task
from distil.teachers.answers import TeacherOptions
from distil.teachers.local import ModelTeacher, token_rows
from distil.testing import build_tokenizer
from distil.training import run

LABELS = {label: [label] for label in ("Good", "Standard", "Bad")}
FORMS = {"Good": ["Good"], "Standard": ["Standard", "Typical"], "Bad": ["Bad"]}
CUSTOMER = "Age: 31, Annual Income: 48000, Outstanding Debt: 1200, Ratio: "
TURNS = [default_task().prompt(f"{CUSTOMER * (i % 2)}{i}" + ", word" * (i * 7 % 23)) for i in range(6)]
TEXTS = ["x", "long " * 75, *TURNS]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 640,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": None}
WINDOWED = {  # a value of None is the window
    "gemma3_text": MIXED,
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3": MIXED | {"use_sliding_window": True},
    "gpt_neo": {"window_size": None, "attention_types": [[["global", "local"], 1]], "attention_layers": None},
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": MIXED,
    "olmo3": MIXED,
    "exaone4": MIXED,
    "starcoder2": {"sliding_window": None},
    "modernbert-decoder": {"layer_types": ["sliding_attention", "full_attention"], "local_attention": None},
}
CAUSAL = {"llama": {}, "qwen2": {}, "gpt_neox": {}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}}
OWN_LOGITS = {"granite": {"logits_scaling": 4.0}, "gemma2": {"final_logit_softcapping": 3.0}, "cohere": {}}


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(build_tokenizer())


def tiny(architecture: str, fields: dict, vocabulary: int):
    """Return a random float32 model; fields that its configuration does not have are left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = AutoConfig.for_model(architecture).to_dict()
    small = {name: value for name, value in SMALL.items() if name in known or name in ("num_hidden_layers",)}
    config = AutoConfig.for_model(architecture, **small | fields, vocab_size=vocabulary)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def plain_scores(model, encoder: PromptEncoder, turns: list[str], forms: dict | None = None) -> np.ndarray:
    """Return reference scores [turns, labels]: one forward of the complete model for each prompt with each form."""
    table = []
    for prompt in map(encoder.prompt, turns):
        best = []
        for words in (forms or FORMS).values():
            scores = []
            for ids in map(encoder.label, words):
                logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0].float()
                log_probs = torch.log_softmax(logits[len(prompt) - 1 :], dim=-1)
                scores.append(np.mean([log_probs[i, token].item() for i, token in enumerate(ids)]))
            best.append(max(scores))
        table.append(best)
    return np.array(table)


BOTH = ("gemma3_text", "mistral", "phi3")  # the others have the smaller window alone
CASES = [(name, fields, size) for name, fields in WINDOWED.items() for size in (16, 64) if size < 64 or name in BOTH]
CASES += [(name, fields, None) for name, fields in (CAUSAL | OWN_LOGITS).items()]


@pytest.mark.parametrize(("name", "fields", "window"), CASES, ids=[f"{name}-{window}" for name, _, window in CASES])
def test_scores_equal_a_plain_forward(encoder, name, fields, window, monkeypatch, capsys):
    """Batches of mixed length, with and without cached beginnings, and with rows of several adapters."""
    monkeypatch.setattr(scoring, "STEM_TOKENS", 0)
    scoring._print_once.cache_clear()
    fields = {key: window if value is None and "layers" not in key else value for key, value in fields.items()}
    model = tiny(name, {k: v for k, v in fields.items() if v is not None}, len(encoder.tokenizer))
    wanted = plain_scores(model, encoder, TEXTS)
    assert np.ptp(wanted, axis=0).min() > 0.01  # rows differ
    for size, shared in ((1, TURNS), (3, TURNS), (16, TURNS), (3, ()), (16, ())):
        scorer = FastLabelScorer(model, encoder, FORMS, batch_size=size, shared_by=shared)
        assert scorer.plain == (name in OWN_LOGITS or name == "modernbert-decoder")
        assert bool(scorer.prefix) == bool(shared and not scorer.plain)
        np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
        np.testing.assert_allclose(scorer.raw_scores(TURNS), wanted[2:], atol=1e-4)  # with stems
    assert capsys.readouterr().err.count("is scored by its own logits") == scorer.plain  # once for five scorers

    head, modules = model.get_output_embeddings(), model.named_modules()
    linear = {name.rpartition(".")[2] for name, m in modules if isinstance(m, torch.nn.Linear) and m is not head}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=sorted(linear), init_lora_weights=False)
    model = get_peft_model(model, config, "a").eval()
    model.add_adapter("b", config)
    scorer = FastLabelScorer(model, encoder, FORMS, "max", 16, TURNS, ("a", "b", BASE))
    table = {BASE: wanted}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        table[adapter] = plain_scores(model, encoder, TEXTS)
    names = [("a", "b", BASE)[i % 3] for i in range(len(TEXTS))]
    mixed = scorer.score([encoder.prompt(turn) for turn in TEXTS], adapters=names)
    np.testing.assert_allclose(mixed, [table[name][i] for i, name in enumerate(names)], atol=1e-4)
    assert np.abs(table["a"] - wanted).max() > 0.1 and np.abs(table["b"] - table["a"]).max() > 0.1


WORDS = ("card", "top_up", "cash", "fee", "Good", "arrival", "exchange", "Standard", "rate", "pin", "lost", "refund")
MANY = {name: [name] for name in list(dict.fromkeys("_".join(pair) for pair in product(WORDS, WORDS)))[:77]}
# Labels that share first tokens, one that begins others, and one token; then as many as BANKING77 has.
TREES = {"few": {text: [text] for text in ("Good", "Good one", "Typical", "Typically", "Ty", "Bad")}, "many": MANY}
BUILT = {"llama": {}, "qwen2": {}, "gemma3_text": MIXED | {"sliding_window": 16}, "gpt_neox": {}}
BUILT |= {"gemma3_text wide": MIXED | {"sliding_window": 300}}  # some rows exceed it with all nodes, others do not


@torch.no_grad()
def own_scores(model, encoder: PromptEncoder, turns: list[str], forms: dict, label_tokens: str) -> np.ndarray:
    """Return scores [turns, forms] by one forward of the complete model for each prompt with each form."""
    ids = [encoder.label(word) for words in forms.values() for word in words]
    if label_tokens == "distinct":
        ids, end = [], encoder.tokenizer.eos_token_id
        words = [encoder.label(word) for words in forms.values() for word in words]
        for i, word in enumerate(words):
            others = [[*other, end] for j, other in enumerate(words) if j != i]
            sizes = range(1, len(word) + 2)
            ids.append(next([*word, end][:n] for n in sizes if [*word, end][:n] not in [one[:n] for one in others]))
    table = []
    for prompt in map(encoder.prompt, turns):
        row = []
        for form in ids:
            logits = model(input_ids=torch.tensor([prompt + form]), use_cache=False).logits[0].float()
            steps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)[range(len(form)), form]
            row.append((steps.sum() if label_tokens == "distinct" else steps.mean()).item())
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize("label_tokens", ["all", "distinct"])
@pytest.mark.parametrize("labels", TREES)
@pytest.mark.parametrize("name", BUILT)
def test_a_tree_of_labels_scores_as_a_forward_for_each(encoder, name, labels, label_tokens, monkeypatch, capsys):
    """Batches of mixed length, with and without cached beginnings, stems, and rows of several adapters; rows that with
    all nodes exceed a window take a forward for each label."""
    monkeypatch.setattr(scoring, "STEM_TOKENS", 0)
    forms, model = TREES[labels], tiny(name.split()[0], BUILT[name], len(encoder.tokenizer))
    texts = [TEXTS[0], *TEXTS[2:6]] if labels == "few" else [TEXTS[0], TEXTS[4]]
    wanted = own_scores(model, encoder, texts, forms, label_tokens)
    plain = LabelScorer(model, encoder, forms, "max", 3, label_tokens)
    np.testing.assert_allclose(plain.raw_scores(texts), wanted, atol=1e-4)
    in_trees = []
    for size, shared in ((1, TURNS), (32, TURNS), (3, ())):
        scorer = FastLabelScorer(model, encoder, forms, batch_size=size, shared_by=shared, label_tokens=label_tokens)
        in_trees.append(scorer.trees)
        if (name, labels) != ("gemma3_text wide", "many"):  # there it depends on the beginning's length
            assert scorer.trees == (name != "gemma3_text")  # a window of 16 has no place for the nodes
        assert bool(scorer.prefix) == bool(shared)
        np.testing.assert_allclose(scorer.raw_scores(texts), wanted, atol=1e-4)
    assert "slower" not in capsys.readouterr().err or not all(in_trees)
    if labels == "many":
        return
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config, "a").eval()
    model.add_adapter("b", config)
    table = {BASE: wanted}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        table[adapter] = own_scores(model, encoder, texts, forms, label_tokens)
    names = [("a", "b", BASE)[i % 3] for i in range(len(texts))]
    scorer = FastLabelScorer(model, encoder, forms, "max", 16, TURNS, ("a", "b", BASE), label_tokens)
    mixed = scorer.score([encoder.prompt(turn) for turn in texts], adapters=names)
    np.testing.assert_allclose(mixed, [table[name][i] for i, name in enumerate(names)], atol=1e-4)
    assert np.abs(table["a"] - wanted).max() > 0.1 and np.abs(table["b"] - table["a"]).max() > 0.1


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text wide", "gpt_neox"])
def test_a_tree_of_labels_in_bfloat16_scores_as_a_forward_for_each(encoder, name):
    """Rows of several adapters; both ways differ by the rounding of hidden states alone, and labels by much more."""
    model = tiny(name.split()[0], BUILT[name], len(encoder.tokenizer)).bfloat16()
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config, "a", autocast_adapter_dtype=False).eval()
    model.add_adapter("b", config)
    scorer = FastLabelScorer(model.bfloat16(), encoder, TREES["few"], "max", 16, TURNS, ("a", "b", BASE))
    rows = [encoder.prompt(turn) for turn in TEXTS]
    names = [("a", "b", BASE)[i % 3] for i in range(len(TEXTS))]
    assert scorer.trees and not scorer.plain
    in_trees = scorer.score(rows, adapters=names)
    scorer.trees = False
    alone = scorer.score(rows, adapters=names)
    assert np.abs(in_trees - alone).max() < 0.1 < np.ptp(alone, axis=1).min()
    float32 = FastLabelScorer(model.float(), encoder, TREES["few"], "max", 16, TURNS, ("a", "b", BASE))
    assert np.abs(in_trees - float32.score(rows, adapters=names)).mean() < 0.1


@pytest.mark.parametrize("damage", ["mask", "positions", "refused"])
def test_labels_take_a_forward_each_where_a_model_runs_no_tree(encoder, damage, monkeypatch, capsys):
    """It ignores the mask or the positions, as with ALiBi, or takes no such argument."""
    scoring._print_once.cache_clear()
    model = tiny("llama", {}, len(encoder.tokenizer))
    forward = model.model.forward

    def damaged(position_ids=None, attention_mask=None, **inputs):
        if damage == "refused" and position_ids is not None:
            raise TypeError("unexpected argument position_ids")
        kept = {"attention_mask": attention_mask} if damage == "positions" else {}
        return forward(**inputs, **(kept if damage != "mask" else {"position_ids": position_ids}))

    monkeypatch.setattr(model.model, "forward", damaged)
    wanted = own_scores(model, encoder, TEXTS[2:5], TREES["few"], "all")
    for shared in ((), TURNS):
        scorer = FastLabelScorer(model, encoder, TREES["few"], batch_size=4, shared_by=shared)
        assert not scorer.trees and not scorer.plain
        np.testing.assert_allclose(scorer.raw_scores(TEXTS[2:5]), wanted, atol=1e-4)
    note = "note: this llama model takes a forward for each label of several tokens, which is slower"
    assert capsys.readouterr().err.count(note) == 1


def test_a_local_teachers_probabilities_are_those_of_a_plain_forward(encoder, tmp_path):
    """kd_prepare.py's label_probs; one prompt is longer than the window by far."""
    fields = {key: 16 if value is None else value for key, value in MIXED.items()}
    model = tiny("gemma3_text", fields, len(encoder.tokenizer))
    model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    wanted = softmax(plain_scores(model, encoder, TEXTS, LABELS), axis=1)
    options = TeacherOptions(labels=tuple(LABELS), calibration="none", load=LoadOptions("none", "float32"))
    answers = dict(ModelTeacher(resolve(str(tmp_path)), options).answers(dict(enumerate(TEXTS))))
    got = [[answers[i]["label_probs"][label] for label in LABELS] for i in range(len(TEXTS))]
    np.testing.assert_allclose(got, wanted, atol=1e-4)  # they are rounded to four digits


# ------------------------------------------------------------------- models for which the fast way of scoring is wrong


def test_a_head_on_which_lora_works_is_used(encoder):
    """The weight of the base's head alone would be off by several nats."""
    model = tiny("llama", {}, len(encoder.tokenizer))
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config, "a").eval()
    with model.disable_adapter():
        base = plain_scores(model, encoder, TEXTS)
    wanted = plain_scores(model, encoder, TEXTS)
    assert np.abs(base - wanted).max() > 1
    scorer = FastLabelScorer(model, encoder, FORMS, batch_size=3, shared_by=TURNS)
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), wanted, atol=1e-4)
    scorer = FastLabelScorer(model, encoder, FORMS, "max", 16, TURNS, ("a", BASE))
    names = [("a", BASE)[i % 2] for i in range(len(TEXTS))]
    mixed = scorer.score([encoder.prompt(turn) for turn in TEXTS], adapters=names)
    np.testing.assert_allclose(mixed, [(wanted, base)[i % 2][i] for i in range(len(TEXTS))], atol=1e-4)


def test_a_module_between_body_and_head_that_changes_the_width_is_used(encoder):
    model = tiny("llama", {}, len(encoder.tokenizer))
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, len(encoder.tokenizer)))
    model.get_output_embeddings = lambda: model.lm_head[1]
    scorer = FastLabelScorer(model, encoder, FORMS, batch_size=3, shared_by=TURNS)
    np.testing.assert_allclose(scorer.raw_scores(TEXTS), plain_scores(model, encoder, TEXTS), atol=1e-4)


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompt_tuning_is_refused(tmp_path, peft_type):
    """Label scores would be those of the bare base."""
    config = {"peft_type": peft_type, "base_model_name_or_path": "smollm2-135m"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"an adapter of type {peft_type}; take one of type LORA"):
        resolve(str(tmp_path))


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 200}
ROPE |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_rows_stay_below_the_length_at_which_longrope_changes_all_others(encoder, name):
    """Its angles follow from the longest row of a forward."""
    fields = {"rope_parameters": ROPE} | ({"original_max_position_embeddings": 200} if name == "phi3" else {})
    model = tiny(name, fields, len(encoder.tokenizer))
    scorer = FastLabelScorer(model, encoder, FORMS, batch_size=16, shared_by=TURNS[:2])
    assert scorer.context == 200
    short = [turn for turn in TEXTS if scorer.fits(encoder.prompt(turn))]
    assert 2 < len(short) < len(TEXTS)
    assert scorer.raw_scores(short) == pytest.approx(plain_scores(model, encoder, short), abs=1e-4)
    with pytest.raises(InputError, match="the model's context is 200"):
        scorer.raw_scores(TEXTS)


@pytest.mark.parametrize(
    ("name", "fields"), [("granite", {"logits_scaling": 1.1}), ("gemma2", {"final_logit_softcapping": 30.0})]
)
def test_a_small_scale_of_the_logits_is_found_in_bfloat16_too(encoder, name, fields):
    model = tiny(name, fields, len(encoder.tokenizer)).bfloat16()
    assert FastLabelScorer(model, encoder, LABELS).plain
    assert not FastLabelScorer(tiny("llama", {}, len(encoder.tokenizer)).bfloat16(), encoder, LABELS).plain


def test_scores_that_depend_on_what_follows_are_refused(encoder):
    """XLM's attention looks both ways, and none of its modules says so."""
    fields = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "embed_init_std": 0.3, "init_std": 0.3, "pad_index": 0}
    with pytest.raises(InputError, match="xlm: what follows a token, or other rows of a batch, change its score"):
        FastLabelScorer(tiny("xlm", fields, len(encoder.tokenizer)), encoder, FORMS)


# ---------------------------------------------------------------------- the matrix: train, score and export each model

WIDE = SMALL | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.2}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
LINEAR = {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16, "num_hidden_layers": 4}
GEMMA4 |= {"num_kv_shared_layers": 2, "global_head_dim": 32, "hidden_size_per_layer_input": 32}
GEMMA4 |= {"vocab_size_per_layer_input": 448, "final_logit_softcapping": 30.0}
SHORT = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PER_LAYER = {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
# Fields of the configuration, and the layers that LoRA goes to.
MATRIX: dict[str, tuple[dict, set[str]]] = {
    "llama": ({}, SEVEN),
    "qwen2": ({}, SEVEN),
    "qwen3": ({}, SEVEN),
    "qwen3_5_text": (LINEAR, SEVEN | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}),
    "mistral": ({"sliding_window": 16}, SEVEN),
    "gemma2": (WINDOW | {"final_logit_softcapping": 3.0}, SEVEN),
    "gemma3_text": (WINDOW, SEVEN),
    "gemma4_text": (GEMMA4, SEVEN | PER_LAYER),
    "gemma4": (GEMMA4, SEVEN | PER_LAYER),  # with a vision tower, whose layers have the same names
    "phi3": ({"sliding_window": None}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "smollm3": ({}, SEVEN),
    "olmo2": ({}, SEVEN),
    "granite": ({"logits_scaling": 8.0}, SEVEN),
    "cohere": ({"logit_scale": 0.25}, SEVEN),
    "lfm2": (SHORT, {"in_proj", "out_proj", "w1", "w2", "w3", "q_proj", "k_proj", "v_proj"}),
    "gpt_neox": ({}, FUSED),
    "falcon": ({"num_kv_heads": 2, "new_decoder_architecture": True}, FUSED),
}
# Labels of one token and of several, some of which begin alike; rows of mixed length, some longer than a window.
KD_LABELS = {"Good": 0.5, "Typical": 0.2, "Typically": 0.2, "Bad": 0.1}
PAIRS = [("Age: 3", "Good", "Bad"), ("Debt: 1200, Age: 31", "Typical", "Good")]
PAIRS += [("x", "Typically", "Typical"), ("Debt: 7, " * 6, "Bad", "Good, after a look")]
ROWS = {
    "sft": [{"input": turn, "output": answer} for turn, answer, _ in PAIRS],
    "kd": [{"input": turn, "teacher_output": answer, "label_probs": KD_LABELS} for turn, answer, _ in PAIRS],
    "dpo": [{"prompt": turn, "chosen": answer, "rejected": other} for turn, answer, other in PAIRS],
}
FEW = TEXTS[:4]
ALL_ROWS = ("--batch_size", 4, "--grad_accum", 1, "--max_steps", 3, "--warmup_steps", 0, "--learning_rate", "1e-2")


def saved_model(folder: Path, architecture: str, fields: dict, tokenizer) -> str:
    """Save a random model, with its tokenizer, and return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    known = AutoConfig.for_model("gemma4_text" if architecture == "gemma4" else architecture).to_dict()
    fields = {name: value for name, value in WIDE.items() if name in known} | {"num_hidden_layers": 2} | fields
    fields |= {"vocab_size": len(tokenizer)}
    if architecture == "gemma4":
        tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        tower |= {"num_key_value_heads": 4, "head_dim": 16, "use_clipped_linears": True}
        fields = {"text_config": fields, "vision_config": tower, "audio_config": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def answer_log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return log-probabilities [answer, vocabulary] at each token of an answer, by one forward of the model alone."""
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), dim=-1)


def own_loss(method: str, model, encoder: PromptEncoder) -> float:
    """Return a method's loss over PAIRS by its definition, from the model's own logits for each row alone."""
    sums, tokens = [], 0
    for turn, *answers in PAIRS:
        prompt, (answer, other) = encoder.prompt(turn), map(encoder.completion, answers)
        log_probs = answer_log_probs(model, prompt, answer)
        tokens += len(answer)
        if method == "dpo":
            margin = log_probs[range(len(answer)), answer].sum()
            margin -= answer_log_probs(model, prompt, other)[range(len(other)), other].sum()
            with model.disable_adapter():
                margin -= answer_log_probs(model, prompt, answer)[range(len(answer)), answer].sum()
                margin += answer_log_probs(model, prompt, other)[range(len(other)), other].sum()
            sums.append(-torch.nn.functional.logsigmoid(0.05 * margin).item())
            continue
        nll = -log_probs[range(len(answer)), answer].sum().item()
        divergence, labels = 0.0, {tuple(encoder.completion(label)): p for label, p in KD_LABELS.items()}
        for position in range(len(answer)) if method == "kd" else ():
            below = {ids: p for ids, p in labels.items() if ids[:position] == tuple(answer[:position])}
            children = sorted({ids[position] for ids in below})
            teacher = torch.tensor([sum(p for ids, p in below.items() if ids[position] == one) for one in children])
            student = log_probs[position, children].softmax(dim=0)
            divergence += (teacher / teacher.sum() * (teacher / teacher.sum() / student).log()).sum().item()
        sums.append(0.5 * nll + 0.5 * divergence if method == "kd" else nll)
    return sum(sums) / (len(PAIRS) if method == "dpo" else tokens)


OWN_WAYS = ("granite", "gemma2", "cohere", "gemma3_text", "gemma4", "qwen3_5_text", "lfm2", "falcon", "opt", "LoRA")


@pytest.mark.parametrize("name", OWN_WAYS)
def test_token_probabilities_are_those_of_a_plain_forward(encoder, tmp_path, name):
    """In batches as alone, a few positions at a time as all at once; K = vocabulary leaves nothing for the rest."""
    if name in MATRIX:
        folder = saved_model(tmp_path / "model", name, MATRIX[name][0], encoder.tokenizer)
        model = load(resolve(folder), LoadOptions("none", "float32"))[0]
    else:  # OPT goes past the forward of its body
        model = tiny({"LoRA": "llama"}.get(name, name), {}, len(encoder.tokenizer))
    if name == "LoRA":
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    rows = [(encoder.prompt(turn), encoder.completion(answer)) for turn, answer, _ in PAIRS]
    rows.append((encoder.prompt("x"), encoder.completion("a long answer, " * 12)))  # more than POSITIONS
    for k in (5, len(encoder.tokenizer)):
        found = list(token_rows(model, rows, k, 0))
        alone = [row for one in rows for row in token_rows(model, [one], k, 0)]
        for (prompt, completion), row, other in zip(rows, found, alone, strict=True):
            wanted = answer_log_probs(model, prompt, completion)
            assert row.answer_ids.tolist() == completion
            best = torch.tensor(row.ids, dtype=torch.long)
            torch.testing.assert_close(
                torch.tensor(row.log_probs).double(), wanted.gather(1, best), atol=2e-3, rtol=1e-3
            )
            np.testing.assert_allclose(np.sort(row.log_probs)[:, ::-1], row.log_probs)
            assert (wanted.gather(1, best)[:, -1:] >= wanted.scatter(1, best, -torch.inf) - 1e-5).all()
            np.testing.assert_allclose(row.log_probs, other.log_probs, atol=2e-3, rtol=1e-3)
            probabilities = np.exp(row.log_probs.astype("f8")).sum(axis=1) + np.exp(row.rest.astype("f8"))
            np.testing.assert_allclose(probabilities, 1, atol=2e-3)
            assert (row.rest == -np.inf).all() == (k > 5)


def lora_weights(model) -> list[tuple[str, torch.Tensor]]:
    """Return the weights that training may change; of DPO's reference none are."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def frozen(model) -> dict[str, torch.Tensor]:
    """Return copies of all that may not change, 4-bit weights as they are packed."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("architecture", MATRIX)
def test_a_model_trains_scores_and_is_exported(architecture, encoder, tmp_path, monkeypatch, capsys):
    """SFT, KD and DPO for three steps in NF4; then the adapter's scores, and those of the export."""
    fields, layers = MATRIX[architecture]
    base, original = saved_model(tmp_path / "base", architecture, fields, encoder.tokenizer), run.train_and_save
    compared = []

    def watched(trainer, *rest):
        before, start = frozen(trainer.model), {n: p.detach().clone() for n, p in lora_weights(trainer.model)}
        targets = {name.split(".lora_")[0].rpartition(".")[2] for name in start}
        assert targets == layers and not any("vision" in name for name in start)
        original(trainer, *rest)
        assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        assert not [name for name, weight in lora_weights(trainer.model) if torch.equal(weight, start[name])]
        after = frozen(trainer.model)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
        own = own_loss(method, model, encoder)
        # By our loss, in chunks, by TRL's fused head.
        for way, at_once in ((True, 999), (True, 2), (False, 999)) if method == "sft" else ((True, 999),):
            trainer._own, trainer._at_once = way, at_once
            with torch.no_grad():
                compared.append((trainer.compute_loss(model, dict(batch)).item(), own))

    monkeypatch.setattr(run, "train_and_save", watched)
    for method in METHODS:
        data = write_lines(tmp_path / f"{method}.jsonl", ROWS[method])
        own = {"kd": ("--kd_alpha", 0.5), "dpo": ("--beta", 0.05, "--sft_weight", 0)}.get(method, ())
        flags = ("--student", base, "--data", data, "--save_dir", tmp_path / method, "--compute_dtype", "float32")
        assert trainer(method).main([str(flag) for flag in (*flags, *own, *ALL_ROWS)]) == 0
    np.testing.assert_allclose(*zip(*compared, strict=True), rtol=1e-4)
    assert run_json(tmp_path / "dpo")["flags"]["lora_targets"] == "auto"

    adapter = tmp_path / "sft"
    weights = adapter_tensors(adapter)
    for number, name in enumerate(sorted(weights)):  # far enough from the base for an export that lost something
        drawn = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(number))
        weights[name] = 0.1 * drawn if "lora_B" in name else weights[name]
    save_file(weights, adapter / "adapter_model.safetensors")
    model, _ = load(ref := resolve(str(adapter)), LoadOptions("none", "float32"), notes=False)
    wanted = plain_scores(model, encoder, FEW)
    for size, shared in ((1, TURNS), (3, ())):
        scorer = FastLabelScorer(model, encoder, FORMS, batch_size=size, shared_by=shared)
        np.testing.assert_allclose(scorer.raw_scores(FEW), wanted, atol=1e-4)
    with model.disable_adapter():
        change = np.abs(plain_scores(model, encoder, FEW) - wanted).mean()

    export_adapter.merge(ref, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not any(type(module).__name__ == "Linear4bit" for module in merged.modules())
    # The merged weights are rounded to bf16; both models compute in float32.
    assert np.abs(plain_scores(merged, encoder, FEW) - wanted).mean() < min(0.05, 0.2 * change)


@pytest.mark.parametrize("architecture", ["qwen3_5_text", "lfm2"])
def test_models_with_recurrent_layers_write_in_batches_as_alone(architecture, encoder, tmp_path):
    """Rows are padded on the left, and a document's forced tokens come several at a time after the prompt."""
    folder = saved_model(tmp_path / "base", architecture, MATRIX[architecture][0], encoder.tokenizer)
    model, tokenizer = load(resolve(folder), LoadOptions("none", "float32"))
    starts = [encoder.prompt("Debt " * count) for count in (3, 1, 9, 2)]
    alone = [generate(model, tokenizer, [start], 8, [], 1)[0] for start in starts]
    assert generate(model, tokenizer, starts, 8, [], 4) == alone
    for start, written in zip(starts, alone, strict=True):  # greedy, by plain forwards
        ids = list(start)
        for _ in range(8):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert tokenizer.decode(ids[len(start) :]) == written.text
    decoder = JsonDecoder(model, tokenizer)
    grammar = compile_schema(INVOICE_SCHEMA, decoder.grammar_tokenizer)
    alone = [decoder.generate([start], [grammar], 160)[0].text for start in starts[:2]]
    assert [draft.text for draft in decoder.generate(starts[:2], [grammar] * 2, 160)] == alone
    jsonschema.validate(json.loads(alone[0]), INVOICE_SCHEMA)


# --------------------------------------------------------------------------------- what is supported, before weights


def saved(folder: Path, architecture: str) -> str:
    """Write a default configuration without weights and return its folder."""
    from transformers import AutoConfig

    AutoConfig.for_model(architecture).save_pretrained(folder)
    return str(folder)


LAYERS = "layers with a sparse index"


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("t5", "an encoder-decoder"),
        ("bart", "an encoder-decoder"),
        ("bert", "attention that is not causal"),
        ("vit", "not supported"),
        ("mamba", "no max_position_embeddings"),
        ("bloom", "no max_position_embeddings"),
        ("deepseek_v32", LAYERS),
    ],
)
def test_unsupported_models_are_refused_by_their_configuration(tmp_path, architecture, reason):
    folder = saved(tmp_path, architecture)
    with pytest.raises(InputError, match=reason) as error:
        check_supported(folder)
    assert folder in str(error.value) and "\n" not in str(error.value) and "take a causal" in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "granite", "gpt2", "qwen3_5_text", "lfm2"])
def test_supported_models_are_not_refused(tmp_path, architecture):
    check_supported(saved(tmp_path, architecture))


@pytest.mark.parametrize("method", METHODS)
def test_trainers_refuse_before_they_read_weights(tmp_path, model_dir, method):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    saved(folder, "deepseek_v32")
    (folder / "model.safetensors").write_bytes((len(b"{}")).to_bytes(8, "little") + b"{}")  # no tensor
    message = refused(method, [row_of(method)], tmp_path, str(folder), "--dry_run")
    assert "deepseek_v32 models are not supported (layers with a sparse index" in message
