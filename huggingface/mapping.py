"""How tensors of a Hugging Face folder and ours hold the same numbers: one table per architecture, used both ways."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from checkpoint.names import from_flat
from errors import UserError
from layers.model import ModelConfig

_STRIP = 64  # rows; their lines of a few columns fit the cache


def transpose(matrix: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transpose: by strips of rows, four times as fast as NumPy's own way (seen: 2 GB/s)."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _STRIP):
        result[:, start : start + _STRIP] = matrix[start : start + _STRIP].T
    return result


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One tensor of theirs, and the part of ours with the same numbers."""

    theirs: str
    shape: tuple[int, ...]
    """Theirs."""
    ours: tuple[str, ...]
    """One, or several that lie side by side in theirs, along its output dimension."""
    part: tuple[int, ...]
    """Shape of (one layer of) each of ours."""
    layer: int | None = None
    """Index in ours, whose layers are stacked; None where they are not."""
    transposed: bool = False
    """Theirs is [out, in]; ours is always [in, out], with heads apart."""

    def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Each of ours."""
        tensor = transpose(tensor) if self.transposed else tensor
        return [x.reshape(self.part) for x in np.split(tensor, len(self.ours), axis=-1)]

    def to_theirs(self, parts: list[np.ndarray]) -> np.ndarray:
        """Inverse of `to_ours`."""
        rows = self.shape[::-1][:-1] if self.transposed else self.shape[:-1]
        flat = [x.reshape(*rows, -1) for x in parts]
        tensor = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        return transpose(tensor) if self.transposed else tensor

    def pieces(self, tensor: np.ndarray) -> list[tuple[str, np.ndarray, int, tuple[int, ...]]]:
        """Where theirs lies in ours, without moving it, for digests.

        Returns:
            Of each of ours: name, the part of theirs, position of its first element in ours (of all layers), and how
            many elements of ours lie between neighbours along each axis of the part.
        """
        size = int(np.prod(self.part))
        parts = np.split(tensor, len(self.ours), axis=0 if self.transposed else -1)
        columns = parts[0].shape[0 if self.transposed else -1]
        strides = (1,) if tensor.ndim == 1 else (1, columns) if self.transposed else (columns, 1)
        return [(name, x, (self.layer or 0) * size, strides) for name, x in zip(self.ours, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Format:
    """How one architecture is written in Hugging Face folders."""

    model: type[ModelConfig]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    """Of a ``config.json``. Raises UserError where it is of another architecture."""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """Inverse, as transformers writes it, without what depends on the export (dtype, token ids)."""
    tensors: Callable[[Any], tuple[Mapped, ...]]
    """Every tensor of a model, layer by layer, the embedding first."""
    dropped: re.Pattern[str]
    """Names of buffers that old exports hold and that are computed, not learned."""
    tied: Mapping[str, str]
    """Optional tensor that must equal another one bit for bit -> that other one."""
    reference: Callable[[Mapping[str, Any], Callable[[str], np.ndarray], np.ndarray], np.ndarray]
    """``(config.json, read a tensor, int tokens [B, S]) -> float32 logits [B, S, V]`` in NumPy, from their names."""

    def check_names(self, table: Iterable[Mapped], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, unknown or of another shape (UserError naming them, and what was expected).

        Args:
            table: what `tensors` gives for the model.
            shapes: of all tensors that are there, by their name.
        """
        expected = {t.theirs: t.shape for t in table}
        optional = {name: expected[like] for name, like in self.tied.items() if name not in expected}
        problems = [f"{name!r} is missing, expected {list(s)}" for name, s in expected.items() if name not in shapes]
        for name, shape in shapes.items():
            wanted = expected.get(name, optional.get(name))
            if wanted is not None and tuple(shape) != wanted:
                problems.append(f"{name!r} has shape {list(shape)}, expected {list(wanted)}")
            elif wanted is None and not self.dropped.fullmatch(name):
                problems.append(f"{name!r} {list(shape)} is unknown to this architecture")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(f"tensors do not fit the {self.model.family} config: {'; '.join(problems[:5])}{more}")

    def collect(self, config: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """All our parameters as a nested dict of float32 arrays, in memory: for small models and gradients.

        Raises:
            UserError: as `check_names`.
        """
        table = self.tensors(config)
        self.check_names(table, {name: t.shape for name, t in tensors.items()})
        found: dict[str, Any] = {}
        for row in table:
            for name, value in zip(row.ours, row.to_ours(tensors[row.theirs]), strict=True):
                found.setdefault(name, []).append(value.astype(np.float32))
        whole = {name: np.stack(v) if name.startswith("layers.") else v[0] for name, v in found.items()}
        return from_flat(whole)


def require(config: Mapping[str, Any], fixed: Mapping[str, Any], what: str) -> None:
    """Refuse a ``config.json`` in which a field has another value than the architecture's (UserError).

    Args:
        config: its content.
        fixed: field -> (the architecture's value, what an absent field means).
        what: name of the architecture in the message.
    """
    for name, (value, absent) in fixed.items():
        found = config.get(name)
        found = absent if found is None else found  # transformers writes null for what has its default
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise UserError(f"config.json: {name} is {found!r}, and {what} has {value!r}")


def number(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that must be there (UserError): a positive int, or a float."""
    value = config.get(name)
    if not isinstance(value, (int, float) if kind is float else int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json: {name} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)
