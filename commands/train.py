"""Train, or continue, a run: the same command does both."""

import dataclasses
import os
from typing import Annotated, Any

import tyro

from checkpoint import storage
from commands.flags import EXIT_STOPPED, CompileCache, Config, Json, RunDir, note, simulated
from errors import UserError
from models import families
from parallel.hosts import HostFlags
from training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    config: Config
    data: str
    """Data directory made by `prepare`, LLM360's published files, or `synthetic` for random tokens without files."""
    mixture: str | None = None
    """SOURCE=WEIGHT,…: read prepared data in other shares of its sources, for example code=0.8,prose=0.2."""
    run: RunDir | None = None
    """Run directory, or gs://BUCKET/FOLDER; may be left out with --data synthetic, which then only times steps and
    writes nothing."""
    steps: int | None = None
    """Stop after this many steps in all (with synthetic data and no --run: time this many)."""
    simulate: int | None = None
    """Train on this many simulated CPU devices (of each process)."""
    fault: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """nan@STEP or spike@STEP, repeatable: damage the batch of a step, to see what the guard does."""
    hosts: Annotated[HostFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=HostFlags)
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> tuple[dict[str, Any] | None, int]:
    """Verb `train`: this process's part, if there are several."""
    # What plans count on (`parallel.topology`): by itself JAX takes three quarters of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    from parallel import distributed
    from parallel.mesh import simulate

    args.compiled.enable()
    if args.simulate is not None:
        simulate(args.simulate, check=False)  # asks for no device: several processes must find each other first
    with distributed.start(args.hosts) as hosts:
        if hosts.processes == 1:
            simulated(args.simulate)
        if hosts.processes > 1 and distributed.is_lead():
            note(f"{hosts.processes} processes, as said by {hosts.how}")
        outcome, code = _train(args, distributed.is_lead())
        return outcome if distributed.is_lead() else None, code


def _train(args: Args, lead: bool) -> tuple[dict[str, Any], int]:
    from data.mixed import MixedData
    from training import loop
    from training.datasets import open_data, prepared
    from training.guard import Fault

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if args.run is not None:
        storage.reach(args.run)
    config = _planned(args.config, lead) if args.config.mesh.is_auto else args.config
    data: Any
    if args.data == "synthetic":
        if args.mixture is not None:
            raise UserError("train: --mixture is of a prepared data set's sources; synthetic data has none")
        # A timed run needs its steps; of a run that is kept, the data must not depend on --steps.
        data = config.synthetic(max(100, 0 if args.run else args.steps or 0))
        if args.run is None:
            steps = args.steps or 10
            timing = loop.time_steps(config, data, steps, lambda n: note(f"step {n + 1}/{steps}") if lead else None)
            if lead and not args.json:
                print("\n".join(f"{k:32} {v}" for k, v in timing.items()))
            return timing, 0
    else:
        data = open_data(storage.local(args.data), config)
        if args.mixture is not None:
            data = MixedData.parse(prepared(data), args.mixture)
    if args.run is None:
        raise UserError("train: --run DIR is missing; only --data synthetic works without one")
    faults = [Fault.parse(text) for text in args.fault]
    outcome = loop.train(config, args.run, data, families(), stop_at=args.steps, faults=faults)
    if lead and not args.json:
        loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
        again = "" if outcome.reason == "finished" else "; the same command continues"
        print(f"{args.run}: {outcome.reason} after {outcome.step} steps, {outcome.tokens:,} tokens{loss}{again}")
        how = "was found in the compile cache" if outcome.compile_cached else "was compiled"
        print(f"the training step {how} in {outcome.compile_s:.1f} s")
    return dataclasses.asdict(outcome), EXIT_STOPPED if outcome.reason == "interrupted" else 0


def _planned(config: RunConfig, lead: bool) -> RunConfig:
    """The config with the plan that is predicted to be the fastest on the devices that are there."""
    import jax

    from parallel.topology import Topology
    from training import planning

    config, prediction = planning.auto(config, Topology.of(jax.devices()))
    if lead:
        memory = f"{prediction.bytes / 1e9:.2f} GB a device, predicted"
        note(f"--mesh auto, {prediction.topology}: {prediction.plan} ({memory})")
    return config
