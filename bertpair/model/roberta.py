"""RoBERTa (Liu et al., 2019), XLM-RoBERTa (Conneau et al., 2020) and CamemBERT (Martin et al., 2020).

BERT's layers. What differs: positions are counted from pad_token_id + 1, so that a table of 514 rows is for
512 tokens; most have one token type, and pairs are told apart by separators; the head drops, maps and drops
again before its tanh and classifier. Shapes as in `bert.py`.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from bertpair.model.bert import BertConfig, Layer, init_module
from bertpair.model.family import BERT, Family
from bertpair.model.pooling import pool, positions_read
from bertpair.settings.fields import Whole


class RobertaConfig(BertConfig):
    """BERT's fields with transformers' defaults for RoBERTa."""

    vocab_size: Whole = Field(50265, ge=1, le=10_000_000)
    max_position_embeddings: Whole = Field(512, ge=3, le=1_000_000)
    pad_token_id: Whole = Field(1, ge=0, le=10_000_000)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row: the positions up to the padding's are never used."""
        return self.max_position_embeddings - self.pad_token_id - 1


class XlmRobertaConfig(RobertaConfig):
    """The same, of XLM-RoBERTa and CamemBERT: another size is meant where none is given."""

    vocab_size: Whole = Field(30522, ge=1, le=10_000_000)


class Embeddings(nn.Module):
    """Word, token type and position vectors, summed and normalised; the padding's position is not used."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        D, padding = config.hidden_size, config.pad_token_id
        self.words = nn.Embedding(config.vocab_size, D, padding_idx=padding)
        self.types = nn.Embedding(config.type_vocab_size, D)
        self.positions = nn.Embedding(config.max_position_embeddings, D, padding_idx=padding)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.first = padding + 1

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        has_types = token_type_ids is not None and len(self.types.weight) > 1
        types = self.types(token_type_ids) if has_types else self.types.weight[0]
        # Rows are padded at their end: tokens have the same positions in all of them.
        positions = self.positions.weight[self.first : self.first + input_ids.shape[1]]  # (L, D)
        out: Tensor = self.dropout(self.norm(self.words(input_ids) + types + positions))
        return out  # (B, L, D)


class RobertaClassifier(nn.Module):
    """Arguments and result as `BertClassifier`'s; token types are ignored where the network has one."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.config = config
        D, dropout = config.hidden_size, config.classifier_dropout
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.dense = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(D, config.num_labels)
        init_module(self, config.initializer_range)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, C)."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        pooling = self.config.pooling
        x = self.embeddings(input_ids, token_type_ids)  # (B, L, D)
        *body, last = self.layers
        for layer in body:
            x = layer(x, x, mask)  # (B, L, D)
        x = last(positions_read(x, pooling), x, mask)  # (B, Q, D)
        x = self.dropout(pool(x, attention_mask, pooling))  # (B, D)
        logits: Tensor = self.classifier(self.dropout(torch.tanh(self.dense(x))))  # (B, C)
        return logits


ROBERTA = Family(
    config=RobertaConfig,
    network=RobertaClassifier,
    architecture="RobertaForSequenceClassification",
    prefix="roberta.",
    names={
        **{ours: name.replace("bert", "roberta", 1) for ours, name in BERT.names.items() if ours != "pooler"},
        "dense": "classifier.dense",
        "classifier": "classifier.out_proj",
    },
    heads=("dense", "classifier"),
    ignored=("lm_head.", "roberta.pooler."),
    max_length=lambda config: config.max_length,
)
XLM_ROBERTA = ROBERTA._replace(config=XlmRobertaConfig, architecture="XLMRobertaForSequenceClassification")
CAMEMBERT = XLM_ROBERTA._replace(architecture="CamembertForSequenceClassification")
