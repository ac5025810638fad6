"""The order of the data: against the fact sheet in plain Python, and there and back."""

import math
import time
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import (
    Layout,
    Shuffle,
    SourceWindows,
    inverse,
    permutation,
    sort_keys,
    split_samples,
    tokens_in,
    training_number,
    training_window,
    validation_windows,
    window_start,
    windows_in,
)
from errors import UserError

M64 = (1 << 64) - 1


def plain_key(state: int, i: int) -> int:
    z = (state + (i + 1) * 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def test_sort_keys_are_splitmix64_of_a_hashed_state():
    state = int.from_bytes(blake2b(b'["order",7,0]', digest_size=8).digest(), "little")
    assert sort_keys(50, "order", 7, 0).tolist() == [plain_key(state, i) for i in range(50)]
    assert sort_keys(20, "order", 7, 0, start=30).tolist() == [plain_key(state, i) for i in range(30, 50)]


def test_splitmix64_matches_the_published_sequence():
    # Outputs of Vigna's splitmix64.c for seed 1234567.
    assert [plain_key(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_golden_order():
    # A change here is a change of every data set ever prepared.
    assert sort_keys(3, "order", 7, 0).tolist() == [12073036453625942685, 13622356491159275211, 4110726569810277846]
    assert permutation(8, 7, 0).tolist() == [4, 2, 5, 6, 0, 7, 1, 3]


def test_permutations_differ_by_seed_and_chunk_and_invert():
    perm = permutation(1000, 7, 0)
    assert sorted(perm.tolist()) == list(range(1000))
    assert perm[inverse(perm)].tolist() == inverse(perm)[perm].tolist() == list(range(1000))
    assert (perm != permutation(1000, 7, 1)).any()
    assert (perm != permutation(1000, 8, 0)).any()


def test_validation_draw_is_that_of_the_smallest_keys_across_blocks():
    n = (1 << 20) + 500  # more than one block of keys
    keys = sort_keys(n, "validation", 3, "c4")
    drawn = validation_windows(n, 100, 3, "c4")
    assert drawn.tolist() == sorted(np.argsort(keys)[:100].tolist())
    assert (drawn != validation_windows(n, 100, 3, "arxiv")).any()
    assert validation_windows(10, 10, 0, "x").tolist() == list(range(10))
    assert validation_windows(10, 0, 0, "x").tolist() == []
    with pytest.raises(ValueError, match="cannot draw 11 validation windows from 10"):
        validation_windows(10, 11, 0, "x")


def plain_chunks(windows: dict[str, int], validation: int, chunks: int, seed: int) -> list[list[tuple[int, int]]]:
    """Fact sheet 3.3, line by line, with the draw and the shuffle of this project."""
    files: list[list[tuple[int, int]]] = [[] for _ in range(chunks)]
    for j, (name, n) in enumerate(windows.items()):
        per_chunk = (n - validation) // chunks
        unused = n - chunks * per_chunk - validation
        held_out = set(validation_windows(n - unused, validation, seed, name).tolist())
        k = 0
        for window in range(n - unused):
            if window not in held_out:
                files[k % chunks].append((j, window))
                k += 1
    return [[file[e] for e in permutation(len(file), seed, c)] for c, file in enumerate(files)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(0, 2**63),
)
def test_layout_is_the_fact_sheets_and_inverts(extra, validation, chunks, seed):
    windows = {f"s{j}": validation + chunks + e for j, e in enumerate(extra)}
    layout = Layout.of(
        [(name, n * 17 + 5) for name, n in windows.items()],
        sequence_length=16,
        validation=validation,
        chunks=chunks,
        seed=seed,
    )
    read = {}
    for chunk, file in enumerate(plain_chunks(windows, validation, chunks, seed)):
        source, window = layout.window_of(chunk, np.arange(layout.samples_per_chunk))
        assert list(zip(source.tolist(), window.tolist())) == file
        read |= {place: (chunk, position) for position, place in enumerate(file)}
    for j, s in enumerate(layout.sources):
        for window in range(s.windows):
            place = layout.place_of(j, window)
            if window >= validation + chunks * s.per_chunk:
                assert place == "unused"
            elif window in layout.validation[j]:
                assert place == "validation"
            else:
                assert place == read[j, window]


def test_window_of_takes_one_position_too():
    layout = Layout((SourceWindows("a", 100, 7, 18), SourceWindows("b", 377, 7, 74)), chunks=5, seed=3)
    source, window = layout.window_of(2, np.arange(92))
    one_by_one = [tuple(map(int, layout.window_of(2, p))) for p in range(92)]
    assert one_by_one == list(zip(source.tolist(), window.tolist()))


def test_a_source_too_small_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"source b: 186 tokens found, 187 needed \(5 validation \+ 6 chunks") as error:
        Layout.of([("a", 187), ("b", 186)], sequence_length=16, validation=5, chunks=6, seed=0)
    assert "lower chunks, validation_per_source or sequence_length" in str(error.value)


def test_places_outside_are_refused():
    layout = Layout((SourceWindows("a", 10, 2, 4),), chunks=2, seed=0)
    with pytest.raises(IndexError, match=r"chunk 2 is outside 0\.\.1"):
        layout.window_of(2, 0)
    with pytest.raises(IndexError, match=r"position -1 is outside 0\.\.3"):
        layout.window_of(0, -1)
    with pytest.raises(IndexError, match=r"window of source a 10 is outside 0\.\.9"):
        layout.place_of(0, 10)
    with pytest.raises(IndexError, match=r"source 1 is outside 0\.\.0"):
        layout.place_of(1, 0)


def test_a_layout_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"source a: .* does not fit 2 chunks"):
        Layout((SourceWindows("a", 10, 2, 5),), chunks=2, seed=0)
    with pytest.raises(ValueError, match="chunks = 0: at least 1"):
        Layout((), chunks=0, seed=0)


def plain_shuffle(n: int, key: tuple, i: int) -> int:
    """The definition of Shuffle, with plain numbers."""
    m = next(m for m in range(1, n + 1) if m * m >= n)
    while True:
        left, right = i // m, i % m
        for k in sort_keys(8, *key).tolist():
            left, right = right, (left + plain_key(k, right)) % m
        i = left * m + right
        if i < n:
            return i


def test_shuffle_is_its_definition_and_a_bijection_at_every_small_size():
    for n in range(1, 301):
        shuffle = Shuffle(n, "test", n)
        order = shuffle.at(np.arange(n))
        assert sorted(order.tolist()) == list(range(n))
        assert shuffle.inverse(order).tolist() == list(range(n))
        if n < 8 or n % 50 == 0:
            assert order.tolist() == [plain_shuffle(n, ("test", n), i) for i in range(n)]


def test_golden_shuffle():
    # A change here is a change of every mixture ever prepared.
    assert Shuffle(10, "test", 7).at(np.arange(10)).tolist() == [1, 9, 8, 6, 3, 4, 7, 0, 2, 5]
    assert Shuffle(2**40, "test", 7).at(np.arange(3)).tolist() == [858751694745, 142765955860, 301641430644]


def test_shuffle_in_pieces_is_a_bijection_and_takes_any_shape():
    n = 200_003
    shuffle = Shuffle(n, "large")
    order = shuffle.at(np.arange(n))
    assert (np.sort(order) == np.arange(n)).all()
    assert (shuffle.inverse(order) == np.arange(n)).all()
    grid = np.arange(12).reshape(3, 4)
    assert (shuffle.at(grid.T) == order[:12].reshape(3, 4).T).all()
    assert int(shuffle.at(5)) == order[5]
    assert shuffle.at(5).dtype == np.int64
    assert shuffle.at(np.empty(0, np.int64)).tolist() == []
    assert len(shuffle) == n


@pytest.mark.parametrize("n", [2**28 - 1, 2**28, 284_404_297, 2**40 - 1, 2**40])
def test_shuffle_of_real_sizes_goes_there_and_back(n):
    shuffle = Shuffle(n, "there", n)
    numbers = np.unique(np.concatenate([np.arange(1000), n - 1 - np.arange(1000), sort_keys(20_000, "some") % n]))
    numbers = numbers.astype(np.int64)
    found = shuffle.at(numbers)
    assert found.min() >= 0
    assert found.max() < n
    assert len(np.unique(found)) == len(numbers)
    assert (shuffle.inverse(found) == numbers).all()


def chi_square_z(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean."""
    free = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 100])
def test_shuffle_puts_an_element_anywhere_and_its_neighbour_anywhere_else(n):
    keys = 2000
    first = np.stack([Shuffle(n, "uniform", k).inverse(np.arange(2)) for k in range(keys)])
    assert abs(chi_square_z(np.bincount(first[:, 0], minlength=n), np.full(n, keys / n))) < 4
    if n > 2:
        apart = (first[:, 1] - first[:, 0]) % n
        assert abs(chi_square_z(np.bincount(apart, minlength=n)[1:], np.full(n - 1, keys / (n - 1)))) < 4


@pytest.mark.parametrize("n", [100_003, 284_404_297])
def test_shuffle_leaves_no_trace_of_the_order_before(n):
    order = Shuffle(n, "trace").at(np.arange(100_000))
    step = np.diff(order)
    bins = ((step % n) * 50 // n).astype(np.int64)
    assert abs(chi_square_z(np.bincount(bins, minlength=50), np.full(50, len(step) / 50))) < 4
    assert abs((step > 0).mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(step))  # ascents of a random permutation
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(len(step))
    other = Shuffle(n, "trace", 1).at(np.arange(100_000))
    assert abs(np.corrcoef(order, other)[0, 1]) < 4 / math.sqrt(len(order))


def test_shuffle_takes_far_less_than_a_microsecond_an_element():
    shuffle, numbers = Shuffle(284_404_297, "speed"), np.arange(1 << 18)
    shuffle.at(0)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        shuffle.at(numbers)
        best = min(best, time.perf_counter() - start)
    assert best / len(numbers) < 5e-7  # 3e-8 on a quiet core: room for a busy one


def test_shuffle_refuses_what_it_has_not():
    for n in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=f"cannot shuffle {n} elements"):
            Shuffle(n, "x")
    with pytest.raises(IndexError, match=r"position 5 is outside 0\.\.4"):
        Shuffle(5, "x").at(np.array([0, 5]))
    with pytest.raises(IndexError, match=r"element -1 is outside 0\.\.4"):
        Shuffle(5, "x").inverse(-1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.data())
def test_training_windows_are_those_not_held_out_in_order(n, data):
    held_out = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [], np.int64)
    training = [w for w in range(n) if w not in set(held_out.tolist())]
    assert training_window(np.arange(len(training)), held_out).tolist() == training
    numbers = training_number(np.arange(n), held_out).tolist()
    assert numbers == [training.index(w) if w in training else -1 for w in range(n)]
    for k, window in enumerate(training):
        assert int(training_window(k, held_out)) == window
        assert int(training_number(window, held_out)) == k


@pytest.mark.parametrize("overlap", [0, 1, 5, 16])
def test_windows_of_a_stream_are_those_that_fit(overlap):
    for tokens in range(100):
        starts = range(0, tokens, 17 - overlap)
        fitting = [start for start in starts if start + 17 <= tokens]
        assert windows_in(tokens, 16, overlap) == len(fitting)
        assert window_start(np.arange(len(fitting)), 16, overlap).tolist() == fitting
    for windows in range(1, 9):
        tokens = tokens_in(windows, 16, overlap)
        assert windows_in(tokens, 16, overlap) == windows
        assert windows_in(tokens - 1, 16, overlap) == windows - 1


@pytest.mark.parametrize("overlap", [-1, 17])
def test_windows_that_would_not_move_on_are_refused(overlap):
    with pytest.raises(ValueError, match=rf"overlap {overlap} is outside 0\.\.16"):
        windows_in(100, 16, overlap)


def test_a_layout_of_overlapping_windows():
    # 11 windows of 17 tokens, 16 apart
    layout = Layout.of([("a", 10 * 16 + 17)], sequence_length=16, validation=5, chunks=6, seed=0, overlap=1)
    assert layout.sources == (SourceWindows("a", 11, 5, 1),)
    with pytest.raises(UserError, match=r"source a: 176 tokens found, 177 needed \(5 validation \+ 6 chunks"):
        Layout.of([("a", 10 * 16 + 16)], sequence_length=16, validation=5, chunks=6, seed=0, overlap=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_split_samples_adds_up_and_is_within_one_of_the_exact_share(total, weights):
    counts = split_samples(total, weights)
    assert sum(counts) == total
    for count, w in zip(counts, weights):
        share = total * w / math.fsum(weights)
        assert share - 1 - 1e-5 < count < share + 1 + 1e-5


def test_split_samples_gives_the_rest_to_the_largest_remainders_then_to_the_first():
    assert split_samples(10, [1, 1, 1]) == [4, 3, 3]
    assert split_samples(11, [1, 1, 1]) == [4, 4, 3]
    assert split_samples(10, [5, 3.4, 1.6]) == [5, 3, 2]
    for total, weights in ((-1, [1.0]), (1, []), (1, [1.0, 0.0]), (1, [math.inf]), (1, [math.nan])):
        with pytest.raises(ValueError, match="cannot split"):
            split_samples(total, weights)


def test_ambers_published_mix_plans_to_its_published_sizes():
    billions = {  # fact sheet 3.1: tokens, and samples per chunk where they are only estimates
        "arxiv": (30.00, 40_670),
        "book": (28.86, 39_125),
        "c4": (197.67, 267_976),
        "refinedweb": (665.01, 901_537),
        "stackexchange": (21.75, 29_486),
        "starcoderdata": (291.92, 395_749),
        "wikipedia": (23.90, 32_401),
    }
    per_chunk = split_samples(1_706_976, [b for b, _ in billions.values()])
    assert sum(per_chunk) == 1_706_976
    for count, (_, estimate) in zip(per_chunk, billions.values()):
        assert abs(count / estimate - 1) < 5e-5
    tokens = [(name, (360 * count + 102_400) * 2049) for name, count in zip(billions, per_chunk)]
    layout = Layout.of(tokens, sequence_length=2048, validation=102_400, chunks=360, seed=0)
    assert [s.per_chunk for s in layout.sources] == per_chunk
    assert layout.samples_per_chunk == 1_706_976  # fact sheet 3.1
    assert divmod(layout.samples_per_chunk, 2240) == (762, 96)  # fact sheet 2.1
    assert layout.chunks * layout.samples_per_chunk * 2049 == 1_259_133_776_640  # 1259.13 B, fact sheet 3.1
