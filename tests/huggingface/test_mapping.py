"""The tables between their names and ours: complete, inverse of each other, and strict."""

import dataclasses

import jax
import numpy as np
import pytest

from amber_jax.convert import FORMAT as AMBER
from amber_jax.recipes import amber_7b, amber_tiny
from crystal_jax.convert import FORMAT as CRYSTAL
from crystal_jax.recipes import crystal_7b, crystal_tiny
from errors import UserError

MODELS = [(AMBER, amber_7b), (AMBER, amber_tiny), (CRYSTAL, crystal_7b), (CRYSTAL, crystal_tiny)]
FORMATS = [(AMBER, amber_tiny), (CRYSTAL, crystal_tiny)]
LLAMA = AMBER.config_to_hf(amber_tiny().model)
CODER = CRYSTAL.config_to_hf(crystal_tiny().model)


def small(recipe):
    return dataclasses.replace(recipe().model, vocab_size=12, num_layers=2, embed=16, num_heads=2, head_dim=8, mlp=10)


def made_up(form, model):
    """Every tensor of a model, all numbers different."""
    at = 0
    found = {}
    for row in form.tensors(model):
        size = int(np.prod(row.shape))
        found[row.theirs] = np.arange(at, at + size, dtype=np.float32).reshape(row.shape)
        at += size
    return found


@pytest.mark.parametrize(("form", "recipe"), MODELS)
def test_the_table_holds_every_number_once(form, recipe):
    model = recipe().model
    ours = {}
    for row in form.tensors(model):
        assert int(np.prod(row.shape)) == len(row.ours) * int(np.prod(row.part)), row
        for name in row.ours:
            ours.setdefault(name, []).append((row.layer, row.part))
    shapes = jax.tree_util.tree_leaves_with_path(form_shapes(model))
    assert {".".join(k.key for k in path) for path, _ in shapes} == ours.keys()
    for path, shape in shapes:
        name = ".".join(k.key for k in path)
        parts = ours[name]
        if name.startswith("layers."):
            assert [layer for layer, _ in parts] == list(range(model.num_layers))
            assert all((model.num_layers, *part) == shape.shape for _, part in parts)
        else:
            assert parts == [(None, shape.shape)]


def form_shapes(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(model.abstract)[1])


@pytest.mark.parametrize(("form", "recipe"), FORMATS)
def test_there_and_back(form, recipe):
    tensors = made_up(form, small(recipe))
    for row in form.tensors(small(recipe)):
        parts = row.to_ours(tensors[row.theirs])
        assert [p.shape for p in parts] == [row.part] * len(row.ours)
        np.testing.assert_array_equal(row.to_theirs(parts), tensors[row.theirs])


@pytest.mark.parametrize(("form", "recipe"), MODELS)
def test_a_config_comes_back(form, recipe):
    model = recipe().model
    assert form.config_from_hf(form.config_to_hf(model)) == model


@pytest.mark.parametrize(
    ("form", "hf", "change", "message"),
    [
        (AMBER, LLAMA, {"model_type": "gpt2"}, "model_type is 'gpt2', and Amber has 'llama'"),
        (
            AMBER,
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is .*linear.* Amber has none or that of type 'llama3'",
        ),
        (AMBER, LLAMA, {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        (AMBER, LLAMA, {"num_key_value_heads": "x"}, "num_key_value_heads is 'x', expected a positive int"),
        (AMBER, LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        (AMBER, LLAMA, {"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected a mapping or null"),
        (AMBER, LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, "factor is None, expected a positive float"),
        (AMBER, LLAMA, {"hidden_size": 130}, "hidden_size 130 is not a multiple of num_attention_heads 4"),
        (AMBER, LLAMA, {"hidden_size": None}, "hidden_size is None, expected a positive int"),
        (AMBER, LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling is .*yarn.* Amber has none or that"),
        (CRYSTAL, CODER, {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        (CRYSTAL, CODER, {"mup_scale_qk_dot_by_d": False}, "mup_scale_qk_dot_by_d is False"),
        (CRYSTAL, CODER, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        (CRYSTAL, CODER, {"n_embd": 130}, "n_embd 130 is not a multiple of n_head 4"),
        (CRYSTAL, CODER, {"n_inner": None}, "n_inner is None, expected a positive int"),
    ],
)
def test_a_config_of_another_architecture_is_refused(form, hf, change, message):
    with pytest.raises(UserError, match=message):
        form.config_from_hf(hf | change)


def test_what_llamas_config_says_in_other_ways():
    """transformers 5 moved the rotary base; early configs write -1 for no padding row, and null is the default."""
    assert AMBER.config_from_hf(LLAMA | {"head_dim": None, "num_key_value_heads": None}) == amber_tiny().model
    assert AMBER.config_from_hf(LLAMA | {"rope_theta": None}).rope_base == 1e4
    moved = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    moved["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e4}
    assert AMBER.config_from_hf(moved).rope_base == 5e4
    assert AMBER.config_from_hf(LLAMA | {"pad_token_id": -1}).padding_id is None


@pytest.mark.parametrize(("form", "recipe"), FORMATS)
def test_a_model_that_their_config_cannot_say_is_refused(form, recipe):
    with pytest.raises(UserError, match=r"export: .*embed=128"):
        form.config_to_hf(dataclasses.replace(recipe().model, head_dim=16))


def test_tensors_that_do_not_fit_are_named():
    model = small(amber_tiny)
    table, complete = AMBER.tensors(model), made_up(AMBER, small(amber_tiny))
    shapes = {name: t.shape for name, t in complete.items()}
    AMBER.check_names(table, shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    with pytest.raises(UserError, match=r"'lm_head.weight' is missing, expected \[12, 16\]"):
        AMBER.check_names(table, {k: v for k, v in shapes.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match=r"'surprise' \[1\] is unknown"):
        AMBER.check_names(table, shapes | {"surprise": (1,)})
    with pytest.raises(UserError, match=r"'model.norm.weight' has shape \[5\], expected \[16\]"):
        AMBER.check_names(table, shapes | {"model.norm.weight": (5,)})
    with pytest.raises(UserError, match=r"and 4 more"):
        AMBER.check_names(table, shapes | {f"x{n}": (1,) for n in range(9)})


def test_crystals_old_exports_pass_and_its_bias_is_a_parameter():
    model = small(crystal_tiny)
    table, shapes = CRYSTAL.tensors(model), {n: t.shape for n, t in made_up(CRYSTAL, small(crystal_tiny)).items()}
    buffers = {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": ()}
    CRYSTAL.check_names(table, shapes | buffers | {"lm_head.weight": (12, 16)})
    with pytest.raises(UserError, match=r"'lm_head.weight' has shape \[16, 12\], expected \[12, 16\]"):
        CRYSTAL.check_names(table, shapes | {"lm_head.weight": (16, 12)})
    with pytest.raises(UserError, match=r"'transformer.h.0.attn.c_attn.bias' is missing"):
        CRYSTAL.check_names(table, {n: s for n, s in shapes.items() if n != "transformer.h.0.attn.c_attn.bias"})
