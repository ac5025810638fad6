"""LLM360's published files into our format, and our chunks into their published form."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.chunks import (
    FORMAT,
    DataManifest,
    FileRecord,
    PhaseRecord,
    SourceRecord,
    TokenizerRecord,
    encode,
    token_dtype,
    write_records,
    written,
)
from data.engines import Engine, Task, run_all
from data.folder import WORK, finished, working
from data.index import rows_path
from data.loader import ChunkedData
from data.mixture import Part
from data.packing import ORDER, inverse, permutation
from data.published import PublishedAmber, PublishedCrystal, write_published_chunk
from data.sample import Sample
from data.tokenizer import load
from errors import UserError

Published = PublishedAmber | PublishedCrystal
Log = Callable[[str], object]

_ROWS_AT_ONCE = 256  # of validation samples


@dataclass(frozen=True)
class _Convert(Task):
    """Write samples start..stop-1 of a published chunk, or a source's validation samples, as one record file."""

    data: Published
    out: Path
    work: Path
    file: str
    chunk: int  # of the published data
    start: int
    stop: int
    validation: str | None = None

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.work / (self.file.replace("/", "-") + ".json")

    @property
    def weight(self) -> int:
        """Samples."""
        return self.stop - self.start

    def run(self) -> dict[str, Any]:
        """Write the file, every row of it checked by the reader, and return its record."""
        dtype, path = token_dtype(self.data.vocab_size), self.out / self.file
        write_records(path, (encode(s, dtype) for s in self._samples()))
        return dataclasses.asdict(FileRecord.of(self.out, path, self.stop - self.start))

    def _samples(self) -> Iterator[Sample]:
        for p in range(self.start, self.stop):
            if self.validation is None:
                yield self.data.sample(self.chunk, p)
            else:
                yield Sample(*(values[0] for values in self.data.validation(self.validation, p, p + 1)))


@dataclass(frozen=True)
class _Lines(Task):
    """Find the lines of one of Amber's files, and the blocks of sources in it: reads all of it once."""

    data: PublishedAmber
    work: Path
    chunk: int

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.work / f"lines-{self.chunk:03}.json"

    def run(self) -> dict[str, Any]:
        """Return the blocks; the reader keeps the lines beside the file."""
        path = self.data.files[self.chunk]
        return {"blocks": self.data.rows(self.chunk).labels(), "bytes": path.stat().st_size}


def from_published(
    data: Published,
    out: Path,
    *,
    recipe: str,
    samples_per_chunk: int,
    tokenizer: Path | None,
    engine: Engine,
    log: Log = print,
) -> DataManifest:
    """Convert published data into a data set of ours in `out`, in training order, and return its manifest.

    samples_per_chunk: of converted Crystal data; Amber's files are its chunks. `tokenizer`: kept with the data, so that
    its text can be read. Raises UserError where Amber's files have not all the same blocks of sources, RunError for a
    defect in a row.
    """
    out = Path(out)
    tokenizer = tokenizer or data.tokenizer_file
    kept = load(tokenizer) if tokenizer else None
    if kept:
        kept.check_fits(data.vocab_size)
    asked = ["published", data.sha256, data.vocab_size, recipe, samples_per_chunk, kept and kept.sha256]
    config_sha256 = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if there := finished(out, config_sha256, log):
        return there
    with working(out, config_sha256) as work, engine:
        if kept:
            with written(out / kept.name) as part:
                part.write_bytes(kept.content)
        if isinstance(data, PublishedAmber):
            more = _amber(data, out, work, engine, log)
        else:
            more = _crystal(data, out, work, samples_per_chunk, engine, log)
        manifest = DataManifest(
            format=FORMAT,
            recipe=recipe,
            config_sha256=config_sha256,
            sequence_length=data.sequence_length,
            vocab_size=data.vocab_size,
            dtype=token_dtype(data.vocab_size).name,
            seed=data.seed,
            order=ORDER,
            file_samples=1,
            compat="none",
            tokenizer=kept and TokenizerRecord(kept.name, kept.sha256),
            **more,
        )
        manifest.save(out)
    return manifest


def _amber(data: PublishedAmber, out: Path, work: Path, engine: Engine, log: Log) -> dict[str, Any]:
    """Convert, and return the manifest's fields: a source for every label."""
    chunks = len(data.files)
    found = run_all([_Lines(data, work, c) for c in range(chunks)], engine, log, "lines")
    blocks = [(str(label), int(start), int(stop)) for label, start, stop in found[0]["blocks"]]
    for chunk, result in enumerate(found):
        own = [(label, start, stop) for label, start, stop in result["blocks"]]
        if own != blocks or len({label for label, _, _ in blocks}) < len(blocks):
            raise UserError(
                f"{data.files[chunk]}: its blocks of sources are {_counts(own)}, those of "
                f"{data.files[0].name} {_counts(blocks)}; every chunk must have the same, each source in one block"
            )
    if missing := [s for s in data.sources if s not in {label for label, _, _ in blocks}]:
        raise UserError(f"{data.folder}/valid/{missing[0]}.jsonl: no chunk has rows of this source; take it away")
    tasks = [_Convert(data, out, work, f"chunks/{c:03}.arrayrecord", c, 0, data.lines) for c in range(chunks)]
    names = [label for label, _, _ in blocks]
    held = [
        _Convert(data, out, work, f"validation/{n}.arrayrecord", 0, 0, data.validation_samples(n), n)
        for n in names
        if n in data.sources
    ]
    held_files = {t.validation: FileRecord(**r) for t, r in zip(held, run_all(held, engine, log, "validation"))}
    files = [FileRecord(**r) for r in run_all(tasks, engine, log, "convert")]
    sources = []
    for name, start, stop in blocks:
        validation = held_files.get(name) or _empty(out, name)
        windows = validation.samples + chunks * (stop - start)
        tokens = windows * (data.sequence_length + 1)
        sources.append(
            _source(name, str(data.folder), tokens, windows, validation, validation.samples, per_chunk=stop - start)
        )
    return {
        "layout": "chunks",
        "overlap": 0,
        "published": tuple(f.name for f in data.files),
        "sources": tuple(sources),
        "phases": (PhaseRecord((), data.lines * chunks, data.lines, tuple(files)),),
    }


def _crystal(
    data: PublishedCrystal, out: Path, work: Path, samples_per_chunk: int, engine: Engine, log: Log
) -> dict[str, Any]:
    """Convert, and return the manifest's fields: a source for every part of every phase."""
    tasks: list[_Convert] = []
    phases, sources = [], []
    owner: list[int] = []
    for n, mixture in enumerate(data.mixtures):
        for start in range(0, mixture.samples, samples_per_chunk):
            stop = min(start + samples_per_chunk, mixture.samples)
            tasks.append(_Convert(data, out, work, f"chunks/{len(tasks):03}.arrayrecord", n, start, stop))
            owner.append(n)
    files = [FileRecord(**r) for r in run_all(tasks, engine, log, "convert")]
    for n, mixture in enumerate(data.mixtures):
        parts: list[Part] = []
        for i, part in enumerate(mixture.parts):
            name = f"phase{n + 1}-{part.name}"
            parts.append(dataclasses.replace(part, source=name))
            rows, path = data.part_files(n, i), rows_path(out, name)
            with written(path) as file:
                file.write_text(json.dumps(rows) + "\n")
            windows = sum(count for _, count in rows)
            record = _source(name, str(data.folder), windows * data.sequence_length, windows, _empty(out, name), 0)
            sources.append(dataclasses.replace(record, index_files=(FileRecord.of(out, path, windows),)))
        own = tuple(f for f, p in zip(files, owner) if p == n)
        phases.append(PhaseRecord(tuple(parts), mixture.samples, samples_per_chunk, own))
    return {"layout": "mixture", "overlap": 0, "published": (), "sources": tuple(sources), "phases": tuple(phases)}


def _source(
    name: str, location: str, tokens: int, windows: int, held_out: FileRecord, validation: int, per_chunk: int = 0
) -> SourceRecord:
    """The record of published rows, whose documents are not known."""
    return SourceRecord(
        name=name,
        label=name,
        location=location,
        documents=0,
        empty=0,
        bad=0,
        bad_named=(),
        bytes=0,
        tokens=tokens,
        unknown=0,
        windows=windows,
        validation=validation,
        per_chunk=per_chunk,
        unused=0,
        tail_tokens=0,
        validation_file=held_out,
        index_files=(),
    )


def _empty(out: Path, name: str) -> FileRecord:
    """The record file of a source without validation samples."""
    path = out / "validation" / f"{name}.arrayrecord"
    write_records(path, ())
    return FileRecord.of(out, path, 0)


def _counts(blocks: Sequence[tuple[str, int, int]]) -> str:
    return ", ".join(f"{label}: {stop - start}" for label, start, stop in blocks)


# ---- ours to theirs --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _opened(root: Path) -> ChunkedData:
    return ChunkedData(root)


@dataclass(frozen=True)
class _ToJsonl(Task):
    """Write one chunk, or a source's validation samples, as published lines."""

    root: Path
    out: Path
    chunk: int | None
    source: str | None

    @property
    def path(self) -> Path:
        """The file to write."""
        if self.chunk is not None:
            return self.out / "train" / f"train_{self.chunk:03}.jsonl"
        return self.out / "valid" / f"{self.source}.jsonl"

    @property
    def journal(self) -> Path:
        """Says that it is done, for this state of the data."""
        name = f"{self.path.parent.name}-{self.path.name}.json"
        return self.out / WORK / _opened(self.root).sha256[:16] / name

    def run(self) -> dict[str, Any]:
        """Write the lines: of a chunk, in the order of the published files, source by source, unshuffled."""
        data = _opened(self.root)
        write_published_chunk(self.path, self._rows(data))
        return {"bytes": self.path.stat().st_size}

    def _rows(self, data: ChunkedData) -> Iterator[tuple[np.ndarray, str]]:
        manifest = data.manifest
        if self.chunk is None:
            source = next(s for s in manifest.sources if s.name == self.source)
            for start in range(0, source.validation, _ROWS_AT_ONCE):
                rows = data.validation(source.name, start, start + _ROWS_AT_ONCE).tokens
                yield from ((row, source.label) for row in rows)
            return
        layout = manifest.chunk_layout
        order = inverse(permutation(layout.samples_per_chunk, layout.seed, self.chunk)).tolist()
        labels = [s.label for s in manifest.sources for _ in range(s.per_chunk)]
        yield from ((data.sample(self.chunk, p).tokens, label) for p, label in zip(order, labels))


def to_jsonl(root: Path, out: Path, engine: Engine, log: Log = print) -> Path:
    """Write a data set as AmberDatasets has it, into `out/train` and `out/valid`, and return `out`.

    The tokenizer, which was not published, lies beside them. Goes on where it was when it was killed. Raises UserError
    for data that is a mixture of phases: its samples have masks, and in Crystal's data set they are HDF5.
    """
    data = ChunkedData(root)
    if data.manifest.layout != "chunks":
        raise UserError(
            f"{root}: prepared as mixtures of phases, which have no published JSONL form; use amber's layout"
        )
    tasks = [_ToJsonl(root, out, c, None) for c in range(len(data.manifest.chunk_files))]
    tasks += [_ToJsonl(root, out, None, s.name) for s in data.manifest.sources if s.validation]
    for task in tasks:
        if not task.path.exists():
            task.journal.unlink(missing_ok=True)  # done once, and taken away since
    with engine:
        run_all(tasks, engine, log, "jsonl")
    if data.tokenizer_file:
        with written(out / data.tokenizer_file.name) as part:
            part.write_bytes(data.tokenizer_file.read_bytes())
    return out
