"""The bytes of a TSV file → rows of cells, each with the line it starts on.

Parsed by hand: Python's csv module ends lines at a lone carriage return, str.splitlines at U+2028 and
friends, and neither says where a quote was opened. Here a line ends at \\n or \\r\\n, nothing else. Files
are read in blocks, so that a reader who has enough stops early.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bertpair.errors import DataError

BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it: iconv -f UTF-32LE -t UTF-8 OLD > NEW"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or export it as tab-separated text"),
    (b"PK\x05\x06", "an empty zip archive", "tab-separated text is expected"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "export it as tab-separated text"),
    (b"PAR1", "a Parquet file", "write it as tab-separated text"),
    (b"BZh", "a bzip2 file", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ", "an xz file", "unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it: unzstd FILE"),
    (b"%PDF", "a PDF file", "tab-separated text is expected"),
    (b"version https://git-lfs", "a Git LFS pointer to the file", "fetch the file itself: git lfs pull"),
    (b"{\\rtf", "a document with its layout", "save it as plain text"),
    (b"<?xml", "an XML file", "export it as tab-separated text"),
    (b"sep=", "a file for Excel, with its line sep= first", "remove that line"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "a web page", "download the file itself"),
)
_ENCODINGS = (  # iconv's name, Python's, the letters that a text in it consists of, and at least which part
    ("WINDOWS-1251", "cp1251", "[а-яё]{3,}", 0.7),
    ("KOI8-R", "koi8_r", "[а-яё]{3,}", 0.7),
    ("SHIFT_JIS", "cp932", "[\u3040-\u30ff]", 0.25),
    ("EUC-JP", "euc_jp", "[\u3040-\u30ff]", 0.25),
    ("EUC-KR", "euc_kr", "[\uac00-\ud7a3]{2,}", 0.7),
    ("GB18030", "gb2312", "[\u4e00-\u9fff]{3,}", 0.6),  # beyond GB 2312, Big5 and it are hard to tell apart
    ("BIG5", "big5", "[\u4e00-\u9fff]{3,}", 0.6),
)
_BINARY = "binary data; tab-separated text is expected"
_NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and what surrogateescape makes of bytes that are not UTF-8


class Record(NamedTuple):
    """One row: the line it starts on (from 1), its cells (none: an empty line), what is wrong or ""."""

    line: int
    cells: list[str]
    fault: str


def read_records(path: str, quoting: str) -> Iterator[Record]:
    """Every row of the file, the header too; DataError if it cannot be read or a quote is never closed.

    `quoting`: `none` takes quotes literally; with `csv`, a field that begins with a quote ends at the
    next single one and may hold tabs, newlines and doubled quotes.
    """
    lines = _read_lines(path)
    for number, line, fault in lines:
        if quoting == "csv" and '"' in line:
            yield _quoted_record(path, number, line, fault, lines)
        elif not line or line.isspace():
            yield Record(number, [], fault)
        else:
            yield Record(number, line.removesuffix("\r").split("\t"), fault)


def first_row(path: Path | str, quoting: str = "none") -> list[str]:
    """The cells of the first line; DataError if there is none, or it is empty or not text."""
    name = os.fspath(path)
    for line, cells, fault in read_records(name, quoting):
        if fault or not cells:
            raise DataError(f"{name}:{line}: {fault or 'an empty line; the first row is expected here'}")
        return cells
    raise DataError(f"{name}: the file is empty")


def _read_lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Line number, text without the newline, and the fault of its bytes or ""."""
    number = 0
    for block in _read_blocks(path):
        try:
            text, is_suspect = block.decode("utf-8"), b"\0" in block
        except UnicodeDecodeError:
            text, is_suspect = block.decode("utf-8", "surrogateescape"), True
        for line in text.split("\n"):
            number += 1
            yield number, line, _byte_fault(line) if is_suspect else ""


def _read_blocks(path: str) -> Iterator[bytes]:
    """The file in pieces of whole lines, without the byte order mark and each piece's last newline."""
    pending: list[bytes] = []  # a line longer than a block: joined once, not over and over
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
            raise DataError(f"{path}: is a pipe or a device; it is read more than once, so save it as a file")
        with open(path, "rb") as file:
            block = file.read(BLOCK_BYTES)
            if other := _other_kind(block):
                raise DataError(f"{path}: looks like {other}")
            block = block.removeprefix(_BOM)
            while block:
                lines, newline, tail = block.rpartition(b"\n")
                if newline:
                    yield b"".join((*pending, lines))
                    pending.clear()
                pending.append(tail)
                block = file.read(BLOCK_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; a TSV file is expected") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from error
    rest = b"".join(pending)
    if rest:
        yield rest


def _other_kind(block: bytes) -> str:
    """What a file that begins so seems to be instead of UTF-8 text with lines, and what to do; or ""."""
    for magic, kind, advice in _MAGIC:
        if block.startswith(magic):
            return f"{kind}; {advice}"
    head = block[:4096]
    if head.count(0) > max(3, len(head) // 50):  # a few are bad rows, each to be named
        for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
            num_letters = 8 * len(head) // int(name[4:6])
            text = head.decode(name, "ignore")
            if len(text) > 0.9 * num_letters and "\0" not in text and ("\t" in text or "\n" in text):
                return f"{name} text; convert it: iconv -f {name} -t UTF-8 OLD > NEW"
        return _BINARY
    if block.count(b"\r") - block.count(b"\r\n") > block.count(b"\n"):
        return "lines that end in a carriage return alone; convert it: tr '\\r' '\\n' < OLD > NEW"
    if b"\x1b$B" in block:
        return "ISO-2022-JP text; convert it: iconv -f ISO-2022-JP -t UTF-8 OLD > NEW"
    lines = [line for line in block.split(b"\n") if not line.isascii()][:2000]
    foreign = [line for line in lines if line.decode("utf-8", "ignore").encode() != line]
    if len(foreign) < 3 or 2 * len(foreign) < len(lines):  # the same
        return ""
    if b"\0" in block:
        return _BINARY
    if name := _guess_encoding(b"\n".join(foreign)):
        return f"{name} text, not UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW"
    return (
        "text that is not UTF-8; convert it from its encoding, "
        "such as WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    )


def _guess_encoding(lines: bytes) -> str:
    """The first encoding in which the bytes make the letters expected of it, or ""."""
    for name, codec, letters, least in _ENCODINGS:
        text = lines.decode(codec, "replace")
        num_foreign = sum(char == "\ufffd" or (char.isalpha() and not char.isascii()) for char in text)
        if sum(map(len, re.findall(letters, text))) > least * num_foreign:
            return name
    return ""


def _byte_fault(line: str) -> str:
    found = _NOT_TEXT.search(line)
    if found is None:
        return ""
    position = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
    if found[0] == "\0":
        return f"byte {position} of the line is NUL; text is expected"
    return f"byte {position} of the line, 0x{ord(found[0]) & 0xFF:02x}, is not UTF-8"


def _quoted_record(
    path: str, start: int, line: str, fault: str, lines: Iterator[tuple[int, str, str]]
) -> Record:
    """The row that begins with this line; a field in quotes takes further `lines`."""
    number, position, cells = start, 0, []
    while position <= len(line):
        parts: list[str] = []
        is_quoted = line.startswith('"', position)
        if is_quoted:
            opened, position = number, position + 1
            while (end := _closing_quote(line, position)) < 0:
                parts += line[position:], "\n"
                following = next(lines, None)
                if following is None:
                    raise DataError(
                        f"{path}:{opened}: the quote opened here is never closed; "
                        "quoting: none takes quotes literally"
                    )
                number, line, found = following
                fault = fault or (f"line {number}: {found}" if found else "")
                position = 0
            parts.append(line[position:end])
            position = end + 1
        end = line.find("\t", position)
        rest = line[position:] if end < 0 else line[position:end]
        rest = rest.removesuffix("\r") if end < 0 else rest
        position = len(line) + 1 if end < 0 else end + 1
        if is_quoted and rest and not rest.isspace():
            fault = fault or "text after a closing quote; inside quotes, a quote is written twice"
        cells.append("".join(parts).replace('""', '"') + rest)
    return Record(start, cells, fault)


def _closing_quote(line: str, position: int) -> int:
    end = line.find('"', position)
    while end >= 0 and line.startswith('"', end + 1):
        end = line.find('"', end + 2)
    return end


INVISIBLE = (
    r"\u0000-\u0020\u007f-\u00a0\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u115f-\u1160\u1680"
    r"\u17b4-\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_VISIBLE = re.compile(f"[^{INVISIBLE}]")
_HIDDEN = re.compile(f"[{INVISIBLE}]+")


def without_invisible(text: str) -> str:
    """What can be seen of it."""
    return _HIDDEN.sub("", text)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in it."""
    return _VISIBLE.search(text) is None
