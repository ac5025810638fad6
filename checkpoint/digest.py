"""A fingerprint of a tensor that does not depend on how it is stored, sharded or cut into pieces.

Every element contributes mix(its bits, its position in the whole tensor) to four sums modulo 2**32. Sums commute, so
those of any pieces, on any devices, in any order, add up to the same 128 bits; name, shape and dtype are hashed in at
the end. Bits are compared, not numbers: 0.0 is not -0.0.

One changed element always shows: for each position mix is a bijection. That several changes cancel has a probability
near 2**-128 only if the four sums were those of random functions, which is not proven: seen is that two flips of the
same bit, at random places of random numbers, cancel in one sum with 2**-31, for each of the 32 bits
(`tests/checkpoint/test_digest.py`), which in four sums of different constants is 2**-124 if they are independent. It is
no protection against somebody who searches for a collision; the files' SHA-256 is that.

Version 1 mixed once less: two flipped signs cancelled in one sum with 2**-10 to 2**-14, in all four with 2**-47. A
manifest says which version its digests have, and they are compared with digests of that version.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LANES = (  # odd, so that each multiplication loses nothing: constants of xxHash, MurmurHash3 and its successors
    (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F),
    (0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09),
    (0x7FEB352D, 0x846CA68B, 0x21F0AAAD, 0x735A2D97),
    (0xCC9E2D51, 0x1B873593, 0xE6546B65, 0x4CF5AD43),
)
VERSION = 2
_BLOCK = 2**20  # elements a call on the CPU: fits the caches, and outweighs the call
_ROW = 2**16
_HIGH_WORD = 2**63  # where the upper halves of 64-bit elements lie, counted in elements: behind every tensor


def digest(name: str, array: np.ndarray | jax.Array, version: int = VERSION) -> str:
    """Of a whole tensor, 32 hex digits. A sharded array is summed where its shards are, on any mesh, not gathered."""
    return digests([(name, array)], version)[0]


def digests(tensors: Sequence[tuple[str, np.ndarray | jax.Array]], version: int = VERSION) -> list[str]:
    """Of several tensors with their names, as `digest`; all processes that hold parts of them call it alike.

    The processes exchange 16 bytes a tensor, once.
    """
    parts = [_parts(x, version) for _, x in tensors]  # all devices work before any is waited for
    lanes = np.array([_total(map(np.asarray, p)) for p in parts], np.uint32)  # [tensors, 4]
    if jax.process_count() > 1 and lanes.size:
        from jax.experimental import multihost_utils

        lanes = _total(multihost_utils.process_allgather(lanes), lanes.shape)
    return [finish(name, x.shape, x.dtype, row) for (name, x), row in zip(tensors, lanes, strict=True)]


def _parts(x: np.ndarray | jax.Array, version: int) -> list[Any]:
    """Sums of the pieces of a tensor that this process counts: each piece is counted by one."""
    if jax.process_index() and not (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return []  # every process has it whole
    if not isinstance(x, jax.Array):
        return [_partial(x, 0, _contiguous(x.shape), version)]
    strides, parts = _contiguous(x.shape), []
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.indices(size)[0] for part, size in zip(shard.index, x.shape, strict=True)]
            parts.append(_partial(shard.data, sum(a * b for a, b in zip(starts, strides)), strides, version))
    return parts


def partial(x: Any, offset: int = 0, strides: Sequence[int] | None = None, version: int = VERSION) -> np.ndarray:
    """The four sums of a piece, uint32; add those of all pieces and give them to `finish`.

    Args:
        x: the piece, any view of a numpy array (not copied as a whole) or a jax array on one device.
        offset: position of its first element in the whole tensor, counted in elements.
        strides: how far apart in the whole tensor neighbours along each axis of the piece are, in elements;
            ``[1, rows]`` for a transposed matrix. By default the piece is a contiguous run.
        version: of the digest (`Manifest.digest_version`).
    """
    return np.asarray(_partial(x, offset, _contiguous(x.shape) if strides is None else tuple(strides), version))


def finish(name: str, shape: Sequence[int], dtype: Any, lanes: np.ndarray) -> str:
    """The fingerprint, 32 hex digits, of a tensor whose pieces' sums add up to ``lanes``."""
    header = json.dumps([name, [int(n) for n in shape], np.dtype(dtype).name])
    return hashlib.sha256(header.encode() + lanes.astype("<u4").tobytes()).hexdigest()[:32]


def whole(digests: Mapping[str, str]) -> str:
    """One fingerprint of a state from those of its tensors by name."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:32]


# ---- the sums ------------------------------------------------------------------------------------------------------


def _partial(x: Any, offset: int, strides: tuple[int, ...], version: int) -> np.ndarray | jax.Array:
    if x.size == 0:
        return np.zeros(4, np.uint32)
    if isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu":
        return _on_device(x, offset, strides, version)
    words, strides = _words(np.asarray(x), strides)
    blocks = [*_blocks(words, offset, strides)]
    if len(blocks) == 1:
        return np.asarray(_sums(*blocks[0], version))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA runs a reduction in one thread
        return _total(pool.map(lambda block: np.asarray(_sums(*block, version)), blocks))


def _total(lanes: Iterable[np.ndarray], shape: tuple[int, ...] = (4,)) -> np.ndarray:
    return sum(lanes, np.zeros(shape, np.uint32))


def _mix(x: jax.Array, lo: jax.Array, hi: jax.Array, lane: tuple[int, ...], version: int) -> jax.Array:
    """For a position a bijection of x, so that no single change is lost."""
    a, b, c, d = map(np.uint32, lane)
    h = lo * a + hi * b
    h = (h ^ (h >> 16)) * c
    h = (h ^ (h >> 13)) ^ x
    if version > 1:
        h = (h ^ (h >> 16)) * b
        h = h ^ (h >> 13)
    h = h * d
    h = (h ^ (h >> 15)) * a
    return h ^ (h >> 16)


@functools.partial(jax.jit, static_argnames=("padded", "version"))
def _sums(x: Any, rows: Any, columns: Any, size: Any, padded: bool, version: int) -> jax.Array:
    """Over a matrix whose element [r, c] is at position rows[r] + columns[c]; a position is [low word, high word].

    With ``padded``, only the first size[0] rows and size[1] columns count.
    """
    x = x.astype(jnp.uint32)
    lo = rows[0][:, None] + columns[0]
    hi = rows[1][:, None] + columns[1] + (lo < columns[0]).astype(jnp.uint32)
    mixed = [_mix(x, lo, hi, lane, version) for lane in _LANES]
    if padded:
        inside = (jnp.arange(x.shape[0], dtype=jnp.uint32) < size[0])[:, None]
        inside &= jnp.arange(x.shape[1], dtype=jnp.uint32) < size[1]
        mixed = [jnp.where(inside, m, np.uint32(0)) for m in mixed]
    # One reduction of four operands: XLA makes four of them read everything four times, at a fifth of the speed.
    add = lambda a, b: tuple(map(jax.lax.add, a, b))  # noqa: E731
    return jnp.stack(jax.lax.reduce(tuple(mixed), (np.uint32(0),) * 4, add, (0, 1)))


def _blocks(words: np.ndarray, offset: int, strides: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Arguments of `_sums` that cover a numpy array, of few shapes, so that little is compiled."""
    order = sorted(range(words.ndim), key=lambda k: -abs(words.strides[k]))  # as it lies in memory
    words, strides = words.transpose(order), tuple(strides[k] for k in order)
    shape, steps = _merge(words.shape, strides)
    try:
        matrix = words.reshape(-1, shape[-1], copy=False)
    except ValueError:  # a part of an array, which is copied a few rows at a time
        few = max(1, _BLOCK * len(words) // words.size)
        if len(words) > few:
            for top in range(0, len(words), few):
                yield from _blocks(words[top : top + few], offset + top * strides[0], strides)
            return
        matrix = words.reshape(-1, shape[-1])
    width = min(matrix.shape[1], _BLOCK)
    height = max(1, _BLOCK // width)
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            block = matrix[top : top + height, left : left + width]
            rows = _positions(np.arange(top, top + block.shape[0]), shape[:-1], steps[:-1]) + _wrapped(offset)
            columns = np.arange(left, left + block.shape[1], dtype=np.uint64) * _wrapped(steps[-1])
            size = np.array(block.shape, np.uint32)
            if padded := block.shape != (height, width):
                more = [(0, (1 << (n - 1).bit_length()) - n) for n in block.shape]
                block, rows, columns = np.pad(block, more), np.pad(rows, more[0]), np.pad(columns, more[1])
            yield block, _split(rows), _split(columns), size, padded


def _on_device(x: jax.Array, offset: int, strides: tuple[int, ...], version: int = VERSION) -> jax.Array:
    """The sums of an array where it is, in one call."""
    x, strides = _words(x, strides)
    shape, steps = _merge(x.shape, strides)
    matrix = x.reshape(-1, shape[-1])
    rows = _positions(np.arange(matrix.shape[0]), shape[:-1], steps[:-1]) + _wrapped(offset)
    columns = np.arange(shape[-1], dtype=np.uint64) * _wrapped(steps[-1])
    return _sums(matrix, _split(rows), _split(columns), np.array(matrix.shape, np.uint32), False, version)


def _words(x: Any, strides: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """The bits of an array as unsigned integers of at most 32 bits; 64-bit elements become two along a last axis."""
    if x.dtype.itemsize not in (1, 2, 4, 8) or x.dtype.kind not in "biufV" or x.dtype.names or not x.dtype.isnative:
        raise TypeError(f"digest: elements of {x.dtype} have no fingerprint, only numbers of 8, 16, 32 or 64 bits")
    if x.dtype.itemsize == 8:
        words = x[..., None].view(np.uint32) if isinstance(x, np.ndarray) else jax.lax.bitcast_convert_type(x, "uint32")
        return words, (*strides, _HIGH_WORD)
    kind = f"uint{8 * x.dtype.itemsize}"
    if isinstance(x, np.ndarray):
        return x.view(kind), strides
    return x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind), strides


def _merge(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same positions with fewer axes, at least one: a longer last one, up to `_ROW`, then fewer before it."""
    sizes, steps = [1], [1]
    for n, step in reversed([(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]):
        joins = step == sizes[0] * steps[0] and (len(sizes) > 1 or n * sizes[0] <= _ROW)
        if sizes == [1]:
            sizes, steps = [n], [step]
        elif joins:
            sizes[0] *= n
        else:
            sizes.insert(0, n)
            steps.insert(0, step)
    return sizes, steps


def _positions(index: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """uint64 positions of elements by their number in an array of a shape."""
    total = np.zeros(index.shape, np.uint64)
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        total += (index % n).astype(np.uint64) * _wrapped(step)
        index = index // n
    return total


def _wrapped(n: int) -> np.uint64:
    return np.uint64(n % 2**64)


def _split(positions: np.ndarray) -> np.ndarray:
    return np.stack([positions.astype(np.uint32), (positions >> np.uint64(32)).astype(np.uint32)])


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
