"""Logits of a published CrystalCoder folder in NumPy, straight from its tensors (fact sheet 1.6 and 1.7).

No model code of ours is used, so that a converted checkpoint can be compared with where it came from.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from huggingface.reference import causal_softmax, reader, silu


def logits(config: Mapping[str, Any], read: Callable[[str], np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Run the model in float32, with one of its tensors in memory at a time.

    Args:
        config: what ``config.json`` says.
        read: gives a tensor by its name, in any float dtype. Called once for each, from the embedding to the final
            norm, and once more for the embedding, which is the head.
        tokens: int [B, S].

    Returns:
        float32 [B, S, V].

    Raises:
        UserError: a tensor has another shape than the config says.
    """

    tensor = reader(read)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - np.mean(x, axis=-1, keepdims=True)
        x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * tensor(f"{name}.weight", embed) + tensor(f"{name}.bias", embed)

    def linear(x: np.ndarray, name: str, inputs: int, outputs: int) -> np.ndarray:
        return x @ tensor(f"{name}.weight", inputs, outputs) + tensor(f"{name}.bias", outputs)

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        qkv = linear(x, f"{name}.c_attn", embed, 3 * embed)
        q, k, v = (y.reshape(*tokens.shape, heads, -1).swapaxes(1, 2) for y in np.split(qkv, 3, axis=-1))
        scores = _rotate(q, rotary) @ _rotate(k, rotary).swapaxes(2, 3) / q.shape[3]
        out = causal_softmax(scores) @ v
        return linear(out.swapaxes(1, 2).reshape(x.shape), f"{name}.c_proj", embed, embed)

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        up = linear(x, f"{name}.c_fc", embed, inner)
        gate = silu(linear(x, f"{name}.c_fc2", embed, inner))
        return linear(up * gate, f"{name}.c_proj", inner, embed)

    vocab, embed, heads = config["vocab_size"], config["n_embd"], config["n_head"]
    inner, rotary = config["n_inner"], config["rotary_dim"]
    x = tensor("transformer.wte.weight", vocab, embed)[tokens] * config["mup_embeddings_scale"]  # [B, S, D]
    for n in range(config["n_layer"]):
        layer = f"transformer.h.{n}"
        x += attention(norm(x, f"{layer}.ln_1"), f"{layer}.attn")
        x += mlp(norm(x, f"{layer}.ln_2"), f"{layer}.mlp")
    x = norm(x, "transformer.ln_f") @ tensor("transformer.wte.weight", vocab, embed).T
    return x * (config["mup_output_alpha"] * config["mup_width_scale"])


def _rotate(x: np.ndarray, width: int) -> np.ndarray:
    """Interleaved rotary on the first dimensions of a head, angles in float32 as there; base 10000 is fixed there."""
    positions = np.arange(x.shape[2], dtype=np.float32)
    angle = np.outer(positions, 1 / np.float32(10000) ** (np.arange(0, width, 2, dtype=np.float32) / width))  # [S, R/2]
    a, b = x[..., 0:width:2], x[..., 1:width:2]
    pairs = np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
    return np.concatenate([pairs.reshape(*a.shape[:3], width), x[..., width:]], axis=-1)
