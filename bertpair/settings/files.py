"""Settings in YAML or JSON, and a model folder's JSON: plain values only, every fault with its line.

PyYAML composes the YAML into nodes that know their lines; they become values here, so that nothing reads as
what it does not look like (010 as 8, 1:30 as 90). Aliases are refused: flat settings need none, and nested
ones are how small files become huge.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bertpair.errors import CheckpointError, ConfigError, plain, show
from bertpair.settings.fields import NUMBER

MAX_BYTES = 256 * 1024
MAX_JSON_BYTES = 16 << 20  # real ones hold kilobytes; somebody's surprise must not fill the memory
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_TAG = "tag:yaml.org,2002:"


@dataclass
class Layer:
    """Settings of one origin. `where` begins a line about one (`config.yaml:3: seed`), and one about a name
    within it (for `space.seed`: `sweep.yaml:4: space`); names in `bad` have their fault already."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _NodeError(ValueError):
    """A value that cannot be read, and the line it stands on."""

    def __init__(self, node: yaml.Node | yaml.Event, problem: str) -> None:
        super().__init__(problem)
        self.line = node.start_mark.line + 1 if node.start_mark else 1


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "not YAML that can be read: aliases (*name) are not allowed"
            raise _NodeError(self.peek_event(), problem)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


def read_settings(path: str | Path) -> Layer:
    """The settings in a YAML file, or a JSON file if its name ends so; ConfigError if it is neither."""
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
    return parse_settings(data, str(path))


def parse_settings(data: bytes, path: str) -> Layer:
    """The settings in the bytes of such a file."""
    line: object = ""
    try:
        if path.lower().endswith(".json"):
            values = parse_json(data, path)
            return Layer(values, {name: f"{path}: {name}" for name in values})
        return _read_yaml(path, data.decode("utf-8-sig"))
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    except UnicodeDecodeError as error:
        line, said = data[: error.start].count(b"\n") + 1, "found bytes that are not UTF-8"
    except RecursionError:
        said = "nested too deeply; settings are names and plain values"
    except _NodeError as error:
        line, said = error.line, str(error)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        said = f"not YAML that can be read: {problem}"
    raise ConfigError(f"{path}:{line}: {said}".replace("::", ":"))


def _read_yaml(path: str, text: str) -> Layer:
    root = yaml.compose(text, Loader=_Loader)
    read = Layer()
    if root is None or root.tag == f"{_TAG}null":
        return read
    if not isinstance(root, yaml.MappingNode):
        raise _NodeError(root, "expected lines of `name: value`, found no mapping")
    for key, node in root.value:
        try:
            name = _value(key)
            if not isinstance(name, str):
                raise _NodeError(key, f"expected a name, found {show(name)}; names are text")
            if name in read.where:
                raise _NodeError(key, f"{plain(name)} is given twice")
            read.where[name] = f"{path}:{key.start_mark.line + 1}: {name}"
            read.values[name] = _value(node)
        except _NodeError as error:
            read.faults.append(f"{path}:{error.line}: {error}")
    read.bad = read.where.keys() - read.values.keys()
    for name, node in ((key.value, node) for key, node in root.value if isinstance(node, yaml.MappingNode)):
        for key, _ in node.value:
            read.where.setdefault(f"{name}.{key.value}", f"{path}:{key.start_mark.line + 1}: {name}")
    return read


def _value(node: yaml.Node) -> object:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        values: dict[object, object] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _NodeError(key, "expected a plain name, found a list or mapping as one")
            name = _value(key)
            if name in values:
                raise _NodeError(key, f"{show(name)} is given twice")
            values[name] = _value(item)
        return values
    if not isinstance(node, yaml.ScalarNode) or kind not in (
        "str",
        "timestamp",
        "null",
        "bool",
        "int",
        "float",
    ):
        raise _NodeError(node, f"found the tag {plain(node.tag)}; only plain values are allowed")
    text = node.value
    if kind in ("str", "timestamp"):
        return text
    if kind == "null":
        return None
    if kind == "bool" and (switch := yaml.SafeLoader.bool_values.get(text.lower())) is not None:
        return switch
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind == "float" and NUMBER.fullmatch(text):
        return float(text)
    raise _NodeError(node, f"found {show(text)}; write a plain decimal number, or quote it if it is text")


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
