"""Memorization: does a checkpoint go on with training data word for word (fact sheet 7.1; Biderman et al. 2023)?

Score(k, l) of a sequence: the first k tokens are a prompt, l tokens are generated greedily, and the score is the share
of these that equal the sequence's own at their places. A sequence with score 1 is k-extractable.

How much of that a teacher-forced pass tells, exactly: greedy generation equals the sequence up to its first mismatch,
so up to there, and at the mismatch itself, it has read what the pass reads. Hence one pass gives the place of the first
mismatch, k-extractability, and the whole score of each sequence that has no mismatch or only one at the last token.
After an earlier mismatch the model goes on from its own token: only for those sequences l tokens are generated, all l,
whether `</s>` is among them or not. The two agree up to the first mismatch but for near-ties, where another batch shape
rounds the other way: each of those is counted (``ties`` in the summary), and the generated tokens are what counts. So
ties are known only of sequences that are generated: where the pass shows no mismatch, or one at the last token alone,
nothing is generated that could differ.

A checkpoint has seen a sequence of a run that was trained here if a step before the checkpoint read it, wherever the
run has it, and the guard did not skip that step. Of published rows and imported checkpoints the chunk's number says it,
if it is known.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from analysis import results
from analysis.results import Result, Scored, estimate
from analysis.subject import Subject, Target
from analysis.sweep import Study
from checkpoint.manifest import Manifest
from data.loader import ChunkedData
from data.mixed import MixedData
from data.published import JsonlRows, PublishedAmber, PublishedCrystal
from data.trace import Tracer
from errors import RunError, UserError
from inference.batches import power
from inference.forward import batch_ways
from inference.generate import Sampling, generate

KIND = "memorization"
_VERSION = 2  # of what a result holds
_BATCH_TOKENS = 16384  # positions scored, or in caches, at a time, about
_NEVER = -1  # an end token that no model generates
_UNKNOWN = -1  # number of the chunk of rows whose file does not say it
_FILE = re.compile(r"train_(\d+)\.jsonl")


@dataclass(frozen=True)
class Memorization:
    """How many tokens of training data checkpoints go on with by themselves, chunk by chunk."""

    prompt: int = 32
    """k: first tokens of a sequence, which are given."""
    continuation: int = 32
    """l: tokens after them, which are compared with what the model generates."""
    chunks: str = "all"
    """Chunks of the data to look at: all, seen (of each checkpoint the sequences that it has read), a number, or a
    Python slice of their list, such as 0:360:36."""
    sequences: int = 1000
    """Most sequences of a chunk: drawn by seed and chunk, the same for every checkpoint."""
    seed: int = 0
    """Of the drawing. 0 draws from raw published rows the sequences of LLM360's paper."""
    rows: Path | None = None
    """Published rows instead of the run's data: train_000.jsonl, or a folder of such files (a file's number is that of
    its chunk; one file of another name is of no known chunk), with token_ids or with prompt and continuation in each
    line."""
    story: str | None = None
    """CHUNK:POSITION: score nothing; tell from the results when that sequence was learned and forgotten, and its
    documents."""
    follow: int = 0
    """Score nothing; tell the stories of that many sequences whose scores changed most."""

    def __post_init__(self) -> None:
        for name in ("prompt", "continuation", "sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"memorization: {name}={getattr(self, name)} must be at least 1")
        if self.follow < 0:
            raise UserError(f"memorization: follow={self.follow} must be at least 0")
        if self.story is not None and not re.fullmatch(r"(\d+|-1):\d+", self.story):
            raise UserError(f"memorization: --story {self.story!r}: write CHUNK:POSITION, as in the results, e.g. 3:17")
        _chosen(self.chunks, [])

    @property
    def length(self) -> int:
        """Tokens of a sequence that are used."""
        return self.prompt + self.continuation

    def open(self, target: Target, note: Callable[[str], None]) -> list[Study]:
        """The study; none, but lines through ``note``, if a story is asked for.

        Raises:
            UserError: too long for the model or the data, no such chunks, rows of no known form; no results to tell of.
        """
        if self.story is not None or self.follow:
            self._tell(target, note)
            return []
        if self.length > target.model.context_length:
            raise UserError(
                f"memorization: {self.prompt} + {self.continuation} tokens exceed the model's context of "
                f"{target.model.context_length}; lower --prompt or --continuation"
            )
        grid: RunChunks | RowFiles
        grid = RunChunks(target, self) if self.rows is None else RowFiles(self.rows, target.model.vocab_size, self)
        return [MemorizationStudy(self, grid, target.region.compute_dtype)]

    def _tell(self, target: Target, note: Callable[[str], None]) -> None:
        kinds = [k for k in results.kinds(target.run) if k == KIND or k.startswith(f"{KIND}-")]
        if not kinds:
            raise UserError(f"{target.run}: has no results of memorization to tell of; make them first")
        histories = [History(target.run, kind) for kind in kinds]
        if self.story is not None:
            chunk, position = map(int, self.story.split(":"))
            having = [h for h in histories if (h.keys == (chunk, position)).all(axis=1).any()] or histories[:1]
            wanted = [(h, (chunk, position)) for h in having]
        else:
            wanted = [(h, key) for h in histories for key in h.changed(self.follow)]
        for history, key in wanted:
            for line in story_lines(story(target, *key, history=history)):
                note(line if len(kinds) == 1 else f"{history.kind}: {line}")


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


def sample(settings: Memorization, chunk: int, count: int, whole: bool) -> list[int]:
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

    def __init__(self, target: Target, settings: Memorization):
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
        self.chunks = _chosen(settings.chunks, list(self._counts))
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
            read = [_readers(self._target, chunk, p) for p in positions]
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

    def __init__(self, path: Path, vocab_size: int, settings: Memorization):
        files = _row_files(path)
        if settings.chunks == "seen" and _UNKNOWN in files:
            raise UserError(
                f"{path}: --chunks seen needs the chunk's number in the file's name, such as train_003.jsonl"
            )
        self.chunks = _chosen(settings.chunks, sorted(files))
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


@dataclass(frozen=True, eq=False)
class MemorizationStudy:
    """The study that `Memorization` opens."""

    asked: Memorization
    grid: RunChunks | RowFiles
    compute_dtype: str
    kind: str = KIND
    needs_weights: bool = True

    def settings(self) -> dict[str, Any]:
        """Lengths, chunks, what is drawn, from what, and the dtype."""
        a = self.asked
        return {
            "version": _VERSION,
            "prompt": a.prompt,
            "continuation": a.continuation,
            "chunks": a.chunks,
            "sequences": a.sequences,
            "seed": a.seed,
            "compute_dtype": self.compute_dtype,
            **self.grid.identity,
        }

    def score(self, subject: Subject) -> Scored:
        """One checkpoint: see `summarize` for the summary; the table ``sequences`` has a row for each sequence.

        Raises:
            RunError: data that cannot be read, weights that are no use; "seen" of a checkpoint that does not know.
        """
        manifest = subject.entry.manifest
        seen = {c: self.grid.seen(c, manifest) for c in self.grid.chunks}
        found: dict[int, Sequences] = {}
        for chunk, read in seen.items():
            if self.asked.chunks != "seen":
                found[chunk] = self.grid.read(chunk)
                continue
            if read is None:
                raise RunError("imported without its place in the training data: --chunks seen is not known, give all")
            if read.any():
                found[chunk], seen[chunk] = self.grid.read(chunk).only(read), read[read]
        length = self.asked.length
        tokens = np.concatenate([np.empty((0, length), np.int32), *(f.tokens for f in found.values())])
        matches, logprobs, ties = match(subject, tokens, self.asked.prompt, self.grid.most)
        table = _table(found, seen, matches, logprobs)
        return Scored(summarize(table, self.asked, manifest.chunk, ties), {"sequences": table})


def match(subject: Subject, tokens: np.ndarray, prompt: int, most: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Compare greedy continuations with the tokens that follow.

    Args:
        tokens: int32 [n, k+l].
        prompt: k.
        most: rows that will ever be asked for together, if more than n: then the same programs serve all of them.

    Returns:
        bool [n, l]: where the greedy continuation has the sequence's own token; float32 [n]: log-probability of the
        sequence's continuation; the number of generated sequences of which pass and generation see another first
        mismatch.

    Raises:
        RunError: the model gives numbers that are not finite.
    """
    target = subject.target
    true, count = tokens[:, prompt:], tokens.shape[1] - prompt
    # Batches of one shape, so that the number of sequences that need generation compiles nothing new.
    size = max(1, min(_BATCH_TOKENS // power(tokens.shape[1]), power(max(most, len(tokens)))))
    size += -size % batch_ways(target.mesh)
    likeliest, logprobs = np.zeros(true.shape, np.int32), np.zeros(len(tokens), np.float32)
    for numbers, rows in _batches(np.arange(len(tokens)), tokens, size):
        for number, found in zip(numbers, subject.score(rows, batch_tokens=size * max(16, power(tokens.shape[1])))):
            likeliest[number] = found.likeliest[prompt - 1 :]
            logprobs[number] = found.logprobs[prompt - 1 :].sum(dtype=np.float64)
    matches = likeliest == true
    first = _first_mismatch(matches)
    open_ = np.flatnonzero(first < count - 1)  # of the others the pass says all
    sampling = Sampling(max_new_tokens=count)
    for numbers, rows in _batches(open_, tokens[:, :prompt], size):
        new = generate(
            target.model, subject.weights, rows.tolist(), target.mesh, target.region, sampling, _NEVER,
            batch_tokens=size * max(16, power(prompt)),
        )  # fmt: skip
        matches[numbers] = np.array(new[: len(numbers)], np.int32) == true[numbers]
    return matches, logprobs, int((_first_mismatch(matches) != first).sum())


def _batches(numbers: np.ndarray, rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of the rows, ``size`` at a time, with their numbers; the last batch is filled up with its first row."""
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        yield part, rows[np.pad(part, (0, size - len(part)), constant_values=part[0])]


def _first_mismatch(matches: np.ndarray) -> np.ndarray:
    """bool [n, l] -> int [n]; l where all match."""
    return np.where(matches.all(axis=1), matches.shape[1], np.argmin(matches, axis=1))


def _table(
    found: dict[int, Sequences], seen: dict[int, np.ndarray | None], matches: np.ndarray, logprobs: np.ndarray
) -> pa.Table:
    read = [pa.nulls(len(f.positions), pa.bool_()) if seen[c] is None else pa.array(seen[c]) for c, f in found.items()]
    chunks = np.repeat(np.array(list(found), np.int32), [len(f.positions) for f in found.values()])
    positions = np.concatenate([np.empty(0, np.int64), *(f.positions for f in found.values())])
    bits = np.packbits(matches, axis=1, bitorder="little")
    width, bits_buffer = pa.binary(bits.shape[1]), pa.py_buffer(bits.tobytes())
    return pa.table(
        {
            "chunk": pa.array(chunks, pa.int32()),
            "position": pa.array(positions, pa.int64()),
            "source": pa.array([s for f in found.values() for s in f.sources], pa.string()).dictionary_encode(),
            "seen": pa.chunked_array(read, pa.bool_()),
            "matched": pa.array(matches.sum(axis=1).astype(np.int32)),
            "extractable": pa.array(matches.all(axis=1)),
            "first_mismatch": pa.array(_first_mismatch(matches).astype(np.int32)),
            "logprob": pa.array(logprobs),
            "matches": pa.FixedSizeBinaryArray.from_buffers(width, len(bits), [None, bits_buffer]),
        }
    )


def matches_of(table: pa.Table, continuation: int) -> np.ndarray:
    """The column ``matches`` of a result's table as bool [n, l]: bit i of a row, from the lowest, is token i."""
    width = -(-continuation // 8)
    packed = np.frombuffer(b"".join(table["matches"].to_pylist()), np.uint8).reshape(-1, width)
    return np.unpackbits(packed, axis=1, count=continuation, bitorder="little").astype(bool)


def summarize(table: pa.Table, asked: Memorization, latest: int | None, ties: int) -> dict[str, Any]:
    """The figures of a checkpoint's table.

    Returns:
        ``score`` and ``extractable`` over all sequences, over those that the checkpoint had ``seen`` and those
        ``unseen`` (one of which it is not known is in neither), and by source in ``by_source``; lists in ``by_chunk``;
        ``histogram``: sequences by number of matched tokens, 0 … l; ``latest_chunk``: the last that the checkpoint had
        read (None: none, or not known); ``ties``: see `match`.
    """
    chunk, matched = table["chunk"].to_numpy(), table["matched"].to_numpy()
    source = np.array(table["source"].to_pylist(), object)
    scores, extractable = matched / asked.continuation, matched == asked.continuation

    def figures(where: Any) -> dict[str, Any]:
        return {"score": estimate(scores[where]), "extractable": estimate(extractable[where])}

    by_chunk = {int(c): figures(chunk == c) for c in np.unique(chunk)}
    column = lambda name, part: [f[name][part] for f in by_chunk.values()]  # noqa: E731
    seen = np.array(table["seen"].to_pylist(), object)  # None: not known
    return {
        "prompt": asked.prompt,
        "continuation": asked.continuation,
        "latest_chunk": latest,
        **figures(slice(None)),
        "seen": figures(seen == True),  # noqa: E712, of each
        "unseen": figures(seen == False),  # noqa: E712
        "by_chunk": {
            "chunk": list(by_chunk),
            "n": column("score", "n"),
            "score": column("score", "value"),
            "score_stderr": column("score", "stderr"),
            "extractable": column("extractable", "value"),
            "extractable_stderr": column("extractable", "stderr"),
        },
        "by_source": {name: figures(source == name) for name in sorted(set(source))},
        "histogram": np.bincount(matched, minlength=asked.continuation + 1).tolist(),
        "ties": ties,
    }


# ---- what the results of a series say together -----------------------------------------------------------------------


@dataclass
class History:
    """The sequences of all results of a kind, joined.

    Raises:
        UserError: there are none.
    """

    run: Path
    kind: str = KIND
    results: list[Result] = field(default_factory=list)
    """In the order of training; all that the run has, where none are given."""
    keys: np.ndarray = field(init=False)
    """int64 [m, 2]: chunk and position, sorted."""
    matched: np.ndarray = field(init=False)
    """int16 [checkpoints, m]: matched tokens; -1 where a checkpoint was not asked."""

    def __post_init__(self) -> None:
        self.results = self.results or results.of_kind(self.run, self.kind)
        if not self.results:
            raise UserError(f"{self.run}: has no results of {self.kind}; make them first with analyze")
        tables = [r.table("sequences").select(["chunk", "position", "matched"]) for r in self.results]
        keys = [np.stack([t["chunk"].to_numpy(), t["position"].to_numpy()], axis=1, dtype=np.int64) for t in tables]
        self.keys = np.unique(np.concatenate(keys), axis=0)
        places = self._flat(self.keys)
        self.matched = np.full((len(tables), len(self.keys)), -1, np.int16)
        for row, own, table in zip(self.matched, keys, tables):
            row[np.searchsorted(places, self._flat(own))] = table["matched"].to_numpy()

    @staticmethod
    def _flat(keys: np.ndarray) -> np.ndarray:
        return (keys[:, 0] << 40) + keys[:, 1]

    @cached_property
    def continuations(self) -> np.ndarray:
        """int [checkpoints, 1]: l of each result."""
        return np.array([[r.settings["continuation"]] for r in self.results])

    def number(self, chunk: int, position: int) -> int:
        """Where in ``keys`` a sequence is. UserError: no result has it."""
        found = np.flatnonzero((self.keys == (chunk, position)).all(axis=1))
        if not len(found):
            near = self.keys[self.keys[:, 0] == chunk, 1]
            there = f"of chunk {chunk} there are {_some(near)}" if len(near) else f"chunks: {_some(self.keys[:, 0])}"
            raise UserError(f"{self.run}: no result has position {position} of chunk {chunk}; {there}")
        return int(found[0])

    def changed(self, count: int) -> list[tuple[int, int]]:
        """The sequences (chunk, position) whose matched tokens differ most between two checkpoints; those without any
        difference are left out.
        """
        lowest = np.where(self.matched < 0, np.iinfo(np.int16).max, self.matched).min(axis=0)
        change = self.matched.max(axis=0) - lowest
        order = np.argsort(-change, kind="stable")[:count]
        return [(int(c), int(p)) for (c, p), d in zip(self.keys[order], change[order]) if d]


def correlations(run: Path, kind: str = KIND, found: Sequence[Result] = ()) -> dict[str, Any]:
    """Pearson's correlation between checkpoints, over the sequences that both were asked.

    Args:
        run: run directory.
        kind: of the results.
        found: those to compare, in the order of training; all that the run has, where none are given.

    Returns:
        ``names`` of the n checkpoints in the order of training, and matrices [n][n]: ``scores``, ``extractable``
        (None where one of the two does not vary), and ``sequences``, over how many.

    Raises:
        UserError: there are no results.
        RunError: a result cannot be read.
    """
    history = History(run, kind, list(found))
    asked = (history.matched >= 0).astype(np.float64)
    scores = np.where(history.matched >= 0, history.matched, 0) / history.continuations
    extractable = (history.matched == history.continuations).astype(np.float64)
    return {
        "names": [r.checkpoint["name"] for r in history.results],
        "scores": _pearson(scores, asked),
        "extractable": _pearson(extractable, asked),
        "sequences": (asked @ asked.T).astype(int).tolist(),
    }


def _pearson(values: np.ndarray, asked: np.ndarray) -> list[list[float | None]]:
    """Of each two rows, over the columns in which ``asked`` is 1 for both; ``values`` are 0 where it is 0."""
    n = asked @ asked.T
    total = values @ asked.T  # of row i where j was asked too
    square = (values**2) @ asked.T
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = values @ values.T - total * total.T / n
        spread = square - total**2 / n
        found = np.where(np.minimum(spread, spread.T) > 1e-9, shared / np.sqrt(spread * spread.T), np.nan)
    return [[None if np.isnan(v) else float(np.clip(v, -1, 1)) for v in row] for row in found]


def story(
    target: Target, chunk: int, position: int, kind: str = KIND, history: History | None = None
) -> dict[str, Any]:
    """When a sequence was learned and forgotten, and what taught it.

    Args:
        target: the run.
        chunk, position: of the sequence, as in the table ``sequences``; of rows the file's number and the line from 0.
        kind: of the results.
        history: of that kind, if it was read already.

    Returns:
        ``step`` and ``row`` that read it first (None: none of the run, or not known), all ``steps`` that did, the
        ``first_checkpoint`` after the first, ``documents`` of the part that was scored (as `training.trace.RunTracer`
        has them), of each checkpoint the ``matched`` tokens, and the names of the checkpoints where it was ``learned``
        (extractable for the first time) and ``forgotten`` (no longer, for the first time after that).

    Raises:
        UserError: there are no results, or they do not have the sequence.
        RunError: a result or the data cannot be read.
    """
    history = history or History(target.run, kind)
    column = history.matched[:, history.number(chunk, position)]
    checkpoints = [
        {
            "name": r.checkpoint["name"],
            "step": r.checkpoint["step"],
            "matched": int(m),
            "continuation": int(l_),
            "extractable": bool(m == l_),
        }
        for r, m, l_ in zip(history.results, column, history.continuations[:, 0])
        if m >= 0
    ]
    names = [c["name"] for c in checkpoints]
    can = [c["extractable"] for c in checkpoints]
    learned = can.index(True) if any(can) else None
    forgotten = next((n for n in range(learned, len(can)) if not can[n]), None) if learned is not None else None
    settings = history.results[-1].settings
    read: dict[str, Any] = {}
    if "data" in settings and target.trained:
        read = _reading(target, chunk, position)
    length = settings["prompt"] + settings["continuation"]
    return {
        "chunk": chunk,
        "position": position,
        "step": read.get("step"),
        "row": read.get("row"),
        "steps": read.get("steps", []),
        "first_checkpoint": read.get("first_checkpoint"),
        "documents": [d for d in read.get("documents", []) if d["tokens"][0] < length],
        "checkpoints": checkpoints,
        "learned": None if learned is None else names[learned],
        "forgotten": None if forgotten is None else names[forgotten],
        "extractable": [n for n, c in zip(names, can) if c],
    }


def story_lines(told: dict[str, Any], width: int = 100) -> list[str]:
    """A story as a person reads it."""
    read = "read by no known step" if told["step"] is None else f"step {told['step']} row {told['row']}"
    read += f", again at {', '.join(map(str, told['steps'][1:]))}" if told["steps"][1:] else ""
    after = f", first checkpoint after it {told['first_checkpoint']}" if told["first_checkpoint"] else ""
    learned = f"extractable first at {told['learned']}" if told["learned"] else "never extractable"
    forgotten = f", no longer at {told['forgotten']}" if told["forgotten"] else ""
    text = [f"chunk {told['chunk']} position {told['position']}: {read}{after}; {learned}{forgotten}"]
    for d in told["documents"]:
        shown = " ".join(d["text"].split())
        shown = shown if len(shown) <= width else shown[: width - 1] + "…"
        text.append(f"  {d['document'] or '{source} {file}:{line}'.format(**d)}  {shown}")
    scores = (f"{c['name']} {c['matched']}/{c['continuation']}{'*' * c['extractable']}" for c in told["checkpoints"])
    text.append("  " + "  ".join(scores))
    return text


def _reading(target: Target, chunk: int, position: int) -> dict[str, Any]:
    """The steps that read a sample of the run, and its documents."""
    if found := _readers(target, chunk, position):
        return {**target.tracer.step(*found[0])[0], "steps": list(dict.fromkeys(step for step, _ in found))}
    (sample, *_) = target.tracer.sample(*_origin(target, chunk, position))
    return {**sample, "step": None, "row": None, "first_checkpoint": None}


def _readers(target: Target, chunk: int, position: int) -> list[tuple[int, int]]:
    """Each (step, row) that read what a run has at a place, wherever else it has the same sample: `Target.readers`."""
    return target.readers(*_origin(target, chunk, position))


def _origin(target: Target, chunk: int, position: int) -> tuple[int, int]:
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


# ---- where sequences come from ---------------------------------------------------------------------------------------


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


def _chosen(text: str, chunks: list[int]) -> list[int]:
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
        raise UserError(f"memorization: --chunks {text!r} chooses none; there are {_some(chunks)}")
    return found


def _some(numbers: Any) -> str:
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


def _read_rows(path: Path, chunk: int, vocab_size: int, settings: Memorization) -> Sequences:
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


def _sequences(numbers: list[int], tokens: list[Any], sources: list[str], settings: Memorization) -> Sequences:
    return Sequences(np.array(numbers), np.array([t[: settings.length] for t in tokens], np.int32), sources)


def _reduced(path: Path, line: int, text: bytes, vocab_size: int, settings: Memorization) -> tuple[list[int], str]:
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


def _check_length(path: Path, line: int, ids: Sequence[int], settings: Memorization) -> None:
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
