"""Linear maps prepared once for many forwards on a CPU: packed for oneDNN, or in dynamic int8.

A `Linear` takes (T, in) and gives (T, out), its activation included. int8 here means: weights rounded per
output row to 255 steps, inputs rounded anew at each call, sums exact in int32. PyTorch's older quantization
module does the same with warnings; these are the operators below it, and this is the one place that names
them. Where they are missing, `check_int8` says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bertpair.errors import ConfigError, first_line
from bertpair.model.bert import ACTIVATIONS

Linear = Callable[[Tensor], Tensor]
MakeLinear = Callable[[Tensor, Tensor, str | None], Linear]  # weight (out, in), bias (out,), an activation

_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}
TYPICAL_ROWS = 256  # oneDNN chooses the weights' layout for about so many; any number runs


class PlainLinear:
    """PyTorch's own."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None) -> None:
        self.weight, self.bias, self.activation = weight, bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        return activate(F.linear(x, self.weight, self.bias), self.activation)


class PackedLinear:
    """The same with the weight reordered once as oneDNN wants it, and the activation fused.

    In float32 it equals `PlainLinear` up to rounding.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = _FUSED[self.activation]
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return result

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # the reordered weight itself can be neither copied nor pickled
        return type(self), (self.packed.to_dense(), self.bias, self.activation)


class Int8Linear:
    """Dynamic int8; inputs, bias and outputs are float32."""

    def __init__(self, steps: Tensor, scales: Tensor, bias: Tensor, activation: str | None) -> None:
        """`steps` (out, in) int8 times `scales` (out,) float64 are the weight."""
        zeros = torch.zeros(len(steps), dtype=torch.int64)
        with warnings.catch_warnings():  # that such tensors will be removed one day; `check_int8` will see it
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(steps, scales, zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        self.bias, self.activation = bias, activation
        self.narrow = (
            not cpu_has_vnni()
        )  # without it, sums of two products overflow 16 bits: inputs get 7 bits

    def __call__(self, x: Tensor) -> Tensor:
        product = torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow)
        return activate(product, self.activation)

    def __reduce__(self) -> tuple[object, ...]:
        quantized, _ = torch.ops.quantized.linear_unpack(self.packed)
        scales = quantized.q_per_channel_scales()
        return type(self), (quantized.int_repr(), scales, self.bias, self.activation)


def int8_linear(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """Round a float32 weight (out, in) to int8, each output row by its own scale."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny * 2**24)
    steps = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Linear(steps, scales.double(), bias, activation)


def activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else ACTIVATIONS[activation](x)


def check_int8() -> None:
    """ConfigError where this machine or this PyTorch cannot run int8 linears, or not rightly."""
    weight = torch.linspace(-1, 1, 32 * 16).reshape(32, 16)
    x = torch.linspace(-2, 2, 5 * 16).reshape(5, 16)
    try:
        found = int8_linear(weight, torch.zeros(32), None)(x)
    except Exception as error:  # which one differs between builds of PyTorch
        raise ConfigError(f"quantize int8 does not run here: {first_line(error):.200}") from error
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


def choose_linear(dtype: torch.dtype) -> MakeLinear:
    """`PackedLinear` wherever this build of PyTorch runs it for weights of `dtype`, else `PlainLinear`.

    Packing was the faster one for every size of layer and of batch that was measured.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return PlainLinear
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        PackedLinear(ones, ones[0], None)(ones)
    except (AttributeError, RuntimeError):  # the operators are private, and some builds lack them
        return PlainLinear
    return PackedLinear
