"""What tells a header from a row: known names of columns, and what the rows below it have instead.

Only a first row can be taken for the other thing. A row must never be refused for being an ordinary one, so
names that may be words of a text count only with something beside them.
"""

import logging
import re
from collections.abc import Collection, Sequence

from bertpair.data.columns import Columns, Places, listed, shown
from bertpair.errors import DataError

logger = logging.getLogger(__name__)

_TEXT_NAME = (  # the last word of a text column's name, in the presets' files and in people's own
    "(answer|candidate|content|context|document|hypothesis|paragraph|passage|premise|query|question|reference"
    "|response|sentence|string|text|title|utterance|句子?|文本|问题|答案|回答)"
)
_NUMBERED_NAME = re.compile(rf"{_TEXT_NAME}[ab12]|[12] string")  # nobody writes this as a text
_PLAIN_NAME = re.compile(rf"(\w+[ _-]?)?{_TEXT_NAME}s?( [ab12])?|a|[qs][12]?")
_LONE_NAMES = ("sentence", "text")  # of single texts
_OTHER_NAME = re.compile(
    r"(\w+[ _-]|pair|prompt)?(id|idx|index|label|labels|class|category|score|grade|quality|similarity"
    "|is_?duplicate|标签|类别|分数|得分|序号|编号)"
)
_NUMBER = re.compile(r"[-+]?[0-9]+([.,][0-9]+)?")


def check_header(where: str, cells: Sequence[str], quoting: str) -> None:
    """DataError for a header that shows that its file is read in another way than it was written."""
    if any("\r" in cell.strip() for cell in cells):
        raise DataError(f"{where}a carriage return in the header; convert it: tr '\\r' '\\n' < OLD > NEW")
    if quoting == "none" and cells[0].startswith('"') and cells[-1].rstrip().endswith('"') and len(cells) > 1:
        if not is_quoted(cells[0]):
            raise DataError(f"{where}the whole line is in quotes; write the lines without them")
        raise DataError(f"{where}the names are in quotes; read the file with --quoting csv")


def is_quoted(cell: str) -> bool:
    """Whether a cell is written in double quotes."""
    text = cell.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


class FirstRow:
    """The first row of a file that is read without a header; further rows show whether it is one.

    Its texts are known names of columns, or all its cells look like names and one beside the texts is neither
    a number nor a label, where all further rows have one of these.
    """

    def __init__(self, cells: Sequence[str], places: Places, labels: Collection[str]) -> None:
        self._labels = labels
        self._texts = [place for place in (places.text_a, places.text_b) if place is not None]
        names = [cell.strip(' "\t\r') for cell in cells]
        filled = {place: name for place, name in enumerate(names) if name}
        beside = {place: name for place, name in filled.items() if place not in self._texts}
        are_names = len({*filled.values()}) == len(filled) and all(map(_may_be_name, filled.values()))
        self._unlike = {p: name for p, name in beside.items() if name not in labels} if are_names else {}
        self._named = [filled.get(place, "") for place in self._texts]
        has_value = any(name in labels or _NUMBER.fullmatch(name) for name in beside.values())
        self._is_sure = _is_header(self._named, () if has_value else beside.values())
        self._is_likely = not has_value and _may_be_header(self._named)
        self._num_rows = 0

    def compare(self, cells: Sequence[str]) -> None:
        """Take a further row into account."""
        self._num_rows += 1
        if self._unlike:
            self._unlike = {
                place: name for place, name in self._unlike.items() if self._differs(place, cells)
            }
        if self._is_likely:  # names stand above sentences; in a list of words they may be words
            texts = [cells[place].strip() if place < len(cells) else "" for place in self._texts]
            lengths = zip(texts, self._named, strict=True)
            self._is_likely = any(" " in text or len(text) > 2 * len(name) for text, name in lengths)

    def _differs(self, place: int, cells: Sequence[str]) -> bool:
        cell = cells[place].strip() if place < len(cells) else ""
        return cell in self._labels or _NUMBER.fullmatch(cell) is not None

    def check(self, where: str, columns: Columns) -> bool:
        """Whether it is a row; if not, a DataError, or a warning where it was to be read as one."""
        sign = self._sign()
        if not sign:
            return True
        if columns.has_header and self._is_sure:
            raise DataError(
                f"{where}looks like a header: it has {sign}; a header is the first line of its file"
            )
        if columns.checks_header and not columns.has_header:
            raise DataError(
                f"{where}looks like a header: it has {sign}; set --has_header true, or --has_header false if "
                "it is a row"
            )
        logger.warning("%sread as a row, but it has %s; is it a header?", where, sign)
        return False

    def _sign(self) -> str:
        """What shows that it is a header, or ""."""
        if self._is_sure or (self._is_likely and self._num_rows > 1):
            what = "names of columns" if len(self._named) > 1 else "the name of a column"
            return f"{listed(self._named)} as {what}"
        if self._unlike and self._num_rows > 1:  # a single row may differ by itself
            place, name = next(iter(self._unlike.items()))
            return f"{shown(name)} in column {place}, where all other rows have a number or a label"
        return ""


def _is_header(texts: Sequence[str], beside: Collection[str]) -> bool:
    """Whether these are names and no texts: numbered ones, or plain ones beside a label or an id."""
    keys = [re.sub("[_#-]", "", text).casefold() for text in texts]
    if all(map(_NUMBERED_NAME.fullmatch, keys)):
        return True
    has_other = any(_OTHER_NAME.fullmatch(other.casefold()) for other in beside)
    return has_other and all(map(_PLAIN_NAME.fullmatch, keys))


def _may_be_header(texts: Sequence[str]) -> bool:
    """The same where nothing stands beside them, if further rows bear it out."""
    keys = [text.casefold() for text in texts]
    return keys[0] in _LONE_NAMES if len(keys) == 1 else all(map(_PLAIN_NAME.fullmatch, keys))


def _may_be_name(cell: str) -> bool:
    return len(cell) <= 40 and len(cell.split()) <= 4 and any(map(str.isalpha, cell))
