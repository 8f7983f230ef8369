"""bertpair: fine-tune multilingual BERT on pairs of texts, measure it, and put it into service."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bertpair.errors import (
        BertpairError,
        CheckpointError,
        ConfigError,
        DataError,
        StoppedError,
        TrainingError,
    )
    from bertpair.evaluation.classifier import PairClassifier, Prediction
    from bertpair.evaluation.evaluate import EvaluationResult, evaluate
    from bertpair.search.folds import cross_validate
    from bertpair.search.seeds import run_seeds
    from bertpair.search.sweep import SweepResult, sweep
    from bertpair.settings.config import Config
    from bertpair.training.train import TrainResult, train

__version__ = "0.1.0"
__all__ = [
    "BertpairError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "EvaluationResult",
    "PairClassifier",
    "Prediction",
    "StoppedError",
    "SweepResult",
    "TrainResult",
    "TrainingError",
    "cross_validate",
    "evaluate",
    "run_seeds",
    "sweep",
    "train",
]
_HOMES = {  # each is imported when it is first used: torch takes seconds, and --help needs none of it
    "settings.config": ("Config",),
    "evaluation.classifier": ("PairClassifier", "Prediction"),
    "evaluation.evaluate": ("EvaluationResult", "evaluate"),
    "search.folds": ("cross_validate",),
    "search.seeds": ("run_seeds",),
    "search.sweep": ("SweepResult", "sweep"),
    "training.train": ("TrainResult", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
