"""Amber as Hugging Face's Llama writes it (fact sheet 1.3): names, shapes and config. Nothing is guessed.

Linear weights are ``[out, in]`` there; ours are ``[in, ...]``, heads apart, layers stacked.
"""

import re
from collections.abc import Mapping
from typing import Any

from amber_jax import reference
from amber_jax.config import AmberConfig
from errors import UserError
from huggingface.mapping import Format, Mapped, number, require


def config_from_hf(config: Mapping[str, Any]) -> AmberConfig:
    """See `Format.config_from_hf`."""
    require(config, {"model_type": ("llama", None)}, "Amber")
    embed, heads = number(config, "hidden_size", int), number(config, "num_attention_heads", int)
    if embed % heads:
        raise UserError(f"config.json: hidden_size {embed} is not a multiple of num_attention_heads {heads}")
    # transformers 5 writes the rotary base into a dict and leaves rope_theta out.
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: rope_parameters is {rope!r}, expected a mapping")
    base = {"rope_theta": 10000.0} | {
        name: value for found in (config, rope) for name, value in found.items() if name == "rope_theta" and value
    }
    fixed = {
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "head_dim": (embed // heads, embed // heads),
        "quantization_config": (None, None),
    }
    require(config, fixed, "Amber")
    kv_heads = number(config, "num_key_value_heads", int) if config.get("num_key_value_heads") else heads
    tied = config.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings is {tied!r}, expected true or false")
    padding = config.get("pad_token_id")
    if padding is not None and (not isinstance(padding, int) or isinstance(padding, bool)):
        raise UserError(f"config.json: pad_token_id is {padding!r}, expected an id or null")
    return AmberConfig(
        vocab_size=number(config, "vocab_size", int),
        context_length=number(config, "max_position_embeddings", int),
        num_layers=number(config, "num_hidden_layers", int),
        embed=embed,
        num_heads=heads,
        head_dim=embed // heads,
        mlp=number(config, "intermediate_size", int),
        norm_eps=number(config, "rms_norm_eps", float),
        rope_base=number(base, "rope_theta", float),
        init_std=number(config, "initializer_range", float),
        padding_id=None if padding == -1 else padding,  # early Llama configs write -1 for none
        num_kv_heads=None if kv_heads == heads else kv_heads,
        tied_embeddings=tied,
        **_scaling(config.get("rope_scaling") or rope),
    )


def _scaling(rope: Any) -> dict[str, Any]:
    """Fields of Llama 3's rotary scaling from what says how positions are scaled; none where nothing is."""
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: rope_scaling is {rope!r}, expected a mapping or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind != "llama3":
        raise UserError(f"config.json: rope_scaling is {dict(rope)!r}, and Amber has none or that of type 'llama3'")
    return {
        "rope_factor": number(rope, "factor", float),
        "rope_low_freq_factor": number(rope, "low_freq_factor", float),
        "rope_high_freq_factor": number(rope, "high_freq_factor", float),
        "rope_original_context": number(rope, "original_max_position_embeddings", int),
    }


def config_to_hf(config: AmberConfig) -> dict[str, Any]:
    """See `Format.config_to_hf`."""
    if config.num_heads * config.head_dim != config.embed:
        raise UserError(
            f"export: {config.num_heads} heads of {config.head_dim} are not embed={config.embed} wide, and Llama's "
            "config cannot say that"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "max_sequence_length": config.context_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_factor
        and {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_context,
        },
        "attention_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "pad_token_id": config.padding_id,
        "use_cache": True,
    }


def tensors(config: AmberConfig) -> tuple[Mapped, ...]:
    """See `Format.tensors`."""
    c, width = config, config.attention_width
    heads, fewer, embed, inner = (c.num_heads, c.head_dim), (c.kv_heads, c.head_dim), (c.embed,), (c.mlp,)
    layer = [  # theirs, its shape, ours, shape of ours
        ("input_layernorm", embed, "attention_norm.scale", embed),
        ("self_attn.q_proj", (width, c.embed), "attention.wq", embed + heads),
        ("self_attn.k_proj", (c.kv_width, c.embed), "attention.wk", embed + fewer),
        ("self_attn.v_proj", (c.kv_width, c.embed), "attention.wv", embed + fewer),
        ("self_attn.o_proj", (c.embed, width), "attention.wo", heads + embed),
        ("post_attention_layernorm", embed, "mlp_norm.scale", embed),
        ("mlp.gate_proj", (c.mlp, c.embed), "mlp.gate", embed + inner),
        ("mlp.up_proj", (c.mlp, c.embed), "mlp.up", embed + inner),
        ("mlp.down_proj", (c.embed, c.mlp), "mlp.down", inner + embed),
    ]
    vocabulary = (c.vocab_size, c.embed)
    head = Mapped("lm_head.weight", vocabulary, ("head.kernel",), vocabulary[::-1], transposed=True)
    return (
        Mapped("model.embed_tokens.weight", vocabulary, ("embedding.table",), vocabulary),
        *(
            Mapped(f"model.layers.{n}.{theirs}.weight", shape, (f"layers.{ours}",), part, n, transposed=len(shape) == 2)
            for n in range(c.num_layers)
            for theirs, shape, ours, part in layer
        ),
        Mapped("model.norm.weight", embed, ("norm.scale",), embed),
        *(() if c.tied_embeddings else (head,)),
    )


FORMAT = Format(
    AmberConfig,
    config_from_hf,
    config_to_hf,
    tensors,
    dropped=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    tied={"lm_head.weight": "model.embed_tokens.weight"},  # where a config says so; else both are in the table
    reference=reference.logits,
)
