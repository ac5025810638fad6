"""One study, or several, of many checkpoints of a series: each is read once while the one before it is being scored.

Programs are compiled for the first checkpoint and serve all. A result that is there already, of the same weights and
settings, is not made again, so that a sweep that was killed goes on, and one over a longer series fills the gaps.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from analysis import results
from analysis.results import Result, Scored
from analysis.subject import Subject, Target
from checkpoint.manifest import Entry
from checkpoint.series import Series
from errors import RunError, UserError
from training.metrics import duration, read_lines


class Study(Protocol):
    """A way of looking at a checkpoint."""

    @property
    def kind(self) -> str:
        """Name of its folder below ``RUN/results``; may have a slash: ``evaluate/piqa``."""

    @property
    def needs_weights(self) -> bool:
        """Whether the parameters are to be placed on the mesh for it."""

    def settings(self) -> Mapping[str, Any]:
        """All on which a result depends besides the checkpoint, as JSON: tasks, hashes of data, lengths, seeds."""

    def score(self, subject: Subject) -> Scored:
        """Look at one checkpoint. RunError: nothing can be said of it; the sweep goes on with the next one."""


@dataclass
class Outcome:
    """What a sweep did."""

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    """Results that were there before."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why there is no result, by checkpoint."""
    read_s: float = 0.0
    score_s: float = 0.0
    wall_s: float = 0.0

    def results(self) -> list[Result]:
        """All results of what was asked for, by kind and step."""
        found = [results.read(path) for path in [*self.kept, *self.made]]
        return sorted((r for r in found if r), key=lambda r: (r.kind, r.checkpoint["step"], r.checkpoint["index"]))

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints: the results, and how long it took."""
        return {
            "results": [{**vars(r), "path": str(r.path)} for r in self.results()],
            "made": len(self.made),
            "kept": len(self.kept),
            "failed": self.failed,
            "seconds": {"read": self.read_s, "score": self.score_s, "all": self.wall_s},
        }

    @property
    def code(self) -> int:
        """Exit code: 1 if a checkpoint was left out."""
        return 1 if self.failed else 0


def sweep(
    target: Target,
    studies: Sequence[Study],
    note: Callable[[str], None],
    *,
    overwrite: bool = False,
    name: str | None = None,
) -> Outcome:
    """Make the results that are missing.

    Args:
        target: run, checkpoints, mesh.
        studies: what to look at; the weights are read once for all of them.
        note: called with a line of progress after each checkpoint.
        overwrite: make results anew that were made with other settings, instead of refusing.
        name: keep the results apart from those of other settings: their kind is the study's, a dash and this.

    Raises:
        UserError: there are results of other settings, or that is no name.
        RunError: a result cannot be read or written.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise UserError(f"--name {name!r}: letters, digits, _ and . only")
    kind_of = {study: f"{study.kind}-{name}" if name else study.kind for study in studies}
    began, outcome = time.monotonic(), Outcome()
    entries, outcome.failed = _entries(target)
    for lost, why in outcome.failed.items():
        note(f"{lost}: left out: {why}")
    known = {study: _known(target, study, kind_of[study], overwrite) for study in studies}
    settings = {study: results.sha256_of(study.settings()) for study in studies}
    todo: list[tuple[Entry, list[Study]]] = []
    for entry in entries:
        there = {study: known[study].get(entry.manifest.name) for study in studies}
        missing = [study for study in studies if not _holds(there[study], entry, settings[study])]
        outcome.kept += [found.path for study, found in there.items() if found and study not in missing]
        if missing:
            todo.append((entry, missing))
    if outcome.kept:
        note(f"{len(outcome.kept)} results were there already")
    if not todo:
        outcome.wall_s = time.monotonic() - began
        return outcome
    import jax  # what is there already is given back without it

    with ThreadPoolExecutor(1) as reader:
        ahead: Future[tuple[Any, float]] | None = None
        # Several processes read together, so that one thread must not run ahead of the others.
        ahead_of = jax.process_count() == 1
        for n, (entry, missing) in enumerate(todo):
            current = ahead or reader.submit(_read, target, entry, missing)
            ahead = reader.submit(_read, target, *todo[n + 1]) if ahead_of and n + 1 < len(todo) else None
            checkpoint = entry.manifest.name
            reasons: list[str] = []
            try:
                weights, seconds = current.result()
                outcome.read_s += seconds
            except RunError as e:
                reasons.append(str(e))
                missing = []
            for study in missing:
                start = time.monotonic()
                try:
                    scored = study.score(Subject(target, entry, weights))
                except RunError as e:  # the other studies may still have something to say
                    reasons.append(f"{kind_of[study]}: {e}")
                    continue
                outcome.score_s += (seconds := time.monotonic() - start)
                if jax.process_index() == 0:
                    mesh = str(target.wanted_mesh)
                    path = results.write(target.run, kind_of[study], entry, study.settings(), scored, mesh, seconds)
                    outcome.made.append(path)
            if reasons:
                outcome.failed[checkpoint] = "; ".join(reasons)
                note(f"{checkpoint}: left out: {outcome.failed[checkpoint]}")
            del current
            weights = None
            elapsed = time.monotonic() - began
            left = elapsed / (n + 1) * (len(todo) - n - 1)
            rest = f", {duration(left)} left" if left else ""
            note(f"{checkpoint}: {n + 1} of {len(todo)}, {duration(elapsed)}{rest}")
    outcome.wall_s = time.monotonic() - began
    return outcome


def _read(target: Target, entry: Entry, studies: Sequence[Study]) -> tuple[Any, float]:
    """The weights, if a study wants them, and the seconds that it took."""
    start = time.monotonic()
    weights = target.load(entry) if any(s.needs_weights for s in studies) else None
    return weights, time.monotonic() - start


def _known(target: Target, study: Study, kind: str, overwrite: bool) -> dict[str, Result]:
    """Results of a kind by checkpoint. UserError: one was made with other settings, whatever its checkpoint."""
    found = {r.path.stem: r for r in results.of_kind(target.run, kind)}
    now = dict(study.settings())
    for there in [] if overwrite else found.values():
        if results.sha256_of(there.settings) != results.sha256_of(now):
            other = [k for k in {**there.settings, **now} if there.settings.get(k) != now.get(k)]
            raise UserError(
                f"{there.path}: was made with other settings ({', '.join(sorted(other))}); give --name to keep both, "
                "or --overwrite to make anew what is asked for"
            )
    return found


def _holds(there: Result | None, entry: Entry, settings: str) -> bool:
    """Whether a result is of this checkpoint's weights and of these settings, and its tables are there."""
    if there is None or there.checkpoint["digest"] != results.digest_of(entry):
        return False
    if not all(results.table_path(there.path, name).exists() for name in there.tables):
        return False
    return results.sha256_of(there.settings) == settings


def _entries(target: Target) -> tuple[list[Entry], dict[str, str]]:
    """The checkpoints that can be studied, and why others of the series cannot.

    One is missing if ``series.jsonl`` has it: gaps that a rule has left, or an import, are none.
    """
    run = target.run
    broken: dict[str, str] = {}
    gone: dict[str, str] = {}
    series = Series(run, broken)
    entries = series.resolve(target.selector)
    chosen, there = ({e.manifest.name for e in found} for found in (entries, series.entries()))
    lost = [r for r in read_lines(run / "series.jsonl") if r["name"] not in there]
    if ":" in target.selector or target.selector == "all":
        steps = [e.manifest.index for e in entries]
        every = slice(*[int(p) if p else None for p in target.selector.split(":")]) if ":" in target.selector else None
        last = max([*steps, *(r["index"] for r in lost)])
        inside = range(*every.indices(last + 1)) if every else range(-1, last + 1)
        gone = {r["name"]: "is gone from the series" for r in lost if r["index"] in inside and r["name"] not in chosen}
        gone |= {name: why for name, why in broken.items() if name in gone}
    return entries, gone
