import dataclasses
import json

import jax
import numpy as np
import pytest

from crystal_jax.config import CrystalConfig
from crystal_jax.optimizer import MupAdamWConfig
from crystal_jax.recipes import MIXTURES, crystal_7b, crystal_tiny
from data.dataset import SyntheticData
from data.sample import PhaseSamples
from errors import UserError
from layers import params
from training.config import Family, PhaseConfig, Position, RunConfig

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


def test_mixtures():
    """Fact sheet 3.4 to 3.7."""
    recipe = crystal_7b()
    data = recipe.data
    assert (data.layout, data.overlap, data.file_samples) == ("mixture", 1, 50_000)
    assert data.bos_sources == ("StarCoder", "css", "javascript", "html", "python")
    assert tuple(p.mixture for p in recipe.phases) == MIXTURES
    for mixture in MIXTURES:
        assert sum(part.weight for part in mixture) == pytest.approx(1, abs=1e-15)
        assert all(part.shuffle for part in mixture)
    first, second, third = ({part.name: part for part in mixture} for mixture in MIXTURES)
    integers = [11610149, 11089655, 71538312, 143199072, 13321345, 8504126, 9172771]
    assert [round(part.weight * 268_435_430) for part in first.values()] == integers
    assert {(part.half, part.fim_rate) for part in first.values()} == {("even", 0.0)}
    coder = second.pop("StarCoder_fim_shuffled")
    assert (coder.reads, coder.half, coder.epochs, coder.fim_rate) == ("StarCoder", "all", 2, 0.9)
    assert list(second) == list(first)
    assert {(part.half, part.fim_rate) for part in second.values()} == {("odd", 0.0)}
    for name in ("css", "javascript", "html", "python"):
        part = third.pop(name)
        assert (part.epochs, part.fim_rate, part.start, part.stop) == (3, 0.3, 0.0, 1.0)
    coder = third.pop("StarCoder_fim_train_shuffled")
    assert (coder.reads, coder.epochs, coder.fim_rate, coder.stop) == ("StarCoder", 2, 0.9, 0.1)
    assert set(third) == set(first) - {"Github"}
    assert {(part.half, part.epochs, part.start, part.stop) for part in third.values()} == {("all", 1, 0.0, 0.1)}


def test_the_small_recipe_has_the_same_kinds_of_parts():
    recipe = crystal_tiny()
    assert (recipe.data.layout, recipe.data.overlap, recipe.data.bos_sources) == ("mixture", 1, ("code",))
    assert [p.chunks for p in recipe.phases] == [4, 6, 2]
    assert {part.reads for p in recipe.phases for part in p.mixture} == {"prose", "docs", "code"}
    assert [[(part.half, part.fim_rate, part.epochs, part.stop) for part in p.mixture] for p in recipe.phases] == [
        [("even", 0.0, 1, 1.0)] * 2,
        [("odd", 0.0, 1, 1.0)] * 2 + [("all", 0.9, 2, 1.0)],
        [("all", 0.3, 3, 1.0), ("all", 0.0, 1, 0.1)],
    ]


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


def mixed(*sizes, samples_per_chunk=160):
    """Data of one phase for each number of samples."""
    phases = []
    for samples in sizes:
        phases.append(PhaseSamples(sum(p.chunks for p in phases), samples, samples_per_chunk, carry=True))
    return SyntheticData(2048, 256, tuple(phases), seed=0)


def test_each_phase_has_the_steps_of_its_data():
    recipe, data = crystal_tiny(), mixed(650, 900, 327)
    resolved = recipe.resolve(data)
    assert resolved.phase_steps == (40, 56, 20)
    assert [(p.steps, p.chunks, p.series_every_steps) for p in resolved.phases] == [
        (40, None, 10), (56, None, 10), (20, None, 10),
    ]  # fmt: skip
    assert [p.step for p in resolved.positions] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 96, 106, 116]
    assert resolved.resolve(data) == resolved
    assert RunConfig.from_dict(json.loads(json.dumps(resolved.to_dict())), FAMILIES) == resolved
    with pytest.raises(ValueError, match="steps of a phase are not known before"):
        _ = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, samples_per_chunk=160)).positions
    phases = tuple(PhaseConfig(n, mixture=p.mixture) for n, p in zip((7, None, 20), recipe.phases))
    shorter = dataclasses.replace(recipe, phases=phases).resolve(data)
    assert [(p.steps, p.series_every_steps) for p in shorter.phases] == [(7, 7), (56, 56), (20, 20)]
    assert [p.step for p in shorter.positions] == [7, 63, 83], "without chunks, only the last step of each phase"


def test_a_short_phase_has_fewer_checkpoints_than_chunks():
    """`PhaseConfig.series_every_steps`: 9 steps in 6 chunks, one after every 2; 3 steps in 4, one after each."""
    resolved = crystal_tiny().resolve(mixed(3 * 16, 9 * 16, 4 * 16))
    assert [p.series_every_steps for p in resolved.phases] == [1, 2, 2]
    assert [p.phase_step for p in resolved.positions] == [1, 2, 3, 2, 4, 6, 8, 9, 2, 4]


@pytest.mark.parametrize(
    ("steps", "data", "message"),
    [
        ((None, 57, None), mixed(650, 900, 327), "phase 1 has 56 steps of 16 samples, and the run's 57"),
        ((None, None, None), mixed(650, 15, 327), "phase 1 has 15 samples, fewer than one global batch of 16"),
        ((None, None, None), mixed(650, 900), "number of phases is 2 and crystal_tiny reads 3"),
        ((1, 1, 1), mixed(650), "number of phases is 1 and crystal_tiny reads 3"),
        (
            (None, None, None),
            SyntheticData.of_chunks(vocab_size=2048, sequence_length=256, chunks=3, samples_per_chunk=16, seed=0),
            'in the layout "chunks" and crystal_tiny reads "mixture"; .*--data.layout chunks',
        ),
    ],
)
def test_refuses_data_that_does_not_fit(steps, data, message):
    recipe = crystal_tiny()
    phases = tuple(PhaseConfig(n, mixture=p.mixture) for n, p in zip(steps, recipe.phases))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(recipe, phases=phases).resolve(data)


def in_chunks(recipe, chunks=None):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, layout="chunks", chunks=chunks))


def test_phases_may_divide_the_chunks_of_one_phase_of_data():
    data = SyntheticData.of_chunks(vocab_size=2048, sequence_length=256, chunks=12, samples_per_chunk=160, seed=0)
    resolved = in_chunks(crystal_tiny()).resolve(data)
    assert resolved.phase_steps == (40, 60, 20)
    assert [p.step for p in resolved.positions] == list(range(10, 121, 10))


def test_synthetic_data_of_a_recipe_fits_it():
    for recipe, steps in (
        (crystal_7b(), (79_721, 214_387, 27_728)),
        (crystal_tiny(), (28, 42, 14)),
        (in_chunks(crystal_tiny()), (28, 42, 14)),
    ):
        assert recipe.resolve(recipe.synthetic(7)).phase_steps == steps


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
            lambda r: {"phases": (dataclasses.replace(r.phases[0], mixture=()), *r.phases[1:])},
            'data.layout is "mixture" and a phase has none',
        ),
        (
            lambda r: {"data": dataclasses.replace(r.data, bos_sources=("code", "poems"))},
            "data.bos_sources: no mixture reads poems",
        ),
        (lambda r: {"data": in_chunks(r, 13).data}, r"phases have 4\+6\+2 chunks, and data.chunks is 13"),
        (
            lambda r: {
                "data": in_chunks(r).data,
                "phases": (dataclasses.replace(r.phases[0], chunks=None), *r.phases[1:]),
            },
            "needs steps or chunks",
        ),
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
    recipe = in_chunks(crystal_tiny())
    recipe = dataclasses.replace(
        recipe, phases=(*recipe.phases[:2], dataclasses.replace(recipe.phases[2], chunks=None))
    )
    data = SyntheticData.of_chunks(vocab_size=2048, sequence_length=256, chunks=10, samples_per_chunk=16, seed=0)
    with pytest.raises(UserError, match=r"10 chunks of 1 steps leave no step for the last of crystal_tiny's phases"):
        recipe.resolve(data)
