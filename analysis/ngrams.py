"""N-grams of words in training data: what texts are made, and a search of all chunks for those that are looked for.

Texts and training rows are made words in the manner of GPT-3 (Brown et al. 2020, appendix C) and PaLM: lower case,
punctuation and symbols taken out, cut at white space. Rows are taken as the model read them: an n-gram that a window's
edge cuts was read by nobody and is not found, nor is one that fill-in-the-middle tore apart. Hashes (64 bits) only say
where to look; a hit is a hit when the words are the same. (Two n-grams of items with one hash, of which one could be
missed: 3e-8 among a million.)
"""

import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.chunks import written
from data.dataset import ChunkedData
from data.engines import Local, Task, run_all
from data.folder import share, shared
from data.tokenizer import Tokenizer
from errors import RunError

_PART, _ROW, _DROPPED, _SPACE = 0, 1, 2, 32  # characters that end a document, end a row, are no character, end a word
_AT_ONCE = 1 << 18  # characters, about: more do not fit into a processor's cache
_FACTOR = 0x9E3779B97F4A7C15  # odd: has an inverse modulo 2**64


# ---- words -----------------------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """The words of a text of many rows, W of them."""

    chars: np.ndarray
    """uint32 [C]: what is left of the text, normalised."""
    starts: np.ndarray
    """int64 [W]: where each begins in it."""
    ends: np.ndarray
    """int64 [W]: and ends."""
    rows: np.ndarray
    """int64 [W]: number of its row."""
    parts: np.ndarray
    """int64 [W]: number of its document, through all rows."""
    hashes: np.ndarray
    """uint64 [W]."""

    def hashes_of(self, length: int) -> np.ndarray:
        """uint64 [W - length + 1]: of as many neighbouring words, from each word on."""
        count = len(self.hashes) - length + 1
        if count < 1:
            return np.empty(0, np.uint64)
        powers, inverses = _powers(_room(len(self.hashes)))
        total = _running(self.hashes * powers[: len(self.hashes)])
        return (total[length:] - total[:-length]) * inverses[:count]


def words(text: str) -> Words:
    """Cut a text into words. NUL ends a document, U+0001 a row."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    chars = _table()[codes]
    chars = chars[chars != _DROPPED]
    inside = np.zeros(len(chars) + 2, np.int8)
    np.greater(chars, _SPACE, out=inside[1:-1].view(bool))
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    rows = np.searchsorted(np.flatnonzero(chars == _ROW), starts)
    parts = np.searchsorted(np.flatnonzero(chars <= _ROW), starts)
    powers, inverses = _powers(_room(len(chars)))
    total = _running(chars * powers[: len(chars)])
    hashes = (total[ends] - total[starts]) * inverses[starts]
    hashes ^= hashes >> np.uint64(32)  # so that words are no small numbers, of whose sums many would be equal
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(29)
    return Words(chars, starts, ends, rows, parts, hashes)


def normalised(text: str) -> str:
    """The words of a text with a space between two of them."""
    return _joined(words(_plain(text)).chars)


def _joined(chars: np.ndarray) -> str:
    return " ".join(chars.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").split())


def _plain(text: str) -> str:
    """A text without the characters that have a meaning here."""
    return text.replace("\0", " ").replace("\1", " ")


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """uint32 [0x110000]: what becomes of each character."""
    table = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    table[0xE0000:0xE1000] = _DROPPED  # tags and variation selectors
    for code in range(0x20000):  # above are ideographs and private characters, which stay what they are
        char = chr(code)
        if char.isspace():
            table[code] = _SPACE
        elif unicodedata.category(char)[0] in "PS" or unicodedata.category(char) in ("Cc", "Cf"):
            table[code] = _DROPPED
        elif len(lower := char.lower()) == 1:
            table[code] = ord(lower)
    table[[_PART, _ROW]] = _PART, _ROW
    return table


@lru_cache(maxsize=8)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [count] each: the powers of a number modulo 2**64, and their inverses."""
    found = []
    for base in (_FACTOR, pow(_FACTOR, -1, 1 << 64)):
        values = np.full(count, base, np.uint64)
        values[0] = 1
        found.append(np.cumprod(values, dtype=np.uint64))
    return found[0], found[1]


def _room(count: int) -> int:
    return 1 << max(count, 1 << 12).bit_length()


def _running(values: np.ndarray) -> np.ndarray:
    """uint64 [n + 1]: sums of the first 0, 1, … n, modulo 2**64."""
    total = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=total[1:])
    return total


# ---- what is looked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grams:
    """The n-grams of I items, G different ones, numbered by length and hash."""

    keys: Mapping[int, np.ndarray]
    """By number of words: their hashes, uint64, ascending."""
    first: Mapping[int, int]
    """By number of words: number of the first one."""
    at: np.ndarray
    """int64 [G]: number of the word that each begins with."""
    length: np.ndarray
    """int64 [G]: its number of words."""
    chars: np.ndarray
    """uint32: normalised texts of the items, one after the other."""
    starts: np.ndarray
    """int32: where each word begins in it."""
    ends: np.ndarray
    """int32: and ends."""
    gram: np.ndarray
    """int64 [P], ascending: of each n-gram and item that has it, the first …"""
    item: np.ndarray
    """int64 [P]: … and the other."""
    counts: np.ndarray
    """int64 [I]: how many different ones an item has; 0 if it is too short."""

    @classmethod
    def of(cls, texts: Sequence[str], n: int, shortest: int) -> "Grams":
        """Cut items into n-grams; those of fewer words, but `shortest`, are one as a whole."""
        chars, starts, ends = [], [], []  # of blocks of items
        keys: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # length, hashes, words, items
        characters = before = 0
        for first, block in _blocks(texts):
            w = words(block)
            per_item = np.bincount(w.rows, minlength=block.count(chr(_ROW)))
            size = np.where(per_item >= n, n, np.where(per_item >= shortest, per_item, 0))
            for length in np.unique(size[size > 0]).tolist():
                hashes = w.hashes_of(length)
                at = np.flatnonzero(size[w.rows[: len(hashes)]] == length)
                at = at[w.rows[at] == w.rows[at + length - 1]]
                keys.append((length, hashes[at], at + before, w.rows[at] + first))
            chars.append(w.chars)
            starts.append((w.starts + characters).astype(np.int32))
            ends.append((w.ends + characters).astype(np.int32))
            characters, before = characters + len(w.chars), before + len(w.starts)
        unique: dict[int, np.ndarray] = {}
        numbers: dict[int, int] = {}
        at_, length_, pairs, count = [], [], [], 0
        for length in sorted({key[0] for key in keys}):
            hashes, at, item = (np.concatenate([key[i] for key in keys if key[0] == length]) for i in (1, 2, 3))
            unique[length], which, inverse = np.unique(hashes, return_index=True, return_inverse=True)
            numbers[length] = count
            at_.append(at[which])
            length_.append(np.full(len(which), length))
            pairs.append((inverse + count) * len(texts) + item)
            count += len(which)
        pair = np.unique(np.concatenate(pairs)) if pairs else np.empty(0, np.int64)
        return cls(
            unique,
            numbers,
            np.concatenate(at_) if at_ else np.empty(0, np.int64),
            np.concatenate(length_) if length_ else np.empty(0, np.int64),
            np.concatenate(chars) if chars else np.empty(0, np.uint32),
            np.concatenate(starts) if starts else np.empty(0, np.int32),
            np.concatenate(ends) if ends else np.empty(0, np.int32),
            pair // max(len(texts), 1),
            pair % max(len(texts), 1),
            np.bincount(pair % max(len(texts), 1), minlength=len(texts)),
        )

    def text(self, gram: int) -> str:
        """An n-gram's words with a space between two of them."""
        at = int(self.at[gram])
        return _joined(self.chars[self.starts[at] : self.ends[at + int(self.length[gram]) - 1]])


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield items a few at a time, each as a row: (number of the first, text)."""
    block: list[str] = []
    first = size = 0
    for number, text in enumerate(texts):
        block.append(_plain(text) + chr(_ROW))
        size += len(text)
        if size >= _AT_ONCE or number + 1 == len(texts):
            yield first, "".join(block)
            first, size, block = number + 1, 0, []


class Finder:
    """Looks for n-grams in rows of tokens.

    Args:
        grams: what to look for.
        pieces: of `token_pieces`.
    """

    def __init__(self, grams: Grams, pieces: Sequence[bytes]):
        self.grams, self.pieces = grams, pieces
        self._coarse = {}  # by length: (shift, bool): one look tells of nearly every word that nothing begins there
        for length, keys in grams.keys.items():
            bits = min(max(8 * len(keys), 1 << 12).bit_length(), 28)
            table = np.zeros(1 << bits, bool)
            table[(keys >> np.uint64(64 - bits)).astype(np.int64)] = True
            self._coarse[length] = np.uint64(64 - bits), table

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, int]:
        """Look into rows of tokens, [rows, S+1].

        Returns:
            int64 [hits, 2], sorted: (row, number of the n-gram), each once; and the bytes of UTF-8 text that were read.
        """
        ends = np.full((len(tokens), 1), len(self.pieces) - 1, tokens.dtype)
        raw = b"".join(map(self.pieces.__getitem__, np.concatenate([tokens, ends], axis=1).ravel().tolist()))
        found: set[tuple[int, int]] = set()
        w = words(raw.decode("utf-8", "replace"))
        for length, keys in self.grams.keys.items():
            hashes, (shift, coarse) = w.hashes_of(length), self._coarse[length]
            at = np.flatnonzero(coarse[(hashes >> shift).astype(np.int64)])
            at = at[w.parts[at] == w.parts[at + length - 1]]
            place = np.minimum(np.searchsorted(keys, hashes[at]), len(keys) - 1)
            same = keys[place] == hashes[at]
            for word, gram in zip(at[same].tolist(), (place[same] + self.grams.first[length]).tolist()):
                row = int(w.rows[word])
                read_there = w.chars[w.starts[word] : w.ends[word + length - 1]]
                if (row, gram) not in found and _joined(read_there) == self.grams.text(gram):
                    found.add((row, gram))
        return np.array(sorted(found), np.int64).reshape(-1, 2), len(raw) - raw.count(b"\0") - len(tokens)


def token_pieces(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The UTF-8 bytes of each id; NUL for what is no text, and U+0001, the end of a row, as one id more."""
    spelled = tokenizer.byte_of
    # A decoder drops the space of a text's first piece: so each piece is decoded behind a byte.
    first = next(i for i, byte in spelled.items() if byte == ord("A"))
    special = set(tokenizer.special.values())
    pieces = []
    for i in range(min(tokenizer.vocab_size, vocab_size)):
        if i in special:
            pieces.append(b"\0")
            continue
        piece = bytes([spelled[i]]) if i in spelled else tokenizer.decode([first, i])[1:].encode()
        pieces.append(piece.replace(b"\0", b" ").replace(b"\1", b" "))
    return [*pieces, *[b"\0"] * (vocab_size - len(pieces)), b"\1"]


# ---- the scan --------------------------------------------------------------------------------------------------------


class Hits(NamedTuple):
    """Where n-grams were found, [H] each: a sample holds one at least once."""

    gram: np.ndarray
    chunk: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class _Chunk(Task):
    """Look through one chunk."""

    directory: Path
    looked_for: Path  # (Grams, pieces), for `data.folder.shared`
    chunk: int
    samples: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"chunk-{self.chunk:03}.parquet"

    @property
    def journal(self) -> Path:
        return self.file.with_suffix(".done")  # not .json, as results of studies are

    @property
    def weight(self) -> int:
        return self.samples

    def run(self) -> dict[str, Any]:
        began, text = time.monotonic(), 0
        finder, data = _finder(self.looked_for), ChunkedData(self.directory)
        found = []
        rows = max(1, _AT_ONCE // 4 // data.sequence_length)  # of about four characters a token
        for start in range(0, self.samples, rows):
            positions = range(start, min(start + rows, self.samples))
            hits, size = finder.find(np.stack([data.sample(self.chunk, p).tokens for p in positions]))
            found.append(hits + np.array([start, 0]))
            text += size
        position, gram = np.concatenate(found).T
        with written(self.file) as part:
            pq.write_table(pa.table({"gram": gram, "position": position}), part, compression="zstd")
        tokens = self.samples * (data.sequence_length + 1)
        seconds = time.monotonic() - began
        return {"samples": self.samples, "tokens": tokens, "bytes": text, "hits": len(gram), "seconds": seconds}


@lru_cache(maxsize=1)
def _finder(looked_for: Path) -> Finder:
    return Finder(*shared(looked_for))


def scan(
    data: ChunkedData,
    grams: Grams,
    pieces: Sequence[bytes],
    folder: Path,
    workers: int,
    note: Callable[[str], None],
) -> tuple[Hits, dict[str, Any]]:
    """Look through all chunks of a data set that were not looked through before.

    Args:
        data: the data set.
        grams: what to look for.
        pieces: of `token_pieces`.
        folder: keeps what was found, a file a chunk: of this data and these n-grams alone.
        workers: processes.
        note: called with lines of progress, which say MB of text a second.

    Returns:
        The hits, by chunk; and how much was looked through: chunks, samples, tokens, text_bytes, seconds (of all
        processes together).

    Raises:
        RunError: a damaged file, a full disk, a lost worker process.
    """
    sizes = [record.samples for record in data.manifest.chunk_files]
    with tempfile.TemporaryDirectory(prefix="contamination-") as work:
        looked_for = share((grams, list(pieces)), Path(work))
        tasks = [_Chunk(data.directory, looked_for, chunk, size, folder) for chunk, size in enumerate(sizes)]
        for task in tasks:
            if task.journal.exists() and not task.file.exists():
                task.journal.unlink()
        with Local(min(workers, len(tasks))) as engine:
            done = run_all(tasks, engine, note, "contamination")
    tables = []
    for task in tasks:
        try:
            tables.append(pq.read_table(task.file))
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{task.file}: cannot be read ({error}); remove it, and run the same again") from error
    chunk = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    gram, position = (np.concatenate([t[name].to_numpy() for t in tables]) for name in ("gram", "position"))
    total = {name: sum(d[name] for d in done) for name in ("samples", "tokens", "bytes", "seconds")}
    scanned = {"chunks": len(tasks), "samples": total["samples"], "tokens": total["tokens"]}
    return Hits(gram, chunk, position), {**scanned, "text_bytes": total["bytes"], "seconds": round(total["seconds"], 3)}
