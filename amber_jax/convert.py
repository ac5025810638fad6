"""Names and shapes of Hugging Face's Llama beside ours (fact sheet 1.3); nothing is guessed.

Hugging Face keeps linear weights ``[out, in]`` per layer; ours are ``[in, ...]``, heads apart, layers stacked.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from amber_jax.config import AmberConfig
from errors import UserError

#: Ours, inside a layer -> Hugging Face's, inside ``model.layers.N.``.
LAYER = {
    "attention.wq": "self_attn.q_proj.weight",
    "attention.wk": "self_attn.k_proj.weight",
    "attention.wv": "self_attn.v_proj.weight",
    "attention.wo": "self_attn.o_proj.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}
TOP = {
    "embedding.table": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}
#: Buffers that old exports hold and that are computed, not learned.
DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def config_from_hf(config: Mapping[str, Any]) -> AmberConfig:
    """AmberConfig of a Hugging Face ``config.json``.

    Raises:
        UserError: the config is of another architecture.
    """
    if config.get("model_type") != "llama":
        raise UserError(f"convert: model_type is {config.get('model_type')!r}, expected 'llama'")
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise UserError("convert: grouped key/value heads (num_key_value_heads) are not part of Amber's architecture")
    width = config["hidden_size"] // heads
    expected = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "head_dim": width,
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UserError(f"convert: {name} is {config[name]!r}, and Amber's architecture has {value!r}")
    return AmberConfig(
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        num_layers=config["num_hidden_layers"],
        embed=config["hidden_size"],
        num_heads=heads,
        head_dim=width,
        mlp=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_base=config.get("rope_theta", 10000.0),
        init_std=config["initializer_range"],
        padding_id=config.get("pad_token_id"),
    )


def from_hf(tensors: Mapping[str, np.ndarray], config: AmberConfig) -> dict[str, Any]:
    """Our parameters (nested dict of float32 arrays) from Hugging Face's.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape; named, with what was expected.
    """
    left = {name: t for name, t in tensors.items() if not DROPPED.fullmatch(name)}

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in left:
            raise UserError(f"convert: tensor {name!r} is missing")
        tensor = left.pop(name)
        if tensor.shape != shape:
            raise UserError(f"convert: tensor {name!r} has shape {tensor.shape}, expected {shape}")
        return tensor.astype(np.float32)

    c, width = config, config.attention_width
    result: dict[str, Any] = {}

    def put(ours: str, value: np.ndarray) -> None:
        *path, leaf = ours.split(".")
        node = result
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value

    put("embedding.table", take(TOP["embedding.table"], c.vocab_size, c.embed))
    put("norm.scale", take(TOP["norm.scale"], c.embed))
    put("head.kernel", take(TOP["head.kernel"], c.vocab_size, c.embed).T)
    shapes = {
        "attention.wo": (c.embed, width),
        "mlp.gate": (c.mlp, c.embed),
        "mlp.up": (c.mlp, c.embed),
        "mlp.down": (c.embed, c.mlp),
        "attention_norm.scale": (c.embed,),
        "mlp_norm.scale": (c.embed,),
    }
    for ours, theirs in LAYER.items():
        rows = [take(f"model.layers.{n}.{theirs}", *shapes.get(ours, (width, c.embed))).T for n in range(c.num_layers)]
        stacked = np.stack(rows)
        if ours == "attention.wo":
            stacked = stacked.reshape(c.num_layers, c.num_heads, c.head_dim, c.embed)
        elif ours.startswith("attention.w"):
            stacked = stacked.reshape(c.num_layers, c.embed, c.num_heads, c.head_dim)
        put(f"layers.{ours}", stacked)
    if left:
        raise UserError(f"convert: unknown tensors {sorted(left)[:5]}; this is not a plain Llama")
    return result
