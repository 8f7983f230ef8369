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
)
from bertpair.evaluation.measure import Details, Evaluation, collapse, detail
from bertpair.evaluation.metrics import per_class
from bertpair.evaluation.page import Note, Page, Picture, Section, render
from bertpair.evaluation.plots import draw_curves
from bertpair.settings.config import SETTINGS
from bertpair.settings.stored import as_flags
from bertpair.training.setup import Job

REPORT = "report.html"
logger = logging.getLogger(__name__)


def write_report(
    path: Path, job: Job, evaluation: Evaluation | None, records: Sequence[Mapping[str, Any]], said: str
) -> None:
    """Write both files into the model folder; `said` is what the final weights are. A disk that is full costs
    them, not the run."""
    details = None
    if evaluation is not None and job.dev is not None:
        known = None if job.train.pairs.groups is None else frozenset(job.train.pairs.groups)
        details = detail(evaluation, job.dev, job.labels, with_further=True, known_groups=known)
    figures: dict[str, Any] = {} if details is None else details.figures
    sets = {"train": job.train} | ({} if job.dev is None else {"dev": job.dev})
    dev_pairs = None if job.dev is None else job.dev.pairs
    notes = overlap_warnings(job.train.pairs, dev_pairs, regression=job.labels is None)
    notes += label_warnings(job.labels or ())
    sections = []
    if evaluation is not None and job.dev is not None and details is not None:
        sections = result_sections(job.labels, details)
        if (line := collapse(evaluation, job.dev, job.labels)) is not None:
            sections.insert(
                0,
                Section(
                    "Warning",
                    [Note(f"On the dev file, {line}: the model cannot tell them apart.", is_warning=True)],
                ),
            )
    metric = job.config.metric_for_best_model or job.metrics[0]
    curves = Picture(draw_curves(records, metric, as_svg=True), f"Loss, {metric} and learning rate by step")
    command = f"{program('train')} {shlex.join(as_flags(job.config))}"
    sections += [
        *([Section("Training", [said, curves])] if records else []),
        data_section(sets, job.labels, notes),
        settings_section(job.config, command),
    ]
    if evaluation is not None and job.dev is not None:
        sections.append(error_section(evaluation, job.dev, job.labels))
    subtitle = f"{said}; {date.today():%Y-%m-%d}"
    page = Page(path.absolute().name, subtitle, headline(figures) if figures else [], sections)
    try:
        replace_file(path / REPORT, render(page))
    except OSError as error:
        logger.warning("%s was not written: %s", path / REPORT, error.strerror or error)
    write_card(path, model_card(_card_facts(path.absolute().name, job, details)))


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
        settings={
            name: value for name, value in config.model_dump().items() if value != SETTINGS[name].default
        },
        versions=versions(),
        in_transformers=job.model.config.pooling == "cls",
    )
