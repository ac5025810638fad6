"""Writing a folder of safetensors, tensor by tensor in any order, that is there whole or not at all."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np

from checkpoint.files import write_atomically
from errors import RunError, UserError
from huggingface import safetensors
from huggingface.tensors import raw_bytes

_PYTORCH = MappingProxyType({"format": "pt"})  # transformers refuses files that say nothing here
_INDEX = "model.safetensors.index.json"
_PIECE = 2**30  # Linux writes at most 2 GiB at once

_Described = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class FolderWriter:
    """Writes a new folder as ``PATH.part``, which `commit` renames; use it in a ``with`` statement.

    Whatever ends that statement without a `commit` leaves nothing behind. What a killed process left, the next writer
    of the same folder replaces.

    Args:
        path: the folder to be; its parents are made.
        tensors: dtype and shape of every tensor by its name.
        shard_bytes: a file is full when the next tensor would exceed this; a larger tensor has a file of its own.
        metadata: goes into every file.

    Raises:
        UserError: the folder exists and holds something, or ``shard_bytes`` is below 1.
        RunError: the folder cannot be made, or the disk has too little room; when the ``with`` statement is entered.
    """

    path: Path
    part: Path
    """The folder while it is written; it can be read as soon as every tensor and ``config.json`` are."""

    def __init__(
        self, path: Path, tensors: _Described, shard_bytes: int, metadata: Mapping[str, str] = _PYTORCH
    ) -> None:
        if shard_bytes < 1:
            raise UserError(f"{path}: cannot be written in files of {shard_bytes} bytes; give a size above 0")
        self.path = Path(path).resolve()
        self.part = self.path.with_name(self.path.name + ".part")
        self._described = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}
        self._shards = _split(self._described, shard_bytes)
        self._metadata = metadata
        self._places: dict[str, tuple[str, int]] = {}
        self._missing = set(self._described)
        self._folder: int | None = None  # descriptor of the part: while it is open, no other folder gets its inode
        with self._on_disk():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path}: exists and is not an empty folder; name another, or remove it")

    def __enter__(self) -> "FolderWriter":
        try:
            with self._on_disk():
                self._begin()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor, once. May be called from several threads at once.

        Raises:
            ValueError: it is not among the declared, is written already, or has another dtype or shape.
            RunError: it cannot be written.
        """
        if name not in self._places:
            raise ValueError(f"{name!r} was not declared")
        dtype, shape = self._described[name]
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(f"{name!r} is {array.dtype} {array.shape}, but was declared as {dtype} {shape}")
        try:
            self._missing.remove(name)
        except KeyError:
            raise ValueError(f"{name!r} is written a second time") from None
        file, offset = self._places[name]
        try:
            view = raw_bytes(np.ascontiguousarray(array))
            with self._on_disk(), self._open(file) as descriptor:
                while view:
                    written = os.pwrite(descriptor, view[:_PIECE], offset)
                    view, offset = view[written:], offset + written
        except BaseException:
            self._missing.add(name)
            raise

    def text(self, name: str, content: str | bytes) -> None:
        """Write another file of the folder, such as ``config.json``.

        Raises:
            ValueError: the name is not a plain one, or that of a file with tensors.
            RunError: it cannot be written.
        """
        if not name or name != Path(name).name or name in {_INDEX, *self._shards}:
            raise ValueError(f"{name!r} cannot be a further file of {self.path}")
        with self._on_disk():
            write_atomically(self.part / name, content)

    def commit(self) -> None:
        """Make the folder what its readers see, on the disk.

        Raises:
            ValueError: a tensor has not been written.
            RunError: the disk fails, or another process took the folder meanwhile.
        """
        assert self._folder is not None, "commit is called inside of the with statement"
        if self._missing:
            raise ValueError(f"{self.path}: {len(self._missing)} tensors not written, such as {min(self._missing)!r}")
        with self._on_disk():
            for file in self._shards:
                with self._open(file) as descriptor:
                    os.fsync(descriptor)
            os.fsync(self._folder)
            if not self._is_ours():
                raise FileNotFoundError(self.part)
            os.rename(self.part, self.path)  # fails if there is anything but an empty folder by now
            parent = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def _begin(self) -> None:
        """Make the folder with the index and the shards, full of holes yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.part.is_dir() and not self.part.is_symlink():
            shutil.rmtree(self.part)
        self.part.unlink(missing_ok=True)
        headers = {
            file: safetensors.header({name: self._described[name] for name in names}, self._metadata)
            for file, names in self._shards.items()
        }
        self._check_space(sum(size for _, size in headers.values()))
        self.part.mkdir()
        self._folder = os.open(self.part, os.O_RDONLY)
        for file, (start, size) in headers.items():
            with open(self.part / file, "wb") as raw:
                raw.write(start)
                raw.truncate(size)
            offset = len(start)
            for name in self._shards[file]:
                self._places[name] = (file, offset)
                offset += _bytes(*self._described[name])
        if len(self._shards) > 1:
            total = sum(_bytes(*described) for described in self._described.values())
            places = {name: file for file, names in self._shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_atomically(self.part / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _check_space(self, needed: int) -> None:
        """Refuse what the disk cannot hold before it half fills the disk."""
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise RunError(
                f"{self.path}: could not be written: it needs {needed / 1e6:,.1f} MB and the disk has "
                f"{free / 1e6:,.1f} MB left; free some disk space or name a folder on another disk"
            )

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[int]:
        """A file of the folder that this writer made, never of one that another process put in its place."""
        assert self._folder is not None, "tensors are written inside of the with statement"
        descriptor = os.open(file, os.O_WRONLY, dir_fd=self._folder)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _is_ours(self) -> bool:
        """Whether the part is still the folder that this writer made."""
        if self._folder is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._folder), os.lstat(self.part))
        except FileNotFoundError:  # after the commit
            return False

    def _discard(self) -> None:
        if self._is_ours():
            shutil.rmtree(self.part, ignore_errors=True)
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            reason = e.strerror or str(e)
            if self._folder is not None and not self._is_ours():
                reason = "another process began to write the same folder"
            raise RunError(
                f"{self.path}: could not be written: {reason}; free some disk space or name another folder, and start "
                "again"
            ) from e


def _split(tensors: _Described, shard_bytes: int) -> dict[str, list[str]]:
    """Tensors by the file that they go to. In a file, the widest dtype comes first, so that all are aligned."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, described in tensors.items():
        if shards[-1] and size + _bytes(*described) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(*described)
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{k:05}-of-{n:05}.safetensors" for k in range(1, n + 1)]
    return {file: sorted(names, key=lambda name: -tensors[name][0].itemsize) for file, names in zip(files, shards)}


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
