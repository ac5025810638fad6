"""PyTorch files: every view is read right, nothing in them runs, and damage is a UserError."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from errors import UserError
from huggingface import pickles, tensors
from tests.huggingface import made

FIXTURES = Path(__file__).parent / "fixtures"
BASE = np.arange(24, dtype=np.float32)
VIEWS = {  # as in fixtures/make.py
    "whole": BASE.reshape(4, 6),
    "transposed": BASE.reshape(4, 6).T,
    "column": BASE.reshape(4, 6)[:, 2:5],
    "strided": BASE[1::3],
    "permuted": BASE.reshape(2, 3, 4).transpose(2, 0, 1),
    "scalar": BASE[7].reshape(()),
    "one": BASE[3].reshape(1, 1, 1),
    "parameter": BASE.reshape(4, 6)[1:3].T,
    "empty": np.empty((0, 3), np.float32),
    "half": np.arange(6).astype(np.float16).reshape(2, 3).T,
    "bf16": (np.arange(6) / 4).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "double": np.array([1.5, -2.5]),
    "bool": np.array([True, False, True]),
    "u8": np.arange(5, dtype=np.uint8),
    **{f"i{bits}": -np.arange(5, dtype=f"int{bits}") for bits in (8, 16, 32, 64)},
}


def read_all(file):
    return {name: tensors.read(info) for name, info in pickles.scan(file).items()}


def refused(file, message):
    with pytest.raises(UserError, match=message) as caught:
        pickles.scan(file)
    assert str(caught.value).startswith(f"{file}: ")


# ---- what torch wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 20, 2**26])
@pytest.mark.parametrize("name", ["views.bin", "views-protocol-4.bin"])
def test_every_view_and_dtype_as_torch_wrote_it(name, piece, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE", piece)
    found = read_all(FIXTURES / name)
    assert list(found) == list(VIEWS)
    for key, array in found.items():
        assert array.dtype == VIEWS[key].dtype, key
        assert array.shape == VIEWS[key].shape, key
        assert array.flags.c_contiguous, key
        assert array.flags.writeable, key
        np.testing.assert_array_equal(array, VIEWS[key], key)


def test_metadata_of_a_state_dict_is_harmless():
    found = read_all(FIXTURES / "state-dict.bin")
    assert {name: array.shape for name, array in found.items()} == {"weight": (3, 2), "bias": (3,)}


def test_legacy_format_says_how_to_convert():
    refused(FIXTURES / "legacy.bin", r"format of torch before 1\.6; save it again with a current torch")


def test_a_whole_module_is_refused_by_name():
    refused(FIXTURES / "module.bin", r"asks for 'torch\.nn\.modules\.linear\.Linear'.*nothing in it was run")


def test_an_expanded_view_is_refused():
    refused(FIXTURES / "expanded.bin", r"shape \[100\] repeats the 24 elements .*contiguous")


# ---- hostile ---------------------------------------------------------------------------------------------------------


def hostile(marker):
    """Programs that make a file if they run, and what the refusal says."""
    shell, python = made.value(f"touch {marker}"), made.value(f"open({str(marker)!r}, 'w')")
    w = made.value("w")
    system = b"cos\nsystem\n"
    tensor_of = lambda *args: made.call("torch._utils._rebuild_tensor_v2", *args)  # noqa: E731
    return {
        "system": (made.call("os.system", shell), r"asks for 'os\.system'"),
        "eval": (made.mapping({"w": made.call("builtins.eval", python)}), r"asks for 'builtins\.eval'"),
        "stack global": (made.value("os") + made.value("system") + b"\x93(" + shell + b"tR", r"asks for 'os\.system'"),
        "inst": (b"(" + shell + b"ios\nsystem\n", "its pickle uses INST"),
        "obj": (b"(" + system + shell + b"o", r"asks for 'os\.system'"),
        "newobj": (made.a_global("torch.FloatStorage") + shell + b"\x85\x81", "its pickle uses NEWOBJ"),
        "extension": (b"\x82\x01", "its pickle uses EXT1"),
        "getattr": (made.call("builtins.getattr", made.value("a"), made.value("b")), r"asks for 'builtins\.getattr'"),
        "dotted": (made.a_global("torch._utils._rebuild_tensor_v2.__globals__"), "asks for .*__globals__"),
        "in metadata": (b"}" + made.mapping({"_metadata": made.call("os.system", shell)}) + b"b", r"os\.system"),
        "wrong arguments": (tensor_of(shell), r"calls torch\._utils\._rebuild_tensor_v2 in a way"),
        "no storage": (tensor_of(*map(made.value, (0, 0, (), (), False, {}))), "calls .*_rebuild_tensor_v2 in a way"),
        "ordered": (made.call("collections.OrderedDict", made.value((("a", 1),))), "calls collections.OrderedDict in"),
        "parameter": (made.call("torch._utils._rebuild_parameter", shell), "calls torch._utils._rebuild_parameter"),
        "storage call": (made.call("torch.FloatStorage", made.value(2**40)), r"calls torch\.FloatStorage in a way"),
        "call of text": (w + b")R", "calls str in a way"),
        "call of a tensor": (made.tensor() + b")R", "calls TensorInfo in a way"),
        "build a global": (made.a_global("torch.FloatStorage") + made.mapping({"a": w}) + b"b", "pickle uses BUILD"),
        "build a tensor": (made.tensor() + made.mapping({"shape": w}) + b"b", "its pickle uses BUILD"),
        "persistent": (shell + b"Q", "refers to something other than a tensor's storage"),
        "persistent module": (b"(" + made.value("module") + shell + b"tQ", "refers to something other than"),
        "storage class": (made.storage("collections.OrderedDict"), "refers to something other than"),
        "number as name": (b"}" + made.value(7) + w + b"s", "names a value by a int"),
        "deep key": (b"})" + b"\x85" * 200_000 + w + b"s", "names a value by a tuple"),
        "deep value": (b"}" + w + b")" + b"\x85" * 200_000 + b"s", "'w' is of type tuple, not a tensor"),
        "huge memo": (b"}r\xff\xff\xff\xff", "holds no tensor"),
    }


@pytest.mark.parametrize("case", hostile("/nowhere"))
def test_nothing_runs(case, tmp_path):
    marker = tmp_path / "ran"
    program, message = hostile(marker)[case]
    file = made.archive(tmp_path / "pytorch_model.bin", program)
    if case == "huge memo":
        assert pickles.scan(file) == {}
    else:
        refused(file, message)
    assert not marker.exists()


def test_the_hostile_programs_would_run_elsewhere(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(b"\x80\x02" + hostile(marker)["system"][0] + b".")
    assert marker.exists()


# ---- wrong -----------------------------------------------------------------------------------------------------------

W = {"w": made.tensor()}


def of(*args, **kwargs):
    return made.mapping({"w": made.tensor(*args, **kwargs)})


@pytest.mark.parametrize(
    ("program", "entries", "message"),
    [
        (of(made.storage(elements=7)), {}, "data/0 has 24 bytes, too few for 7 of float32"),
        (of(made.storage("torch.DoubleStorage")), {}, "data/0 has 24 bytes, too few for 6 of float64"),
        (of(made.storage(elements=-1)), {}, "too few for -1"),
        (of(made.storage(key="1")), {}, "has no entry data/1"),
        (of(made.storage(key="../data/0")), {}, r"has no entry data/\.\./data/0"),
        (of(shape=(3, 3)), {}, r"shape \[3, 3\], strides \[3, 1\] and offset 0 reaches outside of data/0"),
        (of(offset=1), {}, "reaches outside of data/0, which has 6 elements"),
        (of(offset=-1), {}, "reaches outside"),
        (of(strides=(2**70, 1)), {}, "reaches outside"),
        (of(shape=(-2, 3)), {}, "no valid shape and strides"),
        (of(strides=(-3, 1)), {}, "no valid shape and strides"),
        (of(strides=(1,)), {}, "no valid shape and strides"),
        (of(shape=(2.0, 3)), {}, "no valid shape and strides"),
        (of(shape=(True, 3)), {}, "no valid shape and strides"),
        (of(shape=(1,) * 40, strides=(1,) * 40), {}, "no valid shape and strides"),
        (of(shape=(0, 2**62), strides=(1, 1)), {}, "no valid shape and strides"),
        (of(shape=(10**12,), strides=(0,)), {}, "repeats the 6 elements"),
        (of(None, 0, (2, 3), (3, 1), {"conj": True}), {}, "in a way that torch.save does not"),
        (made.tensor(), {}, "holds a tensor, not a dict of tensors"),
        (made.value(3), {}, "holds a int, not a dict"),
        (made.mapping(W | {"epoch": made.value(3)}), {}, "'epoch' is of type int, not a tensor"),
        (made.mapping({"state_dict": made.mapping(W)}), {}, "'state_dict' is of type dict, not a tensor"),
        (made.mapping({"s": made.storage()}), {}, "'s' is of type Storage, not a tensor"),
        (made.value([1]), {}, "its pickle uses EMPTY_LIST"),
        (b"h\x07", {}, r"its data.pkl is damaged \(KeyError: 7\)"),
        (b"t", {}, "its data.pkl is damaged"),
        (b"Nu", {}, "its data.pkl is damaged"),
        (b"X\xff\xff\xff\x7fabc", {}, "its data.pkl is damaged"),
        (b"\xff", {}, "its data.pkl is damaged"),
        (of(), {"byteorder": b"big"}, r"byteorder b'big'; only 'little' is read"),
    ],
)
def test_what_is_wrong_is_said(program, entries, message, tmp_path):
    refused(made.archive(tmp_path / "pytorch_model.bin", program, entries), message)


def test_padded_storage_and_meaningless_strides_are_fine(tmp_path):
    content = np.arange(6, dtype=np.float32).tobytes() + b"more"
    file = made.archive(tmp_path / "a.bin", of(shape=(2, 1, 3), strides=(3, 2**70, 1)), {"data/0": content})
    np.testing.assert_array_equal(read_all(file)["w"], np.arange(6).reshape(2, 1, 3))


def test_compressed(tmp_path):
    refused(made.archive(tmp_path / "a.bin", of(), compression=zipfile.ZIP_DEFLATED), "entry archive/.* is compressed")


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        file.writestr("readme", "")
    refused(tmp_path / "a.bin", r"without one FOLDER/data\.pkl")


def test_two_entries_of_one_name(tmp_path):
    made.archive(tmp_path / "a.bin", of())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.bin", "a") as file:
        file.writestr("archive/data/0", bytes(24))
    refused(tmp_path / "a.bin", "two entries of one name")


def test_a_huge_pickle(tmp_path):
    refused(made.archive(tmp_path / "a.bin", b"N" * 2**24), "its data.pkl has 16,777,219 bytes, too many")


def test_a_data_entry_outside_of_the_folder_does_not_count(tmp_path):
    made.archive(tmp_path / "a.bin", of(made.storage(key="9")))
    with zipfile.ZipFile(tmp_path / "a.bin", "a") as file:
        file.writestr("data/9", bytes(24))
    refused(tmp_path / "a.bin", "has no entry data/9")


def test_a_local_header_that_is_not_one(tmp_path):
    file = made.archive(tmp_path / "a.bin", of())
    with zipfile.ZipFile(file) as archive:
        at = archive.getinfo("archive/data/0").header_offset
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    refused(file, "damaged at its entry archive/data/0")


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>not found</html>", b"\x80\x02}."])
def test_no_archive_at_all(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin", "truncated, or not a PyTorch file")


# ---- damaged ---------------------------------------------------------------------------------------------------------


def test_cut_anywhere(tmp_path):
    content, file = (FIXTURES / "views.bin").read_bytes(), tmp_path / "a.bin"
    for size in reversed(range(len(content))):
        os.truncate(file, size) if file.exists() else file.write_bytes(content[:size])
        with pytest.raises(UserError):
            pickles.scan(file)


def test_a_program_cut_anywhere(tmp_path):
    program = of()
    for size in range(len(program)):
        file = made.archive(tmp_path / "a.bin", program[:size])
        try:
            assert pickles.scan(file) == {}  # cut after a complete dict, which is a valid program
        except UserError:
            continue


@pytest.mark.filterwarnings("ignore:invalid escape")  # of pickletools
@pytest.mark.parametrize("within", ["file", "program"])
def test_flipped_anywhere_it_is_refused_or_read(within, tmp_path):
    rng = random.Random(0)
    whole = made.archive(tmp_path / "whole.bin", of()).read_bytes()
    program = of()
    for _ in range(1000):
        changed = bytearray(whole if within == "file" else program)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file = tmp_path / "a.bin"
        if within == "file":
            file.write_bytes(changed)
        else:
            made.archive(file, bytes(changed))
        try:
            found = pickles.scan(file)
        except UserError:
            continue
        for info in found.values():
            assert tensors.read(info).shape == info.shape
