"""Around every answer: a request id, the Host name, CORS, errors as JSON, the access log and its figures.

Plain ASGI: Starlette's middleware for Host and CORS refuses in plain text. Nothing that a route raises gets
past it: a client that left becomes a line with 499, a defect of ours 500 with the id that its traceback has.
"""

import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bertpair.serving.listening import allowed_hosts
from bertpair.serving.metrics import ServeMetrics, access_logger
from bertpair.serving.requests import ClosingError, RequestError
from bertpair.settings.serve import ServeConfig

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WHOLE_URL = re.compile(r"https?://([^/#]*)(/[^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"([\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", re.ASCII)  # no user's name
_PROBES = {"/livez", "/readyz", "/metrics"}  # asked by the machine's address, under any name
_ROUTING = {
    404: ("not_found", "there is nothing at this path"),
    405: ("method_not_allowed", "the method is not allowed here; Allow says which are"),
}
_PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, OPTIONS",
    "access-control-allow-headers": "Authorization, Content-Type, X-Request-ID",
    "access-control-max-age": "600",
}


@dataclass
class Exchange:
    """One request and what became of it. Routes add `headers` to the answer, `fields` to the access log."""

    request_id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    inflight_bytes: int = 0  # of its body, held until it is answered
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, object] = field(default_factory=dict)


class Shell:
    """Wraps the routes."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics, config: ServeConfig) -> None:
        self.app, self.metrics = app, metrics
        self.hosts, self.origins = allowed_hosts(config), config.cors_origin or ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.getlist("x-request-id")
        is_plain = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        scope["exchange"] = exchange = Exchange(given[0] if is_plain else secrets.token_hex(8))
        scope["app"] = self  # Starlette's routes raise their 404 and 405 only where there is one

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                extra = {"x-request-id": exchange.request_id} | self._cors(headers) | exchange.headers
                # Of two lengths a proxy might believe the other.
                is_unclear = "content-length" in headers and "transfer-encoding" in headers
                if is_unclear or scope["state"]["connection"].is_ending:
                    extra["connection"] = "close"
                added = [(name.encode(), value.encode("latin-1")) for name, value in extra.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            self.metrics.disconnects.inc()
            exchange.status = 499  # as nginx logs it
        except Exception as error:
            refusal = as_refusal(error, exchange.request_id)
            self.metrics.refusals.inc(refusal.status == 429)
            if exchange.status:  # half an answer is out: nothing honest can follow it
                raise
            await refusal.response(exchange.request_id)(scope, receive, send_with_headers)
        finally:
            self._record(scope, exchange)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise ClosingError(505, "http_version_not_supported", "HTTP/1.1 is spoken here")
        host, root_path = headers.get("host"), scope["root_path"]
        if url := _WHOLE_URL.fullmatch(scope["raw_path"].decode().removeprefix(root_path)):  # RFC 9112, 3.2.2
            host, path = url[1], url[2] or "/"
            if not _AUTHORITY.fullmatch(host):
                raise ClosingError(400, "bad_request", "the URL asked for names no sound host")
            scope["path"], scope["raw_path"] = root_path + unquote(path), (root_path + path).encode()
        if self.hosts is None or host is None:
            return
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        is_probe = scope["path"].removeprefix(root_path).rstrip("/") in _PROBES
        if name.lower() not in self.hosts and not is_probe:
            message = "this server does not answer to that Host; its setting allowed_hosts says to which"
            raise ClosingError(400, "unknown_host", message)

    def _cors(self, headers: Headers) -> dict[str, str]:
        origin = "*" if "*" in self.origins else headers.get("origin", "")
        if origin not in self.origins:
            return {"vary": "Origin"} if self.origins else {}
        exposed = "X-Request-ID, X-Queue-Ms, X-Inference-Ms, Retry-After"
        found = {"access-control-allow-origin": origin, "access-control-expose-headers": exposed}
        return {"vary": "Origin"} | found | (_PREFLIGHT if "access-control-request-method" in headers else {})

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        seconds, status = time.monotonic() - exchange.began, exchange.status or 500
        route = getattr(scope.get("endpoint"), "route_path", "unmatched")  # a 405 has one
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        line = {
            "time": round(time.time(), 3),
            "request_id": exchange.request_id,
            "client": scope["client"][0] if scope["client"] else None,
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            **exchange.fields,
        }
        access_logger.info("%s", json.dumps(line))  # ASCII: no line breaks or terminal codes of a client's


def as_refusal(error: Exception, request_id: str) -> RequestError:
    """What is answered for an error of a route, Starlette's refusals included."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        kind, message = _ROUTING[error.status_code]
        return RequestError(error.status_code, kind, message, headers={**(error.headers or {})})
    logger.error("request %s failed", request_id, exc_info=error)
    return RequestError(500, "internal_error", "a defect of the server; its log has the request_id")
