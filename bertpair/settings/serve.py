"""Every setting of serve.py, in one flat dataclass: the field names are the YAML keys and the flags."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from bertpair.console import say
from bertpair.errors import ConfigError, list_faults, plain
from bertpair.settings.command_line import IMPLICIT, help_lines, read_flags
from bertpair.settings.config import SETTINGS
from bertpair.settings.files import SettingsFile, read_settings
from bertpair.settings.values import (
    DEVICE,
    LABELS,
    PATH,
    Kind,
    choice,
    clean_text,
    convert_all,
    number,
    or_null,
    suggest,
    whole,
)

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]|\*")
_ADDRESS = re.compile(r"[A-Za-z0-9.:*-]{1,253}(%[A-Za-z0-9]+)?")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|\*")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_MEGABYTE = 2**20
MOST_BODY_BYTES = 64 * _MEGABYTE
CHARS_PER_TOKEN = 25  # of the cut: no more could matter to the model
_ROWS = 32
_BYTES_PER_CHAR = 6  # \uXXXX, as JSON may write any of them
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


def _matching(expected: str, pattern: re.Pattern[str]) -> Kind:
    def accept(value: object) -> object:
        text = clean_text(value)
        if not pattern.fullmatch(text):
            raise ValueError
        return text

    return Kind(expected, accept)


def _several(one: Kind, expected: str) -> Kind:
    def accept(value: object) -> object:
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not found:
            raise ValueError
        return [one.accept(item) for item in found]

    return or_null(Kind(expected, accept, list, "many"))


_BATCH_TOKENS = whole(1, 1_000_000)
_AUTO = Kind(f"auto, or {_BATCH_TOKENS.expected}", _accept_auto, _BATCH_TOKENS.read)
_HOST = _matching("a host name or an IP address", _ADDRESS)
_HOSTS = _several(_matching("a host name", _HOST_NAME), "host names without a port, or *")
_ORIGINS = _several(_matching("an origin", _ORIGIN), "origins such as https://example.com, or *")
_ROOT = or_null(_matching("a path such as /pairs, without a slash at its end", _ROOT_PATH))
_SECONDS = number(low=0.01, high=86_400)  # less would be a mistake of the unit
_PROXIES = or_null(Kind("IP addresses or networks with commas between them, or *", _accept_proxies))
_MODE = or_null(_matching('octal digits in quotes, such as "660"', re.compile(r"0?[0-7]{3}")))


@dataclass(frozen=True)
class ServeSetting:
    """What --help and a check want to know of one field."""

    name: str
    group: str
    kind: Kind
    default: object
    help: str


def _setting(default: object, kind: Kind, help: str, *, group: str) -> Any:
    return field(default=default, metadata={"group": group, "kind": kind, "help": help})


_model = partial(_setting, group="model")
_listen = partial(_setting, group="listening")
_limit = partial(_setting, group="limits")
_time = partial(_setting, group="time")
_access = partial(_setting, group="access")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of a server; `make_serve_config` gives a checked one."""

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
SERVE_SETTINGS: dict[str, ServeSetting] = {
    item.name: ServeSetting(item.name, default=getattr(_DEFAULTS, item.name), **item.metadata)
    for item in fields(ServeConfig)
}


def convert_serve_settings(
    raw: Mapping[str, object], where: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Typed values of the sound ones, and the faults of the others, each led by its place in `where`."""
    return convert_all({name: setting.kind for name, setting in SERVE_SETTINGS.items()}, raw, where)


def make_serve_config(values: Mapping[str, object]) -> ServeConfig:
    """A checked `ServeConfig` from settings as a YAML file would hold them; ConfigError with all faults."""
    typed, faults = convert_serve_settings(values, {})
    config = ServeConfig(**typed)
    faults += serve_contradictions(config)
    if faults:
        raise ConfigError(list_faults(faults))
    return config


def serve_contradictions(config: ServeConfig) -> list[str]:
    """What is sound one by one and cannot stand together."""
    rows, body = config.max_request_rows, config.max_body_bytes
    table = [
        (
            rows is not None and rows > config.max_queue_rows,
            f"max_request_rows {rows} is above max_queue_rows {config.max_queue_rows}: "
            "such a request could never be admitted",
        ),
        (
            body is not None and body > config.max_inflight_bytes,
            f"max_body_bytes {body} is above max_inflight_bytes {config.max_inflight_bytes}: "
            "such a body could never be held",
        ),
        (
            config.grace_seconds <= config.queue_deadline,
            f"grace_seconds {config.grace_seconds:g} is not above queue_deadline {config.queue_deadline:g}: "
            "accepted work could not finish",
        ),
        (
            config.uds is not None and config.host != _DEFAULTS.host,
            f"uds {config.uds} and host {config.host} are both given: one place to listen",
        ),
        (
            config.uds_mode is not None and config.uds is None,
            f"uds_mode {config.uds_mode} is given without uds: it is the mode of that socket",
        ),
        (
            config.quantize is not None and config.amp in ("bf16", "fp16"),
            f"quantize {config.quantize} and amp {config.amp} are both given: int8 goes with float32",
        ),
        (
            config.quantize is not None and config.device not in ("auto", "cpu"),
            f"quantize {config.quantize} runs on the CPU only, found device {config.device}",
        ),
    ]
    faults = [fault for is_wrong, fault in table if is_wrong]
    try:
        settle_limits(config, cut=1, num_texts=1)  # the model is not known yet: what no model could change
    except ConfigError as error:
        faults.append(str(error))
    return faults


_USAGE = """\
usage: python serve.py [--model_dir FOLDER] [--config FILE] [--name value | --name=value] …

A list is several words; null is the word null. The names below are the keys of a settings file (YAML or JSON)
too; flags go over it. Without --model_dir, the output_dir of config.yaml in the working directory is served.
SIGTERM and SIGINT drain the server; a second one ends it at once. Exit codes: 0 drained, 1 a defect or work
that did not finish within grace_seconds, 2 a setting or model folder that cannot be used."""


@dataclass(frozen=True)
class ServeCall:
    """The settings of one call, and lines to say."""

    config: ServeConfig
    notes: tuple[str, ...]


@dataclass
class _Found:
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_serve_command_line(argv: Sequence[str]) -> ServeCall:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0."""
    if "--help" in argv or "-h" in argv:
        say(serve_help_page())
        raise SystemExit(0)
    kinds: dict[str, Kind] = {"config": PATH, **{name: item.kind for name, item in SERVE_SETTINGS.items()}}
    flags = read_flags(argv, kinds)
    path = flags.values.pop("config", None)
    found = _Found(faults=list(flags.faults), notes=list(flags.notes))
    if isinstance(path, str) and path:
        _add_file(found, path)
    values, faults = convert_serve_settings(flags.values, {name: f"--{name}" for name in flags.values})
    found.values.update(values)
    found.faults += faults
    if not found.values.get("model_dir"):
        _add_sample(found)
    config = ServeConfig(**found.values)
    found.faults += serve_contradictions(config)
    if config.model_dir is None and not found.faults:
        found.faults.append("model_dir must be set: name the trained folder with --model_dir")
    if found.faults:
        raise ConfigError(list_faults(found.faults))
    return ServeCall(config, tuple(found.notes))


def _add_file(found: _Found, path: str) -> None:
    """The settings file's share: serve.py's settings, and output_dir as the model's folder."""
    try:
        file = read_settings(path)
    except ConfigError as error:
        found.faults.append(str(error))
        return
    found.notes.append(f"settings read from {path}")
    found.faults += file.faults
    mine = {name: value for name, value in file.values.items() if name in SERVE_SETTINGS}
    values, faults = convert_serve_settings(mine, {name: f"{file.where(name)}: {name}" for name in mine})
    found.values.update(values)
    found.faults += faults + [
        f"{file.where(name)}: unknown setting {plain(name)}{suggest(name, SERVE_SETTINGS)}"
        for name in file.values
        if name not in SERVE_SETTINGS and name not in SETTINGS
    ]
    if not found.values.get("model_dir"):
        _add_output_dir(found, file)


def _add_sample(found: _Found) -> None:
    """Without a folder named anywhere, the sample's."""
    if os.path.exists(IMPLICIT) and not found.faults:
        try:
            _add_output_dir(found, read_settings(IMPLICIT))
        except ConfigError as error:
            found.faults.append(str(error))


def _add_output_dir(found: _Found, file: SettingsFile) -> None:
    folder = file.values.get("output_dir")
    if isinstance(folder, str) and folder:
        found.values["model_dir"] = folder
        found.notes.append(f"model_dir is {folder}, the output_dir of {file.path}")


def serve_help_page() -> str:
    """Every setting of serve.py, by group, with its meaning, what it may be and its default."""
    lines = [_USAGE]
    group = ""
    for name, item in SERVE_SETTINGS.items():
        if item.group != group:
            group = item.group
            lines.append(f"\n{group}:")
        lines.append(help_lines(name, item.kind, item.default, item.help))
    return "\n".join(lines)
