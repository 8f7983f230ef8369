"""bertpair: fine-tune multilingual BERT on pairs of texts, measure it, and put it into service."""

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
    "TrainResult",
    "TrainingError",
    "evaluate",
    "train",
]
