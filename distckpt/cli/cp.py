"""`distckpt cp SRC DST`: copy a checkpoint, or a run's, to another directory or storage.

Checkpoints come to lie in DST as they lie in a run: DST/step-...; or in DST itself, if that is what its name says.
Each is committed like a save, its manifest last, every byte checked on the way. What is there already is not copied
again: whole checkpoints, and of one whose copy was killed, what it had done, also of the files that it was at.
A pinned checkpoint's copy is pinned.

JSON: {"source", "target", "bytes" (written), "reused_bytes" (of earlier copies), "seconds", "checkpoints": [...]},
newest first, each with "step", "path" (at the target), "action" ("copied", "present" or "damaged": left out), "bytes",
"reused_bytes", "problem" (of a damaged one, else null).
Exit code 5 if one was damaged, after the others are copied; 6 if the target has another checkpoint of that step; 7 if a
job that runs owns it.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from distckpt import catalog, names
from distckpt.cli import terminal
from distckpt.cli.exits import Exit
from distckpt.cli.options import AsJson, Step, StorageOptions, is_local, open_url, parse_options
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError
from distckpt.leasefiles import refuse_running
from distckpt.storage import FileInfo, Storage
from distckpt.transfer import Copied, Place, copy

Src = Annotated[str, typer.Argument(metavar="SRC", help="A run's directory, or one checkpoint's folder.")]
Dst = Annotated[str, typer.Argument(metavar="DST", help="A run's directory: checkpoints become DST/step-...")]
Last = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="The newest N of the run; by default all.", show_default=False)
]
TargetOptions = Annotated[
    dict[str, Any] | None,
    typer.Option(metavar="JSON", parser=parse_options, help="As --storage-options, for DST alone.", show_default=False),
]


def cp(
    src: Src,
    dst: Dst,
    *,
    step: Step = None,
    last: Last = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
    target_options: TargetOptions = None,
) -> None:
    """Copy a checkpoint, or all of a run, to another storage: every byte checked, the manifest last, resumable.

    Storage options are for those of SRC and DST that are no local paths.
    """
    if step is not None and last is not None:
        raise typer.BadParameter("--step and --last exclude each other")
    is_mixed = is_local(src) != is_local(dst)
    source = open_url(src, None if is_mixed and is_local(src) else storage_options)
    target = open_url(dst, target_options or (None if is_mixed and is_local(dst) else storage_options))
    chosen = _chosen(source, src, step=step, last=last)
    _refuse_nonsense(source, target, chosen)
    refuse_running(target)
    begun = time.monotonic()
    results = []
    with terminal.moving("copying", total_bytes=sum(_data_bytes(files) for _, files, _ in chosen)) as advance:
        for folder, _, is_pinned in chosen:
            result = _copy(Place(storage=source, folder=folder), target, pinned=is_pinned, advance=advance)
            if result is not None:
                results.append(result)
                _tell(result)
    _conclude(source, target, results, seconds=time.monotonic() - begun, as_json=as_json)


def _chosen(
    source: Storage, url: str, *, step: int | None, last: int | None
) -> list[tuple[str, tuple[FileInfo, ...], bool]]:
    """Return the folder of each checkpoint that is meant, its files, and whether it is pinned; newest first."""
    folders = [folder for folder in catalog.scan(source) if folder.committed]
    found = [(one.name, one.files, one.pinned) for one in reversed(folders) if step in (None, one.step)][:last]
    if found:
        return found
    files = tuple(source.list())
    inner = {file.name for file in files}
    if names.MANIFEST in inner:
        catalog.locate(source, step=step)
        return [("", files, names.PIN in inner)]
    if step is not None and folders:
        reason = f"of step {step} there is none; committed are {', '.join(f'{one.step}' for one in folders)}"
    else:
        reason = catalog.absence(catalog.scan(source))
    raise CheckpointNotFoundError(path=source.url, reason=reason, fix=f"distckpt ls {url}")


def _refuse_nonsense(source: Storage, target: Storage, chosen: list[Any]) -> None:
    if source.url == target.url:
        raise ConfigError(source="DST", problem=f"{target.url!r} is the source itself")
    named = _named_step(target)
    if named is not None and len(chosen) > 1:
        raise ConfigError(
            source="DST",
            problem=f"{target.url!r} is one checkpoint's folder, and there are {len(chosen)} to copy",
            fix=f"give a run's directory, {target.url.rstrip('/').rpartition('/')[0]}, or --step N",
        )


def _named_step(storage: Storage) -> int | None:
    return names.parse_step(storage.url.rstrip("/").rpartition("/")[2])


def _data_bytes(files: tuple[FileInfo, ...]) -> int:
    return sum(file.num_bytes for file in files if not file.name.endswith((names.MANIFEST, names.PIN)))


def _copy(source: Place, target: Storage, *, pinned: bool, advance: Any) -> dict[str, Any] | None:
    """Copy one checkpoint, and return what was done; None if it was deleted meanwhile."""
    try:
        step = catalog.read_manifest(source.storage, source.folder).step
        named = _named_step(target)
        if named is not None and named != step:
            raise ConfigError(source="DST", problem=f"{target.url!r} is a folder for step {named}, not {step}")
        goal = Place(storage=target, folder="" if named is not None else names.step_name(step))
        copied = copy(source, goal, pinned=pinned, advance=advance)
    except CheckpointNotFoundError:
        terminal.say(f"{source.path} was deleted meanwhile")
        return None
    except CheckpointDamagedError as error:
        if not error.path.startswith(source.path):
            raise
        step_text = names.parse_step(source.folder) if error.step is None else error.step
        return _facts(step_text, source.path, None, problem=f"{error.file or names.MANIFEST} {error.problem}")
    return _facts(step, goal.path, copied)


def _facts(step: int | None, path: str, copied: Copied | None, *, problem: str | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "path": path,
        "action": copied.action if copied else "damaged",
        "bytes": copied.num_bytes if copied else 0,
        "reused_bytes": copied.reused_bytes if copied else 0,
        "problem": problem,
    }


def _tell(result: dict[str, Any]) -> None:
    step, reused = result["step"], result["reused_bytes"]
    match result["action"]:
        case "copied":
            more = f", {terminal.size_text(reused)} were there from an earlier try" if reused else ""
            terminal.say(f"step {step}: copied {terminal.size_text(result['bytes'])}{more}")
        case "present":
            terminal.say(f"step {step}: there already")
        case _:
            terminal.complain(f"step {step} is damaged and was left out: {result['path']}: {result['problem']}")


def _conclude(
    source: Storage, target: Storage, results: list[dict[str, Any]], *, seconds: float, as_json: bool
) -> None:
    moved = sum(result["bytes"] for result in results)
    if as_json:
        facts = {"source": source.url, "target": target.url, "bytes": moved}
        facts |= {"reused_bytes": sum(result["reused_bytes"] for result in results), "seconds": seconds}
        terminal.print_json(facts | {"checkpoints": results})
    else:
        for result in results:
            if result["problem"] is None:
                print(result["path"])
        good = sum(result["problem"] is None for result in results)
        text = f"{good} of {terminal.count_text(len(results), 'checkpoint')} at {target.url}"
        terminal.say(f"{text}; copied {terminal.rate_text(moved, seconds)}" if moved else f"{text}; nothing to copy")
    if any(result["problem"] for result in results):
        raise typer.Exit(Exit.UNREADABLE)
