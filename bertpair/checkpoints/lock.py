"""One run at a time in an output folder: a lock on `.lock`, which says which process of which host holds it.

The system drops a flock when its process dies. Where the file system has no flock, the file itself is the
lock: a dead process of this host loses it; nobody here can know of another host's, which a user removes.
"""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from bertpair.console import stop_flag
from bertpair.errors import CheckpointError, show

LOCK_NAME = ".lock"
_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class RunLock:
    """Holds an output folder for this process from `acquire` to `release`."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOCK_NAME
        self._lock: BaseFileLock | None = None

    @property
    def is_held(self) -> bool:
        return self._lock is not None

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock, or `wait` for it; the CheckpointError says who has it. A stop ends the wait."""
        assert self._lock is None, "the lock is already held"
        common: dict[str, Any] = {"mode": 0o644, "thread_local": False}
        lock: BaseFileLock = FileLock(
            self.path, blocking=wait, preserve_lock_file=True, on_acquired=_write_holder, **common
        )
        advice = "stop it or use another output_dir"
        try:
            try:
                lock.acquire(cancel_check=stop_flag.__bool__)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                if self.path.lstat().st_size == 0:
                    self.path.unlink()  # made by the attempt, or given back: the soft lock would wait for it
                advice += f" (if no run of bertpair is left there, delete {self.path})"
                # damaged files are watched for 2 seconds
                lock = SoftFileLock(self.path, timeout=-1 if wait else 3, **common)
                lock.acquire(cancel_check=stop_flag.__bool__)
        except Timeout:
            stop_flag.raise_if_set()
            holder = self._holder()
            raise CheckpointError(f"{self.path}: {holder} is running in this folder; {advice}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be locked: {error.strerror or error}") from error
        self._lock = lock

    def release(self) -> None:
        """Give the folder back. With flock the file stays, empty: if it went, two could lock two files."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        if not isinstance(lock, SoftFileLock):
            with suppress(OSError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC | _NO_FOLLOW))
        lock.release()

    def _holder(self) -> str:
        with suppress(OSError, ValueError, IndexError):
            with open(os.open(self.path, os.O_RDONLY | _NO_FOLLOW), "rb") as file:
                pid, host = file.read(4096).decode().splitlines()[:2]
            return f"process {int(pid)} on host {show(host)}"
        return "another process"


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n".encode())  # as a soft lock's file begins
