"""What a request can be refused with, and how strictly its body is read.

`RequestError` is every refusal, and the one place where an error becomes JSON. A body is read for its syntax
(400: UTF-8, no NaN, no key twice), then for its meaning (422: the pydantic model that its route wants).
"""

import dataclasses
import hmac
import json
import math
import re
from collections.abc import Callable
from email.message import Message
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

JSON = "application/json"
MAX_RETRY_SECONDS = 60
MAX_URL_BYTES = 8192
MAX_DEPTH = 32
MAX_DIGITS = 4300  # as Python's own bound for int(), but whatever the interpreter is told
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|([\[{])|([\]}])', re.DOTALL)
_FAULTS = {  # what is said of pydantic's errors, whose own words may hold what the client sent
    "model_type": "expected an object, found {kind}",
    "missing": "is required",
    "extra_forbidden": "found a field that is not known",
    "string_type": "expected a string, found {kind}",
    "string_unicode": "found half of a surrogate pair; expected Unicode text",
    "string_too_long": "found {size} characters; at most {max_length} are allowed",
    "string_too_short": "found a blank text",
    "string_pattern_mismatch": "found a blank text, or one with a NUL character",
    "bool_type": "expected true or false, found {kind}",
    "list_type": "expected an array, found {kind}",
    "row_count": "found {found} rows; 1 to {most} are allowed",
}
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
Model = TypeVar("Model", bound=BaseModel)


@dataclasses.dataclass(eq=False)
class RequestError(Exception):
    """A refusal. `message` never holds anything of what the client sent; `field` names the part at fault."""

    status: int
    kind: str
    message: str
    field: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    wait: float | None = None  # come back after so many seconds
    close: bool = False  # the connection: the rest is not worth reading

    def __post_init__(self) -> None:
        super().__init__(self.message)
        if self.wait is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(min(self.wait, MAX_RETRY_SECONDS))))
        if self.close:
            self.headers["Connection"] = "close"

    def response(self, request_id: str) -> Response:
        error = {"type": self.kind, "message": self.message, "field": self.field, "request_id": request_id}
        return Response(json.dumps({"error": error}), self.status, self.headers, JSON)


ClosingError = partial(RequestError, close=True)
UrlTooLong = partial(ClosingError, 414, "url_too_long", f"the URL is longer than {MAX_URL_BYTES} bytes")
_LARGE = "the headers are larger than max_header_bytes"
HeadersTooLarge = partial(ClosingError, 431, "headers_too_large", _LARGE)
BodyTooLarge = partial(ClosingError, 413, "body_too_large", "the body is larger than max_body_bytes")


def check_headers(request: Request, max_bytes: int, key: bytes | None) -> None:
    """RequestError 401 unless Authorization is `Bearer` and the key, once; 431, 414, 417 as messages say."""
    if key is not None:
        given = [value for name, value in request.headers.raw if name == b"authorization"]
        scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        is_right = hmac.compare_digest(credentials.strip(), key)
        if scheme.lower() != b"bearer" or not is_right:
            message = "a key is needed: Authorization: Bearer …"
            raise RequestError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
    if sum(len(name) + len(value) + 4 for name, value in request.headers.raw) > max_bytes:
        raise HeadersTooLarge()
    if len(request.scope["raw_path"]) + len(request.scope["query_string"]) + 1 > MAX_URL_BYTES:
        raise UrlTooLong()
    if any(value.strip().lower() != "100-continue" for value in request.headers.getlist("expect")):
        raise ClosingError(417, "expectation_failed", "of expectations only 100-continue is known")


def check_body(headers: Headers, max_bytes: int, *, may_be_any: bool) -> None:
    """RequestError 415 unless it is said to be JSON in UTF-8, as it is; 413 if it is said to be too long."""
    # Where the type may be any, a page of somebody else's could send it without its browser asking first.
    if not may_be_any or "origin" in headers:
        said, types = Message(), headers.getlist("content-type")
        said["Content-Type"] = types[0] if len(types) == 1 else ""
        if said.get_content_type() != JSON or said.get_content_charset("utf-8") not in ("utf-8", "utf8"):
            message = "Content-Type must be application/json (charset utf-8, if any)"
            raise RequestError(415, "unsupported_media_type", message, headers={"Accept": JSON})
    codings = ",".join(headers.getlist("content-encoding")).lower().split(",")
    if any(coding.strip() not in ("", "identity") for coding in codings):
        message = "Content-Encoding is not supported: send the body as it is"
        raise RequestError(415, "unsupported_media_type", message, headers={"Accept-Encoding": "identity"})
    # A Transfer-Encoding wins over a length: chunks are counted as they come.
    if "transfer-encoding" not in headers and int(headers.get("content-length", 0)) > max_bytes:
        raise BodyTooLarge()


async def read_json(request: Request, max_bytes: int, hold: Callable[[int], None]) -> Any:
    """The value in a body. RequestError 413 once it grows too large, 400 for its syntax, not repeating it.

    `hold` is told the size of each part before it is kept, and may raise. ClientDisconnect: its sender went.
    """
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > max_bytes:
            raise BodyTooLarge()
        hold(len(part))
        body += part
    hooks: Any = {"object_pairs_hook": _read_object, "parse_constant": _refuse}
    hooks |= {"parse_int": partial(_read_number, int), "parse_float": partial(_read_number, float)}
    try:
        text, depth = body.decode(), 0
        for match in _BRACKETS.finditer(text):  # outside of strings, before the parser recurses into them
            depth += (match[1] is not None) - (match[2] is not None)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        return json.loads(text, **hooks)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        fault = f"not JSON: {error.msg.split(':')[0].lower()} at character {error.pos}"
    except ValueError as error:  # ours
        fault = str(error)
    raise RequestError(400, "invalid_json", fault)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(constant: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def _read_number(kind: type[int] | type[float], digits: str) -> int | float:
    value = kind(digits) if len(digits) <= MAX_DIGITS else math.inf
    if value in (math.inf, -math.inf):
        raise ValueError("a number too large to hold")
    return value


def check_meaning(model: type[Model], value: Any) -> Model:
    """The body as its route wants it; RequestError 422 names the first thing that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=_urgency)
    is_unknown = first["type"] == "extra_forbidden"  # its name is the client's
    place = first["loc"][:-1] if is_unknown else first["loc"]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    found = first["input"]
    size = len(found) if isinstance(found, str) else 0
    described = {"kind": _KINDS.get(type(found), "a number"), "size": size, **first.get("ctx", {})}
    fault = _FAULTS[first["type"]].format(**described)
    message = f"{field}: {fault}".replace(": is ", " is ").removeprefix(": ")
    raise RequestError(422, "invalid_value", message, field or None)


def _urgency(error: ErrorDetails) -> tuple[float, float, float]:
    """In an object what is missing comes first, then what is not known, then the values in order."""
    place, rank = error["loc"], {"missing": 0, "extra_forbidden": 1}.get(error["type"], 2)
    return (rank, math.inf, 0) if len(place) < 2 else (2, float(place[1]), rank)
