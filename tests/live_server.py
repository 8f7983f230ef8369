"""A real uvicorn on a loopback port, in a thread of the test's process, around a model the test can steer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertpair.evaluation.classifier import Prediction
from bertpair.serving.app import Service
from bertpair.serving.listening import bind
from bertpair.serving.predictor import Predictor, TokenRow, load_predictor
from bertpair.serving.server import make_service, make_uvicorn, warm_up
from bertpair.settings.serve import ServeConfig, parse_serve_command_line

PAIR = {"text_a": "the cat", "text_b": "sat"}


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that is one, its shape checked."""
        assert self.headers["content-type"] == "application/json"
        body = self.json
        assert set(body) == {"error"} and set(body["error"]) == {"type", "message", "field", "request_id"}
        assert body["error"]["request_id"] == self.headers["x-request-id"]
        assert self.body.isascii() and b"Traceback" not in self.body
        found: dict[str, Any] = body["error"]
        return found


class Line:
    """One connection, spoken to in bytes."""

    def __init__(self, port: int, timeout: float = 20) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, *, is_head: bool = False) -> Answer:
        """The next answer."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status = int(first.split()[1])
        length = 0 if is_head or status == 204 else int(headers["content-length"])
        while len(self.buffer) < length:
            self._more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return Answer(status, headers, body)

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"closed after {self.buffer!r:.200}")
        self.buffer += data

    def is_closed(self, within: float = 5) -> bool:
        """Whether the server closes, saying nothing more."""
        self.socket.settimeout(within)
        try:
            return not self.buffer and self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.socket.close()


@dataclass
class LiveServer:
    """`run` replaces the model's forward where a test sets it."""

    service: Service = field(init=False)
    port: int = 0
    run: Callable[[list[TokenRow]], list[Any]] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    lines: list[Line] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)  # uvicorn's own

    @property
    def num_connections(self) -> int:
        return len(self.connections)

    def line(self) -> Line:
        self.lines.append(Line(self.port))
        return self.lines[-1]

    def raw(self, data: bytes) -> Answer:
        """The answer to these bytes on a connection of their own."""
        line = self.line()
        line.send(data)
        return line.read()

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        raw_body: bytes | None = None,
    ) -> Answer:
        """A well-formed request; a JSON body unless `raw_body` is given."""
        data = raw_body
        if data is None:
            data = b"" if body is None else json.dumps(body).encode()
        given = {"host": f"127.0.0.1:{self.port}", **{k.lower(): v for k, v in (headers or {}).items()}}
        if method == "POST" or data:
            given.setdefault("content-type", "application/json")
            given.setdefault("content-length", str(len(data)))
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value != "-")
        line = self.line()
        line.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + data)
        answer = line.read(is_head=method == "HEAD")
        line.close()
        return answer

    def predict(self, pair: object = PAIR, path: str = "/v1/predict") -> Answer:
        return self.ask("POST", path, pair)

    def wait_for(self, condition: Callable[[], bool], within: float = 10) -> None:
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.01)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


class SteeredPredictor(Predictor):
    """A real model whose forward a test may replace."""

    live: LiveServer

    def run(self, rows: list[TokenRow]) -> list[Prediction | Exception]:
        if self.live.run is not None:
            return self.live.run(rows)
        return super().run(rows)


def make_config(values: Mapping[str, object]) -> ServeConfig:
    """As serve.py reads it from a settings file, with a model folder if that is what `values` lack."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "serve.json")
        file.write_text(json.dumps({"model_dir": "model", **values}))
        return parse_serve_command_line(["--config", str(file)])[0]


def make_predictor(folder: Path, **settings: object) -> tuple[SteeredPredictor, ServeConfig]:
    values = {"model_dir": str(folder), "port": 0, "amp": "off", "num_threads": 1, **settings}
    config = make_config(values)
    loaded = load_predictor(config)
    return SteeredPredictor(**vars(loaded)), config


@contextlib.contextmanager
def serving(
    predictor: SteeredPredictor, config: ServeConfig, key: bytes | None = None, *, is_warm: bool = True
) -> Iterator[LiveServer]:
    """The server, listening and (unless `is_warm` is false) ready; closed in the end."""
    live = LiveServer()
    predictor.live = live
    listener = bind(config)
    live.port = listener.socket.getsockname()[1]
    stop, started = threading.Event(), threading.Event()

    async def main() -> None:
        live.loop = asyncio.get_running_loop()
        live.service = service = make_service(config, predictor, key)
        server = make_uvicorn(service)
        listener.listen()
        live.connections = server.server_state.connections
        task = asyncio.create_task(server.serve(sockets=[listener.socket]))
        while not server.started:
            await asyncio.sleep(0.005)
        if is_warm:
            await warm_up(predictor, service.batcher, config.max_batch_tokens)
            service.is_warm = True
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        server.should_exit = True
        await asyncio.wait_for(task, 20)
        await service.batcher.close()
        service.tokenizing.shutdown()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")
    thread.start()
    try:
        assert started.wait(60)
        yield live
    finally:
        for line in live.lines:
            line.close()
        stop.set()
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
