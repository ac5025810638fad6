"""How likely a model finds given tokens: log-probabilities and greedy choices, without logits on the host."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from errors import RunError, UserError
from inference.batches import batches
from inference.forward import batch_ways, for_rows
from layers import params
from layers.model import ModelConfig
from layers.region import Region
from parallel import axes
from parallel.axes import TENSOR

#: Logits that exist at a time on a device, in bytes, about.
_LOGITS_BYTES = 64 << 20


class TokenScores(NamedTuple):
    """Of a row of n tokens: what the model says of each one but the first."""

    logprobs: np.ndarray
    """float32 [n-1]: natural logarithm of the probability of token i+1 after tokens 0 … i."""
    likeliest: np.ndarray
    """int32 [n-1]: the token that greedy decoding puts in its place (the lowest id of equally likely ones)."""


def score(
    model: ModelConfig,
    weights: Any,
    rows: Sequence[Sequence[int] | np.ndarray],
    mesh: Mesh,
    region: Region,
    batch_tokens: int = 16384,
) -> list[TokenScores]:
    """Score rows of tokens, of any lengths, by teacher forcing.

    Rows of like length are scored together, in few shapes (powers of two), so that other rows compile nothing new. What
    a row scores does not depend on the rows beside it, but for rounding.

    Args:
        model: the architecture.
        weights: its parameters, placed on ``mesh``.
        rows: token ids of each row, at most one more than the model's context.
        mesh: where to run.
        region: compute dtype and so on; the attention kernel is the best for the platform and length.
        batch_tokens: positions in one batch, about.

    Returns:
        The scores of each row, in the order of ``rows``; of a row of one token or none, empty.

    Raises:
        UserError: a row is too long, or an id is outside the vocabulary.
        RunError: the model gives numbers that are not finite.
    """
    for number, row in enumerate(rows):
        if len(row) > model.context_length + 1:
            raise UserError(
                f"row {number}: {len(row)} tokens; a context of {model.context_length} scores one more than itself"
            )
        if len(row) and not 0 <= int(np.min(row)) <= int(np.max(row)) < model.vocab_size:
            raise UserError(f"row {number}: a token id is outside the vocabulary of {model.vocab_size}")
    found: list[TokenScores] = [TokenScores(np.empty(0, np.float32), np.empty(0, np.int32))] * len(rows)
    for width, numbers in batches([len(row) - 1 for row in rows], model.context_length, batch_tokens, batch_ways(mesh)):
        tokens = np.zeros((2, len(numbers), width), np.int32)  # what is read, what is to be said
        placed = [(place, number) for place, number in enumerate(numbers) if number is not None]
        for place, number in placed:
            tokens[:, place, : len(rows[number]) - 1] = rows[number][:-1], rows[number][1:]
        run = _compiled(model, mesh, _fitting(region, model, mesh, len(numbers), width))
        place_on = axes.sharding(mesh, "batch", "position")
        logprobs, likeliest = map(np.asarray, run(weights, *(jax.device_put(t, place_on) for t in tokens)))
        for place, number in placed:
            stop = len(rows[number]) - 1
            found[number] = TokenScores(logprobs[place, :stop].copy(), likeliest[place, :stop].copy())
            if not np.isfinite(found[number].logprobs).all():
                raise RunError("the model gives log-probabilities that are not finite; its weights are no use")
    return found


def _fitting(region: Region, model: ModelConfig, mesh: Mesh, rows: int, width: int) -> Region:
    bytes_ = rows // batch_ways(mesh) * width * model.vocab_size // mesh.shape[TENSOR] * 4
    pieces = 1
    while bytes_ // pieces > _LOGITS_BYTES and width % (2 * pieces) == 0:
        pieces *= 2
    return dataclasses.replace(for_rows(region, model, mesh, width), loss_chunks=pieces, document_end=None)


@functools.lru_cache(maxsize=64)
def _compiled(model: ModelConfig, mesh: Mesh, region: Region) -> Any:
    """jitted ``(weights, tokens [B, S], targets [B, S]) -> (log-probabilities, likeliest tokens)``."""
    graphdef = model.graphdef()

    def body(weights: Any, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        net = region.prepare(nnx.merge(graphdef, weights))
        x, _ = net.hidden(tokens, region, reach=region.reach(tokens))
        return net.scores(x, targets, region)

    rows = axes.spec(mesh, "batch", "position")
    param_specs = params.specs(params.shardings(model.abstract, mesh))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(param_specs, rows, rows), out_specs=(rows, rows), check_vma=True)
    return jax.jit(mapped)
