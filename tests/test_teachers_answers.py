"""How answers are read: the label in a text, the version of the prompt, calibrated log-probabilities."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import ask_endpoint, gold_rows, read_lines, write_lines

from common import SYSTEM_PROMPT
from distil.teachers.answers import PROMPT_VERSION, RATIONALE, Prompts, label_first, label_of, read_prompts
from distil.testing import completion

LABELS = ("Good", "Standard", "Bad")


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


TOPICS = ["card_arrival", "card arrival", "virtual card arrival", "reverted_card_payment?", "declined", "-1", "1"]


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("card_arrival", "card_arrival"),
        ("**Card_arrival**", "card_arrival"),
        ("card arrival. They wait for it.", "card arrival"),
        ("Virtual card arrival", "virtual card arrival"),  # it has another label in it
        ("The topic is virtual card arrival.", "virtual card arrival"),
        ("The topic is card arrival.", "card arrival"),
        ("It is virtual card arrival or card arrival", None),
        ("Card arrival or virtual card arrival", None),
        ("not virtual card arrival", None),
        ("virtual_card_arrival", None),  # of one word no part counts
        ("reverted_card_payment?", "reverted_card_payment?"),  # the question mark is no doubt
        ("The topic is reverted_card_payment?", "reverted_card_payment?"),
        ("declined?", None),
        ("-1", "-1"),
        ("- 1", "1"),
        ("Answer: -1", "-1"),
    ],
)
def test_label_of_labels_that_contain_others_or_have_signs(answer, label):
    assert label_of(answer, TOPICS) == label


def test_label_of_labels_that_differ_in_case_alone():
    assert [label_of(text, ["Good", "good"]) for text in ("good", "Good\n", "good. Since", "I say Good")] == [
        "good",
        "Good",
        None,
        None,
    ]


def test_label_of_a_hundred_labels():
    labels = [f"{first}_{second}" for first in "abcdefghij" for second in "abcdefghij"]
    for label in labels:
        assert label_of(label.upper(), labels) == label_of(f"This is {label}.", labels) == label


def test_a_reason_keeps_its_label_first():
    for answer in ("**Bad** because", " - Bad, since"):
        assert label_first(answer, "Bad", True).startswith("Bad") and "." not in label_first(answer, "Bad", True)
    assert label_first("-1, since it fell", "-1", True) == "-1, since it fell"
    assert label_first("It is bad", "Bad", True) == "Bad. It is bad"
    assert label_first("It is bad", "Bad", False) == "Bad"


def test_which_answers_are_labels(here):
    """--labels, or else a few different gold answers."""
    many = [f"topic {number}" for number in range(12)]
    for count, expected in ((12, []), (10, sorted(many[:10]))):
        write_lines("in.jsonl", [{"input": "a", "output": many[i % count]} for i in range(30)])
        assert read_prompts("in.jsonl", None).labels == expected
        assert read_prompts("in.jsonl", "b, a").labels == ["b", "a"]
    write_lines("in.jsonl", [{"input": "a"}, {"input": "b"}])  # no gold answer at all
    assert read_prompts("in.jsonl", None).labels == []


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
