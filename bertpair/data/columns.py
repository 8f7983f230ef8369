"""Where the texts and the label stand in a row: columns by name or number → positions in one file.

A row is as wide as the first row says: `-1` is the first row's last column in every row, and a row with
further text beyond that width is a fault (a stray tab). A header must have the names that the training file's
header has in the columns used, where they are used.
"""

import logging
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from bertpair.data.formats import CSV, TSV, Format, format_of
from bertpair.data.records import first_row
from bertpair.errors import DataError, list_faults, listed, near_misses, show

logger = logging.getLogger(__name__)

Column = int | str
_C = TypeVar("_C", int, int | str)
_ROLES = ("text_a", "text_b", "label")
_READ_CSV, _READ_TSV = "read it with --file_format csv", "read it with --file_format tsv"
_INSTEAD = {CSV.delimiter: "write a comma there instead", TSV.delimiter: "write a tab there instead"}
_MARKS = (  # between the columns of other formats, what it is called, and how to get rid of it, by format
    (",", "a comma", {TSV.delimiter: _READ_CSV}),
    ("\t", "a tab", {CSV.delimiter: _READ_TSV}),
    (";", "a semicolon", {each: f"{word}: export it so" for each, word in _INSTEAD.items()}),
    ("[|]", "a vertical bar", {each: f"{word}: export it so" for each, word in _INSTEAD.items()}),
    (r"\\t", "a backslash and a t", _INSTEAD),
    (" {2,}", "spaces", _INSTEAD),
)


@dataclass(frozen=True)
class Columns:
    """Where the texts and the label are: by header name, or by number from 0 (negative from the end).

    `text_b` None: single texts. `label` None: no labels are read. A text in several columns is their cells
    with the `separator` between them. `quoting`: `none` takes quotes in TSV literally; with `csv`, quoted
    fields may hold tabs, newlines and doubled quotes. `header`: the training file's; with `checks_header`,
    columns known by number must have its names in every file. `usual`: role → the name that the column has in
    a usual header; where it stands in another column, that is a fault too. `group`: whose text says which
    group a row belongs to. `kept`: columns whose cells come along.
    """

    text_a: Column | tuple[Column, ...]
    text_b: Column | tuple[Column, ...] | None
    label: Column | None
    has_header: bool = True
    quoting: str = "none"
    header: tuple[str, ...] | None = None
    checks_header: bool = True
    usual: Mapping[str, str] = field(default_factory=dict, compare=False)
    file_format: str = "auto"
    separator: str = " "
    group: Column | None = None
    kept: tuple[Column, ...] = ()

    def by_role(self) -> list[tuple[str, Column]]:
        """The columns of the texts and the label, each with what it is for."""
        given = zip(_ROLES, (self.text_a, self.text_b, self.label), strict=True)
        return [(role, column) for role, columns in given for column in _several(columns)]

    def beside(self) -> list[tuple[str, Column]]:
        """Those that are read beside them, each with the setting that names it."""
        kept = [("keep_columns", column) for column in self.kept]
        return kept if self.group is None else [("group_column", self.group), *kept]

    @property
    def num_used(self) -> int:
        """How many columns texts and labels are in."""
        return len(self.by_role())

    def format_of(self, path: Path | str) -> Format:
        """How the rows of this file are written."""
        return format_of(path, self.file_format, self.quoting)


def _several(columns: _C | tuple[_C, ...] | None) -> tuple[_C, ...]:
    return columns if isinstance(columns, tuple) else () if columns is None else (columns,)


def said(columns: Column | tuple[Column, ...] | None) -> str:
    """A column as messages show it; several with a plus between them."""
    return " + ".join(map(repr, _several(columns)))


class Places(NamedTuple):
    """The columns of one file as positions; `width`: cells of its first row."""

    text_a: int | tuple[int, ...]
    text_b: int | tuple[int, ...] | None
    label: int | None
    needed: int
    width: int
    group: int | None = None
    kept: tuple[int, ...] = ()

    @property
    def texts(self) -> list[int]:
        """Those of the texts."""
        return [*_several(self.text_a), *_several(self.text_b)]

    @property
    def beside(self) -> list[int]:
        """Those that are read beside texts and label."""
        return [*_several(self.group), *self.kept]


def locate_columns(columns: Columns, first: list[str], where: str) -> Places:
    """Positions from the file's first row; DataError with everything that does not fit."""
    faults: list[str] = []
    roles: dict[int, str] = {}  # position → what it is for
    found: dict[str, list[int]] = {}
    for role, column in columns.by_role():
        position = _position(column, first, columns.has_header)
        if isinstance(position, str):
            faults.append(f"{where}{role}_column {column!r} {position}")
            continue
        if position in roles:
            hint = "; has this file no labels?" if role == "label" else ""
            faults.append(
                f"{where}{role}_column {column!r} is the same column as {roles[position]}_column{hint}"
            )
        roles.setdefault(position, role)
        found.setdefault(role, []).append(position)
    for setting, column in columns.beside():
        position = _position(column, first, columns.has_header)
        if isinstance(position, str):
            faults.append(f"{where}{setting} {column!r} {position}")
        else:
            found.setdefault(setting, []).append(position)
    if not faults and columns.has_header and columns.checks_header:
        faults = _header_faults(columns, first, where)
    if faults:
        raise DataError(list_faults(faults))
    return _places(found, columns, first)


def _places(found: Mapping[str, list[int]], columns: Columns, first: Sequence[str]) -> Places:
    text_a, text_b = (
        places[0] if len(places) == 1 else tuple(places) or None
        for places in (found.get(role, []) for role in _ROLES[:2])
    )
    label, group = (next(iter(found.get(name, [])), None) for name in ("label", "group_column"))
    kept = tuple(found.get("keep_columns", ()))
    assert text_a is not None
    # Without a header nothing else says whether there is such a column.
    read = [place for name, places in found.items() for place in places if name != "keep_columns"]
    needed = max([*read, *(() if columns.has_header else kept)]) + 1
    return Places(text_a, text_b, label, needed, max(needed, len(first)), group, kept)


def has_column(paths: Sequence[Path], columns: Columns, column: Column | None) -> bool:
    """Whether all these files have it."""
    if column is None:
        return False
    wanted = replace(columns, text_a=column, text_b=None, label=None, group=None, kept=())
    try:
        for path in paths:
            locate_columns(wanted, first_row(path, columns.format_of(path)), "")
    except DataError:
        return False
    return True


def other_format(row: Sequence[str], columns: Columns, form: Format) -> str:
    """What a row without a single delimiter seems to be instead of columns, and what to do; or ""."""
    if len(row) != 1 or columns.num_used < 2:
        return ""
    line = row[0].strip()
    if line.startswith(("{", "[")):
        return "like JSON; write one object a line, and read it with --file_format jsonl"
    if line.startswith("# "):
        return "like a comment; remove it"
    for mark, name, advice in _MARKS:
        if form.delimiter in advice and len(re.findall(mark, line)) >= columns.num_used - 1:
            return f"like columns with {name} between them; {advice[form.delimiter]}"
    return ""


def misfit_fault(
    width: int, count: int, first: Sequence[str], places: Places, columns: Columns, form: Format
) -> str:
    """What `count` rows of so many cells, `first` being one, have in common, and what to do."""
    found = f"expected {places.width} {form.mark}-separated columns, found {width} in each of {count:,} rows"
    if width == 1:
        other = other_format(first, columns, form)
        return f"{found}; " + (f"they look {other}" if other else f"write a {form.mark} between the columns")
    if width > places.width:
        return f"{found}; does the header lack a name, or do the rows have a {form.mark} too many?"
    return found if columns.label is None else f"{found}; has this file no labels?"


def _header_faults(columns: Columns, first: list[str], where: str) -> list[str]:
    """What a header says against reading its file by the numbers that fit the training file."""
    here, trained = [cell.strip().casefold() for cell in first], columns.header or ()
    there = " in the training file; here that" if trained else ""
    used: list[tuple[str, int, str]] = []  # each column known by number, and the name it should have
    for role, column in columns.by_role():
        if isinstance(column, int) and -len(trained) <= column < len(trained):
            used.append((role, column, trained[column].strip()))
        elif isinstance(column, int) and columns.header is None and role in columns.usual:
            used.append((role, column, columns.usual[role]))
    faults, num_right = [], 0
    for role, column, name in used:
        if -len(here) <= column < len(here) and here[column] == name.casefold():
            num_right += 1
        elif name.casefold() in here:
            faults.append(
                f"{where}{role}_column {column} is {show(first[column].strip())} here, and "
                f"{show(name)}{there} is column {here.index(name.casefold())}"
            )
    if columns.header is not None and used and not num_right and not faults:
        names = listed([name for _, _, name in used])
        faults.append(f"{where}expected a header with {names} as in the training file, found {listed(first)}")
    if faults:
        faults.append(
            f"if this row is no header, set --has_header false; to read these columns all the same, set "
            f"--has_header true; or name the columns, such as {_naming(columns, used)}"
        )
    return faults


def _naming(columns: Columns, used: Sequence[tuple[str, int, str]]) -> str:
    """The flags that name the columns which are known by number."""
    names: dict[tuple[str, Column], str] = {(role, column): name for role, column, name in used}
    flags: dict[str, list[str]] = {role: [] for role, _, _ in used}
    for role, column in columns.by_role():
        if role in flags:
            flags[role].append(shlex.quote(names.get((role, column), str(column))))
    return " ".join(f"--{role}_column {' '.join(words)}" for role, words in flags.items())


def _position(column: int | str, first: list[str], has_header: bool) -> int | str:
    """The column's position in this file, or what is wrong with it."""
    names = [cell.strip() for cell in first]
    if isinstance(column, str) and not has_header:
        return "is not in the header: there is none; give the number of the column"
    if isinstance(column, str):
        hits = [position for position, name in enumerate(names) if name == column.strip()]
        if len(hits) == 1:
            return hits[0]
        if hits:
            return f"stands {len(hits)} times in the header; give its number instead (one of {listed(hits)})"
        near = near_miss(column, names)
        return f"is not in the header; {near}found: {listed(names)}"
    position = column + len(first) if column < 0 else column
    # Without a header, a first row that is too short is a bad row like any other.
    if 0 <= position < len(first) or (column >= 0 and not has_header):
        return position
    return f"does not exist: the first row has {len(first)} columns, numbered from 0: {listed(names)}"


def near_miss(word: str, words: Sequence[str]) -> str:
    """`did you mean …? ` or nothing: the head of a message's second half."""
    near = near_misses(word, words)
    return f"did you mean {' or '.join(map(show, near))}? " if near else ""


_TEXT_NAME = (  # the last word of a text column's name, in the presets' files and in people's own
    "(answer|candidate|content|context|document|hypothesis|paragraph|passage|premise|query|question|reference"
    "|response|sentence|string|text|title|utterance|句子?|文本|问题|答案|回答)"
)
_NUMBERED_NAME = re.compile(rf"{_TEXT_NAME}[ab12]|[12] string")  # nobody writes this as a text
_PLAIN_NAME = re.compile(rf"(\w+[ _-]?)?{_TEXT_NAME}s?( [ab12])?|a|[qs][12]?")
_LONE_NAME = re.compile("sentence|text")  # of single texts
_OTHER_NAME = re.compile(
    r"(\w+[ _-]|pair|prompt)?(id|idx|index|label|labels|class|category|score|grade|quality|similarity"
    "|is_?duplicate|标签|类别|分数|得分|序号|编号)"
)
_NUMBER = re.compile(r"[-+]?[0-9]+([.,][0-9]+)?")


def check_header(where: str, cells: Sequence[str], form: Format) -> None:
    """DataError for a header that shows that its file is read in another way than it was written."""
    if form.has_names:
        return
    if any("\r" in cell.strip() for cell in cells):
        raise DataError(f"{where}a carriage return in the header; convert it: tr '\\r' '\\n' < OLD > NEW")
    if (
        not form.has_quotes
        and cells[0].startswith('"')
        and cells[-1].rstrip().endswith('"')
        and len(cells) > 1
    ):
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

    def __init__(self, line: int, cells: Sequence[str], places: Places, labels: Collection[str]) -> None:
        self.line = line
        self._labels = labels
        self._texts = places.texts
        filled = {place: name for place, cell in enumerate(cells) if (name := cell.strip(' "\t\r'))}
        beside = {place: name for place, name in filled.items() if place not in self._texts}
        are_names = len({*filled.values()}) == len(filled) and all(map(_may_be_name, filled.values()))
        self._unlike = {p: name for p, name in beside.items() if name not in labels} if are_names else {}
        self._named = [filled.get(place, "") for place in self._texts]
        has_value = any(name in labels or _NUMBER.fullmatch(name) for name in beside.values())
        self._is_sure = _are_names(self._named, () if has_value else beside.values())
        plain = _PLAIN_NAME if len(self._named) > 1 else _LONE_NAME
        self._is_likely = not has_value and all(plain.fullmatch(text.casefold()) for text in self._named)
        self._num_rows = 0

    def compare(self, cells: Sequence[str]) -> None:
        """Take a further row into account."""
        self._num_rows += 1
        if self._unlike:
            found = {place: cells[place].strip() for place in self._unlike if place < len(cells)}
            alike = [p for p, cell in found.items() if cell in self._labels or _NUMBER.fullmatch(cell)]
            self._unlike = {place: self._unlike[place] for place in alike}
        if self._is_likely:  # names stand above sentences; in a list of words they may be words
            texts = [cells[place].strip() if place < len(cells) else "" for place in self._texts]
            lengths = zip(texts, self._named, strict=True)
            self._is_likely = any(" " in text or len(text) > 2 * len(name) for text, name in lengths)

    def check(self, where: str, columns: Columns) -> bool:
        """Whether it is a row; if not, a DataError, or a warning where it was to be read as one."""
        sign = self._sign()
        if not sign:
            return True
        if advice := self._advice(columns):
            raise DataError(f"{where}looks like a header: it has {sign}; {advice}")
        logger.warning("%sread as a row, but it has %s; is it a header?", where, sign)
        return False

    def check_early(self, where: str, columns: Columns) -> None:
        """The DataError, if it is one whatever rows follow."""
        if self._is_sure and self._advice(columns):
            self.check(where, columns)

    def _sign(self) -> str:
        """What tells that it is a header, or ""."""
        if self._is_sure or (self._is_likely and self._num_rows > 1):
            what = "names of columns" if len(self._named) > 1 else "the name of a column"
            return f"{listed(self._named)} as {what}"
        if self._unlike and self._num_rows > 1:  # a single row may differ by itself
            place, name = next(iter(self._unlike.items()))
            return f"{show(name)} in column {place}, where all other rows have a number or a label"
        return ""

    def _advice(self, columns: Columns) -> str:
        if columns.has_header:
            return "a header is the first line of its file" if self._is_sure else ""
        asked = "set --has_header true, or --has_header false if it is a row"
        return asked if columns.checks_header else ""


def _are_names(texts: Sequence[str], beside: Collection[str]) -> bool:
    """Whether these are names and no texts: numbered ones, or plain ones beside a label or an id."""
    keys = [re.sub("[_#-]", "", text).casefold() for text in texts]
    has_other = any(_OTHER_NAME.fullmatch(other.casefold()) for other in beside)
    return all(map(_NUMBERED_NAME.fullmatch, keys)) or (has_other and all(map(_PLAIN_NAME.fullmatch, keys)))


def _may_be_name(cell: str) -> bool:
    return len(cell) <= 40 and len(cell.split()) <= 4 and any(map(str.isalpha, cell))
