"""Logits of a Hugging Face Llama in NumPy, straight from its tensors (fact sheet 1.2 and 1.3).

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
        read: gives a tensor by its name, in any float dtype. Called once for each, from the embedding to the head.
        tokens: int [B, S].

    Returns:
        float32 [B, S, V].

    Raises:
        UserError: a tensor has another shape than the config says.
    """

    tensor = reader(read)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + config["rms_norm_eps"]) * tensor(f"{name}.weight", embed)

    def linear(x: np.ndarray, name: str, inputs: int, outputs: int) -> np.ndarray:
        return x @ tensor(f"{name}.weight", outputs, inputs).T

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        q, k, v = (
            linear(x, f"{name}.{part}_proj", embed, embed).reshape(*tokens.shape, heads, -1).swapaxes(1, 2)
            for part in "qkv"
        )  # [B, H, S, K]
        scores = _rotate(q, base) @ _rotate(k, base).swapaxes(2, 3) / q.shape[3] ** 0.5
        out = causal_softmax(scores) @ v
        return linear(out.swapaxes(1, 2).reshape(x.shape), f"{name}.o_proj", embed, embed)

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        gate = silu(linear(x, f"{name}.gate_proj", embed, inner))
        gate *= linear(x, f"{name}.up_proj", embed, inner)
        return linear(gate, f"{name}.down_proj", inner, embed)

    vocab, embed, heads = config["vocab_size"], config["hidden_size"], config["num_attention_heads"]
    inner = config["intermediate_size"]
    # Where transformers 5 writes it; where 4 does; and what it was before it could be written.
    base = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    x = tensor("model.embed_tokens.weight", vocab, embed)[tokens]  # [B, S, D]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        x += attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x += mlp(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return linear(norm(x, "model.norm"), "lm_head", embed, vocab)


def _rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Half-split rotary, angles in float32 as there: dimension i of a head turns with dimension i + K/2."""
    positions, width = np.arange(x.shape[2], dtype=np.float32), x.shape[3]
    angle = np.outer(positions, 1 / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / width))  # [S, K/2]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
