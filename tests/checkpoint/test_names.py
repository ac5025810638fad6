from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from checkpoint.names import flat, layer_of, nest, stacked, unnest
from errors import UserError

PARAMS = {"layers": {"wq": np.ones((2, 3)), "wo": np.zeros(3)}, "norm": np.ones(1)}


class Pair(NamedTuple):
    left: object
    right: object


def test_flat_names_are_paths_joined_with_dots():
    assert set(flat(PARAMS)) == {"layers.wq", "layers.wo", "norm"}
    assert flat(Pair(left=(1, 2), right={"k": 3})) == {"left.0": 1, "left.1": 2, "right.k": 3}


def test_optax_state_survives_the_round_trip():
    state = optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(1e-3))).init(PARAMS)
    nested = nest(state)
    assert flat(nested) == flat(state)
    moments = {f"1.0.{m}.{name}" for m in ("mu", "nu") for name in ("layers.wo", "layers.wq", "norm")}
    assert flat(state).keys() == moments | {"1.0.count", "1.2.count"}
    back = unnest(state, nested)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True))


def test_nodes_without_arrays_disappear():
    assert nest({"a": {}, "b": None, "c": (optax.EmptyState(), np.ones(1))}) == {"c": {"1": np.ones(1)}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a.b": 1}, r"a\.b: the key 'a\.b' cannot name a folder"),
        ({"a/b": 1}, "the key 'a/b' cannot name a folder"),
        ({"": 1}, "the key '' cannot name a folder"),
        ({"a": {1: 1}, "b": [{"c.d": 2}]}, r"b\.0\.c\.d: the key 'c\.d'"),
        (np.ones(1), "an array without a name"),
    ],
)
def test_a_tree_that_cannot_be_named_is_refused(tree, message):
    with pytest.raises(UserError, match=message):
        nest(tree)


def test_two_arrays_of_one_name_are_refused():
    @jax.tree_util.register_pytree_with_keys_class
    class Twins:
        def tree_flatten_with_keys(self):
            key = jax.tree_util.DictKey("twin")
            return ((key, 1), (key, 2)), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls()

    with pytest.raises(UserError, match=r"a\.twin: two arrays of the tree have this name"):
        flat({"a": Twins()})


def test_a_node_that_names_no_children_is_refused():
    class Opaque:
        pass

    class Key:
        def __str__(self):
            return "<opaque>"

    jax.tree_util.register_pytree_with_keys(Opaque, lambda _: (((Key(), 1),), None), lambda *_: Opaque())
    with pytest.raises(UserError, match=r"<opaque>: this kind of pytree node"):
        flat(Opaque())


def test_names_of_one_layer():
    assert layer_of("layers.7.attention.wq") == ("layers.attention.wq", 7)
    assert layer_of("0.mu.layers.12.norm") == ("0.mu.layers.norm", 12)
    for name in ("layers.attention.wq", "layers.7", "layers.x7.wq", "mylayers.7.wq", "0.mu.wq", "layers.-1.wq"):
        assert layer_of(name) is None
    assert stacked("layers.norm")
    assert stacked("0.mu.layers.norm")
    assert not stacked("layers")
    assert not stacked("embedding")


def test_unnest_names_what_is_missing_and_what_is_too_much():
    nested = nest(PARAMS)
    del nested["layers"]["wq"]
    with pytest.raises(UserError, match=r"missing layers\.wq:"):
        unnest(PARAMS, nested)
    nested = nest(PARAMS)
    nested["bias"] = np.ones(1)
    with pytest.raises(UserError, match="unexpected bias:"):
        unnest(PARAMS, nested)
    with pytest.raises(UserError, match="missing 0, 1, 2, 3, 4 and 2 more"):
        unnest(list(range(7)), {})
