"""A source's documents as one stream of tokens, made shard by shard.

Each shard of a source is tokenised on its own, by any process of any engine, and leaves in the work folder

    NAME-00012.tokens     its part of the stream
    NAME-00012.offsets    uint64: where each of its documents ends
    NAME-00012.lines      uint32
    NAME-00012.hashes     uint64
    NAME-00012.json       the journal: what there is of everything, committed last

Joined in order they are the stream, and nothing depends on who made them when.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

from data import compat
from data.chunks import written
from data.engines import Task
from data.index import KINDS, PartIndex, check_line, joined, text_hash
from data.sources import Document, OnBad, ReadReport, Shard, read_shard
from data.tokenizer import Tokenizer, load
from errors import RunError

_BATCH_CHARACTERS = 1 << 18  # of text that are tokenised at a time, about


@dataclass(frozen=True)
class Tokenise(Task):
    """Tokenise one shard: documents in order, each followed by the end-of-document token."""

    shard: Shard
    tokenizer: Path
    dtype: str
    folder: Path
    on_bad: OnBad
    max_bytes: int | None  # of text, after which reading ends
    original: bool  # tokenise as CrystalCoder's own tools did (fact sheet 3.5)

    @property
    def name(self) -> str:
        """Of the shard's files."""
        limit = "" if self.max_bytes is None else f"-{self.max_bytes}"
        return f"{self.shard.spec.name}-{self.shard.number:05}{limit}"

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.folder / f"{self.name}.json"

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return self.shard.bytes or 1

    def run(self) -> dict[str, Any]:
        """Write the shard's files and return the counts."""
        tokenizer, report = loaded(str(self.tokenizer)), ReadReport()
        spelled = unknown_ids(tokenizer)
        documents = tokens = unknown = left_out = 0
        files: list[tuple[str, int]] = []
        with ExitStack() as stack:
            parts = {kind: stack.enter_context(written(self.folder / f"{self.name}.{kind}")) for kind in _FILES}
            out = {kind: stack.enter_context(open(part, "wb")) for kind, part in parts.items()}
            for batch in _batches(read_shard(self.shard, self.on_bad, self.max_bytes, report)):
                encoded = _encode(batch, tokenizer, np.dtype(self.dtype), self.shard.spec.bos, self.original)
                kept = [(d, ids) for d, ids in zip(batch, encoded) if ids is not None]
                left_out += len(batch) - len(kept)
                for _, ids in kept:
                    out["tokens"].write(ids.tobytes())
                    unknown += int(np.count_nonzero(spelled[ids]))
                ends = tokens + np.cumsum([len(ids) for _, ids in kept], dtype=np.int64)
                out["offsets"].write(ends.astype(KINDS["offsets"]).tobytes())
                lines = [check_line(d.file, d.line) for d, _ in kept]
                out["lines"].write(np.array(lines, KINDS["lines"]).tobytes())
                hashes = [text_hash(d.text.encode()) for d, _ in kept]
                out["hashes"].write(np.array(hashes, KINDS["hashes"]).tobytes())
                files += [(file, len(list(group))) for file, group in groupby(d.file for d, _ in kept)]
                documents, tokens = documents + len(kept), int(ends[-1]) if kept else tokens
            for file in out.values():
                file.flush()
        return {
            "documents": documents,
            "tokens": tokens,
            "bytes": report.bytes,
            "unknown": unknown,
            "empty": report.empty,
            "short": left_out,
            "bad": report.bad,
            "bad_named": report.bad_named,
            "files": joined(files),  # a file has documents in many batches
        }


_FILES = ("tokens", *KINDS)


def loaded(path: str) -> Tokenizer:
    """Return the tokenizer of a file, loaded once in each process, and again if the file is another by now."""
    status = os.stat(path)
    return _loaded(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _loaded(path: str, *state: int) -> Tokenizer:
    return load(path)


def unknown_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return bool[vocabulary]: the ids of text that has no piece, which are bytes above 127 and `<unk>`."""
    unknown = np.zeros(max(tokenizer.vocab_size, 1), bool)
    unknown[[i for i, byte in tokenizer.byte_of.items() if byte > 127]] = True
    if tokenizer.unk_id >= 0:
        unknown[tokenizer.unk_id] = True
    return unknown


def _encode(
    batch: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype, bos: bool, original: bool
) -> list[np.ndarray | None]:
    texts = [d.text for d in batch]
    ids: Iterable[Any] = compat.encode(texts, tokenizer) if original else tokenizer.encode_to(texts, dtype)
    begin = np.array([tokenizer.bos_id] if bos else [], dtype)
    end = np.array([tokenizer.eos_id], dtype)
    return [None if i is None else np.concatenate([begin, np.asarray(i, dtype), end]) for i in ids]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class TokenStream:
    """The stream of one source: its shards' tokens, one after another.

    Nothing is held open: a source may have more shards than a process may open files, and windows are read in random
    order. Opening a file anew takes some microseconds a window.
    """

    def __init__(self, folder: Path, names: Sequence[str], counts: Sequence[int], dtype: np.dtype):
        self._paths = [folder / f"{name}.tokens" for name in names]
        self._starts = [0, *accumulate(counts)]
        self._dtype = dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        counts = [b - a for a, b in zip(self._starts, self._starts[1:])]
        return TokenStream._of, (self._paths, counts, self._dtype)

    @staticmethod
    def _of(paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype) -> "TokenStream":
        return TokenStream(paths[0].parent if paths else Path(), [p.stem for p in paths], counts, dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop), in the stream's dtype; RunError when a shard's file is missing or cut."""
        shard = bisect_right(self._starts, start) - 1
        found = []
        while start < stop:
            base, end = self._starts[shard], self._starts[shard + 1]
            if end > start:
                found.append(self._read(self._paths[shard], start - base, min(end, stop) - base))
                start = min(end, stop)
            shard += 1
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, self._dtype)])

    def _read(self, path: Path, start: int, stop: int) -> np.ndarray:
        size = self._dtype.itemsize
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start * size)
                content = file.read((stop - start) * size)
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error}); restore it, or begin again in another folder") from error
        if len(content) < (stop - start) * size:
            raise RunError(f"{path}: ends before token {stop}; restore it, or begin again in another folder")
        return np.frombuffer(content, self._dtype)


def part_index(task: Tokenise, result: Mapping[str, Any]) -> PartIndex:
    """Return the index that a finished shard left."""
    files = tuple((str(f), int(n)) for f, n in result["files"])
    return PartIndex(task.folder, task.name, result["documents"], result["tokens"], files)
