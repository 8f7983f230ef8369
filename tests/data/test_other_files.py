"""Files that are no UTF-8 text with tabs: one line says what they look like and what to do."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_tiny_bert

from bertpair import Config, ConfigError, DataError, evaluate, train
from bertpair.evaluation.evaluate import evaluate_models
from bertpair.settings.command_line import parse_command_line
from bertpair.settings.serve import parse_serve_command_line

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_process")

CHINESE = "".join(f"{i}\t数据库索引{i}\t事务是有的\t{'对错'[i % 2]}\n" for i in range(12))
JAPANESE = "".join(f"{i}\tデータの{i}\tこれはねこ\t{'対違'[i % 2]}\n" for i in range(12))
FRENCH = "".join(f"{i}\tcafé {i}\tdéjà vu\t{'ab'[i % 2]}\n" for i in range(12))
KOREAN = "".join(f"{i}\t데이터베이스 색인 {i}\t고양이입니다\t{'맞틀'[i % 2]}\n" for i in range(12))
TAIWANESE = "".join(f"{i}\t資料庫的索引結構{i}\t關於網路的問題\t{'對錯'[i % 2]}\n" for i in range(12))
RUSSIAN = "".join(f"{i}\tбаза данных {i}\tэто кошка\t{'даны' if i % 2 else 'нет'}\n" for i in range(12))
POLISH = "".join(f"{i}\tżółty kość {i}\tłąka źle\t{'ab'[i % 2]}\n" for i in range(12))
HEADER = "index\tsentence1\tsentence2\tlabel\n"
PLAIN = HEADER + "".join(f"{i}\tthe cat {i}\tsat\t{'ab'[i % 2]}\n" for i in range(12))


def fit(file: str, **settings: object) -> None:
    if not Path("tiny").exists():
        write_tiny_bert(Path("tiny"))
    values = {
        **{"model_name_or_path": "tiny", "from_scratch": True, "output_dir": "out", "max_steps": 1},
        **{"train_file": [file], "max_seq_length": 24, "amp": "off", "num_threads": 1},
    }
    train(Config(**{**values, **settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(gzip.compress(PLAIN.encode())), "a gzip file within another; unpack it once: gunzip"),
        (gzip.compress(PLAIN.encode("utf-16")), "iconv -f UTF-16 -t UTF-8"),
        (gzip.compress(PLAIN.encode())[:-9], "a gzip file that is damaged or cut off"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive or an Excel workbook"),
        (bytes(range(256)) * 20, "binary data"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "a web page"),
        (b"PAR1" + b"\x15\x04" * 40, "a Parquet file"),
        (PLAIN.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        (PLAIN.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ((HEADER + CHINESE).encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        ((HEADER + CHINESE).encode("utf-32"), "iconv -f UTF-32LE -t UTF-8"),
        ((HEADER + CHINESE).encode("gb18030"), "GB18030 text, not UTF-8; convert it: iconv -f GB18030"),
        ((HEADER + JAPANESE).encode("shift_jis"), "iconv -f SHIFT_JIS -t UTF-8"),
        ((HEADER + JAPANESE).encode("euc_jp"), "iconv -f EUC-JP -t UTF-8"),
        ((HEADER + KOREAN).encode("euc_kr"), "iconv -f EUC-KR -t UTF-8"),
        ((HEADER + TAIWANESE).encode("big5"), "iconv -f BIG5 -t UTF-8"),
        ((HEADER + RUSSIAN).encode("cp1251"), "iconv -f WINDOWS-1251 -t UTF-8"),
        ((HEADER + RUSSIAN).encode("koi8_r"), "iconv -f KOI8-R -t UTF-8"),
        ((HEADER + FRENCH).encode("cp1252"), "convert it from its encoding, such as WINDOWS-1252: iconv -f"),
        ((HEADER + POLISH).encode("iso8859_2"), "convert it from its encoding, such as"),
        ((PLAIN * 40 + FRENCH).encode("latin1"), "text that is not UTF-8"),
        (PLAIN.replace("\n", "\r").encode(), "a carriage return alone; convert it: tr"),
        (PLAIN.replace("\t", ",").encode(), "columns with a comma between them"),
        (PLAIN.replace("\t", ";").encode(), "columns with a semicolon between them"),
        (b'{"sentence1": "a", "sentence2": "b", "label": "x"}\n' * 4, "looks like JSON"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(data: bytes, said: str) -> None:
    Path("data.tsv").write_bytes(data)
    with pytest.raises(DataError) as caught:
        fit("data.tsv")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith("data.tsv") and said in lines[0]
    assert not Path("out").exists()


ROWS = PLAIN.removeprefix(HEADER)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + ROWS.replace("\t", ","), "found 1 in each of 12 rows; they look like columns with a comma"),
        (HEADER + ROWS.replace("\t", ";"), "they look like columns with a semicolon between them"),
        (HEADER + ROWS.replace("\t", "   "), "they look like columns with spaces between them"),
        (HEADER + ROWS.replace("\t", "\\t"), "they look like columns with a backslash and a t between them"),
        (HEADER + ROWS.replace("\t", " | "), "they look like columns with a vertical bar between them"),
        (HEADER + ROWS.replace("\t", " "), "found 1 in each of 12 rows; write a tab between the columns"),
        (HEADER + '{"sentence1": "a"}\n' * 3, "found 1 in each of 3 rows; they look like JSON"),
        (HEADER + ROWS.replace("\tsat", "\tsat\tdown"), "found 5 in each of 12 rows; does the header lack"),
        (HEADER.replace("\t", ",") + ROWS, ":1: expected tabs as in the next row, found none in 'index,"),
        (HEADER.replace("\t", "  ") + ROWS, ":1: expected tabs as in the next row, found none in 'index "),
        (
            "A study of cats\n" + PLAIN,
            ":1: expected tabs as in the next row, found none in 'A study of cats'",
        ),
        (PLAIN.replace("\t", "   "), ":1: looks like columns with spaces between them"),
        (PLAIN.replace("\t", " "), ":1: expected tabs between the columns, found none in 'index sentence1"),
        ("# cats\n# dogs\n" + PLAIN, ":1: looks like a comment; remove it"),
        ("sep=\t\n" + PLAIN, "looks like a file for Excel, with its line sep= first; remove that line"),
        ("{\\rtf1\\ansi}\n", "a document with its layout; save it as plain text"),
        ("<?xml version='1.0'?>\n<a/>\n", "looks like an XML file"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_rows_that_all_have_another_shape_are_named_in_one_line(
    text: str, said: str, on_bad_row: str
) -> None:
    Path("data.tsv").write_text(text)
    with pytest.raises(DataError) as caught:
        fit("data.tsv", on_bad_row=on_bad_row)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.tsv:") and said in line
    assert not Path("out").exists()


def test_a_file_with_a_single_good_row_is_read_and_one_without_never_skipped() -> None:
    Path("good.tsv").write_text(PLAIN)
    Path("bad.tsv").write_text(HEADER + "0\tthe cat\n" * 3)
    both = {"train_file": ["good.tsv", "bad.tsv"], "on_bad_row": "skip"}
    with pytest.raises(DataError, match=r"bad.tsv: not one good row:\nbad.tsv:2: expected at least 4"):
        fit("", **both)
    with pytest.raises(DataError, match=r"bad.tsv: not one good row:\nbad.tsv:2: unknown label 'c'"):
        Path("bad.tsv").write_text(HEADER + "0\tthe cat\tsat\tc\n" * 3)
        fit("good.tsv", dev_file=["bad.tsv"], on_bad_row="skip")
    Path("bad.tsv").write_text(HEADER + ROWS.replace("\t", ",") + "9\tcat\tsat\ta\n")
    fit("", **both)


def test_a_carriage_return_in_the_header_and_quotes_around_all_names_are_refused() -> None:
    Path("data.tsv").write_bytes(PLAIN.replace("\n", "\r", 3).encode())
    with pytest.raises(DataError, match="data.tsv:1: a carriage return in the header; convert it: tr"):
        fit("data.tsv")
    quoted = "".join("\t".join(f'"{cell}"' for cell in row.split("\t")) + "\n" for row in PLAIN.splitlines())
    Path("data.tsv").write_text(quoted)
    with pytest.raises(DataError, match="data.tsv:1: the names are in quotes; .* --quoting csv"):
        fit("data.tsv")
    fit("data.tsv", quoting="csv")
    assert evaluate("out", "data.tsv").num_rows == 12
    Path("data.tsv").write_text("".join(f'"{line}"\n' for line in PLAIN.splitlines()))
    with pytest.raises(DataError, match="data.tsv:1: the whole line is in quotes; write the lines without"):
        fit("data.tsv", overwrite_output_dir=True)


def test_texts_in_quotes_short_rows_and_missing_labels_are_pointed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path("data.tsv").write_text(PLAIN)
    fit("data.tsv")
    assert not caplog.records
    Path("quoted.tsv").write_text(
        HEADER + "".join(f'{i}\t"cat {i}"\t"sat"\t{"ab"[i % 2]}\n' for i in range(4))
    )
    evaluate("out", "quoted.tsv")
    assert "quoted.tsv: all texts are in quotes; --quoting csv takes them off" in caplog.text
    Path("short.tsv").write_text(HEADER + "the cat\tsat\ta\n" * 3)
    parsed = parse_command_line(["--model_dir", "out", "--data_file", "short.tsv", "--predict"], "evaluate")
    evaluate_models(parsed.config, explicit=parsed.explicit)
    assert (
        "short.tsv: rows with fewer columns than the first, counted from the left: 3, as in line 2"
        in caplog.text
    )
    Path("data.tsv").write_text(PLAIN + "12\tthe cat\tsat\tNaN\n")
    fit("data.tsv", overwrite_output_dir=True)
    assert "the label 'NaN' is how pandas writes a missing one" in caplog.text
    Path("data.tsv").write_text(HEADER + "".join(f"{i}\tthe cat\tsat\t{i},5\n" for i in range(12)))
    fit("data.tsv", overwrite_output_dir=True)
    assert (
        "all 12 labels are numbers ('0,5', '1,5'" in caplog.text and "problem_type: regression" in caplog.text
    )
    with pytest.raises(DataError, match="data.tsv:2: label '0,5'; did you mean '0.5'. problem_type"):
        fit("data.tsv", problem_type="regression", overwrite_output_dir=True)


def test_columns_with_the_usual_names_in_other_places_are_refused() -> None:
    """As a table written with its index has them."""
    Path("data.tsv").write_text(
        "\t" + HEADER + "".join(f"{i}\t{row}" for i, row in enumerate(ROWS.splitlines(True)))
    )
    with pytest.raises(DataError, match="data.tsv:1: text_a_column 1 is 'index' here, and 'sentence1' is"):
        fit("data.tsv")
    names = {"text_a_column": "sentence1", "text_b_column": "sentence2", "label_column": "label"}
    fit("data.tsv", **names)
    by_number = {"text_a_column": 2, "text_b_column": 3, "label_column": 4}
    fit("data.tsv", **by_number, overwrite_output_dir=True)


def test_the_advised_conversions_work() -> None:
    Path("OLD").write_bytes((HEADER + CHINESE).encode("gb18030"))
    for command in ("iconv -f GB18030 -t UTF-8 OLD > NEW", "tr '\\r' '\\n' < CR > NEW"):
        Path("CR").write_bytes(PLAIN.replace("\n", "\r").encode())
        subprocess.run(command, shell=True, check=True, timeout=20)
        assert Path("NEW").read_bytes() in ((HEADER + CHINESE).encode(), PLAIN.encode())


def test_a_few_bytes_that_are_not_utf8_are_bad_rows_with_their_line() -> None:
    lines = PLAIN.encode().split(b"\n")
    lines[5] = lines[5].replace(b"cat", b"c\xe9t")
    Path("data.tsv").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match="data.tsv:6: byte 8 of the line, 0xe9, is not UTF-8"):
        fit("data.tsv")


def test_commas_in_texts_and_files_of_one_column_are_fine() -> None:
    Path("data.tsv").write_text("a, b, c\tx\nd, e\ty\n" * 4)
    layout = {"has_header": False, "text_a_column": 0, "text_b_column": None, "label_column": 1}
    fit("data.tsv", **layout)
    Path("texts.tsv").write_text("one, two, three\nfour\n")
    parsed = parse_command_line(["--model_dir", "out", "--data_file", "texts.tsv", "--predict"], "evaluate")
    assert parsed.config.text_b_column is None
    assert evaluate("out", "data.tsv").num_rows == 8


def test_a_vocabulary_for_other_texts_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    Path("plain.tsv").write_text(PLAIN)
    fit("plain.tsv")
    assert "[UNK]" not in caplog.text
    rows = "".join(f"{i}\tวันนี้อากาศดี {i}\tสวัสดี\t{'ab'[i % 2]}\n" for i in range(12))
    Path("thai.tsv").write_text(HEADER + rows, encoding="utf-8")
    caplog.clear()
    evaluate("out", "thai.tsv")
    assert "% of the tokens are [UNK]" in caplog.text


def test_a_tilde_is_the_home_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("train", "dev"):
        (home / "data" / f"{name}.tsv").write_text(PLAIN)
    (home / "run.yaml").write_text("data_dir: ~/data\nresume: false\n")
    write_tiny_bert(home / "tiny")
    flags = "--config ~/run.yaml --model_name_or_path ~/tiny --from_scratch --output_dir ~/out --amp off"
    parsed = parse_command_line([*flags.split(), "--max_steps", "1", "--max_seq_length", "24"], "train")
    train(parsed.config, explicit=parsed.explicit)
    assert (home / "out" / "model.safetensors").is_file() and not Path("~").exists()
    assert evaluate("~/out", "~/data/dev.tsv", output_dir="~/results").num_rows == 12
    assert (home / "results" / "eval_results.txt").is_file()


def test_a_blank_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="--output_dir: expected a path, found ' '"):
        parse_command_line(["--output_dir", " "], "train")


def test_a_short_flag_is_no_value_and_a_negative_number_is() -> None:
    with pytest.raises(ConfigError, match="flags begin with two dashes, found -o"):
        parse_command_line(["--train_file", "a.tsv", "-o", "out"], "train")
    for flag in ("--output_dir", "--seed", "--train_file", "--label_column", "--config"):
        with pytest.raises(ConfigError, match=f"dashes, found -o\n{flag}: expected .*, found nothing"):
            parse_command_line([flag, "-o"], "train")
    with pytest.raises(ConfigError, match=r"dashes, found -p(.*)\n--data_file: expected .*, found nothing"):
        parse_command_line(["--model_dir", "m", "--data_file", "-p"], "evaluate")
    with pytest.raises(ConfigError, match=r"dashes, found -v(.*)\n--port: expected .*, found nothing"):
        parse_serve_command_line(["--model_dir", "m", "--port", "-v"])
    flags = "--model_name_or_path m --train_file a.tsv --output_dir o --label_column -1 --logging_steps -1"
    assert parse_command_line(flags.split(), "train").config.label_column == -1


@pytest.mark.slow
def test_train_from_elsewhere_says_where_the_sample_is(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and f"the sample is trained from its own folder: cd {ROOT}" in done.stderr
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_is_said() -> None:
    Path("folder.tsv").mkdir()
    with pytest.raises(DataError, match="folder.tsv: is a folder; a file is expected"):
        fit("folder.tsv")
    os.mkfifo("pipe.tsv")  # nobody writes: it must not be waited for
    with pytest.raises(DataError, match="pipe.tsv: is a pipe or a device; .* save it as a file"):
        fit("pipe.tsv")
    Path("plain.tsv").write_text(PLAIN)
    fit("plain.tsv")
    with pytest.raises(DataError, match="pipe.tsv: is a pipe or a device"):
        evaluate("out", "pipe.tsv")
