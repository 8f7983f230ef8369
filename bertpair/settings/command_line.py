"""The command line, a settings file and a model folder's own settings, merged into one checked `Config`.

Later wins: defaults, then training_args.yaml of the model folder (evaluate.py), then YAML, then flags. The
sample's config.yaml is read unasked, but never for work on somebody's own model or data. A resume has its
run's settings under those that are `explicit` here: they are in the checkpoint, which training opens.
"""

import os
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertpair.checkpoints.checkpoint import final_folder, list_checkpoints
from bertpair.console import say
from bertpair.errors import CheckpointError, ConfigError
from bertpair.settings.config import SETTINGS, Config, joint_faults, raise_faults, settle
from bertpair.settings.files import read_settings
from bertpair.settings.flag import help_lines
from bertpair.settings.layer import REPLACES, Layer, Script, file_layer, flag_layer, merge
from bertpair.settings.run_glue import OLD_KINDS
from bertpair.settings.values import show

IMPLICIT = "config.yaml"
TRAINING_ARGS = "training_args.yaml"
_OWN = ("model_name_or_path", "task_name", "data_dir", "train_file")
_PER_CALL = ("resume", "resume_anyway", "overwrite_output_dir", "output_dir")
_GROUPS = {
    "train": ("data", "model", "optimisation", "device", "run"),
    "evaluate": ("data", "device", "evaluate"),
}
_ALSO_IN_EVALUATE = ("per_device_eval_batch_size", "pad_to_multiple_of")

_USAGE = """\
usage: python {script}.py [--config FILE] [--name value | --name=value] …
       python {script}.py FILE.json

A switch is --name, --name true or --name false; a list is several words; null is the word null.
The names below are the keys of a settings file (YAML or JSON) too; flags go over it. Without --config,
config.yaml of the working directory is read, unless the flags name another model or other data."""


@dataclass(frozen=True)
class Parsed:
    """The settings; the names set now (a resume compares those); lines to say; the settings file read."""

    config: Config
    explicit: frozenset[str]
    notes: tuple[str, ...]
    source: str | None


@dataclass
class _Call:
    """One call of a script while its layers come together."""

    flags: Layer
    yaml: Layer
    source: str | None
    notes: list[str] = field(default_factory=list)
    weak: set[str] = field(default_factory=set)  # names whose values a resumed run's own go over


def parse_command_line(argv: Sequence[str], script: Script) -> Parsed:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0."""
    if "--help" in argv or "-h" in argv:
        say(help_page(script))
        raise SystemExit(0)
    if len(argv) == 1 and argv[0].lower().endswith(".json") and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    flags, path = flag_layer(argv, script)
    return _train(flags, path) if script == "train" else _evaluate(flags, path)


def config_from_folder(folder: str | Path) -> dict[str, Any]:
    """The settings of a folder's run; none if the folder does not say, CheckpointError if it is damaged."""
    path = os.path.join(folder, TRAINING_ARGS)
    if not os.path.lexists(path):
        return {}
    try:
        layer = file_layer(read_settings(path), "train", old_names=False)
        raise_faults(layer.faults)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return layer.values


def model_settings(folder: str | Path) -> dict[str, Any]:
    """Those of them that go where the model goes: the model's own, and the names of its data files."""
    stored = config_from_folder(folder)
    return {name: value for name, value in stored.items() if SETTINGS[name].owner != "run"}


def _train(flags: Layer, path: str | None) -> Parsed:
    flags.faults += [
        f"--{name} belongs to evaluate.py" for name in flags.values if SETTINGS[name].group == "evaluate"
    ]
    named = [name for name in _OWN if name in flags.values or name in flags.bad]
    unasked = path is None and os.path.exists(IMPLICIT)
    call = _open(flags, IMPLICIT if unasked and not named else path, "train")
    if unasked and named:
        call.notes.append(f"{IMPLICIT} is not read: --{named[0]} says what to work on instead")
    if unasked and not named:
        _leave_to_resume(call)
    sample = Path(sys.argv[0]).resolve().parent
    is_lost = not (unasked or path or named or flags.values.get("resume") or flags.values.get("do_eval"))
    if is_lost and sample != Path.cwd() and (sample / IMPLICIT).is_file():
        way = f"cd {shlex.quote(str(sample))}"
        flags.faults.append(f"no {IMPLICIT} here; the sample is trained from its own folder: {way}")
    return _finish(call, Layer(), "train")


def _open(flags: Layer, path: str | None, script: Script) -> _Call:
    """The call with its settings file, if it has one; a file that cannot be read is one fault more."""
    if path is None:
        return _Call(flags, Layer(), None)
    try:
        yaml = file_layer(read_settings(path), script)
    except ConfigError as error:
        yaml = Layer(faults=[str(error)], bad=set(SETTINGS))
    return _Call(flags, yaml, path, [f"settings read from {path}"])


def _leave_to_resume(call: _Call) -> None:
    """On a resume the run's own settings stand: a config.yaml that nobody named only says which run it is."""
    resume = merge([call.yaml, call.flags])[0].get("resume")
    if resume:
        call.weak = call.yaml.values.keys() - _PER_CALL
        call.notes = [f"settings read from {IMPLICIT}; those of the run that goes on come before them"]
    if resume and resume != "auto" and "resume" in call.flags.values:
        call.yaml.values.pop("output_dir", None)


def _evaluate(flags: Layer, path: str | None) -> Parsed:
    _read_as_evaluate(flags)
    call = _open(flags, path, "evaluate")
    model_dir = _model_dir(call)
    stored = Layer()
    if not model_dir and not {"model_dir", "output_dir"} & (flags.bad | call.yaml.bad):
        flags.faults.append("model_dir must be set: name the trained folder with --model_dir")
    if model_dir and not (flags.faults or call.yaml.faults):
        stored = _trained(call, model_dir)
    return _finish(call, stored, "evaluate")


def _read_as_evaluate(flags: Layer) -> None:
    """In evaluate.py the flag --output_dir says where to write, and many others say nothing."""
    if "model_name_or_path" in flags.values:
        flags.faults.append("--model_name_or_path: evaluate.py scores a trained folder, named by --model_dir")
    working = {*_shown("evaluate"), "do_eval", "output_dir", "model_name_or_path"}
    idle = [name for name in flags.values if name not in working]
    flags.notes += [f"{flags.where[name]} changes nothing in evaluate.py" for name in idle]
    if "output_dir" in flags.values:
        flags.values["eval_output_dir"] = flags.values.pop("output_dir")


def _model_dir(call: _Call) -> str | None:
    """The folder named by a flag or the settings file, else the output_dir of the file or of config.yaml."""
    yaml = call.yaml.values
    named: str | None = call.flags.values.get("model_dir") or yaml.get("model_dir") or yaml.get("output_dir")
    if named or call.source is not None or not os.path.exists(IMPLICIT):
        return named
    sample = _open(call.flags, IMPLICIT, "evaluate").yaml
    named = sample.values.get("output_dir")
    if "output_dir" in sample.bad:
        call.flags.faults += sample.faults
        call.flags.bad.add("output_dir")
    if named:
        call.notes.append(f"model_dir is {named}, the output_dir of {IMPLICIT}")
    return named


def _trained(call: _Call, model_dir: str) -> Layer:
    """What belongs to the model among the settings that it was trained with."""
    folder = Path(model_dir)
    newest_first = [path for _, path in reversed(list_checkpoints(folder))]
    for place in (final_folder(folder), *newest_first):
        if stored := model_settings(place):
            call.notes.insert(0, f"settings read from {place / TRAINING_ARGS}")
            break
    else:
        call.notes.insert(0, f"{model_dir} holds no {TRAINING_ARGS}: default settings")
    return Layer({**stored, "model_dir": model_dir})


def _finish(call: _Call, stored: Layer, script: Script) -> Parsed:
    flags, yaml = call.flags, call.yaml
    merged, set_aside = merge([stored, yaml, flags])
    values = settle(merged)
    config = Config(**values)
    bad = flags.bad | yaml.bad
    is_new = script == "train" and not config.resume and config.runs_training
    missing = joint_faults(config, is_new, bad)
    if config.resume == "auto" and script == "train" and not config.output_dir and "output_dir" not in bad:
        missing.append("output_dir must be set: resume goes on with the run in it")
    raise_faults([*yaml.faults, *flags.faults, *missing])
    aside = [
        f"{winner} sets aside {loser} {show(old)}"
        for winner, loser, old in set_aside
        if getattr(config, loser) != old
    ]
    notes = (*call.notes, *yaml.notes, *flags.notes, *aside)
    return Parsed(config, _explicit(call, values), notes, call.source)


def _explicit(call: _Call, values: Mapping[str, Any]) -> frozenset[str]:
    """The names that were set now, and those whose value follows from them."""
    names = (call.yaml.values.keys() - call.weak | call.flags.values.keys()) & values.keys()
    void = {loser for winner, loser in REPLACES if winner in names and values[winner]}
    derived = {"eval_strategy"} if {"do_train", "do_eval"} & names and "eval_strategy" in values else set()
    return frozenset(names | void | derived)


def _shown(script: Script) -> list[str]:
    """The settings that --help shows: those that change something in the script."""
    also = _ALSO_IN_EVALUATE if script == "evaluate" else ()
    return [name for name, item in SETTINGS.items() if item.group in _GROUPS[script] or name in also]


def help_page(script: Script) -> str:
    """Every setting of the script, by group, with its meaning, what it may be and its default."""
    lines = [_USAGE.format(script=script)]
    group = ""
    for name in _shown(script):
        item = SETTINGS[name]
        if item.group != group:
            group = item.group
            lines.append(f"\n{group}:")
        flag = "output_dir" if name == "eval_output_dir" else name
        lines.append(help_lines(flag, item.kind, item.default, item.help))
    old = f"names of run_glue.py, obeyed or said to be idle: {', '.join(sorted(OLD_KINDS))}"
    return "\n".join([*lines, "", textwrap.fill(old, 100)])
