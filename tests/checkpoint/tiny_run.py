"""A state small enough to save a hundred times, and a trainer of it that a test can kill.

python -m tests.checkpoint.tiny_run RUN endless     save for ever; print an index when the one before is committed
python -m tests.checkpoint.tiny_run RUN full-disk   save 0, then fail on 1 because no file may exceed 2000 bytes
    python -m tests.checkpoint.tiny_run RUN pair N PORT  be process N of two, of four devices each; save and restore
"""

import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from checkpoint.manifest import Manifest, checkpoint_name
from checkpoint.restore import restore
from checkpoint.series import Entry, Series
from checkpoint.writer import SeriesWriter
from errors import RunError

SPECS = {
    "embedding": PartitionSpec("y", "x"),
    "wq": PartitionSpec(None, "x", "y"),
    "scale": PartitionSpec("x"),
    "half": PartitionSpec(("x", "y")),
}


def mesh(*degrees: int) -> Mesh:
    """Of one or two axes, "x" and "y"."""
    degrees = (*degrees, 1)[:2]
    devices = np.array(jax.devices()[: degrees[0] * degrees[1]]).reshape(degrees)
    return Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def state(seed: int, on: Mesh) -> tuple[Any, Any]:
    """Parameters and their AdamW state, every number different."""
    random = np.random.default_rng(seed)
    values = {
        "embedding": random.normal(size=(16, 8)).astype(np.float32),
        "layers": {"attention": {"wq": random.normal(size=(2, 8, 16)).astype(np.float32)}},
        "norm": {"scale": random.normal(size=8).astype(np.float32), "half": jnp.bfloat16(random.normal(size=24))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 100)))
    moments = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), optimizer.init(values))
    return place(values, on), place(moments, on)


def place(tree: Any, on: Mesh) -> Any:
    """The arrays on a mesh, each sharded by its name."""
    put = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda part: np.asarray(x)[part])  # noqa: E731
    return jax.tree.map(put, tree, shardings(tree, on))


def shardings(tree: Any, on: Mesh) -> Any:
    """A sharding per array, by its name."""
    spec = lambda path: SPECS.get(str(getattr(path[-1], "key", "")), PartitionSpec())  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(on, spec(path)), tree)


def target(tree: Any, on: Mesh) -> Any:
    """What to ask `restore` for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, on))


def manifest(kind: Any, index: int, step: int | None = None, **fields: Any) -> Manifest:
    """With 10 steps of 4 samples a chunk."""
    step = 10 * (index + 1) if step is None else step
    return Manifest(
        index=index,
        name=checkpoint_name(kind, index, step),
        kind=kind,
        step=step,
        **{
            "phase": 0,
            "tokens": 64 * step,
            "chunk": index if step else None,
            "samples": (max(0, 4 * (step - 10)), 4 * step),
            "parent": None,
            "parent_sha256": None,
            "config_sha256": "c" * 64,
            "data_sha256": "d" * 64,
            "mesh": {"x": 2, "y": 4},
            "device_kind": "cpu",
            "process_count": 1,
            "code_version": "test",
            "versions": {"jax": jax.__version__},
            "learning_rate": 1e-3,
            "loss": {"mean": 2.5, "last": 2.25},
            "wall_time": 1.7e9,
            **fields,
        },
    )


def save(writer: SeriesWriter, kind: Any, index: int, step: int | None = None, seed: int | None = None) -> None:
    """Start to save the state whose seed is the step."""
    record = manifest(kind, index, step)
    params, optimizer = state(record.step if seed is None else seed, mesh(2, 4))
    writer.save(record, params=params, optimizer=optimizer)


def check(entry: Entry, on: Mesh, seed: int | None = None) -> None:
    """The checkpoint restores, on any mesh, to the state whose seed is its step, bit for bit."""
    saved = state(entry.manifest.step if seed is None else seed, on)
    asked = target(saved, on)
    restored = restore(entry, params=asked[0], optimizer=asked[1])
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
        assert (b.shape, b.dtype, b.sharding) == (a.shape, a.dtype, a.sharding)
        for s, t in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.asarray(s.data).tobytes() == np.asarray(t.data).tobytes()


def _endless(run: Path) -> None:
    with SeriesWriter(run) as writer:
        writer.clean()
        save(writer, "series", -1)
        for index in range(1000):
            save(writer, "rolling", index - 1, step=10 * index + 5)
            save(writer, "series", index)
            print(index, flush=True)


def _full_disk(run: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with SeriesWriter(run) as writer:
        save(writer, "series", 0)
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        try:
            save(writer, "series", 1)
            writer.wait()
        except RunError as e:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(e)
        assert not (run / "series" / "001").exists()
        assert [e.manifest.name for e in Series(run).entries()] == ["000"]
        save(writer, "series", 1)  # the same writer can go on


def _pair(run: Path, process: str, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    with SeriesWriter(run) as writer:
        writer.clean()
        for index in (-1, 0):
            save(writer, "series", index)
            writer.wait()
            assert Series(run).entries()[-1].manifest.index == index
        check(Series(run).newest(), mesh(4, 2))


if __name__ == "__main__":
    {"endless": _endless, "full-disk": _full_disk, "pair": _pair}[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
