"""Which checkpoints a run keeps, under which names, with what in them: data of the recipe."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from amber_jax.recipes import amber_7b, amber_360
from checkpoint.series import Series
from checkpoint.tensors import Tensors
from crystal_jax.recipes import crystal_7b, crystal_143
from tests.training.test_loop import final_state, losses, train
from training.metrics import read_lines


@pytest.mark.parametrize(
    ("recipe", "counts", "names"),
    [
        (amber_7b, [360], ["000", "001", "359"]),
        (amber_360, [360], ["000", "001", "359"]),
        (
            crystal_7b,
            [54, 72, 17],
            ["phase1_checkpoint_001500", "phase1_checkpoint_003000", "phase3_checkpoint_027728"],
        ),
        (
            crystal_143,
            [54, 72, 17],
            ["phase1_checkpoint_000002", "phase1_checkpoint_000004", "phase3_checkpoint_000033"],
        ),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_series_of_the_recipes(recipe, counts, names):
    config = recipe()
    config = config.resolve(config.synthetic())
    phases = [p.phase for p in config.positions]
    assert [phases.count(n) for n in range(len(counts))] == counts
    found = [config.series.name_of(p) for p in config.positions]
    assert len(set(found)) == len(found)
    assert [found[k].removeprefix("CrystalCoder_") for k in (0, 1, -1)] == names


def test_published_names_are_in_crystals_series():
    """Those that the fact sheet has seen (4.2)."""
    config = crystal_7b()
    ours = {config.series.name_of(p) for p in config.positions}
    seen = {1: (1500, 33000, 55500, 64500), 2: (18000, 214387), 3: (27728,)}
    assert {f"CrystalCoder_phase{p}_checkpoint_{n:06d}" for p, steps in seen.items() for n in steps} <= ours


@pytest.fixture
def rich(tiny):
    """Twelve steps in three chunks, with all that can be kept."""
    series = dataclasses.replace(
        tiny.series,
        rolling_every_steps=None,
        rolling_every_minutes=1e-9,
        optimizer_every=2,
        early_base=2,
        bfloat16_copy=True,
        name="after-{step:04d}",
    )
    return dataclasses.replace(tiny, series=series)


def test_all_that_can_be_kept(rich, tiny, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert train(rich, run).reason == "finished"
    train(tiny, plain)
    series = Series(run)
    entries = series.entries()
    assert [(e.manifest.name, e.has("optimizer")) for e in entries] == [
        ("init", True), ("after-0004", False), ("after-0008", True), ("after-0012", True),
    ]  # fmt: skip
    assert [(e.manifest.name, e.has("optimizer")) for e in series.early()] == [("00000001", False), ("00000002", False)]
    assert series.rolling() is None, "a newer one of the series has all of it"
    saved = [(e["kind"], e["step"]) for e in read_lines(run / "ledger.jsonl") if e["event"] == "save"]
    order = [step for kind, step in saved if kind == "rolling"]
    assert order == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11], "time was up after every step"
    for kind, step in (("early", 1), ("early", 2), ("series", 4)):  # first what can be resumed from
        assert saved.index(("rolling", step)) + 1 == saved.index((kind, step))

    for ours, theirs in zip(entries, Series(plain).entries(), strict=True):
        assert ours.manifest.digests["params"] == theirs.manifest.digests["params"], "what is kept changes nothing"
        weights = Tensors(ours)
        for name, copy in Tensors(ours, "params_bfloat16").items():
            np.testing.assert_array_equal(copy[...], weights[name][...].astype(jnp.bfloat16))
    sizes = {n: f["bytes"] for n, f in entries[1].manifest.files.items() if "/c/" in n}
    whole = sum(size for n, size in sizes.items() if n.startswith("params/"))
    assert sum(size for n, size in sizes.items() if n.startswith("params_bfloat16/")) < 0.55 * whole
    assert series.resolve("after-0008") == series.resolve("1") == series.resolve("step=8")
    assert series.resolve("step=2")[0].manifest.kind == "early"


def test_a_kill_between_what_can_be_resumed_from_and_what_is_kept(rich, tmp_path):
    """The checkpoint that is kept without optimizer state is made up for: the run never comes to it a second time."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(rich, whole)
    train(rich, run, stop_at=4)
    assert Series(run).rolling().manifest.step == 4
    shutil.rmtree(run / "series" / "after-0004")
    train(rich, run)
    names = [e.manifest.name for e in Series(run).entries()]
    assert names == ["init", "after-0004", "after-0008", "after-0012"]
    assert losses(run) == losses(whole)
    for ours, theirs in zip(final_state(rich, run), final_state(rich, whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (Series(folder).resolve("after-0004")[0].manifest for folder in (run, whole))
    assert ours.digests == theirs.digests
