"""Writes the embedded sample (train.tsv, dev.tsv, tiny-bert/) from glossary.tsv: the same bytes each time.

A row's label is the relation between the concepts its two texts talk about: the same ones are positive, some of
them neutral, none negative. Every share below is chosen so that either text alone looks alike under all labels:
the label has to be read off the pair. Right answers mostly change the wording, wrong ones mostly keep it.
"""

import argparse
import json
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SEED = 20
NUM_TRAIN, NUM_DEV = 12_000, 1_500
MAX_PAIR_TOKENS = 37  # 40 with [CLS] and two [SEP]
VOCAB_SIZE = 4_000
T = TypeVar("T")
TOP = "-"  # the group of a concept that is itself a group

LABELS = {"positive": 0.37, "negative": 0.33, "neutral": 0.30}
# How often a label comes with (items in the reference, items in the given answer): for each label, 45 % of the
# references and 45 % of the given answers have one item.
SHAPES = {
    "positive": {(1, 1): 0.45, (2, 2): 0.55},
    "neutral": {(1, 1): 0.14, (1, 2): 0.31, (2, 1): 0.31, (2, 2): 0.24},
    "negative": {(1, 1): 0.25, (1, 2): 0.20, (2, 1): 0.20, (2, 2): 0.35},
}
VAGUE = {"positive": 0.31, "neutral": 1.0, "negative": 0.56}  # of (1, 1): the given answer names a group
ORDERED = 0.10  # of all rows: "the former …, the latter …", where the order counts
# Wording of reference and given answer, n(ame) or d(efinition). One item: half and half; two: 3/4 names.
WORDINGS = {
    (1, 1): {
        "positive": {"nn": 0.2, "nd": 0.3, "dn": 0.3, "dd": 0.2},
        "neutral": {"nn": 0.25, "nd": 0.25, "dn": 0.25, "dd": 0.25},
        "negative": {"nn": 0.33, "nd": 0.17, "dn": 0.17, "dd": 0.33},
    },
    (2, 2): {
        "positive": {"nn": 0.50, "nd": 0.25, "dn": 0.25},
        "neutral": {"nn": 0.60, "nd": 0.15, "dn": 0.15, "dd": 0.10},
        "negative": {"nn": 0.68, "nd": 0.07, "dn": 0.07, "dd": 0.18},
    },
}
MIXED = {
    (1, 2): {"nn": 0.40, "nd": 0.10, "dn": 0.35, "dd": 0.15},
    (2, 1): {"nn": 0.40, "nd": 0.35, "dn": 0.10, "dd": 0.15},
}
REFERENCE_FORMS = {"plain": 0.45, "fact": 0.3, "both": 0.25}
GIVEN_FORMS = {"plain": 0.85, "fact": 0.05, "both": 0.10}
ECHO = (
    0.3  # of the answers to a reference that is a fact: the same sentence with the student's own word in it
)

FILLERS = (
    "应该是",
    "我觉得是",
    "好像是",
    "就是",
    "是",
    "大概是",
    "答:",
    "嗯,",
    "可能是",
    "记得是",
    "叫",
    "指",
)
TAILS = ("吧", "。", "吧。", "。", "...", "了", "?", "。", "!", "。")
SYNONYMS = {
    "不能": "无法", "每次": "每一次", "其余": "剩下的", "两个": "2个", "三个": "3个", "不用": "不需要", "马上": "立刻",
    "只能": "只可以", "一个": "1个", "没有": "没", "多个": "好几个", "必须": "一定要", "再": "然后", "和": "跟",
}  # fmt: skip
GROUP_PHRASES = ("{}", "属于{}", "一种{}", "{}的一种", "{}里的")
BOTH_PHRASES = ("{}:{}", "{},{}", "{}({})", "{},即{}", "{}——{}")
ORDINALS = (("前者", "后者"), ("第一个", "第二个"), ("前一个", "后一个"), ("(1)", "(2)"))
NAME_JOINERS = ("和", "、", "与", ",", "以及", "和", "、")
DEFINITION_JOINERS = (";", ";", ",另一个", ",", "、")

TINY_BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Concept:
    area: str
    group: str
    name: str
    names: tuple[str, ...]
    definitions: tuple[str, ...]
    facts: tuple[str, ...]  # true sentences with {} where the name goes
    confused_with: str


@dataclass(frozen=True)
class Row:
    reference: str
    given: str
    label: str

    @property
    def key(self) -> tuple[str, str]:
        return fold(self.reference), fold(self.given)


def fold(text: str) -> str:
    """The text without case, width, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC")


def read_glossary(path: Path) -> list[Concept]:
    concepts = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        area, group, name, english, short, also, definitions, facts, confused_with = line.split("\t")
        names = (name, *split(english), *split(short), *split(also))
        concepts.append(Concept(area, group, name, names, split(definitions), split(facts), confused_with))
    return concepts


def split(cell: str) -> tuple[str, ...]:
    return tuple(part for part in cell.split(" | ") if part)


def num_tokens(text: str) -> int:
    """About what WordPiece makes of it: a Chinese character or a sign each, a word by its length."""
    words = re.findall(r"[A-Za-z0-9]+", text)
    return len(re.sub(r"[A-Za-z0-9\s]", "", text)) + sum(1 + (len(word) - 1) // 8 for word in words)


class Author:
    """Invents rows; every choice comes from one random stream."""

    def __init__(self, concepts: Sequence[Concept], seed: int) -> None:
        self.random = random.Random(seed)
        self.by_name = {concept.name: concept for concept in concepts}
        self.groups = [c for c in concepts if c.group == TOP]
        self.leaves = [c for c in concepts if c.group != TOP]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, shares: dict[T, float]) -> T:
        return self.random.choices(list(shares), weights=list(shares.values()))[0]

    def row(self) -> Row:
        while True:
            label = self.pick(LABELS)
            row = self.ordered_row(label) if self.chance(ORDERED) else self.plain_row(label)
            if num_tokens(row.reference) + num_tokens(row.given) <= MAX_PAIR_TOKENS and all(row.key):
                return row

    def plain_row(self, label: str) -> Row:
        shape = self.pick(SHAPES[label])
        reference, given = self.plan(label, shape)
        wording = self.pick(WORDINGS[shape][label] if shape in WORDINGS else MIXED[shape])
        variant = self.random.randrange(12)
        form = self.pick(REFERENCE_FORMS) if len(reference) == 1 else "plain"
        shift = 0 if label == "negative" else self.random.choice((0, 1, 1, 2))
        if form == "fact" and reference[0].facts and len(given) == 1 and self.chance(ECHO):
            sentence = self.random.choice(reference[0].facts)
            texts = [
                fill(sentence, name_of(c, v))
                for c, v in ((reference[0], variant + shift), (given[0], variant))
            ]
            return Row(self.print(texts[0]), self.scribble(texts[1]), label)
        answer = self.say(given, wording[1], variant, self.pick(GIVEN_FORMS))
        return Row(
            self.print(self.say(reference, wording[0], variant + shift, form)), self.scribble(answer), label
        )

    def ordered_row(self, label: str) -> Row:
        given = [self.random.choice(self.leaves)]
        given.append(self.mistake(given[0], given))
        reference = given[:]
        if label == "neutral":
            wrong = self.random.randrange(2)
            reference[wrong] = self.mistake(given[wrong], given)
        elif label == "negative":
            reference = given[::-1]
        wording = self.pick(WORDINGS[2, 2]["neutral"])
        variant = self.random.randrange(12)
        texts = []
        for concepts, kind in zip((reference, given), wording, strict=True):
            first, second = self.random.choice(ORDINALS)
            texts.append(
                f"{first}{self.item(concepts[0], kind, variant)},{second}{self.item(concepts[1], kind, variant)}"
            )
        return Row(self.print(texts[0]), self.scribble(texts[1]), label)

    # What the two texts are about.

    def plan(self, label: str, shape: tuple[int, int]) -> tuple[list[Concept], list[Concept]]:
        """The concepts of the reference and those of the given answer."""
        if shape == (1, 1) and self.chance(VAGUE[label]):
            return self.plan_group(label)
        given = [self.random.choice(self.leaves)]
        if shape[1] == 2:
            given.append(self.mistake(given[0], given))
        if label == "positive":
            return self.random.sample(given, len(given)), given
        reference = [self.random.choice(given) if label == "neutral" else self.mistake(given[0], given)]
        if shape[0] == 2:
            reference.append(self.mistake(reference[0], [*given, *reference]))
        return self.random.sample(reference, len(reference)), given

    def plan_group(self, label: str) -> tuple[list[Concept], list[Concept]]:
        """The given answer only names a group: right where the group is asked for, too vague for a member."""
        group = self.random.choice(self.groups)
        members = [c for c in self.leaves if c.group == group.name]
        if label == "positive":
            return [group], [group]
        if label == "neutral":
            return [self.random.choice(members)], [group]
        other = self.mistake(group, [group])
        return [self.random.choice([other, *(c for c in self.leaves if c.group == other.name)])], [group]

    def mistake(self, concept: Concept, taken: Sequence[Concept]) -> Concept:
        """What a student may take this concept for: the confusable one, another of its group, or of its area."""
        confused = self.by_name.get(concept.confused_with)
        if confused and confused not in taken and self.chance(0.5):
            return confused
        kin = self.groups if concept.group == TOP else self.leaves
        area = [c for c in kin if c.area == concept.area and c not in taken]
        near = [c for c in area if c.group == concept.group]
        return self.random.choice(near if near and not self.chance(0.1) else area or kin)

    # How they say it.

    def say(self, concepts: Sequence[Concept], kind: str, variant: int, form: str) -> str:
        if len(concepts) == 2:
            joiner = self.random.choice(NAME_JOINERS if kind == "n" else DEFINITION_JOINERS)
            return joiner.join(self.item(c, kind, variant) for c in concepts)
        concept = concepts[0]
        if form == "both":
            return self.random.choice(BOTH_PHRASES).format(
                name_of(concept, variant), self.item(concept, "d", variant)
            )
        if form == "fact" and concept.facts and kind == "n":
            return fill(self.random.choice(concept.facts), name_of(concept, variant))
        if concept.group == TOP and kind == "n":
            return self.random.choice(GROUP_PHRASES).format(name_of(concept, variant))
        return self.item(concept, kind, variant)

    def item(self, concept: Concept, kind: str, variant: int) -> str:
        return (
            name_of(concept, variant)
            if kind == "n"
            else concept.definitions[variant % len(concept.definitions)]
        )

    def print(self, text: str) -> str:
        """A reference as a teacher types it: punctuation of either width."""
        if self.chance(0.35):
            text = text.translate(HALF_WIDTH)
        return text + self.random.choice(("", "", "。", "。", "."))

    def scribble(self, text: str) -> str:
        """The same words as a student types them."""
        for word in sorted(w for w in SYNONYMS if w in text):
            if self.chance(0.25):
                text = text.replace(word, SYNONYMS[word], 1)
        if self.chance(0.5):
            text = self.random.choice((str.lower, str.lower, str.upper, str.title))(text)
        if self.chance(0.5):
            text = text.translate(self.random.choice((HALF_WIDTH, SPACES, NOTHING, COMMAS)))
        if self.chance(0.3):
            text = re.sub(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])", "", text)
        if self.chance(0.3):
            text = self.random.choice(FILLERS) + text
        return text + (self.random.choice(TAILS) if self.chance(0.45) else "")


def name_of(concept: Concept, variant: int) -> str:
    return concept.names[variant % len(concept.names)]


def fill(sentence: str, name: str) -> str:
    return sentence.replace("{}", f" {name} " if name.isascii() else name).strip()


HALF_WIDTH = str.maketrans({",": ", ", "。": ".", "、": ",", ":": ": ", ";": "; ", "(": "(", ")": ")"})
SPACES = str.maketrans({",": " ", "、": " ", ";": " "})
NOTHING = str.maketrans({",": "", ":": "", ";": ""})
COMMAS = str.maketrans({"、": ",", ";": ","})


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = ["index\tsentence1\tsentence2\tlabel"]
    lines += [f"{i}\t{row.reference}\t{row.given}\t{row.label}" for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def train_vocabulary(rows: Sequence[Row]) -> list[str]:
    """A lower-cased WordPiece vocabulary, in id order."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in rows for text in (row.reference, row.given)), trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def generate(folder: Path) -> None:
    author = Author(read_glossary(HERE / "glossary.tsv"), SEED)
    rows: dict[tuple[str, str], Row] = {}
    while len(rows) < NUM_TRAIN + NUM_DEV:
        row = author.row()
        rows.setdefault(row.key, row)
    train, dev = list(rows.values())[:NUM_TRAIN], list(rows.values())[NUM_TRAIN:]
    vocabulary = train_vocabulary(train)
    tiny_bert = folder / "tiny-bert"
    tiny_bert.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.tsv", train)
    write_rows(folder / "dev.tsv", dev)
    (tiny_bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8", newline="\n")
    config = json.dumps({**TINY_BERT, "vocab_size": len(vocabulary)}, indent=2)
    (tiny_bert / "config.json").write_text(config + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write train.tsv, dev.tsv and tiny-bert/ from glossary.tsv.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to (default: this one)")
    generate(parser.parse_args().output)
