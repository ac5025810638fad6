"""What one training step reads: `data.sample.Sample`s of one global batch, on the devices."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """One global batch, split into microbatches: row r of the batch is microbatch r // rows, row r % rows.

    Where the batch does not fill them, the rows after its last are padding: zeros, of weight 0.
    """

    inputs: jax.Array  # int32 [microbatches, rows, S]
    targets: jax.Array  # int32 [microbatches, rows, S]: what follows each input
    weights: jax.Array  # float32 [microbatches, rows, S]: weight of each target in the loss; Amber: all 1
