"""Training, held against a loop in plain sight: transformers' network, torch's AdamW, loss and clipping.

The loop below shares with the library only which rows make up a step. It tokenizes, pads, weighs, clips and
sets the learning rate by itself, and runs all rows of a step at once.
"""

import json
import logging
import math
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_vocabulary
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from bertpair import Config, TrainingError, train
from bertpair.data.batching import BatchStream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

ROOT = Path(__file__).parents[2]
LABELS = ["negative", "neutral", "positive"]
WORDS = "the cat sat mat good bad food service café hello 中文 数据 进程 不 有错".split()
STEPS = 30
CUT = 20
NUM_ROWS = 58  # 4 steps of 12 rows and one of 10 an epoch; 3 of 15 and one of 13


@dataclass(frozen=True)
class Row:
    text_a: str
    text_b: str
    label: str

    def line(self, number: int) -> str:
        return f"{number}\t{self.text_a}\t{self.text_b}\t{self.label}\n"


@dataclass(frozen=True)
class Course:
    """What a run of the plain loop came to."""

    weights: dict[str, Tensor]
    losses: list[float]
    rates: list[float]
    norms: list[float]


def write_model(folder: Path, num_labels: int) -> Path:
    """A small network without dropout, every parameter random, as transformers saves it."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = BertConfig(
        **{**TINY_CONFIG, **still, "vocab_size": len(tiny_vocabulary())},
        **(names if num_labels == 3 else {"num_labels": 1, "problem_type": "regression"}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = BertForSequenceClassification(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(tiny_vocabulary()) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(vocabulary), do_lower_case=False, strip_accents=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """regression → folder."""
    folder = tmp_path_factory.mktemp("models")
    return {False: write_model(folder / "classes", 3), True: write_model(folder / "values", 1)}


def random_rows(*, regression: bool) -> list[Row]:
    """Rows of 5 to about 26 tokens, some beyond the cut; rare and frequent labels."""
    draw = random.Random(5)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    labels = [f"{draw.uniform(-2, 3):.2f}" for _ in range(NUM_ROWS)]
    if not regression:
        labels = [*LABELS, *draw.choices(LABELS, weights=[6, 1, 3], k=NUM_ROWS - 3)]
    return [Row(text(9), text(9), label) for label in labels]


def learning_rate(done: int, settings: dict[str, object]) -> float:
    """The rate of the update after `done` others."""
    highest = float(str(settings["learning_rate"]))
    warmup = int(str(settings.get("warmup_steps", 0))) or math.ceil(
        STEPS * float(str(settings.get("warmup_ratio", 0)))
    )
    if done < warmup:
        return highest * done / warmup
    part = (done - warmup) / (STEPS - warmup)
    shape = settings.get("lr_scheduler_type", "linear")
    if shape == "linear":
        return highest * (1 - part)
    return highest * (1 + math.cos(math.pi * part)) / 2 if shape == "cosine" else highest


def class_weights(settings: dict[str, object], rows: list[Row]) -> Tensor | None:
    weights = settings.get("class_weights")
    if weights == "balanced":
        counts = [sum(row.label == label for row in rows) for label in LABELS]
        return torch.tensor([len(rows) / (3 * count) for count in counts])
    return torch.tensor([weights[label] for label in LABELS]) if isinstance(weights, dict) else None


def plain_loop(folder: Path, rows: list[Row], settings: dict[str, object], lost: frozenset[int]) -> Course:
    """STEPS steps as anybody would write them; the steps in `lost` (from 1) leave the weights alone."""
    model = BertForSequenceClassification.from_pretrained(folder).train()
    tokenizer = BertTokenizerFast.from_pretrained(folder)

    def encode(some: list[Row], **options: object) -> dict[str, object]:
        texts = [row.text_a for row in some], [row.text_b for row in some]
        return dict(tokenizer(*texts, truncation=True, max_length=CUT, **options))

    lengths = [len(ids) for ids in encode(rows)["input_ids"]]  # type: ignore[attr-defined]
    stream = BatchStream(
        torch.tensor([min(CUT, math.ceil(length / 8) * 8) for length in lengths]).numpy(),
        int(str(settings["per_device_train_batch_size"]))
        * int(str(settings.get("gradient_accumulation_steps", 1))),
        seed=42,
    )
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or "LayerNorm" in name else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": plain, "weight_decay": 0}],
        eps=settings["adam_epsilon"],
        betas=(settings.get("adam_beta1", 0.9), settings.get("adam_beta2", 0.999)),
    )
    measure: nn.Module = nn.MSELoss()
    if model.config.num_labels == 3:
        measure = nn.CrossEntropyLoss(
            class_weights(settings, rows), label_smoothing=settings.get("label_smoothing", 0.0)
        )
    losses, rates, norms = [], [], []
    for done in range(STEPS):
        batch = [rows[row] for row in next(stream)[2]]
        targets = torch.tensor(
            [float(row.label) if model.config.num_labels == 1 else LABELS.index(row.label) for row in batch]
        )
        logits = model(**encode(batch, padding=True, return_tensors="pt")).logits.squeeze(1)
        loss = measure(logits, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"] or math.inf)
        rates.append(learning_rate(done, settings))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        if done + 1 not in lost:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return Course({k: v.detach() for k, v in model.state_dict().items()}, losses, rates, norms)


def trained(folder: Path, rows: list[Row], settings: dict[str, object]) -> dict[str, Tensor]:
    """The final weights of `bertpair.train` on these rows, in the folder out."""
    header = "index\tsentence1\tsentence2\tlabel\n"
    lines = header + "".join(row.line(i) for i, row in enumerate(rows))
    Path("train.tsv").write_text(lines, encoding="utf-8")
    train(
        Config(
            train_file=["train.tsv"],
            model_name_or_path=str(folder),
            output_dir="out",
            max_seq_length=CUT,
            max_steps=STEPS,
            eval_strategy="no",
            amp="off",
            num_threads=1,
            **{"save_steps": 0, **settings},  # type: ignore[arg-type]
        )
    )
    return load_file("out/model.safetensors")


def logged() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6, msg=name)


BASE: dict[str, object] = {
    "per_device_train_batch_size": 12,
    "learning_rate": 2e-3,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.0,
    "logging_steps": 4,
}
GROUPS = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
LIGHT = {"negative": 0.02, "neutral": 0.3, "positive": 0.07}  # small: what is added to their sum shows


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "compact vocabulary": {"compact_vocabulary": True, "weight_decay": 1.0},
    "accumulation": GROUPS,
    "balanced": {**GROUPS, "class_weights": "balanced"},
    "weights, clipped": {**GROUPS, "class_weights": LIGHT, "max_grad_norm": 0.01},
    "weights, smoothed": {**GROUPS, "class_weights": LIGHT, "label_smoothing": 0.1},
    "smoothed, other betas": {"label_smoothing": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.99},
    "constant, clipped": {
        "max_grad_norm": 0.5,
        "warmup_steps": 7,
        "lr_scheduler_type": "constant_with_warmup",
    },
    "constant, no decay": {"lr_scheduler_type": "constant", "weight_decay": 0.0},
    "cosine": {"warmup_ratio": 0.25, "lr_scheduler_type": "cosine"},
    "linear with warm-up": {"warmup_ratio": 0.11},
    "regression": {**GROUPS, "problem_type": "regression", "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_plain_loop(models: dict[bool, Path], case: str) -> None:
    """The same weights after 30 steps, and the same losses, rates and norms on the way, to rounding."""
    settings = {**BASE, **CASES[case]}
    regression = "problem_type" in settings
    rows = random_rows(regression=regression)
    expected = plain_loop(models[regression], rows, settings, frozenset())
    assert_same_weights(trained(models[regression], rows, settings), expected.weights)
    records = logged()
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20, 24, 28, 30]
    first = 0
    for record in records:
        last = record["step"]
        loss = sum(expected.losses[first:last]) / (last - first)
        assert record["loss"] == pytest.approx(loss, rel=3e-6)
        assert record["lr"] == pytest.approx(expected.rates[last - 1], rel=1e-12)
        assert record["grad_norm"] == pytest.approx(expected.norms[last - 1], rel=2e-5)
        rows_a_step = 15 if "gradient_accumulation_steps" in settings else 12
        assert record["epoch"] == pytest.approx(last / math.ceil(NUM_ROWS / rows_a_step), abs=1e-4)
        first = last


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vector of one word is finite and too large for any sum."""
    folder = write_model(tmp_path_factory.mktemp("poisoned") / "model", 3)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][tiny_vocabulary().index(POISON)] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


POISON = "Straße"
PAIRS_OF_ROWS = {**BASE, "per_device_train_batch_size": 2, "logging_steps": 3, "max_skipped_steps": 3}


def rows_that_poison(steps: set[int]) -> list[Row]:
    """60 rows for batches of two, with the word in one row of each of these steps (from 1) of epoch 0."""
    draw = random.Random(6)
    rows = [Row(draw.choice(WORDS[:9]), draw.choice(WORDS[:9]), draw.choice(LABELS)) for _ in range(60)]
    stream = BatchStream(torch.full((60,), 8).numpy(), 2, seed=42)
    for step in range(1, STEPS + 1):
        first = next(stream)[2][0]
        if step in steps:
            rows[first] = Row(POISON, rows[first].text_b, rows[first].label)
    return rows


@pytest.mark.parametrize("compact", [False, True], ids=["whole vocabulary", "compact vocabulary"])
def test_steps_that_are_not_finite_are_left_out(
    poisoned: Path, caplog: pytest.LogCaptureFixture, compact: bool
) -> None:
    """Three in a row are allowed, twice with one sound step between; the plain loop leaves out the same."""
    caplog.set_level(logging.WARNING)
    settings = {**PAIRS_OF_ROWS, "weight_decay": 1.0, "compact_vocabulary": compact}
    lost = {3, 4, 5, 7, 8, 9, 20}
    rows = rows_that_poison(lost)
    expected = plain_loop(poisoned, rows, settings, frozenset(lost))
    assert all(math.isnan(expected.losses[step - 1]) for step in lost)
    assert_same_weights(trained(poisoned, rows, settings), expected.weights)
    assert sorted(sum((record.get("skipped_steps", []) for record in logged()), [])) == sorted(lost)
    sound = expected.losses[18:19] + expected.losses[20:21]
    assert logged()[6]["loss"] == pytest.approx(sum(sound) / 2, rel=3e-6)
    number = next(i for i, row in enumerate(rows) if row.text_a == POISON)
    assert f"train.tsv:{number + 2}" in caplog.text


def test_a_gradient_that_overflows_counts_no_loss_and_a_run_of_nothing_else_is_an_error(
    models: dict[bool, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models[False], tmp_path / "steep")
    before = load_file(folder / "model.safetensors")
    before["classifier.weight"] *= 1e20
    save_file(before, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="nothing was trained: every step .*; lower learning_rate$"):
        trained(folder, random_rows(regression=False), {**BASE, "max_skipped_steps": 30})
    for record in logged():
        assert (record["loss"], record["grad_norm"]) == (None, None)
    assert logged()[-1]["step"] == STEPS and not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(("lost", "limit"), [({4, 5, 6, 7}, 3), ({11}, 0)])
def test_one_step_more_than_allowed_ends_the_run(poisoned: Path, lost: set[int], limit: int) -> None:
    settings = {**PAIRS_OF_ROWS, "max_skipped_steps": limit}
    with pytest.raises(TrainingError, match=f"{len(lost)} steps in a row .* not finite"):
        trained(poisoned, rows_that_poison(lost), settings)
    assert not Path("out/model.safetensors").exists()


def test_the_count_of_skipped_steps_goes_on_over_a_resume(poisoned: Path) -> None:
    """Two before the checkpoint and two after it are four in a row; by the command, with its exit code."""
    settings = {**PAIRS_OF_ROWS, "save_steps": 6}
    with pytest.raises(TrainingError):
        trained(poisoned, rows_that_poison({5, 6, 7, 8}), settings)
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-6"]
    resume = [sys.executable, str(ROOT / "train.py"), "--output_dir", "out", "--resume"]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "4 steps in a row" in done.stderr, done.stderr
    more = Config(output_dir="out", resume="auto", resume_anyway=True, max_skipped_steps=4)
    assert train(more).global_step == STEPS
