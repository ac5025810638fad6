"""Contamination: benchmark items whose words stand in the data that a run was trained on, and which steps read them.

Items and training rows are made words in the manner of GPT-3 (Brown et al. 2020, appendix C) and PaLM: lower case,
punctuation and symbols taken out, cut at white space. An item is found where n of its words in a row (13, as in GPT-3;
of an item that is shorter, all its words) stand in one row of the training data, within one document. Rows are taken
as the model read them: an n-gram that a window's edge cuts was read by nobody and is not found, nor is one that
fill-in-the-middle tore apart. Hashes (64 bits) only say where to look; a hit is a hit when the words are the same.
(Two n-grams of items with one hash, of which one could be missed: 3e-8 among a million.)

The data is read once, chunk by chunk; what was found is kept in ``RUN/results/contamination/scan-…``, so that a scan
that was killed goes on, and later checkpoints cost nothing.
"""

import hashlib
import math
import re
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

from analysis import results
from analysis.results import Result, Scored, estimate
from analysis.subject import Subject, Target
from checkpoint.manifest import Entry
from data.chunks import written
from data.engines import Local, Task, run_all
from data.folder import share, shared
from data.loader import ChunkedData
from data.sources import SourceSpec, read
from data.tokenizer import Tokenizer
from errors import RunError, UserError

KIND = "contamination"
VERSION = 2  # of what a result holds
_SCAN = 1  # of what is kept of a scan
_PART, _ROW, _DROPPED, _SPACE = 0, 1, 2, 32  # characters that end a document, end a row, are no character, end a word
_AT_ONCE = 1 << 18  # characters, about: more do not fit into a processor's cache
_FACTOR = 0x9E3779B97F4A7C15  # odd: has an inverse modulo 2**64
_NEVER = np.iinfo(np.int64).max
_TENTHS = 10
_NO_TABLE = "its results have no table of items"


@dataclass(frozen=True)
class Contamination:
    """Which benchmark items stand in the training data, from which step on, and what scores are without them."""

    tasks: tuple[str, ...] = ()
    """Evaluation tasks whose items are looked for; by default all that have their files in the folder."""
    benchmarks: Path | None = None
    """Folder with the files of the tasks: that of `evaluate`."""
    items: tuple[str, ...] = ()
    """NAME=PATH: items of a file or folder, each a line of JSONL, a row of Parquet or a text file; if the run has
    results of ``evaluate/NAME``, hashes of the text name its items."""
    text_field: str | None = None
    """Field with the text of --items; by default `text`, else `content`."""
    n: int = 13
    """Words in a row that make an overlap."""
    shortest: int = 8
    """Items with fewer words than n but so many are looked for as a whole; shorter ones are not tested."""
    share: float = 0.0
    """Share of its n-grams that makes an item contaminated; 0 = a single one does (GPT-3). PaLM: n = 8, share 0.7."""
    workers: int = 1
    """Processes that read the data."""

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.n <= 1000:
            raise UserError(f"--n {self.n}, --shortest {self.shortest}: needed is 1 <= shortest <= n <= 1000")
        if not 0 <= self.share <= 1:
            raise UserError(f"--share {self.share}: must be between 0 and 1")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 is needed")
        if self.benchmarks is None and not self.items:
            raise UserError("give what to look for: --benchmarks DIR (and --tasks NAME …), or --items NAME=PATH …")
        if self.tasks and self.benchmarks is None:
            raise UserError("--tasks: give the folder of their files with --benchmarks")

    def open(self, target: Target, note: Callable[[str], None]) -> list["Overlaps"]:
        """Scan the data, or what is left of it, and return the one study.

        Raises:
            UserError: no items; a run that was not trained here; data that is synthetic, published files that were not
                converted, or not the run's.
            RunError: a damaged data file, a full disk, a lost worker.
        """
        tracer = target.tracer
        found_in = tracer.tracer
        tokenizer = found_in.tokenizer or target.tokenizer
        items = self._read(note)
        grams = Grams.of([item.text for item in items], self.n, self.shortest)
        digest = results.sha256_of([_SCAN, found_in.data.sha256, tokenizer.sha256, self.n, self.shortest, items])
        folder = results.folder(target.run, KIND) / f"scan-{digest[:16]}"
        pieces = token_pieces(tokenizer, found_in.data.vocab_size)
        hits, scanned = scan(found_in.data, grams, pieces, folder, self.workers, note)
        study = Overlaps(self, target, items, tokenizer.sha256, Readings(target, grams, hits), scanned)
        study.drop_stale(target, note)
        return [study]

    def _read(self, note: Callable[[str], None]) -> list["Item"]:
        items: list[Item] = []
        tasks = self._tasks(note)
        for task in tasks:
            from analysis.suites import documents  # reads the harness's rows

            assert self.benchmarks is not None
            items += [Item(task, doc_hash, text) for doc_hash, text in documents(task, self.benchmarks)]
        for given in self.items:
            name, equals, location = given.partition("=")
            if not equals:
                raise UserError(f"--items {given}: write NAME=PATH")
            spec = SourceSpec(name, location, self.text_field)
            items += [Item(name, hashlib.sha256(d.text.encode()).hexdigest(), d.text) for d in read(spec)]
        names = [*tasks, *(given.partition("=")[0] for given in self.items)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{twice[0]}: named twice among --tasks and --items; name each once")
        return items

    def _tasks(self, note: Callable[[str], None]) -> tuple[str, ...]:
        if self.tasks or self.benchmarks is None:
            return self.tasks
        from analysis.suites import TASKS

        found = {name: task for name, task in TASKS.items() if task.files}
        missing = [name for name, task in found.items() if task.missing(self.benchmarks)]
        if len(missing) == len(found):
            raise UserError(f"{self.benchmarks}: has the files of no task; give the folder that `evaluate` reads")
        if missing:
            note(f"left out, since their files are missing: {', '.join(missing)}")
        return tuple(name for name in found if name not in missing)


class Item(NamedTuple):
    """What is looked for."""

    task: str
    doc_hash: str
    text: str


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


# ---- who read it -----------------------------------------------------------------------------------------------------


class Readings:
    """When a run read the n-grams that were found. Batches whose update was skipped were not read.

    Args:
        target: the run.
        grams: what was looked for.
        hits: what was found.
    """

    def __init__(self, target: Target, grams: Grams, hits: Hits):
        self.grams, self._tracer = grams, target.tracer
        samples, sample = np.unique(np.stack([hits.chunk, hits.position]), axis=1, return_inverse=True)
        self._samples = samples.T
        steps = [[step for step, _ in target.readers(int(c), int(p))] for c, p in self._samples]
        first = np.array([min(s, default=_NEVER) for s in steps], np.int64)
        read_first = np.full(len(grams.at), _NEVER)
        np.minimum.at(read_first, hits.gram, first[sample])
        # An item's n-grams by the step that first read each.
        order = np.lexsort((read_first[grams.gram], grams.item))
        item, step = grams.item[order], read_first[grams.gram][order]
        self.item, self.step = item[step < _NEVER], step[step < _NEVER]
        """int64 each, sorted: item, and the step that first read one of its n-grams, for each that was read."""
        which, pair = _expand(grams.gram, hits.gram)
        found = np.stack([grams.item[pair], first[sample[which]], sample[which], hits.gram[which]])
        found = found[:, np.lexsort(found[::-1])]
        self.found = np.unique(found[0])
        """Items of which something was found, whether a step read it or not."""
        self._example = found[:, np.searchsorted(found[0], self.found)].T
        counts = np.array([len(s) for s in steps], np.int64)
        held = np.unique(found[[0, 2]], axis=1)
        flat = np.array([n for s in steps for n in s], np.int64)
        ends = np.cumsum(counts)
        again = np.repeat(np.arange(held.shape[1]), counts[held[1]])
        within = np.arange(len(again)) - np.repeat(np.cumsum(counts[held[1]]) - counts[held[1]], counts[held[1]])
        at = (ends - counts)[held[1][again]] + within
        self.steps = np.unique(np.stack([held[0][again], flat[at]]), axis=1)
        """int64 [2, …]: (item, step that read some of it)."""

    def examples(self) -> dict[int, tuple[int, int, str | None]]:
        """Of each item found: (chunk, position, document) that was read first, as `trace` has them."""
        names: dict[int, tuple[int, int, str | None]] = {}
        example = self._example[np.argsort(self._samples[self._example[:, 2], 0], kind="stable")]
        for chunk in np.unique(self._samples[example[:, 2], 0]).tolist() if len(example) else ():
            here = example[self._samples[example[:, 2], 0] == chunk]
            positions = self._samples[here[:, 2], 1].tolist()
            origins = self._tracer.tracer.origins(chunk, positions)
            for (item, _, _, gram), position, origin in zip(here.tolist(), positions, origins):
                text = f" {self.grams.text(gram)} "
                pieces = self._tracer.tracer.pieces_of(origin)
                document = None
                for piece in pieces:
                    if text in f" {normalised(piece.text)} ":
                        name = f"{piece.file}:{piece.line}" if piece.document is None else piece.document
                        document = f"{piece.source}/{name}"
                        break
                names[item] = chunk, position, document
        return names


def _expand(ascending: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (number of a key, place in `ascending` of one that equals it), all there are."""
    start, stop = (np.searchsorted(ascending, keys, side=side) for side in ("left", "right"))
    which = np.repeat(np.arange(len(keys)), stop - start)
    within = np.arange(len(which)) - np.repeat(np.cumsum(stop - start) - (stop - start), stop - start)
    return which, start[which] + within


# ---- the study -------------------------------------------------------------------------------------------------------


class Overlaps:
    """What of the items each checkpoint had seen."""

    kind = KIND
    needs_weights = False

    def __init__(
        self,
        asked: Contamination,
        target: Target,
        items: list[Item],
        tokenizer_sha256: str,
        readings: Readings,
        scanned: dict[str, Any],
    ):
        self._asked, self._run, self._items, self._readings = asked, target.run, items, readings
        self._scanned = {name: value for name, value in scanned.items() if name != "seconds"}
        self._entries = sorted(target.series.entries(), key=lambda e: e.manifest.step)
        self._examples = readings.examples()
        grams, tracer = readings.grams, target.tracer
        self._ngrams = grams.counts
        self._needed = np.maximum(1, np.ceil(asked.share * self._ngrams - 1e-9).astype(np.int64))
        self._of_run = np.bincount(readings.item, minlength=len(items))
        self._contaminated = self._of_run >= self._needed
        at = np.searchsorted(readings.item, np.arange(len(items))) + self._needed - 1
        self._first = np.where(self._contaminated, np.append(readings.step, 0)[np.minimum(at, len(readings.step))], -1)
        self._task = np.array([item.task for item in items])
        self._tasks = list(dict.fromkeys(item.task for item in items))
        self._settings = {
            "version": VERSION,
            "n": asked.n,
            "shortest": asked.shortest,
            "share": asked.share,
            "data": (tracer.mixed or tracer.data).sha256,
            "tokenizer": tokenizer_sha256,
            "items": {task: results.sha256_of([i for i in items if i.task == task]) for task in self._tasks},
            "skipped": [[skip.step, skip.until] for skip in target.record.skips],
        }

    def settings(self) -> Mapping[str, Any]:
        """Data, items, n, and the steps that the guard skipped.

        With what settings a task was evaluated, a result says itself: see `drop_stale`.
        """
        return self._settings

    def drop_stale(self, target: Target, note: Callable[[str], None]) -> None:
        """Remove results that this study would keep but that are no longer true, so that a sweep makes them anew.

        Such are those of whose tasks one has been evaluated, or evaluated otherwise, since, and those that name
        another first checkpoint than a series that has grown has now.

        Raises:
            RunError: a result cannot be read.
        """
        for task in self._tasks:
            found = results.of_kind(self._run, f"evaluate/{task}")
            if found and not any(results.table_path(r.path, "items").exists() for r in found):
                note(f"{task}: {_NO_TABLE}, so that there are no scores with and without what was seen")
        kinds = [k for k in results.kinds(self._run) if re.fullmatch(f"{KIND}(-[A-Za-z0-9_.]+)?", k)]
        now = results.sha256_of(self._settings)
        own = [r for k in kinds for r in results.of_kind(self._run, k) if results.sha256_of(r.settings) == now]
        chosen = {e.manifest.name: e for e in target.series.resolve(target.selector)} if own else {}
        for result in own:
            entry = chosen.get(result.path.stem)
            if entry and (why := self._stale(result, entry)):
                note(f"{result.path}: {why}; made anew")
                for path in (result.path, results.table_path(result.path, "items")):
                    path.unlink(missing_ok=True)

    def _stale(self, result: Result, entry: Entry) -> str | None:
        """Why a result is no longer true, None if it is."""
        for task in self._tasks:
            evaluated = _evaluated(self._run, task, entry)
            if result.summary["tasks"][task]["evaluation"] != _settings_of(evaluated):
                return f"{task} has been evaluated since" if evaluated else f"{task} is not evaluated any more"
        try:
            table = result.table("items")
        except RunError as error:
            return str(error)
        after = [None if step is None else self._checkpoint_after(step) for step in table["first_step"].to_pylist()]
        return None if table["first_checkpoint"].to_pylist() == after else "the series has other checkpoints now"

    def score(self, subject: Subject) -> Scored:
        """Say what a checkpoint had seen.

        Summary, of each task: items; testable, too_short; contaminated, by a batch that the run reads at any step;
        unread, in the data but in no batch that the run reads; seen, by this checkpoint; seen_share, of the testable;
        shares, counts of the seen items by tenths of their n-grams seen (0-0.1, …, 0.9-1); scores, for each metric of
        the checkpoint's own ``evaluate/TASK`` "all", "without_seen" and "only_seen" items, value, stderr and n each;
        scores_missing, why there are none, or None; evaluation, the SHA-256 of the settings of that ``evaluate/TASK``
        (None: not evaluated). Items that are too short count as not seen.

        Table ``items``: items of which something is in the data: task, doc_hash, ngrams, found (seen by this
        checkpoint), found_in_run, share (of its n-grams seen), seen, first_step (that made it contaminated; null:
        none), first_checkpoint, steps (that read some of it before this checkpoint), and the sample that was read
        first: chunk, position, document.

        Raises:
            RunError: an evaluation's table cannot be read.
        """
        m, readings, count = subject.entry.manifest, self._readings, len(self._items)
        found = np.bincount(readings.item[readings.step < m.step], minlength=count)
        share = found / np.maximum(self._ngrams, 1)
        seen = found >= self._needed
        in_data = np.zeros(count, bool)
        in_data[readings.found] = True
        tasks = {}
        for task in self._tasks:
            of_task = self._task == task
            testable = int((self._ngrams[of_task] > 0).sum())
            evaluated = _evaluated(self._run, task, subject.entry)
            scores, missing = self._scores(evaluated, of_task, seen)
            tasks[task] = {
                "items": int(of_task.sum()),
                "testable": testable,
                "too_short": int(of_task.sum()) - testable,
                "contaminated": int((of_task & self._contaminated).sum()),
                "unread": int((of_task & in_data & (self._of_run == 0)).sum()),
                "seen": int((of_task & seen).sum()),
                "seen_share": int((of_task & seen).sum()) / testable if testable else None,
                "shares": np.histogram(share[of_task & seen], _TENTHS, (0, 1))[0].tolist(),
                "scores": scores,
                "scores_missing": missing,
                "evaluation": _settings_of(evaluated),
            }
        summary = {"n": self._asked.n, "step": m.step, "scanned": self._scanned, "tasks": tasks}
        return Scored(summary, {"items": self._table(m.step, found, share, seen)})

    def _table(self, step: int, found: np.ndarray, share: np.ndarray, seen: np.ndarray) -> pa.Table:
        read = self._readings.steps
        steps = np.bincount(read[0][read[1] < step], minlength=len(self._items))
        which = self._readings.found.tolist()
        first = [int(self._first[i]) for i in which]
        return pa.table(
            {
                "task": pa.array([self._items[i].task for i in which], pa.string()),
                "doc_hash": pa.array([self._items[i].doc_hash for i in which], pa.string()),
                "ngrams": self._ngrams[which],
                "found": found[which],
                "found_in_run": self._of_run[which],
                "share": share[which],
                "seen": seen[which],
                "first_step": pa.array([f if f >= 0 else None for f in first], pa.int64()),
                "first_checkpoint": pa.array([self._checkpoint_after(f) for f in first], pa.string()),
                "steps": steps[which],
                **{
                    name: pa.array([self._examples[i][n] for i in which], kind)
                    for n, (name, kind) in enumerate(
                        {"chunk": pa.int64(), "position": pa.int64(), "document": pa.string()}.items()
                    )
                },
            }
        )

    def _checkpoint_after(self, step: int) -> str | None:
        return next((e.manifest.name for e in self._entries if e.manifest.step > step), None) if step >= 0 else None

    def _scores(
        self, evaluated: Result | None, of_task: np.ndarray, seen: np.ndarray
    ) -> tuple[dict[str, Any], str | None]:
        """Scores, and if there are none, why."""
        if evaluated is None:
            return {}, "the checkpoint has no results of the task"
        if not results.table_path(evaluated.path, "items").exists():
            return {}, _NO_TABLE
        table = evaluated.table("items")
        known_items = {self._items[i].doc_hash for i in np.flatnonzero(of_task)}
        seen_items = {self._items[i].doc_hash for i in np.flatnonzero(of_task & seen)}
        hashes = table["doc_hash"].to_pylist()
        if others := sum(h not in known_items for h in hashes):
            return {}, f"{others} of the {len(hashes)} items that were evaluated are not those that were looked for"
        tainted = np.array([h in seen_items for h in hashes], bool)
        scores = {}
        for name, values in _metrics(evaluated, table):
            known = np.isfinite(values)
            groups = {"all": known, "without_seen": known & ~tainted, "only_seen": known & tainted}
            scores[name] = {group: estimate(values[chosen]) for group, chosen in groups.items()}
        return scores, None if scores else "the results of the task have no metric that is a mean over items"


def _metrics(result: Result, table: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the items' float64 values (NaN: none) of each metric that is a mean over items.

    Another one, as a perplexity, is not what its items' values would give. MMLU's is the mean over subjects: over the
    items it is called ``NAME_pooled``.
    """
    for name in table.column_names:
        if isinstance(figure := result.summary.get(name), dict) and "value" in figure:
            values = np.array([math.nan if v is None else float(v) for v in table[name].to_pylist()])
            figure = result.summary.get(f"{name}_pooled", figure)
            if np.isfinite(values).any() and math.isclose(np.nanmean(values), figure["value"], rel_tol=1e-6):
                yield name, values


def _evaluated(run: Path, task: str, entry: Entry) -> Result | None:
    """A checkpoint's own result of a task."""
    found = results.read(results.folder(run, f"evaluate/{task}") / f"{entry.manifest.name}.json")
    return found if found and found.checkpoint["digest"] == results.digest_of(entry) else None


def _settings_of(evaluated: Result | None) -> str | None:
    return None if evaluated is None else results.sha256_of(evaluated.settings)
