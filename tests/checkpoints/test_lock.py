"""One run per folder: the second is told who has it; the dead, and only they, lose it."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import SoftFileLock

from bertpair.checkpoints.lock import RunLock
from bertpair.checkpoints.run_folder import RunFolder
from bertpair.errors import CheckpointError

HOLD = """
import pathlib, sys, types
package = types.ModuleType("bertpair")  # the lock alone: importing torch would take seconds
package.__path__ = ["bertpair"]
sys.modules["bertpair"] = package
from bertpair.checkpoints.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


@contextmanager
def locked(folder: Path) -> Iterator[RunLock]:
    lock = RunLock(folder)
    lock.acquire()
    yield lock
    lock.release()


def write_holder(folder: Path, pid: int, host: str) -> None:
    (folder / ".lock").write_text(f"{pid}\n{host}\n")


def test_the_second_run_is_told_who_has_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"process {holder.pid} on host '{socket.gethostname()}'"):
        RunLock(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n{socket.gethostname()}\n"


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        with pytest.raises(CheckpointError, match="running in this folder"):
            RunLock(tmp_path).acquire()
    assert (tmp_path / ".lock").read_bytes() == b""
    held.release()
    with locked(tmp_path):
        pass


def test_a_lock_is_given_back_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), closing(RunFolder(tmp_path)) as folder:
        folder.enter()
        _ = 1 / 0
    with locked(tmp_path):
        pass


def test_what_a_crash_left_in_the_file_does_not_matter(tmp_path: Path) -> None:
    for junk in (b"", b"{", b"\xff", b'{"pid": 1, "host": "elsewhere"}', b"1\nelsewhere\n", b"9" * 9000):
        (tmp_path / ".lock").write_bytes(junk)
        with locked(tmp_path):
            pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"somebody's")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError, match="cannot be locked"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "target").read_bytes() == b"somebody's"


def test_an_unexpected_fault_of_flock_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(CheckpointError, match="cannot be locked: Input/output error"):
        RunLock(tmp_path).acquire()


@pytest.mark.slow  # an untrusted lock file is watched for two seconds
@pytest.mark.usefixtures("no_flock")
def test_without_flock_another_host_is_refused_and_the_way_out_named(tmp_path: Path) -> None:
    write_holder(tmp_path, 2**31 - 1, "elsewhere")  # no such process here: that says nothing of there
    with pytest.raises(CheckpointError, match=r"process \d+ on host 'elsewhere'.*delete .*\.lock"):
        RunLock(tmp_path).acquire()
    (tmp_path / ".lock").unlink()
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()}\n")
        assert not (tmp_path / ".lock").exists()


def hold_softly(folder: str) -> None:
    lock = SoftFileLock(Path(folder, ".lock"))
    lock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # an untrusted lock file is watched for two seconds
@pytest.mark.usefixtures("no_flock")
def test_without_flock_only_a_living_process_of_this_host_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on host .*delete .*\.lock"):
            RunLock(tmp_path).acquire()
    dead = multiprocessing.get_context("spawn").Process(target=hold_softly, args=[str(tmp_path)])
    dead.start()
    dead.join()
    assert (tmp_path / ".lock").read_text().startswith(f"{dead.pid}\n")
    with locked(tmp_path):
        pass


@pytest.mark.slow  # an untrusted lock file is watched for two seconds
@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("left", [b"", b"{", b'{"pid": 1, "host": "elsewhere"}\n'])
def test_without_flock_a_file_that_names_nobody_blocks_nobody(tmp_path: Path, left: bytes) -> None:
    """An empty one was given back, or made by an attempt at flock; the others a crash cut short."""
    (tmp_path / ".lock").write_bytes(left)
    with locked(tmp_path):
        pass


@pytest.mark.slow  # an untrusted lock file is watched for two seconds
@pytest.mark.usefixtures("no_flock")
def test_without_flock_hosts_cannot_put_lines_into_the_message(tmp_path: Path) -> None:
    write_holder(tmp_path, 7, "a\x1b\x07" * 99)
    with pytest.raises(CheckpointError) as caught:
        RunLock(tmp_path).acquire()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
