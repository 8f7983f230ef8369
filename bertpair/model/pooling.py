"""One vector for a row, from the last layer's vectors of its tokens: that of [CLS], their mean or maximum."""

from typing import Literal

from torch import Tensor

Pooling = Literal["cls", "mean", "max"]


def positions_read(x: Tensor, pooling: Pooling) -> Tensor:
    """The positions of `x` (B, L, D) whose vectors `pool` reads: (B, Q, D), Q is 1 for cls, else L."""
    return x[:, :1] if pooling == "cls" else x


def pool(x: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(B, Q, D) → (B, D); padding, where `attention_mask` (B, L) is 0, counts for nothing."""
    if pooling == "cls":
        return x[:, 0]
    if attention_mask is None:
        return x.mean(1) if pooling == "mean" else x.amax(1)
    is_token = attention_mask.bool()[:, :, None]  # (B, L, 1)
    if pooling == "max":
        return x.masked_fill(~is_token, float("-inf")).amax(1)
    return x.masked_fill(~is_token, 0.0).sum(1) / is_token.sum(1)
