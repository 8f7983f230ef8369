"""Around every answer: a request id, the Host name, CORS, errors as JSON, the access log and its figures.

Plain ASGI. Nothing that a route raises gets past it: a refusal becomes its status, a client that left becomes
a line with 499, and anything else is a defect of ours: 500 with the id under which its traceback is logged.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bertpair.serving.metrics import ServeMetrics
from bertpair.serving.requests import Headers, RequestError

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("bertpair.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PROBES = {"/livez", "/readyz", "/metrics"}  # asked by the machine's address, under any name


@dataclass
class Exchange:
    """One request and what became of it. Routes that have run rows fill in `fields` of the access log."""

    request_id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    inflight_bytes: int = 0  # of its body, held until it is answered
    fields: dict[str, object] = field(default_factory=dict)


class Shell:
    """Wraps the routes. `hosts` None: any Host; `origins`: web pages that may read answers, or `*`."""

    def __init__(
        self, app: ASGIApp, metrics: ServeMetrics, *, hosts: frozenset[str] | None, origins: Sequence[str]
    ) -> None:
        self.app, self.metrics, self.hosts, self.origins = app, metrics, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: Headers = scope["headers"]
        exchange = Exchange(choose_request_id(headers))
        scope["exchange"] = exchange
        scope["app"] = self  # Starlette's routes raise their 404 and 405 only where there is one
        extra = [(b"x-request-id", exchange.request_id.encode()), *self._extra_headers(headers)]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            if error := await self._answer(scope, receive, send_with_headers):
                await error.response(exchange.request_id)(scope, receive, send_with_headers)
        finally:
            self._record(scope, exchange)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> RequestError | None:
        """Let the routes answer; the error where they do not."""
        exchange: Exchange = scope["exchange"]
        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                return RequestError(505, "http_version_not_supported", "HTTP/1.1 is spoken here", close=True)
            self._check_host(scope)
            await self.app(scope, receive, send)
        except ClientDisconnect:
            self.metrics.disconnects.inc()
            exchange.status = 499  # as nginx logs it
        except RequestError as error:
            return error
        except HTTPException as error:
            return translate(error)
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            if exchange.status:  # half an answer is out: nothing honest can follow it
                raise
            return RequestError(500, "internal_error", "a defect of the server; its log has the request_id")
        return None

    def _check_host(self, scope: Scope) -> None:
        names = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self.hosts is None or not names or host_name(names[0]) in self.hosts:
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.rstrip("/") not in _PROBES:
            message = "this server does not answer to that Host; its setting allowed_hosts says to which"
            raise RequestError(400, "unknown_host", message, close=True)

    def _extra_headers(self, headers: Headers) -> Headers:
        extra: list[tuple[bytes, bytes]] = []
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            extra.append((b"connection", b"close"))  # a proxy might believe the other length
        if not self.origins:
            return extra
        extra.append((b"vary", b"Origin"))
        origin = next((value for name, value in headers if name == b"origin"), b"")
        if "*" in self.origins or origin.decode("latin-1") in self.origins:
            extra += [
                (b"access-control-allow-origin", b"*" if "*" in self.origins else origin),
                (b"access-control-expose-headers", b"X-Request-ID, X-Queue-Ms, X-Inference-Ms, Retry-After"),
            ]
            if b"access-control-request-method" in names:
                extra += [
                    (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
                    (b"access-control-allow-headers", b"Authorization, Content-Type, X-Request-ID"),
                    (b"access-control-max-age", b"600"),
                ]
        return extra

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        seconds = time.monotonic() - exchange.began
        status = exchange.status or 500
        route = getattr(scope.get("endpoint"), "route_path", "unmatched")  # a 405 has one
        self.metrics.count_answer(route, status, seconds)
        client = scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "request_id": exchange.request_id,
            "client": client[0] if client else None,
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            **exchange.fields,
        }
        access_logger.info("%s", json.dumps(line))  # ASCII: no line breaks or terminal codes of a client's


def choose_request_id(headers: Headers) -> str:
    """The client's, if it is one and plain, else a new one."""
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return secrets.token_hex(8)


def host_name(value: str) -> str:
    """Without its port, in lower case; an IPv6 address keeps its brackets."""
    if value.startswith("["):
        return value.partition("]")[0].lower() + "]"
    return value.partition(":")[0].lower()


def translate(error: HTTPException) -> RequestError:
    """Starlette's refusals as ours."""
    if error.status_code == 405:
        message = "the method is not allowed here; Allow says which are"
        return RequestError(405, "method_not_allowed", message, headers=error.headers)
    return RequestError(error.status_code, "not_found", "there is nothing at this path")
