"""A whole folder: what is found in it, the golden ones, and every way in which it can be incomplete or wrong."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from errors import UserError
from huggingface.folder import Folder, TensorInfo
from tests.huggingface import made

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = "model.safetensors.index.json"


def shard(k, n=3):
    return f"model-{k:05}-of-{n:05}.safetensors"


def array(k):
    return np.full((k, 2), k, np.float32)


def save(path, **arrays):
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """Three shards with an index: w1, w2 and w3, in one each."""
    (tmp_path / "config.json").write_text('{"model_type": "made-up"}')
    for k in (1, 2, 3):
        save(tmp_path / shard(k), **{f"w{k}": array(k)})
    places = {f"w{k}": shard(k) for k in (1, 2, 3)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": places}))
    return tmp_path


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        Folder(folder)
    assert str(caught.value).startswith(str(folder))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_shards_with_an_index(folder):
    found = Folder(folder)
    assert found.path == folder
    assert found.config == {"model_type": "made-up"}
    assert list(found.tensors) == ["w1", "w2", "w3"]
    info = found.tensors["w3"]
    assert isinstance(info, TensorInfo)
    assert (info.file, info.dtype, info.shape) == (folder / shard(3), np.float32, (3, 2))
    assert [f.name for f in found.files()] == ["config.json", INDEX, shard(1), shard(2), shard(3)]
    for k in (1, 2, 3):
        np.testing.assert_array_equal(found.read(f"w{k}"), array(k))


def test_all_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    found = Folder(str(folder))
    assert list(found.tensors) == ["w1", "w2", "w3"]
    assert [f.name for f in found.files()] == ["config.json", shard(1), shard(2), shard(3)]


def test_one_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path / "model.safetensors", w=array(2))
    assert [f.name for f in Folder(tmp_path).files()] == ["config.json", "model.safetensors"]


def test_one_bin_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    made.archive(tmp_path / "pytorch_model.bin", made.mapping({"w": made.tensor()}))
    np.testing.assert_array_equal(Folder(tmp_path).read("w"), np.zeros((2, 3), np.float32))


def test_the_index_comes_first_and_safetensors_before_bin(folder):
    save(folder / "model.safetensors", other=array(1))
    made.archive(folder / "pytorch_model.bin", made.mapping({"w": made.tensor()}))
    assert list(Folder(folder).tensors) == ["w1", "w2", "w3"]
    (folder / INDEX).unlink()
    assert list(Folder(folder).tensors) == ["other"]
    (folder / "model.safetensors").unlink()
    assert list(Folder(folder).tensors) == ["w1", "w2", "w3"]
    for k in (1, 2, 3):
        (folder / shard(k)).unlink()
    assert list(Folder(folder).tensors) == ["w"]


# ---- the golden folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "files", "tensors"),
    [
        ("llama-b-sharded-invfreq", np.float32, 5, 33),
        ("llama-c-bin", np.float32, 4, 21),
        ("llama-d-bf16", ml_dtypes.bfloat16, 2, 21),
        ("crystal-b-old-export", np.float32, 2, None),
    ],
)
def test_golden_folders_are_plausible(name, dtype, files, tensors):
    found = Folder(GOLDEN / name)
    assert len(found.files()) == files
    assert tensors in (None, len(found.tensors))
    embedding = next(info for key, info in found.tensors.items() if re.search(r"embed_tokens|wte", key))
    assert embedding.dtype == dtype
    assert found.config["vocab_size"] in embedding.shape
    for key in found.tensors:
        values = found.read(key).astype(np.float64)
        assert np.isfinite(values).all(), key
    matrix = found.read(next(key for key in found.tensors if re.search(r"q_proj\.weight|c_attn\.weight", key)))
    assert 1e-3 < matrix.astype(np.float64).std() < 1


@pytest.mark.parametrize("name", ["llama-b-sharded-invfreq", "llama-d-bf16", "crystal-b-old-export"])
def test_golden_folders_read_as_the_reference_reads_them(name):
    found = Folder(GOLDEN / name)
    files = [file for file in found.files() if file.suffix == ".safetensors"]
    expected = {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}
    assert found.tensors.keys() == expected.keys()
    for key, value in expected.items():
        read = found.read(key)
        assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes()), key


def test_threads_read_the_same():
    found = Folder(GOLDEN / "llama-c-bin")
    alone = {name: found.read(name).tobytes() for name in found.tensors}
    names = [*found.tensors] * 20
    with ThreadPoolExecutor(8) as pool:
        assert all(read.tobytes() == alone[name] for name, read in zip(names, pool.map(found.read, names)))


# ---- what is missing or wrong ----------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nowhere", "no such folder; give one with config.json and weights")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json: is missing")


def test_config_that_cannot_be_read(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, r"config.json: cannot be read \(Is a directory\)")


@pytest.mark.parametrize("text", [b"", b"{", b"{'a': 1}", b"\xff", b"[" * 100_000])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json is not valid JSON")


def test_config_that_is_not_an_object(folder):
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json is a JSON list, not an object")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no weights in it; expected model.safetensors or pytorch_model.bin, or their shards")


def test_unknown_tensor(folder):
    with pytest.raises(UserError, match="has no tensor 'w9' among its 3"):
        Folder(folder).read("w9")


def test_git_lfs_pointer(folder):
    (folder / shard(2)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    refused(folder, f"{shard(2)}: is a pointer of Git LFS, not the file; run `git lfs pull`")


def test_damaged_shard(folder):
    (folder / shard(2)).write_bytes((folder / shard(2)).read_bytes()[:-1])
    refused(folder, f"{shard(2)}: truncated: the header says")


def test_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    refused(folder, f"{INDEX} is not valid JSON")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"w": 1}}', '{"weight_map": {"w": ""}}'])
def test_index_without_a_weight_map(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, f"{INDEX}: has no weight_map from tensors to files")


def test_index_that_names_a_tensor_twice(folder):
    (folder / INDEX).write_text('{"weight_map": {"w1": "a", "w1": "b"}}')
    refused(folder, "'w1' is in it twice")


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/b", "a\0b"])
def test_index_that_leads_out_of_the_folder(folder, name):
    change_index(folder, lambda places: places.update(w1=name))
    refused(folder, re.escape(f"{INDEX}: names {name!r}, which is not a file of the same folder"))


@pytest.mark.parametrize("name", ["..", "\ud800", shard(4)])
def test_index_that_names_a_missing_shard(folder, name):
    change_index(folder, lambda places: places.update(w1=name))
    with pytest.raises(UserError, match="which is missing; fetch it") as caught:
        Folder(folder)
    assert repr(name) in str(caught.value)


def test_tensor_that_only_the_index_has(folder):
    change_index(folder, lambda places: places.update(w9=shard(2)))
    refused(folder, f"{INDEX}: its files hold other .*: 'w9' expected in {shard(2)}, found in none")


def test_tensor_that_the_index_does_not_have(folder):
    change_index(folder, lambda places: places.update(extra=places.pop("w1")))
    refused(folder, f"'extra' expected in {shard(1)}, found in none; 'w1' expected in no file, found in {shard(1)}")


def test_tensor_in_another_shard_than_the_index_says(folder):
    change_index(folder, lambda places: places.update(w1=places["w2"], w2=places["w1"]))
    refused(folder, f"'w1' expected in {shard(2)}, found in {shard(1)}; 'w2' expected in {shard(1)}, found")


def test_tensor_in_two_shards(folder):
    save(folder / shard(2), w1=array(1), w2=array(2))
    both = f"'w1' expected in {shard(1)}, found in {shard(1)} and {shard(2)}"
    refused(folder, f"{INDEX}: its files hold other tensors than it says: {both}")
    (folder / INDEX).unlink()
    refused(folder, f"holds a tensor twice: {both}")


def test_at_most_five_problems_are_listed(folder):
    change_index(folder, lambda places: places.update({f"v{i}": shard(1) for i in range(8)}))
    refused(folder, r"\(and 3 more\)")


def test_missing_shard_without_an_index(folder):
    (folder / INDEX).unlink()
    (folder / shard(2)).unlink()
    refused(folder, f"shard 2 of 3 is missing beside {shard(1)}, and so is the index")


def test_two_sets_of_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    shutil.copy(folder / shard(1), folder / shard(1, 2))
    refused(folder, "holds shards of sets of 2 and of 3; keep one set")


def test_too_many_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    shutil.copy(folder / shard(1), folder / shard(4))
    refused(folder, "holds 4 shards named as of 3")
