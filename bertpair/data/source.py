"""From the data settings to files, columns, labels and the rows in them.

A preset decides what the settings leave open. One exception: numbers of a preset that a four-column file
does not have give way to the four-column default, because `--task_name MNLI-MM` was how the 2020 recipe
said "pairs, three classes" about its own files.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bertpair.data.columns import Column, Columns
from bertpair.data.dataset import Pairs
from bertpair.data.formats import format_of
from bertpair.data.lines import has_stdin
from bertpair.data.records import first_row
from bertpair.data.tsv import count_rows, read_pairs, read_windows
from bertpair.errors import ConfigError, DataError, list_faults, listed, show
from bertpair.settings.data import DataSettings
from bertpair.settings.tasks import FOUR_COLUMN, SCORE_METRICS, Task, find_task

logger = logging.getLogger(__name__)

_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # int() refuses more digits


@dataclass(frozen=True)
class Source:
    """What is read and how. Files that are neither there nor needed are (); `notes` are lines for the log.

    `labels` None: found in the training data (or a regression). The first of `metrics` is the one to watch.
    """

    settings: DataSettings
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

    def read(
        self,
        files: Sequence[Path | str],
        columns: Columns,
        labels: Sequence[str] | None,
        limit: str = "max_eval_samples",
    ) -> Pairs:
        """The rows of these files with their groups, as many as the setting `limit` allows; `read_pairs`."""
        return read_pairs(files, self._grouped(columns), **self._rules(labels, limit))

    def count(
        self,
        files: Sequence[Path | str],
        columns: Columns,
        labels: Sequence[str] | None,
    ) -> int:
        """How many rows `read` would give, which says and raises the same; `count_rows`."""
        return count_rows(files, self._grouped(columns), **self._rules(labels))

    def windows(
        self,
        files: Sequence[Path | str],
        columns: Columns,
        labels: Sequence[str] | None,
        window_rows: int,
    ) -> Iterator[Pairs]:
        """The same rows, `window_rows` at a time; `read_windows`.

        Warnings are said by `count`, which comes first; those of the standard input are said here.
        """
        is_checked, rules = not has_stdin(files), self._rules(labels)
        columns = self._grouped(columns)
        return read_windows(files, columns, window_rows=window_rows, is_checked=is_checked, **rules)

    def _grouped(self, columns: Columns) -> Columns:
        return replace(columns, group=self.settings.group_column)

    def _rules(self, labels: Sequence[str] | None, limit: str = "max_eval_samples") -> dict[str, Any]:
        return {
            "labels": labels,
            "regression": self.regression,
            "on_bad_row": self.settings.on_bad_row,
            "limit": getattr(self.settings, limit),
        }

    def columns_for(
        self,
        path: Path | str,
        *,
        with_labels: bool,
        header: tuple[str, ...] | None = None,
        checks_header: bool = True,
        kept: Sequence[Column] = (),
    ) -> Columns:
        """How to read a later file: as in training; without labels perhaps as the preset's test file.

        `header` is the training file's, None where it had none or is not known; `checks_header` holds the
        file against it. What the file's first row says decides, never the file's name; the standard input is
        read as in training. The columns `kept` come along with its rows.
        """
        trained, test = self.columns, self.test_columns
        columns = replace(trained, header=header, label=trained.label if with_labels else None)
        layouts = [(each.text_a, each.text_b, each.has_header) for each in (trained, test)]
        may_be_test = not with_labels and layouts[0] != layouts[1] and test.has_header
        if may_be_test and not has_stdin([path]):
            first = [cell.strip() for cell in first_row(path, test.format_of(path))]
            places = [column for column in layouts[1][:2] if isinstance(column, int)]
            if [first[p] for p in places if 0 <= p < len(first)] == list(self.task.text_names):
                columns = test
        numbers = [column for _, column in columns.by_role() if isinstance(column, int)]
        if columns.has_header and numbers and header is None:
            logger.info("no header of the training file is known: columns by number, %s", listed(numbers))
        return replace(columns, checks_header=checks_header, kept=tuple(dict.fromkeys(kept)))

    def training_labels(self, pairs: Pairs) -> tuple[str, ...] | None:
        """The classes in id order, None for a regression.

        Labels that are found are sorted as numbers if all are integers, else by code point. DataError for
        fewer than two, and for more than twenty numbers of which some are not whole: scores.
        """
        if self.regression:
            return None
        rows = pairs.labels or []
        found = sorted(set(rows))
        if len(found) < 2:
            raise DataError(
                f"training data: found only the label {show(rows[0])} in all {len(rows):,} rows; "
                "at least two different labels are needed"
            )
        if self.labels is not None:
            if absent := sorted(set(self.labels) - set(found)):
                logger.warning("labels without a single training row: %s", ", ".join(absent))
            return self.labels
        try:
            not_whole = [label for label in found if not float(label).is_integer()]
        except ValueError:  # some are no numbers
            not_whole = []
        if len(found) > 20 and not_whole:
            raise DataError(
                f"the label column holds {len(found)} different numbers, some not whole (such as "
                f"{not_whole[0]}); set problem_type: regression to train on scores, or list the classes in "
                "labels"
            )
        return tuple(sorted(found, key=int) if all(map(_WHOLE.fullmatch, found)) else found)

    def positive_label(self, labels: Sequence[str] | None, setting: str | None) -> str | None:
        """The label that f1 is of: as set, else the task's, else that with id 1; None where not two are.

        ConfigError where `setting` is none of two labels.
        """
        two = labels if labels is not None and len(labels) == 2 else ()
        if setting is None:
            usual = self.task.positive_label
            return usual if usual in two else (two[1] if two else None)
        if setting not in two:
            allowed = f"allowed: {listed(two)}"
            if not two:
                allowed = f"f1 is measured with two labels, here are {len(labels or ())}"
            raise ConfigError(f"positive_label: found {show(setting)}; {allowed}")
        return setting

    def label_ranks(self, labels: Sequence[str] | None) -> tuple[int, ...] | None:
        """The place of each label id in `label_order`, from 0; None where that is not set. ConfigError where
        it does not hold the model's labels."""
        order = self.settings.label_order
        if order is None:
            return None
        if labels is None or set(order) != set(labels):
            allowed = "a regression has no labels" if labels is None else f"the labels are {listed(labels)}"
            raise ConfigError(f"label_order: found {listed(order)}; {allowed}")
        return tuple(order.index(label) for label in labels)


def resolve_source(
    settings: DataSettings, *, needs: Collection[str] = ("train",), evaluates: bool = True
) -> Source:
    """Settings and preset → what to read; ConfigError for labels that contradict the task.

    `needs`: which of `train`, `dev`, `test` must be there, else a DataError lists what was looked for. In
    training, a dev file that was named must be there too; without one that was not, a note says so, if the
    training `evaluates`.
    """
    task, notes = _fitting_task(settings, needs)
    labels, regression, metrics = _labels(settings, task)
    files = _find_files(settings, task, needs)
    if "train" in needs and evaluates and not files["dev"]:
        looked_for = ", ".join(map(str, _usual_places(settings, task, "dev"))) or "dev_file is not set"
        notes = (*notes, f"no dev file ({looked_for}): training without evaluation")
    return Source(
        settings,
        task,
        files["train"],
        files["dev"],
        files["test"],
        _columns(settings, task),
        _columns(settings, task, is_test=True),
        labels,
        regression,
        metrics,
        notes,
    )


def _fitting_task(settings: DataSettings, needs: Collection[str]) -> tuple[Task, tuple[str, ...]]:
    """The preset, or the four-column default where the data is such; the first file that tells decides."""
    preset = find_task(settings.task_name)
    numbers = [column for column in (preset.text_a, preset.text_b, preset.label) if isinstance(column, int)]
    train = [*_named(settings, "train"), *_usual_places(settings, preset, "train")]
    dev = [*_named(settings, "dev"), *_usual_places(settings, FOUR_COLUMN, "dev")]
    # Scoring a named file: that file itself tells best.
    for path in train + dev if "train" in needs else _named(settings, "dev") + train + dev:
        try:
            width = len(first_row(path, format_of(path, settings.file_format, settings.quoting)))
        except DataError:
            continue  # whoever reads the file says why
        if all(-width <= number < width for number in numbers):
            break
        if width == 4:
            kept = ("name", "regression", "metrics", "positive_label")
            return replace(FOUR_COLUMN, **{name: getattr(preset, name) for name in kept}), (
                f"task_name {preset.name}: {path} has four columns, so columns, labels and dev file are "
                "those of the four-column default; metrics stay the preset's",
            )
    return preset, ()


def _named(settings: DataSettings, kind: str) -> list[Path]:
    return [Path(name) for name in getattr(settings, f"{kind}_file") or ()]


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
        missing = [path for path in named if not has_stdin([path]) and not os.path.exists(path)]
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


def _columns(settings: DataSettings, task: Task, *, is_test: bool = False) -> Columns:
    usual = (task.test_text_a, task.test_text_b) if is_test else (task.text_a, task.text_b)
    given = (settings.text_a_column, settings.text_b_column, settings.label_column)
    text_a = usual[0] if given[0] == "auto" else given[0]
    text_b = usual[1] if given[1] == "auto" else given[1]
    label = task.label if given[2] == "auto" else given[2]
    names: dict[str, str] = {}
    if given == ("auto",) * 3 and text_b and not is_test:
        names = dict(zip(("text_a", "text_b", "label"), (*task.text_names, "label"), strict=True))
    columns = Columns(
        tuple(text_a) if isinstance(text_a, list) else text_a,
        tuple(text_b) if isinstance(text_b, list) else text_b,
        label,
        quoting=settings.quoting,
        checks_header=settings.has_header == "auto",
        usual=names,
        file_format=settings.file_format,
        separator=settings.text_separator,
    )
    has_header = settings.has_header
    if not isinstance(has_header, bool):  # a column that is named needs a header to be found in
        is_named = any(isinstance(column, str) for _, column in columns.by_role())
        has_header = is_named or (task.test_has_header if is_test else task.has_header)
    return replace(columns, has_header=has_header, label=None if is_test else label)


def _labels(settings: DataSettings, task: Task) -> tuple[tuple[str, ...] | None, bool, tuple[str, ...]]:
    """Labels in id order if they are known, whether it is a regression, and what is measured."""
    usual = "regression" if task.regression else "classification"
    regression = (settings.problem_type or usual) == "regression"
    metrics = task.metrics
    if regression != task.regression:
        metrics = SCORE_METRICS if regression else FOUR_COLUMN.metrics
    if settings.labels is None:
        return None if regression else task.labels, regression, metrics
    if regression:
        raise ConfigError("labels: a regression has none; leave them out or set problem_type: classification")
    labels = tuple(label.strip() for label in settings.labels)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"labels: found {listed(labels)}; they must be all different")
    return labels, regression, metrics
