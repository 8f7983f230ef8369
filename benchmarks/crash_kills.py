"""Trainings killed with SIGKILL, at moments drawn by phase, and resumed until they are done.

A kill sits before a numbered event of a place (a save's k-th system call, a batch of an evaluation), or comes
by the clock. Between two kills nothing may look whole that is not.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_child import Board, Settings, let_it, outcome, start, temporary, wait

from bertpair.checkpoints.checkpoint import final_folder, list_checkpoints
from bertpair.checkpoints.manifest import MANIFEST_NAME, verify_folder
from bertpair.errors import CheckpointError

FIRST_STEADY_SAVE = 10  # from this step on every save also prunes one checkpoint
SAVES_PER_RUN = 7


@dataclass(frozen=True)
class Kill:
    """Before event `number` of a place; of saves, the first one from `step` on. Or after `seconds`."""

    place: str
    number: int = 0
    step: int = 0
    seconds: float = 0.0

    def is_at(self, place: str, number: int) -> bool:
        if self.place != "save":
            return (place, number) == (self.place, self.number)
        kind, _, step = place.partition(" ")
        return kind == "save" and int(step) >= self.step and number == self.number


@dataclass
class Uninterrupted:
    """The run that all others are compared with, and what happens in it."""

    events: dict[str, list[str]]  # place → names of its events
    seconds: float
    outcome: dict[str, object]

    @property
    def save(self) -> list[str]:
        """The events of a save that prunes one checkpoint: the most frequent kind."""
        steady = [
            tuple(names)
            for place, names in self.events.items()
            if place.startswith("save ") and int(place.split()[1]) >= FIRST_STEADY_SAVE
        ]
        return list(Counter(steady).most_common(1)[0][0])


@dataclass
class Tally:
    """What came of all runs."""

    runs: int = 0
    identical: int = 0
    fell: Counter[str] = field(default_factory=Counter)  # phase → kills
    gaps: set[tuple[int, str]] = field(default_factory=set)  # of a save: number and name of the next call
    troubles: list[str] = field(default_factory=list)


def run_uninterrupted(settings: Settings, folder: Path) -> Uninterrupted:
    """Train once without a kill; every event is noted through a file."""
    notes, log = folder / "events", folder / "log"

    def act(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        events.append(f"{place}\t{name}\n")
        if (place, name) == ("final", "return"):
            notes.write_text("".join(events))
        return real(*args, **kwargs)

    events: list[str] = []
    settings = {**settings, "output_dir": str(folder / "uninterrupted")}
    started = time.monotonic()
    code = wait(start(settings, act, Board(), log))
    seconds = time.monotonic() - started
    assert code == 0, log.read_text()
    places: dict[str, list[str]] = {}
    for line in notes.read_text().splitlines():
        place, name = line.split("\t")
        places.setdefault(place, []).append(name)
    return Uninterrupted(places, seconds, outcome(folder / "uninterrupted"))


def draw_kills(count: int, whole: Uninterrupted, rng: random.Random) -> list[list[Kill]]:
    """The kills of each run: a third within saves, a tenth each in three phases, the rest in steps."""
    tenth = max(1, count // 10)
    saves = max(1, count * 34 // 100)
    gaps = len(whole.save)
    if gaps > saves * SAVES_PER_RUN:  # too few runs for every gap
        chosen = sorted(rng.sample(range(1, gaps + 1), saves * SAVES_PER_RUN))
    else:
        chosen = list(range(1, gaps + 1))
    runs = []
    for index in range(saves):
        numbers = chosen[index::saves]  # ascending: only a run's last kill falls into the pruning
        kills = [Kill("save", number, FIRST_STEADY_SAVE + 2 * i) for i, number in enumerate(numbers)]
        runs.append([*kills, _draw(["final"], whole, rng)])
    moves = len(whole.events["move"])
    for index in range(tenth):
        number = 2 + round(index * (moves - 2) / max(1, tenth - 1))  # 1: there is nothing to move yet
        runs.append([Kill("move", min(number, moves)), Kill("move", rng.randint(2, moves // 2))])
    runs += [[_draw(["evaluation"], whole, rng)] for _ in range(tenth)]
    early = ["begin", "step 1", "step 2", "save 2"]
    runs += [[_draw(early, whole, rng), _draw(["step 2"], whole, rng)] for _ in range(tenth)]
    steps = [place for place in whole.events if place.startswith("step ")]
    for index in range(count - len(runs)):
        by_clock = [Kill("clock", seconds=rng.uniform(0.1, whole.seconds))] if index % 2 else []
        runs.append([_draw(steps, whole, rng), *by_clock])
    return runs


def _draw(places: list[str], whole: Uninterrupted, rng: random.Random) -> Kill:
    place = rng.choice(places)
    return Kill(place, rng.randint(1, len(whole.events[place])))


def run_with_kills(
    settings: Settings, folder: Path, kills: list[Kill], kill_now: Callable[[], None], tally: Tally
) -> dict[str, object] | None:
    """Start a training until it has died of each kill that it reaches, then until it is done; its outcome."""
    output_dir, log, board = folder / "killed", folder / "log", Board()
    settings = {**settings, "output_dir": str(output_dir)}
    died = 0
    for kill in [*kills, None]:
        code = wait(_start_and_kill(settings, kill, kill_now, board, log))
        if code == 0:
            break
        if code not in (-signal.SIGKILL, -signal.SIGTERM):
            tally.troubles.append(f"exit code {code} with {kill}: {log.read_text()[-2000:]}")
            return None
        died += 1
        _note(board.read(), tally)
        tally.troubles += [f"{kill}: {fault}" for fault in false_appearances(output_dir)]
    if not died:
        tally.troubles.append(f"none of {kills} was reached")
        return None
    tally.troubles += [f"left behind by {kills}: {name}" for name in temporary(output_dir)]
    return outcome(output_dir)


def _start_and_kill(
    settings: Settings, kill: Kill | None, kill_now: Callable[[], None], board: Board, log: Path
) -> int:
    def act(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if kill is not None and kill.is_at(place, number):
            kill_now()
        return real(*args, **kwargs)

    child = start(settings, act if kill else let_it, board, log)
    if kill is not None and kill.seconds:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)  # unreaped, so its number is still its own even if it is done
    return child


def _note(where: str, tally: Tally) -> None:
    place, _, event = where.partition(": ")
    number, _, name = event.partition(" ")
    phase, _, step = place.partition(" ")
    if phase == "save" and int(step) >= FIRST_STEADY_SAVE:
        tally.gaps.add((int(number), name))
    if place in ("save 2", "step 1", "step 2", "begin", "preparation"):
        phase = "before the first checkpoint"
    named = {"save": "within a save", "final": "within a save", "move": "while the final folder moves"}
    tally.fell[{**named, "evaluation": "in an evaluation", "step": "in a step"}.get(phase, phase)] += 1


def false_appearances(output_dir: Path) -> list[str]:
    """What looks whole in a folder where a training was just killed, and is not."""
    faults = []
    folders = [path for _, path in list_checkpoints(output_dir)]
    model = final_folder(output_dir)
    if (model / MANIFEST_NAME).is_file():
        folders.append(model)
    for folder in folders:
        try:
            verify_folder(folder)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def try_kills(
    count: int,
    settings: Settings,
    folder: Path,
    kill_now: Callable[[], None],
    seed: int,
    say: Callable[[str], None],
) -> bool:
    """`count` runs with kills; prints how many ended like the uninterrupted one, and where the kills fell."""
    whole = run_uninterrupted(settings, folder)
    tally = Tally()
    for kills in draw_kills(count, whole, random.Random(seed)):
        tally.runs += 1
        found = run_with_kills(settings, folder, kills, kill_now, tally)
        if found is not None and found != whole.outcome:
            differing = [name for name in whole.outcome if found.get(name) != whole.outcome[name]]
            tally.troubles.append(f"{kills}: other {', '.join(differing)}")
        tally.identical += found == whole.outcome
        shutil.rmtree(folder / "killed", ignore_errors=True)
    for trouble in tally.troubles:
        say(trouble)
    say(f"{tally.identical}/{tally.runs} identical")
    say(
        f"{tally.fell.total()} kills: " + ", ".join(f"{n} {phase}" for phase, n in sorted(tally.fell.items()))
    )
    gaps = set(enumerate(whole.save, 1))
    say(f"gaps between the system calls of a save: {len(gaps & tally.gaps)} of {len(gaps)} hit")
    return tally.identical == tally.runs and not tally.troubles
