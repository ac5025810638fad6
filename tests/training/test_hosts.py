"""Several processes train as one: the same losses, bit for bit; what befalls one of them ends all."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoint.restore import restore
from checkpoint.series import Series, verify_files
from data.dataset import SyntheticData
from errors import RunError
from tests.training.test_loop import losses, on_mesh
from training import loop
from training.config import SeriesConfig
from training.metrics import read_lines

ROOT = Path(__file__).resolve().parent.parent.parent
#: A series checkpoint every 8 steps.
DATA = SyntheticData.of_chunks(vocab_size=64, sequence_length=32, chunks=5, samples_per_chunk=64, seed=5)

FAST = "--xla_backend_optimization_level=0"  # see tests/conftest.py

#: Process K of N.
PROCESS = """
import dataclasses, json, sys
from pathlib import Path
from parallel import compile_cache, distributed
from parallel.mesh import simulate

compile_cache.enable(None, print)
process, processes, port, devices, run, steps, seed, verifies = sys.argv[1:]
simulate(int(devices) // int(processes), check=False)
flags = distributed.HostFlags(f"localhost:{port}", int(processes), int(process))
with distributed.start(flags, timeout_s=100):
    from tests.training.test_hosts import DATA
    from tests.training.test_loop import FAMILIES
    from training import loop
    from training.config import RunConfig

    config = RunConfig.from_dict(json.loads(Path(sys.argv[0]).with_name("config.json").read_text()), FAMILIES)
    data = dataclasses.replace(DATA, seed=int(seed))
    outcome = loop.train(config, Path(run), data, FAMILIES, stop_at=int(steps) or None)
    ended = [outcome.reason, outcome.step, outcome.resumed_from]
    if verifies == "True":
        from checkpoint.series import Series
        from training.record import RunRecord
        from training.replay import Replayer

        series = Series(Path(run))
        ends = series.resolve("init")[0], series.resolve("latest")[0]
        ended.append(Replayer(RunRecord(Path(run), FAMILIES), data).replay(*ends, progress=False).verdict)
    print(json.dumps(ended))
"""


def start(folder, processes, config, run, steps=0, other_seed=None, verifies=False):
    """Start the processes of a run; the last one may be given other data. They may replay it at the end."""
    (folder / "process.py").write_text(PROCESS)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    seeds = [DATA.seed] * (processes - 1) + [other_seed or DATA.seed]
    given = (port, config.mesh.size, run, steps)
    return [
        subprocess.Popen(
            [sys.executable, folder / "process.py", *map(str, (k, processes, *given, seeds[k], verifies))],
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(processes)
    ]


def end(running):
    """Exit code, stdout and stderr of each; none is left behind."""
    try:
        return [(p, *p.communicate(timeout=300)) for p in running]
    finally:
        for process in running:
            process.kill()


def outcome(running):
    """What all of them said of how the run ended."""
    ended = end(running)
    assert all(p.returncode == 0 for p, _, _ in ended), [err for _, _, err in ended]
    (one,) = {out.splitlines()[-1] for _, out, _ in ended}  # Gloo says before that that it is connected
    assert ["step " in err for _, _, err in ended] == [True] + [False] * (len(ended) - 1)
    return json.loads(one)


def final_state(config, run):
    """All arrays of the last series checkpoint, as they are on disk."""
    entry = Series(run).resolve("latest")[0]
    program = loop.Program.plan(config.resolve(DATA), config.mesh.build(jax.devices()[: config.mesh.size]))
    state = restore(entry, params=program.abstract.params, optimizer=program.abstract.optimizer)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.fixture
def pair(tiny):
    """Two stages of two shards: a sum of two is the same in whatever order a transport adds, a sum of more is not."""
    execution = dataclasses.replace(tiny.execution, microbatches=2)
    config = dataclasses.replace(tiny, series=SeriesConfig(rolling_every_steps=50), execution=execution)
    return on_mesh(config, "pipeline=2,fsdp=2")


def test_two_processes_train_as_one(tiny, tmp_path):
    """To the first series checkpoint: the losses and the state of one process, bit for bit."""
    run, whole, shards = tmp_path / "run", tmp_path / "whole", on_mesh(tiny, "fsdp=2")
    alone = start(tmp_path, 1, shards, whole, 8)
    assert outcome(start(tmp_path, 2, shards, run, 8)) == ["stopped", 8, None]
    assert outcome(alone) == ["stopped", 8, None]
    assert losses(run) == losses(whole)
    assert [e.manifest.digests for e in Series(run).entries()] == [e.manifest.digests for e in Series(whole).entries()]


def test_any_number_of_processes_train_as_one(pair, tmp_path):
    """Two, of which one is told to stop, four likewise, then two: the losses and the state of one alone, bit for bit.

    And two replay bit for bit what two and four have trained.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    step = None
    for processes in (2, 4):  # one is told by SIGTERM, as clusters announce an eviction; JAX's service tells the others
        running = start(tmp_path, processes, pair, run)
        # Once it has made a step, or before the first one of those that go on.
        file = run / ("ledger.jsonl" if step else "metrics.jsonl")
        seen = len(read_lines(file))
        while len(read_lines(file)) <= seen and running[0].poll() is None:
            time.sleep(0.02)
        running[-1].send_signal(signal.SIGTERM)
        reason, done, resumed_from = outcome(running)
        assert (reason, resumed_from) == ("interrupted", step)
        assert (step or 0) < done < 40
        step = done

    last = step // 8 * 8 + 8  # the next series checkpoint
    whole_run = start(tmp_path, 1, pair, whole, last)
    assert outcome(start(tmp_path, 2, pair, run, last, verifies=True))[1:] == [last, step, "bitwise"]
    assert outcome(whole_run)[1:] == [last, None]
    assert losses(run) == losses(whole)
    for ours, theirs in zip(final_state(pair, run), final_state(pair, whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    told = [e for e in read_lines(run / "ledger.jsonl") if e["event"] in ("start", "resume")]
    assert [e["processes"] for e in told] == [2, 4, 2]
    assert [e.manifest.digests for e in Series(run).entries()] == [e.manifest.digests for e in Series(whole).entries()]

    entry = Series(run).newest()
    damaged = entry.path / "params" / "norm.scale" / "extra"
    damaged.write_bytes(b"")
    found = []
    for share in range(4):  # each process verifies its own, and the four of them all
        try:
            verify_files(entry, share=(share, 4))
        except RunError as e:
            found.append(str(e))
    assert len(found) == 1
    assert "params/norm.scale/extra is not part of it" in found[0]


def test_a_process_with_other_data_ends_all(pair, tmp_path):
    ended = end(start(tmp_path, 2, pair, tmp_path / "run", other_seed=6))
    assert [p.returncode for p, _, _ in ended] == [2, 2]
    message = f"{tmp_path}/run: not the same in this process as in process 0: data manifest = "
    assert f"error: process 1 of 2: {message}" in ended[0][2]
    assert f"errors.UserError: {message}" in ended[1][2]
    assert not (tmp_path / "run").exists()


def test_a_directory_that_the_lead_refuses_ends_all(pair, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    ended = end(start(tmp_path, 2, pair, tmp_path / "run"))
    assert [p.returncode for p, _, _ in ended] == [2, 2]
    message = f"{tmp_path}/run: not empty and not a run directory"
    assert f"errors.UserError: {message}" in ended[0][2]
    assert f"error: process 0 of 2: {message}" in ended[1][2]
