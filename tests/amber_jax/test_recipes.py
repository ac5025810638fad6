import dataclasses
import json

import jax
import numpy as np
import pytest

from amber_jax.config import AmberConfig
from amber_jax.recipes import amber_7b, amber_tiny
from errors import UserError
from layers import params
from training.config import Family
from training.optimizer import AdamWConfig


def test_amber_7b_has_the_published_number_of_parameters():
    """Fact sheet 11, from shapes alone: 27 GB are not allocated."""
    model = amber_7b().model
    assert model.num_parameters == 6_738_415_616
    assert params.count(model.abstract.layers) == 32 * 202_383_360
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model.abstract))


def test_amber_7b_arithmetic():
    """Fact sheet 2.1 and 3.1."""
    data = amber_7b().data
    assert data.steps_per_chunk == 762
    assert data.samples_per_chunk - 762 * data.global_batch == 96
    assert amber_7b().total_steps == 274_320
    assert data.steps_per_chunk * data.tokens_per_step == 3_495_690_240
    assert amber_7b().total_steps * data.tokens_per_step == 1_258_448_486_400


def test_amber_7b_keeps_a_checkpoint_after_each_chunk():
    """Fact sheet 3.1: 360. Our validation reads few of the samples held out, and so costs little beside a chunk."""
    recipe = amber_7b()
    assert [p.step for p in recipe.positions] == list(range(762, 274_321, 762))
    assert len(recipe.positions) == 360
    assert recipe.data.validation_per_source == 102_400
    assert -(-recipe.data.validation_per_source // recipe.data.validation_every) <= recipe.data.global_batch
    assert amber_tiny().data.validation_every == 1


def test_amber_7b_is_laid_out_as_published():
    """Fact sheet 3.1 and 3.3: the sources in the order of the chunks, the billions of tokens of the card."""
    recipe = amber_7b()
    (phase,) = recipe.phases
    assert (recipe.data.layout, recipe.data.overlap, recipe.data.bos_sources) == ("chunks", 0, ())
    names = ["arxiv", "book", "c4", "refinedweb", "stackexchange", "starcoderdata", "wikipedia"]
    assert [part.name for part in phase.mixture] == names
    total = sum(part.weight for part in phase.mixture)
    assert total == pytest.approx(1259.11)
    shares = [round(100 * part.weight / total, 2) for part in phase.mixture]
    assert shares == [2.38, 2.29, 15.70, 52.82, 1.73, 23.18, 1.90]


def test_flops_count_every_matrix_once():
    """A model small enough to count by hand: 2 layers, D=8, 2 heads of 4, F=16, V=32, S=4."""
    model = AmberConfig(
        vocab_size=32, context_length=4, num_layers=2, embed=8, num_heads=2, head_dim=4, mlp=16,
        norm_eps=1e-6, rope_base=1e4, init_std=0.02, padding_id=None,
    )  # fmt: skip
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 32
    assert model.matmul_parameters == matrices
    assert model.train_flops_per_token(4, causal=False) == 6 * matrices + 12 * 2 * 8 * 4
    assert model.train_flops_per_token(4, causal=True) == 6 * matrices + 6 * 2 * 8 * 4


def test_initial_weights():
    """Fact sheet 1.4: normal(0, 0.02) without scaling by depth, norms 1, the padding row 0."""
    recipe = amber_tiny()
    model = recipe.model.build(jax.random.key(0))
    for weight in (model.embedding.table[1:], model.layers.attention.wo[...], model.layers.mlp.down[...]):
        assert abs(float(np.std(weight)) - 0.02) < 2e-4
        assert abs(float(np.mean(weight))) < 2e-4
    assert np.all(model.embedding.table[0] == 0)
    assert np.all(model.norm.scale[...] == 1)
    assert not np.array_equal(model.layers.mlp.up[0], model.layers.mlp.up[1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers=0 must be at least 1"),
        ("head_dim", 3, "head_dim=3 must be even"),
        ("init_std", 0.0, "init_std=0.0 must be positive"),
        ("padding_id", 5000, "padding_id=5000 is outside the vocabulary of 2048"),
    ],
)
def test_refuses_impossible_models(field, value, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(amber_tiny().model, **{field: value})


def test_a_recipe_survives_json():
    for recipe in (amber_7b(), amber_tiny()):
        text = json.dumps(recipe.to_dict())
        assert type(recipe).from_dict(json.loads(text), {"amber": Family(AmberConfig, AdamWConfig)}) == recipe
