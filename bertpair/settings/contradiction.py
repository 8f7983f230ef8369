"""Settings that are sound one by one and cannot stand together, or that training cannot do without."""

from collections.abc import Callable, Container, Mapping
from typing import Any

Values = Mapping[str, Any]
_CLASS_METRICS = ("acc", "f1", "macro_f1", "mcc")
_SCORE_METRICS = ("pearson", "spearmanr", "corr")


def contradictions(values: Values) -> list[str]:
    """A fault for each contradiction among typed settings (all of them, defaults included)."""
    return [fault for find in _CHECKS for fault in find(values)]


def missing_for_training(values: Values, known: Container[str] = ()) -> list[str]:
    """A fault for each thing that training needs and nobody set; names in `known` are faulty already."""
    needs = {
        "a model": ("model_name_or_path",),
        "data": ("data_dir", "train_file"),
        "a folder to write to": ("output_dir",),
    }
    return [
        f"{' or '.join(names)} must be set: training needs {what}"
        for what, names in needs.items()
        if not any(values[name] or name in known for name in names)
    ]


def _schedule(values: Values) -> list[str]:
    faults = []
    steps, ratio = values["warmup_steps"], values["warmup_ratio"]
    if steps and ratio:
        faults.append(f"warmup_steps {steps} and warmup_ratio {ratio:g} are two warm-ups: set one")
    if (steps or ratio) and values["lr_scheduler_type"] == "constant":
        faults.append("lr_scheduler_type constant has no warm-up: use constant_with_warmup")
    return faults


def _evaluation(values: Values) -> list[str]:
    faults = []
    strategy = values["eval_strategy"]
    if values["evaluate_during_training"] and strategy != "steps":
        faults.append(f"evaluate_during_training means eval_strategy steps, found eval_strategy {strategy}")
    if strategy == "steps" and not values["eval_steps"] and values["logging_steps"] < 1:
        faults.append(f"eval_strategy steps needs eval_steps, as logging_steps is {values['logging_steps']}")
    if strategy == "no":
        needy = ("load_best_model_at_end", "early_stopping_patience")
        faults += [f"{name} needs an eval_strategy, found no" for name in needy if values[name]]
    return faults


def _run(values: Values) -> list[str]:
    faults = []
    if values["do_train"] is False and values["do_eval"] is False:
        faults.append("do_train and do_eval are both false: there is nothing to do")
    if values["resume"] and values["overwrite_output_dir"]:
        faults.append("resume goes on with the run in output_dir, overwrite_output_dir replaces it: set one")
    if values["resume_anyway"] and not values["resume"]:
        faults.append("resume_anyway says how to resume: it needs resume")
    if values["amp"] == "fp16" and values["device"] == "cpu":
        faults.append("amp fp16 needs a GPU, found device cpu; on a CPU use auto, off or bf16")
    return faults


def _problem(values: Values) -> list[str]:
    problem, metric = values["problem_type"], values["metric_for_best_model"]
    foreign = {"regression": _CLASS_METRICS, "classification": _SCORE_METRICS}.get(problem, ())
    faults = []
    if metric in foreign:
        faults.append(f"metric_for_best_model {metric} is not measured with problem_type {problem}")
    if problem == "regression":
        classes = ("labels", "class_weights", "label_smoothing")
        faults += [f"{name} is only for classification" for name in classes if values[name]]
    return faults


def _labels(values: Values) -> list[str]:
    labels, weights = values["labels"], values["class_weights"]
    if not labels or not isinstance(weights, dict) or set(weights) <= set(labels):
        return []
    unknown = ", ".join(repr(label) for label in weights if label not in labels)
    return [f"class_weights: found {unknown}, not among labels"]


def _columns(values: Values) -> list[str]:
    names = ("text_a_column", "text_b_column", "label_column")
    given = {name: values[name] for name in names if values[name] not in ("auto", None)}
    faults = []
    if values["has_header"] is False:
        named = [(name, column) for name, column in given.items() if isinstance(column, str)]
        faults += [f"{name} {column!r} is a header name, but has_header is false" for name, column in named]
    seen: dict[object, str] = {}
    for name, column in given.items():
        first = seen.setdefault(column, name)
        if first != name:
            faults.append(f"{first} and {name} are the same column, {column!r}")
    return faults


_Check = Callable[[Values], list[str]]
_CHECKS: tuple[_Check, ...] = (_columns, _problem, _labels, _schedule, _evaluation, _run)
