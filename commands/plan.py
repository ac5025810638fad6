"""Rank the ways to train a recipe on a topology, say why, and let the compiler of the platform check them.

Mesh, microbatches, schedule, repeats, gather and remat are what is chosen: of what the recipe says of them, only a
mesh that is given counts.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from commands.flags import Config, Json, from_recipe, note
from errors import UserError
from parallel.mesh import MeshConfig
from training.config import RunConfig

#: What `plan --verify` starts for each plan: reads a request on standard input and answers it. Not for people.
COMPILE = "_compile"


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    config: Config
    topology: str
    """v5p:4x4x8, 2*v5e:16x16 (slices), h100:4x8 (nodes x GPUs), cpu:8, or amber (LLM360's cluster); @0.1 after it
    takes a tenth of its network."""
    objective: Literal["time", "memory", "cost"] = "time"
    """Least time of a step, least memory, or fewest chip-hours (smaller topologies of the chip are looked at too)."""
    top: int = 10
    """Show so many plans."""
    explain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the arithmetic of the best plan."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the best plans for the topology, which need not be there, and compare; half a minute each for 7B."""
    verify_top: int = 3
    """With --verify: so many of them."""
    cache: Path = Path(".cache/compiled")
    """Folder that keeps what the compiler answered."""
    timeout_s: float = 600.0
    """Time for each compilation."""
    json: Json = False
    """Print one JSON object on stdout."""


def default(config: RunConfig) -> Any:
    """Flags to start from: a mesh that is given is one to keep to, and the recipe's is not."""
    return from_recipe(Args, dataclasses.replace(config, mesh=MeshConfig.parse("auto")))


def run(args: Args) -> tuple[dict[str, Any], int]:
    """Verb `plan`. Exit code 1: a plan that was said to fit was refused, or could not be compiled."""
    import jax

    from parallel import planner
    from parallel.topology import Topology
    from training import plan_check, planning

    jax.config.update("jax_platforms", "cpu")  # no device is used; with libtpu installed, JAX would look for a TPU
    for name in ("top", "verify_top", "timeout_s"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"plan: --{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if args.cache.exists() and not args.cache.is_dir():
        raise UserError(f"plan: --cache {args.cache}: is a file; give a folder")
    topology = Topology.parse(args.topology)
    if args.verify:
        plan_check.target(topology)
    mesh = None if args.config.mesh.is_auto else args.config.mesh.resolve(topology.devices, str(topology))
    workload = planning.workload(args.config, topology.chip.platform)
    ranking = planner.rank(workload, topology, args.objective, only_mesh=mesh)
    best = ranking.best[: args.top]
    other = planner.other_batch(ranking) if mesh is None and args.objective == "time" else None
    if not args.json:
        print("\n".join(planner.lines(ranking, args.top)))
        if other is not None:
            print(f"\n{other}")
    if args.explain and not args.json:
        print("\n".join(["", *planner.explain(best[0])]))
    result: dict[str, Any] = {
        "topology": str(topology),
        "objective": args.objective,
        "plans": [
            {
                "topology": str(p.topology),
                "plan": p.plan.as_dict(),
                "predicted_step_s": p.seconds,
                "predicted_peak_bytes": round(p.bytes),
                "predicted_mfu_causal": None if p.topology.chip.nominal else p.mfu("causal"),
                "predicted_mfu_full": None if p.topology.chip.nominal else p.mfu("full"),
                "chips": p.topology.chips,
                "predicted_chip_hours_per_trillion_tokens": p.chip_hours,
            }
            for p in best
        ],
        "rejected": [dataclasses.asdict(r) for r in ranking.rejected],
        "other_batch": other and {"global_batch": other.global_batch, "tokens_per_s_gain": other.gain},
    }
    if args.explain:
        result["explained"] = planner.explain(best[0])
    if not args.verify:
        return result, 0
    if not args.json:
        print(
            "\ncompiled for the same chips (memory of a device; step time predicted, by our bytes and the compiler's):"
        )
        print(plan_check.HEAD)
    checked = plan_check.check(
        args.config,
        workload,
        ranking.best[: args.verify_top],
        **compiles(),
        cache=args.cache,
        timeout_s=args.timeout_s,
        progress=lambda c: note(plan_check.line(c)) if args.json else print(plan_check.line(c), flush=True),
    )
    result["checked"] = [c.row() for c in checked]
    return result, 0 if all(c.fits for c in checked) else 1


def compiles() -> dict[str, Any]:
    """How `training.plan_check.check` has one plan compiled, and the files that make the program."""
    root = Path(__file__).resolve().parent.parent
    names = ("axes", "collectives", "compiler", "flops", "hlo", "mesh", "pipeline", "plan")  # not what only predicts
    sources = [f"parallel/{name}.py" for name in names] + ["layers", "training", "amber_jax", "crystal_jax"]
    return {
        "command": [sys.executable, str(root / "run.py"), COMPILE],
        "sources": [root / name for name in [*sources, "data/batch.py"]],
    }
