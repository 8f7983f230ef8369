"""The bytes of a TSV file → rows of cells, each with the line it starts on.

Parsed by hand: Python's csv module ends lines at a lone carriage return, str.splitlines at U+2028 and
friends, and neither says where a quote was opened. Here a line ends at \\n or \\r\\n, nothing else. Files
are read in blocks, so that a reader who has enough stops early.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from bertpair.errors import DataError

BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_MAGIC = (
    (b"\x1f\x8b", "a gzip file", "unpack it: gunzip FILE"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or export it as tab-separated text"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "export it as tab-separated text"),
    (b"PAR1", "a Parquet file", "write it as tab-separated text"),
    (b"BZh", "a bzip2 file", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ", "an xz file", "unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it: unzstd FILE"),
)
_ENCODINGS = (  # and the letters that show them
    ("SHIFT_JIS", "\u3040", "\u30ff"),
    ("GB18030", "\u4e00", "\u9fff"),
    ("BIG5", "\u4e00", "\u9fff"),
)
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
            yield _quoted_record(_Cursor(path, number, line, fault, lines))
        elif not line or line.isspace():
            yield Record(number, [], fault)
        else:
            yield Record(number, line.removesuffix("\r").split("\t"), fault)


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
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {_reason(error)}") from error
    rest = b"".join(pending)
    if rest:
        yield rest


def _other_kind(block: bytes) -> str:
    """What a file that begins so seems to be instead of UTF-8 text with lines, and what to do; or ""."""
    for magic, kind, advice in _MAGIC:
        if block.startswith(magic):
            return f"{kind}; {advice}"
    nulls = block[:4096].count(0)
    if block.startswith((b"\xff\xfe", b"\xfe\xff")) or nulls > len(block[:4096]) // 4:
        return "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    if block.count(b"\r") - block.count(b"\r\n") > block.count(b"\n"):
        return "lines that end in a carriage return alone; convert it: tr '\\r' '\\n' < OLD > NEW"
    lines = block.split(b"\n")[:2000]
    foreign = [line for line in lines if _is_foreign(line)]
    if len(foreign) < max(3, len(lines) // 10):  # a few are bad rows, each to be named
        return ""
    name = _guess_encoding(b"\n".join(foreign))
    return f"{name} text, not UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW"


def _is_foreign(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return not line.isascii()
    return False


def _guess_encoding(lines: bytes) -> str:
    """A name that iconv knows: the first encoding in which the bytes make the letters expected of it."""
    for name, first, last in _ENCODINGS:
        try:
            foreign = [char for char in lines.decode(name) if not char.isascii()]
        except UnicodeDecodeError:
            continue
        if sum(first <= char <= last for char in foreign) > len(foreign) // 4:
            return name
    return "WINDOWS-1252"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder; a TSV file is expected"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _byte_fault(line: str) -> str:
    found = _NOT_TEXT.search(line)
    if found is None:
        return ""
    position = len(line[: found.start()].encode("utf-8", "surrogateescape")) + 1
    if found[0] == "\0":
        return f"byte {position} of the line is NUL; text is expected"
    return f"byte {position} of the line, 0x{ord(found[0]) & 0xFF:02x}, is not UTF-8"


class _Cursor:
    """A place in the lines of a file, for fields that go over several of them."""

    def __init__(
        self, path: str, number: int, line: str, fault: str, lines: Iterator[tuple[int, str, str]]
    ) -> None:
        self.path = path
        self.number = number
        self.line = line
        self.fault = fault
        self.lines = lines
        self.position = 0

    def cell(self) -> str:
        """The next cell; afterwards the position is behind its tab, or beyond the line."""
        quoted = self._quoted() if self.line.startswith('"', self.position) else None
        end = self.line.find("\t", self.position)
        if end < 0:
            end = len(self.line)
        rest = self.line[self.position : end]
        if end == len(self.line):
            rest = rest.removesuffix("\r")
        self.position = end + 1
        if quoted is not None and rest and not rest.isspace():
            self.fault = self.fault or "text after a closing quote; inside quotes, a quote is written twice"
        return (quoted or "") + rest

    def _quoted(self) -> str:
        opened = self.number
        parts: list[str] = []
        self.position += 1
        while (end := self._closing_quote()) < 0:
            parts.append(self.line[self.position :] + "\n")
            following = next(self.lines, None)
            if following is None:
                raise DataError(
                    f"{self.path}:{opened}: the quote opened here is never closed; "
                    "quoting: none takes quotes literally"
                )
            self.number, self.line, fault = following
            self.fault = self.fault or (f"line {self.number}: {fault}" if fault else "")
            self.position = 0
        parts.append(self.line[self.position : end])
        self.position = end + 1
        return "".join(parts).replace('""', '"')

    def _closing_quote(self) -> int:
        end = self.line.find('"', self.position)
        while end >= 0 and self.line.startswith('"', end + 1):
            end = self.line.find('"', end + 2)
        return end


def _quoted_record(cursor: _Cursor) -> Record:
    start, cells = cursor.number, []
    while cursor.position <= len(cursor.line):
        cells.append(cursor.cell())
    return Record(start, cells, cursor.fault)
