"""A checkpoint that somebody changed and wrote again so that everything in it agrees."""

import dataclasses

import numpy as np

from checkpoint import digest, files
from checkpoint.manifest import FILE, Entry
from checkpoint.tensors import Tensors


def change_one_weight(entry: Entry, name: str, by: float, with_digests: bool = True) -> None:
    """Add to the first number of an array's first file; hashes, digests if asked for, and manifest are made anew."""
    chunk = min(p for p in (entry.path / f"params/{name}").rglob("*") if p.is_file() and p.name != "zarr.json")
    raw = bytearray(chunk.read_bytes())
    values = np.frombuffer(raw, np.float32)
    values[0] += by
    chunk.write_bytes(raw)
    manifest = entry.manifest
    hashes = files.hashes(entry.path, [n for n in files.listing(entry.path) if n != FILE])
    tensors, digests = {n: dict(t) for n, t in manifest.tensors.items()}, dict(manifest.digests)
    if with_digests:
        array = Tensors(entry, verify=False)[name][...]
        tensors[f"params/{name}"]["digest"] = digest.digest(name, array, manifest.digest_version)
        all_of = {n.partition("/")[2]: t["digest"] for n, t in tensors.items() if n.startswith("params/")}
        digests["params"] = digest.whole(all_of)
    changed = dataclasses.replace(manifest, tensors=tensors, digests=digests, files=hashes)
    (entry.path / FILE).write_text(changed.to_json())
