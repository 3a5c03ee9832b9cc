"""The journal: what a job's ranks say they have saved and found, kept where no kill can reach; and the judgement on it.

Each rank appends lines of JSON to a file of its own. A line goes out in one write, and is in the system's hands from
then on, so SIGKILL loses none.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Event = Literal["resumed", "saving", "saved", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a rank says.

    Attributes:
        leg: In which of the job's starts.
        rank: The rank.
        event: "resumed": it has restored a step, 0 if there was none; "saving": it begins to save one; "saved": that
            save was acknowledged; "ended": it leaves by itself.
        step: The step.
        digest: The digest of the rank's state at that step; "" where it says nothing new.
        moment: When, in seconds of a clock that all processes of the machine share.
    """

    leg: int
    rank: int
    event: Event
    step: int
    digest: str
    moment: float


class Journal:
    """One rank's pen."""

    def __init__(self, folder: Path, *, leg: int, rank: int) -> None:
        self._leg, self._rank = leg, rank
        self._fd = os.open(_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, event: Event, step: int, digest: str = "") -> None:
        """Append a line.

        Ranks: any.
        """
        line = Line(
            leg=self._leg, rank=self._rank, event=event, step=step, digest=digest, moment=time.clock_gettime(_CLOCK)
        )
        os.write(self._fd, json.dumps(asdict(line)).encode() + b"\n")


_CLOCK = time.CLOCK_MONOTONIC


def read(folder: Path, rank: int) -> list[Line]:
    """Return what a rank has said so far; a last line that is not whole is left out.

    Ranks: any, and who watches them.
    """
    try:
        text = _file(folder, rank).read_text()
    except FileNotFoundError:
        return []
    return [Line(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one start of the job.

    Attributes:
        step: The step that it resumed from; None if it never came so far.
        lost: Acknowledged checkpoints that are newer than that step.
        wrong: What was wrong with the states that the ranks came to, in words.
    """

    step: int | None
    lost: tuple[int, ...]
    wrong: tuple[str, ...]


def judge(lines: Sequence[Line], *, leg: int, num_ranks: int) -> Verdict:
    """Compare what the ranks found at one start with what they had said before.

    Args:
        lines: All ranks' lines, each rank's in its order.
        leg: The start to judge.
        num_ranks: How many ranks the job has.

    Ranks: none; this is for who watches them.
    """
    before = [line for line in lines if line.leg < leg]
    resumed = {line.rank: line for line in lines if line.leg == leg and line.event == "resumed"}
    if len(resumed) < num_ranks:
        return Verdict(step=None, lost=(), wrong=())
    step = resumed[0].step
    acknowledged = {line.step for line in before if line.event == "saved"}
    said = _digests(before)
    wrong = [
        f"rank {r} resumed step {line.step}, rank 0 step {step}" for r, line in resumed.items() if line.step != step
    ]
    for rank, line in sorted(resumed.items()):
        if line.step != 0 and line.digest != said.get((rank, line.step)):
            wrong.append(f"rank {rank} resumed step {line.step} with a state that it never saved there")
    for line in lines:
        if line.leg == leg and line.event == "saving" and line.digest != said.get((line.rank, line.step), line.digest):
            wrong.append(f"rank {line.rank} came to step {line.step} again with another state than before")
    return Verdict(step=step, lost=tuple(sorted(s for s in acknowledged if s > step)), wrong=tuple(wrong))


def _digests(lines: Iterable[Line]) -> Mapping[tuple[int, int], str]:
    """Return the first digest that each rank told of each step."""
    said: dict[tuple[int, int], str] = {}
    for line in lines:
        if line.event == "saving":
            said.setdefault((line.rank, line.step), line.digest)
    return said
