"""A recipe of one's own: a LLaMA of 1.1 billion parameters with grouped heads that reads 8,192 tokens.

python run.py plan examples/small_llama.py:small_llama --topology v5e:4x4
python run.py prepare examples/small_llama.py:small_llama --source text=FOLDER --out DATA
python run.py train examples/small_llama.py:small_llama --data DATA --run RUN
"""

import dataclasses

from amber_jax.recipes import amber_7b
from training.config import PhaseConfig, RunConfig


def small_llama() -> RunConfig:
    """Amber's recipe, but for the sizes, the batch and the learning rate; every field can still be set by a flag."""
    base = amber_7b()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, context_length=8192, num_layers=16, embed=2048, num_heads=16, num_kv_heads=8, head_dim=128,
            mlp=8192, rope_base=500_000.0,
        ),
        data=dataclasses.replace(
            base.data, global_batch=128, sequence_length=8192, chunks=None, samples_per_chunk=None,
            validation_per_source=256, validation_every=1,
        ),
        phases=(PhaseConfig(),),
        optimizer=dataclasses.replace(base.optimizer, peak_learning_rate=6e-4),
    )  # fmt: skip
