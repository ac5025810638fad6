"""Data provenance of a run: which documents a step read, and which steps and checkpoints had read a document or a text.

`data.trace` knows what a sample of a data set is; here a run's batch says which step reads it, and its series which
checkpoints come after that step.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from checkpoint.series import Series
from data.chunks import MANIFEST
from data.loader import ChunkedData
from data.sample import Schedule
from data.trace import Origin, Piece, Place, Tracer
from errors import UserError
from training.config import Family, RunConfig
from training.metrics import read_lines


class RunTracer:
    """Traces in a run, or in a data directory alone, whose steps are known only for a given batch.

    Raises UserError where a run's data is not there, or is not what the run was trained on.
    """

    def __init__(
        self,
        folder: Path,
        families: Mapping[str, Family],
        *,
        data: Path | None = None,
        global_batch: int | None = None,
    ):
        self.run = None if (folder / MANIFEST).exists() else folder
        if self.run is None:
            self.tracer = Tracer(ChunkedData(folder))
            phases = self.tracer.data.phases
            steps = tuple(p.steps(global_batch) for p in phases) if global_batch else ()
            self.schedule = Schedule(phases, steps, global_batch) if global_batch else None
            return
        config = _config(folder, families)
        self.tracer = Tracer(ChunkedData(data or _data_of(folder)))
        trained_on = {e.manifest.data_sha256 for e in self._entries}
        if trained_on - {self.tracer.data.sha256}:
            raise UserError(
                f"{self.tracer.data.directory}: is not the data that {folder} was trained on (its manifest has "
                f"{self.tracer.data.sha256[:12]}…); give --data the right one. A run with --mixture, or on published "
                "files, cannot be traced yet"
            )
        self.schedule = Schedule(self.tracer.data.phases, config.phase_steps, config.data.global_batch)

    @cached_property
    def _entries(self) -> list[Any]:
        return Series(self.run).entries() if self.run else []

    def step(self, step: int, row: int | None = None) -> list[dict[str, Any]]:
        """Return the samples of a step, or one row of it, with their documents."""
        if self.schedule is None:
            raise UserError("--step: a data directory has no steps; give --global-batch, or a run directory")
        batch = self.schedule.global_batch
        if not 0 <= step < self.schedule.steps:
            raise UserError(f"--step {step}: the run has steps 0 to {self.schedule.steps - 1}")
        if row is not None and not 0 <= row < batch:
            raise UserError(f"--row {row}: a batch has rows 0 to {batch - 1}")
        places = [self.schedule.place(step, r) for r in (range(batch) if row is None else [row])]
        return [
            self._sample(origin)
            for chunk, of_chunk in groupby(places, key=lambda place: place[0])
            for origin in self.tracer.origins(chunk, [position for _, position in of_chunk])
        ]

    def sample(self, chunk: int, position: int) -> dict[str, Any]:
        """Return one sample: where it came from, the step that reads it, and its documents."""
        phases = self.tracer.data.phases
        if not 0 <= chunk < phases[-1].first_chunk + phases[-1].chunks:
            raise UserError(
                f"--chunk {chunk}: the data has chunks 0 to {phases[-1].first_chunk + phases[-1].chunks - 1}"
            )
        samples = next(p for p in phases if chunk < p.first_chunk + p.chunks).chunk_samples(chunk)
        if not 0 <= position < samples:
            raise UserError(f"--position {position}: chunk {chunk} has positions 0 to {samples - 1}")
        return self._sample(self.tracer.origin(chunk, position))

    def _sample(self, origin: Origin) -> dict[str, Any]:
        pieces = [_piece(p) for p in self.tracer.pieces_of(origin)]
        return {**self._read_at(origin.chunk, origin.position), **dataclasses.asdict(origin), "documents": pieces}

    def document(self, document: str) -> list[dict[str, Any]]:
        """Return every document with this id: its text, and where each of its windows went."""
        found = []
        for source, number in self.tracer.find(document):
            places = [self._place(p) for p in self.tracer.places(source, number)]
            name = f"{source}/{self.tracer.document_id(source, number)}"
            found.append({"document": name, "text": self.tracer.text(source, number), "windows": places})
        return found

    def text(self, text: str, most: int) -> list[dict[str, Any]]:
        """Return the first samples in which a text begins, in the order of chunks, with the document there."""
        found = []
        for chunk, position, pieces in self.tracer.search(text):
            documents = [_piece(p) for p in pieces]
            found.append(
                {**self._read_at(chunk, position), "chunk": chunk, "position": position, "documents": documents}
            )
            if len(found) == most:
                break
        return found

    def _place(self, place: Place) -> dict[str, Any]:
        if place.chunk is None or place.position is None:
            return {"window": place.window, "not_read": place.why}
        at = {"window": place.window, "chunk": place.chunk, "position": place.position}
        return {**at, **self._read_at(place.chunk, place.position)}

    def _read_at(self, chunk: int, position: int) -> dict[str, Any]:
        """The step and row that read a sample, and the first checkpoint and number of checkpoints that had seen it."""
        read = self.schedule and self.schedule.reader(chunk, position)
        if not read:
            return {"step": None, "row": None} if self.schedule else {}
        seen = [e.manifest.name for e in self._entries if e.manifest.step > read[0]]
        checkpoints = {"first_checkpoint": seen[0] if seen else None, "checkpoints": len(seen)} if self.run else {}
        return {"step": read[0], "row": read[1], **checkpoints}


def _piece(piece: Piece) -> dict[str, Any]:
    document = None if piece.document is None else f"{piece.source}/{piece.document}"
    return {**dataclasses.asdict(piece), "document": document}


def _config(run: Path, families: Mapping[str, Family]) -> RunConfig:
    try:
        return RunConfig.from_dict(json.loads((run / "config.json").read_text()), families)
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: neither a data directory nor a run that can be traced ({error})") from error


def _data_of(run: Path) -> Path:
    """The data directory that the ledger names last."""
    named = [e["data"] for e in read_lines(run / "ledger.jsonl") if e.get("data")]
    if not named or named[-1] == "synthetic":
        raise UserError(f"{run}: its ledger names no data directory; give --data DIR")
    return Path(named[-1])


def lines(samples: list[dict[str, Any]], width: int = 100) -> list[str]:
    """Return samples as a person reads them: one line each, and one for each document."""
    text = []
    for s in samples:
        step = "" if s.get("step") is None else f"step {s['step']} row {s['row']}  "
        origin = f"  {s['source']} window {s['window']}" if "window" in s and "source" in s else ""
        part = f" ({s['part']}, epoch {s['epoch']})" if s.get("part") else ""
        text.append(f"{step}chunk {s['chunk']} position {s['position']}{origin}{part}{seen(s)}")
        for d in s["documents"]:
            name = d["document"] or f"{d['source']} {d['file']}:{d['line']}"
            shown = " ".join(d["text"].split())
            shown = shown if len(shown) <= width else shown[: width - 1] + "…"
            text.append(f"  {name}  tokens {d['tokens'][0]}-{d['tokens'][1]}, from its {d['skip']}th  {shown}")
    return text


def seen(place: Mapping[str, Any]) -> str:
    """Say which checkpoints had read it."""
    if not place.get("checkpoints"):
        return ""
    return f"; seen by {place['checkpoints']} checkpoints, first {place['first_checkpoint']}"


def document_lines(documents: list[dict[str, Any]], width: int = 400) -> list[str]:
    """Return documents and where they went as a person reads it."""
    text = []
    for d in documents:
        text.append(d["document"])
        for w in d["windows"]:
            if "not_read" in w:
                text.append(f"  window {w['window']}: {w['not_read']}")
            else:
                step = "" if w.get("step") is None else f", step {w['step']} row {w['row']}"
                text.append(f"  window {w['window']}: chunk {w['chunk']} position {w['position']}{step}{seen(w)}")
        if d["text"] is not None:
            text.append("  " + (d["text"] if len(d["text"]) <= width else d["text"][: width - 1] + "…"))
    return text
