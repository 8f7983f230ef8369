"""How the rows of a file are written: with tabs, with commas, or as JSON objects."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Format:
    """`delimiter` stands between the cells of a line and is called `mark`; without one, each line is a JSON
    object. `has_quotes`: a cell in double quotes may hold delimiters, line breaks and doubled quotes."""

    delimiter: str
    mark: str = ""
    has_quotes: bool = False

    @property
    def has_names(self) -> bool:
        """Whether every row names its cells, so that no header is needed."""
        return not self.delimiter


TSV, QUOTED_TSV, CSV = Format("\t", "tab"), Format("\t", "tab", True), Format(",", "comma", True)
JSONL = Format("")
_BY_NAME = {"csv": CSV, "jsonl": JSONL, "ndjson": JSONL}


def format_of(path: Path | str, file_format: str = "auto", quoting: str = "none") -> Format:
    """The format that is set, or for `auto` the one that the file's name tells. `quoting` is of TSV."""
    if file_format == "auto":
        name = os.fspath(path).lower().removesuffix(".gz")
        file_format = os.path.splitext(name)[1].removeprefix(".")
    return _BY_NAME.get(file_format) or (QUOTED_TSV if quoting == "csv" else TSV)
