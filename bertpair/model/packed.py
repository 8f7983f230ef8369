"""The network of `bert.py` prepared for answering on a CPU: the same function, computed with less work.

Linear layers see tokens only, never padding; query, key and value are one product; the last layer computes
[CLS] alone; the weights are held in the type they are used in, packed once for oneDNN, or in dynamic int8. In
float32 the logits equal `BertClassifier`'s up to rounding.

int8 means: weights rounded per output row to 255 steps, inputs rounded anew at each call, sums exact.
PyTorch's older quantization module does the same with warnings; these are the operators below it.

oneDNN keeps a kernel, some 300 KB, for every number of rows it has ever multiplied. So tokens, and rows in
the last layer, are filled up to one of a few counts (`fill_up`) with copies of the first token; nobody looks
at what becomes of those.

Shapes: B batch, L length, T tokens without padding, T' and B' filled up, D hidden size, N heads, H head size,
C classes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertpair.errors import ConfigError, first_line
from bertpair.model.bert import ACTIVATIONS, BertClassifier, Layer
from bertpair.runtime import cpu_flags

Linear = Callable[[Tensor], Tensor]
MakeLinear = Callable[[Tensor, Tensor, str | None], Linear]  # weight (out, in), bias (out,), an activation
ACTIVATE: dict[Any, Linear] = {None: lambda x: x, **ACTIVATIONS}
_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}
VNNI_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}  # products of bytes, added in 32 bits
TYPICAL_ROWS = 256  # oneDNN chooses the weights' layout for about so many; any number runs


class PackedLayer:
    """One encoder layer, its linear layers made by `linear`; of the last one, queries for [CLS] alone."""

    def __init__(
        self, layer: Layer, linear: Callable[..., Linear], activation: str, *, is_last: bool
    ) -> None:
        query, rest = layer.attention.query, (layer.attention.key, layer.attention.value)
        self.queries = linear(query) if is_last else None  # D → D
        self.context = linear(*rest) if is_last else linear(query, *rest)  # D → 3 D, of the last layer 2 D
        self.out = linear(layer.attention.out)
        self.up = linear(layer.up, activation=activation)
        self.down = linear(layer.down)
        self.attention_norm, self.output_norm = layer.attention_norm, layer.output_norm


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Where the tokens of a batch stand."""

    num_rows: int
    length: int
    num_tokens: int
    places: Tensor  # (T',) among B × L; from T on zeros
    firsts: Tensor  # (B',) of each row's [CLS] among the T tokens; from B on zeros
    mask: Tensor | None  # (B, 1, 1, L)


class PackedClassifier(nn.Module):
    """Made from a `BertClassifier`, whose embeddings and head it shares; the layers' weights it does not."""

    def __init__(self, model: BertClassifier, make: MakeLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        self.embeddings, self.pooler, self.classifier = model.embeddings, model.pooler, model.classifier

        def linear(*parts: nn.Linear, activation: str | None = None) -> Linear:
            weight = torch.cat([part.weight.detach() for part in parts]).to(dtype)
            bias = torch.cat([part.bias.detach() for part in parts]).to(dtype)
            return make(weight, bias, activation)

        *body, last = [layer for layer in model.layers if isinstance(layer, Layer)]
        act = model.config.hidden_act
        self.packed = [PackedLayer(layer, linear, act, is_last=False) for layer in body]
        self.packed.append(PackedLayer(last, linear, act, is_last=True))

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C) in float32; the arguments are `BertClassifier`'s."""
        with torch.autocast("cpu", enabled=False):
            batch, table = locate(input_ids, attention_mask), self.embeddings
            positions = torch.arange(batch.length).expand(batch.num_rows, -1)
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            ids, kinds, at = (each.reshape(-1)[batch.places] for each in (input_ids, types, positions))
            x = table.words(ids) + table.types(kinds) + table.positions(at)  # (T', D)
            x = table.norm(x).to(self.dtype)
            for layer in self.packed:
                x = self.run_layer(layer, x, batch)  # (T', D), after the last (B', D)
            x = x[: batch.num_rows].float()
            logits: Tensor = self.classifier(torch.tanh(self.pooler(x)))  # (B, C)
            return logits

    def run_layer(self, layer: PackedLayer, x: Tensor, batch: _Batch) -> Tensor:
        N, B, L, T = self.config.num_attention_heads, batch.num_rows, batch.length, batch.num_tokens
        places, context = batch.places, layer.context(x)  # (T', 2 D or 3 D)
        if T < B * L:  # zeros at padding
            context = x.new_zeros(B * L, context.shape[1]).index_copy_(0, places[:T], context[:T])
        split = context[: B * L].view(B, L, -1, N, x.shape[1] // N)  # (B, L, 2 or 3, N, H)
        *own, k, v = (part.transpose(1, 2) for part in split.unbind(2))  # (B, N, L, H)
        if layer.queries is not None:
            x = x[batch.firsts]  # (B', D)
            own = [layer.queries(x)[:B].view(B, N, 1, -1)]  # (B, N, 1, H)
            places = torch.arange(len(x)).clamp(max=B - 1)
        mixed = F.scaled_dot_product_attention(own[0], k, v, attn_mask=batch.mask).transpose(1, 2)
        mixed = mixed.reshape(-1, x.shape[1]).index_select(0, places)  # (T', D), in the last layer (B', D)
        x = normalise(layer.attention_norm, layer.out(mixed) + x)
        return normalise(layer.output_norm, layer.down(layer.up(x)) + x)


def locate(input_ids: Tensor, attention_mask: Tensor | None) -> _Batch:
    B, L = input_ids.shape
    places, firsts, mask = torch.arange(B * L), torch.arange(0, B * L, L), None
    if attention_mask is not None:
        is_token = attention_mask.bool()
        lengths = is_token.sum(dim=1)
        places, firsts = is_token.reshape(-1).nonzero().squeeze(1), lengths.cumsum(0) - lengths
        mask = is_token[:, None, None, :]
    filled, first = (F.pad(each, (0, fill_up(len(each)) - len(each))) for each in (places, firsts))
    return _Batch(B, L, len(places), filled, first, mask)


def fill_up(count: int) -> int:
    """The next of a few counts: steps of 4 up to 64, then of at most an eighth."""
    step = max(4, 2 ** ((count - 1).bit_length() - 4)) if count > 1 else 4
    return -(-count // step) * step


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Statistics in float32 whatever the type of `x`."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


@dataclasses.dataclass(frozen=True)
class PlainLinear:
    """PyTorch's own."""

    weight: Tensor
    bias: Tensor
    activation: str | None

    def __call__(self, x: Tensor) -> Tensor:
        return ACTIVATE[self.activation](F.linear(x, self.weight, self.bias))


class PackedLinear:
    """The same up to rounding: the weight is reordered once as oneDNN wants it, the activation fused."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = _FUSED[self.activation]
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
        return result

    def __reduce__(self) -> tuple[object, ...]:  # the reordered weight can be neither copied nor pickled
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
        # Without such products, sums of two overflow 16 bits: inputs get 7 bits.
        self.narrow = VNNI_FLAGS.isdisjoint(cpu_flags())

    def __call__(self, x: Tensor) -> Tensor:
        product = torch.ops.quantized.linear_dynamic(x, self.packed, self.narrow)
        return ACTIVATE[self.activation](product)

    def __reduce__(self) -> tuple[object, ...]:
        quantized, _ = torch.ops.quantized.linear_unpack(self.packed)
        scales = quantized.q_per_channel_scales()
        return type(self), (quantized.int_repr(), scales, self.bias, self.activation)


def int8_linear(weight: Tensor, bias: Tensor, activation: str | None) -> Linear:
    """Round a float32 weight (out, in) to int8, each output row by its own scale."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny * 2**24)
    steps = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Linear(steps, scales.double(), bias, activation)


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


def choose_linear(dtype: torch.dtype) -> MakeLinear:
    """`PackedLinear` wherever this build of PyTorch runs it for weights of `dtype`, else `PlainLinear`.

    Packing was the faster one for every size of layer and of batch that was measured.
    """
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        PackedLinear(ones, ones[0], None)(ones)
    except (AttributeError, RuntimeError):  # the operators are private, and some builds lack them
        return PlainLinear
    return PackedLinear
