"""Crystal in training: its optimizer against float64, and the mesh laws with an MLP width that nothing divides."""

import dataclasses

import jax
import numpy as np
import pytest

from crystal_jax.recipes import crystal_tiny
from data.batch import Batch
from errors import UserError
from parallel.mesh import MeshConfig
from training.state import init_state
from training.step import NO_LIMITS, batch_sharding, make_loss_and_gradients, make_train_step

STEPS = 12


@pytest.fixture(scope="module")
def small():
    """crystal_tiny at a size that compiles in a second; MLP width 43, of which no degree is a divisor."""
    recipe = crystal_tiny()
    model = dataclasses.replace(
        recipe.model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=8, head_dim=4,
        rotary_dims=2, mlp=43, width_multiplier=8.0,
    )  # fmt: skip
    schedules = tuple(dataclasses.replace(s, peak=5e-3, final=1e-3, warmup_steps=1) for s in recipe.optimizer.schedules)
    return dataclasses.replace(
        recipe,
        model=model,
        data=dataclasses.replace(recipe.data, global_batch=8, sequence_length=32),
        phases=tuple(dataclasses.replace(p, chunks=None, steps=4) for p in recipe.phases),
        optimizer=dataclasses.replace(recipe.optimizer, schedules=schedules),
    )


def batches(config, mesh, masked=False):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(config.model.vocab_size, size=(1, 8, 33)).astype(np.int32)
        tokens[..., 1:] = np.where(rng.random((1, 8, 32)) < 0.1, tokens[..., 1:], (5 * tokens[..., :-1] + 3) % 64)
        weights = np.ones((1, 8, 32), np.float32)
        weights[:, ::2, 20:] = 0.0 if masked else 1.0
        yield jax.device_put(Batch(tokens[..., :-1], tokens[..., 1:], weights), batch_sharding(mesh))


def run(config, text):
    degrees = MeshConfig.parse(text)
    mesh = degrees.build(jax.devices()[: degrees.size])
    config.check_mesh(mesh.shape)
    optimizer = config.optimizer.make(config.phase_steps)
    state = init_state(config.model, optimizer, mesh, config.seed)
    schedule = config.optimizer.schedule(config.phase_steps)
    step = make_train_step(config.model, optimizer, schedule, config.execution.region, mesh, config.loss_over)
    losses = []
    for batch in batches(config, mesh, masked=True):
        state, metrics = step(state, batch, NO_LIMITS)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def one_device(small):
    return run(small, "data=1")


@pytest.mark.parametrize(
    ("mesh", "gather"),
    [
        ("tensor=8", "layer"),
        ("fsdp=2,tensor=4", "layer"),
        ("fsdp=2,tensor=4", "once"),
        ("data=4,tensor=2", "once"),
    ],
)
def test_any_mesh_equals_one_device(small, one_device, mesh, gather):
    """Contract 3, over three phases, with masked targets. Seen: 3e-7 in the losses, 1e-6 in the parameters."""
    expected, expected_weights = one_device
    losses, weights = run(
        dataclasses.replace(small, execution=dataclasses.replace(small.execution, gather=gather)), mesh
    )
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # The bias of keys in dimensions that do not rotate adds the same to every score of a query, which the softmax
    # takes out again: its gradient is 0 but for rounding, and Adam makes steps of full size of that.
    for tree in (weights, expected_weights):
        tree["layers"]["attention"]["bk"] = tree["layers"]["attention"]["bk"][..., :2]
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), weights, expected_weights)
    assert max(jax.tree.leaves(differences)) < 1e-4, differences
    assert weights["layers"]["mlp"]["gate"].shape == (2, 32, 43), "the padding is nowhere but in the layer"


def test_bfloat16_on_a_mesh_stays_near_one_device(small):
    small = dataclasses.replace(small, execution=dataclasses.replace(small.execution, compute_dtype="bfloat16"))
    np.testing.assert_allclose(run(small, "fsdp=2,tensor=4")[0], run(small, "data=1")[0], rtol=5e-3)


def test_a_width_that_cannot_be_spread_is_refused(small):
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, embed=36))
    with pytest.raises(UserError, match=r"fsdp\*tensor = 8 does not divide the 'spread_embed' dimension \(36\)"):
        small.check_mesh({"pipeline": 1, "data": 1, "fsdp": 1, "tensor": 8})


@pytest.mark.parametrize("mesh", ["data=1", "tensor=4"])
def test_updates_equal_a_float64_optimizer(small, mesh):
    """Fact sheet 2.2 by its formula, over three phases of four steps: muP groups, decay groups, eps, restarts, clip."""
    degrees = MeshConfig.parse(mesh)
    mesh = degrees.build(jax.devices()[: degrees.size])
    config, region = small, small.execution.region
    optimizer = config.optimizer.make(config.phase_steps)
    state = init_state(config.model, optimizer, mesh, 0)
    schedule = config.optimizer.schedule(config.phase_steps)
    gradients_of = jax.jit(make_loss_and_gradients(config.model, region, mesh, config.loss_over))
    step = make_train_step(config.model, optimizer, schedule, region, mesh, config.loss_over)
    moments, clipped = {}, 0
    for n, batch in enumerate(batches(config, mesh)):
        before = flat(state.params)
        gradients = flat(gradients_of(state.params, batch)[1])
        state, _ = step(state, batch, NO_LIMITS)
        after = flat(state.params)
        t = n % 4 + 1
        rate = 5e-3 * (t - 1) if t <= 2 else 5e-3 + (1e-3 - 5e-3) * (t - 2) / 3
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        clipped += norm > 1
        for name, p in before.items():
            kernel = name.split(".")[-1] in ("wq", "wk", "wv", "wo", "gate", "up", "down")
            m, v = moments.get(name, (0.0, 0.0)) if t > 1 else (0.0, 0.0)
            g = gradients[name] / max(1.0, norm)
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            update = m / (np.sqrt(v) + 1e-9) * np.sqrt(1 - 0.95**t) / (1 - 0.9**t)
            update += 0.1 * p if kernel or name == "embedding.table" else 0.0
            want = p - rate * (2.0 if kernel else 1.0) * update
            np.testing.assert_allclose(after[name], want, atol=1e-6, rtol=1e-6, err_msg=f"{name} at step {n}")
            if t == 1:
                np.testing.assert_array_equal(after[name], p)  # the first rate of a phase is exactly 0
    assert clipped > 2
    assert {"layers.attention.wq", "layers.mlp.up_bias", "norm.scale", "embedding.table"} < set(moments)


def flat(tree):
    return {
        ".".join(k.key for k in path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
