"""How a folder is written so that it is whole or not there.

The order is: files into `<name>.tmp-<pid>`, fsync of each, manifest.json last, fsync of the folder, rename,
fsync of the parent. A crash at any point leaves the final name as it was, and at most a temporary folder,
which the next start removes.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from bertpair.checkpoints.disk import (
    FOLDER_MODE,
    create_file,
    fsync_folder,
    install_folder,
    naming,
    remove,
    write_all,
)
from bertpair.checkpoints.manifest import MANIFEST_NAME, FileEntry, Manifest, encode_manifest, is_plain_name
from bertpair.checkpoints.tensor_file import encode_header, file_order, tensor_bytes

_MAX_PENDING_BYTES = 512 << 20


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
