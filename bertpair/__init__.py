"""bertpair: fine-tune multilingual BERT on pairs of texts, measure it, and put it into service."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bertpair.errors import (
    BertpairError,
    CheckpointError,
    ConfigError,
    DataError,
    StoppedError,
    TrainingError,
)
from bertpair.settings.config import Config

if TYPE_CHECKING:
    from bertpair.evaluation.classifier import PairClassifier, Prediction
    from bertpair.evaluation.evaluate import EvaluationResult, evaluate
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
    "TrainResult",
    "TrainingError",
    "evaluate",
    "train",
]
_TORCH = {  # what needs torch, whose import takes a second, comes when it is first used
    "PairClassifier": "evaluation.classifier",
    "Prediction": "evaluation.classifier",
    "EvaluationResult": "evaluation.evaluate",
    "evaluate": "evaluation.evaluate",
    "TrainResult": "training.train",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TORCH[name]}"), name)
