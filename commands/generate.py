"""Continue prompts, greedily or sampled, with a key/value cache."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from commands.flags import CompileCache, Json, Where, target_of
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    ref: tyro.conf.Positional[str]
    """Checkpoint: DIR@K, DIR@latest, DIR@init, DIR@step=N."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeatable, all are continued together."""
    max_new_tokens: int = 64
    """Longest continuation."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Same seed, same text."""
    special: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read special tokens spelled in the prompt as such, for example <|fim_prefix|>; else they are plain text."""
    no_cache: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the whole prefix again for every token: slow, gives the same text."""
    tokenizer: Path | None = None
    """SentencePiece .model, tokenizer.json, or a folder with one, if not the one of the run."""
    where: Annotated[Where, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Where)
    compiled: Annotated[CompileCache, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompileCache)
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> dict[str, Any]:
    """Verb `generate`."""
    from inference.sampling import Sampling

    if not args.prompt:
        raise UserError('generate: no prompt; give --prompt "…" at least once')
    for prompt in args.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as e:  # bytes that are not UTF-8 reach Python as lone surrogates
            raise UserError(f"--prompt {prompt!r}: not UTF-8 ({e.reason} at character {e.start})") from e
    target = target_of(args.ref, args.where, args.compiled, tokenizer=args.tokenizer)
    subject, tokenizer = target.one(), target.tokenizer
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    prompts = [tokenizer.encode(p, special=args.special) for p in args.prompt]
    new = subject.generate(prompts, sampling, use_cache=not args.no_cache)
    texts = [tokenizer.decode(p + n) for p, n in zip(prompts, new, strict=True)]
    if not args.json:
        print("\n---\n".join(texts))
    continuations = [{"prompt": p, "text": t, "new_tokens": n} for p, t, n in zip(args.prompt, texts, new, strict=True)]
    return {"checkpoint": subject.name, "continuations": continuations}
