"""JSON that is no plain object of a bounded size is refused by name."""

from pathlib import Path

import pytest

from bertpair.errors import CheckpointError
from bertpair.settings import files as strict_json
from bertpair.settings.files import read_json


def test_an_object_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + '{"a": [1, "词"]}'.encode())
        assert read_json(path) == {"a": [1, "词"]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not usable JSON"),
        (b"{", "not usable JSON"),
        (b"hello", "not usable JSON"),
        (b"\xff\xfe{}", "not usable JSON"),
        (b'{"a": 1, "a": 1}', "the key 'a' stands there twice"),
        (b'{"x": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not usable JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_beyond_all_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 1 << 20)
    path = tmp_path / "some.json"
    path.write_bytes(b'{"a": 1}' + b" " * (1 << 20))
    with pytest.raises(CheckpointError, match="more than 1 MiB"):
        read_json(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_json(path)
        assert str(path) in str(caught.value)
