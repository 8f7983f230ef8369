"""Settings and presets → files, columns, labels, targets."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bertpair.data.columns import Columns
from bertpair.data.dataset import Pairs, make_split, overlap_warnings
from bertpair.data.source import resolve_source
from bertpair.data.tokenizer import Tokenizer
from bertpair.data.tsv import read_pairs
from bertpair.errors import ConfigError, DataError
from bertpair.settings.data import DataSettings

GLUE = Path(__file__).parents[1] / "glue"
HEADER = ("index", "sentence1", "sentence2", "label")
ROWS = [(0, "a", "b", "positive"), (1, "c", "d", "negative"), (2, "e", "f", "neutral")]
WriteTsv = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_tsv: WriteTsv) -> Path:
    """A plain four-column data_dir."""
    for name in ("train.tsv", "dev.tsv"):
        write_tsv(f"data/{name}", ROWS, HEADER)
    return tmp_path / "data"


@pytest.fixture
def pairs_of(write_tsv: WriteTsv) -> Callable[..., Pairs]:
    def read(rows: list[tuple[object, ...]], name: str = "rows.tsv", **options: object) -> Pairs:
        return read_pairs([write_tsv(name, rows)], Columns(0, 1, 2, has_header=False), **options)

    return read


def test_the_default_is_four_columns_of_data_dir(folder: Path) -> None:
    source = resolve_source(DataSettings(data_dir=str(folder)))
    assert source.train_files == (folder / "train.tsv",) and source.dev_files == (folder / "dev.tsv",)
    assert (source.test_files, source.notes, source.labels, source.regression) == ((), (), None, False)
    assert source.columns == Columns(1, 2, 3) and source.test_columns == Columns(1, 2, None)
    assert source.metrics[0] == "acc"


def test_mnli_mm_on_four_columns_means_pairs_and_reads_dev(folder: Path) -> None:
    source = resolve_source(DataSettings(data_dir=str(folder), task_name="MNLI-MM"))
    assert source.columns == Columns(1, 2, 3) and source.labels is None
    assert source.dev_files == (folder / "dev.tsv",) and source.metrics == ("acc",)
    (note,) = source.notes
    assert note.startswith(f"task_name mnli-mm: {folder / 'train.tsv'} has four columns")
    assert source.training_labels(read_pairs(source.train_files, source.columns)) == (
        "negative",
        "neutral",
        "positive",
    )


def test_in_the_fallback_the_presets_own_dev_file_serves_where_there_is_no_dev(folder: Path) -> None:
    (folder / "dev.tsv").rename(folder / "dev_mismatched.tsv")
    source = resolve_source(DataSettings(data_dir=str(folder), task_name="MNLI-MM"))
    assert source.dev_files == (folder / "dev_mismatched.tsv",) and source.columns == Columns(1, 2, 3)


@pytest.mark.parametrize("needs", ["train", "dev"])
def test_without_a_train_file_the_dev_file_decides_the_fallback(folder: Path, needs: str) -> None:
    (folder / "train.tsv").unlink()
    settings = DataSettings(data_dir=str(folder), task_name="mnli")
    if needs == "train":
        with pytest.raises(DataError, match="no train data: looked for .*train.tsv"):
            resolve_source(settings)
        return
    source = resolve_source(settings, needs=("dev",))
    assert (source.train_files, source.dev_files) == ((), (folder / "dev.tsv",))
    assert source.columns == Columns(1, 2, 3) and "dev.tsv has four columns" in source.notes[0]


def test_a_named_file_to_score_decides_for_itself(folder: Path) -> None:
    named = [str(GLUE / "mnli" / "dev_matched.tsv")]
    settings = DataSettings(data_dir=str(folder), task_name="mnli", dev_file=named)
    assert resolve_source(settings, needs=("dev",)).columns == Columns(8, 9, -1)
    assert resolve_source(settings).columns == Columns(1, 2, 3)


def test_only_four_columns_trigger_the_fallback(tmp_path: Path, write_tsv: WriteTsv) -> None:
    write_tsv("data/train.tsv", [(0, "a", "b")], HEADER[:3])
    source = resolve_source(DataSettings(data_dir=str(tmp_path / "data"), task_name="mnli"))
    assert source.columns == Columns(8, 9, -1)


def test_a_regression_preset_stays_one_in_the_fallback(tmp_path: Path, write_tsv: WriteTsv) -> None:
    write_tsv("data/train.tsv", [(0, "a", "b", "2.5")], HEADER)
    source = resolve_source(DataSettings(data_dir=str(tmp_path / "data"), task_name="STS-B"))
    assert source.regression and source.columns == Columns(1, 2, 3) and source.metrics[0] == "pearson"


def test_explicit_settings_beat_the_preset(folder: Path) -> None:
    mnli = str(GLUE / "mnli")
    source = resolve_source(
        DataSettings(
            data_dir=mnli,
            task_name="mnli",
            dev_file=[str(folder / "dev.tsv")],
            text_a_column="sentence2",
            text_b_column=None,
            label_column=10,
            labels=["neutral", " entailment", "contradiction"],
            quoting="csv",
        )
    )
    assert source.columns == Columns("sentence2", None, 10, quoting="csv")
    assert source.test_columns == Columns("sentence2", None, None, quoting="csv")
    assert source.labels == ("neutral", "entailment", "contradiction")
    assert source.dev_files == (folder / "dev.tsv",)
    kept = resolve_source(DataSettings(data_dir=str(folder), task_name="MNLI-MM", label_column="label"))
    assert kept.columns == Columns(1, 2, "label")


def test_a_named_column_implies_a_header_and_false_forbids_it() -> None:
    cola = DataSettings(data_dir=str(GLUE / "cola"), task_name="cola")
    assert not resolve_source(cola).columns.has_header and resolve_source(cola).test_columns.has_header
    assert resolve_source(cola.model_copy(update=dict(label_column="grade"))).columns.has_header
    assert resolve_source(cola.model_copy(update=dict(has_header=True))).columns == Columns(
        3, None, 1, checks_header=False
    )


def test_problem_type_beats_the_preset(folder: Path) -> None:
    source = resolve_source(DataSettings(data_dir=str(folder), problem_type="regression"))
    assert source.regression and source.labels is None and source.metrics[0] == "pearson"
    rte = resolve_source(DataSettings(data_dir=str(GLUE / "rte"), task_name="rte", problem_type="regression"))
    assert rte.regression and rte.labels is None
    sts = resolve_source(
        DataSettings(data_dir=str(GLUE / "sts-b"), task_name="sts-b", problem_type="classification")
    )
    assert not sts.regression and sts.metrics[0] == "acc"


@pytest.mark.parametrize(
    "settings, message",
    [
        (DataSettings(labels=["a", "a "]), "all different"),
        (DataSettings(labels=["1", "2"], problem_type="regression"), "labels: a regression has none"),
        (DataSettings(labels=["1", "2"], task_name="sts-b"), "labels: a regression has none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    folder: Path, settings: DataSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_source(settings.model_copy(update=dict(data_dir=str(folder))))


def test_missing_files_are_listed_with_the_places_looked_at(folder: Path) -> None:
    with pytest.raises(DataError, match="no train data: neither train_file nor data_dir is set"):
        resolve_source(DataSettings())
    with pytest.raises(DataError, match="looked for nowhere/train.tsv; data_dir nowhere is not a folder"):
        resolve_source(DataSettings(data_dir="nowhere"))
    settings = DataSettings(data_dir=str(folder), train_file=["train.tsv", "b.tsv"], dev_file=["c.tsv"])
    with pytest.raises(DataError) as caught:
        resolve_source(settings)
    assert str(caught.value).splitlines() == [
        f"no train data: looked for train.tsv, b.tsv; did you mean {folder / 'train.tsv'}?",
        "no dev data: looked for c.tsv",
    ]


def test_training_without_a_dev_file_is_possible_and_said(folder: Path) -> None:
    (folder / "dev.tsv").unlink()
    source = resolve_source(DataSettings(data_dir=str(folder)))
    assert source.dev_files == ()
    assert source.notes == (f"no dev file ({folder / 'dev.tsv'}): training without evaluation",)
    source = resolve_source(DataSettings(train_file=[str(folder / "train.tsv")]))
    assert source.notes == ("no dev file (dev_file is not set): training without evaluation",)
    with pytest.raises(DataError, match="no dev data"):
        resolve_source(DataSettings(data_dir=str(folder)), needs=("dev",))


def test_scoring_does_not_need_the_training_data(folder: Path) -> None:
    dev = str(folder / "dev.tsv")
    settings = DataSettings(data_dir="gone", train_file=["gone.tsv"], dev_file=[dev])
    source = resolve_source(settings, needs=("dev",))
    assert (source.train_files, source.dev_files, source.notes) == ((), (Path(dev),), ())


@pytest.mark.parametrize("task", ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst-2", "sts-b", "wnli"])
def test_a_presets_test_file_is_told_by_its_header_not_by_its_name(tmp_path: Path, task: str) -> None:
    folder = GLUE / task
    source = resolve_source(DataSettings(data_dir=str(folder), task_name=task), needs=("train", "test"))
    header = read_pairs(source.train_files, source.columns).header
    training, hidden = tmp_path / "test.tsv", tmp_path / "anything.tsv"
    training.write_bytes(source.train_files[0].read_bytes())
    hidden.write_bytes(source.test_files[0].read_bytes())
    as_training = source.columns_for(training, with_labels=False, header=header)
    as_hidden = source.columns_for(hidden, with_labels=False, header=header)
    expected = read_pairs([training], source.columns)
    found = read_pairs([training], as_training)
    assert (found.text_a, found.text_b) == (expected.text_a, expected.text_b)
    expected, found = read_pairs([hidden], source.test_columns), read_pairs([hidden], as_hidden)
    assert (found.text_a, found.text_b) == (expected.text_a, expected.text_b)


def test_targets_are_ids_in_label_order_or_numbers(pairs_of: Callable[..., Pairs], vocab_file: Path) -> None:
    tokenizer = Tokenizer.from_folder(vocab_file.parent)
    rows = pairs_of([("a", "b", "y"), ("c", "d", "x"), ("e", "f", "y")])
    ids = make_split(rows, ("y", "z", "x"), tokenizer, 8, name="rows").targets
    assert ids is not None and ids.dtype == np.int64 and ids.tolist() == [0, 2, 0]
    rows = pairs_of([("a", "b", "2.5"), ("c", "d", "-1")])
    scores = make_split(rows, None, tokenizer, 8, name="rows").targets
    assert scores is not None and scores.dtype == np.float32 and scores.tolist() == [2.5, -1.0]


def test_training_labels_keep_a_given_order_and_refuse_one_class(
    folder: Path, pairs_of: Callable[..., Pairs], caplog: pytest.LogCaptureFixture
) -> None:
    source = resolve_source(DataSettings(data_dir=str(folder)))
    two, one = pairs_of([("a", "b", "y"), ("c", "d", "x")]), pairs_of([("a", "b", "y")] * 3, "one.tsv")
    assert source.training_labels(two) == ("x", "y")
    with caplog.at_level(logging.WARNING):
        assert replace(source, labels=("y", "z", "x")).training_labels(two) == ("y", "z", "x")
    assert "labels without a single training row: z" in caplog.text
    for labels in (None, ("x", "y")):
        with pytest.raises(DataError, match="only the label 'y' in all 3 rows"):
            replace(source, labels=labels).training_labels(one)
    assert replace(source, regression=True).training_labels(one) is None


@pytest.fixture
def find_labels(
    folder: Path, pairs_of: Callable[..., Pairs]
) -> Callable[[list[str]], tuple[str, ...] | None]:
    """The labels in id order of a training file that has these."""
    source = resolve_source(DataSettings(data_dir=str(folder)))
    return lambda labels: source.training_labels(pairs_of([("a", "b", label) for label in labels]))


def test_found_labels_are_sorted_as_numbers_only_if_all_are_integers(
    find_labels: Callable[[list[str]], tuple[str, ...]],
) -> None:
    assert find_labels(["10", "9", "-1", "10"]) == ("-1", "9", "10")
    assert find_labels(["10", "9", "x"]) == ("10", "9", "x")
    assert find_labels(["b", "B", "é", "a"]) == ("B", "a", "b", "é")
    assert find_labels([str(number) for number in range(30)]) == tuple(map(str, range(30)))
    assert find_labels(["1" * 5000, "2"]) == ("1" * 5000, "2")


def test_scores_are_not_taken_for_classes(find_labels: Callable[[list[str]], tuple[str, ...]]) -> None:
    scores = [str(number / 4) for number in range(21)]
    with pytest.raises(DataError, match="21 different numbers, some not whole .*problem_type: regression"):
        find_labels(scores)
    assert len(find_labels(scores[:20])) == 20 and len(find_labels([*scores, "unsure"])) == 22


def test_dev_rows_in_train_and_pairs_with_two_labels_are_counted(pairs_of: Callable[..., Pairs]) -> None:
    train = pairs_of(
        [
            ("a", "b", "x"),
            ("c", "d", "x"),
            ("a", "b", "y"),
            ("e", "f", "x"),
            ("a", "b", "z"),
            ("e", "f", "y"),
        ],
        "train.tsv",
    )
    dev = pairs_of([("b", "a", "x"), ("c", "d", "y"), ("e", "f", "y"), ("n", "m", "x")], "dev.tsv")
    conflict, overlap = overlap_warnings(train, dev)
    assert conflict.startswith("texts with more than one label in the training data: 2, as at ")
    assert conflict.endswith("train.tsv:3")
    assert overlap.startswith("dev rows that also stand in the training data: 2 of 4, as at ")
    assert "dev.tsv:2; the dev figures" in overlap
    assert overlap_warnings(train, None) == [conflict]
    assert overlap_warnings(dev, pairs_of([("q", "r", "x")], "clean.tsv")) == []


def test_equal_scores_written_differently_are_one_label(pairs_of: Callable[..., Pairs]) -> None:
    rows = [("a", "b", "5.0"), ("a", "b", "5.000")]
    assert len(overlap_warnings(pairs_of(rows), None)) == 1
    assert overlap_warnings(pairs_of(rows), None, regression=True) == []
    assert len(overlap_warnings(pairs_of([*rows, ("a", "b", "4")]), None, regression=True)) == 1
