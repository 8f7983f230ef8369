"""The queue alone, without HTTP and without a model: any callable will do.

The loop and the thread are real; only the callables are made for the occasion. Where a test needs the thread
to be busy, the callable waits for an event that the test sets, so nothing rests on how fast the machine is.
"""

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from bertpair.runtime import is_out_of_memory
from bertpair.serving.batcher import ROUND_UP, MicroBatcher, QueueLimits
from bertpair.serving.requests import RequestError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def digest(row: str) -> str:
    return hashlib.sha256(row.encode()).hexdigest()


def digests(rows: list[str]) -> list[str]:
    return [digest(row) for row in rows]


class Gate:
    """A callable whose first call waits until the test opens it; it keeps what each call was given."""

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]] = digests) -> None:
        self.run, self.calls = run, list[list[Any]]()
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, rows: list[Any]) -> Sequence[Any]:
        self.calls.append(rows)
        self.entered.set()
        assert self.open.wait(20)
        return self.run(rows)


@contextlib.asynccontextmanager
async def batching(run: Callable[..., Any], **settings: Any) -> AsyncIterator[MicroBatcher[Any, Any]]:
    hooks = {name: settings.pop(name) for name in ("on_batch", "on_drop") if name in settings}
    batcher = MicroBatcher[Any, Any](run, QueueLimits(**settings), **hooks)
    try:
        yield batcher
    finally:
        if isinstance(run, Gate):
            run.open.set()
        await batcher.close()


async def busy(batcher: MicroBatcher[Any, Any], gate: Gate, row: str = "first") -> "asyncio.Task[Any]":
    """A request that the thread is at."""
    task = asyncio.create_task(batcher.submit([row], [8]))
    assert await asyncio.to_thread(gate.entered.wait, 20)
    return task


async def test_every_answer_is_that_of_its_own_row() -> None:
    """20,000 rows in requests of 1 to 8 rows from 40 clients; the benchmark does it with 100,000."""
    rng = random.Random(3)

    async def client(name: int, batcher: MicroBatcher[str, str]) -> int:
        done = 0
        while done < 500:
            rows = [f"{name}/{done + i}" for i in range(rng.randint(1, 8))]
            answers = await batcher.submit(rows, [rng.randint(1, 64) for _ in rows])
            assert answers.values == digests(rows)
            done += len(rows)
        return done

    async with batching(digests, max_batch_tokens=1024, max_queue_rows=400, queue_deadline=60) as batcher:
        done = await asyncio.gather(*(client(name, batcher) for name in range(40)))
    assert sum(done) >= 20_000


async def test_a_batch_forms_while_the_one_before_runs() -> None:
    gate = Gate()
    async with batching(gate, max_batch_tokens=80) as batcher:
        tasks = [await busy(batcher, gate)]
        tasks += [asyncio.create_task(batcher.submit([f"row {i}"], [8])) for i in range(15)]
        await asyncio.sleep(0)
        assert batcher.num_waiting == 15
        gate.open.set()
        answers = await asyncio.gather(*tasks)
    assert [len(call) for call in gate.calls] == [1, 10, 5]
    assert [a.values for a in answers[1:]] == [[digest(f"row {i}")] for i in range(15)]
    assert all(a.queue_seconds >= 0 and a.run_seconds >= 0 for a in answers)


async def test_rows_that_were_passed_over_keep_their_order() -> None:
    gate = Gate()
    async with batching(gate, max_batch_tokens=24) as batcher:
        tasks = [await busy(batcher, gate)]
        for row, length in (("a", 24), ("b", 8), ("c", 16)):  # one batch each: none goes with its neighbour
            tasks.append(asyncio.create_task(batcher.submit([row], [length])))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*tasks)
    assert gate.calls == [["first"], ["a"], ["b"], ["c"]]


async def test_a_request_may_ride_in_several_batches_and_answers_stay_in_order() -> None:
    lengths = [64, 7, 32, 8, 64, 13, 8]
    rows = [f"row {i}" for i in range(7)]
    reports: list[tuple[int, int, float, bool]] = []  # rows, padded tokens, seconds, failed
    async with batching(
        digests, max_batch_tokens=64, on_batch=lambda *report: reports.append(report)
    ) as batcher:
        answers = await batcher.submit(rows, lengths)
    assert answers.values == digests(rows)
    assert len(reports) > 2 and all(tokens <= 64 and not failed for _, tokens, _, failed in reports)
    assert sum(num_rows for num_rows, *_ in reports) == 7
    assert all(tokens % ROUND_UP == 0 for _, tokens, _, _ in reports)


async def test_a_poisoned_request_fails_alone() -> None:
    def run(rows: list[str]) -> list[str]:
        if "poison" in rows:
            raise ZeroDivisionError("of this row")
        return digests(rows)

    gate = Gate(run)
    reports: list[tuple[int, int, float, bool]] = []  # rows, padded tokens, seconds, failed
    async with batching(gate, on_batch=lambda *report: reports.append(report)) as batcher:
        tasks = [await busy(batcher, gate)]
        tasks += [asyncio.create_task(batcher.submit([f"row {i}", "also"], [8, 8])) for i in range(9)]
        poisoned = asyncio.create_task(batcher.submit(["good", "poison", "good"], [8, 16, 8]))
        tasks += [asyncio.create_task(batcher.submit([f"late {i}"], [16])) for i in range(9)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(*tasks)
        with pytest.raises(ZeroDivisionError, match="of this row"):
            await poisoned
        assert (await batcher.submit(["after"], [8])).values == [digest("after")]
    assert [a.values[0] for a in answers[1:10]] == [digest(f"row {i}") for i in range(9)]
    assert any(failed for *_, failed in reports) and not reports[-1][-1]


async def test_an_exception_in_an_answers_place_fails_that_request() -> None:
    def run(rows: list[float]) -> list[float | Exception]:
        return [ValueError("not a number") if row < 0 else row for row in rows]

    async with batching(run) as batcher:
        good, bad = await asyncio.gather(
            batcher.submit([1.0, 2.0], [8, 8]), batcher.submit([1.0, -1.0], [8, 8]), return_exceptions=True
        )
    assert not isinstance(good, BaseException) and good.values == [1.0, 2.0]
    assert isinstance(bad, ValueError)


async def test_a_failed_batch_does_not_stop_the_next() -> None:
    failures = iter([True, False, True, True])

    def run(rows: list[str]) -> list[str]:
        if next(failures, False):
            raise SystemExit("even this")
        return digests(rows)

    async with batching(run) as batcher:
        for fails in (True, False, True, True, False):
            if fails:
                with pytest.raises(RuntimeError, match="even this"):
                    await batcher.submit(["a"], [8])
            else:
                assert (await batcher.submit(["a"], [8])).values == digests(["a"])


async def test_a_wrong_number_of_answers_is_a_failure_and_no_mix_up() -> None:
    async with batching(lambda rows: rows[:-1]) as batcher:
        with pytest.raises(ValueError, match="shorter"):
            await batcher.submit(["a", "b"], [8, 8])


async def test_out_of_memory_halves_a_request_once() -> None:
    room = 4

    def run(rows: list[str]) -> list[str]:
        if len(rows) > room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return digests(rows)

    rows = [f"row {i}" for i in range(8)]
    async with batching(run) as batcher:
        assert (await batcher.submit(rows, [8] * 8)).values == digests(rows)
        room = 3
        with pytest.raises(RequestError, match="not enough memory"):
            await batcher.submit(rows, [8] * 8)
        assert (await batcher.submit(rows[:3], [8] * 3)).values == digests(rows[:3])
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("too small"))


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    gate = Gate()
    async with batching(gate, max_queue_rows=4) as batcher:
        first = await busy(batcher, gate)
        waiting = asyncio.create_task(batcher.submit(["a", "b", "c"], [8] * 3))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="too many requests") as refused:
            await batcher.submit(["d", "e"], [8, 8])  # admitted together or not at all
        assert int(refused.value.headers["Retry-After"]) >= 1 and refused.value.status == 429
        last = asyncio.create_task(batcher.submit(["d"], [8]))
        await asyncio.sleep(0)
        assert batcher.num_waiting == 4
        gate.open.set()
        await asyncio.gather(first, waiting, last)


async def test_admission_is_by_the_estimated_wait() -> None:
    gate = Gate()
    async with batching(gate, queue_deadline=20.0, max_queue_rows=10_000) as batcher:
        batcher.pace.note(10, 1.0)  # tokens a second
        first = await busy(batcher, gate)
        tasks = []
        with pytest.raises(RequestError, match="too many requests") as refused:
            for i in range(100):
                tasks.append(asyncio.create_task(batcher.submit([str(i)], [8])))
                await asyncio.sleep(0)
                if tasks[-1].done():
                    await tasks.pop()
        # 8 run and 20 × 8 wait: 168 tokens at 10 a second are more than eight tenths of twenty seconds
        assert len(tasks) == 20 and refused.value.headers["Retry-After"] == "17"
        gate.open.set()
        await asyncio.gather(first, *tasks)
        assert batcher.estimated_wait == 0.0


@pytest.mark.slow
async def test_a_pause_between_batches_does_not_count_as_work() -> None:
    """Else the next burst would be refused for an estimate of minutes."""
    async with batching(digests, queue_deadline=5.0, max_queue_rows=10_000) as batcher:
        for pause in (0.5, 0.5, 0):
            await batcher.submit(["a"], [8])
            await asyncio.sleep(pause)
        await asyncio.gather(*(batcher.submit([f"{i}"], [8]) for i in range(150)))


async def test_what_waits_past_the_deadline_is_dropped_unrun() -> None:
    gate = Gate()
    dropped: list[tuple[str, int]] = []
    async with batching(
        gate, queue_deadline=0.2, on_drop=lambda reason, n: dropped.append((reason, n))
    ) as batcher:
        first = await busy(batcher, gate)
        began = time.monotonic()
        with pytest.raises(RequestError, match="deadline") as expired:
            await batcher.submit(["late", "too"], [8, 8])
        assert time.monotonic() - began > 0.15 and expired.value.status == 503
        assert batcher.num_waiting == 0
        gate.open.set()
        assert (await first).values == [digest("first")]  # it ran already: no deadline for that
        assert (await batcher.submit(["next"], [8])).values == [digest("next")]
    assert dropped == [("expired", 2)] and ["late"] not in gate.calls and len(gate.calls) == 2


async def test_rows_of_one_request_expire_together_though_some_have_run() -> None:
    gate = Gate()
    async with batching(gate, queue_deadline=0.2, max_batch_tokens=8) as batcher:
        task = asyncio.create_task(batcher.submit(["runs", "waits"], [8, 8]))
        assert await asyncio.to_thread(gate.entered.wait, 20)
        with pytest.raises(RequestError, match="deadline"):
            await task
        gate.open.set()
        for _ in range(2):  # behind the batch that runs, and behind the one that must not follow it
            await batcher.worker.call(lambda: None)
    assert gate.calls == [["runs"]]


async def test_a_client_that_has_gone_has_its_waiting_rows_dropped() -> None:
    gate = Gate()
    dropped: list[tuple[str, int]] = []
    async with batching(gate, on_drop=lambda reason, n: dropped.append((reason, n))) as batcher:
        first = await busy(batcher, gate)
        gone = asyncio.create_task(batcher.submit(["gone", "gone too"], [8, 8]))
        stays = asyncio.create_task(batcher.submit(["stays"], [8]))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.num_waiting == 1
        first.cancel()  # being run: let run, nobody is answered
        gate.open.set()
        assert (await stays).values == [digest("stays")]
    assert dropped == [("gone", 2)] and gate.calls == [["first"], ["stays"]]


async def test_a_hang_is_seen_and_what_waits_expires() -> None:
    gate = Gate()
    async with batching(gate, queue_deadline=0.1) as batcher:
        assert batcher.worker.running_seconds == 0.0
        first = await busy(batcher, gate)
        with pytest.raises(RequestError, match="deadline"):
            await batcher.submit(["waits"], [8])
        assert batcher.worker.running_seconds >= 0.1
        gate.open.set()
        await first
        assert batcher.worker.running_seconds == 0.0


async def test_call_runs_on_the_same_thread_between_batches() -> None:
    names: list[str] = []

    def run(rows: list[str]) -> list[str]:
        names.append(threading.current_thread().name)
        return digests(rows)

    async with batching(run) as batcher:
        await batcher.submit(["a"], [8])
        assert await batcher.worker.call(lambda: threading.current_thread().name) == names[0] == "inference"
        with pytest.raises(KeyError):
            await batcher.worker.call(lambda: {}["nothing"])
        await batcher.submit(["a"], [8])


async def test_close_fails_what_waits_and_what_comes() -> None:
    gate = Gate()
    async with batching(gate) as batcher:
        await busy(batcher, gate)
        waits = asyncio.create_task(batcher.submit(["waits"], [8]))
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(RequestError, match="going away"):
            await waits
    with pytest.raises(RequestError, match="going away"):
        await batcher.submit(["a"], [8])


async def test_close_says_whether_the_thread_has_ended() -> None:
    gate = Gate()
    async with batching(gate) as batcher:
        first = await busy(batcher, gate)
        first.cancel()  # nobody waits for it, and the thread is still at it
        assert not await batcher.close(0.05)
        gate.open.set()
        assert await batcher.close(20)
    async with batching(digests) as batcher:
        await batcher.submit(["a"], [8])
        assert await batcher.close(20)
