"""The routes: what is checked in which order, what is run, what is answered.

Order of checks: 404, 405 (routing); 401; 431, 414, 417; 415; 413; not ready 503; 400 (syntax); 422 (meaning);
429. The model is reached through `MicroBatcher` only; texts are tokenized on a thread of their own.
"""

import asyncio
import base64
import hashlib
import html
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from bertpair.evaluation.classifier import Prediction
from bertpair.serving.batcher import MicroBatcher
from bertpair.serving.metrics import ServeMetrics
from bertpair.serving.middleware import Exchange
from bertpair.serving.predictor import Predictor, TokenRow
from bertpair.serving.requests import JSON, RequestError, check_body, check_headers, check_meaning, read_json
from bertpair.serving.schema import Bodies, Info, body_models, describe_api
from bertpair.settings.serve import ServeConfig

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
LIMITS = ("max_inflight_bytes", "max_header_bytes", "max_queue_rows", "queue_deadline", "max_connections")
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
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizing"))

    @cached_property
    def bodies(self) -> Bodies:
        return body_models(self.predictor.limits, takes_pairs=self.predictor.takes_pairs)

    def routes(self) -> Router:
        """All of them, each with and without a slash at its end."""
        table: list[tuple[str, str, Handler, bool]] = [  # the last: whether the key is asked for
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

    def _guarded(self, path: str, handler: Handler, method: str, keyed: bool) -> Handler:
        allow = "OPTIONS, POST" if method == "POST" else "GET, HEAD, OPTIONS"

        async def guarded(request: Request) -> Response:
            if request.method == "OPTIONS":
                return Response(status_code=204, headers={"Allow": allow})
            check_headers(request, self.config.max_header_bytes, self.key if keyed else None)
            try:
                return await handler(request)
            finally:
                self.inflight_bytes -= request.scope["exchange"].inflight_bytes

        guarded.route_path = path  # type: ignore[attr-defined]  # by which it is counted, a 405 too
        return guarded

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

    async def legacy(self, request: Request) -> Response:
        """The old clients' route: sentence1 and sentence2 in, a list of label and score out."""
        value = await self._read(request, may_be_any=True)
        if self.predictor.labels is None:
            raise RequestError(404, "not_found", "this model gives a value, no label: see /v1/predict")
        [prediction] = await self._run(request, [check_meaning(self.bodies[2], value)])
        return json_response([prediction.label, prediction.score])

    async def predict(self, request: Request) -> Response:
        row: Any = check_meaning(self.bodies[0], await self._read(request))
        [prediction] = await self._run(request, [row], truncate=row.truncate)
        return json_response(self._describe(prediction))

    async def predict_batch(self, request: Request) -> Response:
        body: Any = check_meaning(self.bodies[1], await self._read(request))
        predictions = await self._run(request, body.pairs, truncate=body.truncate, where="pairs")
        return json_response({"predictions": [self._describe(each) for each in predictions]})

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

        check_body(request.headers, most, may_be_any=may_be_any)
        self._check_ready()
        return await read_json(request, most, hold)

    async def _run(
        self, request: Request, rows: Sequence[BaseModel], *, truncate: bool = True, where: str | None = None
    ) -> list[Prediction]:
        """The answers for rows of texts, in order; ClientDisconnect as soon as nobody waits for them."""
        names = [name for name in type(rows[0]).model_fields if name != "truncate"]
        columns = [[getattr(row, name) for row in rows] for name in names]
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self.tokenizing, lambda: self.predictor.encode(*columns))
        cut = [i for i, row in enumerate(tokens) if row.truncated]
        if cut and not truncate:
            message = f"the texts are longer than {self.predictor.cut} tokens, and truncate is false"
            raise RequestError(422, "invalid_value", message, where and f"{where}[{cut[0]}]")
        job = asyncio.ensure_future(self.batcher.submit(tokens, [len(row) for row in tokens]))
        gone = asyncio.ensure_future(wait_until_gone(request))
        gone.add_done_callback(lambda _: job.cancel())
        try:
            answers = await job
        except asyncio.CancelledError:
            raise ClientDisconnect() from None
        finally:
            gone.cancel()
        self.metrics.queue_seconds.observe(answers.queue_seconds)
        self.metrics.predictions.inc(len(rows))
        self.metrics.truncated.inc(len(cut))
        queue_ms, run_ms = round(answers.queue_seconds * 1000, 1), round(answers.run_seconds * 1000, 1)
        exchange: Exchange = request.scope["exchange"]
        exchange.headers = {"x-queue-ms": str(queue_ms), "x-inference-ms": str(run_ms)}
        exchange.fields = {"rows": len(rows), "queue_ms": queue_ms, "inference_ms": run_ms}
        return answers.values

    def _describe(self, prediction: Prediction) -> dict[str, object]:
        found = {**vars(prediction), "model_version": self.predictor.version}
        if prediction.label is None:
            del found["label"], found["probabilities"]
            found = {"value": found.pop("score"), **found}
        return found

    @property
    def facts(self) -> Info:
        config, predictor, agreement = self.config, self.predictor, self.predictor.agreement
        limits = {name: getattr(config, name) for name in LIMITS} | asdict(predictor.limits)
        limits["max_batch_tokens"] = self.batcher.limits.max_batch_tokens if self.is_warm else None
        decision, labels, threshold = predictor.classifier.decision, predictor.labels, None
        if decision.threshold is not None and labels is not None:
            threshold = {labels[decision.positive]: decision.threshold}
        return Info(
            model=predictor.name,
            model_version=predictor.version,
            problem_type="regression" if labels is None else "classification",
            labels=None if labels is None else list(labels),
            takes_pairs=predictor.takes_pairs,
            max_seq_length=predictor.cut,
            engine=predictor.engine,
            precision=predictor.precision,
            device=str(predictor.classifier.scorer.device),
            num_threads=predictor.num_threads,
            limits=limits,
            agreement_with_float32=asdict(agreement) if agreement else None,
            temperature=decision.temperature,
            threshold=threshold,
        )

    @cached_property
    def document(self) -> dict[str, Any]:
        """/openapi.json; none of the facts in it ever changes."""
        return describe_api(self.facts, self.bodies, self.key is not None, self.config.root_path)

    async def info(self, request: Request) -> Response:
        return json_response(self.facts.model_dump())

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        return json_response(self.document)

    async def show_page(self, request: Request) -> Response:
        return page_response(request.scope["root_path"], keyed=self.key is not None)


async def wait_until_gone(request: Request) -> None:
    """Returns when the client has left; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_response(value: object) -> Response:
    return Response(json.dumps(value, ensure_ascii=False, allow_nan=False), media_type=JSON)


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
