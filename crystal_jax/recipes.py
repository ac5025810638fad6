"""Whole runs of CrystalCoder, every number with its source (fact sheet = LLM360's published code, configs, cards)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from crystal_jax.config import CrystalConfig
from crystal_jax.optimizer import LinearSchedule, MupAdamWConfig
from data.mixture import Part
from parallel.mesh import MeshConfig
from training.config import DataConfig, ExecutionConfig, GuardConfig, PhaseConfig, RunConfig, SeriesConfig


def _parts(weights: Mapping[str, float], **how: Any) -> tuple[Part, ...]:
    """Shuffled parts that are read alike: each domain by itself, its epochs together (fact sheet 3.7)."""
    return tuple(Part(name, weight, shuffle=True, **how) for name, weight in weights.items())


#: What each phase reads: weights at full precision (fact sheet 3.4), FIM and epochs (3.6).
MIXTURES = (
    _parts(
        {
            "ArXiv": 0.043251179622600486,
            "Book": 0.0413121881861869,
            "C4": 0.2665010054745754,
            "CommonCrawl": 0.5334581653397988,
            "Github": 0.04962588209760537,
            "StackExchange": 0.03168034115317788,
            "Wikipedia": 0.03417123812605512,
        },
        half="even",
    ),
    _parts(
        {
            "ArXiv": 0.016083857723861224,
            "Book": 0.015358576352403003,
            "C4": 0.09909981505117808,
            "CommonCrawl": 0.1983897689052003,
            "Github": 0.018454606218343703,
            "StackExchange": 0.011784941022274698,
            "Wikipedia": 0.012710859995188247,
        },
        half="odd",
    )
    + _parts({"StarCoder_fim_shuffled": 0.6281175747315507}, source="StarCoder", epochs=2, fim_rate=0.9),
    _parts(
        {
            "css": 0.08792775542527535,
            "javascript": 0.18370762129027085,
            "html": 0.18536747298179254,
            "python": 0.34270089587947816,
        },
        epochs=3,
        fim_rate=0.3,
    )
    + _parts(  # a tenth of SlimPajama without GitHub; of which half is not stated: ours is of all
        {
            "ArXiv": 0.016663255966286664,
            "Book": 0.00831444671835677,
            "C4": 0.01685693658811707,
            "CommonCrawl": 0.058282893778895735,
            "StackExchange": 0.008379821974060706,
            "Wikipedia": 0.05835852419497722,
        },
        stop=0.1,
    )
    + _parts(
        {"StarCoder_fim_train_shuffled": 0.0334403752024888}, source="StarCoder", epochs=2, fim_rate=0.9, stop=0.1
    ),
)

#: The same in small, over any prose, documentation and code (`--source prose=… --source docs=… --source code=…`): one
#: half, then the other with code to be filled in, then code with less of that and a tenth of the prose. Weights: ours.
TINY_MIXTURES = (
    _parts({"prose": 0.6, "docs": 0.4}, half="even"),
    _parts({"prose": 0.2, "docs": 0.15}, half="odd")
    + _parts({"code_fim": 0.65}, source="code", epochs=2, fim_rate=0.9),
    _parts({"code": 0.9}, epochs=3, fim_rate=0.3) + _parts({"prose": 0.1}, stop=0.1),
)

#: Of a checkpoint, as published (fact sheet 4.2).
NAME = "CrystalCoder_phase{phase}_checkpoint_{phase_step:06d}"


def crystal_7b() -> RunConfig:
    """CrystalCoder as LLM360 trained it: 1.39T tokens in three phases, a series of 143 checkpoints.

    No published rule gives 143 (fact sheet 4.2). Ours: every 1500, 3000 and 1700 steps of the three phases and the last
    step of each: 53 + 1, 71 + 1 and 16 + 1. It holds every published name that the fact sheet lists. Another cadence is
    another ``series_every_steps``.
    """
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
            layout="mixture",
            global_batch=2112,  # fact sheet 2.2: 4,325,376 tokens
            sequence_length=2048,
            chunks=None,
            samples_per_chunk=None,
            validation_per_source=0,
            seed=1,
            overlap=1,  # fact sheet 3.5, as the two that follow; SlimPajama's documents have no <s>: not known, ours
            file_samples=50_000,
            bos_sources=("StarCoder", "css", "javascript", "html", "python"),
            workers=4,
        ),
        phases=(  # steps: fact sheet 2.3
            PhaseConfig(steps=79_721, series_every_steps=1500, mixture=MIXTURES[0]),
            PhaseConfig(steps=214_387, series_every_steps=3000, mixture=MIXTURES[1]),
            PhaseConfig(steps=27_728, series_every_steps=1700, mixture=MIXTURES[2]),
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
        series=SeriesConfig(rolling_every_steps=100, name=NAME),
        guard=GuardConfig(),
        mesh=MeshConfig.parse("auto"),
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
            layout="mixture",
            global_batch=16,
            sequence_length=256,
            chunks=None,
            samples_per_chunk=None,
            validation_per_source=16,
            seed=1,
            overlap=1,
            file_samples=16,
            bos_sources=("code",),
        ),
        phases=tuple(PhaseConfig(chunks=n, mixture=m) for n, m in zip((4, 6, 2), TINY_MIXTURES, strict=True)),
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
        series=SeriesConfig(rolling_every_steps=20, name=NAME),
        guard=GuardConfig(),
        mesh=MeshConfig(data=-1),
        seed=1,
    )


def crystal_143() -> RunConfig:
    """CrystalCoder's whole series, 143 checkpoints over three phases, of a toy model.

    A checkpoint every two steps and at the end of each phase: 53 + 1, 71 + 1 and 16 + 1, as `crystal_7b`'s. With
    ``--data synthetic`` nothing has to be prepared.
    """
    tiny, steps = crystal_tiny(), (107, 143, 33)
    assert isinstance(tiny.model, CrystalConfig)  # for the type checker
    assert isinstance(tiny.optimizer, MupAdamWConfig)
    return dataclasses.replace(
        tiny,
        recipe="crystal_143",
        model=dataclasses.replace(
            tiny.model,
            vocab_size=256,
            context_length=32,
            num_layers=2,
            embed=32,
            num_heads=4,
            head_dim=8,
            mlp=86,
            rotary_dims=2,
            width_multiplier=8.0,
        ),
        data=dataclasses.replace(tiny.data, global_batch=8, sequence_length=32),
        phases=tuple(
            PhaseConfig(steps=n, series_every_steps=2, mixture=m) for n, m in zip(steps, TINY_MIXTURES, strict=True)
        ),
        optimizer=dataclasses.replace(tiny.optimizer, kernel_multiplier=8.0),
    )
