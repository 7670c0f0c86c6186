"""Everything around the application: who may call it, how large and slow a body may be, one log line a request."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil.tasks import Task

API_KEY = "CREDITMIX_API_KEY"
MAX_BODY = 1_000_000  # bytes; a full batch of the longest CreditMix strings has 512,000 if all letters are ASCII
MAX_BATCH = 256  # rows of a batch request
MAX_UNREAD = 64_000_000  # bytes of a refused body that are read, so that its sender sees the answer
BODY_SECONDS = 10  # for a client to send its body
OPEN_PATHS = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico")  # no key needed
OPEN_FOLDER = "/static-offline-docs/"  # assets of /docs
LOG = logging.getLogger("serve_creditmix")


def max_features(task: Task) -> int:
    """Return how many characters a feature string may have: 2,000, more for free text or above 20 fields."""
    return 20_000 if task.text_column else max(2000, 100 * len(task.fields))


def error_body(code: str, message: str, hint: str = "") -> dict:
    """Return the one shape of every error."""
    return {"error": {"code": code, "message": message, "hint": hint}}


class Guard:
    """ASGI middleware around everything: request id, API key, limits of the body, log line, metrics, last errors.
    The body is read here, before anything else runs, so that a slow or huge one costs only its own connection."""

    def __init__(self, app: Any, api_key: str | None, metrics: Any):
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, headers = scope["method"], dict(scope["headers"])
        if method == "HEAD":  # answered as GET; the server leaves the body out
            scope = scope | {"method": "GET"}
        client_id = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if re.fullmatch(r"[\w.-]{1,64}", client_id, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def reply(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            body = await self._body(self._refuse(scope, headers), headers, receive)
            if isinstance(body, tuple):
                await send_error(reply, *body)
            elif body is not None:
                await self._until_gone(scope, body, receive, reply)
        except Exception as error:
            LOG.error("unexpected", exc_info=error, extra={"fields": {"request_id": request_id}})
            if not status:
                await send_error(reply, 500, "internal", "something went wrong", "the server's log has the reason")
        finally:
            seconds, path, status = time.monotonic() - started, own_path(scope), status or 499
            match = re.fullmatch(r"/infer/(base|sft|kd|dpo)(?:/batch)?", path)
            self.metrics.request(match[1] if match else "other", status, seconds)
            fields = {"request_id": request_id, "method": method, "path": path[:200], "status": status}
            fields |= {"ms": round(1000 * seconds, 1)} | scope["state"].get("log", {})
            LOG.info("request", extra={"fields": fields})

    def _refuse(self, scope: dict, headers: dict[bytes, bytes]) -> tuple | None:
        """Return status, code, message and hint where the caller is not authorised, else None."""
        if (path := own_path(scope)) in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return None
        if not self.api_key:
            server = scope.get("server") or ("127.0.0.1", 0)
            if server[0] == "testserver" or is_loopback(server[0]):
                return None
            return 403, "key_needed", "the server can be reached from other machines but has no key", f"set ${API_KEY}"
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key.encode()):
            return None
        return 401, "unauthorized", "a valid key is needed", "send it as 'Authorization: Bearer KEY'"

    async def _body(self, refused: tuple | None, headers: dict[bytes, bytes], receive: Any) -> bytes | tuple | None:
        """Return the complete body; an error where it is refused, too large or too slow; None where the client left.
        A refused body is read on and dropped: a connection that is closed on a client that sends is reset, and with
        it the answer. One beyond MAX_UNREAD is not, nor that of a client which waits for permission to send."""
        too_large = 413, "too_large", f"the body has more than {MAX_BODY} bytes", "send fewer rows at once"
        length, waits = headers.get(b"content-length", b"0"), headers.get(b"expect", b"").lower() == b"100-continue"
        size = int(length) if length.isdigit() else 0
        refused = refused or (too_large if size > MAX_BODY else None)
        if refused and (waits or size > MAX_UNREAD):
            return refused
        body, size = b"", 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while size <= MAX_UNREAD:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    refused = refused or (too_large if size > MAX_BODY else None)
                    body = b"" if refused else body + part
                    if not message.get("more_body"):
                        return refused or body
        except TimeoutError:
            slow = 408, "too_slow", f"the body did not arrive within {BODY_SECONDS} s", "send it at once"
            refused = refused or slow
        return refused

    async def _until_gone(self, scope: dict, body: bytes, receive: Any, reply: Any) -> None:
        """Run the application on a body that was read; cancel it, and so its rows, when the client leaves."""

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        first = [{"type": "http.request", "body": body, "more_body": False}]
        leaving = asyncio.create_task(gone())

        async def replayed() -> dict:
            if not first:
                await asyncio.shield(leaving)
            return first.pop() if first else {"type": "http.disconnect"}

        answering = asyncio.create_task(self.app(scope, replayed, reply))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()


async def send_error(send: Any, status: int, code: str, message: str, hint: str = "") -> None:
    """Send an error outside of the application."""
    body = json.dumps(error_body(code, message, hint)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # a rest of the body may be on its way
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def own_path(scope: Any) -> str:
    """Return the path of a request without the prefix that a proxy gives the application (`uvicorn --root-path`)."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def is_loopback(host: str) -> bool:
    """Return whether an address or name is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
