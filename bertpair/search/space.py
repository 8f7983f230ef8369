"""sweep.yaml: which settings are tried, with which values, and how; all that is wrong with it at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from bertpair.errors import ConfigError, plain, raise_faults, show
from bertpair.settings.command_line import REPLACES
from bertpair.settings.config import SETTINGS, Config, Metric
from bertpair.settings.contradictions import contradictions
from bertpair.settings.evaluate import EvaluateSettings
from bertpair.settings.fields import Group, Real, Switch, Text, Whole, placed, said, setting, suggest, typed
from bertpair.settings.files import Layer, read_settings
from bertpair.settings.several import seeds_fault

MAX_POINTS = 10_000
MIN_PRUNED = 3  # seeds: a trial is stopped after two at the earliest
KINDS = ("log", "range", "int")
# These name a run or say what it writes: every run of a sweep has its own.
FIXED = {"seed", "output_dir", "overwrite_output_dir", "resume", "resume_anyway", "do_train", "do_eval"}
FIXED |= EvaluateSettings.model_fields.keys()
SAME_ROWS = {"dev_file", "max_eval_samples"}  # what trials are measured on, or none could be compared
Params = dict[str, Any]


def _as_mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected the settings to try, found {show(value) if value else 'none'}")
    return value


Space = Annotated[dict[str, Any], PlainValidator(_as_mapping), said("a mapping of settings to values")]
Seconds = Annotated[Real, Field(gt=0), said("a number above 0")]


class SweepSettings(Group):
    """What sweep.yaml may say."""

    space: Space = Field(default_factory=dict, description="The settings to try, each with its values.")
    sampler: Literal["grid", "random", "tpe"] = setting("grid", "How values are chosen.")
    trials: Whole | None = setting(
        None, "How many combinations to try. Not given: all of a grid.", ge=1, le=MAX_POINTS
    )
    seeds: Whole = setting(1, "How many seeds a trial is the mean of.", ge=1, le=1000)
    metric: Metric | None = setting(None, "What to choose by. Not given: the task's first metric.")
    prune: Switch = setting(False, "Whether to stop a trial that is clearly behind.")
    timeout: Seconds | None = setting(None, "Start no run after this many seconds.")
    storage: Text = setting(None, "Where trials are kept. Not given: a SQLite file in output_dir.")


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One setting of a sweep: the values of a list, or a range of numbers."""

    name: str
    values: tuple[Any, ...] = ()  # of a list
    low: float = 0
    high: float = 0
    kind: Literal["list", "range", "log", "int"] = "list"

    def holds(self, value: Any) -> bool:
        """Whether a value lies within."""
        if self.kind == "list":
            return value in self.values
        return isinstance(value, int | float) and self.low <= value <= self.high

    def listed(self) -> Sequence[Any]:
        """Its values, if they can be counted."""
        return range(int(self.low), int(self.high) + 1) if self.kind == "int" else self.values

    @property
    def edges(self) -> tuple[Any, ...]:
        """All values of a list; both ends of a range."""
        return self.values or (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked against the settings that it starts from."""

    settings: SweepSettings
    base: Config
    space: tuple[Dimension, ...]

    @property
    def num_points(self) -> int:
        """How many combinations are tried."""
        if self.settings.sampler != "grid":
            return self.settings.trials or 0
        combinations = math.prod(len(each.listed()) for each in self.space)
        return min(combinations, self.settings.trials or combinations)

    def grid(self) -> list[Params]:
        """The combinations of a grid, the last setting changing fastest."""
        names, count = [each.name for each in self.space], self.num_points
        # The first `count` combinations have none of the later values, and there may be billions of those.
        combinations = itertools.product(*(each.listed()[:count] for each in self.space))
        return [dict(zip(names, each, strict=True)) for each in itertools.islice(combinations, count)]


def with_params(base: Config, params: Params) -> Config:
    """`base` with these values; what one of them replaces has its default again, even where it is 0."""
    set_here = {name for name, value in params.items() if value is not None and value is not False}
    void = {loser for winner, loser in REPLACES if winner in set_here and loser not in params}
    defaults = {name: SETTINGS[name].default for name in void & SETTINGS.keys()}
    return base.model_copy(update={**defaults, **params})


def read_sweep(file: str | os.PathLike[str] | Mapping[str, Any], base: Config) -> Sweep:
    """The sweep that a file or a mapping describes; ConfigError with all that is wrong with it."""
    if isinstance(file, Mapping):
        values = {str(name): value for name, value in file.items()}
        layer = Layer(values, {name: name for name in values})
    else:
        layer = read_settings(Path(file))
    values, faults = typed(SweepSettings, layer.values)
    for name in faults.keys() & SETTINGS.keys() - FIXED:
        faults[name] = f"unknown setting {name}: the settings to try stand under space"
    said = [*layer.faults, *placed(faults, layer.where)]
    if "space" not in layer.where:
        place = "the sweep" if isinstance(file, Mapping) else file
        said.append(f"space must be set in {place}: the settings to try, each with its values")
    space = []
    for name, raw in values.pop("space", {}).items():
        try:
            space.append(_dimension(str(name), raw))
        except ConfigError as error:
            said.append(f"{_place_of(str(name), layer.where)}: {error}")
    raise_faults(said)
    sweep = Sweep(SweepSettings(space=layer.values["space"], **values), base, tuple(space))
    raise_faults(list(_faults(sweep, layer.where)))
    return sweep


def _place_of(name: str, where: Mapping[str, str]) -> str:
    """Where a setting to try stands: its own line, if the file has one for it."""
    return where.get(f"space.{name}", where["space"])


def _dimension(name: str, raw: object) -> Dimension:
    if name in SweepSettings.model_fields:
        raise ConfigError(f"{name} stands beside space, not under it")
    if name not in SETTINGS:
        raise ConfigError(f"unknown setting {plain(name)}{suggest(name, SETTINGS)}")
    if name in FIXED:
        hint = "; `seeds: 3` runs every trial with three" if name == "seed" else ""
        raise ConfigError(f"{name} is not a setting that a sweep can try{hint}")
    if name in SAME_ROWS:
        raise ConfigError(f"{name} is not a setting that a sweep can try: all trials need the same dev rows")
    if isinstance(raw, Mapping):
        return _range(name, raw)
    if not isinstance(raw, list | tuple) or not raw:
        found = "an empty list" if raw in ([], ()) else show(raw)
        raise ConfigError(
            f"{name}: expected a list of values, or log, range or int: [low, high]; found {found}"
        )
    values: list[Any] = []
    for each in raw:
        value = _typed(name, each)
        if value in values:
            raise ConfigError(f"{name}: {show(value)} is given twice")
        values.append(value)
    return Dimension(name, tuple(values))


def _range(name: str, raw: Mapping[object, object]) -> Dimension:
    kind, ends = next(iter(raw.items()), (None, None))
    pair = ends if isinstance(ends, list | tuple) else ()
    if len(raw) != 1 or kind not in KINDS or len(pair) != 2:
        found = " and ".join(map(str, raw)) or "nothing"
        if len(raw) == 1 and kind in KINDS:
            found += f" with a list of {len(pair)}" if pair else f" with {show(ends)}"
        raise ConfigError(f"{name}: expected log, range or int with [low, high]; found {found}")
    low, high = (_typed(name, end) for end in pair)
    wanted, types = int if kind == "int" else float, {type(low), type(high)}
    if types != {wanted}:
        use = "int" if types == {int} else "range or log" if types == {float} else "a list of values"
        raise ConfigError(f"{name}: {kind} does not suit this setting; use {use}")
    if not low < high:
        raise ConfigError(f"{name}: the range is upside down or empty: found [{low:g}, {high:g}]")
    if kind == "log" and low <= 0:
        raise ConfigError(f"{name}: log needs a low end above 0, found {low:g}")
    return Dimension(name, low=low, high=high, kind=kind)  # type: ignore[arg-type]


def _typed(name: str, value: object) -> Any:
    values, faults = typed(Config, {name: value})
    if faults:
        raise ConfigError(f"{name}: {faults[name]}")
    return values[name]


def _faults(sweep: Sweep, where: Mapping[str, str]) -> Iterator[str]:
    """What does not go together, in the file or with the settings that the sweep starts from."""
    settings, base = sweep.settings, sweep.base
    if settings.sampler == "grid":
        for each in sweep.space:
            if each.kind in ("range", "log"):
                said = "a grid needs a list; random and tpe take ranges"
                yield f"{_place_of(each.name, where)}: {each.name}: {said}"
    elif settings.trials is None:
        yield f"{where['sampler']}: {settings.sampler} needs trials, the number of combinations to try"
    if settings.prune and settings.seeds < MIN_PRUNED:
        found = f"found {settings.seeds}"
        yield f"{where['prune']}: no trial can be stopped with fewer than {MIN_PRUNED} seeds, {found}"
    if not base.runs_evaluation or not (base.dev_file or base.data_dir):
        yield "a sweep needs a dev file to choose by: set dev_file, or data_dir with a dev.tsv"
    if fault := seeds_fault(base.seed, settings.seeds):
        yield f"{where.get('seeds', 'seeds')}: {fault}"
    if settings.sampler == "grid" and sweep.num_points > MAX_POINTS:
        found = f"the grid has {sweep.num_points:,} combinations"
        yield f"{where['space']}: {found}; at most {MAX_POINTS:,} can be tried: set trials"
        return
    clashes: dict[str, Params] = {}
    for params in _corners(sweep):
        for fault in contradictions(with_params(base, params)):
            clashes.setdefault(fault, params)
    known = set(contradictions(base))
    for fault, params in clashes.items():
        if fault not in known:
            with_them = ", ".join(f"{name} {show(value)}" for name, value in params.items())
            yield f"{where['space']}: with {with_them}: {fault}"


def _corners(sweep: Sweep) -> Iterator[Params]:
    """Combinations of the values of lists and the ends of ranges."""
    names = [each.name for each in sweep.space]
    for each in itertools.islice(itertools.product(*(each.edges for each in sweep.space)), MAX_POINTS):
        yield dict(zip(names, each, strict=True))
