"""Logits and hidden states of given tokens, on any mesh, without a cache."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from errors import UserError
from layers import params
from layers.attention import select
from layers.model import ModelConfig
from layers.region import Region
from parallel import axes
from parallel.axes import TENSOR


def batch_ways(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return int(np.prod([mesh.shape[a] for a in axes.BATCH_AXES]))


def for_rows(region: Region, model: ModelConfig, mesh: Mesh, length: int) -> Region:
    """The region for whole rows of a length without gradients: the best attention kernel there, and the residual stream
    sharded along the sequence where ``tensor`` divides it.
    """
    platform, dtype = mesh.devices.flat[0].platform, region.compute_dtype
    kernel = select("auto", platform=platform, dtype=dtype, head_dim=model.head_dim, length=length)
    sharded = length % mesh.shape[TENSOR] == 0
    return dataclasses.replace(region, attention=kernel, sequence_sharded=sharded, remat="none")


def check_tokens(tokens: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Token ids as int32 [B, S].

    Raises:
        UserError: not a two-dimensional integer array, ids outside the vocabulary, longer than the context.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise UserError(f"tokens: expected integers [rows, positions], got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        bad = int(tokens.max() if tokens.max() >= model.vocab_size else tokens.min())
        raise UserError(f"tokens: id {bad} is outside the vocabulary of {model.vocab_size}")
    if tokens.shape[1] > model.context_length:
        raise UserError(f"tokens: {tokens.shape[1]} positions, but the model's context is {model.context_length}")
    return tokens.astype(np.int32)


def forward(
    model: ModelConfig,
    weights: Any,
    tokens: np.ndarray,
    mesh: Mesh,
    region: Region,
    keep_layers: bool = False,
    batch_tokens: int = 16384,
) -> dict[str, np.ndarray]:
    """Run the model over whole sequences, all results together: see `in_batches`.

    Returns:
        ``logits`` float32 [B, S, V]; with ``keep_layers`` also ``layers`` [L, B, S, D] and ``final`` [B, S, D].
    """
    parts = list(in_batches(model, weights, tokens, mesh, region, keep_layers, batch_tokens))
    return {name: np.concatenate([p[name] for p in parts], axis=int(name == "layers")) for name in parts[0]}


def in_batches(
    model: ModelConfig,
    weights: Any,
    tokens: np.ndarray,
    mesh: Mesh,
    region: Region,
    keep_layers: bool = False,
    batch_tokens: int = 16384,
) -> Iterator[dict[str, np.ndarray]]:
    """Run the model over whole sequences, some rows at a time.

    Args:
        model: the architecture.
        weights: its parameters, placed on ``mesh`` (`layers.params.shardings`).
        tokens: int32 [B, S].
        mesh: where to run.
        region: compute dtype and so on; the attention kernel is the best for the platform and length, and the residual
            stream is sequence-sharded where S allows it.
        keep_layers: also give the residual stream after every layer and after the final norm.
        batch_tokens: positions in one batch, about; at least a row on each device.

    Yields:
        Of each batch in turn what `forward` returns of all rows.
    """
    tokens = check_tokens(tokens, model)
    ways, length = batch_ways(mesh), tokens.shape[1]
    run = _compiled(model, mesh, for_rows(region, model, mesh, length), keep_layers)
    size = min(max(1, batch_tokens // length), len(tokens))
    size += -size % ways
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        rows, padded = len(part), np.pad(part, ((0, size - len(part)), (0, 0)))
        result = run(weights, jax.device_put(padded, axes.sharding(mesh, "batch", "position")))
        yield {k: np.asarray(v)[:, :rows] if k == "layers" else np.asarray(v)[:rows] for k, v in result.items()}


@functools.lru_cache(maxsize=16)
def _compiled(model: ModelConfig, mesh: Mesh, region: Region, keep_layers: bool) -> Any:
    graphdef = model.graphdef()
    stream = "sequence" if region.sequence_sharded else "position"

    def body(weights: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        net = region.prepare(nnx.merge(graphdef, weights))
        x, layers = net.hidden(tokens, region, reach=region.reach(tokens), keep_layers=keep_layers)
        result = {"logits": net.logits(x, region).astype(jnp.float32)}
        if keep_layers:
            result |= {"layers": layers, "final": net.final(x, region)}
        return result

    out = {"logits": axes.spec(mesh, "batch", "position", "vocab")}
    if keep_layers:
        out |= {
            "layers": axes.spec(mesh, "layers", "batch", stream, "replicated"),
            "final": axes.spec(mesh, "batch", stream, "replicated"),
        }
    param_specs = params.specs(params.shardings(model.abstract, mesh))
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(param_specs, axes.spec(mesh, "batch", "position")), out_specs=out, check_vma=True
    )
    return jax.jit(mapped)
