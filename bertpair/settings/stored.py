"""training_args.yaml: the settings that a run leaves in its folder, written and read again."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bertpair.errors import CheckpointError, ConfigError, raise_faults
from bertpair.settings.config import SETTINGS, Config, changed_settings
from bertpair.settings.evaluate import EvaluateSettings
from bertpair.settings.fields import RETIRED, placed, typed
from bertpair.settings.files import read_settings

TRAINING_ARGS = "training_args.yaml"


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder's run; none if the folder does not say, CheckpointError if it is damaged."""
    path = folder / TRAINING_ARGS
    if not os.path.lexists(path):
        return {}
    try:
        file = read_settings(path)
        values, faults = typed(Config, {name: v for name, v in file.values.items() if name not in RETIRED})
        raise_faults([*file.faults, *placed(faults, file.where)])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return values


def model_settings(folder: Path) -> dict[str, Any]:
    """Those of them that go where the model goes: the model's own, and the names of its data files."""
    return {name: value for name, value in stored_settings(folder).items() if SETTINGS[name].owner != "run"}


def as_flags(config: Config, names: Iterable[str] | None = None) -> list[str]:
    """The words of a command line that set these settings, by default all that are not as by default."""
    if names is None:
        names = [name for name, _, _ in changed_settings(Config(), config)]
    words: list[str] = []
    for name in names:
        flag = "output_dir" if name == "eval_output_dir" else name
        words += [f"--{flag}", *_words(getattr(config, name))]
    return words


def _words(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{key}={weight!r}" for key, weight in value.items()]
    if isinstance(value, list):
        return [word for each in value for word in _words(each)]
    if value is None or isinstance(value, bool):
        return [{None: "null", True: "true", False: "false"}[value]]
    return [value if isinstance(value, str) else repr(value)]


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # plain or in single quotes, U+0085 would read as a space
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


def dump_yaml(config: Config) -> str:
    """What training_args.yaml holds: all settings but evaluate.py's, in the order of --help."""
    values = config.model_dump(exclude=set(EvaluateSettings.model_fields))
    text: str = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text
