"""Bytes that must outlive a crash: complete writes, fsync of files and folders, renames, free space.

Each system call that changes the disk is looked up in `os` at the moment it is made, so that a test can
fail it or kill the process there. A failed fsync is never tried again on the same file: the kernel may
have dropped the pages it could not write and would then report success.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def create_file(path: Path) -> int:
    """Open a file that must not exist yet; returns its descriptor."""
    descriptor = os.open(path, _NEW_FILE, FILE_MODE)
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(descriptor, FILE_MODE)  # whatever the umask
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: os.write may stop short when a disk is nearly full."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[written:]


def fsync_file(path: Path) -> None:
    """Make what was written to an existing file durable."""
    with naming(path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; silently nothing where the system cannot (Windows, some shares)."""
    if os.name == "nt":
        return
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` under the name `path`, durably: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            temporary.unlink(missing_ok=True)
            _write_durably(temporary, data)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = create_file(path)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, data: bytes) -> None:
    """Add `data` at the end of a file, all of it or nothing: a full disk leaves no half line."""
    with naming(path):
        descriptor = os.open(path, _APPEND, FILE_MODE)
        try:
            length = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, length)
                raise
        finally:
            os.close(descriptor)


def durable_length(path: Path) -> int:
    """Make a file's contents durable (made empty if it is gone); how many bytes they are."""
    with naming(path):
        descriptor = os.open(path, _APPEND, FILE_MODE)
        try:
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


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
    usage = shutil.disk_usage(existing)
    free = usage.free
    if usage.total and free < bytes_needed:  # some network shares say 0 of 0
        raise CheckpointError(
            f"{folder}: {what} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, choose another output_dir, or keep fewer checkpoints (save_total_limit)"
        )
