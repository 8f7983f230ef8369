"""What /info says: the model, its limits, and how near it is to float32."""

from __future__ import annotations

import dataclasses

from bertpair.serving.batcher import QueueLimits
from bertpair.serving.predictor import Predictor
from bertpair.settings.serve import ServeConfig


def describe_server(
    config: ServeConfig, predictor: Predictor, limits: QueueLimits | None
) -> dict[str, object]:
    """Plain values for JSON; `limits` None while the warm-up has not settled them."""
    agreement = predictor.agreement
    return {
        "model": predictor.name,
        "model_version": predictor.version,
        "problem_type": "regression" if predictor.labels is None else "classification",
        "labels": None if predictor.labels is None else list(predictor.labels),
        "takes_pairs": predictor.takes_pairs,
        "max_seq_length": predictor.cut,
        "precision": predictor.precision,
        "device": str(predictor.classifier.scorer.device),
        "num_threads": predictor.num_threads,
        "limits": {
            **dataclasses.asdict(predictor.limits),
            "max_inflight_bytes": config.max_inflight_bytes,
            "max_header_bytes": config.max_header_bytes,
            "max_queue_rows": config.max_queue_rows,
            "max_batch_tokens": None if limits is None else limits.max_batch_tokens,
            "queue_deadline": config.queue_deadline,
            "max_connections": config.max_connections,
        },
        "agreement_with_float32": None if agreement is None else dataclasses.asdict(agreement),
    }
