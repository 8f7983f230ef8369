"""report.html and README.md of a finished run: for people, who may edit them, so no manifest names them."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from bertpair.checkpoints.atomic import replace_file
from bertpair.checkpoints.run_folder import versions
from bertpair.console import program
from bertpair.data.dataset import label_warnings, overlap_warnings
from bertpair.evaluation.card import CardFacts, model_card, write_card
from bertpair.evaluation.html_report import (
    data_section,
    error_section,
    headline,
    result_sections,
    settings_section,
    warning_sections,
)
from bertpair.evaluation.measure import Details, Evaluation, with_further
from bertpair.evaluation.metrics import per_class
from bertpair.evaluation.page import REPORT, Page, Picture, Section, render
from bertpair.evaluation.plots import draw_curves
from bertpair.settings.config import Config, changed_settings
from bertpair.settings.stored import as_flags
from bertpair.training.setup import Job

logger = logging.getLogger(__name__)


def write_report(
    path: Path,
    job: Job,
    evaluation: Evaluation | None,
    details: Details | None,
    records: Sequence[Mapping[str, Any]],
    said: str,
) -> None:
    """Write both files into the model folder; `said` is what the final weights are. A disk that is full costs
    them, not the run."""
    if evaluation is not None and details is not None and job.dev is not None:
        details = with_further(details, evaluation, job.dev, job.labels)
    sections = _sections(job, evaluation, details, records)
    figures = headline(details.figures) if details is not None else []
    name = path.absolute().name
    try:
        page = Page(name, f"{said}; {date.today():%Y-%m-%d}", figures, sections)
        replace_file(path / REPORT, render(page))
    except OSError as error:
        logger.warning("%s was not written: %s", path / REPORT, error.strerror or error)
    write_card(path, model_card(_card_facts(name, job, details)))


def _sections(
    job: Job, evaluation: Evaluation | None, details: Details | None, records: Sequence[Mapping[str, Any]]
) -> list[Section]:
    labels, dev, sections, errors = job.labels, job.dev, [], []
    if evaluation is not None and dev is not None and details is not None:
        sections = [*warning_sections(evaluation, dev, labels), *result_sections(labels, details)]
        errors = [error_section(evaluation, dev, labels)]
    if records:
        metric = job.config.metric_for_best_model or job.metrics[0]
        curves = draw_curves(records, metric, as_svg=True)
        sections.append(
            Section("Training", [Picture(curves, f"Loss, {metric} and learning rate over the steps")])
        )
    sets = {"train": job.train} | ({} if dev is None else {"dev": dev})
    dev_pairs = None if dev is None else dev.pairs
    notes = overlap_warnings(job.train.pairs, dev_pairs, regression=labels is None)
    notes += label_warnings(labels or ())
    command = f"{program('train')} {shlex.join(as_flags(job.config))}"
    return [*sections, data_section(sets, labels, notes), settings_section(job.config, command), *errors]


def _card_facts(name: str, job: Job, details: Details | None) -> CardFacts:
    config, train = job.config, job.train.pairs
    counts, classes = Counter(train.labels), None
    figures = {} if details is None else details.figures
    if details is not None and details.confusion_matrix is not None:
        classes = per_class(np.array(details.confusion_matrix))
    return CardFacts(
        name=name,
        base_model=config.model_name_or_path,
        takes_pairs=train.text_b is not None,
        labels=job.labels,
        max_seq_length=config.max_seq_length,
        train_files=train.files,
        train_rows=len(train),
        label_counts=None if job.labels is None else [counts[label] for label in job.labels],
        dev_files=() if job.dev is None else job.dev.pairs.files,
        figures=figures,
        classes=classes,
        settings={name: value for name, _, value in changed_settings(Config(), config)},
        versions=versions(),
        in_transformers=job.model.config.pooling == "cls",
    )
