"""Prompts of different lengths together: left padding moves no position (the original shifts them, fact sheet 1.6)."""

import dataclasses

import jax
import pytest
from flax import nnx

from crystal_jax.recipes import crystal_tiny
from inference.generate import generate
from inference.sampling import Sampling
from layers import params
from layers.region import Region

PROMPTS = [[5, 9, 11], [7], list(range(3, 20))]


@pytest.mark.parametrize("mesh", ["data=1", "data=2,tensor=4"])
def test_company_in_a_batch_changes_nothing(mesh_of, mesh):
    mesh = mesh_of(mesh)
    model = dataclasses.replace(
        crystal_tiny().model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=4, head_dim=8,
        rotary_dims=4, mlp=43, init_std=0.5,
    )  # fmt: skip
    weights = nnx.to_pure_dict(nnx.split(model.build(jax.random.key(0)))[1])
    weights = jax.device_put(weights, params.shardings(model.abstract, mesh))

    def run(prompts, use_cache=True):
        return generate(model, weights, prompts, mesh, Region("float32"), Sampling(10), -1, use_cache)

    together = run(PROMPTS)
    assert together == [run([p])[0] for p in PROMPTS]
    assert together == run(PROMPTS, use_cache=False)
    assert len({tuple(t) for t in together}) == 3
