"""What the planner is told of a run, and that a run takes the plans it gives."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest

from amber_jax.recipes import amber_7b, amber_tiny
from crystal_jax.recipes import crystal_7b, crystal_tiny
from errors import UserError
from layers import params
from parallel import planner
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.topology import Topology
from training import planning
from training.program import Program


def local_bytes(tree):
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("recipe", [amber_tiny, crystal_tiny])
@pytest.mark.parametrize(
    "mesh", ["data=8", "fsdp=8", "fsdp=2,tensor=4", "pipeline=2,fsdp=2,tensor=2", "pipeline=4,data=2"]
)
def test_state_is_predicted_to_the_byte(recipe, mesh, mesh_of):
    config = recipe()
    config = config.resolve(config.synthetic())
    state = Program.plan(config, mesh_of(mesh)).abstract
    work = planning.workload(config, "cpu")
    mesh = MeshConfig.parse(mesh)
    microbatches = mesh.pipeline
    memory = planner.predict(work, Topology.parse("cpu:8"), Plan(mesh, microbatches)).memory
    found = {line.what: line.value for line in memory}
    assert found["parameters"] == local_bytes(state.params)
    scalars = 64  # counts of updates
    assert found["moments"] <= local_bytes(state.optimizer) <= found["moments"] + scalars


@pytest.mark.parametrize("recipe", [amber_7b, crystal_7b, amber_tiny, crystal_tiny])
def test_counts_are_the_models_own(recipe):
    config = recipe()
    work = planning.workload(config, "tpu")
    assert work.parameters == params.count(config.model.abstract) == config.model.num_parameters
    assert work.layer_parameters * work.num_layers + work.end_parameters == work.parameters
    assert work.tokens == config.data.tokens_per_step
    flops = planner.predict(work, Topology.parse("cpu:1"), Plan(MeshConfig(), remat="none")).flops
    model = config.model.train_flops_per_token(config.data.sequence_length, causal=True) * work.tokens
    assert 1 < flops / model < 1.25, "the model's own, and what flash attention and the loss in pieces do again"


def test_legality_is_the_runs_own():
    """The planner and the run refuse the same plans: every mesh of 1 to 16 devices, other choices drawn."""
    drawn = random.Random(5)
    verdicts = []
    for recipe, devices in itertools.product((amber_tiny(), crystal_tiny()), (1, 2, 3, 4, 6, 8, 12, 16)):
        work = planning.workload(recipe, "cpu")
        for mesh in planner.meshes(devices):
            schedule = drawn.choice(["gpipe", "1f1b"])
            repeats = drawn.choice([1, 2]) if schedule == "gpipe" else 1
            plan = Plan(mesh, drawn.choice([1, 2, 3, 4, 8, 16]), schedule, repeats)
            try:
                planning.with_plan(recipe, plan).check_mesh(mesh.degrees)
                run = None
            except UserError as error:
                run = str(error)
            ours = planner.refusal(work, plan, devices)
            assert (run is None) == (ours is None), (plan, run, ours)
            verdicts.append(ours)
    assert 20 < sum(v is None for v in verdicts) < len(verdicts) - 20, "both verdicts are tried"


def test_a_plan_goes_into_a_config_and_comes_out():
    config = amber_tiny()
    plan = Plan(MeshConfig(pipeline=2, fsdp=4), 4, "gpipe", 2, "tick", "dots", True)
    planned = planning.with_plan(config, plan)
    assert planning.plan_of(planned, 8) == plan
    assert planned.sha256 == config.sha256, "the same run"
    assert planning.plan_of(config, 8).mesh == MeshConfig(data=8), "-1 is filled in"
    with pytest.raises(UserError, match=r"3\*1\*1 = 3 but 8 devices"):
        planning.plan_of(dataclasses.replace(config, mesh=MeshConfig(data=3)), 8)


@pytest.mark.parametrize("recipe", [amber_tiny, crystal_tiny])
def test_auto_gives_a_config_that_the_run_accepts(recipe):
    config, prediction = planning.auto(recipe(), Topology.of(jax.devices()))
    config.check_mesh(config.mesh.degrees)
    assert config.mesh.size == 8
    assert prediction.plan == planning.plan_of(config, 8)
    assert prediction.bytes <= planner.limit(prediction.topology)


def test_auto_keeps_a_mesh_that_is_given():
    mesh = MeshConfig(fsdp=4, tensor=2)
    config, _ = planning.auto(amber_tiny(), Topology.parse("cpu:8"), mesh)
    assert config.mesh == mesh


def test_the_platform_decides_the_attention_kernel():
    assert planning.workload(amber_tiny(), "cpu").quadratic_attention, "at 256 positions the plain softmax is faster"
    assert not planning.workload(amber_7b(), "tpu").quadratic_attention
    splash = dataclasses.replace(amber_7b(), execution=dataclasses.replace(amber_7b().execution, attention="splash"))
    with pytest.raises(UserError, match="splash"):
        planning.workload(splash, "gpu")
