"""`distckpt pin URL` and `distckpt unpin URL`: tell retention to keep a checkpoint for good, or no longer.

Of a run's directory, `--step N` names the checkpoint; without it the newest is meant.

JSON: {"url", "step", "path", "pinned" (as it now is), "changed" (false: it was so already), "all_pinned" (the steps of
the run that are pinned; of one checkpoint's folder, its own)}.
"""

from __future__ import annotations

from distckpt import catalog, names, pins
from distckpt.cli import terminal
from distckpt.cli.options import AsJson, Step, StorageOptions, Url, open_url
from distckpt.errors import CheckpointNotFoundError
from distckpt.storage import Storage


def pin(url: Url, *, step: Step = None, as_json: AsJson = False, storage_options: StorageOptions = None) -> None:
    """Pin a checkpoint, so that retention and prune keep it; of a run the newest, or --step N."""
    storage = open_url(url, storage_options)
    folder, found = _locate(storage, step)
    _tell(storage, folder, found, is_pinned=True, changed=pins.pin(storage, folder), as_json=as_json)


def unpin(url: Url, *, step: Step = None, as_json: AsJson = False, storage_options: StorageOptions = None) -> None:
    """Take a checkpoint's pin away; of a run the newest's, or that of --step N."""
    storage = open_url(url, storage_options)
    folder, found = _locate(storage, step, also_damaged=True)
    _tell(storage, folder, found, is_pinned=False, changed=pins.unpin(storage, folder), as_json=as_json)


def _locate(storage: Storage, step: int | None, *, also_damaged: bool = False) -> tuple[str, int]:
    """Return the folder of the checkpoint that is meant, and its step."""
    try:
        folder, manifest = catalog.locate(storage, step=step)
    except CheckpointNotFoundError:
        folders = {one.step: one for one in catalog.scan(storage)}
        if step is None or not also_damaged or step not in folders:
            raise
        return folders[step].name, step
    return folder, manifest.step


def _tell(storage: Storage, folder: str, step: int, *, is_pinned: bool, changed: bool, as_json: bool) -> None:
    own = [step] if is_pinned else []
    pinned = pins.pinned_steps(storage) if folder else own
    path = names.join(storage.url, folder)
    if as_json:
        facts = {"url": storage.url, "step": step, "path": path, "pinned": is_pinned}
        terminal.print_json({**facts, "changed": changed, "all_pinned": pinned})
        return
    state = "pinned" if is_pinned else "not pinned"
    print(f"step {step}: {state}" if changed else f"step {step}: {state} (it was so already)")
    if folder:
        terminal.say(f"pinned in {storage.url}: {', '.join(map(str, pinned)) or 'none'}")
