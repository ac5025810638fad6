import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crystal_jax.recipes import crystal_tiny
from errors import RunError, UserError
from inference import score as module
from inference.forward import forward
from inference.generate import generate
from inference.sampling import Sampling
from inference.score import score
from layers import params
from layers.region import Region

REGION = Region("float32")
MESHES = ["data=1", "tensor=2", "data=2,fsdp=2,tensor=2"]
LENGTHS = [33, 1, 7, 20, 2, 17, 18, 0, 33, 16]


@pytest.fixture
def models(tiny):
    crystal = dataclasses.replace(
        crystal_tiny().model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=4, head_dim=8,
        rotary_dims=4, mlp=48,
    )  # fmt: skip
    return {"amber": tiny.model, "crystal": crystal}


@pytest.fixture(scope="module")
def weights_of():
    made = {}

    def make(config, mesh, change=lambda values: values):
        if config not in made:
            made[config] = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(config.build(jax.random.key(0)))[1]))
        return jax.device_put(change(made[config]), params.shardings(config.abstract, mesh))

    return make


def rows_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(64, size=n, dtype=np.int32) for n in lengths]


def expected(config, weights, rows, mesh):
    """log p and argmax of each row by itself, from the whole logits."""
    for row in rows:
        logits = forward(config, weights, row[None, :-1], mesh, REGION)["logits"][0]
        logprobs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
        yield np.asarray(logprobs)[np.arange(len(row) - 1), row[1:]], logits.argmax(-1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", ["amber", "crystal"])
def test_is_the_softmax_of_the_logits(models, mesh_of, weights_of, family, mesh):
    """Rows of mixed lengths, in several batches; the rows' own order."""
    config, mesh = models[family], mesh_of(mesh)
    weights, rows = weights_of(config, mesh), rows_of(LENGTHS)
    found = score(config, weights, rows, mesh, REGION, batch_tokens=64)
    assert [len(f.logprobs) for f in found] == [max(0, n - 1) for n in LENGTHS]
    one = mesh_of("data=1")
    long = [n for n, length in enumerate(LENGTHS) if length in (33, 2, 17)]
    for n, (logprobs, likeliest) in zip(long, expected(config, weights_of(config, one), [rows[n] for n in long], one)):
        np.testing.assert_allclose(found[n].logprobs, logprobs, atol=1e-5)
        np.testing.assert_array_equal(found[n].likeliest, likeliest)
        assert (found[n].logprobs.dtype, found[n].likeliest.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("mesh", ["data=1", "tensor=2"])
def test_pieces_of_the_logits_give_the_same(models, mesh_of, weights_of, monkeypatch, mesh):
    config, mesh = models["amber"], mesh_of(mesh)
    weights, rows = weights_of(config, mesh), rows_of([33, 33, 12])
    whole = score(config, weights, rows, mesh, REGION)
    monkeypatch.setattr(module, "_LOGITS_BYTES", 2 * 32 * 64 * 4 // 8 // mesh.shape["tensor"])
    assert module._fitting(REGION, config, mesh, 2, 32).loss_chunks == 8
    for a, b in zip(whole, score(config, weights, rows, mesh, REGION)):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_array_equal(a.likeliest, b.likeliest)


@pytest.mark.parametrize(("family", "mesh"), [("amber", "data=1"), ("amber", "tensor=2"), ("crystal", MESHES[2])])
def test_of_equally_likely_tokens_the_lowest_id(models, mesh_of, weights_of, family, mesh):
    """All rows of the head are alike, so that all 64 ids are equally likely, on every shard of the vocabulary; then
    twice 32 of them, of which the better ones begin at 3 and go on in the other shard.
    """
    config, mesh = models[family], mesh_of(mesh)
    rows = rows_of([33, 9])

    def equal(groups):
        def change(values):
            path = ("head", "kernel") if family == "amber" else ("embedding", "table")
            changed = jax.tree_util.tree_map_with_path(
                lambda p, w: np.take(w, groups, axis=w.shape.index(64)) if _names(p) == path else w, values
            )
            assert any(_names(p) == path for p, _ in jax.tree_util.tree_leaves_with_path(values)), _paths(values)
            return changed

        return change

    for found in score(config, weights_of(config, mesh, equal(np.zeros(64, int))), rows, mesh, REGION):
        np.testing.assert_allclose(found.logprobs, -np.log(64), rtol=1e-6)
        assert not found.likeliest.any()
    halves = np.where(np.arange(64) % 61 < 3, 0, 1)  # 0, 1, 2, 61, 62, 63 are alike, and so are the others
    best = np.concatenate(
        [f.likeliest for f in score(config, weights_of(config, mesh, equal(halves)), rows, mesh, REGION)]
    )
    assert set(best.tolist()) == {0, 3}


def _names(path):
    return tuple(str(p.key) for p in path)


def _paths(values):
    return [_names(p) for p, _ in jax.tree_util.tree_leaves_with_path(values)]


def test_a_row_does_not_depend_on_its_company(models, mesh_of, weights_of):
    config, mesh = models["amber"], mesh_of("data=1")
    weights, rows = weights_of(config, mesh), rows_of([20, 33, 5])
    together = score(config, weights, rows, mesh, REGION)
    for row, found in zip(rows, together):
        np.testing.assert_allclose(score(config, weights, [row], mesh, REGION)[0].logprobs, found.logprobs, atol=1e-5)
    assert score(config, weights, [], mesh, REGION) == []
    assert [len(f.likeliest) for f in score(config, weights, [[3], []], mesh, REGION)] == [0, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1], [0] * 34], "row 1: 34 tokens; a context of 32 scores one more than itself"),
        ([[1, 64]], "row 0: a token id is outside the vocabulary of 64"),
        ([[1, 2], [-1]], "row 1: a token id is outside"),
    ],
)
def test_refuses_rows_that_cannot_be_scored(models, mesh_of, weights_of, rows, message):
    mesh = mesh_of("data=1")
    with pytest.raises(UserError, match=message):
        score(models["amber"], weights_of(models["amber"], mesh), rows, mesh, REGION)


def test_numbers_that_are_none_are_said(models, mesh_of, weights_of):
    mesh, config = mesh_of("data=1"), models["amber"]
    weights = weights_of(config, mesh, lambda values: jax.tree.map(lambda w: np.full_like(w, np.nan), values))
    with pytest.raises(RunError, match="log-probabilities that are not finite"):
        score(config, weights, rows_of([33, 33, 12]), mesh, REGION)


def test_a_prompts_own_seed_makes_its_sample(models, mesh_of, weights_of):
    """In any order and in any batches, with the cache and without."""
    config, mesh = models["amber"], mesh_of("data=2,tensor=2")
    weights = weights_of(config, mesh)
    prompts = [row.tolist() for row in rows_of([3, 9, 20, 1, 3, 12])]
    prompts[4] = prompts[0]  # alike, but for their seeds
    seeds = [11, 5, 8, 2, 3, 9]

    def run(order, **options):
        sampling = Sampling(max_new_tokens=12, temperature=1.0)
        chosen, own = [prompts[n] for n in order], [seeds[n] for n in order]
        return generate(config, weights, chosen, mesh, REGION, sampling, -1, seeds=own, **options)

    first = run(range(6))
    assert first[0] != first[4]
    assert run([4, 2, 0, 5, 1, 3]) == [first[n] for n in (4, 2, 0, 5, 1, 3)]
    assert run(range(6), batch_tokens=32) == first
    assert run(range(6), use_cache=False) == first
