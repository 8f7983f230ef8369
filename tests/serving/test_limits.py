"""Each limit of the service lets through what just fits and refuses one more, over a real socket."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_hf_folder
from live_server import PAIR, LiveServer, make_config, make_predictor, serving

from bertpair.errors import ConfigError
from bertpair.serving.listening import read_key
from bertpair.serving.requests import MAX_DEPTH, MAX_URL_BYTES

BODY = json.dumps(PAIR).encode()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    settings = {"max_text_chars": 60, "max_request_rows": 4, "max_header_bytes": 700, "max_batch_tokens": 512}
    with serving(*make_predictor(folder, **settings)) as server:
        yield server


@pytest.fixture(scope="module")
def limits(live: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = live.ask("GET", "/info").json["limits"]
    return found


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_a_body(live: LiveServer, limits: dict[str, Any], more: int, status: int) -> None:
    data = BODY + b" " * (limits["max_body_bytes"] + more - len(BODY))
    assert live.ask("POST", "/v1/predict", raw_body=data).status == status
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    assert live.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk).status == status


def test_a_body_holds_the_most_rows_of_the_longest_texts_escaped(
    live: LiveServer, limits: dict[str, Any]
) -> None:
    text = "\u5b66" * limits["max_text_chars"]
    rows = [{"text_a": text, "text_b": text}] * limits["max_request_rows"]
    data = json.dumps({"pairs": rows, "truncate": True}).encode()
    assert len(data) > 0.8 * limits["max_body_bytes"]
    assert live.ask("POST", "/v1/predict/batch", raw_body=data).status == 200


def test_bodies_share_one_bound_over_all_connections(tmp_path: Path) -> None:
    """Slow ones that have not come whole, too; what was held is given back in each case."""
    predictor, config = make_predictor(
        write_hf_folder(tmp_path / "hf-tiny"), max_batch_tokens=512, max_inflight_bytes=50_000
    )
    with serving(predictor, config) as live:
        assert live.ask("GET", "/info").json["limits"]["max_body_bytes"] <= 50_000
        head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow = [live.line() for _ in range(2)]
        for line in slow:
            line.send(head + b"Content-Length: 24500\r\n\r\n" + BODY + b" " * (24_499 - len(BODY)))
        live.wait_for(lambda: live.service.inflight_bytes == 2 * 24_499)
        assert live.metric("bertpair_inflight_body_bytes") == 2 * 24_499
        assert live.predict().status == 200  # a small one still fits
        refused = live.ask("POST", "/v1/predict", raw_body=BODY + b" " * 2000)
        assert refused.status == 503 and refused.headers["retry-after"] == "1" and refused.error["type"]
        assert live.ask("GET", "/livez").status == 200
        slow[0].close()
        live.wait_for(lambda: live.service.inflight_bytes == 24_499)
        assert live.ask("POST", "/v1/predict", raw_body=BODY + b" " * 2000).status == 200
        slow[1].send(b" ")
        assert slow[1].read().status == 200
        assert live.ask("POST", "/v1/predict", raw_body=b"{" * 100).status == 400
        live.wait_for(lambda: live.service.inflight_bytes == 0)


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 422)])
def test_texts_rows_and_levels(live: LiveServer, limits: dict[str, Any], more: int, status: int) -> None:
    for field in PAIR:
        text = ("the " * 60)[: limits["max_text_chars"] + more]
        assert live.predict({**PAIR, field: text}).status == status
    rows = [PAIR] * (limits["max_request_rows"] + more)
    assert live.ask("POST", "/v1/predict/batch", {"pairs": rows}).status == status
    levels = MAX_DEPTH + more - 1
    nested = json.dumps({"sentence1": "a", "sentence2": "b"})[:-1].encode()
    nested += b', "more": ' + b"[" * levels + b"]" * levels + b"}"
    answer = live.ask("POST", "/v1/model_prediction/", raw_body=nested)
    assert answer.status == (400 if more else 200)


@pytest.mark.parametrize(("more", "statuses"), [(0, (200, 200)), (1, (431, 414))])
def test_headers_and_urls(
    live: LiveServer, limits: dict[str, Any], more: int, statuses: tuple[int, int]
) -> None:
    rest = len("host" + "localhost") + 4 + len("x-filler") + 4
    filler = b"a" * (limits["max_header_bytes"] + more - rest)
    headers = live.raw(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Filler: %s\r\n\r\n" % filler)
    query = b"a" * (MAX_URL_BYTES + more - len("/livez?"))
    url = live.raw(b"GET /livez?%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % query)
    assert (headers.status, url.status) == statuses


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:1"]
)
def test_local_names_are_answered_on_a_loopback_address(live: LiveServer, name: str) -> None:
    assert live.ask("GET", "/info", headers={"host": name}).status == 200
    assert live.ask("GET", "/info", headers={"host": f"{name.partition(':')[0]}.example"}).status == 400


def test_a_key_and_a_queue(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("8 bytes?\n".replace(" ", "-"))
    assert read_key(str(tmp_path / "key")) == b"8-bytes?"
    (tmp_path / "key").write_text("7-bytes\n")
    with pytest.raises(ConfigError, match="8 or more"):
        read_key(str(tmp_path / "key"))
    assert make_config({"max_request_rows": 256, "max_queue_rows": 256}).max_request_rows == 256
    with pytest.raises(ConfigError, match="could never be admitted"):
        make_config({"max_request_rows": 257, "max_queue_rows": 256})
