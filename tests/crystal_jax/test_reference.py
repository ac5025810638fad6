"""The NumPy reference against vectors made with the original modelling code, and what it reads and holds."""

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from crystal_jax.convert import FORMAT
from crystal_jax.reference import logits
from errors import UserError
from huggingface.folder import Folder

GOLDEN = Path(__file__).parent.parent / "golden"
SETS = sorted(p.name for p in GOLDEN.glob("crystal-*"))


def test_all_sets_are_there():
    assert len(SETS) == 4


@pytest.mark.parametrize("name", SETS)
def test_logits(name):
    folder, vectors = Folder(GOLDEN / name), np.load(GOLDEN / name / "vectors.npz")
    result = logits(folder.config, folder.read, vectors["input_ids"])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, vectors["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_reads_each_tensor_once_layer_by_layer(name):
    folder, names = Folder(GOLDEN / name), []

    def read(name):
        names.append(name)
        return folder.read(name)

    logits(folder.config, read, np.zeros((1, 2), np.int32))
    table = [t.theirs for t in FORMAT.tensors(FORMAT.config_from_hf(folder.config))]
    assert names == [*table, table[0]]  # the head is the embedding


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_weights_are_widened_not_computed_with(dtype):
    folder, vectors = Folder(GOLDEN / "crystal-a"), np.load(GOLDEN / "crystal-a" / "vectors.npz")
    half = {name: folder.read(name).astype(dtype) for name in folder.tensors}
    wide = {name: value.astype(np.float32) for name, value in half.items()}
    first, second = (logits(folder.config, w.__getitem__, vectors["input_ids"]) for w in (half, wide))
    np.testing.assert_array_equal(first, second)


def test_holds_one_tensor():
    """29 MB of bfloat16 weights, the largest 2 MB: at most that one and its float32 copy are in memory."""
    config = Folder(GOLDEN / "crystal-a").config | {
        "vocab_size": 2048,
        "n_embd": 512,
        "n_inner": 1366,
        "n_layer": 4,
        "n_head": 8,
    }
    shapes = {t.theirs: t.shape for t in FORMAT.tensors(FORMAT.config_from_hf(config))}
    sizes = [2 * int(np.prod(s)) for s in shapes.values()]
    assert sum(sizes) > 12 * max(sizes)
    tracemalloc.start()
    try:
        logits(config, lambda name: np.zeros(shapes[name], ml_dtypes.bfloat16), np.zeros((1, 4), np.int32))
        assert tracemalloc.get_traced_memory()[1] < 3.1 * max(sizes)
    finally:
        tracemalloc.stop()


def test_another_shape_is_named():
    folder = Folder(GOLDEN / "crystal-a")
    with pytest.raises(
        UserError, match=r"'transformer.h.1.attn.c_proj.weight' has shape \[32, 31\], but config.json says \[32, 32\]"
    ):
        logits(
            folder.config,
            lambda n: folder.read(n)[:, :31] if n == "transformer.h.1.attn.c_proj.weight" else folder.read(n),
            np.zeros((1, 2), int),
        )
