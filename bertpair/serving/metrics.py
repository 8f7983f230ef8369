"""What /metrics shows, in a registry of its own: nothing here knows HTTP or the model."""

import logging
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

from bertpair.console import LogWriter

access_logger = logging.getLogger("bertpair.access")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class ServeMetrics:
    """One server's figures. `route` is a route's own path, or `unmatched`: never what a client typed."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(self)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self.requests = counter("bertpair_requests", "Answers by route and status", ["route", "status"])
        self.request_seconds = seconds("bertpair_request_seconds", "Time to the whole answer", ["route"])
        below = "Faults and deadlines below the application, by status or name"
        self.protocol = counter("bertpair_protocol_events", below, ["event"])
        self.disconnects = counter("bertpair_client_disconnects", "Clients that left before their answer")
        self.drops = counter("bertpair_dropped_rows", "Rows dropped unrun, by reason", ["reason"])
        self.refusals = counter("bertpair_refused_requests", "Requests refused because too much was waiting")
        self.queue_seconds = seconds("bertpair_queue_seconds", "Time a request waited to be run")
        self.batch_rows = histogram("bertpair_batch_rows", "Rows of a batch", buckets=_ROWS)
        self.batch_tokens = histogram("bertpair_batch_tokens", "Padded tokens of a batch", buckets=_TOKENS)
        self.inference_seconds = seconds("bertpair_inference_seconds", "Time of a batch")
        self.failed_batches = counter("bertpair_failed_batches", "Batches that failed")
        self.predictions = counter("bertpair_predictions", "Rows answered")
        self.truncated = counter("bertpair_truncated_rows", "Rows answered that were cut")
        self.queue_depth = gauge("bertpair_queue_rows", "Rows that wait")
        self.inflight_bytes = gauge("bertpair_inflight_body_bytes", "Bytes of bodies without an answer yet")
        self.running = gauge("bertpair_batch_running_seconds", "Age of the batch that runs")

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry, when it is asked: how many log lines nobody took, of both streams."""
        handlers = [*access_logger.handlers, *logging.getLogger().handlers]
        dropped = sum(each.num_dropped for each in handlers if isinstance(each, LogWriter))
        meaning = "Log lines dropped because nobody took them"
        yield CounterMetricFamily("bertpair_dropped_log_lines", meaning, value=dropped)

    def count_batch(self, num_rows: int, padded_tokens: int, seconds: float, failed: bool) -> None:
        self.batch_rows.observe(num_rows)
        self.batch_tokens.observe(padded_tokens)
        self.inference_seconds.observe(seconds)
        self.failed_batches.inc(failed)
