"""The machine under a run: device, precision, threads, seeds, random state and memory.

Whatever is found out here (`auto`, a core count) comes back as a plain name or number that the caller stores
with the run and passes in again on resume. What can change a result follows a rule, never a stopwatch.
"""

import contextlib
import ctypes
import logging
import math
import os
import random
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bertpair.console import rank_and_size
from bertpair.errors import BertpairError, ConfigError, first_line

logger = logging.getLogger(__name__)

PrecisionName = Literal["off", "bf16", "fp16"]
BF16_HIDDEN_SIZE = 256  # bf16 pays on a CPU from this size on: see benchmarks/precision.py and LOG.md
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")  # as /proc/cpuinfo names them on x86 and Arm
VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")  # products of bytes, added in 32 bits
ONEDNN_LEVELS = {  # what is left of those flags where ONEDNN_MAX_CPU_ISA is set to a lower level
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX512_CORE"), ()),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), ("avx_vnni",)),
    "AVX512_CORE_VNNI": ("avx_vnni", "avx512_vnni"),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16"), ("avx_vnni", "avx512_vnni", "avx512_bf16")),
}


def resolve_device(name: str) -> torch.device:
    """`auto` (first GPU, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`; ConfigError says what is there.

    Of several processes of a run, each has a GPU of its own, counted as torchrun counts the processes of a
    machine. On CUDA, cuDNN's attention is switched off for the process.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"device: found {name!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    here = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    here += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if rank_and_size()[1] > 1 and (name == "cuda" or (name == "auto" and here[0] == "cuda:0")):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = here[0]
    elif name == "cuda" and "cuda:0" in here:
        name = f"cuda:{torch.cuda.current_device()}"
    if name not in here:
        has_cuda = name == "mps" or torch.version.cuda or torch.version.hip
        built = "" if has_cuda else " and torch is built without CUDA"
        raise ConfigError(f"device: there is no {name} on this machine{built}; there is: {', '.join(here)}")
    if name.startswith("cuda"):
        # It makes a plan for every shape of batch, up to 440 ms each, and a masked backward has given NaN.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if rank_and_size()[1] > 1:  # where the processes' own messages go through
            torch.cuda.set_device(name)
    return torch.device(name)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may really use: its affinity, cut by the CPU quota of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # Rounded up: threads under a quota of 1.5 cores are halted together, so two of them do get all of it.
    return min([cores, *(max(1, math.ceil(quota)) for quota in _cgroup_quotas(root))])


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's groups and of all groups around them (v1, v2, or both)."""
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the mount itself may be the group that `path` names from outside: then `path` is not
        # found below it, and the walk up to the mount's top still finds the quota.
        parts = PurePosixPath(path).parts[1:]
        for mount in {controllers, "cpu"} if controllers else {"", "unified"}:
            for depth in range(len(parts) + 1):
                folder = root.joinpath("sys/fs/cgroup", mount, *parts[:depth])
                v1 = " ".join(_read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                for text in (_read_text(folder / "cpu.max"), v1):  # v2: "150000 100000" or "max …"; v1: -1
                    if found := re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", text):
                        yield int(found[1]) / int(found[2])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def set_threads(num_threads: int | None) -> int:
    """Set torch's threads and return what is in force; None: torch's own choice, cut to the usable cores."""
    torch.set_num_threads(num_threads or min(torch.get_num_threads(), usable_cores()))
    return torch.get_num_threads()


_threads_of: int | None = None  # the process whose threads compute


def survive_fork() -> None:
    """Call before computing. A child forked after that has one thread from its first call on.

    The parent's threads do not exist in the child, and PyTorch would wait for them for ever.
    """
    global _threads_of
    if _threads_of not in (None, os.getpid()):
        logger.info("forked after its first use: computing with one thread")
        torch.set_num_threads(1)
    _threads_of = os.getpid()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation; False where there is no glibc to tell.

    By default glibc takes each large tensor fresh from the kernel, which zeroes its pages: with the 370 MB
    gradient of mBERT's word table that was a third of a training step on a CPU, and with a tiny model a
    quarter of the scoring. The price is a process that stays at its peak. It holds for the whole process, so
    scripts call it, not the library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # M_TRIM_THRESHOLD off, M_TOP_PAD 64 MiB, and M_MMAP_MAX 0: older glibcs refuse a large M_MMAP_THRESHOLD.
    return all([mallopt(option, value) == 1 for option, value in ((-1, -1), (-2, 64 * 2**20), (-4, 0))])


MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory")
LOST_WORDS = (  # after these a CUDA context answers every call with the same error, until the process ends
    *("device-side assert", "illegal memory access", "illegal instruction", "misaligned address"),
    *("unspecified launch failure", "launch timed out", "hardware stack error", "invalid program counter"),
    *("operation not supported on global/shared address space", "uncorrectable ecc error"),
    "context is destroyed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: Python's, PyTorch's or a device's way of saying so."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in MEMORY_WORDS)


@contextlib.contextmanager
def explain_memory(device: torch.device) -> Iterator[None]:
    """Around the loading of a model: a ConfigError says it in one line where memory runs out."""
    try:
        yield
    except BertpairError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release_locals(error)
        what = f"out of memory: {device} has no room for the model ({first_line(error):.160})"
        advice = "free some memory there, or choose another device with --device"
        raise ConfigError(f"{what}; {advice}") from error


def is_device_lost(error: BaseException) -> bool:
    """Whether it is a CUDA error after which this process can use the device no more."""
    text = str(error).lower()
    return "cuda" in text and any(word in text for word in LOST_WORDS)


def release_locals(error: BaseException) -> None:
    """Let go of what the frames of its traceback hold: or a batch would live as long as its error."""
    left: BaseException | None = error
    while left is not None:
        traceback.clear_frames(left.__traceback__)
        left = left.__context__


def physical_memory() -> int:
    """Bytes of memory that the machine has; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def peak_memory_gb(device: torch.device) -> float:
    """The most memory so far, in 10⁹ bytes: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    # Not getrusage: its peak counts the program that started this one. Outside Linux there is no figure: 0.
    found = re.search(r"VmHWM:\s*(\d+) kB", _read_text(Path("/proc/self/status")))
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def reset_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak from now on; a process's own peak on a CPU stays."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else: none yet
        torch.cuda.reset_peak_memory_stats(device)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, every device's included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Bitwise repeatable results on one machine, on CUDA too; torch raises where it has no such kernel."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS first starts
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # pure cost
    torch.backends.cudnn.deterministic = on
    if torch.are_deterministic_algorithms_enabled() != on:  # the call imports torch's compiler: over a second
        torch.use_deterministic_algorithms(on)


def seed_apart(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators for a process after the first, so that its dropout differs from the others'."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's random states (uint8) that a resume needs: the CPU's, and the GPU's where one is used."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`; a GPU's state is passed over on another kind of device, and said to be
    missing where the device is a GPU and the state was a CPU's."""
    torch.set_rng_state(state["cpu"].cpu().clone())  # a clone is aligned: torch reads it as a struct
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu().clone(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu().clone())
    elif device.type != "cpu":
        logger.warning("the checkpoint has no random state of a %s device: dropout starts anew", device.type)


@dataclass(frozen=True)
class Precision:
    """What matrix products are computed in (`off`: float32; the weights are float32 anyhow), and why."""

    name: PrecisionName
    reason: str

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context for a forward pass; does nothing when the name is `off`."""
        off = self.name == "off"
        return contextlib.nullcontext() if off else torch.autocast(device.type, dtype=self.dtype)

    def paused(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Within `autocast`: the context for what is computed in float32, such as the loss and backward."""
        off = self.name == "off"
        return contextlib.nullcontext() if off else torch.autocast(device.type, enabled=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products."""
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]


def resolve_precision(amp: str, device: torch.device, *, hidden_size: int) -> Precision:
    """Turn the setting `amp` into a precision; ConfigError where the device cannot do what is asked.

    `auto`: on a CPU bf16 where the processor computes it faster and the model is large enough.
    """
    if amp not in ("auto", "off", "bf16", "fp16"):
        raise ConfigError(f"amp: found {amp!r}; allowed: auto, off, bf16, fp16")
    allowed = allowed_precisions(device)
    if amp in allowed:
        if amp == "bf16" and device.type == "cpu" and cpu_bf16_flag() is None:
            logger.warning("amp bf16: this processor has no fast bf16 instructions; float32 is faster here")
        return Precision(amp, "as set")
    if amp != "auto":
        raise ConfigError(f"amp: {amp} does not run on {device}; allowed here: auto, {', '.join(allowed)}")
    if device.type != "cpu":
        return Precision(allowed[-1], f"the fastest that {device} has")
    flag = cpu_bf16_flag()
    if flag is None:
        return Precision("off", "this processor has no fast bf16 instructions")
    if hidden_size < BF16_HIDDEN_SIZE:
        return Precision("off", f"the model is small: hidden_size {hidden_size} is below {BF16_HIDDEN_SIZE}")
    reason = f"the processor has {flag} and the model is large enough (hidden_size {hidden_size})"
    return Precision("bf16", reason)


def allowed_precisions(device: torch.device) -> list[PrecisionName]:
    """What `amp` may be set to, the best last."""
    if device.type != "cuda":
        return ["off", "bf16"] if device.type == "cpu" else ["off"]  # bf16 runs on any CPU, if slowly
    with explain_memory(device), torch.cuda.device(device):  # where the process first asks for some of it
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["off", "fp16", "bf16"] if has_bf16 else ["off", "fp16"]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor says it can do, in the words of Linux; nothing elsewhere.

    Less what oneDNN, which computes the products, is told not to use by ONEDNN_MAX_CPU_ISA.
    """
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", _read_text(cpuinfo), re.MULTILINE)  # x86, Arm
    flags = set(" ".join(lines).split())
    kept = ONEDNN_LEVELS.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper())
    return flags if kept is None else flags - {*BF16_FLAGS, *VNNI_FLAGS} | (flags & {*kept})


def cpu_bf16_flag(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The flag that says the processor multiplies bf16 matrices faster than float32; None where none does.

    Without AMX, Intel's do so at half the speed of float32: benchmarks/LOG.md, 2026-11-30.
    """
    flags = cpu_flags(cpuinfo)
    if "GenuineIntel" in _read_text(cpuinfo):
        flags.discard("avx512_bf16")
    return next((flag for flag in BF16_FLAGS if flag in flags), None)


def has_vnni() -> bool:
    """Whether the processor multiplies and adds bytes in one instruction."""
    return not cpu_flags().isdisjoint(VNNI_FLAGS)


class LossScaler:
    """fp16's loss scale, as torch.amp.GradScaler has it, kept on the device: no step waits to read it.

    It is never below `FLOOR`: gradients that overflow there do so by themselves, and halving is no help.
    """

    FLOOR = 1.0

    def __init__(self, enabled: bool, device: torch.device, growth_interval: int = 2000) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.scale = torch.tensor(65536.0 if enabled else 1.0, device=device)
        self.growth_tracker = torch.tensor(0, dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale after a step whose gradients overflowed, double it after enough good ones."""
        if self.enabled:
            state = self.scale, self.growth_tracker
            torch._amp_update_scale_(*state, found_inf, 2.0, 0.5, self.growth_interval)
            self.scale.clamp_(min=self.FLOOR)

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON. Waits for the device."""
        return {"scale": self.scale.item(), "growth_tracker": int(self.growth_tracker.item())}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        if self.enabled:
            self.scale.fill_(max(state["scale"], self.FLOOR))
            self.growth_tracker.fill_(state["growth_tracker"])
