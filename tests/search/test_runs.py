"""Data and weights that runs share are read again only for a run that needs others."""

from pathlib import Path

import pytest
from conftest import write_tiny_bert

from bertpair import Config, ConfigError
from bertpair.search.runs import _READ, Materials
from bertpair.settings.config import SETTINGS
from bertpair.training.setup import read_material

HEADER = "index\tsentence1\tsentence2\tlabel\n"

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{i}\tthe cat\tsat {i}\t{'ab'[i % 2]}\n" for i in range(8)]
        (tmp_path / name).write_text(HEADER + "".join(rows), encoding="utf-8")
    folder, data = str(write_tiny_bert(tmp_path / "tiny")), str(tmp_path)
    given = {"model_name_or_path": folder, "data_dir": data, "output_dir": "out", "max_seq_length": 24}
    return Config(**given, from_scratch=True)  # type: ignore[arg-type]


def test_runs_that_differ_in_training_share_what_is_read(config: Config) -> None:
    materials = Materials()
    first = materials.read(config)
    for name, value in (
        *(("seed", 7), ("learning_rate", 1e-3), ("max_steps", 3), ("num_train_epochs", 9.0)),
        *(("per_device_train_batch_size", 4), ("output_dir", "other"), ("weight_decay", 0.1), ("amp", "off")),
        *(("class_weights", "balanced"), ("label_smoothing", 0.1), ("metric_for_best_model", "f1")),
    ):
        assert materials.read(config.model_copy(update={name: value})) is first, name


@pytest.mark.parametrize(
    "changed",
    [
        {"max_seq_length": 12},
        {"max_train_samples": 4},
        {"text_b_column": None},
        {"pooling": "mean"},
        {"do_lower_case": True},
        {"labels": ["b", "a"]},
        {"do_eval": False},
    ],
    ids=str,
)
def test_runs_of_other_data_or_another_model_read_their_own(
    config: Config, changed: dict[str, object]
) -> None:
    materials = Materials()
    first = materials.read(config)
    own = config.model_copy(update=changed)
    second = materials.read(own)
    assert second is not first and materials.read(own) is second
    again = materials.read(config)
    assert again is not first and len(again.train) == len(first.train)


def test_material_that_could_not_be_read_leaves_none(config: Config) -> None:
    materials = Materials()
    materials.read(config)
    wrong = config.model_copy(update={"max_seq_length": 9999})
    for _ in range(2):
        with pytest.raises(ConfigError, match="max_seq_length"):
            materials.read(wrong)
    assert len(materials.read(config).train) == 8


def test_every_setting_that_reading_looks_at_is_compared(config: Config) -> None:
    """`read_material` sees no other setting than those that make `Materials` read again, and the watched
    metric and the trackers, which it refuses early where they cannot be had."""
    seen = set()

    class Watched(Config):
        def __getattribute__(self, name: str) -> object:
            if name in SETTINGS:
                seen.add(name)
            return super().__getattribute__(name)

    read_material(Watched(**config.model_dump(exclude_unset=True)))
    assert "max_seq_length" in seen and seen - _READ == {"metric_for_best_model", "report_to"}
