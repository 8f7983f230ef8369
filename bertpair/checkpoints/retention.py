"""What stays in an output folder and what goes: pruning, leftovers of a crash, an earlier run's checkpoints.

Nothing is deleted that bertpair did not write, and a folder that goes is renamed first. All of it is for
the process that holds the run's lock.
"""

import json
import logging
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from bertpair.checkpoints.checkpoint import FINAL_READY, list_checkpoints, newest_whole
from bertpair.checkpoints.disk import remove, retire_folder
from bertpair.checkpoints.lock import is_alive
from bertpair.checkpoints.manifest import MANIFEST_NAME, extra_files, read_manifest, verify_folder
from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

INPUT_FILE = "input.json"
RESULT_FILES = (
    "confusion_matrix.png",
    "eval_results.json",
    "eval_results.txt",
    "predictions.tsv",
    INPUT_FILE,
)
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "vocab.txt",
)
COMPARED = "compare-"  # begins the names of folders with a compared model's results
RUN_FILES = (".run.json", "curves.png", "metrics.jsonl", "training_args.yaml", *RESULT_FILES)
_FOLDER_NAME = rf"checkpoint-(?:0|[1-9]\d{{0,17}})|{re.escape(FINAL_READY)}"
_TEMPORARY_FOLDER = re.compile(rf"({_FOLDER_NAME})\.(tmp|old)-\d{{1,10}}(?:-\d{{1,10}})?", re.ASCII)
_PART_NAME = re.compile(rf"(?:{_FOLDER_NAME})|{COMPARED}.+", re.DOTALL)
_TEMPORARY_FILE = re.compile(r"\.(.+)\.tmp-(\d{1,10})", re.ASCII)


def prune(
    output_dir: Path, keep: int | None, *, last: Path, run_id: str, protect: Collection[Path] = ()
) -> list[Path]:
    """Delete this run's oldest checkpoints beyond `keep` (None: keep all); returns those deleted.

    `last` is the checkpoint written or verified last: it counts, and never goes, nor does anything in
    `protect`, which does not count. Higher numbers than `last` were abandoned or found damaged when the
    run was resumed before them; they stay until their step writes them anew.
    """
    if keep is None:
        return []
    spared = {path.name for path in protect} | {last.name}
    steps = list_checkpoints(output_dir)
    now = next((step for step, path in steps if path.name == last.name), -1)
    older = [path for step, path in steps if step < now and path.name not in spared]
    older = [path for path in older if _run_of(path) == run_id]
    doomed = older[: max(0, len(older) - max(keep - 1, 0))]
    return [path for path in doomed if _retire(path)]


def discard_others(output_dir: Path, run_id_to_keep: str, *, is_finished: bool = False) -> list[Path]:
    """Delete the checkpoints of other runs once the run to keep has a whole one, or its final model
    (`is_finished`); returns those deleted."""
    runs = [(path, _run_of(path)) for _, path in list_checkpoints(output_dir)]
    others = [path for path, run in runs if run not in (None, run_id_to_keep)]
    if not others or not (is_finished or newest_whole(output_dir, run_id_to_keep).path):
        return []
    return [path for path in others if _retire(path)]


def _run_of(folder: Path) -> str | None:
    """The run that wrote this folder; None if that is unsure."""
    try:
        return read_manifest(folder).run_id or ""
    except CheckpointError:
        return None


def _retire(folder: Path) -> bool:
    """Delete a checkpoint; what somebody added to it stays, in a folder whose name is no checkpoint's."""
    manifest = read_manifest(folder)
    added = extra_files(folder, manifest)
    if not added:
        return retire_folder(folder)
    kept = folder.with_name(f"{folder.name}.kept-{os.getpid()}")
    os.rename(folder, kept)
    for name in (*(entry.name for entry in manifest.files), MANIFEST_NAME):
        (kept / name).unlink(missing_ok=True)
    logger.warning("%s is deleted; %s, which bertpair did not write, is now in %s", folder, added[0], kept)
    return True


def remove_leftovers(output_dir: Path) -> list[Path]:
    """Remove what a crash left half-written or half-deleted; returns what went. Hold the run's lock.

    A checkpoint that had stepped aside for a new one comes back if the new one never took its place.
    """
    gone = []
    for path in _children(output_dir):
        if path.is_symlink():
            continue
        if path.is_dir() and (matched := _TEMPORARY_FOLDER.fullmatch(path.name)):
            if matched[2] == "old" and _restored(path, output_dir / matched[1]):
                continue
            gone += [path] if remove(path) else []
        elif path.is_file() and _is_dead_file(path):
            gone += [path] if remove(path) else []
    return gone


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _restored(aside: Path, name: Path) -> bool:
    if os.path.lexists(name):
        return False
    try:
        verify_folder(aside)
    except CheckpointError as error:
        logger.warning("%s is removed: %s", aside, error)
        return False
    os.rename(aside, name)
    return True


def _is_dead_file(path: Path) -> bool:
    matched = _TEMPORARY_FILE.fullmatch(path.name)
    return bool(matched and matched[1] in (*MODEL_FILES, *RUN_FILES, MANIFEST_NAME) and _is_dead(matched[2]))


def _is_dead(pid: str) -> bool:
    return int(pid) == os.getpid() or not is_alive(int(pid))


def discard_evaluations(output_dir: Path, run_id_to_keep: str) -> None:
    """Delete the results that evaluate.py wrote for models of other runs, once those models are gone."""
    for folder in _children(output_dir / "eval"):
        try:
            said = json.loads((folder / INPUT_FILE).read_bytes())
        except (OSError, ValueError):
            continue  # not evaluate.py's
        if isinstance(said, dict) and said.get("run_id") != run_id_to_keep:
            _discard_results(folder)


def discard_parts(folder: Path) -> None:
    """Delete the results of checkpoints and compared models that an earlier evaluation wrote in `folder`."""
    for part in _children(folder):
        if _PART_NAME.fullmatch(part.name) and (part / INPUT_FILE).is_file():
            _discard_results(part)


def _discard_results(folder: Path) -> None:
    """Delete what evaluate.py wrote in `folder`, and the folder if nothing else lies in it."""
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or something of the user's lies in it
        folder.rmdir()


def run_id_of(folder: Path) -> str | None:
    """Which run wrote a model folder; None where it is no folder of a run's."""
    try:
        return read_manifest(folder).run_id
    except CheckpointError:
        return None
