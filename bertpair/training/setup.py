"""Everything a run needs, loaded and checked before the first file is written."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertpair.checkpoints.checkpoint import open_model
from bertpair.checkpoints.run_folder import RunState
from bertpair.data.dataset import Pairs, Split, label_warnings, make_split, overlap_warnings, report_labels
from bertpair.data.source import Source, resolve_source
from bertpair.data.tokenizer import Tokenizer
from bertpair.errors import ConfigError, plain
from bertpair.model.compact_vocabulary import CompactTable, compact_model
from bertpair.model.config import ModelFolder, check_model_type, check_pairs, label_order, read_folder
from bertpair.model.families import Network
from bertpair.model.pretrained import load_model, read_weights, resolve_folder, state_tensors
from bertpair.processes import ALONE, Processes
from bertpair.runtime import (
    Precision,
    explain_memory,
    keep_freed_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    seed_apart,
    seed_everything,
    set_deterministic,
    set_threads,
)
from bertpair.settings.config import Config
from bertpair.settings.tasks import check_measured
from bertpair.training.optim import learning_rate_at
from bertpair.training.step import Objective
from bertpair.training.tracking import check_trackers

FEW_ROWS = 1000  # recipes/small-data.yaml did better with up to as many: benchmarks/LOG.md
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with everything loaded."""

    config: Config  # with amp, num_threads and positive_label as they turned out
    model: Network  # on the device
    folder: ModelFolder  # where the weights came from
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None  # in id order; None: regression
    label_ranks: tuple[int, ...] | None  # the place of each id in label_order
    train: Split
    dev: Split | None
    metrics: tuple[str, ...]  # the task's; the first is the one to watch
    device: torch.device
    precision: Precision
    objective: Objective
    data_digest: str  # sha256 of the training rows as the tokenizer gives them, order included
    pad_id: int
    table: CompactTable | None  # with compact_vocabulary: ids count its rows in use, as does `pad_id`
    processes: Processes


@dataclasses.dataclass(frozen=True)
class Material:
    """What runs with the same data and the same pretrained model share: it is never changed."""

    source: Source
    folder: ModelFolder
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None  # in id order; None: regression
    positive_label: str | None  # that f1 is of
    label_ranks: tuple[int, ...] | None  # the place of each id in label_order
    train: Split
    dev: Split | None
    read_weights: Callable[[Path], Mapping[str, Tensor]]


def read_material(config: Config, resumed_from: RunState | None = None) -> Material:
    """Read and tokenize the data, and find the model; on a resume it is the checkpoint's.

    Raises ConfigError, DataError or CheckpointError for whatever does not fit.
    """
    check_trackers(config.report_to)
    source = resolve_source(config, evaluates=config.runs_evaluation)
    folder = read_folder(resumed_from.folder) if resumed_from else _open_model(config)
    check_model_type(folder, config.model_type)
    train_pairs, dev_pairs, labels = _read_pairs(config, source, folder)
    if train_pairs.text_b is not None:
        check_pairs(folder, " (text_b_column: null)")
    positive, ranks = source.positive_label(labels, config.positive_label), source.label_ranks(labels)
    _check_watched(config, labels, has_dev=dev_pairs is not None)
    tokenizer, cut = _read_tokenizer(config, folder, is_new=resumed_from is None), config.max_seq_length
    train = make_split(train_pairs, labels, tokenizer, cut, name="train")
    dev = None if dev_pairs is None else make_split(dev_pairs, labels, tokenizer, cut, name="dev")
    for line in source.notes:
        logger.info("%s", line)
    read = functools.cache(read_weights)
    return Material(source, folder, tokenizer, labels, positive, ranks, train, dev, read)


def prepare(
    config: Config,
    resumed_from: RunState | None,
    material: Material | None = None,
    processes: Processes = ALONE,
) -> Job:
    """Data and model as `config` says, read now or shared as `material`; a resume has its checkpoint's model.

    Raises ConfigError, DataError or CheckpointError for whatever does not fit; writes nothing. Of several
    `processes`, each prepares its own, and `align` comes after.
    """
    set_threads(config.num_threads)
    keep_freed_memory()
    set_deterministic(config.deterministic)
    device = resolve_device(config.device)
    reset_peak_memory(device)
    if material is None:
        material = read_material(config, resumed_from)
    else:
        _check_watched(config, material.labels, has_dev=material.dev is not None)
    labels, train, dev = material.labels, material.train, material.dev
    if resumed_from is None and (advice := few_rows_advice(config, len(train))):
        logger.info("%s", advice)
    folder = read_folder(resumed_from.folder) if resumed_from else material.folder
    seed_everything(config.seed)
    digest, pad_id, table = digest_of(train), material.tokenizer.pad_id, None
    weights = class_weight_tensor(config.class_weights, labels, train)
    with explain_memory(device):
        model, notes = load_model(
            folder,
            num_labels=1 if labels is None else len(labels),
            new_head=config.new_head and resumed_from is None,
            from_scratch=config.from_scratch,
            read=None if resumed_from else material.read_weights,
        )
        for line in notes:
            logger.info("%s", line)
        if (pooling := folder.config.pooling) != "cls":
            logger.info("pooling: %s, over all tokens of a row", pooling)
        precision = resolve_precision(config.amp, device, hidden_size=folder.config.hidden_size)
        threads, name = torch.get_num_threads(), {"off": "float32"}.get(precision.name, precision.name)
        said, each = "device: %s, %d thread%s%s; precision: %s (amp %s: %s)", " in each process"
        of = each if processes.size > 1 else ""
        logger.info(said, device, threads, "s" * (threads > 1), of, name, precision.name, precision.reason)
        if config.compact_vocabulary:
            table = compact_model(model, [each.tokens for each in (train, dev) if each is not None], pad_id)
            pad_id, train = table.pad_id, dataclasses.replace(train, tokens=table.remap(train.tokens))
            dev = None if dev is None else dataclasses.replace(dev, tokens=table.remap(dev.tokens))
        model = model.to(device)
        weights = None if weights is None else weights.to(device)
    positive = {"positive_label": material.positive_label}
    settled = {"amp": precision.name, "num_threads": torch.get_num_threads(), **positive}
    return Job(
        config=config.model_copy(update=settled),
        model=model,
        folder=folder,
        tokenizer=material.tokenizer,
        labels=labels,
        label_ranks=material.label_ranks,
        train=train,
        dev=dev,
        metrics=material.source.metrics,
        device=device,
        precision=precision,
        objective=Objective(labels is None, weights, config.label_smoothing),
        data_digest=digest,
        pad_id=pad_id,
        table=table,
        processes=processes,
    )


def align(job: Job) -> None:
    """Make sure that all processes train the same model on the same rows, each with dropout of its own.

    ConfigError where they have other rows or another network. For all processes.
    """
    processes, weights = job.processes, state_tensors(job.model)
    processes.check_same("training data", job.data_digest)
    processes.check_same("dev data", "" if job.dev is None else digest_of(job.dev))
    processes.check_same(
        "the model's shape", str({name: tuple(each.shape) for name, each in weights.items()})
    )
    processes.copy_from_first(weights.values())
    if processes.rank:
        seed_apart(job.config.seed, processes.rank, 0)


def few_rows_advice(config: Config, num_rows: int) -> str | None:
    """A line about the recipe for small data, where it is likely to help."""
    is_short = config.max_steps <= 0 and config.num_train_epochs <= 3
    if num_rows > FEW_ROWS or not is_short or config.warmup_steps or config.warmup_ratio:
        return None
    recipe = "--num_train_epochs 20 --warmup_ratio 0.1 (recipes/small-data.yaml)"
    return f"{num_rows:,} training rows are few: {recipe} did better on up to {FEW_ROWS:,} rows"


def digest_of(split: Split) -> str:
    """sha256 of token ids and targets, in order."""
    digest = hashlib.sha256()
    assert split.targets is not None
    for array in (split.tokens.ids, split.tokens.offsets, split.tokens.first_lengths, split.targets):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _open_model(config: Config) -> ModelFolder:
    hub: dict[str, Any] = {"revision": config.revision, "cache_dir": config.cache_dir}
    named = config.config_name and resolve_folder(config.config_name, **hub)
    assert config.model_name_or_path is not None
    folder = open_model(config.model_name_or_path, config_name=named, **hub)
    if config.pooling is None:
        return folder
    return dataclasses.replace(folder, config=folder.config.model_copy(update={"pooling": config.pooling}))


def _read_pairs(
    config: Config, source: Source, folder: ModelFolder
) -> tuple[Pairs, Pairs | None, tuple[str, ...] | None]:
    """Training pairs, dev pairs and the labels in the model's order; says what the two sets share."""
    files = [*source.train_files, *(source.dev_files if config.runs_evaluation else ())]
    logger.info("reading %s", ", ".join(map(str, files)))
    train = source.read(source.train_files, source.columns, source.labels, "max_train_samples")
    labels, dev = source.training_labels(train), None
    if labels is not None:
        labels = label_order(folder, labels, new_head=config.new_head, given=config.labels is not None)
        for warning in label_warnings(labels):
            logger.warning("%s", warning)
    if source.dev_files and config.runs_evaluation:
        columns = dataclasses.replace(source.columns, header=train.header)
        dev = source.read(source.dev_files, columns, labels)
    report_labels("train", train, labels)
    if dev is not None:
        report_labels("dev", dev, labels)
    for warning in overlap_warnings(train, dev, regression=source.regression):
        logger.warning("%s", warning)
    return train, dev, labels


def _check_watched(config: Config, labels: Sequence[str] | None, *, has_dev: bool) -> None:
    """ConfigError for a metric that is never measured; a warning for settings that need a dev file."""
    if (metric := config.metric_for_best_model) is not None:
        num_labels, has_order = None if labels is None else len(labels), config.label_order is not None
        check_measured("metric_for_best_model", metric, num_labels, has_order=has_order)
    for name in () if has_dev else ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, name):
            logger.warning("%s has no effect: there is no dev file to evaluate on", name)


def _read_tokenizer(config: Config, folder: ModelFolder, *, is_new: bool) -> Tokenizer:
    path, cut, positions = folder.path, config.max_seq_length, folder.max_length
    if config.tokenizer_name is not None and is_new:
        path = resolve_folder(config.tokenizer_name, revision=config.revision, cache_dir=config.cache_dir)
    words, lower = folder.config.vocab_size, config.do_lower_case
    tokenizer = Tokenizer.from_folder(
        path, do_lower_case=lower, word_table=words, truncation=config.truncation
    )
    if cut > positions:
        raise ConfigError(f"max_seq_length: found {cut}; {folder.path} has {positions} positions")
    return tokenizer


def class_weight_tensor(
    setting: str | dict[str, float] | None, labels: Sequence[str] | None, train: Split
) -> Tensor | None:
    """`class_weights` as a tensor (C,): by label, or `balanced`, rows / (C × rows of the class)."""
    if setting is None:
        return None
    if labels is None:
        raise ConfigError("class_weights: a regression has no classes")
    if isinstance(setting, str):
        assert train.targets is not None
        counts = torch.bincount(torch.from_numpy(train.targets), minlength=len(labels)).double()
        if not counts.all():
            raise ConfigError("class_weights balanced: a label without a training row has no weight")
        return (len(train) / (len(labels) * counts)).float()
    if set(setting) != set(labels):
        found, allowed = ", ".join(setting), ", ".join(labels)
        raise ConfigError(f"class_weights: found weights for {found}; the labels are {allowed}")
    return torch.tensor([setting[label] for label in labels], dtype=torch.float32)


def rows_of_step(config: Config, num_processes: int) -> int:
    """The global batch: how many rows one step of all processes has."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes


class Plan:
    """When the run logs, evaluates, saves and ends, in optimizer steps."""

    def __init__(
        self,
        config: Config,
        steps_per_epoch: int,
        metrics: Sequence[str],
        *,
        has_dev: bool,
        num_processes: int = 1,
    ) -> None:
        self.config, self.steps_per_epoch, self.num_processes = config, steps_per_epoch, num_processes
        epochs = math.ceil(config.num_train_epochs * steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else epochs
        self.logging_steps = max(0, config.logging_steps)  # 0: only the last step
        self.save_steps = max(0, config.save_steps)  # 0: none but what evaluation asks for
        every = {"no": 0, "epoch": steps_per_epoch, "steps": config.eval_interval or 0}
        self.eval_steps = every[config.eval_strategy] if has_dev else 0  # 0: no evaluation within training
        self.metric = config.metric_for_best_model or metrics[0]

    def describe(self, done: int) -> str:
        """The plan in one line, for a run that has done so many steps."""
        config = self.config
        epochs = f"{self.total_steps / self.steps_per_epoch:,.2f}".rstrip("0").rstrip(".")
        rows, groups = config.per_device_train_batch_size, config.gradient_accumulation_steps
        of = [f"{self.num_processes} processes"] if self.num_processes > 1 else []
        of += [f"{groups} batches"] if groups > 1 else []
        batches = f" ({' with '.join(of)} of {rows})" if of else ""
        saves = [f"every {self.save_steps:,} steps"] if self.save_steps else []
        saves += [f"at each better {self.metric}"] if self.eval_steps else []
        parts = [
            f"plan: {self.total_steps:,} steps ({epochs} epochs of {self.steps_per_epoch:,} steps)",
            f"{rows_of_step(config, self.num_processes):,} rows a step{batches}",
            f"evaluation every {self.eval_steps:,} steps" if self.eval_steps else "no evaluation on the way",
            f"checkpoint {' and '.join(saves)}" if saves else "no checkpoints",
            f"all in {plain(str(config.output_dir))}",
        ]
        return "; ".join([*parts, *([f"going on after step {done:,}"] if done else [])])

    def learning_rate(self, done: int) -> float:
        """The rate of the update that follows `done` others."""
        config, total = self.config, self.total_steps
        warmup = config.warmup_steps or math.ceil(total * config.warmup_ratio)
        return learning_rate_at(done, config.lr_scheduler_type, config.learning_rate, warmup, total)

    def checkpoints_kept(self, limit: int | None) -> int:
        """How many checkpoints the run is sure to keep: those of save_steps up to `limit`, and a best one."""
        regular = -(-self.total_steps // self.save_steps) if self.save_steps else 0  # the last step's too
        if not self.eval_steps:
            return regular if limit is None else min(limit, regular)
        return max(1, regular) if limit is None else min(limit, regular) + 1
