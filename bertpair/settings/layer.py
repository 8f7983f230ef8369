"""Layers of settings: what the flags say, what a file says, and how later ones go over earlier ones.

Where a later layer sets what makes an earlier layer's setting void (--warmup_steps over a warmup_ratio in
YAML), the earlier one is set aside, and said; within one layer that is a contradiction.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bertpair.settings.config import SETTINGS, convert_settings
from bertpair.settings.files import SettingsFile
from bertpair.settings.flag import read_flags
from bertpair.settings.run_glue import OLD_KINDS, translate
from bertpair.settings.values import PATH, Kind, convert, plain, show, suggest

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


def file_layer(file: SettingsFile, script: Script, *, old_names: bool = True) -> Layer:
    """What a settings file says, faults and all."""
    known = {*SETTINGS, *OLD_KINDS} if old_names else {*SETTINGS}
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
