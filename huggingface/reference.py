"""What the NumPy references of both architectures share."""

from collections.abc import Callable

import numpy as np

from errors import UserError


def reader(read: Callable[[str], np.ndarray]) -> Callable[..., np.ndarray]:
    """``tensor(name, *shape)``: a tensor as float32, or UserError where config.json says another shape."""

    def tensor(name: str, *shape: int) -> np.ndarray:
        value = read(name)
        if value.shape != shape:
            raise UserError(f"{name!r} has shape {list(value.shape)}, but config.json says {list(shape)}")
        return value.astype(np.float32, copy=False)

    return tensor


def silu(x: np.ndarray) -> np.ndarray:
    """``x / (1 + exp(-x))``."""
    return x * np.exp(-np.logaddexp(0, -x))


def causal_softmax(scores: np.ndarray) -> np.ndarray:
    """Over the keys up to each query's own position. [..., S, S] -> the same."""
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
