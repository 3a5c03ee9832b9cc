"""`distckpt import SRC URL`: take in what torch.save, safetensors or DCP wrote, as a checkpoint of a run.

What `distckpt export` wrote whole comes back as the checkpoint that it was: step, keys, names, dtypes, shapes, bytes,
values, metrics and configuration; run, attempt, times and layout are new. Other files: a dict of tensors alone is a
model's weights, and stands under --key; of any other dict each item is a key of the state. No pickle of more than
tensors and plain values is opened.

JSON: {"source", "path" (of the checkpoint), "step", "keys", "tensors", "bytes" (of its data files), "from_export"
(whether it was one of distckpt's), "dropped" (what wrappers had put before names, by key), "seconds"}.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer

from distckpt import names
from distckpt.cli import terminal
from distckpt.cli.options import AsJson, StorageOptions, open_url
from distckpt.leasefiles import refuse_running


class Format(StrEnum):
    """What other tools write."""

    AUTO = "auto"
    TORCH = "torch"
    SAFETENSORS = "safetensors"
    DCP = "dcp"


Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A file of torch.save or safetensors, or a folder of safetensors files or DCP's."
    ),
]
Directory = Annotated[
    str,
    typer.Argument(metavar="URL", help="A run's directory: the checkpoint becomes URL/step-...", show_default=False),
]
Step = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Steps completed; by default what an export says, or 0.", show_default=False),
]
Key = Annotated[str, typer.Option(metavar="NAME", help="The state's key for a file of bare weights.")]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW", help="Rename a key: model_state_dict=model; may be given several times.", show_default=False
    ),
]


def import_(
    src: Src,
    url: Directory,
    *,
    form: Annotated[Format, typer.Option("--format", help="What SRC is; auto looks.")] = Format.AUTO,
    step: Step = None,
    key: Key = "model",
    rename: Rename = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Take in what torch.save, safetensors or DCP wrote, without running any of it, as a checkpoint of a run."""
    renamed = dict(_pair(text) for text in rename or ())
    storage = open_url(url, storage_options)
    refuse_running(storage)
    from distckpt.exchange import intake

    begun = time.monotonic()
    taken = intake.read(src, form=form.value, key=key, renamed=renamed)
    with terminal.watched_writes("writing", storage, total_bytes=taken.num_bytes) as watched:
        folder, manifest = intake.commit(taken, watched, step=step)
    seconds = time.monotonic() - begun
    path = names.join(storage.url, folder)
    if as_json:
        terminal.print_json(
            {
                "source": src,
                "path": path,
                "step": manifest.step,
                "keys": sorted(manifest.objects),
                "tensors": len(manifest.tensors),
                "bytes": manifest.num_bytes,
                "from_export": taken.record is not None,
                "dropped": taken.dropped,
                "seconds": seconds,
            }
        )
        return
    print(path)
    for name, prefix in taken.dropped.items():
        terminal.say(f"{name}: dropped {prefix!r} before each name")
    keys = ", ".join(sorted(manifest.objects))
    what = f"step {manifest.step}: {terminal.count_text(len(manifest.tensors), 'tensor')} in {keys}"
    terminal.say(f"{what}; {terminal.rate_text(manifest.num_bytes, seconds)}")


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise typer.BadParameter(f"--rename takes OLD=NEW, not {text!r}")
    return old, new
