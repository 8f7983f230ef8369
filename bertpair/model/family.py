"""What the rest of the program must know of a kind of network; and that of BERT, the first of them."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from bertpair.model.bert import BertClassifier, BertConfig, init_module


def init_like_bert(network: Any, module: str) -> None:
    """Initialise the part `module` of `network`, "" for all of it, from torch's global generator."""
    part: nn.Module = network.get_submodule(module)
    init_module(part, network.config.initializer_range)


class Family(NamedTuple):
    """A kind of network: what config.json says of it, the network, and its names at Hugging Face."""

    config: type[BertConfig]
    network: Callable[[Any], Any]  # a `families.Network`, made from its config
    architecture: str  # what transformers calls the classifier
    prefix: str  # of an encoder's names, which a bare encoder leaves out
    names: Mapping[str, str]  # our modules: Hugging Face's; each * is a number
    heads: tuple[str, ...]  # our modules that a checkpoint may lack, and that are new then
    ignored: tuple[str, ...]  # how the names of pretraining weights begin that no classifier needs
    max_length: Callable[[Any], int] = attrgetter("max_position_embeddings")  # tokens, of a config
    init: Callable[[Any, str], None] = init_like_bert
    faults: Callable[[Any], Iterable[str]] = lambda config: ()  # of fields that are sound one by one
    pairs_need_types: bool = False  # else separators alone tell the two texts apart
    poolings: tuple[str, ...] = ("cls",)  # those that transformers computes too
    unchecked: frozenset[str] = frozenset()  # names of config.json that mean nothing here


BERT = Family(
    config=BertConfig,
    network=BertClassifier,
    architecture="BertForSequenceClassification",
    prefix="bert.",
    names={
        "embeddings.words": "bert.embeddings.word_embeddings",
        "embeddings.types": "bert.embeddings.token_type_embeddings",
        "embeddings.positions": "bert.embeddings.position_embeddings",
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "layers.*.attention.query": "bert.encoder.layer.*.attention.self.query",
        "layers.*.attention.key": "bert.encoder.layer.*.attention.self.key",
        "layers.*.attention.value": "bert.encoder.layer.*.attention.self.value",
        "layers.*.attention.out": "bert.encoder.layer.*.attention.output.dense",
        "layers.*.attention_norm": "bert.encoder.layer.*.attention.output.LayerNorm",
        "layers.*.up": "bert.encoder.layer.*.intermediate.dense",
        "layers.*.down": "bert.encoder.layer.*.output.dense",
        "layers.*.output_norm": "bert.encoder.layer.*.output.LayerNorm",
        "pooler": "bert.pooler.dense",
        "classifier": "classifier",
    },
    heads=("pooler", "classifier"),
    ignored=("cls.",),
    pairs_need_types=True,
)
