"""Token probabilities of an endpoint's answers: its tokens as the student's, and teachers with other tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from conftest import ask_endpoint, change_replies, gold_rows, read_lines, write_lines

from common import InputError, PromptEncoder
from distil.testing import completion, save_random_model, sentencepiece_tokenizer
from distil.token_probs import TokenProbs, TokenRow

PROMPTS = [{"input": f"Say {i}"} for i in range(12)]


@pytest.fixture
def words(tokenizer):
    """Return a function: the tokens of a text, as a server sends them."""
    return lambda text: [tokenizer.decode([number]) for number in PromptEncoder(tokenizer).text(text)]


def answer_with(server, text: str, *shares: dict[str, float]) -> None:
    server.reply_to = lambda prompt: completion(text, *shares)


def stored_rows(tokenizer) -> list[TokenRow]:
    """Return the token probabilities of kd.jsonl."""
    encoder, reader = PromptEncoder(tokenizer), TokenProbs(".")
    rows = read_lines("kd.jsonl")
    return [reader.row(row["token_probs"], encoder.completion(row["teacher_output"])) for row in rows]


def ask(server, model_dir: str, *flags: object) -> int:
    return ask_endpoint(server.url, "--top_k", 3, "--tokenizer", model_dir, *flags)


def known(row: TokenRow, at: int, tokenizer) -> dict[str, float]:
    """Return {token: probability} of a token's row."""
    pairs = zip(row.ids[at], np.exp(row.log_probs[at].astype("f8")), strict=True)
    return {tokenizer.decode([number]): pytest.approx(p, abs=2e-3) for number, p in pairs if number >= 0}


@pytest.mark.parametrize("end", [None, "<|im_end|>", "<|endoftext|>"])
def test_tokens_become_ids(here, endpoint, model_dir, tokenizer, end):
    """What is not a token of the student's goes to the rest; an end that is not sent was certain."""
    write_lines("in.jsonl", PROMPTS)
    shares = [{"Good": 0.5, "Bad": 0.2, "Excellent": 0.15, "Standard": 0.1}, {".": 0.6, "<|im_end|>": 0.3}]
    shares += [{end: 0.9, ".": 0.05}] if end else []
    answer_with(server := endpoint(), "Good.", *shares)
    assert ask(server, model_dir) == 0
    assert {request["top_logprobs"] for request in server.requests} == {3}
    for row in stored_rows(tokenizer):
        assert known(row, 0, tokenizer) == {"Good": 0.5, "Bad": 0.2, "Standard": 0.1}
        assert known(row, 1, tokenizer) == {".": 0.6, "<|im_end|>": 0.3}
        last = {"<|im_end|>": 0.9, ".": 0.05} if end == "<|im_end|>" else {"<|im_end|>": 1.0}
        assert known(row, 2, tokenizer) == last
        rest = [0.2, 0.1, 1 - sum(last.values())]
        np.testing.assert_allclose(np.exp(row.rest.astype("f8")), rest, atol=2e-3)


def test_thoughts_before_an_answer_and_bytes_of_characters(here, endpoint, model_dir, tokenizer, words):
    """Bytes, where a server sends them, tell the parts of a character apart; else they are the rest."""
    write_lines("in.jsonl", PROMPTS[:2])
    text = "é Good"
    tokens = ["So", "\n\n", "", "", *words(text)[2:]]
    assert "".join(words(text)).count("\ufffd") == 2
    server = endpoint()

    def reply(prompt: str) -> dict:
        answer = completion(text, *({token or "\ufffd": 0.7, "\ufffd ": 0.1} for token in tokens))
        content = answer["choices"][0]["logprobs"]["content"]
        if prompt == "Say 0":
            for token, part in zip(content[2:], (b"\xc3", b"\xa9"), strict=False):
                token["bytes"] = token["top_logprobs"][0]["bytes"] = list(part)
        return answer

    server.reply_to = reply
    assert ask(server, model_dir) == 0
    for row in stored_rows(tokenizer):
        np.testing.assert_allclose(np.exp(row.log_probs[:-1, 0].astype("f8")), 0.7, atol=2e-3)
        assert (row.ids[:, 0] == row.answer_ids).all() and (row.ids[:, 1:] == -1).all()


def test_thoughts_in_the_text(here, endpoint, model_dir, tokenizer):
    """The row gets the answer after them, and its tokens."""
    write_lines("in.jsonl", PROMPTS[:2])
    shares = [{token: 0.6} for token in ("<think>", "So", "</think>", "\n\n", "Good")]
    answer_with(server := endpoint(), "<think>So</think>\n\nGood", *shares)
    assert ask(server, model_dir) == 0
    assert [row["teacher_output"] for row in read_lines("kd.jsonl")] == ["Good"] * 2
    for row in stored_rows(tokenizer):
        assert known(row, 0, tokenizer) == {"Good": 0.6} and known(row, 1, tokenizer) == {"<|im_end|>": 1.0}


@pytest.mark.parametrize(
    "tokens, reason",
    [
        (["Go", "od", "."], "it has ['Go', 'od', '.'] where --tokenizer has ['Good', '.']"),
        (["Good"], "where --tokenizer has"),
        ([], "there are no log-probabilities of its tokens"),
        (["token_id:5", "token_id:6"], "it has ['token_id:5', 'token_id:6'] where"),
    ],
)
def test_a_teacher_with_other_tokens_is_refused(here, endpoint, model_dir, tokens, reason):
    write_lines("in.jsonl", PROMPTS)
    answer_with(server := endpoint(), "Good.", *({token: 0.9} for token in tokens))
    with pytest.raises(InputError) as error:
        ask(server, model_dir, "--concurrency", 1)
    assert f"{server.url} does not have the tokens of {model_dir} (--tokenizer): " in str(error.value)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) <= 9


def test_another_tokenizer_of_the_student_is_refused(here, endpoint, words, tmp_path):
    student = save_random_model(tmp_path / "student", sentencepiece_tokenizer("always", eos_token="</s>"), "llama")
    write_lines("in.jsonl", PROMPTS)
    answer_with(server := endpoint(), "Good answer", *({token: 0.9} for token in words("Good answer")))
    with pytest.raises(InputError, match="does not have the tokens of"):
        ask(server, student)


def test_a_few_answers_with_other_tokens_are_left_out(here, endpoint, model_dir, capsys):
    write_lines("in.jsonl", PROMPTS)
    server = endpoint()
    server.reply_to = lambda prompt: completion(
        "Good", *({t: 0.9} for t in (["Good"] if prompt < "Say 5" else "Good"))
    )
    assert ask(server, model_dir, "--concurrency", 1) == 0
    assert len(read_lines("kd.jsonl")) == 7
    assert "5 prompts are left out, their answer: does not have the tokens of" in capsys.readouterr().err


def test_labels_that_are_not_the_text_itself_are_left_out(here, endpoint, model_dir, capsys):
    write_lines("in.jsonl", rows := gold_rows(12))
    server = endpoint()
    said = {row["input"]: ["Good", "**Bad**", "Standard"][i % 3] for i, row in enumerate(rows)}
    split = {"Good": ["Good"], "Standard": ["Standard"], "**Bad**": ["*", "*", "Bad", "*", "*"]}
    server.reply_to = lambda prompt: completion(said[prompt], *({t: 0.9} for t in split[said[prompt]]))
    assert ask(server, model_dir, "--calibration", "none") == 0
    assert Counter(row["teacher_output"] for row in read_lines("kd.jsonl")) == {"Good": 4, "Standard": 4}
    assert "4 answers without token probabilities, which are of the text before" in capsys.readouterr().err


def test_as_many_as_the_server_allows(here, endpoint, model_dir, tokenizer):
    write_lines("in.jsonl", PROMPTS)
    answer_with(server := endpoint(("400",)), "Good", {"Good": 0.9})
    server.refusal = b'{"error": {"message": "top_logprobs is at most 20"}}'
    assert ask_endpoint(server.url, "--top_k", 32, "--tokenizer", model_dir, "--concurrency", 1) == 0
    assert [request["top_logprobs"] for request in server.requests] == [32] + [20] * 12
    assert {row.ids.shape for row in stored_rows(tokenizer)} == {(2, 32)}


def test_a_server_that_refuses_log_probs_is_refused(here, endpoint, model_dir):
    write_lines("in.jsonl", PROMPTS)
    server = endpoint(("400",) * 40)
    server.refusal = b'{"error": {"message": "logprobs are not supported"}}'
    with pytest.raises(InputError, match="logprobs are not supported: --top_k needs log-probabilities"):
        ask(server, model_dir)


def test_log_probs_of_another_form_are_no_second_request(here, endpoint, model_dir):
    write_lines("in.jsonl", PROMPTS)
    server = endpoint()
    server.reply_to = lambda prompt: completion("Good", {"Good": 0.9, "Bad": 0.1})

    def change(prompt: str, choice: dict) -> None:
        choice["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = None
        if prompt == "Say 3":
            choice["logprobs"]["content"][0]["logprob"] = None

    change_replies(server, change)
    assert ask(server, model_dir, "--concurrency", 1) == 0
    assert len(server.requests) == 12 and len(read_lines("kd.jsonl")) == 11


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--top_k", 3], "needs --tokenizer"),
        (["--top_k", 3, "--tokenizer", "m", "--answers", "gold"], "take a local teacher"),
        (["--tokenizer", "m"], "--tokenizer: only with --top_k"),
        (["--top_k", -1, "--tokenizer", "m"], "--top_k is at least 0"),
    ],
)
def test_flags_that_do_not_fit(here, flags, message):
    write_lines("in.jsonl", PROMPTS)
    with pytest.raises(InputError, match=message):
        ask_endpoint("http://127.0.0.1:9/v1", *flags)
