"""One daemon thread that calls functions for an event loop; it can be asked how long it has been at one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Worker:
    """Made and used on the event loop's thread. A daemon: a function that hangs cannot hold up the exit.

    `on_error` is called on the thread with each exception that a function raised, before anybody else.
    """

    def __init__(self, name: str, on_error: Callable[[BaseException], None] = lambda error: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_error = on_error
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._began: float | None = None
        self._ended = False
        self._free = asyncio.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """What `function` returns or raises (a SystemExit as a RuntimeError), once the thread is free for it.

        Cancelled while it runs, the caller is let go; the thread still finishes, and others wait for that.
        """
        await self._free.acquire()
        done: asyncio.Future[Any] = self._loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            self._began = None
            self._free.release()
            if done.cancelled():
                return
            if error is None:
                done.set_result(value)
            else:
                done.set_exception(error)

        def job() -> None:
            value, error = None, None
            try:
                value = function()
            except BaseException as raised:
                self._on_error(raised)
                error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self._loop.call_soon_threadsafe(settle, value, error)

        self._began = time.monotonic()
        self._jobs.put(job)
        return await done

    @property
    def running_seconds(self) -> float:
        """For how long it has been at what it is at: 0 between calls, endless if the thread is dead."""
        if not self._thread.is_alive() and not self._ended:
            return math.inf
        return 0.0 if self._began is None else time.monotonic() - self._began

    async def end(self, timeout: float) -> bool:
        """Let the thread end after what it is at; whether it did within `timeout` seconds.

        A daemon that is inside a library when the interpreter goes is killed there, which may abort it all.
        """
        self._ended = True
        self._jobs.put(None)
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # not kept until the next one comes: it holds a batch and its answers
