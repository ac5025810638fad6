"""What the report reads of a run, and what it says of the training itself: curves, meshes, data, series, ledger."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis import results
from analysis.figures import Line, Mark, Panel, curves, short, spans, thin
from analysis.page import Long, Mono, Section, Verdict
from analysis.results import Result
from checkpoint.series import Series
from data.chunks import DataManifest
from errors import RunError, UserError
from parallel.mesh import MeshConfig
from parallel.topology import Peak
from training.config import Family, model_from_dict
from training.metrics import read_lines
from training.record import RunRecord, Segment

_MOST_EVENTS = 500


@dataclass
class Found:
    """What there is of a run."""

    run: Path
    families: Mapping[str, Family]
    notices: list[str] = field(default_factory=list)
    """What could not be read, and what a reader must know besides."""

    def __post_init__(self) -> None:
        try:
            self.config: dict[str, Any] = json.loads((self.run / "config.json").read_text())
            self.model = model_from_dict(self.config, self.families)
        except (OSError, ValueError) as e:
            raise UserError(f"{self.run}: cannot read its config.json ({e}); is it a run directory?") from e
        damaged: dict[str, str] = {}
        series = Series(self.run, damaged)
        self.series, self.early, self.rolling = series.entries(), series.early(), series.rolling()
        self.notices += damaged.values()
        self.events = [e for e in read_lines(self.run / "ledger.jsonl") if "event" in e]
        metrics = read_lines(self.run / "metrics.jsonl")
        self.train = [m for m in metrics if m["kind"] == "train"]
        self.validation = [m for m in metrics if m["kind"] == "validation"]
        self.results: dict[str, list[Result]] = {}
        for kind in results.kinds(self.run):
            self.results[kind] = sorted(self._read(kind), key=lambda r: (r.checkpoint["step"], r.checkpoint["index"]))
            self._compare_settings(kind)

    def _read(self, kind: str) -> Iterator[Result]:
        digests = {e.manifest.name: results.digest_of(e) for e in [*self.series, *self.early]}
        for path in sorted(results.folder(self.run, kind).glob("*.json")):
            try:
                result = results.read(path)
            except RunError as e:
                self.notices.append(str(e))
                continue
            if result is None:
                continue
            if digests.get(path.stem, result.checkpoint["digest"]) != result.checkpoint["digest"]:
                self.notices.append(f"{path}: is of other weights than {path.stem} has now; run the study again")
                continue
            yield result

    def _compare_settings(self, kind: str) -> None:
        """Results of a sweep over other settings than the one before are of other measurements, yet of one kind."""
        made = {results.sha256_of(r.settings): r.settings for r in self.results[kind]}
        if len(made) < 2:
            return
        names = sorted({name for settings in made.values() for name in settings})
        told = lambda s, name: json.dumps(s.get(name), sort_keys=True)  # noqa: E731
        other = [name for name in names if len({told(s, name) for s in made.values()}) > 1]
        self.notices.append(
            f"results of {kind} were made with {len(made)} different settings ({', '.join(other)}), so that its "
            "checkpoints do not compare; run the study with --overwrite to make all alike"
        )

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.config.get('recipe') or self.model.family}: {self.run.resolve().name}"

    @cached_property
    def record(self) -> RunRecord | None:
        """None of a run that was imported, or is of other code."""
        try:
            return RunRecord(self.run, self.families)
        except UserError:
            return None

    @cached_property
    def parameters(self) -> int:
        """How many the model has: as its first checkpoint says, which needs no model."""
        tensors = next((e.manifest.tensors for e in self.series), {})
        stored = [math.prod(t["shape"]) for name, t in tensors.items() if name.startswith("params/")]
        return sum(stored) or self.model.num_parameters

    @cached_property
    def per_step(self) -> int:
        """Tokens."""
        if self.record:
            return self.record.config.data.tokens_per_step
        return next((e.manifest.tokens // e.manifest.step for e in self.series if e.manifest.step), 0)

    @cached_property
    def by_tokens(self) -> bool:
        """Whether results are drawn over tokens: their checkpoints' place in the training is known."""
        return any(e.manifest.tokens for e in self.series) or any(
            r.checkpoint["tokens"] for rs in self.results.values() for r in rs
        )

    @property
    def axis(self) -> str:
        """Name of the abscissa of results."""
        return "tokens" if self.by_tokens else "checkpoint"

    def at(self, result: Result) -> int:
        """Place of a result on it."""
        return result.checkpoint["tokens" if self.by_tokens else "index"]

    @cached_property
    def data(self) -> DataManifest | None:
        """What it was trained on, if that is still there."""
        if self.record is None:
            return None
        try:
            folder, _ = self.record.data
            return DataManifest.load(folder) if folder else None
        except (UserError, RunError):
            return None  # moved, or published files: nothing to be said of it

    def family(self, name: str) -> dict[str, list[Result]]:
        """Results of a kind, of what is below it (``evaluate/piqa``), and of its other names (``bold-long``)."""
        fits = re.compile(rf"{re.escape(name)}(-[^/]+)?(/.*)?")
        return {kind: rs for kind, rs in self.results.items() if rs and fits.fullmatch(kind)}


def date(seconds: float) -> str:
    """A time in UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


# ---- training -------------------------------------------------------------------------------------------------------


def starts(f: Found) -> list[dict[str, Any]]:
    """The events with which each stretch of training began."""
    return [e for e in f.events if e["event"] in ("start", "resume")]


def _marks(f: Found) -> list[Mark]:
    """Restarts, skips and troubles, over tokens."""
    marks = []
    for e in starts(f):
        if e["event"] == "resume":
            old, new = e.get("mesh_before"), e.get("mesh")
            label = f"restart on {mesh_text(new)}" if old and new and old != new else "restart"
            marks.append(Mark(e["step"] * f.per_step, label))
    for skip in f.record.skips if f.record else []:
        what = f"skip {skip.step}–{skip.until - 1}" if skip.until - skip.step > 1 else f"skip {skip.step}"
        marks.append(Mark(skip.step * f.per_step, what, alarm=True))
    marks += [Mark(e["step"] * f.per_step, "guard", alarm=True) for e in f.events if e["event"] == "guard"]
    return marks


def _phases(f: Found, end: float) -> list[Mark]:
    if f.record is None or f.record.config.phases[0].steps is None:
        return []
    edges, at = [], 0
    for n, steps in enumerate(f.record.config.phase_steps):
        if at * f.per_step < end:
            edges.append((float(at * f.per_step), f"phase {n + 1}"))
        at += steps
    return spans(edges, end)


def mesh_text(degrees: Mapping[str, int]) -> str:
    """A mesh as on the command line; of other axes than ours as it is."""
    try:
        return str(MeshConfig(**degrees))
    except (TypeError, UserError):
        return ",".join(f"{axis}={degree}" for axis, degree in degrees.items())


def across(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Abscissas and ordinates of points."""
    return [a for a, _ in pairs], [b for _, b in pairs]


def training(f: Found) -> Iterator[Section]:
    """Loss, rates, speed, and on what it was trained."""
    section = Section("training", "Training")
    if f.train or f.validation:
        _loss(f, section)
        _rates(f, section)
    _segments(f, section)
    yield section


def _loss(f: Found, section: Section) -> None:
    x = [(m["step"] + 1) * f.per_step for m in f.train]
    y = [m["loss"] for m in f.train]
    vx, vy = [m["step"] * f.per_step for m in f.validation], [m["loss"] for m in f.validation]
    lines = [Line("training", x, y, style="band")] if x else []
    lines += [Line("validation", vx, vy, style="points")] if vx else []
    end = max([*x, *vx])
    marks = [*_phases(f, end), *_marks(f)]
    rug = [float(e.manifest.tokens) for e in f.series if e.is_placed and e.manifest.step]
    panel = Panel("", lines, "nats per token", marks, rug if len(rug) <= 400 else ())
    restarts = sum(m.label.startswith("restart") for m in marks)
    skips = sum(m.label.startswith("skip") for m in marks)
    says = "; ".join(
        [
            *([f"training loss goes from {y[0]:.3f} to {y[-1]:.3f} over {short(x[-1])} tokens"] if y else []),
            *([f"validation loss from {vy[0]:.3f} to {vy[-1]:.3f}, lowest {min(vy):.3f}"] if vy else []),
            f"{restarts} restarts, {skips} skips",
        ]
    )
    thinned = thin(x, y)
    caption = "Ticks below are checkpoints, each after a chunk of data."
    if len(thinned) < len(x):
        caption += f" Mean, least and greatest of {len(thinned)} stretches of {len(x):,} steps."
    if marks:
        caption += " Dashed lines: restarts (with the new mesh, where it changed), skips and stops by the guard."
    rows = [("training", *row) for row in thinned] + [("validation", a, b, b, b) for a, b in zip(vx, vy, strict=True)]
    columns = ("curve", "tokens", "loss", "least", "greatest")
    section.figure(
        "loss", "Loss over tokens", caption, says, curves("loss", [panel], "tokens", height=3.4), columns, rows
    )
    names = sorted({k.removeprefix("loss/") for m in f.validation for k in m if k.startswith("loss/")})
    if names:
        by = {n: [(a, m[f"loss/{n}"]) for a, m in zip(vx, f.validation) if f"loss/{n}" in m] for n in names}
        panel = Panel("", [Line(n, *across(by[n]), style="points") for n in names], "nats per token", _phases(f, end))
        best = sorted(names, key=lambda n: by[n][-1][1])
        says = f"At the end the loss is lowest on {best[0]} ({by[best[0]][-1][1]:.3f}), highest on {best[-1]} "
        says += f"({by[best[-1]][-1][1]:.3f})."
        rows = [(n, a, b) for n in names for a, b in by[n]]
        section.figure(
            "validation-by-source", "Validation loss by source", "Of text that is in no chunk.", says,
            curves("validation-by-source", [panel], "tokens"), ("source", "tokens", "loss"), rows,
        )  # fmt: skip


def _rates(f: Found, section: Section) -> None:
    if not f.train:
        return
    x = [(m["step"] + 1) * f.per_step for m in f.train]
    phases = _phases(f, x[-1])
    rates = [m["learning_rate"] for m in f.train]
    norms = [m["grad_norm"] for m in f.train]
    peak = max(range(len(rates)), key=rates.__getitem__)
    says = f"The learning rate rises to {rates[peak]:.2e} at {short(x[peak])} tokens and ends at {rates[-1]:.2e}; "
    says += f"the gradient's norm goes from {norms[0]:.3g} to {norms[-1]:.3g}, greatest {max(norms):.3g}."
    panels = [
        Panel("Learning rate", [Line("", x, rates, color=0)], "", phases),
        Panel("Norm of the gradient", [Line("", x, norms, style="band", color=1)], "", [*phases, *_bare(_marks(f))]),
    ]
    rows = [
        (a, rate, mean, low, high)
        for (a, rate, _, _), (_, mean, low, high) in zip(thin(x, rates), thin(x, norms), strict=True)
    ]
    section.figure(
        "learning-rate", "Learning rate and gradient", "", says,
        curves("learning-rate", panels, "tokens", columns=2, height=2.5),
        ("tokens", "learning rate", "norm", "least norm", "greatest norm"), rows,
    )  # fmt: skip
    speed = [(a, m) for a, m in zip(x, f.train, strict=True) if m.get("tokens_per_s")]
    if not speed:
        return
    sx, sy = [a for a, _ in speed], [m["tokens_per_s"] for _, m in speed]
    where = spans([(s.step * f.per_step, mesh_text(s.mesh)) for s in _trained(f)], x[-1])
    panels = [Panel("Tokens per second", [Line("", sx, sy, style="band", color=0)], "", where)]
    against, mfu = peak_of(f), [(a, 100 * m["mfu_causal"]) for a, m in speed if m.get("mfu_causal") is not None]
    if mfu and against:
        title = f"MFU, % of {against} (causal attention counted)"
        panels.append(Panel(title, [Line("", *across(mfu), style="band", color=2)], "", _bare(where)))
    middle = sorted(sy)[len(sy) // 2]
    says = f"The median is {short(middle)} tokens per second"
    if len(where) > 1:
        by = [(s.label, sorted(v for a, v in zip(sx, sy) if s.at < a <= (s.until or 0))) for s in where]
        says += "; " + ", ".join(f"{short(v[len(v) // 2])} on {label}" for label, v in by if v)
    section.figure(
        "throughput", "Throughput and mesh", "Each shade is a stretch of training on one mesh." if where else "",
        f"{says}.", curves("throughput", panels, "tokens", columns=2, height=2.5),
        ("tokens", "tokens per second", "least", "greatest"), thin(sx, sy),
    )  # fmt: skip


def peak_of(f: Found) -> str | None:
    """What utilisation is measured against, as the ledger says; None where that is no data sheet's figure."""
    peaks = {str(Peak(**e["peak"])) if e.get("peak") else None for e in starts(f)}
    return " or ".join(sorted(filter(None, peaks))) if None not in peaks else None


def _bare(marks: Sequence[Mark]) -> list[Mark]:
    return [Mark(m.at, "", m.until, m.alarm) for m in marks]


def _trained(f: Found) -> list[Segment]:
    try:
        return f.record.segments if f.record else []
    except RunError:
        return []


def _segments(f: Found, section: Section) -> None:
    segments = _trained(f)
    if not segments:
        return
    ends = [s.step for s in segments[1:]] + [max([m["step"] + 1 for m in f.train], default=segments[-1].step)]
    rows = []
    for s, end in zip(segments, ends, strict=True):
        speed = sorted(m["tokens_per_s"] for m in f.train if s.step <= m["step"] < end and m.get("tokens_per_s"))
        how, made = s.execution, s.made_by
        plan = (
            f"{how.schedule}, {how.microbatches} microbatches, remat {how.remat}, {how.compute_dtype}" if how else None
        )
        rows.append(
            (
                s.step, end, mesh_text(s.mesh), plan, made.get("device_kind"), made.get("processes"),
                round(speed[len(speed) // 2]) if speed else None,
                (made.get("versions") or {}).get("jax"), Mono(made.get("code") or "–", 10),
            )
        )  # fmt: skip
    section.heading("How each stretch of steps was trained")
    columns = ("first step", "end", "mesh", "execution", "device", "processes", "tokens/s, median", "jax", "code")
    section.table("Stretches of training", columns, rows)


# ---- data, series, ledger -------------------------------------------------------------------------------------------


def mixture(f: Found) -> Iterator[Section]:
    """Sources and their shares."""
    section = Section("data", "Data")
    if f.data:
        m = f.data
        total = sum(s.tokens for s in m.sources)
        per = sum(s.per_chunk for s in m.sources)
        rows = [
            (
                s.name, s.documents, s.tokens, 100 * s.tokens / total if total else None,
                100 * s.per_chunk / per if per else None, s.per_chunk or None, s.windows, s.validation, s.bytes,
                Long(s.location),
            )
            for s in m.sources
        ]  # fmt: skip
        section.text(
            f"{len(m.chunk_files):,} chunks of {m.sequence_length:,}-token samples, "
            f"{sum(p.samples for p in m.phases):,} samples in all, from {sum(s.documents for s in m.sources):,} "
            f"documents of {len(m.sources)} sources."
        )
        columns = ("source", "documents", "tokens", "% of tokens", "% of a chunk", "samples a chunk", "samples",
                   "held out", "bytes", "from")  # fmt: skip
        section.table("Sources", columns, rows)
        names = [s.name for s in m.sources]
        if m.layout == "mixture":
            shares = [
                {name: sum(p.weight for p in phase.parts if (p.source or p.name) == name) for name in names}
                for phase in m.phases
            ]
            phases = [(n + 1, m.phases[n].samples, *(s[name] for name in names)) for n, s in enumerate(shares)]
            section.heading("Mixture of each phase")
            section.table("Mixture of each phase", ("phase", "samples", *names), phases)
        section.parts.append(f'<p class="note">SHA-256 of its manifest: <code>{m.sha256}</code></p>')
    own = f.record.data[1] if f.record and any(e.get("data") for e in f.events) else ()
    if own:
        section.heading("The run's own shares of the sources")
        section.table("Shares of the run", ("source", "weight"), own)
    yield section


def _checked(f: Found) -> dict[str, Verdict]:
    """What replays said of a checkpoint, the last word counts."""
    said = {}
    for e in f.events:
        if e["event"] == "verify":
            for c in e.get("checkpoints") or []:
                word = "bitwise" if c.get("bitwise") and not c.get("false_digests") else str(e.get("verdict"))
                said[c["name"]] = Verdict(f"{word}, {date(e['time'])}", word != "DIFFERS")
    return said


def series(f: Found) -> Iterator[Section]:
    """The checkpoints."""
    section = Section("series", "Series")
    if not f.series:
        yield section
        return
    checked = _checked(f)
    before = {e.path.name: p for p, e in zip([None, *f.series], f.series)}
    rows = []
    for entry in [*f.early, *f.series, *([f.rolling] if f.rolling else [])]:
        m, placed = entry.manifest, entry.is_placed
        parent = before.get(m.name) if m.kind == "series" else None
        chained = None if m.kind != "series" or m.origin else m.parent_sha256 == (parent.sha256 if parent else None)
        rows.append(
            (
                m.name, m.kind, m.step if placed else None, m.tokens if placed else None, m.loss.get("mean"),
                Mono(m.digests.get("params") or "–", 12), Mono(entry.sha256, 12),
                Verdict({True: "follows", False: "BROKEN", None: "–"}[chained], chained),
                checked.get(m.name, Verdict("not replayed", None)) if m.kind == "series" else Verdict("–", None),
                m.learning_rate if placed else None, sum(x["bytes"] for x in m.files.values()),
                "with optimizer" if entry.has("optimizer") else "weights", mesh_text(m.mesh), date(m.wall_time),
            )
        )  # fmt: skip
    replayed = sum(1 for e in f.series if e.manifest.name in checked)
    broken = [r[0] for r in rows if r[7].good is False]
    section.text(
        f"{len(f.series):,} checkpoints of the series; every manifest that is listed was read and is whole. {replayed} "
        "were trained again from the one before them and compared (verify). Weights were not read for this page: "
        "series --check reads them all."
    )
    if broken:
        f.notices.append(f"the chain of manifests is broken at {', '.join(broken[:8])}: series --check says more")
    columns = ("name", "kind", "step", "tokens", "mean loss", "digest of the weights", "manifest SHA-256", "parent",
               "replay", "learning rate", "bytes", "holds", "mesh", "saved")  # fmt: skip
    section.table("Checkpoints", columns, rows)
    yield section


def ledger(f: Found) -> Iterator[Section]:
    """What happened."""
    section = Section("ledger", "Ledger")
    saves = Counter(e.get("kind", "") for e in f.events if e["event"] == "save")
    events = [e for e in f.events if e["event"] != "save"]
    if f.events:
        kept = ", ".join(f"{n:,} {kind}" for kind, n in sorted(saves.items()))
        more = f"; the last {_MOST_EVENTS} are shown" if len(events) > _MOST_EVENTS else ""
        section.text(f"{len(events):,} events besides saves{f' ({kept})' if kept else ''}{more}.")
        rows = [(date(e["time"]), e["event"], e.get("step"), Long(_told(e))) for e in events[-_MOST_EVENTS:]]
        section.table("Events", ("time", "event", "step", "what"), rows)
    yield section


def _told(e: Mapping[str, Any]) -> str:
    """An event in words."""
    if e["event"] in ("start", "resume"):
        was = f" (before: {mesh_text(e['mesh_before'])})" if e.get("mesh_before") else ""
        parent = f"; from {e['parent']}" if e.get("parent") else ""
        return f"on {mesh_text(e['mesh'])}{was}, {e.get('processes', 1)} process(es), {e.get('device_kind')}{parent}"
    if e["event"] == "verify":
        return f"{e.get('start')} → {e.get('end')}: {e.get('verdict')}; {e.get('steps')} steps on " + " then ".join(
            e.get("meshes") or []
        )
    if e["event"] in ("skip", "guard"):
        documents = ", ".join(map(str, (e.get("documents") or [])[:3]))
        return f"{e.get('reason')}; chunk {e.get('chunk')}{f'; {documents}' if documents else ''}"
    return ", ".join(f"{k} {v}" for k, v in e.items() if k not in ("event", "time", "step") and not isinstance(v, dict))
