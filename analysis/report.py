"""One page that shows a run: ``run.py report RUN``, from what lies in the run directory, for a browser without network.

It reads the ledger, the metrics, the manifests of the series and the results of studies, and computes nothing that
needs weights. What cannot be read is left out and named at the top, as are studies whose results are of several
settings; of what is not there the page says how to make it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.figures import short
from analysis.page import Section, notice, page
from analysis.report_run import Found, date, ledger, mesh_text, mixture, series, starts, training
from analysis.report_studies import contamination, evaluation, memorization, others, perplexity, safety, weights
from checkpoint.files import write_atomically
from errors import RunError
from training.config import Family


def write(run: Path, families: Mapping[str, Family], out: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Make the page.

    Args:
        run: run directory.
        families: config classes by family name.
        out: the file to write.
        note: told of the notices.

    Returns:
        "report", the file; "bytes"; "sections", their ids; "notices", what was left out and why, and what is of
        several settings.

    Raises:
        UserError: there is no run; matplotlib is not installed.
        RunError: its ledger or metrics are damaged, or the page cannot be written.
    """
    found = Found(run, families)
    made = [section for build in _SECTIONS for section in build(found) if section.parts]
    there = {s.id for s in made}
    absent = [(what, how.format(run=run)) for id_, what, how in _ABSENT if id_ not in there]
    for text in found.notices:
        note(text)
    notices = notice("Read this first", found.notices) if found.notices else ""
    text = page(found.title, _lead(found), _facts(found), notices, made, absent, _foot(found))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as e:
        raise RunError(f"{out}: cannot be written ({e.strerror})") from e
    size = len(text.encode())
    note(f"{out}: {size / 1e6:.1f} MB, {len(made)} sections")
    return {"report": str(out), "bytes": size, "sections": [s.id for s in made], "notices": found.notices}


# ---- the head -------------------------------------------------------------------------------------------------------


#: What the last of these events says of a run. One that began and did not end is at work, or was killed.
_STATES = {
    "start": "still training, or killed", "resume": "still training, or killed", "finish": "finished",
    "stop": "stopped, and can go on", "guard": "stopped by its guard",
}  # fmt: skip


def _lead(f: Found) -> str:
    first = next((e for e in f.events if e["event"] in ("start", "import")), None)
    when = f", begun {date(first['time'])}" if first else ""
    state = next((e["event"] for e in reversed(f.events) if e["event"] in _STATES), "")
    said = _STATES.get(state)
    return f"{f.model.family} model of {f.parameters:,} parameters{when}{f'; {said}' if said else ''}."


def _facts(f: Found) -> list[tuple[str, str]]:
    placed = [e.manifest for e in [*f.series, *([f.rolling] if f.rolling else [])] if e.is_placed]
    last = max(placed, key=lambda m: m.step, default=None)
    facts = [("checkpoints", f"{len(f.series):,}")]
    if last:
        total = f" of {f.record.config.total_steps:,}" if f.record and f.record.config.phases[0].steps else ""
        facts += [("steps", f"{last.step:,}{total}"), ("tokens", short(last.tokens))]
    if f.validation:
        facts.append(("validation loss", f"{f.validation[-1]['loss']:.4f}"))
    elif f.train:
        facts.append(("training loss", f"{f.train[-1]['loss']:.4f}"))
    if f.record and f.events and (begun := starts(f)):
        facts.append(("meshes", " → ".join(dict.fromkeys(mesh_text(e["mesh"]) for e in begun[-4:]))))
    checks = Counter(e.get("verdict") for e in f.events if e["event"] == "verify")
    if checks:
        facts.append(("replays", ", ".join(f"{n} {verdict}" for verdict, n in checks.items())))
    return facts


def _foot(f: Found) -> list[str]:
    measured = [r.measured for rs in f.results.values() for r in rs]
    lines = [f"Made from {f.run.resolve().name} by run.py report. The page holds all it shows and loads nothing."]
    if measured:
        devices = ", ".join(sorted({f"{m.get('device')} ({m.get('mesh')})" for m in measured}))
        lines.append(f"{len(measured):,} results of {len(f.results)} studies, measured on {devices}.")
    return lines


_SECTIONS: tuple[Callable[[Found], Iterator[Section]], ...] = (
    training, evaluation, perplexity, memorization, contamination, safety, weights, mixture, series, ledger, others,
)  # fmt: skip

_ABSENT = [
    ("evaluation", "scores of benchmarks", "run.py evaluate {run}@all --benchmarks DIR"),
    ("perplexity", "perplexity by source", "run.py analyze perplexity {run}@all"),
    ("memorization", "memorization of chunks", "run.py analyze memorization {run}@all"),
    ("contamination", "benchmark items in the data", "run.py analyze contamination {run}@all --benchmarks DIR"),
    ("safety", "bias and toxicity", "run.py analyze bold {run}@all, toxicity, toxigen"),
    ("weights", "norms and movement of the weights", "run.py analyze weights {run}@all"),
]
