"""Files and folders that are whole or not there: complete writes, fsync, staging, renames, free space.

A folder is written in this order: files into `<name>.tmp-<pid>`, fsync of each, manifest.json last, fsync of
the folder, rename, fsync of the parent. A crash at any point leaves the final name as it was, and at most a
temporary folder, which the next start removes.

Each system call that changes the disk is looked up in `os` at the moment it is made, so that a test can
fail it or kill the process there. A failed fsync is never tried again on the same file: the kernel may
have dropped the pages it could not write and would then report success.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from bertpair.checkpoints.manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest, is_plain_name
from bertpair.checkpoints.tensor_file import encode_header, file_order, tensor_bytes
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
            os.close(descriptor)


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
    with _opened(path, os.O_RDWR) as descriptor:
        os.fsync(descriptor)


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
    usage = shutil.disk_usage(existing)
    free = usage.free
    if usage.total and free < bytes_needed:  # some network shares say 0 of 0
        raise CheckpointError(
            f"{folder}: {what} needs {bytes_needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space, choose another output_dir, or keep fewer checkpoints (save_total_limit)"
        )


_MAX_PENDING_BYTES = 512 << 20  # written, and waiting for their checksum


@dataclass
class SaveSeconds:
    """Where the time of a save went; `checksum` runs beside the others, in a thread of its own."""

    write: float = 0.0
    checksum: float = 0.0
    fsync: float = 0.0


class _HashedFile:
    """An open file whose bytes are hashed in a thread of its own while they, and later files, are written."""

    def __init__(self, name: str, descriptor: int, seconds: SaveSeconds) -> None:
        self._name = name
        self._digest = sha256()
        self._size = 0
        self._descriptor = descriptor
        self._hasher = ThreadPoolExecutor(1)
        self._seconds = seconds
        self._pending: deque[tuple[int, Future[None]]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        started = time.monotonic()
        self._pending.append((len(data), self._hasher.submit(self._hash, data)))
        write_all(self._descriptor, data)
        self._seconds.write += time.monotonic() - started
        self._size += len(data)
        # What waits to be hashed may be copies from a device: they must not pile up.
        while sum(size for size, _ in self._pending) > _MAX_PENDING_BYTES:
            self._pending.popleft()[1].result()

    def fsync(self) -> None:
        started = time.monotonic()
        os.fsync(self._descriptor)
        self._seconds.fsync += time.monotonic() - started

    def entry(self) -> FileEntry:
        """Wait for the checksum; what the manifest is to say."""
        while self._pending:
            self._pending.popleft()[1].result()
        self._hasher.shutdown()
        return FileEntry(self._name, self._size, self._digest.hexdigest())

    def drop(self) -> None:
        """Hash no further."""
        self._hasher.shutdown(cancel_futures=True)

    def _hash(self, data: bytes | memoryview) -> None:
        started = time.monotonic()
        self._digest.update(data)
        self._seconds.checksum += time.monotonic() - started


class Staging:
    """A folder being written under a temporary name; made, finished and undone by `staged_folder`.

    `meta` goes into the manifest and may be filled until the end. OSErrors name the file.
    """

    def __init__(self, final: Path, versions: Mapping[str, str], meta: Mapping[str, Any]) -> None:
        self.final = final
        self.folder = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        self.versions = dict(versions)
        self.meta = dict(meta)
        self.seconds = SaveSeconds()
        self._files: list[_HashedFile] = []
        self._open: dict[Path, int] = {}  # kept open until fsync: its errors reach only who had the file open

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one file."""
        with self._new_file(name) as file:
            file.write(data)

    def write_json(self, name: str, value: object) -> None:
        """Write a value as indented UTF-8 JSON; NaN and infinity are refused (ValueError)."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(name, text.encode("utf-8") + b"\n")

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, one tensor at a time: only one that must come from a device is copied.

        The tensors must stay as they are until the folder is finished: their checksum may lag behind.
        """
        with self._new_file(name) as file:
            file.write(encode_header(tensors, metadata or {}))
            for tensor_name in file_order(tensors):
                file.write(tensor_bytes(tensors[tensor_name]))
            file.fsync()  # at once: the checksum is still being computed meanwhile

    @contextmanager
    def _new_file(self, name: str) -> Iterator[_HashedFile]:
        assert is_plain_name(name) and name != MANIFEST_NAME, name
        path = self.folder / name
        with naming(path):
            self._open[path] = create_file(path)
            self._files.append(_HashedFile(name, self._open[path], self.seconds))
            yield self._files[-1]

    def _begin(self) -> None:
        attempt = 1
        while os.path.lexists(self.folder) and not (self.folder.is_dir() and remove(self.folder)):
            # An earlier attempt of this very process that cannot be removed: never written into again.
            attempt += 1
            self.folder = self.final.with_name(f"{self.final.name}.tmp-{os.getpid()}-{attempt}")
        os.mkdir(self.folder, FOLDER_MODE)
        os.chmod(self.folder, FOLDER_MODE)  # whatever the umask

    def _finish(self) -> None:
        self._make_durable()
        manifest = Manifest(tuple(file.entry() for file in self._files), self.versions, self.meta)
        path = self.folder / MANIFEST_NAME
        with naming(path):
            self._open[path] = create_file(path)
            write_all(self._open[path], encode_manifest(manifest))
        self._make_durable()
        started = time.monotonic()
        fsync_folder(self.folder)
        # What stands there and has no manifest is not ours to delete.
        install_folder(self.folder, self.final, keep_old=not (self.final / MANIFEST_NAME).is_file())
        self.seconds.fsync += time.monotonic() - started

    def _make_durable(self) -> None:
        started = time.monotonic()
        for path in list(self._open):
            with naming(path):
                os.fsync(self._open[path])
                os.close(self._open.pop(path))  # network file systems report a full disk only here
        self.seconds.fsync += time.monotonic() - started

    def _undo(self) -> None:
        for file in self._files:
            file.drop()
        for descriptor in self._open.values():
            try:
                os.close(descriptor)
            except OSError:
                pass
        self._open.clear()
        if self.folder.is_dir():
            remove(self.folder)


@contextmanager
def staged_folder(
    final: Path, *, versions: Mapping[str, str] | None = None, meta: Mapping[str, Any] | None = None
) -> Iterator[Staging]:
    """Write a folder that appears under `final` at the end of the block, whole and durable, or not at all.

    On any exception, in the block or in finishing (OSError), nothing is left and `final` is as it was.
    A folder of ours already there is replaced; one that bertpair did not write is moved aside and kept.
    """
    staging = Staging(final, versions or {}, meta or {})
    try:
        staging._begin()
        yield staging
        staging._finish()
    except BaseException:
        staging._undo()
        raise
