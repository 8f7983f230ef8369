"""ALBERT (Lan et al., 2020): BERT with narrow word vectors and layers that share their weights.

What differs from `bert.py`: vectors of size E are mapped to D before the first layer; the layers are runs
through `num_hidden_groups` groups of `inner_group_num` layers each; nothing is dropped after a layer's last
map. Shapes as in `bert.py`.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bertpair.model.bert import BertConfig, Embeddings, Layer, Share, init_module
from bertpair.model.family import Family
from bertpair.model.pooling import pool, positions_read
from bertpair.settings.fields import Whole


class AlbertConfig(BertConfig):
    """BERT's fields and ALBERT's own, with transformers' defaults."""

    vocab_size: Whole = Field(30000, ge=1, le=10_000_000)
    embedding_size: Whole = Field(128, ge=1, le=65_536)  # E
    hidden_size: Whole = Field(4096, ge=1, le=65_536)
    num_hidden_groups: Whole = Field(1, ge=1, le=1_000)
    inner_group_num: Whole = Field(1, ge=1, le=1_000)
    num_attention_heads: Whole = Field(64, ge=1, le=65_536)
    intermediate_size: Whole = Field(16384, ge=1, le=1_000_000)
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu_new"
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    classifier_dropout: Share = Field(0.1, alias="classifier_dropout_prob")


class AlbertLayer(Layer):
    """BERT's encoder layer with a single dropout, after the attention."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x, context, mask)) + x)  # (B, Q, D)
        hidden = self.activation(self.up(x))  # (B, Q, F)
        out: Tensor = self.output_norm(self.down(hidden) + x)  # (B, Q, D)
        return out


class AlbertClassifier(nn.Module):
    """Arguments and result as `BertClassifier`'s."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.config = config
        D, E, num_inner = config.hidden_size, config.embedding_size, config.inner_group_num
        self.embeddings = Embeddings(config.model_copy(update={"hidden_size": E}))
        self.map_in = nn.Linear(E, D)
        self.groups = nn.ModuleList(
            [
                nn.ModuleList([AlbertLayer(config) for _ in range(num_inner)])
                for _ in range(config.num_hidden_groups)
            ]
        )
        self.pooler = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(D, config.num_labels)
        init_module(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, C)."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        pooling = self.config.pooling
        x = self.map_in(self.embeddings(input_ids, token_type_ids))  # (B, L, D)
        *body, last = self.layers()
        for layer in body:
            x = layer(x, x, mask)  # (B, L, D)
        x = last(positions_read(x, pooling), x, mask)  # (B, Q, D)
        pooled = torch.tanh(self.pooler(pool(x, attention_mask, pooling)))  # (B, D)
        logits: Tensor = self.classifier(self.dropout(pooled))  # (B, C)
        return logits

    def layers(self) -> list[nn.Module]:
        """The layers in the order they run: each run of a group is all of its layers."""
        runs, groups = self.config.num_hidden_layers, list(self.groups)
        return [layer for run in range(runs) for layer in groups[int(run / (runs / len(groups)))]]  # type: ignore


_LAYER = "albert.encoder.albert_layer_groups.*.albert_layers.*."
ALBERT = Family(
    config=AlbertConfig,
    network=AlbertClassifier,
    architecture="AlbertForSequenceClassification",
    prefix="albert.",
    names={
        "embeddings.words": "albert.embeddings.word_embeddings",
        "embeddings.types": "albert.embeddings.token_type_embeddings",
        "embeddings.positions": "albert.embeddings.position_embeddings",
        "embeddings.norm": "albert.embeddings.LayerNorm",
        "map_in": "albert.encoder.embedding_hidden_mapping_in",
        "groups.*.*.attention.query": _LAYER + "attention.query",
        "groups.*.*.attention.key": _LAYER + "attention.key",
        "groups.*.*.attention.value": _LAYER + "attention.value",
        "groups.*.*.attention.out": _LAYER + "attention.dense",
        "groups.*.*.attention_norm": _LAYER + "attention.LayerNorm",
        "groups.*.*.up": _LAYER + "ffn",
        "groups.*.*.down": _LAYER + "ffn_output",
        "groups.*.*.output_norm": _LAYER + "full_layer_layer_norm",
        "pooler": "albert.pooler",
        "classifier": "classifier",
    },
    heads=("pooler", "classifier"),
    ignored=("predictions.", "sop_classifier."),
    pairs_need_types=True,
)
