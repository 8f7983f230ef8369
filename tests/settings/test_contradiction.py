"""Settings that cannot stand together are named; those that can are left alone."""

from typing import Any

import pytest

from bertpair.settings.config import Config, contradictions, missing


def found(**values: Any) -> list[str]:
    return contradictions(Config(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps 10 and warmup_ratio 0.1"),
        ({"warmup_steps": 10, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
        ({"evaluate_during_training": True}, "evaluate_during_training means eval_strategy steps"),
        ({"eval_strategy": "steps", "logging_steps": 0}, "needs eval_steps"),
        ({"eval_strategy": "no", "load_best_model_at_end": True}, "load_best_model_at_end needs"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience needs"),
        ({"do_train": False, "do_eval": False}, "nothing to do"),
        ({"resume": "auto", "overwrite_output_dir": True}, "set only one"),
        ({"resume_anyway": True}, "no effect without resume"),
        ({"amp": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
        ({"problem_type": "regression", "metric_for_best_model": "acc"}, "acc is not measured"),
        ({"problem_type": "classification", "metric_for_best_model": "corr"}, "corr is not measured"),
        ({"problem_type": "regression", "labels": ["a", "b"]}, "labels is only for classification"),
        ({"problem_type": "regression", "label_smoothing": 0.1}, "label_smoothing is only"),
        ({"labels": ["a", "b"], "class_weights": {"a": 1.0, "c": 2.0}}, "found 'c', not among labels"),
        ({"has_header": False, "text_a_column": "premise"}, "'premise' is a header name"),
        ({"text_a_column": 1, "text_b_column": 1}, "text_a_column and text_b_column are the same column, 1"),
    ],
)
def test_one_contradiction_is_one_fault(values: dict[str, Any], said: str) -> None:
    (fault,) = found(**values)
    assert said in fault


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"evaluate_during_training": True, "eval_strategy": "steps"},
        {"eval_strategy": "steps", "logging_steps": -1, "eval_steps": 5},
        {"warmup_ratio": 0.1, "lr_scheduler_type": "constant_with_warmup"},
        {"problem_type": "regression", "metric_for_best_model": "loss"},
        {"text_b_column": None, "text_a_column": 0, "label_column": 1, "has_header": False},
        {"labels": ["a", "b"], "class_weights": "balanced"},
        {"amp": "fp16", "device": "cuda"},
        {"do_train": False},
    ],
)
def test_sound_settings_have_no_fault(values: dict[str, Any]) -> None:
    assert found(**values) == []


def test_training_needs_a_model_data_and_a_folder() -> None:
    found = missing(Config())
    assert [fault.split()[0] for fault in found] == ["model_name_or_path", "data_dir", "output_dir"]
    assert len(missing(Config(), known={"train_file", "output_dir"})) == 1
    assert missing(Config(model_name_or_path="m", train_file=["t.tsv"], output_dir="o")) == []
