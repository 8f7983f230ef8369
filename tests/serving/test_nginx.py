"""The nginx example of examples/serve.md, taken from there, in a real nginx before real servers."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import write_hf_folder
from live_server import PAIR, make_predictor, serving
from safetensors.numpy import load_file, save_file
from server_process import Process

from bertpair import PairClassifier, Prediction

PAGE = Path(__file__).parents[2] / "examples" / "serve.md"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
HOST = "pairs.example.com"
MAIN = """\
daemon off;
{user}
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{block}
}}
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="no nginx here")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


def documented_flags() -> list[str]:
    found = re.search(r"^Start each server with `(--root_path .*?)`\.", PAGE.read_text(), re.MULTILINE)
    assert found
    return found[1].split()


def documented_block(port: int, servers: list[int]) -> str:
    """The example with ports that are free here, and without TLS: there is no certificate here."""
    found = re.search(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    block, num_listen = re.subn(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", found[1])
    block, num_certificates = re.subn(r"^ *ssl_certificate\S* .*;\n", "", block, flags=re.MULTILINE)
    assert (num_listen, num_certificates) == (1, 2)
    for documented, here in zip((8000, 8001), servers, strict=True):
        assert block.count(f"server 127.0.0.1:{documented} ") == 1
        block = block.replace(f"server 127.0.0.1:{documented} ", f"server 127.0.0.1:{here} ")
    return block


@contextlib.contextmanager
def nginx(tmp_path: Path, servers: list[int]) -> Iterator[int]:
    """The port of an nginx in front of two servers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = "user root;" if os.getuid() == 0 else ""  # pytest's folders are its user's alone
    conf = tmp_path / "nginx.conf"
    conf.write_text(MAIN.format(user=user, block=documented_block(port, servers)))
    with (tmp_path / "said").open("w") as said:
        command = [str(NGINX), "-p", str(tmp_path), "-c", str(conf), "-e", "stderr"]
        process = subprocess.Popen(command, stderr=said, stdout=said)
    try:
        end = time.monotonic() + 20
        while not is_open(port):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def is_open(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


def request(method: str, path: str, body: object = None, host: str = HOST) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def ask(port: int, data: bytes) -> tuple[int, bytes]:
    """From an address that is not nginx's own."""
    with socket.create_connection(("127.0.0.1", port), timeout=20, source_address=("127.0.0.2", 0)) as line:
        line.sendall(data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), body


def test_the_example_passes_requests_on(folder: Path, tmp_path: Path) -> None:
    flags = ["--model_dir", str(folder), "--port", "0", "--drain_seconds", "0", *documented_flags()]
    limits = ["--max_request_rows", "1", "--max_text_chars", "1000", "--max_body_bytes", "20000"]
    with Process(*flags, *limits) as server, nginx(tmp_path, [server.port, server.port]) as port:
        assert ask(port, request("GET", "/pairs/livez")) == (200, b'{"status": "live"}')
        assert ask(port, request("GET", "/pairs/readyz"))[0] == 200
        status, body = ask(port, request("POST", "/pairs/v1/predict", PAIR))
        assert status == 200 and json.loads(body)["label"]
        status, body = ask(port, request("POST", "/pairs/v1/model_prediction/", {"sentence1": "a"}))
        assert status == 422 and json.loads(body)["error"]["field"] == "sentence2"
        assert b'data-root="/pairs"' in ask(port, request("GET", "/pairs/"))[1]
        large, huge = ({"text_a": "a" * size, "text_b": "b"} for size in (900_000, 3_000_000))
        status, body = ask(port, request("POST", "/pairs/v1/predict", large))
        assert status == 413 and json.loads(body)["error"]["type"]  # the server's own answer
        assert ask(port, request("POST", "/pairs/v1/predict", huge))[0] == 413  # nginx's
        assert ask(port, request("POST", "/pairs/v1/predict", PAIR))[0] == 200  # none counts as failed
        # the server itself: a name it was not told is refused, save by the probes
        assert ask(server.port, request("GET", "/info", host="bertpair"))[0] == 400
        assert ask(server.port, request("GET", "/livez", host="bertpair"))[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        seen = {line["client"] for line in map(json.loads, server.access) if "/v1/" in line["path"]}
        assert seen == {"127.0.0.2"}


def test_a_post_that_meets_a_503_goes_to_the_other_server(folder: Path, tmp_path: Path) -> None:
    settings = {"allowed_hosts": [HOST], "root_path": "/pairs", "max_batch_tokens": 512}
    with (
        serving(*make_predictor(folder, **settings), is_warm=False) as cold,
        serving(*make_predictor(folder, **settings)) as warm,
        nginx(tmp_path, [cold.port, warm.port]) as port,
    ):
        found = [ask(port, request("POST", "/pairs/v1/predict", PAIR))[0] for _ in range(8)]
        assert found == [200] * 8
        refused = cold.metric("bertpair_requests_total", route="/v1/predict", status="503")
        assert refused >= 1 and warm.metric("bertpair_predictions_total") == 8


Answers = list[tuple[int, bytes]]  # status and body, in the order in which they came


async def keep_asking(port: int, stop: asyncio.Event, found: Answers, pause: float = 0) -> None:
    """On one connection, and on another one where the answer says that this one closes."""
    writer = None
    while not stop.is_set():
        if writer is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("POST", "/pairs/v1/predict", PAIR))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        found.append((int(head[9:12]), await reader.readexactly(length)))
        if b"connection: close" in head:
            writer.close()
            writer = None
        await asyncio.sleep(pause)
    if writer is not None:
        writer.close()


@contextlib.asynccontextmanager
async def under_load(port: int, clients: int, pause: float = 0) -> AsyncIterator[Answers]:
    """What the clients are answered, until the block ends and then to their last answer."""
    stop, found = asyncio.Event(), Answers()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(keep_asking(port, stop, found, pause))
        yield found
        stop.set()


def test_a_server_that_goes_loses_no_post(folder: Path, tmp_path: Path) -> None:
    async def main(port: int, leaving: Process) -> Answers:
        async with under_load(port, 16) as found:
            await asyncio.sleep(1)
            leaving.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(leaving.wait) == 0
            await asyncio.sleep(1)
        return found

    flags = ["--model_dir", str(folder), "--port", "0", "--drain_seconds", "1", *documented_flags()]
    with Process(*flags) as leaving, Process(*flags) as staying:
        with nginx(tmp_path, [leaving.port, staying.port]) as port:
            found = asyncio.run(asyncio.wait_for(main(port, leaving), 60))
        assert leaving.access and staying.access
    assert {status for status, _ in found} == {200}


def free_port() -> int:
    """Below those that go to outgoing connections: none takes it while its server is away."""
    for port in random.sample(range(15_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def write_new_model(folder: Path, new: Path) -> Path:
    """The same model with another head, that is, with other answers."""
    shutil.copytree(folder, new)
    weights = load_file(new / "model.safetensors")
    head = weights["classifier.weight"]
    weights["classifier.weight"] = np.random.default_rng(1).normal(0, 0.2, head.shape).astype(head.dtype)
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    return new


def test_a_new_model_takes_over_under_load_and_no_post_is_lost(folder: Path, tmp_path: Path) -> None:
    """As the page says it: one process after the other, nginx untouched, `drain_seconds` as it comes."""
    new = write_new_model(folder, tmp_path / "new")
    before, after = (
        PairClassifier.from_pretrained(each).predict([tuple(PAIR.values())])[0] for each in (folder, new)
    )
    assert abs(before.probabilities["neutral"] - after.probabilities["neutral"]) > 0.1
    ports = [free_port(), free_port()]
    at_work = contextlib.ExitStack()

    def start(model: Path, port: int) -> Process:
        flags = ["--model_dir", str(model), "--port", str(port), *documented_flags()]
        return at_work.enter_context(Process(*flags))

    def exchange(old: Process, port: int) -> Process:
        old.process.send_signal(signal.SIGTERM)
        assert old.wait() == 0
        process = start(new, port)
        assert process.port == port and ask(port, request("GET", "/readyz"))[0] == 200
        return process

    async def main(port: int, old: list[Process]) -> tuple[Answers, Answers, Answers]:
        async with under_load(port, 8, pause=0.02) as found:
            await asyncio.sleep(1)
            num_old = len(found)
            started = [await asyncio.to_thread(exchange, *each) for each in zip(old, ports, strict=True)]
            num_mixed = len(found)
            await asyncio.sleep(4)  # nginx leaves a server that failed alone for up to 3 s
        assert all("/v1/predict" in "".join(process.access) for process in (*old, *started))
        return found[:num_old], found[num_old:num_mixed], found[num_mixed:]

    with at_work:
        old = [start(folder, port) for port in ports]
        with nginx(tmp_path, [process.port for process in old]) as port:
            parts = asyncio.run(asyncio.wait_for(main(port, old), 240))
    assert {status for part in parts for status, _ in part} == {200}
    versions = [answered_by(part, {"old": before, "new": after}) for part in parts]
    assert versions == [{"old"}, {"old", "new"}, {"new"}]


def answered_by(answers: Answers, models: Mapping[str, Prediction]) -> set[str]:
    """Which of the models, each with its prediction for the pair, gave the answers."""
    found = set()
    for body in {body for _, body in answers}:
        near = pytest.approx(json.loads(body)["probabilities"], abs=1e-5)
        found |= {name for name, model in models.items() if model.probabilities == near} or {"none of them"}
    return found
