"""The command line, a settings file and a model folder's own settings, merged into one checked `Config`.

Later wins: defaults, then training_args.yaml of the model folder (evaluate.py), then YAML, then flags. The
sample's config.yaml is read unasked, but never for work on somebody's own model or data. A resume has its
run's settings under those that are `explicit` here: they are in the checkpoint, which training opens.
"""

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from bertpair.console import program, say
from bertpair.errors import ConfigError, plain, raise_faults, show
from bertpair.settings import fields as kinds
from bertpair.settings.config import GROUPS, SETTINGS, Config
from bertpair.settings.contradictions import contradictions, missing, settle
from bertpair.settings.evaluate import EvaluateSettings
from bertpair.settings.fields import Group, described, expected, from_words, placed, suggest, typed
from bertpair.settings.files import Layer, read_settings
from bertpair.settings.run_glue import OldNames, translate
from bertpair.settings.several import SeveralRuns, several_faults
from bertpair.settings.stored import TRAINING_ARGS, model_settings

Script = Literal["train", "evaluate", "serve"]
IMPLICIT = "config.yaml"
_OWN = {
    "model_name_or_path": "another model",
    "task_name": "another task",
    "data_dir": "other data",
    "train_file": "other data",
}
_PER_CALL = ("resume", "resume_anyway", "overwrite_output_dir", "output_dir")
_DASHES = "-–—−"  # text processors make one long dash of two

HOW_TO_SET = """\
Every setting below is a flag, such as --device cpu, and a line of a settings file, such as
"device: cpu". --config FILE reads a settings file (YAML or JSON); a flag wins over the same setting
in the file. Several values are separated by spaces. The word null means "not given"."""
_USAGE = {
    "train": """{program} [--config FILE] [--name value] …
       {program} FILE.json

Trains a model that finds the label of a pair of texts, or of a single text.

{how_to_set}
A flag without a value, such as --new_head, means true. Without --config, config.yaml in the working
directory is read, unless a flag names another model, another task or other data.

Example, to be run in the project's folder. First {program} without flags trains the sample
model into the folder output. Then this command trains it further, on other data, in seconds:
  {program} --model_name_or_path output --new_head \\
    --train_file examples/answers.tsv --dev_file examples/answers_dev.tsv \\
    --text_a_column reference --text_b_column answer --label_column grade \\
    --max_seq_length 40 --learning_rate 5e-4 --output_dir grades""",
    "evaluate": """{program} [--config FILE] [--name value] …
       {program} FILE.json

Measures a trained model on a file with labels, or predicts the labels of a file without.

{how_to_set}
A flag without a value, such as --predict, means true. Columns, labels and all else that belongs to
the model are as in its training, if they are not given.

Example, to be run in the project's folder, after the example of {train} --help:
  {program} --model_dir grades --data_file examples/answers_dev.tsv""",
}
NO_MODEL_DIR = "model_dir must be set: it is the folder of a trained model. Example: --model_dir my_model"
FIRST, SEVERAL = "The settings to know first", "Several runs, to choose the best"
_FIRST = {
    "train": """model_name_or_path train_file dev_file text_a_column text_b_column label_column output_dir
        num_train_epochs learning_rate per_device_train_batch_size""",
    "evaluate": """model_dir data_file predict all_checkpoints compare output_dir max_eval_samples on_bad_row
        device per_device_eval_batch_size""",
}

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


class Names(OldNames, Config):
    """What a settings file may say."""


class _Flags(Group):
    """What only a command line may say."""

    config: kinds.Path = None


class _TrainFlags(_Flags, SeveralRuns):
    """The same of train.py."""


@dataclass(frozen=True)
class Parsed:
    """The settings, the names that were set now (a resume compares those), and lines to say."""

    config: Config
    explicit: frozenset[str]
    notes: tuple[str, ...]
    several: SeveralRuns = SeveralRuns()


def _fill(layer: Layer, raw: Mapping[str, object], names: type[Group], script: Script) -> Layer:
    """Add the typed values of `raw`, what its old names mean today, and its faults."""
    values, faults = typed(names, raw)
    layer.bad |= faults.keys()
    layer.faults += placed(faults, layer.where)
    layer.values = {name: value for name, value in values.items() if name not in OldNames.model_fields}
    for name in [name for name in values if name in OldNames.model_fields]:
        where = layer.where[name]
        meaning, note = translate(name, values[name], script)
        layer.notes += [f"{where} {note.format(evaluate=program('evaluate'))}"] if note else []
        for today, wanted in meaning.items():
            found = layer.values.setdefault(today, wanted)
            layer.where.setdefault(today, where)
            if found != wanted:
                said = f"{where} means {today} {show(wanted)}, found {today} {show(found)} as well"
                layer.faults.append(said)
    return layer


def parse_command_line(
    argv: Sequence[str], script: Script, settings_folder: Callable[[Path], Path] = lambda folder: folder
) -> Parsed:
    """What this command line means; ConfigError with all faults at once. `--help` prints and exits with 0.

    `settings_folder` says which folder's training_args.yaml speaks for a model folder; by default its own.
    """
    if len(argv) == 1 and argv[0].lower().endswith(".json") and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    usage = _USAGE[script].format(program=program(script), train=program("train"), how_to_set=HOW_TO_SET)
    shown = _help_groups(script)
    if script == "train":
        flags, own = flag_layer(argv, Names, script, shown, usage, only_flags=_TrainFlags)
        return _train(flags, own.pop("config", None), SeveralRuns(**own))
    flags, own = flag_layer(argv, Names, script, shown, usage)
    return _evaluate(flags, own.get("config"), settings_folder)


def _help_groups(script: Script) -> dict[str, list[str]]:
    """The names that --help shows, by group: those that change something in train.py or evaluate.py."""
    names = {title: list(group.model_fields) for title, group in GROUPS.items()}
    evaluating = names.pop("Evaluating a trained model")
    if script == "evaluate":
        of_files = [name for name in names["Data"] if name != "max_train_samples"]
        evaluating[-1:] = ["output_dir", "with_texts", "metric_for_best_model"]  # eval_output_dir's name here
        batches = ["per_device_eval_batch_size", "pad_to_multiple_of"]
        hub = ["revision", "cache_dir"]
        names = {"Model": evaluating + hub, "Data": of_files, "Device": batches + names["Device"]}
    else:
        names[SEVERAL] = list(SeveralRuns.model_fields)
    return first_of_all(_FIRST[script], names)


def first_of_all(names: str, groups: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """A group of these names, then the groups without them."""
    first = names.split()
    rest = {title: [name for name in members if name not in first] for title, members in groups.items()}
    return {FIRST: first, **rest}


def _train(flags: Layer, path: str | None, several: SeveralRuns) -> Parsed:
    flags.faults += [
        f"--{name} is a flag of {program('evaluate')}, not of training"
        for name in flags.values
        if name in EvaluateSettings.model_fields
    ]
    named = [name for name in _OWN if name in flags.values or name in flags.bad]
    is_there = path is None and os.path.exists(IMPLICIT)
    is_read = is_there and not named
    yaml = file_layer(IMPLICIT if is_read else path, Names, "train")
    weak: Collection[str] = ()
    if is_there and named:
        yaml.notes.append(f"{IMPLICIT} is not read, because --{named[0]} names {_OWN[named[0]]}")
    resume = merge([yaml, flags])[0].get("resume")
    if is_read and resume:  # a file that nobody named only says which run goes on
        weak = yaml.values.keys() - _PER_CALL
        yaml.notes = [f"settings read from {IMPLICIT}; the resumed run's own settings win"]
        if resume != "auto" and "resume" in flags.values:
            yaml.values.pop("output_dir", None)
    sample = Path(sys.argv[0]).resolve().parent
    is_lost = not (is_there or path or named or flags.values.get("resume") or flags.values.get("do_eval"))
    if is_lost and sample != Path.cwd() and (sample / IMPLICIT).is_file():
        way = f"cd {shlex.quote(str(sample))}"
        flags.faults.append(
            f"there is no {IMPLICIT} in this folder; the sample is trained from its own folder: {way}"
        )
    parsed = _finish("train", Layer(), yaml, flags, weak, lambda config: several_faults(several, config))
    return replace(parsed, several=several)


def _evaluate(flags: Layer, path: str | None, settings_folder: Callable[[Path], Path]) -> Parsed:
    if "model_name_or_path" in flags.values:
        flags.faults.append("--model_name_or_path: the trained model to evaluate is named by --model_dir")
    working = {
        *sum(_help_groups("evaluate").values(), []),
        "do_eval",
        "eval_output_dir",
        "model_name_or_path",
        "model_type",
    }
    idle = [name for name in flags.values if name not in working]
    flags.notes += [f"{flags.where[name]} has no effect on an evaluation" for name in idle]
    if "output_dir" in flags.values:  # here it says where to write
        flags.values["eval_output_dir"] = flags.values.pop("output_dir")
    yaml = file_layer(path, Names, "evaluate")
    model_dir = flags.values.get("model_dir") or yaml.values.get("model_dir") or yaml.values.get("output_dir")
    if not model_dir and path is None:
        model_dir = sample_output_dir(yaml)
    stored = Layer()
    if not model_dir and not {"model_dir", "output_dir"} & (flags.bad | yaml.bad):
        flags.faults.append(NO_MODEL_DIR)
    if model_dir and not (flags.faults or yaml.faults):
        folder = settings_folder(Path(model_dir))
        stored.values = model_settings(folder)
        said = f"settings read from {folder / TRAINING_ARGS}"
        stored.notes = [
            said if stored.values else f"{model_dir} holds no {TRAINING_ARGS}: the default settings are used"
        ]
        stored.values["model_dir"] = model_dir
    return _finish("evaluate", stored, yaml, flags)


def sample_output_dir(layer: Layer) -> str | None:
    """The output_dir of the working directory's config.yaml, if there is one; `layer` gets the notes."""
    sample = file_layer(IMPLICIT if os.path.exists(IMPLICIT) else None, Names, "evaluate")
    folder: str | None = sample.values.get("output_dir")
    if "output_dir" in sample.bad:
        layer.faults += sample.faults
        layer.bad.add("output_dir")
    if folder:
        layer.notes.append(f"model_dir is {folder}, the output_dir of {IMPLICIT}")
    return folder


def _finish(
    script: Script,
    stored: Layer,
    yaml: Layer,
    flags: Layer,
    weak: Collection[str] = (),
    more_faults: Callable[[Config], Iterable[str]] = lambda config: (),
) -> Parsed:
    """The layers as one checked Config. On a resume the run's own settings go over those named in `weak`."""
    merged, set_aside = merge([stored, yaml, flags])
    values = settle(merged)
    config = Config(**values)
    bad = flags.bad | yaml.bad
    faults = [*yaml.faults, *flags.faults, *contradictions(config), *more_faults(config)]
    if script == "train" and not config.resume and config.runs_training and (lacking := missing(config, bad)):
        faults += lacking if faults else [*lacking, f"{program(script)} --help explains every setting"]
    if config.resume == "auto" and script == "train" and not config.output_dir and "output_dir" not in bad:
        faults.append("output_dir must be set: it is the folder of the run to resume")
    raise_faults(faults)
    aside = [
        f"{loser} {show(old)} has no effect, because {winner} is given"
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
                where = layer.where.get(winner, winner)
                set_aside.append((where, loser, values.pop(loser)))
        values.update(layer.values)
    return values, set_aside


def file_layer(path: str | None, names: type[Group], script: Script) -> Layer:
    """What a settings file says, faults and all; nothing without a path. serve.py passes over what training
    alone reads."""
    if path is None:
        return Layer()
    try:
        layer = read_settings(path)
    except ConfigError as error:
        return Layer(faults=[str(error)], bad=set(names.model_fields))
    layer.notes.append(f"settings read from {path}")
    known = names.model_fields.keys() | (SETTINGS.keys() if script != "serve" else ())
    raw = {name: value for name, value in layer.values.items() if name in known or name not in SETTINGS}
    return _fill(layer, raw, names, script)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Help(argparse.HelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return ""  # what may follow stands in the text

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [
            line for part in text.splitlines() for line in textwrap.wrap(part, width, break_on_hyphens=False)
        ]


def flag_layer(
    argv: Sequence[str],
    names: type[Group],
    script: Script,
    shown: Mapping[str, Sequence[str]],
    usage: str,
    *,
    only_flags: type[Group] = _Flags,
) -> tuple[Layer, dict[str, Any]]:
    """What the flags say, and the values of `only_flags`. `--help` shows some by group, and exits."""
    parser = _parser(names, only_flags, script, shown, usage)
    if "--help" in argv or "-h" in argv:
        say(parser.format_help().rstrip())
        raise SystemExit(0)
    given, rest = parser.parse_known_args(argv)
    layer = Layer()
    for before, word in zip(["", *rest], rest, strict=False):
        if word[:1] in _DASHES and len(word) > 1:
            flag = word.partition("=")[0]
            near = suggest(flag.strip(_DASHES), names.model_fields | only_flags.model_fields)
            said = "unknown setting" if flag.startswith("--") else "flags begin with two dashes, found"
            layer.faults.append(f"{said} {plain(flag)}{near}")
        elif not before or before[0] not in _DASHES:
            is_file = word.endswith((".yaml", ".yml", ".json"))
            hint = "; a settings file is named by --config" if is_file else ""
            example = "output_dir" if script == "train" else "model_dir"
            layer.faults.append(f"expected a flag such as --{example}, found {show(word)}{hint}")
    raw: dict[str, object] = {}
    for name, uses in vars(given).items():
        layer.where[name] = f"--{name}"
        model = only_flags if name in only_flags.model_fields else names
        try:
            found = [from_words(words, model.model_fields[name].annotation) for words in uses]
        except ValueError as error:
            layer.faults.append(f"--{name}: expected {expected(model)[name]}, found {error}")
            layer.bad.add(name)
            continue
        raw[name] = found[-1]
        if any(value != found[-1] for value in found):
            layer.notes.append(f"--{name} is given more than once: the last, {show(found[-1])}, counts")
    own, faults = typed(only_flags, {name: raw.pop(name) for name in only_flags.model_fields if name in raw})
    layer.faults += placed(faults, layer.where)
    return _fill(layer, raw, names, script), own


def _parser(
    names: type[Group],
    only_flags: type[Group],
    script: Script,
    shown: Mapping[str, Sequence[str]],
    usage: str,
) -> argparse.ArgumentParser:
    old = ", ".join(sorted(OldNames.model_fields))
    epilog = f"Flags of run_glue.py, each obeyed or said to be ignored: {old}."
    parser = _Parser(
        usage=usage,
        epilog=None if script == "serve" else epilog,
        prefix_chars=_DASHES,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(_Help, max_help_position=34, width=100),
    )
    fields, texts = only_flags.model_fields | names.model_fields, described(only_flags) | described(names)
    for title, members in shown.items():
        group = parser.add_argument_group(title)
        for name in members:
            meant = "eval_output_dir" if name == "output_dir" and script == "evaluate" else name
            facts: Any = fields[meant].json_schema_extra or {}
            example = f"\nExample: --{name} {facts['example']}".rstrip() if "example" in facts else ""
            text = (texts[meant] + example).replace("%", "%%")
            group.add_argument(f"--{name}", action="append", nargs="*", help=text)
    shown_names = {name for members in shown.values() for name in members}
    for name in fields:
        if name not in shown_names:
            parser.add_argument(f"--{name}", action="append", nargs="*", help=argparse.SUPPRESS)
    return parser
