"""Files and folders that are whole or not there: complete writes, fsync, staging, renames, free space.

Each call that changes the disk is looked up in `os` when it is made: a test can fail it or kill the process.
A failed fsync is not repeated: the kernel may have dropped the pages, and would then report success.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from bertpair.checkpoints.manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest, is_plain_name
from bertpair.checkpoints.tensor_file import encode_tensors
from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

FILE_MODE, FOLDER_MODE = 0o644, 0o755  # others may serve what this user trained, whatever the umask
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # file systems without it


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError from inside names `path`: write and fsync know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    with _naming(path):
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # network file systems report a full disk only here


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a file that must not exist yet, durably; what a manifest is to say of it."""
    digest, size = hashlib.sha256(), 0
    with _opened(path, _NEW_FILE) as descriptor:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, FILE_MODE)
        for chunk in chunks:
            digest.update(chunk)
            _write_all(descriptor, chunk)
            size += len(chunk)
        os.fsync(descriptor)
    return FileEntry(path.name, size, digest.hexdigest())


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # os.write may stop short when a disk is nearly full
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
    with _naming(path):
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
            _write_all(descriptor, data)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, length)
            raise


def cut(path: Path, length: int) -> None:
    """Leave only the first `length` bytes of a file."""
    with _opened(path, os.O_WRONLY | getattr(os, "O_BINARY", 0)) as descriptor:
        os.ftruncate(descriptor, length)


def rename(path: Path, target: Path) -> None:
    """Give a file that is durable another name in its folder, durably."""
    os.replace(path, target)
    fsync_folder(target.parent)


def durable_length(path: Path) -> int:
    """Make a file's contents durable (made empty if it is gone); how many bytes they are."""
    with _opened(path, _APPEND) as descriptor:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size


def remove(path: Path, *, is_whole: bool = False) -> bool:
    """Delete a file, or a folder and all in it; a failure is a warning, for it is no longer wanted.

    A folder that `is_whole` is renamed first, so that no crash leaves half of it under its name.
    """
    try:
        if is_whole:
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            if doomed.is_dir():
                remove(doomed)
            os.rename(path, doomed)
            fsync_folder(path.parent)
            return remove(doomed)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s: cannot be removed: %s", path, error.strerror or error)
        return False
    return True


def check_free_space(folder: Path, bytes_needed: int, what: str) -> None:
    """CheckpointError if the disk that holds (or will hold) `folder` has fewer than `bytes_needed` left."""
    place = folder.absolute()
    total, _, free = shutil.disk_usage(next(filter(os.path.exists, (place, *place.parents))))
    if total and free < bytes_needed:  # some network shares say 0 of 0
        raise CheckpointError(
            f"{folder}: {what} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, choose another output_dir, or keep fewer checkpoints (save_total_limit)"
        )


class Staging:
    """A folder being written under a temporary name by `staged_folder`. OSErrors name the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def adopt(self, name: str) -> None:
        """Take in a file that a library wrote into the folder: durable, and readable by others."""
        path = self.folder / name
        with _opened(path, os.O_RDWR | getattr(os, "O_BINARY", 0)) as descriptor:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, FILE_MODE)
            os.fsync(descriptor)
            with open(descriptor, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.entries.append(FileEntry(name, path.stat().st_size, digest))

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        assert is_plain_name(name) and name != MANIFEST_NAME, name
        self.entries.append(write_file(self.folder / name, chunks))


@contextmanager
def staged_folder(
    final: Path, *, versions: Mapping[str, str] | None = None, meta: Mapping[str, Any] | None = None
) -> Iterator[Staging]:
    """Write a folder that appears under `final` at the end of the block, whole and durable, or not at all.

    Files come first, then manifest.json, then the rename, each after an fsync of what it stands on. On any
    exception, in the block or in finishing (OSError), nothing is left and `final` is as it was; a crash
    leaves at most a temporary folder, which the next start removes. A folder of ours already there is
    replaced; one that bertpair did not write is moved aside and kept.
    """
    folder, number = final.with_name(f"{final.name}.tmp-{os.getpid()}"), count(2)
    while os.path.lexists(folder):  # what is left of an earlier attempt is never written into again
        folder = final.with_name(f"{final.name}.tmp-{os.getpid()}-{next(number)}")
    try:
        os.mkdir(folder, FOLDER_MODE)
        os.chmod(folder, FOLDER_MODE)
        staging = Staging(folder)
        yield staging
        manifest = Manifest(tuple(staging.entries), dict(versions or {}), dict(meta or {}))
        write_file(folder / MANIFEST_NAME, [encode_manifest(manifest)])
        fsync_folder(folder)
        _install(folder, final)
    except BaseException:
        if folder.is_dir():
            remove(folder)
        raise


def _install(source: Path, target: Path) -> None:
    """Rename a finished folder to its final name, durably; after an exception everything is as it was.

    A folder of ours there steps aside as `.old-<pid>`, from where the next start brings it back if a crash
    left nothing under the final name, and is then deleted. Another's stays, as `.kept-<pid>`.
    """
    replaces, is_ours = os.path.lexists(target), (target / MANIFEST_NAME).is_file()
    aside = target.with_name(f"{target.name}.{'old' if is_ours else 'kept'}-{os.getpid()}")
    if replaces:
        if is_ours and aside.is_dir():
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
    if replaces and is_ours:
        remove(aside)
    elif replaces:
        logger.warning("%s was not written by bertpair: it is now %s", target, aside)
