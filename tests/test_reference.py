"""The NumPy references against vectors made with the original modelling code, and what they read and hold."""

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from amber_jax.convert import FORMAT as AMBER
from crystal_jax.convert import FORMAT as CRYSTAL
from errors import UserError
from huggingface.folder import Folder

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))
SMALLEST = ["llama-a", "crystal-a"]


def form_of(name):
    return AMBER if name.startswith("llama") else CRYSTAL


def test_all_sets_are_there():
    assert len(SETS) == 9


@pytest.mark.parametrize("name", SETS)
def test_logits(name):
    folder, vectors = Folder(GOLDEN / name), np.load(GOLDEN / name / "vectors.npz")
    result = form_of(name).reference(folder.config, folder.read, vectors["input_ids"])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, vectors["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_reads_each_tensor_once_layer_by_layer(name):
    folder, form, names = Folder(GOLDEN / name), form_of(name), []

    def read(tensor):
        names.append(tensor)
        return folder.read(tensor)

    form.reference(folder.config, read, np.zeros((1, 2), np.int32))
    table = [t.theirs for t in form.tensors(form.config_from_hf(folder.config))]
    assert names == table + (table[:1] if form is CRYSTAL else []), "Crystal's head is the embedding"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", SMALLEST)
def test_half_precision_weights_are_widened_not_computed_with(name, dtype):
    folder, tokens = Folder(GOLDEN / name), np.load(GOLDEN / name / "vectors.npz")["input_ids"]
    half = {tensor: folder.read(tensor).astype(dtype) for tensor in folder.tensors}
    wide = {tensor: value.astype(np.float32) for tensor, value in half.items()}
    first, second = (form_of(name).reference(folder.config, w.__getitem__, tokens) for w in (half, wide))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "wider"),
    [
        ("llama-a", {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}),
        ("crystal-a", {"n_embd": 512, "n_inner": 1366, "n_layer": 4, "n_head": 8}),
    ],
)
def test_holds_one_tensor(name, wider):
    """29 MB of bfloat16 weights, the largest 2 MB: at most that one and its float32 copy are in memory."""
    form, config = form_of(name), Folder(GOLDEN / name).config | wider | {"vocab_size": 2048}
    shapes = {t.theirs: t.shape for t in form.tensors(form.config_from_hf(config))}
    sizes = [2 * int(np.prod(s)) for s in shapes.values()]
    assert sum(sizes) > 8 * max(sizes)
    tracemalloc.start()
    try:
        form.reference(config, lambda n: np.zeros(shapes[n], ml_dtypes.bfloat16), np.zeros((1, 4), np.int32))
        assert tracemalloc.get_traced_memory()[1] < 3.1 * max(sizes)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama-a", "model.layers.1.self_attn.o_proj.weight"), ("crystal-a", "transformer.h.1.attn.c_proj.weight")],
)
def test_another_shape_is_named(name, tensor):
    folder = Folder(GOLDEN / name)
    read = lambda n: folder.read(n)[:, :31] if n == tensor else folder.read(n)  # noqa: E731
    with pytest.raises(UserError, match=rf"'{tensor}' has shape \[32, 31\], but config.json says \[32, 32\]"):
        form_of(name).reference(folder.config, read, np.zeros((1, 2), int))
