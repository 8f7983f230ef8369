"""Command lines, from 2020 and of today: what they mean, what is read, and all that is wrong at once."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertpair.checkpoints.checkpoint import settings_folder
from bertpair.errors import BertpairError, CheckpointError, ConfigError
from bertpair.settings.command_line import Parsed, parse_command_line
from bertpair.settings.config import SETTINGS, Config
from bertpair.settings.stored import dump_yaml, stored_settings

RECIPE = (
    "--model_type BERT --model_name_or_path bert-base-multilingual-cased --task_name MNLI-MM --do_train "
    "--do_eval --data_dir ./data/ --max_seq_length 40 --learning_rate 2e-5 --num_train_epochs 20 "
    "--weight_decay 0 --save_steps 2000 --logging_steps 2000 --overwrite_output_dir "
    "--output_dir ./checkpoints/"
)
SAMPLE = """\
data_dir: data
model_name_or_path: data/tiny-bert
from_scratch: true
output_dir: output
overwrite_output_dir: true
max_steps: 100
eval_strategy: epoch
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(line: str = "") -> Parsed:
    return parse_command_line(line.split(), "train")


def evaluate(line: str = "") -> Parsed:
    return parse_command_line(line.split(), "evaluate", settings_folder)


def refusal(line: str, script: str = "train") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(line.split(), script)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def write_model(path: Path, **values: object) -> Path:
    path.mkdir(parents=True)
    (path / "training_args.yaml").write_text(dump_yaml(Config(**values)))  # type: ignore[arg-type]
    return path


def test_the_2020_command_line_means_what_it_meant() -> None:
    parsed = train(RECIPE)
    assert parsed.config == Config(
        model_type="BERT",
        model_name_or_path="bert-base-multilingual-cased",
        task_name="MNLI-MM",
        do_train=True,
        do_eval=True,
        data_dir="./data/",
        max_seq_length=40,
        learning_rate=2e-5,
        num_train_epochs=20.0,
        weight_decay=0.0,
        save_steps=2000,
        logging_steps=2000,
        overwrite_output_dir=True,
        output_dir="./checkpoints/",
    )
    assert parsed.notes == ()


def test_all_of_the_2020_flags_together() -> None:
    parsed = train(
        RECIPE + " --config_name= --tokenizer_name= --cache_dir= --evaluate_during_training --do_lower_case "
        "--per_gpu_train_batch_size=32 --per_gpu_eval_batch_size 64 --gradient_accumulation_steps 2 "
        "--adam_epsilon 1e-6 --max_grad_norm 0.5 --max_steps -1 --warmup_steps 100 "
        "--eval_all_checkpoints --no_cuda --overwrite_cache --seed 7 --fp16_opt_level O2 --local_rank -1 "
        "--server_ip= --server_port= --do_predict --logging_dir runs --logging_first_step "
        "--save_total_limit 2 --tpu_num_cores 8 --tpu_metrics_debug --debug --dataloader_drop_last "
        "--past_index -1"
    )
    config = parsed.config
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (32, 64)
    assert (config.eval_strategy, config.eval_interval, config.evaluate_during_training) == (
        "steps",
        2000,
        True,
    )
    assert (config.device, config.do_lower_case, config.config_name, config.seed) == ("cpu", True, None, 7)
    said = {note.split()[0] for note in parsed.notes}
    assert said == {
        "--eval_all_checkpoints",
        "--overwrite_cache",
        "--fp16_opt_level",
        "--local_rank",
        "--server_ip",
        "--server_port",
        "--do_predict",
        "--logging_dir",
        "--logging_first_step",
        "--tpu_num_cores",
        "--tpu_metrics_debug",
        "--debug",
        "--dataloader_drop_last",
        "--past_index",
    }


def test_only_what_is_asked_for_is_done() -> None:
    own = "--model_name_or_path m --data_dir d --output_dir o "
    both, only_train, only_eval = train(own), train(own + "--do_train"), train(own + "--do_eval")
    assert (both.config.runs_training, both.config.runs_evaluation, both.config.eval_strategy) == (
        True,
        True,
        "epoch",
    )
    assert (only_train.config.runs_evaluation, only_train.config.eval_strategy) == (False, "no")
    assert only_eval.config.runs_training is False
    assert "eval_strategy" in only_train.explicit and "eval_strategy" not in both.explicit
    assert train(own + "--do_train --evaluate_during_training").config.eval_strategy == "steps"
    assert refusal(own + "--do_train false --do_eval false") == [
        "do_train and do_eval are both false: there is nothing to do"
    ]


def test_config_yaml_is_read_unasked_and_said(folder: Path) -> None:
    (folder / "config.yaml").write_text(SAMPLE)
    parsed = train("--seed 3")
    assert parsed.notes == ("settings read from config.yaml",)
    assert (parsed.config.output_dir, parsed.config.max_steps, parsed.config.seed) == ("output", 100, 3)
    assert {"seed", "data_dir", "max_steps"} <= parsed.explicit and "learning_rate" not in parsed.explicit


@pytest.mark.parametrize("name", ["model_name_or_path", "task_name", "data_dir", "train_file"])
def test_nobodys_own_run_inherits_the_samples_settings(folder: Path, name: str) -> None:
    (folder / "config.yaml").write_text("this: [is not even read")
    rest = "--model_name_or_path=m --data_dir=d --output_dir=o"
    for line in (rest, f"--{name} mnli {rest}"):
        parsed = train(line)
        assert parsed.config.max_steps == -1
        assert parsed.notes[0].startswith("config.yaml is not read, because --")
    (folder / "config.yaml").write_text(SAMPLE)
    assert "settings read from config.yaml" in train(f"{rest} --config config.yaml").notes
    (folder / "own.yaml").write_text("model_name_or_path: m\noutput_dir: o")
    faults = refusal(f"--{name} mnli")
    said = "output_dir must be set: training needs a folder to write to. Example: --output_dir my_model"
    assert said in faults


def test_flags_go_over_yaml_and_yaml_over_defaults(folder: Path) -> None:
    (folder / "own.yaml").write_text(SAMPLE + "learning_rate: 3e-5\nseed: 5\n")
    config = train("--config own.yaml --seed 6").config
    assert (config.learning_rate, config.seed, config.weight_decay) == (3e-5, 6, 0.01)


def test_a_single_json_file_is_a_settings_file(folder: Path) -> None:
    values = {
        "model_name_or_path": "m",
        "data_dir": "d",
        "output_dir": "o",
        "fp16": True,
        "logging_dir": None,
    }
    (folder / "args.json").write_text(json.dumps({**values, "per_gpu_train_batch_size": None}))
    parsed = train("args.json")
    assert (parsed.config.amp, parsed.config.output_dir) == ("fp16", "o")
    assert parsed.notes[1].startswith("args.json: logging_dir no longer means anything")
    assert "a settings file is named by --config" in refusal("args.yaml")[0]


def test_all_faults_of_yaml_and_flags_come_in_one_list(folder: Path) -> None:
    (folder / "config.yaml").write_text(
        "seed: x\nlearing_rate: 1\nlabels: [yes, a]\noutput_dir: o\nseed: 2\n"
    )
    assert refusal("--learning 2 --per_device_train_batch_size 0 --pooling sum --warmup_ratio 2 stray") == [
        "config.yaml:5: seed is given twice",
        "config.yaml:1: seed: expected a whole number from 0 to 4294967295, found 'x'",
        "config.yaml:2: unknown setting learing_rate; did you mean learning_rate?",
        "config.yaml:3: labels: expected labels that are text, found true; YAML reads an unquoted yes, no, "
        "on, off, true, null or number as something else: quote it",
        "unknown setting --learning; did you mean learning_rate?",
        "--warmup_ratio: expected a number of at least 0 and at most 1, found 2 words, '2 stray'",
        "--per_device_train_batch_size: expected a whole number of at least 1, found 0",
        "--pooling: expected one of cls, mean, max, or null, found 'sum'",
        "model_name_or_path must be set: training needs a model to start from. "
        "Example: --model_name_or_path bert-base-multilingual-cased",
        "data_dir or train_file must be set: training needs data. Example: --train_file answers.tsv",
    ]


def test_a_beginner_is_told_what_is_missing_and_where_to_read(folder: Path) -> None:
    assert refusal("--train_file a.tsv --output_dir o") == [
        "model_name_or_path must be set: training needs a model to start from. "
        "Example: --model_name_or_path bert-base-multilingual-cased",
        "bertpair train --help explains every setting",
    ]


def test_what_is_faulty_is_not_called_missing_too(folder: Path) -> None:
    assert refusal("--model_name_or_path m --data_dir d --output_dir") == [
        "--output_dir: expected a path, or null, found nothing"
    ]
    assert refusal("--config absent.yaml") == ["absent.yaml: no such settings file"]


def test_a_flag_sets_aside_what_it_makes_void_and_says_so(folder: Path) -> None:
    (folder / "config.yaml").write_text(SAMPLE)
    parsed = train("--num_train_epochs 2 --eval_steps 50")
    assert (parsed.config.max_steps, parsed.config.eval_strategy, parsed.config.eval_interval) == (
        -1,
        "steps",
        50,
    )
    assert parsed.notes[1:] == (
        "max_steps 100 has no effect, because --num_train_epochs is given",
        "eval_strategy 'epoch' has no effect, because --eval_steps is given",
    )
    assert {"max_steps", "eval_strategy"} <= parsed.explicit, "a resume must see that these changed"


def test_contradictions_are_faults() -> None:
    own = "--model_name_or_path m --data_dir d --output_dir o "
    assert "two warm-ups" in refusal(own + "--warmup_steps 3 --warmup_ratio 0.1")[0]
    assert "fp16 needs a GPU" in refusal(own + "--fp16 --no_cuda")[0]
    assert "load_best_model_at_end needs" in refusal(own + "--do_train --load_best_model_at_end")[0]
    assert refusal(own + "--resume --overwrite_output_dir")[0].startswith("resume goes on")


def test_a_resume_needs_only_to_know_its_run() -> None:
    parsed = train("--resume --output_dir o")
    assert parsed.config.resume == "auto" and parsed.explicit >= {"resume", "output_dir"}
    assert train("--resume o/checkpoint-20").config.resume == "o/checkpoint-20"
    assert refusal("--resume") == ["output_dir must be set: it is the folder of the run to resume"]


def test_on_a_resume_an_unasked_config_yaml_only_names_the_run(folder: Path) -> None:
    (folder / "config.yaml").write_text(SAMPLE)
    parsed = train("--resume --seed 4")
    assert (parsed.config.output_dir, parsed.config.max_steps) == ("output", 100), "for a start at step 0"
    assert parsed.explicit >= {"resume", "output_dir", "seed"}
    assert not parsed.explicit & {"data_dir", "max_steps", "eval_strategy"}
    assert parsed.config.overwrite_output_dir is False
    assert "the resumed run's own settings win" in parsed.notes[0]
    assert train("--resume runs/a/checkpoint-5").config.output_dir is None, "not the sample's"
    assert {"data_dir", "max_steps"} <= train("--resume --config config.yaml").explicit


def test_evaluate_knows_the_models_own_settings(folder: Path) -> None:
    write_model(
        folder / "out",
        label_column="gold",
        max_seq_length=64,
        device="cuda",
        num_threads=8,
        output_dir="elsewhere",
    )
    (folder / "eval.yaml").write_text("max_seq_length: 48\nseed: 9\n")
    parsed = evaluate("--model_dir out --config eval.yaml --seed 8 --output_dir written")
    config = parsed.config
    assert (config.label_column, config.max_seq_length, config.seed) == ("gold", 48, 8)
    assert (config.model_dir, config.eval_output_dir, config.output_dir) == ("out", "written", None)
    assert (config.device, config.num_threads) == ("auto", None), "those of another machine"
    assert "label_column" not in parsed.explicit and {"max_seq_length", "seed"} <= parsed.explicit
    assert parsed.notes[0] == "settings read from out/training_args.yaml"
    assert "--seed has no effect on an evaluation" in parsed.notes


def test_evaluate_finds_the_model_that_was_trained_last(folder: Path) -> None:
    assert refusal("", "evaluate") == [
        "model_dir must be set: it is the folder of a trained model. Example: --model_dir my_model"
    ]
    (folder / "config.yaml").write_text(SAMPLE)
    write_model(folder / "output", label_column="gold")
    parsed = evaluate()
    assert (parsed.config.model_dir, parsed.config.label_column) == ("output", "gold")
    assert parsed.config.data_dir is None, "config.yaml gives nothing but output_dir"
    assert parsed.config.eval_output_dir is None
    (folder / "config.yaml").write_text("output_dir: 3\nseed: x")
    assert refusal("", "evaluate")[0].startswith("config.yaml:1: output_dir: expected a path")
    (folder / "config.yaml").write_text("output_dir: [")
    assert "not YAML" in refusal("", "evaluate")[0]
    (folder / "own.yaml").write_text("output_dir: output")
    assert evaluate("--config own.yaml").config.model_dir == "output"


def test_a_run_without_a_final_model_is_read_by_its_newest_checkpoint(folder: Path) -> None:
    write_model(folder / "out" / "checkpoint-9", label_column="old")
    write_model(folder / "out" / "checkpoint-10", label_column="new")
    assert evaluate("--model_dir out --all_checkpoints").config.label_column == "new"


def test_a_folder_without_settings_has_the_defaults(folder: Path) -> None:
    parsed = evaluate("--model_dir someone/model --do_predict")
    assert parsed.config == Config(model_dir="someone/model", predict=True)
    assert parsed.notes == ("someone/model holds no training_args.yaml: the default settings are used",)
    assert stored_settings(folder) == {}


@pytest.mark.parametrize("text", ["seed: x", "sead: 1", "fp16: true", "a: [", "- 1", "x: &a 1\ny: *a"])
def test_damaged_settings_of_a_model_are_named(folder: Path, text: str) -> None:
    model = write_model(folder / "out")
    (model / "training_args.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="out/training_args.yaml"):
        stored_settings(model)
    with pytest.raises(CheckpointError):
        evaluate("--model_dir out")


def test_settings_of_a_model_are_read_back_typed(folder: Path) -> None:
    config = Config(learning_rate=1e-5, labels=["yes", "no"])
    values = stored_settings(write_model(folder / "out", learning_rate=1e-5, labels=["yes", "no"]))
    assert Config(**values) == config


def test_each_script_refuses_the_others_flags() -> None:
    own = "--model_name_or_path m --data_dir d --output_dir o "
    assert refusal(own + "--model_dir x") == ["--model_dir is a flag of bertpair evaluate, not of training"]
    assert refusal("--model_name_or_path x --model_dir y", "evaluate") == [
        "--model_name_or_path: the trained model to evaluate is named by --model_dir"
    ]


flag_names = st.sampled_from([*SETTINGS, "fp16", "server_ip", "model_type", "config", "x", ""]).map(
    "--{}".format
)
flag_words = st.sampled_from(
    "true false null auto -1 0 1 2e-5 a a=1 steps no c.yaml out bert mnli cpu".split()
)
argv = st.lists(flag_names | flag_words | st.text(max_size=6), max_size=10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)
@given(argv, st.sampled_from(["train", "evaluate"]))
@example(["--config", "."], "train")
@example(["--config", "\0"], "train")
@example(["--model_dir", "\ud800"], "evaluate")
@example(["--labels=\ud800", "b"], "train")
def test_any_words_are_settings_or_are_refused(words: list[str], script: str) -> None:
    try:
        parsed = parse_command_line(words, script)  # type: ignore[arg-type]
    except (BertpairError, SystemExit) as error:
        assert str(error) or isinstance(error, SystemExit)
    else:
        assert parsed.explicit <= SETTINGS.keys()


yaml_lines = st.builds(
    "{}: {}\n".format,
    st.sampled_from([*SETTINGS, "fp16", "debug", "nonsense"]),
    st.sampled_from(
        ["1", "-1", "2e-5", "yes", "null", "[a, b]", "{a: 1}", "auto", "'x'", "steps", "010", "[", "*a"]
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)
@given(st.lists(yaml_lines, max_size=8).map("".join).map(str.encode) | st.binary(max_size=40), st.booleans())
def test_any_config_yaml_is_read_or_refused(folder: Path, content: bytes, is_evaluation: bool) -> None:
    (folder / "config.yaml").write_bytes(content)
    try:
        parsed = parse_command_line([], "evaluate" if is_evaluation else "train")
    except BertpairError as error:
        assert str(error)
    else:
        assert isinstance(parsed.config, Config)
