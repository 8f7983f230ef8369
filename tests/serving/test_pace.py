"""The pace of batches: what is remembered, and what admission makes of it."""

import asyncio
import math
import time

import pytest

from bertpair.serving.batcher import RECENT, MicroBatcher, Pace, QueueLimits
from bertpair.serving.requests import RequestError


def test_the_slowest_of_the_recent_batches_counts() -> None:
    pace = Pace()
    assert pace.seconds_per_token(100) == 0.0
    for seconds in (9.0, *[1.0] * (RECENT - 1)):
        pace.note(100, seconds)
    assert pace.seconds_per_token(100) == pytest.approx(0.09)
    pace.note(100, 2.0)  # the slow one is forgotten
    assert pace.seconds_per_token(100) == pytest.approx(0.02)


def test_batches_of_another_size_are_another_matter() -> None:
    pace = Pace()
    for _ in range(100):
        pace.note(8, 0.016)  # one row at a time: mostly overhead
    assert pace.seconds_per_token(1000) == pytest.approx(0.002)  # the best guess there is
    pace.note(1000, 0.2)
    assert pace.seconds_per_token(1000) == pace.seconds_per_token(600) == pytest.approx(0.0002)
    assert pace.seconds_per_token(8) == pytest.approx(0.002)


def test_nothing_ahead_is_no_wait_though_the_thread_is_dead() -> None:
    pace = Pace()
    pace.note(100, 1.0)
    assert pace.seconds(0, 0, math.inf, 400) == 0.0
    assert pace.seconds(100, 0, math.inf, 400) == pytest.approx(1.0)


async def _admitted(batcher: MicroBatcher[str, str], count: int) -> tuple[int, list[int]]:
    """How many of `count` rows of 8 tokens, sent at once, are let in; what the others are told."""
    tasks = [asyncio.create_task(batcher.submit([str(i)], [8])) for i in range(count)]
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [int(answer.headers["Retry-After"]) for answer in answers if isinstance(answer, RequestError)]
    assert len(refused) == sum(isinstance(answer, BaseException) for answer in answers)
    return count - len(refused), refused


def _burst(notes: list[tuple[int, float]], *, first: int = 8, late: float = 0.0) -> tuple[int, list[int]]:
    """200 rows of 8 tokens at once, while a row of `first` tokens runs for half of `late` seconds already."""
    naps = iter([late])

    def answer(rows: list[str]) -> list[str]:
        time.sleep(next(naps, 0))
        return rows

    async def burst() -> tuple[int, list[int]]:
        batcher = MicroBatcher[str, str](answer, QueueLimits(400, 10_000, 2.0))
        for tokens, seconds in notes:
            batcher.pace.note(tokens, seconds)
        running = asyncio.create_task(batcher.submit(["first"], [first]))
        await asyncio.sleep(late / 2)
        found = await _admitted(batcher, 200)
        await running
        await batcher.close()
        return found

    return asyncio.run(burst())


def test_a_burst_after_single_requests_is_let_in() -> None:
    """A token of a single row takes 20 ms, of a full batch 0.5 ms: 1,600 tokens are 0.8 s and not 32."""
    assert _burst([(400, 0.2), *[(8, 0.16)] * 50])[0] == 200


def test_a_burst_beyond_the_deadline_is_not() -> None:
    """At 2 ms a token, 1.6 s are 800 tokens, a batch of 400 of them for those that may pass in the window."""
    admitted, refused = _burst([(400, 0.8)])
    assert 48 <= admitted <= 55 and set(refused) == {2}


@pytest.mark.slow
def test_a_full_batch_that_is_late_counts_before_it_ends() -> None:
    """Half a second so far for 400 tokens that were to take 40 ms."""
    admitted, refused = _burst([(400, 0.04)], first=400, late=1.0)
    assert admitted < 100 and len(refused) > 100


@pytest.mark.slow
def test_a_small_batch_that_is_late_does_not_speak_for_full_ones() -> None:
    """As long for 8 tokens: at that pace 1,600 would take 100 s."""
    assert _burst([(8, 0.008), (400, 0.04)], late=1.0) == (200, [])
