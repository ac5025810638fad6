"""Token streams: shards on their own, and all of them as one row of tokens."""

import json
import pickle
import resource
import shutil

import numpy as np
import pytest

from data.sources import SourceSpec, plan
from data.streams import Tokenise, TokenStream, loaded
from errors import RunError


def stream(folder, parts) -> TokenStream:
    for n, part in enumerate(parts):
        (folder / f"a-{n}.tokens").write_bytes(np.array(part, "<u2").tobytes())
    return TokenStream(folder, [f"a-{n}" for n in range(len(parts))], [len(p) for p in parts], np.dtype("<u2"))


def test_a_stream_is_its_shards_one_after_another(tmp_path):
    lengths = [3, 0, 1, 7, 0, 0, 2]
    ends = np.cumsum(lengths)
    found = pickle.loads(pickle.dumps(stream(tmp_path, [range(e - n, e) for n, e in zip(lengths, ends)])))
    assert len(found) == 13
    for start in range(14):
        for stop in range(start, 14):
            tokens = found.read(start, stop)
            assert tokens.tolist() == list(range(start, stop))
            assert tokens.dtype == np.dtype("<u2")


def test_more_shards_than_a_process_may_open(tmp_path):
    """Amber has tens of thousands, and many systems allow a process 1024 open files."""
    found = stream(tmp_path, [[n] for n in range(200)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert [int(found.read(n, n + 1)[0]) for n in range(200)] == list(range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_that_is_cut_or_gone_is_named(tmp_path):
    found = stream(tmp_path, [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "a-1.tokens").write_bytes(b"\x04\x00\x05\x00")
    assert found.read(1, 5).tolist() == [2, 3, 4, 5]
    with pytest.raises(RunError, match=r"a-1\.tokens: ends before token 3; restore it"):
        found.read(1, 6)
    (tmp_path / "a-1.tokens").unlink()
    with pytest.raises(RunError, match=r"a-1\.tokens: cannot be read .*; restore it"):
        found.read(1, 6)


def test_a_tokenizer_that_took_the_place_of_another_is_used(prepared, crystal, tmp_path):
    """As in one process that prepares twice in the same folder."""
    shutil.copy(prepared / "tokenizer.model", tmp_path)
    first = loaded(str(tmp_path / "tokenizer.model"))
    assert loaded(str(tmp_path / "tokenizer.model")) is first
    shutil.copy(crystal / "tokenizer.model", tmp_path)
    assert loaded(str(tmp_path / "tokenizer.model")).content == (crystal / "tokenizer.model").read_bytes()


def test_a_file_has_one_entry_in_the_journal(prepared, tmp_path, monkeypatch):
    """However many batches its documents come in."""
    monkeypatch.setattr("data.streams._BATCH_CHARACTERS", 100)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * 9}) + "\n" for _ in range(40)))
    (tmp_path / "b.txt").write_text("b")
    (shard,) = plan(SourceSpec("a", str(tmp_path)))
    result = Tokenise(shard, prepared / "tokenizer.model", "<u2", tmp_path / "work", "fail", None, False).run()
    assert result["files"] == [("a.jsonl", 40), ("b.txt", 1)]
