"""A mixing experiment: one recipe trained on several mixtures of the same prepared data, compared on every source."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.mixed import MixedData
from errors import UserError
from training.config import Family, RunConfig
from training.loop import train
from training.metrics import read_lines


def compare(
    config: RunConfig,
    folder: Path,
    mixtures: Mapping[str, MixedData],
    families: Mapping[str, Family],
    steps: int | None,
    log: Callable[[str], object],
) -> tuple[list[dict[str, Any]], bool]:
    """Train one run for each mixture, in a folder of its own below `folder`, and return their validation losses.

    The runs differ in nothing but their data: the same first weights, steps and schedule. A run that is already there
    goes on, or is only read if it is finished, so that the same call continues after a kill. Losses are those of the
    last validation, which is at the end of a chunk.

    Returns:
        For each mixture: its shares, passes over each source, steps, loss over all sources and each. And whether those
        are all: else a signal stopped the run of the next one.

    Raises:
        UserError: there is nothing to compare by, or a run directory is another run's.
    """
    rows: list[dict[str, Any]] = []
    for data in mixtures.values():
        if not any(s.validation for s in data.data.manifest.sources):
            raise UserError(
                f"{data.directory}: has no validation samples to compare mixtures by; prepare data with "
                "--data.validation-per-source of at least 1"
            )
    for text, data in mixtures.items():
        run = folder / "".join(c if c.isalnum() or c in ".-" else "_" for c in text)
        log(f"{run}: " + ", ".join(f"{name} {share:.1%}" for name, share in data.shares.items()))
        outcome = train(config, run, data, families, stop_at=steps)
        if outcome.reason == "interrupted":
            log(f"{run}: stopped by a signal after {outcome.step} steps; the same command continues")
            return rows, False
        measured = [r for r in read_lines(run / "metrics.jsonl") if r["kind"] == "validation"][-1]
        losses = {name: measured[f"loss/{name}"] for name in data.sources if f"loss/{name}" in measured}
        rows.append(
            {
                "mixture": text,
                "run": str(run),
                "shares": dict(data.shares),
                "passes": data.passes,
                "steps": measured["step"],
                "loss": measured["loss"],
                "losses": losses,
            }
        )
    return rows, True


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the comparison as text; the lowest loss on each source is starred."""
    names = list(rows[0]["losses"])
    width = max(len(r["mixture"]) for r in rows)
    best = {name: min(r["losses"][name] for r in rows) for name in names}
    lines = [f"{'mixture':{width}} {'steps':>6} {'all':>8} " + " ".join(f"{n:>12}" for n in names)]
    for r in rows:
        losses = " ".join(f"{r['losses'][n]:>11.4f}{'*' if r['losses'][n] == best[n] else ' '}" for n in names)
        lines.append(f"{r['mixture']:{width}} {r['steps']:>6} {r['loss']:>8.4f} {losses}")
    return lines
