"""Weights over time: how large every tensor is, and how far it has moved, read from the files a piece at a time.

Two kinds of results. ``weights`` compares a checkpoint with the one before it in the series, which stays what it is
when the run goes on. ``weights-to/NAME`` compares it with one checkpoint, the last as a rule: when the series has
grown, the last is another one, and its comparisons get a folder of their own.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import results
from analysis.results import Scored
from analysis.subject import Subject, Target
from checkpoint.manifest import Entry
from checkpoint.names import stacked
from checkpoint.series import Series
from errors import RunError, UserError

VERSION = 1
GROUPS = ("embedding", "attention", "mlp", "norms", "head", "other")
_BLOCK = 2**13  # numbers widened to float64 at a time: in the cache, and too few for BLAS to start threads for


@dataclass(frozen=True)
class Weights:
    """Norms of the weights, and how far they moved since the checkpoint before and are from the last one."""

    to: str = "last"
    """Checkpoint that each is compared with besides the one before it: name or number, `last` or `none`."""

    def open(self, target: Target, note: Callable[[str], None]) -> list[Any]:
        """The studies. Raises UserError where there is no such checkpoint."""
        series = Series(target.run, {})  # without those whose manifest is damaged, which a sweep leaves out
        entries = series.entries()
        _drop_stale(target, entries, note)
        if self.to == "none":
            return [Moved(series)]
        found = entries[-1:] if self.to == "last" else [e for e in entries if self.to in _names(e)]
        if len(found) != 1:
            named = ", ".join(e.manifest.name for e in entries[:3])
            raise UserError(
                f"--to {self.to!r}: {len(found)} checkpoints of {target.run} are called so; give last, none, or one of "
                f"{named}{', …' if len(entries) > 3 else ''}"
            )
        return [Moved(series), Compared(found[0])]


@dataclass(frozen=True, eq=False)
class Moved:
    """Each checkpoint by itself, and against the one before it in the series."""

    series: Series
    """Keeps the manifests that it has read, so that each is read once in a sweep."""
    kind = "weights"
    needs_weights = False

    def settings(self) -> Mapping[str, Any]:
        """Only the form; of which checkpoint it is the successor, a result says itself."""
        return {"version": VERSION}

    def score(self, subject: Subject) -> Scored:
        """Summary: `Sums.figures` of the whole model and by group, and "previous". Table ``tensors``: of each tensor.

        Raises:
            RunError: a file is damaged, or the one before has other tensors.
        """
        before = previous(subject.entry, self.series.entries())
        rows = measure(subject.entry, before)
        named = {"update": "update", "cosine": "cosine_previous"} if before else {}
        return Scored({**_summary(rows, named), "previous": _named(before)}, {"tensors": _table(rows, named)})


@dataclass(frozen=True, eq=False)
class Compared:
    """Each checkpoint against one."""

    reference: Entry
    needs_weights = False

    @property
    def kind(self) -> str:
        """Has the name of what is compared with."""
        return f"weights-to/{self.reference.manifest.name}"

    def settings(self) -> Mapping[str, Any]:
        """With the digest of what is compared with."""
        return {"version": VERSION, "reference": _named(self.reference)}

    def score(self, subject: Subject) -> Scored:
        """Summary and table as those of `Moved`, with "distance" and "cosine" to the reference.

        Raises:
            RunError: a file is damaged, or the two have not the same tensors.
        """
        rows = measure(subject.entry, self.reference)
        named = {"update": "distance", "cosine": "cosine"}
        return Scored({**_summary(rows, named), "reference": _named(self.reference)}, {"tensors": _table(rows, named)})


@dataclass(frozen=True)
class Sums:
    """What one pass over a tensor leaves, in float64: w is of the checkpoint, o of the other one."""

    numbers: int = 0
    square: float = 0.0
    """Sum of w²."""
    largest: float = 0.0
    """Largest |w|."""
    other: float = 0.0
    """Sum of o²."""
    dot: float = 0.0
    """Sum of w·o."""
    change: float = 0.0
    """Sum of (w - o)²."""

    def __add__(self, more: "Sums") -> "Sums":
        added = [a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(more), strict=True)]
        largest = float(np.maximum(self.largest, more.largest))  # not a number stays so
        return dataclasses.replace(Sums(*added), largest=largest)

    def figures(self) -> dict[str, Any]:
        """numbers; norm (L2), rms, largest (absolute); update |w - o| / |o|, cosine; None where not finite."""
        values = {
            "norm": _root(self.square),
            "rms": _root(self.square / self.numbers) if self.numbers else 0.0,
            "largest": self.largest,
            "update": _root(self.change) / _root(self.other) if self.other else math.nan,
            "cosine": self.dot / (_root(self.square) * _root(self.other)) if self.square and self.other else math.nan,
        }
        return {"numbers": self.numbers, **{k: v if math.isfinite(v) else None for k, v in values.items()}}


def measure(entry: Entry, other: Entry | None) -> dict[str, Sums]:
    """Sums of every tensor by its name, those of a stack layer by layer; without another, of the weights alone.

    No more is in memory than a piece of an array (64 MB, or one chunk of it on the disk) of each checkpoint.

    Raises:
        RunError: a file is damaged or cannot be read; the two do not have the same names and shapes.
    """
    from checkpoint.check import boxes
    from checkpoint.tensors import Tensors

    try:
        first, second = Tensors(entry), Tensors(other) if other else None
    except UserError as e:
        raise RunError(str(e)) from e
    if second is not None and {n: x.shape for n, x in first.items()} != {n: x.shape for n, x in second.items()}:
        assert other is not None
        raise RunError(f"{entry.path} and {other.path} do not have the same tensors; compare them with --to none")
    found: dict[str, Sums] = {}
    for name, array in first.items():
        for box in boxes(entry, f"params/{name}", array.shape):
            piece, old = array[box], second[name][box] if second else None
            layers = range(box[0].start, box[0].stop) if stacked(name) else [None]
            for n, layer in enumerate(layers):
                at = name if layer is None else _of_layer(name, layer)
                part = piece if layer is None else piece[n]
                before = None if old is None else old if layer is None else old[n]
                found[at] = found.get(at, Sums()) + _sums(part, before)
    return found


def previous(entry: Entry, entries: Iterable[Entry]) -> Entry | None:
    """The checkpoint of the series before one; None for the first."""
    m = entry.manifest
    # Checkpoints that are not of the series have the index of the newest one of it.
    before = [e for e in entries if e.manifest.index + (m.kind == "series") <= m.index and e.path != entry.path]
    return max(before, key=lambda e: e.manifest.index, default=None)


def group_of(name: str) -> str:
    """Part of the model that a tensor belongs to, one of `GROUPS`."""
    parts = name.split(".")
    if any("norm" in p for p in parts):
        return "norms"
    return next((g for g in GROUPS if g in parts), "other")


def _sums(new: np.ndarray, old: np.ndarray | None) -> Sums:
    new, total = np.asarray(new).reshape(-1), Sums()
    flat = None if old is None else np.asarray(old).reshape(-1)
    for at in range(0, new.size, _BLOCK):
        w = new[at : at + _BLOCK].astype(np.float64)
        more = Sums(w.size, float(w @ w), float(np.maximum(w.max(), -w.min())))
        if flat is not None:
            o = flat[at : at + _BLOCK].astype(np.float64)
            delta = w - o
            more = dataclasses.replace(more, other=float(o @ o), dot=float(w @ o), change=float(delta @ delta))
        total += more
    return total


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan  # comparisons with what is not a number are false


def _of_layer(name: str, layer: int) -> str:
    head, _, tail = name.partition("layers.")
    return f"{head}layers.{layer}.{tail}"


def _summary(rows: Mapping[str, Sums], named: Mapping[str, str]) -> dict[str, Any]:
    groups = {g: sum((s for n, s in rows.items() if group_of(n) == g), Sums()) for g in GROUPS}
    whole = sum(rows.values(), Sums())
    parts = {g: _rename(s, named) for g, s in groups.items() if s.numbers}
    return {**_rename(whole, named), "groups": parts}


def _rename(sums: Sums, named: Mapping[str, str]) -> dict[str, Any]:
    """Figures under the names that a result has for them; without the comparison where it names none."""
    values = sums.figures()
    shown = {k: values[k] for k in ("numbers", "norm", "rms", "largest")}
    return shown | {new: values[old] for old, new in named.items()}


def _table(rows: Mapping[str, Sums], named: Mapping[str, str]) -> pa.Table:
    return pa.Table.from_pylist([{"tensor": n, "group": group_of(n), **_rename(s, named)} for n, s in rows.items()])


def _named(entry: Entry | None) -> dict[str, str] | None:
    return {"name": entry.manifest.name, "digest": results.digest_of(entry)} if entry else None


def _names(entry: Entry) -> set[str]:
    return {entry.manifest.name, str(entry.manifest.index)}


def _drop_stale(target: Target, entries: list[Entry], note: Callable[[str], None]) -> None:
    """Remove results against another checkpoint than the one that is before theirs now: a gap has been filled.

    As with a result of other weights of the same name, it says nothing of the series any more, and is made anew.
    """
    chosen = {e.manifest.name: e for e in target.series.resolve(target.selector)}
    for kind in results.kinds(target.run):
        if not re.fullmatch(f"{Moved.kind}(-[A-Za-z0-9_.]+)?", kind):
            continue
        for result in results.of_kind(target.run, kind):
            entry = chosen.get(result.path.stem)
            if entry and result.summary.get("previous") != (now := _named(previous(entry, entries))):
                before = now["name"] if now else "nothing"
                note(f"{result.path}: is not against {before}, which is before it now; made anew")
                result.path.unlink(missing_ok=True)
