"""Tiling: whether boxes are, together, all of a larger one, each place of it once.

Pure; the sum of their sizes does not say it: two boxes on one place and none on another have the right sum, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

MAX_SPLIT_DIMS = 8  # a box is cut in at most so many dimensions: more than any mesh has

Box = tuple[Sequence[int], Sequence[int]]  # its first index, and its size, in each dimension


def tiles(whole: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Say whether `boxes` cover each place of a tensor just once, and no place outside it.

    Takes time in proportion to the number of boxes, also where they are made to be slow.

    Args:
        whole: The tensor's shape.
        boxes: The first index and the size of each; all numbers are 0 or more.

    Source: a function of d variables that is 0 far away is known by its d-fold mixed difference, and that of a box is
        +1 or -1 at each corner. So boxes tile the whole if, and only if, their corners add up to the whole's.
    """
    if any(len(start) != len(whole) or len(shape) != len(whole) for start, shape in boxes):
        return False
    if len(boxes) == 1:
        return not any(boxes[0][0]) and tuple(boxes[0][1]) == tuple(whole)
    split = [dim for dim, size in enumerate(whole) if any(start[dim] or shape[dim] != size for start, shape in boxes)]
    if not split:
        return 0 in whole  # none at all, or several that are each all of it
    if len(split) == 1:
        return _in_a_row(whole[split[0]], [(start[split[0]], shape[split[0]]) for start, shape in boxes])
    return len(split) <= MAX_SPLIT_DIMS and _corners(split, [((0,) * len(whole), whole)]) == _corners(split, boxes)


def _in_a_row(size: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Say the same of the line from 0 to `size`."""
    end = 0
    for start, length in sorted(span for span in spans if span[1]):
        if start != end:
            return False
        end += length
    return end == size


def _corners(split: Sequence[int], boxes: Sequence[Box]) -> Counter[tuple[int, ...]]:
    """Return the sum of the signs at each corner, in the dimensions `split`; those that cancel are left out."""
    signs: Counter[tuple[int, ...]] = Counter()
    for start, shape in boxes:
        for upper in product((False, True), repeat=len(split)):
            corner = tuple(start[dim] + (shape[dim] if up else 0) for dim, up in zip(split, upper, strict=True))
            signs[corner] += -1 if sum(upper) % 2 else 1
    return Counter({corner: sign for corner, sign in signs.items() if sign})
