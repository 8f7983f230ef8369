"""Flags: the words of a command line sorted by name, and the lines of --help.

Written by hand rather than with argparse, so that every fault is found in one go and no name is guessed from
its beginning: a flag takes the words up to the next one, and its kind says how many it may have.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bertpair.settings.values import Kind, plain, show, suggest

_SHORT = re.compile("-.|[–—−]+[A-Za-z]")  # text processors make one long dash of two
_NEGATIVE = re.compile(r"-([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass
class Flags:
    """Values by name as YAML would give them, still to be converted; `bad` names have their fault already."""

    values: dict[str, object] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_flags(argv: Sequence[str], kinds: Mapping[str, Kind]) -> Flags:
    """`--name value`, `--name=value`, `--name`, `--name several words`; faults are collected, not raised."""
    flags = Flags()
    hungry = ""
    for flag, words in _split(argv, flags.faults, kinds):
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            _refuse_short(flags, flag, hungry, kinds)
        elif name in kinds:
            _add(flags, name, [value, *words] if equals else words, kinds[name])
        else:
            flags.faults.append(f"unknown setting {plain('--' + name)}{suggest(name, kinds)}")
        needs_value = name in kinds and kinds[name].arity != "maybe"
        hungry = name if needs_value and not words and not equals else ""
    return flags


def _refuse_short(flags: Flags, flag: str, hungry: str, kinds: Mapping[str, Kind]) -> None:
    """A word with one dash is no flag; after one that needs a value it is not that either."""
    near = suggest(flag.lstrip("-–—−"), kinds)
    if hungry:
        flags.faults[-1] = (
            f"--{hungry}: expected {kinds[hungry].expected}, found the flag {plain(flag)}{near}"
        )
    else:
        flags.faults.append(f"flags begin with two dashes, found {show(flag)}{near}")


def _split(argv: Sequence[str], faults: list[str], names: Mapping[str, Kind]) -> list[tuple[str, list[str]]]:
    """Each flag with the words after it. A word that begins with a dash and is no number is one too."""
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or (_SHORT.match(word) and not _NEGATIVE.fullmatch(word)):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            is_file = word.endswith((".yaml", ".yml", ".json"))
            hint = "; a settings file is named by --config" if is_file else ""
            example = "output_dir" if "output_dir" in names else "model_dir"
            faults.append(f"expected a flag such as --{example}, found {show(word)}{hint}")
    return found


def _add(flags: Flags, name: str, words: list[str], kind: Kind) -> None:
    if not words and kind.arity != "maybe":
        problem = f"expected {kind.expected}, found nothing"
    elif len(words) > 1 and kind.arity != "many":
        problem = f"expected {kind.expected}, found {len(words)} words, {show(' '.join(words))}"
    else:
        problem = ""
    if problem:
        flags.faults.append(f"--{name}: {problem}")
        flags.bad.add(name)
        return
    value = kind.read(words)
    if flags.values.get(name, value) != value:
        flags.notes.append(f"--{name} is given more than once: the last, {show(value)}, counts")
    flags.values[name] = value


def help_lines(name: str, kind: Kind, default: object, meaning: str) -> str:
    """The entry of one setting."""
    text = f"{meaning} ({kind.expected}; default {_word(default)})"
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = f"  --{name:<28} ", " " * 33
    return wrapper.fill(text)


def _word(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return value if isinstance(value, str) else show(value)
