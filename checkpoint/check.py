"""Whether a checkpoint is what its manifest says, and how two differ: from their files alone, a piece at a time.

A manifest has its files' SHA-256, and digests of the numbers in them (`checkpoint.digest`). The first tell a damaged
file; the second tell what those cannot: files and a manifest that fit one another, and hold other weights.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import arrays, digest, files
from checkpoint.manifest import FILE, Entry
from checkpoint.series import Series, line
from checkpoint.tensors import Tensors
from errors import RunError, UserError

_PIECE_BYTES = 64 * 2**20  # read at a time; one chunk of an array where that is larger
_BATCH_BYTES = 2**30  # hashed before they are read again; an array where that is larger
_BLOCK = 2**20  # numbers widened to float64 at a time
_COPY = "params_bfloat16"


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found out about one checkpoint."""

    problems: tuple[str, ...]
    """Sentences that name its folder; none if it is what its manifest says."""
    digests: dict[str, str]
    """Item -> digest of all its arrays, from their files; without items that cannot be read or are damaged."""
    vouched: bool
    """Whether the manifest has a digest of every array, so that the numbers could be compared too."""


def check(entry: Entry) -> Checked:
    """Read a whole checkpoint; compare its files with their SHA-256, and its numbers with their digests.

    It goes a few arrays at a time, so that the second reading of a file finds it in the system's cache.
    """
    tensors = entry.manifest.tensors
    damage: list[str] = []
    problems: list[str] = []
    digests: dict[str, str] = {}  # by "ITEM/NAME"
    rounded: dict[str, str] = {}  # those that copies should have
    try:
        for batch, wrong in _files(entry):
            damage += wrong
            for array in batch:
                if any(text.startswith(f"{array}/") for text in wrong):
                    continue
                copy = f"{_COPY}/{array.removeprefix('params/')}"
                kinds = {name: tensors[name]["dtype"] for name in (array, copy) if name in tensors}
                try:
                    found = dict(zip(kinds, _digests(entry, array, list(kinds.values())), strict=True))
                except RunError as e:
                    problems.append(str(e))
                    continue
                digests[array] = found.pop(array)
                rounded |= found
    except OSError as e:
        problems.append(f"{entry.path}: cannot be read: {e}")
    if damage:
        problems.insert(0, str(files.damaged(entry.path, damage)))
    if other := [name for name, value in digests.items() if value != tensors[name].get("digest", value)]:
        problems.append(f"{entry.path}: does not hold the numbers that were saved (digest differs): {_few(other)}")
    if other := [name for name, value in rounded.items() if value != digests.get(name, value)]:
        problems.append(f"{entry.path}: is not the rounded copy of the parameters: {_few(other)}")
    whole = {}
    for item in arrays.ITEMS:
        names = [name for name in tensors if name.startswith(f"{item}/")]
        claimed = {name: tensors[name]["digest"] for name in names if "digest" in tensors[name]}
        if entry.manifest.digests.get(item) not in (None, _whole(claimed)):
            problems.append(f"{entry.path}: the manifest's digest of {item} is not that of the arrays in its list")
        if names and digests.keys() >= set(names):
            whole[item] = _whole({name: digests[name] for name in names})
    return Checked(tuple(problems), whole, all("digest" in t for t in tensors.values()))


def _files(entry: Entry) -> Iterator[tuple[list[str], list[str]]]:
    """Some arrays, and what is wrong with their files, until all are done; first of no array, the files of none."""
    expected, there = entry.manifest.files, set(files.listing(entry.path))
    changed = FILE not in there or files.hashes(entry.path, [FILE])[FILE]["sha256"] != entry.sha256
    by_array: dict[str, set[str]] = {"": set(), **{name: set() for name in entry.manifest.tensors}}
    for file in {*expected, *there} - {FILE}:
        array = "/".join(file.split("/")[:2])
        by_array[array if array in by_array else ""].add(file)

    def wrong(names: set[str]) -> list[str]:
        return files.differences(entry.path, {n: expected[n] for n in names & expected.keys()}, names & there)

    yield [], [f"{FILE} has changed"] * changed + wrong(by_array.pop(""))
    batch: dict[str, set[str]] = {}
    size = 0
    for array, names in by_array.items():
        batch[array] = names
        size += sum(expected[name]["bytes"] for name in names & expected.keys())
        if size >= _BATCH_BYTES:
            yield list(batch), wrong(set().union(*batch.values()))
            batch, size = {}, 0
    yield list(batch), wrong(set().union(*batch.values()))


def _digests(entry: Entry, array: str, dtypes: Sequence[str]) -> list[str]:
    """Digests of an array, from its files, as it is rounded to each dtype."""
    item, _, name = array.partition("/")
    lazy = Tensors(entry, item, verify=False)[name]
    strides = [math.prod(lazy.shape[axis + 1 :]) for axis in range(len(lazy.shape))]
    lanes = [np.zeros(4, np.uint32) for _ in dtypes]
    for box in boxes(entry, array, lazy.shape):
        piece = lazy[box]
        offset = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
        for n, dtype in enumerate(dtypes):
            part = piece.astype(dtype, copy=False)
            lanes[n] += digest.partial(part, offset, strides, entry.manifest.digest_version)
    return [digest.finish(name, lazy.shape, dtype, sums) for dtype, sums in zip(dtypes, lanes, strict=True)]


def boxes(entry: Entry, array: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array that cover it, of whole chunks, so that each file is read once."""
    try:
        store = arrays.open_array(entry.path / array)
    except Exception as e:  # tensorstore has no error type of its own
        raise RunError(f"{entry.path}: {array} cannot be read: {files.reason(e)}") from e
    if (there := (store.shape, store.dtype.name)) != (shape, entry.manifest.tensors[array]["dtype"]):
        raise RunError(f"{entry.path}: {array} is {there[1]} {list(there[0])} on the disk, not as the manifest says")
    chunk: Any = store.chunk_layout.write_chunk.shape or ()
    steps = list(chunk)
    most = _PIECE_BYTES // store.dtype.numpy_dtype.itemsize
    for axis in reversed(range(len(shape))):
        steps[axis] = max(1, min(steps[axis] * max(1, most // max(1, math.prod(steps))), shape[axis]))
    for starts in itertools.product(*(range(0, n, step) for n, step in zip(shape, steps, strict=True))):
        yield tuple(slice(at, min(at + step, n)) for at, step, n in zip(starts, steps, shape, strict=True))


def _whole(digests: Mapping[str, str]) -> str:
    """The digest of an item from those of its arrays by "ITEM/NAME"."""
    return digest.whole({name.partition("/")[2]: value for name, value in digests.items()})


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" (and {len(names) - 5} more)" if len(names) > 5 else "")


# ---- how two differ ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """How an array of one checkpoint differs from the same array of another."""

    name: str
    numbers: int
    """Elements of the array."""
    norm: float
    """L2, of the first."""
    change: float
    """L2, of the difference."""
    largest: float
    """Absolute difference of two elements."""
    differing: int
    """Elements that are not equal."""

    @property
    def relative(self) -> float | None:
        """The change over the norm; None where that is 0."""
        return self.change / self.norm if self.norm else None

    def row(self) -> dict[str, Any]:
        """Plain values; None for one that is not finite."""
        values = {**dataclasses.asdict(self), "relative": self.relative}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def diff(a: Entry, b: Entry) -> list[Change]:
    """Compare the parameters of two checkpoints in float64, array by array; each file is verified before it is read.

    Raises:
        UserError: they are not of the same names and shapes.
        RunError: a file is damaged or cannot be read.
    """
    first, second = Tensors(a), Tensors(b)
    both = f"{a.path} and {b.path} are of different models"
    if alone := sorted(first.keys() ^ second.keys()):
        raise UserError(f"{both}: only one of them has {_few(alone)}")
    for name, x in first.items():
        if x.shape != second[name].shape:
            raise UserError(f"{both}: {name} is {list(x.shape)} and {list(second[name].shape)}")
    changes = []
    for name, x in first.items():
        square = change = largest = 0.0
        differing = 0
        for box in boxes(a, f"params/{name}", x.shape):
            left, right = x[box].reshape(-1), second[name][box].reshape(-1)
            for at in range(0, left.size, _BLOCK):
                old, new = (part[at : at + _BLOCK].astype(np.float64) for part in (left, right))
                delta = new - old
                square, change = square + float(old @ old), change + float(delta @ delta)
                largest = float(np.maximum(largest, np.abs(delta).max()))  # not a number stays so
                differing += int(np.count_nonzero((old != new) & ~(np.isnan(old) & np.isnan(new))))
        changes.append(Change(name, math.prod(x.shape), math.sqrt(square), math.sqrt(change), largest, differing))
    return changes


def total(changes: Sequence[Change]) -> Change:
    """All arrays as if they were one."""
    return Change(
        "total",
        sum(c.numbers for c in changes),
        math.hypot(*(c.norm for c in changes)),
        math.hypot(*(c.change for c in changes)),
        float(np.max([c.largest for c in changes], initial=0.0)),
        sum(c.differing for c in changes),
    )


def table(changes: Sequence[Change]) -> list[str]:
    """Changes and their total as a person reads them."""
    rows = [*changes, total(changes)]
    width = max(len(c.name) for c in rows)
    lines = [f"{'':{width}} {'norm':>10} {'change':>10} {'relative':>10} {'largest':>10}  numbers that differ"]
    for c in rows:
        relative = "-" if c.relative is None else f"{c.relative:.3e}"
        cells = f"{c.norm:>10.4g} {c.change:>10.3e} {relative:>10} {c.largest:>10.3e}"
        lines.append(f"{c.name:{width}} {cells}  {c.differing:,} of {c.numbers:,}")
    return lines


# ---- the list ------------------------------------------------------------------------------------------------------


def rebuild(run: Path) -> int:
    """Write a run's ``series.jsonl`` anew from the manifests; return the number of its lines.

    Raises:
        UserError: another process writes in the run.
        RunError: a manifest is damaged, or the list cannot be written.
    """
    lock = files.lock(run)
    try:
        entries = Series(run).entries()
        files.write_atomically(run / "series.jsonl", "".join(map(line, entries)))
    except OSError as e:
        raise RunError(f"{run}/series.jsonl: cannot be written ({e.strerror}); free some disk space") from e
    finally:
        lock.release()
    return len(entries)
