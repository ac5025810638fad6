"""What Llama 2 and 3 have and Amber has not: grouped heads, a tied head, scaled rotary; as transformers computes it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import run as command
from amber_jax.convert import FORMAT, config_to_hf
from amber_jax.recipes import amber_tiny
from checkpoint.series import Series
from data.batch import Batch
from errors import UserError
from huggingface.folder import Folder
from inference.forward import forward
from inference.generate import generate
from inference.sampling import Sampling
from layers import params
from layers.region import Region
from models import families
from tests.amber_jax.test_transformers import TOLERANCE, random_llama
from tests.training.ways import check_gradients, mesh_of
from training.config import model_from_dict, model_to_dict
from training.step import batch_sharding, make_loss_and_gradients

TINY = dataclasses.replace(
    amber_tiny().model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=8, head_dim=4, mlp=48
)
#: Eight heads of queries, two of keys and values; a context of 8 that was extended fourfold, so that waves of all three
#: kinds are there.
GROUPED = dataclasses.replace(
    TINY, num_kv_heads=2, tied_embeddings=True, rope_base=100.0, rope_factor=4.0, rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0, rope_original_context=16,
)  # fmt: skip
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TOKENS = np.random.default_rng(2).integers(0, 64, (2, 32))


@functools.cache
def arrays(model):
    from flax import nnx

    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model.build(jax.random.key(0)))[1]))


def on(model, mesh):
    return jax.device_put(arrays(model), params.shardings(model.abstract, mesh))


def loss_and_gradients(model, text, microbatches=1, **how):
    mesh = mesh_of(text)
    params.check_divides(model.abstract, mesh.shape)
    tokens = np.random.default_rng(1).integers(64, size=(microbatches, 8 // microbatches, 33)).astype(np.int32)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], np.ones(tokens[..., 1:].shape, np.float32))
    region = dataclasses.replace(Region(), **how)
    step = jax.jit(make_loss_and_gradients(model, region, mesh))
    loss, gradients = step(on(model, mesh), jax.device_put(batch, batch_sharding(mesh)))
    return float(loss), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize(
    ("mesh", "microbatches", "how"),
    [
        ("fsdp=4,tensor=2", 2, {"remat": "full"}),
        ("tensor=8", 1, {"gather": "once"}),  # more than there are heads of keys and values
        ("fsdp=2,tensor=4", 1, {}),
        ("pipeline=2,tensor=4", 2, {"schedule": "1f1b"}),
    ],
)
def test_any_mesh_equals_one_device(mesh, microbatches, how):
    loss, gradients = loss_and_gradients(GROUPED, mesh, microbatches, **how)
    expected, expected_gradients = _one_device()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    check_gradients(gradients, expected_gradients, mesh)
    assert gradients["layers"]["attention"]["wk"].shape == (2, 32, 2, 4)
    assert "head" not in gradients, "it is the embedding"


@functools.cache
def _one_device():
    return loss_and_gradients(GROUPED, "data=1")


@pytest.mark.parametrize("mesh", ["data=1", "tensor=4", "pipeline=2,tensor=2"])
def test_with_the_cache_equals_without_it(mesh):
    built = mesh_of(mesh)
    prompts = [[5, 6, 7], [9, 1, 2, 3, 4, 5, 6]]
    found = [
        generate(GROUPED, on(GROUPED, built), prompts, built, Region("float32"), Sampling(12), -1, cache)
        for cache in (True, False)
    ]
    assert found[0] == found[1]


def test_parameters_and_flops_are_counted_by_their_heads():
    assert GROUPED.matmul_parameters == TINY.matmul_parameters - 2 * 2 * 32 * (32 - 8)
    assert GROUPED.num_parameters == TINY.num_parameters - 2 * 2 * 32 * (32 - 8) - 32 * 64


def test_a_config_says_only_what_is_set_and_reads_back():
    """So hashes of runs of before these fields are what they were."""
    assert "num_kv_heads" not in model_to_dict(TINY)
    for model in (TINY, GROUPED):
        assert model_from_dict({"model": json.loads(json.dumps(model_to_dict(model)))}, families()) == model
        assert FORMAT.config_from_hf(config_to_hf(model)) == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=8"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 does not divide"),
        ({"rope_factor": 0.0}, "rope_factor=0.0 must be positive"),
        ({"rope_high_freq_factor": 1.0}, "rope_high_freq_factor=1.0 must be above rope_low_freq_factor=1.0"),
    ],
)
def test_what_is_no_model_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "more",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 4, "rope_theta": 500.0, "rope_scaling": SCALING},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ],
    ids=["grouped", "llama3", "tied"],
)
def test_logits_are_those_of_transformers_and_folders_go_in_and_out(more, tmp_path, capsys):
    model, expected = random_llama(
        TOKENS, 0.2, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=32, pad_token_id=None, **more,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    folder = Folder(tmp_path / "theirs")
    config = FORMAT.config_from_hf(folder.config)
    weights = FORMAT.collect(config, {name: folder.read(name) for name in folder.tensors})
    assert np.ptp(expected) > 1
    for mesh in ("data=1", "tensor=8"):
        built = mesh_of(mesh)
        placed = jax.device_put(weights, params.shardings(config.abstract, built))
        ours = forward(config, placed, TOKENS, built, Region("float32"))["logits"]
        np.testing.assert_allclose(ours, expected, **TOLERANCE)
    np.testing.assert_allclose(FORMAT.reference(folder.config, folder.read, TOKENS), expected, **TOLERANCE)
    assert command.main(["import", str(tmp_path / "theirs"), "--run", str(tmp_path / "run")]) == 0
    assert command.main(["export", f"{tmp_path}/run@0", "--out", str(tmp_path / "ours")]) == 0
    assert command.main(["import", str(tmp_path / "ours"), "--run", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    first, again = (Series(tmp_path / run)[0] for run in ("run", "again"))
    assert list(first) == list(again)
    assert all(np.array_equal(first[name][...], again[name][...]) for name in first)
    scaled = "rope_scaling" in more
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["num_key_value_heads"], bool(written["rope_scaling"])) == (more["num_key_value_heads"], scaled)
