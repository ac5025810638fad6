"""Which rows of a task are scored: the same ones each time, whatever else is asked."""

import hashlib
from typing import Any

import numpy as np

SEED = 1234


def chosen(rows: int, limit: int | None, *names: str) -> list[int]:
    """Which rows are scored; those of a smaller limit are among those of a larger one."""
    if limit is None or limit >= rows:
        return list(range(rows))
    return sorted(np.random.default_rng(seed(SEED, *names)).permutation(rows)[:limit].tolist())


def seed(*parts: Any) -> int:
    """A seed of 32 bits that follows from the parts alone."""
    return int(sha256(" ".join(map(str, parts)).encode())[:8], 16)


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
