"""A file that comes after training is read as the training file was or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_bert
from live_server import make_predictor

from bertpair import Config, DataError, evaluate, train
from bertpair.evaluation.evaluate import EvaluationResult, evaluate_models
from bertpair.settings.command_line import parse_command_line

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
        assert "--text_a_column question --text_b_column answer" in str(caught.value)
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
    with pytest.raises(DataError, match="expected a header") as caught:
        make_predictor(Path("out").absolute(), quantize_check=str(bare))
    commas = bare.with_name("commas.tsv")
    commas.write_text("id,question,answer,grade\n1,a,b,c\n")
    with pytest.raises(DataError, match="a comma between them; it must be laid out") as other:
        make_predictor(Path("out").absolute(), quantize_check=str(commas))
    assert "--" not in f"{caught.value}{other.value}"  # serve.py has no flag for the layout


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


BARE = {"has_header": False}
OTHERS = [
    (i, f"a good cat {i}", "no food" if i % 2 else "a mat", "right" if i % 3 else "wrong") for i in range(9)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "width"),
    [
        (("index", "sentence1", "sentence2", "label"), 4),
        (("id", "question", "answer", "grade"), 4),
        (("Nr", "Frage", "Antwort", "Note"), 4),
        (("", "Vraag", "Antwoord", "Cijfer"), 4),
        (("x", "text_a", "text_b"), 3),
        (("x", "#1 String", "#2 String"), 3),
        (("number", "premise", "hypothesis"), 3),
        (("序号", "参考答案", "学生答案"), 3),
        (("Nr", "Frage", "Antwort"), 3),
    ],
)
def test_a_header_is_no_row_of_a_model_trained_without_one(
    trained: Callable[..., None], write_tsv: Callable[..., Path], header: tuple[str, ...], width: int
) -> None:
    trained(train_file=[str(write_tsv("sound.tsv", ROWS))], **BARE)
    file = write_tsv("more.tsv", [row[:width] for row in OTHERS], header)
    told = r"more.tsv:1: looks like a header: it has .*; set --has_header true, or --has_header false if it"
    with pytest.raises(DataError, match=told):
        score("--data_file", file, "--predict")
    with pytest.raises(DataError, match=told):
        score("--data_file", file, "--predict", "--on_bad_row", "skip")
    if width == 4:
        for evaluated in (lambda: score("--data_file", file), lambda: evaluate("out", file)):
            with pytest.raises(
                DataError, match=r"more.tsv:1: unknown label .*; if this row is a header, set"
            ):
                evaluated()
        assert score("--data_file", file, "--has_header", "true").num_rows == 9
    settled = score("--data_file", file, "--predict", "--has_header", "true")
    assert predicted_lines(settled) == [*range(2, 11)]
    kept = score("--data_file", file, "--predict", "--has_header", "false")
    assert predicted_lines(kept) == [*range(1, 11)]
    with pytest.raises(DataError, match="quantize_check: .*more.tsv:1: looks like a header"):
        make_predictor(Path("out").absolute(), quantize_check=str(file))


def test_a_row_that_is_kept_although_it_looks_like_a_header_is_pointed_out(
    trained: Callable[..., None], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    trained(train_file=[str(write_tsv("sound.tsv", ROWS, HEADER))], **BARE)
    assert "sound.tsv:1: read as a row, but it has 'question', 'answer' as names of columns" in caplog.text
    names = ("Nr", "Frage", "Antwort", "Note")
    caplog.clear()
    trained(
        train_file=[str(write_tsv("sound.tsv", [row[1:] for row in ROWS], names[1:]))],
        **{**BARE, "text_a_column": 0, "text_b_column": 1, "label_column": 2},
    )
    assert (
        "sound.tsv:1: no other row has its label, 'Note'; if it is a header, set has_header: t" in caplog.text
    )
    caplog.clear()
    trained(train_file=[str(write_tsv("sound.tsv", ROWS))], **BARE)
    assert not caplog.text
    score("--data_file", write_tsv("more.tsv", OTHERS, names), "--predict", "--text_a_column", 1)
    assert "more.tsv:1: read as a row, but it has 'Nr' in column 0, where all other rows" in caplog.text


def test_a_header_nobody_can_know_is_shown(
    trained: Callable[..., None], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    trained(train_file=[str(write_tsv("sound.tsv", ROWS))], **BARE)
    file = write_tsv("more.tsv", [("x", *row[1:3]) for row in OTHERS], ("x", "Frage", "Antwort"))
    with caplog.at_level("INFO", "bertpair"):
        assert score("--data_file", file, "--predict").num_rows == 10
    assert "more.tsv:1: read as a row, not as a header: 'Frage', 'Antwort'" in caplog.text


def test_dev_and_second_training_files_of_a_headerless_one_have_none_either(
    trained: Callable[..., None], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = write_tsv("sound.tsv", ROWS), write_tsv("more.tsv", OTHERS, HEADER)
    with pytest.raises(
        DataError, match="more.tsv:1: unknown label 'grade'; .*; if this row is a header, set"
    ):
        trained(train_file=[str(first)], dev_file=[str(second)], **BARE)
    trained(train_file=[str(first), str(second)], **BARE)
    assert "more.tsv:1: read as a row, but it has 'question', 'answer' as names of columns" in caplog.text
    rows = [("s", "01"[i % 2], "", f"the cat sat {i}") for i in range(8)]
    cola = {
        "task_name": "cola",
        "train_file": [str(write_tsv("cola.tsv", rows, ("s", "label", "*", "sentence")))],
    }
    with pytest.raises(DataError, match="cola.tsv:1: unknown label 'label'; .*; if this row is a header"):
        trained(**cola)
    trained(**cola, has_header=True)


def test_a_second_header_below_another_line_is_refused(
    trained: Callable[..., None], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    title = ("A study", "", "", "")
    with pytest.raises(DataError, match=r"sound.tsv:2: looks like a header: it has 'question', 'answer'"):
        trained(train_file=[str(write_tsv("sound.tsv", [HEADER, *ROWS], title))])
    trained()
    units = write_tsv("units.tsv", [("(n)", "(text)", "(more text)", "(name)"), *OTHERS], HEADER)
    score("--data_file", units, "--predict")
    assert "units.tsv:2: read as a row, but it has '(n)' in column 0" in caplog.text


def test_where_no_header_of_the_training_is_known_a_row_in_its_place_is_pointed_out(
    trained: Callable[..., None],
    write_tsv: Callable[..., Path],
    hf_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A folder from elsewhere: the usual layout has a header."""
    model = ["--model_dir", hf_folder, "--predict", "--data_file"]
    parsed = [score(*model, write_tsv("plain.tsv", OTHERS, HEADER)), caplog.text]
    assert parsed[0].num_rows == 9 and parsed[1] == ""
    score(*model, write_tsv("bare.tsv", [row[:3] for row in OTHERS]))
    assert (
        "bare.tsv:1: read as the header, but it holds 0 like a row; if it is one, set has_head" in caplog.text
    )
    assert score(*model, "bare.tsv", "--has_header", "false").num_rows == 9
    with pytest.raises(DataError, match="plain.tsv:1: text_a_column 1 is 'sentence2' here"):
        score(*model, write_tsv("plain.tsv", OTHERS, ("i", "sentence2", "sentence1")))
