"""What a save costs: the time that training waits for it, the time until it is committed, memory, reading it back.

    python bench/save.py [--parameters 200] [--saves 5] [--dir SCRATCH] [--out bench/results/NAME.json]

Saves a float32 model of so many million parameters with its AdamW moments as the training loop does, each time beside a
plain write and fsync of as many bytes; restores it beside a plain read of the same files (from the page cache, both);
counts the bytes read for one tensor and for a part of one; and times the digest of a state beside a training step of
the same small model. Each part runs in a process of its own. The disk needs three times the state, the memory four.

The digest in proportion to a step: it reads every byte of the state once, and a step spends 6 FLOPs on a parameter and
token, so for one machine the proportion falls as the tokens of a step grow and does not depend on the model. "at_7b"
is this arithmetic for Amber's batch on the machine that was measured. On another machine count operations: the digest
spends some 70 integer operations on each of three float32 a parameter, Amber's step 6 * 4.6 million FLOPs.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from amber_jax.recipes import amber_7b, amber_tiny
from checkpoint import digest
from checkpoint.manifest import Entry, Manifest, checkpoint_name, code_version, environment
from checkpoint.names import flat
from checkpoint.restore import restore
from checkpoint.series import Series
from checkpoint.tensors import Tensors
from checkpoint.writer import SeriesWriter
from data.loader import Loader
from parallel.mesh import MeshConfig, simulate
from training.program import Program, no_limits
from training.step import batch_sharding

_BLOCK = 2**24
_OPERATIONS = 70  # of the digest on an element, see checkpoint/digest.py: 16 in each of 4 sums, and its position


def program_of(millions: float, devices: int) -> Program:
    """An amber of about so many million parameters, fully sharded."""
    recipe = amber_tiny()
    layers, vocab = 8, 32000
    embed = next(e for e in range(128, 10**5, 128) if 2 * vocab * e + layers * 12 * e * e >= millions * 1e6)
    model = dataclasses.replace(
        recipe.model,
        vocab_size=vocab,
        num_layers=layers,
        embed=embed,
        num_heads=embed // 64,
        head_dim=64,
        mlp=8 * embed // 3,
    )
    config = dataclasses.replace(recipe, model=model, mesh=MeshConfig(fsdp=devices))
    config = config.resolve(config.synthetic(10))
    return Program.plan(config, config.mesh.build(jax.devices()[:devices]))


def manifest(program: Program, step: int) -> Manifest:
    """Of a rolling checkpoint."""
    return Manifest(
        index=0,
        name=checkpoint_name("rolling", 0, step),
        kind="rolling",
        phase=0,
        step=step,
        tokens=step * program.config.data.tokens_per_step,
        chunk=0,
        samples=(0, step * program.config.data.global_batch),
        parent=None,
        parent_sha256=None,
        config_sha256=program.config.sha256,
        data_sha256=None,
        mesh=dict(program.mesh.shape),
        device_kind="cpu",
        process_count=1,
        code_version=code_version(),
        versions=environment(),
        learning_rate=1e-3,
        loss={"mean": 2.5, "last": 2.5},
        wall_time=time.time(),
    )


def status(field: str) -> int:
    """Bytes that the system says of this process's memory: VmRSS now, VmHWM at most."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def bytes_read() -> int:
    """That this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and fsync one file."""
    block = np.random.default_rng(0).bytes(_BLOCK)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for at in range(0, size, _BLOCK):
            file.write(block[: min(_BLOCK, size - at)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def plain_read(folder: Path) -> tuple[float, int]:
    """Seconds to read every file below a folder, and their bytes."""
    buffer, total = bytearray(_BLOCK), 0
    start = time.perf_counter()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    return time.perf_counter() - start, total


def committed_at(times: list[float]) -> Callable[[Entry], None]:
    """Notes when it is called."""
    return lambda entry: times.append(time.perf_counter())


def save_part(folder: Path, millions: float, saves: int) -> dict[str, Any]:
    """Save as the loop does, and beside each save write as much plainly."""
    program = program_of(millions, 1)
    state = jax.block_until_ready(program.init())
    arrays = jax.tree.leaves((state.params, state.optimizer))
    size = sum(x.nbytes for x in arrays)
    named = [(name, x) for tree in (state.params, state.optimizer) for name, x in flat(tree).items()]
    digest.digests(named)  # compile
    ctypes.CDLL(None).malloc_trim(0)  # what making the state took and gave back
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
    before = status("VmRSS")
    blocked, committed, plain, digests = [], [], [], []
    with SeriesWriter(folder / "run") as writer:
        writer.clean()
        for step in range(1, saves + 1):
            os.sync()
            done: list[float] = []
            start = time.perf_counter()
            writer.save(
                manifest(program, step),
                params=state.params,
                optimizer=state.optimizer,
                then=committed_at(done),
            )
            blocked.append(time.perf_counter() - start)
            writer.wait()
            committed.append(done[0] - start)
            os.sync()
            plain.append(plain_write(folder / "plain", size))
            start = time.perf_counter()
            digest.digests(named)
            digests.append(time.perf_counter() - start)
    peak = status("VmHWM")
    seconds = {
        "blocked": statistics.median(blocked),
        "of which digests": statistics.median(digests),
        "committed": statistics.median(committed),
        "plain write and fsync": statistics.median(plain),
    }
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "state_bytes": size,
        "saves": saves,
        "seconds": seconds,
        "seconds_of_each": {"blocked": blocked, "committed": committed, "plain": plain},
        "blocked_over_plain_write": seconds["blocked"] / seconds["plain write and fsync"],
        "committed_over_plain_write": seconds["committed"] / seconds["plain write and fsync"],
        "committed_over_plain_write_of_pairs": statistics.median(c / p for c, p in zip(committed, plain)),
        "memory": {"before": before, "peak": peak, "more_than_before_over_state": (peak - before) / size},
    }


def restore_part(folder: Path, millions: float, times: int = 3) -> dict[str, Any]:
    """Restore, verified and not, beside a plain read."""
    program = program_of(millions, 1)
    entry = Series(folder / "run").newest()
    assert entry is not None
    target = {"params": program.abstract.params, "optimizer": program.abstract.optimizer}
    _, size = plain_read(entry.path)  # into the page cache
    found: dict[str, list[float]] = {"plain read": [], "verified": [], "not verified": []}
    for _ in range(times):
        found["plain read"].append(plain_read(entry.path)[0])
        for verify, name in ((True, "verified"), (False, "not verified")):
            start = time.perf_counter()
            state = jax.block_until_ready(restore(entry, **target, verify=verify))
            found[name].append(time.perf_counter() - start)
            del state
    seconds = {name: statistics.median(values) for name, values in found.items()}
    return {
        "bytes": size,
        "seconds": seconds,
        "verified_over_plain_read": seconds["verified"] / seconds["plain read"],
        "not_verified_over_plain_read": seconds["not verified"] / seconds["plain read"],
    }


def look_part(folder: Path) -> dict[str, Any]:
    """Bytes read for one tensor and for a part of one, by this process, of what the checkpoint has."""
    entry = Series(folder / "run").newest()
    assert entry is not None
    whole = sum(f["bytes"] for f in entry.manifest.files.values())
    looks = {
        "norm.scale": ("norm.scale", ...),
        "layers.3.attention.wq": ("layers.3.attention.wq", ...),
        "layers.mlp.up[3, :2]": ("layers.mlp.up", (3, slice(0, 2))),
        "embedding.table[100:110]": ("embedding.table", slice(100, 110)),
    }
    found: dict[str, dict[str, int]] = {}
    for what, (name, index) in looks.items():
        for verify in (True, False):
            array = Tensors(entry, verify=verify)[name]
            before = bytes_read()
            part = array[index]
            row = found.setdefault(what, {"bytes": part.nbytes})
            row["read, verified" if verify else "read"] = bytes_read() - before
    return {"checkpoint_bytes": whole, "looks": found}


def digest_part(devices: int, steps: int = 8) -> dict[str, Any]:
    """Seconds of the digest of a state, and of a training step of the same model."""
    config = dataclasses.replace(amber_tiny(), mesh=MeshConfig(fsdp=devices))
    data = config.synthetic(steps)
    config = config.resolve(data)
    mesh = config.mesh.build(jax.devices()[:devices])
    program = Program.plan(config, mesh).compile()
    state = program.init()
    loader = Loader(
        data,
        phase_steps=config.phase_steps,
        global_batch=config.data.global_batch,
        microbatches=config.execution.microbatches,
        sharding=batch_sharding(mesh),
    )
    limits, step_s, digest_s = no_limits(mesh), [], []
    for batch in loader.batches(0, steps):
        start = time.perf_counter()
        state, values = program.train_step(state, batch, limits)
        float(values["loss"])
        step_s.append(time.perf_counter() - start)
        named = [(name, x) for tree in (state.params, state.optimizer) for name, x in flat(tree).items()]
        start = time.perf_counter()
        digest.digests(named)
        digest_s.append(time.perf_counter() - start)
    small = {"step_s": statistics.median(step_s[2:]), "digest_s": statistics.median(digest_s[2:])}

    big = Program.plan(program_of(50, devices).config, mesh).init()
    named = [(name, x) for tree in (big.params, big.optimizer) for name, x in flat(tree).items()]
    size = sum(x.nbytes for _, x in named)
    digest.digests(named)
    start = time.perf_counter()
    digest.digests(named)
    per_gb = (time.perf_counter() - start) / size * 1e9

    tokens, seven = config.data.tokens_per_step, amber_7b()
    bytes_small = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer)))
    rate = 6 * sum(x.size for x in jax.tree.leaves(state.params)) * tokens / small["step_s"]
    return {
        "devices": devices,
        "seconds_per_gb": per_gb,
        "small_model": {
            **small,
            "state_bytes": bytes_small,
            "tokens_per_step": tokens,
            "digest_over_step": small["digest_s"] / small["step_s"],
        },
        "at_7b": {
            "tokens_per_step": seven.data.tokens_per_step,
            "digest_over_step_on_this_machine": 12e-9 * per_gb / (6 * seven.data.tokens_per_step / rate),
            "digest_operations_over_step_flops": 3 * _OPERATIONS / (6 * seven.data.tokens_per_step),
        },
    }


def part(arguments: list[str]) -> dict[str, Any]:
    """What a process of its own says."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=200, help="millions")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="scratch on the disk to measure; emptied")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=["save", "restore", "look", "digest"], help="only this, here")
    parser.add_argument("--devices", type=int, default=1, help="of the part digest")
    args = parser.parse_args()
    if args.part:
        simulate(args.devices, check=False)
        work = {
            "save": lambda: save_part(args.dir, args.parameters, args.saves),
            "restore": lambda: restore_part(args.dir, args.parameters),
            "look": lambda: look_part(args.dir),
            "digest": lambda: digest_part(args.devices),
        }
        print(json.dumps(work[args.part]()))
        return
    from record import record

    folder = Path(tempfile.mkdtemp(prefix="save-", dir=args.dir))
    try:
        common = ["--dir", str(folder), "--parameters", str(args.parameters)]
        result = {
            "benchmark": "save",
            "save": part(["--part", "save", *common, "--saves", str(args.saves)]),
            "restore": part(["--part", "restore", *common]),
            "look": part(["--part", "look", *common]),
            "digest": [part(["--part", "digest", "--devices", str(n)]) for n in (1, 4)],
        }
    finally:
        shutil.rmtree(folder)
    record(result, jax.devices("cpu")[0], args.out)


if __name__ == "__main__":
    main()
