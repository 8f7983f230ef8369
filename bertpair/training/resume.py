"""Where a run goes on, and the settings it then has: its own, and on top what was given now."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Collection
from pathlib import Path

from bertpair.checkpoints.run_folder import RunFolder, RunState, versions
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.settings.config import SETTINGS, Config, changed_settings, check_config, stored_settings
from bertpair.training.setup import Job

logger = logging.getLogger(__name__)

Change = tuple[str, object, object]
RESOLVED = {
    "amp": "auto",
    "num_threads": None,
    "device": "auto",
    "positive_label": None,
}  # these mean: as it was


def name_output_dir(config: Config) -> Config:
    """The settings with output_dir filled in, where a resume names a checkpoint and nothing else."""
    if config.resume in (False, "auto") or config.output_dir is not None:
        return config
    return config.model_copy(update={"output_dir": str(Path(str(config.resume)).absolute().parent)})


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins, and the settings it has."""

    config: Config
    checkpoint: RunState | None = None  # None: at step 0, or not at all
    finished: RunState | None = None  # this run is over; its result stands unless it has steps left to do


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
        _say_where_it_goes_on(finished, start)
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


def _say_where_it_goes_on(finished: RunState, start: RunState | None) -> None:
    """CheckpointError where a finished run that is to go on has left no checkpoint."""
    ended = finished.state["global_step"]
    if start is None:
        raise CheckpointError(
            f"{finished.folder}: the run is finished at step {ended} and has no checkpoint to go on from "
            "(save_steps was 0); start a new run from its weights with "
            f"--model_name_or_path {shlex.quote(str(finished.folder))} and another --output_dir"
        )
    if start.state["global_step"] != ended:
        logger.warning(
            "the run ended at step %d; its newest checkpoint is of step %d, and it goes on from there",
            ended,
            start.state["global_step"],
        )


def merge_settings(config: Config, explicit: Collection[str], run: RunState) -> tuple[Config, list[Change]]:
    """The run's own settings overlaid with the `explicit` ones, and what changed that a resume minds.

    Raises ConfigError naming every refused change with both values, and what to do about it.
    """
    old = Config(**stored_settings(run.folder))
    now = {name: getattr(config, name) for name in {*explicit, "resume", "resume_anyway", "output_dir"}}
    given = {name: value for name, value in now.items() if name not in RESOLVED or value != RESOLVED[name]}
    merged = old.model_copy(update={**given, "overwrite_output_dir": False})
    changes = [change for change in changed_settings(old, merged) if SETTINGS[change[0]].resume != "free"]
    new_run = f"start a new run from the weights: --model_name_or_path {shlex.quote(str(run.folder))}"
    _refuse("never", changes, run, f"a resume cannot change this; {new_run}")
    if not config.resume_anyway:
        _refuse("anyway", changes, run, "--resume_anyway accepts this")
    return check_config(merged), changes


def _refuse(rule: str, changes: list[Change], run: RunState, advice: str) -> None:
    """ConfigError where settings of this rule have changed."""
    faults = [
        f"{name}: the run has {old!r}, found {new!r}"
        for name, old, new in changes
        if SETTINGS[name].resume == rule
    ]
    if faults:
        differ = f"{run.folder}: these settings differ from the run's"
        raise ConfigError(f"{differ}\n{list_faults(faults)}\n{advice}")


def check_same_data(job: Job, resumed_from: RunState) -> None:
    """CheckpointError unless the training rows, as the model sees them, are those of the run."""
    if resumed_from.state.get("data_sha256") != job.data_digest:
        raise CheckpointError(
            f"{resumed_from.folder}: the training data (or how it is read) has changed since this "
            "checkpoint; a resume needs the same rows. To train on from its weights, start a new run with "
            f"--model_name_or_path {shlex.quote(str(resumed_from.folder))} and another --output_dir"
        )


def warn_of_other_machine(job: Job, resumed_from: RunState) -> None:
    """Say so where device or versions are others than before: the run then ends alike to rounding only."""
    then = {"device": resumed_from.state.get("device"), **resumed_from.manifest.versions}
    now = {"device": job.device.type, **versions()}
    for name, found in now.items():
        if then.get(name, found) != found:
            logger.warning("%s was %s, is now %s; results then agree to rounding", name, then[name], found)
