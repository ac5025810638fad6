"""Text from a model: prompts fill a key/value cache once, then one token at a time comes out of a compiled loop."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from errors import UserError
from inference.batches import batches, power
from inference.forward import batch_ways, forward
from inference.sampling import Sampling
from layers import params
from layers.attention import Cache, Slots
from layers.model import ModelConfig
from layers.region import Region
from parallel import axes


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Next token of each row. float32 [B, V], random keys [B] -> int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    order = jnp.sort(logits, axis=-1, descending=True)
    least = jnp.full(logits.shape[:1], -jnp.inf)
    if sampling.top_k:
        least = order[:, min(sampling.top_k, logits.shape[-1]) - 1]
    if sampling.top_p < 1:
        order = jnp.where(order >= least[:, None], order, -jnp.inf)
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        kept = jnp.where(before < sampling.top_p, order, jnp.inf)  # the first one is always kept
        least = jnp.maximum(least, jnp.min(kept, axis=-1))
    kept = jnp.where(logits >= least[:, None], logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def generate(
    model: ModelConfig,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh,
    region: Region,
    sampling: Sampling,
    eos_id: int,
    use_cache: bool = True,
    seeds: Sequence[int] | None = None,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """Continue each prompt. What follows one does not depend on the others, but for rounding.

    Args:
        model: the architecture.
        weights: its parameters, placed on ``mesh``.
        prompts: token ids of each prompt, at least one.
        mesh: where to run.
        region: compute dtype and so on.
        sampling: how tokens are chosen.
        eos_id: token that ends a continuation; it is not part of the result.
        use_cache: False runs the whole prefix again for every token: slow, and the reference that the cache must equal.
        seeds: of each prompt, from 0 to 2**32 - 1, if they are sampled; by default the sampling's seed and the prompt's
            number make one.
        batch_tokens: positions in the caches of one batch, about.

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or prompt and continuation longer than the context.
    """
    _check(model, prompts, sampling)
    drawn = dataclasses.replace(sampling, seed=0)  # one program for all seeds
    keys = _keys(sampling.seed, len(prompts)) if seeds is None else jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    if not use_cache:
        new = _without_cache(model, weights, prompts, mesh, region, drawn, eos_id, keys)
        return [_cut(row, eos_id) for row in new.tolist()]
    result: list[list[int]] = [[]] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    run = _compiled(model, mesh, region, drawn, eos_id)
    for width, numbers in batches(lengths, model.context_length, batch_tokens, batch_ways(mesh)):
        tokens = np.zeros((len(numbers), width), np.int32)
        start = np.full(len(numbers), width - 1, np.int32)  # rows that only fill up the batch hold one token
        for row, number in enumerate(numbers):
            if number is not None:
                tokens[row, width - lengths[number] :] = prompts[number]
                start[row] = width - lengths[number]
        of_rows = keys[np.array([number or 0 for number in numbers])]
        place = lambda a, *names: jax.device_put(a, axes.sharding(mesh, *names))  # noqa: E731
        new = np.asarray(run(weights, place(tokens, "batch", "position"), place(start, "batch"), of_rows))
        for number, row in zip(numbers, new.tolist(), strict=True):
            if number is not None:
                result[number] = _cut(row, eos_id)
    return result


def _keys(seed: int, rows: int) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


def _next(keys: jax.Array, n: Any) -> jax.Array:
    """The keys for the n-th token of rows that have such keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)


def _cut(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id)] if eos_id in row else row


def _check(model: ModelConfig, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    if not prompts or not all(prompts):
        raise UserError("generate: a prompt is empty; give at least one token")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise UserError(f"generate: a prompt has a token id outside the vocabulary of {model.vocab_size}")
        if len(prompt) + sampling.max_new_tokens > model.context_length:
            raise UserError(
                f"generate: a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones exceed the context "
                f"of {model.context_length}; shorten the prompt or lower --max-new-tokens"
            )


@functools.lru_cache(maxsize=16)
def _compiled(model: ModelConfig, mesh: Mesh, region: Region, sampling: Sampling, eos_id: int) -> Any:
    """jitted ``(weights, left-padded tokens [B, P], start [B], keys [B]) -> new tokens [B, max_new_tokens]``."""
    region = dataclasses.replace(region, sequence_sharded=False, remat="none")
    graphdef = model.graphdef()
    cache_spec = axes.spec(mesh, "layers", "batch", "position", "heads", "head_dim")
    slots_spec = Slots(PartitionSpec(), axes.spec(mesh, "batch"))

    def body(weights: Any, tokens: jax.Array, cache: Cache, slots: Slots) -> tuple[jax.Array, Cache]:
        net = region.prepare(nnx.merge(graphdef, weights))
        x, cache = net.hidden(tokens, region, cache, slots)
        return net.logits(x[:, -1:], region)[:, 0], cache

    step = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(
            params.specs(params.shardings(model.abstract, mesh)),
            axes.spec(mesh, "batch", "position"),
            Cache(cache_spec, cache_spec),
            slots_spec,
        ),
        out_specs=(axes.spec(mesh, "batch", "vocab"), Cache(cache_spec, cache_spec)),
        check_vma=True,
    )

    def run(weights: Any, tokens: jax.Array, start: jax.Array, keys: jax.Array) -> jax.Array:
        rows, width = tokens.shape
        heads, head_dim = model.cache_shape
        shape = (model.num_layers, rows, width + sampling.max_new_tokens, heads, head_dim)
        empty = Cache(jnp.zeros(shape, region.dtype), jnp.zeros(shape, region.dtype))
        logits, cache = step(weights, tokens, empty, Slots(jnp.int32(0), start))

        def more(carry: Any) -> jax.Array:
            n, done, *_ = carry
            return (n < sampling.max_new_tokens) & ~jnp.all(done)

        def one(carry: Any) -> Any:
            n, done, new, logits, cache = carry
            token = jnp.where(done, eos_id, choose(logits, _next(keys, n), sampling))
            new = new.at[:, n].set(token)
            logits, cache = step(weights, token[:, None], cache, Slots(width + n, start))
            return n + 1, done | (token == eos_id), new, logits, cache

        new = jnp.full((rows, sampling.max_new_tokens), eos_id, jnp.int32)
        return lax.while_loop(more, one, (jnp.int32(0), jnp.zeros(rows, bool), new, logits, cache))[2]

    return jax.jit(run)


def _without_cache(
    model: ModelConfig,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh,
    region: Region,
    sampling: Sampling,
    eos_id: int,
    keys: jax.Array,
) -> np.ndarray:
    rows = len(prompts)
    lengths = np.array([len(p) for p in prompts])
    width = min(model.context_length, max(16, power(int(lengths.max()) + sampling.max_new_tokens)))
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt  # right padding: a causal model never reads it
    new = np.full((rows, sampling.max_new_tokens), eos_id, np.int32)
    done = np.zeros(rows, bool)
    for n in range(sampling.max_new_tokens):
        logits = forward(model, weights, tokens, mesh, region)["logits"]
        last = jnp.asarray(logits[np.arange(rows), lengths + n - 1])
        token = np.where(done, eos_id, np.asarray(choose(last, _next(keys, n), sampling)))
        new[:, n] = token
        done |= token == eos_id
        if done.all():
            break
        tokens[np.arange(rows), lengths + n] = token
    return new
