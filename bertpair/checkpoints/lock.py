"""One run at a time in an output folder: flock on `.lock`, which says which process of which host holds it.

The system drops a flock when its process dies, so a crashed run never blocks the next one. Where the file
system has no flock, the file itself is the lock: a dead process of this host loses it, another host's
must be removed by hand, since nobody here can know whether that host still runs.
"""

import errno
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bertpair.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True)
class Holder:
    """What a lock file says about who holds it."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host!r}"


class RunLock:
    """Holds an output folder for this process, as a context manager; CheckpointError if another has it."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock or say who has it; never waits."""
        assert self._descriptor is None, "the lock is already held"
        try:
            descriptor = os.open(self.path, _FLAGS, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            if not _flock(descriptor, self.path):
                _check_stale(_read_holder(descriptor), self.path)
            _write_holder(descriptor, Holder(os.getpid(), socket.gethostname()))
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(f"{self.path}: cannot be locked: {error.strerror}") from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder back; the file stays, empty: removing it would let two others lock two files."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine (on Windows: assumed)."""
    if os.name == "nt":
        return True  # signal 0 there means Ctrl-C
    if pid <= 0:
        return False  # to kill, these are groups
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _flock(descriptor: int, path: Path) -> bool:
    """True with the lock in hand, False where there is no flock; CheckpointError if another holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _read_holder(descriptor) or "another process"
        advice = "stop it or use another output_dir"
        raise CheckpointError(f"{path}: {holder} is running in this folder; {advice}") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _check_stale(holder: Holder | None, path: Path) -> None:
    """Without flock: refuse unless the file is empty or its process of this host is dead."""
    if holder is None or holder == Holder(os.getpid(), socket.gethostname()):
        return  # our own number: a restarted container's predecessor, so it is gone
    if holder.host != socket.gethostname():
        raise CheckpointError(
            f"{path}: {holder} may be running in this folder (this file system cannot tell); "
            f"if it is not, delete {path} and start again"
        )
    if is_alive(holder.pid):
        raise CheckpointError(
            f"{path}: {holder} is running in this folder; stop it or use another output_dir "
            f"(if that process is no run of bertpair, delete {path})"
        )


def _read_holder(descriptor: int) -> Holder | None:
    """Who the file names, or None if it is empty or unreadable (a crash can cut it short)."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        said = json.loads(os.read(descriptor, 4096))
    except (OSError, ValueError, RecursionError):
        return None
    pid, host = (said.get("pid"), said.get("host")) if isinstance(said, dict) else (None, None)
    return Holder(pid, host[:255]) if type(pid) is int and isinstance(host, str) else None


def _write_holder(descriptor: int, holder: Holder) -> None:
    line = json.dumps({"pid": holder.pid, "host": holder.host}) + "\n"
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, line.encode())
