"""Files and folders that are whole or not there: complete writes, fsync, staging, renames, free space.

A folder is written in this order: each file into `<name>.tmp-<pid>` with an fsync, manifest.json last, fsync
of the folder, rename, fsync of the parent. A crash at any point leaves the final name as it was, and at most
a temporary folder, which the next start removes.

Each system call that changes the disk is looked up in `os` at the moment it is made, so that a test can
fail it or kill the process there. A failed fsync is never tried again on the same file: the kernel may
have dropped the pages it could not write and would then report success.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from bertpair.checkpoints.manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest, is_plain_name
from bertpair.checkpoints.tensor_file import encode_tensors
from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_MODE = 0o644  # others may serve what this user trained
FOLDER_MODE = 0o755
SMALL_FILES = 4 << 20  # bytes of a folder's tokenizer files and JSON, block sizes included
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # file systems without it


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names `path`: write and fsync know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    with naming(path):
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # network file systems report a full disk only here


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a file that must not exist yet, durably; what a manifest is to say of it.

    Each chunk is hashed in a second thread while it is written.
    """
    digest, size = sha256(), 0
    with ThreadPoolExecutor(1) as hasher, _opened(path, _NEW_FILE) as descriptor:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, FILE_MODE)  # whatever the umask
        for chunk in chunks:
            hashing = hasher.submit(digest.update, chunk)
            write_all(descriptor, chunk)
            hashing.result()
            size += len(chunk)
        os.fsync(descriptor)
    return FileEntry(path.name, size, digest.hexdigest())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: os.write may stop short when a disk is nearly full."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[written:]


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; silently nothing where the system cannot (Windows, some shares)."""
    if os.name == "nt":
        return
    with _opened(path, os.O_RDONLY) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` under the name `path`, durably: a reader sees the old file or the new one, whole."""
    with replacing(path) as temporary:
        write_file(temporary, [data])
    fsync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name; the file that is made there becomes `path`, or is gone after an exception."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with naming(path):
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def append(path: Path, data: bytes) -> None:
    """Add `data` at the end of a file, all of it or nothing: a full disk leaves no half line."""
    with _opened(path, _APPEND) as descriptor:
        length = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, length)
            raise


def durable_length(path: Path) -> int:
    """Make a file's contents durable (made empty if it is gone); how many bytes they are."""
    with _opened(path, _APPEND) as descriptor:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size


def install_folder(source: Path, target: Path, *, keep_old: bool = False) -> None:
    """Rename a finished folder to its final name, durably; after an exception everything is as it was.

    A folder already there steps aside as `<name>.old-<pid>`, from where the next start brings it back if a
    crash left nothing under the final name, and is then deleted; with `keep_old` it stays, as `.kept-<pid>`.
    """
    aside = target.with_name(f"{target.name}.{'kept' if keep_old else 'old'}-{os.getpid()}")
    replaces = os.path.lexists(target)
    if replaces:
        if not keep_old and aside.is_dir():
            remove(aside)
        os.rename(target, aside)
    try:
        os.rename(source, target)
        fsync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            if not os.path.lexists(source):
                os.rename(target, source)
            if replaces:
                os.rename(aside, target)
        raise
    if replaces and keep_old:
        logger.warning("%s was not written by bertpair: it is now %s", target, aside)
    elif replaces:
        remove(aside)


def remove(path: Path) -> bool:
    """Delete a file, or a folder and all in it; a failure is a warning, for it is no longer wanted."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error.strerror or error)
        return False
    return True


def retire_folder(path: Path) -> bool:
    """Delete a folder that looks whole: renamed first, so that no crash leaves half of it under its name."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    if doomed.is_dir():
        remove(doomed)
    try:
        os.rename(path, doomed)
        fsync_folder(path.parent)
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error.strerror or error)
        return False
    return remove(doomed)


def free_space_needed(weights: int, optimizer: int, *, kept: int) -> int:
    """Bytes a run may need at once: `kept` checkpoints, one more while it is written, and the final model."""
    return (kept + 1) * (weights + optimizer) + weights + (kept + 2) * SMALL_FILES


def check_free_space(folder: Path, bytes_needed: int, what: str) -> None:
    """CheckpointError if the disk that holds (or will hold) `folder` has fewer than `bytes_needed` left."""
    existing = folder.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    total, _, free = shutil.disk_usage(existing)
    if total and free < bytes_needed:  # some network shares say 0 of 0
        raise CheckpointError(
            f"{folder}: {what} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, choose another output_dir, or keep fewer checkpoints (save_total_limit)"
        )


class Staging:
    """A folder being written under a temporary name; made and undone by `staged_folder`.

    `meta` goes into the manifest and may be filled until the end. OSErrors name the file.
    """

    def __init__(self, final: Path, meta: Mapping[str, Any]) -> None:
        self.folder = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        number = count(2)
        while os.path.lexists(self.folder):  # what is left of an earlier attempt is never written into again
            self.folder = final.with_name(f"{final.name}.tmp-{os.getpid()}-{next(number)}")
        self.meta = dict(meta)
        self.entries: list[FileEntry] = []

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file."""
        self._write(name, [data])

    def write_json(self, name: str, value: object) -> None:
        """Write a value as indented UTF-8 JSON; NaN and infinity are refused (ValueError)."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self._write(name, [text.encode("utf-8") + b"\n"])

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, one tensor at a time: only one that must come from a device is copied."""
        self._write(name, encode_tensors(tensors, metadata))

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        assert is_plain_name(name) and name != MANIFEST_NAME, name
        self.entries.append(write_file(self.folder / name, chunks))


@contextmanager
def staged_folder(
    final: Path, *, versions: Mapping[str, str] | None = None, meta: Mapping[str, Any] | None = None
) -> Iterator[Staging]:
    """Write a folder that appears under `final` at the end of the block, whole and durable, or not at all.

    On any exception, in the block or in finishing (OSError), nothing is left and `final` is as it was.
    A folder of ours already there is replaced; one that bertpair did not write is moved aside and kept.
    """
    staging = Staging(final, meta or {})
    folder = staging.folder
    try:
        os.mkdir(folder, FOLDER_MODE)
        os.chmod(folder, FOLDER_MODE)  # whatever the umask
        yield staging
        manifest = Manifest(tuple(staging.entries), dict(versions or {}), staging.meta)
        write_file(folder / MANIFEST_NAME, [encode_manifest(manifest)])
        fsync_folder(folder)
        # What stands there and has no manifest is not ours to delete.
        install_folder(folder, final, keep_old=not (final / MANIFEST_NAME).is_file())
    except BaseException:
        if folder.is_dir():
            remove(folder)
        raise
