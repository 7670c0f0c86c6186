"""CreditModel: its prior belongs to the loaded content, and variants score as separately loaded models do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import stored_priors
from scipy.special import log_softmax

from common import InputError
from distil.creditmix import model as credit_model
from distil.creditmix.model import CreditModel, CreditOptions
from distil.models import LoadOptions, load, resolve
from distil.tasks import default_task
from distil.testing import CHATML, build_tokenizer, save_adapter

TASK = default_task()

FORMS = {label: [label] for label in TASK.labels}


def scoring_options(**changes) -> CreditOptions:
    load = LoadOptions(changes.pop("quantization", "none"), changes.pop("compute_dtype", "float32"))
    values = {"forms": FORMS, "bias": (0.0, 0.0, 0.0), "null_prompts": 2, "calibration": "contextual"}
    return CreditOptions(**values | {"batch_size": 8, "load": load} | changes)


def credit_model_of(name, **changes) -> CreditModel:
    return CreditModel.load(resolve(str(name)), scoring_options(**changes))


def spoil_priors() -> None:
    """Make every stored prior unmistakable, so that meeting an old one shows."""
    for path in stored_priors():
        path.write_text(json.dumps({"prior": {label: 777.0 for label in TASK.labels}}))


def test_an_old_prior_never_meets_changed_content(tmp_path, model_dir, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", model_dir, seed=1)
    words = FORMS | {"Standard": ["Standard", "Typical"]}
    first = credit_model_of(adapter).calibration.prior
    spoil_priors()
    np.testing.assert_array_equal(credit_model_of(adapter).calibration.prior, [777.0] * 3)  # the file is in use

    def prior(model=adapter, **changes):
        values = credit_model_of(model, **changes).calibration.prior
        assert values.max() < 0, (model, changes)
        spoil_priors()
        return values

    assert not np.allclose(prior(null_prompts=3), first)
    prior(forms=words)
    assert not np.allclose(prior(forms=words, aggregate="mean"), first)
    assert not np.allclose(prior(forms=words, aggregate="logsumexp"), first)
    prior(quantization="nf4")
    prior(compute_dtype="bfloat16")
    base = prior(model=model_dir)
    assert not np.allclose(base, first)
    with monkeypatch.context() as patch:
        patch.setattr(credit_model, "package_versions", lambda: {"transformers": "another"})
        np.testing.assert_array_equal(prior(), first)

    template = shutil.copytree(model_dir, tmp_path / "template")
    other = build_tokenizer()
    other.chat_template = CHATML.replace("assistant\n", "user\n")
    other.save_pretrained(template)
    assert not np.allclose(prior(model=str(template)), base)

    save_adapter(tmp_path / "adapter", model_dir, seed=2)  # trained again into the same folder
    assert not np.allclose(prior(), first)


def test_a_model_that_is_replaced_while_it_loads_is_refused(tmp_path, model_dir, monkeypatch):
    """Otherwise the old adapter's prior would be stored as the new one's, for good."""
    adapter = save_adapter(tmp_path / "adapter", model_dir, seed=1)

    def replaced(*args):
        loaded = load(*args)
        save_adapter(tmp_path / "adapter", model_dir, seed=2)
        return loaded

    monkeypatch.setattr(credit_model, "load", replaced)
    with pytest.raises(InputError, match="changed since it was checked"):
        credit_model_of(adapter)
    assert not stored_priors()


def test_calibration_none_has_no_prior(model_dir):
    model = credit_model_of(model_dir, calibration="none")
    assert not model.calibration.prior.any() and not stored_priors()
    raw = model.raw_scores(["Age: 30", "Age: 60, Occupation: Lawyer"])
    np.testing.assert_allclose(model.calibration.probabilities(raw), np.exp(log_softmax(raw, axis=1)))


def test_variants_score_as_models_loaded_alone(tmp_path, model_dir):
    refs = {"base": resolve(model_dir)}
    refs |= {f"sft{seed}": resolve(save_adapter(tmp_path / str(seed), model_dir, seed=seed)) for seed in (1, 2)}
    variants = CreditModel.load_variants(refs, scoring_options())
    texts = ["Age: 30", "Age: 60, Occupation: Lawyer"]
    for variant, ref in refs.items():
        alone, together = CreditModel.load(ref, scoring_options()), variants[variant]
        np.testing.assert_allclose(together.raw_scores(texts), alone.raw_scores(texts), atol=1e-4)
        np.testing.assert_allclose(together.calibration.prior, alone.calibration.prior, atol=1e-4)
        assert together.name == ref.name
    only = CreditModel.load_variants({"base": refs["base"]}, scoring_options())["base"]
    np.testing.assert_allclose(only.raw_scores(texts), variants["base"].raw_scores(texts), atol=1e-4)
