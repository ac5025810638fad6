"""The schedules, said again in plain Python, and the moves that they rest on."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parallel import pipeline
from parallel.collectives import deal
from parallel.pipeline import Timetable


@pytest.mark.parametrize(
    ("stages", "microbatches", "repeats"), [(1, 3, 1), (4, 1, 1), (4, 7, 1), (4, 8, 2), (2, 6, 3), (8, 8, 1)]
)
def test_gpipe_does_all_the_work_once_and_in_order(stages, microbatches, repeats):
    table = Timetable("gpipe", stages, microbatches, repeats)
    when = {}
    for tick in range(table.ticks):
        for stage in range(stages):
            microbatch, repeat, busy = table.forward(tick, stage)
            if busy:
                assert 0 <= microbatch < microbatches
                assert 0 <= repeat < repeats
                assert when.setdefault((microbatch, repeat, stage), tick) == tick, "never done twice"
    assert len(when) == stages * microbatches * repeats
    for (microbatch, repeat, stage), tick in when.items():
        if stage:  # what the stage before sent in the tick before is what this one works on
            assert when[microbatch, repeat, stage - 1] == tick - 1
        elif repeat:
            assert when[microbatch, repeat - 1, stages - 1] == tick - 1
    idle = 1 - len(when) / (stages * table.ticks)
    assert math.isclose(table.bubble, idle)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (4, 1), (4, 3), (4, 16), (8, 9)])
def test_one_forward_one_backward_keeps_few_inputs(stages, microbatches):
    table = Timetable("1f1b", stages, microbatches)
    forward, backward = {}, {}
    for tick in range(table.ticks):
        for stage in range(stages):
            microbatch, _, busy = table.forward(tick, stage)
            if busy:
                assert forward.setdefault((microbatch, stage), tick) == tick
            microbatch, busy = table.backward(tick, stage)
            if busy:
                assert backward.setdefault((microbatch, stage), tick) == tick
    everything = {(m, s) for m in range(microbatches) for s in range(stages)}
    assert forward.keys() == backward.keys() == everything
    for microbatch, stage in everything:
        if stage < stages - 1:
            assert forward[microbatch, stage + 1] == forward[microbatch, stage] + 1
            assert backward[microbatch, stage] == backward[microbatch, stage + 1] + 1
        else:
            assert backward[microbatch, stage] == forward[microbatch, stage]
    for stage in range(stages):
        for tick in range(table.ticks):
            kept = [m for m in range(microbatches) if forward[m, stage] <= tick <= backward[m, stage]]
            assert len(kept) <= 2 * stages - 1
            assert len({m % (2 * stages - 1) for m in kept}) == len(kept), "no two in one slot"


@pytest.mark.parametrize(("stages", "repeats"), [(2, 2), (4, 2), (2, 4), (4, 3), (8, 2), (4, 4), (4, 6), (1, 2)])
def test_layers_are_dealt_as_the_circular_schedule_wants_them(mesh_of, stages, repeats):
    per_run = 2
    layers = stages * repeats * per_run
    mesh = mesh_of(f"pipeline={stages}")
    spec = PartitionSpec("pipeline") if stages > 1 else PartitionSpec()
    rows = np.arange(layers * 3, dtype=np.float32).reshape(layers, 3)
    dealt = jax.jit(jax.shard_map(lambda x: deal(x, repeats)[None], mesh=mesh, in_specs=spec, out_specs=spec))(
        jax.device_put(rows, jax.NamedSharding(mesh, spec))
    )  # [stages, repeats, per_run, 3]
    expected = rows.reshape(repeats, stages, per_run, 3).swapaxes(0, 1)
    np.testing.assert_array_equal(dealt, expected)


def test_a_hand_on_goes_round(mesh_of):
    mesh = mesh_of("pipeline=4")
    spec = PartitionSpec("pipeline")
    for step, expected in ((1, [3, 0, 1, 2]), (-1, [1, 2, 3, 0])):
        move = jax.shard_map(lambda x, step=step: pipeline.hand_on(x, step), mesh=mesh, in_specs=spec, out_specs=spec)
        np.testing.assert_array_equal(jax.jit(move)(np.arange(4)), expected)
