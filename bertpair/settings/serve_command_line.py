"""serve.py's command line: defaults, then a settings file (YAML or JSON), then flags, every fault at once.

The model's own settings (where training cut its texts, whether it was trained on single texts) are read with
the model; here only its folder is found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bertpair.console import say
from bertpair.errors import ConfigError, list_faults
from bertpair.settings.command_line import IMPLICIT
from bertpair.settings.config import SETTINGS
from bertpair.settings.files import SettingsFile, read_settings
from bertpair.settings.flag import help_lines, read_flags
from bertpair.settings.serve import (
    SERVE_SETTINGS,
    ServeConfig,
    convert_serve_settings,
    serve_contradictions,
)
from bertpair.settings.values import PATH, Kind, plain, suggest

_USAGE = """\
usage: python serve.py [--model_dir FOLDER] [--config FILE] [--name value | --name=value] …

A list is several words; null is the word null. The names below are the keys of a settings file (YAML or JSON)
too; flags go over it. Without --model_dir, the output_dir of config.yaml in the working directory is served.
SIGTERM and SIGINT drain the server; a second one ends it at once. Exit codes: 0 drained, 1 a defect or work
that did not finish within grace_seconds, 2 a setting or model folder that cannot be used."""


@dataclass(frozen=True)
class ServeCall:
    """The settings of one call, and lines to say."""

    config: ServeConfig
    notes: tuple[str, ...]


@dataclass
class _Found:
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_serve_command_line(argv: Sequence[str]) -> ServeCall:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0."""
    if "--help" in argv or "-h" in argv:
        say(serve_help_page())
        raise SystemExit(0)
    kinds: dict[str, Kind] = {"config": PATH, **{name: item.kind for name, item in SERVE_SETTINGS.items()}}
    flags = read_flags(argv, kinds)
    path = flags.values.pop("config", None)
    found = _Found(faults=list(flags.faults), notes=list(flags.notes))
    if isinstance(path, str) and path:
        _add_file(found, path)
    values, faults = convert_serve_settings(flags.values, {name: f"--{name}" for name in flags.values})
    found.values.update(values)
    found.faults += faults
    if not found.values.get("model_dir"):
        _add_sample(found)
    config = ServeConfig(**found.values)
    found.faults += serve_contradictions(config)
    if config.model_dir is None and not found.faults:
        found.faults.append("model_dir must be set: name the trained folder with --model_dir")
    if found.faults:
        raise ConfigError(list_faults(found.faults))
    return ServeCall(config, tuple(found.notes))


def _add_file(found: _Found, path: str) -> None:
    """The settings file's share: serve.py's settings, and output_dir as the model's folder."""
    try:
        file = read_settings(path)
    except ConfigError as error:
        found.faults.append(str(error))
        return
    found.notes.append(f"settings read from {path}")
    found.faults += file.faults
    mine = {name: value for name, value in file.values.items() if name in SERVE_SETTINGS}
    values, faults = convert_serve_settings(mine, {name: f"{file.where(name)}: {name}" for name in mine})
    found.values.update(values)
    found.faults += faults + [
        f"{file.where(name)}: unknown setting {plain(name)}{suggest(name, SERVE_SETTINGS)}"
        for name in file.values
        if name not in SERVE_SETTINGS and name not in SETTINGS
    ]
    if not found.values.get("model_dir"):
        _add_output_dir(found, file)


def _add_sample(found: _Found) -> None:
    """Without a folder named anywhere, the sample's."""
    if os.path.exists(IMPLICIT) and not found.faults:
        try:
            _add_output_dir(found, read_settings(IMPLICIT))
        except ConfigError as error:
            found.faults.append(str(error))


def _add_output_dir(found: _Found, file: SettingsFile) -> None:
    folder = file.values.get("output_dir")
    if isinstance(folder, str) and folder:
        found.values["model_dir"] = folder
        found.notes.append(f"model_dir is {folder}, the output_dir of {file.path}")


def serve_help_page() -> str:
    """Every setting of serve.py, by group, with its meaning, what it may be and its default."""
    lines = [_USAGE]
    group = ""
    for name, item in SERVE_SETTINGS.items():
        if item.group != group:
            group = item.group
            lines.append(f"\n{group}:")
        lines.append(help_lines(name, item.kind, item.default, item.help))
    return "\n".join(lines)
