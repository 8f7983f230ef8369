"""What a request can be refused with, and how strictly its body is read.

`RequestError` is every refusal, and the one place where an error becomes JSON. A body is read within its
limit, then for its syntax (400: UTF-8 without a byte order mark, no NaN or Infinity, no key twice, at most 32
levels, numbers of bounded length), then for its meaning (422: the pydantic model that the route wants).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.responses import Response

JSON = "application/json"
MAX_RETRY_SECONDS = 60
MAX_URL_BYTES = 8192
MAX_DEPTH = 32
MAX_DIGITS = 4300  # as Python's own bound for int(), but whatever the interpreter is told
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|([\[{])|([\]}])', re.DOTALL)
_FAULTS = {  # what is said of pydantic's errors, whose own words may hold what the client sent
    "model_type": "expected an object",
    "missing": "is required",
    "extra_forbidden": "found a field that is not known",
    "string_type": "expected a string",
    "string_unicode": "found half of a surrogate pair; expected Unicode text",
    "string_too_long": "at most {max_length} characters are allowed",
    "string_too_short": "found a blank text",
    "string_pattern_mismatch": "found a blank text, or one with a NUL character",
    "bool_type": "expected true or false",
    "list_type": "expected an array",
    "row_count": "found {found} rows; 1 to {most} are allowed",
}

Headers = Sequence[tuple[bytes, bytes]]
Model = TypeVar("Model", bound=BaseModel)


class RequestError(Exception):
    """A refusal. `message` never holds anything of what the client sent; `field` names the part at fault.

    `wait`: come back after so many seconds. `close` the connection: the rest is not worth reading.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        wait: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field = status, kind, message, field
        self.headers = dict(headers or {})
        if wait is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(min(wait, MAX_RETRY_SECONDS))))
        if close:
            self.headers["Connection"] = "close"

    def response(self, request_id: str) -> Response:
        """The answer that says so."""
        error = {"type": self.kind, "message": self.message, "field": self.field, "request_id": request_id}
        return Response(json.dumps({"error": error}), self.status, self.headers, JSON)


class QueueFullError(RequestError):
    """Refused: too much waits already; room is expected after `wait` seconds."""

    def __init__(self, wait: float) -> None:
        super().__init__(429, "overloaded", "too many requests are waiting; see Retry-After", wait=wait)


UrlTooLong = partial(
    RequestError, 414, "url_too_long", f"the URL is longer than {MAX_URL_BYTES} bytes", close=True
)
HeadersTooLarge = partial(
    RequestError, 431, "headers_too_large", "the headers are larger than max_header_bytes", close=True
)
BodyTooLarge = partial(
    RequestError, 413, "body_too_large", "the body is larger than max_body_bytes", close=True
)


def check_content_type(headers: Headers, *, may_be_any: bool = False) -> None:
    """RequestError 415 unless the body is said to be JSON, in UTF-8, and not compressed.

    With `may_be_any` the type does not matter, save for a browser's request: a page of somebody else's
    may send other types without asking first.
    """
    types = [value.decode("latin-1") for name, value in headers if name == b"content-type"]
    is_exempt = may_be_any and all(name != b"origin" for name, _ in headers)
    if not is_exempt and not (len(types) == 1 and _is_json_type(types[0])):
        message = "Content-Type must be application/json (charset utf-8, if any)"
        raise RequestError(415, "unsupported_media_type", message, headers={"Accept": JSON})
    codings = b",".join(value for name, value in headers if name == b"content-encoding").lower()
    if any(coding.strip() not in (b"", b"identity") for coding in codings.split(b",")):
        message = "Content-Encoding is not supported: send the body as it is"
        raise RequestError(415, "unsupported_media_type", message, headers={"Accept-Encoding": "identity"})


def _is_json_type(value: str) -> bool:
    parsed = Message()
    parsed["Content-Type"] = value
    return parsed.get_content_type() == JSON and parsed.get_content_charset("utf-8") in ("utf-8", "utf8")


def check_length(headers: Headers, max_bytes: int) -> None:
    """RequestError 413 if Content-Length promises too much: nothing is read, nobody is told to continue."""
    lengths = dict(headers)
    # A Transfer-Encoding wins over a length: chunks are counted as they come.
    if b"transfer-encoding" not in lengths and int(lengths.get(b"content-length", 0)) > max_bytes:
        raise BodyTooLarge()


async def read_body(request: Request, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    """The body; RequestError 413 once it grows too large, ClientDisconnect if its sender goes away.

    `hold` is told the number of bytes of each part before it is kept, and may raise.
    """
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > max_bytes:
            raise BodyTooLarge()
        hold(len(part))
        body += part
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """The value in a body; RequestError 400 says what is wrong with its syntax, without repeating it."""
    try:
        text = body.decode()
        _check_depth(text)
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=partial(_bounded, int),
            parse_float=partial(_bounded, float),
        )
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        fault = f"not JSON: {error.msg.split(':')[0].lower()} at character {error.pos}"
    except ValueError as error:  # ours
        fault = str(error)
    raise RequestError(400, "invalid_json", fault)


def _check_depth(text: str) -> None:
    """Brackets outside of strings, counted before the parser recurses into them."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def _bounded(kind: type[int] | type[float], digits: str) -> int | float:
    value = kind(digits) if len(digits) <= MAX_DIGITS else math.inf
    if value in (math.inf, -math.inf):
        raise ValueError("a number too large to hold")
    return value


def bad_value(message: str, field: str | None = None) -> RequestError:
    """422: well-formed, and not what the route wants."""
    return RequestError(422, "invalid_value", message, field=field)


def check_meaning(model: type[Model], value: Any) -> Model:
    """The body as its route wants it; RequestError 422 names the first thing that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = min(error.errors(include_url=False, include_input=False), key=_urgency)
    place = (
        first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
    )  # a name is the client's
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    fault = _FAULTS[first["type"]].format(**first.get("ctx", {}))
    message = f"{field}: {fault}".replace(": is ", " is ").removeprefix(": ")
    raise bad_value(message, field or None)


def _urgency(error: ErrorDetails) -> tuple[float, float, float]:
    """In an object what is missing comes first, then what is not known, then the values in order."""
    place, rank = error["loc"], {"missing": 0, "extra_forbidden": 1}.get(error["type"], 2)
    return (rank, math.inf, 0) if len(place) < 2 else (2, float(place[1]), rank)
