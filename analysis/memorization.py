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

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import results
from analysis.history import KIND, History, story, story_lines
from analysis.results import Scored, estimate
from analysis.sequences import RowFiles, RunChunks, Sequences, chosen_chunks
from analysis.subject import Subject, Target
from analysis.sweep import Study
from errors import RunError, UserError
from inference.batches import power
from inference.sampling import Sampling

_VERSION = 2  # of what a result holds
_BATCH_TOKENS = 16384  # positions scored, or in caches, at a time, about
_NEVER = -1  # an end token that no model generates


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
        chosen_chunks(self.chunks, [])

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
    from inference.forward import batch_ways
    from inference.generate import generate

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
