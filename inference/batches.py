"""Rows of many lengths as batches of few shapes, so that other rows compile no new program."""

from collections.abc import Iterator, Sequence


def batches(
    lengths: Sequence[int], longest: int, batch_tokens: int, ways: int
) -> Iterator[tuple[int, list[int | None]]]:
    """Put rows of like length together, in few shapes.

    Args:
        lengths: of the rows; one of length 0 is in no batch.
        longest: largest width.
        batch_tokens: rows times width of a batch, about; at least one row.
        ways: parts that a batch is split into.

    Returns:
        (width, numbers of the rows) of each batch, the widest first; None fills up to a power of two, or to the
        largest batch.
    """
    widths = [min(longest, max(16, power(length))) for length in lengths]
    for width in sorted({w for w, length in zip(widths, lengths) if length > 0}, reverse=True):
        numbers = [n for n, w in enumerate(widths) if w == width and lengths[n] > 0]
        size = max(1, batch_tokens // width)
        size += -size % ways
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            shape = min(size, power(len(part)) + -power(len(part)) % ways)
            yield width, [*part, *[None] * (shape - len(part))]


def power(number: int) -> int:
    """The power of two that is not below it."""
    return 1 << max(number - 1, 0).bit_length()
