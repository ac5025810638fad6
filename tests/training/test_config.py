import dataclasses
import json

import pytest

from amber_jax.config import AmberConfig
from amber_jax.recipes import amber_7b
from data.dataset import SyntheticData
from data.mixture import Part
from data.sample import PhaseSamples
from errors import UserError
from parallel.mesh import MeshConfig
from training.config import Family, PhaseConfig, RunConfig
from training.optimizer import AdamWConfig

FAMILIES = {"amber": Family(AmberConfig, AdamWConfig)}


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_execution(config, **changes):
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: with_data(c, global_batch=0), "data.global_batch=0 must be at least 1"),
        (lambda c: dataclasses.replace(c, seed=2**32), r"seed=4294967296 must be at least 0 and below"),
        (
            lambda c: dataclasses.replace(c.optimizer, peak_learning_rate=float("nan")),
            "nan must be at least 0, and finite",
        ),
        (lambda c: with_data(c, layout="rows"), "data.layout 'rows': choose chunks or mixture"),
        (lambda c: with_data(c, overlap=33), "overlap=33 leaves no step from one window of 32"),
        (lambda c: with_data(c, overlap=-1), "data.overlap=-1 must be at least 0"),
        (lambda c: with_data(c, file_samples=0), "data.file_samples=0 must be at least 1"),
        (lambda c: with_data(c, validation_every=0), "data.validation_every=0 must be at least 1"),
        (
            lambda c: with_data(c, layout="mixture", chunks=3),
            "data.chunks=3: of a mixture each phase has its own",
        ),
        (lambda c: with_data(c, samples_per_chunk=4), "global_batch=8 is larger than a chunk of 4 samples"),
        (lambda c: with_data(c, sequence_length=64), "longer than the model's context of 32"),
        (lambda c: with_execution(c, microbatches=5), "microbatches=5 cut a batch of 8 rows"),
        (lambda c: with_execution(c, loss_chunks=5), "loss_chunks=5 does not divide data.sequence_length=32"),
        (lambda c: with_execution(c, loss_chunks=0), "loss_chunks 0: must be at least 1"),
        (lambda c: with_execution(c, remat="some"), "remat 'some': choose from none, dots, full"),
        (lambda c: with_execution(c, gather="twice"), "gather 'twice': choose from once, tick, layer"),
        (lambda c: with_execution(c, schedule="2f2b"), "schedule '2f2b': choose from gpipe, 1f1b"),
        (lambda c: with_execution(c, repeats=0), "repeats 0: must be at least 1"),
        (lambda c: with_execution(c, unroll=0), "unroll 0: must be at least 1"),
        (
            lambda c: with_execution(c, repeats=2, schedule="1f1b"),
            "repeats 2: is for the schedule gpipe, not '1f1b'",
        ),
        (lambda c: with_data(c, document_end=64), "data.document_end=64 is no token of a vocabulary of 64"),
        (lambda c: with_execution(c, compute_dtype="float64"), "compute_dtype 'float64'"),
        (lambda c: dataclasses.replace(c.optimizer, beta2=1.0), r"optimizer.beta2=1.0 must be in \[0, 1\)"),
        (lambda c: dataclasses.replace(c.optimizer, clip_norm=0.0), "optimizer.clip_norm=0.0 must be positive"),
        (lambda c: dataclasses.replace(c.series, rolling_every_steps=0), "rolling_every_steps=0 must be at least 1"),
        (
            lambda c: dataclasses.replace(c.series, rolling_every_minutes=0.0),
            "rolling_every_minutes=0.0 must be positive",
        ),
        (
            lambda c: dataclasses.replace(c.series, rolling_every_steps=None),
            "neither rolling_every_steps nor rolling_e",
        ),
        (lambda c: dataclasses.replace(c.series, early_base=1), "series.early_base=1 must be at least 2"),
        (lambda c: dataclasses.replace(c.series, optimizer_every=0), "series.optimizer_every=0 must be at least 1"),
        (lambda c: dataclasses.replace(c.series, name="{epoch}"), "is no format of a position"),
        (lambda c: dataclasses.replace(c.series, name="one"), "must give every checkpoint its own name"),
        (lambda c: dataclasses.replace(c.series, name="a/{index}"), "must give every checkpoint its own name"),
        (lambda c: dataclasses.replace(c.series, name="{step}"), "could be taken for an index"),
    ],
)
def test_refuses_impossible_configs(tiny, change, message):
    with pytest.raises(UserError, match=message):
        change(tiny)


def synthetic(**changes):
    values = {"vocab_size": 64, "sequence_length": 32, "chunks": 3, "samples_per_chunk": 80, "seed": 0}
    return SyntheticData.of_chunks(**{**values, **changes})


def test_resolves_what_the_recipe_leaves_open(tiny):
    resolved = tiny.resolve(synthetic())
    assert resolved.total_steps == 3 * 10
    assert (resolved.data.chunks, resolved.data.samples_per_chunk) == (3, 80)


def test_two_checkpoints_of_one_name_are_refused(tiny):
    phases = (PhaseConfig(steps=10, series_every_steps=5), PhaseConfig(series_every_steps=5))
    series = dataclasses.replace(tiny.series, name="after-{phase_step}")
    optimizer = tiny.optimizer
    config = dataclasses.replace(tiny, phases=phases, series=series, optimizer=optimizer)
    with pytest.raises(UserError, match="gives two checkpoints of the run the name 'after-5'; put the phase or"):
        config.resolve(synthetic())


def test_synthetic_data_of_a_recipe_fits_it(tiny):
    assert tiny.resolve(tiny.synthetic(7)).phase_steps == (7,)
    assert with_data(tiny, chunks=3).resolve(with_data(tiny, chunks=3).synthetic(7)).phase_steps == (21,)
    data = amber_7b().synthetic()
    assert amber_7b().resolve(data).phase_steps == (274_320,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocab_size": 65}, "vocabulary has 65 entries, amber_tiny's model 64.*--model.vocab-size 65"),
        ({"sequence_length": 16}, "sequences of 16 tokens and amber_tiny reads 32.*--data.sequence-length 16"),
        ({"chunks": 5}, "chunks is 5 and amber_tiny says 3.*--data.chunks 5"),
        ({"samples_per_chunk": 4}, "global_batch=8 is larger than a chunk of 4 samples"),
    ],
)
def test_refuses_data_of_another_recipe(tiny, data, message):
    with pytest.raises(UserError, match=message):
        with_data(tiny, chunks=3).resolve(synthetic(**data))


def test_data_of_mixtures_is_refused_where_chunks_are_read(tiny):
    data = SyntheticData(64, 32, (PhaseSamples(0, 80, 40, carry=True),), seed=0)
    with pytest.raises(
        UserError, match=r'in the layout "mixture" and amber_tiny reads "chunks".*--data.layout mixture'
    ):
        tiny.resolve(data)
    several = SyntheticData(64, 32, (PhaseSamples(0, 80, 40, carry=False), PhaseSamples(2, 80, 40, carry=False)), 0)
    with pytest.raises(UserError, match="number of phases is 2 and amber_tiny reads 1"):
        tiny.resolve(several)


def test_a_run_may_move_to_another_mesh_but_not_to_another_recipe(tiny, tmp_path):
    moved = dataclasses.replace(with_execution(tiny, remat="full", microbatches=2), mesh=MeshConfig(tensor=8))
    moved = with_data(moved, validation_every=3, workers=1)
    assert moved.sha256 == tiny.sha256
    moved.check_same_run(tiny, tmp_path)
    other = dataclasses.replace(tiny, phases=(PhaseConfig(mixture=(Part("a", 1.0), Part("b", 2.0))),))
    with pytest.raises(UserError, match=r"phases.0.mixture.1.weight: the run has 3.0, asked for 2.0\ngive"):
        other.check_same_run(
            dataclasses.replace(other, phases=(PhaseConfig(mixture=(Part("a", 1.0), Part("b", 3.0))),)), tmp_path
        )
    changed = dataclasses.replace(tiny, seed=2, optimizer=dataclasses.replace(tiny.optimizer, weight_decay=0.5))
    assert changed.sha256 != tiny.sha256
    with pytest.raises(
        UserError, match=r"(?s)optimizer.weight_decay: the run has 0.1, asked for 0.5.*seed: the run has"
    ):
        changed.check_same_run(tiny, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "family"), "gpt", "model family 'gpt' is unknown; known: amber"),
        (("seed",), "one", "config.seed is 'one'"),
        (("optimizer", "beta1"), None, "optimizer.beta1 is None"),
        (("execution", "remat"), "some", "execution.remat is 'some'"),
        (("mesh", "colour"), 1, r"config.mesh has unknown fields \['colour'\]; if newer code wrote it, update this"),
        (("data",), 3, "config.data is int, expected fields"),
        (("phases",), 5, "config.phases is 5"),
        (("phases",), [5], "config.phases.0 is int, expected fields"),
        (("phases", 0, "mixture"), [["x", 1.0]], "config.phases.0.mixture.0 is list, expected"),
        (("phases", 0, "mixture", 3, "half"), "some", "config.phases.0.mixture.3.half is 'some'"),
        (("data", "bos_sources"), ["a", 3], r"config.data.bos_sources is \['a', 3\]"),
        (("model",), 3, "not a mapping of fields with a model in it"),
    ],
)
def test_a_damaged_file_is_named_by_field(path, value, message):
    plain = json.loads(json.dumps(amber_7b().to_dict()))
    node = plain
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message):
        RunConfig.from_dict(plain, FAMILIES)
