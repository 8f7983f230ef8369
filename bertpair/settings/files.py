"""A YAML or JSON file of settings, read strictly: plain values only, every fault with its line.

The YAML is composed with PyYAML's safe loader and turned into values here, so that lines are known, a name
that stands twice is seen, and nothing reads as what it does not look like (010 as 8, 1:30 as 90). Aliases are
refused: flat settings need none, and nested ones are how small files become huge.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bertpair.errors import CheckpointError, ConfigError, plain, show
from bertpair.settings.values import NUMBER

MAX_BYTES = 256 * 1024
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_TAG = "tag:yaml.org,2002:"


@dataclass
class SettingsFile:
    """The values by name, the line of each (YAML only), and the faults found so far."""

    path: str
    values: dict[str, object] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def where(self, name: str) -> str:
        """`config.yaml:3`, as a fault begins."""
        return f"{self.path}:{self.lines[name]}" if name in self.lines else self.path


class _NoAliasLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


class _LineError(ValueError):
    """A value that cannot be read, and the line it stands on."""

    def __init__(self, node: yaml.Node, problem: str) -> None:
        super().__init__(problem)
        self.line = node.start_mark.line + 1


def read_settings(path: str | Path) -> SettingsFile:
    """The settings in a YAML file, or a JSON file if its name ends so; ConfigError if it is neither."""
    return parse_settings(_read_text(str(path)), str(path))


def parse_settings(text: str, path: str) -> SettingsFile:
    """The settings in the text of such a file."""
    try:
        return _read_json(path, text) if path.lower().endswith(".json") else _read_yaml(path, text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; settings are names and plain values") from None


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the settings file cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: found more than {MAX_BYTES // 1024} KiB; settings are a short file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: found bytes that are not UTF-8") from None


def _read_json(path: str, text: str) -> SettingsFile:
    read = SettingsFile(path)

    def mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = Counter(name for name, _ in pairs)
        read.faults += [f"{path}: {plain(name)} stands twice" for name, n in names.items() if n > 1]
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=mapping)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: expected {{"name": value, …}}, found something else')
    read.values = values
    return read


def _read_yaml(path: str, text: str) -> SettingsFile:
    root = _compose(path, text)
    read = SettingsFile(path)
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == f"{_TAG}null"):
        return read
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: expected lines of `name: value`, found no mapping")
    for key, node in root.value:
        try:
            name = _name(key, read.lines)
            read.lines[name] = key.start_mark.line + 1
            read.values[name] = _value(node)
        except _LineError as error:
            read.faults.append(f"{path}:{error.line}: {error}")
    return read


def _compose(path: str, text: str) -> yaml.Node | None:
    try:
        loader = _NoAliasLoader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise ConfigError(f"{where}: not YAML that can be read: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML that can be read: {' '.join(str(error).split())}") from None


def _name(key: yaml.Node, taken: Container[object]) -> str:
    name = _value(key)
    if not isinstance(name, str):
        raise _LineError(key, f"expected a name, found {show(name)}; names are text")
    if name in taken:
        raise _LineError(key, f"{plain(name)} stands twice")
    return name


def _value(node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return _mapping(node)
    raise _LineError(node, f"found the tag {plain(node.tag)}; only plain values are allowed")


def _mapping(node: yaml.MappingNode) -> dict[object, object]:
    values: dict[object, object] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _LineError(key, "expected a plain name, found a list or mapping as one")
        name = _scalar(key)
        if name in values:
            raise _LineError(key, f"{show(name)} stands twice")
        values[name] = _value(item)
    return values


def _scalar(node: yaml.ScalarNode) -> object:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind in ("str", "timestamp"):
        return text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in yaml.SafeLoader.bool_values:
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind == "float" and NUMBER.fullmatch(text):
        return float(text)
    raise _LineError(node, f"found {show(text)}; write a plain decimal number, or quote it if it is text")


MAX_JSON_BYTES = 16 << 20  # real ones hold kilobytes; somebody's surprise must not fill the memory


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises CheckpointError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_json(data, str(path))


def parse_json(data: bytes | bytearray, where: str) -> dict[str, Any]:
    """The object in `data`, UTF-8 with or without a byte order mark; `where` begins the error message."""
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where}: more than {MAX_JSON_BYTES >> 20} MiB of JSON")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise CheckpointError(f"{where}: not usable JSON (nested too deeply)") from error
    except ValueError as error:  # bytes that are not UTF-8, syntax, a key twice, a number of 5,000 digits
        raise CheckpointError(f"{where}: not usable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, as json's `object_pairs_hook`; ValueError where a key stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return made
