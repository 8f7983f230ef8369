"""The kinds of networks that there are, by the `model_type` of config.json."""

from bertpair.model.albert import ALBERT, AlbertClassifier
from bertpair.model.bert import BertClassifier
from bertpair.model.distilbert import DISTILBERT, DistilBertClassifier
from bertpair.model.family import BERT, Family
from bertpair.model.modernbert import MODERNBERT, ModernBertClassifier
from bertpair.model.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA, RobertaClassifier

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
    "distilbert": DISTILBERT,
    "albert": ALBERT,
    "modernbert": MODERNBERT,
}
Network = BertClassifier | RobertaClassifier | DistilBertClassifier | AlbertClassifier | ModernBertClassifier


def family_of(network: Network) -> Family:
    """The family of a network: its names are those of every model_type that has this network."""
    return next(family for family in FAMILIES.values() if family.network is type(network))
