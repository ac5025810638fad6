"""Folders as transformers itself writes them: what we read of them computes the logits that it computes."""

import jax
import numpy as np
import pytest

from amber_jax.convert import FORMAT
from huggingface.folder import Folder
from inference.forward import forward
from layers import params
from layers.region import Region

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TOKENS = np.random.default_rng(2).integers(0, 100, (2, 40))  # also token 0, the padding


@pytest.fixture(scope="module")
def llama():
    """transformers' Llama with every parameter random, and its logits of TOKENS."""
    torch = pytest.importorskip("torch", reason="compares with transformers on torch; pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="compares with it; pip install -e '.[parity]'")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=56,
        intermediate_size=151,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
        return model, model(torch.from_numpy(TOKENS)).logits.numpy()


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
