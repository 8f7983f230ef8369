"""The processes of one run, as torchrun starts them: which one this is, and what they tell each other.

`ALONE` is a run of one process, for which nothing here does anything. What they tell each other travels as
bytes and numbers, never as a pickle. A process that is gone, or silent for longer than `ddp_timeout`, is a
TrainingError in the others.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from bertpair.console import rank_and_size, stop_flag
from bertpair.errors import BertpairError, ConfigError, ElsewhereError, TrainingError, first_line

T = TypeVar("T")
_ADDRESS_OF_INTERFACE = 0x8915  # Linux's SIOCGIFADDR
BUCKET = 1 << 23  # numbers summed at once: their copy is 32 MiB, and a network is busy enough


class Processes:
    """`size` processes that do the same, each on its own rows; `rank` counts them from 0.

    Whatever all of them must call is said to be for all; a process that leaves one out blocks the others.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """What each process gave, in the order of ranks. For all."""
        if self.size == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _answering():
            dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(1, *(int(size) for size in sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        own = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        with _answering():
            dist.all_gather(parts, own)
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(parts, sizes, strict=True)]

    def share(self, value: Any) -> Any:
        """The first process's value, which JSON can hold, in every process. For all."""
        if self.size == 1:
            return value
        return json.loads(self.gather(json.dumps(value).encode() if self.is_first else b"")[0])

    def all_or_none(self, make: Callable[[], T]) -> T:
        """`make()`; where it raises a BertpairError in some process, the first of these raises it, and all
        others an ElsewhereError. For all."""
        if self.size == 1:
            return make()
        error = None
        try:
            made = make()
        except BertpairError as raised:
            error = raised
        failed = [rank for rank, mark in enumerate(self.gather(b"" if error is None else b"x")) if mark]
        if not failed:
            return made
        if error is not None and failed[0] == self.rank:
            raise error
        raise ElsewhereError(f"process {failed[0]} of this run cannot go on")

    def check_same(self, what: str, content: str) -> None:
        """ConfigError, as from `all_or_none`, unless all have the same content of `what`. For all."""
        found = self.gather(content.encode())
        others = [str(rank) for rank, each in enumerate(found) if each != found[0]]

        def check() -> None:
            if others:
                plural = "es" if len(others) > 1 else ""
                raise ConfigError(
                    f"{what}: process{plural} {', '.join(others)} did not read what process 0 read; "
                    "every machine needs the same files and settings"
                )

        self.all_or_none(check)

    def raise_if_stopped(self) -> None:
        """StoppedError in every process where one of them was asked to stop. For all."""
        if self.size > 1:
            signum = torch.tensor([stop_flag.signum or 0])
            with _answering():
                dist.all_reduce(signum, dist.ReduceOp.MAX)
            if signum.item():
                stop_flag.request(int(signum))
        stop_flag.raise_if_set()

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same to the bit in all. For all."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            is_lone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if is_lone else torch.cat([each.reshape(-1) for each in bucket])
            with _answering():
                dist.all_reduce(flat)
            parts = () if is_lone else torch.split(flat, [each.numel() for each in bucket])
            for each, part in zip(bucket, parts, strict=not is_lone):
                each.copy_(part.view_as(each))

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        """Sum gradients and `loss` over the processes. One that had no rows adds nothing. For all.

        Every parameter is taken to be in use: it has a gradient wherever there are rows.
        """
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([*(each.grad for each in parameters if each.grad is not None), loss])

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place. For all."""
        for each in tensors if self.size > 1 else ():
            with _answering():
                dist.broadcast(each.data, 0)


ALONE = Processes()


@contextmanager
def _answering() -> Iterator[None]:
    """A TrainingError where another process is gone or does not answer."""
    try:
        yield
    except RuntimeError as error:  # torch's errors of networks and backends are of its kind
        raise TrainingError(
            "another process of this run has ended, or does not answer; what it said last tells why "
            f"({_reason(error)}). The same command, in training with --resume, goes on from what was saved"
        ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the place in torch's source before it."""
    return re.sub(r"\[/\S+\] ", "", first_line(error)).partition(". ")[0][:160]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind, as many as `BUCKET` holds."""
    bucket: list[Tensor] = []
    held = 0
    for each in tensors:
        is_full = held + each.numel() > BUCKET or (each.dtype, each.device) != (
            (bucket[0].dtype, bucket[0].device) if bucket else None
        )
        if bucket and is_full:
            yield bucket
            bucket, held = [], 0
        bucket.append(each)
        held += each.numel()
    if bucket:
        yield bucket


def _interface_to_others(size: int) -> str | None:
    """The network interface that leads to the first machine, where there are several.

    gloo would take the one that this machine's name leads to, which often is 127.0.0.1.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size:
        return None
    try:
        import fcntl  # not on Windows

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
            line.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing
            own = line.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    asked = struct.pack("256s", name.encode()[:15])
                    found = fcntl.ioctl(line.fileno(), _ADDRESS_OF_INTERFACE, asked)
                    if socket.inet_ntoa(found[20:24]) == own:
                        return name
    except (ImportError, OSError, KeyError):
        pass
    return None


def _meet(store: Store, rank: int, size: int, timeout_seconds: int) -> str:
    """A name for this meeting of the processes, when all are there. For all.

    After a restart torchrun's store still holds the addresses of the processes before, and torch would call
    some of these: so what is stored goes under a name of its own each time.
    """
    own, names = uuid.uuid4().hex, [f"here/{each}" for each in range(size)]
    store.set(names[rank], own)
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        stop_flag.raise_if_set()
        if rank == 0 and store.check(names):
            store.set("roll", json.dumps([store.get(name).decode() for name in names]))
            if store.add(f"came/{own}", 0) == size - 1:
                return own
        elif rank and store.check(["roll"]) and (roll := json.loads(store.get("roll")))[rank] == own:
            store.add(f"came/{roll[0]}", 1)
            return str(roll[0])
        time.sleep(0.02)
    raise RuntimeError(f"some did not come within {timeout_seconds} seconds")


@contextmanager
def joined(timeout_seconds: int) -> Iterator[Processes]:
    """The processes that torchrun started, if it did, else `ALONE`; together until the block ends."""
    rank, size = rank_and_size()
    if size == 1 or dist.is_initialized():
        yield ALONE if size == 1 else Processes(rank, size)
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if name := _interface_to_others(size):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    try:
        store = next(rendezvous("env://", rank, size, timeout=timeout))[0]
        store = PrefixStore(_meet(store, rank, size, timeout_seconds), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # ValueError: an address that is missing or no address
        raise TrainingError(
            f"the {size} processes of this run did not find each other: {_reason(error)}. On several "
            "machines, GLOO_SOCKET_IFNAME names the network interface that leads to the others, such as eth0"
        ) from error
    try:
        yield Processes(rank, size)
    except BaseException:
        if not has_nccl:  # which would wait for what the others never send
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
