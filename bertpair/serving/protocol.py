"""uvicorn's HTTP/1.1 protocol with what it leaves open: deadlines, a cap on connections, honest errors.

A subclass that leans on private parts of one minor version of uvicorn (pinned; tests name each of them).
Whatever goes wrong below the application is answered as JSON too. A connection is half-closed first and read
dry for a while: a bare close would reset it if its client still sends, and the client would lose the answer.
Once the server drains, an answer says `Connection: close` unless the client's next request has come already,
so that no client sends one to a connection that goes away.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bertpair.serving.requests import MAX_URL_BYTES, RequestError, headers_too_large, url_too_long
from bertpair.settings.serve import ServeConfig

LINGER_SECONDS = 2.0
LINGER_BYTES = 2**20
FAREWELL_SECONDS = 1.0  # once nobody new gets in: a request that was under way has come by then
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)([/?][^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")  # no user's name
UNANSWERED = (h11.IDLE, h11.SEND_RESPONSE)  # states of ours in which an answer can still begin


class RememberingConnection(h11.Connection):
    """h11's connection; it keeps what the peer did wrong, counts requests, and can say that it ends."""

    def __init__(self, max_incomplete_event_size: int, is_ending: Callable[[], bool]) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self.is_ending = is_ending
        self.fault: h11.RemoteProtocolError | None = None
        self.num_cycles = 0
        self.skipped_cycle = -1

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE and self._skip_empty_line():
                return h11.NEED_DATA
            event = super().next_event()
            return to_origin_form(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise

    def _skip_empty_line(self) -> bool:
        """One before a request is none of it (RFC 9112, 2.2): old clients send it behind a body.

        Whether half of one is there.
        """
        buffer = self._receive_buffer
        begin = bytes(buffer)[:2]
        if self.skipped_cycle == self.num_cycles:
            return False
        if begin == b"\r\n" or begin[:1] == b"\n":
            buffer.maybe_extract_at_most(begin.index(b"\n") + 1)
            self.skipped_cycle = self.num_cycles
        return begin == b"\r"

    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response) and self.is_ending():
            others = [(name, value) for name, value in event.headers if name != b"connection"]
            headers = [*others, (b"connection", b"close")]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self.num_cycles += 1

    @property
    def has_next_request(self) -> bool:
        """Whether something came behind a request that is there whole."""
        return self.their_state is h11.DONE and bool(self.trailing_data[0].strip())

    @property
    def is_mid_request(self) -> bool:
        """Whether part of a request has come, and part has not."""
        if self.their_state is h11.IDLE:
            return bool(self.trailing_data[0])
        return self.their_state is h11.SEND_BODY


def to_origin_form(request: h11.Request) -> h11.Request:
    """A request whose target is a whole URL, as one for its path at the URL's host (RFC 9112, 3.2.2)."""
    match = _ABSOLUTE.fullmatch(request.target)
    if match is None:
        return request
    host, rest = match.groups(default=b"")
    if not _AUTHORITY.fullmatch(host):
        raise h11.RemoteProtocolError("no sound host in the request's target")
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=rest if rest.startswith(b"/") else b"/" + rest,
        headers=[(b"host", host), *headers],
        http_version=request.http_version,
    )


class GentleTransport:
    """The real transport, save that closing it asks the protocol how."""

    def __init__(self, real: asyncio.Transport, close: Callable[[], None]) -> None:
        self.real, self.close, self.closing = real, close, False

    def is_closing(self) -> bool:
        return self.closing or self.real.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class GuardedProtocol(H11Protocol):
    """One connection. `on_event` is told the status or name of each thing that was settled down here."""

    def __init__(
        self,
        *args: Any,
        settings: ServeConfig,
        on_event: Callable[[str], None],
        is_draining: Callable[[], bool],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.on_event, self.is_draining = settings, on_event, is_draining
        # Larger than what the application allows: it is the one that answers 431 and 414, after 404 and 401.
        room = settings.max_header_bytes + MAX_URL_BYTES + 1024
        self.conn: RememberingConnection = RememberingConnection(room, self._is_ending)
        self.is_refused = self.is_lost = self.is_last = False
        self.num_discarded = 0
        self.watched_cycle = -1
        self.timers: dict[str, asyncio.TimerHandle] = {}

    # Timers

    def _arm(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._disarm(name)
        self.timers[name] = self.loop.call_later(seconds, then)

    def _disarm(self, name: str) -> None:
        if timer := self.timers.pop(name, None):
            timer.cancel()

    def _watch(self) -> None:
        """Let the receive deadline run while a request is under way, from its first byte on.

        On a new connection it runs from the start; between requests uvicorn's keep-alive timer does.
        """
        conn = self.conn
        is_new = self.cycle is None and conn.their_state is h11.IDLE
        if self.transport.is_closing() or not (is_new or conn.is_mid_request):
            self._disarm("receive")
        elif "receive" not in self.timers or self.watched_cycle != conn.num_cycles:
            self.watched_cycle = conn.num_cycles
            self._arm("receive", self.settings.receive_timeout, self._give_up)

    def _give_up(self) -> None:
        """The deadline has come: 408 if part of a request came and no answer has begun, else silence."""
        self.timers.pop("receive", None)
        if self.conn.is_mid_request and self.conn.our_state in UNANSWERED:
            self._answer(RequestError(408, "request_timeout", "the request did not arrive in time"))
        else:
            self.on_event("silent_timeout")
            self._end_cycle()
            self._end()

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.settings.max_connections:
            self.is_refused = True
            self.on_event("connection_refused")
            transport.close()
            return
        gentle: Any = GentleTransport(transport, self._close)
        super().connection_made(gentle)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_refused:
            return
        self.is_lost = True
        for name in list(self.timers):
            self._disarm(name)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_refused:
            return
        if self.transport.is_closing():
            self.num_discarded += len(data)
            if self.num_discarded > LINGER_BYTES:
                self._end()
            return
        super().data_received(data)
        if self.cycle is not None and self.cycle_is_over and not self.conn.is_mid_request:
            self._stay_alive()
        self._watch()

    def _stay_alive(self) -> None:
        """What came was no request: uvicorn's timer for idle connections, which it stopped, runs on."""
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            then = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, then)

    def eof_received(self) -> None:
        if not self.is_refused:  # asyncio closes now, once what is buffered is taken: not for ever
            self._arm("abort", self.settings.receive_timeout, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm("write", self.settings.receive_timeout, self._abort_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm("write")

    # Callbacks of uvicorn

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _should_upgrade(self) -> bool:
        return False  # h2c and websocket are ignored, without a line in the log each

    def send_400_response(self, msg: str) -> None:
        self._answer(self._describe_fault())

    def shutdown(self) -> None:
        """Nobody new gets in: answer what has come and what is about to, then close."""
        if not self.is_refused:
            self._arm("farewell", FAREWELL_SECONDS, self._say_farewell)

    def _say_farewell(self) -> None:
        self.is_last = True
        if not self.is_busy:
            self._close()

    @property
    def is_busy(self) -> bool:
        """Whether part of a request is here that has no whole answer yet."""
        if self.is_refused or self.transport.is_closing():
            return False
        return not self.cycle_is_over or self.conn.is_mid_request

    def _is_ending(self) -> bool:
        return self.is_last or (self.is_draining() and not self.conn.has_next_request)

    # Errors

    def _describe_fault(self) -> RequestError:
        fault = self.conn.fault
        hint = fault.error_status_hint if fault else 400
        if hint == 431 and self.conn.their_state is not h11.SEND_BODY and self.cycle_is_over:
            if b"\n" not in self.conn.trailing_data[0]:
                return url_too_long()
            return headers_too_large(self.settings.max_header_bytes)
        if hint == 501:
            return RequestError(501, "not_implemented", "of transfer codings only chunked is known")
        return RequestError(400, "bad_request", "this is not a sound HTTP/1.1 request")

    @property
    def cycle_is_over(self) -> bool:
        """Whether no request is being answered: what came last belongs to a new one."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _answer(self, error: RequestError) -> None:
        """Answer in the application's place, if an answer can still begin, and close."""
        self.on_event(str(error.status))
        self._disarm("receive")
        self._end_cycle()
        if self.conn.our_state in UNANSWERED:
            self._write_answer(error)
        self._close()

    def _write_answer(self, error: RequestError) -> None:
        request_id = secrets.token_hex(8)
        response = error.response(request_id)
        own = {b"x-request-id": request_id.encode(), b"connection": b"close"}
        others = [(name, value) for name, value in response.raw_headers if name not in own]
        headers = [*self.server_state.default_headers, *others, *own.items()]
        is_head = not self.cycle_is_over and self.scope["method"] == "HEAD"
        body = b"" if is_head else bytes(response.body)
        for event in (
            h11.Response(status_code=response.status_code, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")

    def _end_cycle(self) -> None:
        """Tell the application, which may be waiting for the rest of a body, that its client is gone."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    # Closing

    def _close(self) -> None:
        """Close: half now, and half when nothing more comes from the client."""
        gentle: Any = self.transport
        if gentle.closing or self.is_lost:
            return
        gentle.closing = True
        self._disarm("receive")
        if gentle.real.can_write_eof() and not gentle.real.is_closing():
            gentle.real.write_eof()
        self.flow.resume_reading()
        self._arm("linger", LINGER_SECONDS, self._end)
        self._arm("abort", self.settings.receive_timeout + LINGER_SECONDS, gentle.abort)

    def _end(self) -> None:
        """Close for good; what is not taken by its reader in time is thrown away."""
        gentle: Any = self.transport
        gentle.closing = True
        gentle.real.close()
        self._arm("abort", self.settings.receive_timeout, gentle.abort)

    def _abort_unread(self) -> None:
        self.on_event("unread_answer")
        self.transport.abort()
