"""derived/: what was made from a model's weights and is kept beside them, such as a converted network.

It lies in the model folder, or, where that cannot be written, in the user's cache. Each part is a folder with
a manifest, which says what it was made of: made of anything else it is made anew. The model folder's own
manifest does not name it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bertpair.checkpoints import atomic
from bertpair.checkpoints.lock import RunLock
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, verify_folder
from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

DERIVED = "derived"


def derive(
    model: Path,
    name: str,
    made_of: Mapping[str, Any],
    make: Callable[[atomic.Staging], Mapping[str, Any]],
) -> tuple[Path, Manifest]:
    """The part `name` of a model's derived/, whole, and its manifest; `make` fills it if need be.

    `made_of` are JSON values that the manifest's `meta` must hold; what `make` returns is added to them. Of
    two processes one makes it and the other waits. CheckpointError where it cannot be written.
    """
    places = [model / DERIVED, cache_folder() / _name_of(model)]
    for place in places:
        if (found := _find(place / name, made_of)) is not None:
            return place / name, found
    place = places[0] if _is_writable(places[0]) else places[1]
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = RunLock(place)
        _acquire(lock)
        try:
            if (found := _find(place / name, made_of)) is None:  # another process may just have made it
                for path in place.iterdir():
                    if path.name.startswith((f"{name}.tmp-", f"{name}.old-")):  # a crash left it
                        atomic.remove(path)
                meta = dict(made_of)
                with atomic.staged_folder(place / name, meta=meta) as staging:
                    meta |= make(staging)  # the manifest is written after this block
                found = verify_folder(place / name)
        finally:
            lock.release()
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written: {error.strerror or error}") from error
    return place / name, found


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bertpair"


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


def _find(folder: Path, made_of: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a part that is whole and made of the same."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = verify_folder(folder)
    except CheckpointError as error:
        logger.warning("made anew: %s", error)
        return None
    changed = [key for key, value in made_of.items() if manifest.meta.get(key) != value]
    if changed:
        logger.info("%s was made of other %s: it is made anew", folder, " and ".join(changed))
    return None if changed else manifest
