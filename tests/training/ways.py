"""Every way to carry out a step, in one table, and what the tests of it share: sizes, first states, batches."""

import dataclasses
import functools

import jax
import numpy as np

from crystal_jax.recipes import crystal_tiny
from data.batch import Batch
from parallel.mesh import MeshConfig
from training.state import TrainState, abstract_state, init_state, shardings
from training.step import batch_sharding, make_train_step

STEPS = 20
ROWS = 16
#: (mesh, microbatches, how): nine meshes; every schedule, gather mode and rematerialisation at least once. All pairs
#: are in test_meshes.py, marked slow.
WAYS = [
    ("data=8", 2, {"gather": "once"}),
    ("fsdp=8", 2, {"gather": "tick", "remat": "full", "remat_stage": True}),
    ("tensor=8", 4, {"remat": "dots", "loss_chunks": 4}),
    ("data=2,fsdp=2,tensor=2", 2, {"gather": "layer", "remat": "full", "loss_chunks": 4}),
    ("data=2,fsdp=2,tensor=2", 1, {"gather": "once", "remat": "full", "loss_chunks": 2}),
    ("pipeline=8", 8, {"gather": "once", "remat": "full", "remat_stage": True}),
    ("pipeline=8", 16, {"schedule": "1f1b"}),
    ("pipeline=2,fsdp=2,tensor=2", 4, {"schedule": "1f1b", "loss_chunks": 2}),
    ("pipeline=2,fsdp=2,tensor=2", 4, {"schedule": "1f1b", "gather": "tick", "skip_idle": False}),
    ("pipeline=2,data=2,fsdp=2", 4, {"repeats": 2, "gather": "tick", "remat_stage": True}),
    ("pipeline=4,tensor=2", 8, {"schedule": "1f1b", "gather": "once", "remat": "dots"}),
    ("pipeline=4,tensor=2", 4, {"repeats": 2, "gather": "once", "remat": "dots", "remat_stage": True}),
    ("pipeline=2,data=2,tensor=2", 2, {"remat": "offload"}),
]
CRYSTAL = [
    ("tensor=2", 1, {}),
    ("tensor=8", 1, {"gather": "once"}),
    ("pipeline=2,tensor=4", 2, {"schedule": "1f1b", "gather": "once"}),
    ("pipeline=2,fsdp=2,tensor=2", 4, {"repeats": 2, "gather": "tick"}),
    ("pipeline=8", 8, {}),
]


def deep(config):
    """Eight layers and sixteen rows, so that eight stages hold one layer each and sixteen microbatches a row."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=8),
        data=dataclasses.replace(config.data, global_batch=ROWS),
    )


def crystal():
    """crystal_tiny at that size; no tensor degree above 2 divides its MLP."""
    recipe = crystal_tiny()
    model = dataclasses.replace(
        recipe.model, vocab_size=64, context_length=32, num_layers=8, embed=32, num_heads=8, head_dim=4, mlp=46,
        rotary_dims=2,
    )  # fmt: skip
    data = dataclasses.replace(recipe.data, global_batch=ROWS, sequence_length=32)
    return dataclasses.replace(recipe, model=model, data=data)


def mesh_of(text):
    degrees = MeshConfig.parse(text)
    return degrees.build(jax.devices()[: degrees.size])


def optimizer_of(config):
    return config.optimizer.make((STEPS,) * len(config.phases))


@functools.cache
def _first_arrays(config):
    state = init_state(config.model, optimizer_of(config), mesh_of("data=1"), config.seed)
    return jax.tree.map(np.asarray, state)


def first_state(config, mesh) -> TrainState:
    """The state before the first step, made on one device: that it is the same on all is a law of its own."""
    return jax.device_put(_first_arrays(config), shardings(abstract_state(config.model, optimizer_of(config), mesh)))


def learnable(steps, rows, length, vocab):
    """Sequences that follow a rule with a little noise, so that the loss has somewhere to fall."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((steps, rows, length + 1), np.int32)
    tokens[..., 0] = rng.integers(vocab, size=(steps, rows))
    for t in range(length):
        noise = rng.random((steps, rows)) < 0.1
        tokens[..., t + 1] = np.where(noise, rng.integers(vocab, size=(steps, rows)), (5 * tokens[..., t] + 3) % vocab)
    return tokens


def batch_of(tokens, microbatches, mesh):
    """Rows of tokens [rows, S+1] that all count."""
    cut = tokens.reshape(microbatches, -1, tokens.shape[-1])
    batch = Batch(cut[..., :-1], cut[..., 1:], np.ones(cut[..., 1:].shape, np.float32))
    return jax.device_put(batch, batch_sharding(mesh))


def masked_batch(config, microbatches, mesh):
    """Random tokens, of which a fifth do not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.model.vocab_size, size=(ROWS, 33)).astype(np.int32).reshape(microbatches, -1, 33)
    weights = (rng.random((ROWS, 32)) < 0.8).astype(np.float32).reshape(microbatches, -1, 32)
    return jax.device_put(Batch(tokens[..., :-1], tokens[..., 1:], weights), batch_sharding(mesh))


def train_step_of(config, mesh, microbatches=1, **how):
    """The jitted step of a config that is carried out in some way; refuses what `train` refuses."""
    execution = dataclasses.replace(config.execution, microbatches=microbatches, **how)
    config = dataclasses.replace(config, execution=execution)
    config.check_mesh(mesh.shape)
    schedule = config.optimizer.schedule((STEPS,) * len(config.phases))
    return make_train_step(config.model, optimizer_of(config), schedule, execution.region, mesh, config.loss_over)


def check_gradients(found, expected, what):
    """Each tensor to 1e-5 of its largest."""
    ours, theirs = (jax.tree_util.tree_leaves_with_path(g) for g in (found, expected))
    for (path, g), (_, e) in zip(ours, theirs, strict=True):
        assert np.max(np.abs(g - e)) <= 1e-5 * np.max(np.abs(e)), f"{jax.tree_util.keystr(path)} of {what}"
