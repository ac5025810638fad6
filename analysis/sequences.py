"""The sequences that memorization is measured on: of the chunks that a run reads, or rows as they were published."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from analysis.subject import Target
from checkpoint.manifest import Manifest
from data.dataset import ChunkedData
from data.mixed import MixedData
from data.published import JsonlRows, PublishedAmber, PublishedCrystal
from data.trace import Tracer
from errors import RunError, UserError

if TYPE_CHECKING:
    from analysis.memorization import Memorization

_UNKNOWN = -1  # number of the chunk of rows whose file does not say it
_FILE = re.compile(r"train_(\d+)\.jsonl")


class Sequences(NamedTuple):
    """Sequences of one chunk."""

    positions: np.ndarray
    """int64 [n]: in the chunk; of rows: the line, from 0."""
    tokens: np.ndarray
    """int32 [n, k+l]."""
    sources: list[str]

    def only(self, chosen: np.ndarray) -> "Sequences":
        """Those at which bool [n] is true."""
        return Sequences(self.positions[chosen], self.tokens[chosen], [s for s, c in zip(self.sources, chosen) if c])


def sample(settings: "Memorization", chunk: int, count: int, whole: bool) -> list[int]:
    """Which of a chunk's ``count`` sequences are looked at, sorted.

    Args:
        whole: shuffle all and take the first, as LLM360's paper did (fact sheet 7.1), instead of drawing some.
    """
    key = f"memorization score sample {chunk}" + (f" {settings.seed}" if settings.seed else "")
    numbers, most = random.Random(key), min(settings.sequences, count)
    if not whole:
        return sorted(numbers.sample(range(count), most))
    order = list(range(count))
    numbers.shuffle(order)
    return sorted(order[:most])


class RunChunks:
    """The chunks that a run reads, or those of a data set that goes with imported weights.

    Raises:
        UserError: there is no such data, it does not fit the model, or has no such chunks.
    """

    def __init__(self, target: Target, settings: "Memorization"):
        self._settings, self._target = settings, target
        self.data: Any = _data(target)
        if self.data.vocab_size > target.model.vocab_size:
            raise UserError(
                f"{self.data.directory}: has a vocabulary of {self.data.vocab_size}, and the model one of "
                f"{target.model.vocab_size}; give the data that belongs to the model with --data"
            )
        if settings.length > self.data.sequence_length + 1:
            raise UserError(
                f"memorization: {settings.prompt} + {settings.continuation} tokens, and sequences have "
                f"{self.data.sequence_length + 1}; lower --prompt or --continuation"
            )
        self._counts = {
            c: p.chunk_samples(c) for p in self.data.phases for c in range(p.first_chunk, p.first_chunk + p.chunks)
        }
        self.chunks = chosen_chunks(settings.chunks, list(self._counts))
        self._kept: dict[int, Sequences] = {}
        self._first: dict[int, np.ndarray] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What says which data this is."""
        return {"data": self.data.sha256}

    @property
    def most(self) -> int:
        """Sequences in all chosen chunks."""
        return sum(min(self._counts[c], self._settings.sequences) for c in self.chunks)

    def read(self, chunk: int) -> Sequences:
        """The sequences of a chunk, read once. RunError: corrupt or missing files."""
        if chunk not in self._kept:
            positions = self._positions(chunk)
            tokens = [self.data.sample(chunk, p).tokens[: self._settings.length] for p in positions]
            sources = _sources(self.data, self._tracer, chunk, positions)
            self._kept[chunk] = Sequences(np.array(positions), np.stack(tokens), sources)
        return self._kept[chunk]

    def seen(self, chunk: int, manifest: Manifest) -> np.ndarray | None:
        """bool [n]: which sequences of a chunk a checkpoint has read; None: not known."""
        positions = self._positions(chunk)
        if manifest.origin is not None or not self._target.trained:
            return _seen_chunk(chunk, manifest, len(positions))
        if chunk not in self._first:
            read = [readers_of(self._target, chunk, p) for p in positions]
            self._first[chunk] = np.array([r[0][0] if r else np.iinfo(np.int64).max for r in read])
        return self._first[chunk] < manifest.step

    def _positions(self, chunk: int) -> list[int]:
        return sample(self._settings, chunk, self._counts[chunk], whole=False)

    @cached_property
    def _tracer(self) -> Tracer | None:
        prepared = self.data.data if isinstance(self.data, MixedData) else self.data
        return Tracer(prepared) if isinstance(prepared, ChunkedData) else None


class RowFiles:
    """Published rows: LLM360's raw chunks, or the prompts and continuations that Analysis360 made of them.

    Raises:
        UserError: no such files, no known form, lines that are too short; "seen" of a file of no known chunk.
        RunError: a file cannot be read, or a line is damaged.
    """

    def __init__(self, path: Path, vocab_size: int, settings: "Memorization"):
        files = _row_files(path)
        if settings.chunks == "seen" and _UNKNOWN in files:
            raise UserError(
                f"{path}: --chunks seen needs the chunk's number in the file's name, such as train_003.jsonl"
            )
        self.chunks = chosen_chunks(settings.chunks, sorted(files))
        self._kept = {c: _read_rows(files[c], c, vocab_size, settings) for c in self.chunks}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What says which rows these are: their tokens' SHA-256."""
        digest = hashlib.sha256()
        for chunk, found in self._kept.items():
            digest.update(json.dumps([chunk, found.positions.tolist(), found.sources]).encode())
            digest.update(found.tokens.astype("<i4").tobytes())
        return {"rows": digest.hexdigest()}

    @property
    def most(self) -> int:
        """Sequences in all chosen chunks."""
        return sum(len(found.positions) for found in self._kept.values())

    def read(self, chunk: int) -> Sequences:
        """The sequences of a chunk."""
        return self._kept[chunk]

    def seen(self, chunk: int, manifest: Manifest) -> np.ndarray | None:
        """bool [n]: which sequences of a chunk a checkpoint has read; None: not known."""
        return _seen_chunk(chunk, manifest, len(self._kept[chunk].positions))


def readers_of(target: Target, chunk: int, position: int) -> list[tuple[int, int]]:
    """Each (step, row) that read what a run has at a place, wherever else it has the same sample: `Target.readers`."""
    return target.readers(*origin_of(target, chunk, position))


def origin_of(target: Target, chunk: int, position: int) -> tuple[int, int]:
    """Where in the data set a sample of the run is."""
    mixed = target.tracer.mixed
    return mixed.origin(chunk, position) if mixed else (chunk, position)


def _seen_chunk(chunk: int, manifest: Manifest, count: int) -> np.ndarray | None:
    """bool [count]: whether a checkpoint has read a chunk, by its number; None: one of the two is not known."""
    if chunk == _UNKNOWN:
        return None
    if manifest.index == -1 and manifest.step == 0:
        return np.zeros(count, bool)
    return None if manifest.chunk is None else np.full(count, chunk <= manifest.chunk)


def _data(target: Target) -> Any:
    """What the run reads, in its own shares of the sources; or the given data set of imported weights."""
    if target.trained:
        return target.tracer.mixed or target.tracer.data
    return target.data


def _sources(data: Any, tracer: Tracer | None, chunk: int, positions: Sequence[int]) -> list[str]:
    if isinstance(data, MixedData):
        assert tracer is not None
        return [tracer.origin(*data.origin(chunk, p)).source for p in positions]
    if tracer is not None:
        return [o.source for o in tracer.origins(chunk, positions)]
    if isinstance(data, PublishedAmber):
        return [data.rows(chunk).row(data.place(chunk, p)[1] - 1)[1] for p in positions]
    assert isinstance(data, PublishedCrystal)
    return [data.place(chunk, p)[0] for p in positions]


def chosen_chunks(text: str, chunks: list[int]) -> list[int]:
    """Those of ``chunks`` that a text means; of an empty list it only checks the text."""
    if text in ("all", "seen"):
        return chunks
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(
        re.fullmatch(r"-?\d+" if len(parts) == 1 else r"(-?\d+)?", p) for p in parts
    ):
        raise UserError(f"memorization: --chunks {text!r}: write all, seen, a number, or a slice such as 0:360:36")
    if len(parts) == 1:
        found = [c for c in chunks if c == int(text)]
    else:
        start, stop, *step = (int(p) if p else None for p in parts)
        if step == [0]:
            raise UserError(f"memorization: --chunks {text!r}: a step of 0 chooses nothing")
        found = sorted(chunks[slice(start, stop, *step)])
    if chunks and not found:
        raise UserError(f"memorization: --chunks {text!r} chooses none; there are {some(chunks)}")
    return found


def some(numbers: Any) -> str:
    """A few of many numbers."""
    there = sorted({int(n) for n in numbers})
    return ", ".join(map(str, there)) if len(there) <= 8 else f"{len(there)} between {there[0]} and {there[-1]}"


def _row_files(path: Path) -> dict[int, Path]:
    """Chunk number -> file."""
    if path.is_file():
        found = _FILE.fullmatch(path.name)
        return {int(found[1]) if found else _UNKNOWN: path}
    files = sorted(
        p for folder in (path, path / "train") for p in folder.glob("train_*.jsonl") if _FILE.fullmatch(p.name)
    )
    numbered: dict[int, Path] = {}
    for file in files:
        number = int(file.stem.partition("_")[2])
        if number in numbered:
            raise UserError(f"{file}: has the number of {numbered[number]}; remove one of them")
        numbered[number] = file
    if not numbered:
        raise UserError(f"{path}: no such file, or a folder without train_000.jsonl …; give one with --rows")
    return numbered


def _read_rows(path: Path, chunk: int, vocab_size: int, settings: "Memorization") -> Sequences:
    first = _from_file(path, lambda file: file.readline())
    row = _object(path, 1, first)
    if "token_ids" in row:
        if not isinstance(row["token_ids"], list):
            raise RunError(f"{path}:1: field 'token_ids' is not a list; fetch the file again")
        lines = JsonlRows(path, len(row["token_ids"]), vocab_size)
        _check_length(path, 1, row["token_ids"], settings)
        numbers = sample(settings, chunk, len(lines), whole=True)
        read = [lines.row(n) for n in numbers]
        return _sequences(numbers, [ids for ids, _ in read], [source for _, source in read], settings)
    if "prompt" in row and "continuation" in row:
        text = _from_file(path, lambda file: file.read()).split(b"\n")
        filled = [n for n, line in enumerate(text) if line.strip()]
        numbers = [filled[n] for n in sample(settings, chunk, len(filled), whole=True)]
        rows = [_reduced(path, n + 1, text[n], vocab_size, settings) for n in numbers]
        return _sequences(numbers, [ids for ids, _ in rows], [source for _, source in rows], settings)
    raise UserError(
        f"{path}: its first line has {', '.join(map(repr, row)) or 'no fields'}; rows have 'token_ids' (LLM360's "
        "chunks), or 'prompt' and 'continuation' (Analysis360)"
    )


def _from_file(path: Path, read: Callable[[BinaryIO], bytes]) -> bytes:
    try:
        with path.open("rb") as file:
            return read(file)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error


def _sequences(numbers: list[int], tokens: list[Any], sources: list[str], settings: "Memorization") -> Sequences:
    return Sequences(np.array(numbers), np.array([t[: settings.length] for t in tokens], np.int32), sources)


def _reduced(path: Path, line: int, text: bytes, vocab_size: int, settings: "Memorization") -> tuple[list[int], str]:
    row = _object(path, line, text)
    ids: list[int] = []
    for name in ("prompt", "continuation"):
        part = row.get(name)
        if not isinstance(part, list) or set(map(type, part)) - {int}:
            raise RunError(f"{path}:{line}: field {name!r} is not a list of ids; fetch the file again")
        ids += part
    if odd := [i for i in ids if not 0 <= i < vocab_size]:
        raise RunError(f"{path}:{line}: id {odd[0]} is outside the vocabulary of {vocab_size}")
    _check_length(path, line, ids, settings)
    return ids, str(row.get("source", ""))


def _check_length(path: Path, line: int, ids: Sequence[int], settings: "Memorization") -> None:
    if len(ids) < settings.length:
        raise UserError(
            f"{path}:{line}: has {len(ids)} tokens, and {settings.prompt} + {settings.continuation} are asked for; "
            "lower --prompt or --continuation"
        )


def _object(path: Path, line: int, text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}:{line}: not JSON ({error}); fetch the file again") from error
    if not isinstance(row, dict):
        raise RunError(f"{path}:{line}: not a JSON object; fetch the file again")
    return row
