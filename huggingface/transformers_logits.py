"""Logits of a Llama folder by Hugging Face's transformers, whose version it prints.

    python -m huggingface.transformers_logits FOLDER TOKENS.npy OUT.npy

A program of its own, so that torch and jax do not share a process.
"""

import sys

NOT_USABLE = 3
"""Exit code: it is installed and cannot be imported."""


def main(folder: str, tokens: str, out: str) -> None:
    """Write float32 [B, S, V]."""
    import numpy as np

    try:
        import torch
        import transformers
    except Exception as e:  # an installation may be broken in any way
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(NOT_USABLE)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(tokens))).logits
    np.save(out, logits.float().numpy())
    print(transformers.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
