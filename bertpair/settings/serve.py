"""Every setting of serve.py, in one flat dataclass: the field names are the YAML keys and the flags."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

from bertpair.console import say
from bertpair.errors import ConfigError, plain
from bertpair.settings.command_line import IMPLICIT, Layer, help_lines, read_flags
from bertpair.settings.config import SETTINGS, Setting, raise_faults, setting
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


def _matching(expected: str, pattern: str) -> Kind:
    def accept(value: object) -> object:
        text = clean_text(value)
        if not re.fullmatch(pattern, text):
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
_HOST = _matching("a host name or an IP address", r"[A-Za-z0-9.:*-]{1,253}(%[A-Za-z0-9]+)?")
_HOST_NAME = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]|\*"
_HOSTS = _several(_matching("a host name", _HOST_NAME), "host names without a port, or *")
_ORIGIN = _matching("an origin", r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|\*")
_ORIGINS = _several(_ORIGIN, "origins such as https://example.com, or *")
_ROOT = or_null(_matching("a path such as /pairs, without a slash at its end", r"(/[A-Za-z0-9._~-]+)+"))
_SECONDS = number(low=0.01, high=86_400)  # less would be a mistake of the unit
_PROXIES = or_null(Kind("IP addresses or networks with commas between them, or *", _accept_proxies))
_MODE = or_null(_matching('octal digits in quotes, such as "660"', r"0?[0-7]{3}"))

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
_KINDS = {name: item.kind for name, item in SERVE_SETTINGS.items()}


def _contradictions(config: ServeConfig) -> list[str]:
    """What is sound one by one and cannot stand together."""
    rows, body, uds = config.max_request_rows, config.max_body_bytes, config.uds
    faults = []
    if rows is not None and rows > config.max_queue_rows:
        excess = f"max_request_rows {rows} is above max_queue_rows {config.max_queue_rows}"
        faults.append(f"{excess}: such a request could never be admitted")
    if body is not None and body > config.max_inflight_bytes:
        excess = f"max_body_bytes {body} is above max_inflight_bytes {config.max_inflight_bytes}"
        faults.append(f"{excess}: such a body could never be held")
    if config.grace_seconds <= config.queue_deadline:
        lack = f"grace_seconds {config.grace_seconds:g} is not above queue_deadline {config.queue_deadline:g}"
        faults.append(f"{lack}: accepted work could not finish")
    if uds is not None and config.host != _DEFAULTS.host:
        faults.append(f"uds {uds} and host {config.host} are both given: one place to listen")
    if uds is None and config.uds_mode is not None:
        faults.append(f"uds_mode {config.uds_mode} is given without uds: it is the mode of that socket")
    if config.quantize is not None and config.amp in ("bf16", "fp16"):
        both = f"quantize {config.quantize} and amp {config.amp} are both given"
        faults.append(f"{both}: int8 goes with float32")
    if config.quantize is not None and config.device not in ("auto", "cpu"):
        faults.append(f"quantize {config.quantize} runs on the CPU only, found device {config.device}")
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


def parse_serve_command_line(argv: Sequence[str]) -> ServeCall:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0."""
    if "--help" in argv or "-h" in argv:
        say(serve_help_page())
        raise SystemExit(0)
    flags = read_flags(argv, {"config": PATH, **_KINDS})
    path = flags.values.pop("config", None)
    found = Layer(faults=flags.faults, notes=flags.notes)
    if isinstance(path, str) and path:
        _add_file(found, path)
    _add_values(found, flags.values, {name: f"--{name}" for name in flags.values})
    if not found.values.get("model_dir") and not found.faults and os.path.exists(IMPLICIT):
        try:
            _add_output_dir(found, read_settings(IMPLICIT))  # the sample's
        except ConfigError as error:
            found.faults.append(str(error))
    config = ServeConfig(**found.values)
    found.faults += _contradictions(config)
    if config.model_dir is None and not found.faults:
        found.faults.append("model_dir must be set: name the trained folder with --model_dir")
    raise_faults(found.faults)
    return ServeCall(config, tuple(found.notes))


def _add_file(found: Layer, path: str) -> None:
    """The settings file's share: serve.py's settings, and output_dir as the model's folder."""
    try:
        file = read_settings(path)
    except ConfigError as error:
        found.faults.append(str(error))
        return
    found.notes.append(f"settings read from {path}")
    found.faults += file.faults
    mine = {name: value for name, value in file.values.items() if name in SERVE_SETTINGS}
    _add_values(found, mine, {name: f"{file.where(name)}: {name}" for name in mine})
    found.faults += [
        f"{file.where(name)}: unknown setting {plain(name)}{suggest(name, SERVE_SETTINGS)}"
        for name in file.values
        if name not in SERVE_SETTINGS and name not in SETTINGS
    ]
    if not found.values.get("model_dir"):
        _add_output_dir(found, file)


def _add_values(found: Layer, raw: Mapping[str, object], where: Mapping[str, str]) -> None:
    values, faults = convert_all(_KINDS, raw, where)
    found.values.update(values)
    found.faults += faults


def _add_output_dir(found: Layer, file: SettingsFile) -> None:
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
