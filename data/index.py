"""Which document each token of a source's stream came from: enough to go from a window to its documents and back.

    DATA/index/NAME.offsets.npy   uint64[n+1]: document i is tokens [offsets[i], offsets[i+1]), with its `</s>`
    DATA/index/NAME.lines.npy     uint32[n]: its line or row in its file, from 1; 0 where the file is the document
    DATA/index/NAME.hashes.npy    uint64[n]: BLAKE2b-64 of its UTF-8 text, to find equal documents
    DATA/index/NAME.files.json    [[file, documents], …] in stream order

20 bytes a document and a few for each file. The arrays are memory-mapped and searched by bisection: a query reads some
pages of them, whatever their size. Documents of the stream are numbered from 0.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.chunks import written
from data.packing import window_start
from errors import RunError, UserError

KINDS = {"offsets": "<u8", "lines": "<u4", "hashes": "<u8"}


def index_paths(root: Path, name: str) -> tuple[Path, ...]:
    """Return the paths of a source's index: offsets, lines, hashes, files."""
    folder = Path(root) / "index"
    return (*(folder / f"{name}.{kind}.npy" for kind in KINDS), folder / f"{name}.files.json")


def rows_path(root: Path, name: str) -> Path:
    """Return where the files of a converted source are listed, [[file, rows], …]: its rows have no documents."""
    return Path(root) / "index" / f"{name}.rows.json"


def read_rows(root: Path, name: str) -> list[tuple[str, int]]:
    """Return what `rows_path` holds; RunError when it cannot be read."""
    path = rows_path(root, name)
    try:
        return [(str(file), int(rows)) for file, rows in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: not a readable list of files ({error}); prepare the data again") from error


def text_hash(text: bytes) -> int:
    """Return the BLAKE2b-64 of a document's UTF-8 bytes, read as a little-endian integer."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class PartIndex(NamedTuple):
    """The index of one shard of a stream, as it lies in the work folder: raw little-endian arrays and counts."""

    folder: Path
    name: str
    documents: int
    tokens: int
    files: tuple[tuple[str, int], ...]

    def array(self, kind: str) -> np.ndarray:
        """Return an array of KINDS, memory-mapped: "offsets" holds the ends of the shard's documents."""
        path = self.folder / f"{self.name}.{kind}"
        return np.memmap(path, KINDS[kind], "r") if self.documents else np.empty(0, KINDS[kind])


def write_index(root: Path, name: str, parts: Sequence[PartIndex]) -> tuple[Path, ...]:
    """Join the indices of all shards of a source's stream; memory for one shard at a time. Returns the four paths."""
    paths = index_paths(root, name)
    documents = sum(p.documents for p in parts)
    for path, (kind, dtype) in zip(paths, KINDS.items()):
        with written(path) as part:
            offsets, base = kind == "offsets", 0  # n+1 of them, the first is 0
            header = {"descr": dtype, "fortran_order": False, "shape": (documents + offsets,)}
            with open(part, "wb") as file:  # not memory-mapped: a disk that fills would kill the process
                np.lib.format.write_array_header_1_0(file, header)
                if offsets:
                    file.write(np.zeros(1, dtype).tobytes())
                for p in parts:
                    array = p.array(kind)
                    file.write((array + np.uint64(base) if offsets else array).tobytes())
                    base += p.tokens
    with written(paths[-1]) as part:
        part.write_text(json.dumps(joined(f for p in parts for f in p.files)) + "\n")
    return paths


def joined(files: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return (file, documents) with one entry for a file that several neighbours name."""
    found: list[tuple[str, int]] = []
    for name, documents in files:
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + documents)
        elif documents:
            found.append((name, documents))
    return found


@dataclass(frozen=True)
class Span:
    """Tokens start..stop-1 of a window are those of document `number` of the stream from its token `skip` on."""

    number: int
    start: int
    stop: int
    skip: int


class DocumentIndex:
    """The index of one source, opened for reading. Raises RunError when it cannot be read."""

    def __init__(self, root: str | Path, name: str):
        *arrays, files = index_paths(Path(root), name)
        try:
            self.offsets, self.lines, self.hashes = (np.load(path, mmap_mode="r") for path in arrays)
            listed = json.loads(files.read_bytes())
            self._files = [str(f) for f, _ in listed]
            counts = [int(n) for _, n in listed]
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{files}: not a readable document index ({error}); prepare the data again") from error
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
        self._place = {f: i for i, f in enumerate(self._files)}
        if not len(self) == len(self.lines) == len(self.hashes) == self._first[-1]:
            raise RunError(f"{files}: its counts do not fit the arrays beside it; prepare the data again")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def files(self) -> list[str]:
        """Names of the files that have documents, in stream order."""
        return self._files

    def where(self, number: int) -> tuple[str, int]:
        """Return (file, line) of a document; line 0 where the file is the document."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} is outside 0..{len(self) - 1}")
        return self._files[bisect_right(self._first, number) - 1], int(self.lines[number])

    def id(self, number: int) -> str:
        """Return the id of a document: `file`, or `file:line`."""
        file, line = self.where(number)
        return f"{file}:{line}" if line else file

    def find(self, document_id: str) -> int | None:
        """Return the number of the document with this id, or None."""
        name, colon, digits = document_id.rpartition(":")
        if document_id in self._place:
            file, line = self._place[document_id], 0
        elif colon and digits.isdecimal() and name in self._place:
            file, line = self._place[name], int(digits)
        else:
            return None
        first, stop = self._first[file], self._first[file + 1]
        number = first + int(np.searchsorted(self.lines[first:stop], line))
        return number if number < stop and self.lines[number] == line else None

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return the parts of documents that make up tokens [start, stop) of the stream, in order."""
        first = int(np.searchsorted(self.offsets, np.uint64(start), side="right")) - 1
        last = int(np.searchsorted(self.offsets, np.uint64(stop), side="left"))
        edges = self.offsets[first : last + 1].astype(np.int64).tolist()
        return [
            Span(first + i, max(begin, start) - start, min(end, stop) - start, max(start - begin, 0))
            for i, (begin, end) in enumerate(pairwise(edges))
        ]

    def windows(self, number: int, sequence_length: int, overlap: int) -> range:
        """Return the windows that hold tokens of a document; those beyond the stream's last were never made."""
        begin, end = self.offsets[number : number + 2].tolist()
        stride = sequence_length + 1 - overlap
        # Window w is tokens [w*stride, w*stride + S+1): from the first that ends after begin to the last that starts
        # before end.
        first = max(0, -(-(begin - sequence_length) // stride))
        assert window_start(first, sequence_length, overlap) + sequence_length + 1 > begin
        return range(first, -(-end // stride))


def check_line(file: str, line: int) -> int:
    """Return a line number that fits the index, or raise UserError."""
    if line >= 1 << 32:
        raise UserError(f"{file}: line {line} is beyond what the index can name (2**32); split the file")
    return line
