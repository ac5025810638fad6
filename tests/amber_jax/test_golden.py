"""Amber against vectors made with the original modelling code (Hugging Face's Llama), per layer, on several meshes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from amber_jax import convert
from data.batch import Batch
from inference.forward import forward
from inference.generate import Sampling, generate
from layers import params
from layers.region import Region
from parallel.mesh import MeshConfig
from training.step import batch_sharding, make_loss_and_gradients

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-5
FLOAT32 = Region("float32")


def load(name, mesh):
    folder = GOLDEN / name
    config = convert.config_from_hf(json.loads((folder / "config.json").read_text()))
    weights = convert.from_hf(load_file(folder / "model.safetensors"), config)
    placed = jax.device_put(weights, params.shardings(config.abstract, mesh))
    return config, placed, np.load(folder / "vectors.npz")


def mesh_of(text):
    config = MeshConfig.parse(text)
    return config.build(jax.devices()[: config.size])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-e-grads", "data=1"),  # its odd sizes (MLP 151) divide no other kind of mesh
        ("llama-e-grads", "data=2"),
        ("llama-a", "data=1"),
        ("llama-a", "tensor=2"),
        ("llama-a", "tensor=4"),
        ("llama-a", "data=2,fsdp=2,tensor=2"),
    ],
)
def test_hidden_states_and_logits(name, mesh):
    mesh = mesh_of(mesh)
    config, weights, golden = load(name, mesh)
    ours = forward(config, weights, golden["input_ids"], mesh, FLOAT32, keep_layers=True)
    for layer in range(config.num_layers):
        np.testing.assert_allclose(ours["layers"][layer], golden[f"block_{layer}_out"], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(ours["final"], golden["final_norm"], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(ours["logits"], golden["logits"], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("gather", ["once", "layer"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_loss_and_gradients(gather, chunks):
    """Against torch's gradients; the row of the padding token has none, there and here."""
    mesh = mesh_of("data=1")
    config, weights, golden = load("llama-e-grads", mesh)
    ids = golden["input_ids"].astype(np.int32)[None]
    batch = Batch(ids[..., :-1], ids[..., 1:], np.ones(ids[..., 1:].shape, np.float32))
    region = Region("float32", gather=gather, loss_chunks=chunks)
    batch = jax.device_put(batch, batch_sharding(mesh))
    loss, gradients = jax.jit(make_loss_and_gradients(config, region, mesh))(weights, batch)
    np.testing.assert_allclose(loss, golden["loss"], atol=TOLERANCE, rtol=TOLERANCE)
    expected = convert.from_hf(dict(np.load(GOLDEN / "llama-e-grads" / "grads.npz")), config)
    for path, value in jax.tree_util.tree_leaves_with_path(gradients):
        want = expected
        for key in path:
            want = want[key.key]
        assert np.max(np.abs(value - want)) <= TOLERANCE * np.max(np.abs(want)), path


@pytest.mark.parametrize("mesh", ["data=1", "tensor=2", "data=2,tensor=2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(mesh, use_cache):
    """The continuation that transformers gives, with the cache and without it."""
    mesh = mesh_of(mesh)
    config, weights, golden = load("llama-a", mesh)
    length = int(golden["greedy_prompt_len"])
    prompts = golden["greedy"][:, :length].tolist()
    sampling = Sampling(max_new_tokens=golden["greedy"].shape[1] - length)
    new = generate(config, weights, prompts, mesh, FLOAT32, sampling, eos_id=-1, use_cache=use_cache)
    np.testing.assert_array_equal(new, golden["greedy"][:, length:])
