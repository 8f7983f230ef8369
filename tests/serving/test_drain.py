"""A server that goes away under load: each request that was sent on an open connection is answered."""

import asyncio
import collections
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import PAIR, Line
from server_process import Process

pytestmark = pytest.mark.slow

BODY = json.dumps(PAIR).encode()
POST = (
    b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
)
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


def flags(folder: Path, drain_seconds: float) -> list[str]:
    return ["--model_dir", str(folder), "--port", "0", "--drain_seconds", str(drain_seconds)]


@pytest.fixture
def connect() -> Iterator[Callable[[int], Line]]:
    """A new connection to a port; all are closed in the end."""
    lines: list[Line] = []

    def open_line(port: int) -> Line:
        lines.append(Line(port))
        return lines[-1]

    yield open_line
    for line in lines:
        line.close()


async def keep_asking(port: int, think: float, found: collections.Counter[str]) -> None:
    """On one connection for as long as the server keeps it, then on another, until none can be had."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return
        is_kept = True
        while is_kept:
            try:
                writer.write(POST)
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                found[f"lost: {error!r}"] += 1
                break
            found[head[9:12].decode()] += 1
            is_kept = b"connection: close" not in head.lower()
            await asyncio.sleep(think)
        writer.close()


@pytest.mark.parametrize(("drain_seconds", "think"), [(0.5, 0.0), (0.5, 0.02), (0, 0.0), (0, 0.02)])
def test_no_client_loses_a_request_to_the_drain(folder: Path, drain_seconds: float, think: float) -> None:
    """With no time to drain as well: then the idle connections are those that were answered last."""
    found: collections.Counter[str] = collections.Counter()

    async def main(server: Process) -> None:
        port = server.port
        clients = [asyncio.create_task(keep_asking(port, think, found)) for _ in range(40)]
        await asyncio.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*clients), 40)

    with Process(*flags(folder, drain_seconds)) as server:
        asyncio.run(main(server))
        assert server.wait() == 0
        assert set(found) == {"200"} and found["200"] == len(server.access)  # the log has them all


def test_each_answer_of_the_drain_says_that_it_is_the_last(
    folder: Path, connect: Callable[[int], Line]
) -> None:
    with Process(*flags(folder, 1.5)) as server:
        lines = [connect(server.port) for _ in range(5)]
        for line in lines:
            line.send(GET)
            assert line.read().headers.get("connection") != "close"
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        requests = [
            (POST, 200),
            (GET.replace(b"livez", b"readyz"), 503),
            (POST.replace(b"predict", b"nothing"), 404),
            (POST.replace(b'"', b"'"), 400),
            (b"nonsense\r\n\r\n", 400),
        ]
        for line, (request, status) in zip(lines, requests, strict=True):
            line.send(request)
            answer = line.read()
            assert (answer.status, answer.headers["connection"]) == (status, "close") and line.is_closed()
        assert server.wait() == 0


def test_a_request_whose_head_is_half_here_is_waited_for(
    folder: Path, connect: Callable[[int], Line]
) -> None:
    with Process(*flags(folder, 0)) as server:
        lines = [connect(server.port) for _ in range(2)]
        for line in lines:
            line.send(GET)
            line.read()
        lines[0].send(POST[:30])
        server.process.send_signal(signal.SIGTERM)
        assert lines[1].is_closed()  # an idle connection goes once its last moment for a request is over
        lines[0].send(POST[30:])
        answer = lines[0].read()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert server.wait() == 0


def test_requests_sent_together_are_all_answered_in_the_drain(
    folder: Path, connect: Callable[[int], Line]
) -> None:
    with Process(*flags(folder, 1.5)) as server:
        line = connect(server.port)
        line.send(GET)
        line.read()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        line.send(POST * 5)
        answers = [line.read() for _ in range(5)]
        assert [answer.status for answer in answers] == [200] * 5
        said = [answer.headers.get("connection") == "close" for answer in answers]
        assert said == [False] * 4 + [True] and line.is_closed()
        late = connect(server.port)
        late.send(POST)
        assert late.read().status == 200
        late.send(POST)  # behind an answer that said close: no answer, and no reset either
        assert late.socket.recv(10) == b""
        assert server.wait() == 0


def test_those_who_have_connected_are_heard_and_idle_ones_do_not_hold_up_the_exit(
    folder: Path, connect: Callable[[int], Line]
) -> None:
    with Process(*flags(folder, 0), "--grace_seconds", "8") as server:
        kept, silent, slow = (connect(server.port) for _ in range(3))
        kept.send(GET)
        kept.read()
        slow.send(POST[:50])
        fresh = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        for line in fresh:
            line.sendall(POST)
        time.sleep(0.5)  # the listener has closed by now, and the idle connection is still heard
        kept.send(POST)
        assert kept.read().status == 200
        slow.send(POST[50:])
        answer = slow.read()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        for line in fresh:
            assert line.recv(12) == b"HTTP/1.1 200"
            line.close()
        assert silent.is_closed()
        assert server.wait() == 0


def test_a_client_that_never_closes_does_not_make_a_drained_server_fail(
    folder: Path, connect: Callable[[int], Line]
) -> None:
    with Process(*flags(folder, 0), "--queue_deadline", "0.5", "--grace_seconds", "0.6") as server:
        line = connect(server.port)
        line.send(GET)
        line.read()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0 and server.said[-1] == "drained"
