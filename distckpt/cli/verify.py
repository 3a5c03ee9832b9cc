"""`distckpt verify URL`: whether every byte is what was written.

JSON: {"url", "whole", "sample", "checkpoints": [...]}, oldest step first, each with "step", "path", "state" (as `ls`
has it), "whole", "files" and "bytes" (of the data files read), "problems": [{"file" (relative to "path"), "problem"}].
Partial ones are no checkpoints, and left out.
With `--sample 1/7`, a seventh of each checkpoint's segments (of up to 4 MiB) is read, and "bytes" is how much that is;
1/7, 2/7, ... 7/7 together read everything, so a nightly job can take one each day. "sample" is then "1/7", else null.
The presence and the sizes of all files are checked each time.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from distckpt import catalog, inventory, names, verification
from distckpt.cli import terminal
from distckpt.cli.exits import Exit
from distckpt.cli.options import AsJson, Step, StorageOptions, Url, open_url
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from distckpt.inventory import Found
from distckpt.storage import Storage
from distckpt.verification import EVERYTHING, Problem, Sample


def _parse_sample(text: str) -> Sample:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter("no turn of turns, such as 1/7, 2/7, ... 7/7")
    return Sample(turn=int(match[1]), turns=int(match[2]))


SampleOption = Annotated[
    Sample | None,
    typer.Option(
        "--sample",
        metavar="K/N",
        parser=_parse_sample,
        help="Read the K-th of N parts only; all N together are everything.",
        show_default=False,
    ),
]


def verify(
    url: Url,
    *,
    step: Step = None,
    sample: SampleOption = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Read every byte of a run's checkpoints, or of one, and name each file that is bad."""
    storage = open_url(url, storage_options)
    found = [one for one in inventory.take(storage, brief=True) if step in (None, one.step)]
    chosen = [one for one in found if one.state != "partial"]
    if not chosen:
        what = "it holds none of that step" if step is not None and not found else "it holds only partial ones"
        raise CheckpointNotFoundError(path=storage.url, reason=what, fix=f"distckpt ls {url}")
    part = sample or EVERYTHING
    total_bytes = sum(one.num_bytes for one in chosen if one.checkpoint) // part.turns
    begun = time.monotonic()
    results = []
    with terminal.watched("reading", [storage], total_bytes=total_bytes) as (reading,):
        for one in chosen:
            result = _verify(reading, one, part)
            if result is None:
                terminal.say(f"step {one.step} was deleted meanwhile")
                continue
            results.append(result)
            if not as_json:
                _print(result)
    is_whole = all(result["whole"] for result in results)
    if as_json:
        said = f"{part.turn}/{part.turns}" if sample else None
        terminal.print_json({"url": storage.url, "whole": is_whole, "sample": said, "checkpoints": results})
    else:
        _print_summary(results, num_partial=len(found) - len(chosen), part=part, seconds=time.monotonic() - begun)
    if not is_whole:
        raise typer.Exit(Exit.DIFFERENT)


def _verify(storage: Storage, found: Found, part: Sample) -> dict[str, Any] | None:
    """Read one checkpoint, and return what is wrong with it; None if it is deleted meanwhile."""
    num_files = num_bytes = 0
    problems = [Problem(file=found.problem_file or names.MANIFEST, problem=found.problem)] if found.problem else []
    if found.checkpoint is not None:
        try:
            manifest = catalog.read_manifest(storage, found.name)
            num_files, num_bytes = len(manifest.files), part.num_bytes(manifest)
            problems = list(verification.verify(storage, manifest, folder=found.name, sample=part))
            if problems:
                catalog.read_manifest(storage, found.name)  # who deletes a checkpoint begins with the manifest
        except CheckpointNotFoundError:
            return None
        except CheckpointDamagedError as error:
            problems = [Problem(file=error.file or names.MANIFEST, problem=error.problem)]
    return {
        "step": found.step,
        "path": names.join(storage.url, found.name),
        "state": found.state,
        "whole": not problems,
        "files": num_files,
        "bytes": num_bytes,
        "problems": [{"file": problem.file, "problem": problem.problem} for problem in problems],
    }


def _print(result: dict[str, Any]) -> None:
    from rich.text import Text

    step = "step ?" if result["step"] is None else f"step {result['step']:,}"
    if result["whole"]:
        read = f"{terminal.count_text(result['files'], 'file')}, {terminal.size_text(result['bytes'])}"
        line = Text.assemble(f"{step}  ", ("whole", "green"), f"  {read}")
    else:
        line = Text.assemble(f"{step}  ", ("damaged", "bold red"), f"  {result['path']}")
    for problem in result["problems"]:
        line.append(f"\n  {problem['file']} {problem['problem']}")
    terminal.output().print(line, soft_wrap=True)


def _print_summary(results: list[dict[str, Any]], *, num_partial: int, part: Sample, seconds: float) -> None:
    num_whole = sum(result["whole"] for result in results)
    read = terminal.rate_text(sum(result["bytes"] for result in results), seconds)
    text = f"{num_whole} of {terminal.count_text(len(results), 'checkpoint')} whole; {read}"
    if part.turns > 1:
        text = f"{text}; part {part.turn} of {part.turns}: the others are not read"
    terminal.say(f"{text}; {num_partial} partial left out" if num_partial else text)
