"""Documents to ids as CrystalCoder's own tools made them (fact sheet 3.5), for those who want the same data.

By default `prepare` encodes a document as it stands; nothing here is needed for that.
"""

from collections.abc import Callable, Iterator, Sequence

from data.tokenizer import Tokenizer
from errors import UserError

SPLIT_CHARACTERS = 2000  # fact sheet 3.5


def split_text(text: str) -> list[str]:
    """Return the pieces of a text: each ends before the first space at or after its 2000th character.

    Joined they are the text. All but the first begin with a space, all but the last have at least 2000 characters, and
    a text without such spaces is one piece. An empty text has none.
    """
    return list(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        space = text.find(" ", start + SPLIT_CHARACTERS)
        stop = len(text) if space < 0 else space
        yield text[start:stop]
        start = stop


def ftfy_fixer() -> Callable[[str], str]:
    """Return the function that repairs a text with ftfy, to NFC; UserError if ftfy is not installed."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError("tokenising as CrystalCoder's tools did needs the package ftfy: pip install ftfy") from error
    return lambda text: ftfy.fix_text(text, normalization="NFC")


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, *, fix: Callable[[str], str] | None = None, min_tokens: int = 1
) -> list[list[int] | None]:
    """Return the ids of each document, without `<s>` and `</s>`; None for one of fewer than `min_tokens` ids.

    A text is repaired (`fix`, or ftfy's), split, its pieces encoded separately and their ids joined. Each piece but the
    first begins with a space and gets a word-start piece before it, so there is one space too many where it begins.

    The originals' `min_sequence_len` 10 is not `min_tokens`: their tool compared it with windows, which packing makes
    2049 ids long, and so it left out no document. Unlike there, text that spells `</s>` stays text.

    The result depends on ftfy's version, and the originals' is not known. Raises UserError if ftfy is needed and not
    installed.
    """
    fix = fix or ftfy_fixer()
    split = [split_text(fix(text)) for text in texts]
    encoded = iter(tokenizer.encode_many([piece for pieces in split for piece in pieces]))
    documents = [[i for _ in pieces for i in next(encoded)] for pieces in split]
    return [ids if len(ids) >= min_tokens else None for ids in documents]
