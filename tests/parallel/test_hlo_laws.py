"""What the train step communicates, as the TPU compiler has it: counted in programs for eight chips."""

import dataclasses
import functools
import math
import re

import jax
import pytest

from amber_jax.recipes import amber_tiny
from crystal_jax.recipes import crystal_tiny
from parallel import compiler, hlo
from parallel.axes import FSDP, PIPELINE, TENSOR
from parallel.mesh import MeshConfig
from training import ahead

pytestmark = pytest.mark.skipif(compiler.missing("v5e") is not None, reason="libtpu is not installed")

LAYERS, EMBED, HEADS, WIDTH, MLP, VOCAB, SEQUENCE, BATCH = 4, 256, 4, 64, 640, 1536, 256, 16

#: Elements of the matrices of a layer, and of the embedding and the head together.
LAYER = 4 * EMBED * HEADS * WIDTH + 3 * EMBED * MLP
ENDS = 2 * VOCAB * EMBED


PLANS = {
    "layer": ("fsdp=4,tensor=2", {"gather": "layer", "microbatches": 1}),
    "once": ("fsdp=4,tensor=2", {"gather": "once", "microbatches": 2}),
    "gpipe": ("pipeline=2,fsdp=2,tensor=2", {"gather": "once", "microbatches": 4}),
    "1f1b": ("pipeline=2,fsdp=2,tensor=2", {"gather": "once", "microbatches": 4, "schedule": "1f1b"}),
}
EFFORT = float(compiler.ENVIRONMENT["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"])


def compiled(mesh, execution, batch=BATCH, recipe=amber_tiny):
    """(config, mesh, program) of the train step on v5e:2x4. Weights and activations are bfloat16."""
    recipe = recipe()
    model = dataclasses.replace(
        recipe.model, vocab_size=VOCAB, num_layers=LAYERS, embed=EMBED, num_heads=HEADS, head_dim=WIDTH, mlp=MLP
    )
    given = {"compute_dtype": "bfloat16", "remat": "full", "loss_chunks": 2, "attention": "reference", **execution}
    config = dataclasses.replace(
        recipe,
        model=model,
        mesh=MeshConfig.parse(mesh),
        data=dataclasses.replace(recipe.data, global_batch=batch, sequence_length=SEQUENCE),
        execution=dataclasses.replace(recipe.execution, **given),
    )
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", EFFORT)
    try:
        config, built, traced = ahead.trace(config, "v5e:2x4")
        return config, built, traced.lower().compile()
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


@functools.cache
def step(plan):
    """(config, collectives, every array) of a plan's program."""
    config, built, program = compiled(*PLANS[plan])
    text = program.as_text()
    return config, hlo.collectives(text, built.shape), set(hlo.arrays(text))


def of(found, kind, *axes):
    return [c for c in found if c.kind == kind and c.axes == axes]


def elements(collectives):
    """Elements that their results have, over all executions."""
    return sum(math.prod(a.shape) * c.executions for c in collectives for a in c.results)


def stream(config):
    """Elements of the residual stream of one microbatch on one device, rows whole and split over ``tensor``."""
    mesh = config.mesh
    rows = BATCH // config.execution.microbatches // (mesh.data * mesh.fsdp)
    return rows * SEQUENCE * EMBED, rows * SEQUENCE // mesh.tensor * EMBED


@pytest.mark.parametrize("plan", ["layer", "once", "gpipe"])
def test_no_activation_is_all_reduced(plan):
    """Over ``tensor`` only numbers per position and row are: of the loss, the norms and the gradient's norm."""
    config, found, _ = step(plan)
    reduced = [a for c in found if c.kind == "all-reduce" and TENSOR in c.axes for a in c.results]
    assert reduced
    assert max(math.prod(a.shape) for a in reduced) < stream(config)[1]


@pytest.mark.parametrize("plan", ["layer", "once", "gpipe"])
def test_a_layer_gathers_six_times_and_scatters_five(plan):
    """Forward: before attention and MLP a gather, behind them a scatter. Again for the backward pass, but for the last
    scatter, whose result nobody reads. Backward: each is the other's transpose, and the matrices' gradients need the
    input of both once more, which the second forward pass has."""
    config, found, _ = step(plan)
    whole, part = stream(config)
    passes = config.execution.microbatches if config.mesh.pipeline == 1 else config.execution.microbatches + 1
    for kind, size, times in (("all-gather", whole, 6), ("reduce-scatter", part, 5)):
        layer = [c for c in of(found, kind, TENSOR) if c.executions == passes * LAYERS // config.mesh.pipeline]
        assert len(layer) == times
        assert elements(layer) == times * passes * LAYERS // config.mesh.pipeline * size
        assert {a.dtype for c in layer for a in c.results} == {"bf16"}


@pytest.mark.parametrize("plan", ["layer", "once", "gpipe"])
def test_no_logits_over_the_whole_vocabulary(plan):
    config, _, arrays = step(plan)
    part = VOCAB // config.mesh.tensor
    assert not [a for a in arrays if VOCAB in a.shape]
    logits = [a for a in arrays if a.shape[-1:] == (part,) and math.prod(a.shape[:-1]) > EMBED]
    positions = stream(config)[0] // EMBED
    assert all(math.prod(a.shape[:-1]) <= positions // config.execution.loss_chunks for a in logits)


def test_once_gathers_every_weight_once():
    config, found, _ = step("once")
    gathers = of(found, "all-gather", FSDP)
    assert {c.loops for c in gathers} == {()}
    assert {a.dtype for c in gathers for a in c.results} == {"bf16"}
    assert elements(gathers) == (LAYERS * LAYER + ENDS) // config.mesh.tensor


def test_layer_gathers_in_each_layer_and_again_for_the_backward_pass():
    config, found, _ = step("layer")
    gathers = of(found, "all-gather", FSDP)
    inside = [c for c in gathers if c.loops == (LAYERS,)]
    assert len(inside) == 2 * 7
    assert elements(inside) == 2 * LAYERS * LAYER // config.mesh.tensor
    assert {c.loops for c in gathers if c not in inside} == {()}
    assert elements(gathers) - elements(inside) == ENDS // config.mesh.tensor


def test_gradients_are_reduced_once_in_float32():
    for plan in ("once", "gpipe"):
        config, found, _ = step(plan)
        reduced = [c for kind in ("reduce-scatter", "all-reduce") for c in of(found, kind, FSDP)]
        assert {c.loops for c in reduced} == {()}
        assert {a.dtype for c in reduced for a in c.results} == {"f32"}
        shares = config.mesh.fsdp * config.mesh.tensor
        summed = sum(
            math.prod(a.shape) / (1 if c.kind == "reduce-scatter" else config.mesh.fsdp)
            for c in reduced
            for a in c.results
            if math.prod(a.shape) > LAYERS * EMBED  # not the gains of the norms
        )
        assert summed == pytest.approx((LAYERS // config.mesh.pipeline * LAYER + ENDS) / shares, rel=1e-3)


def test_a_pipeline_passes_on_activations_and_gathers_only_outside():
    config, found, _ = step("gpipe")
    microbatches, part = config.execution.microbatches, stream(config)[1]
    assert all(c.loops == () for c in found if PIPELINE in c.axes and c.kind != "collective-permute")
    gathers = of(found, "all-gather", PIPELINE)
    assert [elements([c]) for c in gathers] == [microbatches * part] * 2  # the embedding's, and the loss's cotangent
    assert len(of(found, "reduce-scatter", PIPELINE)) == 2  # what left the last stage, and the embedding's cotangent
    permutes = of(found, "collective-permute", PIPELINE)
    ticks = microbatches + config.mesh.pipeline - 1
    assert [(c.loops, elements([c])) for c in permutes] == [((ticks,), ticks * part)] * 2  # there and back


def test_1f1b_gathers_nothing_over_the_pipeline():
    config, found, _ = step("1f1b")
    assert not of(found, "all-gather", PIPELINE)
    ticks = config.execution.microbatches + 2 * (config.mesh.pipeline - 1)
    permutes = of(found, "collective-permute", PIPELINE)
    assert [(c.loops, elements([c])) for c in permutes] == [((ticks,), ticks * stream(config)[1])] * 2
    assert {c.loops for c in of(found, "all-gather", FSDP)} == {()}


@pytest.mark.parametrize("recipe", [amber_tiny, crystal_tiny], ids=lambda recipe: recipe.__name__)
def test_nothing_sums_over_tokens_in_bfloat16(recipe):
    """No scatter-add, which the embedding's gradient was, and no reduction, which those of biases were."""
    config, _, program = compiled(*PLANS["layer"], recipe=recipe)
    text = program.as_text()
    shapes = {
        name: [int(n) for n in dims.split(",") if n] for name, dims in re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", text)
    }
    assert re.search(r"= f32\[[\d,]*\]\S* scatter\(", text), "there is a scatter-add to look at"
    assert not re.findall(r"= bf16\[[\d,]*\]\S* scatter\(", text)
    tokens = stream(config)[1] // EMBED  # of a device, where fewest: rows that are split over tensor
    for result, operand in re.findall(
        r"%([\w.-]+) = bf16\[[\d,]*\]\S* reduce\((?:\S+\[[\d,]*\]\S* )?%([\w.-]+),", text
    ):
        summed = math.prod(shapes[operand]) // max(1, math.prod(shapes[result]))
        assert summed < tokens, f"{operand} {shapes[operand]} is summed to {shapes[result]} in bfloat16"


@pytest.mark.parametrize(("schedule", "flat"), [("1f1b", True), ("gpipe", False)])
def test_the_memory_of_1f1b_does_not_grow_with_microbatches(schedule, flat):
    """Four times the microbatches, of as many rows: a little for their tokens; gpipe keeps a stream of each."""
    mesh, execution = PLANS["1f1b"]
    few, many = (
        compiled(mesh, {**execution, "schedule": schedule, "remat_stage": True, "microbatches": m}, batch=4 * m)[2]
        .memory_analysis()
        .peak_memory_in_bytes
        for m in (8, 32)
    )
    assert (many < 1.05 * few) == flat
