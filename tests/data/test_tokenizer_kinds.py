"""Tokenizers of every kind against transformers: ids, types, cuts, typed special tokens, saved folders."""

import copy
import csv
import json
import logging
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TINY_CONFIG, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import LANGUAGES, STRANGE, assert_same, rows_of
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaTokenizer

from bertpair import Config, PairClassifier, train
from bertpair.data import tokenizer as module
from bertpair.data.batching import pad_batch
from bertpair.data.dataset import Pairs, make_split
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
TEXTS = [*LANGUAGES, *STRANGE]
TRUNCATIONS = ("longest_first", "only_second")
TYPED = "<s> </s> <pad> <unk> <mask> <bos> <eos> [CLS] [SEP] [PAD] [UNK] [MASK]".split()


def sample() -> Iterator[str]:
    with (ROOT / "data" / "train.tsv").open(encoding="utf-8", newline="") as file:
        for i, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if 0 < i <= 400:
                yield from row[1:3]
    yield from 20 * LANGUAGES


def template(single: str, pair: str, backend: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    specials = {word.split(":")[0] for word in pair.split() if "$" not in word}
    numbers = [(token, backend.token_to_id(token)) for token in sorted(specials)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbers)


def wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(sample(), trainer)
    backend.post_processor = template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", backend)
    return backend


def byte_level() -> tokenizers.Tokenizer:
    """As RoBERTa has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sample(), trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Gemma and mmBERT have it: no words, and bytes for what the vocabulary lacks."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=150,
        max_token_length=12,
        show_progress=False,
    )
    backend.train_from_iterator(sample(), trainer)
    document = json.loads(backend.to_str())
    document["added_tokens"] = document["added_tokens"][: len(special)]
    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    backend.post_processor = template("<bos> $A <eos>", "<bos> $A <eos> $B:1 <eos>:1", backend)
    return backend


def unigram(special: list[str], *steps: normalizers.Normalizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(list(steps))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(sample(), trainer)
    return backend


def xlm_roberta() -> tokenizers.Tokenizer:
    backend = unigram(["<s>", "<pad>", "</s>", "<unk>"], normalizers.NFKC())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    backend.post_processor = template("<s> $A </s>", "<s> $A </s> </s> $B </s>", backend)
    return backend


def albert() -> tokenizers.Tokenizer:
    quotes = normalizers.Replace("``", '"'), normalizers.Replace("''", '"')
    cased = normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()
    backend = unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], *quotes, *cased)
    backend.post_processor = template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", backend)
    return backend


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
TYPES = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
NO_TYPES = {"model_input_names": ["input_ids", "attention_mask"]}
BOS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
MASK = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "rstrip": False, "normalized": True}
KINDS: dict[Callable[[], tokenizers.Tokenizer], tuple[str, dict[str, object]]] = {
    wordpiece: ("bert", {**GENERIC, **TYPES}),
    byte_level: ("roberta", {"tokenizer_class": "RobertaTokenizer"}),
    byte_fallback: ("modernbert", {"tokenizer_class": "GemmaTokenizer", **BOS, **NO_TYPES}),
    xlm_roberta: ("xlm-roberta", {**GENERIC, "mask_token": MASK, "additional_special_tokens": ["<e1>"]}),
    albert: ("albert", {"tokenizer_class": "AlbertTokenizer", "extra_special_tokens": ["<e1>"], **TYPES}),
}


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that was trained just now."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    network, config = KINDS[request.param]
    backend = request.param()
    backend.add_special_tokens(["<e1>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": network}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def both(whole: Path):
    """Our tokenizer and transformers' of the same folder."""
    return Tokenizer.from_folder(whole), AutoTokenizer.from_pretrained(whole)


def types_of(tokens: Tokens) -> list[list[int]]:
    pairs = zip(tokens.first_lengths.tolist(), tokens.lengths.tolist(), strict=True)
    return [[0] * first + [1] * (length - first) for first, length in pairs]


def assert_equal(ours: Tokenizer, reference, text_a, text_b, max_length: int, truncation: str) -> None:
    """Where `only_second` would leave nothing of the second text, transformers refuses the row."""
    ours.truncation = truncation
    tokens = ours.encode(text_a, text_b, max_length)
    columns = [list(text_a)] if text_b is None else [list(text_a), list(text_b)]
    if text_b is not None and truncation == "only_second":
        room = max_length - reference.num_special_tokens_to_add(pair=True)
        counts = [len(reference(a, add_special_tokens=False)["input_ids"]) for a in text_a]
        fits = [count < room for count in counts]
        columns = [[text for text, fit in zip(column, fits, strict=True) if fit] for column in columns]
        ours.truncation = "longest_first"
        others = rows_of(ours.encode(text_a, text_b, max_length))
        rows = rows_of(tokens)
        assert [row for row, fit in zip(rows, fits, strict=True) if not fit] == [
            row for row, fit in zip(others, fits, strict=True) if not fit
        ]
        assert {len(row) for row, fit in zip(rows, fits, strict=True) if not fit} <= {max_length}
        ours.truncation = truncation
        if not columns[0]:
            return
        tokens = ours.encode(*columns, max_length)
    how = truncation if text_b is not None else True
    expected = reference(*columns, truncation=how, max_length=max_length)
    assert rows_of(tokens) == expected["input_ids"]
    assert types_of(tokens) == expected.get("token_type_ids", [[0] * length for length in tokens.lengths])
    lengths = [len(row) for row in reference(*columns)["input_ids"]]
    assert tokens.truncated.tolist() == [length > max_length for length in lengths]
    if max_length % 5 == 0:
        batch = pad_batch(tokens, np.arange(len(tokens)), pad_id=ours.pad_id, pad_to_multiple_of=1)
        padded = reference.pad(expected, return_tensors="pt")
        assert torch.equal(batch.input_ids, padded["input_ids"])
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        assert torch.equal(mask.long(), padded["attention_mask"])
        if "token_type_ids" in padded:
            assert torch.equal(batch.token_type_ids[mask.bool()], padded["token_type_ids"][mask.bool()])


@pytest.mark.slow
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_ids_equal_transformers_at_every_cut(both, truncation: str) -> None:
    ours, reference = both
    text_a, text_b = TEXTS, random.Random(3).sample(TEXTS, len(TEXTS))
    for column in (text_b, None):
        least = reference.num_special_tokens_to_add(pair=column is not None) + 1 + (column is not None)
        for max_length in (*range(least, 41), 300):
            assert_equal(ours, reference, text_a, column, max_length, truncation)


TEXT = st.text(
    st.one_of(
        st.sampled_from(sorted(set("".join(LANGUAGES)))),
        st.sampled_from("  aAbB.,[]#中文\u0301\u0323\t\n\u3000"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), max_length=st.integers(6, 17))
def test_heads_of_long_texts_give_the_same_rows(both, rows, max_length: int) -> None:
    ours, _ = both
    ours.truncation = "longest_first"
    longer = [*((a * 30, b * 30) for a, b in rows), *((a * 30, b) for a, b in rows)]
    text_a, text_b = zip(*longer, *((b, a) for a, b in longer), strict=True)
    for column in (text_b, None):
        expected = ours.encode(text_a, column, max_length)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LONG_CHARS", 1)
            assert_same(ours.encode(text_a, column, max_length), expected)
            patch.setattr(module, "LONG_CHARS", 10**6)
            assert_same(ours.encode(text_a, column, max_length), expected)


@pytest.mark.slow
def test_far_too_long_texts_take_seconds(both) -> None:
    """The library alone would make millions of rows of what is beyond the cut."""
    ours, _ = both
    ours.truncation = "longest_first"
    text = (" ".join(TEXTS) * 300)[:200_000]
    start = time.monotonic()
    tokens = ours.encode([text, text], [text + " a", "a"], 40)
    assert time.monotonic() - start < 20
    assert (tokens.lengths.tolist(), tokens.truncated.tolist()) == ([40, 40], [True, True])


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) for c in text)


def test_typed_special_tokens_stay_text(both, tmp_path: Path) -> None:
    ours, reference = both
    save_tokenizer(ours, tmp_path, 40)
    reserved = {i for token in TYPED if (i := ours.backend.token_to_id(token)) is not None}
    reserved -= {ours.unk_id}
    for token in TYPED:
        forms = token, token.upper(), token.lower(), full_width(token), f" {token} ", f"a{token}b", 2 * token
        for tokenizer in (ours, Tokenizer.from_folder(tmp_path), copy.deepcopy(ours)):
            tokens = tokenizer.encode(forms, None, 40)
            specials = tokenizer.encode([""], None, 40).ids.tolist()
            for row in rows_of(tokens):
                assert row[:1] + row[-1:] == specials and not reserved & {*row[1:-1]}
    (row,) = rows_of(ours.encode(["a <unk> a"], None, 40))
    known = reference("a < unk > a")["input_ids"]
    assert row.count(ours.unk_id) <= known.count(ours.unk_id)


def test_markers_without_a_role_are_read_in_texts(both) -> None:
    ours, reference = both
    (row,) = rows_of(ours.encode(["a<e1> b"], None, 40))
    assert ours.backend.token_to_id("<e1>") in row and row == reference("a<e1> b")["input_ids"]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_saved_folder_loads_in_transformers_with_equal_ids(
    both, whole: Path, tmp_path: Path, truncation: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Tokenizer.from_folder(whole, truncation=truncation)
    save_tokenizer(ours, tmp_path, 33)
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"}
    names |= {"vocab.txt"} if isinstance(ours.backend.model, models.WordPiece) else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert not caplog.records
    assert (len(reference), reference.model_max_length) == (ours.vocab_size, 33)
    assert (reference.pad_token_id, reference.padding_side) == (ours.pad_id, "right")
    assert reference.get_vocab() == both[1].get_vocab()
    for column in (TEXTS[::-1], None):
        assert_equal(ours, reference, TEXTS, column, 33, truncation)
    assert_equal(ours, reference, ["a<e1> b"], None, 33, truncation)
    again = Tokenizer.from_folder(tmp_path, word_table=ours.vocab_size)
    ours.truncation = truncation
    assert again.files(33) == ours.files(33) and again.backend.to_str() == ours.backend.to_str()
    assert (again.model_max_length, again.truncation) == (33, truncation)
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.files(33) == ours.files(33)
        assert_same(other.encode(TEXTS, TEXTS, 33), ours.encode(TEXTS, TEXTS, 33))


def declare(folder: Path, name: str = "tokenizer_config.json", **said: object) -> Path:
    path = folder / name
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **said}), encoding="utf-8")
    return folder


def change(folder: Path, **parts: object) -> Path:
    return declare(folder, "tokenizer.json", **parts)


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A folder with tokenizer.json alone."""
    folder = tmp_path / "roberta"
    folder.mkdir()
    byte_level().save(str(folder / "tokenizer.json"))
    return declare(folder, tokenizer_class="RobertaTokenizer")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", [None, False, True])
def test_two_files_of_roberta_are_its_tokenizer(roberta: Path, prefix: bool | None) -> None:
    tokenizers.Tokenizer.from_file(str(roberta / "tokenizer.json")).model.save(str(roberta))
    (roberta / "tokenizer.json").unlink()
    if prefix is not None:
        declare(roberta, add_prefix_space=prefix)
    ours, reference = Tokenizer.from_folder(roberta), RobertaTokenizer.from_pretrained(roberta)
    for column in (TEXTS[::-1], None):
        assert_equal(ours, reference, TEXTS, column, 23, "longest_first")
    saved = roberta / "saved"
    saved.mkdir()
    save_tokenizer(ours, saved, 23)
    assert_equal(ours, AutoTokenizer.from_pretrained(saved), TEXTS, TEXTS, 23, "longest_first")
    assert Tokenizer.from_folder(saved).files(23) == ours.files(23)
    (roberta / "merges.txt").unlink()
    assert "vocab.json and merges.txt" in refusal(roberta)
    (roberta / "merges.txt").write_text("no merge\n")
    assert "no byte-level vocabulary" in refusal(roberta)
    (roberta / "vocab.json").write_text("{}")
    (roberta / "merges.txt").write_text("#version: 0.2\n")
    assert "<s>, <pad>, </s> not in the vocabulary" in refusal(roberta)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
def test_the_class_is_kept_where_it_builds_the_same_steps(
    tmp_path: Path, normalizer: normalizers.Normalizer | None
) -> None:
    backend = xlm_roberta()
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Sequence(words)
    backend.add_special_tokens(["<e1>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    declare(tmp_path, tokenizer_class="XLMRobertaTokenizerFast")
    declare(tmp_path, "config.json", model_type="xlm-roberta")
    ours = Tokenizer.from_folder(tmp_path)
    save_tokenizer(ours, tmp_path, 30)
    kept = "PreTrainedTokenizerFast" if normalizer else "XLMRobertaTokenizer"
    assert json.loads(ours.files(30)["tokenizer_config.json"])["tokenizer_class"] == kept
    texts = [*TEXTS, "a<e1> b"]
    assert_equal(ours, AutoTokenizer.from_pretrained(tmp_path), texts, texts[::-1], 30, "longest_first")
    assert Tokenizer.from_folder(tmp_path).files(30) == ours.files(30)


@pytest.mark.parametrize("prefix", [None, True])
def test_roberta_follows_its_settings_file_beside_a_tokenizer_json_too(
    roberta: Path, prefix: bool | None
) -> None:
    steps = {"type": "ByteLevel", "add_prefix_space": not prefix, "trim_offsets": True, "use_regex": True}
    declare(change(roberta, pre_tokenizer=steps), **{} if prefix is None else {"add_prefix_space": prefix})
    ours, saved = Tokenizer.from_folder(roberta), roberta / "saved"
    assert_equal(ours, AutoTokenizer.from_pretrained(roberta), TEXTS, None, 30, "longest_first")
    saved.mkdir()
    save_tokenizer(ours, saved, 30)
    assert type(AutoTokenizer.from_pretrained(saved)) is RobertaTokenizer
    assert_equal(ours, AutoTokenizer.from_pretrained(saved), TEXTS, None, 30, "longest_first")


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spiece.model", "tokenizer.model"])
def test_a_sentencepiece_model_alone_is_refused_with_the_command(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for said in ({}, {"tokenizer_class": "XLMRobertaTokenizer"}):
        (line,) = refusal(declare(tmp_path, **said)).splitlines()
        assert name in line and f"AutoTokenizer.from_pretrained('{tmp_path}').save_pretrained(" in line


def test_padding_on_the_left_changes_nothing_and_is_said(
    roberta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = Tokenizer.from_folder(roberta).encode(TEXTS, TEXTS, 20)
    assert "on the left" not in caplog.text
    backend = tokenizers.Tokenizer.from_file(str(roberta / "tokenizer.json"))
    backend.enable_padding(direction="left", pad_id=1, pad_token="<pad>", length=50)
    backend.enable_truncation(7)
    for folder in (declare(roberta, padding_side="left"), change(roberta, **json.loads(backend.to_str()))):
        ours = Tokenizer.from_folder(folder)
        assert caplog.text.count("on the left") == 1
        assert_same(ours.encode(TEXTS, TEXTS, 20), expected)
        files = ours.files(20)
        assert json.loads(files["tokenizer_config.json"])["padding_side"] == "right"
        assert {json.loads(files["tokenizer.json"])[name] for name in ("padding", "truncation")} == {None}
        declare(folder, padding_side=None)
        caplog.clear()


LEFT = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}


def test_what_cannot_be_followed_is_refused(roberta: Path) -> None:
    document = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))
    assert "cuts texts at the left" in refusal(change(roberta, truncation=LEFT))
    change(roberta, truncation=None)
    assert "truncation_side: found 'left'" in refusal(declare(roberta, truncation_side="left"))
    declare(roberta, truncation_side=None, word_tokenizer_type="mecab")
    assert "word_tokenizer_type: found 'mecab'" in refusal(roberta)
    declare(roberta, word_tokenizer_type=None)
    assert "never run" in refusal(declare(roberta, auto_map={"AutoTokenizer": ["own"]}))
    assert "expected a list" in refusal(declare(roberta, auto_map=None, model_input_names="input_ids"))
    assert "'<e9>'" in refusal(declare(roberta, model_input_names=None, extra_special_tokens=["<e9>"]))
    declare(roberta, extra_special_tokens=[])
    with pytest.raises(CheckpointError, match="lower-casing False, do_lower_case is True"):
        Tokenizer.from_folder(roberta, do_lower_case=True)
    special = {
        t["content"]: {"id": t["content"], "ids": [t["id"]], "tokens": [t["content"]]}
        for t in document["added_tokens"]
    }
    for pair, found in (
        ("<s>:0 A:0 </s>:0 B:1 </s>:2", "types [0, 0, 0, 1, 2])"),
        ("<s>:1 A:0 </s>:0 B:1 </s>:1", "types [1, 0, 0, 1, 1])"),
        ("<s>:0 B:0 </s>:0 A:0 </s>:0", "the first text first"),
        ("<s>:0 A:0 </s>:0 B:0 A:0", "the first text first"),
        ("A:0 B:0", "special tokens of the vocabulary around"),
    ):
        parts = [word.split(":") for word in pair.split()]
        pieces = [
            {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": int(kind)}}
            for name, kind in parts
        ]
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        written = {"type": "TemplateProcessing", "single": single, "pair": pieces, "special_tokens": special}
        assert found in refusal(change(roberta, post_processor=written))
    assert "special tokens of the vocabulary around" in refusal(change(roberta, post_processor=None))
    document["post_processor"]["cls"] = ["<s>", 99_999]
    assert "(ids [99999, " in refusal(change(roberta, **document))
    document["post_processor"]["cls"] = ["<s>", 0]
    document["model"]["dropout"] = 0.1
    assert "its model has dropout" in refusal(change(roberta, **document))


def test_a_typed_special_token_that_cannot_be_taken_apart_is_refused(roberta: Path) -> None:
    document = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"][0]["content"] = "s"
    document["post_processor"]["cls"] = ["s", document["model"]["vocab"]["s"]]
    assert "reads 's' as the special token s" in refusal(change(roberta, **document))


def test_words_that_are_read_without_merges_keep_typed_special_tokens_text(roberta: Path) -> None:
    document = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["ignore_merges"] = True
    declare(roberta, tokenizer_class="PreTrainedTokenizerFast")
    ours = Tokenizer.from_folder(
        change(roberta, **{**document, "pre_tokenizer": {"type": "WhitespaceSplit"}})
    )
    (row,) = rows_of(ours.encode(["a </s> <s> <pad>"], None, 40))
    assert [row.count(i) for i in (0, 1, 2)] == [1, 0, 1]


def test_the_padding_token_is_found_or_asked_for(roberta: Path) -> None:
    assert Tokenizer.from_folder(roberta).pad_id == 1  # a special token with the usual name
    document = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {{"<pad>": "<p>"}.get(token, token): i for token, i in document["model"]["vocab"].items()}
    document["model"]["vocab"] = vocabulary
    document["added_tokens"][1]["content"] = "<p>"
    change(roberta, **document)
    message = refusal(roberta)
    assert "no padding token; pad_token of tokenizer_config.json" in message
    for name, said in (
        ("tokenizer_config.json", {"pad_token": "<p>"}),
        ("tokenizer_config.json", {"pad_token": {"content": "<p>", "lstrip": False}}),
        ("special_tokens_map.json", {"pad_token": "<p>"}),
        ("config.json", {"pad_token_id": 1}),
        (
            "tokenizer.json",
            {
                "padding": {
                    "strategy": "BatchLongest",
                    "direction": "Right",
                    "pad_id": 1,
                    "pad_to_multiple_of": None,
                    "pad_type_id": 0,
                    "pad_token": "<p>",
                }
            },
        ),
    ):
        declare(roberta, name, **said)
        ours = Tokenizer.from_folder(roberta)
        assert ours.pad_id == 1 and 1 not in ours.encode(["<p> a<p>b"], None, 40).ids
        assert json.loads(ours.files(9)["tokenizer_config.json"])["pad_token"] == "<p>"
        declare(roberta, name, **dict.fromkeys(said))


def test_a_vocabulary_without_an_unknown_token_has_none(roberta: Path, caplog) -> None:
    document = json.loads((roberta / "tokenizer.json").read_text(encoding="utf-8"))
    del document["added_tokens"][3]
    ours = Tokenizer.from_folder(change(roberta, **document))
    assert (ours.unk_token, ours.unk_id) == (None, None)
    pairs = Pairs(["中文"], None, None, ("x",), np.zeros(1, np.int32), np.ones(1, np.int32), None)
    make_split(pairs, None, ours, 20, name="train")
    assert "vocabulary is not" not in caplog.text


def test_the_warning_names_the_unknown_token(both, caplog) -> None:
    ours, _ = both
    pairs = Pairs(["\U00012000 " * 9], None, None, ("x",), np.zeros(1, np.int32), np.ones(1, np.int32), None)
    make_split(pairs, None, ours, 20, name="train")
    has_unknown = isinstance(ours.backend.model, models.WordPiece | models.Unigram)
    assert ("% of the tokens are <unk>, which" in caplog.text) is has_unknown


def test_an_unknown_truncation_is_refused(roberta: Path) -> None:
    with pytest.raises(ConfigError, match="truncation: found 'only_first'; allowed: longest_first, only_sec"):
        Tokenizer.from_folder(roberta, truncation="only_first")
    assert Tokenizer.from_folder(declare(roberta, truncation=True)).truncation == "longest_first"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("whole", [xlm_roberta], indirect=True, ids=["xlm_roberta"])
def test_what_training_writes_answers_alike_in_transformers(whole: Path, both, tmp_path: Path) -> None:
    """A BERT with that vocabulary, as the multilingual sentence models have XLM-R's."""
    base = shutil.copytree(whole, tmp_path / "base")
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", **TYPES}
    config = TINY_CONFIG | {"vocab_size": both[0].vocab_size, "pad_token_id": both[0].pad_id}
    (declare(base, **declared) / "config.json").write_text(json.dumps(config))
    lines = [
        f"{i}\t{a}\t{b}\t{'xy'[i % 2]}"
        for i, (a, b) in enumerate(zip(LANGUAGES, LANGUAGES[::-1], strict=True))
    ]
    Path("train.tsv").write_text("\n".join(["i\ta\tb\tlabel", *lines, ""]), encoding="utf-8")
    said = {"max_seq_length": 20, "truncation": "only_second", "max_steps": 1, "amp": "off", "num_threads": 1}
    files = {"train_file": ["train.tsv"], "model_name_or_path": str(base), "output_dir": "out"}
    train(Config(**files, **said, from_scratch=True))
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForSequenceClassification.from_pretrained("out").eval()
    pairs = [("мир", b) for b in LANGUAGES]
    batch = tokenizer(*zip(*pairs, strict=True), truncation="only_second", padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(PairClassifier.from_pretrained("out").logits(pairs), expected, atol=2e-6)
