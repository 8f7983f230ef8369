"""What is read, and how: the settings of files, columns, labels and limits."""

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bertpair.errors import ConfigError
from bertpair.settings.fields import (
    Column,
    Columns,
    Group,
    Label,
    Labels,
    NamedColumn,
    Path,
    Paths,
    Separator,
    Switch,
    Whole,
    said,
    setting,
)
from bertpair.settings.tasks import find_task

_end, _model = partial(setting, resume="end"), partial(setting, owner="model")
_files = partial(setting, owner="files")


def _known_task(name: str) -> str:
    try:
        find_task(name)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("task_name: ")) from None
    return name


Task = Annotated[str, Field(strict=True), AfterValidator(_known_task), said("the name of a task")] | None


class DataSettings(Group):
    """What is read, and how."""

    data_dir: Path = _files(
        None,
        "Folder with the data files, for those that are not named by train_file, dev_file or test_file.",
        resume="end",
    )
    train_file: Paths = _files(
        None,
        "TSV, CSV or JSONL files with the rows to train on. Not given: train.tsv in data_dir.",
        resume="free",
        example="answers.tsv",
    )
    dev_file: Paths = _files(
        None,
        "TSV, CSV or JSONL files with the rows to measure the model on. Without them nothing is measured. "
        "Not given: dev.tsv in data_dir, or the task's name for it.",
        resume="end",
        example="answers_dev.tsv",
    )
    test_file: Paths = _files(
        None,
        "TSV, CSV or JSONL files with rows without labels, for predictions. Not given: test.tsv in data_dir, "
        "or the task's name for it.",
        resume="free",
    )
    file_format: Literal["auto", "tsv", "csv", "jsonl"] = _files(
        "auto",
        "How the rows are written. tsv: a tab between the columns. csv: a comma. jsonl: each line is a JSON "
        "object, whose keys are the names of the columns. auto: csv for files whose name ends with .csv or "
        ".csv.gz, jsonl for .jsonl and .ndjson, else tsv. Files may be packed with gzip.",
        resume="free",
        example="csv",
    )
    task_name: Task = _model(
        None,
        "A GLUE task, which sets columns, labels, files and metrics: cola, mnli, mnli-mm, mrpc, sst-2, "
        "sts-b, qqp, qnli, rte or wnli. Not given: four columns, which are a number, the first text, "
        "the second text and the label.",
    )
    text_a_column: Columns = _model(
        "auto",
        "Column of the first text, or several columns, whose texts are joined. "
        "auto: the task's, or 1 if there is no task_name.",
        example="reference",
    )
    text_b_column: Columns | None = _model(
        "auto",
        "Column of the second text, or several. auto: the task's, or 2 if there is no task_name. "
        "null: there is no second text.",
        example="answer",
    )
    text_separator: Separator = _model(
        " ",
        "What stands between the texts of several columns that are joined to one. Empty ones are left out.",
        example='" | "',
    )
    label_column: Column = _model(
        "auto",
        "Column of the label, or of the score for a regression. "
        "auto: the task's, or 3 if there is no task_name.",
        example="grade",
    )
    has_header: Literal["auto"] | Switch = _model(
        "auto",
        "Whether the first row of each file holds the names of the columns. "
        "auto: true, unless the files of the task have no such row.",
    )
    quoting: Literal["none", "csv"] = _model(
        "none",
        "Of TSV files. none: quotation marks are ordinary characters. "
        "csv: a field in double quotes may hold tabs and line breaks.",
    )
    labels: Labels = _model(
        None,
        "The labels, in the order of their ids. Not given: the task's, "
        "else those found in the training data, sorted.",
    )
    positive_label: Label = _model(
        None,
        "The label whose f1 is measured, if there are two labels. Not given: the task's, else that of id 1.",
        resume="end",
    )
    label_order: Labels = _model(
        None,
        "The labels from the lowest to the highest, if they have an order: quadratic weighted kappa (qwk) is "
        "then measured too. Not given: they have none.",
        resume="end",
        example="wrong partly right",
    )
    group_column: NamedColumn | None = _model(
        None,
        "Column whose text says which group a row belongs to, such as its question or its language. Each "
        "group is measured by itself; with folds, the rows of a group are kept in one part. Not given: none.",
        resume="end",
        example="question_id",
    )
    problem_type: Literal["classification", "regression"] | None = _model(
        None,
        "classification: the model chooses a label. regression: it gives a number. "
        "Not given: classification, unless the task is a regression.",
    )
    on_bad_row: Literal["error", "skip"] = setting(
        "error",
        "What to do about rows that cannot be used. error: stop and list them. "
        "skip: count and list them, leave them out and go on.",
        example="skip",
    )
    max_seq_length: Whole = _model(
        128,
        "Most tokens of one row, both texts and the special tokens together. Longer rows are cut.",
        ge=5,
        le=65_535,
    )
    truncation: Literal["longest_first", "only_second"] = _model(
        "longest_first",
        "How a pair that is too long is cut. longest_first: the longer text loses tokens. only_second: the "
        "second text does, unless the first leaves no room for any of it.",
    )
    max_train_samples: Whole | None = setting(
        None, "Train only on this many rows, the first ones. Not given: on all rows.", ge=1
    )
    max_eval_samples: Whole | None = _end(
        None, "Evaluate only this many rows, the first ones. Not given: all rows.", ge=1, example="100"
    )
