"""Every setting, in one flat dataclass: the field names are the YAML keys and the flags.

Names are run_glue's where it has one. Its defaults too, but for weight_decay 0.01, learning_rate 2e-5 and
batches of 16. A field says what it may hold, what it means, what a resume makes of another value, and whom
it belongs to. Settings of the model go wherever the model goes, and the names of its data files with them;
those of the run end with it.

A resume takes another value as it is (free), says that results agree to rounding only (warn), wants
resume_anyway for it (anyway) or refuses it (never). Those marked `end` are free, and decide when a run ends
or which weights and figures it ends with: a finished run is then opened again.
"""

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from bertpair.errors import CheckpointError, ConfigError, list_faults, listed, show
from bertpair.settings.files import read_settings
from bertpair.settings.tasks import CLASS_METRICS, METRICS, SCORE_METRICS, find_task
from bertpair.settings.values import (
    COLUMN,
    DEVICE,
    HEADER,
    LABEL,
    LABELS,
    PATH,
    PATHS,
    REPORTS,
    RESUME,
    SWITCH,
    TEXT,
    WEIGHTS,
    Kind,
    choice,
    convert_all,
    number,
    or_null,
    whole,
)

TRAINING_ARGS = "training_args.yaml"
ResumeRule = Literal["free", "end", "warn", "anyway", "never"]
Owner = Literal["model", "files", "run"]
_COUNT = whole(1)
_LIMIT = or_null(_COUNT)
_MAYBE = or_null(SWITCH)
_COLUMN_B = or_null(COLUMN)
_SCHEDULE = choice("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Setting:
    """One field of `Config`: what --help, a check or a resume wants to know of it."""

    name: str
    group: str
    kind: Kind
    default: object
    help: str
    resume: ResumeRule
    owner: Owner


def setting(
    default: object, kind: Kind, help: str, resume: ResumeRule = "never", *, group: str, owner: Owner = "run"
) -> Any:
    """A dataclass field that carries what a `Setting` needs."""
    metadata = {"group": group, "kind": kind, "help": help, "resume": resume, "owner": owner}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _accept_task(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError
    try:
        find_task(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("task_name: ")) from None
    return value


_TASK = or_null(Kind("the name of a task", _accept_task))
_data = partial(setting, group="data")
_files = partial(setting, group="data", owner="files")
_layout = partial(setting, group="data", owner="model")
_model = partial(setting, group="model")
_optim = partial(setting, group="optimisation")
_device = partial(setting, group="device")
_run = partial(setting, group="run")
_evaluate = partial(setting, group="evaluate")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is read, and how."""

    data_dir: str | None = _files(None, PATH, "folder with the TSV files", "end")
    train_file: list[str] | None = _files(None, PATHS, "training TSV; null: the task's, in data_dir", "free")
    dev_file: list[str] | None = _files(None, PATHS, "dev TSV; null: the task's, in data_dir", "end")
    test_file: list[str] | None = _files(None, PATHS, "test TSV; null: the task's, in data_dir", "free")
    task_name: str | None = _layout(None, _TASK, "preset of columns, labels, files and metrics")
    text_a_column: str | int = _layout("auto", COLUMN, "first text; auto: the task's, else 1")
    text_b_column: str | int | None = _layout(
        "auto", _COLUMN_B, "second; null: none; auto: the task's, else 2"
    )
    label_column: str | int = _layout("auto", COLUMN, "label or score; auto: the task's, else 3")
    has_header: bool | Literal["auto"] = _layout(
        "auto", HEADER, "the first row is a header; auto: as the task"
    )
    quoting: str = _layout("none", choice("none", "csv"), "csv: quoted fields may hold tabs and newlines")
    labels: list[str] | None = _layout(None, LABELS, "labels in id order; null: found in the training data")
    positive_label: str | None = _layout(
        None, LABEL, "with two labels: the one that f1 is of; null: as the task, else that with id 1", "end"
    )
    problem_type: str | None = _layout(
        None, or_null(choice("classification", "regression")), "null: as the task, else classification"
    )
    on_bad_row: str = _data("error", choice("error", "skip"), "skip: count and list bad rows, and go on")
    max_seq_length: int = _layout(128, whole(5, 65_535), "tokens of a pair, special ones included")
    max_train_samples: int | None = _data(None, _LIMIT, "only the first rows of the training data")
    max_eval_samples: int | None = _data(None, _LIMIT, "only the first rows of the dev data", "end")
    token_cache_dir: str | None = _data(None, PATH, "of token ids; null: the user's cache folder", "free")
    overwrite_cache: bool = _data(False, SWITCH, "tokenize anew even if token ids are kept", "free")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network training begins with."""

    model_name_or_path: str | None = _model(None, TEXT, "model folder, or name on the Hugging Face hub")
    revision: str | None = _model(None, TEXT, "branch, tag or commit on the hub")
    cache_dir: str | None = _model(None, PATH, "where hub models are kept; null: the hub's own cache", "free")
    config_name: str | None = _model(None, TEXT, "another folder or name for config.json")
    tokenizer_name: str | None = _model(None, TEXT, "another folder or name for the vocabulary")
    do_lower_case: bool | None = _model(
        None, _MAYBE, "null: as the tokenizer or vocabulary says", owner="model"
    )
    from_scratch: bool = _model(False, SWITCH, "a folder without weights starts from random ones")
    new_head: bool = _model(False, SWITCH, "replace a classifier that was trained for other labels")
    compact_vocabulary: bool = _model(False, SWITCH, "train only the word rows in use, with the same result")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """How it is trained."""

    learning_rate: float = _optim(2e-5, number(above=0, high=1), "the highest learning rate", "anyway")
    weight_decay: float = _optim(0.01, number(low=0, high=100), "decoupled decay of weights", "anyway")
    adam_beta1: float = _optim(0.9, number(low=0, below=1), "decay of AdamW's mean of gradients")
    adam_beta2: float = _optim(0.999, number(low=0, below=1), "decay of AdamW's mean of squares")
    adam_epsilon: float = _optim(1e-8, number(above=0), "added to AdamW's denominator")
    max_grad_norm: float = _optim(1.0, number(low=0), "gradients are clipped to this norm; 0: never")
    lr_scheduler_type: str = _optim("linear", _SCHEDULE, "of the learning rate after the warm-up", "anyway")
    warmup_steps: int = _optim(0, whole(0), "steps of rising learning rate", "anyway")
    warmup_ratio: float = _optim(0.0, number(low=0, high=1), "warm-up as a part of all steps", "anyway")
    num_train_epochs: float = _optim(
        3.0, number(above=0, high=1e6), "passes over the data, fractions too", "anyway"
    )
    max_steps: int = _optim(-1, whole(1, also=-1), "stop after so many steps; -1: num_train_epochs", "anyway")
    per_device_train_batch_size: int = _optim(16, _COUNT, "rows a device trains on at a time")
    per_device_eval_batch_size: int = _optim(
        16,
        _COUNT,
        "rows it evaluates at a time",
        "free",
        owner="model",  # or figures would differ in rounding
    )
    gradient_accumulation_steps: int = _optim(1, _COUNT, "batches that make up one step")
    group_by_length: bool = _optim(True, SWITCH, "rows of like length share a batch")
    pad_to_multiple_of: int = _optim(8, whole(1, 512), "batch lengths are rounded up to a multiple")
    label_smoothing: float = _optim(0.0, number(low=0, below=1), "part of the target spread over all labels")
    class_weights: str | dict[str, float] | None = _optim(None, WEIGHTS, "balanced: rare classes more")
    max_skipped_steps: int = _optim(10, whole(0), "more non-finite steps in a row end the run", "anyway")
    seed: int = _optim(42, whole(0, 2**32 - 1), "of all that is random")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What computes, and in which precision."""

    device: str = _device("auto", DEVICE, "where to compute", "warn")
    amp: str = _device(
        "auto", choice("auto", "off", "bf16", "fp16"), "mixed precision", "anyway", owner="model"
    )
    deterministic: bool = _device(False, SWITCH, "bitwise repeatable on CUDA too, and slower", "anyway")
    num_threads: int | None = _device(None, or_null(whole(1, 1024)), "null: as many as cores", "warn")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run does, and what it writes when."""

    do_train: bool | None = _run(None, _MAYBE, "train; null: unless only do_eval is given", "free")
    do_eval: bool | None = _run(None, _MAYBE, "evaluate; null: unless only do_train is given", "end")
    output_dir: str | None = _run(None, PATH, "folder for the model and its checkpoints", "free")
    overwrite_output_dir: bool = _run(False, SWITCH, "a new run may replace the old one there", "free")
    resume: str | Literal[False] = _run(False, RESUME, "go on from a checkpoint; auto: the newest", "free")
    resume_anyway: bool = _run(False, SWITCH, "resume although settings that allow it have changed", "free")
    logging_steps: int = _run(500, whole(-1), "steps between lines of metrics.jsonl; 0 or -1: none", "free")
    save_steps: int = _run(500, whole(-1), "steps between checkpoints; 0 or -1: none", "free")
    eval_strategy: str = _run("epoch", choice("no", "steps", "epoch"), "when to evaluate in training", "end")
    eval_steps: int | None = _run(None, _LIMIT, "steps between evaluations; null: logging_steps", "end")
    evaluate_during_training: bool = _run(False, SWITCH, "the old name of eval_strategy steps", "free")
    save_total_limit: int | None = _run(None, _LIMIT, "checkpoints kept besides the best", "free")
    metric_for_best_model: str | None = _run(
        None, or_null(choice(*METRICS)), "what to watch; null: the task's first metric", "end", owner="model"
    )
    load_best_model_at_end: bool = _run(False, SWITCH, "the final folder holds the best weights", "end")
    early_stopping_patience: int | None = _run(None, _LIMIT, "evaluations without a better one", "end")
    report_to: list[str] = _run(["none"], REPORTS, "other places to send metrics to", "free")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What evaluate.py scores."""

    model_dir: str | None = _evaluate(None, PATH, "trained folder; null: the configured output_dir", "free")
    data_file: list[str] | None = _evaluate(None, PATHS, "TSV to score; null: the dev file", "free")
    predict: bool = _evaluate(False, SWITCH, "score a file without labels", "free")
    all_checkpoints: bool = _evaluate(False, SWITCH, "evaluate each checkpoint of the folder", "free")
    compare: list[str] | None = _evaluate(None, PATHS, "other trained folders to set beside it", "free")
    eval_output_dir: str | None = _evaluate(None, PATH, "where to write; null: in the model folder", "free")


@dataclass(frozen=True, kw_only=True)
class Config(EvaluateSettings, RunSettings, DeviceSettings, OptimSettings, ModelSettings, DataSettings):
    """The settings of a run or an evaluation, those of the last base first. `check_config` says whether they
    are sound."""

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


_DEFAULTS = Config()
SETTINGS: dict[str, Setting] = {
    item.name: Setting(item.name, default=getattr(_DEFAULTS, item.name), **item.metadata)
    for item in fields(Config)
}


_KINDS = {name: item.kind for name, item in SETTINGS.items()}


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
    """The same with every value in its own type (a `Path` becomes text); ConfigError with all faults."""
    values, faults = convert_all(_KINDS, asdict(config), {})
    checked = Config(**values)
    raise_faults([*faults, *joint_faults(checked, training)])
    return checked


def joint_faults(config: Config, training: bool, known: Container[str] = ()) -> list[str]:
    """Contradictions and, for training, what nobody set; names in `known` have their fault already."""
    needs = {
        "a model": ("model_name_or_path",),
        "data": ("data_dir", "train_file"),
        "a folder to write to": ("output_dir",),
    }
    return contradictions(config) + [
        f"{' or '.join(names)} must be set: training needs {what}"
        for what, names in needs.items()
        if training and not any(getattr(config, name) or name in known for name in names)
    ]


def raise_faults(faults: Sequence[str]) -> None:
    """ConfigError with all of them, if there are any."""
    if faults:
        raise ConfigError(list_faults(faults))


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder's run; none if the folder does not say, CheckpointError if it is damaged."""
    path = folder / TRAINING_ARGS
    if not os.path.lexists(path):
        return {}
    try:
        file = read_settings(path)
        where = {name: f"{file.where(name)}: {name}" for name in file.values}
        values, faults = convert_all(_KINDS, file.values, where)
        raise_faults([*file.faults, *faults])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return values


def model_settings(folder: Path) -> dict[str, Any]:
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
    values = {name: value for name, value in asdict(config).items() if SETTINGS[name].group != "evaluate"}
    text: str = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


def changed_settings(
    old: Mapping[str, object], new: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    """(name, old, new) of each setting that differs; one that is absent counts as its default."""
    changed = []
    for name, item in SETTINGS.items():
        before, after = old.get(name, item.default), new.get(name, item.default)
        if before != after:
            changed.append((name, before, after))
    return changed


def contradictions(config: Config) -> list[str]:
    """A fault for each contradiction among typed settings, defaults included."""
    c = config
    faults = _column_faults(c)
    foreign = {"regression": CLASS_METRICS, "classification": SCORE_METRICS}.get(c.problem_type or "", ())
    classes = ("labels", "class_weights", "label_smoothing") if c.problem_type == "regression" else ()
    evaluated = ("load_best_model_at_end", "early_stopping_patience") if c.eval_strategy == "no" else ()
    weights = c.class_weights if c.labels and isinstance(c.class_weights, dict) else {}
    unknown = [label for label in weights if label not in (c.labels or ())]
    rules: list[tuple[object, str]] = [
        (
            c.metric_for_best_model in foreign,
            f"metric_for_best_model {c.metric_for_best_model} is not measured with "
            f"problem_type {c.problem_type}",
        ),
        *((getattr(c, name), f"{name} is only for classification") for name in classes),
        (unknown, f"class_weights: found {listed(unknown)}, not among labels"),
        (
            c.warmup_steps and c.warmup_ratio,
            f"warmup_steps {c.warmup_steps} and warmup_ratio {c.warmup_ratio:g} are two warm-ups: set one",
        ),
        (
            (c.warmup_steps or c.warmup_ratio) and c.lr_scheduler_type == "constant",
            "lr_scheduler_type constant has no warm-up: use constant_with_warmup",
        ),
        (
            c.evaluate_during_training and c.eval_strategy != "steps",
            f"evaluate_during_training means eval_strategy steps, found eval_strategy {c.eval_strategy}",
        ),
        (
            c.eval_strategy == "steps" and not c.eval_steps and c.logging_steps < 1,
            f"eval_strategy steps needs eval_steps, as logging_steps is {c.logging_steps}",
        ),
        *((getattr(c, name), f"{name} needs an eval_strategy, found no") for name in evaluated),
        (
            c.do_train is False and c.do_eval is False,
            "do_train and do_eval are both false: there is nothing to do",
        ),
        (
            c.resume and c.overwrite_output_dir,
            "resume goes on with the run in output_dir, overwrite_output_dir replaces it: set one",
        ),
        (c.resume_anyway and not c.resume, "resume_anyway says how to resume: it needs resume"),
        (
            c.amp == "fp16" and c.device == "cpu",
            "amp fp16 needs a GPU, found device cpu; on a CPU use auto, off or bf16",
        ),
    ]
    return faults + [fault for is_broken, fault in rules if is_broken]


def _column_faults(config: Config) -> list[str]:
    names = ("text_a_column", "text_b_column", "label_column")
    given = {name: getattr(config, name) for name in names if getattr(config, name) not in ("auto", None)}
    faults = []
    if config.has_header is False:
        named = [(name, column) for name, column in given.items() if isinstance(column, str)]
        faults += [
            f"{name} {show(column)} is a header name, but has_header is false" for name, column in named
        ]
    seen: dict[object, str] = {}
    for name, column in given.items():
        first = seen.setdefault(column, name)
        if first != name:
            faults.append(f"{first} and {name} are the same column, {show(column)}")
    return faults
