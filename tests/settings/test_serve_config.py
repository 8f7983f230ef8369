"""serve.py's settings: types, ranges, contradictions, and where they come from."""

from pathlib import Path

import pytest
from live_server import make_config

from bertpair.errors import ConfigError
from bertpair.settings.serve import (
    GROUPS,
    RequestLimits,
    ServeConfig,
    parse_serve_command_line,
    settle_limits,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_defaults_are_sound_and_those_promised() -> None:
    config = make_config({})
    promised = {
        "max_body_bytes": None,
        "max_text_chars": None,
        "max_inflight_bytes": 64 * 2**20,
        "max_header_bytes": 16384,
        "max_request_rows": None,
        "max_queue_rows": 256,
        "max_batch_tokens": None,
        "queue_deadline": 5,
        "receive_timeout": 10,
        "keep_alive": 65,
        "max_connections": 1000,
        "drain_seconds": 5,
        "grace_seconds": 20,
        "stall_seconds": 30,
        "host": "127.0.0.1",
        "port": 8000,
    }
    assert {name: getattr(config, name) for name in promised} == promised
    assert [name for group in GROUPS.values() for name in group.model_fields] == list(
        ServeConfig.model_fields
    )


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"max_request_rows": 300}, "max_request_rows 300 is above max_queue_rows 256"),
        (
            {"max_text_chars": 70_000, "max_body_bytes": 65_536},
            "max_text_chars 70000 can need a body of 420128",
        ),
        (
            {"max_text_chars": 5000, "max_request_rows": 200, "max_body_bytes": 2**20},
            "max_request_rows 200 and max_text_chars 5000 can need a body of 6012864 bytes (6 for each "
            "character), above max_body_bytes 1048576: raise max_body_bytes, or lower max_request_rows or "
            "max_text_chars",
        ),
        (
            {"max_text_chars": 2**24, "max_body_bytes": 2**20},
            "above max_body_bytes 1048576: lower max_text_chars",
        ),
        (
            {"max_text_chars": 2**20, "max_inflight_bytes": 2**20},
            "above max_inflight_bytes 1048576: raise max_inflight_bytes, or lower max_text_chars",
        ),
        ({"max_request_rows": 250, "max_body_bytes": 4096}, "max_request_rows 250 can need a body of"),
        ({"max_text_chars": 2**30}, "above a body of at most 67108864 bytes: lower max_text_chars"),
        ({"max_body_bytes": 70_000, "max_inflight_bytes": 65_536}, "such a body could never be held"),
        ({"grace_seconds": 4}, "grace_seconds 4 is not above queue_deadline 5"),
        ({"uds": "/tmp/x", "host": "0.0.0.0"}, "give only one of them"),
        ({"quantize": "int8", "engine": "torch"}, "int8 needs engine openvino, found engine torch"),
        ({"calibration_file": "train.tsv"}, "no effect without quantize int8"),
        ({"quantize": "int8", "device": "cuda"}, "CPU only"),
        ({"port": 70_000}, "from 0 to 65535, found 70000"),
        ({"max_batch_tokens": "some"}, "auto, or a whole number from 1 to 1000000"),
        ({"max_batch_tokens": 2**31 - 1}, "auto, or a whole number from 1 to 1000000"),
        ({"root_path": "pairs/"}, "a path such as /pairs"),
        ({"cors_origin": "example.com"}, "origins such as https://example.com"),
        ({"allowed_hosts": []}, "host names without a port"),
        ({"forwarded_allow_ips": "10.0.0.1/8"}, "IP addresses or networks with commas between them, or *"),
        ({"forwarded_allow_ips": "proxy.example"}, "found 'proxy.example'"),
        ({"forwarded_allow_ips": " "}, "found ' '"),
        ({"forwarded_allow_ips": "*, 10.0.0.1"}, "found '*, 10.0.0.1'"),
        ({"queue_deadline": "soon"}, "a number of at least 0.01 and at most 86400"),
        ({"receive_timeout": 1e-320}, "a number of at least 0.01"),
        ({"quantise": "int8"}, "unknown setting quantise; did you mean quantize"),
    ],
)
def test_faults_say_what_was_found_and_what_is_allowed(values: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config(values)
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (32 * 12_064 + 64, 1000, 32)),
        ({"max_text_chars": 10}, (32 * 184 + 64, 10, 32)),
        ({"max_request_rows": 200}, (200 * 12_064 + 64, 1000, 200)),
        ({"max_request_rows": 20_000, "max_queue_rows": 20_000}, (20_000 * 3352 + 64, 274, 20_000)),
        ({"max_body_bytes": 65_536}, (65_536, 1000, 5)),
        ({"max_body_bytes": 2048}, (2048, 160, 1)),
        ({"max_body_bytes": 65_536, "max_request_rows": 32}, (65_536, 165, 32)),
        ({"max_body_bytes": 65_536, "max_text_chars": 2000}, (65_536, 2000, 2)),
        ({"max_queue_rows": 4}, (4 * 12_064 + 64, 1000, 4)),
        ({"max_inflight_bytes": 65_536}, (5 * 12_064 + 64, 1000, 5)),
    ],
)
def test_limits_that_are_not_given_follow_from_those_that_are(
    given: dict[str, object], limits: tuple[int, int, int]
) -> None:
    """For pairs cut at 40 tokens; 64 bytes a row for its names."""
    assert settle_limits(make_config(given), cut=40, num_texts=2) == RequestLimits(*limits)


def test_flags_go_over_a_file_and_all_faults_come_at_once(folder: Path) -> None:
    (folder / "my.yaml").write_text("output_dir: trained\nport: 9000\nmax_queue_rows: 64\nlearning_rate: 1\n")
    config, notes = parse_serve_command_line("--config my.yaml --port 9001 --max_batch_tokens auto".split())
    assert (config.model_dir, config.port, config.max_queue_rows) == ("trained", 9001, 64)
    assert config.max_batch_tokens is None and notes[0] == "settings read from my.yaml"
    (folder / "bad.yaml").write_text("port: x\nqueue_dedline: 3\n")
    with pytest.raises(ConfigError) as raised:
        parse_serve_command_line("--config bad.yaml --host /etc --drain_seconds -1 --nonsense".split())
    for part in (
        "bad.yaml:1: port",
        "did you mean queue_deadline",
        "--host",
        "--drain_seconds",
        "--nonsense",
    ):
        assert part in str(raised.value)


def test_the_model_folder_is_named_or_the_samples(folder: Path) -> None:
    with pytest.raises(ConfigError, match="model_dir must be set"):
        parse_serve_command_line([])
    (folder / "config.yaml").write_text("output_dir: output\nlearning_rate: 1e-4\n")
    assert parse_serve_command_line([])[0].model_dir == "output"
    assert parse_serve_command_line(["--model_dir", "other"])[0].model_dir == "other"
