"""What settings that are sound one by one cannot be together, and what training needs of them."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

from bertpair.errors import listed, raise_faults, show
from bertpair.settings.config import SETTINGS, Config
from bertpair.settings.engine import engine_faults
from bertpair.settings.tasks import CLASS_METRICS, SCORE_METRICS


def settle(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with eval_strategy filled in where it was not given and others say what it must be."""
    settled = dict(values)
    if "eval_strategy" not in settled:
        given = Config(do_train=settled.get("do_train"), do_eval=settled.get("do_eval"))
        if settled.get("evaluate_during_training") or settled.get("eval_steps"):
            settled["eval_strategy"] = "steps"
        elif not given.runs_evaluation:
            settled["eval_strategy"] = "no"
    return settled


def check_config(config: Config, *, training: bool = False) -> Config:
    """The same; ConfigError with all contradictions and, for training, what nobody set."""
    raise_faults([*contradictions(config), *(missing(config) if training else ())])
    return config


def missing(config: Config, known: Container[str] = ()) -> list[str]:
    """What training needs and nobody set; names in `known` have their fault already."""
    needs = {
        "a model to start from": ("model_name_or_path",),
        "data": ("data_dir", "train_file"),
        "a folder to write to": ("output_dir",),
    }
    return [
        f"{' or '.join(names)} must be set: training needs {what}. "
        f"Example: --{names[-1]} {SETTINGS[names[-1]].example}"
        for what, names in needs.items()
        if not any(getattr(config, name) or name in known for name in names)
    ]


def contradictions(config: Config) -> list[str]:
    """A fault for each contradiction among typed settings, defaults included."""
    return [*_column_faults(config), *_clashes(config)]


def _clashes(c: Config) -> Iterator[str]:
    foreign = {"regression": CLASS_METRICS, "classification": SCORE_METRICS}.get(c.problem_type or "", ())
    if c.metric_for_best_model in foreign:
        yield f"metric_for_best_model {c.metric_for_best_model} is not measured in a {c.problem_type}"
    if c.metric_for_best_model == "qwk" and not c.label_order and c.problem_type != "regression":
        yield "metric_for_best_model qwk needs label_order"
    of_labels = ("labels", "label_order", "class_weights", "label_smoothing")
    for name in of_labels if c.problem_type == "regression" else ():
        if getattr(c, name):
            yield f"{name} is only for classification"
    weights = c.class_weights if c.labels and isinstance(c.class_weights, dict) else {}
    if unknown := [label for label in weights if label not in (c.labels or ())]:
        yield f"class_weights: found {listed(unknown)}, not among labels"
    if c.warmup_steps and c.warmup_ratio:
        found = f"warmup_steps {c.warmup_steps} and warmup_ratio {c.warmup_ratio:g}"
        yield f"{found} are two warm-ups: set only one"
    if (c.warmup_steps or c.warmup_ratio) and c.lr_scheduler_type == "constant":
        yield "lr_scheduler_type constant has no warm-up: use constant_with_warmup"
    if c.evaluate_during_training and c.eval_strategy != "steps":
        yield f"evaluate_during_training means eval_strategy steps, found eval_strategy {c.eval_strategy}"
    if c.eval_strategy == "steps" and not c.eval_steps and c.logging_steps < 1:
        yield f"eval_strategy steps needs eval_steps, as logging_steps is {c.logging_steps}"
    for name in ("load_best_model_at_end", "early_stopping_patience") if c.eval_strategy == "no" else ():
        if getattr(c, name):
            yield f"{name} needs an eval_strategy, found no"
    if c.do_train is False and c.do_eval is False:
        yield "do_train and do_eval are both false: there is nothing to do"
    if c.resume and c.overwrite_output_dir:
        yield "resume goes on with the run in output_dir, overwrite_output_dir replaces it: set only one"
    if c.resume_anyway and not c.resume:
        yield "resume_anyway has no effect without resume"
    if c.amp == "fp16" and c.device == "cpu":
        yield "amp fp16 needs a GPU, found device cpu; on a CPU use auto, off or bf16"
    yield from engine_faults(c, c.device)
    yield from _fitting_faults(c)
    yield from _predicting_faults(c)
    if c.quantize_check and not c.quantize:
        yield "quantize_check has no effect without quantize int8"


def _predicting_faults(c: Config) -> Iterator[str]:
    if c.predictions_format != "tsv" and not c.predict:
        yield f"predictions_format {c.predictions_format} has no effect without predict"
    if "-" in (c.data_file or ()):
        if not c.predict:
            yield "data_file -, the standard input, needs predict"
        if c.all_checkpoints or c.compare or len(c.data_file or ()) > 1:
            yield "data_file -, the standard input, is read once: for one model, and without other files"
    for name in ("report", "all_figures") if c.predict else ():
        if getattr(c, name):
            yield f"{name} needs rows with labels, found predict"


def _fitting_faults(c: Config) -> Iterator[str]:
    for name, other in ("fit_temperature", "temperature"), ("fit_threshold", "threshold"):
        if getattr(c, name) and getattr(c, other) is not None:
            yield f"{name} finds what {other} gives: set only one"
        for needless in ("predict", "all_checkpoints") if getattr(c, name) else ():
            if getattr(c, needless):
                yield f"{name} needs one model and rows with labels, found {needless}"


def _column_faults(config: Config) -> Iterator[str]:
    names = ("text_a_column", "text_b_column", "label_column")
    given = {name: getattr(config, name) for name in names if getattr(config, name) not in ("auto", None)}
    several = [
        (name, column)
        for name, columns in given.items()
        for column in (columns if isinstance(columns, list) else [columns])
    ]
    for name, column in several:
        if config.has_header is False and config.file_format != "jsonl" and isinstance(column, str):
            yield f"{name} {show(column)} is a header name, but has_header is false"
    seen: dict[object, str] = {}
    for name, column in several:
        if (first := seen.get(column)) is not None:
            both = (
                f"{first} names the same column twice"
                if first == name
                else f"{first} and {name} are the same column"
            )
            yield f"{both}, {show(column)}"
        seen.setdefault(column, name)
