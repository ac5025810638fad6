"""What is written is what transformers writes and the reference reads, and it is there whole or not at all."""

import contextlib
import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from errors import RunError, UserError
from huggingface.folder import Folder
from huggingface.writer import FolderWriter

RNG = np.random.default_rng(0)
ARRAYS = {
    "b.bf16": RNG.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
    "a.f32": RNG.standard_normal((4, 6)).astype(np.float32),
    "flags": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.empty((0, 3), np.float32),
    "half": RNG.standard_normal((2, 3, 4)).astype(np.float16),
    "large": RNG.standard_normal((100,)).astype(np.float32),
}
DECLARED = {name: (array.dtype, array.shape) for name, array in ARRAYS.items()}


def write(path, shard_bytes=10**6, order=ARRAYS):
    with FolderWriter(path, DECLARED, shard_bytes) as writer:
        for name in order:
            writer.write(name, ARRAYS[name])
        writer.text("config.json", '{"model_type": "made-up"}')
        writer.commit()
    return path


def names(path):
    return sorted(p.name for p in path.iterdir())


def load(path):
    files = sorted(path.glob("*.safetensors"))
    return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}


def same(found):
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        value = found[name]
        assert (value.dtype, value.shape, value.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**6, 130, 1])
@pytest.mark.parametrize("order", [list(ARRAYS), list(ARRAYS)[::-1]])
def test_the_reference_and_we_read_it_back(shard_bytes, order, tmp_path):
    path = write(tmp_path / "out", shard_bytes, order)
    same(load(path))
    ours = Folder(path)
    same({name: ours.read(name) for name in ours.tensors})
    assert ours.config == {"model_type": "made-up"}
    assert names(tmp_path) == ["out"]


def test_one_file(tmp_path):
    path = write(tmp_path / "out")
    assert names(path) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_filled_in_order(tmp_path):
    path = write(tmp_path / "out", 128)  # 30 + 96, 3 + 4 + 0 + 48, 400
    files = [f"model-{k:05}-of-00003.safetensors" for k in (1, 2, 3)]
    assert names(path) == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in ARRAYS.values())}
    places = [["a.f32", "b.bf16"], ["empty", "flags", "half", "scalar"], ["large"]]
    assert index["weight_map"] == {name: file for file, inside in zip(files, places) for name in inside}


def test_every_tensor_is_aligned(tmp_path):
    for info in Folder(write(tmp_path / "out")).tensors.values():
        assert info.offset % info.dtype.itemsize == 0


def test_views_and_threads(tmp_path):
    array = np.arange(2000, dtype=np.float32).reshape(40, 50)
    with FolderWriter(tmp_path / "out", {f"w{i}": (array.dtype, (50, 40)) for i in range(40)}, 20_000) as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: writer.write(f"w{i}", (array + i).T), range(40)))
        writer.commit()
    found = load(tmp_path / "out")
    assert all((found[f"w{i}"] == array.T + i).all() for i in range(40))


def test_more_than_one_call_of_pwrite(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface.writer._PIECE", 7)
    same(load(write(tmp_path / "out")))


def test_the_part_can_be_checked_before_the_commit(tmp_path):
    with FolderWriter(tmp_path / "out", DECLARED, 130) as writer:
        for name, array in ARRAYS.items():
            writer.write(name, array)
        writer.text("config.json", b"{}")
        assert writer.part == tmp_path / "out.part"
        found = Folder(writer.part)
        same({name: found.read(name) for name in found.tensors})
        assert not (tmp_path / "out").exists()
        writer.commit()
    assert names(tmp_path) == ["out"]


def test_into_an_empty_folder_through_a_link_and_new_parents(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link")
    same(load(tmp_path / "empty"))
    same(load(write(tmp_path / "new" / "er" / "out")))


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing(error, tmp_path):
    def stopped():
        with FolderWriter(tmp_path / "out", DECLARED, 130) as writer:
            writer.write("flags", ARRAYS["flags"])
            raise error("stop")

    with pytest.raises(error, match="stop"):
        stopped()
    assert names(tmp_path) == []


def test_no_commit_leaves_nothing(tmp_path):
    with FolderWriter(tmp_path / "out", DECLARED, 130):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("stale", ["folder", "file", "link"])
def test_what_a_killed_run_left_is_replaced(stale, tmp_path):
    part = tmp_path / "out.part"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    if stale == "folder":
        shutil.copytree(tmp_path / "elsewhere", part)
    elif stale == "file":
        part.write_text("x")
    else:
        part.symlink_to("elsewhere")
    write(tmp_path / "out")
    assert names(tmp_path) == ["elsewhere", "out"]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert names(tmp_path / "elsewhere") == ["precious"]


@pytest.mark.parametrize("when", ["write", "commit"])
def test_the_second_of_two_writers_wins(when, tmp_path):
    message = "out: could not be written: another process began to write the same folder"
    described = {"flags": DECLARED["flags"]}
    with FolderWriter(tmp_path / "out", described, 130) as first:
        if when == "commit":
            first.write("flags", ~ARRAYS["flags"])
        goes_on = first.commit if when == "commit" else lambda: first.write("flags", ~ARRAYS["flags"])
        with FolderWriter(tmp_path / "out", described, 130) as second:
            with pytest.raises(RunError, match=message):
                goes_on()
            second.write("flags", ARRAYS["flags"])
            second.commit()
        with pytest.raises(RunError, match=message):
            goes_on()
    assert names(tmp_path) == ["out"]
    assert (load(tmp_path / "out")["flags"] == ARRAYS["flags"]).all()


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_exists_is_not_touched(content, tmp_path):
    path = tmp_path / "out"
    path.write_text("x") if content == "file" else shutil.copytree(write(tmp_path / "other"), path)
    with pytest.raises(UserError, match="out: exists and is not an empty folder; name another, or remove it"):
        FolderWriter(path, DECLARED, 130)


def test_what_appears_meanwhile_is_not_touched(tmp_path):
    with FolderWriter(tmp_path / "out", {}, 130) as writer:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(RunError, match="out: could not be written: Directory not empty"):
            writer.commit()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["precious"]


def test_a_disk_with_too_little_room(tmp_path):
    needs = {"w": (np.dtype(np.float32), (2**56,))}
    message = r"out: could not be written: it needs [0-9,.]+ MB and the disk has [0-9,.]+ MB left; free some disk space"
    with pytest.raises(RunError, match=message), FolderWriter(tmp_path / "out", needs, 130):
        pass
    assert names(tmp_path) == []


@pytest.fixture
def full_disk():
    """A limit on the size of files stands for a full disk."""

    @contextlib.contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_a_disk_that_fails(full_disk, tmp_path):
    with FolderWriter(tmp_path / "out", DECLARED, 10**6) as writer:
        message = "out: could not be written: File too large; free some disk space or name another folder"
        with full_disk(), pytest.raises(RunError, match=message):
            writer.write("large", ARRAYS["large"])
        with pytest.raises(ValueError, match="7 tensors not written"):
            writer.commit()
    assert names(tmp_path) == []


def test_a_disk_that_fails_at_once(full_disk, tmp_path):
    with full_disk(), pytest.raises(RunError, match="File too large"), FolderWriter(tmp_path / "out", DECLARED, 10**6):
        pass
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"), FolderWriter(tmp_path / "file" / "out", {}, 130):
        pass


# ---- mistakes of the caller ------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path):
    with FolderWriter(tmp_path / "out", DECLARED, 130) as writer:
        yield writer


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("other", ARRAYS["flags"], "'other' was not declared"),
        ("flags", ARRAYS["half"], r"'flags' is float16 \(2, 3, 4\), but was declared as bool \(3,\)"),
        ("large", ARRAYS["large"].astype(">f4"), "'large' is >f4"),
        ("large", ARRAYS["large"][:99], r"'large' is float32 \(99,\), but was declared as float32 \(100,\)"),
    ],
)
def test_other_tensors_than_declared(writer, name, array, message):
    with pytest.raises(ValueError, match=message):
        writer.write(name, array)


def test_a_tensor_twice(writer):
    writer.write("flags", ARRAYS["flags"])
    with pytest.raises(ValueError, match="'flags' is written a second time"):
        writer.write("flags", ARRAYS["flags"])


def test_a_commit_too_early(writer):
    writer.write("flags", ARRAYS["flags"])
    with pytest.raises(ValueError, match=r"6 tensors not written, such as 'a\.f32'"):
        writer.commit()


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "model.safetensors.index.json", "model-00001-of-00003.safetensors", ""]
)
def test_names_of_further_files(writer, name):
    with pytest.raises(ValueError, match="cannot be a further file"):
        writer.text(name, "")


def test_a_shard_size_of_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot be written in files of 0 bytes; give a size above 0"):
        FolderWriter(tmp_path / "out", DECLARED, 0)
