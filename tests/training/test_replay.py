"""Replay: the same bits on the same mesh, near ones on another, and whatever was tampered with is found."""

import dataclasses
import json
import shutil

import pytest

from checkpoint.series import Series
from errors import RunError, UserError
from parallel.mesh import MeshConfig
from tests.checkpoint.tampered import change_one_weight
from tests.training.test_loop import DATA, FAMILIES, on_mesh, train
from training.record import RunRecord
from training.replay import Replayer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture
def run(tiny, runs):
    """Twelve steps in three chunks: on two meshes, killed in between; optimizer state in every second checkpoint."""
    folder = runs / "run"
    if not folder.exists():
        series = dataclasses.replace(tiny.series, optimizer_every=2, rolling_every_steps=3)
        config = dataclasses.replace(tiny, series=series)
        first = on_mesh(config, "data=2,fsdp=2,tensor=2")
        train(first, folder, stop_at=6)
        shutil.copytree(folder / "rolling", folder / "before")
        train(first, folder, stop_at=7)
        shutil.rmtree(folder / "rolling")  # as if it had been killed before that was saved
        (folder / "before").rename(folder / "rolling")
        remat = dataclasses.replace(config.execution, remat="full")
        train(on_mesh(dataclasses.replace(config, execution=remat), "fsdp=8"), folder)
    return folder


def replayer(run, mesh=None):
    return Replayer(RunRecord(run, FAMILIES), DATA, mesh and MeshConfig.parse(mesh))


def one(run, selector):
    return Series(run).resolve(selector)[0]


def test_the_whole_run_is_replayed_bit_for_bit(run):
    """Over two meshes, from the ledger alone: what was trained and lost counts for nothing."""
    found = replayer(run).replay(one(run, "init"), one(run, "latest"))
    assert found.verdict == "bitwise", found
    assert (found.steps, found.losses, found.differs) == (12, 12, ())
    assert found.meshes == ("data=2,fsdp=2,tensor=2", "fsdp=8")
    assert [(c.name, c.bitwise) for c in found.checkpoints] == [("000", True), ("001", True), ("002", True)]
    assert "init -> 002: bitwise; 12 steps on data=2,fsdp=2,tensor=2 then fsdp=8" in found.lines()[0]


def test_every_link_alone_is_bitwise_from_the_nearest_optimizer_state(run):
    """Checkpoint 0 has none: the link from it begins at "init"."""
    again = replayer(run)
    links = again.sample(one(run, "init"), one(run, "latest"), 100, seed=0)
    assert [(a.manifest.name, b.manifest.name) for a, b in links] == [("init", "000"), ("000", "001"), ("001", "002")]
    found = [again.replay(*link) for link in links]
    assert [(r.start, r.end, r.verdict, r.steps) for r in found] == [
        ("init", "000", "bitwise", 4), ("init", "001", "bitwise", 8), ("001", "002", "bitwise", 4),
    ]  # fmt: skip
    assert [len(r.checkpoints) for r in found] == [1, 1, 1]
    assert len(again.sample(one(run, "init"), one(run, "latest"), 2, seed=0)) == 2
    picked = {tuple(b.manifest.index for _, b in again.sample(*links[0][:1], links[2][1], 1, s)) for s in range(20)}
    assert picked == {(0,), (1,), (2,)}, "each link may be picked"


def test_another_mesh_is_within_the_stated_tolerance(run):
    found = replayer(run, "tensor=4").replay(one(run, "init"), one(run, "latest"))
    assert found.verdict == "within tolerance", found
    assert found.differs[0] == "mesh tensor=4 instead of data=2,fsdp=2,tensor=2"
    assert 0 < found.loss <= found.tolerance[0] == 1e-5
    assert all(0 < c.parameters <= found.tolerance[1] for c in found.checkpoints)
    assert all(0 < c.optimizer <= 1e-2 for c in found.checkpoints if c.name != "000"), "of 000 it was not kept"
    assert found.learning_rate == 0
    assert not any(c.bitwise for c in found.checkpoints)
    assert found.first_difference is not None
    text = "\n".join(found.lines())
    assert "first step with other bits: step" in text
    assert "tolerance 1.0e-05" in text


@pytest.mark.parametrize("with_digests", [True, False])
@pytest.mark.parametrize("mesh", [None, "tensor=4"])
def test_a_weight_that_was_changed_is_found_though_every_file_agrees(run, tmp_path, mesh, with_digests):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    change_one_weight(one(copy, "1"), "layers.mlp.gate", 0.01, with_digests)
    found = replayer(copy, mesh).replay(one(copy, "init"), one(copy, "1"))
    assert found.verdict == "DIFFERS", found
    zero, bad = found.checkpoints
    assert bad.tensor == "layers.mlp.gate"
    assert bad.parameters == pytest.approx(0.01, rel=1e-2)
    assert bad.false_digests == (() if with_digests else ("params/layers.mlp.gate",))
    assert zero.bitwise or mesh
    if mesh is None and with_digests:  # the checkpoint after it was not made from what this one now holds
        after = replayer(copy).replay(one(copy, "1"), one(copy, "2"))
        assert (after.verdict, after.first_difference) == ("DIFFERS", 8)
        assert any("nothing that is known to change bits" in line for line in after.lines())


def test_a_loss_that_was_changed_is_found(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = [json.loads(text) for text in (copy / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record["kind"] == "train" and record["step"] == 2:
            record["loss"] *= 1 + 1e-4
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    found = replayer(copy).replay(one(copy, "init"), one(copy, "0"))
    assert (found.verdict, found.first_difference) == ("DIFFERS", 2)
    assert found.loss == pytest.approx(1e-4, rel=1e-2)
    assert all(c.bitwise for c in found.checkpoints)


def test_what_cannot_be_replayed_says_why(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(UserError, match="verify: 001 is not before 000"):
        replayer(run).replay(one(run, "1"), one(run, "0"))
    with pytest.raises(UserError, match=r"was trained on data with manifest [0-9a-f]{12}…, and this has"):
        Replayer(RunRecord(run, FAMILIES), dataclasses.replace(DATA, seed=6))
    ledger = (copy / "ledger.jsonl").read_text().splitlines(keepends=True)
    (copy / "ledger.jsonl").write_text("".join(line for line in ledger if '"event": "start"' not in line))
    with pytest.raises(RunError, match=r"ledger.jsonl: does not say how step 0 was made"):
        replayer(copy).replay(one(copy, "init"), one(copy, "0"))
    (copy / "ledger.jsonl").unlink()
    with pytest.raises(RunError, match="names no start of the run"):
        replayer(copy).replay(one(copy, "init"), one(copy, "0"))
    with pytest.raises(UserError, match="not a run that was trained here"):
        RunRecord(tmp_path, FAMILIES)
    with pytest.raises(UserError, match="16, and there are 8 cpu devices; give --simulate 16, or another --mesh"):
        replayer(run, "data=16").replay(one(run, "init"), one(run, "0"))
