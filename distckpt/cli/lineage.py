"""Lineage: which checkpoint each one's run went on from, drawn as lines.

A line of checkpoints, each the parent of the next, stays at one depth; what branches off is drawn below it, indented,
and the line that stays in its branch, or else leads to the newest checkpoint, goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from distckpt.inventory import Found


def lines_of(found: list[Found]) -> Iterator[tuple[int, str, str]]:
    """Yield each of `found`, as its index, with what is drawn before it, and a note on where it came from."""
    places = {(one.checkpoint.step, one.checkpoint.attempt): index for index, one in enumerate(found) if one.checkpoint}
    children: dict[int | None, list[int]] = defaultdict(list)
    notes = {}
    for index, one in enumerate(found):
        wanted = one.checkpoint.parent if one.checkpoint else None
        above = None if wanted is None else places.get((wanted.get("step"), wanted.get("attempt")))  # type: ignore[arg-type]
        if above is not None and above >= index:  # nobody goes back; a circle would never end
            above = None
        elif wanted is not None and above is None:
            notes[index] = f" (from {wanted.get('step')}, which is gone)"
        if one.branch and (above is None or found[above].branch != one.branch):
            notes[index] = f" ({one.branch})" + notes.get(index, "")
        children[above].append(index)
    ends = _ends(found, children)
    ranking = {index: (one.branch, ends[index]) for index, one in enumerate(found)}
    for root in children[None]:
        yield from _line(root, "", children, ranking, notes)


def _ends(found: list[Found], children: dict[int | None, list[int]]) -> dict[int, float]:
    """Return when the newest checkpoint was made that each one leads to."""
    ends: dict[int, float] = {}
    for index in reversed(range(len(found))):  # children come after their parents
        checkpoint = found[index].checkpoint
        own = checkpoint.created if checkpoint else 0.0
        ends[index] = max([own, *(ends[child] for child in children.get(index, []))])
    return ends


def _line(
    first: int,
    guide: str,
    children: dict[int | None, list[int]],
    ranking: dict[int, tuple[str, float]],
    notes: dict[int, str],
) -> Iterator[tuple[int, str, str]]:
    """Yield a line of checkpoints and the branches off it."""
    index: int | None = first
    lead = guide
    while index is not None:
        yield index, lead, notes.get(index, "")
        lead = guide.replace("├─ ", "│  ").replace("└─ ", "   ")
        guide = lead
        below = children.get(index, [])
        own = ranking[index][0]
        main = max(below, key=lambda child: (ranking[child][0] == own, ranking[child][1]), default=None)
        for branch in below:
            if branch != main:
                yield from _line(branch, f"{lead}├─ ", children, ranking, notes)
        index = main
