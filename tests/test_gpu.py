"""On a GPU: scores, training steps and constrained decoding of tiny models equal the CPU's. `pytest -m gpu`"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench.gpu_equality import LIMITS, PRECISIONS, TRAINERS, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Return bench.gpu_equality.compare's result, once for all tests; a copy goes to the file GPU_EQUALITY_JSON."""
    result = compare(tmp_path_factory.mktemp("equality"))
    if target := os.environ.get("GPU_EQUALITY_JSON"):
        Path(target).write_text(json.dumps(result, indent=1))
    return result


def within(result, name, limit):
    """Return whether a difference exists and is at most `limit`; NaN is not. name: of a part or of its values."""
    assert result["here"] == "cuda" and result["reference"] == "cpu"
    failed = {part: trace for errors in result["errors"].values() for part, trace in errors.items()}
    assert not [trace for part, trace in failed.items() if name in (part, f"{part}_loss", f"{part}_weights")]
    return result["differences"][name] <= limit


@pytest.mark.parametrize("precision", ["_".join(precision) for precision in PRECISIONS])
def test_scores(result, precision):
    assert within(result, f"scores_{precision}", LIMITS[f"scores_{precision}"])


def test_fast_scores_and_an_adapter_s(result):
    assert within(result, "fast_scores_none_float32", LIMITS["fast_scores_none_float32"])
    assert within(result, "adapter_scores_nf4_float32", LIMITS["adapter_scores_nf4_float32"])


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("precision", ["none_float32", "nf4_float32", "checkpointed_nf4_float32"])
def test_training_steps(result, method, precision):
    kind = precision.removeprefix("checkpointed_")
    assert within(result, f"{method}_{precision}_loss", LIMITS[f"loss_{kind}"])
    assert within(result, f"{method}_{precision}_weights", LIMITS[f"weights_{kind}"])


@pytest.mark.parametrize("method", TRAINERS)
def test_losses_in_bfloat16(result, method):
    assert within(result, f"{method}_nf4_bfloat16_loss", LIMITS["loss_nf4_bfloat16"])


def test_documents_under_a_schema(result):
    assert within(result, "decode_nf4_float32", 0)
    assert all(json.loads(text).keys() == {"number", "total"} for text in result["decode_nf4_bfloat16"])
