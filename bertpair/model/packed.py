"""The network of `bert.py` prepared for answering on a CPU: the same function, computed with less work.

Linear layers see tokens only, never padding; query, key and value are one product; the last layer computes
[CLS] alone; the weights are held in the type they are used in, packed once for oneDNN. In float32 the logits
equal `BertClassifier`'s up to rounding.

oneDNN keeps a kernel, some 300 KB, for every number of rows it has ever multiplied. So tokens, and rows in
the last layer, are filled up to a few counts with copies of the first token, which nobody looks at.

Shapes: B batch, L length, T tokens (T' filled up), D hidden size, N heads, H head size, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertpair.data.batching import fill_up
from bertpair.model.bert import ACTIVATIONS, BertClassifier, Layer

_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}
TYPICAL_ROWS = 256  # oneDNN chooses the weights' layout for about so many; any number runs


class PackedClassifier(nn.Module):
    """Made from a `BertClassifier`, whose embeddings and head it shares; the layers' weights it does not."""

    def __init__(self, model: BertClassifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype, packs = model.config, dtype, can_pack(dtype)
        self.embeddings, self.pooler, self.classifier = model.embeddings, model.pooler, model.classifier
        act, last = model.config.hidden_act, model.layers[-1]
        layers = (layer for layer in model.layers if isinstance(layer, Layer))
        self.packed = [PackedLayer(each, act, dtype, packs=packs, is_last=each is last) for each in layers]

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
                x = layer(x, batch)  # (T', D), after the last (B', D)
            x = x[: batch.num_rows].float()
            logits: Tensor = self.classifier(torch.tanh(self.pooler(x)))  # (B, C)
            return logits


class PackedLayer:
    """One encoder layer; the last one for [CLS] alone."""

    def __init__(self, layer: Layer, act: str, dtype: torch.dtype, *, packs: bool, is_last: bool) -> None:
        def linear(*parts: nn.Linear, activation: str | None = None) -> PackedLinear:
            weight = torch.cat([part.weight.detach() for part in parts]).to(dtype)
            bias = torch.cat([part.bias.detach() for part in parts]).to(dtype)
            return PackedLinear(weight, bias, activation, packs)

        attention, self.num_heads = layer.attention, layer.attention.num_heads
        query, rest = attention.query, (attention.key, attention.value)
        self.queries = linear(query) if is_last else None  # D → D
        self.context = linear(*rest) if is_last else linear(query, *rest)  # D → 3 D, of the last layer 2 D
        self.out, self.down = linear(attention.out), linear(layer.down)
        self.up = linear(layer.up, activation=act)
        self.norms = layer.attention_norm, layer.output_norm

    def __call__(self, x: Tensor, batch: _Batch) -> Tensor:
        """x (T', D) → (T', D), of the last layer (B', D)."""
        N, B, L, T = self.num_heads, batch.num_rows, batch.length, batch.num_tokens
        places, context = batch.places, self.context(x)  # (T', 2 D or 3 D)
        if T < B * L:  # zeros at padding
            context = x.new_zeros(B * L, context.shape[1]).index_copy_(0, places[:T], context[:T])
        split = context[: B * L].view(B, L, -1, N, x.shape[1] // N)  # (B, L, 2 or 3, N, H)
        *own, k, v = (part.transpose(1, 2) for part in split.unbind(2))  # (B, N, L, H)
        if self.queries is not None:
            x = x[batch.firsts]  # (B', D)
            own = [self.queries(x)[:B].view(B, N, 1, -1)]  # (B, N, 1, H)
            places = torch.arange(len(x)).clamp(max=B - 1)
        mixed = F.scaled_dot_product_attention(own[0], k, v, attn_mask=batch.mask).transpose(1, 2)
        mixed = mixed.reshape(-1, x.shape[1]).index_select(0, places)  # (T', D), in the last layer (B', D)
        x = normalise(self.norms[0], self.out(mixed) + x)
        return normalise(self.norms[1], self.down(self.up(x)) + x)


class PackedLinear:
    """A linear layer, and an activation after it. Packed, its weight is laid out once as oneDNN wants it."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str | None, packs: bool) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS) if packs else weight
        self.bias, self.activation, self.packs = bias, activation, packs

    def __call__(self, x: Tensor) -> Tensor:
        if self.packs:
            name, algorithm = _FUSED[self.activation]
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
            return out
        out = F.linear(x, self.weight, self.bias)
        return ACTIVATIONS[self.activation](out) if self.activation else out

    def __reduce__(self) -> tuple[object, ...]:  # the reordered weight can be neither copied nor pickled
        weight = self.weight.to_dense() if self.packs else self.weight
        return type(self), (weight, self.bias, self.activation, self.packs)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, which are private, for weights of `dtype`.

    If so packing was faster, for every size of layer and of batch that was measured.
    """
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        PackedLinear(ones, ones[0], None, packs=True)(ones)
    except (AttributeError, RuntimeError):
        return False
    return True


class _Batch(NamedTuple):
    """Where the tokens of a batch stand."""

    num_rows: int
    length: int
    num_tokens: int
    places: Tensor  # (T',) among B × L; from T on zeros
    firsts: Tensor  # (B',) of each row's [CLS] among the T tokens; from B on zeros
    mask: Tensor | None  # (B, 1, 1, L)


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


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Statistics in float32 whatever the type of `x`."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
