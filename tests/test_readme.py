"""What README and docs/ promise, each sentence held through the command, the library or a socket."""

import csv
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_tiny_bert
from live_server import make_predictor, serving
from server_process import ask
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from bertpair import CheckpointError, Config, ConfigError, PairClassifier, TrainResult, train
from bertpair.settings.command_line import parse_command_line

ROOT = Path(__file__).parent.parent
LABELS = ["right", "wrong", "partly"]  # neither sorted nor reversed
HEADER = ["index", "sentence1", "sentence2", "label"]
WORDS = "the cat sat mat good bad food café 中文 数据 进程".split()

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


def random_rows(count: int, seed: int) -> list[list[str]]:
    """Rows of the default layout; texts of 1 to 12 words with quotes and spaces that are theirs."""
    draw = random.Random(seed)

    def text() -> str:
        return f' "{" ".join(draw.choices(WORDS, k=draw.randint(1, 12)))}  '

    return [[str(i), text(), text(), draw.choice(LABELS)] for i in range(count)]


TRAIN, DEV = random_rows(60, 1), random_rows(30, 2)


def as_tsv(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Data in the default layout, a network of random weights, and settings for a short run."""
    folder = tmp_path_factory.mktemp("material")
    for name, rows in (("train.tsv", TRAIN), ("dev.tsv", DEV)):
        (folder / name).write_text(as_tsv([HEADER, *rows]), encoding="utf-8")
    return {
        "data_dir": str(folder),
        "model_name_or_path": str(write_tiny_bert(folder / "tiny-bert")),
        "from_scratch": True,
        "labels": LABELS,
        "output_dir": "out",
        "max_seq_length": 16,
        "learning_rate": 2e-3,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 6,
        "logging_steps": 5,
        "amp": "off",
        "num_threads": 1,
    }


def run(material: dict[str, object], **changes: object) -> TrainResult:
    return train(Config(**{**material, **changes}))  # type: ignore[arg-type]


def script(name: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())["result"]
    return result


def as_flags(settings: dict[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@pytest.fixture(scope="module")
def trained(material: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 30 steps with a checkpoint every tenth."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    run(material, output_dir=str(folder), save_steps=10)
    return folder


def test_the_first_command(tmp_path: Path) -> None:
    """config.yaml is read, the sample counted and trained on; the last line alone is on standard output."""
    flags = ["--output_dir", str(tmp_path / "output"), "--max_steps", "2"]
    done = script("train", *flags, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert "settings read from config.yaml" in said
    for name, count in (("train", 12_000), ("dev", 1_500)):
        assert any(line.startswith(f"{name}: {count} rows, 21.") for line in said), said
    (line,) = done.stdout.splitlines()
    last = json.loads(line)
    keys = ["output_dir", "global_step", "epoch", "train_loss", "best_metric", "metrics"]
    assert list(last) == keys and last["global_step"] == 2 and last["metrics"]["n"] == 1500


# Your own TSV


def as_csv(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue()


def reordered(rows: list[list[str]], *columns: int) -> str:
    return as_tsv([[row[column] for column in columns] for row in rows])


NAMES = ["i", "reference", "given", "verdict"]
PLAIN = as_tsv([HEADER, *TRAIN])
BAD = ["7\tonly two\n", "8\tthe cat\tsat\tugly\n", "\n"]
LAYOUTS: dict[str, tuple[dict[str, object], list[str]]] = {  # settings, and the content of each file
    "names": (
        {"text_a_column": "reference", "text_b_column": "given", "label_column": "verdict"},
        [reordered([NAMES, *TRAIN], 3, 2, 0, 1)],
    ),
    "numbers": (
        {"text_a_column": 2, "text_b_column": 3, "label_column": 0},
        [reordered([NAMES, *TRAIN], 3, 0, 1, 2)],
    ),
    "numbers from the end": (
        {"text_a_column": -3, "text_b_column": -2, "label_column": -1},
        [reordered([NAMES, *TRAIN], 0, 0, 0, 1, 2, 3)],
    ),
    "no header": ({"has_header": False}, [as_tsv(TRAIN)]),
    "quoted fields": ({"quoting": "csv"}, [as_csv([HEADER, *TRAIN])]),
    "a mark, carriage returns, empty lines at the end": (
        {},
        ["\ufeff" + PLAIN.replace("\n", "\r\n") + "\r\n\r\n"],
    ),
    "several files": ({}, [as_tsv([HEADER, *TRAIN[:20]]), as_tsv([HEADER, *TRAIN[20:]])]),
    "bad rows": ({"on_bad_row": "skip"}, [as_tsv([HEADER, *TRAIN[:6]]) + "".join(BAD) + as_tsv(TRAIN[6:])]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_rows_in_any_layout_are_the_same_training(
    material: dict[str, object], trained: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """trainer_state.json holds a digest of token ids and targets; the weights are equal to the bit."""
    caplog.set_level(logging.WARNING)
    settings, contents = LAYOUTS[name]
    files = [f"part{i}.tsv" for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        Path(file).write_bytes(content.encode())
    run(material, **settings, train_file=files, data_dir=None)
    for part in ("trainer_state.json", "model.safetensors"):
        found, expected = ((folder / part).read_bytes() for folder in (Path("out"), trained))
        if part == "trainer_state.json":
            assert json.loads(found)["data_sha256"] == json.loads(expected)["data_sha256"]
        else:
            assert found == expected
    if name == "bad rows":
        assert "bad rows skipped: 3" in caplog.text
        assert all(f"part0.tsv:{line}: " in caplog.text for line in (8, 9, 10))


def test_labels_given_are_the_ids_everywhere(trained: Path) -> None:
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(trained).id2label == dict(enumerate(LABELS))
    model = PairClassifier.from_pretrained(trained)
    assert model.labels == tuple(LABELS)
    assert list(model.predict([("the cat", "sat")])[0].probabilities) == LABELS
    with serving(*make_predictor(trained)) as live:
        assert live.ask("GET", "/info").json["labels"] == LABELS
        assert list(live.predict().json["probabilities"]) == LABELS


def test_what_training_and_dev_share_and_what_was_cut_is_counted(
    material: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    caplog.set_level(logging.INFO)
    shared = [[row[0], row[1], row[2], DEV[0][3]] for row in TRAIN[:4]]
    torn = [*DEV[1][:3], next(label for label in LABELS if label != DEV[1][3])]
    Path("dev.tsv").write_text(as_tsv([HEADER, *shared, *DEV, torn]), encoding="utf-8")
    run(material, dev_file=["dev.tsv"], max_steps=1)
    assert "dev rows that also stand in the training data: 4 of 35" in caplog.text
    assert "texts with more than one label in the dev data: 1, as at " in caplog.text
    tokenizer = AutoTokenizer.from_pretrained("out")
    lengths = [len(tokenizer(row[1], row[2])["input_ids"]) for row in TRAIN]
    cut = sum(length > 16 for length in lengths)
    mean = sum(min(length, 16) for length in lengths) / 60
    told = f"train: 60 rows, {mean:.1f} tokens a row (longest 16); {cut} rows ({cut / 0.6:.1f} %) cut at 16"
    assert 10 < cut < 60 and told in caplog.text


def test_typed_special_tokens_are_text(trained: Path) -> None:
    """As transformers reads them with `split_special_tokens`; by the library and by the service."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pair = ("the [SEP] cat", "[CLS] [MASK] sat")
    tokenizer = AutoTokenizer.from_pretrained(trained, split_special_tokens=True)
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    batch = tokenizer(*pair, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits[0].softmax(-1).tolist()
    (prediction,) = PairClassifier.from_pretrained(trained).predict([pair])
    assert prediction.num_tokens == batch["input_ids"].shape[1]
    assert list(prediction.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    with serving(*make_predictor(trained)) as live:
        answer = live.predict({"text_a": pair[0], "text_b": pair[1]}).json
    assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_the_settings_of_mbert_train_whatever_folder_is_named(material: dict[str, object]) -> None:
    flags = ["--config", str(ROOT / "config.mbert.yaml"), "--data_dir", str(material["data_dir"])]
    model = ["--model_name_or_path", str(material["model_name_or_path"]), "--from_scratch"]
    parsed = parse_command_line([*flags, *model, "--max_steps", "1", "--output_dir", "out"], "train")
    assert train(parsed.config, explicit=parsed.explicit).global_step == 1
    used = yaml.safe_load(Path("out/training_args.yaml").read_text())
    recipe = {"max_seq_length": 40, "learning_rate": 2e-5, "num_train_epochs": 20, "weight_decay": 0.01}
    assert {name: used[name] for name in recipe} == recipe
    named = parse_command_line([*flags, "--output_dir", "other"], "train")  # its own name, and no network
    with pytest.raises(CheckpointError, match="bert-base-multilingual-cased"):
        train(named.config, explicit=named.explicit)


# Evaluating


def test_the_tables_and_the_last_line_of_evaluate(trained: Path) -> None:
    """Against sklearn, from the labels in predictions.tsv."""
    done = script("evaluate", "--model_dir", str(trained), "--output_dir", "figures")
    assert done.returncode == 0, done.stderr
    (table,) = Path("figures").rglob("predictions.tsv")
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    gold, predicted = [row[1] for row in rows], [row[2] for row in rows]
    assert gold == [row[3] for row in DEV]
    answers = PairClassifier.from_pretrained(trained).predict([(row[1], row[2]) for row in DEV])
    assert predicted == [answer.label for answer in answers]
    figures = precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0)
    counts = confusion_matrix(gold, predicted, labels=LABELS)
    printed = [line.split() for line in done.stdout.splitlines()]
    for i, label in enumerate(LABELS):
        assert [label, *(f"{column[i]:.4f}" for column in figures[:3]), str(figures[3][i])] in printed
        assert [label, *map(str, counts[i])] in printed
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["n"] == 30 and last["acc"] == counts.trace() / 30
    assert json.loads(table.with_name("eval_results.json").read_text())["macro_f1"] == last["macro_f1"]


# The model folder


def test_the_final_folder_holds_the_last_weights_and_the_best_checkpoint_stays(
    material: dict[str, object],
) -> None:
    """Learnt by heart, random labels only do harm; the limit of one checkpoint does not count the best."""
    changes = {"num_train_epochs": 12.0, "save_steps": 10, "metric_for_best_model": "loss"}
    run(material, **changes, save_total_limit=1, learning_rate=3e-3, lr_scheduler_type="constant")
    state = json.loads(Path("out/trainer_state.json").read_text())
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    best = min(losses, key=losses.__getitem__)
    assert best == state["best_step"] < 120 and state["weights"] == "last"
    kept = {path.name for path in Path("out").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-120"}
    last, final = (Path("out", name) for name in ("checkpoint-120/model.safetensors", "model.safetensors"))
    assert final.read_bytes() == last.read_bytes()


def test_the_last_step_is_evaluated_and_logged_too(material: dict[str, object]) -> None:
    run(material, max_steps=10, eval_strategy="steps", eval_steps=4, logging_steps=4, save_steps=0)
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 8, 10]
    assert [record["step"] for record in records if "loss" in record] == [4, 8, 10]


def test_patience_is_so_many_evaluations_without_a_better_one(material: dict[str, object]) -> None:
    changes = {"num_train_epochs": 40.0, "save_steps": 0, "metric_for_best_model": "loss"}
    run(material, **changes, early_stopping_patience=3, learning_rate=3e-3)
    state = json.loads(Path("out/trainer_state.json").read_text())
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    best = min(losses, key=lambda one: one[1])
    assert losses.index(best) == len(losses) - 4 and best[0] == state["best_step"]
    assert state["global_step"] == losses[-1][0] < 400


def test_a_compact_vocabulary_without_clipping_trains_bitwise_the_same(
    material: dict[str, object], tmp_path: Path
) -> None:
    for compact in (False, True):
        run(material, max_grad_norm=0.0, compact_vocabulary=compact, output_dir=f"out-{compact}")
    full, ours = (Path(f"out-{compact}", "model.safetensors").read_bytes() for compact in (False, True))
    assert full == ours


# If it stops


def test_ctrl_c_is_130_and_a_resume_from_a_named_checkpoint_ends_the_same(
    material: dict[str, object], trained: Path
) -> None:
    flags = as_flags({**material, "save_steps": 10, "logging_steps": 1})
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.startswith("step 12/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
        assert process.stdout.read() == "" and "Traceback" not in rest
    assert Path("out/checkpoint-10").is_dir() and not Path("out/model.safetensors").exists()
    ended = train(Config(resume="out/checkpoint-10")).summary()
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 31))  # 11, 12 once
    whole = result_of(trained)
    assert {**ended, "output_dir": None} == whole and whole["global_step"] == 30
    assert Path("out/model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.fixture
def stopped(trained: Path) -> Path:
    """The run as it stood after step 10."""
    for name in ("checkpoint-10", ".run.json", "metrics.jsonl"):
        copy = shutil.copytree if (trained / name).is_dir() else shutil.copyfile
        Path("out").mkdir(exist_ok=True)
        copy(trained / name, Path("out", name))
    return Path("out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 5),
        ("gradient_accumulation_steps", 2),
        ("labels", LABELS[::-1]),
        ("max_seq_length", 20),
        ("seed", 1),
        ("max_grad_norm", 0.5),
        ("label_smoothing", 0.1),
        ("class_weights", "balanced"),
        ("group_by_length", False),
        ("model_name_or_path", "elsewhere"),
    ],
)
def test_a_resume_refuses_other_data_batches_and_model_by_name(
    material: dict[str, object], stopped: Path, name: str, value: object
) -> None:
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(ConfigError, match=name):
        run({**material, name: value}, resume="auto", resume_anyway=True)
    assert sorted(path.name for path in stopped.iterdir() if path.name != ".lock") == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-3),
        ("weight_decay", 0.5),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 12),
        ("max_steps", 14),
        ("amp", "bf16"),
    ],
)
def test_a_resume_with_another_course_needs_resume_anyway_and_takes_it(
    material: dict[str, object], trained: Path, stopped: Path, name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){name}.*resume_anyway"):
        run({**material, name: value}, resume="auto")
    result = run({**material, name: value}, resume="auto", resume_anyway=True)
    assert result.global_step == (14 if name == "max_steps" else 30)
    found, plain = ((folder / "model.safetensors").read_bytes() for folder in (stopped, trained))
    assert found != plain


def test_a_resume_may_log_save_and_evaluate_otherwise(
    material: dict[str, object], trained: Path, stopped: Path
) -> None:
    changes = {"logging_steps": 3, "save_steps": 7, "eval_strategy": "no", "save_total_limit": 1}
    run({**material, **changes}, resume="auto")
    found, plain = ((folder / "model.safetensors").read_bytes() for folder in (stopped, trained))
    assert found == plain
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [5, 10, 12, 15, 18, 21, 24, 27, 30]


def test_on_a_resume_auto_means_as_it_was(trained: Path, stopped: Path) -> None:
    words = "--output_dir out --resume --amp auto --device auto --num_threads null"
    parsed = parse_command_line(words.split(), "train")
    train(parsed.config, explicit=parsed.explicit)
    found, plain = ((folder / "model.safetensors").read_bytes() for folder in (stopped, trained))
    assert found == plain


def test_another_runs_checkpoint_is_not_gone_on_from_however_new_it_is(
    material: dict[str, object], trained: Path, stopped: Path
) -> None:
    """As where a crash came between the first save of a new run and the end of the old one's checkpoints."""
    run(material, output_dir="older", seed=7, max_steps=20, save_steps=20, eval_strategy="no")
    shutil.copytree("older/checkpoint-20", stopped / "checkpoint-20")
    run(material, resume="auto", save_steps=15)
    found, plain = ((folder / "model.safetensors").read_bytes() for folder in (stopped, trained))
    assert found == plain
    assert not (stopped / "checkpoint-20").exists() and (stopped / "checkpoint-10").exists()


def test_another_dev_file_on_a_resume_begins_a_new_best(
    material: dict[str, object], trained: Path, stopped: Path
) -> None:
    """Its labels are those that the model does not give, so that the old best stays out of reach."""
    answers = PairClassifier.from_pretrained(trained).predict([(row[1], row[2]) for row in DEV])
    others = [next(label for label in LABELS if label != answer.label) for answer in answers]
    rows = [[*row[:3], label] for row, label in zip(DEV, others, strict=True)]
    Path("other.tsv").write_text(as_tsv([HEADER, *rows]), encoding="utf-8")
    result = run(material, dev_file=["other.tsv"], resume="auto")
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["eval_acc"] for record in records if "eval_acc" in record}
    assert list(found) == [10, 20, 30] and found[10] > max(found[20], found[30])
    assert result.best_metric == max(found[20], found[30])


def test_two_runs_never_share_a_folder(material: dict[str, object]) -> None:
    flags = as_flags({**material, "max_steps": 100_000, "save_steps": 20, "eval_strategy": "no"})
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        while not first.stderr.readline().startswith("step "):
            assert first.poll() is None
        for changes in ({"resume": "auto"}, {"overwrite_output_dir": True}):
            with pytest.raises(CheckpointError, match=f"process {first.pid} "):
                run(material, **changes)
        assert first.poll() is None
        first.kill()
    assert run(material, overwrite_output_dir=True, max_steps=2).global_step == 2  # the dead hold nothing


# The service


def test_standard_output_of_the_service_is_its_access_log(trained: Path) -> None:
    """One JSON object an answer, without a client's text; all else is on standard error."""
    said: list[str] = []
    flags = ["--model_dir", str(trained), "--port", "0", "--drain_seconds", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "serve.py"), *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stderr is not None and server.stdout is not None
        while not (said and said[-1].startswith("ready")):
            said.append(server.stderr.readline())
            assert said[-1], said
        port = next(int(line.rsplit(":", 1)[1]) for line in said if line.startswith("listening on "))
        answers = [
            ask(port, "/v1/predict", {"text_a": "a secret text", "text_b": "café"}),
            ask(port, "/v1/model_prediction/", {"sentence1": "a secret text", "sentence2": 1}),
            ask(port, "/secret-path"),
        ]
        server.send_signal(signal.SIGTERM)
        lines = server.stdout.read().splitlines()
        rest = server.stderr.read()
        assert server.wait(30) == 0, rest
    assert [status for status, _ in answers] == [200, 422, 404]
    logged = [json.loads(line) for line in lines]
    assert [record["status"] for record in logged] == [200, 422, 404]
    assert "secret text" not in "".join([*lines, *said, rest]) and "caf" not in "".join(lines)
