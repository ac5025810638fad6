"""One HTML page about a run: loss, evaluations, analyses, data, meshes, and the series with its digests."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from commands.flags import Json, note
from models import families


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    dir: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path | None = None
    """Where to write it; by default DIR/report.html."""
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> dict[str, Any]:
    """Verb `report`."""
    from analysis.report import write

    return write(args.dir, families(), args.out or args.dir / "report.html", note)
