"""From the data settings to files, columns, labels and targets.

A preset decides what the settings leave open. One exception: numbers of a preset that a four-column file
does not have give way to the four-column default, because `--task_name MNLI-MM` was how the 2020 recipe
said "pairs, three classes" about its own files.
"""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bertpair.data.columns import Columns
from bertpair.data.tsv import first_row
from bertpair.errors import ConfigError, DataError, list_faults
from bertpair.settings.config import DataSettings
from bertpair.settings.tasks import FOUR_COLUMN, SCORE_METRICS, Task, find_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What is read and how. Files that are neither there nor needed are (); `notes` are lines for the log.

    `labels` None: found in the training data (or a regression). The first of `metrics` is the one to watch.
    """

    task: Task
    train_files: tuple[Path, ...]
    dev_files: tuple[Path, ...]
    test_files: tuple[Path, ...]
    columns: Columns
    test_columns: Columns
    labels: tuple[str, ...] | None
    regression: bool
    metrics: tuple[str, ...]
    notes: tuple[str, ...]


def resolve_source(settings: DataSettings, *, needs: Collection[str] = ("train",)) -> Source:
    """Settings and preset → what to read; ConfigError for settings that contradict each other.

    `needs`: which of `train`, `dev`, `test` must be there, else a DataError lists what was looked for. In
    training, a dev file that was named must be there too; without one that was not, a note says so.
    """
    task, notes = _fitting_task(settings, find_task(settings.task_name), needs)
    columns, test_columns = _columns(settings, task), _columns(settings, task, is_test=True)
    labels, regression, metrics = _labels(settings, task)
    files = _find_files(settings, task, needs)
    if "train" in needs and not files["dev"]:
        looked_for = ", ".join(map(str, _usual_places(settings, task, "dev"))) or "dev_file is not set"
        notes = (*notes, f"no dev file ({looked_for}): training without evaluation")
    return Source(
        task,
        files["train"],
        files["dev"],
        files["test"],
        columns,
        test_columns,
        labels,
        regression,
        metrics,
        notes,
    )


def columns_for(
    source: Source, path: Path | str, *, with_labels: bool, header: tuple[str, ...] | None = None
) -> Columns:
    """How to read one file: as in training; without labels perhaps as the preset's test file, if it is one.

    `header` is the training file's, None where it had none or is not known. What the file's first row says
    decides, never the file's name.
    """
    trained = replace(source.columns, header=header)
    if with_labels:
        return trained
    test = source.test_columns
    if (test.text_a, test.text_b, test.has_header) != (trained.text_a, trained.text_b, trained.has_header):
        first = first_row(path, trained.quoting)
        if _texts_named(test, first, source.task.text_names):
            return test
    return replace(trained, label=None)


def _texts_named(columns: Columns, first: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a header row has these names where the texts are."""
    places = [column for column in (columns.text_a, columns.text_b) if isinstance(column, int)]
    if not columns.has_header or len(places) != len(names) or not all(0 <= p < len(first) for p in places):
        return False
    return [first[place].strip() for place in places] == list(names)


def _named(settings: DataSettings, kind: str) -> list[Path]:
    named: Sequence[str] | None = getattr(settings, f"{kind}_file")
    return [Path(name) for name in ([named] if isinstance(named, str) else named or [])]


def _usual_places(settings: DataSettings, task: Task, kind: str) -> list[Path]:
    """Where a file that was not named may be: the layout's name in data_dir, then the preset's own."""
    if settings.data_dir is None or _named(settings, kind):
        return []
    layouts = (task, find_task(settings.task_name))
    names = dict.fromkeys(getattr(layout, f"{kind}_file") for layout in layouts)
    return [Path(settings.data_dir, name) for name in names]


def _find_files(settings: DataSettings, task: Task, needs: Collection[str]) -> dict[str, tuple[Path, ...]]:
    files: dict[str, tuple[Path, ...]] = {}
    faults = []
    for kind in ("train", "dev", "test"):
        named, usual = _named(settings, kind), _usual_places(settings, task, kind)
        missing = [path for path in named if not os.path.exists(path)]
        found = [path for path in usual if os.path.exists(path)][:1] or ([] if missing else named)
        is_needed = kind in needs or (kind == "dev" and named and "train" in needs)
        if is_needed and not found:
            faults.append(_not_found(settings, kind, missing or usual))
        files[kind] = tuple(found)
    if faults:
        raise DataError(list_faults(faults))
    return files


def _not_found(settings: DataSettings, kind: str, places: list[Path]) -> str:
    if not places:
        return f"no {kind} data: neither {kind}_file nor data_dir is set"
    message = f"no {kind} data: looked for {', '.join(map(str, places))}"
    if settings.data_dir is None:
        return message
    if not os.path.isdir(settings.data_dir):
        return f"{message}; data_dir {settings.data_dir} is not a folder"
    nearby = [Path(settings.data_dir, path.name) for path in places]
    found = [str(path) for path in nearby if path not in places and os.path.exists(path)]
    return f"{message}; did you mean {', '.join(found)}?" if found else message


def _fitting_task(
    settings: DataSettings, preset: Task, needs: Collection[str]
) -> tuple[Task, tuple[str, ...]]:
    """The preset, or the four-column default where the data is such; the first file that tells decides."""
    train = [*_named(settings, "train"), *_usual_places(settings, preset, "train")]
    dev = [*_named(settings, "dev"), *_usual_places(settings, FOUR_COLUMN, "dev")]
    # Scoring a named file: that file itself tells best.
    for path in train + dev if "train" in needs else _named(settings, "dev") + train + dev:
        width = _width(path, settings.quoting)
        if width and _has_columns(preset, width):
            break
        if width == 4:
            task = replace(
                FOUR_COLUMN,
                name=preset.name,
                regression=preset.regression,
                metrics=preset.metrics,
                positive_label=preset.positive_label,
            )
            return task, (
                f"task_name {preset.name}: {path} has four columns, so columns, labels and dev file are "
                "those of the four-column default; metrics stay the preset's",
            )
    return preset, ()


def _width(path: Path, quoting: str) -> int:
    """Cells of the first row; 0 if there is none (whoever reads the file says why)."""
    try:
        return len(first_row(path, quoting))
    except DataError:
        return 0


def _has_columns(task: Task, width: int) -> bool:
    numbers = [column for column in (task.text_a, task.text_b, task.label) if isinstance(column, int)]
    return all(-width <= number < width for number in numbers)


def _columns(settings: DataSettings, task: Task, *, is_test: bool = False) -> Columns:
    usual = (task.test_text_a, task.test_text_b) if is_test else (task.text_a, task.text_b)
    text_a = usual[0] if settings.text_a_column == "auto" else settings.text_a_column
    text_b = usual[1] if settings.text_b_column == "auto" else settings.text_b_column
    label = task.label if settings.label_column == "auto" else settings.label_column
    if text_a is None or label is None:
        raise ConfigError("text_a_column, label_column: found null; only text_b_column may be null")
    has_header = settings.has_header
    if not isinstance(has_header, bool):  # a column that is named needs a header to be found in
        is_named = any(isinstance(column, str) for column in (text_a, text_b, label))
        has_header = is_named or (task.test_has_header if is_test else task.has_header)
    names: dict[str, str] = {}
    if (settings.text_a_column, settings.text_b_column, settings.label_column) == ("auto",) * 3 and text_b:
        names = dict(zip(("text_a", "text_b", "label"), (*task.text_names, "label"), strict=True))
    return Columns(
        text_a,
        text_b,
        None if is_test else label,
        has_header,
        settings.quoting,
        checks_header=settings.has_header == "auto",
        usual={} if is_test else names,
    )


def _labels(settings: DataSettings, task: Task) -> tuple[tuple[str, ...] | None, bool, tuple[str, ...]]:
    """Labels in id order if they are known, whether it is a regression, and what is measured."""
    if settings.problem_type not in (None, "classification", "regression"):
        raise ConfigError(
            f"problem_type: found {settings.problem_type!r}; allowed: classification, regression"
        )
    usual = "regression" if task.regression else "classification"
    regression = (settings.problem_type or usual) == "regression"
    metrics = task.metrics
    if regression != task.regression:
        metrics = SCORE_METRICS if regression else FOUR_COLUMN.metrics
    if settings.labels is None:
        return None if regression else task.labels, regression, metrics
    if regression:
        raise ConfigError("labels: a regression has none; leave them out or set problem_type: classification")
    labels = tuple(str(label).strip() for label in settings.labels)
    if len(set(labels)) < max(2, len(labels)) or "" in labels:
        raise ConfigError(f"labels: found {list(labels)}; at least two are needed, all different, none empty")
    return labels, regression, metrics
