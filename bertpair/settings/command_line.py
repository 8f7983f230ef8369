"""The command line, a settings file and a model folder's own settings, merged into one checked `Config`.

Later wins: defaults, then training_args.yaml of the model folder (evaluate.py), then YAML, then flags. The
sample's config.yaml is read unasked, but never for work on somebody's own model or data. A resume has its
run's settings under those that are `explicit` here: they are in the checkpoint, which training opens.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bertpair.console import say
from bertpair.errors import ConfigError, plain, show
from bertpair.settings.config import (
    SETTINGS,
    TRAINING_ARGS,
    Config,
    Setting,
    joint_faults,
    model_settings,
    raise_faults,
    settle,
)
from bertpair.settings.files import read_settings
from bertpair.settings.run_glue import OLD_KINDS, translate
from bertpair.settings.values import NUMBER, PATH, Kind, convert, convert_all, suggest

Script = Literal["train", "evaluate", "serve"]
IMPLICIT = "config.yaml"
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

# A setting on the left, unless it is null, 0 or false, makes the one on the right void.
REPLACES = (
    ("warmup_steps", "warmup_ratio"),
    ("warmup_ratio", "warmup_steps"),
    ("num_train_epochs", "max_steps"),
    ("resume", "overwrite_output_dir"),
    ("overwrite_output_dir", "resume"),
    ("evaluate_during_training", "eval_strategy"),
    ("eval_steps", "eval_strategy"),
    ("eval_strategy", "evaluate_during_training"),
)


@dataclass(frozen=True)
class Parsed:
    """The settings, the names that were set now (a resume compares those), and lines to say."""

    config: Config
    explicit: frozenset[str]
    notes: tuple[str, ...]


@dataclass
class Layer:
    """Settings of one origin. `where` begins a line about one; names in `bad` have their fault already."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_command_line(
    argv: Sequence[str], script: Script, settings_folder: Callable[[Path], Path] = lambda folder: folder
) -> Parsed:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0.

    `settings_folder` says which folder's training_args.yaml speaks for a model folder; by default its own.
    """
    if len(argv) == 1 and argv[0].lower().endswith(".json") and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    flags, path = flag_layer(argv, SETTINGS, script)
    return _train(flags, path) if script == "train" else _evaluate(flags, path, settings_folder)


def _train(flags: Layer, path: str | None) -> Parsed:
    flags.faults += [
        f"--{name} belongs to evaluate.py" for name in flags.values if SETTINGS[name].group == "evaluate"
    ]
    named = [name for name in _OWN if name in flags.values or name in flags.bad]
    is_there = path is None and os.path.exists(IMPLICIT)
    is_read = is_there and not named
    yaml = file_layer(IMPLICIT if is_read else path, SETTINGS, "train")
    weak: Collection[str] = ()
    if is_there and named:
        yaml.notes.append(f"{IMPLICIT} is not read: --{named[0]} says what to work on instead")
    resume = merge([yaml, flags])[0].get("resume")
    if is_read and resume:  # a file that nobody named only says which run goes on
        weak = yaml.values.keys() - _PER_CALL
        yaml.notes = [f"settings read from {IMPLICIT}; those of the run that goes on come before them"]
        if resume != "auto" and "resume" in flags.values:
            yaml.values.pop("output_dir", None)
    sample = Path(sys.argv[0]).resolve().parent
    is_lost = not (is_there or path or named or flags.values.get("resume") or flags.values.get("do_eval"))
    if is_lost and sample != Path.cwd() and (sample / IMPLICIT).is_file():
        way = f"cd {shlex.quote(str(sample))}"
        flags.faults.append(f"no {IMPLICIT} here; the sample is trained from its own folder: {way}")
    return _finish("train", Layer(), yaml, flags, weak)


def _evaluate(flags: Layer, path: str | None, settings_folder: Callable[[Path], Path]) -> Parsed:
    if "model_name_or_path" in flags.values:
        flags.faults.append("--model_name_or_path: evaluate.py scores a trained folder, named by --model_dir")
    working = {*_shown("evaluate"), "do_eval", "output_dir", "model_name_or_path"}
    idle = [name for name in flags.values if name not in working]
    flags.notes += [f"{flags.where[name]} changes nothing in evaluate.py" for name in idle]
    if "output_dir" in flags.values:  # here it says where to write
        flags.values["eval_output_dir"] = flags.values.pop("output_dir")
    yaml = file_layer(path, SETTINGS, "evaluate")
    model_dir = flags.values.get("model_dir") or yaml.values.get("model_dir") or yaml.values.get("output_dir")
    if not model_dir and path is None:
        model_dir = sample_output_dir(yaml)
    stored = Layer()
    if not model_dir and not {"model_dir", "output_dir"} & (flags.bad | yaml.bad):
        flags.faults.append("model_dir must be set: name the trained folder with --model_dir")
    if model_dir and not (flags.faults or yaml.faults):
        folder = settings_folder(Path(model_dir))
        stored.values = model_settings(folder)
        said = f"settings read from {folder / TRAINING_ARGS}"
        stored.notes = [said if stored.values else f"{model_dir} holds no {TRAINING_ARGS}: default settings"]
        stored.values["model_dir"] = model_dir
    return _finish("evaluate", stored, yaml, flags)


def sample_output_dir(layer: Layer) -> str | None:
    """The output_dir of the working directory's config.yaml, if there is one; `layer` gets the notes."""
    sample = file_layer(IMPLICIT if os.path.exists(IMPLICIT) else None, SETTINGS, "evaluate")
    folder: str | None = sample.values.get("output_dir")
    if "output_dir" in sample.bad:
        layer.faults += sample.faults
        layer.bad.add("output_dir")
    if folder:
        layer.notes.append(f"model_dir is {folder}, the output_dir of {IMPLICIT}")
    return folder


def _finish(script: Script, stored: Layer, yaml: Layer, flags: Layer, weak: Collection[str] = ()) -> Parsed:
    """The layers as one checked Config. On a resume the run's own settings go over those named in `weak`."""
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
    names = (yaml.values.keys() - weak | flags.values.keys()) & values.keys()
    names |= {loser for winner, loser in REPLACES if winner in names and values[winner]}
    if {"do_train", "do_eval"} & names and "eval_strategy" in values:
        names |= {"eval_strategy"}
    return Parsed(config, frozenset(names), (*stored.notes, *yaml.notes, *flags.notes, *aside))


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], list[tuple[str, str, object]]]:
    """The values, later layers first, and what was set aside: (by what, which setting, its value)."""
    values: dict[str, Any] = {}
    set_aside: list[tuple[str, str, object]] = []
    for layer in layers:
        for winner, loser in REPLACES:
            if layer.values.get(winner) and loser not in layer.values and loser in values:
                set_aside.append((layer.where.get(winner, winner), loser, values.pop(loser)))
        values.update(layer.values)
    return values, set_aside


def flag_layer(
    argv: Sequence[str], settings: Mapping[str, Setting], script: Script, usage: str = _USAGE
) -> tuple[Layer, str | None]:
    """What the flags say, and the settings file they name. `--help` prints the help page and exits."""
    if "--help" in argv or "-h" in argv:
        say(help_page(script, settings, usage))
        raise SystemExit(0)
    kinds = {"config": PATH, **{name: item.kind for name, item in settings.items()}}
    layer = read_flags(argv, kinds if script == "serve" else OLD_KINDS | kinds)
    layer.where = {name: f"--{name}" for name in layer.values}
    _give_types(layer, kinds, script)
    return layer, layer.values.pop("config", None)


def file_layer(path: str | None, settings: Mapping[str, Setting], script: Script) -> Layer:
    """What a settings file says, faults and all; nothing without a path. serve.py passes over what training
    alone reads."""
    if path is None:
        return Layer()
    try:
        file = read_settings(path)
    except ConfigError as error:
        return Layer(faults=[str(error)], bad=set(settings))
    layer = Layer(file.values, bad=file.lines.keys() - file.values.keys())
    if script == "serve":
        layer.values = {
            name: v for name, v in file.values.items() if name in settings or name not in SETTINGS
        }
    layer.where = {name: f"{file.where(name)}: {name}" for name in layer.values}
    layer.faults, layer.notes = file.faults, [f"settings read from {path}"]
    _give_types(layer, {name: item.kind for name, item in settings.items()}, script)
    return layer


def _give_types(layer: Layer, kinds: Mapping[str, Kind], script: Script) -> None:
    """Convert the values as they were read, and put in what old names mean today."""
    raw = layer.values
    old = [name for name in raw if name in OLD_KINDS and script != "serve"]
    today = {name: value for name, value in raw.items() if name not in old}
    layer.values, faults = convert_all(kinds, today, layer.where)
    layer.bad |= today.keys() - layer.values.keys()
    layer.faults += faults
    for name in old:
        _add_old(layer, name, raw[name], script)


def _add_old(layer: Layer, name: str, value: object, script: Script) -> None:
    where = layer.where[name]
    try:
        meaning, note = translate(name, convert(OLD_KINDS[name], value), script)
    except ValueError as error:
        layer.faults.append(f"{where}: {error}")
        return
    if note:
        layer.notes.append(f"{where} {note}")
    for today, wanted in meaning.items():
        found = layer.values.setdefault(today, wanted)
        layer.where.setdefault(today, where)
        if found != wanted:
            layer.faults.append(f"{where} means {today} {show(wanted)}, found {today} {show(found)} as well")


_SHORT = re.compile("-.|[–—−]+[A-Za-z]")  # text processors make one long dash of two


def read_flags(argv: Sequence[str], kinds: Mapping[str, Kind]) -> Layer:
    """`--name value`, `--name=value`, `--name`, `--name several words`, as YAML would give the values."""
    flags = Layer()
    hungry = ""
    for flag, words in _split(argv, flags.faults, kinds):
        name, equals, value = flag.removeprefix("--").partition("=")
        near = suggest(flag.lstrip("-–—−"), kinds)
        if not flag.startswith("--") and hungry:
            expected = f"--{hungry}: expected {kinds[hungry].expected}"
            flags.faults[-1] = f"{expected}, found the flag {plain(flag)}{near}"
        elif not flag.startswith("--"):
            flags.faults.append(f"flags begin with two dashes, found {show(flag)}{near}")
        elif name in kinds:
            _add(flags, name, [value, *words] if equals else words, kinds[name])
        else:
            flags.faults.append(f"unknown setting {plain('--' + name)}{suggest(name, kinds)}")
        needs_value = name in kinds and kinds[name].arity != "maybe"
        hungry = name if needs_value and not words and not equals else ""
    return flags


def _split(argv: Sequence[str], faults: list[str], names: Mapping[str, Kind]) -> list[tuple[str, list[str]]]:
    """Each flag with the words after it. A word that begins with a dash and is no number is one too."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or (_SHORT.match(word) and not NUMBER.fullmatch(word)):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            is_file = word.endswith((".yaml", ".yml", ".json"))
            hint = "; a settings file is named by --config" if is_file else ""
            example = "output_dir" if "output_dir" in names else "model_dir"
            faults.append(f"expected a flag such as --{example}, found {show(word)}{hint}")
    return found


def _add(flags: Layer, name: str, words: list[str], kind: Kind) -> None:
    found = ""
    if not words and kind.arity != "maybe":
        found = "nothing"
    elif len(words) > 1 and kind.arity != "many":
        found = f"{len(words)} words, {show(' '.join(words))}"
    if found:
        flags.faults.append(f"--{name}: expected {kind.expected}, found {found}")
        flags.bad.add(name)
        return
    value = kind.read(words)
    if flags.values.get(name, value) != value:
        flags.notes.append(f"--{name} is given more than once: the last, {show(value)}, counts")
    flags.values[name] = value


def _shown(script: Script) -> list[str]:
    """The settings that change something in train.py or evaluate.py."""
    also = _ALSO_IN_EVALUATE if script == "evaluate" else ()
    return [name for name, item in SETTINGS.items() if item.group in _GROUPS[script] or name in also]


def help_page(script: Script, settings: Mapping[str, Setting], usage: str) -> str:
    """Every setting of the script, by group, with its meaning, what it may be and its default."""
    items = [settings[name] for name in _shown(script)] if script in _GROUPS else list(settings.values())
    lines = [usage.format(script=script)]
    for item, before in zip(items, [None, *items], strict=False):
        if before is None or item.group != before.group:
            lines.append(f"\n{item.group}:")
        lines.append(help_lines("output_dir" if item.name == "eval_output_dir" else item.name, item))
    if script != "serve":
        old = f"names of run_glue.py, obeyed or said to be idle: {', '.join(sorted(OLD_KINDS))}"
        lines += ["", textwrap.fill(old, 100)]
    return "\n".join(lines)


def help_lines(name: str, item: Setting) -> str:
    """The entry of one setting."""
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = f"  --{name:<28} ", " " * 33
    return wrapper.fill(f"{item.help} ({item.kind.expected}; default {_word(item.default)})")


def _word(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return value if isinstance(value, str) else show(value)
