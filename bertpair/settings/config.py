"""Every setting, in one flat model: the field names are the YAML keys and the flags.

Names are run_glue's where it has one. Its defaults too, but for weight_decay 0.01, learning_rate 2e-5 and
batches of 16. A field says what it may hold, what it means, what a resume makes of another value, and whom
it belongs to. Settings of the model go wherever the model goes, and the names of its data files with them;
those of the run end with it.

A resume takes another value as it is (free), says that results agree to rounding only (warn), wants
resume_anyway for it (anyway) or refuses it (never). Those marked `end` are free, and decide when a run ends
or which weights and figures it ends with: a finished run is then opened again.
"""

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, Field, PlainValidator

from bertpair.errors import CheckpointError, ConfigError, list_faults, listed, show
from bertpair.settings.fields import (
    NO,
    ONE_OR_MORE,
    RETIRED,
    Amp,
    Column,
    Device,
    Group,
    Label,
    Labels,
    Path,
    Paths,
    Real,
    Switch,
    Text,
    Weights,
    Whole,
    as_path,
    placed,
    said,
    setting,
    typed,
)
from bertpair.settings.files import read_settings
from bertpair.settings.tasks import CLASS_METRICS, SCORE_METRICS, find_task

TRAINING_ARGS = "training_args.yaml"
_free, _end = partial(setting, resume="free"), partial(setting, resume="end")
_files, _anyway = partial(setting, owner="files"), partial(setting, resume="anyway")
_model = partial(setting, owner="model")


def _known_task(name: str) -> str:
    try:
        find_task(name)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("task_name: ")) from None
    return name


def _as_resume(value: object) -> Literal[False] | str:
    if isinstance(value, bool):
        return "auto" if value else False
    return as_path(value)


Task = Annotated[str, Field(strict=True), AfterValidator(_known_task), said("the name of a task")] | None
Resume = Annotated[
    Literal[False] | str, PlainValidator(_as_resume), said("false, auto or the path of a checkpoint")
]
Reports = Annotated[
    list[Literal["none"]],
    Field(min_length=1),
    ONE_OR_MORE,
    said("none, the only one there is for now"),
]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Metric = Literal["acc", "f1", "macro_f1", "mcc", "pearson", "spearmanr", "corr", "loss"]


class DataSettings(Group):
    """What is read, and how."""

    data_dir: Path = _files(None, "folder with the TSV files", resume="end")
    train_file: Paths = _files(None, "training TSV; null: the task's, in data_dir", resume="free")
    dev_file: Paths = _files(None, "dev TSV; null: the task's, in data_dir", resume="end")
    test_file: Paths = _files(None, "test TSV; null: the task's, in data_dir", resume="free")
    task_name: Task = _model(None, "preset of columns, labels, files and metrics")
    text_a_column: Column = _model("auto", "first text; auto: the task's, else 1")
    text_b_column: Column | None = _model("auto", "second; null: none; auto: the task's, else 2")
    label_column: Column = _model("auto", "label or score; auto: the task's, else 3")
    has_header: Literal["auto"] | Switch = _model("auto", "the first row is a header; auto: as the task")
    quoting: Literal["none", "csv"] = _model("none", "csv: quoted fields may hold tabs and newlines")
    labels: Labels = _model(None, "labels in id order; null: found in the training data")
    positive_label: Label = _model(
        None, "with two labels: the one that f1 is of; null: as the task, else that with id 1", resume="end"
    )
    problem_type: Literal["classification", "regression"] | None = _model(
        None, "null: as the task, else classification"
    )
    on_bad_row: Literal["error", "skip"] = setting("error", "skip: count and list bad rows, and go on")
    max_seq_length: Whole = _model(128, "tokens of a pair, special ones included", ge=5, le=65_535)
    max_train_samples: Whole | None = setting(None, "only the first rows of the training data", ge=1)
    max_eval_samples: Whole | None = _end(None, "only the first rows of the dev data", ge=1)


class ModelSettings(Group):
    """Which network training begins with."""

    model_name_or_path: Text = setting(None, "model folder, or name on the Hugging Face hub")
    revision: Text = setting(None, "branch, tag or commit on the hub")
    cache_dir: Path = _free(None, "where hub models are kept; null: the hub's own cache")
    config_name: Text = setting(None, "another folder or name for config.json")
    tokenizer_name: Text = setting(None, "another folder or name for the vocabulary")
    do_lower_case: Switch | None = _model(None, "null: as the tokenizer or vocabulary says")
    from_scratch: Switch = setting(False, "a folder without weights starts from random ones")
    new_head: Switch = setting(False, "replace a classifier that was trained for other labels")
    compact_vocabulary: Switch = setting(False, "train only the word rows in use, with the same result")


class OptimSettings(Group):
    """How it is trained."""

    learning_rate: Real = _anyway(2e-5, "the highest learning rate", gt=0, le=1)
    weight_decay: Real = _anyway(0.01, "decoupled decay of weights", ge=0, le=100)
    adam_beta1: Real = setting(0.9, "decay of AdamW's mean of gradients", ge=0, lt=1)
    adam_beta2: Real = setting(0.999, "decay of AdamW's mean of squares", ge=0, lt=1)
    adam_epsilon: Real = setting(1e-8, "added to AdamW's denominator", gt=0)
    max_grad_norm: Real = setting(1.0, "gradients are clipped to this norm; 0: never", ge=0.0)
    lr_scheduler_type: Schedule = _anyway("linear", "of the learning rate after the warm-up")
    warmup_steps: Whole = _anyway(0, "steps of rising learning rate", ge=0)
    warmup_ratio: Real = _anyway(0.0, "warm-up as a part of all steps", ge=0, le=1)
    num_train_epochs: Real = _anyway(3.0, "passes over the data, fractions too", gt=0, le=1e6)
    max_steps: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | Literal[-1] = _anyway(
        -1, "stop after so many steps; -1: num_train_epochs"
    )
    per_device_train_batch_size: Whole = setting(16, "rows a device trains on at a time", ge=1)
    # The model's own, or figures would differ in rounding.
    per_device_eval_batch_size: Whole = _model(16, "rows it evaluates at a time", resume="free", ge=1)
    gradient_accumulation_steps: Whole = setting(1, "batches that make up one step", ge=1)
    group_by_length: Switch = setting(True, "rows of like length share a batch")
    pad_to_multiple_of: Whole = setting(8, "batch lengths are rounded up to a multiple", ge=1, le=512)
    label_smoothing: Real = setting(0.0, "part of the target spread over all labels", ge=0, lt=1)
    class_weights: Weights = setting(None, "balanced: rare classes more")
    max_skipped_steps: Whole = _anyway(10, "more non-finite steps in a row end the run", ge=0)
    seed: Whole = setting(42, "of all that is random", ge=0, le=2**32 - 1)


class DeviceSettings(Group):
    """What computes, and in which precision."""

    device: Device = setting("auto", "where to compute", resume="warn")
    amp: Amp = _anyway("auto", "mixed precision", owner="model")
    deterministic: Switch = _anyway(False, "bitwise repeatable on CUDA too, and slower")
    num_threads: Whole | None = setting(None, "null: as many as cores", resume="warn", ge=1, le=1024)


class RunSettings(Group):
    """What a run does, and what it writes when."""

    do_train: Switch | None = _free(None, "train; null: unless only do_eval is given")
    do_eval: Switch | None = _end(None, "evaluate; null: unless only do_train is given")
    output_dir: Path = _free(None, "folder for the model and its checkpoints")
    overwrite_output_dir: Switch = _free(False, "a new run may replace the old one there")
    resume: Resume = _free(False, "go on from a checkpoint; auto: the newest")
    resume_anyway: Switch = _free(False, "resume although settings that allow it have changed")
    logging_steps: Whole = _free(500, "steps between lines of metrics.jsonl; 0 or -1: none", ge=-1)
    save_steps: Whole = _free(500, "steps between checkpoints; 0 or -1: none", ge=-1)
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], NO] = _end(
        "epoch", "when to evaluate in training"
    )
    eval_steps: Whole | None = _end(None, "steps between evaluations; null: logging_steps", ge=1)
    evaluate_during_training: Switch = _free(False, "the old name of eval_strategy steps")
    save_total_limit: Whole | None = _free(None, "checkpoints kept besides the best", ge=1)
    metric_for_best_model: Metric | None = _end(
        None, "what to watch; null: the task's first metric", owner="model"
    )
    load_best_model_at_end: Switch = _end(False, "the final folder holds the best weights")
    early_stopping_patience: Whole | None = _end(None, "evaluations without a better one", ge=1)
    report_to: Reports = _free(["none"], "other places to send metrics to")


class EvaluateSettings(Group):
    """What evaluate.py scores."""

    model_dir: Path = _free(None, "trained folder; null: the configured output_dir")
    data_file: Paths = _free(None, "TSV to score; null: the dev file")
    predict: Switch = _free(False, "score a file without labels")
    all_checkpoints: Switch = _free(False, "evaluate each checkpoint of the folder")
    compare: Paths = _free(None, "other trained folders to set beside it")
    eval_output_dir: Path = _free(None, "where to write; null: in the model folder")


class Config(EvaluateSettings, RunSettings, DeviceSettings, OptimSettings, ModelSettings, DataSettings):
    """The settings of a run or an evaluation, each typed and in its range. ConfigError lists all faults."""

    @property
    def runs_training(self) -> bool:
        """do_train, with its null resolved: neither given means both, else only those given."""
        return self.do_train if self.do_train is not None else not self.do_eval

    @property
    def runs_evaluation(self) -> bool:
        """do_eval, with its null resolved."""
        return self.do_eval if self.do_eval is not None else not self.do_train

    @property
    def eval_interval(self) -> int | None:
        """Steps between evaluations in training, None unless eval_strategy is steps."""
        return (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else None


class Setting(NamedTuple):
    """What a check, a resume or --help wants to know of one field."""

    group: str
    default: Any
    help: str
    resume: Literal["free", "end", "warn", "anyway", "never"] = "never"
    owner: Literal["model", "files", "run"] = "run"


def settings_of(groups: Mapping[str, type[Group]]) -> dict[str, Setting]:
    """The fields of these groups, in order."""
    return {
        name: Setting(title, field.default, str(field.description), **(field.json_schema_extra or {}))  # type: ignore[arg-type]
        for title, group in groups.items()
        for name, field in group.model_fields.items()
    }


GROUPS: dict[str, type[Group]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "optimisation": OptimSettings,
    "device": DeviceSettings,
    "run": RunSettings,
    "evaluate": EvaluateSettings,
}
SETTINGS = settings_of(GROUPS)


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
        "a model": ("model_name_or_path",),
        "data": ("data_dir", "train_file"),
        "a folder to write to": ("output_dir",),
    }
    return [
        f"{' or '.join(names)} must be set: training needs {what}"
        for what, names in needs.items()
        if not any(getattr(config, name) or name in known for name in names)
    ]


def raise_faults(faults: Sequence[str]) -> None:
    """ConfigError with all of them, if there are any."""
    if faults:
        raise ConfigError(list_faults(faults))


def stored_settings(folder: FilePath) -> dict[str, Any]:
    """The settings of a folder's run; none if the folder does not say, CheckpointError if it is damaged."""
    path = folder / TRAINING_ARGS
    if not os.path.lexists(path):
        return {}
    try:
        file = read_settings(path)
        values, faults = typed(Config, {name: v for name, v in file.values.items() if name not in RETIRED})
        raise_faults([*file.faults, *placed(faults, file.where)])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return values


def model_settings(folder: FilePath) -> dict[str, Any]:
    """Those of them that go where the model goes: the model's own, and the names of its data files."""
    return {name: value for name, value in stored_settings(folder).items() if SETTINGS[name].owner != "run"}


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # plain or in single quotes, U+0085 would read as a space
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


def dump_yaml(config: Config) -> str:
    """What training_args.yaml holds: all settings but evaluate.py's, in the order of --help."""
    values = config.model_dump(exclude=set(EvaluateSettings.model_fields))
    text: str = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


def changed_settings(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(name, old, new) of each setting that differs."""
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in SETTINGS)
    return [(name, before, after) for name, before, after in pairs if before != after]


def contradictions(config: Config) -> list[str]:
    """A fault for each contradiction among typed settings, defaults included."""
    return [*_column_faults(config), *_clashes(config)]


def _clashes(c: Config) -> Iterator[str]:
    foreign = {"regression": CLASS_METRICS, "classification": SCORE_METRICS}.get(c.problem_type or "", ())
    if c.metric_for_best_model in foreign:
        yield f"metric_for_best_model {c.metric_for_best_model} is not measured in a {c.problem_type}"
    for name in ("labels", "class_weights", "label_smoothing") if c.problem_type == "regression" else ():
        if getattr(c, name):
            yield f"{name} is only for classification"
    weights = c.class_weights if c.labels and isinstance(c.class_weights, dict) else {}
    if unknown := [label for label in weights if label not in (c.labels or ())]:
        yield f"class_weights: found {listed(unknown)}, not among labels"
    if c.warmup_steps and c.warmup_ratio:
        yield f"warmup_steps {c.warmup_steps} and warmup_ratio {c.warmup_ratio:g} are two warm-ups: set one"
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
        yield "resume goes on with the run in output_dir, overwrite_output_dir replaces it: set one"
    if c.resume_anyway and not c.resume:
        yield "resume_anyway says how to resume: it needs resume"
    if c.amp == "fp16" and c.device == "cpu":
        yield "amp fp16 needs a GPU, found device cpu; on a CPU use auto, off or bf16"


def _column_faults(config: Config) -> Iterator[str]:
    names = ("text_a_column", "text_b_column", "label_column")
    given = {name: getattr(config, name) for name in names if getattr(config, name) not in ("auto", None)}
    for name, column in given.items():
        if config.has_header is False and isinstance(column, str):
            yield f"{name} {show(column)} is a header name, but has_header is false"
    seen: dict[object, str] = {}
    for name, column in given.items():
        first = seen.setdefault(column, name)
        if first != name:
            yield f"{first} and {name} are the same column, {show(column)}"
