"""What `prepare` leaves on disk: record files of packed samples, and the manifest that vouches for them.

    DATA/manifest.json                     written last: without it there is no data set
    DATA/tokenizer.model
    DATA/chunks/000.arrayrecord …          one chunk each, samples in training order
    DATA/validation/NAME.arrayrecord       the held-out windows of a source, in stream order
    DATA/index/NAME.…                      where each document of a source's stream begins (`index.py`)

A record is the sample's S+1 token ids, little-endian uint16 (uint32 when the vocabulary has more than 65,536 ids).
ArrayRecord with one record per group keeps a checksum of each record, so a flipped byte is found when it is read.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data.packing import ORDER, Layout, SourceWindows
from errors import RunError, UserError

FORMAT = 1
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian type that stores ids below vocab_size: uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a `.part` path to write; it becomes `path` when the block ends well and disappears when it does not.

    Raises RunError when the file cannot be written, e.g. because the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error}); free space or write elsewhere, then run again") from error
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class FileRecord:
    """One file of the data set: path below DATA, number of records (documents, in an index), bytes, SHA-256."""

    file: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, root: Path, path: Path, samples: int) -> "FileRecord":
        """Return the record of a file that has just been written."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.relative_to(root).as_posix(), samples, path.stat().st_size, digest)

    def check_size(self, root: Path) -> None:
        """Raise RunError when the file is missing or has another size; cheap."""
        path = root / self.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise RunError(f"{path}: missing ({error.strerror}); restore it or prepare the data again") from error
        if size != self.bytes:
            raise RunError(f"{path}: {size} bytes, the manifest says {self.bytes}; restore it or prepare again")

    def check_content(self, root: Path) -> None:
        """Raise RunError when the file's bytes are not those that were written; reads all of it."""
        self.check_size(root)
        if FileRecord.of(root, root / self.file, self.samples) != self:
            raise RunError(f"{root / self.file}: SHA-256 differs from the manifest; restore it or prepare again")


def write_samples(path: Path, stream: np.ndarray, windows: np.ndarray, tokens: int) -> None:
    """Write the given windows of `tokens` ids of a source's stream, in that order, as one record file."""
    write_mixed_samples(path, [stream], np.zeros(len(windows), np.int64), windows, tokens)


def write_mixed_samples(
    path: Path, streams: list[np.ndarray], source: np.ndarray, windows: np.ndarray, tokens: int
) -> None:
    """Write, for each i, window windows[i] of streams[source[i]] as record i."""
    with written(path) as part:
        try:
            writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
            for j, w in zip(source.tolist(), windows.tolist()):
                writer.write(streams[j][w * tokens : (w + 1) * tokens].tobytes())
            writer.close()
        except RuntimeError as error:  # what the writer makes of a full disk
            raise OSError(str(error)) from error


class SampleFile:
    """A record file opened for reading. Raises RunError when it is missing or does not hold the samples it should."""

    def __init__(self, root: Path, record: FileRecord, *, tokens: int, vocab_size: int):
        record.check_size(root)
        self.path = root / record.file
        self._samples, self._tokens, self._vocab_size = record.samples, tokens, vocab_size
        self._reader = ArrayRecordReader(str(self.path))
        # The reader's constructor reports nothing: a file that it cannot open has no records.
        if not self._reader.ok() or self._reader.num_records() != record.samples:
            raise RunError(f"{self.path}: not a readable record file of {record.samples} samples; restore it")

    def read(self, position: int) -> np.ndarray:
        """Return int32[S+1]; RunError names the file and position of a corrupt record."""
        if not 0 <= position < self._samples:
            raise IndexError(f"{self.path}: position {position} is outside 0..{self._samples - 1}")
        try:
            (record,) = self._reader.read([position])
        except RuntimeError as error:
            raise RunError(f"{self.path}: sample {position} is corrupt ({error}); restore the file") from error
        dtype = token_dtype(self._vocab_size)
        if len(record) != self._tokens * dtype.itemsize:
            raise RunError(
                f"{self.path}: sample {position} has {len(record)} bytes, not {self._tokens} tokens of {dtype.itemsize}"
            )
        ids = np.frombuffer(record, dtype)
        if ids.max() >= self._vocab_size:
            raise RunError(
                f"{self.path}: sample {position} holds id {ids.max()}, outside the vocabulary of {self._vocab_size}"
            )
        return ids.astype(np.int32)


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids: path below DATA and SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """What was read from one source and what became of it."""

    name: str
    location: str  # as it was given
    documents: int
    empty: int  # documents left out because they have no text
    bad: int  # records left out because they cannot be read
    bad_named: tuple[str, ...]  # the first few of them
    bytes: int  # UTF-8 bytes of text
    tokens: int  # with one end-of-document token per document
    windows: int
    validation: int
    per_chunk: int
    unused: int  # windows at the end of the stream that no chunk takes
    tail_tokens: int  # tokens after the last whole window
    validation_file: FileRecord
    index_files: tuple[FileRecord, ...]  # offsets, ids, frame starts


@dataclass(frozen=True)
class DataManifest:
    """The whole description of a prepared data set; its hash identifies the data a run reads."""

    format: int
    recipe: str
    config_sha256: str  # of everything `prepare` was asked for, except where to write and with how many workers
    sequence_length: int
    vocab_size: int
    dtype: str
    seed: int
    order: str  # the formula of `packing.sort_keys`
    chunks: int
    samples_per_chunk: int
    tokenizer: TokenizerRecord
    sources: tuple[SourceRecord, ...]
    chunk_files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this program reads {FORMAT}; use the version that wrote it")
        if self.order != ORDER:
            raise ValueError(f"order {self.order!r}, this program knows {ORDER!r}; use the version that wrote it")
        if self.dtype != token_dtype(self.vocab_size).name:
            raise ValueError(f"dtype {self.dtype} does not fit a vocabulary of {self.vocab_size}")
        if len(self.chunk_files) != self.chunks:
            raise ValueError(f"{len(self.chunk_files)} chunk files are listed for {self.chunks} chunks")
        if {f.samples for f in self.chunk_files} != {self.samples_per_chunk}:
            raise ValueError(f"not every chunk file has samples_per_chunk = {self.samples_per_chunk} samples")
        if self.layout.samples_per_chunk != self.samples_per_chunk:
            raise ValueError(f"the sources' per_chunk do not add up to samples_per_chunk = {self.samples_per_chunk}")

    @cached_property
    def layout(self) -> Layout:
        """Which window stands where."""
        sources = tuple(SourceWindows(s.name, s.windows, s.validation, s.per_chunk) for s in self.sources)
        return Layout(sources, self.chunks, self.seed)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the data set but the tokenizer."""
        return self.chunk_files + tuple(f for s in self.sources for f in (s.validation_file, *s.index_files))

    def to_json(self) -> bytes:
        """Return the canonical bytes: the content of manifest.json."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode("ascii")

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, root: Path) -> None:
        """Write DATA/manifest.json."""
        with written(Path(root) / MANIFEST) as part:
            part.write_bytes(self.to_json())

    @classmethod
    def load(cls, root: str | Path) -> "DataManifest":
        """Return the manifest of a data directory; UserError when it is missing, malformed or of another version."""
        path = Path(root) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{path}: not found; prepare the data first (run.py prepare)") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a data manifest ({error})") from error
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
            raise UserError(f"{path}: format {raw['format']} is newer than this program reads ({FORMAT}); upgrade it")
        try:
            return _build(cls, raw, "manifest")
        except ValueError as error:
            raise UserError(f"{path}: malformed: {error}") from error


def _build(kind: Any, raw: Any, where: str) -> Any:
    """Return a value of type `kind` (int, str, tuple, record) from JSON; ValueError names the first wrong field."""
    if get_origin(kind) is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_build(get_args(kind)[0], x, f"{where}[{i}]") for i, x in enumerate(raw))
    if kind in (int, str):
        if type(raw) is not kind:
            raise ValueError(f"{where} = {raw!r} is not of type {kind.__name__}")
        return raw
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is not an object")
    kinds = get_type_hints(kind)
    if odd := sorted(set(kinds) ^ set(raw)):
        raise ValueError(f"{where}: field {odd[0]!r} is {'missing' if odd[0] in kinds else 'unknown'}")
    return kind(**{name: _build(of, raw[name], f"{where}.{name}") for name, of in kinds.items()})
