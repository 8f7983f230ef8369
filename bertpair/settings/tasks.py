"""Presets: where the texts, the label and the files of a task are, and what is measured on it.

Ten GLUE tasks in their published layouts, and the four-column default for everybody's own pairs.
Columns count from 0, from the end if negative. GLUE test files have no labels and often other columns.
"""

from dataclasses import dataclass

from bertpair.errors import ConfigError, near_misses

CLASS_METRICS = ("acc", "f1", "macro_f1", "mcc", "qwk")
SCORE_METRICS = ("pearson", "spearmanr", "corr")


@dataclass(frozen=True)
class Task:
    """One layout. `labels` None: found in the training data. The first of `metrics` is the one to watch."""

    name: str
    text_a: int | str = 1
    text_b: int | str | None = 2
    label: int | str = -1
    test_text_a: int | str = 1
    test_text_b: int | str | None = 2
    labels: tuple[str, ...] | None = None
    regression: bool = False
    has_header: bool = True
    train_file: str = "train.tsv"
    dev_file: str = "dev.tsv"
    test_file: str = "test.tsv"
    test_has_header: bool = True
    metrics: tuple[str, ...] = ("acc",)
    positive_label: str | None = None  # that f1 is of, where it is measured
    text_names: tuple[str, ...] = ("sentence1", "sentence2")  # in the published headers


def _mnli(name: str, suffix: str) -> Task:
    labels = ("contradiction", "entailment", "neutral")
    return Task(name, 8, 9, -1, 8, 9, labels, dev_file=f"dev_{suffix}.tsv", test_file=f"test_{suffix}.tsv")


_YES_NO = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_STRINGS = ("#1 String", "#2 String")
_QUESTIONS = ("question1", "question2")
_F1 = ("acc", "f1")

FOUR_COLUMN = Task("four-column", label=3, metrics=("acc", "macro_f1"))  # index sentence1 sentence2 label
_COLA = Task(
    "cola", 3, None, 1, 1, None, _YES_NO, has_header=False, metrics=("mcc",), text_names=("sentence",)
)
GLUE_TASKS = (
    _COLA,
    _mnli("mnli", "matched"),
    _mnli("mnli-mm", "mismatched"),
    Task("mrpc", 3, 4, 0, 3, 4, _YES_NO, metrics=_F1, positive_label="1", text_names=_STRINGS),
    Task("sst-2", 0, None, 1, 1, None, _YES_NO, text_names=("sentence",)),
    Task("sts-b", 7, 8, -1, 7, 8, regression=True, metrics=SCORE_METRICS),
    Task("qqp", 3, 4, 5, labels=_YES_NO, metrics=_F1, positive_label="1", text_names=_QUESTIONS),
    Task("qnli", labels=_ENTAILMENT, text_names=("question", "sentence")),
    Task("rte", labels=_ENTAILMENT),
    Task("wnli", labels=_YES_NO),
)


def measured_metrics(num_labels: int | None, *, has_order: bool = False) -> list[str]:
    """What is measured with so many labels, None for a regression; the loss is always. `has_order`: whether
    label_order is set."""
    if num_labels is None:
        return [*SCORE_METRICS, "loss"]
    needs = {"f1": num_labels == 2, "qwk": has_order}
    return [name for name in (*CLASS_METRICS, "loss") if needs.get(name, True)]


def check_measured(setting: str, metric: str, num_labels: int | None, *, has_order: bool = False) -> None:
    """ConfigError naming the `setting` for a metric that is not measured (num_labels None: a regression)."""
    if metric not in (measured := measured_metrics(num_labels, has_order=has_order)):
        kind = "a regression" if num_labels is None else f"{num_labels} labels"
        kind += "" if has_order or metric != "qwk" else " without label_order"
        raise ConfigError(f"{setting}: {metric} is not measured with {kind}; allowed: {', '.join(measured)}")


def _key(name: str) -> str:
    """Case, hyphens and underscores do not matter: `SST-2`, `sst2` and `mnli_mm` are understood."""
    return name.strip().lower().replace("-", "").replace("_", "")


_BY_KEY = {_key(task.name): task for task in GLUE_TASKS}


def find_task(name: str | None) -> Task:
    """The preset of that name, the four-column default for None; ConfigError lists what there is."""
    if name is None:
        return FOUR_COLUMN
    if task := _BY_KEY.get(_key(name)):
        return task
    near = near_misses(_key(name), _BY_KEY)
    hint = f"did you mean {' or '.join(_BY_KEY[key].name for key in near)}? " if near else ""
    names = ", ".join(task.name for task in GLUE_TASKS)
    raise ConfigError(
        f"task_name: found {name!r}; {hint}allowed: {names}, or null for four columns of your own"
    )
