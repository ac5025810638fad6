"""The safetensors format, against its reference implementation and against damage."""

import json
import os
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from errors import RunError, UserError
from huggingface import safetensors as ours
from huggingface import tensors
from tests.huggingface import made


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((4, 6))
    return {
        "f32": normal.astype(np.float32),
        "bf16": normal.astype(ml_dtypes.bfloat16),
        "f16": normal.astype(np.float16),
        "f64": normal,
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "bool": normal[0] > 0,
        **{
            dtype: rng.integers(0, 100, (3,)).astype(dtype)
            for dtype in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
        },
    }


def test_reads_what_the_reference_writes(arrays, tmp_path):
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = ours.scan(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        info = found[name]
        assert (info.dtype, info.shape, info.nbytes) == (array.dtype, array.shape, array.nbytes)
        read = tensors.read(info)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert read.flags.c_contiguous
        assert read.flags.writeable


def test_memory_is_one_copy(tmp_path):
    array = np.zeros((1024, 2048), np.float32)
    safetensors.numpy.save_file({"w": array, "v": array}, tmp_path / "a.safetensors")
    tracemalloc.start()
    tensors.read(ours.scan(tmp_path / "a.safetensors")["w"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.05 * array.nbytes


def test_memory_of_a_transposed_view_is_one_copy_and_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE", 2**18)
    array = np.arange(2**21, dtype=np.float32).reshape(1024, 2048)
    array.tofile(tmp_path / "raw")
    info = tensors.TensorInfo(tmp_path / "raw", array.dtype, (2048, 1024), 0, (1, 2048))
    tracemalloc.start()
    read = tensors.read(info)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(read, array.T)
    assert peak < 1.1 * array.nbytes


# ---- wrong -----------------------------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": F32}, bytes(7), "truncated: the header says [0-9]+ bytes, the file has [0-9]+; fetch"),
        ({"w": F32}, bytes(9), "has 1 bytes after the last tensor"),
        ({"w": F32 | {"dtype": "F99"}}, bytes(8), "'w' has dtype 'F99'; known are BOOL, U8,"),
        ({"w": F32 | {"dtype": ["F32"]}}, bytes(8), "'w' is not described by a dtype, a shape and two data_offsets"),
        ({"w": F32 | {"shape": [3]}}, bytes(8), r"'w' lies in bytes 0 to 8, but F32 \[3\] takes 12 bytes"),
        ({"w": F32 | {"data_offsets": [8, 0]}}, bytes(8), "'w' lies in bytes 8 to 0, but"),
        ({"w": F32 | {"data_offsets": [-8, 0]}}, bytes(8), "'w' lies in bytes -8 to 0, but"),
        ({"w": F32 | {"shape": [-2]}}, bytes(8), "'w' is not described"),
        ({"w": F32 | {"shape": [True, 2]}}, bytes(8), "'w' is not described"),
        ({"w": F32 | {"shape": [0, 2**62]}}, bytes(8), "'w' is not described"),
        ({"w": F32 | {"shape": [1] * 40}}, bytes(8), "'w' is not described"),
        ({"w": F32 | {"shape": "2"}}, bytes(8), "'w' is not described"),
        ({"w": F32 | {"data_offsets": [0]}}, bytes(8), "'w' is not described"),
        ({"w": {"dtype": "F32"}}, bytes(8), "'w' is not described"),
        ({"w": 3}, bytes(8), "'w' is not described"),
        ({"v": F32, "w": F32}, bytes(8), "'w' overlaps the tensor before it"),
        ({"v": F32, "w": F32 | {"data_offsets": [4, 12]}}, bytes(12), "'w' overlaps the tensor before it"),
        ({"v": F32, "w": F32 | {"data_offsets": [9, 17]}}, bytes(17), "'w' has unused bytes before it"),
        ({"w": F32 | {"data_offsets": [1, 9]}}, bytes(9), "'w' has unused bytes before it"),
        (b'{"w":{},"w":{}}', b"", r"its header is not valid JSON \('w' is in it twice\)"),
        (b'{"w":', b"", "its header is not valid JSON"),
        (b"\xff\xfe{}", b"", "its header is not valid JSON"),
        (b"[" * 100_000, b"", "its header is not valid JSON"),
        (b"1" * 5000, b"", "its header is not valid JSON"),
        (b"[]", b"", "its header is a JSON list, not an object"),
        (b"", b"", "its header is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said(header, data, message, tmp_path):
    file = made.safetensors(tmp_path / "a.safetensors", header, data)
    with pytest.raises(UserError, match=message) as caught:
        ours.scan(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_lengths_of_the_header(tmp_path):
    file = made.safetensors(tmp_path / "a.safetensors", {}, length=1000)
    with pytest.raises(UserError, match="truncated: the header says 1,008 bytes, the file has 10"):
        ours.scan(file)
    made.safetensors(file, {}, length=2**63)
    with pytest.raises(UserError, match="is not a safetensors file: its header would have 9,223,372,036,854,775,808"):
        ours.scan(file)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="truncated: the header says 8 bytes, the file has 5"):
        ours.scan(file)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    file = made.safetensors(tmp_path / "a.safetensors", {"w": F32}, bytes(8))
    info = ours.scan(file)["w"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(RunError, match="became shorter after it was opened"):
        tensors.read(info)
    file.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        tensors.read(info)


def test_cut_anywhere(arrays, tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, file)
    for size in reversed(range(file.stat().st_size)):
        os.truncate(file, size)
        with pytest.raises(UserError):
            ours.scan(file)


def test_flipped_anywhere_it_is_refused_or_read(arrays, tmp_path):
    rng, file = random.Random(0), tmp_path / "a.safetensors"
    whole = safetensors.numpy.save(arrays)
    for _ in range(3000):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            found = ours.scan(file)
        except UserError:
            continue
        for info in found.values():
            assert tensors.read(info).shape == info.shape


def test_the_header_is_padded(arrays):
    for n in range(1, 9):
        start, size = ours.header({"x" * n: (np.dtype(np.float32), (2, 3))}, {"format": "pt"})
        assert len(start) % 8 == 0
        assert size == len(start) + 24
        assert json.loads(start[8:])["x" * n] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
