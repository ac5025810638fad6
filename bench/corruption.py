"""Damage each file of a checkpoint and of a data set: whoever reads it is told where, or nothing is lost.

A damage is a flipped bit, a file cut off at a random length, or a file that is gone. After each, everything is read in
the ways in which the library reads it:

    restore       `checkpoint.restore.restore`: parameters and optimizer state to devices, files verified
    tensors       `checkpoint.tensors.Tensors`: every array of both, for analysis; and all that the manifest says
    go on         data as a run reads it that goes on: `Loader.start`, then every sample
    begin         data as a new run reads it
    check         `ChunkedData.check_content`, then the index of documents
    index         the index of documents as `trace` reads it

and the verdict is "refused" (an error of ours that names the file, or its checkpoint or data set), "unchanged" (every
value is what it was: nobody reads these bytes), "unnamed" (an error that does not say where) or "SILENT" (another
value). None must ever come to the last two verdicts.

    python bench/corruption.py [--flips 200] [--seed 0] [--out bench/results/NAME.json]
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from checkpoint.names import flat
from checkpoint.restore import restore
from checkpoint.series import Series
from checkpoint.tensors import Tensors
from checkpoint.writer import SeriesWriter
from data.dataset import ChunkedData
from data.loader import Loader
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec
from data.trace import Tracer
from errors import RunError, UserError
from tests.data.made_up import code, prose

tiny_run: Any = importlib.import_module("tests.checkpoint.tiny_run")  # a test's, which mypy need not follow
VERDICTS = ("refused", "unchanged", "unnamed", "SILENT")
Kind = Literal["flip", "cut", "gone"]
Values = Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Damage:
    """What befalls one file."""

    kind: Kind
    file: str
    """Relative to what is damaged."""
    at: int = 0
    """Byte that is flipped, or new length."""
    bit: int = 0

    @contextlib.contextmanager
    def inflicted(self, root: Path) -> Iterator[None]:
        """Damage the file, and put back what was there."""
        path = root / self.file
        whole = path.read_bytes()
        if self.kind == "gone":
            path.unlink()
        elif self.kind == "cut":
            path.write_bytes(whole[: self.at])
        else:
            path.write_bytes(whole[: self.at] + bytes([whole[self.at] ^ 1 << self.bit]) + whole[self.at + 1 :])
        try:
            yield
        finally:
            path.write_bytes(whole)


@dataclasses.dataclass(frozen=True)
class Target:
    """Something to damage, and the ways to read it."""

    root: Path
    names: tuple[str, ...]
    """An error that says where the damage is has the file in it, or one of these."""
    readings: Mapping[str, Callable[[], Values]]

    @property
    def files(self) -> list[str]:
        """All of it, sorted."""
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())

    def judge(self, reading: str, damage: Damage, expected: Values) -> tuple[str, str]:
        """Verdict on one way to read what is damaged now, and what was said."""
        try:
            found = self.readings[reading]()
        except Exception as e:
            named = isinstance(e, (UserError, RunError)) and any(n in str(e) for n in (damage.file, *self.names))
            return "refused" if named else "unnamed", f"{type(e).__name__}: {e}"
        changed = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return ("SILENT", f"{', '.join(changed[:3])} changed") if changed else ("unchanged", "")


def flips(target: Target, count: int, chosen: random.Random) -> list[Damage]:
    """So many flipped bits: a file by chance, then a bit of it, every other one in a byte that is no zero.

    Zeros are mostly padding: of a small file of records, 97%.
    """
    contents = {f: raw for f in target.files if (raw := (target.root / f).read_bytes())}
    found = []
    for n in range(count):
        file = chosen.choice([*contents])
        places: Sequence[int] = range(len(contents[file]))
        if n % 2:
            places = [i for i, byte in enumerate(contents[file]) if byte] or places
        found.append(Damage("flip", file, chosen.choice(places), chosen.randrange(8)))
    return found


def losses_of_files(target: Target, chosen: random.Random) -> list[Damage]:
    """Every file cut off somewhere (not where it ends), and every file gone."""
    sizes = {f: (target.root / f).stat().st_size for f in target.files}
    cuts = [Damage("cut", f, chosen.randrange(size)) for f, size in sizes.items() if size]
    return [*cuts, *(Damage("gone", f) for f in sizes)]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On one damage by one reading."""

    reading: str
    damage: Damage
    verdict: str
    said: str


def trials(target: Target, damages: list[Damage], readings: Sequence[str]) -> Iterator[Verdict]:
    """Inflict each damage, and read in each of these ways."""
    expected = {reading: target.readings[reading]() for reading in readings}
    for damage in damages:
        with damage.inflicted(target.root):
            for reading in readings:
                yield Verdict(reading, damage, *target.judge(reading, damage, expected[reading]))


# ---- what is damaged -----------------------------------------------------------------------------------------------


def checkpoint(run: Path, selector: str) -> Target:
    """A checkpoint of `tests.checkpoint.tiny_run` in a finished run."""
    mesh = tiny_run.mesh(4, 2)
    asked = tiny_run.target(tiny_run.state(0, mesh), mesh)

    def restored() -> Values:
        (entry,) = Series(run).resolve(selector)
        params, optimizer = restore(entry, params=asked[0], optimizer=asked[1])
        arrays = {f"params/{n}": x for n, x in flat(params).items()}
        arrays |= {f"optimizer/{n}": x for n, x in flat(optimizer).items()}
        return {name: np.asarray(x).tobytes() for name, x in arrays.items()}

    def looked_at() -> Values:
        (entry,) = Series(run).resolve(selector)
        arrays = {f"{item}/{n}": x for item in ("params", "optimizer") for n, x in Tensors(entry, item).items()}
        values = {name: x[...].tobytes() for name, x in arrays.items()}
        return values | {"manifest": entry.manifest.to_json().encode()}

    (entry,) = Series(run).resolve(selector)
    return Target(entry.path, (str(entry.path), f"{run}@{selector}"), {"restore": restored, "tensors": looked_at})


def make_run(run: Path) -> str:
    """A run with a checkpoint to damage in the middle of its series; returns which."""
    with SeriesWriter(run) as writer:
        for index in range(-1, 3):
            tiny_run.save(writer, "series", index)
    return "1"


def data_set(folder: Path, global_batch: int = 8) -> Target:
    """A prepared data set, which a run has already read from."""
    sharding = NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), PartitionSpec())

    def loader() -> Loader:
        data = ChunkedData(folder)
        steps = tuple(p.steps(global_batch) for p in data.phases)
        return Loader(data, phase_steps=steps, global_batch=global_batch, microbatches=1, sharding=sharding)

    def samples(data: ChunkedData) -> Values:
        """All that training and validation read, after the cheap check of the files with which a run begins."""
        data.check_files()
        values = {}
        for phase in data.phases:
            for chunk in range(phase.first_chunk, phase.first_chunk + phase.chunks):
                read = [data.sample(chunk, n) for n in range(phase.chunk_samples(chunk))]
                values[f"chunk {chunk}"] = b"".join(x.tobytes() for sample in read for x in sample)
        for source in data.sources:
            values[f"validation {source}"] = b"".join(x.tobytes() for x in data.validation(source))
        return values

    def index(data: ChunkedData) -> Values:
        tracer, values = Tracer(data), {}
        for source in data.sources:
            documents = tracer._index(source)
            for kind in ("offsets", "lines", "hashes"):
                values[f"{source}.{kind}"] = getattr(documents, kind).tobytes()
            values[f"{source}.ids"] = "\n".join(documents.id(n) for n in range(len(documents))).encode()
        return values

    state = loader().state(1)

    def go_on() -> Values:
        again = loader()
        again.start(state)
        return samples(again.data)  # type: ignore[arg-type]

    def checked() -> Values:
        data = ChunkedData(folder)
        data.check_content()
        return index(data)

    readings = {
        "go on": go_on,
        "begin": lambda: samples(ChunkedData(folder)),
        "check": checked,
        "index": lambda: index(ChunkedData(folder)),
    }
    return Target(folder, (str(folder), "the run was trained on data with manifest"), readings)


def make_data(folder: Path) -> Path:
    """A tiny data set of two sources; returns its folder."""
    (folder / "code").mkdir(parents=True)
    for i in range(10):
        (folder / "code" / f"{i:02}.py").write_text(code(i, 30))
    with open(folder / "prose.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"text": prose(i, i % 60)}) + "\n")
    sources = (SourceSpec("code", str(folder / "code")), SourceSpec("prose", str(folder / "prose.jsonl")))
    config = PrepareConfig(
        recipe="amber_tiny",
        out=folder / "set",
        sources=sources,
        sequence_length=16,
        vocab_size=400,
        chunks=4,
        validation_per_source=5,
        seed=7,
    )
    prepare(config, log=lambda line: None)
    return config.out


# ---- the bench -----------------------------------------------------------------------------------------------------


def kind_of(file: str) -> str:
    """What a file is, for the table."""
    top, slash, _ = file.partition("/")
    if not slash:
        return top if top == "manifest.json" else "other metadata"
    return "metadata of arrays" if file.endswith("zarr.json") else f"{top}/"


def table(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """How often each verdict, by reading, damage and kind of file."""
    rows: dict[tuple[str, str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for v in verdicts:
        rows[v.reading, v.damage.kind, kind_of(v.damage.file)][v.verdict] += 1
    return [
        {"reading": reading, "damage": damage, "file": file, **{v: counts[v] for v in VERDICTS}}
        for (reading, damage, file), counts in sorted(rows.items())
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="of each target, besides one cut and one loss per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from record import record

    begun, chosen = time.perf_counter(), random.Random(args.seed)
    verdicts: dict[str, list[Verdict]] = {}
    with tempfile.TemporaryDirectory(prefix="corruption-") as scratch:
        run = Path(scratch, "run")
        targets = {"checkpoint": checkpoint(run, make_run(run)), "data": data_set(make_data(Path(scratch, "data")))}
        for what, target in targets.items():
            damages = [*flips(target, args.flips, chosen), *losses_of_files(target, chosen)]
            verdicts[what] = list(trials(target, damages, [*target.readings]))
    print(f"{'':12}{'reading':10}{'damage':8}{'file':22}", *(f"{v:>10}" for v in VERDICTS))
    for what, found in verdicts.items():
        for row in table(found):
            print(f"{what:12}{row['reading']:10}{row['damage']:8}{row['file']:22}", *(f"{row[v]:10}" for v in VERDICTS))
    every = [v for found in verdicts.values() for v in found]
    ways = dict.fromkeys(v.reading for v in every)
    totals = {way: collections.Counter(v.verdict for v in every if v.reading == way) for way in ways}
    bad = [v for v in every if v.verdict in VERDICTS[2:]]
    result = {
        "benchmark": "corruption",
        "flips_of_each": args.flips,
        "seed": args.seed,
        "totals": {way: {v: counts[v] for v in VERDICTS} for way, counts in totals.items()},
        "silent_or_unnamed_where_it_must_not_be": [dataclasses.asdict(v) for v in bad],
        "rows": {what: table(found) for what, found in verdicts.items()},
        "seconds": time.perf_counter() - begun,
    }
    record(result, jax.devices("cpu")[0], args.out)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
