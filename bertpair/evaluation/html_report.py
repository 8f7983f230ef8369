"""What report.html shows of data, figures and errors: sections of a page, made from an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertpair.data.dataset import Pairs, Rows, Split
from bertpair.evaluation.calibration import NUM_BINS
from bertpair.evaluation.compare import changed_rows
from bertpair.evaluation.measure import Details, Evaluation, Scored, collapse, wrong_rows
from bertpair.evaluation.page import Block, Code, Column, Figure, Matrix, Note, Page, Picture, Section, Table
from bertpair.evaluation.plots import draw_reliability
from bertpair.evaluation.report import SIGNIFICANCE_HEAD, figure_names, significance_rows
from bertpair.evaluation.significance import Comparison
from bertpair.settings.config import Config, changed_settings
from bertpair.settings.fields import as_word

MAX_ERRORS, MAX_CHANGED, MAX_CHARACTERS, MAX_GROUPS, MAX_LABELS = 200, 30, 500, 100, 200
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens; the upper ends of what is counted
MEANINGS = {
    "acc": "accuracy",
    "macro_f1": "macro F1",
    "mcc": "Matthews correlation",
    "qwk": "quadratic weighted kappa",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
    "loss": "loss",
    "ece": "calibration error",
}


def headline(figures: Mapping[str, Any]) -> list[Figure]:
    """The figures that a reader looks for first, with their 95 % intervals."""
    found = []
    if "f1" in figures:
        found.append(Figure(f"F1 of {figures.get('positive_label')}", figures["f1"]))
    for name, meaning in MEANINGS.items():
        if name in figures:
            low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
            note = "" if low is None else f"95 % interval {low:.4f} to {high:.4f}"
            found.append(Figure(meaning, figures[name], note))
    return [*found, Figure("rows", figures["n"])]


def warning_sections(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> list[Section]:
    """One for a model that gives all rows the same label; else none."""
    line = collapse(evaluation, split, labels)
    note = Note(f"{str(line).capitalize()}: the model cannot tell them apart.", is_warning=True)
    return [] if line is None else [Section("Warning", [note])]


def data_section(sets: Mapping[str, Split], labels: Sequence[str] | None, notes: Sequence[str]) -> Section:
    """Files, rows, lengths and labels of each data set, by its name; `notes` are what looks wrong in them."""
    files: list[list[Any]] = [
        [
            *(name, " ".join(each.pairs.files), len(each), _num_duplicates(each.pairs)),
            *(float(each.tokens.lengths.mean()), int(each.tokens.lengths.max())),
            int(each.tokens.truncated.sum()),
        ]
        for name, each in sets.items()
    ]
    head = ["data", "files", "rows", "duplicates", "tokens a row", "longest", "cut rows"]
    blocks: list[Block] = [Table(head, files)]
    if "train" in sets and "dev" in sets and not _share_rows(sets["train"].pairs, sets["dev"].pairs):
        blocks.append("No dev row stands in the training data.")
    blocks += [Note(note, is_warning=True) for note in notes]
    if labels is not None:
        blocks.append(_label_table(sets, labels))
    return Section("Data", [*blocks, _length_table(sets)])


def _num_duplicates(pairs: Pairs) -> int:
    """Rows whose texts and label stand before them already."""
    columns = [column for column in (pairs.text_a, pairs.text_b, pairs.labels) if column is not None]
    return len(pairs) - len(set(zip(*columns, strict=True)))


def _share_rows(train: Pairs, dev: Pairs) -> bool:
    """Whether texts of one row stand in both."""
    known, keys = ([*zip(each.text_a, each.text_b or each.text_a, strict=True)] for each in (train, dev))
    return not set(known).isdisjoint(keys)


def _label_table(sets: Mapping[str, Split], labels: Sequence[str]) -> Table:
    counts = {name: Counter(each.pairs.labels) for name, each in sets.items() if each.pairs.labels}
    head = ["label", *(column for name in counts for column in (f"{name} rows", Column("share", "share")))]
    rows = []
    for label in labels[:MAX_LABELS]:
        parts = [(each[label], each[label] / each.total()) for each in counts.values()]
        rows.append([label, *(value for part in parts for value in part)])
    return Table(head, rows, caption="Labels")


def _length_table(sets: Mapping[str, Split]) -> Table:
    lengths = {name: each.tokens.lengths for name, each in sets.items()}
    longest = max(int(each.max()) for each in lengths.values())
    edges = [0, *(edge for edge in LENGTHS if edge < longest), longest]
    shares = [np.histogram(each, np.array(edges) + 0.5)[0] / len(each) for each in lengths.values()]
    names = [f"{low + 1} to {high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    rows = [[name, *(float(share) for share in line)] for name, *line in zip(names, *shares, strict=True)]
    return Table(["tokens", *(Column(name, "share") for name in sets)], rows, caption="Length of the rows")


def result_sections(labels: Sequence[str] | None, details: Details) -> list[Section]:
    """Classes, calibration and groups of an evaluation whose rows have labels."""
    sections = []
    if labels is not None and details.classes is not None and details.confusion_matrix is not None:
        head = ["class", *next(iter(details.classes.values()))]
        rows = [[label, *each.values()] for label, each in details.classes.items()]
        matrix = Matrix(details.confusion_matrix, labels, caption="Confusion matrix")
        sections.append(Section("Classes", [matrix, Table(head, rows, "Figures of each class", True)]))
    if details.calibration is not None:
        sections.append(_calibration_section(details))
    if details.groups is not None:
        sections.append(_group_section(details.groups))
    return sections


def _calibration_section(details: Details) -> Section:
    parts = details.calibration or []
    columns = [[part[name] for part in parts] for name in ("confidence", "accuracy", "rows")]
    columns[:2] = [[np.nan if value is None else value for value in column] for column in columns[:2]]
    rows = [
        [f"{number / NUM_BINS:.2f} to {(number + 1) / NUM_BINS:.2f}", *part.values()]
        for number, part in enumerate(parts)
        if part["rows"]
    ]
    error = details.figures["ece"]
    text = (
        f"Of the rows that get their label with a probability of 0.8, 80 % should be right. The calibration "
        f"error is the mean distance from that: {error:.4f} here."
    )
    picture = Picture(draw_reliability(*columns, as_svg=True), "Accuracy beside confidence, and rows of each")
    table = Table(["probability", "mean probability", "accuracy", "rows"], rows, "Rows by their probability")
    return Section("Calibration", [text, picture, table])


def _group_section(groups: Sequence[Mapping[str, Any]]) -> Section:
    more = f"The largest {MAX_GROUPS} of {len(groups):,} groups; figures.json has all."
    rows = [list(each.values()) for each in groups[:MAX_GROUPS]]
    table = Table([Column(name) for name in groups[0]], rows, "Figures of each group", is_sortable=True)
    return Section("Groups", [*([more] if len(groups) > MAX_GROUPS else []), table])


def error_section(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> Section:
    """The worst errors with their texts."""
    wrong = wrong_rows(evaluation, split, labels)
    if not len(wrong):
        return Section("Errors", ["There are none."])
    rows = wrong[:MAX_ERRORS]
    if labels is None:
        found: list[list[Any]] = [[float(value)] for value in evaluation.logits[rows, 0]]
        what = "The rows with the largest errors"
    else:
        chosen, probabilities = evaluation.chosen, evaluation.probabilities
        found = [[labels[chosen[row]], float(probabilities[row, chosen[row]])] for row in rows]
        what = f"The wrong rows, {len(wrong):,} of {len(split):,}, most confident first"
    what += f": the first {MAX_ERRORS}" if len(wrong) > MAX_ERRORS else ""
    return Section("Errors", [f"{what}. errors.tsv has all.", row_table(split.pairs, rows, found)])


def row_table(pairs: Pairs, rows: Rows, answers: Sequence[list[Any]]) -> Table:
    """Rows with their label, what was answered (a label and its probability, or a value), texts and place."""
    has_score = bool(answers) and len(answers[0]) > 1
    answer = ["predicted", *(["probability"] if has_score else [])]
    texts = [column for column in (pairs.text_a, pairs.text_b) if column is not None]
    names = [Column(name, "text") for name in ("text_a", "text_b")[: len(texts)]]
    short = [Path(file).name for file in pairs.files]
    names_of = short if len(set(short)) == len(short) else pairs.files
    lines = []
    for row, found in zip(rows, answers, strict=True):
        gold = pairs.labels[row] if pairs.labels else None
        gold = float(gold) if gold is not None and not has_score else gold
        where = f"{names_of[pairs.file_of_row[row]]}:{pairs.line_of_row[row]}"
        lines.append([gold, *found, *(_shortened(column[row]) for column in texts), where])
    return Table(["label", *answer, *names, "where"], lines, is_sortable=True)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def evaluation_page(
    scored: Scored,
    by_model: Mapping[str, Mapping[str, Any]],
    others: Sequence[Scored],
    comparisons: Mapping[str, Comparison],
    command: str,
) -> Page:
    """report.html of an evaluation: of one model, with the figures of all that were measured beside it."""
    labels, details = scored.labels, scored.details
    sections = warning_sections(scored.evaluation, scored.split, labels)
    if by_model:
        names = figure_names(by_model)
        rows = [[model, *(figures.get(name) for name in names)] for model, figures in by_model.items()]
        sections.append(Section("Models", [Table(["model", *names], rows, is_sortable=True)]))
    if comparisons:
        sections.append(comparison_section(scored, others, comparisons))
    if details is not None:
        sections += result_sections(labels, details)
    sections.append(data_section({"data": scored.split}, labels, []))
    sections.append(Section("Command", [Code(command, caption="The same again")]))
    if details is not None:
        sections.append(error_section(scored.evaluation, scored.split, labels))
    files = ", ".join(Path(file).name for file in scored.split.pairs.files)
    said = "; ".join([f"measured on {files}", *scored.evaluation.decision.notes])
    return Page(scored.name, said, headline(details.figures) if details else [], sections)


def comparison_section(
    asked: Scored, others: Sequence[Scored], comparisons: Mapping[str, Comparison]
) -> Section:
    """How the model differs from each other one, and the rows that one of the two has right."""
    test = "the sign test of errors" if asked.labels is None else "McNemar's exact test"
    blocks: list[Block] = [
        f"{asked.name} against each other model, on the same rows. Where the 95 % interval of a difference "
        f"holds 0, it may be luck. p is of {test}: how likely so uneven numbers of rows won and lost are "
        "if neither model is better.",
        Table(SIGNIFICANCE_HEAD, significance_rows(comparisons)),
    ]
    for other in others if asked.labels is not None else ():
        won, lost = changed_rows(asked, other)
        blocks += [*_changed(won, asked, other), *_changed(lost, other, asked)]
    return Section("Comparison", blocks)


def _changed(rows: Rows, better: Scored, worse: Scored) -> list[Block]:
    said = f"Rows that only {better.name} has right, not {worse.name}: {len(rows):,}"
    if not len(rows) or worse.labels is None:
        return [f"{said}."]
    evaluation, shown = worse.evaluation, rows[:MAX_CHANGED]
    chosen, probabilities = evaluation.chosen, evaluation.probabilities
    found = [[worse.labels[chosen[row]], float(probabilities[row, chosen[row]])] for row in shown]
    more = f". The first {MAX_CHANGED}:" if len(rows) > MAX_CHANGED else "."
    return [f"{said}{more}", row_table(worse.split.pairs, shown, found)]


def settings_section(config: Config, command: str | None = None) -> Section:
    """The settings that are not as by default, and the command that does the same again."""
    changed = changed_settings(Config(), config)
    table = Table(
        ["setting", "value", "default"], [[name, as_word(new), as_word(old)] for name, old, new in changed]
    )
    again = [] if command is None else [Code(command, caption="The same again")]
    return Section("Settings", [table, *again])
