"""A checkpoint written piece by piece, as `checkpoint.writer.SeriesWriter.stream` hands it out.

Orbax makes the folder and its own metadata (`checkpoint.arrays.declare`). The chunks of the arrays are files of plain
numbers, written here.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import arrays, files
from checkpoint.manifest import Entry
from checkpoint.names import stacked
from checkpoint.tensors import Tensors
from errors import RunError, UserError

_IN_FLIGHT = 256 * 2**20  # bytes
_THREADS = 4


class Stream:
    """A checkpoint of parameters to be; use it from one thread.

    Args:
        entry: its folder, which does not exist, and manifest without ``files``.
        failed: makes the error for people from that of a write.
    """

    digests: Mapping[str, str]
    """From `checkpoint.digest`, by name; set it and they go into the manifest."""
    origin: dict[str, Any] | None
    """That of the manifest, if it is set."""

    def __init__(self, entry: Entry, failed: Callable[[Path, Exception], RunError]):
        self.digests, self.origin = {}, None
        self._entry, self._failed = entry, failed
        self._declared = {
            name.partition("/")[2]: (tuple(t["shape"]), np.dtype(t["dtype"]))
            for name, t in entry.manifest.tensors.items()
        }
        # Parts not yet given: of a stacked array its layers, of another the whole.
        self._left = {name: set(_parts(name, shape)) for name, (shape, _) in self._declared.items()}
        self._writes: deque[tuple[int, Future[None]]] = deque()
        self._pool = ThreadPoolExecutor(_THREADS, "stream")
        try:
            arrays.declare(entry.path, "params", self._declared)
        except Exception as e:
            raise failed(entry.path, e) from e

    def write(self, name: str, index: tuple[int, ...], array: Any) -> None:
        """Give an array, or one layer of it, in any order. It goes to the disk in other threads: do not change it.

        Args:
            name: a declared one.
            index: ``(7,)`` for layer 7 of a stacked array, ``()`` for all of any array.
            array: of the declared dtype and shape, without the first axis for one layer.

        Raises:
            UserError: it is not a declared part, or was given before.
            RunError: it, or what was given before, cannot be written.
        """
        if name not in self._declared:
            raise UserError(f"{self._entry.path}: {name} was not declared; there are {', '.join(self._declared)}")
        shape, dtype = self._declared[name]
        parts = [index] if index else _parts(name, shape)
        if unknown := set(parts) - set(_parts(name, shape)):
            raise UserError(f"{self._entry.path}: {name} has no part {unknown.pop()} among {_few(_parts(name, shape))}")
        if again := set(parts) - self._left[name]:
            raise UserError(f"{self._entry.path}: {name} {_few(again)} was written before; write every part once")
        array = np.asarray(array)
        if (array.shape, array.dtype) != (shape[len(index) :], dtype):
            raise UserError(
                f"{self._entry.path}: {name} {index} is {array.dtype} {list(array.shape)}, "
                f"expected {dtype} {list(shape[len(index) :])}"
            )
        chunk = arrays.chunks(name, shape, dtype)
        array = array[(None,) * len(index)]
        for cell in itertools.product(*(range(-(-n // c)) for n, c in zip(array.shape, chunk))):
            part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(cell, chunk))]
            self._put("/".join(map(str, ("params", name, "c", *index, *cell[len(index) :]))), part, chunk)
        self._left[name] -= set(parts)

    def tensors(self) -> Tensors:
        """What was given, to be read back from the disk; to read what was not is an error."""
        self._wait(0)
        return Tensors(self._entry, verify=False)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for the disk; returns the manifest's ``files``.

        Raises:
            UserError: a part was never given.
            RunError: one cannot be written.
        """
        if missing := [f"{name} {_few(left)}" for name, left in self._left.items() if left]:
            more = f" (and {len(missing) - 5} more arrays)" if len(missing) > 5 else ""
            raise UserError(f"{self._entry.path}: is not whole, never written: {'; '.join(missing[:5])}{more}")
        self._wait(0)
        try:
            return files.hashes(self._entry.path, files.listing(self._entry.path))
        except OSError as e:
            raise self._failed(self._entry.path, e) from e

    def close(self) -> None:
        """Give up what is not yet being written."""
        self._pool.shutdown(cancel_futures=True)

    def _put(self, file: str, part: np.ndarray, chunk: tuple[int, ...]) -> None:
        size = math.prod(chunk) * part.dtype.itemsize
        self._wait(_IN_FLIGHT - size)
        data = np.ascontiguousarray(part)
        if part.shape != chunk:  # at an edge
            data = np.zeros(chunk, part.dtype)
            data[tuple(map(slice, part.shape))] = part
        future = self._pool.submit(_write, self._entry.path / file, data.reshape(-1).view(np.uint8).data)
        self._writes.append((size, future))

    def _wait(self, most: int) -> None:
        """Until at most so many bytes are on their way to the disk."""
        while self._writes and sum(size for size, _ in self._writes) > most:
            _, future = self._writes[0]
            try:
                future.result()
            except OSError as e:  # and again whenever asked, so that nobody commits without this file
                raise self._failed(self._entry.path, e) from e
            self._writes.popleft()


def _write(path: Path, data: memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb", buffering=0) as file:
        left = data
        while left:  # Linux writes at most 2 GiB at once
            left = left[file.write(left) :]
        os.fsync(file.fileno())  # in this thread, beside the next part: a manifest must not outlive what it describes


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(i,) for i in range(shape[0])] if stacked(name) else [()]


def _few(parts: Any) -> str:
    shown = sorted(parts)
    return ", ".join(map(str, shown[:3])) + (f" … {shown[-1]} ({len(shown)} in all)" if len(shown) > 3 else "")
