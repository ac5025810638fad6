"""One fingerprint whatever the pieces, the sharding and the memory layout; another for every other tensor."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from checkpoint import digest
from tests.checkpoint import tiny_run

DTYPES = ["bfloat16", "float16", "float32", "float64", "int8", "int32", "uint32", "int64", "bool"]


def made(shape, dtype="float32", seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return (raw & 1 if dtype == "bool" else raw).view(dtype)[..., 0]


def lanes_by_hand(x, version):
    """The definition in Python's integers."""
    mask, sums = 2**32 - 1, [0] * 4
    for position, bits in enumerate(x.reshape(-1).view(np.uint32).tolist()):
        for lane, (a, b, c, d) in enumerate(digest._LANES):
            h = ((position & mask) * a + (position >> 32) * b) & mask
            h = ((h ^ h >> 16) * c) & mask
            h ^= h >> 13 ^ bits
            if version == 2:
                h = ((h ^ h >> 16) * b) & mask
                h ^= h >> 13
            h = (h * d) & mask
            h = ((h ^ h >> 15) * a) & mask
            sums[lane] = (sums[lane] + (h ^ h >> 16)) & mask
    return sums


def test_it_is_what_it_was():
    """Digests are kept in manifests for ever: these values must never change, of any version."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for version, value in ((1, "c47bbcef3993097c020c3716ded1ba77"), (2, "304c86a6425320c588f1433ef455bf8f")):
        assert digest.partial(x, version=version).tolist() == lanes_by_hand(x, version)
        assert digest.digest("layers.wq", x, version) == value
    assert digest.VERSION == 2
    assert (
        digest.whole({"b": "2", "a": "1"}) == digest.whole({"a": "1", "b": "2"}) == "ddc7523b594d0dff5bb4dc052a820fbc"
    )


def test_two_flips_cancel_as_seldom_as_in_random_functions():
    """Of 2**18 random numbers each with one bit flipped, pairs whose changes of a sum cancel.

    Random functions would have 8; here it is 16, a probability of 2**-31. In version 1 it was thousands for the sign.
    """
    n = 2**18
    x = jnp.asarray(np.random.default_rng(5).standard_normal(n, np.float32).view(np.uint32))
    position = jnp.asarray(np.random.default_rng(6).integers(0, 2**32, n, np.uint32))

    def cancelling(version, bit):
        found = []
        for lane in digest._LANES:
            mix = lambda x: digest._mix(x, position, jnp.uint32(0), lane, version)  # noqa: B023, E731
            values, counts = np.unique(np.asarray(mix(x ^ np.uint32(1 << bit)) - mix(x)), return_counts=True)
            there = np.searchsorted(values, -values)
            there[there == len(values)] = 0
            pairs = np.where(values[there] == -values, counts * counts[there], 0).astype(np.int64)
            own = values == -values  # 0 and 2**31 cancel with themselves
            found.append(int((pairs[~own].sum() + (counts[own] * (counts[own] - 1)).sum()) // 2))
        return found

    assert min(cancelling(1, 31)) > 1000
    found = np.array([cancelling(2, bit) for bit in range(32)])
    assert found.max() < 16 + 6 * 4, found
    assert (found.sum(axis=0) < 32 * 16 + 5 * 23).all(), found.sum(axis=0)


def test_the_pair_of_flipped_signs_that_was_found_shows():
    """Findings D12: in version 1 these two give the same 128 bits."""
    a, b = 14194021, 47235999
    x = np.random.default_rng(5).standard_normal(2**26, dtype=np.float32)

    def change(version):
        """Of the sums: all other elements add the same to both."""
        parts = [digest.partial(v[[k]], offset=k, version=version) for v in (x, -x) for k in (a, b)]
        return (parts[0] + parts[1] - parts[2] - parts[3]).tolist()

    assert change(1) == [0, 0, 0, 0]
    assert 0 not in change(2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_it(dtype):
    x = made((3, 5), dtype)
    bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
    seen = {digest.digest("x", x)}
    for place in range(x.size):
        for bit in range(bits):
            changed = x.copy()
            changed.reshape(-1).view(np.uint8)[place * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            seen.add(digest.digest("x", changed))
    assert len(seen) == 1 + x.size * bits


def test_every_swap_and_transposition_changes_it():
    x = made((4, 4))
    seen = {digest.digest("x", x), digest.digest("x", x.T), digest.digest("x", x[::-1]), digest.digest("x", x[:, ::-1])}
    for a, b in itertools.combinations(range(16), 2):
        changed = x.copy().reshape(-1)
        changed[[a, b]] = changed[[b, a]]
        seen.add(digest.digest("x", changed.reshape(4, 4)))
    assert len(seen) == 4 + 120


def test_name_shape_and_dtype_count_and_bits_not_numbers():
    x = np.zeros((2, 6), np.float32)
    nan = np.full(1, np.nan, np.float32)
    other = (nan.view(np.uint32) ^ 1).view(np.float32)
    all_different = [
        digest.digest("x", x),
        digest.digest("y", x),
        digest.digest("x", x.reshape(3, 4)),
        digest.digest("x", x.view(np.int32)),
        digest.digest("x", -x),
        digest.digest("x", nan),
        digest.digest("x", other),
        digest.digest("x", np.zeros(0, np.float32)),
    ]
    assert len(set(all_different)) == len(all_different)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_cut_into_pieces_in_any_layout_gives_the_same(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=4), "shape"))
    x = made(shape, data.draw(st.sampled_from(DTYPES), "dtype"))
    order = data.draw(st.permutations(range(x.ndim)), "order")
    x = x.transpose(order).copy().transpose(np.argsort(order))  # in another order in memory
    strides = [int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2), "cuts")}) for n in shape]
    lanes = np.zeros(4, np.uint32)
    for box in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        piece = x[tuple(slice(*bounds) for bounds in box)].transpose(order)
        offset = sum(start * step for (start, _), step in zip(box, strides, strict=True))
        lanes += digest.partial(piece, offset, [strides[k] for k in order])
    assert digest.finish("x", x.shape, x.dtype, lanes) == digest.digest("x", x)


@pytest.mark.parametrize("shape", [(3, 700, 1100), (2**21 + 5,), (100, 3, 7000), (5, 300_001)])
def test_large_arrays_go_in_blocks(shape):
    x = made(shape, "bfloat16")
    whole = digest.partial(x)
    np.testing.assert_array_equal(whole, digest._on_device(jnp.asarray(x), 0, digest._contiguous(shape)))
    strides, part = digest._contiguous(shape), x[..., 1:-1]  # cannot be merged into a matrix without a copy
    ends = digest.partial(x[..., :1], 0, strides) + digest.partial(x[..., -1:], shape[-1] - 1, strides)
    np.testing.assert_array_equal(whole, ends + digest.partial(part, 1, strides))
    np.testing.assert_array_equal(digest.partial(part), digest.partial(part.copy()))


@pytest.mark.parametrize("spec", list(itertools.product([None, "x", "y", ("x", "y")], repeat=2)))
@pytest.mark.parametrize("degrees", [(2, 4), (8, 1)])
def test_any_sharding_gives_the_same(spec, degrees):
    used = [axis for part in spec for axis in ([part] if isinstance(part, str) else part or [])]
    if len(set(used)) < len(used):
        return
    x = made((16, 8, 3))
    sharding = jax.sharding.NamedSharding(tiny_run.mesh(*degrees), PartitionSpec(*spec))
    assert digest.digest("x", jax.device_put(x, sharding)) == digest.digest("x", x)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in ("float64", "int64")])
def test_on_an_accelerator_it_is_the_same(dtype):
    x = made((5, 6, 7), dtype)
    np.testing.assert_array_equal(digest._on_device(jnp.asarray(x), 3, (1, 5, 30)), digest.partial(x, 3, (1, 5, 30)))


def test_positions_beyond_32_bits():
    x = made((64,))
    far = [digest.partial(x, offset).tobytes() for offset in (0, 2**32, 2**32 + 1, 2**40, 2**32 - 32)]
    assert len(set(far)) == len(far)
    halves = digest.partial(x[:32], 2**32 - 32) + digest.partial(x[32:], 2**32)
    assert halves.tobytes() == far[-1]
    rows = digest.partial(x.reshape(2, 32), 7, (2**33, 1))
    assert rows.tolist() == (digest.partial(x[:32], 7) + digest.partial(x[32:], 7 + 2**33)).tolist()


def test_little_is_compiled():
    digest.partial(made((100, 512)))
    before = digest._sums._cache_size()
    for rows in range(65, 129):
        digest.partial(made((rows, 512)), rows, (512, 1))
        digest.partial(made((512, rows)).T, rows, (512 * 1024, 1))
    assert digest._sums._cache_size() <= before + 12


@pytest.mark.parametrize("dtype", ["complex128", ">f4", "U3"])
def test_what_has_no_fingerprint_is_refused(dtype):
    with pytest.raises(TypeError, match=r"digest: elements of .* have no fingerprint, only numbers of 8, 16, 32 or 64"):
        digest.digest("x", np.zeros(3, dtype))


def test_bfloat16_of_numpy_and_jax_agree():
    x = jnp.arange(10, dtype=jnp.bfloat16)
    assert digest.digest("x", x) == digest.digest("x", np.arange(10).astype(ml_dtypes.bfloat16))
