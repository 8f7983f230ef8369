"""What goes wrong behind the routes, against a real socket: the model, the queue, the clients, the process.

Faults are numbered as in the list that the service was built against (14 to 30).
"""

import dataclasses
import hashlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_hf_folder
from live_server import PAIR, Answer, LiveServer, SteeredPredictor, make_config, make_predictor, serving
from server_process import Process, ask

from bertpair.checkpoints.checkpoint import weights_digest
from bertpair.checkpoints.manifest import FileEntry, Manifest, encode_manifest
from bertpair.errors import BertpairError, ConfigError
from bertpair.evaluation.agreement import Agreement, compare
from bertpair.evaluation.classifier import Prediction
from bertpair.serving import server
from bertpair.serving.listening import SPARE_DESCRIPTORS, check_descriptors, read_key
from bertpair.serving.predictor import Predictor, TokenRow
from bertpair.settings.serve import ServeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[SteeredPredictor, ServeConfig]:
    return make_predictor(folder, max_batch_tokens=512)


@pytest.fixture
def live(loaded: tuple[SteeredPredictor, ServeConfig]) -> Iterator[LiveServer]:
    predictor, config = loaded
    config = config.model_copy(update=dict(stall_seconds=0.5, max_queue_rows=4))
    config = config.model_copy(update=dict(max_request_rows=4))
    with serving(predictor, config) as server:
        yield server


class Gate:
    """The model, held up until the test opens it; what it was given is kept."""

    def __init__(self, live: LiveServer) -> None:
        self.live, self.entered, self.open = live, threading.Event(), threading.Event()
        self.calls: list[int] = []
        live.run = self.run

    def run(self, rows: list[TokenRow]) -> list[Prediction | Exception]:
        self.calls.append(len(rows))
        self.entered.set()
        assert self.open.wait(20)
        return Predictor.run(self.live.service.predictor, rows)


def ask_aside(live: LiveServer, body: object = PAIR, path: str = "/v1/predict") -> "Aside":
    aside = Aside(live, body, path)
    aside.start()
    return aside


class Aside(threading.Thread):
    """A request on a thread of its own."""

    def __init__(self, live: LiveServer, body: object, path: str) -> None:
        super().__init__()
        self.live, self.body, self.path = live, body, path
        self.found: Answer | None = None

    def run(self) -> None:
        self.found = self.live.ask("POST", self.path, self.body)

    def answer(self) -> Answer:
        self.join(20)
        assert self.found is not None
        return self.found


def test_15_a_poisoned_request_fails_alone(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(live)
    plain = gate.run

    def run(rows: list[TokenRow]) -> list[Prediction | Exception]:
        found = plain(rows)
        if any(len(row) > 20 for row in rows):
            raise ZeroDivisionError("poison")
        return found

    live.run = run
    first = ask_aside(live)
    assert gate.entered.wait(10)
    poison = ask_aside(live, {"text_a": "cat " * 30, "text_b": "sat"})
    others = [ask_aside(live, {"text_a": "good", "text_b": f"bad {i}"}) for i in range(3)]
    live.wait_for(lambda: live.service.batcher.num_waiting == 4)
    gate.open.set()
    assert first.answer().status == 200 and [o.answer().status for o in others] == [200] * 3
    assert poison.answer().status == 500 and poison.answer().error["type"] == "internal_error"
    assert poison.answer().headers["x-request-id"] in caplog.text  # the log has the traceback, not the answer
    assert gate.calls[0] == 1 and gate.calls[1] == 4


def test_16_a_forward_that_raises(live: LiveServer) -> None:
    def run(rows: list[TokenRow]) -> list[Prediction | Exception]:
        raise RuntimeError("always")

    live.run = run
    assert [live.predict().status for _ in range(3)] == [500] * 3
    live.run = None
    assert live.predict().status == 200 and live.ask("GET", "/readyz").status == 200


@pytest.mark.slow
def test_16_a_forward_that_hangs_is_seen_by_the_probes(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = live.service.config.model_copy(update=dict(stall_seconds=1.0))
    monkeypatch.setattr(live.service, "config", config)
    live.service.batcher.limits.queue_deadline = 0.6
    gate = Gate(live)
    hung = ask_aside(live)
    assert gate.entered.wait(10)
    assert live.predict().status == 503  # expired in the queue
    live.wait_for(lambda: live.ask("GET", "/readyz").status == 503)
    assert live.ask("GET", "/livez").status == 200  # until it has been twice as long
    assert live.predict().error["type"] == "stalled"
    live.wait_for(lambda: live.ask("GET", "/livez").status == 503)
    gate.open.set()
    assert hung.answer().status == 200
    assert live.ask("GET", "/readyz").status == live.ask("GET", "/livez").status == 200


def test_17_no_nan_leaves_the_server(live: LiveServer) -> None:
    real = live.service.predictor.classifier

    class Broken:
        def predict_tokens(self, tokens: object) -> list[Prediction]:
            found = real.predict_tokens(tokens)  # type: ignore[arg-type]
            return [dataclasses.replace(p, score=math.nan) for p in found]

    live.service.predictor.classifier = Broken()  # type: ignore[assignment]
    try:
        live.run = lambda rows: Predictor.run(live.service.predictor, rows)
        live.service.predictor.classifier.tokenizer = real.tokenizer  # type: ignore[attr-defined]
        live.service.predictor.classifier.max_seq_length = real.max_seq_length  # type: ignore[attr-defined]
        answer = live.predict()
    finally:
        live.service.predictor.classifier = real
    assert answer.status == 500 and answer.error["type"] == "not_a_number" and b"NaN" not in answer.body
    assert live.predict().status == 200


def test_18_out_of_memory_splits_once(live: LiveServer) -> None:
    def run(rows: list[TokenRow]) -> list[Prediction | Exception]:
        if len(rows) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return Predictor.run(live.service.predictor, rows)

    live.run = run
    assert live.ask("POST", "/v1/predict/batch", {"pairs": [PAIR] * 4}).status == 200
    live.run = lambda rows: (_ for _ in ()).throw(MemoryError())
    answer = live.ask("POST", "/v1/predict/batch", {"pairs": [PAIR] * 4})
    assert answer.status == 503 and answer.error["type"] == "no_memory"
    live.run = None
    assert live.predict().status == 200


def test_20_a_wait_beyond_the_deadline_is_503_without_running(live: LiveServer) -> None:
    live.service.batcher.limits.queue_deadline = 0.6
    gate = Gate(live)
    first = ask_aside(live)
    assert gate.entered.wait(10)
    began = time.monotonic()
    answer = live.predict()
    assert answer.status == 503 and answer.error["type"] == "deadline_passed"
    assert time.monotonic() - began > 0.5 and int(answer.headers["retry-after"]) >= 1
    gate.open.set()
    assert first.answer().status == 200 and gate.calls == [1]
    assert live.metric("bertpair_dropped_rows_total", reason="expired") == 1


def test_a_full_queue_is_429(live: LiveServer) -> None:
    gate = Gate(live)
    first = ask_aside(live)
    assert gate.entered.wait(10)
    waiting = ask_aside(live, {"pairs": [PAIR] * 4}, "/v1/predict/batch")
    live.wait_for(lambda: live.service.batcher.num_waiting == 4)
    answer = live.predict()
    assert answer.status == 429 and answer.error["type"] == "overloaded"
    assert int(answer.headers["retry-after"]) >= 1
    assert live.metric("bertpair_refused_requests_total") == 1
    gate.open.set()
    assert first.answer().status == waiting.answer().status == 200


def test_21_clients_that_leave(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(live)
    body = json.dumps(PAIR).encode()
    request = (
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    during = live.line()
    during.send(request + body)
    assert gate.entered.wait(10)
    queued, unread = live.line(), live.line()
    queued.send(request + body)
    unread.send(request + body[:5])
    live.wait_for(lambda: live.service.batcher.num_waiting == 1)
    for line in (during, queued, unread):
        line.close()
    live.wait_for(lambda: live.metric("bertpair_client_disconnects_total") == 3)
    assert live.metric("bertpair_dropped_rows_total", reason="gone") == 1
    gate.open.set()
    assert live.predict().status == 200
    assert gate.calls == [1, 1] and "Traceback" not in caplog.text


def test_22_chaos_in_small(live: LiveServer) -> None:
    """The benchmark sends 10,000; here 300, and nothing is left over."""
    body = json.dumps(PAIR).encode()
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    good = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    kinds = [good, good[:-4], good[:30], head + b"Content-Length: 999999\r\n\r\n", b"\x00\xff\r\n\r\n", b""]
    assert live.predict().status == 200  # the thread that tokenizes starts with the first text
    live.wait_for(lambda: live.num_connections == 0)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(300):
        line = live.line()
        line.send(kinds[number % 6])
        if number % 6 == 0:
            assert line.read().status == 200
        line.close()
    assert live.predict().status == 200
    live.wait_for(lambda: live.num_connections == 0)
    assert threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_28_threads_follow_the_quota(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("bertpair.runtime.usable_cores", lambda: 1)  # as under a quota of one core
    try:
        torch.set_num_threads(2)
        predictor, _ = make_predictor(folder, num_threads=None)
        assert predictor.num_threads == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_29_there_is_one_process_and_no_flag_for_more() -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        make_config({"workers": 2})


# The process


@pytest.mark.slow
def test_24_sigterm_drains_and_a_second_one_ends_at_once(folder: Path) -> None:
    flags = ["--model_dir", str(folder), "--port", "0", "--amp", "off"]
    with Process(*flags, "--drain_seconds", "1.5") as server:
        port = int(server.wait_for(r"listening on http://127\.0\.0\.1:(\d+)")[1])
        assert ask(port, "/livez")[0] == 200
        server.wait_for("^ready")
        assert ask(port, "/readyz")[0] == 200
        idle = socket.create_connection(("127.0.0.1", port))
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert ask(port, "/readyz")[0] == 503 and ask(port, "/livez")[0] == 200
        status, answer = ask(port, "/v1/predict", PAIR)  # the listener is open, and answers
        assert status == 200 and b'"label"' in answer
        assert server.wait() == 0
        idle.close()
        assert not [line for line in server.said if "Traceback" in line]
    with Process(*flags, "--drain_seconds", "60") as server:
        server.wait_for("^ready")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM


@pytest.mark.slow
def test_24_clients_that_left_do_not_spoil_the_exit(folder: Path) -> None:
    """Batches nobody waits for run on while the interpreter goes: that must not abort the process."""
    flags = ["--model_dir", str(folder), "--port", "0", "--amp", "off", "--drain_seconds", "0"]
    body = json.dumps({"pairs": [{"text_a": "the cat " * 30, "text_b": "sat"}] * 32}).encode()
    with Process(*flags, "--num_threads", "2") as server:
        port = int(server.wait_for(r"listening on http://127\.0\.0\.1:(\d+)")[1])
        server.wait_for("^ready")
        lines = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        for line in lines:
            line.sendall(
                b"POST /v1/predict/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
        time.sleep(0.02)
        for line in lines:
            line.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not [said for said in server.said if "terminate" in said or "Traceback" in said]


@pytest.mark.slow
def test_24_work_left_over_after_the_grace_is_exit_1(folder: Path) -> None:
    flags = ["--model_dir", str(folder), "--port", "0", "--amp", "off", "--drain_seconds", "0"]
    with Process(
        *flags, "--queue_deadline", "0.5", "--grace_seconds", "1", "--receive_timeout", "60"
    ) as server:
        port = int(server.wait_for(r"listening on http://127\.0\.0\.1:(\d+)")[1])
        server.wait_for("^ready")
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 1
        assert any("left over" in said for said in server.said)


@pytest.mark.slow
def test_27_what_cannot_start_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--model_dir", str(folder), "--port", port], "is in use"),
            (["--model_dir", str(tmp_path / "nothing")], "nothing"),
            (["--model_dir", str(folder), "--prot", "1"], "did you mean port"),
            (["--model_dir", str(folder), "--host", "a..b"], "host a..b: no host has such a name"),
        ]
        servers = [(Process(*flags), part) for flags, part in cases]
        for server, part in servers:
            with server:
                assert server.wait(60) == 2
                assert server.said[-1].startswith("error: ") and part in server.said[-1]
                assert not [line for line in server.said if "Traceback" in line or "listening" in line]


@pytest.mark.slow
def test_a_batch_is_never_larger_than_all_that_may_wait(folder: Path) -> None:
    """So that the warm-up does not prepare what cannot come: 32 rows of 64 tokens."""
    flags = ["--model_dir", str(folder), "--port", "0", "--drain_seconds", "0", "--max_queue_rows", "32"]
    with Process(*flags, "--max_batch_tokens", "1000000") as server:
        assert ask(server.port, "/v1/predict", PAIR)[0] == 200
        server.wait_for("^ready: batches of up to 2048 tokens")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_27_wrong_labels_files_and_limits(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in folder.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    raw = json.loads((wrong / "config.json").read_text())
    raw |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (wrong / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BertpairError, match="3 outputs, needed are 2; config.json does not fit"):
        make_predictor(wrong)
    with pytest.raises(ConfigError, match="below the cut of 64"):
        make_predictor(folder, max_batch_tokens=63)
    with pytest.raises(ConfigError, match="needs 5 at least"):
        make_predictor(folder, max_seq_length=4)
    with pytest.raises(BertpairError, match="absent.tsv"):
        make_predictor(folder, quantize_check=str(tmp_path / "absent.tsv"))
    key = tmp_path / "key"
    for content in ("", "short", "with a space", "ünïcode-key", "k" * 5000):
        key.write_text(content)
        with pytest.raises(ConfigError, match="8 or more printable"):
            read_key(str(key))
    key.write_text("the-right-key\nmore\n")
    assert read_key(str(key)) == b"the-right-key"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(str(tmp_path / "no-key"))
    with pytest.raises(ConfigError, match="ulimit"):
        check_descriptors(2**40)
    check_descriptors(10 + SPARE_DESCRIPTORS)


def test_the_threads_of_work_done_aside_end() -> None:
    """With helpers of two threads, more than the cores, PyTorch's OpenMP sleeps between steps."""

    def tasks() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    def work() -> set[str]:
        torch.ones(2**22).exp().sum()
        return tasks()

    before, threads = tasks(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        new = server.aside(work) - before
    finally:
        torch.set_num_threads(threads)
    assert len(new) == 3  # the thread and its two helpers
    end = time.monotonic() + 30
    while new & tasks() and time.monotonic() < end:
        time.sleep(0.01)
    assert not new & tasks()


def test_quantize_check_compares_with_float32(folder: Path, tmp_path: Path) -> None:
    rows = "".join(f"{i}\tthe cat {i % 7}\tfood {i % 5}\tx\n" for i in range(300))
    file = tmp_path / "check.tsv"
    file.write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    predictor, _ = make_predictor(folder, amp="bf16", quantize_check=str(file))
    found = predictor.check_agreement(folder, predictor.read_check(str(file)))
    assert found.num_rows == 256 and found.is_enough and 0 < found.largest_change < 0.1
    exact, _ = make_predictor(folder)
    assert exact.check_agreement(folder, exact.read_check(str(file))).largest_change < 1e-5
    near, far = np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([[0.6, 0.4], [0.1, 0.9]])
    found = compare(np.log(near), np.log(far), regression=False)
    assert (found.num_rows, found.agreement) == (2, 0.5) and found.largest_change == pytest.approx(0.5)
    values = np.array([[1.0], [2.0]]), np.array([[1.009], [2.25]])
    assert compare(*values, regression=True) == Agreement(2, 0.5, 0.25)
    assert not Agreement(256, 0.97, 0.1).is_enough


@pytest.mark.slow
def test_nothing_is_written_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder refuses a new file, and there is none for temporary files: as in a read-only container."""
    model = write_hf_folder(tmp_path / "hf-tiny")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def refuse(event, arguments):\n"
        "    if event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):\n"
        "        if arguments[0] != os.devnull:\n"
        "            raise OSError(30, 'Read-only file system', arguments[0])\n"
        "    elif event in ('os.mkdir', 'os.rename', 'os.remove'):\n"
        "        raise OSError(30, 'Read-only file system', arguments[0])\n"
        "sys.addaudithook(refuse)\n"
    )
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # PyTorch sets it once it has found a folder
    missing = str(tmp_path / "missing")
    environment = {"PYTHONPATH": str(hook), "HOME": missing, "TMPDIR": missing}
    with Process("--model_dir", str(model), "--port", "0", **environment) as server:
        assert ask(server.port, "/v1/predict", PAIR)[0] == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_the_version_is_of_the_weights_with_a_manifest_or_without(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "hf-tiny")
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert weights_digest(model) == digest
    files = [(path.name, path.read_bytes()) for path in model.iterdir()]
    entries = [FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files]
    (model / "manifest.json").write_bytes(encode_manifest(Manifest(tuple(entries))))
    assert weights_digest(model) == digest and make_predictor(model)[0].version == digest[:12]
