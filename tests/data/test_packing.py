"""The order of the data: against the fact sheet in plain Python, and there and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Layout, SourceWindows, inverse, permutation, sort_keys, validation_windows
from errors import UserError

M64 = (1 << 64) - 1


def plain_key(state: int, i: int) -> int:
    z = (state + (i + 1) * 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def test_sort_keys_are_splitmix64_of_a_hashed_state():
    from hashlib import blake2b

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
    assert tuple(map(int, layout.window_of(2, 11))) == (source[11], window[11])


def test_a_source_too_small_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"source b: 186 tokens found, 187 needed \(5 validation \+ 6 chunks") as error:
        Layout.of([("a", 187), ("b", 186)], sequence_length=16, validation=5, chunks=6, seed=0)
    assert "lower chunks, validation_per_source or sequence_length" in str(error.value)


def test_places_outside_are_refused():
    layout = Layout((SourceWindows("a", 10, 2, 4),), chunks=2, seed=0)
    with pytest.raises(IndexError, match=r"chunk 2 is outside 0\.\.1"):
        layout.window_of(2, 0)
    with pytest.raises(IndexError, match=r"window of source a 10 is outside 0\.\.9"):
        layout.place_of(0, 10)
    with pytest.raises(IndexError, match=r"source 1 is outside 0\.\.0"):
        layout.place_of(1, 0)


def test_a_layout_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"source a: .* does not fit 2 chunks"):
        Layout((SourceWindows("a", 10, 2, 5),), chunks=2, seed=0)
    with pytest.raises(ValueError, match="chunks = 0: at least 1"):
        Layout((), chunks=0, seed=0)
