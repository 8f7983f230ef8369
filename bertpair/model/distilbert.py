"""DistilBERT (Sanh et al., 2019): half of BERT's layers, no token types, no pooler.

What differs from `bert.py`: separators alone tell the texts of a pair apart; nothing is dropped after the
attention's last map; the head is a map with ReLU before the classifier. Shapes as in `bert.py`.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bertpair.model.bert import BertConfig, Layer, Share, init_module
from bertpair.model.family import Family
from bertpair.model.pooling import pool, positions_read
from bertpair.settings.fields import Finite, Switch, Whole


class DistilBertConfig(BertConfig):
    """BERT's fields under DistilBERT's names, with transformers' defaults."""

    hidden_size: Whole = Field(768, ge=1, le=65_536, alias="dim")
    num_hidden_layers: Whole = Field(6, ge=1, le=1_000, alias="n_layers")
    num_attention_heads: Whole = Field(12, ge=1, le=65_536, alias="n_heads")
    intermediate_size: Whole = Field(3072, ge=1, le=1_000_000, alias="hidden_dim")
    hidden_act: Literal["gelu", "gelu_new", "relu"] = Field("gelu", alias="activation")
    hidden_dropout_prob: Share = Field(0.1, alias="dropout")
    attention_probs_dropout_prob: Share = Field(0.1, alias="attention_dropout")
    classifier_dropout: Share = Field(0.2, alias="seq_classif_dropout")
    sinusoidal_pos_embds: Switch = False  # what the positions of a fresh network are
    type_vocab_size: Whole = Field(1, exclude=True)  # its config.json knows no names for these two
    layer_norm_eps: Finite = Field(1e-12, exclude=True)


class Embeddings(nn.Module):
    """Word and position vectors, summed and normalised."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        out: Tensor = self.dropout(self.norm(x))  # (B, L, D)
        return out


class DistilBertLayer(Layer):
    """BERT's encoder layer with a single dropout, after the second linear map."""

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(self.attention(x, context, mask) + x)  # (B, Q, D)
        hidden = self.activation(self.up(x))  # (B, Q, F)
        out: Tensor = self.output_norm(self.dropout(self.down(hidden)) + x)  # (B, Q, D)
        return out


class DistilBertClassifier(nn.Module):
    """Arguments and result as `BertClassifier`'s; token types are ignored."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([DistilBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.pre_classifier = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(D, config.num_labels)
        init_module(self, config.initializer_range)
        if config.sinusoidal_pos_embds:
            with torch.no_grad():
                self.embeddings.positions.weight.copy_(sinusoids(config.max_position_embeddings, D))

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, C)."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        pooling = self.config.pooling
        x = self.embeddings(input_ids)  # (B, L, D)
        *body, last = self.layers
        for layer in body:
            x = layer(x, x, mask)  # (B, L, D)
        x = last(positions_read(x, pooling), x, mask)  # (B, Q, D)
        x = torch.relu(self.pre_classifier(pool(x, attention_mask, pooling)))  # (B, D)
        logits: Tensor = self.classifier(self.dropout(x))  # (B, C)
        return logits


def sinusoids(num_positions: int, size: int) -> Tensor:
    """The fixed positions of "Attention Is All You Need", (num_positions, size): sines, cosines between."""
    columns = torch.arange(size)
    rates = 10_000.0 ** (-2 * (columns // 2).double() / size)
    angles = torch.arange(num_positions)[:, None] * rates  # (num_positions, size)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos())


DISTILBERT = Family(
    config=DistilBertConfig,
    network=DistilBertClassifier,
    architecture="DistilBertForSequenceClassification",
    prefix="distilbert.",
    names={
        "embeddings.words": "distilbert.embeddings.word_embeddings",
        "embeddings.positions": "distilbert.embeddings.position_embeddings",
        "embeddings.norm": "distilbert.embeddings.LayerNorm",
        "layers.*.attention.query": "distilbert.transformer.layer.*.attention.q_lin",
        "layers.*.attention.key": "distilbert.transformer.layer.*.attention.k_lin",
        "layers.*.attention.value": "distilbert.transformer.layer.*.attention.v_lin",
        "layers.*.attention.out": "distilbert.transformer.layer.*.attention.out_lin",
        "layers.*.attention_norm": "distilbert.transformer.layer.*.sa_layer_norm",
        "layers.*.up": "distilbert.transformer.layer.*.ffn.lin1",
        "layers.*.down": "distilbert.transformer.layer.*.ffn.lin2",
        "layers.*.output_norm": "distilbert.transformer.layer.*.output_layer_norm",
        "pre_classifier": "pre_classifier",
        "classifier": "classifier",
    },
    heads=("pre_classifier", "classifier"),
    ignored=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
