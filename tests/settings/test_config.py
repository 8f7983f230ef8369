"""The settings as one dataclass: documented, checked, written and read back, compared on a resume."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertpair.errors import ConfigError
from bertpair.settings.command_line import parse_command_line
from bertpair.settings.config import GROUPS, SETTINGS, Config, EvaluateSettings, changed_settings
from bertpair.settings.contradictions import check_config, settle
from bertpair.settings.files import parse_settings, read_settings
from bertpair.settings.stored import as_flags, dump_yaml, stored_settings
from bertpair.settings.tasks import CLASS_METRICS, SCORE_METRICS

DESIGNED = {
    "Data": """data_dir train_file dev_file test_file file_format task_name text_a_column text_b_column
        text_separator label_column has_header quoting labels positive_label label_order group_column
        problem_type on_bad_row max_seq_length truncation max_train_samples max_eval_samples""",
    "Model": """model_name_or_path model_type pooling revision cache_dir config_name tokenizer_name
        do_lower_case from_scratch new_head compact_vocabulary""",
    "Training": """learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
        lr_scheduler_type warmup_steps warmup_ratio num_train_epochs max_steps per_device_train_batch_size
        per_device_eval_batch_size gradient_accumulation_steps group_by_length pad_to_multiple_of
        label_smoothing class_weights max_skipped_steps seed""",
    "Device": "device amp deterministic num_threads ddp_timeout",
    "Output, checkpoints and evaluations": """do_train do_eval output_dir overwrite_output_dir resume
        resume_anyway logging_steps save_steps eval_strategy eval_steps evaluate_during_training
        save_total_limit metric_for_best_model load_best_model_at_end early_stopping_patience with_texts
        report_to""",
    "Evaluating a trained model": """engine quantize calibration_file quantize_check temperature threshold
        model_dir data_file keep_columns predictions_format predict
        all_checkpoints compare all_figures report fit_temperature
        fit_threshold eval_output_dir""",
}
RUN_GLUE_DEFAULTS = {
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 128,
    "logging_steps": 500,
    "save_steps": 500,
    "save_total_limit": None,
    "seed": 42,
    "weight_decay": 0.01,  # run_glue: 0.0
    "learning_rate": 2e-5,  # run_glue: 5e-5
    "per_device_train_batch_size": 16,  # run_glue: 8
    "per_device_eval_batch_size": 16,
    "eval_strategy": "epoch",
    "do_train": None,
    "do_eval": None,
    "resume": False,
}
OWN_DEFAULTS = {
    "quoting": "none",
    "text_separator": " ",
    "on_bad_row": "error",
    "truncation": "longest_first",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "group_by_length": True,
    "pad_to_multiple_of": 8,
    "label_smoothing": 0.0,
    "max_skipped_steps": 10,
    "report_to": ["none"],
    "ddp_timeout": 600,
    "predictions_format": "tsv",
}


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(Config(**values))
    return str(caught.value)


def test_every_designed_setting_is_there_in_its_group() -> None:
    found = {title: list(group.model_fields) for title, group in GROUPS.items()}
    assert found == {group: names.split() for group, names in DESIGNED.items()}
    assert list(SETTINGS) == list(Config.model_fields)


@pytest.mark.parametrize(("name", "value"), RUN_GLUE_DEFAULTS.items())
def test_defaults_are_run_glues_but_for_those_known_better(name: str, value: object) -> None:
    assert SETTINGS[name].default == value and type(SETTINGS[name].default) is type(value)


def test_of_the_other_defaults_those_that_decide_something_are_known() -> None:
    others = {name: item.default for name, item in SETTINGS.items() if name not in RUN_GLUE_DEFAULTS}
    assert {k: v for k, v in others.items() if v not in (None, "auto") and v is not False} == OWN_DEFAULTS
    torchs = inspect.signature(torch.optim.AdamW).parameters
    assert torchs["betas"].default == (OWN_DEFAULTS["adam_beta1"], OWN_DEFAULTS["adam_beta2"])


def test_defaults_are_sound_and_of_their_own_kind() -> None:
    assert check_config(Config()) == Config()
    assert Config(**{name: item.default for name, item in SETTINGS.items()}) == Config()
    assert Config().report_to is not Config().report_to


@pytest.mark.parametrize(
    ("train", "evaluate", "runs"),
    [
        (None, None, (True, True)),
        (True, None, (True, False)),
        (None, True, (False, True)),
        (True, True, (True, True)),
        (False, None, (False, True)),
        (None, False, (True, False)),
    ],
)
def test_neither_given_means_both_else_only_those_given(
    train: bool | None, evaluate: bool | None, runs: tuple[bool, bool]
) -> None:
    config = Config(do_train=train, do_eval=evaluate)
    assert (config.runs_training, config.runs_evaluation) == runs


def test_the_interval_of_evaluations() -> None:
    assert Config().eval_interval is None
    assert Config(eval_strategy="steps", logging_steps=7).eval_interval == 7
    assert Config(eval_strategy="steps", logging_steps=7, eval_steps=3).eval_interval == 3


def test_all_faults_come_at_once() -> None:
    lines = refusal(learning_rate=-1, seed="x", labels=["a", True], amp="fp32").splitlines()
    assert [line.split(":")[0] for line in lines] == ["labels", "learning_rate", "seed", "amp"]
    assert "quote it" in lines[0]
    lines = refusal(warmup_steps=1, warmup_ratio=0.5, do_train=False, do_eval=False).splitlines()
    assert len(lines) == 2 and "two warm-ups" in lines[0] and "nothing to do" in lines[1]


def test_values_get_their_own_types_and_do_not_change() -> None:
    config = Config(
        data_dir=Path("d"), train_file="t.tsv", learning_rate="2e-5", resume=True, num_train_epochs=3
    )  # type: ignore[arg-type]
    assert (config.data_dir, config.train_file, config.learning_rate) == ("d", ["t.tsv"], 2e-5)
    assert config.resume == "auto" and isinstance(config.num_train_epochs, float)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_training_needs_more_than_an_evaluation() -> None:
    with pytest.raises(ConfigError, match="training needs a model"):
        check_config(Config(), training=True)
    sound = Config(model_name_or_path="m", data_dir="d", output_dir="o")
    assert check_config(sound, training=True) == sound


def test_a_task_that_is_none_is_refused_with_a_suggestion() -> None:
    message = refusal(task_name="mnly")
    assert message.startswith("task_name: found 'mnly'; did you mean mnli?")
    assert check_config(Config(task_name="MNLI-MM")).task_name == "MNLI-MM"


def test_eval_strategy_follows_from_the_others_unless_it_is_given() -> None:
    assert settle({"evaluate_during_training": True})["eval_strategy"] == "steps"
    assert settle({"do_train": True})["eval_strategy"] == "no"
    assert "eval_strategy" not in settle({"do_train": True, "do_eval": True})
    assert settle({"do_train": True, "eval_strategy": "epoch"})["eval_strategy"] == "epoch"


def test_written_settings_read_back_the_same(tmp_path: Path) -> None:
    files = ["a.tsv", "b\u0085\ufeff\x01.tsv"]
    config = Config(
        train_file=files,
        dev_file=files,  # the same list twice: YAML must not write an alias
        labels=["yes", "no", "010", "1:30", "null", "正 ", "=", "2020-01-01", "1_000", "😀", "# x"],
        class_weights={"yes": 1e-5, "no": 3.0},
        amp="off",
        eval_strategy="no",
        resume="auto",
        label_column="3",
        text_b_column=None,
        text_a_column=0,
        learning_rate=1e-5,
        output_dir="on",
    )
    path = tmp_path / "training_args.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    found = read_settings(path)
    assert Config(**stored_settings(tmp_path)) == config
    assert yaml.safe_load(path.read_text()) == found.values
    assert "model_dir" not in found.values and found.values.keys() == {
        name for name in SETTINGS if name not in EvaluateSettings.model_fields
    }


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
file_names = words.filter(lambda text: not text.isspace() and text[0] != "~")  # that is the home folder
labels = st.lists(words.filter(str.strip), min_size=2, max_size=5, unique=True)


@settings(max_examples=60, deadline=2000)
@given(
    words,
    st.lists(file_names, min_size=1, max_size=3),
    labels,
    st.floats(1e-300, 1),
    st.floats(0, 100),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**32 - 1),
)
@example("\u2028", ["\x85b", "a\r\n b"], ["\ufeff", "x \t\u2029"], 1e-5, 0.0, 1.0, 0)
def test_any_sound_settings_read_back_the_same(
    word: str, paths: list[str], names: list[str], rate: float, decay: float, weight: float, seed: int
) -> None:
    config = Config(
        data_dir=paths[0],
        train_file=paths,
        labels=names,
        class_weights={name: weight for name in names},
        text_a_column=word,
        learning_rate=rate,
        weight_decay=decay,
        seed=seed,
    )
    found = parse_settings(dump_yaml(config).encode(), "training_args.yaml")
    assert not found.faults and check_config(Config(**found.values)) == config


def test_a_resume_knows_what_may_change() -> None:
    rules = {name: item.resume for name, item in SETTINGS.items()}
    anyway = """learning_rate weight_decay lr_scheduler_type warmup_steps warmup_ratio
        num_train_epochs max_steps amp""".split()
    never = """labels label_column max_seq_length truncation task_name model_name_or_path do_lower_case
        compact_vocabulary seed max_train_samples group_by_length""".split()
    free = """output_dir train_file logging_steps save_steps save_total_limit per_device_eval_batch_size
        resume resume_anyway do_train""".split()
    end = """data_dir dev_file max_eval_samples do_eval eval_strategy eval_steps positive_label
        metric_for_best_model load_best_model_at_end early_stopping_patience""".split()
    warn = "device num_threads per_device_train_batch_size gradient_accumulation_steps".split()
    rule_of = {"anyway": anyway, "never": never, "free": free, "end": end, "warn": warn}
    for expected, names in rule_of.items():
        assert {name: rules[name] for name in names} == dict.fromkeys(names, expected)


def test_changed_settings_are_listed_with_both_values() -> None:
    old, new = Config(seed=1, labels=["a", "b"]), Config(seed=1, labels=["b", "a"], learning_rate=1e-4)
    assert changed_settings(old, new) == [("labels", ["a", "b"], ["b", "a"]), ("learning_rate", 2e-5, 1e-4)]


def test_metrics_to_watch_are_those_that_are_measured() -> None:
    for metric in (*CLASS_METRICS, *SCORE_METRICS, "loss"):
        order = ["a", "b"] if metric == "qwk" else None
        config = check_config(Config(metric_for_best_model=metric, label_order=order))
        assert config.metric_for_best_model == metric
    assert "metric_for_best_model: expected one of acc, f1" in refusal(metric_for_best_model="accuracy")


def test_settings_of_an_earlier_version_are_passed_over_in_a_models_folder(tmp_path: Path) -> None:
    (tmp_path / "training_args.yaml").write_text("token_cache_dir: c\noverwrite_cache: true\nseed: 3\n")
    assert stored_settings(tmp_path) == {"seed": 3}


plain_words = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9
).filter(lambda text: text not in ("null", "true", "false") and text[0] not in "-–—−~")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data_dir": plain_words,
    "train_file": st.lists(plain_words, min_size=1, max_size=3),
    "text_a_column": st.integers(-9999, 9999) | plain_words.filter(lambda text: text.strip("+0123456789")),
    "text_b_column": st.none() | st.just("second text"),
    "has_header": st.sampled_from(["auto", True]),
    "labels": st.lists(plain_words, min_size=2, max_size=5, unique=True),
    "class_weights": st.just("balanced")
    | st.dictionaries(plain_words, st.floats(1e-6, 1e6), min_size=1, max_size=3),
    "learning_rate": st.floats(1e-300, 1),
    "max_steps": st.integers(1, 2**31 - 1) | st.just(-1),
    "seed": st.integers(0, 2**32 - 1),
    "amp": st.sampled_from(["auto", "off", "bf16"]),
    "do_lower_case": st.sampled_from([None, True, False]),
    "save_total_limit": st.none() | st.integers(1, 99),
    "metric_for_best_model": st.none() | st.sampled_from(["loss", "acc"]),
    "output_dir": plain_words,
    "num_train_epochs": st.floats(1e-3, 1e6),
}
FAULTS: dict[str, tuple[object, list[str]]] = {
    "learning_rate": ("fast", ["fast"]),
    "seed": (-1, ["-1"]),
    "amp": ("fp32", ["fp32"]),
    "labels": (["a"], ["a"]),
    "has_header": ("maybe", ["maybe"]),
    "data_dir": ([], []),
    "class_weights": ({"a": 0}, ["a=0"]),
    "max_steps": (0, ["0"]),
    "learning_rte": (1, ["1"]),
}


def as_words(value: object) -> list[str]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [f"{label}={weight!r}" for label, weight in value.items()]
    return ["null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)]


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=VALUES), st.sets(st.sampled_from(sorted(FAULTS)), max_size=3))
def test_yaml_and_flags_give_the_same_and_every_fault_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], faulty: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model_name_or_path": "m", "data_dir": "d", "output_dir": "o", **given}
    if "labels" in given:  # weights of other labels contradict them
        given.pop("class_weights", None)
    in_yaml = {**given, **{name: FAULTS[name][0] for name in faulty}}
    in_words = {name: as_words(value) for name, value in given.items()} | {
        name: FAULTS[name][1] for name in faulty
    }
    text = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in in_yaml.items())
    Path("own.yaml").write_text(text, encoding="utf-8")
    flags = [word for name, value in in_words.items() for word in (f"--{name}", *value)]
    if not faulty:
        by_file = parse_command_line(["--config", "own.yaml"], "train")
        assert by_file.config.model_dump() == parse_command_line(flags, "train").config.model_dump(), flags
        assert by_file.explicit >= given.keys()
        again = parse_command_line(as_flags(by_file.config), "train").config
        assert again.model_dump() == by_file.config.model_dump()
        return
    with pytest.raises(ConfigError) as of_file:
        parse_command_line(["--config", "own.yaml"], "train")
    with pytest.raises(ConfigError) as of_flags:
        parse_command_line(flags, "train")
    lines = text.split("\n")
    for name in faulty:
        number = next(number for number, line in enumerate(lines, 1) if line.startswith(f"{name}:"))
        what = "unknown setting learning_rte" if name == "learning_rte" else f"{name}: "
        assert f"\nown.yaml:{number}: {what}" in f"\n{of_file.value}", text
        flag = "unknown setting --learning_rte" if name == "learning_rte" else f"--{name}: "
        assert f"\n{flag}" in f"\n{of_flags.value}", flags
