"""Whole runs of CrystalCoder, every number with its source (fact sheet = LLM360's published code, configs, cards)."""

from crystal_jax.config import CrystalConfig
from crystal_jax.optimizer import LinearSchedule, MupAdamWConfig
from parallel.mesh import MeshConfig
from training.config import DataConfig, ExecutionConfig, PhaseConfig, RunConfig, SeriesConfig

#: Sources and weights of each phase at full precision (fact sheet 3.4). Phase 1 reads one half of SlimPajama, phase 2
#: the other and StarCoder with FIM, phase 3 web languages, a tenth of SlimPajama without GitHub, a tenth of StarCoder.
MIXTURES = (
    (
        ("ArXiv", 0.043251179622600486, 0.0, 1.0),
        ("Book", 0.0413121881861869, 0.0, 1.0),
        ("C4", 0.2665010054745754, 0.0, 1.0),
        ("CommonCrawl", 0.5334581653397988, 0.0, 1.0),
        ("Github", 0.04962588209760537, 0.0, 1.0),
        ("StackExchange", 0.03168034115317788, 0.0, 1.0),
        ("Wikipedia", 0.03417123812605512, 0.0, 1.0),
    ),
    (
        ("ArXiv", 0.016083857723861224, 0.0, 1.0),
        ("Book", 0.015358576352403003, 0.0, 1.0),
        ("C4", 0.09909981505117808, 0.0, 1.0),
        ("CommonCrawl", 0.1983897689052003, 0.0, 1.0),
        ("Github", 0.018454606218343703, 0.0, 1.0),
        ("StackExchange", 0.011784941022274698, 0.0, 1.0),
        ("Wikipedia", 0.012710859995188247, 0.0, 1.0),
        ("StarCoder_fim_shuffled", 0.6281175747315507, 0.0, 1.0),
    ),
    (
        ("css", 0.08792775542527535, 0.0, 1.0),
        ("javascript", 0.18370762129027085, 0.0, 1.0),
        ("html", 0.18536747298179254, 0.0, 1.0),
        ("python", 0.34270089587947816, 0.0, 1.0),
        ("ArXiv", 0.016663255966286664, 0.0, 0.1),
        ("Book", 0.00831444671835677, 0.0, 0.1),
        ("C4", 0.01685693658811707, 0.0, 0.1),
        ("CommonCrawl", 0.058282893778895735, 0.0, 0.1),
        ("StackExchange", 0.008379821974060706, 0.0, 0.1),
        ("Wikipedia", 0.05835852419497722, 0.0, 0.1),
        ("StarCoder_fim_train_shuffled", 0.0334403752024888, 0.0, 0.1),
    ),
)


def crystal_7b() -> RunConfig:
    """CrystalCoder as LLM360 trained it: 1.39T tokens in three phases, a series of 143 checkpoints.

    No published rule gives 143 (fact sheet 4.2). Ours: every 1500, 3000 and 1700 steps of the three phases and the last
    step of each: 53 + 1, 71 + 1 and 16 + 1. It holds every published name that the fact sheet lists. Another cadence is
    another ``series_every_steps``.
    """
    mixture1, mixture2, mixture3 = MIXTURES
    return RunConfig(
        recipe="crystal_7b",
        model=CrystalConfig(  # fact sheet 1.1, 1.6 and 1.8
            vocab_size=32032,
            context_length=2048,
            num_layers=32,
            embed=4096,
            num_heads=32,
            head_dim=128,
            mlp=10922,
            norm_eps=1e-5,
            rope_base=10000.0,
            rotary_dims=32,
            embedding_multiplier=14.6,
            output_multiplier=2.22,
            width_multiplier=0.0625,
            init_std=0.073,
        ),
        data=DataConfig(
            global_batch=2112,  # fact sheet 2.2: 4,325,376 tokens
            sequence_length=2048,
            chunks=None,
            samples_per_chunk=None,
            validation_per_source=0,
            seed=1,
            workers=4,
        ),
        phases=(  # steps: fact sheet 2.3
            PhaseConfig(steps=79_721, series_every_steps=1500, mixture=mixture1),
            PhaseConfig(steps=214_387, series_every_steps=3000, mixture=mixture2),
            PhaseConfig(steps=27_728, series_every_steps=1700, mixture=mixture3),
        ),
        optimizer=MupAdamWConfig(  # fact sheet 2.2 and 2.3
            beta1=0.9,
            beta2=0.95,
            eps=1e-9,
            weight_decay=0.1,
            clip_norm=1.0,
            kernel_multiplier=0.0625,
            schedules=(
                LinearSchedule(peak=0.012, final=0.00012408, warmup_steps=86, decay_steps=294_337),
                LinearSchedule(peak=0.0087825, final=0.00013679, warmup_steps=86, decay_steps=214_301),
                LinearSchedule(peak=0.002, final=0.0002, warmup_steps=276, decay_steps=27_452),
            ),
        ),
        loss_over="positions",  # fact sheet 2.2: masked targets lower the loss, it is not renormalised
        execution=ExecutionConfig(
            compute_dtype="bfloat16", microbatches=1, gather="layer", remat="full", loss_chunks=8
        ),
        series=SeriesConfig(rolling_every_steps=100),
        mesh=MeshConfig(fsdp=-1),
        seed=1,
    )


def crystal_tiny() -> RunConfig:
    """The same architecture, optimizer and three phases at a size that a laptop trains in minutes, in float32.

    Multipliers follow from the width by muP, as the 7B's do: base width 256, so 2 here. Shares of the phases, warm-up
    and peaks are ours; the ratios between the phases' rates are CrystalCoder's.
    """
    return RunConfig(
        recipe="crystal_tiny",
        model=CrystalConfig(
            vocab_size=2048,
            context_length=256,
            num_layers=4,
            embed=128,
            num_heads=4,
            head_dim=32,
            mlp=342,  # as at 7B, no multiple of 4
            norm_eps=1e-5,
            rope_base=10000.0,
            rotary_dims=8,
            embedding_multiplier=14.6,
            output_multiplier=2.22,
            width_multiplier=2.0,
            init_std=0.073,
        ),
        data=DataConfig(
            global_batch=16,
            sequence_length=256,
            chunks=12,
            samples_per_chunk=None,
            validation_per_source=16,
            seed=1,
        ),
        phases=(PhaseConfig(chunks=4), PhaseConfig(chunks=6), PhaseConfig(chunks=2)),
        optimizer=MupAdamWConfig(
            beta1=0.9,
            beta2=0.95,
            eps=1e-9,
            weight_decay=0.1,
            clip_norm=1.0,
            kernel_multiplier=2.0,
            schedules=(
                LinearSchedule(peak=0.004, final=0.0028, warmup_steps=20, decay_steps=None),
                LinearSchedule(peak=0.0028, final=0.0001, warmup_steps=10, decay_steps=None),
                LinearSchedule(peak=0.0006, final=0.00006, warmup_steps=10, decay_steps=None),
            ),
        ),
        loss_over="positions",
        execution=ExecutionConfig(compute_dtype="float32", microbatches=1, gather="layer", remat="none", loss_chunks=1),
        series=SeriesConfig(rolling_every_steps=20),
        mesh=MeshConfig(data=-1),
        seed=1,
    )
