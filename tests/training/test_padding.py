"""A batch that the mesh does not divide is padded with rows that count nothing: same samples, losses and gradients."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amber_jax.recipes import amber_tiny
from checkpoint.series import Series
from data.batch import Batch
from data.dataset import SyntheticData
from errors import UserError
from parallel.mesh import MeshConfig
from parallel.plan import batch_refusal, padded_rows
from tests.training.test_loop import FAMILIES, losses, on_mesh
from tests.training.ways import crystal, deep, first_state, mesh_of
from training import loop
from training.program import Program, no_limits
from training.record import RunRecord
from training.replay import Replayer
from training.step import batch_sharding, make_loss_and_gradients

STEPS, ROWS = 20, 30
DATA = SyntheticData.of_chunks(vocab_size=64, sequence_length=32, chunks=2, samples_per_chunk=10 * ROWS, seed=5)


def of_thirty(config):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=ROWS))


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 600))
def test_every_row_has_a_place_and_no_microbatch_is_only_padding(batch, microbatches, ways):
    rows = padded_rows(batch, microbatches, ways)
    assert rows % ways == 0
    assert microbatches * rows >= batch
    assert rows == ways or microbatches * (rows - ways) < batch, "no more than it takes"
    if batch % (microbatches * ways) == 0:
        assert microbatches * rows == batch, "nothing is added where all divides"
    if batch_refusal(batch, microbatches, ways) is None:
        assert (microbatches - 1) * rows < batch
        assert ways <= batch


@pytest.mark.parametrize(
    ("mesh", "microbatches", "message"),
    [
        ("data=64", 1, r"mesh: data\*fsdp = 64 devices share the rows of a batch, and data.global_batch=30 has fewer"),
        (
            "data=8",
            5,
            r"microbatches=5 cut a batch of 30 rows, 8 or a multiple of them at a time .* 1 would hold nothing",
        ),
    ],
)
def test_devices_and_microbatches_without_a_row_are_refused(tiny, mesh, microbatches, message):
    config = of_thirty(tiny)
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, microbatches=microbatches))
    with pytest.raises(UserError, match=message):
        config.check_mesh(MeshConfig.parse(mesh).degrees)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("padded") / "run"


@pytest.fixture
def run(tiny, folder):
    """Thirty rows on eight devices in two microbatches (padded to 32), interrupted after 13 of 20 steps."""
    if not folder.exists():
        execution = dataclasses.replace(tiny.execution, microbatches=2)
        config = on_mesh(of_thirty(dataclasses.replace(tiny, execution=execution)), "data=4,fsdp=2")
        loop.train(config, folder, DATA, FAMILIES, stop_at=13)
        loop.train(config, folder, DATA, FAMILIES)
    return folder


def test_twenty_steps_have_the_losses_of_one_device(tiny, run):
    config = of_thirty(tiny).resolve(DATA)
    one = Program.plan(config, mesh_of("data=1")).compile()
    state, found = one.init(), []
    for batch in loop.make_loader(config, DATA, one.mesh).batches(0, STEPS):
        assert batch.inputs.shape == (1, ROWS, 32), "one device needs no padding"
        state, values = one.train_step(state, batch, no_limits(one.mesh))
        found.append(float(values["loss"]))
    padded = [loss for loss, _ in losses(run).values()]
    # Tests' programs are not optimized and sum 960 losses one after the other; optimized ones agree to 1.2e-7.
    assert found[0] == pytest.approx(padded[0], rel=2e-6)
    np.testing.assert_allclose(padded, found, rtol=1e-5)  # contract 3


def test_a_padded_run_is_replayed_bit_for_bit_and_knows_its_samples(run):
    record = RunRecord(run, FAMILIES)
    init, latest = (Series(run).resolve(name)[0] for name in ("init", "latest"))
    assert Replayer(record, DATA).replay(init, latest).verdict == "bitwise"
    near = Replayer(record, DATA, MeshConfig.parse("tensor=8")).replay(init, latest)
    assert near.verdict == "within tolerance"
    assert [e.manifest.samples for e in Series(run).entries()] == [(0, 0), (0, 300), (300, 600)]
    assert latest.manifest.tokens == STEPS * ROWS * 32, "padding is no token"


def test_rows_are_those_of_the_step_in_order_and_padding_is_zeros(tiny):
    execution = dataclasses.replace(tiny.execution, microbatches=2)
    config = of_thirty(dataclasses.replace(tiny, execution=execution)).resolve(DATA)
    loader = loop.make_loader(config, DATA, mesh_of("data=4,fsdp=2"))
    (batch,) = loader.batches(3, 4)
    assert batch.inputs.shape == (2, 16, 32)
    there = [DATA.sample(*loader.schedule.place(3, row)) for row in range(ROWS)]
    for array, name in zip(batch, ("inputs", "targets", "weights"), strict=True):
        rows = np.asarray(array).reshape(32, 32)
        assert np.array_equal(rows[:ROWS], np.stack([getattr(s, name) for s in there]))
        assert not rows[ROWS:].any()


FEW = 14
FAMILY = {"amber": deep(amber_tiny()), "crystal": crystal()}


def loss_and_gradients(family, mesh, microbatches=1, **how):
    """Of a batch of 14 rows with random weights, cut and padded as `Program` would have it."""
    config = FAMILY[family]
    data = dataclasses.replace(config.data, global_batch=FEW)
    execution = dataclasses.replace(config.execution, microbatches=microbatches, **how)
    config = dataclasses.replace(config, data=data, execution=execution)
    built, length = mesh_of(mesh), data.sequence_length
    config.check_mesh(built.shape)
    shape = config.batch_shape(built.shape)
    rng = np.random.default_rng(1)
    tokens = rng.integers(config.model.vocab_size, size=(FEW, length + 1)).astype(np.int32)
    weights = (rng.random((FEW, length)) < 0.8).astype(np.float32)
    none = ((0, math.prod(shape) - FEW), (0, 0))
    batch = Batch(*(np.pad(a, none).reshape(*shape, length) for a in (tokens[:, :-1], tokens[:, 1:], weights)))
    step = jax.jit(make_loss_and_gradients(config.model, execution.region, built, config.loss_over, rows=FEW))
    loss, gradients = step(first_state(FAMILY[family], built).params, jax.device_put(batch, batch_sharding(built)))
    return float(loss), jax.tree.map(np.asarray, gradients), shape


of_one_device = functools.cache(functools.partial(loss_and_gradients, mesh="data=1"))


@pytest.mark.parametrize(
    ("family", "mesh", "microbatches", "how", "shape"),
    [
        ("amber", "data=4,fsdp=2", 1, {"gather": "once"}, (1, 16)),  # the last device has nothing but padding
        ("amber", "fsdp=2,tensor=2", 3, {"remat": "full"}, (3, 6)),
        ("crystal", "data=8", 1, {}, (1, 16)),  # divides by positions: those of the batch, not of the padding
        ("crystal", "pipeline=2,fsdp=4", 2, {"schedule": "1f1b"}, (2, 8)),
        ("crystal", "pipeline=2,fsdp=4", 2, {}, (2, 8)),
    ],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(family, mesh, microbatches, how, shape):
    loss, gradients, padded = loss_and_gradients(family, mesh, microbatches, **how)
    expected, expected_gradients, whole = of_one_device(family)
    assert (padded, whole) == (shape, (1, FEW))
    assert loss == pytest.approx(expected, rel=1e-6)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert np.max(np.abs(g - e)) <= 2e-6 * np.max(np.abs(e)), jax.tree_util.keystr(path)
