import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from amber_jax.recipes import amber_7b
from training.optimizer import AdamWConfig


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1000, 1.5e-4),
        (1999, 2.9985e-4),
        (2000, 3e-4),
        (68_580, 2.620969e-4),
        (138_160, 1.65e-4),
        (205_740, 7.009280e-5),
        (274_319, 3.0000000009e-5),
        (300_000, 3e-5),
    ],
)
def test_learning_rate_of_amber(step, rate):
    """Check values of fact sheet 2.1."""
    recipe = amber_7b()
    ours = recipe.optimizer.schedule(recipe.phase_steps)(step)
    np.testing.assert_allclose(ours, rate, rtol=5e-6, atol=0)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    config = AdamWConfig(0.9, 0.95, 1e-8, 0.1, 1.0, 1.0, 0.1, 100)
    np.testing.assert_allclose(config.schedule((10,))(9), 0.09, rtol=1e-6)


def test_updates_equal_a_float64_adamw():
    """torch's AdamW by its formula: decoupled decay on every parameter, eps after the bias correction, global clip."""
    config = AdamWConfig(0.9, 0.95, 1e-8, 0.1, 1.0, 1e-2, 1e-3, 2)
    total = 20
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 4), "norm": (5,)}
    theirs = {n: rng.normal(size=s) for n, s in shapes.items()}
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), theirs)
    optimizer = config.make((total,))
    state = optimizer.init(ours)
    m = {n: np.zeros(s) for n, s in shapes.items()}
    v = {n: np.zeros(s) for n, s in shapes.items()}
    for step in range(total):
        gradients = {n: rng.normal(size=s) * (10.0 if step % 3 else 0.1) for n, s in shapes.items()}
        updates, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        rate = 1e-2 * step / 2 if step < 2 else 1e-3 + 0.5 * (1 + np.cos(np.pi * (step - 2) / (total - 2))) * 9e-3
        for n in shapes:
            g = gradients[n] / max(1.0, norm)
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.95 * v[n] + 0.05 * g**2
            unbiased = (m[n] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[n] / (1 - 0.95 ** (step + 1))) + 1e-8)
            theirs[n] = theirs[n] - rate * (unbiased + 0.1 * theirs[n])
    for n in shapes:
        np.testing.assert_allclose(ours[n], theirs[n], rtol=2e-6, atol=2e-6)
