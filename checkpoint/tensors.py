"""Arrays of a checkpoint, read from the disk only where they are looked at, without Orbax and without devices."""

import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoint import arrays, files
from checkpoint.manifest import Entry
from checkpoint.names import layer_of
from errors import RunError, UserError


class UnknownTensor(UserError, KeyError):
    """No array has this name."""

    __str__ = Exception.__str__  # KeyError would put it in quotes


class Tensors(Mapping[str, "Lazy"]):
    """The arrays of one item of a checkpoint by dotted name, the stacked ones also layer by layer.

        Tensors(entry)["layers.attention.wq"][7, :128]  # of [L, D, H, K]
        Tensors(entry)["layers.7.attention.wq"][:128]   # the same

    Args:
        entry: the checkpoint.
        item: "params" or "optimizer".
        verify: compare each file with the manifest before it is read for the first time.

    Raises:
        UserError: it has no such item.
    """

    def __init__(self, entry: Entry, item: str = "params", verify: bool = True):
        names = [name for name in entry.manifest.tensors if name.startswith(f"{item}/")]
        if not names:
            raise UserError(f"{entry.path}: holds no {item}")
        self._entry = entry
        self._arrays = {name.partition("/")[2]: _Array(entry, name, verify) for name in names}

    def __getitem__(self, name: str) -> "Lazy":
        if name in self._arrays:
            return Lazy(self._arrays[name])
        stack, layer = layer_of(name) or ("", 0)
        if stack not in self._arrays:
            raise UnknownTensor(f"{self._entry.path}: has no {name}; there are {', '.join(self._arrays)}")
        if layer >= (count := self._arrays[stack].shape[0]):
            raise UnknownTensor(f"{self._entry.path}: has no {name}; the layers of {stack} are 0 to {count - 1}")
        return Lazy(self._arrays[stack], (layer,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Lazy:
    """An array on the disk: ``[...]`` reads all of it, ``[3, :8]`` no more than the files with that part.

    Indices are numpy's integers, slices and ellipsis.

    Raises:
        IndexError: the index is outside of it.
        RunError: a file is damaged or cannot be read.
    """

    def __init__(self, array: "_Array", layer: tuple[int, ...] = ()):
        self._array, self._layer = array, layer
        self.shape = array.shape[len(layer) :]
        self.dtype = array.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._array.read((*self._layer, *(index if isinstance(index, tuple) else (index,))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype} {list(self.shape)})"


class _Array:
    def __init__(self, entry: Entry, name: str, verify: bool):
        self.shape: tuple[int, ...] = tuple(entry.manifest.tensors[name]["shape"])
        self.dtype = np.dtype(entry.manifest.tensors[name]["dtype"])
        self._entry, self._name, self._verify = entry, name, verify
        self._verified: set[str] = set()

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        ranges, after = _ranges(index, self.shape)
        if not all(map(len, ranges)):
            return np.empty([len(r) for r in ranges], self.dtype)[after]
        try:
            self._check(["zarr.json"])
            store = arrays.open_array(self._entry.path / self._name)
            chunk: Any = store.chunk_layout.write_chunk.shape or ()
            cells = [range(r[0] // c, r[-1] // c + 1) for r, c in zip(ranges, chunk)]
            self._check(["/".join(map(str, ("c", *cell))) for cell in itertools.product(*cells)])
            part = store[tuple(slice(r.start, r.stop, r.step) for r in ranges)]
            return np.asarray(part.read().result()[after])
        except RunError:
            raise
        except Exception as e:  # tensorstore has no error type of its own
            raise RunError(f"{self._entry.path}: {self._name} cannot be read: {files.reason(e)}") from e

    def _check(self, names: list[str]) -> None:
        """Compare files of the array with the manifest, if they were not before."""
        root, expected = self._entry.path, self._entry.manifest.files
        new = {f"{self._name}/{name}" for name in names} - self._verified
        if self._verify and new:
            known = {name: expected[name] for name in new & expected.keys()}
            if problems := files.differences(root, known, [name for name in new if (root / name).exists()]):
                raise files.damaged(root, problems)
            self._verified |= new


def _ranges(index: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[list[range], tuple[Any, ...]]:
    """An upward range along every axis, and how to index what they select for what was asked for."""
    if (missing := len(shape) - sum(part is not Ellipsis for part in index)) < 0:
        raise IndexError(f"{len(index)} indices for an array of shape {list(shape)}")
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    whole = [*index[:at], *[slice(None)] * missing, *index[at + 1 :]]
    ranges: list[range] = []
    after: list[slice | int] = []
    for part, size in zip(whole, shape, strict=True):
        if isinstance(part, slice):
            chosen = range(size)[part]
            ranges.append(chosen if chosen.step > 0 else chosen[::-1])
            after.append(slice(None, None, 1 if chosen.step > 0 else -1))
        else:
            start = range(size)[operator.index(part)]
            ranges.append(range(start, start + 1))
            after.append(0)
    return ranges, tuple(after)
