"""Writes the embedded sample (train.tsv, dev.tsv, tiny-bert/) from glossary.tsv: the same bytes each time.

A row's label is the relation between what its two texts talk about: one concept, or one field, on both sides
(positive), a concept and its field (neutral), anything else (negative). Under every label each side names a
field as often, draws from the same concepts and words them alike, so that neither text alone tells the label:
it has to be read off the pair.
"""

import argparse
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

HERE = Path(__file__).resolve().parent
SEED = 20
NUM_TRAIN, NUM_DEV = 12_000, 1_500
MAX_PAIR_TOKENS = 37  # 40 with [CLS] and two [SEP]
VOCAB_SIZE = 2_200
MIN_FREQUENCY = 2
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
T = TypeVar("T")
IS_FIELD = "-"  # stands for the field of a concept that is itself a field

LABELS = {"positive": 0.31, "neutral": 0.31, "negative": 0.38}
# What reference and given answer name, c(oncept) or f(ield): each side half and half under every label.
KINDS = {
    "positive": {"cc": 0.5, "ff": 0.5},
    "neutral": {"cf": 0.5, "fc": 0.5},
    "negative": {"cc": 0.25, "cf": 0.25, "fc": 0.25, "ff": 0.25},
}
# How a concept is worded; of a field, "in field" and "names" mean its name.
REFERENCE_FORMS = {
    "name": 0.05,
    "names": 0.13,
    "definition": 0.06,
    "name and definition": 0.10,
    "fact": 0.04,
    "in field": 0.62,
}
GIVEN_FORMS = {"name": 0.20, "definition": 0.09, "name and definition": 0.05, "fact": 0.04, "in field": 0.62}
NEAR = 0.1  # of the wrong concepts: the one it is confused with, or another of the same field

FILLERS = ("应该是", "我觉得是", "好像是", "就是", "是", "大概是", "答:", "嗯,", "可能是", "记得是")
TAILS = ("吧", "。", "吧。", "。", "...", "?", "。", "!")
SYNONYMS = {
    "不能": "无法", "每次": "每一次", "其余": "剩下的", "两个": "2个", "三个": "3个", "不用": "不需要",
    "马上": "立刻",
    "只能": "只可以", "一个": "1个", "没有": "没", "多个": "好几个", "必须": "一定要", "和": "跟",
}  # fmt: skip
FIELD_PHRASES = ("{}", "属于{}", "一种{}", "{}的一种", "{}里的")
CONTEXT_PHRASES = ("{0},属于{1}", "{1}里的{0}", "{1}:{0}", "{0}({1})", "{0}是{1}概念", "{1}中的{0}")
BOTH_PHRASES = ("{}:{}", "{},{}", "{}({})", "{},即{}", "{}——{}")

TINY_BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "initializer_range": 0.08,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Concept:
    field: str
    names: tuple[str, ...]  # Chinese first
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
    """The letters and digits of a text, without case and width."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())


def read_glossary(path: Path) -> list[Concept]:
    concepts = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        field, name, english, short, also, definitions, facts, confused_with = line.split("\t")
        names = (name, *split(english), *split(short), *split(also))
        concepts.append(Concept(field, names, split(definitions), split(facts), confused_with))
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
        self.by_name = {concept.names[0]: concept for concept in concepts}
        self.concepts = [c for c in concepts if c.field != IS_FIELD]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, shares: dict[T, float]) -> T:
        return self.random.choices(list(shares), weights=list(shares.values()))[0]

    def row(self) -> Row:
        while True:
            label = self.pick(LABELS)
            reference, given = self.plan(label)
            forms = self.pick(REFERENCE_FORMS), self.pick(GIVEN_FORMS)
            row = Row(
                self.print(self.say(reference, forms[0])), self.scribble(self.say(given, forms[1])), label
            )
            if num_tokens(row.reference) + num_tokens(row.given) <= MAX_PAIR_TOKENS and all(row.key):
                return row

    # What the two texts are about.

    def plan(self, label: str) -> tuple[Concept, Concept]:
        """The concept of the reference and that of the given answer."""
        kinds = self.pick(KINDS[label])
        concept = self.random.choice(self.concepts)
        field = self.by_name[concept.field]
        other = concept
        if label == "negative":
            other = self.mistake(concept) if kinds == "cc" else self.stranger(concept)
        other_field = self.by_name[other.field]
        return {
            "cc": (concept, other),
            "cf": (concept, other_field),
            "fc": (other_field, concept),
            "ff": (field, other_field),
        }[kinds]

    def mistake(self, concept: Concept) -> Concept:
        """What a student may take it for."""
        if not self.chance(NEAR):
            return self.stranger(concept)
        confused = self.by_name.get(concept.confused_with)
        if confused and confused.field != IS_FIELD and self.chance(0.5):
            return confused
        return self.random.choice([c for c in self.concepts if c.field == concept.field and c != concept])

    def stranger(self, concept: Concept) -> Concept:
        """A concept of another field."""
        return self.random.choice([c for c in self.concepts if c.field != concept.field])

    # How they say it.

    def say(self, concept: Concept, form: str) -> str:
        name = self.random.choice(concept.names)
        definition = self.random.choice(concept.definitions)
        if form == "in field" and concept.field != IS_FIELD:
            thing = definition if self.chance(0.3) else name
            return self.random.choice(CONTEXT_PHRASES).format(
                thing, self.random.choice(self.by_name[concept.field].names)
            )
        if form == "names":
            others = [other for other in concept.names if other != name]
            return f"{name}({self.random.choice(others)})" if others else name
        if form == "definition":
            return definition
        if form == "name and definition":
            return self.random.choice(BOTH_PHRASES).format(name, definition)
        if form == "fact" and concept.facts:
            return fill(self.random.choice(concept.facts), name)
        return self.random.choice(FIELD_PHRASES).format(name) if concept.field == IS_FIELD else name

    def print(self, text: str) -> str:
        """A reference as a teacher types it: punctuation of either width."""
        text = text.translate(HALF_WIDTH if self.chance(0.35) else FULL_WIDTH)
        return text + self.random.choice(("", "", "。", "。", "."))

    def scribble(self, text: str) -> str:
        """The same words as a student types them."""
        for word in sorted(w for w in SYNONYMS if w in text):
            if self.chance(0.25):
                text = text.replace(word, SYNONYMS[word], 1)
        if self.chance(0.5):
            text = self.random.choice((str.lower, str.lower, str.upper, str.title))(text)
        if self.chance(0.3):
            text = self.random.choice(FILLERS) + text
        habit = self.random.choice((HALF_WIDTH, SPACES, NOTHING, FULL_WIDTH, FULL_WIDTH, FULL_WIDTH))
        text = text.translate(habit)
        return text + (self.random.choice(TAILS) if self.chance(0.45) else "")


def fill(sentence: str, name: str) -> str:
    return sentence.replace("{}", f" {name} " if name.isascii() else name).strip()


FULL_WIDTH = {ord(sign): chr(ord(sign) + 0xFEE0) for sign in ",:;()?!"}  # as a Chinese keyboard types them
HALF_WIDTH = str.maketrans({",": ", ", "。": ".", "、": ",", ":": ": ", ";": "; "})
SPACES = str.maketrans({",": " ", "、": " ", ";": " "})
NOTHING = str.maketrans({",": "", ":": "", ";": ""})


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = ["index\tsentence1\tsentence2\tlabel"]
    lines += [f"{i}\t{row.reference}\t{row.given}\t{row.label}" for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def train_vocabulary(rows: Sequence[Row]) -> list[str]:
    """A lower-cased WordPiece vocabulary in id order: signs, then pieces by merging the most frequent pairs.

    `tokenizers` has a trainer too, but it breaks ties in another order at each run.
    """
    normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for row in rows:
        for text in (row.reference, row.given):
            normalized = normalizer.normalize_str(text)
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalized))
    words = [
        ([word[0], *("##" + sign for sign in word[1:])], count) for word, count in sorted(counts.items())
    ]
    vocabulary = sorted({piece for pieces, _ in words for piece in pieces})
    while len(vocabulary) < VOCAB_SIZE - len(SPECIAL_TOKENS):
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words:
            for pair in pairwise(pieces):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < MIN_FREQUENCY:
            break
        merged = best[0] + best[1].removeprefix("##")
        vocabulary.append(merged)
        for pieces, _ in words:
            merge(pieces, best, merged)
    return [*SPECIAL_TOKENS, *dict.fromkeys(vocabulary)]


def merge(pieces: list[str], pair: tuple[str, str], merged: str) -> None:
    """Replace each `pair` in `pieces`, from the left."""
    i = 0
    while i + 1 < len(pieces):
        if (pieces[i], pieces[i + 1]) == pair:
            pieces[i : i + 2] = [merged]
        i += 1


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
