"""`distckpt torture URL`: kill a small job again and again on your own storage, and see whether it comes back right.

JSON: {"url", "seed", "ranks", "layout", "kills", "kills_in_save", "acknowledged" (saves), "lost" (steps), "wrong",
"failed", "damaged" (texts), "most_abandoned" (saves that lay there after a kill without being committed), "left_over"
(abandoned saves and temporary files at the end), "from_memory" (starts that read no data from the storage), "seconds",
"kept" (whether the folder is still there), "fine"}.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distckpt.cli import terminal
from distckpt.cli.exits import Exit
from distckpt.cli.options import AsJson, StorageOptions
from distckpt.storage import Storage

if TYPE_CHECKING:
    from distckpt.torture.campaign import Report, Settings

KILLS = 20


class LayoutName(StrEnum):
    """Who writes."""

    SHARDED = "sharded"
    FULL = "full"


Directory = Annotated[
    str, typer.Argument(metavar="URL", help="Where to try; a new folder below it is used.", show_default=False)
]
Kills = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Kill so often; 20 without --minutes.", show_default=False)
]
Minutes = Annotated[float | None, typer.Option(metavar="M", min=0, help="Go on for so long.", show_default=False)]
NumRanks = Annotated[int, typer.Option("--ranks", metavar="N", min=1, help="How many ranks the job has.")]
LayoutOption = Annotated[LayoutName, typer.Option(help="Who writes: all ranks, or rank 0.")]
Megabytes = Annotated[float, typer.Option(metavar="MB", min=0.01, help="The size of the state.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the moments of the kills, the model and the data.")]
MemoryTierOption = Annotated[
    bool, typer.Option("--memory-tier", help="Let the job keep its newest checkpoint in this machine's memory, too.")
]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the folder; it also stays if anything was wrong.")]


def torture(
    url: Directory,
    *,
    kills: Kills = None,
    minutes: Minutes = None,
    ranks: NumRanks = 2,
    layout: LayoutOption = LayoutName.SHARDED,
    megabytes: Megabytes = 4.0,
    seed: Seed = 0,
    memory_tier: MemoryTierOption = False,
    keep: Keep = False,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Kill a small job with SIGKILL again and again on your own storage, more than half the time in a save.

    After each kill the job is started again; what it comes back to is compared with a journal that is kept elsewhere.
    It needs torch, and runs on CPUs. It ends with 1 if a checkpoint was lost or wrong, or the job did not come back.
    """
    from distckpt.torture.campaign import Settings, run

    settings = Settings(
        url=url,
        kills=KILLS if kills is None and minutes is None else kills,
        minutes=minutes,
        num_ranks=ranks,
        layout=layout.value,
        megabytes=megabytes,
        seed=seed,
        memory_tier=memory_tier,
        keep=keep,
        storage_options=storage_options,
    )
    report = run(settings, after_kill=_tell)
    if as_json:
        terminal.print_json(_facts(settings, report))
    else:
        _print(settings, report)
    if not report.is_fine:
        raise typer.Exit(Exit.DIFFERENT)


def _tell(report: Report, storage: Storage) -> None:
    """Say how far it is, at the first kill and at every tenth."""
    if report.kills == 1:
        terminal.say(f"killing a job in {storage.url}")
    if report.kills % 10 == 0:
        terminal.say(f"killed {report.kills} times, {report.kills_in_save} in a save: {_found(report)}")


def _found(report: Report) -> str:
    parts: dict[str, list[Any]] = {"lost": [*report.lost], "wrong": [*report.wrong], "failed": [*report.failed]}
    return ", ".join(f"{len(found)} {name}" for name, found in parts.items())


def _facts(settings: Settings, report: Report) -> dict[str, Any]:
    return {
        "url": report.directory,
        "seed": settings.seed,
        "ranks": settings.num_ranks,
        "layout": settings.layout,
        "kills": report.kills,
        "kills_in_save": report.kills_in_save,
        "acknowledged": report.acknowledged,
        "lost": report.lost,
        "wrong": report.wrong,
        "failed": report.failed,
        "damaged": report.damaged,
        "most_abandoned": report.most_abandoned,
        "left_over": report.left_over,
        "from_memory": report.from_memory,
        "seconds": report.duration_s,
        "kept": report.is_kept,
        "fine": report.is_fine,
    }


def _print(settings: Settings, report: Report) -> None:
    memory = {"starts from memory": f"{report.from_memory}; {report.most_in_memory} saves there at most after a kill"}
    rows = {
        "kills": f"{report.kills}, of these {report.kills_in_save} in a save",
        "acknowledged saves": f"{report.acknowledged}",
        "lost": _counted(report.lost),
        "wrong states": _counted(report.wrong),
        "failed starts": _counted(report.failed),
        "damaged at the end": _counted(report.damaged),
        "abandoned saves": f"{report.most_abandoned} at most after a kill",
        **(memory if settings.memory_tier else {}),
        "left over": f"{report.left_over} at the end",
        "took": f"{report.duration_s:.0f} s",
    }
    for name, text in rows.items():
        print(f"{name:<20}{text}")
    if report.is_kept:
        terminal.say(f"left for a look: {report.directory}")


def _counted(found: list[Any]) -> str:
    return "0" if not found else f"{len(found)}: " + "; ".join(str(one) for one in found[:5])
