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
    convert_settings,
    joint_faults,
    model_settings,
    raise_faults,
    settle,
)
from bertpair.settings.files import SettingsFile, read_settings
from bertpair.settings.run_glue import OLD_KINDS, translate
from bertpair.settings.values import PATH, Kind, convert, suggest

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


def parse_command_line(
    argv: Sequence[str], script: Script, settings_folder: Callable[[Path], Path] = lambda folder: folder
) -> Parsed:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0.

    `settings_folder` says which folder's training_args.yaml speaks for a model folder; by default its own.
    """
    if "--help" in argv or "-h" in argv:
        say(help_page(script))
        raise SystemExit(0)
    if len(argv) == 1 and argv[0].lower().endswith(".json") and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    flags, path = flag_layer(argv, script)
    return _train(flags, path) if script == "train" else _evaluate(flags, path, settings_folder)


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


def _evaluate(flags: Layer, path: str | None, settings_folder: Callable[[Path], Path]) -> Parsed:
    _read_as_evaluate(flags)
    call = _open(flags, path, "evaluate")
    model_dir = _model_dir(call)
    stored = Layer()
    if not model_dir and not {"model_dir", "output_dir"} & (flags.bad | call.yaml.bad):
        flags.faults.append("model_dir must be set: name the trained folder with --model_dir")
    if model_dir and not (flags.faults or call.yaml.faults):
        stored = _trained(call, model_dir, settings_folder(Path(model_dir)))
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


def _trained(call: _Call, model_dir: str, folder: Path) -> Layer:
    """What belongs to the model among the settings that it was trained with."""
    stored = model_settings(folder)
    said = f"settings read from {folder / TRAINING_ARGS}"
    call.notes.insert(0, said if stored else f"{model_dir} holds no {TRAINING_ARGS}: default settings")
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


_SHORT = re.compile("-.|[–—−]+[A-Za-z]")  # text processors make one long dash of two
_NEGATIVE = re.compile(r"-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass
class Flags:
    """Values by name as YAML would give them, still to be converted; `bad` names have their fault already."""

    values: dict[str, object] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_flags(argv: Sequence[str], kinds: Mapping[str, Kind]) -> Flags:
    """`--name value`, `--name=value`, `--name`, `--name several words`; faults are collected, not raised."""
    flags = Flags()
    hungry = ""
    for flag, words in _split(argv, flags.faults, kinds):
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            _refuse_short(flags, flag, hungry, kinds)
        elif name in kinds:
            _add(flags, name, [value, *words] if equals else words, kinds[name])
        else:
            flags.faults.append(f"unknown setting {plain('--' + name)}{suggest(name, kinds)}")
        needs_value = name in kinds and kinds[name].arity != "maybe"
        hungry = name if needs_value and not words and not equals else ""
    return flags


def _refuse_short(flags: Flags, flag: str, hungry: str, kinds: Mapping[str, Kind]) -> None:
    """A word with one dash is no flag; after one that needs a value it is not that either."""
    near = suggest(flag.lstrip("-–—−"), kinds)
    if hungry:
        flags.faults[-1] = (
            f"--{hungry}: expected {kinds[hungry].expected}, found the flag {plain(flag)}{near}"
        )
    else:
        flags.faults.append(f"flags begin with two dashes, found {show(flag)}{near}")


def _split(argv: Sequence[str], faults: list[str], names: Mapping[str, Kind]) -> list[tuple[str, list[str]]]:
    """Each flag with the words after it. A word that begins with a dash and is no number is one too."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or (_SHORT.match(word) and not _NEGATIVE.fullmatch(word)):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            is_file = word.endswith((".yaml", ".yml", ".json"))
            hint = "; a settings file is named by --config" if is_file else ""
            example = "output_dir" if "output_dir" in names else "model_dir"
            faults.append(f"expected a flag such as --{example}, found {show(word)}{hint}")
    return found


def _add(flags: Flags, name: str, words: list[str], kind: Kind) -> None:
    if not words and kind.arity != "maybe":
        problem = f"expected {kind.expected}, found nothing"
    elif len(words) > 1 and kind.arity != "many":
        problem = f"expected {kind.expected}, found {len(words)} words, {show(' '.join(words))}"
    else:
        problem = ""
    if problem:
        flags.faults.append(f"--{name}: {problem}")
        flags.bad.add(name)
        return
    value = kind.read(words)
    if flags.values.get(name, value) != value:
        flags.notes.append(f"--{name} is given more than once: the last, {show(value)}, counts")
    flags.values[name] = value


def help_lines(name: str, kind: Kind, default: object, meaning: str) -> str:
    """The entry of one setting."""
    text = f"{meaning} ({kind.expected}; default {_word(default)})"
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = f"  --{name:<28} ", " " * 33
    return wrapper.fill(text)


def _word(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return value if isinstance(value, str) else show(value)


Script = Literal["train", "evaluate"]

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


@dataclass
class Layer:
    """Settings of one origin, typed; `where` begins a line about one, `bad` names have their fault."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def keep(self, names: Collection[str]) -> None:
        """Forget all other values."""
        self.values = {name: value for name, value in self.values.items() if name in names}


def flag_layer(argv: Sequence[str], script: Script) -> tuple[Layer, str | None]:
    """What the flags say, and the settings file they name."""
    kinds: dict[str, Kind] = {"config": PATH, **OLD_KINDS}
    kinds |= {name: item.kind for name, item in SETTINGS.items()}
    flags = read_flags(argv, kinds)
    path = flags.values.pop("config", None)
    layer = _make_layer(flags.values, lambda name: f"--{name}", script)
    layer.faults[:0] = flags.faults
    layer.notes[:0] = flags.notes
    layer.bad |= flags.bad
    try:
        found = convert(PATH, path)
    except ValueError as error:
        layer.faults.append(f"--config: {error}")
        found = None
    return layer, None if found is None else str(found)


def file_layer(file: SettingsFile, script: Script) -> Layer:
    """What a settings file says, faults and all."""
    known = {*SETTINGS, *OLD_KINDS}
    values = {name: value for name, value in file.values.items() if name in known}
    layer = _make_layer(values, lambda name: f"{file.where(name)}: {name}", script)
    layer.faults[:0] = file.faults + [
        f"{file.where(name)}: unknown setting {plain(name)}{suggest(name, SETTINGS)}"
        for name in file.values
        if name not in known
    ]
    layer.bad |= file.lines.keys() - file.values.keys()
    return layer


def _make_layer(raw: Mapping[str, object], where: Callable[[str], str], script: Script) -> Layer:
    layer = Layer(where={name: where(name) for name in raw})
    today = {name: value for name, value in raw.items() if name in SETTINGS}
    layer.values, layer.faults = convert_settings(today, layer.where)
    layer.bad = today.keys() - layer.values.keys()
    for name in raw:
        if name not in today:
            _add_old(layer, name, raw[name], script)
    return layer


def _add_old(layer: Layer, name: str, value: object, script: Script) -> None:
    """Put in what an old name means today."""
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
