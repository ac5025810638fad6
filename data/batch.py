"""What one training step reads."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """One global batch, split into microbatches: row r of the batch is microbatch r // rows, row r % rows."""

    inputs: jax.Array  # int32 [microbatches, rows, S]: tokens 0..S-1 of each sample
    targets: jax.Array  # int32 [microbatches, rows, S]: tokens 1..S, what follows each input
    weights: jax.Array  # float32 [microbatches, rows, S]: weight of each target in the loss; Amber: all 1
