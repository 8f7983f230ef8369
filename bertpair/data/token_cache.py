"""Token ids kept between runs, keyed by the content of the texts, the tokenizer and the settings.

One file an entry, written beside its final name and renamed, with a checksum inside: an entry that is
damaged, half-written or of another version is made anew, and a folder that cannot be written costs a warning.
Texts of fewer than MIN_CHARS characters are tokenized faster than a file is handled, and are not kept.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bertpair.data.tokenizer import Tokenizer, Tokens, check_texts

logger = logging.getLogger(__name__)

VERSION = "2"  # of the file's layout, part of the key
MAX_BYTES = 2 * 2**30
MIN_CHARS = 100_000
ABANDONED_SECONDS = 24 * 3600  # a temporary file this old belongs to no living writer
HASH_ROWS = 10_000
ENTRY_PATTERN = "tokens-" + "[0-9a-f]" * 64 + ".safetensors"  # the folder may hold what is not ours
TEMPORARY_PATTERN = "tokens-????????????????-*.tmp"
FIELDS = ("ids", "offsets", "first_lengths", "truncated")


def default_cache_dir() -> Path:
    """`bertpair/tokens` under XDG_CACHE_HOME (if absolute, as its specification says) or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no home folder: nowhere to write, which is a warning when it comes to that
            base = Path(os.devnull)
    return base / "bertpair" / "tokens"


def encode_cached(
    tokenizer: Tokenizer,
    text_a: Sequence[str],
    text_b: Sequence[str] | None,
    max_length: int,
    *,
    cache_dir: Path | None = None,
    overwrite: bool = False,
) -> Tokens:
    """What `tokenizer.encode` gives, from the cache where it has it; `overwrite` makes the entry anew.

    `cache_dir` None is the user's cache folder. Raises what `encode` raises.
    """
    check_texts(text_a, text_b)
    columns = [text_a] if text_b is None else [text_a, text_b]
    if sum(map(len, text_a)) + sum(map(len, text_b or ())) < MIN_CHARS:
        return tokenizer.encode(text_a, text_b, max_length)
    folder = default_cache_dir() if cache_dir is None else cache_dir
    path = folder / f"tokens-{entry_key(tokenizer, columns, max_length)}.safetensors"
    tokens = None if overwrite else read_entry(path, len(text_a))
    if tokens is None:
        tokens = tokenizer.encode(text_a, text_b, max_length)
        write_entry(path, tokens)
    return tokens


def entry_key(tokenizer: Tokenizer, columns: Sequence[Sequence[str]], max_length: int) -> str:
    """sha256 over all that the ids depend on: texts, tokenizer, version of the library, settings."""
    settings = (VERSION, tokenizers.__version__, tokenizer.fingerprint, max_length, len(columns))
    digest = hashlib.sha256(repr(settings).encode())
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        for start in range(0, len(column), HASH_ROWS):
            rows = column[start : start + HASH_ROWS]
            # The lengths keep ("ab", "c") apart from ("a", "bc").
            digest.update(np.fromiter(map(len, rows), "<i8", len(rows)).tobytes())
            digest.update("".join(rows).encode())
    return digest.hexdigest()


def read_entry(path: Path, num_rows: int) -> Tokens | None:
    """The entry's tokens; None if it is not there or not whole."""
    try:
        with safe_open(path, framework="np") as file:
            said = (file.metadata() or {}).get("sha256")
            arrays = {name: file.get_tensor(name) for name in FIELDS}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as e:
        logger.warning("%s: this token cache entry cannot be used (%s); it is made anew", path, e)
        return None
    tokens = Tokens(**arrays)
    if said != checksum(tokens) or len(tokens) != num_rows:
        logger.warning("%s: this token cache entry is damaged (wrong checksum); it is made anew", path)
        return None
    with contextlib.suppress(OSError):  # in a read-only cache an entry's age stays as it is
        os.utime(path)
    return tokens


def write_entry(path: Path, tokens: Tokens) -> None:
    """Store an entry whole or not at all, and prune the oldest; failing costs a warning."""
    arrays = {name: np.ascontiguousarray(getattr(tokens, name)) for name in FIELDS}
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem[:23]}-", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            save_file(arrays, name, metadata={"sha256": checksum(tokens)})
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        prune(path.parent, newest=path)
    except (OSError, SafetensorError) as e:
        logger.warning("token cache %s cannot be written (%s); going on without it", path.parent, e)


def checksum(tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for name in FIELDS:
        array = getattr(tokens, name)
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def prune(folder: Path, newest: Path) -> None:
    """Remove the entries used longest ago beyond MAX_BYTES, and what killed writers left."""
    for path in folder.glob(TEMPORARY_PATTERN):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
    found: list[tuple[bool, float, int, Path]] = []
    for path in folder.glob(ENTRY_PATTERN):
        with contextlib.suppress(OSError):  # other processes prune too
            state = path.stat()
            found.append((path == newest, state.st_mtime, state.st_size, path))
    total = 0
    for *_, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()
