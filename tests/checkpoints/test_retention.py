"""What goes and what stays: pruning, leftovers, other runs, and nothing that bertpair did not write."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disk_faults import failing_at, files_below, killed_at, run_with_fault

from bertpair.checkpoints.atomic import Staging, staged_folder
from bertpair.checkpoints.checkpoint import (
    checkpoint_folder,
    discard_evaluations,
    discard_others,
    list_checkpoints,
    newest_whole,
    prune,
    remove_leftovers,
)
from bertpair.checkpoints.derived import derive


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def save(output_dir: Path, step: int, run_id: str = "a") -> Path:
    final = checkpoint_folder(output_dir, step)
    with staged_folder(final, meta={"step": step, "run_id": run_id}) as folder:
        folder.write_bytes("model.safetensors", b"m" * 100)
    return final


def steps(output_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(output_dir)]


def test_prune_keeps_the_last_ones_and_does_not_count_the_best(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step) for step in (8, 9, 10, 11, 12)}
    assert prune(tmp_path, None, last=12, run_id="a") == []
    assert prune(tmp_path, 2, last=12, run_id="a", best=8) == [paths[9], paths[10]]
    assert steps(tmp_path) == [8, 11, 12]
    assert prune(tmp_path, 2, last=12, run_id="a", best=8) == []
    prune(tmp_path, 0, last=12, run_id="a")
    assert steps(tmp_path) == [12]


def test_prune_never_takes_the_last_verified_for_a_damaged_newer_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"")  # a resume went on from 1
    save(tmp_path, 2)
    prune(tmp_path, 1, last=2, run_id="a")
    assert steps(tmp_path) == [2, 3]
    assert newest_whole(tmp_path).path == tmp_path / "checkpoint-2"


def test_prune_spares_other_runs_and_what_it_does_not_know(tmp_path: Path) -> None:
    save(tmp_path, 1, run_id="b")
    (save(tmp_path, 2) / "manifest.json").write_bytes(b"{}")
    (tmp_path / "checkpoint-4").mkdir()  # another program's
    save(tmp_path, 5)
    save(tmp_path, 6)
    assert prune(tmp_path, 1, last=6, run_id="a") == [tmp_path / "checkpoint-5"]
    assert steps(tmp_path) == [1, 2, 4, 6]


def test_what_somebody_added_to_a_pruned_checkpoint_stays_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    added = save(tmp_path, 3) / "notes" / "mine.txt"
    added.parent.mkdir()
    added.write_text("mine")
    save(tmp_path, 6)
    assert prune(tmp_path, 1, last=6, run_id="a") == [tmp_path / "checkpoint-3"]
    kept = tmp_path / f"checkpoint-3.kept-{os.getpid()}"
    assert files_below(kept) == {"notes/mine.txt": b"mine"} and steps(tmp_path) == [6]
    assert str(kept) in caplog.text and "notes" in caplog.text
    remove_leftovers(tmp_path)
    assert (kept / "notes" / "mine.txt").read_text() == "mine"


def derive_part(model: Path) -> Path:
    def make(staging: Staging) -> dict[str, object]:
        staging.write_bytes("part.bin", b"p" * 100)
        return {}

    return derive(model, "part", {"weights": "ab12"}, make)[0]


def test_what_was_derived_from_a_pruned_checkpoint_goes_with_it(tmp_path: Path) -> None:
    part = derive_part(save(tmp_path, 3))
    part.with_name("part.tmp-12").mkdir()  # a crash left it
    save(tmp_path, 6)
    assert prune(tmp_path, 1, last=6, run_id="a") == [tmp_path / "checkpoint-3"]
    assert os.listdir(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize("name", ["notes.txt", "derived/notes.txt", "derived"])
def test_what_somebody_added_beside_it_stays(tmp_path: Path, name: str) -> None:
    added = save(tmp_path, 3) / name
    if name != "derived":
        derive_part(added.parents[name.count("/")])
    added.write_text("mine")
    save(tmp_path, 6)
    assert prune(tmp_path, 1, last=6, run_id="a") == [tmp_path / "checkpoint-3"]
    kept = files_below(tmp_path / f"checkpoint-3.kept-{os.getpid()}")
    assert kept[name] == b"mine" and "model.safetensors" not in kept
    assert len(kept) == 1 or name == "derived/notes.txt"  # the parts in that folder stay with it


def test_a_kill_while_pruning_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for k in range(1, 50):
        output = tmp_path / f"{k}"
        output.mkdir()
        save(output, 1)
        last = save(output, 2)
        killed = killed_at(k, lambda output=output: prune(output, 1, last=2, run_id="a"))
        assert newest_whole(output).path == last
        if (output / "checkpoint-1").exists():
            assert len(files_below(output / "checkpoint-1")) == 2
        remove_leftovers(output)
        assert {p.name for p in output.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        if not killed:
            break
    assert k > 6


def test_a_prune_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    for k in range(1, 50):
        output = tmp_path / f"{k}"
        output.mkdir()
        save(output, 1)
        last = save(output, 2)
        act = failing_at(k, errno.EIO)
        log, error = run_with_fault(lambda output=output: prune(output, 1, last=2, run_id="a"), act)
        assert error is None and newest_whole(output).path == last
        if len(log) < k:
            break
    assert k > 6


def test_an_old_run_goes_only_once_the_new_one_has_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 50, run_id="old")
    (tmp_path / "checkpoint-60").mkdir()
    assert discard_others(tmp_path, "new") == []
    (save(tmp_path, 1, run_id="new") / "model.safetensors").write_bytes(b"")
    assert discard_others(tmp_path, "new") == []
    save(tmp_path, 2, run_id="new")
    assert discard_others(tmp_path, "new") == [tmp_path / "checkpoint-50"]
    assert steps(tmp_path) == [1, 2, 60]


def test_what_was_derived_from_an_old_runs_checkpoint_goes_with_it(tmp_path: Path) -> None:
    derive_part(save(tmp_path, 50, run_id="old"))
    derive_part(save(tmp_path, 2, run_id="new"))
    assert discard_others(tmp_path, "new") == [tmp_path / "checkpoint-50"]
    assert os.listdir(tmp_path) == ["checkpoint-2"] and newest_whole(tmp_path, "new").path


def test_leftovers_go_and_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    gone = [
        f"checkpoint-5.tmp-{dead_pid}",
        "checkpoint-6.tmp-1",  # a number in use, but by no run: the lock is ours
        f"final.ready.tmp-{dead_pid}",
        f"checkpoint-7.old-{dead_pid}",
    ]
    stays = [
        "checkpoint-5",
        "checkpoint-5.kept-12",
        "checkpoint-5.tmp",
        "checkpoint-x.tmp-12",
        "mine.tmp-12",
        f"checkpoint-5.tmp-{dead_pid}x",
        "eval/dev.tsv",
    ]
    for name in (*gone, *stays):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / "checkpoint-9.tmp-12").symlink_to(tmp_path / "mine.tmp-12")
    files = [f".model.safetensors.tmp-{dead_pid}", f".config.json.tmp-{os.getpid()}"]  # ours: a number again
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    for name in (f".notes.tmp-{dead_pid}", f".metrics.jsonl.tmp-{os.getppid()}", "checkpoint-8.tmp-12"):
        (tmp_path / name).write_bytes(b"x")
    removed = {str(p.relative_to(tmp_path)) for p in remove_leftovers(tmp_path)}
    assert removed == {*gone, *files}
    assert all((tmp_path / name / "file").exists() for name in stays)
    assert (tmp_path / "checkpoint-9.tmp-12").is_symlink() and (tmp_path / "checkpoint-8.tmp-12").exists()
    assert (tmp_path / f".notes.tmp-{dead_pid}").exists()
    assert (tmp_path / f".metrics.jsonl.tmp-{os.getppid()}").exists()
    assert remove_leftovers(tmp_path / "missing") == []


def test_a_checkpoint_that_stepped_aside_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "checkpoint-5.old-12")
    assert remove_leftovers(tmp_path) == []
    assert newest_whole(tmp_path).path == tmp_path / "checkpoint-5"


def test_only_results_of_other_runs_models_go(tmp_path: Path) -> None:
    for name, content in (
        ("old", '{"run_id": "r1"}'),
        ("with-notes", '{"run_id": null}'),
        ("now", '{"run_id": "r2"}'),
        ("strange", "[]"),
        ("not-ours", None),
    ):
        folder = tmp_path / "eval" / name
        folder.mkdir(parents=True)
        (folder / "predictions.tsv").write_bytes(b"x")
        if content is not None:
            (folder / "input.json").write_text(content)
    (tmp_path / "eval/with-notes/notes.txt").write_text("mine")
    discard_evaluations(tmp_path, "r2")
    left = {str(p.relative_to(tmp_path / "eval")) for p in (tmp_path / "eval").rglob("*") if p.is_file()}
    assert left == {
        "now/predictions.tsv",
        "now/input.json",
        "strange/predictions.tsv",
        "strange/input.json",
        "not-ours/predictions.tsv",
        "with-notes/notes.txt",
    }
