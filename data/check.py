"""Reading a whole data set again: is every byte what the manifest says, and what is in it?

`check` compares hashes, counts, lengths and id ranges of every file, counts tokens, documents, bytes and unknown text
of each source and chunk, and looks for documents that occur twice. Of a file, some samples are in memory at a time.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.chunks import DataManifest, FileRecord, SampleFile, written
from data.engines import Engine, Task, run_all
from data.index import DocumentIndex
from data.streams import unknown_ids
from data.tokenizer import Tokenizer, load
from errors import RunError, UserError

STATISTICS = "statistics.json"
_SAMPLES_AT_ONCE = 256
_HASHES_AT_ONCE = 1 << 24  # compared in memory at a time
_HASHES_READ = 1 << 22  # looked through at a time
_NAMED = 5  # duplicates that are named; all are counted


@dataclass(frozen=True)
class Counts:
    """What some samples of one source hold."""

    samples: int
    tokens: int
    """Ids in the samples; neighbours that share one both count it."""
    targets: int
    """Targets that count in the loss."""
    documents: int
    """End-of-document tokens."""
    bytes: int
    """UTF-8 bytes that the tokens spell."""
    unknown: int
    """Tokens of text that the vocabulary has no piece for."""


@dataclass(frozen=True)
class _File(Task):
    """A file to check: a chunk, or a source's validation samples."""

    root: Path
    journals: Path  # of this call alone: the next one reads everything again
    record: FileRecord
    chunk: int | None
    source: int | None

    @property
    def journal(self) -> Path:
        """Says what was found."""
        return self.journals / f"{self.chunk}-{self.source}.json"

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return self.record.bytes

    def run(self) -> dict[str, Any]:
        """Return what is wrong with the file, or what it holds by source number."""
        try:
            counts = {str(j): list(map(int, row)) for j, row in enumerate(_counted(self)) if row[0]}
        except RunError as error:
            return {"problem": str(error)}
        return {"counts": counts, "samples": self.record.samples, "bytes": self.record.bytes}


@dataclass(frozen=True)
class Duplicates:
    """Documents whose text occurs more than once in the data set."""

    documents: int
    """Beyond the first of each text."""
    texts: int
    """Different texts that occur more than once."""
    named: tuple[tuple[str, str], ...]
    """The first few, as (source/id, source/id)."""


def check(root: Path, engine: Engine, log: Callable[[str], object] = print) -> tuple[dict[str, Any], list[str]]:
    """Return (statistics, problems) of a data set, and write the statistics to DATA/statistics.json if there are none.

    Problems are sentences that name file and position. Raises UserError when there is no manifest to compare with,
    RunError when the folder cannot be written.
    """
    root = Path(root)
    manifest = DataManifest.load(root)
    tokenizer = _tokenizer(root, manifest)
    problems = [tokenizer] if isinstance(tokenizer, str) else []
    with _journals(root) as journals, engine:
        files = [_File(root, journals, f, c, None) for c, f in enumerate(manifest.chunk_files)]
        files += [_File(root, journals, s.validation_file, None, j) for j, s in enumerate(manifest.sources)]
        results = run_all(files, engine, log, "check")
    problems += [r["problem"] for r in results if "problem" in r]
    counted = [{int(j): Counts(*row) for j, row in r.get("counts", {}).items()} for r in results]
    whole = []
    for j, source in enumerate(manifest.sources):
        if found := _index_problems(root, manifest, j):
            problems += found
        elif source.documents:
            whole.append(source.name)
    statistics = _statistics(manifest, counted, duplicates(root, whole))
    if not problems:
        with written(root / STATISTICS) as part:
            part.write_text(json.dumps(statistics, indent=1) + "\n")
    return statistics, problems


@contextmanager
def _journals(root: Path) -> Iterator[Path]:
    """Yield a folder, below the data since every worker reaches that, which goes with this call of `check`."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".check-", dir=root.absolute())
    except OSError as error:
        raise RunError(f"{root}: cannot be written ({error.strerror}); allow it, or free space") from error
    with folder as name:
        yield Path(name)


@lru_cache(maxsize=1)
def _opened(root: Path, journals: Path) -> tuple[DataManifest, Tokenizer | None, np.ndarray, np.ndarray]:
    """Manifest, tokenizer, and for each id the bytes it spells and whether it is unknown text.

    Kept for one call of `check`, which `journals` tells from others: the data set may be another by the next.
    """
    manifest = DataManifest.load(root)
    size = manifest.vocab_size
    lengths, unknown = np.zeros(size, np.int64), np.zeros(size, bool)
    tokenizer = _tokenizer(root, manifest)
    if tokenizer is None or isinstance(tokenizer, str):
        return manifest, None, lengths, unknown
    anchor = tokenizer.encode("a")  # in front, since a text's first word loses its mark
    special = set(tokenizer.special.values())
    for i in range(tokenizer.vocab_size):
        if i in tokenizer.byte_of:
            lengths[i] = 1
        elif i not in special:
            lengths[i] = len(tokenizer.decode([*anchor, i]).encode()) - 1
    unknown[: tokenizer.vocab_size] = unknown_ids(tokenizer)
    return manifest, tokenizer, lengths, unknown


def _counted(file: _File) -> np.ndarray:
    """Return int64[sources, fields of Counts] of a file; RunError says what is wrong with it."""
    file.record.check_content(file.root)
    manifest, tokenizer, lengths, unknown = _opened(file.root, file.journals)
    samples = SampleFile(
        file.root, file.record, sequence_length=manifest.sequence_length, vocab_size=manifest.vocab_size
    )
    found = np.zeros((len(manifest.sources), 6), np.int64)
    source = _sources(manifest, file)
    for start in range(0, file.record.samples, _SAMPLES_AT_ONCE):
        stop = min(start + _SAMPLES_AT_ONCE, file.record.samples)
        read = [samples.read(p) for p in range(start, stop)]
        tokens = np.stack([s.tokens for s in read])
        eos = np.zeros(len(read)) if tokenizer is None else (tokens == tokenizer.eos_id).sum(1)
        columns = [
            np.ones(len(read)),
            np.full(len(read), tokens.shape[1]),
            [s.weights.sum() for s in read],
            eos,
            lengths[tokens].sum(1),
            unknown[tokens].sum(1),
        ]
        np.add.at(found, source[start:stop], np.stack(columns, axis=1).astype(np.int64))
    return found


def _sources(manifest: DataManifest, file: _File) -> np.ndarray:
    """The number of the source of each sample."""
    positions = np.arange(file.record.samples)
    if file.chunk is None:
        return np.full(len(positions), file.source)
    if manifest.layout == "chunks":
        return manifest.chunk_layout.window_of(file.chunk, positions)[0]
    n = next(n for n, p in enumerate(manifest.phase_samples) if file.chunk < p.first_chunk + p.chunks)
    phase = manifest.phase_samples[n]
    slots = (file.chunk - phase.first_chunk) * phase.samples_per_chunk + positions
    names = [s.name for s in manifest.sources]
    return np.array([names.index(p.reads) for p in manifest.phases[n].parts])[manifest.mixtures[n].at(slots)[0]]


def _tokenizer(root: Path, manifest: DataManifest) -> Tokenizer | str | None:
    """The tokenizer of a data set, None if it came without one, or what is wrong with it."""
    if manifest.tokenizer is None:
        return None
    path = root / manifest.tokenizer.file
    try:
        tokenizer = load(path)
        tokenizer.check_fits(manifest.vocab_size)
    except UserError as error:
        return str(error)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        return f"{path}: SHA-256 differs from the manifest; restore it or prepare again"
    return tokenizer


def _index_problems(root: Path, manifest: DataManifest, j: int) -> list[str]:
    """What is wrong with a source's document index."""
    source = manifest.sources[j]
    problems = []
    for record in source.index_files:
        try:
            record.check_content(root)
        except RunError as error:
            problems.append(str(error))
    if not problems and source.documents:
        index = DocumentIndex(root, source.name)
        if len(index) != source.documents or int(index.offsets[-1]) != source.tokens:
            problems.append(
                f"{root}: index of {source.name} has {len(index)} documents and {int(index.offsets[-1])} tokens, the "
                f"manifest {source.documents} and {source.tokens}; prepare it again"
            )
    return problems


def _statistics(manifest: DataManifest, counted: Sequence[dict[int, Counts]], found: Duplicates) -> dict[str, Any]:
    chunks, validation = counted[: len(manifest.chunk_files)], counted[len(manifest.chunk_files) :]
    names = [s.name for s in manifest.sources]
    return {
        "manifest_sha256": manifest.sha256,
        "sources": {
            s.name: {
                "documents": s.documents,
                "bytes": s.bytes,
                "tokens": s.tokens,
                "bytes_per_token": s.bytes / s.tokens if s.tokens else None,
                "unknown": s.unknown,
                "empty": s.empty,
                "bad": s.bad,
                "in_chunks": asdict(_sum(c[j] for c in chunks if j in c)),
                "in_validation": asdict(_sum(c[j] for c in validation if j in c)),
            }
            for j, s in enumerate(manifest.sources)
        },
        "chunks": [{names[j]: asdict(c) for j, c in by_source.items()} for by_source in chunks],
        "duplicates": asdict(found),
    }


def _sum(counts: Iterator[Counts]) -> Counts:
    columns = list(zip(*(tuple(asdict(c).values()) for c in counts)))
    return Counts(*(sum(c) for c in columns)) if columns else Counts(0, 0, 0, 0, 0, 0)


def duplicates(root: Path, names: Sequence[str]) -> Duplicates:
    """Return the documents whose text (by its 64-bit hash) an earlier one has, over the sources of these names.

    The hashes are compared in ranges of their values, so that memory does not grow with the number of documents.
    """
    indices = [DocumentIndex(root, name) for name in names]
    total = sum(len(i) for i in indices)
    ranges = 1 << max(0, (total // _HASHES_AT_ONCE).bit_length())
    documents = texts = 0
    named: list[tuple[str, str]] = []
    for r in range(ranges):
        low, high = r * (1 << 64) // ranges, (r + 1) * (1 << 64) // ranges - 1
        picked = [_between(i.hashes, low, high) for i in indices]
        hashes = np.concatenate([i.hashes[p] for i, p in zip(indices, picked)] or [np.empty(0, np.uint64)])
        source = np.repeat(np.arange(len(indices)), [len(p) for p in picked])
        number = np.concatenate([*picked, np.empty(0, np.int64)]).astype(np.int64)
        order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of sources and documents
        same = hashes[order][1:] == hashes[order][:-1]
        documents += int(same.sum())
        texts += int((same & ~np.concatenate([[False], same[:-1]])).sum()) if len(same) else 0
        for at in np.flatnonzero(same)[: _NAMED - len(named)]:
            one, other = order[at], order[at + 1]
            named.append(tuple(f"{names[source[d]]}/{indices[source[d]].id(int(number[d]))}" for d in (one, other)))  # type: ignore[arg-type]
    return Duplicates(documents, texts, tuple(named))


def _between(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the places of the hashes from low to high, int64."""
    found = [np.empty(0, np.int64)]
    for start in range(0, len(hashes), _HASHES_READ):
        block = hashes[start : start + _HASHES_READ]
        found.append(start + np.flatnonzero((block >= np.uint64(low)) & (block <= np.uint64(high))))
    return np.concatenate(found)
