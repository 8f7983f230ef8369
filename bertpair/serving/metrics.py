"""What /metrics shows, in a registry of its own: nothing here knows HTTP or the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from bertpair.serving.batcher import BatchReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class _DroppedLines:
    """A counter that somebody else keeps."""

    def __init__(self, count: Callable[[], float]) -> None:
        self.count = count

    def collect(self) -> Iterator[CounterMetricFamily]:
        name, meaning = "bertpair_dropped_log_lines", "Log lines dropped because nobody took them"
        yield CounterMetricFamily(name, meaning, value=self.count())


class ServeMetrics:
    """One server's figures. `route` is a route's own path, or `unmatched`: never what a client typed."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "bertpair_requests", "Answers by route and status", ["route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "bertpair_request_seconds",
            "Time to the whole answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.protocol = Counter(
            "bertpair_protocol_events",
            "Faults and deadlines below the application, by status or name",
            ["event"],
            registry=registry,
        )
        self.disconnects = Counter(
            "bertpair_client_disconnects", "Clients that left before their answer", registry=registry
        )
        self.drops = Counter(
            "bertpair_dropped_rows", "Rows dropped unrun, by reason", ["reason"], registry=registry
        )
        self.refusals = Counter(
            "bertpair_refused_requests", "Requests refused because too much was waiting", registry=registry
        )
        self.queue_seconds = Histogram(
            "bertpair_queue_seconds", "Time a request waited to be run", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram(
            "bertpair_batch_rows", "Rows of a batch", buckets=_ROWS, registry=registry
        )
        self.batch_tokens = Histogram(
            "bertpair_batch_tokens", "Padded tokens of a batch", buckets=_TOKENS, registry=registry
        )
        self.inference_seconds = Histogram(
            "bertpair_inference_seconds", "Time of a batch", buckets=_SECONDS, registry=registry
        )
        self.failed_batches = Counter("bertpair_failed_batches", "Batches that failed", registry=registry)
        self.predictions = Counter("bertpair_predictions", "Rows answered", registry=registry)
        self.truncated = Counter("bertpair_truncated_rows", "Rows answered that were cut", registry=registry)
        self.queue_depth = Gauge("bertpair_queue_rows", "Rows that wait", registry=registry)
        self.inflight_bytes = Gauge(
            "bertpair_inflight_body_bytes", "Bytes of bodies without an answer yet", registry=registry
        )
        self.running = Gauge(
            "bertpair_batch_running_seconds", "Age of the batch that runs", registry=registry
        )

    def watch_queue(self, num_waiting: Callable[[], float], running_seconds: Callable[[], float]) -> None:
        """Where the gauges read from when they are asked."""
        self.queue_depth.set_function(num_waiting)
        self.running.set_function(running_seconds)

    def watch_log(self, num_dropped: Callable[[], float]) -> None:
        """Where the number of log lines that nobody took is read from when it is asked."""
        self.registry.register(_DroppedLines(num_dropped))

    def count_batch(self, report: BatchReport) -> None:
        self.batch_rows.observe(report.num_rows)
        self.batch_tokens.observe(report.padded_tokens)
        self.inference_seconds.observe(report.seconds)
        if report.failed:
            self.failed_batches.inc()

    def count_drop(self, reason: str, num_rows: int) -> None:
        self.drops.labels(reason).inc(num_rows)

    def count_answer(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def count_event(self, event: str) -> None:
        self.protocol.labels(event).inc()

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)
