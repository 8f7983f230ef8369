"""Texts that stand in several columns: joined in the order given, the same way wherever the model goes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tiny_bert

from bertpair import Config, evaluate, train
from bertpair.data.columns import Columns, Places, has_column, locate_columns
from bertpair.data.source import resolve_source
from bertpair.data.tsv import read_pairs
from bertpair.errors import ConfigError, DataError
from bertpair.settings.command_line import parse_command_line
from bertpair.settings.data import DataSettings
from bertpair.settings.stored import model_settings

HEADER = ("id", "question", "reference", "answer", "grade")
JOINED = Columns(("question", "reference"), "answer", "grade", separator=" [x] ")
WriteTsv = Callable[..., Path]


def test_texts_are_joined_and_blank_cells_left_out(write_tsv: WriteTsv) -> None:
    rows = [(0, "q", "r", "a", "x"), (1, " ", "r", "a", "x"), (2, "q ", "\u200b", "a", "y")]
    path = write_tsv("rows.tsv", rows, HEADER)
    assert read_pairs([path], JOINED).text_a == ["q [x] r", "r", "q "]
    swapped = Columns((2, 1), ("answer", "id"), "grade", separator="")
    pairs = read_pairs([path], swapped)
    assert (pairs.text_a, pairs.text_b) == (["rq", "r", "q "], ["a0", "a1", "a2"])
    path = write_tsv("bad.tsv", [*rows, (3, "", " ", "a", "x")], HEADER)
    with pytest.raises(
        DataError, match=r"bad.tsv:5: text_a_column 'question' \+ 'reference' is empty; a text"
    ):
        read_pairs([path], JOINED)
    path = write_tsv("twice.tsv", [*rows, HEADER], HEADER)
    with pytest.raises(DataError, match="twice.tsv:5: the header row again"):
        read_pairs([path], JOINED)


def test_every_column_that_does_not_fit_is_named() -> None:
    assert locate_columns(JOINED, list(HEADER), "") == Places((1, 2), 3, 4, 5, 5)
    wrong = Columns(("questoin", 1, "question"), ("answer", 9), "grade", kept=("nmae",), group="di")
    with pytest.raises(DataError) as caught:
        locate_columns(wrong, list(HEADER), "f:1: ")
    faults = str(caught.value).splitlines()
    assert [fault.partition("; ")[0].partition(": the")[0] for fault in faults] == [
        "f:1: text_a_column 'questoin' is not in the header",
        "f:1: text_a_column 'question' is the same column as text_a_column",
        "f:1: text_b_column 9 does not exist",
        "f:1: group_column 'di' is not in the header",
        "f:1: keep_columns 'nmae' is not in the header",
    ]
    with pytest.raises(DataError, match="keep_columns 'a' is not in the header: there is none; give the num"):
        locate_columns(Columns(0, 1, 2, has_header=False, kept=("a",)), ["a", "b", "c"], "")


def test_numbered_columns_are_held_against_the_training_file(write_tsv: WriteTsv) -> None:
    columns = Columns((1, "reference"), 3, 4, header=HEADER)
    swapped = ["id", "answer", "reference", "question", "grade"]
    with pytest.raises(DataError) as caught:
        locate_columns(columns, swapped, "f:1: ")
    first, second, advice = str(caught.value).splitlines()
    assert first.startswith("f:1: text_a_column 1 is 'answer' here, and 'question' in the training file")
    assert second.startswith("f:1: text_b_column 3 is 'question' here")
    assert "--text_a_column question reference --text_b_column answer --label_column grade" in advice


def test_kept_columns_need_not_be_texts(write_tsv: WriteTsv) -> None:
    rows = [(" 0 ", "q", "r", "a", "x"), ("", "q", "r", "a", "y")]
    one = write_tsv("one.tsv", rows, HEADER)
    columns = Columns("question", "answer", None, kept=("id", -1, "question"))
    kept = read_pairs([one], columns).kept
    assert kept == {"id": [" 0 ", ""], "grade": ["x", "y"], "question": ["q", "q"]}
    bare = Columns(1, 3, None, has_header=False, kept=(4, 0))
    assert read_pairs([write_tsv("bare.tsv", rows)], bare).kept == {
        "column 4": ["x", "y"],
        "column 0": [" 0 ", ""],
    }
    two = write_tsv("two.tsv", rows, ("nr", *HEADER[1:]))
    with pytest.raises(DataError, match="two.tsv:1: keep_columns 0 is 'nr' here, and 'id' in .*one.tsv"):
        read_pairs([one, two], Columns("question", "answer", None, kept=(0,)))
    assert has_column([one, two], columns, "grade") and not has_column([one, two], columns, "id")


def test_the_settings_say_which(write_tsv: WriteTsv) -> None:
    path = write_tsv("rows.tsv", [(0, "q", "r", "a", "x")], HEADER)
    line = f"--model_name_or_path m --output_dir o --train_file {path} --label_column grade"
    more = ["--text_a_column", "question", "2", "--text_b_column", "answer", "--text_separator", " | "]
    config = parse_command_line([*line.split(), *more], "train").config
    assert (config.text_a_column, config.text_b_column) == (["question", 2], "answer")
    source = resolve_source(config)
    assert source.columns.has_header and source.columns.text_a == ("question", 2)
    assert source.read(source.train_files, source.columns, None).text_a == ["q | r"]
    assert DataSettings(text_a_column=["question"]) == DataSettings(text_a_column="question")
    assert Config(keep_columns="id").keep_columns == ["id"]
    predict = "--model_dir m --keep_columns id 3".split()
    with pytest.raises(ConfigError, match="--text_separator: expected a text of at most 100 characters"):
        parse_command_line([*line.split(), "--text_separator", "x" * 101], "train")
    assert parse_command_line([*predict], "evaluate").config.keep_columns == ["id", 3]
    with pytest.raises(ConfigError, match="text_a_column names the same column twice, 'question'"):
        parse_command_line([*line.split(), "--text_a_column", "question", "question"], "train")


@pytest.mark.usefixtures("fresh_process")
def test_a_model_reads_later_files_of_any_format_as_it_was_trained(write_tsv: WriteTsv) -> None:
    rows = [(i, f"the cat {i}", "sat", "good mat" if i % 2 else "food", "xy"[i % 3 == 0]) for i in range(12)]
    write_tsv("train.tsv", rows, HEADER)
    objects = [dict(zip(HEADER, row, strict=True)) for row in rows]
    Path("dev.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
    names = HEADER[::-1]
    lines = [",".join(names), *(",".join(f'"{each[name]}"' for name in names) for each in objects)]
    Path("dev.csv").write_text("\r\n".join(lines), encoding="utf-8")
    write_tiny_bert(Path("tiny"))
    columns = {"text_a_column": ["question", "reference"], "text_b_column": "answer", "label_column": "grade"}
    train(
        Config(
            **{"model_name_or_path": "tiny", "from_scratch": True, "output_dir": "out", "max_steps": 1},
            **{"train_file": ["train.tsv"], "dev_file": ["dev.jsonl"], "max_seq_length": 24, "amp": "off"},
            **{"num_threads": 1, "text_separator": " | ", **columns},
        )
    )
    stored = model_settings(Path("out"))
    assert stored["text_a_column"] == ["question", "reference"] and stored["text_separator"] == " | "
    results = [evaluate("out", name) for name in ("train.tsv", "dev.jsonl", "dev.csv")]
    assert results[0].metrics == results[1].metrics == results[2].metrics and results[0].num_rows == 12
