"""LLM360's data as it is published, read without conversion, and our data written in Amber's published form.

Amber (fact sheet 3.2, 3.3): JSONL files, one chunk each, a window of S+1 ids a line, in blocks by source:

    FOLDER/[train/]train_000.jsonl …              {"token_ids": [S+1 ids], "source": "c4"}
    FOLDER/valid/NAME.jsonl                       validation windows: never published, read where they are
    FOLDER/[train/].llm360-index/train_000.npy    ours: where the lines of a file begin; made when it is missing

Crystal (fact sheet 3.4 - 3.7): HDF5 files with a dataset `data`, int32 (n, 3, S): ids, loss mask, labels:

    FOLDER/phase1/SlimPajama/ArXiv_train_packed_part0of2/data-00000.h5 …

What is read when is `packing.permutation` (Amber) and `mixture.Mixture` (Crystal). A defect is never passed over: it is
a RunError that names file and line, or file and row.
"""

import hashlib
import json
import os
import re
import secrets
import threading
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from data.chunks import written
from data.mixture import Mixture, Part
from data.packing import ORDER, permutation
from data.sample import PhaseSamples, Sample
from data.tokenizer import files_in
from errors import RunError, UserError

_TRAIN_FILE = re.compile(r"train_(\d+)\.jsonl")  # the Hub pads numbers to three digits, LLM360's scripts do not
_LABEL = re.compile(rb'"source"\s*:\s*"([^"\\]*)"\s*\}\s*$')
_TAIL_BYTES = 256  # of the end of a line, in which a label is looked for
_READ_BYTES = 1 << 20  # of a file at a time, and of a line: a foreign file without line ends must not fill the memory
_INDEX_FOLDER = ".llm360-index"
_INDEX_FORMAT = 1
_OPEN_CHUNKS = 4  # chunks are read in order: one at a time, two around an edge
_OPEN_HDF5 = 2  # per part of a mixture, whose rows are read in order
_SLOTS = 1 << 14  # of a mixture, found at a time: that is what finding one costs (`Interleave.at`)
_OPEN_BLOCKS = 8  # of so many slots kept: they are read in order
_HDF5_SUFFIXES = (".h5", ".hdf5")
_HDF5_SLOTS = 10007  # in the table of decoded blocks: a prime far above their number
_PART_FOLDER = r"(_train_packed(_part[01]of2)?)?"  # how SlimPajama's folders go on after the name of the part


def is_published(folder: str | Path) -> Literal["jsonl", "hdf5"] | None:
    """Return in which published form a folder holds data, None if in neither; looks at names only."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if _train_files(folder):
        return "jsonl"
    phases = [path for path in folder.iterdir() if re.fullmatch(r"phase\d+", path.name)]
    return "hdf5" if any(True for phase in phases for _ in _hdf5_files(phase)) else None


def write_published_chunk(path: Path, rows: Iterable[tuple[Sequence[int] | np.ndarray, str]]) -> None:
    """Write (S+1 ids, source label) of each window as a line of Amber's form; RunError when the disk is full."""
    with written(path) as part, open(part, "w", encoding="ascii", newline="\n") as file:
        for ids, label in rows:
            file.write(json.dumps({"token_ids": np.asarray(ids).tolist(), "source": label}) + "\n")


class JsonlRows:
    """The lines of one JSONL file, read in any order and by any number of threads.

    `tokens` is S+1. The first use reads the whole file once to find its lines. What it finds is kept in the folder
    `.llm360-index` beside the file and used again while the file's size and time of change are the same; where that
    folder cannot be written it is kept in memory. Raises RunError when the file cannot be read.
    """

    def __init__(self, path: str | Path, tokens: int, vocab_size: int):
        self.path = Path(path)
        self._tokens, self._vocab_size = tokens, vocab_size
        try:
            # A bare descriptor, for pread: threads then need not share a position in the file.
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._lines = _line_index(self.path)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be read ({error.strerror}); restore it") from error

    def __len__(self) -> int:
        return len(self._lines.offsets) - 1

    def labels(self) -> tuple[tuple[str, int, int], ...]:
        """Return the runs of lines with one source label, (label, start, stop) from 0; "" where a line shows none.

        Found at the ends of lines when the file was indexed: whether a line is sound shows only when it is read.
        """
        return self._lines.labels

    def row(self, i: int) -> tuple[np.ndarray, str]:
        """Return int32[S+1] and the source label of line i, from 0; RunError names a defect's file and line, from 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {i} is outside 0..{len(self) - 1}")
        start, stop = self._lines.offsets[i : i + 2].tolist()
        try:
            line = os.pread(self._file, stop - start, start)
            if len(line) < stop - start:
                raise ValueError("the file has become shorter since its lines were found")
            return _window(line, self._tokens, self._vocab_size)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path}:{i + 1}: {error}; repair the line or fetch the file again") from error


def _window(line: bytes, tokens: int, vocab_size: int) -> tuple[np.ndarray, str]:
    """Return the ids and the label of one line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; the file ends inside this line"
        raise ValueError(f"not JSON ({error}){cut}") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for field, kind in (("token_ids", list), ("source", str)):
        if field not in record:
            raise ValueError(f"no field {field!r}")
        if not isinstance(record[field], kind):
            raise ValueError(f"field {field!r} is not a {kind.__name__}")
    ids = record["token_ids"]
    if len(ids) != tokens:
        raise ValueError(f"{len(ids)} ids, not {tokens}" + (f" (the last is {ids[-1]!r})" if ids else ""))
    if set(map(type, ids)) != {int}:  # by type, because true and false are instances of int
        raise ValueError(f"{next(i for i in ids if type(i) is not int)!r} among the ids is not an integer")
    if min(ids) < 0 or max(ids) >= vocab_size:
        odd = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"id {odd} is outside the vocabulary of {vocab_size}")
    return np.array(ids, np.int32), record["source"]


class _LineIndex(NamedTuple):
    """Where each line of a file begins (uint64[lines + 1]; the last is the file's size), and the runs of labels."""

    offsets: np.ndarray
    labels: tuple[tuple[str, int, int], ...]


def _line_index(path: Path) -> _LineIndex:
    """Return the index of a file: the one that is kept if it fits, else a new one, which is kept if it can be.

    It is one .npy of uint64: format, size and ns of change of the file, words of labels; labels as JSON; offsets.
    """
    folder, stat = path.parent / _INDEX_FOLDER, path.stat()
    kept = folder / f"{path.stem}.npy"
    header = [_INDEX_FORMAT, stat.st_size, stat.st_mtime_ns]
    with suppress(OSError, ValueError, EOFError):  # missing or damaged: made again
        words = np.load(kept, mmap_mode="r")
        if words.dtype == np.dtype("<u8") and words.ndim == 1 and words[:3].tolist() == header:
            first = 4 + int(words[3])
            runs = json.loads(words[4:first].tobytes())
            if len(words) > first and words[-1] == stat.st_size:
                return _LineIndex(words[first:], tuple((label, start, stop) for label, start, stop in runs))
    index = _scan(path)
    text = json.dumps(index.labels).encode("ascii")
    labels = np.frombuffer(text.ljust(-(-len(text) // 8) * 8), "<u8")
    part = folder / f"{path.stem}.{secrets.token_hex(8)}.part"  # other processes may be making the same index
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                np.save(file, np.concatenate([np.array([*header, len(labels)], "<u8"), labels, index.offsets]))
            os.replace(part, kept)
        finally:
            part.unlink(missing_ok=True)
    return index


def _scan(path: Path) -> _LineIndex:
    """Read a file from end to end for its lines, and for the labels at their ends."""
    offsets, runs = array("Q", [0]), list[tuple[str, int]]()
    ending = b"\0"
    with open(path, "rb", buffering=_READ_BYTES) as file:
        for line, (end, tail) in enumerate(_lines(file)):
            if not tail.endswith(ending):  # nearly every line ends as the one before it does
                found = _LABEL.search(tail, max(0, len(tail) - _TAIL_BYTES))
                ending = found[0] if found else b"\0"
                label = found[1].decode("utf-8", "replace") if found else ""
                if not runs or runs[-1][0] != label:
                    runs.append((label, line))
            offsets.append(end)
    stops = [start for _, start in runs[1:]] + [len(offsets) - 1]
    labels = tuple((label, start, stop) for (label, start), stop in zip(runs, stops))
    return _LineIndex(np.array(offsets, "<u8"), labels)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield, for each line, where it ends and its last bytes: at least _TAIL_BYTES, or all of it."""
    end, before = 0, b""
    while piece := file.readline(_READ_BYTES):
        end += len(piece)
        tail = before + piece if before else piece
        before = b""
        if piece.endswith(b"\n"):
            yield end, tail
        else:
            before = tail[-_TAIL_BYTES:]
    if before:
        yield end, before


class PublishedAmber:
    """A folder of Amber's JSONL files as a data set of one phase: a `TokenData`.

    Chunk c is the c-th file by its number. The files hold blocks by source, so a chunk is read in the order of
    `packing.permutation`: position p is line permutation(lines, seed, c)[p], from 0.

    All files must have the same number of lines. Where `lines` is not given, the first need of it reads each file that
    has no index once, which takes the time that reading the whole data set takes (or see `count`); where it is given, a
    file is read when it is first needed and checked then. Raises UserError for files that are no such set.
    """

    def __init__(
        self, folder: str | Path, sequence_length: int, vocab_size: int, seed: int, *, lines: int | None = None
    ):
        self.folder, self.sequence_length, self.vocab_size, self.seed = Path(folder), sequence_length, vocab_size, seed
        self.files = _numbered(self.folder)
        self._valid = {path.stem: path for path in sorted((self.folder / "valid").glob("*.jsonl"))}
        self._sizes = _sizes([*self.files, *self._valid.values()])
        self._known_lines = lines
        self._lock = threading.Lock()  # two threads of a reader must not both look for the lines of the next chunk
        # Caches of this object, not of the class: files close with the last object that uses them.
        self._open = lru_cache(_OPEN_CHUNKS)(self._open_chunk)
        self._order = lru_cache(_OPEN_CHUNKS)(self._chunk_order)
        self._open_valid = lru_cache(_OPEN_CHUNKS)(lambda source: self.open(self._valid[source]))

    def __reduce__(self) -> tuple[Any, ...]:
        # Reading workers open files of their own, and do not count again.
        make = partial(PublishedAmber, lines=self._known_lines)
        return make, (self.folder, self.sequence_length, self.vocab_size, self.seed)

    @property
    def lines(self) -> int:
        """Lines of each file; UserError when they have not all the same number, or none."""
        if self._known_lines is None:
            self.count(len(self.open(path)) for path in self.files)
        assert self._known_lines is not None
        return self._known_lines

    def count(self, lines: Iterable[int]) -> None:
        """Take over the number of lines of each file, in order, found elsewhere; UserError as in `lines`."""
        known = self._known_lines
        for path, found in zip(self.files, lines, strict=True):
            known = found if known is None else known
            self._check_length(path, found, known)
        self._known_lines = known

    def _check_length(self, path: Path, found: int, expected: int) -> None:
        if not found:
            raise UserError(f"{path}: has no lines; fetch it again")
        if found != expected:
            like = f" as {self.files[0]}" if path != self.files[0] else ""
            raise UserError(
                f"{path} has {found:,} lines, not {expected:,}{like}; the chunks of a data set are equally long: "
                "fetch the file again, or leave it out"
            )

    @property
    def phases(self) -> tuple[PhaseSamples, ...]:
        """One phase, in which no batch goes across two chunks."""
        return (PhaseSamples(0, self.lines * len(self.files), self.lines, carry=False),)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the files under `valid/`, sorted."""
        return tuple(self._valid)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of names and sizes of the files, seed and sequence length: not of the content, which is not read."""
        names = [(path.name, size) for path, size in self._sizes.items()]
        return _digest("amber", self.sequence_length, self.seed, names)

    @property
    def directory(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer in the folder, None if there is none; the published data set has none."""
        return next(iter(files_in(self.folder)), None)

    def rows(self, chunk: int) -> JsonlRows:
        """Return the lines of a chunk's file, in file order; UserError when it is not as long as the others."""
        if not 0 <= chunk < len(self.files):
            raise UserError(f"{self.folder} has no chunk {chunk}, only 0..{len(self.files) - 1}")
        with self._lock:
            return self._open(chunk)

    def sample(self, chunk: int, position: int) -> Sample:
        """Return one sample, arrays of [S]; RunError names file and line of a defect."""
        return Sample.of_tokens(self.rows(chunk).row(self._line(chunk, position))[0])

    def validation_rows(self, source: str) -> JsonlRows:
        """Return the lines of `valid/SOURCE.jsonl`; UserError when there is no such file."""
        if source not in self._valid:
            raise UserError(f"{self.folder} has no validation source {source!r}; it has {_listed(self.sources)}")
        return self._open_valid(source)

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Return samples start .. stop-1 of `valid/SOURCE.jsonl`, arrays of [V, S]; errors as in `sample`."""
        rows = self.validation_rows(source)
        ids = [rows.row(i)[0] for i in range(len(rows))[start:stop:step]]
        return Sample.of_tokens(np.array(ids, np.int32).reshape(len(ids), self.sequence_length + 1))

    def check_files(self) -> None:
        """Raise RunError unless every file is there with the size it had; reads no content."""
        _check_sizes(self._sizes)

    def place(self, chunk: int, position: int) -> tuple[str, int]:
        """Return the file name and the line, from 1, that is read at a position."""
        return self.rows(chunk).path.name, self._line(chunk, position) + 1

    def _line(self, chunk: int, position: int) -> int:
        if not 0 <= position < self.lines:
            raise IndexError(f"position {position} is outside 0..{self.lines - 1}")
        return int(self._order(chunk)[position])

    def _chunk_order(self, chunk: int) -> np.ndarray:
        return permutation(self.lines, self.seed, chunk)

    def _open_chunk(self, chunk: int) -> JsonlRows:
        rows = self.open(self.files[chunk])
        self._check_length(rows.path, len(rows), self.lines)
        return rows

    def open(self, path: Path) -> JsonlRows:
        """Return the lines of one of the files, however many they are."""
        return JsonlRows(path, self.sequence_length + 1, self.vocab_size)


class Hdf5Rows:
    """The rows of HDF5 files, one after another in natural order of their paths (`x_9` before `x_10`).

    A few files are open at a time. Raises RunError for a file that cannot be read or has another shape than int32
    (n, 3, S), and UserError where h5py is not installed. `counts`: rows of the files in that order, where they are
    known; else each file is opened once, here.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        sequence_length: int,
        vocab_size: int,
        *,
        counts: Sequence[int] | None = None,
    ):
        self.paths = tuple(sorted(map(Path, paths), key=_natural))
        self._sequence_length, self._vocab_size = sequence_length, vocab_size
        self._data = lru_cache(_OPEN_HDF5)(self._open)
        self.counts = tuple(counts) if counts is not None else tuple(self._count(path) for path in self.paths)
        self._ends = list(accumulate(self.counts)) or [0]

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(Hdf5Rows, counts=self.counts)
        return make, (self.paths, self._sequence_length, self._vocab_size)

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, i: int) -> Sample:
        """Return row i of all: its ids, labels and loss mask, arrays of [S]; RunError names a defect's file and row."""
        path, row = self.place(i)
        try:
            values = self._data(path)[row]  # int32[3, S]; HDF5 itself keeps threads apart
            ids, mask, labels = values.astype(np.int32)
            for what, found in (("input", ids), ("label", labels)):
                odd = found[(found < 0) | (found >= self._vocab_size)]
                if len(odd):
                    raise ValueError(f"{what} id {odd[0]} is outside the vocabulary of {self._vocab_size}")
            odd = mask[(mask != 0) & (mask != 1)]
            if len(odd):
                raise ValueError(f"its loss mask holds {odd[0]}, which is neither 0 nor 1")
        except (OSError, ValueError, IndexError) as error:
            raise RunError(f"{path}: row {row}: {error}; fetch the file again") from error
        return Sample(ids, labels, mask.astype(np.float32))

    def place(self, i: int) -> tuple[Path, int]:
        """Return the file that holds row i of all, and its row there, from 0."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} is outside 0..{len(self) - 1}")
        file = bisect_right(self._ends, i)
        return self.paths[file], i - (self._ends[file] - self.counts[file])

    def _count(self, path: Path) -> int:
        with self._file(path) as file:
            return len(self._checked(file))

    def _open(self, path: Path) -> Any:
        """The dataset of a file; it keeps the file open, and lets it go with the last thread that reads it."""
        with self._file(path) as file:
            data = self._checked(file)
            shape, size = data.shape[1:], data.dtype.itemsize
            block = data.chunks or (0, *shape)  # without blocks nothing is to be kept
        # Stage 3's files lack row-wise blocks (fact sheet 3.6): a row touches many blocks, each of many rows. All must
        # stay decoded for the next row, or it decodes them again: measured, 78 times slower. HDF5 takes the size of its
        # cache from the first to open a file, hence the close above.
        blocks = prod(-(-n // c) for n, c in zip(shape, block[1:]))
        return self._checked(self._file(path, rdcc_nbytes=blocks * prod(block) * size, rdcc_nslots=_HDF5_SLOTS))

    def _file(self, path: Path, **options: int) -> Any:
        try:
            return _h5py().File(path, "r", **options)
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error}); fetch it again") from error

    def _checked(self, file: Any) -> Any:
        """The dataset of an open file; RunError when it is not what it should be."""
        try:
            data, expected = file["data"], f"int32 (n, 3, {self._sequence_length})"
            if (data.dtype.kind, data.dtype.itemsize) != ("i", 4) or data.shape[1:] != (3, self._sequence_length):
                raise ValueError(f"'data' is {data.dtype} {data.shape}, not {expected}")
            examples = file.attrs.get("n_examples", len(data))  # stage 3's files have no such attribute
            if int(examples) != len(data):
                raise ValueError(f"attribute n_examples says {examples}, but there are {len(data)} rows")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{file.filename}: not a file of Crystal's rows ({error}); fetch it again") from error
        return data


class _Known(NamedTuple):
    """What a `PublishedCrystal` finds in its folder: per phase the rows of each part, and the mixture; file sizes."""

    rows: tuple[tuple[Hdf5Rows, ...], ...]
    mixtures: tuple[Mixture, ...]
    sizes: dict[Path, int]


class PublishedCrystal:
    """A folder of Crystal's HDF5 files as a data set: a `TokenData`, each phase one chunk.

    Phase p (from 1) is mixed from the rows below `phase<p>`: a part's are those below the one folder that has the
    part's name, or that of its source, perhaps followed by `_train_packed` or `_train_packed_part0of2`; case does not
    matter. Half, epochs, FIM and shuffling of a `Part` are already in the published rows (fact sheet 3.4 - 3.7), so
    only its weight, start and stop count here. `phase_samples`: samples of each phase, None = one epoch of its mixture.
    Raises UserError where folders or parts do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        phases: Sequence[Sequence[Part]],
        phase_samples: Sequence[int | None],
        sequence_length: int,
        vocab_size: int,
        seed: int,
        *,
        known: _Known | None = None,
    ):
        """`known` is for copies in other processes: what need not be found again."""
        if not phases or len(phases) != len(phase_samples):
            raise UserError(
                f"{len(phases)} phases and {len(phase_samples)} numbers of samples; give one for each phase"
            )
        self.folder, self.sequence_length, self.vocab_size, self.seed = Path(folder), sequence_length, vocab_size, seed
        self._parts = tuple(
            tuple(replace(p, half="all", epochs=1, fim_rate=0.0, shuffle=False) for p in parts) for parts in phases
        )
        self._phase_samples = tuple(phase_samples)
        self._known = known or self._found()
        self._rows, self.mixtures, self._sizes = self._known
        self._slots = lru_cache(_OPEN_BLOCKS)(self._block)

    def __reduce__(self) -> tuple[Any, ...]:
        for mixture in self.mixtures:
            # Makes the table of every epoch that the phase begins: they travel too, and cost seconds at real size.
            mixture.at(np.arange(0, mixture.samples, mixture.epoch))
        make = partial(PublishedCrystal, known=self._known)
        values = (self._parts, self._phase_samples, self.sequence_length, self.vocab_size, self.seed)
        return make, (self.folder, *values)

    def _found(self) -> _Known:
        rows, mixtures = [], []
        for p, (parts, samples) in enumerate(zip(self._parts, self._phase_samples)):
            phase = self.folder / f"phase{p + 1}"
            files = list(_hdf5_files(phase))
            of_part = [
                Hdf5Rows(_part_files(phase, files, part), self.sequence_length, self.vocab_size) for part in parts
            ]
            windows = {part.name: len(r) for part, r in zip(parts, of_part)}
            own = [replace(part, source="") for part in parts]
            rows.append(tuple(of_part))
            mixtures.append(Mixture.of(own, windows, samples=samples, file_samples=1, seed=self.seed, phase=p))
        sizes = _sizes(path for of_part in rows for r in of_part for path in r.paths)
        return _Known(tuple(rows), tuple(mixtures), sizes)

    @property
    def phases(self) -> tuple[PhaseSamples, ...]:
        """The phases, each of one chunk."""
        return tuple(PhaseSamples(p, m.samples, m.samples, carry=True) for p, m in enumerate(self.mixtures))

    @property
    def sources(self) -> tuple[str, ...]:
        """None: no validation rows were published."""
        return ()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of names and sizes of the files, mixtures, seed and sequence length: not of the content."""
        names = [(path.relative_to(self.folder).as_posix(), size) for path, size in self._sizes.items()]
        mixtures = [(m.samples, [astuple(part) for part in m.parts]) for m in self.mixtures]
        return _digest("crystal", self.sequence_length, self.seed, mixtures, names)

    @property
    def directory(self) -> Path:
        """The folder."""
        return self.folder

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer in the folder, None if there is none."""
        return next(iter(files_in(self.folder)), None)

    def sample(self, chunk: int, position: int) -> Sample:
        """Return one sample, arrays of [S]; RunError names file and row of a defect."""
        part, row = self._slot(chunk, position)
        return self._rows[chunk][part].row(row)

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        """Raise UserError: there is nothing to validate on."""
        raise UserError(f"{self.folder} has no validation source {source!r}: published Crystal data has none")

    def check_files(self) -> None:
        """Raise RunError unless every file is there with the size it had; reads no content."""
        _check_sizes(self._sizes)

    def place(self, chunk: int, position: int) -> tuple[str, str, int]:
        """Return the part, the file (its path below the folder) and the row, from 0, that is read at a position."""
        part, row = self._slot(chunk, position)
        path, in_file = self._rows[chunk][part].place(row)
        return self._parts[chunk][part].name, path.relative_to(self.folder).as_posix(), in_file

    def part_files(self, phase: int, part: int) -> list[tuple[str, int]]:
        """Return the files of a part of a phase, (path below the folder, rows), in the order in which they are read."""
        rows = self._rows[phase][part]
        return [(path.relative_to(self.folder).as_posix(), n) for path, n in zip(rows.paths, rows.counts)]

    def _slot(self, chunk: int, position: int) -> tuple[int, int]:
        """The part and its row that a slot of a phase reads."""
        if not 0 <= chunk < len(self.mixtures):
            raise UserError(f"{self.folder} has no chunk {chunk}, only 0..{len(self.mixtures) - 1}: one for each phase")
        if not 0 <= position < self.mixtures[chunk].samples:
            raise IndexError(f"position {position} is outside 0..{self.mixtures[chunk].samples - 1}")
        block, i = divmod(position, _SLOTS)
        parts, rows = self._slots(chunk, block)
        return int(parts[i]), int(rows[i])

    def _block(self, chunk: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        mixture = self.mixtures[chunk]
        part, _, row = mixture.at(np.arange(block * _SLOTS, min((block + 1) * _SLOTS, mixture.samples)))
        return part, row


def _train_files(folder: Path) -> list[tuple[int, Path]]:
    """The number and path of each chunk file in a folder and its `train/`, by number."""
    paths = [path for place in (folder, folder / "train") if place.is_dir() for path in place.iterdir()]
    return sorted((int(match[1]), path) for path in paths if (match := _TRAIN_FILE.fullmatch(path.name)))


def _numbered(folder: Path) -> list[Path]:
    """The chunk files of a folder in the order of their numbers; UserError when one is missing or there twice."""
    found = _train_files(folder)
    if not found:
        raise UserError(f"{folder}: no train_<number>.jsonl in it or in its train/; give the folder that holds them")
    for (number, path), (after, other) in pairwise(found):
        if number == after:
            raise UserError(f"{path} and {other} are both chunk {number}; keep one")
        if after != number + 1:
            raise UserError(
                f"{folder}: chunk {number + 1} is missing between {path.name} and {other.name}; fetch it, or link the "
                "files that are to be read into a folder of their own, under consecutive numbers"
            )
    return [path for _, path in found]


def _hdf5_files(folder: Path) -> Iterator[Path]:
    """Every HDF5 file below a folder, in no particular order; links are followed: phases share data."""
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if name.endswith(_HDF5_SUFFIXES))


def _part_files(phase: Path, files: Sequence[Path], part: Part) -> list[Path]:
    """The files below the one folder of a part; UserError when there is no such folder, or more than one."""
    for name in dict.fromkeys((part.name, part.reads)):
        pattern = re.compile(re.escape(name) + _PART_FOLDER, re.IGNORECASE)
        found: dict[Path, list[Path]] = {}
        for path in files:
            folders = path.relative_to(phase).parts[:-1]
            for depth, folder in enumerate(folders):
                if pattern.fullmatch(folder):
                    found.setdefault(phase.joinpath(*folders[: depth + 1]), []).append(path)
                    break
        if len(found) > 1:
            raise UserError(f"part {part.name!r}: {_listed(map(str, found))} all bear its name; keep one of them")
        if found:
            return next(iter(found.values()))
    there = sorted({path.parent.relative_to(phase).as_posix() for path in files})
    raise UserError(
        f"{phase}: no folder for part {part.name!r}; it has HDF5 files in {_listed(there)}; rename the part's folder"
    )


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sorts numbers in names by value, other characters by code point, and equal ones by spelling."""
    pieces = re.split(r"([0-9]+)", str(path))
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], str(path)


def _sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """The sizes of files, by path."""
    try:
        return {path: path.stat().st_size for path in paths}
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be read ({error.strerror}); restore it") from error


def _check_sizes(sizes: dict[Path, int]) -> None:
    found = _sizes(sizes)
    for path, size in sizes.items():
        if found[path] != size:
            raise RunError(f"{path}: {found[path]} bytes, it had {size} when it was opened; restore it")


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(["published", ORDER, *values]).encode()).hexdigest()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _h5py() -> Any:
    """The module, imported when it is first needed: only Crystal's published data needs it."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("published Crystal data is HDF5: pip install 'llm360-jax[published]' for h5py") from error
    return h5py
