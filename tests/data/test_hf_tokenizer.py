"""The tokenizer files of a Hugging Face folder: ours again, and transformers' where that is installed."""

import json
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer, hf_files, load, train_tokenizer
from errors import UserError
from tests.data.made_up import code, prose
from tests.data.test_tokenizer import KEPT, folder, kept, model, texts

NAMES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("hf")
    train_tokenizer([prose(i, 300) + code(i, 100) for i in range(20)], 420, path / "tokenizer.model")
    return load(folder(path, added_tokens={"<|x|>": 420}))


def write(path: Path, tokenizer: Tokenizer) -> Path:
    for name, content in hf_files(tokenizer, context_length=128).items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def check_with_transformers(path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.bos_id,
    )
    assert theirs.model_max_length == 128
    assert {*theirs.all_special_tokens} == {*tokenizer.special}
    for text in texts(7, 30):
        special = tokenizer.encode(text, special=True)
        assert dict(theirs(text)) == {"input_ids": special, "attention_mask": [1] * len(special)}
        assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_what_is_written_is_the_same_tokenizer(tokenizer, tmp_path):
    assert {p.name for p in write(tmp_path, tokenizer).iterdir()} == NAMES
    same = load(tmp_path)
    assert (same.sha256, same.special) == (tokenizer.sha256, tokenizer.special)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"].keys() == {"0", "1", "2", "420"}
    assert (config["eos_token"], config["model_max_length"]) == ("</s>", 128)


def test_tokenizer_json_alone(tokenizer, tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    alone = load(write(tmp_path / "a", tokenizer) / "tokenizer.json")
    assert {p.name for p in write(tmp_path / "b", alone).iterdir()} == NAMES - {"tokenizer.model"}
    check_with_transformers(tmp_path / "b", alone)


def test_transformers_reads_a_trained_one(tokenizer, tmp_path):
    check_with_transformers(write(tmp_path, tokenizer), tokenizer)


@kept
@pytest.mark.parametrize("name", ["llama", "crystal"])
def test_transformers_reads_the_published(name, tmp_path):
    check_with_transformers(write(tmp_path, load(KEPT / f"{name}.model")), load(KEPT / f"{name}.model"))


@pytest.mark.parametrize(
    "settings", [{"model_type": "unigram", "vocab_size": 290}, {"normalization_rule_name": "nmt_nfkc"}]
)
def test_a_model_that_no_tokenizer_json_equals_is_refused(settings, tmp_path):
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    (tmp_path / "x.model").write_bytes(model(**(plain | settings)))
    with pytest.raises(UserError, match=r"x\.model: cannot be exported: only a BPE model that leaves text as it is"):
        hf_files(load(tmp_path / "x.model"), 128)
