"""A run's config as the planner sees it, and a plan put into a config."""

import dataclasses

from flax import nnx

from layers import params
from parallel import planner
from parallel.axes import MESH_AXES
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.planner import Prediction, Weight, Workload
from parallel.topology import Topology
from training.config import RunConfig


def workload(config: RunConfig, platform: str) -> Workload:
    """The numbers of a run's training step that planning needs.

    Args:
        config: any recipe; its mesh and plan do not matter.
        platform: of the chips (`parallel.topology.Chip.platform`), which decides the attention kernel.

    Raises:
        UserError: the config names an attention kernel that cannot run there.
    """
    model, execution, data = config.model, config.execution, config.data
    kernel = config.region(platform).attention
    whole = dict.fromkeys(MESH_AXES, 1)
    weights = tuple(
        Weight(".".join(map(str, path)), tuple(p.shape), params.stored_axes(p, whole))
        for path, p in nnx.to_flat_state(nnx.split(model.abstract)[1])
    )
    return Workload(
        name=config.recipe,
        num_layers=model.num_layers,
        embed=model.embed,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        mlp=model.mlp,
        vocab=model.vocab_size,
        weights=weights,
        global_batch=data.global_batch,
        sequence_length=data.sequence_length,
        compute_dtype=execution.compute_dtype,
        loss_chunks=execution.loss_chunks,
        flops_causal=model.train_flops_per_token(data.sequence_length, causal=True),
        flops_full=model.train_flops_per_token(data.sequence_length, causal=False),
        quadratic_attention=kernel == "reference",
    )


def with_plan(config: RunConfig, plan: Plan) -> RunConfig:
    """The config carried out by a plan."""
    chosen = {f.name: getattr(plan, f.name) for f in dataclasses.fields(Plan) if f.name != "mesh"}
    return dataclasses.replace(config, mesh=plan.mesh, execution=dataclasses.replace(config.execution, **chosen))


def plan_of(config: RunConfig, devices: int) -> Plan:
    """The plan that a config asks for on so many devices.

    Raises:
        UserError: its mesh does not multiply to the devices.
    """
    chosen = {f.name: getattr(config.execution, f.name) for f in dataclasses.fields(Plan) if f.name != "mesh"}
    return Plan(config.mesh.resolve(devices), **chosen)


def auto(config: RunConfig, topology: Topology, mesh: MeshConfig | None = None) -> tuple[RunConfig, Prediction]:
    """The config with the plan of least predicted step time on a topology, and what is predicted of it.

    Args:
        config: any recipe.
        topology: what there is (`Topology.of`).
        mesh: leave this choice out, and plan only how it is used.

    Raises:
        UserError: no plan fits.
    """
    ranking = planner.rank(workload(config, topology.chip.platform), topology, only_mesh=mesh)
    best = ranking.best[0]
    return with_plan(config, best.plan), best
