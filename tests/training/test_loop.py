"""The loop: resumed equals uninterrupted bit for bit, on any mesh nearly so; what goes wrong loses nothing."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from amber_jax.config import AmberConfig
from checkpoint.restore import restore
from checkpoint.series import Series
from data.dataset import ChunkedData, SyntheticData
from data.mixture import Part
from data.prepare import PrepareConfig, prepare
from data.sample import PhaseSamples
from data.sources import SourceSpec
from errors import RunError, UserError
from layers import params
from parallel.mesh import MeshConfig
from tests.data.rearranged import Rearranged
from training import loop
from training.config import Family, PhaseConfig, model_to_dict
from training.metrics import read_lines
from training.optimizer import AdamWConfig
from training.step import make_eval_step

ROOT = Path(__file__).resolve().parent.parent.parent
FAMILIES = {"amber": Family(AmberConfig, AdamWConfig)}
#: 3 chunks of 4 steps; rolling checkpoints at steps 3, 6, 9.
DATA = SyntheticData.of_chunks(vocab_size=64, sequence_length=32, chunks=3, samples_per_chunk=35, seed=5)


def train(config, run, data=DATA, **arguments):
    return loop.train(config, run, data, FAMILIES, **arguments)


def on_mesh(config, text):
    return dataclasses.replace(config, mesh=MeshConfig.parse(text))


def losses(run):
    """Loss and norm of every step; a step that is logged twice, or out of order, is an error."""
    train = [r for r in read_lines(run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(len(train)))
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in train}


def final_state(config, run, data=DATA):
    """All arrays of the last series checkpoint, as they are on disk."""
    entry = Series(run).resolve("latest")[0]
    program = loop.Program.plan(config.resolve(data), config.mesh.build())
    state = restore(entry, params=program.abstract.params, optimizer=program.abstract.optimizer)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def reference(tiny, uninterrupted):
    """A run of 12 steps in one go on data=2,fsdp=2,tensor=2, made once."""
    config = on_mesh(tiny, "data=2,fsdp=2,tensor=2")
    if not uninterrupted.exists():
        outcome = train(config, uninterrupted)
        assert outcome.reason == "finished"
        assert outcome.step == 12
    return config, uninterrupted


def test_resumed_equals_uninterrupted_bit_for_bit(reference, tmp_path):
    config, whole = reference
    run = tmp_path / "run"
    for stop in (2, 5, 8):  # before the first rolling save, after one, at the end of a chunk
        outcome = train(config, run, stop_at=stop)
        assert (outcome.reason, outcome.step) == ("stopped", stop)
    outcome = train(config, run)
    assert (outcome.reason, outcome.resumed_from) == ("finished", 8)
    assert losses(run) == losses(whole)
    for ours, theirs in zip(final_state(config, run), final_state(config, whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    told = [e for e in read_lines(run / "ledger.jsonl") if e["event"] != "save"]
    assert [e["event"] for e in told] == ["start", "stop", "resume", "stop", "resume", "stop", "resume", "finish"]
    assert [e["data"] for e in told[::2]] == ["synthetic"] * 4


#: Two phases of 43 and 33 samples, 5 and 4 batches of eight, in chunks of ten, in two of which most batches lie.
PHASES = (PhaseSamples(0, 43, 10, carry=True), PhaseSamples(5, 33, 10, carry=True))
MIXED = Rearranged(64, 32, PHASES, seed=5)


@pytest.fixture
def two_phases(tiny):
    mixture = (Part("a", 1.0),)
    phases = (PhaseConfig(chunks=2, mixture=mixture), PhaseConfig(mixture=mixture))
    return dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, layout="mixture"), phases=phases)


def test_resumed_equals_uninterrupted_over_phases_and_masks(two_phases, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(two_phases, whole, MIXED).step == 9
    for stop in (4, 5):  # in a chunk that a batch shares with the next; at the end of the first phase
        assert train(two_phases, run, MIXED, stop_at=stop).step == stop
    assert train(two_phases, run, MIXED).reason == "finished"
    assert losses(run) == losses(whole)
    for ours, theirs in zip(final_state(two_phases, run, MIXED), final_state(two_phases, whole, MIXED), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    manifests = [e.manifest for e in Series(run).entries()]
    assert [(m.name, m.step, m.phase, m.chunk) for m in manifests] == [
        ("init", 0, 0, None), ("000", 3, 0, 2), ("001", 5, 0, 3), ("002", 9, 1, 8),
    ]  # fmt: skip
    validated = [[r for r in read_lines(d / "metrics.jsonl") if r["kind"] == "validation"] for d in (run, whole)]
    assert [r["step"] for r in validated[0]] == [0, 3, 5, 9]
    assert [r["loss"] for r in validated[0]] == [r["loss"] for r in validated[1]]


def test_validation_counts_only_what_counts(two_phases):
    """Ten samples fill one batch of eight and two rows of another."""
    config = two_phases.resolve(MIXED)
    program = loop.Program.plan(config, config.mesh.build()).compile()
    params = program.init().params
    losses = program.validate(params, MIXED)
    assert losses["loss"] == losses["loss/held-out"]
    assert program.validate(params, dataclasses.replace(MIXED, uncounted=1)) == losses
    others = dataclasses.replace(MIXED, seed=6)
    assert program.validate(params, others) != losses
    totals = program._totals(params, MIXED, MIXED.sources[0])
    assert len(totals) == 2  # batches, each read by itself
    weight = sum(float(t["weight"]) for t in totals)
    assert weight == MIXED.validation("").weights.sum()


def test_validation_reads_every_so_manyth_sample(two_phases):
    """Of ten, in batches of eight: all, which are two batches, and fewer."""
    config = two_phases.resolve(MIXED)
    mesh = config.mesh.build()
    plan = loop.Program.plan(config, mesh)
    plan = dataclasses.replace(plan, eval_step=make_eval_step(config.model, config.execution.region, mesh))
    weights = plan.init().params
    alone = [plan.eval_step(weights, plan._batch(MIXED.validation("held-out", n, n + 1))) for n in range(10)]
    found = {}
    for every in (1, 2, 3, 10):
        few = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_every=every))
        found[every] = dataclasses.replace(plan, config=few).validate(weights, MIXED)["loss"]
        loss, count = (sum(float(t[name]) for t in alone[::every]) for name in ("loss_sum", "weight"))
        assert found[every] == pytest.approx(loss / count, rel=1e-6)
    assert len(set(found.values())) == 4, "a sample more or less is seen"


def test_resumed_on_other_meshes_follows_the_same_curve(reference, tiny, tmp_path):
    _, whole = reference
    run = tmp_path / "run"
    for stop, mesh in ((3, "fsdp=8"), (6, "tensor=8"), (9, "data=8"), (12, "data=2,tensor=4")):
        train(on_mesh(tiny, mesh), run, stop_at=stop)
    expected, got = losses(whole), losses(run)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose([got[s][0] for s in got], [expected[s][0] for s in got], rtol=1e-5)
    ours, theirs = Series(run).resolve("2")[0], Series(whole).resolve("2")[0]
    resumed = [e["mesh"] for e in read_lines(run / "ledger.jsonl") if e["event"] == "resume"]
    assert [m["tensor"] for m in resumed] == [8, 1, 4]
    assert (ours.manifest.tokens, ours.manifest.samples) == (theirs.manifest.tokens, theirs.manifest.samples)


def test_a_killed_process_resumes_to_the_same_bits(reference, tmp_path):
    """SIGKILL in the middle of training, in a process of its own; metrics are cut back and grow again."""
    config, whole = reference
    run = tmp_path / "run"
    fields = {
        "model": {k: v for k, v in model_to_dict(config.model).items() if k != "family"},
        "data": dataclasses.asdict(config.data) | {"samples_per_chunk": 35, "chunks": 3},
    }
    del fields["data"]["bos_sources"]  # none, which is no flag
    flags = [f"--{part}.{k.replace('_', '-')}={v}" for part, values in fields.items() for k, v in values.items()]
    rate = ["--optimizer.peak-learning-rate=1e-2", "--optimizer.warmup-steps=5", "--series.rolling-every-steps=3"]
    flags = [f for f in flags if "seed" not in f] + ["--data.seed=5", *rate]
    command = [sys.executable, str(ROOT / "run.py"), "train", "amber_tiny", "--data=synthetic", f"--run={run}"]
    command += ["--simulate=8", "--mesh=data=2,fsdp=2,tensor=2", *flags]
    # As many optimizations as here (tests/conftest.py): other programs add in another order.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_lines(run / "metrics.jsonl")) < 7 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(losses(run)) >= 7
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    assert losses(run) == losses(whole)
    ours, theirs = (
        {
            name: f
            for name, f in Series(r).resolve("latest")[0].manifest.files.items()
            if "/c/" in name or "/c" in name[-2:]
        }
        for r in (run, whole)
    )
    assert len(ours) >= 30, "array data, without Orbax's own records, which hold times"
    assert ours == theirs


def test_the_series_has_one_checkpoint_per_chunk_and_the_first(reference):
    _, run = reference
    entries = Series(run).entries()
    assert [(e.manifest.name, e.manifest.step, e.manifest.chunk) for e in entries] == [
        ("init", 0, None),
        ("000", 4, 0),
        ("001", 8, 1),
        ("002", 12, 2),
    ]
    assert [e.manifest.parent for e in entries] == [None, "init", "000", "001"]
    assert [e.manifest.parent_sha256 for e in entries[1:]] == [e.sha256 for e in entries[:-1]]
    assert [e.manifest.samples for e in entries] == [(0, 0), (0, 32), (32, 64), (64, 96)]
    every = losses(run)
    assert entries[2].manifest.loss["last"] == every[7][0]
    assert entries[2].manifest.loss["mean"] == pytest.approx(np.mean([every[s][0] for s in range(4, 8)]))
    assert entries[3].manifest.tokens == 12 * 8 * 32


def test_any_checkpoint_restores_on_any_mesh(reference, mesh_of):
    config, run = reference
    entry = Series(run).resolve("1")[0]
    values = []
    for mesh in ("data=1", "data=8", "fsdp=8", "tensor=8", "fsdp=2,tensor=2", "data=2,fsdp=4"):
        mesh = mesh_of(mesh)
        target = params.abstract_arrays(config.model.abstract, mesh)
        weights, _ = restore(entry, params=target, optimizer=None)
        assert jax.tree.map(lambda x: x.sharding, weights) == params.shardings(config.model.abstract, mesh)
        values.append([np.asarray(x) for x in jax.tree.leaves(weights)])
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_finished_run_has_nothing_left_to_do(reference):
    config, run = reference
    before = (run / "series.jsonl").read_text()
    outcome = train(config, run)
    assert (outcome.reason, outcome.step, outcome.loss) == ("finished", 12, None)
    assert (run / "series.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tiny, tmp_path, monkeypatch, number):
    """The signal arrives while step 5 is logged; that step is the last, and its state is on disk."""
    write = loop.MetricsWriter.write

    def write_and_signal(self, kind, step, values):
        write(self, kind, step, values)
        if kind == "train" and step == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.MetricsWriter, "write", write_and_signal)
    before = signal.getsignal(number)
    outcome = train(tiny, tmp_path / "run")
    assert outcome.reason == "interrupted"
    assert 5 <= outcome.step <= 6
    assert signal.getsignal(number) == before
    assert Series(tmp_path / "run").newest().manifest.step == outcome.step
    assert read_lines(tmp_path / "run" / "ledger.jsonl")[-1]["reason"] == "interrupted"


def test_phases_longer_than_the_data_are_refused_before_anything_is_written(tiny, tmp_path):
    longer = dataclasses.replace(tiny, phases=(PhaseConfig(steps=1000),))
    with pytest.raises(UserError, match="phase 0 has 12 steps of 8 samples, and the run's 1,000; prepare more"):
        train(longer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_phases_says_so(tiny, tmp_path):
    old = tiny.to_dict()
    del old["data"]["document_end"], old["execution"]["unroll"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="was begun by code in which runs had no schedules of execution yet"):
        train(tiny, tmp_path)
    newer = tiny.to_dict() | {"alignment": "solved"}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"unknown fields \['alignment'\]; if newer code wrote it, update this"):
        train(tiny, tmp_path)
    del old["data"]["layout"], old["data"]["overlap"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="was begun by code in which runs had no layouts of data yet; go on with the"):
        train(tiny, tmp_path)
    del old["phases"], old["loss_over"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="was begun by code in which runs had no phases yet"):
        train(tiny, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict() | {"data": 3}))
    with pytest.raises(UserError, match=r"not a run's configuration \(config: config.data is int, expected fields"):
        train(tiny, tmp_path)


def test_another_recipe_is_refused(reference, tiny, tmp_path):
    config, run = reference
    with pytest.raises(UserError, match=r"(?s)another configuration.*seed: the run has 11111, asked for 7"):
        train(dataclasses.replace(config, seed=7), run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="not empty and not a run directory"):
        train(tiny, other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_other_data_is_refused(reference):
    config, run = reference
    with pytest.raises(UserError, match=r"was trained on data with manifest [0-9a-f]{12}…, and --data has"):
        train(config, run, dataclasses.replace(DATA, seed=6))


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match="16 but 8 cpu devices are visible"):
        train(on_mesh(tiny, "data=16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_in_the_newest_checkpoint_is_never_trained_on(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny, run, stop_at=4)
    file = next(p for p in (run / "series" / "000" / "params").rglob("*") if p.is_file() and p.stat().st_size > 1000)
    raw = bytearray(file.read_bytes())
    raw[500] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RunError, match=r"series/000: damaged.*SHA-256 differs"):
        train(tiny, run)


def test_validation_loss_by_source(tiny, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        (folder / f"{n}.txt").write_text(" ".join(rng.choice(["ba", "be", "bi", "bo", "bu"], size=300)))
    data_dir = tmp_path / "data"
    spec = SourceSpec.parse(f"syllables={folder}")
    common = {"sequence_length": 32, "vocab_size": 270, "chunks": 2, "validation_per_source": 5, "seed": 1}
    prepare(PrepareConfig(recipe="amber_tiny", out=data_dir, sources=(spec,), **common), log=lambda _: None)
    data = ChunkedData(data_dir)
    config = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, vocab_size=270))
    run = tmp_path / "run"
    train(config, run, data, stop_at=data.phases[0].samples_per_chunk // 8)
    first, second = (r for r in read_lines(run / "metrics.jsonl") if r["kind"] == "validation")
    assert first["loss"] == pytest.approx(np.log(270), abs=0.05)
    assert first["loss"] == pytest.approx(first["loss/syllables"])
    assert second["loss"] < first["loss"] - 1
    assert read_lines(run / "ledger.jsonl")[0]["data"] == str(data_dir)
    assert (run / "tokenizer.model").read_bytes() == data.tokenizer_file.read_bytes()
    resumed = tmp_path / "resumed"
    for stop in (3, data.phases[0].samples_per_chunk // 8):
        train(config, resumed, data, stop_at=stop)
    timeless = [
        [{k: v for k, v in r.items() if k in ("kind", "step") or "loss" in k} for r in read_lines(d / "metrics.jsonl")]
        for d in (run, resumed)
    ]
    assert timeless[0] == timeless[1], "every logged loss, validation included, also across an interruption"
    shutil.rmtree(data_dir / "chunks")
    with pytest.raises(RunError, match=r"chunks/000.arrayrecord"):
        train(config, run, ChunkedData(data_dir))


def test_a_step_that_is_past_is_refused_before_anything_is_compiled(reference, monkeypatch):
    config, run = reference
    before = (run / "ledger.jsonl").read_text()
    monkeypatch.setattr(loop.Program, "compile", lambda self: pytest.fail("compiled"))
    with pytest.raises(UserError, match="--steps 3: the run has 12 steps already"):
        train(config, run, stop_at=3)
    with pytest.raises(UserError, match="was trained on data"):
        train(config, run, dataclasses.replace(DATA, seed=6))
    assert (run / "ledger.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tiny, tmp_path):
    """A learning rate of 1e38 makes the weights infinite at the second update."""
    wild = dataclasses.replace(tiny.optimizer, peak_learning_rate=1e38, warmup_steps=0)
    config = dataclasses.replace(tiny, optimizer=wild)
    with pytest.raises(RunError, match=r"step \d: loss .*not finite. Its update was not applied"):
        train(config, tmp_path / "run")
    assert [e.manifest.name for e in Series(tmp_path / "run").entries()] == ["init"]


def test_the_board_says_what_the_metrics_say(reference, tiny, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    run = tmp_path / "run"
    train(tiny, run, stop_at=5)
    train(tiny, run)
    (file,) = (run / "tensorboard").iterdir()
    raw, at, seen = file.read_bytes(), 0, {}
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        at += size + 16
        seen |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    for record in read_lines(run / "metrics.jsonl"):
        assert seen[f"{record['kind']}/loss", record["step"]] == np.float32(record["loss"])


def test_a_torn_ledger_line_does_not_spoil_the_next(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny, run, stop_at=1)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"event": "sto')
    train(tiny, run, stop_at=2)
    events = [e["event"] for e in read_lines(run / "ledger.jsonl")]
    assert events.count("resume") == 1


def test_a_kill_while_the_directory_was_claimed_is_no_obstacle(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / "config.json.part").write_text("{")
    assert train(tiny, run, stop_at=1).step == 1


FULL_DISK = """
import json, os, resource, signal, sys
sys.path.insert(0, {root!r})
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(run.main({arguments!r}))
"""


def test_a_disk_that_fills_while_saving_loses_nothing(tmp_path):
    """A file-size limit makes the write of the large tensors fail as a full disk does; the first part has no limit."""
    run = tmp_path / "run"
    arguments = ["train", "amber_tiny", "--data=synthetic", f"--run={run}", "--mesh=data=8", "--data.chunks=3"]
    arguments += ["--data.samples-per-chunk=32", "--model.num-layers=1", "--data.sequence-length=64", "--json"]

    def call(limit, *more):
        code = FULL_DISK.format(root=str(ROOT), limit=limit, arguments=[*arguments, *more])
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)

    assert call(resource.RLIM_INFINITY, "--steps=2").returncode == 0
    finished = [e.manifest.name for e in Series(run).entries()]
    failed = call(100_000)
    assert failed.returncode == 1, failed.stderr
    message = json.loads(failed.stdout)["error"]
    assert "could not be saved" in message
    assert "free some disk space and run the same command again" in message
    assert "Traceback" not in failed.stderr
    assert [e.manifest.name for e in Series(run).entries()] == finished
    again = call(resource.RLIM_INFINITY)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["step"] == 6
    assert json.loads(again.stdout)["resumed_from"] == 2
