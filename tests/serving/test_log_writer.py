"""Log lines that nobody takes: they hold nobody up, are counted, and are said once."""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import PAIR
from server_process import ROOT, Process, ask

from bertpair.console import MAX_LINES, LogWriter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log = logging.Logger("test")
    yield log
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)  # its descriptor's number is somebody else's next


def read_dropped(port: int) -> int:
    (line,) = [
        line
        for line in ask(port, "/metrics")[1].decode().splitlines()
        if line.startswith("bertpair_dropped_log_lines_total ")
    ]
    return int(float(line.split()[1]))


@pytest.mark.parametrize("is_blocking", [True, False])
def test_lines_come_in_order_and_those_too_many_are_counted(
    log: logging.Logger, caplog: pytest.LogCaptureFixture, is_blocking: bool
) -> None:
    source, sink = full_pipe()
    os.set_blocking(sink, is_blocking)
    writer = LogWriter(sink, "the pipe")
    log.addHandler(writer)
    for number in range(MAX_LINES + 5000):
        log.info("line %d\n", number)
    assert writer.num_dropped == 5000
    with os.fdopen(source, "rb") as reader:
        lines = [reader.readline() + reader.readline() for _ in range(MAX_LINES)]
        assert lines[0].lstrip(b"x") == b"line 0\n\n"
        assert lines[1:] == [b"line %d\n\n" % number for number in range(1, MAX_LINES)]
        wait_until(lambda: bool(caplog.messages))
        assert caplog.messages == ["the pipe: 5000 log lines were dropped"]
        log.info("and on")
        assert reader.readline() == b"and on\n"
        writer.flush()
    os.close(sink)


def test_a_closed_pipe_is_said_once(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    source, sink = os.pipe()
    writer = LogWriter(sink, "the pipe")
    log.addHandler(writer)
    os.close(source)
    for _ in range(50):
        log.info("nobody hears this")
        writer.flush()
    wait_until(lambda: writer.num_dropped == 50)
    writer.close()
    assert caplog.messages == [
        "the pipe cannot be written: Broken pipe; its lines are dropped",
        "the pipe: 50 log lines were dropped",
    ]
    log.removeHandler(writer)
    os.close(sink)


def test_a_server_whose_output_nobody_reads_answers_and_ends(folder: Path) -> None:
    source, sink = full_pipe()
    flags = ["--model_dir", str(folder), "--port", "0", "--drain_seconds", "0"]
    with Process(*flags, stdout=sink) as server:
        os.close(sink)
        port = server.port
        line = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert pipeline(port, line, MAX_LINES + 300) == MAX_LINES + 300
        assert ask(port, "/v1/predict", PAIR)[0] == 200 and 100 < read_dropped(port) <= 400
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert any("standard output: 1" in line and "lines were dropped" in line for line in server.said)
    os.close(source)


def pipeline(port: int, request: bytes, count: int) -> int:
    """How many answers come to that many requests on one connection, 100 at a time."""
    found = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        for _ in range(0, count, 100):
            line.sendall(request * 100)
            data = b""
            while data.count(b'"live"}') < 100:
                data += line.recv(2**16)
            found += 100
    return found


def test_a_server_whose_output_is_closed_says_so_in_one_line(folder: Path) -> None:
    source, sink = os.pipe()
    flags = ["--model_dir", str(folder), "--port", "0", "--drain_seconds", "0"]
    with Process(*flags, stdout=sink) as server:
        os.close(sink)
        os.close(source)
        assert [ask(server.port, "/livez")[0] for _ in range(20)] == [200] * 20
        server.wait_for("standard output cannot be written")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert (
            len([line for line in server.said if "standard output" in line]) == 2
        )  # and how many were dropped
        assert not any("Traceback" in line or "Error" in line for line in server.said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_server_started_without_its_streams_answers(folder: Path, tmp_path: Path, closed: str) -> None:
    path = tmp_path / "s"
    command = f'exec "$0" serve.py --model_dir {folder} --uds {path} --drain_seconds 0 {closed}'
    with starting(["sh", "-c", command, sys.executable], path, subprocess.PIPE) as process:
        assert say(path, b"GET /livez HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
        descriptors = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert not any(target.startswith("socket:") for target in descriptors)  # a stray print goes nowhere
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in errors
        assert (closed == ">&-") == ("standard output is closed: there is no access log" in errors)


def test_a_server_whose_errors_nobody_reads_answers_and_ends(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    source, sink = full_pipe()
    command = [sys.executable, "serve.py", "--model_dir", str(folder), "--uds", str(path)]
    with starting([*command, "--drain_seconds", "0"], path, sink) as process:
        assert say(path, b"GET /livez HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    os.close(sink)
    os.close(source)


@contextlib.contextmanager
def starting(command: list[str], path: Path, errors: int) -> "Iterator[subprocess.Popen[str]]":
    """A server on a Unix socket, once it listens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
    )
    try:
        end = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def say(path: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(20)
        line.connect(str(path))
        line.sendall(request)
        return b"".join(iter(lambda: line.recv(65536), b""))


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def full_pipe() -> tuple[int, int]:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(sink, b"x")
    os.set_blocking(sink, True)
    return source, sink


def test_a_pipe_that_takes_only_a_part_gets_the_rest_later() -> None:
    """Whoever gave us the pipe made it non-blocking: it holds 64 KiB, the lines are 400 KB."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    writer = LogWriter(writing, "a pipe")
    lines = [f"{i} {'x' * 2000}" for i in range(200)]
    for line in lines:
        writer.emit(logging.LogRecord("test", logging.INFO, "", 0, line, None, None))
    expected = "".join(f"{line}\n" for line in lines).encode()
    found = b""
    while len(found) < len(expected):
        assert select.select([reading], [], [], 10)[0], "no more comes"
        found += os.read(reading, 65536)
    assert found == expected and writer.num_dropped == 0
    os.close(reading)
