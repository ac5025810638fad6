"""What a study found of one checkpoint, on the disk: ``RUN/results/KIND/NAME.json``, and tables beside it.

    RUN/results/memorization/000.json            summary, settings, and what it was measured on
    RUN/results/memorization/000.sequences.parquet   a table that came with it

A result counts from the moment that its JSON is there, which is written last.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from checkpoint.files import write_atomically
from checkpoint.manifest import Entry
from errors import RunError

VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "lm_eval", "sentencepiece")


@dataclass(frozen=True)
class Scored:
    """What a study says of a checkpoint."""

    summary: Mapping[str, Any]
    """JSON: the figures that reports are made of. An estimate is {"value": …, "stderr": …, "n": …}."""
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    """Single observations, by name: kept as parquet beside the summary."""


@dataclass(frozen=True)
class Result:
    """A result as it was kept."""

    kind: str
    checkpoint: dict[str, Any]
    """name, index, step, tokens, digest (of the parameters)."""
    settings: dict[str, Any]
    summary: dict[str, Any]
    measured: dict[str, Any]
    """device, mesh, versions, seconds, time."""
    tables: tuple[str, ...]
    """Names of the tables that came with it."""
    path: Path

    def table(self, name: str) -> pa.Table:
        """A table that was kept with it.

        Raises:
            RunError: it is not there or cannot be read.
        """
        file = table_path(self.path, name)
        try:
            return pq.read_table(file)
        except (OSError, pa.ArrowException) as e:
            raise RunError(f"{file}: cannot be read ({e}); remove it, and run the study again") from e


def estimate(values: Iterable[float]) -> dict[str, Any]:
    """Mean of observations, its standard error (None of fewer than two), and their number."""
    x = np.array(list(values), np.float64)
    n = len(x)
    stderr = float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"value": float(x.mean()) if n else None, "stderr": stderr, "n": n}


def folder(run: Path, kind: str) -> Path:
    """Where the results of a kind are."""
    return run / "results" / kind


def table_path(result: Path, name: str) -> Path:
    """Where a table of a result is."""
    return result.with_name(f"{result.stem}.{name}.parquet")


def digest_of(entry: Entry) -> str:
    """What tells that a result is of these weights: their digest; in a series of older code, the manifest's hash."""
    return entry.manifest.digests.get("params") or entry.sha256


def sha256_of(value: Any) -> str:
    """Of a value as JSON: settings, which are what a result depends on besides the checkpoint, or a part of them."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(
    run: Path, kind: str, entry: Entry, settings: Mapping[str, Any], scored: Scored, mesh: str, seconds: float
) -> Path:
    """Keep a result. Raises RunError where the disk refuses."""
    import jax

    m = entry.manifest
    path = folder(run, kind) / f"{m.name}.json"
    checkpoint = {"name": m.name, "index": m.index, "step": m.step, "tokens": m.tokens, "digest": digest_of(entry)}
    device = jax.devices()[0]
    measured = {
        "device": device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU",
        "mesh": mesh,
        "seconds": round(seconds, 3),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    value = {
        "version": VERSION,
        "kind": kind,
        "checkpoint": checkpoint,
        "settings": dict(settings),
        "settings_sha256": sha256_of(settings),
        "tables": sorted(scored.tables),
        "summary": dict(scored.summary),
        "measured": measured,
    }
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, table in scored.tables.items():
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            write_atomically(table_path(path, name), sink.getvalue().to_pybytes())
        write_atomically(path, text)
    except OSError as e:
        raise RunError(f"{path}: cannot be written ({e.strerror}); what was finished before is kept") from e
    return path


def read(path: Path) -> Result | None:
    """The result in a file; None if there is none.

    Raises:
        RunError: it is not one, or of a newer version.
    """
    try:
        value = json.loads(path.read_text())
        if value["version"] > VERSION:
            raise RunError(f"{path}: written by a newer version ({value['version']}); update this code to read it")
        fields = ("kind", "checkpoint", "settings", "summary", "measured")
        return Result(**{name: value[name] for name in fields}, tables=tuple(value["tables"]), path=path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path}: not a result of a study ({e}); remove it, and run the study again") from e


def of_kind(run: Path, kind: str) -> list[Result]:
    """The results of a kind in the order of their checkpoints, "init" first. Raises as `read` does."""
    found = [read(p) for p in sorted(folder(run, kind).glob("*.json"))]
    return sorted((r for r in found if r), key=lambda r: (r.checkpoint["step"], r.checkpoint["index"]))


def figures(summary: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The single figures of a summary and of the groups in it, with their standard errors where they have one.

    Of groups of groups only the figure that the summary calls its ``headline``.
    """
    headline = summary.get("headline")
    found: dict[str, tuple[float, float | None]] = {}
    for name, value in summary.items():
        group = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) and "value" not in value else {}
        for key, one in (group or {name: value}).items():
            if isinstance(one, dict) and headline in one:
                key, one = f"{key}.{headline}", one[headline]
            number, stderr = (one.get("value"), one.get("stderr")) if isinstance(one, dict) else (one, None)
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[key] = (number, stderr)
    return found


def lines(found: Sequence[Result]) -> list[str]:
    """Results as a person reads them: for each kind a table of its single figures over the checkpoints."""
    text = []
    for kind, group in groupby(sorted(found, key=lambda r: (r.kind, r.checkpoint["step"])), key=lambda r: r.kind):
        rows = [(r.checkpoint["name"], figures(r.summary)) for r in group]
        names = list(dict.fromkeys(name for _, row in rows for name in row))
        cells = [[kind, *names]]
        for checkpoint, row in rows:
            cells.append([checkpoint, *(_figure(*row[name]) if name in row else "-" for name in names)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text += ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in cells]
    return text


def _figure(value: float, stderr: float | None) -> str:
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr is not None else "")


def kinds(run: Path) -> list[str]:
    """Kinds of which there are results, sorted."""
    root = run / "results"
    return sorted({str(p.parent.relative_to(root)) for p in root.rglob("*.json")})


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
