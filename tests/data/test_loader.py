"""What is read at step n does not depend on processes, workers, mesh or restarts, and damage is named."""

import dataclasses
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
from data.loader import ChunkedData, Loader, SyntheticData, local_batches, position
from errors import RunError, UserError

B = 12  # global batch


@pytest.fixture(scope="module")
def data(prepared) -> ChunkedData:
    return ChunkedData(prepared)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("pipeline", "data", "tensor"), axis_types=(AxisType.Auto,) * 3)


def plain_batch(data, step: int, global_batch: int = B) -> np.ndarray:
    """Return int32[B, S+1] of a step, by fact sheet 2.1."""
    steps_per_chunk = data.samples_per_chunk // global_batch
    start = step % steps_per_chunk * global_batch
    return np.stack([data.sample(step // steps_per_chunk, start + r) for r in range(global_batch)])


def test_position_with_ambers_numbers():
    amber = {"global_batch": 2240, "samples_per_chunk": 1_706_976}
    assert 1_706_976 // 2240 == 762
    assert 1_706_976 - 762 * 2240 == 96
    assert position(0, 0, **amber) == (0, 0)
    assert position(761, 2239, **amber) == (0, 1_706_976 - 96 - 1)
    assert position(762, 0, **amber) == (1, 0)
    assert position(274_319, 2239, **amber) == (359, 1_706_879)


def test_data_describes_itself(data, prepared):
    manifest = DataManifest.load(prepared)
    assert (data.sequence_length, data.vocab_size, data.chunks, data.sources) == (16, 400, 4, ("code", "prose"))
    assert (data.samples_per_chunk, data.sha256) == (manifest.samples_per_chunk, manifest.sha256)
    data.check_files()
    data.check_content()
    assert data.validation("prose").shape == (5, 17)
    assert data.validation("prose").dtype == np.int32
    with pytest.raises(UserError, match="has no source 'poems'; it has code, prose"):
        data.validation("poems")
    with pytest.raises(UserError, match=r"has no chunk 4, only 0\.\.3"):
        data.sample(4, 0)
    with pytest.raises(UserError, match=r"manifest\.json: not found"):
        ChunkedData(prepared / "chunks")


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (4, 0), (1, 1), (4, 2)])
def test_the_global_order_is_the_same_for_any_number_of_processes_and_workers(data, processes, workers):
    steps = range(data.samples_per_chunk // B - 2, data.samples_per_chunk // B + 2)  # across the edge of a chunk
    share = B // processes
    parts = [
        local_batches(
            data,
            range(p * share, (p + 1) * share),
            global_batch=B,
            start_step=steps.start,
            stop_step=steps.stop,
            workers=workers if p == 0 else 0,  # one process with workers beside others without
        )
        for p in range(processes)
    ]
    batches = [np.concatenate(shares) for shares in zip(*parts, strict=True)]
    assert len(batches) == 4
    for step, batch in zip(steps, batches):
        assert batch.dtype == np.int32
        assert batch.tolist() == plain_batch(data, step).tolist()


def test_any_rows_in_any_order(data):
    (batch,) = local_batches(data, [7, 0, 11], global_batch=B, start_step=1, stop_step=2)
    assert batch.tolist() == plain_batch(data, 1)[[7, 0, 11]].tolist()
    assert list(local_batches(data, [0], global_batch=B, start_step=3, stop_step=3)) == []


SPECS = [P(), P(None, "data"), P(None, ("pipeline", "data", "tensor")), P("pipeline", "data", "tensor"), P("tensor")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_batches_are_the_same_under_any_sharding(data, mesh, spec):
    loader = Loader(data, global_batch=16, microbatches=2, sharding=NamedSharding(mesh, spec))
    for step, batch in zip(range(3, 6), loader.batches(3, 6), strict=True):
        rows = plain_batch(data, step, 16).reshape(2, 8, 17)
        for array, expected in ((batch.inputs, rows[..., :-1]), (batch.targets, rows[..., 1:])):
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
            assert (array.shape, array.dtype) == ((2, 8, 16), np.int32)
            assert np.array_equal(array, expected)
        assert batch.weights.dtype == np.float32
        assert np.array_equal(batch.weights, np.ones((2, 8, 16)))


PROCESS = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from data.loader import ChunkedData, Loader, local_batches

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
data = ChunkedData(folder)
(rows,) = local_batches(data, range(12), global_batch=12, start_step=3, stop_step=4)
rows = rows.reshape(3, 4, 17)
for axes, expected in [
    (("data", "tensor"), [0, 1, 4, 5, 8, 9] if process == 0 else [2, 3, 6, 7, 10, 11]),  # data across processes
    (("tensor", "data"), list(range(12))),  # data inside each: both read every row
]:
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(None, "data", "tensor"))
    loader = Loader(data, global_batch=12, microbatches=3, sharding=sharding)
    assert loader.rows == expected, (axes, loader.rows)
    (batch,) = loader.batches(3, 4)
    for array, values in ((batch.inputs, rows[..., :-1]), (batch.targets, rows[..., 1:])):
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
def test_resuming_at_a_step_is_skipping_the_steps_before(data, mesh, prefetch):
    loader = Loader(data, global_batch=B, microbatches=3, sharding=NamedSharding(mesh, P()), prefetch=prefetch)
    whole = list(loader.batches(0, loader.steps))
    assert len(whole) == loader.steps == 4 * (data.samples_per_chunk // B)
    for start in (1, loader.steps_per_chunk, loader.steps - 1):
        for resumed, first in zip(loader.batches(start, loader.steps), whole[start:], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(resumed, first))


def test_a_pickled_data_set_reads_the_same(data):
    assert pickle.loads(pickle.dumps(data)).sample(2, 3).tolist() == data.sample(2, 3).tolist()


@pytest.fixture
def damaged(prepared, tmp_path) -> ChunkedData:
    shutil.copytree(prepared, tmp_path / "set")
    return ChunkedData(tmp_path / "set")


def loader_of(data, mesh, **options) -> Loader:
    return Loader(data, **({"global_batch": B, "microbatches": 1, "sharding": NamedSharding(mesh, P())} | options))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_is_never_trained_on(damaged, mesh, workers):
    sample = damaged.sample(1, 5).astype("<u2").tobytes()
    path = damaged.directory / "chunks" / "001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[content.index(sample) + 3] ^= 1
    path.write_bytes(content)
    damaged.check_files()  # sizes are right
    with pytest.raises(RunError, match=r"001\.arrayrecord: SHA-256 differs"):
        damaged.check_content()
    loader = loader_of(ChunkedData(damaged.directory), mesh, workers=workers)
    batches = loader.batches(loader.steps_per_chunk - 1, loader.steps_per_chunk + 1)
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
        ({"microbatches": 5}, "a global batch of 12 samples cannot be split into 5 microbatches"),
        ({"microbatches": 0}, "a global batch of 12 samples cannot be split into 0 microbatches"),
        ({"global_batch": 99_999}, r"a chunk has \d+ samples, fewer than one global batch of 99999"),
        ({"workers": -1}, "workers = -1, prefetch = 2: at least 0"),
        ({"prefetch": -1}, "workers = 0, prefetch = -1: at least 0"),
    ],
)
def test_loaders_that_cannot_work_are_refused(data, mesh, options, message):
    with pytest.raises(UserError, match=message):
        loader_of(data, mesh, **options)


def test_steps_beyond_the_data_are_refused(data, mesh):
    loader = loader_of(data, mesh)
    for start, stop in ((0, loader.steps + 1), (-1, 1), (3, 2)):
        with pytest.raises(UserError, match=rf"steps {start}\.\.{stop} asked for, but the data holds steps 0\.\.\d+"):
            loader.batches(start, stop)


def test_synthetic_data(mesh):
    data = SyntheticData(vocab_size=50_000, sequence_length=1000, chunks=3, samples_per_chunk=20, seed=1)
    data.check_files()
    sample = data.sample(2, 19)
    assert (sample.shape, sample.dtype) == ((1001,), np.int32)
    assert 0 <= sample.min() < 500
    assert 49_500 < sample.max() < 50_000
    assert sample.tolist() == data.sample(2, 19).tolist()
    others = [data.sample(1, 19), data.sample(2, 18), dataclasses.replace(data, seed=2).sample(2, 19)]
    assert all((sample != other).any() for other in others)
    assert data.sha256 != dataclasses.replace(data, seed=2).sha256
    loader = loader_of(data, mesh)
    (batch,) = loader.batches(2, 3)
    assert np.array_equal(batch.inputs[0], plain_batch(data, 2)[:, :-1])
    assert data.sources == ()
    with pytest.raises(UserError, match="synthetic data has no validation source 'a'"):
        data.validation("a")
    with pytest.raises(UserError, match=r"synthetic data has no chunk 3, only 0\.\.2"):
        data.sample(3, 0)
    with pytest.raises(IndexError, match=r"position 20 is outside 0\.\.19"):
        data.sample(0, 20)
    with pytest.raises(UserError, match="synthetic data: chunks = 0: at least 1"):
        dataclasses.replace(data, chunks=0)
