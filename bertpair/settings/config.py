"""Every setting, in one flat model: the field names are the YAML keys and the flags.

Names are run_glue's where it has one. Its defaults too, but for weight_decay 0.01, learning_rate 2e-5 and
batches of 16. A field says what it may hold, what it means, what a resume makes of another value, and whom
it belongs to. Settings of the model go wherever the model goes, and the names of its data files with them;
those of the run end with it.

A resume takes another value as it is (free), says that results agree to rounding only (warn), wants
resume_anyway for it (anyway) or refuses it (never). Those marked `end` are free, and decide when a run ends
or which weights and figures it ends with: a finished run is then opened again.
"""

import inspect
import textwrap
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PlainValidator

from bertpair.settings.data import DataSettings
from bertpair.settings.evaluate import EvaluateSettings
from bertpair.settings.fields import (
    NO,
    ONE_OR_MORE,
    Amp,
    Device,
    Group,
    Path,
    Real,
    Switch,
    Text,
    Weights,
    Whole,
    as_path,
    described,
    said,
    setting,
)

_free, _end = partial(setting, resume="free"), partial(setting, resume="end")
_anyway = partial(setting, resume="anyway")
_model = partial(setting, owner="model")


def _as_resume(value: object) -> Literal[False] | str:
    if isinstance(value, bool):
        return "auto" if value else False
    return as_path(value)


Resume = Annotated[
    Literal[False] | str, PlainValidator(_as_resume), said("false, auto or the path of a checkpoint")
]
Reports = Annotated[
    list[Literal["none", "tensorboard"]], Field(min_length=1), ONE_OR_MORE, said("none or tensorboard")
]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Metric = Literal["acc", "f1", "macro_f1", "mcc", "qwk", "pearson", "spearmanr", "corr", "loss"]


class ModelSettings(Group):
    """Which network training begins with."""

    model_name_or_path: Text = setting(
        None,
        "The model to start from: a folder, or a name on the Hugging Face hub.",
        example="bert-base-multilingual-cased",
    )
    model_type: Text = _free(
        None,
        "The kind of network that the model must be, such as bert or xlm-roberta: only a check. "
        "Not given: no check.",
    )
    pooling: Literal["cls", "mean", "max"] | None = _model(
        None,
        "What the classifier reads of the last layer. cls: the vector of the first token. mean: the mean "
        "over all tokens. max: the maximum over all tokens. Not given: what the model has, cls for most.",
    )
    revision: Text = setting(None, "Branch, tag or commit of a model on the hub. Not given: its main branch.")
    cache_dir: Path = _free(
        None, "Folder that keeps models from the hub. Not given: Hugging Face's own cache folder."
    )
    config_name: Text = setting(
        None, "Another folder or hub name to read config.json from. Not given: that of model_name_or_path."
    )
    tokenizer_name: Text = setting(
        None, "Another folder or hub name to read the vocabulary from. Not given: that of model_name_or_path."
    )
    do_lower_case: Switch | None = _model(
        None,
        "Whether texts are turned into lower case. Not given: as the model's tokenizer or vocabulary says.",
    )
    from_scratch: Switch = setting(
        False,
        "Start from random weights if the model folder holds none. Without this, such a folder is an error.",
    )
    new_head: Switch = setting(
        False,
        "Start with a new classifier in place of the model's own. "
        "This is needed when the model was trained for other labels.",
    )
    compact_vocabulary: Switch = setting(
        False,
        "Train only the word embeddings that the data uses, with less memory. "
        "The result is the same up to rounding.",
    )


class OptimSettings(Group):
    """How it is trained."""

    learning_rate: Real = _anyway(2e-5, "The highest learning rate.", gt=0, le=1, example="3e-5")
    weight_decay: Real = _anyway(
        0.01, "Weight decay of AdamW, for all weights but biases and LayerNorm. 0: none.", ge=0, le=100
    )
    adam_beta1: Real = setting(0.9, "Decay rate of AdamW's running mean of gradients.", ge=0, lt=1)
    adam_beta2: Real = setting(0.999, "Decay rate of AdamW's running mean of squared gradients.", ge=0, lt=1)
    adam_epsilon: Real = setting(1e-8, "Number added to the denominator of AdamW's update.", gt=0)
    max_grad_norm: Real = setting(
        1.0, "Gradients with a larger norm than this are scaled down to it. 0: never.", ge=0.0
    )
    lr_scheduler_type: Schedule = _anyway(
        "linear",
        "How the learning rate changes after the warm-up. linear and cosine: it falls to 0 at the last "
        "step. constant_with_warmup: it stays. constant: it stays, and there is no warm-up.",
    )
    warmup_steps: Whole = _anyway(
        0, "Number of steps at the start of training in which the learning rate rises from 0. 0: none.", ge=0
    )
    warmup_ratio: Real = _anyway(
        0.0, "The same as warmup_steps, as a part of all steps: 0.1 is the first tenth. 0: none.", ge=0, le=1
    )
    num_train_epochs: Real = _anyway(
        3.0,
        "How many times to go through the training data. Fractions are possible.",
        gt=0,
        le=1e6,
        example="5",
    )
    max_steps: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | Literal[-1] = _anyway(
        -1, "Stop after this many steps, whatever num_train_epochs says. -1: num_train_epochs decides."
    )
    per_device_train_batch_size: Whole = setting(
        16, "Number of rows in a batch, of each process.", resume="warn", ge=1, example="32"
    )
    # The model's own, or figures would differ in rounding.
    per_device_eval_batch_size: Whole = _model(
        16,
        "Number of rows in a batch of an evaluation, if all have max_seq_length tokens. "
        "A batch of shorter rows has more.",
        resume="free",
        ge=1,
        example="64",
    )
    gradient_accumulation_steps: Whole = setting(
        1,
        "Number of batches that make up one step. More batches of fewer rows need less memory.",
        resume="warn",
        ge=1,
    )
    group_by_length: Switch = setting(
        True, "Put rows of similar length into the same batch. This saves padding, and so time."
    )
    pad_to_multiple_of: Whole = setting(
        8, "The length of a batch is rounded up to a multiple of this many tokens.", ge=1, le=512
    )
    label_smoothing: Real = setting(
        0.0, "Part of the target probability that is spread evenly over all labels. 0: none.", ge=0, lt=1
    )
    class_weights: Weights = setting(
        None,
        "Weights of the labels in the loss. balanced: the rarer a label, the more weight it has. "
        "Not given: all labels have the same weight.",
    )
    max_skipped_steps: Whole = _anyway(
        10,
        "Stop after more than this many steps in a row with a NaN or infinite loss or gradient. "
        "Such steps do not change the model.",
        ge=0,
    )
    seed: Whole = setting(42, "Seed for all random numbers.", ge=0, le=2**32 - 1)


class DeviceSettings(Group):
    """What computes, and in which precision."""

    device: Device = setting(
        "auto",
        "Where to compute. auto: on the first GPU, or on the CPU if there is none. cuda:1 is the second GPU.",
        resume="warn",
        example="cuda",
    )
    amp: Amp = _anyway(
        "auto",
        "Mixed precision. off: float32. bf16 and fp16: multiply matrices in 16 bits; fp16 needs a CUDA GPU. "
        "auto: bf16 or fp16 where the hardware makes that fast, else off. "
        "An evaluation has the precision of the training.",
        owner="model",
    )
    deterministic: Switch = _anyway(
        False, "Make a run on a CUDA GPU repeatable to the last bit, which is slower. On a CPU it always is."
    )
    num_threads: Whole | None = setting(
        None,
        "Number of CPU threads. Not given: PyTorch's choice, at most one for each usable core.",
        resume="warn",
        ge=1,
        le=1024,
    )
    ddp_timeout: Whole = _free(
        600,
        "Under torchrun: after how many seconds without an answer from another process a process gives up. "
        "A checkpoint must be written in less.",
        ge=5,
        le=86_400,
    )


class RunSettings(Group):
    """What a run does, and what it writes when."""

    do_train: Switch | None = _free(
        None, "Whether to train. Not given: true, unless do_eval is given without do_train."
    )
    do_eval: Switch | None = _end(
        None,
        "Whether to evaluate on the dev file. Not given: true, unless do_train is given without do_eval. "
        "do_eval alone measures the model in output_dir.",
    )
    output_dir: Path = _free(None, "Folder for the trained model and its checkpoints.", example="my_model")
    overwrite_output_dir: Switch = _free(
        False, "Let a new run replace what output_dir already holds. Without this, such a folder is an error."
    )
    resume: Resume = _free(
        False,
        "Continue a run that was stopped. auto, or nothing after the flag: from the newest checkpoint in "
        "output_dir. A path: from that checkpoint. false: start a new run.",
    )
    resume_anyway: Switch = _free(
        False,
        "Resume even though settings such as learning_rate, num_train_epochs or amp differ from those of "
        "the stopped run.",
    )
    logging_steps: Whole = _free(
        500,
        "Number of steps between two lines in the log and in metrics.jsonl. 0 or -1: only the last step.",
        ge=-1,
    )
    save_steps: Whole = _free(
        500,
        "Number of steps between two checkpoints. An evaluation with the best result so far writes one too. "
        "0 or -1: only those.",
        ge=-1,
    )
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], NO] = _end(
        "epoch",
        "When to evaluate. epoch: after each pass through the training data. steps: every eval_steps. "
        "no: only at the end. If eval_steps is given, steps is the default.",
    )
    eval_steps: Whole | None = _end(
        None, "Number of steps between two evaluations. Not given: as many as logging_steps.", ge=1
    )
    evaluate_during_training: Switch = _free(False, "The old name for eval_strategy steps.")
    save_total_limit: Whole | None = _free(
        None,
        "Keep only this many checkpoints, the newest. The best one is always kept, in addition to the "
        "limit. Not given: keep all.",
        ge=1,
    )
    metric_for_best_model: Metric | None = _end(
        None,
        "The metric that decides which model is the best. Not given: the task's first metric, "
        "which is acc (accuracy) without a task_name, or pearson for a regression.",
        owner="model",
    )
    load_best_model_at_end: Switch = _end(
        False, "Let the final model have the weights of the best evaluation instead of the last step."
    )
    early_stopping_patience: Whole | None = _end(
        None,
        "Stop after this many evaluations in a row without a better result. Not given: never stop early.",
        ge=1,
    )
    with_texts: Switch = _end(False, "Put the texts into predictions.tsv too.")
    report_to: Reports = _free(
        ["none"],
        "Where metrics are written besides metrics.jsonl. tensorboard: event files for TensorBoard, which "
        "must be installed.",
        example="tensorboard",
    )


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
    """What a check or a resume wants to know of one field."""

    default: Any
    example: str = ""
    resume: Literal["free", "end", "warn", "anyway", "never"] = "never"
    owner: Literal["model", "files", "run"] = "run"


GROUPS: dict[str, type[Group]] = {
    "Data": DataSettings,
    "Model": ModelSettings,
    "Training": OptimSettings,
    "Device": DeviceSettings,
    "Output, checkpoints and evaluations": RunSettings,
    "Evaluating a trained model": EvaluateSettings,
}
SETTINGS = {
    name: Setting(field.default, **(field.json_schema_extra or {}))  # type: ignore[arg-type]
    for group in GROUPS.values()
    for name, field in group.model_fields.items()
}


def _explain_settings() -> None:
    """Put every setting's meaning into `Config`'s docstring, names and defaults into its signature."""
    lines = [Config.__doc__ or "", "", "Each is an argument by name; null is None here, true is True."]
    texts = described(Config)
    for title, group in GROUPS.items():
        lines += ["", title, "-" * len(title)]
        for name in group.model_fields:
            lines += [name, *textwrap.wrap(texts[name], 96, initial_indent="    ", subsequent_indent="    ")]
    Config.__doc__ = "\n".join(lines)
    Config.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=SETTINGS[name].default)
            for name in SETTINGS
        ]
    )


_explain_settings()


def changed_settings(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(name, old, new) of each setting that differs."""
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in SETTINGS)
    return [(name, before, after) for name, before, after in pairs if before != after]
