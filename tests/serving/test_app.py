"""The routes against a real socket: the contract, every bad input, the order in which checks come."""

import ast
import json
import logging
import re
import sys
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_hf_folder
from live_server import PAIR, LiveServer, SteeredPredictor, make_predictor, serving

from bertpair import PairClassifier
from bertpair.data.columns import Columns
from bertpair.data.records import is_blank
from bertpair.data.tsv import read_pairs
from bertpair.errors import DataError
from bertpair.serving.requests import MAX_URL_BYTES
from bertpair.settings.serve import ServeConfig

OLD = {"sentence1": "the cat", "sentence2": "中文数据库"}
BATCH = {"pairs": [{"text_a": "good", "text_b": "bad"}, {"text_a": "中文", "text_b": "café " * 80}, PAIR]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[SteeredPredictor, ServeConfig]:
    return make_predictor(folder, max_batch_tokens=512, max_text_chars=500, max_request_rows=8)


@pytest.fixture(scope="module")
def live(loaded: tuple[SteeredPredictor, ServeConfig]) -> Iterator[LiveServer]:
    with serving(*loaded) as server:
        yield server


@pytest.fixture(scope="module")
def offline(folder: Path) -> PairClassifier:
    return PairClassifier.from_pretrained(folder, optimize=False)


# What good requests get


def test_the_old_contract(live: LiveServer, offline: PairClassifier) -> None:
    (expected,) = offline.predict([(OLD["sentence1"], OLD["sentence2"])])
    for path in ("/v1/model_prediction/", "/v1/model_prediction"):
        answer = live.ask("POST", path, {**OLD, "more": 1})
        assert answer.status == 200 and answer.headers["content-type"] == "application/json"
        label, score = answer.json
        assert [label, score] == ast.literal_eval(answer.body.decode())
        assert label == expected.label and score == pytest.approx(expected.score, abs=1e-5)
        assert answer.body.startswith(f'["{label}", '.encode())


def test_one_pair(live: LiveServer, offline: PairClassifier) -> None:
    (expected,) = offline.predict([("the cat", "sat")])
    for path in ("/v1/predict", "/v1/predict/"):
        answer = live.predict(path=path)
        found = answer.json
        assert list(found) == ["label", "score", "probabilities", "truncated", "num_tokens", "model_version"]
        assert found["label"] == expected.label and found["num_tokens"] == 6 and found["truncated"] is False
        assert list(found["probabilities"]) == ["negative", "neutral", "positive"]
        for label, p in expected.probabilities.items():
            assert found["probabilities"][label] == pytest.approx(p, abs=1e-5)
        assert found["model_version"] == live.service.predictor.version and len(found["model_version"]) == 12
        assert float(answer.headers["x-queue-ms"]) >= 0 and float(answer.headers["x-inference-ms"]) > 0


def test_a_batch_in_order(live: LiveServer, offline: PairClassifier) -> None:
    expected = offline.predict([(p["text_a"], p["text_b"]) for p in BATCH["pairs"]])
    found = live.ask("POST", "/v1/predict/batch", BATCH).json["predictions"]
    assert [p["label"] for p in found] == [p.label for p in expected]
    assert [p["truncated"] for p in found] == [False, True, False]
    assert found[1]["num_tokens"] == 64
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs.score, abs=1e-5)


def test_truncate_false_refuses_what_would_be_cut(live: LiveServer) -> None:
    assert live.predict({**PAIR, "truncate": False}).status == 200
    answer = live.predict({"text_a": "the cat " * 40, "text_b": "sat", "truncate": False})
    assert answer.status == 422 and "64 tokens" in answer.error["message"]
    answer = live.ask("POST", "/v1/predict/batch", {**BATCH, "truncate": False})
    assert answer.status == 422 and answer.error["field"] == "pairs[1]"


def test_health_info_metrics_page(live: LiveServer) -> None:
    for path in ("/livez", "/readyz", "/info", "/metrics", "/openapi.json", "/livez/", "/info/", "/"):
        assert live.ask("GET", path).status == 200
        head = live.ask("HEAD", path)
        assert head.status == 200 and head.body == b""
    info = live.ask("GET", "/info").json
    assert info["labels"] == ["negative", "neutral", "positive"] and info["takes_pairs"] is True
    assert info["precision"] == "float32" and info["max_seq_length"] == 64 and info["model"] == "hf-tiny"
    assert info["limits"]["max_text_chars"] == 500 and info["limits"]["max_batch_tokens"] == 512
    live.ask("GET", "/of-nobody/secret")
    text = live.ask("GET", "/metrics").body.decode()
    assert 'bertpair_requests_total{route="unmatched",status="404"}' in text and "secret" not in text
    for name in ("queue_rows", "queue_seconds", "batch_rows", "batch_tokens", "inference_seconds"):
        assert f"bertpair_{name}" in text


def test_the_page_keeps_its_policy(live: LiveServer) -> None:
    answer = live.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert b"http://" not in answer.body and b"https://" not in answer.body and b" style=" not in answer.body
    assert b" onclick" not in answer.body and b"__" not in answer.body.replace(b"__proto__", b"")


# Bad inputs. The second column is the status; the third a word of the message or the field.

TOO_DEEP = b'{"text_a": ' + b"[" * 40 + b"]" * 40 + b', "text_b": "b"}'
SYNTAX = {
    "empty": b"",
    "not JSON": b"text_a=1",
    "trailing junk": b'{"text_a": "a", "text_b": "b"} x',
    "raw control character": b'{"text_a": "a\x01", "text_b": "b"}',
    "bad UTF-8": b'{"text_a": "\xff", "text_b": "b"}',
    "UTF-16": json.dumps(PAIR).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(PAIR).encode(),
    "NaN": b'{"text_a": NaN, "text_b": "b"}',
    "Infinity": b'{"text_a": -Infinity, "text_b": "b"}',
    "1e999": b'{"text_a": 1e999, "text_b": "b"}',
    "duplicate keys": b'{"text_a": "a", "text_a": "b", "text_b": "b"}',
    "40 levels": TOO_DEEP,
    "5,000 digits": b'{"text_a": ' + b"1" * 5000 + b', "text_b": "b"}',
    "open string": b'{"text_a": "a',
    "30,000 brackets": b"[" * 30_000,
}
MEANING: dict[str, tuple[object, str | None]] = {
    "array": ([1], None),
    "null": (None, None),
    "string": ("the cat", None),
    "missing": ({"text_a": "a"}, "text_b"),
    "unknown": ({**PAIR, "labels": 1}, None),
    "boolean": ({**PAIR, "text_a": True}, "text_a"),
    "number": ({**PAIR, "text_b": 5}, "text_b"),
    "null text": ({**PAIR, "text_b": None}, "text_b"),
    "list": ({**PAIR, "text_b": ["a"]}, "text_b"),
    "empty text": ({**PAIR, "text_a": ""}, "text_a"),
    "blank text": ({**PAIR, "text_a": " \n\u3000\u00a0"}, "text_a"),
    "lone surrogate": ({**PAIR, "text_b": "a\ud800"}, "text_b"),
    "NUL": ({**PAIR, "text_b": "a\0b"}, "text_b"),
    "too many characters": ({**PAIR, "text_a": "a" * 501}, "text_a"),
    "too many characters, to be cut": ({**PAIR, "text_a": "a" * 501, "truncate": True}, "text_a"),
    "truncate as text": ({**PAIR, "truncate": "yes"}, "truncate"),
    "missing, and a wrong value": ({"text_a": 5, "truncate": 5, "labels": 1}, "text_b"),
    "unknown, and a wrong value": ({**PAIR, "text_a": 5, "labels": 1}, None),
    "two wrong values": ({**PAIR, "truncate": 5, "text_b": 5}, "text_b"),
}
MEANING_OF_BATCHES: dict[str, tuple[object, str | None]] = {
    "no rows": ({"pairs": []}, "pairs"),
    "too many rows": ({"pairs": [PAIR] * 9}, "pairs"),
    "rows as lists": ({"pairs": [["a", "b"]]}, "pairs[0]"),
    "an object": ({"pairs": {}}, "pairs"),
    "a bad row": ({"pairs": [PAIR, {**PAIR, "text_b": 1}]}, "pairs[1].text_b"),
    "too many rows, each wrong": ({"pairs": [[]] * 9}, "pairs"),
    "a bad row, and truncate": (
        {"truncate": 5, "pairs": [PAIR, {**PAIR, "text_b": 1}, 5]},
        "pairs[1].text_b",
    ),
    "an unknown field in a row": ({"pairs": [{**PAIR, "truncate": True}]}, "pairs[0]"),
}


@pytest.mark.parametrize("name", SYNTAX)
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/model_prediction/", "/v1/predict/batch"])
def test_bad_syntax_is_400(live: LiveServer, path: str, name: str) -> None:
    answer = live.ask("POST", path, raw_body=SYNTAX[name])
    assert answer.status == 400 and answer.error["type"] == "invalid_json"


@pytest.mark.parametrize("name", MEANING)
def test_bad_meaning_is_422_and_is_not_repeated(live: LiveServer, name: str) -> None:
    body, field = MEANING[name]
    answer = live.ask("POST", "/v1/predict", raw_body=json.dumps(body).encode())
    assert answer.status == 422 and answer.error["field"] == field
    assert "the cat" not in answer.error["message"] and "labels" not in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "expected an object, found an array"),
        ({"text_a": "a"}, "text_b is required"),
        ({**PAIR, "text_b": 5}, "text_b: expected a string, found a number"),
        ({**PAIR, "text_a": None}, "text_a: expected a string, found null"),
        ({**PAIR, "text_a": "a" * 501}, "text_a: found 501 characters; at most 500 are allowed"),
        ({**PAIR, "truncate": "yes"}, "truncate: expected true or false, found a string"),
    ],
)
def test_messages_say_where_what_was_found_and_what_is_allowed(
    live: LiveServer, body: object, message: str
) -> None:
    assert live.predict(body).error["message"] == message


@pytest.mark.parametrize("name", MEANING_OF_BATCHES)
def test_bad_batches_are_422(live: LiveServer, name: str) -> None:
    body, field = MEANING_OF_BATCHES[name]
    answer = live.ask("POST", "/v1/predict/batch", body)
    assert answer.status == 422 and answer.error["field"] == field


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "-"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": 'Application/JSON;charset="utf-8"'}, 200),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "br, identity"}, 415),
        ({"content-encoding": "identity"}, 200),
        ({"content-encoding": "Identity, identity"}, 200),
        ({"content-type": "application/json;charset=utf8"}, 200),
        ({"content-type": 'application/json; profile="a;charset=latin-1"; q=1 ; charset="UTF8";'}, 200),
        ({"content-type": "application/json; v=1; charset=iso-8859-1"}, 415),
        ({"content-type": "application/json; charset"}, 415),
        ({"content-type": "application/json, application/json"}, 415),
        ({"content-type": "application/jsonp"}, 415),
        ({"accept": "text/html"}, 200),
        ({"expect": "200-ok"}, 417),
        ({"upgrade": "h2c", "connection": "Upgrade, HTTP2-Settings", "http2-settings": "AAMAAABk"}, 200),
        ({"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-version": "13"}, 200),
        ({"x-filler": "a" * 17_000}, 431),
        ({"host": "evil.example"}, 400),
        ({"host": "localhost:1"}, 200),
    ],
)
def test_headers(live: LiveServer, headers: dict[str, str], status: int) -> None:
    answer = live.ask("POST", "/v1/predict", PAIR, headers)
    assert answer.status == status, answer.body
    if status != 200:
        assert answer.error["type"]
    if status == 415 and "content-encoding" in headers:
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "kind", ["-", "", "text/plain; charset=ISO-8859-1", "application/x-www-form-urlencoded", "text/json"]
)
def test_the_old_route_takes_json_under_any_type_save_from_a_browser(live: LiveServer, kind: str) -> None:
    path, headers = "/v1/model_prediction/", {"content-type": kind}
    assert live.ask("POST", path, OLD, headers).status == 200
    assert live.ask("POST", path.rstrip("/"), OLD, headers).status == 200
    assert live.ask("POST", path, raw_body=b"sentence1=a", headers=headers).status == 400
    for origin in ("https://evil.example", "null", ""):
        assert live.ask("POST", path, OLD, {**headers, "origin": origin}).status == 415
    assert live.ask("POST", path, OLD, {**headers, "content-encoding": "gzip"}).status == 415
    assert live.predict(OLD, path).status == 200
    assert live.ask("POST", path, OLD, {"origin": "https://evil.example"}).status == 200
    for other in ("/v1/predict", "/v1/predict/batch"):
        assert live.ask("POST", other, PAIR, headers).status == 415


@pytest.mark.parametrize(
    "blank",
    ["\u200b\u200d", "\x1b\x7f\x9f", "\u2028\u2029\x85", "\u2800", "\u3164\uffa0\u115f", "\ufe0f",
     "\U000e0100 ", "\u00ad\u2060\ufeff", "\u202e\u2066", "\U000e0041", "\u180e\u034f", "\x1c\x1f"],
)  # fmt: skip
def test_a_text_that_nobody_can_see_is_blank_here_and_in_a_file(
    live: LiveServer, tmp_path: Path, blank: str
) -> None:
    answer = live.predict({**PAIR, "text_b": blank})
    assert answer.status == 422 and answer.error["field"] == "text_b" and "blank" in answer.error["message"]
    assert live.predict({**PAIR, "text_b": blank + "a"}).status == 200
    schemas = live.ask("GET", "/openapi.json").json["components"]["schemas"]
    pattern = schemas["Question"]["properties"]["text_b"]["pattern"]
    assert not re.search(pattern, blank) and re.search(pattern, blank + "a")
    file = tmp_path / "train.tsv"
    file.write_bytes(f"the cat\t{blank}\n".encode())
    with pytest.raises(DataError, match="is empty; a text is expected"):
        read_pairs([str(file)], Columns(text_a=0, text_b=1, label=None, has_header=False))


def test_the_invisible_characters_are_those_of_unicode() -> None:
    """By Python's tables, for what they know; fillers and selectors by hand."""
    chosen = {*"\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00\ufe0f\u180b\u180d\U000e0100\U000e01ef"}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        category = unicodedata.category(char)
        if category in ("Cc", "Cf", "Zs", "Zl", "Zp") or char in chosen:
            assert is_blank(char), hex(code)
        elif category not in ("Cn", "Mn"):
            assert not is_blank(char), hex(code)


def test_the_document_names_the_prefix_of_a_proxy(folder: Path) -> None:
    predictor, config = make_predictor(folder, max_batch_tokens=512, root_path="/pairs/v2")
    with serving(predictor, config) as live:
        assert live.ask("GET", "/openapi.json").json["servers"] == [{"url": "/pairs/v2"}]


def test_methods_and_paths(live: LiveServer) -> None:
    for path in ("/v1/predict", "/v1/predict/batch", "/v1/model_prediction/"):
        answer = live.ask("GET", path)
        assert answer.status == 405 and "POST" in answer.headers["allow"] and answer.error["type"]
    assert live.ask("POST", "/livez", {}).headers["allow"].count("GET") == 1
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "QUERY"):
        assert live.ask(method, "/v1/predict").status == 405
    assert live.metric("bertpair_requests_total", route="/v1/predict", status="405") >= 5
    answer = live.ask("OPTIONS", "/v1/predict")
    assert (answer.status, answer.headers["allow"]) == (204, "OPTIONS, POST")
    for path in ("/nope", "//livez", "/v1//predict", "/../livez", "/%2e%2e/livez", "/v1/predict//", "/LIVEZ"):
        assert live.ask("GET", path).error["type"] == "not_found"
    assert live.ask("GET", "/%6civez").status == 200


def test_bodies_that_are_too_large(live: LiveServer) -> None:
    limit = live.service.predictor.limits.max_body_bytes
    big = json.dumps({"text_a": "a" * limit, "text_b": "b"}).encode()
    answer = live.ask("POST", "/v1/predict", raw_body=big)
    assert answer.status == 413 and answer.headers["connection"] == "close" and answer.error["type"]
    line = live.line()
    line.send(
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    for _ in range(limit // 8192 + 2):
        line.send(b"2000\r\n" + b" " * 8192 + b"\r\n")
    assert line.read().status == 413
    line = live.line()
    line.send(
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
    )
    assert line.read().status == 413  # and no 100 before it


def test_expect_continue_and_chunks(live: LiveServer) -> None:
    body = json.dumps(PAIR).encode()
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    line = live.line()
    line.send(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert line.socket.recv(25).startswith(b"HTTP/1.1 100")
    line.send(body)
    assert line.read().status == 200
    line.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
    for i in range(0, len(body), 7):
        line.send(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]))
    line.send(b"0\r\n\r\n")
    assert line.read().status == 200
    line.send(head + b"\r\n")  # neither a length nor chunks: an empty body
    assert line.read().status == 400


def test_the_order_of_checks(folder: Path) -> None:
    """A request with every fault at once, mended one by one."""
    predictor, config = make_predictor(folder, max_request_rows=1, max_queue_rows=1)
    too_long = "x" * (MAX_URL_BYTES + 1)
    with serving(predictor, config, b"the-right-key", is_warm=False) as live:
        headers = {
            "x-filler": "a" * 17_000,
            "expect": "odd",
            "content-length": "99999999",
            "content-type": "-",
        }
        target = "/nope?" + too_long
        seen = []

        def ask(method: str = "POST", raw_body: bytes = b"{") -> None:
            seen.append(live.ask(method, target, headers=headers, raw_body=raw_body).status)

        ask("GET")
        target = "/v1/predict?" + too_long
        ask("GET")
        ask()
        headers["authorization"] = "Bearer the-right-key"
        ask()
        del headers["x-filler"]
        ask()
        target = "/v1/predict"
        ask()
        del headers["expect"]
        ask()
        del headers["content-type"]
        ask()
        del headers["content-length"]
        ask()
        live.service.is_warm = True
        ask()
        ask(raw_body=b"[]")
    assert seen == [404, 405, 401, 431, 414, 417, 415, 413, 503, 400, 422]


def test_request_ids(live: LiveServer) -> None:
    answer = live.ask("GET", "/livez", headers={"x-request-id": "a.B_9-"})
    assert answer.headers["x-request-id"] == "a.B_9-"
    for bad in ("", "a b", "a" * 65, "é", "a;b"):
        made = live.ask("GET", "/nope", headers={"x-request-id": bad})
        assert made.headers["x-request-id"] != bad and len(made.error["request_id"]) == 16


def test_the_key(loaded: tuple[SteeredPredictor, ServeConfig]) -> None:
    with serving(*loaded, b"the-right-key") as live:
        for path in ("/livez", "/readyz", "/"):
            assert live.ask("GET", path).status == 200
        bad = [{}] + [
            {"authorization": value}
            for value in (
                "Bearer",
                "Bearer wrong",
                "Basic the-right-key",
                "the-right-key",
                "Bearer the-right-key2",
            )
        ]
        for headers in bad:
            for path in ("/info", "/metrics", "/openapi.json"):
                answer = live.ask("GET", path, headers=headers)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert live.ask("POST", "/v1/predict", PAIR, headers).error["type"] == "unauthorized"
        good = {"authorization": "bearer the-right-key"}
        assert live.ask("POST", "/v1/predict", PAIR, good).status == 200
        assert live.ask("OPTIONS", "/v1/predict").status == 204


def test_cors_root_path_and_hosts(loaded: tuple[SteeredPredictor, ServeConfig]) -> None:
    predictor, config = loaded
    names = dict(cors_origin=["https://a.example"], root_path="/pairs", allowed_hosts=["pairs.example"])
    config = config.model_copy(update=names)
    with serving(predictor, config) as live:
        host = {"host": "Pairs.example:8443"}
        asked = {**host, "origin": "https://a.example", "access-control-request-method": "POST"}
        answer = live.ask("OPTIONS", "/v1/predict", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        answer = live.ask("POST", "/v1/predict", PAIR, {**host, "origin": "https://a.example"})
        assert answer.status == 200 and answer.headers["vary"] == "Origin"
        other = live.ask("GET", "/livez", headers={**host, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        assert b'data-root="/pairs"' in live.ask("GET", "/", headers=host).body
        refused = live.ask("GET", "/info").error
        assert refused["type"] == "unknown_host" and "allowed_hosts" in refused["message"]
        for probe in ("/livez", "/readyz/", "/metrics"):  # whoever probes uses the machine's address
            assert live.ask("GET", probe, headers={"host": "10.0.0.7:8000"}).status == 200


def test_single_texts_and_regression(folder: Path, tmp_path: Path) -> None:
    values = tmp_path / "values"
    values.mkdir()
    for path in folder.iterdir():
        (values / path.name).write_bytes(path.read_bytes())
    (values / "training_args.yaml").write_text(
        "text_b_column: null\nproblem_type: regression\nmax_seq_length: 8\n"
    )
    raw = json.loads((values / "config.json").read_text())
    raw |= {"num_labels": 1, "problem_type": "regression", "id2label": {"0": "v"}, "label2id": {"v": 0}}
    (values / "config.json").write_text(json.dumps(raw))
    shrink_head(values)
    predictor, config = make_predictor(values)
    with serving(predictor, config) as live:
        answer = live.predict({"text_a": "the cat sat on the mat, the cat sat"})
        assert set(answer.json) == {"value", "truncated", "num_tokens", "model_version"}
        assert answer.json["num_tokens"] == 8 and answer.json["truncated"] is True
        assert live.predict(PAIR).status == 422
        assert live.ask("POST", "/v1/model_prediction/", {"sentence1": "a"}).status == 404
        assert "/v1/model_prediction/" not in live.ask("GET", "/openapi.json").json["paths"]
        assert live.ask("GET", "/info").json["problem_type"] == "regression"


def shrink_head(folder: Path) -> None:
    """Keep one output of the classifier."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_the_log_is_one_plain_line_each(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "bertpair.access"]

    with caplog.at_level(logging.INFO, "bertpair.access"):
        live.ask("GET", "/%0aevil%1b[31m", headers={"x-request-id": "of-this-test"})
        live.ask("GET", "/" + "a" * 5000)
        live.predict({"text_a": "a text nobody may log", "text_b": "b\n\x1b[31m"})
        live.wait_for(lambda: len(lines()) >= 3)  # a line is written once its answer is out
    assert len(lines()) == 3
    for line in lines():
        assert line.isascii() and line.isprintable() and len(line) < 1000 and "nobody" not in line
        assert {"time", "request_id", "client", "method", "path", "status", "ms"} <= set(json.loads(line))
    assert json.loads(lines()[0])["request_id"] == "of-this-test" and json.loads(lines()[2])["rows"] == 1


def test_many_clients_get_their_own_answers(live: LiveServer, offline: PairClassifier) -> None:
    """Fault 14: 140 texts from 20 clients, each held against the offline answer for its own text."""
    words = "the cat sat mat good bad food service café 中文 数据库 hello".split()
    pairs = [
        (f"{words[i % 12]} {words[i // 12 % 12]} {i}", " ".join(words[: 1 + i % 12])) for i in range(140)
    ]
    expected = offline.predict(pairs)
    found: dict[int, dict[str, object]] = {}

    def client(numbers: range) -> None:
        for i in numbers:
            answer = live.ask(
                "POST",
                "/v1/predict",
                {"text_a": pairs[i][0], "text_b": pairs[i][1]},
                {"x-request-id": f"row-{i}"},
            )
            assert answer.headers["x-request-id"] == f"row-{i}"
            found[i] = answer.json

    threads = [threading.Thread(target=client, args=(range(start, 140, 20),)) for start in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 140
    for i, exact in enumerate(expected):
        probabilities = found[i]["probabilities"]
        assert isinstance(probabilities, dict)
        assert max(abs(probabilities[label] - p) for label, p in exact.probabilities.items()) < 1e-5
