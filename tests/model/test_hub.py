"""Names and paths: what is there is used, what is not is explained; the hub is a small server on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from bertpair.errors import CheckpointError
from bertpair.model.pretrained import resolve_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {
    name: f"content of {name}".encode()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "special_tokens_map.json",
    )
}
UNNEEDED = dict.fromkeys(
    ("tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "README.md", "run.py", "rust_model.ot"), b"no"
)


class FakeHub(ThreadingHTTPServer):
    """Serves the repository org/model: its listing, its tree and its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.refusal: tuple[int, str] | None = None
        self.fetched: list[str] = []
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        hub.asked.append(path)
        name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
        if hub.refusal is not None:
            self.send(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]}, with_body)
        elif path in ("/api/models/org/model/revision/main", "/api/models/org/model/revision/v1"):
            listing = [{"rfilename": name} for name in hub.files]
            document = {"id": "org/model", "sha": COMMIT, "siblings": listing}
            self.send(200, json.dumps(document).encode(), {}, with_body)
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), {}, with_body)
        elif path.startswith("/api/models/org/model/revision/"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif name in hub.files:
            if with_body:
                hub.fetched.append(name)
            etag = f'"{hashlib.sha1(hub.files[name]).hexdigest()}"'
            self.send(200, hub.files[name], {"X-Repo-Commit": COMMIT, "ETag": etag}, with_body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    try:
        yield server
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


ONE = {"model.safetensors": b"one"}
SHARDS = {
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
}
BIN = {"pytorch_model.bin": b"bin"}
BIN_SHARDS = {
    "pytorch_model.bin.index.json": b"{}",
    "pytorch_model-00001-of-00002.bin": b"first",
    "pytorch_model-00002-of-00002.bin": b"second",
}


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({**ONE, **BIN, "model.fp16.safetensors": b"half"}, ONE),
        ({**SHARDS, **BIN}, SHARDS),
        (BIN, BIN),
        (BIN_SHARDS, BIN_SHARDS),
        ({}, {}),
    ],
)
def test_only_the_needed_files_are_fetched(
    hub: FakeHub, tmp_path: Path, there: dict[str, bytes], wanted: dict[str, bytes]
) -> None:
    hub.files = {**NEEDED, **UNNEEDED, **there}
    folder = resolve_folder("org/model", cache_dir=tmp_path)
    assert list_files(folder) == {*NEEDED, *wanted}
    assert sorted(hub.fetched) == sorted({*NEEDED, *wanted})  # each of them once
    for name, content in {**NEEDED, **wanted}.items():
        assert (folder / name).read_bytes() == content


def test_what_was_fetched_serves_offline(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {**NEEDED, **UNNEEDED, **BIN}
    online = resolve_folder("org/model", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.asked.clear()
    assert resolve_folder("org/model", cache_dir=tmp_path) == online
    assert hub.asked == []


def test_what_was_fetched_serves_when_the_hub_is_gone(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {**NEEDED, **ONE}
    online = resolve_folder("org/model", cache_dir=tmp_path)
    hub.shutdown()
    hub.server_close()
    assert resolve_folder("org/model", cache_dir=tmp_path) == online


def test_a_revision_is_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {**NEEDED, **ONE}
    assert resolve_folder("org/model", revision="v1", cache_dir=tmp_path).name == COMMIT
    assert "/api/models/org/model/revision/v1" in hub.asked
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        resolve_folder("org/model", revision="v2", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("refusal", "complaint"),
    [
        ((404, "RepoNotFound"), "knows no such model: check the name"),
        ((401, "RepoNotFound"), "knows no such model: check the name"),
        ((403, "GatedRepo"), "only to those who accepted its terms"),
        ((500, "Oops"), "cannot be reached and the cache lacks it"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: FakeHub, tmp_path: Path, refusal: tuple[int, str], complaint: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=f"org/model: no such folder here, and .*{complaint}") as caught:
        resolve_folder("org/model", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match="cannot be reached and the cache lacks it") as caught:
        resolve_folder("bert-base-multilingual-cased", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_offline_without_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache while HF_HUB_OFFLINE forbids") as caught:
        resolve_folder("bert-base-multilingual-cased", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "give its folder" in str(caught.value)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bert-base-multilingual-cased"
    folder.mkdir()
    assert resolve_folder(folder) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("bert-base-multilingual-cased") == Path("bert-base-multilingual-cased")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/bert-base-multilingual-cased") == folder


@pytest.mark.parametrize(
    "name",
    ["", "./model", "../model", "/no/where", "a/b/c", "model/", "~/no/where", "词/汇", "a b", "a..b", "a\0b"],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder .*cannot be a name on the Hugging Face hub"):
        resolve_folder(name)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(CheckpointError, match="model: a file; expected a model folder"):
        resolve_folder(tmp_path / "model")
