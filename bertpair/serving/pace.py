"""How long a queue will take, from the batches that ran lately: rather too long than too short."""

from __future__ import annotations

from collections import deque

RECENT = 5  # batches of one size that are remembered; the slowest of them counts


class Pace:
    """Seconds a token takes, kept apart by the size of the batch: in a small batch tokens cost more.

    The slowest of the recent batches counts and not their mean: who is let in on a mean is too late half the
    time. The more the batches differ, the larger the margin grows by itself.
    """

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}  # by bit length: of one size within a factor of 2

    def note(self, tokens: int, seconds: float) -> None:
        """A batch of so many tokens, without padding, took so long."""
        size = tokens.bit_length()
        self._recent.setdefault(size, deque(maxlen=RECENT)).append(seconds / max(1, tokens))

    def seconds_per_token(self, tokens: int) -> float:
        """In batches of `tokens`, or of the size nearest to it that was ever seen; 0 before any."""
        if not self._recent:
            return 0.0
        nearest = min(self._recent, key=lambda size: abs(size - tokens.bit_length()))
        return max(self._recent[nearest])

    def seconds(self, waiting: int, running: int, running_seconds: float, largest: int) -> float:
        """Until `waiting` tokens, and those `running` for `running_seconds`, are done; 0 if there are none.

        They go in batches of at most `largest` tokens. Where more waits than one holds, the window lets rows
        of another length pass: a batch more. A running batch much smaller than those is all overhead and
        says nothing of them.
        """
        ahead = waiting + running
        batch = min(ahead, largest)
        pace = self.seconds_per_token(batch)
        if running and 2 * running >= batch:  # of like size, and late: that tells more than those before it
            pace = max(pace, running_seconds / running)
        passed_over = largest if waiting > largest else 0
        return (ahead + passed_over) * pace
