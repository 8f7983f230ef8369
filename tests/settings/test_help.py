"""--help of each script, and help(bertpair.Config): whole, in sentences, with examples that work."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from bertpair.settings.command_line import FIRST, Names, Script, flag_layer, parse_command_line
from bertpair.settings.config import SETTINGS, Config, EvaluateSettings
from bertpair.settings.fields import described
from bertpair.settings.serve import ServeConfig, parse_serve_command_line
from bertpair.settings.several import SeveralRuns

SCRIPTS: tuple[Script, ...] = ("train", "evaluate", "serve")
FIRST_TEN = {
    "train": """model_name_or_path train_file dev_file text_a_column text_b_column label_column output_dir
        num_train_epochs learning_rate per_device_train_batch_size""",
    "evaluate": """model_dir data_file predict all_checkpoints compare output_dir max_eval_samples on_bad_row
        device per_device_eval_batch_size""",
    "serve": """model_dir host port device amp num_threads max_request_rows queue_deadline api_key_file
        allowed_hosts""",
}


def parse(script: Script, words: list[str]) -> Config | ServeConfig:
    return (
        parse_serve_command_line(words)[0] if script == "serve" else parse_command_line(words, script).config
    )


@pytest.fixture
def page(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{script}.py"])
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as left:
            parse(script, ["--nonsense", flag])
        assert left.value.code == 0
    return capsys.readouterr().out.rpartition("usage: ")[2]


def flags_of(text: str) -> list[str]:
    return re.findall(r"^  --(\w+) ", text, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting_once_and_the_ten_first(script: Script, page: str) -> None:
    usage, _, settings = page.partition(f"\n{FIRST}:\n")
    shown, first = flags_of(settings), flags_of(settings.partition("\n\n")[0])
    assert usage.startswith(f"python {script}.py ") and not flags_of(usage)
    assert first == FIRST_TEN[script].split()
    assert len(shown) == len({*shown})
    if script == "train":
        assert {*shown} == {*SETTINGS, *SeveralRuns.model_fields} - {*EvaluateSettings.model_fields}
    elif script == "serve":
        assert {*shown} == {*ServeConfig.model_fields}
    else:
        assert {*EvaluateSettings.model_fields} - {"eval_output_dir"} <= {*shown}
        assert {"label_column", "amp", "metric_for_best_model"} <= {*shown}
        assert not {"eval_output_dir", "seed", "max_train_samples"} & {*shown}
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_example_is_accepted(script: Script, page: str) -> None:
    examples = dict(re.findall(r"^ +Example: (--(\w+).*)$", page, re.MULTILINE))
    assert {*FIRST_TEN[script].split()} <= {*examples.values()}
    names = ServeConfig if script == "serve" else Names
    for example, name in examples.items():
        read, own = flag_layer(shlex.split(example), names, script, {}, "", only_flags=SeveralRuns)
        assert name in read.values | own and not (read.faults or read.notes), example


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_at_the_top_is_accepted(script: Script, page: str) -> None:
    command = page.partition("\nExample")[2].partition(f"  python {script}.py")[2].replace("\\\n", " ")
    words = shlex.split(command.partition("\n")[0])
    config = parse(script, words)
    assert getattr(config, "output_dir" if script == "train" else "model_dir") in words


def test_help_is_sentences_that_say_what_happens_by_default() -> None:
    needed = {"model_name_or_path", "data_dir", "output_dir"}  # an error says that these are not given
    for model in (Config, ServeConfig):
        for name, text in described(model).items():
            assert str(model.model_fields[name].description).endswith(".") and text.endswith(".")
            assert (" Not given: " in text or " Default: " in text) != (name in needed), name


def test_notes_name_commands_as_the_first_one_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    note = parse_command_line("--resume --output_dir o --do_predict".split(), "train").notes[-1]
    assert note == "--do_predict is ignored here: python evaluate.py --predict --data_file FILE does it"
    monkeypatch.setattr("sys.argv", ["/usr/bin/bertpair"])
    note = parse_command_line("--resume --output_dir o --do_predict".split(), "train").notes[-1]
    assert note == "--do_predict is ignored here: bertpair evaluate --predict --data_file FILE does it"


def test_python_shows_what_each_setting_means() -> None:
    doc = inspect.getdoc(Config) or ""
    flat = " ".join(doc.split())
    for name, text in described(Config).items():
        assert f"\n{name}\n    " in doc and text in flat
    assert list(inspect.signature(Config).parameters) == list(SETTINGS)
    assert inspect.signature(Config).parameters["learning_rate"].default == 2e-5
