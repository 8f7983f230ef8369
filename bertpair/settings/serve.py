"""Every setting of serve.py, in one flat model: the field names are the YAML keys and the flags."""

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator

from bertpair.console import program
from bertpair.errors import ConfigError, raise_faults
from bertpair.settings.command_line import (
    HOW_TO_SET,
    NO_MODEL_DIR,
    file_layer,
    first_of_all,
    flag_layer,
    sample_output_dir,
)
from bertpair.settings.engine import EngineSettings, engine_faults
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


class ModelChoice(EngineSettings):
    """What is served, and how it computes."""

    model_dir: Path = setting(
        None,
        "Folder of the trained model. Not given: the output_dir of the settings file, or of config.yaml.",
        example="my_model",
    )
    max_seq_length: Whole | None = setting(
        None, "Most tokens of one row. Longer ones are cut. Not given: as in training.", ge=3, le=65_535
    )
    labels: Labels = setting(
        None,
        "Names of the labels, in the order of their ids, for a model folder without names. "
        "Not given: the names in the folder, else LABEL_0, LABEL_1 and so on.",
    )
    device: Device = setting(
        "auto",
        "Where to compute. auto: on the first GPU, or on the CPU if there is none. cuda:1 is the second GPU.",
        example="cpu",
    )
    amp: Amp = setting(
        "off",
        "Precision. off: float32. bf16 and fp16: multiply matrices in 16 bits; fp16 needs a CUDA GPU. "
        "auto: bf16 or fp16 where the hardware makes that fast, else off.",
        example="auto",
    )
    num_threads: Whole | None = setting(
        None,
        "Number of CPU threads. Not given: PyTorch's choice, at most one for each usable core.",
        ge=1,
        le=1024,
        example="4",
    )


class Listening(Group):
    """Where it listens."""

    host: _Host = setting(
        "127.0.0.1",
        "Address to listen on. 127.0.0.1: only this machine can reach it. 0.0.0.0: other machines can too.",
        example="0.0.0.0",
    )
    port: Whole = setting(
        8000, "Port to listen on. 0: any free one, which the log names.", ge=0, le=65_535, example="8080"
    )
    uds: Path = setting(None, "Listen on a Unix socket at this path. Not given: listen on host and port.")
    uds_mode: _Mode | None = setting(
        None, "Access rights of that socket, as for chmod. Not given: 660, the owner and its group."
    )
    root_path: _Root | None = setting(
        None, "Prefix of the paths under which a proxy shows this server. Not given: none."
    )
    forwarded_allow_ips: _Proxies | None = setting(
        None,
        "Proxies whose X-Forwarded-For and X-Forwarded-Proto headers are believed. *: any. Not given: none.",
    )


class Limits(Group):
    """How much it takes."""

    max_body_bytes: Whole | None = setting(
        None,
        "Most bytes in the body of a request; a longer one gets status 413. "
        "Not given: room for max_request_rows rows of texts of max_text_chars characters.",
        ge=256,
        le=MOST_BODY_BYTES,
    )
    max_inflight_bytes: Whole = setting(
        64 * _MEGABYTE,
        "Most bytes in all bodies held at one time; a request beyond that gets status 503.",
        ge=256,
        le=2**40,
    )
    max_header_bytes: Whole = setting(
        16_384, "Most bytes in the headers of a request; longer ones get status 431.", ge=512, le=_MEGABYTE
    )
    max_text_chars: Whole | None = setting(
        None,
        "Most characters in one text; a longer one gets status 422. "
        "Not given: 25 for each token of max_seq_length, or as many as max_body_bytes has room for.",
        ge=1,
    )
    max_request_rows: Whole | None = setting(
        None,
        "Most rows in one request; more get status 422. "
        "Not given: 32, or as many as max_queue_rows and max_body_bytes have room for.",
        ge=1,
        le=100_000,
        example="100",
    )
    max_queue_rows: Whole = setting(
        256, "Most rows that may wait to be run; a request beyond that gets status 429.", ge=1, le=1_000_000
    )
    max_batch_tokens: _Tokens = setting(
        None,
        "Most tokens in one batch, padding included. "
        "auto: as if it were not given. "
        "Not given: as many as run in 0.3 seconds, which is measured when the server starts.",
    )
    max_connections: Whole = setting(
        1000, "Most connections that are open at one time; any more are closed at once.", ge=1, le=100_000
    )


_seconds = partial(setting, ge=0.01, le=86_400)  # less would be a mistake of the unit


class Time(Group):
    """How long it waits."""

    queue_deadline: Real = _seconds(
        5.0, "Seconds that a request may wait to be run; after that it gets status 503.", example="2"
    )
    receive_timeout: Real = _seconds(
        10.0,
        "Seconds that a client may take to send a request, or to read its answer. The connection then ends.",
    )
    keep_alive: Real = _seconds(65.0, "Seconds that a connection without requests is kept open.")
    drain_seconds: Real = setting(
        5.0,
        "Seconds after SIGTERM or SIGINT in which requests are still accepted, while /readyz says 503.",
        ge=0,
        le=3600,
    )
    grace_seconds: Real = _seconds(
        20.0, "Seconds after drain_seconds in which accepted requests may finish. The process then ends."
    )
    stall_seconds: Real = _seconds(
        30.0,
        "If a batch runs longer than this many seconds, /readyz and new requests get status 503; "
        "after twice that time /livez does too.",
    )


class Access(Group):
    """Who may ask."""

    api_key_file: Path = setting(
        None,
        "File whose first line is a key of 8 characters or more. Clients must send it in a header, "
        "Authorization: Bearer KEY. "
        "Not given: no key is asked for.",
        example="key.txt",
    )
    cors_origin: Annotated[_Origins, said("origins such as https://example.com, or *")] | None = setting(
        None, "Web pages that may call this server from a browser. *: any. Not given: none but its own."
    )
    allowed_hosts: Annotated[_Hosts, said("host names without a port, or *")] | None = setting(
        None,
        "Host names that the server answers to. *: any. "
        "Not given: on an address such as 127.0.0.1 only names of this machine, else any.",
        example="pairs.example.com",
    )


class ServeConfig(Access, Time, Limits, Listening, ModelChoice):
    """The settings of a server; `parse_serve_command_line` gives ones without contradictions."""


class _Names(ServeConfig):
    """What a settings file of serve.py may say: that of training names the model too."""

    output_dir: Path = None


GROUPS: dict[str, type[Group]] = {
    "Model": ModelChoice,
    "Address": Listening,
    "Limits": Limits,
    "Times": Time,
    "Access": Access,
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
        yield f"uds {c.uds} and host {c.host} are both given: give only one of them"
    if c.uds is None and c.uds_mode is not None:
        yield f"uds_mode {c.uds_mode} is given without uds: it is the mode of that socket"
    yield from engine_faults(c, c.device)
    try:
        settle_limits(c, cut=1, num_texts=1)  # the model is not known yet: what no model could change
    except ConfigError as error:
        yield str(error)


_USAGE = """{program} [--config FILE] [--name value] …

Serves a trained model over HTTP, with a page for trying it in a browser.

{how_to_set}
Without --model_dir, the output_dir of config.yaml in the working directory is served.

SIGTERM and SIGINT (Ctrl-C) let the server finish its work and end; a second one ends it at once.
Exit codes: 0 all work was done; 1 a defect, or work that was not done within grace_seconds;
2 a setting or a model folder that cannot be used.

Example, after {train} has trained the sample model into the folder output:
  {program} --model_dir output --port 8000
Then http://127.0.0.1:8000 shows the page."""
_FIRST = """model_dir host port device amp num_threads max_request_rows queue_deadline api_key_file
    allowed_hosts"""


def parse_serve_command_line(argv: Sequence[str]) -> tuple[ServeConfig, list[str]]:
    """The settings that this command line means, and lines to say; ConfigError with all faults at once.

    `--help` prints and exits with 0.
    """
    shown = first_of_all(_FIRST, {title: group.model_fields for title, group in GROUPS.items()})
    usage = _USAGE.format(program=program("serve"), train=program("train"), how_to_set=HOW_TO_SET)
    flags, own = flag_layer(argv, ServeConfig, "serve", shown, usage)
    path = own.get("config")
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
        faults.append(NO_MODEL_DIR)
    raise_faults(faults)
    return config, [*yaml.notes, *flags.notes]
