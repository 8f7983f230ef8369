"""What `staged_folder` leaves behind: all of it, or nothing, whatever call fails and wherever it dies."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from disk_faults import ERRORS, durability_events, failing_at, files_below, killed_at, run_with_fault
from safetensors.torch import load_file

from bertpair.checkpoints import atomic as staging
from bertpair.checkpoints.atomic import staged_folder
from bertpair.checkpoints.checkpoint import load_tensors, newest_whole, remove_leftovers
from bertpair.checkpoints.manifest import verify_folder
from bertpair.settings.files import read_json

TENSORS = {
    "weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "half": torch.arange(5, dtype=torch.float16),
    "brain": torch.arange(3, dtype=torch.bfloat16),
    "double": torch.tensor(0.1, dtype=torch.float64),
    "count": torch.tensor([2**40], dtype=torch.int64),
    "random_state": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here cuts the power: fsync is called, counted and failed, but need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(output_dir: Path, step: int, run_id: str = "a") -> Path:
    final = output_dir / f"checkpoint-{step}"
    with staged_folder(final, versions={"bertpair": "0"}, meta={"step": step, "run_id": run_id}) as folder:
        folder.write_tensors("model.safetensors", TENSORS, {"format": "pt"})
        folder.write_bytes("vocab.txt", b"[PAD]\n" * step)
        folder.write_json("trainer_state.json", {"global_step": step, "name": "评分"})
    return final


def test_a_saved_folder_reads_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = verify_folder(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert sorted(files_below(path)) == [
        "manifest.json", "model.safetensors", "trainer_state.json", "vocab.txt",
    ]  # fmt: skip
    assert (manifest.run_id, manifest.meta["step"], manifest.versions) == ("a", 3, {"bertpair": "0"})
    assert read_json(path / "trainer_state.json") == {"global_step": 3, "name": "评分"}
    for loaded in (load_tensors(path, "model.safetensors", manifest), load_file(path / "model.safetensors")):
        assert loaded.keys() == TENSORS.keys()
        assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in TENSORS.items())


def test_others_may_read_what_was_saved(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o644}


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    shuffled = {name: TENSORS[name].t().contiguous().t() if TENSORS[name].dim() == 2 else TENSORS[name]
                for name in reversed(TENSORS)}  # fmt: skip
    with staged_folder(tmp_path / "a", meta={"x": 1, "y": 2}) as folder:
        folder.write_tensors("t", TENSORS, {"k": "1", "j": "2"})
    with staged_folder(tmp_path / "b", meta={"y": 2, "x": 1}) as folder:
        folder.write_tensors("t", shuffled, {"j": "2", "k": "1"})
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_names_come_after_bytes_and_the_manifest_after_all(tmp_path: Path) -> None:
    events = durability_events(lambda: save(tmp_path, 2))
    files = ("model.safetensors", "vocab.txt", "trainer_state.json")
    manifest = events.index(("write", "manifest.json"))
    for name in files:
        last_write = max(i for i, event in enumerate(events) if event == ("write", name))
        assert last_write < max(i for i, event in enumerate(events) if event == ("fsync", name)) < manifest
    temporary = f"checkpoint-2.tmp-{os.getpid()}"
    assert events[manifest + 1 :] == [
        ("fsync", "manifest.json"),
        ("fsync", temporary),
        ("rename", temporary),
        ("fsync", tmp_path.name),
    ]


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "a") as folder:
        folder.write_bytes("x", b"x")
        _ = 1 / 0
    with pytest.raises(ValueError, match="JSON"), staged_folder(tmp_path / "a") as folder:
        folder.write_json("x", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_every_failing_call_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    tried = 0
    for number in ERRORS:
        for k in range(1, 200):
            output = tmp_path / f"{number}-{k}"
            output.mkdir()
            before = files_below(save(output, 1))
            log, error = run_with_fault(lambda output=output: save(output, 2), failing_at(k, number))
            if len(log) < k:
                break
            tried += 1
            assert error is not None and error.errno == number, (k, log[k - 1])
            assert error.filename or log[k - 1] in ("mkdir", "rename", "chmod"), (k, log[k - 1])
            assert "fsync" not in log[k:] or log[k - 1] != "fsync"  # what failed once is not tried again
            assert [p.name for p in output.iterdir()] == ["checkpoint-1"]
            assert files_below(output / "checkpoint-1") == before
            verify_folder(save(output, 2))
    assert tried > 3 * 20


def test_a_disk_that_stays_broken_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    for k in range(1, 200):
        output = tmp_path / f"{k}"
        output.mkdir()
        before = files_below(save(output, 1))
        act = failing_at(k, errno.EIO, for_ever=True)
        log, error = run_with_fault(lambda output=output: save(output, 2), act)
        if len(log) < k:
            break
        assert error is not None
        remove_leftovers(output)  # the next start, on a disk that works again
        names = {p.name for p in output.iterdir()}
        # Where the last fsync failed, and taking the rename back did too, the whole folder stands.
        assert names == {"checkpoint-1"} or (names == {"checkpoint-1", *names} and "rename" in log[: k - 1])
        assert files_below(output / "checkpoint-1") == before
        newest = newest_whole(output)
        assert newest.path and not newest.faults
    assert k > 20


def test_short_writes_are_continued(tmp_path: Path) -> None:
    def one_byte(count, name, real, args, kwargs):
        return real(args[0], args[1][:1]) if name == "write" else real(*args, **kwargs)

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = files_below(save(tmp_path / "a", 2))
    log, error = run_with_fault(lambda: save(tmp_path / "b", 2), one_byte)
    assert error is None and log.count("write") > 500
    assert files_below(tmp_path / "b" / "checkpoint-2") == whole


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    def nothing(count, name, real, args, kwargs):
        return 0 if name == "write" else real(*args, **kwargs)

    _, error = run_with_fault(lambda: save(tmp_path, 2), nothing)
    assert error is not None and error.errno == errno.EIO and list(tmp_path.iterdir()) == []


def test_replacing_a_folder_is_all_or_nothing(tmp_path: Path) -> None:
    for k in range(1, 200):
        output = tmp_path / f"{k}"
        output.mkdir()
        before = files_below(save(output, 2, run_id="old"))
        act = failing_at(k, errno.EIO)
        log, error = run_with_fault(lambda output=output: save(output, 2, run_id="new"), act)
        if len(log) < k:
            break
        manifest = verify_folder(output / "checkpoint-2")
        remove_leftovers(output)
        assert [p.name for p in output.iterdir()] == ["checkpoint-2"]
        assert manifest.run_id == ("old" if error else "new")
        assert not error or files_below(output / "checkpoint-2") == before
    assert k > 25 and log.count("rename") == 2


@pytest.mark.slow
def test_a_kill_between_any_two_calls_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for k in range(1, 200):
        output = tmp_path / f"{k}"
        output.mkdir()
        save(output, 1)
        killed = killed_at(k, lambda output=output: save(output, 2))
        assert {p.name for p in output.iterdir() if ".tmp-" not in p.name} <= {"checkpoint-1", "checkpoint-2"}
        newest = newest_whole(output)
        assert newest.path and not newest.faults  # what has a final name is whole, before any cleaning up
        remove_leftovers(output)
        assert {p.name for p in output.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        verify_folder(output / "checkpoint-1")
        if not killed:
            break
    assert k > 20


@pytest.mark.slow
def test_a_kill_while_replacing_loses_neither(tmp_path: Path) -> None:
    restored = 0
    for k in range(1, 200):
        output = tmp_path / f"{k}"
        output.mkdir()
        save(output, 2, run_id="old")
        killed = killed_at(k, lambda output=output: save(output, 2, run_id="new"))
        restored += not (output / "checkpoint-2").exists()
        remove_leftovers(output)
        assert [p.name for p in output.iterdir()] == ["checkpoint-2"]
        assert verify_folder(output / "checkpoint-2").run_id in ("old", "new")
        if not killed:
            break
    assert k > 25 and restored == 1  # the one gap in which the name is empty


def test_a_folder_bertpair_did_not_write_is_moved_aside_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "pytorch_model.bin").write_bytes(b"precious")
    verify_folder(save(tmp_path, 2))
    kept = tmp_path / f"checkpoint-2.kept-{os.getpid()}"
    assert files_below(kept) == {"pytorch_model.bin": b"precious"}
    assert str(kept) in caplog.text
    remove_leftovers(tmp_path)
    assert kept.exists()


def test_the_manifest_states_itself(tmp_path: Path) -> None:
    stated = json.loads((save(tmp_path, 1) / "manifest.json").read_text(encoding="utf-8"))
    rest = {key: value for key, value in stated.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated["sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert [entry["name"] for entry in stated["files"]] == [
        "model.safetensors", "trainer_state.json", "vocab.txt",
    ]  # fmt: skip


def test_a_second_attempt_never_writes_into_what_the_first_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary folder that cannot be removed is left to the next start; the save takes another name."""
    left = tmp_path / f"checkpoint-3.tmp-{os.getpid()}"
    left.mkdir()
    (left / "vocab.txt").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "remove", lambda path: False)
        save(tmp_path, 3)
    verify_folder(tmp_path / "checkpoint-3")
    assert (left / "vocab.txt").read_bytes() == b"half"
    (tmp_path / f"checkpoint-4.tmp-{os.getpid()}-2").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_many_files_are_hashed_while_later_ones_are_written(tmp_path: Path) -> None:
    blobs = {f"f{i}": os.urandom(1 << 20) for i in range(6)}
    with staged_folder(tmp_path / "checkpoint-1") as folder:
        for name, data in blobs.items():
            folder.write_bytes(name, data)
    entries = {entry.name: entry.sha256 for entry in verify_folder(tmp_path / "checkpoint-1").files}
    assert entries == {name: hashlib.sha256(data).hexdigest() for name, data in blobs.items()}
