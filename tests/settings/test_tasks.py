"""The presets against small files in each task's own layout, with texts and labels written out here."""

from pathlib import Path

import pytest

from bertpair.data.source import resolve_source
from bertpair.data.tsv import read_pairs
from bertpair.errors import ConfigError
from bertpair.settings.data import DataSettings
from bertpair.settings.tasks import FOUR_COLUMN, GLUE_TASKS, find_task

GLUE = Path(__file__).parents[1] / "glue"

# task: (folder, last row of train, last row of dev, last row of test) as (text_a, text_b, label)
LAST_ROWS = {
    "cola": (
        ("Who did Mara say would cook?", None, "1"),
        ("He likes the blue door.", None, "1"),
        ("Lamp a night all hummed.", None),
    ),
    "mnli": (
        ("The museum has two floors.", "The upper floor shows coins.", "neutral"),
        ("Your parcel arrived on Monday.", "Your parcel arrived on a holiday.", "neutral"),
        ("Please sign both copies.", "One copy needs no signature."),
    ),
    "mnli-mm": (
        ("The museum has two floors.", "The upper floor shows coins.", "neutral"),
        ("it rained, you know, all week", "the week was wet", "entailment"),
        ("she grows her own beans", "she has a garden"),
    ),
    "mrpc": (
        ("The bridge was painted green.", "The bridge was closed on Friday.", "0"),
        ("The mayor resigned on Tuesday.", "On Tuesday the mayor stepped down.", "1"),
        ("The choir sang twice.", "The choir did not sing."),
    ),
    "sst-2": (
        ("the jokes land ", None, "1"),
        ("a quiet triumph ", None, "1"),
        ("it never finds its feet", None),
    ),
    "sts-b": (
        ("Two men lift a piano.", "Two men carry something heavy.", "3.75"),
        ("Snow falls on a roof.", "Snow is falling on a roof.", "5"),
        ("A train waits.", "A train leaves."),
    ),
    "qqp": (
        ("Why is the sea salty?", "Why is the sea blue?", "0"),
        ("How tall is a giraffe?", "How fast is a giraffe?", "0"),
        ("What is yeast?", 'What does "yeast mean?'),
    ),
    "qnli": (
        ("Who keeps the lighthouse?", "The lighthouse stands on a rock.", "not_entailment"),
        ("How long is the canal?", "The canal runs for ninety kilometres.", "entailment"),
        ("Who rang it?", "The bell was cast in bronze."),
    ),
    "rte": (
        ("The orchard sold its pears.", "The orchard sold its land.", "not_entailment"),
        ("Nadia won the race in Oslo.", "Nadia lives in Oslo.", "not_entailment"),
        ("The clock is slow.", "The clock is new."),
    ),
    "wnli": (
        ("The vase fell on the table and it broke.", "The table broke.", "0"),
        ("Ivo thanked Paul because he had helped.", "Ivo had helped.", "0"),
        ("The cup slid off the tray since it was tilted.", "The cup was tilted."),
    ),
}
NUM_ROWS = {
    "cola": (3, 2, 2),
    "mnli": (3, 2, 2),
    "mnli-mm": (3, 2, 2),
    "sst-2": (3, 2, 2),
    "sts-b": (3, 2, 2),
}
DEV_FILES = {"mnli": "dev_matched.tsv", "mnli-mm": "dev_mismatched.tsv"}
TEST_FILES = {"mnli": "test_matched.tsv", "mnli-mm": "test_mismatched.tsv"}


@pytest.mark.parametrize("name", LAST_ROWS)
def test_each_glue_layout_reads_with_the_right_texts_and_labels(name: str) -> None:
    folder = GLUE / name.removesuffix("-mm")
    source = resolve_source(
        DataSettings(data_dir=str(folder), task_name=name), needs=("train", "dev", "test")
    )
    assert source.notes == ()
    assert source.dev_files == (folder / DEV_FILES.get(name, "dev.tsv"),)
    assert source.test_files == (folder / TEST_FILES.get(name, "test.tsv"),)
    splits = zip((source.train_files, source.dev_files, source.test_files), LAST_ROWS[name], strict=True)
    for number, (files, expected) in enumerate(splits):
        has_labels = number < 2
        columns = source.columns_for(files[0], with_labels=has_labels)
        pairs = read_pairs(
            files, columns, labels=source.labels if has_labels else None, regression=source.regression
        )
        assert len(pairs) == NUM_ROWS.get(name, (2, 2, 2))[number]
        assert pairs.text_a[-1] == expected[0]
        assert (pairs.text_b and pairs.text_b[-1]) == expected[1]
        assert (pairs.labels and pairs.labels[-1]) == (expected[2] if has_labels else None)


def test_the_presets_are_the_ten_tasks_with_their_labels_and_metrics() -> None:
    found = {task.name: (task.labels, task.regression, task.metrics[0]) for task in GLUE_TASKS}
    nli, yes_no = ("contradiction", "entailment", "neutral"), ("0", "1")
    pair = ("entailment", "not_entailment")
    assert found == {
        "cola": (yes_no, False, "mcc"),
        "mnli": (nli, False, "acc"),
        "mnli-mm": (nli, False, "acc"),
        "mrpc": (yes_no, False, "acc"),
        "sst-2": (yes_no, False, "acc"),
        "sts-b": (None, True, "pearson"),
        "qqp": (yes_no, False, "acc"),
        "qnli": (pair, False, "acc"),
        "rte": (pair, False, "acc"),
        "wnli": (yes_no, False, "acc"),
    }


def test_literal_quotes_stay_in_glue_texts() -> None:
    source = resolve_source(DataSettings(data_dir=str(GLUE / "mrpc"), task_name="mrpc"))
    assert read_pairs(source.train_files, source.columns).text_a[0] == 'The bakery, he said, "opens at six'


@pytest.mark.parametrize("written", ["MNLI-MM", "mnli-mm", "mnli_mm", " MnliMM "])
def test_task_names_ignore_case_and_hyphens(written: str) -> None:
    assert find_task(written).name == "mnli-mm"


def test_no_task_name_is_the_four_column_default() -> None:
    assert find_task(None) is FOUR_COLUMN
    assert (FOUR_COLUMN.text_a, FOUR_COLUMN.text_b, FOUR_COLUMN.label) == (1, 2, 3)
    assert FOUR_COLUMN.has_header and FOUR_COLUMN.labels is None and not FOUR_COLUMN.regression


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="found 'mnli-m'; did you mean mnli-mm\\? allowed: cola, mnli, "):
        find_task("mnli-m")
    with pytest.raises(ConfigError, match="found 'zzzzzz'; allowed: "):
        find_task("zzzzzz")
