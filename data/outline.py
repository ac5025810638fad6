"""What `prepare` will make, or has made, in numbers: by arithmetic, without reading data."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.chunks import DataManifest
from data.mixture import Part
from data.packing import Layout, split_samples
from data.sources import SourceSpec, listed
from errors import UserError


def chunks(
    parts: Sequence[Part],
    *,
    chunks: int,
    samples_per_chunk: int,
    validation: int,
    sequence_length: int,
    global_batch: int,
    seed: int,
) -> dict[str, Any]:
    """Return the sizes of a data set in the layout "chunks" whose chunks have samples_per_chunk samples.

    The samples of each source in a chunk follow from the parts' weights by largest remainder: the published shares are
    rounded (fact sheet 3.1), so that they are right to a few samples; the sums are exact.
    """
    size = sequence_length + 1
    per_chunk = split_samples(samples_per_chunk, [p.weight for p in parts])
    tokens = [(p.name, (validation + chunks * n) * size) for p, n in zip(parts, per_chunk)]
    layout = Layout.of(
        tokens, sequence_length=sequence_length, validation=validation, chunks=chunks, seed=seed
    )  # the very arithmetic of `prepare`, on token counts that would give these chunks
    steps, left = divmod(layout.samples_per_chunk, global_batch)
    total = sum(p.weight for p in parts)
    return {
        "chunks": chunks,
        "samples_per_chunk": layout.samples_per_chunk,
        "steps_per_chunk": steps,
        "samples_left_per_chunk": left,
        "steps": chunks * steps,
        "tokens_on_disk": chunks * layout.samples_per_chunk * size,
        "tokens_trained": chunks * steps * global_batch * sequence_length,
        "validation_samples": validation * len(parts),
        "sources": {
            p.name: {
                "share": p.weight / total,
                "samples_per_chunk": s.per_chunk,
                "tokens_in_chunks": chunks * s.per_chunk * size,
            }
            for p, s in zip(parts, layout.sources)
        },
    }


def phases(
    mixtures: Sequence[tuple[Sequence[Part], int]], *, sequence_length: int, global_batch: int
) -> dict[str, Any]:
    """Return the sizes of a data set in the layout "mixture", of phases given as (parts, samples)."""
    listed = []
    for parts, samples in mixtures:
        slots = split_samples(samples, [p.weight for p in parts])
        listed.append(
            {
                "samples": samples,
                "steps": samples // global_batch,
                "tokens_trained": samples // global_batch * global_batch * sequence_length,
                "parts": {
                    p.name: {"share": n / samples, "samples": n, "tokens": n * sequence_length}
                    for p, n in zip(parts, slots)
                },
            }
        )
    return {"phases": listed, "tokens_trained": sum(p["tokens_trained"] for p in listed)}


def files(specs: Sequence[SourceSpec]) -> dict[str, dict[str, int]]:
    """Return how many files and bytes the sources have; no file is opened."""
    found = {}
    for spec in specs:
        sizes = [f.size for f in listed(spec)]
        found[spec.name] = {"files": len(sizes), "bytes": sum(size for size in sizes if size > 0)}
    return found


def shares(manifest: DataManifest, published: Sequence[Part]) -> list[dict[str, Any]]:
    """Return tokens and share of each source of a data set, beside the published share where there is one."""
    known = {p.name: p.weight for p in published} if manifest.layout == "chunks" else {}
    of_known = sum(known.get(s.name, 0) for s in manifest.sources)
    total = sum(s.tokens for s in manifest.sources)
    return [
        {
            "name": s.name,
            "documents": s.documents,
            "tokens": s.tokens,
            "share": s.tokens / total,
            "published_share": known[s.name] / of_known if s.name in known else None,
        }
        for s in manifest.sources
    ]


def share_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of `shares`."""
    lines = [f"{'source':20} {'documents':>12} {'tokens':>16} {'share':>8} {'published':>10}"]
    for r in rows:
        published = "-" if r["published_share"] is None else f"{r['published_share']:.2%}"
        lines.append(f"{r['name']:20} {r['documents']:>12,} {r['tokens']:>16,} {r['share']:>8.2%} {published:>10}")
    return lines


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return an outline as a person reads it."""
    text = []
    if "samples_per_chunk" in result:
        text += [
            f"{result['chunks']:,} chunks of {result['samples_per_chunk']:,} samples: {result['steps_per_chunk']:,} "
            f"steps each, {result['samples_left_per_chunk']:,} samples left",
            f"{result['tokens_on_disk']:,} tokens on disk, {result['tokens_trained']:,} trained in "
            f"{result['steps']:,} steps; {result['validation_samples']:,} validation samples besides",
            f"{'source':20} {'share':>8} {'samples per chunk':>18} {'tokens in chunks':>20}",
        ]
        text += [
            f"{name:20} {s['share']:>8.2%} {s['samples_per_chunk']:>18,} {s['tokens_in_chunks']:>20,}"
            for name, s in result["sources"].items()
        ]
    for n, phase in enumerate(result.get("phases", ())):
        text.append(
            f"phase {n + 1}: {phase['steps']:,} steps, {phase['samples']:,} samples, {phase['tokens_trained']:,} tokens"
        )
        text += [
            f"  {name:28} {p['share']:>8.2%} {p['samples']:>14,} samples {p['tokens']:>18,} tokens"
            for name, p in phase["parts"].items()
        ]
    for name, f in result.get("files", {}).items():
        text.append(f"source {name}: {f['files']:,} files, {f['bytes'] / 1e6:,.1f} MB")
    return text


def known_samples(value: int | None, what: str) -> int:
    """Return a number that an outline cannot do without, or raise UserError."""
    if value is None:
        raise UserError(f"--dry-run: {what} depends on the data; give it as a flag, or prepare the data")
    return value
