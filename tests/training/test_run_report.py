"""What a finished run leaves for people: report.html, README.md, event files, and lines that warn."""

import errno
import html
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny_bert
from disk_faults import intercept
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bertpair import Config, ConfigError, TrainResult, train
from bertpair.checkpoints.manifest import verify_folder
from bertpair.evaluation.figures import SEEN, UNSEEN
from bertpair.settings.command_line import parse_command_line

pytestmark = [pytest.mark.usefixtures("fresh_process"), pytest.mark.slow]
HOSTILE = "<script>alert('x')</script> & <b>bold</b>"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rng, lines = np.random.default_rng(3), ["topic\tsentence1\tsentence2\tlabel"]
    for i in range(60):
        a, b = (" ".join(rng.choice("the cat sat mat good bad food".split(), 3)) for _ in "ab")
        lines.append(
            f"t{i % 4 + 2 * (i >= 40)}\t{a}\t{b} {HOSTILE if i > 50 else ''}\t{['no', 'yes'][i % 2]}"
        )
    lines.append(lines[-1])
    (tmp_path / "train.tsv").write_text("\n".join(lines[:41]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join([lines[0], *lines[41:]]) + "\n")
    return Config(
        model_name_or_path=str(write_tiny_bert(tmp_path / "tiny")),
        from_scratch=True,
        data_dir=str(tmp_path),
        max_seq_length=24,
        max_steps=6,
        save_steps=0,
        logging_steps=2,
        group_column="topic",
        amp="off",
        num_threads=1,
        output_dir=str(tmp_path / "out"),
    )


def run(config: Config, **changes: Any) -> TrainResult:
    return train(Config(**{**config.model_dump(exclude_unset=True), **changes}))


def test_a_run_leaves_a_report_and_a_card_that_may_be_edited(config: Config) -> None:
    result, out = run(config), Path(str(config.output_dir))
    page = (out / "report.html").read_text("utf-8")
    assert f"{result.metrics['acc']:.4f}" in page and "<svg" in page
    for section in ("Classes", "Calibration", "Groups", "Training", "Data", "Settings", "Errors"):
        assert re.search(rf"<h2[^>]*>\s*{section}\s*</h2>", page), section
    assert "alert(" in page and "<script>alert" not in page, "every text is escaped"
    assert "--max_steps 6" in page and "--seed" not in page, "only what is not as by default"
    card = ModelCard((out / "README.md").read_text("utf-8"))
    figures = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert figures["accuracy"] == pytest.approx(result.metrics["acc"], abs=1e-6)
    named = {entry.name for entry in verify_folder(out).files}
    assert not named & {"README.md", "report.html"} and {"figures.json", "errors.tsv"} <= named
    for name in ("README.md", "report.html"):
        (out / name).write_text("mine")
    verify_folder(out)
    run(config, overwrite_output_dir=True)
    assert (out / "README.md").read_text() == "mine", "a card that a person wrote stays"
    assert (out / "report.html").read_text("utf-8") != "mine", "the page of a model that is gone does not"


def test_the_command_in_the_report_does_the_same_again(config: Config) -> None:
    first = run(config, label_smoothing=0.1, class_weights={"no": 1.5, "yes": 0.75})
    page = Path(first.output_dir, "report.html").read_text("utf-8")
    found = re.search(r"(?s)<code[^>]*>(.*?train.*?)</code>", page)
    assert found is not None
    words = shlex.split(html.unescape(found[1]))
    parsed = parse_command_line(words[words.index(next(w for w in words if w.startswith("--"))) :], "train")
    changes = {"output_dir": "again"}
    again = train(parsed.config.model_copy(update=changes), explicit=parsed.explicit)
    assert again.metrics == first.metrics and again.train_loss == first.train_loss


def test_groups_are_measured_by_themselves(config: Config) -> None:
    out = Path(run(config).output_dir)
    groups = json.loads((out / "figures.json").read_text())["groups"]
    assert [line["group"] for line in groups[:2]] == [SEEN, UNSEEN]
    assert {line["group"] for line in groups[2:]} == {"t2", "t3", "t4", "t5"}
    assert sum(line["rows"] for line in groups[:2]) == sum(line["rows"] for line in groups[2:]) == 21


def test_a_full_disk_costs_the_report_and_not_the_run(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(count: int, name: str, real: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any("report.html" in str(each) for each in args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    intercept(monkeypatch.setattr, act)
    result = run(config)
    monkeypatch.undo()
    assert not result.save_failed and "report.html was not written" in caplog.text
    assert not Path(result.output_dir, "report.html").exists()
    verify_folder(Path(result.output_dir))


def test_tensorboard_shows_what_metrics_jsonl_holds(config: Config) -> None:
    out = Path(run(config, report_to=["tensorboard"]).output_dir)
    (folder,) = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], np.float32(record["loss"])) for record in records if "loss" in record]
    assert [(each.step, np.float32(each.value)) for each in events.Scalars("train/loss")] == losses
    accuracies = [record["eval_acc"] for record in records if "eval_acc" in record]
    assert [each.value for each in events.Scalars("eval/acc")] == [np.float32(acc) for acc in accuracies]


def test_a_missing_tracker_is_said_before_any_work(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="report_to: the package tensorboard cannot be used"):
        run(config, report_to=["tensorboard"])
    assert not Path(str(config.output_dir)).exists()


def test_a_collapsed_training_says_so_once(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    run(config, learning_rate=1e-7, max_steps=8, eval_strategy="steps", eval_steps=2)
    said = [record.getMessage() for record in caplog.records if "rows get the label" in record.getMessage()]
    assert len(said) == 1 and re.fullmatch(
        r"dev: all 21 rows get the label (no|yes), which [0-9.]+ % of them have; if it stays so, lower "
        r"learning_rate, or try warmup_ratio 0.1, another seed, or class_weights balanced",
        said[0],
    )


def test_texts_stand_in_the_predictions_where_that_is_asked(config: Config) -> None:
    plain = Path(run(config).output_dir, "predictions.tsv").read_text("utf-8").splitlines()
    again = run(config, with_texts=True, overwrite_output_dir=True)
    rows = Path(again.output_dir, "predictions.tsv").read_text("utf-8").splitlines()
    dev = [line.split("\t") for line in Path(str(config.data_dir), "dev.tsv").read_text().splitlines()]
    assert rows[0] == f"{plain[0]}\ttext_a\ttext_b"
    assert [row.split("\t")[-2:] for row in rows[1:]] == [row[1:3] for row in dev[1:]]
    assert [row.split("\t")[:3] for row in rows] == [row.split("\t")[:3] for row in plain]


def test_kappa_may_be_watched(config: Config) -> None:
    result = run(config, label_order=["no", "yes"], metric_for_best_model="qwk")
    assert result.best_metric == result.metrics["qwk"]
    with pytest.raises(ConfigError, match="metric_for_best_model qwk needs label_order"):
        run(config, metric_for_best_model="qwk", overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="label_order: found 'no', 'maybe'; the labels are 'no', 'yes'"):
        run(config, label_order=["no", "maybe"], overwrite_output_dir=True)


def test_a_regression_has_a_report_too(config: Config, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        lines = (
            (tmp_path / f"{name}.tsv").read_text().replace("\tno\n", "\t1.5\n").replace("\tyes\n", "\t4\n")
        )
        (tmp_path / f"{name}.tsv").write_text(lines)
    result = run(config, problem_type="regression")
    page = Path(result.output_dir, "report.html").read_text("utf-8")
    for section in ("Groups", "Training", "Data", "Settings", "Errors"):
        assert re.search(rf"<h2[^>]*>\s*{section}\s*</h2>", page), section
    assert "Pearson correlation" in page and "mean_error" in page and "Calibration" not in page
    errors = [line.split("\t") for line in Path(result.output_dir, "errors.tsv").read_text().splitlines()]
    assert errors[0] == ["file", "line", "gold", "predicted", "text_a", "text_b"] and len(errors) == 22
    sizes = [abs(float(row[2]) - float(row[3])) for row in errors[1:]]
    assert sizes == pytest.approx(sorted(sizes, reverse=True), abs=1e-4)


def test_a_training_without_a_dev_file_has_a_report_of_its_data(config: Config, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").unlink()
    result = run(config)
    page = Path(result.output_dir, "report.html").read_text("utf-8")
    assert "Training" in page and "Data" in page and "Errors" not in page
    assert "It was not measured." in Path(result.output_dir, "README.md").read_text("utf-8")
