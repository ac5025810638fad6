"""CrystalCoder as its published folders write it (fact sheet 1.7): names, shapes and config. Nothing is guessed.

Projections are GPT-2's Conv1D there, ``[in, out]`` as ours are, with q, k and v side by side in one.
"""

import re
from collections.abc import Mapping
from typing import Any

from crystal_jax import reference
from crystal_jax.config import CrystalConfig
from errors import UserError
from huggingface.mapping import Format, Mapped, number, require

#: Fields of ``config.json`` and their one value here. The defaults of the published config class differ from the
#: published configs (fact sheet 1.6), so that those on which the forward pass rests must be there.
FIXED = {
    "model_type": ("crystalcoder", None),
    "activation_function": ("swiglu", None),
    "position_embedding_type": ("rotary", None),
    "mup_scale_qk_dot_by_d": (True, None),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "reorder_and_upcast_attn": (False, False),
    "add_cross_attention": (False, False),
    "tie_word_embeddings": (True, True),
}
#: What initial weights of a folder's config would be made with; the folder does not say (fact sheet 1.8).
INIT_STD = 0.073


def config_from_hf(config: Mapping[str, Any]) -> CrystalConfig:
    """See `Format.config_from_hf`."""
    require(config, FIXED, "CrystalCoder")
    embed, heads = number(config, "n_embd", int), number(config, "n_head", int)
    if embed % heads:
        raise UserError(f"config.json: n_embd {embed} is not a multiple of n_head {heads}")
    return CrystalConfig(
        vocab_size=number(config, "vocab_size", int),
        context_length=number(config, "n_positions", int),
        num_layers=number(config, "n_layer", int),
        embed=embed,
        num_heads=heads,
        head_dim=embed // heads,
        mlp=number(config, "n_inner", int),
        norm_eps=number(config, "layer_norm_epsilon", float),
        rope_base=10000.0,  # fixed in the published code
        rotary_dims=number(config, "rotary_dim", int),
        embedding_multiplier=number(config, "mup_embeddings_scale", float),
        output_multiplier=number(config, "mup_output_alpha", float),
        width_multiplier=number(config, "mup_width_scale", float),
        init_std=INIT_STD,
    )


def config_to_hf(config: CrystalConfig) -> dict[str, Any]:
    """See `Format.config_to_hf`."""
    if config.num_heads * config.head_dim != config.embed or config.rope_base != 10000.0:
        raise UserError(
            f"export: CrystalCoder's config cannot say {config.num_heads} heads of {config.head_dim} at "
            f"embed={config.embed}, or a rotary base of {config.rope_base}"
        )
    return {
        "architectures": ["CrystalCoderLMHeadModel"],
        **{name: value for name, (value, _) in FIXED.items()},
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.embed,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp,
        "layer_norm_epsilon": config.norm_eps,
        "rotary_dim": config.rotary_dims,
        "mup_width_scale": config.width_multiplier,
        "mup_embeddings_scale": config.embedding_multiplier,
        "mup_output_alpha": config.output_multiplier,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "use_cache": True,
    }


def tensors(config: CrystalConfig) -> tuple[Mapped, ...]:
    """See `Format.tensors`."""
    c, width = config, config.attention_width
    heads, embed, inner = (c.num_heads, c.head_dim), (c.embed,), (c.mlp,)
    layer: list[tuple[str, tuple[int, ...], tuple[str, ...], tuple[int, ...]]] = [
        ("ln_1.weight", embed, ("attention_norm.scale",), embed),
        ("ln_1.bias", embed, ("attention_norm.bias",), embed),
        ("attn.c_attn.weight", (c.embed, 3 * width), ("attention.wq", "attention.wk", "attention.wv"), embed + heads),
        ("attn.c_attn.bias", (3 * width,), ("attention.bq", "attention.bk", "attention.bv"), heads),
        ("attn.c_proj.weight", (width, c.embed), ("attention.wo",), heads + embed),
        ("attn.c_proj.bias", embed, ("attention.bo",), embed),
        ("ln_2.weight", embed, ("mlp_norm.scale",), embed),
        ("ln_2.bias", embed, ("mlp_norm.bias",), embed),
        ("mlp.c_fc.weight", embed + inner, ("mlp.up",), embed + inner),
        ("mlp.c_fc.bias", inner, ("mlp.up_bias",), inner),
        ("mlp.c_fc2.weight", embed + inner, ("mlp.gate",), embed + inner),
        ("mlp.c_fc2.bias", inner, ("mlp.gate_bias",), inner),
        ("mlp.c_proj.weight", inner + embed, ("mlp.down",), inner + embed),
        ("mlp.c_proj.bias", embed, ("mlp.down_bias",), embed),
    ]
    vocabulary = (c.vocab_size, c.embed)
    return (
        Mapped("transformer.wte.weight", vocabulary, ("embedding.table",), vocabulary),
        *(
            Mapped(f"transformer.h.{n}.{theirs}", shape, tuple(f"layers.{x}" for x in ours), part, n)
            for n in range(c.num_layers)
            for theirs, shape, ours, part in layer
        ),
        Mapped("transformer.ln_f.weight", embed, ("norm.scale",), embed),
        Mapped("transformer.ln_f.bias", embed, ("norm.bias",), embed),
    )


FORMAT = Format(
    CrystalConfig,
    config_from_hf,
    config_to_hf,
    tensors,
    dropped=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    tied={"lm_head.weight": "transformer.wte.weight"},
    reference=reference.logits,
)
