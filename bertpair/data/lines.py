"""The bytes of a file → its lines, and what is said of bytes that are not UTF-8 text with lines.

A line ends at \\n or \\r\\n, nothing else. Files are read in blocks, so that a reader who has enough stops
early; one that gzip packed is unpacked meanwhile, whatever its name.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from bertpair.errors import DataError

STDIN = "-"  # in place of a path
_GZIP = 31  # zlib's wbits
BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_MAGIC: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it: iconv -f UTF-32LE -t UTF-8 OLD > NEW"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\x1f\x8b", "a gzip file within another", "unpack it once: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or export it as CSV"),
    (b"PK\x05\x06", "an empty zip archive", "text in rows is expected"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "export it as CSV"),
    (b"PAR1", "a Parquet file", "write it as CSV"),
    (b"BZh", "a bzip2 file", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ", "an xz file", "unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it: unzstd FILE"),
    (b"%PDF", "a PDF file", "text in rows is expected"),
    (b"version https://git-lfs", "a Git LFS pointer to the file", "fetch the file itself: git lfs pull"),
    (b"{\\rtf", "a document with its layout", "save it as plain text"),
    (b"<?xml", "an XML file", "export it as CSV"),
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
_BINARY = "binary data; text in rows is expected"
_NOT_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and what surrogateescape makes of bytes that are not UTF-8


def name_of(path: str) -> str:
    """What messages call it."""
    return "standard input" if path == STDIN else path


def has_stdin(paths: Sequence[Path | str]) -> bool:
    """Whether the standard input is among them."""
    return any(os.fspath(path) == STDIN for path in paths)


def read_lines(path: str) -> Iterator[tuple[int, str, str]]:
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
    name, is_first = name_of(path), True
    try:
        with _open(path) as file:
            for block in _unpacked(file):
                if is_first and (other := _other_kind(block)):
                    raise DataError(f"{name}: looks like {other}")
                block = block.removeprefix(_BOM) if is_first else block
                is_first = False
                lines, newline, tail = block.rpartition(b"\n")
                if newline:
                    yield b"".join((*pending, lines))
                    pending.clear()
                pending.append(tail)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder; a file is expected") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{name}: a gzip file that is damaged or cut off: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: cannot be read: {reason}") from error
    rest = b"".join(pending)
    if rest:
        yield rest


def _open(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STDIN:
        if not (buffer := getattr(sys.stdin, "buffer", None)):
            raise DataError(f"{name_of(path)}: is closed")
        return nullcontext(buffer)
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
        raise DataError(f"{path}: is a pipe or a device; it is read more than once, so save it as a file")
    return open(path, "rb")


def _unpacked(file: BinaryIO) -> Iterator[bytes]:
    """What is in the file, in pieces; zlib.error or EOFError where gzip's packing is damaged."""
    block = file.read(BLOCK_BYTES)
    unpack = zlib.decompressobj(_GZIP) if block.startswith(b"\x1f\x8b") else None
    while block:
        if unpack is None:
            yield block
        while unpack is not None and block:
            if piece := unpack.decompress(block, BLOCK_BYTES):
                yield piece
            block = unpack.unconsumed_tail
            if unpack.eof and (
                block := unpack.unused_data.lstrip(b"\0")
            ):  # padding, or one more of its parts
                unpack = zlib.decompressobj(_GZIP)
        block = file.read(BLOCK_BYTES)
    if unpack is not None and not unpack.eof:
        raise EOFError("its end is missing")


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
