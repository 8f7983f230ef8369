"""A part of derived/ is made once, is whole or not there, and made anew when what it was made of differs."""

import errno
import fcntl
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_faults import failing_at, files_below, killed_at, run_with_fault

from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.derived import derive
from bertpair.checkpoints.lock import RunLock
from bertpair.checkpoints.manifest import Manifest, verify_folder
from bertpair.console import stop_flag
from bertpair.errors import CheckpointError, StoppedError

MADE_OF = {"weights": "ab12", "version": 1, "flags": ["a", None]}
FILES = {"one.bin": b"1" * 5000, "two.txt": b"2", "three.bin": b"3" * 300}
Make = Callable[[Staging], dict[str, Any]]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return new_model(tmp_path / "model")


def new_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def make(staging: Staging) -> dict[str, Any]:
    """Two files of its own, and one as a library writes it."""
    for name in ("one.bin", "two.txt"):
        staging.write_bytes(name, FILES[name])
    (staging.folder / "three.bin").write_bytes(FILES["three.bin"])
    staging.adopt("three.bin")
    return {"rows": 7}


def must_not_run(staging: Staging) -> dict[str, Any]:
    raise AssertionError("made a second time")


def derive_part(model: Path, make: Make = make, **changes: object) -> tuple[Path, Manifest]:
    return derive(model, "part", {**MADE_OF, **changes}, make)


def assert_whole(part: Path, **changes: object) -> None:
    """The part is there with all it must have, and nothing of an earlier or unfinished one is."""
    assert verify_folder(part).meta == {**MADE_OF, **changes, "rows": 7}
    assert {name: data for name, data in files_below(part).items() if name != "manifest.json"} == FILES
    assert {path.name for path in part.parent.iterdir()} == {"part", ".lock"}


@pytest.fixture
def read_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder, which cannot be written: not by the modes of files, which root passes over."""
    real = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: real(path, mode) and not (mode & os.W_OK and Path(path).is_relative_to(model)),
    )
    return model


def test_a_part_is_made_once(model: Path, cache: Path) -> None:
    part, manifest = derive_part(model)
    assert part == model / "derived" / "part" and manifest == verify_folder(part)
    assert_whole(part)
    before = {path: path.stat().st_mtime_ns for path in part.iterdir()}
    assert derive_part(model, must_not_run) == (part, manifest)
    assert {path: path.stat().st_mtime_ns for path in part.iterdir()} == before and not cache.exists()


def test_parts_do_not_touch_each_other(model: Path) -> None:
    for name in ("part", "part-2"):
        derive(model, name, MADE_OF, make)
    derive_part(model, version=2)
    assert derive(model, "part-2", MADE_OF, must_not_run)[1].meta["version"] == 1


@pytest.mark.parametrize("key", MADE_OF)
def test_another_value_makes_it_anew(model: Path, key: str) -> None:
    derive_part(model)
    for value in ("other", None):
        assert_whole(derive_part(model, **{key: value})[0], **{key: value})


def test_a_value_more_makes_it_anew(model: Path) -> None:
    derive_part(model)
    assert_whole(derive_part(model, more="x")[0], more="x")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "a folder"])
def test_what_is_damaged_is_made_anew(
    model: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = derive_part(model)[0] / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + b"x")
    part, _ = derive_part(model)
    assert caplog.text.count(f"made anew: {path}") == 1
    if name == "manifest.json" and damage in ("gone", "a folder"):  # so nothing says that it was ours
        (kept,) = part.parent.glob("part.kept-*")
        assert files_below(kept) == FILES
        kept.rename(model / "kept")
    assert_whole(part)
    derive_part(model, must_not_run)


def test_an_exception_leaves_what_was_there(model: Path) -> None:
    def fail(staging: Staging) -> dict[str, Any]:
        make(staging)
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            derive_part(model, fail)
        assert os.listdir(model / "derived") == [".lock"]
    part, _ = derive_part(model)
    with pytest.raises(ZeroDivisionError):
        derive_part(model, fail, version=2)
    assert_whole(part)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("replaces", [False, True])
def test_any_call_that_fails_is_an_error_and_the_next_attempt_works(
    tmp_path: Path, number: int, replaces: bool
) -> None:
    refused = 0
    for k in range(1, 200):
        model = new_model(tmp_path / f"{k}")
        place = model / "derived"
        if replaces:
            derive_part(model)
        raised: list[str] = []

        def work(model: Path = model, raised: list[str] = raised) -> None:
            try:
                derive_part(model, version=2)
            except CheckpointError as caught:
                raised.append(str(caught))

        log, error = run_with_fault(work, failing_at(k, number))
        assert error is None, (k, log[k - 1])
        if raised:
            refused += 1
            assert str(place) in raised[0] and os.strerror(number) in raised[0], (k, log[k - 1])
        if (place / "part" / "manifest.json").exists():
            assert verify_folder(place / "part").meta["version"] in ((1, 2) if replaces else (2,))
        else:
            assert raised and not (place / "part").exists()
        assert_whole(derive_part(model, version=2)[0], version=2)
        if len(log) < k:
            break
    assert refused > 15 and not raised


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True])
def test_wherever_it_is_killed_the_next_attempt_gives_a_whole_part(tmp_path: Path, replaces: bool) -> None:
    for k in range(1, 200):
        model = new_model(tmp_path / f"{k}")
        if replaces:
            derive_part(model)
        killed = killed_at(k, lambda model=model: derive_part(model, version=2))
        if (model / "derived" / "part").exists():
            verify_folder(model / "derived" / "part")
        assert_whole(derive_part(model, version=2)[0], version=2)
        if not killed:
            break
    assert k > 25


def test_what_another_process_is_making_is_not_taken_for_a_leftover(model: Path) -> None:
    part, _ = derive_part(model)
    half = part.with_name("part.tmp-12")
    half.mkdir()
    other = RunLock(part.parent)
    other.acquire()
    assert derive_part(model, must_not_run)[0] == part and half.exists()
    other.release()
    derive_part(model, must_not_run)
    assert_whole(part)


def make_slowly(model: Path, barrier: Any, results: Any) -> None:
    def slow(staging: Staging) -> dict[str, Any]:
        with open(model / "runs", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return make(staging)

    barrier.wait(60)
    path, manifest = derive_part(model, slow)
    results.put((path, manifest.meta))


def check_made_once(model: Path, results: Any) -> None:
    part = model / "derived" / "part"
    assert_whole(part)
    assert [results.get(timeout=60) for _ in range(2)] == [(part, verify_folder(part).meta)] * 2
    assert len((model / "runs").read_text().splitlines()) == 1


@pytest.mark.slow
def test_two_processes_at_once_make_it_once(model: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=make_slowly, args=(model, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    check_made_once(model, results)


def test_two_threads_at_once_make_it_once(model: Path) -> None:
    barrier, results = threading.Barrier(2), queue.Queue[object]()
    both = [threading.Thread(target=make_slowly, args=(model, barrier, results)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    check_made_once(model, results)


def test_a_stop_ends_the_wait_for_another_process(model: Path) -> None:
    (model / "derived").mkdir()
    other = RunLock(model / "derived")
    holder = threading.Thread(target=other.acquire)  # a thread that waited for itself would be told so
    holder.start()
    holder.join()
    timer = threading.Timer(0.2, stop_flag.request, [signal.SIGTERM])
    timer.start()
    try:
        with pytest.raises(StoppedError):
            derive_part(model)
    finally:
        timer.join()
        stop_flag.clear()
        other.release()
    assert_whole(derive_part(model)[0])


def test_a_model_folder_that_cannot_be_written_has_its_parts_in_the_cache(
    read_only: Path, cache: Path
) -> None:
    part, _ = derive_part(read_only)
    assert part.is_relative_to(cache / "bertpair") and not (read_only / "derived").exists()
    assert_whole(part)
    assert derive_part(read_only, must_not_run)[0] == part
    assert_whole(derive_part(read_only, version=2)[0], version=2)


def test_a_part_in_a_folder_that_can_only_be_read_is_used(
    model: Path, request: pytest.FixtureRequest, cache: Path
) -> None:
    part, _ = derive_part(model)
    request.getfixturevalue("read_only")
    assert derive_part(model, must_not_run)[0] == part and not cache.exists()
    other, _ = derive_part(model, version=2)
    assert other.is_relative_to(cache) and verify_folder(part).meta["version"] == 1
    assert derive_part(model, must_not_run, version=2)[0] == other
    assert derive_part(model, must_not_run)[0] == part


def test_a_part_that_others_may_not_look_into_is_passed_over(
    read_only: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that another user made with a strict umask."""
    real = os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).is_relative_to(read_only / "derived" / "part"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    (read_only / "derived" / "part").mkdir(parents=True)
    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "lstat", lambda path, **kwargs: refuse(path, follow_symlinks=False, **kwargs))
    assert derive_part(read_only)[0].is_relative_to(cache)


def test_models_of_one_name_have_two_places_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    models = [new_model(tmp_path / name / "model") for name in "ab"]
    places = [derive_part(model)[0].parent for model in models]
    assert len(set(places)) == 2 and all(place.name.startswith("model-") for place in places)
    (tmp_path / "link").symlink_to(models[0])
    assert derive_part(tmp_path / "link", must_not_run)[0].parent == places[0]


def test_a_cache_that_cannot_be_written_either_is_an_error(read_only: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match=rf"{cache}.*: cannot be written: Not a dir.*XDG_CACHE_HOME"):
        derive_part(read_only)


def test_a_user_without_a_home_is_told_to_name_a_cache(
    model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    derive_part(model)
    request.getfixturevalue("read_only")
    derive_part(model, must_not_run)
    with pytest.raises(CheckpointError, match="XDG_CACHE_HOME"):
        derive_part(model, version=2)


def test_a_file_in_the_place_of_the_folder_is_an_error(model: Path) -> None:
    (model / "derived").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{model}/derived: cannot be written: File exists"):
        derive_part(model)
    assert (model / "derived").read_text() == "mine"


def test_a_file_in_the_place_of_the_part_is_kept(model: Path) -> None:
    (model / "derived").mkdir()
    (model / "derived" / "part").write_text("mine")
    part, _ = derive_part(model)
    (kept,) = part.parent.glob("part.kept-*")
    assert kept.read_text() == "mine"
    verify_folder(part)


@pytest.mark.parametrize("has_flock", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_lock_of_a_dead_process_blocks_nobody(
    model: Path, has_flock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", refuse)
    place = model / "derived"
    place.mkdir()
    child = os.fork()
    if child == 0:
        lock = RunLock(place)
        lock.acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert (place / ".lock").read_text().startswith(f"{child}\n")
    part, _ = derive_part(model)
    verify_folder(part)
    assert not list(place.glob("part.*"))
