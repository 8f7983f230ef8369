"""Folds: every training row is scored once, by a model that has not seen it or a row of its group."""

import csv
import dataclasses
import logging
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_bert
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from bertpair import Config, ConfigError, DataError, StoppedError, cross_validate, train
from bertpair.console import stop_flag
from bertpair.search import folds
from bertpair.search.folds import suspicious_labels
from bertpair.training.setup import Material, read_material

pytestmark = pytest.mark.usefixtures("fresh_process")

HEADER = ("question_id", "sentence1", "sentence2", "label")
WORDS = ["cat", "sat", "mat", "good", "bad", "food", "中文", "数据库", "мир"]
SEED = 5


def make_rows(count: int = 40) -> list[tuple[str, str, str, str]]:
    """Rows that are all different, of three labels that are not equally frequent, in groups of 1 to 6."""
    rng = np.random.default_rng(8)
    rows = []
    for i in range(count):
        a, b, c = rng.choice(WORDS, 3, replace=False)
        label = str(rng.choice(["right", "wrong", "partly"], p=[0.5, 0.3, 0.2]))
        rows.append((f"q{int(rng.integers(0, count // 3))}", f"{a} {b}", f"{c} {i}", label))
    return rows


ROWS = make_rows()


def write_rows(path: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    text = "".join("\t".join(row) + "\n" for row in [HEADER, *rows])
    path.write_text(text, encoding="utf-8")
    return path


def make_config(folder: Path, **changes: object) -> Config:
    """Three steps of a tiny model, on train.tsv in `folder`; its results go to `out` there."""
    model = folder / "tiny"
    if not model.exists():
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        write_tiny_bert(model, **size)
    settings = {
        **{"model_name_or_path": str(model), "from_scratch": True, "output_dir": str(folder / "out")},
        **{"train_file": [str(folder / "train.tsv")], "max_seq_length": 24, "amp": "off", "num_threads": 1},
        **{"seed": SEED, "max_steps": 3, "save_steps": 0, "per_device_train_batch_size": 8},
        "learning_rate": 5e-3,
    }
    return Config(**{**settings, **changes})  # type: ignore[arg-type]


def material_of_rows(folder: Path, **changes: object) -> Material:
    return read_material(make_config(folder, dev_file=None, **changes))


def read_groups(material: Material, column: str | int) -> list[str]:
    settings = material.source.settings.model_copy(update={"group_column": column})
    source = dataclasses.replace(material.source, settings=settings)
    groups = source.read(source.train_files, source.columns, source.labels, "max_train_samples").groups
    assert groups is not None
    return groups


def split_rows(material: Material, count: int, column: str | int | None) -> np.ndarray:
    """The part of each row, cut as a run with this `group_column` does it."""
    if column is not None:
        pairs = dataclasses.replace(material.train.pairs, groups=read_groups(material, column))
        source = dataclasses.replace(
            material.source, settings=material.source.settings.model_copy(update={"group_column": column})
        )
        train = dataclasses.replace(material.train, pairs=pairs)
        material = dataclasses.replace(material, source=source, train=train)
    return folds.split_rows(material, count, SEED)


def read_table(path: Path) -> list[dict[str, str]]:
    lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    head, *rows = (line.split("\t") for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


# How the rows are cut


@pytest.mark.parametrize(
    "splitter, grouped, scores",
    [
        (StratifiedKFold, False, False),
        (StratifiedGroupKFold, True, False),
        (KFold, False, True),
        (GroupKFold, True, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_parts_are_those_of_scikit_learn(
    tmp_path: Path, splitter: type, grouped: bool, scores: bool
) -> None:
    rows = [(*row[:3], f"{i % 7}.5") for i, row in enumerate(ROWS)] if scores else ROWS
    write_rows(tmp_path / "train.tsv", rows)
    material = material_of_rows(tmp_path, problem_type="regression" if scores else None)
    parts = split_rows(material, 4, "question_id" if grouped else None)
    theirs = splitter(4, shuffle=True, random_state=SEED)
    wanted = np.full(len(rows), -1)
    of_rows = [row[0] for row in rows] if grouped else None
    for number, (_, held_out) in enumerate(theirs.split(rows, [row[3] for row in rows], of_rows)):
        wanted[held_out] = number
    assert parts.tolist() == wanted.tolist()
    if of_rows:
        assert len(set(zip(of_rows, parts.tolist(), strict=True))) == len(set(of_rows))


@pytest.mark.parametrize("column", ["question_id", 0, -4, "sentence1"])
def test_a_group_column_is_named_or_numbered(tmp_path: Path, column: str | int) -> None:
    write_rows(tmp_path / "train.tsv", ROWS)
    place = 1 if column == "sentence1" else 0
    assert read_groups(material_of_rows(tmp_path), column) == [row[place] for row in ROWS]


def test_a_group_column_without_a_header_is_a_number(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.tsv", ROWS)
    lines = (tmp_path / "train.tsv").read_text("utf-8").split("\n", 1)[1]
    (tmp_path / "train.tsv").write_text(lines, encoding="utf-8")
    material = material_of_rows(tmp_path, has_header=False)
    assert read_groups(material, 0) == [row[0] for row in ROWS]
    with pytest.raises(DataError, match=r"train.tsv:1: group_column 'question_id' is not in the header"):
        read_groups(material, "question_id")


def test_groups_stay_with_their_rows(tmp_path: Path) -> None:
    """Where rows are skipped, where a limit leaves the last ones out, and over several files."""
    broken = [*ROWS[:4], ("q99", "", "empty", "right"), *ROWS[4:20]]
    files = [write_rows(tmp_path / "one.tsv", broken), write_rows(tmp_path / "two.tsv", ROWS[20:])]
    asked = {"train_file": [str(path) for path in files], "on_bad_row": "skip"}
    material = material_of_rows(tmp_path, **asked)
    assert read_groups(material, "question_id") == [row[0] for row in ROWS]
    material = material_of_rows(tmp_path, **asked, max_train_samples=27)
    assert read_groups(material, 0) == [row[0] for row in ROWS[:27]]
    other = [("label", *HEADER[1:3], HEADER[0]), *[(d, b, c, a) for a, b, c, d in ROWS[20:]]]
    files[1].write_text("".join("\t".join(row) + "\n" for row in other), encoding="utf-8")
    names = {"text_a_column": "sentence1", "text_b_column": "sentence2", "label_column": "label"}
    material = material_of_rows(tmp_path, **asked, **names)
    assert read_groups(material, "question_id") == [row[0] for row in ROWS]
    with pytest.raises(DataError, match=r"two.tsv:1: group_column 0 is 'label' here, and 'question_id'"):
        read_groups(material, 0)


def test_quoted_groups_are_read_as_texts_are(tmp_path: Path) -> None:
    quoted = [f'a "question"\nof {i % 5}\tlines' for i in range(len(ROWS))]
    with (tmp_path / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([HEADER, *((group, *row[1:]) for group, row in zip(quoted, ROWS, strict=True))])
    assert read_groups(material_of_rows(tmp_path, quoting="csv"), "question_id") == quoted


def test_a_row_without_a_group_is_a_bad_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = [("" if i in (3, 8) else group, *texts) for i, (group, *texts) in enumerate(ROWS)]
    write_rows(tmp_path / "train.tsv", empty)  # type: ignore[arg-type]
    with pytest.raises(DataError) as error:
        read_groups(material_of_rows(tmp_path), "question_id")
    first, second = str(error.value).splitlines()
    assert first.endswith("train.tsv:5: group_column 'question_id' is empty; a text is expected")
    assert second.partition(": ")[0].endswith("train.tsv:10")
    skipping = material_of_rows(tmp_path, on_bad_row="skip")
    assert read_groups(skipping, "question_id") == [row[0] for i, row in enumerate(ROWS) if i not in (3, 8)]
    assert "bad rows skipped: 2 " in caplog.text
    material = material_of_rows(tmp_path, max_train_samples=3)
    assert read_groups(material, "question_id") == [row[0] for row in ROWS[:3]]


def test_a_group_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.tsv", ROWS)
    material = material_of_rows(tmp_path)
    with pytest.raises(
        DataError, match=r"train.tsv:1: group_column 'questionid' .*did you mean 'question_id'"
    ):
        read_groups(material, "questionid")
    with pytest.raises(DataError, match=r"train.tsv:1: group_column 7 does not exist"):
        read_groups(material, 7)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.tsv", ROWS)
    material, number = material_of_rows(tmp_path), len({row[0] for row in ROWS})
    of_groups = f"found {number + 1}; at least 2, and at most the {number} different values of group_column"
    for count, column, said in (
        (41, None, "folds: found 41; at least 2, and at most the 40 rows"),
        (number + 1, "question_id", of_groups),
        (1, None, "folds: found 1; at least 2, and at most the 40 rows"),
    ):
        with pytest.raises(ConfigError, match=said):
            split_rows(material, count, column)
    most = max([row[3] for row in ROWS].count(label) for label in ("right", "wrong", "partly"))
    with pytest.raises(ConfigError, match=f"folds: found 40; no label has more than {most} rows"):
        split_rows(material, 40, None)


def test_labels_that_a_fold_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By rows, or by groups. That `class_weights: balanced` needs them all is said before any training."""
    rows = [(f"q{i % 4}", "cat", f"sat {i}", "rare" if i % 4 == 1 else "ab"[i // 4 % 2]) for i in range(24)]
    write_rows(tmp_path / "train.tsv", rows)
    material = material_of_rows(tmp_path)
    split_rows(material, 3, None)
    assert not [each for each in caplog.records if "too few" in each.message]
    split_rows(material, 3, "question_id")
    assert "too few rows, or groups, for each fold to have some: 'rare'" in caplog.text
    balanced = make_config(tmp_path, class_weights="balanced")
    with pytest.raises(ConfigError, match="class_weights balanced: a label without a training row"):
        cross_validate(balanced, 3, group_column="question_id")
    assert not (tmp_path / "out").exists()


# Whole runs


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds of grouped rows, with the weights of all; the model and the data are beside this folder."""
    folder = tmp_path_factory.mktemp("folds")
    write_rows(folder / "train.tsv", ROWS)
    cross_validate(make_config(folder), 3, group_column="question_id", keep_all_weights=True)
    return folder / "out"


@pytest.mark.slow
def test_every_row_is_there_once_in_the_files_order(done: Path) -> None:
    table = read_table(done / "fold_predictions.tsv")
    assert [int(row["line"]) for row in table] == list(range(2, len(ROWS) + 2))
    assert [row["gold"] for row in table] == [row[3] for row in ROWS]
    parts = split_rows(material_of_rows(done.parent), 3, "question_id")
    assert [int(row["fold"]) for row in table] == (parts + 1).tolist()
    fold_of = {}
    for row, (group, *_) in zip(table, ROWS, strict=True):
        assert fold_of.setdefault(group, row["fold"]) == row["fold"]
    assert set(fold_of.values()) == {"1", "2", "3"}
    found = {path.name for path in done.iterdir() if path.name[0] != "."}
    folds = {"fold-1", "fold-2", "fold-3"}
    files = {"runs.json", "folds_results.tsv", "fold_predictions.tsv", "suspicious_labels.tsv"}
    assert found == folds | files


@pytest.mark.slow
def test_a_fold_is_a_training_without_its_rows(done: Path, tmp_path: Path) -> None:
    """`train` on a file with the other rows has the same weights, and says the same of the fold's rows."""
    table = read_table(done / "fold_predictions.tsv")
    for fold in ("1", "3"):
        pieces: dict[bool, list[tuple[str, str, str, str]]] = {True: [], False: []}
        for row, said in zip(ROWS, table, strict=True):
            pieces[said["fold"] == fold].append(row)
        write_rows(tmp_path / fold / "train.tsv", pieces[False])
        dev = write_rows(tmp_path / fold / "dev.tsv", pieces[True])
        train(make_config(tmp_path / fold, dev_file=[str(dev)], eval_strategy="no"))
        alone, name = tmp_path / fold / "out", f"fold-{fold}"
        weights = [(path / "model.safetensors").read_bytes() for path in (alone, done / name)]
        assert weights[0] == weights[1]
        ours = [{k: v for k, v in row.items() if k not in ("fold", "line")} for row in table]
        theirs = [
            {k: v for k, v in row.items() if k != "line"} for row in read_table(alone / "predictions.tsv")
        ]
        assert [row for row, said in zip(ours, table, strict=True) if said["fold"] == fold] == theirs


@pytest.mark.slow
def test_suspicious_labels_are_the_least_likely_ones_first(done: Path) -> None:
    scored = {int(row["line"]): row for row in read_table(done / "fold_predictions.tsv")}
    table = read_table(done / "suspicious_labels.tsv")
    assert sorted(int(row["line"]) for row in table) == sorted(scored)
    keys = []
    for row in table:
        line = int(row["line"])
        said, (_, text_a, text_b, label) = scored[line], ROWS[line - 2]
        assert row["file"] == str(done.parent / "train.tsv")
        assert (row["text_a"], row["text_b"], row["label"]) == (text_a, text_b, label)
        assert (row["probability"], row["predicted"]) == (said[f"prob_{label}"], said["predicted"])
        assert row["predicted_probability"] == said["score"]
        keys.append((float(row["probability"]), -float(said["score"]), line))
    assert keys == sorted(keys)


@pytest.mark.slow
def test_a_stop_between_folds_changes_nothing(done: Path) -> None:
    config = make_config(done.parent, output_dir=str(done.parent / "stopped"))
    asked = {"group_column": "question_id", "keep_all_weights": True}

    class StopAtFirst(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("fold-1: "):
                stop_flag.request(signal.SIGTERM)

    log, handler = logging.getLogger("bertpair.search"), StopAtFirst()
    level = log.level
    log.setLevel("INFO")
    log.addHandler(handler)
    try:
        with pytest.raises(StoppedError, match="1 of 3 runs are done; the same command goes on"):
            cross_validate(config, 3, **asked)  # type: ignore[arg-type]
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    stop_flag.clear()
    stopped = done.parent / "stopped"
    assert not (stopped / "fold_predictions.tsv").exists()
    first = (stopped / "fold-1" / "model.safetensors").stat().st_mtime_ns
    cross_validate(config, 3, **asked)  # type: ignore[arg-type]
    assert (stopped / "fold-1" / "model.safetensors").stat().st_mtime_ns == first
    for name in ("fold_predictions.tsv", "suspicious_labels.tsv"):
        assert (stopped / name).read_bytes() == (done / name).read_bytes()
    for fold in ("fold-1", "fold-2", "fold-3"):
        for name in ("model.safetensors", "predictions.tsv", "eval_results.json"):
            assert (stopped / fold / name).read_bytes() == (done / fold / name).read_bytes(), (fold, name)
    shutil.rmtree(stopped / "fold-1")  # a run without its files is done again
    (stopped / "fold_predictions.tsv").unlink()
    cross_validate(config, 3, **asked)  # type: ignore[arg-type]
    for name in ("fold_predictions.tsv", "fold-1/predictions.tsv"):
        assert (stopped / name).read_bytes() == (done / name).read_bytes()
    (stopped / "fold-3" / "predictions.tsv").unlink()
    with pytest.raises(ConfigError, match=r"fold-3 is not empty \("):
        cross_validate(config, 3, **asked)  # type: ignore[arg-type]


@pytest.mark.slow
def test_folds_of_something_else_are_refused(done: Path) -> None:
    config, column = make_config(done.parent), {"group_column": "question_id"}
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    with pytest.raises(ConfigError, match="has runs with other settings.*\n.*folds: they have 3, found 4"):
        cross_validate(config, 4, **column)
    with pytest.raises(ConfigError, match="group_column: they have 'question_id', found None"):
        cross_validate(config, 3)
    with pytest.raises(ConfigError, match="learning_rate: they have 0.005, found 0.001"):
        cross_validate(config.model_copy(update={"learning_rate": 1e-3}), 3, **column)
    data = done.parent / "train.tsv"
    data.write_bytes(data.read_bytes() + b"q1\tcat\tnew\tright\n")
    try:
        with pytest.raises(ConfigError, match="training_data: they have '[0-9a-f]+', found "):
            cross_validate(config, 3, **column)
    finally:
        write_rows(data, ROWS)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")} == before
    again = cross_validate(config, 3, keep_all_weights=True, **column)
    assert list(again.runs) == ["fold-1", "fold-2", "fold-3"]


@pytest.mark.slow
def test_nothing_is_chosen_by_a_dev_file_or_by_the_fold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dev file that is not there does not matter; a label of one row, and texts with tabs, are no fault."""
    rows = [*ROWS[:11], ("q", "a\ttab", "a\nline\r", "odd\u2028one")]
    with (tmp_path / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([HEADER, *rows])
    more = write_rows(tmp_path / "more.tsv", ROWS[11:20])
    plain = {
        "train_file": [str(tmp_path / "train.tsv"), str(more)],
        "quoting": "csv",
        "max_steps": 2,
        "labels": ["odd\u2028one", "partly", "right", "wrong"],
    }
    choosing = {
        **{"dev_file": [str(tmp_path / "not there.tsv")], "load_best_model_at_end": True},
        **{"evaluate_during_training": True, "eval_strategy": "steps", "eval_steps": 1},
        "early_stopping_patience": 1,
    }
    caplog.set_level("INFO")
    summary = cross_validate(make_config(tmp_path, **plain, **choosing), 2)
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        assert f"{name} has no effect: a fold's model has its last weights" in caplog.text
    assert "too few rows, or groups, for each fold to have some: 'odd\\u2028one'" in caplog.text
    assert summary.metric == "acc"
    assert sorted(figures.metrics["n"] for figures in summary.runs.values()) == [10, 11]
    out, again = tmp_path / "out", tmp_path / "again"
    cross_validate(make_config(tmp_path, **plain, output_dir=str(again)), 2)
    for name in ("fold_predictions.tsv", "suspicious_labels.tsv"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    table = read_table(out / "fold_predictions.tsv")
    places = [(str(tmp_path / "train.tsv"), line) for line in range(2, 14)]
    assert [(row["file"], int(row["line"])) for row in table[:12]] == places
    assert [(row["file"], int(row["line"])) for row in table[12:]] == [(str(more), i) for i in range(2, 11)]
    odd = next(row for row in read_table(out / "suspicious_labels.tsv") if row["label"].startswith("odd"))
    assert (odd["text_a"], odd["text_b"], odd["line"]) == ("a\\ttab", "a\\nline\\r", "13")


@pytest.mark.slow
def test_folds_of_scores_have_no_suspicious_labels(tmp_path: Path) -> None:
    rows = [(*row[:3], f"{i % 5}.5") for i, row in enumerate(ROWS[:16])]
    write_rows(tmp_path / "train.tsv", rows)
    summary = cross_validate(make_config(tmp_path, problem_type="regression", max_steps=2), 2)
    out = tmp_path / "out"
    table = read_table(out / "fold_predictions.tsv")
    assert list(table[0]) == ["fold", "line", "gold", "predicted", "score", "truncated"]
    assert [float(row["gold"]) for row in table] == [float(row[3]) for row in rows]
    assert not (out / "suspicious_labels.tsv").exists()
    assert summary.metric == "pearson"


def test_suspicious_labels_of_equal_probability_stay_in_order(tmp_path: Path) -> None:
    """To six digits. What the model says is as in the predictions, though another label shows as much."""
    write_rows(tmp_path / "train.tsv", ROWS[:4])
    pairs = material_of_rows(tmp_path, text_b_column=None).train.pairs
    head = ["fold", "line", "gold", "predicted", "score", "truncated", "prob_a", "prob_b"]
    rows = [["1", str(2 + i), "a", "b", "0.500000", "0", "0.500000", "0.500000"] for i in range(3)]
    last = ["2", "5", "b", "a", "0.999998", "0", "0.999998", "2e-06"]
    names, *lines = suspicious_labels(pairs, head, [*rows, last])
    assert names[-2:] == ["predicted_probability", "text_a"]
    assert [line[1] for line in lines] == ["5", "2", "3", "4"]
    assert lines[0][2:] == ["b", "2e-06", "a", "0.999998", ROWS[3][1]]
    assert lines[1][2:6] == ["a", "0.500000", "b", "0.500000"]
