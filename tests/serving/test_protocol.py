"""Below the application: malformed requests, slow and silent clients, the cap, uvicorn's private parts."""

import dataclasses
import inspect
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from conftest import write_hf_folder
from live_server import PAIR, LiveServer, SteeredPredictor, make_predictor, serving
from uvicorn.protocols.http import h11_impl

from bertpair.serving.requests import MAX_URL_BYTES
from bertpair.settings.serve import ServeConfig

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
BODY = json.dumps(PAIR).encode()
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteeredPredictor, ServeConfig]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    return make_predictor(folder, max_batch_tokens=512, max_body_bytes=65_536)


@pytest.fixture(scope="module")
def live(loaded: tuple[SteeredPredictor, ServeConfig]) -> Iterator[LiveServer]:
    with serving(*loaded) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(loaded: tuple[SteeredPredictor, ServeConfig]) -> Iterator[LiveServer]:
    """A server that waits for half a second, not ten."""
    predictor, config = loaded
    config = config.model_copy(update=dict(receive_timeout=0.5, keep_alive=1.0))
    with serving(SteeredPredictor(**vars_of(predictor)), config) as server:
        yield server


def vars_of(predictor: SteeredPredictor) -> dict[str, object]:
    return {field.name: getattr(predictor, field.name) for field in dataclasses.fields(predictor)}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 60, 400),  # TLS on the plain port
        (b"hello\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456", 400),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Content-Length: +5\r\n\r\n12345", 400),
        (HEAD + b"Content-Length: 1_0\r\n\r\n1234567890", 400),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /" + b"a" * 40_000, 414),
        (GET + b"X-Filler: " + b"a" * 40_000, 431),
        (GET + b"X-Filler: %s\r\n\r\n" % (b"a" * 20_000), 431),  # one burst passes h11's own limit
        (b"GET /livez?%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * MAX_URL_BYTES), 414),
    ],
)
def test_malformed_requests_are_answered_and_the_connection_closed(
    live: LiveServer, data: bytes, status: int
) -> None:
    line = live.line()
    line.send(data)
    answer = line.read()
    assert answer.status == status and answer.error["type"]
    assert answer.headers["connection"] == "close"
    line.socket.shutdown(1)
    assert line.is_closed()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET http://127.0.0.1/livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
        (b"GET HTTPS://localhost:9/readyz/?a=http://b HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://localhost/info HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 200),  # the target's wins
        (b"GET http://elsewhere.example/info HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://[::1]:80/info HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://localhost?a=b HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://localhost/nope HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET http:///livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://me@localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/livez HTTP/1.1\r\n\r\n", 400),  # a Host is needed all the same
        (b"GET http://localhost/livez HTTP/1.0\r\n\r\n", 200),
        (GOOD.replace(b"POST /", b"POST http://localhost:8000/"), 200),
    ],
)
def test_whole_urls(live: LiveServer, data: bytes, status: int) -> None:
    line = live.line()
    for part in (data[:1], data[1:]):  # in two packets
        line.send(part)
        time.sleep(0.02)
    assert line.read().status == status


def test_whole_urls_behind_a_prefix(loaded: tuple[SteeredPredictor, ServeConfig]) -> None:
    predictor, config = loaded
    with serving(predictor, config.model_copy(update=dict(root_path="/pairs"))) as live:
        assert live.raw(GOOD.replace(b"POST /", b"POST http://localhost/")).status == 200
        assert live.raw(GET.replace(b"GET /l", b"GET http://localhost/%6c") + b"\r\n").status == 200


@pytest.mark.slow
def test_an_empty_line_behind_a_body_is_none_of_the_next_request(hasty: LiveServer) -> None:
    line = hasty.line()
    line.send((GOOD + b"\r\n") * 3)
    assert [line.read().status for _ in range(3)] == [200] * 3
    for empty in (b"", b"\r\n"):  # the third one's still stands there
        for part in (empty[:1], empty[1:] + GOOD[:9], GOOD[9:]):
            line.send(part)
            time.sleep(0.02)
        assert line.read().status == 200
    line.send(b"\r\n")
    assert line.is_closed()  # as any idle connection, by its own timer
    line = hasty.line()
    line.send(GOOD + b"\r\n\r\n" + GOOD)
    assert [line.read().status for _ in range(2)] == [200, 400]


def test_a_header_block_in_pieces_is_431_too(live: LiveServer) -> None:
    line = live.line()
    line.send(GET)
    for number in range(30):
        line.send(b"X-%d: %s\r\n" % (number, b"a" * 1000))
        time.sleep(0.001)
    assert line.read().status == 431


def test_two_lengths_the_coding_wins_and_the_connection_ends(live: LiveServer) -> None:
    line = live.line()
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    line.send(HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    answer = line.read()
    assert answer.status == 200 and answer.headers["connection"] == "close" and line.is_closed()


def test_pipelined_requests_are_answered_in_order(live: LiveServer) -> None:
    line = live.line()
    line.send(b"".join(GET + b"X-Request-ID: n%d\r\n\r\n" % i for i in range(20)) + GOOD)
    assert [line.read().headers["x-request-id"] for _ in range(20)] == [f"n{i}" for i in range(20)]
    assert line.read().status == 200


def test_a_bad_request_behind_a_good_one(live: LiveServer) -> None:
    line = live.line()
    line.send(GOOD + b"nonsense\r\n\r\n")
    assert line.read().status == 200
    assert line.read().status == 400


def test_an_answered_body_is_read_and_the_connection_kept(live: LiveServer) -> None:
    line = live.line()
    line.send(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000\r\n\r\n")
    assert line.read().status == 404
    line.send(b"x" * 30_000 + GOOD)
    assert line.read().status == 200


def test_413_reaches_a_sender_that_goes_on_sending(live: LiveServer) -> None:
    """Half a megabyte more than anyone reads: with a bare close the answer would be lost to a reset."""
    for _ in range(5):
        line = live.line()
        line.send(HEAD + b"Content-Length: 600000\r\n\r\n")
        for _ in range(75):
            line.send(b" " * 8000)
        assert line.read().status == 413
        assert line.is_closed()


def test_413_does_not_read_for_ever(live: LiveServer) -> None:
    before = live.num_connections
    line = live.line()
    line.send(HEAD + b"Content-Length: 900000000\r\n\r\n")
    assert line.read().status == 413
    sent = 0
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while sent < 64 * 2**20:
            line.send(b" " * 2**16)
            sent += 2**16
    line = live.line()
    line.send(HEAD + b"Content-Length: 900000000\r\n\r\n")
    assert line.read().status == 413 and line.is_closed()  # the half close
    assert live.num_connections > before
    live.wait_for(lambda: live.num_connections <= before)  # its sender never closes, and is let go


# Slow and silent clients


def count(server: LiveServer, event: str) -> float:
    return server.metric("bertpair_protocol_events_total", event=event)


def test_a_silent_client_is_closed_without_a_word(hasty: LiveServer) -> None:
    before = count(hasty, "silent_timeout")
    line = hasty.line()
    began = time.monotonic()
    assert line.is_closed() and time.monotonic() - began > 0.3
    assert count(hasty, "silent_timeout") > before


@pytest.mark.parametrize(
    ("start", "drip"),
    [
        (b"GET /li", b"v"),
        (GET, b"X-A: b\r\n"),
        (GET + b"X-Long: ", b"a"),
        (HEAD + b"Content-Length: 500\r\n\r\n", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_a_dripping_request_is_408(hasty: LiveServer, start: bytes, drip: bytes) -> None:
    before = count(hasty, "408")
    line = hasty.line()
    began = time.monotonic()
    line.send(start)
    line.socket.setblocking(False)
    data = b""
    while not data and time.monotonic() - began < 60:
        try:
            data = line.socket.recv(65536)
        except BlockingIOError:
            line.send(drip)
            time.sleep(0.02)
    assert data.startswith(b"HTTP/1.1 408") and time.monotonic() - began > 0.3
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["type"] == "request_timeout"
    assert count(hasty, "408") > before


@pytest.mark.slow
def test_the_deadline_is_that_of_each_request(hasty: LiveServer) -> None:
    """Five requests of 0.3 s each on one connection: 1.5 s in all, three deadlines long."""
    line = hasty.line()
    for _ in range(5):
        line.send(GOOD[:40])
        time.sleep(0.3)
        line.send(GOOD[40:])
        assert line.read().status == 200
    line.send(GOOD + GET)  # the second has a deadline of its own, though it came with the first
    assert line.read().status == 200
    time.sleep(0.2)
    line.send(b"\r\n")
    assert line.read().status == 200


@pytest.mark.slow
def test_a_model_that_takes_longer_than_the_deadline_is_no_timeout(hasty: LiveServer) -> None:
    def slow(rows: list[object]) -> list[object]:
        time.sleep(1.2)
        return SteeredPredictor.__mro__[1].run(hasty.service.predictor, rows)  # type: ignore[attr-defined,no-any-return]

    hasty.run = slow  # type: ignore[assignment]
    try:
        assert hasty.raw(GOOD).status == 200
    finally:
        hasty.run = None


def test_the_unread_rest_of_an_answered_body_has_a_deadline(hasty: LiveServer) -> None:
    line = hasty.line()
    line.send(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000\r\n\r\n")
    assert line.read().status == 404
    assert line.is_closed()  # silently: an answer has begun


@pytest.mark.slow
def test_an_idle_connection_is_kept_for_a_while(hasty: LiveServer) -> None:
    line = hasty.line()
    line.send(GET + b"\r\n")
    assert line.read().status == 200
    time.sleep(0.7)  # longer than receive_timeout: between requests keep_alive counts
    line.send(GET + b"\r\n")
    assert line.read().status == 200
    assert line.is_closed()


def test_answers_that_nobody_reads_have_a_deadline(hasty: LiveServer) -> None:
    before = count(hasty, "unread_answer")
    line = hasty.line()
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400
    line.socket.settimeout(0.3)
    try:
        for _ in range(20):
            line.send(request)
    except (TimeoutError, ConnectionError):
        pass
    hasty.wait_for(lambda: count(hasty, "unread_answer") > before)


# The cap


def test_connections_above_the_cap_are_closed_and_others_served(
    loaded: tuple[SteeredPredictor, ServeConfig],
) -> None:
    predictor, config = loaded
    config = config.model_copy(update=dict(max_connections=3))
    with serving(predictor, config) as live:
        held = [live.line() for _ in range(3)]
        for line in held:
            line.send(GET + b"\r\n")
            assert line.read().status == 200
        assert all(live.line().is_closed() for _ in range(5))
        assert live.metric("bertpair_protocol_events_total", event="connection_refused") == 5
        held[0].send(GOOD)
        assert held[0].read().status == 200
        held[1].close()
        live.wait_for(lambda: serves(live))


def serves(live: LiveServer) -> bool:
    try:
        return live.ask("GET", "/livez").status == 200
    except (EOFError, ConnectionError):
        return False


# Clients that leave


def test_clients_that_leave_make_no_noise(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for data in (b"", b"GET /li", HEAD, HEAD + b"Content-Length: 500\r\n\r\nabc", GOOD, GOOD[:-3]):
            for _ in range(3):
                line = live.line()
                if data:
                    line.send(data)
                line.close()
        assert live.predict().status == 200
        time.sleep(0.2)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info]


# What the subclass leans on


def test_uvicorns_parts_are_there() -> None:
    assert uvicorn.__version__.startswith("0.54."), "read h11_impl.py anew, then move the pin"
    source = inspect.getsource(h11_impl.H11Protocol)
    for name in ("on_response_complete", "send_400_response", "shutdown"):
        assert f"def {name}(self" in source, name
    for name in ("conn", "flow", "transport", "connections", "server_state", "loop"):
        assert f"self.{name}" in source, name
    assert '"state": self.app_state.copy()' in source
    assert "except h11.RemoteProtocolError:" in source  # around send_400_response, which asks for the fault


def test_the_pin_is_that_minor_version() -> None:
    root = Path(__file__).parents[2]
    assert "uvicorn==0.54." in (root / "requirements.txt").read_text()
    assert '"uvicorn>=0.54,<0.55"' in (root / "pyproject.toml").read_text()
