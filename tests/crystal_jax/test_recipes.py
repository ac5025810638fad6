import dataclasses
import json

import jax
import numpy as np
import pytest

from crystal_jax.config import CrystalConfig
from crystal_jax.optimizer import MupAdamWConfig
from crystal_jax.recipes import MIXTURES, crystal_7b, crystal_tiny
from data.loader import SyntheticData
from errors import UserError
from layers import params
from training.config import Family, Position, RunConfig

FAMILIES = {"crystal": Family(CrystalConfig, MupAdamWConfig)}


def test_crystal_7b_has_the_published_number_of_parameters():
    """Fact sheet 11, from shapes alone: 26 GB are not allocated."""
    model = crystal_7b().model
    assert model.num_parameters == 6_575_278_720
    assert params.count(model.abstract.layers) == 32 * 201_377_108
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model.abstract))


def test_multipliers_and_initial_deviations():
    """Fact sheet 1.1 and 1.8."""
    model = crystal_7b().model
    assert model.abstract.head.multiplier == pytest.approx(0.13875)
    assert model.abstract.embedding.multiplier == 14.6
    np.testing.assert_allclose([model.kernel_std, model.output_std], [0.01825, 0.00228125], rtol=1e-9)


def test_flops_count_every_matrix_once():
    """A model small enough to count by hand: 2 layers, D=8, 2 heads of 4, F=16, V=32; the embedding is the head."""
    tiny = dataclasses.replace(
        crystal_tiny().model, vocab_size=32, num_layers=2, embed=8, num_heads=2, head_dim=4, rotary_dims=2, mlp=16
    )
    assert tiny.matmul_parameters == 2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 32


def test_initial_weights():
    """Fact sheet 1.8: normals cut off at two deviations, biases 0, norms 1."""
    config = crystal_tiny().model
    model = config.build(jax.random.key(0))
    cut = {"embedding.table": config.init_std, "wq": config.kernel_std, "down": config.output_std}
    found = {
        "embedding.table": model.embedding.table[...],
        "wq": model.layers.attention.wq[...],
        "down": model.layers.mlp.down[...],
    }
    for name, std in cut.items():
        assert 1.95 * std < np.abs(found[name]).max() <= 2.001 * std, name
        assert np.std(found[name]) == pytest.approx(0.8796 * std, rel=0.02), "the deviation of a normal cut at two"
    assert np.all(model.layers.mlp.gate_bias[...] == 0)
    assert np.all(model.layers.attention.bq[...] == 0)
    assert np.all(model.norm.scale[...] == 1)
    assert np.all(model.norm.bias[...] == 0)


def test_phases_and_tokens():
    """Fact sheet 2.3 and 11."""
    recipe = crystal_7b()
    assert recipe.data.tokens_per_step == 4_325_376
    tokens = [n * recipe.data.tokens_per_step for n in recipe.phase_steps]
    assert tokens == [344_823_300_096, 927_304_384_512, 119_934_025_728]
    assert sum(tokens) == 1_392_061_710_336
    assert [recipe.phase_of(s) for s in (0, 79_720, 79_721, 294_107, 294_108, 321_835)] == [0, 0, 1, 1, 2, 2]
    for mixture in MIXTURES:
        assert sum(weight for _, weight, _, _ in mixture) == pytest.approx(1, abs=1e-15)


def test_the_series_has_143_checkpoints():
    """The rule of `crystal_7b`, and the published names that the fact sheet lists (4.2)."""
    positions = crystal_7b().positions
    assert [p.index for p in positions] == list(range(143))
    counts = [sum(p.phase == phase for p in positions) for phase in range(3)]
    assert counts == [54, 72, 17]
    there = {(p.phase, p.phase_step) for p in positions}
    assert {(0, n) for n in (1500, 33_000, 55_500, 64_500)} < there
    assert {(1, n) for n in (18_000, 51_000, 81_000, 114_000, 144_000, 174_000, 207_000, 214_387)} < there
    assert positions[-1] == Position(142, 2, 321_836, 27_728)


@pytest.mark.parametrize(
    ("phase", "step", "rate"),
    [
        (0, 0, 0.0), (0, 1, 1.395349e-4), (0, 85, 0.01186047), (0, 86, 0.012), (0, 1500, 0.01194295),
        (0, 40_000, 0.01038955), (0, 79_720, 0.008786924),
        (1, 0, 0.0), (1, 85, 0.008680378), (1, 107_193, 0.00446140), (1, 214_386, 1.3683e-4),
        (2, 0, 0.0), (2, 138, 0.001), (2, 275, 0.00199275), (2, 276, 0.002), (2, 14_000, 0.00110013),
        (2, 27_727, 2.00066e-4),
    ],
)  # fmt: skip
def test_learning_rate(phase, step, rate):
    """Check values of fact sheet 2.3: base rate by step of the phase; each phase begins again at 0."""
    recipe = crystal_7b()
    schedule = recipe.optimizer.schedule(recipe.phase_steps)
    start = sum(recipe.phase_steps[:phase])
    np.testing.assert_allclose(schedule(start + step), rate, rtol=4e-6, atol=1e-12)


def test_a_recipe_survives_json():
    for recipe in (crystal_7b(), crystal_tiny()):
        assert RunConfig.from_dict(json.loads(json.dumps(recipe.to_dict())), FAMILIES) == recipe


def test_phases_follow_the_chunks_of_the_data():
    recipe = crystal_tiny()
    data = SyntheticData(2048, 256, chunks=12, samples_per_chunk=160, seed=0)
    resolved = recipe.resolve(data)
    assert resolved.phase_steps == (40, 60, 20)
    assert [p.step for p in resolved.positions] == list(range(10, 121, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dims": 3}, "rotary_dims=3 must be even"),
        ({"rotary_dims": 34}, "rotary_dims=34 must be even, positive and at most head_dim=32"),
        ({"mlp": 0}, "mlp=0 must be at least 1"),
        ({"width_multiplier": 0.0}, "width_multiplier=0.0 must be positive"),
    ],
)
def test_refuses_impossible_models(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(crystal_tiny().model, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"phases": r.phases[:2]}, "2 phases, but optimizer.schedules has 3"),
        (lambda r: {"phases": ()}, "a run has at least one"),
        (
            lambda r: {"phases": (dataclasses.replace(r.phases[0], chunks=5), *r.phases[1:])},
            r"phases have 5\+6\+2 chunks, and data.chunks is 12",
        ),
        (lambda r: {"phases": (dataclasses.replace(r.phases[0], chunks=None), *r.phases[1:])}, "needs steps or chunks"),
    ],
)
def test_refuses_phases_that_do_not_fit(change, message):
    recipe = crystal_tiny()
    with pytest.raises(UserError, match=message):
        dataclasses.replace(recipe, **change(recipe))


def test_steps_and_chunks_of_one_phase_are_refused():
    with pytest.raises(UserError, match=r"steps=3 and chunks=4, and one follows from the other; set --phases.N.chunks"):
        dataclasses.replace(crystal_tiny().phases[0], steps=3)


def test_a_phase_without_a_step_is_refused():
    recipe = crystal_tiny()
    phases = (*recipe.phases[:2], dataclasses.replace(recipe.phases[2], chunks=None))
    recipe = dataclasses.replace(recipe, phases=phases, data=dataclasses.replace(recipe.data, chunks=None))
    with pytest.raises(UserError, match=r"10 chunks of 1 steps leave no step for the last of crystal_tiny's phases"):
        recipe.resolve(SyntheticData(2048, 256, chunks=10, samples_per_chunk=16, seed=0))
