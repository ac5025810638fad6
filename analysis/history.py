"""What results of memorization say together: correlation of checkpoints, and the story of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis import results
from analysis.results import Result
from analysis.sequences import origin_of, readers_of, some
from analysis.subject import Target
from errors import UserError

KIND = "memorization"


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
            there = f"of chunk {chunk} there are {some(near)}" if len(near) else f"chunks: {some(self.keys[:, 0])}"
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
    if found := readers_of(target, chunk, position):
        return {**target.tracer.step(*found[0])[0], "steps": list(dict.fromkeys(step for step, _ in found))}
    (sample, *_) = target.tracer.sample(*origin_of(target, chunk, position))
    return {**sample, "step": None, "row": None, "first_checkpoint": None}
