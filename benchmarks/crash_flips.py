"""Damage done to the files of a checkpoint and of a final folder: always seen before a byte is used.

Each damage is done in place, the run's start is asked what it would go on from, and the file is put back.
"""

import itertools
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_child import Board, Settings, kill_here, let_it, outcome, start, wait

from bertpair.checkpoints.checkpoint import list_checkpoints
from bertpair.checkpoints.manifest import MANIFEST_NAME, read_manifest, verify_folder
from bertpair.checkpoints.run_folder import RunFolder
from bertpair.errors import CheckpointError

BITS_PER_FILE = 64


@dataclass(frozen=True)
class Damage:
    """New contents of some files of a folder; None: the file is gone."""

    kind: str
    files: dict[str, bytes | None]


def every_damage(folder: Path, names: list[str], rng: random.Random) -> Iterator[Damage]:
    """One bit of each file (a number of times; of the manifest in every byte), cuts, swaps, nothing left."""
    contents = {name: (folder / name).read_bytes() for name in names}
    for name, data in contents.items():
        for place in range(len(data)) if name == MANIFEST_NAME else _places(data, rng):
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            yield Damage("bit flipped", {name: bytes(flipped)})
        for size in sorted({len(data) * percent // 100 for percent in range(1, 100)} - {0, len(data)}):
            yield Damage("cut short", {name: data[:size]})
        yield Damage("emptied", {name: b""})
        yield Damage("removed", {name: None})
        yield Damage("made longer", {name: data + b"\0"})
    for one, other in itertools.combinations(names, 2):
        yield Damage("two swapped", {one: contents[other], other: contents[one]})


def _places(data: bytes, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(len(data)), min(BITS_PER_FILE, len(data))))


def try_flips(settings: Settings, folder: Path, every: int, seed: int, say: Callable[[str], None]) -> bool:
    """All damages to the newest checkpoint and to the final folder; prints how many were tried and caught."""
    rng = random.Random(seed)
    output_dir = folder / "damaged"
    settings = {**settings, "output_dir": str(output_dir)}
    assert wait(start(settings, let_it, Board(), folder / "log")) == 0, (folder / "log").read_text()
    whole = outcome(output_dir)
    tried: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    previous, newest = [path for _, path in list_checkpoints(output_dir)][-2:]
    cases = [
        (newest, lambda: _falls_back(output_dir, previous)),
        (output_dir, lambda: _final_is_refused(output_dir)),
    ]
    for damaged, is_caught in cases:
        names = sorted(entry.name for entry in read_manifest(damaged).files) + [MANIFEST_NAME]
        for damage in itertools.islice(every_damage(damaged, names, rng), 0, None, every):
            tried[damage.kind] += 1
            caught[damage.kind] += _caught(damaged, damage, is_caught, say)
    resumed, fine = _resume_with_each_kind(settings, folder, newest, whole, rng)
    say(f"{tried.total()} damages tried, {caught.total()} caught, each with its file named")
    say("caught: " + ", ".join(f"{caught[kind]} of {tried[kind]} {kind}" for kind in sorted(tried)))
    say(f"{resumed} runs resumed over a damaged checkpoint, {fine} identical")
    return caught == tried and fine == resumed


class _Heard(logging.Handler):
    """What the library warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def _caught(folder: Path, damage: Damage, is_caught: Callable[[], bool], say: Callable[[str], None]) -> bool:
    originals = {name: (folder / name).read_bytes() for name in damage.files}
    heard, logger = _Heard(), logging.getLogger("bertpair")
    logger.addHandler(heard)
    logger.propagate = False
    try:
        _write(folder, damage.files)
        good = is_caught() and any(name in heard.text for name in damage.files)
    except Exception as error:
        heard.text += repr(error)
        good = False
    finally:
        logger.removeHandler(heard)
        logger.propagate = True
        _write(folder, originals)
    if not good:
        say(f"not caught: {damage.kind} {', '.join(damage.files)} in {folder.name}: {heard.text}")
    return good


def _write(folder: Path, files: Any) -> None:
    for name, data in files.items():
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)


def _falls_back(output_dir: Path, previous: Path) -> bool:
    run = RunFolder(output_dir).find_resume("auto")
    return run is not None and run.folder == previous


def _final_is_refused(output_dir: Path) -> bool:
    if RunFolder(output_dir).finished_run() is not None:
        return False
    try:
        verify_folder(output_dir)
    except CheckpointError:
        return True
    return not (output_dir / MANIFEST_NAME).exists()


def _resume_with_each_kind(
    settings: Settings, folder: Path, newest: Path, whole: dict[str, object], rng: random.Random
) -> tuple[int, int]:
    """Runs killed before the final folder, the newest checkpoint damaged in each way: resumed, and alike?"""
    output_dir = newest.parent
    shutil.rmtree(output_dir)

    def stop(place: str, number: int, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if place == "final":
            kill_here()
        return real(*args, **kwargs)

    wait(start(settings, stop, Board(), folder / "log"))
    template = folder / "template"
    shutil.copytree(output_dir, template)
    names = sorted(entry.name for entry in read_manifest(newest).files) + [MANIFEST_NAME]
    by_kind: dict[str, list[Damage]] = {}
    for damage in every_damage(newest, names, rng):
        by_kind.setdefault(damage.kind, []).append(damage)
    fine = 0
    for damages in by_kind.values():
        shutil.rmtree(output_dir)
        shutil.copytree(template, output_dir)
        _write(newest, rng.choice(damages).files)
        code = wait(start(settings, let_it, Board(), folder / "log"))
        fine += code == 0 and outcome(output_dir) == whole
    return len(by_kind), fine
