"""Other mixtures of a prepared data set."""

import pickle

import pytest

from data.dataset import ChunkedData
from data.mixed import MixedData
from data.trace import Tracer
from errors import UserError


def test_shares_and_order_are_the_mixtures(prepared):
    data = ChunkedData(prepared)
    tracer, layout = Tracer(data), data.manifest.chunk_layout
    mixed = MixedData.parse(data, "code=0.7, prose=0.3")
    phase = mixed.phases[0]
    order = {name: [] for name in data.sources}
    for chunk in range(phase.chunks):
        for position in range(phase.samples_per_chunk):
            at = mixed.origin(chunk, position)
            order[tracer.origin(*at).source].append(at)
            assert mixed.sample(chunk, position).tokens.tolist() == data.sample(*at).tokens.tolist()
    assert abs(len(order["code"]) - 0.7 * phase.samples) <= 1
    for s in layout.sources:
        assert mixed.passes[s.name] == len(order[s.name]) / (layout.chunks * s.per_chunk)
    assert mixed.shares == {n: len(found) / phase.samples for n, found in order.items()}
    for source in layout.sources:
        # In the order of the data set, from the start again where it does not last: one chunk of a source at a time.
        found = order[source.name]
        once = sorted(set(found))
        assert found == (once * (1 + len(found) // len(once)))[: len(found)]
        assert len(once) == min(len(found), layout.chunks * source.per_chunk)
        assert all(tracer.origin(*at).source == source.name for at in once)


def test_places_are_the_inverse_of_origins(prepared):
    data = ChunkedData(prepared)
    for text in ("code=0.9,prose=0.1", "code=1"):
        mixed, read = MixedData.parse(data, text), {}
        phase = mixed.phases[0]
        for chunk in range(phase.chunks):
            for position in range(phase.samples_per_chunk):
                read.setdefault(mixed.origin(chunk, position), []).append((chunk, position))
        for chunk in range(phase.chunks):
            for position in range(phase.samples_per_chunk):
                assert mixed.places(chunk, position) == read.get((chunk, position), [])


def test_a_view_is_a_data_set_of_its_own(prepared):
    data = ChunkedData(prepared)
    mixed, other = MixedData.parse(data, "code=1"), MixedData.parse(data, "code=1,prose=1")
    assert len({data.sha256, mixed.sha256, other.sha256}) == 3
    assert mixed.sources == data.sources
    assert mixed.validation("prose").tokens.tolist() == data.validation("prose").tokens.tolist()
    copy = pickle.loads(pickle.dumps(mixed))
    assert copy.sha256 == mixed.sha256
    assert copy.sample(1, 2).tokens.tolist() == mixed.sample(1, 2).tokens.tolist()
    mixed.check_files()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code", "write SOURCE=WEIGHT"),
        ("code=x", "write SOURCE=WEIGHT"),
        ("code=0", "weights are positive numbers"),
        ("css=1", "source 'css' is not there, or named twice; .* has code, prose"),
        ("code=1,code=2", "source 'code' is not there, or named twice"),
    ],
)
def test_wrong_mixtures_are_refused(prepared, text, message):
    with pytest.raises(UserError, match=message):
        MixedData.parse(ChunkedData(prepared), text)


def test_phases_cannot_be_mixed_again(crystal):
    with pytest.raises(UserError, match="prepared as the mixtures of 2 phases, which cannot be mixed again"):
        MixedData.parse(ChunkedData(crystal), "code=1")
