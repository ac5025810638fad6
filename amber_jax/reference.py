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
        widths = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (
            linear(x, f"{name}.{part}_proj", embed, n * embed // heads).reshape(*tokens.shape, n, -1).swapaxes(1, 2)
            for part, n in widths.items()
        )  # [B, H, S, K]
        k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
        scores = _rotate(q, base, scaling) @ _rotate(k, base, scaling).swapaxes(2, 3) / q.shape[3] ** 0.5
        out = causal_softmax(scores) @ v
        return linear(out.swapaxes(1, 2).reshape(x.shape), f"{name}.o_proj", embed, embed)

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        gate = silu(linear(x, f"{name}.gate_proj", embed, inner))
        gate *= linear(x, f"{name}.up_proj", embed, inner)
        return linear(gate, f"{name}.down_proj", inner, embed)

    vocab, embed, heads = config["vocab_size"], config["hidden_size"], config["num_attention_heads"]
    inner, kv_heads = config["intermediate_size"], config.get("num_key_value_heads") or heads
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # Where transformers 5 writes it; where 4 does; and what it was before it could be written.
    base = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    x = tensor("model.embed_tokens.weight", vocab, embed)[tokens]  # [B, S, D]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        x += attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x += mlp(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    last = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return linear(norm(x, "model.norm"), last, embed, vocab)


def _rotate(x: np.ndarray, base: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """Half-split rotary, angles in float32 as there: dimension i of a head turns with dimension i + K/2."""
    positions, width = np.arange(x.shape[2], dtype=np.float32), x.shape[3]
    frequencies = 1 / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / width)
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        context, low, high = (
            scaling[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        for n, frequency in enumerate(frequencies):  # said as in the paper's code, wave by wave
            wave = 2 * np.pi / frequency
            if wave > context / low:
                frequencies[n] = frequency / scaling["factor"]
            elif wave > context / high:
                share = (context / wave - low) / (high - low)
                frequencies[n] = (1 - share) * frequency / scaling["factor"] + share * frequency
    angle = np.outer(positions, frequencies)  # [S, K/2]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
