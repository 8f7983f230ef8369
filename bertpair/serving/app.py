"""The routes: what is checked in which order, what is run, what is answered.

Order of checks: 404, 405 (routing); 401; 431, 414, 417; 415; 413; not ready 503; 400 (syntax); 422 (meaning);
429. The model is reached through `MicroBatcher` only; texts are tokenized on a thread of their own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from bertpair.evaluation.classifier import Prediction
from bertpair.serving.batcher import Answers, MicroBatcher, QueueLimits
from bertpair.serving.metrics import CONTENT_TYPE, ServeMetrics
from bertpair.serving.middleware import Exchange
from bertpair.serving.predictor import Predictor, TokenRow
from bertpair.serving.protocol import MAX_URL_BYTES
from bertpair.serving.requests import (
    RequestError,
    bad_value,
    check_content_type,
    check_length,
    check_object,
    check_switch,
    check_text,
    json_type,
    parse_json,
    read_body,
)
from bertpair.serving.schema import describe_api
from bertpair.settings.serve import ServeConfig

JSON = "application/json"
Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Service:
    """One server's state and routes. `batcher` is set once the event loop runs, `is_warm` after warm-up."""

    config: ServeConfig
    predictor: Predictor
    metrics: ServeMetrics
    page: Page
    key: bytes | None = None
    batcher: MicroBatcher[TokenRow, Prediction] | None = None
    is_warm: bool = False
    is_draining: bool = False
    inflight_bytes: int = 0  # of bodies whose requests have no answer yet
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
    )

    def routes(self) -> ASGIApp:
        """All of them, each with and without a slash at its end."""
        table: list[tuple[str, str, Handler, bool]] = [
            ("POST", "/v1/model_prediction/", self.legacy, True),
            ("POST", "/v1/predict", self.predict, True),
            ("POST", "/v1/predict/batch", self.predict_batch, True),
            ("GET", "/livez", self.livez, False),
            ("GET", "/readyz", self.readyz, False),
            ("GET", "/info", self.info, True),
            ("GET", "/metrics", self.show_metrics, True),
            ("GET", "/openapi.json", self.openapi, True),
            ("GET", "/", self.show_page, False),
        ]
        routes = [
            Route(spelling, self._guarded(path, handler, method, keyed), methods=[method, "OPTIONS"])
            for method, path, handler, keyed in table
            for spelling in sorted({path.rstrip("/") or "/", path.rstrip("/") + "/"})
        ]
        return Router(routes, redirect_slashes=False, default=not_found)

    # Health

    @property
    def is_stalled(self) -> bool:
        return self._running_seconds > self.config.stall_seconds

    @property
    def _running_seconds(self) -> float:
        return self.batcher.running_seconds if self.batcher else 0.0

    async def livez(self, request: Request) -> Response:
        if self._running_seconds > 2 * self.config.stall_seconds:
            raise not_ready("stalled", "the model has not answered for too long")
        return json_response({"status": "live"})

    async def readyz(self, request: Request) -> Response:
        if self.is_draining:
            raise not_ready("draining", "the server is going away")
        self._check_ready()
        return json_response({"status": "ready"})

    def _check_ready(self) -> None:
        if not self.is_warm:
            raise not_ready("warming_up", "the model is warming up")
        if self.is_stalled:
            raise not_ready("stalled", "the model has not answered for too long")

    # Around a route

    def _guarded(self, path: str, handler: Handler, method: str, keyed: bool) -> Handler:
        allow = "OPTIONS, POST" if method == "POST" else "GET, HEAD, OPTIONS"

        async def guarded(request: Request) -> Response:
            exchange = request.scope["exchange"]
            exchange.route = path
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": allow})
            if keyed and self.key is not None:
                check_key(request.scope["headers"], self.key)
            self._check_size(request.scope)
            try:
                return await handler(request)
            finally:
                self.inflight_bytes -= exchange.inflight_bytes

        guarded.route_path = path  # type: ignore[attr-defined]  # for the figures of a 405
        return guarded

    def _check_size(self, scope: Scope) -> None:
        headers = scope["headers"]
        limit = self.config.max_header_bytes
        if sum(len(name) + len(value) + 4 for name, value in headers) > limit:
            message = f"the headers are larger than {limit} bytes"
            raise RequestError(431, "headers_too_large", message, close=True)
        if len(scope["raw_path"]) + len(scope["query_string"]) + 1 > MAX_URL_BYTES:
            message = f"the URL is longer than {MAX_URL_BYTES} bytes"
            raise RequestError(414, "url_too_long", message, close=True)
        for name, value in headers:
            if name == b"expect" and value.strip().lower() != b"100-continue":
                message = "of expectations only 100-continue is known"
                raise RequestError(417, "expectation_failed", message, close=True)

    async def _read(self, request: Request, *, may_be_any: bool = False) -> Any:
        """The JSON of a request's body, after all that can be said without it."""
        headers = request.scope["headers"]
        most = self.predictor.limits.max_body_bytes
        check_content_type(headers, may_be_any=may_be_any)
        check_length(headers, most)
        self._check_ready()
        return parse_json(await read_body(request, most, partial(self._hold, request.scope["exchange"])))

    def _hold(self, exchange: Exchange, num_bytes: int) -> None:
        """Count what is kept of a body until it is answered; RequestError 503 if all are too much."""
        if self.inflight_bytes + num_bytes > self.config.max_inflight_bytes:
            message = "too many bytes of requests are being held; retry after 1 s"
            raise RequestError(503, "bodies_full", message, headers={"Retry-After": "1"}, close=True)
        self.inflight_bytes += num_bytes
        exchange.inflight_bytes += num_bytes

    # Predictions

    async def legacy(self, request: Request) -> Response:
        """The old clients' route: sentence1 and sentence2 in, a list of label and score out."""
        body = await self._read(request, may_be_any=True)
        if self.predictor.labels is None:
            raise RequestError(404, "not_found", "this model gives a value, no label: see /v1/predict")
        names = ["sentence1", "sentence2"] if self.predictor.takes_pairs else ["sentence1"]
        found = check_object(body, names, (), strict=False)
        texts = [check_text(found[name], name, self.predictor.limits.max_text_chars) for name in names]
        answers = await self._run(request, [texts], truncate=True)
        prediction = answers.values[0]
        return self._respond([prediction.label, prediction.score], answers)

    async def predict(self, request: Request) -> Response:
        body = await self._read(request)
        names = self._text_names
        found = check_object(body, names, ("truncate",))
        texts = self._texts(found, "")
        answers = await self._run(request, [texts], truncate=truncate_of(found))
        return self._respond(self._describe(answers.values[0]), answers)

    async def predict_batch(self, request: Request) -> Response:
        found = check_object(await self._read(request), ("pairs",), ("truncate",))
        pairs = found["pairs"]
        most = self.predictor.limits.max_request_rows
        if not isinstance(pairs, list):
            raise bad_value(f"pairs: expected an array, found {json_type(pairs)}", "pairs")
        if not 1 <= len(pairs) <= most:
            raise bad_value(f"pairs: found {len(pairs)} rows; 1 to {most} are allowed", "pairs")
        rows = [
            self._texts(check_object(pair, self._text_names, (), f"pairs[{i}]"), f"pairs[{i}].")
            for i, pair in enumerate(pairs)
        ]
        answers = await self._run(request, rows, truncate=truncate_of(found), where="pairs")
        return self._respond({"predictions": [self._describe(p) for p in answers.values]}, answers)

    @property
    def _text_names(self) -> tuple[str, ...]:
        return ("text_a", "text_b") if self.predictor.takes_pairs else ("text_a",)

    def _texts(self, found: Mapping[str, Any], prefix: str) -> list[str]:
        most = self.predictor.limits.max_text_chars
        return [check_text(found[name], prefix + name, most) for name in self._text_names]

    async def _run(
        self, request: Request, texts: list[list[str]], *, truncate: bool, where: str | None = None
    ) -> Answers[Prediction]:
        """The answers for rows of texts, in order; ClientDisconnect as soon as nobody waits for them."""
        rows = await self._encode(texts)
        if not truncate and any(row.truncated for row in rows):
            cut = self.predictor.cut
            first = next(i for i, row in enumerate(rows) if row.truncated)
            field = f"{where}[{first}]" if where else None
            raise bad_value(f"the texts are longer than {cut} tokens, and truncate is false", field)
        assert self.batcher is not None
        job = asyncio.ensure_future(self.batcher.submit(rows, [len(row) for row in rows]))
        gone = asyncio.ensure_future(wait_until_gone(request))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise ClientDisconnect()
            answers = job.result()
        except RequestError as error:
            self.metrics.refusals.inc(error.status == 429)
            raise
        finally:
            await let_go(job, gone)
        self._count(request, answers)
        return answers

    async def _encode(self, texts: list[list[str]]) -> list[TokenRow]:
        text_a = [row[0] for row in texts]
        text_b = [row[1] for row in texts] if self.predictor.takes_pairs else None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.tokenizing, self.predictor.encode, text_a, text_b)

    def _count(self, request: Request, answers: Answers[Prediction]) -> None:
        self.metrics.queue_seconds.observe(answers.queue_seconds)
        self.metrics.predictions.inc(len(answers.values))
        self.metrics.truncated.inc(sum(p.truncated for p in answers.values))
        request.scope["exchange"].fields.update(
            rows=len(answers.values),
            queue_ms=round(answers.queue_seconds * 1000, 1),
            inference_ms=round(answers.run_seconds * 1000, 1),
        )

    def _describe(self, prediction: Prediction) -> dict[str, object]:
        rest = {
            "truncated": prediction.truncated,
            "num_tokens": prediction.num_tokens,
            "model_version": self.predictor.version,
        }
        if prediction.label is None:
            return {"value": prediction.score, **rest}
        probabilities = prediction.probabilities
        return {"label": prediction.label, "score": prediction.score, "probabilities": probabilities, **rest}

    def _respond(self, value: object, answers: Answers[Prediction]) -> Response:
        timings = {
            "X-Queue-Ms": f"{answers.queue_seconds * 1000:.1f}",
            "X-Inference-Ms": f"{answers.run_seconds * 1000:.1f}",
        }
        return json_response(value, timings)

    # What there is to know

    async def info(self, request: Request) -> Response:
        return json_response(self.facts())

    def facts(self) -> dict[str, object]:
        limits = self.batcher.limits if self.batcher and self.is_warm else None
        return describe_server(self.config, self.predictor, limits)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return json_response(
            describe_api(self.facts(), keyed=self.key is not None, root_path=self.config.root_path)
        )

    async def show_page(self, request: Request) -> Response:
        body, headers = self.page.render(request.scope.get("root_path", ""), keyed=self.key is not None)
        return Response(body, headers=headers)


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise RequestError(404, "not_found", "there is nothing at this path")


def not_ready(kind: str, message: str) -> RequestError:
    return RequestError(503, kind, message, headers={"Retry-After": "1"})


def check_key(headers: Sequence[tuple[bytes, bytes]], key: bytes) -> None:
    """RequestError 401 unless the one Authorization header is `Bearer` and the key."""
    given = [value for name, value in headers if name == b"authorization"]
    scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    is_right = hmac.compare_digest(credentials.strip(), key)
    if scheme.lower() != b"bearer" or not is_right:
        message = "a key is needed: Authorization: Bearer …"
        raise RequestError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def truncate_of(found: Mapping[str, Any]) -> bool:
    return check_switch(found["truncate"], "truncate") if "truncate" in found else True


def json_response(value: object, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, headers=dict(headers or {}), media_type=JSON)


async def wait_until_gone(request: Request) -> None:
    """Returns when the client has left; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def let_go(*futures: asyncio.Future[Any]) -> None:
    """Cancel what has not ended, and wait until it has."""
    for future in futures:
        future.cancel()
    for future in futures:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await future


def describe_server(
    config: ServeConfig, predictor: Predictor, limits: QueueLimits | None
) -> dict[str, object]:
    """Plain values for JSON; `limits` None while the warm-up has not settled them."""
    agreement = predictor.agreement
    return {
        "model": predictor.name,
        "model_version": predictor.version,
        "problem_type": "regression" if predictor.labels is None else "classification",
        "labels": None if predictor.labels is None else list(predictor.labels),
        "takes_pairs": predictor.takes_pairs,
        "max_seq_length": predictor.cut,
        "precision": predictor.precision,
        "device": str(predictor.classifier.scorer.device),
        "num_threads": predictor.num_threads,
        "limits": {
            **dataclasses.asdict(predictor.limits),
            "max_inflight_bytes": config.max_inflight_bytes,
            "max_header_bytes": config.max_header_bytes,
            "max_queue_rows": config.max_queue_rows,
            "max_batch_tokens": None if limits is None else limits.max_batch_tokens,
            "queue_deadline": config.queue_deadline,
            "max_connections": config.max_connections,
        },
        "agreement_with_float32": None if agreement is None else dataclasses.asdict(agreement),
    }


FILE = Path(__file__).with_name("page.html")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """page.html, read once."""

    def __init__(self, text: str | None = None) -> None:
        self.text = FILE.read_text(encoding="utf-8") if text is None else text
        hashes: dict[str, list[str]] = {"script": [], "style": []}
        for kind, content in _INLINE.findall(self.text):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            hashes[kind].append(f"'sha256-{digest}'")
        self.policy = "; ".join(
            [
                "default-src 'none'",
                f"script-src {' '.join(hashes['script'])}",
                f"style-src {' '.join(hashes['style'])}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            ]
        )

    def render(self, root_path: str, *, keyed: bool) -> tuple[bytes, dict[str, str]]:
        """Body and headers; `root_path` is the prefix its requests go to, `keyed` shows the key's field."""
        body = self.text.replace("__ROOT__", html.escape(root_path, quote=True))
        body = body.replace("__KEYED__", "true" if keyed else "false")
        return body.encode(), {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
