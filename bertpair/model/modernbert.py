"""ModernBERT (Warner et al., 2024), the network of mmBERT (Marone et al., 2025).

Beside `bert.py`: rotary positions (Su et al., 2021), norms before the maps, GeGLU, mostly local attention.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from bertpair.model.bert import ACTIVATIONS, BertConfig, Share
from bertpair.model.family import Family
from bertpair.model.pooling import Pooling, pool
from bertpair.settings.fields import Finite, Switch, Whole, said

Kind = Literal["full_attention", "sliding_attention"]


class Rope(BaseModel, frozen=True, extra="forbid"):
    """The rotations of one kind of layer."""

    rope_type: Literal["default"] = "default"
    rope_theta: Finite | None = Field(None, gt=0)  # their base


class ModernBertConfig(BertConfig):
    """What config.json says, with transformers' defaults."""

    vocab_size: Whole = Field(50368, ge=1, le=10_000_000)
    num_hidden_layers: Whole = Field(22, ge=1, le=1_000)
    intermediate_size: Whole = Field(1152, ge=1, le=1_000_000)
    hidden_act: Literal["gelu", "gelu_new", "relu"] = Field("gelu", alias="hidden_activation")
    hidden_dropout_prob: Share = Field(0.0, alias="mlp_dropout")
    attention_probs_dropout_prob: Share = Field(0.0, alias="attention_dropout")
    embedding_dropout: Share = 0.0
    max_position_embeddings: Whole = Field(8192, ge=1, le=1_000_000)
    layer_norm_eps: Finite = Field(1e-5, gt=0, le=1, alias="norm_eps")
    norm_bias: Switch = False
    attention_bias: Switch = False
    mlp_bias: Switch = False
    pad_token_id: Whole | None = Field(50283, ge=0, le=10_000_000)
    layer_types: Annotated[list[Kind], said("a kind of attention for each layer")] | None = None
    global_attn_every_n_layers: Whole = Field(3, ge=1, le=1_000)  # for a file without layer_types
    local_attention: Whole = Field(128, ge=2, le=1_000_000)  # tokens, half of them on each side
    rope_parameters: Annotated[dict[Kind, Rope], said("rope_theta by kind of layer")] | None = None
    global_rope_theta: Finite = Field(160_000.0, gt=0)  # for a file without rope_parameters
    local_rope_theta: Finite | None = Field(10_000.0, gt=0)  # None: the global one
    rope_scaling: None = None
    pooling: Pooling = Field("cls", alias="classifier_pooling")
    classifier_dropout: Share = 0.0
    classifier_bias: Switch = False
    classifier_activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    type_vocab_size: Whole = Field(1, exclude=True)  # its config.json knows no such name

    @property
    def kinds(self) -> list[Kind]:
        """What each layer looks at."""
        every, kinds = self.global_attn_every_n_layers, range(self.num_hidden_layers)
        return self.layer_types or ["sliding_attention" if i % every else "full_attention" for i in kinds]

    def theta(self, kind: Kind) -> float:
        """The base of this kind's rotations."""
        local = self.local_rope_theta if kind == "sliding_attention" else None
        return (self.rope_parameters or {}).get(kind, Rope()).rope_theta or local or self.global_rope_theta


def faults_of(config: ModernBertConfig) -> Iterator[str]:
    """What fields that are sound one by one cannot be together."""
    if (size := config.hidden_size // config.num_attention_heads) % 2:
        yield f"num_attention_heads: expected heads of an even size, found heads of size {size}"
    if len(kinds := config.kinds) != config.num_hidden_layers:
        yield f"layer_types: expected one for each of {config.num_hidden_layers} layers, found {len(kinds)}"


def norm_of(config: ModernBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    """Word vectors, normalised."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.norm = norm_of(config)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(self.words(input_ids)))  # (B, L, D)
        return out


class Layer(nn.Module):
    """Attention and a gated map, each of its normalised input, and added to it."""

    def __init__(self, config: ModernBertConfig, is_first: bool) -> None:
        super().__init__()
        D, self.num_heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = nn.Identity() if is_first else norm_of(config)
        self.qkv = nn.Linear(D, 3 * D, bias=config.attention_bias)
        self.out = nn.Linear(D, D, bias=config.attention_bias)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.mlp_norm = norm_of(config)
        self.up = nn.Linear(D, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, D, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        split = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, N, H)
        (a, b), cos, sin = split[:, :, :2].chunk(2, dim=-1), angles.cos(), angles.sin()
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(split.dtype)  # (B, L, 2, N, H)
        q, k, v = (each.transpose(1, 2) for each in (*turned.unbind(2), split[:, :, 2]))  # (B, N, L, H)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, self.attention_dropout.p * self.training)
        x = x + self.attention_dropout(self.out(mixed.transpose(1, 2).flatten(2)))  # (B, L, D)
        hidden, gate = self.up(self.mlp_norm(x)).chunk(2, dim=-1)  # (B, L, F)
        out: Tensor = x + self.down(self.dropout(self.activation(hidden) * gate))  # (B, L, D)
        return out


class ModernBertClassifier(nn.Module):
    """Arguments and result as `BertClassifier`'s; token types are ignored."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config, i == 0) for i in range(config.num_hidden_layers)])
        self.final_norm = norm_of(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.activation = ACTIVATIONS[config.classifier_activation]
        self.norm = norm_of(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        init_modernbert(self, "")

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits, (B, C)."""
        config, L = self.config, input_ids.shape[1]
        H = config.hidden_size // config.num_attention_heads
        at, even = (torch.arange(*n, device=input_ids.device) for n in ((L,), (0, H, 2)))
        positions, exponents = at[:, None, None, None], even / H
        is_token = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        is_near = (at[:, None] - at).abs() <= config.local_attention // 2  # (L, L)
        if is_token is not None:  # padding looks at all tokens: with none in sight, some kernels give NaN
            is_near = (is_near | ~is_token.transpose(2, 3)) & is_token  # (B, 1, L, L)
        x = self.embeddings(input_ids)  # (B, L, D)
        for layer, kind in zip(self.layers, config.kinds, strict=True):
            mask = is_token if kind == "full_attention" else is_near
            x = layer(x, positions / config.theta(kind) ** exponents, mask)  # (B, L, D)
        x = self.activation(self.dense(pool(self.final_norm(x), attention_mask, config.pooling)))  # (B, D)
        logits: Tensor = self.classifier(self.dropout(self.norm(x)))  # (B, C)
        return logits


@torch.no_grad()
def init_modernbert(network: ModernBertClassifier, module: str) -> None:
    """Initialise the part `module`, "" for all: weights from normal distributions cut at two deviations."""
    std, layers = network.config.initializer_range, network.config.num_hidden_layers
    stds = dict.fromkeys(("out", "down", "dense"), std / (2 * layers) ** 0.5)
    stds["classifier"] = network.config.hidden_size**-0.5
    for name, weight in network.get_submodule(module).named_parameters(prefix=module):
        owner, kind = name.split(".")[-2:]
        if kind == "bias" or "norm" in owner:
            weight.fill_(float(kind == "weight"))
        else:  # erfinv turns ±0.9545 into ±2 / √2
            weight.uniform_(-0.9545, 0.9545).erfinv_().mul_(2**0.5 * stds.get(owner, std))


MODERNBERT = Family(
    config=ModernBertConfig,
    network=ModernBertClassifier,
    architecture="ModernBertForSequenceClassification",
    prefix="model.",
    names={
        "embeddings.words": "model.embeddings.tok_embeddings",
        "embeddings.norm": "model.embeddings.norm",
        "layers.*.attention_norm": "model.layers.*.attn_norm",
        "layers.*.qkv": "model.layers.*.attn.Wqkv",
        "layers.*.out": "model.layers.*.attn.Wo",
        "layers.*.mlp_norm": "model.layers.*.mlp_norm",
        "layers.*.up": "model.layers.*.mlp.Wi",
        "layers.*.down": "model.layers.*.mlp.Wo",
        "final_norm": "model.final_norm",
        "dense": "head.dense",
        "norm": "head.norm",
        "classifier": "classifier",
    },
    heads=("dense", "norm", "classifier"),
    ignored=("decoder.",),
    init=init_modernbert,
    faults=faults_of,
    poolings=("cls", "mean"),
    unchecked=frozenset({"position_embedding_type"}),
)
