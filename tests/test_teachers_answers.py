"""How answers are read: the label in a text, the version of the prompt, calibrated log-probabilities."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import ask_endpoint, gold_rows, read_lines, write_lines

from common import SYSTEM_PROMPT
from distil.creditmix.rows import LABELS
from distil.teachers.answers import PROMPT_VERSION, RATIONALE, Prompts, label_of
from distil.testing import completion


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Bad", "Bad"),
        ("**Bad** because", "Bad"),
        ('"good".', "Good"),
        ("The label is Bad", "Bad"),
        ("Badly", None),
        ("Good. Unlike bad customers this one pays.", "Good"),
        ("Good, standard or Bad?", None),
        ("Good/Bad", None),
        ("Not good", None),
        ("Good? No, Bad.", None),
        ("Good isn't right", None),
        ("The mix is below standard", None),
        ("It cannot be rated as anything good", None),
        ("<think>Good or Bad? The debt is high.</think>\nBad", "Bad"),
        ("It is not at all bad", None),
        ("The customer isn't a Bad one", None),
        ("Not bad but good", None),
        ("none", None),
        ("", None),
    ],
)
def test_label_of(answer, label):
    assert label_of(answer, LABELS) == label
    assert label_of("Good enough", ["Good", "Good enough"]) == "Good enough"
    assert label_of("None of these, notably", ["Yes", "No"]) is None


def test_another_prompt_needs_another_version():
    """Rows keep the version alone: this digest and the version change together."""
    text = json.dumps([SYSTEM_PROMPT, RATIONALE, *Prompts(["x"], [None], [None], []).turns(True)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (PROMPT_VERSION, digest) == (1, "09b18133ef1386de")


@pytest.mark.parametrize(("method", "right"), [("none", 14), ("batch", 40), ("auto", 40)])
def test_log_probs_of_an_endpoint_are_calibrated(here, endpoint, method, right):
    """A model that says Good to all, though its log-probabilities tell the labels apart."""
    rows = gold_rows(40)
    write_lines("in.jsonl", rows)
    gold = {row["input"]: row["output"] for row in rows}
    server = endpoint()

    def reply(prompt):
        shares = {"Good": (0.9, 0.06, 0.01), "Standard": (0.6, 0.3, 0.01), "Bad": (0.6, 0.06, 0.2)}[gold[prompt]]
        return completion("Good", dict(zip(("Good", "Stand", "Bad"), shares, strict=True)))

    server.reply_to = reply
    assert ask_endpoint(server.url, "--calibration", method, "--labels", "Good,Standard,Bad") == 0
    written = read_lines("kd.jsonl")
    assert sum(row["teacher_output"] == gold[row["input"]] for row in written) == right
    assert all(row["teacher"]["probability"] == max(row["label_probs"].values()) for row in written)
