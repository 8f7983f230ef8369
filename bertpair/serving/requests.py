"""What a server makes of a request that it does not answer with 200, and how strictly it reads a body.

`RequestError` is every refusal, and the one place where an error becomes JSON. A body is read within its
limit, then for its syntax (400: UTF-8 without a byte order mark, no NaN or Infinity, no key twice, at most 32
levels, numbers of bounded length), then for its meaning (422: the fields and texts that a route wants).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bertpair.data.records import INVISIBLE, is_blank
from bertpair.errors import half_character
from bertpair.settings.files import unique_keys

JSON = "application/json"
MAX_RETRY_SECONDS = 60
MAX_URL_BYTES = 8192
MAX_DEPTH = 32
MAX_DIGITS = 4300  # as Python's own bound for int(), but whatever the interpreter is told
TEXT_PATTERN = rf"^[^\u0000]*[^{INVISIBLE}][^\u0000]*$"  # what `check_text` wants, as JSON Schema says it
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|([\[{])|([\]}])', re.DOTALL)
_PARAMETER = re.compile(r'[ \t]*;[ \t]*(?:([\w!#$%&\'*+.^`|~-]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^\s";]*))?')

Headers = Sequence[tuple[bytes, bytes]]


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
            self.headers["Retry-After"] = str(retry_after(wait))
        if close:
            self.headers["Connection"] = "close"

    def response(self, request_id: str) -> Response:
        """The answer that says so."""
        error = {"type": self.kind, "message": self.message, "field": self.field, "request_id": request_id}
        body = json.dumps({"error": error}).encode()
        headers = {"Content-Type": JSON, "Content-Length": str(len(body)), **self.headers}
        return Response(body, self.status, headers)


class QueueFullError(RequestError):
    """Refused: too much waits already; room is expected after `wait` seconds."""

    def __init__(self, wait: float) -> None:
        message = f"too many requests are waiting; retry after {retry_after(wait)} s"
        super().__init__(429, "overloaded", message, wait=wait)


def url_too_long() -> RequestError:
    return RequestError(414, "url_too_long", f"the URL is longer than {MAX_URL_BYTES} bytes", close=True)


def headers_too_large(max_bytes: int) -> RequestError:
    message = f"the headers are larger than {max_bytes} bytes"
    return RequestError(431, "headers_too_large", message, close=True)


def retry_after(wait: float) -> int:
    """`wait` in whole seconds, as Retry-After has them."""
    return max(1, math.ceil(min(wait, MAX_RETRY_SECONDS)))


# A body, before and while it is read


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
    """application/json with any parameters; a charset among them is UTF-8."""
    kind, semicolon, rest = value.partition(";")
    if kind.strip().lower() != JSON:
        return False
    found = semicolon + rest.rstrip()
    position = 0
    while position < len(found):
        match = _PARAMETER.match(found, position)
        if match is None:
            return False
        if (match[1] or "").lower() == "charset" and match[2].strip('"').lower() not in ("utf-8", "utf8"):
            return False
        position = match.end()
    return True


def check_length(headers: Headers, max_bytes: int) -> None:
    """RequestError 413 if Content-Length promises too much: nothing is read, nobody is told to continue."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return  # it wins over a Content-Length; chunks are counted as they come
    if any(int(value) > max_bytes for name, value in headers if name == b"content-length"):
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {max_bytes} bytes", close=True)


async def read_body(request: Request, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    """The body; RequestError 413 once it grows too large, ClientDisconnect if its sender goes away.

    `hold` is told the number of bytes of each part before it is kept, and may raise.
    """
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > max_bytes:
            raise _too_large(max_bytes)
        hold(len(part))
        body += part
    return bytes(body)


# Syntax


def parse_json(body: bytes) -> Any:
    """The value in a body; RequestError 400 says what is wrong with its syntax, without repeating it."""
    if not body:
        raise _bad_json("the body is empty; expected JSON")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"byte {error.start} is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise _bad_json("a byte order mark is not allowed")
    _check_depth(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_bounded_float,
        )
    except json.JSONDecodeError as error:
        raise _bad_json(f"not JSON: {error.msg.split(':')[0].lower()} at character {error.pos}") from None
    except ValueError:
        raise _bad_json("a key stands twice in one object") from None


def _bad_json(message: str) -> RequestError:
    return RequestError(400, "invalid_json", message)


def _check_depth(text: str) -> None:
    """Brackets outside of strings, counted before the parser recurses into them."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > MAX_DEPTH:
            raise _bad_json(f"nested more than {MAX_DEPTH} levels deep")


def _refuse_constant(name: str) -> object:
    raise _bad_json("NaN and Infinity are not JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _bad_json(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


def _bounded_float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if math.isinf(value):
        raise _bad_json("a number too large to hold")
    return value


# Meaning


def bad_value(message: str, field: str | None = None) -> RequestError:
    """422: well-formed, and not what the route wants."""
    return RequestError(422, "invalid_value", message, field=field)


def check_object(
    value: Any, required: Sequence[str], optional: Sequence[str], where: str = "", *, strict: bool = True
) -> Mapping[str, Any]:
    """An object with all the required fields; with `strict`, others than those named are refused.

    `where` is the path of the object ("pairs[0]"), empty for the whole body.
    """
    if not isinstance(value, dict):
        raise bad_value(f"expected an object, found {json_type(value)}", where or None)
    prefix = f"{where}." if where else ""
    for name in required:
        if name not in value:
            raise bad_value(f"{prefix}{name} is required", prefix + name)
    if strict and set(value) - {*required, *optional}:
        allowed = ", ".join([*required, *optional])
        raise bad_value(f"found a field that is not known; allowed: {allowed}", where or None)
    return value


def check_text(value: Any, field: str, max_chars: int) -> str:
    """A text that is not blank, holds no NUL and no half of a surrogate pair, and is not too long."""
    if not isinstance(value, str):
        fault = f"expected a string, found {json_type(value)}"
    elif len(value) > max_chars:
        fault = f"found {len(value)} characters; at most {max_chars} are allowed"
    elif "\0" in value:
        fault = "found a NUL character"
    elif half_character(value) is not None:
        fault = "found half of a surrogate pair; expected Unicode text"
    elif is_blank(value):
        fault = "found a blank text"
    else:
        return value
    raise bad_value(f"{field}: {fault}", field)


def check_switch(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise bad_value(f"{field}: expected true or false, found {json_type(value)}", field)
    return value


def json_type(value: Any) -> str:
    """What JSON calls it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")
