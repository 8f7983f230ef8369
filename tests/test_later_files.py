"""A file that comes after training is read as the training file was or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_bert
from live_server import make_predictor

from bertpair import Config, DataError, evaluate, train
from bertpair.command_line import parse_command_line
from bertpair.scoring import EvaluationResult, evaluate_models

pytestmark = pytest.mark.usefixtures("fresh_process")

HEADER = ("id", "question", "answer", "grade")
ROWS = [(i, f"the cat {i}", "sat" if i % 2 else "good mat", "right" if i % 3 else "wrong") for i in range(12)]


@pytest.fixture
def trained(tmp_path: Path, write_tsv: Callable[..., Path]) -> Callable[..., None]:
    """trained(dev=…, header=…, **settings): train one step into `out`."""

    def run(**settings: object) -> None:
        if not (tmp_path / "tiny").exists():
            write_tiny_bert(tmp_path / "tiny")
        values = {
            **{"model_name_or_path": "tiny", "from_scratch": True, "output_dir": "out", "max_steps": 1},
            **{"max_seq_length": 24, "amp": "off", "num_threads": 1, "overwrite_output_dir": True},
            **{"train_file": [str(write_tsv("train.tsv", ROWS, HEADER))]},
        }
        train(Config(**{**values, **settings}))  # type: ignore[arg-type]

    return run


def score(*argv: object) -> EvaluationResult:
    parsed = parse_command_line([str(word) for word in ("--model_dir", "out", *argv)], "evaluate")
    return evaluate_models(parsed.config, explicit=parsed.explicit)


def predicted_lines(result: EvaluationResult) -> list[int]:
    (folder,) = result.folders.values()
    rows = Path(folder, "predictions.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [int(row.split("\t")[0]) for row in rows]


SWAPPED = (HEADER[0], HEADER[2], HEADER[1], HEADER[3])


def test_swapped_columns_are_refused_in_training_and_later(
    trained: Callable[..., None], write_tsv: Callable[..., Path]
) -> None:
    dev = write_tsv("dev.tsv", [(i, b, a, label) for i, a, b, label in ROWS], SWAPPED)
    with pytest.raises(
        DataError, match=r"dev.tsv:1: text_a_column 1 is 'answer' here, and 'question' in the"
    ):
        trained(dev_file=[str(dev)])
    assert not Path("out").exists()
    trained()
    for flags in (["--data_file", dev], ["--data_file", dev, "--predict"]):
        with pytest.raises(DataError, match="here that is column 2") as caught:
            score(*flags)
        assert "--text_a_column 'question' --text_b_column 'answer'" in str(caught.value)
    by_name = ["--text_a_column", "question", "--text_b_column", "answer", "--label_column", "grade"]
    assert score("--data_file", dev, *by_name).metrics == evaluate("out", "train.tsv").metrics
    assert score("--data_file", dev, "--has_header", "true").num_rows == 12  # what is given now wins


def test_a_second_training_file_must_agree_with_the_first(
    trained: Callable[..., None], write_tsv: Callable[..., Path]
) -> None:
    first = write_tsv("train.tsv", ROWS, HEADER)
    second = write_tsv("more.tsv", ROWS, SWAPPED)
    with pytest.raises(DataError, match=r"more.tsv:1: text_a_column 1 is 'answer'"):
        trained(train_file=[str(first), str(second)])


def test_a_headerless_file_does_not_lose_its_first_row(
    trained: Callable[..., None], write_tsv: Callable[..., Path]
) -> None:
    trained()
    bare = write_tsv("bare.tsv", [row[:3] for row in ROWS])
    with pytest.raises(DataError, match=r"bare.tsv:1: expected a header with 'question', 'answer'") as caught:
        score("--data_file", bare, "--predict")
    assert "--has_header false" in str(caught.value)
    assert predicted_lines(score("--data_file", bare, "--predict", "--has_header", "false")) == [
        *range(1, 13)
    ]
    with pytest.raises(DataError, match="expected a header"):
        make_predictor(Path("out").absolute(), quantize_check=str(bare))


def test_another_name_for_the_label_or_more_columns_do_no_harm(
    trained: Callable[..., None], write_tsv: Callable[..., Path]
) -> None:
    trained(label_column=-1)
    more = write_tsv("more.tsv", [(*row[:3], "x", row[3]) for row in ROWS], (*HEADER[:3], "note", "grade"))
    assert score("--data_file", more).metrics == evaluate("out", "train.tsv").metrics
    renamed = write_tsv("renamed.tsv", ROWS, (*HEADER[:3], "verdict"))
    assert score("--data_file", renamed).num_rows == 12
    moved = write_tsv(
        "moved.tsv", [(row[3], *row[1:3], "right") for row in ROWS], ("grade", *HEADER[1:3], "x")
    )
    with pytest.raises(DataError, match="label_column -1 is 'x' here, and 'grade' in the training file"):
        score("--data_file", moved)


def test_files_called_test_are_files_like_others(
    trained: Callable[..., None], write_tsv: Callable[..., Path]
) -> None:
    rows = [(row[1], row[3]) for row in ROWS]
    header = ("sentence", "label")
    trained(
        task_name="sst-2", labels=["right", "wrong"], train_file=[str(write_tsv("sst.tsv", rows, header))]
    )
    in_training_layout = score("--data_file", write_tsv("test.tsv", rows, header), "--predict")
    published = write_tsv("hidden.tsv", [(i, row[0]) for i, row in enumerate(rows)], ("index", "sentence"))
    as_published = score("--data_file", published, "--predict")
    tables = []
    for result in (in_training_layout, as_published):
        (folder,) = result.folders.values()
        tables.append(Path(folder, "predictions.tsv").read_text(encoding="utf-8"))
    assert tables[0] == tables[1] and predicted_lines(as_published) == [*range(2, 14)]


def test_a_header_in_the_middle_is_a_bad_row(
    trained: Callable[..., None], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    twice = write_tsv("twice.tsv", [*ROWS, HEADER, *ROWS], HEADER)
    with pytest.raises(DataError, match="twice.tsv:14: the header row again"):
        trained(train_file=[str(twice)])
    trained(train_file=[str(twice)], on_bad_row="skip")
    assert "bad rows skipped: 1" in caplog.text
    with pytest.raises(DataError, match="twice.tsv:14"):
        score("--data_file", twice, "--predict")


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (
            {"has_header": False, "text_a_column": 1, "text_b_column": 2, "label_column": 0},
            [(row[3], row[1], row[2]) for row in ROWS],
        ),
        ({"task_name": "cola", "labels": ["right", "wrong"]}, [("x", row[3], "*", row[1]) for row in ROWS]),
    ],
)
def test_a_tab_too_many_without_a_header_is_a_bad_row(
    trained: Callable[..., None],
    write_tsv: Callable[..., Path],
    settings: dict[str, object],
    rows: list[tuple[object, ...]],
) -> None:
    sound = write_tsv("sound.tsv", rows)
    trained(train_file=[str(sound)], **settings)
    torn = [*rows[:4], (*rows[4], "a stray piece"), *rows[5:]]
    with pytest.raises(DataError, match=rf"torn.tsv:5: expected {len(rows[0])} tab-separated columns"):
        trained(train_file=[str(write_tsv("torn.tsv", torn))], **settings)
