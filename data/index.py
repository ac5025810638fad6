"""Where each document of a source's token stream begins: enough to go from a window to its documents and back.

    DATA/index/NAME.offsets.npy         uint64[n+1]: document i is tokens [offsets[i], offsets[i+1]), with its `</s>`
    DATA/index/NAME.documents.zst       the ids as JSON strings, one a line, 1024 to a zstd frame
    DATA/index/NAME.documents.zst.npy   uint64[frames+1]: where each frame begins

The offsets are memory-mapped and searched by bisection; reading one id decompresses one frame.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

from data.chunks import written
from errors import RunError

_IDS_PER_FRAME = 1024


def index_paths(root: Path, name: str) -> tuple[Path, Path, Path]:
    """Return the paths of a source's offsets, ids and frame starts."""
    folder = root / "index"
    return folder / f"{name}.offsets.npy", folder / f"{name}.documents.zst", folder / f"{name}.documents.zst.npy"


class IndexWriter:
    """Collects (id, tokens) of a source's documents in stream order; memory does not grow with their number."""

    def __init__(self, folder: Path, name: str):
        """Collect into two scratch files of a folder."""
        self._offsets = open(folder / f"{name}.offsets", "w+b")  # noqa: SIM115 closed by close()
        self._ids = open(folder / f"{name}.ids", "w+b")  # noqa: SIM115
        self._offsets.write(np.uint64(0).tobytes())
        self._frames = [0]
        self._held: list[str] = []
        self.documents, self.tokens = 0, 0

    def add(self, ids: Iterable[str], lengths: np.ndarray) -> None:
        """Append documents by id and number of tokens."""
        ends = self.tokens + np.cumsum(lengths, dtype=np.uint64)
        self._offsets.write(ends.astype("<u8").tobytes())
        self._held += ids
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        while len(self._held) >= _IDS_PER_FRAME:
            self._write_frame()

    def _write_frame(self) -> None:
        lines = "".join(json.dumps(i) + "\n" for i in self._held[:_IDS_PER_FRAME])
        del self._held[:_IDS_PER_FRAME]
        self._ids.write(zstandard.compress(lines.encode("ascii")))
        self._frames.append(self._ids.tell())

    def save(self, root: Path, name: str) -> tuple[Path, Path, Path]:
        """Write the three files of the index below DATA and return their paths."""
        if self._held:
            self._write_frame()
        self._offsets.flush()
        self._ids.flush()
        offsets, ids, frames = index_paths(root, name)
        with written(offsets) as part:
            target = np.lib.format.open_memmap(part, "w+", np.dtype("<u8"), (self.documents + 1,))
            target[:] = np.memmap(self._offsets.name, "<u8", "r")
            target.flush()
        with written(ids) as part:
            shutil.copyfile(self._ids.name, part)
        with written(frames) as part, open(part, "wb") as file:
            np.save(file, np.array(self._frames, "<u8"))
        return offsets, ids, frames

    def close(self) -> None:
        """Close the scratch files."""
        self._offsets.close()
        self._ids.close()


@dataclass(frozen=True)
class Span:
    """Tokens start..stop-1 of a window are those of document `number` of the stream from its token `skip` on."""

    number: int
    start: int
    stop: int
    skip: int


class DocumentIndex:
    """The index of one source, opened for reading."""

    def __init__(self, root: str | Path, name: str):
        offsets, self._ids_path, frames = index_paths(Path(root), name)
        try:
            self.offsets = np.load(offsets, mmap_mode="r")
            self._frames = np.load(frames, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise RunError(f"{offsets}: not a readable document index ({error}); prepare the data again") from error

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def id(self, number: int) -> str:
        """Return the id of a document by its number in the stream."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} is outside 0..{len(self) - 1}")
        frame, line = divmod(number, _IDS_PER_FRAME)
        return self._frame(frame)[line]

    def find(self, document_id: str) -> int | None:
        """Return the number of the document with this id, or None; reads the ids from the start."""
        for frame in range(len(self._frames) - 1):
            ids = self._frame(frame)
            if document_id in ids:
                return frame * _IDS_PER_FRAME + ids.index(document_id)
        return None

    def spans(self, window: int, tokens: int) -> list[Span]:
        """Return the parts of documents that make up a window of `tokens` tokens, in order."""
        start, stop = window * tokens, (window + 1) * tokens
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        edges = self.offsets[first : last + 1].astype(np.int64).tolist()
        return [
            Span(first + i, max(begin, start) - start, min(end, stop) - start, max(start - begin, 0))
            for i, (begin, end) in enumerate(pairwise(edges))
        ]

    def windows(self, number: int, tokens: int) -> range:
        """Return the windows that hold tokens of a document; the last may be the dropped tail."""
        begin, end = self.offsets[number : number + 2].tolist()
        return range(begin // tokens, -(-end // tokens))

    def _frame(self, frame: int) -> list[str]:
        begin, end = self._frames[frame : frame + 2].tolist()
        try:
            with open(self._ids_path, "rb") as file:
                file.seek(begin)
                text = zstandard.decompress(file.read(end - begin)).decode("ascii")
            return [json.loads(line) for line in text.splitlines()]
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise RunError(f"{self._ids_path}: not readable ({error}); prepare the data again") from error
