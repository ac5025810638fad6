"""The tokenizer files of an exported Hugging Face folder, for which `AutoTokenizer` needs no remote code."""

import json

from data.tokenizer import JSON, Tokenizer
from errors import UserError


def hf_files(tokenizer: Tokenizer, context_length: int) -> dict[str, str | bytes]:
    """Return name and content of each file; UserError when the tokenizer cannot be written as a `tokenizer.json`.

    Hugging Face's ids are then those of `encode(text, special=True)`; its option `split_special_tokens` is ours by
    default. The class is not LlamaTokenizer: that of transformers 5 ignores the normaliser in `tokenizer.json`, so
    that it loses a leading space, and from `tokenizer.model` it makes other pieces of several spaces.
    """
    try:
        content = tokenizer.pieces.to_json()
    except ValueError as error:
        raise UserError(f"{tokenizer.path}: cannot be exported: {error}") from error
    names = {i: token for token, i in tokenizer.special.items()}
    added = {t["id"]: t for t in content["added_tokens"]}
    roles = {
        "unk_token": content["model"]["unk_token"],
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names[tokenizer.eos_id],
    }
    more = [token for token in tokenizer.special if token not in roles.values()]
    tokens = {k: v for k, v in roles.items() if v is not None} | ({"additional_special_tokens": more} if more else {})
    config = tokens | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {k: v for k, v in t.items() if k != "id"} for i, t in sorted(added.items())},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # for the LlamaTokenizer of transformers 4, whose ids are ours too
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
        "padding_side": "left",
    }
    return {
        tokenizer.name: tokenizer.content,
        JSON: json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(tokens, indent=2) + "\n",
    }
