"""Whole runs of Amber, every number with its source (fact sheet = LLM360's published code and cards)."""

import dataclasses

from amber_jax.config import AmberConfig
from data.mixture import Part
from parallel.mesh import MeshConfig
from training.config import DataConfig, ExecutionConfig, GuardConfig, PhaseConfig, RunConfig, SeriesConfig
from training.optimizer import AdamWConfig

#: Billions of tokens of each source, in the order in which chunks hold them (fact sheet 3.1, 3.3). Nothing is drawn by
#: these weights: `prepare` spreads all windows of every source over the chunks. They are what the shares came to, for
#: comparison with data prepared anew.
MIXTURE = (
    Part("arxiv", 30.00),
    Part("book", 28.86),
    Part("c4", 197.67),
    Part("refinedweb", 665.01),
    Part("stackexchange", 21.75),
    Part("starcoderdata", 291.92),
    Part("wikipedia", 23.90),
)


def amber_7b() -> RunConfig:
    """Amber as LLM360 trained it: LLaMA-7B, 1.26T tokens in 360 chunks, one checkpoint after each."""
    return RunConfig(
        recipe="amber_7b",
        model=AmberConfig(  # fact sheet 1.1 to 1.5
            vocab_size=32000,
            context_length=2048,
            num_layers=32,
            embed=4096,
            num_heads=32,
            head_dim=128,
            mlp=11008,
            norm_eps=1e-6,
            rope_base=10000.0,
            init_std=0.02,
            padding_id=0,
        ),
        data=DataConfig(
            layout="chunks",
            global_batch=2240,  # 224 GPUs x 10 (fact sheet 2.1)
            sequence_length=2048,
            chunks=360,
            samples_per_chunk=1_706_976,  # fact sheet 3.1; 762 steps, 96 samples left
            validation_per_source=102_400,  # fact sheet 3.3
            validation_every=46,  # ours: one batch of each source; all of them would be a tenth of the run
            seed=11111,
            workers=4,
        ),
        phases=(PhaseConfig(mixture=MIXTURE),),  # one; a checkpoint after every chunk
        optimizer=AdamWConfig(  # fact sheet 2.1
            peak_learning_rate=3e-4,
            final_learning_rate=3e-5,
            warmup_steps=2000,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        loss_over="targets",
        execution=ExecutionConfig(  # bf16 compute, float32 master weights, activation checkpointing per layer
            compute_dtype="bfloat16", microbatches=1, gather="layer", remat="full", loss_chunks=8
        ),
        series=SeriesConfig(rolling_every_steps=100),
        guard=GuardConfig(),
        mesh=MeshConfig.parse("auto"),
        seed=11111,
    )


def amber_tiny() -> RunConfig:
    """The same architecture and optimizer at a size that a laptop trains in minutes, in float32.

    The learning rate is our choice for the size (a narrower model bears a larger one); betas, decay, clipping,
    the shape of the schedule and one checkpoint per chunk are Amber's.
    """
    return RunConfig(
        recipe="amber_tiny",
        model=AmberConfig(
            vocab_size=2048,
            context_length=256,
            num_layers=4,
            embed=128,
            num_heads=4,
            head_dim=32,
            mlp=344,
            norm_eps=1e-6,
            rope_base=10000.0,
            init_std=0.02,
            padding_id=0,
        ),
        data=DataConfig(
            layout="chunks",
            global_batch=16,
            sequence_length=256,
            chunks=12,
            samples_per_chunk=None,
            validation_per_source=16,
            seed=11111,
        ),
        phases=(PhaseConfig(),),  # one; a checkpoint after every chunk
        optimizer=AdamWConfig(
            peak_learning_rate=2e-3,
            final_learning_rate=2e-4,
            warmup_steps=30,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        loss_over="targets",
        execution=ExecutionConfig(compute_dtype="float32", microbatches=1, gather="layer", remat="none", loss_chunks=1),
        series=SeriesConfig(rolling_every_steps=20),
        guard=GuardConfig(),
        mesh=MeshConfig(data=-1),
        seed=11111,
    )


def amber_360() -> RunConfig:
    """Amber's whole series, 360 checkpoints and the one before the first step, of a toy model.

    Every chunk is two steps; everything else about the series is `amber_7b`'s. With ``--data synthetic`` nothing has to
    be prepared.
    """
    tiny = amber_tiny()
    return dataclasses.replace(
        tiny,
        recipe="amber_360",
        model=dataclasses.replace(
            tiny.model, vocab_size=256, context_length=32, num_layers=2, embed=32, num_heads=4, head_dim=8, mlp=88
        ),
        data=dataclasses.replace(tiny.data, global_batch=8, sequence_length=32, chunks=360, samples_per_chunk=16),
        series=SeriesConfig(rolling_every_steps=20),
    )
