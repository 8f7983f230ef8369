"""Every system call of a save failing in turn: the previous checkpoint loads, and the run goes on.

A fault strikes once (the save is then tried again, and must succeed), or from there until the end of that
save (the next one must succeed). A short write stops half way; what comes after it may fail, or not.
"""

import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_child import (
    Board,
    Settings,
    Watch,
    in_child,
    kill_here,
    let_it,
    outcome,
    start,
    temporary,
    wait,
    watch_events,
    watch_places,
)

import bertpair.training.train
from bertpair import Config
from bertpair.checkpoints.checkpoint import newest_whole
from bertpair.checkpoints.manifest import verify_folder
from bertpair.checkpoints.run_folder import RunFolder
from bertpair.errors import CheckpointError

SAVES_PER_RUN = 60
KINDS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@dataclass(frozen=True)
class Fault:
    """What the `number`-th call of a save (or of the final folder) does instead of its work."""

    number: int
    kind: str  # ENOSPC, EIO, or `short`: a write of half the bytes
    lasting: bool  # every later call of that save fails too

    def strike(self, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if name == "return" or number < self.number or (number > self.number and not self.lasting):
            return real(*args, **kwargs)
        if self.kind == "short" and number == self.number:
            assert name == "write"
            return real(args[0], memoryview(args[1])[: (len(args[1]) + 1) // 2])
        if name == "close":  # as on Linux: the descriptor is gone all the same
            real(*args, **kwargs)
        code = KINDS.get(self.kind, errno.ENOSPC)
        raise OSError(code, os.strerror(code))


def every_fault(calls: list[str], every: int) -> list[Fault]:
    """All faults of a sequence of calls, or each `every`-th."""
    faults = [
        Fault(number, kind, lasting)
        for number, name in enumerate(calls, 1)
        if name != "return"
        for kind in (*KINDS, *(["short"] if name == "write" else []))
        for lasting in (False, True)
    ]
    return faults[::every]


def try_faults(settings: Settings, folder: Path, every: int, say: Callable[[str], None]) -> bool:
    """All faults of a checkpoint's save and of the final folder's; prints how many were tried."""
    calls = calls_of(settings, folder)
    troubles: list[str] = []
    tried: Counter[str] = Counter()
    faults = every_fault(calls["save"], every)
    for number, some in enumerate(_chunks(faults, SAVES_PER_RUN)):
        try_saves(settings, folder, number, some, calls["save"], tried, troubles)
    saves = tried.total()
    try_finals(settings, folder, every_fault(calls["final"], every), calls["final"], tried, troubles)
    for trouble in troubles:
        say(trouble)
    finals = tried.total() - saves
    say(f"{saves + finals} fault points tried: {saves} in checkpoints, {finals} in the final folder")
    say("calls failed: " + ", ".join(f"{count} {name}" for name, count in sorted(tried.items())))
    say(f"{len(troubles)} with another result than the uninterrupted run's, a lost checkpoint or a leftover")
    return not troubles


def _chunks(faults: list[Fault], size: int) -> Iterator[list[Fault]]:
    iterator = iter(faults)
    while some := list(itertools.islice(iterator, size)):
        yield some


def plain_settings(settings: Settings, output_dir: Path, steps: int) -> Settings:
    """A save after every step, without evaluations."""
    return {
        **settings, "output_dir": str(output_dir), "max_steps": steps, "save_steps": 1, "eval_strategy": "no",
        "load_best_model_at_end": False, "lr_scheduler_type": "constant",
    }  # fmt: skip


def calls_of(settings: Settings, folder: Path) -> dict[str, list[str]]:
    """The names of the calls of a save that prunes, and of the final folder with its move."""
    notes, log = folder / "calls", folder / "log"
    calls: dict[str, list[str]] = {"save": [], "final": []}

    def act(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if place == "save 5":
            calls["save"].append(name)
        if place in ("final", "move") and calls["save"]:
            calls["final"].append(name)
        if (place, name) == ("final", "return"):
            notes.write_text(json.dumps(calls))
        return real(*args, **kwargs)

    code = wait(start(plain_settings(settings, folder / "measured", 6), act, Board(), log))
    assert code == 0, log.read_text()
    found: dict[str, list[str]] = json.loads(notes.read_text())
    return found


def try_saves(
    settings: Settings, folder: Path, run: int, faults: list[Fault], calls: list[str], tried: Counter[str],
    troubles: list[str],
) -> None:  # fmt: skip
    """One training in which each save from the fourth on meets another of `faults`, and one without."""
    steps = 2 * len(faults) + 4  # after each fault a save that must succeed
    report, log = folder / f"report-{run}", folder / "log"
    chosen = plain_settings(settings, folder / f"faulty-{run}", steps)
    code = wait(in_child(lambda: _train_with_faults(chosen, faults, report), log))
    if code != 0:
        troubles.append(f"the run did not go on: exit code {code}: {log.read_text()[-1500:]}")
        return
    found = json.loads(report.read_text())
    troubles += found["troubles"]
    for fault in faults:
        tried[calls[fault.number - 1]] += fault.number in found["struck"]
    output_dir = Path(chosen["output_dir"])
    calm = {**chosen, "output_dir": str(folder / f"calm-{run}")}
    whole = wait(start(calm, let_it, Board(), log))
    again = wait(start({**chosen, "max_steps": steps + 1, "resume_anyway": True}, let_it, Board(), log))
    longer = wait(start({**calm, "max_steps": steps + 1, "resume_anyway": True}, let_it, Board(), log))
    if (whole, again, longer) != (0, 0, 0):
        troubles.append(f"exit codes {whole}, {again}, {longer}: {log.read_text()[-1500:]}")
        return
    if outcome(output_dir) != outcome(Path(calm["output_dir"])):
        troubles.append(f"run {run}: another result than without faults")
    troubles += [f"run {run}: {name} outlived the next start" for name in temporary(output_dir)]


def _train_with_faults(settings: Settings, faults: list[Fault], report: Path) -> int:
    """In the child: train, and look after each save whether the newest whole checkpoint is the right one."""
    struck: set[int] = set()
    troubles: list[str] = []

    def fault_of(place: str) -> Fault | None:
        kind, _, step = place.partition(" ")
        index = (int(step) - 4) // 2 if kind == "save" and int(step) % 2 == 0 else -1
        return faults[index] if 0 <= index < len(faults) else None

    def act(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        fault = fault_of(place)
        if fault is None:
            return real(*args, **kwargs)
        if number == fault.number:
            struck.add(number)
        return fault.strike(number, name, real, args, kwargs)

    watch = Watch(act, Board())
    watch_events(watch)
    watch_places(watch)
    real_save = RunFolder.save_checkpoint  # by now it knows its place

    def save(self: RunFolder, step: int, *rest: Any) -> bool:
        before = newest_whole(self.path).path
        saved = real_save(self, step, *rest)
        fault, newest = fault_of(f"save {step}"), newest_whole(self.path)
        # Where even its taking back failed, a checkpoint that may not be durable stays: whole all the same.
        allowed = [self.path / f"checkpoint-{step}"] if saved else [before, self.path / f"checkpoint-{step}"]
        if newest.path not in allowed or newest.faults:
            troubles.append(f"{fault}: {newest.path} loads, not one of {allowed}; {newest.faults}")
        if not saved and (fault is None or not fault.lasting):
            troubles.append(f"{fault}: the save did not succeed the second time")
        return saved

    RunFolder.save_checkpoint = save  # type: ignore[method-assign]
    code = 1 if bertpair.training.train.train(Config(**settings)).save_failed else 0
    report.write_text(json.dumps({"struck": sorted(struck), "troubles": troubles}))
    return code


def try_finals(
    settings: Settings,
    folder: Path,
    faults: list[Fault],
    calls: list[str],
    tried: Counter[str],
    troubles: list[str],
) -> None:
    """The final folder and its files' move under each fault; then the next start, which must complete it."""
    chosen = plain_settings(settings, folder / "last-step", 6)
    whole = outcome(folder / "measured")

    def stop(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if place == "final":
            kill_here()
        return real(*args, **kwargs)

    wait(start(chosen, stop, Board(), folder / "log"))
    for fault in faults:
        output_dir = folder / "final"
        shutil.copytree(folder / "last-step", output_dir)
        trouble = _try_final({**chosen, "output_dir": str(output_dir)}, folder, fault, whole)
        troubles += [f"final folder, {fault}: {trouble}"] if trouble else []
        tried[calls[fault.number - 1]] += 1
        shutil.rmtree(output_dir)


def _try_final(settings: Settings, folder: Path, fault: Fault, whole: dict[str, object]) -> str | None:
    output_dir, log, board = Path(settings["output_dir"]), folder / "log", Board()
    begun: list[int] = []

    def act(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if place not in ("final", "move") or (place == "move" and not begun):
            return real(*args, **kwargs)  # the look for a staged model at the start is none of it
        begun.append(1)
        return fault.strike(len(begun), name, real, args, kwargs)

    code = wait(start(settings, act, board, log))
    if code not in (0, 1) or (code == 1 and not fault.lasting):
        return f"exit code {code}: {log.read_text()[-1500:]}"
    try:
        verify_folder(max(output_dir.glob("checkpoint-?")))
    except CheckpointError as error:
        return f"the last checkpoint is lost: {error}"
    if (again := wait(start(settings, let_it, board, log))) != 0:
        return f"the next start: exit code {again}: {log.read_text()[-1500:]}"
    if outcome(output_dir) != whole:
        return "another result than without the fault"
    return f"{temporary(output_dir)} outlived the next start" if temporary(output_dir) else None
