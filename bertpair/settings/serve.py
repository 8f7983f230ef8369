"""Every setting of serve.py, in one flat dataclass: the field names are the YAML keys and the flags."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

from bertpair.errors import ConfigError
from bertpair.settings.command_line import file_layer, flag_layer, sample_output_dir
from bertpair.settings.config import SETTINGS, Setting, raise_faults, setting
from bertpair.settings.values import (
    DEVICE,
    LABELS,
    PATH,
    Kind,
    choice,
    clean_text,
    matching,
    number,
    or_null,
    several,
    whole,
)

_MEGABYTE = 2**20
MOST_BODY_BYTES = 64 * _MEGABYTE
CHARS_PER_TOKEN = 25  # of the cut: no more could matter to the model
_ROWS = 32
_BYTES_PER_CHAR = 6  # \u and four digits, as JSON may write any of them
_BYTES_AROUND = 64  # a row's names and punctuation, or those around all rows


def _accept_auto(value: object) -> object:
    return None if value in ("auto", None) else _BATCH_TOKENS.accept(value)


def _accept_proxies(value: object) -> object:
    text = clean_text(value).strip()
    for item in text.split(",") if text != "*" else ():
        try:
            ipaddress.ip_network(item.strip())
        except ValueError:
            raise ValueError from None  # its words say less than ours
    return text


_BATCH_TOKENS = whole(1, 1_000_000)
_AUTO = Kind(f"auto, or {_BATCH_TOKENS.expected}", _accept_auto, _BATCH_TOKENS.read)
_HOST = matching("a host name or an IP address", r"[A-Za-z0-9.:*-]{1,253}(%[A-Za-z0-9]+)?")
_HOST_NAME = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]|\*"
_HOSTS = several("host names without a port, or *", matching("a host name", _HOST_NAME).accept)
_ORIGIN = matching("an origin", r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|\*")
_ORIGINS = several("origins such as https://example.com, or *", _ORIGIN.accept)
_ROOT = or_null(matching("a path such as /pairs, without a slash at its end", r"(/[A-Za-z0-9._~-]+)+"))
_SECONDS = number(low=0.01, high=86_400)  # less would be a mistake of the unit
_PROXIES = or_null(Kind("IP addresses or networks with commas between them, or *", _accept_proxies))
_MODE = or_null(matching('octal digits in quotes, such as "660"', r"0?[0-7]{3}"))

_model = partial(setting, group="model")
_listen = partial(setting, group="listening")
_limit = partial(setting, group="limits")
_time = partial(setting, group="time")
_access = partial(setting, group="access")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of a server; `parse_serve_command_line` gives checked ones."""

    model_dir: str | None = _model(None, PATH, "trained folder; null: the configured output_dir")
    max_seq_length: int | None = _model(
        None, or_null(whole(3, 65_535)), "cut texts here; null: where training cut them"
    )
    labels: list[str] | None = _model(None, LABELS, "names, in id order, for a model folder without names")
    device: str = _model("auto", DEVICE, "where to compute")
    amp: str = _model(
        "off", choice("auto", "off", "bf16", "fp16"), "precision; off: float32; auto: by the processor"
    )
    num_threads: int | None = _model(None, or_null(whole(1, 1024)), "null: as many as cores")
    quantize: str | None = _model(None, or_null(choice("int8")), "linear layers in dynamic int8 (CPU)")
    quantize_check: str | None = _model(
        None, PATH, "TSV whose first 256 rows are compared with float32 before the server is ready"
    )

    host: str = _listen("127.0.0.1", _HOST, "address to listen on")
    port: int = _listen(8000, whole(0, 65_535), "0: any free one")
    uds: str | None = _listen(None, PATH, "listen on this Unix socket instead")
    uds_mode: str | None = _listen(None, _MODE, "who may connect to it, as for chmod; null: 660")
    root_path: str | None = _listen(None, _ROOT, "prefix under which a proxy shows this server")
    forwarded_allow_ips: str | None = _listen(
        None, _PROXIES, "comma-separated proxies whose X-Forwarded-* are believed, or *"
    )

    max_body_bytes: int | None = _limit(
        None, or_null(whole(256, MOST_BODY_BYTES)), "of a request's body: 413 above; null: follows"
    )
    max_inflight_bytes: int = _limit(
        64 * _MEGABYTE, whole(256, 2**40), "of all bodies held at a time: 503 above"
    )
    max_header_bytes: int = _limit(16_384, whole(512, _MEGABYTE), "of a request's headers: 431 above")
    max_text_chars: int | None = _limit(
        None, or_null(whole(1)), "of one text: 422 above; null: follows, at most 25 times the cut"
    )
    max_request_rows: int | None = _limit(
        None, or_null(whole(1, 100_000)), "pairs in one request: 422 above; null: follows, at most 32"
    )
    max_queue_rows: int = _limit(256, whole(1, 1_000_000), "rows that may wait: 429 above")
    max_batch_tokens: int | None = _limit(
        None, _AUTO, "padded tokens of one batch; auto: as many as run in 300 ms"
    )
    max_connections: int = _limit(1000, whole(1, 100_000), "open at a time; more are closed at once")

    queue_deadline: float = _time(5.0, _SECONDS, "seconds a request may wait to be run: 503 after")
    receive_timeout: float = _time(10.0, _SECONDS, "seconds for a request to arrive, or an answer to be read")
    keep_alive: float = _time(65.0, _SECONDS, "seconds an idle connection is kept")
    drain_seconds: float = _time(5.0, number(low=0, high=3600), "after SIGTERM: unready, but still answering")
    grace_seconds: float = _time(20.0, _SECONDS, "after that: for accepted work to finish")
    stall_seconds: float = _time(30.0, _SECONDS, "a batch that runs longer: readyz 503; twice that: livez")

    api_key_file: str | None = _access(None, PATH, "file whose first line is the bearer key asked for")
    cors_origin: list[str] | None = _access(None, _ORIGINS, "web pages that may call from a browser")
    allowed_hosts: list[str] | None = _access(
        None, _HOSTS, "Host names answered; null: any, but only local ones on a loopback address"
    )


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold. A body has room for the most rows of the longest texts, all escaped."""

    max_body_bytes: int
    max_text_chars: int
    max_request_rows: int


def settle_limits(config: ServeConfig, cut: int, num_texts: int) -> RequestLimits:
    """The limits that were given, and the others as they follow from these, the cut and the texts of a row.

    Raises ConfigError if those given do not fit together.
    """
    room = config.max_body_bytes or min(MOST_BODY_BYTES, config.max_inflight_bytes)
    rows = config.max_request_rows or 1
    chars = config.max_text_chars
    if chars is None:
        row_bytes = (room - _BYTES_AROUND) // rows
        fitting = (row_bytes - _BYTES_AROUND) // (_BYTES_PER_CHAR * num_texts)
        chars = max(min(CHARS_PER_TOKEN * cut, fitting), 1)
    row_bytes = _BYTES_PER_CHAR * num_texts * chars + _BYTES_AROUND
    if config.max_request_rows is None:
        rows = max(min(_ROWS, config.max_queue_rows, (room - _BYTES_AROUND) // row_bytes), 1)
    needed = rows * row_bytes + _BYTES_AROUND
    if needed > room:
        raise ConfigError(_misfit(config, needed, room))
    return RequestLimits(config.max_body_bytes or max(needed, 256), chars, rows)


def _misfit(config: ServeConfig, needed: int, room: int) -> str:
    given = [name for name in ("max_request_rows", "max_text_chars") if getattr(config, name) is not None]
    parts = " and ".join(f"{name} {getattr(config, name)}" for name in given)
    name = "max_body_bytes" if config.max_body_bytes else "max_inflight_bytes"
    limit = f"{name} {room}" if room < MOST_BODY_BYTES else f"a body of at most {room} bytes"
    advice = f"raise {name}, or lower" if needed <= MOST_BODY_BYTES else "lower"
    return (
        f"{parts} can need a body of {needed} bytes ({_BYTES_PER_CHAR} for each character), "
        f"above {limit}: {advice} {' or '.join(given)}"
    )


_DEFAULTS = ServeConfig()
SERVE_SETTINGS: dict[str, Setting] = {
    item.name: Setting(item.name, default=getattr(_DEFAULTS, item.name), **item.metadata)
    for item in fields(ServeConfig)
}


def _contradictions(config: ServeConfig) -> list[str]:
    """What is sound one by one and cannot stand together."""
    c = config
    rows, body = c.max_request_rows, c.max_body_bytes
    rules: list[tuple[object, str]] = [
        (
            rows is not None and rows > c.max_queue_rows,
            f"max_request_rows {rows} is above max_queue_rows {c.max_queue_rows}: "
            "such a request could never be admitted",
        ),
        (
            body is not None and body > c.max_inflight_bytes,
            f"max_body_bytes {body} is above max_inflight_bytes {c.max_inflight_bytes}: "
            "such a body could never be held",
        ),
        (
            c.grace_seconds <= c.queue_deadline,
            f"grace_seconds {c.grace_seconds:g} is not above queue_deadline {c.queue_deadline:g}: "
            "accepted work could not finish",
        ),
        (
            c.uds is not None and c.host != _DEFAULTS.host,
            f"uds {c.uds} and host {c.host} are both given: one place to listen",
        ),
        (
            c.uds is None and c.uds_mode is not None,
            f"uds_mode {c.uds_mode} is given without uds: it is the mode of that socket",
        ),
        (
            c.quantize is not None and c.amp in ("bf16", "fp16"),
            f"quantize {c.quantize} and amp {c.amp} are both given: int8 goes with float32",
        ),
        (
            c.quantize is not None and c.device not in ("auto", "cpu"),
            f"quantize {c.quantize} runs on the CPU only, found device {c.device}",
        ),
    ]
    faults = [fault for is_broken, fault in rules if is_broken]
    try:
        settle_limits(c, cut=1, num_texts=1)  # the model is not known yet: what no model could change
    except ConfigError as error:
        faults.append(str(error))
    return faults


_USAGE = """\
usage: python {script}.py [--model_dir FOLDER] [--config FILE] [--name value | --name=value] …

A list is several words; null is the word null. The names below are the keys of a settings file (YAML or JSON)
too; flags go over it. Without --model_dir, the output_dir of config.yaml in the working directory is served.
SIGTERM and SIGINT drain the server; a second one ends it at once. Exit codes: 0 drained, 1 a defect or work
that did not finish within grace_seconds, 2 a setting or model folder that cannot be used."""


def parse_serve_command_line(argv: Sequence[str]) -> tuple[ServeConfig, list[str]]:
    """The settings that this command line means, and lines to say; ConfigError with all faults at once.

    `--help` prints and exits with 0.
    """
    flags, path = flag_layer(argv, SERVE_SETTINGS, "serve", _USAGE)
    yaml = file_layer(path, SERVE_SETTINGS | {"output_dir": SETTINGS["output_dir"]}, "serve")
    values = {**yaml.values, **flags.values}
    output_dir = values.pop("output_dir", None)
    if not values.get("model_dir") and output_dir:
        yaml.notes.append(f"model_dir is {output_dir}, the output_dir of {path}")
        values["model_dir"] = output_dir
    if not values.get("model_dir") and not (yaml.faults or flags.faults):
        values["model_dir"] = sample_output_dir(yaml)
    config = ServeConfig(**values)
    faults = [*yaml.faults, *flags.faults, *_contradictions(config)]
    if config.model_dir is None and not faults:
        faults.append("model_dir must be set: name the trained folder with --model_dir")
    raise_faults(faults)
    return config, [*yaml.notes, *flags.notes]
