"""Logits with one layer's weights in memory at a time, on one CPU device: for models larger than the machine."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from checkpoint.names import flat, from_flat
from inference.forward import check_tokens
from layers.decoder import Decoder
from layers.model import ModelConfig
from layers.region import Region
from layers.vocabulary import TiedHead
from parallel.mesh import MeshConfig

REGION = Region("float32", sequence_sharded=False)


def logits(model: ModelConfig, read: Callable[[str, int | None], np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Run the model over whole sequences, in float32.

    Args:
        model: the architecture.
        read: gives a parameter by its name, of one layer where layers are stacked: ``("layers.attention.wq", 3)`` or
            ``("norm.scale", None)``. Called once for each, first layer first; a tied embedding twice.
        tokens: int [B, S].

    Returns:
        float32 [B, S, V].
    """
    tokens = check_tokens(tokens, model)
    one = replace(model, num_layers=1)
    mesh = MeshConfig().build(jax.devices("cpu")[:1])
    names = list(flat(nnx.to_pure_dict(nnx.split(one.abstract)[1])))
    last = [n for n in names if n.split(".")[0] not in ("embedding", "layers")]
    if isinstance(one.abstract.head, TiedHead):
        last = [n for n in names if n.startswith("embedding.")] + last

    def run(what: str, chosen: list[str], layer: int | None, x: Any) -> jax.Array:
        weights = {}
        for name in chosen:
            array = read(name, None) if layer is None else read(name, layer)[None]
            weights[name] = jax.device_put(array.astype(np.float32, copy=False), mesh.devices.flat[0])
            del array
        return jax.block_until_ready(_stage(one, mesh, what)(weights, x))

    # Of the embedding only the rows that are looked up: with both in memory as float32, this would be the peak.
    rows, ids = np.unique(tokens, return_inverse=True)
    table = read("embedding.table", None)[rows].astype(np.float32)
    x = _stage(one, mesh, "embed")({"embedding.table": table}, ids.reshape(tokens.shape).astype(np.int32))
    for layer in range(model.num_layers):
        x = run("blocks", [n for n in names if n.startswith("layers.")], layer, x)
    return np.asarray(run("logits", last, None, x))


@functools.lru_cache(maxsize=8)
def _stage(one: ModelConfig, mesh: Mesh, what: str) -> Any:
    """A jitted part of a model of one layer, ``(its weights by name, input) -> output``."""
    graphdef, state = nnx.split(one.abstract)
    absent = flat(nnx.to_pure_dict(state))  # what this part does not use stays a shape

    def body(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        net: Decoder = nnx.merge(graphdef, from_flat(absent | weights))
        if what == "embed":
            return net.embed(x, REGION)
        if what == "blocks":
            return net.blocks(x, REGION)[0]
        return net.logits(x, REGION).astype(jnp.float32)

    everywhere = PartitionSpec()
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=True))
