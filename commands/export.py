"""Write a checkpoint as a Hugging Face folder, with a proof that nothing changed."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from commands.flags import CompileCache, Json, Where, note, target_of
from errors import UserError
from models import formats


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    out: Path
    """Folder to make."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights in the folder."""
    shard_gb: float = 5.0
    """Largest weight file, in gigabytes (1e9 bytes)."""
    tokenizer: Path | None = None
    """Tokenizer file or folder to put beside the weights, if not the one of the run."""
    transformers: bool = True
    """Compare logits with Hugging Face's transformers too, if it is installed and has the memory."""
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout: the parity report."""


def run(args: Args) -> dict[str, Any]:
    """Verb `export`."""
    from huggingface.exporter import export_folder

    if not 1e-6 <= args.shard_gb < math.inf:
        raise UserError(f"--shard-gb {args.shard_gb}: must be a positive number of gigabytes")
    target = target_of(args.ref, Where(), args.compiled, tokenizer=args.tokenizer)
    model, entry = target.model, target.entry
    name = f"{target.run}@{entry.manifest.name}"
    form = next(f for f in formats().values() if f.model is type(model))
    shard_bytes = int(args.shard_gb * 1e9)
    proof, seconds = export_folder(
        entry,
        model,
        target.recipe,
        args.out,
        form,
        args.dtype,
        shard_bytes,
        target.find_tokenizer(),
        args.transformers,
        note,
    )
    if not args.json:
        print(f"{args.out}: {name} as a Hugging Face folder, digest {proof.digest}")
    return {
        "checkpoint": name,
        "out": str(args.out),
        "seconds": seconds,
        "parity": dataclasses.asdict(proof),
    }
