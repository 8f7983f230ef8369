"""A server's life: bind, load, listen, warm up, serve, drain. A busy port or wrong folder is told first.

uvicorn is handed a bound socket and no signals: SIGTERM first only makes readyz say no and answers end their
connections, because whoever routes to us must see that before the listener goes. Then whoever has begun to
connect gets in, and what has come is answered.
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import uvicorn

from bertpair.console import LogWriter, stop_flag
from bertpair.errors import first_line
from bertpair.runtime import is_device_lost, is_out_of_memory, set_threads
from bertpair.serving import listening
from bertpair.serving.app import Service
from bertpair.serving.batcher import MicroBatcher, QueueLimits
from bertpair.serving.listening import Listener
from bertpair.serving.metrics import ServeMetrics, access_logger
from bertpair.serving.middleware import Shell
from bertpair.serving.predictor import Predictor, load_predictor
from bertpair.serving.protocol import GuardedProtocol
from bertpair.serving.requests import MAX_URL_BYTES
from bertpair.settings.serve import ServeConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")

TARGET_SECONDS = 0.3  # of the largest batch, where max_batch_tokens is left to the warm-up
CONNECT_SECONDS = 0.2  # once new clients are refused: those on their way are in by then


def serve(config: ServeConfig) -> int:
    """Serve until a signal says stop; 0 once drained. ConfigError or CheckpointError before it listens."""
    listening.check_descriptors(config.max_connections)
    path, most = config.api_key_file, config.max_header_bytes // 2
    key = listening.read_key(path, most) if path else None
    listener = listening.bind(config)
    try:
        predictor = aside(load_predictor, config)
        if not listening.is_local(config) and key is None:
            logger.warning("%s is reachable from other machines and no api_key_file is set", config.host)
        return asyncio.run(_run(config, predictor, key, listener))
    finally:
        listener.close()


def aside(function: Callable[..., T], *given: Any) -> T:
    """What `function` returns or raises, computed on a thread of its own, which ends.

    PyTorch gives each thread that computes helpers of its own. With those of two threads they are more than
    the cores, and then OpenMP puts them to sleep between any two steps: a request took a fifth longer.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *given).result()


async def _run(config: ServeConfig, predictor: Predictor, key: bytes | None, listener: Listener) -> int:
    service, stopping = make_service(config, predictor, key), asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(signum: int) -> None:
        """The first signal drains; from now on the next one ends the process at once."""
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        logger.info("%s: draining for %g s", signal.Signals(signum).name, config.drain_seconds)
        service.is_draining = True
        listener.hand_over()
        stopping.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    stop_flag.raise_if_set()  # a signal that came while the model was loaded
    server = make_uvicorn(service)
    listener.listen()
    logger.info("listening on %s", listener)
    serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
    warming = asyncio.create_task(_warm(service))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, warming, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if warming.done():
        warming.result()  # a defect in it ends the server
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    warming.cancel()
    await asyncio.wait({serving}, timeout=config.drain_seconds)
    listener.refuse()
    await asyncio.sleep(CONNECT_SECONDS)
    return await _finish(service, server, serving)


async def _warm(service: Service) -> None:
    config, batcher, predictor = service.config, service.batcher, service.predictor
    if config.quantize_check and config.model_dir and not config.quantize:  # int8 was compared when made
        texts = predictor.read_check(config.quantize_check)
        await asyncio.to_thread(aside, predictor.check_agreement, config.model_dir, texts)
    await warm_up(predictor, batcher, config.max_batch_tokens)
    service.is_warm = True
    logger.info("ready: batches of up to %d tokens", batcher.limits.max_batch_tokens)


async def _finish(service: Service, server: uvicorn.Server, serving: asyncio.Task[None]) -> int:
    """0 once what has come is answered; after `grace_seconds` the process ends with 1."""
    server.should_exit = True
    grace, connections = service.config.grace_seconds, server.server_state.connections
    end = time.monotonic() + grace
    done, _ = await asyncio.wait({serving}, timeout=grace)
    guarded: list[Any] = list(connections)
    if not done and not any(connection.is_busy for connection in guarded):
        for connection in guarded:  # idle ones, whose clients do not close
            connection.transport.abort()
        done, _ = await asyncio.wait({serving}, timeout=1)
    # A client may have left while its rows ran: nobody waits for those, but the thread is at them.
    if not done or not await service.batcher.close(max(end - time.monotonic(), 0.5)):
        logger.error("work was left over after %g s", grace)
        end_process()
    serving.result()
    service.tokenizing.shutdown(wait=False)
    logger.info("drained")
    return 0


def make_service(config: ServeConfig, predictor: Predictor, key: bytes | None) -> Service:
    """The service with its queue and its figures; called on the event loop."""
    metrics = ServeMetrics()
    max_batch_tokens = config.max_batch_tokens or QueueLimits.max_batch_tokens  # until the warm-up finds it
    batcher = MicroBatcher(
        predictor.run,
        QueueLimits(max_batch_tokens, config.max_queue_rows, config.queue_deadline),
        on_batch=metrics.count_batch,
        on_drop=lambda reason, num_rows: metrics.drops.labels(reason).inc(num_rows),
        on_error=end_if_device_lost,
    )
    service = Service(config, predictor, batcher, metrics, key)
    metrics.inflight_bytes.set_function(lambda: service.inflight_bytes)
    metrics.queue_depth.set_function(lambda: batcher.num_waiting)
    metrics.running.set_function(lambda: batcher.worker.running_seconds)
    return service


def end_if_device_lost(error: BaseException) -> None:
    """A device that answers every call with the same error comes back with a new process only."""
    if is_device_lost(error):
        logger.critical("the device is lost, the server ends: %s", first_line(error))
        end_process()


def end_process() -> NoReturn:
    """End although a thread hangs in the model: it cannot be waited for."""
    logging.shutdown()
    os._exit(1)


def make_uvicorn(service: Service) -> uvicorn.Server:
    """uvicorn with our protocol and our shell around the service's routes, and no handlers for signals."""
    config = service.config
    silent: Any = {"log_config": None, "access_log": False, "server_header": False}
    settings = uvicorn.Config(
        Shell(service.routes(), service.metrics, config),
        http=functools.partial(GuardedProtocol, service=service),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="off",
        backlog=listening.BACKLOG,
        # More than the application allows: it is the one that answers 431 and 414, after 404 and 401.
        h11_max_incomplete_event_size=config.max_header_bytes + MAX_URL_BYTES + 1024,
        timeout_keep_alive=config.keep_alive,  # type: ignore[arg-type]  # a fraction does as well
        root_path=config.root_path or "",
        proxy_headers=config.forwarded_allow_ips is not None,
        forwarded_allow_ips=listening.trusted_proxies(config.forwarded_allow_ips or ""),
        **silent,
    )
    server = uvicorn.Server(settings)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    return server


async def warm_up(
    predictor: Predictor, batcher: MicroBatcher[Any, Any], max_batch_tokens: int | None
) -> None:
    """Find the budget and the speed, then run every shape once, each batch on the model's thread.

    A batch that runs out of memory is too large, as one that is too slow; also where the budget was given.
    """

    async def time_batch(lengths: list[int]) -> float:
        try:
            seconds: float = await batcher.worker.call(lambda: predictor.time_batch(lengths))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        return seconds

    limits, cut, most_rows = batcher.limits, predictor.cut, batcher.limits.max_queue_rows
    await batcher.worker.call(lambda: set_threads(predictor.num_threads))  # a setting of each thread
    good, bad, most = 0, 0, (max_batch_tokens or 0) // cut or most_rows
    # The number of longest rows doubles until a batch is too slow; then the gap is halved, down to an eighth.
    while (bad - good > max(1, good // 8)) if bad else (good < most):
        num_rows = (good + bad) // 2 if bad else min(most, max(1, 2 * good))
        seconds = await time_batch([cut] * num_rows)
        if seconds < math.inf:
            batcher.pace.note(num_rows * cut, seconds)
        good, bad = (num_rows, bad) if seconds <= TARGET_SECONDS else (good, num_rows)
    good = max(1, good, predictor.full_batch_tokens // cut)
    limits.max_batch_tokens = min(max_batch_tokens or good * cut, most_rows * cut)
    for lengths in predictor.warm_shapes(limits.max_batch_tokens, most_rows):
        tokens = sum(lengths)
        if tokens <= limits.max_batch_tokens and await time_batch(lengths) == math.inf:
            limits.max_batch_tokens = max(cut, tokens // 2)
            logger.warning("out of memory: batches have at most %d tokens", limits.max_batch_tokens)


def configure_serve_logging() -> None:
    """The access log, a JSON line per answer, goes to standard output, the rest to standard error."""
    access_logger.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            sys.stderr.flush()
            writer = LogWriter(sys.stderr.fileno(), "standard error")
            writer.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(writer)
    if sys.stdout is None:
        logger.warning("standard output is closed: there is no access log")
    else:
        sys.stdout.flush()
        access_logger.addHandler(LogWriter(sys.stdout.fileno(), "standard output"))
