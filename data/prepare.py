"""Documents to a data set that can be trained on: tokenise, lay out, write chunks in training order, manifest last.

All work is a list of tasks that are independent of each other (`data.engines`), and each leaves a journal when it is
done: a `prepare` that was killed goes on where it was, and the same configuration gives the same bytes with any number
of workers, on any engine, after any number of kills. A finished data set is never overwritten.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

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
from data.engines import Engine, Local, Task, run_all
from data.fim import FIM_TOKENS, Fim, rearrange, with_fim
from data.folder import finished, share, shared, working
from data.index import PartIndex, write_index
from data.mixture import Mixture, Part
from data.packing import ORDER, Layout, training_window, validation_windows, window_start, windows_in
from data.sample import Sample
from data.sources import OnBad, Portion, ReadReport, Shard, SourceSpec, listed, plan, read
from data.streams import Tokenise, TokenStream, loaded, part_index
from data.tokenizer import MODEL, Tokenizer, load, train_tokenizer
from errors import RunError, UserError

Log = Callable[[str], object]

_TRAINING_BYTES_PER_PIECE = 2000  # more text no longer changes which pieces are frequent


@dataclass(frozen=True)
class PhasePlan:
    """A phase of the layout "mixture", before its sources' sizes are known."""

    parts: tuple[Part, ...]
    samples: int | None = None  # None: one epoch of the mixture
    samples_per_chunk: int | None = None
    chunks: int | None = None  # of about equal size; or samples_per_chunk

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("a phase without a mixture; give it parts, or prepare with the layout 'chunks'")
        if (self.chunks is None) == (self.samples_per_chunk is None):
            raise UserError("a phase needs its number of chunks or its samples_per_chunk, and not both")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and where. `tokenizer` is a file or folder to load, or None to train one on the sources."""

    recipe: str
    out: Path
    sources: tuple[SourceSpec, ...]
    sequence_length: int
    vocab_size: int
    validation_per_source: int  # windows
    seed: int
    layout: Literal["chunks", "mixture"] = "chunks"
    chunks: int = 1  # of the layout "chunks"
    phases: tuple[PhasePlan, ...] = ()  # of the layout "mixture"
    overlap: int = 0
    file_samples: int = 50_000  # fact sheet 3.5
    original: bool = False  # reproduce the quirks of the originals that change tokens (fact sheet 3.5, 3.6)
    tokenizer: Path | None = None
    on_bad: OnBad = "fail"
    max_bytes_per_source: int | None = None  # UTF-8 bytes of text
    shard_bytes: int = 64 << 20  # of source files: what one task tokenises, and what a kill can lose
    engine: Engine = field(default_factory=lambda: Local(1))  # changes the time, not the result

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("no sources; give at least one --source NAME=PATH")
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(f"source {twice[0]} is named twice; give each source its own name")
        for name in (
            "sequence_length", "vocab_size", "chunks", "max_bytes_per_source", "file_samples", "shard_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} = {value}: at least 1 is needed")
        for name in ("validation_per_source", "overlap"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}: at least 0 is needed")
        if self.overlap > self.sequence_length:
            raise UserError(f"overlap = {self.overlap}: windows of {self.sequence_length + 1} tokens must move on")
        if self.on_bad not in get_args(OnBad):
            raise UserError(f"on_bad = {self.on_bad!r}: it is one of {', '.join(get_args(OnBad))}")
        if (self.layout == "mixture") != bool(self.phases):
            raise UserError(f"the layout {self.layout!r} with {len(self.phases)} phases: only a mixture has phases")
        for n, phase in enumerate(self.phases):
            for part in phase.parts:
                if part.reads not in names:
                    raise UserError(
                        f"phase {n}: part {part.name} reads the source {part.reads!r}, which is not given; the sources "
                        f"are {', '.join(names)}. Give --source {part.reads}=PATH"
                    )
        if self.layout == "mixture" and (idle := [n for n in names if n not in {p.reads for p in self.parts}]):
            raise UserError(f"source {idle[0]}: no phase reads it; leave it out, or add it to a phase's mixture")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of all phases."""
        return tuple(p for phase in self.phases for p in phase.parts)

    @property
    def fills_in(self) -> bool:
        """Whether any part is rearranged to be filled in."""
        return any(p.fim_rate for p in self.parts)

    @property
    def sha256(self) -> str:
        """SHA-256 of everything that the result depends on: all fields but `out`, `engine` and `shard_bytes`."""
        return self._digest(f.name for f in dataclasses.fields(self) if f.name not in ("out", "engine", "shard_bytes"))

    @property
    def streams_sha256(self) -> str:
        """SHA-256 of what the token streams in the work folder depend on: they serve any layout of their windows.

        `on_bad` is not among it: a shard that is done under "fail" had nothing to skip.
        """
        fields = ("recipe", "sources", "vocab_size", "tokenizer", "original", "max_bytes_per_source", "shard_bytes")
        return self._digest((*fields, "fills_in"))

    def _digest(self, fields: Iterable[str]) -> str:
        values = {name: getattr(self, name) for name in fields}
        values["sources"] = [dataclasses.asdict(s) for s in self.sources]
        values["tokenizer"] = None if self.tokenizer is None else load(self.tokenizer).sha256
        if "phases" in values:
            values["phases"] = [dataclasses.asdict(p) for p in self.phases]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepare(config: PrepareConfig, log: Log = print) -> DataManifest:
    """Prepare the data set of a configuration in `config.out`, or go on preparing it, and return its manifest.

    If that folder already holds the complete data set of the same configuration, it is returned as it is. Raises
    UserError for anything wrong with the request or the sources, RunError when the folder cannot be written, or when
    the sources changed since an earlier call began.
    """
    out = Path(config.out).absolute()  # a worker may run elsewhere
    config = dataclasses.replace(config, out=out)
    if there := finished(out, config.sha256, log):
        return there
    with working(out, config.streams_sha256) as work, config.engine:
        tokenizer = _tokenizer(config, work, log)
        shards = [_planned(config, spec, work) for spec in config.sources]
        streams = _tokenise(config, shards, tokenizer, work, log)
        design = _design(config, streams, tokenizer.path)
        _begin_layout(config, work)
        manifest = _write(config, design, streams, tokenizer, work, log)
        _check_written(manifest, out, work)
        manifest.save(out)
    return manifest


# ---- beginning, and going on -----------------------------------------------------------------------------------


def _planned(config: PrepareConfig, spec: SourceSpec, work: Path) -> tuple[Shard, ...]:
    """The shards of a source: those of the first call, whose files must still be there as they were.

    They are kept, since to plan them takes a pass over all large JSON Lines files.
    """
    path = work / f"{spec.name}.plan.json"
    if not path.exists():
        shards = plan(spec, config.shard_bytes, config.engine.map)
        with written(path) as part:
            part.write_text(json.dumps([[s.bytes, [dataclasses.astuple(p) for p in s.portions]] for s in shards]))
        return shards
    kept = enumerate(json.loads(path.read_text()))
    shards = tuple(Shard(spec, n, tuple(Portion(*p) for p in portions), size) for n, (size, portions) in kept)
    planned = dict.fromkeys((p.file, p.path, p.size) for s in shards for p in s.portions)
    if list(planned) != [(f.file, f.path, f.size) for f in listed(spec)]:
        raise RunError(
            f"source {spec.name}: the files of {spec.location} are not those that this data set was begun with; "
            f"restore them, or delete {config.out} and begin again"
        )
    return shards


def _begin_layout(config: PrepareConfig, work: Path) -> None:
    """Go on with this layout of the windows, or, if another was begun before, take away what was written of it."""
    path = work / "layout.json"
    text = json.dumps({"config_sha256": config.sha256}) + "\n"
    if path.exists() and path.read_text() == text:
        return
    path.unlink(missing_ok=True)
    # All journals before the first file: killed in between, neither layout must take a file that is gone for done.
    for folder in [root / kind for root in (work, Path(config.out)) for kind in ("chunks", "validation", "index")]:
        if folder.exists():
            shutil.rmtree(folder)
    with written(path) as part:
        part.write_text(text)


def _check_written(manifest: DataManifest, out: Path, work: Path) -> None:
    """Raise RunError when a file is no longer what its journal says, and see to it that all are written again."""
    try:
        for file in manifest.files:
            file.check_size(out)
    except RunError as error:
        (work / "layout.json").unlink(missing_ok=True)
        raise RunError(f"{error}. It was changed after it was written: the same command writes it again") from error


def _tokenizer(config: PrepareConfig, work: Path, log: Log) -> Tokenizer:
    """Return the given tokenizer, or one trained on equal shares of text from all sources, kept in `out`."""
    if config.tokenizer is not None:
        given = load(config.tokenizer)
        try:
            given.check_fits(config.vocab_size)
        except UserError as error:
            raise UserError(f"{error}, or set --model.vocab-size {given.vocab_size}") from None
        name, content = given.name, given.content
    else:
        trained = work / MODEL
        if not trained.exists():
            special = len(FIM_TOKENS) if config.fills_in else 0
            log(f"training a tokenizer of {config.vocab_size} ids")
            with written(trained) as part:
                limit = _TRAINING_BYTES_PER_PIECE * config.vocab_size
                train_tokenizer(_sample(config), config.vocab_size - special, part, limit)
                if special:
                    part.write_bytes(with_fim(part.read_bytes()))
        name, content = MODEL, trained.read_bytes()
    path = Path(config.out) / name
    if not path.exists():
        with written(path) as part:
            part.write_bytes(content)
    tokenizer = load(path)
    if config.fills_in:
        Fim.of(tokenizer)  # refuses one without the tokens, before any work is done
    return tokenizer


def _sample(config: PrepareConfig) -> Iterator[str]:
    """Yield texts, each from the source that has given the fewest characters so far, until all are read."""
    readers = [read(s, config.on_bad, config.max_bytes_per_source) for s in config.sources]
    given = dict.fromkeys(range(len(readers)), 0)
    while given:
        j = min(given, key=lambda k: (given[k], k))
        document = next(readers[j], None)
        if document is None:
            del given[j]
        else:
            given[j] += len(document.text)
            yield document.text


# ---- documents to streams --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """A tokenised source: its shards in the work folder, and what was counted."""

    spec: SourceSpec
    tokens: TokenStream
    index: tuple[PartIndex, ...]
    report: ReadReport
    unknown: int
    short: int  # documents that the originals' tools left out


def _tokenise(
    config: PrepareConfig, shards: Sequence[Sequence[Shard]], tokenizer: Tokenizer, work: Path, log: Log
) -> list[_Stream]:
    limit, dtype = config.max_bytes_per_source, token_dtype(config.vocab_size)

    def task(shard: Shard, max_bytes: int | None) -> Tokenise:
        return Tokenise(shard, tokenizer.path, dtype.str, work, config.on_bad, max_bytes, config.original)

    done: list[list[tuple[Tokenise, dict[str, Any]]]] = [[] for _ in shards]
    have = [0] * len(shards)  # bytes of text
    while True:
        # Without a limit everything is to be read at once. With one, as many shards as could hold what is missing.
        wave = [
            (i, task(s, limit))
            for i, own in enumerate(shards)
            for s in _next(own[len(done[i]) :], None if limit is None else limit - have[i])
        ]
        if not wave:
            break
        for (i, t), result in zip(wave, run_all([t for _, t in wave], config.engine, log, "tokenise")):
            if limit is not None and have[i] >= limit:
                continue  # read ahead, and not needed
            if limit is not None and have[i] > 0 and have[i] + result["bytes"] >= limit:
                t = task(t.shard, limit - have[i])  # the shard that reaches the limit ends there
                (result,) = run_all([t], config.engine, log, "tokenise")
            if config.on_bad == "fail" and result["bad"]:
                raise UserError(
                    f"source {t.shard.spec.name}: {result['bad_named'][0]}; an earlier call left it out with --on-bad "
                    f"skip: give that again, or repair it, delete {config.out} and begin again"
                )
            done[i].append((t, result))
            have[i] += result["bytes"]
    streams = []
    for spec, found in zip(config.sources, done):
        report = ReadReport()
        for _, r in found:
            report.add(ReadReport(*(r[f.name] for f in dataclasses.fields(ReadReport))))
        report.check_found(spec)
        more = {key: sum(r[key] for _, r in found) for key in ("tokens", "unknown", "short")}
        log(
            f"source {spec.name}: {report.documents:,} documents, {more['tokens']:,} tokens, "
            f"{report.bytes / 1e6:.1f} MB; left out: {report.empty} empty, {report.bad} bad"
            + (f", {more['short']} short" if more["short"] else "")
            + "".join(f"\n  bad: {where}" for where in report.bad_named)
        )
        names, sizes = [t.name for t, _ in found], [r["tokens"] for _, r in found]
        index = tuple(part_index(t, r) for t, r in found)
        stream = TokenStream(work, names, sizes, dtype)
        streams.append(_Stream(spec, stream, index, report, unknown=more["unknown"], short=more["short"]))
    return streams


def _next(shards: Sequence[Shard], missing: int | None) -> Sequence[Shard]:
    """The shards to read next: all, or the first whose files are as large as the text that is missing."""
    if missing is None:
        return shards
    taken, size = 0, 0
    while taken < len(shards) and size < missing:
        size += shards[taken].bytes or missing
        taken += 1
    return shards[:taken]


# ---- streams to samples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Design:
    """Where every window goes, and all that is needed to make a sample of one."""

    config: PrepareConfig
    streams: tuple[TokenStream, ...]
    tokenizer: Path
    held_out: tuple[np.ndarray, ...]
    chunks: Layout | None
    phases: tuple[Mixture, ...]
    samples_per_chunk: tuple[int, ...]  # of each phase

    def window(self, source: int, window: int) -> np.ndarray:
        """Return the S+1 ids of a window of a source."""
        start = window_start(window, self.config.sequence_length, self.config.overlap)
        return self.streams[source].read(start, start + self.config.sequence_length + 1)

    def samples(self, phase: int, start: int, stop: int) -> Iterator[Sample]:
        """Yield samples start..stop-1 of a phase, in training order."""
        if self.chunks is not None:
            per_chunk = self.chunks.samples_per_chunk
            source, windows = self.chunks.window_of(start // per_chunk, np.arange(stop - start))
            for j, w in zip(source.tolist(), windows.tolist()):
                yield Sample.of_tokens(self.window(j, w))
            return
        parts = self.config.phases[phase].parts
        names = [s.name for s in self.config.sources]
        tokenizer = loaded(str(self.tokenizer))
        fim = Fim.of(tokenizer) if self.config.fills_in else None
        reads = [names.index(p.reads) for p in parts]
        which, epoch, number = self.phases[phase].at(np.arange(start, stop))
        windows = np.empty_like(number)
        for i, j in enumerate(reads):
            windows[which == i] = training_window(number[which == i], self.held_out[j])
        for i, e, w in zip(which.tolist(), epoch.tolist(), windows.tolist()):
            part, window = parts[i], self.window(reads[i], w)
            if fim is None or not part.fim_rate:
                yield Sample.of_tokens(window)
                continue
            key = ("fim", self.config.seed, part.reads, e, w)
            yield rearrange(window, part.fim_rate, key, tokenizer, fim, self.config.original)


def _design(config: PrepareConfig, streams: Sequence[_Stream], tokenizer: Path) -> _Design:
    """Lay out all windows; UserError when a source has too few."""
    tokens, streamed = [(s.spec.name, len(s.tokens)) for s in streams], tuple(s.tokens for s in streams)
    small = dataclasses.replace(config, engine=Local(1))
    if config.layout == "chunks":
        chunks = Layout.of(
            tokens,
            sequence_length=config.sequence_length,
            validation=config.validation_per_source,
            chunks=config.chunks,
            seed=config.seed,
            overlap=config.overlap,
        )
        held_out = chunks.validation  # drawn here, once: the layout takes the draw along to the workers
        return _Design(small, streamed, tokenizer, held_out, chunks, (), (chunks.samples_per_chunk,))
    windows = {name: windows_in(n, config.sequence_length, config.overlap) for name, n in tokens}
    for name, n in tokens:
        if windows[name] <= config.validation_per_source:
            raise UserError(
                f"source {name}: {n:,} tokens found, which make {windows[name]} windows, and "
                f"{config.validation_per_source} are held out for validation; add documents, or lower "
                "validation_per_source or sequence_length"
            )
    held_out = tuple(
        validation_windows(windows[name], config.validation_per_source, config.seed, name) for name, _ in tokens
    )
    training = {name: n - config.validation_per_source for name, n in windows.items()}
    phases = tuple(
        Mixture.of(p.parts, training, samples=p.samples, file_samples=config.file_samples, seed=config.seed, phase=n)
        for n, p in enumerate(config.phases)
    )
    for mixture in phases:
        mixture.at(np.arange(0, mixture.samples, mixture.epoch))  # makes its tables here, once, for all workers
    per_chunk = tuple(
        p.samples_per_chunk or -(-mixture.samples // (p.chunks or 1)) for p, mixture in zip(config.phases, phases)
    )
    return _Design(small, streamed, tokenizer, held_out, None, phases, per_chunk)


@dataclass(frozen=True)
class _WriteChunk(Task):
    """Write samples start..stop-1 of a phase as one chunk file."""

    design: Path
    out: Path
    phase: int
    chunk: int
    start: int
    stop: int

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.design.parent / "chunks" / f"{self.chunk:03}.json"

    @property
    def weight(self) -> int:
        """Samples to write."""
        return self.stop - self.start

    def run(self) -> dict[str, Any]:
        """Write the file and return its record."""
        design: _Design = shared(self.design)
        path = chunk_path(self.out, self.chunk)
        dtype = token_dtype(design.config.vocab_size)
        write_records(path, (encode(s, dtype) for s in design.samples(self.phase, self.start, self.stop)))
        return dataclasses.asdict(FileRecord.of(self.out, path, self.stop - self.start))


@dataclass(frozen=True)
class _WriteValidation(Task):
    """Write the held-out windows of a source."""

    design: Path
    out: Path
    source: int
    name: str

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.design.parent / "validation" / f"{self.name}.json"

    def run(self) -> dict[str, Any]:
        """Write the file and return its record."""
        design: _Design = shared(self.design)
        path = validation_path(self.out, self.name)
        dtype, windows = token_dtype(design.config.vocab_size), design.held_out[self.source].tolist()
        samples = (Sample.of_tokens(design.window(self.source, w)) for w in windows)
        write_records(path, (encode(s, dtype) for s in samples))
        return dataclasses.asdict(FileRecord.of(self.out, path, len(windows)))


@dataclass(frozen=True)
class _WriteIndex(Task):
    """Join the document index of a source."""

    work: Path
    out: Path
    name: str
    parts: tuple[PartIndex, ...]

    @property
    def journal(self) -> Path:
        """Says that it is done."""
        return self.work / "index" / f"{self.name}.json"

    def run(self) -> dict[str, Any]:
        """Write the files and return their records."""
        documents = sum(p.documents for p in self.parts)
        records = [FileRecord.of(self.out, path, documents) for path in write_index(self.out, self.name, self.parts)]
        return {"files": [dataclasses.asdict(r) for r in records]}


def _write(
    config: PrepareConfig, design: _Design, streams: Sequence[_Stream], tokenizer: Tokenizer, work: Path, log: Log
) -> DataManifest:
    """Write chunks, validation samples and indices, and return the manifest of all."""
    out, path = Path(config.out), share(design, work)
    totals = [m.samples for m in design.phases] or [config.chunks * design.samples_per_chunk[0]]
    chunks: list[_WriteChunk] = []
    for n, (total, size) in enumerate(zip(totals, design.samples_per_chunk)):
        chunks += [
            _WriteChunk(path, out, n, len(chunks) + i, start, min(start + size, total))
            for i, start in enumerate(range(0, total, size))
        ]
    indices = [_WriteIndex(work, out, s.spec.name, s.index) for s in streams]
    validation = [_WriteValidation(path, out, j, s.spec.name) for j, s in enumerate(streams)]
    log(f"validation: {sum(map(len, design.held_out)):,} windows held out")
    indexed = run_all(indices, config.engine, log, "index")
    held_out = [FileRecord(**r) for r in run_all(validation, config.engine, log, "validation")]
    written_chunks = [FileRecord(**r) for r in run_all(chunks, config.engine, log, "chunks")]
    index_files = [tuple(FileRecord(**r) for r in files["files"]) for files in indexed]
    return DataManifest(
        format=FORMAT,
        recipe=config.recipe,
        config_sha256=config.sha256,
        sequence_length=config.sequence_length,
        overlap=config.overlap,
        vocab_size=config.vocab_size,
        dtype=token_dtype(config.vocab_size).name,
        seed=config.seed,
        order=ORDER,
        layout=config.layout,
        file_samples=config.file_samples,
        compat="original" if config.original else "none",
        published=(),
        tokenizer=TokenizerRecord(tokenizer.path.name, tokenizer.sha256),
        sources=tuple(
            _source_record(config, design, j, *of) for j, of in enumerate(zip(streams, held_out, index_files))
        ),
        phases=tuple(
            PhaseRecord(
                parts=config.phases[n].parts if config.phases else (),
                samples=total,
                samples_per_chunk=design.samples_per_chunk[n],
                chunk_files=tuple(r for r, t in zip(written_chunks, chunks) if t.phase == n),
            )
            for n, total in enumerate(totals)
        ),
    )


def _source_record(
    config: PrepareConfig,
    design: _Design,
    j: int,
    stream: _Stream,
    validation_file: FileRecord,
    index_files: tuple[FileRecord, ...],
) -> SourceRecord:
    spec, report, tokens = stream.spec, stream.report, len(stream.tokens)
    windows, validation = windows_in(tokens, config.sequence_length, config.overlap), len(design.held_out[j])
    end = window_start(windows - 1, config.sequence_length, config.overlap) + config.sequence_length + 1
    per_chunk = design.chunks.sources[j].per_chunk if design.chunks else 0
    unused = windows - validation - config.chunks * per_chunk if design.chunks else 0
    return SourceRecord(
        name=spec.name,
        label=spec.published,
        location=spec.location,
        documents=report.documents,
        empty=report.empty + stream.short,
        bad=report.bad,
        bad_named=tuple(report.bad_named),
        bytes=report.bytes,
        tokens=tokens,
        unknown=stream.unknown,
        windows=windows,
        validation=validation,
        per_chunk=per_chunk,
        unused=unused,
        tail_tokens=tokens - end if windows else tokens,
        validation_file=validation_file,
        index_files=index_files,
    )
