"""What several runs share is read once and never changed; a run with it is the run without."""

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_hf_folder, write_tiny_bert
from torch import Tensor

from bertpair import Config, StoppedError, train
from bertpair.checkpoints.checkpoint import file_digest
from bertpair.console import stop_flag
from bertpair.model import pretrained
from bertpair.settings.config import SETTINGS
from bertpair.settings.files import read_settings
from bertpair.training import setup
from bertpair.training.setup import FEW_ROWS, Material, digest_of, few_rows_advice, prepare, read_material

pytestmark = pytest.mark.usefixtures("fresh_process")

LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model with weights (`hf`) and one without (`bare`)."""
    folder = tmp_path_factory.mktemp("material")
    write_hf_folder(folder / "hf")
    write_tiny_bert(folder / "bare")
    rng = np.random.default_rng(4)
    words = ["cat", "sat", "mat", "good", "中文", "数据库", "мир"]
    for name, count in (("train.tsv", 24), ("dev.tsv", 9)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(count):
            a, b, label = " ".join(rng.choice(words, 3)), rng.choice(words), LABELS[i % 5 % 3]
            lines.append(f"{i}\t{a}\t{b} {i}\t{label}")
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_config(models: Path, model: str, output_dir: str, **changes: object) -> Config:
    settings = {
        **{"model_name_or_path": str(models / model), "from_scratch": model == "bare"},
        **{"data_dir": str(models), "output_dir": output_dir, "max_seq_length": 20, "amp": "off"},
        **{"num_threads": 1, "max_steps": 2, "save_steps": 0, "per_device_train_batch_size": 8},
        **{"learning_rate": 1e-3, "eval_strategy": "no"},
    }
    return Config(**{**settings, **changes})  # type: ignore[arg-type]


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "predictions.tsv", "eval_results.json", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@contextmanager
def stopped_at(line: str) -> Iterator[None]:
    """A signal to stop comes when the log has a line that begins so."""

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(line):
                stop_flag.request(signal.SIGTERM)

    log, handler = logging.getLogger("bertpair"), Stop()
    level = log.level
    log.setLevel("INFO")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        stop_flag.clear()


def arrays_of(material: Material) -> dict[str, bytes]:
    """All numbers of the two splits, and the stored weights."""
    found = {}
    for split in (material.train, material.dev):
        assert split is not None and split.targets is not None
        found[str(len(found))] = digest_of(split).encode()
    file = pretrained.find_weights(material.folder.path)
    weights = {} if file is None else material.read_weights(file)
    return found | {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, changes",
    [
        ("hf", {}),
        ("hf", {"compact_vocabulary": True}),
        ("hf", {"new_head": True, "class_weights": "balanced"}),
        ("bare", {"compact_vocabulary": True, "class_weights": "balanced"}),
    ],
    ids=["weights", "compact", "new head", "from scratch, compact"],
)
def test_a_run_with_shared_material_is_the_run_without(
    models: Path, model: str, changes: dict[str, object]
) -> None:
    """The second of two runs that share it, too."""
    train(make_config(models, model, "alone", **changes))
    material = read_material(make_config(models, model, "shared", **changes))
    before = arrays_of(material)
    for name in ("first", "second"):
        train(make_config(models, model, name, **changes), material=material)
        assert_same_results(Path("alone"), Path(name))
    assert arrays_of(material) == before


@pytest.mark.slow
def test_the_weight_file_is_read_once_and_never_written_to(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def count_reads(path: Path) -> Mapping[str, Tensor]:
        reads.append(path)
        return pretrained.read_weights(path)

    monkeypatch.setattr(setup, "read_weights", count_reads)
    config = make_config(models, "hf", "out")
    material = read_material(config)
    assert not reads, "the weights are read when a run needs them"
    file = models / "hf" / "model.safetensors"
    digest = file_digest(str(file))
    for seed in (1, 2, 3):
        own = {"output_dir": f"seed-{seed}", "seed": seed, "learning_rate": 1e-2}
        train(config.model_copy(update=own), material=material)
    assert reads == [file]
    assert file_digest(str(file)) == digest
    stored = pretrained.read_weights(file)
    for name, tensor in material.read_weights(file).items():
        assert torch.equal(tensor, stored[name]), name
    assert len({Path(f"seed-{seed}/model.safetensors").read_bytes() for seed in (1, 2, 3)}) == 3


@pytest.mark.slow
def test_a_run_with_material_resumes_from_its_own_weights(models: Path) -> None:
    """Its checkpoint's, not the shared ones, and to the same end."""
    asked = {"max_steps": 4, "save_steps": 0, "new_head": True, "logging_steps": 1}
    material = read_material(make_config(models, "hf", "whole", **asked))
    train(make_config(models, "hf", "whole", **asked), material=material)
    config = make_config(models, "hf", "stopped", **asked)
    with stopped_at("step 2/4"), pytest.raises(StoppedError, match="saved at step [23]"):
        train(config, material=material)
    train(config.model_copy(update={"resume": "auto"}), explicit=set(SETTINGS), material=material)
    assert_same_results(Path("whole"), Path("stopped"))


@pytest.mark.parametrize(
    ("changes", "is_advised"),
    [
        ({}, True),
        ({"num_train_epochs": 2.5}, True),
        ({"num_train_epochs": 4.0}, False),
        ({"max_steps": 100}, False),
        ({"warmup_ratio": 0.01}, False),
        ({"warmup_steps": 1}, False),
    ],
)
def test_few_rows_without_warm_up_are_advised(changes: dict[str, object], is_advised: bool) -> None:
    config = Config(**changes)  # type: ignore[arg-type]
    assert bool(few_rows_advice(config, FEW_ROWS)) is is_advised
    assert few_rows_advice(config, FEW_ROWS + 1) is None


def test_the_advice_is_the_recipe(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = read_settings(Path(__file__).parents[2] / "recipes" / "small-data.yaml").values
    config = make_config(models, "bare", "advised", max_steps=-1, num_train_epochs=3.0)
    with caplog.at_level(logging.INFO, "bertpair"):
        prepare(config, None)
        prepare(config.model_copy(update=recipe), None)
    (line,) = [line for line in caplog.messages if "are few" in line]
    flags = " ".join(f"--{name} {recipe[name]}" for name in ("num_train_epochs", "warmup_ratio"))
    recipe_file = f"{flags} (recipes/small-data.yaml)"
    assert line == f"24 training rows are few: {recipe_file} did better on up to 1,000 rows"
