"""The server: HTTP side with an engine that answers by rule, engine with a tiny model, and both together."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import common
import serve_creditmix
import serving
from common import LabelScorer
from conftest import TinyEngine, save_adapter
from creditmix import LABELS, CreditModel, scoring_settings
from files import InputError
from models import add_adapters, load_model, model_fingerprint
from serve_creditmix import EXAMPLE, Metrics, bound_socket, build_parser, check_server_flags, create_app
from serving import VARIANTS, Engine, Refusal

RESPONSE_FIELDS = ["model_name", "prediction", "scores", "raw_scores", "prior", "probabilities", "top2_margin"]


def client_of(engine, key: str | None = None, log_features: bool = False) -> TestClient:
    return TestClient(create_app(engine, Metrics(), log_features, key), raise_server_exceptions=True)


@pytest.fixture
def client():
    with client_of(TinyEngine()) as client:
        yield client


def assert_error(reply, status: int, code: str) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert reply.json().keys() == {"error"} and error.keys() == {"code", "message", "hint"}
    assert error["code"] == code
    return error


@pytest.fixture(autouse=True)
def own_log_and_folder(tmp_path, monkeypatch):
    """A handler of one test must not write to its closed output in the next, and no test may meet the runs/ of the
    folder it is started in: a calibration of the base there would be used."""
    monkeypatch.chdir(tmp_path)
    yield
    serve_creditmix.LOG.handlers, serve_creditmix.LOG.propagate = [], True


# ---------------------------------------------------------------------------------------------------------- HTTP side


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_its_endpoint(client, variant):
    reply = client.post(f"/infer/{variant}", json={"features": EXAMPLE})
    assert reply.status_code == 200
    assert list(reply.json()) == RESPONSE_FIELDS and reply.json()["model_name"] == variant
    results = client.post(f"/infer/{variant}/batch", json={"features": [EXAMPLE, "Age: 3"]}).json()["results"]
    assert [list(result) for result in results] == [RESPONSE_FIELDS] * 2


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid"),
        (b"{", 400, "not_json"),
        (b'{"features": "\xff\xfe"}', 400, "not_json"),
        (b"{}", 422, "invalid"),
        (b"[]", 422, "invalid"),
        (b"null", 422, "invalid"),
        (b'{"features": NaN}', 422, "invalid"),
        (b'{"features": 3}', 422, "invalid"),
        (b'{"features": ""}', 422, "invalid"),
        (b'{"features": " \\n "}', 422, "invalid"),
        (b'{"features": "\\ud800"}', 422, "invalid"),
        (b'{"features": "x", "more": 1}', 422, "invalid"),
        (b'{"features": "' + b"x" * 2001 + b'"}', 422, "invalid"),
        (b'{"features": "' + b"x" * 1_000_001 + b'"}', 413, "too_large"),
        (b"[" * 100_000, 400, "not_json"),
    ],
)
def test_bad_bodies_get_one_error_shape(client, body, status, code):
    headers = {"content-type": "application/json"}
    error = assert_error(client.post("/infer/sft", content=body, headers=headers), status, code)
    assert error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize("features", [[], ["x"] * 257, ["x", ""], ["x", 3], "x", None])
def test_bad_batches_are_refused_whole(client, features):
    assert_error(client.post("/infer/kd/batch", json={"features": features}), 422, "invalid")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_of_another_content_type_is_told_so(client, kind):
    headers = {"content-type": kind} if kind else {}
    error = assert_error(
        client.post("/infer/sft", content=b'{"features": "Age: 3"}', headers=headers), 415, "not_json"
    )
    assert error["hint"] == "send the header Content-Type: application/json"


def test_a_client_that_leaves_ends_its_request(capsys):
    """Its rows are dropped then (see the engine's test), and the log says so."""
    ended = []

    class Slow(TinyEngine):
        async def score(self, variant, features):
            try:
                await asyncio.sleep(20)
            finally:
                ended.append(features)

    async def ask() -> None:
        messages = [
            {"type": "http.request", "body": b'{"features": "Age: 3"}', "more_body": False},
            {"type": "http.disconnect"},
        ]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/infer/sft", "headers": headers, "query_string": b""}

        async def receive():
            await asyncio.sleep(0.1)
            return messages.pop(0)

        async def send(message):
            raise AssertionError("nobody is there")

        await create_app(Slow(), Metrics())(scope, receive, send)
        await asyncio.sleep(0.05)
        assert ended == [["Age: 3"]]  # here: the end of the loop would cancel it anyway

    serve_creditmix.log_json_lines()
    start = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - start < 10
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["status"] == 499


def test_other_paths_and_methods(client):
    assert_error(client.get("/nothing"), 404, "not_found")
    assert_error(client.post("/infer/xyz", json={"features": "x"}), 404, "not_found")
    assert_error(client.get("/infer/sft"), 405, "method_not_allowed")


def test_a_body_without_a_length_is_limited_too(client):
    chunks = (b"x" * 100_000 for _ in range(20))
    assert_error(client.post("/infer/sft", content=chunks), 413, "too_large")


def test_a_slow_body_is_given_up(monkeypatch):
    monkeypatch.setattr(serve_creditmix, "BODY_SECONDS", 0.05)

    async def ask() -> list[dict]:
        app, sent = create_app(TinyEngine(), Metrics()), []
        scope = {"type": "http", "method": "POST", "path": "/infer/sft", "headers": [], "query_string": b""}

        async def receive():
            await asyncio.sleep(10)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent

    sent = asyncio.run(ask())
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "too_slow"
    assert (b"connection", b"close") in sent[0]["headers"]


def test_refusals_and_failures_show_no_internals(client, capsys):
    reply = client.post("/infer/sft", json={"features": "raise Refusal"})
    assert_error(reply, 503, "busy")
    assert reply.headers["retry-after"] == "7"
    reply = client.post("/infer/sft", json={"features": "raise ValueError"})
    assert_error(reply, 500, "internal")
    assert "secret" not in reply.text and "Traceback" not in reply.text


def test_the_request_id_is_the_callers_or_a_new_one(client):
    reply = client.get("/healthz", headers={"x-request-id": "abc-1.2_3"})
    assert reply.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 65, "<script>"):
        assert len(client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]) == 32


def test_a_key_is_asked_for_where_one_is_set():
    with client_of(TinyEngine(), key="s3cret-ü") as client:
        body = {"features": EXAMPLE}
        for header in (None, "Bearer wrong", "s3cret-ü", "Basic s3cret-ü", "Bearer ", "Bearer s3cret-ü x"):
            headers = {"authorization": header.encode()} if header else {}
            for reply in (
                client.post("/infer/sft", json=body, headers=headers),
                client.get("/metrics", headers=headers),
            ):
                assert_error(reply, 401, "unauthorized")
                assert reply.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} s3cret-ü".encode()}
            assert client.post("/infer/sft", json=body, headers=headers).status_code == 200
        document = client.get("/openapi.json").json()["paths"]
        keyed = {path for path, methods in document.items() for method in methods.values() if "security" in method}
        assert keyed == set(document) - {"/healthz", "/readyz"}
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_binding_elsewhere_needs_a_key(monkeypatch):
    monkeypatch.delenv(serve_creditmix.API_KEY, raising=False)
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(InputError, match="set a key in"):
            check_server_flags(build_parser().parse_args(["--host", host]))
    for host in ("127.0.0.1", "localhost", "::1"):
        check_server_flags(build_parser().parse_args(["--host", host]))
    with pytest.raises(InputError, match="set a key in"):  # the script asks, before anything else
        serve_creditmix.main(["--host", "0.0.0.0", "--base", "/nothing/here"])
    monkeypatch.setenv(serve_creditmix.API_KEY, "k")
    check_server_flags(build_parser().parse_args(["--host", "0.0.0.0"]))


def test_under_uvicorn_an_address_of_another_network_needs_a_key():
    """uvicorn serve_creditmix:app --host 0.0.0.0 never passes our flags: the socket's own address tells."""

    async def ask(server) -> int:
        app, sent = create_app(TinyEngine(), Metrics()), []
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/models",
            "headers": [],
            "query_string": b"",
            "server": server,
        }

        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(ask(("192.168.1.7", 8000))) == 403
    assert asyncio.run(ask(("127.0.0.1", 8000))) == 200


@pytest.mark.parametrize(
    "flags",
    [
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--gather_ms", "-1"],
        ["--gather_ms", "inf"],
        ["--queue_rows", "3"],
        ["--port", "70000"],
    ],
)
def test_flags_out_of_range(flags):
    with pytest.raises(InputError, match="--gather_ms is 0 or more"):
        check_server_flags(build_parser().parse_args(flags))


def test_flags_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CREDITMIX_BASE", "smollm2-135m")
    monkeypatch.setenv("CREDITMIX_PORT", "9001")
    monkeypatch.setenv("CREDITMIX_LOG_FEATURES", "1")
    args = build_parser().parse_args([])
    assert (args.base, args.port, args.log_features) == ("smollm2-135m", 9001, True)
    assert build_parser().parse_args(["--port", "9002"]).port == 9002


def test_wrong_environment_ends_with_one_line_under_uvicorn_too(monkeypatch, capsys):
    for name, value, message in (
        ("CREDITMIX_QUANTIZATION", "int8", "$CREDITMIX_QUANTIZATION is 'int8'; possible are nf4, none"),
        ("CREDITMIX_TIMEOUT", "0", "--timeout above 0"),
        ("CREDITMIX_BASE", "/nothing/here", "/nothing/here: no such model folder"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(SystemExit) as stop:
                serve_creditmix.app  # noqa: B018
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and message in said


def test_half_a_request_head_is_not_waited_for(monkeypatch):
    """uvicorn itself would keep the connection for ever; enough of them and no one else gets one."""
    import uvicorn

    monkeypatch.setattr(serve_creditmix, "BODY_SECONDS", 0.3)
    bound = bound_socket("127.0.0.1", 0)
    app = create_app(TinyEngine(), Metrics())
    config = uvicorn.Config(app, log_config=None, http=serve_creditmix.impatient_protocol(), timeout_keep_alive=15)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = bound.getsockname()
        half = socket.create_connection(address, timeout=10)
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: x")
        whole = http.client.HTTPConnection(*address, timeout=10)
        for pause in (0, 0.4):  # kept alive beyond the limit, as its first head came in time
            time.sleep(pause)
            whole.request("GET", "/healthz")
            assert whole.getresponse().read() == b'{"status":"ok"}'
        assert half.recv(4096) == b""  # closed by the server
        half.close()
        whole.close()
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()


def test_a_port_in_use_is_said_before_anything_loads():
    with bound_socket("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP and bound.getsockname()[0] == "127.0.0.1"
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: Address already in use; choose"):
            bound_socket("127.0.0.1", port)
    bound_socket("127.0.0.1", port).close()


def test_importing_the_module_builds_nothing():
    with pytest.raises(AttributeError):
        serve_creditmix.nothing  # noqa: B018


def test_metrics_and_log(capsys, client):
    serve_creditmix.log_json_lines()
    client.post("/infer/sft", json={"features": EXAMPLE})
    client.post("/infer/sft", json={"features": ""})
    client.post("/infer/kd/batch", json={"features": ["a", "b"]})
    text = client.get("/metrics").text
    for line in (
        'creditmix_requests_total{status="200",variant="sft"} 1.0',
        'creditmix_requests_total{status="422",variant="sft"} 1.0',
        'creditmix_predictions_total{label="Standard",variant="kd"} 2.0',
        'creditmix_top2_margin_count{variant="kd"} 2.0',
        'creditmix_request_seconds_count{variant="sft"} 2.0',
    ):
        assert line in text
    assert "process_resident_memory_bytes" in text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["status"] for line in lines if line["event"] == "request"][:2] == [200, 422]
    assert "Scientist" not in json.dumps(lines) and all(line["request_id"] for line in lines)


def test_features_are_logged_only_when_asked_for(capsys):
    with client_of(TinyEngine(), log_features=True) as client:
        serve_creditmix.log_json_lines()
        client.post("/infer/sft", json={"features": EXAMPLE})
    assert "Scientist" in capsys.readouterr().err


def test_every_example_of_the_openapi_document_works(client):
    document = client.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = None
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                schema = document["components"]["schemas"][schema["$ref"].split("/")[-1]]
                body = {name: field["examples"][0] for name, field in schema["properties"].items()}
            reply = client.request(method, path, json=body)
            assert reply.status_code == 200, (path, reply.text)
            tried += 1
    assert tried == 2 * len(VARIANTS) + 4


def test_page_and_docs_ask_no_other_host(client):
    for path in ("/", "/docs"):
        text = client.get(path).text.replace("http://www.w3.org", "")
        assert "https://" not in text and "http://" not in text and "//cdn" not in text
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


# ------------------------------------------------------------------------------------------------------------- engine


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory) -> dict[str, str]:
    """Adapters of the tiny model that answer differently."""
    made = {}
    for seed, variant in enumerate(VARIANTS[1:], 1):
        folder = tmp_path_factory.mktemp("serve") / f"creditmix_{variant}"
        save_adapter(folder, model_dir, seed)
        made[variant] = str(folder)
    return made


def arguments(model_dir: str, folders: dict[str, str], *flags: str) -> Namespace:
    given = ["--base", model_dir, "--quantization", "none", "--compute_dtype", "float32", "--gather_ms", "5"]
    for variant in VARIANTS[1:]:
        given += [f"--{variant}", folders.get(variant, "none")]
    return build_parser().parse_args([*given, *flags])


async def when_ready(engine: Engine) -> None:
    while not engine.ready and not engine.failure:
        await asyncio.sleep(0.01)
    assert engine.ready


def with_engine(args: Namespace, use):
    """Run `await use(engine)` against a started engine."""

    async def run():
        engine = Engine(args)
        await engine.start()
        try:
            await when_ready(engine)
            return await use(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


TEXTS = [f"Age: {20 + i}, Outstanding Debt: {37 * i}, Occupation: {'Doctor' * (i % 5)}" for i in range(24)]


def alone(model_dir: str, args: Namespace) -> list[dict]:
    """What infer_creditmix.py answers."""
    model = CreditModel.load(model_dir, args)
    return model.responses(model.raw_scores(TEXTS))


def assert_same_answers(found: list[dict], wanted: list[dict], atol: float = 1e-4) -> None:
    assert [answer["model_name"] for answer in found] == [answer["model_name"] for answer in wanted]
    for kind in ("scores", "raw_scores", "prior", "probabilities"):
        values = [[[answer[kind][label] for label in LABELS] for answer in answers] for answers in (found, wanted)]
        np.testing.assert_allclose(*values, atol=atol)


@pytest.mark.parametrize(("quantization", "atol"), [("none", 1e-4), ("nf4", 0.01)])
def test_mixed_batches_answer_as_infer_does(quantization, atol, model_dir, folders):
    """4-bit kernels round by the form of the batch."""
    args = arguments(model_dir, folders, "--batch_size", "7", "--quantization", quantization)

    async def use(engine):
        asked = [(text, variant) for text in TEXTS for variant in VARIANTS]
        answers = await asyncio.gather(*(engine.score(variant, [text]) for text, variant in asked))
        return {v: [a[0] for a, (_, w) in zip(answers, asked, strict=True) if w == v] for v in VARIANTS}

    found = with_engine(args, use)
    wanted = {variant: alone(folders.get(variant, model_dir), args) for variant in VARIANTS}
    for variant in VARIANTS:
        assert_same_answers(found[variant], wanted[variant], atol)
    raw = [[a["raw_scores"]["Good"] for a in wanted[variant]] for variant in VARIANTS]
    assert min(np.abs(np.subtract(raw[i], raw[j])).max() for i in range(4) for j in range(i)) > 0.01


def test_rows_of_a_customer_share_a_beginning_by_variant(model_dir, folders, monkeypatch):
    """What such rows share is run once for each variant of a mixed batch."""
    texts = [f"Age: 30, Occupation: {'Doctor' * 9}, Outstanding Debt: {n}" for n in range(4)]
    lengths, stem = [], LabelScorer._stem
    monkeypatch.setattr(LabelScorer, "_stem", lambda self, *rest: lengths.append(stem(self, *rest)) or lengths[-1])
    args = arguments(model_dir, folders, "--batch_size", "16", "--gather_ms", "500")

    async def use(engine):
        answers = await asyncio.gather(*(engine.score(variant, texts) for variant in VARIANTS))
        return dict(zip(VARIANTS, answers, strict=True)), len(engine.models["base"].scorer.prefix)

    monkeypatch.setattr(common, "STEM_TOKENS", 10**9)
    apart, prefix = with_engine(args, use)
    assert max(length for length, _ in lengths) == prefix
    monkeypatch.setattr(common, "STEM_TOKENS", 0)
    together, prefix = with_engine(args, use)
    assert max(length for length, _ in lengths) > prefix + 20
    for variant in VARIANTS:
        assert_same_answers(together[variant], apart[variant])


def test_rows_of_many_requests_share_batches(model_dir, folders, monkeypatch):
    sizes = []
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: sizes.append(len(rows)) or original(self, rows))

    async def use(engine):
        await asyncio.gather(*(engine.score(VARIANTS[i % 4], [text]) for i, text in enumerate(TEXTS)))

    with_engine(arguments(model_dir, folders, "--batch_size", "8", "--gather_ms", "500"), use)
    assert sizes == [8, 8, 8]


def test_a_missing_adapter_answers_503_with_its_command(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as found:
            await engine.score("dpo", ["Age: 3"])
        return found.value, await engine.score("kd", ["Age: 3"])

    refusal, answers = with_engine(arguments(model_dir, {"kd": folders["kd"], "dpo": "runs/creditmix_dpo"}), use)
    assert (refusal.status, refusal.code) == (503, "adapter_missing")
    assert "python dpo_train.py --adapter runs/creditmix_sft" in refusal.hint and model_dir not in refusal.hint
    assert answers[0]["prediction"] in LABELS


def test_an_endpoint_that_was_left_out_says_so(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as found:
            await engine.score("dpo", ["Age: 3"])
        return found.value

    assert (
        with_engine(arguments(model_dir, folders | {"dpo": "none"}), use).hint
        == "the server was started with --dpo none"
    )


def test_an_adapter_of_another_base_is_refused_at_once(model_dir, folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders["sft"], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/model"}))
    with pytest.raises(InputError, match="belongs to some/model, not to --base"):
        Engine(arguments(model_dir, folders | {"sft": str(other)}))


def test_a_base_may_be_named_by_any_path_to_it(model_dir, folders, monkeypatch):
    monkeypatch.chdir(Path(model_dir).parent)
    assert set(Engine(arguments(Path(model_dir).name, folders)).folders) == set(folders)


def test_adapters_without_a_calibration_are_named_in_the_log(model_dir, folders, caplog):
    Engine(arguments(model_dir, folders))
    said = [record.fields["variant"] for record in caplog.records if record.message == "not calibrated"]
    assert said == list(folders)


def test_a_folder_that_was_named_must_have_an_adapter(model_dir, tmp_path):
    with pytest.raises(InputError, match="no adapter there; 'none' leaves this endpoint without one"):
        Engine(arguments(model_dir, {"kd": str(tmp_path)}))
    unnamed = build_parser().parse_args(["--base", model_dir])  # what lies under runs/ is served where it is there
    assert Engine(unnamed).folders == {} and set(Engine(unnamed).missing()) == {"sft", "kd", "dpo"}


def test_a_calibration_of_another_model_is_refused_before_anything_loads(model_dir, folders, tmp_path):
    other = save_adapter(tmp_path / "sft", model_dir, 5)
    (tmp_path / "sft" / "calibration.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(InputError, match="fitted with another"):
        Engine(arguments(model_dir, folders | {"sft": other}))


def test_one_bad_row_does_not_fail_its_neighbours(model_dir, folders, monkeypatch):
    from common import LabelScorer

    original = LabelScorer.score

    def failing(self, rows, *rest, **named):
        if any("poison" in self.encoder.tokenizer.decode(row) for row in rows):
            raise ValueError("poison")
        return original(self, rows, *rest, **named)

    monkeypatch.setattr(LabelScorer, "score", failing)

    async def use(engine):
        asked = [engine.score("sft", [text]) for text in ("Age: 1", "poison", "Age: 2", "Age: 3")]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = with_engine(arguments(model_dir, folders), use)
    assert isinstance(answers[1], Refusal) and (answers[1].status, answers[1].code) == (500, "failed")
    assert all(answers[i][0]["prediction"] in LABELS for i in (0, 2, 3))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_runs_in_parts(error, model_dir, folders, monkeypatch):
    from common import LabelScorer

    args = arguments(model_dir, folders)
    wanted = alone(folders["sft"], args)
    original = LabelScorer.score

    def small_only(self, rows, *rest, **named):
        if len(rows) > 8:  # the prior has 7
            raise error
        return original(self, rows, *rest, **named)

    monkeypatch.setattr(LabelScorer, "score", small_only)

    async def use(engine):
        return await engine.score("sft", TEXTS)

    assert_same_answers(with_engine(args, use), wanted)


def test_a_full_queue_refuses_and_a_long_wait_ends(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: gate.wait(20) and original(self, rows))

    async def use(engine):
        first = asyncio.create_task(engine.score("sft", ["Age: 1"]))
        await asyncio.sleep(0.1)  # now it is in the worker, behind the gate
        with pytest.raises(Refusal) as busy:
            await engine.score("sft", TEXTS * 11)
        late = await asyncio.gather(first, engine.score("sft", ["Age: 2"]), return_exceptions=True)
        gate.set()
        return busy.value, late, await engine.score("sft", ["Age: 3"])

    flags = ("--queue_rows", "256", "--timeout", "1.5")
    busy, late, after = with_engine(arguments(model_dir, folders, *flags), use)
    assert (busy.status, busy.code, busy.retry_after) == (503, "busy", 1)
    assert [(refusal.status, refusal.code) for refusal in late] == [(504, "timeout")] * 2  # while the worker was busy
    assert after[0]["prediction"] in LABELS


def test_rows_of_batch_requests_count_against_the_limit(model_dir, folders):
    async def use(engine):
        asked = [engine.score("sft", (TEXTS * 11)[:200]) for _ in range(3)]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        return replies, await engine.score("sft", (TEXTS * 11)[:200])

    (first, *others), again = with_engine(arguments(model_dir, folders, "--queue_rows", "256"), use)
    assert len(first) == len(again) == 200
    assert [(refusal.status, refusal.code) for refusal in others] == [(503, "busy")] * 2


def waiting_row(variant: str = "base", enqueued: float = 0.0, **more) -> Namespace:
    return Namespace(variant=variant, enqueued=enqueued, future=Namespace(done=lambda: False), **more)


def test_a_batch_is_of_few_variants_and_has_the_row_that_waited_longest(model_dir):
    engine = Engine(arguments(model_dir, {}, "--batch_size", "4"))
    engine._single.extend(waiting_row(VARIANTS[i % 4], i) for i in range(16))
    engine._single[1].future.done = lambda: True  # nobody waits for the first of sft
    batches = []
    for start in range(16, 32, 4):  # each time there are others that would fill the next batch
        batches.append([(row.variant, row.enqueued) for row in engine._take()])
        engine._single.extend(waiting_row("base", i) for i in range(start, start + 4))
    assert batches[0] == [("base", i) for i in (0, 4, 8, 12)]
    assert batches[1] == [("kd", i) for i in (2, 6, 10, 14)]
    assert batches[2] == [("dpo", i) for i in (3, 7, 11, 15)]
    assert batches[3] == [("sft", 5), ("sft", 9), ("sft", 13), ("base", 16)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 32])
def test_neither_kind_of_request_starves(size, model_dir):
    """A quarter of the places are for rows of batch requests as long as both wait, at every batch size."""
    engine = Engine(arguments(model_dir, {}, "--batch_size", str(size)))
    for queue, name in ((engine._single, "single"), (engine._bulk, "bulk")):
        queue.extend(waiting_row(kind=name) for _ in range(20 * size))
    taken = [engine._take() for _ in range(16)]
    assert [len(batch) for batch in taken] == [size] * 16
    assert sum(row.kind == "bulk" for batch in taken for row in batch) == 4 * size
    engine._single.clear()
    assert [row.kind for row in engine._take()] == ["bulk"] * size


def test_a_failure_in_the_loop_is_said_to_all_who_wait(model_dir, folders, monkeypatch):
    async def use(engine):
        monkeypatch.setattr(Engine, "_take", lambda self: 1 / 0)
        found = await asyncio.gather(engine.score("sft", ["Age: 1"]), return_exceptions=True)
        late = await asyncio.gather(engine.score("sft", ["Age: 1"]), return_exceptions=True)
        return [(refusal.status, refusal.code) for refusal in found + late], engine.ready

    assert with_engine(arguments(model_dir, folders), use) == ([(503, "stopped")] * 2, False)


def test_texts_are_tokenised_outside_the_event_loop(model_dir, folders, monkeypatch):
    threads = []
    original = CreditModel.prompt
    monkeypatch.setattr(
        CreditModel, "prompt", lambda *a: threads.append(threading.current_thread().name) or original(*a)
    )

    async def use(engine):
        await engine.score("sft", TEXTS)

    with_engine(arguments(model_dir, folders), use)
    assert len(threads) == len(TEXTS) and {name.partition("_")[0] for name in threads} == {"tokenizer"}


def test_each_variant_has_its_own_calibration(model_dir, folders, tmp_path):
    args = arguments(model_dir, folders)
    own = {}
    for number, (variant, folder) in enumerate(folders.items(), 1):
        own[variant] = str(shutil.copytree(folder, tmp_path / variant))
        prior = dict.fromkeys(LABELS, -0.5)
        stored = {"calibration": "fitted", "prior": prior, "temperature": 1.0 + number}
        stored["bias"] = dict.fromkeys(LABELS, float(number))
        stored |= scoring_settings(args) | {"model": model_fingerprint(own[variant])}
        (tmp_path / variant / "calibration.json").write_text(json.dumps(stored))
    args = arguments(model_dir, own)

    async def use(engine):
        described = {variant: model["calibration"] for variant, model in engine.description.items()}
        return {variant: await engine.score(variant, TEXTS) for variant in VARIANTS}, described

    found, described = with_engine(args, use)
    for variant in VARIANTS:
        assert_same_answers(found[variant], alone(own.get(variant, model_dir), args))
    assert [described[v]["temperature"] for v in VARIANTS] == [1, 2, 3, 4]
    assert [described[v]["method"] for v in VARIANTS] == ["contextual", "fitted", "fitted", "fitted"]
    assert described["kd"]["bias"] == dict.fromkeys(LABELS, 2.0)


def test_unsure_rows_are_referred_where_the_server_is_told_to(model_dir, folders):
    args = arguments(model_dir, folders, "--abstain_below", "0.999")
    metrics = Metrics()
    with TestClient(create_app(Engine(args, metrics), metrics)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        one = client.post("/infer/sft", json={"features": "Age: 3"}).json()
        many = client.post("/infer/sft/batch", json={"features": ["Age: 3", "Age: 4"]}).json()["results"]
    assert [list(answer) for answer in (one, *many)] == [[*RESPONSE_FIELDS, "extra"]] * 3
    assert one["extra"] == {"refer": True}


def test_adapters_take_the_type_of_computation(model_dir, folders):
    """In float32, as they were trained, they would need twice the memory."""
    model, _ = load_model(model_dir, "nf4", "bfloat16")
    weights = [p for n, p in add_adapters(model, folders).named_parameters() if "lora_" in n]
    assert len(weights) == 2 * 2 * 7 * len(folders) and {p.dtype for p in weights} == {torch.bfloat16}


def test_single_requests_do_not_wait_for_a_whole_batch_request(model_dir, folders):
    async def use(engine):
        order = []

        async def ask(name, texts):
            await engine.score("sft", texts)
            order.append(name)

        bulk = asyncio.create_task(ask("bulk", TEXTS * 4))
        await asyncio.sleep(0)
        await asyncio.gather(bulk, *(ask(i, ["Age: 3"]) for i in range(4)))
        return order

    assert with_engine(arguments(model_dir, folders, "--batch_size", "8"), use)[-1] == "bulk"


def test_rows_of_a_caller_that_left_are_not_scored(model_dir, folders, monkeypatch):
    scored = []
    original = Engine._score
    monkeypatch.setattr(
        Engine, "_score", lambda self, rows: scored.extend(r.prompt for r in rows) or original(self, rows)
    )

    async def use(engine):
        task = asyncio.create_task(engine.score("sft", ["gone"]))
        while not engine._single:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.score("sft", ["Age: 3"])
        return engine.models["sft"].prompt("Age: 3")

    args = arguments(model_dir, folders, "--gather_ms", "200")
    assert [with_engine(args, use)] == scored


def test_text_longer_than_the_context_is_refused(model_dir, folders):
    async def use(engine):
        with pytest.raises(Refusal) as found:
            await engine.score("sft", ["Age: 1", "x y " * 400])
        return found.value

    refusal = with_engine(arguments(model_dir, folders), use)
    assert (refusal.status, refusal.code) == (422, "too_long") and "features[1]" in refusal.message


def test_a_stop_answers_the_batch_that_is_running(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._score
    monkeypatch.setattr(Engine, "_score", lambda self, rows: gate.wait(20) and original(self, rows))

    async def run():
        engine = Engine(arguments(model_dir, folders, "--batch_size", "1"))
        await engine.start()
        await when_ready(engine)
        running = asyncio.create_task(engine.score("sft", ["Age: 1"]))
        await asyncio.sleep(0.1)  # in the worker, behind the gate
        waiting = asyncio.create_task(engine.score("sft", ["Age: 2"]))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0.1)
        gate.set()
        await stopping
        return await asyncio.gather(running, waiting, return_exceptions=True)

    answer, refusal = asyncio.run(run())
    assert answer[0]["prediction"] in LABELS
    assert (refusal.status, refusal.code) == (503, "shutting_down")


def test_until_the_model_is_loaded_requests_get_503_and_health_checks_an_answer(model_dir, folders, monkeypatch):
    gate = threading.Event()
    original = Engine._load
    monkeypatch.setattr(Engine, "_load", lambda self: gate.wait(20) and original(self))
    args = arguments(model_dir, folders)
    with TestClient(create_app(Engine(args), Metrics())) as client:
        for reply in (client.post("/infer/sft", json={"features": "Age: 3"}), client.get("/readyz")):
            assert_error(reply, 503, "loading")
            assert reply.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200
        gate.set()
        while client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        assert client.post("/infer/sft", json={"features": "Age: 3"}).status_code == 200


def test_a_stop_does_not_wait_for_a_load(model_dir, folders, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Engine, "_load", lambda self: gate.wait(20))

    async def run() -> float:
        engine = Engine(arguments(model_dir, folders))
        await engine.start()
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await engine.stop()
        return time.monotonic() - start

    try:
        assert asyncio.run(run()) < 5
    finally:
        gate.set()


def test_a_failed_load_is_said_and_does_not_hang(model_dir, folders, monkeypatch):
    monkeypatch.setattr(serving.CreditModel, "load_variants", lambda *rest: 1 / 0)

    async def run():
        engine = Engine(arguments(model_dir, folders))
        await engine.start()
        while not engine.failure:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as found:
            await engine.score("sft", ["Age: 1"])
        await engine.stop()
        return found.value

    assert asyncio.run(run()).code == "load_failed"


def test_priors_come_from_disk_at_the_next_start(model_dir, folders, monkeypatch):
    from common import LabelScorer

    scored = []
    original = LabelScorer.raw_scores
    monkeypatch.setattr(
        LabelScorer, "raw_scores", lambda self, turns, *a, **k: scored.extend(turns) or original(self, turns, *a, **k)
    )

    async def use(engine):
        return {variant: model.calibration.prior.tolist() for variant, model in engine.models.items()}

    args = arguments(model_dir, folders)
    first, count = with_engine(args, use), len(scored)
    scored.clear()
    assert with_engine(args, use) == first
    assert count - len(scored) == 4 * args.null_prompts
    assert first["sft"] != first["kd"]


# ---------------------------------------------------------------------------------------------------- both together


def test_many_clients_at_once(model_dir, folders):
    args = arguments(model_dir, folders)
    metrics = Metrics()
    wanted = {variant: alone(folders.get(variant, model_dir), args) for variant in VARIANTS}
    with TestClient(create_app(Engine(args, metrics), metrics)) as client:
        assert client.get("/readyz").status_code in (200, 503)
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        jobs = [(variant, number) for number in range(len(TEXTS)) for variant in VARIANTS] * 2
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda job: client.post(f"/infer/{job[0]}", json={"features": TEXTS[job[1]]}).json(), jobs)
            )
        assert_same_answers(replies, [wanted[variant][number] for variant, number in jobs])
        listed = client.get("/models").json()
        assert listed["ready"] and listed["models"].keys() == set(VARIANTS) and not listed["missing"]
        assert len({model["fingerprint"] for model in listed["models"].values()}) == 4
        text = client.get("/metrics").text
        assert f'creditmix_predictions_total{{label="{replies[0]["prediction"]}",variant="base"}}' in text
        assert text.count("creditmix_model_info{") == 4 and "creditmix_batch_rows_count" in text
