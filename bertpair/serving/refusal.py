"""What a request can be refused with; each carries what HTTP needs to say so.

RequestError                  any refusal: a status, a type for machines, a message for people
├── QueueFullError            429: too much waits already
├── ExpiredError              503: it waited past the deadline and was never run
├── NoMemoryError             503: it does not fit into memory, even alone and halved
├── BadNumberError            500: the model answered with what is no number
└── ClosedError               503: the server is going away
"""

from __future__ import annotations

from collections.abc import Mapping


class RequestError(Exception):
    """A refusal. `message` never holds anything of what the client sent; `field` names the part at fault."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field = status, kind, message, field
        self.headers = dict(headers or {})
        self.close = close  # the connection too: the rest of the request is not worth reading


class QueueFullError(RequestError):
    """Refused: too much waits already; room is expected after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        message = f"too many requests are waiting; retry after {retry_after} s"
        super().__init__(429, "overloaded", message, headers={"Retry-After": str(retry_after)})
        self.retry_after = retry_after


class ExpiredError(RequestError):
    """Admitted, and dropped without running because it waited longer than the deadline."""

    def __init__(self, retry_after: int) -> None:
        message = "waited longer than the queue's deadline and was not run"
        super().__init__(503, "deadline_passed", message, headers={"Retry-After": str(retry_after)})


class NoMemoryError(RequestError):
    """It does not fit into memory, even alone and halved."""

    def __init__(self) -> None:
        super().__init__(503, "no_memory", "not enough memory for this request", headers={"Retry-After": "1"})


class BadNumberError(RequestError):
    """The model answered with NaN or an infinity."""

    def __init__(self) -> None:
        super().__init__(500, "not_a_number", "the model's answer is not a finite number")


class ClosedError(RequestError):
    """Nothing is taken any more."""

    def __init__(self) -> None:
        super().__init__(503, "closed", "the server is going away", headers={"Retry-After": "1"})
