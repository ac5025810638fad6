"""List the checkpoint series of a run, check it, or compare two of its checkpoints."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from checkpoint import storage
from commands.flags import Json, RunDir, note
from errors import UserError
from models import families
from training.datasets import open_data


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    dir: tyro.conf.Positional[RunDir]
    """Run directory, or gs://BUCKET/FOLDER."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every file of every checkpoint, and of the data; compare all with manifests, ledger and config. Exit code 1:
    something is not what it should be."""
    diff: tuple[str, str] | None = None
    """A B: how far the parameters of checkpoint B are from those of A. Each an index, a name, init, latest, step=N."""
    skip_data: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --check: compare the data's manifest, and do not read the data."""
    rebuild: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write series.jsonl anew from the manifests."""
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> tuple[dict[str, Any], int]:
    """Verb `series`."""
    from checkpoint.series import Series
    from training import audit

    if not (storage.reach(args.dir) / "config.json").exists():
        raise UserError(f"{args.dir}: not a run directory (no config.json in it)")
    if args.check + args.rebuild + (args.diff is not None) > 1:
        raise UserError("series: ask one thing: --check, --diff A B, or --rebuild")
    if args.diff is not None:
        return _diff(args.dir, args.diff, args.json), 0
    if args.rebuild:
        from checkpoint.check import rebuild

        note(f"{args.dir}/series.jsonl: {rebuild(args.dir)} lines, from the manifests")
    if args.check:
        found = audit.audit(args.dir, families(), open_data, note, content=not args.skip_data)
    else:
        there = Series(args.dir)
        rolling = there.rolling()
        found = audit.unchecked(there.entries(), there.early(), [rolling] if rolling else [])
    if not args.json:
        print("\n".join(audit.listing(found.rows, args.dir)))
    for kind, texts in (("note", found.notes), ("error", found.problems)):
        for text in texts:
            note(f"{kind}: {text}")
    rows = found.rows
    result = {"run": str(args.dir), "checkpoints": rows["series"], "early": rows["early"], "rolling": rows["rolling"]}
    result |= {"bytes": sum(r["bytes"] for of_kind in rows.values() for r in of_kind)}
    return result | {"problems": [*found.problems], "notes": [*found.notes]}, 1 if found.problems else 0


def _diff(run: Path, selectors: tuple[str, str], as_json: bool) -> dict[str, Any]:
    """What changed from one checkpoint to another."""
    from checkpoint import check
    from checkpoint.series import Series

    entries = []
    for selector in selectors:
        found = Series(run).resolve(selector)
        if len(found) != 1:
            raise UserError(f"--diff: {selector} names {len(found)} checkpoints, expected one")
        entries += found
    changes = check.diff(*entries)
    names = [e.manifest.name for e in entries]
    if not as_json:
        print("\n".join(check.table(changes)))
        print(f"{names[1]} against {names[0]}, in {run}")
    whole = check.total(changes)
    return {"run": str(run), "a": names[0], "b": names[1], "tensors": [c.row() for c in changes], "total": whole.row()}
