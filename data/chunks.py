"""What `prepare` leaves on disk: record files of packed samples, and the manifest that vouches for them.

    DATA/manifest.json                     written last: without it there is no data set
    DATA/tokenizer.model
    DATA/chunks/000.arrayrecord …          one chunk each, samples in training order, numbered through all phases
    DATA/validation/NAME.arrayrecord       the held-out windows of a source, in stream order
    DATA/index/NAME.…                      where each document of a source's stream begins (`index.py`)

A record is the sample's S+1 token ids, little-endian uint16 (uint32 when the vocabulary has more than 65,536 ids). Of
a sample whose targets are not just the ids that follow, or do not all count, it is S inputs, S targets and S bits of
loss mask (first position in the lowest bit). ArrayRecord with one record per group keeps a checksum of each record, so
a flipped byte is found when it is read.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data.mixture import Mixture, Part
from data.packing import ORDER, Layout, SourceWindows, validation_windows
from data.sample import PhaseSamples, Sample
from errors import RunError, UserError

FORMAT = 2  # 1 had one phase, no masks and another document index
MANIFEST = "manifest.json"


def chunk_path(root: Path, chunk: int) -> Path:
    """Return the record file of a chunk."""
    return root / "chunks" / f"{chunk:03}.arrayrecord"


def validation_path(root: Path, source: str) -> Path:
    """Return the record file of a source's validation samples."""
    return root / "validation" / f"{source}.arrayrecord"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the little-endian type that stores ids below vocab_size: uint16, or uint32 above 65,536 ids."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a `.part` path to write; it becomes `path` when the block ends well and disappears when it does not.

    The name of its own lets two processes write the same file at once: a distributed engine may try a task twice, and
    either result will do. Raises RunError when the file cannot be written, e.g. because the disk is full.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
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
        """Raise RunError when the file's bytes cannot be read or are not those that were written; reads all of it."""
        self.check_size(root)
        try:
            found = FileRecord.of(root, root / self.file, self.samples)
        except OSError as error:
            raise RunError(f"{root / self.file}: cannot be read ({error.strerror}); restore it") from error
        if found != self:
            raise RunError(f"{root / self.file}: SHA-256 differs from the manifest; restore it or prepare again")


def encode(sample: Sample, dtype: np.dtype) -> bytes:
    """Return the record of one sample."""
    if sample.is_window:
        return sample.tokens.astype(dtype).tobytes()
    mask = np.packbits(sample.weights.astype(bool), bitorder="little")
    return sample.inputs.astype(dtype).tobytes() + sample.targets.astype(dtype).tobytes() + mask.tobytes()


def decode(record: bytes, sequence_length: int, dtype: np.dtype) -> Sample:
    """Return the sample of a record; ValueError when it has no such length."""
    s, size = sequence_length, dtype.itemsize
    if len(record) == (s + 1) * size:
        return Sample.of_tokens(np.frombuffer(record, dtype))
    if len(record) != 2 * s * size + -(-s // 8):
        raise ValueError(f"{len(record)} bytes, which are no sample of {s} tokens of {size} bytes")
    inputs, targets = np.frombuffer(record, dtype, 2 * s).astype(np.int32).reshape(2, s)
    bits = np.unpackbits(np.frombuffer(record, np.uint8, offset=2 * s * size), count=s, bitorder="little")
    return Sample(inputs, targets, bits.astype(np.float32))


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write one record file, whole or not at all."""
    with written(path) as part:
        try:
            writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # what the writer makes of a full disk
            raise OSError(str(error)) from error


class SampleFile:
    """A record file opened for reading. Raises RunError when it is missing or does not hold the samples it should."""

    def __init__(self, root: Path, record: FileRecord, *, sequence_length: int, vocab_size: int):
        record.check_size(root)
        self.path = root / record.file
        self._samples, self._sequence_length, self._vocab_size = record.samples, sequence_length, vocab_size
        self._reader = ArrayRecordReader(str(self.path))
        # The reader's constructor reports nothing: a file that it cannot open has no records.
        if not self._reader.ok() or self._reader.num_records() != record.samples:
            raise RunError(f"{self.path}: not a readable record file of {record.samples} samples; restore it")

    def read(self, position: int) -> Sample:
        """Return one sample; RunError names the file and position of a corrupt record."""
        if not 0 <= position < self._samples:
            raise IndexError(f"{self.path}: position {position} is outside 0..{self._samples - 1}")
        try:
            (record,) = self._reader.read([position])
            sample = decode(record, self._sequence_length, token_dtype(self._vocab_size))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"{self.path}: sample {position} is corrupt ({error}); restore the file") from error
        highest = max(sample.inputs.max(), sample.targets.max())
        if highest >= self._vocab_size:
            raise RunError(
                f"{self.path}: sample {position} holds id {highest}, outside the vocabulary of {self._vocab_size}"
            )
        return sample


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids: path below DATA and SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """What was read from one source and what became of it."""

    name: str
    label: str  # what published rows call it
    location: str  # as it was given
    documents: int
    empty: int  # documents left out because they have no text
    bad: int  # records left out because they cannot be read
    bad_named: tuple[str, ...]  # the first few of them
    bytes: int  # UTF-8 bytes of text
    tokens: int  # with the tokens that end (and perhaps begin) each document
    unknown: int  # of those, tokens of single bytes above 127: text that the vocabulary has no piece for
    windows: int
    validation: int
    per_chunk: int  # in the layout "chunks", else 0
    unused: int  # in the layout "chunks": windows at the end of the stream that no chunk takes
    tail_tokens: int  # tokens after the last whole window
    validation_file: FileRecord
    index_files: tuple[FileRecord, ...]  # offsets, lines, hashes, files; none for published rows

    @property
    def training_windows(self) -> int:
        """Windows that are not held out for validation."""
        return self.windows - self.validation


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase reads, in files of samples_per_chunk samples (the last may have fewer)."""

    parts: tuple[Part, ...]  # its mixture, in the layout "mixture"
    samples: int
    samples_per_chunk: int
    chunk_files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class DataManifest:
    """The whole description of a prepared data set; its hash identifies the data a run reads."""

    format: int
    recipe: str
    config_sha256: str  # of everything `prepare` was asked for, except where to write and with what engine
    sequence_length: int
    overlap: int  # tokens that neighbouring windows of a stream share
    vocab_size: int
    dtype: str
    seed: int
    order: str  # the formulas of `packing`
    layout: Literal["chunks", "mixture"]  # fact sheet 3.3, or 3.4
    file_samples: int  # windows that count as one file, for halves
    compat: Literal["none", "original"]  # whether the originals' quirks that change tokens were reproduced
    published: tuple[str, ...]  # of converted data: the published file of each chunk, if each chunk is one
    tokenizer: TokenizerRecord | None  # None: converted data came without one
    sources: tuple[SourceRecord, ...]
    phases: tuple[PhaseRecord, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this program reads {FORMAT}; prepare the data again")
        if self.order != ORDER:
            raise ValueError(f"order {self.order!r}, this program knows {ORDER!r}; use the version that wrote it")
        if self.dtype != token_dtype(self.vocab_size).name:
            raise ValueError(f"dtype {self.dtype} does not fit a vocabulary of {self.vocab_size}")
        if self.layout == "chunks" and len(self.phases) != 1:
            raise ValueError(f"{len(self.phases)} phases: the layout 'chunks' has one")
        for n, (record, phase) in enumerate(zip(self.phases, self.phase_samples)):
            counts = [f.samples for f in record.chunk_files]
            first = phase.first_chunk
            if counts != [phase.chunk_samples(c) for c in range(first, first + phase.chunks)]:
                raise ValueError(f"phases[{n}]: chunk_files do not hold {phase.samples} samples as they should")
        if self.layout == "chunks" and self.chunk_layout.samples_per_chunk != self.phases[0].samples_per_chunk:
            raise ValueError("the sources' per_chunk do not add up to samples_per_chunk")

    @cached_property
    def phase_samples(self) -> tuple[PhaseSamples, ...]:
        """The phases as a run reads them."""
        found, first = [], 0
        for record in self.phases:
            phase = PhaseSamples(first, record.samples, record.samples_per_chunk, carry=self.layout == "mixture")
            found.append(phase)
            first += phase.chunks
        return tuple(found)

    @cached_property
    def chunk_files(self) -> tuple[FileRecord, ...]:
        """The file of every chunk, through all phases."""
        return tuple(f for p in self.phases for f in p.chunk_files)

    @cached_property
    def chunk_layout(self) -> Layout:
        """Which window stands where, in the layout "chunks"."""
        sources = tuple(SourceWindows(s.name, s.windows, s.validation, s.per_chunk) for s in self.sources)
        return Layout(sources, len(self.chunk_files), self.seed)

    @cached_property
    def mixtures(self) -> tuple[Mixture, ...]:
        """What each phase reads, in the layout "mixture"."""
        windows = {s.name: s.training_windows for s in self.sources}
        return tuple(
            Mixture.of(p.parts, windows, samples=p.samples, file_samples=self.file_samples, seed=self.seed, phase=n)
            for n, p in enumerate(self.phases)
        )

    @cached_property
    def held_out(self) -> tuple[np.ndarray, ...]:
        """Per source, the sorted int64[V] windows held out for validation."""
        if self.layout == "chunks":
            return self.chunk_layout.validation
        return tuple(validation_windows(s.windows, s.validation, self.seed, s.name) for s in self.sources)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the data set but the tokenizer."""
        return self.chunk_files + tuple(f for s in self.sources for f in (s.validation_file, *s.index_files))

    def to_json(self) -> bytes:
        """Return the canonical bytes: the content of manifest.json but for its own SHA-256."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode("ascii")

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, root: Path) -> None:
        """Write DATA/manifest.json."""
        with written(Path(root) / MANIFEST) as part:
            content = asdict(self) | {"sha256": self.sha256}
            part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="ascii")

    @classmethod
    def load(cls, root: str | Path) -> "DataManifest":
        """Return the manifest of a data directory.

        UserError when it is missing, malformed or of another version; RunError when it is not what was written (nothing
        else guards it: with a flipped bit a chunk's name may be that of another chunk).
        """
        path = Path(root) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{path}: not found; prepare the data first (run.py prepare)") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a data manifest ({error})") from error
        version = raw.get("format") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != FORMAT:
            older = "newer than" if version > FORMAT else "older than what"
            cure = "upgrade it" if version > FORMAT else "prepare the data again"
            raise UserError(f"{path}: format {version} is {older} this program reads ({FORMAT}); {cure}")
        try:
            claimed = raw.pop("sha256", None) if isinstance(raw, dict) else None  # older data has none
            manifest = _build(cls, raw, "manifest")
        except ValueError as error:
            raise UserError(f"{path}: malformed: {error}") from error
        if claimed not in (None, manifest.sha256):
            raise RunError(f"{path}: damaged (its text does not match its own SHA-256); put back an intact copy")
        return manifest


def _build(kind: Any, raw: Any, where: str) -> Any:
    """Return a value of type `kind` (int, str, tuple, record) from JSON; ValueError names the first wrong field."""
    if get_origin(kind) is tuple:
        if not isinstance(raw, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_build(get_args(kind)[0], x, f"{where}[{i}]") for i, x in enumerate(raw))
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"{where} = {raw!r} is none of {', '.join(map(repr, get_args(kind)))}")
        return raw
    if isinstance(kind, UnionType):  # X | None
        return None if raw is None else _build(get_args(kind)[0], raw, where)
    if kind in (int, str, bool, float):
        if type(raw) is not kind:
            raise ValueError(f"{where} = {raw!r} is not of type {kind.__name__}")
        return raw
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is not an object")
    kinds = get_type_hints(kind)
    if odd := sorted(set(kinds) ^ set(raw)):
        raise ValueError(f"{where}: field {odd[0]!r} is {'missing' if odd[0] in kinds else 'unknown'}")
    return kind(**{name: _build(of, raw[name], f"{where}.{name}") for name, of in kinds.items()})
