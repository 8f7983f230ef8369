"""Many callers, one model: requests queue on the event loop, one daemon thread runs them in batches.

A batch forms while the one before it runs. The loop decides who is admitted, in which order and until when:
there are no locks. An answer is put into its request by the row that went in: answers cannot change places.
"""

import asyncio
import contextlib
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from bertpair.runtime import is_out_of_memory, release_locals
from bertpair.serving.requests import RequestError

Row = TypeVar("Row")
Answer = TypeVar("Answer")

SAFETY = 0.8  # of the deadline: an estimate errs, and to be admitted and then dropped is worse than refused
WINDOW_BATCHES = 2  # rows are sorted by length within the oldest rows that fill so many batches; more are
# hardly worth it, and every row that is passed over waits longer than it was admitted for
ROUND_UP = 8  # a row counts as a multiple of so many tokens: what it is padded to, or costs anyhow
RECENT = 5  # batches of one size that are remembered; the slowest counts: on their mean half would be late

Closed = partial(RequestError, 503, "closed", "the server is going away", wait=1)
Overloaded = partial(RequestError, 429, "overloaded", "too many requests are waiting; see Retry-After")


class Answers(NamedTuple, Generic[Answer]):
    """A request's answers in the order of its rows, and how long it waited and ran (seconds)."""

    values: list[Answer]
    queue_seconds: float
    run_seconds: float


@dataclass
class QueueLimits:
    """What may wait, and what may run at once."""

    max_batch_tokens: int = 4096  # rows × longest of a batch; one row always goes
    max_queue_rows: int = 256
    queue_deadline: float = 5.0  # seconds; bounds the estimated wait that is admitted, and the wait itself


@dataclass(eq=False)
class _Request(Generic[Answer]):
    num_rows: int
    future: asyncio.Future[Answers[Answer]]
    submitted: float
    answers: dict[int, Answer] = field(default_factory=dict)  # by the row's index
    started: float | None = None


class _Waiting(NamedTuple, Generic[Row, Answer]):
    request: _Request[Answer]
    place: int  # of the row among its request's
    row: Row
    length: int  # as budgets count it


class MicroBatcher(Generic[Row, Answer]):
    """Runs `run(rows) -> answers` for whoever awaits `submit`, many requests to a batch.

    `run` is called on one daemon thread. It returns an answer per row, in order; an exception in an answer's
    place fails that row's request alone. `on_batch` is told a batch's rows, padded tokens and seconds, and
    whether it failed; `on_drop` of rows dropped unrun ("expired", "gone"); `on_error`, on the model's thread,
    of each exception. All methods belong to the event loop's thread.
    """

    def __init__(
        self,
        run: Callable[[list[Row]], Sequence[Answer | Exception]],
        limits: QueueLimits,
        *,
        on_batch: Callable[[int, int, float, bool], None] = lambda rows, tokens, seconds, failed: None,
        on_drop: Callable[[str, int], None] = lambda reason, num_rows: None,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.limits, self._run, self._on_batch, self._on_drop = limits, run, on_batch, on_drop
        self._waiting: deque[_Waiting[Row, Answer]] = deque()
        self._waiting_tokens = self._running_tokens = 0
        self._last_end: float | None = None  # of a batch behind which others waited: pauses count as work
        self._closed, self._wake = False, asyncio.Event()
        self._feeder = asyncio.create_task(self._feed())
        self.pace, self.worker = Pace(), Worker("inference", on_error)

    async def submit(self, rows: Sequence[Row], lengths: Sequence[int]) -> Answers[Answer]:
        """The answers for `rows` (one at least), whose `lengths` are in tokens.

        The rows are admitted, fail and expire together, whichever batches they are in. RequestError 429
        if too much waits, or what `run` raised for them. Cancelling drops what still waits.
        """
        if self._closed:
            raise Closed()
        wait, limits, loop = self.estimated_wait, self.limits, asyncio.get_running_loop()
        if len(self._waiting) + len(rows) > limits.max_queue_rows or wait > SAFETY * limits.queue_deadline:
            raise Overloaded(wait=wait)
        request = _Request[Answer](len(rows), loop.create_future(), time.monotonic())
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            padded = -(-length // ROUND_UP) * ROUND_UP
            self._waiting.append(_Waiting(request, index, row, padded))
            self._waiting_tokens += padded
        self._wake.set()
        timer = loop.call_later(limits.queue_deadline, self._expire, request)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._drop(request, "gone")
            raise
        finally:
            timer.cancel()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def estimated_wait(self) -> float:
        """Seconds until a row that came now would be run, by the pace of late; 0 while that is unknown."""
        running = self._running_tokens, self.worker.running_seconds
        return self.pace.seconds(self._waiting_tokens, *running, self.limits.max_batch_tokens)

    async def close(self, timeout: float = 0.0) -> bool:
        """Take nothing any more, fail what waits, end the thread; whether it did within `timeout` seconds."""
        self._closed = True
        self._feeder.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._feeder
        while self._waiting:
            self._fail(self._waiting[0].request, Closed())
        return await self.worker.end(timeout)

    def _expire(self, request: _Request[Answer]) -> None:
        """The deadline has come: if any row of the request still waits, all of it is over."""
        if self._drop(request, "expired"):
            message = "waited longer than the queue's deadline and was not run"
            self._fail(request, RequestError(503, "deadline_passed", message, wait=self.estimated_wait))

    def _drop(self, request: _Request[Answer], reason: str | None = None) -> bool:
        """Take its waiting rows out of the queue, and tell of them with the reason, if any. Did any wait?"""
        before = len(self._waiting)
        self._waiting = deque(waiting for waiting in self._waiting if waiting.request is not request)
        self._waiting_tokens = sum(waiting.length for waiting in self._waiting)
        num_rows = before - len(self._waiting)
        if num_rows and reason:
            self._on_drop(reason, num_rows)
        return num_rows > 0

    def _fail(self, request: _Request[Answer], error: Exception) -> None:
        if not request.future.done():
            request.future.set_exception(error)
        self._drop(request)

    async def _feed(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._take_batch():
                await self._run_batch(batch)

    def _take_batch(self) -> list[_Waiting[Row, Answer]]:
        """The next batch: the oldest row, and those of the window that go best with it."""
        overdue, budget = time.monotonic() - self.limits.queue_deadline, self.limits.max_batch_tokens
        while self._waiting and self._waiting[0].request.submitted < overdue:
            self._expire(self._waiting[0].request)
        if not self._waiting:
            return []
        size = window_size((waiting.length for waiting in self._waiting), budget)
        window = [self._waiting.popleft() for _ in range(size)]
        chosen = choose_batch([waiting.length for waiting in window], budget)
        self._waiting.extendleft(window[i] for i in sorted({*range(size)} - {*chosen}, reverse=True))
        self._waiting_tokens -= sum(window[i].length for i in chosen)
        return [window[i] for i in chosen]

    async def _run_batch(self, batch: list[_Waiting[Row, Answer]]) -> None:
        """Run it; where it fails, run its halves, so that a poisoned request fails alone.

        A batch is halved between requests. One request that runs out of memory is halved once itself.
        """
        error = await self._run_rows(batch)
        requests = list(dict.fromkeys(waiting.request for waiting in batch))
        if error and len(requests) > 1:
            middle = len(requests) // 2
            for half in (set(requests[:middle]), set(requests[middle:])):
                await self._run_batch([w for w in batch if w.request in half and not w.request.future.done()])
            return
        if error and is_out_of_memory(error) and len(batch) > 1:
            middle = len(batch) // 2
            error = await self._run_rows(batch[:middle]) or await self._run_rows(batch[middle:])
        if error and is_out_of_memory(error):
            error = RequestError(503, "no_memory", "not enough memory for this request", wait=1)
        if error:
            self._fail(requests[0], error)

    async def _run_rows(self, batch: list[_Waiting[Row, Answer]]) -> Exception | None:
        """Run these rows and hand out their answers; the exception if there was one."""
        if not batch:
            return None
        began, error = time.monotonic(), None
        for waiting in batch:
            waiting.request.started = waiting.request.started or began
        rows, lengths = [waiting.row for waiting in batch], [waiting.length for waiting in batch]
        self._running_tokens = tokens = sum(lengths)
        answered: list[tuple[_Waiting[Row, Answer], Answer | Exception]] = []
        try:
            # The pairs are made on the thread: a wrong number of answers is an error of the batch.
            answered = await self.worker.call(lambda: list(zip(batch, self._run(rows), strict=True)))
        except Exception as raised:
            error = raised
        finally:
            self._running_tokens = 0
        ended = time.monotonic()
        self._on_batch(len(rows), max(lengths) * len(rows), ended - began, error is not None)
        if error is None:
            self.pace.note(tokens, ended - (self._last_end or began))
        for (request, place, *_), answer in answered:
            if isinstance(answer, Exception):
                self._fail(request, answer)
                continue
            request.answers[place] = answer
            if len(request.answers) == request.num_rows and not request.future.done():
                values = [request.answers[place] for place in range(request.num_rows)]
                started = request.started or request.submitted
                waited, ran = started - request.submitted, time.monotonic() - started
                request.future.set_result(Answers(values, waited, ran))
        self._last_end = ended if self._waiting else None
        return error


def window_size(lengths: Iterable[int], max_batch_tokens: int) -> int:
    """How many of the oldest rows (their `lengths` in the order they came) are looked at; one at least."""
    limit = WINDOW_BATCHES * max_batch_tokens
    return max(1, sum(1 for _ in itertools.takewhile(limit.__ge__, itertools.accumulate(lengths))))


def choose_batch(lengths: Sequence[int], max_batch_tokens: int) -> list[int]:
    """Positions in the window (oldest first) of the rows to run, by length; 0, the oldest, is among them.

    They are neighbours when sorted by length. Of the slices that hold the oldest row and whose longest ×
    count is within `max_batch_tokens`, the one with the most tokens that are no padding; or the oldest alone.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    oldest, totals = order.index(0), [0, *itertools.accumulate(lengths[i] for i in order)]
    best, most = [0], 0
    for last in range(oldest, len(order)):
        first = max(0, last + 1 - max_batch_tokens // lengths[order[last]])
        if first > oldest:
            break
        if totals[last + 1] - totals[first] > most:
            best, most = order[first : last + 1], totals[last + 1] - totals[first]
    return best


class Pace:
    """Seconds a token takes, kept apart by the size of the batch: in a small batch tokens cost more."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}  # by bit length: of one size within a factor of 2

    def note(self, tokens: int, seconds: float) -> None:
        self._recent.setdefault(tokens.bit_length(), deque(maxlen=RECENT)).append(seconds / tokens)

    def seconds_per_token(self, tokens: int) -> float:
        """In batches of `tokens`, or of the size nearest to it that was ever seen; 0 before any."""
        nearest = min(self._recent, key=lambda size: abs(size - tokens.bit_length()), default=0)
        return max(self._recent.get(nearest, (0.0,)))

    def seconds(self, waiting: int, running: int, running_seconds: float, largest: int) -> float:
        """Until `waiting` tokens, and those `running` for `running_seconds`, are done; 0 if there are none.

        Where more waits than the `largest` batch holds, the window lets others pass: a batch more.
        """
        ahead = waiting + running
        batch = min(ahead, largest)
        pace = self.seconds_per_token(batch)
        # A late batch of like size tells more than those before it; a much smaller one is all overhead.
        if running and 2 * running >= batch:
            pace = max(pace, running_seconds / running)
        return (ahead + (largest if waiting > largest else 0)) * pace


class Worker:
    """One thread, used from the event loop. A daemon: a function that hangs cannot hold up the exit."""

    def __init__(self, name: str, on_error: Callable[[BaseException], None] = lambda error: None) -> None:
        self._on_error, self._ended = on_error, False
        self._began: float | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """What `function` returns or raises (a SystemExit as a RuntimeError), once the thread is free for it.

        Cancelled while it runs, the caller is let go; the thread still finishes, and others wait for that.
        """
        done: Future[Any] = Future()
        self._jobs.put((done, function))
        return await asyncio.wrap_future(done)

    @property
    def running_seconds(self) -> float:
        """For how long it has been at what it is at: 0 between calls, endless if the thread is dead."""
        if not self._thread.is_alive() and not self._ended:
            return math.inf
        began = self._began  # read once: the thread writes it
        return 0.0 if began is None else time.monotonic() - began

    async def end(self, timeout: float) -> bool:
        """Let the thread end after what it is at; whether it did within `timeout` seconds."""
        # A daemon that is inside a library when the interpreter goes is killed there, which may abort it all.
        self._ended = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(*job)
            del job  # not kept until the next one comes: it holds a batch and its answers

    def _run(self, done: Future[Any], function: Callable[[], Any]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        self._began = time.monotonic()
        try:
            value = function()
        except BaseException as error:
            self._on_error(error)
            release_locals(error)  # or it would hold a batch for as long as it is kept
            self._began = None
            done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            self._began = None
            done.set_result(value)
