"""Documents to a data set that can be trained on: tokenise, lay out, write chunks in training order, manifest last.

Deterministic: the same configuration gives the same bytes with any number of workers. A run that was interrupted is
done again from the start; a finished data set is never overwritten.
"""

import hashlib
import json
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np

from data.chunks import (
    FORMAT,
    MANIFEST,
    DataManifest,
    FileRecord,
    SourceRecord,
    TokenizerRecord,
    token_dtype,
    write_mixed_samples,
    write_samples,
    written,
)
from data.index import IndexWriter
from data.packing import ORDER, Layout
from data.sources import Document, OnBad, ReadReport, SourceSpec, read
from data.tokenizer import MODEL, Tokenizer, load, train_tokenizer
from errors import RunError, UserError

_Label = TypeVar("_Label")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_BATCH_CHARACTERS = 1 << 18  # of text that go to a worker at a time, about
_TRAINING_BYTES_PER_PIECE = 2000  # more text no longer changes which pieces are frequent
_LOG_EVERY_S = 10.0
_STARTED = ".prepare-started"  # marks an unfinished folder as ours, so that it may be cleared
_WORK = "work.part"


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and where. `tokenizer` is a file or folder to load, or None to train one on the sources."""

    recipe: str
    out: Path
    sources: tuple[SourceSpec, ...]
    sequence_length: int
    vocab_size: int
    chunks: int
    validation_per_source: int  # windows
    seed: int
    tokenizer: Path | None = None
    on_bad: OnBad = "fail"
    max_bytes_per_source: int | None = None  # UTF-8 bytes of text
    workers: int = 1  # processes; changes the time, not the result

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("no sources; give at least one --source NAME=PATH")
        names = [s.name for s in self.sources]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(f"source {twice[0]} is named twice; give each source its own name")
        for name in ("sequence_length", "vocab_size", "chunks", "workers", "max_bytes_per_source"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} = {value}: at least 1 is needed")
        if self.validation_per_source < 0:
            raise UserError(f"validation_per_source = {self.validation_per_source}: at least 0 is needed")
        if self.on_bad not in get_args(OnBad):
            raise UserError(f"on_bad = {self.on_bad!r}: it is one of {', '.join(get_args(OnBad))}")

    @property
    def sha256(self) -> str:
        """SHA-256 of everything that the result depends on: all fields but `out` and `workers`."""
        values = {
            "recipe": self.recipe,
            "sources": [(s.name, s.location) for s in self.sources],
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "chunks": self.chunks,
            "validation_per_source": self.validation_per_source,
            "seed": self.seed,
            "tokenizer": None if self.tokenizer is None else load(self.tokenizer).sha256,
            "on_bad": self.on_bad,
            "max_bytes_per_source": self.max_bytes_per_source,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prepare(config: PrepareConfig, log: Callable[[str], object] = print) -> DataManifest:
    """Prepare the data set of a configuration in `config.out` and return its manifest.

    If that folder already holds the complete data set of the same configuration, it is returned as it is. Raises
    UserError for anything wrong with the request or the sources, RunError when the folder cannot be written.
    """
    out = Path(config.out)
    if (out / MANIFEST).exists():
        return _complete(config, DataManifest.load(out), log)
    _clear(out)
    work = out / _WORK
    with _writing_to(out), _pool(config.workers) as pool:
        work.mkdir(parents=True)
        tokenizer = _tokenizer(config, work / MODEL, log)
        with written(out / tokenizer.name) as part:
            part.write_bytes(tokenizer.content)
        streams = [_tokenise(config, spec, tokenizer, work, pool, log) for spec in config.sources]
        layout = Layout.of(
            [(s.name, stream.tokens) for s, stream in zip(config.sources, streams)],
            sequence_length=config.sequence_length,
            validation=config.validation_per_source,
            chunks=config.chunks,
            seed=config.seed,
        )
        # Drawn here, once: the layout takes the draw along to the workers.
        held_out = sum(len(windows) for windows in layout.validation)
        log(f"validation: {held_out:,} windows held out")
        chunk_files = _write_chunks(config, layout, [s.path for s in streams], pool, log)
        sources = tuple(_source_record(config, layout, j, stream) for j, stream in enumerate(streams))
        manifest = DataManifest(
            format=FORMAT,
            recipe=config.recipe,
            config_sha256=config.sha256,
            sequence_length=config.sequence_length,
            vocab_size=config.vocab_size,
            dtype=token_dtype(config.vocab_size).name,
            seed=config.seed,
            order=ORDER,
            chunks=config.chunks,
            samples_per_chunk=layout.samples_per_chunk,
            tokenizer=TokenizerRecord(tokenizer.name, tokenizer.sha256),
            sources=sources,
            chunk_files=chunk_files,
        )
        shutil.rmtree(work)
        manifest.save(out)
        (out / _STARTED).unlink()
    return manifest


def _complete(config: PrepareConfig, manifest: DataManifest, log: Callable[[str], object]) -> DataManifest:
    if manifest.config_sha256 != config.sha256:
        raise UserError(
            f"{config.out} holds data prepared for {manifest.recipe} from another configuration; it is never "
            "overwritten: choose another --out, or delete the folder yourself"
        )
    for file in manifest.files:
        file.check_size(Path(config.out))
    log(f"{config.out}: already prepared from this configuration, nothing to do")
    return manifest


def _clear(out: Path) -> None:
    """Make `out` an empty folder of ours: new, or the remains of an unfinished run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / _STARTED).exists():
        raise UserError(f"{out} exists and was not begun by prepare; choose another --out or an empty folder")
    for name in ("chunks", "validation", "index", _WORK):
        shutil.rmtree(out / name, ignore_errors=True)
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / _STARTED).touch()


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error}); free space or choose another --out, run again") from error


def _tokenizer(config: PrepareConfig, trained: Path, log: Callable[[str], object]) -> Tokenizer:
    """Return the given tokenizer, or one trained on equal shares of text from all sources."""
    if config.tokenizer is None:
        log(f"training a tokenizer of {config.vocab_size} pieces")
        train_tokenizer(_sample(config), config.vocab_size, trained, _TRAINING_BYTES_PER_PIECE * config.vocab_size)
        return load(trained)
    tokenizer = load(config.tokenizer)
    try:
        tokenizer.check_fits(config.vocab_size)
    except UserError as error:
        raise UserError(f"{error}, or set --model.vocab-size {tokenizer.vocab_size}") from None
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


@dataclass(frozen=True)
class _Stream:
    """A tokenised source in the work folder."""

    spec: SourceSpec
    path: Path
    report: ReadReport
    tokens: int
    index: tuple[FileRecord, ...]


def _tokenise(
    config: PrepareConfig,
    spec: SourceSpec,
    tokenizer: Tokenizer,
    work: Path,
    pool: ProcessPoolExecutor | None,
    log: Callable[[str], object],
) -> _Stream:
    """Write the token stream of one source, documents in reading order, each followed by the end-of-document token."""
    dtype = token_dtype(config.vocab_size)
    report, path = ReadReport(), work / f"{spec.name}.tokens"
    began = logged = time.monotonic()
    batches = _batches(read(spec, config.on_bad, config.max_bytes_per_source, report))
    tasks = (([d.id for d in b], (str(tokenizer.path), [d.text for d in b], dtype.str)) for b in batches)
    with open(path, "wb") as file, closing(IndexWriter(work, spec.name)) as index:
        for ids, (tokens, lengths) in _ordered(_encode, tasks, pool, config.workers):
            file.write(tokens.tobytes())
            index.add(ids, lengths)
            if time.monotonic() - logged > _LOG_EVERY_S:
                logged = time.monotonic()
                log(_progress(spec.name, index.documents, index.tokens, report.bytes, logged - began))
        paths = index.save(config.out, spec.name)
        log(
            _progress(spec.name, index.documents, index.tokens, report.bytes, time.monotonic() - began)
            + f"; left out: {report.empty} empty, {report.bad} bad"
            + "".join(f"\n  bad: {where}" for where in report.bad_named)
        )
        records = tuple(FileRecord.of(config.out, p, index.documents) for p in paths)
        return _Stream(spec, path, report, index.tokens, records)


def _progress(name: str, documents: int, tokens: int, size: int, seconds: float) -> str:
    s = max(seconds, 1e-9)
    return (
        f"source {name}: {documents:,} documents, {tokens:,} tokens, {size / 1e6:.1f} MB in {seconds:.1f} s "
        f"({documents / s:,.0f} documents/s, {tokens / s:,.0f} tokens/s, {size / 1e6 / s:.2f} MB/s)"
    )


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


@lru_cache(maxsize=1)
def _loaded(path: str) -> Tokenizer:
    # One processor per worker process, loaded at the worker's first batch.
    return load(path)


def _encode(task: tuple[str, list[str], str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens of all texts in order, int64 number of tokens of each), end-of-document tokens included."""
    path, texts, dtype = task
    tokenizer = _loaded(path)
    encoded = tokenizer.encode_many(texts)
    for ids in encoded:
        ids.append(tokenizer.eos_id)
    return np.concatenate([np.array(ids, dtype) for ids in encoded]), np.array([len(ids) for ids in encoded])


def _write_chunks(
    config: PrepareConfig,
    layout: Layout,
    streams: list[Path],
    pool: ProcessPoolExecutor | None,
    log: Callable[[str], object],
) -> tuple[FileRecord, ...]:
    began = logged = time.monotonic()
    tokens = config.sequence_length + 1
    tasks = ((c, (config.out, layout, c, streams, tokens, config.vocab_size)) for c in range(layout.chunks))
    records: list[FileRecord] = []
    for _, record in _ordered(_write_chunk, tasks, pool, config.workers):
        records.append(record)
        if time.monotonic() - logged > _LOG_EVERY_S:
            logged = time.monotonic()
            log(f"chunks: {len(records)} of {layout.chunks} written")
    size = sum(r.bytes for r in records) / 1e6
    log(
        f"chunks: {layout.chunks} of {layout.samples_per_chunk:,} samples of {config.sequence_length} tokens, "
        f"{size:.1f} MB in {time.monotonic() - began:.1f} s"
    )
    return tuple(records)


def _write_chunk(task: tuple[Path, Layout, int, list[Path], int, int]) -> FileRecord:
    out, layout, chunk, streams, tokens, vocab_size = task
    source, windows = layout.window_of(chunk, np.arange(layout.samples_per_chunk))
    path = out / "chunks" / f"{chunk:03}.arrayrecord"
    write_mixed_samples(path, [_stream(s, vocab_size) for s in streams], source, windows, tokens)
    return FileRecord.of(out, path, layout.samples_per_chunk)


def _stream(path: Path, vocab_size: int) -> np.ndarray:
    return np.memmap(path, token_dtype(vocab_size), "r")


def _source_record(config: PrepareConfig, layout: Layout, j: int, stream: _Stream) -> SourceRecord:
    """Write the validation file of source j and return all that is known of the source."""
    source, report, tokens = layout.sources[j], stream.report, config.sequence_length + 1
    path = config.out / "validation" / f"{source.name}.arrayrecord"
    write_samples(path, _stream(stream.path, config.vocab_size), layout.validation[j], tokens)
    return SourceRecord(
        name=source.name,
        location=stream.spec.location,
        documents=report.documents,
        empty=report.empty,
        bad=report.bad,
        bad_named=tuple(report.bad_named),
        bytes=report.bytes,
        tokens=stream.tokens,
        windows=source.windows,
        validation=source.validation,
        per_chunk=source.per_chunk,
        unused=source.windows - source.validation - layout.chunks * source.per_chunk,
        tail_tokens=stream.tokens - source.windows * tokens,
        validation_file=FileRecord.of(config.out, path, source.validation),
        index_files=stream.index,
    )


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a process pool, or None for one worker: this process then does the work itself."""
    if workers == 1:
        yield None
        return
    # Spawned, not forked: the caller may hold JAX's threads, and a fork of those can hang.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RunError("a worker process was lost (out of memory?); run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(
    function: Callable[[_Item], _Result],
    tasks: Iterator[tuple[_Label, _Item]],
    pool: ProcessPoolExecutor | None,
    workers: int,
) -> Iterator[tuple[_Label, _Result]]:
    """Yield (label, function(item)) of (label, item) tasks in their order, with a bounded number held in memory."""
    if pool is None:
        for label, item in tasks:
            yield label, function(item)
        return
    running: deque[tuple[_Label, Future[_Result]]] = deque()
    while True:
        for label, item in islice(tasks, 2 * workers - len(running)):
            running.append((label, pool.submit(function, item)))
        if not running:
            return
        label, future = running.popleft()
        yield label, future.result()
