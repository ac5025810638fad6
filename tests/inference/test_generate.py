import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from errors import UserError
from inference.forward import forward
from inference.generate import choose, generate
from inference.sampling import Sampling
from layers import params
from layers.region import Region

REGION = Region("float32")
PROMPTS = [[5, 9, 11], [7], list(range(3, 20))]


@pytest.fixture(scope="module")
def weights_of():
    made = {}

    def make(config, mesh):
        if config not in made:
            made[config] = nnx.to_pure_dict(nnx.split(config.build(jax.random.key(0)))[1])
        return jax.device_put(made[config], params.shardings(config.abstract, mesh))

    return make


def run(tiny, weights_of, mesh, prompts=PROMPTS, eos_id=-1, use_cache=True, **sampling):
    sampling = Sampling(**{"max_new_tokens": 12, **sampling})
    return generate(tiny.model, weights_of(tiny.model, mesh), prompts, mesh, REGION, sampling, eos_id, use_cache)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2", "tensor=8", "pipeline=2,tensor=2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_the_cache_equals_without_it(tiny, mesh_of, weights_of, mesh, temperature):
    """Prompts of different lengths together, so that left padding and true positions are tested too."""
    mesh = mesh_of(mesh)
    cached = run(tiny, weights_of, mesh, temperature=temperature, seed=3)
    assert cached == run(tiny, weights_of, mesh, temperature=temperature, seed=3, use_cache=False)
    assert [len(c) for c in cached] == [12, 12, 12]


def test_company_in_a_batch_changes_nothing(tiny, mesh_of, weights_of):
    mesh = mesh_of("data=1")
    alone = [run(tiny, weights_of, mesh, prompts=[p])[0] for p in PROMPTS]
    assert run(tiny, weights_of, mesh) == alone


def test_stops_at_the_end_token(tiny, mesh_of, weights_of):
    mesh = mesh_of("data=1")
    free = run(tiny, weights_of, mesh)
    end = free[0][4]
    for use_cache in (True, False):
        stopped = run(tiny, weights_of, mesh, eos_id=end, use_cache=use_cache)
        assert stopped == [f[: f.index(end)] if end in f else f for f in free]


def test_same_seed_same_text(tiny, mesh_of, weights_of):
    mesh = mesh_of("data=1")
    first, again, other = (run(tiny, weights_of, mesh, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_sampling_keeps_to_its_limits():
    """Probabilities 0.5, 0.25, 0.15, 0.1: what may be drawn is known by hand."""
    logits = jnp.log(jnp.tile(jnp.array([0.15, 0.5, 0.1, 0.25]), (4000, 1)))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(**limits):
        drawn = np.asarray(choose(logits, keys, Sampling(temperature=1.0, **limits)))
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(), [0.15, 0.5, 0.1, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.6), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.8), [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(top_k=1), [0, 1, 0, 0])
    cold = choose(logits, keys, Sampling(temperature=0.01))
    assert set(np.asarray(cold).tolist()) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "a prompt is empty"),
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"prompts": [[64]]}, "outside the vocabulary of 64"),
        ({"prompts": [[1] * 25]}, "25 tokens and 12 new ones exceed the context of 32"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_refuses_what_it_cannot_do(tiny, mesh_of, weights_of, arguments, message):
    with pytest.raises(UserError, match=message):
        run(tiny, weights_of, mesh_of("data=1"), **arguments)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=2,tensor=2", "tensor=4", "pipeline=2,fsdp=2"])
@pytest.mark.parametrize("length", [16, 13])
def test_logits_are_the_same_on_every_mesh(tiny, mesh_of, weights_of, mesh, length):
    """Also for 3 rows on 8 devices, and for a length that ``tensor`` does not divide."""
    tokens = np.random.default_rng(0).integers(64, size=(3, length))
    one, many = mesh_of("data=1"), mesh_of(mesh)
    expected = forward(tiny.model, weights_of(tiny.model, one), tokens, one, REGION)["logits"]
    got = forward(tiny.model, weights_of(tiny.model, many), tokens, many, REGION)["logits"]
    assert got.shape == (3, length, 64)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"expected integers \[rows, positions\], got float32"),
        (np.zeros(3, np.int32), r"got int32 \(3,\)"),
        (np.zeros((0, 3), np.int32), r"got int32 \(0, 3\)"),
        (np.full((1, 3), 64), "id 64 is outside the vocabulary of 64"),
        (np.full((1, 3), -1), "id -1 is outside"),
        (np.zeros((1, 33), np.int32), "33 positions, but the model's context is 32"),
    ],
)
def test_refuses_tokens_that_are_none(tiny, mesh_of, weights_of, tokens, message):
    mesh = mesh_of("data=1")
    with pytest.raises(UserError, match=message):
        forward(tiny.model, weights_of(tiny.model, mesh), tokens, mesh, REGION)


def test_layers_of_all_stages_are_those_of_one_device(tiny, mesh_of, weights_of):
    tokens = np.arange(24).reshape(2, 12) % 64
    one, staged = (
        forward(tiny.model, weights_of(tiny.model, mesh_of(m)), tokens, mesh_of(m), REGION, keep_layers=True)
        for m in ("data=1", "pipeline=2,data=2,tensor=2")
    )
    assert one["layers"].shape == (2, 2, 12, 32)
    for name in ("layers", "final", "logits"):
        np.testing.assert_allclose(staged[name], one[name], atol=1e-5)
