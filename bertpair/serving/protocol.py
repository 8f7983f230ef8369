"""uvicorn's HTTP/1.1 connection with what it leaves open: deadlines, a cap on connections, gentle closing.

What goes wrong below the application is answered as JSON too. A connection is half-closed first and read dry
for a while: a bare close would reset it if its client still sends, and the client would lose the answer.
"""

import asyncio
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bertpair.serving.app import Service
from bertpair.serving.requests import ClosingError, HeadersTooLarge, RequestError, UrlTooLong

LINGER_SECONDS = 2.0
LINGER_BYTES = 2**20
FAREWELL_SECONDS = 1.0  # once nobody new gets in: a request that was under way has come by then
UNANSWERED = (h11.IDLE, h11.SEND_RESPONSE)  # states of ours in which an answer can still begin


class GentleTransport:
    """The real transport as uvicorn sees it: closing it asks the protocol how, and is the end of writing."""

    def __init__(self, real: asyncio.Transport, close: Callable[[], None]) -> None:
        self.real, self.close, self.closing = real, close, False

    def is_closing(self) -> bool:
        return self.closing or self.real.is_closing()

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.real.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class GuardedProtocol(H11Protocol):
    """One connection, which its requests find in their `state`, with one timer: of what it waits for."""

    def __init__(self, *, service: Service, app_state: dict[str, Any], **rest: Any) -> None:
        super().__init__(app_state={**app_state, "connection": self}, **rest)
        self.service = service
        self.num_answered = self.num_discarded = 0
        self.is_last, self.waits_for = False, object()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_mid_request(self) -> bool:
        """Whether part of a request has come, and part has not."""
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0].strip())
        return self.conn.their_state is h11.SEND_BODY

    @property
    def is_busy(self) -> bool:
        """Whether part of a request is here that has no whole answer yet."""
        is_answering = self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY)
        return (is_answering or self.is_mid_request) and not self.transport.is_closing()

    @property
    def is_ending(self) -> bool:
        """Whether the answer that begins is the last: not if the client's next request has come already."""
        has_next = self.conn.their_state is h11.DONE and bool(self.conn.trailing_data[0].strip())
        return self.is_last or (self.service.is_draining and not has_next)

    def _watch(self) -> None:
        """Let the deadline run of what the connection waits for now, from when it began to wait for that.

        A request has one from its first byte on, and so has the unread rest of one that is answered already.
        Between requests uvicorn's keep-alive timer runs, on a new connection ours.
        """
        is_idle = self.conn.their_state is h11.IDLE
        is_awaited = (is_idle and not self.num_answered) or self.is_mid_request
        then: Callable[[], None] | None = None
        which: tuple[object, ...] = ()
        if self.real.is_closing():
            then = self.real.abort
        elif self.transport.is_closing():
            then = self._end
        elif self.flow.write_paused:
            then = self._abort_unread
        elif is_awaited or (is_idle and self.conn.trailing_data[0]):
            then, which = self._time_out, (self.num_answered, self.conn.our_state is h11.DONE, is_awaited)
        if (then, which) != self.waits_for:
            if self.timer:
                self.timer.cancel()
            self.waits_for = then, which
            if then:
                seconds = LINGER_SECONDS if then == self._end else self.service.config.receive_timeout
                self.timer = self.loop.call_later(seconds, then)

    def _count(self, event: str) -> None:
        self.service.metrics.protocol.labels(event).inc()

    def _time_out(self) -> None:
        """408 if part of a request came and no answer has begun, else silence."""
        if self.is_mid_request and self.conn.our_state in UNANSWERED:
            self._answer(ClosingError(408, "request_timeout", "the request did not arrive in time"))
        else:
            self._count("silent_timeout")
            self._end()

    def _abort_unread(self) -> None:
        self._count("unread_answer")
        self.real.abort()

    def _end(self) -> None:
        """Close for good; what is not taken by its reader in time is thrown away."""
        self.real.close()
        self._watch()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.real = transport
        if len(self.connections) >= self.service.config.max_connections:
            self._count("connection_refused")
            self.transport = transport
            transport.close()
            return
        gentle: Any = GentleTransport(transport, self._close)
        super().connection_made(gentle)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()
            return
        self.num_discarded += len(data)
        if self.num_discarded > LINGER_BYTES:
            self._end()

    def handle_events(self) -> None:
        """An empty line before a request is none of it (RFC 9112, 2.2): old clients end a body with it."""
        data = self.conn.trailing_data[0] if self.conn.their_state is h11.IDLE else b""
        if data in (b"\r", b"\r\n"):
            return
        if data.startswith(b"\r\n"):
            most = self.config.h11_max_incomplete_event_size
            self.conn = h11.Connection(h11.SERVER, most)  # type: ignore[arg-type]  # our settings have it
            self.conn.receive_data(data[2:])
        super().handle_events()

    def eof_received(self) -> None:
        self.loop.call_soon(self._watch)  # asyncio closes now, once what is buffered is taken: not for ever

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def on_response_complete(self) -> None:
        self.num_answered += 1
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Called where h11 has found a fault, whose hint says which status it is."""
        hint = getattr(sys.exception(), "error_status_hint", 400)
        if self.conn.our_state not in UNANSWERED:
            self._close()
        elif hint == 431 and self.conn.our_state is h11.IDLE:
            self._answer(HeadersTooLarge() if b"\n" in self.conn.trailing_data[0] else UrlTooLong())
        elif hint == 501:
            self._answer(ClosingError(501, "not_implemented", "of transfer codings only chunked is known"))
        else:
            self._answer(ClosingError(400, "bad_request", "this is not a sound HTTP/1.1 request"))

    def shutdown(self) -> None:
        """Nobody new gets in: answer what has come and what is about to, then close."""
        self.loop.call_later(FAREWELL_SECONDS, self._say_farewell)

    def _say_farewell(self) -> None:
        self.is_last = True
        if not self.is_busy:
            self._close()

    def _answer(self, error: RequestError) -> None:
        """Its own later answer, if it is at one, goes nowhere; it is told that its client is gone."""
        self._count(str(error.status))
        request_id = secrets.token_hex(8)
        response = error.response(request_id)
        response.headers["x-request-id"] = request_id
        headers = [*self.server_state.default_headers, *response.raw_headers]
        first = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        lines = [first, *map(b": ".join, headers), b"", bytes(response.body)]
        self.transport.write(b"\r\n".join(lines))
        self._close()

    def _close(self) -> None:
        """Half now, and half when nothing more comes from the client."""
        transport: Any = self.transport
        if transport.is_closing():
            return
        transport.closing = True
        if transport.can_write_eof():
            transport.write_eof()
        self.flow.resume_reading()
        self._watch()
