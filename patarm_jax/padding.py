"""Buckets of length, so that few shapes are compiled, and rows that short sequences share."""

from collections.abc import Sequence

# Widths of prompts and rows are buckets of this many tokens.
WIDTH_MULTIPLE = 64


def bucket(length: int, multiple: int = WIDTH_MULTIPLE) -> int:
    """The padded length for a length: `multiple` times the least of 1, 2, 3, 4, 6, 8, 12, 16, … that is enough.

    Two sizes per doubling: a step is compiled for a dozen lengths at most, and past twice the multiple a row grows by
    less than half.

    >>> [bucket(length, 128) for length in (1, 128, 129, 257, 513, 769, 1025)]
    [128, 128, 256, 384, 768, 1024, 1536]
    """
    needed = max(1, -(-length // multiple))
    power = 1 << (needed - 1).bit_length()  # the least power of two that is enough
    three_quarters = 3 * power // 4
    return multiple * (three_quarters if power >= 4 and three_quarters >= needed else power)


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of indices whose lengths fit into `width` together: the longest first, each into the first row with room.

    >>> pack([3, 9, 4, 6], 10)
    [[1], [3, 2], [0]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
