"""The folders of an output folder: found, opened, moved into place, and deleted when their time has come.

Only what is whole is found, and only verified bytes are read. Nothing is deleted that bertpair did not
write; deleting is for the process that holds the run's lock.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bertpair.checkpoints import atomic
from bertpair.checkpoints.derived import DERIVED, holds_only_parts
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, read_verified, verify_folder
from bertpair.checkpoints.tensor_file import parse_tensors
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.model.config import ModelFolder, read_folder
from bertpair.model.pretrained import find_weights, resolve_folder, weight_files
from bertpair.settings.files import read_json
from bertpair.settings.stored import TRAINING_ARGS

logger = logging.getLogger(__name__)

FINAL_READY = "final.ready"
INPUT_FILE = "input.json"
RUNS_FILE = "runs.json"  # of a folder with a folder for each of several runs
COMPARED = "compare-"  # begins the names of folders with a compared model's results
PROGRESS_FILE, PART_FILE = "progress.json", "predictions.part"  # of predictions that are not whole yet
RESULT_FILES = (
    *("confusion_matrix.png", "eval_results.json", "eval_results.txt", "figures.json"),
    *("predictions.tsv", "predictions.jsonl", "errors.tsv", "comparison.json", "report.html"),
    *(PROGRESS_FILE, PART_FILE),
    INPUT_FILE,  # last: with it goes what says whose results they are
)
_OUR_FILES = (
    *("config.json", "model.safetensors", "trainer_state.json", MANIFEST_NAME),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *(".run.json", "README.md", "curves.png", "metrics.jsonl", TRAINING_ARGS, *RESULT_FILES),
)
_CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]{0,17})")
_FOLDER_NAME = rf"{_CHECKPOINT.pattern}|{re.escape(FINAL_READY)}"
_PART_NAME = re.compile(rf"{_FOLDER_NAME}|{COMPARED}.+", re.DOTALL)
_TEMPORARY_FOLDER = re.compile(rf"(?P<name>{_FOLDER_NAME})\.(?P<kind>tmp|old)-[0-9]{{1,10}}(-[0-9]{{1,10}})?")
_TEMPORARY_FILE = re.compile(rf"\.({'|'.join(map(re.escape, _OUR_FILES))})\.tmp-(?P<pid>[0-9]{{1,10}})")


def load_tensors(folder: Path, name: str, manifest: Manifest | None = None) -> dict[str, Tensor]:
    """The tensors of a verified safetensors file, on the CPU; CheckpointError says what is wrong.

    The bytes that are parsed are the bytes that were hashed. A NaN or an infinity is an error too.
    """
    path = folder / name
    tensors = parse_tensors(read_verified(folder, name, manifest), str(path))
    floating = {key: t for key, t in tensors.items() if t.is_floating_point() and t.numel()}
    # The extremes of a tensor with a NaN are NaN: one pass without a mask of the tensor's size.
    bad = [key for key, t in floating.items() if not torch.stack(torch.aminmax(t)).isfinite().all()]
    if bad:
        raise CheckpointError(list_faults([f"{path}: {key!r} holds NaN or infinity" for key in bad]))
    return tensors


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def output_dir_of(folder: Path) -> Path:
    """The output folder that a `checkpoint-N` lies in; any other folder itself."""
    absolute = folder.absolute()
    return absolute.parent if _CHECKPOINT.fullmatch(absolute.name) else folder


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every `checkpoint-N`, whole or not, in numeric order; links are not followed."""
    try:
        names = [entry.name for entry in os.scandir(output_dir) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{output_dir}: cannot be listed: {error.strerror}") from error
    return sorted((int(m[1]), output_dir / m[0]) for m in map(_CHECKPOINT.fullmatch, names) if m)


class Newest(NamedTuple):
    """The newest whole checkpoint, if there is one, and what is wrong with each newer one."""

    path: Path | None
    manifest: Manifest | None
    faults: list[str]


def newest_whole(output_dir: Path, run_id: str | None = None) -> Newest:
    """The newest checkpoint (of that run, if given) that is whole, checksums included.

    Damaged ones on the way are named in `faults`; without a `path`, `faults` lists every one there is.
    """
    faults: list[str] = []
    for step, path in reversed(list_checkpoints(output_dir)):
        try:
            if run_id is not None and read_manifest(path).run_id != run_id:
                continue
            manifest = verify_folder(path)
            if (held := manifest.meta.get("step", step)) == step:
                return Newest(path, manifest, faults)
            faults.append(f"{path}: holds step {held}, not the step of its name")
        except CheckpointError as error:
            faults.append(str(error))
    return Newest(None, None, faults)


def _is_whole(folder: Path, consequence: str) -> bool:
    try:
        verify_folder(folder)
    except CheckpointError as error:
        logger.warning("%s: %s", consequence, error)
        return False
    return True


def final_folder(output_dir: Path) -> Path:
    """Where the model of an output folder is to be read: `final.ready` if that is whole, else the folder.

    For any other folder that is the folder itself; so whoever opens a model folder asks here first.
    """
    ready = output_dir / FINAL_READY
    return ready if os.path.lexists(ready) and _is_whole(ready, "not used") else output_dir


def open_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    config_name: str | Path | None = None,
    verify: bool = True,
) -> ModelFolder:
    """A model folder by its path or its name on the hub, its config.json read (or `config_name` instead); of
    an output folder, the final model. With `verify`, what has a manifest is verified.

    The CheckpointError names a checkpoint where the run of the folder is not finished.
    """
    path = resolve_folder(name_or_path, revision=revision, cache_dir=cache_dir)
    final = final_folder(path)
    if config_name is None and not (final / "config.json").is_file():
        if found := list_checkpoints(path):
            hint = f"the run of this folder is not finished; name a checkpoint of it: {found[-1][1]}"
            raise CheckpointError(f"{final / 'config.json'}: no such file; {hint}")
        if runs := list_runs(path):
            raise CheckpointError(f"{path} holds several runs; name the model of one, such as {runs[0]}")
    if verify and (final / MANIFEST_NAME).is_file():
        verify_folder(final)
    return read_folder(final, config_name=config_name)


def list_runs(folder: Path) -> list[Path]:
    """The folders of several runs, such as those of `--seeds`, in order; none where there are none."""
    if not (folder / RUNS_FILE).is_file():
        return []
    return sorted(folder / name for name in read_json(folder / RUNS_FILE).get("runs", {}))


def weights_digest(folder: Path) -> str:
    """The sha256 of a model's weight file; of several shards, of their digests in the order of their names.

    A manifest's are taken from it: it was held against the files when the model was opened.
    """
    found = find_weights(folder)
    if found is None:
        raise CheckpointError(f"{folder}: no weights in it")
    entries = read_manifest(folder).files if (folder / MANIFEST_NAME).is_file() else ()
    known = {entry.name: entry.sha256 for entry in entries}
    first, *more = [known.get(path.name) or file_digest(path) for path in weight_files(found)]
    return hashlib.sha256("".join([first, *more]).encode()).hexdigest() if more else first


def file_digest(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_folder(output_dir: Path) -> Path:
    """The folder whose training_args.yaml speaks for an output folder: the final model's, else that of the
    newest checkpoint that has one, else that of one of several runs, else the output folder itself."""
    final = final_folder(output_dir)
    checkpoints = (path for _, path in reversed(list_checkpoints(output_dir)))
    places = (final, *checkpoints, *list_runs(output_dir))
    return next((place for place in places if os.path.lexists(place / TRAINING_ARGS)), final)


def publish_final(output_dir: Path) -> bool:
    """Move the files of a whole `final.ready` up, manifest last; False if there is none.

    A crash or an OSError at any point leaves `final.ready` whole, so that readers are sent there, and calling
    again completes the move. Files of the output folder that the new model does not have are left alone.
    """
    ready = output_dir / FINAL_READY
    if not os.path.lexists(ready):
        return False
    for names in ([entry.name for entry in verify_folder(ready).files], [MANIFEST_NAME]):
        for name in names:
            _place(ready / name, output_dir / name)
        atomic.fsync_folder(output_dir)  # the names are durable before the manifest that vouches for them
    atomic.remove(ready, is_whole=True)
    return True


def _place(source: Path, target: Path) -> None:
    """Replace `target` by `source`, which stays: through a second name for it, or a copy."""
    if target.exists() and os.path.samefile(source, target):
        return  # placed before a crash; renaming a link over its own file would do nothing and leave it
    with atomic.replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            with open(source, "rb") as file:
                atomic.write_file(temporary, iter(lambda: file.read(1 << 24), b""))


def prune(
    output_dir: Path, keep: int | None, *, last: int, run_id: str, best: int | None = None
) -> list[Path]:
    """Delete this run's oldest checkpoints beyond `keep` (None: keep all); returns those deleted.

    `last` is the step written or verified last: it counts, and never goes; nor does `best`, which does not
    count. Higher steps were abandoned or found damaged when the run was resumed before them; they stay
    until their step writes them anew.
    """
    if keep is None:
        return []
    steps = [(step, path) for step, path in list_checkpoints(output_dir) if step < last and step != best]
    older = [path for _, path in steps if run_of(path) == run_id]
    return [path for path in older[: max(0, len(older) - max(keep - 1, 0))] if _retire(path)]


def discard_others(output_dir: Path, run_id_to_keep: str, *, is_finished: bool = False) -> list[Path]:
    """Delete the checkpoints of other runs once the run to keep has a whole one, or its final model
    (`is_finished`); returns those deleted."""
    paths = [path for _, path in list_checkpoints(output_dir)]
    others = [path for path in paths if run_of(path) not in (None, run_id_to_keep)]
    if not others or not (is_finished or newest_whole(output_dir, run_id_to_keep).path):
        return []
    return [path for path in others if _retire(path)]


def run_of(folder: Path) -> str | None:
    """The run that wrote a folder, "" if it was none; None if that is unsure."""
    try:
        return read_manifest(folder).run_id or ""
    except CheckpointError:
        return None


def own_names(folder: Path) -> set[str]:
    """What we wrote into a model folder; somebody added the rest. CheckpointError if its list is damaged."""
    derived = {DERIVED} if holds_only_parts(folder / DERIVED) else set()
    return {entry.name for entry in read_manifest(folder).files} | {MANIFEST_NAME} | derived


def _retire(folder: Path) -> bool:
    """Delete a checkpoint; what somebody added to it stays, in a folder whose name is no checkpoint's."""
    ours = own_names(folder)
    added = sorted(name for name in os.listdir(folder) if name not in ours and name[0] != ".")
    if not added:
        return atomic.remove(folder, is_whole=True)
    kept = folder.with_name(f"{folder.name}.kept-{os.getpid()}")
    os.rename(folder, kept)
    for name in ours.intersection(os.listdir(kept)):
        atomic.remove(kept / name)
    logger.warning("%s is deleted; %s, which bertpair did not write, is now in %s", folder, added[0], kept)
    return True


def remove_leftovers(output_dir: Path) -> list[Path]:
    """Remove what a crash left half-written or half-deleted; returns what went. Hold the run's lock.

    A checkpoint that had stepped aside for a new one comes back if the new one never took its place.
    """
    left = []
    for path in _children(output_dir):
        if path.is_symlink():
            continue
        if path.is_dir() and (matched := _TEMPORARY_FOLDER.fullmatch(path.name)):
            name = output_dir / matched["name"]
            if matched["kind"] == "old" and not os.path.lexists(name) and _is_whole(path, "removed"):
                os.rename(path, name)
            else:
                left.append(path)
        elif path.is_file() and (matched := _TEMPORARY_FILE.fullmatch(path.name)):
            left += [path] if _is_dead(int(matched["pid"])) else []
    return [path for path in left if atomic.remove(path)]


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_dead(pid: int) -> bool:
    """Whether the process that wrote half a file is gone (on Windows: was this one)."""
    if pid == os.getpid() or os.name == "nt":  # where signal 0 means Ctrl-C
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except (PermissionError, ProcessLookupError, OverflowError) as error:
        return not isinstance(error, PermissionError)
    return False


def is_model_folder(folder: Path) -> bool:
    """Whether files of a model stand there, which nothing may be written over."""
    return (folder / "config.json").exists() or (folder / MANIFEST_NAME).exists()


def write_results(folder: Path, files: Mapping[str, bytes], *, adds: bool = False) -> None:
    """Write an evaluation's files; those of an earlier one go first, so that nothing old stands beside new
    ones. With `adds`, files that belong to those just written."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in () if adds else RESULT_FILES:
            (folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            atomic.replace_file(folder / name, data)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """A ConfigError says it where a folder of results cannot be written."""
    try:
        yield
    except OSError as error:
        advice = "name another place with --output_dir"
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; {advice}") from error


def discard_evaluations(output_dir: Path, run_id_to_keep: str) -> None:
    """Delete the results that evaluate.py wrote for models of other runs, once those models are gone."""
    for folder in _children(output_dir / "eval"):
        with suppress(CheckpointError):  # not evaluate.py's
            if read_json(folder / INPUT_FILE).get("run_id") != run_id_to_keep:
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
