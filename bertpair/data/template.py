"""The special tokens of a row, and how many tokens of each text a cut leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from bertpair.errors import CheckpointError

TRUNCATIONS = ("longest_first", "only_second")


@dataclass(frozen=True)
class Template:
    """A row is `pieces[0]`, the first text, `pieces[1]` and, of a pair, the second text, `pieces[2]`."""

    pieces: tuple[list[int], ...]  # special tokens
    first_specials: int  # how many of them are of type 0
    first_texts: int  # how many texts are of type 0; all tokens of type 0 stand before those of type 1

    @property
    def num_specials(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def has_types(self) -> bool:
        """Whether any token is of type 1."""
        return self.first_specials < self.num_specials or self.first_texts < len(self.pieces) - 1

    def row(self, texts: Sequence[list[int]], kept: Sequence[int]) -> list[int]:
        """Token ids of a row that keeps so many of each text's."""
        ids = [*self.pieces[0]]
        for text, count, piece in zip(texts, kept, self.pieces[1:], strict=True):
            ids += text[:count]
            ids += piece
        return ids

    def first_length(self, kept: Sequence[int]) -> int:
        """How many tokens of that row are of type 0."""
        return self.first_specials + sum(kept[: self.first_texts])


def read_templates(
    backend: tokenizers.Tokenizer, path: Path, input_names: Sequence[str] | None
) -> tuple[Template, Template]:
    """What the post-processor puts around a single text, and around a pair.

    A network whose `input_names` lack token types has all of type 0. Raises CheckpointError where texts or
    types stand in another order.
    """
    with_types = input_names is None or "token_type_ids" in input_names
    return _read(backend, path, 1, with_types), _read(backend, path, 2, with_types)


def _read(backend: tokenizers.Tokenizer, path: Path, num_texts: int, with_types: bool) -> Template:
    plain = partial(backend.encode, add_special_tokens=False)
    text = "a" if len(plain("a")) else next((word for word in backend.get_vocab() if len(plain(word))), "a")
    length = len(plain(text))
    row: Any = backend.encode(text, text if num_texts == 2 else None)
    places, types = row.sequence_ids, row.type_ids if with_types else [0] * len(row)
    in_order = [i for i in range(num_texts) for _ in range(length)]
    is_known = all(backend.id_to_token(i) is not None for i in row.ids)
    is_sound = [place for place in places if place is not None] == in_order and None in places and length
    if not is_known or not is_sound or types != sorted(types) or max(types) > 1:
        raise CheckpointError(
            f"{path}: its post_processor makes {' '.join(row.tokens)} (ids {row.ids}, types {types}); "
            "supported are special tokens of the vocabulary around the texts, the first text first, "
            "with the types 0 … 0 1 … 1"
        )
    starts = [places.index(i) for i in range(num_texts)]
    bounds = zip([0, *(start + length for start in starts)], [*starts, len(row)], strict=True)
    return Template(
        tuple(row.ids[start:stop] for start, stop in bounds),
        [*zip(places, types, strict=True)].count((None, 0)),
        sum(types[start] == 0 for start in starts),
    )


def keep(lengths: Sequence[int], room: int, truncation: str) -> tuple[int, ...]:
    """How many tokens of each text stay, where there is room for so many.

    `longest_first` leaves the shorter text whole up to half of the room (an odd token goes to the longer one,
    among equals to the second); `only_second` leaves the first whole if a token of the second then fits too.
    """
    if sum(lengths) <= room or len(lengths) == 1:
        return tuple(min(length, room) for length in lengths)
    first, second = lengths
    if truncation == "only_second" and first < room:
        return first, room - first
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
