"""JSON as a model folder holds it: one object, no key twice, of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bertpair.errors import CheckpointError

MAX_BYTES = 16 << 20  # real ones hold kilobytes; somebody's surprise must not fill the memory


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in `data`, UTF-8 with or without a byte order mark; `where` begins the error message."""
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where}: more than {MAX_BYTES >> 20} MiB of JSON")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise CheckpointError(f"{where}: not usable JSON (nested too deeply)") from error
    except ValueError as error:  # bytes that are not UTF-8, syntax, a key twice, a number of 5,000 digits
        raise CheckpointError(f"{where}: not usable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as json's `object_pairs_hook`; ValueError where a key stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return made
