"""A source's documents as one stream of tokens, made shard by shard.

Each shard of a source is tokenised on its own, by any process of any engine, and leaves in the work folder

    NAME-00012.tokens     its part of the stream
    NAME-00012.offsets    uint64: where each of its documents ends
    NAME-00012.lines      uint32
    NAME-00012.hashes     uint64
    NAME-00012.json       the journal: what there is of everything, committed last

Joined in order they are the stream, and nothing depends on who made them when.
"""

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
from data.index import KINDS, PartIndex, check_line, text_hash
from data.sources import Document, OnBad, ReadReport, Shard, read_shard
from data.tokenizer import Tokenizer, load

_OPEN_SHARDS = 4096
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
        return sum(p.stop - p.start for p in self.shard.portions) or 1

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
            "files": files,
        }


_FILES = ("tokens", *KINDS)


@lru_cache(maxsize=1)
def loaded(path: str) -> Tokenizer:
    """Return the tokenizer of a file, loaded once in each process."""
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
    """The stream of one source: its shards' tokens, one after another, memory-mapped when first read."""

    def __init__(self, folder: Path, names: Sequence[str], counts: Sequence[int], dtype: np.dtype):
        self._paths = [folder / f"{name}.tokens" for name in names]
        self._starts = [0, *accumulate(counts)]
        self._dtype = dtype
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        counts = [b - a for a, b in zip(self._starts, self._starts[1:])]
        return TokenStream._of, (self._paths, counts, self._dtype)

    @staticmethod
    def _of(paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype) -> "TokenStream":
        return TokenStream(paths[0].parent if paths else Path(), [p.stem for p in paths], counts, dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop), in the stream's dtype."""
        shard = bisect_right(self._starts, start) - 1
        found = []
        while start < stop:
            base, end = self._starts[shard], self._starts[shard + 1]
            if end > start:
                found.append(self._shard(shard)[start - base : stop - base])
                start = min(end, stop)
            shard += 1
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, self._dtype)])

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) >= _OPEN_SHARDS:  # the system limits how many mappings a process has
                del self._maps[next(iter(self._maps))]
            self._maps[shard] = np.memmap(self._paths[shard], self._dtype, "r")
        return self._maps[shard]


def part_index(task: Tokenise, result: Mapping[str, Any]) -> PartIndex:
    """Return the index that a finished shard left."""
    files = tuple((str(f), int(n)) for f, n in result["files"])
    return PartIndex(task.folder, task.name, result["documents"], result["tokens"], files)
