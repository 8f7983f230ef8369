"""When things happen in a run, in optimizer steps, and how far it has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps."""

    total_steps: int
    steps_per_epoch: int
    learning_rate: Callable[[int], float]  # updates done before → the next one's rate
    logging_steps: int  # 0: only the last step
    save_steps: int  # 0: none but what evaluation asks for
    eval_steps: int  # 0: no evaluation within training
    metric: str
    patience: int | None
    max_skipped_steps: int

    def logs_at(self, step: int) -> bool:
        return step == self.total_steps or (self.logging_steps > 0 and step % self.logging_steps == 0)

    def evaluates_at(self, step: int) -> bool:
        return self.eval_steps > 0 and (step == self.total_steps or step % self.eval_steps == 0)

    def saves_at(self, step: int) -> bool:
        return self.save_steps > 0 and step % self.save_steps == 0

    def checkpoints_kept(self, limit: int | None) -> int:
        """How many checkpoints the run is sure to keep: those of save_steps up to `limit`, and a best one."""
        regular = -(-self.total_steps // self.save_steps) if self.save_steps else 0  # the last step's too
        if not self.eval_steps:
            return regular if limit is None else min(limit, regular)
        return max(1, regular) if limit is None else min(limit, regular) + 1


@dataclasses.dataclass
class Progression:
    """How far a run has come; kept in trainer_state.json."""

    global_step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    evaluation_pending: bool = False
