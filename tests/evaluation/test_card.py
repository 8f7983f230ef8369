"""The model card as the hub, a Markdown reader and a person who edits it find it."""

import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from disk_faults import failing_at, files_below, run_with_fault
from huggingface_hub import EvalResult, ModelCard, metadata_load
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

from bertpair.errors import ConfigError
from bertpair.evaluation.card import CardFacts, model_card, write_card
from bertpair.evaluation.classifier import Prediction
from bertpair.evaluation.metrics import classification_metrics, confusion_matrix, per_class
from bertpair.settings.config import SETTINGS, Config

HOSTILE = [
    "a|b",
    "\\|",
    "`|`",
    "``` code",
    "<script>alert(1)</script>",
    "<!-- -->",
    "&amp;",
    "[a](http://b)",
    "![a](b)",
    "*a* **b** _c_ __d__ ~~e~~ a_(b)_",
    "train_v2__b.tsv",
    "- a",
    "---",
    "# a #",
    "1. a",
    "> a",
    "yes",
    "no",
    "null",
    "1e5",
    "{name}",
    "%s {{ a }}",
    "a: b # c",
    "'a\"",
    "!!python/object",
    "\\(x\\) $$y$$",
    "🙂👩‍🔬",
    "صحيح",
    "می‌خواهم",
    "对",
]
GOLD, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]


def make_card(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "name": "my_model",
        "base_model": "bert-base-multilingual-cased",
        "takes_pairs": True,
        "labels": ("no", "yes", "half"),
        "max_seq_length": 40,
        "train_files": ["data/train.tsv"],
        "train_rows": 92172,
        "label_counts": [92000, 100, 72],
        "dev_files": ["data/dev.tsv"],
        "figures": {**classification_metrics(GOLD, PREDICTED, 3), "loss": 0.5},
        "classes": per_class(confusion_matrix(GOLD, PREDICTED, 3)),
        "settings": {"learning_rate": 3e-5},
        "versions": {"torch": "2.13.0"},
    }
    return model_card(CardFacts(**facts | changes))


def tables(text: str) -> list[list[list[str]]]:
    """The cells of all tables, as a reader sees them; fails on a cell in which anything but text is."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    assert not any(token.type == "html_block" for token in tokens)
    for token, inner in zip(tokens, tokens[1:], strict=False):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            assert {child.type for child in inner.children or ()} <= {"text"}
            found[-1][-1].append("".join(child.content for child in inner.children or ()))
    return found


def test_the_hub_reads_what_the_model_is_and_how_good(tmp_path: Path) -> None:
    positive = {"positive_label": "yes"}
    figures = {"acc": 2 / 3, "macro_f1": 0.5, "mcc": 0.25, "qwk": 0.75, "f1": 0.125, "loss": 1.0, "n": 9}
    text = make_card(figures={**figures, **positive})
    data = ModelCard(text).data
    assert data.to_dict() | {"model-index": None} == {
        "base_model": "bert-base-multilingual-cased",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["bertpair", "text-classification"],
        "model-index": None,
    }
    shared = {"task_type": "text-classification", "dataset_type": "unknown", "dataset_name": "dev.tsv"}
    macro, squares = {"average": "macro"}, {"weights": "quadratic"}
    results = [
        EvalResult(**shared, metric_type=kind, metric_name=name, metric_value=value, metric_args=arguments)
        for kind, name, value, arguments in (
            ("accuracy", "accuracy", 0.666667, None),
            ("f1", "macro F1", 0.5, macro),
            ("f1", "F1 of yes", 0.125, None),
            ("matthews_correlation", "Matthews correlation", 0.25, None),
            ("cohen_kappa", "quadratic weighted kappa", 0.75, squares),
        )
    ]
    assert data.eval_results == results and data.model_name == "my_model"
    assert write_card(tmp_path, text)
    assert metadata_load(tmp_path / "README.md") == yaml.safe_load(text.split("---\n")[1])


def test_a_regression_has_its_own_figures_and_no_labels() -> None:
    figures = {"pearson": 0.9, "spearmanr": 0.8, "corr": 0.85, "loss": 0.04, "n": 7}
    text = make_card(labels=None, label_counts=None, classes=None, figures=figures)
    results = ModelCard(text).data.eval_results
    assert [(each.metric_type, each.metric_value) for each in results] == [
        *(("pearsonr", 0.9), ("spearmanr", 0.8), ("mse", 0.04))
    ]
    assert "this model answers with a number." in text and "Rows of dev.tsv: 7." in text
    assert tables(text)[0] == [
        ["figure", "value"],
        ["Pearson correlation", "0.9000"],
        ["Spearman correlation", "0.8000"],
        ["mean of both correlations", "0.8500"],
        ["mean squared error", "0.0400"],
    ]


def test_a_person_reads_labels_figures_and_settings() -> None:
    figures = {"acc": 0.5, "acc_low": 0.25, "acc_high": 0.75, "loss": float("nan"), "n": 6}
    text = make_card(
        figures=figures, settings={"learning_rate": 3e-5, "seed": 7, "class_weights": {"no": 2.0}}
    )
    assert tables(text) == [
        [
            ["id", "label", "training rows", "precision", "recall", "F1", "dev rows"],
            ["0", "no", "92,000", "1.0000", "0.6667", "0.8000", "3"],
            ["1", "yes", "100", "0.5000", "0.5000", "0.5000", "2"],
            ["2", "half", "72", "0.5000", "1.0000", "0.6667", "1"],
        ],
        [["figure", "value", "95 % interval"], ["accuracy", "0.5000", "0.2500 to 0.7500"]],
        [["setting", "value"], ["learning_rate", "3e-5"], ["seed", "7"], ["class_weights", '{"no": 2.0}']],
    ]
    assert "Given two texts, this model answers with one of 3 labels." in text
    assert "Rows of train.tsv: 92,172." in text and "torch 2.13.0" in text


def test_without_dev_files_the_card_says_so() -> None:
    text = make_card(dev_files=[], figures={}, classes=None, settings={}, takes_pairs=False)
    assert "It was not measured." in text and "All settings were the defaults." in text
    assert ModelCard(text).data.eval_results is None and "Given a text," in text
    assert tables(text)[0][1] == ["0", "no", "92,000"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_of_users_stay_text(hostile: str) -> None:
    text = make_card(
        name=hostile,
        labels=("yes", hostile, hostile),
        train_files=[hostile.replace("/", "")],
        dev_files=[hostile.replace("/", ""), "b.tsv"],
        figures={"acc": 0.5, "f1": 0.5, "positive_label": hostile},
        settings={"text_a_column": hostile, "labels": [hostile], "label_column": "-"},
        versions={"torch": hostile},
    )
    labels, figures, settings = tables(text)
    assert [row[:2] for row in labels[1:]] == [["0", "yes"], ["1", hostile], ["2", hostile]]
    assert figures[2][0] == f"F1 of {hostile}"
    assert settings[1] == ["text_a_column", hostile] and settings[3] == ["label_column", "-"]
    data = ModelCard(text).data
    assert data.model_name == hostile
    assert data.eval_results[1].metric_name == f"F1 of {hostile}"
    assert data.eval_results[0].dataset_name == f"{hostile.replace('/', '')}, b.tsv"
    body = ModelCard(text).text
    html = MarkdownIt("commonmark").render(body)
    assert f"<h1>{escapeHtml(hostile)}</h1>" in html
    assert "$$" not in body and "\\\\(" not in body  # which the hub shows as mathematics
    assert set(re.findall(r"</?(\w+)", html)) <= {"h1", "h2", "p", "pre", "code", "a"}
    assert html.count("<h1>") == 1 and html.count("<a ") == 1


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("a\nb\r\n\tc", "a b c"),
        ("---\n---\n", "--- ---"),
        ("a\u2028b\x00\x1b[0m", "a b[0m"),
        ("a\u202eb", "ab"),
        ("a\udcff", "a"),
        ("x" * 500, "x" * 79 + "…"),
    ],
)
def test_texts_are_one_line_that_can_be_seen(given: str, seen: str) -> None:
    text = make_card(name=given, labels=("a", "b", given), dev_files=[given])
    assert tables(text)[0][3][1] == seen
    data = ModelCard(text.encode().decode()).data
    assert data.model_name == data.eval_results[0].dataset_name == seen


@pytest.mark.parametrize("name", ["bert-base-multilingual-cased", "google-bert/bert_base.v1"])
def test_a_base_model_of_the_hub_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = make_card(base_model=name, settings={"model_name_or_path": name})
    assert ModelCard(text).data.base_model == name
    assert f"](https://huggingface.co/{name})" in text and ["model_name_or_path", name] in tables(text)[2]
    (tmp_path / name).mkdir(parents=True)
    text = make_card(base_model=name, settings={"model_name_or_path": name})
    assert ModelCard(text).data.base_model is None and name not in text
    assert "It was trained with bertpair." in text


@pytest.mark.parametrize(
    "path", ["/home/somebody/m", "../m", "./m", "~/m", "a/b/c", "C:\\somebody\\m", "m\n", ""]
)
def test_a_base_model_in_a_folder_is_not_named(path: str) -> None:
    text = make_card(base_model=path, settings={"model_name_or_path": path, "tokenizer_name": path})
    assert ModelCard(text).data.base_model is None
    assert tables(text)[2][1:] == [["model_name_or_path", "a folder"], ["tokenizer_name", "a folder"]]


def test_no_path_of_this_machine_is_in_the_card() -> None:
    texts = {
        name
        for name in SETTINGS
        if name.endswith(("_column", "_columns", "_separator", "label", "labels", "label_order"))
    }
    texts |= {"model_type", "revision"}
    place, settings = "/home/somebody/secret.tsv", {}
    for name in SETTINGS.keys() - texts:
        for value in (place, [place]):
            with suppress(ConfigError):
                settings[name] = getattr(Config(**{name: value}), name)
    assert settings.keys() >= {
        "train_file",
        "dev_file",
        "output_dir",
        "model_name_or_path",
        "cache_dir",
        "resume",
    }
    text = make_card(train_files=[place], dev_files=[place], base_model=place, settings=settings)
    assert "Rows of secret.tsv" in text and "somebody" not in text and "/home" not in text


def code_in(text: str) -> list[str]:
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def write_model(folder: Path, hf_folder: Path, *, regression: bool) -> Path:
    """A model as transformers saves it: that of `hf_folder`, or one with a single output."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"} if regression else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        hf_folder, ignore_mismatched_sizes=True, **kind
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(hf_folder, model_max_length=16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("takes_pairs", [True, False])
@pytest.mark.parametrize("regression", [True, False])
def test_both_ways_to_use_it_run_and_agree(
    takes_pairs: bool,
    regression: bool,
    hf_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_model(tmp_path / "model", hf_folder, regression=regression)
    labels = None if regression else ("a", "b")
    text = make_card(takes_pairs=takes_pairs, labels=labels, label_counts=None, classes=None)
    printed: list[Any] = []
    long, shown = "the cat sat " * 20, "path/to/this/folder"
    for code in code_in(text):
        capsys.readouterr()
        exec(code.replace(shown, str(folder)).replace("first text", long).replace("a text", long), {})
        printed.append(eval(capsys.readouterr().out, {"Prediction": Prediction}))
    (ours,), theirs = printed
    theirs = theirs[0] if isinstance(theirs, list) else theirs
    assert ours.truncated and ours.num_tokens == 16
    assert theirs["score"] == pytest.approx(ours.score, abs=1e-5)
    assert regression or theirs["label"] == ours.label


def test_only_what_transformers_can_load_is_said_to_be() -> None:
    text = make_card(in_transformers=False)
    assert ModelCard(text).data.library_name == "bertpair"
    assert len(code_in(text)) == 1 and "from transformers" not in text


def test_the_last_line_holds_the_digest_of_all_above(tmp_path: Path) -> None:
    assert write_card(tmp_path, make_card())
    path = tmp_path / "README.md"
    above, last = path.read_bytes()[:-1].rsplit(b"\n", 1)
    assert above + b"\n" == make_card().encode()
    digest = hashlib.sha256(above + b"\n").hexdigest()
    assert re.fullmatch(f"<!-- Written by bertpair, .*{digest} -->", last.decode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_card_of_ours_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert write_card(tmp_path, make_card(name="first")) and write_card(tmp_path, make_card(name="second"))
    assert "# second" in (tmp_path / "README.md").read_text() and not caplog.records


def edits() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "added": lambda card: card + b"More.\n",
        "changed": lambda card: card.replace(b"Nobody has written yet for", b"For", 1),
        "a space": lambda card: card.replace(b"\n\n", b"\n \n", 1),
        "other line ends": lambda card: card.replace(b"\n", b"\r\n"),
        "without the last line": lambda card: card[: card.rindex(b"<!--")],
        "the last line alone": lambda card: card[card.rindex(b"<!--") :],
        "somebody's own": lambda card: b"# My model\n",
        "empty": lambda card: b"",
        "not text": lambda card: b"\xff\x00",
    }


@pytest.mark.parametrize("edit", edits())
def test_what_a_person_wrote_is_left_alone(
    edit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert write_card(tmp_path, make_card())
    path = tmp_path / "README.md"
    edited = edits()[edit](path.read_bytes())
    path.write_bytes(edited)
    assert not write_card(tmp_path, make_card(name="other"))
    assert files_below(tmp_path) == {"README.md": edited}
    assert [(entry.levelno, "stays as it is" in entry.message) for entry in caplog.records] == [(20, True)]


def test_what_is_no_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert write_card(tmp_path, make_card())
    card = (tmp_path / "README.md").rename(tmp_path / "card.md")
    before = card.read_bytes()
    makers: tuple[Callable[[Path], object], ...] = (
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to(card),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
    )
    for number, make in enumerate(makers):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "README.md")
        mode = (folder / "README.md").lstat().st_mode
        assert not write_card(folder, make_card(name="other"))
        assert (folder / "README.md").lstat().st_mode == mode and card.read_bytes() == before
    assert len(caplog.records) == len(makers)


def test_a_card_that_cannot_be_read_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_card(tmp_path, make_card())
    before = files_below(tmp_path)

    def fail(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert not write_card(tmp_path, make_card(name="other"))
    assert files_below(tmp_path) == before
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]


def test_a_disk_that_fails_is_one_warning_and_leaves_the_old_card_or_the_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write_card(tmp_path, make_card(name="old"))
    old = (tmp_path / "README.md").read_bytes()
    assert write_card(tmp_path, make_card(name="new"))
    new = (tmp_path / "README.md").read_bytes()
    answers: list[bool] = []
    for k in range(1, 50):
        (tmp_path / "README.md").write_bytes(old)
        caplog.clear()
        work = lambda: answers.append(write_card(tmp_path, make_card(name="new")))  # noqa: E731
        log, error = run_with_fault(work, failing_at(k, errno.ENOSPC))
        assert error is None and files_below(tmp_path)["README.md"] in (old, new)
        if len(log) < k:
            break
        assert answers[-1] or [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert k > 6 and answers[-1] and files_below(tmp_path) == {"README.md": new}


def test_a_folder_that_is_gone_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not write_card(tmp_path / "gone", make_card())
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
