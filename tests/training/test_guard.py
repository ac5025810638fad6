"""The guard: what must not be applied is not, the ledger says so, and a replay and a resumed run do the same."""

import dataclasses

import jax
import numpy as np
import pytest

from checkpoint.series import Series
from data.dataset import ChunkedData
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec
from errors import RunError, UserError
from tests.training.test_loop import DATA, FAMILIES, final_state, on_mesh, train
from training.config import GuardConfig
from training.guard import Fault, Guard
from training.metrics import read_lines
from training.record import RunRecord
from training.replay import Replayer
from training.trace import RunTracer


def guarded(tiny, **fields):
    return on_mesh(dataclasses.replace(tiny, guard=GuardConfig(**fields)), "data=2,fsdp=2")


@pytest.fixture(autouse=True)
def four_devices(monkeypatch):
    """A mesh of four of the eight devices, as a run takes all that there are."""
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: four)


def told(run, event="skip"):
    return [e for e in read_lines(run / "ledger.jsonl") if e["event"] == event]


def kinds(run):
    return {r["step"]: r["kind"] for r in read_lines(run / "metrics.jsonl") if r["kind"] != "validation"}


def replayed(run):
    series = Series(run)
    return Replayer(RunRecord(run, FAMILIES), DATA).replay(series.resolve("init")[0], series.resolve("latest")[0])


def weights_of(config, run, selector):
    entry = Series(run).resolve(selector)[0]
    return entry.manifest.digests


@pytest.mark.parametrize("fault", ["nan@5", "spike@9"])
def test_a_batch_is_skipped_and_a_replay_skips_it_too(tiny, tmp_path, fault):
    config = guarded(tiny, on_trouble="skip_batch", norm_factor=4.0, window=4)
    run, step = tmp_path / "run", int(fault[-1])
    assert train(config, run, faults=[Fault.parse(fault)]).reason == "finished"
    (skip,) = told(run)
    assert (skip["step"], skip["until"], skip["policy"]) == (step, step + 1, "skip_batch")
    assert skip["samples"] == [step * 8, step * 8 + 8]
    assert ("not finite" if "nan" in fault else "a spike over the last 4 steps") in skip["reason"]
    assert kinds(run) == {n: "skipped" if n == step else "train" for n in range(12)}
    again = replayed(run)
    assert (again.verdict, again.skipped, again.losses) == ("bitwise", 1, 11), again

    if fault != "nan@5":
        return
    other = tmp_path / "interrupted"  # before the step, and after it
    for stop in (step, step + 1):
        train(config, other, stop_at=stop, faults=[Fault.parse(fault)])
    train(config, other, faults=[Fault.parse(fault)])
    for ours, theirs in zip(final_state(config, other), final_state(config, run), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert RunRecord(other, FAMILIES).skips == RunRecord(run, FAMILIES).skips


def test_a_skipped_batch_leaves_weights_and_moments(tiny, tmp_path):
    """Step 4 is the first of chunk 1; its update is the only one between two saves of the state."""
    config = guarded(tiny, on_trouble="skip_batch")
    run = tmp_path / "run"
    train(config, run, stop_at=4)
    before = Series(run).resolve("0")[0].manifest
    train(config, run, stop_at=5, faults=[Fault("nan", 4)])
    after = Series(run).rolling().manifest
    assert after.step == 5
    assert after.digests["params"] == before.digests["params"]
    changed = {n for n, t in after.tensors.items() if t["digest"] != before.tensors[n]["digest"]}
    assert changed == {"optimizer/1.0.count", "optimizer/1.2.count"}, "time passes, nothing else"


@pytest.mark.parametrize("step", [5, 7])
def test_the_rest_of_a_chunk_is_skipped(tiny, tmp_path, step):
    """Chunks of four steps: within one, and the last of one."""
    config = guarded(tiny, on_trouble="skip_chunk")
    run, fault = tmp_path / "run", Fault("nan", step)
    assert train(config, run, faults=[fault]).reason == "finished"
    (skip,) = told(run)
    until = step // 4 * 4 + 4
    assert (skip["step"], skip["until"], skip["chunk"]) == (step, until, step // 4)
    assert [n for n, kind in kinds(run).items() if kind == "train"] == [*range(step), *range(until, 12)]
    assert [e.manifest.step for e in Series(run).entries()] == [0, 4, 8, 12], "every checkpoint is there"
    again = replayed(run)
    assert (again.verdict, again.skipped) == ("bitwise", until - step), again
    if step == 5:
        other = tmp_path / "interrupted"
        train(config, other, stop_at=7, faults=[fault])  # in what is skipped
        train(config, other)  # the fault is gone, but what the ledger says was skipped stays so
        for ours, theirs in zip(final_state(config, other), final_state(config, run), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_whole_chunk_that_is_skipped_leaves_the_weights_of_the_checkpoint_before(tiny, tmp_path):
    config = guarded(tiny, on_trouble="skip_chunk")
    train(config, tmp_path, faults=[Fault("nan", 4)])
    one, two = (Series(tmp_path).resolve(str(k))[0].manifest for k in (0, 1))
    assert one.digests["params"] == two.digests["params"]
    assert two.loss == {}


def test_to_stop_applies_nothing_of_it_and_nothing_after_it(tiny, tmp_path):
    config = guarded(tiny, on_trouble="stop")
    with pytest.raises(RunError, match=r"step 5: loss nan, .*not finite. Its update was not applied"):
        train(config, tmp_path, faults=[Fault("nan", 5)])
    (event,) = told(tmp_path, "guard")
    assert (event["step"], event["documents"], event["policy"]) == (5, [], "stop")
    assert not told(tmp_path)
    assert train(config, tmp_path).reason == "finished", "without the fault it goes on from the checkpoint before"
    assert kinds(tmp_path) == dict.fromkeys(range(12), "train")


def test_too_many_skipped_in_a_row_stop_the_run(tiny, tmp_path):
    config = guarded(tiny, on_trouble="skip_batch", most=2)
    with pytest.raises(RunError, match=r"step 7: .*not finite \(after 2 that were skipped\)"):
        train(config, tmp_path, faults=[Fault("nan", n) for n in (2, 5, 6, 7)])
    assert [e["step"] for e in told(tmp_path)] == [2, 5, 6]


def test_limits_follow_from_what_was_logged_two_steps_before(mesh_of):
    config = GuardConfig(loss_margin=0.5, norm_factor=2.0, window=3)
    guard = Guard(config, mesh_of("data=1"), [])
    seen = []
    for step in range(7):
        seen.append(np.asarray(guard.limits(step)).tolist())
        guard.applied(step, float(step), 1.0 + step)
    endless = [np.inf, np.inf]
    assert seen[:4] == [endless] * 4
    assert seen[4:] == [[1.5, 4.0], [2.5, 6.0], [3.5, 8.0]]
    later = Guard(config, mesh_of("data=1"), [(n, float(n), 1.0 + n) for n in range(6)])
    assert np.asarray(later.limits(6)).tolist() == seen[6], "a run that goes on has the limits of one that did not stop"


def test_bad_guards_and_faults_are_refused():
    for fields, message in (
        ({"on_trouble": "pray"}, "guard.on_trouble 'pray': choose stop, skip_batch or skip_chunk"),
        ({"norm_factor": 0.5}, "guard.norm_factor=0.5 must be at least 1"),
        ({"window": 0}, "guard.window=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            GuardConfig(**fields)
    for text in ("nan", "fire@3", "nan@x"):
        with pytest.raises(UserError, match=r"write nan@STEP or spike@STEP"):
            Fault.parse(text)


def test_the_ledger_names_the_documents_that_trace_names(tiny, tmp_path):
    folder, data_dir, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        (folder / f"{n}.txt").write_text(" ".join(rng.choice(["ba", "be", "bi", "bo", "bu"], size=200)))
    common = {"sequence_length": 32, "vocab_size": 270, "chunks": 2, "validation_per_source": 2, "seed": 1}
    spec = SourceSpec.parse(f"syllables={folder}")
    prepare(PrepareConfig(recipe="amber_tiny", out=data_dir, sources=(spec,), **common), log=lambda _: None)
    config = guarded(tiny, on_trouble="skip_batch")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=270))
    train(config, run, ChunkedData(data_dir), stop_at=3, faults=[Fault("nan", 1)])
    (skip,) = told(run)
    samples = RunTracer(run, FAMILIES, lambda path, _: ChunkedData(path)).step(1)
    assert skip["documents"] == list(dict.fromkeys(d["document"] for s in samples for d in s["documents"]))
    assert len(skip["documents"]) > 3
    assert all(name.startswith("syllables/") for name in skip["documents"])
