"""Files replaced whole, folders installed and retired, and the arithmetic of free space."""

import errno
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from disk_faults import Call, durability_events, failing_at, files_below, killed_at, run_with_fault

from bertpair.checkpoints.atomic import (
    append,
    check_free_space,
    durable_length,
    fsync_folder,
    remove,
    replace_file,
    write_file,
)
from bertpair.checkpoints.run_folder import RunFolder
from bertpair.errors import CheckpointError


def test_a_replaced_file_is_the_old_or_the_new_whichever_call_fails(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for k in range(1, 50):
        path.write_bytes(b"old")
        log, error = run_with_fault(lambda: replace_file(path, b"new"), failing_at(k, errno.EIO))
        assert not error or error.filename
        assert files_below(tmp_path) in ({"f": b"old"}, {"f": b"new"})
        if len(log) < k:
            break
    assert k > 6 and error is None and path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_replaced_file_is_durable_before_it_has_its_name_and_then_the_name_is(tmp_path: Path) -> None:
    temporary = f".f.tmp-{os.getpid()}"
    assert durability_events(lambda: replace_file(tmp_path / "f", b"new")) == [
        ("write", temporary),
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", tmp_path.name),
    ]


def test_a_replaced_file_is_the_old_or_the_new_wherever_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for k in range(1, 50):
        path.write_bytes(b"old")
        killed = killed_at(k, lambda: replace_file(path, b"new"))
        assert path.read_bytes() in (b"old", b"new")
        if not killed:
            break
    assert k > 6 and path.read_bytes() == b"new"


def test_an_appended_line_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def short(count: int, name: str, real: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "write" and count == 2:
            return real(args[0], args[1][:3])
        return failing_at(3, errno.ENOSPC)(count, name, real, args, kwargs)

    append(path, b"one\n")
    log, error = run_with_fault(lambda: append(path, b"second\n"), short)
    assert log[:3] == ["open", "write", "write"] and error is not None and error.filename == str(path)
    assert path.read_bytes() == b"one\n"
    append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n" and durable_length(path) == 8
    path.unlink()
    assert durable_length(path) == 0 and path.exists()


def test_a_file_whose_mode_cannot_be_set_is_not_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def refuse(descriptor: int, mode: int) -> None:
        opened.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(OSError):
        write_file(tmp_path / "f", [])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_folder_that_cannot_be_synced_is_tolerated_only_where_the_system_has_no_such_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_folder(tmp_path)
    number = errno.EINVAL

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    fsync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match=str(tmp_path)):
        fsync_folder(tmp_path)
    number = errno.EINVAL
    with pytest.raises(OSError, match="f'"):
        write_file(tmp_path / "f", [])


def test_a_retired_folder_is_gone_and_a_failure_only_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"")
    assert remove(tmp_path / "a", is_whole=True) and not list(tmp_path.iterdir())
    assert not remove(tmp_path / "a", is_whole=True)
    assert "cannot be removed" in caplog.text


def test_a_run_needs_room_for_kept_checkpoints_one_in_writing_and_the_final_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    for size, needed in ((0, r"0\.02"), (10**9, r"13\.02")):  # 4 checkpoints of 3 GB and a model of 1 GB
        folder = RunFolder(tmp_path / str(size))
        with pytest.raises(CheckpointError, match=f"this run needs {needed} GB"):
            folder.begin(None, num_kept=3, save_total_limit=3, weights_bytes=size, optimizer_bytes=2 * size)
        folder.close()


def test_too_little_free_space_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(10, 5, 1_100_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_free_space(tmp_path / "not" / "there" / "yet", 1_100_000_000, "training")
    assert asked == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    check_free_space(tmp_path, 10**12, "training")  # a share that does not say
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(CheckpointError, match=r"training needs 2\.30 GB, 1\.10 GB are free; .*total_limit"):
        check_free_space(tmp_path, 2_300_000_000, "training")
