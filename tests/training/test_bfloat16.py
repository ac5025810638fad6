"""In bfloat16 every tensor's gradient is near that of float32: what sums over tokens sums in float32."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from amber_jax.recipes import amber_tiny
from crystal_jax.recipes import crystal_tiny
from data.batch import Batch
from layers.region import Region
from layers.vocabulary import Embedding
from tests.training.ways import first_state, mesh_of
from training.step import batch_sharding, make_loss_and_gradients

ROWS, LENGTH, VOCAB = 32, 256, 512

#: (mesh, microbatches, how)
WAYS = [
    ("data=1", 1, {}),
    ("fsdp=4,tensor=2", 2, {"loss_chunks": 4}),
    ("data=2,fsdp=2,tensor=2", 1, {"gather": "once", "remat": "full"}),
    ("pipeline=2,fsdp=2,tensor=2", 4, {"schedule": "1f1b"}),
]


def config_of(family):
    recipe = amber_tiny() if family == "amber" else crystal_tiny()
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "embed": 64, "num_heads": 4, "head_dim": 16}
    model = dataclasses.replace(recipe.model, context_length=LENGTH, **sizes)
    data = dataclasses.replace(recipe.data, global_batch=ROWS, sequence_length=LENGTH)
    return dataclasses.replace(recipe, model=model, data=data)


def zipf():
    """Tokens as often as words are: the commonest of 512 stands more than 1,000 times among 8,192."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCAB)
    tokens = rng.choice(np.arange(1, VOCAB), size=(ROWS, LENGTH + 1), p=shares / shares.sum()).astype(np.int32)
    assert np.bincount(tokens[:, :-1].ravel()).max() > 1000
    return tokens


def gradients(config, dtype, mesh, microbatches, how):
    mesh = mesh_of(mesh)
    execution = dataclasses.replace(config.execution, microbatches=microbatches, compute_dtype=dtype, **how)
    step = jax.jit(make_loss_and_gradients(config.model, execution.region, mesh, config.loss_over))
    tokens = zipf().reshape(microbatches, -1, LENGTH + 1)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], np.ones(tokens[..., 1:].shape, np.float32))
    found = step(first_state(config, mesh).params, jax.device_put(batch, batch_sharding(mesh)))[1]
    return {
        ".".join(k.key for k in path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(found)
    }


@functools.cache
def exact(family):
    return gradients(config_of(family), "float32", "data=1", 1, {})


@pytest.mark.parametrize(("mesh", "microbatches", "how"), WAYS, ids=str)
@pytest.mark.parametrize("family", ["amber", "crystal"])
def test_every_tensors_gradient_is_within_two_percent_of_float32s(family, mesh, microbatches, how):
    """Relative L2. Before sums over tokens were in float32: embedding 19 and 24 %, Crystal's value bias 43 %."""
    config, expected = config_of(family), exact(family)
    found = gradients(config, "bfloat16", mesh, microbatches, how)
    errors = {}
    for name, e in expected.items():
        g = found[name]
        if name in config.model.undetermined:  # in dimensions that do not rotate it is 0 but for rounding
            e, g = (x[..., : config.model.rotary_dims] for x in (e, g))
        errors[name] = np.linalg.norm(g - e) / np.linalg.norm(e)
    assert max(errors.values()) < 0.02, {k: f"{v:.2%}" for k, v in sorted(errors.items(), key=lambda x: -x[1])}


def test_mups_multiplier_is_exact():
    """14.6 in bfloat16 would be 14.625."""
    table = jax.random.normal(jax.random.key(0), (64, 32))
    plain, scaled = (
        Embedding(64, 32, lambda *_: table.astype("bfloat16"), jax.random.key(0), None, m) for m in (1.0, 14.6)
    )
    mesh, spec = mesh_of("data=1"), jax.sharding.PartitionSpec()
    tokens, region = np.arange(64)[None], Region("bfloat16")
    look = lambda e: jax.shard_map(lambda t: e(t, region), mesh=mesh, in_specs=spec, out_specs=spec)(tokens)  # noqa: E731
    x, y = (np.asarray(look(e), np.float64) for e in (plain, scaled))
    assert abs((x * y).sum() / (x * x).sum() / 14.6 - 1) < 2e-4
