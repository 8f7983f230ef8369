"""Token ids, truncation and segments against transformers; texts that are none; the folder that is saved."""

import copy
import json
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerFast

from bertpair.console import stop_flag
from bertpair.data import tokenizer as module
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import ConfigError, DataError, StoppedError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LANGUAGES = [
    "主键 (primary key) 唯一标识一行;它不能为 NULL,对吗?",
    "The café’s naïve co-owner re-opened at 9:30 — “great” food, isn’t it?",
    "Die Straße ÄNDERT sich; größere Übung macht den Meister.",
    "L’élève répète: «où est l’œuf?»",
    "¿Dónde está el niño? ¡Mañana, señor!",
    "Процесс и поток: ёлка, объявление, Й.",
    "データベースの索引は検索を速くする。カタカナ、ひらがな。",
    "데이터베이스의 색인은 검색을 빠르게 한다.",
    "قاعدة البيانات تَحفَظُ السُّجِلّات؟",
    "डेटाबेस में अनुक्रमणिका खोज को तेज़ करती है।",
    "Việt Nam: cơ sở dữ liệu quan hệ, đúng không?",
    "ฐานข้อมูลเชิงสัมพันธ์",
]
STRANGE = [
    *("", " ", "\t\n", "\x00\x01\ufffd", "\u00ad\u200f", "x" * 101, "1,000.50€ a_b-c/d"),
    *("a\u0301\u0323b", "e\u0301" * 60, "İstanbul \u01c5 ß \u017f", "ＦＵＬＬ－ｗｉｄｔｈ"),
    *("\U0001f600\U0001f469\u200d\U0001f467", "\U00020000\U0002f800", "a\u00a0b\u2028c\u3000d\u200be"),
]


def make_vocabulary(seed: int) -> list[str]:
    """Pieces of the texts above in both cases, some left out so that [UNK] occurs."""
    rng = random.Random(seed)
    words = " ".join([*LANGUAGES, *STRANGE]).split()
    words += [word.lower() for word in words]
    pieces = {word[i : i + n] for word in words for n in (1, 2, 3) for i in range(len(word))}
    kept = sorted(piece for piece in pieces if rng.random() < 0.9)
    return [*SPECIAL, *kept, *("##" + piece for piece in kept if rng.random() < 0.9)]


def write_folder(folder: Path, vocabulary: Sequence[str], **tokenizer_config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{entry}\n" for entry in vocabulary), encoding="utf-8")
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return folder


def reference_for(folder: Path, lower_case: bool, size: int) -> BertTokenizerFast:
    reference = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=lower_case)
    assert len(reference) == size
    return reference


@pytest.fixture(scope="module", params=[False, True], ids=["cased", "lower"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Our tokenizer and transformers' on one random vocabulary."""
    seed = random.randrange(2**32)
    print(f"make_vocabulary({seed})")  # shown when a test fails
    vocabulary = make_vocabulary(seed)
    folder = write_folder(tmp_path_factory.mktemp("both"), vocabulary)
    ours = Tokenizer.from_folder(folder, do_lower_case=request.param)
    return ours, reference_for(folder, request.param, len(vocabulary))


def rows_of(tokens: Tokens) -> list[list[int]]:
    pairs = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokens.ids[start:stop].tolist() for start, stop in pairs]


def assert_equal(tokens: Tokens, reference, text_a, text_b, max_length: int, typed: bool = False) -> None:
    """`typed`: the texts may hold typed special tokens, which transformers is told to leave text too."""
    columns = [list(text_a)] if text_b is None else [list(text_a), list(text_b)]
    options = {"split_special_tokens": typed}
    expected = reference(*columns, truncation="longest_first", max_length=max_length, **options)
    whole = reference(*columns, **options)["input_ids"]
    assert rows_of(tokens) == expected["input_ids"]
    second = [sum(types) for types in expected["token_type_ids"]]
    assert (tokens.lengths - tokens.first_lengths).tolist() == second
    assert tokens.truncated.tolist() == [len(ids) > max_length for ids in whole]


def assert_same(one: Tokens, other: Tokens) -> None:
    for name in ("ids", "offsets", "first_lengths", "truncated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.slow
def test_ids_equal_transformers_in_many_languages(both) -> None:
    ours, reference = both
    texts = [*LANGUAGES, *STRANGE]
    text_a = [a for a in texts for _ in texts]
    text_b = [b for _ in texts for b in texts]
    for max_length in (5, 6, 7, 12, 23, 40, 300):
        assert_equal(ours.encode(text_a, text_b, max_length), reference, text_a, text_b, max_length)
        assert_equal(ours.encode(texts, None, max_length), reference, texts, None, max_length)


TEXT = st.text(
    st.one_of(
        st.sampled_from(sorted(set("".join(LANGUAGES)))),
        st.sampled_from("  aAbB.,[]#中文\u0301\u0323\t\n\u3000"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), max_length=st.integers(5, 60))
def test_ids_equal_transformers_on_random_texts(both, rows, max_length) -> None:
    ours, reference = both
    text_a, text_b = zip(*rows, strict=True)
    assert_equal(ours.encode(text_a, text_b, max_length), reference, text_a, text_b, max_length, typed=True)
    assert_equal(ours.encode(text_b, None, max_length), reference, text_b, None, max_length, typed=True)


def test_truncation_equals_transformers_at_every_length_and_tie(both) -> None:
    ours, reference = both
    text_a = [" ".join("." * n) for n in range(12) for _ in range(12)]
    text_b = [" ".join("," * n) for _ in range(12) for n in range(12)]
    for max_length in range(5, 27):
        assert_equal(ours.encode(text_a, text_b, max_length), reference, text_a, text_b, max_length)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), max_length=st.integers(5, 16))
def test_heads_of_long_texts_give_the_same_rows(both, rows, max_length) -> None:
    ours, reference = both
    longer = [*((a * 30, b * 30) for a, b in rows), *((a * 30, b) for a, b in rows)]
    text_a, text_b = zip(*longer, *((b, a) for a, b in longer), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONG_CHARS", 1)
        for column in (text_b, None):
            tokens = ours.encode(text_a, column, max_length)
            assert_equal(tokens, reference, text_a, column, max_length, typed=True)


def test_of_a_long_text_whole_words_of_a_head_are_read(both, tmp_path: Path) -> None:
    ours, _ = both
    ((first,), (second,)) = ours._text_ids([["ab " * 10_000], ["ab"]], 17)
    assert 17 < len(first) < 300 and first[: len(second)] == second
    ((first,), (second,)) = ours._text_ids([["中" * 10_000], ["中" * 10_001]], 17)
    assert (len(first), len(second)) == (10_000, 10_001)  # which is the longer, only their ends can tell
    assert ours._text_ids([["a" * 10_000]], 17) == [[[ours.unk_id]]]  # one word
    backend = json.loads(ours.files(40)["tokenizer.json"])
    added = {"id": ours.vocab_size, "content": "ab ab ab", "special": False, "normalized": False}
    backend["added_tokens"].append(added | {"single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    marked = Tokenizer.from_folder(tmp_path)
    for text in ("x " + "ab ab ab " * 1000, "ab " + "ab ab ab " * 1000, "x ab " * 1000):
        for max_length in range(5, 30):
            whole = marked.backend.encode(text).ids
            assert rows_of(marked.encode([text], None, max_length)) == [[*whole[: max_length - 1], whole[-1]]]


def test_far_too_long_texts_cost_no_more_than_their_tokens(both) -> None:
    """The library alone would make millions of rows of what is beyond the cut of these two."""
    ours, _ = both
    first, second = " ".join("ab" * 20_000), " ".join("ba" * 20_000)
    tokens = ours.encode([first, second], [second, first + " a"], 40)
    assert (tokens.lengths.tolist(), tokens.truncated.tolist()) == ([40, 40], [True, True])
    assert tokens.first_lengths.tolist() == [20, 20]


def test_typed_special_tokens_stay_text(both, tmp_path: Path) -> None:
    ours, reference = both
    save_tokenizer(ours, tmp_path, 40)
    reloaded = Tokenizer.from_folder(tmp_path)
    for tokenizer in (ours, reloaded):
        (row,) = rows_of(tokenizer.encode(["a [SEP] b[CLS]"], ["[PAD][MASK] [UNK]"], 40))
        assert row == reference("a [SEP] b[CLS]", "[PAD][MASK] [UNK]", split_special_tokens=True)["input_ids"]
        assert [row.count(ours.backend.token_to_id(t)) for t in ("[CLS]", "[SEP]", "[PAD]")] == [1, 2, 0]


def test_chunks_do_not_change_the_result(both, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both
    text_a = [text for text in LANGUAGES for _ in range(7)]
    text_b = list(reversed(text_a))
    whole = ours.encode(text_a, text_b, 24)
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)
    assert_same(ours.encode(text_a, text_b, 24), whole)
    monkeypatch.setattr(module, "CHUNK_CHARS", 100)
    assert len(list(module.chunks([text_a, text_b]))) > len(text_a) / 5
    assert_same(ours.encode(text_a, text_b, 24), whole)


def test_the_stop_flag_is_seen_between_chunks(both, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    calls = []
    text_ids = ours._text_ids

    def stop_after_two(columns: Sequence[Sequence[str]], room: int) -> Sequence[Sequence[list[int]]]:
        calls.append(len(columns[0]))
        if len(calls) == 2:
            stop_flag.request(15)
        return text_ids(columns, room)

    monkeypatch.setattr(ours, "_text_ids", stop_after_two)
    try:
        with pytest.raises(StoppedError):
            ours.encode(["a"] * 9, None, 8)
    finally:
        stop_flag.clear()
    assert 2 <= len(calls) <= 3  # two chunks are in work at once


def test_no_rows_give_no_tokens(both) -> None:
    ours, _ = both
    for text_b in (None, []):
        tokens = ours.encode([], text_b, 8)
        assert (len(tokens), tokens.ids.size, tokens.offsets.tolist(), tokens.lengths.size) == (0, 0, [0], 0)


def test_arrays_are_compact_and_writable(both) -> None:
    ours, _ = both
    tokens = ours.encode(["a"], ["b"], 8)
    assert [a.dtype for a in (tokens.ids, tokens.offsets, tokens.first_lengths, tokens.truncated)] == [
        np.int32, np.int64, np.uint16, np.bool_,
    ]  # fmt: skip
    assert tokens.ids.flags.writeable
    assert ours.encode(["."], None, 70_000).first_lengths.dtype == np.int32
    assert ours.encode([" ".join("." * 66_000)], ["."], 70_000).first_lengths.tolist() == [66_002]


@pytest.mark.parametrize("max_length, text_b", [(4, ["b"]), (0, ["b"]), (2, None), (-1, None)])
def test_a_length_without_room_for_the_texts_is_refused(both, max_length: int, text_b) -> None:
    with pytest.raises(ConfigError, match=f"max_seq_length is {max_length}.*needs"):
        both[0].encode(["a"], text_b, max_length)


@pytest.mark.parametrize(
    "text_a, text_b, message",
    [
        (["a", "b\ud800"], None, r"text_a\[1\]: character 1 is '\\ud800'"),
        (["a" * 5000 + " \udfff"], None, r"text_a\[0\]: character 5001"),
        (["a"], ["\udc80"], r"text_b\[0\]: character 0"),
        (["\ud800"] * 14, None, r"text_a\[9\](.|\n)*and 4 more"),
    ],
)
def test_what_is_no_text_is_refused_by_row(both, text_a, text_b, message: str) -> None:
    with pytest.raises(DataError, match=message):
        both[0].encode(text_a, text_b, 8)


@pytest.mark.parametrize("with_mask", [True, False])
def test_the_saved_folder_loads_in_transformers_with_equal_ids(both, tmp_path: Path, with_mask: bool) -> None:
    ours, _ = both
    if not with_mask:
        vocabulary = [entry for entry in make_vocabulary(5) if entry != "[MASK]"]
        folder = write_folder(tmp_path / "given", vocabulary)
        ours = Tokenizer.from_folder(folder, do_lower_case=ours.lower_case)
    save_tokenizer(ours, tmp_path, 33)
    assert {path.name for path in tmp_path.iterdir()} - {"given"} == {
        "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
    }  # fmt: skip
    text_a, text_b = LANGUAGES + STRANGE, list(reversed(LANGUAGES + STRANGE))
    for load in (AutoTokenizer, BertTokenizerFast):
        reference = load.from_pretrained(tmp_path)
        assert (len(reference), reference.model_max_length) == (ours.vocab_size, 33)
        assert reference.get_vocab() == ours.backend.get_vocab()
        assert_equal(ours.encode(text_a, text_b, 33), reference, text_a, text_b, 33)
    (tmp_path / "tokenizer.json").unlink()
    from_text = BertTokenizerFast.from_pretrained(tmp_path)
    assert_equal(ours.encode(text_a, text_b, 33), from_text, text_a, text_b, 33)


def test_a_saved_tokenizer_reloads_as_it_was(both, tmp_path: Path) -> None:
    ours, _ = both
    save_tokenizer(ours, tmp_path, 33)
    again = Tokenizer.from_folder(tmp_path, word_table=ours.vocab_size)
    assert (again.backend.to_str(), again.lower_case) == (ours.backend.to_str(), ours.lower_case)
    assert (again.model_max_length, again.pad_id) == (33, ours.pad_id)
    assert again.files(33) == ours.files(33)


def test_copies_cut_alike_and_leave_typed_special_tokens_text(both) -> None:
    ours, _ = both
    expected = ours.encode(["[SEP] [PAD]"], ["a"], 9)
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(other.encode(["[SEP] [PAD]"], ["a"], 9), expected)
        assert other.files(9) == ours.files(9)


def test_nothing_of_the_cut_is_written(both) -> None:
    ours, _ = both
    before = ours.files(40)
    ours.encode(["a"], ["b"], 8)
    assert ours.files(40) == before and ours.backend.truncation is None
