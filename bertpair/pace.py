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
        """Until `waiting` tokens, and those `running` for so long already, are done in batches of `largest`.

        Where more waits than a batch holds, rows of another length pass some in the window: a batch more.
        """
        batch = min(waiting + running, largest)
        pace = self.seconds_per_token(batch)
        if (
            2 * running >= batch
        ):  # late already, it tells more than those before it; a small one is all overhead
            pace = max(pace, running_seconds / max(1, running))
        return (waiting + running + (largest if waiting > largest else 0)) * pace
