import dataclasses
import json

import jax
import numpy as np
import pytest

from amber_jax import convert
from amber_jax.config import AmberConfig
from amber_jax.recipes import amber_7b, amber_tiny
from errors import UserError
from layers import params
from parallel.mesh import MeshConfig


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
    assert data.total_steps == 274_320
    assert data.steps_per_chunk * data.tokens_per_step == 3_495_690_240
    assert data.total_steps * data.tokens_per_step == 1_258_448_486_400


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


CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "pad_token_id": 0,
}  # fmt: skip


def tensors():
    shapes = {"q_proj": (4, 4), "k_proj": (4, 4), "v_proj": (4, 4), "o_proj": (4, 4)}
    result = {f"model.layers.0.self_attn.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}
    for name, shape in {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}.items():
        result[f"model.layers.0.mlp.{name}.weight"] = np.zeros(shape, np.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        result[f"model.layers.0.{name}.weight"] = np.zeros(4, np.float32)
    vocabulary = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.norm.weight": (4,)}
    return result | {n: np.zeros(s, np.float32) for n, s in vocabulary.items()}


def test_conversion_names_what_is_wrong():
    config = convert.config_from_hf(CONFIG)
    complete = tensors()
    converted = convert.from_hf(complete | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(1)}, config)
    shapes = jax.tree.map(np.shape, converted)
    assert shapes == jax.tree.map(lambda x: x.shape, params.abstract_arrays(config.abstract, one_device_mesh()))
    missing = {k: v for k, v in complete.items() if k != "lm_head.weight"}
    with pytest.raises(UserError, match=r"'lm_head.weight' is missing"):
        convert.from_hf(missing, config)
    with pytest.raises(UserError, match=r"unknown tensors \['surprise'\]"):
        convert.from_hf(complete | {"surprise": np.zeros(1)}, config)
    with pytest.raises(UserError, match=r"'model.norm.weight' has shape \(5,\), expected \(4,\)"):
        convert.from_hf(complete | {"model.norm.weight": np.zeros(5)}, config)
    with pytest.raises(UserError, match="model_type is 'gpt2', expected 'llama'"):
        convert.config_from_hf(CONFIG | {"model_type": "gpt2"})
    with pytest.raises(UserError, match=r"rope_scaling is .*linear.* and Amber's architecture has None"):
        convert.config_from_hf(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    with pytest.raises(UserError, match="grouped key/value heads"):
        convert.config_from_hf(CONFIG | {"num_key_value_heads": 1})


def one_device_mesh():
    return MeshConfig().build(jax.devices()[:1])


def test_a_recipe_survives_json():
    for recipe in (amber_7b(), amber_tiny()):
        text = json.dumps(recipe.to_dict())
        assert type(recipe).from_dict(json.loads(text), {"amber": AmberConfig}) == recipe
