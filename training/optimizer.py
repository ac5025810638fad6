"""Amber's optimizer: optax AdamW, decay on every parameter, clip by the true global norm, warm-up and cosine."""

import optax

from training.config import OptimizerConfig


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of a 0-based step (fact sheet 2.1).

    Linear from exactly 0 to the peak over ``warmup_steps``, then ``final + (1 + cos(pi t)) / 2 * (peak - final)`` with
    t from 0 to 1 at ``total_steps``, then constant. A run shorter than its warm-up only warms up.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(total_steps, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW as in torch: decoupled decay times the learning rate, eps outside the bias correction."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
