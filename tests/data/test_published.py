"""Published files are read as they are, in an order that depends on nothing but names and the seed; damage is named."""

import json
import os
import pickle
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import published
from data.dataset import TokenData
from data.mixture import Mixture, Part
from data.packing import permutation, sort_keys
from data.published import Hdf5Rows, JsonlRows, PublishedAmber, PublishedCrystal, is_published, write_published_chunk
from data.sample import Sample
from errors import RunError, UserError

S, V = 8, 300
INDEX = ".llm360-index"


def ids(*key: int | str, n: int = S + 1) -> list[int]:
    return (sort_keys(n, *key) % np.uint64(V)).tolist()


def write_lines(path: Path, windows: list[list[int]], labels: list[str]) -> Path:
    write_published_chunk(path, zip(windows, labels, strict=True))
    return path


@pytest.fixture
def chunk(tmp_path) -> Path:
    labels = ["arxiv"] * 3 + ["c4"] * 4 + ["wikipedia"] * 2
    return write_lines(tmp_path / "train_000.jsonl", [ids("chunk", i) for i in range(9)], labels)


def amber(folder: Path, numbers=range(3), name: str = "train_{}.jsonl", lines: int = 10) -> Path:
    for number in numbers:
        write_lines(folder / name.format(number), [ids(number, i) for i in range(lines)], ["c4"] * lines)
    return folder


def test_a_line_has_exactly_the_published_form(tmp_path):
    path = write_lines(tmp_path / "train_0.jsonl", [[7, 0, 299]], ["c4"])
    assert path.read_bytes() == b'{"token_ids": [7, 0, 299], "source": "c4"}\n'
    write_published_chunk(path, [(np.array([1, 2], np.uint16), "a"), ((3, 4), "b")])
    lines = b'{"token_ids": [1, 2], "source": "a"}\n{"token_ids": [3, 4], "source": "b"}\n'
    assert path.read_bytes() == lines
    with pytest.raises(ZeroDivisionError):
        write_published_chunk(path, ((1 // 0, "a") for _ in range(2)))
    assert path.read_bytes() == lines  # the old file, and nothing beside it
    assert os.listdir(tmp_path) == ["train_0.jsonl"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"train_0\.jsonl: cannot be written"):
            write_published_chunk(tmp_path / "train_0.jsonl", [(list(range(1000)), "c4")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_lines_come_back_in_any_order(chunk):
    rows = JsonlRows(chunk, S + 1, V)
    assert len(rows) == 9
    for i in (8, 0, 3, 8):
        window, label = rows.row(i)
        assert window.dtype == np.int32
        assert window.tolist() == ids("chunk", i)
        assert label == ("arxiv" if i < 3 else "c4" if i < 7 else "wikipedia")
    assert rows.labels() == (("arxiv", 0, 3), ("c4", 3, 7), ("wikipedia", 7, 9))
    for i in (-1, 9):
        with pytest.raises(IndexError, match=rf"row {i} is outside 0\.\.8"):
            rows.row(i)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(rows.row, [i % 9 for i in range(900)]))
    assert [window.tolist() for window, _ in found] == [ids("chunk", i % 9) for i in range(900)]


def test_other_ways_to_write_the_same(tmp_path):
    path = tmp_path / "train_0.jsonl"
    text = json.dumps(ids("x"))
    lines = [
        f'{{"source": "c4", "token_ids": {text}}}\r\n',  # the label is not at the end: the run shows none
        f' {{ "token_ids" :{text}, "more": 1, "source" :"c4" }} \n',
        f'{{"token_ids": {text}, "source": "a\\u0062"}}\n',
        f'{{"token_ids": {text}, "source": "c4"}}',  # no line end
    ]
    path.write_text("".join(lines), newline="")
    rows = JsonlRows(path, S + 1, V)
    assert [rows.row(i)[0].tolist() for i in range(4)] == [ids("x")] * 4
    assert [rows.row(i)[1] for i in range(4)] == ["c4", "c4", "ab", "c4"]
    assert rows.labels() == (("", 0, 1), ("c4", 1, 2), ("", 2, 3), ("c4", 3, 4))
    path.write_bytes(b"")
    assert (len(JsonlRows(path, S + 1, V)), JsonlRows(path, S + 1, V).labels()) == (0, ())


@pytest.mark.parametrize("length", [2, 40, 41, 42, 60, 1 << 20])
def test_lines_are_found_wherever_the_reading_buffer_ends(tmp_path, monkeypatch, length):
    monkeypatch.setattr(published, "_READ_BYTES", length)
    path = write_lines(tmp_path / "train_0.jsonl", [[i] for i in range(50)], ["c4"] * 20 + ["book"] * 30)
    rows = JsonlRows(path, 1, V)
    assert [rows.row(i)[0].tolist() for i in range(len(rows))] == [[i] for i in range(50)]
    assert rows.labels() == (("c4", 0, 20), ("book", 20, 50))


GOOD = json.dumps({"token_ids": ids("good"), "source": "c4"})
DEFECTS = {
    "{": r"not JSON \(.*\)",
    "": r"not JSON \(Expecting value",
    "\udcff": r"not JSON \('utf-8' codec",
    "[" * 50_000: r"not JSON \(maximum recursion",
    "[1, 2]": "not a JSON object",
    '{"source": "c4"}': "no field 'token_ids'",
    json.dumps({"token_ids": ids("x")}): "no field 'source'",
    json.dumps({"token_ids": "1 2", "source": "c4"}): "field 'token_ids' is not a list",
    json.dumps({"token_ids": ids("x"), "source": 4}): "field 'source' is not a str",
    json.dumps({"token_ids": [*ids("x"), 1], "source": "c4"}): r"10 ids, not 9 \(the last is 1\)",  # as upstream's
    json.dumps({"token_ids": [], "source": "c4"}): "0 ids, not 9",
    json.dumps({"token_ids": [*ids("x")[1:], V], "source": "c4"}): "id 300 is outside the vocabulary of 300",
    json.dumps({"token_ids": [*ids("x")[1:], -1], "source": "c4"}): "id -1 is outside the vocabulary of 300",
    json.dumps({"token_ids": [*ids("x")[1:], 10**30], "source": "c4"}): "id 10{30} is outside",
    json.dumps({"token_ids": [*ids("x")[1:], 2.0], "source": "c4"}): r"2\.0 among the ids is not an integer",
    json.dumps({"token_ids": [*ids("x")[1:], True], "source": "c4"}): "True among the ids is not an integer",
    json.dumps({"token_ids": [*ids("x")[1:], None], "source": "c4"}): "None among the ids is not an integer",
}


@pytest.mark.parametrize("line", DEFECTS, ids=range(len(DEFECTS)))
def test_every_defect_is_named_with_file_and_line(tmp_path, line):
    path = tmp_path / "train_7.jsonl"
    path.write_bytes("\n".join([GOOD, line, GOOD, ""]).encode("utf-8", "surrogateescape"))
    rows = JsonlRows(path, S + 1, V)
    assert len(rows) == 3
    assert rows.row(0)[0].tolist() == rows.row(2)[0].tolist() == ids("good")
    with pytest.raises(RunError, match=rf"train_7\.jsonl:2: {DEFECTS[line]}.*; repair the line or fetch the file"):
        rows.row(1)


def test_a_cut_file_and_a_missing_one(chunk):
    size = chunk.stat().st_size
    rows = JsonlRows(chunk, S + 1, V)
    os.truncate(chunk, size - 20)
    with pytest.raises(RunError, match=r"train_000\.jsonl:9: the file has become shorter"):
        rows.row(8)
    rows = JsonlRows(chunk, S + 1, V)
    assert rows.labels()[-1] == ("", 8, 9)
    assert rows.row(7)[0].tolist() == ids("chunk", 7)
    with pytest.raises(RunError, match=r"train_000\.jsonl:9: not JSON \(.*\); the file ends inside this line"):
        rows.row(8)
    chunk.unlink()
    with pytest.raises(RunError, match=r"train_000\.jsonl: cannot be read \(No such file"):
        JsonlRows(chunk, S + 1, V)


def test_the_index_is_kept_and_made_again_when_the_file_changes(chunk):
    kept = chunk.parent / INDEX / "train_000.npy"

    def made_again() -> bool:
        """Open the file; return whether its index was written."""
        os.utime(kept, ns=(5, 5))
        JsonlRows(chunk, S + 1, V)
        return kept.stat().st_mtime_ns != 5

    assert len(JsonlRows(chunk, S + 1, V)) == 9
    assert os.listdir(kept.parent) == ["train_000.npy"]
    assert np.load(kept)[:2].tolist() == [1, chunk.stat().st_size]
    assert not made_again()
    rows = JsonlRows(chunk, S + 1, V)
    assert [rows.row(i)[0].tolist() for i in range(9)] == [ids("chunk", i) for i in range(9)]
    assert rows.labels() == (("arxiv", 0, 3), ("c4", 3, 7), ("wikipedia", 7, 9))

    with open(chunk, "a") as file:  # another size, and a time that may be the same
        file.write(GOOD + "\n")
    os.utime(chunk, ns=(7, 7))
    assert made_again()
    assert len(JsonlRows(chunk, S + 1, V)) == 10

    chunk.write_bytes(chunk.read_bytes().replace(b"}\n{", b"} {", 1))  # the same size, another time
    os.utime(chunk, ns=(7, 8))
    assert made_again()
    assert len(JsonlRows(chunk, S + 1, V)) == 9
    assert not made_again()


@pytest.mark.parametrize("damage", ["short", "empty", "foreign", "labels", "other"])
def test_a_damaged_index_is_made_again(chunk, damage):
    JsonlRows(chunk, S + 1, V)
    kept = chunk.parent / INDEX / "train_000.npy"
    good = kept.read_bytes()
    if damage == "other":
        np.save(kept, np.zeros((2, 2)))
    else:
        words = np.load(kept)
        words[4] += 1  # no JSON
        bad = {"short": good[:-8], "empty": b"", "foreign": b"x" * 500, "labels": words}[damage]
        kept.write_bytes(bad) if isinstance(bad, bytes) else np.save(kept, bad)
    rows = JsonlRows(chunk, S + 1, V)
    assert [rows.row(i)[0].tolist() for i in range(len(rows))] == [ids("chunk", i) for i in range(9)]
    assert kept.read_bytes() == good


def test_an_index_that_cannot_be_kept_is_not_missed(chunk, tmp_path):
    place = tmp_path / INDEX
    place.write_text("a file where the folder should be: for any user the same as a folder without permission")
    rows = JsonlRows(chunk, S + 1, V)
    assert rows.row(8)[0].tolist() == ids("chunk", 8)
    assert sorted(os.listdir(tmp_path)) == [INDEX, "train_000.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(chunk):
    os.chmod(chunk.parent, 0o555)
    try:
        assert JsonlRows(chunk, S + 1, V).row(8)[0].tolist() == ids("chunk", 8)
        assert not (chunk.parent / INDEX).exists()
    finally:
        os.chmod(chunk.parent, 0o755)


@pytest.mark.parametrize("name", ["train_{}.jsonl", "train_{:03}.jsonl", "train/train_{}.jsonl"])
def test_chunks_are_files_by_number_each_in_permuted_order(tmp_path, name):
    numbers = [10, 2, 0, 9, 7, 1, 8, 3, 5, 4, 6]  # written, and so perhaps listed, in this order
    data: TokenData = PublishedAmber(amber(tmp_path, numbers, name), S, V, seed=5)
    assert is_published(tmp_path) == "jsonl"
    (phase,) = data.phases
    assert (phase.first_chunk, phase.samples, phase.samples_per_chunk, phase.carry) == (0, 110, 10, False)
    assert (data.sequence_length, data.vocab_size, data.sources, data.tokenizer_file) == (S, V, (), None)
    for c in (0, 9, 10):
        order = permutation(10, 5, c).tolist()
        assert order != list(range(10))
        for p in range(10):
            sample = data.sample(c, p)
            assert sample.tokens.tolist() == ids(c, order[p])
            assert sample.is_window
            assert isinstance(data, PublishedAmber)
            assert data.place(c, p) == (Path(name.format(c)).name, order[p] + 1)
    data.check_files()


def test_what_a_published_data_set_refuses(tmp_path):
    data = PublishedAmber(amber(tmp_path / "good"), S, V, seed=0)
    with pytest.raises(UserError, match=r"good has no chunk 3, only 0\.\.2"):
        data.sample(3, 0)
    with pytest.raises(IndexError, match=r"position 10 is outside 0\.\.9"):
        data.sample(0, 10)
    with pytest.raises(UserError, match="no validation source 'c4'; it has none"):
        data.validation("c4")
    with pytest.raises(UserError, match=r"none: no train_<number>\.jsonl in it"):
        PublishedAmber(tmp_path / "none", S, V, seed=0)
    with pytest.raises(UserError, match=r"chunk 2 is missing between train_1\.jsonl and train_3\.jsonl"):
        PublishedAmber(amber(tmp_path / "gap", [0, 1, 3]), S, V, seed=0)
    amber(amber(tmp_path / "twice"), [2], "train/train_{:03}.jsonl")
    with pytest.raises(UserError, match=r"train_(002|2)\.jsonl and .*train_(2|002)\.jsonl are both chunk 2"):
        PublishedAmber(tmp_path / "twice", S, V, seed=0)
    amber(amber(tmp_path / "unequal"), [2], lines=11)
    with pytest.raises(UserError, match=r"train_2\.jsonl has 11 lines, not 10 as .*train_0\.jsonl"):
        PublishedAmber(tmp_path / "unequal", S, V, seed=0).phases  # noqa: B018
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train_0.jsonl").touch()
    with pytest.raises(UserError, match=r"train_0\.jsonl: has no lines"):
        PublishedAmber(tmp_path / "empty", S, V, seed=0).phases  # noqa: B018


def test_lines_are_counted_when_they_are_needed_or_elsewhere(tmp_path):
    data = PublishedAmber(amber(tmp_path), S, V, seed=0)
    copy = pickle.loads(pickle.dumps(data))
    copy.count(len(data.open(path)) for path in data.files[::-1])
    assert not (tmp_path / INDEX / "train_3.npy").exists()
    shutil.rmtree(tmp_path / INDEX)
    assert copy.phases[0].samples == 30
    assert not (tmp_path / INDEX).exists()  # what was told is not looked for
    assert data.lines == 10
    assert sorted(os.listdir(tmp_path / INDEX)) == ["train_0.npy", "train_1.npy", "train_2.npy"]
    for counts, message in ([10, 10, 9], r"train_2\.jsonl has 9 lines, not 10 as"), ([10, 0, 10], "train_1.* no lines"):
        with pytest.raises(UserError, match=message):
            PublishedAmber(tmp_path, S, V, seed=0).count(counts)


def test_given_lines_are_checked_when_a_file_is_first_read(tmp_path):
    amber(amber(tmp_path), [2], lines=11)
    data = PublishedAmber(tmp_path, S, V, seed=0, lines=10)
    assert not (tmp_path / INDEX).exists()
    assert data.sample(1, 0).tokens.tolist() == ids(1, permutation(10, 0, 1).tolist()[0])
    assert os.listdir(tmp_path / INDEX) == ["train_1.npy"]
    with pytest.raises(UserError, match=r"train_2\.jsonl has 11 lines, not 10 as"):
        data.sample(2, 0)
    with pytest.raises(UserError, match=r"train_0\.jsonl has 10 lines, not 12;"):
        PublishedAmber(tmp_path, S, V, seed=0, lines=12).sample(0, 0)


def test_validation_and_tokenizer_where_they_are(tmp_path):
    amber(tmp_path)
    for name, n in (("wikipedia", 4), ("c4", 0)):
        write_lines(tmp_path / "valid" / f"{name}.jsonl", [ids(name, i) for i in range(n)], [name] * n)
    (tmp_path / "tokenizer.model").touch()
    data = PublishedAmber(tmp_path, S, V, seed=0)
    assert data.sources == ("c4", "wikipedia")
    assert data.validation("wikipedia").tokens.tolist() == [ids("wikipedia", i) for i in range(4)]
    assert data.validation("wikipedia").weights.shape == (4, S)
    parts = [data.validation("wikipedia", start, start + 3).tokens.tolist() for start in (0, 3, 6)]
    assert parts == [[ids("wikipedia", i) for i in of] for of in ((0, 1, 2), (3,), ())]
    assert [x.shape for x in data.validation("c4")] == [(0, S)] * 3
    assert data.tokenizer_file == tmp_path / "tokenizer.model"


def test_amber_is_identified_and_its_files_checked(tmp_path):
    folder = amber(tmp_path / "a")
    data = PublishedAmber(folder, S, V, seed=0)
    shutil.copytree(folder, tmp_path / "b")
    assert PublishedAmber(tmp_path / "b", S, V, seed=0).sha256 == data.sha256
    assert PublishedAmber(folder, S, V, seed=1).sha256 != data.sha256
    os.rename(tmp_path / "b" / "train_2.jsonl", tmp_path / "b" / "train_002.jsonl")
    assert PublishedAmber(tmp_path / "b", S, V, seed=0).sha256 != data.sha256
    assert PublishedAmber(folder, S // 2, V, seed=0).sha256 != data.sha256
    with open(folder / "train_1.jsonl", "a") as file:
        file.write(" ")
    with pytest.raises(RunError, match=r"train_1\.jsonl: \d+ bytes, it had \d+ when it was opened"):
        data.check_files()
    (folder / "train_1.jsonl").unlink()
    with pytest.raises(RunError, match=r"train_1\.jsonl: cannot be read \(No such file"):
        data.check_files()


def test_amber_travels_to_other_processes(tmp_path):
    folder = amber(tmp_path / "data")
    data = PublishedAmber(folder, S, V, seed=3)
    data.sample(0, 0)
    shutil.rmtree(folder / INDEX)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.sample(2, 4).tokens.tolist() == data.sample(2, 4).tokens.tolist()
    assert os.listdir(folder / INDEX) == ["train_2.npy"]  # the copy did not count lines again
    assert (copy.sha256, copy.phases) == (data.sha256, data.phases)


# ---- HDF5


def hdf5_row(*key: int | str) -> np.ndarray:
    """int32[3, S]: ids, a mask that does not count the last, labels."""
    window = ids(*key)
    return np.array([window[:-1], [1] * (S - 1) + [0], window[1:]], np.int32)


def write_hdf5(path: Path, rows: np.ndarray, examples: bool = True, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=rows, **options)
        if examples:
            file.attrs["n_examples"] = len(rows)
    return path


def hdf5_rows(name: int | str, n: int) -> np.ndarray:
    return np.array([hdf5_row(name, i) for i in range(n)], np.int32).reshape(n, 3, S)


def test_rows_of_files_in_natural_order(tmp_path):
    counts = {"examples_10_0": 4, "examples_9_1": 3, "examples_9_0": 2, "examples_0_11": 0, "examples_0_2": 1}
    for name, n in counts.items():
        write_hdf5(tmp_path / f"{name}.h5", hdf5_rows(name, n), chunks=(1, 3, S) if n else None)
    order = ["examples_0_2", "examples_0_11", "examples_9_0", "examples_9_1", "examples_10_0"]
    expected = [(name, i) for name in order for i in range(counts[name])]
    rows = Hdf5Rows(list(tmp_path.iterdir()), S, V)
    assert len(rows) == 10
    for copy in (rows, pickle.loads(pickle.dumps(rows))):
        for i in (9, 0, 5, *range(10)):
            sample = copy.row(i)
            assert [x.dtype for x in sample] == [np.int32, np.int32, np.float32]
            assert np.array(sample).tolist() == hdf5_row(*expected[i])[[0, 2, 1]].tolist()
            path, row = copy.place(i)
            assert (path.stem, row) == expected[i]
    for i in (-1, 10):
        with pytest.raises(IndexError, match=rf"row {i} is outside 0\.\.9"):
            rows.row(i)
    assert len(Hdf5Rows([], S, V)) == 0


def test_threads_share_files_and_files_come_and_go(tmp_path):
    paths = [write_hdf5(tmp_path / f"{i}.h5", hdf5_rows(i, 5), chunks=(2, 1, 4)) for i in range(6)]
    readers = Hdf5Rows(paths, S, V), Hdf5Rows(paths, S, V)  # two parts that read the same files
    wanted = (sort_keys(400, "rows") % np.uint64(30)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: readers[i % 2].row(wanted[i]), range(400)))
    for i, sample in zip(wanted, found, strict=True):
        assert np.array(sample).tolist() == hdf5_row(*divmod(i, 5))[[0, 2, 1]].tolist()


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 3, S)}, {"chunks": (3, 1, 3), "compression": "gzip"}])
def test_any_storage_of_the_rows(tmp_path, options):
    """Stage 3's files have neither n_examples nor row-wise blocks (fact sheet 3.6)."""
    path = write_hdf5(tmp_path / "a.h5", hdf5_rows("a", 7), examples=False, **options)
    rows = Hdf5Rows([path], S, V)
    assert [rows.row(i).inputs.tolist() for i in range(7)] == [hdf5_row("a", i)[0].tolist() for i in range(7)]


def test_a_row_of_blocks_stays_decoded(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", np.zeros((100, 3, S), np.int32), chunks=(50, 1, 3), compression="gzip")
    rows = Hdf5Rows([path], S, V)
    rows.row(0)
    _, size, _ = rows._data(path).id.get_access_plist().get_chunk_cache()
    assert size == 3 * 3 * (50 * 1 * 3 * 4)  # 3 fields, 3 blocks each


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, V, "input id 300 is outside the vocabulary of 300"),
        (0, -1, "input id -1 is outside"),
        (2, V, "label id 300 is outside"),
        (2, -100, "label id -100 is outside"),
        (1, 2, "its loss mask holds 2, which is neither 0 nor 1"),
        (1, -1, "its loss mask holds -1"),
    ],
)
def test_bad_values_are_named_with_file_and_row(tmp_path, field, value, message):
    values = hdf5_rows("a", 4)
    values[2, field, 3] = value
    paths = [write_hdf5(tmp_path / "0.h5", hdf5_rows("b", 5)), write_hdf5(tmp_path / "1.h5", values)]
    rows = Hdf5Rows(paths, S, V)
    assert rows.row(6).inputs.tolist() == hdf5_row("a", 1)[0].tolist()
    with pytest.raises(RunError, match=rf"1\.h5: row 2: {message}"):
        rows.row(7)


def test_files_that_are_not_crystals(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(RunError, match=rf"{path.name}: {message}"):
            Hdf5Rows([path], S, V)

    good = write_hdf5(tmp_path / "good.h5", hdf5_rows("a", 50), compression="gzip", chunks=(1, 3, S))
    text = good.read_bytes()
    (tmp_path / "cut.h5").write_bytes(text[: len(text) // 2])
    refused(tmp_path / "cut.h5", r"cannot be read \(.*truncated file")
    (tmp_path / "text.h5").write_bytes(b"no HDF5" * 100)
    refused(tmp_path / "text.h5", "cannot be read")
    refused(tmp_path / "missing.h5", "cannot be read")
    is_not = "not a file of Crystal's rows"
    refused(write_hdf5(tmp_path / "wide.h5", np.zeros((5, 3, 2 * S), np.int32)), rf"{is_not} .*\(5, 3, 16\), not int32")
    refused(write_hdf5(tmp_path / "flat.h5", np.zeros((5, S), np.int32)), is_not)
    refused(write_hdf5(tmp_path / "two.h5", np.zeros((5, 2, S), np.int32)), is_not)
    refused(write_hdf5(tmp_path / "long.h5", np.zeros((5, 3, S), np.int64)), rf"{is_not} \('data' is int64")
    refused(write_hdf5(tmp_path / "real.h5", np.zeros((5, 3, S), np.float32)), is_not)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["rows"] = hdf5_rows("a", 2)
    refused(tmp_path / "other.h5", is_not)
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("data")
    refused(tmp_path / "group.h5", is_not)
    with h5py.File(good, "r+") as file:
        file.attrs["n_examples"] = 51
    refused(good, rf"{is_not} \(attribute n_examples says 51, but there are 50 rows\)")


def test_damage_inside_a_file_is_found_when_its_row_is_read(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", hdf5_rows("a", 50), compression="gzip", chunks=(1, 3, S))
    with h5py.File(path) as file:
        block = file["data"].id.get_chunk_info(30)
    rows = Hdf5Rows([path], S, V)
    with open(path, "r+b") as file:
        file.seek(block.byte_offset + 5)
        file.write(b"\xff" * 10)
    assert rows.row(29).inputs.tolist() == hdf5_row("a", 29)[0].tolist()
    with pytest.raises(RunError, match=r"a\.h5: row 30: .*; fetch the file again"):
        rows.row(30)
    path.unlink()
    with pytest.raises(RunError, match=r"a\.h5: cannot be read"):
        pickle.loads(pickle.dumps(rows)).row(0)


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", hdf5_rows("a", 2))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install 'llm360-jax\[published\]'"):
        Hdf5Rows([path], S, V)


PHASES = (
    (Part("ArXiv", 0.25, source="slimpajama-arxiv", half="even"), Part("C4", 0.75)),
    (
        Part("C4", 0.5, stop=0.5),
        Part("StarCoder_fim_shuffled", 0.5, source="starcoder", epochs=2, fim_rate=0.9, shuffle=True),
    ),
)


@pytest.fixture
def crystal(tmp_path) -> Path:
    folders = {
        "phase1/SlimPajama/ArXiv_train_packed_part0of2": (3, 2),
        "phase1/SlimPajama/C4_train_packed_part0of2": (10, 5),
        "phase2/SlimPajama/c4_train_packed_part1of2": (12, 8),
        "phase2/StarCoder/epoch_0": (6,),
        "phase2/StarCoder/epoch_1": (6,),
    }
    for folder, counts in folders.items():
        for i, n in enumerate(counts):
            write_hdf5(tmp_path / folder / f"data-{i:05}.h5", hdf5_rows(f"{folder}/{i}", n))
    return tmp_path


def test_phases_are_mixed_from_their_folders(crystal):
    data: TokenData = PublishedCrystal(crystal, PHASES, [None, 50], S, V, seed=2)
    assert isinstance(data, PublishedCrystal)
    assert is_published(crystal) == "hdf5"
    assert [(p.first_chunk, p.samples, p.samples_per_chunk, p.carry) for p in data.phases] == [
        (0, 20, 20, True),  # 5 rows / 0.25 = 15 rows / 0.75
        (1, 50, 50, True),
    ]
    own = tuple(Part(p.name, p.weight, stop=p.stop) for p in PHASES[1])
    mixture = Mixture.of(own, {"C4": 20, "StarCoder_fim_shuffled": 12}, samples=50, file_samples=1, seed=2, phase=1)
    assert data.mixtures[1] == mixture
    parts, _, rows = mixture.at(np.arange(50))
    firsts = {"C4": "phase2/SlimPajama/c4_train_packed_part1of2", "StarCoder_fim_shuffled": "phase2/StarCoder"}
    for slot in range(50):
        part, file, row = data.place(1, slot)
        assert part == own[parts[slot]].name
        assert file.startswith(firsts[part])
        stem = f"{Path(file).parent}/{int(Path(file).stem[-5:])}"
        assert np.array(data.sample(1, slot)).tolist() == hdf5_row(stem, row)[[0, 2, 1]].tolist()
    for i in range(2):  # rows follow one another within a part, and begin again after its last
        mine = [int(r) for p, r in zip(parts, rows) if p == i]
        assert mine == [k % (10 if i == 0 else 12) for k in range(len(mine))]
    assert {row for part, file, row in (data.place(1, s) for s in range(50)) if part == "C4"} == set(range(10))
    places = [data.place(0, s) for s in range(20)]
    assert len(set(places)) == 20
    data.check_files()


def test_crystal_travels_to_other_processes_without_looking_again(crystal):
    data = PublishedCrystal(crystal, PHASES, [None, 50], S, V, seed=2)
    message = pickle.dumps(data)
    before = [np.array(data.sample(c, s)).tolist() for c in range(2) for s in range(20)]
    write_hdf5(crystal / "phase1" / "C4" / "new.h5", hdf5_rows("new", 4))
    copy = pickle.loads(message)
    epochs = [interleave for mixture in copy.mixtures for interleave in mixture._interleaves]
    assert len(epochs) == 4
    assert all("_before" in vars(interleave) for interleave in epochs)  # tables that take seconds at real size
    assert [np.array(copy.sample(c, s)).tolist() for c in range(2) for s in range(20)] == before
    assert (copy.sha256, copy.phases) == (data.sha256, data.phases)


def test_what_published_crystal_refuses(crystal):
    def build(phases=PHASES, samples=(None, None)) -> PublishedCrystal:
        return PublishedCrystal(crystal, phases, samples, S, V, seed=2)

    data = build()
    with pytest.raises(UserError, match=r"has no chunk 2, only 0\.\.1"):
        data.sample(2, 0)
    with pytest.raises(IndexError, match=r"position 20 is outside 0\.\.19"):
        data.sample(0, 20)
    with pytest.raises(UserError, match="no validation source 'C4': published Crystal data has none"):
        data.validation("C4")
    with pytest.raises(UserError, match="2 phases and 1 numbers of samples"):
        build(samples=(None,))
    with pytest.raises(UserError, match="0 phases"):
        build((), ())
    with pytest.raises(
        UserError,
        match=r"phase1: no folder for part 'Books'; it has HDF5 files in SlimPajama/ArXiv_train_packed_part0of2, Slim",
    ):
        build(((Part("Books", 1.0),), PHASES[1]))
    with pytest.raises(UserError, match=r"phase3: no folder for part 'C4'; it has HDF5 files in none"):
        build((*PHASES, PHASES[0][1:]), (None, None, None))
    write_hdf5(crystal / "phase1" / "c4" / "new.h5", hdf5_rows("new", 4))
    with pytest.raises(UserError, match=r"part 'C4': .*phase1/.*, .*phase1/.* all bear its name"):
        build()


def test_crystal_is_identified_and_its_files_checked(crystal, tmp_path_factory):
    def digest(folder=crystal, phases=PHASES, samples=(None, None), s=S, seed=2) -> str:
        return PublishedCrystal(folder, phases, samples, s, V, seed).sha256

    moved = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(crystal, moved)
    same = digest()
    assert digest(moved) == same
    assert digest(samples=(None, 7)) != same
    assert digest(seed=3) != same
    assert digest(phases=(PHASES[0], (Part("C4", 0.4), PHASES[1][1]))) != same
    data = PublishedCrystal(moved, PHASES, (None, None), S, V, 2)
    os.rename(moved / "phase2/StarCoder/epoch_1", moved / "phase2/StarCoder/epoch_2")
    assert digest(moved) != same
    with pytest.raises(RunError, match=r"epoch_1/data-00000\.h5: cannot be read \(No such file"):
        data.check_files()


def test_phases_may_share_data_by_links(crystal):
    (crystal / "phase3").mkdir()
    (crystal / "phase3" / "SlimPajama").symlink_to(crystal / "phase1" / "SlimPajama")
    parts = (Part("C4", 1.0, stop=0.1),)
    data = PublishedCrystal(crystal, (*PHASES, parts), (None, None, 3), S, V, seed=2)
    assert [data.place(2, s) for s in range(3)] == [
        ("C4", "phase3/SlimPajama/C4_train_packed_part0of2/data-00000.h5", 0)
    ] * 3
    assert data.sample(2, 0).tokens.shape == Sample.of_tokens(np.arange(S + 1)).tokens.shape


def test_other_folders_are_not_published_data(tmp_path):
    assert is_published(tmp_path / "missing") is None
    assert is_published(tmp_path) is None
    for name in ("manifest.json", "chunks/000.arrayrecord", "training_1.jsonl", "phase1/a.jsonl", "phases/a.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert is_published(tmp_path) is None
    assert is_published(tmp_path / "manifest.json") is None
