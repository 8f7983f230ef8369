"""The token cache: never stale, never believed when damaged, bounded, and no hindrance where it cannot be."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bertpair.data import dataset as token_cache
from bertpair.data.dataset import FIELDS, Encoder, default_cache_dir
from bertpair.data.tokenizer import Tokenizer, Tokens

TEXT_A = ["the cat", "中文 数据库", "The cat sat"]
TEXT_B = ["sat", "good food!", "мир"]


def encode_cached(
    tokenizer: Tokenizer,
    text_a: list[str],
    text_b: list[str] | None,
    max_length: int,
    *,
    cache_dir: Path | None = None,
    overwrite: bool = False,
) -> Tokens:
    return Encoder(tokenizer, max_length, cache_dir, overwrite).encode(text_a, text_b)


@pytest.fixture
def tokenizer(vocab_file: Path) -> Tokenizer:
    return Tokenizer.from_folder(vocab_file.parent)


@pytest.fixture(autouse=True)
def keep_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARS", 0)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[int]:
    """Numbers of rows that were really tokenized, call by call."""
    calls: list[int] = []
    encode = tokenizer.encode

    def counted(text_a, text_b, max_length: int) -> Tokens:
        calls.append(len(text_a))
        return encode(text_a, text_b, max_length)

    monkeypatch.setattr(tokenizer, "encode", counted)
    return calls


def assert_same(one: Tokens, other: Tokens) -> None:
    for name in FIELDS:
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_the_second_time_comes_from_the_cache(
    tokenizer: Tokenizer, encoded: list[int], tmp_path: Path
) -> None:
    cache = tmp_path / "new" / "cache"
    first = encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache)
    second = encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache)
    assert encoded == [3]
    assert second.truncated.any() and not second.truncated.all()
    assert_same(first, second)
    assert_same(first, tokenizer.encode(TEXT_A, TEXT_B, 7))
    assert [path.name for path in cache.iterdir()] == [entries(cache)[0].name]


def test_whatever_changes_the_ids_changes_the_entry(
    tokenizer: Tokenizer, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    variants = [
        (TEXT_A, TEXT_B, 7),
        (TEXT_A, TEXT_B, 8),
        (TEXT_A, None, 7),
        (TEXT_B, TEXT_A, 7),
        (TEXT_A[::-1], TEXT_B[::-1], 7),
        (["the ca", "t中文 数据库", "The cat sat"], TEXT_B, 7),
        ([*TEXT_A, *TEXT_B], None, 7),
        (["the cat", "中文 数据库", "The cat sat."], TEXT_B, 7),
    ]
    for text_a, text_b, max_length in variants:
        encode_cached(tokenizer, text_a, text_b, max_length, cache_dir=cache)
    assert len(encoded) == len(entries(cache)) == len(variants)
    lower = Tokenizer.from_folder(tmp_path, do_lower_case=True)
    encode_cached(lower, TEXT_A, TEXT_B, 7, cache_dir=cache)
    monkeypatch.setattr(token_cache, "VERSION", "another")
    encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache)
    monkeypatch.setattr("tokenizers.__version__", "another")
    encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache)
    assert len(entries(cache)) == len(variants) + 3


def test_overwrite_makes_the_entry_anew(tokenizer: Tokenizer, encoded: list[int], tmp_path: Path) -> None:
    encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=tmp_path / "c")
    encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=tmp_path / "c", overwrite=True)
    encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=tmp_path / "c")
    assert encoded == [3, 3]
    assert len(entries(tmp_path / "c")) == 1


def test_damage_anywhere_is_seen_and_mended(
    tokenizer: Tokenizer, encoded: list[int], tmp_path: Path, caplog
) -> None:
    cache = tmp_path / "cache"
    right = encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache)
    (path,) = entries(cache)
    whole = path.read_bytes()
    damaged = [b"x" * 200, whole + b"\0"]
    damaged += [whole[:n] for n in (0, 1, 7, 8, 60, len(whole) // 2, len(whole) - 1)]
    for position in range(8, len(whole), 11):
        damaged.append(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        encoded.clear()
        caplog.clear()
        assert_same(encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=cache), right)
        assert encoded == [3]
        assert "made anew" in caplog.text
        assert path.read_bytes() == whole


def test_another_rows_entry_under_this_name_is_not_believed(
    tokenizer: Tokenizer, encoded: list[int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    right = encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache)
    (path,) = entries(cache)
    encode_cached(tokenizer, TEXT_A[:2], None, 7, cache_dir=cache)
    (other,) = set(entries(cache)) - {path}
    shutil.copy(other, path)
    assert_same(encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache), right)
    arrays = load_file(path)
    save_file({name: array for name, array in arrays.items() if name != "offsets"}, path)
    assert_same(encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache), right)
    save_file(arrays, path)  # right arrays, no checksum
    assert_same(encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache), right)
    assert encoded == [3, 2, 3, 3, 3]


@pytest.mark.parametrize("blocked", ["file", "entry"])
def test_a_cache_that_cannot_be_written_is_only_a_warning(
    tokenizer: Tokenizer, tmp_path: Path, blocked: str, caplog
) -> None:
    cache = tmp_path / "cache"
    if blocked == "file":
        cache.write_text("no folder")
    else:
        encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache)
        (path,) = entries(cache)
        path.unlink()
        path.mkdir()
        (path / "in the way").touch()
    tokens = encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=cache)
    assert_same(tokens, tokenizer.encode(TEXT_A, None, 7))
    assert "cannot be written" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_write_that_fails_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def full_disk(arrays, name: str, metadata) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "save_file", full_disk)
    encode_cached(tokenizer, TEXT_A, None, 7, cache_dir=tmp_path / "cache")
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_the_entries_used_longest_ago_go_first_and_nothing_else(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    paths = []
    for number, text in enumerate(["a", "b", "c"]):
        before = set(entries(cache)) if cache.exists() else set()
        encode_cached(tokenizer, [text], None, 7, cache_dir=cache)
        paths += set(entries(cache)) - before
        os.utime(paths[-1], (1000 + number, 1000 + number))
    size = paths[0].stat().st_size
    foreign = [cache / "model.safetensors", cache / "other.tmp"]
    left = cache / ("tokens-" + "0" * 16 + "-left.tmp")
    fresh = cache / ("tokens-" + "0" * 16 + "-fresh.tmp")
    for path in (*foreign, left, fresh):
        path.write_bytes(b"0" * 3 * size)
    for path in (*foreign, left):
        os.utime(path, (1, 1))
    encode_cached(tokenizer, ["a"], None, 7, cache_dir=cache)
    assert paths[0].stat().st_mtime > time.time() - 60
    monkeypatch.setattr(token_cache, "MAX_BYTES", 3 * size)
    encode_cached(tokenizer, ["d"], None, 7, cache_dir=cache)
    assert [path.exists() for path in paths] == [True, False, True]
    assert [path.exists() for path in (*foreign, left, fresh)] == [True, True, False, True]
    monkeypatch.setattr(token_cache, "MAX_BYTES", 10)
    encode_cached(tokenizer, ["e"], None, 7, cache_dir=cache)
    assert len(entries(cache)) == 4  # too large to be kept: not written, and no reason to remove the others


def test_writers_at_once_do_not_disturb_each_other(tokenizer: Tokenizer, tmp_path: Path, caplog) -> None:
    right = tokenizer.encode(TEXT_A, TEXT_B, 7)
    results: list[Tokens] = []

    def work() -> None:
        for _ in range(10):
            tokens = encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=tmp_path / "cache", overwrite=True)
            results.append(tokens)
            results.append(encode_cached(tokenizer, TEXT_A, TEXT_B, 7, cache_dir=tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for tokens in results:
        assert_same(tokens, right)
    assert not caplog.records
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_small_inputs_are_not_kept(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "MIN_CHARS", 50)
    encode_cached(tokenizer, ["a" * 24], ["b" * 25], 7, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    encode_cached(tokenizer, ["a" * 25], ["b" * 25], 7, cache_dir=tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1


def test_the_default_folder_is_the_users_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "bertpair" / "tokens"
    encode_cached(tokenizer, TEXT_A, None, 7)
    assert len(entries(default_cache_dir())) == 1
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "bertpair" / "tokens"


def test_no_home_folder_is_only_a_warning(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert_same(encode_cached(tokenizer, TEXT_A, None, 7), tokenizer.encode(TEXT_A, None, 7))
    assert "cannot be written" in caplog.text
