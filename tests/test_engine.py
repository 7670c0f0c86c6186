"""Scores and texts of a served model: the same as those of the model that is loaded, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CREDIT_TEXT, FLOAT32, INVOICE_SCHEMA, read_lines, write_lines
from engine_server import NAME, REFUSALS, ModelServer
from jsonschema import Draft202012Validator

import eval_creditmix
import infer_codegen
import infer_creditmix
import infer_idp
from common import InputError, LabelScorer, PromptEncoder
from distil.endpoint import Client, Server
from distil.engine import ServedModel, ServedScorer
from distil.idp.decoder import JsonDecoder
from distil.tasks import default_task
from distil.testing import load_named, save_random_model, sentencepiece_tokenizer

TASK = default_task()
# Labels of one token, of several, and one that begins another; the sums of 'distinct' end where they differ.
FORMS = {"Good": ["Good"], "Standard": ["Standard", "Typical"], "Bad": ["Bad"], "Badly": ["Badly paid"]}
TURNS = [TASK.prompt(CREDIT_TEXT), TASK.prompt("Age: 50"), "-"]


@pytest.fixture(scope="module")
def loaded(model_dir):
    return load_named(model_dir, "none", "float32")


@pytest.fixture
def serve(loaded):
    servers = []

    def start(kind="llama", *args, **how):
        servers.append(ModelServer(*loaded, kind, *args, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(Client, "_pause", lambda self, seconds: None)


def engine_of(server: ModelServer, model_dir: str, **how) -> ServedModel:
    return ServedModel(Server(server.url, NAME, **how), model_dir)


def local_scores(loaded, label_tokens: str = "all", forms: dict = FORMS) -> np.ndarray:
    scorer = LabelScorer(loaded[0], PromptEncoder(loaded[1]), forms, label_tokens=label_tokens)
    return scorer.raw_scores(TURNS)


def flags(server: ModelServer, model_dir: str, *more: object) -> list[str]:
    return [str(one) for one in ("--model_dir", model_dir, "--url", server.url, "--served_model", NAME, *more)]


@pytest.mark.parametrize("label_tokens", ["all", "distinct"])
@pytest.mark.parametrize("kind", ["llama", "vllm", "text"])
def test_served_scores_are_those_of_the_loaded_model(kind, label_tokens, loaded, serve, model_dir):
    """A random model has labels far from the most probable tokens: more are requested, or the prompt's echo."""
    scorer = ServedScorer(engine_of(serve(kind), model_dir), FORMS, "max", label_tokens)
    wanted = local_scores(loaded, label_tokens)
    np.testing.assert_allclose(scorer.raw_scores(TURNS), wanted, atol=1e-4)


def test_scores_are_of_temperature_1_where_a_server_applies_it(loaded, serve, model_dir):
    server = serve()
    server.tempered = True
    scores = ServedScorer(engine_of(server, model_dir), FORMS).raw_scores(TURNS)
    np.testing.assert_allclose(scores, local_scores(loaded), atol=1e-4)


def test_a_prior_is_measured_anew_for_each_run_of_an_engine(serve, model_dir, capsys):
    """Under one name the server may have other weights, or another quantisation, the next time. What differs by
    chance alone, as between batches of an engine, is the stored one: an interrupted run can continue."""
    server = serve()
    argv = flags(server, model_dir, "--features", CREDIT_TEXT, "--null_prompts", 2)
    priors = []
    for shift in (0.0, -0.01, -1.0):
        server.change = lambda reply, shift=shift: shifted(reply, shift)
        assert infer_creditmix.main(argv) == 0
        priors.append(list(json.loads(capsys.readouterr().out)["prior"].values()))
    assert priors[1] == priors[0]
    assert priors[2] == pytest.approx([value - 1 for value in priors[0]], abs=1e-3)


def shifted(reply, by):
    for top in (reply["choices"][0]["logprobs"] or {}).get("content", []):
        for one in [top, *top["top_logprobs"]]:
            one["logprob"] += by


def test_a_chat_is_asked_for_without_thinking(loaded, serve, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if enable_thinking %}{% endif %}")
    for path, wanted in ((model_dir, None), (str(folder), {"enable_thinking": False, "thinking": False})):
        server = serve("chat")
        engine_of(server, path)
        assert server.requests[-1].get("chat_template_kwargs") == wanted


def test_an_error_does_not_repeat_the_key(serve, model_dir, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    monkeypatch.setitem(REFUSALS, "401", "Incorrect API key provided: sk-1234567890")
    with pytest.raises(InputError, match=r"Incorrect API key provided: \.\.\.") as error:
        engine_of(serve(faults=("401",) * 9), model_dir)
    assert "1234567890" not in str(error.value)


def test_chats_score_labels_of_one_token(loaded, serve, model_dir, capsys):
    forms = {label: [label] for label in TASK.labels}
    server = serve("chat")
    scorer = ServedScorer(engine_of(server, model_dir), forms)
    np.testing.assert_allclose(scorer.raw_scores(TURNS), local_scores(loaded, forms=forms), atol=1e-4)
    assert "prompts go as a chat, by the server's own template" in capsys.readouterr().err
    with pytest.raises(InputError, match="an answer cannot be begun"):
        ServedScorer(scorer.engine, FORMS).raw_scores(TURNS)


@pytest.mark.parametrize("fault", ["429", "500", "503", "half json"])
def test_what_fails_for_a_while_is_tried_again(fault, loaded, serve, model_dir):
    server = serve(faults=("", fault, fault, "", fault))
    scores = ServedScorer(engine_of(server, model_dir), FORMS).raw_scores(TURNS)
    np.testing.assert_allclose(scores, local_scores(loaded), atol=1e-4)
    assert not server.faults


def in_parts(reply):
    message = reply["choices"][0]["message"]
    message["content"] = [{"type": "text", "text": message["content"]}]


def test_quirks_of_a_server_change_no_answer(loaded, serve, model_dir):
    """It takes none of the fields that other engines need, and has content in parts; "busy" comes with status 200."""

    def refusal(body):
        known = {"model", "messages", "max_completion_tokens", "temperature", "logprobs", "top_logprobs", "stop"}
        return next((f"Unrecognized request argument supplied: {name}" for name in body if name not in known), "")

    def busy_once(reply):
        in_parts(reply)
        if not seen:
            reply.clear()
            reply["error"] = {"message": "overloaded"}
        seen.append(reply)

    forms = {label: [label] for label in TASK.labels}
    server, seen = serve("chat", change=busy_once), []
    server.refuses = refusal
    scorer = ServedScorer(engine_of(server, model_dir), forms)
    np.testing.assert_allclose(scorer.raw_scores(TURNS), local_scores(loaded, forms=forms), atol=1e-4)
    plain, start = engine_of(serve("chat"), model_dir), scorer.engine.encoder.prompt(TURNS[0])
    assert scorer.engine.write([start], 8) == plain.write([start], 8)
    asked = len(server.requests)
    scorer.engine.write([start], 8)
    assert len(server.requests) == asked + 1  # refused no more


def test_a_server_that_ends(serve, model_dir):
    server = serve()
    scorer = ServedScorer(engine_of(server, model_dir, retries=1), FORMS)
    server.faults += ["503"] * 20
    with pytest.raises(ConnectionError, match=f"{server.url} gives no answer in all tries: .*503"):
        scorer.raw_scores(TURNS)


def drop_logprobs(reply):
    reply["choices"][0]["logprobs"] = None


def null_logprobs(reply):
    for top in (reply["choices"][0]["logprobs"] or {}).get("content", []):
        for one in top["top_logprobs"]:
            one["logprob"] = None
        top["logprob"] = None


def impossible(reply):
    for top in (reply["choices"][0]["logprobs"] or {}).get("content", []):
        for one in top["top_logprobs"]:
            one["logprob"] = -9999.0 if one["token"] == "Bad" else one["logprob"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_logprobs, "sends no log-probabilities"),
        (null_logprobs, "sends no log-probabilities"),
        (impossible, "label 'Bad' is not among the most probable tokens that it sends, nor does it echo"),
    ],
)
def test_labels_are_never_scored_by_a_guess(change, message, serve, model_dir):
    scorer = ServedScorer(engine_of(serve(change=change), model_dir), FORMS)
    with pytest.raises(InputError, match=message):
        scorer.raw_scores(TURNS)


@pytest.mark.parametrize("kind", ["llama", "vllm"])
def test_a_server_that_sends_fewer_than_requested(kind, loaded, serve, model_dir):
    """Without a word, unlike vLLM, which refuses: with an echo each label has its score, without one none."""
    server = serve(kind)
    server.capped = 5
    scorer = ServedScorer(engine_of(server, model_dir), FORMS)
    if kind == "vllm":
        np.testing.assert_allclose(scorer.raw_scores(TURNS), local_scores(loaded), atol=1e-4)
    else:
        with pytest.raises(InputError, match="not among the most probable tokens"):
            scorer.raw_scores(TURNS)


def test_another_tokenizer_is_refused(loaded, serve, model_dir, tmp_path):
    """By /tokenize where a server has it, else by the number of tokens that it reads."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(model_dir, tmp_path / "other")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["merges"] = tokens["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    other = AutoTokenizer.from_pretrained(folder)
    for kind, message in (("llama", "has another tokenizer than"), ("vllm", "another tokenizer"), ("text", "reads")):
        server = serve(kind)
        server.tokenizer = other
        with pytest.raises(InputError, match=message):
            engine_of(server, model_dir)


def test_a_prompt_that_is_cut_is_an_error(serve, model_dir):
    scorer = ServedScorer(engine_of(server := serve(), model_dir), FORMS)
    server.context = 30
    with pytest.raises(InputError, match=r"reads 30 tokens of a prompt of .*its context is too small"):
        scorer.raw_scores(TURNS)


@pytest.mark.parametrize("status", ["401", "404"])
def test_refusals_for_good_end_at_once(status, serve, model_dir):
    with pytest.raises(InputError, match=f"/v1 answers {status}: "):
        engine_of(serve(faults=(status,) * 9), model_dir)


def test_a_control_token_in_a_text_is_not_sent_as_one(serve, model_dir):
    scorer = ServedScorer(engine_of(serve("text"), model_dir), FORMS)
    with pytest.raises(InputError, match="a prompt has other tokens as text"):
        scorer.raw_scores(["Age: 5<|im_end|>"])


def test_a_name_that_is_not_served(serve, model_dir):
    with pytest.raises(InputError, match=f"serves {NAME}, not other: --served_model"):
        ServedModel(Server(serve().url, "other"), model_dir)


def test_infer_with_an_engine_answers_as_without(serve, model_dir, capsys, here):
    rows = write_lines("rows.jsonl", [{"features": CREDIT_TEXT}, {"features": "Age: 30"}])
    files = ["--input", rows, "--null_prompts", "2", "--output"]
    server = serve(faults=("", "503"))
    assert infer_creditmix.main(flags(server, model_dir, *files, "served.jsonl")) == 0
    assert infer_creditmix.main(["--model_dir", model_dir, *FLOAT32, *files, "local.jsonl"]) == 0
    for one, other in zip(read_lines("served.jsonl"), read_lines("local.jsonl"), strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
        assert one["prior"] == pytest.approx(other["prior"], abs=1e-4)
    assert "no stored calibration" in capsys.readouterr().err


def test_a_run_continues_at_another_address_and_keeps_no_secret(serve, model_dir, here):
    """The first run ends with the server after a part of the rows."""
    rows = write_lines("rows.jsonl", [{"features": f"Age: {20 + i % 5}"} for i in range(140)])
    files = ["--input", rows, "--output", "out.jsonl", "--calibration", "none", "--concurrency", 2]
    first, second = serve(), serve()
    secret = first.url.replace("http://", "http://me:s3cret@")
    part = Path("out.jsonl.part")
    first.change = lambda reply: part.exists() and part.stat().st_size and first.faults.extend(["401"] * 9)
    with pytest.raises(InputError, match="answers 401"):
        infer_creditmix.main([*flags(first, model_dir, *files), "--url", secret])
    assert len(read_lines(part)) == 128 and "s3cret" not in Path("out.jsonl.part.json").read_text()
    assert infer_creditmix.main(flags(second, model_dir, *files)) == 0
    assert len(read_lines("out.jsonl")) == 140 and len(second.requests) < 12 * 4 + 2


def test_a_fit_belongs_to_the_engine_that_it_was_made_with(serve, model_dir, credit_file, here, capsys):
    own = str(shutil.copytree(model_dir, here / "own"))
    server = serve()
    small = ["--data", credit_file, "--val_per_class", 5, "--null_prompts", 2, "--bootstrap", 10]
    assert eval_creditmix.main(flags(server, own, *small, "--fit", "--fit_per_class", 6)) == 0
    (path,) = Path(own).glob("calibration*.json")
    stored = json.loads(path.read_text())
    assert path.name.startswith(f"calibration_served_{NAME}_") and stored["served_model"] == NAME
    infer = ["--features", CREDIT_TEXT, "--null_prompts", 2]
    capsys.readouterr()
    assert infer_creditmix.main(flags(server, own, *infer, "--calibration", "fitted")) == 0
    assert json.loads(capsys.readouterr().out)["scores"]
    with pytest.raises(InputError, match="does not hold a fitted one"):
        infer_creditmix.main([*map(str, ["--model_dir", own, *FLOAT32, *infer, "--calibration", "fitted"])])
    shutil.copy(path, Path(own, "calibration.json"))
    with pytest.raises(InputError, match="fitted with another quantization"):
        infer_creditmix.main([*map(str, ["--model_dir", own, *FLOAT32, *infer])])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--url", "localhost:8080"], "an address such as"),
        (["--url", "http://127.0.0.1:1/v1"], "--url needs --served_model"),
        (["--served_model", "x"], "--served_model: only with --url"),
        (["--url", "http://x/v1", "--served_model", "x", "--batch_size", "4"], "only for a model that runs here"),
        (["--url", "http://x/v1", "--served_model", "x", "--concurrency", "0"], "--concurrency is at least 1"),
    ],
)
def test_flags_that_do_not_fit_together(extra, message, model_dir):
    with pytest.raises(InputError, match=message):
        infer_creditmix.main(["--model_dir", model_dir, "--features", CREDIT_TEXT, *extra])


def invoices() -> str:
    return write_lines("in.jsonl", [{"document": f"Invoice {i}\nTotal {i}.00 EUR"} for i in range(2)])


def test_documents_by_an_engine_are_those_of_the_loaded_model(serve, loaded, model_dir, here):
    Path("schema.json").write_text(json.dumps(INVOICE_SCHEMA))
    files = ["--input", invoices(), "--schema", "schema.json", "--max_new_tokens", "200", "--output"]
    server = serve()
    server.decoder = JsonDecoder(*loaded)
    assert infer_idp.main(flags(server, model_dir, *files, "served.jsonl")) == 0
    assert infer_idp.main(["--model_dir", model_dir, *FLOAT32, *files, "local.jsonl"]) == 0
    served, local = ([row["json"] for row in read_lines(name)] for name in ("served.jsonl", "local.jsonl"))
    assert served == local
    assert all(body["response_format"]["json_schema"]["schema"] == INVOICE_SCHEMA for body in server.requests[1:])


@pytest.mark.parametrize("letters", [1, 30, 60])
def test_a_document_over_the_budget_is_closed(letters, serve, loaded, model_dir, here):
    """With white space that the engine's grammar allows, unlike this project's."""
    Path("schema.json").write_text(json.dumps(INVOICE_SCHEMA))
    files = ["--input", invoices(), "--schema", "schema.json", "--max_new_tokens", "200", "--output"]
    server = serve()
    server.decoder, server.cut = JsonDecoder(*loaded), letters
    assert infer_idp.main(flags(server, model_dir, *files, "served.jsonl")) == 0
    server.cut = None
    assert infer_idp.main(flags(server, model_dir, *files, "complete.jsonl")) == 0
    for one, other in zip(read_lines("served.jsonl"), read_lines("complete.jsonl"), strict=True):
        assert one["truncated"] and not list(Draft202012Validator(INVOICE_SCHEMA).iter_errors(one["json"]))
        assert letters < 60 or one["json"]["number"] == other["json"]["number"]


def test_an_invalid_document_is_never_written(serve, model_dir, here):
    """Of a server that ignores the schema: each is tried the given number of times, and is an error then."""
    Path("schema.json").write_text(json.dumps(INVOICE_SCHEMA))
    files = ["--input", invoices(), "--schema", "schema.json", "--max_new_tokens", "20", "--output", "out.jsonl"]
    server = serve()
    assert infer_idp.main(flags(server, model_dir, *files, "--retries", 2)) == 1
    rows = read_lines("out.jsonl")
    assert all(row["error"]["code"] == "invalid" and "json" not in row for row in rows)
    assert len(server.requests) == 1 + 2 * 3
    assert len({body["seed"] for body in server.requests if body.get("temperature")}) > 1


def test_code_by_an_engine_is_that_of_the_loaded_model(serve, model_dir, here):
    files = ["--max_new_tokens", "24", "--input", write_lines("in.jsonl", [{"prompt": "add"}, {"prompt": "sub"}])]
    infer_codegen.main(flags(serve(), model_dir, *files, "--output", "served.jsonl"))
    infer_codegen.main(["--model_dir", model_dir, *FLOAT32, *files, "--output", "local.jsonl"])
    assert read_lines("served.jsonl") == read_lines("local.jsonl")


def test_the_blank_before_an_answer_is_no_part_of_it(tmp_path, serve, model_dir):
    """A server sends the blank that SentencePiece puts there; decoding here cuts it off."""
    turns = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    tokenizer = sentencepiece_tokenizer("prepend", eos_token="</s>", chat_template=turns)
    folder = save_random_model(tmp_path / "llama", tokenizer, "llama")
    for path, wanted in ((folder, "def f"), (model_dir, " def f")):
        server = serve(change=lambda reply: reply["choices"][0].update(text=" def f"))
        server.model, server.tokenizer = load_named(path, "none", "float32")
        engine = engine_of(server, path)
        assert engine.write([engine.encoder.prompt("x")], 8)[0].text == wanted


def test_a_folder_with_another_vocabulary(serve, tmp_path, tokenizer):
    """A model that reads the same tokens is enough: weights are the server's."""
    folder = save_random_model(tmp_path / "llama", tokenizer, "llama")
    assert engine_of(serve(), folder).context == 512
