"""derived/: what was made from a model's weights and is kept beside them, such as a converted network.

It lies in the model folder, or, where that cannot be written, in the user's cache. Each part is a folder with
a manifest, which says what it was made of: made of anything else it is made anew. The model folder's own
manifest does not name it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bertpair.checkpoints import atomic
from bertpair.checkpoints.lock import LOCK_NAME, RunLock
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, verify_folder
from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

DERIVED = "derived"
Make = Callable[[atomic.Staging], Mapping[str, Any]]


def derive(model: Path, name: str, made_of: Mapping[str, Any], make: Make) -> tuple[Path, Manifest]:
    """The part `name` of a model's derived/, whole, and its manifest; `make` fills it if need be.

    `made_of` are JSON values that the manifest's `meta` must hold; what `make` returns is added to them. Of
    two processes one makes it and the other waits. CheckpointError where it cannot be written.
    """
    for place in _places(model):
        with suppress(CheckpointError):
            found = _find(place / name, made_of)
            _sweep(place / name)
            return place / name, found
    part = place / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = RunLock(place)
        _acquire(lock)
        try:
            found = _find_or_make(part, made_of, make)
        finally:
            lock.release()
    except OSError as error:
        reason = f"{place}: cannot be written: {error.strerror or error}"
        where = "in the model folder or, where that cannot be written, in XDG_CACHE_HOME"
        raise CheckpointError(f"{reason}; {name} is kept {where}") from error
    return part, found


def find_part(model: Path, name: str, made_of: Mapping[str, Any]) -> Manifest:
    """The manifest of a part that is there, whole, and made of the same; or CheckpointError."""
    *others, last = _places(model)
    for place in others:
        with suppress(CheckpointError):
            return _find(place / name, made_of)
    return _find(last / name, made_of)


def _places(model: Path) -> Iterator[Path]:
    """Where a part may lie; in the last of them it is made."""
    yield model / DERIVED
    if not _is_writable(model / DERIVED):
        yield cache_folder() / _name_of(model)


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bertpair"
    except RuntimeError as error:
        raise CheckpointError(f"no folder for a cache: {error}; name one in XDG_CACHE_HOME") from error


def holds_only_parts(folder: Path) -> bool:
    """Whether nothing lies in a derived/ but what can be made again."""
    return folder.is_dir() and all(
        path.name == LOCK_NAME or ".tmp-" in path.name or (path / MANIFEST_NAME).is_file()
        for path in folder.iterdir()
    )


def _name_of(model: Path) -> str:
    digest = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:16]
    return f"{model.resolve().name}-{digest}"


def _acquire(lock: RunLock) -> None:
    try:
        lock.acquire()
    except CheckpointError as error:
        logger.info("%s: waiting for it", str(error).partition(";")[0])
        lock.acquire(wait=True)


def _is_writable(place: Path) -> bool:
    return os.access(place if place.exists() else place.parent, os.W_OK)


def _find(part: Path, made_of: Mapping[str, Any]) -> Manifest:
    """The manifest of a part that is whole and made of the same; the CheckpointError says why it is not."""
    manifest = verify_folder(part)
    if changed := [key for key, value in made_of.items() if manifest.meta.get(key, ...) != value]:
        raise CheckpointError(f"{part} was made of other {' and '.join(changed)}")
    return manifest


def _find_or_make(part: Path, made_of: Mapping[str, Any], make: Make) -> Manifest:
    """Hold the lock of its folder."""
    for path in _leftovers(part):
        atomic.remove(path)
    try:
        return _find(part, made_of)  # another process may just have made it
    except CheckpointError as error:
        if os.path.lexists(part):
            logger.warning("made anew: %s", error)
    meta = dict(made_of)
    with atomic.staged_folder(part, meta=meta) as staging:
        meta |= make(staging)  # the manifest is written after this block
    return verify_folder(part)


def _leftovers(part: Path) -> list[Path]:
    """What a crash left of a part; or, for who does not hold the lock, what another is making."""
    beginnings = (f"{part.name}.tmp-", f"{part.name}.old-")
    return [path for path in part.parent.iterdir() if path.name.startswith(beginnings)]


def _sweep(part: Path) -> None:
    """Remove the leftovers of a part that is whole, if that can be done at once."""
    with suppress(OSError, CheckpointError):
        if _leftovers(part):
            lock = RunLock(part.parent)
            lock.acquire()
            for path in _leftovers(part):
                atomic.remove(path)
            lock.release()
