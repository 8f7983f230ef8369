"""`evaluate.py --predict`: rows labelled in windows, and gone on with after any end."""

import gc
import gzip
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import bertpair
from bertpair import ConfigError, DataError, PairClassifier
from bertpair.checkpoints import atomic
from bertpair.console import stop_flag
from bertpair.data.dataset import Pairs
from bertpair.errors import StoppedError
from bertpair.evaluation import evaluate as evaluating
from bertpair.evaluation.evaluate import EvaluationResult, evaluate_models
from bertpair.settings.command_line import parse_command_line

WORDS = "the cat sat mat good bad food café 中文 数据库 hello, (x)".split()
HEADER = ("index", "sentence1", "sentence2")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluating, "WINDOW_ROWS", 7)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    stop_flag.clear()


@pytest.fixture
def rows() -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(5)
    texts = [[" ".join(rng.choice(WORDS, rng.integers(1, 14))) for _ in "ab"] for _ in range(40)]
    return [(f"q{number}", *pair) for number, pair in enumerate(texts)]


@pytest.fixture
def new(write_tsv: Callable[..., Path], rows: list[tuple[str, str, str]]) -> Path:
    return write_tsv("new.tsv", rows, header=HEADER)


def predict(folder: Path, data: object, output: str, *argv: object) -> EvaluationResult:
    words = ["--model_dir", folder, "--data_file", data, "--output_dir", output, "--predict", *argv]
    parsed = parse_command_line([str(word) for word in words], "evaluate")
    return evaluate_models(parsed.config, explicit=parsed.explicit)


def table(path: str) -> list[list[str]]:
    return [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_many_windows_answer_as_predict_does_in_the_order_of_the_files(
    hf_folder: Path, rows: list[tuple[str, str, str]], write_tsv: Callable[..., Path]
) -> None:
    files = [write_tsv(f"{n}.tsv", part, header=HEADER) for n, part in enumerate((rows[:10], rows[10:]))]
    words = ["--model_dir", hf_folder, "--data_file", *files, "--output_dir", "out", "--predict"]
    parsed = parse_command_line([str(word) for word in words], "evaluate")
    assert evaluate_models(parsed.config).num_rows == 40
    header, *found = table("out/predictions.tsv")
    assert header[:5] == ["file", "line", "predicted", "score", "truncated"]
    expected = PairClassifier.from_pretrained(hf_folder).predict([row[1:] for row in rows])
    assert [row[:2] for row in found] == [
        [str(files[number >= 10]), str(number % 10 + 2 if number < 10 else number - 8)]
        for number in range(40)
    ]
    for row, answer in zip(found, expected, strict=True):
        assert row[2] == answer.label and float(row[3]) == pytest.approx(answer.score, abs=2e-6)


class Killed(BaseException):
    """The process is gone at this call."""


def test_killed_at_any_write_it_goes_on_to_the_same_bytes(
    hf_folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(hf_folder, new, "whole")
    whole = Path("whole/predictions.tsv").read_bytes()
    names = ("append", "durable_length", "replace_file", "rename", "cut")
    real = {name: getattr(atomic, name) for name in names}
    calls, deadly = 0, 0

    def dying(name: str, *, after: bool) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == deadly and not after:
                raise Killed
            result = real[name](*args)
            if calls == deadly:
                raise Killed
            return result

        return call

    num_deaths = 0
    for after in (False, True):
        for deadly in range(1, 40):
            calls, place = 0, f"killed-{after}-{deadly}"
            with monkeypatch.context() as patch:
                for name in names:
                    patch.setattr(atomic, name, dying(name, after=after))
                try:
                    predict(hf_folder, new, place)
                except Killed:
                    num_deaths += 1
            predict(hf_folder, new, place)
            assert Path(place, "predictions.tsv").read_bytes() == whole
            assert {path.name for path in Path(place).iterdir()} == {"predictions.tsv", "input.json"}
            if calls < deadly:
                break
    assert num_deaths > 30


def test_a_run_that_was_stopped_says_what_is_done_and_goes_on(
    hf_folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict(hf_folder, new, "whole")
    append = atomic.append

    def append_and_stop(path: Path, data: bytes) -> None:
        append(path, data)
        if path.stat().st_size > len(data):  # the second window
            stop_flag.request(15)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "append", append_and_stop)
        with pytest.raises(StoppedError, match="14 of 40 rows are done; the same command goes on"):
            predict(hf_folder, new, "out")
    assert {path.name for path in Path("out").iterdir()} == {"predictions.part", "progress.json"}
    stop_flag.clear()
    with caplog.at_level("INFO", "bertpair"):
        predict(hf_folder, new, "out")
    assert "going on after row 14, where an earlier run ended" in caplog.text
    assert Path("out/predictions.tsv").read_bytes() == Path("whole/predictions.tsv").read_bytes()


FLAGS = {"settings": ["--max_seq_length", "9"], "settings ": ["--with_texts"]}


@pytest.mark.parametrize("changed", ["data_file", "model", "model ", *FLAGS])
def test_another_input_or_model_or_setting_starts_anew_and_says_so(
    hf_folder: Path,
    new: Path,
    changed: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    replace_file, calls = atomic.replace_file, 0

    def die_at_the_third(path: Path, data: bytes) -> None:
        nonlocal calls
        replace_file(path, data)
        calls += path.name == "progress.json"
        if calls == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(atomic, "replace_file", die_at_the_third)
        predict(hf_folder, new, "out")
    flags = FLAGS.get(changed, [])
    if changed == "data_file":
        new.write_text(new.read_text(encoding="utf-8").replace("cat", "mat"), encoding="utf-8")
    elif changed == "model":
        path = hf_folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # the last bit of some weight's exponent
        path.write_bytes(bytes(data))
    elif changed == "model ":
        path = hf_folder / "config.json"
        path.write_text(path.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-3'))
    with caplog.at_level("INFO", "bertpair"):
        predict(hf_folder, new, "out", *flags)
    assert f"had another {changed.strip()}: starting anew" in caplog.text and "going on" not in caplog.text
    predict(hf_folder, new, "fresh", *flags)
    assert Path("out/predictions.tsv").read_bytes() == Path("fresh/predictions.tsv").read_bytes()


def give_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input_gives_what_the_file_gives(
    hf_folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(hf_folder, new, "file")
    packed = gzip.compress(new.read_bytes())
    for data in (new.read_bytes(), packed):
        give_standard_input(monkeypatch, data)
        assert predict(hf_folder, "-", "piped").num_rows == 40
        assert Path("piped/predictions.tsv").read_bytes() == Path("file/predictions.tsv").read_bytes()
    Path("new.tsv.gz").write_bytes(packed)
    predict(hf_folder, "new.tsv.gz", "packed")
    assert Path("packed/predictions.tsv").read_bytes() == Path("file/predictions.tsv").read_bytes()


def test_standard_input_stops_at_its_bad_window_and_keeps_those_before(
    hf_folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(hf_folder, new, "file")
    lines = new.read_bytes().splitlines(keepends=True)
    give_standard_input(monkeypatch, b"".join([*lines[:20], b"q\tone text\n", *lines[20:]]))
    with pytest.raises(DataError) as caught:
        predict(hf_folder, "-", "piped")
    assert "standard input:21: expected at least 3" in str(caught.value)
    assert "the answers for the 14 rows before are in piped/predictions.part" in str(caught.value)
    whole = Path("file/predictions.tsv").read_bytes().splitlines(keepends=True)
    assert Path("piped/predictions.part").read_bytes() == b"".join(whole[:15])
    with pytest.raises(DataError, match=r"new.tsv:21: expected at least 3") as caught:  # before any is scored
        new.write_bytes(b"".join([*lines[:20], b"q\tone text\n", *lines[20:]]))
        predict(hf_folder, new, "checked")
    assert not Path("checked").exists()


def test_lines_of_json_say_the_same_and_kept_columns_come_back(hf_folder: Path, new: Path) -> None:
    flags = ["--keep_columns", "index", "sentence2", "--with_texts"]
    predict(hf_folder, new, "tsv", *flags)
    predict(hf_folder, new, "jsonl", *flags, "--predictions_format", "jsonl")
    header, *cells = table("tsv/predictions.tsv")
    assert header[-4:] == ["text_a", "text_b", "index", "sentence2"]
    lines = [json.loads(line) for line in Path("jsonl/predictions.jsonl").read_text("utf-8").splitlines()]
    source = table(str(new))[1:]
    for line, row, given in zip(lines, cells, source, strict=True):
        named = dict(zip(header, row, strict=True))
        assert [line["index"], line["text_a"], line["sentence2"]] == given == [row[-2], row[-4], row[-1]]
        assert (line["line"], line["predicted"]) == (int(named["line"]), named["predicted"])
        assert line["truncated"] is (named["truncated"] == "1")
        for label, probability in line["probabilities"].items():
            assert probability == float(named[f"prob_{label}"])
    assert not Path("jsonl/predictions.tsv").exists()


def test_few_windows_are_held(hf_folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "WINDOW_ROWS", 2)
    held, append = [], atomic.append

    def count(path: Path, data: bytes) -> None:
        held.append(sum(type(each) is Pairs for each in gc.get_objects()))
        append(path, data)

    before = sum(type(each) is Pairs for each in gc.get_objects())
    monkeypatch.setattr(atomic, "append", count)
    predict(hf_folder, new, "out")
    assert len(held) == 20 and max(held) <= before + 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--predict", "--report"], "report needs rows with labels, found predict"),
        (["--predict", "--all_figures"], "all_figures needs rows with labels, found predict"),
        (["--predictions_format", "jsonl"], "predictions_format jsonl has no effect without predict"),
        (["--data_file", "-"], "data_file -, the standard input, needs predict"),
        (["--data_file", "-", "a.tsv", "--predict"], "is read once: for one model, and without other files"),
        (["--data_file", "-", "--predict", "--compare", "x"], "is read once: for one model"),
    ],
)
def test_what_does_not_go_with_predict(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_command_line(["--model_dir", "m", *flags], "evaluate")


def test_two_processes_give_the_file_that_one_gives(hf_folder: Path, new: Path, tmp_path: Path) -> None:
    predict(hf_folder, new, "one", "--num_threads", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from bertpair.evaluation import evaluate as e; e.WINDOW_ROWS = 7; "
        "from bertpair.__main__ import main; main('evaluate')"
    )
    words = ["--model_dir", str(hf_folder), "--data_file", str(new), "--output_dir", "two", "--predict"]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **together, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(bertpair.__file__).parents[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert json.loads(said[0][0].splitlines()[-1]) == {"n": 40} and said[1] == ("", "")
    assert Path("two/predictions.tsv").read_bytes() == Path("one/predictions.tsv").read_bytes()
    assert {path.name for path in Path("two").iterdir()} == {"predictions.tsv", "input.json"}
