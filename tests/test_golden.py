"""Both models against vectors made with the original modelling code, per layer, on several meshes.

The sets are described in the project's golden vectors: `llama-*` come from Hugging Face's Llama, `crystal-*` from
CrystalCoder's published classes. Every parameter is random, biases and norms too.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from amber_jax.convert import FORMAT as AMBER
from crystal_jax.convert import FORMAT as CRYSTAL
from data.batch import Batch
from huggingface.folder import Folder
from inference.forward import forward
from inference.generate import generate
from inference.sampling import Sampling
from layers import params
from layers.region import Region
from training.step import batch_sharding, make_loss_and_gradients

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
FLOAT32 = Region("float32")


@functools.cache
def read(name):
    """Format, config, parameters in memory, vectors."""
    form = AMBER if name.startswith("llama") else CRYSTAL
    folder = Folder(GOLDEN / name)
    config = form.config_from_hf(folder.config)
    weights = form.collect(config, {tensor: folder.read(tensor) for tensor in folder.tensors})
    return form, config, weights, np.load(GOLDEN / name / "vectors.npz")


def load(name, mesh):
    _, config, weights, golden = read(name)
    return config, jax.device_put(weights, params.shardings(config.abstract, mesh)), golden


def test_all_sets_are_there():
    assert len(SETS) == 9


@pytest.mark.parametrize("mesh", ["data=1", "tensor=2", "tensor=4", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", SETS)
def test_hidden_states_logits_and_loss(mesh_of, name, mesh):
    """MLP widths 131, 151 and 170 are divided by neither 2 nor 4, or by 2 alone: padded inside the layer."""
    mesh = mesh_of(mesh)
    config, weights, golden = load(name, mesh)
    ours = forward(config, weights, golden["input_ids"], mesh, FLOAT32, keep_layers=True)
    assert ours["logits"].shape == (*golden["input_ids"].shape, config.vocab_size)
    for layer in range(config.num_layers):
        np.testing.assert_allclose(ours["layers"][layer], golden[f"block_{layer}_out"], **TOLERANCE)
    np.testing.assert_allclose(ours["final"], golden["final_norm"], **TOLERANCE)
    np.testing.assert_allclose(ours["logits"], golden["logits"], **TOLERANCE)
    logits = ours["logits"].astype(np.float64)[:, :-1]
    loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, golden["input_ids"][:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(loss.mean(), golden["loss"], **TOLERANCE)


@pytest.mark.parametrize(
    ("mesh", "gather", "chunks"),
    [
        ("data=1", "layer", 1),
        ("data=1", "once", 3),
        ("tensor=4", "layer", 1),
        ("tensor=4", "once", 1),
        ("fsdp=2,tensor=4", "layer", 1),
    ],
)
@pytest.mark.parametrize("name", ["llama-e-grads", "crystal-d-grads"])
def test_loss_and_gradients(mesh_of, name, mesh, gather, chunks):
    """Against torch's gradients; the row of Llama's padding token has none, there and here."""
    mesh = mesh_of(mesh)
    form, _, _, _ = read(name)
    config, weights, golden = load(name, mesh)
    ids = golden["input_ids"].astype(np.int32)[None]
    targets = np.roll(ids, -1, axis=-1)  # the last target is no token's next: it has weight 0
    batch = Batch(ids, targets, (np.arange(ids.shape[-1]) < ids.shape[-1] - 1) * np.ones(ids.shape, np.float32))
    region = Region("float32", gather=gather, loss_chunks=4 if chunks > 1 else 1)
    batch = jax.device_put(batch, batch_sharding(mesh))
    loss, gradients = jax.jit(make_loss_and_gradients(config, region, mesh))(weights, batch)
    np.testing.assert_allclose(loss, golden["loss"], **TOLERANCE)
    expected = form.collect(config, dict(np.load(GOLDEN / name / "grads.npz")))
    for path, value in jax.tree_util.tree_leaves_with_path(gradients):
        want = expected
        for key in path:
            want = want[key.key]
        assert np.max(np.abs(value - want)) <= 1e-5 * np.max(np.abs(want)), path


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*((name, "data=1") for name in SETS), ("llama-a", "tensor=2"), ("crystal-b-old-export", "data=2,tensor=4")],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(mesh_of, name, mesh, use_cache):
    """The continuation that the original code gives, with the cache and without it."""
    mesh = mesh_of(mesh)
    config, weights, golden = load(name, mesh)
    length = int(golden["greedy_prompt_len"])
    prompts = golden["greedy"][:, :length].tolist()
    sampling = Sampling(max_new_tokens=golden["greedy"].shape[1] - length)
    new = generate(config, weights, prompts, mesh, FLOAT32, sampling, eos_id=-1, use_cache=use_cache)
    np.testing.assert_array_equal(new, golden["greedy"][:, length:])
