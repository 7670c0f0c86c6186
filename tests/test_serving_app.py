"""The HTTP side of the server, with an engine that answers by rule."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from conftest import CREDIT_TEXT, RESPONSE_FIELDS, assert_error
from fastapi.testclient import TestClient

import serve_creditmix
from common import InputError
from distil.serving import guard
from distil.serving.app import create_app
from distil.serving.engine import VARIANTS
from distil.serving.metrics import Metrics, log_json_lines
from distil.tasks import task_of
from distil.testing import TinyEngine
from distil.workarounds import impatient_protocol
from serve_creditmix import bound_socket, build_parser, engine_options

pytestmark = pytest.mark.usefixtures("own_server_log")


def client_of(engine, key: str | None = None, log_features: bool = False) -> TestClient:
    return TestClient(create_app(engine, Metrics(), log_features, key), raise_server_exceptions=True)


@pytest.fixture
def client():
    with client_of(TinyEngine()) as client:
        yield client


# ---------------------------------------------------------------------------------------------------------- HTTP side


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_its_endpoint(client, variant):
    reply = client.post(f"/infer/{variant}", json={"features": CREDIT_TEXT})
    assert reply.status_code == 200
    assert list(reply.json()) == RESPONSE_FIELDS and reply.json()["model_name"] == variant
    results = client.post(f"/infer/{variant}/batch", json={"features": [CREDIT_TEXT, "Age: 3"]}).json()["results"]
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
        (b'{"fields": {}}', 422, "invalid"),
        (b'{"fields": {"Age": 23, "Age": 50}}', 422, "repeated_field"),
        (b'{"fields": {"Age": NaN}}', 422, "invalid"),
        (b'{"fields": {"Age": [1]}}', 422, "invalid"),
        (b'{"fields": {"Age": {"a": 1}}}', 422, "invalid"),
        (b'{"fields": {"Age": "\\ud800"}}', 422, "invalid"),
        (b'{"fields": {"\\ud800": 1}}', 422, "invalid"),
        (b'{"fields": {"x: 1, Age": 50}}', 422, "invalid"),  # would become another field
        (b'{"fields": {"Note": "' + b"x" * 2000 + b'"}}', 422, "invalid"),
        (b'{"fields": {"Age": 23}, "features": "Age: 23"}', 422, "invalid"),
        (b'{"fields": "Age: 23"}', 422, "invalid"),
        (b'{"fields": [{"Age": 23}]}', 422, "invalid"),
        (b'{"fields": {"Age": 1' + b"0" * 5000 + b"}}", 400, "not_json"),
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


@pytest.mark.parametrize(
    "body", [{"fields": []}, {"fields": [{}]}, {"fields": {"Age": 1}}, {"fields": [{"Age": 1}] * 257}, {}]
)
def test_bad_batches_of_fields_are_refused_whole(client, body):
    assert_error(client.post("/infer/kd/batch", json=body), 422, "invalid")


def test_rows_reach_the_engine_as_they_were_sent():
    """Values of fields keep their kinds: 1 is not true."""
    rows = []

    class Listening(TinyEngine):
        async def score(self, variant, features):
            rows.append(features)
            return await super().score(variant, features)

    values = {"Age": 23, "Occupation": "Lawyer, Age: 50", "Annual Income": 19.5, "x": True, "y": None}
    with client_of(Listening()) as client:
        for path, body in (("", {"fields": values}), ("/batch", {"fields": [values]}), ("", {"features": "Age: 1"})):
            assert client.post(f"/infer/sft{path}", json=body).status_code == 200
    assert rows == [[values], [values], ["Age: 1"]]
    assert [type(value) for value in rows[0][0].values()] == [int, str, float, bool, type(None)]


TEXT_TASK = {"name": "topics", "instruction": "Give the topic.", "labels": ["sport", "arts"], "label_column": "topic"}
TEXT_TASK = task_of(TEXT_TASK | {"text_column": "text"}, "test")


def test_the_task_is_described_and_bounds_requests(client):
    own = client.get("/task").json()
    assert own["labels"] == ["Good", "Standard", "Bad"] and own["max_features"] == 2000
    assert own["fields"][0] == {"name": "Age", "kind": "number", "range": [1, 110]}
    assert own["fields"][1] == {"name": "Occupation", "kind": "word"} and own["text_column"] is None
    with TestClient(create_app(TinyEngine(), Metrics(), task=TEXT_TASK)) as client:
        text = client.get("/task").json()
        assert (text["name"], text["fields"], text["text_column"]) == ("topics", [], "text")
        assert client.get("/openapi.json").json()["info"]["title"] == "topics"
        for letters, status in ((20_000, 200), (20_001, 422)):
            assert client.post("/infer/sft", json={"features": "x" * letters}).status_code == status


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

    log_json_lines()
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
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

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
        body = {"features": CREDIT_TEXT}
        for header in (None, "Bearer wrong", "s3cret-ü", "Basic s3cret-ü", "Bearer ", "Bearer s3cret-ü x"):
            headers = {"authorization": header.encode()} if header else {}
            for reply in (
                client.post("/infer/sft", json=body, headers=headers),
                client.post("/table", content=b"Age\n1\n", headers=headers),
                client.get("/metrics", headers=headers),
                client.get("/task", headers=headers),
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


def test_binding_elsewhere_needs_a_key(monkeypatch, model_dir):
    monkeypatch.delenv(guard.API_KEY, raising=False)
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(InputError, match="set a key in"):
            engine_options(build_parser().parse_args(["--host", host, "--base", model_dir]))
    for host in ("127.0.0.1", "localhost", "::1"):
        engine_options(build_parser().parse_args(["--host", host, "--base", model_dir]))
    with pytest.raises(InputError, match="set a key in"):  # the script asks, before anything else
        serve_creditmix.main(["--host", "0.0.0.0", "--base", "/nothing/here"])
    monkeypatch.setenv(guard.API_KEY, "k")
    engine_options(build_parser().parse_args(["--host", "0.0.0.0", "--base", model_dir]))


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
        engine_options(build_parser().parse_args(flags))


def test_flags_without_an_effect_are_refused(model_dir):
    """Those of the environment are for any command line."""
    for flags, message in (
        (["--aggregate", "max"], "--aggregate: only with --verbalizers"),
        (["--calibration", "none", "--null_prompts", "7"], "--null_prompts: --calibration none uses no prior"),
    ):
        with pytest.raises(InputError, match=message):
            serve_creditmix.main(["--base", model_dir, *flags])


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
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and printed.count("\n") == 1 and message in printed


@contextlib.contextmanager
def listening(key: str | None = None, **how):
    """Run the server in a thread and give its address."""
    import uvicorn

    with bound_socket("127.0.0.1", 0) as bound:
        app = create_app(TinyEngine(), Metrics(), api_key=key)
        config = uvicorn.Config(app, log_config=None, http=impatient_protocol(0.3), timeout_keep_alive=15, **how)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield bound.getsockname()
        finally:
            server.should_exit = True
            thread.join(10)


def exchange(address, method: str, path: str) -> tuple[int, bytes, str | None]:
    """Return status, body and content-length of a request without a key."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.getheader("content-length")


def test_head_is_answered_where_get_is():
    """As monitors ask: the same status and length, without a body; the next request has its own answer."""
    with listening(key="s3cret") as address:
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/task", "/metrics", "/models"):
            (status, body, length), head = (exchange(address, method, path) for method in ("GET", "HEAD"))
            assert status in (200, 401) and head == (status, b"", str(len(body))) and length == str(len(body))
    with client_of(TinyEngine()) as client:
        assert client.head("/infer/sft").status_code == 405 and client.head("/task").status_code == 200


def test_open_paths_need_no_key_behind_a_prefix():
    """A proxy removes the prefix from addresses; the page and /docs must have it in theirs."""
    with listening(key="s3cret", root_path="/credit") as address:
        for path in ("/", "/healthz", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert exchange(address, "GET", path)[0] == 200, path
        assert exchange(address, "GET", "/task")[0] == 401
        assert b'<base href="/credit/">' in exchange(address, "GET", "/")[1]
        assert b"/credit/openapi.json" in exchange(address, "GET", "/docs")[1]
    with listening() as address:
        assert b"<base" not in exchange(address, "GET", "/")[1]


def test_half_a_request_head_is_not_waited_for():
    """uvicorn itself would keep the connection for ever; enough of them and no one else gets one."""
    with listening() as address:
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


HEAD = b"POST /infer/sft HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def sent(address, fields: bytes, parts=(), pause: float = 0.0) -> tuple[int, str, float]:
    """Send a request to its end, and only then read the answer: (status, code, seconds)."""
    start = time.monotonic()
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(HEAD + fields + b"\r\n")
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        error = json.loads(reply.read())["error"]["code"]
        assert reply.getheader("connection") == "close" and connection.recv(1) == b""
    return reply.status, error, time.monotonic() - start


PART = b"x" * 50_000
CHUNK = b"c350\r\n" + PART + b"\r\n"


@pytest.mark.parametrize(("key", "status"), [(None, 413), ("k", 401)])
def test_a_client_that_sends_on_sees_why_it_is_refused(key, status, capfd):
    """A connection that is closed while the client sends would be reset, and the answer lost."""
    with listening(key) as address, ThreadPoolExecutor(2) as pool:
        whole = b"Content-Length: 10000000\r\n", [PART] * 200
        chunked = b"Transfer-Encoding: chunked\r\n", [CHUNK] * 200 + [b"0\r\n\r\n"]
        jobs = [pool.submit(sent, address, *request) for request in (whole, chunked, whole, chunked)]
        assert [job.result()[0] for job in jobs] == [status] * 4
        waits = b"Content-Length: 10000000\r\nExpect: 100-continue\r\n"  # it sends nothing without permission
        assert sent(address, waits)[0] == status
        with httpx2.Client() as client:
            for body in (PART * 200, iter([PART] * 200)):
                assert client.post("http://{}:{}/infer/sft".format(*address), content=body).status_code == status
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_read_of_a_refused_body_is_limited(monkeypatch):
    monkeypatch.setattr(guard, "MAX_UNREAD", 2_000_000)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with listening() as address:
        with pytest.raises(OSError):
            sent(address, b"Content-Length: 90000000\r\n", [PART] * 1800)
        for fields, status in ((b"Content-Length: 1000\r\n", 408), (b"Content-Length: 2000000\r\n", 413)):
            observed = sent(address, fields, [b"x"] * 4, 0.15)
            assert observed[0] == status and observed[2] < 2


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
    log_json_lines()
    client.post("/infer/sft", json={"features": CREDIT_TEXT})
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
        log_json_lines()
        client.post("/infer/sft", json={"features": CREDIT_TEXT})
    assert "Scientist" in capsys.readouterr().err


@pytest.mark.parametrize("task", [None, TEXT_TASK])
def test_every_example_of_the_openapi_document_works(task):
    with TestClient(create_app(TinyEngine(), Metrics(), task=task)) as client:
        document = client.get("/openapi.json").json()
        tried = 0
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                bodies = [example["value"] for example in content.get("examples", {"": {"value": None}}).values()]
                for body in bodies if path != "/table" else []:
                    reply = client.request(method, path, json=body)
                    assert reply.status_code == 200, (path, reply.text)
                    tried += 1
    assert tried == 2 * 2 * len(VARIANTS) + 5


def test_page_and_docs_ask_no_other_host(client):
    for path in ("/", "/docs"):
        text = client.get(path).text.replace("http://www.w3.org", "")
        assert "https://" not in text and "http://" not in text and "//cdn" not in text
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]
