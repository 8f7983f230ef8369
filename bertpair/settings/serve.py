"""Every setting of serve.py, in one flat model: the field names are the YAML keys and the flags."""

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from bertpair.errors import ConfigError
from bertpair.settings.command_line import file_layer, flag_layer, sample_output_dir
from bertpair.settings.config import raise_faults
from bertpair.settings.fields import (
    ONE_OR_MORE,
    Amp,
    Device,
    Group,
    Labels,
    Path,
    Real,
    Whole,
    as_text,
    matching,
    said,
    setting,
)

_MEGABYTE = 2**20
MOST_BODY_BYTES = 64 * _MEGABYTE
CHARS_PER_TOKEN = 25  # of the cut: no more could matter to the model
_ROWS = 32
_BYTES_PER_CHAR = 6  # \u and four digits, as JSON may write any of them
_BYTES_AROUND = 64  # a row's names and punctuation, or those around all rows


def _known_proxies(value: object) -> str:
    text = as_text(value).strip()
    for item in text.split(",") if text != "*" else ():
        try:
            ipaddress.ip_network(item.strip())
        except ValueError:
            raise ValueError from None  # its words say less than ours
    return text


_NAME = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]|\*"
_ORIGIN = r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|\*"
_Host = Annotated[
    str, matching(r"[A-Za-z0-9.:*-]{1,253}(%[A-Za-z0-9]+)?"), said("a host name or an IP address")
]
_Hosts = Annotated[list[Annotated[str, matching(_NAME)]], Field(min_length=1), ONE_OR_MORE]
_Origins = Annotated[list[Annotated[str, matching(_ORIGIN)]], Field(min_length=1), ONE_OR_MORE]
_Mode = Annotated[str, matching("0?[0-7]{3}"), said('octal digits in quotes, such as "660"')]
_Root = Annotated[
    str, matching("(/[A-Za-z0-9._~-]+)+"), said("a path such as /pairs, without a slash at its end")
]
_Proxies = Annotated[
    str, PlainValidator(_known_proxies), said("IP addresses or networks with commas between them, or *")
]
_Tokens = Annotated[
    Annotated[Whole, Field(ge=1, le=1_000_000)] | None,
    BeforeValidator(lambda value: None if value == "auto" else value),
    said("auto, or a whole number from 1 to 1000000"),
]


class ModelChoice(Group):
    """What is served, and how it computes."""

    model_dir: Path = setting(None, "trained folder; null: the configured output_dir")
    max_seq_length: Whole | None = setting(None, "cut texts here; null: as training did", ge=3, le=65_535)
    labels: Labels = setting(None, "names, in id order, for a model folder without names")
    device: Device = setting("auto", "where to compute")
    amp: Amp = setting("off", "precision; off: float32; auto: by the processor")
    num_threads: Whole | None = setting(None, "null: as many as cores", ge=1, le=1024)
    quantize: Literal["int8"] | None = setting(None, "linear layers in dynamic int8 (CPU)")
    quantize_check: Path = setting(
        None, "TSV whose first 256 rows are compared with float32 before the server is ready"
    )


class Listening(Group):
    """Where it listens."""

    host: _Host = setting("127.0.0.1", "address to listen on")
    port: Whole = setting(8000, "0: any free one", ge=0, le=65_535)
    uds: Path = setting(None, "listen on this Unix socket instead")
    uds_mode: _Mode | None = setting(None, "who may connect to it, as for chmod; null: 660")
    root_path: _Root | None = setting(None, "prefix under which a proxy shows this server")
    forwarded_allow_ips: _Proxies | None = setting(
        None, "comma-separated proxies whose X-Forwarded-* are believed, or *"
    )


class Limits(Group):
    """How much it takes."""

    max_body_bytes: Whole | None = setting(
        None, "of a request's body: 413 above; null: follows", ge=256, le=MOST_BODY_BYTES
    )
    max_inflight_bytes: Whole = setting(
        64 * _MEGABYTE, "of all bodies held at a time: 503 above", ge=256, le=2**40
    )
    max_header_bytes: Whole = setting(16_384, "of a request's headers: 431 above", ge=512, le=_MEGABYTE)
    max_text_chars: Whole | None = setting(
        None, "of one text: 422 above; null: follows, at most 25 times the cut", ge=1
    )
    max_request_rows: Whole | None = setting(
        None, "pairs in one request: 422 above; null: follows, at most 32", ge=1, le=100_000
    )
    max_queue_rows: Whole = setting(256, "rows that may wait: 429 above", ge=1, le=1_000_000)
    max_batch_tokens: _Tokens = setting(None, "padded tokens of one batch; auto: as many as run in 300 ms")
    max_connections: Whole = setting(1000, "open at a time; more are closed at once", ge=1, le=100_000)


_seconds = partial(setting, ge=0.01, le=86_400)  # less would be a mistake of the unit


class Time(Group):
    """How long it waits."""

    queue_deadline: Real = _seconds(5.0, "seconds a request may wait to be run: 503 after")
    receive_timeout: Real = _seconds(10.0, "seconds for a request to arrive, or an answer to be read")
    keep_alive: Real = _seconds(65.0, "seconds an idle connection is kept")
    drain_seconds: Real = setting(5.0, "after SIGTERM: unready, but still answering", ge=0, le=3600)
    grace_seconds: Real = _seconds(20.0, "after that: for accepted work to finish")
    stall_seconds: Real = _seconds(30.0, "a batch that runs longer: readyz 503; twice that: livez")


class Access(Group):
    """Who may ask."""

    api_key_file: Path = setting(None, "file whose first line is the bearer key asked for")
    cors_origin: Annotated[_Origins, said("origins such as https://example.com, or *")] | None = setting(
        None, "web pages that may call from a browser"
    )
    allowed_hosts: Annotated[_Hosts, said("host names without a port, or *")] | None = setting(
        None, "Host names answered; null: any, but only local ones on a loopback address"
    )


class ServeConfig(Access, Time, Limits, Listening, ModelChoice):
    """The settings of a server; `parse_serve_command_line` gives ones without contradictions."""


class _Names(ServeConfig):
    """What a settings file of serve.py may say: that of training names the model too."""

    output_dir: Path = None


GROUPS: dict[str, type[Group]] = {
    "model": ModelChoice,
    "listening": Listening,
    "limits": Limits,
    "time": Time,
    "access": Access,
}


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


def _clashes(c: ServeConfig) -> Iterator[str]:
    """What is sound one by one and cannot stand together."""
    if c.max_request_rows is not None and c.max_request_rows > c.max_queue_rows:
        yield (
            f"max_request_rows {c.max_request_rows} is above max_queue_rows {c.max_queue_rows}: "
            "such a request could never be admitted"
        )
    if c.max_body_bytes is not None and c.max_body_bytes > c.max_inflight_bytes:
        yield (
            f"max_body_bytes {c.max_body_bytes} is above max_inflight_bytes {c.max_inflight_bytes}: "
            "such a body could never be held"
        )
    if c.grace_seconds <= c.queue_deadline:
        yield (
            f"grace_seconds {c.grace_seconds:g} is not above queue_deadline {c.queue_deadline:g}: "
            "accepted work could not finish"
        )
    if c.uds is not None and c.host != ServeConfig.model_fields["host"].default:
        yield f"uds {c.uds} and host {c.host} are both given: one place to listen"
    if c.uds is None and c.uds_mode is not None:
        yield f"uds_mode {c.uds_mode} is given without uds: it is the mode of that socket"
    if c.quantize is not None and c.amp in ("bf16", "fp16"):
        yield f"quantize {c.quantize} and amp {c.amp} are both given: int8 goes with float32"
    if c.quantize is not None and c.device not in ("auto", "cpu"):
        yield f"quantize {c.quantize} runs on the CPU only, found device {c.device}"
    try:
        settle_limits(c, cut=1, num_texts=1)  # the model is not known yet: what no model could change
    except ConfigError as error:
        yield str(error)


_USAGE = """python {script}.py [--model_dir FOLDER] [--config FILE] [--name value | --name=value] …

A list is several words; null is the word null. The names below are the keys of a settings file (YAML or JSON)
too; flags go over it. Without --model_dir, the output_dir of config.yaml in the working directory is served.
SIGTERM and SIGINT drain the server; a second one ends it at once. Exit codes: 0 drained, 1 a defect or work
that did not finish within grace_seconds, 2 a setting or model folder that cannot be used."""


def parse_serve_command_line(argv: Sequence[str]) -> tuple[ServeConfig, list[str]]:
    """The settings that this command line means, and lines to say; ConfigError with all faults at once.

    `--help` prints and exits with 0.
    """
    shown = {title: list(group.model_fields) for title, group in GROUPS.items()}
    flags, path = flag_layer(argv, ServeConfig, "serve", shown, _USAGE)
    yaml = file_layer(path, _Names, "serve")
    values = {**yaml.values, **flags.values}
    output_dir = values.pop("output_dir", None)
    if not values.get("model_dir") and output_dir:
        yaml.notes.append(f"model_dir is {output_dir}, the output_dir of {path}")
        values["model_dir"] = output_dir
    if not values.get("model_dir") and not (yaml.faults or flags.faults):
        values["model_dir"] = sample_output_dir(yaml)
    config = ServeConfig(**values)
    faults = [*yaml.faults, *flags.faults, *_clashes(config)]
    if config.model_dir is None and not faults:
        faults.append("model_dir must be set: name the trained folder with --model_dir")
    raise_faults(faults)
    return config, [*yaml.notes, *flags.notes]
