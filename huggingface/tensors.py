"""What a weight file says of one tensor, and reading it: the bytes asked for and no others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeGuard

import numpy as np

from errors import RunError

_MAX_AXES = 32
_PIECE = 2**26  # bytes read at once from a tensor whose elements are not in order


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte of the file at which the first element begins."""
    strides: tuple[int, ...] | None = None
    """Elements between neighbours along each axis; None if all lie in C order without gaps."""

    @property
    def nbytes(self) -> int:
        """Size of the array that `read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_shape(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a value from a file can be the shape of an array."""
    return (
        isinstance(value, list | tuple)
        and len(value) <= _MAX_AXES
        and all(type(n) is int and n >= 0 for n in value)
        and math.prod(max(n, 1) for n in value) < 2**59  # more elements have no 64-bit size, whatever the dtype
    )


def read(info: TensorInfo) -> np.ndarray:
    """A tensor as a new C-contiguous array; safe in threads.

    Reads into the array itself: what is held in memory is that array, and at most 64 MB or one slice of it besides.

    Raises:
        RunError: the file cannot be read any more, or became shorter.
    """
    array = np.empty(info.shape, info.dtype)
    if not array.size:
        return array
    try:
        with open(info.file, "rb", buffering=0) as file:
            if info.strides is None:
                _fill(array, file, info.offset)
            else:
                _gather(array, file, info.offset, info.strides)
    except OSError as e:
        raise RunError(f"{info.file}: cannot be read ({e.strerror})") from e
    return array


def _gather(array: np.ndarray, file: FileIO, offset: int, strides: tuple[int, ...]) -> None:
    """Fill an array with elements that lie in another order: in the file's order, piece by piece."""
    order = sorted(range(array.ndim), key=lambda axis: -strides[axis])
    target, strides = array.transpose(order), tuple(strides[axis] for axis in order)
    size = array.dtype.itemsize
    step = max(1, _PIECE // (size * max(strides[0], 1)))
    for start in range(0, target.shape[0], step):
        part = target[start : start + step]
        piece = np.empty(1 + sum((n - 1) * s for n, s in zip(part.shape, strides)), array.dtype)
        _fill(piece, file, offset + start * strides[0] * size)
        part[...] = np.lib.stride_tricks.as_strided(piece, part.shape, [s * size for s in strides])


def _fill(array: np.ndarray, file: FileIO, offset: int) -> None:
    file.seek(offset)
    view = raw_bytes(array)
    while view:  # one call reads at most 2 GiB
        count = file.readinto(view)
        if not count:
            raise RunError(f"{file.name}: became shorter after it was opened; leave it alone and start again")
        view = view[count:]


def raw_bytes(array: np.ndarray) -> memoryview:
    """The memory of a C-contiguous array; ml_dtypes' have no buffer protocol of their own."""
    return array.reshape(-1).view(np.uint8).data
