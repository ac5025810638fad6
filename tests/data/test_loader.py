"""What is read at step n does not depend on processes, workers, mesh or restarts, and damage is named."""

import dataclasses
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from data.chunks import DataManifest
from data.dataset import ChunkedData, SyntheticData
from data.loader import Loader, local_batches
from data.sample import PhaseSamples, Sample, Schedule
from errors import RunError, UserError
from tests.data.rearranged import Rearranged

B = 12  # global batch


@pytest.fixture(scope="module")
def data(prepared) -> ChunkedData:
    return ChunkedData(prepared)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("pipeline", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)


#: Phase 0: chunks 0..3 of 20, 20, 20 and 10 samples, 5 batches of 12 with 10 left; phase 1: chunks 4..6, 4 with 1 left.
PHASES = (PhaseSamples(0, 70, 20, carry=True), PhaseSamples(4, 49, 20, carry=True))
PHASE_STEPS = (5, 4)


@pytest.fixture(scope="module")
def mixed() -> SyntheticData:
    return Rearranged(1000, 16, PHASES, seed=3)


def stacked(samples) -> Sample:
    return Sample(*map(np.stack, zip(*samples, strict=True)))


def chunk_steps(data, global_batch: int = B) -> tuple[int]:
    """Steps of data in one phase of chunks, by fact sheet 2.1."""
    (phase,) = data.phases
    return (phase.chunks * (phase.samples_per_chunk // global_batch),)


def plain_batch(data, step: int, global_batch: int = B) -> Sample:
    """Return the global batch of a step of data in one phase of chunks, by fact sheet 2.1."""
    steps_per_chunk = data.phases[0].samples_per_chunk // global_batch
    start = step % steps_per_chunk * global_batch
    return stacked(data.sample(step // steps_per_chunk, start + r) for r in range(global_batch))


def mixed_batches(data, global_batch: int = B) -> list[Sample]:
    """Return all global batches of `mixed`: the samples of each phase in a row, cut into batches (fact sheet 3.4)."""
    batches = []
    for chunks in (((0, 20), (1, 20), (2, 20), (3, 10)), ((4, 20), (5, 20), (6, 9))):
        rows = [data.sample(c, p) for c, n in chunks for p in range(n)]
        batches += [stacked(rows[n : n + global_batch]) for n in range(0, len(rows) - global_batch + 1, global_batch)]
    return batches


def equal(batch, expected) -> bool:
    return len(batch) == len(expected) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(batch, expected)
    )


def test_data_describes_itself(data, prepared):
    manifest = DataManifest.load(prepared)
    assert (data.sequence_length, data.vocab_size, data.sources) == (16, 400, ("code", "prose"))
    assert (data.phases, data.sha256) == (manifest.phase_samples, manifest.sha256)
    assert data.phases[0].chunks == 4
    data.check_files()
    data.check_content()
    held_out = data.validation("prose")
    assert [(a.shape, a.dtype) for a in held_out] == [((5, 16), np.int32)] * 2 + [((5, 16), np.float32)]
    assert held_out.is_window
    assert len({row.tobytes() for row in held_out.tokens}) == 5
    for start, stop in ((0, 2), (2, 4), (4, 6), (6, 8)):
        part = data.validation("prose", start, stop)
        assert part.tokens.tolist() == held_out.tokens[start:stop].tolist()
    with pytest.raises(UserError, match="has no source 'poems'; it has code, prose"):
        data.validation("poems")
    with pytest.raises(UserError, match=r"has no chunk 4, only 0\.\.3"):
        data.sample(4, 0)
    with pytest.raises(UserError, match=r"manifest\.json: not found"):
        ChunkedData(prepared / "chunks")


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (4, 0), (1, 1)])
def test_the_global_order_is_the_same_for_any_number_of_processes_and_workers(data, processes, workers):
    edge = data.phases[0].samples_per_chunk // B
    batches = read(data, chunk_steps(data), range(edge - 2, edge + 2), processes, workers)  # across the edge of a chunk
    assert len(batches) == 4
    for step, batch in zip(range(edge - 2, edge + 2), batches):
        assert equal(batch, plain_batch(data, step))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_the_order_of_phases_and_masks_is_the_same_too(mixed, processes, workers):
    """Batches begin in one chunk and end in the next, none in the next phase; targets and weights are the sample's."""
    batches = read(mixed, PHASE_STEPS, range(9), processes, workers)
    expected = mixed_batches(mixed)
    assert len(batches) == len(expected) == 9
    for batch, rows in zip(batches, expected):
        assert equal(batch, rows)
        assert 0 < rows.weights.sum() < rows.weights.size
        assert not rows.is_window


def read(data, phase_steps, steps, processes, workers) -> list[Sample]:
    """Global batches, put together from what each of so many processes reads."""
    share = B // processes
    schedule = Schedule(data.phases, phase_steps, B)
    parts = [
        local_batches(
            data,
            schedule,
            range(p * share, (p + 1) * share),
            start_step=steps.start,
            stop_step=steps.stop,
            workers=workers if p == 0 else 0,  # one process with workers beside others without
        )
        for p in range(processes)
    ]
    return [Sample(*map(np.concatenate, zip(*shares))) for shares in zip(*parts, strict=True)]


def test_any_rows_in_any_order(data):
    schedule = Schedule(data.phases, chunk_steps(data), B)
    (batch,) = local_batches(data, schedule, [7, 0, 11], start_step=1, stop_step=2)
    assert equal(batch, [values[[7, 0, 11]] for values in plain_batch(data, 1)])
    assert list(local_batches(data, schedule, [0], start_step=3, stop_step=3)) == []


SPECS = [P(), P(None, "data"), P(None, ("pipeline", "data", "tensor")), P("pipeline", "data", "tensor"), P("tensor")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_batches_are_the_same_under_any_sharding(mixed, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    loader = loader_of(mixed, mesh, phase_steps=(4, 3), global_batch=16, microbatches=2, sharding=sharding)
    expected = mixed_batches(mixed, 16)[2:7]  # across the edge of a phase
    for batch, rows in zip(loader.batches(2, 7), expected, strict=True):
        assert all(array.sharding.is_equivalent_to(sharding, 3) for array in batch)
        assert equal(batch, [values.reshape(2, 8, 16) for values in rows])


PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from data.dataset import ChunkedData
from data.loader import Loader, local_batches
from data.sample import Schedule

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
data = ChunkedData(folder)
steps = (data.phases[0].steps(12),)
(rows,) = local_batches(data, Schedule(data.phases, steps, 12), range(12), start_step=3, stop_step=4)
rows = [values.reshape(3, 4, 16) for values in rows]
for axes, expected in [
    (("data", "tensor"), [0, 1, 4, 5, 8, 9] if process == 0 else [2, 3, 6, 7, 10, 11]),  # data across processes
    (("tensor", "data"), list(range(12))),  # data inside each: both read every row
]:
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(None, "data", "tensor"))
    loader = Loader(data, phase_steps=steps, global_batch=12, microbatches=3, sharding=sharding)
    assert loader.rows == expected, (axes, loader.rows)
    (batch,) = loader.batches(3, 4)
    for array, values in zip(batch, rows):
        assert array.shape == (3, 4, 16)
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, values[shard.index])
print("same")
"""


def test_two_processes_build_the_same_global_batch(prepared, tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / "process.py", address, str(process), prepared],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=100)
        assert out.endswith("same\n"), err[-3000:]


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resuming_at_a_step_is_skipping_the_steps_before(data, mixed, mesh, prefetch):
    for source, steps in ((data, chunk_steps(data)), (mixed, PHASE_STEPS)):
        loader = loader_of(source, mesh, phase_steps=steps, microbatches=3, prefetch=prefetch)
        whole = list(loader.batches(0, loader.steps))
        assert len(whole) == loader.steps == sum(steps)
        for start in (1, 5, loader.steps - 1):
            state = json.loads(json.dumps(loader.state(start)))
            again = loader_of(source, mesh, phase_steps=steps, microbatches=3, prefetch=prefetch)
            for resumed, first in zip(again.batches(again.start(state), loader.steps), whole[start:], strict=True):
                assert equal(resumed, first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "state has version 2, and this program reads 1; go on with the version that wrote it"),
        ({"data": "f" * 64}, r"trained on data with manifest f{12}…, and --data has [0-9a-f]{12}…; give the run's own"),
        ({"global_batch": 24}, "global batch is 24 samples, and 12 are asked for"),
    ],
)
def test_a_state_that_means_other_samples_is_refused(mixed, mesh, change, message):
    loader = loader_of(mixed, mesh)
    with pytest.raises(UserError, match=message):
        loader.start(loader.state(3) | change)


def test_phases_of_a_run_read_on_through_data_of_one_phase(mesh):
    data = Rearranged(1000, 16, PHASES[:1], seed=3)
    split, whole = loader_of(data, mesh, phase_steps=(2, 3)), loader_of(data, mesh, phase_steps=(5,))
    for a, b in zip(split.batches(0, 5), whole.batches(0, 5), strict=True):
        assert equal(a, b)


def test_a_pickled_data_set_reads_the_same(data):
    assert equal(pickle.loads(pickle.dumps(data)).sample(2, 3), data.sample(2, 3))


@pytest.fixture
def damaged(prepared, tmp_path) -> ChunkedData:
    shutil.copytree(prepared, tmp_path / "set")
    return ChunkedData(tmp_path / "set")


def loader_of(data, mesh, **options) -> Loader:
    steps = chunk_steps(data) if len(data.phases) == 1 else PHASE_STEPS
    usual = {"phase_steps": steps, "global_batch": B, "microbatches": 1, "sharding": NamedSharding(mesh, P())}
    return Loader(data, **(usual | options))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_is_never_trained_on(damaged, mesh, workers):
    sample = damaged.sample(1, 5).tokens.astype("<u2").tobytes()
    path = damaged.directory / "chunks" / "001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[content.index(sample) + 3] ^= 1
    path.write_bytes(content)
    damaged.check_files()  # sizes are right
    with pytest.raises(RunError, match=r"001\.arrayrecord: SHA-256 differs"):
        damaged.check_content()
    loader = loader_of(ChunkedData(damaged.directory), mesh, workers=workers)
    edge = damaged.phases[0].samples_per_chunk // B
    batches = loader.batches(edge - 1, edge + 1)
    with pytest.raises(RunError, match=r"001\.arrayrecord: sample 5 is corrupt"):
        list(batches)


def test_missing_and_cut_chunks_are_found_before_training(damaged, mesh):
    path = damaged.directory / "chunks" / "002.arrayrecord"
    os.truncate(path, 1000)
    with pytest.raises(RunError, match=r"002\.arrayrecord: 1000 bytes, the manifest says"):
        damaged.check_files()
    path.unlink()
    with pytest.raises(RunError, match=r"002\.arrayrecord: missing"):
        damaged.check_files()
    with pytest.raises(RunError, match=r"002\.arrayrecord: missing"):
        damaged.sample(2, 0)


def test_ids_outside_the_vocabulary_are_refused(damaged, mesh):
    manifest = damaged.manifest
    dataclasses.replace(manifest, vocab_size=100).save(damaged.directory)
    loader = loader_of(ChunkedData(damaged.directory), mesh)
    with pytest.raises(RunError, match=r"000\.arrayrecord: sample \d+ holds id \d+, outside the vocabulary of 100"):
        list(loader.batches(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 13}, "a global batch of 12 samples cannot be split into 13 microbatches"),
        ({"microbatches": 4, "rows": 2}, "4 microbatches of 2 rows do not hold a global batch of 12 samples"),
        ({"microbatches": 0}, "a global batch of 12 samples cannot be split into 0 microbatches"),
        ({"global_batch": 99_999}, r"a chunk has \d+ samples, fewer than one global batch of 99999"),
        ({"workers": -1}, "workers = -1, prefetch = 2: at least 0"),
        ({"prefetch": -1}, "workers = 0, prefetch = -1: at least 0"),
    ],
)
def test_loaders_that_cannot_work_are_refused(data, mesh, options, message):
    with pytest.raises(UserError, match=message):
        loader_of(data, mesh, **options)


def test_steps_beyond_the_run_are_refused(data, mesh):
    loader = loader_of(data, mesh)
    for start, stop in ((0, loader.steps + 1), (-1, 1), (3, 2)):
        with pytest.raises(UserError, match=rf"steps {start}\.\.{stop} asked for, but the run has steps 0\.\.\d+"):
            loader.batches(start, stop)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((5, 5), "phase 1 has 4 steps of 12 samples, and the run's 5; prepare more, or set --phases.1.steps"),
        ((1, 1, 1), "prepared for 2 phases, and the run has 3"),
        ((9,), "prepared for 2 phases, and the run has 1"),
    ],
)
def test_phases_that_the_data_does_not_have_are_refused(mixed, mesh, steps, message):
    with pytest.raises(UserError, match=message):
        loader_of(mixed, mesh, phase_steps=steps)


def test_synthetic_data(mesh):
    size = {"vocab_size": 50_000, "sequence_length": 1000, "chunks": 3, "samples_per_chunk": 20}
    data = SyntheticData.of_chunks(**size, seed=1)
    data.check_files()
    sample = data.sample(2, 19)
    assert [(a.shape, a.dtype) for a in sample] == [((1000,), np.int32)] * 2 + [((1000,), np.float32)]
    assert sample.is_window
    assert 0 <= sample.inputs.min() < 500
    assert 49_500 < sample.inputs.max() < 50_000
    assert equal(sample, data.sample(2, 19))
    others = [data.sample(1, 19), data.sample(2, 18), dataclasses.replace(data, seed=2).sample(2, 19)]
    assert all((sample.inputs != other.inputs).any() for other in others)
    assert data.sha256 != dataclasses.replace(data, seed=2).sha256
    (batch,) = loader_of(data, mesh).batches(2, 3)
    assert equal(batch, [values[None] for values in plain_batch(data, 2)])
    assert data.sources == ()
    with pytest.raises(UserError, match="synthetic data has no validation source 'a'"):
        data.validation("a")
    with pytest.raises(UserError, match=r"synthetic data has no chunk 3, only 0\.\.2"):
        data.sample(3, 0)
    with pytest.raises(IndexError, match=r"position 20 is outside 0\.\.19"):
        data.sample(0, 20)
    with pytest.raises(UserError, match=r"synthetic data: phases\.0\.samples = 0: at least 1"):
        SyntheticData.of_chunks(**size | {"chunks": 0}, seed=1)


def test_synthetic_data_of_several_phases(mixed):
    mixed.sample(3, 9)
    mixed.sample(6, 8)
    with pytest.raises(IndexError, match=r"position 10 is outside 0\.\.9"):
        mixed.sample(3, 10)
    with pytest.raises(UserError, match=r"no chunk 7, only 0\.\.6"):
        mixed.sample(7, 0)
    with pytest.raises(UserError, match="each phase must begin at the chunk after the last one of the phase before"):
        dataclasses.replace(mixed, phases=PHASES[1:])
    with pytest.raises(UserError, match="phases = 0: at least 1"):
        dataclasses.replace(mixed, phases=())


def test_a_process_that_holds_nothing_but_padding_gets_batches_of_no_rows(data):
    schedule = Schedule(data.phases, chunk_steps(data), B)
    found = list(local_batches(data, schedule, [], start_step=1, stop_step=4))
    assert [(s.inputs.shape, s.weights.dtype) for s in found] == [((0, data.sequence_length), np.float32)] * 3
