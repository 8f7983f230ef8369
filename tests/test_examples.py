"""What examples/ holds works: the client against a real server, the unit through systemd's own check."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import LiveServer, make_predictor, serving

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    predictor, config = make_predictor(folder, max_batch_tokens=512)
    with serving(predictor, config, b"the-right-key") as server:
        yield server


def run_client(
    live: LiveServer, *arguments: str, key: str = "the-right-key"
) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        str(EXAMPLES / "client.py"),
        "--url",
        f"http://127.0.0.1:{live.port}",
        *arguments,
    ]
    environment = {**os.environ, "BERTPAIR_KEY": key, "PYTHONUTF8": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_client_asks_for_one_pair_and_for_a_file(live: LiveServer, tmp_path: Path) -> None:
    one = run_client(live, "the cat", "中文")
    assert one.returncode == 0 and json.loads(one.stdout)["label"] in ("negative", "neutral", "positive")
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"the cat {i}\tsat {i}\n" for i in range(70)), encoding="utf-8")
    many = run_client(live, "--file", str(file))
    rows = [line.split("\t") for line in many.stdout.splitlines()]
    assert many.returncode == 0 and [row[0] for row in rows] == [f"the cat {i}" for i in range(70)]
    assert {len(row) for row in rows} == {4}
    refused = run_client(live, "the cat", "sat", key="a-wrong-key")
    assert refused.returncode == 1 and refused.stderr.startswith("error: 401") and not refused.stdout


def test_the_client_sends_what_the_server_takes(live: LiveServer, tmp_path: Path) -> None:
    """Long rows of three bytes a character, with the defaults, and more rows than one request may hold."""
    limits = live.service.predictor.limits
    file = tmp_path / "pairs.tsv"
    chars = limits.max_text_chars
    file.write_text(f"{'学' * chars}\t{'算' * chars}\n" * 40, encoding="utf-8")
    for rows in ([], ["--rows", "1000"]):
        done = run_client(live, *rows, "--file", str(file))
        assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 40
    file.write_text("a\tb\n" * 40 + f"{'a' * (chars + 1)}\tb\n", encoding="utf-8")
    done = run_client(live, "--file", str(file))
    assert done.returncode == 1 and done.stderr.startswith(
        f"error: {file}, lines 33 to 41: 422: pairs[8].text_a"
    )


def test_the_client_splits_by_bytes(tmp_path: Path) -> None:
    settings = {"max_batch_tokens": 512, "max_body_bytes": 4000, "max_request_rows": 30, "max_text_chars": 5}
    file = tmp_path / "pairs.tsv"
    file.write_text("学\t算\n" * 61, encoding="utf-8")
    settings["max_body_bytes"] = 30 * 124 + 64
    predictor, config = make_predictor(write_hf_folder(tmp_path / "hf-tiny"), **settings)
    with serving(predictor, config, b"the-right-key") as live:
        done = run_client(live, "--file", str(file))
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 61


class Stub:
    """A server that gives every request the same bytes, or none."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.is_asked = threading.Event()
        self.requests: list[bytes] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        lines = []
        with contextlib.suppress(OSError):
            while True:
                lines.append(self.socket.accept()[0])
                self.is_asked.set()
                if self.answer is not None:
                    self.requests.append(lines[-1].recv(65536))
                    lines[-1].sendall(self.answer)
                    lines[-1].close()


def run_alone(*arguments: str, **environment: str) -> tuple[int, str]:
    """The client's exit code and standard error, which is one line."""
    command = [sys.executable, str(EXAMPLES / "client.py"), *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("more", [["a", "b"], ["--file", "pairs.tsv"]], ids=["one", "file"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html>",
            "502 Bad Gateway: not an answer",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "not an answer of a bertpair server"),
        (b"HTTP/1.1 413 Too Large\r\n\r\n{}", "413 Too Large"),
        (b'HTTP/1.1 401 No\r\n\r\n{"error": {"message": "a key is needed"}}', "401: a key is needed"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", "not an answer of a bertpair server"),
    ],
)
def test_the_client_says_what_a_strange_server_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, said: str, more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text("a\tb\n")
    code, line = run_alone("--url", f"http://127.0.0.1:{Stub(answer).port}", *more)
    assert code == 1 and line.startswith("error: ") and said in line


@pytest.mark.slow
def test_the_client_without_a_server_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    assert run_alone("--url", url, "a", "b") == (1, f"error: {url} cannot be reached: Connection refused\n")
    slow = f"http://127.0.0.1:{Stub(None).port}"
    assert run_alone("--url", slow, "--timeout", "0.3", "a", "b") == (
        1,
        f"error: {slow} did not answer within 0.3 s\n",
    )
    for wrong in ("localhost:8000", "http://", "ftp://a", "http://a:b", "http://a b", "http://[a"):
        code, line = run_alone("--url", wrong, "a", "b")
        assert code == 1 and "expected a URL such as" in line
    for url in ("http://no-such-name.invalid", "http://a..b", f"http://{'ü' * 70}"):
        code, line = run_alone("--url", url, "a", "b")
        assert code == 1 and line.startswith(f"error: {url} cannot be reached: ")
    code, line = run_alone("a", "b", BERTPAIR_KEY="ключ-ключ")
    assert code == 1 and "BERTPAIR_KEY" in line


def test_the_client_writes_utf_8_or_says_that_it_cannot(live: LiveServer, tmp_path: Path) -> None:
    file, answers = tmp_path / "pairs.tsv", tmp_path / "answers.tsv"
    file.write_text("学\t算\n" * 2000, encoding="utf-8")
    url = f"http://127.0.0.1:{live.port}/"
    words = [sys.executable, EXAMPLES / "client.py", "--url", url, "--file", file]
    environment = {**os.environ, "BERTPAIR_KEY": "the-right-key", "PYTHONIOENCODING": "ascii"}

    def run(shell: str) -> tuple[int, str]:
        command = ["sh", "-c", shell, answers, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert run('"$@" > "$0"') == (0, "")
    assert [line.split("\t")[:2] for line in answers.read_text("utf-8").splitlines()] == [["学", "算"]] * 2000
    for limit in ("0", "1"):  # blocks: nothing can be written, or not all
        said = "error: the answers cannot be written: File too large\n"
        assert run(f'ulimit -f {limit}; "$@" > "$0"') == (1, said)
    assert run('"$@" >&-') == (1, "error: standard output is closed\n")


@pytest.mark.slow
def test_the_client_takes_urls_as_browsers_do() -> None:
    """A path in any letters, and an IPv6 address without a port."""
    stub = Stub(b"HTTP/1.1 404 No\r\n\r\n{}")
    code, line = run_alone("--url", f"http://127.0.0.1:{stub.port}/ü b", "a", "b")
    assert code == 1 and "404 No" in line and stub.requests[0].startswith(b"POST /%C3%BC%20b/v1/predict ")
    code, line = run_alone("--url", "http://[::ffff:127.0.0.1]", "a", "b")
    assert code == 1 and "expected a URL" not in line


def test_the_client_names_a_file_it_cannot_read(live: LiveServer, tmp_path: Path) -> None:
    bad = tmp_path / "gbk.tsv"
    bad.write_bytes("学\t算\n".encode("gbk"))
    odd = tmp_path / "odd.tsv"
    odd.write_text("a\tb\nc\n")
    for path, said in (
        (tmp_path / "none.tsv", "No such file"),
        (bad, "not in UTF-8"),
        (odd, "odd.tsv:2: expected"),
    ):
        done = run_client(live, "--file", str(path))
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_the_client_stops_at_ctrl_c(tmp_path: Path) -> None:
    stub = Stub(None)
    url = f"http://127.0.0.1:{stub.port}"
    command = [sys.executable, str(EXAMPLES / "client.py"), "--url", url, "a", "b"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert stub.is_asked.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "stopped\n" and process.returncode == 130


def test_the_page_shows_the_files_that_stand_beside_it() -> None:
    page = (EXAMPLES / "serve.md").read_text(encoding="utf-8")
    for language, name in (("ini", "bertpair.service"), ("dockerfile", "Containerfile")):
        found = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
        assert found and found[1] == (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """With a command that exists here in the place of the installed one; every other line is as it stands."""
    unit = (EXAMPLES / "bertpair.service").read_text(encoding="utf-8")
    file = tmp_path / "bertpair.service"
    file.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60
    )
    about_us = [line for line in done.stderr.splitlines() if "bertpair" in line]
    assert done.returncode == 0 and not about_us, done.stderr
