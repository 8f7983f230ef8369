"""Shared by the tests of saving: system calls that fail, stop short or kill the process at the k-th."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALLS = ("mkdir", "chmod", "open", "write", "fsync", "close", "rename", "replace", "link", "unlink", "rmdir")
Call = Callable[..., Any]
Act = Callable[[int, str, Call, tuple[Any, ...], dict[str, Any]], Any]


def intercept(patch: Callable[[object, str, object], None], act: Act) -> list[str]:
    """Every call of CALLS goes through `act(number, name, real, args, kwargs)`; returns the growing log."""
    log: list[str] = []

    def wrapped(name: str, real: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return act(len(log), name, real, args, kwargs)

        return call

    for name in CALLS:
        patch(os, name, wrapped(name, getattr(os, name)))
    return log


def failing_at(k: int, number: int, for_ever: bool = False) -> Act:
    """The k-th call raises OSError `number`; with `for_ever`, so does each later one."""

    def act(count: int, name: str, real: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if count == k or (for_ever and count > k):
            if name == "close":  # as on Linux: the descriptor is gone all the same
                real(*args, **kwargs)
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return act


def run_with_fault(work: Callable[[], object], act: Act) -> tuple[list[str], OSError | None]:
    """Run `work` with the calls intercepted; the log, and the OSError that came out."""
    with pytest.MonkeyPatch.context() as patch:
        log = intercept(patch.setattr, act)
        try:
            work()
        except OSError as error:
            return log, error
    return log, None


def durability_events(work: Callable[[], object]) -> list[tuple[str, str]]:
    """The writes, fsyncs and renames of `work` in their order, each with the name of its file or folder."""
    opened: dict[int, str] = {}
    events: list[tuple[str, str]] = []

    def record(count: int, name: str, real: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = real(*args, **kwargs)
        if name == "open":
            opened[result] = Path(args[0]).name
        if name in ("write", "fsync"):
            events.append((name, opened[args[0]]))
        elif name in ("rename", "replace"):
            events.append((name, Path(args[0]).name))
        return result

    _, error = run_with_fault(work, record)
    assert error is None
    return events


def killed_at(k: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before its k-th call, as by SIGKILL; False if it had fewer."""
    child = os.fork()
    if child == 0:
        exit_now = os._exit

        def act(count: int, name: str, real: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if count == k:
                exit_now(9)
            return real(*args, **kwargs)

        try:
            intercept(setattr, act)
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            exit_now(1)
        exit_now(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), f"the child failed with {status}"
    return status == 9


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
