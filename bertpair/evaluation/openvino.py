"""Scoring rows of token ids with OpenVINO, on a CPU: a converted network, and how it is run.

One request has all the threads and answers soonest, and many at once share them and answer the most. So the
network is compiled twice: for rows that fit one request, and, once more come, for several at a time. The
engine keeps kernels for every shape that it has met. Lengths are filled up to a few, and a request has few
tokens, so there are some 400 shapes; more tokens are no faster.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bertpair.console import stop_flag
from bertpair.data.batching import fill_up, pad_batch
from bertpair.data.tokenizer import Tokens
from bertpair.errors import ConfigError, first_line
from bertpair.model.families import Network
from bertpair.runtime import Precision

MODEL, WEIGHTS = "model.xml", "model.bin"
INSTALL = 'pip install "bertpair[openvino]"'
REQUEST_TOKENS = 256  # padded tokens of one request at most: more fall out of the processor's caches
KEPT_KERNELS = 256  # of those made for shapes: by default 5,000, some 2.7 MB a shape with six layers
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@contextlib.contextmanager
def kept_to_itself() -> Iterator[None]:
    """Within, a library says nothing; what it changes of the process's logging is put back at the end.

    Importing nncf changes the class of new loggers. A conversion by openvino silences the root logger below
    errors, for good if it fails.
    """
    root, logger_class = logging.getLogger(), logging.getLoggerClass()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.setLoggerClass(logger_class)
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def load_library(name: str, need: str) -> ModuleType:
    """`openvino` or `nncf`, without their reports to their maker; ConfigError where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if not installed
    try:
        with kept_to_itself():
            return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{need} needs the package {name}: {INSTALL} ({error})") from error


def convert(network: Network) -> Any:
    """The network as an `openvino.Model` with rows (B, L) of any size, in float32.

    ConfigError where OpenVINO cannot convert it. It shares the network's weights.
    """
    openvino = load_library("openvino", "engine openvino")
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.arange(8) < torch.tensor([[8], [5]])
    example = dict(zip(INPUTS, (ids, torch.zeros_like(ids), mask), strict=True))
    try:
        with kept_to_itself(), torch.no_grad():  # tracing warns of sizes that do not change here
            model = openvino.convert_model(network.eval(), example_input=example)
    except Exception as error:  # which one differs between the networks
        kind = type(network).__name__
        raise ConfigError(f"engine openvino: OpenVINO cannot convert {kind}; use engine torch") from error
    model.reshape({port: [-1, -1] for port in model.inputs})
    return model


def quantise(model: Any, tokens: Tokens, pad_id: int, *, has_vnni: bool) -> Any:
    """The network with 8-bit weights and inputs in its linear layers, calibrated on rows of token ids.

    Without VNNI weights get 7 bits: sums of two products would overflow their 16 bits.
    """
    nncf = load_library("nncf", "quantize int8")

    def row(number: int) -> dict[str, npt.NDArray[Any]]:
        stop_flag.raise_if_set()
        values = batch_inputs(tokens, np.array([number]), pad_id, max_length=None)
        return {name: values[name] for name in input_names(model)}

    narrow = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    with kept_to_itself():
        return nncf.quantize(
            model,
            nncf.Dataset(range(len(tokens)), row),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(tokens),
            advanced_parameters=None if has_vnni else narrow,
        )


def batch_inputs(
    tokens: Tokens, rows: npt.NDArray[np.int64], pad_id: int, max_length: int | None
) -> dict[str, npt.NDArray[Any]]:
    """Padded rows by the names in INPUTS, (B, L) each; L is one of few lengths, or `max_length`."""
    multiple = fill_up(int(tokens.lengths[rows].max()), 2) if max_length else 1
    batch = pad_batch(tokens, rows, pad_id=pad_id, pad_to_multiple_of=multiple, max_length=max_length)
    mask = batch.attention_mask
    if mask is None:
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
    given = (batch.input_ids, batch.token_type_ids, mask)
    return {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)}


def input_names(model: Any) -> list[str]:
    """Those of INPUTS that the network looks at: some have no token types."""
    return [name for port in model.inputs for name in port.names if name in INPUTS]


class OpenVINOScorer:
    """A converted network with what running it takes; scores rows of token ids as `Scorer` does."""

    device = torch.device("cpu")

    def __init__(
        self,
        model: Any,
        *,
        pad_id: int,
        precision: Precision,
        max_length: int,
        max_batch_tokens: int,
        num_threads: int,
    ) -> None:
        self.model, self.pad_id, self.max_length, self.num_threads = model, pad_id, max_length, num_threads
        self.precision, self.max_batch_tokens, self._owner = precision, max_batch_tokens, os.getpid()
        self.num_labels = model.output(0).partial_shape[1].get_length()
        self._one = _Requests(model, "LATENCY", precision, num_threads)
        self._many: _Requests | None = self._one if num_threads == 1 else None
        if precision.name == "bf16" and not self._one.has_bf16:
            self.precision = Precision("off", "this processor has no bf16 instructions")

    def logits(self, tokens: Tokens, on_rows: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """Logits in the order of `tokens`, (rows, C).

        `on_rows(n)` is called after each n rows. Raises StoppedError when the stop flag is set.
        """
        requests = self._one
        pieces = self._pieces(tokens.lengths, 1)
        if len(pieces) > 1 and os.getpid() == self._owner:  # a forked child has none of the parent's threads
            if self._many is None:
                self._many = _Requests(self.model, "THROUGHPUT", self.precision, self.num_threads)
            requests = self._many
            pieces = self._pieces(tokens.lengths, requests.num_parallel)
        out = np.empty((len(tokens), self.num_labels), np.float32)
        for rows, logits in requests.run(
            pieces, lambda rows: batch_inputs(tokens, rows, self.pad_id, self.max_length)
        ):
            out[rows] = logits
            if on_rows is not None:
                on_rows(len(rows))
        return out

    @property
    def full_tokens(self) -> int:
        """Padded tokens that keep all requests busy; fewer are answered more slowly each."""
        return REQUEST_TOKENS * (self._many or self._one).num_parallel

    def _pieces(self, lengths: npt.NDArray[Any], num_parallel: int) -> list[npt.NDArray[np.int64]]:
        """Row numbers, longest first, in one piece or some for each request, of about equally many tokens."""
        filled = np.array([fill_up(n, 2) for n in range(int(lengths.max(initial=0)) + 1)])[lengths]
        order, total = np.argsort(-filled, kind="stable"), int(filled.sum())
        most = min(REQUEST_TOKENS, self.max_batch_tokens)
        count = max(1, -(-total // (most * num_parallel)) * num_parallel)
        pieces, start = [], 0
        while start < len(order):
            end = start + -(-total // (count * int(filled[order[start]])))
            pieces.append(order[start:end])
            start = end
        return pieces

    def __reduce__(self) -> tuple[object, ...]:
        settings = {
            "pad_id": self.pad_id,
            "precision": self.precision,
            "max_length": self.max_length,
            "max_batch_tokens": self.max_batch_tokens,
            "num_threads": self.num_threads,
        }
        with tempfile.TemporaryDirectory() as folder:
            write(self.model, Path(folder))
            files = [Path(folder, name).read_bytes() for name in (MODEL, WEIGHTS)]
        return _from_bytes, (*files, settings)


class _Requests:
    """A network compiled for one way of sharing the threads."""

    def __init__(self, model: Any, hint: str, precision: Precision, num_threads: int) -> None:
        openvino = load_library("openvino", "engine openvino")
        settings = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision.name == "bf16" else "f32",
            "CPU_RUNTIME_CACHE_CAPACITY": KEPT_KERNELS,
            "ENABLE_CPU_PINNING": False,  # the threads of a server would wait for the cores that these hold
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self.has_bf16 = compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        self.names = input_names(compiled)
        best, is_alone = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"), hint == "LATENCY"
        self.num_parallel = 1 if is_alone else best
        # Twice as many as run: the next one is ready when one ends.
        self.requests = [compiled.create_infer_request() for _ in range(1 if is_alone else 2 * best)]

    def run(
        self,
        pieces: list[npt.NDArray[np.int64]],
        inputs: Callable[[npt.NDArray[np.int64]], dict[str, npt.NDArray[Any]]],
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Each piece of rows with its logits, in the order of the pieces."""
        idle, running = list(self.requests), deque[tuple[npt.NDArray[np.int64], Any]]()

        def finish() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
            rows, request = running.popleft()
            request.wait()
            idle.append(request)
            return rows, request.get_output_tensor(0).data

        try:
            for rows in pieces:
                stop_flag.raise_if_set()
                if not idle:
                    yield finish()
                request, values = idle.pop(), inputs(rows)
                given = {name: values[name] for name in self.names}
                if len(self.requests) == 1:
                    request.infer(given)
                    idle.append(request)
                    yield rows, request.get_output_tensor(0).data
                else:
                    request.start_async(given)
                    running.append((rows, request))
            while running:
                yield finish()
        finally:  # after an exception none may be left running
            for _, request in running:
                request.wait()


def write(model: Any, folder: Path) -> None:
    """MODEL and WEIGHTS of a network; float32 stays float32. OSError where they cannot be written."""
    openvino = load_library("openvino", "engine openvino")
    try:
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    except RuntimeError as error:  # all that the library says of a failed write
        raise OSError(errno.EIO, f"{first_line(error)}; is the disk full?", str(folder)) from error


def read(folder: Path) -> Any:
    """What `write` wrote."""
    return load_library("openvino", "engine openvino").Core().read_model(folder / MODEL)


def _from_bytes(model: bytes, weights: bytes, settings: dict[str, Any]) -> OpenVINOScorer:
    openvino = load_library("openvino", "engine openvino")
    tensor = openvino.Tensor(np.frombuffer(weights, np.uint8), shared_memory=False)
    return OpenVINOScorer(openvino.Core().read_model(model, tensor), **settings)
