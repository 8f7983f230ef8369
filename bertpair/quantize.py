"""Linear maps prepared once for many forwards on a CPU: packed for oneDNN, or in dynamic int8.

A `Linear` takes (T, in) and gives (T, out), its activation included. int8 here means: weights rounded per
output row to 255 steps, inputs rounded anew at each call, sums exact in int32. PyTorch's older quantization
module does the same with warnings; these are the operators below it, and this is the one place that names
them. Where they are missing, `check_int8` says so.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bertpair.errors import ConfigError
from bertpair.model import ACTIVATIONS

Linear = Callable[[Tensor], Tensor]
MakeLinear = Callable[[Tensor, Tensor, str | None], Linear]  # weight (out, in), bias (out,), an activation

_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}
TYPICAL_ROWS = 256  # oneDNN chooses the weights' layout for about so many; any number runs
PROBE_ROWS = 64
PROBE_ROUNDS = 5
PAYS = 1.1  # packing is taken where it is faster by this factor


def plain_linear(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """PyTorch's own."""
    if activation is None:
        return lambda x: F.linear(x, weight, bias)
    function = ACTIVATIONS[activation]
    return lambda x: function(F.linear(x, weight, bias))


def packed_linear(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """The same with the weight reordered once as oneDNN wants it, and the activation fused.

    In float32 it equals `plain_linear` up to rounding.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    name, algorithm = _FUSED[activation]
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, name, [], algorithm)


def int8_linear(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """Dynamic int8; inputs, bias and outputs are float32."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny * 2**24)
    steps = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():  # that such tensors will be removed one day; `check_int8` will see it
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(steps, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    run = torch.ops.quantized.linear_dynamic
    narrow = not cpu_has_vnni()  # without it, sums of two products overflow 16 bits: inputs get 7 bits
    if activation is None:
        return lambda x: run(x, packed, narrow)
    function = ACTIVATIONS[activation]
    return lambda x: function(run(x, packed, narrow))


def check_int8() -> None:
    """ConfigError where this machine or this PyTorch cannot run int8 linears, or not rightly."""
    weight = torch.linspace(-1, 1, 32 * 16).reshape(32, 16)
    x = torch.linspace(-2, 2, 5 * 16).reshape(5, 16)
    try:
        found = int8_linear(weight, torch.zeros(32), None)(x)
    except Exception as error:  # which one differs between builds of PyTorch
        raise ConfigError(f"quantize int8 does not run here: {str(error).splitlines()[0]:.200}") from error
    if (found - F.linear(x, weight)).abs().max() > 0.2:
        raise ConfigError("quantize int8 gives wrong sums on this machine")


def cpu_has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor adds products of bytes in 32 bits (VNNI, AMX, or Arm's dot products)."""
    try:
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return False
    known = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
    return any(not known.isdisjoint(line.split()) for line in lines)


def choose_linear(weight: Tensor) -> MakeLinear:
    """`packed_linear` where it pays for weights of this type and shape, else `plain_linear`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return plain_linear
    bias = torch.zeros(len(weight), dtype=weight.dtype)
    x = torch.full((PROBE_ROWS, weight.shape[1]), 0.01, dtype=weight.dtype)
    try:
        candidates = [make(weight, bias, None) for make in (plain_linear, packed_linear)]
        with torch.inference_mode():
            rounds = [[_time(linear, x) for linear in candidates] for _ in range(1 + PROBE_ROUNDS)]
    except (AttributeError, RuntimeError):  # the operators are private, and some builds lack them
        return plain_linear
    plain, packed = (min(times) for times in zip(*rounds[1:], strict=True))
    return packed_linear if plain > PAYS * packed else plain_linear


def _time(linear: Linear, x: Tensor) -> float:
    began = time.perf_counter()
    linear(x)
    return time.perf_counter() - began
