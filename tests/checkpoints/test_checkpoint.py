"""Finding, verifying and reading checkpoints; the final model's move up. Damage is named, never used."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_bert
from disk_faults import durability_events, failing_at, files_below, killed_at, run_with_fault

from bertpair.checkpoints.atomic import Staging, staged_folder
from bertpair.checkpoints.checkpoint import (
    checkpoint_folder,
    final_folder,
    list_checkpoints,
    load_tensors,
    newest_whole,
    open_model,
    publish_final,
    remove_leftovers,
)
from bertpair.checkpoints.derived import derive
from bertpair.checkpoints.manifest import verify_folder
from bertpair.errors import CheckpointError
from bertpair.settings.files import read_json


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(output_dir: Path, step: int, run_id: str = "a") -> Path:
    final = checkpoint_folder(output_dir, step)
    with staged_folder(final, meta={"step": step, "run_id": run_id}) as folder:
        folder.write_tensors("model.safetensors", {"w": torch.full((50,), float(step))})
        folder.write_tensors("optimizer.safetensors", {"m": torch.arange(50.0) + step})
        folder.write_bytes("vocab.txt", b"[PAD]\n[UNK]\n")
        folder.write_json("trainer_state.json", {"global_step": step})
    return final


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_checkpoints_come_in_numeric_order_and_nothing_else_counts(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "missing") == []
    for step in (1000, 9, 200, 0):
        checkpoint_folder(tmp_path, step).mkdir()
    for suffix in ("007", "", "1x", "-1", "5.tmp-12", "٣"):
        (tmp_path / f"checkpoint-{suffix}").mkdir()
    (tmp_path / "checkpoint-11").write_bytes(b"")
    (tmp_path / "checkpoint-12").symlink_to(tmp_path / "checkpoint-9")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [0, 9, 200, 1000]
    assert list_checkpoints(tmp_path)[1][1] == tmp_path / "checkpoint-9"


def test_the_newest_checkpoint_is_the_highest_of_the_run(tmp_path: Path) -> None:
    save(tmp_path, 900, run_id="other")
    for step in (5, 40):
        save(tmp_path, step)
    newest = newest_whole(tmp_path, "a")
    assert (newest.path, newest.faults) == (tmp_path / "checkpoint-40", [])
    assert newest.manifest and newest.manifest.meta["step"] == 40
    assert newest_whole(tmp_path).path == tmp_path / "checkpoint-900"
    assert newest_whole(tmp_path, "third") == (None, None, [])


def damages() -> dict[str, Callable[[Path, str], object]]:
    def swap(folder: Path, name: str) -> None:
        other = next(p for p in sorted(folder.iterdir()) if p.name not in (name, "manifest.json"))
        one, two = (folder / name).read_bytes(), other.read_bytes()
        (folder / name).write_bytes(two)
        other.write_bytes(one)

    def link(folder: Path, name: str) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    def folder_instead(folder: Path, name: str) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return {
        "a flipped bit": lambda folder, name: flip_bit(folder / name, 77),
        "emptied": lambda folder, name: (folder / name).write_bytes(b""),
        "gone": lambda folder, name: (folder / name).unlink(),
        "longer": lambda folder, name: (folder / name).open("ab").write(b"\n"),
        "swapped": swap,
        "a link": link,
        "a folder": folder_instead,
    }


FILES = ("model.safetensors", "optimizer.safetensors", "vocab.txt", "trainer_state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", damages())
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damages()[damage](newest, name)
    found = newest_whole(tmp_path, "a") if name != "manifest.json" else newest_whole(tmp_path)
    assert found.path == before
    assert len(found.faults) == 1 and str(newest / name) in found.faults[0]
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        verify_folder(newest)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in FILES:
        whole = (path / name).read_bytes()
        for percent in range(100):
            (path / name).write_bytes(whole[: len(whole) * percent // 100])
            with pytest.raises(CheckpointError, match=name):
                verify_folder(path)
        (path / name).write_bytes(whole)
    verify_folder(path)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    draw = random.Random(5)
    for name in FILES:
        size = 8 * (path / name).stat().st_size
        bits = range(0, size, 17) if name == "manifest.json" else draw.sample(range(size), 40)
        for bit in bits:
            flip_bit(path / name, bit)
            with pytest.raises(CheckpointError, match=name):
                verify_folder(path)
            if name.endswith(".safetensors"):  # also by whoever reads without verifying the folder first
                with pytest.raises(CheckpointError, match=name):
                    load_tensors(path, name)
            flip_bit(path / name, bit)
    verify_folder(path)


def test_with_no_whole_checkpoint_all_faults_are_listed(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").unlink()
    flip_bit(save(tmp_path, 2) / "vocab.txt", 3)
    newest = newest_whole(tmp_path)
    assert newest.path is None and newest.manifest is None
    assert [fault.split(": ")[0] for fault in newest.faults] == [
        str(tmp_path / "checkpoint-2" / "vocab.txt"),
        str(tmp_path / "checkpoint-1" / "manifest.json"),
    ]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "checkpoint-3")
    newest = newest_whole(tmp_path)
    assert newest.path == tmp_path / "checkpoint-1" and "step 2" in newest.faults[0]


def test_what_the_manifest_does_not_name_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / ".nfs0001").write_bytes(b"")
    (path / "pytorch_model.bin").write_bytes(b"evil")
    (path / "eval").mkdir()
    verify_folder(path)
    assert newest_whole(tmp_path).path == path
    with pytest.raises(CheckpointError, match="not named"):
        load_tensors(path, "pytorch_model.bin")


def test_what_was_derived_from_a_model_is_none_of_it(tmp_path: Path) -> None:
    def make(staging: Staging) -> dict[str, object]:
        staging.write_bytes("model.safetensors", b"another network's")
        staging.write_json("config.json", {})
        return {}

    plain = write_tiny_bert(tmp_path / "plain")
    stage_final(tmp_path, "first", {path.name: path.read_bytes() for path in plain.iterdir()})
    publish_final(tmp_path)
    before, manifest = open_model(tmp_path), verify_folder(tmp_path)
    part, _ = derive(tmp_path, "part", {}, make)
    for _ in range(2):
        assert open_model(tmp_path) == before and verify_folder(tmp_path) == manifest
        (part / "model.safetensors").write_bytes(b"damaged")


def test_what_was_derived_from_a_staged_model_does_not_hinder_the_move(tmp_path: Path) -> None:
    for word in ("first", "second"):
        stage_final(tmp_path, word)
        for folder in (tmp_path / "final.ready", tmp_path):
            derive(folder, "part", {"weights": word}, lambda staging: {})
        assert publish_final(tmp_path) and model_in(tmp_path) == word
        assert set(files_below(tmp_path / "derived")) == {".lock", "part/manifest.json"}
        assert not (tmp_path / "final.ready").exists()


def test_only_named_files_are_read_and_only_with_sense(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "x") as folder:
        folder.write_bytes("bad.json", b"{")
        folder.write_bytes("bad.safetensors", b"\x05\0\0\0\0\0\0\0{}")
        folder.write_bytes("empty.safetensors", b"")
        folder.write_tensors("nan.safetensors", {"a": torch.ones(2), "b": torch.tensor([1, float("nan")])})
    (tmp_path / "x" / "extra").write_bytes(b"x")
    complaints = {"bad.safetensors": "header", "empty.safetensors": "too small", "extra": "not named"}
    for name, complaint in complaints.items():
        with pytest.raises(CheckpointError, match=complaint):
            load_tensors(tmp_path / "x", name)
    with pytest.raises(CheckpointError, match="bad.json: not usable JSON"):
        read_json(tmp_path / "x" / "bad.json")
    with pytest.raises(CheckpointError, match="nan.safetensors: 'b' holds NaN or infinity"):
        load_tensors(tmp_path / "x", "nan.safetensors")


MODEL = ("config.json", "model.safetensors", "vocab.txt")


def stage_final(output_dir: Path, word: str, files: Mapping[str, bytes] | None = None) -> None:
    with staged_folder(output_dir / "final.ready", meta={"run_id": word}) as folder:
        for name, data in (files or {name: f"{word} {name}".encode() for name in MODEL}).items():
            folder.write_bytes(name, data)


def model_in(output_dir: Path) -> str:
    """Whose model a reader finds; it must never be a mixture, nor unverified."""
    folder = final_folder(output_dir)
    verify_folder(folder)
    words = {(folder / name).read_text().split()[0] for name in MODEL}
    assert len(words) == 1
    return words.pop()


def test_the_final_model_moves_up_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "vocab.txt").write_text("old")
    assert publish_final(tmp_path) is False
    stage_final(tmp_path, "first")
    assert model_in(tmp_path) == "first"
    assert publish_final(tmp_path) is True
    assert set(files_below(tmp_path)) == {*MODEL, "manifest.json", "notes.txt"}
    assert model_in(tmp_path) == "first" and (tmp_path / "notes.txt").read_text() == "mine"
    assert publish_final(tmp_path) is False


def test_the_files_names_are_durable_before_the_manifest_and_that_before_the_staged_folder_goes(
    tmp_path: Path,
) -> None:
    stage_final(tmp_path, "first")
    events = durability_events(lambda: publish_final(tmp_path))
    names = [f".{name}.tmp-{os.getpid()}" for name in (*sorted(MODEL), "manifest.json")]
    assert events[:6] == [
        *(("replace", name) for name in names[:3]),
        ("fsync", tmp_path.name),
        ("replace", names[3]),
        ("fsync", tmp_path.name),
    ]
    assert events[6][0] == "rename"


@pytest.mark.slow
def test_readers_find_one_whole_model_wherever_the_move_is_killed(tmp_path: Path) -> None:
    for k in range(1, 100):
        output = tmp_path / f"{k}"
        output.mkdir()
        stage_final(output, "old")
        publish_final(output)
        stage_final(output, "new")
        killed = killed_at(k, lambda output=output: publish_final(output))
        assert model_in(output) == "new"
        remove_leftovers(output)
        publish_final(output)
        assert model_in(output) == "new"
        assert {p.name for p in output.iterdir()} == {*MODEL, "manifest.json"}
        if not killed:
            break
    assert k > 15


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_a_failing_call_in_the_move_is_made_good_by_the_next(tmp_path: Path, links: bool) -> None:
    for k in range(1, 100):
        output = tmp_path / f"{k}"
        output.mkdir()
        stage_final(output, "old")
        publish_final(output)
        stage_final(output, "new")
        fail = failing_at(k, errno.EIO)

        def act(count, name, real, args, kwargs, fail=fail):
            if name == "link" and not links:
                raise OSError(errno.ENOTSUP, "no links here")
            return fail(count, name, real, args, kwargs)

        log, error = run_with_fault(lambda output=output: publish_final(output), act)
        assert model_in(output) == "new"
        assert not error or str(output) in str(error)
        remove_leftovers(output)
        publish_final(output)
        assert model_in(output) == "new" and not (output / "final.ready").exists()
        assert len(files_below(output)) == 4
        if len(log) < k:
            break
    assert k > 15


def test_a_damaged_staged_model_is_passed_over_and_never_moved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage_final(tmp_path, "old")
    publish_final(tmp_path)
    stage_final(tmp_path, "new")
    flip_bit(tmp_path / "final.ready" / "model.safetensors", 9)
    assert model_in(tmp_path) == "old"
    assert "final.ready/model.safetensors" in caplog.text
    with pytest.raises(CheckpointError, match="model.safetensors"):
        publish_final(tmp_path)
    assert model_in(tmp_path) == "old"


def test_a_plain_model_folder_is_its_own_final_folder(tmp_path: Path) -> None:
    assert final_folder(tmp_path) == tmp_path
    assert final_folder(tmp_path / "missing") == tmp_path / "missing"


def test_a_folder_copied_elsewhere_still_verifies(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 4), tmp_path / "copy")
    assert verify_folder(tmp_path / "copy").meta["step"] == 4
