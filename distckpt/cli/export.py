"""`distckpt export URL DST --format ...`: write a checkpoint as other tools read it.

| format | DST | what opens it |
|---|---|---|
| `safetensors` | a file `*.safetensors`, else a folder like that of `hf` | any safetensors reader |
| `hf` | a folder: the model's `model.safetensors`, or several files and an index | Hugging Face's libraries |
| `torch` | a file | `torch.load(DST, weights_only=True)` |
| `dcp` | a folder | `torch.distributed.checkpoint.load` |

DST is a local path that does not exist; it appears when it is whole.

JSON: {"path" (of the checkpoint), "step", "target", "format", "key" (or null), "whole" (whether `distckpt import` gives
back the whole checkpoint), "tensors", "values" (how many were chosen, and go out where the format has a place for
them), "bytes" (of tensors), "seconds"}.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distckpt import catalog
from distckpt.cli import terminal
from distckpt.cli.options import AsJson, Step, StorageOptions, Url, open_url, parse_size

if TYPE_CHECKING:
    from distckpt.exchange import Chosen


class Format(StrEnum):
    """What other tools read."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"
    HF = "hf"


Dst = Annotated[str, typer.Argument(metavar="DST", help="A local path that does not exist.", show_default=False)]
As = Annotated[Format, typer.Option("--format", help="Who is to read it.", show_default=False)]
Key = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One key of the state, such as model, without its name; hf takes the model by itself.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Entries to take: 'model.fc.*'; may be given several times.", show_default=False
    ),
]
MaxFileBytes = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        parser=parse_size,
        help="The most of tensors in one file of a folder of safetensors: 500MB; by default 5GB.",
        show_default=False,
    ),
]


def export(
    url: Url,
    dst: Dst,
    *,
    form: As,
    step: Step = None,
    key: Key = None,
    only: Only = None,
    max_file_bytes: MaxFileBytes = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Write a checkpoint as safetensors, torch.save's file, a DCP folder, or for Hugging Face; of a run the newest."""
    from distckpt.arrays import Source
    from distckpt.exchange.export import MAX_FILE_BYTES
    from distckpt.exchange.export import export as write

    storage = open_url(url, storage_options)
    folder, manifest = catalog.locate(storage, step=step)
    source = Source(storage=storage, folder=folder, manifest=manifest)
    begun = time.monotonic()
    with terminal.moving("exporting") as advance:
        chosen = write(
            source,
            dst,
            form=form.value,
            key=key,
            only=only or (),
            max_file_bytes=max_file_bytes or MAX_FILE_BYTES,
            watch=advance.expect,
            advance=advance,
        )
    seconds = time.monotonic() - begun
    facts = _facts(chosen, dst, form)
    if as_json:
        terminal.print_json({**facts, "seconds": seconds})
        return
    print(dst)
    what = f"step {manifest.step}: {terminal.count_text(facts['tensors'], 'tensor')}"
    if facts["values"] and form in (Format.TORCH, Format.DCP):
        what += f" and {terminal.count_text(facts['values'], 'value')}"
    elif facts["values"] and not chosen.whole:
        what += f"; {terminal.count_text(facts['values'], 'value')} left out, for which {form} has no place"
    terminal.say(f"{what}; {terminal.rate_text(facts['bytes'], seconds)}")


def _facts(chosen: Chosen, dst: str, form: Format) -> dict[str, Any]:
    return {
        "path": chosen.source.path,
        "step": chosen.source.manifest.step,
        "target": dst,
        "format": form.value,
        "key": chosen.key,
        "whole": chosen.whole,
        "tensors": len(chosen.tensors()),
        "values": chosen.num_values,
        "bytes": chosen.num_bytes,
    }
