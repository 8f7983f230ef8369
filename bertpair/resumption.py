"""The settings of a resumed run: its own, with what was given now on top, if the two agree."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bertpair.command_line import config_from_folder
from bertpair.config import Config, changed_settings, check_config, resume_rule, to_dict
from bertpair.errors import ConfigError, list_faults
from bertpair.run_folder import RunState

Change = tuple[str, object, object]
RESOLVED = {"amp": "auto", "num_threads": None, "device": "auto"}  # these mean: as it was


def merge_settings(config: Config, explicit: Collection[str], run: RunState) -> tuple[Config, list[Change]]:
    """The run's own settings overlaid with the `explicit` ones, and what changed that a resume minds.

    Raises ConfigError naming every refused change with both values, and what to do about it.
    """
    now = to_dict(config)
    own: dict[str, Any] = dict(config_from_folder(run.folder))
    old = to_dict(Config(**own))
    given = {name: now[name] for name in explicit if not (name in RESOLVED and now[name] == RESOLVED[name])}
    merged = {**old, **given, "resume": config.resume, "resume_anyway": config.resume_anyway}
    merged["output_dir"] = config.output_dir
    merged["overwrite_output_dir"] = False
    changes = [change for change in changed_settings(old, merged) if resume_rule(change[0]) != "free"]
    _refuse([c for c in changes if resume_rule(c[0]) == "never"], [], run)
    if not config.resume_anyway:
        _refuse([], [c for c in changes if resume_rule(c[0]) == "anyway"], run)
    return check_config(Config(**merged)), changes


def _refuse(never: list[Change], unless_anyway: list[Change], run: RunState) -> None:
    faults = [f"{name}: the run has {old!r}, found {new!r}" for name, old, new in (*never, *unless_anyway)]
    if not faults:
        return
    advice = "--resume_anyway accepts this"
    if never:
        advice = "a resume cannot change this; start a new run from the weights: "
        advice += f"--model_name_or_path {run.folder}"
    raise ConfigError(f"{run.folder}: these settings differ from the run's\n{list_faults(faults)}\n{advice}")
