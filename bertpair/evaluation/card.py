"""The model card: README.md of a model folder, with the metadata that the Hugging Face hub reads.

What a run knows is written here; what the model is meant for only a person can add. So a card that somebody
edited is never written over: the digest in its last line tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bertpair import __version__
from bertpair.checkpoints.atomic import replace_file
from bertpair.evaluation.metrics import PerClass
from bertpair.model.pretrained import HUB_NAME
from bertpair.settings.config import Config
from bertpair.settings.fields import as_word, expected

logger = logging.getLogger(__name__)

MAX_LENGTH = 80
MARKS = re.compile(r"[\\`*\[\]<>#|~&$]|\b_+|_+\b")  # what Markdown, its tables or HTML take for their own
SEAL = b"<!-- Written by bertpair, which leaves this file alone once it is edited. sha256 of all above: "
CARD = """\
---
{metadata}
---

# {name}

Given {given}, this model answers with {gives}. It was {made} with bertpair.
It reads at most {cut:,} tokens; what is longer is cut.

{labels}## How good it is

{figures}

## Training

Rows of {train_files}: {train_rows:,}. {settings}

Versions: {versions}.

## How to use it

```python
from bertpair import PairClassifier

model = PairClassifier.from_pretrained("path/to/this/folder")
print(model.predict([{ours}]))
```

As a service:

```bash
bertpair serve --model_dir path/to/this/folder
```

{transformers}## Intended use

Nobody has written yet for which task and which texts this model is meant.

## Limits

Nobody has written yet where it fails, and on which languages, subjects and kinds of text it was not tested.

"""
TRANSFORMERS = """\
With transformers alone:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")
print(classify({theirs}, truncation="{truncation}"))
```

"""


class Metric(NamedTuple):
    """One of ours, as the hub knows it."""

    name: str
    kind: str | None = None  # the hub's name; None: it has none
    arguments: dict[str, str] | None = None


METRICS = {
    "acc": Metric("accuracy", "accuracy"),
    "macro_f1": Metric("macro F1", "f1", {"average": "macro"}),
    "f1": Metric("F1", "f1"),
    "mcc": Metric("Matthews correlation", "matthews_correlation"),
    "qwk": Metric("quadratic weighted kappa", "cohen_kappa", {"weights": "quadratic"}),
    "pearson": Metric("Pearson correlation", "pearsonr"),
    "spearmanr": Metric("Spearman correlation", "spearmanr"),
    "corr": Metric("mean of both correlations"),
    "loss": Metric("cross-entropy"),
    "mse": Metric("mean squared error", "mse"),
    "ece": Metric("expected calibration error"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. Texts may hold anything; of a file's path only the name is shown."""

    name: str  # of the model
    base_model: str | None  # as model_name_or_path has it; shown if it is a name on the hub
    takes_pairs: bool
    labels: Sequence[str] | None  # in id order; None: regression
    max_seq_length: int
    train_files: Sequence[str]
    train_rows: int
    label_counts: Sequence[int] | None = None  # training rows of each label
    dev_files: Sequence[str] = ()
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # on these: n, acc, acc_low, …
    classes: PerClass | None = None  # on these
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other than their defaults
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of other packages
    in_transformers: bool = True  # Hugging Face's library gives the same answers


def model_card(facts: CardFacts) -> str:
    """The card: a block of YAML, then Markdown. `write_card` puts it into a folder."""
    base, pairs = _hub_name(facts.base_model), facts.takes_pairs
    ours, theirs = '"a text"', '"a text"'
    if pairs:
        ours, theirs = '("first text", "second text")', '{"text": "first text", "text_pair": "second text"}'
    truncation = facts.settings.get("truncation", "longest_first")
    transformers = TRANSFORMERS.format(theirs=theirs, truncation=truncation)
    link = f"fine-tuned from [{_safe(base or '')}](https://huggingface.co/{base})"
    versions = {"bertpair": __version__, **facts.versions}
    return CARD.format(
        metadata=_metadata(facts),
        name=_safe(facts.name),
        given="two texts" if pairs else "a text",
        gives="a number" if facts.labels is None else f"one of {len(facts.labels):,} labels",
        made=link if base else "trained",
        cut=facts.max_seq_length,
        labels=_label_table(facts),
        figures=_figure_table(facts),
        train_files=_safe(_names(facts.train_files)),
        train_rows=facts.train_rows,
        settings=_setting_table(facts.settings),
        versions=", ".join(f"{_safe(name)} {_safe(version)}" for name, version in versions.items()),
        ours=ours,
        transformers=transformers if facts.in_transformers else "",
    )


def write_card(folder: Path, text: str) -> bool:
    """Write README.md, unless another or an edited one is there. False, and a line in the log, if not."""
    path = folder / "README.md"
    try:
        if os.path.lexists(path) and not _is_untouched(path):
            logger.info("%s stays as it is: bertpair did not write it, or somebody edited it", path)
            return False
        replace_file(path, _sealed(text.encode()))
    except OSError as error:
        logger.warning("%s: the model card is not written: %s", path, error.strerror or error)
        return False
    return True


def discard_card(folder: Path) -> None:
    """Delete a card that bertpair wrote and nobody edited, where the model is gone. OSError if that fails."""
    path = folder / "README.md"
    if _is_untouched(path):
        path.unlink()


def _sealed(text: bytes) -> bytes:
    return text + SEAL + hashlib.sha256(text).hexdigest().encode() + b" -->\n"


def _is_untouched(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    data = path.read_bytes()
    return data == _sealed(data.rpartition(SEAL)[0])


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-classification"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="unknown",  # the hub expects the name of one of its own data sets
            dataset_name=_plain(_names(facts.dev_files)),
            metric_type=metric.kind,
            metric_value=round(value, 6),
            metric_name=_plain(metric.name),
            metric_args=metric.arguments,
        )
        for metric, value, _ in _measured(facts)
        if metric.kind is not None
    ]
    data = ModelCardData(
        library_name="transformers" if facts.in_transformers else "bertpair",
        pipeline_tag=task,
        tags=["bertpair", task],
        base_model=_hub_name(facts.base_model),
        model_name=_plain(facts.name),
        eval_results=results or None,
    )
    return data.to_yaml()


def _measured(facts: CardFacts) -> Iterator[tuple[Metric, float, str]]:
    """Each finite figure that has a name, and its interval in words."""
    figures = dict(facts.figures)
    if facts.labels is None:
        figures["mse"] = figures.pop("loss", None)
    for key, metric in METRICS.items():
        if key == "f1" and "positive_label" in figures:
            metric = metric._replace(name=f"F1 of {figures['positive_label']}")
        if math.isfinite(value := math.nan if figures.get(key) is None else figures[key]):
            ends = figures.get(f"{key}_low"), figures.get(f"{key}_high")
            yield metric, float(value), "" if None in ends else "{:.4f} to {:.4f}".format(*ends)


def _figure_table(facts: CardFacts) -> str:
    if not (measured := list(_measured(facts))):
        return "It was not measured."
    metrics, values, intervals = zip(*measured, strict=True)
    columns = {"figure": [metric.name for metric in metrics], "value": values}
    table = _table({**columns, "95 % interval": intervals} if any(intervals) else columns)
    rows = f"Rows of {_safe(_names(facts.dev_files))}: {facts.figures.get('n', 'not counted')}."
    caution = "These rows may have helped to choose settings and weights: on new texts, expect a little less."
    return f"{rows}\n\n{table}\n\n{caution}"


def _label_table(facts: CardFacts) -> str:
    if facts.labels is None:
        return ""
    columns: dict[str, Iterable[Any]] = {"id": range(len(facts.labels)), "label": facts.labels}
    if facts.label_counts is not None:
        columns["training rows"] = facts.label_counts
    if facts.classes is not None:
        names = ("precision", "recall", "F1", "dev rows")
        columns |= {name: each.tolist() for name, each in zip(names, facts.classes, strict=True)}
    return f"{_table(columns)}\n\n"


def _setting_table(settings: Mapping[str, Any]) -> str:
    """Settings and their values, but for those that say where something lies on this machine."""
    kinds, shown = expected(Config), {}
    for name, value in settings.items():
        if name in ("model_name_or_path", "config_name", "tokenizer_name"):
            value = _hub_name(value) or "a folder"
        if "path" not in kinds.get(name, ""):
            is_one = not isinstance(value, list | tuple | dict)
            shown[name] = as_word(value) if is_one else json.dumps(value, ensure_ascii=False)
    if not shown:
        return "All settings were the defaults."
    return "Settings other than the defaults:\n\n" + _table({"setting": shown, "value": shown.values()})


def _hub_name(name: str | None) -> str | None:
    """The name, if `resolve_folder` would look for it on the hub."""
    is_folder = name is None or os.path.isdir(os.path.expanduser(name))
    return name if not is_folder and HUB_NAME.fullmatch(str(name)) else None


def _names(files: Iterable[str]) -> str:
    return ", ".join(PurePath(file).name for file in files)


def _table(columns: Mapping[str, Iterable[Any]]) -> str:
    rows = zip(*columns.values(), strict=True)
    cells = [list(columns), ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return (
        _safe(value) if isinstance(value, str) else format(value, ".4f" if isinstance(value, float) else ",")
    )


def _plain(text: str) -> str:
    """On one line, cut where it is long, without what cannot be seen but the joiners that scripts need."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")
    return line if len(line) <= MAX_LENGTH else line[: MAX_LENGTH - 1] + "…"


def _safe(text: str) -> str:
    """The same in Markdown: each mark as an entity, which has no other meaning than the character."""
    return MARKS.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), _plain(text))
