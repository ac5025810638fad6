"""Train the same model on several mixtures of one prepared data set, and compare the loss on each source."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from commands.flags import EXIT_STOPPED, CompileCache, Config, Json, note, simulated
from errors import UserError
from models import families


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    config: Config
    data: Path
    """Data directory made by `prepare`."""
    run: Path
    """Directory for the runs, one below it for each mixture."""
    mixture: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SOURCE=WEIGHT,…, repeatable: for example code=0.8,prose=0.2."""
    steps: int | None = None
    """Train each for so many steps; by default as many as the data set has."""
    simulate: int | None = None
    """Train on this many simulated CPU devices."""
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> tuple[dict[str, Any], int]:
    """Verb `mixtures`."""
    from data.dataset import ChunkedData
    from data.mixed import MixedData
    from training import mixtures as experiment

    simulated(args.simulate)
    args.compiled.enable()
    if len(set(args.mixture)) < 2:
        raise UserError("mixtures: give --mixture SOURCE=WEIGHT,… at least twice, to compare them")
    data = ChunkedData(args.data)
    views = {text: MixedData.parse(data, text) for text in args.mixture}
    rows, finished = experiment.compare(args.config, args.run, views, families(), args.steps, note)
    if rows and not args.json:
        print("\n".join(experiment.table(rows)))
    return {"data": str(args.data), "runs": rows, "finished": finished}, 0 if finished else EXIT_STOPPED
