"""Export: a checkpoint, or a part of it, written as other tools read it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from distckpt.errors import ConfigError, StorageError
from distckpt.exchange import tensor_files
from distckpt.exchange.chosen import Chosen, choose, default_key
from distckpt.exchange.placement import local_target, placed

if TYPE_CHECKING:
    from distckpt.arrays import Source

Format = Literal["safetensors", "torch", "dcp", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_FILE_BYTES = 5_000_000_000  # as Hugging Face cuts


def export(
    source: Source,
    target: str,
    *,
    form: Format,
    key: str | None = None,
    only: Sequence[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    watch: Callable[[int], None] = lambda total_bytes: None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Chosen:
    """Write a checkpoint in another tool's format, and return what of it was written.

    | form | target | holds |
    |---|---|---|
    | "safetensors" | a file `*.safetensors`, else a folder laid out like "hf" | tensors; values in the metadata |
    | "hf" | a folder: `model.safetensors`, or several files and `model.safetensors.index.json` | the model's tensors |
    | "torch" | a file that `torch.load(weights_only=True)` opens | tensors and values |
    | "dcp" | a folder that `torch.distributed.checkpoint.load` reads | tensors and values |

    Args:
        source: The checkpoint.
        target: A local path that does not exist.
        form: The format.
        key: Export this key of the state alone, such as "model", without its name; "hf" does so by itself.
        only: Shell patterns of the only entries to export.
        max_file_bytes: How much of tensors a file of a folder of safetensors files holds.
        watch: Is told once, before the first byte, how many there are.
        advance: Is told of bytes that are done.

    Raises:
        ConfigError: There is no such key, a pattern fits nothing, or the target is a URL.
        StorageError: The target exists or cannot be written, or the checkpoint cannot be read.
        CheckpointDamagedError: The checkpoint's bytes are not the ones that were written; there is no target.

    Ranks: any; "torch" and "dcp" take memory for all that is exported.
    """
    if form not in FORMATS:
        raise ConfigError(source="format", problem=f"must be one of {', '.join(FORMATS)}, is {form!r}")
    if max_file_bytes < 1:
        raise ConfigError(source="max_file_bytes", problem=f"must be at least 1, is {max_file_bytes}")
    path = local_target(target)
    if form == "hf" and key is None:
        key = default_key(source)
    chosen = choose(source, key=key, only=only)
    is_folder = form in ("hf", "dcp") or (form == "safetensors" and path.suffix != ".safetensors")
    watch(chosen.num_bytes)
    with placed(path, folder=is_folder) as temporary:
        if form == "torch":
            _write_torch(temporary, chosen, advance)
        elif form == "dcp":
            _write_dcp(temporary, chosen, advance)
        elif is_folder:
            tensor_files.write_folder(temporary, chosen, max_bytes=max_file_bytes, advance=advance)
        else:
            tensor_files.write_file(temporary, chosen, advance=advance)
    return chosen


def _write_torch(path: Path, chosen: Chosen, advance: Callable[[int], object]) -> None:
    import torch

    from distckpt.exchange.nested import content

    made = content(chosen, advance=advance)
    try:
        torch.save(made, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise StorageError(path=str(path), action="write", cause=str(error).partition("\n")[0]) from error


def _write_dcp(path: Path, chosen: Chosen, advance: Callable[[int], object]) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    from distckpt.exchange.nested import content

    made = content(chosen, advance=advance)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is asked to be
            save(made, checkpoint_id=path, no_dist=True)
    except BaseException as error:
        if type(error).__name__ == "CheckpointException":  # DCP's own, which is no Exception
            raise StorageError(path=str(path), action="write", cause=str(error).partition("\n")[0]) from error
        raise
