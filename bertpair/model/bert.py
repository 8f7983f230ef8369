"""The whole network: BERT's embeddings, encoder and pooler over [CLS] (Devlin et al., 2018), a classifier.

Shapes: B batch, L length, Q positions that are computed (L, in the last layer 1), D hidden size, N heads,
H = D / N head size, F intermediate size, C classes (1: regression).

The head reads [CLS] only, so `forward` computes the last layer for that one position (unless tokens are
pooled in another way): all positions are still looked at, and nothing is approximated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bertpair.model.pooling import Pooling, pool, positions_read
from bertpair.settings.fields import Finite, Group, Whole

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
Share = Annotated[Finite, Field(ge=0.0, lt=1)]


class BertConfig(Group):
    """What shapes the network: the names of config.json, what each may hold, and transformers' defaults.

    Beyond the upper bounds lies a damaged file, not a larger BERT.
    """

    vocab_size: Whole = Field(30522, ge=1, le=10_000_000)
    hidden_size: Whole = Field(768, ge=1, le=65_536)
    num_hidden_layers: Whole = Field(12, ge=1, le=1_000)
    num_attention_heads: Whole = Field(12, ge=1, le=65_536)
    intermediate_size: Whole = Field(3072, ge=1, le=1_000_000)
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu"
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    max_position_embeddings: Whole = Field(512, ge=1, le=1_000_000)
    type_vocab_size: Whole = Field(2, ge=1, le=1_000_000)
    initializer_range: Finite = Field(0.02, gt=0, le=1)
    layer_norm_eps: Finite = Field(1e-12, gt=0, le=1)
    pad_token_id: Whole | None = Field(0, ge=0, le=10_000_000)  # a row that starts at zero and stays there
    classifier_dropout: Share | None = None  # None: hidden_dropout_prob
    num_labels: Whole = Field(2, ge=1, le=1_000_000)  # C
    pooling: Pooling = Field("cls", exclude=True)  # not one of config.json's names


class Embeddings(nn.Module):
    """Word, token type and position vectors, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        types = self.types.weight[0] if token_type_ids is None else self.types(token_type_ids)
        x = self.words(input_ids) + types + self.positions.weight[: input_ids.shape[1]]  # (B, L, D)
        out: Tensor = self.dropout(self.norm(x))
        return out


class Attention(nn.Module):
    """Multi-head attention: each row of `x` looks at the rows of `context` that `mask` leaves visible."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, Q or L, H)
            for each in (self.query(x), self.key(context), self.value(context))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, N, Q, H)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # (B, Q, D)
        return out


class Layer(nn.Module):
    """One encoder layer: attention, then two linear maps, each added to its input and normalised after."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(D, eps=eps)
        self.up = nn.Linear(D, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps=eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x, context, mask)) + x)  # (B, Q, D)
        hidden = self.activation(self.up(x))  # (B, Q, F)
        out: Tensor = self.output_norm(self.dropout(self.down(hidden)) + x)  # (B, Q, D)
        return out


class BertClassifier(nn.Module):
    """BERT with a classifier over [CLS]; freshly made, it is initialised as BERT is.

    `input_ids` and `token_type_ids` (None: all 0) are int64 (B, L), `attention_mask` is bool (B, L), true
    where there is a token. None means that no row is padded, which spares the attention its mask.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        dropout = config.classifier_dropout
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.pooler = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(D, config.num_labels)
        init_module(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, C)."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        x = self.embeddings(input_ids, token_type_ids)  # (B, L, D)
        *body, last = self.layers
        for layer in body:
            x = layer(x, x, mask)  # (B, L, D)
        x = last(positions_read(x, self.config.pooling), x, mask)  # (B, Q, D)
        pooled = torch.tanh(self.pooler(pool(x, attention_mask, self.config.pooling)))  # (B, D)
        logits: Tensor = self.classifier(self.dropout(pooled))  # (B, C)
        return logits


@torch.no_grad()
def init_module(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Initialise `module` as BERT is: weights from N(0, std), biases and the padding row 0, norms 1."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std, generator=generator)
            part.bias.zero_()
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, std, generator=generator)
            if part.padding_idx is not None:
                part.weight[part.padding_idx].zero_()
