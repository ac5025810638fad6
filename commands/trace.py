"""From a step to the documents in it, or from a document or text to the steps and checkpoints that had seen it."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from commands.flags import Json
from errors import UserError
from models import families
from training.datasets import open_data


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    dir: tyro.conf.Positional[Path]
    """Run directory, or data directory."""
    step: int | None = None
    """What this step of the run read (0 is the first)."""
    row: int | None = None
    """Only this row of the step's batch."""
    chunk: int | None = None
    """With --position: what this sample of the data set is."""
    position: int | None = None
    """See --chunk."""
    document: str | None = None
    """Where this document went: FILE, FILE:LINE, or SOURCE/FILE:LINE as the other queries print it."""
    text: str | None = None
    """Where this text (three words or more) went; reads all chunks."""
    max: int = 20
    """Stop after so many samples that hold the text."""
    data: Path | None = None
    """Data directory of the run, if it is no longer where it was."""
    global_batch: int | None = None
    """Samples in a step, to name steps where only a data directory is given."""
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> dict[str, Any]:
    """Verb `trace`."""
    from training import trace as provenance

    asked = [name for name in ("step", "chunk", "document", "text") if getattr(args, name) is not None]
    if len(asked) != 1 or (args.chunk is None) != (args.position is None):
        raise UserError("trace: ask one thing: --step N [--row R], --chunk C --position P, --document ID, or --text T")
    tracer = provenance.RunTracer(args.dir, families(), open_data, data=args.data, global_batch=args.global_batch)
    if args.document is not None:
        found = tracer.document(args.document)
        text = provenance.document_lines(found)
    else:
        if args.step is not None:
            found = tracer.step(args.step, args.row)
        elif args.chunk is not None and args.position is not None:
            found = tracer.sample(args.chunk, args.position)
        else:
            found = tracer.text(args.text or "", args.max)
        text = provenance.lines(found)
    if not args.json:
        print("\n".join(text) or "nothing found")
    return {"dir": str(args.dir), "documents" if args.document is not None else "samples": found}
