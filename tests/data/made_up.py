"""Made-up prose and code: the same for the same seed."""

import random

SENTENCE = "the of chunk window token stream order seed step batch and a reader finds what was read at which time"
WORDS = SENTENCE.split()


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + ".\n"


def code(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "\n".join(f"{'    ' * rng.randint(0, 3)}{rng.choice(WORDS)} = {rng.randint(0, 99)}" for _ in range(lines))
