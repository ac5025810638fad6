"""Ids of much text, exactly SentencePiece's own, from parts that are encoded once and remembered.

BPE starts with characters and joins the neighbours that make the best piece, the leftmost of equals first. Nothing is
joined across a place that no piece can span, and what is joined on one side of it does not depend on the other side. A
text can therefore be cut at every such place, and its ids are those of the parts, one after the other. `find_cuts`
finds the places in the vocabulary: LLaMA's are before every run of spaces, around every newline and digit, and between
letters, punctuation and other alphabets.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np

SPACE = "▁"  # what SentencePiece makes of a space, and therefore the same as a space in a text
_ALPHABETS = 8  # told apart; more would make the pattern slow
_SLICE = 1 << 18  # characters cut at a time: a text of any size needs little memory
_ENTRIES = 1 << 17  # parts remembered of late; as many older ones are forgotten all at once
_LONGEST = 40  # characters of a part worth remembering: a longer one hardly comes again


@final
@dataclass(frozen=True)
class Cuts:
    """Where text may be cut."""

    parts: re.Pattern[str]  # finds all parts of a text whose spaces are ` ` and never `▁`, with an empty one at its end
    places: re.Pattern[str]  # matches nothing, at some places where any text may be cut


def find_cuts(pieces: Iterable[str]) -> Cuts | None:
    """Return where no piece can span a text; None if a piece can go on over a space, as those of several words.

    Args:
        pieces: what joining makes of text, and so no byte, control or unknown piece; SentencePiece's unused pieces
            are made too, and taken apart afterwards.
    """
    alphabet: dict[str, set[str]] = {}  # of every character that stands beside another in a piece: those it can reach
    for piece in _made(pieces):
        for left, right in pairwise(piece):
            if right == SPACE != left:
                return None
            if left != SPACE:  # a space may stand before every alphabet, as the cut is before the first space
                one, other = alphabet.setdefault(left, {left}), alphabet.setdefault(right, {right})
                if one is not other:
                    one |= other
                    alphabet |= dict.fromkeys(other, one)
    alphabets = sorted({id(a): a for a in alphabet.values()}.values(), key=lambda a: (-len(a), min(a)))
    few = [*alphabets[: _ALPHABETS - 1], set().union(*alphabets[_ALPHABETS - 1 :])]  # a union only cuts less
    runs = [f"[{_listed(a)}]++" for a in few if a]
    # All other characters are parts by themselves. A few digits or newlines together are worth remembering too.
    if alone := {chr(c) for c in range(128)}.difference(alphabet, " "):
        runs.insert(2, f"[{_listed(alone)}]{{1,3}}+")
    return Cuts(
        parts=re.compile(f" *+(?:{'|'.join([*runs, '.?'])})", re.DOTALL),
        places=re.compile(f"(?<=[^ {SPACE}])(?=[ {SPACE}])|(?<=[^ {SPACE}{_listed(alphabet)}])"),
    )


@final
class FastPieces:
    """Encodes text with the cuts of its vocabulary.

    Args:
        cuts: what find_cuts returned.
        encode: returns the ids of a part, without a word-start of its own.
        dtype: an integer type for the ids.
    """

    def __init__(self, cuts: Cuts, encode: Callable[[str], Sequence[int]], dtype: np.dtype):
        self._cuts, self._dtype = cuts, dtype
        self._ids = _Remembered(encode, dtype)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text [tokens], of the dtype."""
        ids = bytearray()
        for text_slice in self._slices(text):
            ids += b"".join(map(self._ids.__getitem__, self._cuts.parts.findall(text_slice)))
        return np.frombuffer(ids, self._dtype)

    def _slices(self, text: str) -> Iterator[str]:
        """Yield the text, begun by a word-start as SentencePiece begins it, in slices with ` ` for every space."""
        start, word_start = 0, " "
        while start < len(text):
            place = self._cuts.places.search(text, start + _SLICE)
            stop = place.start() if place else len(text)
            yield word_start + text[start:stop].replace(SPACE, " ")
            start, word_start = stop, ""


class _Remembered(dict[str, bytes]):
    """The ids of parts of text as bytes: made when first asked for, forgotten when not asked for lately."""

    def __init__(self, encode: Callable[[str], Sequence[int]], dtype: np.dtype):
        super().__init__()
        self._encode, self._dtype = encode, dtype
        self._older: dict[str, bytes] = {}

    def __missing__(self, part: str) -> bytes:
        ids = self._older.get(part)
        if ids is None:
            ids = np.array(self._encode(part), self._dtype).tobytes()
        if len(part) <= _LONGEST:
            if len(self) >= _ENTRIES:
                self._older = dict(self)
                self.clear()
            self[part] = ids
        return ids


def _made(pieces: Iterable[str]) -> set[str]:
    """The pieces that can come about: single characters, and what joins two others."""
    made: set[str] = set()
    for piece in sorted(pieces, key=len):
        last = len(piece) - 1  # the last place to join at; one character is always there, in the vocabulary or not
        joined = any((k == 1 or piece[:k] in made) and (k == last or piece[k:] in made) for k in range(1, last + 1))
        if " " not in piece and (last == 0 or joined):  # no text keeps its spaces as they are
            made.add(piece)
    return made


def _listed(characters: Iterable[str]) -> str:
    """The characters for the inside of a pattern's brackets."""
    return "".join(map(re.escape, sorted(characters)))
