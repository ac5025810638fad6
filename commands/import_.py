"""Add a Hugging Face folder (Llama or CrystalCoder) to the series of a run, with a proof that nothing changed."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from commands.flags import CompileCache, Json, nearest, note
from errors import UserError
from models import families, formats, recipes


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    hf_dir: tyro.conf.Positional[Path]
    """Folder with config.json and weights: safetensors or .bin, one file or shards."""
    run: Path
    """Run directory to add to; made if it is not there."""
    as_: Annotated[str | None, tyro.conf.arg(name="as")] = None
    """Place in the series: an index, ckpt_012, or CrystalCoder_phase2_checkpoint_018000. By default the folder's name,
    if it is of that kind, else the next index with step and tokens unknown."""
    recipe: str | None = None
    """Recipe whose arithmetic gives step, tokens and learning rate; by default the one whose model the folder holds."""
    every: tuple[int, ...] = ()
    """Steps between series checkpoints, a number for each phase, if not the recipe's."""
    transformers: bool = True
    """Compare logits with Hugging Face's transformers too, if it is installed and has the memory."""
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout: the parity report."""


def run(args: Args) -> dict[str, Any]:
    """Verb `import`."""
    from huggingface.importer import import_folder

    if args.recipe is not None and args.recipe not in recipes():
        raise UserError(f"--recipe {args.recipe!r}: unknown{nearest(args.recipe, recipes())}")
    args.compiled.enable()
    target, proof, seconds = import_folder(
        args.hf_dir,
        args.run,
        formats(),
        families(),
        recipes(),
        args.recipe,
        args.as_,
        args.every,
        args.transformers,
        note,
    )
    position = target.position
    tokens = target.recipe.data.tokens_per_step * position.step if target.recipe and position else None
    result = {
        "checkpoint": f"{args.run}@{target.index}",
        "recipe": target.recipe.recipe if target.recipe else None,
        "step": position.step if position else None,
        "tokens": tokens,
        "seconds": seconds,
        "parity": dataclasses.asdict(proof),
    }
    if not args.json:
        where = f"step {position.step:,}, {tokens:,} tokens" if position else "step not known"
        print(f"{result['checkpoint']}: {target.model.family}, recipe {result['recipe'] or 'not known'}, {where}")
    return result
