"""Where a run goes on, and the settings it then has: its own, and on top what was given now."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Collection
from pathlib import Path

from bertpair.checkpoints.run_folder import RunFolder, RunState, read_run_state, versions
from bertpair.console import rank_and_size
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.processes import Processes
from bertpair.settings.config import SETTINGS, Config, changed_settings
from bertpair.settings.contradictions import check_config
from bertpair.settings.stored import stored_settings
from bertpair.training.setup import Job, rows_of_step

logger = logging.getLogger(__name__)

RESOLVED = {"amp": "auto", "num_threads": None, "device": "auto", "positive_label": None}  # mean: as it was


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins, and the settings it has."""

    config: Config
    checkpoint: RunState | None = None  # None: at step 0, or not at all
    finished: RunState | None = None  # this run is over; its result stands unless it has steps left to do


def share_start(config: Config, explicit: Collection[str], folder: RunFolder, processes: Processes) -> Start:
    """What `find_start` gives the first process, in all of them. They must see the same output folder where
    there is something to resume. For all processes."""
    first = processes.all_or_none(
        lambda: find_start(config, explicit, folder) if processes.is_first else None
    )
    said = first and {
        "settings": first.config.model_dump(),
        "folders": [run and str(run.folder.absolute()) for run in (first.checkpoint, first.finished)],
    }
    said = processes.share(said)

    def read() -> Start:
        runs = [run and read_run_state(Path(run)) for run in said["folders"]]
        return Start(Config(**said["settings"]), *runs)

    return processes.all_or_none(lambda: first or read())


def find_start(config: Config, explicit: Collection[str], folder: RunFolder) -> Start:
    """Where the run goes on, if it does. Takes the lock if the folder is there.

    Raises ConfigError or CheckpointError where the run may not begin there, or there is nothing whole to
    resume from.
    """
    if not config.resume:
        folder.check_new(overwrite=config.overwrite_output_dir)
    folder.enter()
    if not config.resume:
        return Start(config)
    finished = folder.finished_run() if config.resume == "auto" else None
    ends_otherwise = False
    if finished is not None:
        merged, changes = merge_settings(config, explicit, finished)
        ends_otherwise = _ending(merged) != _ending(Config(**stored_settings(finished.folder)))
        if not ends_otherwise and not any(SETTINGS[name].resume == "anyway" for name, _, _ in changes):
            return Start(merged, finished=finished)
    start = folder.find_resume(str(config.resume))
    if finished is not None:
        ended = finished.state["global_step"]
        if start is None:
            raise CheckpointError(
                f"{finished.folder}: the run is finished at step {ended} and has no checkpoint to go on from "
                f"(save_steps was 0); start a new run from its weights with {_weights_of(finished)} "
                "and another --output_dir"
            )
        if (step := start.state["global_step"]) != ended:
            said = "the run ended at step %d; its newest checkpoint is of step %d, and it goes on from there"
            logger.warning(said, ended, step)
    if start is None:
        folder.check_new(overwrite=folder.may_start_over(), instead_of_resume=True)
        logger.info("%s: no checkpoint to resume from: starting at step 0", folder.path)
        return Start(check_config(config, training=True))
    merged, changes = merge_settings(config, explicit, start)
    for name, old, new in changes:
        only_rounding = "; results then agree to rounding" if SETTINGS[name].resume == "warn" else ""
        logger.warning("%s was %s, is now %s%s", name, old, new, only_rounding)
    logger.info("resuming from %s", start.folder)
    return Start(merged, start, None if ends_otherwise else finished)


def _ending(config: Config) -> dict[str, object]:
    """What decides when a run ends, and which weights and figures it then has, by meaning."""
    values = {name: getattr(config, name) for name in SETTINGS if SETTINGS[name].resume == "end"}
    return {**values, "do_eval": config.runs_evaluation, "eval_steps": config.eval_interval}


def _weights_of(run: RunState) -> str:
    return f"--model_name_or_path {shlex.quote(str(run.folder))}"


def merge_settings(
    config: Config, explicit: Collection[str], run: RunState
) -> tuple[Config, list[tuple[str, object, object]]]:
    """The run's own settings overlaid with the `explicit` ones, and what changed that a resume minds.

    Raises ConfigError naming every refused change with both values, and what to do about it.
    """
    old = Config(**stored_settings(run.folder))
    now = {name: getattr(config, name) for name in {*explicit, "resume", "resume_anyway", "output_dir"}}
    given = {name: value for name, value in now.items() if name not in RESOLVED or value != RESOLVED[name]}
    merged = old.model_copy(update={**given, "overwrite_output_dir": False})
    changes = [change for change in changed_settings(old, merged) if SETTINGS[change[0]].resume != "free"]
    refused = {
        "never": f"a resume cannot change this; start a new run from the weights: {_weights_of(run)}",
        "anyway": "--resume_anyway accepts this",
    }
    for rule, advice in refused.items():
        differing = [change for change in changes if SETTINGS[change[0]].resume == rule]
        if differing and not (rule == "anyway" and config.resume_anyway):
            faults = [f"{name}: the run has {was!r}, found {new!r}" for name, was, new in differing]
            differ = f"{run.folder}: these settings differ from the run's"
            raise ConfigError(f"{differ}\n{list_faults(faults)}\n{advice}")
    _check_global_batch(old, merged, run)
    return check_config(merged), changes


def _check_global_batch(old: Config, new: Config, run: RunState) -> None:
    """ConfigError unless a step has as many rows as before, in whatever batches of however many processes."""
    then, now = int(run.state.get("processes", 1)), rank_and_size()[1]
    if rows_of_step(old, then) == rows_of_step(new, now):
        return
    was, found = (
        f"{rows_of_step(config, size):,} rows a step (per_device_train_batch_size "
        f"{config.per_device_train_batch_size} × gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} × {size} process{'es' if size > 1 else ''})"
        for config, size in ((old, then), (new, now))
    )
    raise ConfigError(
        f"{run.folder}: the run has {was}, found {found}\na resume needs as many rows a step, in whatever "
        f"batches; for other steps start a new run from the weights: {_weights_of(run)}"
    )


def check_same_run(job: Job, run: RunState) -> None:
    """CheckpointError unless the training rows, as the model sees them, are those of the run.

    Says so where device or versions are others than before: the run then ends alike to rounding only.
    """
    if run.state.get("data_sha256") != job.data_digest:
        raise CheckpointError(
            f"{run.folder}: the training data (or how it is read) has changed since this checkpoint; "
            "a resume needs the same rows. To train on from its weights, start a new run with "
            f"{_weights_of(run)} and another --output_dir"
        )
    then = {"device": run.state.get("device"), "processes": run.state.get("processes", 1)}
    then |= run.manifest.versions
    now = {"device": job.device.type, "processes": job.processes.size, **versions()}
    for name, found in now.items():
        if then.get(name, found) != found:
            logger.warning("%s was %s, is now %s; results then agree to rounding", name, then[name], found)
