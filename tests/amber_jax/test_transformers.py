"""Folders as transformers itself writes them: what we read of them computes the logits that it computes."""

import json

import jax
import numpy as np
import pytest

import run as command
from amber_jax.convert import FORMAT
from checkpoint.names import from_flat
from checkpoint.series import Series
from errors import RunError
from huggingface import parity
from huggingface.folder import Folder
from inference.forward import forward
from inference.generate import generate
from inference.sampling import Sampling
from layers import params
from layers.region import Region
from parallel.mesh import MeshConfig

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TOKENS = np.random.default_rng(2).integers(0, 100, (2, 40))  # also token 0, the padding


def random_llama(tokens, spread, **config):
    """transformers' Llama of a config with every parameter random, and its logits of some tokens."""
    torch = pytest.importorskip("torch", reason="compares with transformers on torch; pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="compares with it; pip install -e '.[parity]'")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(attn_implementation="eager", **config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
        return model, model(torch.from_numpy(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def llama():
    return random_llama(
        TOKENS,
        0.1,
        vocab_size=100,
        hidden_size=56,
        intermediate_size=151,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        pad_token_id=0,
    )


@pytest.mark.parametrize("how", ["safetensors", "shards", "bin"])
def test_logits_of_a_saved_llama(llama, mesh_of, tmp_path, how):
    model, expected = llama
    model.save_pretrained(
        tmp_path, safe_serialization=how != "bin", max_shard_size="100KB" if how == "shards" else "1GB"
    )
    if how == "bin" and not (tmp_path / "pytorch_model.bin").exists():
        pytest.skip("this transformers writes no .bin; versions before 5 do")
    assert (tmp_path / "model.safetensors.index.json").exists() == (how == "shards")
    folder, mesh = Folder(tmp_path), mesh_of("data=1")
    config = FORMAT.config_from_hf(folder.config)
    assert (config.norm_eps, config.rope_base, config.padding_id) == (1e-5, 5000.0, 0)
    weights = FORMAT.collect(config, {name: folder.read(name) for name in folder.tensors})
    weights = jax.device_put(weights, params.shardings(config.abstract, mesh))
    ours = forward(config, weights, TOKENS, mesh, Region("float32"))["logits"]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(ours, expected, **TOLERANCE)
    np.testing.assert_allclose(FORMAT.reference(folder.config, folder.read, TOKENS), expected, **TOLERANCE)


def test_it_loads_our_export_and_writes_the_same_text(llama, tmp_path, capsys):
    """By the verbs: its folder in, ours out (both proofs ask it too), and then it reads ours as any user would."""
    import torch
    import transformers

    model, expected = llama
    model.save_pretrained(tmp_path / "theirs")
    assert command.main(["import", str(tmp_path / "theirs"), "--run", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["parity"]
    assert report["transformers"]["largest_difference"] < 1e-5
    assert report["transformers"]["version"] == transformers.__version__
    assert command.main(["export", f"{tmp_path}/run@0", "--out", str(tmp_path / "ours"), "--shard-gb", "1e-4"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is transformers.LlamaForCausalLM
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(TOKENS)).logits.numpy(), expected, **TOLERANCE)
        theirs = back.generate(torch.from_numpy(TOKENS[:1, :8]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    run = Series(tmp_path / "run")[0]
    config = FORMAT.config_from_hf(Folder(tmp_path / "ours").config)
    weights = from_flat({name: run[name][...] for name in run})
    mesh = MeshConfig().build(jax.devices()[:1])
    new = generate(config, weights, TOKENS[:1, :8].tolist(), mesh, Region("float32"), Sampling(12), eos_id=-1)
    assert new == theirs[:, 8:].tolist()


def test_a_model_that_it_sees_otherwise_is_refused(llama, tmp_path):
    """Logits with another rotary base than the folder's: the comparison with transformers can fail."""
    model, _ = llama
    model.save_pretrained(tmp_path / "theirs")
    folder = Folder(tmp_path / "theirs")
    tokens = TOKENS[:, :16]
    logits = FORMAT.reference(folder.config | {"rope_theta": 1e4}, folder.read, tokens)
    with pytest.raises(RunError, match="logits of the checkpoint differ from those of transformers"):
        parity._transformers(folder, tokens, logits, 1000)
