"""Mixtures against the fact sheet (3.4) written down plainly, there and back, and at the sizes of the real ones."""

import math
import re
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_jax.recipes import MIXTURES
from data.mixture import Interleave, Mixture, Part, Rows
from data.packing import Shuffle
from errors import UserError


def plain_rows(part: Part, windows: int, file_samples: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, training window) of each row: files, halves, epochs, shuffle and subset as lists."""
    files = [list(range(windows))[f : f + file_samples] for f in range(0, windows, file_samples)]
    files = {"all": files, "even": files[0::2], "odd": files[1::2]}[part.half]
    rows = [(epoch, window) for epoch in range(part.epochs) for file in files for window in file]
    if part.shuffle and rows:
        key = ("shuffle", seed, part.reads, part.half, part.epochs)
        rows = [rows[i] for i in Shuffle(len(rows), *key).at(np.arange(len(rows)))]
    return rows[int(len(rows) * part.start) : int(len(rows) * part.stop)]


def plain_slots(
    weights: list[Fraction], rows: list[list[tuple[int, int]]], samples: int, key: tuple
) -> list[tuple[int, int, int]]:
    """(part, epoch, training window) of each slot: the fact sheet's mixture, one slot after the other."""
    w = [x / sum(weights) for x in weights]
    large = [i for i in range(len(w)) if w[i] > Fraction(5, 100)] or list(range(len(w)))
    length = max(len(rows[i]) / w[i] for i in large)
    of_an_epoch = [i for i in range(len(w)) for _ in range(math.floor(length * w[i]))]
    found: list[tuple[int, int, int]] = []
    read = [0] * len(w)
    epoch = 0
    while len(found) < samples:
        for element in Shuffle(len(of_an_epoch), *key, epoch).at(np.arange(len(of_an_epoch))):
            part = of_an_epoch[element]
            found.append((part, *rows[part][read[part] % len(rows[part])]))
            read[part] += 1
        epoch += 1
    return found[:samples]


FILE = 3
parts = st.builds(
    Part,
    name=st.just(""),
    weight=st.one_of(st.integers(1, 9).map(float), st.floats(0.01, 9)),
    source=st.sampled_from(["a", "b", "c"]),
    half=st.sampled_from(["all", "even", "odd"]),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    start=st.sampled_from([0.0, 0.1, 0.3]),
    stop=st.sampled_from([0.5, 0.7, 1.0]),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(parts, min_size=1, max_size=4),
    st.tuples(*[st.integers(0, 25)] * 3),
    st.one_of(st.none(), st.integers(1, 150)),
    st.integers(0, 2**32),
    st.integers(0, 2),
)
def test_a_mixture_is_the_fact_sheets_and_inverts(mixed, sizes, samples, seed, phase):
    windows = dict(zip("abc", sizes))
    mixed = [Part(**{**vars(p), "name": f"part {i}"}) for i, p in enumerate(mixed)]
    rows = [plain_rows(p, windows[p.reads], FILE, seed) for p in mixed]
    weights = [Fraction(p.weight) for p in mixed]

    def build():
        return Mixture.of(mixed, windows, samples=samples, file_samples=FILE, seed=seed, phase=phase)

    if not all(rows):
        with pytest.raises(UserError, match=r"training windows, none|none of its"):
            build()
        return
    large = [i for i, w in enumerate(weights) if w / sum(weights) > Fraction(1, 20)]
    length = max(len(rows[i]) / weights[i] for i in large)
    if min(weights) * length < 1:
        with pytest.raises(UserError, match="is less than one sample in an epoch"):
            build()
        return
    mixture = build()
    epoch = sum(math.floor(length * w) for w in weights)
    assert mixture.samples == (samples or epoch)
    assert mixture.epoch == epoch
    assert all(mixture.epoch_slots[i] >= len(rows[i]) for i in large)  # read whole

    expected = plain_slots(weights, rows, mixture.samples, ("mixture", seed, phase))
    found = mixture.at(np.arange(mixture.samples))
    assert list(zip(*(v.tolist() for v in found))) == expected
    backwards = mixture.at(np.arange(mixture.samples)[::-1])
    assert all((b[::-1] == f).all() for b, f in zip(backwards, found))

    for i, part in enumerate(mixed):
        for window in range(windows[part.reads]):
            assert mixture.slots_of(i, window) == [t for t, (p, _, w) in enumerate(expected) if (p, w) == (i, window)]
    cut = mixture.samples // 3
    realised = np.bincount(found[0][cut:], minlength=len(mixed))
    assert mixture.counts(cut, mixture.samples).tolist() == realised.tolist()
    for passes, slots, r in zip(mixture.passes, mixture.epoch_slots, rows):
        assert passes == pytest.approx(mixture.samples / epoch * slots / len(r))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts, st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**32))
def test_rows_are_halves_epochs_shuffle_and_subset_and_invert(part, windows, file_samples, seed):
    expected = plain_rows(part, windows, file_samples, seed)
    if not expected:
        with pytest.raises(UserError):
            Rows(part, windows, file_samples, seed)
        return
    rows = Rows(part, windows, file_samples, seed)
    assert len(rows) == len(expected)
    epoch, window = rows.at(np.arange(len(rows)))
    assert list(zip(epoch.tolist(), window.tolist())) == expected
    for w in range(windows):
        assert rows.of(w) == [r for r, (_, x) in enumerate(expected) if x == w]


def test_halves_are_every_second_file_the_last_one_short():
    even = Rows(Part("a", 1, half="even"), 17, 5, 0)
    odd = Rows(Part("a", 1, half="odd"), 17, 5, 0)
    assert even.at(np.arange(10))[1].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert odd.at(np.arange(7))[1].tolist() == [5, 6, 7, 8, 9, 15, 16]
    assert (len(even), len(odd)) == (10, 7)


def test_epochs_are_shuffled_together_and_alike_for_parts_of_the_same_data():
    many = Rows(Part("phase 2", 1, source="code", epochs=2, shuffle=True, fim_rate=0.9), 1000, 50, 4)
    epoch, window = many.at(np.arange(2000))
    assert sorted(zip(epoch.tolist(), window.tolist())) == [(e, w) for e in range(2) for w in range(1000)]
    assert 400 < epoch[:1000].sum() < 600
    assert abs(np.corrcoef(np.arange(2000), window)[0, 1]) < 0.1
    tenth = Rows(Part("phase 3", 1, source="code", epochs=2, shuffle=True, stop=0.1), 1000, 50, 4)
    assert len(tenth) == 200
    assert (np.stack(tenth.at(np.arange(200))) == np.stack([epoch, window])[:, :200]).all()
    assert (Rows(many.part, 1000, 50, 5).at(np.arange(2000))[1] != window).any()  # another seed


def test_plain_parts_read_everything_in_order():
    mixture = Mixture.of(
        [Part("a", 3), Part("b", 1)], {"a": 30, "b": 10}, samples=None, file_samples=7, seed=0, phase=0
    )
    part, epoch, window = mixture.at(np.arange(mixture.samples))
    assert mixture.samples == 40
    assert mixture.passes == (1, 1)
    assert not epoch.any()
    assert window[part == 0].tolist() == list(range(30))
    assert window[part == 1].tolist() == list(range(10))
    assert part.tolist() != sorted(part.tolist())


def test_a_second_epoch_goes_on_where_the_first_ended_in_another_interleave():
    # b has 5 slots an epoch for its 4 rows: epoch 1 begins with its row 1.
    mixture = Mixture.of([Part("a", 2), Part("b", 1)], {"a": 10, "b": 4}, samples=30, file_samples=1, seed=0, phase=1)
    part, _, window = mixture.at(np.arange(30))
    assert mixture.epoch_slots == (10, 5)
    assert mixture.passes == (2, 2.5)
    assert window[part == 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert window[part == 0].tolist() == 2 * list(range(10))
    assert part[:15].tolist() != part[15:].tolist()


@pytest.fixture(scope="module")
def million() -> Interleave:
    counts = [int(p.weight * 1_000_000) for p in MIXTURES[2]]
    return Interleave(counts, "test", 1)


def test_interleave_of_many_blocks(million):
    n = len(million)
    numbers = Shuffle(n, "test", 1).at(np.arange(n))
    expected = np.repeat(np.arange(11), million.counts)[numbers]
    assert np.bincount(expected, minlength=11).tolist() == list(million.counts)
    part, rank = million.at(np.arange(n))
    assert (part == expected).all()
    for i, count in enumerate(million.counts):
        assert (rank[part == i] == np.arange(count)).all()  # within a part, in order
    assert million.before(0).tolist() == [0] * 11
    assert million.before(n).tolist() == list(million.counts)
    for slot in (1, 16_383, 16_384, 500_000, n - 1):
        assert million.before(slot).tolist() == np.bincount(expected[:slot], minlength=11).tolist()
    some = np.array([[n - 1, 3, 40_000], [3, 16_384, 16_383]])
    assert (np.stack(million.at(some)) == np.stack([part[some], rank[some]])).all()
    for slot in some.ravel().tolist():
        assert million.slot(part[slot], rank[slot]) == slot


def test_a_stopped_interleave_is_the_beginning_of_the_whole(million):
    stop = 100_001
    short = Interleave(million.counts, "test", 1, stop=stop)
    part, rank = million.at(np.arange(stop))
    assert len(short) == stop
    assert (np.stack(short.at(np.arange(stop))) == np.stack([part, rank])).all()
    used = short.before(stop)
    assert used.tolist() == np.bincount(part, minlength=11).tolist()
    for i in range(11):
        assert short.slot(i, int(used[i]) - 1) == np.flatnonzero(part == i)[-1]
        assert short.slot(i, int(used[i])) is None
        assert short.slot(i, million.counts[i] - 1) is None
    with pytest.raises(IndexError, match=r"slot 100001 is outside 0\.\.100000"):
        short.at(stop)
    assert len(Interleave([2, 3], "x", stop=9)) == 5


def test_parts_are_spread_evenly(million):
    # In every stretch of 10,000 slots each part has its share, to 5 standard deviations of drawing without replacement.
    n = len(million)
    edges = np.stack([million.before(slot) for slot in range(0, n, 10_000)])
    w = np.array(million.counts) / n
    assert (np.abs(np.diff(edges, axis=0) - 10_000 * w) < 5 * np.sqrt(10_000 * w * (1 - w))).all()


def test_queries_take_milliseconds(million):
    million.at(0)  # makes the table
    part, rank = (int(v) for v in million.at(777_777))
    for query in (lambda: million.at(777_777), lambda: million.slot(part, rank), lambda: million.before(777_777)):
        took = []
        for _ in range(5):
            start = time.perf_counter()
            query()
            took.append(time.perf_counter() - start)
        assert min(took) < 0.02  # 1 to 2 ms on a quiet core: room for a busy one


#: Training windows of 2048 new tokens behind the tokens that fact sheet 3.4 gives for each phase, in billions.
SLIMPAJAMA = {
    "ArXiv": 14.91 + 14.91,
    "Book": 14.25 + 14.24,
    "C4": 91.90 + 91.90,
    "CommonCrawl": 183.95 + 183.97,
    "Github": 17.11 + 17.11,
    "StackExchange": 10.92 + 10.93,
    "Wikipedia": 11.78 + 11.79,
}
CODE = {"StarCoder": 582.46 / 2, "css": 10.55 / 3, "javascript": 22.03 / 3, "html": 22.23 / 3, "python": 41.10 / 3}
WINDOWS = {name: int(b * 1e9 / 2048) for name, b in (SLIMPAJAMA | CODE).items()}
SAMPLES = (79_721 * 2112, 214_387 * 2112, 27_728 * 2112)  # fact sheet 2.3


def real(phase: int, samples: int | None = None) -> Mixture:
    return Mixture.of(MIXTURES[phase], WINDOWS, samples=samples, file_samples=50_000, seed=1, phase=phase)


@pytest.mark.parametrize("phase", range(3))
def test_the_published_shares_to_one_sample_and_nothing_big_in_memory(phase):
    tracemalloc.start()
    mixture = real(phase, SAMPLES[phase])
    weights = [Fraction(p.weight) for p in MIXTURES[phase]]
    lengths = [len(r) for r in mixture.rows]
    length = max(n * sum(weights) / w for n, w in zip(lengths, weights) if w / sum(weights) > Fraction(1, 20))
    for slots, n, w in zip(mixture.epoch_slots, lengths, weights):
        assert 0 <= length * w / sum(weights) - slots < 1
        assert slots >= n or w / sum(weights) <= Fraction(1, 20)
    assert sum(p * n for p, n in zip(mixture.passes, lengths)) == pytest.approx(SAMPLES[phase])
    for rows in mixture.rows:  # both ways at full size
        some = np.linspace(0, len(rows) - 1, 50).astype(np.int64)
        _, window = rows.at(some)
        assert all(r in rows.of(w) for r, w in zip(some.tolist(), window.tolist()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_phases_read_what_the_fact_sheet_says():
    first, second, third = (real(n, SAMPLES[n]).passes for n in range(3))
    assert all(abs(p - 1) < 0.005 for p in first + second)  # half of SlimPajama each, two epochs of StarCoder
    passes = dict(zip([p.name for p in MIXTURES[2]], third))
    assert passes["Wikipedia"] == pytest.approx(3, abs=0.05)  # "wraps about 3 times"
    code = ("css", "javascript", "html", "python")
    assert all(abs(passes.pop(name) - 1) < 0.005 for name in code)  # 3 epochs each, once
    del passes["Wikipedia"]
    assert all(p < 1 for p in passes.values())  # "the other parts do not wrap"


def test_the_beginning_of_a_phase_of_real_size():
    # Phase 3 up to its 100,000th sample: the slots are those of the whole phase.
    mixture = real(2, 100_000)
    part, epoch, window = mixture.at(np.arange(100_000))
    counts = mixture.counts(0, 100_000)
    w = np.array([p.weight for p in MIXTURES[2]])
    assert (np.abs(counts - 100_000 * w) < 5 * np.sqrt(100_000 * w)).all()
    assert set(epoch.tolist()) == {0, 1, 2}
    for slot in (0, 12_345, 99_999):
        assert slot in mixture.slots_of(int(part[slot]), int(window[slot]))


def test_published_integers_of_phase_1_come_out():
    # Fact sheet 3.4: the weights of phase 1 are exactly these integers / 268,435,430.
    integers = (11610149, 11089655, 71538312, 143199072, 13321345, 8504126, 9172771)
    whole = [Part(p.name, p.weight) for p in MIXTURES[0]]
    sizes = dict(zip([p.name for p in whole], integers))
    mixture = Mixture.of(whole, sizes, samples=None, file_samples=1, seed=0, phase=0)
    assert max(abs(a - b) for a, b in zip(mixture.epoch_slots, integers)) <= 1
    assert abs(mixture.epoch - 268_435_430) <= 7


def test_without_large_parts_all_decide_how_long_an_epoch_is():
    small = [Part(f"p{i}", 1) for i in range(30)]
    sizes = {p.name: 10 + i for i, p in enumerate(small)}
    mixture = Mixture.of(small, sizes, samples=None, file_samples=1, seed=0, phase=0)
    assert mixture.epoch_slots == (39,) * 30
    # A twentieth is not more than 0.05: only the large part counts.
    mixture = Mixture.of(
        [Part("s", 1), Part("l", 19)], {"s": 100, "l": 19}, samples=None, file_samples=1, seed=0, phase=0
    )
    assert mixture.epoch_slots == (1, 19)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rows(Part("a", 1), 0, 5, 0), "part 'a': source a has 0 training windows, none; add documents"),
        (
            lambda: Rows(Part("a", 1, half="odd", source="x"), 5, 5, 0),
            "source x has 5 training windows, none in odd files of 5; add documents, or leave the part out, or lower",
        ),
        (lambda: Rows(Part("a", 1, stop=0.1), 9, 5, 0), "part 'a': none of its 9 rows lies between 0.0 and 0.1"),
    ],
)
def test_parts_without_rows_are_refused(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("mixed", "samples", "message"),
    [
        ([], None, "mixture of phase 4: has no parts"),
        ([Part("a", 1), Part("a", 2, source="b")], None, "two parts are named 'a'"),
        ([Part("a", 1), Part("z", 1)], None, "part 'z' reads source 'z', which is not one of a, b;"),
        ([Part("a", 1)], 0, "mixture of phase 4: 0 samples"),
        ([Part("a", 1), Part("b", 0.001)], None, "the share of part 'b' is less than one sample in an epoch of 50"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(mixed, samples, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Mixture.of(mixed, {"a": 50, "b": 60}, samples=samples, file_samples=5, seed=0, phase=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "weight 0.0 must be a positive number"),
        ({"weight": math.nan}, "weight nan must be"),
        ({"start": 0.5, "stop": 0.5}, "rows from 0.5 to 0.5; give 0 <= start < stop <= 1"),
        ({"stop": 1.5}, "rows from 0.0 to 1.5"),
        ({"half": "third"}, "half 'third' is not one of all, even, odd"),
        ({"epochs": 0}, "epochs 0 (at least 1)"),
        ({"fim_rate": 1.1}, "fim_rate 1.1 (0 to 1)"),
    ],
)
def test_parts_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UserError, match=re.escape("mixture: part 'a': ") + ".*" + re.escape(message)):
        Part(**{"name": "a", "weight": 1.0, **wrong})


def test_what_is_outside_is_refused():
    mixture = Mixture.of([Part("a", 1)], {"a": 10}, samples=7, file_samples=5, seed=0, phase=0)
    for query, message in (
        (lambda: mixture.at(np.array([6, 7])), "slot of phase 0 7 is outside 0..6"),
        (lambda: mixture.slots_of(1, 0), "part 1 is outside 0..0"),
        (lambda: mixture.slots_of(0, 10), "training window of source a 10 is outside 0..9"),
        (lambda: mixture.counts(0, 8), "slot of phase 0 8 is outside 0..7"),
        (lambda: mixture.rows[0].at(-1), "row of part a -1 is outside 0..9"),
        (lambda: Interleave([3, 4], "x").at(7), "slot 7 is outside 0..6"),
        (lambda: Interleave([3, 4], "x").slot(0, 3), "rank in part 0 3 is outside 0..2"),
        (lambda: Interleave([3, 4], "x").before(8), "slot 8 is outside 0..7"),
    ):
        with pytest.raises(IndexError, match=re.escape(message)):
            query()
    for counts in ([], [0], [1, -1]):
        with pytest.raises(ValueError, match="cannot interleave"):
            Interleave(counts, "x")
    with pytest.raises(ValueError, match="5 windows in files of 0"):
        Rows(Part("a", 1), 5, 0, 0)


def test_golden_mixture():
    # A change here is a change of every mixture ever prepared.
    mixed = [Part("a", 2, half="even", shuffle=True), Part("b", 1, source="a", epochs=2, shuffle=True, stop=0.5)]
    mixture = Mixture.of(mixed, {"a": 10}, samples=12, file_samples=2, seed=7, phase=1)
    assert [v.tolist() for v in mixture.at(np.arange(12))] == [
        [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [4, 5, 1, 7, 8, 0, 9, 4, 2, 5, 1, 8],
    ]
