"""Logits of given token ids."""

import dataclasses
import itertools
import zipfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from commands.flags import CompileCache, Json, Where, target_of
from errors import RunError, UserError


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    tokens: Path
    """.npy file of token ids, integers [rows, positions]."""
    out: Path
    """.npz file to write: `logits`, float32 [rows, positions, vocabulary]."""
    where: Annotated[Where, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Where)
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> dict[str, Any]:
    """Verb `logits`."""
    import numpy as np

    from inference.forward import in_batches

    try:
        tokens = np.load(args.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"--tokens {args.tokens}: cannot read it as .npy ({e})") from e
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: give a name that ends in .npz")
    target = target_of(args.ref, args.where, args.compiled)
    subject = target.one()
    batches = in_batches(target.model, subject.weights, tokens, target.mesh, target.region)
    first = next(batches)["logits"]  # refuses tokens that are none, before the file is made
    shape = [*tokens.shape, target.model.vocab_size]
    try:
        # Batch by batch, as `np.savez` writes it: all of 64 x 2048 positions of a 7B model are 17 GB.
        with zipfile.ZipFile(args.out, "w") as archive, archive.open("logits.npy", "w", force_zip64=True) as file:
            header = {"descr": np.dtype("<f4").str, "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_2_0(file, header)
            for logits in itertools.chain([first], (b["logits"] for b in batches)):
                file.write(np.ascontiguousarray(logits, "<f4").data)
    except OSError as e:
        raise RunError(f"--out {args.out}: cannot write it ({e.strerror})") from e
    if not args.json:
        print(f"{args.out}: logits float32 {shape} of {subject.name}")
    return {"checkpoint": subject.name, "out": str(args.out), "shape": shape, "dtype": "float32"}
