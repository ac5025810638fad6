"""LLM360's published files into our format, and our chunks into their published form."""

import dataclasses
import hashlib
import json
import shutil
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
    chunk_path,
    encode,
    token_dtype,
    validation_path,
    write_records,
    written,
)
from data.dataset import ChunkedData
from data.engines import Engine, Task, run_all
from data.folder import WORK, finished, share, shared, working
from data.index import rows_path
from data.mixture import Part
from data.packing import ORDER, inverse, permutation
from data.published import PublishedAmber, PublishedCrystal, write_published_chunk
from data.tokenizer import load
from errors import UserError

Published = PublishedAmber | PublishedCrystal
Log = Callable[[str], object]

_ROWS_AT_ONCE = 256  # of validation samples
_BLOCKS = 1000  # of sources in a file are looked at: Amber's files have seven


@dataclass(frozen=True)
class _Convert(Task):
    """Write samples start..stop-1 of a published chunk as one record file."""

    data: Path
    out: Path
    number: int  # of the chunk to write
    chunk: int  # of the published data
    start: int
    stop: int

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.data.parent / f"chunk-{self.number:03}.json"

    @property
    def weight(self) -> int:
        """Samples."""
        return self.stop - self.start

    def run(self) -> dict[str, Any]:
        """Write the file, every row of it checked by the reader, and return its record."""
        data, path = shared(self.data), chunk_path(self.out, self.number)
        samples = (data.sample(self.chunk, p) for p in range(self.start, self.stop))
        write_records(path, (encode(s, token_dtype(data.vocab_size)) for s in samples))
        return dataclasses.asdict(FileRecord.of(self.out, path, self.stop - self.start))


@dataclass(frozen=True)
class _ConvertValidation(Task):
    """Write a source's validation samples as one record file."""

    data: Path
    out: Path
    source: str

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.data.parent / f"validation-{self.source}.json"

    def run(self) -> dict[str, Any]:
        """Write the file, every row of it checked by the reader, and return its record."""
        data, path = shared(self.data), validation_path(self.out, self.source)
        rows = data.validation_rows(self.source)
        records = (rows.row(i)[0].astype(token_dtype(data.vocab_size)).tobytes() for i in range(len(rows)))
        write_records(path, records)
        return dataclasses.asdict(FileRecord.of(self.out, path, len(rows)))


@dataclass(frozen=True)
class _Lines(Task):
    """Find the lines of one of Amber's files, and the blocks of sources in it: reads all of it once."""

    data: Path
    chunk: int
    bytes: int

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.data.parent / f"lines-{self.chunk:03}.json"

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return self.bytes

    def run(self) -> dict[str, Any]:
        """Return the number of lines and the first blocks; the reader keeps the lines beside the file."""
        data = shared(self.data)
        rows = data.open(data.files[self.chunk])
        return {"lines": len(rows), "blocks": rows.labels()[:_BLOCKS], "bytes": self.bytes}


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
    chunks, known = len(data.files), share(data, work)
    lines = [_Lines(known, c, path.stat().st_size) for c, path in enumerate(data.files)]
    found = run_all(lines, engine, log, "lines")
    data.count(r["lines"] for r in found)
    blocks = found[0]["blocks"]
    names = [label for label, _, _ in blocks]
    for path, result in zip(data.files, found):
        if result["blocks"] != blocks or len(set(names)) < len(names) or blocks[-1][2] < data.lines:
            raise UserError(
                f"{path}: its blocks of sources are {_counts(result['blocks'])}, those of {data.files[0].name} "
                f"{_counts(blocks)}; every chunk must have the same, each source in one block"
            )
    if missing := [s for s in data.sources if s not in names]:
        raise UserError(f"{data.folder}/valid/{missing[0]}.jsonl: no chunk has rows of this source; take it away")
    known = share(data, work)  # which now knows how many lines there are
    held = [_ConvertValidation(known, out, name) for name in names if name in data.sources]
    held_files = {t.source: FileRecord(**r) for t, r in zip(held, run_all(held, engine, log, "validation"))}
    tasks = [_Convert(known, out, c, c, 0, data.lines) for c in range(chunks)]
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
    known = share(data, work)
    tasks: list[_Convert] = []
    phases, sources = [], []
    owner: list[int] = []
    for n, mixture in enumerate(data.mixtures):
        for start in range(0, mixture.samples, samples_per_chunk):
            stop = min(start + samples_per_chunk, mixture.samples)
            tasks.append(_Convert(known, out, len(tasks), n, start, stop))
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
    path = validation_path(out, name)
    write_records(path, ())
    return FileRecord.of(out, path, 0)


def _counts(blocks: Sequence[tuple[str, int, int]]) -> str:
    return ", ".join(f"{label}: {stop - start}" for label, start, stop in blocks)


# ---- ours to theirs --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _opened(root: Path, sha256: str) -> ChunkedData:
    """Open a data set; `sha256` tells it from another that was in its place before."""
    return ChunkedData(root)


@dataclass(frozen=True)
class _ToJsonl(Task):
    """Write one chunk, or a source's validation samples, as published lines."""

    root: Path
    sha256: str  # of the manifest
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
        return self.out / WORK / self.sha256[:16] / name

    def run(self) -> dict[str, Any]:
        """Write the lines: of a chunk, in the order of the published files, source by source, unshuffled."""
        data = _opened(self.root, self.sha256)
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

    The tokenizer, which was not published, lies beside them. Goes on where it was when it was killed; what is complete
    is written again. Raises UserError for data that is a mixture of phases: its samples have masks, and in Crystal's
    data set they are HDF5.
    """
    data = ChunkedData(root)
    if data.manifest.layout != "chunks":
        raise UserError(
            f"{root}: prepared as mixtures of phases, which have no published JSONL form; use amber's layout"
        )
    tasks = [_ToJsonl(root, data.sha256, out, c, None) for c in range(len(data.manifest.chunk_files))]
    tasks += [_ToJsonl(root, data.sha256, out, None, s.name) for s in data.manifest.sources if s.validation]
    for torn in out.glob("*/*.part"):  # what a kill left half written
        torn.unlink()
    for task in tasks:
        if not task.path.exists():
            task.journal.unlink(missing_ok=True)  # done once, and taken away since
    with engine:
        run_all(tasks, engine, log, "jsonl")
    if data.tokenizer_file:
        with written(out / data.tokenizer_file.name) as part:
            part.write_bytes(data.tokenizer_file.read_bytes())
    shutil.rmtree(out / WORK)
    return out
