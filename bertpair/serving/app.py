"""The routes: what is checked in which order, what is run, what is answered.

Order of checks: 404, 405 (routing); 401; 431, 414, 417; 415; 413; not ready 503; 400 (syntax); 422 (meaning);
429. The model is reached through `MicroBatcher` only; texts are tokenized on a thread of their own.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Scope

from bertpair.evaluation.classifier import Prediction
from bertpair.serving.batcher import Answers, MicroBatcher
from bertpair.serving.metrics import ServeMetrics
from bertpair.serving.middleware import Exchange
from bertpair.serving.predictor import Predictor, TokenRow
from bertpair.serving.requests import (
    JSON,
    MAX_URL_BYTES,
    Headers,
    QueueFullError,
    RequestError,
    bad_value,
    check_content_type,
    check_length,
    check_object,
    check_switch,
    check_text,
    headers_too_large,
    json_type,
    parse_json,
    read_body,
    url_too_long,
)
from bertpair.serving.schema import describe_api
from bertpair.settings.serve import ServeConfig

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Service:
    """One server's state and routes."""

    config: ServeConfig
    predictor: Predictor
    batcher: MicroBatcher[TokenRow, Prediction]
    metrics: ServeMetrics
    key: bytes | None
    is_warm: bool = False
    is_draining: bool = False
    inflight_bytes: int = 0  # of bodies whose requests have no answer yet
    tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
    )

    def routes(self) -> Router:
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
        return Router(routes, redirect_slashes=False)

    # Health

    async def livez(self, request: Request) -> Response:
        self._check_pace(2 * self.config.stall_seconds)
        return json_response({"status": "live"})

    async def readyz(self, request: Request) -> Response:
        if self.is_draining:
            raise RequestError(503, "draining", "the server is going away", wait=1)
        self._check_ready()
        return json_response({"status": "ready"})

    def _check_ready(self) -> None:
        if not self.is_warm:
            raise RequestError(503, "warming_up", "the model is warming up", wait=1)
        self._check_pace(self.config.stall_seconds)

    def _check_pace(self, seconds: float) -> None:
        if self.batcher.worker.running_seconds > seconds:
            raise RequestError(503, "stalled", "the model has not answered for too long", wait=1)

    # Around a route

    def _guarded(self, path: str, handler: Handler, method: str, keyed: bool) -> Handler:
        allow = "OPTIONS, POST" if method == "POST" else "GET, HEAD, OPTIONS"

        async def guarded(request: Request) -> Response:
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": allow})
            if keyed and self.key is not None:
                check_key(request.scope["headers"], self.key)
            check_head(request.scope, self.config.max_header_bytes)
            try:
                return await handler(request)
            finally:
                self.inflight_bytes -= request.scope["exchange"].inflight_bytes

        guarded.route_path = path  # type: ignore[attr-defined]  # by which it is counted, a 405 too
        return guarded

    async def _read(self, request: Request, *, may_be_any: bool = False) -> Any:
        """The JSON of a request's body, after all that can be said without it."""
        exchange: Exchange = request.scope["exchange"]
        most = self.predictor.limits.max_body_bytes

        def hold(num_bytes: int) -> None:
            """Count what is kept of a body until it is answered; RequestError 503 if all are too much."""
            if self.inflight_bytes + num_bytes > self.config.max_inflight_bytes:
                message = "too many bytes of requests are being held; retry after 1 s"
                raise RequestError(503, "bodies_full", message, wait=1, close=True)
            self.inflight_bytes += num_bytes
            exchange.inflight_bytes += num_bytes

        check_content_type(request.scope["headers"], may_be_any=may_be_any)
        check_length(request.scope["headers"], most)
        self._check_ready()
        return parse_json(await read_body(request, most, hold))

    # Predictions

    async def legacy(self, request: Request) -> Response:
        """The old clients' route: sentence1 and sentence2 in, a list of label and score out."""
        body = await self._read(request, may_be_any=True)
        if self.predictor.labels is None:
            raise RequestError(404, "not_found", "this model gives a value, no label: see /v1/predict")
        names = ("sentence1", "sentence2") if self.predictor.takes_pairs else ("sentence1",)
        texts = self._texts(check_object(body, names, (), strict=False), names)
        answers = await self._run(request, [texts])
        prediction = answers.values[0]
        return timed_response([prediction.label, prediction.score], answers)

    async def predict(self, request: Request) -> Response:
        found = check_object(await self._read(request), self._text_names, ("truncate",))
        texts = self._texts(found, self._text_names)
        truncate = check_switch(found.get("truncate", True), "truncate")
        answers = await self._run(request, [texts], truncate=truncate)
        return timed_response(self._describe(answers.values[0]), answers)

    async def predict_batch(self, request: Request) -> Response:
        found = check_object(await self._read(request), ("pairs",), ("truncate",))
        pairs = found["pairs"]
        most = self.predictor.limits.max_request_rows
        if not isinstance(pairs, list):
            raise bad_value(f"pairs: expected an array, found {json_type(pairs)}", "pairs")
        if not 1 <= len(pairs) <= most:
            raise bad_value(f"pairs: found {len(pairs)} rows; 1 to {most} are allowed", "pairs")
        names = self._text_names
        rows = [
            self._texts(check_object(pair, names, (), f"pairs[{i}]"), names, f"pairs[{i}].")
            for i, pair in enumerate(pairs)
        ]
        truncate = check_switch(found.get("truncate", True), "truncate")
        answers = await self._run(request, rows, truncate=truncate, where="pairs")
        return timed_response({"predictions": [self._describe(p) for p in answers.values]}, answers)

    @property
    def _text_names(self) -> tuple[str, ...]:
        return ("text_a", "text_b") if self.predictor.takes_pairs else ("text_a",)

    def _texts(self, found: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> list[str]:
        most = self.predictor.limits.max_text_chars
        return [check_text(found[name], prefix + name, most) for name in names]

    async def _run(
        self, request: Request, texts: list[list[str]], *, truncate: bool = True, where: str | None = None
    ) -> Answers[Prediction]:
        """The answers for rows of texts, in order; ClientDisconnect as soon as nobody waits for them."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        text_b = columns[1] if self.predictor.takes_pairs else None
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self.tokenizing, self.predictor.encode, columns[0], text_b)
        cut = [i for i, row in enumerate(rows) if row.truncated]
        if cut and not truncate:
            message = f"the texts are longer than {self.predictor.cut} tokens, and truncate is false"
            raise bad_value(message, f"{where}[{cut[0]}]" if where else None)
        job = asyncio.ensure_future(self.batcher.submit(rows, [len(row) for row in rows]))
        gone = asyncio.ensure_future(wait_until_gone(request))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise ClientDisconnect()
            answers = job.result()
        except QueueFullError:
            self.metrics.refusals.inc()
            raise
        finally:
            job.cancel()
            gone.cancel()
            await asyncio.gather(job, gone, return_exceptions=True)
        self._count(request, answers)
        return answers

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

    # What there is to know

    async def info(self, request: Request) -> Response:
        return json_response(self.facts())

    def facts(self) -> dict[str, object]:
        """Plain values for JSON: the model and its limits, as far as the warm-up has settled them."""
        config, predictor = self.config, self.predictor
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
                "max_batch_tokens": self.batcher.limits.max_batch_tokens if self.is_warm else None,
                "queue_deadline": config.queue_deadline,
                "max_connections": config.max_connections,
            },
            "agreement_with_float32": None if agreement is None else dataclasses.asdict(agreement),
        }

    async def show_metrics(self, request: Request) -> Response:
        body = generate_latest(self.metrics.registry)
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        is_keyed, root_path = self.key is not None, self.config.root_path
        return json_response(describe_api(self.facts(), keyed=is_keyed, root_path=root_path))

    async def show_page(self, request: Request) -> Response:
        return page_response(request.scope.get("root_path", ""), keyed=self.key is not None)


def check_key(headers: Headers, key: bytes) -> None:
    """RequestError 401 unless the one Authorization header is `Bearer` and the key."""
    given = [value for name, value in headers if name == b"authorization"]
    scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    is_right = hmac.compare_digest(credentials.strip(), key)
    if scheme.lower() != b"bearer" or not is_right:
        message = "a key is needed: Authorization: Bearer …"
        raise RequestError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def check_head(scope: Scope, max_header_bytes: int) -> None:
    """RequestError 431, 414 or 417 for headers or a URL that are too large, or an unknown expectation."""
    headers: Headers = scope["headers"]
    if sum(len(name) + len(value) + 4 for name, value in headers) > max_header_bytes:
        raise headers_too_large(max_header_bytes)
    if len(scope["raw_path"]) + len(scope["query_string"]) + 1 > MAX_URL_BYTES:
        raise url_too_long()
    if any(name == b"expect" and value.strip().lower() != b"100-continue" for name, value in headers):
        raise RequestError(
            417, "expectation_failed", "of expectations only 100-continue is known", close=True
        )


async def wait_until_gone(request: Request) -> None:
    """Returns when the client has left; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_response(value: object, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return Response(body, headers=headers or {}, media_type=JSON)


def timed_response(value: object, answers: Answers[Prediction]) -> Response:
    queue_ms, inference_ms = 1000 * answers.queue_seconds, 1000 * answers.run_seconds
    return json_response(value, {"X-Queue-Ms": f"{queue_ms:.1f}", "X-Inference-Ms": f"{inference_ms:.1f}"})


def page_response(root_path: str, *, keyed: bool) -> Response:
    """page.html; `root_path` is the prefix its requests go to, `keyed` shows the key's field."""
    body = PAGE.replace("__ROOT__", html.escape(root_path, quote=True))
    body = body.replace("__KEYED__", "true" if keyed else "false")
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_policy(body),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(body, headers=headers)


def content_policy(text: str) -> str:
    """The Content-Security-Policy of a page: its scripts and styles by their hashes, and its own server."""
    sources = {"script": "script-src", "style": "style-src"}
    for kind, content in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources[kind] += f" 'sha256-{digest}'"
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {sources['script']}; {sources['style']}; {rest}"
